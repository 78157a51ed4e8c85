"""CNNAgarap: the two-convolution network of the CNN-SVM paper, for images of about 28 pixels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="cnn-agarap",
    kind="backbone",
    title="An Architecture Combining Convolutional Neural Network (CNN) and Support Vector Machine (SVM) for Image Classification",
    paper="cnn-svm",
    year=2017,
    url="https://arxiv.org/abs/1712.03541",
    accepts=("image",),
    tiny={"widths": (4, 8), "hidden": 16},
    variants={"cnn-agarap-half": {"widths": (16, 32), "hidden": 512}},
    departs=(
        "initial weights follow PyTorch's law by fan-in; the release draws a truncated normal of deviation 0.1 and sets biases to 0.1",
        "the channels of the image and its size are arguments; the paper's are 1 and 28 by 28",
    ),
    small=("cnn-agarap",),
)


@final
class CNNAgarap(Headed):
    """conv5x5 - ReLU - 2x2 max-pool for each of ``widths``, a hidden layer with ReLU and dropout, a linear head: 3,274,634 weights at 28x28x1.

    ``img_size`` (rows, columns) fixes the hidden layer, 7x7x64 to 1024 in the paper; at 224 pixels that layer alone has 205 million weights, so
    shrink photographs (``--size 32``). Pools keep the last odd row and column.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        widths: Sequence[int] = (32, 64),
        hidden: int = 1024,
        dropout: float = 0.5,
        img_size: Sequence[int] = (28, 28),
    ) -> None:
        super().__init__()
        if not widths or hidden < 1:
            raise Mistake(f"cnn-agarap: widths={tuple(widths)}, hidden={hidden}: at least one convolution and one hidden unit")
        if not 0 <= dropout < 1:
            raise Mistake(f"cnn-agarap: dropout={dropout!r}: must be a probability from 0 up to but not including 1; the paper's is 0.5")
        self.num_classes, self.num_features, self.in_chans, self.size = num_classes, hidden, in_chans, tuple(img_size)
        layers: list[nn.Module] = []
        rows, columns = img_size
        for a, b in zip([in_chans, *widths], widths, strict=False):
            layers += [nn.Conv2d(a, b, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2, ceil_mode=True)]
            rows, columns = -(-rows // 2), -(-columns // 2)
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Sequential(nn.Linear(widths[-1] * rows * columns, hidden), nn.ReLU(inplace=True), nn.Dropout(dropout))
        self.fc = nn.Linear(hidden, num_classes)
        self.feature_info = maps(*((f"features.{3 * i + 1}", width, 2**i) for i, width in enumerate(widths)))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        if tuple(x.shape[-2:]) != self.size:
            given, built = "x".join(map(str, x.shape[-2:])), "x".join(map(str, self.size))
            raise Mistake(f"cnn-agarap: built for images of {built} pixels, given {given}; pass img_size, or bring the images to that size")
        return self.features(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """The hidden layer's activations."""
        return self.hidden(features.flatten(1))
