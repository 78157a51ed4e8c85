"""Early stopping: end training when validation no longer improves, and keep the best weights."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from math import inf
from typing import Any, final

from torch import Tensor

from convince.errors import Mistake
from convince.fit.answer import Answer, Scores
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="early-stopping",
    kind="technique",
    title="Early Stopping - But When?",
    year=1998,
    url="https://doi.org/10.1007/3-540-49430-8_3",
    strength="patience",
    off=inf,
    tiny={"patience": 1, "min_delta": 1000.0},
    expects=("labels",),
    mutes=("unused",),
    departs=("counts epochs since the best one; the paper's criteria also weigh how far the error has risen, or count strips of epochs in which it rose",),
)


def badness(scores: Scores, metric: str) -> float:
    """What shall be small: the log-loss, or the share of wrong answers."""
    return scores.log_loss if metric == "log_loss" else 1 - scores.accuracy


@final
@dataclass
class EarlyStopping(Technique):
    """Stop a stage after ``patience`` epochs without a better validation ``metric``; end with the weights of the best epoch.

    Better means by more than ``min_delta``. What is kept are the weights that were measured, so beside ``ema`` the
    averaged ones. In a run of several stages each stops on its own, and the last one's best weights are restored,
    if it is one that this part took part in.
    The schedule is not shortened: with ``--schedule cosine`` a run that stops early ends at a high learning rate.
    ``patience=inf`` is off.
    """

    patience: float = 10
    metric: str = "log_loss"
    min_delta: float = 0.0
    best: float = field(default=math.inf, init=False, repr=False, compare=False)
    at: int = field(default=-1, init=False, repr=False, compare=False)
    epoch: int = field(default=0, init=False, repr=False, compare=False)
    waited: int = field(default=0, init=False, repr=False, compare=False)
    weights: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    rank = 95

    def __post_init__(self) -> None:
        if not self.patience >= 1:
            raise Mistake(f"early-stopping: patience={self.patience}: must be at least 1 epoch; 10 is usual, inf is off")
        if self.metric not in ("log_loss", "accuracy"):
            raise Mistake(f"early-stopping: metric={self.metric!r}: must be 'log_loss' or 'accuracy'")
        if not self.min_delta >= 0:
            raise Mistake(f"early-stopping: min_delta={self.min_delta}: must be at least 0, in units of the metric")

    def on_start(self, run: Run) -> None:
        if math.isfinite(self.patience) and not len(run.data.split.val):
            raise Mistake("early-stopping needs a validation part and this data has none; give --val 0.1 or leave the part out")

    def on_stage(self, run: Run) -> None:
        self.at, self.best, self.epoch, self.waited, self.weights = run.stage_number, math.inf, 0, 0, {}

    def on_epoch(self, run: Run) -> None:
        if math.isinf(self.patience):
            return
        found, weights = badness(run.evaluate("val"), self.metric), measured(run)
        if self.best == math.inf or found < self.best - self.min_delta or not fits(self.weights, weights):
            self.best, self.epoch, self.waited = found, run.epoch, 0
            self.weights = {name: tensor.detach().clone() for name, tensor in weights.items()}
            return
        self.waited += 1
        if self.waited >= self.patience:
            run.stop()

    def on_end(self, run: Run) -> None:
        if self.weights and self.at == run.stage_number - 1 and fits(self.weights, run.model.state_dict()):
            run.model.load_state_dict(self.weights)
            run.report("best epoch", self.epoch + 1, "epochs")
            run.forget_scores()  # scores of the last epoch's weights are not this network's
        self.at, self.weights = -1, {}

    def state(self) -> dict[str, Any]:
        if self.at < 0:
            return {}
        return {"stage": self.at, "best": self.best, "epoch": self.epoch, "waited": self.waited, "weights": dict(self.weights)}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self.at, self.best, self.epoch = state.get("stage", -1), state.get("best", math.inf), state.get("epoch", 0)
        self.waited, self.weights = state.get("waited", 0), state.get("weights", {})


def measured(run: Run) -> dict[str, Tensor]:
    """The weights of the network inside the answer that validation measured; the training network's where that is not one network."""
    live = run.model.state_dict()
    inside = [module.model.state_dict() for module in run.answer.modules() if isinstance(module, Answer)]
    return inside[0] if len(inside) == 1 and fits(inside[0], live) else live


def fits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """True where two sets of weights have the same names and shapes."""
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape for name in a)
