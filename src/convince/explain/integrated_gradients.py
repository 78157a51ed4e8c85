"""Integrated gradients: what each pixel adds to a score on the straight way from a baseline to the image; the parts sum to the difference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.passes import gradients
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="integrated-gradients",
    kind="explainer",
    title="Axiomatic Attribution for Deep Networks",
    year=2017,
    url="https://arxiv.org/abs/1703.01365",
    departs=("the integral is read at Gauss-Legendre points, which need fewer passes than the paper's even ones for the same error",),
    tiny={"steps": 4},
)


def points(steps: int) -> tuple[Float[Tensor, " s"], Float[Tensor, " s"]]:
    """Where on the way from 0 to 1 gradients are taken, and their weights, which sum to 1 (Gauss-Legendre)."""
    import numpy as np

    at, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((at + 1) / 2), torch.from_numpy(weights / 2)


def integrated_gradients(
    answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"], baseline: Tensor | float = 0.0, steps: int = 50
) -> Float[Tensor, "n ..."]:
    """Eq. 1: ``(x - x') * integral of dY/dx at x' + a (x - x'), a from 0 to 1``.

    ``baseline`` x' [pixels 0 to 1]: a number, or a tensor that broadcasts to ``x``. Sums over a row to ``Y(x) - Y(x')`` as ``steps`` grows.
    """
    away = x - baseline
    total = torch.zeros_like(x)
    for at, weight in zip(*points(steps), strict=True):
        total += weight.to(x.dtype) * gradients(answer, x - (1 - at.to(x.dtype)) * away, target, "integrated-gradients")
    return away * total


@final
@dataclass
class IntegratedGradients(Explainer):
    """The map is the sum over channels of :func:`integrated_gradients`; values of one image sum to the score less the baseline's.

    ``baseline`` [pixel value, 0 to 1]: an even image of that value. The table has the mean gap of that sum ("completeness gap").
    """

    steps: int = 50
    baseline: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise Mistake(f"integrated-gradients: steps={self.steps} must be at least 1; 20 to 300 are usual")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "integrated-gradients")
        x = x.detach()
        found = integrated_gradients(answer, x, target, self.baseline, self.steps)
        with torch.no_grad():
            rise = [answer(pixels).gather(1, target[:, None])[:, 0] for pixels in (x, torch.full_like(x, self.baseline))]
        gap = (found.flatten(1).sum(1) - (rise[0] - rise[1])).abs().mean()
        shown = found if found.dim() > 2 else found[:, None]
        return Explanation(shown.sum(1, keepdim=True), {"attribution": found}, {"completeness gap": float(gap)})
