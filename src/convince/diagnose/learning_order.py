"""Learning order: which samples a network learns early, and whether networks trained apart learn them in the same order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor

from convince import parts
from convince.errors import Mistake
from convince.fit.answer import score
from convince.fit.randomness import generator, key
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card, spell
from convince.types import Curves, Figure, Plane, Reading, RunSpec

CARD = Card(
    part="learning-order",
    kind="technique",
    paper="agree-to-agree",
    title="Let's Agree to Agree: Neural Networks Share Classification Order on Real Datasets",
    year=2020,
    url="https://arxiv.org/abs/1905.10854",
    expects=("labels",),
    tiny={"nets": 2},
    departs=(
        "a collection has 5 networks; the paper trains many more, which nets=N allows",
        "while a network trains, training and validation images are looked at; the test part stays closed, and the functions take any images",
        "the paper shows histograms of the agreement; the bimodality index, its null and the mean correlation of two networks are ours",
    ),
)


# -- one collection: m networks, e looks (epochs), n samples ------------------------------------------


def tp_agreement(correct: Bool[Tensor, "m e n"]) -> Float[Tensor, "e n"]:
    """Share of the networks that are right on a sample, at each look (true-positive agreement); its mean over samples is the mean accuracy."""
    return correct.double().mean(0)


def agreement(predicted: Int[Tensor, "m e n"]) -> Float[Tensor, "e n"]:
    """The largest share of networks that give a sample the same label, right or wrong; at least ``1 / m``."""
    return (predicted[:, None] == predicted[None]).double().mean(0).amax(0)


def accessibility(tp: Float[Tensor, "e n"]) -> Float[Tensor, " n"]:
    """Mean of :func:`tp_agreement` over the looks: the higher, the earlier learnt."""
    return tp.mean(0)


def bimodality(tp: Float[Tensor, " n"]) -> float:
    """``Var_x(tp) / (p (1 - p))``, p the mean: 1 where all networks are right on the same samples. Nan where all or none is right."""
    p = float(tp.mean())
    return float(tp.var(correction=0)) / (p * (1 - p)) if 0 < p < 1 else float("nan")


def independent(correct: Bool[Tensor, "m n"], gen: Generator, times: int = 20) -> float:
    """The null of :func:`bimodality`: its mean when each network's errors are shuffled over the samples; near ``1 / m``."""
    found = []
    for _ in range(times):
        shuffled = torch.stack([row[torch.randperm(len(row), generator=gen)] for row in correct])
        found.append(bimodality(shuffled.double().mean(0)))
    return sum(found) / times


def half_learned(tp: Float[Tensor, "e n"]) -> int:
    """The look at which the mean accuracy is nearest to one half, where agreement by chance is least; the first of several."""
    return int((tp.mean(1) - 0.5).abs().argmin())


# -- two collections -----------------------------------------------------------------------------------


def order_correlation(a: Float[Tensor, " n"], b: Float[Tensor, " k"]) -> float:
    """Pearson's correlation of two accessibilities of the same samples; nan where one of them is constant."""
    if len(a) != len(b):
        raise Mistake(f"order_correlation: both orders must be of the same samples; they have {len(a)} and {len(b)}")
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size > 1e-12 else float("nan")


def at_equal_accuracy(a: Float[Tensor, "e n"], b: Float[Tensor, "f n"]) -> Int[Tensor, " e"]:
    """For each look of ``a`` the look of ``b`` with the nearest mean accuracy, so that a fast and a slow learner can be compared."""
    return (a.mean(1)[:, None] - b.mean(1)[None]).abs().argmin(1)


def reliability(correct: Bool[Tensor, "m e n"]) -> float:
    """Correlation of the accessibility of every other network with that of the rest: what another collection cannot exceed by much."""
    if len(correct) < 2:
        raise Mistake(f"reliability: a collection of {len(correct)} network cannot be halved; it needs at least 2")
    return order_correlation(accessibility(tp_agreement(correct[::2])), accessibility(tp_agreement(correct[1::2])))


def mean_correlation(correct: Bool[Tensor, "m e n"]) -> float:
    """Mean of :func:`order_correlation` over the pairs of networks, each by itself; nan for one network or a constant order."""
    alone = [accessibility(tp_agreement(net[None])) for net in correct]
    pairs = [order_correlation(a, b) for i, a in enumerate(alone) for b in alone[:i]]
    return sum(pairs) / len(pairs) if pairs else float("nan")


# -- the part ------------------------------------------------------------------------------------------


@final
@dataclass
class LearningOrder(Technique):
    """Samples in the order in which networks learn them; the hardest first in the report.

    Trains ``nets - 1`` more networks from other seeds with the run's own parts, and changes nothing in the run itself. After each epoch every
    network answers the validation part and at most ``images`` training images. ``nets=1`` trains none: it measures one network, or, beside
    deep-ensemble, the ensemble's.
    """

    nets: int = 5
    images: int = 5000

    def __post_init__(self) -> None:
        if self.nets < 1:
            raise Mistake(f"learning-order: nets={self.nets}: at least 1 network; 5 is usual, and agreement needs 2")
        if self.images < 1:
            raise Mistake(f"learning-order: images={self.images}: at least 1 training image is looked at after each epoch")

    def on_start(self, run: Run) -> None:
        self.seen: dict[str, list[Tensor]] = {"train": [], "val": []}  # labels that this network gave, by look
        self.others: dict[str, list[Tensor]] = {"train": [], "val": []}  # the same of further networks, stacked
        self.rows: dict[str, Tensor] = {}  # of the pool
        self.truth: dict[str, Tensor] = {}

    def fit_members(self, run: Run) -> list[RunSpec]:
        for seat in run.team.seats if self.nets > 1 else ():
            if seat.technique is not self and any(_watched(spec) for spec in seat.technique.fit_members(run)):
                raise Mistake(f"learning-order: nets={self.nets} beside {seat.name}, which trains networks of its own: use nets=1, then those are compared")
        beside = tuple(spec for spec in run.settings.parts if not _names_this(spec))
        alone = (*beside, spell("learning-order", {"nets": 1, "images": self.images}))
        return [RunSpec({"seed": key(run.seed, "learning-order", i) % 2**31, "parts": alone}) for i in range(1, self.nets)]

    def _choose(self, run: Run) -> None:
        """The labelled rows that are looked at: all of the validation part, and training rows evenly through it."""
        for split in self.seen:
            rows = run.data.split[split]
            rows = rows[run.data.y[rows] >= 0].sort().values
            if split == "train" and len(rows) > self.images:
                rows = rows[torch.linspace(0, len(rows) - 1, self.images).long()]
            self.rows[split], self.truth[split] = rows, run.data.y[rows]

    def on_epoch(self, run: Run) -> None:
        if not self.rows:
            self._choose(run)
        for split, looks in self.seen.items():
            rows = self.rows[split]
            if len(rows):
                with run.aside():
                    looks.append(score(run.answer, run.data, rows, run.plan, run.processes).predicted.to(torch.int32))
        if not self.others["train"]:
            watched = [seat.technique for child in run.children for seat in child.team.seats if isinstance(seat.technique, LearningOrder)]
            self.others = {split: [torch.stack(one.seen[split]) for one in watched if one.seen[split]] for split in self.seen}
        for reading in self.readings(run):
            run.report(reading.name, reading.value, reading.unit)

    def predictions(self, split: str) -> Int[Tensor, "m e r"]:
        """The labels that each network gave after each epoch, up to the epoch that all have reached; this run's network is the first."""
        if not getattr(self, "seen", {}).get(split):
            raise Mistake(f"learning-order has looked at no {split} image yet; train with it first")
        all_ = [torch.stack(self.seen[split]), *self.others[split]]
        shortest = min(len(looks) for looks in all_)
        return torch.stack([looks[:shortest] for looks in all_])

    def correct(self, split: str) -> Bool[Tensor, "m e r"]:
        """Where :meth:`predictions` are right."""
        return self.predictions(split) == self.truth[split]

    def readings(self, run: Run) -> list[Reading]:
        """How far the networks share their order, on training and validation images; what is undefined is left out."""
        found = []
        for split, what in (("train", "training"), ("val", "validation")):
            if split == "val" and not self.seen["val"]:
                continue
            labels, right = self.predictions(split), self.correct(split)
            tp = tp_agreement(right)
            at = half_learned(tp)
            found.append(Reading(f"accessibility, {what}", float(accessibility(tp).mean()), "0 to 1"))
            if len(right) > 1:
                null = independent(right[:, at], generator("learning-order", split))
                found += [
                    Reading(f"agreement after the last epoch, {what}", float(agreement(labels)[-1].mean()), f"share of {len(right)} networks"),
                    Reading(f"bimodality at half accuracy, {what}", bimodality(tp[at]), "0 to 1"),
                    Reading(f"bimodality of independent networks, {what}", null, "0 to 1"),
                    Reading(f"order shared by two networks, {what}", mean_correlation(right), "Pearson"),
                    Reading(f"order shared by two halves, {what}", reliability(right), "Pearson"),
                ]
        return [reading for reading in found if reading.value == reading.value]

    def figures(self, run: Run) -> list[Figure]:
        """TP-agreement of training images by epoch, the latest learnt first; and how many networks are right, after each third of the epochs."""
        tp = tp_agreement(self.correct("train"))
        order = accessibility(tp).argsort(stable=True)
        kept = order[torch.linspace(0, len(order) - 1, min(len(order), 200)).long()]
        levels = torch.arange(len(self.predictions("train")) + 1).double() / len(self.predictions("train"))
        marks = sorted({0, len(tp) // 3, 2 * len(tp) // 3, len(tp) - 1})
        shares = {f"epoch {e + 1}": [(float(v), float(((tp[e] - v).abs() < 1e-9).double().mean())) for v in levels] for e in marks}
        return [
            Plane("Networks that are right, by epoch", "training images, latest learnt first", "epoch", tp[:, kept].T.tolist()),
            Curves("How many networks agree", "share of networks that are right", "share of training images", shares),
        ]

    def gallery(self, run: Run) -> list[tuple[int, float]]:
        """(row of the pool, accessibility) of the training images that were looked at, the latest learnt first."""
        found = accessibility(tp_agreement(self.correct("train")))
        order = found.argsort(stable=True)
        return list(zip(self.rows["train"][order].tolist(), found[order].tolist(), strict=True))

    def state(self) -> dict[str, Any]:
        if not hasattr(self, "seen"):
            return {}
        own = {f"seen.{split}": torch.stack(looks) for split, looks in self.seen.items() if looks}
        own |= {f"rows.{split}": rows for split, rows in self.rows.items()} | {f"truth.{split}": truth for split, truth in self.truth.items()}
        return own | {f"others.{split}.{i}": looks for split, all_ in self.others.items() for i, looks in enumerate(all_)}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self.on_start(run)
        for split in self.seen:
            self.seen[split] = list(state[f"seen.{split}"].unbind()) if f"seen.{split}" in state else []
            kept = sorted((name for name in state if name.startswith(f"others.{split}.")), key=lambda name: int(name.rsplit(".", 1)[1]))
            self.others[split] = [state[name] for name in kept]
            if f"rows.{split}" in state:
                self.rows[split], self.truth[split] = state[f"rows.{split}"], state[f"truth.{split}"]


def _names_this(spec: str) -> bool:
    return parts.plain(parts.parse(spec)[0]) == parts.plain(CARD.part)


def _watched(member: RunSpec) -> bool:
    """True for a further run that this part would be switched on in."""
    return any(_names_this(spec) for spec in member.settings.get("parts", ()))
