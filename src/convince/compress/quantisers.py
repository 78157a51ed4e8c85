"""Quantisers: ranges, scales, codes, simulated and true integer arithmetic, and where a network needs them.

A real number is ``scale * (code - zero)`` with an integer code (Krishnamoorthi 2018, section 2). Everything
here speaks of *centred* codes, ``code - zero``: they are small integers, exact in float32 and in bfloat16
(8 bits: at most 255), so a floating-point convolution of centred codes is the integer convolution.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer
from torch import Generator, Tensor, nn
from torch.overrides import TorchFunctionMode

from convince.errors import Mistake

Range = tuple[Tensor, Tensor]  # smallest and largest value


def check_bits(name: str, bits: int | None, *, none: bool = False) -> None:
    """Refuse a number of bits that int8 storage cannot hold; with ``none`` 0 and None mean: stay in float."""
    if none and not bits:
        return
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
        raise Mistake(f"{name}={bits}: must be 2 to 8 bits{', or 0 to stay in floating point' if none else ''}; codes are stored as int8")


def check_word(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Refuse a word that is not allowed."""
    if value not in allowed:
        raise Mistake(f"{name}={value!r}: must be {' or '.join(map(repr, allowed))}")


# -- the quantiser ---------------------------------------------------------------------------------


def limits(bits: int, scheme: str) -> tuple[int, int]:
    """Smallest and largest code: affine ``[0, 2^b - 1]``, symmetric ``[-(2^(b-1) - 1), 2^(b-1) - 1]``."""
    half = 2 ** (bits - 1) - 1
    return (0, 2**bits - 1) if scheme == "affine" else (-half, half)


def quant_params(low: Float[Tensor, "*s"], high: Float[Tensor, "*s"], bits: int, scheme: str = "affine") -> tuple[Tensor, Tensor]:
    """Scale and zero code of the range ``[low, high]``, widened to include 0 (eqs. 1 to 3 and section 2.2).

    affine: ``scale = (high - low) / (2^b - 1)``, ``zero = round(-low / scale)`` in [0, 2^b - 1];
    symmetric: ``scale = max|x| / (2^(b-1) - 1)``, ``zero = 0``. A range of zeros gives scale 1. The
    zero is an integer in the dtype of ``low``. Real 0 always has a code, so zero padding is exact.
    """
    low, high = low.clamp_max(0), high.clamp_min(0)
    qmin, qmax = limits(bits, scheme)
    span = high - low if scheme == "affine" else torch.maximum(-low, high)
    scale = span / qmax
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    zero = (-low / scale).round().clamp(qmin, qmax) if scheme == "affine" else torch.zeros_like(scale)
    return scale, zero


class _Round(torch.autograd.Function):
    """Round half to even; the gradient passes straight through."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def centred_codes(x: Tensor, scale: Tensor, zero: Tensor, bits: int, scheme: str = "affine", gen: Generator | None = None) -> Tensor:
    """``clamp(round(x / scale) + zero, qmin, qmax) - zero``, whole numbers in the dtype of ``x``.

    ``scale`` and ``zero`` broadcast against ``x``. Gradient with respect to ``x``: ``1 / scale`` where x lies inside
    the clamp range, 0 outside (eq. 13). With ``gen`` rounding is stochastic: up with the probability of the fraction.
    """
    qmin, qmax = limits(bits, scheme)
    steps = x / scale
    if gen is not None:
        steps = steps + (torch.rand(x.shape, generator=gen).to(steps) - 0.5)
    if steps.requires_grad:
        return (_Round.apply(steps) + zero).clamp(qmin, qmax) - zero
    return steps.round_().add_(zero).clamp_(qmin, qmax).sub_(zero)  # the same in place, twice as fast


def fake_quant(x: Tensor, scale: Tensor, zero: Tensor, bits: int, scheme: str = "affine", gen: Generator | None = None) -> Tensor:
    """``scale * (clamp(round(x / scale) + zero, qmin, qmax) - zero)``: quantised and taken back (eqs. 9 to 12).

    The gradient is straight-through: 1 where ``x`` lies inside the clamp range, 0 outside.
    """
    return centred_codes(x, scale, zero, bits, scheme, gen) * scale


# -- observers -------------------------------------------------------------------------------------


def minmax(x: Tensor, granularity: str = "tensor") -> Range:
    """Smallest and largest value: of the whole, or of each slice along axis 0 (shape [c 1 1 ...])."""
    if granularity == "tensor":
        return x.amin(), x.amax()
    dims = tuple(range(1, x.dim()))
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


def moving_average(old: Range | None, new: Range, decay: float = 0.99) -> Range:
    """``decay * old + (1 - decay) * new`` for both ends; the first range is taken as it is."""
    if old is None:
        return new
    return tuple(decay * a + (1 - decay) * b for a, b in zip(old, new, strict=True))  # type: ignore[return-value]


def percentile(x: Tensor, share: float = 0.999) -> Range:
    """The range that leaves ``(1 - share) / 2`` of the values out at each end; ``share=1`` is :func:`minmax`."""
    if not 0 < share <= 1:
        raise Mistake(f"share={share}: must be above 0 and at most 1")
    values = x.flatten().sort().values
    cut = round((1 - share) / 2 * (len(values) - 1))
    return values[cut], values[len(values) - 1 - cut]


# -- weights ---------------------------------------------------------------------------------------


def fold_bn(weight: Tensor, bias: Tensor | None, bn: nn.Module) -> tuple[Tensor, Tensor]:
    """Weights and bias of convolution and batch normalisation as one: ``w * gamma / sigma``, ``beta - gamma * mu / sigma``.

    With long-term statistics and ``sigma = sqrt(var + eps)``; a bias of the convolution is carried along.
    """
    factor, mean = bn_factor(bn), _tensor(bn.running_mean)
    shift = -mean if bias is None else bias - mean
    beta = _tensor(bn.bias) if bn.bias is not None else torch.zeros_like(mean)
    return weight * factor.view(-1, *[1] * (weight.dim() - 1)), beta + shift * factor


def bn_factor(bn: nn.Module) -> Float[Tensor, " c"]:
    """``gamma / sigma`` with long-term statistics."""
    factor = (_tensor(bn.running_var) + bn.eps).rsqrt()  # type: ignore[operator]
    return factor if bn.weight is None else factor * _tensor(bn.weight)


def _tensor(value: Any) -> Tensor:
    assert isinstance(value, Tensor)
    return value.detach()


def quantise_weight(weight: Tensor, bits: int, granularity: str, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes, scale and zero of a weight: [c 1 1 ...] for "channel" (axis 0), [] for "tensor".

    Affine codes are stored as ``code - 2^(b-1)``, and the zero with them, so that they fit int8.
    """
    scale, zero = quant_params(*minmax(weight, granularity), bits, scheme)
    shift = zero - 2 ** (bits - 1) if scheme == "affine" else zero
    return (centred_codes(weight, scale, zero, bits, scheme) + shift).to(torch.int8), scale, shift.to(torch.int16)


# -- true integer arithmetic, as a reference --------------------------------------------------------


def int_linear(x: Integer[Tensor, "n d"], x_zero: int, weight: Integer[Tensor, "m d"], w_zero: Integer[Tensor, " m"]) -> Integer[Tensor, "n m"]:
    """``sum_d (x - x_zero)(w - w_zero)`` in int32 from the raw codes, by zero-point correction (section 2.1, eq. 8).

    ``sum x w - w_zero sum x - x_zero sum w + d x_zero w_zero``: the last two are known before any input.
    """
    a, b, z = x.to(torch.int32), weight.to(torch.int32), w_zero.to(torch.int32)
    return a @ b.T - a.sum(1, dtype=torch.int32)[:, None] * z - x_zero * b.sum(1, dtype=torch.int32) + a.shape[1] * x_zero * z


def int_conv2d(
    x: Integer[Tensor, "n c h w"],
    x_zero: int,
    weight: Integer[Tensor, "m g i j"],
    w_zero: Integer[Tensor, " m"],
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
) -> Integer[Tensor, "n m k o"]:
    """Convolution of raw codes with int32 accumulators; the border is padded with the code of real 0."""
    n, c = x.shape[:2]
    m, _, i, j = weight.shape
    x = F.pad(x.to(torch.int32), (padding,) * 4, value=x_zero)
    patches = x.unfold(2, i, stride).unfold(3, j, stride)  # n c k o i j
    k, o = patches.shape[2:4]
    outputs = []
    for rows, kernels, zeros in zip(patches.split(c // groups, 1), weight.split(m // groups), w_zero.split(m // groups), strict=True):
        flat = rows.permute(0, 2, 3, 1, 4, 5).reshape(n * k * o, -1)
        outputs.append(int_linear(flat, x_zero, kernels.flatten(1), zeros).view(n, k, o, -1))
    return torch.cat(outputs, 3).permute(0, 3, 1, 2)


def requantise(total: Integer[Tensor, "n m ..."], bias: Tensor | None, x_scale: Tensor, w_scale: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """int32 accumulators -> codes [0, 2^b - 1] of the next layer: ``round((total + bias) * x_scale w_scale / scale) + zero``.

    ``bias`` is real; it is added as int32 at scale ``x_scale * w_scale``.
    """
    shape = (1, -1, *[1] * (total.dim() - 2))
    step = (x_scale * w_scale).reshape(shape) if w_scale.numel() > 1 else (x_scale * w_scale).reshape(())
    if bias is not None:
        total = total + (bias.view(shape) / step).round().to(torch.int32)
    return ((total * (step / scale)).round() + zero).clamp(0, 2**bits - 1).to(torch.uint8)


# -- modules ---------------------------------------------------------------------------------------


@final
class Quantiser(nn.Module):
    """Simulated quantisation of an activation, per tensor and affine, with a fixed range."""

    scale: Tensor
    zero: Tensor

    def __init__(self, bits: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        super().__init__()
        self.bits = bits
        self.register_buffer("scale", torch.ones((), dtype=dtype, device=device))
        self.register_buffer("zero", torch.zeros((), dtype=torch.int16, device=device))

    def codes(self, x: Tensor) -> Tensor:
        """Centred codes; the real value is these times ``scale``."""
        return centred_codes(x.to(self.scale.dtype), self.scale, self.zero, self.bits)

    def forward(self, x: Tensor) -> Tensor:
        return (self.codes(x) * self.scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def quantise_output(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    """A forward hook: pass the output through the module's child ``quantise``."""
    return module.quantise(output)  # type: ignore[operator]


def add_output(model: nn.Module, name: str, quantiser: nn.Module) -> None:
    """Give the module ``name`` a quantiser of its output, as a child and a hook; names of what exists stay."""
    module = model.get_submodule(name)
    module.add_module("quantise", quantiser)
    if quantise_output not in module._forward_hooks.values():
        module.register_forward_hook(quantise_output)


def replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the place ``name``."""
    home, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(home), leaf, module)


# -- where a network needs quantisers --------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """``layers``: convolutions and linear layers, each with the batch normalisation that follows it or None.

    ``outputs``: modules whose output meets another in a sum, or that return such a sum.
    ``bare``: sums or addends that no module returns, which therefore get no quantiser of their own.
    """

    layers: list[tuple[str, str | None]]
    outputs: list[str]
    bare: int


_OURS = ("inputs", "quantise")  # children that quantisation adds
_ADDITIONS = {"add", "add_", "__add__", "__radd__", "__iadd__"}
_ACTIVATIONS = {"relu", "relu_", "relu6", "silu", "gelu", "hardtanh", "hardswish", "leaky_relu"}


class _Watch(TorchFunctionMode):
    """Follows sums of feature maps and the activations after them, by the identity of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Any] = []  # while a tensor lives its id is its own
        self.leaves: dict[int, list[str]] = {}  # tensor -> modules without children that returned it
        self.sums: dict[int, list[str]] = {}  # sum, or activation of one -> modules that returned it, innermost first
        self.joins: list[list[str]] = []
        self.addends: list[list[str]] = []
        self.reads: collections.Counter[int] = collections.Counter()  # tensor -> operations that computed with it

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = getattr(func, "__name__", "")
        maps = [a for a in args[:2] if isinstance(a, Tensor) and a.dim() >= 3 and a.is_floating_point()]
        found = self.sums.get(id(maps[0])) if name in _ACTIVATIONS and maps else None
        if name in _ADDITIONS and len(maps) == 2 and maps[0].shape == maps[1].shape:
            self.addends += [self.leaves.get(id(a), []).copy() for a in maps if id(a) not in self.sums]
            found = []
            self.joins.append(found)
        result = func(*args, **(kwargs or {}))
        self.kept.append(result)
        if isinstance(result, Tensor):
            self.reads.update({id(a) for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,)) if isinstance(a, Tensor)})
        if found is not None:
            self.sums[id(result)] = found
        return result

    def returned(self, name: str, module: nn.Module, output: Tensor) -> None:
        """Note that this module returned this tensor."""
        self.kept.append(output)
        if id(output) in self.sums and not isinstance(module, nn.Sequential):
            self.sums[id(output)].append(name)
        if all(n in _OURS for n, _ in module.named_children()):
            self.leaves.setdefault(id(output), []).append(name)


def untouched(module: nn.Module) -> bool:
    """True where nothing hangs on a module that would be lost if it were replaced (timm keeps the activation inside a norm)."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    return all(hook is quantise_output for hook in hooks) and all(n in (*_OURS, "act", "drop") for n, _ in module.named_children())


def replaceable(module: nn.Module) -> bool:
    """True for a convolution or linear layer as torch makes it (or one that simulates int8): no subclass, hook or parametrisation, zero padding."""
    plain = type(module) in (nn.Conv2d, nn.Linear) or getattr(module, "simulates_int8", False)
    return plain and untouched(module) and getattr(module, "padding_mode", "zeros") == "zeros"


@torch.no_grad()
def layout(model: nn.Module, x: Tensor) -> Layout:
    """Find the units of a network from one pass of a small batch ``x`` of its own input; the model is left as found.

    A batch normalisation belongs to the convolution whose output it reads. A module that runs more
    than once in a pass, or that others have hung something on, stays as it is.
    """
    names = {m: n for n, m in model.named_modules()}
    free, normal = {m for m in names if replaceable(m)}, {m for m in names if isinstance(m, nn.BatchNorm2d) and m.track_running_stats and untouched(m)}
    watch, calls = _Watch(), dict.fromkeys(names.values(), 0)
    made: dict[int, str] = {}
    norms: dict[str, str | None] = {}

    def after(module: nn.Module, inputs: Any, output: Any) -> None:
        name = names[module]
        calls[name] += 1
        if module in free:
            norms[name], made[id(output)] = None, name
        elif module in normal and id(inputs[0]) in made:
            norms[made[id(inputs[0])]] = name
        if isinstance(output, Tensor) and name.rpartition(".")[2] not in _OURS:
            watch.returned(name, module, output)

    modes = [(m, m.training) for m in names]
    hooks = [m.register_forward_hook(after) for m in names]
    try:
        model.eval()
        with watch:
            model(x)
    finally:
        for hook in hooks:
            hook.remove()
        for module, training in modes:
            module.training = training
    once = {name for name, count in calls.items() if count == 1 and name}
    chosen = [next((n for n in found if n in once), None) for found in watch.joins]
    chosen += [next((n for n in reversed(found) if n in once), None) for found in watch.addends]
    order = list(names.values())
    outputs = sorted({n for n in chosen if n is not None}, key=order.index)
    alone = {name for tensor, name in made.items() if watch.reads[tensor] == 1}  # nothing but its normalisation reads it
    layers = [(n, bn if bn in once and n in alone else None) for n, bn in norms.items() if n in once]
    return Layout(layers, outputs, sum(n is None for n in chosen))


@contextlib.contextmanager
def watching(model: nn.Module, inputs: list[str], outputs: list[str], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """While open, ``see("NAME.inputs" or "NAME.quantise", tensor)`` is called with what modules read and return."""
    hooks = []
    for name in inputs:
        hooks.append(model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: see(f"{name}.inputs", args[0])))
    for name in outputs:
        hooks.append(model.get_submodule(name).register_forward_hook(lambda m, args, out, name=name: see(f"{name}.quantise", out)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def bytes_of(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, as a file holds them."""
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())
