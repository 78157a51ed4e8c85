"""Slow feedback: the kernels that a Terminator's slow nets generate are drawn towards those of the blocks before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.backbones.terminator import SlowNet, Terminator, tile
from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="slow-feedback",
    kind="technique",
    paper="terminator-hyperzzw",
    title="HyperZcdotZcdotW Operator Connects Slow-Fast Networks for Full Context Interaction",
    year=2024,
    url="https://arxiv.org/abs/2401.17948",
    strength="weight",
    off=0.0,
    expects=("network",),
    host="terminator:channels=(4,8),hidden=8,kernels=(3,3)",
    departs=(
        "label smoothing of 0.09, which the paper trains with, is a part of its own: label-smoothing",
        "weight scales the norm penalty too, so that 0 switches the whole part off; at the paper's 1 nothing changes",
    ),
)


def slow_feedback_loss(kernels: Sequence[Float[Tensor, "1 _ h w"]]) -> Tensor:
    """The sum over all pairs of blocks j < i of ``mean((tile(K_j) - K_i)^2)``: 0 for a single block."""
    pairs = [(kernels[j], kernels[i]) for i in range(len(kernels)) for j in range(i)]
    return torch.stack([(tile(a, b.shape[1]) - b).square().mean() for a, b in pairs]).sum() if pairs else kernels[0].new_zeros(())


def norm_penalty(model: Terminator) -> Tensor:
    """The sum of the norms of the fast net's weights, and 1e-6 times that of the slow nets' weight matrices."""
    slow = {id(p): p.dim() > 1 for m in model.modules() if isinstance(m, SlowNet) for p in m.parameters()}
    fast = [p.norm() for block in model.blocks for p in block.branch.parameters() if id(p) not in slow]  # type: ignore[union-attr]
    return torch.stack(fast).sum() + 1e-6 * torch.stack([p.norm() for p in model.parameters() if slow.get(id(p))]).sum()


def kernels_of(model: nn.Module) -> Terminator:
    """The network, if it has slow nets; else a Mistake."""
    if not isinstance(model, Terminator):
        raise Mistake(f"slow-feedback: {type(model).__name__} has no slow nets whose kernels could be compared; use --model terminator-mini")
    return model


@final
@dataclass
class SlowFeedback(Technique):
    """Add ``weight * (slow_feedback_loss + norm * norm_penalty)`` to the loss of each step; ``weight=0`` is off."""

    weight: float = 1.0
    norm: float = 5e-5

    def __post_init__(self) -> None:
        if self.weight < 0 or self.norm < 0:
            raise Mistake(f"slow-feedback: weight={self.weight}, norm={self.norm}: both must be at least 0 (weight=0 is off)")

    def on_start(self, run: Run) -> None:
        kernels_of(run.model)

    def on_loss(self, run: Run) -> None:
        if self.weight > 0:
            model = kernels_of(run.model)
            run.loss = run.loss + self.weight * (slow_feedback_loss(model.global_kernels()) + self.norm * norm_penalty(model))
