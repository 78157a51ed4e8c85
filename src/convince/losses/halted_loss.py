"""Halted loss: cross-entropy that stops at a probability, so that examples which are right already teach nothing more."""

from __future__ import annotations

import math
from typing import final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="halted-loss",
    kind="loss",
    title="Well-classified Examples are Underestimated in Classification with Deep Neural Networks",
    paper="encouraging-loss",
    year=2022,
    url="https://arxiv.org/abs/2110.06537",
    strength="threshold",
    off=1.0,
    tiny={"threshold": 0.3},
    claims=("objective",),
    expects=("labels", "logits"),
    departs=(
        "the contrast that shows what losing well-classified examples costs, not a method to use",
        "threshold is 0.9 as a first choice; the paper sweeps it by task",
        "a halted example has the constant loss -log threshold, so that the loss has no step",
    ),
)


def halted_loss(logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"], threshold: float = 0.9) -> Float[Tensor, " n"]:
    """Each row's ``-sum_k y_k log min(p_k, threshold)``: no gradient from a class whose probability is above the threshold.

    Rows of ``y`` are class weights; ``threshold=1`` is cross-entropy bit for bit.
    """
    if logits.shape != y.shape:
        raise Mistake(f"labels of shape {tuple(y.shape)} for logits of shape {tuple(logits.shape)}: labels are class weights [n k]; F.one_hot makes them")
    if threshold == 1:
        return F.cross_entropy(logits, y, reduction="none")
    return -(y * logits.log_softmax(1).clamp_max(math.log(threshold))).sum(1)


@final
class HaltedLoss(nn.Module):
    """:func:`halted_loss`; ``threshold=1`` is off."""

    def __init__(self, threshold: float = 0.9, reduction: str = "mean") -> None:
        super().__init__()
        if not 0 < threshold <= 1:
            raise Mistake(f"halted-loss: threshold={threshold}: must be a probability above 0 and at most 1 (off); 0.9 is usual")
        if reduction not in ("mean", "sum", "none"):
            raise Mistake(f"halted-loss: reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
        self.threshold, self.reduction = threshold, reduction

    def forward(self, logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Tensor:
        losses = halted_loss(logits, y, self.threshold)
        return losses if self.reduction == "none" else losses.mean() if self.reduction == "mean" else losses.sum()

    def extra_repr(self) -> str:
        return f"threshold={self.threshold}, reduction={self.reduction!r}"
