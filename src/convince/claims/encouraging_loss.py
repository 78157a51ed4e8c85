"""Claim of encouraging-loss: rewarding examples that are right already widens margins and costs no accuracy; halting them narrows margins."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from convince.claims import Bench, Numbers, column, paired
from convince.fit.answer import logits_of
from convince.losses.encouraging_loss import margin

SAYS = (
    "The bonus log(1 - p) on the true class's probability widens the margins of a network at equal accuracy; stopping the loss of sure examples narrows them."
)
SUPPORTED = (
    "the scale-free margin (median over test images of the margin over the standard deviation of the image's logits) of the encouraging loss is at least 1.1 "
    "times cross-entropy's in the mean with the 95 % paired t interval of the difference above 0, its accuracy is at least cross-entropy's - 0.2 points with "
    "the lower end above -0.7, and the margin of the halted loss lies below cross-entropy's with its interval below 0."
)
CONTRADICTED = (
    "the interval of the margin's difference, encouraging loss - cross-entropy, lies below 0, or the halted loss's margin is not below cross-entropy's in the "
    "mean, or the accuracy difference's upper end is below -0.2 points."
)
BUDGET = (
    "fashion-mnist, 4,000 training, 1,000 validation and 3,000 test images, mnist's 1,000 test images as foreign ones, a 3-block CNN (16-32-64), SGD 0.1, "
    "batch 64, 6 epochs, 8 paired seeds, 3 arms: cross-entropy, encouraging loss (log_end 0.75), halted loss (threshold 0.9). Control without training: "
    "cross-entropy's logits times the constant that gives them the encouraging loss's median raw margin on validation images; its margin is the same by "
    "construction, its AUROC and log-loss are reported. Reduced against the catalogue: 4,000 of 8,000 training and 3,000 of 10,000 test images, 6 of 8 epochs."
)
ARMS = {"cross-entropy": (), "encouraging": ("encouraging-loss:log_end=0.75",), "halted": ("halted-loss:threshold=0.9",)}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, val, test, epochs, seeds = ("digits", 64, 32, 64, 1, 2) if small else ("fashion-mnist", 4000, 1000, 3000, 6, 8)
    model = "small-cnn:widths=(4,8)" if small else "small-cnn"
    for seed in range(seeds):
        data = bench.data(name, train=train, val=val, test=test, seed=seed)
        foreign = foreign_pixels(bench, small, seed)
        how = {"model": model, "epochs": epochs, "batch": 64, "lr": 0.1, "seed": seed}
        bench.arm("encouraging", seed, partial(cell, bench, data, foreign, how, "encouraging", 1.0))
        target = bench.numbers["encouraging"][str(seed)]["raw_margin_val"]
        bench.arm("cross-entropy", seed, partial(cell, bench, data, foreign, how, "cross-entropy", target))
        bench.arm("halted", seed, partial(cell, bench, data, foreign, how, "halted", 1.0))


def foreign_pixels(bench: Bench, small: bool, seed: int) -> Tensor:
    """Images of another set, of the same size: mnist beside fashion-mnist; in the smoke test noise."""
    if small:
        return torch.randint(0, 256, (32, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    data = bench.data("mnist", train=100, test=1000, seed=seed)
    return data.x.take(data.split.test)


def cell(bench: Bench, data: Any, foreign: Tensor, how: dict[str, Any], arm: str, target: float) -> dict[str, float]:
    """One training. ``target``: the median raw margin on validation images that the logits are scaled to for the control's numbers."""
    done = bench.train(data, parts=ARMS[arm], **how)

    def logits(x: Tensor) -> Tensor:
        return logits_of(done.answer, x, done.run.plan)

    z, unlike = logits(data.x.take(data.split.test)), logits(foreign)
    y, held = (F.one_hot(data.y[rows], data.k).to(z) for rows in (data.split.test, data.split.val))
    raw = float(margin(logits(data.x.take(data.split.val)), held).median())
    by = target / raw if raw > 0 and target > 0 else 1.0
    return {
        "accuracy": 100 * done.test.accuracy,
        "margin": float((margin(z, y) / z.std(1)).median()),
        "raw_margin": float(margin(z, y).median()),
        "raw_margin_val": raw,
        "auroc": auroc(z, unlike),
        "log_loss": float(F.cross_entropy(z, y)),
        "scaled_by": by,
        "scaled_auroc": auroc(z * by, unlike * by),
        "scaled_log_loss": float(F.cross_entropy(z * by, y)),
    }


def auroc(z: Tensor, unlike: Tensor) -> float:
    """Chance that an image of the set has a higher largest probability than a foreign one."""
    from sklearn.metrics import roc_auc_score

    own, other = (part.double().log_softmax(1).max(1).values for part in (z, unlike))
    return float(roc_auc_score([1] * len(own) + [0] * len(other), torch.cat([own, other]).numpy()))


def judge(numbers: Numbers) -> tuple[str, list]:
    def against(arm: str, metric: str, baseline: str | None = None) -> Any:
        other = baseline or metric
        return paired(f"{metric}, {arm} - cross-entropy ({other})", column(numbers, arm, metric), column(numbers, "cross-entropy", other))

    wider, accuracy, narrower = against("encouraging", "margin"), against("encouraging", "accuracy"), against("halted", "margin")
    means = {arm: sum(column(numbers, arm, "margin")) / len(numbers[arm]) for arm in ARMS}
    ratio = means["encouraging"] / means["cross-entropy"]
    comparisons = [
        wider,
        accuracy,
        narrower,
        against("halted", "accuracy"),
        against("encouraging", "raw_margin"),
        against("encouraging", "auroc"),
        against("encouraging", "auroc", "scaled_auroc"),
        against("halted", "auroc"),
        against("encouraging", "log_loss"),
        against("encouraging", "log_loss", "scaled_log_loss"),
        {"what": "scale-free margin, encouraging / cross-entropy", "value": ratio},
        *({"what": f"scale-free margin of {arm}", "value": value} for arm, value in means.items()),
    ]
    if wider.high < 0 or narrower.mean >= 0 or accuracy.high < -0.2:
        return "contradicted", comparisons
    if ratio >= 1.1 and wider.low > 0 and accuracy.mean >= -0.2 and accuracy.low > -0.7 and narrower.high < 0:
        return "supported", comparisons
    return "inconclusive", comparisons
