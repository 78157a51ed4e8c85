"""SmallCNN: a few conv - BN - ReLU - pool blocks, a quick baseline for images of about 28 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="small-cnn",
    kind="backbone",
    title="Three-block convolutional network",
    accepts=("image",),
    tiny={"widths": (4, 8)},
    small=("small-cnn",),
)


@final
class SmallCNN(Headed):
    """conv3x3 - BN - ReLU - 2x2 max-pool for each of ``widths``, global average pooling, a linear head.

    The image's shorter side must be at least ``2 ** len(widths)`` pixels.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, widths[-1], in_chans
        self.side = 2 ** len(widths)
        layers: list[nn.Module] = []
        for a, b in zip([in_chans, *widths], widths, strict=False):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], num_classes)
        self.feature_info = maps(*((f"features.{4 * i + 2}", width, 2**i) for i, width in enumerate(widths)))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map. Raises Mistake where the image cannot be halved so often."""
        if min(x.shape[-2:]) < self.side:
            raise Mistake(
                f"small-cnn: {x.shape[-2]}x{x.shape[-1]} pixels cannot be halved {len(self.feature_info)} times; use --size {self.side} or fewer widths"
            )
        return self.features(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """Pooled features."""
        return features.mean((2, 3))
