"""PoolNet: a residual network whose halvings are max-poolings before any of its blocks, so that all placements share one set of weights."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="pool-net",
    kind="backbone",
    paper="balanced-mixture-supernets",
    title="Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture",
    year=2023,
    url="https://arxiv.org/abs/2306.11982",
    accepts=("image",),
    departs=(
        "trained alone, every norm has weights; the released code leaves them out in the first norm of a block",
        "the paper's ResNet-18 and ResNet-50, which stride inside a block instead of pooling before it, are not here",
        "pool-net-mini has six blocks in place of nine, and is ours",
    ),
    tiny={"channels": (4, 4, 6), "pools": (3,)},
    variants={
        "pool-net-mini": {"channels": (16, 16, 32, 32, 64, 64), "pools": (3, 5)},
        "pool-net20": {"channels": (16, 16, 16, 32, 32, 32, 64, 64, 64), "pools": (4, 7)},
        "pool-net20-found": {"channels": (16, 16, 16, 32, 32, 32, 64, 64, 64), "pools": (5, 8)},
        "pool-net20-best": {"channels": (16, 16, 16, 32, 32, 32, 64, 64, 64), "pools": (7, 8)},
    },
    small=("pool-net-mini", "pool-net20", "pool-net20-found", "pool-net20-best"),
)


def placements(blocks: int, count: int) -> list[tuple[int, ...]]:
    """Every way to put ``count`` poolings before different ones of ``blocks`` blocks, numbered from 1 (section 3: C(9, 2) = 36 for ResNet20)."""
    return list(itertools.combinations(range(1, blocks + 1), count))


def default_placement(blocks: int, count: int) -> tuple[int, ...]:
    """The usual places, which cut the blocks into equal stages: before 4 and 7 of nine."""
    return tuple(1 + i * blocks // (count + 1) for i in range(1, count + 1))


def norm(channels: int, shared: bool) -> nn.BatchNorm2d:
    """Batch normalisation; ``shared`` without weights and without running statistics, which differ from placement to placement."""
    return nn.BatchNorm2d(channels, affine=not shared, track_running_stats=not shared)


@final
class PoolBlock(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN, plus the input (by a 1x1 conv and BN where the channels change), ReLU; all of stride 1."""

    def __init__(self, c_in: int, c_out: int, shared: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.bn1 = norm(c_out, shared)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.bn2 = norm(c_out, shared)
        self.downsample = nn.Identity() if c_in == c_out else nn.Sequential(nn.Conv2d(c_in, c_out, 1, bias=False), norm(c_out, shared))
        self.act2 = nn.ReLU(inplace=True)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        y = self.act1(self.bn1(self.conv1(x)))
        return self.act2(self.bn2(self.conv2(y)) + self.downsample(x))


@final
class PoolNet(Headed):
    """A 3x3 stem, :class:`PoolBlock` after block, the mean over positions, a linear head; before each block in ``pools`` a 2x2 max-pool.

    ``channels`` are those of each block, whatever the resolution; the stem has the first's. ``pools`` are numbers of blocks from 1, in rising
    order; an odd last row or column is left out. ``shared`` is the form of a super-network, whose weights serve many placements: its norms have no
    weights and use the batch's statistics in evaluation too, so that answers depend on the batch. Raises Mistake.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        channels: Sequence[int] = (16, 16, 16, 32, 32, 32, 64, 64, 64),
        pools: Sequence[int] = (4, 7),
        shared: bool = False,
    ) -> None:
        super().__init__()
        if not channels or min(channels) < 1:
            raise Mistake(f"pool-net: channels={tuple(channels)}: needs the channels of at least one block, each at least 1")
        self.num_classes, self.num_features, self.in_chans = num_classes, channels[-1], in_chans
        self.channels = tuple(channels)
        self.stem = nn.Sequential(nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False), norm(channels[0], shared), nn.ReLU(inplace=True))
        self.blocks = nn.ModuleList(PoolBlock(a, b, shared) for a, b in zip((channels[0], *channels), channels, strict=False))
        self.fc = nn.Linear(channels[-1], num_classes)
        self.place(pools)

    def place(self, pools: Sequence[int]) -> None:
        """Put the poolings before other blocks; weights stay as they are."""
        pools = tuple(pools)
        if list(pools) != sorted(set(pools)) or not set(pools) <= set(range(1, len(self.channels) + 1)):
            raise Mistake(f"pool-net: pools={pools}: must be numbers of blocks, 1 to {len(self.channels)}, in rising order and each once")
        self.pools = pools
        ends = [*(block - 1 for block in pools), len(self.channels)]  # the last layer of each resolution; 0 is the stem
        self.feature_info = maps(*((f"blocks.{i - 1}" if i else "stem", self.channels[max(i - 1, 0)], 2**step) for step, i in enumerate(ends)))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        if min(x.shape[2:]) < 2 ** len(self.pools):
            raise Mistake(f"pool-net: {len(self.pools)} poolings need at least {2 ** len(self.pools)} pixels a side, and this image has {tuple(x.shape[2:])}")
        x = self.stem(x)
        for i, block in enumerate(self.blocks, 1):
            x = block(F.max_pool2d(x, 2) if i in self.pools else x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))
