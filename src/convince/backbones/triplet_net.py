"""Triplet net: four unpadded convolutions to one 128-number embedding of a 32-pixel image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="triplet-net",
    kind="backbone",
    paper="triplet-network",
    title="Deep metric learning using Triplet network",
    year=2014,
    url="https://arxiv.org/abs/1412.6622",
    accepts=("image",),
    tiny={"widths": (4, 4, 8, 8)},
    departs=(
        "images smaller than 32 pixels are padded by the first convolution up to 32; of larger ones the last map is averaged",
        "a linear head stands after the embedding, so that the net can also classify; the part triplet-network leaves it idle",
    ),
    small=("triplet-net",),
)


@final
class TripletNet(Headed):
    """conv5 - ReLU - pool - dropout, (conv3 - ReLU - pool - dropout) x 2, conv2 - ReLU; ``widths`` channels.

    505,088 parameters without the head for colour images; sides 32-28-14-12-6-4-2-1. Dropout is 0.25.
    ``img_size`` is (rows, columns) in pixels. ``last_relu=False`` leaves the embedding signed, as the
    paper's text suggests; the release keeps the ReLU.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: tuple[int, int] = (32, 32),
        widths: Sequence[int] = (64, 128, 256, 128),
        last_relu: bool = True,
    ) -> None:
        super().__init__()
        if len(widths) != 4:
            raise Mistake(f"widths={tuple(widths)}: must be four numbers of channels, one a convolution; the paper's are (64, 128, 256, 128)")
        pad = max(0, -(-(32 - min(img_size)) // 2))
        a, b, c, d = widths
        layers: list[nn.Module] = [nn.Conv2d(in_chans, a, 5, padding=pad), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
        layers += [nn.Conv2d(a, b, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
        layers += [nn.Conv2d(b, c, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout(0.25)]
        layers += [nn.Conv2d(c, d, 2), nn.ReLU() if last_relu else nn.Identity()]
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, d
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(d, num_classes) if num_classes else nn.Identity()
        self.feature_info = maps(("features.1", a, 1), ("features.5", b, 2), ("features.9", c, 4), ("features.13", d, 8))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map; 1 x 1 for 32 pixels."""
        return self.features(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """The embedding."""
        return features.mean((2, 3))
