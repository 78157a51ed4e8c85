"""NASNet search: look for a normal and a reduction cell on small networks, by evolution, a trained controller, or at random."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.backbones.nasnet import OPS, Block
from convince.errors import Mistake, nearest
from convince.fit.randomness import generator, preserved
from convince.kinds import Search
from convince.parts import Card
from convince.search.lab import Lab
from convince.search.space import Genes, Space

CARD = Card(
    part="nasnet-search",
    kind="search",
    paper="nasnet",
    title="Learning Transferable Architectures for Scalable Image Recognition",
    year=2018,
    url="https://arxiv.org/abs/1707.07012",
    needs=("optuna",),
    departs=(
        "evolution (Real et al. 2019) is the default, since it needs tens of networks; the paper trains its controller on 20,000",
        "candidates are small, 1 cell a stage with 8 filters, and trained for 2 epochs; the paper's have 2 and 32 and 20 epochs",
        "the controller learns from 4 candidates at a time at a rate of 0.001, the paper's from 20 at 0.00035: tens of candidates, not thousands",
        "where fewer than two populations can be trained, the population is half of what can",
        "a cell hands on the states that none of its blocks reads; NASNet-A, as the authors wrote it down, hands on a read one as well",
    ),
    tiny={"trial_epochs": 1, "filters": 2, "blocks": 1, "ops": ("identity", "avg3", "conv1"), "population": 2, "sample": 2},
)

Evaluate = Callable[[Genes], float]
Strategy = Callable[[Space, Evaluate, int, int], None]
"""``strategy(space, evaluate, budget, seed)`` calls ``evaluate``, which gives an accuracy, ``budget`` times with settings of its choice."""


# -- the space -------------------------------------------------------------------------------------


def cell_text(genes: Genes, cell: str, blocks: int) -> str:
    """The genotype of one cell as :func:`convince.backbones.nasnet.genotype` reads it."""

    def block(k: int) -> Block:
        left, i, right, j, joined = (genes[f"{cell} {k} {word}"] for word in ("left", "from", "right", "and", "joined"))
        return Block(left, i, joined, right, j)

    return " ".join(str(block(k)) for k in range(1, blocks + 1))


def cell_space(ops: Sequence[str], blocks: int, joined: Sequence[str], **fixed: Any) -> Space:
    """For each block of both cells: two states of those made so far, an operation on each, how they are joined (section 3, steps 1 to 5)."""
    choices: dict[str, Sequence[Any]] = {}
    for cell in ("normal", "reduction"):
        for k in range(1, blocks + 1):
            states = tuple(range(k + 1))
            rows = {"from": states, "and": states, "left": tuple(ops), "right": tuple(ops), "joined": tuple(joined)}
            choices |= {f"{cell} {k} {word}": values for word, values in rows.items()}
    return Space(choices, lambda genes: {"normal": cell_text(genes, "normal", blocks), "reduction": cell_text(genes, "reduction", blocks), **fixed})


# -- strategies ------------------------------------------------------------------------------------


def at_random(space: Space, evaluate: Evaluate, budget: int, seed: int) -> None:
    """Settings drawn evenly."""
    for _, genes in zip(range(budget), space.draws(seed), strict=False):
        evaluate(genes)


def mutated(space: Space, genes: Genes, gen: Generator) -> Genes:
    """A copy with one gene, drawn evenly, changed to another of its values; drawn again where the result does not fit."""
    names = [name for name, values in space.choices.items() if len(values) > 1]
    while names:
        name = names[int(torch.randint(len(names), (1,), generator=gen))]
        others = [value for value in space.choices[name] if value != genes[name]]
        child = space.change(genes, name, others[int(torch.randint(len(others), (1,), generator=gen))])
        if space.fits(child):
            return child
    return genes


def evolution(space: Space, evaluate: Evaluate, budget: int, seed: int, population: int = 12, sample: int = 4) -> None:
    """Regularised evolution: the best of ``sample`` drawn from the population has a child by :func:`mutated`, and the oldest dies."""
    population = max(min(population, budget // 2), 1)
    gen, alive = generator(seed, "evolution"), deque[tuple[Genes, float]]()
    for _, genes in zip(range(population), space.draws(seed), strict=False):
        alive.append((genes, evaluate(genes)))
    for _ in range(budget - population):
        drawn = torch.randperm(len(alive), generator=gen)[:sample].tolist()
        parent = max((alive[i] for i in drawn), key=lambda row: row[1])[0]
        child = mutated(space, parent, gen)
        alive.append((child, evaluate(child)))
        alive.popleft()


@final
class Controller(nn.Module):
    """An LSTM that makes one choice after the other, each read back as an embedding; a softmax a choice (section 3)."""

    def __init__(self, counts: Sequence[int], hidden: int = 100) -> None:
        super().__init__()
        self.counts = tuple(counts)
        self.start = nn.Parameter(torch.zeros(hidden))
        self.read = nn.ModuleList(nn.Embedding(count, hidden) for count in counts)
        self.lstm = nn.LSTMCell(hidden, hidden)
        self.say = nn.ModuleList(nn.Linear(hidden, count) for count in counts)
        for p in self.parameters():
            nn.init.uniform_(p, -0.1, 0.1)

    def steps(self, rows: int, choose: Callable[[int, Float[Tensor, "n v"]], Int[Tensor, " n"]]) -> Iterator[tuple[Tensor, Tensor]]:
        """The log-probabilities [n v] of each choice, and what ``choose(i, log-probabilities)`` takes [n]."""
        x = self.start.expand(rows, -1)
        state = None
        for i, (read, say) in enumerate(zip(self.read, self.say, strict=True)):
            state = self.lstm(x, state)
            log_p = say(state[0]).log_softmax(1)
            taken = choose(i, log_p)
            yield log_p, taken
            x = read(taken)

    def draw(self, rows: int, gen: Generator) -> Int[Tensor, "n g"]:
        """Places of the values of ``rows`` settings."""
        with torch.no_grad():
            return torch.stack([taken for _, taken in self.steps(rows, lambda i, log_p: torch.multinomial(log_p.exp(), 1, generator=gen)[:, 0])], 1)

    def forward(self, taken: Int[Tensor, "n g"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """The log-probability of these settings, and the summed entropy of the choices on the way to them."""
        rows = list(self.steps(len(taken), lambda i, log_p: taken[:, i]))
        total = torch.stack([log_p.gather(1, at[:, None])[:, 0] for log_p, at in rows]).sum(0)
        return total, torch.stack([-(log_p.exp() * log_p).sum(1) for log_p, _ in rows]).sum(0)


def clipped(log_p: Float[Tensor, " n"], old: Float[Tensor, " n"], advantage: Float[Tensor, " n"], clip: float = 0.2) -> Float[Tensor, ""]:
    """PPO's objective, to be made large: the mean of ``min(r A, clamp(r, 1 - clip, 1 + clip) A)`` with ``r = p / p_old``."""
    ratio = (log_p - old).exp()
    return torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage).mean()


def controller(space: Space, evaluate: Evaluate, budget: int, seed: int, batch: int = 4, lr: float = 0.001, entropy: float = 1e-5) -> None:
    """PPO on a :class:`Controller`: reward is accuracy, less a moving average of earlier rewards (0.95); an entropy bonus of ``entropy``."""
    values = [list(found) for found in space.choices.values()]
    with preserved():
        torch.manual_seed(generator(seed, "controller").initial_seed())
        net = Controller([len(found) for found in values])
    optimizer, baseline = torch.optim.Adam(net.parameters(), lr), None
    for start in range(0, budget, batch):
        rows = min(batch, budget - start)
        taken = net.draw(rows, generator(seed, "controller", start))
        settings = [{name: found[at] for name, found, at in zip(space.choices, values, row, strict=True)} for row in taken.tolist()]
        reward = torch.tensor([evaluate(genes) if space.fits(genes) else 0.0 for genes in settings])
        baseline = float(reward.mean()) if baseline is None else baseline
        advantage, baseline = reward - baseline, 0.95 * baseline + 0.05 * float(reward.mean())
        old = net(taken)[0].detach()
        for _ in range(5):
            log_p, spread = net(taken)
            loss = -clipped(log_p, old, advantage) - entropy * spread.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# -- the search ------------------------------------------------------------------------------------


@final
@dataclass
class NasnetSearch(Search):
    """Train small networks of cells for ``trial_epochs`` and keep the best pair of cells; stack it higher with ``--model NAME:cells=6,filters=32``.

    ``strategy`` "evolution" (``population``, ``sample``), "controller" or "random"; ``ops`` of :data:`convince.backbones.nasnet.OPS`,
    ``blocks`` a cell, ``joined`` "+" and "|"; ``cells`` a stage and ``filters`` of a candidate. Images above 64 px get the photo stem.
    """

    strategy: str = "evolution"
    trial_epochs: int = 2
    ops: Sequence[str] = tuple(OPS)
    blocks: int = 5
    joined: Sequence[str] = ("+", "|")
    cells: int = 1
    filters: int = 8
    population: int = 12
    sample: int = 4
    seen: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    network: ClassVar[str] = "nasnet"

    def __post_init__(self) -> None:
        if self.strategy not in ("evolution", "random", "controller"):
            raise Mistake(f"nasnet-search: strategy={self.strategy!r} must be evolution, random or controller")
        for name in ("trial_epochs", "blocks", "cells", "population", "sample"):
            if getattr(self, name) < 1:
                raise Mistake(f"nasnet-search: {name}={getattr(self, name)}: must be at least 1")
        for op in self.ops:
            if op not in OPS:
                raise Mistake(f"nasnet-search: ops={self.ops!r}: no operation {op!r}{nearest(op, list(OPS))} Operations: {', '.join(OPS)}")
        if not self.ops or not self.joined or not set(self.joined) <= {"+", "|"}:
            raise Mistake(f"nasnet-search: ops={self.ops!r}, joined={self.joined!r}: at least one operation, and '+', '|' or both")

    def space(self, data: Any) -> Space:
        """Both cells' blocks; all else of the network is fixed."""
        photo = {"stem": "photo"} if max(data.preprocess.size) > 64 else {}
        return cell_space(self.ops, self.blocks, self.joined, cells=self.cells, filters=self.filters, **photo)

    def find(self, lab: Lab) -> dict[str, Any]:
        """The best candidate on the validation part; one that comes up again is not trained again."""
        space, self.seen = self.space(lab.data), {}

        def evaluate(genes: Genes) -> float:
            options = space.options(genes)
            key = f"{options['normal']}; {options['reduction']}"
            if key not in self.seen:
                self.seen[key] = lab.train(options, self.trial_epochs)
            return self.seen[key]

        budget = math.floor(lab.left / lab.of_training(self.trial_epochs) + 1e-6)
        if self.strategy == "evolution":
            evolution(space, evaluate, budget, lab.seed, self.population, self.sample)
        else:
            {"random": at_random, "controller": controller}[self.strategy](space, evaluate, budget, lab.seed)
        return lab.best()

    def notes(self) -> dict[str, Any]:
        """How many candidates were trained, and how the first and the second half of them did on average."""
        found = list(self.seen.values())
        half = len(found) // 2
        means = {"first half": sum(found[:half]) / half, "second half": sum(found[half:]) / (len(found) - half)} if half else {}
        return {"candidates": len(found), **means}
