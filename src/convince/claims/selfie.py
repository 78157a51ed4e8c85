"""Selfie: a network that first put hidden patches back into unlabelled images needs fewer labels."""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any, final

import torch
from torch import Tensor

from convince.claims import Bench, Numbers, column, paired
from convince.claims.spark import finetune
from convince.data import Data
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.pretrain.selfie import CARD, Selfie
from convince.types import Stage

SAYS = (
    "A network whose first stages were taught, without labels, to choose the right patch for a hole among other patches of the same image is better "
    "with few labels than one that starts from random weights, and its results vary less from run to run."
)
SUPPORTED = (
    "With 250 labels: Selfie - from scratch is at least +2 points of test accuracy in the mean with the 95 % paired t interval above 0, and Selfie - "
    "the same without position embeddings (unsolvable, same work) is above 0 in the mean; and the run is valid: the right patch is chosen for at least "
    "0.5 of the holes of unseen images (chance 0.25), without positions for 0.2 to 0.3."
)
CONTRADICTED = "With 250 labels the 95 % interval of Selfie - from scratch lies below 0, in a run that is valid."
BUDGET = (
    "cifar10, 2,400 images without labels, ResNet-8 of widths 8, 16 and 32 whose first two stages see 16 patches of 8 px, 4 of them hidden, codes of "
    "64, one pooling layer, 6 epochs of SGD at 0.05 in batches of 32 (14,400 passes); then 250 labels of the same images, 100 steps of batch 50 with "
    "SGD at 0.1 in every arm, 1,000 test images; 5 paired seeds. Against the catalogue: half the widths, 2,400 of 8,000 images, 6 of 10 epochs, 1,000 of "
    "10,000 test images, no runs with 1,000 labels."
)


@final
class Placeless(Technique):
    """Selfie whose position embeddings are zero and stay so: every hole looks alike, with the same work."""

    def __init__(self, inner: Selfie) -> None:
        self.inner = inner

    def on_start(self, run: Run) -> None:
        self.inner.on_start(run)
        with torch.no_grad():
            run.extra["selfie"].rows.zero_()  # type: ignore[operator]
            run.extra["selfie"].columns.zero_()  # type: ignore[operator]

    def before(self, run: Run) -> list[Stage]:
        (stage,) = self.inner.before(run)
        whole = stage.trainable
        assert whole is not None
        stage.trainable = lambda name: whole(name) and name not in ("extra.selfie.rows", "extra.selfie.columns")
        return [stage]

    def on_batch(self, run: Run) -> None:
        self.inner.on_batch(run)

    def around_grad(self, run: Run, grad: Any) -> None:
        self.inner.around_grad(run, grad)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, pool, test, epochs, steps, seeds = ("digits", 100, 40, 1, 3, 2) if smoke else ("cifar10", 2400, 1000, 6, 100, 5)
    model, size = ("resnet8:widths=(4,8,8)", 20) if smoke else ("resnet8:widths=(8,16,32)", 250)

    @functools.cache
    def drawn(seed: int) -> Data:
        return bench.data(name, train=pool, test=test, seed=seed)

    def cell(arm: str, seed: int) -> dict[str, float]:
        data = drawn(seed)
        rows = data.split.train
        few = torch.cat([rows[data.y[rows] == c][: size // data.k] for c in range(data.k)])
        found: dict[str, float] = {}
        weights: dict[str, Tensor] = {}
        if arm != "scratch":
            technique = Selfie(epochs=epochs, d=64, layers=1)
            run = prepare(settings(model=model, epochs=0, batch=32, lr=0.05, augment="none", seed=seed), data)
            run.team = Team([Seat(CARD, {}, technique if arm == "selfie" else Placeless(technique))])
            fit(run)
            weights = {n: t for n, t in run.model.state_dict().items() if not n.startswith("fc.")}
            found["holes"] = technique.accuracy(run, data.split.test)
        return {**found, "accuracy": finetune(weights, data, few, model, steps, seed)}

    for seed in range(seeds):
        for arm in ("selfie", "scratch", "no positions"):
            bench.arm(arm, seed, lambda arm=arm, seed=seed: cell(arm, seed))  # type: ignore[misc]
        drawn.cache_clear()


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    from scipy.stats import f

    def points(arm: str) -> list[float]:
        return [100 * value for value in column(numbers, arm, "accuracy")]

    unit = "[points of accuracy]"
    scratch = paired(f"Selfie - from scratch, 250 labels {unit}", points("selfie"), points("scratch"))
    control = paired(f"Selfie - without positions, 250 labels {unit}", points("selfie"), points("no positions"))
    told, guessed = (statistics.fmean(column(numbers, arm, "holes")) for arm in ("selfie", "no positions"))
    n = len(points("selfie"))
    spread = statistics.stdev(points("selfie")) / max(statistics.stdev(points("scratch")), 0.01)
    half = math.sqrt(float(f.ppf(0.975, n - 1, n - 1)))
    facts = {"right patch [share of holes]": told, "right patch without positions [share of holes]": guessed}
    facts |= {"spread over seeds, Selfie / from scratch": spread, "its 95 % F interval, low": spread / half, "its 95 % F interval, high": spread * half}
    comparisons = [scratch, control, facts]
    if told < 0.5 or not 0.2 <= guessed <= 0.3:
        return "inconclusive", comparisons
    if scratch.high < 0:
        return "contradicted", comparisons
    return "supported" if scratch.mean >= 2 and scratch.low > 0 and control.mean > 0 else "inconclusive", comparisons
