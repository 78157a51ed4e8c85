"""Claim of simplenet: thirteen plain convolutions are a match for a residual network of their size, and pooling should come late."""

from __future__ import annotations

import statistics
import time
from functools import partial
from typing import Any

from convince.claims import Bench, Numbers, column, paired, said, together

TARGET = {"model": "simplenet-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "1. A plain network of 13 convolutions is no less accurate than a residual network of as many parameters. "
    "2. Pooling late matters: the same layers with the first two pools after convolutions 1 and 2 are less accurate."
)
SUPPORTED = (
    "1. SimpleNet - ResNet, test accuracy, has its 95 % paired t interval above -0.5 points; and 2. early - late pooling has its interval below 0. "
    "Each claim is reported by itself."
)
CONTRADICTED = "1. the interval of SimpleNet - ResNet lies below -0.5 points; or 2. that of early - late pooling lies above 0."
BUDGET = (
    "cifar10 at 32 px, 3,000 training and 5,000 test images, flip and crop; simplenet-cifar-310k (312,362 parameters, 56 M multiply-adds), the same with "
    "early pools (17 M), and resnet20 with widths 17, 34, 68 (307,421 parameters, 46 M); 6 epochs, batch 128, SGD 0.05 with Nesterov momentum, warm-up and "
    "cosine in place of one-cycle, 4 paired seeds, no dropout in any arm. As in the catalogue, but that early pools have 4 seeds, not 2, as they are cheap. "
    "Seconds are reported, since equal parameters do not cost the same."
)
ARMS = {
    "simplenet": "simplenet-cifar-310k",
    "early pools": "simplenet:layers=64-P-32-P-32-32-32-32-64-64-64-P-128-256k1-64k1-P-64",
    "resnet": "resnet20:widths=(17,34,68)",
}


def cell(bench: Bench, data: Any, how: dict[str, Any]) -> dict[str, float]:
    """One training."""
    began = time.monotonic()
    run = bench.train(data, parts=("flip-crop",), **how).run
    return {
        "accuracy": run.evaluate("test").accuracy,
        "seconds": time.monotonic() - began,
        "parameters": sum(p.numel() for p in run.model.parameters()),
    }


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds, batch = ("digits", 64, 64, 1, 2, 32) if small else ("cifar10", 3000, 5000, 6, 4, 128)
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        for arm, model in ARMS.items():
            how = {"model": model, "epochs": epochs, "batch": batch, "lr": 0.05, "seed": seed}
            bench.arm(arm, seed, partial(cell, bench, data, how))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(a: str, b: str) -> Any:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    match, early = gain("simplenet", "resnet"), gain("early pools", "simplenet")

    claims = {"claim 1": said(match.low > -0.005, match.high < -0.005), "claim 2": said(early.high < 0, early.low > 0)}
    facts = {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for arm in ARMS for metric in ("accuracy", "seconds", "parameters")}
    comparisons = [match, early, claims, facts]
    return together(claims.values()), comparisons
