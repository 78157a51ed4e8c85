"""RISE: what a picture's score is under thousands of random masks; no gradient and no look inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.explain.passes import ROWS, chances, scores
from convince.fit.randomness import generator
from convince.kinds import Explainer
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="rise",
    kind="explainer",
    title="RISE: Randomized Input Sampling for Explanation of Black-box Models",
    year=2018,
    url="https://arxiv.org/abs/1806.07421",
    expects=("images",),
    departs=("1,000 masks are the default; the paper takes 4,000 for VGG-16 and 8,000 for ResNet-50 at 224 px",),
    tiny={"masks": 24, "cells": 3},
)


def random_masks(count: int, size: tuple[int, int], cells: int, share: float, gen: Generator) -> Float[Tensor, "m 1 h w"]:
    """Section 3.2: grids of ``cells`` x ``cells``, each cell kept with chance ``share``, enlarged by one cell, bilinear, and cut at a random shift."""
    h, w = size
    step = (-(-h // cells), -(-w // cells))
    grid = (torch.rand(count, 1, cells, cells, generator=gen) < share).float()
    large = F.interpolate(grid, size=((cells + 1) * step[0], (cells + 1) * step[1]), mode="bilinear", align_corners=False)
    down, right = (torch.randint(0, s, (count,), generator=gen).tolist() for s in step)
    return torch.stack([large[i, :, a : a + h, b : b + w] for i, (a, b) in enumerate(zip(down, right, strict=True))])


def rise(answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], masks: Float[Tensor, "m 1 h w"], share: float) -> Float[Tensor, "n 1 h w"]:
    """Eq. 6: the mean of the masks, each weighed by the chance of the target in the masked picture, over ``share``."""
    total = torch.zeros(len(x), 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    each = max(1, ROWS // len(x))
    for some in masks.split(each):
        shown = (x[:, None] * some[None]).flatten(0, 1)  # rows of one image stand together
        found = chances(answer, scores(answer, shown)).view(len(x), len(some), -1)
        chance = found.gather(2, target[:, None, None].expand(-1, len(some), 1))[..., 0]
        total += torch.einsum("nm,mchw->nchw", chance.to(x.dtype), some)
    return total / (len(masks) * share)


@final
@dataclass
class Rise(Explainer):
    """The map of :func:`rise`: an estimate of the target's chance given that a pixel is shown. Hidden pixels are black."""

    masks: int = 1000
    cells: int = 7
    share: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.masks < 1 or self.cells < 1 or not 0 < self.share < 1:
            raise Mistake(f"rise: masks={self.masks} and cells={self.cells} must be at least 1, share={self.share} between 0 and 1")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        if x.dim() != 4:
            raise Mistake(f"rise masks images [n c h w], and the input has shape {tuple(x.shape)}")
        masks = random_masks(self.masks, (x.shape[2], x.shape[3]), self.cells, self.share, generator("rise", self.seed)).to(x)
        return Explanation(rise(answer, x.detach(), target, masks, self.share), table={"masks": self.masks})
