"""SimardDistortion: each image is moved, turned, scaled and bent a little, anew every time it is seen."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="simard-distortion",
    kind="augmentation",
    title="Best Practices for Convolutional Neural Networks Applied to Visual Document Analysis",
    year=2003,
    url="https://doi.org/10.1109/ICDAR.2003.1227801",
    departs=(
        "sizes are those of multi-column networks (Ciresan 2012): elastic 36 with a Gaussian of 6 pixels on 29-pixel images, in proportion on larger ones",
        "all four changes are one bilinear resampling; beyond the image its edge goes on",
    ),
    strength="amount",
    off=0.0,
    expects=("images",),
)
SIDE = 29  # pixels of the images that sigma and alpha are given for


def simard_distort(
    x: Float[Tensor, "n c h w"], gen: Generator, *, translate: float, rotate: float, scale: float, alpha: float, sigma: float
) -> Float[Tensor, "n c h w"]:
    """Resample each image at random places: shifted by up to ``translate`` (a share of its side), turned by up to ``rotate``
    [degrees], scaled by up to ``scale`` in each direction, and bent by a field of displacements.

    The field is uniform noise in [-1, 1], smoothed by a Gaussian of ``sigma`` and multiplied by ``alpha`` [pixels of a side of 29].
    """
    n, _, h, w = x.shape
    shift, angle, size = ((2 * torch.rand(n, count, generator=gen, dtype=torch.float64) - 1) for count in (2, 1, 2))
    turn = angle[:, 0] * math.radians(rotate)
    sizes = 1 + scale * size
    theta = torch.stack(
        [torch.stack([turn.cos() / sizes[:, 0], -turn.sin() / sizes[:, 0]], 1), torch.stack([turn.sin() / sizes[:, 1], turn.cos() / sizes[:, 1]], 1)], 1
    )
    theta = torch.cat([theta, 2 * translate * shift[:, :, None]], 2).to(x)
    grid = F.affine_grid(theta, [n, 1, h, w], align_corners=False)
    noise = (2 * torch.rand(n, 2, h, w, generator=gen) - 1).to(x)
    field = alpha / SIDE * smoothed(noise, sigma)  # in shares of the side
    grid = grid + 2 * field.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


def smoothed(noise: Float[Tensor, "n d h w"], sigma: float) -> Float[Tensor, "n d h w"]:
    """Gaussian smoothing, as if noise were 0 outside; ``sigma`` is for a side of 29 pixels and grows with the side.

    The noise's deviation after smoothing is kept at that of 29 pixels, so that ``alpha`` means the same on any side.
    """
    h, w = noise.shape[-2:]
    kernels = []
    for side in (h, w):
        at = torch.arange(side, device=noise.device, dtype=noise.dtype)
        width = sigma * side / SIDE
        bell = (-(at[:, None] - at[None]).square() / (2 * width**2)).exp()
        kernels.append(bell / (width * math.sqrt(2 * math.pi)) * math.sqrt(side / SIDE))
    return kernels[0] @ noise @ kernels[1].T


@final
@dataclass
class SimardDistortion:
    """Apply :func:`simard_distort`, all four sizes times ``amount``; labels stay. ``amount=0`` is off."""

    amount: float = 1.0
    translate: float = 0.05
    rotate: float = 15.0
    scale: float = 0.15
    alpha: float = 36.0
    sigma: float = 6.0

    def __post_init__(self) -> None:
        if not self.amount >= 0 or not 0 <= self.amount * self.scale < 1:
            raise Mistake(f"simard-distortion: amount={self.amount}, scale={self.scale}: amount is at least 0 (off), and amount times scale below 1")
        if not self.sigma > 0:
            raise Mistake(f"simard-distortion: sigma={self.sigma}: the Gaussian's deviation must be above 0 pixels; 5 to 6 is usual")

    def __call__(self, x: Tensor, y: Tensor | None, gen: Generator) -> tuple[Tensor, Tensor | None]:
        if self.amount == 0:
            return x, y
        a = self.amount
        sizes = {"translate": a * self.translate, "rotate": a * self.rotate, "scale": a * self.scale, "alpha": a * self.alpha}
        return simard_distort(x, gen, **sizes, sigma=self.sigma), y
