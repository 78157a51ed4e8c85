"""LIME: a linear model of what showing or hiding each part of a picture does to a score, fitted around that picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.explain.maskers import check_masker, masked_scores
from convince.explain.passes import chances
from convince.fit.randomness import generator
from convince.kinds import Explainer
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="lime",
    kind="explainer",
    title="'Why Should I Trust You?': Explaining the Predictions of Any Classifier",
    year=2016,
    url="https://arxiv.org/abs/1602.04938",
    expects=("images",),
    departs=(
        "the parts of a picture are the cells of a grid; the paper takes superpixels, which may be handed to the function",
        "every part keeps its weight; the paper chooses the K most telling ones by the lasso first",
        "the distance is the cosine one of the parts shown, as in the authors' code; the paper names the Euclidean one for pictures",
    ),
    tiny={"samples": 24, "cells": 3},
)


def grid_segments(size: tuple[int, int], cells: int) -> Int[Tensor, "h w"]:
    """The number of the cell that each pixel lies in, for a grid of ``cells`` x ``cells``."""
    rows, columns = (torch.arange(side) * cells // side for side in size)
    return rows[:, None] * cells + columns


def samples_of(count: int, parts: int, gen: Generator) -> Bool[Tensor, "m d"]:
    """z': which parts are shown, each with chance one half; the first sample is the whole picture."""
    shown = torch.rand(count, parts, generator=gen) < 0.5
    shown[0] = True
    return shown


def closeness(shown: Bool[Tensor, "m d"], width: float) -> Float[Tensor, " m"]:
    """``pi = exp(-D^2 / width^2)``, D the cosine distance of z' from the whole picture, which is ``1 - sqrt(share shown)``."""
    distance = 1 - shown.double().mean(1).sqrt()
    return torch.exp(-distance.square() / width**2)


def fit(
    shown: Bool[Tensor, "m d"], y: Float[Tensor, "n m"], weight: Float[Tensor, " m"], ridge: float
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """Eq. 2 with a ridge: w, b that minimise ``sum_m pi_m (y_m - w.z_m - b)^2 + ridge |w|^2``, in float64; and the weighted R^2 (1 for a constant y)."""
    z, y, share = shown.double(), y.double(), weight.double() / weight.double().sum()
    z_mean, y_mean = share @ z, y @ share
    zc, yc = z - z_mean, y - y_mean[:, None]
    gram = zc.T @ (weight.double()[:, None] * zc) + ridge * torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
    w = torch.linalg.solve(gram, zc.T @ (weight.double() * yc).T).T
    left, spread = (yc - w @ zc.T).square() @ share, yc.square() @ share
    return w, y_mean - w @ z_mean, torch.where(spread > 0, 1 - left / spread.clamp_min(1e-300), 1)


def lime(
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: Int[Tensor, " n"],
    segments: Int[Tensor, "h w"],
    shown: Bool[Tensor, "m d"],
    masker: str = "grey",
    width: float = 0.25,
    ridge: float = 1.0,
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """The weight of each of d segments (0 to d - 1) for the target's chance, and how well the linear model fits (R^2). The answer must be in eval mode."""
    y = []
    for some in shown.split(512):
        keep = some[:, segments][:, None].to(x.device)
        found = masked_scores(answer, x, keep[None].expand(len(x), *keep.shape), masker)
        y.append(chances(answer, found.flatten(0, 1)).gather(1, target.repeat_interleave(len(some))[:, None]).view(len(x), -1))
    shown = shown.to(x.device)
    w, _, r2 = fit(shown, torch.cat(y, 1), closeness(shown, width), ridge)
    return w.to(x.dtype), r2.to(x.dtype)


@final
@dataclass
class Lime(Explainer):
    """The map gives each pixel its cell's weight from :func:`lime`: what showing the cell adds to the target's chance.

    ``cells``: the grid is cells x cells. ``samples``: pictures with random cells hidden, the same cells for every image; ``masker``: what a
    hidden cell shows, one of :mod:`convince.explain.maskers`. ``width`` of the kernel, ``ridge`` of the regression. The table has the mean R^2 ("fit").
    """

    samples: int = 1000
    cells: int = 8
    masker: str = "grey"
    width: float = 0.25
    ridge: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_masker(self.masker, "lime")
        if self.samples < 2 or self.cells < 2:
            raise Mistake(f"lime: samples={self.samples} and cells={self.cells} must be at least 2")
        if not self.width > 0 or not self.ridge > 0:
            raise Mistake(f"lime: width={self.width} and ridge={self.ridge} must be above 0")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        must_hold_grid(x, self.cells, "lime")
        segments = grid_segments((x.shape[2], x.shape[3]), self.cells)
        shown = samples_of(self.samples, self.cells**2, generator("lime", self.seed))
        w, r2 = lime(answer, x.detach(), target, segments, shown, self.masker, self.width, self.ridge)
        table = {"samples": self.samples, "cells": self.cells**2, "masker": self.masker, "fit": float(r2.mean())}
        return Explanation(w[:, segments][:, None], table=table)


def must_hold_grid(x: Tensor, cells: int, who: str) -> None:
    """Refuse what has no plane, and cells smaller than a pixel."""
    if x.dim() != 4:
        raise Mistake(f"{who} hides cells of images [n c h w], and the input has shape {tuple(x.shape)}")
    if cells > min(x.shape[2:]):
        raise Mistake(f"{who}: cells={cells} does not fit images of {x.shape[2]}x{x.shape[3]} pixels; at most {min(x.shape[2:])}")
