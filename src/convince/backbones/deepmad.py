"""DeepMAD: a plain residual network whose widths and depths were worked out from an entropy formula, built from its specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="deepmad",
    kind="backbone",
    paper="deepmad",
    title="DeepMAD: Mathematical Architecture Design for Deep Convolutional Neural Network",
    year=2023,
    url="https://arxiv.org/abs/2303.02165",
    accepts=("image",),
    departs=(
        "a shortcut has a 1x1 convolution only where the channels change, which gives the published size of DeepMAD-R18;"
        " the released code has one at the start of every bottleneck stage",
        "in an image of an odd side the 2x2 mean of a shortcut takes the last row and column as they are; the released code takes only even sides",
        "weights are drawn by He's rule for rectified networks, and no dropout or drop-path is in the network",
        "deepmad-mini is no network of the paper: it is what deepmad-search finds for 20 M multiply-adds, 0.3 M parameters, 10 classes and colour images of 32"
        " pixels",
    ),
    tiny={"stem": 4, "stem_stride": 1, "stages": ((1, 4, 8, 3, 1), (2, 4, 8, 3, 2))},
    variants={
        "deepmad-mini": {"stem": 48, "stem_stride": 1, "stages": ((1, 8, 48, 5, 1), (1, 8, 64, 5, 2), (8, 24, 240, 5, 2))},
        "deepmad-r18": {},
        "deepmad-r34": {"stem": 24, "stages": ((1, 24, 128, 5, 2), (10, 48, 512, 5, 2), (13, 88, 896, 5, 2), (11, 104, 1024, 5, 1), (14, 128, 616, 5, 2))},
        "deepmad-r50": {"stem": 32, "stages": ((1, 40, 128, 5, 2), (11, 48, 512, 5, 2), (12, 88, 872, 5, 2), (13, 104, 1024, 5, 1), (15, 120, 1232, 5, 2))},
        "deepmad-29m-224": {
            "stem": 40,
            "stages": ((2, 240, 40, 5, 1), (4, 512, 85, 5, 2), (6, 800, 134, 5, 2), (6, 1208, 201, 5, 2), (5, 1872, 312, 5, 2)),
            "block": "depthwise",
            "head": 1792,
        },
        "deepmad-29m-288": {
            "stem": 40,
            "stages": ((4, 368, 61, 5, 2), (4, 576, 96, 5, 2), (5, 872, 145, 5, 2), (6, 1304, 217, 5, 1), (4, 1968, 328, 5, 2)),
            "block": "depthwise",
            "head": 1792,
        },
        "deepmad-50m": {
            "stem": 48,
            "stages": ((7, 672, 112, 5, 2), (9, 1008, 168, 5, 2), (7, 1512, 252, 5, 2), (3, 2272, 378, 5, 2), (1, 3456, 576, 3, 1)),
            "block": "depthwise",
            "head": 2048,
        },
        "deepmad-89m": {
            "stem": 56,
            "stages": ((10, 816, 136, 5, 2), (9, 1224, 204, 5, 2), (7, 1952, 326, 5, 2), (4, 2944, 490, 5, 2), (1, 4464, 744, 3, 1)),
            "block": "depthwise",
            "head": 2560,
        },
    },
    small=("deepmad-mini",),
    published={
        "deepmad-r18": {
            "size": 224,
            "classes": 1000,
            "parameters": 11.69e6,
            "macs": 1.82e9,
            "why": "it seems to count normalisation and activations too: with two and one a value ours come to within 1.1 %",
        },
        "deepmad-r34": {
            "size": 224,
            "classes": 1000,
            "parameters": 21.80e6,
            "macs": 3.68e9,
            "why": "it seems to count normalisation and activations too: with two and one a value ours come to within 1.1 %",
        },
        "deepmad-r50": {
            "size": 224,
            "classes": 1000,
            "parameters": 25.55e6,
            "macs": 4.13e9,
            "why": "it seems to count normalisation and activations too: with two and one a value ours come to within 1.1 %",
        },
        "deepmad-29m-224": {
            "size": 224,
            "classes": 1000,
            "parameters": 29e6,
            "macs": 4.5e9,
            "why": "rounded, and they seem to count normalisation and activations too: with two and one a value ours come to within 1.1 %",
        },
        "deepmad-29m-288": {
            "size": 288,
            "classes": 1000,
            "parameters": 29e6,
            "macs": 4.5e9,
            "why": "rounded, and they seem to count normalisation and activations too: with two and one a value ours come to within 1.1 %",
        },
        "deepmad-50m": {
            "size": 224,
            "classes": 1000,
            "parameters": 50e6,
            "macs": 8.7e9,
            "why": "rounded, and they seem to count normalisation and activations too: with two and one a value ours come to within 1.1 %",
        },
        "deepmad-89m": {
            "size": 224,
            "classes": 1000,
            "parameters": 89e6,
            "macs": 15.4e9,
            "why": "rounded, and they seem to count normalisation and activations too: with two and one a value ours come to within 1.1 %",
        },
    },
)
BLOCKS = ("bottleneck", "depthwise")


class Stage(NamedTuple):
    """Residual blocks of one form, the first of them with the stride: a row of a specification."""

    blocks: int
    bottleneck: int
    out: int
    kernel: int
    stride: int


def conv_bn(c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """A convolution without bias, and batch normalisation."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(c_out))


def squeezed(channels: int) -> int:
    """Hidden channels of the gates: a quarter, rounded down to a multiple of 8, and at least 8."""
    return max(1, round(channels / 4) // 8) * 8


@final
class Gate(nn.Module):
    """Squeeze-and-excitation as in the released code: both 1x1 convolutions have batch normalisation, SiLU between them, a sigmoid at the end."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.reduce = conv_bn(channels, squeezed(channels))
        self.expand = conv_bn(squeezed(channels), channels)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x * self.expand(F.silu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


@final
class Block(nn.Module):
    """1x1, k x k, 1x1 and a shortcut; with ``depthwise`` the middle one is depthwise and gated, and the activation SiLU for ReLU.

    The shortcut is the input, 2x2 means where the side halves, and a 1x1 convolution where the channels change; there a depthwise
    block has none. The last activation comes after the sum.
    """

    def __init__(self, c_in: int, stage: Stage, stride: int, depthwise: bool) -> None:
        super().__init__()
        b = stage.bottleneck
        act = nn.SiLU if depthwise else nn.ReLU
        self.act = act(inplace=True)
        self.stride = stride
        self.branch = nn.Sequential(
            conv_bn(c_in, b),
            act(inplace=True),
            conv_bn(b, b, stage.kernel, stride, b if depthwise else 1),
            act(inplace=True),
            *([Gate(b)] if depthwise else []),
            conv_bn(b, stage.out),
        )
        self.shortcut: nn.Module | None = nn.Identity()
        if c_in != stage.out:
            self.shortcut = None if depthwise else conv_bn(c_in, stage.out)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        out = self.branch(x)
        if self.shortcut is not None:
            if self.stride > 1:
                x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
            out = out + self.shortcut(x)
        return self.act(out)


@final
class Deepmad(Headed):
    """3x3 stem, stages of :class:`Block`, where ``head`` is given a 1x1 convolution to so many channels, mean over positions, a linear layer.

    ``stages``: rows of (blocks, bottleneck channels, channels out, kernel, stride); ``block`` "bottleneck" or "depthwise". The defaults
    are DeepMAD-R18. A Mistake names a row that no network can have.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        stem: int = 32,
        stages: Sequence[Sequence[int]] = ((1, 40, 96, 5, 2), (6, 40, 384, 5, 2), (9, 64, 384, 5, 2), (10, 104, 1024, 3, 1), (12, 104, 672, 5, 2)),
        stem_stride: int = 2,
        block: str = "bottleneck",
        head: int = 0,
    ) -> None:
        super().__init__()
        if block not in BLOCKS:
            raise Mistake(f"deepmad: block={block!r}: must be {' or '.join(BLOCKS)}")
        rows = [checked(row) for row in stages]
        if not rows or stem < 1 or stem_stride not in (1, 2) or head < 0:
            raise Mistake(f"deepmad: stem={stem}, stem_stride={stem_stride}, head={head}, {len(rows)} stages: needs a stem, a stride of 1 or 2, and a stage")
        self.num_classes, self.in_chans, self.stages = num_classes, in_chans, len(rows)
        self.stem = nn.Sequential(*conv_bn(in_chans, stem, 3, stem_stride), nn.ReLU(inplace=True))
        c_in, step, found = stem, stem_stride, []
        for i, stage in enumerate(rows, 1):
            blocks: list[nn.Module] = []
            for j in range(stage.blocks):
                blocks.append(Block(c_in, stage, stage.stride if j == 0 else 1, block == "depthwise"))
                c_in = stage.out
            step *= stage.stride
            setattr(self, f"stage{i}", nn.Sequential(*blocks))
            found.append((f"stage{i}", c_in, step))
        self.feature_info = maps(*found)
        self.head = nn.Sequential(*conv_bn(c_in, head), nn.ReLU(inplace=True)) if head else nn.Identity()
        self.num_features = head or c_in
        self.fc = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        x = self.stem(x)
        for i in range(1, self.stages + 1):
            x = getattr(self, f"stage{i}")(x)
        return self.head(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))


def checked(row: Sequence[int]) -> Stage:
    """A row of ``stages`` by name; a Mistake where it is not five whole numbers, an odd kernel and a stride of 1 or 2."""
    if len(row) != 5 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in row) or row[3] % 2 == 0 or row[4] not in (1, 2):
        raise Mistake(f"deepmad: the stage {tuple(row)}: must be (blocks, bottleneck, out, odd kernel, stride of 1 or 2), whole numbers from 1")
    return Stage(*row)
