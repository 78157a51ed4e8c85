"""PGD: many small steps up the loss, each brought back into the ball, from a random start."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.kinds import Attack, Norm, project
from convince.parts import Card
from convince.robust.fgsm import loss_gradient, steepest

CARD = Card(
    part="pgd",
    kind="attack",
    title="Towards Deep Learning Models Resistant to Adversarial Attacks",
    year=2017,
    url="https://arxiv.org/abs/1706.06083",
    strength="eps",
    off=0.0,
    tiny={"steps": 5},
    departs=(
        "the step is 2.5 eps / steps unless given; the paper names 2/255 for CIFAR-10 (eps 8/255, 20 steps: 1/255 here) and 0.01 for MNIST",
        "one start; the paper also reports several",
    ),
)


def pgd(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    gen: Generator | None,
    *,
    eps: float,
    steps: int = 20,
    step: float | None = None,
    norm: Norm = "inf",
    clip: tuple[float, float] | None = (0.0, 1.0),
) -> Float[Tensor, "n ..."]:
    """Section 2.1: ``x <- project(x + step * direction)``, in the ball of radius ``eps`` and the pixel range ``clip``.

    ``gen`` draws the start, uniform in the ball; None starts at the image. ``step`` None: 2.5 eps / steps.
    The model gives scores [n k] and must be in eval mode.
    """
    x = x.detach()
    step = 2.5 * eps / steps if step is None else step

    def inside(there: Tensor) -> Tensor:  # the pixel range holds x, so clipping never leaves the ball
        there = project(there, x, eps, norm)
        return there if clip is None else there.clamp(*clip)

    there = x if gen is None else inside(x + eps * _in_ball(x, gen, norm))
    for _ in range(steps):
        there = inside(there + step * steepest(loss_gradient(model, there, y), norm))
    return there


def _in_ball(x: Tensor, gen: Generator, norm: Norm) -> Tensor:
    """Uniform in the unit ball of the norm."""
    if norm == "inf":
        return torch.rand(x.shape, generator=gen, dtype=x.dtype).to(x.device) * 2 - 1
    towards = torch.randn(x.shape, generator=gen, dtype=x.dtype).flatten(1)
    radius = torch.rand(len(x), 1, generator=gen, dtype=x.dtype) ** (1 / max(towards.shape[1], 1))
    return (towards / towards.norm(dim=1, keepdim=True).clamp_min(1e-12) * radius).view(x.shape).to(x.device)


@final
@dataclass
class Pgd(Attack):
    """The attack of :func:`pgd`. ``eps`` [pixel value, 0 to 1] is the ball where the call names none.

    ``step`` [pixel value] None: 2.5 eps / steps. Each call draws its starts from ``seed`` alone; ``start=False`` starts at the image.
    """

    eps: float = 8 / 255
    steps: int = 20
    step: float | None = None
    start: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.eps >= 0:
            raise Mistake(f"pgd: eps={self.eps} must be at least 0, in pixel values 0 to 1 (8/255 is usual)")
        if self.steps < 1:
            raise Mistake(f"pgd: steps={self.steps} must be at least 1")
        if self.step is not None and not self.step > 0:
            raise Mistake(f"pgd: step={self.step} must be above 0, in pixel values 0 to 1, or None for 2.5 eps / steps")

    def perturb(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"], *, eps: float | None, norm: Norm) -> Tensor:
        gen = generator(self.seed, "pgd") if self.start else None
        return pgd(answer, x, y, gen, eps=self.eps if eps is None else eps, steps=self.steps, step=self.step, norm=norm)
