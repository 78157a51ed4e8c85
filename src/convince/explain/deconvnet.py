"""Deconvnet: what in the image a unit was excited by, its activity sent back with every negative signal stopped at every ReLU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.activation_maximisation import channel_of, feature_maps
from convince.explain.layer import Layer, find_layer
from convince.explain.passes import ROWS, gradients
from convince.explain.relus import passing_back
from convince.explain.saliency import saliency
from convince.fit.precision import full
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="deconvnet",
    kind="explainer",
    paper="cnn-visualization-survey",
    title="How convolutional neural network see the world - A survey of convolutional neural network visualization methods",
    year=2018,
    url="https://arxiv.org/abs/1804.11191",
    gradient="surrogate",
    departs=(
        "a class score is sent back where no channel is named; the survey sends back channels only",
        "the map is the largest absolute value over channels, as for saliency; the signal itself stands in images['signal']",
        "batch norms pass signals back by their weights, as any layer that is linear in eval mode; the survey's networks have none",
    ),
)


class _Deconv(torch.autograd.Function):
    """ReLU forward; backward ``g * (g > 0)``, whatever came in."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g.clamp_min(0)


def must_have_relus(answer: nn.Module, x: Float[Tensor, "n ..."]) -> None:
    """Refuse an answer whose signals pass no ReLU (its signal would be the plain gradient) or another activation (no rule)."""
    with torch.no_grad(), passing_back(_Deconv) as relus:
        answer(x[:1])
    if relus.others:
        raise Mistake(f"deconvnet has a rule for ReLUs only, and this answer has {', '.join(sorted(relus.others))} too; use 'saliency'")
    if not relus.count:
        raise Mistake("deconvnet changes what ReLUs pass back, and this answer has none; use 'saliency'")


def deconvnet(answer: nn.Module, x: Float[Tensor, "n c h w"], layer: Layer, channel: int) -> tuple[Float[Tensor, "n c h w"], Int[Tensor, "n 2"]]:
    """The channel's strongest activation of each image, all others zero, sent back to the pixels; and its (row, column) in the layer's plane.

    Convolutions go back by their transposed weights, max-pools by their switches, ReLUs by the ReLU of the signal. The answer must be in eval mode.
    """
    signals, places = [], []
    for pixels in x.split(ROWS // 2):
        part = pixels.detach().requires_grad_(True)
        with passing_back(_Deconv):
            activity = feature_maps(answer, part, layer)[:, channel]
        at = activity.detach().flatten(1).argmax(1)
        strongest = activity.flatten(1).gather(1, at[:, None])[:, 0]
        (signal,) = torch.autograd.grad((strongest * strongest.detach()).sum(), part)
        signals.append(full(signal))
        places.append(torch.stack([at // activity.shape[2], at % activity.shape[2]], 1))
    return torch.cat(signals), torch.cat(places)


@final
@dataclass
class Deconvnet(Explainer):
    """The map is ``max_c |S|``; the signal S itself [n c h w] stands in ``images["signal"]``.

    S is that of the target's score, or with ``layer`` and ``channel`` of the strongest activation of that channel (:func:`deconvnet`), whatever
    the target; the table then says where in the plane it was.
    """

    layer: str | None = None
    channel: int | None = None

    def __post_init__(self) -> None:
        if (self.layer is None) != (self.channel is None):
            raise Mistake(f"deconvnet: layer={self.layer!r}, channel={self.channel}: give both (a channel of a layer) or neither (the class)")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "deconvnet")
        must_have_relus(answer, x)
        if self.layer is None or self.channel is None:
            with passing_back(_Deconv):
                signal = gradients(answer, x, target, "deconvnet")
            return Explanation(saliency(signal if signal.dim() > 2 else signal[:, None]), {"signal": signal}, {"layer": "scores"})
        layer = find_layer(answer, x, target, self.layer, "deconvnet")
        signal, places = deconvnet(answer, x, layer, channel_of(answer, x, layer, self.channel, "deconvnet"))
        return Explanation(saliency(signal), {"signal": signal}, {"layer": layer.name, "plane": list(layer.plane), "strongest at": places.tolist()})
