"""Eigen-CAM: the last feature maps projected on their first principal component; no class, no gradient in the map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.explain.layer import find_layer, maps_and_gradients
from convince.explain.localisation import box_from_map, iou
from convince.explain.score_cam import maps_of
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="eigen-cam",
    kind="explainer",
    paper="eigen-cam",
    title="Eigen-CAM: Class Activation Map using Principal Components",
    year=2020,
    url="https://arxiv.org/abs/2008.00299",
    expects=("images",),
    idle=("target",),
    departs=(
        "the sign of the component, which the paper leaves open, is the one that agrees with the mean of the feature maps",
        "the layer is found as for grad-cam, by one gradient of the score; the paper names the last convolution",
        "values keep the unit of the feature maps and are not scaled to 0 to 1, so that images can be compared",
        "class_specific weighs each feature by its positive gradient before the projection; the paper has no such variant",
    ),
)

THRESHOLDS = tuple(round(0.15 + 0.05 * step, 2) for step in range(16))  # 0.15 to 0.9


def eigen_cam(activations: Float[Tensor, "n d i j"], *, center: bool = False) -> tuple[Float[Tensor, "n 1 i j"], Float[Tensor, " n"]]:
    """``M v_1``, M [i j, d] the features of an image and v_1 its first right singular vector; and S_1^2's share of all S^2.

    ``center`` takes each feature's mean over the plane away first, as principal components are usually meant. Of the two signs of v_1 that
    one is taken with which the map agrees with the mean feature map: in sum where no feature is negative (v_1 has no negative entry then),
    in correlation otherwise. No ReLU yet.
    """
    rows = activations.flatten(2).transpose(1, 2)  # M
    signed = (rows < 0).flatten(1).any(1) | center
    mean = rows.mean(2)
    with torch.autocast(rows.device.type, enabled=False):
        left, sizes, _ = torch.linalg.svd(rows - rows.mean(1, keepdim=True) if center else rows, full_matrices=False)
    found = left[:, :, 0] * sizes[:, :1]  # M v_1 = S_1 u_1
    agrees = (torch.where(signed[:, None], found - found.mean(1, keepdim=True), found) * mean).sum(1)
    found = torch.where(agrees[:, None] < 0, -found, found)
    energy = sizes.square().sum(1)
    share = torch.where(energy > 0, sizes[:, 0].square() / energy.where(energy > 0, torch.ones_like(energy)), 0)
    return found.unflatten(1, activations.shape[2:])[:, None], share


def wsol_iou(found: Float[Tensor, "n 1 h w"], boxes: Float[Tensor, "n 4"], thresholds: Sequence[float] = THRESHOLDS) -> Float[Tensor, "t n"]:
    """Weakly supervised localisation: the IoU of each image's true box (left, top, right, bottom) with that of the map, at each threshold.

    A threshold is a share of the map's maximum; the map's box is that of its largest connected region (:func:`box_from_map`). An image counts
    as localised where this is at least 0.5 and the class is right.
    """
    return torch.stack([iou(box_from_map(found, threshold), boxes) for threshold in thresholds])


@final
@dataclass
class EigenCam(Explainer):
    """The positive part of :func:`eigen_cam`, enlarged to the image (bilinear) where ``upsample`` is set.

    The map is the same for every class and for every head on the same features: it says what the features hold, not why the answer was
    given; ``class_specific`` (Eigen-Grad-CAM) multiplies each feature by the positive part of its gradient first, and asks the class.
    ``layer``: a module's name, None: found. The table's "explained" is the first component's share of each image of the (first) batch:
    where it is low, the map leaves most of the features out.
    """

    layer: str | None = None
    center: bool = False
    class_specific: bool = False
    upsample: bool = True

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "eigen-cam")  # the layer is found by its gradient
        layer = find_layer(answer, x, target, self.layer, "eigen-cam")
        x = x.detach()
        if self.class_specific:
            features, gradients = maps_and_gradients(answer, x, target, layer, "eigen-cam")
            features = features * gradients.relu()
        else:
            features = maps_of(answer, x, layer)
        found, share = eigen_cam(features, center=self.center)
        found = found.relu()
        if self.upsample:
            found = F.interpolate(found, size=x.shape[2:], mode="bilinear", align_corners=False)
        return Explanation(found, table={"layer": layer.name, "plane": list(layer.plane), "explained": share.tolist()})
