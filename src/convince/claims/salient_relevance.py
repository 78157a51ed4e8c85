"""Salient relevance on digits in clutter: does it turn the speckles of LRP into one region, and is the region the digit's?"""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.explain.localisation import box_from_map, iou
from convince.explain.many import rank_correlation
from convince.explain.passes import scores
from convince.explain.saliency import Saliency
from convince.explain.salient_relevance import context_aware_saliency, lrp_stage, top_regions
from convince.fit import precision
from convince.fit.randomness import generator, preserved, seed_global

SAYS = "Context-aware saliency on a map of relevance marks compact object regions where LRP itself gives scattered dots."
SUPPORTED = (
    "The top tenth of the pixels falls into at most half as many connected components as for raw LRP, and the box around the largest has an IoU with the "
    "digit's box that is higher by at least 0.05, both in every seed; accuracy is at least 0.95 in every seed; and with the last layer drawn anew the rank "
    "correlation of the maps is below 0.7 in the mean over images whose score is above 0 then too (the others have no positive relevance to compare). "
    "Whether it beats LRP under a Gaussian, tuned on other images, is reported with its interval and is no part of the rule."
)
CONTRADICTED = "The IoU is not above raw LRP's in the mean over seeds, or the maps survive a new last layer (rank correlation 0.7 or more): an edge detector."
BUDGET = (
    "mnist, one digit at a random place of 64x64 pixels with twelve 8x8 pieces of other digits; 6,000 training digits x 10 epochs (the catalogue says 6: at "
    "least 95 % must be reached), placed and cluttered anew each epoch; bias-free conv 16-32-64-64, Adam at 0.002 on a one-cycle schedule; 100 test scenes, "
    "20 others for the Gaussian's width; 5 seeds (the catalogue says 3). A net below 95 % makes the claim inconclusive unless it is contradicted."
)

SEEDS = 5
SIDE, PIECES, CUT = 64, 12, 8
WIDTHS = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)  # of the Gaussian, pixels


class PlainNet(nn.Module):
    """conv3x3 - ReLU four times without biases, 2x2 max-pool after the first three, pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate([(1, 16), (16, 32), (32, 64), (64, 64)]):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.ReLU()] + ([nn.MaxPool2d(2)] if i < 3 else [])
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(64, 10, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean((2, 3)))


def scenes(images: Tensor, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """(pixels [n 1 64 64] in [0, 1], boxes of the digits' ink [n 4]: left, top, right, bottom); ``images`` uint8 [n 1 28 28], one digit a scene."""
    n = len(images)
    canvas = torch.zeros(n, SIDE * SIDE, dtype=torch.uint8)
    other = torch.randint(n - 1, (n, PIECES), generator=gen)
    other += other >= torch.arange(n)[:, None]
    inside = torch.randint(4, 24 - CUT + 1, (n, PIECES, 2), generator=gen)
    place = torch.randint(SIDE - CUT + 1, (n, PIECES, 2), generator=gen)
    corner = torch.randint(SIDE - 28 + 1, (n, 2), generator=gen)
    for p in range(PIECES):
        piece = images.flatten(1)[other[:, p][:, None], _window(inside[:, p], CUT, 28)]
        canvas.scatter_reduce_(1, _window(place[:, p], CUT, SIDE), piece, "amax")
    canvas.scatter_reduce_(1, _window(corner, 28, SIDE), images.flatten(1), "amax")
    ink = images[:, 0] > 50
    rows, columns = ink.any(2).int(), ink.any(1).int()
    ends = [columns.argmax(1), rows.argmax(1), 28 - columns.flip(1).argmax(1), 28 - rows.flip(1).argmax(1)]
    boxes = torch.stack(ends, 1) + corner.flip(1).repeat(1, 2)
    return canvas.view(n, 1, SIDE, SIDE).float().div_(255), boxes.float()


def _window(corner: Tensor, side: int, width: int) -> Tensor:
    """Flat places [n side*side] of a window with this upper left corner (row, column) in an image of this width."""
    steps = torch.arange(side)
    return ((corner[:, :1] + steps)[:, :, None] * width + (corner[:, 1:] + steps)[:, None]).flatten(1)


def train(images: Tensor, y: Tensor, epochs: int, seed: int) -> nn.Module:
    """Plain training on scenes drawn anew each epoch."""
    plan = precision.choose("auto", "image")
    with preserved():
        seed_global(seed, "plain net")
        net = plan.place(PlainNet())
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(y) // 64))
    for epoch in range(epochs):
        gen = generator(seed, "scenes", epoch)
        x, _ = scenes(images, gen)
        for rows in torch.randperm(len(y), generator=gen).split(64):
            with plan.autocast():
                out = net(plan.pixels(x[rows]))
            loss = F.cross_entropy(out.float(), y[rows].to(plan.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net.cpu().eval()


def components(mask: Tensor) -> Tensor:
    """The number of connected components (neighbours by side) of each mask [n 1 h w]."""
    from scipy import ndimage

    return torch.tensor([ndimage.label(plane)[1] for plane in mask[:, 0].numpy()], dtype=torch.float64)


def blurred(maps: Tensor, width: float) -> Tensor:
    """Maps under a Gaussian of this standard deviation [pixels]."""
    from scipy import ndimage

    return torch.from_numpy(ndimage.gaussian_filter(maps.numpy(), (0, 0, width, width)))


def overlap(maps: Tensor, boxes: Tensor) -> Tensor:
    """IoU of the digit's box with the box around the largest component of the top tenth."""
    return iou(box_from_map(top_regions(maps).float(), 0.5), boxes)


def positive_lrp(net: nn.Module, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, float]:
    """The positive part of LRP's map, the scores that it shares out, and the largest share of one that got lost on the way."""
    found = lrp_stage(net, x, target)
    return found.pixels.sum(1, keepdim=True).clamp(min=0), found.start, float(found.gap.max())


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def job(seed: int = seed) -> dict[str, Any]:
            data = bench.data("mnist", train=300 if small else 6000, test=100 if small else 620, seed=seed)
            take = {part: (data.x.take(data.split[part]), data.y[data.split[part]]) for part in ("train", "test")}
            net = train(*take["train"], 1 if small else 10, seed).requires_grad_(False)
            images, y = take["test"]
            x, boxes = scenes(images, generator(seed, "test scenes"))
            tune, shown = slice(0, 20), slice(20, 30 if small else 120)
            accuracy = float((scores(net, x[20:]).argmax(1) == y[20:]).double().mean())
            return {"net": net, "accuracy": accuracy, "tune": (x[tune], y[tune], boxes[tune]), "test": (x[shown], y[shown], boxes[shown])}

        def cell(arm: str, job: Any = job, seed: int = seed) -> dict[str, float]:
            found = job()
            net, (x, y, boxes) = found["net"], found["test"]
            numbers = {"accuracy": found["accuracy"]}
            if arm == "gradient":
                maps = Saliency()(net, x, y).map
                assert maps is not None
            else:
                maps, _, numbers["gap"] = positive_lrp(net, x, y)
            if arm == "salient relevance":
                maps = context_aware_saliency(maps)
                weights = net.fc.weight.data.clone()
                net.fc.weight.data.uniform_(-0.125, 0.125, generator=generator(seed, "last layer anew"))  # PyTorch's own range for 64 inputs
                other, start, _ = positive_lrp(net, x, y)
                net.fc.weight.data.copy_(weights)
                still = start > 0
                numbers["still positive"] = float(still.double().mean())
                numbers["kept by a new last layer"] = float(rank_correlation(maps[still], context_aware_saliency(other[still])).mean())
            elif arm == "blurred lrp":
                others = positive_lrp(net, *found["tune"][:2])[0]
                best = max(WIDTHS, key=lambda width: float(overlap(blurred(others, width), found["tune"][2]).mean()))
                maps, numbers["width"] = blurred(maps, best), best
            return {"iou": float(overlap(maps, boxes).mean()), "components": float(components(top_regions(maps)).mean()), **numbers}

        for arm in ("salient relevance", "lrp", "blurred lrp", "gradient"):
            bench.arm(arm, seed, functools.partial(cell, arm))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    boxes = {arm: column(numbers, arm, "iou") for arm in numbers}
    parts = {arm: column(numbers, arm, "components") for arm in numbers}
    more = [a - b for a, b in zip(boxes["salient relevance"], boxes["lrp"], strict=True)]
    kept = statistics.fmean(column(numbers, "salient relevance", "kept by a new last layer"))
    rules = {
        "at most half of LRP's components in every seed": all(a <= b / 2 for a, b in zip(parts["salient relevance"], parts["lrp"], strict=True)),
        "IoU 0.05 above LRP's in every seed": min(more) >= 0.05,
        "accuracy at least 0.95 in every seed": min(column(numbers, "salient relevance", "accuracy")) >= 0.95,
        "a new last layer changes the map (rank correlation below 0.7)": kept < 0.7,
    }
    blur = paired("IoU, salient relevance minus blurred LRP", boxes["salient relevance"], boxes["blurred lrp"])
    than_blur = "yes" if blur.low > 0 else "no, blurred LRP is better" if blur.high < 0 else "not decided"
    comparisons = [
        paired("IoU, salient relevance minus LRP", boxes["salient relevance"], boxes["lrp"]),
        paired("components, salient relevance minus LRP", parts["salient relevance"], parts["lrp"]),
        blur,
        paired("components, salient relevance minus blurred LRP", parts["salient relevance"], parts["blurred lrp"]),
        paired("IoU, salient relevance minus gradient", boxes["salient relevance"], boxes["gradient"]),
        {"what": "rules", "rank correlation": kept, "is it more than blur?": than_blur, **rules},
    ]
    if all(rules.values()):
        return "supported", comparisons
    if statistics.fmean(more) <= 0 or kept >= 0.7:
        return "contradicted", comparisons
    return "inconclusive", comparisons
