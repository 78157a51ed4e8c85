"""MobileNetV2: residual blocks that are thin at both ends and wide inside, with depthwise convolutions and no non-linearity on the thin ends."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="mobilenetv2",
    kind="backbone",
    paper="mobilenetv2",
    title="MobileNetV2: Inverted Residuals and Linear Bottlenecks",
    year=2018,
    url="https://arxiv.org/abs/1801.04381",
    accepts=("image",),
    departs=(
        "widths are rounded to multiples of 8 as in the authors' code, so size 140 has 6.1 million parameters; the paper prints 6.9",
        "stem='small' keeps the side in the stem and in the stage of 24 channels, for images of about 32 pixels; the paper has photographs alone",
        "shortcut='wide' is our reading of the paper's Fig. 6b: each shortcut is carried to the expansion that follows, before its depthwise filter",
        "the object detector SSDLite and the mobile DeepLabv3 are not built here; feature_info names the maps that they start from",
        "the paper's training recipe is not part of the network: RMSProp of 0.045 times 0.98 an epoch, weight decay 4e-5",
    ),
    tiny={"stem": "small", "blocks": ((6, 4, 1, 1), (6, 6, 2, 2)), "first": 4, "last": 8},
    variants={
        "mobilenetv2-mini": {"stem": "small", "blocks": ((6, 16, 1, 1), (6, 24, 2, 2), (6, 32, 2, 2)), "first": 16, "last": 128, "dropout": 0.0},
        "mobilenetv2-32px": {"stem": "small"},
        "mobilenetv2-050": {"width": 0.5},
        "mobilenetv2-075": {"width": 0.75},
        "mobilenetv2-100": {},
        "mobilenetv2-140": {"width": 1.4},
    },
    small=("mobilenetv2-mini", "mobilenetv2-32px"),
    published={
        "mobilenetv2": {"size": 224, "classes": 1000, "parameters": 3504872, "macs": 300.8e6},
        "mobilenetv2-050": {"size": 224, "classes": 1000, "parameters": 1968680, "macs": 97.1e6},
        "mobilenetv2-075": {"size": 224, "classes": 1000, "parameters": 2636424, "macs": 209.1e6},
        "mobilenetv2-100": {"size": 224, "classes": 1000, "parameters": 3504872, "macs": 300.8e6},
        "mobilenetv2-140": {"size": 224, "classes": 1000, "parameters": 6108776, "macs": 582.2e6},
    },
)
TABLE = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
"""Expansion t, channels c, number of blocks n, stride s of the first (Table 2)."""
IN_TIMM = {0.35: "mobilenetv2_035", 0.5: "mobilenetv2_050", 0.75: "mobilenetv2_075", 1.0: "mobilenetv2_100", 1.4: "mobilenetv2_140"}


def scaled(channels: int, width: float) -> int:
    """``width`` times the channels, to the nearest multiple of 8, never below 90 % of the exact value; at width 1 as they are."""
    if width == 1:
        return channels
    near = max(8, int(channels * width + 4) // 8 * 8)
    return near + 8 if near < 0.9 * channels * width else near


def conv_bn(c_in: int, c_out: int, kernel: int, stride: int = 1, groups: int = 1, relu: bool = True) -> nn.Sequential:
    """A convolution without bias, BN, and ReLU6 or nothing."""
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), *([nn.ReLU6(inplace=True)] if relu else []))


@final
class InvertedResidual(nn.Module):
    """1x1 to ``t`` times the channels, depthwise 3x3, 1x1 to ``c_out`` (Table 1), plus the input where stride and channels allow (``has_skip``).

    BN after each; ReLU6 after the first two, and after the third (before the sum) where ``linear`` is false. ``t=1`` has no first 1x1.
    """

    def __init__(self, c_in: int, c_out: int, stride: int = 1, t: int = 6, linear: bool = True, skip: bool = True) -> None:
        super().__init__()
        self.c_in, self.c_out, self.stride, self.wide = c_in, c_out, stride, t * c_in
        self.has_skip = skip and stride == 1 and c_in == c_out
        self.expand: nn.Module = conv_bn(c_in, self.wide, 1) if t > 1 else nn.Identity()
        self.filter = conv_bn(self.wide, self.wide, 3, stride, groups=self.wide)
        self.project = conv_bn(self.wide, c_out, 1, relu=not linear)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        y = self.project(self.filter(self.expand(x)))
        return x + y if self.has_skip else y


@final
class WideShortcuts(nn.Sequential):
    """Inverted residuals in a row whose shortcuts join wide maps: where a block keeps its shape, its expanded map is added to the next block's."""

    def forward(self, input: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        carried = None
        for block in self:
            assert isinstance(block, InvertedResidual)
            wide = block.expand(input)
            if carried is not None and carried.shape[1] == block.wide:
                wide = wide + carried
            input = block.project(block.filter(wide))
            carried = wide if block.stride == 1 and block.c_in == block.c_out else None
        return input


def memory_estimate(block: InvertedResidual, size: tuple[int, int], t_split: int = 1) -> int:
    """Values in memory at once when a block is evaluated in ``t_split`` groups of its expanded channels (section 5.1).

    Input, output, and the larger of the expanded maps divided by ``t_split``; ``size`` are the input's rows and columns.
    """
    if t_split < 1 or block.wide % t_split:
        raise Mistake(f"memory_estimate: t_split={t_split} does not divide the {block.wide} expanded channels of the block")
    before = size[0] * size[1]
    after = math.ceil(size[0] / block.stride) * math.ceil(size[1] / block.stride)
    return block.c_in * before + block.c_out * after + block.wide // t_split * max(before, after)


@final
class Inverted(Headed):
    """A 3x3 stem, :class:`InvertedResidual` by the rows of a table, a 1x1 convolution, mean over positions, dropout, a linear head.

    Arguments as in :func:`mobilenetv2`; ``stride`` is the stem's.
    """

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        blocks: Sequence[Sequence[int]],
        width: float,
        stride: int,
        first: int,
        last: int,
        linear: bool,
        shortcut: Literal["thin", "wide", "off"],
        dropout: float,
    ) -> None:
        super().__init__()
        self.num_classes, self.in_chans = num_classes, in_chans
        c, step, rows = scaled(first, width), stride, []
        self.stem = conv_bn(in_chans, c, 3, stride)
        made: list[InvertedResidual] = []
        for t, channels, count, s in blocks:
            for j in range(count):
                made.append(InvertedResidual(c, scaled(channels, width), 1 if j else s, t, linear, shortcut == "thin"))
                c = made[-1].c_out
            step *= s
            rows.append((f"blocks.{len(made) - 1}" + (".project" if shortcut == "wide" else ""), c, step))
        self.blocks = WideShortcuts(*made) if shortcut == "wide" else nn.Sequential(*made)
        self.feature_info = maps(*rows)
        self.num_features = scaled(last, max(width, 1.0))
        self.head = conv_bn(c, self.num_features, 1)
        self.drop = nn.Dropout(dropout)
        self.fc = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.weight[0, 0].numel() * module.out_channels // module.groups  # torch's own law leaves out the groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map, behind the 1x1 convolution."""
        return self.head(self.blocks(self.stem(x)))

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions, in training mode with dropout."""
        return self.drop(features.mean((2, 3)))


def mobilenetv2(
    num_classes: int = 10,
    in_chans: int = 3,
    width: float = 1.0,
    stem: Literal["photo", "small"] = "photo",
    blocks: Sequence[Sequence[int]] | None = None,
    first: int = 32,
    last: int = 1280,
    t: int | None = None,
    linear: bool = True,
    shortcut: Literal["thin", "wide", "off"] = "thin",
    dropout: float = 0.2,
) -> nn.Module:
    """timm's network where it has the published one at this ``width``, else :class:`Inverted`.

    ``width`` scales all channels (:func:`scaled`), ``last`` only above 1. ``stem="small"`` has stride 1 in the stem and in the stage of 24
    channels. ``blocks``: rows of (expansion, channels, blocks, stride) in place of :data:`TABLE`; ``first`` and ``last``: channels of the
    stem and of the last 1x1. The paper's ablations: ``t`` sets all expansions, ``linear=false`` puts ReLU6 on the thin ends, ``shortcut``
    joins "thin" ends, "wide" maps (:class:`WideShortcuts`) or nothing ("off").
    """
    if not width > 0 or stem not in ("photo", "small") or shortcut not in ("thin", "wide", "off"):
        raise Mistake(f"mobilenetv2: width={width}, stem={stem!r}, shortcut={shortcut!r}: width > 0; stem photo or small; shortcut thin, wide or off")
    if (stem, blocks, first, last, t, linear, shortcut) == ("photo", None, 32, 1280, None, True, "thin") and width in IN_TIMM:
        import timm

        return timm.create_model(IN_TIMM[width], num_classes=num_classes, in_chans=in_chans, drop_rate=dropout)
    table = [list(row) for row in blocks or TABLE]
    if any(len(row) != 4 or min(row) < 1 for row in table) or (t is not None and t < 1):
        raise Mistake(f"mobilenetv2: blocks={blocks}, t={t}: each row is (expansion, channels, blocks, stride), and every number is at least 1")
    if stem == "small" and blocks is None:
        table[1][3] = 1
    rows = [(t or row[0], *row[1:]) for row in table]
    return Inverted(num_classes, in_chans, rows, width, 1 if stem == "small" else 2, first, last, linear, shortcut, dropout)
