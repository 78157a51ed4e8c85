"""FGSM: one step up the loss, as long in every pixel as the ball allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.kinds import Attack, Norm
from convince.parts import Card

CARD = Card(
    part="fgsm",
    kind="attack",
    title="Explaining and Harnessing Adversarial Examples",
    year=2014,
    url="https://arxiv.org/abs/1412.6572",
    strength="eps",
    off=0.0,
    departs=("with norm='2' the step is eps along the gradient itself; the paper has the largest-change norm only",),
)


def loss_gradient(model: nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
    """The gradient of each image's own cross-entropy with respect to its pixels."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), y, reduction="sum"), x)
    return gradient


def steepest(gradient: Float[Tensor, "n ..."], norm: Norm) -> Float[Tensor, "n ..."]:
    """The direction of length 1 in the norm along which the loss rises most: the sign, or the unit gradient (0 where it is 0)."""
    if norm == "inf":
        return gradient.sign()
    flat = gradient.flatten(1)
    largest = flat.abs().amax(1, keepdim=True)
    scaled = flat / largest.where(largest > 0, torch.ones_like(largest))  # squares of tiny gradients would vanish
    return (scaled / scaled.norm(dim=1, keepdim=True).clamp_min(1e-12)).view_as(gradient)


def fgsm(model: nn.Module, x: Float[Tensor, "n ..."], y: Int[Tensor, " n"], eps: float, norm: Norm = "inf") -> Float[Tensor, "n ..."]:
    """``x + eps sign(grad_x loss)`` (section 4), not clipped. The model gives scores [n k] and must be in eval mode."""
    return x.detach() + eps * steepest(loss_gradient(model, x, y), norm)


def fgsm_min(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    *,
    steps: int = 200,
    largest: float = 1.0,
    clip: tuple[float, float] | None = None,
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n ..."]]:
    """(eps, r): for each image the smallest eps of the grid ``largest * (1..steps) / steps`` that changes its answer.

    0 for images answered wrongly already, inf (with r at ``largest``) where none does. ``clip``: the
    pixel range, None for none. r is the change made.
    """
    x = x.detach()
    direction = steepest(loss_gradient(model, x, y), "inf")

    def at(rows: Tensor, eps: float) -> Tensor:
        there = x[rows] + eps * direction[rows]
        return there if clip is None else there.clamp(*clip)

    with torch.no_grad():
        left = (model(x).argmax(1) == y).nonzero()[:, 0]
        found = torch.zeros(len(x), dtype=x.dtype, device=x.device)
        r = torch.zeros_like(x)
        for j in range(1, steps + 1):
            if not len(left):
                break
            there = at(left, largest * j / steps)
            r[left] = there - x[left]
            found[left] = largest * j / steps
            left = left[model(there).argmax(1) == y[left]]
    found[left] = torch.inf
    return found, r


@final
@dataclass
class Fgsm(Attack):
    """The attack of :func:`fgsm`. ``eps`` [pixel value, 0 to 1] is the step where the call names no ball."""

    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise Mistake(f"fgsm: eps={self.eps} must be at least 0, in pixel values 0 to 1 (8/255 is usual)")

    def perturb(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"], *, eps: float | None, norm: Norm) -> Tensor:
        return fgsm(answer, x, y, self.eps if eps is None else eps, norm)
