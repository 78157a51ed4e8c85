"""FBNetV5 search: one search for several tasks; every network that is looked at serves them all, each with the weight that its own odds give."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor

from convince import parts
from convince.backbones.lane_net import Topology, checked, macs, whole
from convince.errors import Mistake
from convince.fit.randomness import generator, key
from convince.kinds import Search
from convince.parts import Card
from convince.search.lab import LOOKED_AT, Lab
from convince.search.lane_sampling import TASKS, places, task_losses, topology
from convince.search.space import Genes, Space

CARD = Card(
    part="fbnetv5-search",
    kind="search",
    paper="fbnetv5",
    title="FBNetV5: Neural Architecture Search for Multiple Tasks in One Run",
    year=2021,
    url="https://arxiv.org/abs/2111.10007",
    needs=("optuna",),
    departs=(
        "the tasks besides the labels are made of the pictures, as lane-sampling tells; the paper's teachers are trained detectors and segmenters",
        "the settings of the odds are ours, no code was released: a ratio between 0.1 and 10, a step of 0.1, averages that keep 0.9",
        "rewards are divided by their spread so far, so that one step size serves all tasks",
        "a task's network is its most probable one if it keeps the limit, else the most probable of those looked at that do",
        "a network that is drawn again is not looked at again",
        "the find is the network of the labels; those of the other tasks are told in the notes",
    ),
    tiny={"trial_epochs": 1, "widths": (4, 6), "columns": 2, "expansion": 2, "limit": 0.8, "look": 8, "grid": 3, "samples": 40},
)


# -- odds and their gradient ---------------------------------------------------------------------------


def log_odds(logits: Float[Tensor, "*t l"], mask: Float[Tensor, " l"]) -> Float[Tensor, "*t"]:
    """``log pi(a) = sum_l a_l log p_l + (1 - a_l) log(1 - p_l)``, p the sigmoid of ``logits``."""
    return -F.softplus(torch.where(mask > 0, -logits, logits)).sum(-1)


def ratio(own: Float[Tensor, "t l"], drawn: Float[Tensor, " l"], mask: Float[Tensor, " l"], clip: float | None = 10.0) -> Float[Tensor, " t"]:
    """``pi_t(a) / pi_s(a)``: what a mask from the odds ``drawn`` counts for each task's ``own``; kept within ``1 / clip`` and ``clip``."""
    exact = (log_odds(own, mask) - log_odds(drawn, mask)).exp()
    return exact if clip is None else exact.clamp(1 / clip, clip)


def score(logits: Float[Tensor, "t l"], mask: Float[Tensor, " l"]) -> Float[Tensor, "t l"]:
    """The gradient of ``log pi(a)`` with respect to the logits: ``a_l - p_l``."""
    return mask - logits.sigmoid()


def estimate(
    own: Float[Tensor, "t l"], drawn: Float[Tensor, " l"], mask: Float[Tensor, " l"], advantage: Float[Tensor, " t"], clip: float | None = 10.0
) -> Float[Tensor, "t l"]:
    """``(pi_t(a) / pi_s(a)) (R_t(a) - b_t) grad log pi_t(a)``: what one mask says of the gradient of the reward that each task may expect."""
    return (ratio(own, drawn, mask, clip) * advantage)[:, None] * score(own, mask)


def reward(loss: float, cost: float, target: float, penalty: float) -> float:
    """``R_t(a) = -loss_t - penalty max(0, cost(a) / target_t - 1)``."""
    return -loss - penalty * max(0.0, cost / target - 1)


@final
class MultiTaskSearch:
    """The odds of every choice for each task, moved by masks that are each drawn from the odds of one task, at random.

    ``logits`` [t l] begin at 0, even odds. ``baseline`` and ``spread`` [t] are moving averages, which keep ``keep``, of the rewards and of their
    distance from it. ``clip=1`` takes every mask as if it were drawn from a task's own odds; with one task it is plain REINFORCE.
    """

    def __init__(self, tasks: int, choices: int, step: float = 0.1, clip: float | None = 10.0, keep: float = 0.9) -> None:
        self.step, self.clip, self.keep = step, clip, keep
        self.logits = torch.zeros(tasks, choices, dtype=torch.float64)
        self.baseline = torch.zeros(tasks, dtype=torch.float64)
        self.spread = torch.zeros(tasks, dtype=torch.float64)
        self.seen = 0

    def draw(self, gen: Generator) -> tuple[int, Float[Tensor, " l"]]:
        """A task, and a mask from its odds."""
        task = int(torch.randint(len(self.logits), (), generator=gen))
        odds = self.logits[task].sigmoid()
        return task, (torch.rand(len(odds), generator=gen, dtype=torch.float64) < odds).double()

    def tell(self, task: int, mask: Float[Tensor, " l"], rewards: Sequence[float]) -> None:
        """Move every task's odds by its reward of a mask that was drawn from the odds of ``task``; then the averages. The first two only set these."""
        found = torch.tensor(rewards, dtype=torch.float64)
        if self.seen > 1:
            advantage = (found - self.baseline) / self.spread.clamp_min(1e-12)
            self.logits = self.logits + self.step * estimate(self.logits, self.logits[task], mask, advantage, self.clip)
        if self.seen:
            kept = min(self.keep, (self.seen - 1) / self.seen)  # plain means until there are enough
            self.spread = kept * self.spread + (1 - kept) * (found - self.baseline).abs()
        kept = min(self.keep, self.seen / (self.seen + 1))
        self.baseline = kept * self.baseline + (1 - kept) * found
        self.seen += 1

    def best(self, task: int, looked_at: Sequence[Sequence[int]], fits: Callable[[Sequence[int]], bool]) -> list[int] | None:
        """A task's most probable mask if it ``fits``, else the most probable of ``looked_at`` that does; None where none does."""
        mode = (self.logits[task] > 0).long().tolist()
        if fits(mode):
            return mode
        able = [list(mask) for mask in looked_at if fits(mask)]
        return max(able, key=lambda mask: float(log_odds(self.logits[task], torch.tensor(mask).double())), default=None)


# -- the search ------------------------------------------------------------------------------------------


@final
@dataclass
class Fbnetv5Search(Search):
    """Train a lane-net of ``widths`` and ``columns`` with lane-sampling for ``share`` of the budget, then search its parts for three tasks at once.

    A task's reward is minus its loss on ``look`` validation images, less ``penalty`` times how far the multiply-adds are above ``limit`` [share of
    the whole network's]. ``samples`` masks are drawn, as far as the budget goes; ``step`` and ``clip`` are :class:`MultiTaskSearch`'s, ``grid``
    lane-sampling's. ``trial_epochs`` is for the random search beside it. ``notes`` tell each task's network.
    """

    trial_epochs: int = 4
    widths: Sequence[int] = (16, 24, 40)
    columns: int = 4
    expansion: int = 3
    limit: float = 0.5
    penalty: float = 1.0
    share: float = 0.5
    samples: int = 300
    look: int = 256
    grid: int = 7
    step: float = 0.1
    clip: float = 10.0
    found: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    network: ClassVar[str] = "lane-net"

    def __post_init__(self) -> None:
        if not 0 < self.limit <= 1 or not 0 < self.share < 1 or self.penalty < 0:
            raise Mistake(
                f"fbnetv5-search: limit={self.limit}, share={self.share}, penalty={self.penalty}: shares of the whole network's multiply-adds and of the"
                " budget, above 0; penalty at least 0"
            )
        if min(self.samples, self.look) < 2 or self.columns < 1 or self.step <= 0 or self.clip < 1:
            raise Mistake("fbnetv5-search: samples and look must be at least 2, columns and clip at least 1, step above 0")
        full = whole(len(self.widths), self.columns)
        checked(self.widths, full.blocks, full.fusions, self.expansion, 1)

    @property
    def names(self) -> list[str]:
        """The choices."""
        return places(len(self.widths), self.columns)

    def part(self, mask: Sequence[int]) -> Topology:
        """The network that a mask stands for."""
        return topology({name for name, on in zip(self.names, mask, strict=True) if on}, len(self.widths), self.columns)

    def options(self, part: Topology) -> dict[str, Any]:
        """It as options of lane-net."""
        return {"widths": list(self.widths), "blocks": list(part.blocks), "fusions": list(part.fusions), "expansion": self.expansion}

    def macs_on(self, data: Any) -> Callable[[Topology], int]:
        """Topology -> multiply-adds for this data's images."""
        plain = data.preprocess
        return lambda part: macs(part, self.widths, self.expansion, plain.size, data.k, plain.channels)

    def space(self, data: Any) -> Space:
        """The parts of at most ``limit`` times the whole network's multiply-adds."""
        cost, names = self.macs_on(data), self.names
        most, least = self.limit * cost(whole(len(self.widths), self.columns)), cost(self.part([0] * len(names)))
        if least > most:
            raise Mistake(f"fbnetv5-search: limit={self.limit}: stem and head alone take {least:,} multiply-adds, more than {most:,.0f}; give a larger limit")

        def part(genes: Genes) -> Topology:
            return self.part([genes[name] for name in names])

        return Space({name: (0, 1) for name in names}, lambda genes: self.options(part(genes)), lambda genes: cost(part(genes)) <= most)

    def find(self, lab: Lab) -> dict[str, Any]:
        """The super-network, then :class:`MultiTaskSearch`, as far as the budget goes."""
        self.space(lab.data)
        cost, full = self.macs_on(lab.data), whole(len(self.widths), self.columns)
        target, rows, val = self.limit * cost(full), len(lab.data.split.train), lab.data.split.val[: self.look]
        epochs, each = max(int(self.share * lab.budget / rows), 1), LOOKED_AT * len(val)
        lab.charge(epochs * rows)
        model, sampling = parts.spell(self.network, self.options(full)), parts.spell("lane-sampling", {"grid": self.grid})
        name = f"supernet-{key(model, sampling, epochs):x}"
        run = lab.run(model, name=name, parts=(sampling,), epochs=epochs)
        count = int(lab.left / each + 1e-6)
        if count < 2:
            raise Mistake(f"fbnetv5-search: after {epochs} epochs of the super-network the budget allows {count} looks; give a larger --budget")
        lab.say(f"super-network trained for {epochs} epochs; {count} of its parts can be looked at, each for {len(TASKS)} tasks")
        gen, odds = generator(lab.seed, "fbnetv5-search"), MultiTaskSearch(len(TASKS), len(self.names), self.step, self.clip)
        seen: dict[Topology, list[float]] = {}
        masks: list[list[int]] = []
        for _ in range(self.samples):
            task, mask = odds.draw(gen)
            bits: list[int] = mask.long().tolist()
            part = self.part(bits)
            if part not in seen:
                if not lab.afford(each):
                    break
                seen[part] = lab.keep([name, part.blocks, part.fusions, len(val)], each, functools.partial(task_losses, run, part, val))
            masks.append(bits)
            odds.tell(task, mask, [reward(loss, cost(part), target, self.penalty) for loss in seen[part]])
        best = [odds.best(at, masks, lambda bits: cost(self.part(bits)) <= target) for at in range(len(TASKS))]
        self.found = {"supernet_epochs": epochs, "drawn": len(masks), "looked_at": len(seen), "tasks": {}}
        for at, (who, found) in enumerate(zip(TASKS, best, strict=True)):
            if found is None:
                lab.say(f"{who}: none of the {len(seen)} parts looked at keeps the limit")
                continue
            part, sure = self.part(found), float(log_odds(odds.logits[at], torch.tensor(found).double()).exp())
            loss = seen[part][at] if part in seen else None
            self.found["tasks"][who] = {"options": self.options(part), "macs": cost(part), "loss": loss, "odds": sure}
            lab.say(f"{who}: {cost(part) / 1e6:.2f} M multiply-adds of {target / 1e6:.2f} M, blocks {' '.join(part.blocks)}, joins {' '.join(part.fusions)}")
        if best[0] is None:
            raise Mistake(f"fbnetv5-search: none of {len(seen)} parts that were looked at keeps limit={self.limit}; give a larger limit or --budget")
        return self.options(self.part(best[0]))

    def notes(self) -> dict[str, Any]:
        """What was looked at, and of each task the network, its multiply-adds, its loss with the super-network's weights, and its odds."""
        return self.found
