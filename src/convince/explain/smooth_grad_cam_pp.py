"""Smooth Grad-CAM++: weights of the last feature maps from the gradients of many noisy copies, cell by cell; Grad-CAM++ without the noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.layer import Layer, find_layer, maps_and_gradients
from convince.explain.passes import ROWS
from convince.explain.smoothgrad import spread
from convince.fit.randomness import generator
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="smooth-grad-cam-pp",
    kind="explainer",
    paper="smooth-grad-cam-pp",
    title="Smooth Grad-CAM++: An Enhanced Inference Level Visualization Technique for Deep Convolutional Neural Network Models",
    year=2019,
    url="https://arxiv.org/abs/1908.01224",
    expects=("images",),
    departs=(
        "25 copies and a noise of 0.15 of the image's range are the defaults; the paper leaves both to the person and names no values",
        "alpha has the second derivative above the line, as Grad-CAM++ derives it; the paper prints the first, which is numerator=D1",
        "the derivatives of exp(Y) are averaged without their factor exp(Y), which cancels for one picture and would let the surest copy decide alone",
        "the feature maps that are weighed are those of the clean picture; the paper does not say which",
        "the layer is found as for grad-cam, tokens of transformers included; the paper names layers of VGG-16",
    ),
    tiny={"copies": 3},
)

NUMERATORS = ("D2", "D1")
Powers = tuple[Float[Tensor, "n d i j"], Float[Tensor, "n d i j"], Float[Tensor, "n d i j"]]


def powers(gradients: Float[Tensor, "n d i j"]) -> Powers:
    """The first three derivatives of exp(Y) in a ReLU network, less the factor exp(Y): g, g^2, g^3, as Grad-CAM++ derives them."""
    return gradients, gradients**2, gradients**3


def alphas(activations: Float[Tensor, "n d i j"], derivatives: Powers, numerator: str = "D2") -> Float[Tensor, "n d i j"]:
    """``D2 / (2 D2 + sum_ab A_ab D3)`` for each cell of each feature map; 0 where the denominator is 0."""
    first, second, third = derivatives
    below = 2 * second + activations.sum((2, 3), keepdim=True) * third
    return torch.where(below != 0, (first if numerator == "D1" else second) / below.where(below != 0, torch.ones_like(below)), 0)


def weigh(
    activations: Float[Tensor, "n d i j"],
    derivatives: Powers,
    *,
    numerator: str = "D2",
    channels: Sequence[int] | None = None,
    neurons: tuple[int, int, int, int] | None = None,
) -> Float[Tensor, "n 1 i j"]:
    """The map: ``ReLU(sum_k w_k A^k)`` with ``w_k = sum_ij alpha_ij ReLU(D1_ij)``.

    ``channels``: the feature maps k that count (None: all); ``neurons``: the cells ij that count towards w, as a box (left, top, right,
    bottom) of the layer's plane, ends excluded (None: all).
    """
    each = alphas(activations, derivatives, numerator) * derivatives[0].relu()
    if neurons is not None:
        left, top, right, bottom = neurons
        each = each[:, :, top:bottom, left:right]
    weights = each.sum((2, 3), keepdim=True)
    if channels is not None:
        activations, weights = activations[:, list(channels)], weights[:, list(channels)]
    return (weights * activations).sum(1, keepdim=True).relu()


def grad_cam_pp(activations: Float[Tensor, "n d i j"], gradients: Float[Tensor, "n d i j"]) -> Float[Tensor, "n 1 i j"]:
    """Grad-CAM++ (Chattopadhyay et al. 2018): :func:`weigh` by the gradients of the clean picture alone."""
    return weigh(activations, powers(gradients))


def smooth_derivatives(answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], noise: Float[Tensor, "s c h w"], layer: Layer) -> Powers:
    """:func:`powers` at the layer, averaged over ``x + spread(x) noise_s``; the spread is each image's range."""
    total: Powers | None = None
    for some in noise.split(max(1, ROWS // 2 // len(x))):
        copies = (x[:, None] + spread(x)[:, None] * some[None]).flatten(0, 1)  # those of one image stand together
        _, gradients = maps_and_gradients(answer, copies, target.repeat_interleave(len(some)), layer, CARD.part)
        a, b, c = (p.unflatten(0, (len(x), len(some))).sum(1) / len(noise) for p in powers(gradients))
        total = (a, b, c) if total is None else (total[0] + a, total[1] + b, total[2] + c)
    assert total is not None
    return total


@final
@dataclass
class SmoothGradCamPp(Explainer):
    """The map of :func:`weigh`, enlarged to the image (bilinear) where ``upsample`` is set; ``sigma=0`` is Grad-CAM++.

    ``copies`` noisy copies, whose deviation is ``sigma`` times the image's range; ``layer``: a module's name, None: found. ``channels`` and
    ``neurons`` say which feature maps and which cells of the plane (left, top, right, bottom) count; ``numerator``: "D2", or "D1" as printed.

    Behind global average pooling and a linear layer the gradients at the last layer are the same for every picture, and the noise changes
    nothing: name an earlier layer then.
    """

    copies: int = 25
    sigma: float = 0.15
    layer: str | None = None
    numerator: str = "D2"
    channels: Sequence[int] | None = None
    neurons: tuple[int, int, int, int] | None = None
    upsample: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.copies < 1 or not self.sigma >= 0:
            raise Mistake(f"smooth-grad-cam-pp: copies={self.copies} must be at least 1, sigma={self.sigma} at least 0")
        if self.numerator not in NUMERATORS:
            raise Mistake(f"smooth-grad-cam-pp: numerator={self.numerator!r} must be one of {', '.join(NUMERATORS)}")

    def _must_lie(self, layer: Layer, channels: int) -> None:
        """Refuse feature maps and cells that the layer does not have."""
        if self.channels is not None and not (len(self.channels) and all(0 <= k < channels for k in self.channels)):
            raise Mistake(f"smooth-grad-cam-pp: channels={tuple(self.channels)}: layer {layer.name!r} has 0 to {channels - 1}; name at least one of them")
        if self.neurons is not None:
            rows, columns = layer.plane
            box = tuple(self.neurons)
            if len(box) != 4 or not (0 <= box[0] < box[2] <= columns and 0 <= box[1] < box[3] <= rows):
                raise Mistake(
                    f"smooth-grad-cam-pp: neurons={box}: must be (left, top, right, bottom), ends excluded, in {rows} rows of {columns} of {layer.name!r}"
                )

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "smooth-grad-cam-pp")
        layer = find_layer(answer, x, target, self.layer, "smooth-grad-cam-pp")
        x = x.detach()
        activations, gradients = maps_and_gradients(answer, x, target, layer, "smooth-grad-cam-pp")
        self._must_lie(layer, activations.shape[1])
        if self.sigma:
            noise = self.sigma * torch.randn(self.copies, *x.shape[1:], generator=generator("smooth-grad-cam-pp", self.seed)).to(x)
            derivatives = smooth_derivatives(answer, x, target, noise, layer)
        else:  # every copy would be the picture itself
            derivatives = powers(gradients)
        found = weigh(activations, derivatives, numerator=self.numerator, channels=self.channels, neurons=self.neurons)
        if self.upsample:
            found = F.interpolate(found, size=x.shape[2:], mode="bilinear", align_corners=False)
        return Explanation(found, table={"layer": layer.name, "plane": list(layer.plane), "channels": activations.shape[1]})
