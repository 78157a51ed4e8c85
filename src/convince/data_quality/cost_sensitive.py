"""Cost-sensitive training: a sample's loss weighs as much more as its class is rarer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="cost-sensitive",
    kind="technique",
    paper="class-imbalance-study",
    title="A systematic study of the class imbalance problem in convolutional neural networks",
    year=2018,
    url="https://arxiv.org/abs/1710.05381",
    departs=("the paper only describes cost-sensitive learning; the weights are the common n / (k n_c), of mean 1 over the training samples",),
    strength="power",
    off=0.0,
    expects=("labels",),
)


def class_weights(y: Int[Tensor, " n"], k: int, power: float = 1.0) -> Float[Tensor, " k"]:
    """``(n / (k n_c)) ** power`` of each class, divided so that the mean over the labelled samples is 1; 0 for a class without one."""
    counts = torch.bincount(y[y >= 0], minlength=k).double()
    raw = torch.where(counts > 0, counts.clamp_min(1) ** -power, 0.0)
    return raw * counts.sum() / (raw * counts).sum()


@final
@dataclass
class CostSensitive(Technique):
    """Multiplies each row's weight by that of its label (mixed labels: the mixed weight). ``power=0`` is off."""

    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise Mistake(f"power={self.power}: must be at least 0 (off); 1 weighs classes by the inverse of their size")

    def on_start(self, run: Run) -> None:
        self._weights = class_weights(run.data.y[run.data.split.train], run.k, self.power)

    def on_batch(self, run: Run) -> None:
        batch = run.batch
        if self.power == 0 or batch.y is None or batch.y.shape[1] != run.k:
            return
        weight = batch.y @ self._weights.to(batch.y)
        batch.weight = weight if batch.weight is None else batch.weight * weight
