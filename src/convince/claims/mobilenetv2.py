"""Claim of mobilenetv2: no non-linearity on the thin ends of a block, and the shortcut between them, each raise accuracy."""

from __future__ import annotations

from functools import partial
from typing import Any

from convince.claims import Bench, Numbers, column, paired

TARGET = {"model": "mobilenetv2-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "1. Inverted residual blocks are more accurate with a linear thin end than with ReLU6 there. 2. The shortcut between the thin ends raises accuracy, and is "
    "no worse than one between the wide maps."
)
SUPPORTED = (
    "1. linear - ReLU6 is at least +0.5 points of test accuracy with its 95 % paired t interval above 0, and in the mean over the control's three seeds it is "
    "larger at expansion 6 than at expansion 1, where nothing is thin; and 2. thin shortcut - none is at least +0.5 points with its interval above 0, and the "
    "interval of thin - wide shortcut does not lie below 0."
)
CONTRADICTED = "The interval of linear - ReLU6, of thin shortcut - none, or of thin - wide shortcut lies below 0."
BUDGET = (
    "cifar10, 3,000 training and 5,000 test images at 32 px; stem of 8 channels, five blocks of 8, 12, 12, 16, 16 channels at expansion 6, last 1x1 of 64 "
    "(15,074 parameters, 3.4 M multiply-adds), the same initial weights in all arms of one expansion; 5 epochs, batch 64, SGD 0.1 cosine with Nesterov "
    "momentum and weight decay 5e-4, no augmentation, no dropout, bf16 where the processor has it. Linear and ReLU6: 6 paired seeds; no shortcut, wide "
    "shortcuts (two of them, the thin ones are three) and the control at expansion 1 (linear, ReLU6): 3 seeds each. "
    "Reduced against the catalogue (4,000 images, 6 epochs, batch 128) to about 320 s; batch 64 makes it 230 steps for 186."
)
NET = "stem=small,blocks=((6,8,1,1),(6,12,2,2),(6,16,2,2)),first=8,last=64,dropout=0.0"
ARMS = {
    "linear": "",
    "relu6": ",linear=false",
    "no shortcut": ",shortcut=off",
    "wide shortcut": ",shortcut=wide",
    "t=1, linear": ",t=1",
    "t=1, relu6": ",t=1,linear=false",
}
ALL_SEEDS = ("linear", "relu6")


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, seeds, fewer = ("digits", 64, 64, 1, 2, 2) if smoke else ("cifar10", 3000, 5000, 5, 6, 3)

    def cell(arm: str, seed: int) -> dict[str, float]:
        data = bench.data(name, train=train, test=test, seed=seed)
        done = bench.train(data, model=f"mobilenetv2:{NET}{ARMS[arm]}", epochs=epochs, batch=32 if smoke else 64, lr=0.1, seed=seed)
        scores = done.run.evaluate("test")
        return {"accuracy": scores.accuracy, "log_loss": scores.log_loss, "parameters": sum(p.numel() for p in done.run.model.parameters())}

    for seed in range(seeds):
        for arm in ARMS:
            if arm in ALL_SEEDS or seed < fewer:
                bench.arm(arm, seed, partial(cell, arm, seed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    accuracy = {arm: column(numbers, arm, "accuracy") for arm in ARMS}
    fewer = len(accuracy["wide shortcut"])

    def gain(a: str, b: str, n: int | None = None) -> Any:
        words = "" if n is None else f", the first {n} seeds"
        return paired(f"accuracy, {a} - {b}{words}", accuracy[a][:n], accuracy[b][:n])

    linear, skip, wide = gain("linear", "relu6"), gain("linear", "no shortcut", fewer), gain("linear", "wide shortcut", fewer)
    thin, flat = gain("linear", "relu6", fewer), gain("t=1, linear", "t=1, relu6")
    more = [a - b for a, b in zip(accuracy["linear"], accuracy["relu6"], strict=True)][:fewer]
    less = [a - b for a, b in zip(accuracy["t=1, linear"], accuracy["t=1, relu6"], strict=True)]
    interaction = paired("gain of linear over relu6, t=6 - t=1", more, less)
    comparisons = [linear, skip, wide, thin, flat, interaction]
    if min(linear.high, skip.high, wide.high) < 0:
        return "contradicted", comparisons
    if all(c.mean >= 0.005 and c.low > 0 for c in (linear, skip)) and interaction.mean > 0:
        return "supported", comparisons
    return "inconclusive", comparisons
