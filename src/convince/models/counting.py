"""Parameters and multiply-adds of a network, counted on the meta device, so that the largest costs nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

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
    try:
        model.eval()
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(torch.empty(1, in_chans, *size, device=device))
    finally:
        for module, training in modes:
            module.training = training
    return Counts(sum(p.numel() for p in model.parameters()), counter.get_total_flops() // 2)


def count_named(spec: str, *, num_classes: int, size: Sequence[int], in_chans: int = 3) -> Counts:
    """Count a network by name without holding its weights."""
    with torch.device("meta"):
        model = backbones.builder(spec, num_classes=num_classes, in_chans=in_chans, size=tuple(size))()
    return count(model, size, in_chans)
