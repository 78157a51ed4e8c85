"""Wide CNN learnability: how fast infinitely wide local networks learn a target, by the size of their largest patch; of a person's images and network."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.kinds import Probe, as_found
from convince.layers.dual_activations import relu
from convince.parts import Card
from convince.types import Bars, Curves, Figure, Findings, Reading

CARD = Card(
    part="wide-cnn-learnability",
    kind="probe",
    paper="wide-cnn-learnability",
    title="What Can Be Learnt With Wide Convolutional Neural Networks?",
    year=2023,
    url="https://arxiv.org/abs/2208.01003",
    expects=("images", "labels"),
    departs=(
        "the probe takes a person's images and labels, and the network's own scores, where the paper has drawn inputs and a kernel as teacher",
        "images are averaged to at most 16 px, which 2x2 patches then halve level by level; the paper halves rows of numbers",
        "a ridge of a millionth of the kernel's diagonal keeps images that are alike from spoiling the solution; the paper has none",
        "a fully connected network of as many layers is set beside the local ones on the same images",
    ),
)


# -- kernels -----------------------------------------------------------------------------------------


def tree_kernels(x: Float[Tensor, "n d"], z: Float[Tensor, "m d"], sizes: Sequence[int], kind: str = "ntk") -> list[Float[Tensor, "n m"]]:
    """Kernels of wide convolutional networks with non-overlapping filters of ``sizes``, for every length of that list from 1 on.

    Each patch of ``sizes[0]`` numbers is brought to length 1 (zeros stay). Level 1: ``S = k1(<x_i, z_i>)``, ``T = S + <x_i, z_i> k0(<x_i, z_i>)``.
    Level l: of ``sizes[l-1]`` neighbours ``m = mean S``, then ``S = k1(m)``, ``T = S + mean(T) k0(m)``. The kernel is the mean of ``T`` ("ntk")
    or of ``S`` ("nngp", the untrained network) over the nodes of the last level. ``k1, k0`` are ReLU's dual and its slope.
    """
    d, whole = x.shape[1], math.prod(sizes)
    if not sizes or min(sizes) < 1 or z.shape[1] != d or d % whole:
        raise Mistake(f"wide-cnn-learnability: sizes={tuple(sizes)} must be at least 1 and multiply to a divisor of the rows' length, {d} and {z.shape[1]}")
    if kind not in ("ntk", "nngp"):
        raise Mistake(f"wide-cnn-learnability: kind={kind!r} must be 'ntk' or 'nngp'")
    dual = relu()
    patches = [F.normalize(rows.unflatten(1, (-1, sizes[0])), dim=2) for rows in (x, z)]
    sums = [x.new_zeros(len(x), len(z)) for _ in sizes]

    def node(level: int, at: int) -> tuple[Tensor, Tensor]:
        if level == 0:
            cosine = mean = patches[0][:, at] @ patches[1][:, at].T
        else:
            cosine, mean = (torch.zeros_like(sums[0]) for _ in range(2))
            for i in range(sizes[level]):
                s, t = node(level - 1, at * sizes[level] + i)
                cosine, mean = cosine.add_(s, alpha=1 / sizes[level]), mean.add_(t, alpha=1 / sizes[level])
        s = dual.value(cosine)
        t = s + mean * dual.slope(cosine) if kind == "ntk" else s
        sums[level] += t
        return s, t

    for top in range(d // whole):
        node(len(sizes) - 1, top)
    return [total / (d // math.prod(sizes[: level + 1])) for level, total in enumerate(sums)]


def hierarchical_ntk(x: Float[Tensor, "n d"], z: Float[Tensor, "m d"], sizes: Sequence[int], kind: str = "ntk") -> Float[Tensor, "n m"]:
    """The kernel of :func:`tree_kernels` for the whole list."""
    return tree_kernels(x, z, sizes, kind)[-1]


def fully_connected_ntk(x: Float[Tensor, "n d"], z: Float[Tensor, "m d"], depth: int, kind: str = "ntk") -> Float[Tensor, "n m"]:
    """Of a fully connected network of ``depth`` hidden layers: one patch of all numbers, then filters of size 1."""
    return hierarchical_ntk(x, z, (x.shape[1], *[1] * (depth - 1)), kind)


# -- inputs and targets of the paper -----------------------------------------------------------------


def patch_spheres(n: int, patches: int, size: int, gen: Generator) -> Float[Tensor, "n d"]:
    """Rows of ``patches`` points, each uniform on the unit sphere of ``size`` numbers (2: a circle)."""
    return F.normalize(torch.randn(n, patches, size, generator=gen, dtype=torch.float64), dim=2).flatten(1)


def gaussian_target(covariance: Float[Tensor, "n n"], gen: Generator) -> Float[Tensor, "n 1"]:
    """A draw of the Gaussian process at the covariance's points. With the kernel of a teacher of fewer filters, a sum of functions of its patches."""
    jitter = 1e-10 * float(covariance.diagonal().mean())
    factor = torch.linalg.cholesky(covariance + jitter * torch.eye(len(covariance), dtype=covariance.dtype))
    return factor @ torch.randn(len(covariance), 1, generator=gen, dtype=covariance.dtype)


# -- regression --------------------------------------------------------------------------------------


def krr(kernel: Float[Tensor, "n n"], y: Float[Tensor, "n k"], cross: Float[Tensor, "m n"], ridge: float = 0.0) -> Float[Tensor, "m k"]:
    """Kernel (ridge) regression at points of kernel ``cross`` with the training points: ``cross (kernel + ridge I)^-1 y``."""
    factor, failed = torch.linalg.cholesky_ex(kernel + ridge * torch.eye(len(kernel), dtype=kernel.dtype, device=kernel.device))
    if bool(failed):
        raise Mistake(
            f"wide-cnn-learnability: the kernel of these {len(kernel)} points cannot be inverted with ridge={ridge:g}; raise it, or drop equal points"
        )
    return cross @ torch.cholesky_solve(y, factor)


def learning_curve(
    kernel: Float[Tensor, "n n"], y: Float[Tensor, "n k"], counts: Sequence[int], test: int, ridge: float = 0.0, centre: bool = False
) -> list[tuple[int, float]]:
    """(n, error) for the first n rows as training points; the last ``test`` rows are predicted.

    Errors are mean squares over those of predicting 0, with ``centre`` of predicting the training points' mean, which regression then starts from.
    """
    found = []
    for n in counts:
        mean = y[:n].mean(0) if centre else torch.zeros_like(y[0])
        truth = y[-test:] - mean
        guess = krr(kernel[:n, :n], y[:n] - mean, kernel[-test:, :n], ridge)
        found.append((n, float((guess - truth).square().mean() / truth.square().mean().clamp_min(1e-300))))
    return found


def fit_exponent(curve: Sequence[tuple[float, float]]) -> float:
    """``beta`` of ``error ~ n^-beta``, by least squares of the logs."""
    logs = [(math.log(n), math.log(max(error, 1e-300))) for n, error in curve]
    return -statistics.linear_regression(*zip(*logs, strict=True)).slope


def kernel_spectrum(kernel: Float[Tensor, "n n"]) -> Float[Tensor, " n"]:
    """Eigenvalues of the Gram matrix over its size, the largest first."""
    return torch.linalg.eigvalsh(kernel).flip(0) / len(kernel)


# -- images ------------------------------------------------------------------------------------------


def nested(x: Float[Tensor, "n c h w"]) -> tuple[Float[Tensor, "n d"], list[int]]:
    """Images with sides of one power of two as rows in which patches stand together at every level, and the filter sizes that read 2x2, 4x4 ... of them."""
    n, c, side, _ = x.shape
    levels = side.bit_length() - 1
    bits = x.reshape(n, c, *[2] * (2 * levels))
    order = [axis for level in range(levels) for axis in (2 + level, 2 + levels + level)]
    return bits.permute(0, *order, 1).flatten(1), [4 * c, *[4] * (levels - 1)]


def prepared(x: Float[Tensor, "n c h w"], most: int = 16) -> Float[Tensor, "n c s s"]:
    """In float64, averaged to the largest power of two that sides and ``most`` allow, each channel less its mean over all images."""
    side = 2 ** (min(*x.shape[2:], most).bit_length() - 1)
    x = F.adaptive_avg_pool2d(x.double(), side)
    return x - x.mean((0, 2, 3), keepdim=True)


@final
@dataclass
class WideCnnLearnability(Probe):
    """Which patches do labels, and the network's own scores, depend on? The errors of infinitely wide networks that see patches of 2x2, 4x4 ... pixels.

    A local network sums over its patches, so it can learn what is a sum of functions of patches of that size, and needs fewer images where that is all
    there is to learn. Beside them a fully connected network. ``images``: how many at most, evenly through those given, a quarter to test on; ``draws``:
    orders of them, over which errors are averaged.
    """

    images: int = 512
    draws: int = 3
    ridge: float = 1e-6

    def __post_init__(self) -> None:
        if self.images < 6 or self.draws < 1 or not self.ridge >= 0:
            raise Mistake(f"wide-cnn-learnability: images={self.images}, draws={self.draws}, ridge={self.ridge}: at least 6, at least 1, not below 0")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        if x.dim() != 4 or len(x) < 6 or min(x.shape[2:]) < 2:
            raise Mistake(f"wide-cnn-learnability needs at least 6 images [n c h w] of 2 px or more, and the input has shape {tuple(x.shape)}")
        if int(y.min()) == int(y.max()):
            raise Mistake(f"wide-cnn-learnability needs images of at least two classes, and all are of class {int(y[0])}; give more of the data")
        rows = torch.linspace(0, len(x) - 1, min(self.images, len(x))).long().to(x.device)
        x, y = x[rows], y[rows]
        with as_found(answer), torch.no_grad():
            scores = torch.cat([full(answer(part)) for part in x.split(256)]).double()
        targets = {"labels": F.one_hot(y).double(), "scores": scores}
        with torch.no_grad():
            pixels, sizes = nested(prepared(x))
            kernels = {f"{2 ** (i + 1)}x{2 ** (i + 1)}": kernel for i, kernel in enumerate(tree_kernels(pixels, pixels, sizes))}
            kernels["dense"] = fully_connected_ntk(pixels, pixels, len(sizes))
            orders = [torch.randperm(len(x), generator=generator("wide-cnn-learnability", i)).to(x.device) for i in range(self.draws)]
            curves = {what: {name: self.curve(kernel, target, orders) for name, kernel in kernels.items()} for what, target in targets.items()}
        readings: list[Reading] = []
        figures: list[Figure] = []
        for what, found in curves.items():
            last = {name: curve[-1][1] for name, curve in found.items()}
            for name, curve in found.items():
                who = "fully connected" if name == "dense" else f"patches of {name} px"
                readings.append(Reading(f"{what}, {who}: error at {curve[-1][0]} images", last[name], "of the variance"))
                readings.append(Reading(f"{what}, {who}: exponent of the error's fall", fit_exponent(curve), "log error a log image"))
            local = min(value for name, value in last.items() if name != "dense")
            readings.append(Reading(f"{what}: best local over fully connected", local / max(last["dense"], 1e-300), "ratio of errors"))
            figures.append(Bars(f"Error of {what} by the largest patch", "of the variance", last))
            series = {name: [(math.log2(n), error) for n, error in curve if error > 0] for name, curve in found.items()}
            figures.append(Curves(f"Error of {what} by images", "log2 of training images", "share of the variance", series, log=True))
        return Findings(readings, figures)

    def curve(self, kernel: Tensor, target: Tensor, orders: list[Tensor]) -> list[tuple[int, float]]:
        """The mean learning curve, its counts halved from three quarters of the images at most five times."""
        total = len(target)
        test = total // 4
        counts = [n for i in range(5, -1, -1) if (n := (total - test) // 2**i) >= 2]
        ridge = self.ridge * float(kernel.diagonal().mean())
        found = [learning_curve(kernel[order][:, order], target[order], counts, test, ridge, centre=True) for order in orders]
        return [(n, sum(curve[i][1] for curve in found) / len(found)) for i, n in enumerate(counts)]
