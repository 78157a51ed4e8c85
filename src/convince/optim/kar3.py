"""Kar3: three sign steps at once, by the gradient and by two moving averages of those before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="kar3",
    kind="optimizer",
    paper="terminator-hyperzzw",
    title="HyperZcdotZcdotW Operator Connects Slow-Fast Networks for Full Context Interaction",
    year=2024,
    url="https://arxiv.org/abs/2401.17948",
    claims=("optimizer",),
    departs=("lr is that of the CIFAR-10 configuration, 0.001215; the released class has 0.0001 where none is given",),
    tiny={"lr": 0.002},
)


@torch.no_grad()
def kar3(params: list[Tensor], grads: list[Tensor], fast: list[Tensor], slow: list[Tensor], *, lr: float, betas: tuple[float, float]) -> None:
    """One step, in place on ``params`` and on the moving averages ``fast`` and ``slow`` of their shapes.

    ``w = w - lr (sign g + sign m_1 + sign m_2)``, and only then ``m_i = betas[i] m_i + (1 - betas[i]) g``: a weight moves by 0 to 3 ``lr``.
    """
    votes = torch._foreach_sign(grads)
    for average in (fast, slow):
        torch._foreach_add_(votes, torch._foreach_sign(average))
    torch._foreach_add_(params, votes, alpha=-lr)
    for average, beta in zip((fast, slow), betas, strict=True):
        torch._foreach_lerp_(average, grads, 1 - beta)


@final
class Kar3(Optimizer):
    """:func:`kar3` as an optimiser: two numbers of state a weight, no weight decay."""

    def __init__(self, params: Iterable[Any], lr: float = 0.001215, betas: tuple[float, float] = (0.5, 0.95)) -> None:
        if not lr >= 0:
            raise Mistake(f"kar3: lr={lr}: must be at least 0; 0.0012 is the paper's, and a weight moves by up to 3 lr a step")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise Mistake(f"kar3: betas={betas}: must be two numbers from 0 to below 1; (0.5,0.95) are the paper's")
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on all parameters that have a gradient; ``closure`` computes the loss anew."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            states = [self.state[p] for p in params]
            for p, state in zip(params, states, strict=True):
                for name in ("fast", "slow"):
                    if name not in state:
                        state[name] = torch.zeros_like(p)
            fast, slow = ([state[name] for state in states] for name in ("fast", "slow"))
            kar3(params, [p.grad for p in params], fast, slow, lr=group["lr"], betas=group["betas"])
        return loss
