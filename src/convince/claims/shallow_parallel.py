"""Claim of shallow-parallel: residual layers side by side reach the loss of the same layers one behind the other."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
import torch

from convince.backbones.residual_stack import truncation_error
from convince.backbones.shallow_parallel_study import LAYOUTS, agreement, train_stack
from convince.claims import Bench, Numbers, pooled, said
from convince.fit.randomness import generator

TARGET = {"model": "residual-stack-mini", "data": "digits", "accuracy": 0.95}  # plain layers at full resolution, without batch norm
SAYS = (
    "1. Stacks of residual convolutions reach about the same validation loss whether their layers stand behind each other or side by side. "
    "2. What the parallel layout leaves out of a linear stack is of second order in the layers' norm."
)
SUPPORTED = (
    "d = log(validation loss, parallel / sequential), by configuration (mean over seeds): 1. the median |d| is at most 0.10, and the 95 % bootstrap interval "
    "of the mean d over configurations lies inside -0.15 to 0.15; 2. the slope of log relative error against log norm lies within 1.8 to 2.2. Both."
)
CONTRADICTED = (
    "1. The interval of the mean d lies wholly above 0.15. In either case the verdict is inconclusive if a stack of one layer, which has no depth, is not "
    "worse than the deeper stacks of both layouts by a mean log loss ratio above 0.05: then the set does not need depth, and says nothing."
)
BUDGET = (
    "mnist at 14x14 by 2x2 means, 3,000 training and 3,000 other images for validation; layers 2, 4, 8, 16 x filters 8, 16 x kernel 3, 5 without batch norm, "
    "a head that reads every position, both layouts from the same weights and batches, AdamW 0.001 cosine, batch 64, 6 epochs, float32, no augmentation, "
    "2 paired seeds; the control is one layer with the same filters and kernels. Bootstrap: 10,000 draws of the 16 configurations. 2. 10 random linear "
    "stacks of 4 layers of 32x32, norms 0.01 to 0.2, float64. As in the catalogue, but for AdamW (decay 0.01) in the place of Adam."
)
GRID = tuple(itertools.product((2, 4, 8, 16), (8, 16), (3, 5)))


def slope(seed: int, norms: tuple[float, ...] = (0.01, 0.02, 0.05, 0.1, 0.2), n: int = 4, d: int = 32) -> dict[str, float]:
    """The slope of log relative error of the first-order expansion against log norm, of a random linear stack."""
    gen = generator(seed, "shallow-parallel", "stack")
    x = torch.randn(64, d, generator=gen, dtype=torch.float64)
    drawn = [torch.randn(d, d, generator=gen, dtype=torch.float64) for _ in range(n)]
    unit = [m / torch.linalg.matrix_norm(m, 2) for m in drawn]
    errors = [truncation_error([a * m for m in unit], x) for a in norms]
    return {"slope": float(np.polyfit(np.log(norms), np.log(errors), 1)[0])}


def name_of(mode: str, n: int, filters: int, kernel: int) -> str:
    return f"{mode}, {n} layers, {filters} filters, kernel {kernel}"


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, rows, epochs, seeds, stacks = ("digits", 64, 1, 2, 2) if small else ("mnist", 3000, 6, 2, 10)
    grid = GRID[:2] if small else GRID
    for seed in range(stacks):
        bench.arm("linear stack", seed, lambda seed=seed: slope(seed))  # type: ignore[misc]
    for seed in range(seeds):
        drawn = bench.data(name, train=rows, test=rows, seed=seed)
        data = drawn if small else pooled(drawn)
        how = {"epochs": epochs, "batch": 64 if not small else 32, "precision": "fp32", "parts": ("adamw:lr=0.001",), "seed": seed}
        for n, filters, kernel in [*((1, f, k) for f, k in sorted({(f, k) for _, f, k in grid})), *grid]:
            for mode in LAYOUTS if n > 1 else LAYOUTS[:1]:  # with one layer both layouts are the same
                cell = lambda mode=mode, n=n, f=filters, k=kernel, data=data, how=how: train_stack(data, mode, n, f, k, **how)  # noqa: E731
                bench.arm(name_of(mode, n, filters, kernel), seed, cell)


def losses(numbers: Numbers, mode: str, layers: tuple[int, ...] | None = None, metric: str = "loss") -> dict[tuple[int, int, int], float]:
    """Mean loss over seeds of each configuration of a layout: (layers, filters, kernel) -> loss."""
    found = {}
    for n, filters, kernel in [*itertools.product((1,), (8, 16), (3, 5)), *GRID]:
        arm = numbers.get(name_of(mode, n, filters, kernel))
        if arm is not None and (layers is None or n in layers):
            found[n, filters, kernel] = statistics.fmean(cell[metric] for cell in arm.values())
    return found


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    depths = (2, 4, 8, 16)
    deep, shallow = losses(numbers, "sequential", depths), losses(numbers, "parallel", depths)
    d = {key: math.log(shallow[key] / deep[key]) for key in deep}
    values = np.array(list(d.values()))
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = (float(q) for q in np.quantile(draws, (0.025, 0.975)))
    median = statistics.median(abs(v) for v in d.values())
    one = losses(numbers, "sequential", (1,))
    worse = {
        mode: statistics.fmean(math.log(one[1, f, k] / loss) for (_, f, k), loss in by.items()) for mode, by in (("sequential", deep), ("parallel", shallow))
    }
    steep = statistics.fmean(cell["slope"] for cell in numbers["linear stack"].values())
    comparisons: list[Any] = [
        {"what": "mean of d = log(validation loss, parallel / sequential)", "mean": statistics.fmean(d.values()), "low": low, "high": high, "n": len(d)},
        {"median |d|": median, **{f"mean d, {n} layers": statistics.fmean(v for (m, _, _), v in d.items() if m == n) for n in sorted({m for m, _, _ in d})}},
        {f"validation: {name}": value for name, value in agreement(list(deep.values()), list(shallow.values())).items()},
        {f"training: {name}": value for name, value in agreement(*(list(losses(numbers, mode, depths, "train loss").values()) for mode in LAYOUTS)).items()},
        {f"log loss ratio, one layer / {mode}": value for mode, value in worse.items()},
        {"slope of log error against log norm": steep},
    ]
    if min(worse.values()) <= 0.05:  # depth is of no use here, so that its loss shows nothing
        return "inconclusive", comparisons
    return said(median <= 0.10 and low > -0.15 and high < 0.15 and 1.8 <= steep <= 2.2, low > 0.15), comparisons
