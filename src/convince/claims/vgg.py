"""Claim of vgg: two 3x3 convolutions beat one 5x5, and more layers beat fewer."""

from __future__ import annotations

from functools import partial
from typing import Any

from convince.claims import Bench, Numbers, column, paired
from convince.errors import Diverged
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve

TARGET = {"model": "vgg-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "1. A plain network of pairs of 3x3 convolutions is more accurate than the same network with one 5x5 for each pair. "
    "2. Sixteen weight layers (D) are more accurate than eleven (A)."
)
SUPPORTED = (
    "1. B - 5x5 is at least +0.5 points of test accuracy with its 95 % paired t interval above 0, and B - 5x5 at B's number of parameters is above 0 in the "
    "mean; and 2. D - A is at least +0.5 points with its interval above 0."
)
CONTRADICTED = "1. the interval of B - 5x5 lies below 0; or 2. the interval of D - A lies below 0."
BUDGET = (
    "cifar10, 4,000 training and 5,000 test images at 32 px; configurations at an eighth of the width (8 to 64 channels), batch normalisation, pooled head "
    "without dropout; 6 epochs, batch 128, SGD 0.05 cosine with Nesterov momentum and weight decay 5e-4, no augmentation, 5 paired seeds, bf16 where the "
    "processor has it. B has 148,850 parameters, the 5x5 network 171,402; the control, 5x5 at width 0.1165, has 150,526. The catalogue's width "
    "0.106 and its 28 % hold for pairs whose width stays; here it doubles inside most. B and D without batch normalisation once each, in no rule: how accurate "
    "they become, and whether their loss stays finite."
)
SPECS = {
    "5x5": "cfg=5x5,width=0.125,bn=true",
    "B": "cfg=B,width=0.125,bn=true",
    "A": "cfg=A,width=0.125,bn=true",
    "D": "cfg=D,width=0.125,bn=true",
    "5x5, B's size": "cfg=5x5,width=0.1165,bn=true",
    "B, no norm": "cfg=B,width=0.125",
    "D, no norm": "cfg=D,width=0.125",
}
SEEDS = {"B, no norm": 1, "D, no norm": 1}


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 1, 2) if smoke else ("cifar10", 4000, 5000, 6, 5)

    def cell(arm: str, seed: int) -> dict[str, float]:
        data = bench.data(name, train=train, test=test, seed=seed)
        model = f"vgg:{SPECS[arm]},head=gap,dropout=0.0"
        how = settings(model=model, epochs=epochs, batch=32 if smoke else 128, lr=0.05, seed=seed, augment="none")
        run = prepare(resolve(how, data)[0], data)
        finite = 1.0
        try:
            fit(run)
        except Diverged:  # without batch normalisation the loss may grow without bound, and that is what is asked
            if "no norm" not in arm:
                raise
            finite = 0.0
        return {"accuracy": run.evaluate("test").accuracy, "finite": finite, "parameters": sum(p.numel() for p in run.model.parameters())}

    for seed in range(seeds):
        for arm in SPECS:
            if seed < SEEDS.get(arm, seeds):
                bench.arm(arm, seed, partial(cell, arm, seed))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    accuracy = {arm: column(numbers, arm, "accuracy") for arm in SPECS}

    def gain(a: str, b: str) -> Any:
        n = min(len(accuracy[a]), len(accuracy[b]))
        return paired(f"accuracy, {a} - {b}", accuracy[a][:n], accuracy[b][:n])

    small, deep, control = gain("B", "5x5"), gain("D", "A"), gain("B", "5x5, B's size")
    facts: dict[str, float] = {}
    for arm in ("B, no norm", "D, no norm"):
        facts |= {f"{arm}: accuracy": accuracy[arm][0], f"{arm}: loss stays finite": column(numbers, arm, "finite")[0]}
    comparisons: list[Any] = [small, deep, control, gain("D", "B"), facts]
    if small.high < 0 or deep.high < 0:
        return "contradicted", comparisons
    if all(c.mean >= 0.005 and c.low > 0 for c in (small, deep)) and control.mean > 0:
        return "supported", comparisons
    return "inconclusive", comparisons
