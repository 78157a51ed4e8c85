"""Claim of neural-collapse-linear: free features come to the predicted lengths, rare classes to zero, and networks with linear heads come near the frame."""

from __future__ import annotations

import itertools
import math
import statistics
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, said, together
from convince.diagnose.neural_collapse_linear import (
    class_means,
    nc_metrics,
    predicted_geometry,
    products,
    unconstrained_feature_model,
)
from convince.fit.randomness import generator, preserved, seed_global

COUNTS, SMOKE, WIDTH = (200, 100, 50, 4), (10, 5, 3, 1), 16
LAMS, DEEP = (1e-3, 3e-3, 6e-3), (2, 3)
CONVERGED, DECAY = 1e-8, 5e-4
SAYS = (
    "1. At the global minimum of the squared error with weight decay on one or several linear layers and free features, the vectors of classes of unequal size "
    "are orthogonal, their lengths follow from the sizes, and a class that is rare enough collapses to zero. 2. The same is seen at the end of training in a "
    "network with a linear head: an orthogonal frame for equal classes, longer vectors for larger classes."
)
SUPPORTED = (
    "1. one layer: from every start, at lam of 0.001, 0.003 and 0.006, lengths of weights and class means within 1 % of the formula, cosines of different "
    "classes below 0.01, and the class of 4 at zero (below 1 % of the longest) at 0.006 and not at 0.003; two and three layers at 0.001: the same of lengths "
    "and cosines at the lowest of 5 points. 2. equal classes: the geometric mean over seeds of nc1 at epoch 10 over nc1 at the end is at least 10, and the "
    "mean distance of the product matrix from the orthogonal frame ends below 0.15 and below half of that at initialisation; unequal classes: in every "
    "seed the mean length of the rows of large classes in the product matrix exceeds that of small ones, and the mean cosine of different rows lies between "
    "-0.2 and 0.2."
)
CONTRADICTED = (
    "1. any of these is wrong at a converged point (of two and three layers at the lowest); or 2. nc1 does not fall (geometric mean of the ratio at most 1), "
    "or the mean ratio of lengths, large over small classes, is at most 1."
)
BUDGET = (
    "1. classes of 200, 100, 50 and 4, 16 features, lam the same for layers and features, 5 random starts each, L-BFGS in float64 until the gradient is "
    "below 1e-8 of the regulariser's; a point that has not got there decides nothing. With several layers zero is a local minimum for each class, so that "
    "the lowest point counts. 2. digits (8x8), a network 64-128-128 with ReLU and three linear layers 128-128-128-10 without bias, half the squared error "
    "by one-hot targets summed over classes, SGD 0.05 cosine, momentum 0.9, weight decay 0.0005, batches of 100, 300 epochs, 5 seeds; 100 a class, or 5 "
    "classes drawn by seed of 100 and 5 of 10. Metrics on the training rows; features are what the first linear layer is given. Told, not judged: the ratio "
    "of lengths by the formula of three layers with a decay of features of 0.0005, since a network's features are not free. As in the catalogue; batch "
    "size, means over seeds and which classes are rare are ours."
)


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    starts, counts, epochs, many, few, seeds = (1, SMOKE, 12, 20, 4, 2) if small else (5, COUNTS, 300, 100, 10, 5)
    for seed in range(starts):
        for lam in LAMS:
            bench.arm(f"1 layer, lam {lam:g}", seed, partial(free, counts, 1, lam, seed))
        for layers in DEEP:
            bench.arm(f"{layers} layers, lam {LAMS[0]:g}", seed, partial(free, counts, layers, LAMS[0], seed))
    for seed in range(seeds):
        for arm, rare in (("equal classes", many), ("unequal classes", few)):
            bench.arm(arm, seed, partial(practice, bench, many, rare, epochs, seed))


# -- 1. free features ------------------------------------------------------------------------------


def free(counts: tuple[int, ...], layers: int, lam: float, seed: int) -> dict[str, float]:
    """How far a minimum is from the prediction: largest relative error of lengths, largest cosine, and the smallest class over the longest."""
    gen = generator(seed, "neural-collapse-linear", layers, lam)
    found = unconstrained_feature_model(counts, WIDTH, [lam] * layers, lam, gen)
    said_w, said_h = predicted_geometry(counts, [lam] * layers, lam)
    w, h = products(found.weights)[-1], class_means(found.h, found.y)[0]
    alive = said_w > 0
    errors = [(v.norm(dim=1)[alive] / want[alive] - 1).abs().max() for v, want in ((w, said_w), (h, said_h))]
    cosines = [cosine(v[alive]).abs().max() for v in (w, h)]
    return {
        "error of lengths": float(max(errors)),
        "cosine": float(max(cosines)),
        "rarest over longest": float(max(v.norm(dim=1)[-1] / v.norm(dim=1).max() for v in (w, h))),
        "rarest, predicted": float(said_w[-1] / said_w.max()),
        "objective": found.objective,
        "gradient": found.gradient,
    }


def cosine(v: Tensor) -> Tensor:
    """Cosines of different rows."""
    unit = F.normalize(v, dim=1)
    return (unit @ unit.T)[~torch.eye(len(v), dtype=torch.bool)]


# -- 2. a network ------------------------------------------------------------------------------------


def rows_of(y: Tensor, counts: list[int], seed: int) -> Tensor:
    """That many rows of each class, drawn by seed."""
    gen = generator(seed, "neural-collapse-linear", "rows")
    at = [(y == c).nonzero()[:, 0] for c in range(len(counts))]
    return torch.cat([rows[torch.randperm(len(rows), generator=gen)[:n]] for rows, n in zip(at, counts, strict=True)])


def practice(bench: Bench, many: int, rare: int, epochs: int, seed: int) -> dict[str, float]:
    """Train and look at initialisation, at epoch 10 and at the end."""
    data = bench.data("digits", train=10**6)
    pool = data.split.train
    order = torch.randperm(10, generator=generator(seed, "neural-collapse-linear", "classes")).tolist()
    counts = [many if order.index(c) < 5 else rare for c in range(10)]
    rows = pool[rows_of(data.y[pool], counts, seed)]
    x, y = data.float_batch(data.x.take(rows)).flatten(1), data.y[rows]
    with preserved():
        seed_global(seed, "neural-collapse-linear")
        body = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU())
        head = nn.Sequential(nn.Linear(128, 128, bias=False), nn.Linear(128, 128, bias=False), nn.Linear(128, 10, bias=False))

        def look(when: str) -> dict[str, float]:
            return {f"{metric}, {when}": value for metric, value in geometry(body, head, x, y).items()}

        numbers = look("start")
        optimiser = torch.optim.SGD([*body.parameters(), *head.parameters()], lr=0.05, momentum=0.9, weight_decay=DECAY)
        total = epochs * math.ceil(len(x) / 100)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, total)
        target = F.one_hot(y, 10).float()
        for epoch in range(1, epochs + 1):
            for part in torch.randperm(len(x)).split(100):
                loss = (head(body(x[part])) - target[part]).square().sum(1).mean() / 2
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                schedule.step()
            if epoch == 10:
                numbers |= look("epoch 10")
    numbers |= look("end")
    lengths = products(list(head.parameters()))[-1].detach().norm(dim=1)
    large = torch.tensor([order.index(c) < 5 for c in range(10)])
    formula = predicted_geometry(counts, [DECAY] * 3, DECAY).weight
    numbers["length, large over small classes"] = float(lengths[large].mean() / lengths[~large].mean().clamp_min(1e-12))
    numbers["the same by the formula"] = float(formula[large].mean() / formula[~large].mean().clamp_min(1e-12))
    return numbers


@torch.no_grad()
def geometry(body: nn.Module, head: nn.Sequential, x: Tensor, y: Tensor) -> dict[str, float]:
    """nc1 of the features, distances of the product matrix from the frame, cosines of its rows, errors on the training rows."""
    h, w = body(x), products(list(head.parameters()))[-1]
    metrics = nc_metrics(h, y, w)
    cosines = cosine(w)
    return {
        **{name: metrics[name] for name in ("nc1", "nc1_ratio", "nc2_of", "nc2_means_of", "nc3_of", "nc4")},
        "cosine": float(cosines.mean()),
        "absolute cosine": float(cosines.abs().mean()),
        "errors": float((head(h).argmax(1) != y).double().mean()),
    }


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    verdicts: list[str] = []
    comparisons: list[Any] = []

    def fits(row: dict[str, float]) -> bool:
        """Lengths and cosines as predicted, and the rarest class at zero exactly where it should be."""
        return row["error of lengths"] <= 0.01 and row["cosine"] < 0.01 and (row["rarest over longest"] < 0.01) == (row["rarest, predicted"] == 0)

    for lam in LAMS:
        points = list(numbers[f"1 layer, lam {lam:g}"].values())
        done = [row for row in points if row["gradient"] < CONVERGED]
        verdicts.append(said(len(done) == len(points) and all(map(fits, done)), not all(map(fits, done))))
        comparisons.append({"what": f"1. one layer, lam {lam:g}", **worst(points)})
    for layers in DEEP:
        points = list(numbers[f"{layers} layers, lam {LAMS[0]:g}"].values())
        lowest = min(points, key=lambda row: row["objective"])
        converged = lowest["gradient"] < CONVERGED
        verdicts.append(said(converged and fits(lowest), converged and not fits(lowest)))
        comparisons.append({"what": f"1. {layers} layers, lam {LAMS[0]:g}, lowest of {len(points)}", **worst([lowest]), "as low": sum(map(fits, points))})

    def mean(arm: str, metric: str) -> float:
        return statistics.fmean(column(numbers, arm, metric))

    equal, unequal = "equal classes", "unequal classes"
    falls = [a / max(b, 1e-300) for a, b in zip(column(numbers, equal, "nc1, epoch 10"), column(numbers, equal, "nc1, end"), strict=True)]
    fall, first, last = statistics.geometric_mean(falls), mean(equal, "nc2_of, start"), mean(equal, "nc2_of, end")
    ratios = column(numbers, unequal, "length, large over small classes")
    cosines = column(numbers, unequal, "cosine, end")
    verdicts.append(said(fall >= 10 and last < 0.15 and last < first / 2, fall <= 1))
    verdicts.append(said(min(ratios) > 1 and max(map(abs, cosines)) < 0.2, statistics.fmean(ratios) <= 1))
    comparisons += [
        {"what": "2. equal classes: nc1 at epoch 10 over nc1 at the end", "value": fall, "by seed": falls},
        {"what": "2. equal classes: product matrix from the orthogonal frame", "start": first, "end": last},
        {"what": "2. unequal classes: length, large over small", "by seed": ratios, "by the formula": mean(unequal, "the same by the formula")},
        {"what": "2. unequal classes: mean cosine of different rows", "by seed": cosines},
    ]
    for arm, metric in itertools.product((equal, unequal), ("nc1", "nc2_of", "nc3_of", "nc4", "absolute cosine", "errors")):
        comparisons.append({"what": f"{arm}: {metric}", **{when: mean(arm, f"{metric}, {when}") for when in ("start", "epoch 10", "end")}})
    return together(verdicts), comparisons


def worst(points: list[dict[str, float]]) -> dict[str, float]:
    """The largest of each number, and of the rarest class's length what was found and said."""
    return {name: max(row[name] for row in points) for name in ("error of lengths", "cosine", "rarest over longest", "rarest, predicted", "gradient")}
