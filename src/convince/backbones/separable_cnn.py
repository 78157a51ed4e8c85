"""SeparableCNN: pointwise and depthwise convolutions in turn, small and cheap, and hard to quantise per tensor."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="separable-cnn",
    kind="backbone",
    paper="quantization-whitepaper",
    title="Depthwise-separable convolutional network",
    year=2018,
    url="https://arxiv.org/abs/1806.08342",
    departs=(
        "a small stand-in for MobileNet: five blocks for images of about 32 pixels, ReLU in place of ReLU6",
        "a block is pointwise then depthwise, so that what rescales a channel stays inside one block; MobileNet has depthwise first",
    ),
    accepts=("image",),
    tiny={"stem": 4, "widths": (8, 8), "strides": (2, 1)},
    small=("separable-cnn",),
)


@final
class SeparableCNN(Headed):
    """conv3x3-BN-ReLU of ``stem`` channels; blocks conv1x1-BN-ReLU - depthwise 3x3-BN-ReLU; average pooling, a linear head.

    ``widths`` are the channels of the blocks, ``strides`` those of their depthwise convolutions.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        stem: int = 32,
        widths: Sequence[int] = (64, 64, 128, 128, 128),
        strides: Sequence[int] = (2, 1, 2, 1, 1),
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, widths[-1], in_chans
        self.stem = nn.Sequential(nn.Conv2d(in_chans, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU(inplace=True))
        blocks: list[nn.Module] = []
        for a, b, stride in zip([stem, *widths], widths, strides, strict=False):
            pointwise = [nn.Conv2d(a, b, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
            depthwise = [nn.Conv2d(b, b, 3, stride, 1, groups=b, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True)]
            blocks.append(nn.Sequential(*pointwise, *depthwise))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(widths[-1], num_classes)
        steps = itertools.accumulate(strides, operator.mul)
        self.feature_info = maps(*((f"blocks.{i}", width, step) for i, (width, step) in enumerate(zip(widths, steps, strict=True))))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        return self.blocks(self.stem(x))

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """Pooled features."""
        return features.mean((2, 3))
