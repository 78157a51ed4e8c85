"""Network dissection: which channels of a layer are detectors of a concept, by the overlap of their strongest activity with concept masks.

Bau et al. 2017 (https://arxiv.org/abs/1704.05796), the fourth family of the survey of Qin et al. 2018 (https://arxiv.org/abs/1804.11191). It needs
images with a mask for each concept, which no run has; so these are functions, and no part that is switched on by name::

    found = network_dissection(answer, x, {"sky": sky, "red": red}, layer="layer4")
    found.unique, found.table()
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.activation_maximisation import feature_maps
from convince.explain.layer import find_layer
from convince.explain.passes import ROWS
from convince.kinds import as_found

QUANTILE = 0.005  # of a unit's activations lie above its threshold
DETECTS = 0.04  # an IoU above this makes a unit a detector


@dataclass(frozen=True)
class Dissection:
    """IoU of every unit with every concept, and what follows."""

    iou: Float[Tensor, "u k"]
    concepts: tuple[str, ...]
    least: float = DETECTS

    @property
    def detectors(self) -> Bool[Tensor, " u"]:
        """Units whose best concept has an IoU above ``least``."""
        return self.iou.amax(1) > self.least

    @property
    def unique(self) -> int:
        """Different concepts that some unit detects: the paper's measure of how interpretable a layer is."""
        return len(set(self.iou.argmax(1)[self.detectors].tolist()))

    def table(self) -> list[dict[str, str | int | float | bool]]:
        """A row a unit: its best concept, their IoU, and whether it counts as a detector."""
        best = self.iou.max(1)
        rows = zip(best.values.tolist(), best.indices.tolist(), self.detectors.tolist(), strict=True)
        return [{"unit": u, "concept": self.concepts[c], "iou": value, "detector": yes} for u, (value, c, yes) in enumerate(rows)]


def thresholds(activations: Float[Tensor, "n u i j"], quantile: float = QUANTILE) -> Float[Tensor, " u"]:
    """T_u with ``P(a_u > T_u) = quantile`` over all images and places, between two values linearly."""
    values = activations.transpose(0, 1).flatten(1).cpu().numpy()
    return torch.from_numpy(np.quantile(values, 1 - quantile, axis=1)).to(activations)


def concept_iou(activations: Float[Tensor, "n u i j"], above: Float[Tensor, " u"], masks: Bool[Tensor, "n k h w"], rows: int = ROWS) -> Float[Tensor, "u k"]:
    """``sum |M_u and L_k| / sum |M_u or L_k|`` over all images, M_u where the enlarged (bilinear) activation is above T_u; 0 where both are empty."""
    shared = torch.zeros(activations.shape[1], masks.shape[1], dtype=torch.float64, device=activations.device)
    of_unit, of_concept = shared[:, 0].clone(), shared[0].clone()
    for a, label in zip(activations.split(rows), masks.split(rows), strict=True):
        large = F.interpolate(a, size=masks.shape[2:], mode="bilinear", align_corners=False)
        m, wanted = ((t.transpose(0, 1).flatten(1)).to(activations.dtype) for t in (large > above[:, None, None], label))
        shared += m @ wanted.T  # whole numbers below 2^24 in a batch: exact
        of_unit += m.sum(1)
        of_concept += wanted.sum(1)
    union = of_unit[:, None] + of_concept - shared
    return torch.where(union > 0, shared / union.clamp_min(1), 0.0).to(activations.dtype)


def dissect(
    activations: Float[Tensor, "n u i j"], masks: Mapping[str, Bool[Tensor, "m a b"]], quantile: float = QUANTILE, least: float = DETECTS
) -> Dissection:
    """The dissection of given activations. ``masks``: for each concept where it is in each image, at any size;
    a concept that is nowhere is left out.

    Raises Mistake where no mask is true anywhere, or one has other images.
    """
    if not 0 < quantile < 1 or not 0 <= least < 1:
        raise Mistake(f"network dissection: quantile={quantile} must lie between 0 and 1, least={least} from 0 and below 1; 0.005 and 0.04 are the paper's")
    wrong = [name for name, mask in masks.items() if mask.dim() != 3 or len(mask) != len(activations)]
    if wrong:
        raise Mistake(f"network dissection: the mask of {wrong[0]!r} has shape {tuple(masks[wrong[0]].shape)}; give [n h w] for {len(activations)} images")
    there = {name: mask for name, mask in masks.items() if bool(mask.any())}
    if not there:
        raise Mistake("network dissection: no concept is in any image; give masks that are true where the concept is")
    found = concept_iou(activations, thresholds(activations, quantile), torch.stack([mask.bool() for mask in there.values()], 1).to(activations.device))
    return Dissection(found, tuple(there), least)


def network_dissection(
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    masks: Mapping[str, Bool[Tensor, "m a b"]],
    layer: str | None = None,
    quantile: float = QUANTILE,
    least: float = DETECTS,
) -> Dissection:
    """Dissect a layer of an answer (None: the last spatial one that the score depends on) on images with concept masks.

    The layer's activations of all images are held at once: 1 GB for 10,000 images at 512 channels of 7x7.
    """
    with as_found(answer):
        found = find_layer(answer, x, torch.zeros(len(x), dtype=torch.int64, device=x.device), layer, "network dissection")
        with torch.no_grad():
            activations = torch.cat([feature_maps(answer, part, found) for part in x.split(ROWS)])
    return dissect(activations, masks, quantile, least)
