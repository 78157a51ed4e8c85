"""Claim of poincare-resnet: an identity start keeps norms where the older one collapses, midpoint batch norm is fast, and the network trains."""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from convince.claims import Bench, Numbers, column, paired, said, together
from convince.fit.randomness import generator, preserved, seed_global
from convince.layers.poincare import PoincareBall, PoincareConv2d, PoincareLinear, PoincareMidpointBN2d, frechet_mean, midpoint

TARGET = {"model": "poincare-resnet-mini", "data": "digits", "accuracy": 0.95}  # 20,000 weights that start as copies of pixels, Adam at 0.001
SAYS = (
    "1. The identity initialisation keeps the norms of features over 20 Poincaré convolutions; the older one lets them collapse to the origin. "
    "2. Midpoint batch norm is several times faster than batch norm by the Fréchet mean. 3. With the identity initialisation the network trains, and "
    "better than with the older one."
)
SUPPORTED = (
    "1. mean distance to the origin after 20 convolutions over that after 1 lies within 0.5 and 2 with the identity start and below 0.05 with the older one "
    "(means over seeds); 2. forward and backward of midpoint batch norm is at least 3 times faster; 3. identity - normal in test accuracy has its 95 % paired "
    "t interval above +5 points, and identity reaches 85 % in the mean. All three."
)
CONTRADICTED = (
    "1. the ratio of the identity start lies outside 0.1 to 10, or that of the older start above 0.5; or 2. midpoint batch norm is slower; "
    "or 3. the interval of identity - normal lies below 0."
)
BUDGET = (
    "c = 0.1 throughout, float32. 1. 20 Poincaré 3x3 convolutions of 16 channels with nothing between them, 4 random images of 32x32 tangent vectors "
    "N(0, 0.25^2) a channel, 10 seeds; reported, not judged: the same with 20 square linear layers, where the identity start is exact. 2. 4,096 points of 16 "
    "channels, tangent vectors N(0.25, 0.25^2) a channel, Karcher flow to 1e-6 whose gradient passes through its last step alone (which favours it), "
    "median of 20 passes, taken in turn. 3. digits at 8 px, 1,400 training and 397 test images, channels 4, 8, 16, depth 8, 15 epochs, batch 64, AdamW 0.001 "
    "with decay 0.0001, no augmentation, 4 paired seeds; reported: a flat ResNet of the same shape. As in the catalogue; heads start at random. "
    "Known before the run: a patch is scaled to the length of one vector, and the identity copies 1 of its 9 C numbers an output, so each convolution "
    "without a norm behind it divides by about 3; the rule of 1 is kept as it was set."
)
ADAM = ("adamw:lr=0.001,weight_decay=0.0001",)


def decay(kind: str, init: str, seed: int, layers: int = 20, channels: int = 16, side: int = 32) -> dict[str, float]:
    """Mean distance to the origin after the last of ``layers`` over that after the first; and after the first."""
    ball = PoincareBall(0.1)
    x = 0.25 * torch.randn(4, channels, side, side, generator=generator(seed, "poincare-resnet"))
    with preserved(), torch.no_grad():
        seed_global(seed, "poincare-resnet", "weights")
        if kind == "linear":
            x = x.permute(0, 2, 3, 1).flatten(0, 2)
        norms = []
        for _ in range(layers):
            layer = PoincareLinear(channels, channels, ball, init) if kind == "linear" else PoincareConv2d(channels, channels, 3, ball, 1, init)
            x = layer(x)
            norms.append(2 * float(x.norm(dim=1).mean()))  # a tangent vector at the origin is half as long as the distance
    return {"ratio": norms[-1] / norms[0], "first": norms[0]}


def race(seed: int, times: int) -> dict[str, float]:
    """Seconds of one forward and backward pass of each batch norm: the median of ``times``, and their ratio."""
    gen = generator(seed, "poincare-resnet", "points")
    x = 0.25 + 0.25 * torch.randn(1, 16, 64, 64, generator=gen)
    norms: dict[str, nn.Module] = {
        name: PoincareMidpointBN2d(16, PoincareBall(0.1), mean) for name, mean in (("midpoint", midpoint), ("frechet", frechet_mean))
    }
    taken: dict[str, list[float]] = {name: [] for name in norms}
    for at in range(times + 2):
        for name, norm in norms.items():
            v = x.clone().requires_grad_(True)
            began = time.perf_counter()
            norm(v).square().sum().backward()
            if at >= 2:  # the first passes warm up
                taken[name].append(time.perf_counter() - began)
    found = {name: statistics.median(seconds) for name, seconds in taken.items()}
    return {**found, "ratio": found["frechet"] / found["midpoint"]}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    train, test, epochs, seeds, stacks, times = (64, 48, 1, 2, 2, 2) if small else (1400, 397, 15, 4, 10, 20)
    for seed in range(stacks):
        for kind in ("conv", "linear"):
            for init in ("identity", "normal"):
                bench.arm(f"stack: {kind}, {init}", seed, lambda kind=kind, init=init, seed=seed: decay(kind, init, seed))  # type: ignore[misc]
    bench.arm("race", 0, lambda: race(0, times))
    shape = "depth=8,channels=(4,8,16)"
    models = {
        "identity": f"poincare-resnet:{shape}",
        "normal": f"poincare-resnet:{shape},init=normal",
        "flat": "resnet:layers=(1,1,1),widths=(4,8,16)",
    }
    for seed in range(seeds):
        data = bench.data("digits", train=train, test=test, seed=seed)
        for arm, model in models.items():
            how = {"model": model, "parts": ADAM, "epochs": epochs, "batch": 64, "precision": "fp32", "seed": seed}
            bench.arm(arm, seed, lambda data=data, how=how: accuracy(bench, data, how))  # type: ignore[misc]


def accuracy(bench: Bench, data: Any, how: dict[str, Any]) -> dict[str, float]:
    """One training: test accuracy, log loss, and how many parameters learn."""
    run = bench.train(data, **how).run
    scores = run.evaluate("test")
    return {"accuracy": scores.accuracy, "log_loss": scores.log_loss, "parameters": sum(p.numel() for p in run.model.parameters())}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    ratios = {arm: statistics.fmean(column(numbers, arm, "ratio")) for arm in numbers if arm.startswith("stack")}
    kept, fallen, speed = ratios["stack: conv, identity"], ratios["stack: conv, normal"], numbers["race"]["0"]["ratio"]
    gain = paired("accuracy, identity - normal", column(numbers, "identity", "accuracy"), column(numbers, "normal", "accuracy"))
    flat = paired("accuracy, identity - flat network", column(numbers, "identity", "accuracy"), column(numbers, "flat", "accuracy"))
    reached = statistics.fmean(column(numbers, "identity", "accuracy"))
    facts: dict[str, float] = {f"distance after 20 layers over that after 1, {arm.removeprefix('stack: ')} start": ratio for arm, ratio in ratios.items()}
    facts |= {"Fréchet over midpoint batch norm, seconds": speed, "accuracy, identity": reached}
    parts = {
        "1. the identity start keeps norms": said(0.5 <= kept <= 2 and fallen < 0.05, not 0.1 <= kept <= 10 or fallen > 0.5),
        "2. midpoint batch norm is fast": said(speed >= 3, speed < 1),
        "3. the network trains": said(gain.low > 0.05 and reached >= 0.85, gain.high < 0),
    }
    return together(parts.values()), [gain, flat, facts, parts]
