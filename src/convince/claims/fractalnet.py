"""Claim of fractalnet: drop-path makes single columns work alone, and depth needs no residuals."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from convince.backbones.fractalnet import FractalNet, extract_column
from convince.claims import Bench, Numbers, column, paired
from convince.fit.answer import Answer, score
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.train import prepare, resolve

SAYS = (
    "1. Trained with drop-path, the deepest column of a FractalNet works alone: it loses little accuracy against the whole network, and far less than "
    "without drop-path. 2. Without residuals the fractal network is more accurate than its deepest column trained alone, a plain chain of the same depth."
)
SUPPORTED = (
    "1. With drop-path the gap (whole network minus deepest column) is at most 3 points in the mean, and the gap with minus the gap without drop-path has its "
    "95 % paired t interval below -5 points; and 2. fractal (without drop-path) minus the plain chain has its interval above 0."
)
CONTRADICTED = "1. the interval of the gaps' difference lies above 0; or 2. the interval of fractal minus plain chain lies below 0."
BUDGET = (
    "fashion-mnist at 28 px, 3,000 training and 5,000 test images, 3 blocks (8, 16, 32), 3 columns (12 layers), SGD 0.02 cosine, batch 100, 8 epochs, "
    "5 paired seeds, 3 arms: drop-path 0.15, none, the deepest column alone from the start; and the two fractal arms before training as a control. "
    "As in the catalogue, nothing reduced."
)


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 100, 60, 1, 2) if small else ("fashion-mnist", 3000, 5000, 8, 5)
    widths = (4, 8) if small else (8, 16, 32)
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        how = {"batch": 100, "lr": 0.02, "seed": seed, "augment": "none"}
        for arm, p in (("drop-path", 0.15), ("no-drop-path", 0.0)):
            model = f"fractalnet:widths={widths},columns=3,drop_path={p}".replace(" ", "")
            bench.arm(arm, seed, partial(fractal, data, {**how, "model": model, "epochs": epochs}))
            bench.arm(f"{arm}, before", seed, partial(fractal, data, {**how, "model": model, "epochs": 0}))
        bench.arm("plain", seed, partial(plain, data, {**how, "model": model, "epochs": epochs}))


def fractal(data: Any, how: dict[str, Any]) -> dict[str, float]:
    """Accuracy of the whole network and of each of its columns alone."""
    run = ready(data, how)
    fit(run)
    assert isinstance(run.model, FractalNet)
    found = {"accuracy": run.evaluate("test").accuracy}
    for c in range(1, run.model.columns + 1):
        alone = Answer(run.normalise, extract_column(run.model, c))
        found[f"column{c}"] = score(alone, data, data.split.test, run.plan).accuracy
    return {**found, "gap": found["accuracy"] - found["column1"]}


def plain(data: Any, how: dict[str, Any]) -> dict[str, float]:
    """Accuracy of the deepest column trained alone from the start."""
    run = ready(data, how)
    run.build = partial(deepest, run.build)
    fit(run)
    return {"accuracy": run.evaluate("test").accuracy}


def ready(data: Any, how: dict[str, Any]) -> Run:
    """A run that has not started."""
    return prepare(resolve(settings(**how), data)[0], data)


def deepest(build: Callable[[], nn.Module]) -> nn.Module:
    """The plain chain of a fresh fractal network's deepest column."""
    model = build()
    assert isinstance(model, FractalNet)
    return extract_column(model, 1)


def judge(numbers: Numbers) -> tuple[str, list]:
    gap, without = column(numbers, "drop-path", "gap"), column(numbers, "no-drop-path", "gap")
    fractal_accuracy, chain = column(numbers, "no-drop-path", "accuracy"), column(numbers, "plain", "accuracy")
    columns = paired("gap (whole network - deepest column), drop-path - none", gap, without)
    own = paired("gap with drop-path", gap, [0.0] * len(gap))
    residuals = paired("accuracy, fractal - plain chain", fractal_accuracy, chain)
    comparisons: list = [
        columns,
        own,
        paired("gap without drop-path", without, [0.0] * len(without)),
        residuals,
        paired("accuracy, fractal with drop-path - plain chain", column(numbers, "drop-path", "accuracy"), chain),
        paired("accuracy, deepest column with drop-path - plain chain", column(numbers, "drop-path", "column1"), chain),
        paired("accuracy, whole network, drop-path - none", column(numbers, "drop-path", "accuracy"), fractal_accuracy),
        paired(
            "gap before training, drop-path - none (control: 0)", column(numbers, "drop-path, before", "gap"), column(numbers, "no-drop-path, before", "gap")
        ),
    ]
    if columns.low > 0 or residuals.high < 0:
        return "contradicted", comparisons
    if own.mean <= 0.03 and columns.high < -0.05 and residuals.low > 0:
        return "supported", comparisons
    return "inconclusive", comparisons
