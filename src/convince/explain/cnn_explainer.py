"""CNN Explainer's engine: every number of a small network for one image, and the arithmetic behind each of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.fit.answer import Normalise
from convince.fit.precision import full
from convince.kinds import Explainer, as_found
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="cnn-explainer",
    kind="explainer",
    paper="cnn-explainer",
    title="CNN Explainer: Learning Convolutional Neural Networks with Interactive Visualization",
    year=2020,
    url="https://arxiv.org/abs/2004.15004",
    expects=("images",),
    departs=(
        "this is the engine under the page: layers, links and arithmetic as plain arrays; the interactive page is a later part of the toolkit",
        "layers that are no module of their own, such as the sum of a skip connection, are shown as one opaque step",
    ),
)

MOST = 4_000_000  # numbers in all maps of a trace; beyond that a page could not hold them
Array = np.ndarray


@dataclass(frozen=True)
class Step:
    """One layer of a trace: what it was given and what it gave, without the batch axis, in float64, and what it multiplies by.

    ``kind``: "normalise", "conv", "norm" (a batch norm as a scale and a shift by channel), "relu", "max pool", "average pool", "flatten",
    "linear", "softmax", or "opaque" for any other. ``source``: the position of the step that it reads, -1 for the image, None if it is not one.
    ``options``: kernel_size, stride, padding, dilation (pairs) and groups where the layer has them.
    """

    name: str
    kind: str
    source: int | None
    input: Array
    output: Array
    weight: Array | None = None
    bias: Array | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def intermediate(self, channel: int) -> Array:
        """Of a convolution's output channel: the map that each of its input channels adds, [c h w]. They and the bias sum to the output."""
        if self.kind != "conv" or self.weight is None:
            raise Mistake(f"cnn-explainer: {self.name} is of kind {self.kind}; only a convolution has intermediate maps")
        first, x = self._group(channel), torch.from_numpy(self.input)
        weight, o = torch.from_numpy(self.weight[channel]), self.options
        x = x[first : first + len(weight)]
        return F.conv2d(x[None], weight[:, None], stride=o["stride"], padding=o["padding"], dilation=o["dilation"], groups=len(weight))[0].numpy()

    def _group(self, channel: int) -> int:
        """The first input channel that an output channel reads."""
        assert self.weight is not None
        per = len(self.weight) // self.options["groups"]
        return channel // per * self.weight.shape[1]


@dataclass(frozen=True)
class Trace:
    """A network's steps in order, the last of them the softmax over its scores."""

    steps: tuple[Step, ...]
    classes: tuple[str, ...] = ()

    def step(self, name: str) -> Step:
        """The step called ``name``."""
        for step in self.steps:
            if step.name == name:
                return step
        names = [step.name for step in self.steps]
        raise Mistake(f"cnn-explainer: no step {name!r}{nearest(name, names)} There are: {', '.join(names)}")


# -- recording ---------------------------------------------------------------------------------------


def trace(model: nn.Module, x: Float[Tensor, "n c h w"], classes: tuple[str, ...] = ()) -> Trace:
    """Every layer of ``model`` for one image: inputs, kernels and outputs as float64 arrays with names; see :class:`Step`. The model is left as found.

    The pass is made in float64 on a copy of the numbers, so that sums agree to rounding. Raises Mistake for more than one image, or for a network
    whose maps hold more than four million numbers.
    """
    import copy

    if x.dim() != 4 or len(x) != 1:
        raise Mistake(f"cnn-explainer: traces one image [1 c h w], and the input has shape {tuple(x.shape)}")
    seen: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    given: dict[str, Tensor] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            if args and isinstance(args[0], Tensor):
                given[name] = args[0].detach().clone()  # before a module in place changes it

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if isinstance(output, Tensor) and name in given and len(output) == 1:
                seen.append((name, module, given.pop(name), output.detach().clone()))
                if sum(out.numel() for *_, out in seen) > MOST:
                    raise Mistake(f"cnn-explainer: the maps of this network hold more than {MOST:,} numbers; take a smaller network (tinyvgg) or image")

        return hook

    with as_found(model), torch.no_grad():
        double = copy.deepcopy(model).double()
        for name, module in double.named_modules():
            if not list(module.children()):
                called = name or type(module).__name__.lower()
                module.register_forward_pre_hook(before(called))
                module.register_forward_hook(after(called))
        scores = full(double(x.detach().double()))
    steps: list[Step] = []
    ends: list[Tensor] = []  # what each step gave, as the next is given it
    for name, module, read, got in seen:
        if isinstance(module, (nn.Identity, nn.Dropout)):
            continue
        source = _source(read, x.double(), ends)
        if source is None:  # something between modules: a sum, a view
            flat = next((i for i in reversed(range(len(ends))) if torch.equal(ends[i].flatten(), read.flatten())), None)
            last = ends[flat] if flat is not None else ends[-1] if ends else x.double()
            steps.append(Step(f"before {name}", "opaque" if flat is None else "flatten", flat, _array(last), _array(read)))
            ends.append(read)
            source = len(ends) - 1
        steps.append(_step(name, module, source, read, got))
        ends.append(got)
    if not steps:
        raise Mistake(f"cnn-explainer: {type(model).__name__} has no layer to show")
    if not torch.equal(ends[-1], scores):
        steps.append(Step("scores", "opaque", len(ends) - 1, _array(ends[-1]), _array(scores)))
    steps.append(Step("softmax", "softmax", len(steps) - 1, _array(scores), _array(scores.softmax(1))))
    return Trace(tuple(steps), tuple(classes))


def _source(given: Tensor, x: Tensor, ends: list[Tensor]) -> int | None:
    for i in reversed(range(len(ends))):
        if ends[i].shape == given.shape and torch.equal(ends[i], given):
            return i
    return -1 if x.shape == given.shape and torch.equal(x, given) else None


def _array(tensor: Tensor) -> Array:
    return tensor[0].detach().double().cpu().numpy()


def _step(name: str, module: nn.Module, source: int, given: Tensor, got: Tensor) -> Step:
    weight = bias = None
    options: dict[str, Any] = {}
    kind = "opaque"
    if isinstance(module, Normalise):
        kind, weight, bias = "normalise", 1 / module.std.flatten(), -(module.mean / module.std).flatten()
    elif type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str):
        kind, weight, bias = "conv", module.weight, module.bias
        options = {key: getattr(module, key) for key in ("kernel_size", "stride", "padding", "dilation", "groups")}
    elif type(module) is nn.BatchNorm2d and module.running_var is not None and module.running_mean is not None:
        scale = (module.running_var + module.eps).rsqrt() * (1 if module.weight is None else module.weight)
        kind, weight, bias = "norm", scale, (0 if module.bias is None else module.bias) - module.running_mean * scale
    elif isinstance(module, nn.ReLU):
        kind = "relu"
    elif isinstance(module, (nn.MaxPool2d, nn.AvgPool2d)) and not module.ceil_mode and getattr(module, "count_include_pad", True):
        kind = "max pool" if isinstance(module, nn.MaxPool2d) else "average pool"
        options = {key: _pair(getattr(module, key, 1)) for key in ("kernel_size", "stride", "padding", "dilation")}
    elif isinstance(module, nn.Flatten):
        kind = "flatten"
    elif type(module) is nn.Linear and given.dim() == 2:
        kind, weight, bias = "linear", module.weight, module.bias
    by, plus = (None if t is None else t.detach().double().cpu().numpy() for t in (weight, bias))
    return Step(name, kind, source, _array(given), _array(got), by, plus, options)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else tuple(value)


# -- the arithmetic ----------------------------------------------------------------------------------


def explain_value(step: Step, at: tuple[int, ...]) -> dict[str, Any]:
    """The arithmetic behind one number of a step's output: ``at`` is (channel, row, column), or (unit,).

    "patch" (what was read; zeros where a kernel stands out over the edge), "kernel", "terms" (their products), "bias" and "value", which the terms
    and the bias sum to; for pools "patch" and how it is put together ("rule"); for softmax the exponentials.
    Raises Mistake for an opaque step and for a place outside.
    """
    if len(at) != step.output.ndim or any(not 0 <= i < n for i, n in zip(at, step.output.shape, strict=False)):
        raise Mistake(f"cnn-explainer: {step.name} has no value at {at}; its output has shape {list(step.output.shape)}")
    channel = at[0]
    if step.kind == "conv":
        assert step.weight is not None
        first, kernel = step._group(channel), step.weight[channel]
        patch = window(step.input[first : first + len(kernel)], at[1:], step.options)
        return _sum("sum of patch x kernel, plus the bias", patch, kernel, step.bias, channel)
    if step.kind == "linear":
        assert step.weight is not None
        return _sum("sum of inputs x weights, plus the bias", step.input, step.weight[channel], step.bias, channel)
    if step.kind in ("norm", "normalise"):
        assert step.weight is not None
        weight = step.weight if len(step.weight) > 1 else np.repeat(step.weight, len(step.input))
        bias = step.bias if step.bias is None or len(step.bias) > 1 else np.repeat(step.bias, len(step.input))
        return _sum("input x scale, plus the shift", np.array([step.input[at]]), np.array([weight[channel]]), bias, channel)
    if step.kind == "relu":
        return {"rule": "max(0, a)", "patch": step.input[at], "value": max(0.0, float(step.input[at]))}
    if step.kind in ("max pool", "average pool"):
        largest = step.kind == "max pool"
        patch = window(step.input[channel : channel + 1], at[1:], step.options, -math.inf if largest else 0.0)[0]
        return {"rule": "the largest" if largest else "the mean", "patch": patch, "value": float(patch.max() if largest else patch.mean())}
    if step.kind == "flatten":
        place = int(np.ravel_multi_index(at, step.output.shape))
        return {"rule": "the same number", "from": tuple(map(int, np.unravel_index(place, step.input.shape))), "value": float(step.input.flat[place])}
    if step.kind == "softmax":
        terms = np.exp(step.input - step.input.max())
        return {"rule": "exp(z_i - largest) over their sum", "patch": step.input, "terms": terms, "value": float(terms[channel] / terms.sum())}
    raise Mistake(f"cnn-explainer: {step.name} is opaque: what it computes is not one of the kinds that can be shown")


def _sum(rule: str, patch: Array, kernel: Array, bias: Array | None, channel: int) -> dict[str, Any]:
    terms, shift = patch * kernel, 0.0 if bias is None else float(bias[channel])
    return {"rule": rule, "patch": patch, "kernel": kernel, "terms": terms, "bias": shift, "value": float(terms.sum() + shift)}


def window(x: Float[np.ndarray, "c h w"], at: tuple[int, ...], options: dict[str, Any], outside: float = 0.0) -> Array:
    """What a kernel sees at an output position (row, column): [c k k], ``outside`` beyond the edges."""
    found = np.full((len(x), *options["kernel_size"]), outside)
    rows, columns = (
        [i * stride - padding + j * dilation for j in range(size)]
        for i, size, stride, padding, dilation in zip(at, *(options[key] for key in ("kernel_size", "stride", "padding", "dilation")), strict=True)
    )
    for a, row in enumerate(rows):
        for b, column in enumerate(columns):
            if 0 <= row < x.shape[1] and 0 <= column < x.shape[2]:
                found[:, a, b] = x[:, row, column]
    return found


def output_size(size: int, kernel: int, padding: int = 0, stride: int = 1, dilation: int = 1) -> tuple[int, bool]:
    """``floor((n + 2 p - d (k - 1) - 1) / s) + 1``, and whether the kernel comes out even at the last edge; 0 where it does not fit at all."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    return (0, False) if room < 0 else (room // stride + 1, room % stride == 0)


# -- as an explainer ---------------------------------------------------------------------------------


@final
@dataclass
class CnnExplainer(Explainer):
    """The overview as a picture: a column of maps for each layer with a plane, up to ``channels`` of each, every map from its least to its largest value.

    It gives no map of a class: ``images["overview"]`` is [n 1 h w]. Numbers and arithmetic: :func:`trace` and :func:`explain_value`.
    """

    channels: int = 10

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise Mistake(f"cnn-explainer: channels={self.channels} must be at least 1")

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        traces = [trace(answer, image[None]) for image in x.detach()]
        side = max(x.shape[2:]) + 2
        pictures = [self.overview(found, side) for found in traces]
        kinds = [f"{step.name}: {step.kind}" for step in traces[0].steps]
        return Explanation(None, {"overview": torch.from_numpy(np.stack(pictures))[:, None].to(x.dtype)}, {"steps": kinds})

    def overview(self, found: Trace, side: int) -> Array:
        """Tiles of ``side`` pixels, a column a step; one pixel of 0 between them."""
        planes = [step.output[: self.channels] for step in found.steps if step.output.ndim == 3]
        sheet = np.zeros((side * max(map(len, planes), default=1), side * max(len(planes), 1)))
        for column, maps in enumerate(planes):
            for row, plane in enumerate(maps):
                low, high = plane.min(), plane.max()
                tile = torch.from_numpy((plane - low) / (high - low) if high > low else np.zeros_like(plane))
                large = F.interpolate(tile[None, None], size=(side - 1, side - 1), mode="nearest")[0, 0].numpy()
                sheet[row * side : (row + 1) * side - 1, column * side : (column + 1) * side - 1] = large
        return sheet
