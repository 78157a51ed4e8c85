"""SigmoidMLP: fully connected layers with sigmoid units on flattened images or tables, as deep belief networks use them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="sigmoid-mlp",
    kind="backbone",
    title="Multi-layer perceptron with sigmoid units",
    accepts=("image", "table"),
    tiny={"hidden": (8,)},
    small=("sigmoid-mlp",),
)


@final
class SigmoidMLP(Headed):
    """Flatten, Linear - Sigmoid for each of ``hidden``, a linear head; Xavier's initial weights, biases 0.

    ``img_size``: (rows, columns) of the images, () for a table of ``in_chans`` features.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, hidden: Sequence[int] = (256, 256), img_size: Sequence[int] = (28, 28)) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, hidden[-1], in_chans
        sizes = [in_chans * math.prod(img_size), *hidden]
        self.flatten = nn.Flatten()
        self.hidden = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.Sigmoid())))
        self.fc = nn.Linear(hidden[-1], num_classes)
        self.feature_info = maps()
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Float[Tensor, "n e"]:
        """Activations of the last hidden layer."""
        return self.hidden(self.flatten(x))

    def pool(self, features: Float[Tensor, "n e"]) -> Float[Tensor, "n e"]:
        """The features themselves."""
        return features
