"""Oversampling: repeats samples of small classes until the classes are of equal size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Int
from torch import Generator, Tensor

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="oversampling",
    kind="technique",
    paper="class-imbalance-study",
    title="A systematic study of the class imbalance problem in convolutional neural networks",
    year=2018,
    url="https://arxiv.org/abs/1710.05381",
    departs=(
        "a class is repeated whole as often as it fits, and only the rest is drawn at random, anew in each epoch; the paper draws every copy at random, once",
    ),
    strength="to",
    off=0.0,
    claims=("order",),
    expects=("labels",),
)


def oversample(y: Int[Tensor, " n"], to: float, gen: Generator) -> Int[Tensor, " m"]:
    """Positions [m], m >= n: every position once, then the repeats that bring each class to ``to`` times the largest.

    ``to=1`` makes all classes equal, ``to=0`` repeats none and draws nothing. Rows with ``y=-1`` stand once;
    a class without a sample stays without.
    """
    _check(to)
    rows = [torch.arange(len(y))]
    counts = torch.bincount(y[y >= 0])
    target = round(to * int(counts.max())) if len(counts) else 0
    for c, count in enumerate(counts.tolist()):
        if 0 < count < target:
            own = (y == c).nonzero()[:, 0]
            whole, rest = divmod(target - count, count)
            rows += [own] * whole + [own[torch.randperm(count, generator=gen)[:rest]]]
    return torch.cat(rows)


def _check(to: float) -> None:
    if not 0 <= to <= 1:
        raise Mistake(f"to={to}: the size of the smallest class over that of the largest must lie in 0 (as it is) to 1 (equal)")


@final
@dataclass
class Oversampling(Technique):
    """Each epoch shows :func:`oversample` of its rows in random order, so epochs get longer; ``to=0`` is off."""

    to: float = 1.0

    def __post_init__(self) -> None:
        _check(self.to)

    def order(self, run: Run, index: Tensor, gen: Generator) -> Tensor:
        rows = index[oversample(run.data.y[index], self.to, gen)]
        return rows[torch.randperm(len(rows), generator=gen)]
