"""HaloNet: residual bottlenecks whose 3x3 convolution is self-attention in blocks that look over their border, in the paper's sizes and a small one."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch.nn.functional as F
from jaxtyping import Float
from timm.layers.halo_attn import HaloAttn
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="halonet",
    kind="backbone",
    paper="halonet",
    title="Scaling Local Self-Attention for Parameter Efficient Visual Backbones",
    year=2021,
    url="https://arxiv.org/abs/2103.12731",
    accepts=("image",),
    optimizer="adamw:lr=0.001,weight_decay=0.05",
    departs=(
        "keys beyond the border of a map are zeros and take part in the softmax, as in timm; the paper does not say whether they are masked",
        "a map whose sides the blocks do not divide is padded with zeros and cut back, so that any image will do",
        "4, 8, 8, 8 heads over the stages and the settings of H3 to H6 are those that give the printed counts; the authors released no code, timm has 8 heads",
        "halonet-mini is ours, for 28 to 64 pixels; halonet26t and halonet50ts are timm's hybrids, not the paper's",
    ),
    tiny={"layers": (1, 1), "widths": (4, 8), "heads": (1, 2), "block": 2, "halo": 1, "stem": "small"},
    variants={
        "halonet-mini": {"layers": (1, 2, 1), "widths": (24, 48, 96), "heads": (2, 4, 8), "block": 4, "halo": 1, "stem": "small"},
        "halonet-h0": {"layers": (3, 3, 7, 3), "rb": 0.5},
        "halonet-h1": {"layers": (3, 3, 10, 3)},
        "halonet-h2": {"layers": (3, 3, 11, 3), "rb": 1.25},
        "halonet-h3": {"layers": (3, 3, 12, 3), "rb": 1.5, "block": 10, "final": 1024},
        "halonet-h4": {"layers": (3, 3, 12, 3), "rb": 3, "block": 12, "halo": 2, "final": 1280},
        "halonet-h5": {"layers": (3, 3, 23, 3), "rb": 2, "rv": 2.5, "block": 14, "halo": 2, "final": 1536},
        "halonet-h6": {"layers": (3, 3, 24, 3), "rb": 2.75, "rv": 3, "halo": 4, "final": 1536},
        "halonet-h7": {"layers": (3, 3, 26, 3), "rb": 3.5, "rv": 4, "block": 10, "final": 2048},
        "halonet26t": {"hybrid": "halonet26t"},
        "halonet50ts": {"hybrid": "halonet50ts"},
    },
    small=("halonet-mini",),
    published={
        "halonet-h0": {"size": 256, "classes": 1000, "parameters": 5.5e6, "macs": 2.35e9},
        "halonet-h1": {"size": 256, "classes": 1000, "parameters": 8.1e6, "macs": 2.99e9},
        "halonet-h2": {"size": 256, "classes": 1000, "parameters": 9.4e6, "macs": 3.31e9},
        "halonet-h3": {"size": 320, "classes": 1000, "parameters": 11.8e6},
        "halonet-h4": {"size": 384, "classes": 1000, "parameters": 19.1e6},
        "halonet-h5": {"size": 448, "classes": 1000, "parameters": 30.7e6},
        "halonet-h6": {"size": 512, "classes": 1000, "parameters": 43.4e6},
        "halonet-h7": {"size": 600, "classes": 1000, "parameters": 67.4e6},
        "halonet26t": {"size": 256, "classes": 1000, "parameters": 12480288, "macs": 3.17e9},
        "halonet50ts": {"size": 256, "classes": 1000, "parameters": 22733280, "macs": 5.27e9},
    },
)


@dataclass(frozen=True)
class Cost:
    """What local attention takes: ``keys`` that a query sees, ``copies`` of each key and value in memory, numbers of all attention ``weights``,
    ``macs`` of the two products with keys and values."""

    keys: int
    copies: float
    weights: int
    macs: int


def cost(side: int, channels: int, heads: int, block: int, halo: int) -> Cost:
    """:class:`Cost` of attention on a square map of ``side`` pixels.

    Blocks of 8 with a halo of 3: 196 keys and 3.06 copies. Blocks of 1 are a window a pixel, 49 keys and 49 copies for 7x7; one of ``side`` is global.
    """
    keys = (block + 2 * halo) ** 2
    queries = (-(-side // block) * block) ** 2
    return Cost(keys, keys / block**2, queries * keys * heads, 2 * queries * keys * channels)


@final
class AnySide(nn.Module):
    """timm's blocked local attention, which needs whole blocks, on a map of any size: zeros beyond its right and lower side, cut off again."""

    def __init__(self, attn: HaloAttn) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        (h, w), b, s = x.shape[2:], self.attn.block_size, self.attn.block_stride
        y = self.attn(F.pad(x, (0, -w % b, 0, -h % b)) if h % b or w % b else x)
        return y[:, :, : -(-h // s), : -(-w // s)]


def conv(c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """A convolution and batch normalisation."""
    made = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False)
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(made, nn.BatchNorm2d(c_out))


@final
class Bottleneck(nn.Module):
    """1x1 to ``mid`` channels, attention with values of ``mid rv`` channels, 1x1 to ``c_out``; BN and ReLU between, ReLU after the sum.

    Stride 2 keeps every second query of a block in each direction; its window stays (attention downsampling).
    """

    def __init__(self, c_in: int, mid: int, c_out: int, heads: int, block: int, halo: int, stride: int, rv: float) -> None:
        super().__init__()
        values = round(mid * rv)
        self.conv1 = conv(c_in, mid)
        self.attn = AnySide(HaloAttn(mid, values, stride=stride, num_heads=heads, dim_head=mid // heads, block_size=block, halo_size=halo))
        self.norm = nn.BatchNorm2d(values)
        self.conv3 = conv(values, c_out)
        nn.init.zeros_(self.conv3[1].weight)  # type: ignore[arg-type]  # the block starts as its shortcut
        self.shortcut = nn.Identity() if stride == 1 and c_in == c_out else conv(c_in, c_out, 1, stride)
        self.act = nn.ReLU()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        y = self.attn(self.act(self.conv1(x)))
        return self.act(self.conv3(self.act(self.norm(y))) + self.shortcut(x))


@final
class HaloResNet(Headed):
    """A stem, stages of :class:`Bottleneck`, perhaps a last 1x1 convolution, mean over positions, a linear head; arguments as in :func:`halonet`."""

    def __init__(
        self,
        num_classes: int,
        in_chans: int,
        layers: Sequence[int],
        widths: Sequence[int],
        heads: Sequence[int],
        block: int,
        halo: int,
        rv: float,
        rb: float,
        final: int,
        stem: str,
    ) -> None:
        super().__init__()
        photo, c_in, rows = stem == "photo", widths[0], []
        self.num_classes, self.in_chans, self.stages = num_classes, in_chans, len(layers)
        pool = nn.MaxPool2d(3, 2, 1) if photo else nn.Identity()
        self.stem = nn.Sequential(*conv(in_chans, c_in, 7 if photo else 3, 2 if photo else 1), nn.ReLU(), pool)
        for i, (count, mid) in enumerate(zip(layers, widths, strict=True)):
            blocks, c_out = [], round(mid * rb)
            for j in range(count):
                blocks.append(Bottleneck(c_in, mid, c_out, heads[i], block, halo, 2 if i and j == 0 else 1, rv))
                c_in = c_out
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            rows.append((f"layer{i + 1}", c_out, (4 if photo else 1) * 2**i))
        self.feature_info = maps(*rows)
        self.last = nn.Sequential(*conv(c_in, final), nn.ReLU()) if final else nn.Identity()
        self.num_features = final or c_in
        self.fc = nn.Linear(self.num_features, num_classes)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        x = self.stem(x)
        for i in range(self.stages):
            x = getattr(self, f"layer{i + 1}")(x)
        return self.last(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))


def halonet(
    num_classes: int = 10,
    in_chans: int = 3,
    layers: Sequence[int] = (3, 3, 10, 3),
    widths: Sequence[int] = (64, 128, 256, 512),
    heads: Sequence[int] = (4, 8, 8, 8),
    block: int = 8,
    halo: int = 3,
    rv: float = 1,
    rb: float = 1,
    final: int = 0,
    stem: str = "photo",
    hybrid: str | None = None,
) -> nn.Module:
    """HaloNet, in images of any size.

    ``layers`` blocks, ``widths`` channels inside them and ``heads`` a stage; each stage after the first halves the side. Attention in blocks of
    ``block`` pixels whose window goes ``halo`` further on every side. Values have ``rv`` times, a block's output ``rb`` times its width; ``final``
    channels of a last 1x1 convolution, 0 for none. ``stem`` "photo" is 7x7 of stride 2 and a max-pool, "small" 3x3. ``hybrid`` is timm's
    network of that name, convolutions first and attention in the last stages, for which nothing else is to be set.
    """
    if hybrid is not None:
        usual = [option.default for option in inspect.signature(halonet).parameters.values()]
        if [layers, widths, heads, block, halo, rv, rb, final, stem] != usual[2:-1]:
            raise Mistake(f"halonet: hybrid={hybrid!r} is timm's network as it stands; leave the other options out")
        return mixed(hybrid, num_classes, in_chans)
    if not layers or min(layers) < 1 or not len(layers) == len(widths) == len(heads):
        raise Mistake(f"halonet: layers={tuple(layers)}, widths={tuple(widths)}, heads={tuple(heads)}: one number a stage each, at least one block")
    if any(width % head or round(width * rv) % head for width, head in zip(widths, heads, strict=True)):
        raise Mistake(f"halonet: widths={tuple(widths)}, rv={rv}, heads={tuple(heads)}: a stage's width, and rv times it, must be a multiple of its heads")
    if stem not in ("small", "photo"):
        raise Mistake(f"halonet: stem={stem!r} must be 'small' or 'photo'")
    if block < 2 or block % 2 or halo < 0:
        raise Mistake(f"halonet: block={block}, halo={halo}: a block has an even side, of which stride 2 keeps half, and a halo of 0 or more pixels")
    return HaloResNet(num_classes, in_chans, layers, widths, heads, block, halo, rv, rb, final, stem)


def mixed(name: str, num_classes: int, in_chans: int) -> nn.Module:
    """timm's hybrid ``name``, its attention on maps of any size."""
    import timm

    if name not in ("halonet26t", "halonet50ts"):
        raise Mistake(f"halonet: hybrid={name!r} must be 'halonet26t' or 'halonet50ts'")
    model = timm.create_model(name, num_classes=num_classes, in_chans=in_chans)
    for module in list(model.modules()):
        found = getattr(module, "self_attn", None)
        if isinstance(found, HaloAttn):
            module.self_attn = AnySide(found)
    return model
