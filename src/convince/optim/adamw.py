"""AdamW: Adam's step, and a weight decay that does not pass through its moments."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, final

import torch

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="adamw",
    kind="optimizer",
    title="Decoupled Weight Decay Regularization",
    year=2017,
    url="https://arxiv.org/abs/1711.05101",
    claims=("optimizer",),
    departs=(
        "the decay of a step is lr times weight_decay, as in torch; in the paper it is the schedule's factor times weight_decay, without Adam's rate",
        "the learning rate follows the run's schedule, without the warm restarts that the paper also studies",
    ),
)


@final
class AdamW(torch.optim.AdamW):
    """``w = w - lr (m' / (sqrt(v') + eps) + weight_decay w)`` with Adam's bias-corrected moments m', v' (algorithm 2, torch's own step).

    All weights decay alike. ``lr`` 0.001 is usual; 0.1, as for SGD, is far too large.
    """

    def __init__(
        self, params: Iterable[Any], lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.01
    ) -> None:
        if not lr >= 0:
            raise Mistake(f"adamw: lr={lr}: must be at least 0; 0.001 is usual")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise Mistake(f"adamw: betas={betas}: must be two numbers from 0 to below 1; (0.9,0.999) are usual")
        if not eps >= 0:
            raise Mistake(f"adamw: eps={eps}: must be at least 0; 1e-8 is usual")
        if not weight_decay >= 0:
            raise Mistake(f"adamw: weight_decay={weight_decay}: must be at least 0; 0.01 is usual")
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
