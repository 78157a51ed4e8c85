"""Layer masking on small photographs: does it disturb predictions less than grey and black patches do?"""

from __future__ import annotations

import functools
import math
import statistics
from typing import Any

import torch
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.explain.layer_masking import masked_forward
from convince.explain.lime import Lime
from convince.explain.maskers import class_entropy, masked_scores
from convince.explain.passes import ROWS, scores
from convince.fit.randomness import generator

SAYS = (
    "Masking inside every layer keeps predictions closer to those of the whole image than black or grey patches do, "
    "and makes them depend no more on the outline of the mask."
)
SUPPORTED = (
    "With half of the 4x4 patches hidden, predictions under layer masking agree with those of the whole image at least 5 points more often than under the "
    "better of black and grey (the training mean), in every seed; and hiding one pixel more around the mask changes no more predictions than with black, in "
    "the mean over seeds."
)
CONTRADICTED = "The mean over seeds of the first difference is at or below 0."
BUDGET = (
    "cifar10, 10,000 images, resnet20, 5 epochs (the catalogue has 8), batch 128; 1,000 test images, 3 seeds; the same masks for all maskers: layer, black, "
    "grey, blur, and partial convolutions (control). Reported only: agreement and class entropy at 25, 50 and 75 %; LIME (8x8 cells, 200 samples) by layer, "
    "black, grey and blur on 30 test images (the catalogue has 60), and random cells: the fall of the chance when the 13 first cells are removed, judged by "
    "all five maskers; shape leak: the ink of 1,000 fashion-mnist test images as the visible region of an even image, read by a resnet8 trained on 5,000 "
    "images for 3 epochs, accuracy above chance."
)

LIME_IMAGES = 30
SEEDS = 3
MASKERS = ("layer", "black", "mean", "blur", "partial")
EXPLAINED = ("layer", "black", "mean", "blur", "random")


def under(answer: nn.Module, x: Tensor, keep: Tensor, masker: str) -> Tensor:
    """Scores [n k] of each image under its mask [n 1 h w], "partial" being layer masking without the fill."""
    if masker != "partial":
        return masked_scores(answer, x, keep[:, None], masker)[:, 0]
    with torch.no_grad():
        return torch.cat([masked_forward(answer, a, b, "partial") for a, b in zip(x.split(ROWS), keep.split(ROWS), strict=True)])


def patches(n: int, size: tuple[int, int], share: float, gen: torch.Generator, side: int = 4) -> Tensor:
    """Bool [n 1 h w], false in ``share`` of the patches of ``side`` pixels, drawn anew for each image."""
    rows, columns = size[0] // side, size[1] // side
    rank = torch.rand(n, rows * columns, generator=gen).argsort(1).argsort(1)
    keep = (rank >= round(share * rows * columns)).view(n, 1, rows, columns)
    return keep.repeat_interleave(side, 2).repeat_interleave(side, 3)


def grown(keep: Tensor) -> Tensor:
    """The mask with its hidden region wider by one pixel."""
    return nn.functional.max_pool2d((~keep).float(), 3, 1, 1) == 0


def missing(answer: nn.Module, x: Tensor, masker: str, seed: int) -> dict[str, float]:
    """Agreement with the whole image and class entropy by share hidden, and the predictions that an outline one pixel wider changes."""
    whole, found = scores(answer, x), {}
    size, k = (x.shape[2], x.shape[3]), whole.shape[1]
    for share in (25, 50, 75):
        keep = patches(len(x), size, share / 100, generator(seed, "patches", share))
        predicted = under(answer, x, keep, masker).argmax(1)
        found[f"agreement_{share}"] = float((predicted == whole.argmax(1)).double().mean())
        found[f"entropy_{share}"] = class_entropy(predicted, k) / math.log(k)
        if share == 50:
            found["outline"] = float((under(answer, x, grown(keep), masker).argmax(1) != predicted).double().mean())
    return found


def explained(answer: nn.Module, x: Tensor, masker: str, samples: int, seed: int) -> dict[str, float]:
    """The fall of the predicted class's chance when LIME's first fifth of 8x8 cells is removed, by each judge."""
    target = scores(answer, x).argmax(1)
    if masker == "random":
        order = torch.rand(len(x), 64, generator=generator(seed, "random cells"))
    else:
        found = Lime(samples=samples, cells=8, masker=masker)(answer, x, target).map
        assert found is not None
        side = x.shape[2] // 8
        order = found[:, 0, ::side, ::side].flatten(1)
    removed = order.argsort(1, descending=True).argsort(1) < 13
    keep = ~removed.view(-1, 1, 8, 8).repeat_interleave(x.shape[2] // 8, 2).repeat_interleave(x.shape[3] // 8, 3)
    whole = scores(answer, x).softmax(1).gather(1, target[:, None])
    return {f"judge_{judge}": float((whole - under(answer, x, keep, judge).softmax(1).gather(1, target[:, None])).mean()) for judge in MASKERS}


def leak(answer: nn.Module, x: Tensor, y: Tensor, even: float, masker: str) -> float:
    """Accuracy above chance on even images of which only the silhouette is visible."""
    keep = x > 0.1
    found = under(answer, torch.full_like(x, even), keep, masker)
    return float((found.argmax(1) == y).double().mean()) - 1 / found.shape[1]


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def photos(seed: int = seed) -> tuple[nn.Module, Tensor]:
            data = bench.data("digits" if small else "cifar10", train=150 if small else 10_000, test=30 if small else 1000, seed=seed)
            how: dict[str, Any] = (
                {"model": "resnet8", "epochs": 1, "batch": 32} if small else {"model": "resnet20", "epochs": 5, "batch": 128, "augment": "auto"}
            )
            answer = bench.train(data, **how, seed=seed).answer.cpu().eval().requires_grad_(False)
            return answer, data.float_batch(data.x.take(data.split.test))

        @functools.cache
        def clothes(seed: int = seed) -> tuple[nn.Module, Tensor, Tensor, float]:
            data = bench.data("digits" if small else "fashion-mnist", train=150 if small else 5000, test=30 if small else 1000, seed=seed)
            answer = (
                bench.train(data, model="resnet8", epochs=1 if small else 3, batch=32 if small else 128, seed=seed).answer.cpu().eval().requires_grad_(False)
            )
            x, seen = data.float_batch(data.x.take(data.split.test)), data.float_batch(data.x.take(data.split.train[:500]))
            return answer, x, data.y[data.split.test], float(seen[seen > 0.1].mean())

        def cell(masker: str, photos: Any = photos, clothes: Any = clothes, seed: int = seed) -> dict[str, float]:
            (answer, x), (other, silhouettes, y, even) = photos(), clothes()
            return {**missing(answer, x, masker, seed), "leak": leak(other, silhouettes, y, even, masker)}

        def lime(masker: str, photos: Any = photos, seed: int = seed) -> dict[str, float]:
            answer, x = photos()
            return explained(answer, x[: 8 if small else LIME_IMAGES], masker, 20 if small else 200, seed)

        for masker in MASKERS:
            bench.arm(masker, seed, functools.partial(cell, masker))
        for masker in EXPLAINED:
            bench.arm(f"lime by {masker}", seed, functools.partial(lime, masker))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    layer, black, mean = (column(numbers, masker, "agreement_50") for masker in ("layer", "black", "mean"))
    best = [max(a, b) for a, b in zip(black, mean, strict=True)]
    more = [a - b for a, b in zip(layer, best, strict=True)]
    outline = {masker: statistics.fmean(column(numbers, masker, "outline")) for masker in MASKERS}
    rules = {
        "5 points above the better of black and grey in every seed": min(more) >= 0.05,
        "outline: not worse than black": outline["layer"] <= outline["black"],
    }

    def fall(masker: str) -> list[float]:
        return [statistics.fmean(by_seed) for by_seed in zip(*(column(numbers, f"lime by {masker}", f"judge_{judge}") for judge in MASKERS), strict=True)]

    comparisons: list[Any] = [
        paired("agreement with half hidden, layer minus the better of black and grey", layer, best),
        paired("agreement with half hidden, layer minus partial convolutions", layer, column(numbers, "partial", "agreement_50")),
        paired("agreement with half hidden, layer minus blur", layer, column(numbers, "blur", "agreement_50")),
        paired("predictions that a wider outline changes, layer minus black", column(numbers, "layer", "outline"), column(numbers, "black", "outline")),
        paired("class entropy with 75 % hidden, layer minus black", column(numbers, "layer", "entropy_75"), column(numbers, "black", "entropy_75")),
        *(paired(f"fall by LIME's first cells, mean of five judges, layer minus {m}", fall("layer"), fall(m)) for m in EXPLAINED[1:]),
        *(paired(f"shape leak, layer minus {m}", column(numbers, "layer", "leak"), column(numbers, m, "leak")) for m in MASKERS[1:]),
        {"what": "rules", **rules},
    ]
    if all(rules.values()):
        return "supported", comparisons
    return ("contradicted" if statistics.fmean(more) <= 0 else "inconclusive"), comparisons
