"""Adapters: what makes a loss, an optimiser, an augmentation or a layer switchable by ``--with``."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from convince import parts
from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Seat, Technique
from convince.types import Batch, Out


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
    made = part.load()
    if inspect.isclass(made) and issubclass(made, Technique):
        return made(**options)
    command = {"backbone": "--model", "explainer": "convince explain", "attack": "convince attack", "certifier": "convince certify"}
    command |= {"compressor": "convince compress", "probe": "convince probe", "recipe": "convince train RECIPE", "study": "convince prove"}
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
