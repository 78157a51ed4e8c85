"""Filter grid: the size, the number, the shape and the first values of a network's first filters, each combination trained once, as one table."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.kinds import Study
from convince.parts import Card
from convince.types import Budget

CARD = Card(
    part="filter-grid",
    kind="study",
    paper="filter-design",
    title="On filter design in deep convolutional neural network",
    year=2022,
    url="https://arxiv.org/abs/2410.21644",
    departs=("the survey compares published networks; here one small network is trained on one data set with each choice of its first filters",),
    tiny={"sizes": (3,), "counts": (4,), "schemes": ("kaiming", "gabor"), "seeds": 1},
)
SHAPES = ("full", "1x1", "separable", "dilated", "depthwise", "circle")


@final
class CircleConv2d(nn.Conv2d):
    """A convolution whose taps outside the inscribed circle are 0."""

    mask: Tensor

    def __init__(self, c_in: int, c_out: int, k: int) -> None:
        super().__init__(c_in, c_out, k, padding=k // 2, bias=False)
        at = torch.arange(k) - (k - 1) / 2
        self.register_buffer("mask", ((at[:, None] ** 2 + at**2).sqrt() <= k / 2).to(torch.get_default_dtype()))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return self._conv_forward(x, self.weight * self.mask, None)


def filter_shape(c_in: int, c_out: int, k: int, shape: str = "full") -> nn.Module:
    """A convolution of odd size ``k`` that keeps the sides and has no biases.

    ``shape``: "full", "1x1" (which does not reach ``k``), "separable" (1xk, then kx1), "dilated" (3x3 taps spread over k), "depthwise" (kxk in
    each channel, then 1x1) or "circle" (corners 0).
    """
    if shape not in SHAPES:
        raise Mistake(f"filter_shape: shape={shape!r} is none of {', '.join(SHAPES)}{nearest(shape, SHAPES)}")
    if k % 2 == 0 or k < 3:
        raise Mistake(f"filter_shape: k={k}: must be odd and at least 3, so that sides are kept")
    half = k // 2
    match shape:
        case "1x1":
            return nn.Conv2d(c_in, c_out, 1, bias=False)
        case "separable":
            return nn.Sequential(nn.Conv2d(c_in, c_out, (1, k), padding=(0, half), bias=False), nn.Conv2d(c_out, c_out, (k, 1), padding=(half, 0), bias=False))
        case "dilated":
            return nn.Conv2d(c_in, c_out, 3, padding=half, dilation=half, bias=False)
        case "depthwise":
            return nn.Sequential(nn.Conv2d(c_in, c_in, k, padding=half, groups=c_in, bias=False), nn.Conv2d(c_in, c_out, 1, bias=False))
        case "circle":
            return CircleConv2d(c_in, c_out, k)
    return nn.Conv2d(c_in, c_out, k, padding=half, bias=False)


def three_convs(num_classes: int, in_chans: int, count: int = 16, k: int = 5, shape: str = "full") -> nn.Sequential:
    """``count`` first filters of :func:`filter_shape`, then 32 and 64 of 3x3; a batch norm, ReLU and 2x2 maximum after each; a linear layer on the mean."""
    net, c_in = nn.Sequential(), in_chans
    for i, width in enumerate((count, 32, 64)):
        net.add_module(f"conv{i + 1}", nn.Conv2d(c_in, width, 3, padding=1, bias=False) if i else filter_shape(c_in, width, k, shape))
        net.add_module(f"bn{i + 1}", nn.BatchNorm2d(width))
        net.add_module(f"act{i + 1}", nn.ReLU())
        net.add_module(f"pool{i + 1}", nn.MaxPool2d(2, ceil_mode=True))
        c_in = width
    net.add_module("mean", nn.AdaptiveAvgPool2d(1))
    net.add_module("flatten", nn.Flatten())
    net.add_module("fc", nn.Linear(64, num_classes))
    return net


def epochs_to(accuracies: list[float], share: float = 0.9) -> int:
    """Epochs until an accuracy is ``share`` of the best one, counted from 1."""
    return 1 + next(i for i, value in enumerate(accuracies) if value >= share * max(accuracies))


@final
@dataclass
class FilterGrid(Study):
    """Trains :func:`three_convs` for every size, count, shape and scheme of its first filters and prints accuracy, cost and speed of learning.

    ``schemes`` are those of filter-init, None the network's own law; ``frozen``: the first filters do not move. ``data``: a built-in set, folder
    or table of images; its validation part says how fast a network learns.
    """

    data: str = "digits"
    sizes: tuple[int, ...] = (3, 5)
    counts: tuple[int, ...] = (8, 16)
    shapes: tuple[str, ...] = ("full",)
    schemes: tuple[str | None, ...] = ("kaiming", "gabor", "pca-patches")
    frozen: bool = False
    seeds: int = 2
    batch: int = 32
    lr: float = 0.05

    def run(self, budget: Budget) -> dict[str, Any]:
        """The table: one row a combination, means over seeds. ``budget`` is that of one training, in epochs."""
        from functools import partial

        from convince.data import load
        from convince.fit.loop import fit
        from convince.fit.settings import settings
        from convince.fit.train import prepare, resolve
        from convince.models.counting import count as counted

        if budget.unit != "epochs" or budget.value < 1:
            raise Mistake(f"filter-grid: a budget of {budget.value:g} {budget.unit} does not fit; give whole epochs of one training, which its table counts")
        data = load(self.data, val=0.15, seed=0)
        if data.preprocess.kind != "image" or not len(data.split.val) or not len(data.split.test):
            raise Mistake(f"filter-grid: {self.data} must be images with a validation and a test part")
        size, channels = data.preprocess.size, data.preprocess.channels
        table = []
        for k, count, shape, scheme in itertools.product(self.sizes, self.counts, self.shapes, self.schemes):
            found = []
            for seed in range(self.seeds):
                part = f"filter-init:scheme={scheme},frozen={self.frozen}"
                how = settings(model="small-cnn", parts=(part,), augment="none", batch=self.batch, lr=self.lr, epochs=round(budget.value), seed=seed)
                run = prepare(resolve(how, data)[0], data)
                run.build = partial(three_convs, data.k, channels, count, k, shape)
                fit(run)
                seen = [row["val_accuracy"] for row in run.record.rows if row.get("kind") == "epoch"]
                found.append((run.evaluate("test").accuracy, epochs_to(seen)))
            cost = counted(run.model, size, channels)
            row = {"size": k, "count": count, "shape": shape, "scheme": scheme, "parameters": cost.parameters, "macs": cost.macs, "n": self.seeds}
            table.append({**row, "accuracy": statistics.fmean(a for a, _ in found), "epochs_to_90": statistics.fmean(e for _, e in found)})
        print(self._page(table))
        return {**asdict(self), "budget": asdict(budget), "table": table}

    def _page(self, table: list[dict[str, Any]]) -> str:
        lines = [f"first filters on {self.data}, {self.seeds} seed(s){', frozen' if self.frozen else ''}; epochs until 90 % of the best validation accuracy"]
        lines.append(f"{'size':>4} {'count':>5} {'shape':<10} {'scheme':<12} {'accuracy %':>10} {'epochs':>7} {'parameters':>11} {'macs':>12}")
        for r in table:
            lines.append(
                f"{r['size']:>4} {r['count']:>5} {r['shape']:<10} {r['scheme'] or 'own':<12} {100 * r['accuracy']:>10.1f} {r['epochs_to_90']:>7.1f} "
                f"{r['parameters']:>11,} {r['macs']:>12,}"
            )
        return "\n".join(lines)
