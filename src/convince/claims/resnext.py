"""Claim of resnext: at equal cost, more paths beat one wider path."""

from __future__ import annotations

from functools import partial
from typing import Any

from convince.claims import Bench, Numbers, column, paired, pooled

TARGET = {"model": "resnext-mini", "data": "digits", "accuracy": 0.97}
SAYS = "A residual block of eight narrow paths is more accurate than one of a single wide path at the same cost."
SUPPORTED = (
    "8 paths of 7 channels - 1 path of 32 is at least +0.5 points of test accuracy with its 95 % paired t interval above 0; and on the control's two seeds "
    "8x7 - 1x34, a single path of the same multiply-adds as 8x7, is above 0 in the mean."
)
CONTRADICTED = "The interval of 8x7 - 1x32 lies below 0."
BUDGET = (
    "cifar10 averaged to 16 x 16 pixels, 4,000 training and 5,000 test images; ResNeXt of 11 layers (one block a stage), stages of 128, 256 and 512 channels. "
    "Paths x channels: 1x32 (506,058 parameters, 21.7 M multiply-adds), 8x7 (484,050 and 23.2 M), 1x34 (539,126 and 23.1 M, on 2 seeds). 8 epochs, batch 128, "
    "SGD 0.1 cosine with Nesterov momentum and weight decay 5e-4, mirrored and shifted images (up to 2 pixels), 4 paired seeds, bf16 where the processor "
    "has it. As in the catalogue, nothing reduced."
)
ARMS = {"1x32": (1, 32), "8x7": (8, 7), "1x34": (1, 34)}


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 1, 2) if smoke else ("cifar10", 4000, 5000, 8, 4)
    outputs = "(16,32,32)" if smoke else "(128,256,512)"

    def cell(arm: str, seed: int) -> dict[str, float]:
        cardinality, width = ARMS[arm]
        model = f"resnext:depth=11,cardinality={cardinality},width={width},outputs={outputs}"
        data = pooled(bench.data(name, train=train, test=test, seed=seed))
        done = bench.train(data, model=model, parts=("flip-crop",), epochs=epochs, batch=128 if not smoke else 32, lr=0.1, seed=seed)
        scores = done.run.evaluate("test")
        parameters = sum(p.numel() for p in done.run.model.parameters())
        return {"accuracy": scores.accuracy, "log_loss": scores.log_loss, "parameters": parameters}

    for seed in range(seeds):
        for arm in ARMS:
            if arm != "1x34" or seed < 2:
                bench.arm(arm, seed, partial(cell, arm, seed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    one, eight, wide = (column(numbers, arm, "accuracy") for arm in ARMS)
    main = paired("accuracy, 8x7 - 1x32", eight, one)
    control = paired("accuracy, 8x7 - 1x34 (equal multiply-adds)", eight[: len(wide)], wide)
    comparisons: list[Any] = [
        main,
        control,
        paired("accuracy, 1x34 - 1x32", wide, one[: len(wide)]),
        paired("log loss, 8x7 - 1x32", column(numbers, "8x7", "log_loss"), column(numbers, "1x32", "log_loss")),
        {"what": "smallest 8x7 - 1x32 that these pairs show", "value": (main.high - main.low) / 2},
    ]
    if main.high < 0:
        return "contradicted", comparisons
    if main.mean >= 0.005 and main.low > 0 and control.mean > 0:
        return "supported", comparisons
    return "inconclusive", comparisons
