"""PolyLoss: cross-entropy as a power series in 1 - Pt, its first coefficient shifted by one number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="poly1",
    kind="loss",
    paper="polyloss",
    title="PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions",
    year=2022,
    url="https://arxiv.org/abs/2204.12511",
    strength="epsilon",
    off=0.0,
    claims=("objective",),
    expects=("labels", "logits"),
    departs=("epsilon is 1 until it is tuned, which the paper does for each task",),
)


def poly1_cross_entropy(
    logits: Float[Tensor, "n k"],
    y: Float[Tensor, "n k"],
    epsilon: float = 1.0,
    label_smoothing: float = 0.0,
    weight: Float[Tensor, " k"] | None = None,
) -> Float[Tensor, " n"]:
    """Each row's ``CE + epsilon * (1 - Pt)`` (L_Poly-1), ``Pt = sum_k y_k softmax(logits)_k``.

    Rows of ``y`` are class weights. ``label_smoothing`` mixes them with the uniform row first; ``weight``
    multiplies each class's terms. ``epsilon > 0`` keeps pushing confident rows, ``-1 < epsilon < 0`` tames
    them; below -1 the leading gradient changes its sign. ``epsilon=0`` is cross-entropy bit for bit.
    """
    _same_shape(logits, y)
    losses = F.cross_entropy(logits, y, weight, reduction="none", label_smoothing=label_smoothing)
    if label_smoothing:
        y = y * (1 - label_smoothing) + y.sum(1, keepdim=True) * (label_smoothing / y.shape[1])
    return losses + epsilon * _miss(logits, y if weight is None else y * weight)


def poly_n(logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"], epsilon: Sequence[float]) -> Float[Tensor, " n"]:
    """Each row's ``CE + sum_j epsilon_j (1 - Pt)^j`` for j = 1 to N (L_Poly-N); no epsilon at all is cross-entropy."""
    _same_shape(logits, y)
    losses = F.cross_entropy(logits, y, reduction="none")
    miss, power = _miss(logits, y), torch.ones_like(losses)
    for e in epsilon:
        power = power * miss
        losses = losses + e * power
    return losses


def poly1_focal(logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"], epsilon: float = 1.0, gamma: float = 2.0) -> Float[Tensor, " n"]:
    """Each row's ``-(1 - Pt)^gamma log Pt + epsilon (1 - Pt)^(gamma + 1)``, softmax version; CE in place of -log Pt for soft labels."""
    _same_shape(logits, y)
    miss = _miss(logits, y)
    return miss**gamma * F.cross_entropy(logits, y, reduction="none") + epsilon * miss ** (gamma + 1)


def poly1_focal_sigmoid(
    logits: Float[Tensor, "*any"], y: Float[Tensor, "*any"], epsilon: float = 1.0, gamma: float = 2.0, alpha: float | None = None
) -> Float[Tensor, "*any"]:
    """As :func:`poly1_focal` for each binary score alone (detection): ``Pt = p`` where y is 1, else ``1 - p``.

    With ``alpha`` [0 to 1] the whole term is multiplied by alpha where y is 1, else by ``1 - alpha``.
    """
    miss = torch.sigmoid(-logits) * y + torch.sigmoid(logits) * (1 - y)
    loss = miss**gamma * F.binary_cross_entropy_with_logits(logits, y, reduction="none") + epsilon * miss ** (gamma + 1)
    return loss if alpha is None else loss * (alpha * y + (1 - alpha) * (1 - y))


def poly_drop(logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"], n: int) -> Float[Tensor, " n"]:
    """Each row's series cut after ``n`` terms, ``sum_{j=1..n} (1 - Pt)^j / j`` (L_Drop): -log Pt as n grows."""
    _same_shape(logits, y)
    miss = _miss(logits, y)
    total = torch.zeros_like(miss)
    for j in range(n, 0, -1):
        total = (total + 1 / j) * miss
    return total


def tune_epsilon(fit: Callable[[float], float], grid: Sequence[float] = (-1.0, -0.5, 0.0, 1.0, 2.0, 4.0)) -> tuple[float, dict[float, float]]:
    """The epsilon of the grid with the highest ``fit(epsilon)`` (validation accuracy), the first where several tie; and all scores."""
    scores = {e: fit(e) for e in grid}
    return max(scores, key=lambda e: scores[e]), scores


def _miss(logits: Tensor, y: Tensor) -> Tensor:
    """``1 - Pt`` of each row; 0 for a row without label."""
    return (y * (1 - logits.softmax(1))).sum(1)


def _same_shape(logits: Tensor, y: Tensor) -> None:
    if logits.shape != y.shape:
        raise Mistake(f"labels of shape {tuple(y.shape)} for logits of shape {tuple(logits.shape)}: labels are class weights [n k]; F.one_hot makes them")


@final
class Poly1(nn.Module):
    """:func:`poly1_cross_entropy` as a loss; about 2 suits ImageNet classifiers in the paper, ``epsilon=0`` is off."""

    def __init__(self, epsilon: float = 1.0, reduction: str = "mean") -> None:
        super().__init__()
        if not math.isfinite(epsilon):
            raise Mistake(f"poly1: epsilon={epsilon}: must be a finite number; 1 or 2 is usual, 0 is plain cross-entropy")
        if reduction not in ("mean", "sum", "none"):
            raise Mistake(f"poly1: reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
        self.epsilon, self.reduction = epsilon, reduction

    def forward(self, logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Tensor:
        losses = poly1_cross_entropy(logits, y, self.epsilon)
        return losses.mean() if self.reduction == "mean" else losses.sum() if self.reduction == "sum" else losses

    def extra_repr(self) -> str:
        return f"epsilon={self.epsilon}, reduction={self.reduction!r}"
