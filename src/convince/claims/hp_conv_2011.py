"""Claim of the deep convolutional nets of 2011: plain backprop does better in deeper nets, and it learns quickly."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, final

from convince.claims import Bench, Numbers, column, paired, said, together
from convince.fit.adapters import seat
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.parts import Card

TARGET = {"model": "ciresan-net-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "1. Trained by plain backprop, nets with more convolutional stages err less than shallower ones of as many parameters. "
    "2. Learning is quick: few passes over the distorted digits suffice (MNIST: 2.42 % after one, 0.97 % after three)."
)
SUPPORTED = (
    "1. the mean test error falls from 1 to 2 to 3 stages, and 3 stages - 1 stage has its 95 % paired t interval below 0; and 2. with 3 stages the error is "
    "below 10 % after the first epoch and below 5 % after the third, on every seed. Each claim is reported by itself."
)
CONTRADICTED = "1. the interval of 3 stages - 1 stage lies above 0; or 2. the error after the third epoch is 5 % or more on every seed."
BUDGET = (
    "mnist padded to 29 pixels, 10,000 training and 10,000 test images; 1, 2 and 3 stages of convolution and max-pooling and one hidden layer, of 73,850, "
    "76,040 and 74,820 parameters; scaled tanh, distortions anew in each epoch (translation 5 %, rotation 15 degrees, scale 15 %), batch 32, SGD 0.03 with "
    "Nesterov momentum and times 0.9 an epoch, 4 epochs, fp32, 4 paired seeds. Controls: 3 stages without distortions at 2 seeds; 3 stages with random tables "
    "of half of the links, equivalent to all links if the interval of their difference lies within 0.5 points. As in the catalogue, but for its rate of 0.05: "
    "0.03 with momentum is what trains the 2-stage net in the claim of mcdnn."
)
NETS = {
    "1 stage": "ciresan-net:layers=20C6-MP4-100N",
    "2 stages": "ciresan-net:layers=20C4-MP2-40C5-MP3-150N",
    "3 stages": "ciresan-net:layers=20C4-MP2-50C4-MP2-100C3-MP3-120N",
    "3 stages, half of the links": "ciresan-net:layers=20C4-MP2-50C4-MP2-100C3-MP3-120N,links=0.5",
}
DISTORTIONS = "simard-distortion:alpha=0.0"


@final
class Decay(Technique):
    """The rate times 0.9 after each epoch, and the test error then."""

    def __init__(self) -> None:
        self.errors: list[float] = []

    def on_epoch(self, run: Run) -> None:
        assert run.optimizer is not None
        for group in run.optimizer.param_groups:
            group["initial_lr"] *= 0.9
        self.errors.append(1 - run.evaluate("test").accuracy)


def cell(data: Any, how: dict[str, Any], distorted: bool) -> dict[str, float]:
    """One training: the test error after each epoch."""
    parts = (DISTORTIONS,) if distorted else ()
    run = prepare(settings(**how, parts=parts, augment="none", schedule="constant", precision="fp32"), data)
    decay = Decay()
    run.team = Team([*(seat(part) for part in parts), Seat(Card(part="decay", kind="technique", title="rate"), {}, decay)])
    fit(run)
    after = {f"after epoch {i + 1}": error for i, error in enumerate(decay.errors)}
    return {**after, "error": decay.errors[-1], "parameters": sum(p.numel() for p in run.model.parameters())}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 3, 2) if small else ("mnist", 10000, 10000, 4, 4)
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        how = {"epochs": epochs, "batch": 32, "lr": 0.03, "seed": seed}
        for arm, model in NETS.items():
            bench.arm(arm, seed, partial(cell, data, {**how, "model": model}, True))
        if seed < 2:
            bench.arm("3 stages, undistorted", seed, partial(cell, data, {**how, "model": NETS["3 stages"]}, False))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def errors(arm: str, metric: str = "error") -> list[float]:
        return column(numbers, arm, metric)

    deep = paired("test error, 3 stages - 1 stage", errors("3 stages"), errors("1 stage"))
    steps = [paired(f"test error, {a} - {b}", errors(a), errors(b)) for a, b in (("2 stages", "1 stage"), ("3 stages", "2 stages"))]
    half = paired("test error, half of the links - all", errors("3 stages, half of the links"), errors("3 stages"))
    plain = errors("3 stages, undistorted")
    control = paired("test error, 3 stages, distorted - undistorted", errors("3 stages")[: len(plain)], plain)
    first, third = errors("3 stages", "after epoch 1"), errors("3 stages", "after epoch 3")

    claims = {
        "claim 1": said(deep.high < 0 and all(step.mean < 0 for step in steps), deep.low > 0),
        "claim 2": said(max(first) < 0.10 and max(third) < 0.05, min(third) >= 0.05),
        "half of the links": "equivalent" if half.low > -0.005 and half.high < 0.005 else "not shown to be equivalent",
    }
    facts = {f"{arm}: {metric}": statistics.fmean(errors(arm, metric)) for arm in numbers for metric in ("error", "parameters")}
    facts |= {"3 stages, largest error after epoch 1": max(first), "3 stages, largest error after epoch 3": max(third)}
    comparisons = [deep, *steps, half, control, claims, facts]
    return together([claims["claim 1"], claims["claim 2"]]), comparisons
