"""QAT: train with simulated quantisation, so that the weights learn to live with few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from convince.compress import quantisers as q
from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="qat",
    kind="technique",
    paper="quantization-whitepaper",
    title="Quantizing deep convolutional networks for efficient inference: A whitepaper",
    year=2018,
    url="https://arxiv.org/abs/1806.08342",
    departs=(
        "the paper starts from a finished float checkpoint; here the first half of the run (start_after) is that float training",
        "the paper gives steps, not shares, for freezing; the shares 0.75 and 0.9 of the run are ours",
        "batch statistics are taken after the convolution with quantised weights, one convolution in place of two;"
        " batch normalisation then undoes gamma / sigma of the folded weights, which is the paper's correction sigma_long / sigma_batch",
        "no moving average of weights, no stochastic rounding, as the paper advises",
        "the run keeps its float weights; 'convince compress RUN --with int8' stores the codes, with the ranges learnt here",
    ),
    when="during",
    gradient="surrogate",
    expects=("images", "network"),
    tiny={"w_bits": 4, "start_after": 0.25},
)


@final
class Watcher(nn.Module):
    """Simulated quantisation of an activation to the range it has had: moving averages of its ends in training."""

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, bits: int, decay: float, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.bits, self.decay = bits, decay
        self.on, self.watching = True, True
        for name in ("low", "high", "seen"):
            self.register_buffer(name, torch.zeros((), dtype=dtype, device=device))

    @torch.no_grad()
    def watch(self, x: Tensor) -> None:
        """Move the range towards this batch's; the first one is taken as it is."""
        decay = torch.where(self.seen > 0, self.decay, 0.0)
        low, high = q.minmax(x.detach().to(self.low.dtype))
        self.low.copy_(decay * self.low + (1 - decay) * low)
        self.high.copy_(decay * self.high + (1 - decay) * high)
        self.seen.fill_(1)

    def codes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Centred codes and their scale."""
        scale, zero = q.quant_params(self.low, self.high, self.bits)
        return q.centred_codes(x.to(scale.dtype), scale, zero, self.bits), scale

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.watching:
            self.watch(x)
        if not self.on:
            return x
        codes, scale = self.codes(x)
        return (codes * scale).to(x.dtype)

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def folded_codes(weight: Tensor, norm: nn.Module | None, settings: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Centred codes of ``w * gamma / sigma_long``, and the factor [c] that takes a convolution with them back to that with ``w``."""
    factor = weight.new_ones(len(weight)) if norm is None else q.bn_factor(norm)
    factor = torch.where(factor.abs() > 1e-6, factor, torch.ones_like(factor)).detach()  # a channel with gamma 0 has no grid of its own
    folded = weight * factor.view(-1, *[1] * (weight.dim() - 1))
    scale, zero = q.quant_params(*q.minmax(folded.detach(), settings["granularity"]), settings["w_bits"], settings["scheme"])
    return q.centred_codes(folded, scale, zero, settings["w_bits"], settings["scheme"]), scale.flatten() / factor


@final
class QatConv2d(nn.Conv2d):
    """A convolution whose weights and input are quantised and taken back; its parameters keep their names."""

    simulates_int8 = True
    settings: dict[str, Any]
    norm: tuple[nn.Module, ...]  # in a tuple, so that it is not a child: its names stay where they are
    inputs: Watcher | None
    on: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None and self.training and self.inputs.watching:
            self.inputs.watch(x)
        if not self.on:
            return super().forward(x)
        codes, scale = folded_codes(self.weight, self.norm[0] if self.norm else None, self.settings)
        if self.inputs is not None:
            x, step = self.inputs.codes(x)
            scale = scale * step
        y = self._conv_forward(x, codes, None) * scale.view(-1, 1, 1)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


@final
class QatLinear(nn.Linear):
    """A linear layer whose weights and input are quantised and taken back; its parameters keep their names."""

    simulates_int8 = True
    settings: dict[str, Any]
    norm: tuple[nn.Module, ...]
    inputs: Watcher | None
    on: bool

    def forward(self, x: Tensor) -> Tensor:
        if self.inputs is not None and self.training and self.inputs.watching:
            self.inputs.watch(x)
        if not self.on:
            return super().forward(x)
        codes, scale = folded_codes(self.weight, None, self.settings)
        if self.inputs is not None:
            x, step = self.inputs.codes(x)
            scale = scale * step
        y = nn.functional.linear(x, codes) * scale
        return y if self.bias is None else y + self.bias


@final
@dataclass
class QAT(Technique):
    """Float until ``start_after``, then quantised; ranges rest from ``freeze_ranges_after``, batch norm from ``freeze_bn_after``.

    The three are shares of the run, 0 to 1. ``w_bits``, ``a_bits`` (0: weights only), ``granularity``
    and ``scheme`` as in int8, which the run is then compressed with. ``decay`` of the ranges' moving average.
    """

    w_bits: int = 8
    a_bits: int = 8
    granularity: str = "channel"
    scheme: str = "symmetric"
    start_after: float = 0.5
    freeze_ranges_after: float = 0.75
    freeze_bn_after: float = 0.9
    decay: float = 0.99
    rank = 90  # after the edits of other parts

    def __post_init__(self) -> None:
        q.check_bits("w_bits", self.w_bits)
        q.check_bits("a_bits", self.a_bits, none=True)
        q.check_word("granularity", self.granularity, ("channel", "tensor"))
        q.check_word("scheme", self.scheme, ("symmetric", "affine"))
        for name in ("start_after", "freeze_ranges_after", "freeze_bn_after", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise Mistake(f"{name}={getattr(self, name)}: must be a share, 0 to 1")

    def on_start(self, run: Run) -> None:
        run.require("conv")
        p = run.data.preprocess
        with run.aside():
            found = q.layout(run.model, torch.zeros(2, p.channels, *p.size, dtype=run.plan.dtype, device=run.plan.device))
        run.edit(
            "qat", layers=[[name, bn] for name, bn in found.layers], outputs=found.outputs if self.a_bits else [], w_bits=self.w_bits, a_bits=self.a_bits,
            granularity=self.granularity, scheme=self.scheme, decay=self.decay,
        )  # fmt: skip

    @staticmethod
    def rebuild(  # type: ignore[override]
        model: nn.Module, layers: list[list], outputs: list[str], decay: float, **settings: Any
    ) -> None:
        """Put simulated layers in place of ``layers`` [name, batch norm or None], with their parameters, and watchers on ``outputs``."""
        for name, bn in layers:
            q.replace(model, name, simulated(model.get_submodule(name), None if bn is None else model.get_submodule(bn), decay, settings))
        weight = next(model.parameters())
        for name in outputs:
            q.add_output(model, name, Watcher(settings["a_bits"], decay, weight.dtype, weight.device))

    def on_batch(self, run: Run) -> None:
        """What is on at this place of the run; nothing is carried from step to step."""
        done = run.stage_steps / run.stage_length
        set_phase(run.model, on=done >= self.start_after, watching=done < self.freeze_ranges_after, norms=done < self.freeze_bn_after)

    def on_end(self, run: Run) -> None:
        set_phase(run.model, on=True, watching=True, norms=True)


def simulated(layer: nn.Module, norm: nn.Module | None, decay: float, settings: dict[str, Any]) -> nn.Module:
    """A layer that simulates int8, holding the parameters of ``layer``."""
    new: QatConv2d | QatLinear
    if isinstance(layer, nn.Conv2d):
        new = QatConv2d(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups,  # type: ignore[arg-type]
            bias=layer.bias is not None, device="meta",
        )  # fmt: skip
    else:
        assert isinstance(layer, nn.Linear)
        new = QatLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    new.weight, new.bias = layer.weight, layer.bias
    new.settings, new.norm, new.on = settings, () if norm is None else (norm,), True
    new.inputs = Watcher(settings["a_bits"], decay, layer.weight.dtype, layer.weight.device) if settings["a_bits"] else None
    new.train(layer.training)
    return new


def set_phase(model: nn.Module, *, on: bool, watching: bool, norms: bool) -> None:
    """Switch simulation, the watching of ranges, and the batch statistics of the norms beside simulated layers."""
    for module in model.modules():
        if isinstance(module, (QatConv2d, QatLinear, Watcher)):
            module.on = on
        if isinstance(module, Watcher):
            module.watching = watching
        if isinstance(module, QatConv2d):
            for norm in module.norm:
                norm.train(norms and module.training)
