"""Map layouts: sound, series, point clouds and video laid out as one image each, so that a network of images takes them (UniRepLKNet, section 3.3).

Only ``in_chans`` of the network changes. The functions hold no weights and mix no samples. Source: https://arxiv.org/abs/2311.15599.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from convince.errors import Mistake


def to_map_audio(x: Float[Tensor, "n t f"]) -> Float[Tensor, "n 1 t f"]:
    """A spectrogram of ``t`` frames and ``f`` frequency bins, any scale, as an image of one channel: a row a frame, a column a bin."""
    return x[:, None]


def to_map_series(x: Float[Tensor, "n l d"], embed: Callable[[Tensor], Tensor] | None = None) -> Float[Tensor, "n 1 h w"]:
    """A series of ``l`` steps of ``d`` numbers as a nearly square image of one channel, steps one after another in reading order.

    ``embed`` [n l d] -> [n l e] is applied first (in the paper a learned embedding). The sides are ``w = ceil(sqrt(l e))`` and
    ``h = ceil(l e / w)``; zeros fill the end where ``l e`` is no such product.
    """
    flat = (x if embed is None else embed(x)).flatten(1)
    if not flat.shape[1]:
        raise Mistake(f"to_map_series: a series of shape {tuple(x.shape)} has no numbers; it must be [n l d], each at least 1")
    width = math.ceil(math.sqrt(flat.shape[1]))
    height = math.ceil(flat.shape[1] / width)
    return F.pad(flat, (0, height * width - flat.shape[1])).view(len(x), 1, height, width)


def to_map_points(x: Float[Tensor, "n p d"], side: int = 224) -> Float[Tensor, "n 3 side side"]:
    """A cloud of ``p`` points (x, y, z) as three views [0, 1], a channel each, along x, along y and along z.

    A cloud is shifted and scaled, all axes alike, so that its longest extent fills ``side`` pixels. A pixel is 0 where no point falls,
    else from 1/2 (the farthest place) to 1 (the nearest) by the nearest point's coordinate along the view.
    """
    if x.dim() != 3 or x.shape[2] != 3 or not x.shape[1] or side < 1:
        raise Mistake(f"to_map_points: points of shape {tuple(x.shape)}, side={side}: points are [n p 3], at least one a cloud, and side is at least 1 pixel")
    low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    extent = (high - low).amax(2, keepdim=True)
    unit = (x - (low + high) / 2) / torch.where(extent > 0, extent, torch.ones_like(extent)) + 0.5
    pixel = (unit * side).long().clamp(0, side - 1)
    views = []
    for axis in range(3):
        rows, columns = (a for a in range(3) if a != axis)
        place = pixel[..., rows] * side + pixel[..., columns]
        plane = x.new_zeros(len(x), side * side)
        views.append(plane.scatter_reduce(1, place, (1 + unit[..., axis].clamp(0, 1)) / 2, "amax").view(len(x), side, side))
    return torch.stack(views, 1)


def to_map_video(x: Float[Tensor, "n t c h w"]) -> Float[Tensor, "n c i j"]:
    """``t`` frames as one image: tiles in reading order, ``ceil(sqrt(t))`` columns, black tiles at the end.

    The paper lays the frames out; its released code reshapes the array of frames as it lies in memory, which puts successive rows of one
    frame side by side.
    """
    n, t, c, h, w = x.shape
    if not t:
        raise Mistake(f"to_map_video: a video of shape {tuple(x.shape)} has no frames; it must be [n t c h w]")
    columns = math.ceil(math.sqrt(t))
    rows = math.ceil(t / columns)
    tiles = F.pad(x, (0, 0) * 3 + (0, rows * columns - t)).view(n, rows, columns, c, h, w)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, c, rows * h, columns * w)
