"""ScheduledDropPath: drop operations inside the cells of a network, the later the cell and the step, the more often."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

from torch import nn

from convince.backbones.nasnet import Cell
from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="scheduled-drop-path",
    kind="technique",
    paper="nasnet",
    title="Learning Transferable Architectures for Scalable Image Recognition",
    year=2018,
    url="https://arxiv.org/abs/1707.07012",
    strength="p",
    off=0.0,
    expects=("network",),
    host="nasnet:cells=1,filters=2",
    tiny={"p": 0.4},
    departs=(
        "the schedule starts anew with each stage, where another part trains in several",
        "p is 0.4, as on CIFAR in the authors' code; on photographs it has 0.3",
    ),
)


def probability(p: float, cell: int, cells: int, progress: float) -> float:
    """The probability that an operation of the ``cell``-th of ``cells`` cells (from 0) is dropped, at ``progress`` 0 to 1 of training."""
    return p * (cell + 1) / cells * min(progress, 1.0)


def cells_of(model: nn.Module) -> list[Cell]:
    """The cells of the network, in order; a Mistake where it has none."""
    found = [module for module in model.modules() if isinstance(module, Cell)]
    if not found:
        raise Mistake(f"scheduled-drop-path: {type(model).__name__} has no cells whose paths could be dropped; use --model nasnet-mini, or leave it out")
    return found


@final
@dataclass
class ScheduledDropPath(Technique):
    """Each operation in a cell, identities apart, is dropped by row with :func:`probability`, and what is left is scaled up; ``p=0`` is off.

    ``schedule`` "linear" rises from 0 to ``p`` over the steps of a stage; "fixed" has ``p`` throughout, which is plain drop-path.
    """

    p: float = 0.4
    schedule: str = "linear"

    def __post_init__(self) -> None:
        if not 0 <= self.p < 1:
            raise Mistake(f"scheduled-drop-path: p={self.p}: a probability from 0 (off) to below 1; 0.3 and 0.4 are the paper's")
        if self.schedule not in ("linear", "fixed"):
            raise Mistake(f"scheduled-drop-path: schedule={self.schedule!r} must be 'linear' or 'fixed'")

    def on_start(self, run: Run) -> None:
        cells_of(run.model)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        cells = cells_of(run.model)
        progress = 1.0 if self.schedule == "fixed" else run.stage_steps / run.stage_length
        try:
            for i, cell in enumerate(cells):
                cell.drop_path = probability(self.p, i, len(cells), progress)
            grad()
        finally:
            for cell in cells:
                cell.drop_path = 0.0
