"""Focal loss: cross-entropy that counts a sample less the surer its answer is."""

from __future__ import annotations

from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="focal-loss",
    kind="loss",
    title="Focal Loss for Dense Object Detection",
    year=2017,
    url="https://arxiv.org/abs/1708.02002",
    departs=("softmax over k classes; the paper's is the sigmoid form for detection", "no class weight alpha: 'cost-sensitive' beside it gives one"),
    strength="gamma",
    off=0.0,
    claims=("objective",),
    expects=("labels", "logits"),
)


def focal(logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"], gamma: float) -> Float[Tensor, " n"]:
    """``-sum_k y_k (1 - p_k)^gamma log p_k`` of each row (eq. 4 without alpha); ``gamma=0`` is cross-entropy."""
    if gamma == 0:
        return nn.functional.cross_entropy(logits, y, reduction="none")
    log_p = logits.log_softmax(1)
    wrong = (1 - log_p.exp()).clamp_min(torch.finfo(log_p.dtype).tiny)  # 0 ** gamma has no finite slope below gamma=1
    return -(y * wrong**gamma * log_p).sum(1)


@final
class FocalLoss(nn.Module):
    """:func:`focal`; ``gamma=0`` is off, 2 the paper's."""

    def __init__(self, gamma: float = 2.0, reduction: Literal["mean", "sum", "none"] = "mean") -> None:
        super().__init__()
        if not gamma >= 0:
            raise Mistake(f"gamma={gamma}: must be at least 0 (cross-entropy); the paper's is 2")
        if reduction not in ("mean", "sum", "none"):
            raise Mistake(f"reduction={reduction!r}: must be 'mean', 'sum' or 'none'")
        self.gamma, self.reduction = gamma, reduction

    def forward(self, logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Tensor:
        losses = focal(logits, y, self.gamma)
        return losses if self.reduction == "none" else losses.mean() if self.reduction == "mean" else losses.sum()
