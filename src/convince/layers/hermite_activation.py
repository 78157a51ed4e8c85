"""Hermite activation: the polynomial activations under which infinitely wide and deep networks classify optimally, for networks of finite size."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.surgery import Surgery, find, refuse_nothing, swap
from convince.parts import Card

CARD = Card(
    part="hermite-activation",
    kind="layer",
    paper="infinite-depth-ntk",
    title="Wide and Deep Neural Networks Achieve Optimality for Classification",
    year=2023,
    url="https://arxiv.org/abs/2204.14126",
    departs=(
        "each input is first divided by its root mean square, which is 1 by itself in the paper's infinitely wide networks",
        "inputs beyond 3 count as 3, so that the tails of a cube do not blow up a finite network; limit=inf takes them as they are",
        "dim is 2 unless chosen; the paper chooses the activation by the dimension of the data, which is not known for images",
        "only rectifiers that are modules are replaced; those inside a network's own forward are not seen",
    ),
    tiny={},
)


def hermite(x: Float[Tensor, "*s"], coefficients: Sequence[float]) -> Float[Tensor, "*s"]:
    """``sum_i c_i h_i(x)``, h the normalised probabilists' polynomials: 1, x, (x^2 - 1)/sqrt 2, (x^3 - 3x)/sqrt 6 ..."""
    before, now = torch.zeros_like(x), torch.ones_like(x)
    total = coefficients[0] * now
    for i, c in enumerate(coefficients[1:]):
        before, now = now, (x * now - math.sqrt(i) * before) / math.sqrt(i + 1)
        if c:
            total = total + c * now
    return total


def optimal_activation(d: int) -> tuple[float, ...]:
    """Coefficients c_0, c_1 ... of the activation that is Bayes-consistent for data on the sphere of dimension ``d``, with d + 1 coordinates.

    ``2^(-d/4) (h_1 + h_3) + sqrt(1 - 2^(1 - d/2)) h_2`` from 2 dimensions, ``(h_1 + h_7)/sqrt 2`` for 1. The slopes of its dual at 0 and 1 are
    then A' = 2^(-d/2) and B' = 2 (1/2 and 4), so that ``-log A' / log B' = d/2``.
    """
    if d < 1:
        raise Mistake(f"optimal_activation: d={d}: the sphere's dimension is at least 1")
    if d == 1:
        return (0.0, math.sqrt(0.5), 0.0, 0.0, 0.0, 0.0, 0.0, math.sqrt(0.5))
    edge = 2 ** (-d / 4)
    return (0.0, edge, math.sqrt(1 - 2 ** (1 - d / 2)), edge)


@final
class HermiteActivation(nn.Module):
    """:func:`hermite` of its input [n ...], with each row's root mean square brought to 1 (``normalise``), cut to ``limit`` on both sides."""

    def __init__(self, coefficients: Sequence[float], normalise: bool = True, limit: float = 3.0) -> None:
        super().__init__()
        if not limit > 0:
            raise Mistake(f"hermite-activation: limit={limit}: must be above 0, in root mean squares of the input; inf cuts nothing")
        if not coefficients or not all(math.isfinite(c) for c in coefficients) or not any(coefficients[1:]):
            raise Mistake(f"hermite-activation: coefficients={tuple(coefficients)}: finite numbers c_0, c_1 ..., one of c_1, c_2 ... not 0")
        self.coefficients, self.normalise, self.limit = tuple(float(c) for c in coefficients), normalise, limit

    def extra_repr(self) -> str:
        return f"coefficients=({', '.join(f'{c:.4g}' for c in self.coefficients)}), normalise={self.normalise}, limit={self.limit:g}"

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n ..."]:
        if self.normalise:
            x = x * (x.square().mean(tuple(range(1, x.dim())), keepdim=True) + 1e-6).rsqrt()
        return hermite(x.clamp(-self.limit, self.limit), self.coefficients)


def install(
    model: nn.Module, dim: int = 2, coefficients: Sequence[float] | None = None, normalise: bool = True, limit: float = 3.0, skip: Sequence[str] = ()
) -> Surgery:
    """Put a :class:`HermiteActivation` in the place of each ``nn.ReLU`` module.

    ``dim``: the activation is :func:`optimal_activation` of it, unless ``coefficients`` are given; ``skip`` names rectifiers (or patterns) that
    stay. Raises Mistake where there is no such module.
    """
    places = [(name, m) for name, m in find(model, types=(nn.ReLU,), skip=skip) if type(m) is nn.ReLU]
    refuse_nothing(places, model, "hermite-activation", "nn.ReLU module", "choose a network such as resnet20")
    chosen = optimal_activation(dim) if coefficients is None else tuple(coefficients)
    return swap(model, places, lambda name, act: HermiteActivation(chosen, normalise, limit))
