"""Collapse by depth: how the spread within classes shrinks from block to block; and the model of features tied to given ones that predicts it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.backbones.maps import info
from convince.diagnose.neural_collapse_linear import nc1, nc1_ratio
from convince.errors import Mistake
from convince.kinds import Probe, as_found
from convince.layers.places import residual_blocks
from convince.parts import Card
from convince.types import Curves, Findings, Reading

CARD = Card(
    part="nc-perturbation",
    kind="probe",
    paper="nc-perturbation",
    title="Perturbation Analysis of Neural Collapse",
    year=2023,
    url="https://arxiv.org/abs/2210.16658",
    expects=("labels",),
    departs=(
        "constants of the model are as recalled: lam_w over 2K, lam_h and beta over 2Kn; another choice only rescales lam_w",
        "the tied minimiser is found by L-BFGS over W with H eliminated, since alternating the two closed forms takes thousands of sweeps at small beta",
        "classes of unequal size are taken as if each had N/K rows in the weight of lam_w; the paper's classes are of equal size",
        "steps along the central path are shortened where they would be unstable, the paper's flow is in continuous time",
        "maps and tokens are flattened: each position and channel is a feature",
    ),
)

CONVERGED, POLISH = 1e-8, 2000

# -- the model: features tied to given ones; rows of h are samples, where the paper's H has columns -----


def optimal_weights(h: Float[Tensor, "N d"], y: Float[Tensor, "N k"], lam_w: float) -> Float[Tensor, "k d"]:
    """``W = Y H' (H H' + n lam_w I)^-1``, n = N / K: the best last layer for these features."""
    n = len(h) / y.shape[1]
    return torch.linalg.solve(h.T @ h + n * lam_w * torch.eye(h.shape[1], dtype=h.dtype), h.T @ y).T


def optimal_features(w: Float[Tensor, "k d"], h0: Float[Tensor, "N d"], y: Float[Tensor, "N k"], lam_h: float, beta: float) -> Float[Tensor, "N d"]:
    """``H = (W'W + (lam_h + beta) I)^-1 (W'Y + beta H0)``: the best features for this last layer. By a k x k inverse."""
    c = lam_h + beta
    pull = y @ w + beta * h0
    inner = torch.linalg.solve(w @ w.T + c * torch.eye(len(w), dtype=w.dtype), w)
    return (pull - (pull @ w.T) @ inner) / c


class Tethered(NamedTuple):
    """A minimiser: last layer, features, and ``residual``, the gradient in W over the length of its regulariser's (that in H is zero)."""

    w: Float[Tensor, "k d"]
    h: Float[Tensor, "N d"]
    residual: float


def tethered_features(h0: Float[Tensor, "N d"], labels: Int[Tensor, " N"], lam_w: float, lam_h: float, beta: float, steps: int = 5000) -> Tethered:
    """Minimise ``1/2Kn |WH - Y|^2 + lam_w/2K |W|^2 + lam_h/2Kn |H|^2 + beta/2Kn |H - H0|^2`` over W and H, from H0, in float64.

    With equal classes and ``beta = 0`` the minimiser is not zero exactly where ``lam_w lam_h < 1``.
    """
    from scipy.optimize import minimize

    if not lam_w > 0 or lam_h < 0 or beta < 0 or not lam_h + beta > 0:
        raise Mistake(f"tethered_features: lam_w={lam_w}, lam_h={lam_h}, beta={beta}: lam_w above 0, the others at least 0 and not both 0")
    h0, y = h0.double(), one_hot(labels)
    n = len(y) / y.shape[1]

    # rows of V = W C, with C C' = H0 H0' + n lam_w I, have a well-conditioned loss; those of W seldom
    root = torch.linalg.cholesky(h0.T @ h0 + n * lam_w * torch.eye(h0.shape[1], dtype=h0.dtype))
    start = optimal_weights(h0, y, lam_w) @ root

    def weights(flat: Any) -> Tensor:
        return torch.linalg.solve_triangular(root, torch.as_tensor(flat).view(start.shape), upper=False, left=False)

    def value(flat: Any) -> tuple[float, Any]:
        w = weights(flat)
        h = optimal_features(w, h0, y, lam_h, beta)
        missed = h @ w.T - y
        loss = missed.square().sum() + n * lam_w * w.square().sum() + lam_h * h.square().sum() + beta * (h - h0).square().sum()
        slope = missed.T @ h + n * lam_w * w  # H is at its best, so that its own change does not count
        slope = torch.linalg.solve_triangular(root.T, slope, upper=True, left=False)
        return float(loss) / (2 * len(y)), slope.flatten().numpy() / len(y)

    options = {"maxiter": steps, "maxfun": 2 * steps, "maxcor": 30, "ftol": 0.0, "gtol": 1e-14}
    w = weights(minimize(value, start.flatten().numpy(), jac=True, method="L-BFGS-B", options=options).x)
    best, residual = optimal_features(w, h0, y, lam_h, beta), math.inf
    for _ in range(POLISH):  # a line search stalls where values agree to the last bit; the closed forms do not
        slope = (best @ w.T - y).T @ best + n * lam_w * w
        residual = float(slope.norm() / (n * lam_w * w.norm()).clamp_min(1e-300))
        if residual < CONVERGED:
            break
        w = optimal_weights(best, y, lam_w)
        best = optimal_features(w, h0, y, lam_h, beta)
    return Tethered(w, best, residual)


def one_hot(labels: Int[Tensor, " N"]) -> Float[Tensor, "N k"]:
    """Rows of 0 and 1 for the classes that occur, in float64."""
    return F.one_hot(labels.unique(return_inverse=True)[1]).double()


class Path(NamedTuple):
    """Metrics before the first step and after each: what of ``nc1`` and ``nc1_ratio``; ``time`` passed; the last features."""

    nc1: list[float]
    ratio: list[float]
    time: list[float]
    h: Float[Tensor, "N d"]


def central_path(
    h0: Float[Tensor, "N d"],
    labels: Int[Tensor, " N"],
    lam_w: float,
    lam_h: float,
    *,
    steps: int = 400,
    step: float = 0.2,
    frozen: Float[Tensor, "k d"] | None = None,
) -> Path:
    """Gradient flow on features with the last layer always at its best: ``dH/dt = W*(H)' (Y - W*(H) H) - lam_h H``, by Euler steps.

    Time is in units of 1 / Kn of the loss. A step longer than ``1 / (|W|^2 + lam_h)`` is shortened to it. ``frozen``: a fixed last layer instead.
    """
    h, y = h0.double(), one_hot(labels)
    path = Path([nc1(h, labels)], [nc1_ratio(h, labels)], [0.0], h)
    for _ in range(steps):
        w = optimal_weights(h, y, lam_w) if frozen is None else frozen.double()
        rate = min(step, 1 / (float(torch.linalg.matrix_norm(w, 2)) ** 2 + lam_h))
        h = h + rate * ((y - h @ w.T) @ w - lam_h * h)
        path.nc1.append(nc1(h, labels))
        path.ratio.append(nc1_ratio(h, labels))
        path.time.append(path.time[-1] + rate)
    return path._replace(h=h)


# -- near collapse -------------------------------------------------------------------------------------


def shrinkage(lam_w: float, lam_h: float, beta: float) -> tuple[float, float]:
    """By what the tie's minimiser multiplies small deviations from class means, to first order: inside the span of W, and outside.

    ``beta / (beta + sqrt(lam_h / lam_w))`` and ``beta / (beta + lam_h)``: at collapse ``W'W = (sqrt(lam_h/lam_w) - lam_h) P``, with P the
    projection on W's span, and deviations that sum to zero in each class leave W as it is. nc1 looks inside the span alone: it is multiplied by
    the first factor's square, so that a larger lam_h and a smaller beta bring it nearer to collapse.
    """
    return beta / (beta + math.sqrt(lam_h / lam_w)), beta / (beta + lam_h)


def collapsed(k: int, n: int, d: int, lam_w: float, lam_h: float, gen: Generator) -> tuple[Float[Tensor, "N d"], Int[Tensor, " N"]]:
    """A minimiser of the model without a tie, n equal rows a class: an orthogonal frame with ``|h|^2 = (1 - sqrt(lam_w lam_h)) sqrt(lam_w / lam_h)``."""
    if not lam_w * lam_h < 1 or k > d:
        raise Mistake(f"collapsed: lam_w * lam_h = {lam_w * lam_h} must be below 1, and k={k} classes need at least as many features, d={d}")
    frame = torch.linalg.qr(torch.randn(d, k, generator=gen, dtype=torch.float64)).Q.T
    length = math.sqrt((1 - math.sqrt(lam_w * lam_h)) * math.sqrt(lam_w / lam_h))
    labels = torch.arange(k).repeat_interleave(n)
    return length * frame[labels], labels


def near_collapse_report(
    k: int, n: int, d: int, lam_w: float, lam_h: float, betas: Sequence[float], gen: Generator, noise: float = 1e-3
) -> dict[float, tuple[float, float]]:
    """For each beta: nc1 of the minimiser over nc1 of H0, predicted by :func:`shrinkage` and found; H0 is collapsed but for normal ``noise``."""
    h, labels = collapsed(k, n, d, lam_w, lam_h, gen)
    deviation = noise * torch.randn(h.shape, generator=gen, dtype=torch.float64).view(k, n, d)
    h0 = h + (deviation - deviation.mean(1, keepdim=True)).view(k * n, d)
    return {beta: (shrinkage(lam_w, lam_h, beta)[0] ** 2, nc1(tethered_features(h0, labels, lam_w, lam_h, beta).h, labels) / nc1(h0, labels)) for beta in betas}


# -- practice: the profile of a network --------------------------------------------------------------


def spots(model: nn.Module) -> list[tuple[str, nn.Module, bool]]:
    """Where features are read, in order: name, module, and whether what it gives counts (else what it is given).

    The residual blocks of a network or else the places that its ``feature_info`` names, and the input of its last linear layer; of a network that has
    neither, the inputs of all its convolutions and linear layers but the first, so that each is read behind its nonlinearity.
    """
    blocks = [(block.name, block.module, True) for block in residual_blocks(model)]
    named = dict(model.named_modules())
    stages = [(row["module"], named[row["module"]], True) for row in info(model) if row["module"] in named]
    chosen = blocks if len(blocks) > 1 else stages
    weighted: list[tuple[str, nn.Module, bool]] = [
        (f"before {name}", m, False) for name, m in named.items() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    ]
    if len(chosen) > 1:
        return chosen + [spot for spot in weighted if isinstance(spot[1], nn.Linear)][-1:]
    return weighted[1:]


class Spread(NamedTuple):
    """Sums of one layer's features over rows: by class [k d], and of all squares; float64."""

    sums: Float[Tensor, "k d"]
    squares: Tensor

    def ratio(self, counts: Int[Tensor, " k"]) -> float:
        """``tr(S_W) / tr(S_B)``; ``inf`` where all class means coincide."""
        means, total = self.sums / counts[:, None], counts.sum()
        within = (self.squares - (means.square().sum(1) * counts).sum()).clamp_min(0) / total
        between = (means - self.sums.sum(0) / total).square().sum() / len(counts)
        return float(within / between) if float(between) > 1e-14 * float(self.squares / total) else math.inf


@torch.no_grad()
def depth_profile(answer: nn.Module, x: Tensor, y: Int[Tensor, " n"], batch: int = 128) -> dict[str, float]:
    """``nc1_ratio`` behind each block of the network inside an answer, in order; flattened maps. ``inf`` where all class means coincide.

    Layers that do not keep one row an image are left out. Hooks are taken off again.
    """
    classes, place, counts = y.unique(return_inverse=True, return_counts=True)
    if len(classes) < 2:
        raise Mistake(f"nc-perturbation compares classes, and the labels hold {len(classes)}; give rows of at least two classes")
    seen: dict[str, Spread] = {}
    found: dict[str, Spread] = {}
    current = [place]  # the classes of the batch under way

    def keep(name: str, features: Tensor) -> None:
        features = features[0] if isinstance(features, (tuple, list)) else features
        if isinstance(features, Tensor) and features.dim() > 1 and len(features) == len(current[0]):
            flat = features.flatten(1).double()  # summed at once: what follows may work in place
            sums = flat.new_zeros(len(classes), flat.shape[1]).index_add_(0, current[0], flat)
            seen[name] = Spread(sums, flat.square().sum())

    def gives(name: str) -> Callable[..., None]:
        return lambda module, args, output: keep(name, output)

    def given(name: str) -> Callable[..., None]:
        return lambda module, args: keep(name, args[0]) if args else None

    handles = [
        module.register_forward_hook(gives(name)) if out else module.register_forward_pre_hook(given(name))
        for name, module, out in spots(getattr(answer, "model", answer))
    ]
    try:
        with torch.autocast(x.device.type, enabled=False):  # bf16 would round small spreads to nothing
            for part, rows in zip(x.split(batch), place.split(batch), strict=True):
                current[0] = rows
                seen.clear()
                answer(part)
                for name, spread in seen.items():
                    before = found.get(name)
                    found[name] = spread if before is None else Spread(before.sums + spread.sums, before.squares + spread.squares)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        who = type(getattr(answer, "model", answer)).__name__
        raise Mistake(f"nc-perturbation: {who} has no two layers that keep one row an image; it reads networks of several layers such as resnet20")
    return {name: spread.ratio(counts) for name, spread in found.items()}


@final
@dataclass
class NcPerturbation(Probe):
    """``tr(S_W) / tr(S_B)`` behind each block on the images given: theory says that it falls with depth in a trained network."""

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        with as_found(answer):
            profile = depth_profile(answer, x, y)
        alive = {name: ratio for name, ratio in profile.items() if math.isfinite(ratio)}
        readings = [Reading(f"{name}: tr(Sw) / tr(Sb)", ratio, "0 is collapse") for name, ratio in alive.items()]
        readings.append(Reading("layers where all class means coincide", len(profile) - len(alive), f"of {len(profile)}"))
        values = list(alive.values())
        if len(values) > 1:
            falls = sum(b < a for a, b in itertools.pairwise(values))
            readings.append(Reading("layers that shrink the ratio", falls, f"of {len(values) - 1} steps"))
            readings.append(Reading("last layer over first", values[-1] / max(values[0], 1e-300), "times"))
        drawn = [(float(i), ratio) for i, (name, ratio) in enumerate(profile.items(), 1) if name in alive and ratio > 0]
        return Findings(readings, [Curves("Spread within classes by depth", "layer", "tr(Sw) / tr(Sb)", {"ratio": drawn}, log=True)])
