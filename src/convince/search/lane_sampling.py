"""Lane sampling: train a lane-net by a part of it a step, drawn anew, on labels and on where and what in the picture the thing is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.backbones.lane_net import LaneNet, Topology, pairs, whole
from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="lane-sampling",
    kind="technique",
    paper="fbnetv5",
    title="FBNetV5: Neural Architecture Search for Multiple Tasks in One Run",
    year=2021,
    url="https://arxiv.org/abs/2111.10007",
    departs=(
        "where the data hold no masks, they are made by contrast with the picture's border; the paper's teachers are trained detectors and segmenters",
        "detection is one thing a picture: the cell of its centre; the paper's pseudo targets are boxes",
        "the running statistics of batch norm are those of the parts drawn; a part that is judged takes its batch's own",
    ),
    strength="chance",
    off=0.0,
    expects=("images", "network"),
    host="lane-net:widths=(4,6),blocks=['11','11'],fusions=['11','11'],expansion=2",
    tiny={"grid": 3},
    idle=("extra.lane-sampling", "cells.", "joins.", "ends."),
)
NAME = "lane-sampling"
TASKS = ("label", "centre", "mask")
BINS = 32  # of the histogram that a threshold is read off


# -- masks of a super-network ------------------------------------------------------------------------


def places(lanes: int, columns: int) -> list[str]:
    """The choices of a topology by name: ``block 0.1`` (lane, column) and ``join 1.0>2`` (column, source, target).

    In the first column all lanes but the first are empty, so that their blocks and joins are no choice.
    """
    blocks = [f"block {i}.{c}" for c in range(columns) for i in range(lanes) if i == 0 or c > 0]
    return blocks + [f"join {c}.{i}>{j}" for c in range(columns) for i, j in pairs(lanes) if i == 0 or c > 0]


def topology(on: set[str], lanes: int, columns: int) -> Topology:
    """The network with these choices on, without what would read an empty lane."""
    blocks = tuple("".join("01"[f"block {i}.{c}" in on] for c in range(columns)) for i in range(lanes))
    fusions = tuple("".join("01"[f"join {c}.{i}>{j}" in on] for i, j in pairs(lanes)) for c in range(columns))
    return Topology(blocks, fusions).pruned()


def drawn(lanes: int, columns: int, chance: float, gen: Generator) -> Topology:
    """A random part of the whole: each choice is off with this chance."""
    names = places(lanes, columns)
    off = torch.rand(len(names), generator=gen) < chance
    return topology({name for name, out in zip(names, off.tolist(), strict=True) if not out}, lanes, columns)


# -- targets made of the pictures ----------------------------------------------------------------------


def otsu(values: Float[Tensor, "n p"]) -> Float[Tensor, " n"]:
    """For each row of values in [0, 1] the threshold, of 31 even ones, that splits it into two groups whose means lie farthest apart, weighted."""
    code = (values * BINS).long().clamp(0, BINS - 1)
    share = F.one_hot(code, BINS).to(values.dtype).mean(1)  # [n b]
    below, mean = share.cumsum(1)[:, :-1], (share * (torch.arange(BINS, device=values.device) + 0.5)).cumsum(1)
    between = (mean[:, -1:] * below - mean[:, :-1]).square() / (below * (1 - below)).clamp_min(1e-9)
    return (between.argmax(1) + 1).to(values.dtype) / BINS


def by_contrast(x: Float[Tensor, "n c h w"]) -> Bool[Tensor, "n h w"]:
    """The pixels whose colour is far from the mean of the picture's border, by :func:`otsu`; none where the picture is all of one colour."""
    border = torch.cat((x[:, :, 0], x[:, :, -1], x[:, :, :, 0], x[:, :, :, -1]), 2).mean(2)
    far = (x - border[:, :, None, None]).square().sum(1).sqrt()
    far = far / far.amax((1, 2), keepdim=True).clamp_min(1 / 255)  # a difference below a step of 8 bits is rounding
    return far > otsu(far.flatten(1))[:, None, None]


def cell_of(mask: Bool[Tensor, "n h w"], grid: int) -> Int[Tensor, " n"]:
    """The cell, row by row, of a ``grid`` x ``grid`` raster in which a mask has its centre of mass; the middle one where it is empty."""
    h, w = mask.shape[1:]
    weight = torch.where(mask.any(2).any(1)[:, None, None], mask, torch.ones_like(mask)).double()
    down = (weight.sum(2) @ (torch.arange(h, device=mask.device) + 0.5).double()) / weight.sum((1, 2))
    right = (weight.sum(1) @ (torch.arange(w, device=mask.device) + 0.5).double()) / weight.sum((1, 2))
    return (down * grid / h).long().clamp(0, grid - 1) * grid + (right * grid / w).long().clamp(0, grid - 1)


# -- the heads ---------------------------------------------------------------------------------------------


@final
class TaskHeads(nn.Module):
    """Scores of the two further tasks: each lane that is not empty, behind a 1x1 convolution, brought to the raster of the task; their sum."""

    def __init__(self, widths: dict[int, int], grid: int) -> None:
        super().__init__()
        self.grid = grid
        self.centre = nn.ModuleDict({str(i): nn.Conv2d(width, 1, 1) for i, width in widths.items()})
        self.mask = nn.ModuleDict({str(i): nn.Conv2d(width, 1, 1) for i, width in widths.items()})

    def forward(self, lanes: dict[int, Tensor]) -> tuple[Float[Tensor, "n g"], Float[Tensor, "n h w"]]:
        raster, size = (self.grid, self.grid), lanes[0].shape[-2:]
        centre = torch.stack([F.adaptive_avg_pool2d(self.centre[str(i)](lane), raster) for i, lane in lanes.items()]).sum(0)
        mask = torch.stack([F.interpolate(self.mask[str(i)](lane), size=size, mode="nearest") for i, lane in lanes.items()]).sum(0)
        return full(centre).flatten(1), full(mask)[:, 0]


def further(heads: TaskHeads, lanes: dict[int, Tensor], mask: Bool[Tensor, "n h w"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The losses of the two further tasks for each row: cross-entropy of the centre's cell, mean binary cross-entropy of the pixels."""
    centre, pixels = heads(lanes)
    share = F.adaptive_avg_pool2d(mask[:, None].to(pixels.dtype), pixels.shape[-2:])[:, 0]
    losses = F.binary_cross_entropy_with_logits(pixels, share, reduction="none").mean((1, 2))
    return F.cross_entropy(centre, cell_of(mask, heads.grid), reduction="none"), losses


@torch.no_grad()
def task_losses(run: Run, part: Topology, rows: Int[Tensor, " n"]) -> list[float]:
    """The mean losses of :data:`TASKS` on ``rows``, taken as one batch, of a part of the trained super-network; nothing of it moves."""
    model = super_network(run.model, run.settings.model)
    heads = run.extra[NAME]
    assert isinstance(heads, TaskHeads)
    x, training = run.plan.pixels(run.data.x.take(rows)), model.training
    with run.still():
        model.train()
        model.now = part
        try:
            with run.plan.autocast():
                lanes = model.lanes(run.normalise(x))
                scores = full(model.forward_head(model.beside(lanes)))
                rest = further(heads, lanes, masks_of(run.data.extra.get("mask"), rows, x))
        finally:
            model.now = None
            model.train(training)
    label = F.cross_entropy(scores, run.data.y[rows].to(scores.device))
    return [float(label), *(float(losses.mean()) for losses in rest)]


def masks_of(own: Tensor | None, rows: Int[Tensor, " n"], x: Float[Tensor, "n c h w"]) -> Bool[Tensor, "n h w"]:
    """The data's own masks of these rows, or :func:`by_contrast`."""
    return by_contrast(x) if own is None else own[rows].to(x.device) > 0.5


# -- the technique -----------------------------------------------------------------------------------------


@final
@dataclass
class LaneSampling(Technique):
    """At each step a random part of the lane-net is trained, each block and join being left out with ``chance``; 0 is off.

    Beside the labels it learns, with ``weight``, the cell of a ``grid`` x ``grid`` raster in which the thing in the picture has its centre, and its
    mask: those of the data (``extra["mask"]``, [N h w]) where they have some, else :func:`by_contrast`. The answer is the whole network.
    """

    chance: float = 0.5
    weight: float = 1.0
    grid: int = 7
    rank = 90  # after parts that change the rows of a batch

    def __post_init__(self) -> None:
        if not 0 <= self.chance < 1 or self.weight < 0 or self.grid < 1:
            raise Mistake(
                f"lane-sampling: chance={self.chance}, weight={self.weight}, grid={self.grid}: chance from 0 (off) to below 1, weight >= 0, grid >= 1"
            )

    def on_start(self, run: Run) -> None:
        model = super_network(run.model, run.settings.model)
        if self.chance == 0:
            return
        if "mask" in run.data.extra and run.settings.augment != "none":
            raise Mistake(f"lane-sampling: the data's masks do not move with the pictures under --augment {run.settings.augment}; use --augment none")
        run.extra[NAME] = run.plan.place(TaskHeads({i: model.expansion * model.widths[i] for i in model.read}, self.grid))

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        model = super_network(run.model, run.settings.model)
        if self.chance == 0:
            return grad()
        if run.edits:
            raise Mistake(f"lane-sampling takes parts of a plain lane-net, and {run.edits[0]['part']!r} has changed the network; leave one of them out")
        kept = run.batch.extra

        def keeper(i: str) -> Callable[..., None]:
            return lambda _module, _input, output: kept.update({f"{NAME} {i}": output})

        hooks = [end.register_forward_hook(keeper(i)) for i, end in model.ends.items()]
        model.now = drawn(len(model.widths), model.topology.columns, self.chance, run.gen(NAME))
        try:
            grad()
        finally:
            model.now = None
            for hook in hooks:
                hook.remove()
            for i in model.ends:
                kept.pop(f"{NAME} {i}", None)

    def on_loss(self, run: Run) -> None:
        lanes = {int(name.removeprefix(NAME)): value for name, value in run.batch.extra.items() if name.startswith(NAME)}
        if not lanes:
            return
        heads, x = run.extra[NAME], run.batch.x
        assert isinstance(heads, TaskHeads)
        own = run.batch.extra.get("mask")
        with run.plan.autocast():
            centre, pixels = further(heads, lanes, by_contrast(x) if own is None else own.to(x.device) > 0.5)
        losses = centre + pixels
        run.loss = run.loss + self.weight * (losses if run.batch.weight is None else losses * run.batch.weight).mean()


def super_network(model: nn.Module, name: str | None) -> LaneNet:
    """The network, or a Mistake where it is another one or a part already."""
    if not isinstance(model, LaneNet):
        raise Mistake(f"lane-sampling trains a lane-net, and the network is {name!r}; use --model lane-net-largest")
    if model.topology != whole(len(model.widths), model.topology.columns):
        raise Mistake(f"lane-sampling trains a lane-net with every block and join, and {name!r} leaves some out; use --model lane-net-largest")
    return model
