"""Spp: max-pool a map of any size over grids of 6x6, 3x3, 2x2 and 1x1 bins into one vector, so that a network takes images of any size."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.kinds import as_found
from convince.layers.head import Headed
from convince.layers.surgery import Surgery, find, swap
from convince.parts import Card

CARD = Card(
    part="spp",
    kind="layer",
    paper="spp-net",
    title="Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition",
    year=2014,
    url="https://arxiv.org/abs/1406.4729",
    expects=("images",),
    swaps=("Linear",),
    tiny={"levels": (2, 1)},
    departs=(
        "the linear layer that the network has behind its pooling reads the pyramid; the paper's networks have two hidden layers of 4,096 there",
        "a map with fewer positions than a grid has bins repeats them, and so gives a vector of the same length",
        "a box too small for any position of the map to lie strictly inside it takes the position next to its middle",
    ),
)


def check(levels: Sequence[int], mode: str) -> tuple[int, ...]:
    """The levels as a tuple; a Mistake for no pyramid."""
    if not isinstance(levels, (tuple, list)) or not levels or not all(isinstance(n, int) and not isinstance(n, bool) and n >= 1 for n in levels):
        raise Mistake(f"spp: levels={levels!r} must be bins a side of each grid, at least one, such as (6, 3, 2, 1) or (4, 2, 1)")
    if mode not in ("max", "mean"):
        raise Mistake(f"spp: mode={mode!r} must be 'max' (the paper's) or 'mean'")
    return tuple(levels)


def bins(levels: Sequence[int]) -> int:
    """The bins of a pyramid: 50 for (6, 3, 2, 1), 30 for (4, 3, 2, 1), 21 for (4, 2, 1)."""
    return sum(n * n for n in levels)


def spatial_pyramid_pool(x: Float[Tensor, "n c h w"], levels: Sequence[int] = (6, 3, 2, 1), mode: str = "max") -> Float[Tensor, "n d"]:
    """``d = c sum(n^2)``: in level ``n`` bin (i, j) pools rows ``floor(i h/n)`` to ``ceil((i+1) h/n) - 1``, and columns alike (section 2.2).

    Levels stand in their order, in each the channels one after the other, in each channel the bins row by row.
    """
    pool: Callable[..., Tensor] = F.adaptive_max_pool2d if mode == "max" else F.adaptive_avg_pool2d
    return torch.cat([pool(x, n).flatten(1) for n in levels], 1)


@final
class Spp(nn.Module):
    """:func:`spatial_pyramid_pool` as a module without weights."""

    def __init__(self, levels: Sequence[int] = (6, 3, 2, 1), mode: str = "max") -> None:
        super().__init__()
        self.levels, self.mode = check(levels, mode), mode

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        return spatial_pyramid_pool(x, self.levels, self.mode)

    def extra_repr(self) -> str:
        return f"levels={self.levels}, mode={self.mode}"


# -- in place of a network's pooling -----------------------------------------------------------------


def install(model: nn.Module, levels: Sequence[int] = (6, 3, 2, 1), mode: str = "max") -> Surgery:
    """Put the pyramid in place of the network's last pooling, and a linear layer that reads it in place of the one behind that; both in place.

    ``levels`` are bins a side of each grid; (1,) is global pooling. Takes networks of ours that pool the last map's positions, and those of timm or
    torchvision that have a pooling module followed by a linear layer. The new layer has the old one's name and other weights. Raises Mistake for
    other networks. timm's own ``reset_classifier`` brings its pooling back.
    """
    layer = Spp(levels, mode)
    if isinstance(model, Headed):
        return repool(model, layer, bins(layer.levels) * model.num_features, "spp")
    pool, linear, channels = _tail(model)
    done = swap(model, [pool], lambda name, old: layer)
    return done + swap(model, [linear], lambda name, old: _reader(old, channels * bins(layer.levels)))


def repool(model: Headed, pool: nn.Module, num_features: int, part: str) -> Surgery:
    """Let a network of ours, which pools the last map's positions, pool by this module instead, as its child ``part``; its ``fc`` becomes as wide.

    The module makes a vector of ``num_features`` of a map [n d i j]. Raises Mistake for a network that pools otherwise.
    """
    if not (isinstance(model.fc, nn.Linear) and model.fc.in_features == model.num_features and _pools_positions(model)):
        raise Mistake(f"{part}: {type(model).__name__} does not pool the positions of a last map for one linear layer; choose a network such as resnet20")
    done = swap(model, [("fc", model.fc)], lambda name, old: _reader(old, num_features))
    narrow, model.num_features = model.num_features, num_features
    model.add_module(part, pool)
    model.__dict__["pool"] = pool  # found before the method of that name, and copied with the network
    done.places.append("pool")
    done.added += sum(p.numel() for p in pool.parameters())

    def undo() -> None:
        del model.__dict__["pool"], model._modules[part]
        model.num_features = narrow

    done.steps.append(undo)
    return done


def _reader(old: nn.Module, width: int) -> nn.Linear:
    assert isinstance(old, nn.Linear)
    return nn.Linear(width, old.out_features, old.bias is not None)


def _pools_positions(model: Headed) -> bool:
    """Whether the network's vector is the mean (or largest) of a map's positions, seen on a random map."""
    like = next(model.parameters())
    features = torch.rand(2, model.num_features, 3, 4, generator=torch.Generator().manual_seed(0)).to(like)
    try:
        with torch.no_grad():
            found = model.pool(features)
    except Exception:  # whatever a network says to a map where it has tokens
        return False
    return any(found.shape == want.shape and torch.allclose(found, want, rtol=1e-4, atol=1e-5) for want in (features.mean((2, 3)), features.amax((2, 3))))


def _tail(model: nn.Module) -> tuple[tuple[str, nn.Module], tuple[str, nn.Module], int]:
    """The last pooling module, the linear layer behind it, and the channels between them."""
    from timm.layers import SelectAdaptivePool2d

    pools = find(model, types=(nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, SelectAdaptivePool2d))
    refusal = Mistake(f"spp: {type(model).__name__} has no pooling module with a linear layer right behind it; choose a network such as resnet20")
    if not pools:
        raise refusal
    name, pool = pools[-1]
    flat = not isinstance(pool, SelectAdaptivePool2d) or (isinstance(pool.flatten, nn.Flatten) and pool.feat_mult() == 1)
    names = [n for n, _ in model.named_modules()]
    inside = max(i for i, n in enumerate(names) if n == name or n.startswith(name + "."))
    after = [(n, m) for n, m in list(model.named_modules())[inside + 1 :] if not list(m.children())]
    linears = [(n, m) for n, m in after if isinstance(m, nn.Linear)]
    if not flat or not linears or not all(isinstance(m, (nn.Linear, nn.ReLU, nn.Dropout, nn.Flatten, nn.Identity)) for _, m in after):
        raise refusal
    size = getattr(pool, "output_size", 1)
    sides = (size, size) if isinstance(size, int) else tuple(size or (None,))
    if None in sides:
        raise refusal
    first = linears[0][1]
    assert isinstance(first, nn.Linear)
    return (name, pool), linears[0], first.in_features // math.prod(sides)


# -- regions of one map ------------------------------------------------------------------------------


def project(boxes: Float[Tensor, "r 4"], stride: int, plane: tuple[int, int]) -> Int[Tensor, "r 4"]:
    """Boxes (left, top, right, bottom) [pixels] as first and last columns and rows of a map with ``plane`` (rows, columns), inclusive.

    ``floor(x/S) + 1`` for left and top, ``ceil(x/S) - 1`` for right and bottom (appendix A): positions whose centres, ``S`` pixels apart from 0 on,
    lie strictly inside. Every convolution must be padded by half its kernel.
    """
    last = torch.tensor([plane[1] - 1, plane[0] - 1], device=boxes.device)
    first, end = (boxes[:, :2] / stride).floor() + 1, (boxes[:, 2:] / stride).ceil() - 1
    middle = ((boxes[:, :2] + boxes[:, 2:]) / 2 / stride).round()
    empty = first > end
    first, end = torch.where(empty, middle, first), torch.where(empty, middle, end)
    return torch.cat([first.long().clamp_min(0).minimum(last), end.long().clamp_min(0).minimum(last)], 1)


def spp_regions(
    features: Float[Tensor, "c h w"], boxes: Float[Tensor, "r 4"], stride: int, levels: Sequence[int] = (6, 3, 2, 1), mode: str = "max"
) -> Float[Tensor, "r d"]:
    """The pyramid of each box of an image, read from one map of the whole image; ``stride`` pixels a step of the map (section 4.1)."""
    levels = check(levels, mode)
    windows = project(boxes, stride, (features.shape[1], features.shape[2])).tolist()
    return torch.cat([spatial_pyramid_pool(features[None, :, top : bottom + 1, left : right + 1], levels, mode) for left, top, right, bottom in windows])


@torch.no_grad()
def region_seconds(
    trunk: Callable[[Tensor], Tensor], image: Float[Tensor, "c h w"], boxes: Float[Tensor, "r 4"], stride: int, levels: Sequence[int], repeats: int = 5
) -> tuple[float, float]:
    """Seconds for the pyramids of all boxes: from one map of the image, and from each box cut out and run through ``trunk``; medians of ``repeats``."""

    def shared() -> None:
        spp_regions(trunk(image[None])[0], boxes, stride, levels)

    def cropped() -> None:
        for left, top, right, bottom in boxes.long().tolist():
            spatial_pyramid_pool(trunk(image[None, :, top:bottom, left:right]), levels)

    def seconds(work: Callable[[], None]) -> float:
        began = time.perf_counter()
        work()
        return time.perf_counter() - began

    shared()  # the first pass pays for what later ones find ready
    times = [(seconds(shared), seconds(cropped)) for _ in range(repeats)]
    return statistics.median(a for a, _ in times), statistics.median(b for _, b in times)


# -- answers for whole images ------------------------------------------------------------------------


@torch.no_grad()
def full_image_predict(answer: nn.Module, images: Sequence[Tensor], sides: Sequence[int] = (256,)) -> Float[Tensor, "n k"]:
    """Probabilities for [0, 1] images [c h w] of any form, each fed whole with its shorter side at ``sides`` pixels, averaged over these (section 3.1.4)."""
    rows = []
    with as_found(answer), torch.no_grad():
        for image in images:
            short = min(image.shape[1:])
            sizes = [tuple(max(round(n * side / short), 1) for n in image.shape[1:]) for side in sides]
            views = [F.interpolate(image[None], size=size, mode="bilinear", align_corners=False, antialias=True) for size in sizes]
            rows.append(torch.stack([answer(view).softmax(1)[0] for view in views]).mean(0))
    return torch.stack(rows)


@torch.no_grad()
def ten_view_predict(answer: nn.Module, x: Float[Tensor, "n c h w"], crop: int) -> Float[Tensor, "n k"]:
    """Probabilities averaged over the four corners and the centre of ``crop`` pixels a side, and their mirror images."""
    from torchvision.transforms.functional import ten_crop

    if not 1 <= crop <= min(x.shape[2:]):
        raise Mistake(f"ten_view_predict: crop={crop} must be from 1 to the images' shorter side, {min(x.shape[2:])} pixels")
    with as_found(answer), torch.no_grad():
        return torch.stack([answer(view).softmax(1) for view in ten_crop(x, [crop, crop])]).mean(0)
