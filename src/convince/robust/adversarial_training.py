"""Adversarial training: every batch is replaced by its PGD adversaries, made against the network as it stands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

from convince.errors import Mistake
from convince.fit.answer import Answer
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.kinds import Norm
from convince.parts import Card
from convince.robust.pgd import pgd

CARD = Card(
    part="adversarial-training",
    kind="technique",
    title="Towards Deep Learning Models Resistant to Adversarial Attacks",
    year=2017,
    url="https://arxiv.org/abs/1706.06083",
    strength="eps",
    off=0.0,
    expects=("images", "labels", "logits", "network"),
    tiny={"eps": 0.1, "steps": 1},
    departs=(
        "adversaries are made of the network in eval mode, so that its batch norms neither move nor see the batch meanwhile",
        "the step is a quarter of eps unless given, which is the paper's 2/255 at its 8/255 for CIFAR-10",
        "of mixed labels the largest one is attacked, the loss keeps them as they are; the paper has single labels",
    ),
)


@final
@dataclass
class AdversarialTraining(Technique):
    """Train on the pictures of :func:`convince.robust.pgd.pgd` in place of the clean ones (eq. 2.1); ``eps=0`` is off.

    ``eps`` and ``step`` [pixel value, 0 to 1]; ``steps`` of the attack, each a further forward and backward pass, which the run's count of
    images includes; ``norm`` "inf" or "2".
    """

    eps: float = 8 / 255
    steps: int = 7
    step: float | None = None
    norm: str | int = "inf"
    rank = 70  # after the parts that change pictures

    def __post_init__(self) -> None:
        if (not 0 <= self.eps <= 1 and str(self.norm) == "inf") or not self.eps >= 0:
            raise Mistake(f"adversarial-training: eps={self.eps} must be from 0 (off), in pixel values 0 to 1; 8/255 is usual, 0.1 for grey drawings")
        if self.steps < 1 or (self.step is not None and not self.step > 0):
            raise Mistake(f"adversarial-training: steps={self.steps} must be at least 1, and step={self.step} above 0 or None for a quarter of eps")
        if str(self.norm) not in ("inf", "2"):
            raise Mistake(f"adversarial-training: norm={self.norm!r} must be 'inf' or '2'")

    def on_batch(self, run: Run) -> None:
        if self.eps == 0:
            return
        x, y = run.batch.x, run.batch.y
        assert y is not None
        step = self.eps / 4 if self.step is None else self.step
        norm: Norm = "2" if str(self.norm) == "2" else "inf"
        with run.aside(), run.plan.autocast():
            answer, gen = Answer(run.normalise, run.model), run.gen("adversarial-training")
            run.batch.x = pgd(answer, x, y.argmax(1), gen, eps=self.eps, steps=self.steps, step=step, norm=norm)
        run.images += self.steps * len(x)
