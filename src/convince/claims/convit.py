"""Claim of convit: a start as convolutions, soft enough to leave, helps a transformer where data are few."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

from convince.backbones.convit import gates, nonlocality
from convince.claims import Bench, Numbers, Paired, column, paired
from convince.fit.run import Run

TARGET = {"model": "convit-mini", "data": "digits", "accuracy": 0.93}  # no convolutions, and 4 patches of 8x8 pixels
SAYS = (
    "1. Of two transformers of equal size, the one whose attention starts as convolutions is more accurate, and its share of errors avoided is larger where "
    "images are few. 2. The start is the cause: with positions and values drawn at random the gain goes."
)
SUPPORTED = (
    "1. ConViT - ViT at 1,000 images, test accuracy, has its 95 % paired t interval above 0, and the relative cut in error at 1,000 exceeds that at 8,000 in "
    "the mean; and 2. the random start loses at least half of the gain at 1,000 in the mean."
)
CONTRADICTED = "1. the interval at 1,000 lies below 0; or, where it lies above 0, 2. the random start loses less than a quarter of the gain in the mean."
BUDGET = (
    "fashion-mnist at 28 px (7x7 patches of 4), 1,000 and 8,000 training and 3,000 test images; ConViT of width 64, 4 heads, 4 blocks of which 3 are local, "
    "against local_layers=0, a ViT with the same blocks (parameters within 0.1 %); AdamW 0.001, weight decay 0.05, cosine, batch 64, 250 steps at both sizes "
    "of set, bf16, 4 paired seeds; claim 2: ConViT with init=random at 1,000. Gates and mean distance of attention by block are those of seed 0 after "
    "training, on 256 test images. Against the catalogue, for time: 4 heads of 16 as in ConViT-Ti for 9 of 12, width 64 for 108, 4 blocks for 6, 3,000 test "
    "images for 5,000; bf16 for fp32, which here is the quicker of the two at this size."
)
SHAPE = "dim=64,heads=4,depth=4"
ARMS = {
    "convit, 1000": f"convit-mini:{SHAPE},local_layers=3",
    "vit, 1000": f"convit-mini:{SHAPE},local_layers=0",
    "random start, 1000": f"convit-mini:{SHAPE},local_layers=3,init=random",
    "convit, 8000": f"convit-mini:{SHAPE},local_layers=3",
    "vit, 8000": f"convit-mini:{SHAPE},local_layers=0",
}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, few, many, test, steps, seeds = ("digits", 64, 128, 64, 2, 2) if small else ("fashion-mnist", 1000, 8000, 3000, 250, 4)
    for seed in range(seeds):
        sets = {"1000": bench.data(name, train=few, test=test, seed=seed), "8000": bench.data(name, train=many, test=test, seed=seed)}
        for arm, model in ARMS.items():
            bench.arm(arm, seed, partial(cell, bench, sets[arm.split(", ")[1]], model, steps, seed))


def cell(bench: Bench, data: Any, model: str, steps: int, seed: int) -> dict[str, float]:
    """One training; its scores, the network's parameters, and what its heads do."""
    how: dict[str, Any] = {"parts": ("adamw:lr=0.001,weight_decay=0.05",), "steps": steps, "batch": 64, "precision": "bf16", "seed": seed}
    run = bench.train(data, model=model, **how).run
    test = run.evaluate("test")
    return {"accuracy": test.accuracy, "log_loss": test.log_loss, "parameters": sum(p.numel() for p in run.model.parameters()), **heads(run)}


def heads(run: Run) -> dict[str, float]:
    """The mean gate of each local block, and how many patches far each block looks."""
    x = run.normalise(run.plan.pixels(run.data.x.take(run.data.split.test[:256])))
    with run.aside(), run.plan.autocast():
        found = {f"distance{i}": float(row.mean()) for i, row in enumerate(nonlocality(run.model, x))}  # type: ignore[arg-type]
    if "local_layers=0" not in str(run.settings.model):
        found |= {f"gate{i}": float(row.mean()) for i, row in enumerate(gates(run.model))}  # type: ignore[arg-type]
    return found


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    accuracy = {arm: column(numbers, arm, "accuracy") for arm in numbers}
    few: Paired = paired("accuracy at 1,000, convit - vit", accuracy["convit, 1000"], accuracy["vit, 1000"])
    many: Paired = paired("accuracy at 8,000, convit - vit", accuracy["convit, 8000"], accuracy["vit, 8000"])
    lost: Paired = paired("accuracy at 1,000, convit - random start", accuracy["convit, 1000"], accuracy["random start, 1000"])

    def cut(size: str) -> float:
        pairs = zip(accuracy[f"convit, {size}"], accuracy[f"vit, {size}"], strict=True)
        return statistics.fmean((a - b) / max(1 - b, 1e-6) for a, b in pairs)

    share = lost.mean / few.mean if few.mean > 0 else math.nan
    facts: dict[str, Any] = {"relative cut in error at 1,000": cut("1000"), "at 8,000": cut("8000")}
    if few.mean > 0:
        facts["share of the gain that the random start loses"] = share
    for arm, rows in numbers.items():
        seed = min(rows, key=int)
        facts |= {f"{arm}, seed {seed}: {metric}": value for metric, value in rows[seed].items() if metric.startswith(("gate", "distance", "parameters"))}
    comparisons = [few, many, lost, facts]
    if few.high < 0 or (few.low > 0 and share < 0.25):
        return "contradicted", comparisons
    if few.low > 0 and cut("1000") > cut("8000") and share >= 0.5:
        return "supported", comparisons
    return "inconclusive", comparisons
