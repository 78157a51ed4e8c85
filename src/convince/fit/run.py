"""Run: what parts may read and do while a network trains."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from convince import parts
from convince.data import Data
from convince.errors import Mistake
from convince.fit.answer import Answer, Normalise, Scores, score
from convince.fit.precision import Plan, full
from convince.fit.processes import World
from convince.fit.randomness import generator, preserved, seed_global
from convince.fit.record import Record
from convince.fit.settings import Settings
from convince.fit.state import resize_run
from convince.fit.technique import Team, Technique
from convince.fit.weights import edit_by_name
from convince.types import Batch, Out, RunSpec, Stage, StageCost

FEATURES: dict[str, Callable[[nn.Module], bool]] = {
    "forward_features": lambda m: hasattr(m, "forward_features") and hasattr(m, "forward_head"),
    "conv": lambda m: any(isinstance(x, nn.Conv2d) for x in m.modules()),
    "conv-bn": lambda m: {nn.Conv2d, nn.BatchNorm2d} <= {type(x) for x in m.modules()},
}


class Run:
    """One training run. Parts read its attributes and call its methods; the loop writes them.

    ``data, model, out, loss, batch, stage, epoch, step, seed, rank, world, optimizer, extra, edits,
    answer`` as in ``docs/architecture.md``. ``epoch`` and ``step`` count inside the stage and the epoch.
    """

    def __init__(
        self,
        settings: Settings,
        data: Data,
        team: Team,
        build: Callable[[], nn.Module],
        plan: Plan,
        world: World | None = None,
        record: Record | None = None,
    ) -> None:
        self.settings, self.data, self.team, self.build, self.plan = settings, data, team, build, plan
        self.processes = world or World()
        self.rank, self.world = self.processes.rank, self.processes.size
        self.record = record or Record()
        self.seed = settings.seed
        self.model: nn.Module = nn.Identity()
        self.normalise = Normalise(data.preprocess.mean, data.preprocess.std, image=data.preprocess.kind == "image")
        self.extra = nn.ModuleDict()  # trains and is checkpointed, never ships
        self.children: list[Run] = []  # the runs that fit_members asked for
        self.owners: list[str] = []  # the part that asked for each of them
        self.child: Callable[[RunSpec], Run] | None = None
        self.started_with = 0.0  # share of the network's numbers that came from the run named by --start
        self.edits: list[dict[str, Any]] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self.batch: Batch = Batch(torch.empty(0), None, torch.empty(0, dtype=torch.int64))
        self.out: Out = Out(None)
        self.loss: Tensor = torch.zeros(())
        self.stage: Stage = Stage("start", 0)
        self.stage_number, self.epoch, self.step = 0, 0, 0
        self.images = 0  # rows through the network in training mode, of all processes
        self.share = 1.0  # of the global batch that this process holds
        self.steps_done = 0  # in all stages
        self.stage_steps = 0  # in this stage
        self.stage_length = 1  # steps that this stage will have, unless it is stopped
        self.stopped = False
        self.most_steps: int | None = None  # of every stage: a survey does a few of each
        self.meter: Callable[[], float] = time.monotonic  # what a survey reads after each step
        self.ledger: list[StageCost] = []  # what each stage of this session has cost, members' stages first
        self._scores: dict[str, Scores] = {}
        self._taps: dict[str, Tensor] = {}
        self._tapping = True
        self._edited: dict[str, str] = {}

    # -- reading -----------------------------------------------------------------------------------

    @property
    def k(self) -> int:
        """Number of classes."""
        return self.data.k

    def gen(self, *who: object) -> Generator:
        """A generator seeded by (seed, who, stage, epoch, step): equal on all processes, never streamed."""
        return generator(self.seed, *who, self.stage_number, self.epoch, self.step)

    def forward(self, x: Tensor) -> Out:
        """One pass of the network on [0, 1] pixels: fp32 logits and the last features. Rows are counted."""
        self.images += round(len(x) / self.share)
        with self.plan.autocast():
            x = self.normalise(x)
            if not FEATURES["forward_features"](self.model):
                return Out(full(self.model(x)))
            features = self.model.forward_features(x)  # type: ignore[operator]
            return Out(full(self.model.forward_head(features)), features)  # type: ignore[operator]

    def tap(self, module: str) -> Callable[[], Tensor]:
        """A call that returns that module's output in THE pass of the current step (gradients attached)."""
        found = dict(self.model.named_modules()).get(module)
        if found is None:
            raise Mistake(f"tap({module!r}): the network has no module of that name{parts.nearest(module, [n for n, _ in self.model.named_modules()])}")

        def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if self._tapping:
                self._taps[module] = output

        found.register_forward_hook(keep)
        return lambda: self._taps[module]

    @contextlib.contextmanager
    def still(self) -> Iterator[None]:
        """A further pass that moves no buffer and no random state (and no tap), in the current mode."""
        kept = [(m, m._buffers) for m in [*self.model.modules(), *self.extra.modules()]]
        self._tapping = False
        with preserved():
            try:
                for module, buffers in kept:  # swapped, not copied back: backward may still need the originals
                    module._buffers = {n: None if b is None else b.clone() for n, b in buffers.items()}
                yield
            finally:
                for module, buffers in kept:
                    module._buffers = buffers
                self._tapping = True

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Eval mode, no gradient, everything put back: to measure during training."""
        modes = [(m, m.training) for m in [*self.model.modules(), *self.extra.modules()]]
        images = self.images
        self._tapping = False
        with preserved(), torch.no_grad():
            try:
                for module, _ in modes:
                    module.training = False
                yield
            finally:
                for module, training in modes:
                    module.training = training
                self._tapping, self.images = True, images

    @property
    def answer(self) -> nn.Module:
        """The answer as it stands: its owner's, or the network's, then every wrap in order of rank."""
        owner = self.team.owner("answer")
        answer = Answer(self.normalise, self.model) if owner is None else owner.answer(self)
        for seat in self.team.seats_with("wrap"):
            answer = seat.technique.wrap(answer)
        return answer

    @property
    def members(self) -> list[nn.Module]:
        """The answers of all runs that ``fit_members`` asked for; a part's own are :meth:`members_of`."""
        return [child.answer.eval() for child in self.children]

    def children_of(self, technique: Technique) -> list[Run]:
        """The runs that this part's ``fit_members`` asked for, in its order."""
        name = self.team.seat(technique).name
        return [child for child, owner in zip(self.children, self.owners, strict=True) if owner == name]

    def members_of(self, technique: Technique) -> list[nn.Module]:
        """Their answers."""
        return [child.answer.eval() for child in self.children_of(technique)]

    def evaluate(self, split: str = "val") -> Scores:
        """Scores of the answer on "train", "val" or "test"; kept until the next step."""
        if split not in self._scores:
            with self.aside():
                self._scores[split] = score(self.answer, self.data, self.data.split[split], self.plan, self.processes)
        return self._scores[split]

    def forget_scores(self) -> None:
        """The weights moved: scores are worked out anew when they are next asked for."""
        self._scores.clear()

    def body(self) -> set[str]:
        """Names of the network's parameters, less those of its head."""
        head = self.model.get_classifier() if hasattr(self.model, "get_classifier") else nn.Identity()  # type: ignore[operator]
        own = {id(p) for p in head.parameters()}
        return {name for name, p in self.model.named_parameters() if id(p) not in own}

    def require(self, *features: str) -> None:
        """Refuse in words a network that lacks what a part needs: ``run.require("conv-bn")``."""
        for feature in features:
            if not FEATURES[feature](self.model):
                raise Mistake(f"the network {self.settings.model!r} has no {feature}, which a part needs; choose another --model or leave the part out")

    # -- doing -------------------------------------------------------------------------------------

    def report(self, name: str, value: float, unit: str = "") -> None:
        """Write a named number to ``metrics.jsonl``, TensorBoard and the report."""
        self.record.reading(name, float(value), unit, self.stage_number, self.epoch, self.steps_done)

    def stop(self) -> None:
        """End training after this epoch."""
        self.stopped = True

    def edit(self, part: str, **spec: Any) -> None:
        """Change the network's shape by that part's ``rebuild(model, **spec)``; stored, and replayed on load.

        Names of existing parameters must survive, less those of the types that the part's card ``swaps``. New weights are seeded by (seed, name).
        """
        before = {name: _shape_of(m) for name, m in self.model.named_modules()}
        names = must_survive(self.model, swaps_of(part))
        self.replay({"part": part, "spec": spec})
        lost = names - {name for name, _ in self.model.named_parameters()}
        if lost:
            raise Mistake(f"the edit of {part!r} renamed or removed {sorted(lost)[0]!r}; add a child or a hook instead, so stored weights still fit")
        for name, module in self.model.named_modules():
            if name in before and before[name] != _shape_of(module):
                other = self._edited.setdefault(name, part)
                if other != part:
                    raise Mistake(f"{other!r} and {part!r} both edit the module {name!r}; switch on one of them")

    def replay(self, edit: dict[str, Any]) -> None:
        """Perform a stored edit and append it to ``edits``."""
        if "resize" in edit:
            resize_run(self, edit["resize"])
        else:
            edit_by_name(self.model, lambda model: rebuilder(edit["part"])(model, **edit["spec"]), self.seed)
            self.plan.place(self.model)
        self.edits.append(copy.deepcopy(edit))

    def resize(self, part: str, keep: dict[str, tuple[int, list[int]]]) -> None:
        """Keep only these positions along an axis of parameters: ``{name: (axis, keep)}``.

        Weights, gradients and optimiser state of the same shape are sliced; other optimiser state is reset.
        """
        self.replay({"part": part, "resize": {name: [axis, [int(i) for i in rows]] for name, (axis, rows) in keep.items()}})

    def seed_step(self, *who: object) -> None:
        """Seed the global state for what draws from it at this place."""
        seed_global(self.seed, *who, self.stage_number, self.epoch, self.step)


def rebuilder(part: str) -> Callable[..., None]:
    """The function that performs a part's edits: a technique's ``rebuild``, or a layer file's ``install``."""
    found = parts.get(part)
    if found.card.kind == "layer":
        return found.module().install
    return found.load().rebuild


def swaps_of(part: str) -> tuple[str, ...]:
    """The types of modules that a part takes the place of, as its card says."""
    return next((row.card.swaps for row in parts.find() if isinstance(row, parts.Part) and row.name == part), ())


def must_survive(model: nn.Module, swaps: tuple[str, ...]) -> set[str]:
    """Names of parameters that an edit must keep: those that stand in no module of a type named in ``swaps``."""
    swapped = [name + "." for name, m in model.named_modules() if {c.__name__ for c in type(m).__mro__} & set(swaps)]
    return {name for name, _ in model.named_parameters() if not name.startswith(tuple(swapped))}


def _shape_of(module: nn.Module) -> tuple:
    hooks = len(module._forward_hooks) + len(module._forward_pre_hooks)
    return type(module), hooks, tuple(name for name, _ in module.named_children()), tuple(module._parameters)
