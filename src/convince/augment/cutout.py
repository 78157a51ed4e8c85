"""Cutout: blank a square at a random place of each training image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Generator, Tensor

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="cutout",
    kind="technique",
    title="Improved Regularization of Convolutional Neural Networks with Cutout",
    year=2017,
    url="https://arxiv.org/abs/1708.04552",
    strength="size",
    off=0.0,
    expects=("images",),
    departs=("the square is filled with the batch's mean of each channel; the paper fills with 0 after normalisation, which is the set's mean",),
)


def cutout(x: Float[Tensor, "n c h w"], gen: Generator, size: float = 0.5) -> Float[Tensor, "n c h w"]:
    """Blank a square of side ``size`` (a share of the shorter side) around a pixel drawn for each image.

    The square is cut off at the edge. Input is not changed; ``size=0`` returns it.
    """
    n, _, h, w = x.shape
    half = round(size * min(h, w)) // 2
    if half == 0:
        return x
    rows = torch.randint(0, h, (n, 1), generator=gen)
    columns = torch.randint(0, w, (n, 1), generator=gen)
    inside_rows = (torch.arange(h) >= rows - half) & (torch.arange(h) < rows + half)
    inside_columns = (torch.arange(w) >= columns - half) & (torch.arange(w) < columns + half)
    blank = (inside_rows[:, None, :, None] & inside_columns[:, None, None, :]).to(x.device)
    return torch.where(blank, x.mean((0, 2, 3), keepdim=True), x)


@final
@dataclass
class Cutout(Technique):
    """Apply :func:`cutout` to each training batch; labels stay. Half a side for CIFAR-10 in the paper; ``size=0`` is off.

    Runs after crops and mirrors.
    """

    size: float = 0.5
    rank = 55

    def __post_init__(self) -> None:
        if not 0 <= self.size <= 1:
            raise Mistake(f"cutout: size={self.size}: must be a share of the shorter side from 0 (off) to 1")

    def __call__(self, x: Tensor, y: Tensor | None, gen: Generator) -> tuple[Tensor, Tensor | None]:
        return cutout(x, gen, self.size), y

    def on_batch(self, run: Run) -> None:
        run.batch.x, run.batch.y = self(run.batch.x, run.batch.y, run.gen("cutout"))
