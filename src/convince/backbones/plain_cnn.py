"""PlainCNN: many 3x3 convolutions in a row, no batch norm, with or without skip connections."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal, final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="plain-cnn",
    kind="backbone",
    title="Deep convolutional network without skip connections or batch norm",
    accepts=("image",),
    tiny={"layers": (2, 2), "widths": (4, 8)},
    variants={
        "plain-cnn16": {"layers": (4, 4, 4, 4)},
        "plain-cnn16-skip": {"layers": (4, 4, 4, 4), "skip": True},
    },
    small=("plain-cnn",),
)


@final
class PlainCNN(Headed):
    """Stages of conv3x3 - ReLU, global average pooling, a linear head; each stage after the first halves the side.

    ``layers`` are convolutions a stage, ``widths`` their channels. ``skip=True`` is the residual twin with the same
    parameters by name: the input of every two convolutions is added before the second ReLU, mean-pooled where the
    side halves and padded with zero channels where the width grows. ``init`` "default" is torch's, too small for
    deep stacks of ReLU; "he" keeps the variance from layer to layer. Raises Mistake where widths fall beside ``skip``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        layers: Sequence[int] = (4, 4, 4, 4),
        widths: Sequence[int] = (16, 32, 64, 128),
        skip: bool = False,
        init: Literal["default", "he"] = "default",
    ) -> None:
        super().__init__()
        if len(layers) != len(widths):
            raise Mistake(f"plain-cnn: layers={tuple(layers)} and widths={tuple(widths)} must name the same number of stages")
        if not layers or min(layers) < 1:
            raise Mistake(f"plain-cnn: layers={tuple(layers)}: every stage needs at least one convolution")
        outputs = [width for count, width in zip(layers, widths, strict=True) for _ in range(count)]
        strides = [2 if j == 0 and i else 1 for i, count in enumerate(layers) for j in range(count)]
        inputs = [in_chans, *outputs[:-1]]
        if skip and any(a > b for a, b in zip(inputs, outputs, strict=True)):
            raise Mistake(f"plain-cnn: widths={tuple(widths)} with skip=true must not fall, from {in_chans} input channels on; its skips have no weights")
        if init not in ("default", "he"):
            raise Mistake(f"plain-cnn: init={init!r} must be 'default' (torch's) or 'he'")
        self.num_classes, self.num_features, self.in_chans, self.skip = num_classes, widths[-1], in_chans, skip
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, s, 1) for a, b, s in zip(inputs, outputs, strides, strict=True))
        self.fc = nn.Linear(widths[-1], num_classes)
        last = list(itertools.accumulate(layers))
        self.feature_info = maps(*((f"convs.{end - 1}", width, 2**i) for i, (end, width) in enumerate(zip(last, widths, strict=True))))
        if init == "he":
            for conv in self.convs:
                assert isinstance(conv, nn.Conv2d)
                assert conv.bias is not None
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                nn.init.zeros_(conv.bias)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        kept = x
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if self.skip and (i % 2 or i == len(self.convs) - 1):
                x = x + shortcut(kept, x)
            x = F.relu(x)  # not in place: what looks at a convolution sees it before the activation
            if i % 2:
                kept = x
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """Pooled features."""
        return features.mean((2, 3))


def shortcut(x: Float[Tensor, "n c h w"], like: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d i j"]:
    """``x`` in the shape of ``like`` without weights: 2x2 means until the side fits, then zero channels."""
    while x.shape[2:] != like.shape[2:]:
        x = F.avg_pool2d(x, 2, ceil_mode=True)
    return F.pad(x, (0, 0, 0, 0, 0, like.shape[1] - x.shape[1]))
