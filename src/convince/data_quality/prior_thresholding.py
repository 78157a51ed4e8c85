"""Prior thresholding: divides the probabilities by the classes' shares in training, so rare classes are found again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="prior-thresholding",
    kind="technique",
    paper="class-imbalance-study",
    title="A systematic study of the class imbalance problem in convolutional neural networks",
    year=2018,
    url="https://arxiv.org/abs/1710.05381",
    departs=(
        "the prior is counted from the labels that the last stage of training was shown, so it is that of the resampled set under resampling",
        "a class that was never shown counts as shown once",
        "power, the exponent of the prior, is added as a strength; the paper's is 1",
    ),
    strength="power",
    off=0.0,
    expects=("labels", "logits"),
)


def threshold_by_prior(probs: Float[Tensor, "n k"], priors: Float[Tensor, " k"]) -> Float[Tensor, "n k"]:
    """``p(i | x) / p(i)``, proportional to the likelihood ``p(x | i)``; the answer is the largest."""
    if bool((priors <= 0).any()):
        raise Mistake(f"priors={priors.tolist()}: every class needs a share above 0")
    return probs / priors


@final
class Thresholded(nn.Module):
    """Scores minus ``power`` times the log priors: their softmax is ``p / prior ** power``, made to sum to 1."""

    shift: Tensor

    def __init__(self, answer: nn.Module, shift: Float[Tensor, " k"]) -> None:
        super().__init__()
        self.answer = answer
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        scores = self.answer(x)
        return scores - self.shift.to(scores)


@final
@dataclass
class PriorThresholding(Technique):
    """Training stays as it is; the answer becomes :class:`Thresholded`. ``power=0`` is off."""

    power: float = 1.0

    def __post_init__(self) -> None:
        if not self.power >= 0:
            raise Mistake(f"power={self.power}: the exponent of the prior must be at least 0 (off); the paper's is 1")

    def on_start(self, run: Run) -> None:
        self.counts = torch.zeros(run.k, dtype=torch.float64)

    def on_stage(self, run: Run) -> None:
        self.counts = torch.zeros(run.k, dtype=torch.float64)

    def on_batch(self, run: Run) -> None:
        y = run.batch.y
        if y is not None and y.shape[1] == run.k:
            self.counts += y.detach().sum(0).double().cpu()

    def wrap(self, answer: nn.Module) -> nn.Module:
        if self.power == 0 or not bool(self.counts.sum() > 0):
            return answer
        counts = self.counts.clamp_min(1)
        return Thresholded(answer, (self.power * (counts / counts.sum()).log()).to(torch.float32))

    def state(self) -> dict[str, Any]:
        return {"counts": self.counts.clone()}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self.on_start(run)
        if state:
            self.counts = state["counts"].clone()
