"""He init: first weights whose variance neither grows nor fades through layers of rectifiers, drawn anew when a run starts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="he-init",
    kind="technique",
    paper="prelu-he-init",
    title="Delving Deep into Rectifiers: Surpassing Human-Level Performance on ImageNet Classification",
    year=2015,
    url="https://arxiv.org/abs/1502.01852",
    departs=(
        "every convolution and linear layer is drawn by the same law, the classifier too, whatever follows it",
        "strides are not counted: a layer of stride s hands gradients to its input by fewer paths than mode='fan_out' assumes",
    ),
    tiny={},
)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def he_std(fan: int, a: float = 0.0) -> float:
    """``sqrt(2 / ((1 + a^2) fan))``, for rectifiers with the slope ``a`` below 0 (eq. 10 and 15): fan 144 gives 0.117851."""
    return math.sqrt(2 / ((1 + a * a) * fan))


def xavier_std(fan: int) -> float:
    """``sqrt(1 / fan)``, which the paper calls Xavier: right for linear layers, and half of the variance that rectifiers need."""
    return math.sqrt(1 / fan)


def fan(layer: nn.Module, mode: str = "fan_in") -> int:
    """How many weights meet in one output ("fan_in", ``k k C_in``: the forward pass) or leave one input ("fan_out", ``k k C_out``: the backward)."""
    weight, groups = layer.weight, getattr(layer, "groups", 1)
    assert isinstance(weight, Tensor)
    return weight[0].numel() if mode == "fan_in" else weight.numel() // (weight.shape[1] * groups)


def check(law: str, mode: str, dist: str) -> None:
    """Refuse words that are no law, mode or distribution."""
    for name, value, allowed in (("law", law, ("he", "xavier")), ("mode", mode, ("fan_in", "fan_out")), ("dist", dist, ("normal", "uniform"))):
        if value not in allowed:
            raise Mistake(f"he-init: {name}={value!r}: must be {' or '.join(map(repr, allowed))}")


@torch.no_grad()
def redraw(layer: nn.Module, gen: Generator, law: str = "he", a: float = 0.0, mode: str = "fan_in", dist: str = "normal") -> None:
    """New weights for one convolution or linear layer, biases 0. ``law`` "he" or "xavier", ``dist`` "normal" or "uniform" of the same deviation."""
    check(law, mode, dist)
    weight = layer.weight
    assert isinstance(weight, Tensor)
    std = he_std(fan(layer, mode), a) if law == "he" else xavier_std(fan(layer, mode))
    drawn = torch.empty(weight.shape, dtype=weight.dtype)
    drawn.normal_(0, std, generator=gen) if dist == "normal" else drawn.uniform_(-math.sqrt(3) * std, math.sqrt(3) * std, generator=gen)
    weight.copy_(drawn)
    if isinstance(layer.bias, Tensor):
        layer.bias.zero_()


def layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The layers that have a law: convolutions and linear layers, by name in the network's order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, LAYERS))


def he_init(model: nn.Module, gen: Generator, **law: Any) -> None:
    """:func:`redraw` every convolution and linear layer of a network, in its order."""
    for _, layer in layers(model):
        redraw(layer, gen, **law)


@final
@dataclass
class HeInit(Technique):
    """Draw the weights of every convolution and linear layer by ``law`` before training, other parts' new layers too; their biases are 0.

    ``law`` "he" or "xavier" (the paper's comparison); ``a`` the slope of the rectifiers below 0 (0.25 beside prelu); ``mode`` "fan_in" or
    "fan_out", either of which suffices; ``dist`` "normal" or "uniform".
    """

    law: Literal["he", "xavier"] = "he"
    a: float = 0.0
    mode: Literal["fan_in", "fan_out"] = "fan_in"
    dist: Literal["normal", "uniform"] = "normal"
    rank = 70  # after the parts that put layers in, before those that copy the network

    def __post_init__(self) -> None:
        check(self.law, self.mode, self.dist)

    def on_start(self, run: Run) -> None:
        if run.settings.start is not None:
            raise Mistake(f"he-init: would draw over the weights of --start {run.settings.start}; leave out one of the two")
        found = list(layers(run.model))
        if not found:
            raise Mistake(f"he-init: the network {run.settings.model!r} has no convolution or linear layer to draw; leave it out")
        for name, layer in found:
            redraw(layer, run.gen("he-init", name), self.law, self.a, self.mode, self.dist)


# -- looking at it ---------------------------------------------------------------------------------


def variance_probe(model: nn.Module, x: Tensor, gen: Generator) -> list[dict[str, Any]]:
    """A row for each convolution and linear layer, in the order they ran: the variance of its pre-activations and of their gradients.

    Rows have ``layer``, ``forward`` and ``backward``. ``x`` are inputs of the network; the gradient that enters at its end is drawn from N(0, 1).
    In the network's present mode; ``.grad`` and hooks are left as found. Under He's law both stay within a factor of a few in wide networks.
    """
    rows: list[dict[str, Any]] = []

    def look(name: str) -> Callable[..., None]:
        def hook(m: nn.Module, inputs: Any, output: Tensor) -> None:
            row = {"layer": name, "forward": float(output.detach().var())}
            rows.append(row)
            output.register_hook(lambda gradient: row.__setitem__("backward", float(gradient.var())))

        return hook

    hooks = [m.register_forward_hook(look(name)) for name, m in layers(model)]
    try:
        with torch.enable_grad():
            x = x.detach().clone().requires_grad_()
            out = model(x)
            torch.autograd.grad(out, x, torch.randn(out.shape, generator=gen, dtype=out.dtype).to(out.device))
    finally:
        for handle in hooks:
            handle.remove()
    return rows


def plain_net(
    depth: int = 30,
    width: int = 64,
    k: int = 3,
    padding_mode: Literal["zeros", "circular"] = "circular",
    in_chans: int | None = None,
    num_classes: int = 0,
    act: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Sequential:
    """``depth`` convolutions of ``width`` channels, an activation after each, no norms and no skips: what an initial law is tried on.

    ``in_chans`` None: ``width``. With ``num_classes`` the mean over positions and a linear layer follow.
    """
    net = nn.Sequential()
    for i in range(depth):
        c_in = width if i or in_chans is None else in_chans
        net.add_module(f"conv{i + 1}", nn.Conv2d(c_in, width, k, padding=k // 2, padding_mode=padding_mode))
        net.add_module(f"act{i + 1}", act())
    if num_classes:
        net.add_module("pool", nn.AdaptiveAvgPool2d(1))
        net.add_module("flatten", nn.Flatten())
        net.add_module("fc", nn.Linear(width, num_classes))
    return net
