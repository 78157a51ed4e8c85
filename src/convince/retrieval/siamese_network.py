"""Siamese network: learn an embedding from pairs, equal classes drawn together and others pushed a margin apart."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from convince.parts import Card
from convince.retrieval.triplet_network import Embedding, Partners, contrastive_loss, distance
from convince.types import Batch

CARD = Card(
    part="siamese-network",
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
        "this is the paper's comparison: the contrastive loss on pairs, half of them of one class",
        "an epoch has as many pairs as training rows (per_epoch changes that)",
    ),
)


def pairs(labels: Int[Tensor, " n"], count: int, gen: Generator) -> Int[Tensor, "count 2"]:
    """Random positions of two rows: the even pairs share a class, the odd ones do not; no row is paired with itself."""
    partners = Partners(labels)
    first = partners.anchors(count, gen)
    same, other = partners.same(first, gen), partners.other(first, gen)
    return torch.stack([first, torch.where(torch.arange(count) % 2 == 0, same, other)], 1)


@final
@dataclass
class SiameseNetwork(Embedding):
    """Minimise :func:`contrastive_loss` over random pairs; answer by the ``neighbours`` nearest training samples.

    ``per_epoch`` pairs make an epoch (None: as many as training rows); ``--batch`` counts pairs.
    ``margin`` is the distance beyond which two classes are apart enough.
    """

    per_epoch: int | None = None
    margin: float = 1.0
    neighbours: int = 5

    def groups(self, labels: Int[Tensor, " n"], count: int, gen: Generator) -> Int[Tensor, "count 2"]:
        return pairs(labels, count, gen)

    def losses(self, e: Float[Tensor, "n d"], batch: Batch) -> Float[Tensor, " m"]:
        a, b = e.unflatten(0, (-1, 2)).unbind(1)
        assert batch.y is not None
        same = (batch.y[::2] * batch.y[1::2]).sum(1)
        return contrastive_loss(distance(a, b), same, self.margin)
