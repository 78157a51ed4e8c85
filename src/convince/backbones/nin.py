"""Network in network: blocks of one spatial convolution and two 1x1 ones, each with BN and ReLU."""

from __future__ import annotations

from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="nin",
    kind="backbone",
    paper="rotnet",
    title="Unsupervised Representation Learning by Predicting Image Rotations",
    year=2018,
    url="https://arxiv.org/abs/1803.07728",
    departs=("weights are drawn normal with the fan-out law of the released code, in the order of this file",),
    accepts=("image",),
    tiny={"width": 8, "blocks": 2},
    variants={"nin3": {"blocks": 3}, "nin-mini": {"width": 24}},
    small=("nin-mini",),
)


def unit(c_in: int, c_out: int, kernel: int) -> nn.Sequential:
    """Convolution without bias that keeps the size, BN, ReLU."""
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(inplace=True),
    )


@final
class NIN(Headed):
    """The CIFAR network of the rotation paper: ``block1`` to ``block4``, global average pooling, a linear head.

    ``block1`` is 5x5 ``width``, 1x1 ``5/6 width``, 1x1 ``width/2`` and a max-pool 3/2; ``block2`` 5x5 and two 1x1
    and an average-pool 3/2; later blocks 3x3 and two 1x1. With ``width=192`` and 3 x 32 x 32 pixels the blocks give
    96x16x16, 192x8x8, 192x8x8, 192x8x8. Four blocks with four outputs have 1,411,140 parameters.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 192, blocks: int = 4) -> None:
        super().__init__()
        if width < 6 or blocks < 2:
            raise Mistake(f"nin: width={width}, blocks={blocks}: width is at least 6 channels, blocks at least 2")
        self.num_classes, self.num_features, self.in_chans, self.blocks = num_classes, width, in_chans, blocks
        half = width // 2
        self.block1 = nn.Sequential(unit(in_chans, width, 5), unit(width, width * 5 // 6, 1), unit(width * 5 // 6, half, 1), nn.MaxPool2d(3, 2, 1))
        self.block2 = nn.Sequential(unit(half, width, 5), unit(width, width, 1), unit(width, width, 1), nn.AvgPool2d(3, 2, 1))
        for i in range(3, blocks + 1):
            setattr(self, f"block{i}", nn.Sequential(unit(width, width, 3), unit(width, width, 1), unit(width, width, 1)))
        self.fc = nn.Linear(width, num_classes)
        self.feature_info = maps(("block1", half, 2), *((f"block{i}", width, 4) for i in range(2, blocks + 1)))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last block's map."""
        for i in range(1, self.blocks + 1):
            x = getattr(self, f"block{i}")(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """Pooled features."""
        return features.mean((2, 3))
