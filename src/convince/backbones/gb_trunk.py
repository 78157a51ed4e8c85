"""GB trunk: three blocks of two convolutions with batch statistics and dropout, flattened, and a linear head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="gb-trunk",
    kind="backbone",
    paper="gb-cnn",
    title="A Gradient Boosting Approach for Training Convolutional and Deep Neural Networks",
    year=2023,
    url="https://arxiv.org/abs/2302.11327",
    accepts=("image",),
    tiny={"widths": (4, 4, 8)},
    departs=(
        "batch statistics move by 0.1 with epsilon 1e-5, PyTorch's habit; Keras moves them by 0.01 with 1e-3",
        "alone it ends in one linear layer; the part gb-cnn puts the paper's dense layers in its place",
    ),
    small=("gb-trunk",),
)


@final
class GbTrunk(Headed):
    """(conv3x3 - ReLU - BN) x 2 - max-pool 2 - dropout, for each of ``widths``; then the map is flattened.

    288,224 parameters without the head for 28x28x1 (batch statistics counted) and 1,152 flat features.
    Dropout is 0.2, 0.3, 0.4 ... by block. ``img_size`` is (rows, columns) in pixels, each side at least
    ``2 ** len(widths)``; the flat features depend on it.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, img_size: tuple[int, int] = (28, 28), widths: Sequence[int] = (32, 64, 128)) -> None:
        super().__init__()
        sides = [side >> len(widths) for side in img_size]
        if min(sides) < 1:
            raise Mistake(f"gb-trunk: {img_size[0]}x{img_size[1]} pixels are too few for {len(widths)} poolings; use --size {2 ** len(widths)} or more")
        layers: list[nn.Module] = []
        for i, (a, b) in enumerate(zip([in_chans, *widths], widths, strict=False)):
            layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(b), nn.Conv2d(b, b, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(b)]
            layers += [nn.MaxPool2d(2), nn.Dropout(0.2 + 0.1 * i)]
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu")  # He's, uniform
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, widths[-1] * sides[0] * sides[1]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(self.num_features, num_classes)
        self.feature_info = maps(*((f"features.{8 * i + 5}", width, 2**i) for i, width in enumerate(widths)))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        return self.features(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """The flat features."""
        return features.flatten(1)
