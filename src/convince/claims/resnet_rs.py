"""Claim of resnet-rs: a better training recipe gains more than a better architecture."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, final

from convince.claims import Bench, Numbers, column, paired
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.training.resnet_rs_training import CARD

SAYS = "Training a plain residual network by the modern recipe gains more test accuracy than giving it the ResNet-D stem, shortcuts and SE."
SUPPORTED = (
    "Training recipe - baseline is at least +1 point of test accuracy with the 95 % paired t interval above 0, and training recipe - architecture is "
    "above 0 in the mean."
)
CONTRADICTED = "The interval of training recipe - baseline lies below 0, or that of training recipe - architecture does."
BUDGET = (
    "cifar10, 2,000 training and 3,000 test images, residual network of 3 blocks with widths 8-16-32, SGD with Nesterov momentum 0.1, batch 64, flip and "
    "crop, 9 epochs, 4 paired seeds. Baseline: learning rate times 0.1 after epochs 5 and 7, weight decay 5e-4. Training: cosine, label smoothing 0.1, "
    "EMA 0.99, RandAugment (2 layers, magnitude 5), dropout 0.25, weight decay 1e-4. Architecture: baseline with the ResNet-D stem and shortcuts and SE "
    "at the same widths. Both; and, as a control, the recipe at the old weight decay. Against the catalogue: 2,000 of 3,000 training and 3,000 of "
    "10,000 test images, widths 8-16-32 for 16-32-64, 9 of 16 epochs, 'both' and the control on 2 of the 4 seeds; the scaling rule and the ladder "
    "are long checks and left out. The paper itself says that heavy regularisation hurts in short runs of small networks."
)
RECIPE = "resnet-rs-training:smoothing=0.1,ema=0.99,layers=2,magnitude=5,dropout=0.25,weight_decay="


@final
@dataclass
class StepDecay(Technique):
    """A constant learning rate, times 0.1 after each of these epochs."""

    marks: tuple[int, ...]

    def on_epoch(self, run: Run) -> None:
        if run.epoch + 1 in self.marks and run.optimizer is not None:
            for group in run.optimizer.param_groups:
                group["initial_lr"] *= 0.1


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 1, 2) if smoke else ("cifar10", 2000, 3000, 9, 4)
    widths = "(4,8)" if smoke else "(8,16,32)"
    layers = "(1,1)" if smoke else "(1,1,1)"
    plain, better = (f"{net}:layers={layers},widths={widths}" for net in ("resnet", "resnet-rs"))
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        go = partial(cell, data, seed, epochs)
        bench.arm("baseline", seed, partial(go, plain))
        bench.arm("training", seed, partial(go, plain, RECIPE + "1e-4"))
        bench.arm("architecture", seed, partial(go, better))
        if seed < 2:
            bench.arm("both", seed, partial(go, better, RECIPE + "1e-4"))
            bench.arm("training, old weight decay", seed, partial(go, plain, RECIPE + "none"))


def cell(data: Any, seed: int, epochs: int, model: str, recipe: str = "") -> dict[str, float]:
    """One training: by the recipe, or with step decay."""
    schedule: Any = "cosine" if recipe else "constant"
    parts = ("flip-crop", recipe) if recipe else ("flip-crop",)
    chosen = settings(model=model, epochs=epochs, batch=64, lr=0.1, schedule=schedule, seed=seed, augment="none", parts=parts)
    run = prepare(chosen, data)
    if not recipe:
        run.team = Team([*run.team.seats, Seat(CARD, {}, StepDecay((round(0.5 * epochs + 0.5), round(0.75 * epochs + 0.5))))])
    fit(run)
    test, train = run.evaluate("test"), run.evaluate("train")
    return {"accuracy": test.accuracy, "log_loss": test.log_loss, "train_accuracy": train.accuracy}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def gain(a: str, b: str, metric: str = "accuracy", scale: float = 100) -> Any:
        mine = [scale * value for value in column(numbers, a, metric)]
        theirs = [scale * value for value in column(numbers, b, metric)][: len(mine)]
        return paired(f"{a} - {b} [{'points of accuracy' if metric == 'accuracy' else 'nats of log-loss'}]", mine, theirs)

    training, rivals = gain("training", "baseline"), gain("training", "architecture")
    comparisons = [
        training,
        rivals,
        gain("architecture", "baseline"),
        gain("both", "baseline"),
        gain("training, old weight decay", "training"),
        gain("training", "baseline", "log_loss", 1),
    ]
    if training.high < 0 or rivals.high < 0:
        return "contradicted", comparisons
    holds = training.mean >= 1 and training.low > 0 and rivals.mean > 0
    return "supported" if holds else "inconclusive", comparisons
