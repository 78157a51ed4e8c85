"""Blurring images, for what hides or smooths a part of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def gaussian_blur(x: Float[Tensor, "n c h w"], sigma: float, radius: int | None = None) -> Float[Tensor, "n c h w"]:
    """``x`` under a Gaussian of deviation ``sigma`` [pixels], cut at ``radius`` (None: 4 sigma) and scaled to sum 1; edge pixels are repeated outside."""
    radius = math.ceil(4 * sigma) if radius is None else radius
    if sigma == 0 or radius == 0:
        return x
    at = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    bell = (-0.5 * (at / sigma) ** 2).softmax(0)
    with torch.autocast(x.device.type, enabled=False):  # bf16 would leave steps in the picture
        planes = F.pad(x, [radius] * 4, mode="replicate").flatten(0, 1)[:, None]
        return F.conv2d(F.conv2d(planes, bell[None, None, :, None]), bell[None, None, None, :]).view_as(x)
