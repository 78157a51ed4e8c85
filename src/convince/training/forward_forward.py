"""Forward-Forward: each layer learns to be active for an image with its true label written on it, and quiet for one with a wrong label."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.training.tpsgd import Layer, add_gradients, backward, layers_of, layerwise
from convince.types import Batch, Out

CARD = Card(
    part="forward-forward",
    kind="technique",
    paper="bp-free-training",
    title="The Forward-Forward Algorithm: Some Preliminary Investigations",
    year=2022,
    url="https://arxiv.org/abs/2212.13345",
    claims=("optimizer", "objective", "gradient", "answer"),
    mutes=("loss", "optimizer", "logits"),
    expects=("labels",),
    tiny={},
    idle=("fc.", "head.", "classifier."),
    departs=(
        "where the first layer is a convolution the label is a fixed random pattern over the whole image, as a window sees no corner; the paper writes pixels",
        "both halves of a batch pass together, so a norm over the batch sees positives and negatives alike",
        "goodness is the mean of the squared activations, and its logistic loss the sum of two softplus terms, as in the study; Hinton also tries the sum",
        "works on any network of layers; where one ends without an activation, its ReLU is taken for the goodness alone",
    ),
)


def goodness(a: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """``g = mean_j relu(a_j)^2`` by row."""
    return full(a).relu().square().flatten(1).mean(1)


def ff_loss(positive: Float[Tensor, " n"], negative: Float[Tensor, " n"], theta: float) -> Float[Tensor, " n"]:
    """``softplus(theta - g_pos) + softplus(g_neg - theta)``: both are ``log 2`` at the threshold."""
    return F.softplus(theta - positive) + F.softplus(negative - theta)


def unit_length(x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
    """Each row divided by its L2 norm (1e-4 added), so that a layer sees no goodness of the one before it."""
    size = full(x).flatten(1).norm(dim=1) + 1e-4
    return x / size.view(-1, *[1] * (x.dim() - 1)).to(x)


def write_pixels(x: Float[Tensor, "n ..."], y: Float[Tensor, "n k"]) -> Float[Tensor, "n ..."]:
    """A copy with ``y`` in the first k numbers of each row (pixels of the first channel, row by row)."""
    rows = x.flatten(1).clone()
    rows[:, : y.shape[1]] = y.to(x)
    return rows.view_as(x)


def write_pattern(x: Float[Tensor, "n c h w"], y: Float[Tensor, "n k"], seed: int) -> Float[Tensor, "n c h w"]:
    """Half the image, half the pattern of its class: blocks of 0 and 1 drawn by (seed, class), an eighth of the side each."""
    grid = torch.stack([torch.randint(0, 2, (8, 8), generator=generator(seed, "forward-forward", c)) for c in range(y.shape[1])])
    large = F.interpolate(grid[:, None].to(x), x.shape[2:], mode="nearest")
    return (x + torch.einsum("nk,kchw->nchw", y.to(x), large)) / 2


def wrong_labels(y: Float[Tensor, "n k"], gen: Generator) -> Float[Tensor, "n k"]:
    """One-hot labels of another class than the row's largest, all others equally likely."""
    true: Int[Tensor, " n"] = y.argmax(1)
    further = torch.randint(1, y.shape[1], (len(y),), generator=gen).to(y.device)
    return F.one_hot((true + further) % y.shape[1], y.shape[1]).to(y)


@final
class GoodnessScores(nn.Module):
    """Scores [n k]: the summed goodness of layers 2 and on (of the only one, where there is one) with each label written in turn: k passes."""

    def __init__(self, normalise: nn.Module, model: nn.Module, layers: list[Layer], write: Callable[[Tensor, Tensor], Tensor], k: int) -> None:
        super().__init__()
        self.normalise, self.model, self.layers, self.write, self.k = normalise, model, layers, write, k

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        hidden, scores = len(self.layers) - 1, []
        for c in range(self.k):
            found: list[Tensor] = []

            def leave(i: int, h: Tensor, found: list[Tensor] = found) -> Tensor:
                if i < hidden and (i > 0 or hidden == 1):
                    found.append(goodness(h))
                return h

            label = F.one_hot(torch.full((len(x),), c, device=x.device), self.k).to(x)
            with layerwise(self.model, self.layers, leave, lambda _, x: unit_length(x), cut=False):
                self.model(self.normalise(self.write(x, label)))
            scores.append(torch.stack(found).sum(0))
        return torch.stack(scores, 1)


@final
@dataclass
class Writer:
    """Writes labels on images in the way that the network can see."""

    pattern: bool
    seed: int

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        return write_pattern(x, y, self.seed) if self.pattern else write_pixels(x, y)


@final
@dataclass
class ForwardForward(Technique):
    """Every hidden layer follows :func:`ff_loss` of its goodness, on inputs of length 1; the answer takes k passes.

    ``theta`` is the threshold of the goodness. ``write``: "pixels", "pattern", or "auto" (a pattern where the first
    layer is a convolution). Adam with ``lr``, unless ``--lr`` says otherwise.
    """

    theta: float = 2.0
    lr: float = 0.03
    write: str = "auto"
    layers: list[Layer] = field(default_factory=list, init=False, repr=False, compare=False)
    grads: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)
    losses: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)
    passed: bool = field(default=False, init=False, repr=False, compare=False)
    rank = 90  # labels are written on what all others made of the batch

    def __post_init__(self) -> None:
        if not self.theta > 0:
            raise Mistake(f"forward-forward: theta={self.theta}: the threshold of the goodness must be above 0; 2 is usual")
        if not self.lr > 0:
            raise Mistake(f"forward-forward: lr={self.lr}: must be above 0; 0.03 is usual")
        if self.write not in ("auto", "pixels", "pattern"):
            raise Mistake(f"forward-forward: write={self.write!r}: must be one of auto, pixels, pattern")

    def writer(self, run: Run) -> Writer:
        """How labels are written on the samples of this run."""
        first = run.model.get_submodule(self._layers(run)[0].modules[0])
        image = run.data.preprocess.kind == "image"
        if self.write == "pattern" and not image:
            raise Mistake("forward-forward: write='pattern' needs images; leave it at auto for a table")
        pattern = self.write == "pattern" or (self.write == "auto" and image and not isinstance(first, nn.Linear))
        room = run.data.preprocess.channels * max(int(torch.tensor(run.data.preprocess.size).prod()), 1)
        if not pattern and room < run.k:
            raise Mistake(f"forward-forward writes the label into the first {run.k} numbers of a sample, and these have {room}; leave the part out")
        return Writer(pattern, run.seed)

    def on_start(self, run: Run) -> None:
        self.layers = []
        self.writer(run)

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam([p for _, p in params], lr=run.settings.lr or self.lr)

    def on_batch(self, run: Run) -> None:
        """Pairs of rows, the image with its own label and with a wrong one."""
        if not run.stage.guests and run.stage.owner is not self:
            return
        batch = run.batch
        if batch.y is None or batch.group != 1:
            raise Mistake("forward-forward needs one label for each image of a batch; leave out the part that takes it away")
        write, wrong = self.writer(run), wrong_labels(batch.y, run.gen("forward-forward"))
        x = torch.stack([write(batch.x, batch.y), write(batch.x, wrong)], 1).flatten(0, 1)
        twice: Any = lambda t: None if t is None else t.repeat_interleave(2, 0)  # noqa: E731
        extra = {name: twice(value) for name, value in batch.extra.items()}
        run.batch = Batch(x, twice(batch.y), twice(batch.index.to(torch.int64)), twice(batch.weight), extra, 2)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        layers, weight = self._layers(run), run.batch.weight
        self.grads, self.losses, self.passed = [], [], False

        def leave(i: int, h: Tensor) -> Tensor:
            if i == len(layers) - 1:
                self.passed = True
                return h
            if torch.is_grad_enabled() and not self.passed:
                positive, negative = goodness(h).unflatten(0, (-1, 2)).unbind(1)
                losses = ff_loss(positive, negative, self.theta)
                loss = losses.mean() if weight is None else (losses * weight[::2]).mean()
                params = layers[i].params(run.model)
                self.losses.append(loss.detach())
                if params:
                    self.grads += zip(params, torch.autograd.grad(loss, params), strict=True)
            return h.detach()

        with layerwise(run.model, layers, leave, lambda _, x: unit_length(x)):
            grad()

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """The sum of the layers' losses."""
        run.out = Out(None, out.features)  # the head is not taught, so its scores say nothing
        return torch.stack(self.losses).sum()

    def gradient(self, run: Run) -> None:
        if run.loss.requires_grad:  # what other parts added
            backward(run, "forward-forward")
        add_gradients(self.grads)
        self.grads, self.losses, self.passed = [], [], False

    def answer(self, run: Run) -> nn.Module:
        return GoodnessScores(run.normalise, run.model, self._layers(run), self.writer(run), run.k)

    def _layers(self, run: Run) -> list[Layer]:
        self.layers = self.layers or layers_of(run, "forward-forward")
        return self.layers
