"""Score-CAM: each feature map as a mask of the picture, weighed by how much the class still answers to what it lets through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.explain.layer import Layer, find_layer
from convince.explain.passes import ROWS, scores
from convince.fit.precision import full
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="score-cam",
    kind="explainer",
    title="Score-CAM: Score-Weighted Visual Explanations for Convolutional Neural Networks",
    year=2019,
    url="https://arxiv.org/abs/1910.01279",
    expects=("images",),
    departs=(
        "the layer is found as for grad-cam; the paper names the last convolution",
        "the score of the baseline picture, the same for every map, is left out: the softmax over maps does not change by it",
    ),
)


def maps_of(answer: nn.Module, x: Float[Tensor, "n c h w"], layer: Layer) -> Float[Tensor, "n d i j"]:
    """The layer's feature maps in one pass without gradients."""
    taken: list[Tensor] = []

    def take(module: nn.Module, args: Any, output: Tensor) -> None:
        taken.append(output.clone())  # what follows may change it in place

    handle = answer.get_submodule(layer.name).register_forward_hook(take)
    try:
        with torch.no_grad():
            answer(x)
    finally:
        handle.remove()
    return full(layer.fold(taken[-1]))


def normalised(maps: Float[Tensor, "n d h w"]) -> Float[Tensor, "n d h w"]:
    """Each map from 0 to 1 by its own least and largest value (eq. 8); a flat map is 0: it masks nothing out or in."""
    flat = maps.flatten(2)
    low, high = flat.amin(2)[..., None, None], flat.amax(2)[..., None, None]
    return torch.where(high > low, (maps - low) / (high - low).clamp_min(1e-12), 0.0)


def score_cam(answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], maps: Float[Tensor, "n d i j"]) -> Float[Tensor, "n 1 i j"]:
    """Eqs. 5 to 7: ``ReLU(sum_k alpha_k A^k)``, alpha the softmax over k of the target's score for ``x`` times the enlarged, normalised map."""
    n, d = maps.shape[:2]
    found = []
    for first in range(0, d, each := max(1, ROWS // n)):
        some = maps[:, first : first + each]
        masks = normalised(F.interpolate(some, size=x.shape[2:], mode="bilinear", align_corners=False))
        shown = (x[:, None] * masks[:, :, None]).flatten(0, 1)
        score = scores(answer, shown).gather(1, target.repeat_interleave(some.shape[1])[:, None])
        found.append(score.view(n, -1))
    alpha = torch.cat(found, 1).softmax(1)
    return (alpha[:, :, None, None] * maps).sum(1, keepdim=True).relu()


@final
@dataclass
class ScoreCam(Explainer):
    """The map of :func:`score_cam`, enlarged to the image (bilinear). As many passes as the layer has channels. ``layer``: None is found."""

    layer: str | None = None

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "score-cam")  # the layer is found by its gradient
        layer = find_layer(answer, x, target, self.layer, "score-cam")
        x = x.detach()
        maps = maps_of(answer, x, layer)
        found = F.interpolate(score_cam(answer, x, target, maps), size=x.shape[2:], mode="bilinear", align_corners=False)
        return Explanation(found, table={"layer": layer.name, "plane": list(layer.plane), "channels": maps.shape[1]})
