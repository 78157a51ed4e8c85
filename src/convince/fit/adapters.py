"""Adapters: what makes a loss, an optimiser, an augmentation, a layer, a predictor or a probe switchable by ``--with``."""

from __future__ import annotations

import inspect
import time
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from convince import parts
from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Seat, Technique
from convince.kinds import Probe
from convince.types import Batch, Findings, Out


@final
@dataclass
class Objective(Technique):
    """A loss as the run's objective; each row's loss is multiplied by its weight where there is one."""

    loss: nn.Module

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        losses = self.loss(out.logits, batch.y)
        return losses.mean() if batch.weight is None else (losses * batch.weight).mean()


@final
@dataclass
class Optimizer(Technique):
    """An optimiser class as the run's; ``--lr`` is used unless the part names its own."""

    make: Any
    options: dict[str, Any]

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        options = dict(self.options)
        if run.settings.lr is not None:
            options.setdefault("lr", run.settings.lr)
        return self.make([p for _, p in params], **options)


@final
@dataclass
class Augmentation(Technique):
    """A function ``(x, y, gen) -> (x, y)`` on each training batch."""

    name: str
    augment: Any

    def on_batch(self, run: Run) -> None:
        run.batch.x, run.batch.y = self.augment(run.batch.x, run.batch.y, run.gen(self.name))


@final
@dataclass
class Layer(Technique):
    """A layer, edited into the network at the start."""

    name: str
    options: dict[str, Any]
    rank = 40  # before techniques that read the network

    def on_start(self, run: Run) -> None:
        run.edit(self.name, **self.options)


@final
@dataclass
class Predictor(Technique):
    """A predictor, wrapped around the finished answer."""

    predictor: Any

    def wrap(self, answer: nn.Module) -> nn.Module:
        return self.predictor.wrap(answer)


@final
class Riding(Technique):
    """A probe that measures while a network trains: after an epoch, on training images, and only while it has taken at most SHARE of the time.

    It changes no bit of the training. The first epoch is always measured; which later ones are depends on the clock. ``found``: what it saw last.
    """

    IMAGES = 512  # evenly through the training part
    SHARE = 0.05
    rank = 90  # after parts that change the network at the end of an epoch

    def __init__(self, name: str, probe: Probe) -> None:
        self.name, self.probe = name, probe
        self.found: Findings | None = None
        self.spent, self.began, self.measured = 0.0, 0.0, 0

    def on_start(self, run: Run) -> None:
        self.spent, self.began, self.measured = 0.0, time.monotonic(), 0

    def on_epoch(self, run: Run) -> None:
        elapsed = time.monotonic() - self.began
        cost = self.spent / max(self.measured, 1)
        if run.rank != 0 or (self.measured and self.spent + cost > self.SHARE * elapsed):
            return
        data, rows = run.data, run.data.split.train
        rows = rows[data.y[rows] >= 0]
        rows = rows[torch.linspace(0, len(rows) - 1, min(self.IMAGES, len(rows))).long()]
        before = time.monotonic()
        with run.aside(), run.plan.autocast():
            x, y = run.plan.pixels(data.x.take(rows)), data.y[rows].to(run.plan.device)
            self.found = self.probe.probe(run.answer, x, y)
        self.spent += time.monotonic() - before
        self.measured += 1
        for reading in self.found.readings:
            run.report(f"{self.name}: {reading.name}", reading.value, reading.unit)
        run.report(f"{self.name}: overhead", 100 * self.spent / max(time.monotonic() - self.began, 1e-9), "% of the training time")


def seat(spec: str) -> Seat:
    """The seat for ``"name:key=value"``: the technique itself, or the adapter of its kind."""
    name, options = parts.parse(spec)
    part = parts.get(name)
    parts.check_options(part, options)
    card = part.card
    made = _adapt(part, options)
    return Seat(card, options, made)


def _adapt(part: parts.Part, options: dict[str, Any]) -> Technique:
    match part.card.kind:
        case "loss":
            return Objective(part.load()(**{**options, "reduction": "none"}))
        case "optimizer":
            return Optimizer(part.load(), options)
        case "augmentation":
            return Augmentation(part.name, part.load()(**options))
        case "layer":
            return Layer(part.name, options)
        case "predictor":
            return Predictor(part.load()(**options))
        case "probe":
            return Riding(part.name, part.load()(**options))
    made = part.load()
    if inspect.isclass(made) and issubclass(made, Technique):
        return made(**options)
    command = {"backbone": "--model", "explainer": "convince explain", "attack": "convince attack", "certifier": "convince certify"}
    command |= {"compressor": "convince compress", "recipe": "convince train RECIPE", "study": "convince prove"}
    raise Mistake(
        f"{part.name!r} is of kind {part.card.kind} and cannot be switched on by --with; use {command.get(part.card.kind, 'convince show')} {part.name}"
    )


def is_off(made: Seat) -> bool:
    """True where the part's strength stands at off, so that the loop may drop it."""
    card = made.card
    if card.strength is None:
        return False
    default = parts.get(card.part).options()[card.strength].default
    return made.options.get(card.strength, default) == card.off
