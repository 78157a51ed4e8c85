"""Claim of phnn: with a quarter of the parameters a hypercomplex network is as accurate as the real one, and better than a real one of its size."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

from convince.claims import Bench, Numbers, Paired, column, paired
from convince.layers.phnn import param_report

TARGET = {"model": "phresnet-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "Hypercomplex convolutions with a learned algebra lose little accuracy against real ones of the same widths with at most 40 % of their parameters, and "
    "are more accurate than a narrower real network of the same number of parameters."
)
SUPPORTED = (
    "n=3 or n=4, whichever has the higher mean validation accuracy, loses at most 1.5 points of test accuracy to n=1 in the mean, with at most 40 % of its "
    "convolutions' parameters; and beats the narrow real network by at least 0.5 points with its 95 % paired t interval above 0."
)
CONTRADICTED = "n=4 minus the narrow real network has its interval below 0."
BUDGET = (
    "cifar10, 3,000 training, 500 validation and 5,000 test images at 32 px; ResNet-8 with widths 24-48-96 as phresnet-mini for n=4, n=3 and n=1, and n=1 with "
    "widths 13-25-48 (parameters of n=4 within 1 %); 8 epochs, batch 64, SGD 0.1 cosine, no augmentation, 4 paired seeds; the released initial law. Reduced "
    "against the catalogue (10 epochs, 10,000 test images) for time. The real networks see three channels: a fourth of zeros would change only the spread "
    "of their first weights. Not compared here: n=2, and the fixed algebra of quaternions (phresnet-mini:algebra=quaternion)."
)
ARMS = {
    "n=1": "phresnet-mini:n=1",
    "narrow": "phresnet-mini:n=1,widths=(13,25,48)",
    "n=3": "phresnet-mini-n3",
    "n=4": "phresnet-mini",
}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, val, test, epochs, seeds = ("digits", 64, 32, 64, 1, 2) if small else ("cifar10", 3000, 500, 5000, 8, 4)
    for seed in range(seeds):
        data = bench.data(name, train=train, val=val, test=test, seed=seed)
        for arm, model in ARMS.items():
            bench.arm(arm, seed, partial(cell, bench, data, {"model": model, "epochs": epochs, "batch": 32 if small else 64, "lr": 0.1, "seed": seed}))


def cell(bench: Bench, data: Any, how: dict[str, Any]) -> dict[str, float]:
    """Accuracy on the validation and test part, all parameters, and those of convolutions."""
    run = bench.train(data, **how).run
    total = sum(p.numel() for p in run.model.parameters())
    convolutions = sum(p.numel() for name, p in run.model.named_parameters() if p.dim() == 4 or name.endswith(".A"))
    if "n=1" not in how["model"]:
        assert param_report(run.model), "no hypercomplex layer in the network"
    return {"accuracy": run.evaluate("test").accuracy, "val": run.evaluate("val").accuracy, "parameters": total, "convolutions": convolutions}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def mean(arm: str, metric: str) -> float:
        return statistics.fmean(column(numbers, arm, metric))

    def gain(a: str, b: str) -> Paired:
        return paired(f"accuracy, {a} - {b}", column(numbers, a, "accuracy"), column(numbers, b, "accuracy"))

    gains = {(a, b): gain(a, b) for a in ("n=3", "n=4") for b in ("n=1", "narrow")}
    chosen = max(("n=3", "n=4"), key=lambda arm: mean(arm, "val"))
    share = mean(chosen, "convolutions") / mean("n=1", "convolutions")
    facts: dict[str, Any] = {"chosen on validation": chosen, "its share of the convolutions' parameters": share}
    facts |= {f"{arm}: {metric}": mean(arm, metric) for arm in ARMS for metric in ("accuracy", "val", "parameters")}
    comparisons = [*gains.values(), gain("narrow", "n=1"), facts]
    loss, beats = gains[chosen, "n=1"], gains[chosen, "narrow"]
    if gains["n=4", "narrow"].high < 0:
        return "contradicted", comparisons
    if loss.mean >= -0.015 and share <= 0.4 and beats.mean >= 0.005 and beats.low > 0:
        return "supported", comparisons
    return "inconclusive", comparisons
