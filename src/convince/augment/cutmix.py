"""CutMix: paste a rectangle of a partner image into each image and mix the labels by area."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import numpy as np
import torch
from jaxtyping import Float
from torch import Generator, Tensor

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="cutmix",
    kind="technique",
    paper="cutmix",
    title="CutMix: Regularization Strategy to Train Strong Classifiers with Localizable Features",
    year=2019,
    url="https://arxiv.org/abs/1905.04899",
    strength="prob",
    off=0.0,
    expects=("images", "labels", "logits"),
    departs=("sides and edges of the box are rounded as in the released code, which the paper leaves open",),
)


def box(h: int, w: int, share: float, row: int, column: int) -> tuple[int, int, int, int]:
    """``(top, bottom, left, right)`` of the box around (row, column), cut off at the image's edge; bottom and right exclusive.

    ``share`` [0 to 1] of the area is asked for (``1 - lambda``, eq. 2): the sides are ``h * sqrt(share)`` and
    ``w * sqrt(share)`` before clipping, rounded down, and so are their halves.
    """
    tall, wide = int(h * math.sqrt(share)) // 2, int(w * math.sqrt(share)) // 2
    return max(row - tall, 0), min(row + tall, h), max(column - wide, 0), min(column + wide, w)


def rand_bbox(h: int, w: int, lam: float, gen: Generator) -> tuple[int, int, int, int]:
    """A :func:`box` of share ``1 - lam`` around a pixel drawn uniformly (eq. 2)."""
    row = int(torch.randint(0, h, (), generator=gen))
    column = int(torch.randint(0, w, (), generator=gen))
    return box(h, w, 1 - lam, row, column)


def cutmix(
    x: Float[Tensor, "n c h w"], y: Float[Tensor, "n k"], gen: Generator, alpha: float = 1.0, prob: float = 1.0
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n k"]]:
    """With probability ``prob`` mix the whole batch, one lambda ~ Beta(alpha, alpha) and one box for all (eq. 1).

    Partners are a random permutation of the batch. The partner's share of the label is the box's share of the
    pixels after clipping, so rows of ``y`` keep their sum. Inputs are not changed; dtype, device and layout are kept.
    """
    if float(torch.rand((), generator=gen)) >= prob:
        return x, y
    lam = float(np.random.default_rng(int(torch.randint(2**62, (), generator=gen))).beta(alpha, alpha))
    partner = torch.randperm(len(x), generator=gen).to(x.device)
    h, w = x.shape[2:]
    top, bottom, left, right = rand_bbox(h, w, lam, gen)
    mixed = x.clone()
    mixed[:, :, top:bottom, left:right] = x[:, :, top:bottom, left:right][partner]
    share = (bottom - top) * (right - left) / (h * w)
    return mixed, y * (1 - share) + y[partner] * share


@final
@dataclass
class CutMix(Technique):
    """Apply :func:`cutmix` to each training batch with probability ``prob``: 1 on ImageNet, 0.5 on CIFAR in the paper; 0 is off.

    Runs after crops and mirrors, which would change the shares of pixels, and before labels are smoothed.
    """

    prob: float = 1.0
    alpha: float = 1.0
    rank = 55

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise Mistake(f"cutmix: prob={self.prob}: must be a probability from 0 (off) to 1")
        if not self.alpha > 0:
            raise Mistake(f"cutmix: alpha={self.alpha}: must be above 0; 1 draws every box area alike, and prob=0 switches the part off")

    def __call__(self, x: Tensor, y: Tensor, gen: Generator) -> tuple[Tensor, Tensor]:
        return cutmix(x, y, gen, self.alpha, self.prob)

    def on_batch(self, run: Run) -> None:
        if run.batch.y is not None:
            run.batch.x, run.batch.y = self(run.batch.x, run.batch.y, run.gen("cutmix"))
