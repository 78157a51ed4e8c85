"""Claim of local-complexity-grokking: long after test accuracy has settled, linear regions leave the training data and robustness appears."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from convince.claims import Bench, Numbers, said
from convince.diagnose.local_complexity import local_complexity, phases
from convince.diagnose.residual_expansion import jacobian_norm
from convince.fit.randomness import generator
from convince.robust.pgd import pgd

SAYS = (
    "Trained far beyond a perfect fit, a network of large initial weights shows a late phase in which linear regions leave the training data: local "
    "complexity there falls from a peak, and robustness to adversarial images rises long after test accuracy has settled."
)
SUPPORTED = (
    "in each of 3 seeds the local complexity at training images falls by at least 20 % from its peak to the end of training; PGD accuracy at the end is at "
    "least 5 points above that at the first measurement whose test accuracy is 99 % of its maximum; and from the peak on Spearman's correlation of the two "
    "curves is at most -0.6."
)
CONTRADICTED = "in every seed the fall is below 5 % or PGD accuracy does not gain. Else it stays undecided: the steps may be too few."
BUDGET = (
    "digits, 1,000 training and 797 test images of 8x8, 0 to 1; an MLP 64-200-200-200-10 of ReLUs, torch's initial law times 4 (weights and biases), AdamW "
    "0.001, weight decay 0.01, mean squared error on one-hot labels, batch 200, 20,000 steps, 3 seeds; 40 measurements evenly in the logarithm of the step, "
    "38 of them different: local complexity at 256 training, 256 test and 256 uniform points (50 vertices, radius 5 % of the mean length of an image), PGD of "
    "0.1 in the largest pixel (10 steps) on the test images, and the Jacobian's norm at the training points. The peak is the end of the largest rise of the "
    "curve, so that the height of the first values is none. Told beside it, 1 seed and 10,000 steps each: initial scale 1, and random labels; and whether the "
    "Jacobian's norm follows robustness as closely. Against the catalogue: 20,000 of 40,000 steps, and 10,000 in the two controls, for time; the paper runs "
    "up to a million."
)
ARMS = {"scale 4": {"scale": 4.0}, "scale 1": {"scale": 1.0}, "random labels": {"scale": 4.0, "shuffled": True}}


def mlp(scale: float, gen: Generator) -> nn.Sequential:
    """64-200-200-200-10 with ReLUs; weights and biases uniform within ``scale / sqrt(fan in)``."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((64, 200, 200, 200, 10)):
        layer = nn.Linear(a, b)
        with torch.no_grad():
            for p in layer.parameters():
                p.uniform_(-scale / a**0.5, scale / a**0.5, generator=gen)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def moments(steps: int, count: int) -> list[int]:
    """At most ``count`` different steps from 1 to ``steps``, evenly in their logarithm."""
    return sorted({round(steps ** (i / (count - 1))) for i in range(count)})


def look(net: nn.Module, x: Tensor, y: Tensor, test: Tensor, test_y: Tensor, points: int) -> dict[str, float]:
    """One measurement of every curve."""
    radius = 0.05 * float(x.norm(dim=1).mean())
    spread = torch.rand(points, x.shape[1], generator=generator("local-complexity-grokking", "uniform"))
    found = {}
    for name, at in (("train lc", x[:points]), ("test lc", test[:points]), ("random lc", spread)):
        found[name] = float(local_complexity(net, at, radius, 50, gen=generator("local-complexity-grokking", "directions")).total.double().mean())
    attacked = pgd(net, test, test_y, generator("local-complexity-grokking", "pgd"), eps=0.1, steps=10)
    with torch.no_grad():
        for name, at, right in (("train accuracy", x, y), ("test accuracy", test, test_y), ("pgd accuracy", attacked, test_y)):
            found[name] = float((net(at).argmax(1) == right).double().mean())
    return {**found, "jacobian": jacobian_norm(net, x[:points]) ** 0.5}


def cell(bench: Bench, seed: int, sizes: tuple[int, int, int], steps: int, count: int, scale: float, shuffled: bool = False) -> dict[str, float]:
    """One training; each curve by step."""
    train, tests, points = sizes
    data = bench.data("digits", train=10**6, seed=0)
    rows = torch.cat([data.split.train, data.split.test])
    rows = rows[torch.randperm(len(rows), generator=generator(seed, "rows"))[: train + tests]]
    images, labels = data.float_batch(data.x.take(rows)).flatten(1), data.y[rows]
    x, y, test, test_y = images[:train], labels[:train], images[train:], labels[train:]
    if shuffled:
        y = torch.randint(10, y.shape, generator=generator(seed, "labels"))
    net = mlp(scale, generator(seed, "weights"))
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    targets, order, gen = F.one_hot(y, 10).to(x), torch.empty(0, dtype=torch.int64), generator(seed, "order")
    at = set(moments(steps, count))
    numbers: dict[str, float] = {}
    for step in range(1, steps + 1):
        if not len(order):
            order = torch.randperm(train, generator=gen)
        batch, order = order[:200], order[200:]
        loss = F.mse_loss(net(x[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in at:
            numbers |= {f"{name} at {step}": value for name, value in look(net, x, y, test, test_y, points).items()}
    return numbers


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    sizes, count = ((100, 50, 8), 6) if small else ((1000, 797, 256), 40)
    for arm, how in ARMS.items():
        main = arm == "scale 4"
        for seed in range(3 if main else 1):
            steps = 40 if small else 20_000 if main else 10_000
            bench.arm(arm, seed, partial(cell, bench, seed, sizes, steps, count, **how))  # type: ignore[arg-type]


def curve(row: dict[str, float], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a stored curve."""
    steps = sorted(int(key.rpartition(" at ")[2]) for key in row if key.startswith(f"{name} at "))
    return steps, [row[f"{name} at {step}"] for step in steps]


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's; 0 where a curve is flat or has fewer than three points."""
    from scipy.stats import spearmanr

    return float(spearmanr(a, b).statistic) if min(len(set(a)), len(set(b)), len(a)) > 1 and len(a) > 2 else 0.0


def reading(row: dict[str, float]) -> dict[str, float]:
    """What the rules ask of one training, and the same of the Jacobian's norm."""
    steps, lc = curve(row, "train lc")
    found = phases(steps, lc)
    accuracy, robust, jacobian = (curve(row, name)[1] for name in ("test accuracy", "pgd accuracy", "jacobian"))
    settled = next(i for i, value in enumerate(accuracy) if value >= 0.99 * max(accuracy))
    peak = steps.index(int(found.peak_at))
    return {
        "drop": found.drop,
        "peak at step": found.peak_at,
        "gain": robust[-1] - robust[settled],
        "settled at step": steps[settled],
        "correlation": rank_correlation(lc[peak:], robust[peak:]),
        "correlation of the Jacobian's norm": rank_correlation(jacobian[peak:], robust[peak:]),
        "drop of the Jacobian's norm": 1 - jacobian[-1] / jacobian[peak],
        "drop at test points": phases(*curve(row, "test lc")).drop,
        "drop at random points": phases(*curve(row, "random lc")).drop,
        "test accuracy at the end": accuracy[-1],
        "train accuracy at the end": curve(row, "train accuracy")[1][-1],
        "pgd accuracy at the end": robust[-1],
    }


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    read = {arm: {seed: reading(row) for seed, row in sorted(rows.items())} for arm, rows in numbers.items()}
    main = list(read["scale 4"].values())
    verdict = said(
        all(r["drop"] >= 0.2 and r["gain"] >= 0.05 and r["correlation"] <= -0.6 for r in main),
        all(r["drop"] < 0.05 or r["gain"] <= 0 for r in main),
    )
    return verdict, [{"what": f"{arm}, seed {seed}", **found} for arm, rows in read.items() for seed, found in rows.items()]
