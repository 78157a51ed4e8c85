"""Claim of simq-nas: searching shape and bits together, led by predictors, finds better compromises than each alone."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from convince import parts
from convince.backbones.elastic_resnet import stored_bytes
from convince.claims import Bench, Numbers, column, paired, pooled, said
from convince.fit.answer import score
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve
from convince.search.nsga2 import Genomes, hypervolume, nsga2
from convince.search.simq_nas import Predict, Seen, Shapes, front, linas, measured, predictor

TARGET = {"model": "elastic-resnet-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "1. On one trained super-network, a search for shape and bits together that is led by predictors finds a better front of accuracy against size than a "
    "random search, and than a search for the shape first and the bits second, with as many measurements. 2. On its front stands a network that is smaller "
    "than the largest one in 8 bits and no less accurate."
)
SUPPORTED = (
    "1. the hypervolume of joint + predictors is above random's by at least 1 % on every seed, and above the two-stage search's in the mean; and 2. on every "
    "seed the front holds a network of fewer bytes than the largest in 8 bits whose test accuracy is at most one standard error below that one's."
)
CONTRADICTED = "1. joint + predictors is below random in the mean."
BUDGET = (
    "fashion-mnist pooled to 14 px (the catalogue: padded to 32), 5,000 training, 1,000 search and 5,000 test images; elastic ResNet, 3 stages, depth 1 to 3, "
    "widths 8, 16, 24 times 0.5, 0.75 or 1, bits 4, 8 or 32 a block, 6 epochs with the sandwich rule, batch 128, SGD 0.1 cosine; 3 seeds, one super-network "
    "each. Every search measures 100 configurations on the search images (the catalogue: 150), in five rounds where it has rounds, the very smallest network "
    "among them in every arm. Two-stage: 50 of them for shapes in 32 bits, then the bits of three shapes of that front. The measure is the hypervolume of the "
    "front, on the test images, of accuracy against the logarithm of bytes, up to 10 % and the largest network in 32 bits. Controls: NSGA-II without "
    "predictors, and predictors fitted on shuffled accuracies, which must fall to its level (at most 1 % above it in the mean); the predictors' share in the "
    "result counts as shown only if they do, and if the predictor's rank correlation on 50 configurations that no search chose is at least 0.6 in the mean. "
    "The seconds in the numbers are of the processor; what several arms measure is measured once."
)


class Bed:
    """One seed's super-network, trained when it is first asked for, and what has been measured on it."""

    def __init__(self, bench: Bench, seed: int) -> None:
        small = bench.scale == "smoke"
        self.seed, self.seen = seed, dict[str, float]()
        self.evaluations, self.held, self.predicted = (16, 6, 60) if small else (100, 50, 5000)
        self.epochs = 1 if small else 6
        name, train, val, test = ("digits", 64, 40, 40) if small else ("fashion-mnist", 5000, 1000, 5000)
        self.load = functools.partial(bench.data, name, train=train, val=val, test=test, seed=seed)
        self.by = 1 if small else 2
        depth, widths = (2, (4, 6)) if small else (3, (8, 16, 24))
        self.largest: dict[str, Any] = {"depths": [depth] * len(widths), "widths": list(widths), "stem": 8}
        choices = [sorted({round(width * ratio) for ratio in (0.5, 0.75, 1.0)}) for width in widths]
        self.shapes = Shapes([range(1, depth + 1)] * len(widths), choices, (4, 8, 32), 8)

    @functools.cached_property
    def run(self) -> Any:
        """The trained super-network."""
        data = pooled(self.load(), self.by)
        how = {"parts": ("sandwich-rule",), "epochs": self.epochs, "batch": min(128, len(data.split.train) // 2), "lr": 0.1}
        chosen = settings(model=parts.spell("elastic-resnet", self.largest), seed=self.seed, augment="none", **how)
        run = prepare(resolve(chosen, data)[0], data)
        fit(run)
        return run

    def cost(self, options: dict[str, Any]) -> float:
        """Bytes; all sets here have 10 classes and one channel."""
        return stored_bytes(**options, num_classes=10, in_chans=1)

    def accuracy(self, options: dict[str, Any], split: str) -> float:
        """Of a sub-network as deployed, on "val" (the search images) or "test"."""
        key = f"{split} {parts.spell('', options)}"
        if key not in self.seen:
            answer = measured(self.run, options)
            self.seen[key] = score(answer, self.run.data, self.run.data.split[split], self.run.plan).accuracy
        return self.seen[key]

    def measure(self, options: dict[str, Any]) -> float:
        """What a search is told."""
        return self.accuracy(options, "val")

    def gen(self) -> torch.Generator:
        """Every arm draws by the same numbers."""
        return generator(self.seed, "simq-nas claim")

    def one(self, row: tuple[int, ...], shapes: Shapes | None = None) -> Seen:
        """A measured configuration."""
        shapes = shapes or self.shapes
        options = shapes.options(shapes.genes(row))
        return Seen(row, self.measure(options), self.cost(options), math.nan)


# -- the searches: each returns options of what it measured, with accuracy on the search images and bytes -------------

Measured = list[tuple[dict[str, Any], Seen]]


def with_options(shapes: Shapes, seen: list[Seen]) -> Measured:
    return [(shapes.options(shapes.genes(one.genome)), one) for one in seen]


def joint(bed: Bed, fit: Callable[[np.ndarray, np.ndarray], Predict] = predictor) -> Measured:
    """Shape and bits together, led by predictors."""
    count = bed.evaluations
    seen = linas(bed.shapes, bed.measure, bed.cost, count, max(count // 5, 4), bed.gen(), predicted=bed.predicted, fit=fit)
    return with_options(bed.shapes, seen)


def shuffled(bed: Bed) -> Measured:
    """The same with predictors that learn accuracies in a wrong order."""

    def wrong(x: np.ndarray, y: np.ndarray) -> Predict:
        order = torch.randperm(len(y), generator=generator(bed.seed, "shuffled", len(y))).numpy()
        return predictor(x, y[order])

    return joint(bed, wrong)


def without(bed: Bed) -> Measured:
    """Shape and bits together by NSGA-II on what is measured; a configuration that is met again costs nothing."""
    seen: dict[tuple[int, ...], Seen] = {}

    def judge(genomes: Genomes) -> np.ndarray:
        points = []
        for row in bed.shapes.plain(genomes):
            if row not in seen and len(seen) < bed.evaluations:
                seen[row] = bed.one(row)
            points.append((-seen[row].accuracy, seen[row].cost) if row in seen else (math.inf, math.inf))
        return np.array(points)

    population, gen = max(bed.evaluations // 5, 4), bed.gen()
    first = np.concatenate([np.zeros((1, len(bed.shapes.most)), dtype=int), bed.shapes.drawn(population - 1, gen)])
    with np.errstate(invalid="ignore"):  # what is no longer measured is infinitely bad
        nsga2(judge, bed.shapes.most, first, 5 * bed.evaluations, gen)
    return with_options(bed.shapes, list(seen.values()))


def two_stage(bed: Bed) -> Measured:
    """Half of the measurements for shapes in 32 bits, the rest for the bits of three shapes of that front, each led by predictors."""
    half, gen = bed.evaluations // 2, bed.gen()
    plain = Shapes(bed.shapes.depths, bed.shapes.widths, (32,), bed.shapes.stem)
    found = with_options(plain, linas(plain, bed.measure, bed.cost, half, max(half // 5, 4), gen, predicted=bed.predicted))
    found.append(with_options(bed.shapes, [bed.one((0,) * len(bed.shapes.most))])[0])
    best = front([one for _, one in found[:half]])
    chosen = [best[0], best[len(best) // 2], best[-1]]
    left = bed.evaluations - len(found)
    for i, one in enumerate(chosen):
        options = plain.options(plain.genes(one.genome))
        fixed = Shapes([[d] for d in options["depths"]], [[w] for w in options["widths"]], bed.shapes.bits, bed.shapes.stem)
        count = left // 3 + (i < left % 3)
        found += with_options(fixed, linas(fixed, bed.measure, bed.cost, count, max(count // 4, 2), gen, predicted=bed.predicted))
    return found


def random(bed: Bed) -> Measured:
    """The smallest network and random ones."""
    gen, rows = bed.gen(), {(0,) * len(bed.shapes.most): None}
    while len(rows) < bed.evaluations:
        rows |= dict.fromkeys(bed.shapes.plain(bed.shapes.drawn(1, gen)))
    return with_options(bed.shapes, [bed.one(row) for row in rows])


ARMS: dict[str, Callable[[Bed], Measured]] = {
    "joint + predictors": joint,
    "joint, no predictors": without,
    "joint, shuffled predictors": shuffled,
    "two-stage": two_stage,
    "random": random,
}


def cell(bed: Bed, search: Callable[[Bed], Measured]) -> dict[str, float]:
    """The front of a search on the test images."""
    bed.run  # noqa: B018  the super-network is no part of a search's seconds
    began = time.process_time()
    found = search(bed)
    seconds = time.process_time() - began
    best = {one.genome + tuple(options["bits"]): options for options, one in found if one in front([seen for _, seen in found])}
    points = [(bed.accuracy(options, "test"), bed.cost(options)) for options in best.values()]
    top, int8 = bed.cost(bed.largest), bed.cost(in_8_bits(bed))
    area = hypervolume([(-accuracy, math.log2(size)) for accuracy, size in points], (-0.1, math.log2(top)))
    smaller = max((accuracy for accuracy, size in points if size < int8), default=0.0)
    return {"hypervolume": area, "measured": len(found), "front": len(points), "best smaller than int8": smaller, "seconds": seconds}


def in_8_bits(bed: Bed) -> dict[str, Any]:
    """The largest network in 8 bits."""
    return {**bed.largest, "bits": [8] * sum(bed.largest["depths"])}


def references(bed: Bed) -> dict[str, float]:
    """The largest network in 32 and 8 bits, and the predictor on configurations that no search chose."""
    from scipy.stats import spearmanr

    plain, int8 = {**bed.largest, "bits": []}, in_8_bits(bed)
    known = [one for _, one in joint(bed)]
    drawn = bed.shapes.plain(bed.shapes.drawn(20 * bed.held, generator(bed.seed, "held out")))
    held = list(dict.fromkeys(row for row in drawn if row not in {one.genome for one in known}))[: bed.held]
    predict = predictor(bed.shapes.encoded(np.array([one.genome for one in known])), np.array([one.accuracy for one in known]))
    rank = spearmanr(predict(bed.shapes.encoded(np.array(held))), [bed.one(row).accuracy for row in held]).statistic
    found = {"largest": bed.accuracy(plain, "test"), "int8": bed.accuracy(int8, "test"), "spearman": 0.0 if math.isnan(rank) else float(rank)}
    error = math.sqrt(max(found["int8"] * (1 - found["int8"]), 1e-9) / len(bed.run.data.split.test))
    return {**found, "largest bytes": bed.cost(plain), "int8 bytes": bed.cost(int8), "standard error": error}


def measure(bench: Bench) -> None:
    for seed in range(2 if bench.scale == "smoke" else 3):
        bed = Bed(bench, seed)
        for name, search in ARMS.items():
            bench.arm(name, seed, functools.partial(cell, bed, search))
        bench.arm("references", seed, functools.partial(references, bed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    area = {name: column(numbers, name, "hypervolume") for name in ARMS}
    mean = {name: statistics.fmean(values) for name, values in area.items()}
    mine, chance = area["joint + predictors"], area["random"]
    int8, error = column(numbers, "references", "int8"), column(numbers, "references", "standard error")
    smaller = column(numbers, "joint + predictors", "best smaller than int8")
    wins = sum(a >= 1.01 * b for a, b in zip(mine, chance, strict=True))
    holds = sum(a >= b - e for a, b, e in zip(smaller, int8, error, strict=True))
    spearman = statistics.fmean(column(numbers, "references", "spearman"))
    falls = mean["joint, shuffled predictors"] <= 1.01 * mean["joint, no predictors"]
    facts: dict[str, float] = {f"hypervolume, {name}": value for name, value in mean.items()}
    facts |= {f"processor seconds, {name}": statistics.fmean(column(numbers, name, "seconds")) for name in ARMS}
    facts |= {f"references, {name}": statistics.fmean(column(numbers, "references", name)) for name in numbers["references"]["0"]}
    facts |= {"joint + predictors is 1 % above random on": wins, "a smaller network is no worse than int8 on": holds, "of seeds": len(mine)}
    facts |= {
        "shuffled predictors fall to the level of none (1: yes)": float(falls),
        "the predictors' part is shown (1: yes)": float(falls and spearman >= 0.6),
    }
    comparisons: list[Any] = [paired(f"hypervolume, joint + predictors - {other}", mine, area[other]) for other in ARMS if other != "joint + predictors"]
    comparisons += [paired("test accuracy, best of the front that is smaller than int8 - int8", smaller, int8), facts]
    supported = wins == len(mine) and mean["joint + predictors"] > mean["two-stage"] and holds == len(mine)
    return said(supported, mean["joint + predictors"] < mean["random"]), comparisons
