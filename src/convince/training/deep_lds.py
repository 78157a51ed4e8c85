"""Deep low-density separation: a network's features and a transductive machine on them label the unlabelled, in turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Stage

CARD = Card(
    part="deep-lds",
    kind="technique",
    paper="deep-lds",
    title="Deep Low-Density Separation for Semi-Supervised Classification",
    year=2020,
    url="https://arxiv.org/abs/2205.11995",
    departs=(
        "the low-density separation is Chapelle and Zien's (2005), as the paper builds on it; the paper's networks for survey answers are the run's --model",
        "three rounds, and the network goes on from its weights in each, taught by the inferred classes (soft=true: by their softmax)",
        "the graph of nearest neighbours is joined by its minimum spanning tree, so that every distance is finite",
        "every stage has as many steps as an epoch of all training samples; labelled rows repeat in the first",
        "beyond most=3000 samples the distances are those of a drawn subset, and the rest take the class of their nearest neighbour in it",
    ),
    strength="rounds",
    off=0,
    tiny={"rounds": 1, "hide": 4, "k": 5},
    claims=("stage",),
    mutes=("order",),
    expects=("labels",),
)
Array = np.ndarray
STAGES = 10  # C* grows from C/1024 to C by doubling


# -- low-density separation (Chapelle and Zien 2005) -------------------------------------------------


def stretched(graph: Any, rho: float) -> Array:
    """Squared distances [n n] along paths: ``log(1 + shortest path of (exp(rho d) - 1))^2 / rho^2``.

    ``graph`` is a sparse or dense matrix of edge lengths d (0: no edge). A long edge costs more than many short
    ones, so paths keep to dense regions; ``rho = 0`` is the limit, the squared graph distance.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    edges = csr_array(graph, dtype=np.float64)
    if rho > 0:
        edges.data = np.expm1(rho * edges.data)
    along = dijkstra(edges, directed=False)
    return np.log1p(along) ** 2 / rho**2 if rho > 0 else along**2


def density_distance(z: Array, k: int = 10, rho: float = 1.0) -> Array:
    """:func:`stretched` distances [n n] of features ``z`` [n d] over the graph of ``k`` neighbours; Euclid's, divided by their median."""
    from scipy.sparse.csgraph import minimum_spanning_tree
    from scipy.spatial.distance import pdist, squareform

    pairs = pdist(z.astype(np.float64))
    scale = np.median(pairs)
    if not scale > 0:
        scale = pairs.mean() or 1.0
    d = np.maximum(squareform(pairs / scale), 1e-12)  # equal samples keep an edge: 0 would mean none
    np.fill_diagonal(d, 0)
    near = np.argsort(d + np.diag(np.full(len(d), np.inf)), axis=1, kind="stable")[:, : min(k, len(d) - 1)]
    joined = minimum_spanning_tree(d).toarray() > 0
    joined[np.arange(len(d))[:, None], near] = True
    return stretched(np.where(joined | joined.T, d, 0), rho)


def mds_embed(d: Array, delta: float = 0.1) -> Array:
    """Coordinates [n p] of squared distances ``d`` [n n] by classical scaling; p is the smallest that has

    ``sum of the first p eigenvalues >= (1 - delta) x sum of the positive ones`` and ``lambda_p <= delta lambda_1``.
    """
    centred = d - d.mean(0) - d.mean(1)[:, None] + d.mean()
    values, vectors = np.linalg.eigh(-0.5 * centred)
    values, vectors = values[::-1], vectors[:, ::-1]
    count = max(int((values > 1e-12 * max(values[0], 1e-300)).sum()), 1)
    values = np.maximum(values[:count], 0)
    enough = (np.cumsum(values) >= (1 - delta) * values.sum()) & (values <= delta * values[0])
    p = int(enough.argmax()) + 1 if enough.any() else count
    return vectors[:, :p] * np.sqrt(values[:p])


def tsvm_objective(w: Array, b: float, x: Array, y: Array, u: Array, c: float, c_star: float) -> tuple[float, Array]:
    """``|w|^2 / 2 + C sum max(0, 1 - y f)^2 + C* sum exp(-3 f(u)^2)`` with ``f = w.x + b``, and its gradient in w."""
    slack = np.maximum(0, 1 - y * (x @ w + b))
    f = u @ w + b
    bump = np.exp(-3 * f**2)
    value = 0.5 * w @ w + c * (slack**2).sum() + c_star * bump.sum()
    return value, w - 2 * c * x.T @ (y * slack) - 6 * c_star * u.T @ (f * bump)


def nabla_tsvm(x: Float[Array, "l d"], y: Float[Array, " l"], u: Float[Array, "m d"], c: float = 100.0) -> Float[Array, " l+m"]:
    """Values of f on the labelled (``y`` -1 or 1), then the unlabelled rows.

    The origin moves to the mean of the unlabelled and b stays at the mean label, so neither class can take all of
    them; C* doubles from C / 1024 to C, each minimum the start of the next.
    """
    from scipy.optimize import minimize

    origin = u.mean(0) if len(u) else x.mean(0)
    x, u, b = x - origin, u - origin, float(y.mean())
    w = np.zeros(x.shape[1])
    for i in range(STAGES + 1):
        w = minimize(tsvm_objective, w, args=(b, x, y, u, c, c * 2.0 ** (i - STAGES)), jac=True, method="L-BFGS-B").x
    return np.concatenate([x @ w + b, u @ w + b])


def lds(z: Array, y: Array, classes: int, *, k: int = 10, rho: float = 1.0, delta: float = 0.1, c: float = 100.0) -> Array:
    """Scores [n classes] of every row of ``z`` [n d] by low-density separation, one machine a class; ``y`` [n] has -1 where unknown."""
    x = mds_embed(density_distance(z, k, rho), delta)
    known, unknown = np.flatnonzero(y >= 0), np.flatnonzero(y < 0)
    scores = np.full((len(z), classes), -np.inf)
    for one in np.unique(y[known]):
        scores[np.concatenate([known, unknown]), one] = nabla_tsvm(x[known], np.where(y[known] == one, 1.0, -1.0), x[unknown], c)
    return scores


def label_spreading(z: Array, y: Array, classes: int, *, k: int = 10, alpha: float = 0.2) -> Array:
    """Log-probabilities [n classes] by scikit-learn's LabelSpreading over ``k`` neighbours: the rival that the paper compares with."""
    from sklearn.semi_supervised import LabelSpreading

    made = LabelSpreading(kernel="knn", n_neighbors=min(k, len(z)), alpha=alpha, max_iter=100).fit(z, y)
    scores = np.full((len(z), classes), -np.inf)
    scores[:, made.classes_] = np.log(np.maximum(np.nan_to_num(made.label_distributions_), 1e-12))
    return scores


def standardised(z: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Each feature with mean 0 and standard deviation 1; constant ones become 0."""
    z = z.double() - z.double().mean(0)
    return z / z.std(0).clamp_min(1e-12) * (z.std(0) > 1e-9)


# -- the part --------------------------------------------------------------------------------------


@final
@dataclass
class DeepLds(Technique):
    """Train on the labelled rows, then ``rounds`` times: separate the features, label the unlabelled rows, train on all.

    Rows with label -1 are unlabelled. Each stage is as long as the run's epochs or steps. ``k`` neighbours, ``rho``
    (density stretching; 0: none), ``delta`` (how much of the embedding may be left out), ``c`` (of the machine)
    belong to :func:`lds`; ``method="spreading"`` puts :func:`label_spreading` in its place. ``hide`` keeps only so many
    labels a class and treats the others as unknown, to try the method on labelled data. ``rounds=0`` is off.
    """

    rounds: int = 3
    k: int = 10
    rho: float = 1.0
    delta: float = 0.1
    c: float = 100.0
    method: str = "lds"
    soft: bool = False
    most: int = 3000
    hide: int | None = None

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.k < 1 or self.most < 10:
            raise Mistake(f"rounds={self.rounds}, k={self.k}, most={self.most}: at least 0 rounds (0 is off), 1 neighbour, 10 samples")
        if not self.rho >= 0 or not 0 < self.delta < 1 or not self.c > 0:
            raise Mistake(f"rho={self.rho}, delta={self.delta}, c={self.c}: rho is at least 0, delta between 0 and 1, c above 0")
        if self.method not in ("lds", "spreading"):
            raise Mistake(f"method={self.method!r}: must be 'lds' (low-density separation) or 'spreading' (label spreading)")
        if self.hide is not None and self.hide < 1:
            raise Mistake(f"hide={self.hide}: keep at least 1 label a class, or leave hide out")
        self.round = 0
        self.scores = torch.empty(0)  # [m k] of the training rows, from the last round

    def on_start(self, run: Run) -> None:
        if self.rounds == 0:
            return
        run.require("forward_features")
        labels = self.labels(run)
        if bool((labels >= 0).all()):
            raise Mistake("deep-lds: every training sample has a label, so there is none to infer; add unlabelled ones (-1), or try it with hide=5")
        if len(labels[labels >= 0].unique()) < 2:
            raise Mistake("deep-lds: the labelled training samples show fewer than 2 classes; label at least one of each")

    def labels(self, run: Run) -> Int[Tensor, " m"]:
        """Labels of the training rows, -1 where unknown or hidden."""
        y = run.data.y[run.data.split.train]
        if self.hide is None:
            return y
        kept = torch.full_like(y, -1)
        order = torch.randperm(len(y), generator=generator(run.seed, "deep-lds", "hide"))
        for one in y[y >= 0].unique():
            rows = order[y[order] == one][: self.hide]
            kept[rows] = one
        return kept

    def stage(self, run: Run, i: int) -> Stage | None:
        epochs, steps = run.settings.epochs or 0, run.settings.steps
        if self.rounds == 0:
            return Stage("train", epochs, steps=steps) if i == 0 else None
        if i > self.rounds:
            return None
        rows, labels = run.data.split.train, self.labels(run)
        targets = torch.zeros(len(run.data.y), run.k)
        if i == 0:
            known = rows[labels >= 0]
            targets[known] = F.one_hot(labels[labels >= 0], run.k).to(targets.dtype)
            return Stage("labelled", epochs, index=known.repeat(-(-len(rows) // len(known)))[: len(rows)], targets=targets, steps=steps)
        if self.round < i:
            self.round, self.scores = i, self.infer(run, labels)
        inferred = self.scores.softmax(1) if self.soft else F.one_hot(self.scores.argmax(1), run.k).to(targets.dtype)
        inferred[labels >= 0] = F.one_hot(labels[labels >= 0], run.k).to(inferred.dtype)
        targets[rows] = inferred.to(targets.dtype)
        return Stage(f"round {i}", epochs, index=rows, targets=targets, steps=steps)

    def infer(self, run: Run, labels: Int[Tensor, " m"]) -> Float[Tensor, "m k"]:
        """Scores of all training rows from the network's features as they stand."""
        z = standardised(embedded(run, run.data.split.train))
        order = torch.randperm(len(z), generator=generator(run.seed, "deep-lds", "landmarks", self.round))
        order = torch.cat([order[labels[order] >= 0], order[labels[order] < 0]])  # labelled rows are always among them
        chosen = order[: max(self.most, int((labels >= 0).sum()))].sort().values
        known = labels[chosen].numpy()
        if self.method == "lds":
            found = lds(z[chosen].numpy(), known, run.k, k=self.k, rho=self.rho, delta=self.delta, c=self.c)
        else:
            found = label_spreading(z[chosen].numpy(), known, run.k, k=self.k)
        nearest = torch.cat([torch.cdist(part, z[chosen]).argmin(1) for part in z.split(1024)])
        nearest[chosen] = torch.arange(len(chosen))
        return torch.from_numpy(found).clamp_min(-1e9)[nearest]

    def on_stage(self, run: Run) -> None:
        if self.round and run.stage.name == f"round {self.round}":
            labels, truth = self.labels(run), run.data.y[run.data.split.train]
            unknown = labels < 0
            told = self.scores.argmax(1)[unknown]
            run.report("samples labelled by deep-lds", float(unknown.sum()), "samples")
            if bool((truth[unknown] >= 0).any()):
                right = (told == truth[unknown])[truth[unknown] >= 0]
                run.report("accuracy of the inferred labels", float(right.double().mean()), "share of the hidden labels")

    def state(self) -> dict[str, Any]:
        return {"round": self.round, "scores": self.scores}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self.round, self.scores = int(state.get("round", 0)), state.get("scores", self.scores)


def embedded(run: Run, rows: Int[Tensor, " m"]) -> Float[Tensor, "m d"]:
    """What the network's head reads (the penultimate features), in eval mode, on the CPU."""
    found = []
    with run.aside():
        for x in run.data.x.batches(rows.split(256)):
            features = run.forward(run.plan.pixels(x)).features
            found.append(full(run.model.forward_head(features, pre_logits=True)).flatten(1).cpu())  # type: ignore[operator]
    return torch.cat(found)
