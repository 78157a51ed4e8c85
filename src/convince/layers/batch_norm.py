"""Batch norm: each unit normalised over the mini-batch before its nonlinearity, put into networks that have no normalisation."""

from __future__ import annotations

import copy
import functools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as TorchNorm

from convince.errors import Mistake, nearest
from convince.layers.surgery import Surgery, find, refuse_nothing, swap
from convince.parts import Card

CARD = Card(
    part="batch-norm",
    kind="layer",
    paper="batch-norm",
    title="Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate Shift",
    year=2015,
    url="https://arxiv.org/abs/1502.03167",
    swaps=("Conv1d", "Conv2d", "Linear"),
    host="plain-cnn:layers=(1,1),widths=(4,8)",
    departs=(
        "at inference the running averages of torch's layer stand for the population; recompute_stats makes the paper's average over batches",
        "only the layer is put in: higher rates, less weight decay and no dropout, which the paper adds with it, are left to the run's settings",
        "a layer that is added to another before the activation, as in a residual network, is normalised before the addition",
    ),
    tiny={},
)
NORMS: dict[type[nn.Module], type[TorchNorm]] = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Linear: nn.BatchNorm1d}


def batch_norm(
    x: Float[Tensor, "n c *s"], gamma: Float[Tensor, " c"], beta: Float[Tensor, " c"], eps: float = 1e-5
) -> tuple[Float[Tensor, "n c *s"], Float[Tensor, " c"], Float[Tensor, " c"]]:
    """``gamma (x - mu_B) / sqrt(var_B + eps) + beta`` (algorithm 1), with the batch's mean and biased variance, over rows and positions."""
    axes, shape = (0, *range(2, x.dim())), (1, -1, *[1] * (x.dim() - 2))
    mean, var = x.mean(axes), x.var(axes, unbiased=False)
    y = (x - mean.view(shape)) / (var.view(shape) + eps).sqrt()
    return gamma.view(shape) * y + beta.view(shape), mean, var


def running(old: tuple[Tensor, Tensor], mean: Tensor, var: Tensor, m: int, momentum: float = 0.1) -> tuple[Tensor, Tensor]:
    """Running mean and variance after a batch whose channels have ``m`` values each: the variance enters unbiased, times ``m / (m - 1)``."""
    return (1 - momentum) * old[0] + momentum * mean, (1 - momentum) * old[1] + momentum * var * (m / (m - 1))


# -- putting it in, taking it out ------------------------------------------------------------------


def install(model: nn.Module, eps: float = 1e-5, momentum: float = 0.1, skip: Sequence[str] = ()) -> Surgery:
    """Put torch's batch norm behind every convolution and linear layer but the classifier, before what follows, and drop their biases.

    ``skip`` names layers (or patterns) that are left alone. ``convs.0.weight`` becomes ``convs.0.layer.weight``, beside ``convs.0.bn.weight``; ``undo``
    brings biases and names back. Linear layers must answer with vectors [n c]. Raises Mistake for a network that has normalisation already.
    """
    if not eps > 0 or not 0 < momentum <= 1:
        raise Mistake(f"batch-norm: eps={eps}, momentum={momentum}: eps must be positive (1e-5 is usual), momentum above 0 and at most 1 (0.1)")
    found = next(((name, type(m).__name__) for name, m in model.named_modules() if is_norm(m)), None)
    if found is not None:
        who = f"{type(model).__name__} is normalised already ({found[0]} is a {found[1]})"
        raise Mistake(f"batch-norm: {who}; choose a network without normalisation, such as plain-cnn, or leave it out")
    layers = find(model, types=tuple(NORMS))
    head = model.get_classifier() if hasattr(model, "get_classifier") else layers[-1][1] if layers else nn.Identity()  # type: ignore[operator]
    inside = {id(m) for m in head.modules()}
    places = [(name, m) for name, m in find(model, types=tuple(NORMS), skip=skip) if id(m) not in inside]
    refuse_nothing(places, model, "batch-norm", "convolution or linear layer before its classifier", "choose a network such as plain-cnn")

    def make(name: str, layer: nn.Module) -> nn.Module:
        norm = next(norm for kind, norm in NORMS.items() if isinstance(layer, kind))
        return nn.Sequential(OrderedDict(layer=layer, bn=norm(len(layer.weight), eps=eps, momentum=momentum)))  # type: ignore[arg-type]

    done = swap(model, places, make)
    for _, layer in places:
        bias = layer._parameters["bias"]
        if bias is not None:
            layer._parameters["bias"] = None
            done.added -= bias.numel()
            done.steps.append(functools.partial(layer._parameters.__setitem__, "bias", bias))
    return done


def is_norm(m: nn.Module) -> bool:
    """True for a layer that normalises what it reads; response normalisation across channels, which the paper leaves out, does not count."""
    if isinstance(m, nn.LocalResponseNorm):
        return False
    return isinstance(m, (TorchNorm, nn.GroupNorm, nn.LayerNorm)) or ("norm" in type(m).__name__.lower() and not list(m.children()))


@torch.no_grad()
def fold_bn(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy for inference in which each batch norm that reads a layer's output is part of that layer: ``w gamma / sigma``, ``beta + (b - mu) gamma / sigma``.

    ``x`` are a few inputs: a pass over them finds the pairs, and the copy must answer as the network does (to 1e-3 of its largest score). Norms without
    such a layer stay. Raises Mistake where there is no pair, or where the copy answers otherwise because something else reads between the two.
    """
    small = copy.deepcopy(model).eval()
    wanted = small(x)
    pairs = _pairs(small, x)
    refuse_nothing(pairs, model, "fold_bn", "batch norm that reads a convolution's or linear layer's output", "choose another network")
    for layer, norm in pairs:
        sigma = (norm.running_var + norm.eps).sqrt()
        gamma = norm.weight if norm.weight is not None else torch.ones_like(sigma)
        beta = norm.bias if norm.bias is not None else torch.zeros_like(sigma)
        old = layer.bias if layer.bias is not None else torch.zeros_like(sigma)
        factor = gamma / sigma
        layer.weight = nn.Parameter(layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1)))
        layer.bias = nn.Parameter(beta + (old - norm.running_mean) * factor)
        _remove(small, norm)
    gap = float((small(x) - wanted).abs().max())
    if not gap <= 1e-3 * max(float(wanted.abs().max()), 1e-6):
        raise Mistake(f"fold_bn: {type(model).__name__} answers otherwise when folded (by {gap:.2g}); something reads a layer's output before its norm")
    return small


def _pairs(model: nn.Module, x: Tensor) -> list[tuple[Any, Any]]:
    """Each layer and the batch norm that is seen to read its output in a pass. Layers that run more than once have none."""
    found: list[tuple[Any, Any]] = []
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    runs: list[nn.Module] = []

    def ran(m: nn.Module, inputs: Any, output: Tensor) -> None:
        runs.append(m)
        made[id(output)] = (m, output)  # held, so that no other tensor gets its address

    def read(m: nn.Module, inputs: Any) -> None:
        if id(inputs[0]) in made:
            found.append((made[id(inputs[0])][0], m))

    hooks = [m.register_forward_hook(ran) for m in model.modules() if isinstance(m, tuple(NORMS))]
    hooks += [m.register_forward_pre_hook(read) for m in model.modules() if isinstance(m, TorchNorm) and m.track_running_stats]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return [(layer, norm) for layer, norm in found if sum(m is layer for m in runs) == 1]


def _remove(model: nn.Module, norm: nn.Module) -> None:
    """Leave of a batch norm what it does besides, in its place: timm's carries an activation."""
    rest = list(norm.children())
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is norm:
                parent._modules[name] = nn.Sequential(*rest) if rest else nn.Identity()


# -- statistics ------------------------------------------------------------------------------------


@torch.no_grad()
def recompute_stats(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """The paper's population statistics (algorithm 2), in place: mean and unbiased variance of each batch, averaged over all ``batches`` alike.

    ``batches`` are inputs as the network reads them. The rest of the network answers as in evaluation; modes are put back. Raises Mistake without
    batches or without batch norms.
    """
    norms = [m for m in model.modules() if isinstance(m, TorchNorm) and m.track_running_stats]
    refuse_nothing(norms, model, "recompute_stats", "batch norm with running statistics", "install the part batch-norm")
    modes, momenta = [(m, m.training) for m in model.modules()], [m.momentum for m in norms]
    seen = 0
    try:
        model.eval()
        for x in batches:
            for m in norms:
                if not seen:
                    m.reset_running_stats()
                m.momentum = None  # torch then weighs every batch alike
                m.training = True
            model(x)
            seen += 1
    finally:
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
        for module, training in modes:
            module.training = training
    if not seen:
        raise Mistake("recompute_stats: got no batches; give inputs of the training set")


@torch.no_grad()
def activation_percentiles(model: nn.Module, x: Tensor, module: str, unit: int = 0, at: Sequence[float] = (15, 50, 85)) -> list[float]:
    """Percentiles of what one unit of a module gives for ``x``, over rows and positions: read through training they show the drift of Fig. 1.

    ``unit`` counts channels of an output [n c ...]. In the network's present mode; the hook is taken off again.
    """
    found = dict(model.named_modules())
    if module not in found:
        raise Mistake(f"activation_percentiles: {type(model).__name__} has no module {module!r}{nearest(module, list(found))}")
    seen: list[Tensor] = []
    hook = found[module].register_forward_hook(lambda m, inputs, output: seen.append(output))
    try:
        model(x)
    finally:
        hook.remove()
    values = seen[-1]
    if values.dim() < 2 or not 0 <= unit < values.shape[1]:
        raise Mistake(f"activation_percentiles: unit={unit}: {module} gives {tuple(values.shape)}; count channels from 0 to {values.shape[1] - 1}")
    return torch.quantile(values[:, unit].flatten().double(), torch.tensor(at, dtype=torch.float64, device=values.device) / 100).tolist()
