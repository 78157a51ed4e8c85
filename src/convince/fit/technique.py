"""Technique: anything that changes training. Hooks many may have, slots that have one owner.

A technique is a settings-only object; the run is the argument of every call. It implements the
hooks it needs and claims a slot by having the method of that name. :class:`Team` holds all
techniques of a run in one order (rank, then name), and refuses in words what cannot work.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from convince.errors import Mistake
from convince.parts import Card
from convince.types import RunSpec, Stage

if TYPE_CHECKING:
    from convince.fit.run import Run

HOOKS = ("on_start", "on_stage", "on_batch", "around_grad", "on_loss", "on_grad", "on_step", "on_epoch", "on_end")
SLOTS = ("optimizer", "objective", "order", "gradient", "update", "stage", "answer")


class Technique:
    """Base of all techniques: every hook is empty, so a part writes only those it needs.

    Slots (write the method to claim it, and list it in the card's ``claims``)::

        optimizer(run, params: list[tuple[str, Parameter]]) -> torch.optim.Optimizer
        objective(run, out: Out, batch: Batch) -> Tensor          # a scalar loss
        order(run, index, gen) -> Tensor                          # rows of an epoch [m], or groups [m g]
        gradient(run) -> None                                     # fills .grad in place of loss.backward()
        update(run) -> None                                       # in place of optimizer.step()
        stage(run, i) -> Stage | None                             # the i-th main stage; a pure function of state
        answer(run) -> nn.Module                                  # [0, 1] pixels -> scores [n k]

    ``rank`` orders what does not commute in ``on_grad`` (unscale 0, clip 10, noise 20); 50 elsewhere.
    """

    rank: int = 50

    def on_start(self, run: Run) -> None:
        """After the network is built, before any optimiser: edits and ``run.extra`` modules are made here."""

    def on_stage(self, run: Run) -> None:
        """Once when a stage begins (not again when a run resumes inside it)."""

    def on_batch(self, run: Run) -> None:
        """Change ``run.batch``, the global batch on every process, before the forward pass."""

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        """Wrap forward, loss and backward: call ``grad()`` once or more, or do all three yourself."""
        grad()

    def on_loss(self, run: Run) -> None:
        """Add a term: ``run.loss = run.loss + term``."""

    def on_grad(self, run: Run) -> None:
        """Gradients are averaged over processes and in ``.grad``: clip them, add noise."""

    def on_step(self, run: Run) -> None:
        """After the weights moved: averages of weights, projections, masks."""

    def on_epoch(self, run: Run) -> None:
        """After each epoch: measure with ``run.evaluate``, tell with ``run.report``."""

    def on_end(self, run: Run) -> None:
        """After the last stage, before the answer is kept."""

    def before(self, run: Run) -> list[Stage]:
        """Stages that come before the main ones (pretraining); those of several parts stack."""
        return []

    def fit_members(self, run: Run) -> list[RunSpec]:
        """Further runs, trained before this one's stages; their answers are ``run.members_of(self)``, in order."""
        return []

    def wrap(self, answer: nn.Module) -> nn.Module:
        """Wrap the finished answer (temperature, crop selection)."""
        return answer

    def state(self) -> dict[str, Any]:
        """What must survive an interruption: tensors and JSON values."""
        return {}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        """Take back what :meth:`state` gave, after edits were replayed and weights loaded."""

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Perform the edit that ``run.edit(part, **spec)`` stored; called again whenever the run is loaded."""
        raise NotImplementedError("a part that calls run.edit defines rebuild(model, **spec)")


@dataclass(frozen=True)
class Seat:
    """A technique in a team: its card, the settings it was made with, the object."""

    card: Card
    options: dict[str, Any]
    technique: Technique

    @property
    def name(self) -> str:
        return self.card.part

    def has(self, method: str) -> bool:
        """True where the technique writes this hook, list or slot itself."""
        own = getattr(type(self.technique), method, None)
        return callable(own) and own is not getattr(Technique, method, None)

    @property
    def claims(self) -> tuple[str, ...]:
        return tuple(slot for slot in SLOTS if self.has(slot))


class Team:
    """All techniques of a run, in the order of (rank, name), with at most one owner a slot."""

    def __init__(self, seats: list[Seat], gives: tuple[str, ...] = ("images", "labels", "logits", "network")) -> None:
        self.seats = sorted(seats, key=lambda seat: (seat.technique.rank, seat.name))
        self._refuse(gives)
        self._hooks = {hook: [seat for seat in self.seats if seat.has(hook)] for hook in (*HOOKS, "before", "fit_members", "wrap")}
        self._owners = {slot: seat for seat in self.seats for slot in seat.claims}

    def _refuse(self, gives: tuple[str, ...]) -> None:
        """Raise a Mistake for what cannot work together, naming both sides and why."""
        for at, a in enumerate(self.seats):
            for word in a.card.expects:
                if word not in gives:
                    raise Mistake(f"{a.name!r} expects {word}, and this data has {', '.join(gives)}; leave it out")
            for b in self.seats[at + 1 :]:
                if a.name == b.name:
                    raise Mistake(f"{a.name!r} is switched on twice; name it once, with all its options")
                both = sorted(set(a.claims) & set(b.claims))
                if both:
                    raise Mistake(f"{a.name!r} and {b.name!r} both own the {both[0]}; switch on one of them")
            for b in self.seats:
                silenced = {b.card.part, b.card.kind, *b.claims, *b.card.expects} & set(a.card.mutes) if a is not b else set()
                if silenced:
                    word = sorted(silenced)[0]
                    what = f"its {word}" if word in SLOTS else f"a {word}" if word == b.card.kind else "it" if word == b.card.part else f"the {word} it expects"
                    raise Mistake(f"{a.name!r} mutes {what}, so {b.name!r} would do nothing beside it; switch on one of them")

    def seats_with(self, hook: str, stage: Stage | None = None) -> list[Seat]:
        """Who has this hook, in order; in a stage without guests only its owner."""
        seats = self._hooks[hook]
        if stage is not None and not stage.guests:
            return [seat for seat in seats if seat.technique is stage.owner]
        return seats

    def owner(self, slot: str, stage: Stage | None = None) -> Any:
        """The technique that owns the slot, or None; in a stage without guests only its owner counts."""
        seat = self._owners.get(slot)
        if seat is None or (stage is not None and not stage.guests and seat.technique is not stage.owner):
            return None
        return seat.technique

    def seat(self, technique: Technique) -> Seat:
        return next(seat for seat in self.seats if seat.technique is technique)
