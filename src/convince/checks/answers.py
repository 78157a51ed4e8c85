"""What checks of post-hoc kinds share: is the answer left as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from convince.checks.subject import Subject, bits, equal

Use = Callable[[nn.Module, Tensor, Tensor], Any]


def _snapshot(answer: nn.Module) -> list[Any]:
    """Everything a part might leave behind on an answer."""
    return [
        (name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks), type(m).__name__)
        for name, m in answer.named_modules()
    ] + [(name, p.requires_grad, None if p.grad is None else p.grad.clone().tolist()) for name, p in answer.named_parameters()]


def must_leave_as_found(s: Subject, use: Use) -> None:
    """Use the part on a trained answer, frozen and in training mode, and compare everything."""
    answer = s.answer()
    x, y = s.pixels()
    answer.train()
    next(answer.children()).eval()  # modes differ inside, so that putting one mode back is not enough
    for p in answer.parameters():
        p.requires_grad_(False)
    before, weights, pixels = _snapshot(answer), bits(answer), x.clone()
    try:
        use(answer, x, y)
        after = _snapshot(answer)
        assert before == after, f"the answer was left changed: {next(b for a, b in zip(before, after, strict=True) if a != b)}"
        differs = equal(weights, bits(answer))
        assert not differs, f"the weights or buffers were changed: {differs}"
        assert torch.equal(pixels, x), "the images were changed"
    finally:
        answer.eval()
        for p in answer.parameters():
            p.requires_grad_(True)


class _Broken(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = inner, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            raise RuntimeError("this answer fails on purpose")
        return self.inner(x)


def must_survive_exception(s: Subject, use: Use) -> None:
    """Let the answer fail in its second pass: the error arrives, and nothing stays behind."""
    answer = _Broken(s.answer())
    x, y = s.pixels()
    before = _snapshot(answer)
    with contextlib.suppress(RuntimeError):
        use(answer, x, y)
    assert before == _snapshot(answer), "after an exception the answer was left changed"
