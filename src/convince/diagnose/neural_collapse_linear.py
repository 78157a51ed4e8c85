"""Neural collapse: how near a classifier's features and last layer are to the frames that theory predicts, and the predicted lengths under imbalance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.kinds import Probe, as_found
from convince.parts import Card
from convince.types import Curves, Findings, Plane, Reading

CARD = Card(
    part="neural-collapse-linear",
    kind="probe",
    paper="neural-collapse-linear",
    title="Neural Collapse in Deep Linear Networks: From Balanced to Imbalanced Data",
    year=2023,
    url="https://arxiv.org/abs/2301.00437",
    expects=("labels", "logits"),
    departs=(
        "it is measured on the images given, which may be a part of the training set; the paper uses all of it",
        "both frames are reported, since a finished network does not tell its loss: the simplex frame belongs to cross-entropy or a free bias, "
        "the orthogonal one to squared error without bias",
        "lengths predicted for unequal classes need the whole training set and the loss's constants; predicted_geometry gives them, the probe does not",
        "lengths come from a one-dimensional search for each class, the released code solves the same equation by symbols",
    ),
)
Matrix = Float[Tensor, "k k"]

# -- metrics ----------------------------------------------------------------------------------------


def class_means(h: Float[Tensor, "N d"], y: Int[Tensor, " N"]) -> tuple[Float[Tensor, "k d"], Int[Tensor, " N"]]:
    """Means of the classes that occur, in ascending order, in float64; and each row's place among them."""
    classes, place, counts = y.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise Mistake(f"neural collapse compares classes, and the labels hold {len(classes)}; give rows of at least two classes")
    sums = torch.zeros(len(classes), h.shape[1], dtype=torch.float64, device=h.device).index_add_(0, place, h.double())
    return sums / counts[:, None], place


def centred(h: Float[Tensor, "N d"], y: Int[Tensor, " N"]) -> tuple[Float[Tensor, "N d"], Float[Tensor, "k d"]]:
    """Rows less their class mean, and class means less the mean of all rows."""
    means, place = class_means(h, y)
    return h.double() - means[place], means - h.double().mean(0)


def nc1(h: Float[Tensor, "N d"], y: Int[Tensor, " N"]) -> float:
    """``tr(S_W pinv(S_B)) / K``: ``S_W`` the covariance within classes over N, ``S_B`` that of the K class means. ``inf`` where all means coincide."""
    within, between = centred(h, y)
    if not bool(between.any()):
        return math.inf
    # S_B = C'C / K, so that tr(S_W pinv(S_B)) / K = |within pinv(C)|^2 / N, and no d x d matrix is made
    return float((within @ torch.linalg.pinv(between)).square().sum() / len(h))


def nc1_ratio(h: Float[Tensor, "N d"], y: Int[Tensor, " N"]) -> float:
    """``tr(S_W) / tr(S_B)``, which needs no inverse. ``inf`` where all means coincide."""
    within, between = centred(h, y)
    if not bool(between.any()):
        return math.inf
    return float(within.square().sum() / len(h) / (between.square().sum() / len(between)))


def simplex_frame(k: int) -> Matrix:
    """The simplex equiangular tight frame's Gram matrix ``(I - 11'/K) / sqrt(K - 1)``, of Frobenius length 1."""
    return (torch.eye(k, dtype=torch.float64) - 1 / k) / math.sqrt(k - 1)


def orthogonal_frame(lengths: Float[Tensor, " k"] | int) -> Matrix:
    """The Gram matrix of orthogonal vectors of these lengths (a general orthogonal frame), or of K equal ones; of Frobenius length 1."""
    squares = torch.ones(lengths, dtype=torch.float64) if isinstance(lengths, int) else lengths.double().square()
    return torch.diag(F.normalize(squares, dim=0))


def distance(a: Float[Tensor, "k k"], target: Float[Tensor, "k k"]) -> float:
    """``| A / |A|_F  -  T / |T|_F |_F``, 0 to 2: 0 where they are equal but for a factor."""
    a, target = a.double(), target.to(a.device).double()
    return float((a / a.norm().clamp_min(1e-300) - target / target.norm().clamp_min(1e-300)).norm())


def nc2(vectors: Float[Tensor, "k d"], target: Float[Tensor, "k k"]) -> float:
    """Distance of the vectors' Gram matrix from a frame's: rows of W, or class means (for the simplex frame less the mean of all rows)."""
    return distance(vectors.double() @ vectors.double().T, target)


def nc3(w: Float[Tensor, "k d"], means: Float[Tensor, "k d"], target: Float[Tensor, "k k"]) -> float:
    """Distance of ``W Hbar`` from a frame: do weights and class means point the same way?"""
    return distance(w.double() @ means.double().T, target)


def nc4(scores: Float[Tensor, "N k"], h: Float[Tensor, "N d"], y: Int[Tensor, " N"]) -> float:
    """Share of rows whose highest score, among classes that occur, is not the class of the nearest mean."""
    means, _ = class_means(h, y)
    return float((scores[:, y.unique()].argmax(1) != torch.cdist(h.double(), means).argmin(1)).double().mean())


def nc_metrics(h: Float[Tensor, "N d"], y: Int[Tensor, " N"], w: Float[Tensor, "k d"], bias: Float[Tensor, " k"] | None = None) -> dict[str, float]:
    """All metrics of features ``h`` and a last layer; classes without rows are left out. 0 is full collapse.

    ``_etf``: against the simplex frame, class means less the mean of all rows; ``_of``: against the orthogonal frame, class means as they are.
    """
    means, _ = class_means(h, y)
    here = y.unique()
    rows, k = w[here].double(), len(here)
    between, simplex, orthogonal = means - h.double().mean(0), simplex_frame(k), orthogonal_frame(k)
    scores = F.linear(h.double(), w.double(), None if bias is None else bias.double())
    return {
        "nc1": nc1(h, y),
        "nc1_ratio": nc1_ratio(h, y),
        "nc2_etf": nc2(rows, simplex),
        "nc2_of": nc2(rows, orthogonal),
        "nc2_means_etf": nc2(between, simplex),
        "nc2_means_of": nc2(means, orthogonal),
        "nc3_etf": nc3(rows, between, simplex),
        "nc3_of": nc3(rows, means, orthogonal),
        "nc4": nc4(scores, h, y),
    }


def products(weights: Sequence[Tensor]) -> list[Tensor]:
    """``W_M, W_M W_{M-1}, ..., W_M ... W_1`` for linear layers given from the first, ``W_1``, to the last: collapse is predicted for each (NC2 by layer)."""
    found = [weights[-1]]
    for w in reversed(weights[:-1]):
        found.append(found[-1] @ w)
    return found


# -- the model with free features, and its minimum ---------------------------------------------------


class Geometry(NamedTuple):
    """Predicted lengths by class: rows of ``W_M ... W_1``, and class means; both 0 for a class that collapses to zero. Different classes are orthogonal."""

    weight: Float[Tensor, " k"]
    feature: Float[Tensor, " k"]


def predicted_geometry(counts: Sequence[int], lam_w: Sequence[float], lam_h: float) -> Geometry:
    """The global minimum of the bias-free squared error with ``M = len(lam_w)`` linear layers on free features, for classes of these sizes.

    At it ``lam_m sigma_m^2 = n_k lam_h eta^2 = u^2`` for each class, so that u minimises ``n_k/2N (c u^(M+1) - 1)^2 + (M+1)/2 u^2`` with
    ``c = (lam_1 ... lam_M n_k lam_h)^(-1/2)``. For M = 1: ``|w|^2 = sqrt(n_k lam_h / lam_w) - N lam_h`` and ``|h|^2 = s sqrt(lam_w / (n_k lam_h))``,
    ``s = 1 - N sqrt(lam_w lam_h / n_k)``, and zero where ``s <= 0``.
    """
    from scipy.optimize import brentq

    if not lam_w or min(*lam_w, lam_h) <= 0:
        raise Mistake(f"predicted_geometry: lam_w={list(lam_w)}, lam_h={lam_h}: each must be above 0, and at least one layer")
    m, total = len(lam_w), sum(counts)
    weight, feature = [], []
    for n in counts:
        c = 1 / math.sqrt(math.prod(lam_w) * n * lam_h)

        def slope(u: float, c: float = c, n: int = n) -> float:  # of the objective, over -(M+1) u
            return n / total * c * (1 - c * u ** (m + 1)) * u ** (m - 1) - 1

        def value(u: float, c: float = c, n: int = n) -> float:
            return n / (2 * total) * (c * u ** (m + 1) - 1) ** 2 + (m + 1) / 2 * u**2

        crest, end = (((m - 1) / (2 * m) / c) ** (1 / (m + 1)), (1 / c) ** (1 / (m + 1)))  # slope is highest at the crest and negative at the end
        u = brentq(slope, crest, end, xtol=1e-15) if slope(crest) > 0 else 0.0
        u = u if value(u) < value(0) else 0.0
        weight.append(math.prod(u / math.sqrt(lam) for lam in lam_w))
        feature.append(u / math.sqrt(n * lam_h))
    return Geometry(torch.tensor(weight, dtype=torch.float64), torch.tensor(feature, dtype=torch.float64))


class FreeFeatures(NamedTuple):
    """A stationary point: ``weights`` from the first layer to the last, ``bias`` or None, features [N d], their classes; ``objective``.

    ``gradient``: the length of the gradient over that of the regulariser's alone, 0 where it has converged.
    """

    weights: list[Tensor]
    bias: Tensor | None
    h: Float[Tensor, "N d"]
    y: Int[Tensor, " N"]
    objective: float
    gradient: float


def unconstrained_feature_model(
    counts: Sequence[int],
    d: int,
    lam_w: Sequence[float],
    lam_h: float,
    gen: Generator,
    *,
    loss: Literal["mse", "ce"] = "mse",
    bias: bool = False,
    tolerance: float = 1e-8,
    steps: int = 20000,
) -> FreeFeatures:
    """Minimise ``1/2N |W_M ... W_1 H - Y|^2 + sum_m lam_m/2 |W_m|^2 + lam_h/2 |H|^2`` over layers and features from a random start, in float64.

    ``loss="ce"``: mean cross-entropy in place of the first term; ``bias``: a free bias of the last layer. L-BFGS, until ``gradient < tolerance``.
    """
    k, n = len(counts), sum(counts)
    y = torch.repeat_interleave(torch.arange(k), torch.tensor(counts))
    target = F.one_hot(y, k).double()

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=gen, dtype=torch.float64) / math.sqrt(d)).requires_grad_()

    weights = [normal(d, d) for _ in lam_w[1:]] + [normal(k, d)]
    h, shift = normal(n, d), torch.zeros(k, dtype=torch.float64, requires_grad=True)
    free = [*weights, h, *([shift] if bias else [])]

    def penalty() -> Tensor:
        return lam_h / 2 * h.square().sum() + sum(lam / 2 * w.square().sum() for lam, w in zip(lam_w, weights, strict=True))

    def objective() -> Tensor:
        scores = h
        for w in weights:
            scores = scores @ w.T
        scores = scores + shift
        fit = (scores - target).square().sum() / (2 * n) if loss == "mse" else F.cross_entropy(scores, y)
        return fit + penalty()

    def length(value: Tensor) -> float:
        return math.sqrt(sum(float(g.square().sum()) for g in torch.autograd.grad(value, free, allow_unused=True) if g is not None))

    def search(line: str | None, most: int) -> None:
        optimiser = torch.optim.LBFGS(free, max_iter=most, tolerance_grad=0, tolerance_change=0, history_size=20, line_search_fn=line)

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = objective()
            value.backward()
            return value

        optimiser.step(closure)

    gradient = math.inf
    for done in range(0, steps, 250):
        # near the minimum values agree to the last bit and a line search stalls; full steps do not need values
        search("strong_wolfe" if done == 0 or gradient > 1e-4 else None, 250)
        gradient = length(objective()) / max(length(penalty()), 1e-300)
        if gradient < tolerance:
            break
    found = [w.detach() for w in weights]
    return FreeFeatures(found, shift.detach() if bias else None, h.detach(), y, float(objective().detach()), gradient)


# -- the probe ---------------------------------------------------------------------------------------


class LastLayer(NamedTuple):
    """What the last linear layer of an answer is given, [n d], its weight and bias, and the answer's scores [n k]."""

    h: Float[Tensor, "n d"]
    w: Float[Tensor, "k d"]
    bias: Float[Tensor, " k"] | None
    scores: Float[Tensor, "n k"]


@torch.no_grad()
def last_layer(answer: nn.Module, x: Tensor, batch: int = 256) -> LastLayer:
    """The last linear layer that the answer asks for one number a class, at full precision. A Mistake where there is none."""
    asked: dict[str, tuple[nn.Linear, Tensor]] = {}
    linears = [m for m in answer.modules() if isinstance(m, nn.Linear)]

    def keep(module: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> None:
        if args[0].dim() == 2:
            asked[str(output.shape)] = module, args[0].clone()  # a clone: what follows may work in place

    handles = [m.register_forward_hook(keep) for m in linears]
    h, scores, layer = [], [], None
    try:
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round small spreads to nothing
            for part in x.split(batch):
                asked.clear()
                scores.append(answer(part))
                if str(scores[-1].shape) not in asked:
                    name = type(getattr(answer, "model", answer)).__name__
                    raise Mistake(f"neural-collapse-linear: {name} has no last linear layer with one output a class (nn.Linear); it reads classifiers that do")
                layer, features = asked[str(scores[-1].shape)]
                h.append(features)
    finally:
        for handle in handles:
            handle.remove()
    assert layer is not None
    return LastLayer(torch.cat(h), layer.weight.detach(), None if layer.bias is None else layer.bias.detach(), torch.cat(scores))


@final
@dataclass
class NeuralCollapseLinear(Probe):
    """Collapse of the last layer on the images given: nc1 to nc4, and how the lengths of class vectors go with the size of the class.

    Frames: see ``departs``. Where the means of all classes coincide (a dead network) nc1 and its ratio are left out; the first reading says so by 0.
    Where a class's weights are zero (a head that has not been trained) the last reading is left out.
    """

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        with as_found(answer):
            last = last_layer(answer, x)
        metrics = nc_metrics(last.h, y, last.w, last.bias)
        within, between = centred(last.h, y)
        apart = float(between.square().sum() / len(between))
        spread = float(within.square().sum() / len(within))
        here, counts = y.unique(return_counts=True)
        rows = last.w[here].double()
        lengths = {"weights": rows.norm(dim=1), "class means": class_means(last.h, y)[0].norm(dim=1)}
        longest, shortest = float(lengths["weights"].max()), float(lengths["weights"].min())
        own = F.linear(last.h, last.w, last.bias).argmax(1)
        unit = "0 is collapse"
        readings = [
            Reading("difference between class means", apart / max(apart + spread, 1e-300), "share of the features' variance"),
            Reading("nc1, tr(Sw pinv Sb) / K", metrics["nc1"], unit),
            Reading("nc1, tr(Sw) / tr(Sb)", metrics["nc1_ratio"], unit),
            Reading("nc2 of weights, simplex frame", metrics["nc2_etf"], unit),
            Reading("nc2 of weights, orthogonal frame", metrics["nc2_of"], unit),
            Reading("nc2 of class means, simplex frame", metrics["nc2_means_etf"], unit),
            Reading("nc2 of class means, orthogonal frame", metrics["nc2_means_of"], unit),
            Reading("nc3, simplex frame", metrics["nc3_etf"], unit),
            Reading("nc3, orthogonal frame", metrics["nc3_of"], unit),
            Reading("nc4, answers that are not the nearest class mean's", metrics["nc4"], "share of images"),
            Reading("answers that are the last layer's", float((own == last.scores.argmax(1)).double().mean()), "share of images"),
            Reading("weights, longest over shortest", longest / shortest if shortest else math.inf, "times"),
        ]
        unitary = F.normalize(rows, dim=1)
        sizes = {name: list(zip(counts.double().tolist(), (v / v.mean().clamp_min(1e-300)).tolist(), strict=True)) for name, v in lengths.items()}
        return Findings(
            [r for r in readings if math.isfinite(r.value)],
            [
                Plane("Cosines of the weights of classes", "class", "class", (unitary @ unitary.T).tolist()),
                Curves("Length of class vectors by size of class", "images of the class", "length over the mean", sizes, points=True),
            ],
        )
