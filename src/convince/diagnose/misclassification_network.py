"""Misclassification network: a classifier's mistakes as a graph of its classes, read as likeness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.kinds import Probe, as_found
from convince.parts import Card
from convince.types import Bars, Figure, Findings, Plane, Reading

CARD = Card(
    part="misclassification-network",
    kind="probe",
    paper="gmna",
    title="A Misclassification Network-Based Method for Comparative Genomic Analysis",
    year=2024,
    url="https://arxiv.org/abs/2412.07051",
    expects=("labels",),
    departs=(
        "rows of the matrix are scaled to sum 1 before both directions are averaged; the released notebooks keep raw counts of mistakes",
        "communities by greedy merging, which draws nothing at random; the authors use Louvain's method",
        "the probe reads one finished classifier; leaving each class out, as the authors also do, needs a training for each (loco_predict)",
        "travel and place are compared by a Mantel test of any two matrices; the authors correlate with centralities in a flight network",
    ),
)
MODES = ("soft", "hard")


# -- from predictions to likeness ----------------------------------------------------------------------


def misclassification_matrix(probs: Float[Tensor, "n k"], y: Int[Tensor, " n"], mode: str = "soft") -> Float[Tensor, "k k"]:
    """``M[i, j]``, i the true class and j another: the share of i taken for j ("hard"), or its mean probability of j ("soft").

    The diagonal, and the row of a class without a sample, are 0.
    """
    if mode not in MODES:
        raise Mistake(f"misclassification-network: mode={mode!r} must be 'soft' (mean probabilities) or 'hard' (counted answers)")
    k = probs.shape[1]
    rows = probs.double() if mode == "soft" else torch.nn.functional.one_hot(probs.argmax(1), k).double()
    total = rows.new_zeros(k, k).index_add_(0, y, rows)
    found = total / torch.bincount(y, minlength=k).clamp_min(1)[:, None]
    return found.fill_diagonal_(0)


def indistinguishability(matrix: Float[Tensor, "k k"]) -> Float[Tensor, "k k"]:
    """``(R[i, j] + R[j, i]) / 2``, R the matrix with rows that sum to 1: how readily two classes are taken for one another, 0 to 1.

    A row without a mistake stays 0. After leaving classes out (:func:`loco_predict`) rows sum to 1 already.
    """
    sums = matrix.sum(1, keepdim=True)
    rows = torch.where(sums > 0, matrix / sums.clamp_min(1e-300), 0.0)
    return (rows + rows.T) / 2


def top_pairs(likeness: Float[Tensor, "k k"], count: int) -> list[tuple[int, int, float]]:
    """The ``count`` pairs (i < j) with the largest values, largest first; pairs of value 0 are left out."""
    i, j = torch.triu_indices(len(likeness), len(likeness), 1)
    values, order = likeness[i, j].sort(descending=True, stable=True)
    return [(int(i[at]), int(j[at]), float(value)) for value, at in zip(values[:count], order[:count], strict=True) if value > 0]


def loco_predict(make_model: Callable[[], Any], x: Any, y: Any) -> Float[Tensor, "n k"]:
    """Leave one class out: for each class, a model of ``make_model()`` is fitted on all others and asked whom its samples would be taken for.

    Models follow scikit-learn (``fit``, ``predict_proba``, ``classes_``); ``x`` [n ...] and ``y`` [n] are arrays with classes from 0. A naive Bayes
    model should have ``fit_prior=False``, or the large classes attract everything. Row n has 0 for its own class and sums to 1.
    """
    y = np.asarray(y)
    classes = np.unique(y)
    if len(classes) < 3:
        raise Mistake(f"loco_predict: {len(classes)} classes; with one left out at least 2 must stay")
    probs = torch.zeros(len(y), int(classes.max()) + 1, dtype=torch.float64)
    for c in classes:
        model = make_model().fit(x[y != c], y[y != c])
        found = torch.as_tensor(np.asarray(model.predict_proba(x[y == c])), dtype=torch.float64)
        probs[torch.from_numpy(np.flatnonzero(y == c))[:, None], torch.as_tensor(model.classes_)[None]] = found
    return probs


# -- the graph -----------------------------------------------------------------------------------------


class Network(NamedTuple):
    """What a weighted graph of classes is like.

    ``centrality``: eigenvector centrality of each class, length 1; ``clustering``: of each class, the mean over pairs of its neighbours of the cube
    root of the triangle's weights over the largest weight; ``community``: a number for each class; ``modularity`` of that division.
    """

    centrality: Float[Tensor, " k"]
    clustering: Float[Tensor, " k"]
    community: Int[Tensor, " k"]
    modularity: float


def modularity(weights: Float[Tensor, "k k"], community: Int[Tensor, " k"]) -> float:
    """Newman's Q of a division of a symmetric graph: weight inside communities less what chance would put there, at most 1; 0 without edges."""
    total = float(weights.sum())
    if not total:
        return 0.0
    degree = weights.sum(1)
    same = community[:, None] == community[None]
    return float(((weights / total - degree[:, None] * degree[None] / total**2) * same).sum())


def communities(weights: Float[Tensor, "k k"]) -> Int[Tensor, " k"]:
    """Greedy merging: from one community a class, the two whose merger adds most to the modularity are merged, while any adds."""
    k, total = len(weights), float(weights.sum())
    community = torch.arange(k)
    if not total:
        return community
    share = weights.clone() / total
    alive = torch.ones(k, dtype=torch.bool)
    while int(alive.sum()) > 1:
        degree = share.sum(1)
        gain = 2 * (share - degree[:, None] * degree[None])
        gain[~(alive[:, None] & alive[None])] = -torch.inf
        gain.fill_diagonal_(-torch.inf)
        best = int(gain.argmax())
        a, b = sorted((best // k, best % k))
        if float(gain[a, b]) <= 1e-12:
            break
        share[a] += share[b]
        share[:, a] += share[:, b]
        share[b], share[:, b] = 0, 0
        alive[b] = False
        community[community == b] = a
    return community.unique(return_inverse=True)[1]


def network_stats(weights: Float[Tensor, "k k"]) -> Network:
    """The numbers of :class:`Network` for a symmetric matrix of weights with an empty diagonal, such as :func:`indistinguishability`."""
    _, vectors = torch.linalg.eigh(weights)
    root = (weights / weights.max().clamp_min(1e-300)).clamp_min(0) ** (1 / 3)
    neighbours = (weights > 0).sum(1).double()
    triangles = torch.linalg.matrix_power(root, 3).diagonal()
    clustering = torch.where(neighbours > 1, triangles / (neighbours * (neighbours - 1)).clamp_min(1), 0.0)
    community = communities(weights)
    return Network(vectors[:, -1].abs(), clustering, community, modularity(weights, community))


class Mantel(NamedTuple):
    """``r``: Pearson's correlation of the upper triangles; ``p``: share of permutations (the identity counted) with an r at least as high."""

    r: float
    p: float


def mantel_test(a: Float[Tensor, "k k"], b: Float[Tensor, "k k"], gen: Generator, permutations: int = 999) -> Mantel:
    """Whether two symmetric matrices of likeness go together, one-sided: rows and columns of ``b`` are permuted jointly."""
    k = len(a)
    i, j = torch.triu_indices(k, k, 1)

    def standard(values: Tensor) -> Tensor:
        values = values - values.mean()
        return values / values.norm()

    if k < 4 or float(a[i, j].std()) == 0 or float(b[i, j].std()) == 0:
        raise Mistake(f"mantel_test: needs two matrices of at least 4 classes whose entries differ; these have {k} classes")
    left = standard(a[i, j].double())
    orders = [torch.arange(k), *(torch.randperm(k, generator=gen) for _ in range(permutations))]
    found = torch.stack([left @ standard(b[order[i], order[j]].double()) for order in orders])
    return Mantel(float(found[0]), float((found >= found[0] - 1e-12).double().mean()))


# -- sequences -----------------------------------------------------------------------------------------


def kmer_counts(sequences: Sequence[str], k: int = 6, *, normalise: bool = False) -> np.ndarray:
    """Counts [n 4**k] of the words of ``k`` letters in DNA, in alphabetical order of A, C, G, T; words with another letter are left out.

    ``normalise`` divides by each sequence's number of words, which makes lengths comparable.
    """
    code = np.full(256, 4, np.int64)
    for digit, letter in enumerate("ACGT"):
        code[[ord(letter), ord(letter.lower())]] = digit
    counts = np.zeros((len(sequences), 4**k), np.float64 if normalise else np.int32)
    for row, sequence in enumerate(sequences):
        digits = code[np.frombuffer(sequence.encode("ascii", "replace"), np.uint8)]
        if len(digits) < k:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(digits, k)
        words = windows[(windows < 4).all(1)] @ 4 ** np.arange(k - 1, -1, -1)
        counts[row] = np.bincount(words, minlength=4**k) / (max(len(words), 1) if normalise else 1)
    return counts


def onehot_dna(sequences: Sequence[str], length: int) -> Float[Tensor, "n 4 l"]:
    """One row a letter A, C, G, T; cut or padded with zeros to ``length`` letters; any other letter is zeros."""
    x = torch.zeros(len(sequences), 4, length)
    for n, sequence in enumerate(sequences):
        letters = np.frombuffer(sequence[:length].upper().encode("ascii", "replace"), np.uint8)
        for digit, letter in enumerate("ACGT"):
            x[n, digit, : len(letters)] = torch.from_numpy(letters == ord(letter)).float()
    return x


# -- the probe -----------------------------------------------------------------------------------------


@final
@dataclass
class MisclassificationNetwork(Probe):
    """Which classes are taken for one another, and which groups they form. ``pairs``: how many of the most alike are named, by class number.

    ``mode``: "soft" reads probabilities, so it says something where hardly anything is answered wrongly; "hard" counts answers. Look at held-out images.
    """

    mode: str = "soft"
    pairs: int = 5
    shown: int = 40  # classes in the picture

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise Mistake(f"misclassification-network: mode={self.mode!r} must be 'soft' (mean probabilities) or 'hard' (counted answers)")
        if self.pairs < 1 or self.shown < 2:
            raise Mistake(f"misclassification-network: pairs={self.pairs}, shown={self.shown}: at least 1 pair and 2 classes are shown")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        with as_found(answer), torch.no_grad():
            probs = torch.cat([full(answer(part)).softmax(1) for part in x.split(256)]).cpu()
        matrix = misclassification_matrix(probs, y.cpu(), self.mode)
        alike = indistinguishability(matrix)
        stats, found = network_stats(alike), top_pairs(alike, self.pairs)
        seen = y.cpu().bincount(minlength=len(matrix)) > 0
        wrong = float((probs.argmax(1) != y.cpu()).double().mean())
        taken = matrix.sum(0) / max(int(seen.sum()), 1)
        readings = [
            Reading("answered wrongly", wrong, "share of images"),
            Reading("weight on other classes", float(matrix.sum(1)[seen].mean()), "mean probability" if self.mode == "soft" else "share of images"),
            Reading("largest indistinguishability", found[0][2] if found else 0.0, "0 to 1"),
            Reading("one-sidedness", _one_sided(matrix), "0: as often one way as the other, 1: one way only"),
            Reading("modularity", stats.modularity, "up to 1"),
            Reading("communities", float(len(stats.community.unique())), f"of {len(matrix)} classes"),
            Reading("most central class", float(stats.centrality.argmax()), "class number"),
            Reading("class that others are taken for most", float(taken.argmax()), "class number"),
            Reading("mean clustering", float(stats.clustering.mean()), "0 to 1"),
        ]
        readings += [Reading(f"classes {i} and {j}", value, "indistinguishability") for i, j, value in found]
        kept = alike.sum(1).argsort(descending=True, stable=True)[: self.shown].sort().values
        order = kept[stats.community[kept].argsort(stable=True)]
        names = ", ".join(str(c) for c in order.tolist()) if len(order) <= 12 else f"{len(order)} classes"
        figures: list[Figure] = [
            Plane("Indistinguishability of classes", f"class, by community: {names}", "class, same order", alike[order][:, order].tolist()),
            Bars("Classes taken for one another", "indistinguishability", {f"{i} and {j}": value for i, j, value in found} or {"none": 0.0}),
        ]
        return Findings(readings, figures)


def _one_sided(matrix: Tensor) -> float:
    total = float(matrix.sum())
    return float((matrix - matrix.T).abs().triu().sum()) / total if total else 0.0
