"""Cascaded Forward: each block of the network has its own linear classifier, the blocks stay random, and the answer adds the classifiers up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.training.mono_forward import LocalClassifiers, check_size, flat, flat_size, full, soft_losses
from convince.training.tpsgd import Layer, add_gradients, backward, layers_of, layerwise, projection
from convince.types import Batch, Out, Stage

CARD = Card(
    part="cascaded-forward",
    kind="technique",
    paper="bp-free-training",
    title="The Cascaded Forward Algorithm for Neural Network Training",
    year=2023,
    url="https://arxiv.org/abs/2303.09728",
    claims=("objective", "gradient", "stage", "answer"),
    mutes=("loss", "logits", "tract", "guidance-untrainable", "orthogonal-conv"),
    expects=("labels",),
    tiny={},
    idle=("fc.", "head.", "classifier."),
    departs=(
        "a block is a weighted layer of the network with the norms, activations and pools that are modules directly behind it",
        "random blocks and their classifiers train in one pass; the paper passes the data through a block, then trains the next",
        "blocks='dfa' sends the error of the last block's classifier to every block through a fixed random matrix, while the classifiers train",
        "the network's own head is idle: the answer is the logarithm of the mean of the blocks' probabilities, which has the argmax of their sum",
    ),
)


def feedback(error: Float[Tensor, "n k"], matrix: Float[Tensor, "e k"], like: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """``B e`` in the shape of a block's output; one number a channel, the same at all positions."""
    rows = error @ matrix.T
    return rows.view(len(rows), -1, *[1] * (like.dim() - 2)).expand_as(like) if like.dim() > 2 else rows


@final
@dataclass
class CascadedForward(Technique):
    """Classifiers on the flattened output of every hidden block, each with its own cross-entropy.

    ``blocks``: "random" leaves the network as drawn (batch statistics move), "dfa" trains it by direct feedback
    alignment. ``side``: average maps down before a classifier (None: flatten them whole).
    """

    blocks: str = "random"
    side: int | None = None
    layers: list[Layer] = field(default_factory=list, init=False, repr=False, compare=False)
    grads: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)
    losses: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    outputs: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    scores: Tensor | None = field(default=None, init=False, repr=False, compare=False)  # of the last block
    passed: bool = field(default=False, init=False, repr=False, compare=False)
    rank = 90

    def __post_init__(self) -> None:
        if self.blocks not in ("random", "dfa"):
            raise Mistake(f"cascaded-forward: blocks={self.blocks!r}: must be 'random' or 'dfa'")
        if self.side is not None and self.side < 1:
            raise Mistake(f"cascaded-forward: side={self.side}: must be at least 1, or None to flatten maps whole")

    def on_start(self, run: Run) -> None:
        self.layers = layers_of(run, "cascaded-forward")
        sizes = [flat_size(layer, self.side) for layer in self.layers[:-1]]
        check_size("cascaded-forward", self.layers, sizes, run.k)
        run.edit("cascaded-forward", sizes=sizes, k=run.k)

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Add ``cascaded_forward``, one linear layer for each hidden block."""
        model.cascaded_forward = nn.ModuleList(nn.Linear(size, spec["k"]) for size in spec["sizes"])

    def stage(self, run: Run, i: int) -> Stage | None:
        """One stage, in which random blocks do not train."""
        if i > 0:
            return None
        head = self.layers[-1].modules
        trained = (lambda name: not name.startswith(head)) if self.blocks == "dfa" else (lambda name: name.startswith(("cascaded_forward.", "extra.")))
        return Stage("cascaded forward", run.settings.epochs or 0, steps=run.settings.steps, trainable=trained)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        heads: Any = run.model.cascaded_forward
        last = len(self.layers) - 1
        self.grads, self.losses, self.outputs, self.passed = [], [], [], False

        def leave(i: int, h: Tensor) -> Tensor:
            if i == last:
                self.passed = True
                return h
            if torch.is_grad_enabled() and not self.passed:
                scores = full(heads[i](flat(h.detach(), self.side)))
                loss = soft_losses(scores, run.batch)
                params = list(heads[i].parameters())
                self.grads += zip(params, torch.autograd.grad(loss, params), strict=True)
                self.losses.append(loss.detach())
                self.scores = scores.detach()
                if self.blocks == "dfa":
                    self.outputs.append(h)
            return h.detach()

        with layerwise(run.model, self.layers, leave):
            grad()

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """The sum of the classifiers' losses."""
        return torch.stack(self.losses).sum()

    def gradient(self, run: Run) -> None:
        if run.loss.requires_grad:  # what other parts added
            backward(run, "cascaded-forward")
        add_gradients(self.grads)
        if self.blocks == "dfa":
            self._align(run)
        self.grads, self.losses, self.outputs, self.scores, self.passed = [], [], [], None, False

    def _align(self, run: Run) -> None:
        """The last classifier's error ``softmax - y``, sent straight to each block."""
        assert self.scores is not None
        assert run.batch.y is not None
        error = (self.scores.softmax(1) - run.batch.y.to(self.scores)) / len(self.scores)
        if run.batch.weight is not None:
            error = error * run.batch.weight[:, None].to(error)
        for layer, h in zip(self.layers, self.outputs, strict=False):
            params = layer.params(run.model)
            if not params or not h.requires_grad:
                continue
            gen = generator(run.seed, "cascaded-forward", layer.modules[0])
            units = h.shape[1] if h.dim() > 2 else h[0].numel()
            matrix = projection(units, run.k, "uniform", False, gen).to(error) / units**0.5
            sent = feedback(error, matrix, h) / max(h[0].numel() // units, 1)
            add_gradients(list(zip(params, torch.autograd.grad(h, params, sent.to(h)), strict=True)))

    def answer(self, run: Run) -> nn.Module:
        layers = self.layers or layers_of(run, "cascaded-forward")
        return LocalClassifiers(run.normalise, run.model, layers, "cascaded_forward", self.side, "softmax")
