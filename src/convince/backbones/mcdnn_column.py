"""McdnnColumn: the small digit network of multi-column networks, two convolutions and one hidden layer with scaled tanh."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="mcdnn-column",
    kind="backbone",
    paper="mcdnn",
    title="Multi-column Deep Neural Networks for Image Classification",
    year=2012,
    url="https://arxiv.org/abs/1202.2745",
    accepts=("image",),
    departs=("images smaller than 29 pixels are padded to 29 by their last row and column; larger ones make the hidden layer larger",),
    tiny={"channels": (4, 6), "hidden": 8},
    small=("mcdnn-column",),
)
SIDE = 29


def scaled_tanh(a: Tensor) -> Tensor:
    """``1.7159 tanh(0.6666 a)`` (section 2)."""
    return 1.7159 * torch.tanh(0.6666 * a)


@final
class McdnnColumn(Headed):
    """conv 4x4 - max-pool 2 - conv 5x5 - max-pool 3 - hidden layer - linear head, weights uniform in [-0.05, 0.05].

    Winner-take-all is the max-pool: only the winners get gradients. ``img_size``: (rows, columns), which the hidden layer follows.
    """

    def __init__(
        self, num_classes: int = 10, in_chans: int = 1, channels: Sequence[int] = (20, 40), hidden: int = 150, img_size: Sequence[int] = (SIDE, SIDE)
    ) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, hidden, in_chans
        rows, columns = (((max(side, SIDE) - 3) // 2 - 4) // 3 for side in img_size)
        self.conv1 = nn.Conv2d(in_chans, channels[0], 4)
        self.conv2 = nn.Conv2d(channels[0], channels[1], 5)
        self.hidden = nn.Linear(channels[1] * rows * columns, hidden)
        self.fc = nn.Linear(hidden, num_classes)
        self.feature_info = maps(("conv1", channels[0], 1), ("conv2", channels[1], 2))
        for p in self.parameters():
            nn.init.uniform_(p, -0.05, 0.05)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        down, right = (max(SIDE - side, 0) for side in x.shape[-2:])
        x = F.pad(x, (0, right, 0, down), mode="replicate") if down or right else x
        x = scaled_tanh(F.max_pool2d(self.conv1(x), 2))
        return scaled_tanh(F.max_pool2d(self.conv2(x), 3))

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """The hidden layer's activations."""
        return scaled_tanh(self.hidden(features.flatten(1)))
