"""Balanced super-networks: several weight sets share the placements of a pool-net's poolings between them, each set with an equal load."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.backbones.pool_net import PoolNet, placements
from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Stage

CARD = Card(
    part="balanced-supernets",
    kind="technique",
    paper="balanced-mixture-supernets",
    title="Balanced Mixture of SuperNets for Learning the CNN Pooling Architecture",
    year=2023,
    url="https://arxiv.org/abs/2306.11982",
    departs=(
        "the sets are trained by the run's optimiser, schedule and weight decay, each with a momentum of its own; the released code has plain momentum,"
        " no decay, and a cosine that ends at 0.001",
        "the sets see images as they are; the authors shift and mirror them",
        "the placements are judged on at most 1,000 of the images that are held out; the paper takes all",
        "balancing ends after 1,000 rounds where the loads are not equal by then; the released code goes on",
    ),
    strength="epochs",
    off=0,
    tiny={"epochs": 1, "sets": 2, "look": 16},
    expects=("images", "labels", "network"),
    host="pool-net:channels=(4,4,6),pools=(3,)",
    idle=("extra.balanced-supernets",),
)
NAME = "balanced-supernets"
ROUNDS = 1000  # of balancing, at most


def temperature(epoch: int, epochs: int, first: float = 1.0, last: float = 100.0) -> float:
    """T of an epoch, from 0: it rises linearly from ``first`` to ``last``."""
    return first + (last - first) * epoch / max(epochs - 1, 1)


def assignment(scores: Float[Tensor, "c m"], heat: float, offset: Float[Tensor, " m"]) -> Float[Tensor, "c m"]:
    """``p(m|c)``: the softmax over sets of ``heat`` times the scores, each set's share divided by ``exp(offset)``, rows normalised anew."""
    return (heat * scores.double() - offset.double()).softmax(1)


def load(p: Float[Tensor, "c m"]) -> Float[Tensor, " m"]:
    """``q_m``: the share of all steps that falls to each set, placements being drawn evenly."""
    return p.mean(0)


def from_even(q: Float[Tensor, " m"]) -> float:
    """``KL(q || uniform)`` in nats."""
    return float((q * (q * len(q)).log()).sum())


def balanced(scores: Float[Tensor, "c m"], heat: float, tolerance: float = 1e-4) -> Float[Tensor, " m"]:
    """The offset that gives every set an equal load: ``p <- p / q`` and rows normalised, until ``KL(q || uniform)`` is below ``tolerance``.

    A row's normalisation cancels in the next, so dividing by the product of all ``q`` does what they do one after the other; its logarithm is kept,
    because at a high temperature the product is too small for a float.
    """
    offset = torch.zeros(scores.shape[1], dtype=torch.float64)
    for _ in range(ROUNDS):
        q = load(assignment(scores, heat, offset))
        if from_even(q) < tolerance:
            break
        offset = offset + q.log()
    return offset


@final
class MixtureSuperNet(nn.Module):
    """``sets`` pool-nets of one form; ``scores`` [c m], the moving average of accuracy of each placement on each set, 1 at first.

    ``offset`` [m] is what balances the present epoch, and ``accuracies`` [c m] what the sets come to in the end.
    """

    scores: Tensor
    accuracies: Tensor
    offset: Tensor

    def __init__(self, sets: Sequence[PoolNet]) -> None:
        super().__init__()
        self.sets = nn.ModuleList(sets)
        self.placements = placements(len(sets[0].channels), len(sets[0].pools))
        shape = len(self.placements), len(sets)
        self.register_buffer("scores", torch.ones(shape))
        self.register_buffer("accuracies", torch.zeros(shape))
        self.register_buffer("offset", torch.zeros(len(sets)))

    def at(self, placement: int, one: int) -> PoolNet:
        """A set with its poolings so placed."""
        net = self.sets[one]
        assert isinstance(net, PoolNet)
        net.place(self.placements[placement])
        return net

    def draw(self, heat: float, gen: Generator) -> tuple[int, int]:
        """A placement, drawn evenly, and the set that learns it, by :func:`assignment`."""
        c = int(torch.randint(len(self.placements), (), generator=gen))
        p = assignment(self.scores.cpu(), heat, self.offset.cpu())[c]
        return c, int(torch.multinomial(p, 1, generator=gen))


def halves(index: Int[Tensor, " n"], held: float, seed: int) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
    """Rows to train on, and the share ``held`` of them to judge on, drawn by the seed."""
    order = index[torch.randperm(len(index), generator=generator(seed, NAME, "held"))]
    count = round(held * len(index))
    if not 0 < count < len(index):
        raise Mistake(f"balanced-supernets: held={held}: of {len(index)} images none is left to train on or to judge on; give more images")
    return order[count:], order[:count]


@torch.no_grad()
def accuracy(run: Run, net: PoolNet, rows: Int[Tensor, " n"]) -> float:
    """Share of right answers on ``rows``, 0 to 1, normalised by parts of about a batch each."""
    right = 0
    for part in rows.chunk(-(-len(rows) // max(run.settings.batch or 64, 2))):
        with run.plan.autocast():
            scores = net(run.normalise(run.plan.pixels(run.data.x.take(part))))
        right += int((scores.argmax(1).cpu() == run.data.y[part]).sum())
    return right / len(rows)


@final
@dataclass
class BalancedSupernets(Technique):
    """``epochs`` that find where a pool-net should pool, with as many poolings as it has, come before the main training; 0 is off.

    Each step trains one of ``sets`` weight sets at one placement. A share ``held`` of the training images is kept to judge on: one batch after
    each step, for moving averages of ``decay``, and ``look`` images in the end. The temperature rises from ``first`` to ``last``; at 0 the sets are drawn
    evenly. The network itself, at the best placement, then starts from its own first weights.
    """

    epochs: int = 100
    sets: int = 4
    held: float = 0.5
    decay: float = 0.9
    first: float = 1.0
    last: float = 100.0
    look: int = 1000

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.sets < 1 or self.look < 1:
            raise Mistake(f"balanced-supernets: epochs={self.epochs}, sets={self.sets}, look={self.look}: epochs at least 0 (0 is off), the others at least 1")
        if not 0 < self.held < 1 or not 0 <= self.decay < 1 or min(self.first, self.last) < 0:
            raise Mistake(
                f"balanced-supernets: held={self.held}, decay={self.decay}, first={self.first}, last={self.last}:"
                " held is a share above 0 and below 1, decay from 0 to below 1, temperatures at least 0"
            )

    def on_start(self, run: Run) -> None:
        if self.epochs == 0:
            return
        model = run.model
        if not isinstance(model, PoolNet) or not 0 < len(model.pools) < len(model.channels):
            raise Mistake(
                f"balanced-supernets moves the poolings of a pool-net that has some and fewer than blocks, and the network is {run.settings.model!r};"
                " use --model pool-net20"
            )
        local = run.team.owner("gradient")
        if local is not None and local is run.team.owner("answer"):
            who = run.team.seat(local).name
            raise Mistake(f"balanced-supernets moves the poolings after {who!r} has fitted classifiers to the network's maps; leave one of them out")
        shape = run.k, model.in_chans, model.channels, model.pools
        run.extra[NAME] = run.plan.place(MixtureSuperNet([PoolNet(*shape, shared=True) for _ in range(self.sets)]))

    def rows(self, run: Run) -> tuple[Int[Tensor, " a"], Int[Tensor, " b"]]:
        """Labelled training rows to train on and to judge on."""
        index = run.data.split.train
        return halves(index[run.data.y[index] >= 0], self.held, run.seed)

    def before(self, run: Run) -> list[Stage]:
        if self.epochs == 0:
            return []
        return [Stage(NAME, self.epochs, index=self.rows(run)[0], trainable=lambda name: name.startswith(f"extra.{NAME}."), guests=False)]

    def mixture(self, run: Run) -> MixtureSuperNet:
        """The super-networks."""
        found = run.extra[NAME]
        assert isinstance(found, MixtureSuperNet)
        return found

    def drawn(self, run: Run) -> tuple[int, int, Generator]:
        """The placement and the set of this step; the generator goes on behind these draws."""
        gen = run.gen(NAME)
        return *self.mixture(run).draw(temperature(run.epoch, self.epochs, self.first, self.last), gen), gen

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        if run.stage.owner is not self:
            return grad()
        mixture = self.mixture(run)
        if run.step == 0:
            mixture.offset.copy_(balanced(mixture.scores.cpu(), temperature(run.epoch, self.epochs, self.first, self.last)))
        c, m, _ = self.drawn(run)
        model, run.model = run.model, mixture.at(c, m)
        try:
            grad()
        finally:
            run.model = model

    def on_step(self, run: Run) -> None:
        if run.stage.owner is self:
            mixture, (c, m, gen) = self.mixture(run), self.drawn(run)  # the scores have not moved, so these are the draws of around_grad
            kept, held = self.rows(run)
            count = min(run.settings.batch or 64, len(kept))  # a batch, as was trained on
            seen = accuracy(run, mixture.at(c, m), held[torch.randperm(len(held), generator=gen)[:count]])
            mixture.scores[c, m] = self.decay * mixture.scores[c, m] + (1 - self.decay) * seen

    def on_epoch(self, run: Run) -> None:
        if run.stage.owner is not self or run.epoch < self.epochs - 1:
            return
        mixture, rows = self.mixture(run), self.rows(run)[1][: self.look]
        for c in range(len(mixture.placements)):
            for m in range(self.sets):
                mixture.accuracies[c, m] = accuracy(run, mixture.at(c, m), rows)
        best = mixture.accuracies.amax(1)
        pools = mixture.placements[int(best.argmax())]
        run.edit(NAME, pools=list(pools))
        run.report(f"accuracy with poolings before blocks {' and '.join(map(str, pools))}", float(best.max()), "share of held-out images")

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Place the poolings of a pool-net before the blocks ``pools``."""
        assert isinstance(model, PoolNet)
        model.place(spec["pools"])
