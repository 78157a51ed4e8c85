"""Claim of nasnet: a cell found on one small set is better on another than random cells of its size; on long runs, scheduled beats fixed drop-path."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import statistics
from typing import Any

import torch

from convince import parts
from convince.backbones import builder
from convince.backbones.nasnet import genotype
from convince.claims import Bench, Numbers, column, paired, pooled, said, together
from convince.search.beside import APART
from convince.search.lab import Lab
from convince.search.nasnet_search import NasnetSearch
from convince.search.space import Genes, Space

TARGET = {"model": "nasnet-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "1. A pair of cells that evolution found on small handwritten digits, stacked into another network, is more accurate on pictures of clothes than random "
    "cells of its size. 2. (scale 'paper' only) ScheduledDropPath makes NASNet-A more accurate than drop-path of one probability throughout."
)
SUPPORTED = (
    "1. found minus the median of five random cells, in test accuracy, is above 0 on every seed and at least 1 point in the mean, and found is in the mean "
    "above the one of the five that has the most parameters, so that size is not the cause; and 2., where it was run, the 95 % paired t interval of scheduled "
    "minus fixed lies above 0."
)
CONTRADICTED = "1. found minus the median of the random cells is below 0 in the mean; or 2., where it was run, the interval lies below 0."
BUDGET = (
    "1. Search: mnist pooled to 14 px, 1,000 training and 1,000 validation images (the catalogue: 1,500 and 1,000), 16 candidates (24) by "
    "regularised evolution, half of them random (12), sample 4; cells of 5 blocks of identity, sep3, sep5, avg3 and max3, added, 1 cell a stage, 8 filters, "
    "2 epochs. Transfer: fashion-mnist pooled to 14 px (28), 2,000 training and 2,000 test images (5,000), 1 cell a stage, 16 filters, 2 epochs (3); the found "
    "pair and the first five random pairs whose parameters are within 20 % of its own there (where 300 draws hold fewer, the nearest in size). Batch 50, SGD "
    "0.1 cosine, 3 seeds, a search each. Scale 'paper' has the catalogue's amounts. 2. NASNet-A of 1 cell a stage and 16 filters, fashion-mnist, 3,000 "
    "training and 5,000 test images, 20 epochs, batch 50, SGD 0.1 cosine, p 0.3, 5 paired seeds, and without drop-path as a control: a long run, so at scale "
    "'paper' only."
)
OPS = ("identity", "sep3", "sep5", "avg3", "max3")
RANDOM = 5
HOW: dict[str, Any] = {"batch": 50, "lr": 0.1}
SCHEDULES = {"scheduled": ("scheduled-drop-path:p=0.3",), "fixed": ("scheduled-drop-path:p=0.3,schedule=fixed",), "none": ()}


class Bed:
    """One seed: the search on the first set, the data and the networks of the second."""

    def __init__(self, bench: Bench, seed: int) -> None:
        smoke, paper = bench.scale == "smoke", bench.scale == "paper"
        self.bench, self.seed, self.smoke, self.by = bench, seed, smoke, 1 if smoke or paper else 2
        self.candidates, self.draws, self.epochs = (4, 20, 1) if smoke else (24, 1000, 3) if paper else (16, 300, 2)
        self.first = {"train": 100, "val": 40, "test": 40} if smoke else {"train": 1500 if paper else 1000, "val": 1000, "test": 100}
        self.second = {"train": 100, "test": 60} if smoke else {"train": 2000, "test": 5000 if paper else 2000}
        self.search = NasnetSearch(ops=OPS, joined=("+",), blocks=2 if smoke else 5, filters=2 if smoke else 8, trial_epochs=1 if smoke else 2)

    @functools.cached_property
    def data(self) -> Any:
        """The set that the cells are carried to."""
        return pooled(self.bench.data("digits" if self.smoke else "fashion-mnist", seed=self.seed, **self.second), self.by)

    @functools.cached_property
    def space(self) -> Space:
        """The same cells, in wider networks for that set."""
        return dataclasses.replace(self.search, filters=2 * self.search.filters).space(self.data)

    def searched(self) -> dict[str, float]:
        """The found cells as places of their genes' values, which :meth:`found` reads back, and how the search went."""
        drawn = self.bench.data("digits" if self.smoke else "mnist", seed=self.seed, **self.first)
        data = drawn if self.smoke else pooled(drawn)
        lab = Lab("nasnet", data, 1.0, self.seed, **HOW)
        lab.budget = self.candidates * lab.of_training(self.search.trial_epochs)
        genes = genes_of(self.search.find(lab))
        places = {f"gene {name}": values.index(genes[name]) for name, values in self.space.choices.items()}
        return {"validation accuracy": max(accuracy for _, accuracy in lab.trials), **self.search.notes(), **places}

    def found(self, places: dict[str, float]) -> str:
        """The network of the found cells."""
        genes = {name: values[int(places[f"gene {name}"])] for name, values in self.space.choices.items()}
        return parts.spell("nasnet", self.space.options(genes))

    def random(self, like: str) -> list[str]:
        """The networks of the first random cells whose parameters are within 20 % of those of ``like``, else of the nearest."""
        size, near, far = self.parameters(like), list[str](), dict[str, float]()
        for genes in itertools.islice(self.space.draws(self.seed + APART), self.draws):
            model = parts.spell("nasnet", self.space.options(genes))
            apart = abs(self.parameters(model) / size - 1)
            if apart > 0.2:
                far[model] = apart
            elif model != like and model not in near:
                near.append(model)
            if len(near) == RANDOM:
                break
        return (near + sorted(far, key=lambda model: far[model]))[:RANDOM]

    def parameters(self, model: str) -> int:
        """Of a network for the second set."""
        how = {"num_classes": self.data.k, "in_chans": self.data.preprocess.channels, "size": self.data.preprocess.size}
        with torch.device("meta"):
            return sum(p.numel() for p in builder(model, **how)().parameters())

    def trained(self, model: str) -> dict[str, float]:
        """Accuracy on the second set's test images, and the size."""
        done = self.bench.train(self.data, model=model, epochs=self.epochs, seed=self.seed, **HOW)
        return {"accuracy": done.test.accuracy, "parameters": self.parameters(model)}


def genes_of(options: dict[str, Any]) -> Genes:
    """The choices that a pair of cells was made from."""
    found: Genes = {}
    for cell in ("normal", "reduction"):
        for k, block in enumerate(genotype(options[cell]).blocks, 1):
            words = {"from": block.i, "and": block.j, "left": block.left, "right": block.right, "joined": block.joined}
            found |= {f"{cell} {k} {word}": value for word, value in words.items()}
    return found


def dropped(bench: Bench, techniques: tuple[str, ...], seed: int) -> dict[str, float]:
    """Accuracy of NASNet-A after a long training with a schedule of drop-path."""
    name, train, test, filters, epochs = ("digits", 100, 60, 2, 2) if bench.scale == "smoke" else ("fashion-mnist", 3000, 5000, 16, 20)
    data = bench.data(name, train=train, test=test, seed=seed)
    done = bench.train(data, model=f"nasnet:cells=1,filters={filters}", parts=techniques, epochs=epochs, seed=seed, **HOW)
    return {"accuracy": done.test.accuracy}


def measure(bench: Bench) -> None:
    for seed in range(2 if bench.scale == "smoke" else 3):
        bed = Bed(bench, seed)
        places = bench.arm("search", seed, bed.searched)
        like = bed.found(places)
        bench.arm("found", seed, functools.partial(bed.trained, like))
        drawn = functools.cache(functools.partial(bed.random, like))
        for i in range(RANDOM):
            bench.arm(f"random {i + 1}", seed, lambda i=i, bed=bed, drawn=drawn: bed.trained(drawn()[i]))  # type: ignore[misc]
    if bench.scale != "small":
        for seed in range(2 if bench.scale == "smoke" else 5):
            for arm, techniques in SCHEDULES.items():
                bench.arm(arm, seed, functools.partial(dropped, bench, techniques, seed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    arms = [f"random {i + 1}" for i in range(RANDOM)]
    found, size = column(numbers, "found", "accuracy"), column(numbers, "found", "parameters")
    rows = list(zip(*(column(numbers, arm, "accuracy") for arm in arms), strict=True))
    sizes = list(zip(*(column(numbers, arm, "parameters") for arm in arms), strict=True))
    middle = [statistics.median(row) for row in rows]
    largest = [row[heavy.index(max(heavy))] for row, heavy in zip(rows, sizes, strict=True)]
    gain, over_largest = paired("test accuracy, found - median of random cells", found, middle), paired("test accuracy, found - largest random", found, largest)
    verdicts = [said(all(a > b for a, b in zip(found, middle, strict=True)) and gain.mean >= 0.01 and over_largest.mean > 0, gain.mean < 0)]
    comparisons: list[Any] = [
        gain,
        over_largest,
        paired("test accuracy, found - best of random cells", found, [max(row) for row in rows]),
        paired(
            "validation accuracy while searching, second half of the candidates - first half",
            column(numbers, "search", "second half"),
            column(numbers, "search", "first half"),
        ),
        {
            "random cells that found beats": sum(a > b for a, row in zip(found, rows, strict=True) for b in row),
            "of random cells": RANDOM * len(found),
            "parameters, random / found, least": min(b / a for a, row in zip(size, sizes, strict=True) for b in row),
            "parameters, random / found, most": max(b / a for a, row in zip(size, sizes, strict=True) for b in row),
        },
    ]
    if "scheduled" in numbers:
        scheduled, fixed, none = (column(numbers, arm, "accuracy") for arm in SCHEDULES)
        drop = paired("test accuracy, scheduled - fixed drop-path", scheduled, fixed)
        verdicts.append(said(drop.low > 0, drop.high < 0))
        comparisons += [drop, paired("test accuracy, scheduled - no drop-path", scheduled, none)]
    return together(verdicts), comparisons
