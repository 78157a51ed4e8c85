"""PyramidNet: a residual network that grows a little wider at every block, with zero-padded shortcuts and leaner units."""

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
    part="pyramidnet",
    kind="backbone",
    paper="pyramidnet",
    title="Deep Pyramidal Residual Networks",
    year=2017,
    url="https://arxiv.org/abs/1610.02915",
    accepts=("image",),
    departs=(
        "widths are rounded down, which gives the printed sizes; the authors' PyTorch port rounds to the nearest: rounding='nearest'",
        "in an image of an odd side the 2x2 mean of a shortcut takes the last row and column as they are",
    ),
    tiny={"blocks": (1, 1), "alpha": 4, "base": 4},
    variants={
        "pyramidnet-mini": {"blocks": (1, 1, 1), "alpha": 32},
        "pyramidnet20": {"blocks": (3, 3, 3), "alpha": 32},
        "pyramidnet110": {"blocks": (18, 18, 18), "alpha": 48},
        "pyramidnet110-a84": {"blocks": (18, 18, 18), "alpha": 84},
        "pyramidnet110-a270": {"blocks": (18, 18, 18), "alpha": 270},
        "pyramidnet164-a270": {"blocks": (18, 18, 18), "alpha": 270, "unit": "bottleneck"},
        "pyramidnet200-a240": {"blocks": (22, 22, 22), "alpha": 240, "unit": "bottleneck"},
        "pyramidnet236-a220": {"blocks": (26, 26, 26), "alpha": 220, "unit": "bottleneck"},
        "pyramidnet272-a200": {"blocks": (30, 30, 30), "alpha": 200, "unit": "bottleneck"},
        "pyramidnet200-a300": {"blocks": (3, 24, 36, 3), "alpha": 300, "base": 64, "unit": "bottleneck", "stem": "photo"},
        "pyramidnet200-a450": {"blocks": (3, 24, 36, 3), "alpha": 450, "base": 64, "unit": "bottleneck", "stem": "photo"},
    },
    small=("pyramidnet-mini", "pyramidnet20"),
    published={
        "pyramidnet110": {"size": 32, "classes": 10, "parameters": 1739730, "macs": 0.40e9, "why": "the printed 0.40 G seem to count batch normalisation too"},
        "pyramidnet110-a84": {"size": 32, "classes": 10, "parameters": 3855054},
        "pyramidnet110-a270": {"size": 32, "classes": 10, "parameters": 28485477, "macs": 4.72e9},
        "pyramidnet164-a270": {"size": 32, "classes": 10, "parameters": 27216021},
        "pyramidnet200-a240": {"size": 32, "classes": 10, "parameters": 26617000},
        "pyramidnet236-a220": {"size": 32, "classes": 10, "parameters": 26806528},
        "pyramidnet272-a200": {"size": 32, "classes": 10, "parameters": 26049562, "macs": 4.49e9},
        "pyramidnet200-a300": {"size": 224, "classes": 1000, "parameters": 62.1e6, "macs": 16.6e9},
        "pyramidnet200-a450": {"size": 224, "classes": 1000, "parameters": 116.4e6, "macs": 29.2e9},
    },
)


def widths(
    n: int, alpha: int, base: int = 16, rule: Literal["additive", "multiplicative"] = "additive", rounding: Literal["floor", "nearest"] = "floor"
) -> list[int]:
    """The channels of the ``n`` blocks (eq. 2, additive ``base + k alpha / n``; eq. 3, multiplicative ``base alpha^(k/n)``), for k = 1 to n.

    Additive ones are reckoned in whole numbers: a running sum of floats drops the last width (63 for 64 at n=54, alpha=48).
    """
    half = 1 if rounding == "nearest" else 0
    if rule == "additive":
        return [(2 * (base * n + alpha * k) + half * n) // (2 * n) for k in range(1, n + 1)]
    return [int(base * alpha ** (k / n) + half / 2 + 1e-9) for k in range(1, n + 1)]


def shortcut(x: Float[Tensor, "n c h w"], channels: int, stride: int) -> Float[Tensor, "n d i j"]:
    """The input carried on without weights: 2x2 means where the side halves, then zero channels at the end."""
    if stride > 1:
        x = F.avg_pool2d(x, stride, ceil_mode=True, count_include_pad=False)
    return F.pad(x, (0, 0, 0, 0, 0, channels - x.shape[1]))


@final
class Unit(nn.Module):
    """BN, conv3x3, BN, ReLU, conv3x3, BN; or BN, 1x1, BN, ReLU, 3x3, BN, ReLU, 1x1 to four times the width, BN (Fig. 6d). No ReLU after the sum."""

    def __init__(self, c_in: int, width: int, stride: int, bottleneck: bool) -> None:
        super().__init__()
        kernels = ((1, 1), (3, stride), (1, 1)) if bottleneck else ((3, stride), (3, 1))
        self.stride, self.channels = stride, 4 * width if bottleneck else width
        layers: list[nn.Module] = [nn.BatchNorm2d(c_in)]
        for i, (kernel, step) in enumerate(kernels):
            last = i == len(kernels) - 1
            c_out = self.channels if last else width
            layers += [nn.Conv2d(c_in, c_out, kernel, step, kernel // 2, bias=False), nn.BatchNorm2d(c_out), *([] if last else [nn.ReLU(inplace=True)])]
            c_in = c_out
        self.branch = nn.Sequential(*layers)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return self.branch(x) + shortcut(x, self.channels, self.stride)


@final
class PyramidNet(Headed):
    """Stem, stages of :class:`Unit` whose widths grow by ``alpha`` over all ``blocks`` together, BN, ReLU, mean over positions, a linear head.

    ``blocks`` are units a stage; each stage after the first halves the side. ``base`` channels before the first; ``unit`` "basic" or
    "bottleneck"; ``rule`` and ``rounding`` as in :func:`widths`; ``stem`` "small" is one 3x3 conv for images up to about 64 px, "photo" 7x7 of
    stride 2 and a max-pool.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        blocks: Sequence[int] = (18, 18, 18),
        alpha: int = 48,
        base: int = 16,
        unit: Literal["basic", "bottleneck"] = "basic",
        rule: Literal["additive", "multiplicative"] = "additive",
        rounding: Literal["floor", "nearest"] = "floor",
        stem: Literal["small", "photo"] = "small",
    ) -> None:
        super().__init__()
        if not blocks or min(blocks) < 1 or alpha < 1:
            raise Mistake(f"pyramidnet: blocks={tuple(blocks)}, alpha={alpha}: every stage needs a block, and the widths grow by at least 1")
        photo = stem == "photo"
        self.num_classes, self.in_chans, self.stages = num_classes, in_chans, len(blocks)
        self.conv1 = nn.Conv2d(in_chans, base, 7 if photo else 3, 2 if photo else 1, 3 if photo else 1, bias=False)
        self.bn1 = nn.BatchNorm2d(base)
        self.stem = nn.Sequential(nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)) if photo else nn.Identity()
        each, c_in, step, rows = iter(widths(sum(blocks), alpha, base, rule, rounding)), base, 4 if photo else 1, []
        for i, count in enumerate(blocks):
            units: list[nn.Module] = []
            for j in range(count):
                made = Unit(c_in, next(each), 2 if j == 0 and i else 1, unit == "bottleneck")
                units.append(made)
                c_in = made.channels
            setattr(self, f"layer{i + 1}", nn.Sequential(*units))
            rows.append((f"layer{i + 1}", c_in, step * 2**i))
        self.feature_info = maps(*rows)
        self.num_features = c_in
        self.norm = nn.BatchNorm2d(c_in)
        self.act = nn.ReLU(inplace=True)
        self.fc = nn.Linear(c_in, num_classes)
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

    def units(self) -> list[str]:
        """Names of the residual units, in order: ``layer2.0`` is the first of the second stage."""
        return [f"layer{i + 1}.{j}" for i in range(self.stages) for j in range(len(getattr(self, f"layer{i + 1}")))]


def lesion(model: PyramidNet, unit: str) -> nn.Module:
    """Cut one residual branch: the unit called ``unit`` answers with its shortcut alone. In place; returns what to put back into its ``branch``.

    The paper deletes units at test time to see which of them the network cannot do without (section 4.3, after Veit et al.).
    """
    if unit not in model.units():
        raise Mistake(f"lesion: pyramidnet has no unit {unit!r}; it has {', '.join(model.units())}")
    found = model.get_submodule(unit)
    kept = found.branch
    found.branch = Nothing()
    return kept  # type: ignore[return-value]


@final
class Nothing(nn.Module):
    """What stands in a cut branch: zero, to which the shortcut is added."""

    def forward(self, x: Tensor) -> float:
        return 0.0
