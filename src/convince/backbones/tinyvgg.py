"""TinyVGG: the small network that CNN Explainer opens up, four convolutions of ten channels and one linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="tinyvgg",
    kind="backbone",
    paper="cnn-explainer",
    title="CNN Explainer: Learning Convolutional Neural Networks with Interactive Visualization",
    year=2020,
    url="https://arxiv.org/abs/2004.15004",
    accepts=("image",),
    departs=("the paper's network takes 64 pixels and three channels; size and channels are arguments here",),
    tiny={"width": 4, "padding": 1},
    variants={"tinyvgg-mini": {"width": 16, "padding": 1}},
    small=("tinyvgg-mini",),
    published={"tinyvgg": {"size": 64, "classes": 10, "parameters": 19_920, "macs": 5_610_000}},
    optimizer="adamw:lr=0.002,weight_decay=0.05",
)


@final
class Tinyvgg(Headed):
    """(conv3x3 - ReLU - conv3x3 - ReLU - 2x2 max-pool) twice, flattened, and a linear layer: 19,920 weights at 64x64x3 and ten classes.

    ``img_size`` (rows, columns) fixes the linear layer. The paper's convolutions are not padded (``padding=0``), so that images need 16 pixels a side;
    every step is a module of its own, so that :func:`convince.explain.cnn_explainer.trace` sees each.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 10, padding: int = 0, img_size: Sequence[int] = (64, 64)) -> None:
        super().__init__()
        if width < 1 or padding not in (0, 1):
            raise Mistake(f"tinyvgg: width={width} must be at least 1, padding={padding} 0 or 1")
        sides = [side for side in img_size]
        for _ in range(2):
            sides = [(side - 4 * (1 - padding)) // 2 for side in sides]
        if min(sides) < 1:
            raise Mistake(f"tinyvgg: images of {img_size[0]}x{img_size[1]} pixels leave no map at the end; take at least {4 if padding else 16} a side")
        self.num_classes, self.num_features, self.in_chans, self.size = num_classes, width * sides[0] * sides[1], in_chans, tuple(img_size)
        layers: list[nn.Module] = []
        for channels in (in_chans, width):
            layers += [nn.Conv2d(channels, width, 3, padding=padding), nn.ReLU(), nn.Conv2d(width, width, 3, padding=padding), nn.ReLU(), nn.MaxPool2d(2)]
        self.features, self.flatten = nn.Sequential(*layers), nn.Flatten()
        self.fc = nn.Linear(self.num_features, num_classes)
        self.feature_info = maps(("features.3", width, 1), ("features.8", width, 2))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The map after the second pool."""
        if tuple(x.shape[-2:]) != self.size:
            given, built = "x".join(map(str, x.shape[-2:])), "x".join(map(str, self.size))
            raise Mistake(f"tinyvgg: built for images of {built} pixels, given {given}; pass img_size, or bring the images to that size")
        return self.features(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """All values of the map in a row."""
        return self.flatten(features)
