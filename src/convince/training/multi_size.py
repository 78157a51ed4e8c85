"""Multi-size: train one network on images of another size each epoch, so that it is at home in several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="multi-size",
    kind="technique",
    paper="spp-net",
    title="Spatial Pyramid Pooling in Deep Convolutional Networks for Visual Recognition",
    year=2014,
    url="https://arxiv.org/abs/1406.4729",
    strength="scales",
    off=(1.0,),
    expects=("images", "network"),
    tiny={"scales": (0.5, 1.0)},
    departs=(
        "sizes are shares of the data's own size, so that the default fits every data set; for images of 224 pixels they are the paper's 224 and 180",
        "images that other parts have changed are resized last, labels as they are",
    ),
)


def sizes(scales: tuple[float, ...], size: tuple[int, int]) -> list[tuple[int, int]]:
    """Rows and columns [pixels] at each share of ``size``, at least 1."""
    rows, columns = size
    return [(max(round(rows * scale), 1), max(round(columns * scale), 1)) for scale in scales]


def at_epoch(scales: tuple[float, ...], epoch: int, draw: str, gen: torch.Generator) -> float:
    """The share of an epoch: the next in turn, or with ``draw="uniform"`` any between the smallest and the largest."""
    if draw == "cycle":
        return scales[epoch % len(scales)]
    return min(scales) + (max(scales) - min(scales)) * float(torch.rand((), generator=gen))


def resized(x: Float[Tensor, "n c h w"], size: tuple[int, int]) -> Float[Tensor, "n c i j"]:
    """The same images in another size [pixels], bilinear, smoothed before they shrink; equal bits where they have it already."""
    return x if tuple(x.shape[2:]) == tuple(size) else F.interpolate(x, size=size, mode="bilinear", align_corners=False, antialias=True)


@final
@dataclass
class MultiSize(Technique):
    """Each epoch has one size, ``scales`` of the data's in turn (section 2.3); ``draw="uniform"`` draws it between their ends. ``scales=(1.0,)`` is off.

    The network must take images of these sizes: one that pools globally does, or one with ``--with spp``. Tests are at the data's own size.
    """

    scales: tuple[float, ...] = (1.0, 180 / 224)
    draw: str = "cycle"
    rank = 60

    def __post_init__(self) -> None:
        if not isinstance(self.scales, (tuple, list)) or not self.scales or not all(0 < scale <= 4 for scale in self.scales):
            raise Mistake(f"multi-size: scales={self.scales!r} must be shares of the images' size, each above 0 and at most 4, such as (1.0, 0.8)")
        if self.draw not in ("cycle", "uniform"):
            raise Mistake(f"multi-size: draw={self.draw!r} must be 'cycle' or 'uniform'")

    def on_start(self, run: Run) -> None:
        if tuple(self.scales) == (1.0,):
            return
        rows, columns = run.data.preprocess.size  # type: ignore[misc]
        like = next(run.model.parameters())
        for size in sizes(tuple(self.scales), (rows, columns)):
            with run.aside():
                try:
                    run.model(like.new_zeros(1, run.data.preprocess.channels, *size))
                except Exception as error:
                    raise Mistake(
                        f"multi-size: the network {run.settings.model!r} does not take images of {size[0]}x{size[1]} pixels; choose one that pools globally "
                        f"(resnet20, or another with --with spp), or scales nearer to 1"
                    ) from error

    def on_batch(self, run: Run) -> None:
        scale = at_epoch(tuple(self.scales), run.epoch, self.draw, generator(run.seed, "multi-size", run.stage_number, run.epoch))
        rows, columns = run.batch.x.shape[2:]
        run.batch.x = resized(run.batch.x, sizes((scale,), (rows, columns))[0])

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        try:
            grad()
        except (RuntimeError, ValueError, AssertionError) as error:
            rows, columns = run.batch.x.shape[2:]
            if isinstance(error, Mistake) or (rows, columns) == tuple(run.data.preprocess.size):
                raise
            raise Mistake(
                f"multi-size: a step on images of {rows}x{columns} pixels fails ({str(error).splitlines()[0]}); a part beside it is made for one size, "
                "leave one of the two out"
            ) from error
