"""Lane net: lanes of several resolutions beside each other, joined after every column; each block and each join may be left out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.backbones.mobilenetv2 import InvertedResidual, conv_bn
from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="lane-net",
    kind="backbone",
    paper="fbnetv5",
    title="FBNetV5: Neural Architecture Search for Multiple Tasks in One Run",
    year=2021,
    url="https://arxiv.org/abs/2111.10007",
    accepts=("image",),
    departs=(
        "the layout of lanes is ours, and small; no code was released, and the paper's networks grow out of a trained FBNetV3",
        "blocks are inverted residuals with ReLU6 and without squeeze-and-excitation; FBNetV3's have that and hard swish",
        "the stem fills the first lane, and joins fill the others; a lane that no join has reached is empty",
        "the classifier reads the mean of every lane that is not empty, each behind a 1x1 convolution",
    ),
    tiny={"widths": (4, 6), "blocks": ("11", "01"), "fusions": ("10", "01"), "expansion": 2},
    variants={
        "lane-net-largest": {},
        "lane-net-chain": {"blocks": ("1000", "0100", "0011"), "fusions": ("100000", "000100", "000000", "000000")},
        "lane-net-mini": {"blocks": ("1100", "0110", "0011"), "fusions": ("100000", "000100", "000001", "100100")},
        "lane-net-photo": {
            "widths": (16, 24, 40, 112, 184),
            "blocks": ("11000", "01110", "00111", "00011", "00001"),
            "fusions": ("10000000000000000000", "00000100000000000000", "00000000001000000000", "00000000000000010000", "00000100001000010000"),
            "expansion": 4,
            "stride": 2,
        },
    },
    small=("lane-net-mini", "lane-net-largest", "lane-net-chain"),
)


def pairs(lanes: int) -> list[tuple[int, int]]:
    """The joins after a column, from a lane to another, in their order: of three lanes 0>1, 0>2, 1>0, 1>2, 2>0, 2>1."""
    return [(i, j) for i in range(lanes) for j in range(lanes) if i != j]


@final
@dataclass(frozen=True)
class Topology:
    """Which blocks and joins are there (1) and which not (0).

    ``blocks`` has a string for each lane, the finest first, with a digit for each column; ``fusions`` a string for each column with a digit for
    each of :func:`pairs`. Raises Mistake.
    """

    blocks: tuple[str, ...]
    fusions: tuple[str, ...]

    def __post_init__(self) -> None:
        lanes = len(self.blocks)
        columns = len(self.blocks[0]) if lanes else 0
        if not columns or any(len(row) != columns for row in self.blocks) or len(self.fusions) != columns:
            raise Mistake(
                f"lane-net: blocks={self.blocks}, fusions={self.fusions}: a string a lane, all of one length, and as many fusions as a string has digits"
            )
        if any(len(row) != lanes * (lanes - 1) for row in self.fusions):
            raise Mistake(f"lane-net: fusions={self.fusions}: {lanes} lanes have {lanes * (lanes - 1)} joins a column, a digit each: {told(pairs(lanes))}")
        if not set("".join((*self.blocks, *self.fusions))) <= {"0", "1"}:
            raise Mistake(f"lane-net: blocks={self.blocks}, fusions={self.fusions}: every digit is 1 (there) or 0 (not)")

    @property
    def columns(self) -> int:
        """Columns of blocks, each followed by joins."""
        return len(self.fusions)

    def filled(self) -> list[set[int]]:
        """The lanes that are not empty in each column, and after the last: the first, and those that a join has reached."""
        found = [{0}]
        for row in self.fusions:
            here = found[-1]
            found.append(here | {j for (i, j), on in zip(pairs(len(self.blocks)), row, strict=True) if on == "1" and i in here})
        return found

    def cells(self) -> list[tuple[int, int]]:
        """Lane and column of every block that has something to read."""
        return [(i, c) for c, here in enumerate(self.filled()[:-1]) for i in sorted(here) if self.blocks[i][c] == "1"]

    def joins(self) -> list[tuple[int, int, int]]:
        """Column, source and target of every join that has something to carry."""
        filled = self.filled()
        return [
            (c, i, j) for c, row in enumerate(self.fusions) for (i, j), on in zip(pairs(len(self.blocks)), row, strict=True) if on == "1" and i in filled[c]
        ]

    def pruned(self) -> Topology:
        """The same network, with 0 for whatever would read an empty lane."""
        cells, joins, lanes = set(self.cells()), set(self.joins()), len(self.blocks)
        blocks = ("".join("01"[(i, c) in cells] for c in range(self.columns)) for i in range(lanes))
        return Topology(tuple(blocks), tuple("".join("01"[(c, i, j) in joins] for i, j in pairs(lanes)) for c in range(self.columns)))


def whole(lanes: int, columns: int) -> Topology:
    """Every block and every join."""
    return Topology(("1" * columns,) * lanes, ("1" * (lanes * (lanes - 1)),) * columns)


def told(edges: Sequence[tuple[int, int]]) -> str:
    """Joins in words: ``0>1, 1>0``."""
    return ", ".join(f"{i}>{j}" for i, j in edges)


def macs(topology: Topology, widths: Sequence[int], expansion: int, size: Sequence[int], classes: int, in_chans: int, stride: int = 1) -> int:
    """Multiply-adds for an image of ``size`` rows and columns; a join is counted at the coarser of its two lanes."""
    sides = [math.ceil(side / stride) for side in size]
    area = [math.prod(math.ceil(side / 2**i) for side in sides) for i in range(len(widths))]
    total = 9 * in_chans * widths[0] * area[0]
    for i, _ in topology.cells():
        total += expansion * widths[i] * (2 * widths[i] + 9) * area[i] if expansion > 1 else widths[i] * (widths[i] + 9) * area[i]
    for _, i, j in topology.joins():
        total += widths[i] * widths[j] * area[max(i, j)]
    for i in topology.filled()[-1]:
        total += expansion * widths[i] * (widths[i] * area[i] + classes)
    return total


def coarser(x: Float[Tensor, "n c h w"], steps: int) -> Float[Tensor, "n c i j"]:
    """Means over squares of ``2**steps`` pixels; at the far edges over what there is."""
    return F.avg_pool2d(x, 2**steps, ceil_mode=True) if steps else x


@final
class Join(nn.Module):
    """A map as another lane has it: a 1x1 convolution with BN, behind the mean of squares of pixels, or before each pixel is repeated."""

    def __init__(self, c_in: int, c_out: int, down: int) -> None:
        super().__init__()
        self.down = down
        self.conv = conv_bn(c_in, c_out, 1, relu=False)

    def forward(self, x: Float[Tensor, "n c h w"], size: tuple[int, int]) -> Float[Tensor, "n d i j"]:
        if self.down > 0:
            return self.conv(coarser(x, self.down))
        return F.interpolate(self.conv(x), size=size, mode="nearest")


@final
class LaneNet(Headed):
    """A 3x3 stem into the first of some lanes, each of half the side of the one before; columns of inverted residuals and of joins between lanes.

    ``widths`` are the channels of the lanes, ``blocks`` and ``fusions`` a :class:`Topology`, ``expansion`` how much wider a block is inside, ``stride``
    the stem's. A block that is left out hands its input on. For a while ``now`` may name a topology within that one, which is then
    computed with the same weights, zeros standing for lanes that it leaves empty. Raises Mistake.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: Sequence[int] = (16, 24, 40),
        blocks: Sequence[str] = ("1111", "1111", "1111"),
        fusions: Sequence[str] = ("111111", "111111", "111111", "111111"),
        expansion: int = 3,
        stride: int = 1,
    ) -> None:
        super().__init__()
        self.topology = checked(widths, blocks, fusions, expansion, stride)
        self.now: Topology | None = None
        self.num_classes, self.in_chans, self.widths, self.expansion = num_classes, in_chans, tuple(widths), expansion
        self.stem = conv_bn(in_chans, widths[0], 3, stride)
        self.cells = nn.ModuleDict({f"{i}_{c}": InvertedResidual(widths[i], widths[i], 1, expansion) for i, c in self.topology.cells()})
        self.joins = nn.ModuleDict({f"{c}_{i}_{j}": Join(widths[i], widths[j], j - i) for c, i, j in self.topology.joins()})
        self.read = sorted(self.topology.filled()[-1])
        self.ends = nn.ModuleDict({str(i): conv_bn(widths[i], expansion * widths[i], 1) for i in self.read})
        self.num_features = sum(expansion * widths[i] for i in self.read)
        self.feature_info = maps(*((f"ends.{i}", expansion * widths[i], stride * 2**i) for i in self.read))
        self.fc = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def lanes(self, x: Float[Tensor, "n c h w"]) -> dict[int, Tensor]:
        """The map of every lane that is not empty after the last column, behind its 1x1 convolution."""
        topology = self.now or self.topology
        cells, joins = set(topology.cells()), topology.joins()
        here = {0: self.stem(x)}
        rows, columns = here[0].shape[-2:]
        sizes = [(math.ceil(rows / 2**i), math.ceil(columns / 2**i)) for i in range(len(self.widths))]
        for c in range(topology.columns):
            here = {i: self.cells[f"{i}_{c}"](lane) if (i, c) in cells else lane for i, lane in here.items()}
            after = dict(here)
            for at, i, j in joins:
                if at == c:
                    carried = self.joins[f"{c}_{i}_{j}"](here[i], sizes[j])
                    after[j] = after[j] + carried if j in after else carried
            here = after
        return {i: self.ends[str(i)](lane) for i, lane in here.items()}

    def beside(self, lanes: dict[int, Tensor]) -> Float[Tensor, "n d i j"]:
        """All lanes as coarse as the last one, side by side; zeros for those that ``now`` leaves empty."""
        coarse = {i: coarser(lane, self.read[-1] - i) for i, lane in lanes.items()}
        n, _, rows, columns = coarse[0].shape
        return torch.cat([coarse[i] if i in coarse else coarse[0].new_zeros(n, self.expansion * self.widths[i], rows, columns) for i in self.read], 1)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """All lanes as coarse as the last one, side by side."""
        return self.beside(self.lanes(x))

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))


def checked(widths: Sequence[int], blocks: Sequence[str], fusions: Sequence[str], expansion: int, stride: int) -> Topology:
    """The topology, or a Mistake that names the setting."""
    if isinstance(blocks, str) or isinstance(fusions, str) or not all(isinstance(row, str) for row in (*blocks, *fusions)):
        raise Mistake(f"lane-net: blocks={blocks!r}, fusions={fusions!r}: lists of strings of 0 and 1, written blocks=['11','01']")
    if len(widths) != len(blocks) or min(*widths, expansion, stride) < 1:
        raise Mistake(f"lane-net: widths={tuple(widths)}, expansion={expansion}, stride={stride}: a width for each of {len(blocks)} lanes, and all at least 1")
    return Topology(tuple(blocks), tuple(fusions))
