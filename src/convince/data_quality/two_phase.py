"""Two-phase training: first on a balanced set, then the output layer alone on the set as it is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import nn

from convince.data_quality.oversampling import oversample
from convince.data_quality.undersampling import undersample
from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Stage

CARD = Card(
    part="two-phase",
    kind="technique",
    paper="class-imbalance-study",
    title="A systematic study of the class imbalance problem in convolutional neural networks",
    year=2018,
    url="https://arxiv.org/abs/1710.05381",
    departs=(
        "the two phases share the run's steps, a quarter for the second by default; the paper gives each its own number of epochs",
        "the learning rate of the second phase is a tenth of the run's (share lr); an optimiser with a rate of its own and no --lr keeps it",
        "batch normalisation keeps the statistics of the first phase in the second, as all but the output layer is frozen",
    ),
    claims=("stage",),
    mutes=("oversampling", "undersampling"),
    expects=("labels",),
)
LAST = "output layer"


@final
@dataclass
class TwoPhase(Technique):
    """``pre`` "over" or "under" balances the first phase; ``second`` is the share of steps of the second, ``lr`` its rate over the run's."""

    pre: str = "over"
    second: float = 0.25
    lr: float = 0.1

    def __post_init__(self) -> None:
        if self.pre not in ("over", "under"):
            raise Mistake(f"pre={self.pre!r}: must be 'over' (repeat small classes) or 'under' (cut large ones)")
        if not 0 < self.second < 1:
            raise Mistake(f"second={self.second}: the share of steps of the second phase must lie between 0 and 1")
        if not self.lr > 0:
            raise Mistake(f"lr={self.lr}: the second phase's learning rate over the run's must be above 0")

    def on_start(self, run: Run) -> None:
        output_layer(run.model)
        rows = run.data.split.train
        self._rows = rows[run.data.y[rows] >= 0]
        balance = oversample if self.pre == "over" else undersample
        self._balanced = self._rows[balance(run.data.y[self._rows], 1.0, run.gen("two-phase"))]

    def stage(self, run: Run, i: int) -> Stage | None:
        if i > 1:
            return None
        settings = run.settings
        batch = settings.batch or 64
        steps = settings.steps or (settings.epochs or 0) * max(len(self._rows) // batch, 1)
        last = round(self.second * steps)
        rows, steps = (self._balanced, steps - last) if i == 0 else (self._rows, last)
        epochs = math.ceil(steps / max(len(rows) // batch, 1))
        if i == 0:
            return Stage("balanced", epochs, index=rows, steps=steps or None)
        head = {id(p) for p in output_layer(run.model).parameters()}
        names = {name for name, p in run.model.named_parameters() if id(p) in head}
        rate = settings.lr or (0.1 if run.team.owner("optimizer") is None else None)
        return Stage(LAST, epochs, index=rows, steps=steps or None, trainable=names.__contains__, lr=None if rate is None else self.lr * rate)

    def on_batch(self, run: Run) -> None:
        if run.stage.owner is self and run.stage.name == LAST:
            for module in run.model.modules():
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()


def output_layer(model: nn.Module) -> nn.Module:
    """The network's last layer, as timm's ``get_classifier`` gives it; a Mistake where there is none with weights."""
    found = model.get_classifier() if hasattr(model, "get_classifier") else None  # type: ignore[operator]
    if not isinstance(found, nn.Module) or not any(isinstance(p, torch.Tensor) for p in found.parameters()):
        raise Mistake(f"two-phase trains the output layer alone, and {type(model).__name__} names none by get_classifier(); choose another --model")
    return found
