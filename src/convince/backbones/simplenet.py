"""SimpleNet: thirteen plain convolutions without branches, and the design rules that they follow as measured warnings."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="simplenet",
    kind="backbone",
    paper="simplenet",
    title="Lets keep it simple, Using simple architectures to outperform deeper and more complex architectures",
    year=2016,
    url="https://arxiv.org/abs/1608.06037",
    accepts=("image",),
    departs=(
        "1x1 convolutions have no margin; the authors' PyTorch port gives them one of a pixel, which frames the map with biases",
        "one dropout rate serves all places and is 0 by default, as in the port; the paper tunes a rate for each layer",
        "a 2x2 max-pool keeps an odd last row and column, so that images of any side pass",
        "the size called 460k has 385,790 parameters by the port's own list of layers, which is followed here",
        "the paper states its design rules in words; the limits by which design_lint measures them are ours",
    ),
    tiny={"layers": "4-8-P-8k1-8"},
    variants={
        "simplenet-mini": {"layers": "64-32-32-32-P-32-32-64-P-64-64-P-128-256k1-64k1-P-64", "scale": 0.5},
        "simplenet-cifar-310k": {"layers": "64-32-32-32-P-32-32-64-P-64-64-P-128-256k1-64k1-P-64"},
        "simplenet-cifar-460k": {"layers": "32-32-32-64-P-64-64-64-P-64-64-P-96-96k1-96k1-P-100"},
        "simplenet-cifar-5m": {},
        "simplenet-small-m1-05": {"layers": "64-128-128-128-128-128-P-256-256-256-512-P-2048k1-256k1-256", "scale": 0.5, "halve": (0, 1, 2)},
        "simplenet-small-m2-05": {"layers": "64-128-128-128-128-128-P-256-256-256-512-P-2048k1-256k1-256", "scale": 0.5, "halve": (0, 1, 3)},
        "simplenet-small-m1-075": {"layers": "64-128-128-128-128-128-P-256-256-256-512-P-2048k1-256k1-256", "scale": 0.75, "halve": (0, 1, 2)},
        "simplenet-small-m2-075": {"layers": "64-128-128-128-128-128-P-256-256-256-512-P-2048k1-256k1-256", "scale": 0.75, "halve": (0, 1, 3)},
        "simplenet-5m-m1": {"layers": "64-128-128-128-128-128-P-256-256-256-512-P-2048k1-256k1-256", "halve": (0, 1, 2)},
        "simplenet-5m-m2": {"layers": "64-128-128-128-128-128-P-256-256-256-512-P-2048k1-256k1-256", "halve": (0, 1, 3)},
        "simplenet-9m-m1": {"layers": "128-192-192-192-192-192-P-320-320-320-640-P-2560k1-320k1-320", "halve": (0, 1, 2)},
        "simplenet-9m-m2": {"layers": "128-192-192-192-192-192-P-320-320-320-640-P-2560k1-320k1-320", "halve": (0, 1, 3)},
    },
    small=("simplenet-mini", "simplenet-cifar-310k"),
    published={
        "simplenet-cifar-310k": {"size": 32, "classes": 10, "parameters": 312362, "macs": 55.8e6},
        "simplenet-cifar-5m": {"size": 32, "classes": 10, "parameters": 5498378, "macs": 652e6},
        "simplenet-small-m1-05": {"size": 224, "classes": 1000, "parameters": 1.51e6},
        "simplenet-small-m2-05": {"size": 224, "classes": 1000, "parameters": 1.51e6},
        "simplenet-small-m1-075": {"size": 224, "classes": 1000, "parameters": 3.29e6},
        "simplenet-small-m2-075": {"size": 224, "classes": 1000, "parameters": 3.29e6},
        "simplenet-5m-m1": {"size": 224, "classes": 1000, "parameters": 5.75e6},
        "simplenet-5m-m2": {"size": 224, "classes": 1000, "parameters": 5.75e6},
        "simplenet-9m-m1": {"size": 224, "classes": 1000, "parameters": 9.51e6},
        "simplenet-9m-m2": {"size": 224, "classes": 1000, "parameters": 9.51e6},
    },
)


def parse(layers: str) -> list[list[tuple[int, int]]]:
    """``"64-128-P-256k1"`` -> groups of (channels, kernel) between the max-pools: ``[[(64, 3), (128, 3)], [(256, 1)]]``."""
    groups: list[list[tuple[int, int]]] = [[]]
    for word in layers.split("-"):
        unit = re.fullmatch(r"([1-9]\d*)(?:k([1-9]\d*))?", word)
        if word == "P" and groups[-1]:
            groups.append([])
        elif unit is not None and int(unit[2] or 3) % 2:
            groups[-1].append((int(unit[1]), int(unit[2] or 3)))
        else:
            raise Mistake(
                f"simplenet: layers={layers!r}: {word!r} stands where a layer should; write 64 for 3x3, 256k1 for another odd kernel, P between units"
            )
    if not groups[-1]:
        raise Mistake(f"simplenet: layers={layers!r} ends in a pool; a global max-pool follows the last unit anyway")
    return groups


@final
class SimpleNet(Headed):
    """Units of conv with bias, BN, ReLU, dropout of whole maps; 2x2 max-pools; a global max-pool, dropout, a linear head.

    ``layers`` as in :func:`parse`; ``scale`` multiplies all widths (rounded); ``halve`` are the numbers of the convs (from 0) of stride 2, for
    photographs. ``dropout`` acts after units and pools, except after a unit that a pool follows.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        layers: str = "64-128-128-128-P-128-128-256-P-256-256-P-512-2048k1-256k1-P-256",
        scale: float = 1.0,
        dropout: float = 0.0,
        halve: Sequence[int] = (),
    ) -> None:
        super().__init__()
        groups = parse(layers)
        count = sum(len(group) for group in groups)
        if not 0 <= dropout < 1 or not scale > 0:
            raise Mistake(f"simplenet: dropout={dropout}, scale={scale}: dropout is a probability from 0 to below 1, scale a factor above 0")
        if not set(halve) <= set(range(count)):
            raise Mistake(f"simplenet: halve={tuple(halve)}: these number the {count} convolutions from 0; give some of 0 to {count - 1}")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.groups = nn.ModuleList()
        c_in, at, step, rows = in_chans, 0, 1, []
        for i, group in enumerate(groups):
            made: list[nn.Module] = [nn.MaxPool2d(2, ceil_mode=True), nn.Dropout2d(dropout)] if i else []
            step *= 2 if i else 1
            for j, (channels, kernel) in enumerate(group):
                stride = 2 if at in halve else 1
                c_out = max(round(channels * scale), 1)
                unit = nn.Sequential(nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2), nn.BatchNorm2d(c_out, eps=1e-5, momentum=0.05), nn.ReLU(inplace=True))
                made.append(unit if j == len(group) - 1 else nn.Sequential(*unit, nn.Dropout2d(dropout)))
                c_in, at, step = c_out, at + 1, step * stride
            self.groups.append(nn.Sequential(*made))
            rows.append((f"groups.{i}", c_in, step))
        self.feature_info = maps(*rows)
        self.num_features = c_in
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(c_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_uniform_(module.weight, nn.init.calculate_gain("relu"))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map."""
        for group in self.groups:
            x = group(x)
        return x

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n d"]:
        """The largest over positions, after dropout."""
        return self.dropout(features.amax((2, 3)))


@final
@dataclass(frozen=True)
class Finding:
    """One design rule: what was measured, where it is worst, and whether it keeps to the limit."""

    rule: str
    value: float
    layer: str
    kept: bool


def design_lint(model: nn.Module) -> list[Finding]:
    """The paper's design rules (section 3), measured on the convolutions and pools of a plain network in the order in which they are defined.

    The limits are ours. A width is compared with the widest 3x3 conv before it, so that 1x1 layers may widen; "early" is the first half.
    """
    steps = [(name, m) for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d))]
    convs = [(name, m) for name, m in steps if isinstance(m, nn.Conv2d)]
    if len(convs) < 2:
        raise Mistake(f"design_lint: the network has {len(convs)} convolutions; the rules compare at least two")
    early, found = convs[: (len(convs) + 1) // 2], []

    def add(rule: str, worst: tuple[float, str], kept: bool) -> None:
        found.append(Finding(rule, round(float(worst[0]), 4), worst[1], kept))

    wide = [(name, m) for name, m in convs if m.kernel_size[0] > 1]
    growth = max(((m.out_channels / max(w.out_channels for _, w in wide[:i]), name) for i, (name, m) in enumerate(wide) if i), default=(1.0, convs[0][0]))
    add("gradual growth: no 3x3 layer more than twice as wide as the widest before it", growth, growth[0] <= 2)

    sides = [1 if isinstance(m, nn.Conv2d) and max(m.stride) == 1 else 0 for _, m in steps]  # 0 where the side is halved
    first = next((i for i, (_, m) in enumerate(steps) if not sides[i]), len(steps))
    before = sum(isinstance(m, nn.Conv2d) for _, m in steps[:first])
    where = steps[min(first, len(steps) - 1)][0]
    add("late pooling: a quarter of the layers before the first halving", (before / len(convs), where), before / len(convs) >= 0.25)
    add("homogeneous groups: two layers or more between halvings", (len(convs) / (1 + sides.count(0)), where), len(convs) / (1 + sides.count(0)) >= 2)

    other = [name for name, m in early if tuple(m.kernel_size) != (3, 3)]
    add("local correlation: all early kernels 3x3", (len(other), other[0] if other else early[0][0]), not other)

    weights = [(m.weight.numel(), name) for name, m in convs]
    share = (max(weights)[0] / sum(n for n, _ in weights), max(weights)[1])
    add("balanced capacity: no layer has more than half of the weights", share, share[0] <= 0.5)

    narrow = min(((b.out_channels / a.out_channels, name) for (_, a), (name, b) in itertools.pairwise(early)), default=(1.0, early[0][0]))
    add("no early bottleneck: no early layer narrower than half of the one before", narrow, narrow[0] >= 0.5)

    means = [name for name, m in steps if isinstance(m, nn.AvgPool2d)]
    add("max-pooling: no pool takes the mean", (len(means), means[0] if means else where), not means)
    return found
