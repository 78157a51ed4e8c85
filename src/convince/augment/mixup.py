"""Mixup: blend each image with a partner image and their labels in the same proportion."""

from __future__ import annotations

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
    part="mixup",
    kind="technique",
    title="mixup: Beyond Empirical Risk Minimization",
    year=2017,
    url="https://arxiv.org/abs/1710.09412",
    strength="alpha",
    off=0.0,
    expects=("labels", "logits"),
)


def mixup(x: Float[Tensor, "n ..."], y: Float[Tensor, "n k"], gen: Generator, alpha: float = 1.0) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n k"]]:
    """``lam * (x, y) + (1 - lam) * (its partner)``, one lam ~ Beta(alpha, alpha) for the batch (section 2); ``alpha=0``: unchanged.

    Partners are a random permutation of the batch. Inputs are not changed; dtype and device are kept.
    """
    if alpha == 0:
        return x, y
    lam = float(np.random.default_rng(int(torch.randint(2**62, (), generator=gen))).beta(alpha, alpha))
    partner = torch.randperm(len(x), generator=gen).to(x.device)
    return x * lam + x[partner] * (1 - lam), y * lam + y[partner] * (1 - lam)


@final
@dataclass
class Mixup(Technique):
    """Apply :func:`mixup` to each training batch: ``alpha`` is 1 on CIFAR and 0.2 on ImageNet in the paper; 0 is off.

    Runs after crops and mirrors and before labels are smoothed.
    """

    alpha: float = 1.0
    rank = 55

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise Mistake(f"mixup: alpha={self.alpha}: must be at least 0; 0.2 blends little, 1 every share alike, 0 is off")

    def __call__(self, x: Tensor, y: Tensor, gen: Generator) -> tuple[Tensor, Tensor]:
        return mixup(x, y, gen, self.alpha)

    def on_batch(self, run: Run) -> None:
        if run.batch.y is not None:
            run.batch.x, run.batch.y = self(run.batch.x, run.batch.y, run.gen("mixup"))
