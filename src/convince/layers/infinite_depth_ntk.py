"""Infinite depth NTK: which classifier a network becomes when it is infinitely wide and ever deeper, read from its activation; and that classifier."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from torch import Generator, Tensor

from convince.errors import Mistake
from convince.kinds import Study
from convince.layers.dual_activations import Dual, named
from convince.parts import Card
from convince.types import Budget

CARD = Card(
    part="infinite-depth-ntk",
    kind="study",
    paper="infinite-depth-ntk",
    title="Wide and Deep Neural Networks Achieve Optimality for Classification",
    year=2023,
    url="https://arxiv.org/abs/2204.14126",
    departs=(
        "kernels are reckoned as logarithms, for vectors with no negative coordinate: the plain recursion underflows for the nearest-neighbour type",
        "classifiers of the deep limit sum the kernel over the points of each class; the released experiments solve with it at depths of 50 to 200",
        "the study takes the kernel of the untrained network, as the released experiments do: it comes to the deep limit of both in tens of layers",
        "sizes are smaller than the released 10,000 training and 10,000 test points, and a person's data set can be named in place of theirs",
    ),
    tiny={"points": 60, "test": 40, "seeds": 1, "depth": 5},
)


# -- the taxonomy ----------------------------------------------------------------------------------


class Taxon(NamedTuple):
    """``kind``: "majority vote", "1-nearest neighbour", "singular kernel" or "none"; A, A' and B' of the paper; ``alpha`` of a singular kernel, else NaN.

    A singular kernel behaves as ``R(|x - z|) / |x - z|^alpha``; the classifier is Bayes-consistent on the d-sphere if and only if ``alpha = d``.
    """

    kind: str
    value_0: float
    slope_0: float
    slope_1: float
    alpha: float


def taxonomy(phi: str | Sequence[float] | Dual, tolerance: float = 1e-9) -> Taxon:
    """Which classifier a network of this activation becomes as depth grows (theorem of the paper): by ``A = chk(0)``, ``A' = chk'(0)``, ``B' = chk'(1)``."""
    dual = named(phi)
    (a, slope_0), (_, slope_1) = dual.at(0.0), dual.at(1.0)
    if a > tolerance:
        return Taxon("majority vote", a, slope_0, slope_1, math.nan)
    if slope_0 <= tolerance:
        return Taxon("1-nearest neighbour", a, slope_0, slope_1, math.nan)
    if slope_0 < 1 < slope_1:
        return Taxon("singular kernel", a, slope_0, slope_1, -2 * math.log(slope_0) / math.log(slope_1))
    return Taxon("none", a, slope_0, slope_1, math.nan)


# -- kernels ---------------------------------------------------------------------------------------


def ntk(x: Float[Tensor, "n d"], z: Float[Tensor, "m d"], phi: Any, depth: int) -> Float[Tensor, "n m"]:
    """The neural tangent kernel of rows of length 1, plainly: ``S_l = chk(S_{l-1})``, ``T_l = T_{l-1} chk'(S_{l-1}) + S_l``, both ``x z^T`` at first."""
    dual, s = named(phi), (x.double() @ z.double().T).clamp(-1, 1)
    t = s
    for _ in range(depth):
        after = dual.value(s)
        t, s = t * dual.slope(s) + after, after
    return t


def nngp(x: Float[Tensor, "n d"], z: Float[Tensor, "m d"], phi: Any, depth: int) -> Float[Tensor, "n m"]:
    """The kernel of the untrained network, ``S_depth`` alone."""
    dual, s = named(phi), (x.double() @ z.double().T).clamp(-1, 1)
    for _ in range(depth):
        s = dual.value(s)
    return s


def log_kernels(xi: Float[Tensor, "*s"], phi: Any, depth: int) -> tuple[Float[Tensor, "*s"], Float[Tensor, "*s"]]:
    """``(log S, log T)`` at ``depth`` for cosines ``xi`` from 0 to 1, where the plain recursion would have underflowed long ago.

    ``log S_l = order log S_{l-1} + log(chk(S)/S^order)``, and the ratio ``r = T/S`` obeys ``r_l = 1 + r_{l-1} S chk'(S) / chk(S)``.
    """
    dual = named(phi)
    if not len(xi.reshape(-1)) or float(xi.min()) < 0 or float(xi.max()) > 1 + 1e-9:
        raise Mistake("infinite-depth-ntk: cosines must lie in 0 to 1; keep vectors of length 1 with no negative coordinate (pixels, shares, histograms)")
    log_s = xi.double().clamp_max(1).log()
    ratio = torch.ones_like(log_s)
    for _ in range(depth):
        s = log_s.exp()
        ratio = 1 + ratio * dual.power(s)
        log_s = ((log_s * dual.order if dual.order else 0.0) + dual.rest(s).log()).clamp_max(0)  # rounding above 1 would grow with depth
    if not bool(torch.isfinite(ratio).all()):
        raise Mistake(
            f"infinite-depth-ntk: depth={depth} is more than {dual.name} can be reckoned to, since slopes above 1 multiply; take 300 layers at most, "
            "and kernel='nngp', which comes to the deep limit of both in tens of layers"
        )
    return log_s, log_s + ratio.log()


def unit(x: Any) -> Float[Tensor, "n d"]:
    """Rows of length 1 in float64, with no negative coordinate."""
    x = torch.as_tensor(np.asarray(x), dtype=torch.float64)
    if x.dim() != 2 or not bool(torch.isfinite(x).all()) or bool((x < 0).any()) or bool((x.sum(1) <= 0).any()):
        raise Mistake(f"infinite-depth-ntk: rows [n d] must be finite, have no negative coordinate and not be all 0; got shape {tuple(x.shape)}")
    return x / x.norm(dim=1, keepdim=True)


# -- classifiers -----------------------------------------------------------------------------------


@final
class NTKClassifier(ClassifierMixin, BaseEstimator):
    """Infinitely wide network of ``depth`` layers as a classifier, with scikit-learn's ``fit`` and ``predict``.

    ``phi`` as :func:`named` takes it. ``mode`` "smoother" is what both become in the deep limit: a class scores the sum of the kernel over its points;
    "interpolate" solves with the kernel of the training points (one-hot targets). Rows are brought to length 1 and must have no negative coordinate.

    ``kernel``: "ntk", or "nngp" of the untrained network. Both have one deep limit, ``S_L / A'^L`` where the kernel is singular. "nngp" is there in
    tens of layers; "ntk" carries ``L + O(1 / (1 - xi))`` times as much, so it needs ``L`` far above ``1 / (1 - xi)``, and until then behaves as if
    its ``alpha`` were larger (by 2 where B' = 2).
    """

    def __init__(self, phi: Any = "optimal:2", depth: int = 30, mode: str = "smoother", kernel: str = "ntk", batch: int = 64) -> None:
        self.phi, self.depth, self.mode, self.kernel, self.batch = phi, depth, mode, kernel, batch

    def fit(self, X: Any, y: Any) -> NTKClassifier:
        """Keep the points; with "interpolate" solve for their weights."""
        for word, value, allowed in (("mode", self.mode, ("smoother", "interpolate")), ("kernel", self.kernel, ("ntk", "nngp"))):
            if value not in allowed:
                raise Mistake(f"infinite-depth-ntk: {word}={value!r} must be {allowed[0]!r} or {allowed[1]!r}")
        if self.depth < 1:
            raise Mistake(f"infinite-depth-ntk: depth={self.depth} must be at least 1 layer")
        self.classes_, places = np.unique(np.asarray(y), return_inverse=True)
        self.points_ = unit(X)
        if len(self.points_) != len(places):
            raise Mistake(f"infinite-depth-ntk: {len(self.points_)} rows but {len(places)} labels; give one label a row")
        self.n_features_in_ = self.points_.shape[1]
        one_hot = torch.nn.functional.one_hot(torch.from_numpy(places), len(self.classes_)).double()
        if self.mode == "interpolate":
            logs = self._log_kernel(self.points_) - self._log_kernel_of(torch.ones(1, dtype=torch.float64))
            factor, failed = torch.linalg.cholesky_ex(logs.exp().fill_diagonal_(1.0))
            if bool(failed) or len(self.points_.unique(dim=0)) < len(self.points_):
                raise Mistake(
                    f"infinite-depth-ntk: mode='interpolate' cannot invert the kernel of these {len(places)} training rows: two are equal, or "
                    f"depth={self.depth} is too small for so many; drop repeated rows, take more layers, or use mode='smoother'"
                )
            one_hot = torch.cholesky_solve(one_hot, factor)
        self.weights_ = one_hot
        return self

    def decision_function(self, X: Any) -> Float[np.ndarray, "m k"]:
        """Scores [m k] in units of each row's largest kernel value; two classes are two columns."""
        z, found = unit(X), []
        if z.shape[1] != self.n_features_in_:
            raise Mistake(f"infinite-depth-ntk: rows have {z.shape[1]} numbers, the training rows {self.n_features_in_}")
        for part in z.split(self.batch):
            logs = self._log_kernel(part)
            top = logs.amax(1, keepdim=True).nan_to_num(neginf=0.0)
            found.append((logs - top).exp() @ self.weights_)
        return torch.cat(found).numpy()

    def predict(self, X: Any) -> np.ndarray:
        """The class of the highest score."""
        return self.classes_[self.decision_function(X).argmax(1)]

    def _log_kernel(self, z: Float[Tensor, "m d"]) -> Float[Tensor, "m n"]:
        return self._log_kernel_of((z @ self.points_.T).clamp(0, 1))

    def _log_kernel_of(self, xi: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
        s, t = log_kernels(xi, self.phi, self.depth)
        return t if self.kernel == "ntk" else s


def hilbert_estimate(x: Float[Tensor, "n d"], y: Int[Tensor, " n"], z: Float[Tensor, "m d"], dimension: int | None = None) -> Int[Tensor, " m"]:
    """Classes by weights ``1 / |x_i - z|^dim = (2 - 2 <x_i, z>)^(-dim/2)`` (Devroye et al., known to be consistent); ``dimension`` None: coordinates - 1."""
    dimension = x.shape[1] - 1 if dimension is None else dimension
    logs = -dimension / 2 * (2 - 2 * (z.double() @ x.double().T)).clamp_min(1e-300).log()
    weights = (logs - logs.amax(1, keepdim=True)).exp()
    return (weights @ torch.nn.functional.one_hot(y).double()).argmax(1)


def one_nearest(x: Float[Tensor, "n d"], y: Int[Tensor, " n"], z: Float[Tensor, "m d"]) -> Int[Tensor, " m"]:
    """The class of the point with the largest cosine, for rows of length 1."""
    return y[(z @ x.T).argmax(1)]


def majority_vote(y: Int[Tensor, " n"]) -> int:
    """The class with the most points; the first of equals."""
    return int(torch.bincount(y).argmax())


# -- the study -------------------------------------------------------------------------------------

DIRICHLET = {  # the released densities by the sphere's dimension, that of class 1 first
    1: ((1, 2), (2, 1)),
    2: ((0.5, 0.5, 2.5), (2.5, 0.1, 0.5)),
    4: ((3, 1, 2, 1, 1), (1, 2, 2, 2, 3)),
    8: ((1, 2, 1, 2, 1, 1, 1, 1, 1), (1, 1, 1, 2, 3, 4, 2, 2, 1)),
}
PRIOR = 0.4  # of class 1


def dirichlet_points(d: int, n: int, gen: Generator) -> tuple[Float[Tensor, "n e"], Int[Tensor, " n"]]:
    """Points of two Dirichlet classes on the simplex with ``d + 1`` coordinates, each divided by its length, and their classes."""
    rng = np.random.default_rng(int(torch.randint(2**62, (), generator=gen)))
    y = (rng.random(n) < PRIOR).astype(np.int64)
    x = np.where(y[:, None] == 1, rng.dirichlet(DIRICHLET[d][0], n), rng.dirichlet(DIRICHLET[d][1], n))
    return unit(x), torch.from_numpy(y)


def dirichlet_bayes(x: Float[Tensor, "n e"]) -> Int[Tensor, " n"]:
    """The Bayes classifier of these two classes; ``x`` may have any length, since the simplex point is ``x`` over its sum."""
    p = (x / x.sum(1, keepdim=True)).clamp_min(1e-300)
    first, second = (torch.distributions.Dirichlet(torch.tensor(a, dtype=torch.float64), validate_args=False) for a in DIRICHLET[x.shape[1] - 1])
    return (first.log_prob(p) + math.log(PRIOR) > second.log_prob(p) + math.log(1 - PRIOR)).long()


@final
@dataclass
class InfiniteDepthNtk(Study):
    """Prints the type of each activation and the accuracy of its deep classifier, beside 1-NN, the Hilbert estimate, the majority and Bayes.

    ``data``: "dirichlet:1", 2, 4 or 8 (the paper's densities on the sphere of that dimension), or a built-in set, folder or table of numbers that
    are not negative. ``points`` training and ``test`` test points a seed, each arm on the same draw.
    """

    data: str = "dirichlet:2"
    activations: tuple[str, ...] = ("relu", "hermite:2", "erf", "sine:1", "sine:2.676", "optimal:2", "optimal:4")
    depth: int = 30
    points: int = 1000
    test: int = 1000
    seeds: int = 3
    kernel: str = "nngp"

    def __post_init__(self) -> None:
        if min(self.depth, self.points, self.test, self.seeds) < 1 or not self.activations:
            raise Mistake(
                f"infinite-depth-ntk: depth={self.depth}, points={self.points}, test={self.test}, seeds={self.seeds}, "
                f"activations={self.activations}: at least one of each"
            )

    def run(self, budget: Budget) -> dict[str, Any]:
        """The table. ``budget`` in images is the number of training points; in epochs, whole or not, that many times ``points``."""
        per = {"images": 1.0, "epochs": float(self.points)}.get(budget.unit)
        if per is None:
            raise Mistake(f"infinite-depth-ntk: a budget in {budget.unit} does not fit; give images (training points) or epochs")
        count = max(round(budget.value * per), 2)
        found: dict[str, list[float]] = {}
        for seed in range(self.seeds):
            x, y, z, truth = self._draw(seed, count)
            answers = {"1-nearest neighbour": one_nearest(x, y, z), "hilbert estimate": hilbert_estimate(x, y, z)}
            answers["majority vote"] = torch.full_like(truth, majority_vote(y))
            if self.data.startswith("dirichlet:"):
                answers["bayes"] = dirichlet_bayes(z)
            for phi in self.activations:
                answers[phi] = torch.from_numpy(NTKClassifier(phi, self.depth, kernel=self.kernel).fit(x, y.numpy()).predict(z))
            for name, answer in answers.items():
                found.setdefault(name, []).append(float((answer == truth).double().mean()))
        table = []
        for name, accuracies in found.items():
            taxon = taxonomy(name) if name in self.activations else None
            alpha = None if taxon is None or math.isnan(taxon.alpha) else taxon.alpha
            table.append({"classifier": name, "kind": taxon and taxon.kind, "alpha": alpha, "accuracy": statistics.fmean(accuracies), "n": self.seeds})
        print(self._page(table, count))
        return {**asdict(self), "activations": list(self.activations), "budget": asdict(budget), "table": table}

    def _draw(self, seed: int, count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training and test points with their classes."""
        from convince.fit.randomness import generator

        gen = generator(seed, "infinite-depth-ntk")
        word, _, number = self.data.partition(":")
        if word == "dirichlet":
            if number not in map(str, DIRICHLET):
                raise Mistake(f"infinite-depth-ntk: data={self.data!r}: the paper's densities are dirichlet:{', dirichlet:'.join(map(str, DIRICHLET))}")
            return (*dirichlet_points(int(number), count, gen), *dirichlet_points(int(number), self.test, gen))
        from convince.data import load

        data = load(self.data, val=0.0, seed=0)
        rows = [data.split[part][data.y[data.split[part]] >= 0] for part in ("train", "test")]
        train, test = (r[torch.randperm(len(r), generator=gen)[:n]] for r, n in zip(rows, (count, self.test), strict=True))
        x, z = (unit(data.x.take(r).double().flatten(1)) for r in (train, test))
        return x, data.y[train], z, data.y[test]

    def _page(self, table: list[dict[str, Any]], count: int) -> str:
        lines = [f"infinitely wide networks of {self.depth} layers on {self.data}: {count} training points, {self.seeds} seed(s)"]
        lines.append(f"{'classifier':<20} {'what it becomes':<20} {'alpha':>6} {'accuracy %':>11}")
        for r in table:
            alpha = "" if r["alpha"] is None else f"{r['alpha']:.3f}"
            lines.append(f"{r['classifier']:<20} {r['kind'] or '':<20} {alpha:>6} {100 * r['accuracy']:>11.2f}")
        return "\n".join(lines)
