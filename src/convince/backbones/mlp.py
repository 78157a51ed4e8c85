"""MLP: fully connected layers for tables of numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="mlp",
    kind="backbone",
    title="Multi-layer perceptron",
    accepts=("table",),
    tiny={"hidden": (8,)},
)


@final
class MLP(Headed):
    """Linear - ReLU for each of ``hidden``, then a linear head. ``in_chans`` is the number of features."""

    def __init__(self, num_classes: int = 2, in_chans: int = 1, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, hidden[-1], in_chans
        sizes = [in_chans, *hidden]
        self.hidden = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))
        self.fc = nn.Linear(hidden[-1], num_classes)
        self.feature_info = maps()

    def forward_features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """Activations of the last hidden layer."""
        return self.hidden(x)

    def pool(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        """The features themselves."""
        return features
