"""Difficulty strata: images in levels by how many people named them rightly, and a classifier level by level."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.kinds import Probe, as_found
from convince.parts import Card
from convince.report.reckon import wilson
from convince.types import Curves, Findings, Reading

CARD = Card(
    part="difficulty-strata",
    kind="probe",
    paper="cifar10-humans-vs-dnn",
    title="CIFAR10 to Compare Visual Recognition Performance between Deep Neural Networks and Humans",
    year=2018,
    url="https://arxiv.org/abs/1811.07270",
    expects=("labels",),
    departs=(
        "where no answers of people are given, six nearest-neighbour learners stand in for them, and every reading says so",
        "six levels, equally wide below 'everyone is right'; the paper's sixty people give about six answers an image, grouped by its author",
        "error consistency, and levels made by one half of the panel and read by the other, are not in the paper",
    ),
)


# -- the panel -----------------------------------------------------------------------------------------


def answer_counts(answers: Int[Tensor, "m n"], k: int) -> Int[Tensor, "n k"]:
    """How often ``m`` annotators gave each class to each image; -1 is no answer."""
    if bool((answers >= k).any() or (answers < -1).any()):
        raise Mistake(f"answers: classes lie in 0..{k - 1}, and -1 is no answer; they span {int(answers.min())}..{int(answers.max())}")
    return F.one_hot(answers.clamp_min(0), k).mul((answers >= 0)[..., None]).sum(0)


class Panel(NamedTuple):
    """``right``: share of an image's answers that are right, nan without an answer; ``entropy`` of its answers, nats; ``majority``: the class given
    most, -1 without an answer; ``accuracy``: mean of ``right``, with its 95 % interval ``low`` to ``high``, by a bootstrap over images."""

    right: Float[Tensor, " n"]
    entropy: Float[Tensor, " n"]
    majority: Int[Tensor, " n"]
    accuracy: float
    low: float
    high: float


def human_panel(counts: Float[Tensor, "n k"] | Int[Tensor, "n k"], y: Int[Tensor, " n"], gen: Generator, draws: int = 1000) -> Panel:
    """What a panel knows of each image, from counts of its answers [n k] (as in CIFAR-10H) and the true classes."""
    counts = counts.double()
    total = counts.sum(1)
    shares = counts / total[:, None]
    right = shares.gather(1, y[:, None])[:, 0]
    known = right[total > 0]
    if not len(known):
        raise Mistake("human_panel: no image has an answer")
    means = known[torch.randint(len(known), (draws, len(known)), generator=gen)].mean(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    majority = torch.where(total > 0, counts.argmax(1), -1)
    return Panel(right, torch.special.entr(shares).sum(1), majority, float(known.mean()), low, high)


def halves(counts: Int[Tensor, "n k"], gen: Generator) -> tuple[Int[Tensor, "n k"], Int[Tensor, "n k"]]:
    """The answers of each image dealt at random into two halves; of an odd number the second gets one more."""
    n, k = counts.shape
    flat = counts.flatten()
    at = flat.nonzero()[:, 0].repeat_interleave(flat[flat > 0])  # one entry an answer: image * k + class
    at = at[torch.rand(len(at), generator=gen, dtype=torch.float64).add(at // k).argsort()]  # shuffled inside each image
    total = counts.sum(1)
    place = torch.arange(len(at)) - (total.cumsum(0) - total)[at // k]
    first = place < (total // 2)[at // k]
    a, b = (torch.bincount(at[part], minlength=n * k).view(n, k) for part in (first, ~first))
    return a, b


# -- levels --------------------------------------------------------------------------------------------


def difficulty_levels(right: Float[Tensor, " n"], n_levels: int = 6, edges: tuple[float, ...] | None = None) -> Int[Tensor, " n"]:
    """Level of each image: 1 where everyone is right, ``n_levels`` where (nearly) nobody is; 0 without an answer (nan).

    Below level 1 the levels divide the shares 0 to 1 equally. ``edges``, falling, replace them: level 1 from ``edges[0]`` up, level 2 from
    ``edges[1]`` up, and so on; the last level holds the rest.
    """
    if edges is not None:
        if list(edges) != sorted(set(edges), reverse=True) or not all(0 < edge <= 1 for edge in edges) or not edges:
            raise Mistake(f"edges={edges}: must fall, each above 0 and at most 1, such as (1.0, 0.8, 0.5)")
        levels = 1 + (right[:, None] < torch.tensor(edges, dtype=right.dtype) - 1e-9).sum(1)
    elif n_levels < 2:
        raise Mistake(f"n_levels={n_levels}: at least 2 levels; 6 is usual")
    else:
        levels = 1 + ((1 - right.nan_to_num(1)) * (n_levels - 1) - 1e-9).ceil().long()
    return torch.where(right.isnan(), 0, levels)


class Level(NamedTuple):
    """One row of a table: the level, its images, the share answered right, and Wilson's 95 % interval."""

    level: int
    n: int
    accuracy: float
    low: float
    high: float


def accuracy_by_level(right: Bool[Tensor, " n"] | Float[Tensor, " n"], levels: Int[Tensor, " n"]) -> list[Level]:
    """A row for each level that has an image. ``right`` is true or false of one classifier, or the share of several answers."""
    rows = []
    for level in levels[levels > 0].unique().tolist():
        inside = right[levels == level].double()
        rows.append(Level(level, len(inside), float(inside.mean()), *wilson(float(inside.sum()), len(inside))))
    return rows


def generalisation_gap(original: Bool[Tensor, " n"], degraded: Bool[Tensor, " n"], levels: Int[Tensor, " n"]) -> dict[int, float]:
    """By level, accuracy lost when the same images are blurred, dimmed or noisy: 0 where nothing is lost."""
    pairs = zip(accuracy_by_level(original, levels), accuracy_by_level(degraded, levels), strict=True)
    return {a.level: a.accuracy - b.accuracy for a, b in pairs}


# -- classifier and panel ------------------------------------------------------------------------------


def error_consistency(a: Bool[Tensor, " n"] | Float[Tensor, " n"], b: Bool[Tensor, " n"] | Float[Tensor, " n"]) -> float:
    """Kappa ``(c_obs - c_exp) / (1 - c_exp)`` of two answerers: 1 where they err on the same images, 0 where errors are independent.

    ``a`` and ``b`` say who is right; a share (of a panel's answers) stands for one of its annotators at random. Nan where both are right (or
    both wrong) on every image, since then agreement by chance is complete and kappa is 0 / 0.
    """
    a, b = a.double(), b.double()
    observed = float((a * b + (1 - a) * (1 - b)).mean())
    expected = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return (observed - expected) / (1 - expected) if expected < 1 else math.nan


class Comparison(NamedTuple):
    """``models``: for each, ``accuracy``, ``accuracy_easy`` (where every annotator is right) and ``kappa`` with an annotator at random; ``easy``:
    the images that every annotator has right; ``hard_for_nets``: those of them that every model has wrong, to be used as a test of their own."""

    models: dict[str, dict[str, float]]
    easy: Int[Tensor, " a"]
    hard_for_nets: Int[Tensor, " b"]


def compare_to_humans(predicted: Mapping[str, Int[Tensor, " n"]], y: Int[Tensor, " n"], panel: Panel) -> Comparison:
    """Several models beside one panel; images without an answer are left out of kappa and of the easy ones."""
    known, easy = ~panel.right.isnan(), panel.right == 1
    rows = {}
    for name, labels in predicted.items():
        right = labels == y
        on_easy = float(right[easy].double().mean()) if bool(easy.any()) else math.nan
        kappa = error_consistency(right[known], panel.right[known])
        rows[name] = {"accuracy": float(right.double().mean()), "accuracy_easy": on_easy, "kappa": kappa}
    missed = torch.stack([labels != y for labels in predicted.values()]).all(0) & easy
    return Comparison(rows, easy.nonzero()[:, 0], missed.nonzero()[:, 0])


# -- where answers come from ---------------------------------------------------------------------------


def read_answers(path: str | Path, n: int, k: int) -> Int[Tensor, "n k"]:
    """Counts [n k] from a file: ``.npy`` with counts [n k], or ``.csv`` with columns image (from 0), annotator, answer (class number)."""
    path = Path(path)
    try:
        if path.suffix == ".npy":
            found = np.load(path, allow_pickle=False)
            if found.ndim != 2 or not np.issubdtype(found.dtype, np.number) or (found != np.round(found)).any() or (found < 0).any():
                raise Mistake(f"difficulty-strata: {path}: must hold counts of answers [images, classes], whole numbers from 0 up")
            counts = torch.from_numpy(found.astype(np.int64))
        else:
            with path.open(newline="", encoding="utf-8") as file:
                rows = [(int(row["image"]), int(row["answer"])) for row in csv.DictReader(file)]
            if not rows or min(min(row) for row in rows) < 0:
                raise Mistake(f"difficulty-strata: {path}: needs at least one answer; images and classes are numbered from 0")
            counts = torch.zeros(max(n, 1 + max(i for i, _ in rows)), max(k, 1 + max(c for _, c in rows)), dtype=torch.int64)
            counts.index_put_(tuple(torch.tensor(rows).T), torch.tensor(1), accumulate=True)
    except (OSError, ValueError, KeyError) as error:
        if isinstance(error, Mistake):
            raise
        raise Mistake(f"difficulty-strata: {path}: not readable ({error!r}); give .npy counts, or .csv with columns image, annotator, answer") from error
    if tuple(counts.shape) != (n, k):
        raise Mistake(
            f"difficulty-strata: {path} tells of {counts.shape[0]} images and {counts.shape[1]} classes, and {n} images of {k} classes are looked at; "
            f"give one row for each, in their order ('convince probe' takes all with --images {counts.shape[0]})"
        )
    return counts


def stand_in_panel(x: Tensor, y: Int[Tensor, " n"], k: int, members: int = 6, side: int = 8) -> Int[Tensor, "n k"]:
    """Counts of answers of nearest-neighbour learners, of 1, 3 or 5 neighbours, that see images at most ``side`` pixels wide.

    Each splits the images at random and answers one half by the other's labels, so nobody has seen what it answers. Needs no training.
    """
    view = F.adaptive_avg_pool2d(x.float(), (min(x.shape[2], side), min(x.shape[3], side))) if x.dim() == 4 else x.float()
    view = view.flatten(1)
    apart = torch.cdist(view, view)
    counts = torch.zeros(len(y), k, dtype=torch.int64)
    for member in range(members):
        order = torch.randperm(len(y), generator=generator("difficulty-strata", member)).to(y.device)
        parts = order[: len(y) // 2], order[len(y) // 2 :]
        for asked, known in (parts, parts[::-1]):
            near = apart[asked][:, known].topk(min((1, 3, 5)[member % 3], len(known)), largest=False).indices
            votes = F.one_hot(y[known][near], k).sum(1).double()
            votes = votes + F.one_hot(y[known][near[:, 0]], k) / 2  # a tie goes to the nearest
            counts[asked.cpu(), votes.argmax(1).cpu()] += 1
    return counts


@final
@dataclass
class DifficultyStrata(Probe):
    """Accuracy of the answer by how hard an image is for people, and how alike its errors and theirs are.

    ``answers``: a file with their answers, see :func:`read_answers`, one row for each image looked at (so it suits ``convince probe``; riding along in
    training sees other images); None: the levels are those of simple learners. ``levels``: how many. Needs at least 4 images.
    """

    answers: str | None = None
    levels: int = 6

    def __post_init__(self) -> None:
        if self.levels < 2:
            raise Mistake(f"difficulty-strata: levels={self.levels} must be at least 2; 6 is usual")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        if len(y) < 4:
            raise Mistake(f"difficulty-strata: {len(y)} images cannot be put into levels; give at least 4")
        with as_found(answer), torch.no_grad():
            scores = torch.cat([answer(part) for part in x.split(256)])
        k, right, truth = scores.shape[1], (scores.argmax(1) == y).cpu(), y.cpu()
        counts = stand_in_panel(x, y, k) if self.answers is None else read_answers(self.answers, len(y), k)
        who = "stand-in learners" if self.answers is None else "people"
        panel = human_panel(counts, truth, generator("difficulty-strata", "bootstrap"))
        first, second = (human_panel(half, truth, generator("difficulty-strata"), 1).right for half in self._halves(counts))
        table = accuracy_by_level(right, difficulty_levels(panel.right, self.levels))
        other = ~second.isnan()
        held_out = accuracy_by_level(second[other], difficulty_levels(first[other], self.levels))
        readings = [Reading("accuracy", float(right.double().mean()), "share of images"), Reading(f"accuracy of {who}", panel.accuracy, "share of answers")]
        readings += [Reading(f"accuracy, level {row.level} of {self.levels} by {who}", row.accuracy, f"share of {row.n} images") for row in table]
        readings += [Reading(f"accuracy of other {who}, level {row.level}", row.accuracy, f"share, {row.n} images") for row in held_out]
        known = ~panel.right.isnan()
        kappa = error_consistency(right[known], panel.right[known])
        if not math.isnan(kappa):
            readings.append(Reading(f"error consistency with {who}", kappa, "kappa, 1 = same errors"))
        easy = panel.right == 1
        if bool(easy.any()):
            readings.append(Reading(f"wrong where all {who} are right", float((~right[easy]).double().mean()), f"share of {int(easy.sum())} images"))
        lines = {"answer": [(float(r.level), r.accuracy) for r in table], f"other {who}": [(float(r.level), r.accuracy) for r in held_out]}
        return Findings(readings, [Curves(f"Accuracy by difficulty for {who}", "level, 1: everyone is right", "accuracy", lines)])

    @staticmethod
    def _halves(counts: Tensor) -> tuple[Tensor, Tensor]:
        """Two halves of the panel; where no image has two answers, the whole twice would be circular, so this is refused."""
        if not bool((counts.sum(1) > 1).any()):
            raise Mistake("difficulty-strata: no image has two answers; levels need several annotators an image")
        return halves(counts, generator("difficulty-strata", "halves"))
