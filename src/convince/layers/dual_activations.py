"""Dual activations: what a layer of infinite width does to the cosine of two inputs, in closed form or from Hermite coefficients."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from convince.errors import Mistake, nearest
from convince.layers.hermite_activation import hermite, optimal_activation


@dataclass(frozen=True)
class Dual:
    """A dual activation ``chk``, a power series with no negative coefficient and ``chk(1) = 1``: functions of float64 tensors from -1 to 1.

    ``rest`` and ``power`` are for 0 to 1, where they stay exact however small the argument.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]
    order: int  # of its lowest power: chk(xi) is about a xi^order near 0
    rest: Callable[[Tensor], Tensor]  # chk(xi) / xi^order, also at 0
    power: Callable[[Tensor], Tensor]  # xi chk'(xi) / chk(xi), between the lowest and the highest power; the order at 0

    def at(self, xi: float) -> tuple[float, float]:
        """Value and slope at one number."""
        x = torch.tensor(xi, dtype=torch.float64)
        return float(self.value(x)), float(self.slope(x))


def dual_activation(coefficients: Sequence[float], name: str = "polynomial") -> Dual:
    """``chk(xi) = sum_i c_i^2 xi^i`` of ``phi = sum_i c_i h_i``, normalised so that ``chk(1) = 1``; :func:`hermite_coeffs` gives an activation's."""
    squares = [c * c for c in coefficients]
    total = math.fsum(squares)
    if not total > 0 or not math.isfinite(total):
        raise Mistake(f"infinite-depth-ntk: coefficients={tuple(coefficients)} must be finite and not all 0")
    squares = [s / total for s in squares]
    order = next(i for i, s in enumerate(squares) if s > 0)
    grown = [i * s for i, s in enumerate(squares)]

    def rest(x: Tensor) -> Tensor:
        return horner(squares[order:], x)

    return Dual(name, lambda x: horner(squares, x), lambda x: horner(grown[1:] or [0.0], x), order, rest, lambda x: horner(grown[order:], x) / rest(x))


def horner(coefficients: Sequence[float], x: Float[Tensor, "*s"]) -> Float[Tensor, "*s"]:
    """``sum_i a_i x^i``."""
    total = torch.full_like(x, coefficients[-1])
    for a in reversed(coefficients[:-1]):
        total = total * x + a
    return total


def closed(name: str, value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], order: int) -> Dual:
    """A dual in closed form, of order 0 or 1; near 0 the quotient by ``xi`` is the slope there."""
    at_0 = slope(torch.zeros((), dtype=torch.float64))

    def rest(x: Tensor) -> Tensor:
        return value(x) if order == 0 else torch.where(x > 1e-9, value(x) / x.clamp_min(1e-9), at_0)

    return Dual(name, value, slope, order, rest, lambda x: (x if order == 0 else 1) * slope(x) / rest(x))


def relu() -> Dual:
    """ReLU, scaled by sqrt 2: ``(xi (pi - arccos xi) + sqrt(1 - xi^2)) / pi``. A majority vote, reached very slowly: its slope at 1 is 1."""
    return closed(
        "relu",
        lambda x: (x * (math.pi - x.clamp(-1, 1).arccos()) + (1 - x * x).clamp_min(0).sqrt()) / math.pi,
        lambda x: 1 - x.clamp(-1, 1).arccos() / math.pi,
        0,
    )


def erf() -> Dual:
    """The error function: ``arcsin(2 xi / 3) / arcsin(2 / 3)``."""
    scale = 1 / math.asin(2 / 3)
    return closed("erf", lambda x: scale * (2 * x / 3).arcsin(), lambda x: scale * 2 / 3 * (1 - 4 * x * x / 9).rsqrt(), 1)


def sine(a: float = 1.0) -> Dual:
    """``sinh(a xi) / sinh a``, of a sine; consistent at a = 2.676 (2 dimensions), 6.13539 (4), 13.8258 (8)."""
    if not 0 < a < 700:
        raise Mistake(f"infinite-depth-ntk: sine of a={a}: must be above 0 and below 700")
    scale = 1 / math.sinh(a)
    return closed(f"sine {a:g}", lambda x: scale * (a * x).sinh(), lambda x: scale * a * (a * x).cosh(), 1)


def named(phi: str | Sequence[float] | Dual) -> Dual:
    """A dual by words: "relu", "erf", "sine:2.676", "optimal:2" (dimension), "hermite:2" (h_2), or Hermite coefficients c_0, c_1 ..., or a dual itself."""
    if isinstance(phi, Dual):
        return phi
    if not isinstance(phi, str):
        return dual_activation(phi)
    word, _, number = phi.partition(":")
    if word == "hermite" and number and not number.isdecimal():
        raise Mistake(f"infinite-depth-ntk: phi={phi!r}: hermite:I needs a polynomial's degree, 1, 2 ...")
    makers: dict[str, Callable[[], Dual]] = {
        "relu": relu,
        "erf": erf,
        "sine": lambda: sine(float(number or 1)),
        "optimal": lambda: dual_activation(optimal_activation(int(number or 2)), phi),
        "hermite": lambda: dual_activation([*[0.0] * int(number or 2), 1.0], phi),
    }
    if word not in makers:
        raise Mistake(f"infinite-depth-ntk: phi={phi!r} is no activation{nearest(word, list(makers))} Known: relu, erf, sine:A, optimal:DIMENSION, hermite:I")
    try:
        return makers[word]()
    except ValueError as error:
        raise Mistake(f"infinite-depth-ntk: phi={phi!r}: {error}") from error


def hermite_coeffs(phi: Callable[[Tensor], Tensor], n: int = 20) -> list[float]:
    """``c_i = E phi(Z) h_i(Z)``, i = 0 to ``n``, over ``sqrt(E phi(Z)^2)``, Z of N(0, 1): an activation of one's own, normalised.

    By Gauss-Legendre quadrature on the unit intervals from -12 to 12, which is exact to about 1e-12 also where an activation has a kink at 0,
    as rectifiers have; coefficients below that are returned as 0, since the lowest one that is not 0 decides what a network becomes.
    """
    node, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(40))
    z = (torch.arange(-12, 12, dtype=torch.float64)[:, None] + (node + 1) / 2).flatten()
    weight = weight.repeat(24) / 2 * (-z * z / 2).exp() / math.sqrt(2 * math.pi)
    y = phi(z)
    size = float((weight * y * y).sum())
    if not size > 0 or not math.isfinite(size):
        raise Mistake(f"infinite-depth-ntk: the activation's mean square under N(0, 1) is {size:g}; it must be finite and above 0")
    found = [float((weight * y * hermite(z, [*[0.0] * i, 1.0])).sum()) / math.sqrt(size) for i in range(n + 1)]
    return [c if abs(c) > 1e-12 else 0.0 for c in found]
