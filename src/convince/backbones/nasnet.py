"""NASNet: one small cell, found by search and written as a line of text, stacked into networks for small and large images."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="nasnet",
    kind="backbone",
    paper="nasnet",
    title="Learning Transferable Architectures for Scalable Image Recognition",
    year=2018,
    url="https://arxiv.org/abs/1707.07012",
    accepts=("image",),
    departs=(
        "there is no auxiliary head, whose loss the paper adds with weight 0.4; the published counts leave it out as well",
        "a 1x7-7x1 or 1x3-3x1 operation is ReLU-conv-BN twice, and a dilated convolution is full, at rate 2; the paper says neither",
        "three sizes that the authors never released are built as their names say, and come to 9 to 18 % more parameters than are printed",
        "a state that is joined by concatenation is twice as wide; where a cell hands it on, a 1x1 convolution brings it back",
    ),
    tiny={"cells": 1, "filters": 2},
    variants={
        "nasnet-mini": {"cells": 1, "filters": 12},
        "nasnet-a-cifar": {"cells": 6, "filters": 32},
        "nasnet-a-cifar-large": {"cells": 7, "filters": 96},
        "nasnet-a-mobile": {"cells": 4, "filters": 44, "stem": "photo", "stem_channels": 32, "dropout": 0.5},
        "nasnet-a-1538": {"cells": 5, "filters": 64, "stem": "photo", "dropout": 0.5},
        "nasnet-a-1920": {"cells": 7, "filters": 80, "stem": "photo", "dropout": 0.5},
        "nasnet-a-large": {"cells": 6, "filters": 168, "stem": "photo", "skip": True, "dropout": 0.5},
    },
    small=("nasnet-mini",),
    published={
        "nasnet-a-cifar": {"size": 32, "classes": 10, "parameters": 3.3e6, "why": "3,346,538 are printed as 3.3 M"},
        "nasnet-a-cifar-large": {
            "size": 32,
            "classes": 10,
            "parameters": 27.6e6,
            "why": "the authors released no such size; this is 7 cells of 2304/24 filters",
        },
        "nasnet-a-mobile": {"size": 224, "classes": 1000, "parameters": 5.3e6, "macs": 0.564e9},
        "nasnet-a-1538": {"size": 299, "classes": 1000, "parameters": 10.9e6, "macs": 2.35e9, "why": "never released; this is 5 cells of 1538/24 filters"},
        "nasnet-a-1920": {"size": 299, "classes": 1000, "parameters": 22.6e6, "macs": 4.93e9, "why": "never released; this is 7 cells of 1920/24 filters"},
        "nasnet-a-large": {"size": 331, "classes": 1000, "parameters": 88753150, "macs": 23.8e9},
    },
)

NORMAL_A = "sep5(0)+sep3(1) sep5(1)+sep3(1) avg3(0)+identity(1) avg3(1)+avg3(1) sep3(0)+identity(0) -> 1 2 3 4 5 6"
REDUCTION_A = "sep5(0)+sep7(1) max3(0)+sep7(1) avg3(0)+sep5(1) avg3(2)+identity(3) sep3(2)+max3(0) -> 3 4 5 6"


Make = Callable[[int, int, int, float], list[nn.Module]]  # channels in, channels out, stride, eps of BN


# -- operations ------------------------------------------------------------------------------------


@final
class Same(nn.Module):
    """Zeros around an image so that a window of ``reach`` rows and columns in steps of 2 halves the sides, rounded up; an odd number of them has one more
    at the end."""

    def __init__(self, reach: tuple[int, int]) -> None:
        super().__init__()
        self.reach = reach

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c i j"]:
        rows, columns = (max(side - 2 + length % 2, 0) for side, length in zip(self.reach, x.shape[-2:], strict=True))
        return F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


@final
class Pool(nn.Module):
    """The largest ("max") or mean ("avg") pixel of each window, at the places of :class:`Same`; what lies outside does not count."""

    def __init__(self, kind: str, side: int, stride: int) -> None:
        super().__init__()
        self.kind, self.side, self.stride = kind, side, stride

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c i j"]:
        pad = [self.side // 2 - (self.stride == 2 and length % 2 == 0) for length in x.shape[-2:]]
        if self.kind == "max":
            return F.max_pool2d(x, self.side, self.stride, pad, ceil_mode=True)
        return F.avg_pool2d(x, self.side, self.stride, pad, ceil_mode=True, count_include_pad=False)


@final
class Halve(nn.Module):
    """Factorised reduction: 1x1 convolutions of the even and of the odd pixels, side by side, then BN; half the side, rounded up."""

    def __init__(self, c_in: int, c_out: int, eps: float) -> None:
        super().__init__()
        self.even = nn.Conv2d(c_in, c_out - c_out // 2, 1, bias=False)
        self.odd = nn.Conv2d(c_in, c_out // 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(c_out, eps)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        h, w = x.shape[-2:]
        if h % 2 or w % 2:
            x = F.pad(x, (0, w % 2, 0, h % 2))
        return self.bn(torch.cat([self.even(x[..., ::2, ::2]), self.odd(x[..., 1::2, 1::2])], 1))


def conv(c_in: int, c_out: int, kernel: tuple[int, int], stride: int = 1, dilation: int = 1, groups: int = 1) -> list[nn.Module]:
    """A convolution that keeps the sides, or with a stride of 2 halves them."""
    rows, columns = (dilation * (side - 1) + 1 for side in kernel)
    around = [Same((rows, columns))] if stride == 2 and max(rows, columns) > 1 else []
    pad = (0, 0) if around else (rows // 2, columns // 2)
    return [*around, nn.Conv2d(c_in, c_out, kernel, stride, pad, dilation, groups, bias=False)]


def conv_bn(c_in: int, c_out: int, eps: float, kernel: tuple[int, int] = (1, 1), stride: int = 1, dilation: int = 1) -> list[nn.Module]:
    """The same with a BN behind it."""
    return [*conv(c_in, c_out, kernel, stride, dilation), nn.BatchNorm2d(c_out, eps)]


def separable(side: int) -> Make:
    """A depthwise convolution, a 1x1 convolution and BN, twice; the stride in the first, a ReLU between."""

    def make(c_in: int, c_out: int, stride: int, eps: float) -> list[nn.Module]:
        first = [*conv(c_in, c_in, (side, side), stride, groups=c_in), *conv_bn(c_in, c_out, eps)]
        return [*first, nn.ReLU(inplace=True), *conv(c_out, c_out, (side, side), groups=c_out), *conv_bn(c_out, c_out, eps)]

    return make


def crossed(side: int) -> Make:
    """1 x ``side``, BN, ReLU, ``side`` x 1, BN; the stride in the first."""

    def make(c_in: int, c_out: int, stride: int, eps: float) -> list[nn.Module]:
        return [*conv_bn(c_in, c_out, eps, (1, side), stride), nn.ReLU(inplace=True), *conv_bn(c_out, c_out, eps, (side, 1))]

    return make


def pooled(kind: str, side: int) -> Make:
    """A pooling; where it is given another width than the cell's, a 1x1 convolution and BN behind it."""
    return lambda c_in, c_out, stride, eps: [Pool(kind, side, stride), *(conv_bn(c_in, c_out, eps) if c_in != c_out else [])]


def square(side: int, dilation: int = 1) -> Make:
    """A convolution of ``side`` x ``side`` and BN."""
    return lambda c_in, c_out, stride, eps: conv_bn(c_in, c_out, eps, (side, side), stride, dilation)


def identity(c_in: int, c_out: int, stride: int, eps: float) -> list[nn.Module]:
    """Nothing; where the side or the width changes, a 1x1 convolution and BN."""
    return conv_bn(c_in, c_out, eps, stride=stride) if stride > 1 or c_in != c_out else []


OPS: dict[str, Make] = {
    "identity": identity,
    "conv1x3": crossed(3),
    "conv1x7": crossed(7),
    "avg3": pooled("avg", 3),
    "max3": pooled("max", 3),
    "max5": pooled("max", 5),
    "max7": pooled("max", 7),
    "conv1": square(1),
    "conv3": square(3),
    "dil3": square(3, dilation=2),
    "sep3": separable(3),
    "sep5": separable(5),
    "sep7": separable(7),
}
"""The paper's 13 operations (section 3.1), each behind a ReLU unless it pools or copies."""


# -- genotypes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """``left(state i) + right(state j)``; ``joined`` "+" adds them, "|" sets their channels side by side."""

    left: str
    i: int
    joined: str
    right: str
    j: int

    def __str__(self) -> str:
        return f"{self.left}({self.i}){self.joined}{self.right}({self.j})"


@dataclass(frozen=True)
class Genotype:
    """The blocks of a cell, and the states that it hands on: 0 is the cell before (h_i), 1 the one before that (h_i-1), 2 the first block."""

    blocks: tuple[Block, ...]
    out: tuple[int, ...]


def unread(blocks: Sequence[Block]) -> tuple[int, ...]:
    """The states that no block reads, which a cell hands on."""
    return tuple(sorted(set(range(len(blocks) + 2)) - {state for block in blocks for state in (block.i, block.j)}))


def genotype(text: str) -> Genotype:
    """Read ``"sep5(0)+sep3(1) avg3(0)|identity(2)"``: a word a block, ``operation(state)`` twice, joined by + or |.

    ``-> 3 4`` at the end names the states that the cell hands on; without it those that no block reads. Raises Mistake.
    """
    body, arrow, end = text.partition("->")
    blocks: list[Block] = []
    for word in body.split():
        found = re.fullmatch(r"(\w+)\((\d+)\)([+|])(\w+)\((\d+)\)", word)
        if found is None:
            raise Mistake(f"nasnet: {word!r} is no block; write two operations and the states they read, such as sep5(0)+avg3(1)")
        left, i, joined, right, j = found.groups()
        for op in (left, right):
            if op not in OPS:
                raise Mistake(f"nasnet: {word!r}: no operation {op!r}{nearest(op, list(OPS))} Operations: {', '.join(OPS)}")
        if max(int(i), int(j)) > len(blocks) + 1:
            raise Mistake(f"nasnet: {word!r}: block {len(blocks) + 1} reads the states 0 to {len(blocks) + 1}; a later one is not made yet")
        blocks.append(Block(left, int(i), joined, right, int(j)))
    if not blocks:
        raise Mistake(f"nasnet: the cell {text!r} has no block; write at least one, such as sep5(0)+avg3(1)")
    out = unread(blocks)
    if arrow:
        if not re.fullmatch(r"[\d ]+", end) or not set(named := [int(state) for state in end.split()]) <= set(range(len(blocks) + 2)):
            raise Mistake(f"nasnet: '->{end}': name the states that the cell hands on, of 0 to {len(blocks) + 1}, such as -> 3 4")
        if lost := set(out) - set(named):
            raise Mistake(f"nasnet: '->{end}': the state {min(lost)} is read by no block and not handed on either; hand it on, or leave the arrow out")
        out = tuple(sorted(set(named)))
    return Genotype(tuple(blocks), out)


def drop_path(x: Float[Tensor, "n c h w"], p: float) -> Float[Tensor, "n c h w"]:
    """Each row set to 0 with probability ``p``, the others divided by ``1 - p``. Draws from torch's global state, which the loop seeds at each step."""
    keep = torch.rand(len(x), 1, 1, 1, device=x.device) >= p
    return x * (keep / (1 - p)).to(x.dtype)


# -- the network -----------------------------------------------------------------------------------


@final
class Cell(nn.Module):
    """A genotype at ``filters`` channels a state. ``halve``: the second input is twice as large; ``first``: it is taken as it is.

    Its inputs are rectified, and so is its output, since all that reads it begins with a ReLU; the raw stem of a first cell is not.
    ``drop_path`` is the probability that the result of an operation, identities apart, is dropped for a row in training.
    """

    def __init__(self, text: str, c_in: int, c_before: int, filters: int, stride: int, halve: bool, first: bool, eps: float) -> None:
        super().__init__()
        self.genotype, self.first, self.drop_path = genotype(text), first, 0.0
        self.here = nn.Sequential(*conv_bn(c_in, filters, eps))
        self.before = nn.Identity() if first else Halve(c_before, filters, eps) if halve else nn.Sequential(*conv_bn(c_before, filters, eps))
        widths, self.ops = [filters, c_before if first else filters], nn.ModuleList()
        for block in self.genotype.blocks:
            for op, state in ((block.left, block.i), (block.right, block.j)):
                self.ops.append(nn.Sequential(*OPS[op](widths[state], filters, stride if state < 2 else 1, eps)))
            widths.append(filters if block.joined == "+" else 2 * filters)
        self.fit = nn.ModuleDict()
        for state in self.genotype.out:
            if stride == 2 and state < 2:
                self.fit[str(state)] = Halve(widths[state], filters, eps)
            elif widths[state] != filters:
                self.fit[str(state)] = nn.Sequential(*conv_bn(widths[state], filters, eps))
        self.channels = filters * len(self.genotype.out)

    def forward(self, x: Float[Tensor, "n c h w"], before: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e k l"]:
        states, rectified = [self.here(x), self.before(before)], {}
        ops = iter(self.ops)
        for block in self.genotype.blocks:
            pair = []
            for op, state in ((block.left, block.i), (block.right, block.j)):
                layers: nn.Sequential = next(ops)  # type: ignore[assignment]
                y = states[state]
                if len(layers) and not isinstance(layers[0], Pool):
                    if state not in rectified:  # once for all that read it
                        rectified[state] = F.relu(y)
                    y = rectified[state]
                y = layers(y)
                pair.append(drop_path(y, self.drop_path) if self.drop_path > 0 and self.training and op != "identity" else y)
            states.append(pair[0] + pair[1] if block.joined == "+" else torch.cat(pair, 1))
        kept = [self.fit[str(state)](states[state]) if str(state) in self.fit else states[state] for state in self.genotype.out]
        return torch.cat(kept, 1).relu_()


@final
class NASNet(Headed):
    """A stem, then ``cells`` normal cells, a reduction cell, normal, reduction, normal; ReLU, mean over positions, a linear head.

    ``normal`` and ``reduction`` are read by :func:`genotype`; ``filters`` double in each reduction cell. ``stem`` "small" is a 3x3
    convolution for images up to about 64 px, "photo" one of stride 2 and two reduction cells of a quarter and half the filters before the first
    normal cell; ``stem_channels`` 0 is three times the filters, or 96. ``skip``: the cell behind a reduction reads beside it what
    the reduction cell read as its second input. ``dropout`` of the vector before the head.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        normal: str = NORMAL_A,
        reduction: str = REDUCTION_A,
        cells: int = 6,
        filters: int = 32,
        stem: str = "small",
        stem_channels: int = 0,
        skip: bool = False,
        dropout: float = 0.0,
        img_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        photo = stem == "photo"
        least = 8 if photo else 2
        if cells < 1 or filters < least or stem_channels < 0:
            raise Mistake(f"nasnet: cells={cells}, filters={filters}, stem_channels={stem_channels}: at least 1 cell a stage and {least} filters ({stem} stem)")
        if stem not in ("small", "photo"):
            raise Mistake(f"nasnet: stem={stem!r} must be 'small' (up to about 64 px) or 'photo'")
        self.num_classes, self.in_chans, self.least = num_classes, in_chans, 3 if photo else 1
        if img_size is not None:
            self._check(*img_size)
        width, eps = stem_channels or (96 if photo else 3 * filters), 1e-3 if photo else 1e-5
        self.stem = nn.Sequential(nn.Conv2d(in_chans, width, 3, 2 if photo else 1, 0 if photo else 1, bias=False), nn.BatchNorm2d(width, eps))
        stages = [[(normal, filters * 2**i, 1)] * cells for i in range(3)]
        for i, stage in enumerate(stages[1:], 1):
            stage.insert(0, (reduction, filters * 2**i, 2))
        ahead = [(reduction, filters // 4, 2), (reduction, filters // 2, 2)] if photo else []
        made, self.back = [(width, 2 if photo else 1)], []  # channels and step [pixels] of all outputs; which output is a cell's second input
        self.cells = nn.ModuleList()
        for text, f, stride in [*ahead, *stages[0], *stages[1], *stages[2]]:
            at = len(self.cells)
            behind = skip and at > len(ahead) and made[-1][1] > made[-2][1]
            self.back.append(0 if at == 0 else 3 if behind else 2)
            (c_in, step), (c_before, before) = made[-1], made[-max(self.back[-1], 1)]
            cell = Cell(text, c_in, c_before, f, stride, before < step, at == 0, eps)
            self.cells.append(cell)
            made.append((cell.channels, step * stride))
        ends = [i for i in range(1, len(made)) if i + 1 == len(made) or made[i + 1][1] > made[i][1]]
        self.feature_info = maps(*([("stem", *made[0])] if photo else []), *((f"cells.{i - 1}", *made[i]) for i in ends))
        self.num_features = made[-1][0]
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out" if module.groups == 1 else "fan_in", nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last cell's output, rectified."""
        self._check(*x.shape[-2:])
        raw = self.stem(x)
        outs = [F.relu(raw)]
        for cell, back in zip(self.cells, self.back, strict=True):
            outs = [*outs[-2:], cell(outs[-1], outs[-back] if back else raw)]
        return outs[-1]

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return self.drop(features.mean((2, 3)))

    def _check(self, h: int, w: int) -> None:
        if min(h, w) < self.least:
            raise Mistake(f"nasnet: the photo stem's shorter side must be at least {self.least} pixels; it has {h}x{w}. Use stem=small")
