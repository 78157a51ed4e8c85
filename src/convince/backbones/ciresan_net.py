"""CiresanNet: deep convolutional nets of 2011 from one line of text, with scaled tanh, max-pooling, partial tables of links and fixed filters."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="ciresan-net",
    kind="backbone",
    paper="hp-conv-2011",
    title="High-Performance Neural Networks for Visual Object Classification",
    year=2011,
    url="https://arxiv.org/abs/1102.0183",
    accepts=("image",),
    departs=(
        "the kernels of all sizes, and the maps of the NORB and CIFAR sizes, are ours, chosen so that sides divide; the maps of the MNIST sizes are printed",
        "random tables keep half of the links, a share of ours; the text of the report could not be read for it",
        "an image that the layers do not divide is padded by its last row and column to the next side that they do",
        "contrast maps are rectified, as in Fukushima's contrast layer (2003), which the report takes up; the widths of centre and surround are ours",
        "the report trains on single images at a rate of 0.001 that falls to 0.00003; here the run's batches and schedule hold",
    ),
    tiny={"layers": "4C3-MP2-6C2-8N", "links": 0.5},
    variants={
        "ciresan-net-mini": {"layers": "20C3-MP2-60C2-MP2-150N"},
        "ciresan-mnist-20-60": {"layers": "20C4-MP2-60C5-MP3", "links": 0.5},
        "ciresan-mnist-20-60-150n": {"layers": "20C4-MP2-60C5-MP3-150N", "links": 0.5},
        "ciresan-mnist-20-60-100-150n": {"layers": "20C4-MP2-60C4-MP2-100C3-MP3-150N", "links": 0.5},
        "ciresan-mnist-six": {"layers": "20C4-40C3-MP2-60C3-80C3-MP2-100C2-120C2-150N", "links": 0.5},
        "ciresan-norb": {"layers": "300C6S1-MP2-500C4-MP4-500N", "processing": "contrast"},
        "ciresan-cifar": {"layers": "300C5-MP2-300C3-MP2-300C3-MP2-300N"},
    },
    small=("ciresan-net-mini", "ciresan-mnist-20-60-150n"),
)


@dataclass(frozen=True)
class Step:
    """One layer: ``kind`` "C" convolution, "MP" max-pooling, "N" fully connected; ``count`` of maps or units; (columns, rows) of ``kernel`` and ``skip``."""

    kind: Literal["C", "MP", "N"]
    count: int
    kernel: tuple[int, int] = (1, 1)
    skip: tuple[int, int] = (0, 0)


def parse(text: str) -> tuple[tuple[int, int, int] | None, list[Step]]:
    """``"1x29x29-20C4-MP2-150N-10N"`` -> the input's (maps, columns, rows), or None where it is not said, and the layers.

    ``20C4``: 20 maps, kernels 4x4; ``20C4x3``: 4 columns, 3 rows; ``20C4S1``: one position in two is skipped each way; ``MP2``; ``150N``.
    """
    words = text.split("-")
    given = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", words[0])
    shape = (int(given[1]), int(given[2]), int(given[3])) if given else None
    steps: list[Step] = []
    for word in words[1:] if given else words:
        conv = re.fullmatch(r"([1-9]\d*)C([1-9]\d*)(?:x([1-9]\d*))?(?:S(\d+)(?:x(\d+))?)?", word)
        pool = re.fullmatch(r"MP([1-9]\d*)", word)
        full = re.fullmatch(r"([1-9]\d*)N", word)
        if conv and (not steps or steps[-1].kind != "N"):
            skip = int(conv[4] or 0), int(conv[5] or conv[4] or 0)
            steps.append(Step("C", int(conv[1]), (int(conv[2]), int(conv[3] or conv[2])), skip))
        elif pool and (not steps or steps[-1].kind != "N"):
            steps.append(Step("MP", 0, (int(pool[1]), int(pool[1]))))
        elif full:
            steps.append(Step("N", int(full[1])))
        else:
            raise Mistake(f"ciresan-net: {text!r}: {word!r} cannot stand there; write 20C4 (maps, kernel), 20C4x3S1 (skip), MP2, and at the end 150N")
    return shape, steps


def side_after(side: int, steps: Sequence[Step], axis: int = 0) -> list[int]:
    """The sides after each conv and pool, ``(in - K) / (S + 1) + 1`` (eq. 1); a Mistake where one is no whole number. ``axis``: 0 columns, 1 rows."""
    found = []
    for i, step in enumerate(s for s in steps if s.kind != "N"):
        stride = step.skip[axis] + 1 if step.kind == "C" else step.kernel[axis]
        if side < step.kernel[axis] or (side - step.kernel[axis]) % stride:
            raise Mistake(
                f"ciresan-net: layer {i + 1} has kernels of {step.kernel[axis]} at a stride of {stride}, which do not divide a side of {side} pixels; "
                "choose others, or another size of image"
            )
        side = (side - step.kernel[axis]) // stride + 1
        found.append(side)
    return found


def fitting(side: int, steps: Sequence[Step], axis: int = 0) -> int:
    """The smallest side of at least ``side`` pixels that all layers divide: going back from each possible last side."""
    for last in range(1, side + 2):
        need = last
        for step in reversed([s for s in steps if s.kind != "N"]):
            stride = step.skip[axis] + 1 if step.kind == "C" else step.kernel[axis]
            need = (need - 1) * stride + step.kernel[axis]
        if need >= side:
            return need
    raise AssertionError("a last side of the image's own is enough")


def table(maps_out: int, maps_in: int, links: float) -> Bool[Tensor, "o i"]:
    """A random table of links: each output map reads ``links`` of the input maps (at least one), drawn from torch's global state."""
    fan_in = max(round(links * maps_in), 1)
    return torch.rand(maps_out, maps_in).argsort(1).argsort(1) < fan_in


def mexican_hat(side: int = 21) -> Float[Tensor, "side side"]:
    """A difference of Gaussians that sums to 0, its positive part to 1: the on-centre filter; less itself, the off-centre one."""
    at = torch.arange(side, dtype=torch.float64) - (side - 1) / 2
    bells = [torch.exp(-(at**2) / (2 * width**2)) for width in (side / 10, 1.6 * side / 10)]
    centre, surround = ((bell / bell.sum())[:, None] * (bell / bell.sum()) for bell in bells)
    hat = centre - surround
    return (hat / hat.clamp_min(0).sum()).float()


@final
class Processing(nn.Module):
    """The image processing layer: the image, and beside it maps of fixed filters that do not learn.

    "contrast": on- and off-centre maps of a :func:`mexican_hat` of 21x21, both rectified; "edges": 3x3 masks, across and down. A flat image gives 0. Three maps
    out for each channel in.
    """

    filters: Tensor

    def __init__(self, kind: Literal["contrast", "edges"], in_chans: int) -> None:
        super().__init__()
        hat = mexican_hat()
        slope = torch.tensor([[-1.0, 0.0, 1.0], [-2.0, 0.0, 2.0], [-1.0, 0.0, 1.0]]) / 8
        filters = torch.stack([hat, -hat] if kind == "contrast" else [slope, slope.T])
        self.kind, self.in_chans = kind, in_chans
        self.register_buffer("filters", filters[:, None].repeat(in_chans, 1, 1, 1))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        margin = self.filters.shape[-1] // 2
        y = F.conv2d(F.pad(x, (margin,) * 4, mode="replicate"), self.filters, groups=self.in_chans)
        return torch.cat([x, y.relu() if self.kind == "contrast" else y], 1)


@final
class PartialConv2d(nn.Conv2d):
    """A convolution in which each output map reads only the input maps of its row in a fixed :func:`table`; other weights are and stay 0."""

    links: Tensor

    def __init__(self, maps_in: int, maps_out: int, kernel: tuple[int, int], stride: tuple[int, int], links: float) -> None:
        super().__init__(maps_in, maps_out, kernel, stride)
        self.register_buffer("links", table(maps_out, maps_in, links)[:, :, None, None])

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return F.conv2d(x, self.weight * self.links, self.bias, self.stride)


def scaled_tanh(a: Tensor) -> Tensor:
    """``1.7159 tanh(0.6666 a)`` (LeCun 1998)."""
    return 1.7159 * torch.tanh(0.6666 * a)


@final
class CiresanNet(Headed):
    """The layers that ``layers`` names (see :func:`parse`; without the input and the output), each followed by :func:`scaled_tanh`, and a linear head.

    ``links`` is the share of input maps that each output map of a convolution reads: 1 all, below 1 by a random table that is fixed when the
    network is made. ``processing`` puts fixed filters before the first layer ("none", "contrast", "edges"). ``img_size``: (rows, columns). All
    weights begin uniform in [-0.05, 0.05].
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        layers: str = "20C4-MP2-60C4-MP2-100C3-MP3-150N",
        links: float = 1.0,
        processing: Literal["none", "contrast", "edges"] = "none",
        img_size: Sequence[int] = (29, 29),
    ) -> None:
        super().__init__()
        shape, steps = parse(layers)
        if shape is not None or not any(step.kind == "C" for step in steps):
            raise Mistake(
                f"ciresan-net: layers={layers!r}: name the hidden layers, at least one convolution among them, and not the input; it comes from the data"
            )
        if not 0 < links <= 1:
            raise Mistake(f"ciresan-net: links={links}: a share of the input maps, above 0 and at most 1 (all)")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.side = fitting(img_size[0], steps, 1), fitting(img_size[1], steps, 0)
        self.processing = Processing(processing, in_chans) if processing != "none" else nn.Identity()
        c_in = in_chans if processing == "none" else 3 * in_chans
        self.maps, self.hidden, step_size, rows = nn.ModuleList(), nn.ModuleList(), 1, []
        for step in (s for s in steps if s.kind != "N"):
            if step.kind == "MP":
                self.maps.append(nn.MaxPool2d(step.kernel[0]))
                step_size *= step.kernel[0]
            else:
                kernel, stride = step.kernel[::-1], (step.skip[1] + 1, step.skip[0] + 1)
                self.maps.append(PartialConv2d(c_in, step.count, kernel, stride, links) if links < 1 else nn.Conv2d(c_in, step.count, kernel, stride))
                c_in, step_size = step.count, step_size * max(stride)
                rows.append((f"maps.{len(self.maps) - 1}", c_in, step_size))
        self.feature_info = maps(*rows)
        units = c_in * math.prod(side_after(side, steps, axis)[-1] for side, axis in zip(self.side, (1, 0), strict=True))
        for step in (s for s in steps if s.kind == "N"):
            self.hidden.append(nn.Linear(units, step.count))
            units = step.count
        self.num_features = units
        self.fc = nn.Linear(units, num_classes)
        with torch.no_grad():
            for p in self.parameters():
                nn.init.uniform_(p, -0.05, 0.05)
            for module in self.maps:
                if isinstance(module, PartialConv2d):
                    module.weight *= module.links

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last maps; an image smaller than ``side`` is padded by its last row and column."""
        down, right = (max(side - have, 0) for side, have in zip(self.side, x.shape[-2:], strict=True))
        x = self.processing(F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x)
        for layer in self.maps:
            x = layer(x) if isinstance(layer, nn.MaxPool2d) else scaled_tanh(layer(x))
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """The last hidden layer's activations, or all maps as one vector where there is none."""
        x = features.flatten(1)
        for layer in self.hidden:
            x = scaled_tanh(layer(x))
        return x


def build_ciresan(text: str, links: float = 1.0, processing: Literal["none", "contrast", "edges"] = "none") -> CiresanNet:
    """The network of a whole line, input and output named: ``build_ciresan("1x29x29-20C4-MP2-40C5-MP3-150N-10N")``. Sides that do not divide are refused."""
    shape, steps = parse(text)
    if shape is None or not steps or steps[-1].kind != "N":
        raise Mistake(f"ciresan-net: {text!r}: begin with the input (1x29x29) and end with the output units (10N)")
    for axis, side in enumerate(shape[1:]):
        side_after(side, steps, axis)
    return CiresanNet(steps[-1].count, shape[0], "-".join(text.split("-")[1:-1]), links, processing, (shape[2], shape[1]))
