"""Parameters and multiply-adds of a network, counted on the meta device, so that the largest costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from convince import backbones


@dataclass(frozen=True)
class Counts:
    """``parameters`` without buffers; ``macs``: multiply-adds of convolutions and matrix products (attention's too) for one image."""

    parameters: int
    macs: int


def count(model: nn.Module, size: Sequence[int], in_chans: int = 3) -> Counts:
    """Count a network for one input of ``size`` (rows and columns in pixels; empty for a table), in eval mode; its mode is put back.

    The input is made where the network lives: on the meta device nothing is computed. Additions, activations, poolings
    and normalisations are not counted, as in most papers.
    """
    from torch.utils.flop_counter import FlopCounterMode

    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    modes = [(m, m.training) for m in model.modules()]
    recurrent = [m for m in model.modules() if isinstance(m, nn.LSTM)]
    inside: list[int] = []
    try:
        model.eval()
        for lstm in recurrent:
            lstm.forward = partial(_without_steps, lstm, inside)  # type: ignore[assignment, method-assign]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, in_chans, *size, device=device))
    finally:
        for lstm in recurrent:
            del lstm.forward
        for module, training in modes:
            module.training = training
    return Counts(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2 + sum(inside))


def _without_steps(lstm: nn.LSTM, inside: list[int], x: Tensor, state: Any = None) -> tuple[Tensor, None]:
    """What an LSTM multiplies, in closed form: a step of every sequence is one product with each of its matrices. Unrolled on meta it takes half a minute."""
    steps = x.numel() // x.shape[-1]
    inside.append(steps * sum(p.numel() for name, p in lstm.named_parameters() if name.startswith("weight")))
    return x.new_empty(*x.shape[:-1], lstm.hidden_size * (2 if lstm.bidirectional else 1)), None


def count_named(spec: str, *, num_classes: int, size: Sequence[int], in_chans: int = 3) -> Counts:
    """Count a network by name without holding its weights."""
    with torch.device("meta"):
        model = backbones.builder(spec, num_classes=num_classes, in_chans=in_chans, size=tuple(size))()
    return count(model, size, in_chans)
