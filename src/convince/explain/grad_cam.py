"""Grad-CAM: where in the image a class score comes from, read off the last feature map and its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.layer import find_layer, maps_and_gradients
from convince.kinds import Explainer, as_found, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="grad-cam",
    kind="explainer",
    paper="grad-cam",
    title="Grad-CAM: Visual Explanations from Deep Networks via Gradient-based Localization",
    year=2016,
    url="https://arxiv.org/abs/1610.02391",
    expects=("images",),
    departs=(
        "the layer is found: the last module with a spatial output larger than 1x1; the paper names the last convolution of each network",
        "token maps of transformers are folded back to the plane, class and register tokens left out; the paper knows convolutional networks only",
        "an ensemble is explained at the found layer, which is in its last member; name another one by layer=",
        "only a class score is explained, not any scalar such as a caption's likelihood",
    ),
)


def importance(gradients: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c"]:
    """Eq. 1: alpha_k, the gradient of the score pooled over the plane, for each channel k."""
    return gradients.mean((2, 3))


def grad_cam(
    activations: Float[Tensor, "n c h w"], gradients: Float[Tensor, "n c h w"], *, relu: bool = True, counterfactual: bool = False
) -> Float[Tensor, "n 1 h w"]:
    """Eq. 2: ``ReLU(sum_k alpha_k A^k)``.

    ``counterfactual`` takes the gradient's negative (section 3.3): regions that would lower the score.
    """
    alpha = importance(-gradients if counterfactual else gradients)
    found = (alpha[:, :, None, None] * activations).sum(1, keepdim=True)
    return found.relu() if relu else found


def neuron_importance(answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], layer: str | None = None) -> Float[Tensor, " d"]:
    """alpha of eq. 1, averaged over the images: how much each neuron (channel) of the layer speaks for the target."""
    with as_found(answer):
        found = find_layer(answer, x, target, layer, "grad-cam")
        _, gradients = maps_and_gradients(answer, x, target, found, "grad-cam")
    return importance(gradients).mean(0)


def textual_explanation(alpha: Float[Tensor, " d"], names: Sequence[str], top: int = 5, bottom: int = 5) -> dict[str, list[str]]:
    """Section 7: the names of the neurons that speak most for the target, and most against it."""
    if len(names) != len(alpha):
        raise Mistake(f"names: {len(names)} for {len(alpha)} neurons; give one name a neuron")
    order = alpha.argsort(descending=True, stable=True).tolist()
    return {"for": [names[i] for i in order[:top]], "against": [names[i] for i in order[::-1][:bottom]]}


@final
@dataclass
class GradCam(Explainer):
    """The map of :func:`grad_cam`, enlarged to the image (bilinear) where ``upsample`` is set.

    ``layer``: a module's name, None: found (see :func:`find_layer`). The table says which layer it was
    and its plane. Values are not normalised: they add to the score, so that images can be compared.
    """

    layer: str | None = None
    relu: bool = True
    upsample: bool = True
    counterfactual: bool = False

    def explain(self, answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "grad-cam")
        layer = find_layer(answer, x, target, self.layer, "grad-cam")
        activations, gradients = maps_and_gradients(answer, x, target, layer, "grad-cam")
        found = grad_cam(activations, gradients, relu=self.relu, counterfactual=self.counterfactual)
        if self.upsample:
            found = F.interpolate(found, size=x.shape[2:], mode="bilinear", align_corners=False)
        return Explanation(found, table={"layer": layer.name, "plane": list(layer.plane), "channels": activations.shape[1]})
