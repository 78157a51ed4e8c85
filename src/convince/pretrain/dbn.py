"""DBN: a stack of restricted Boltzmann machines learns the layers of a network one after the other, without labels."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Batch, Out, Stage

CARD = Card(
    part="dbn",
    kind="technique",
    paper="dbn",
    title="A Tutorial on Deep Neural Networks for Intelligent Systems",
    year=2016,
    url="https://arxiv.org/abs/1603.07249",
    departs=(
        "layer sizes are those of the run's network, since the tutorial's own were not at hand: mlp for tables, sigmoid-mlp for images and tables",
        "hidden units are sampled and visible ones are probabilities (or means) in the Gibbs chain, as Hinton's practical guide advises",
        "batches, and the optimiser where another part owns it, are the run's; the machines' rate, momentum and weight decay are the guide's",
    ),
    strength="epochs",
    off=0,
    tiny={"epochs": 1},
    accepts=("image", "table"),
    idle=("extra.dbn",),
    expects=("network",),
)
RATES = {"bernoulli": 0.1, "gaussian": 0.001}
PLAIN = (nn.Linear, nn.ReLU, nn.Sigmoid, nn.Flatten, nn.Identity, nn.Dropout, nn.Sequential)


@final
class RBM(nn.Module):
    """A restricted Boltzmann machine: ``E(v, h) = -b v - c h - v' W h``, hidden units in {0, 1}.

    ``visible``: "bernoulli" (inputs in [0, 1]) or "gaussian" (``v | h ~ N(b + W h, 1)``; the energy of v is then ``|v - b|^2 / 2``).
    ``W`` [visible hidden] starts as N(0, 0.01^2), ``b`` [visible] and ``c`` [hidden] at 0.
    """

    def __init__(self, n_visible: int, n_hidden: int, visible: str = "bernoulli") -> None:
        super().__init__()
        if visible not in RATES:
            raise Mistake(f"RBM: visible={visible!r}: must be 'bernoulli' (inputs in 0 to 1) or 'gaussian' (standardised inputs)")
        self.visible = visible
        self.W = nn.Parameter(torch.empty(n_visible, n_hidden))
        self.b = nn.Parameter(torch.zeros(n_visible))
        self.c = nn.Parameter(torch.zeros(n_hidden))
        nn.init.normal_(self.W, 0.0, 0.01)

    def forward(self, v: Float[Tensor, "n v"]) -> Float[Tensor, "n h"]:
        """``p(h_j = 1 | v) = sigmoid(c_j + v' W_j)``."""
        return torch.sigmoid(v @ self.W + self.c)

    def down(self, h: Float[Tensor, "n h"]) -> Float[Tensor, "n v"]:
        """``p(v_i = 1 | h) = sigmoid(b_i + W_i h)``, or the mean ``b_i + W_i h`` of Gaussian units."""
        v = h @ self.W.T + self.b
        return torch.sigmoid(v) if self.visible == "bernoulli" else v

    def reconstruct(self, v: Float[Tensor, "n v"]) -> Float[Tensor, "n v"]:
        """Up and down by probabilities, nothing sampled."""
        return self.down(self(v))

    def free_energy(self, v: Float[Tensor, "n v"]) -> Float[Tensor, " n"]:
        """``F(v) = -b v - sum_j softplus(c_j + v' W_j)``; Gaussian units have ``|v - b|^2 / 2`` in place of ``-b v``."""
        own = -(v @ self.b) if self.visible == "bernoulli" else (v - self.b).square().sum(1) / 2
        return own - F.softplus(v @ self.W + self.c).sum(1)

    @torch.no_grad()
    def gibbs(self, v: Float[Tensor, "n v"], k: int, gen: Generator) -> Float[Tensor, "n v"]:
        """``k`` rounds of sampling h given v, then v's probabilities given h."""
        for _ in range(k):
            p = self(v)
            v = self.down((torch.rand(p.shape, generator=gen).to(p) < p).to(p))
        return v

    def cd_loss(self, v: Float[Tensor, "n v"], k: int, gen: Generator, chain: Float[Tensor, "m v"] | None = None) -> Tensor:
        """``mean F(v_0) - mean F(v_k)``, whose gradient is contrastive divergence: ``-(<v_0 p(h|v_0)'> - <v_k p(h|v_k)'>)`` for W.

        The chain starts at the data, or at ``chain`` (persistent contrastive divergence: pass what the last call of :meth:`gibbs` gave).
        """
        return self.free_energy(v).mean() - self.free_energy(self.gibbs(v if chain is None else chain, k, gen)).mean()

    @torch.no_grad()
    def cd_step(self, v: Float[Tensor, "n v"], gen: Generator, k: int = 1, lr: float = 0.1) -> float:
        """One plain step of CD-``k``; returns the mean squared reconstruction error before it."""
        vk = self.gibbs(v, k, gen)
        p0, pk = self(v), self(vk)
        error = float((v - self.reconstruct(v)).square().mean())
        self.W.add_(v.T @ p0 / len(v) - vk.T @ pk / len(vk), alpha=lr)
        self.b.add_(v.mean(0) - vk.mean(0), alpha=lr)
        self.c.add_(p0.mean(0) - pk.mean(0), alpha=lr)
        return error


def unrolled(machines: Sequence[RBM]) -> nn.Sequential:
    """The deep autoencoder of a stack: up through all machines, then down through their transposed weights (copies, to be fine-tuned)."""
    layers: list[nn.Module] = []
    for machine in machines:
        layers += [_linear(machine.W.T, machine.c), nn.Sigmoid()]
    for machine in reversed(machines):
        layers += [_linear(machine.W, machine.b), *([nn.Sigmoid()] if machine.visible == "bernoulli" else [])]
    return nn.Sequential(*layers)


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0]).to(weight)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    return layer


def stack_of(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Names and modules of the linear layers below the head, in order. A Mistake where the network is anything else than such a stack."""
    head = getattr(model, "get_classifier", lambda: None)()
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    children = [module for module in model.modules() if module is not model]
    chained = all(a.out_features == b.in_features for (_, a), (_, b) in itertools.pairwise(found))
    if not found or not chained or not all(isinstance(module, PLAIN) for module in children):
        raise Mistake(f"dbn learns stacks of fully connected layers, and {type(model).__name__} is none; use --model sigmoid-mlp, or mlp for a table")
    return found


@final
@dataclass
class DBN(Technique):
    """``epochs`` of CD-``k`` for each hidden layer, on all training rows, labelled or not; then the main training goes on from there.

    The network's hidden units become sigmoids. ``visible``: kind of the first layer's inputs; None takes "bernoulli" for grey images
    ([0, 1] pixels) and "gaussian" (standardised inputs) for colour and tables. ``lr`` None is 0.1 and 0.001 for these.
    The momentum is 0.5 for 5 epochs, then 0.9. ``epochs=0`` is off.
    """

    epochs: int = 10
    k: int = 1
    visible: str | None = None
    lr: float | None = None
    weight_decay: float = 2e-4

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.k < 1:
            raise Mistake(f"dbn: epochs={self.epochs}, k={self.k}: epochs is at least 0 (off), and k, the rounds of sampling, at least 1")
        if self.visible is not None and self.visible not in RATES:
            raise Mistake(f"dbn: visible={self.visible!r}: must be 'bernoulli' or 'gaussian', or None to choose by the data")
        if (self.lr is not None and not self.lr > 0) or self.weight_decay < 0:
            raise Mistake(f"dbn: lr={self.lr}, weight_decay={self.weight_decay}: lr is above 0 (None chooses), weight_decay at least 0")

    def kind(self, run: Run, layer: int) -> str:
        """Of the visible units of a layer."""
        grey = run.data.preprocess.kind == "image" and run.data.preprocess.channels == 1
        return "bernoulli" if layer else self.visible or ("bernoulli" if grey else "gaussian")

    def on_start(self, run: Run) -> None:
        if self.epochs == 0:
            return
        layers = stack_of(run.model)
        if self.kind(run, 0) == "bernoulli" and run.data.preprocess.kind != "image":
            raise Mistake("dbn: visible='bernoulli' takes inputs in 0 to 1, and this data is a table; use visible=gaussian")
        if any(isinstance(module, nn.ReLU) for module in run.model.modules()):
            run.edit("dbn")
        run.extra["dbn"] = nn.ModuleList([RBM(layer.in_features, layer.out_features, self.kind(run, i)) for i, (_, layer) in enumerate(layers)])

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Sigmoids in place of rectifiers."""
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, nn.ReLU):
                    setattr(module, name, nn.Sigmoid())

    def before(self, run: Run) -> list[Stage]:
        if self.epochs == 0:
            return []
        own = run.team.owner("optimizer") is None
        stages = []
        for i, machine in enumerate(machines(run)):
            names = {f"extra.dbn.{i}.{name}" for name, _ in machine.named_parameters()}
            rate = self.lr or (RATES[machine.visible] if own else None)
            stages.append(
                Stage(f"dbn {i + 1}", self.epochs, objective=self.divergence, trainable=names.__contains__, guests=False, lr=rate, schedule="constant")
            )
        return stages

    def on_batch(self, run: Run) -> None:
        """Momentum and weight decay of the machines; the optimiser is made anew for the next stage."""
        layer = layer_of(run)
        if layer is None or run.team.owner("optimizer") is not None or run.optimizer is None:
            return
        for group in run.optimizer.param_groups:
            group.update(momentum=0.5 if run.epoch < 5 else 0.9, nesterov=False)
            group["weight_decay"] = self.weight_decay if group["params"][0].dim() > 1 else 0.0

    def divergence(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """CD-``k`` of the stage's machine on what the machines below make of the batch."""
        layer = layer_of(run)
        assert layer is not None
        with torch.no_grad():
            v = inputs(run, batch.x, layer)
        return machines(run)[layer].cd_loss(v, self.k, run.gen("dbn"))

    def on_epoch(self, run: Run) -> None:
        """Report the reconstruction error and the free-energy gap, and copy the machine into its layer of the network."""
        layer = layer_of(run)
        if layer is None:
            return
        copy_into(run, layer)
        machine = machines(run)[layer]
        means = {}
        with torch.no_grad():
            for split in ("train", "val"):
                rows = run.data.split[split][:1024]
                if len(rows):
                    v = inputs(run, run.plan.pixels(run.data.x.take(rows)), layer)
                    means[split] = float(machine.free_energy(v).mean())
                    if split == "train":
                        run.report(f"reconstruction error {layer + 1}", float((v - machine.reconstruct(v)).square().mean()), "per unit")
        if len(means) == 2:
            run.report(f"free-energy gap {layer + 1}", means["val"] - means["train"], "nats")


def layer_of(run: Run) -> int | None:
    """The layer that the stage under way learns, or None in other stages."""
    name, _, number = run.stage.name.partition(" ")
    return int(number) - 1 if name == "dbn" and number else None


def machines(run: Run) -> list[RBM]:
    """The run's machines, lowest first."""
    return [machine for machine in run.extra["dbn"].children() if isinstance(machine, RBM)]


def inputs(run: Run, x: Tensor, layer: int) -> Float[Tensor, "n v"]:
    """What machine ``layer`` sees of [0, 1] pixels or table rows: ``p(h | v)`` of the machines below."""
    below = machines(run)
    v = (x if below[0].visible == "bernoulli" else run.normalise(x)).flatten(1)
    for machine in below[:layer]:
        v = machine(v)
    return v


@torch.no_grad()
def copy_into(run: Run, layer: int) -> None:
    """Give the network's linear layer the machine's ``W`` and ``c``.

    The network sees normalised pixels ``u``, a Bernoulli machine ``v = std u + mean``: ``c + v' W = (c + mean' W) + u' (std W)``.
    """
    machine, linear = machines(run)[layer], stack_of(run.model)[layer][1]
    W: Tensor = machine.W
    c: Tensor = machine.c
    if layer == 0 and machine.visible == "bernoulli":
        size = run.data.preprocess.size
        mean, std = (part.expand(1, -1, *size).flatten().to(W) for part in (run.normalise.mean, run.normalise.std))
        W, c = std[:, None] * W, c + mean @ W
    linear.weight.copy_(W.T)
    linear.bias.copy_(c)
