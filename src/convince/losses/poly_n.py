"""Poly-N: the first N coefficients of cross-entropy's power series shifted, one number each."""

from __future__ import annotations

import math
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.losses.poly1 import poly_n
from convince.parts import Card

CARD = Card(
    part="poly-n",
    kind="loss",
    paper="polyloss",
    title="PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions",
    year=2022,
    url="https://arxiv.org/abs/2204.12511",
    strength="epsilon",
    off=(),
    claims=("objective",),
    expects=("labels", "logits"),
    departs=("the default shifts the first two coefficients by 1 each; the paper tunes them for each task",),
)


@final
class PolyN(nn.Module):
    """:func:`convince.losses.poly1.poly_n` as a loss; ``epsilon=()`` is plain cross-entropy."""

    def __init__(self, epsilon: tuple[float, ...] = (1.0, 1.0), reduction: str = "mean") -> None:
        super().__init__()
        if not isinstance(epsilon, (tuple, list)) or not all(math.isfinite(e) for e in epsilon):
            raise Mistake(f"poly-n: epsilon={epsilon}: must be finite numbers in brackets, the shifts of (1 - Pt), (1 - Pt)^2 ...; write epsilon=(1,0.5)")
        if reduction not in ("mean", "sum", "none"):
            raise Mistake(f"poly-n: reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
        self.epsilon, self.reduction = tuple(epsilon), reduction

    def forward(self, logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Tensor:
        losses = poly_n(logits, y, self.epsilon)
        return losses.mean() if self.reduction == "mean" else losses.sum() if self.reduction == "sum" else losses

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, reduction={self.reduction!r}"
