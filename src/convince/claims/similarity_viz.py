"""Similarity maps on pairs of canvases that share one digit: do both maps peak on the digit that the two have in common?"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.claims.grad_cam import QuadNet, quad_scenes, quadrant_masks
from convince.claims.smooth_grad_cam_pp import canvases, present, taught
from convince.explain.localisation import pointing_hit
from convince.explain.similarity_maps import pooled, similarity_map
from convince.fit.randomness import generator, preserved, seed_global

SAYS = "The maps that split the cosine of two images peak on what the two have in common, after training and not before, with average and with max pooling."
SUPPORTED = (
    "Share of maps whose peak lies in the quadrant of the shared digit, trained network with average pooling: mean over seeds at least 0.6, and in every seed "
    "at least 0.15 above chance (0.25), above the same network untrained, and above the gradient of the cosine summed by quadrant."
)
CONTRADICTED = "The mean share is below 0.4, or not above the untrained network's mean."
BUDGET = (
    "mnist digits, four of different classes on a 56x56 canvas; conv 16-32-64-64, 7x7x64 features, average pooling and the same with max pooling, 6 epochs of "
    "binary cross-entropy on 6,000 canvases; 500 test pairs that share exactly one class, in different quadrants, both maps of each (1,000 hits); "
    "4 seeds (the catalogue asks for 3); split, weights and pairs move together. Max pooling is reported and not part of the rules."
)

SEEDS = 4


def max_net() -> nn.Module:
    return nn.Sequential(QuadNet().features, nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def sharing(count: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(classes [n 4] of the first canvases, of the second, quadrants [n 2] of the one shared class on each); the two quadrants differ."""
    drawn = torch.rand(count, 10, generator=gen).argsort(1)[:, :7]  # the shared class, three more of each
    first = torch.rand(count, 4, generator=gen).argsort(1)  # where they go on the first canvas
    turn = torch.randint(1, 4, (count, 1), generator=gen)  # the shared one moves by this much on the second
    second = torch.cat([(first[:, :1] + turn) % 4, first[:, 1:]], 1)
    taken = second[:, :1] == first[:, 1:]
    second[:, 1:] = torch.where(taken, first[:, :1], first[:, 1:])
    empty = torch.empty(count, 4, dtype=torch.int64)
    a, b = empty.scatter(1, first, drawn[:, :4]), empty.scatter(1, second, drawn[:, [0, 4, 5, 6]])
    return a, b, torch.cat([first[:, :1], second[:, :1]], 1)


@torch.no_grad()
def hits(features: nn.Module, pool: str, pair: tuple[Tensor, Tensor], quadrants: Tensor) -> dict[str, float]:
    """Share of both maps whose peak, enlarged to the canvas, lies in the shared digit's quadrant; the pairs' mean cosine."""
    maps = similarity_map(features(pair[0]), features(pair[1]), pool)
    found = [pointing_hit(F.interpolate(m, size=(56, 56), mode="bilinear", align_corners=False), quadrant_masks(quadrants[:, j])) for j, m in enumerate(maps)]
    return {"hits": float(torch.stack(found).double().mean()), "cosine": float(maps[0].sum((1, 2, 3)).mean())}


def gradient_hits(features: nn.Module, pair: tuple[Tensor, Tensor], quadrants: Tensor) -> dict[str, float]:
    """The same for the sum of |d cosine / dx| over each quadrant, the other image held still."""
    found = []
    for j in range(2):
        x = pair[j].clone().requires_grad_(True)
        with torch.no_grad():
            other = pooled(features(pair[1 - j]))
        (gradient,) = torch.autograd.grad(F.cosine_similarity(pooled(features(x)), other, dim=1).sum(), x)
        by_quadrant = F.avg_pool2d(gradient.abs(), 28).flatten(1)  # upper left, upper right, lower left, lower right
        found.append(by_quadrant.argmax(1) == quadrants[:, j])
    return {"hits": float(torch.stack(found).double().mean())}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def job(seed: int = seed) -> dict[str, Any]:
            data = bench.data("mnist", train=400 if small else 12_000, test=200 if small else 4000, seed=seed)
            take = {part: (data.x.take(data.split[part]), data.y[data.split[part]]) for part in ("train", "test")}
            x, classes = quad_scenes(*take["train"], 64 if small else 6000, generator(seed, "quad train"))
            gen = generator(seed, "pairs")
            a, b, quadrants = sharing(16 if small else 500, gen)
            return {"train": (x, present(classes)), "pair": tuple(canvases(*take["test"], c, gen) for c in (a, b)), "quadrants": quadrants}

        @functools.cache
        def trained(pool: str, job: Any = job, seed: int = seed) -> nn.Module:
            make, (x, y) = QuadNet if pool == "avg" else max_net, job()["train"]
            return taught(make, x, y, F.binary_cross_entropy_with_logits, 1 if small else 6, seed)

        def features(net: nn.Module) -> nn.Module:
            return net.features if isinstance(net, QuadNet) else net.get_submodule("0")

        def cell(pool: str, job: Any = job, trained: Any = trained) -> dict[str, float]:
            return hits(features(trained(pool)), pool, job()["pair"], job()["quadrants"])

        def untrained(job: Any = job, seed: int = seed) -> dict[str, float]:
            with preserved():
                seed_global(seed, "scene net")
                net = QuadNet().eval()
            return hits(net.features, "avg", job()["pair"], job()["quadrants"])

        def gradient(job: Any = job, trained: Any = trained) -> dict[str, float]:
            return gradient_hits(features(trained("avg")), job()["pair"], job()["quadrants"])

        bench.arm("average pooling", seed, functools.partial(cell, "avg"))
        bench.arm("gradient of the cosine", seed, gradient)
        bench.arm("untrained", seed, untrained)
        bench.arm("max pooling", seed, functools.partial(cell, "max"))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    found = {arm: column(numbers, arm, "hits") for arm in numbers}
    ours = found["average pooling"]
    controls = {"chance": [0.25] * len(ours), "untrained": found["untrained"], "gradient of the cosine": found["gradient of the cosine"]}
    rules = {"mean at least 0.6": statistics.fmean(ours) >= 0.6} | {
        f"0.15 above {name} in every seed": min(a - b for a, b in zip(ours, other, strict=True)) >= 0.15 for name, other in controls.items()
    }
    comparisons = [
        *(paired(f"peaks in the shared quadrant, average pooling minus {name}", ours, other) for name, other in controls.items()),
        paired("peaks in the shared quadrant, max pooling minus average pooling", found["max pooling"], ours),
        {"what": "rules", **rules},
    ]
    if all(rules.values()):
        return "supported", comparisons
    if statistics.fmean(ours) < 0.4 or statistics.fmean(ours) <= statistics.fmean(found["untrained"]):
        return "contradicted", comparisons
    return "inconclusive", comparisons
