"""Encouraging loss: cross-entropy with a bonus log(1 - p), so that examples which are right already still gain by more confidence."""

from __future__ import annotations

import math
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="encouraging-loss",
    kind="loss",
    title="Well-classified Examples are Underestimated in Classification with Deep Neural Networks",
    paper="encouraging-loss",
    year=2022,
    url="https://arxiv.org/abs/2110.06537",
    claims=("objective",),
    expects=("labels", "logits"),
    departs=(
        "log_end is 0.75, the released code's default for all tasks; the paper advises 0.5 where accuracy is low, which is not chosen by itself",
        "mixed labels [n k] take the mean of the classes' losses, sum_k y_k L_k; the released code takes one class a row",
    ),
)

FLOOR = 1e-5  # 1 - p is never taken smaller, as in the released code


def bonus(p: Float[Tensor, "*any"], log_end: float = 0.75) -> Float[Tensor, "*any"]:
    """``b(p) = log(1 - p)`` up to ``log_end``, beyond it the tangent there (the conservative bonus); never above 0.

    ``log_end=1`` is the full bonus, whose ``1 - p`` is clamped at 1e-5; beyond ``log_end < 1`` the slope stays ``-1 / (1 - log_end)``.
    """
    curve = (1 - p).clamp_min(FLOOR).log()
    if log_end == 1:
        return curve
    return torch.where(p > log_end, math.log(1 - log_end) - (p - log_end) / (1 - log_end), curve)


def encouraging_loss(
    logits: Float[Tensor, "n k"],
    y: Float[Tensor, "n k"],
    log_end: float = 0.75,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """``sum_k y_k L_k`` with ``L_k = -log p_k + b(p_k)`` and ``p = softmax(logits)``; :func:`bonus` is ``b``.

    Rows of ``y`` are class weights. ``label_smoothing`` s mixes them with the uniform row, so the bonus is in both terms:
    ``(1 - s) L_y + (s / k) sum_k L_k``. A scalar, or [n] with ``reduction="none"``. Negative for confident right answers.
    """
    if logits.shape != y.shape:
        raise Mistake(f"labels of shape {tuple(y.shape)} for logits of shape {tuple(logits.shape)}: labels are class weights [n k]; F.one_hot makes them")
    y = y * (1 - label_smoothing) + y.sum(1, keepdim=True) * (label_smoothing / y.shape[1])
    losses = F.cross_entropy(logits, y, reduction="none") + (y * bonus(logits.softmax(1), log_end)).sum(1)
    return losses if reduction == "none" else losses.mean() if reduction == "mean" else losses.sum()


def margin(logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """``z_y - max_{k != y} z_k``: how far the true class (the largest of ``y``) stands above the best other one; negative where it is wrong."""
    true = F.one_hot(y.argmax(1), y.shape[1]).bool()
    return logits[true] - logits.masked_fill(true, -math.inf).max(1).values


@final
class EncouragingLoss(nn.Module):
    """:func:`encouraging_loss`; ``log_end`` 0 to 1 is where the bonus goes straight: 0.75 suits high accuracy, 0.5 low, 1 is the full bonus.

    The rest of the recipe stays as it is. Training loss can be negative; it is no log-loss.
    """

    def __init__(self, log_end: float = 0.75, label_smoothing: float = 0.0, reduction: str = "mean") -> None:
        super().__init__()
        if not 0 <= log_end <= 1:
            raise Mistake(f"encouraging-loss: log_end={log_end}: must be a probability from 0 to 1; 0.75 is usual, 0.5 where accuracy is low, 1 the full bonus")
        if not 0 <= label_smoothing < 1:
            raise Mistake(f"encouraging-loss: label_smoothing={label_smoothing}: must be a share from 0 (off) up to 1; 0.1 is usual")
        if reduction not in ("mean", "sum", "none"):
            raise Mistake(f"encouraging-loss: reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
        self.log_end, self.label_smoothing, self.reduction = log_end, label_smoothing, reduction

    def forward(self, logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Tensor:
        return encouraging_loss(logits, y, self.log_end, self.label_smoothing, self.reduction)

    def extra_repr(self) -> str:
        return f"log_end={self.log_end}, label_smoothing={self.label_smoothing}, reduction={self.reduction!r}"
