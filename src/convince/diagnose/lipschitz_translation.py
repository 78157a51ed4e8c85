"""Lipschitz translation: how far the features of each layer move when an image does, is shifted or is bent, beside what theory allows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.backbones.frame_scattering import Bank, FrameScattering, response
from convince.backbones.maps import feature_maps, info
from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.kinds import Probe, as_found
from convince.parts import Card
from convince.types import Curves, Findings, Reading

CARD = Card(
    part="lipschitz-translation",
    kind="probe",
    paper="deep-conv-feature-theory",
    title="A Mathematical Theory of Deep Convolutional Neural Networks for Feature Extraction",
    year=2015,
    url="https://arxiv.org/abs/1512.06293",
    expects=("images",),
    tiny={"shifts": (1,), "bends": (0.5,)},
    departs=(
        "images go round at their edges when they are shifted, as the theory's circular grid does; a camera would show new content",
        "bounds are proven for fixed filters that satisfy the paper's condition; of a trained network the numbers are measured on the images given",
        "bends are smooth random displacements; the constant of the paper's bound for them is not given, so they are told beside their size alone",
    ),
)

Features = Callable[[Tensor], list[Tensor]]


def features_of(answer: nn.Module) -> tuple[Features, list[str], nn.Module]:
    """The features of each layer of the network inside an answer, their names, and what brings [0, 1] pixels to the network's input.

    Of :class:`FrameScattering` its layers, of networks with ``feature_info`` those maps, of others the scores.
    """
    network, normalise = getattr(answer, "model", answer), getattr(answer, "normalise", nn.Identity())
    if isinstance(network, FrameScattering):
        return network.scatter, [f"layer {n}" for n in range(len(network.layers))], normalise
    if info(network):
        return lambda x: list(feature_maps(network, x).values()), [row["module"] for row in info(network)], normalise
    return lambda x: [network(x)], ["scores"], normalise


def lengths(u: Tensor) -> Float[Tensor, " n"]:
    """The Euclidean length of each row, real or complex, in float64."""
    return u.flatten(1).abs().double().square().sum(1).sqrt()


def lipschitz_ratio(phi: Features, f: Tensor, h: Tensor) -> Float[Tensor, " n"]:
    """``|Phi(f) - Phi(h)| / |f - h|`` over all layers together; at most 1 under the paper's admissibility condition. NaN for equal images."""
    squares = [lengths(a - b).square() for a, b in zip(phi(f), phi(h), strict=True)]
    return torch.stack(squares).sum(0).sqrt() / lengths(f - h)


class Curve(NamedTuple):
    """How far features moved, [layer n]: ``absolute`` over the length of the image, ``relative`` over that of the layer's features (0 where these are 0).

    Deeper layers hold less energy, so that ``absolute`` falls with depth of itself; ``relative`` does not.
    """

    absolute: Float[Tensor, "layers n"]
    relative: Float[Tensor, "layers n"]


def moved(phi: Features, f: Tensor, changed: Tensor) -> Curve:
    """The change of every layer's features from ``f`` to ``changed``."""
    before, after = phi(f), phi(changed)
    steps = torch.stack([lengths(a - b) for a, b in zip(after, before, strict=True)])
    sizes = torch.stack([lengths(b) for b in before])
    return Curve(steps / lengths(f).clamp_min(1e-300), torch.where(sizes > 0, steps / sizes.clamp_min(1e-300), 0.0))


def translate(f: Float[Tensor, "n c h w"], shift: tuple[int, int]) -> Float[Tensor, "n c h w"]:
    """``T_t f``: moved down and right by whole pixels, going round."""
    return f.roll(shift, (2, 3))


def translation_curve(phi: Features, f: Float[Tensor, "n c h w"], shift: tuple[int, int]) -> Curve:
    """``|Phi_n(T_t f) - Phi_n(f)|`` of each layer (the left side of Theorem 1)."""
    return moved(phi, f, translate(f, shift))


def decay(bank: Bank, plane: tuple[int, int], divided_by: float = 1.0) -> float:
    """``K``: the largest ``|chi^(w)| |w|``, ``w`` in cycles a pixel (the decay condition of Theorem 1)."""
    w = np.hypot(*np.meshgrid(*(np.fft.fftfreq(side) for side in plane), indexing="ij"))
    return float((np.abs(response(bank.atom[None], plane)[0]) / divided_by * w).max())


def translation_bound(shift: tuple[int, int], k: float, strides: Sequence[int]) -> float:
    """``2 pi |t| K / (S_1 ... S_n)``: the most that ``absolute`` of layer ``n`` may be (Theorem 1; taking every S-th value can exceed it a little)."""
    return 2 * math.pi * math.hypot(*shift) * k / math.prod(strides)


def bend(f: Float[Tensor, "n c h w"], tau: float, gen: Generator, omega: float = 0.0) -> Tensor:
    """``F f(x) = e^{2 pi i w(x)} f(x - t(x))`` by a smooth random ``t`` with largest length ``tau`` [pixels] and ``w`` with largest value ``omega``.

    Complex where ``omega`` is not 0. Between pixels bilinear; beyond the edges what is there continues.
    """
    n, _, h, w = f.shape
    coarse = torch.rand(n, 3, 4, 4, generator=gen).to(f) * 2 - 1
    field = F.interpolate(coarse, (h, w), mode="bicubic", align_corners=True)
    t, phase = field[:, :2], field[:, 2:]
    t = t * (tau / t.norm(dim=1).amax((1, 2)).clamp_min(1e-12))[:, None, None, None]
    rows, columns = torch.meshgrid(torch.arange(h).to(f), torch.arange(w).to(f), indexing="ij")
    places = torch.stack([2 * (columns - t[:, 1]) / max(w - 1, 1) - 1, 2 * (rows - t[:, 0]) / max(h - 1, 1) - 1], -1)
    bent = F.grid_sample(f, places, mode="bilinear", padding_mode="border", align_corners=True)
    if omega == 0:
        return bent
    phase = phase * (omega / phase.abs().amax((1, 2, 3)).clamp_min(1e-12))[:, None, None, None]
    return bent * torch.polar(torch.ones_like(phase), 2 * math.pi * phase)


def deformation_curve(phi: Features, f: Float[Tensor, "n c h w"], tau: float, gen: Generator, omega: float = 0.0) -> Curve:
    """The change under :func:`bend` (the left side of Theorem 2); ``omega`` needs features of complex images, as :func:`scatter` has."""
    return moved(phi, f, bend(f, tau, gen, omega))


@final
@dataclass
class LipschitzTranslation(Probe):
    """The largest ratio over pairs of images and over images with ``noise``; by layer the median change under ``shifts`` and ``bends`` [pixels].

    Lengths are those of the network's input, after normalisation. "share" is of the layer's features before the change.
    """

    shifts: tuple[int, ...] = (1, 2, 4)
    bends: tuple[float, ...] = (0.5, 1.0)
    noise: float = 0.1

    def __post_init__(self) -> None:
        if not self.noise > 0 or not all(isinstance(s, int) and s >= 1 for s in self.shifts) or not all(b > 0 for b in self.bends):
            raise Mistake(f"lipschitz-translation: shifts={self.shifts}, bends={self.bends}, noise={self.noise}: whole pixels from 1, pixels above 0, above 0")

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        if x.dim() != 4 or len(x) < 2:
            raise Mistake(f"lipschitz-translation looks at images [n c h w], at least two, and the input has shape {tuple(x.shape)}")
        phi, names, normalise = features_of(answer)
        with as_found(answer), torch.no_grad():
            f = normalise(x)
            noisy = f + self.noise * torch.randn(f.shape, generator=generator("lipschitz-translation", "noise")).to(f)
            pairs = lipschitz_ratio(phi, f, f.roll(1, 0))
            readings = [
                Reading("largest ratio, two images", float(pairs[pairs.isfinite()].max()) if bool(pairs.isfinite().any()) else 0.0, "features a unit of input"),
                Reading(f"largest ratio, noise of {self.noise:g}", float(lipschitz_ratio(phi, f, noisy).max()), "features a unit of input"),
            ]
            curves = {f"shifted by {s} px": translation_curve(phi, f, (0, s)) for s in self.shifts}
            curves |= {f"bent by {b:g} px": deformation_curve(phi, f, b, generator("lipschitz-translation", "bend")) for b in self.bends}
        drawn: dict[str, list[tuple[float, float]]] = {}
        for what, curve in curves.items():
            drawn[what] = [(float(i), float(relative.median())) for i, relative in enumerate(curve.relative, 1)]
            for name, absolute, relative in zip(names, curve.absolute, curve.relative, strict=True):
                readings.append(Reading(f"{name}: {what}", float(relative.median()), "share"))
                readings.append(Reading(f"{name}: {what}, of the input", float(absolute.median()), "share of the input's length"))
        return Findings(readings, [Curves("Change of features by layer", "layer", "share of the layer's features", drawn)])
