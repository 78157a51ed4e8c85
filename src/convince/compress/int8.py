"""Int8: store convolutions and linear layers as 8-bit (or fewer) integer codes, after training, without training."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.compress import quantisers as q
from convince.errors import Mistake
from convince.fit.answer import Answer
from convince.kinds import Compressor, Cut, as_found
from convince.parts import Card
from convince.types import Budget

CARD = Card(
    part="int8",
    kind="compressor",
    paper="quantization-whitepaper",
    title="Quantizing deep convolutional networks for efficient inference: A whitepaper",
    year=2018,
    url="https://arxiv.org/abs/1806.08342",
    departs=(
        "codes are multiplied in the run's floating-point format, where products of centred codes are exact, not by an integer kernel: torch has no"
        " public int8 convolution, so files shrink four times but answers get no faster, and with 8-bit activations slower; 'compress' prints both",
        "an activation is quantised where a layer reads it and where a residual sum reads or returns it; values that only flow through"
        " concatenations, gates and sums inside one function stay in floating point",
        "codes of fewer than 8 bits take a whole byte each",
        "weights are symmetric by default; scheme='affine' is the paper's other choice",
    ),
    when="after",
    tiny={"batch": 8},
)


@final
class Int8Layer(nn.Module):
    """A convolution or linear layer with int8 codes: ``scale_x scale_w conv(code_x - zero_x, code_w - zero_w) + bias``.

    ``geometry`` are stride, padding, dilation and groups of a convolution; None is a linear layer. With
    ``a_bits`` 0 only the weights are codes. ``zero`` is there for affine weights.
    """

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor

    def __init__(self, layer: nn.Module, w_bits: int, a_bits: int, granularity: str, scheme: str) -> None:
        super().__init__()
        weight = layer.weight
        assert isinstance(weight, Tensor)
        self.geometry: dict[str, Any] | None = None
        if isinstance(layer, nn.Conv2d):
            self.geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
        self.w_bits = w_bits
        channels = (len(weight), *[1] * (weight.dim() - 1)) if granularity == "channel" else ()
        self.register_buffer("weight", torch.zeros_like(weight, dtype=torch.int8, requires_grad=False))
        self.register_buffer("scale", weight.new_ones(channels))
        self.register_buffer("zero", weight.new_zeros(channels, dtype=torch.int16) if scheme == "affine" else None)
        self.register_buffer("bias", weight.new_zeros(len(weight)))
        self.inputs = q.Quantiser(a_bits, weight.dtype, weight.device) if a_bits else None

    def forward(self, x: Tensor) -> Tensor:
        codes = self.weight.to(x.dtype)
        if self.zero is not None:
            codes = codes - self.zero
        scale = self.scale.flatten().expand(len(self.bias))
        if self.inputs is not None:
            x, scale = self.inputs.codes(x), scale * self.inputs.scale
        if self.geometry is None:
            return F.linear(x, codes) * scale + self.bias
        y = F.conv2d(x, codes, None, **self.geometry)
        return F.batch_norm(y, torch.zeros_like(scale), torch.ones_like(scale), scale, self.bias, eps=1e-30)  # y * scale + bias in one pass; 1 + 1e-30 is 1

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, w_bits={self.w_bits}, {'linear' if self.geometry is None else self.geometry}"


@final
@dataclass
class Int8(Compressor):
    """Fold batch normalisation into convolutions and store weights as int8; activations are quantised to ranges seen on ``x``.

    ``w_bits``, ``a_bits``: 2 to 8; ``a_bits`` 0 or None quantises weights only. ``granularity``: one weight
    scale a "channel" (output channel) or a "tensor". ``scheme`` of the weights: "symmetric" or "affine".
    ``layers``: other weight bits for layers by name, 0 leaves one in floating point. ``decay`` of the moving
    average of activation ranges over batches of ``batch`` images.
    """

    w_bits: int = 8
    a_bits: int | None = 8
    granularity: str = "channel"
    scheme: str = "symmetric"
    layers: dict[str, int] = field(default_factory=dict)
    decay: float = 0.99
    batch: int = 32

    def __post_init__(self) -> None:
        q.check_bits("w_bits", self.w_bits)
        q.check_bits("a_bits", self.a_bits, none=True)
        q.check_word("granularity", self.granularity, ("channel", "tensor"))
        q.check_word("scheme", self.scheme, ("symmetric", "affine"))
        if not isinstance(self.layers, dict):
            raise Mistake(f"layers={self.layers!r}: must name bits by layer, written layers={{'conv1':4,'fc':0}}")
        for name, bits in self.layers.items():
            q.check_bits(f"layers[{name!r}]", bits, none=True)
        if not 0 <= self.decay < 1:
            raise Mistake(f"decay={self.decay}: must be at least 0 and below 1; 0.99 averages about 100 batches")
        if self.batch < 1:
            raise Mistake(f"batch={self.batch}: must be at least 1 image")

    def plan(self, answer: nn.Module, x: Tensor, budget: Budget | None = None) -> Cut:
        """Ranges from the pixels ``x`` in order, codes from the weights. ``budget`` in bytes (a share where at most 1) is checked.

        Raises Mistake for a network without convolutions, one that is int8 already, an unknown layer name, no pixels.
        """
        with as_found(answer), torch.no_grad():
            model = network(answer)
            found = self._layout(answer, model, x)
            ranges = self._ranges(answer, model, found, x) if self.a_bits else {}
            spec: dict[str, Any] = {
                "layers": [[name, bn, self.layers.get(name, self.w_bits)] for name, bn in found.layers],
                "outputs": found.outputs if self.a_bits else [],
                "a_bits": self.a_bits or 0,
                "granularity": self.granularity,
                "scheme": self.scheme,
            }
            small = copy.deepcopy(model)
            self.rebuild(small, **spec)
            for name, bn, bits in spec["layers"]:
                layer = cast(nn.Linear, model.get_submodule(name))  # or a convolution
                weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
                if bn is not None:
                    weight, bias = q.fold_bn(weight, bias, model.get_submodule(bn))
                self._store(cast(Int8Layer, small.get_submodule(name)), weight, bias, bits)
            for where, (low, high) in ranges.items():
                quantiser = small.get_submodule(where)
                assert isinstance(quantiser, q.Quantiser)
                scale, zero = q.quant_params(low, high, quantiser.bits)
                quantiser.scale.copy_(scale)
                quantiser.zero.copy_(zero)
            self._afford(model, small, budget)
            return Cut(spec, {name: tensor.clone() for name, tensor in small.state_dict().items()})

    def apply(self, model: nn.Module, cut: Cut) -> None:
        """Change the network in place."""
        self.rebuild(model, **cut.spec)
        model.load_state_dict(cut.tensors)

    @staticmethod
    def rebuild(  # type: ignore[override]
        model: nn.Module, layers: list[list], outputs: list[str], a_bits: int, granularity: str, scheme: str
    ) -> None:
        """Put int8 layers, with codes of zero, in place of ``layers`` [name, batch norm or None, bits], and quantisers on ``outputs``."""
        weight = next(t for t in model.state_dict().values() if t.is_floating_point())
        for name, bn, bits in layers:
            q.replace(model, name, Int8Layer(model.get_submodule(name), bits, a_bits, granularity, scheme))
            if bn is not None:
                norm = model.get_submodule(bn)
                rest = OrderedDict((part, child) for part, child in norm.named_children() if part in ("drop", "act"))  # as in timm's BatchNormAct2d
                q.replace(model, bn, nn.Sequential(rest) if rest else nn.Identity())
        for name in outputs:
            q.add_output(model, name, q.Quantiser(a_bits, weight.dtype, weight.device))

    def _layout(self, answer: nn.Module, model: nn.Module, x: Tensor) -> q.Layout:
        """What to quantise, or a refusal in words."""
        if any(isinstance(m, Int8Layer) for m in model.modules()):
            raise Mistake("int8: this network is int8 already; compress the run that it was made from")
        if not any(isinstance(m, nn.Conv2d) for m in model.modules()):
            raise Mistake(f"int8: the network {type(model).__name__} has no convolution; choose a run of a convolutional --model such as resnet20")
        if not len(x):
            raise Mistake("int8: needs pixels to measure the ranges of activations on, and got none; name data with a training part")
        seen: list[Tensor] = []
        hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        answer(x[:2])
        hook.remove()
        found = q.layout(model, seen[0])
        names = [name for name, _ in found.layers]
        for name in self.layers:
            if name not in names:
                raise Mistake(f"int8: layers names {name!r}, which is no layer to quantise; there are {', '.join(names)}")
        chosen = [(name, bn) for name, bn in found.layers if self.layers.get(name, self.w_bits)]
        if not chosen:
            raise Mistake(f"int8: the network {type(model).__name__} has no plain convolution or linear layer that runs once a pass; nothing to quantise")
        for name, _ in chosen:
            trained = getattr(model.get_submodule(name), "settings", None)
            mine = {"w_bits": self.layers.get(name, self.w_bits), "a_bits": self.a_bits or 0, "granularity": self.granularity, "scheme": self.scheme}
            if trained is not None and trained != mine:
                options = ",".join(f"{key}={value}" for key, value in trained.items())
                raise Mistake(f"int8: {name!r} was trained by qat for other codes than asked for; use int8:{options}")
        return q.Layout(chosen, found.outputs, found.bare)

    def _ranges(self, answer: nn.Module, model: nn.Module, found: q.Layout, x: Tensor) -> dict[str, q.Range]:
        """Moving averages of what each layer reads and each output returns; those that qat learnt are kept."""
        ranges: dict[str, q.Range] = {}

        def see(where: str, value: Tensor) -> None:
            ranges[where] = q.moving_average(ranges.get(where), q.minmax(value), self.decay)

        inputs = [name for name, _ in found.layers]
        with q.watching(model, inputs, found.outputs, see):
            for pixels in x.split(self.batch):
                answer(pixels)
        for where in ranges:
            learnt = next((m for n, m in model.named_modules() if n == where), None)
            if learnt is not None and bool(getattr(learnt, "seen", False)):
                ranges[where] = cast(q.Range, (learnt.low, learnt.high))
        return ranges

    def _store(self, layer: Int8Layer, weight: Tensor, bias: Tensor | None, bits: int) -> None:
        codes, scale, zero = q.quantise_weight(weight, bits, self.granularity, self.scheme)
        layer.weight.copy_(codes)
        layer.scale.copy_(scale)
        if layer.zero is not None:
            layer.zero.copy_(zero)
        if bias is not None:
            layer.bias.copy_(bias)

    def _afford(self, model: nn.Module, small: nn.Module, budget: Budget | None) -> None:
        if budget is None:
            return
        if budget.unit != "bytes":
            raise Mistake(f"int8: a budget in {budget.unit} cannot be met by shorter numbers; give one in bytes, or choose a compressor that prunes")
        before, after = q.bytes_of(model), q.bytes_of(small)
        allowed = budget.value * before if budget.value <= 1 else budget.value
        if after > allowed:
            raise Mistake(f"int8: reaches {after} of {before} bytes ({after / before:.2f}), more than the budget of {allowed:.0f}; allow more, or prune")


def network(answer: nn.Module) -> nn.Module:
    """The network inside an answer; an answer without normalisation is one itself."""
    inside = [m for m in answer.modules() if isinstance(m, Answer)]
    if len(inside) > 1:
        raise Mistake(f"int8: the answer {type(answer).__name__} holds {len(inside)} networks; compress the runs of its members")
    return inside[0].model if inside else answer


def quantise(answer: nn.Module, x: Tensor, **options: Any) -> nn.Module:
    """A quantised copy of an answer (post_training_quantize): ``quantise(answer, x, w_bits=4)``."""
    made, small = Int8(**options), copy.deepcopy(answer)
    made.apply(network(small), made.plan(answer, x))
    return small


def size_report(model: nn.Module) -> list[dict[str, Any]]:
    """A row for each module with weights or buffers of its own: its name, type, numbers stored, and bytes."""
    rows = []
    for name, module in model.named_modules():
        tensors = [t for t in [*module._parameters.values(), *module._buffers.values()] if t is not None]
        if tensors:
            count, size = sum(t.numel() for t in tensors), sum(t.numel() * t.element_size() for t in tensors)
            rows.append({"module": name, "type": type(module).__name__, "numbers": count, "bytes": size})
    return rows


def sensitivity_scan(answer: nn.Module, x: Tensor, judge: Any, **options: Any) -> Iterator[tuple[str, float]]:
    """``judge(answer)`` with one layer quantised at a time: yields (layer, judgement), in the order of the network."""
    full = Int8(**options).plan(answer, x)
    names = [name for name, _, _ in full.spec["layers"]]
    for name in names:
        others = dict.fromkeys((n for n in names if n != name), 0)
        yield name, float(judge(quantise(answer, x, **{**options, "layers": others})))
