"""CPC v2: a network that first predicted patches of unlabelled images from those beside them needs fewer labels."""

from __future__ import annotations

import functools
import statistics
from typing import Any, final

import torch
from torch import Tensor

from convince.claims import Bench, Numbers, column, paired
from convince.claims.spark import ADAMW, finetune
from convince.data import Data
from convince.fit.loop import fit
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.pretrain.cpc_v2 import CARD, CPCv2
from convince.types import Stage

SAYS = (
    "A network that was taught, without labels, to tell the code of a patch from those of other patches by what lies above it is better with few "
    "labels than one that starts from random weights: it needs two to five times fewer of them."
)
SUPPORTED = (
    "With 10 labels a class: CPC - from scratch is at least +5 points of test accuracy in the mean with the 95 % paired t interval over seeds above 0, "
    "and CPC - the same with patches in random places (nothing to learn, same work) is above 0 in the mean."
)
CONTRADICTED = "With 10 labels a class CPC - from scratch is at or below 0 in the mean."
BUDGET = (
    "mnist, 2,400 images without labels, small-cnn of widths 16, 32 and 64, 6 x 6 patches of 8 px every 4, context width 32, 2 and 3 rows ahead, down "
    "and up, patches augmented, 3 epochs of AdamW at 1e-3 in batches of 32 (7,200 passes); then 10 labels a class, 2 draws (their mean is a seed's "
    "number), 60 steps of batch 50 with SGD at 0.1 in every arm, 1,000 test images; 4 paired seeds; the labels that scratch needs are read from 10, 20 "
    "and 50 a class. Against the catalogue: 2,400 of 10,000 images, batches of 32, 2 of 5 draws, 1,000 of 10,000 test images, a BatchNorm network that is "
    "normalised by patch in the pretext, no augmentation in the fine-tuning; 4 instead of 3 seeds."
)


@final
class Scattered(Technique):
    """CPC v2 with all patches of a batch in random places: the same work, nothing to learn."""

    def __init__(self, inner: CPCv2) -> None:
        self.inner = inner

    def on_start(self, run: Run) -> None:
        self.inner.on_start(run)

    def before(self, run: Run) -> list[Stage]:
        return self.inner.before(run)

    def on_batch(self, run: Run) -> None:
        self.inner.on_batch(run)
        if run.stage.name == "cpc-v2":
            run.batch.x = run.batch.x[torch.randperm(len(run.batch.x), generator=run.gen("scattered")).to(run.batch.x.device)]

    def around_grad(self, run: Run, grad: Any) -> None:
        self.inner.around_grad(run, grad)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, pool, test, epochs, steps, seeds = ("digits", 60, 40, 1, 3, 2) if smoke else ("mnist", 2400, 1000, 3, 60, 4)
    model = "small-cnn:widths=(8,)" if smoke else "small-cnn"

    @functools.cache
    def drawn(seed: int) -> Data:
        return bench.data(name, train=pool, test=test, seed=seed)

    def few(seed: int, size: int, draw: int) -> Tensor:
        data = drawn(seed)
        rows = data.split.train
        return torch.cat([rows[data.y[rows] == c].roll(-draw * size)[:size] for c in range(data.k)])

    def cell(arm: str, seed: int) -> dict[str, float]:
        found: dict[str, float] = {}
        weights: dict[str, Tensor] = {}
        sizes = (2, 3, 4) if smoke else (10, 20, 50)
        if arm != "scratch":
            technique = CPCv2(epochs=epochs, directions=2, steps_to_ignore=1, width=32)
            run = prepare(settings(model=model, epochs=0, batch=32, augment="none", seed=seed), drawn(seed))
            run.team = Team([Seat(CARD, {}, technique if arm == "cpc" else Scattered(technique)), ADAMW])
            fit(run)
            weights = {n: t for n, t in run.model.state_dict().items() if not n.startswith("fc.")}
            found["told"] = technique.accuracy(run, run.data.split.test[:64])[0]
        for size, label in zip(sizes, (10, 20, 50), strict=True):
            if label == 10 or arm == "scratch":
                draws = 2 if label == 10 else 1
                found[f"accuracy_{label}"] = statistics.fmean(
                    finetune(weights, drawn(seed), few(seed, size, draw), model, steps, seed) for draw in range(draws)
                )
        return found

    for seed in range(seeds):
        for arm in ("cpc", "scratch", "scattered"):
            bench.arm(arm, seed, lambda arm=arm, seed=seed: cell(arm, seed))  # type: ignore[misc]
        drawn.cache_clear()


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str, label: int = 10) -> list[float]:
        return [100 * value for value in column(numbers, arm, f"accuracy_{label}")]

    unit = "[points of accuracy]"
    scratch = paired(f"CPC - from scratch, 10 labels a class {unit}", points("cpc"), points("scratch"))
    control = paired(f"CPC - patches in random places, 10 labels a class {unit}", points("cpc"), points("scattered"))
    facts = {f"from scratch, {label} labels a class {unit}": statistics.fmean(points("scratch", label)) for label in (10, 20, 50)}
    facts |= {f"{arm}, 10 labels a class {unit}": statistics.fmean(points(arm)) for arm in ("cpc", "scattered")}
    facts |= {f"right patch of 2,304, {arm} [share]": statistics.fmean(column(numbers, arm, "told")) for arm in ("cpc", "scattered")}
    comparisons = [scratch, control, facts]
    if scratch.mean <= 0:
        return "contradicted", comparisons
    return "supported" if scratch.mean >= 5 and scratch.low > 0 and control.mean > 0 else "inconclusive", comparisons
