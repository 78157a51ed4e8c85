"""Class weights: multiply each sample's loss by the inverse frequency of its class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="class-weights",
    kind="technique",
    title="Inverse class frequency weighting",
    strength="power",
    off=0.0,
    expects=("labels",),
)


def class_weights(y: Int[Tensor, " n"], k: int, power: float = 1.0) -> Float[Tensor, " k"]:
    """A weight per class proportional to ``count ** -power``, scaled so that its mean over the samples ``y`` is 1; float64.

    ``power=1`` gives each class the same say, ``N / (K N_k)`` for K classes that occur; 0.5 half way, 0 nothing.
    Labels of -1 are not counted; a class that never occurs weighs 1.
    """
    counts = torch.bincount(y[y >= 0], minlength=k).double()
    raw = torch.where(counts > 0, counts.clamp_min(1) ** -power, 0.0)
    mean = (raw * counts).sum() / counts.sum().clamp_min(1)
    return torch.where(counts > 0, raw / mean, 1.0)


@final
@dataclass
class ClassWeights(Technique):
    """Multiply ``batch.weight`` by :func:`class_weights` of the training part; a mixed label takes the mean of its classes' weights.

    Runs after labels are mixed and before they are smoothed. ``power=0`` is off.
    """

    power: float = 1.0
    weights: Tensor = field(init=False, repr=False, compare=False)
    rank = 58

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 10:
            raise Mistake(f"class-weights: power={self.power}: must lie from 0 (off) to 10; 1 weighs by inverse frequency, 0.5 by its root")

    def on_start(self, run: Run) -> None:
        weights = class_weights(run.data.y[run.data.split.train], run.k, self.power)
        self.weights = weights.to(device=run.plan.device, dtype=run.plan.dtype)

    def on_batch(self, run: Run) -> None:
        y = run.batch.y
        if y is None or y.shape[1] != len(self.weights):  # a pretraining stage has labels of its own
            return
        own = (y * self.weights).sum(1) / y.sum(1).clamp_min(torch.finfo(y.dtype).tiny)
        run.batch.weight = own if run.batch.weight is None else run.batch.weight * own
