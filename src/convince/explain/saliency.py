"""Saliency: how strongly each pixel moves a class score, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.explain.passes import gradients
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="saliency",
    kind="explainer",
    title="Deep Inside Convolutional Networks: Visualising Image Classification Models and Saliency Maps",
    year=2013,
    url="https://arxiv.org/abs/1312.6034",
)


def saliency(gradient: Float[Tensor, "n c ..."]) -> Float[Tensor, "n 1 ..."]:
    """Section 3.1: ``max_c |dY/dx_c|``, the largest change over a pixel's channels."""
    return gradient.abs().amax(1, keepdim=True)


@final
@dataclass
class Saliency(Explainer):
    """The map of :func:`saliency`; for a table [n d], |dY/dx| of each feature, [n 1 d]."""

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "saliency")
        gradient = gradients(answer, x, target, "saliency")
        return Explanation(saliency(gradient if gradient.dim() > 2 else gradient[:, None]))
