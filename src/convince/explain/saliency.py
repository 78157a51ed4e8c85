"""Saliency: how strongly each pixel moves a class score, to first order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.explain.grad_cam import must_reach
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


def input_gradient(answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"], who: str = "saliency") -> Float[Tensor, "n ..."]:
    """dY/dx of each image's own target score; ``x`` must require grad and the answer be in eval mode."""
    scores = answer(x)
    must_reach(scores, who)
    (gradient,) = torch.autograd.grad(scores.gather(1, target[:, None]).sum(), x)
    return gradient


def saliency(gradient: Float[Tensor, "n c ..."]) -> Float[Tensor, "n 1 ..."]:
    """Section 3.1: ``max_c |dY/dx_c|``, the largest change over a pixel's channels."""
    return gradient.abs().amax(1, keepdim=True)


@final
@dataclass
class Saliency(Explainer):
    """The map of :func:`saliency`; for a table [n d], |dY/dx| of each feature, [n 1 d]."""

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "saliency")
        gradient = input_gradient(answer, x, target)
        return Explanation(saliency(gradient if gradient.dim() > 2 else gradient[:, None]))
