"""Claim of GB-CNN: boosting grown copies of a network is more accurate than training the same final network at once."""

from __future__ import annotations

import itertools
import statistics
from typing import Any

import torch
from torch import nn

from convince.claims import Bench, Numbers, Paired, column, paired
from convince.data import Data, load
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.parts import Card

SAYS = "GB-CNN and GB-DNN reach a higher accuracy than the same CNN or deep network trained normally, on images and tables (gains of about a point)."
SUPPORTED = (
    "test accuracy of boosting minus that of the final network trained with cross-entropy for the same epochs is positive in the mean on at least 3 of "
    "the 4 sets, the pooled 95% paired t interval lies above 0, and the training cross-entropy of the sum falls at every round of every run"
)
CONTRADICTED = "the pooled interval lies below 0"
BUDGET = (
    "fashion-mnist 1,500 train / 1,500 test and digits 1,437 / 360 with the trunk 8-16-32: 4 rounds of 3 epochs, 4 paired seeds; breast cancer and wine, "
    "70/30, mlp of 20 units: 4 rounds of 10 epochs, 8 paired seeds; units 20, Adam 1e-3 constant, batch 32. eta 0.1 or 0.5 by validation on seed 100 for "
    "the images, 0.1 for the tables. Baseline: trunk and all 4 dense layers with cross-entropy for 12 (40) epochs. Control on images: the mean of 4 "
    "independent one-layer nets of 3 epochs each. Reduced against the catalogue: fashion-mnist 4,000/10,000, 5 rounds of 4 epochs"
)
IMAGES, TABLES = ("fashion-mnist", "digits"), ("breast-cancer", "wine")
TRUNK, MLP = "gb-trunk:widths=(8,16,32)", "mlp:hidden=(20,)"
ROUNDS, UNITS, ETAS = 4, 20, (0.1, 0.5)


class Grown(Technique):
    """The baseline: the network that boosting ends with, all layers trained together; Adam as in boosting."""

    def __init__(self, part: str, layers: int) -> None:
        self.part, self.layers = part, layers

    def on_start(self, run: Run) -> None:
        for _ in range(self.layers):
            run.edit(self.part, units=UNITS)

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for _, p in params], lr=1e-3)


def plain(data: Data, model: str, part: str, layers: int, epochs: int, seed: int) -> Run:
    """A run of the grown network with cross-entropy."""
    run = prepare(settings(model=model, epochs=epochs, batch=32, seed=seed, augment="none", schedule="constant"), data)
    run.team = Team([Seat(Card(part="grown", kind="technique", title="all layers at once"), {}, Grown(part, layers))])
    fit(run)
    return run


def boosted(bench: Bench, data: Data, model: str, part: str, epochs: int, eta: float, seed: int) -> Any:
    spec = f"{part}:rounds={ROUNDS},units={UNITS},eta={eta},inner_epochs={epochs}"
    return bench.train(data, model=model, parts=(spec,), epochs=ROUNDS * epochs, batch=32, seed=seed)


def falls(run: Run) -> float:
    """1 where the training cross-entropy of the sum falls at every round, else 0."""
    losses = [row["value"] for row in run.record.rows if row.get("name") == "boosted_train_log_loss"]
    return float(len(losses) == ROUNDS and all(b < a for a, b in itertools.pairwise(losses)))


def table(name: str, seed: int) -> Data:
    from sklearn import datasets

    x, y = {"breast-cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}[name](return_X_y=True)
    return load(x, y, val=0.0, test=0.3, seed=seed)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    seeds, table_seeds, inner, table_inner = (2, 2, 1, 1) if smoke else (4, 8, 3, 10)
    for name in IMAGES:
        sizes = {"train": 64, "test": 64} if smoke else {"train": 1500 if name == "fashion-mnist" else 1437, "test": 1500 if name == "fashion-mnist" else 360}

        def tuned(eta: float, name: str = name, sizes: dict[str, int] = sizes) -> dict[str, float]:
            data = bench.data(name, train=sizes["train"] * 3 // 4, val=sizes["train"] // 4, test=0, seed=100)
            return {"accuracy": boosted(bench, data, TRUNK, "gb-cnn", inner, eta, 100).run.evaluate("val").accuracy}

        tries = {eta: bench.arm(f"{name} validation, eta {eta}", 100, lambda eta=eta, tuned=tuned: tuned(eta))["accuracy"] for eta in ETAS}  # type: ignore[misc]
        best = max(ETAS, key=lambda eta: tries[eta])
        for seed in range(seeds):
            data = bench.data(name, seed=seed, **sizes)

            def boost(data: Data = data, seed: int = seed, best: float = best) -> dict[str, float]:
                made = boosted(bench, data, TRUNK, "gb-cnn", inner, best, seed)
                return {"accuracy": made.test.accuracy, "falls": falls(made.run)}

            def once(data: Data = data, seed: int = seed) -> dict[str, float]:
                return {"accuracy": plain(data, TRUNK, "gb-cnn", ROUNDS, ROUNDS * inner, seed).evaluate("test").accuracy}

            def mean(data: Data = data, seed: int = seed) -> dict[str, float]:
                members = [plain(data, TRUNK, "gb-cnn", 1, inner, 1000 + 10 * seed + t).evaluate("test") for t in range(ROUNDS)]
                probs = torch.stack([scores.probs for scores in members]).mean(0)
                return {"accuracy": float((probs.argmax(1) == members[0].y).double().mean())}

            bench.arm(f"{name} boosted", seed, boost)
            bench.arm(f"{name} at once", seed, once)
            bench.arm(f"{name} mean of nets", seed, mean)
    for name in TABLES:
        for seed in range(table_seeds):

            def boost_table(name: str = name, seed: int = seed) -> dict[str, float]:
                made = boosted(bench, table(name, seed), MLP, "gb-dnn", table_inner, 0.1, seed)
                return {"accuracy": made.test.accuracy, "falls": falls(made.run)}

            def once_table(name: str = name, seed: int = seed) -> dict[str, float]:
                return {"accuracy": plain(table(name, seed), MLP, "gb-dnn", ROUNDS, ROUNDS * table_inner, seed).evaluate("test").accuracy}

            bench.arm(f"{name} boosted", seed, boost_table)
            bench.arm(f"{name} at once", seed, once_table)


def judge(numbers: Numbers) -> tuple[str, list[Paired | dict[str, Any]]]:
    rows: list[Paired | dict[str, Any]] = []
    boosts: list[float] = []
    bases: list[float] = []
    better = 0
    for name in (*IMAGES, *TABLES):
        boost, base = column(numbers, f"{name} boosted", "accuracy"), column(numbers, f"{name} at once", "accuracy")
        boosts, bases = boosts + boost, bases + base
        better += statistics.fmean(boost) > statistics.fmean(base)
        rows.append(paired(f"accuracy on {name}: boosted minus the final network at once", boost, base))
    pooled = paired("accuracy, all four sets", boosts, bases)
    rows.append(pooled)
    for name in IMAGES:
        control = column(numbers, f"{name} mean of nets", "accuracy")
        rows.append(paired(f"accuracy on {name}: boosted minus the mean of {ROUNDS} nets", column(numbers, f"{name} boosted", "accuracy"), control))
    fallen = [value for name in (*IMAGES, *TABLES) for value in column(numbers, f"{name} boosted", "falls")]
    rows.append({"what": "share of runs in which the training cross-entropy falls at every round", "value": statistics.fmean(fallen)})
    if better >= 3 and pooled.low > 0 and min(fallen) == 1:
        return "supported", rows
    return ("contradicted" if pooled.high < 0 else "inconclusive"), rows
