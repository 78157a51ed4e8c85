"""Astroformer: three stages of inverted-bottleneck convolutions, then one of attention with relative positions, wired from timm's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from timm.models.maxxvit import MaxxVitConvCfg, MaxxVitStage, MaxxVitTransformerCfg, MbConvBlock, Stem, TransformerBlock2d
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="astroformer",
    kind="backbone",
    paper="astroformer",
    title="Astroformer: More Data Might not be all you need for Classification",
    year=2023,
    url="https://arxiv.org/abs/2304.05350",
    accepts=("image",),
    departs=(
        "the counts are met as the authors' Tiny ImageNet table prints them (1,000 classes, position table for 64 px); their other tables print more than"
        " their code has (size 3 with ten classes: 161.75 million, where it makes 148.89 with the table for 224 px), two of them exactly CoAtNet's layout"
        " CCTT without the hidden layer (271.54 million for size 4, 681.25 for size 5)",
        "the relative attention that the paper describes is what the authors' code has, timm's learned table of relative positions by head",
        "in an image of an odd side the 2x2 means of the shortcuts take the last row and column as they are; the authors' code stops there",
        "the share of blocks skipped in training (drop_path) is 0, as in the authors' command; the paper names stochastic depth without a rate",
    ),
    tiny={"dims": (4, 4, 8, 32), "depths": (1, 1, 1, 1), "stem": 4, "stem_stride": 1},
    variants={
        "astroformer-mini": {"dims": (32, 64, 96, 128), "depths": (1, 2, 2, 1), "stem": 32, "stem_stride": 1},
        "astroformer-0": {"depths": (2, 3, 5, 2)},
        "astroformer-1": {"depths": (2, 6, 14, 2)},
        "astroformer-2": {"dims": (128, 256, 512, 1024), "depths": (2, 6, 14, 2), "stem": 128},
        "astroformer-3": {"dims": (192, 384, 768, 1536), "depths": (2, 6, 14, 2), "stem": 192},
        "astroformer-4": {"dims": (192, 384, 768, 1536), "depths": (2, 12, 28, 2), "stem": 192},
        "astroformer-5": {"dims": (256, 512, 1280, 2048), "depths": (2, 12, 28, 2), "stem": 192},
    },
    small=("astroformer-mini",),
    published={
        "astroformer-3": {"size": 64, "classes": 1000, "parameters": 150.39e6},
        "astroformer-4": {"size": 64, "classes": 1000, "parameters": 242.58e6},
        "astroformer-5": {"size": 64, "classes": 1000, "parameters": 595.55e6},
    },
    optimizer="adamw:lr=0.001,weight_decay=0.05",
)
HEAD = 32  # channels of an attention head


@final
class Astroformer(Headed):
    """Two 3x3 convs; stages of MBConv ("C") or attention ("T") blocks, each halving the side; mean, LN, linear and tanh, dropout, a linear layer.

    ``dims`` and ``depths`` are channels and blocks of the stages, ``stages`` their kinds ("CCTT" is CoAtNet's layout), ``stem`` the channels
    before them. ``stem_stride`` 1 keeps the side of small images. ``drop_path`` rises linearly to its value in the last block;
    ``positions=False`` leaves out the table of relative positions. With it the size of the image is fixed when the network is built.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: Sequence[int] = (256, 256),
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 5, 2),
        stages: str = "CCCT",
        stem: int = 64,
        stem_stride: int = 2,
        drop_path: float = 0.0,
        dropout: float = 0.1,
        positions: bool = True,
    ) -> None:
        super().__init__()
        if not len(dims) == len(depths) == len(stages) or not set(stages) <= {"C", "T"} or not stages:
            raise Mistake(f"astroformer: stages={stages!r}: needs a letter C or T a stage, and as many dims ({len(dims)}) and depths ({len(depths)})")
        if stem_stride not in (1, 2) or any(kind == "T" and width % HEAD for kind, width in zip(stages, dims, strict=True)):
            raise Mistake(f"astroformer: dims={tuple(dims)}, stem_stride={stem_stride}: a T stage's is a multiple of {HEAD}; the stem's stride is 1 or 2")
        self.num_classes, self.num_features, self.in_chans = num_classes, dims[-1], in_chans
        conv, attention = MaxxVitConvCfg(), MaxxVitTransformerCfg(dim_head=HEAD, rel_pos_type="bias" if positions else "")
        self.stem = Stem(in_chans, stem)
        self.stem.conv1.stride = (stem_stride, stem_stride)
        self.stem.init_weights("vit_eff")
        sides, step, c_in, before = [halved(s, stem_stride) for s in img_size], stem_stride, stem, 0
        rows, made = [("stem", stem, step)], []
        for i, (kind, width, depth) in enumerate(zip(stages, dims, depths, strict=True)):
            sides, step = [halved(s, 2) for s in sides], 2 * step
            rates = [drop_path * (before + j) / max(sum(depths) - 1, 1) for j in range(depth)]
            made.append(MaxxVitStage(c_in, width, 2, depth, (sides[0], sides[1]), kind, attention, conv, rates))
            rows.append((f"stages.{i}", width, step))
            c_in, before = width, before + depth
        self.stages = nn.Sequential(*made)
        for module in self.stages.modules():
            if isinstance(module, nn.AvgPool2d):
                module.ceil_mode, module.count_include_pad = True, False
            elif isinstance(module, (MbConvBlock, TransformerBlock2d)):
                module.init_weights("vit_eff")
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.hidden = nn.Sequential(nn.Linear(dims[-1], dims[-1]), nn.Tanh(), nn.Dropout(dropout))
        self.fc = nn.Linear(dims[-1], num_classes)
        self.feature_info = maps(*rows)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        return self.stages(self.stem(x))

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions, normalised, and the hidden layer."""
        return self.hidden(self.norm(features.mean((2, 3))))


def halved(side: int, stride: int) -> int:
    """The side [pixels] after a step of ``stride``, rounded up."""
    return -(-side // stride)
