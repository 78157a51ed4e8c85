"""MaDL: with a crowd of which most copy one guesser, weighting the annotators by how alike they are keeps the classifier right."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data, load
from convince.data_quality.madl import MaDL, answers_with, average_labels, drop_labels, majority_vote, stress
from convince.fit.loop import fit, soft_cross_entropy
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.parts import Card
from convince.types import Batch, Out, Stage

SAYS = (
    "A classifier trained by MaDL on the labels of many unreliable annotators is better than one trained on votes, also where most annotators are copies "
    "of one who guesses at random; weighting annotators by how alike they are is what helps there."
)
SUPPORTED = (
    "With 10 usual annotators and 90 copies of a guesser: MaDL - majority vote is at least +5 points of test accuracy and MaDL - MaDL without weights at "
    "least +1 point, both 95 % paired t intervals above 0, and the learnt accuracies of the 10 usual ones and the guesser agree with the true ones "
    "(Spearman at least 0.8, mean over seeds). And on the clean control (the 10 usual ones alone) all methods lie within 2 points in the mean."
)
CONTRADICTED = "The interval of MaDL - MaDL without weights lies below 0, or that of MaDL - majority vote does."
BUDGET = (
    "digits (scikit-learn) as a table, 1,437 / 360; 10 annotators right with 0.9 on three classes each and 0.5 elsewhere, and 90 copies of one random "
    "guesser; 80 % of all labels missing; mlp 64-128-10, AdamW 5e-3 (weight decay 1e-4), cosine, batch 64, 30 epochs; 4 paired seeds (annotators, missing "
    "labels, split, weights). Arms: MaDL, MaDL without weights, CrowdLayer (a matrix an annotator after the scores, started at the identity), majority "
    "vote, average soft labels, and the true labels for reference; the clean control without CrowdLayer's reference. Reduced against the catalogue: 4 of 6 "
    "seeds. True accuracies are measured on the labels that were given."
)
MODEL = "mlp:hidden=(128,)"
ARMS = ("madl", "madl without weights", "crowd layer", "majority vote", "soft labels")


@final
class Taught(Technique):
    """Training on given targets [N k]; rows whose targets are 0 are left out."""

    def __init__(self, targets: Tensor) -> None:
        self.targets = targets

    def stage(self, run: Run, i: int) -> Stage | None:
        rows = run.data.split.train
        rows = rows[self.targets[rows].sum(1) > 0]
        return Stage("train", run.settings.epochs or 0, index=rows, targets=self.targets, objective=soft_cross_entropy) if i == 0 else None


@final
class CrowdLayer(Technique):
    """One k x k matrix an annotator turns the probabilities into scores of that annotator's labels."""

    def on_start(self, run: Run) -> None:
        m = run.data.extra["annotators"].shape[1]
        layer = nn.Module()
        layer.matrices = nn.Parameter(torch.eye(run.k).repeat(m, 1, 1))
        run.extra["crowd"] = layer

    def stage(self, run: Run, i: int) -> Stage | None:
        rows = run.data.split.train
        rows = rows[(run.data.extra["annotators"][rows] >= 0).any(1)]
        return Stage("train", run.settings.epochs or 0, index=rows) if i == 0 else None

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        assert out.logits is not None
        z = batch.extra["annotators"]
        scores = torch.einsum("nc,mck->nmk", out.logits.softmax(1), run.extra["crowd"].matrices)
        return F.cross_entropy(scores.flatten(0, 1), z.flatten(), ignore_index=-1)


@final
class AdamW(Technique):
    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW([p for _, p in params], lr=5e-3, weight_decay=1e-4)


def crowd(seed: int, clean: bool, rows: int | None) -> Data:
    """Digits as a table with the annotators of this seed; the usual ten are the same with and without the copies."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    data = load(x[:rows], y[:rows], val=0.0, test=0.2, seed=seed)
    gen = generator(seed, "annotators")
    strong = torch.stack([torch.randperm(10, generator=gen) < 3 for _ in range(10)])
    z = answers_with(torch.where(strong[:, data.y].T, 0.9, 0.5), data.y, 10, gen)
    if not clean:
        z = stress(z, 10, gen, "rand_dep")
    return dataclasses.replace(data, extra={"annotators": drop_labels(z, 0.8, gen)})


def technique(arm: str, data: Data, seed: int) -> Technique:
    z = data.extra["annotators"]
    votes = majority_vote(z, data.k, generator(seed, "ties"))
    return {
        "madl": lambda: MaDL(),
        "madl without weights": lambda: MaDL(weighted=False),
        "crowd layer": CrowdLayer,
        "majority vote": lambda: Taught(F.one_hot(votes.clamp_min(0), data.k).float() * (votes >= 0)[:, None]),
        "soft labels": lambda: Taught(average_labels(z, data.k)),
        "true labels": lambda: Taught(F.one_hot(data.y, data.k).float()),
    }[arm]()


def cell(arm: str, seed: int, clean: bool, smoke: bool) -> dict[str, float]:
    data = crowd(seed, clean, 200 if smoke else None)
    run = prepare(settings(model=MODEL, epochs=1 if smoke else 30, batch=64, augment="none", precision="fp32", seed=seed), data)
    made = technique(arm, data, seed)
    cards = [Card(part="arm", kind="technique", title=arm), Card(part="zz-adamw", kind="technique", title="AdamW")]
    run.team = Team([Seat(cards[0], {}, made), Seat(cards[1], {}, AdamW())])
    fit(run)
    found = {"accuracy": run.evaluate("test").accuracy}
    if isinstance(made, MaDL) and not clean:
        found["spearman"] = agreement(run, made)
    return found


def agreement(run: Run, made: MaDL) -> float:
    """Spearman's rank correlation of learnt and true accuracies: the usual ten and the guesser."""
    from scipy.stats import spearmanr

    rows, z = run.data.split.train, run.data.extra["annotators"]
    learnt = made.annotator_accuracy(run, run.plan.pixels(run.data.x.take(rows[:512]))).mean(0)[:11]
    given = z[rows, :11] >= 0
    true = ((z[rows, :11] == run.data.y[rows, None]) & given).sum(0) / given.sum(0).clamp_min(1)
    return float(spearmanr(learnt.numpy(), true.numpy()).statistic)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    for seed in range(2 if smoke else 4):
        for arm in (*ARMS, "true labels"):
            bench.arm(arm, seed, lambda arm=arm, seed=seed: cell(arm, seed, False, smoke))  # type: ignore[misc]
        for arm in ARMS:
            bench.arm(f"clean, {arm}", seed, lambda arm=arm, seed=seed: cell(arm, seed, True, smoke))  # type: ignore[misc]


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str) -> list[float]:
        return [100 * value for value in column(numbers, arm, "accuracy")]

    def gain(a: str, b: str) -> Any:
        return paired(f"{a} - {b} [points of accuracy]", points(a), points(b))

    vote, weights = gain("madl", "majority vote"), gain("madl", "madl without weights")
    rank = statistics.fmean(column(numbers, "madl", "spearman"))
    clean = {arm: statistics.fmean(points(f"clean, {arm}")) for arm in ARMS}
    spread = max(clean.values()) - min(clean.values())
    rows: list[Any] = [vote, weights, gain("madl", "crowd layer"), gain("madl", "soft labels"), gain("madl", "true labels")]
    rows += [gain("clean, madl", f"clean, {arm}") for arm in ARMS[1:]]
    rows += [
        {"what": "Spearman of learnt and true accuracies of annotators, mean over seeds", "value": rank},
        {"what": "clean control: best - worst method [points of accuracy]", "value": spread},
    ]
    if weights.high < 0 or vote.high < 0:
        return "contradicted", rows
    if vote.mean >= 5 and vote.low > 0 and weights.mean >= 1 and weights.low > 0 and rank >= 0.8 and spread <= 2:
        return "supported", rows
    return "inconclusive", rows
