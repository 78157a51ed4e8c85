"""Claim of inception-resnet: residual links make an Inception network learn faster, and scaling their branches keeps wide ones stable."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from functools import partial
from typing import Any, final

import torch

from convince.claims import Bench, Numbers, column, paired
from convince.errors import Mistake
from convince.fit import adapters
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare, resolve
from convince.parts import Card

TARGET = {"model": "inception-resnet-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "1. At equal multiply-adds an Inception network with residual links learns faster than one without. "
    "2. Wide residual branches make training diverge where they are added as they are, and do not where they are scaled down to a tenth."
)
SUPPORTED = (
    "1. residual - plain, mean training loss of epochs 1 to 4, has its 95 % paired t interval below 0; and 2. of the wide networks more diverge at scale 1.0 "
    "(the loss is not finite, or training accuracy in the second epoch is below 15 %) than at scale 0.1, of which none does."
)
CONTRADICTED = (
    "1. the interval lies above 0; or 2. wide networks diverge, and at scale 0.1 at least as many as at scale 1.0. Where none diverges at either scale, "
    "2. is not decided."
)
BUDGET = (
    "cifar10 at 32 px. 1.: 2,000 training and 2,000 test images, inception-mini (33.9 M multiply-adds) against inception-resnet-mini (34.2 M), RMSProp 0.002 "
    "times 0.94 after each epoch, decay 0.9, batch 64, 5 epochs, 4 paired seeds; test accuracy is reported by itself. 2.: 1,500 training images, "
    "inception-resnet-mini with residual branches 4 times as wide, scale 1.0 against 0.1, SGD without momentum at a constant 0.2 and 0.8, batch 32, 2 epochs "
    "(92 steps), 3 seeds: 6 runs a scale; control: scale 0.1 at plain width. Reduced against the catalogue: 2,000 of 3,000 training and 2,000 of 5,000 test "
    "images and 5 of 8 epochs in 1., 1,500 images at batch 32 in 2. Settled where it is silent: RMSProp's epsilon is 1e-8, which goes with a rate of 0.002 "
    "(the paper's 1.0 goes with 0.045), and the SGD of 2. has no momentum, whose rates of 0.2 and 0.8 would otherwise act like 2 and 8."
)
RATES = (0.2, 0.8)
ARMS = {"wide, scale 1.0": ("4.0", "1.0"), "wide, scale 0.1": ("4.0", "0.1"), "plain width, scale 0.1": ("1.0", "0.1")}


@final
@dataclass
class Diary(Technique):
    """Keeps the loss and the hits of each training step, and multiplies the learning rate by ``decay`` after each epoch."""

    decay: float = 1.0
    rows: list[tuple[int, float, float]] = field(default_factory=list)

    def on_step(self, run: Run) -> None:
        assert run.batch.y is not None and run.out.logits is not None
        hits = (run.out.logits.argmax(1) == run.batch.y.argmax(1)).double().mean()
        self.rows.append((run.epoch, float(run.loss.detach()), float(hits)))

    def on_epoch(self, run: Run) -> None:
        assert run.optimizer is not None
        for group in run.optimizer.param_groups:
            group["initial_lr"] *= self.decay

    def mean(self, column: int, epochs: range) -> float:
        """The mean of the loss (1) or of the hits (2) over the steps of these epochs."""
        return statistics.fmean(row[column] for row in self.rows if row[0] in epochs)


def ready(data: Any, how: dict[str, Any], optimizer: Any, options: dict[str, Any], diary: Diary) -> Run:
    """A run with this optimiser of torch's and a diary, that has not started."""
    run = prepare(resolve(settings(augment="none", schedule="constant", **how), data)[0], data)
    seats = [
        Seat(Card(part="own-optimizer", kind="optimizer", title="torch's own"), {}, adapters.Optimizer(optimizer, options)),
        Seat(Card(part="diary", kind="technique", title="what the claim reads"), {}, diary),
    ]
    run.team = Team([*run.team.seats, *seats])
    return run


def speed(data: Any, how: dict[str, Any]) -> dict[str, float]:
    """How fast the training loss falls, and where it ends."""
    diary = Diary(decay=0.94)
    run = ready(data, how, torch.optim.RMSprop, {"alpha": 0.9}, diary)
    fit(run)
    test = run.evaluate("test")
    return {
        "loss of epochs 1 to 4": diary.mean(1, range(4)),
        "loss of the last epoch": diary.mean(1, range(how["epochs"] - 1, how["epochs"])),
        "accuracy": test.accuracy,
        "log_loss": test.log_loss,
    }


def stability(data: Any, how: dict[str, Any]) -> dict[str, float]:
    """Whether training diverges: a loss that is not finite, or hardly more hits than chance in the last epoch."""
    diary = Diary()
    run = ready(data, how, torch.optim.SGD, {}, diary)
    try:
        fit(run)
    except Mistake as refusal:
        if "the loss is" not in str(refusal):  # the loop refuses to go on with a loss that is not finite
            raise
        return {"diverged": 1.0, "finite": 0.0, "hits": 0.0}
    hits = diary.mean(2, range(how["epochs"] - 1, how["epochs"]))
    return {"diverged": float(hits < 0.15), "finite": 1.0, "hits": hits}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, sizes, test, epochs, seeds = ("digits", (96, 64), 64, (4, 1), (2, 1)) if small else ("cifar10", (2000, 1500), 2000, (5, 2), (4, 3))
    for seed in range(seeds[0]):
        data = bench.data(name, train=sizes[0], test=test, seed=seed)
        for arm, model in (("plain", "inception-mini"), ("residual", "inception-resnet-mini")):
            how = {"model": model, "epochs": epochs[0], "batch": 64, "lr": 0.002, "seed": seed}
            bench.arm(arm, seed, partial(speed, data, how))
    for seed in range(seeds[1]):
        data = bench.data(name, train=sizes[1], test=test, seed=seed)
        for arm, (branch, scale) in ARMS.items():
            for rate in RATES:
                model = f"inception-resnet-mini:branch={branch},scales=({scale},{scale},{scale})"
                bench.arm(f"{arm}, lr {rate}", seed, partial(stability, data, {"model": model, "epochs": epochs[1], "batch": 32, "lr": rate, "seed": seed}))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(metric: str) -> Any:
        return paired(f"{metric}, residual - plain", column(numbers, "residual", metric), column(numbers, "plain", metric))

    faster = gain("loss of epochs 1 to 4")
    diverged = {arm: int(sum(sum(column(numbers, f"{arm}, lr {rate}", "diverged")) for rate in RATES)) for arm in ARMS}
    facts = {f"diverged: {arm}": count for arm, count in diverged.items()}
    facts |= {"runs an arm": sum(len(numbers[f"wide, scale 1.0, lr {rate}"]) for rate in RATES)}
    hits = {f"hits in the second epoch: {arm}, lr {rate}": statistics.fmean(column(numbers, f"{arm}, lr {rate}", "hits")) for arm in ARMS for rate in RATES}
    comparisons = [faster, gain("loss of the last epoch"), gain("accuracy"), facts, hits]
    unscaled, scaled = diverged["wide, scale 1.0"], diverged["wide, scale 0.1"]
    if faster.low > 0 or 0 < scaled >= unscaled:
        return "contradicted", comparisons
    return "supported" if faster.high < 0 and unscaled > scaled == 0 else "inconclusive", comparisons
