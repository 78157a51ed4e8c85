"""SpaRTAN: a light convolutional network whose spatial mixer joins plain and dilated paths and whose channel mixer turns features like waves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.backbones.unireplknet import DropPath
from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.layers.se import Se
from convince.parts import Card

CARD = Card(
    part="spartan",
    kind="backbone",
    paper="spartan",
    title="SpaRTAN: Spatial Reinforcement Token-based Aggregation Network for Visual Recognition",
    year=2025,
    url="https://arxiv.org/abs/2507.10999",
    accepts=("image",),
    optimizer="adamw:lr=0.0025,weight_decay=0.03",
    departs=(
        "stem=1 and stem=2 leave strides out of the stem's two convs, for images up to about 64 px; the paper's step is 4",
        "spartan-mini begins with layer scales of 0.1: the paper's 0.00001 is for far more steps than small sets give",
        "the 21.5 M parameters of the paper's detector are those of RT-DETR around the network; its released code has no other size of the network",
    ),
    tiny={"dims": (8, 16), "depths": (1, 1), "expand": (2, 2), "stem": 1, "layer_scale": 0.1},
    variants={
        "spartan-mini": {"dims": (16, 32, 64), "depths": (1, 2, 1), "expand": (4, 2, 2), "stem": 1, "layer_scale": 0.1},
        "spartan-t": {"dims": (32, 64, 128, 256), "depths": (3, 3, 12, 2), "expand": (4, 4, 2, 2)},
    },
    small=("spartan-mini",),
    published={"spartan-t": {"size": 224, "classes": 1000, "parameters": 3820296, "macs": 0.80e9}},
)


# -- pure functions ----------------------------------------------------------------------------------


def aggregate(x: Float[Tensor, "n c h w"], weight: Float[Tensor, "n d h w"], theta: Float[Tensor, "n d h w"]) -> Float[Tensor, "n d h w"]:
    """``weight theta + weight[k] theta[k]`` with ``k`` the channel in which ``x`` is largest at each place; that term is one map for all channels."""
    strongest = x.argmax(1, keepdim=True)
    return weight * theta + weight.gather(1, strongest) * theta.gather(1, strongest)


def wave(f: Float[Tensor, "n d h w"], turn: Float[Tensor, "m 2"]) -> Float[Tensor, "n d h w"]:
    """Channels two by two as complex numbers (real, imaginary), times ``turn``, one complex number (real, imaginary) for each of the ``m = d / 2`` pairs.

    In full precision at least: bf16 comes back as fp32.
    """
    pairs = f.to(torch.promote_types(f.dtype, torch.float32)).unflatten(1, (-1, 2))
    a, b = pairs[:, :, 0], pairs[:, :, 1]
    p, q = turn[:, 0, None, None], turn[:, 1, None, None]
    return torch.stack((p * a - q * b, p * b + q * a), 2).flatten(1, 2)


# -- modules -----------------------------------------------------------------------------------------


def conv_norm_act(c_in: int, c_out: int, kernel: int, act: type[nn.Module] = nn.GELU, **options: int) -> nn.Sequential:
    """A convolution without bias (``options`` are nn.Conv2d's), batch norm, an activation."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, bias=False, **options), nn.BatchNorm2d(c_out, eps=1e-6), act())  # type: ignore[arg-type]


@final
class SMixer(nn.Module):
    """Half the channels, what differs from their mean made a little stronger, then a 3x3 path and a dilated one, each behind SE, side by side.

    ``dense``: ordinary convolutions; else depthwise. ``dilation`` of the second path's two convs: 2, and 1 takes the wide view away.
    """

    def __init__(self, channels: int, dense: bool, dilation: int = 2) -> None:
        super().__init__()
        half = channels // 2
        groups = 1 if dense else half
        self.enter, self.leave = nn.Conv2d(channels, half, 1), nn.Conv2d(channels, channels, 1)
        self.gamma = nn.Parameter(torch.full((half,), 1e-5))
        self.near = conv_norm_act(half, half, 3, padding=1, groups=groups)
        wide = {"padding": dilation, "dilation": dilation, "groups": groups}
        self.far = nn.Sequential(nn.Conv2d(half, half, 3, bias=False, **wide), conv_norm_act(half, half, 3, **wide))  # type: ignore[arg-type]
        self.near_se, self.far_se = Se(half, r=4), Se(half, r=4)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        u = self.enter(x)
        u = u + self.gamma[:, None, None] * (u - u.mean((2, 3), keepdim=True))
        return self.leave(torch.cat([self.near_se(self.near(u)), self.far_se(self.far(u))], 1))


@final
class CMixer(nn.Module):
    """Amplitude times phase (:func:`aggregate`), turned by learned complex numbers (:func:`wave`), conv3x3, SE, and back to ``channels``.

    ``expand``: channels inside over ``channels``. ``dense`` as in :class:`SMixer` of the same block: there this conv is depthwise, else of ``channels`` groups.
    """

    def __init__(self, channels: int, expand: int, dense: bool) -> None:
        super().__init__()
        neck = channels * expand
        self.theta, self.weight, self.leave = nn.Conv2d(channels, neck, 1), nn.Conv2d(channels, neck, 1), nn.Conv2d(neck, channels, 1)
        self.turn = nn.Parameter(torch.randn(neck // 2, 2))
        self.conv = conv_norm_act(neck, neck, 3, padding=1, groups=neck if dense else channels)
        self.se = Se(neck, r=4 * expand)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        f = aggregate(x, self.weight(x), F.gelu(self.theta(x)))
        return self.leave(self.se(self.conv(wave(f, self.turn))))


@final
class SpartanBlock(nn.Module):
    """``x + droppath(s1 SMixer(norm x))``, then ``x + droppath(s2 CMixer(norm x))``; the norm is over all channels and places of a sample."""

    def __init__(self, channels: int, expand: int, dense: bool, dilation: int, drop_path: float, layer_scale: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(1, channels, eps=1e-6), nn.GroupNorm(1, channels, eps=1e-6)
        self.smixer, self.cmixer = SMixer(channels, dense, dilation), CMixer(channels, expand, dense)
        self.scale1, self.scale2 = (nn.Parameter(torch.full((channels, 1, 1), layer_scale)) for _ in range(2))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        x = x + self.drop_path(self.scale1 * self.smixer(self.norm1(x)))
        return x + self.drop_path(self.scale2 * self.cmixer(self.norm2(x)))


@final
class Spartan(Headed):
    """Two convs of 3x3 as the stem, stages of :class:`SpartanBlock`, conv2x2 of stride 2 with BN and SiLU between them; mean over positions, a linear head.

    ``dims``: channels of each stage, multiples of 8; ``depths``: its blocks; ``expand``: its channel mixers' expansion, from 2. The first half of the
    stages mixes space with dense convs. ``stem``: pixels a step of the first stage, 1, 2 or 4. ``drop_path``: stochastic depth, rising from 0 towards
    this. Raises Mistake for an image that is too small for the stages.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        dims: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (3, 3, 12, 2),
        expand: Sequence[int] = (4, 4, 2, 2),
        stem: int = 4,
        dilation: int = 2,
        drop_path: float = 0.1,
        layer_scale: float = 1e-5,
    ) -> None:
        super().__init__()
        if not dims or not len(dims) == len(depths) == len(expand) or min(depths) < 1 or min(expand) < 2:
            raise Mistake(f"spartan: dims={tuple(dims)}, depths={tuple(depths)}, expand={tuple(expand)}: one number a stage each, depths from 1, expand from 2")
        if any(d < 8 or d % 8 for d in dims) or stem not in (1, 2, 4) or dilation < 1 or not 0 <= drop_path < 1:
            raise Mistake(
                f"spartan: dims={tuple(dims)}, stem={stem}, dilation={dilation}, drop_path={drop_path}: dims are multiples of 8, stem is 1, 2 or 4, "
                "dilation at least 1, drop_path from 0 to below 1"
            )
        self.num_classes, self.num_features, self.in_chans = num_classes, dims[-1], in_chans
        first, second = {1: (1, 1), 2: (2, 1), 4: (2, 2)}[stem]
        half = dims[0] // 2
        self.stem = nn.Sequential(conv_norm_act(in_chans, half, 3, stride=first, padding=1), conv_norm_act(half, dims[0], 3, stride=second, padding=1))
        self.stages, made = nn.ModuleList(), 0
        for i, (channels, count) in enumerate(zip(dims, depths, strict=True)):
            stage = nn.Sequential() if i == 0 else nn.Sequential(conv_norm_act(dims[i - 1], channels, 2, nn.SiLU, stride=2))
            for _ in range(count):
                stage.append(SpartanBlock(channels, expand[i], i < len(dims) // 2, dilation, drop_path * made / sum(depths), layer_scale))
                made += 1
            self.stages.append(stage)
        self.feature_info = maps(*((f"stages.{i}", channels, stem * 2**i) for i, channels in enumerate(dims)))
        self.fc = nn.Linear(dims[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
                nn.init.normal_(module.weight, 0, math.sqrt(2 / fan_out))
            elif isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
            if isinstance(module, (nn.Conv2d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        rows, columns = x.shape[2:]
        x = self.stem(x)
        if min(x.shape[2:]) < 2 ** (len(self.stages) - 1):
            raise Mistake(f"spartan: {rows}x{columns} pixels are too few for {len(self.stages)} stages, each half as wide; give fewer stages or a smaller stem")
        for stage in self.stages:
            x = stage(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))
