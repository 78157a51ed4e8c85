"""ThresholdNet: a DenseNet that keeps all links in the blocks before a threshold and only those of powers of two in the blocks after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="thresholdnet",
    kind="backbone",
    paper="thresholdnet",
    title="New Pruning Method Based on DenseNet Network for Image Classification",
    year=2021,
    url="https://arxiv.org/abs/2108.12604",
    accepts=("image",),
    departs=(
        "the table of blocks is that of the authors' next paper (ThreshNet, 2022), whose 79-layer net has the size and the accuracy reported for this one",
        "a 2x2 max-pool keeps an odd last row and column, so that images of any side pass; the released code drops them",
        "the HarDNets have ReLU, where the released ones have ReLU6 and dropout before the head",
        "the mini size has narrow blocks and a stem that keeps the side",
    ),
    tiny={"layers": (2, 4), "growth": (4, 4), "transitions": (8, 8), "halve": (1,), "thr": 1, "stem": (4,)},
    variants={
        "thresholdnet-mini": {"layers": (4, 8, 8), "growth": (8, 8, 8), "transitions": (32, 48, 64), "halve": (1, 1), "thr": 1, "stem": (16,)},
        "threshnet79": {},
        "threshnet95": {"layers": (6, 12, 16, 16, 4), "transitions": (128, 256, 384, 480, 960)},
        "hardnet68": {
            "layers": (8, 16, 16, 16, 4),
            "growth": (14, 16, 20, 40, 160),
            "transitions": (128, 256, 320, 640, 1024),
            "halve": (1, 0, 1, 1),
            "thr": 0,
        },
        "hardnet85": {
            "layers": (8, 16, 16, 16, 16, 4),
            "growth": (24, 24, 28, 36, 48, 256),
            "transitions": (192, 256, 320, 480, 720, 1280),
            "halve": (1, 0, 1, 0, 1),
            "thr": 0,
            "stem": (48, 96),
        },
    },
    small=("thresholdnet-mini",),
    published={
        "thresholdnet": {"size": 224, "classes": 1000, "parameters": 15.32e6},
        "threshnet79": {"size": 224, "classes": 10, "parameters": 14371858, "macs": 3.42e9},
        "threshnet95": {"size": 224, "classes": 10, "parameters": 16189202, "macs": 4.03e9},
        "hardnet68": {"size": 224, "classes": 1000, "parameters": 17.57e6, "macs": 4.26e9},
        "hardnet85": {"size": 224, "classes": 1000, "parameters": 36.67e6, "macs": 9.10e9},
    },
    optimizer="adamw:lr=0.001,weight_decay=0.0",
)


def links(layer: int) -> list[int]:
    """The layers that ``layer`` (from 1) of a harmonic block reads: ``layer - 2^i`` wherever ``2^i`` divides it; 0 is the block's input."""
    return [layer - 2**i for i in range(layer.bit_length()) if layer % 2**i == 0]


def harmonic(n: int, c_in: int, growth: int, m: float = 1.7) -> list[tuple[int, int, list[int]]]:
    """For layers 1 to ``n``: channels in, channels out, and the layers read.

    A layer gives ``growth m^(links - 1)`` channels, to the nearest even number below one more: those that many others read are wider.
    """
    widths, rows = [c_in], []
    for layer in range(1, n + 1):
        read = links(layer)
        widths.append(2 * (int(growth * m ** (len(read) - 1) + 1) // 2))
        rows.append((sum(widths[k] for k in read), widths[-1], read))
    return rows


def conv(c_in: int, c_out: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Conv, BN, ReLU."""
    return nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))


@final
class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 to four times the growth, BN, ReLU, 3x3 to the growth, beside its input."""

    def __init__(self, c_in: int, growth: int) -> None:
        super().__init__()
        neck = 4 * growth
        self.branch = nn.Sequential(
            nn.BatchNorm2d(c_in),
            nn.ReLU(inplace=True),
            nn.Conv2d(c_in, neck, 1, bias=False),
            nn.BatchNorm2d(neck),
            nn.ReLU(inplace=True),
            nn.Conv2d(neck, growth, 3, 1, 1, bias=False),
        )

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        return torch.cat([x, self.branch(x)], 1)


@final
class HarmonicBlock(nn.Module):
    """3x3 convs wired by :func:`harmonic`; answers with the odd layers and the last one side by side."""

    def __init__(self, n: int, c_in: int, growth: int, m: float) -> None:
        super().__init__()
        rows = harmonic(n, c_in, growth, m)
        self.read = [read for _, _, read in rows]
        self.convs = nn.ModuleList(conv(a, b, 3) for a, b, _ in rows)
        self.shown = [layer for layer in range(1, n + 1) if layer % 2 or layer == n]
        self.channels = sum(rows[layer - 1][1] for layer in self.shown)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        made = [x]
        for layer, read in zip(self.convs, self.read, strict=True):
            made.append(layer(torch.cat([made[k] for k in read], 1)))
        return torch.cat([made[layer] for layer in self.shown], 1)


@final
class ThresholdNet(Headed):
    """Stem; blocks, each with a 1x1 conv to its ``transitions``; mean over positions; a linear head.

    Blocks before ``thr`` are chains of :class:`DenseLayer`, those from it on a :class:`HarmonicBlock`: 0 is a HarDNet, ``len(layers)`` dense
    throughout. One number a block: ``layers`` in it, their ``growth``, ``transitions`` its channels; ``halve`` says after which, but the last, a
    2x2 max-pool stands. ``m`` widens layers with many links. ``stem`` are the channels of its 3x3 convs: two of them halve the side twice
    (stride 2, then a max-pool), one keeps it.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        layers: Sequence[int] = (6, 8, 12, 16, 4),
        growth: Sequence[int] = (32, 32, 32, 40, 160),
        transitions: Sequence[int] = (128, 192, 288, 480, 960),
        halve: Sequence[int] = (1, 1, 0, 1),
        thr: int = 3,
        m: float = 1.7,
        stem: Sequence[int] = (32, 64),
    ) -> None:
        super().__init__()
        if not len(layers) == len(growth) == len(transitions) == len(halve) + 1 or min(*layers, *growth, *transitions) < 1:
            raise Mistake(
                f"thresholdnet: layers={tuple(layers)}, growth={tuple(growth)}, transitions={tuple(transitions)}, halve={tuple(halve)}: "
                "give one number of at least 1 a block each, and of halve one fewer"
            )
        if not 0 <= thr <= len(layers) or len(stem) not in (1, 2) or m < 1:
            raise Mistake(
                f"thresholdnet: thr={thr}, stem={tuple(stem)}, m={m}: thr counts blocks, 0 to {len(layers)}; stem is one number or two; m is at least 1"
            )
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, transitions[-1]
        first = conv(in_chans, stem[0], 3, 2 if len(stem) == 2 else 1)
        self.stem = nn.Sequential(first, conv(stem[0], stem[1], 3), nn.MaxPool2d(3, 2, 1)) if len(stem) == 2 else first
        c_in, step, rows = stem[-1], 4 if len(stem) == 2 else 1, []
        self.blocks = nn.ModuleList()
        for i, (n, g, c_out) in enumerate(zip(layers, growth, transitions, strict=True)):
            pool = bool(i and halve[i - 1])
            step *= 2 if pool else 1
            parts: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True)] if pool else []
            if i < thr:
                parts += [DenseLayer(c_in + j * g, g) for j in range(n)]
                c_in += n * g
            else:
                block = HarmonicBlock(n, c_in, g, m)
                parts.append(block)
                c_in = block.channels
            self.blocks.append(nn.Sequential(*parts, conv(c_in, c_out, 1)))
            rows.append((f"blocks.{i}", c_out, step))
            c_in = c_out
        self.feature_info = maps(*rows)
        self.fc = nn.Linear(c_in, num_classes)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))


def activation_traffic(model: nn.Module, x: Float[Tensor, "n c h w"]) -> int:
    """Bytes that all convolutions of ``model`` read and write as maps in one pass of ``x``, weights aside: what the links cost in memory traffic.

    The model is run without gradients in the mode it is in, and its hooks are removed, also after an error.
    """
    total = 0

    def add(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        total += sum(tensor.numel() * tensor.element_size() for tensor in (inputs[0], output))

    hooks = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, nn.Conv2d)]
    try:
        with torch.no_grad():
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return total
