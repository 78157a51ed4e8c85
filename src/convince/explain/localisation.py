"""How well a map [n 1 h w] finds a marked region: energy, pointing, boxes. Shared by the explainers' claims and tests.

Masks are bool [n 1 h w], true inside; one of another shape is a Mistake.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from convince.errors import Mistake


def _checked(found: Tensor, mask: Tensor) -> Tensor:
    if found.shape != mask.shape or found.dim() != 4 or found.shape[1] != 1:
        raise Mistake(f"map {tuple(found.shape)} and mask {tuple(mask.shape)}: both must be [n 1 h w]")
    return mask.to(torch.bool)


def energy_in_mask(found: Float[Tensor, "n 1 h w"], mask: Tensor) -> Float[Tensor, " n"]:
    """The share of a map's positive part that lies inside the mask, 0 to 1.

    A map without a positive value points nowhere: it counts as an even one, the mask's share of the area.
    """
    mask = _checked(found, mask)
    positive = found.clamp_min(0).flatten(1)
    inside = mask.flatten(1).to(found.dtype)
    total = positive.sum(1)
    return torch.where(total > 0, (positive * inside).sum(1) / total.where(total > 0, torch.ones_like(total)), inside.mean(1))


def pointing_hit(found: Float[Tensor, "n 1 h w"], mask: Tensor) -> Bool[Tensor, " n"]:
    """Does the map's largest value lie inside the mask? A constant map points nowhere: no hit."""
    mask = _checked(found, mask)
    flat = found.flatten(1)
    best = flat.argmax(1)
    return mask.flatten(1).gather(1, best[:, None])[:, 0] & (flat.amax(1) > flat.amin(1))


def box_from_map(found: Float[Tensor, "n 1 h w"], threshold: float = 0.15) -> Float[Tensor, "n 4"]:
    """The box (left, top, right, bottom) [pixels, ends excluded] around the largest connected region.

    The region is where the map is at least ``threshold`` of its maximum (section 4.1 of Grad-CAM: 0.15),
    neighbours by side. A map without a positive value gets the empty box (0, 0, 0, 0).
    """
    if not 0 < threshold <= 1:
        raise Mistake(f"threshold={threshold}: must be a share of the map's maximum, above 0 and at most 1")
    from scipy import ndimage

    boxes = np.zeros((len(found), 4))
    for i, plane in enumerate(found[:, 0].detach().float().cpu().numpy()):
        if not plane.max() > 0:
            continue
        labels, count = ndimage.label(plane >= threshold * plane.max())
        sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        rows, columns = ndimage.find_objects(labels)[int(sizes.argmax())]
        boxes[i] = columns.start, rows.start, columns.stop, rows.stop
    return torch.from_numpy(boxes).to(found)


def iou(a: Float[Tensor, "n 4"], b: Float[Tensor, "n 4"]) -> Float[Tensor, " n"]:
    """Intersection over union of boxes (left, top, right, bottom), pair by pair; 0 where both are empty."""
    shared = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp_min(0).prod(1)
    union = (a[:, 2:] - a[:, :2]).prod(1) + (b[:, 2:] - b[:, :2]).prod(1) - shared
    return torch.where(union > 0, shared / union.clamp_min(1e-12), torch.zeros_like(union))


def bias_audit(found: Float[Tensor, "n 1 h w"], artefact: Tensor) -> dict[str, float]:
    """Does a network look at an artefact (a label, a ruler)? Mean share of energy in it, its share of the area, and hits."""
    artefact = _checked(found, artefact)
    return {
        "energy": float(energy_in_mask(found, artefact).mean()),
        "area": float(artefact.double().mean()),
        "pointing": float(pointing_hit(found, artefact).double().mean()),
    }
