"""ConvStemVit: a small vision transformer whose tokens come from convolutions, so that it learns from few images."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, final

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import maps
from convince.parts import Card

CARD = Card(
    part="conv-stem-vit",
    kind="backbone",
    title="Early Convolutions Help Transformers See Better",
    year=2021,
    url="https://arxiv.org/abs/2106.14881",
    accepts=("image",),
    tiny={"dim": 16, "depth": 2, "heads": 2},
    departs=(
        "the stem halves the image twice for small pictures; the paper's halves it four times, which stem=4 does",
        "the mean over tokens answers, not a class token",
        "sizes are ours, for 28 to 64 pixels; the paper's start at 1 billion multiply-adds for 224",
    ),
    small=("conv-stem-vit",),
)


class Tokens(nn.Module):
    """Tokens [n t d] of an image: ``halvings`` times conv3x3 of stride 2, batch normalisation and ReLU, widths doubling, then conv1x1 to ``embed_dim``.

    Takes the place of timm's patch embedding and so has its names: ``num_patches``, ``grid_size``, ``proj``.
    """

    def __init__(self, img_size: Sequence[int], in_chans: int, embed_dim: int, halvings: int, **_: Any) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = in_chans
        for i in range(halvings):
            width = max(embed_dim // 2 ** (halvings - 1 - i), 8)
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
            before = width
        self.stem = nn.Sequential(*layers)
        self.proj = nn.Conv2d(before, embed_dim, 1)
        self.grid_size = tuple(-(-side // 2**halvings) for side in img_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.stem(x)).flatten(2).transpose(1, 2)


@final
class ConvStemVit(VisionTransformer):
    """timm's transformer of ``depth`` blocks of width ``dim`` on :class:`Tokens`; the size of the image is fixed when it is built."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: Sequence[int] = (28, 28),
        dim: int = 96,
        depth: int = 6,
        heads: int = 3,
        stem: int = 2,
    ) -> None:
        if dim % heads:
            raise Mistake(f"conv-stem-vit: dim={dim}, heads={heads}: the width must be a multiple of the heads")
        if min(img_size) < 2**stem:
            raise Mistake(f"conv-stem-vit: an image of {min(img_size)} pixels cannot be halved {stem} times; choose a larger --size or a smaller stem")
        super().__init__(
            img_size=(img_size[0], img_size[1]),
            patch_size=1,
            in_chans=in_chans,
            num_classes=num_classes,
            global_pool="avg",
            class_token=False,
            embed_dim=dim,
            depth=depth,
            num_heads=heads,
            embed_layer=partial(Tokens, halvings=stem),
        )
        self.feature_info = maps(*((f"blocks.{i}", dim, 2**stem) for i in range(depth)))
