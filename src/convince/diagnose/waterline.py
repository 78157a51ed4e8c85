"""Waterline: for every layer the work, the bytes it moves, and how much of a processor's peak that allows; and how much it takes in truth."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from convince.errors import Mistake
from convince.fit.precision import peak_flops
from convince.kinds import Probe, as_found
from convince.parts import Card
from convince.types import Bars, Curves, Findings, Reading

CARD = Card(
    part="waterline",
    kind="probe",
    paper="convfirst-efficiency",
    title="On the Efficiency of Convolutional Neural Networks",
    year=2024,
    url="https://arxiv.org/abs/2404.03617",
    departs=(
        "peak and bandwidth are stated, not measured, unless measured=true, so that two readings of one network are equal",
        "every operation reads its inputs from memory and writes its outputs there, as if there were no cache between",
        "norms, activations and sums count with the bytes they move and no operations; the paper's figures show convolutions",
        "layers are drawn as wide as their predicted time, not their operations, so that the area is the mean efficiency",
        "one format a table: the network runs in that of its own weights, also where a run trains it in bf16",
    ),
)


# -- the accounting: pure functions ------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """What one module does itself, without the modules inside it: ``ops`` (a multiply-add is 2), ``bytes`` moved, ``seconds`` if they were measured."""

    name: str
    ops: int
    bytes: int
    seconds: float | None = None

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.ops / self.bytes if self.bytes else 0.0


class Peaks(NamedTuple):
    """The most that a processor does: ``ops`` a second and ``bytes`` a second, from and to memory."""

    ops: float
    bytes: float


def attainable(layer: Layer, peaks: Peaks) -> float:
    """The share of the peak that the layer's intensity allows, 0 to 1: ``min(peak, intensity * bandwidth) / peak`` (the roofline)."""
    return min(1.0, layer.intensity * peaks.bytes / peaks.ops)


def ideal(layer: Layer, peaks: Peaks) -> float:
    """``ops / peak`` [s]: the time at an efficiency of 1."""
    return layer.ops / peaks.ops


def predicted(layer: Layer, peaks: Peaks) -> float:
    """``max(ops / peak, bytes / bandwidth)`` [s]: the shortest time that the roofline allows."""
    return max(ideal(layer, peaks), layer.bytes / peaks.bytes)


def measured(layers: Sequence[Layer]) -> float:
    """The time [s] that layers took together. A Mistake where one was not timed."""
    for layer in layers:
        if layer.seconds is None:
            raise Mistake(f"waterline: {layer.name} was not timed; take the layers from profile_layers, not from account")
    return sum(layer.seconds or 0.0 for layer in layers)


def efficiency(layer: Layer, peaks: Peaks) -> float:
    """Ideal time over measured time, from ``latency = ops / (peak * efficiency)``."""
    return ideal(layer, peaks) / max(measured([layer]), 1e-12)


class Level(NamedTuple):
    """The waterline of layers in sequence: predicted time [s], and the mean efficiency it allows, total ideal over total predicted time."""

    seconds: float
    efficiency: float


def waterline(layers: Sequence[Layer], peaks: Peaks) -> Level:
    """Predicted time and attainable mean efficiency of layers that run one after another."""
    seconds = sum(predicted(layer, peaks) for layer in layers)
    return Level(seconds, sum(ideal(layer, peaks) for layer in layers) / seconds if seconds else 0.0)


def sequence(layers: Sequence[Layer], peaks: Peaks) -> Curves:
    """The layers as bars side by side, as wide as their predicted time and as high as their attainable efficiency; the line is their mean."""
    at, steps = 0.0, []
    for layer in layers:
        height, end = attainable(layer, peaks), at + 1000 * predicted(layer, peaks)
        steps += [(at, height), (end, height)]
        at = end
    level = waterline(layers, peaks).efficiency
    return Curves("Waterline", "predicted time [ms]", "share of the peak", {"layers": steps, "mean": [(0.0, level), (at, level)]})


def efficiency_gap(models: Mapping[str, tuple[float, Sequence[Layer]]], peaks: Peaks) -> Curves:
    """Ideal and measured latency by error, for models named with (error, timed layers): the gap between the two, on a log axis, is lost efficiency."""
    rows = sorted((error, sum(ideal(layer, peaks) for layer in layers), measured(layers)) for error, layers in models.values())
    return Curves("Efficiency gap", "error", "s", {"ideal": [(e, i) for e, i, _ in rows], "measured": [(e, s) for e, _, s in rows]}, log=True)


# -- measuring ---------------------------------------------------------------------------------------


def machine_peaks(precision: str = "fp32", seconds: float = 0.3) -> Peaks:
    """Operations a second of a large matrix product and bytes a second of a large copy (read and written), each the best of ``seconds``, measured now.

    ``precision``: "fp32" or "bf16". Uses as many threads as torch does. On a GPU where there is one.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.ones(2**24, device=device)
    b = a.clone()  # not empty: the first touch of new memory is slow
    best, until = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < until:
        began = _clock(a)
        b.copy_(a)
        best = max(best, 2 * a.numel() * a.element_size() / (_clock(a) - began))
    return Peaks(peak_flops(precision, side=4096 if device == "cuda" else 512, seconds=seconds), best)  # short ones: other work interrupts long ones


def _clock(x: Tensor) -> float:
    """Seconds; where torch has one thread, that thread's own, so that what other programs take does not count."""
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.thread_time() if not x.is_cuda and torch.get_num_threads() == 1 else time.perf_counter()


@final
class Ledger(TorchDispatchMode):
    """Writes down what every operation of a pass computes, moves and takes, under the module whose ``forward`` called it."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x, self.inside = x, ["(outside)"]
        self.rows: dict[str, list[float]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        began = _clock(self.x)
        out = func(*args, **kwargs)
        took = _clock(self.x) - began
        row = self.rows.setdefault(self.inside[-1], [0, 0, 0.0])
        row[0] += _ops(func, args, kwargs, out)
        row[1] += 0 if _moves_nothing(func) else sum(_bytes(t) for t in tree_leaves((args, kwargs, out)))
        row[2] += took
        return out

    @contextlib.contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Know the module that is at work; hooks are taken off again."""
        handles = []
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(partial(self._enter, name or type(model).__name__)))
            handles.append(module.register_forward_hook(self._leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        self.inside.append(name)

    def _leave(self, module: nn.Module, inputs: Any, output: Any) -> None:
        self.inside.pop()


def _ops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    packet = func.overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=out))
    if packet is torch.ops.aten.mkldnn_rnn_layer:  # a step of every row is one product with each of the two matrices
        x, over_input, over_state = args[:3]
        return 2 * x.numel() // x.shape[-1] * (over_input.numel() + over_state.numel())
    return 0


def _moves_nothing(func: Any) -> bool:
    """True for views and for memory that is only set aside."""
    view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
    return view or func.overloadpacket.__name__ in ("_unsafe_view", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def _bytes(leaf: Any) -> int:
    """Bytes of a tensor; one that repeats itself (expanded) counts as what it holds."""
    return min(leaf.numel() * leaf.element_size(), leaf.untyped_storage().nbytes()) if isinstance(leaf, Tensor) else 0


def _passes(model: nn.Module, x: Tensor, count: int) -> Iterator[dict[str, list[float]]]:
    with as_found(model), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        for _ in range(count):
            ledger = Ledger(x)
            with ledger.watching(model), ledger:
                model(x)
            yield ledger.rows


def account(model: nn.Module, x: Float[Tensor, "n ..."]) -> list[Layer]:
    """What each module does for this batch in eval mode, in the order of first use: a layer a module that computes or moves anything itself.

    Additions and attention inside a block's own ``forward`` stand under the block's name. The model is left as found.
    """
    (rows,) = _passes(model, x, 1)
    return [Layer(name, int(ops), int(moved)) for name, (ops, moved, _) in rows.items() if moved]


def profile_layers(model: nn.Module, x: Float[Tensor, "n ..."], repeats: int = 15, warmup: int = 5) -> list[Layer]:
    """:func:`account` with the median ``seconds`` of ``repeats`` passes after ``warmup`` more. Only the operations are timed, not what stands between them."""
    if repeats < 1 or warmup < 0:
        raise Mistake(f"waterline: repeats={repeats}, warmup={warmup}: at least 1 pass is measured, and 0 or more before it")
    passes = list(_passes(model, x, warmup + repeats))
    return [
        Layer(name, int(ops), int(moved), statistics.median(rows[name][2] for rows in passes[warmup:])) for name, (ops, moved, _) in passes[-1].items() if moved
    ]


# -- the probe ---------------------------------------------------------------------------------------


@final
@dataclass
class Waterline(Probe):
    """Work, bytes, attainable efficiency and predicted time of a network and of its layers, for ``batch`` images at once.

    ``peak`` [operations a second, a multiply-add is 2] and ``bandwidth`` [bytes a second] are round numbers of one processor core; give those of the
    machine in mind. ``measured``: both are measured here and every layer is timed; these readings come from the clock and differ from call to call.
    """

    peak: float = 1e11
    bandwidth: float = 2e10
    batch: int = 8
    measured: bool = False

    def __post_init__(self) -> None:
        if not self.peak > 0 or not self.bandwidth > 0 or self.batch < 1:
            raise Mistake(f"waterline: peak={self.peak:g}, bandwidth={self.bandwidth:g}, batch={self.batch}: operations and bytes a second > 0; batch >= 1")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        if not len(x):
            raise Mistake("waterline: at least one image is needed to run the network on")
        x = x[: self.batch]
        peaks = machine_peaks() if self.measured else Peaks(self.peak, self.bandwidth)
        layers = profile_layers(answer, x) if self.measured else account(answer, x)
        working = [layer for layer in layers if layer.ops]
        if not working:
            raise Mistake(f"waterline: {type(answer).__name__} multiplies nothing; it takes networks with convolutions or matrix products")
        level, n, ops, moved = waterline(layers, peaks), len(x), sum(r.ops for r in layers), sum(r.bytes for r in layers)
        readings = [
            Reading("multiply-adds", ops / 2 / n, "an image"),
            Reading("bytes moved", moved / n, "an image"),
            Reading("intensity", ops / moved, "operations a byte"),
            Reading("peak over bandwidth", peaks.ops / peaks.bytes, "operations a byte"),
            Reading("attainable efficiency", level.efficiency, "share of the peak"),
            Reading("predicted time", level.seconds / n, "s an image"),
            Reading("predicted time without multiply-adds", sum(predicted(r, peaks) for r in layers if not r.ops) / level.seconds, "share of the time"),
        ]
        if self.measured:
            seconds = measured(layers)
            readings += [Reading("measured time", seconds / n, "s an image"), Reading("measured efficiency", ops / peaks.ops / seconds, "share of the peak")]
        for layer in working:
            readings.append(Reading(f"{layer.name}: attainable efficiency", attainable(layer, peaks), "share of the peak"))
            readings.append(Reading(f"{layer.name}: predicted time", predicted(layer, peaks) / level.seconds, "share of the time"))
            if self.measured:
                readings.append(Reading(f"{layer.name}: measured efficiency", efficiency(layer, peaks), "share of the peak"))
        longest = sorted(layers, key=lambda layer: predicted(layer, peaks), reverse=True)[:12]
        bars = Bars("Where the predicted time goes", "share of the time", {r.name: predicted(r, peaks) / level.seconds for r in longest})
        return Findings(readings, [sequence(layers, peaks), bars])
