"""Salient relevance: a speckled map of relevance becomes regions, by context-aware saliency on the map itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.relevance import Relevance, Rules, named, relevance
from convince.kinds import Explainer
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="salient-relevance",
    kind="explainer",
    paper="salient-relevance",
    title="Beyond saliency: understanding convolutional neural networks from saliency prediction on layer-wise relevance propagation",
    year=2017,
    url="https://arxiv.org/abs/1712.08268",
    gradient="surrogate",
    departs=(
        "the saliency stage has the settings of Goferman et al. (patches of 7, K of 64, c of 3, scales 1 to 0.3); the authors did not publish theirs",
        "maps are reduced to 64 pixels for the saliency stage, and their patches shrink with images below 28 pixels",
        "sums of branches (residual networks) and batch norms have rules too; the paper's networks have neither",
    ),
    tiny={"scales": (1.0, 0.5)},
)

SMALLEST = 0.2  # of the map's side: the least scale at which similar patches are looked for (Goferman et al.)


def lrp_stage(answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"], conv: str = "z", linear: str = "z+") -> Relevance:
    """Relevance of each pixel: the z rule in convolutions (biases take their share), z+ in linear layers, the winner in max pools."""
    return relevance(answer, x, target, Rules(cast(Any, conv), cast(Any, linear)), "salient-relevance")


def distances(
    value: Float[Tensor, "n p q"], other: Float[Tensor, "n m q"], place: Float[Tensor, "p 2"], there: Float[Tensor, "m 2"], c: float
) -> Float[Tensor, "n p m"]:
    """Goferman eq. 1: ``d(i, j) = d_value / (1 + c d_position)``; values [0, 1] as root mean squares over a patch, places as shares of the longer side."""
    return torch.cdist(value, other) / value.shape[2] ** 0.5 / (1 + c * torch.cdist(place, there))


def dissimilarity(d: Float[Tensor, "n p m"], k: int) -> Float[Tensor, "n p"]:
    """Goferman eq. 2: ``S_i = 1 - exp(-(mean of the k smallest d))``: high where even the most similar patches differ."""
    return 1 - torch.exp(-d.topk(min(k, d.shape[2]), dim=2, largest=False).values.mean(2))


def patches(m: Float[Tensor, "n 1 h w"], scale: float, side: int, like: float) -> tuple[Float[Tensor, "n p q"], Float[Tensor, "p 2"], tuple[int, int]]:
    """Patches of the map at ``scale``, each overlapping the next by half: values, centres [shares of the longer side ``like``], and their grid."""
    h, w = (max(round(length * scale), side) for length in m.shape[-2:])
    small = m if (h, w) == m.shape[-2:] else F.interpolate(m, (h, w), mode="bilinear", antialias=True)
    step = max(side // 2, 1)
    around = [side // 2] * 4
    cut = F.unfold(F.pad(small, around, mode="replicate"), side, stride=step).transpose(1, 2)
    centres = [torch.arange(0, length, step, dtype=m.dtype, device=m.device) + 0.5 for length in (h, w)]
    grid = torch.cartesian_prod(centres[0] * (m.shape[-2] / h), centres[1] * (m.shape[-1] / w)) / like
    return cut, grid, (len(centres[0]), len(centres[1]))


def context_aware_saliency(
    relevant: Float[Tensor, "n 1 h w"],
    patch: int = 7,
    scales: tuple[float, ...] = (1.0, 0.8, 0.5, 0.3),
    k: int = 64,
    c: float = 3.0,
    foci: float = 0.8,
    most: int = 64,
) -> Float[Tensor, "n 1 h w"]:
    """Context-aware saliency (Goferman et al. 2010) of maps >= 0, in [0, 1], of the maps' size.

    At each scale r a patch is compared with those at r, r/2 and r/4 (eq. 3); ``S`` is the mean over scales (eq. 4), and
    ``S (1 - distance to the nearest focus)``, a focus being where S, by its maximum, is above ``foci``, is returned (eq. 5). A map of zeros gives zeros.
    """
    n, _, height, width = relevant.shape
    shrink = min(1.0, most / max(height, width))
    h, w = max(round(height * shrink), 1), max(round(width * shrink), 1)
    m = relevant if shrink == 1 else F.interpolate(relevant, (h, w), mode="bilinear", antialias=True)
    top = m.amax((1, 2, 3), keepdim=True)
    m = torch.where(top > 0, m / top.where(top > 0, torch.ones_like(top)), 0)
    side = max(3, min(patch, (min(h, w) // 4) | 1))
    total = torch.zeros_like(m)
    for r in scales:
        value, place, grid = patches(m, r, side, max(h, w))
        others = [patches(m, s, side, max(h, w))[:2] for s in (r, r / 2, r / 4) if s == r or s >= SMALLEST]
        d = torch.cat([distances(value, other, place, there, c) for other, there in others], 2)
        total += F.interpolate(dissimilarity(d, k).view(n, 1, *grid), (h, w), mode="bilinear")
    s = total / len(scales)
    s = torch.where(top > 0, s * (1 - _to_focus(s, foci)), 0)
    return s if shrink == 1 else F.interpolate(s, (height, width), mode="bilinear")


def _to_focus(s: Float[Tensor, "n 1 h w"], foci: float) -> Float[Tensor, "n 1 h w"]:
    """Distance of each place to the nearest focus, as a share of the longer side."""
    from scipy.ndimage import distance_transform_edt

    away = np.stack([distance_transform_edt(plane <= foci * plane.max()) if plane.max() > 0 else 0 * plane for plane in s[:, 0].double().cpu().numpy()])
    return (torch.from_numpy(away)[:, None] / max(s.shape[-2:])).clamp(max=1).to(s)


def top_regions(found: Float[Tensor, "n 1 h w"], share: float = 0.1) -> Bool[Tensor, "n 1 h w"]:
    """The ``share`` of pixels with the highest values, image by image (ties by place)."""
    flat = found.flatten(1)
    rows = torch.argsort(flat, dim=1, descending=True, stable=True)[:, : max(1, round(share * flat.shape[1]))]
    return torch.zeros_like(flat, dtype=torch.bool).scatter_(1, rows, True).view_as(found)


@final
@dataclass
class SalientRelevance(Explainer):
    """The map is the context-aware saliency of the relevance, summed over channels; ``images`` has that sum ("relevance") and the image with all
    but the ``share`` most salient pixels dark ("regions").

    ``part``: "positive" relevance, or "abs" for that against the class too. ``conv`` and ``linear``: rules as in ``lrp``. ``patch``, ``scales``,
    ``k`` and ``c`` are those of :func:`context_aware_saliency`.
    """

    fast = False

    part: str = "positive"
    conv: str = "z"
    linear: str = "z+"
    patch: int = 7
    scales: tuple[float, ...] = (1.0, 0.8, 0.5, 0.3)
    k: int = 64
    c: float = 3.0
    share: float = 0.1

    def __post_init__(self) -> None:
        named(("positive", "abs"), self.part, "salient-relevance: part")
        for kind in ("conv", "linear"):
            named(("z", "epsilon", "z+", "alpha-beta"), getattr(self, kind), f"salient-relevance: {kind}")
        if self.patch < 3 or self.patch % 2 == 0:
            raise Mistake(f"salient-relevance: patch={self.patch} must be odd and at least 3, in pixels of a map of 64")
        if not self.scales or not all(0 < r <= 1 for r in self.scales):
            raise Mistake(f"salient-relevance: scales={self.scales!r} must be one or more shares of the map's side, above 0 and at most 1")
        if self.k < 1 or not self.c >= 0:
            raise Mistake(f"salient-relevance: k={self.k} must be at least 1 and c={self.c} at least 0; 64 and 3 are usual")
        if not 0 < self.share <= 1:
            raise Mistake(f"salient-relevance: share={self.share} must be above 0 and at most 1, of the pixels")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        if x.dim() != 4:
            raise Mistake(f"salient-relevance looks for regions of images [n c h w], and the input has shape {tuple(x.shape)}; 'lrp' explains tables")
        found = lrp_stage(answer, x, target, self.conv, self.linear)
        summed = found.pixels.sum(1, keepdim=True)
        relevant = summed.clamp(min=0) if self.part == "positive" else summed.abs()
        salient = context_aware_saliency(relevant, self.patch, tuple(self.scales), self.k, self.c)
        return Explanation(salient, {"relevance": summed, "regions": x.detach() * top_regions(salient, self.share)}, found.table())
