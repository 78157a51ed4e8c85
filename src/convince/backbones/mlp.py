"""MLP: fully connected layers for tables of numbers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.parts import Card

CARD = Card(
    part="mlp",
    kind="backbone",
    title="Multi-layer perceptron",
    accepts=("table",),
    tiny={"hidden": (8,)},
)


@final
class MLP(nn.Module):
    """Linear - ReLU for each of ``hidden``, then a linear head. ``in_chans`` is the number of features."""

    def __init__(self, num_classes: int = 2, in_chans: int = 1, hidden: Sequence[int] = (128, 128)) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, hidden[-1], in_chans
        sizes = [in_chans, *hidden]
        self.hidden = nn.Sequential(*(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))
        self.fc = nn.Linear(hidden[-1], num_classes)

    def forward_features(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """Activations of the last hidden layer."""
        return self.hidden(x)

    def forward_head(self, x: Float[Tensor, "n e"], pre_logits: bool = False) -> Float[Tensor, "n k"]:
        """The features themselves, or the scores."""
        return x if pre_logits else self.fc(x)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for ``num_classes``; 0 makes the network answer with its features."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()  # type: ignore[assignment]
