"""DeepMAD's formulas: the entropy of a network that is not yet built, how effective its depth is, and what it costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from convince.backbones.deepmad import Stage, squeezed

RATIO = {"bottleneck": (0.1, 1.0), "depthwise": (1.5, 6.0)}  # least and most of bottleneck / out
BETA = 10.0


@dataclass(frozen=True)
class Spec:
    """A network to be: the options of the backbone ``deepmad``, and the channels of its input."""

    stem: int
    stages: tuple[Stage, ...]
    stem_stride: int = 2
    block: str = "bottleneck"
    head: int = 0
    in_chans: int = 3

    def options(self) -> dict[str, Any]:
        """As JSON options of the backbone."""
        stages = [list(stage) for stage in self.stages]
        return {"stem": self.stem, "stages": stages, "stem_stride": self.stem_stride, "block": self.block, "head": self.head}


def log_width(c_in: int, stage: Stage, block: str) -> float:
    """The sum of ``log w`` over a stage's convolutions, where a convolution's width w is ``c_in k^2 / groups`` (section 3.2)."""
    inner = 2 * math.log(stage.kernel) + math.log(stage.bottleneck) * (2 if block == "bottleneck" else 1)
    return math.log(c_in) + (stage.blocks - 1) * math.log(stage.out) + stage.blocks * inner


def ends(spec: Spec, size: int) -> Iterator[tuple[int, float, int, int]]:
    """For every resolution, all that comes before its end: convolutions, sum of ``log w``; and the channels and the side there.

    A resolution ends where the next stage has stride 2, and at the end of the network.
    """
    depth, total = 1, math.log(9 * spec.in_chans)
    c, side = spec.stem, math.ceil(size / spec.stem_stride)
    for stage in spec.stages:
        if stage.stride == 2:
            yield depth, total, c, side
        depth, total = depth + 3 * stage.blocks, total + log_width(c, stage, spec.block)
        c, side = stage.out, math.ceil(side / stage.stride)
    if spec.head:
        depth, total, c = depth + 1, total + math.log(c), spec.head
    yield depth, total, c, side


def entropy(spec: Spec, size: int) -> list[float]:
    """``H_s = (log c_s + 2 log r_s) * sum of log sqrt(w)``: the entropy of the features at the end of each resolution (eq. 4)."""
    return [(math.log(c) + 2 * math.log(side)) * total / 2 for _, total, c, side in ends(spec, size)]


def effectiveness(spec: Spec, size: int) -> float:
    """rho: depth over the geometric mean of the widths, the largest over resolutions (eq. 6). Too large, and it does not train well."""
    return max(depth / math.exp(total / depth) for depth, total, _, _ in ends(spec, size))


def uneven(depths: Sequence[int], block: str) -> float:
    """``Q = exp(standard deviation of the stages' depths)``; bottleneck networks leave out the first stage, or the first two of five."""
    skip = 0 if block == "depthwise" else 2 if len(depths) >= 5 else 1
    return math.exp(statistics.pstdev(depths[skip:] or (0,)))


def weights(n: int) -> tuple[int, ...]:
    """alpha of ``n`` resolutions: 1, and 8 for the last."""
    return (*(1,) * (n - 1), 8)


def objective(spec: Spec, size: int, beta: float = BETA) -> float:
    """``sum of alpha_s H_s - beta Q`` (eq. 8), which the design maximises."""
    found = entropy(spec, size)
    return sum(a * h for a, h in zip(weights(len(found)), found, strict=True)) - beta * uneven([s.blocks for s in spec.stages], spec.block)


def stage_cost(c_in: int, stage: Stage, block: str, side: int) -> tuple[int, int]:
    """Multiply-adds and parameters of a stage whose input has side ``side``."""
    macs, parameters, b, o = 0, 0, stage.bottleneck, stage.out
    middle, stride = b * stage.kernel**2 * (b if block == "bottleneck" else 1), stage.stride
    gates = 2 * b * squeezed(b) if block == "depthwise" else 0
    for c in [c_in] + [o] * (stage.blocks - 1):
        after = math.ceil(side / stride)
        joins = c * o if block == "bottleneck" and c != o else 0
        macs += c * b * side**2 + (middle + b * o + joins) * after**2 + gates
        parameters += c * b + middle + b * o + joins + gates + 2 * (2 * b + o) + (2 * o if joins else 0) + (2 * (squeezed(b) + b) if gates else 0)
        side, stride = after, 1
    return macs, parameters


def flops_params(spec: Spec, size: int, classes: int) -> tuple[int, int]:
    """Multiply-adds of convolutions and the linear layer for one image, and parameters, of the network that is built."""
    side, c = math.ceil(size / spec.stem_stride), spec.stem
    macs, parameters = 9 * spec.in_chans * c * side**2, 9 * spec.in_chans * c + 2 * c
    for stage in spec.stages:
        more = stage_cost(c, stage, spec.block, side)
        macs, parameters = macs + more[0], parameters + more[1]
        c, side = stage.out, math.ceil(side / stage.stride)
    if spec.head:
        macs, parameters, c = macs + c * spec.head * side**2, parameters + c * spec.head + 2 * spec.head, spec.head
    return macs + c * classes, parameters + (c + 1) * classes


def shaped(c_in: int, stage: Stage, block: str, side: int) -> bool:
    """Whether a stage may follow ``c_in`` channels of side ``side``: channels at most quadruple, and bottleneck and kernel are in proportion."""
    low, high = RATIO[block]
    return stage.out <= 4 * c_in and low * stage.out <= stage.bottleneck <= high * stage.out and (stage.kernel <= 3 or 1.5 * stage.kernel <= side)
