"""Claim of guidance: even an untrained residual guide lets a deep network without skips learn."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data, MemoryStore
from convince.distill.guidance_untrainable import CARD, GuidanceUntrainable
from convince.fit.adapters import seat
from convince.fit.answer import score
from convince.fit.loop import fit
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.types import RunSpec

SAYS = "Aligning its layers with a guide's by CKA lets a deep network without skip connections learn, and a guide with random weights is enough."
SUPPORTED = (
    "test accuracy, untrained guide - unguided, is at least +10 points with its 95 % paired t interval above 0, the guide that sees the batch in another "
    "order - unguided is below +3 points in the mean, and the trained guide is at least the untrained one - 1 point in the mean"
)
CONTRADICTED = "the interval of untrained guide - unguided lies below +3 points"
BUDGET = (
    "fashion-mnist at 14x14 by 2x2 means, 2,000 training, 500 validation and 2,000 test images; 16 convolutions of width 12 in 4 stages, no skips, no batch "
    "norm, torch's initial weights; Adam, constant rate, batch 128, 8 epochs, fp32; the guide is the same network with skips and other weights, untrained or "
    "trained 5 epochs. Six arms: unguided, untrained guide, trained guide, guide on another order of the batch, distillation of the trained guide's scores, "
    "and He weights with 10 % warm-up and a cosine. Rate 1e-3 or 3e-4 by validation accuracy on seed 100 (the guide on another order takes the rate of the "
    "untrained guide, distillation that of the trained one); 4 paired seeds. Against the catalogue: 2,000 of 3,000 training and 2,000 of 10,000 test images, "
    "4 of 5 seeds, two arms without a choice of their own; losses are read at the end, and the long check of the 12-layer MLP is left out."
)
RATES = (1e-3, 3e-4)
ADAM = "adamw:weight_decay=0.0"  # without decay AdamW is Adam
NET = "layers=(4,4,4,4),widths=(12,12,12,12)"


@final
class Shuffled(Technique):
    """Guidance by a guide that sees the rows of each batch in another order: nothing corresponds."""

    def __init__(self, inner: GuidanceUntrainable) -> None:
        self.inner = inner

    def on_start(self, run: Run) -> None:
        self.inner.on_start(run)

    def fit_members(self, run: Run) -> list[RunSpec]:
        return self.inner.fit_members(run)

    def on_batch(self, run: Run) -> None:
        self.inner.on_batch(run)

    def on_epoch(self, run: Run) -> None:
        self.inner.on_epoch(run)

    def on_loss(self, run: Run) -> None:
        batch = run.batch
        run.batch = dataclasses.replace(batch, x=batch.x[torch.randperm(len(batch.x), generator=run.gen("shuffled"))])
        self.inner.on_loss(run)
        run.batch = batch


@final
class Distilled(Technique):
    """The trained guide's scores instead of its layers: half cross-entropy, half soft cross-entropy at temperature 1."""

    def __init__(self, inner: GuidanceUntrainable) -> None:
        self.inner = inner

    def fit_members(self, run: Run) -> list[RunSpec]:
        return self.inner.fit_members(run)

    def on_loss(self, run: Run) -> None:
        assert run.out.logits is not None
        with torch.no_grad(), run.plan.autocast():
            told = full(run.members[0](run.batch.x)).softmax(1)
        run.loss = 0.5 * run.loss + 0.5 * F.cross_entropy(run.out.logits, told)


def arms(net: str, guide_epochs: int) -> dict[str, tuple[Callable[[], Technique | None], dict[str, Any]]]:
    """What each arm switches on, and the settings in which it differs."""
    guide = f"plain-cnn:{net},skip=true"
    plain = {"model": f"plain-cnn:{net}", "schedule": "constant"}
    return {
        "unguided": (lambda: None, plain),
        "untrained guide": (lambda: GuidanceUntrainable(guide, train_guide=0), plain),
        "trained guide": (lambda: GuidanceUntrainable(guide, train_guide=guide_epochs), plain),
        "shuffled guide": (lambda: Shuffled(GuidanceUntrainable(guide, train_guide=0)), plain),
        "distilled scores": (lambda: Distilled(GuidanceUntrainable(guide, train_guide=guide_epochs)), plain),
        "he and warm-up": (lambda: None, {"model": f"plain-cnn:{net},init=he", "warmup": 0.1}),
    }


def halved(data: Data) -> Data:
    """The same images at half the side, by means of 2x2 pixels."""
    whole = data.x.take(torch.arange(len(data.y))).float()
    side = whole.shape[-1] // 2
    preprocess = dataclasses.replace(data.preprocess, size=(side, side))
    return dataclasses.replace(data, x=MemoryStore(F.avg_pool2d(whole, 2).round().to(torch.uint8)), preprocess=preprocess)


def cell(data: Data, technique: Technique | None, how: dict[str, Any], lr: float, seed: int) -> dict[str, float]:
    """One training: accuracy and loss on validation, training and test images, and CKA with the guide after the first and last epoch."""
    run = prepare(settings(**how, parts=(ADAM,), lr=lr, precision="fp32", augment="none", seed=seed), data)
    if technique is not None:
        run.team = Team([seat(ADAM), Seat(CARD, {}, technique)])
    fit(run)
    test = run.evaluate("test")
    train = score(run.answer, data, data.split.train[:1000], run.plan)
    found = {"accuracy": test.accuracy, "log_loss": test.log_loss, "train_accuracy": train.accuracy, "train_log_loss": train.log_loss}
    if len(data.split.val):
        found["val_accuracy"] = run.evaluate("val").accuracy
    curve = [row["value"] for row in run.record.rows if row.get("name") == "CKA with the guide"]
    return found | ({"cka_first": curve[0], "cka_last": curve[-1]} if curve else {})


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, val, test, epochs, seeds = ("digits", 64, 32, 64, 1, 2) if smoke else ("fashion-mnist", 2000, 500, 2000, 8, 4)
    net = "layers=(2,2),widths=(4,4)" if smoke else NET
    how = {"epochs": epochs, "batch": 32 if smoke else 128}
    made = arms(net, 1 if smoke else 5)
    data = halved(bench.data(name, train=train, val=val, test=64, seed=100))
    for arm in sorted(set(map(whose, made))):
        technique, changes = made[arm]
        for lr in RATES:
            bench.arm(choice(arm, lr), 100, partial(lambda t, c, lr: cell(data, t(), {**how, **c}, lr, 100), technique, changes, lr))
    for seed in range(seeds):
        data = halved(bench.data(name, train=train, test=test, seed=seed))
        for arm, (technique, changes) in made.items():
            lr = chosen(bench.numbers, arm)
            bench.arm(arm, seed, partial(lambda t, c, lr, d, s: cell(d, t(), {**how, **c}, lr, s), technique, changes, lr, data, seed))


def choice(arm: str, lr: float) -> str:
    """The name of the run that tries this rate."""
    return f"choice, {arm}, rate {lr:g}"


def whose(arm: str) -> str:
    """The arm whose choice of rate this arm takes."""
    return {"shuffled guide": "untrained guide", "distilled scores": "trained guide"}.get(arm, arm)


def chosen(numbers: Numbers, arm: str) -> float:
    """The rate with the higher validation accuracy; the larger where both tie."""
    return max(RATES, key=lambda lr: (numbers[choice(whose(arm), lr)]["100"]["val_accuracy"], lr))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str, metric: str = "accuracy") -> list[float]:
        return [100 * value for value in column(numbers, arm, metric)]

    def gain(a: str, b: str) -> Any:
        return paired(f"{a} - {b} [points of test accuracy]", points(a), points(b))

    names = ("unguided", "untrained guide", "trained guide", "shuffled guide", "distilled scores", "he and warm-up")
    main, shuffled, trained = gain("untrained guide", "unguided"), gain("shuffled guide", "unguided"), gain("trained guide", "untrained guide")
    told = [gain("distilled scores", "unguided"), gain("he and warm-up", "unguided"), gain("untrained guide", "he and warm-up")]
    facts: dict[str, float] = {}
    for arm in names:
        facts |= {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for metric in ("accuracy", "train_accuracy", "log_loss", "train_log_loss")}
        facts[f"{arm}: rate"] = chosen(numbers, arm)
    for arm in ("untrained guide", "trained guide", "shuffled guide"):
        facts |= {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for metric in ("cka_first", "cka_last")}
    comparisons = [main, shuffled, trained, *told, facts]
    if main.high < 3:
        return "contradicted", comparisons
    if main.mean >= 10 and main.low > 0 and shuffled.mean < 3 and trained.mean >= -1:
        return "supported", comparisons
    return "inconclusive", comparisons
