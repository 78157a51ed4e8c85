"""Gradient noise: add Gaussian noise, less and less of it, to every gradient; very deep and badly started nets get unstuck."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Generator, nn

from convince.errors import Mistake, nearest
from convince.fit.run import Run
from convince.fit.state import named
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="gradient-noise",
    kind="technique",
    paper="gradient-noise",
    title="Adding Gradient Noise Improves Learning for Very Deep Networks",
    year=2015,
    url="https://arxiv.org/abs/1511.06807",
    strength="eta",
    off=0.0,
    departs=(
        "eta is 0.01 unless chosen, the mildest of the paper's 0.01, 0.3 and 1, which it chooses among for each task",
        "t counts the steps of a stage, so that noise starts anew with each stage, as the learning rate does",
        "noise is added after gradients are clipped, as in the paper, also where clipping is named later",
    ),
)


def variance(t: int, eta: float, gamma: float = 0.55) -> float:
    """``sigma_t^2 = eta / (1 + t)^gamma`` before step ``t`` = 0, 1, ... (eq. 2)."""
    return eta / (1 + t) ** gamma


@torch.no_grad()
def add_noise(parameters: Iterable[nn.Parameter], var: float, gen: Generator) -> None:
    """``g = g + N(0, var)`` in place, independent for each entry of each gradient (eq. 1); no gradient, no draw.

    ``gen`` is a generator on the CPU. Where a gradient lies elsewhere, a generator there is seeded from it.
    """
    sigma = math.sqrt(var)
    for p in parameters:
        if p.grad is None:
            continue
        here = gen
        if p.grad.device != gen.device:
            here = Generator(p.grad.device).manual_seed(int(torch.randint(2**62, (), generator=gen)))
        p.grad.add_(torch.randn(p.grad.shape, generator=here, dtype=p.grad.dtype, device=p.grad.device), alpha=sigma)


@final
@dataclass
class GradientNoise(Technique):
    """Apply :func:`add_noise` before each update, with any optimiser; ``eta=0`` is off.

    ``anneal`` "decay" lets :func:`variance` fall with ``gamma``; "fixed" keeps it at ``eta``, the paper's weaker
    control. After ``until`` steps of a stage (None: never) the noise ends. Gradients are clipped first.
    """

    eta: float = 0.01
    gamma: float = 0.55
    anneal: Literal["decay", "fixed"] = "decay"
    until: int | None = None
    rank = 20

    def __post_init__(self) -> None:
        if not (self.eta >= 0 and math.isfinite(self.eta)):
            raise Mistake(f"gradient-noise: eta={self.eta}: must be at least 0, the variance before the first step; the paper tries 0.01, 0.3 and 1, 0 is off")
        if not (self.gamma >= 0 and math.isfinite(self.gamma)):
            raise Mistake(f"gradient-noise: gamma={self.gamma}: must be at least 0; 0.55 is the paper's, 0 keeps the noise as it is")
        if self.anneal not in ("decay", "fixed"):
            raise Mistake(f"gradient-noise: anneal={self.anneal!r}: must be 'decay' or 'fixed'{nearest(str(self.anneal), ('decay', 'fixed'))}")
        if self.until is not None and self.until < 1:
            raise Mistake(f"gradient-noise: until={self.until}: must be at least 1 step, or None for noise to the end; eta=0 switches the part off")

    def on_grad(self, run: Run) -> None:
        t = run.stage_steps
        if self.eta > 0 and (self.until is None or t < self.until):
            var = self.eta if self.anneal == "fixed" else variance(t, self.eta, self.gamma)
            add_noise([p for _, p in named(run)], var, run.gen("gradient-noise"))
