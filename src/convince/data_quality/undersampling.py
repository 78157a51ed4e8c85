"""Undersampling: leaves samples of large classes out until the classes are of equal size."""

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
    part="undersampling",
    kind="technique",
    paper="class-imbalance-study",
    title="A systematic study of the class imbalance problem in convolutional neural networks",
    year=2018,
    url="https://arxiv.org/abs/1710.05381",
    strength="to",
    off=0.0,
    claims=("order",),
    expects=("labels",),
)


def undersample(y: Int[Tensor, " n"], to: float, gen: Generator) -> Int[Tensor, " m"]:
    """Positions that stay, ascending: a random part of each class, at most ``1 / to`` times the smallest one.

    ``to=1`` makes all classes equal, ``to=0`` leaves none out. Rows with ``y=-1`` stay; a class without a
    sample does not count as the smallest.
    """
    _check(to)
    shuffled = torch.randperm(len(y), generator=gen)
    counts = torch.bincount(y[y >= 0])
    if to == 0 or not len(counts):
        return torch.arange(len(y))
    most = round(int(counts[counts > 0].min()) / to)
    kept = [(y < 0).nonzero()[:, 0]]
    for c in range(len(counts)):
        kept.append(shuffled[y[shuffled] == c][:most])
    return torch.cat(kept).sort().values


def _check(to: float) -> None:
    if not 0 <= to <= 1:
        raise Mistake(f"to={to}: the size of the smallest class over that of the largest must lie in 0 (as it is) to 1 (equal)")


@final
@dataclass
class Undersampling(Technique):
    """Trains on :func:`undersample` of the rows, the same ones in each epoch, so epochs get shorter; ``to=0`` is off."""

    to: float = 1.0

    def __post_init__(self) -> None:
        _check(self.to)

    def on_start(self, run: Run) -> None:
        self._seed = int(torch.randint(2**62, (), generator=run.gen("undersampling")))

    def order(self, run: Run, index: Tensor, gen: Generator) -> Tensor:
        fixed = torch.Generator().manual_seed(self._seed)
        rows = index[undersample(run.data.y[index], self.to, fixed)]
        return rows[torch.randperm(len(rows), generator=gen)]
