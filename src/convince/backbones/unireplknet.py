"""UniRepLKNet: few, very large depthwise kernels among small ones; dilated branches help them in training and merge into them afterwards."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.layers.se import Se
from convince.layers.surgery import find, swap
from convince.parts import Card

CARD = Card(
    part="unireplknet",
    kind="backbone",
    paper="unireplknet",
    title="UniRepLKNet: A Universal Perception Large-Kernel ConvNet for Audio, Video, Point Cloud, Time-Series and Image Recognition",
    year=2024,
    url="https://arxiv.org/abs/2311.15599",
    accepts=("image",),
    optimizer="adamw:lr=0.002,weight_decay=0.05",
    departs=(
        "stem=1 and stem=2 are for images up to about 64 px: one conv3x3 in place of the paper's two, and as many stages as depths are given",
        "unireplknet-mini begins with layer scales of 0.1: the paper's 0.000001 is for far more steps than small sets give",
        "a network trained from a small batch begins at AdamW's 0.002; the paper has 0.004 for batches of 4,096",
        "the layouts for other inputs (layers/map_layouts.py) hold no weights: a point cloud is projected by geometry, where the paper learns the projection",
    ),
    tiny={"depths": (1, 1), "width": 8, "kernels": ((3,), (7,)), "stem": 2},
    variants={
        "unireplknet-mini": {"depths": (1, 2, 2), "width": 24, "kernels": ((3,), (13,), (13, 3)), "stem": 1, "layer_scale": 0.1},
        "unireplknet-a": {"depths": (2, 2, 6, 2), "width": 40},
        "unireplknet-f": {"depths": (2, 2, 6, 2), "width": 48},
        "unireplknet-p": {"depths": (2, 2, 6, 2), "width": 64},
        "unireplknet-n": {"depths": (2, 2, 8, 2), "width": 80},
        "unireplknet-t": {"depths": (3, 3, 18, 3), "width": 80, "kernels": ((3,), (13,), (13, 3), (13,))},
        "unireplknet-s": {"depths": (3, 3, 27, 3), "width": 96, "kernels": ((3,), (13,), (13, 3, 3), (13,))},
        "unireplknet-b": {"depths": (3, 3, 27, 3), "width": 128, "kernels": ((3,), (13,), (13, 3, 3), (13,))},
        "unireplknet-l": {"depths": (3, 3, 27, 3), "width": 192, "kernels": ((3,), (13,), (13, 3, 3), (13,))},
        "unireplknet-xl": {"depths": (3, 3, 27, 3), "width": 256, "kernels": ((3,), (13,), (13, 3, 3), (13,))},
    },
    small=("unireplknet-mini",),
    published={
        "unireplknet-a": {"size": 224, "classes": 1000, "parameters": 4649060},
        "unireplknet-f": {"size": 224, "classes": 1000, "parameters": 6489328},
        "unireplknet-p": {"size": 224, "classes": 1000, "parameters": 11080520},
        "unireplknet-n": {"size": 224, "classes": 1000, "parameters": 18818880},
        "unireplknet-t": {"size": 224, "classes": 1000, "parameters": 31693420},
        "unireplknet-s": {"size": 224, "classes": 1000, "parameters": 56456704},
        "unireplknet-b": {"size": 224, "classes": 1000, "parameters": 99089416},
        "unireplknet-l": {"size": 384, "classes": 1000, "parameters": 218e6},
        "unireplknet-xl": {"size": 384, "classes": 1000, "parameters": 386e6},
    },
)

# kernel -> (kernel, dilation) of the branches beside it in training
BRANCHES: dict[int, tuple[tuple[int, int], ...]] = {
    5: ((3, 1), (3, 2)),
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}


# -- merging: pure functions -------------------------------------------------------------------------


def dense_kernel(weight: Float[Tensor, "c 1 k k"], dilation: int) -> Float[Tensor, "c 1 s s"]:
    """The kernel that does without dilation what ``weight`` does with it: ``dilation - 1`` zeros between taps (eq. 1), ``s = dilation (k - 1) + 1``."""
    c, _, k, _ = weight.shape
    dense = weight.new_zeros(c, 1, dilation * (k - 1) + 1, dilation * (k - 1) + 1)
    dense[..., ::dilation, ::dilation] = weight
    return dense


def fused(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> tuple[Float[Tensor, "d c k k"], Float[Tensor, " d"]]:
    """Weight and bias of the one convolution that does what ``conv`` and behind it ``bn``, in eval mode, do."""
    scale, shift = affine(bn)
    bias = shift if conv.bias is None else conv.bias * scale + shift
    return conv.weight * scale[:, None, None, None], bias


def affine(bn: nn.BatchNorm2d) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
    """What a batch norm in eval mode multiplies each channel by, and what it then adds."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    scale = bn.weight / (bn.running_var + bn.eps).sqrt()
    return scale, bn.bias - bn.running_mean * scale


def global_response(x: Float[Tensor, "n h w c"], gamma: Float[Tensor, " c"]) -> Float[Tensor, "n h w c"]:
    """Global response normalisation without its bias: ``(gamma N + 1) x`` with ``N = G / mean_c G`` and ``G`` a channel's 2-norm over the plane."""
    strength = x.norm(dim=(1, 2), keepdim=True)
    return (gamma * (strength / (strength.mean(-1, keepdim=True) + 1e-6)) + 1) * x


# -- modules -----------------------------------------------------------------------------------------


def depthwise(channels: int, kernel: int, dilation: int = 1, bias: bool = False) -> nn.Conv2d:
    """A depthwise convolution that keeps the plane."""
    return nn.Conv2d(channels, channels, kernel, padding=dilation * (kernel // 2), dilation=dilation, groups=channels, bias=bias)


@final
class DilatedReparamBlock(nn.Module):
    """``BN(large kernel) + sum of BN(dilated small kernels)`` in training (Fig. 2); :meth:`merge` gives the one kernel that does the same in eval mode."""

    def __init__(self, channels: int, kernel: int) -> None:
        super().__init__()
        if kernel not in BRANCHES:
            raise Mistake(f"unireplknet: kernel {kernel} has no dilated branches; it must be one of {', '.join(map(str, BRANCHES))}, or give dilated=False")
        self.origin, self.origin_bn = depthwise(channels, kernel), nn.BatchNorm2d(channels)
        self.branches = nn.ModuleList(nn.Sequential(depthwise(channels, k, r), nn.BatchNorm2d(channels)) for k, r in BRANCHES[kernel])

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        y = self.origin_bn(self.origin(x))
        for branch in self.branches:
            y = y + branch(x)
        return y

    @torch.no_grad()
    def merge(self) -> nn.Conv2d:
        """One large kernel with a bias; this block stays as it is."""
        weight, bias = fused(self.origin, self.origin_bn)
        for branch in self.branches:
            conv, bn = branch.children()
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(bn, nn.BatchNorm2d)
            small, shift = fused(conv, bn)
            dense = dense_kernel(small, conv.dilation[0])
            weight = weight + F.pad(dense, [(weight.shape[2] - dense.shape[2]) // 2] * 4)
            bias = bias + shift
        return _conv_with(self.origin, weight, bias)


@final
class Grn(nn.Module):
    """:func:`global_response` and a bias; both weights begin at 0, so that it does nothing at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma, self.beta = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h w c"]:
        return global_response(x, self.gamma) + self.beta


@final
class DropPath(nn.Module):
    """Stochastic depth: in training each sample's residual branch is left out with chance ``rate``, and else divided by ``1 - rate``."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        if not self.training or not self.rate:
            return x
        kept = x.new_empty((len(x), *[1] * (x.dim() - 1))).bernoulli_(1 - self.rate)
        return x * kept / (1 - self.rate)


@final
class UniRepBlock(nn.Module):
    """``x + droppath(gamma FFN(SE(BN(spatial(x)))))``: LarK with a kernel from 7 on (:class:`DilatedReparamBlock`), SmaK with a smaller one.

    The FFN is, channels last, linear to four times the width, GELU, GRN, linear back without bias, BN. ``gamma`` begins at ``layer_scale``.
    """

    def __init__(self, channels: int, kernel: int, drop_path: float = 0.0, layer_scale: float = 1e-6, se: bool = True, dilated: bool = True) -> None:
        super().__init__()
        self.spatial = DilatedReparamBlock(channels, kernel) if dilated and kernel >= 7 else depthwise(channels, kernel)
        self.norm = nn.BatchNorm2d(channels)
        self.se = Se(channels, r=4) if se else nn.Identity()
        self.expand, self.grn = nn.Linear(channels, 4 * channels), Grn(4 * channels)
        self.reduce, self.reduce_bn = nn.Linear(4 * channels, channels, bias=False), nn.BatchNorm2d(channels)
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        y = self.se(self.norm(self.spatial(x))).permute(0, 2, 3, 1)
        y = self.reduce(self.grn(F.gelu(self.expand(y)))).permute(0, 3, 1, 2)
        return x + self.drop_path(self.gamma[:, None, None] * self.reduce_bn(y))


@final
class MergedBlock(nn.Module):
    """What a :class:`UniRepBlock` is in eval mode, without batch norms: they, GRN's bias and the layer scale stand in the neighbouring weights."""

    @torch.no_grad()
    def __init__(self, block: UniRepBlock) -> None:
        super().__init__()
        spatial = block.spatial.merge() if isinstance(block.spatial, DilatedReparamBlock) else block.spatial
        self.spatial = _conv_with(spatial, *fused(spatial, block.norm))
        self.se, self.expand, self.drop_path = copy.deepcopy(block.se), copy.deepcopy(block.expand), copy.deepcopy(block.drop_path)
        self.gamma = nn.Parameter(block.grn.gamma.clone())
        scale, shift = affine(block.reduce_bn)
        self.reduce = nn.Linear(block.reduce.in_features, block.reduce.out_features, device="meta")
        self.reduce.weight = nn.Parameter(block.reduce.weight * (block.gamma * scale)[:, None])
        self.reduce.bias = nn.Parameter(block.gamma * (scale * (block.reduce.weight @ block.grn.beta) + shift))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        y = self.se(self.spatial(x)).permute(0, 2, 3, 1)
        return x + self.drop_path(self.reduce(global_response(F.gelu(self.expand(y)), self.gamma)).permute(0, 3, 1, 2))


def _conv_with(like: nn.Conv2d, weight: Tensor, bias: Tensor) -> nn.Conv2d:
    made = nn.Conv2d(like.in_channels, like.out_channels, like.kernel_size, padding=like.padding, groups=like.groups, device="meta")  # type: ignore[arg-type]
    made.weight, made.bias = nn.Parameter(weight), nn.Parameter(bias)
    return made


def merge_reparam(model: nn.Module) -> nn.Module:
    """A copy of ``model`` whose blocks are merged: equal scores in eval mode up to rounding, fewer parameters and multiply-adds; the original stays.

    ``model`` is a UniRepLKNet or anything that holds its blocks, such as an answer. Raises Mistake where there is none.
    """
    made = copy.deepcopy(model)
    places = find(made, types=(UniRepBlock,))
    if not places:
        raise Mistake(f"merge_reparam: {type(model).__name__} has no UniRepBlock to merge; it takes a unireplknet that is not merged yet")
    swap(made, places, lambda name, block: MergedBlock(block))  # type: ignore[arg-type]
    return made


@final
class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each position."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return F.layer_norm(x.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


@final
class UniRepLKNet(Headed):
    """Stem, stages of :class:`UniRepBlock` whose width doubles, each after the first behind a conv3x3 of stride 2; mean over positions, LN, a linear head.

    ``depths``: blocks a stage. ``width``: channels of the first. ``kernels``: for each stage the kernels of its blocks, repeated in turn, so ``(13, 3, 3)``
    is one large and two small ones (the paper's third guideline); ``se`` and ``dilated`` switch the first two. ``stem``: pixels a step of the first stage;
    4 is the paper's two convs. ``drop_path``: the last block's chance to be skipped in training, rising from 0.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depths: Sequence[int] = (2, 2, 6, 2),
        width: int = 40,
        kernels: Sequence[Sequence[int]] = ((3,), (13,), (13,), (13,)),
        stem: int = 4,
        drop_path: float = 0.0,
        layer_scale: float = 1e-6,
        se: bool = True,
        dilated: bool = True,
    ) -> None:
        super().__init__()
        if not depths or min(depths) < 1 or len(kernels) != len(depths) or not all(kernels):
            raise Mistake(f"unireplknet: depths={tuple(depths)}, kernels={tuple(map(tuple, kernels))}: every stage needs a block, and kernels for its blocks")
        if any(k < 1 or k % 2 == 0 for row in kernels for k in row):
            raise Mistake(f"unireplknet: kernels={tuple(map(tuple, kernels))}: kernels are odd, so that the plane keeps its size; 3, 7 or 13 are usual")
        if stem not in (1, 2, 4) or width < 2 or not layer_scale > 0 or not 0 <= drop_path < 1:
            raise Mistake(
                f"unireplknet: stem={stem}, width={width}, layer_scale={layer_scale}, drop_path={drop_path}: stem is 1, 2 or 4, width at least 2, "
                "layer_scale above 0, drop_path from 0 to below 1"
            )
        self.num_classes, self.in_chans = num_classes, in_chans
        widths = [width * 2**i for i in range(len(depths))]
        self.num_features = widths[-1]
        rates = iter(torch.linspace(0, drop_path, sum(depths), device="cpu").tolist())
        self.stages = nn.ModuleList()
        for i, (count, c) in enumerate(zip(depths, widths, strict=True)):
            entry = _stem(in_chans, c, stem) if i == 0 else nn.Sequential(nn.Conv2d(c // 2, c, 3, 2, 1), ChannelNorm(c))
            sizes = itertools.islice(itertools.cycle(kernels[i]), count)
            self.stages.append(nn.Sequential(entry, *(UniRepBlock(c, k, next(rates), layer_scale, se, dilated) for k in sizes)))
        self.feature_info = maps(*((f"stages.{i}", c, stem * 2**i) for i, c in enumerate(widths)))
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.fc = nn.Linear(self.num_features, num_classes)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        for stage in self.stages:
            x = stage(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions, normalised."""
        return self.norm(features.mean((2, 3)))


def _stem(in_chans: int, width: int, step: int) -> nn.Sequential:
    if step < 4:
        return nn.Sequential(nn.Conv2d(in_chans, width, 3, step, 1), ChannelNorm(width))
    half = width // 2
    return nn.Sequential(nn.Conv2d(in_chans, half, 3, 2, 1), ChannelNorm(half), nn.GELU(), nn.Conv2d(half, width, 3, 2, 1), ChannelNorm(width))
