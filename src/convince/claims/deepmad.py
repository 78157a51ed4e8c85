"""Claim of deepmad: an entropy formula picks a good network for a budget without training, and its bound on depth is of use."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
from typing import Any

from convince import parts
from convince.claims import Bench, Numbers, column, paired, pooled, said
from convince.search.deepmad_entropy import effectiveness, flops_params
from convince.search.deepmad_search import Problem, evolve, mutate
from convince.search.space import Genes

TARGET = {"model": "deepmad-mini", "data": "digits", "accuracy": 0.97}
SAYS = (
    "The network that the formula designs for a budget of multiply-adds and parameters, without training any, is more accurate than random networks of that "
    "budget; and among these, those of a larger objective are more accurate."
)
SUPPORTED = (
    "the design's mean test accuracy is at least 1 point above the median of the random networks and above at least three quarters of them, and Spearman's "
    "correlation of objective and accuracy over the random networks is above 0."
)
CONTRADICTED = "the design's mean test accuracy is below the median of the random networks."
BUDGET = (
    "cifar10 pooled to 16 px, 3,000 training and 5,000 test images; at most 8 M multiply-adds and 0.3 M parameters, stem of stride 1, three stages, weights 1, "
    "1 and 8, rho at most 0.3; the design by 100,000 steps of evolution. 12 random networks within these limits and at least 90 % of the multiply-adds, each "
    "the end of a walk of 2,000 or more of the same changes with no objective. 4 epochs, batch 128, SGD 0.1 cosine; the design with 4 seeds, each random "
    "network with one of these. Controls: the design without the bound on rho, with 4 seeds, which must break the bound and must not be above the bounded one "
    "in the mean for the bound to be called useful; and the random network of the most parameters. As in the catalogue, nothing reduced. Spearman's "
    "correlation has a one-sided permutation p beside it, from 20,000 orders."
)
FULL = Problem(size=16, classes=10, in_chans=3, macs=8e6, parameters=0.3e6)
SMOKE = Problem(size=8, classes=10, in_chans=1, macs=4.2e5, parameters=3e4)


def walked(problem: Problem, seed: int, steps: int, share: float = 0.9) -> Genes:
    """Where a random walk stands after ``steps`` changes, within all limits throughout, and as many more as bring it to ``share`` of the multiply-adds."""
    space, draw = problem.space(), random.Random(seed)
    genes = evolve(problem, space, seed, 0)
    assert genes is not None, "the claim's budgets hold networks"
    taken = 0
    while taken < steps or flops_params(problem.spec(genes), problem.size, problem.classes)[0] < share * problem.macs:
        child = mutate(space, genes, draw)
        genes = child if problem.fits(problem.spec(child)) else genes
        taken += 1
    return genes


def trained(bench: Bench, problem: Problem, genes: Genes, seed: int) -> dict[str, float]:
    """Accuracy of a network, and what is known of it before training."""
    spec = problem.spec(genes)
    if bench.scale == "smoke":
        data, epochs, batch = bench.data("digits", train=100, test=60, seed=seed), 1, 32
    else:
        data, epochs, batch = pooled(bench.data("cifar10", train=3000, test=5000, seed=seed)), 4, 128
    done = bench.train(data, model=parts.spell("deepmad", spec.options()), epochs=epochs, batch=batch, lr=0.1, seed=seed)
    macs, parameters = flops_params(spec, problem.size, problem.classes)
    return {
        "accuracy": done.test.accuracy,
        "objective": problem.score(genes),
        "rho": effectiveness(spec, problem.size),
        "macs": macs,
        "parameters": parameters,
        "blocks": sum(stage.blocks for stage in spec.stages),
    }


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    problem, iterations, steps, seeds, others = (SMOKE, 300, 50, 2, 3) if smoke else (FULL, 100_000, 2000, 4, 12)

    def designed(problem: Problem) -> Genes:
        genes = evolve(problem, problem.space(), 0, iterations)
        assert genes is not None, "the claim's budgets hold networks"
        return genes

    for arm, limits in (("design", problem), ("no bound on rho", dataclasses.replace(problem, rho=math.inf))):
        design = functools.cache(functools.partial(designed, limits))
        for seed in range(seeds):
            bench.arm(arm, seed, lambda design=design, limits=limits, seed=seed: trained(bench, limits, design(), seed))  # type: ignore[misc]
    for i in range(others):
        bench.arm("random", i, lambda i=i: trained(bench, problem, walked(problem, 1000 + i, steps), i % seeds))  # type: ignore[misc]


def rank(objective: list[float], accuracy: list[float], orders: int = 20_000) -> tuple[float, float]:
    """Spearman's correlation, and the share of random orders that have one at least as large; 0 and 1 where all objectives or accuracies are equal."""
    from scipy.stats import rankdata

    a, b = (list(rankdata(row)) for row in (objective, accuracy))
    if len(set(a)) == 1 or len(set(b)) == 1:
        return 0.0, 1.0
    found, draw, above = statistics.correlation(a, b), random.Random(0), 0
    product = math.fsum(x * y for x, y in zip(a, b, strict=True))
    for _ in range(orders):
        draw.shuffle(b)
        above += math.fsum(x * y for x, y in zip(a, b, strict=True)) >= product - 1e-9
    return found, (above + 1) / (orders + 1)


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    design, free, others = (column(numbers, arm, "accuracy") for arm in ("design", "no bound on rho", "random"))
    mean, middle = statistics.fmean(design), statistics.median(others)
    beaten = sum(mean > other for other in others)
    correlation, p = rank(column(numbers, "random", "objective"), others)
    sizes = column(numbers, "random", "parameters")
    bounded, unbounded = column(numbers, "design", "rho")[0], column(numbers, "no bound on rho", "rho")[0]
    facts: dict[str, Any] = {
        "test accuracy, design, mean": mean,
        "test accuracy, random, median": middle,
        "test accuracy, design - median random": mean - middle,
        "random networks that the design beats": beaten,
        "of random networks": len(others),
        "Spearman's correlation of objective and accuracy": correlation,
        "its one-sided permutation p": p,
        "test accuracy, design - random of the most parameters": mean - others[sizes.index(max(sizes))],
        "objective, design": column(numbers, "design", "objective")[0],
        "objective, random, most": max(column(numbers, "random", "objective")),
        "rho, design": bounded,
        "rho, design without the bound": unbounded,
        "blocks, design": column(numbers, "design", "blocks")[0],
        "blocks, design without the bound": column(numbers, "no bound on rho", "blocks")[0],
        "test accuracy, design - design without the bound": mean - statistics.fmean(free),
        "the bound is useful (1: yes)": float(unbounded > FULL.rho and mean >= statistics.fmean(free)),
    }
    supported = mean - middle >= 0.01 and beaten >= 0.75 * len(others) and correlation > 0
    return said(supported, mean < middle), [paired("test accuracy, design - design without the bound on rho", design, free), facts]
