"""The answer: an ``nn.Module`` from [0, 1] pixels to scores [n k], normalisation inside; and its scores.

Evaluation, explanation, attack, compression, export and reports all use the answer, never the bare
network: after boosting or metric learning the two disagree on most images.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.data import Data
from convince.fit.precision import Plan, full
from convince.fit.processes import World
from convince.report.reckon import wilson


@final
class Normalise(nn.Module):
    """``(x - mean) / std`` by channel (images [n c h w]) or by feature (tables [n d])."""

    mean: Tensor
    std: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], *, image: bool = True) -> None:
        super().__init__()
        shape = (1, -1, 1, 1) if image else (1, -1)
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(shape))
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(shape))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


@final
class Answer(nn.Module):
    """Normalisation, then the network; scores in full precision."""

    def __init__(self, normalise: Normalise, model: nn.Module) -> None:
        super().__init__()
        self.normalise = normalise
        self.model = model

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        return full(self.model(self.normalise(x)))


@dataclass(frozen=True)
class Scores:
    """Probabilities of an answer on a set of rows, and what follows from them."""

    probs: Float[Tensor, "n k"]
    y: Int[Tensor, " n"]
    index: Int[Tensor, " n"]

    @property
    def n(self) -> int:
        return len(self.y)

    @functools.cached_property
    def predicted(self) -> Int[Tensor, " n"]:
        return self.probs.argmax(1)

    @functools.cached_property
    def correct(self) -> Tensor:
        return self.predicted == self.y

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0 to 1."""
        return float(self.correct.double().mean())

    @property
    def accuracy_interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the accuracy."""
        return wilson(int(self.correct.sum()), self.n)

    @property
    def log_loss(self) -> float:
        """Mean ``-log p(true class)`` in nats."""
        p = self.probs.gather(1, self.y[:, None]).double().clamp_min(1e-12)
        return float(-p.log().mean())

    @property
    def ece(self) -> float:
        """Expected calibration error, 15 equal-width bins, 0 to 1."""
        return float(sum(n * abs(c - a) for n, c, a in self.bins(15)) / max(self.n, 1))

    def bins(self, count: int = 15) -> list[tuple[int, float, float]]:
        """(images, mean confidence, accuracy) of each equal-width bin of confidence."""
        confidence = self.probs.max(1).values.double()
        at = (confidence * count).long().clamp_max(count - 1)
        rows = []
        for b in range(count):
            inside = at == b
            n = int(inside.sum())
            rows.append((n, float(confidence[inside].mean()) if n else 0.0, float(self.correct[inside].double().mean()) if n else 0.0))
        return rows

    def confusion(self) -> np.ndarray:
        """Counts [k k], row = true class, column = answer."""
        k = self.probs.shape[1]
        return torch.bincount(self.y * k + self.predicted, minlength=k * k).view(k, k).numpy()

    def summary(self) -> dict[str, Any]:
        """The ``test`` object of ``--json``."""
        return {
            "n": self.n,
            "accuracy": self.accuracy,
            "accuracy_interval": list(self.accuracy_interval),
            "log_loss": self.log_loss,
            "ece": self.ece,
        }


@torch.no_grad()
def logits_of(answer: nn.Module, x: Tensor, plan: Plan, batch: int = 256) -> Float[Tensor, "n k"]:
    """Scores for pixels (uint8 or [0, 1]) or table rows, in batches, on the CPU. The answer must be in eval mode."""
    rows = []
    for part in x.split(batch):
        with plan.autocast():
            rows.append(full(answer(plan.pixels(part))).cpu())
    return torch.cat(rows) if rows else torch.empty(0)


@torch.no_grad()
def score(answer: nn.Module, data: Data, index: Tensor, plan: Plan, world: World | None = None, batch: int = 256) -> Scores:
    """Score labelled rows of the pool; with several processes each row is counted once.

    The answer's mode is put back afterwards.
    """
    world = world or World()
    index = index[data.y[index] >= 0]
    mine = index[world.rank :: world.size]
    modes = {m: m.training for m in answer.modules()}
    answer.eval()
    try:
        rows = []
        for x in data.x.batches(mine.split(batch)):
            with plan.autocast():
                rows.append(full(answer(plan.pixels(x))).softmax(1).cpu())
    finally:
        for module, training in modes.items():
            module.training = training
    probs = torch.cat(rows) if rows else torch.empty(0, data.k, dtype=plan.dtype)
    probs, where = world.gather(probs), world.gather(mine)
    order = where.argsort()
    return Scores(probs[order], data.y[where[order]], where[order])
