"""EMA: answer with the exponential moving average of the weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="ema",
    kind="technique",
    title="Exponential moving average of weights",
    strength="decay",
    off=0.0,
    departs=(
        "the decay of update t is at most (1 + t) / (10 + t), so short runs are not held at their first weights",
        "batch statistics are averaged like weights",
    ),
)


def warmed(decay: float, updates: int) -> float:
    """The decay after ``updates`` updates: ``min(decay, (1 + t) / (10 + t))``."""
    return min(decay, (1 + updates) / (10 + updates))


@torch.no_grad()
def follow(average: dict[str, Tensor], live: dict[str, Tensor], decay: float) -> None:
    """``average = decay * average + (1 - decay) * live`` by name, in place.

    Tensors that are new or changed their shape start at the live value, as whole numbers do; those gone are dropped.
    """
    for name in average.keys() - live.keys():
        del average[name]
    ours, theirs = [], []
    for name, tensor in live.items():
        if decay == 0 or name not in average or average[name].shape != tensor.shape or not tensor.is_floating_point():
            average[name] = tensor.detach().clone()
        else:
            ours.append(average[name])
            theirs.append(tensor.detach())
    if ours:
        torch._foreach_lerp_(ours, theirs, 1 - decay)


@final
@dataclass
class Ema(Technique):
    """Average the weights after each step by :func:`follow`; ``decay=0`` is off.

    While training, the answer (and so validation) uses the average; at the end it becomes the network's weights.
    The average starts anew, at the weights as they are, with each stage; only that of the last stage is kept.
    """

    decay: float = 0.999
    updates: int = field(default=0, init=False, repr=False, compare=False)
    average: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    at: int = field(default=-1, init=False, repr=False, compare=False)
    run: Run | None = field(default=None, init=False, repr=False, compare=False)
    rank = 90

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise Mistake(f"ema: decay={self.decay}: must lie from 0 (off) to below 1; 0.999 averages about the last 1,000 steps")

    def on_start(self, run: Run) -> None:
        self.run, self.updates, self.average = run, 0, {}

    def on_stage(self, run: Run) -> None:
        self.at, self.updates, self.average = run.stage_number, 0, {}
        follow(self.average, run.model.state_dict(), 0.0)

    def on_step(self, run: Run) -> None:
        follow(self.average, run.model.state_dict(), warmed(self.decay, self.updates))
        self.updates += 1

    def wrap(self, answer: nn.Module) -> nn.Module:
        """A copy of the answer in which the averages stand in place of the network's weights."""
        if not self.average or self.run is None or not self.run.stage.guests:
            return answer
        memo: dict[int, Any] = {}
        for name, tensor in self.run.model.state_dict(keep_vars=True).items():
            if name in self.average and self.average[name].shape == tensor.shape:
                kept = self.average[name].clone()
                memo[id(tensor)] = nn.Parameter(kept, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else kept
        return copy.deepcopy(answer, memo)

    @torch.no_grad()
    def on_end(self, run: Run) -> None:
        for name, tensor in run.model.state_dict().items() if self.at == run.stage_number - 1 else ():
            if name in self.average and self.average[name].shape == tensor.shape:
                tensor.copy_(self.average[name])
        self.average = {}

    def state(self) -> dict[str, Any]:
        return {"stage": self.at, "updates": self.updates, "average": dict(self.average)} if self.average else {}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self.at, self.updates, live = state.get("stage", -1), state.get("updates", 0), run.model.state_dict()
        self.average = {name: torch.empty_like(live[name]).copy_(kept) for name, kept in state.get("average", {}).items()}
