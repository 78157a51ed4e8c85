"""Claim of multi-column networks: the mean of columns beats its columns, and different preprocessing makes it better still."""

from __future__ import annotations

import functools
import statistics
from typing import Any, final

import torch
from torch import Generator, Tensor

from convince.claims import Bench, Numbers, column, paired
from convince.ensemble.mcdnn import column_probs, column_report
from convince.fit.answer import Scores
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team, Technique
from convince.fit.train import prepare
from convince.parts import Card

SAYS = "Averaging columns that are trained on differently normalised digits and on fresh distortions errs far less than one column (MNIST 0.23 %)."
SUPPORTED = (
    "the error of 4 columns on {original, width 10, 14, 18} is at most 0.8 of their mean error, the 95% paired t interval of the difference lies below 0, "
    "and in the mean it is below the error of 4 columns that all see the original"
)
CONTRADICTED = "the mixed ensemble does not err less than its mean column in the mean, or the interval of mixed minus same lies above 0"
BUDGET = (
    "mnist 1,500 train / 300 validation / 2,000 test, the paper's column (76,040 weights), 7 epochs with new distortions in each, batch 32, SGD 0.03 with "
    "Nesterov momentum and a cosine; 4 paired seeds of split, weights and order. Mixed and same: 4 columns each. Control: 4 columns with equal initial "
    "weights and distortions in another order of images only, reported with its gain over its mean column. Reduced against the catalogue: 6,000/10,000 "
    "images, 8 epochs, 5 seeds, Adam"
)
TRAINING = {"model": "mcdnn-column", "batch": 32, "lr": 0.03, "augment": "none"}


@final
class Reordered(Technique):
    """The images of each epoch in an order of its own; all else as the seed has it."""

    def __init__(self, number: int) -> None:
        self.number = number

    def order(self, run: Run, index: Tensor, gen: Generator) -> Tensor:
        return index[torch.randperm(len(index), generator=generator(run.seed, "reordered", self.number, run.epoch))]


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    train, val, test, epochs, seeds = (48, 20, 40, 1, 2) if smoke else (1500, 300, 2000, 7, 4)
    name = "digits" if smoke else "mnist"

    @functools.cache
    def drawn(seed: int) -> Any:
        return bench.data(name, train=train, val=val, test=test, seed=seed)

    @functools.cache
    def ensemble(seed: int, part: str) -> Run:
        return bench.train(drawn(seed), parts=(part,), epochs=epochs, seed=seed, **TRAINING).run

    def of(seed: int, part: str) -> dict[str, float]:
        probs, y = column_probs(ensemble(seed, part), "test")
        held, truth = column_probs(ensemble(seed, part), "val")
        chosen = int((held.argmax(2) == truth).double().mean(1).argmax())
        found = column_report(probs, y)
        return {**found, "chosen": found[f"column_{chosen}"]}

    def mixed(seed: int) -> dict[str, float]:
        views = "('width-3','width-4','width-5')" if smoke else "('width-10','width-14','width-18')"
        return of(seed, f"mcdnn:views={views}")

    def same(seed: int) -> dict[str, float]:
        return of(seed, "mcdnn:views=(),nets=4")

    def reordered(seed: int) -> dict[str, float]:
        scores: list[Scores] = []
        for number in range(4):
            run = prepare(settings(parts=("simard-distortion",), epochs=epochs, seed=seed, **TRAINING), drawn(seed))
            if number:
                card = Card(part="reordered", kind="technique", title="another order")
                run.team = Team([*run.team.seats, Seat(card, {}, Reordered(number))])
            fit(run)
            scores.append(run.evaluate("test"))
        return column_report(torch.stack([each.probs for each in scores]), scores[0].y)

    for seed in range(seeds):
        bench.arm("mixed", seed, functools.partial(mixed, seed))
        bench.arm("same", seed, functools.partial(same, seed))
        bench.arm("order only", seed, functools.partial(reordered, seed))
        ensemble.cache_clear()
        drawn.cache_clear()


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str, metric: str) -> list[float]:
        return [100 * value for value in column(numbers, arm, metric)]

    unit = "[points of error]"
    gains = {arm: paired(f"{arm}: ensemble - mean column {unit}", points(arm, "ensemble"), points(arm, "mean")) for arm in ("mixed", "same", "order only")}
    against = paired(f"mixed - same {unit}", points("mixed", "ensemble"), points("same", "ensemble"))
    best = paired(f"mixed - its column best on validation {unit}", points("mixed", "ensemble"), points("mixed", "chosen"))
    ratio = statistics.fmean(points("mixed", "ensemble")) / max(statistics.fmean(points("mixed", "mean")), 1e-9)
    facts: dict[str, float] = {"mixed error / mean column error": ratio}
    for arm in gains:
        facts |= {f"{arm}: {metric}": statistics.fmean(column(numbers, arm, metric)) for metric in ("mean", "ensemble", "shared", "second_guess")}
    facts["order only gains less than mixed"] = float(gains["order only"].mean > gains["mixed"].mean)
    comparisons = [*gains.values(), against, best, facts]
    if gains["mixed"].mean >= 0 or against.low > 0:
        return "contradicted", comparisons
    return "supported" if ratio <= 0.8 and gains["mixed"].high < 0 and against.mean < 0 else "inconclusive", comparisons
