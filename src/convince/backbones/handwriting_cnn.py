"""HandwritingCNN: five convolutional layers and one hidden layer for single handwritten characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="handwriting-cnn",
    kind="backbone",
    title="Classification of Non-native Handwritten Characters Using Convolutional Neural Network",
    paper="hiec-handwriting-cnn",
    year=2024,
    url="https://arxiv.org/abs/2406.04511",
    accepts=("image",),
    departs=(
        "five convolutional layers and one hidden layer are the paper's; filters, kernel, dropout and input size are arguments with a usual default, "
        "since the paper is an ablation over them",
        "pools keep the last odd row and column (ceil mode), so that images of any size pass; at 32 pixels this changes nothing",
    ),
    tiny={"channels": (4, 8), "hidden": 8, "dropout": 0.1},
    variants={"handwriting-cnn-bn": {"norm": True}},
    small=("handwriting-cnn",),
)


@final
class HandwritingCNN(Headed):
    """conv - (BN) - ReLU - max-pool for each of ``channels``, flatten, a hidden layer with ReLU and dropout, a linear head.

    ``kernel``: side of the kernels, odd [pixels]; ``pool``: by how much each block shrinks the sides; ``norm``: batch
    normalisation in each block (the convolutions then have no bias); ``img_size``: (rows, columns) of the images, which the
    hidden layer's size follows.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        channels: Sequence[int] = (32, 64, 128, 256, 256),
        hidden: int = 512,
        dropout: float = 0.5,
        kernel: int = 3,
        pool: int = 2,
        norm: bool = False,
        img_size: Sequence[int] = (32, 32),
    ) -> None:
        super().__init__()
        if not channels or hidden < 1:
            raise Mistake(f"handwriting-cnn: channels={tuple(channels)}, hidden={hidden}: at least one block and one hidden unit")
        if kernel < 1 or kernel % 2 == 0:
            raise Mistake(f"handwriting-cnn: kernel={kernel!r} must be an odd number of pixels, such as 3 or 5")
        if pool < 1:
            raise Mistake(f"handwriting-cnn: pool={pool!r} must be at least 1 (no shrinking); 2 halves the sides")
        if not 0 <= dropout < 1:
            raise Mistake(f"handwriting-cnn: dropout={dropout!r} must be a probability from 0 up to but not including 1")
        self.num_classes, self.num_features, self.in_chans, self.size = num_classes, hidden, in_chans, tuple(img_size)
        layers: list[nn.Module] = []
        rows, columns = img_size
        for a, b in zip([in_chans, *channels], channels, strict=False):
            layers += [nn.Conv2d(a, b, kernel, padding=kernel // 2, bias=not norm), *([nn.BatchNorm2d(b)] if norm else [])]
            layers += [nn.ReLU(inplace=True), nn.MaxPool2d(pool, ceil_mode=True)]
            rows, columns = -(-rows // pool), -(-columns // pool)
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Linear(channels[-1] * rows * columns, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.fc = nn.Linear(hidden, num_classes)
        each = 4 if norm else 3
        self.feature_info = maps(*((f"features.{each * i + each - 2}", width, pool**i) for i, width in enumerate(channels)))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        if tuple(x.shape[-2:]) != self.size:
            raise Mistake(
                f"handwriting-cnn: built for images of {self.size[0]}x{self.size[1]} pixels, given {x.shape[-2]}x{x.shape[-1]}; "
                "pass img_size, or bring the images to that size"
            )
        return self.features(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """The hidden layer's activations."""
        return self.hidden(features.flatten(1))
