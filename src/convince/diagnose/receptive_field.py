"""Receptive field: how much of the image the middle of the last feature map really draws on, and whether shape or texture decides the answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.backbones.maps import channels_last, fold, info
from convince.errors import Mistake
from convince.kinds import Probe, as_found, differentiable
from convince.parts import Card
from convince.types import Findings, Plane, Reading

CARD = Card(
    part="receptive-field",
    kind="probe",
    paper="large-kernel-study",
    title="Scaling Up Your Kernels: Large Kernel Design in ConvNets towards Universal Representations",
    year=2024,
    url="https://arxiv.org/abs/2410.08049",
    expects=("images",),
    departs=(
        "images are measured at the size the network was trained on; the paper enlarges them to 1024 px",
        "the side of a square is interpolated between odd numbers of pixels, which matters for small images; the authors' script counts whole ones from 3",
    ),
)


# -- effective receptive field -----------------------------------------------------------------------


def last_map(answer: nn.Module) -> tuple[nn.Module, dict[str, Any], bool]:
    """The module that gives the last feature map of the network inside an answer, its row of ``feature_info``, and whether channels stand last."""
    for module in answer.modules():
        rows = info(module)
        if rows:
            return module.get_submodule(rows[-1]["module"]), rows[-1], channels_last(module)
    raise Mistake(f"receptive-field: {type(answer).__name__} holds no network that names its feature maps (feature_info); choose another, such as resnet20")


def effective_receptive_field(answer: nn.Module, x: Float[Tensor, "n c h w"], batch: int = 64) -> Float[Tensor, "h w"]:
    """Contribution of each pixel to the middle of the last feature map: positive gradients of its rectified sum, added over channels, mean over images.

    ``x`` are [0, 1] pixels; units are features a pixel value. Raises Mistake for an answer without gradients or without feature maps. Source:
    section 3 of the paper, after RepLKNet.
    """
    differentiable(answer, "receptive-field")
    if x.dim() != 4 or not len(x):
        raise Mistake(f"receptive-field looks at images [n c h w], at least one, and the input has shape {tuple(x.shape)}")
    total = x.new_zeros(x.shape[2:], dtype=torch.float64)
    with as_found(answer):
        module, row, last = last_map(answer)
        kept: dict[str, Tensor] = {}
        handle = module.register_forward_hook(lambda m, inputs, output: kept.update(map=output))
        try:
            for part in x.split(batch):
                pixels = part.detach().clone().requires_grad_(True)
                answer(pixels)
                plane = (-(-x.shape[2] // row["reduction"]), -(-x.shape[3] // row["reduction"]))
                found = fold(kept.pop("map"), row["num_chs"], plane, last)
                middle = found[:, :, found.shape[2] // 2, found.shape[3] // 2].relu().sum()
                (gradient,) = torch.autograd.grad(middle, pixels, allow_unused=True)
                if gradient is not None:
                    total += gradient.relu().sum((0, 1)).double()
        finally:
            handle.remove()
    return (total / len(x)).to(x.dtype)


def readable(scores: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """``log10(scores + 1)``, the largest 1: what the paper draws and measures. A map of zeros is a Mistake: it has no field."""
    logs = (scores + 1).log10()
    if not bool(logs.max() > 0):
        raise Mistake("receptive-field: the middle of the last feature map depends on no pixel; is the network trained, and does its last layer live?")
    return logs / logs.max()


class Area(NamedTuple):
    """A centred square: ``side`` in pixels, ``side_ratio`` of the longer side of the image, ``area_ratio`` of its area (the paper's r), 0 to 1."""

    side: float
    side_ratio: float
    area_ratio: float


def erf_area(scores: Float[Tensor, "h w"], share: float) -> Area:
    """The smallest square around the middle pixel, cut off at the edges, that holds ``share`` (0 to 1) of all scores; interpolated between odd sides."""
    if not 0 < share <= 1:
        raise Mistake(f"erf_area: share={share} must be above 0 and at most 1; the paper reports 0.2, 0.3, 0.5 and 0.99")
    h, w = scores.shape
    away = [(torch.arange(n, device=scores.device) - n // 2).abs() for n in (h, w)]
    ring = torch.maximum(away[0][:, None], away[1][None, :])
    rings = scores.new_zeros(int(ring.max()) + 1, dtype=torch.float64).index_add_(0, ring.flatten(), scores.double().flatten())
    held = [0.0, *(rings.cumsum(0) / rings.sum()).tolist()]
    sides = [0, *(min(2 * reach + 1, max(h, w)) for reach in range(len(rings)))]
    at = next((i for i, value in enumerate(held) if value >= share), len(held) - 1)
    side = sides[at] - (sides[at] - sides[at - 1]) * (held[at] - share) / (held[at] - held[at - 1])
    return Area(side, side / max(h, w), min(side, h) * min(side, w) / (h * w))


# -- shape against texture ---------------------------------------------------------------------------


def silhouette(x: Float[Tensor, "n c h w"], above: float = 0.1) -> Bool[Tensor, "n h w"]:
    """Where an object on a dark ground is: pixels of which any channel is brighter than ``above``."""
    return (x > above).any(1)


def make_cue_conflict(shape: Bool[Tensor, "n h w"], texture: Float[Tensor, "n c i j"], gen: Generator, patch: int = 8) -> Float[Tensor, "n c h w"]:
    """Images with the outline of one object and the surface of another: ``shape`` filled with patches of ``texture``, black outside.

    Each tile of ``patch`` pixels is drawn anew from the brightest quarter of the texture image's patches, so that its ground is not taken for it.
    """
    n, h, w = shape.shape
    if not 1 <= patch <= min(texture.shape[2:]):
        raise Mistake(f"make_cue_conflict: patch={patch} must be from 1 to the shorter side of the texture images, {min(texture.shape[2:])}")
    rows, columns = -(-h // patch), -(-w // patch)
    bright = F.avg_pool2d(texture.mean(1, keepdim=True), patch, 1).flatten(1).argsort(1, descending=True)
    pick = torch.randint(max(bright.shape[1] // 4, 1), (n, rows * columns), generator=gen).to(texture.device)
    places = bright.gather(1, pick)
    patches = F.unfold(texture, patch)
    tiles = patches.gather(2, places[:, None].expand(-1, patches.shape[1], -1))
    surface = F.fold(tiles, (rows * patch, columns * patch), patch, stride=patch)[..., :h, :w]
    return surface * shape[:, None]


class ShapeBias(NamedTuple):
    """``bias``: of the images answered by either cue, the share answered by shape (0.5 where there is none); ``shape``, ``texture``: shares of all images."""

    bias: float
    shape: float
    texture: float


@torch.no_grad()
def shape_bias(answer: nn.Module, x: Float[Tensor, "n c h w"], shape: Int[Tensor, " n"], texture: Int[Tensor, " n"], batch: int = 256) -> ShapeBias:
    """How an answer decides on images [0, 1] whose outline is of class ``shape`` and whose surface is of class ``texture``, two different classes."""
    if not len(x) or bool((shape == texture).any()):
        raise Mistake("shape_bias needs at least one image, and each with two different classes of shape and texture")
    with as_found(answer), torch.no_grad():
        top = torch.cat([answer(part).argmax(1) for part in x.split(batch)])
    by_shape, by_texture = float((top == shape).double().mean()), float((top == texture).double().mean())
    either = by_shape + by_texture
    return ShapeBias(by_shape / either if either else 0.5, by_shape, by_texture)


# -- the probe ---------------------------------------------------------------------------------------


@final
@dataclass
class ReceptiveField(Probe):
    """For each of ``shares``: the area (share of the image) and the side (pixels) of the smallest centred square that holds it of the log scores."""

    shares: tuple[float, ...] = (0.2, 0.3, 0.5, 0.99)

    def __post_init__(self) -> None:
        if not self.shares or len(set(self.shares)) < len(self.shares) or not all(0 < share <= 1 for share in self.shares):
            raise Mistake(f"receptive-field: shares={self.shares} must be different numbers above 0 and at most 1, at least one")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        scores = readable(effective_receptive_field(answer, x))
        found = []
        for share in self.shares:
            area = erf_area(scores, share)
            found.append(Reading(f"area with {share:g} of the contribution", area.area_ratio, "share of the image"))
            found.append(Reading(f"side with {share:g} of the contribution", area.side, "pixels"))
        return Findings(found, [Plane("Contribution of each pixel to the middle of the last map (log)", "rows", "columns", scores.tolist())])
