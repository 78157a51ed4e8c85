"""Mono-Forward: each layer is taught by its own small classifier on its activations, and nothing is sent back through the network."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.training.tpsgd import Layer, add_gradients, backward, layers_of, layerwise
from convince.types import Batch, Out

CARD = Card(
    part="mono-forward",
    kind="technique",
    paper="bp-free-training",
    title="Mono-Forward: Backpropagation-Free Algorithm for Efficient Neural Network Training Harnessing Local Errors",
    year=2025,
    url="https://arxiv.org/abs/2501.09238",
    claims=("objective", "gradient", "answer"),
    mutes=("loss", "logits"),
    expects=("labels",),
    tiny={},
    idle=("fc.", "head.", "classifier."),
    departs=(
        "the optimiser is the run's (SGD with momentum unless a part says otherwise); the paper tunes Adam",
        "works on any network of layers: a layer ends behind the norms, activations and pools that are modules directly after it",
        "the network's own head is idle: the answer is the last hidden layer's classifier",
    ),
)
MOST = 2**25  # weights of one layer's classifier before side= is asked for


def goodness(a: Float[Tensor, "n ..."], weight: Float[Tensor, "k e"], side: int | None = None) -> Float[Tensor, "n k"]:
    """``G = a M'`` of flattened activations; with ``side`` maps are first averaged down to at most ``side`` x ``side``."""
    return full(F.linear(flat(a, side), weight))


def flat(a: Float[Tensor, "n ..."], side: int | None) -> Float[Tensor, "n e"]:
    """Activations as rows, maps [n c h w] averaged down to at most ``side`` on each side."""
    if side is not None and a.dim() == 4 and max(a.shape[2:]) > side:
        a = F.adaptive_avg_pool2d(a, (min(side, a.shape[2]), min(side, a.shape[3])))
    return a.flatten(1)


def flat_size(layer: Layer, side: int | None) -> int:
    """Length of a row that :func:`flat` makes of the layer's output."""
    shape = layer.shape
    return shape[0] * math.prod(min(side or size, size) for size in shape[1:]) if len(shape) == 3 else math.prod(shape)


def check_size(who: str, layers: list[Layer], sizes: list[int], k: int) -> None:
    """Refuse classifiers that would dwarf the network, naming the remedy."""
    for layer, size in zip(layers, sizes, strict=False):
        if size * k > MOST:
            raise Mistake(
                f"{who}: the layer {layer.modules[0]!r} has {size:,} outputs, so its classifier would hold {size * k:,} weights; "
                f"average its maps down with {who}:side=4, or give a smaller --size"
            )


@final
class LocalClassifiers(nn.Module):
    """Scores from the classifiers inside a network: the last one's, or :func:`combine` of all."""

    def __init__(self, normalise: nn.Module, model: nn.Module, layers: list[Layer], name: str, side: int | None, how: str) -> None:
        super().__init__()
        self.normalise, self.model, self.layers, self.name, self.side, self.how = normalise, model, layers, name, side, how

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        heads: Any = self.model.get_submodule(self.name)
        scores: list[Tensor] = []

        def leave(i: int, h: Tensor) -> Tensor:
            if i < len(self.layers) - 1 and (self.how != "last" or i == len(self.layers) - 2):
                scores.append(full(heads[i](flat(h, self.side))))
            return h

        with layerwise(self.model, self.layers, leave, cut=False):
            self.model(self.normalise(x))
        return combine(torch.stack(scores), self.how)


def combine(scores: Float[Tensor, "l n k"], how: str) -> Float[Tensor, "n k"]:
    """Of scores of ``l`` classifiers: the "last", the "mean", or "softmax": the logarithm of the mean probability."""
    if how == "softmax":
        return scores.log_softmax(2).logsumexp(0) - math.log(len(scores))
    return scores[-1] if how == "last" else scores.mean(0)


def soft_losses(scores: Float[Tensor, "n k"], batch: Batch) -> Float[Tensor, ""]:
    """Mean cross-entropy against the batch's labels, each row times its weight."""
    assert batch.y is not None
    losses = F.cross_entropy(scores, batch.y.to(scores), reduction="none")
    return losses.mean() if batch.weight is None else (losses * batch.weight).mean()


@final
@dataclass
class MonoForward(Technique):
    """Hidden layer i and its ``M_i`` (k x d_i, no bias) follow the cross-entropy of ``G_i = a_i M_i'``; layer i + 1 gets ``a_i`` detached.

    ``average``: answer with the mean of all ``G_i`` instead of the last. ``side``: average maps down before ``M_i`` (None: flatten them whole).
    ``local=False`` is the control: the same losses beside that of the network's own head, all sent back through the whole network, whose head answers.
    """

    average: bool = False
    side: int | None = None
    local: bool = True
    layers: list[Layer] = field(default_factory=list, init=False, repr=False, compare=False)
    grads: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)
    losses: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    passed: bool = field(default=False, init=False, repr=False, compare=False)
    rank = 90

    def __post_init__(self) -> None:
        if self.side is not None and self.side < 1:
            raise Mistake(f"mono-forward: side={self.side}: must be at least 1, or None to flatten maps whole")

    def on_start(self, run: Run) -> None:
        self.layers = layers_of(run, "mono-forward")
        sizes = [flat_size(layer, self.side) for layer in self.layers[:-1]]
        check_size("mono-forward", self.layers, sizes, run.k)
        run.edit("mono-forward", sizes=sizes, k=run.k)

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Add ``mono_forward``, one linear layer without bias for each hidden layer."""
        model.mono_forward = nn.ModuleList(nn.Linear(size, spec["k"], bias=False) for size in spec["sizes"])

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        heads: Any = run.model.mono_forward
        last = len(self.layers) - 1
        self.grads, self.losses, self.passed = [], [], False

        def leave(i: int, h: Tensor) -> Tensor:
            if i == last:
                self.passed = True
                return h
            if torch.is_grad_enabled() and not self.passed:
                loss = soft_losses(goodness(h, heads[i].weight, self.side), run.batch)
                params = [*self.layers[i].params(run.model), *(p for p in heads[i].parameters() if p.requires_grad)]
                self.losses.append(loss if not self.local else loss.detach())
                if self.local and params:
                    self.grads += zip(params, torch.autograd.grad(loss, params), strict=True)
            return h.detach() if self.local else h

        with layerwise(run.model, self.layers, leave, cut=self.local):
            grad()

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """The sum of the local losses; beside them, with ``local=False``, the head's."""
        total = torch.stack(self.losses).sum()
        return total if self.local or out.logits is None else total + soft_losses(out.logits, batch)

    def gradient(self, run: Run) -> None:
        if run.loss.requires_grad:  # what other parts added, and all of it with local=False
            backward(run, "mono-forward")
        add_gradients(self.grads)
        self.grads, self.losses, self.passed = [], [], False

    def answer(self, run: Run) -> nn.Module:
        from convince.fit.answer import Answer

        if not self.local:
            return Answer(run.normalise, run.model)
        layers = self.layers or layers_of(run, "mono-forward")
        return LocalClassifiers(run.normalise, run.model, layers, "mono_forward", self.side, "mean" if self.average else "last")
