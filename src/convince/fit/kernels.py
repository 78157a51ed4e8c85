"""Kernels: the way a depthwise or grouped convolution is computed, chosen by measuring this machine, and said by ``doctor``.

The library's own path is far from the fastest for some of them: the gradient of a large depthwise kernel takes
ten times its forward pass, a strided one in bf16 a hundred times. A :class:`Way` says in which number format and layout such a
convolution runs, and whether its gradients are computed as convolutions themselves, which they are: the mathematics
is the same.
"""

from __future__ import annotations

import itertools
import json
import time
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from convince.errors import Mistake


@dataclass(frozen=True)
class Way:
    """``fp32``: in full precision also where the run is in bf16; ``first``: channels first, also where the run is channels_last;
    ``own``: gradients as convolutions (depthwise only)."""

    fp32: bool = False
    first: bool = False
    own: bool = False

    def __str__(self) -> str:
        """``"fp32+channels-first"``, or ``"library"``: as it stands in a run's config."""
        return "+".join(word for word, on in zip(WORDS, (self.fp32, self.first, self.own), strict=True) if on) or "library"


WORDS = ("fp32", "channels-first", "gradients-as-convolutions")


def way(text: str) -> Way:
    """Read what ``str(Way)`` wrote; a Mistake that lists the words."""
    words = set() if text == "library" else set(text.split("+"))
    if not words <= set(WORDS):
        raise Mistake(f"kernels: {text!r} is no way to compute a convolution; it is 'library', or some of {', '.join(WORDS)} joined by +")
    return Way(*(word in words for word in WORDS))


# kind -> (channels, groups, kernel, stride, dilation) of the convolution that stands for it when ways are measured
KINDS: dict[str, tuple[int, int, int, int, int]] = {
    "grouped": (64, 8, 3, 1, 1),
    "depthwise": (64, 64, 3, 1, 1),
    "depthwise, strided": (64, 64, 3, 2, 1),
    "depthwise, dilated": (64, 64, 3, 1, 3),
    "depthwise, 5 and more": (64, 64, 7, 1, 1),
    "depthwise, 10 and more": (64, 64, 13, 1, 1),
}


def kind_of(conv: nn.Conv2d) -> str | None:
    """The kind of a convolution, or None for an ordinary one, which the library computes well."""
    if conv.groups == 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str) or max(conv.kernel_size) == 1:
        return None
    if conv.groups != conv.in_channels or conv.out_channels != conv.in_channels:
        return "grouped"
    if max(conv.stride) > 1:
        return "depthwise, strided"
    if max(conv.dilation) > 1:
        return "depthwise, dilated"
    side = max(conv.kernel_size)
    return "depthwise" if side < 5 else "depthwise, 5 and more" if side < 10 else "depthwise, 10 and more"


class Depthwise(torch.autograd.Function):
    """A depthwise convolution whose gradients are convolutions: by the input with the kernel turned round, by the kernel with the gradient as the kernel."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
        return F.conv2d(x, weight, None, stride, padding, dilation, len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, *ctx.how = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        of_x = gradient_of_input(grad, weight, x.shape, *ctx.how) if ctx.needs_input_grad[0] else None
        of_weight = gradient_of_kernel(grad, x, weight, *ctx.how) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, None, None, None


Pair = tuple[int, int]


def gradient_of_input(grad: Tensor, weight: Tensor, shape: torch.Size, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The gradient by the input: ``grad`` convolved with the kernel turned round; with a stride the library's, in full precision."""
    around = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    if stride == (1, 1) and min(around) >= 0:
        return F.conv2d(grad, weight.flip(2, 3), None, 1, around, dilation, len(weight))
    wide = torch.promote_types(grad.dtype, torch.float32)
    return conv2d_input(list(shape), weight.to(wide), grad.to(wide), stride, padding, dilation, len(weight)).to(grad.dtype)


def gradient_of_kernel(grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, padding: Pair, dilation: Pair) -> Tensor:
    """The gradient by the kernel: each channel of each row convolved with its own ``grad``, stride and dilation changing places; summed over rows."""
    n, c, height, width = x.shape
    rows = x.contiguous().view(1, n * c, height, width)
    kernels = grad.contiguous().view(n * c, 1, *grad.shape[2:])
    each = F.conv2d(rows, kernels, None, dilation, padding, stride, n * c)[..., : weight.shape[2], : weight.shape[3]]
    return each.view(n, c, *weight.shape[2:]).sum(0, dtype=torch.promote_types(each.dtype, torch.float32))[:, None].to(weight.dtype)


def convolve(conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, train: Way, infer: Way) -> Tensor:
    """The convolution of a module, by the way for training where gradients are wanted, else by the other."""
    chosen = train if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad) else infer
    if chosen.fp32 and torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _by(chosen, conv, x.float(), weight.float(), None if bias is None else bias.float())
    return _by(chosen, conv, x, weight, bias)


def _by(chosen: Way, conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if chosen.first:
        x = x.contiguous()
    if not chosen.own:
        return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation, conv.groups)
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    y = Depthwise.apply(x, weight, conv.stride, conv.padding, conv.dilation)
    return y if bias is None else y + bias.to(y.dtype)[:, None, None]


def install(model: nn.Module, ways: Mapping[str, tuple[str, str]]) -> int:
    """Let each convolution of a kind in ``ways`` run by them (training, inference); returns how many. Weights and names are untouched."""
    count = 0
    forwards = {kind: _Forward(way(train), way(infer)) for kind, (train, infer) in ways.items()}
    for module in model.modules():
        kind = kind_of(module) if type(module) is nn.Conv2d else None
        if kind in forwards:
            module._conv_forward = types.MethodType(forwards[kind], module)  # type: ignore[assignment]
            count += 1
    return count


@dataclass(frozen=True)
class _Forward:
    """What stands in a module's ``_conv_forward``: bound to it, and copied with it."""

    train: Way
    infer: Way

    def __call__(self, conv: nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve(conv, x, weight, bias, self.train, self.infer)


# -- measuring -------------------------------------------------------------------------------------


def measure(kind: str, precision: str, channels_last: bool, seconds: float = 0.15) -> dict[str, dict[Way, float]]:
    """Milliseconds of one pass of the kind's stand-in [32 rows, 16x16 positions] by each way: "train" forward and backward, "infer" forward.

    From what a network hands on (the run's number format and layout) and back to it, so that conversions count.
    """
    c, groups, kernel, stride, dilation = KINDS[kind]
    conv = nn.Conv2d(c, c, kernel, stride, dilation * (kernel - 1) // 2, dilation, groups, bias=False)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.zeros(32, c, 16, 16, dtype=torch.bfloat16 if precision == "bf16" else torch.float32).contiguous(memory_format=layout)
    found: dict[str, dict[Way, float]] = {"train": {}, "infer": {}}
    for job, choice in itertools.product(found, itertools.product((False, True), repeat=3)):
        tried = Way(*choice)
        if (tried.fp32 and precision != "bf16") or (tried.first and not channels_last) or (tried.own and (groups != c or job == "infer")):
            continue
        found[job][tried] = _time(conv, x, tried, job == "train", precision == "bf16", layout, seconds)
    return found


def _time(conv: nn.Conv2d, x: Tensor, tried: Way, train: bool, bf16: bool, layout: torch.memory_format, seconds: float) -> float:
    x = x.detach().requires_grad_(train)

    def once() -> float:
        began = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16), torch.set_grad_enabled(train):
            y = convolve(conv, x, conv.weight, None, tried, tried).to(x.dtype).contiguous(memory_format=layout)
        if train:
            y.backward(y.detach())
        return time.perf_counter() - began

    once()
    until, times = time.perf_counter() + seconds, [once()]
    while len(times) < 5 or time.perf_counter() < until:  # the least of some: a busy machine only adds
        times.append(once())
    return min(times) * 1e3


GAIN = 1.25  # a way replaces the library's where it is at least this much faster, so that noise does not choose


def measured(precision: str, channels_last: bool, kinds: Iterable[str] = tuple(KINDS)) -> dict[str, dict[str, dict[Way, float]]]:
    """What :func:`measure` found for each kind, from the cache folder or now; kept there for this processor, torch and number of threads."""
    from convince.data.cache import cache_folder
    from convince.fit.folder import processor
    from convince.fit.state import write_atomic

    path = cache_folder() / "kernels.json"
    place = f"{processor()}, torch {torch.__version__}, {torch.get_num_threads()} threads, {precision}, {'channels_last' if channels_last else 'contiguous'}"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        table = kept.setdefault(place, {})
    except (OSError, ValueError, AttributeError):
        kept = {}
        table = kept.setdefault(place, {})
    missing = [kind for kind in kinds if kind not in table]
    for kind in missing:
        table[kind] = {job: {str(tried): ms for tried, ms in times.items()} for job, times in measure(kind, precision, channels_last).items()}
    if missing:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(kept))
    return {kind: {job: {way(text): ms for text, ms in times.items()} for job, times in table[kind].items()} for kind in kinds}


def choose(precision: str, channels_last: bool, kinds: Iterable[str] = tuple(KINDS)) -> dict[str, tuple[str, str]]:
    """The fastest measured way of each kind for training and for inference, as text; kinds that the library does best are left out."""
    if precision not in ("bf16", "fp32"):
        return {}
    found = {kind: (str(best(times["train"])), str(best(times["infer"]))) for kind, times in measured(precision, channels_last, kinds).items()}
    return {kind: ways for kind, ways in found.items() if ways != ("library", "library")}


def best(times: dict[Way, float]) -> Way:
    fastest = min(times, key=lambda tried: times[tried])
    return fastest if times[Way()] > GAIN * times[fastest] else Way()


def kinds_in(model: nn.Module) -> list[str]:
    """The kinds of convolution that a network has, in the order of :data:`KINDS`."""
    have = {kind_of(m) for m in model.modules() if type(m) is nn.Conv2d}
    return [kind for kind in KINDS if kind in have]
