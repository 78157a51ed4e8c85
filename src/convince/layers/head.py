"""Headed: timm's interface for a network that ends in one linear layer, written once."""

from __future__ import annotations

import abc
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn


class Headed(nn.Module, abc.ABC):
    """A network of features, a vector made of them, and the linear layer ``fc``.

    A subclass sets ``num_classes``, ``num_features`` (the length of the vector), ``in_chans``, ``fc`` and, where it has
    feature maps, ``feature_info`` by :func:`maps`; a network without says ``maps()``.
    """

    num_classes: int
    num_features: int
    in_chans: int
    fc: nn.Module
    feature_info: list[dict[str, Any]]

    @abc.abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """What the network sees in the input: its last feature map, or its tokens."""

    @abc.abstractmethod
    def pool(self, features: Tensor) -> Float[Tensor, "n d"]:
        """The vector that the linear layer reads."""

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Float[Tensor, "n k"]:
        """The scores [n k] of :meth:`forward_features`, or with ``pre_logits`` the vector before them [n d]."""
        x = self.pool(features)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new linear layer for ``num_classes``; 0 makes the network answer with the vector before it."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()


def maps(*rows: tuple[str, int, int]) -> list[dict[str, Any]]:
    """timm's ``feature_info``: a row a map in the network's order, (module's name, channels, pixels of the image a step)."""
    return [{"module": module, "num_chs": channels, "reduction": reduction} for module, channels, reduction in rows]
