"""Residual Attention Network: a pre-activation ResNet whose stages carry hourglass masks M, and features become (1 + M) T."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, final

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="residual-attention-network",
    kind="backbone",
    paper="residual-attention-network",
    title="Residual Attention Network for Image Classification",
    year=2017,
    url="https://arxiv.org/abs/1704.06904",
    accepts=("image",),
    departs=(
        "max-pools have a margin of one pixel, where the windows of the released networks overhang the far edge; the sizes are equal for even sides",
        "the widths of the CIFAR nets (64, 128, 256, and three last units of 256 that do not halve) are ours, set to meet the sizes that the paper prints",
        "the mini size has narrow stages and an hourglass of one level less in the first two",
    ),
    tiny={"modules": (1, 1), "widths": (4, 8), "downs": (2, 1), "tail": (8, 1), "stem": "small", "base": 4},
    variants={
        "residual-attention-mini": {"widths": (16, 32, 64), "downs": (2, 1, 1), "tail": (64, 1), "stem": "small", "base": 16},
        "attention56": {},
        "attention92": {"modules": (1, 2, 3)},
        "attention56-cifar": {"modules": (1, 1, 1), "widths": (64, 128, 256), "tail": (256, 1), "stem": "small", "base": 16},
        "attention92-cifar": {"modules": (2, 2, 2), "widths": (64, 128, 256), "tail": (256, 1), "stem": "small", "base": 16},
        "attention128-cifar": {"modules": (3, 3, 3), "widths": (64, 128, 256), "tail": (256, 1), "stem": "small", "base": 16},
        "attention164-cifar": {"modules": (4, 4, 4), "widths": (64, 128, 256), "tail": (256, 1), "stem": "small", "base": 16},
        "attention236-cifar": {"modules": (6, 6, 6), "widths": (64, 128, 256), "tail": (256, 1), "stem": "small", "base": 16},
        "attention452-cifar": {"modules": (12, 12, 12), "widths": (64, 128, 256), "tail": (256, 1), "stem": "small", "base": 16},
    },
    small=("residual-attention-mini",),
    published={
        "attention56": {"size": 224, "classes": 1000, "parameters": 31.9e6, "macs": 6.2e9, "why": "the paper prints two figures, 6.2 G; ours are 6.27"},
        "attention92": {
            "size": 224,
            "classes": 1000,
            "parameters": 51.3e6,
            "macs": 10.4e9,
            "why": "the released network has 52,332,712 weights without batch normalisation, and so has ours; the paper prints 51.3 M",
        },
        "attention92-cifar": {"size": 32, "classes": 10, "parameters": 1.9e6, "why": "1.93 M without batch normalisation; the paper prints two figures"},
        "attention236-cifar": {"size": 32, "classes": 10, "parameters": 5.1e6, "why": "5.13 M without batch normalisation, which the paper does not count"},
        "attention452-cifar": {
            "size": 32,
            "classes": 10,
            "parameters": 8.6e6,
            "why": "the printed sizes grow by 0.80 M a module from 92 to 236 layers and by 0.58 M from 236 to 452: no one set of widths meets all",
        },
    },
)


def attend(trunk: Float[Tensor, "n c h w"], mask: Float[Tensor, "n c h w"], mode: Literal["arl", "nal"] = "arl") -> Float[Tensor, "n c h w"]:
    """Attention residual learning ``(1 + M) T`` (eq. 3), or naive attention learning ``M T`` (eq. 1)."""
    return (1 + mask) * trunk if mode == "arl" else mask * trunk


def activate(x: Float[Tensor, "n c h w"], kind: Literal["mixed", "channel", "spatial"] = "mixed") -> Float[Tensor, "n c h w"]:
    """The mask of the hourglass's output: "mixed" a sigmoid (eq. 4), "channel" each position's vector over its length (eq. 5), "spatial" a sigmoid
    of each channel's map less its mean and over its deviation (eq. 6)."""
    if kind == "channel":
        return x / x.norm(dim=1, keepdim=True).clamp_min(1e-6)
    if kind == "spatial":
        x = (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), correction=0, keepdim=True).clamp_min(1e-6)
    return x.sigmoid()


@final
class Unit(nn.Module):
    """The pre-activation residual unit: BN, ReLU, 1x1 to a quarter, BN, ReLU, 3x3, BN, ReLU, 1x1; where the shape changes, a 1x1 conv of the
    activated input as the shortcut."""

    def __init__(self, c_in: int, c_out: int, stride: int = 1) -> None:
        super().__init__()
        width = c_out // 4
        self.entry = nn.Sequential(nn.BatchNorm2d(c_in), nn.ReLU(inplace=True))
        self.branch = nn.Sequential(
            nn.Conv2d(c_in, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, c_out, 1, bias=False),
        )
        self.shortcut = nn.Conv2d(c_in, c_out, 1, stride, bias=False) if stride > 1 or c_in != c_out else None

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        y = self.entry(x)
        return self.branch(y) + (x if self.shortcut is None else self.shortcut(y))


def units(count: int, channels: int) -> nn.Sequential:
    """``count`` units of one width."""
    return nn.Sequential(*(Unit(channels, channels) for _ in range(count)))


@final
class Hourglass(nn.Module):
    """The soft mask branch: ``down`` times a 3x3 max-pool of stride 2 and ``r`` units (2r at the lowest level), then up again.

    Each level on the way up is the resized one below it plus a unit of the level's own map on the way down, then ``r`` units; the last resize
    has no such skip. Two 1x1 convs end it.
    """

    def __init__(self, channels: int, down: int, r: int) -> None:
        super().__init__()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.down = nn.ModuleList(units(r if i < down - 1 else 2 * r, channels) for i in range(down))
        self.skip = nn.ModuleList(Unit(channels, channels) for _ in range(down - 1))
        self.up = nn.ModuleList(units(r, channels) for _ in range(down - 1))
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1, bias=False)]
        self.ending = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        levels = [x]
        for down in self.down:
            levels.append(down(self.pool(levels[-1])))
        y = levels.pop()
        for skip, up in zip(reversed(self.skip), reversed(self.up), strict=True):
            y = up(resized(y, levels[-1]) + skip(levels.pop()))
        return self.ending(resized(y, x))


def resized(x: Float[Tensor, "n c i j"], like: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Bilinear, corner on corner."""
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)


@final
class AttentionModule(nn.Module):
    """``p`` units; a trunk of ``t`` units and a mask from the same map, joined by :func:`attend`; ``p`` units (Fig. 2)."""

    def __init__(
        self,
        channels: int,
        down: int,
        p: int = 1,
        t: int = 2,
        r: int = 1,
        mode: Literal["arl", "nal"] = "arl",
        mask: Literal["mixed", "channel", "spatial"] = "mixed",
    ) -> None:
        super().__init__()
        self.mode, self.kind = mode, mask
        self.before, self.trunk, self.after = units(p, channels), units(t, channels), units(p, channels)
        self.mask = Hourglass(channels, down, r)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        x = self.before(x)
        return self.after(attend(self.trunk(x), activate(self.mask(x), self.kind), self.mode))


@final
class ResidualAttentionNetwork(Headed):
    """Stem; for each of ``widths`` a unit (of stride 2 after the first) and attention modules; three plain units; BN, ReLU, mean, a linear head.

    ``modules`` are attention modules a stage, ``downs`` the levels of their hourglasses; ``tail`` is (width, stride) of the three last units;
    ``p``, ``t``, ``r``, ``mode``, ``mask`` as in :class:`AttentionModule`. ``stem`` "photo" is 7x7 of stride 2 and a max-pool, "small" one 3x3 conv;
    ``base`` its channels. With m modules in each of three stages the trunk is 36 m + 20 layers deep, which names the sizes.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        modules: Sequence[int] = (1, 1, 1),
        widths: Sequence[int] = (256, 512, 1024),
        downs: Sequence[int] = (3, 2, 1),
        tail: Sequence[int] = (2048, 2),
        p: int = 1,
        t: int = 2,
        r: int = 1,
        mode: Literal["arl", "nal"] = "arl",
        mask: Literal["mixed", "channel", "spatial"] = "mixed",
        stem: Literal["photo", "small"] = "photo",
        base: int = 64,
    ) -> None:
        super().__init__()
        if not len(modules) == len(widths) == len(downs) > 0 or min(*downs, p, t, r) < 1:
            raise Mistake(
                f"residual-attention-network: modules={tuple(modules)}, widths={tuple(widths)}, downs={tuple(downs)}, p={p}, t={t}, r={r}: "
                "give one number a stage each, and at least 1 of downs, p, t and r"
            )
        if any(width % 4 or width < 4 for width in (*widths, tail[0])):
            raise Mistake(
                f"residual-attention-network: widths={tuple(widths)}, tail={tuple(tail)}: a unit works at a quarter of its width; give multiples of 4"
            )
        photo = stem == "photo"
        self.num_classes, self.in_chans, self.num_features, self.stages = num_classes, in_chans, tail[0], len(widths) + 1
        self.conv1 = nn.Conv2d(in_chans, base, 7 if photo else 3, 2 if photo else 1, 3 if photo else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.stem = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1) if photo else nn.Identity())
        c_in, step, rows = base, 4 if photo else 1, []
        for i, (count, width, down) in enumerate(zip(modules, widths, downs, strict=True)):
            step *= 2 if i else 1
            stage = [AttentionModule(width, down, p, t, r, mode, mask) for _ in range(count)]
            setattr(self, f"layer{i + 1}", nn.Sequential(Unit(c_in, width, 2 if i else 1), *stage))
            rows.append((f"layer{i + 1}", width, step))
            c_in = width
        setattr(self, f"layer{self.stages}", nn.Sequential(Unit(c_in, *tail), *units(2, tail[0])))
        self.feature_info = maps(*rows, (f"layer{self.stages}", tail[0], step * tail[1]))
        self.norm = nn.BatchNorm2d(tail[0])
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(tail[0], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map, normalised and rectified."""
        x = self.stem(self.bn1(self.conv1(x)))
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.act(self.norm(x))

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))
