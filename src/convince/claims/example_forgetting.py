"""Example forgetting: half of the data is enough when the forgotten half is kept, and the score is a property of the sample."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from typing import Any

import torch
from torch import Tensor

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data, MemoryStore, Preprocess
from convince.data_quality.example_forgetting import noisy_label_check, prune_by_forgetting, random_prune, transfer
from convince.fit.randomness import generator
from convince.types import Split

SAYS = (
    "Samples that are never forgotten in training can be dropped with little loss: half of the data, kept by most forgotten, beats a random half. "
    "The scores agree across seeds and networks, and wrongly labelled samples are forgotten more."
)
SUPPORTED = (
    "With 50 % kept, most forgotten - random is at least +0.7 points of test accuracy with the 95 % paired t interval above 0, most forgotten is "
    "within 1.5 points of the full set, and least forgotten is below random; and Spearman's correlation of the scores is at least 0.5 between two "
    "seeds and 0.3 between CNN and MLP, and the score finds 10 % flipped labels with an area under the ROC curve of at least 0.8."
)
CONTRADICTED = "With 50 % kept, the interval of most forgotten - random lies below 0."
BUDGET = (
    "fashion-mnist, 6,000 train and 5,000 test images, CNN 16-32-64. Scores from 12 epochs, summed over seeds 100 and 101, which train nothing "
    "else. Then 5 paired seeds (init, order, ties, random half) x 4 arms (full, most, random and least forgotten half), each as many steps as 8 "
    "epochs of the full set. Against the catalogue: 6,000 of 8,000 training and 5,000 of 10,000 test images, 8 of 10 epochs, 5 of 6 seeds, and 30 "
    "% kept (report only) is left out."
)
KEEP = {"most forgotten": "most-forgotten", "least forgotten": "least-forgotten"}


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    name, train, test, epochs, retrain, seeds = ("digits", 96, 60, 2, 1, 2) if smoke else ("fashion-mnist", 6000, 5000, 12, 8, 5)
    model, batch, lr = "small-cnn:widths=(4,8)" if smoke else "small-cnn", 16 if smoke else 64, 0.1
    data = bench.data(name, train=train, test=test, seed=0)
    rows = data.split.train
    steps = retrain * (len(rows) // batch)
    flipped = torch.rand(len(rows), generator=generator("example-forgetting", "flip")) < 0.1

    @functools.cache
    def scores(what: str, seed: int) -> Tensor:
        """Scores of the training rows, in the order of ``rows``, from a run that is used for nothing else."""
        given: Data = {"cnn": alone, "mlp": table, "noise": noise}[what](data, rows, flipped)
        chosen = "mlp" if what == "mlp" else model
        run = bench.train(given, model=chosen, parts=("example-forgetting",), epochs=epochs, batch=batch, lr=0.02 if what == "mlp" else lr, seed=seed).run
        return run.team.seats[0].technique.tracker.scores().nan_to_num(0)  # a row that every epoch's cut-off last batch left out

    def summed() -> Tensor:
        return scores("cnn", 100) + scores("cnn", 101)

    def agreement() -> dict[str, float]:
        seeds, nets = transfer(scores("cnn", 100), scores("cnn", 101)), transfer(summed(), scores("mlp", 100))
        share = float((scores("cnn", 100) == 0).double().mean())
        return {"seeds": seeds.spearman, "seeds_overlap": seeds.overlap, "cnn_mlp": nets.spearman, "unforgettable": share}

    def retrained(kept: Tensor, seed: int) -> dict[str, float]:
        found = bench.train(data.subset(rows[kept]), model=model, steps=steps, batch=batch, lr=lr, seed=seed).test
        return {"accuracy": found.accuracy, "log_loss": found.log_loss}

    def arm(who: str, seed: int) -> Tensor:
        gen = generator("example-forgetting", "prune", seed)
        if who == "full":
            return torch.arange(len(rows))
        if who == "random":
            return random_prune(len(rows), 0.5, gen)
        return prune_by_forgetting(summed(), 0.5, gen, keep=KEEP[who])

    bench.arm("agreement", 0, agreement)
    bench.arm("noise", 0, lambda: {"auroc": noisy_label_check(scores("noise", 100), flipped)})
    for seed in range(seeds):
        for who in ("full", "most forgotten", "random", "least forgotten"):
            bench.arm(who, seed, lambda who=who, seed=seed: retrained(arm(who, seed), seed))  # type: ignore[misc]


def alone(data: Data, rows: Tensor, flipped: Tensor) -> Data:
    """The training rows only, numbered from 0."""
    none = rows[:0]
    return dataclasses.replace(
        data, x=MemoryStore(data.x.take(rows)), y=data.y[rows], split=Split(torch.arange(len(rows)), none, none), names=None, hashes=None, sums=None
    )


def noise(data: Data, rows: Tensor, flipped: Tensor) -> Data:
    """The same with the ``flipped`` labels moved to another class."""
    made = alone(data, rows, flipped)
    step = torch.randint(1, data.k, (len(rows),), generator=generator("example-forgetting", "step"))
    return dataclasses.replace(made, y=torch.where(flipped, (made.y + step) % data.k, made.y))


def table(data: Data, rows: Tensor, flipped: Tensor) -> Data:
    """The same as a table of pixels, for the MLP."""
    made = alone(data, rows, flipped)
    x = made.x.take(torch.arange(len(rows))).flatten(1).float() / 255
    d = x.shape[1]
    return dataclasses.replace(made, x=MemoryStore(x), preprocess=Preprocess("table", d, (), "", (0.0,) * d, (1.0,) * d)).measured()


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str) -> list[float]:
        return [100 * value for value in column(numbers, arm, "accuracy")]

    gain = paired("most forgotten - random, 50 % kept [points of accuracy]", points("most forgotten"), points("random"))
    loss = paired("most forgotten, 50 % kept - full set [points of accuracy]", points("most forgotten"), points("full"))
    control = paired("least forgotten - random, 50 % kept [points of accuracy]", points("least forgotten"), points("random"))
    same, noise = numbers["agreement"]["0"], numbers["noise"]["0"]["auroc"]
    facts = {
        "Spearman between two seeds": same["seeds"],
        "Spearman between CNN and MLP": same["cnn_mlp"],
        "unforgettable share, one run": same["unforgettable"],
        "area under the ROC curve for 10 % flipped labels": noise,
        "accuracy, full set [points]": statistics.fmean(points("full")),
    }
    comparisons = [gain, loss, control, facts]
    if gain.high < 0:
        return "contradicted", comparisons
    holds = gain.mean >= 0.7 and gain.low > 0 and loss.mean >= -1.5 and control.mean < 0
    holds = holds and same["seeds"] >= 0.5 and same["cnn_mlp"] >= 0.3 and noise >= 0.8
    return "supported" if holds else "inconclusive", comparisons
