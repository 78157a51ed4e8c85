"""ResidualStack: equal residual convolutions one behind the other, or side by side, or any number of terms of the expansion in between."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="residual-stack",
    kind="backbone",
    paper="shallow-parallel",
    title="Make Deep Networks Shallow Again",
    year=2023,
    url="https://arxiv.org/abs/2309.08414",
    accepts=("image",),
    optimizer="adamw:lr=0.001",
    departs=(
        "defaults are ours: the paper varies layers, filters, kernels and more on a grid whose levels could not be settled",
        "the head reads every position, which the paper's sizes suggest and its summary leaves open; head='pool' reads the mean",
        "weights begin by Glorot's uniform law with zero biases, in the manner of Keras, which the paper does not state",
        "AdamW trains it unless another optimizer is chosen; the paper does not depend on one",
    ),
    tiny={"n": 2, "filters": 4},
    variants={"residual-stack-mini": {"n": 8, "filters": 16}, "residual-stack-parallel-mini": {"n": 8, "filters": 16, "mode": "parallel"}},
    small=("residual-stack-mini", "residual-stack-parallel-mini"),
)
MODES = ("sequential", "parallel", "truncated")
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "linear": nn.Identity}

Map = Callable[[Tensor], Tensor]


def sequential(layers: Sequence[Map], x: Tensor) -> Tensor:
    """The deep layout ``(I + F_n) ... (I + F_1) x``."""
    for layer in layers:
        x = x + layer(x)
    return x


def parallel(layers: Sequence[Map], x: Tensor) -> Tensor:
    """The shallow layout ``x + sum_i F_i(x)``: the expansion of :func:`sequential` without its products."""
    return x + sum(layer(x) for layer in layers)


def truncated(layers: Sequence[Map], x: Tensor, order: int = 2) -> Tensor:
    """The expansion up to products of ``order`` layers: ``x + sum F_i x + sum_{j > i} F_j(F_i x) + ...``.

    Order 1 is :func:`parallel`; for linear layers order n is :func:`sequential`. It takes ``n choose m`` passes for the products of m layers.
    """
    total, chains = x, [(-1, x)]
    for _ in range(order):
        chains = [(j, layers[j](value)) for last, value in chains for j in range(last + 1, len(layers))]
        for _, value in chains:
            total = total + value
    return total


def truncation_error(matrices: Sequence[Float[Tensor, "d d"]], x: Float[Tensor, "n d"], order: int = 1) -> float:
    """``|truncated - sequential| / |sequential|`` for linear layers: of order ``a^(order + 1)`` for matrices of norm ``a``."""
    layers = [lambda v, m=m: v @ m.T for m in matrices]
    deep = sequential(layers, x)
    return float((truncated(layers, x, order) - deep).norm() / deep.norm())


@final
class Layer(nn.Module):
    """One ``F_i``: a convolution that keeps width and size, batch norm where asked for, the activation."""

    def __init__(self, c_in: int, c_out: int, kernel: int, act: str, norm: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, kernel, padding=kernel // 2)
        self.norm: nn.Module = nn.BatchNorm2d(c_out) if norm else nn.Identity()
        self.act: nn.Module = ACTIVATIONS[act]()
        nn.init.xavier_uniform_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)  # type: ignore[arg-type]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        return self.act(self.norm(self.conv(x)))


@final
class Stack(nn.Module):
    """``n`` layers in one of three layouts; the parameters and their names are the same in all."""

    def __init__(self, layers: Sequence[nn.Module], mode: str, order: int) -> None:
        super().__init__()
        self.layers, self.mode, self.order = nn.ModuleList(layers), mode, order

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        layers = list(self.layers)
        if self.mode == "truncated":
            return truncated(layers, x, self.order)
        return sequential(layers, x) if self.mode == "sequential" else parallel(layers, x)

    def extra_repr(self) -> str:
        return f"mode={self.mode}" + (f", order={self.order}" if self.mode == "truncated" else "")


@final
class Merged(nn.Module):
    """A parallel stack as one wide layer: one convolution with n times the outputs, the activation, a sum over the n groups. Exact, and faster."""

    def __init__(self, stack: Stack) -> None:
        super().__init__()
        layers: list[Layer] = list(stack.layers)  # type: ignore[arg-type]
        first = layers[0].conv
        self.n, self.channels = len(layers), first.out_channels
        self.conv = nn.Conv2d(first.in_channels, self.n * self.channels, first.kernel_size, padding=first.padding).to(first.weight)  # type: ignore[arg-type]
        self.norm = copy.deepcopy(layers[0].norm)
        self.act = layers[0].act
        with torch.no_grad():
            self.conv.weight.copy_(torch.cat([layer.conv.weight for layer in layers]))
            self.conv.bias.copy_(torch.cat([layer.conv.bias for layer in layers]))  # type: ignore[union-attr, misc]
            if isinstance(self.norm, nn.BatchNorm2d):
                self.norm = nn.BatchNorm2d(self.n * self.channels).to(first.weight)
                for name, tensor in self.norm.state_dict().items():
                    parts = [layer.norm.state_dict()[name] for layer in layers]
                    tensor.copy_(torch.cat(parts) if tensor.dim() else parts[0])
        self.train(stack.training)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x + self.act(self.norm(self.conv(x))).unflatten(1, (self.n, self.channels)).sum(1)


@final
class ResidualStack(Headed):
    """One convolution to ``filters`` channels, a :class:`Stack` of ``n`` residual layers, a head that reads all positions, or their mean.

    ``mode``: "sequential" (deep), "parallel" (shallow) or "truncated" after ``order`` terms. ``kernel`` is odd; ``act`` "relu", "tanh", "sigmoid" or
    "linear"; ``norm`` adds batch norm; ``head`` "flatten" fixes the image's size, "pool" does not and learns far more slowly.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: Sequence[int] = (28, 28),
        n: int = 8,
        filters: int = 16,
        kernel: int = 3,
        mode: str = "sequential",
        order: int = 2,
        act: str = "relu",
        norm: bool = False,
        head: str = "flatten",
    ) -> None:
        super().__init__()
        for name, value, known in (("mode", mode, MODES), ("act", act, tuple(ACTIVATIONS)), ("head", head, ("pool", "flatten"))):
            if value not in known:
                raise Mistake(f"residual-stack: {name}={value!r} must be one of {', '.join(known)}{nearest(value, known)}")
        if min(n, filters, order) < 1 or kernel < 1 or kernel % 2 == 0:
            raise Mistake(f"residual-stack: n={n}, filters={filters}, order={order}, kernel={kernel}: must be at least 1, and the kernel odd")
        self.num_classes, self.in_chans = num_classes, in_chans
        self.head, self.size = head, tuple(img_size)
        self.num_features = filters * (self.size[0] * self.size[1] if head == "flatten" else 1)
        self.stem = Layer(in_chans, filters, kernel, act, norm)
        self.stack: nn.Module = Stack([Layer(filters, filters, kernel, act, norm) for _ in range(n)], mode, order)
        self.fc = nn.Linear(self.num_features, num_classes)
        nn.init.xavier_uniform_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.feature_info = maps(("stem", filters, 1), ("stack", filters, 1))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        """The stack's output, at the image's resolution."""
        return self.stack(self.stem(x))

    def pool(self, features: Float[Tensor, "n d h w"]) -> Float[Tensor, "n e"]:
        """Every position of every channel, or the mean over positions."""
        if self.head == "pool":
            return features.mean((2, 3))
        if tuple(features.shape[2:]) != self.size:
            given = "x".join(map(str, features.shape[2:]))
            raise Mistake(f"residual-stack: head='flatten' is built for {self.size[0]}x{self.size[1]} pixels, given {given}; use head='pool'")
        return features.flatten(1)


def convert(model: ResidualStack, mode: str, order: int = 2) -> ResidualStack:
    """A copy of the network with the same weights in another layout; the original stays as it is."""
    if mode not in MODES:
        raise Mistake(f"convert: mode={mode!r} must be one of {', '.join(MODES)}{nearest(mode, MODES)}")
    made = copy.deepcopy(model)
    if not isinstance(made.stack, Stack):
        raise Mistake("convert: the network's layers are merged into one; convert it before merge()")
    if order < 1:
        raise Mistake(f"convert: order={order} must be at least 1, which is the parallel layout")
    made.stack.mode, made.stack.order = mode, order
    return made


def merge(model: ResidualStack) -> ResidualStack:
    """A copy of a parallel network whose layers are one wide layer (:class:`Merged`)."""
    if not isinstance(model.stack, Stack) or model.stack.mode != "parallel":
        raise Mistake("merge: only the layers of a parallel stack stand side by side; convert(model, 'parallel') first")
    made = copy.deepcopy(model)
    made.stack = Merged(made.stack)  # type: ignore[arg-type]
    return made


@torch.no_grad()
def layer_pair_test(model: ResidualStack, x: Float[Tensor, "n c h w"]) -> list[float]:
    """For each two neighbours of a stack, what is lost when they stand side by side instead of behind each other.

    ``|F_j(v + F_i v) - F_j(v)| / |F_i v + F_j(v + F_i v)|`` at the input v that the pair has in the sequential network: 0 where the second layer does
    not see the first. In the model's present mode.
    """
    if not isinstance(model.stack, Stack):
        raise Mistake("layer_pair_test: the network's layers are merged into one; test it before merge()")
    found, v, layers = [], model.stem(x), list(model.stack.layers)
    for a, b in itertools.pairwise(layers):
        step = a(v)
        after = b(v + step)
        found.append(float((after - b(v)).norm() / (step + after).norm().clamp_min(1e-12)))
        v = v + step
    return found
