"""GB-DNN: boosting for tables; each learner has one more dense layer, first layer and output learnt anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

from torch import nn

from convince.ensemble.gb_cnn import Boosting, GrownHead, head_of, replace_head
from convince.fit.run import Run
from convince.parts import Card

CARD = Card(
    part="gb-dnn",
    kind="technique",
    paper="gb-cnn",
    title="A Gradient Boosting Approach for Training Convolutional and Deep Neural Networks",
    year=2023,
    url="https://arxiv.org/abs/2302.11327",
    claims=("optimizer", "objective", "stage", "answer"),
    mutes=("loss", "optimizer", "labels", "logits"),
    expects=("labels", "table"),
    tiny={"rounds": 2, "units": 4},
    departs=(
        "the first dense layer is the network's own trunk; --model mlp:hidden=(20,) is the paper's",
        "the run's --epochs (or steps) are shared by the rounds; the release allows each round 200 epochs (inner_epochs=200)",
        "two classes are treated as K = 2; the paper has a form with one output for them",
        "batch statistics move by 0.1 with epsilon 1e-5; Keras moves them by 0.01 with 1e-3",
    ),
)


@final
@dataclass
class GbDnn(Boosting):
    """Boost ``rounds`` nets: first layer - dense layers of ``units``, one more each round - BN - dropout 0.1 - output.

    The dense layers of earlier rounds are carried on and frozen; the first layer, the batch statistics and
    the output start anew each round. Options as in gb-cnn.
    """

    rounds: int = 2
    units: int = 20
    eta: float = 0.1
    patience: int = 3
    inner_epochs: int | None = None

    def renew(self, run: Run) -> None:
        """Glorot's uniform weights for the trunk's and the output's linear layers, and new batch statistics."""
        head = head_of(run.model)[0]
        gen = run.gen("gb-dnn")
        for name, module in run.model.named_modules():
            if isinstance(module, nn.Linear) and not name.startswith(f"{head}.dense."):
                nn.init.xavier_uniform_(module.weight, generator=gen)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm1d):
                module.reset_parameters()  # ones and zeros: nothing is drawn

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Add one dense layer of ``units``; the first time batch normalisation and dropout stand after it."""
        head = head_of(model)[1]
        if not isinstance(head, GrownHead):
            units = spec["units"]
            head = GrownHead(head.in_features, units, head.out_features, nn.Identity(), nn.Sequential(nn.BatchNorm1d(units), nn.Dropout(0.1)))
            replace_head(model, head)
        head.grow()
