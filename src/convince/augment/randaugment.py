"""RandAugment: a few operations for each image, drawn from fourteen, all at one magnitude."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="randaugment",
    kind="augmentation",
    title="RandAugment: Practical automated data augmentation with a reduced search space",
    year=2019,
    url="https://arxiv.org/abs/1909.13719",
    departs=(
        "operations and magnitudes are torchvision's: 31 bins, empty borders black, and a coin for the sign of those that have one",
        "operations on colours leave images alone that have neither one nor three channels",
    ),
    strength="layers",
    off=0,
    tiny={"layers": 2},
    expects=("images",),
)
BINS = 31
OPS: tuple[str, ...] = ("identity", "shear-x", "shear-y", "translate-x", "translate-y", "rotate", "brightness", "color", "contrast", "sharpness")
OPS += ("posterize", "solarize", "autocontrast", "equalize")
SIGNED = OPS[1:10]
COLOUR = OPS[6:]


def strength_of(op: str, magnitude: int, h: int, w: int) -> float:
    """What ``magnitude`` of 0 to 30 means for an operation: a slope, pixels, degrees, a factor's distance from 1, bits, or a threshold 0 to 1."""
    share = magnitude / (BINS - 1)
    match op:
        case "shear-x" | "shear-y":
            return 0.3 * share
        case "translate-x":
            return 150 / 331 * w * share
        case "translate-y":
            return 150 / 331 * h * share
        case "rotate":
            return 30 * share
        case "brightness" | "color" | "contrast" | "sharpness":
            return 0.9 * share
        case "posterize":
            return 8 - round(magnitude / ((BINS - 1) / 4))
        case "solarize":
            return 1 - share
    return 0.0


def apply(op: str, x: Float[Tensor, "n c h w"], strength: float) -> Float[Tensor, "n c h w"]:
    """One operation on all images, [0, 1] pixels, ``strength`` signed as :func:`strength_of` gives it."""
    from torchvision.transforms import functional as tv

    if op in COLOUR and x.shape[1] not in (1, 3):
        return x
    match op:
        case "shear-x" | "shear-y":
            angle = math.degrees(math.atan(strength))
            return tv.affine(x, 0.0, [0, 0], 1.0, [angle, 0.0] if op == "shear-x" else [0.0, angle], center=[0, 0])
        case "translate-x" | "translate-y":
            return tv.affine(x, 0.0, [int(strength), 0] if op == "translate-x" else [0, int(strength)], 1.0, [0.0, 0.0])
        case "rotate":
            return tv.rotate(x, strength)
        case "brightness":
            return tv.adjust_brightness(x, 1 + strength)
        case "color":
            return tv.adjust_saturation(x, 1 + strength)
        case "contrast":
            return tv.adjust_contrast(x, 1 + strength)
        case "sharpness":
            return tv.adjust_sharpness(x, 1 + strength)
        case "solarize":
            return tv.solarize(x, strength)
        case "autocontrast":
            return tv.autocontrast(x)
        case "posterize" | "equalize":  # on 256 levels
            levels = (x * 255).round().to(torch.uint8)
            return (tv.posterize(levels, int(strength)) if op == "posterize" else tv.equalize(levels)).to(x.dtype) / 255
    return x


def randaugment(x: Float[Tensor, "n c h w"], layers: int, magnitude: int, gen: Generator) -> Float[Tensor, "n c h w"]:
    """``layers`` operations one after the other on each image, each drawn evenly from :data:`OPS`, at ``magnitude`` of 0 to 30.

    Shape, dtype and layout stay, and pixels stay in [0, 1]; the input is not changed. ``layers=0`` returns the input.
    """
    n, _, h, w = x.shape
    for _ in range(layers):
        ops = torch.randint(len(OPS), (n,), generator=gen)
        minus = torch.rand(n, generator=gen) < 0.5
        out = x.clone()
        for number, op in enumerate(OPS[1:], 1):
            for sign in (False, True) if op in SIGNED else (None,):
                rows = ((ops == number) & (minus == sign if sign is not None else True)).nonzero()[:, 0].to(x.device)
                if len(rows):
                    strength = strength_of(op, magnitude, h, w)
                    out[rows] = apply(op, x[rows], -strength if sign else strength).clamp(0, 1)
        x = out
    return x


@final
@dataclass
class RandAugment:
    """Apply :func:`randaugment`; labels stay. ``layers=0`` is off. Magnitudes of 5 suit small images, 10 to 15 photographs."""

    layers: int = 2
    magnitude: int = 9

    def __post_init__(self) -> None:
        if not isinstance(self.layers, int) or self.layers < 0:
            raise Mistake(f"randaugment: layers={self.layers}: operations an image, a whole number from 0 (off); 2 is usual")
        if not isinstance(self.magnitude, int) or not 0 <= self.magnitude < BINS:
            raise Mistake(f"randaugment: magnitude={self.magnitude}: must be a whole number from 0 to {BINS - 1}; 9 is usual")

    def __call__(self, x: Tensor, y: Tensor | None, gen: Generator) -> tuple[Tensor, Tensor | None]:
        return randaugment(x, self.layers, self.magnitude, gen), y
