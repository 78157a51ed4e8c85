"""Before and after: what a compressed answer costs and how well it answers, beside the original."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from convince.compress.quantisers import bytes_of
from convince.data import Data
from convince.fit.answer import score
from convince.fit.precision import Plan


@torch.no_grad()
def macs(answer: nn.Module, x: Tensor) -> int:
    """Multiplications of convolutions and linear layers for one image, also where their weights are int8 codes.

    Every module with a ``weight`` of two or more axes counts: its output's numbers times the weights behind each.
    """
    total = 0

    def count(module: nn.Module, inputs: Any, output: Any) -> None:
        nonlocal total
        total += output[0].numel() * module.weight[0].numel()  # type: ignore[index]

    layers = [m for m in answer.modules() if isinstance(getattr(m, "weight", None), Tensor) and m.weight.dim() >= 2 and not isinstance(m, nn.Embedding)]  # type: ignore[operator]
    hooks = [m.register_forward_hook(count) for m in layers]
    try:
        answer(x[:1])
    finally:
        for hook in hooks:
            hook.remove()
    return total


@torch.no_grad()
def seconds(answers: list[nn.Module], x: Tensor, plan: Plan, repeats: int = 5) -> list[float]:
    """Seconds per image of each answer on the batch ``x``: the best of ``repeats`` passes, taken in turn."""
    best = [float("inf")] * len(answers)
    for repeat in range(repeats + 1):  # the first pass warms up
        for i, answer in enumerate(answers):
            start = time.perf_counter()
            with plan.autocast():
                answer(x)
            if x.is_cuda:
                torch.cuda.synchronize()
            if repeat:
                best[i] = min(best[i], time.perf_counter() - start)
    return [b / len(x) for b in best]


def measure(before: nn.Module, after: nn.Module, data: Data, rows: Tensor, plan: Plan) -> dict[str, dict[str, Any]]:
    """``{"before": {...}, "after": {...}}``: accuracy with its interval on ``rows`` of the pool, bytes, macs, seconds an image.

    Bytes are those of all weights and buffers; macs and seconds are for one image, seconds in batches of up to 256.
    """
    answers = [before.eval(), after.eval()]
    x = plan.pixels(data.x.take(rows[:256]))
    spent = seconds(answers, x, plan)
    result = {}
    for name, answer, each in zip(("before", "after"), answers, spent, strict=True):
        scores = score(answer, data, rows, plan)
        result[name] = {
            "accuracy": scores.accuracy,
            "accuracy_interval": list(scores.accuracy_interval),
            "bytes": bytes_of(answer),
            "macs": macs(answer, x),
            "seconds": each,
        }
    return result
