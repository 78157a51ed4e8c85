"""Claim of batch-norm: a sigmoid network gets as accurate in a third of the steps, and bears thirty times the learning rate."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.layers.surgery import swap
from convince.parts import Card

STEPS, EVERY = 3000, 25
RATES = (0.03, 0.1, 0.3, 1.0)
SAYS = (
    "1. With batch normalisation a network of sigmoid units reaches the accuracy that it has without, at that network's own best learning rate, in a third of "
    "the steps. 2. It bears thirty times that rate, at which the plain network fails. 3. It is the normalisation that helps, not its scales and shifts."
)
SUPPORTED = (
    "1. the share of the 3,000 steps after which the normalised network first has the plain one's final test accuracy is at most 1/3 in the mean, with the "
    "upper end of its 95 % t interval below 1/2; 2. at 30 times the rate the plain network loses more than 20 points in the mean (or its loss is not finite), "
    "and the normalised one at most 3 points against its own at the base rate; and 3. the share of the control, scales and shifts alone, is above 1/2."
)
CONTRADICTED = "1. the mean share is above 1; or 2. the normalised network loses more at 30 times the rate than the plain one."
BUDGET = (
    "mnist, 20,000 training, 2,000 validation and 10,000 test images; 784-100-100-100-10 sigmoid units, all weights from N(0, 0.1^2), biases 0; plain SGD at a "
    "constant rate, batch 60, 3,000 steps, 6 seeds (draw of images, initial weights, order); the rate is that of 0.03, 0.1, 0.3 and 1 at which the plain net "
    "has the best validation accuracy on seed 0. Test accuracy is read every 25 steps; a network that never gets there counts with a share of 2. As in the "
    "catalogue, nothing reduced."
)


@final
class Affine(nn.Module):
    """A scale and a shift for each unit: what is left of batch normalisation where mean 0 and variance 1 are fixed."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(units)), nn.Parameter(torch.zeros(units))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


@final
@dataclass
class Toy(Technique):
    """The paper's toy experiment: its initial law and plain SGD; ``affine`` makes the control, ``watch`` reads test accuracy as training goes on."""

    affine: bool
    watch: bool
    curve: list[float] = field(default_factory=list)
    rank = 90  # after the layer is in

    def on_start(self, run: Run) -> None:
        linear = [m for m in run.model.modules() if isinstance(m, nn.Linear)]
        for i, m in enumerate(linear):  # by number: a normalised layer has another name
            with torch.no_grad():
                m.weight.normal_(0, 0.1, generator=run.gen("toy", i))
                if m.bias is not None:
                    m.bias.zero_()
        if self.affine:
            norms = [(n, m) for n, m in run.model.named_modules() if isinstance(m, nn.BatchNorm1d)]
            swap(run.model, norms, lambda name, norm: Affine(norm.num_features))  # type: ignore[arg-type]
        self.x = run.plan.pixels(run.data.x.take(run.data.split.test))
        self.y = run.data.y[run.data.split.test]

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for _, p in params], lr=run.settings.lr or 0.1)

    def on_step(self, run: Run) -> None:
        if self.watch and run.steps_done % EVERY == 0:
            with run.aside():
                self.curve.append(float((run.forward(self.x).logits.argmax(1) == self.y).double().mean()))  # type: ignore[union-attr]


def cell(data: Any, how: dict[str, Any], parts: tuple[str, ...], affine: bool = False, goal: float | None = None) -> dict[str, float]:
    """Final accuracies; with ``goal`` also the share of all steps until the test accuracy is there, 2 where it never is."""
    run = prepare(resolve(settings(model="sigmoid-mlp:hidden=(100,100,100)", parts=parts, augment="none", precision="fp32", **how), data)[0], data)
    toy = Toy(affine, watch=goal is not None)
    run.team = Team([*run.team.seats, Seat(Card(part="toy", kind="technique", title="the paper's toy experiment"), {}, toy)])
    finite = 1.0
    try:
        fit(run)
    except Mistake as stopped:
        if "the loss is" not in str(stopped):
            raise
        finite = 0.0
    found = {"accuracy": run.evaluate("test").accuracy, "val": run.evaluate("val").accuracy, "finite": finite}
    if goal is not None:
        there = next((i for i, value in enumerate(toy.curve, 1) if value >= goal), None)
        found["share"] = 2.0 if there is None else there * EVERY / run.settings.steps  # type: ignore[operator]
    return found


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, val, test, steps, seeds = ("digits", 256, 64, 64, 50, 2) if small else ("mnist", 20000, 2000, 10000, STEPS, 6)
    how = {"batch": 60, "steps": steps, "schedule": "constant"}
    bn = ("batch-norm",)
    data = bench.data(name, train=train, val=val, test=test, seed=0)
    tried = {rate: bench.arm(f"plain, rate {rate}", 0, partial(cell, data, {**how, "lr": rate, "seed": 0}, ()))["val"] for rate in RATES}
    best = max(tried, key=lambda rate: tried[rate])
    for seed in range(seeds):
        data = bench.data(name, train=train, val=val, test=test, seed=seed)
        base, high = {**how, "lr": best, "seed": seed}, {**how, "lr": 30 * best, "seed": seed}
        goal = bench.arm("plain", seed, partial(cell, data, base, ()))["accuracy"]
        bench.arm("normalised", seed, partial(cell, data, base, bn, goal=goal))
        bench.arm("control", seed, partial(cell, data, base, bn, affine=True, goal=goal))
        bench.arm("plain, rate x 30", seed, partial(cell, data, high, ()))
        bench.arm("normalised, rate x 30", seed, partial(cell, data, high, bn))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def share(arm: str) -> Any:
        found = column(numbers, arm, "share")
        return paired(f"share of the steps until the plain network's accuracy, {arm}", found, [0.0] * len(found))

    def lost(arm: str) -> Any:
        return paired(f"accuracy, {arm} - rate x 30", column(numbers, arm, "accuracy"), column(numbers, f"{arm}, rate x 30", "accuracy"))

    own, control, plain, normalised = share("normalised"), share("control"), lost("plain"), lost("normalised")
    fails = plain.mean > 0.2 or min(column(numbers, "plain, rate x 30", "finite")) == 0
    gain = paired("accuracy at the base rate, normalised - plain", column(numbers, "normalised", "accuracy"), column(numbers, "plain", "accuracy"))
    rates: dict[str, float] = {f"validation accuracy on seed 0, {arm}": numbers[arm]["0"]["val"] for arm in numbers if arm.startswith("plain, rate 0")}
    rates |= {"validation accuracy on seed 0, plain, rate 1.0": numbers["plain, rate 1.0"]["0"]["val"]}
    comparisons = [own, control, plain, normalised, gain, rates]
    if own.mean > 1 or normalised.mean > plain.mean:
        return "contradicted", comparisons
    if own.mean <= 1 / 3 and own.high < 1 / 2 and fails and normalised.mean <= 0.03 and control.mean > 1 / 2:
        return "supported", comparisons
    return "inconclusive", comparisons
