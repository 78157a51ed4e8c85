"""ConvFirst: residual blocks that begin with a grouped convolution, so that a block can be computed tile by tile without large maps in between."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="convfirst",
    kind="backbone",
    paper="convfirst-efficiency",
    title="On the Efficiency of Convolutional Neural Networks",
    year=2024,
    url="https://arxiv.org/abs/2404.03617",
    accepts=("image",),
    departs=(
        "the block is the author's; the stages, stem and head of the paper's network could not be found, so depths and widths are those of ConvNeXt-T",
        "a stage's first block halves the side and widens the map itself; a norm and SiLU stand before the mean, as no block ends in an activation",
        "the fused kernels for graphics processors are not built here; block_fusion computes a block tile by tile to show that it can be done",
    ),
    tiny={"depths": (1, 1), "dims": (8, 8), "stem": 1, "group_width": 4},
    variants={"convfirst-mini": {"depths": (1, 2, 2), "dims": (16, 32, 64), "stem": 1}},
    small=("convfirst-mini",),
)


@final
class ConvFirstBlock(nn.Module):
    """Grouped k x k convolution, BN, 1x1 to ``expansion`` times the channels, BN, activation, 1x1 to ``c_out``, BN; plus the input where shapes agree.

    ``group_width``: channels a group; 1 is a depthwise convolution, ``c_in`` an ordinary one. No biases, no activation after the first convolution
    or the sum.
    """

    def __init__(self, c_in: int, c_out: int, k: int = 3, stride: int = 1, group_width: int = 8, expansion: int = 4, act: type[nn.Module] = nn.SiLU) -> None:
        super().__init__()
        if k < 1 or k % 2 == 0 or group_width < 1 or c_in % group_width or expansion < 1:
            raise Mistake(
                f"convfirst: k={k}, group_width={group_width}, expansion={expansion} with {c_in} channels: k is odd, expansion at least 1, and the width of a "
                "group divides the channels"
            )
        wide = expansion * c_in
        self.c_out, self.has_skip = c_out, stride == 1 and c_in == c_out
        self.conv = nn.Conv2d(c_in, c_in, k, stride, k // 2, groups=c_in // group_width, bias=False)
        self.pointwise = nn.Sequential(
            nn.BatchNorm2d(c_in),
            nn.Conv2d(c_in, wide, 1, bias=False),
            nn.BatchNorm2d(wide),
            act(),
            nn.Conv2d(wide, c_out, 1, bias=False),
            nn.BatchNorm2d(c_out),
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        y = self.pointwise(self.conv(x))
        return x + y if self.has_skip else y


# -- block fusion ------------------------------------------------------------------------------------


class Fused(NamedTuple):
    """A block's output, and the most elements that a layer's input and output held together while it was computed."""

    output: Float[Tensor, "n d i j"]
    workspace: int


@torch.no_grad()
def block_fusion(block: ConvFirstBlock, x: Float[Tensor, "n c h w"], tile: tuple[int, int] | None = None) -> Fused:
    """All layers of the block on one ``tile`` (rows, columns of the output) after another: a tile's input comes with the halo its convolution needs.

    What stands between the layers is then as large as a tile, not as the map. None: one tile as large as the output, which is the block as it is.
    A reference in plain torch, neither fast nor differentiable. Raises Mistake in training mode, where norms need whole maps.
    """
    if block.training:
        raise Mistake("convfirst: block_fusion is for eval mode; in training a batch norm needs the whole map before the next layer can begin")
    n, _, h, w = x.shape
    conv = block.conv
    (k, _), (stride, _) = conv.kernel_size, conv.stride
    rows, columns = ((side - 1) // stride + 1 for side in (h, w))
    th, tw = tile or (rows, columns)
    if min(th, tw) < 1:
        raise Mistake(f"convfirst: block_fusion: tile={tile} must be rows and columns of the output, at least 1 each")
    output = x.new_empty(n, block.c_out, rows, columns)
    workspace = 0
    for top in range(0, rows, th):
        for left in range(0, columns, tw):
            bottom, right = min(top + th, rows), min(left + tw, columns)
            patch, padding = halo(x, (top, bottom), (left, right), k, stride)
            patch = F.pad(patch, padding)
            y = F.conv2d(patch, conv.weight, None, conv.stride, 0, 1, conv.groups)
            workspace = max(workspace, patch.numel() + y.numel())
            for layer in block.pointwise:
                before, y = y, layer(y)
                workspace = max(workspace, before.numel() + y.numel())
            output[:, :, top:bottom, left:right] = x[:, :, top:bottom, left:right] + y if block.has_skip else y
    return Fused(output, workspace)


def halo(
    x: Float[Tensor, "n c h w"], rows: tuple[int, int], columns: tuple[int, int], k: int, stride: int
) -> tuple[Float[Tensor, "n c i j"], tuple[int, int, int, int]]:
    """The part of ``x`` that the outputs from ``rows[0]`` to before ``rows[1]`` see, and how many zeros it lacks: left, right, above, below."""
    found, lacking = [], []
    for (first, end), side in ((rows, x.shape[2]), (columns, x.shape[3])):
        begin, stop = first * stride - k // 2, (end - 1) * stride - k // 2 + k
        found.append(slice(max(begin, 0), min(stop, side)))
        lacking.append((max(-begin, 0), max(stop - side, 0)))
    return x[:, :, found[0], found[1]], (*lacking[1], *lacking[0])


# -- the network -------------------------------------------------------------------------------------


@final
class ConvFirst(Headed):
    """Stem, stages of :class:`ConvFirstBlock`, BN, SiLU, mean over positions, a linear head.

    ``depths`` blocks a stage and ``dims`` their width; the first block of a later stage halves the side and comes from the width before. ``stem``: 1 is a
    3x3 convolution for images up to about 64 px, more a patch of that side, with a BN behind.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depths: Sequence[int] = (3, 3, 9, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        stem: int = 4,
        group_width: int = 8,
        expansion: int = 4,
        img_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not depths or len(depths) != len(dims) or min(depths) < 1 or stem < 1:
            raise Mistake(
                f"convfirst: depths={tuple(depths)}, dims={tuple(dims)}, stem={stem}: one width a stage, a block in each, and a stem of at least 1 px"
            )
        if img_size is not None and min(img_size) < stem:
            raise Mistake(f"convfirst: the stem's patch is {stem} px, and the image has {img_size[0]}x{img_size[1]}; give larger images (--size) or stem=1")
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, dims[-1]
        entry = nn.Conv2d(in_chans, dims[0], 3, padding=1, bias=False) if stem == 1 else nn.Conv2d(in_chans, dims[0], stem, stem, bias=False)
        self.stem = nn.Sequential(entry, nn.BatchNorm2d(dims[0]))
        stages, c_in = [], dims[0]
        for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
            blocks = []
            for j in range(depth):
                blocks.append(ConvFirstBlock(c_in, dim, stride=2 if i and j == 0 else 1, group_width=group_width, expansion=expansion))
                c_in = dim
            stages.append(nn.Sequential(*blocks))
        self.stages = nn.Sequential(*stages)
        self.feature_info = maps(*((f"stages.{i}", dim, stem * 2**i) for i, dim in enumerate(dims)))
        self.norm, self.act = nn.BatchNorm2d(c_in), nn.SiLU()
        self.fc = nn.Linear(c_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map, normalised and activated."""
        return self.act(self.norm(self.stages(self.stem(x))))

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))
