"""NovoGrad: gradients divided by one moving norm a layer, then momentum; half of Adam's state."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="novograd",
    kind="optimizer",
    paper="novograd",
    title="Stochastic Gradient Methods with Layer-wise Adaptive Moments for Training of Deep Networks",
    year=2019,
    url="https://arxiv.org/abs/1905.11286",
    claims=("optimizer",),
    departs=(
        "a layer is one parameter tensor: a weight and its bias have their own norms",
        "the learning rate follows the run's schedule; the paper decays it polynomially",
    ),
)


@torch.no_grad()
def novograd(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    v: list[Tensor],
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_averaging: bool = False,
    v_max: list[Tensor] | None = None,
) -> None:
    """One step (algorithm 1), in place on ``params``, momentum ``m`` (of their shapes) and ``v_max``; ``v`` holds this step's moments.

    ``m = betas[0] m + (g / (sqrt(v) + eps) + weight_decay w)`` and ``w = w - lr m``. With ``grad_averaging`` the
    bracket is multiplied by ``1 - betas[0]``; with ``v_max`` (AMSGrad) the largest ``v`` so far divides.
    """
    if v_max is not None:
        torch._foreach_maximum_(v_max, v)
        v = v_max
    norms = torch._foreach_sqrt(v)
    torch._foreach_add_(norms, eps)
    update = torch._foreach_div(grads, norms)
    if weight_decay:
        torch._foreach_add_(update, params, alpha=weight_decay)
    if grad_averaging:
        torch._foreach_mul_(update, 1 - betas[0])
    torch._foreach_mul_(m, betas[0])
    torch._foreach_add_(m, update)
    torch._foreach_add_(params, m, alpha=-lr)


@torch.no_grad()
def second_moments(grads: list[Tensor], before: list[Tensor | None], beta: float) -> list[Tensor]:
    """``beta v + (1 - beta) ||g||^2`` of each tensor; ``||g||^2`` where there is no ``v`` before (algorithm 1)."""
    squares = torch._foreach_norm(grads, 2)
    torch._foreach_mul_(squares, squares)
    old = [v.to(square.device) for v, square in zip(before, squares, strict=True) if v is not None]
    if len(old) == len(squares):
        torch._foreach_lerp_(squares, old, beta)
        return list(squares)
    return [square if v is None else square.lerp(v.to(square.device), beta) for v, square in zip(before, squares, strict=True)]


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of all tensors that an optimiser keeps beside the weights."""
    return sum(t.numel() * t.element_size() for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


@final
class NovoGrad(Optimizer):
    """:func:`novograd` as an optimiser: momentum of each weight and one number a tensor are all its state."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.001,
        grad_averaging: bool = False,
        amsgrad: bool = False,
    ) -> None:
        if not lr >= 0:
            raise Mistake(f"novograd: lr={lr}: must be at least 0; 0.01 is the paper's")
        if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
            raise Mistake(f"novograd: betas={betas}: must be two numbers from 0 to below 1; (0.95,0.98) are the paper's")
        if not eps >= 0:
            raise Mistake(f"novograd: eps={eps}: must be at least 0; 1e-8 is usual")
        if not weight_decay >= 0:
            raise Mistake(f"novograd: weight_decay={weight_decay}: must be at least 0; 0.001 is the paper's")
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "grad_averaging": grad_averaging, "amsgrad": amsgrad}
        super().__init__(params, options)

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
            grads = [p.grad for p in params]
            states = [self.state[p] for p in params]
            moments = second_moments(grads, [state.get("v") for state in states], group["betas"][1])
            for p, state, v in zip(params, states, moments, strict=True):
                if "m" not in state:
                    state["m"] = torch.zeros_like(p)
                if group["amsgrad"]:
                    state["v_max"] = state["v_max"].to(v.device) if "v_max" in state else torch.zeros_like(v)
                state["v"] = v
            v_max = [state["v_max"] for state in states] if group["amsgrad"] else None
            options = {name: group[name] for name in ("lr", "betas", "eps", "weight_decay", "grad_averaging")}
            novograd(params, grads, [state["m"] for state in states], moments, v_max=v_max, **options)
        return loss
