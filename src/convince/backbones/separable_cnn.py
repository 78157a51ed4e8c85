"""SeparableCNN: pointwise and depthwise convolutions in turn, small and cheap, and hard to quantise per tensor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

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
)


@final
class SeparableCNN(nn.Module):
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

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        return self.blocks(self.stem(x))

    def forward_head(self, x: Float[Tensor, "n d i j"], pre_logits: bool = False) -> Tensor:
        """Pooled features [n d], or the scores [n k]."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for ``num_classes``; 0 makes the network answer with pooled features."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()  # type: ignore[assignment]
