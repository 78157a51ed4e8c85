"""Guided backpropagation: the input gradient with every negative signal stopped at every ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.grad_cam import GradCam
from convince.explain.passes import gradients
from convince.explain.relus import passing_back
from convince.explain.saliency import saliency
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="guided-backprop",
    kind="explainer",
    title="Striving for Simplicity: The All Convolutional Net",
    year=2014,
    url="https://arxiv.org/abs/1412.6806",
    gradient="surrogate",
    departs=("the map is the largest absolute value over channels, as for saliency; the paper shows the gradient itself (here images['gradient'])",),
)


class _Guided(torch.autograd.Function):
    """ReLU forward; backward ``g * (g > 0) * (a > 0)``."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        out = a.clamp_min(0)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (out,) = ctx.saved_tensors
        return g * (g > 0) * (out > 0)


def guided_backprop(answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"]) -> Float[Tensor, "n ..."]:
    """The guided gradient of each image's own target score. The answer must be in eval mode.

    Raises Mistake for an answer without a ReLU: its guided gradient would be the plain one.
    """
    with passing_back(_Guided) as relus:
        gradient = gradients(answer, x, target, "guided-backprop")
    if not relus.count:
        raise Mistake("guided-backprop changes what ReLUs pass back, and this answer has none; use 'saliency'")
    return gradient


def guided_grad_cam(guided: Float[Tensor, "n c h w"], cam: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n c h w"]:
    """Guided Grad-CAM: the guided gradient times the enlarged Grad-CAM map, pixel by pixel."""
    return guided * cam


@final
@dataclass
class GuidedBackprop(Explainer):
    """The map is ``max_c |G|``, the guided gradient G itself [n c h w] stands in ``images["gradient"]``.

    ``cam`` multiplies G by the Grad-CAM map of the same class (Guided Grad-CAM).
    """

    cam: bool = False

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "guided-backprop")
        gradient, table = guided_backprop(answer, x, target), {}
        if self.cam:
            found = GradCam().explain(answer, x, target)
            assert found.map is not None
            gradient, table = guided_grad_cam(gradient, found.map), found.table
        return Explanation(saliency(gradient if gradient.dim() > 2 else gradient[:, None]), {"gradient": gradient}, table)
