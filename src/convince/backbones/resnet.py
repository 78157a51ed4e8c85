"""ResNet of basic blocks: the small CIFAR nets (resnet20 ...) and the photograph nets (resnet18 ...)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

from jaxtyping import Float
from torch import Tensor, nn

from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="resnet",
    kind="backbone",
    title="Deep Residual Learning for Image Recognition",
    year=2015,
    url="https://arxiv.org/abs/1512.03385",
    departs=("the CIFAR nets change width by a 1x1 projection (option B); the paper pads with zeros (option A)",),
    accepts=("image",),
    tiny={"layers": (1, 1), "widths": (4, 8)},
    variants={
        "resnet8": {"layers": (1, 1, 1)},
        "resnet20": {"layers": (3, 3, 3)},
        "resnet32": {"layers": (5, 5, 5)},
        "resnet56": {"layers": (9, 9, 9)},
        "resnet110": {"layers": (18, 18, 18)},
        "resnet10": {"layers": (1, 1, 1, 1), "widths": (64, 128, 256, 512), "stem": "photo"},
        "resnet18": {"layers": (2, 2, 2, 2), "widths": (64, 128, 256, 512), "stem": "photo"},
        "resnet34": {"layers": (3, 4, 6, 3), "widths": (64, 128, 256, 512), "stem": "photo"},
        "resnet18-slim": {"layers": (2, 2, 2, 2), "widths": (32, 64, 128, 256), "stem": "photo"},
    },
    small=("resnet8", "resnet20"),
)


@final
class Block(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN, plus the input (projected where the shape changes), ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.act1, self.act2 = nn.ReLU(inplace=True), nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or c_in != c_out:
            self.downsample = nn.Sequential(nn.Conv2d(c_in, c_out, 1, stride, bias=False), nn.BatchNorm2d(c_out))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.downsample(x))


@final
class ResNet(Headed):
    """Stages of basic blocks, global average pooling, a linear head. Parameter names are torchvision's.

    ``stem`` "small" is one 3x3 conv for images up to about 64 px; "photo" is 7x7 stride 2 and a
    max-pool. ``layers`` are blocks a stage, ``widths`` their channels; each stage after the first halves the side.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        layers: Sequence[int] = (3, 3, 3),
        widths: Sequence[int] = (16, 32, 64),
        stem: Literal["small", "photo"] = "small",
    ) -> None:
        super().__init__()
        photo = stem == "photo"
        self.num_classes, self.num_features, self.in_chans = num_classes, widths[-1], in_chans
        self.conv1 = nn.Conv2d(in_chans, widths[0], 7 if photo else 3, 2 if photo else 1, 3 if photo else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1) if photo else nn.Identity()
        c_in = widths[0]
        self.stages = len(layers)
        for i, (count, c_out) in enumerate(zip(layers, widths, strict=True)):
            blocks = [Block(c_in if j == 0 else c_out, c_out, 2 if j == 0 and i else 1) for j in range(count)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = c_out
        self.fc = nn.Linear(c_in, num_classes)
        first = 4 if photo else 1
        self.feature_info = maps(*((f"layer{i + 1}", width, first * 2**i) for i, width in enumerate(widths)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """Pooled features."""
        return features.mean((2, 3))
