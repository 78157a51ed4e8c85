"""BP-free training: Mono-Forward keeps up with backpropagation of the same layers, Forward-Forward does not and is slow."""

from __future__ import annotations

import functools
import statistics
from typing import Any

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data
from convince.training.bp_free_training import EnergyMeter, Trial, measured, search

SAYS = "Mono-Forward reaches the accuracy of backpropagation of the same layers or more; Forward-Forward is behind both and costs more time an epoch."
SUPPORTED = (
    "Mono-Forward - backpropagation is at least -0.3 points of test accuracy with the lower end of the 95 % paired t interval above -0.6; Mono-Forward - "
    "Forward-Forward at least +1 point with the interval above 0; Forward-Forward takes at least 1.5 times Mono-Forward's seconds an epoch; and "
    "Mono-Forward is at least 2 points above the last layer alone on random features."
)
CONTRADICTED = "The upper end of Mono-Forward - backpropagation lies below -0.3 points, or Forward-Forward's mean accuracy is at least Mono-Forward's."
BUDGET = (
    "mnist, 5,000 training, 500 validation and 1,000 test images; MLP 784-200-200-10: backpropagation, Mono-Forward, Forward-Forward, last layer only "
    "(random features), backpropagation with Mono-Forward's losses beside its own; CNN of 2 blocks (8 and 16 channels): backpropagation and random "
    "Cascaded-Forward. Search: 3 trials of (learning rate, batch) an arm, the same draws for all, at 2,000 images and 3 epochs of seed 0's draw; then 4 "
    "paired seeds (1 to 4: draws of seed 0 were seen while the parts were written), at most 12 epochs, patience 3 on the validation accuracy, best "
    "weights restored. The CNN: seeds 1 and 2, at most 4 epochs, reported. "
    "Forward-Forward trains with Adam, the others with SGD and momentum. Energy, memory and epochs are reported, not judged. Against the catalogue: 5,000 "
    "of 8,000 training, 500 of 2,000 validation and 1,000 of 10,000 test images, widths 200 of 500 and 8-16 of 16-32, 3 of 5 trials, 4 of 5 seeds."
)
ARMS = ("dense bp", "dense mf", "dense ff", "dense last layer", "dense bp + local losses", "conv bp", "conv cafo")


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, val, test, epochs, seeds, trials = ("digits", 64, 32, 32, 1, 2, 1) if smoke else ("mnist", 5000, 500, 1000, 12, 4, 3)
    network: dict[str, Any] = {"hidden": (16, 16), "widths": (4, 4)} if smoke else {"hidden": (200, 200), "widths": (8, 16)}
    meter = EnergyMeter()

    @functools.cache
    def drawn(seed: int) -> Data:
        return bench.data(name, train=train, val=val, test=test, seed=seed)

    def searched(arm: str) -> dict[str, float]:
        trial = search(drawn(0), arm, trials, 0, 2000, 1 if smoke else 3, **network)
        return {"lr": trial.lr, "batch": float(trial.batch)}

    def cell(arm: str, seed: int) -> dict[str, float]:
        found = bench.numbers[f"{arm} search"]["0"]
        return measured(
            drawn(seed), arm, Trial(found["lr"], int(found["batch"])), seed, min(epochs, 4) if arm.startswith("conv") else epochs, 3, meter, **network
        )

    for arm in ARMS:
        bench.arm(f"{arm} search", 0, lambda arm=arm: searched(arm))  # type: ignore[misc]
    for seed in range(1, seeds + 1):
        for arm in (arm for arm in ARMS if seed <= 2 or arm.startswith("dense")):
            bench.arm(arm, seed, lambda arm=arm, seed=seed: cell(arm, seed))  # type: ignore[misc]


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def difference(a: str, b: str) -> Any:
        points = [[100 * value for value in column(numbers, arm, "accuracy")] for arm in (a, b)]
        return paired(f"{a} - {b} [points of accuracy]", *points)

    near, ahead, random = (difference("dense mf", arm) for arm in ("dense bp", "dense ff", "dense last layer"))
    told = [difference("dense mf", "dense bp + local losses"), difference("dense bp + local losses", "dense bp"), difference("conv cafo", "conv bp")]
    means = {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in ARMS for metric in next(iter(numbers[arm].values()))}
    slower = means["dense ff: seconds_per_epoch"] / means["dense mf: seconds_per_epoch"]
    comparisons = [near, ahead, random, *told, {"dense ff / dense mf [seconds an epoch]": slower, **means}]
    if near.high < -0.3 or ahead.mean <= 0:
        return "contradicted", comparisons
    holds = near.mean >= -0.3 and near.low > -0.6 and ahead.mean >= 1 and ahead.low > 0 and slower >= 1.5 and random.mean >= 2
    return "supported" if holds else "inconclusive", comparisons
