"""Initial weights by parameter name: two models that share a name and a shape share its weights.

A network is built twice under a function mode. The first pass learns which parameter receives
the i-th random draw; the second seeds that draw by (seed, parameter name, how many draws this
parameter has had). The network's own initialisation law stays untouched.
"""

from __future__ import annotations

import collections
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from convince.fit.randomness import key, preserved

# kaiming_* and friends hand themselves to a function mode whole, hiding the draw inside them
_IN_PLACE = {getattr(Tensor, name) for name in ("uniform_", "normal_", "random_", "bernoulli_", "exponential_", "log_normal_", "cauchy_", "geometric_")} | {
    getattr(nn.init, name)
    for name in ("uniform_", "normal_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_", "xavier_normal_", "orthogonal_", "sparse_")
}
_FRESH = {torch.rand, torch.randn, torch.randint, torch.randperm, torch.normal, torch.bernoulli, torch.multinomial}


class _Draws(TorchFunctionMode):
    """Records the tensor of every random draw; with ``names`` seeds each draw by its tensor's name."""

    def __init__(self, seed: int, names: list[str] | None = None) -> None:
        super().__init__()
        self.seed, self.names = seed, names
        self.tensors: list[Tensor] = []
        self.count: collections.Counter[str] = collections.Counter()

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func not in _IN_PLACE and func not in _FRESH:
            return func(*args, **kwargs)
        if self.names is not None:
            at = len(self.tensors)
            name = self.names[at] if at < len(self.names) else f"draw {at}"
            torch.manual_seed(key(self.seed, "weights", name, self.count[name]))
            self.count[name] += 1
        result = func(*args, **kwargs)
        target = args[0] if func in _IN_PLACE and args else kwargs.get("tensor", result)
        self.tensors.append(target if isinstance(target, Tensor) else result)
        return result


def _owners(draws: list[Tensor], model: nn.Module) -> list[str]:
    """The parameter or buffer in whose memory each draw landed; unnamed draws are numbered."""
    homes = {t.untyped_storage().data_ptr(): name for name, t in [*model.named_buffers(), *model.named_parameters()]}
    unnamed = iter(range(len(draws)))
    return [homes.get(t.untyped_storage().data_ptr()) or f"unnamed {next(unnamed)}" for t in draws]


def build_by_name(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """``build()`` with every initial weight seeded by (seed, its parameter's name).

    Global random state is left as found. Draws that land in no parameter are seeded by their order.
    """
    with preserved():
        torch.manual_seed(key(seed, "weights"))
        first = _Draws(seed)
        with first:
            model = build()
        second = _Draws(seed, _owners(first.tensors, model))
        torch.manual_seed(key(seed, "weights"))
        with second:
            return build()


def edit_by_name(model: nn.Module, rebuild: Callable[[nn.Module], object], seed: int) -> None:
    """Run ``rebuild(model)`` in place, its new weights seeded by (seed, name) as in :func:`build_by_name`."""
    with preserved():
        rehearsal = copy.deepcopy(model)
        first = _Draws(seed)
        with first:
            rebuild(rehearsal)
        second = _Draws(seed, _owners(first.tensors, rehearsal))
        with second:
            rebuild(model)


def shared(a: nn.Module, b: nn.Module) -> float:
    """The share of ``b``'s parameters that stand in ``a`` under the same name with equal bits, 0 to 1."""
    mine = dict(a.named_parameters())
    total = sum(p.numel() for p in b.parameters())
    same = sum(p.numel() for n, p in b.named_parameters() if n in mine and torch.equal(mine[n], p))
    return same / total if total else 1.0
