"""Sandwich rule: train the largest network, the smallest and some between at every step, the small ones on what the largest answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn
from torch.func import functional_call

from convince.backbones.elastic_resnet import ElasticResnet, sliced
from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="sandwich-rule",
    kind="technique",
    paper="simq-nas",
    title="Universally Slimmable Networks and Improved Training Techniques",
    year=2019,
    url="https://arxiv.org/abs/1903.05134",
    departs=(
        "made for elastic-resnet, whose depth shrinks too; the paper's networks change their width alone",
        "a stage's width is one of a few shares of the largest, as in SimQ-NAS's super-networks; the paper draws any width",
        "the running statistics are the largest network's; every other one needs its own, measured after training",
    ),
    strength="weight",
    off=0.0,
    expects=("images", "logits", "network"),
    host="elastic-resnet:depths=(2,2),widths=(4,6),stem=4",
    tiny={"ratios": (0.5, 1.0)},
)

Shape = tuple[tuple[int, ...], tuple[int, ...]]  # blocks and channels of each stage


def width_choices(width: int, ratios: tuple[float, ...] | list[float]) -> list[int]:
    """The channels that ``ratios`` of a stage's largest width come to, at least 1."""
    return sorted({max(round(width * ratio), 1) for ratio in ratios})


def draw(largest: Shape, ratios: tuple[float, ...] | list[float], gen: Generator) -> Shape:
    """Blocks of each stage from 1 to the most, and a share of the channels, all evenly."""

    def pick(values: list[int]) -> int:
        return values[int(torch.randint(len(values), (), generator=gen))]

    depths = tuple(pick(list(range(1, most + 1))) for most in largest[0])
    return depths, tuple(pick(width_choices(most, ratios)) for most in largest[1])


def smallest(largest: Shape, ratios: tuple[float, ...] | list[float]) -> Shape:
    """One block a stage, the least channels."""
    return (1,) * len(largest[0]), tuple(width_choices(most, ratios)[0] for most in largest[1])


def forward_as(model: ElasticResnet, shape: Shape, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """Scores of a sub-network that shares the weights of ``model``, normalised by this batch alone; no buffer of ``model`` moves."""
    with torch.device("meta"):
        small = ElasticResnet(model.num_classes, model.in_chans, *shape, stem=model.stem)
    weights = {**dict(model.named_parameters()), **{name: buffer.detach().clone() for name, buffer in model.named_buffers()}}
    return functional_call(small, sliced(weights, small), (x,))


def distillation(student: Float[Tensor, "n k"], teacher: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """``-sum_k p_k log q_k``, p the largest network's answer, which gets no gradient from it."""
    return F.cross_entropy(student, teacher.detach().softmax(1), reduction="none")


@final
@dataclass
class SandwichRule(Technique):
    """Add to the largest network's loss ``weight`` times that of the smallest and of ``between`` drawn ones; ``weight=0`` is off.

    The shares of the widths are ``ratios``. After training, :func:`convince.search.simq_nas.measured` takes a sub-network out.
    """

    weight: float = 1.0
    ratios: tuple[float, ...] | list[float] = (0.5, 0.75, 1.0)
    between: int = 2

    def __post_init__(self) -> None:
        if not self.weight >= 0 or self.between < 0:
            raise Mistake(f"sandwich-rule: weight={self.weight}, between={self.between}: both must be at least 0; weight 0 is off")
        if not isinstance(self.ratios, (tuple, list)) or not self.ratios or not all(0 < ratio <= 1 for ratio in self.ratios):
            raise Mistake(f"sandwich-rule: ratios={self.ratios!r}: shares of the largest width, above 0 and at most 1, written ratios=(0.5,1.0)")

    def on_start(self, run: Run) -> None:
        elastic(run.model, run.settings.model)

    def on_loss(self, run: Run) -> None:
        if self.weight == 0:
            return
        model = elastic(run.model, run.settings.model)
        if run.edits:
            raise Mistake(f"sandwich-rule takes parts of a plain elastic-resnet, and {run.edits[0]['part']!r} has changed the network; leave one of them out")
        teacher = run.out.logits
        if teacher is None:
            raise Mistake("sandwich-rule needs the scores of the largest network to teach the others, and another part leaves them out; leave one of them out")
        largest, gen = (model.depths, model.widths), run.gen("sandwich-rule")
        shapes = [smallest(largest, self.ratios), *(draw(largest, self.ratios, gen) for _ in range(self.between))]
        for shape in shapes:
            run.images += round(len(run.batch.x) / run.share)
            with run.plan.autocast():
                student = full(forward_as(model, shape, run.normalise(run.batch.x)))
            losses = distillation(student, teacher)
            run.loss = run.loss + self.weight * (losses if run.batch.weight is None else losses * run.batch.weight).mean()


def elastic(model: nn.Module, name: str | None) -> ElasticResnet:
    """The network, or a Mistake where it is another one."""
    if not isinstance(model, ElasticResnet) or set(model.bits) != {32}:
        raise Mistake(f"sandwich-rule trains an elastic-resnet of 32 bits, and the network is {name!r}; use --model elastic-resnet-largest")
    return model
