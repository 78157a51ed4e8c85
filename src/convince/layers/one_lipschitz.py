"""1-Lipschitz layers: AOL and SLL, dense and convolutional, with MaxMin; how weights are drawn, and what share of a signal a fresh one passes on."""

from __future__ import annotations

import math
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from convince.errors import Mistake, nearest


def overlap(rows: Float[Tensor, "m ..."]) -> Float[Tensor, "m m"]:
    """``|<row i, row j>|`` of vectors [m c]; of kernels [m c a b] summed over all shifts of one against the other."""
    if rows.dim() == 2:
        return (rows @ rows.T).abs()
    return F.conv2d(rows, rows, padding=(rows.shape[2] - 1, rows.shape[3] - 1)).abs().sum((2, 3))


def aol_weight(weight: Float[Tensor, "m n *k"]) -> Float[Tensor, "m n *k"]:
    """``W D``, of spectral norm at most 1: ``d_i = (sum_j |W^T W|_ij)^(-1/2)``, for kernels summed over shifts too. A scale of ``W`` does not matter."""
    d = overlap(weight.transpose(0, 1)).sum(1).clamp_min(torch.finfo(weight.dtype).tiny).rsqrt()
    return weight * d.view(1, -1, *[1] * (weight.dim() - 2))


def sll_steps(weight: Float[Tensor, "h ..."], q: Float[Tensor, " h"]) -> Float[Tensor, " h"]:
    """``2 / T_i``, ``T_i = sum_j |W^T W|_ij q_j / q_i``, of the columns of ``W``, which are the rows of ``weight``."""
    return 2 * q / (overlap(weight) @ q).clamp_min(torch.finfo(weight.dtype).tiny)


@final
class AOLLinear(nn.Module):
    """``y = W D x + b`` (:func:`aol_weight`)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _normal(self.weight, self.bias)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n m"]:
        return F.linear(x, aol_weight(self.weight), self.bias)


@final
class AOLConv2d(nn.Module):
    """The same as a convolution, padded with zeros by ``kernel_size // 2``."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels))
        self.stride = stride
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _normal(self.weight, self.bias)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m i j"]:
        return F.conv2d(x, aol_weight(self.weight), self.bias, self.stride, self.weight.shape[-1] // 2)


@final
class SLLLinear(nn.Module):
    """``y = x - 2 W T^-1 relu(W^T x + b)``: a residual form, ``q = exp(log_q)`` learnt (:func:`sll_steps`). ``weight`` is ``W^T``."""

    def __init__(self, features: int, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden, features))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.log_q = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _normal(self.weight, self.bias, self.log_q)

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        return x - (F.linear(x, self.weight, self.bias).relu() * sll_steps(self.weight, self.log_q.exp())) @ self.weight


@final
class SLLConv2d(nn.Module):
    """The same with a convolution of odd size, padded with zeros, and its transpose."""

    def __init__(self, channels: int, hidden: int, kernel_size: int) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise Mistake(f"SLLConv2d: kernel_size={kernel_size} must be odd, so that the block keeps the sides of what it is added to")
        self.weight = nn.Parameter(torch.empty(hidden, channels, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(hidden))
        self.log_q = nn.Parameter(torch.empty(hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _normal(self.weight, self.bias, self.log_q)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        half = self.weight.shape[-1] // 2
        inner = F.conv2d(x, self.weight, self.bias, padding=half).relu() * sll_steps(self.weight, self.log_q.exp())[:, None, None]
        return x - F.conv_transpose2d(inner, self.weight, padding=half)


@final
class MaxMin(nn.Module):
    """The larger, then the smaller of each pair of neighbouring units of axis 1: it keeps the length of what it is given."""

    def forward(self, x: Float[Tensor, "n c *s"]) -> Float[Tensor, "n c *s"]:
        pairs = x.unflatten(1, (-1, 2))
        return torch.stack([pairs.amax(2), pairs.amin(2)], 2).flatten(1, 2)


def _normal(weight: Tensor, *rest: Tensor) -> None:
    nn.init.normal_(weight, std=weight[0].numel() ** -0.5)
    for vector in rest:
        nn.init.zeros_(vector)


LAWS = ("normal", "uniform", "laplace", "orthogonal")


@torch.no_grad()
def draw_(weight: Float[Tensor, "m ..."], law: str, gen: Generator, sigma: float = 1.0) -> None:
    """Fill a weight by a law of mean 0 and deviation ``sigma``; "orthogonal" has orthonormal rows or columns times ``sigma``, with which AOL is lossless."""
    if law not in LAWS:
        raise Mistake(f"draw_: law={law!r} is none of {', '.join(LAWS)}{nearest(law, LAWS)}")
    if law == "orthogonal":
        nn.init.orthogonal_(weight, sigma, generator=gen)
    elif law == "normal":
        weight.normal_(0, sigma, generator=gen)
    else:
        u = torch.rand(weight.shape, generator=gen, dtype=torch.float64) * 2 - 1
        unit = u * 3**0.5 if law == "uniform" else -u.sign() * torch.log1p(-u.abs()) / 2**0.5
        weight.copy_(sigma * unit)


# -- the share that is predicted ----------------------------------------------------------------------


def predicted_aol_variance(n_out: int, n_in: int, kernel: tuple[int, int] = (1, 1)) -> float:
    """Mean square of the entries of ``W D`` at a start with independent weights of mean 0, whatever their variance.

    ``1 / (n_out + (n_in - 1) sqrt(2 n_out / pi))`` for matrices: of ``n_in`` scalar products of columns one is a squared length, the others are
    nearly normal. Of kernels ``a`` x ``b`` two overlap in ``(a - |u|)(b - |v|)`` taps at the shift (u, v). For ``n_out a b`` of some tens or more.
    """
    taps, shifts = kernel[0] * kernel[1], math.prod(sum(math.sqrt(k - abs(u)) for u in range(1 - k, k)) for k in kernel)
    return 1 / (n_out * taps + math.sqrt(2 * n_out / math.pi) * (n_in * shifts - math.sqrt(taps)))


def predicted_sll_gain(features: int, hidden: int) -> float:
    """Mean square after over before a linear SLL block with normal weights, q = 1 and b = 0: ``1 - 2 h/t + h (2 d + h - 1)/t^2``.

    ``t = d + (h - 1) sqrt(2 d / pi)`` is the mean of ``T / sigma^2``; the second term is ``2 <x, W T^-1 relu(W^T x)>``, the third the square.
    """
    t = features + (hidden - 1) * math.sqrt(2 * features / math.pi)
    return 1 - 2 * hidden / t + hidden * (2 * features + hidden - 1) / t**2


def predicted_gain(layer: nn.Module) -> float | None:
    """Mean square after over before an AOL layer or a linear SLL block at a fresh start, without the activation behind it; None for other layers."""
    if isinstance(layer, (AOLLinear, AOLConv2d)):
        n_out, n_in, *kernel = layer.weight.shape
        a, b = kernel or (1, 1)
        return n_in * a * b * predicted_aol_variance(n_out, n_in, (a, b))
    if isinstance(layer, SLLLinear):
        hidden, features = layer.weight.shape
        return predicted_sll_gain(features, hidden)
    return None
