"""Eigen-CAM on digits in clutter: does it find the digit as well as Grad-CAM, and still where the classifier errs?"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.claims.smooth_grad_cam_pp import taught
from convince.explain.eigen_cam import THRESHOLDS, EigenCam, wsol_iou
from convince.explain.grad_cam import GradCam
from convince.explain.layer import find_layer
from convince.explain.localisation import iou, pointing_hit
from convince.explain.score_cam import maps_of
from convince.explain.smooth_grad_cam_pp import SmoothGradCamPp
from convince.fit.randomness import generator

SAYS = (
    "Eigen-CAM finds the object as well as Grad-CAM does, loses less than Grad-CAM where the classifier is wrong, "
    "because it asks for no class, and holds under adversarial noise."
)
SUPPORTED = (
    "IoU of the boxes: on correct images Eigen-CAM at least Grad-CAM - 0.02 (means over seeds); its loss from correct to misclassified images smaller than "
    "Grad-CAM's by at least 0.05 on average and smaller in every seed; on FGSM images within 0.1 of its own on correct ones (mean)."
)
CONTRADICTED = "On correct images below Grad-CAM by more than 0.05, or its loss on misclassified images not smaller than Grad-CAM's (means over seeds)."
BUDGET = (
    "mnist, one digit anywhere on a 64x64 canvas with six 8x8 pieces of other digits; 6,000 train, 1,000 test canvases; 4 convolutions 16-32-64-64 with batch "
    "norms, global average pooling, 3 epochs of cross-entropy; 5 seeds (the catalogue asks for 3). Batch norms are ours: on a seed that is not used here (100) "
    "the plain network got 21 % right after 3 epochs and this one 88 %, and the claim is about a classifier that errs now and then. Maps of the predicted "
    "class; FGSM of 0.1 on the correct images. The threshold that cuts the box is the best of 16 (0.15 to 0.9 of the maximum) on 50 other images, for each "
    "method and seed. Controls: mean activation map, random map, a fixed central box. "
    "With fewer than 60 misclassified images in a seed the verdict is inconclusive."
)

SEEDS = 5
SIDE, PIECES, PIECE = 64, 6, 8
MINIMUM = 60  # misclassified images
Maps = Callable[[nn.Module, Tensor, Tensor], Tensor]


def cluttered(images: Tensor, labels: Tensor, count: int, gen: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(pixels [n 1 64 64] in [0, 1], class numbers, boxes [n 4] around the digit's pixels of at least 0.2). ``images`` uint8 [N 1 28 28]."""
    x, boxes = torch.zeros(count, 1, SIDE, SIDE), torch.zeros(count, 4)
    rows = torch.randint(len(images), (count, 1 + PIECES), generator=gen)
    at = torch.randint(SIDE - 28 + 1, (count, 2), generator=gen)
    piece_at = torch.randint(SIDE - PIECE + 1, (count, PIECES, 2), generator=gen)
    cut = 6 + torch.randint(28 - 12 - PIECE + 1, (count, PIECES, 2), generator=gen)  # pieces come from the middle, where the strokes are
    for i in range(count):
        for j in range(PIECES):
            (top, left), (down, right) = piece_at[i, j].tolist(), cut[i, j].tolist()
            x[i, 0, top : top + PIECE, left : left + PIECE] = images[rows[i, 1 + j], 0, down : down + PIECE, right : right + PIECE].float() / 255
        digit = images[rows[i, 0], 0].float() / 255
        top, left = at[i].tolist()
        place = x[i, 0, top : top + 28, left : left + 28]
        torch.maximum(place, digit, out=place)
        inked = (digit >= 0.2).nonzero()
        (up, west), (low, east) = inked.amin(0).tolist(), inked.amax(0).tolist()
        boxes[i] = torch.tensor([left + west, top + up, left + east + 1, top + low + 1], dtype=boxes.dtype)
    return x, labels[rows[:, 0]], boxes


def conv_net() -> nn.Module:
    """conv3x3 - batch norm - ReLU four times, 2x2 max-pool after the first three (8x8x64), global average pooling, a linear head."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate([(1, 16), (16, 32), (32, 64), (64, 64)]):
        layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)] + ([nn.MaxPool2d(2)] if i < 3 else [])
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def fgsm(net: nn.Module, x: Tensor, y: Tensor, eps: float = 0.1) -> Tensor:
    """One step of ``eps`` against the label, in [0, 1]."""
    found = []
    for pixels, label in zip(x.split(100), y.split(100), strict=True):
        pixels = pixels.clone().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(net(pixels), label, reduction="sum"), pixels)
        found.append((pixels + eps * gradient.sign()).clamp(0, 1).detach())
    return torch.cat(found)


def by(explainer: Any) -> Maps:
    """Maps of the predicted class, 100 images at once."""
    return lambda net, x, _: torch.cat([explainer(net, part).map for part in x.split(100)])


def mean_activation(net: nn.Module, x: Tensor, _: Tensor) -> Tensor:
    """The mean of the feature maps that the others read."""
    layer = find_layer(net, x, torch.zeros(1, dtype=torch.int64))
    maps = torch.cat([maps_of(net, part, layer).mean(1, keepdim=True) for part in x.split(100)])
    return F.interpolate(maps, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def random_map(net: nn.Module, x: Tensor, seeds: Tensor) -> Tensor:
    """8x8 random values, enlarged as the maps are."""
    values = torch.rand(len(x), 1, 8, 8, generator=generator(int(seeds[0]), "random map"))
    return F.interpolate(values, size=(SIDE, SIDE), mode="bilinear", align_corners=False)


def inside(boxes: Tensor) -> Tensor:
    """Bool [n 1 64 64]: the pixels of each box."""
    at = torch.arange(SIDE)
    left, top, right, bottom = (side[:, None] for side in boxes.T)
    return (((at >= top) & (at < bottom))[:, :, None] & ((at >= left) & (at < right))[:, None, :])[:, None]


def groups(job: dict[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """(images, boxes) of the three groups and of the images that choose the threshold."""
    x, boxes, right = job["x"], job["boxes"], job["right"]
    return {"correct": (x[right], boxes[right]), "wrong": (x[~right], boxes[~right]), "fgsm": (job["attacked"], boxes[right]), "tune": job["tune"]}


def localised(job: dict[str, Any], maps: Maps, seed: int) -> dict[str, float]:
    """Mean IoU and pointing hits of each group at the threshold that is best on the images for tuning."""
    made = {name: (maps(job["net"], x, torch.tensor([seed])), boxes) for name, (x, boxes) in groups(job).items()}
    best = int(wsol_iou(*made.pop("tune")).mean(1).argmax())
    row = {"threshold": THRESHOLDS[best], "misclassified": float((~job["right"]).sum())}
    for name, (found, boxes) in made.items():
        row[name] = float(wsol_iou(found, boxes, THRESHOLDS[best : best + 1]).mean())
        row[f"{name} pointing"] = float(pointing_hit(found, inside(boxes)).double().mean())
    return row


def central(job: dict[str, Any]) -> dict[str, float]:
    """IoU of a box of 28 pixels in the middle."""
    box = torch.tensor([[18.0, 18, 46, 46]])
    return {name: float(iou(box.expand(len(boxes), 4), boxes).mean()) for name, (_, boxes) in groups(job).items() if name != "tune"}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    for seed in range(2 if small else SEEDS):

        @functools.cache
        def job(seed: int = seed) -> dict[str, Any]:
            data = bench.data("mnist", train=400 if small else 12_000, test=200 if small else 4000, seed=seed)
            take = {part: (data.x.take(data.split[part]), data.y[data.split[part]]) for part in ("train", "test")}
            x, y, _ = cluttered(*take["train"], 400 if small else 6000, generator(seed, "clutter train"))
            net = taught(conv_net, x, y, F.cross_entropy, 6 if small else 3, seed).requires_grad_(False)
            x, y, boxes = cluttered(*take["test"], 100 if small else 1000, generator(seed, "clutter test"))
            tune, _, tune_boxes = cluttered(*take["test"], 8 if small else 50, generator(seed, "clutter tune"))
            with torch.no_grad():
                right = torch.cat([net(part).argmax(1) for part in x.split(100)]) == y
            attacked = fgsm(net, x[right], y[right])
            return {"net": net, "x": x, "boxes": boxes, "right": right, "attacked": attacked, "tune": (tune, tune_boxes)}

        arms: dict[str, Maps] = {
            "eigen-cam": by(EigenCam()),
            "grad-cam": by(GradCam()),
            "grad-cam++": by(SmoothGradCamPp(sigma=0.0)),
            "mean activation": mean_activation,
            "random map": random_map,
        }
        for arm, maps in arms.items():
            bench.arm(arm, seed, lambda maps=maps, job=job, seed=seed: localised(job(), maps, seed))  # type: ignore[misc]
        bench.arm("central box", seed, lambda job=job: central(job()))  # type: ignore[misc]


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    found = {group: {arm: column(numbers, arm, group) for arm in numbers} for group in ("correct", "wrong", "fgsm")}
    right, wrong, fooled = found["correct"], found["wrong"], found["fgsm"]
    loss = {arm: [a - b for a, b in zip(right[arm], wrong[arm], strict=True)] for arm in numbers}
    behind = statistics.fmean(right["eigen-cam"]) - statistics.fmean(right["grad-cam"])
    smaller = [g - e for e, g in zip(loss["eigen-cam"], loss["grad-cam"], strict=True)]
    shaken = statistics.fmean(fooled["eigen-cam"]) - statistics.fmean(right["eigen-cam"])
    enough = min(column(numbers, "eigen-cam", "misclassified")) >= MINIMUM
    rules = {
        "correct: not below grad-cam by more than 0.02": behind >= -0.02,
        "wrong: loss smaller by 0.05 on average": statistics.fmean(smaller) >= 0.05,
        "wrong: loss smaller in every seed": min(smaller) > 0,
        "fgsm: within 0.1 of correct": abs(shaken) <= 0.1,
        "60 misclassified in every seed": enough,
    }
    comparisons = [
        paired("IoU on correct images, eigen-cam minus grad-cam", right["eigen-cam"], right["grad-cam"]),
        paired("loss of IoU from correct to misclassified, grad-cam minus eigen-cam", loss["grad-cam"], loss["eigen-cam"]),
        paired("IoU under FGSM minus on correct images, eigen-cam", fooled["eigen-cam"], right["eigen-cam"]),
        paired("IoU under FGSM minus on correct images, grad-cam", fooled["grad-cam"], right["grad-cam"]),
        paired("IoU on correct images, eigen-cam minus mean activation map", right["eigen-cam"], right["mean activation"]),
        paired("IoU on misclassified images, eigen-cam minus mean activation map", wrong["eigen-cam"], wrong["mean activation"]),
        paired("IoU on correct images, eigen-cam minus central box", right["eigen-cam"], right["central box"]),
        {"what": "rules", **rules},
    ]
    if not enough:
        return "inconclusive", comparisons
    if all(rules.values()):
        return "supported", comparisons
    return "contradicted" if behind < -0.05 or statistics.fmean(smaller) <= 0 else "inconclusive", comparisons
