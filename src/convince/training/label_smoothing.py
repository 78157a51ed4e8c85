"""Label smoothing: move a share of each label to the uniform row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from jaxtyping import Float
from torch import Tensor

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="label-smoothing",
    kind="technique",
    title="Rethinking the Inception Architecture for Computer Vision",
    year=2015,
    url="https://arxiv.org/abs/1512.00567",
    strength="smoothing",
    off=0.0,
    expects=("labels", "logits"),
)


def smooth(y: Float[Tensor, "n k"], smoothing: float) -> Float[Tensor, "n k"]:
    """``(1 - smoothing) y + smoothing / k`` (section 7); rows keep their sum, so a row without label stays empty."""
    return y * (1 - smoothing) + y.sum(1, keepdim=True) * (smoothing / y.shape[1])


@final
@dataclass
class LabelSmoothing(Technique):
    """Apply :func:`smooth` to the labels of each training batch, after they were mixed; ``smoothing=0`` is off."""

    smoothing: float = 0.1
    rank = 60

    def __post_init__(self) -> None:
        if not 0 <= self.smoothing <= 1:
            raise Mistake(f"label-smoothing: smoothing={self.smoothing}: must be a share from 0 (off) to 1; 0.1 is usual")

    def on_batch(self, run: Run) -> None:
        if run.batch.y is not None:
            run.batch.y = smooth(run.batch.y, self.smoothing)
