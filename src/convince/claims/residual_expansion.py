"""Claim of residual-expansion: depth makes an unnormalised residual network explode, and scaling each branch by 1/depth takes normalisation's place."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said, together
from convince.diagnose.residual_expansion import jacobian_norm, signal_growth, tower
from convince.fit.randomness import generator
from convince.layers.scaled_residual import ScaledResidual, scale

SAYS = (
    "1. The paths through a residual network multiply with depth, so that without normalisation its signal explodes and it trains badly, and multiplying "
    "each branch by 1/depth cures that. 2. A smaller factor also makes the trained network simpler: 1/depth more so than 1/sqrt(depth)."
)
SUPPORTED = (
    "1. at 64 blocks, in every seed, test accuracy of lam = 1 without norm is at least 10 points below that of lam = 1/n, and the signal at the start grows "
    "more than 100 times with the first and less than 5 times with the second; and at 4 blocks the means of lam = 1, 1/sqrt(n) and 1/n lie within 3 points, "
    "so that it is depth and not lam. 2. at 64 blocks the mean squared Jacobian of the trained network is lower for 1/n than for 1/sqrt(n) in every seed."
)
CONTRADICTED = (
    "1. at 64 blocks the mean accuracy of lam = 1 without norm is at most 3 points below that of 1/n, or the signal's growth is not as said in any seed; or "
    "2. the Jacobian is not lower for 1/n than for 1/sqrt(n) in any seed."
)
BUDGET = (
    "digits at 8x8, 1,137 training, 300 validation and 360 test images, standardised; a residual MLP of width 64, x + lam W2 relu(W1 x), W1 drawn with "
    "variance 2/width and W2 with 1/width, of 4, 16 and 64 blocks; lam 1, 1/sqrt(n), 1/n. Told beside it: lam = 1 with a layer norm before each branch, and a "
    "learned lam from 0 (SkipInit). Adam, batch 64, 15 epochs, constant rate, for each arm and depth the best of 0.0001, 0.001 and 0.01 by validation accuracy "
    "on seed 100; 5 paired seeds. Growth is of the root mean square of the trunk's features at the start; the Jacobian is of the scores by the standardised "
    "pixels, on 200 test images (1e300 where it is no number). Nothing is reduced. Beyond the catalogue: growth in no seed as said contradicts as well, and "
    "the Jacobian is the claim's second part, which is contradicted where no seed has it lower."
)
RATES = (1e-4, 1e-3, 1e-2)
DEPTHS = (4, 16, 64)
ARMS: dict[str, tuple[float | str, bool, bool]] = {  # lam, learned, layer norm
    "lam 1": (1.0, False, False),
    "lam 1/sqrt(n)": ("1/sqrt(n)", False, False),
    "lam 1/n": ("1/n", False, False),
    "lam 1, layer norm": (1.0, False, True),
    "skipinit": (0.0, True, False),
}
WIDTH = 64


def linear(variance: float, gen: Generator, outputs: int = WIDTH) -> nn.Linear:
    """A linear layer of Gaussian weights of this variance, biases 0."""
    made = nn.Linear(WIDTH, outputs)
    with torch.no_grad():
        made.weight.normal_(std=math.sqrt(variance), generator=gen)
        made.bias.zero_()
    return made


@final
class ResidualMLP(nn.Module):
    """A linear stem, ``depth`` branches each added with its factor, and a linear head."""

    def __init__(self, depth: int, arm: str, gen: Generator) -> None:
        super().__init__()
        lam, learn, norm = ARMS[arm]
        self.stem = linear(1 / WIDTH, gen)
        branches = [(linear(2 / WIDTH, gen), nn.ReLU(), linear(1 / WIDTH, gen), ScaledResidual(scale(lam, depth), learn)) for _ in range(depth)]
        self.branches = nn.ModuleList(nn.Sequential(*([nn.LayerNorm(WIDTH)] if norm else []), *layers) for layers in branches)
        self.head = linear(1 / WIDTH, gen, 10)

    def states(self, x: Tensor) -> list[Tensor]:
        """What each block hands on, the stem first."""
        return tower(list(self.branches), self.stem(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.states(x)[-1])


def cell(bench: Bench, arm: str, depth: int, rate: float, seed: int, sizes: tuple[int, int, int], epochs: int) -> dict[str, float]:
    """One training: accuracies, growth at the start, the Jacobian at the end, and whether the loss stayed finite."""
    data = bench.data("digits", train=sizes[0], val=sizes[1], seed=seed)
    images = data.float_batch(data.x.take(torch.arange(len(data.y)))).flatten(1)
    train = data.split.train
    images = (images - images[train].mean()) / images[train].std()
    net = ResidualMLP(depth, arm, generator(seed, "weights"))
    with torch.no_grad():
        growth = signal_growth(net.states(images[train]))[-1]
    optimizer = torch.optim.Adam(net.parameters(), lr=rate, fused=True)
    gen, finite = generator(seed, "order"), True
    for _ in range(epochs):
        for rows in train[torch.randperm(len(train), generator=gen)].split(64):
            loss = F.cross_entropy(net(images[rows]), data.y[rows])
            finite = finite and bool(loss.isfinite())
            if finite:
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    found = {"growth": growth, "rate": rate, "finite": float(finite)}
    with torch.no_grad():
        for name in ("train", "val", "test"):
            scores = net(images[data.split[name]])
            right = (scores.argmax(1) == data.y[data.split[name]]) & scores.isfinite().all(1)
            found[f"{name} accuracy"] = float(right.double().mean())
    jacobian = jacobian_norm(net, images[data.split.test[: sizes[2]]])
    return {**found, "jacobian": jacobian if math.isfinite(jacobian) else 1e300}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    sizes, epochs, seeds, rates = ((64, 32, 8), 1, 2, RATES[1:]) if small else ((1137, 300, 200), 15, 5, RATES)
    for depth in DEPTHS:
        for arm in ARMS:
            tried = [bench.arm(f"{arm}, {depth} blocks, rate {rate}", 100, partial(cell, bench, arm, depth, rate, 100, sizes, epochs)) for rate in rates]
            best = max(tried, key=lambda found: found["val accuracy"])["rate"]
            for seed in range(seeds):
                bench.arm(f"{arm}, {depth} blocks", seed, partial(cell, bench, arm, depth, best, seed, sizes, epochs))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def of(arm: str, depth: int, metric: str = "test accuracy") -> list[float]:
        return column(numbers, f"{arm}, {depth} blocks", metric)

    gap = [b - a for a, b in zip(of("lam 1", 64), of("lam 1/n", 64), strict=True)]
    grows = [a > 100 and b < 5 for a, b in zip(of("lam 1", 64, "growth"), of("lam 1/n", 64, "growth"), strict=True)]
    shallow = [statistics.fmean(of(arm, 4)) for arm in ("lam 1", "lam 1/sqrt(n)", "lam 1/n")]
    simpler = [a < b for a, b in zip(of("lam 1/n", 64, "jacobian"), of("lam 1/sqrt(n)", 64, "jacobian"), strict=True)]
    parts = [
        said(min(gap) >= 0.1 and all(grows) and max(shallow) - min(shallow) <= 0.03, statistics.fmean(gap) <= 0.03 or not any(grows)),
        said(all(simpler), not any(simpler)),
    ]
    comparisons: list[Any] = [
        {"what": "parts 1 and 2", "verdicts": parts},
        paired("test accuracy at 64 blocks, lam 1/n - lam 1", of("lam 1/n", 64), of("lam 1", 64)),
        {"what": "range of mean accuracies at 4 blocks, three lam", "value": max(shallow) - min(shallow)},
        {"what": "seeds whose Jacobian is lower for 1/n than for 1/sqrt(n) at 64 blocks", "value": sum(simpler), "of": len(simpler)},
    ]
    for arm in ("lam 1/sqrt(n)", "lam 1, layer norm", "skipinit"):
        comparisons.append(paired(f"test accuracy at 64 blocks, {arm} - lam 1/n", of(arm, 64), of("lam 1/n", 64)))
    for depth in DEPTHS:
        for arm in ARMS:
            means = {metric: statistics.fmean(of(arm, depth, metric)) for metric in ("test accuracy", "growth", "jacobian", "rate", "finite")}
            comparisons.append({"what": f"{arm}, {depth} blocks, means", **means})
    return together(parts), comparisons
