"""The Poincaré ball: its maps, sums and means, and linear, convolution and batch norm layers made of them.

The ball of curvature ``-c`` is ``{x : c |x|^2 < 1}``. The layers take and give tangent vectors at the origin, so any activation may stand between them.
Sources: Hyperbolic Neural Networks++ (https://arxiv.org/abs/2006.08210), Poincaré ResNet (https://arxiv.org/abs/2303.14027).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake

Curvature = float | Tensor
TINY = 1e-15  # lengths are never divided by less
FAR = 30.0  # hyperbolic angles are cut here: their squared sinh still fits float32


def in_full(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context without reduced precision: near the rim of the ball bf16 has too few digits."""
    return contextlib.nullcontext() if x.device.type == "meta" else torch.autocast(x.device.type, enabled=False)


# -- the ball --------------------------------------------------------------------------------------


def length(x: Tensor, dim: int = -1) -> Tensor:
    """The norm along ``dim``, which stays with size 1; at least :data:`TINY`."""
    return x.norm(dim=dim, keepdim=True).clamp_min(TINY)


def artanh(s: Tensor) -> Tensor:
    """The inverse of tanh; what rounding puts on or beyond the rim counts as just inside."""
    return torch.atanh(s.clamp_max(1 - torch.finfo(s.dtype).eps))


def conformal(x: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """``lambda_x = 2 / (1 - c |x|^2)``: how much longer a step at ``x`` is than it looks."""
    return 2 / (1 - c * x.square().sum(dim, keepdim=True)).clamp_min(TINY)


def expmap0(v: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """From the tangent space at the origin into the ball: ``tanh(sqrt(c) |v|) v / (sqrt(c) |v|)``."""
    s = c**0.5 * length(v, dim)
    return v * (s.tanh() / s)


def logmap0(y: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """The inverse of :func:`expmap0`: ``artanh(sqrt(c) |y|) y / (sqrt(c) |y|)``."""
    s = c**0.5 * length(y, dim)
    return y * (artanh(s) / s)


def mobius_add(x: Tensor, y: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """``x (+) y``: the ball's sum, which does not commute: ``((1 + 2c<x,y> + c|y|^2) x + (1 - c|x|^2) y) / (1 + 2c<x,y> + c^2 |x|^2 |y|^2)``."""
    xx, yy, xy = x.square().sum(dim, keepdim=True), y.square().sum(dim, keepdim=True), 2 * c * (x * y).sum(dim, keepdim=True)
    under = (1 + xy + c**2 * xx * yy).clamp_min(TINY)
    return (1 + xy + c * yy) / under * x + (1 - c * xx) / under * y  # numbers a point first: the vectors are the long part


def expmap(x: Tensor, v: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """From the tangent space at ``x`` into the ball, along the geodesic that leaves ``x`` in the direction ``v``."""
    s = c**0.5 * length(v, dim)
    return mobius_add(x, v * ((s * conformal(x, c, dim) / 2).tanh() / s), c, dim)


def logmap(x: Tensor, y: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """The inverse of :func:`expmap`: the step at ``x`` that leads to ``y``."""
    u = mobius_add(-x, y, c, dim)
    s = c**0.5 * length(u, dim)
    return u * (2 * artanh(s) / (s * conformal(x, c, dim)))


def gyration(u: Tensor, v: Tensor, w: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """``gyr[u, v] w``: the rotation by which the ball's sum fails to be associative."""
    uu, vv = u.square().sum(dim, keepdim=True), v.square().sum(dim, keepdim=True)
    uv, uw, vw = (u * v).sum(dim, keepdim=True), (u * w).sum(dim, keepdim=True), (v * w).sum(dim, keepdim=True)
    under = (1 + 2 * c * uv + c**2 * uu * vv).clamp_min(TINY) / (2 * c)
    return w + (vw - c * uw * vv + 2 * c * uv * vw) / under * u - (uw + c * vw * uu) / under * v


def transp(x: Tensor, y: Tensor, v: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """Parallel transport of the tangent vector ``v`` from ``x`` to ``y``."""
    return gyration(y, -x, v, c, dim) * (conformal(x, c, dim) / conformal(y, c, dim))


def dist(x: Tensor, y: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """The geodesic distance; ``dim`` stays with size 1."""
    return 2 / c**0.5 * artanh(c**0.5 * length(mobius_add(-x, y, c, dim), dim))


def midpoint(x: Tensor, c: Curvature, dim: int = -1, over: Sequence[int] = (0,)) -> Tensor:
    """The Poincaré midpoint of the points along the axes ``over``, which stay with size 1; ``dim`` is the vector axis.

    ``mu / (1 + sqrt(1 - c |mu|^2))`` with ``mu = sum lambda x / sum (lambda - 1)``: the mean of the Klein model, in closed form.
    """
    scale = conformal(x, c, dim)
    mu = (scale * x).sum(tuple(over), keepdim=True) / (scale - 1).sum(tuple(over), keepdim=True).clamp_min(TINY)
    return mu / (1 + (1 - c * mu.square().sum(dim, keepdim=True)).clamp_min(0).sqrt())


def frechet_mean(x: Tensor, c: Curvature, dim: int = -1, over: Sequence[int] = (0,), tol: float = 1e-6, most: int = 500) -> Tensor:
    """The point with the least mean squared distance, by the Karcher flow from the midpoint, until a step is shorter than ``tol``.

    A step is ``exp_m(mean log_m x / L)`` with ``L`` the mean of ``s coth s`` over the distances ``s / sqrt(c)``, a bound of the second derivative:
    whole steps overshoot where the points lie far apart. The flow runs without gradients; they pass through one last step, to first order.
    """

    def flow(m: Tensor) -> tuple[Tensor, Tensor]:
        logs, scale = logmap(m, x, c, dim), conformal(m, c, dim)
        s = c**0.5 * length(logs, dim) * scale
        step = logs.mean(tuple(over), keepdim=True) / (s / s.tanh()).detach().mean(tuple(over), keepdim=True)
        return expmap(m, step, c, dim), length(step, dim) * scale

    with torch.no_grad():
        m = midpoint(x, c, dim, over)
        for _ in range(most):
            m, moved = flow(m)
            if not bool((moved > tol).any()):
                break
    return flow(m)[0]


# -- what layers compute ---------------------------------------------------------------------------


def fully_connected(x: Float[Tensor, "n d"], z: Float[Tensor, "k d"], r: Float[Tensor, " k"], c: Curvature) -> Float[Tensor, "n k"]:
    """The Poincaré linear map, ball to ball (HNN++, section 3.2), with one row of ``z`` and one offset ``r`` an output.

    ``v_k = 2 |z_k| / sqrt(c) asinh(lambda_x <sqrt(c) x, z_k / |z_k|> cosh(2 sqrt(c) r_k) - (lambda_x - 1) sinh(2 sqrt(c) r_k))``,
    ``w_k = sinh(sqrt(c) v_k) / sqrt(c)``, ``y = w / (1 + sqrt(1 + c |w|^2))``. The layers use :func:`tangent_connected`, which is the same, shorter.
    """
    root, scale, lengths = c**0.5, conformal(x, c), length(z)[:, 0]
    offset = 2 * root * r
    v = 2 * lengths / root * torch.asinh(scale * (root * x @ (z / lengths[:, None]).T) * offset.cosh() - (scale - 1) * offset.sinh())
    w = (root * v).sinh() / root
    return w / (1 + (1 + c * w.square().sum(-1, keepdim=True)).sqrt())


def tangent_connected(inner: Tensor, size: Tensor, lengths: Tensor, r: Tensor, c: Curvature, dim: int = -1) -> Tensor:
    """``logmap0(fully_connected(expmap0(v), z, r))`` from ``inner = <v, z_k>`` along ``dim``, ``size = |v|`` and ``lengths = |z_k|``.

    With ``s = 2 sqrt(c) |v|`` the maps in and out cancel: ``lambda_x sqrt(c) x = sinh(s) v / |v|``, ``lambda_x - 1 = cosh(s)``, and the way back
    is ``asinh(|u|) u / (2 sqrt(c) |u|)`` with ``u_k = sinh(2 |z_k| asinh(...))``. So nothing comes near the rim, and autograd keeps little.
    """
    root = c**0.5
    s, offset = (2 * root * size).clamp(max=FAR), 2 * root * r
    angle = torch.asinh(s.sinh() / size * (inner / lengths) * offset.cosh() - s.cosh() * offset.sinh())
    u = (2 * lengths * angle).clamp(-FAR, FAR).sinh()
    far = length(u, dim)
    return u * (torch.asinh(far) / (2 * root * far))


def beta_ratio(channels: int, taps: int) -> float:
    """``B(channels taps / 2, 1/2) / B(channels / 2, 1/2)``: what vectors of a patch are scaled by, so that their concatenation is as long as each."""

    def log_beta(a: float) -> float:
        return math.lgamma(a) + math.lgamma(0.5) - math.lgamma(a + 0.5)

    return math.exp(log_beta(channels * taps / 2) - log_beta(channels / 2))


def initialise(weight: Tensor, init: str) -> None:
    """ "identity": half the identity matrix (a square layer then returns its input); "normal": the older law N(0, 1 / (2 inputs outputs))."""
    rows = weight.flatten(1)
    with torch.no_grad():
        if init == "identity":
            rows.copy_(torch.eye(*rows.shape, dtype=rows.dtype, device=rows.device) / 2)
        elif init == "normal":
            nn.init.normal_(weight, std=(2 * rows.shape[0] * rows.shape[1]) ** -0.5)
        else:
            raise Mistake(f"poincare: init={init!r} must be 'identity' (norms are kept) or 'normal' (the older law)")


# -- layers ----------------------------------------------------------------------------------------


@final
class PoincareBall(nn.Module):
    """The ball that layers share: its ``c``, a fixed number, or one that is learned (as softplus of a parameter, so that it stays positive)."""

    def __init__(self, c: float = 0.1, learnable: bool = False) -> None:
        super().__init__()
        if not c > 0:
            raise Mistake(f"poincare: c={c} must be positive; 0.1 is usual, and a flat network has none")
        self.fixed = c
        self.raw = nn.Parameter(torch.tensor(math.log(math.expm1(c)))) if learnable else None

    @property
    def c(self) -> Curvature:
        """The curvature's magnitude."""
        return self.fixed if self.raw is None else F.softplus(self.raw)

    def extra_repr(self) -> str:
        return f"c={self.fixed}" + (", learnable=True" if self.raw is not None else "")


@final
class PoincareLinear(nn.Module):
    """:func:`fully_connected` between tangent vectors. Weight [outputs inputs], bias (offsets) 0 at the start."""

    def __init__(self, inputs: int, outputs: int, ball: PoincareBall, init: str = "identity") -> None:
        super().__init__()
        self.ball = ball
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, inputs)), nn.Parameter(torch.zeros(outputs))
        initialise(self.weight, init)

    def forward(self, v: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return tangent_connected(v @ self.weight.T, length(v), length(self.weight)[:, 0], self.bias, self.ball.c)


@final
class PoincareConv2d(nn.Module):
    """Tangent vectors in, a patch concatenated with :func:`beta_ratio`, one Poincaré linear map for all patches, tangent vectors out.

    The vectors lie along the channels; zeros beyond the border. The weight [outputs channels k k] is a plain convolution's. With
    ``init="identity"`` output j copies tap ``j % k^2`` of channel ``j // k^2``.
    """

    def __init__(self, channels: int, outputs: int, kernel: int, ball: PoincareBall, stride: int = 1, init: str = "identity") -> None:
        super().__init__()
        self.ball, self.stride, self.kernel, self.scale = ball, stride, kernel, beta_ratio(channels, kernel**2)
        self.weight, self.bias = nn.Parameter(torch.empty(outputs, channels, kernel, kernel)), nn.Parameter(torch.zeros(outputs))
        initialise(self.weight, init)

    def forward(self, v: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k i j"]:
        v = v * self.scale
        inner = F.conv2d(v, self.weight, stride=self.stride, padding=self.kernel // 2)
        ones = v.new_ones(1, 1, self.kernel, self.kernel)
        size = F.conv2d(v.square().sum(1, keepdim=True), ones, stride=self.stride, padding=self.kernel // 2).clamp_min(TINY**2).sqrt()
        lengths = length(self.weight.flatten(1)).view(1, -1, 1, 1)
        return tangent_connected(inner, size, lengths, self.bias.view(1, -1, 1, 1), self.ball.c, dim=1)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.weight.shape[0]}, kernel={self.kernel}, stride={self.stride}"


@final
class PoincareMidpointBN2d(nn.Module):
    """Batch norm of the ball over batch and positions: centred at the batch's ``mean``, scaled to one variance, moved to a learned point.

    ``exp_b(sqrt(g / (var + eps)) transp_{m -> b}(log_m x))`` with ``var`` the mean squared distance to the mean m, b the image of the learned
    vector ``shift`` and g the learned number ``gain``. Worked out, this is ``b (+) gyr[b, -m] (scale (x) (-m (+) x))``. ``mean`` is :func:`midpoint`,
    or :func:`frechet_mean`, which is slow. Tangent vectors in and out. In eval mode running statistics stand in for the batch's: of m as a tangent
    vector, and of var.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, ball: PoincareBall, mean: Callable[..., Tensor] = midpoint, momentum: float = 0.1, eps: float = 1e-6) -> None:
        super().__init__()
        self.ball, self.mean, self.momentum, self.eps = ball, mean, momentum, eps
        self.shift, self.gain = nn.Parameter(torch.zeros(channels)), nn.Parameter(torch.ones(()))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(()))

    def forward(self, v: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        c = self.ball.c
        x, b = expmap0(v, c, dim=1), expmap0(self.shift.view(1, -1, 1, 1), c, dim=1)
        m = self.mean(x, c, dim=1, over=(0, 2, 3)) if self.training else expmap0(self.running_mean.view(1, -1, 1, 1), c, dim=1)
        u = mobius_add(-m, x, c, dim=1)  # as seen from the mean
        size = c**0.5 * length(u, dim=1)
        far = artanh(size)  # half the distance to the mean, in units of 1 / sqrt(c)
        if self.training:
            var = 4 / c * far.square().mean()
            with torch.no_grad():
                self.running_mean.lerp_(logmap0(m, c, dim=1).flatten().to(self.running_mean), self.momentum)
                self.running_var.lerp_(var.to(self.running_var), self.momentum)
        else:
            var = self.running_var
        scale = (self.gain.abs() / (var + self.eps)).sqrt()
        return logmap0(mobius_add(b, gyration(b, -m, u, c, dim=1) * ((scale * far).tanh() / size), c, dim=1), c, dim=1)
