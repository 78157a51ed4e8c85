"""DeepEnsemble: the same network trained from several seeds, its probabilities averaged."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince import parts
from convince.errors import Mistake
from convince.fit.answer import Answer
from convince.fit.randomness import key
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import RunSpec

CARD = Card(
    part="deep-ensemble",
    kind="technique",
    title="Simple and Scalable Predictive Uncertainty Estimation using Deep Ensembles",
    year=2017,
    url="https://arxiv.org/abs/1612.01474",
    departs=("trains on the plain objective; the paper adds adversarial examples, which --with an adversarial part would bring",),
    claims=("answer",),
    strength="members",
    off=1,
    tiny={"members": 2},
)


def mean_scores(scores: Float[Tensor, "m n k"]) -> Float[Tensor, "n k"]:
    """Scores whose softmax is the mean of the members' probabilities: ``log mean_i softmax(f_i)``."""
    return scores.log_softmax(-1).logsumexp(0) - math.log(len(scores))


@final
class MeanAnswer(nn.Module):
    """Answers side by side, [0, 1] pixels to :func:`mean_scores`; no weights of its own."""

    def __init__(self, members: Iterable[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        return mean_scores(self.each(x))

    def each(self, x: Tensor) -> Float[Tensor, "m n k"]:
        """The scores of each member."""
        return torch.stack([member(x) for member in self.members])


def other_parts(run: Run, owner: Technique) -> tuple[str, ...]:
    """The run's parts less ``owner``: what each member trains with."""
    mine = run.team.seat(owner).name
    return tuple(spec for spec in run.settings.parts if parts.plain(parts.parse(spec)[0]) != parts.plain(mine))


def network_of(run: Run) -> nn.Module:
    """A run's own network as an answer, without what its parts wrap around it."""
    return Answer(run.normalise, run.model)


@final
@dataclass
class DeepEnsemble(Technique):
    """This network and ``members - 1`` more from other seeds (weights and order); 1 is off.

    The members train one after the other with the run's own parts and length. While this network trains, the answer is its own.
    """

    members: int = 5

    def __post_init__(self) -> None:
        if self.members < 1:
            raise Mistake(f"deep-ensemble: members={self.members}: at least 1 network (1 is off); 5 is usual")

    def fit_members(self, run: Run) -> list[RunSpec]:
        parts = other_parts(run, self)
        return [RunSpec({"seed": key(run.seed, "deep-ensemble", i) % 2**31, "parts": parts}) for i in range(1, self.members)]

    def answer(self, run: Run) -> nn.Module:
        if self.members == 1 or run.optimizer is not None:
            return network_of(run)
        return MeanAnswer([network_of(each) for each in (run, *run.children_of(self))])
