"""Triplet network: learn an embedding from triples (anchor, same class, other class), and answer by nearest neighbours."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Batch, Out

CARD = Card(
    part="triplet-network",
    kind="technique",
    paper="triplet-network",
    title="Deep metric learning using Triplet network",
    year=2014,
    url="https://arxiv.org/abs/1412.6622",
    claims=("objective", "order", "answer"),
    mutes=("loss", "labels", "logits"),
    expects=("labels",),
    tiny={"per_epoch": 32},
    idle=("fc", "head", "classifier"),
    departs=(
        "an epoch has as many triples as training rows; the release draws 640,000 (per_epoch=640000)",
        "a class takes part as anchor in proportion to its rows; a class of one row only as the other class",
        "1e-12 is added under the square root, so that the gradient at distance 0 is finite",
        "the answer is the logarithm of the share of each class among the neighbours, smoothed; the paper trains a linear SVM on the embedding",
    ),
)


def distance(a: Float[Tensor, "n d"], b: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """``||a - b||_2`` by row, with 1e-12 under the root."""
    return ((a - b).square().sum(1) + 1e-12).sqrt()


def triplet_softmax_loss(a: Float[Tensor, "n d"], p: Float[Tensor, "n d"], n: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """``s^2`` with ``s = exp(d+) / (exp(d+) + exp(d-))``: the pair of distances, as a softmax, against (0, 1).

    That is the mean of the two squared errors, which are equal; ``d+ = ||a - p||``, ``d- = ||a - n||``. 0 to 1.
    """
    return (distance(a, p) - distance(a, n)).sigmoid().square()


def triplet_margin_loss(a: Float[Tensor, "n d"], p: Float[Tensor, "n d"], n: Float[Tensor, "n d"], margin: float) -> Float[Tensor, " n"]:
    """``max(0, d+ - d- + margin)``, the usual alternative."""
    return (distance(a, p) - distance(a, n) + margin).clamp_min(0)


def contrastive_loss(d: Float[Tensor, " n"], same: Float[Tensor, " n"], margin: float = 1.0) -> Float[Tensor, " n"]:
    """``same d^2 + (1 - same) max(0, margin - d)^2``: the Siamese network's."""
    return same * d.square() + (1 - same) * (margin - d).clamp_min(0).square()


class Partners:
    """Rows sorted by class, to draw a partner of the same or another class in one step.

    ``labels`` [n] are class numbers; a Mistake where no class has two rows or there is one class only.
    """

    def __init__(self, labels: Int[Tensor, " n"]) -> None:
        self.rows = labels.argsort(stable=True)
        size = torch.bincount(labels)
        self.size, self.start = size[labels], (size.cumsum(0) - size)[labels]
        self.place = torch.empty_like(self.rows)
        self.place[self.rows] = torch.arange(len(labels))
        self.paired = (self.size > 1).nonzero()[:, 0]  # rows that have another of their class
        if not len(self.paired) or int((size > 0).sum()) < 2:
            raise Mistake(f"pairs and triples need two classes, one of them with two samples; the training part has counts {size.tolist()}")

    def anchors(self, count: int, gen: Generator) -> Int[Tensor, " m"]:
        """Rows with a partner, drawn with replacement."""
        return self.paired[torch.randint(len(self.paired), (count,), generator=gen)]

    def same(self, rows: Int[Tensor, " m"], gen: Generator) -> Int[Tensor, " m"]:
        """For each row another one of its class, never itself."""
        size, start = self.size[rows], self.start[rows]
        further = 1 + _below(size - 1, gen)
        return self.rows[start + (self.place[rows] - start + further) % size]

    def other(self, rows: Int[Tensor, " m"], gen: Generator) -> Int[Tensor, " m"]:
        """For each row one of another class, all such rows equally likely."""
        size, start = self.size[rows], self.start[rows]
        at = _below(len(self.rows) - size, gen)
        return self.rows[torch.where(at >= start, at + size, at)]


def _below(limit: Int[Tensor, " m"], gen: Generator) -> Int[Tensor, " m"]:
    """Whole numbers from 0 up to each limit, exclusive."""
    drawn = torch.rand(len(limit), generator=gen, dtype=torch.float64)  # fp32 cannot number more than 2^24 rows
    return (drawn * limit).long().clamp_max(limit - 1)


def triplets(labels: Int[Tensor, " n"], count: int, gen: Generator) -> Int[Tensor, "count 3"]:
    """Random (anchor, positive, negative) positions: the positive is another row of the anchor's class."""
    partners = Partners(labels)
    anchor = partners.anchors(count, gen)
    return torch.stack([anchor, partners.same(anchor, gen), partners.other(anchor, gen)], 1)


def neighbour_shares(x: Float[Tensor, "n d"], references: Float[Tensor, "m d"], labels: Int[Tensor, " m"], neighbours: int, k: int) -> Float[Tensor, "n k"]:
    """``(votes_c + 1/k) / (neighbours + 1)`` among the nearest references by Euclidean distance; rows sum to 1."""
    nearest = torch.cdist(x, references).topk(min(neighbours, len(references)), largest=False).indices
    votes = F.one_hot(labels[nearest], k).sum(1).to(x)
    return (votes + 1 / k) / (nearest.shape[1] + 1)


def embed(model: nn.Module, x: Tensor) -> Float[Tensor, "n d"]:
    """Pooled features of normalised input, in full precision."""
    return full(model.forward_head(model.forward_features(x), pre_logits=True))  # type: ignore[operator]


@final
class Neighbours(nn.Module):
    """Scores [n k]: the logarithm of the smoothed shares of the classes among the nearest stored references."""

    differentiable = False
    references: Tensor
    labels: Tensor

    def __init__(self, normalise: nn.Module, model: nn.Module, references: Tensor, labels: Tensor, neighbours: int, k: int) -> None:
        super().__init__()
        self.normalise, self.model, self.neighbours, self.k = normalise, model, neighbours, k
        self.register_buffer("references", references)
        self.register_buffer("labels", labels)

    def embed(self, x: Tensor) -> Float[Tensor, "n d"]:
        """The embedding of [0, 1] pixels."""
        return embed(self.model, self.normalise(x))

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        e = self.embed(x)
        with torch.autocast(e.device.type, enabled=False):
            return neighbour_shares(e, self.references, self.labels, self.neighbours, self.k).log()


class Embedding(Technique, abc.ABC):
    """What the parts that learn an embedding share: groups of rows in, and neighbours as the answer."""

    per_epoch: int | None
    neighbours: int

    def __post_init__(self) -> None:
        if self.per_epoch is not None and self.per_epoch < 1:
            raise Mistake(f"per_epoch={self.per_epoch}: must be at least 1, or None for as many groups as training rows")
        if self.neighbours < 1:
            raise Mistake(f"neighbours={self.neighbours}: must be at least 1; 5 is usual")
        self.stored: tuple[Tensor, Tensor] | None = None  # references and their labels, once training has ended

    @abc.abstractmethod
    def groups(self, labels: Int[Tensor, " n"], count: int, gen: Generator) -> Int[Tensor, "count g"]:
        """Positions of the rows that stay together."""

    @abc.abstractmethod
    def losses(self, e: Float[Tensor, "n d"], batch: Batch) -> Float[Tensor, " m"]:
        """One loss a group, from the embeddings of the batch."""

    def order(self, run: Run, index: Tensor, gen: Generator) -> Int[Tensor, "m g"]:
        """Groups drawn anew each epoch, from the labelled rows."""
        rows = index[run.data.y[index] >= 0]
        return rows[self.groups(run.data.y[rows], self.per_epoch or len(rows), gen)]

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        assert out.features is not None
        with run.plan.autocast():
            e = full(run.model.forward_head(out.features, pre_logits=True))  # type: ignore[operator]
        losses = self.losses(e, batch)
        return losses.mean() if batch.weight is None else (losses * batch.weight[:: batch.group]).mean()

    def answer(self, run: Run) -> nn.Module:
        """Neighbours among the training rows; while training, embedded by the network as it stands."""
        references, labels = self.stored or self._look(run)
        return Neighbours(run.normalise, run.model, references, labels, self.neighbours, run.k)

    def on_start(self, run: Run) -> None:
        run.require("forward_features")
        self.stored = None

    def on_end(self, run: Run) -> None:
        self.stored = self._look(run)

    def state(self) -> dict[str, Any]:
        return {} if self.stored is None else {"references": self.stored[0], "labels": self.stored[1]}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        self.stored = (state["references"].to(run.plan.device), state["labels"].to(run.plan.device)) if state else None

    def _look(self, run: Run) -> tuple[Tensor, Tensor]:
        rows = run.data.split.train
        rows = rows[run.data.y[rows] >= 0]
        with run.aside():
            found = []
            for x in run.data.x.batches(rows.split(256)):
                with run.plan.autocast():
                    found.append(embed(run.model, run.normalise(run.plan.pixels(x))))
        return torch.cat(found), run.data.y[rows].to(run.plan.device)


@final
@dataclass
class TripletNetwork(Embedding):
    """Minimise :func:`triplet_softmax_loss` over random triples; answer by the ``neighbours`` nearest training samples.

    ``per_epoch`` triples make an epoch (None: as many as training rows); ``--batch`` counts triples, so
    three times as many images. ``margin`` replaces the loss by :func:`triplet_margin_loss`. Works on any
    network with pooled features; its head is idle.
    """

    per_epoch: int | None = None
    margin: float | None = None
    neighbours: int = 5

    def groups(self, labels: Int[Tensor, " n"], count: int, gen: Generator) -> Int[Tensor, "count 3"]:
        return triplets(labels, count, gen)

    def losses(self, e: Float[Tensor, "n d"], batch: Batch) -> Float[Tensor, " m"]:
        a, p, n = e.unflatten(0, (-1, 3)).unbind(1)
        return triplet_softmax_loss(a, p, n) if self.margin is None else triplet_margin_loss(a, p, n, self.margin)
