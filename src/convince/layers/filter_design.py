"""Filter design: the first filters of a convolution drawn by a scheme, from fixed banks or from patches of the training images without labels."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from convince.errors import Mistake, nearest
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.layers.surgery import find
from convince.parts import Card

CARD = Card(
    part="filter-init",
    kind="technique",
    paper="filter-design",
    title="On filter design in deep convolutional neural network",
    year=2022,
    url="https://arxiv.org/abs/2410.21644",
    expects=("images", "network"),
    strength="scheme",
    off=None,
    departs=(
        "the survey names methods without their constants, so those here are the usual ones of each method's own paper",
        "gabor filters have sigma 0.56 times the wavelength and gamma 0.5, and are the same in all channels",
        "fixed banks and patch schemes give filters of equal length; beyond a bank's size come its negatives, then random mixtures of it",
        "kmeans and ica filters hold the whitening, so that they answer to a plain patch as their centre does to a whitened one",
        "sparse coding stands in as independent components; boltzmann machines and autoencoders for patches are left out",
    ),
    tiny={"scheme": "gabor"},
)
LAWS = ("zeros", "constant", "uniform", "normal", "lecun", "xavier", "kaiming", "orthogonal")
BANKS = ("gabor", "dct")
LEARNT = ("patches", "pca-patches", "kmeans", "ica")
SCHEMES = (*LAWS, *BANKS, *LEARNT, "transferred")


# -- banks -----------------------------------------------------------------------------------------


def gabor(count: int, rows: int, columns: int, wavelengths: Sequence[float] = (3, 5, 7), gamma: float = 0.5) -> Float[Tensor, "r h w"]:
    """``exp(-(x'^2 + gamma^2 y'^2) / (2 sigma^2)) cos(2 pi x' / wavelength + psi)``, wavelengths in pixels, ``psi`` 0 and pi/2, turned evenly."""
    y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) - (n - 1) / 2 for n in (rows, columns)), indexing="ij")
    each = 2 * len(wavelengths)
    found = []
    for i in range(count):
        wavelength, psi = wavelengths[i % len(wavelengths)], math.pi / 2 * (i // len(wavelengths) % 2)
        theta = math.pi * (i // each) / -(-count // each)
        along, across = x * math.cos(theta) + y * math.sin(theta), y * math.cos(theta) - x * math.sin(theta)
        found.append((-(along**2 + (gamma * across) ** 2) / (2 * (0.56 * wavelength) ** 2)).exp() * (2 * math.pi * along / wavelength + psi).cos())
    return torch.stack(found)


def dct(channels: int, rows: int, columns: int) -> Float[Tensor, "d d"]:
    """The orthonormal cosine basis over channels, rows and columns, low frequencies first; its first row is constant."""
    axes = []
    for n in (channels, rows, columns):
        k, at = torch.arange(n, dtype=torch.float64)[:, None], torch.arange(n, dtype=torch.float64)
        axes.append((math.pi * k * (at + 0.5) / n).cos() * torch.where(k > 0, math.sqrt(2 / n), math.sqrt(1 / n)))
    basis = torch.einsum("ai,bj,ck->abcijk", *axes).flatten(3).flatten(0, 2)
    height = sum(
        f / n for f, n in zip(torch.meshgrid(*(torch.arange(n) for n in (channels, rows, columns)), indexing="ij"), (channels, rows, columns), strict=True)
    )
    return basis[torch.as_tensor(height).flatten().argsort(stable=True)]


def contrast(patches: Float[Tensor, "r d"], floor: float = 10.0) -> Float[Tensor, "r d"]:
    """Each patch less its mean, over ``sqrt(variance + floor)``; the floor of 10 is for pixels from 0 to 255 (Coates and Ng)."""
    centred = patches - patches.mean(1, keepdim=True)
    return centred / (centred.square().mean(1, keepdim=True) + floor).sqrt()


def zca(patches: Float[Tensor, "r d"], eps: float = 0.1) -> Float[Tensor, "d d"]:
    """``V (L + eps)^(-1/2) V^T`` of the patches' covariance: what whitens them."""
    values, vectors = torch.linalg.eigh(torch.cov(patches.T).reshape(patches.shape[1], -1))
    return vectors * (values.clamp_min(0) + eps).rsqrt() @ vectors.T


def spherical_kmeans(patches: Float[Tensor, "r d"], count: int, gen: Generator, iterations: int = 10) -> Float[Tensor, "m d"]:
    """Unit centres: each patch goes to the centre of largest absolute product and pulls it by that product; old centres count as one patch."""
    centres = F.normalize(torch.randn(count, patches.shape[1], generator=gen, dtype=patches.dtype), dim=1)
    for _ in range(iterations):
        products = patches @ centres.T
        best = products.abs().argmax(1, keepdim=True)
        code = torch.zeros_like(products).scatter_(1, best, products.gather(1, best))
        centres = F.normalize(code.T @ patches + centres, dim=1)
    return centres


def learnt(scheme: str, patches: Float[Tensor, "r d"], count: int, gen: Generator) -> Float[Tensor, "s d"]:
    """A bank from patches: patches themselves less their mean, principal directions, k-means after whitening, independent components."""
    patches = patches.double()
    levels = patches * (64 / patches.std().clamp_min(1e-12))  # as strong as pixels from 0 to 255 usually are
    centred = levels - levels.mean(1, keepdim=True)
    if scheme == "patches":
        norms = centred.norm(dim=1)
        lively = (norms > 0.1 * norms.square().mean().sqrt()).nonzero()[:, 0]
        if not len(lively):
            raise Mistake("filter-init: scheme='patches' found only patches of one brightness; use a fixed bank such as 'gabor' or 'dct'")
        return centred[lively[torch.randint(len(lively), (count,), generator=gen)]]
    if scheme == "pca-patches":
        return torch.linalg.eigh(centred.T @ centred).eigenvectors.T.flip(0)
    if scheme == "kmeans":
        even = contrast(levels)
        white = zca(even)
        return spherical_kmeans(even @ white, count, gen) @ white
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    rank = min(count, int(torch.linalg.matrix_rank(centred - centred.mean(0))))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # directions that are nearly there are good filters too
        ica = FastICA(max(rank, 1), whiten="unit-variance", random_state=int(torch.randint(2**31, (), generator=gen))).fit(centred.numpy())
    return torch.from_numpy(ica.components_)


def extend(bank: Float[Tensor, "s d"], count: int, gen: Generator) -> Float[Tensor, "m d"]:
    """``count`` filters: the bank's first ones, then their negatives (which a rectifier tells apart), then random mixtures."""
    more = torch.randn(max(count - 2 * len(bank), 0), len(bank), generator=gen, dtype=bank.dtype) @ bank
    return torch.cat([bank, -bank, more])[:count]


# -- filters ---------------------------------------------------------------------------------------


def filters(scheme: str, shape: Sequence[int], gen: Generator, patches: Float[Tensor, "r d"] | None = None, rescale: bool = True) -> Float[Tensor, "m c h w"]:
    """Filters of ``shape`` (m c h w) in float64, by one of :data:`SCHEMES`; ``patches`` [r c*h*w] for those that learn.

    ``rescale``: all are scaled together to a mean square of ``2 / (c h w)``, Kaiming's variance, so that schemes differ in form alone; else
    laws keep their own scale and banks have filters of length 1.
    """
    m, c, h, w = shape
    d = c * h * w

    def normal(std: float) -> Tensor:
        return torch.randn(m, d, generator=gen, dtype=torch.float64) * std

    if scheme in LEARNT:
        if patches is None or not len(patches):
            raise Mistake(f"filter-init: scheme={scheme!r} learns from patches; give some, or use a fixed bank such as 'gabor' or 'dct'")
        found = F.normalize(extend(learnt(scheme, patches, m, gen), m, gen), dim=1)
    elif scheme == "gabor":
        if max(h, w) < 2:
            raise Mistake("filter-init: scheme='gabor' needs filters of at least 2 pixels, and these are 1x1; name another layer, or use 'orthogonal'")
        found = F.normalize(gabor(m, h, w).flatten(1).repeat(1, c), dim=1)
    elif scheme == "dct":
        found = F.normalize(extend(dct(c, h, w), m, gen), dim=1)
    elif scheme == "orthogonal":
        q, r = torch.linalg.qr(torch.randn(max(m, d), min(m, d), generator=gen, dtype=torch.float64))
        found = q * r.diagonal().sign()
        found = found if m >= d else found.T
    elif scheme in ("uniform", "xavier"):
        reach = 0.05 if scheme == "uniform" else math.sqrt(6 / (d + m * h * w))
        found = (2 * torch.rand(m, d, generator=gen, dtype=torch.float64) - 1) * reach
    else:
        laws = {"zeros": 0.0, "constant": 0.0, "normal": 0.01, "lecun": math.sqrt(1 / d), "kaiming": math.sqrt(2 / d)}
        if scheme not in laws:
            raise Mistake(f"filter-init: scheme={scheme!r} is none of {', '.join(SCHEMES)}{nearest(scheme, SCHEMES)}")
        found = torch.ones(m, d, dtype=torch.float64) if scheme == "constant" else normal(laws[scheme])
    if rescale:
        found = found * (math.sqrt(2 / d) / found.square().mean().sqrt().clamp_min(1e-300))
    return found.reshape(m, c, h, w)


def sample_patches(x: Float[Tensor, "n c h w"], size: Sequence[int], count: int, gen: Generator) -> Float[Tensor, "r d"]:
    """``count`` patches [r c*h*w] at random places of random maps; maps smaller than a patch get zeros below and to the right."""
    h, w = size
    x = F.pad(x, (0, max(w - x.shape[3], 0), 0, max(h - x.shape[2], 0)))
    n, y0, x0 = (torch.randint(top, (count,), generator=gen).to(x.device) for top in (len(x), x.shape[2] - h + 1, x.shape[3] - w + 1))
    rows, columns = y0[:, None, None] + torch.arange(h, device=x.device)[:, None], x0[:, None, None] + torch.arange(w, device=x.device)
    return x[n[:, None, None], :, rows, columns].permute(0, 3, 1, 2).flatten(1)


# -- the part --------------------------------------------------------------------------------------


@final
@dataclass
class FilterInit(Technique):
    """Draw the filters of the first convolution, or of those named by ``layers``, by a ``scheme`` before training; None is off.

    Laws: zeros, constant, uniform, normal, lecun, xavier, kaiming, orthogonal. Banks: gabor, dct. From up to ``images`` training images, without
    their labels: patches, pca-patches, kmeans, ica; a later layer learns from what it is given by the layers before it. "transferred" takes them
    from the run in the folder ``source``. ``rescale``: to Kaiming's variance. ``frozen``: the filters and their biases, set to 0, do not move.
    """

    scheme: str | None = "gabor"
    layers: tuple[str, ...] = ()
    rescale: bool = True
    frozen: bool = False
    images: int = 5000
    patches: int = 20_000
    source: str | None = None
    rank = 75  # after the parts that put layers in, and after he-init

    def __post_init__(self) -> None:
        if self.scheme not in (None, *SCHEMES):
            raise Mistake(f"filter-init: scheme={self.scheme!r} is none of {', '.join(SCHEMES)}{nearest(str(self.scheme), SCHEMES)}")
        if min(self.images, self.patches) < 1:
            raise Mistake(f"filter-init: images={self.images}, patches={self.patches}: at least one of each")
        if (self.source is None) == (self.scheme == "transferred"):
            raise Mistake(f"filter-init: scheme={self.scheme!r}, source={self.source!r}: 'transferred' names the folder of a run in source, and only it does")

    def chosen(self, run: Run) -> list[tuple[str, nn.Conv2d]]:
        """The convolutions that are drawn, in the network's order."""
        only = (self.layers,) if isinstance(self.layers, str) else self.layers
        found = [(name, m) for name, m in find(run.model, types=(nn.Conv2d,), only=only) if isinstance(m, nn.Conv2d)]
        if not found:
            what = f"no convolution named {', '.join(only)}" if only else "no convolution"
            raise Mistake(f"filter-init: the network {run.settings.model!r} has {what}; choose a convolutional network, or leave the part out")
        return found if only else found[:1]

    def on_start(self, run: Run) -> None:
        if self.scheme is None:
            return
        if run.settings.start is not None:
            raise Mistake(f"filter-init: would draw over the weights of --start {run.settings.start}; leave out one of the two")
        for name, conv in self.chosen(run):
            shape = conv.weight.shape
            if self.scheme == "transferred":
                weight = transferred(str(self.source), name, shape)
            else:
                patches = self.look(run, name, conv) if self.scheme in LEARNT else None
                weight = filters(self.scheme, shape, run.gen("filter-init", name), patches, self.rescale)
            with torch.no_grad():
                conv.weight.copy_(weight)
                if conv.bias is not None:
                    conv.bias.zero_()

    def look(self, run: Run, name: str, conv: nn.Conv2d) -> Float[Tensor, "r d"]:
        """Patches of what this convolution is given for training images, a group of channels at a time."""
        gen = run.gen("filter-init patches", name)
        rows = run.data.split.train
        rows = rows[torch.randperm(len(rows), generator=gen)[: self.images]]
        seen: list[Tensor] = []
        handle = conv.register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0]))
        found = []
        try:
            with run.aside():
                for part in rows.split(256):
                    run.model(run.normalise(run.plan.pixels(run.data.x.take(part))))
                    maps = seen.pop().unflatten(1, (conv.groups, -1)).flatten(0, 1)
                    found.append(sample_patches(maps, conv.kernel_size, -(-self.patches * len(part) // len(rows)), gen).double().cpu())
                    seen.clear()
        finally:
            handle.remove()
        return torch.cat(found)

    def on_grad(self, run: Run) -> None:
        if self.frozen and self.scheme is not None:
            for _, conv in self.chosen(run):
                for p in conv.parameters():
                    p.grad = None  # so that no optimiser moves or decays them


def transferred(source: str, name: str, shape: Sequence[int]) -> Tensor:
    """The filters called ``name`` of the network of a finished run."""
    from safetensors import SafetensorError, safe_open

    path, key = Path(source) / "model.safetensors", f"{name}.weight"
    try:
        with safe_open(path, framework="pt") as file:
            weight = file.get_tensor(key) if key in file.keys() else None  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise Mistake(
            f"filter-init: source={source!r}: no weights can be read there ({str(error).splitlines()[0]}); name the folder of a finished run"
        ) from error
    if weight is None or weight.shape != tuple(shape):
        have = "none of that name" if weight is None else f"of shape {tuple(weight.shape)}"
        raise Mistake(f"filter-init: source={source!r} has {have} for {name}, and shape {tuple(shape)} is needed; train the source with the same first layers")
    return weight
