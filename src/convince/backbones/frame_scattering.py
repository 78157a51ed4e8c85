"""FrameScattering: features by fixed filters, any non-expansive nonlinearity and pooling, layer after layer; only the linear head learns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="frame-scattering",
    kind="backbone",
    paper="deep-conv-feature-theory",
    title="A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction",
    year=2015,
    url="https://arxiv.org/abs/1512.06293",
    accepts=("image",),
    departs=(
        "signals live on a grid that goes round at its edges, and the factor S^(d/2) is left out: on a grid taking every S-th value is non-expansive",
        "nonlinearities act on real and imaginary parts apart; their Lipschitz constants are the smallest that hold, 1 or for the logistic function 1/4",
        "the theory is for any filters, pooling and depth; the defaults, Gabor filters of two scales, means over 2x2 and two layers, are ours",
        "each input channel is scattered by itself; features are standardised by a batch norm without weights before the linear layer",
    ),
    tiny={"scales": 1, "depth": 1},
    optimizer="adamw:lr=0.01,weight_decay=0.05",
    variants={
        "frame-scattering-mini": {"bank": "gabor"},
        "frame-scattering-haar": {"bank": "haar"},
        "scattering2d": {"bank": "morlet", "pool": "none", "stride": 1, "orientations": 8, "decreasing": True, "output_stride": 4},
    },
    small=("frame-scattering-mini", "frame-scattering-haar"),
)

LIPSCHITZ = {"modulus": 1.0, "relu": 1.0, "tanh": 1.0, "logistic": 0.25}
POOLS = ("none", "mean", "max")
BANKS = ("haar", "gabor", "morlet", "weyl-heisenberg", "random")


# -- filters -----------------------------------------------------------------------------------------


class Bank(NamedTuple):
    """``filters`` [n k k], real or complex, the output ``atom`` [j j], real, and for each filter the ``scale`` it belongs to (0: the finest)."""

    filters: np.ndarray
    atom: np.ndarray
    scale: tuple[int, ...]


def haar(scales: int = 2) -> Bank:
    """Products of (1, 1)/2 and (1, -1)/2, the taps ``2^j`` apart in scale ``j``: a tight frame with bound 1, three filters a scale."""
    filters, scale, atom = [], [], np.ones((1, 1))
    size = 2**scales
    for j in range(scales):
        low, high = np.zeros(2**j + 1), np.zeros(2**j + 1)
        low[[0, -1]], high[[0, -1]] = (0.5, 0.5), (0.5, -0.5)
        for a, b in ((low, high), (high, low), (high, high)):
            filters.append(_pad(_convolve(atom, np.outer(a, b)), size))
            scale.append(j)
        atom = _convolve(atom, np.outer(low, low))
    return Bank(np.stack(filters), _pad(atom, size), tuple(scale))


def gabor(scales: int = 2, orientations: int = 4, morlet: bool = False) -> Bank:
    """Gaussians of 0.8 ``2^j`` px times waves of frequency ``(3/4) pi 2^-j``, of peak response 1; the atom is a Gaussian of 0.8 ``2^(scales-1)`` px, sum 1.

    ``morlet`` takes from each filter the Gaussian that makes its sum 0, and widens it by ``4 / orientations`` along the wave's crests.
    """
    size = 2 * math.ceil(3 * 0.8 * 2 ** (scales - 1) * (max(1.0, orientations / 4) if morlet else 1.0)) + 1
    rows, columns = np.mgrid[:size, :size] - size // 2
    filters, scale = [], []
    for j, o in itertools.product(range(scales), range(orientations)):
        angle, sigma, xi = math.pi * o / orientations, 0.8 * 2**j, 0.75 * math.pi / 2**j
        across, along = columns * math.cos(angle) + rows * math.sin(angle), rows * math.cos(angle) - columns * math.sin(angle)
        envelope = np.exp(-(across**2 + (along * (4 / orientations if morlet else 1.0)) ** 2) / (2 * sigma**2))
        wave = envelope * np.exp(1j * xi * across)
        if morlet:
            wave = wave - envelope * wave.sum() / envelope.sum()
        filters.append(wave / np.abs(np.fft.fft2(wave, (64, 64))).max())
        scale.append(j)
    sigma = 0.8 * 2 ** (scales - 1)
    atom = np.exp(-(rows**2 + columns**2) / (2 * sigma**2))
    return Bank(np.stack(filters), atom / atom.sum(), tuple(scale))


def weyl_heisenberg(size: int = 4) -> Bank:
    """A window (Hann) times the ``size^2`` cosines of the discrete cosine transform; its constant is the output atom. A tight frame: bound ``|window|^2``."""
    n = np.arange(size)
    cosines = np.cos(math.pi * (n[None] + 0.5) * n[:, None] / size) * np.sqrt(np.where(n[:, None] == 0, 1, 2) / size)
    window = np.outer(*[np.sin(math.pi * (n + 0.5) / size)] * 2) * 2 / size
    every = np.stack([np.outer(a, b) * window for a in cosines for b in cosines])
    return Bank(every[1:], every[0], (0,) * (size**2 - 1))


def random_bank(count: int = 8, size: int = 5, seed: int = 0) -> Bank:
    """``count`` filters of normal numbers and a mean over ``size`` x ``size``."""
    return Bank(np.random.default_rng(seed).standard_normal((count, size, size)) / size, np.full((size, size), 1 / size**2), (0,) * count)


def learned_bank(weight: Float[Tensor, "m c k k"]) -> Bank:
    """Every kernel [k k] of a convolution's weight, and a mean over ``k`` x ``k``."""
    kernels = weight.detach().double().flatten(0, 1).numpy()
    k = kernels.shape[-1]
    return Bank(kernels, np.full((k, k), 1 / k**2), (0,) * len(kernels))


def named(bank: str, scales: int = 2, orientations: int = 4) -> Bank:
    """The bank of a name."""
    match bank:
        case "haar":
            return haar(scales)
        case "gabor" | "morlet":
            return gabor(scales, orientations, bank == "morlet")
        case "weyl-heisenberg":
            return weyl_heisenberg()
        case "random":
            return random_bank()
    raise Mistake(f"frame-scattering: bank={bank!r} must be one of {', '.join(BANKS)}")


def response(filters: np.ndarray, plane: tuple[int, int]) -> np.ndarray:
    """The Fourier transforms [n h w] of filters [n k l], centred, on a grid that goes round; those wider than it are folded."""
    waves = [np.exp(-2j * math.pi * np.outer(np.arange(side) / side, np.arange(k) - (k - 1) // 2)) for side, k in zip(plane, filters.shape[1:], strict=True)]
    return waves[0] @ filters @ waves[1].T


def frame_bound(bank: Bank, plane: tuple[int, int]) -> float:
    """``B = max over frequencies of |chi^|^2 + sum |g^|^2`` (the frame condition): no filtering by all of them at once gains more energy."""
    return float(((np.abs(response(bank.filters, plane)) ** 2).sum(0) + np.abs(response(bank.atom[None], plane)[0]) ** 2).max())


def _convolve(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    size = (a.shape[0] + b.shape[0] - 1, a.shape[1] + b.shape[1] - 1)
    return np.fft.irfft2(np.fft.rfft2(a, size) * np.fft.rfft2(b, size), size)


def _pad(a: np.ndarray, size: int) -> np.ndarray:
    return np.pad(a, ((0, size - a.shape[0]), (0, size - a.shape[1])))


# -- nonlinearities and pooling ----------------------------------------------------------------------


def nonlinearity(u: Tensor, name: str) -> Tensor:
    """``M(u)``, 0 at 0: modulus, ReLU, tanh, or the logistic function less 1/2; complex values by real and imaginary part, save the modulus."""
    if name == "modulus":
        return u.abs()
    if u.is_complex():
        return torch.complex(nonlinearity(u.real, name), nonlinearity(u.imag, name))
    return u.relu() if name == "relu" else u.tanh() if name == "tanh" else u.sigmoid() - 0.5


def pooling(u: Tensor, name: str, stride: int) -> Tensor:
    """``P(u)`` at every ``stride``-th position of the last two axes: the value there ("none"), ``stride`` times the mean of the block, or its largest value.

    The mean has weights of length 1. All three are non-expansive; an edge that does not fill a block counts as zeros (for the largest, as nothing).
    """
    if stride == 1:
        return u
    if name == "none":
        return u[..., ::stride, ::stride]
    if u.is_complex():
        return torch.complex(pooling(u.real, name, stride), pooling(u.imag, name, stride))
    flat = F.pad(u.flatten(0, -3)[:, None], (0, -u.shape[-1] % stride, 0, -u.shape[-2] % stride), value=0.0 if name == "mean" else -math.inf)
    found = F.avg_pool2d(flat, stride) * stride if name == "mean" else F.max_pool2d(flat, stride)
    return found[:, 0].unflatten(0, u.shape[:-2])


# -- layers ------------------------------------------------------------------------------------------


@final
class FrameLayer(nn.Module):
    """A module (Psi, M, P) of the paper on a ``plane`` (rows, columns): ``propagate`` is U, ``output`` the convolution with chi.

    ``admissible`` divides filters and atom by ``divided_by``, so that ``max(B, B R^2 L^2) <= 1`` (the admissibility condition; R is 1 here);
    ``bound`` is B before that.
    """

    g: Tensor
    chi: Tensor

    def __init__(self, bank: Bank, plane: tuple[int, int], nonlinearity: str = "modulus", pool: str = "mean", stride: int = 2, admissible: bool = True) -> None:
        super().__init__()
        for word, value, known in (("nonlinearity", nonlinearity, tuple(LIPSCHITZ)), ("pool", pool, POOLS)):
            if value not in known:
                raise Mistake(f"frame-scattering: {word}={value!r} must be one of {', '.join(known)}")
        if stride < 1:
            raise Mistake(f"frame-scattering: stride={stride} must be at least 1, which keeps every position")
        self.plane, self.nonlinearity, self.pool, self.stride, self.scale = plane, nonlinearity, pool, stride, bank.scale
        self.bound = frame_bound(bank, plane)
        self.divided_by = math.sqrt(self.bound * max(1.0, LIPSCHITZ[nonlinearity] ** 2)) if admissible else 1.0
        self.real = not np.iscomplexobj(bank.filters)
        for name, kernels in (("g", bank.filters), ("chi", bank.atom[None])):
            values = response(kernels, plane) / self.divided_by
            self.register_buffer(name, torch.tensor(np.stack([values.real, values.imag]), dtype=torch.get_default_dtype()), persistent=False)

    @property
    def next_plane(self) -> tuple[int, int]:
        """Rows and columns of what ``propagate`` gives."""
        return -(-self.plane[0] // self.stride), -(-self.plane[1] // self.stride)

    def propagate(self, u: Tensor) -> Tensor:
        """``P(M(u * g_l))`` of signals [n p h w] for every filter ``l``: [n p l i j]."""
        return pooling(nonlinearity(self.convolve(u, self.g, self.real), self.nonlinearity), self.pool, self.stride)

    def output(self, u: Tensor) -> Tensor:
        """``u * chi`` of signals [n p h w]."""
        return self.convolve(u, self.chi, True)[:, :, 0]

    @staticmethod
    def convolve(u: Tensor, responses: Tensor, real: bool) -> Tensor:
        """Circular convolutions [n p l h w] by the Fourier transforms [2 l h w], real and imaginary; real where signals and filters are."""
        made = torch.fft.ifft2(torch.fft.fft2(u)[:, :, None] * torch.complex(responses[0], responses[1]))
        return made.real if real and not u.is_complex() else made


def paths(layers: Sequence[FrameLayer], decreasing: bool = False) -> list[list[int]]:
    """For each length from 1 on, which of the paths (those before, each with every filter) are followed; ``decreasing``: whose scales grow.

    A scale counts in pixels of the image: the strides before a filter make it coarser.
    """
    before, ahead, kept = [-math.inf], 0.0, []
    for layer in layers[:-1]:
        ends = [(b, ahead + j) for b in before for j in layer.scale]
        kept.append([i for i, (b, a) in enumerate(ends) if a > b or not decreasing])
        before, ahead = [ends[i][1] for i in kept[-1]], ahead + math.log2(layer.stride)
    return kept


def scatter(x: Tensor, layers: Sequence[FrameLayer], decreasing: bool = False) -> list[Tensor]:
    """The features of each layer 0, 1, ...: ``U[q] x * chi`` [n p h w] of all :func:`paths` ``q`` of that length, channel after channel.

    ``x`` are signals [n c h w], real or complex. The last of ``layers`` gives outputs only, so the longest path is one shorter than ``layers``.
    """
    n, c = x.shape[:2]
    u = x.flatten(0, 1)[:, None]
    found = [layers[0].output(u)]
    for layer, after, kept in zip(layers, layers[1:], paths(layers, decreasing), strict=False):
        u = layer.propagate(u).flatten(1, 2)
        if len(kept) < u.shape[1]:
            u = u[:, torch.tensor(kept, device=u.device)]
        found.append(after.output(u))
    return [u.unflatten(0, (n, c)).flatten(1, 2) for u in found]


def real_parts(u: Tensor) -> Float[Tensor, "n p *s"]:
    """Real and imaginary parts as twice as many signals; real ones as they are."""
    return torch.cat([u.real, u.imag], 1) if u.is_complex() else u


# -- the network -------------------------------------------------------------------------------------


@final
class FrameScattering(Headed):
    """:func:`scatter` with layers of one bank, all features in a row, standardised, and a linear layer. Nothing but that layer has weights.

    ``bank``: "haar", "gabor" and "morlet" (``scales``, and ``orientations`` of the last two), "weyl-heisenberg" or "random". ``depth`` is the longest
    path. ``nonlinearity``: "modulus", "relu", "tanh" or "logistic"; ``pool`` over blocks of ``stride``: "none", "mean" or "max". ``decreasing`` keeps
    paths of growing scales; ``output_stride`` takes every so many-th feature. ``img_size`` is rows and columns in pixels; other images are refused.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        img_size: Sequence[int] = (32, 32),
        bank: str = "gabor",
        nonlinearity: str = "modulus",
        pool: str = "mean",
        stride: int = 2,
        depth: int = 2,
        scales: int = 2,
        orientations: int = 4,
        decreasing: bool = False,
        output_stride: int = 1,
    ) -> None:
        super().__init__()
        if min(depth, scales, orientations, output_stride) < 1:
            raise Mistake(f"frame-scattering: depth={depth}, scales={scales}, orientations={orientations}, output_stride={output_stride}: each at least 1")
        self.img_size, self.decreasing, self.output_stride = (int(img_size[0]), int(img_size[1])), decreasing, output_stride
        filters = named(bank, scales, orientations)
        layers: list[FrameLayer] = []
        for _ in range(depth + 1):
            layers.append(FrameLayer(filters, layers[-1].next_plane if layers else self.img_size, nonlinearity, pool, stride))
        self.layers = nn.ModuleList(layers)
        self.num_classes, self.in_chans = num_classes, in_chans
        parts = 1 if layers[0].real or nonlinearity == "modulus" else 2  # of a number: complex filters make complex signals, unless the modulus is taken
        counts = [1, *(parts * len(kept) for kept in paths(layers, decreasing))]
        self.num_features = in_chans * sum(p * math.prod(-(-side // output_stride) for side in layer.plane) for p, layer in zip(counts, layers, strict=True))
        self.norm = nn.BatchNorm1d(self.num_features, affine=False)
        self.fc = nn.Linear(self.num_features, num_classes)
        self.feature_info = maps()

    def scatter(self, x: Tensor) -> list[Tensor]:
        """The features [n p h w] of each layer before any is left out, for real or complex images [n c h w]."""
        return scatter(x, list(self.layers), self.decreasing)  # type: ignore[arg-type]

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """All features of an image in a row. Raises Mistake for images of another size."""
        if tuple(x.shape[2:]) != self.img_size:
            raise Mistake(f"frame-scattering: made for {self.img_size[0]}x{self.img_size[1]} pixels, given {x.shape[2]}x{x.shape[3]}; set img_size")
        s = self.output_stride
        return torch.cat([real_parts(u[..., ::s, ::s]).flatten(1) for u in self.scatter(x)], 1)

    def pool(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The features standardised."""
        return self.norm(features)
