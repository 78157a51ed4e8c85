"""Claim of tract: with a first layer that follows its pre-activations, networks come to the same accuracy in fewer epochs."""

from __future__ import annotations

import itertools
import statistics
import time
from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from convince.claims import Bench, Numbers, column, paired
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.optim.tract import first_layer
from convince.parts import Card

SAYS = "TrAct on the first layer reaches the baseline's accuracy in fewer epochs, on a convolutional network and a transformer, at little cost a step."
SUPPORTED = (
    "On both hosts the epochs until the baseline's final validation accuracy is reached are at most 0.85 of all epochs in the mean, and final test accuracy "
    "TrAct - baseline is at least 0 in the mean with the lower end of its 95 % paired t interval above -0.3 points, and TrAct - control is above 0 in "
    "the mean; and a step of the convolutional network takes at most 15 % longer."
)
CONTRADICTED = "on either host the upper end of the interval of final test accuracy TrAct - baseline lies below 0."
BUDGET = (
    "cifar10, 800 training, 500 validation (every epoch) and 1,000 test images, 8 epochs, batch 50, cosine, 4 paired seeds. Hosts: a residual net of three "
    "blocks (8-16-32) with SGD, rate 0.05 or 0.1, and a vision transformer (patch 8, dim 96, depth 3) with Adam, rate 0.001 or 0.003; the rate is the "
    "baseline's better one on seed 0 by validation. Arms: baseline; TrAct, l 0.1; control: baseline whose first layer moves by as much more as TrAct's "
    "gradient is longer than the plain one (mean ratio of seed 0). Reduced against the catalogue: 800 of 4,000 training and 1,000 of 10,000 test images, "
    "half the width of the net, patches of 8 for 4 pixels and 3 of 4 layers; TrAct on a middle layer is left out. "
    "A level that is not reached counts as 10 of 8 epochs."
)
EPOCHS, NEVER = 8, 10
HOSTS: dict[str, tuple[str, tuple[str, ...], tuple[float, float]]] = {
    "cnn": ("resnet:layers=(1,1,1),widths=(8,16,32)", (), (0.05, 0.1)),
    "vit": ("timm/vit_tiny_patch16_224:patch_size=8,embed_dim=96,depth=3,num_heads=3", ("adamw:weight_decay=0.0",), (0.001, 0.003)),
}


@final
class Lengths(Technique):
    """The length of the first layer's gradient, before TrAct (rank 4) or after it (rank 6)."""

    def __init__(self, rank: int) -> None:
        self.rank, self.found = rank, list[float]()

    def on_grad(self, run: Run) -> None:
        self.found.append(float(dict(run.model.named_parameters())[stem(run)].grad.norm()))  # type: ignore[union-attr]


@final
class Longer(Technique):
    """The control: the first layer's weights move ``factor`` times as far, as at a rate that is so much larger."""

    def __init__(self, factor: float) -> None:
        self.factor, self.place = factor, torch.empty(0)

    def weight(self, run: Run) -> Tensor:
        return dict(run.model.named_parameters())[stem(run)]

    def on_grad(self, run: Run) -> None:
        self.place = self.weight(run).detach().clone()

    @torch.no_grad()
    def on_step(self, run: Run) -> None:
        self.weight(run).copy_(self.place.lerp(self.weight(run), self.factor))


def stem(run: Run) -> str:
    """The name of the first layer's weight."""
    return "conv1.weight" if "conv1.weight" in dict(run.model.named_parameters()) else "patch_embed.proj.weight"


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, val, test, epochs, seeds = ("digits", 50, 30, 30, 1, 2) if small else ("cifar10", 800, 500, 1000, EPOCHS, 4)
    for seed in range(seeds):
        data = bench.data(name, train=train, val=val, test=test, seed=seed)
        for host, (model, parts, rates) in HOSTS.items():
            how = {"model": model, "epochs": epochs, "batch": 10 if small else 50, "seed": seed}
            if seed == 0:
                for lr in rates:
                    bench.arm(f"{host}, rate {lr:g}", 0, partial(cell, data, {**how, "lr": lr}, parts))
            lr = best(bench.numbers, host)
            how["lr"] = lr
            if seed == 0:
                bench.arm(f"{host}, baseline", 0, partial(dict, bench.numbers[f"{host}, rate {lr:g}"]["0"]))
            else:
                bench.arm(f"{host}, baseline", seed, partial(cell, data, how, parts))
            bench.arm(f"{host}, tract", seed, partial(cell, data, how, (*parts, "tract")))
            ratio = bench.numbers[f"{host}, tract"]["0"]["ratio"]
            bench.arm(f"{host}, control", seed, partial(cell, data, how, parts, Longer(ratio)))


def best(numbers: Numbers, host: str) -> float:
    """The baseline's better rate on seed 0, by validation."""
    rates = HOSTS[host][2]
    return max(rates, key=lambda lr: last(numbers[f"{host}, rate {lr:g}"]["0"]))


def curve(row: dict[str, float]) -> list[float]:
    """Validation accuracy after each epoch."""
    return [row[f"epoch_{i}"] for i in range(1, EPOCHS + 1) if f"epoch_{i}" in row]


def last(row: dict[str, float]) -> float:
    return curve(row)[-1]


def epochs_to(level: float, values: list[float]) -> float:
    """Epochs until ``level`` is first reached, linearly between epochs, from accuracy 0 at the start; NEVER where it is not."""
    before = 0.0
    for i, value in enumerate(values):
        if value >= level:
            return i + (level - before) / (value - before) if value > before else float(i)
        before = value
    return float(NEVER)


def cell(data: Any, how: dict[str, Any], parts: tuple[str, ...], control: Technique | None = None) -> dict[str, float]:
    """One training: validation accuracy by epoch, test accuracy, milliseconds a step, and how much longer TrAct's gradient is."""
    run = prepare(resolve(settings(augment="none", parts=parts, **how), data)[0], data)
    plain, changed = Lengths(4), Lengths(6)
    guests: list[Technique] = [plain, changed] if "tract" in parts and how["seed"] == 0 else [] if control is None else [control]
    seats = [Seat(Card(part=f"guest-{i}", kind="technique", title="Guest"), {}, guest) for i, guest in enumerate(guests)]
    run.team = Team([*run.team.seats, *seats])
    marks: list[float] = []
    fit(run, None, lambda *_: marks.append(time.perf_counter()))
    found = {f"epoch_{row['epoch'] + 1}": row["val_accuracy"] for row in run.record.rows if row["kind"] == "epoch"}
    found["accuracy"] = run.evaluate("test").accuracy
    found["step_ms"] = 1000 * statistics.median(b - a for a, b in itertools.pairwise(marks))
    if plain.found:
        found["ratio"] = statistics.fmean(b / a for a, b in zip(plain.found, changed.found, strict=True))
        x = run.normalise(run.plan.pixels(data.x.take(data.split.train[:1])))
        assert f"{first_layer(run.model, x)[0]}.weight" == stem(run)
    return found


def judge(numbers: Numbers) -> tuple[str, list]:
    comparisons: list[Any] = []
    holds, harmed = True, False
    for host in HOSTS:
        arms = {arm: numbers[f"{host}, {arm}"] for arm in ("baseline", "tract", "control")}
        levels = {seed: last(row) for seed, row in arms["baseline"].items()}
        share = {arm: [epochs_to(levels[s], curve(rows[s])) / len(curve(rows[s])) for s in sorted(rows, key=int)] for arm, rows in arms.items()}
        finals = {arm: [100 * v for v in column(numbers, f"{host}, {arm}", "accuracy")] for arm in arms}
        gain = paired(f"{host}: final accuracy, tract - baseline [points]", finals["tract"], finals["baseline"])
        more = paired(f"{host}: final accuracy, tract - control [points]", finals["tract"], finals["control"])
        sooner = paired(f"{host}: share of epochs to the baseline's level, tract - baseline", share["tract"], share["baseline"])
        reach = statistics.fmean(share["tract"])
        took = {arm: statistics.median(column(numbers, f"{host}, {arm}", "step_ms")) for arm in arms}
        slower = took["tract"] / took["baseline"] - 1
        comparisons += [gain, more, sooner, {"what": f"{host}: share of all epochs in which tract reaches the baseline's final level", "value": reach}]
        comparisons += [{"what": f"{host}: the same of the control", "value": statistics.fmean(share["control"])}]
        comparisons += [{"what": f"{host}: a step takes longer by", "value": slower}, {"what": f"{host}: rate", "value": best(numbers, host)}]
        comparisons += [{"what": f"{host}: tract's gradient / the plain one", "value": numbers[f"{host}, tract"]["0"]["ratio"]}]
        harmed = harmed or gain.high < 0
        holds = holds and reach <= 0.85 and gain.mean >= 0 and gain.low > -0.3 and more.mean > 0 and (host != "cnn" or slower <= 0.15)
    return ("contradicted" if harmed else "supported" if holds else "inconclusive"), comparisons
