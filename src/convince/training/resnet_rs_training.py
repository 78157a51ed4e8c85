"""ResNet-RS training: the modern recipe as switches that add up, on any network."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor, nn

from convince.augment.randaugment import RandAugment
from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.training.ema import Ema
from convince.training.label_smoothing import LabelSmoothing

CARD = Card(
    part="resnet-rs-training",
    kind="technique",
    paper="resnet-rs",
    title="Revisiting ResNets: Improved Training and Scaling Strategies",
    year=2021,
    url="https://arxiv.org/abs/2103.07579",
    departs=(
        "epochs, learning rate and batch are the run's, and so is the cosine schedule; the paper trains 350 epochs at 0.1 per 256 images, 5 of warm-up",
        "stochastic depth belongs to the network (resnet-rs200 and larger have it)",
        "the average of weights warms up, so that a short run is not held at its first weights",
        "RandAugment has torchvision's operations and magnitudes; below 64 pixels the default magnitude is 5; the paper has 10 at 160 pixels, 15 from 192 on",
        "the lower weight decay replaces the run's own where that is not 0",
    ),
    tiny={"ema": 0.5},
    mutes=("ema", "label-smoothing", "randaugment"),
    expects=("images", "labels", "logits"),
)
LADDER = (  # each row switches one more on: the paper's table 1, beside cosine, 350 epochs, SE and ResNet-D, which are not of this part
    {"ema": 0.9999},
    {"smoothing": 0.1},
    {"layers": 2},
    {"dropout": 0.25},
    {"weight_decay": 4e-5},
)
OFF = {"smoothing": 0.0, "ema": 0.0, "layers": 0, "dropout": 0.0, "weight_decay": None}


def magnitude_for(side: int) -> int:
    """RandAugment's magnitude for images of this shorter side in pixels: 15 from 192 on, 10 from 64 on, 5 below."""
    return 15 if side >= 192 else 10 if side >= 64 else 5


def ladder() -> list[dict[str, Any]]:
    """The options of each rung of an additive study: all off, then one more of :data:`LADDER` on at a time."""
    rungs: list[dict[str, Any]] = [dict(OFF)]
    for step in LADDER:
        rungs.append({**rungs[-1], **step})
    return rungs


def drop_input(head: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Dropout of what a head reads, in training mode."""
    return (head.input_dropout(inputs[0]), *inputs[1:])  # type: ignore[operator]


@final
@dataclass
class ResNetRsTraining(Technique):
    """Label smoothing, EMA of the weights, RandAugment, dropout before the head, and a lower weight decay: each is a switch.

    Off are ``smoothing=0``, ``ema=0``, ``layers=0``, ``dropout=0`` and ``weight_decay=none``; then the run is the baseline.
    ``magnitude=none`` is chosen by :func:`magnitude_for`. The paper lowers the weight decay because the others regularise too.
    """

    smoothing: float = 0.1
    ema: float = 0.9999
    layers: int = 2
    magnitude: int | None = None
    dropout: float = 0.25
    weight_decay: float | None = 4e-5
    average: Ema = field(init=False, repr=False, compare=False)
    rank = 60  # after labels were mixed

    def __post_init__(self) -> None:
        if not 0 <= self.dropout < 1:
            raise Mistake(f"resnet-rs-training: dropout={self.dropout}: a probability from 0 (off) to below 1; 0.25 is the paper's")
        if self.weight_decay is not None and not self.weight_decay >= 0:
            raise Mistake(f"resnet-rs-training: weight_decay={self.weight_decay}: must be at least 0, or none to leave the run's own")
        LabelSmoothing(self.smoothing), RandAugment(self.layers, self.magnitude or 0)
        self.average = Ema(self.ema)

    def on_start(self, run: Run) -> None:
        self.average.on_start(run)
        if self.dropout:
            head = run.model.get_classifier() if hasattr(run.model, "get_classifier") else None  # type: ignore[operator]
            if not isinstance(head, nn.Module):
                raise Mistake(f"resnet-rs-training finds no head before which to drop in {run.settings.model!r}; give dropout=0 or another --model")
            run.edit("resnet-rs-training", dropout=self.dropout)

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Dropout on the input of the network's head; it has no weights and does nothing in eval mode."""
        head = model.get_classifier()  # type: ignore[operator]
        head.add_module("input_dropout", nn.Dropout(spec["dropout"]))
        head.register_forward_pre_hook(drop_input)

    def on_stage(self, run: Run) -> None:
        if self.ema:
            self.average.on_stage(run)

    def on_batch(self, run: Run) -> None:
        batch = run.batch
        if self.layers:
            magnitude = magnitude_for(min(run.data.preprocess.size)) if self.magnitude is None else self.magnitude
            batch.x, batch.y = RandAugment(self.layers, magnitude)(batch.x, batch.y, run.gen("resnet-rs-training"))
        if self.smoothing:
            LabelSmoothing(self.smoothing).on_batch(run)

    def on_grad(self, run: Run) -> None:
        if self.weight_decay is not None and run.optimizer is not None:
            for group in run.optimizer.param_groups:
                if group.get("weight_decay"):
                    group["weight_decay"] = self.weight_decay

    def on_step(self, run: Run) -> None:
        if self.ema:
            self.average.on_step(run)

    def wrap(self, answer: nn.Module) -> nn.Module:
        return self.average.wrap(answer)

    def on_end(self, run: Run) -> None:
        if self.ema:
            self.average.on_end(run)

    def state(self) -> dict[str, Any]:
        return self.average.state()

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self.average.restore(run, state)
