"""Self-expanding: add a layer or channels to a network while it trains, where a natural expansion score asks for them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from convince.backbones.expanding_cnn import ExpandingCnn, grow, inserted, settle, widened
from convince.errors import Mistake
from convince.fit.randomness import generator, key
from convince.fit.run import Run
from convince.fit.state import load_optimizer, named, optimizer_state
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="self-expanding",
    kind="technique",
    paper="self-expanding-cnn",
    title="Self Expanding Convolutional Neural Networks",
    year=2024,
    url="https://arxiv.org/abs/2401.05686",
    departs=(
        "made for expanding-cnn, whose layers can be added without a change of its answers; the authors' added layers do change them",
        "the Fisher information is that of single examples, as the paper writes it; the authors' code squares the gradients of whole batches,"
        " and divides the score by the number of parameters",
        "channels are added two at a time throughout; the paper later adds four, and does not say from when on",
        "what is added is judged with batch norms that know its statistics; fresh ones would hide what new channels can do",
        "the network that stood before a growth is not kept as a file; its size and its accuracy on validation are reported",
        "nothing is added in the last epoch, which leaves no training for it, nor in stages that train on something other than the labels",
    ),
    strength="tau",
    off=inf,
    expects=("images", "labels", "network"),
    host="expanding-cnn:layers=(1,1),widths=(4,4),hidden=4",
    tiny={"tau": 0.0, "cooldown": 1, "images": 8},
)
Proposal = tuple[str, int]  # "layer" or "channels", and the block


# -- the score --------------------------------------------------------------------------------------


def natural_expansion_score(gradient: Float[Tensor, " p"], fisher: Float[Tensor, " p"], damping: float = 1e-8) -> float:
    """``eta = g^T F^-1 g`` with the diagonal ``F + damping``: the loss that a natural gradient step would take away, up to its length."""
    return float((gradient.square() / (fisher + damping)).sum())


def regularised(eta: float, added: int, strength: float = 1e-7) -> float:
    """``eta exp(-strength added^2)`` for a network of so many more parameters (eq. 3)."""
    return eta * math.exp(-strength * added**2)


def moments(model: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], chunk: int = 64) -> tuple[Float[Tensor, " p"], Float[Tensor, " p"]]:
    """Mean over examples of the gradient of the cross-entropy, and of its square: g and the diagonal of the empirical Fisher matrix.

    In eval mode, for all parameters in their order; the model is left as it is. ``chunk`` examples are held at once.
    """
    weights = {name: p.detach() for name, p in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def loss(w: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, {**w, **buffers}, (x[None],)), y[None])

    first = torch.zeros(sum(p.numel() for p in weights.values()), dtype=x.dtype, device=x.device)
    second = torch.zeros_like(first)
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for some, labels in zip(x.split(chunk), y.split(chunk), strict=True):
            found = vmap(grad(loss), (None, 0, 0))(weights, some, labels)
            each = torch.cat([g.flatten(1) for g in found.values()], 1)
            first += each.sum(0)
            second += each.square().sum(0)
    finally:
        for module, training in modes:
            module.training = training
    return first / len(x), second / len(x)


# -- the rule ---------------------------------------------------------------------------------------


def proposals(model: ExpandingCnn, most_layers: int = 10) -> list[Proposal]:
    """A layer for each block that has fewer than ``most_layers``, then channels for each block."""
    return [*(("layer", b) for b, count in enumerate(model.layers) if count < most_layers), *(("channels", b) for b in range(model.blocks))]


def choose(current: float, scores: Mapping[Proposal, float], tau: float) -> Proposal | None:
    """The proposal of the highest score if that is above ``tau`` times the current one; else None."""
    best = max(scores, key=scores.__getitem__, default=None)
    return best if best is not None and scores[best] > tau * current else None


# -- the optimiser ----------------------------------------------------------------------------------


def padded(state: dict[str, dict[str, Any]], shapes: Mapping[str, torch.Size], places: list[tuple[str, int, int]], channels: int) -> dict[str, dict[str, Any]]:
    """An optimiser's state by parameter name, made longer where the parameters of these ``shapes`` were; state of another shape is dropped.

    A new place gets 0; in a slot that is negative nowhere in the network it gets the mean of the others, since a second moment of 0 would make
    its first steps far too long.
    """
    negative = {slot for slots in state.values() for slot, value in slots.items() if isinstance(value, Tensor) and bool((value < 0).any())}
    found = {name: dict(slots) for name, slots in state.items()}
    for name in {name for name, _, _ in places} & found.keys():
        if any(isinstance(slot, Tensor) and slot.dim() and slot.shape != shapes[name] for slot in found[name].values()):
            del found[name]
    for name, axis, at in places:
        for slot, value in found.get(name, {}).items():
            if isinstance(value, Tensor) and value.dim():
                found[name][slot] = inserted(value, axis, at, channels, 0.0 if slot in negative else value.mean())
    return found


def renew_optimizer(run: Run, change: Callable[[], None], places: list[tuple[str, int, int]], channels: int) -> None:
    """``change()`` the network, and give the run an optimiser over all that it learns now, with the state that it had."""
    from convince.fit.loop import plain_sgd

    assert run.optimizer is not None
    shapes = {name: p.shape for name, p in named(run)}
    kept = optimizer_state(run.optimizer, {p: name for name, p in named(run)})
    change()
    for name, p in named(run):
        p.requires_grad_(run.stage.trainable is None or run.stage.trainable(name))
    params = [(name, p) for name, p in named(run) if p.requires_grad]
    owner = run.team.owner("optimizer")
    run.optimizer = plain_sgd(run, params) if owner is None else owner.optimizer(run, params)
    load_optimizer(run.optimizer, {p: name for name, p in named(run)}, {**kept, "state": padded(kept["state"], shapes, places, channels)})


# -- the part ---------------------------------------------------------------------------------------


@final
@dataclass
class SelfExpanding(Technique):
    """After an epoch, grow the network by the proposal of the highest score, if that is above ``tau`` times the network's own.

    Scores are read off ``images`` training images with ``damping``; ``strength`` is lambda in :func:`regularised`. ``channels`` are added at
    once, ``noise`` is the size of new weights. After a growth nothing is added for ``cooldown`` epochs. A block has at most ``most_layers``,
    the network at most ``most_parameters`` (None: any number), and it grows at most ``most`` times (None: as often as the score asks).
    ``choice`` "random" takes a random proposal of the kind that the score prefers, to see what the score is worth.
    ``tau=0`` grows whenever it may, ``tau=inf`` never.
    """

    tau: float = 2.0
    cooldown: int = 10
    channels: int = 2
    noise: float = 1e-4
    images: int = 512
    damping: float = 1e-8
    strength: float = 1e-7
    most_layers: int = 10
    most_parameters: int | None = None
    most: int | None = None
    choice: str = "score"
    since: int | None = field(default=None, init=False, repr=False, compare=False)  # epochs since the last growth
    grown: list[dict[str, Any]] = field(default_factory=list, init=False, repr=False, compare=False)
    rank = 90  # after all edits

    def __post_init__(self) -> None:
        for name, least in (("tau", 0.0), ("damping", 0.0), ("strength", 0.0), ("cooldown", 1), ("channels", 1), ("images", 1), ("most_layers", 1)):
            if not getattr(self, name) >= least:
                raise Mistake(f"self-expanding: {name}={getattr(self, name)}: must be at least {least}")
        if not self.noise > 0:
            raise Mistake(f"self-expanding: noise={self.noise}: must be above 0, or new channels never learn; 1e-4 is the paper's")
        if self.choice not in ("score", "random"):
            raise Mistake(f"self-expanding: choice={self.choice!r} must be 'score' or 'random'")

    def on_start(self, run: Run) -> None:
        self.since, self.grown = None, []
        self._model(run)

    def on_epoch(self, run: Run) -> None:
        stage = run.stage
        ends = run.stage_steps >= run.stage_length
        self.since = None if self.since is None else self.since + 1
        if ends or run.stopped or stage.targets is not None or stage.objective is not None or run.optimizer is None:
            return
        if (self.since is not None and self.since < self.cooldown) or (self.most is not None and len(self.grown) >= self.most):
            return
        found = self._scores(run)
        if found is not None:
            self._expand(run, *found)

    def _scores(self, run: Run) -> tuple[Proposal, float] | None:
        """The proposal to take and its ratio to the current score; None where none is above the threshold."""
        model, (x, y), size = self._model(run), self._rows(run), count(run.model)
        passes, scores, added = 1, dict[Proposal, float](), dict[Proposal, int]()
        current = natural_expansion_score(*moments(model, x, y), self.damping)
        for proposal in proposals(model, self.most_layers):
            grown = copy.deepcopy(model)
            grow(grown, **self._spec(run, proposal))
            added[proposal] = count(grown) - size
            if self.most_parameters is not None and size + added[proposal] > self.most_parameters:
                continue
            settle(grown, *proposal, self.channels, x)
            scores[proposal] = regularised(natural_expansion_score(*moments(grown, x, y), self.damping), added[proposal], self.strength)
            passes += 1
        run.images += passes * len(x)
        if not scores:
            return None
        best = max(scores.values()) / max(current, 1e-30)
        run.report("self-expanding, best score by the current one", best)
        chosen = choose(current, scores, self.tau)
        if chosen is not None and self.choice == "random":
            alike = [other for other in scores if other[0] == chosen[0]]
            chosen = alike[int(torch.randint(len(alike), (), generator=run.gen("self-expanding", "random")))]
        return None if chosen is None else (chosen, scores[chosen] / max(current, 1e-30))

    def _expand(self, run: Run, proposal: Proposal, ratio: float) -> None:
        model, (kind, block) = self._model(run), proposal
        row: dict[str, Any] = {"epoch": run.epoch + 1, "kind": kind, "block": block, "ratio": ratio, "parameters": count(model)}
        if len(run.data.split.val):
            row["accuracy"] = run.evaluate("val").accuracy
            run.report("self-expanding, accuracy on validation before growing", row["accuracy"])
        places = widened(model, block, self.channels) if kind == "channels" else []
        parameters = {name for name, _ in model.named_parameters()}
        spec = self._spec(run, proposal)
        renew_optimizer(run, lambda: run.edit("self-expanding", **spec), [place for place in places if place[0] in parameters], self.channels)
        settle(model, kind, block, self.channels, self._rows(run)[0])
        self.since = 0
        self.grown.append(row | {"layers": list(model.layers), "widths": list(model.widths)})
        run.forget_scores()
        run.report("self-expanding, parameters", count(model), "parameters")

    def _spec(self, run: Run, proposal: Proposal) -> dict[str, Any]:
        kind, block = proposal
        seed = key(run.seed, "self-expanding", len(self.grown))
        return {"kind": kind, "block": block, "channels": self.channels, "noise": self.noise, "seed": seed}

    def _rows(self, run: Run) -> tuple[Tensor, Tensor]:
        """The images that all scores are read off, as the network reads them, and their labels."""
        index = run.data.split.train[run.data.y[run.data.split.train] >= 0]
        index = index[torch.randperm(len(index), generator=generator(run.seed, "self-expanding", "rows"))[: self.images]]
        return run.normalise(run.plan.pixels(run.data.x.take(index))), run.data.y[index].to(run.plan.device)

    def _model(self, run: Run) -> ExpandingCnn:
        """The network, or a Mistake where it cannot grow."""
        if not isinstance(run.model, ExpandingCnn):
            raise Mistake(f"self-expanding grows an expanding-cnn, and the network is {run.settings.model!r}; use --model expanding-cnn-start")
        other = next((edit.get("part", "another part") for edit in run.edits if edit.get("part") != "self-expanding"), None)
        if other is not None:
            raise Mistake(f"self-expanding grows a plain expanding-cnn, and {other!r} has changed the network; leave one of them out")
        return run.model

    def state(self) -> dict[str, Any]:
        return {"since": self.since, "grown": self.grown}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self.since, self.grown = state.get("since"), list(state.get("grown", []))

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Grow the network as :func:`grow` does; the statistics of what is new come with the stored weights."""
        assert isinstance(model, ExpandingCnn)
        grow(model, **spec)


def count(model: nn.Module) -> int:
    """Parameters of a network."""
    return sum(p.numel() for p in model.parameters())
