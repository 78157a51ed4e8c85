"""Example forgetting: counts how often each training sample turns from right to wrong while a network learns."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Reading

CARD = Card(
    part="example-forgetting",
    kind="technique",
    paper="example-forgetting",
    title="An Empirical Study of Example Forgetting during Deep Neural Network Learning",
    year=2018,
    url="https://arxiv.org/abs/1812.05159",
    departs=(
        "a sample that was never right gets the largest number of presentations of any sample as its score; the paper puts it at infinity,"
        " the released code at the number of epochs, which is the same number when every epoch shows every sample",
        "a row whose label was mixed so far that another class weighs most, and a row without a label, is not counted as a presentation",
        "where a part makes several passes in one step, the first one is counted",
    ),
    expects=("labels", "logits"),
)


@final
@dataclass(eq=False)
class ForgettingTracker:
    """Counts for ``n`` samples, fed with every presentation in order. All tensors are [N] on the CPU.

    ``seen`` presentations; ``last`` whether the latest was right (1), wrong (0) or never came (-1);
    ``forgotten`` forgetting events: right, then wrong at the next presentation (definition 1 of the paper);
    ``learned_at`` the presentation, from 0, that was right first, or -1; ``margin`` sum of the margins.
    """

    n: int
    seen: Int[Tensor, " N"] = field(init=False)
    last: Int[Tensor, " N"] = field(init=False)
    forgotten: Int[Tensor, " N"] = field(init=False)
    learned_at: Int[Tensor, " N"] = field(init=False)
    margin: Float[Tensor, " N"] = field(init=False)

    def __post_init__(self) -> None:
        self.seen, self.forgotten = torch.zeros(self.n, dtype=torch.int64), torch.zeros(self.n, dtype=torch.int64)
        self.last, self.learned_at = torch.full((self.n,), -1), torch.full((self.n,), -1)
        self.margin = torch.zeros(self.n, dtype=torch.float64)

    def update(self, index: Int[Tensor, " n"], correct: Bool[Tensor, " n"], margin: Float[Tensor, " n"] | None = None) -> None:
        """Count one presentation of each row of ``index``; a row that stands there twice was presented twice, in that order."""
        if len(index) and (int(index.min()) < 0 or int(index.max()) >= self.n):
            raise Mistake(f"index: rows must lie in 0..{self.n - 1}; they span {int(index.min())}..{int(index.max())}")
        while len(index):
            order = index.argsort(stable=True)
            first = torch.cat([torch.ones(1, dtype=torch.bool), index[order].diff() != 0])
            now, later = order[first], order[~first].sort().values
            rows, right = index[now], correct[now]
            self.forgotten[rows] += ((self.last[rows] == 1) & ~right).long()
            self.learned_at[rows] = torch.where((self.learned_at[rows] < 0) & right, self.seen[rows], self.learned_at[rows])
            self.last[rows] = right.long()
            self.seen[rows] += 1
            if margin is not None:
                self.margin[rows] += margin[now].double()
            index, correct, margin = index[later], correct[later], None if margin is None else margin[later]

    @property
    def never_learned(self) -> Bool[Tensor, " N"]:
        """Presented, and never right."""
        return (self.seen > 0) & (self.learned_at < 0)

    @property
    def unforgettable(self) -> Bool[Tensor, " N"]:
        """Right at least once, and never wrong after that."""
        return (self.learned_at >= 0) & (self.forgotten == 0)

    def scores(self) -> Float[Tensor, " N"]:
        """Forgetting events of each sample; never learned: the largest number of presentations; never presented: nan."""
        most = self.seen.max() if self.n else self.seen.sum()
        scores = torch.where(self.never_learned, most, self.forgotten).double()
        return torch.where(self.seen > 0, scores, torch.nan)

    def mean_margin(self) -> Float[Tensor, " N"]:
        """Mean margin over a sample's presentations; nan where there was none."""
        return self.margin / self.seen


def misclassification_margin(logits: Float[Tensor, "n k"], y: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The logit of the label minus the largest other logit: positive where the network is right."""
    own = logits.gather(1, y[:, None])[:, 0]
    others = logits.scatter(1, y[:, None], -torch.inf)
    return own - others.max(1).values


def prune_by_forgetting(scores: Float[Tensor, " n"], fraction: float, gen: Generator, keep: str = "most-forgotten") -> Int[Tensor, " m"]:
    """Positions that stay, ascending, when the ``fraction`` of samples with the lowest score is dropped; ties fall at random.

    ``keep="least-forgotten"`` drops the highest scores instead. Scores of several runs are summed before.
    Raises Mistake for a fraction outside [0, 1) or a score that is nan (a sample that was never presented).
    """
    if bool(scores.isnan().any()):
        raise Mistake(f"scores: {int(scores.isnan().sum())} samples were never presented; score only the rows that were trained on")
    if keep not in ("most-forgotten", "least-forgotten"):
        raise Mistake(f"keep={keep!r}: must be 'most-forgotten' or 'least-forgotten'")
    shuffled = torch.randperm(len(scores), generator=gen)
    order = shuffled[scores[shuffled].argsort(stable=True, descending=keep == "least-forgotten")]
    return order[_dropped(len(scores), fraction) :].sort().values


def random_prune(n: int, fraction: float, gen: Generator) -> Int[Tensor, " m"]:
    """Positions that stay, ascending, when a ``fraction`` of ``n`` samples is dropped at random: the comparison."""
    return torch.randperm(n, generator=gen)[_dropped(n, fraction) :].sort().values


def _dropped(n: int, fraction: float) -> int:
    if not 0 <= fraction < 1:
        raise Mistake(f"fraction={fraction}: the share of samples to drop must be at least 0 and below 1")
    return min(round(fraction * n), max(n - 1, 0))  # one sample stays


def ranks(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks from 1, ascending; equal values share the mean of their ranks."""
    _, where, count = x.unique(return_inverse=True, return_counts=True)
    return (count.cumsum(0) - (count - 1) / 2).double()[where]


def noisy_label_check(scores: Float[Tensor, " n"], noisy: Bool[Tensor, " n"]) -> float:
    """Area under the ROC curve of the score as a detector of the samples marked ``noisy`` (1 best, 0.5 blind)."""
    wrong, right = int(noisy.sum()), int((~noisy).sum())
    if not wrong or not right:
        raise Mistake("noisy: needs samples with and without planted noise")
    return float((ranks(scores)[noisy].sum() - wrong * (wrong + 1) / 2) / (wrong * right))


class Transfer(NamedTuple):
    """How far two sets of scores agree: rank correlation, and the shared part of the two most forgotten halves."""

    spearman: float
    overlap: float


def transfer(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> Transfer:
    """Compare the scores of the same samples from two seeds or two networks.

    ``overlap`` is the share of the most forgotten half of ``a`` that stands in that of ``b`` (0.5 by chance);
    ties at the border fall by position.
    """
    if len(a) != len(b):
        raise Mistake(f"transfer: both sets of scores must be of the same samples; they have {len(a)} and {len(b)}")
    half = len(a) // 2
    top = [set(s.argsort(stable=True, descending=True)[:half].tolist()) for s in (a, b)]
    spearman = torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1]
    return Transfer(float(spearman), len(top[0] & top[1]) / max(half, 1))


@final
@dataclass
class ExampleForgetting(Technique):
    """Training samples that were forgotten most often: hard ones, and wrong labels.

    Reads the training-mode scores of each step's pass, before its update, and changes nothing. The
    counts are in ``tracker`` (rows of the pool), in ``readings`` and in ``gallery``.
    """

    def on_start(self, run: Run) -> None:
        self.tracker = ForgettingTracker(len(run.data.y))
        self._awaits = False

    def on_batch(self, run: Run) -> None:
        self._awaits = True

    def on_loss(self, run: Run) -> None:
        logits, y, index = run.out.logits, run.batch.y, run.batch.index
        if not self._awaits or logits is None or y is None or logits.shape != y.shape or len(index) != len(y):
            return
        self._awaits = False
        logits = logits.detach()
        own = run.data.y[index].to(logits.device)
        counted = (own >= 0) & (y.argmax(1) == own)
        label = own.clamp_min(0)
        columns = (index.to(logits.device), counted, logits.argmax(1) == label, misclassification_margin(logits, label))
        rows = run.processes.gather(torch.stack([column.double() for column in columns], 1)).cpu()
        rows = rows[rows[:, 1] > 0]
        self.tracker.update(rows[:, 0].long(), rows[:, 2] > 0, rows[:, 3])

    def on_epoch(self, run: Run) -> None:
        for reading in self.readings(run):
            run.report(reading.name, reading.value, reading.unit)

    def readings(self, run: Run) -> list[Reading]:
        """Shares of the presented samples that were never forgotten and never right, and means over them."""
        tracker = self._tracker()
        n = max(int((tracker.seen > 0).sum()), 1)
        return [
            Reading("unforgettable share", float(tracker.unforgettable.sum()) / n, "share of samples"),
            Reading("never learned share", float(tracker.never_learned.sum()) / n, "share of samples"),
            Reading("forgetting events", float(tracker.forgotten.sum()) / n, "events per sample"),
            Reading("margin", float(tracker.mean_margin().nan_to_num().sum()) / n, "logits"),
        ]

    def gallery(self, run: Run) -> list[tuple[int, float]]:
        """(row of the pool, score) of every presented sample, most forgotten first; among equals the lowest margin first."""
        tracker = self._tracker()
        scores, margin = tracker.scores(), tracker.mean_margin()
        rows = (tracker.seen > 0).nonzero()[:, 0]
        rows = rows[margin[rows].argsort(stable=True)]
        rows = rows[scores[rows].argsort(stable=True, descending=True)]
        return list(zip(rows.tolist(), scores[rows].tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        return {name: getattr(self._tracker(), name).clone() for name in ("seen", "last", "forgotten", "learned_at", "margin")}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self.on_start(run)
        if state:
            self.tracker = ForgettingTracker(len(state["seen"]))
            for name, value in state.items():
                setattr(self.tracker, name, value.clone())

    def _tracker(self) -> ForgettingTracker:
        if not hasattr(self, "tracker"):
            raise Mistake("example-forgetting has counted nothing yet; train with it first")
        return self.tracker
