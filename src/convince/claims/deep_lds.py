"""Claim of deep low-density separation: it labels the unlabelled better than a graph does on the same features."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import numpy as np
import torch

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data, load
from convince.fit.randomness import generator
from convince.training.deep_lds import DeepLds, lds, standardised
from convince.types import Split

SAYS = (
    "With a few labels, a network whose features are separated where samples are rare labels the unlabelled more accurately than the same loop with label "
    "spreading over a graph, and than a network taught by the labels alone."
)
SUPPORTED = (
    "accuracy on the unlabelled samples: at 3 or at 5 labels a class deep-lds - graph hybrid is above 0 with its 95 % paired t interval, and at the other at "
    "least -1 point in the mean; and deep-lds - the network taught by the labels is at least +3 points at both, with the interval above 0"
)
CONTRADICTED = "the interval of deep-lds - graph hybrid lies below 0 at both budgets of labels"
BUDGET = (
    "digits as 64 numbers, 3 and 5 labels a class and 700 unlabelled samples, accuracy on those 700; mlp 64-64-32, 2 rounds, SGD 0.05 cosine, batch 64, 200 "
    "steps a stage (the network taught by labels: 600); 8 draws of labels, paired over arms; k 10, rho 1, C 100. Arms: deep-lds, the same loop with "
    "scikit-learn's LabelSpreading, the network alone; controls: separation once on raw pixels, and deep-lds with rho 0. Nothing reduced against the catalogue."
)
BUDGETS = (3, 5)
ARMS = ("deep-lds", "graph hybrid", "network alone", "raw pixels", "no stretching")


def few(each: int, unlabelled: int, seed: int) -> tuple[Data, torch.Tensor]:
    """Digits as a table: ``each`` labels a class and ``unlabelled`` rows in train, and the true labels of all rows."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    whole = load(x / 16, y, val=0.0, test=0.0, seed=seed)
    order = torch.randperm(len(y), generator=generator(seed, "digits"))
    known = torch.cat([order[whole.y[order] == c][:each] for c in range(whole.k)])
    rest = order[~torch.isin(order, known)][:unlabelled]
    hidden = torch.full_like(whole.y, -1)
    hidden[known] = whole.y[known]
    rows = torch.cat([known, rest])
    return dataclasses.replace(whole, y=hidden, split=Split(rows, rows[:0], rows[:0])), whole.y


def share(told: torch.Tensor, truth: torch.Tensor, data: Data) -> float:
    """Share of the unlabelled training rows whose class is told right; ``told`` is by training row."""
    rows = data.split.train
    unknown = data.y[rows] < 0
    return float((told[unknown] == truth[rows][unknown]).double().mean())


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    seeds, unlabelled, steps = (2, 60, 5) if smoke else (8, 700, 200)
    rounds = 2

    for each in BUDGETS:
        for seed in range(seeds):
            data, truth = few(each, unlabelled, seed)
            how: dict[str, Any] = {"model": "mlp:hidden=(64,64,32)", "batch": 64 if not smoke else 16, "lr": 0.05, "seed": seed}

            def looped(options: str, data: Data = data, truth: torch.Tensor = truth, how: dict[str, Any] = how) -> dict[str, float]:
                run = bench.train(data, parts=(f"deep-lds:rounds={rounds}{options}",), steps=steps, **how).run
                part = run.team.seats[0].technique
                assert isinstance(part, DeepLds)
                return {"accuracy": share(part.scores.argmax(1), truth, data), "network": network(run, truth, data)}

            def alone(data: Data = data, truth: torch.Tensor = truth, how: dict[str, Any] = how) -> dict[str, float]:
                run = bench.train(data, steps=steps * (rounds + 1), **{**how, "batch": 10}).run
                return {"accuracy": network(run, truth, data)}

            def raw(data: Data = data, truth: torch.Tensor = truth) -> dict[str, float]:
                rows = data.split.train
                scores = lds(standardised(data.x.take(rows)).numpy(), data.y[rows].numpy(), data.k)
                return {"accuracy": share(torch.from_numpy(np.argmax(scores, 1)), truth, data)}

            bench.arm(f"deep-lds, {each} labels", seed, lambda looped=looped: looped(""))  # type: ignore[misc]
            bench.arm(f"graph hybrid, {each} labels", seed, lambda looped=looped: looped(",method=spreading"))  # type: ignore[misc]
            bench.arm(f"no stretching, {each} labels", seed, lambda looped=looped: looped(",rho=0.0"))  # type: ignore[misc]
            bench.arm(f"network alone, {each} labels", seed, alone)
            bench.arm(f"raw pixels, {each} labels", seed, raw)


def network(run: Any, truth: torch.Tensor, data: Data) -> float:
    """Share of the unlabelled training rows that the finished network tells right."""
    from convince.fit.answer import logits_of

    return share(logits_of(run.answer.eval(), data.x.take(data.split.train), run.plan).argmax(1), truth, data)


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str, each: int, metric: str = "accuracy") -> list[float]:
        return [100 * value for value in column(numbers, f"{arm}, {each} labels", metric)]

    def gains(rival: str) -> list[Any]:
        return [paired(f"deep-lds - {rival}, {e} labels a class [points of unlabelled accuracy]", points("deep-lds", e), points(rival, e)) for e in BUDGETS]

    graph, alone = gains("graph hybrid"), gains("network alone")
    facts: dict[str, float] = {f"{arm}, {e} labels": statistics.fmean(points(arm, e)) for arm in ARMS for e in BUDGETS}
    facts |= {f"{arm}, {e} labels, the final network": statistics.fmean(points(arm, e, "network")) for arm in ARMS[:2] for e in BUDGETS}
    comparisons = [*graph, *alone, *gains("raw pixels"), *gains("no stretching"), facts]
    if all(gain.high < 0 for gain in graph):
        return "contradicted", comparisons
    better = any(a.low > 0 and b.mean >= -1 for a, b in (graph, graph[::-1]))
    holds = better and all(gain.mean >= 3 and gain.low > 0 for gain in alone)
    return "supported" if holds else "inconclusive", comparisons
