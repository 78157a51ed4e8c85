"""Claim of netaug: a tiny network gains from being trained as a part of wider ones, more than from training longer."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.training.netaug import CARD, NetAug

SAYS = "A network too small to fit its data gains test accuracy when it is trained as a part of randomly widened ones; dropout, the opposite, costs accuracy."
SUPPORTED = (
    "NetAug - plain is at least +0.7 points of test accuracy with the 95 % paired t interval above 0, NetAug - plain at doubled epochs is above 0 in "
    "the mean, and dropout - plain is below 0 in the mean."
)
CONTRADICTED = "The interval of NetAug - plain lies below 0."
BUDGET = (
    "cifar10, 3,000 training and 4,000 test images, a 3-block CNN (8-16-24, 5,170 parameters), SGD with Nesterov momentum 0.1 cosine, batch 64, "
    "label smoothing 0.1, 8 epochs, 5 paired seeds. NetAug: width multipliers (1, 2, 3) in the first half; a plain network has no middle channels, "
    "so its second half trains the base alone. Controls: plain with 16 epochs; the widened networks without the base's loss, whose slice is kept; "
    "dropout 0.2 before the head. Against the catalogue: 3,000 of 6,000 training and 4,000 of 10,000 test images, 8 of 12 epochs, 5 of 6 seeds, "
    "the control without the base's loss on 2 seeds, and the long reverse check on a large network is left out."
)


@final
class WithoutBase(Technique):
    """NetAug with the base's loss taken out: only the widened networks are trained, and the slice is kept."""

    rank = 95

    def __init__(self, inner: NetAug) -> None:
        self.inner = inner

    def on_start(self, run: Run) -> None:
        self.inner.on_start(run)

    def on_loss(self, run: Run) -> None:
        base = run.loss
        self.inner.on_loss(run)
        run.loss = run.loss - base


@final
class Dropout(Technique):
    """Dropout of the pooled features before the head."""

    def __init__(self, p: float) -> None:
        self.p = p

    def on_start(self, run: Run) -> None:
        def drop(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (F.dropout(inputs[0], self.p, head.training),)

        run.model.get_submodule("fc").register_forward_pre_hook(drop)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, seeds = ("digits", 64, 64, 1, 2) if smoke else ("cifar10", 3000, 4000, 8, 5)
    mults = (1.0, 2.0, 3.0)
    for seed in range(seeds):
        data = bench.data(name, train=train, test=test, seed=seed)
        go = partial(cell, data, seed, smoke)
        bench.arm("plain", seed, partial(go, epochs))
        bench.arm("netaug", seed, partial(go, epochs, NetAug(width_mults=mults)))
        bench.arm("plain, doubled epochs", seed, partial(go, 2 * epochs))
        bench.arm("dropout", seed, partial(go, epochs, Dropout(0.2)))
        if seed < 2:
            bench.arm("without the base's loss", seed, partial(go, epochs, WithoutBase(NetAug(width_mults=mults, full=1.0))))


def cell(data: Any, seed: int, smoke: bool, epochs: int, technique: Technique | None = None) -> dict[str, float]:
    """One training of the tiny network with a technique or none."""
    model = "small-cnn:widths=(4,6,8)" if smoke else "small-cnn:widths=(8,16,24)"
    chosen = settings(model=model, epochs=epochs, batch=16 if smoke else 64, lr=0.1, seed=seed, augment="none", parts=("label-smoothing:smoothing=0.1",))
    run = prepare(chosen, data)
    if technique is not None:
        run.team = Team([*run.team.seats, Seat(CARD, {}, technique)])
    fit(run)
    test, train = run.evaluate("test"), run.evaluate("train")
    return {"accuracy": test.accuracy, "log_loss": test.log_loss, "train_accuracy": train.accuracy, "images": float(run.images)}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str, metric: str = "accuracy") -> list[float]:
        return [100 * value for value in column(numbers, arm, metric)]

    unit = "[points of accuracy]"
    gain = paired(f"netaug - plain {unit}", points("netaug"), points("plain"))
    longer = paired(f"netaug - plain at doubled epochs {unit}", points("netaug"), points("plain, doubled epochs"))
    opposite = paired(f"dropout 0.2 - plain {unit}", points("dropout"), points("plain"))
    alone = points("without the base's loss")
    joint = paired(f"widened networks without the base's loss - netaug {unit}", alone, points("netaug")[: len(alone)])
    gap = paired(f"plain: training - test accuracy {unit}", points("plain", "train_accuracy"), points("plain"))
    told: list[Any] = [gain, longer, opposite, joint, gap]
    if longer.low >= -0.5 and longer.high <= 0.5:
        told.append({"what": "equal to training longer: the interval against doubled epochs lies inside +-0.5 points", "value": 1.0})
    if gain.high < 0:
        return "contradicted", told
    holds = gain.mean >= 0.7 and gain.low > 0 and longer.mean > 0 and opposite.mean < 0
    return "supported" if holds else "inconclusive", told
