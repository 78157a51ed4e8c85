"""SigmoidMLP: fully connected layers with sigmoid units on flattened images or tables, as deep belief networks use them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.parts import Card

CARD = Card(
    part="sigmoid-mlp",
    kind="backbone",
    title="Multi-layer perceptron with sigmoid units",
    accepts=("image", "table"),
    tiny={"hidden": (8,)},
)


@final
class SigmoidMLP(nn.Module):
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
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Tensor) -> Float[Tensor, "n e"]:
        """Activations of the last hidden layer."""
        return self.hidden(self.flatten(x))

    def forward_head(self, x: Float[Tensor, "n e"], pre_logits: bool = False) -> Float[Tensor, "n k"]:
        """The features themselves, or the scores."""
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for ``num_classes``; 0 makes the network answer with its features."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()  # type: ignore[assignment]
