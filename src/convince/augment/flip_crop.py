"""Flip and crop: pad by reflection, cut at a random place, mirror half of the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from convince.parts import Card

CARD = Card(
    part="flip-crop",
    kind="augmentation",
    title="Random crop after reflection padding, and horizontal mirroring",
    expects=("images",),
    departs=("pads by reflection, so that no black border appears; much of the literature pads with zeros",),
)


def flip_crop(x: Float[Tensor, "n c h w"], pad: float, flip: float, gen: Generator) -> Float[Tensor, "n c h w"]:
    """Shift each image by up to ``pad`` (a share of its sides) and mirror it with probability ``flip``.

    Shapes and layout are kept; the input is not changed. ``pad=0`` and ``flip=0`` return equal pixels.
    """
    n, _, h, w = x.shape
    a, b = round(h * pad), round(w * pad)
    rows = torch.randint(0, 2 * a + 1, (n,), generator=gen).tolist()
    columns = torch.randint(0, 2 * b + 1, (n,), generator=gen).tolist()
    mirrored = (torch.rand(n, generator=gen) < flip).tolist()
    wide = F.pad(x, (b, b, a, a), mode="reflect") if a or b else x
    out = torch.empty_like(x)
    for i, (r, c, m) in enumerate(zip(rows, columns, mirrored, strict=True)):
        cut = wide[i, :, r : r + h, c : c + w]
        out[i] = cut.flip(-1) if m else cut
    return out


@final
@dataclass
class FlipCrop:
    """Apply :func:`flip_crop`; labels stay. Each image has its own place and side."""

    pad: float = 0.125
    flip: float = 0.5

    def __call__(self, x: Tensor, y: Tensor | None, gen: Generator) -> tuple[Tensor, Tensor | None]:
        return flip_crop(x, self.pad, self.flip, gen), y
