"""Diffusion features: inside a U-Net that learnt to tell noise there are features from which few labels suffice, in its middle and under little noise."""

from __future__ import annotations

import functools
import statistics
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.parts import spell
from convince.pretrain.diffusion_features import sweep

SAYS = (
    "The inner features of an unconditional diffusion network are a good representation for classification: a linear probe on them is better than on "
    "raw pixels and on the same network untrained, best in a block between the first and the last and at a small noise level."
)
SUPPORTED = (
    "With 500 labels, the cell of the grid chosen on validation images: trained - untrained network is at least +3 points of test accuracy and trained "
    "- raw pixels at least +1 point in the mean, each with its 95 % paired t interval above 0; the same block at t=700 is at least 3 points lower in "
    "the mean; in at least 3 of 4 seeds the chosen t is at most 300 and the chosen block neither the first nor the last; and the denoising loss of "
    "the last epoch is below half of the first's in the mean."
)
CONTRADICTED = "With 500 labels: trained - untrained network, each at its chosen cell, is at or below 0 in the mean."
BUDGET = (
    "fashion-mnist, 1,500 images without labels, U-Net of width 16, mult (1, 2, 2), 4 epochs in batches of 32 (6,000 passes); logistic regression on "
    "500 of their labels, 300 validation images to choose a cell, 700 test images; t in 20, 90, 300, 700 and 6 of 13 blocks, 2x2 averages, noise "
    "drawn once for each image; 4 paired seeds. The control is the same grid on the same network before training, its cell chosen in the same way. Against the "
    "catalogue: 1,500 of 10,000 images, width 16 of 24, 4 of 6 epochs, 500 of 1,000 labels, 300 and 700 of 1,000 and 5,000 other images, no t=0; "
    "4 instead of 3 seeds; the supervised network on the 500 labels is told, not gated."
)
LEVELS = (20, 90, 300, 700)
BLOCKS = ("in.1", "in.3", "mid", "out.1", "out.3", "out.5")


def probe(x: Tensor, y: Tensor, *sets: tuple[Tensor, Tensor]) -> list[float]:
    """Accuracy on each of ``sets`` of a logistic regression on standardised features."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    model = LogisticRegression(C=0.1, max_iter=300).fit(((x - mean) / std).double().numpy(), y.numpy())
    return [float(np.mean(model.predict(((z - mean) / std).double().numpy()) == other.numpy())) for z, other in sets]


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, val, test, seeds = ("digits", 60, 30, 30, 2) if smoke else ("fashion-mnist", 1500, 300, 700, 4)
    labels = 40 if smoke else 500
    options = {"epochs": 2 if smoke else 4, "width": 4 if smoke else 16}

    @functools.cache
    def drawn(seed: int) -> Data:
        return bench.data(name, train=train, val=val, test=test, seed=seed)

    @functools.cache
    def rows(seed: int) -> list[Tensor]:
        split = drawn(seed).split
        return [split.train[:labels], split.val, split.test]

    def pretrained(seed: int, epochs: int) -> Run:
        spec = spell("diffusion-features", {**options, "epochs": epochs})
        run = prepare(settings(model="resnet8", parts=(spec,), epochs=0, batch=32, augment="none", precision="fp32", seed=seed), drawn(seed))
        fit(run)
        return run

    def grid(seed: int, epochs: int) -> dict[str, float]:
        data, run = drawn(seed), pretrained(seed, epochs)
        net: Any = run.model.diffusion
        x = [run.normalise(run.plan.pixels(data.x.take(r))) for r in rows(seed)]
        y = [data.y[r] for r in rows(seed)]
        with run.aside():
            table = sweep(net.unet, x, generator(seed, "diffusion claim"), LEVELS, BLOCKS, lambda a, b, c: probe(a, y[0], (b, y[1]), (c, y[2])))
        t, block = max(table, key=lambda cell: table[cell][0])
        found = {"accuracy": table[t, block][1], "t": t, "block": BLOCKS.index(block), "noisy": table[LEVELS[-1], block][1]}
        losses = [row["loss"] for row in run.record.rows if row["kind"] == "epoch" and row["stage"] == "diffusion"]
        return {**found, **({"fall": losses[-1] / losses[0]} if losses else {}), "paper's cell": table[90, "out.1"][1]}

    def pixels(seed: int) -> dict[str, float]:
        data = drawn(seed)
        x = [data.float_batch(data.x.take(r)).flatten(1) for r in rows(seed)]
        y = [data.y[r] for r in rows(seed)]
        return {"accuracy": probe(x[0], y[0], (x[2], y[2]))[0]}

    def supervised(seed: int) -> dict[str, float]:
        data = drawn(seed).subset(rows(seed)[0])
        return {"accuracy": bench.train(data, model="small-cnn", epochs=2 if smoke else 20, batch=25, lr=0.05, seed=seed).test.accuracy}

    for seed in range(seeds):
        bench.arm("diffusion", seed, lambda seed=seed: grid(seed, options["epochs"]))  # type: ignore[misc]
        bench.arm("untrained", seed, lambda seed=seed: grid(seed, 0))  # type: ignore[misc]
        bench.arm("pixels", seed, lambda seed=seed: pixels(seed))  # type: ignore[misc]
        bench.arm("supervised", seed, lambda seed=seed: supervised(seed))  # type: ignore[misc]
        drawn.cache_clear()
        rows.cache_clear()


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str, metric: str = "accuracy") -> list[float]:
        return [100 * value for value in column(numbers, arm, metric)]

    unit = "[points of accuracy]"
    untrained = paired(f"trained - untrained U-Net, 500 labels {unit}", points("diffusion"), points("untrained"))
    pixels = paired(f"trained U-Net - raw pixels, 500 labels {unit}", points("diffusion"), points("pixels"))
    noise = paired(f"chosen t - t=700, same block {unit}", points("diffusion"), points("diffusion", "noisy"))
    supervised = paired(f"trained U-Net - small CNN taught by the 500 labels {unit}", points("diffusion"), points("supervised"))
    levels, blocks = column(numbers, "diffusion", "t"), column(numbers, "diffusion", "block")
    inside = sum(t <= 300 and 0 < b < len(BLOCKS) - 1 for t, b in zip(levels, blocks, strict=True))
    fall = statistics.fmean(column(numbers, "diffusion", "fall"))
    facts = {f"seed {i}: chosen block {BLOCKS[int(b)]}, t": t for i, (t, b) in enumerate(zip(levels, blocks, strict=True))}
    facts |= {"denoising loss, last epoch over first": fall, f"t=90, out.1 {unit}": statistics.fmean(points("diffusion", "paper's cell"))}
    comparisons = [untrained, pixels, noise, supervised, facts]
    if untrained.mean <= 0:
        return "contradicted", comparisons
    holds = untrained.mean >= 3 and untrained.low > 0 and pixels.mean >= 1 and pixels.low > 0
    return "supported" if holds and noise.mean >= 3 and inside >= 0.75 * len(levels) and fall < 0.5 else "inconclusive", comparisons
