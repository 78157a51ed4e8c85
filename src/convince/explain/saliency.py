"""Saliency: how strongly each pixel moves a class score, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.passes import gradients
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="saliency",
    kind="explainer",
    paper="saliency-maps",
    title="Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency Maps",
    year=2013,
    url="https://arxiv.org/abs/1312.6034",
    departs=(
        "one map of the whole image is the default; crops=10 averages ten as the paper does",
        "crops are enlarged to the size that the answer takes; the paper cuts them out of a larger image",
    ),
)

SHARE = 7 / 8  # of a side in each of the ten crops: 224 of 256 pixels


def saliency(gradient: Float[Tensor, "n c ..."]) -> Float[Tensor, "n 1 ..."]:
    """Section 3.1: ``max_c |dY/dx_c|``, the largest change over a pixel's channels."""
    return gradient.abs().amax(1, keepdim=True)


class _Crop(nn.Module):
    """The answer to a part of the image, mirrored or not, enlarged to the whole size: its gradient lies in place by itself."""

    def __init__(self, answer: nn.Module, rows: slice, columns: slice, mirrored: bool) -> None:
        super().__init__()
        self.answer, self.rows, self.columns, self.mirrored = answer, rows, columns, mirrored

    def forward(self, x: Tensor) -> Tensor:
        part = x[..., self.rows, self.columns]
        return self.answer(F.interpolate(part.flip(3) if self.mirrored else part, size=x.shape[2:], mode="bilinear", align_corners=False))


def ten_crop_saliency(answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"]) -> Float[Tensor, "n 1 h w"]:
    """Section 3.1: the mean of the maps of ten crops (corners, middle, and their mirror images), each pixel over the crops that hold it."""
    h, w = x.shape[2:]
    high, wide = round(SHARE * h), round(SHARE * w)
    corners = [(0, 0), (0, w - wide), (h - high, 0), (h - high, w - wide), ((h - high) // 2, (w - wide) // 2)]
    total, seen = x.new_zeros(len(x), 1, h, w), x.new_zeros(h, w)
    for top, left in corners:
        rows, columns = slice(top, top + high), slice(left, left + wide)
        for mirrored in (False, True):
            total += saliency(gradients(_Crop(answer, rows, columns, mirrored), x, target, "saliency"))
        seen[rows, columns] += 2
    return total / seen


@final
@dataclass
class Saliency(Explainer):
    """The map of :func:`saliency`; for a table [n d], |dY/dx| of each feature, [n 1 d]. ``crops=10``: :func:`ten_crop_saliency`."""

    crops: int = 1

    def __post_init__(self) -> None:
        if self.crops not in (1, 10):
            raise Mistake(f"saliency: crops={self.crops}: must be 1 (the whole image) or 10")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "saliency")
        if self.crops == 10:
            if x.dim() != 4:
                raise Mistake(f"saliency: crops=10 cuts images [n c h w], and the input has shape {tuple(x.shape)}; take crops=1")
            return Explanation(ten_crop_saliency(answer, x.detach(), target))
        gradient = gradients(answer, x, target, "saliency")
        return Explanation(saliency(gradient if gradient.dim() > 2 else gradient[:, None]))
