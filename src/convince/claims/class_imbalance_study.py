"""Class imbalance: it harms, oversampling is the cure to take, and dividing by the priors repairs the accuracy."""

from __future__ import annotations

import functools
from typing import Any, cast

from torch import nn

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data
from convince.data_quality.class_imbalance_study import balanced_accuracy, make_imbalance, multiclass_auc, same_steps
from convince.fit.answer import Scores, score
from convince.fit.randomness import generator
from convince.fit.train import Trained

SAYS = (
    "Unequal class sizes harm a convolutional network; oversampling to full balance is the method to take and does not make it overfit, "
    "undersampling loses where the imbalance is large, and dividing the probabilities by the priors repairs the accuracy."
)
SUPPORTED = (
    "At rho = 50: oversample - none >= 0 in multi-class AUC with the 95 % paired t interval's lower end above -0.002; oversample - undersample in "
    "AUC with the interval above 0; threshold - none at least +2 points of accuracy with the interval above 0; the balanced control above none in "
    "AUC; and the gap between training and test accuracy of oversample within 5 points of that of none."
)
CONTRADICTED = "At rho = 50: the upper end of oversample - none in AUC lies below 0, or the interval of threshold - none in accuracy lies below 0."
BUDGET = (
    "fashion-mnist, step imbalance mu = 0.5, 500 images a large class, rho 10 and 50 (50 and 10 images a small class), 4,000 balanced test "
    "images, CNN 16-32-64, the same number of steps in every arm (10 epochs of the unequal set, batch 64), 5 paired seeds; which classes are "
    "small varies with the seed. rho 50: none, oversample, undersample, two-phase, threshold, cost-sensitive, and a balanced set of the same "
    "total size; rho 10: the first three and threshold. threshold is the answer of none's own network, divided by the priors. Against the "
    "catalogue: 500 of 1,000 images a large class, 4,000 of 10,000 test images, and at rho 10 three arms fewer. The gap is accuracy on the "
    "unequal training set, each image once, less accuracy on the test images."
)
ARMS = {
    "oversample": ("oversampling",),
    "undersample": ("undersampling",),
    "two-phase": ("two-phase",),
    "cost-sensitive": ("cost-sensitive",),
    "balanced": (),
}


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    majority, test, epochs, seeds, batch = (20, 50, 1, 2, 16) if smoke else (500, 4000, 10, 5, 64)
    name, model, pool = ("digits", "small-cnn:widths=(4,8)", 300) if smoke else ("fashion-mnist", "small-cnn", 10_000)

    @functools.cache
    def drawn(rho: int, seed: int) -> tuple[Data, Data]:
        """The unequal set, and a balanced one of about the same size, from the same pool."""
        whole = bench.data(name, train=pool, test=test, seed=seed)
        rows = whole.split.train
        kept = make_imbalance(whole.y[rows], "step", rho, 0.5, generator(seed, "class-imbalance-study"), majority)
        each = round(len(kept) / whole.k)
        equal = make_imbalance(whole.y[rows], "step", 1, 0.5, generator(seed, "class-imbalance-study"), each)
        return whole.subset(rows[kept]), whole.subset(rows[equal])

    def trained(rho: int, seed: int, parts: tuple[str, ...], balanced: bool = False) -> Trained:
        unequal, equal = drawn(rho, seed)
        steps = epochs * max(len(unequal.split.train) // batch, 1)
        data = equal if balanced else unequal
        length = same_steps(steps, data.y[data.split.train], parts, batch)
        return bench.train(data, model=model, parts=parts, batch=batch, lr=0.05, seed=seed, **length)

    @functools.cache
    def plain(rho: int, seed: int) -> Trained:
        """One network for none and threshold: the part changes the answer alone."""
        return trained(rho, seed, ("prior-thresholding",))

    def none(rho: int, seed: int) -> dict[str, float]:
        found = plain(rho, seed)
        bare = cast(nn.Module, found.answer.answer)
        test, train = (score(bare, found.data, rows, found.run.plan) for rows in (found.data.split.test, found.data.split.train))
        return _numbers(test, train)

    def own(found: Trained) -> dict[str, float]:
        return _numbers(found.run.evaluate("test"), found.run.evaluate("train"))

    for seed in range(seeds):
        for rho in (50, 10):
            bench.arm(f"none {rho}", seed, lambda rho=rho, seed=seed: none(rho, seed))  # type: ignore[misc]
            bench.arm(f"threshold {rho}", seed, lambda rho=rho, seed=seed: own(plain(rho, seed)))  # type: ignore[misc]
            for arm, parts in ARMS.items():
                if rho == 50 or arm in ("oversample", "undersample"):
                    bench.arm(f"{arm} {rho}", seed, lambda a=arm, p=parts, rho=rho, seed=seed: own(trained(rho, seed, p, a == "balanced")))  # type: ignore[misc]
        drawn.cache_clear()
        plain.cache_clear()


def _numbers(test: Scores, train: Scores) -> dict[str, float]:
    accuracy = balanced_accuracy(test.predicted, test.y)
    return {"auc": multiclass_auc(test.probs, test.y), "accuracy": accuracy, "gap": train.accuracy - test.accuracy}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def difference(metric: str, a: str, b: str, unit: str, scale: float = 1.0) -> Any:
        columns = [[scale * value for value in column(numbers, arm, metric)] for arm in (a, b)]
        return paired(f"{a} - {b} [{unit}]", *columns)

    auc, points = "multi-class AUC", "points of balanced accuracy"
    over = difference("auc", "oversample 50", "none 50", auc)
    under = difference("auc", "oversample 50", "undersample 50", auc)
    threshold = difference("accuracy", "threshold 50", "none 50", points, 100)
    control = difference("auc", "balanced 50", "none 50", auc)
    gap = difference("gap", "oversample 50", "none 50", "points of train - test accuracy", 100)
    told = [difference("auc", f"{arm} 50", "none 50", auc) for arm in ("undersample", "two-phase", "threshold", "cost-sensitive")]
    told += [difference("accuracy", f"{arm} 50", "none 50", points, 100) for arm in ARMS]
    told += [difference("auc", f"{arm} 10", "none 10", auc) for arm in ("oversample", "undersample")]
    told += [difference("accuracy", f"{arm} 10", "none 10", points, 100) for arm in ("oversample", "undersample", "threshold")]
    comparisons = [over, under, threshold, control, gap, *told]
    if over.high < 0 or threshold.high < 0:
        return "contradicted", comparisons
    holds = over.mean >= 0 and over.low > -0.002 and under.low > 0 and threshold.mean >= 2 and threshold.low > 0
    holds = holds and control.mean > 0 and gap.mean <= 5
    return "supported" if holds else "inconclusive", comparisons
