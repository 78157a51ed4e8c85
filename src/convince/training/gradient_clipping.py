"""Gradient clipping: scale the whole gradient down to a largest norm."""

from __future__ import annotations

import math
from dataclasses import dataclass
from math import inf
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.state import named
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="gradient-clipping",
    kind="technique",
    title="On the difficulty of training Recurrent Neural Networks",
    year=2013,
    url="https://arxiv.org/abs/1211.5063",
    strength="max_norm",
    off=inf,
    tiny={"max_norm": 0.05},
    departs=("the largest norm is 1, a common choice; the paper takes it from the mean norm over many steps of training",),
)


def clip_gradients(parameters: list[nn.Parameter], max_norm: float) -> Float[Tensor, ""]:
    """Multiply all gradients by ``min(1, max_norm / norm)`` in place, norm over all of them together (algorithm 1); return the norm before.

    1e-6 is added to the norm, so a gradient of zero stays zero.
    """
    return nn.utils.clip_grad_norm_(parameters, max_norm)


@final
@dataclass
class GradientClipping(Technique):
    """Apply :func:`clip_gradients` before each update; ``max_norm=inf`` is off.

    Runs before noise is added to gradients and after they are averaged over processes.
    """

    max_norm: float = 1.0
    rank = 10

    def __post_init__(self) -> None:
        if not self.max_norm > 0:
            raise Mistake(f"gradient-clipping: max_norm={self.max_norm}: must be above 0; 1 is usual, inf is off")

    def on_grad(self, run: Run) -> None:
        if math.isfinite(self.max_norm):
            clip_gradients([p for _, p in named(run)], self.max_norm)
