"""SimQ-NAS: search a trained super-network for a sub-network and the bits of its blocks together, led by cheap predictors of accuracy."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Generator, nn

from convince import parts
from convince.backbones.elastic_resnet import ElasticResnet, checked, stored_bytes, sub_network
from convince.compress.qat import QatConv2d, set_phase
from convince.errors import Mistake
from convince.fit.answer import Answer
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.kinds import Search
from convince.parts import Card
from convince.search.lab import LOOKED_AT, Lab
from convince.search.nsga2 import Genomes, Points, fronts, hypervolume, nsga2
from convince.search.sandwich_rule import width_choices
from convince.search.space import Genes, Space

CARD = Card(
    part="simq-nas",
    kind="search",
    paper="simq-nas",
    title="SimQ-NAS: Simultaneous Quantization Policy and Neural Architecture Search",
    year=2023,
    url="https://arxiv.org/abs/2312.13301",
    needs=("optuna",),
    departs=(
        "the objectives are accuracy and bytes; latency is none, since torch has no public int8 convolution that would be faster",
        "the super-network is trained here with the sandwich rule for a share of the budget; the paper takes trained ones and searches only",
        "the find is the most accurate point of at most a share of the largest network's bytes, and is then trained from scratch by who wants it;"
        " the paper deploys the super-network's weights",
        "a configuration is measured once; where the predictors propose too few new ones, random ones fill the population,"
        " and the very smallest network is always in the first",
        "with a budget below 250 evaluations the population shrinks, so that there are five rounds as with the paper's 50",
        "genes are mutated with distribution index 3, each with probability 1 / genes; the authors' index 20 hardly ever changes one of three choices",
        "predictors try five strengths of regularisation each, over the authors' ranges, in place of a hundred",
    ),
    tiny={"trial_epochs": 1, "depths": (2, 1), "widths": (4, 6), "stem": 4, "size": 0.7, "predicted": 40, "look": 8, "calibrate": 8},
)


# -- the space ---------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Shapes:
    """All sub-networks whose stages have one of ``depths`` and one of ``widths`` each, each block in one of ``bits``; the least comes first.

    A genome [g] holds places in the lists of choices: the depths, the widths, and the bits of every block that there may be.
    """

    depths: Sequence[Sequence[int]]
    widths: Sequence[Sequence[int]]
    bits: Sequence[int]
    stem: int

    @property
    def blocks(self) -> list[tuple[int, int]]:
        """Stage and number of every block that there may be."""
        return [(i, j) for i, depths in enumerate(self.depths) for j in range(max(depths))]

    @property
    def choices(self) -> dict[str, Sequence[int]]:
        """What may be chosen, by name: ``depth1``, ``width1``, ``bits1.1`` (stage 1, block 1)."""
        found: dict[str, Sequence[int]] = {f"depth{i}": sorted(depths) for i, depths in enumerate(self.depths, 1)}
        found |= {f"width{i}": sorted(widths) for i, widths in enumerate(self.widths, 1)}
        return found | {f"bits{i + 1}.{j + 1}": sorted(self.bits) for i, j in self.blocks}

    def options(self, genes: Genes) -> dict[str, Any]:
        """The options of elastic-resnet; bits of blocks that the depths leave out are not read."""
        depths = [genes[f"depth{i + 1}"] for i in range(len(self.depths))]
        bits = [genes[f"bits{i + 1}.{j + 1}"] for i, j in self.blocks if j < depths[i]]
        return {"depths": depths, "widths": [genes[f"width{i + 1}"] for i in range(len(depths))], "bits": bits, "stem": self.stem}

    def genes(self, genome: Sequence[int]) -> Genes:
        """The choices that a genome stands for."""
        return {name: values[at] for (name, values), at in zip(self.choices.items(), genome, strict=True)}

    @property
    def most(self) -> list[int]:
        """The last place in each list of choices."""
        return [len(values) - 1 for values in self.choices.values()]

    def used(self, genomes: Genomes) -> Bool[np.ndarray, "n g"]:
        """Whether a gene is read; the bits of a block beyond its stage's depth are not."""
        found = np.ones(genomes.shape, dtype=bool)
        for at, (i, j) in enumerate(self.blocks, 2 * len(self.depths)):
            found[:, at] = np.array(sorted(self.depths[i]))[genomes[:, i]] > j
        return found

    def plain(self, genomes: Genomes) -> list[tuple[int, ...]]:
        """Genomes with 0 in genes that are not read: equal ones are one network."""
        return [tuple(map(int, row)) for row in np.where(self.used(genomes), genomes, 0)]

    def encoded(self, genomes: Genomes) -> Float[np.ndarray, "n d"]:
        """One-hot codes of all choices; those of an absent block are zeros, whatever its bits."""
        used = self.used(genomes)
        return np.concatenate([(genomes[:, [at]] == np.arange(most + 1)) & used[:, [at]] for at, most in enumerate(self.most)], 1).astype(float)

    def drawn(self, count: int, gen: Generator) -> Genomes:
        """Genomes drawn evenly, choice by choice."""
        return torch.stack([torch.randint(most + 1, (count,), generator=gen) for most in self.most], 1).numpy()


# -- predictors --------------------------------------------------------------------------------------

Predict = Callable[[Float[np.ndarray, "n d"]], Float[np.ndarray, " n"]]


def predictor(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, " n"]) -> Predict:
    """Ridge regression or an RBF support vector regression of ``y`` [0 to 1], whichever has the smaller mean absolute percentage error in 5 folds.

    Strengths by grid search: ``alpha`` 0.1 to 10, ``C`` 1 to 100 (``epsilon`` 0), on percentages. Codes that never change are left out.
    """
    from sklearn.linear_model import Ridge
    from sklearn.model_selection import GridSearchCV, KFold
    from sklearn.svm import SVR

    varies = x.std(0) > 0
    if not varies.any() or len(y) < 2:
        return lambda codes: np.full(len(codes), y.mean())
    folds = KFold(min(5, len(y)))
    tried: list[Any] = [(Ridge(), {"alpha": [0.1, 0.3, 1.0, 3.0, 10.0]}), (SVR(kernel="rbf", gamma="auto", epsilon=0.0), {"C": [1, 3, 10, 30, 100]})]
    searched = [GridSearchCV(model, grid, scoring="neg_mean_absolute_percentage_error", cv=folds).fit(x[:, varies], 100 * y) for model, grid in tried]
    better = max(searched, key=lambda each: each.best_score_)
    return lambda codes: better.predict(codes[:, varies]) / 100


# -- the loop ----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Seen:
    """A configuration that was measured: its accuracy, 0 to 1, its bytes, and what had been predicted for it, NaN in the first round."""

    genome: tuple[int, ...]
    accuracy: float
    cost: float
    predicted: float


def nothing_known(codes: Float[np.ndarray, "n d"]) -> Float[np.ndarray, " n"]:
    """The predictor of the first round: NaN for each row."""
    return np.full(len(codes), math.nan)


def linas(
    shapes: Shapes,
    measure: Callable[[dict[str, Any]], float],
    cost: Callable[[dict[str, Any]], float],
    evaluations: int,
    population: int,
    gen: Generator,
    *,
    predicted: int = 5000,
    fit: Callable[[np.ndarray, np.ndarray], Predict] = predictor,
) -> list[Seen]:
    """Measure a population, fit predictors on all that was measured, let NSGA-II search them, measure its last population, and so on.

    ``measure`` and ``cost`` read options of elastic-resnet; ``evaluations`` counts calls of ``measure``, ``predicted`` those of the
    predictor in a round.
    """
    seen: dict[tuple[int, ...], Seen] = {}
    proposed = [tuple(0 for _ in shapes.most), *shapes.plain(shapes.drawn(population - 1, gen))]
    predict: Predict = nothing_known

    def costs(genomes: Sequence[tuple[int, ...]]) -> np.ndarray:
        return np.array([cost(shapes.options(shapes.genes(row))) for row in genomes])

    def judged(genomes: Genomes) -> Points:
        return np.stack([-predict(shapes.encoded(genomes)), costs(shapes.plain(genomes))], 1)

    while len(seen) < evaluations:
        rows = filled(shapes, proposed, seen, min(population, evaluations - len(seen)), gen)
        if not rows:
            break  # the space is used up
        for row, guess, price in zip(rows, predict(shapes.encoded(np.array(rows))), costs(rows), strict=True):
            seen[row] = Seen(row, measure(shapes.options(shapes.genes(row))), float(price), float(guess))
        if len(seen) < evaluations:
            predict = fit(shapes.encoded(np.array(list(seen))), np.array([one.accuracy for one in seen.values()]))
            proposed = shapes.plain(nsga2(judged, shapes.most, shapes.drawn(population, gen), predicted, gen))
    return list(seen.values())


def filled(shapes: Shapes, proposed: Sequence[tuple[int, ...]], seen: Any, count: int, gen: Generator) -> list[tuple[int, ...]]:
    """``count`` genomes that are not in ``seen``: the proposed ones in their order, then random ones; fewer where the space has no more."""
    rows = list(dict.fromkeys(row for row in proposed if row not in seen))[:count]
    for _ in range(100):
        if len(rows) == count:
            break
        rows = list(dict.fromkeys([*rows, *(row for row in shapes.plain(shapes.drawn(count, gen)) if row not in seen)]))[:count]
    return rows


def front(seen: Sequence[Seen]) -> list[Seen]:
    """The measured configurations than which none is both smaller and more accurate, the smallest first."""
    best = fronts(np.array([[-one.accuracy, one.cost] for one in seen]))[0]
    return sorted((seen[i] for i in best), key=lambda one: one.cost)


# -- measuring a sub-network --------------------------------------------------------------------------


@torch.no_grad()
def measured(run: Run, options: dict[str, Any], look: int = 256, calibrate: int = 100) -> nn.Module:
    """The answer of a sub-network as it would be deployed, without training.

    Its BN statistics are taken anew from ``look`` training images, in floating point; then the ranges of its quantised activations are the
    smallest and largest values on ``calibrate`` of them.
    """
    model = run.model
    if not isinstance(model, ElasticResnet):
        raise Mistake(f"simq-nas takes sub-networks out of an elastic-resnet, and this run trained {run.settings.model!r}")
    small = sub_network(model, options["depths"], options["widths"], options["bits"])
    small = run.plan.place(small)  # type: ignore[assignment]
    order = torch.randperm(len(run.data.split.train), generator=generator(run.seed, "simq-nas", "rows"))
    rows = run.data.split.train[order]
    norms = [m for m in small.modules() if isinstance(m, nn.BatchNorm2d)]

    def see(count: int, batch: int) -> None:
        for part in rows[:count].split(batch):
            with run.plan.autocast():
                small(run.normalise(run.plan.pixels(run.data.x.take(part))))

    set_phase(small, on=False, watching=False, norms=True)
    small.train()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over all batches
    see(look, 128)
    small.eval()
    for module in small.modules():
        module.training = isinstance(module, QatConv2d)  # these alone watch their input
    set_phase(small, on=False, watching=True, norms=False)
    see(calibrate, calibrate)
    set_phase(small, on=True, watching=True, norms=False)
    for norm in norms:
        norm.momentum = 0.1
    return Answer(run.normalise, small).eval()


# -- the search --------------------------------------------------------------------------------------


@final
@dataclass
class SimqNas(Search):
    """Train a super-network of ``depths`` and ``widths`` for ``share`` of the budget, then search it by :func:`linas` for accuracy and bytes.

    The find is the most accurate network of at most ``size`` [share of the largest one's bytes]; 0.25 is what 8 bits alone come to. ``notes``
    tell the whole front. At most ``evaluations`` are made, ``population`` a round; each looks at the validation part and at ``look`` and
    ``calibrate`` training images. ``bits`` 8 and 32 are the paper's; 4 may be added. ``trial_epochs`` is for the random search beside it.
    """

    trial_epochs: int = 4
    depths: Sequence[int] = (3, 3, 3)
    widths: Sequence[int] = (16, 32, 48)
    ratios: Sequence[float] = (0.5, 0.75, 1.0)
    bits: Sequence[int] = (8, 32)
    stem: int = 16
    size: float = 0.25
    share: float = 0.5
    evaluations: int = 250
    population: int = 50
    predicted: int = 5000
    look: int = 256
    calibrate: int = 100
    found: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    network: ClassVar[str] = "elastic-resnet"

    def __post_init__(self) -> None:
        if not 0 < self.size <= 1 or not 0 < self.share < 1:
            raise Mistake(f"simq-nas: size={self.size}, share={self.share}: shares of the largest network's bytes and of the budget, above 0 and below 1")
        if min(self.evaluations, self.population, self.look, self.calibrate) < 2:
            raise Mistake("simq-nas: evaluations, population, look and calibrate must be at least 2")
        checked(self.depths, self.widths, (), self.stem)
        for bits in self.bits:
            checked((1,), (1,), (bits,), self.stem)

    @property
    def shapes(self) -> Shapes:
        """What may be searched."""
        widths = [width_choices(width, tuple(self.ratios)) for width in self.widths]
        return Shapes([range(1, depth + 1) for depth in self.depths], widths, self.bits, self.stem)

    def bytes_on(self, data: Any) -> Callable[[dict[str, Any]], float]:
        """Options -> bytes of the network for this data's classes and channels."""
        return lambda options: stored_bytes(**options, num_classes=data.k, in_chans=data.preprocess.channels)

    def space(self, data: Any) -> Space:
        """Depths, widths and bits that come to at most ``size`` of the largest network's bytes."""
        shapes, cost = self.shapes, self.bytes_on(data)
        limit, least = (
            self.size * cost({"depths": self.depths, "widths": self.widths, "stem": self.stem}),
            cost(shapes.options(shapes.genes([0] * len(shapes.most)))),
        )
        if least > limit:
            raise Mistake(f"simq-nas: size={self.size}: the smallest network takes {least:,.0f} bytes, more than {limit:,.0f}; give a larger size")
        return Space(shapes.choices, shapes.options, lambda genes: cost(shapes.options(genes)) <= limit)

    def find(self, lab: Lab) -> dict[str, Any]:
        """The super-network, then :func:`linas`, as far as the budget goes."""
        shapes, cost, space = self.shapes, self.bytes_on(lab.data), self.space(lab.data)
        rows, val = len(lab.data.split.train), len(lab.data.split.val)
        a_pass = 4 * rows  # the largest, the smallest and two between
        epochs = max(int(self.share * lab.budget / a_pass), 1)
        lab.charge(epochs * a_pass)
        largest = {"depths": list(self.depths), "widths": list(self.widths), "stem": self.stem}
        sandwich = parts.spell("sandwich-rule", {"ratios": list(self.ratios)})
        name = "supernet-" + "-".join(map(str, itertools.chain(self.depths, self.widths, self.ratios, [self.stem, epochs])))
        run = lab.run(parts.spell(self.network, largest), name=name, parts=(sandwich,), epochs=epochs)
        each = LOOKED_AT * (val + min(self.look, rows) + min(self.calibrate, rows))
        count = min(self.evaluations, int(lab.left / each + 1e-6))
        if count < 2:
            raise Mistake(f"simq-nas: after {epochs} epochs of the super-network the budget allows {count} evaluations; give a larger --budget")
        lab.say(f"super-network trained for {epochs} epochs; {count} sub-networks can be measured")

        def measure(options: dict[str, Any]) -> float:
            how = [name, options, self.look, self.calibrate]
            return float(lab.keep(["simq-nas", how], each, lambda: lab.accuracy(run, measured(run, options, self.look, self.calibrate))))

        population = max(min(self.population, math.ceil(count / 5)), min(4, count))
        seen = linas(shapes, measure, cost, count, population, generator(lab.seed, "simq-nas"), predicted=self.predicted)
        self.found = self._told(shapes, seen, epochs, cost(largest))
        best = front(seen)
        ends = " to ".join(f"{one.accuracy:.1%} in {one.cost:,.0f} bytes" for one in dict.fromkeys((best[0], best[-1])))
        lab.say(f"{len(best)} of {len(seen)} networks are on the front: {ends}, with the super-network's weights; the largest in 32 bits: {cost(largest):,.0f}")
        chosen = max((one for one in best if space.fits(shapes.genes(one.genome))), key=lambda one: one.accuracy)
        lab.say(f"found: {chosen.accuracy:.1%} in {chosen.cost:,.0f} bytes, the most accurate of at most {self.size:.0%} of the largest")
        return shapes.options(shapes.genes(chosen.genome))

    def _told(self, shapes: Shapes, seen: Sequence[Seen], epochs: int, largest: float) -> dict[str, Any]:
        best = front(seen)
        rows = [{"accuracy": one.accuracy, "bytes": one.cost, **shapes.options(shapes.genes(one.genome))} for one in best]
        guessed = [one for one in seen if not math.isnan(one.predicted)]
        return {
            "supernet_epochs": epochs,
            "measured": len(seen),
            "largest_bytes": largest,
            "hypervolume": hypervolume([(-one.accuracy, one.cost / largest) for one in best], (0.0, 1.0)),
            "mean_error_of_predictions": sum(abs(one.predicted - one.accuracy) for one in guessed) / len(guessed) if guessed else None,
            "front": rows,
        }

    def notes(self) -> dict[str, Any]:
        """The front (accuracy on the super-network's weights, bytes, options), its hypervolume, and what it took."""
        return self.found
