"""Orthogonal conv: a penalty that keeps every convolution near an operator that preserves norms, and the theory of when there is one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="orthogonal-conv",
    kind="technique",
    paper="orthogonal-conv",
    title="Existence, Stability and Scalability of Orthogonal Convolutional Neural Networks",
    year=2022,
    url="https://arxiv.org/abs/2108.05623",
    expects=("network",),
    strength="lam",
    off=0.0,
    departs=(
        "lam is 0.1 unless chosen; the paper tries a range of values for each task and recommends none",
        "the network's own padding stays as it is, while the theory of norms holds for circular padding",
        "grouped convolutions count as one small convolution a group, dilated ones with zeros between their taps; the paper has neither",
        "linear layers are left alone, the penalty reads convolutions of two axes only",
    ),
    tiny={"lam": 0.1},
)


# -- the penalty -----------------------------------------------------------------------------------


def two(value: int | Sequence[int]) -> tuple[int, int]:
    """A stride or dilation for rows and columns."""
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def dilate(kernel: Float[Tensor, "m c a b"], dilation: int | Sequence[int]) -> Float[Tensor, "m c i j"]:
    """The kernel with ``dilation - 1`` zeros between its taps: the same convolution without dilation."""
    (dy, dx), (a, b) = two(dilation), kernel.shape[2:]
    if (dy, dx) == (1, 1):
        return kernel
    wide = kernel.new_zeros(*kernel.shape[:2], dy * (a - 1) + 1, dx * (b - 1) + 1)
    wide[:, :, ::dy, ::dx] = kernel
    return wide


def l_orth(kernel: Float[Tensor, "m c a b"], stride: int | Sequence[int] = 1, groups: int = 1) -> Float[Tensor, ""]:
    """``|E - I0|_F^2``, less ``M - C S^2`` where there are more filters than that; 0 exactly where the layer is orthogonal.

    ``E`` [M M 2P/S+1 2P/S+1] holds the scalar products of all filters with all filters shifted by multiples of the stride, ``I0`` is the
    identity at shift 0, ``P = floor((k-1)/S) S`` the farthest shift at which two filters overlap. With ``groups`` the kernel is that of
    torch's grouped convolution [M C/groups k k], and the sum over groups is returned.
    """
    (sy, sx), (m, c, a, b) = two(stride), kernel.shape
    each = m // groups
    pad = ((a - 1) // sy * sy, (b - 1) // sx * sx)
    rows = kernel.unflatten(0, (groups, each)).transpose(0, 1).flatten(1, 2)
    e = F.conv2d(rows, kernel, stride=(sy, sx), padding=pad, groups=groups)
    eye = torch.eye(each, dtype=kernel.dtype, device=kernel.device).repeat(1, groups)
    i0 = F.pad(eye[..., None, None], (pad[1] // sx, pad[1] // sx, pad[0] // sy, pad[0] // sy))
    return (e - i0).square().sum() - groups * max(each - c * sy * sx, 0)


def exists_orthogonal(m: int, c: int, k: int, stride: int = 1, padding: str = "circular") -> bool:
    """Whether a convolution of ``c`` channels to ``m`` with ``k`` x ``k`` taps can be orthogonal (the paper's theorem of existence).

    Rows orthonormal (``m <= c S^2``): if and only if ``m <= c k^2``. Columns orthonormal (``m > c S^2``): if and only if ``S <= k``. That is
    proved for "circular" padding; for "zeros" and "valid" a warning says what the paper's counter-examples show.
    """
    if padding not in ("circular", "zeros", "valid"):
        raise Mistake(f"exists_orthogonal: padding={padding!r}: must be 'circular', 'zeros' or 'valid'")
    if min(m, c, k, stride) < 1:
        raise Mistake(f"exists_orthogonal: m={m}, c={c}, k={k}, stride={stride}: each must be at least 1")
    if padding != "circular":
        warnings.warn(
            f"exists_orthogonal: with padding {padding!r} many shapes have only degenerate orthogonal kernels, whose outer taps are 0; "
            "the answer is that of circular padding",
            stacklevel=2,
        )
    return m <= c * k * k if m <= c * stride * stride else stride <= k


def bound(kernel: Float[Tensor, "m c a b"], stride: int | Sequence[int] = 1) -> float:
    """The farthest that ``K K^T`` (``K^T K`` where columns are orthonormal) can be from the identity in the spectral norm, for images of any size.

    ``sqrt(taps * l_orth)`` with the ``taps = (2 floor((k-1)/S) + 1)^2`` shifts at which filters overlap, by Cauchy-Schwarz over them. The
    paper's constant in the row case has a further factor ``sqrt(M)``. In the column case the same holds, by the same argument for the
    convolution of stride 1 that reads the ``S^2`` phases of the image as channels.
    """
    (sy, sx), (a, b) = two(stride), kernel.shape[2:]
    taps = (2 * ((a - 1) // sy) + 1) * (2 * ((b - 1) // sx) + 1)
    return math.sqrt(taps * max(float(l_orth(kernel.detach(), stride)), 0.0))


# -- the operator ----------------------------------------------------------------------------------


def conv_matrix(kernel: Float[Tensor, "m c a b"], n: int, stride: int = 1) -> Float[Tensor, "r q"]:
    """The convolution with circular padding as a matrix [M n n, C N N] for images of side ``N = n stride``.

    It obeys ``|K K^T - Id|_F^2 = n^2 l_orth`` (``K^T K`` where ``M > C S^2``) for ``N >= 2 k - 1``.
    """
    (m, c, a, b), side = kernel.shape, n * stride
    matrix = kernel.new_zeros(m, n, n, c, side, side)
    at = torch.arange(n, device=kernel.device)
    for y in range(a):
        for x in range(b):
            rows, columns = (stride * at + y - a // 2) % side, (stride * at + x - b // 2) % side
            for i in range(n):
                matrix[:, i, at, :, rows[i], columns] += kernel[:, :, y, x]
    return matrix.flatten(3).flatten(0, 2)


def singular_values(kernel: Float[Tensor, "m c a b"], n: int, stride: int = 1) -> Float[Tensor, " s"]:
    """All ``min(M, C S^2) n^2`` singular values of :func:`conv_matrix`, the largest first, by the Fourier transform.

    At each of the ``n^2`` frequencies of the output a small matrix [M, C S^2] has them: the ``S^2`` frequencies of the input that a stride of
    ``S`` cannot tell apart stand side by side in it.
    """
    (m, c, a, b), side = kernel.shape, n * stride
    taps = kernel.new_zeros(m, c, side, side)
    for y in range(a):
        for x in range(b):
            taps[:, :, y % side, x % side] += kernel[:, :, y, x]
    hat = torch.fft.fft2(taps).reshape(m, c, stride, n, stride, n)
    blocks = hat.permute(3, 5, 0, 1, 2, 4).reshape(n, n, m, c * stride * stride) / stride
    return torch.linalg.svdvals(blocks).flatten().sort(descending=True).values


def delta_orthogonal(m: int, c: int, k: int, stride: int = 1, *, gen: Generator, dtype: torch.dtype | None = None) -> Float[Tensor, "m c k k"]:
    """A random kernel that is orthogonal wherever one exists: an orthonormal matrix on the middle ``min(S, k)`` x ``min(S, k)`` taps, 0 elsewhere.

    With stride 1 it is the delta-orthogonal start of Xiao et al. (2018): a dense orthogonal matrix at the middle tap. Raises Mistake for
    shapes that the theorem forbids.
    """
    if not exists_orthogonal(m, c, k, stride):
        raise Mistake(f"orthogonal-conv: no {k}x{k} convolution of stride {stride} from {c} to {m} channels is orthogonal; use stride <= kernel, fewer filters")
    side = min(stride, k)
    begin = (k - side) // 2
    drawn = torch.randn(max(m, c * side * side), min(m, c * side * side), generator=gen, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    q = q * r.diagonal().sign()  # uniform over orthonormal matrices
    kernel = torch.zeros(m, c, k, k, dtype=dtype or torch.get_default_dtype())
    kernel[:, :, begin : begin + side, begin : begin + side] = (q if m >= c * side * side else q.T).reshape(m, c, side, side).to(kernel.dtype)
    return kernel


# -- the part --------------------------------------------------------------------------------------


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Conv2d]]:
    """The convolutions of two axes, by name in the network's order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d))


def penalty(model: nn.Module) -> Float[Tensor, ""]:
    """The sum of :func:`l_orth` over a network's convolutions. Raises Mistake where there is none."""
    terms = [l_orth(dilate(m.weight, m.dilation), m.stride, m.groups) for _, m in convolutions(model)]
    if not terms:
        raise Mistake(f"orthogonal-conv: {type(model).__name__} has no convolution; choose a convolutional network such as resnet20, or leave the part out")
    return torch.stack(terms).sum()


@torch.no_grad()
def begin(model: nn.Module, gen: Generator) -> list[str]:
    """:func:`delta_orthogonal` kernels in place of all that may have them (square, ungrouped), biases 0; the names of the others, which stay."""
    left = []
    for name, m in convolutions(model):
        shape = (m.out_channels, m.in_channels, m.kernel_size[0], m.stride[0])
        square = m.groups == 1 and len(set(m.kernel_size)) == len(set(m.stride)) == 1
        if not square or max(m.dilation) > 1 or not exists_orthogonal(*shape):
            left.append(name)
            continue
        m.weight.copy_(delta_orthogonal(*shape, gen=gen, dtype=m.weight.dtype))
        if m.bias is not None:
            m.bias.zero_()
    return left


@final
@dataclass
class OrthogonalConv(Technique):
    """Add ``lam`` times the sum of :func:`l_orth` over all convolutions to the loss; ``lam=0`` is off.

    The larger ``lam``, the closer every layer is to preserving norms: clean accuracy is traded for robustness. Plain SGD at a rate of 0.1
    bears ``lam`` up to about 0.3; for more lower the rate or use adamw. ``delta``: begin with :func:`delta_orthogonal` kernels. After each
    epoch ``orthogonality`` reports the sum.
    """

    lam: float = 0.1
    delta: bool = False
    rank = 75  # a new start is drawn after he-init's

    def __post_init__(self) -> None:
        if not (self.lam >= 0 and math.isfinite(self.lam)):
            raise Mistake(f"orthogonal-conv: lam={self.lam}: must be at least 0, the weight of the penalty; 0.01 to 100 are tried, 0 is off")

    def on_start(self, run: Run) -> None:
        if self.lam == 0:
            return
        penalty(run.model)
        if self.delta:
            if run.settings.start is not None:
                raise Mistake(f"orthogonal-conv: delta=true would draw over the weights of --start {run.settings.start}; leave out one of the two")
            begin(run.model, run.gen("orthogonal-conv"))

    def on_loss(self, run: Run) -> None:
        if self.lam > 0:
            run.loss = run.loss + self.lam * penalty(run.model)

    def on_epoch(self, run: Run) -> None:
        if self.lam == 0:
            return
        with torch.no_grad():
            run.report("orthogonality", float(penalty(run.model)), "squared distance from orthogonal, summed over convolutions")
