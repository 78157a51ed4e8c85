"""Multi-architectural sampling: train a super-network by several sub-networks a batch, each drawn layer by layer, in one pass."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Int
from torch import Generator, Tensor, nn

from convince.backbones.vit_resnas import VitResnas, cut
from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="multi-arch-sampling",
    kind="technique",
    paper="vit-resnas",
    title="Searching for Efficient Multi-Stage Vision Transformers",
    year=2021,
    url="https://arxiv.org/abs/2109.00642",
    departs=(
        "the number of groups a batch is given, 16 as in the paper's batches of 1,024; the authors give the 64 images of a group",
        "the warm-up is an eighth of the training, the paper's 15 of 120 epochs",
        "images are drawn for the whole batch and then shared out; the authors draw for each process",
        "patch tokens are not mixed in training",
    ),
    strength="groups",
    off=0,
    expects=("images", "network"),
    host="vit-resnas:widths=(6,8),heads=((2,2),(2,2)),hidden=((8,8),(8,8)),head_dims=(2,2),patch=2,stem_width=2",
    tiny={"groups": 2, "warmup": 0.0, "widths": (1.0, 0.75)},
)

Genes = dict[str, int]
Choices = dict[str, list[int]]


def shares_of(most: int, shares: Sequence[float]) -> list[int]:
    """The channels that ``shares`` of a width come to, the most first, none twice: 256 by (1, .875, .75, .6875, .625) -> 256, 224, 192, 176, 160."""
    return sorted({max(round(most * share), 1) for share in shares}, reverse=True)


def steps_to(most: int, least: float, steps: int) -> list[int]:
    """``steps`` even steps from ``most`` down to its share ``least``, none twice: 768 to 0.5 in 7 -> 768, 704, 640, 576, 512, 448, 384."""
    return shares_of(most, [1 - (1 - least) * i / max(steps - 1, 1) for i in range(steps)])


@final
@dataclass(frozen=True)
class Elastic:
    """All sub-networks of a vit-resnas with the options ``largest`` (section 3.3).

    A stage's width is one of the shares ``widths``; heads and hidden units of a block fall from all to a share ``heads`` in 4 steps and
    ``hidden`` in ``hidden_steps``; ``skip`` says whether every second block of a stage may be left out.
    """

    largest: Mapping[str, Any]
    widths: Sequence[float] = (1.0, 0.875, 0.75, 0.6875, 0.625)
    heads: float = 0.5
    hidden: float = 0.5
    hidden_steps: int = 7
    skip: bool = True

    @property
    def choices(self) -> Choices:
        """What may be chosen, the most first, by the layers' names in ``kept``; a block is there (1) or left out (0)."""
        found: Choices = {}
        for i, (dim, heads, hidden) in enumerate(zip(*(self.largest[name] for name in ("widths", "heads", "hidden")), strict=True), 1):
            found[f"width{i}"] = shares_of(dim, self.widths)
            for j, (h, u) in enumerate(zip(heads, hidden, strict=True), 1):
                found[f"heads{i}.{j}"], found[f"hidden{i}.{j}"] = steps_to(h, self.heads, 4), steps_to(u, self.hidden, self.hidden_steps)
                if self.skip and j % 2 == 0:
                    found[f"block{i}.{j}"] = [1, 0]
        widths = [found[f"width{i}"] for i in range(1, len(self.largest["widths"]) + 1)]
        if any(a[0] > b[-1] for a, b in itertools.pairwise(widths)):
            raise Mistake(f"multi-arch-sampling: widths {widths}, a stage each: none of a stage may be below one of the stage before; double them by stage")
        return found

    def here(self, genes: Mapping[str, int]) -> list[list[int]]:
        """The places, a stage, of the blocks that stay, from 0."""
        return [[j for j in range(len(row)) if genes.get(f"block{i}.{j + 1}", 1)] for i, row in enumerate(self.largest["heads"], 1)]

    def options(self, genes: Mapping[str, int]) -> dict[str, Any]:
        """The options of the sub-network as a vit-resnas of its own; heads and hidden units of a block that is left out are not read."""
        here = self.here(genes)

        def rows(what: str) -> list[list[int]]:
            return [[genes[f"{what}{i}.{j + 1}"] for j in row] for i, row in enumerate(here, 1)]

        widths = [genes[f"width{i}"] for i in range(1, len(here) + 1)]
        fixed = {name: list(value) if isinstance(value, (list, tuple)) else value for name, value in self.largest.items()}
        return {**fixed, "widths": widths, "heads": rows("heads"), "hidden": rows("hidden")}

    def plain(self, genes: Mapping[str, int]) -> tuple[int, ...]:
        """The genes in order, 0 where a left-out block is concerned: equal ones are one network."""
        out = {name[5:] for name, value in genes.items() if name.startswith("block") and not value}
        return tuple(0 if name.removeprefix("heads").removeprefix("hidden") in out else value for name, value in genes.items())

    def sub_network(self, model: VitResnas, genes: Mapping[str, int]) -> VitResnas:
        """A network of its own with the weights that ``model`` uses for ``genes``."""
        return cut(model, self.options(genes), self.here(genes))


def open_choices(choices: Sequence[int], epoch: int, warmup: float) -> Sequence[int]:
    """How far the choices have widened after ``epoch`` epochs of ``warmup`` epochs, from the first alone to all."""
    if warmup <= 0 or epoch >= warmup:
        return choices
    return choices[: 1 + math.floor(epoch * (len(choices) - 1) / warmup)]


def assigned(choices: Sequence[int], rows: int, groups: int, gen: Generator) -> Int[Tensor, " n"]:
    """The choice of each row: row r is of group r modulo ``groups``; each choice is dealt to as many groups as any other, within one, in random order."""
    dealt = torch.tensor([*choices] * -(-groups // len(choices)))
    return dealt[torch.randperm(len(dealt), generator=gen)][torch.arange(rows) % groups]


@final
@dataclass
class MultiArchSampling(Technique):
    """Cut each batch into ``groups`` that train a sub-network each, drawn anew and independently for every layer; ``groups=0`` is off.

    The other settings are those of :class:`Elastic`; ``warmup`` is the share of the training over which the choices widen. The answer is the
    largest network; :class:`Elastic` takes others out.
    """

    groups: int = 16
    warmup: float = 0.125
    widths: Sequence[float] = (1.0, 0.875, 0.75, 0.6875, 0.625)
    heads: float = 0.5
    hidden: float = 0.5
    hidden_steps: int = 7
    skip: bool = True
    rank = 90  # after parts that change the rows of a batch

    def __post_init__(self) -> None:
        if self.groups < 0 or not 0 <= self.warmup <= 1:
            raise Mistake(f"multi-arch-sampling: groups={self.groups}, warmup={self.warmup}: groups at least 0 (0 is off), warmup a share from 0 to 1")
        if not isinstance(self.widths, (tuple, list)) or max(self.widths, default=0) != 1 or min(self.widths) <= 0:
            raise Mistake(f"multi-arch-sampling: widths={self.widths!r}: shares of the largest width, 1 among them and none above, written widths=(1.0,0.5)")
        if not (0 < self.heads <= 1 and 0 < self.hidden <= 1) or self.hidden_steps < 1:
            raise Mistake(f"multi-arch-sampling: heads={self.heads}, hidden={self.hidden}: the least shares, above 0 and at most 1, in at least one step")

    def elastic(self, model: VitResnas) -> Elastic:
        """The sub-networks that are drawn from."""
        return Elastic(model.options, self.widths, self.heads, self.hidden, self.hidden_steps, self.skip)

    def on_start(self, run: Run) -> None:
        _ = self.elastic(super_network(run.model, run.settings.model)).choices

    def on_batch(self, run: Run) -> None:
        if self.groups == 0:
            return
        model, gen = super_network(run.model, run.settings.model), run.gen("multi-arch-sampling")
        if run.edits:
            raise Mistake(f"multi-arch-sampling masks a plain vit-resnas, and {run.edits[0]['part']!r} has changed the network; leave one of them out")
        rows, warmup = len(run.batch.x), self.warmup * run.stage.epochs
        for name, values in self.elastic(model).choices.items():
            values = [1, 1, 0, 0] if values == [1, 0] else values  # so that a block is left out from the middle of the warm-up on
            run.batch.extra[f"keeps {name}"] = assigned(open_choices(values, run.epoch, warmup), rows, min(self.groups, rows), gen).to(run.batch.x.device)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        model = super_network(run.model, run.settings.model)
        model.kept = {name.removeprefix("keeps "): run.batch.extra.pop(name) for name in list(run.batch.extra) if name.startswith("keeps ")}
        try:
            grad()
        finally:
            model.kept = {}


def super_network(model: nn.Module, name: str | None) -> VitResnas:
    """The network, or a Mistake where it is another one."""
    if not isinstance(model, VitResnas):
        raise Mistake(f"multi-arch-sampling trains a vit-resnas, and the network is {name!r}; use --model vit-resnas-mini")
    return model
