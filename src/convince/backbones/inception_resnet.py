"""Inception-v4 and Inception-ResNet: parallel convolutions of several sizes, without and with residual links whose branch is scaled down."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="inception-resnet",
    kind="backbone",
    paper="inception-resnet",
    title="Inception-v4, Inception-ResNet and the Impact of Residual Connections on Learning",
    year=2016,
    url="https://arxiv.org/abs/1602.07261",
    accepts=("image",),
    departs=(
        "the paper prints 1154 and 2048 as widths of Inception-ResNet-v2, to which its own joins of 1152 and 2144 channels cannot be added: ours are the joins",
        "the scales 0.17, 0.10 and 0.20 are those of the released weights; the paper says between 0.1 and 0.3",
        "in the figures of Inception-v4 a stride and a turn of 1x7 are misprinted; ours follow from the sizes of the maps, and v4 itself is timm's network",
        "inception-resnet-v2-slim is the network of the released weights (another stem, trunk and depth), which timm calls inception_resnet_v2",
        "the mini sizes are ours: a stem of one 3x3 convolution, one block a stage, about an eighth of the widths, 5 for 7, and no image is cut at its edges",
    ),
    tiny={"small": True, "width": 0.03},
    variants={
        "inception-mini": {"net": "v4", "small": True, "width": 0.115},
        "inception-resnet-mini": {"net": "v2", "small": True, "width": 0.125},
        "inception-v4": {"net": "v4"},
        "inception-resnet-v1": {"net": "v1"},
        "inception-resnet-v2": {"net": "v2"},
        "inception-resnet-v2-slim": {"net": "slim"},
    },
    small=("inception-mini", "inception-resnet-mini"),
    published={
        "inception-v4": {"size": 299, "classes": 1000, "parameters": 42679816, "macs": 12.25e9},
        "inception-resnet": {"size": 299, "classes": 1000, "macs": 12.25e9, "why": "as inception-resnet-v2, which it is"},
        "inception-resnet-v1": {"size": 299, "classes": 1000, "macs": 5.7e9, "why": "the paper says only that it costs about as much as Inception-v3"},
        "inception-resnet-v2": {"size": 299, "classes": 1000, "macs": 12.25e9, "why": "the paper says 'as Inception-v4'; its own figures add up to 9.26 G"},
        "inception-resnet-v2-slim": {"size": 299, "classes": 1000, "parameters": 55843464, "macs": 13.16e9},
    },
)


@dataclass(frozen=True)
class Plan:
    """A network as the figures have it: the stem, the blocks of the three grids and how many, and the two reductions between."""

    stem: tuple[str, ...]
    a: str
    reduce_a: str
    b: str
    reduce_b: str
    c: str
    blocks: tuple[int, int, int]
    residual: bool = True


STEM = (  # figure 3
    "3x3/2V 32 - 3x3V 32 - 3x3 64",
    "max/2V | 3x3/2V 96",
    "1x1 64 - 3x3V 96 | 1x1 64 - 7x1 64 - 1x7 64 - 3x3V 96",
    "3x3/2V 192 | max/2V",
)
PLANS = {
    "v4": Plan(
        STEM,
        a="avg - 1x1 96 | 1x1 96 | 1x1 64 - 3x3 96 | 1x1 64 - 3x3 96 - 3x3 96",
        reduce_a="max/2V | 3x3/2V 384 | 1x1 192 - 3x3 224 - 3x3/2V 256",
        b="avg - 1x1 128 | 1x1 384 | 1x1 192 - 1x7 224 - 7x1 256 | 1x1 192 - 1x7 192 - 7x1 224 - 1x7 224 - 7x1 256",
        reduce_b="max/2V | 1x1 192 - 3x3/2V 192 | 1x1 256 - 1x7 256 - 7x1 320 - 3x3/2V 320",
        c="avg - 1x1 256 | 1x1 256 | 1x1 384 - {1x3 256, 3x1 256} | 1x1 384 - 1x3 448 - 3x1 512 - {3x1 256, 1x3 256}",
        blocks=(4, 7, 3),
        residual=False,
    ),
    "v1": Plan(
        ("3x3/2V 32 - 3x3V 32 - 3x3 64 - max/2V - 1x1 80 - 3x3V 192 - 3x3/2V 256",),
        a="1x1 32 | 1x1 32 - 3x3 32 | 1x1 32 - 3x3 32 - 3x3 32",
        reduce_a="max/2V | 3x3/2V 384 | 1x1 192 - 3x3 192 - 3x3/2V 256",
        b="1x1 128 | 1x1 128 - 1x7 128 - 7x1 128",
        reduce_b="max/2V | 1x1 256 - 3x3/2V 384 | 1x1 256 - 3x3/2V 256 | 1x1 256 - 3x3 256 - 3x3/2V 256",
        c="1x1 192 | 1x1 192 - 1x3 192 - 3x1 192",
        blocks=(5, 10, 5),
    ),
    "v2": Plan(
        STEM,
        a="1x1 32 | 1x1 32 - 3x3 32 | 1x1 32 - 3x3 48 - 3x3 64",
        reduce_a="max/2V | 3x3/2V 384 | 1x1 256 - 3x3 256 - 3x3/2V 384",
        b="1x1 192 | 1x1 128 - 1x7 160 - 7x1 192",
        reduce_b="max/2V | 1x1 256 - 3x3/2V 384 | 1x1 256 - 3x3/2V 288 | 1x1 256 - 3x3 288 - 3x3/2V 320",
        c="1x1 192 | 1x1 192 - 1x3 224 - 3x1 256",
        blocks=(5, 10, 5),
    ),
}
"""Kernel (rows x columns), ``/2`` for a stride of 2, ``V`` where the paper marks a layer as not padded, channels; layers apart by ``-``, branches by ``|``."""


@final
class Mixed(nn.Module):
    """Parallel branches, joined along the channels, as a line of :data:`PLANS` writes them; every convolution is followed by BN (eps 0.001) and ReLU.

    ``width`` multiplies all channels, to at least 1. ``{1x3 256, 3x1 256}`` is a fork at the end of a branch.
    """

    def __init__(self, c_in: int, table: str, width: float = 1.0) -> None:
        super().__init__()
        self.branches, self.channels = nn.ModuleList(), 0
        for branch in table.split(" | "):
            layers, c = nn.Sequential(), c_in
            for word in branch.split(" - "):
                if word.startswith("{"):
                    fork = Mixed(c, word.strip("{}").replace(", ", " | "), width)
                    layers, c = layers.append(fork), fork.channels
                elif word == "avg":
                    layers.append(nn.AvgPool2d(3, 1, 1, count_include_pad=False))
                elif word.startswith("max"):
                    layers.append(nn.MaxPool2d(3, 2, 0 if "V" in word else 1))
                else:
                    kernel, stride, valid, channels = read(word)
                    before, c = c, max(round(channels * width), 1)
                    layers.append(nn.Conv2d(before, c, kernel, stride, (0, 0) if valid else (kernel[0] // 2, kernel[1] // 2), bias=False))
                    layers.extend([nn.BatchNorm2d(c, eps=1e-3), nn.ReLU(inplace=True)])
            self.branches.append(layers)
            self.channels += c

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return torch.cat([branch(x) for branch in self.branches], 1)


def read(word: str) -> tuple[tuple[int, int], int, bool, int]:
    """The kernel, the stride, whether it is not padded, and the channels of a convolution: ``3x3/2V 96`` is ((3, 3), 2, True, 96)."""
    found = re.fullmatch(r"(\d)x(\d)(/2)?(V)? (\d+)", word)
    assert found is not None, word
    return (int(found[1]), int(found[2])), 2 if found[3] else 1, found[4] is not None, int(found[5])


@final
class Residual(nn.Module):
    """``relu(x + scale * conv1x1(mixed(x)))``: the last convolution has a bias, no BN and no activation (section 3.2, 3.3)."""

    def __init__(self, channels: int, table: str, scale: float, width: float = 1.0) -> None:
        super().__init__()
        self.scale = scale
        self.mixed = Mixed(channels, table, width)
        self.linear = nn.Conv2d(self.mixed.channels, channels, 1)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return torch.relu(x + self.scale * self.linear(self.mixed(x)))


@final
class Inception(Headed):
    """A stem, blocks A, a reduction, blocks B, a reduction, blocks C, the mean over positions, dropout, a linear head.

    Arguments as in :func:`inception_resnet`.
    """

    def __init__(self, num_classes: int, in_chans: int, plan: Plan, small: bool, width: float, branch: float, scales: Sequence[float], dropout: float) -> None:
        super().__init__()
        self.num_classes, self.in_chans, self.small = num_classes, in_chans, small
        blocks = (1, 1, 1) if small else plan.blocks
        self.stem, c, rows = nn.Sequential(), in_chans, []
        for line in ("3x3 32",) if small else plan.stem:
            self.stem.append(stem := Mixed(c, line, 1.0 if small else width))
            c = stem.channels
        for i, (table, reduction) in enumerate(((plan.a, ""), (plan.b, plan.reduce_a), (plan.c, plan.reduce_b))):
            if small:
                table, reduction = (text.replace("7", "5").replace("V", "") for text in (table, reduction))
            stage = nn.Sequential()
            if reduction:
                stage.append(joined := Mixed(c, reduction, width))
                c = joined.channels
            for _ in range(blocks[i]):
                if plan.residual:
                    stage.append(Residual(c, table, scales[i], width * branch))
                else:
                    stage.append(joined := Mixed(c, table, width))
                    c = joined.channels
            setattr(self, "abc"[i], stage)
            rows.append(("abc"[i], c, (1 if small else 8) * 2**i))
        self.feature_info, self.num_features = maps(*rows), c
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        if not self.small:
            refuse_small(x.shape[-2:])
        x = self.stem(x)
        for name in "abc":
            x = getattr(self, name)(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions; in training mode with dropout."""
        return self.dropout(features.mean((2, 3)))


def refuse_small(size: Sequence[int]) -> None:
    """A Mistake for an image that the layers without padding would shrink to nothing."""
    if min(size) < 75:
        raise Mistake(
            f"inception-resnet: without padding both sides must be at least 75 pixels (the paper has 299); the image has {size[0]}x{size[1]}. "
            "Give larger images (--size 75), or choose --model inception-resnet-mini"
        )


def inception_resnet(
    num_classes: int = 10,
    in_chans: int = 3,
    net: str = "v2",
    small: bool = False,
    width: float = 1.0,
    branch: float = 1.0,
    scales: Sequence[float] = (0.17, 0.10, 0.20),
    dropout: float = 0.2,
    img_size: Sequence[int] | None = None,
) -> nn.Module:
    """Inception-ResNet-v1 or -v2, or timm's: Inception-v4 (``net`` "v4"), and the Inception-ResNet-v2 of the released weights ("slim").

    ``small``: one block a stage and a stem that keeps the side, for images of about 28 to 64 pixels ("v4" is then our own). ``width`` multiplies the
    channels, ``branch`` those of residual branches once more; ``scales`` are what the branches of the blocks A, B and C are multiplied by.
    """
    if net not in (*PLANS, "slim"):
        raise Mistake(f"inception-resnet: net={net!r} must be one of {', '.join(PLANS)}, slim")
    if width <= 0 or branch <= 0 or len(scales) != 3:
        raise Mistake(f"inception-resnet: width={width}, branch={branch}, scales={tuple(scales)}: two factors above 0, and a scale for A, B and C each")
    if img_size is not None and not small:
        refuse_small(img_size)
    if net in ("v1", "v2") or (net == "v4" and small):
        return Inception(num_classes, in_chans, PLANS[net], small, width, branch, scales, dropout)
    if small or width != 1 or branch != 1 or tuple(scales) != (0.17, 0.10, 0.20):
        raise Mistake(f"inception-resnet: net={net!r} is timm's network, which has no small, width, branch or scales; choose net=v1 or net=v2")
    import timm.models

    made = timm.models.InceptionV4 if net == "v4" else timm.models.InceptionResnetV2
    return made(num_classes, in_chans, drop_rate=dropout)
