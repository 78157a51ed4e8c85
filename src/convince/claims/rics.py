"""RICS on garments in clutter: does the crop that the content chooses steady the answer, and at what cost?"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.data import Data, MemoryStore, Preprocess
from convince.fit.randomness import generator
from convince.robust.rics import CropChosen, random_filters, realistic_shift, theoretical_consistency, worst_of_eight
from convince.robust.shift_consistency import consistency, neighbours
from convince.types import Split

SAYS = "Choosing the crop by its content makes a network's answer survive one-pixel shifts of the camera much more often, at little cost in accuracy."
SUPPORTED = (
    "The chosen crop changes at most 2 points more often than the bound for single shifts says; answers flipped by the worst of 8 neighbours "
    "are at least 30 % rarer than with the centre crop, 95 % paired interval of the difference above 0; and accuracy falls by at most 3 points."
)
CONTRADICTED = (
    "Worst-of-8 flips not rarer than with the centre crop, or accuracy falls by more than 6 points, or the crop changes more than twice as often as the bound."
)
BUDGET = (
    "fashion-mnist garments of 28 px near the middle of cluttered 66 px canvases, 4,000 training and 2,000 test canvases; "
    "ResNet-8 of half width (8-16-32) trained on 8 random 36 px crops of each canvas, SGD 0.1 cosine, batch 128, 1 pass over them (the work of 8 epochs); "
    "evaluated in fp32 on 64 px frames, 29 x 29 places for the crop; 8 one-pixel realistic shifts. 5 seeds. "
    "Reduced against the catalogue: no twin with blur pooling (reported only, it decides nothing). "
    "Control: a smooth score (brightness blurred over 15 x 15 px)."
)

SEEDS = 5
CANVAS, FRAME, CROP = 66, 64, 36


def canvases(garments: Tensor, gen: torch.Generator) -> Tensor:
    """uint8 [n 1 66 66]: a garment within 4 px of the middle, over noise of two sizes and 12 scraps of other garments.

    ``garments`` uint8 [n 1 28 28].
    """
    n = len(garments)
    coarse = F.interpolate(torch.rand(n, 1, 9, 9, generator=gen), size=CANVAS, mode="bilinear", align_corners=False)
    plane = 130 * coarse + 50 * torch.rand(n, 1, CANVAS, CANVAS, generator=gen)
    for _ in range(12):
        other = garments[torch.randint(n, (n,), generator=gen)].float()
        a, b = torch.randint(6, 14, (2, n), generator=gen).tolist()
        to = torch.randint(CANVAS - 8, (n, 2), generator=gen).tolist()
        for i in range(n):
            plane[i, :, to[i][0] : to[i][0] + 8, to[i][1] : to[i][1] + 8] = other[i, :, a[i] : a[i] + 8, b[i] : b[i] + 8]
    place = torch.randint(-4, 5, (n, 2), generator=gen) + (CANVAS - 28) // 2
    for i, (top, left) in enumerate(place.tolist()):
        under = plane[i, :, top : top + 28, left : left + 28]
        garment = garments[i].float()
        plane[i, :, top : top + 28, left : left + 28] = torch.where(garment > 0, garment, under)
    return plane.round().clamp(0, 255).to(torch.uint8)


def random_crops(pixels: Tensor, gen: torch.Generator) -> Tensor:
    """One 36 px crop of each canvas, anywhere in its middle 64 px."""
    place = torch.randint(FRAME - CROP + 1, (len(pixels), 2), generator=gen) + (CANVAS - FRAME) // 2
    return torch.stack([p[:, a : a + CROP, b : b + CROP] for p, (a, b) in zip(pixels, place.tolist(), strict=True)])


def smooth_filters(patch: int) -> Tensor:
    """The control: brightness blurred over the patch (ties: a random filter)."""
    return torch.stack([torch.ones(1, patch, patch), random_filters(patch, 0)[1]])


class CentreCrop(nn.Module):
    """The answer, asked about the middle of the frame."""

    def __init__(self, answer: nn.Module) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, x: Tensor) -> Tensor:
        a = (FRAME - CROP) // 2
        return self.answer(x[:, :, a : a + CROP, a : a + CROP])


def crop_changes(chooser: CropChosen, big: Tensor, shifts: tuple[tuple[int, int], ...]) -> list[Tensor]:
    """For each shift: which images have another crop than in the middle frame, in the scene's own coordinates."""
    place = {d: chooser.place(realistic_shift(big, d, (FRAME, FRAME))) for d in ((0, 0), *shifts)}
    row, column = place[0, 0]
    return [(place[d][0] + d[0] != row) | (place[d][1] + d[1] != column) for d in shifts]


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    train, test, passes = (48, 24, 1) if small else (4000, 2000, 8)
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def job(seed: int = seed) -> tuple[nn.Module, Tensor, Tensor]:
            data = bench.data("fashion-mnist", train=train, test=test, seed=seed)
            scenes = canvases(data.x.take(data.split.train), generator(seed, "train canvases"))
            crops = torch.cat([random_crops(scenes, generator(seed, "crops", i)) for i in range(passes)])
            y = data.y[data.split.train].repeat(passes)
            mean, std = float(crops.float().mean()) / 255, float(crops.float().std()) / 255
            none = torch.empty(0, dtype=torch.int64)
            preprocess = Preprocess("image", 1, (CROP, CROP), "letterbox", (mean,), (std,))
            made = Data(MemoryStore(crops), y, Split(torch.arange(len(y)), none, none), data.classes, preprocess, origin="garments in clutter")
            done = bench.train(made, model="resnet:layers=(1,1,1),widths=(8,16,32)", epochs=1, batch=16 if small else 128, lr=0.1, seed=seed)
            big = canvases(data.x.take(data.split.test), generator(seed, "test canvases")).float().div_(255)
            return done.answer.cpu().eval(), big, data.y[data.split.test]

        def cell(arm: str, job: Any = job, seed: int = seed) -> dict[str, float]:
            answer, big, y = job()
            frames = [realistic_shift(big, d, (FRAME, FRAME)) for d in ((0, 0), *neighbours())]
            if arm == "centre":
                return consistency(CentreCrop(answer), frames[0], frames[1:], y)
            chooser = CropChosen(answer, random_filters(5, seed) if arm == "rics" else smooth_filters(15), CROP)
            changed = crop_changes(chooser, big, neighbours())
            sideways = [c for c, d in zip(changed, neighbours(), strict=True) if 0 in d]
            slanted = [c for c, d in zip(changed, neighbours(), strict=True) if 0 not in d]
            return {
                **consistency(chooser, frames[0], frames[1:], y),
                "changed_sideways": float(torch.stack(sideways).double().mean()),
                "changed_slanted": float(torch.stack(slanted).double().mean()),
                "changed_worst": float(torch.stack(changed).any(0).double().mean()),
            }

        for arm in ("centre", "rics", "smooth"):
            bench.arm(arm, seed, functools.partial(cell, arm))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    centre, rics = column(numbers, "centre", "worst_flips"), column(numbers, "rics", "worst_flips")
    fewer = paired("worst-of-8 flips, centre crop minus RICS", centre, rics)
    relative = 1 - statistics.fmean(rics) / statistics.fmean(centre) if any(centre) else -math.inf
    cost = paired("accuracy, RICS minus centre crop", column(numbers, "rics", "accuracy"), column(numbers, "centre", "accuracy"))
    bounds = {"changed_sideways": 1 - theoretical_consistency(FRAME, CROP, 1), "changed_slanted": 1 - theoretical_consistency(FRAME, CROP, (1, 1))}
    rates = {name: statistics.fmean(column(numbers, "rics", name)) for name in bounds}
    rules = {
        "crop changes at most 2 points above the bound": all(rates[name] <= bounds[name] + 0.02 for name in bounds),
        "flips 30 % rarer, interval above 0": bool(relative >= 0.3 and fewer.low > 0),
        "at most 3 points of accuracy": cost.mean >= -0.03,
    }
    comparisons = [
        fewer,
        paired("single flips, centre crop minus RICS", column(numbers, "centre", "flips"), column(numbers, "rics", "flips")),
        cost,
        paired("sideways crop changes, smooth score minus random filter (reported)", *(column(numbers, arm, "changed_sideways") for arm in ("smooth", "rics"))),
        {"what": "crop changes and their bounds", **{f"{k}": v for k, v in rates.items()}, **{f"{k} bound": v for k, v in bounds.items()},
         "changed_worst": statistics.fmean(column(numbers, "rics", "changed_worst")), "changed_worst bound": 1 - worst_of_eight(FRAME, CROP)},
        {"what": "rules", "flips rarer by": relative, **rules},
    ]  # fmt: skip
    if fewer.mean <= 0 or cost.mean < -0.06 or any(rates[name] > 2 * bounds[name] for name in bounds):
        return "contradicted", comparisons
    return ("supported" if all(rules.values()) else "inconclusive"), comparisons
