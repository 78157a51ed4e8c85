"""SmallCNN: a few conv - BN - ReLU - pool blocks, a quick baseline for images of about 28 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.parts import Card

CARD = Card(
    part="small-cnn",
    kind="backbone",
    title="Three-block convolutional network",
    accepts=("image",),
    tiny={"widths": (4, 8)},
)


@final
class SmallCNN(nn.Module):
    """conv3x3 - BN - ReLU - 2x2 max-pool for each of ``widths``, global average pooling, a linear head.

    The image's shorter side must be at least ``2 ** len(widths)`` pixels.
    """

    def __init__(self, num_classes: int = 10, in_chans: int = 1, widths: Sequence[int] = (16, 32, 64)) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.in_chans = num_classes, widths[-1], in_chans
        layers: list[nn.Module] = []
        for a, b in zip([in_chans, *widths], widths, strict=False):
            layers += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(widths[-1], num_classes)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        return self.features(x)

    def forward_head(self, x: Float[Tensor, "n d i j"], pre_logits: bool = False) -> Tensor:
        """Pooled features [n d], or the scores [n k]."""
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for ``num_classes``; 0 makes the network answer with pooled features."""
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()  # type: ignore[assignment]
