"""The visualisation survey on drawn scenes: are a trained layer's own axes those of concepts, and what do its images mean to others?"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said
from convince.claims.grad_cam import QuadNet
from convince.claims.smooth_grad_cam_pp import taught
from convince.explain.activation_maximisation import ActivationMaximisation, feature_maps
from convince.explain.layer import find_layer
from convince.explain.many import rank_correlation
from convince.explain.network_dissection import Dissection, dissect
from convince.explain.network_inversion import NetworkInversion
from convince.explain.passes import scores
from convince.fit.randomness import generator, preserved, seed_global

SAYS = (
    "The units of a trained network detect concepts, more of them than the units of a random network or of the same features in turned axes. Beside it: "
    "deeper layers keep less of the image when they are inverted, and images that a class answers to most are read as that class by another network."
)
SUPPORTED = (
    "In every seed the trained layer has more unique detectors than the random network and than its own features under a random rotation, or as many and at "
    "least a quarter more detector units. Beside it, with verdicts of their own and no part in this one: inversion is supported where the feature error is at "
    "most 0.1 at every layer in every seed and the image error rises from layer to layer in at least 2 of 3 seeds; maximisation where a second network reads "
    "at least half of the class images."
)
CONTRADICTED = (
    "In 2 of 3 seeds the trained layer is not above the rotated one by that measure. Beside it: inversion is contradicted where the rank correlation of depth "
    "and image error is negative in the mean, maximisation where a second network reads no more than of the images climbed on random weights."
)
BUDGET = (
    "Drawn 32x32 scenes of a large and a small shape: 4 kinds, 4 colours, 3 textures, the label is the kind of the large one; 6,000 train, 1,000 test, conv "
    "16-32-32-32, 6 epochs; 11 concept masks, quantile 0.005, IoU above 0.04. Inversion: 16 test images, 300 steps, the four layers behind their ReLUs, error "
    "of the image about its mean colour. Maximisation: mnist at 28 px, 6,000 images, 3 epochs, the part's defaults, 3 starts of each class. 3 seeds."
)

SEEDS = 3
SIDE = 32
KINDS = ("square", "disc", "triangle", "cross")
COLOURS = {"red": (0.9, 0.15, 0.15), "green": (0.15, 0.8, 0.2), "blue": (0.2, 0.3, 0.95), "yellow": (0.9, 0.85, 0.15)}
TEXTURES = ("plain", "stripes", "checks")
CONCEPTS = (*KINDS, *COLOURS, *TEXTURES)


def drawn(count: int, gen: torch.Generator) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(pixels [n 3 32 32] in [0, 1], the kind of the large shape, for each concept its mask [n 32 32])."""
    radius = torch.stack([torch.randint(6, 9, (count,), generator=gen), torch.randint(3, 5, (count,), generator=gen)], 1)
    centres = torch.zeros(count, 2, 2, dtype=torch.int64)
    left = torch.arange(count)
    while len(left):  # apart, and inside the picture
        r = radius[left]
        centres[left] = r[..., None] + (torch.rand(len(left), 2, 2, generator=gen) * (SIDE - 2 * r[..., None])).long()
        left = left[(centres[left, 0] - centres[left, 1]).abs().amax(1) <= r.sum(1)]
    kinds, colours, textures = (torch.randint(many, (count, 2), generator=gen) for many in (4, 4, 3))
    at = torch.arange(SIDE)
    dy, dx = at[:, None] - centres[..., 0, None, None], at - centres[..., 1, None, None]
    r = radius[..., None, None]
    forms = torch.stack(
        [
            torch.maximum(dx.abs(), dy.abs()) <= r - 1,
            dx**2 + dy**2 <= r**2,
            (dy <= r - 1) & (2 * dx.abs() <= dy + r),
            (torch.minimum(dx.abs(), dy.abs()) <= r // 3) & (torch.maximum(dx.abs(), dy.abs()) <= r),
        ]
    )
    shape = forms.gather(0, kinds[None, ..., None, None].expand(1, count, 2, SIDE, SIDE))[0]
    row, column_ = (at // 2 % 2)[:, None].expand(SIDE, SIDE), (at // 2 % 2)[None].expand(SIDE, SIDE)
    shade = torch.stack([torch.ones(SIDE, SIDE), torch.where(row == 0, 1.0, 0.4), torch.where(row == column_, 1.0, 0.4)])[textures]
    paint = torch.tensor(list(COLOURS.values()))[colours]
    x = 0.35 + 0.08 * torch.randn(count, 3, SIDE, SIDE, generator=gen)
    for i in range(2):
        x = torch.where(shape[:, i, None], paint[:, i, :, None, None] * shade[:, i, None], x)
    chosen = {name: kinds == i for i, name in enumerate(KINDS)}
    chosen |= {name: colours == i for i, name in enumerate(COLOURS)} | {name: textures == i for i, name in enumerate(TEXTURES)}
    masks = {name: (shape & has[..., None, None]).any(1) for name, has in chosen.items()}
    return x.clamp(0, 1), kinds[:, 0], masks


class SceneNet(nn.Module):
    """conv3x3 - ReLU four times (16, 32, 32, 32 channels), 2x2 max-pool after the first two (8x8x32 at the end), pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        for i, (a, b) in enumerate([(3, 16), (16, 32), (32, 32), (32, 32)], 1):
            setattr(self, f"conv{i}", nn.Conv2d(a, b, 3, padding=1))
            setattr(self, f"relu{i}", nn.ReLU())
        self.pool, self.fc = nn.MaxPool2d(2), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(1, 5):
            x = self.get_submodule(f"relu{i}")(self.get_submodule(f"conv{i}")(x))
            x = self.pool(x) if i < 3 else x
        return self.fc(x.mean((2, 3)))


def anew(make: Any, seed: int) -> nn.Module:
    """A network with random weights."""
    with preserved():
        seed_global(seed, "weights anew")
        return make().eval().requires_grad_(False)


def features(net: nn.Module, x: Tensor) -> Tensor:
    """The last layer behind its ReLU, for all images."""
    layer = find_layer(net, x, torch.zeros(1, dtype=torch.int64), "relu4")
    with torch.no_grad():
        return torch.cat([feature_maps(net, part, layer) for part in x.split(100)])


def counted(found: Dissection) -> dict[str, float]:
    """Unique detectors, detector units, and the mean of the units' best IoU."""
    return {"unique": found.unique, "units": int(found.detectors.sum()), "iou": float(found.iou.amax(1).mean())}


def turned(maps: Tensor, seed: int) -> Tensor:
    """The channels mixed by a random orthogonal matrix."""
    q = torch.linalg.qr(torch.randn(maps.shape[1], maps.shape[1], generator=generator(seed, "rotation")))[0]
    return torch.einsum("uv,nvhw->nuhw", q, maps)


def inverted(net: nn.Module, x: Tensor, steps: int) -> dict[str, float]:
    """Relative errors of features and of images by layer, and the rank correlation of depth and image error."""
    tables = [NetworkInversion(f"relu{i}", steps=steps)(net, x, 0).table for i in range(1, 5)]
    image = torch.tensor([table["image error"] for table in tables])
    row = {f"feature_error_{i}": table["feature error"] for i, table in enumerate(tables, 1)} | {f"image_error_{i}": float(e) for i, e in enumerate(image, 1)}
    return {**row, "rank_correlation": float(rank_correlation(torch.arange(4.0)[None], image[None]))}


def maximised(net: nn.Module, second: nn.Module, starts: int, steps: int) -> dict[str, float]:
    """The share of class images that the second network reads as their class; their mean chance in the network that was climbed."""
    target, x = torch.arange(10), torch.zeros(10, 1, 28, 28)
    made = torch.cat([ActivationMaximisation(steps=steps, seed=start)(net, x, target).images["image"] for start in range(starts)])
    wanted = target.repeat(starts)
    own = scores(net, made).softmax(1).gather(1, wanted[:, None])
    return {"read": float((scores(second, made).argmax(1) == wanted).double().mean()), "own_chance": float(own.mean())}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def scenes(seed: int = seed) -> dict[str, Any]:
            x, y, _ = drawn(128 if small else 6000, generator(seed, "scenes train"))
            net = taught(SceneNet, x, y, F.cross_entropy, 1 if small else 6, seed).requires_grad_(False)
            x, y, masks = drawn(40 if small else 1000, generator(seed, "scenes test"))
            accuracy = float((scores(net, x).argmax(1) == y).double().mean())
            return {"net": net, "x": x, "masks": masks, "accuracy": accuracy, "features": features(net, x)}

        @functools.cache
        def digits(which: int, seed: int = seed) -> nn.Module:
            data = bench.data("digits" if small else "mnist", train=200 if small else 6000, test=0, seed=seed)
            x, y = F.interpolate(data.float_batch(data.x.take(data.split.train)), size=(28, 28)), data.y[data.split.train]
            return taught(QuadNet, x, y, F.cross_entropy, 1 if small else 3, seed + 1000 * which).requires_grad_(False)

        def trained(scenes: Any = scenes) -> dict[str, float]:
            return {**counted(dissect(scenes()["features"], scenes()["masks"])), "accuracy": scenes()["accuracy"]}

        def rotated(scenes: Any = scenes, seed: int = seed) -> dict[str, float]:
            return counted(dissect(turned(scenes()["features"], seed), scenes()["masks"]))

        def random(scenes: Any = scenes, seed: int = seed) -> dict[str, float]:
            return counted(dissect(features(anew(SceneNet, seed), scenes()["x"]), scenes()["masks"]))

        def inversion(scenes: Any = scenes) -> dict[str, float]:
            return inverted(scenes()["net"], scenes()["x"][: 2 if small else 16], 5 if small else 300)

        def maximisation(fresh: bool, digits: Any = digits, seed: int = seed) -> dict[str, float]:
            return maximised(anew(QuadNet, seed) if fresh else digits(0), digits(1), 1 if small else 3, 5 if small else 256)

        bench.arm("trained", seed, trained)
        bench.arm("rotated", seed, rotated)
        bench.arm("random weights", seed, random)
        bench.arm("inversion", seed, inversion)
        bench.arm("maximisation", seed, functools.partial(maximisation, False))
        bench.arm("maximisation of random weights", seed, functools.partial(maximisation, True))


def above(numbers: Numbers, other: str) -> list[bool]:
    """By seed: more unique detectors than the other arm, or as many and at least a quarter more detector units."""
    names = ("unique", "units")
    rows = zip(*(column(numbers, arm, name) for arm in ("trained", other) for name in names), strict=True)
    return [u > v or (u == v and units >= 1.25 * others and units > others) for u, units, v, others in rows]


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    rotated, random = above(numbers, "rotated"), above(numbers, "random weights")
    verdict = said(all(rotated) and all(random), rotated.count(False) >= 2)
    errors = [e for i in range(1, 5) for e in column(numbers, "inversion", f"feature_error_{i}")]
    rank = column(numbers, "inversion", "rank_correlation")
    rising = sum(r > 1 - 1e-6 for r in rank)
    read, control = column(numbers, "maximisation", "read"), column(numbers, "maximisation of random weights", "read")
    comparisons: list[Any] = [
        *(
            paired(f"{what}, trained minus {arm}", column(numbers, "trained", name), column(numbers, arm, name))
            for what, name in (("unique detectors", "unique"), ("detector units", "units"), ("best IoU of a unit", "iou"))
            for arm in ("rotated", "random weights")
        ),
        {"what": "trained above the control, by seed", "rotated": rotated, "random weights": random},
        {
            "what": "inversion, beside the verdict",
            "verdict": said(max(errors) <= 0.1 and rising >= 2, statistics.fmean(rank) < 0),
            "largest feature error": max(errors),
            "seeds in which the image error rises with every layer": rising,
        },
        paired("class images read by a second network, minus those of random weights", read, control),
        {
            "what": "maximisation, beside the verdict",
            "verdict": said(statistics.fmean(read) >= 0.5, statistics.fmean(read) <= statistics.fmean(control)),
            "share read": statistics.fmean(read),
        },
    ]
    return verdict, comparisons
