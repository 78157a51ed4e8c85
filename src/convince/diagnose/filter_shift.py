"""Filter shift: which 3x3 layers are sparse, random or all alike, and how far their kernels drift from layer to layer or from network to network."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.kinds import Probe
from convince.parts import Card
from convince.types import Curves, Findings, Reading

CARD = Card(
    part="filter-shift",
    kind="probe",
    paper="cnn-filter-db",
    title="CNN Filter DB: An Empirical Investigation of Trained Convolutional Filters",
    year=2022,
    url="https://arxiv.org/abs/2203.15331",
    departs=(
        "the paper prints no bounds for sparse layers and for those of low diversity; half of the kernels and half of the random threshold are ours",
        "copies of one kernel with little noise count as low diversity, though centring leaves only the noise, whose entropy is that of random kernels",
        "beside each drift stands that of the same kernels shuffled between the two layers, since few kernels drift far by chance alone",
        "coefficients are in the basis of the two layers compared; the paper's are in that of all 1.4 billion kernels of its database",
        "it reads the weights alone, so the images given to it do not matter; the database itself is neither read nor written",
    ),
)
SIDE = 3
VERDICTS = ("sparse", "random", "low diversity", "too few", "sound")
ALIVE = 0.01  # eps_0: a kernel below this share of the layer's largest weight is dead
SPARSE = 0.5  # share of dead kernels from which a layer is sparse
LOW = 0.5  # of the random threshold, below which a layer's diversity is low
SPREAD = 0.01  # share of the weights' energy around the mean kernel, below which they are copies of it
MOST = 20_000  # kernels of a layer that drift is reckoned from


class Kernels(NamedTuple):
    """The 3x3 kernels of one convolution, one for each pair of channels it joins; ``depth`` from 1; ``depthwise``: each channel has its own filter."""

    name: str
    depth: int
    depthwise: bool
    weight: Float[Tensor, "n 3 3"]


@torch.no_grad()
def extract_filters(model: nn.Module) -> list[Kernels]:
    """The kernels of every 3x3 convolution in the order of the network's modules, as float64 copies."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (SIDE, SIDE)]
    return [
        Kernels(name, depth, conv.groups == conv.in_channels > 1, conv.weight.detach().double().cpu().reshape(-1, SIDE, SIDE).clone())
        for depth, (name, conv) in enumerate(found, 1)
    ]


# -- degenerate layers -------------------------------------------------------------------------------


def sparsity(kernels: Float[Tensor, "n 3 3"]) -> float:
    """The share of kernels of which every weight is below 1 % of the layer's largest, 0 to 1."""
    size = kernels.abs()
    return float((size.amax((1, 2)) < ALIVE * size.max()).double().mean()) if bool(size.any()) else 1.0


def variance_entropy(kernels: Float[Tensor, "n 3 3"]) -> float:
    """``H = -sum_i p_i log10 p_i`` of the explained-variance ratios ``p`` of the centred kernels: from 0 (one pattern) to log10 9 = 0.954."""
    flat = kernels.flatten(1).double()
    variance = torch.linalg.svdvals(flat - flat.mean(0)).square()
    total = variance.sum()
    return float(torch.special.entr(variance / total).sum()) / math.log(10) if total > 0 else 0.0


FITTED = (1.2618047, 2.30436435, 0.88767525, -0.31050834)


def entropy_threshold(n: float, fitted: Sequence[float] = FITTED) -> float:
    """``T_H(n) = L / (1 + exp(-k (log2 n - x0))) + b``: the least entropy seen in layers of ``n`` random kernels; ``fitted`` is (L, x0, k, b)."""
    top, middle, steepness, base = fitted
    return top / (1 + math.exp(-steepness * (math.log2(n) - middle))) + base


def fit_threshold(counts: Sequence[int], draws: int, gen: Generator) -> tuple[float, float, float, float]:
    """(L, x0, k, b) of :func:`entropy_threshold`, fitted anew to the least entropy of ``draws`` layers of each number of normal kernels."""
    from scipy.optimize import curve_fit

    least = [min(variance_entropy(torch.randn(n, SIDE, SIDE, generator=gen, dtype=torch.float64)) for _ in range(draws)) for n in counts]

    def law(n: np.ndarray, *fitted: float) -> np.ndarray:
        return np.array([entropy_threshold(float(one), fitted) for one in n])

    found, _ = curve_fit(law, np.array(counts, np.float64), least, p0=FITTED, maxfev=20_000)
    return tuple(map(float, found))  # type: ignore[return-value]


def verdict(kernels: Float[Tensor, "n 3 3"]) -> str:
    """One of :data:`VERDICTS`, in this order: half of the kernels dead; no more kernels than taps, of which entropy says nothing; the spread around the
    mean kernel, or the entropy, is low; the entropy reaches that of random kernels; none of these."""
    if sparsity(kernels) >= SPARSE:
        return "sparse"
    if len(kernels) <= SIDE * SIDE:
        return "too few"
    spread = float((kernels - kernels.mean(0)).square().sum() / kernels.square().sum())
    entropy, threshold = variance_entropy(kernels), entropy_threshold(len(kernels))
    if spread < SPREAD or entropy < LOW * threshold:
        return "low diversity"
    return "random" if entropy >= threshold else "sound"


# -- drift -------------------------------------------------------------------------------------------


def scaled(kernels: Float[Tensor, "n 3 3"]) -> Float[Tensor, "n 9"]:
    """Each kernel divided by its own largest absolute weight, flattened; kernels of zeros as they are."""
    flat = kernels.flatten(1).double()
    size = flat.abs().amax(1, keepdim=True)
    return flat / torch.where(size > 0, size, 1.0)


class Basis(NamedTuple):
    """Principal components of kernels: ``mean``, ``components`` in rows, the largest first, and the share of the variance that each explains."""

    mean: Float[Tensor, " 9"]
    components: Float[Tensor, "k 9"]
    explained: Float[Tensor, " k"]

    def coefficients(self, flat: Float[Tensor, "n 9"]) -> Float[Tensor, "n k"]:
        """``c``: the kernels in this basis."""
        return (flat - self.mean) @ self.components.T


def principal(flat: Float[Tensor, "n 9"]) -> Basis:
    """The :class:`Basis` of scaled kernels, by singular value decomposition; a component's largest entry is positive."""
    mean = flat.mean(0)
    _, s, components = torch.linalg.svd(flat - mean, full_matrices=False)
    components = components * components.gather(1, components.abs().argmax(1, keepdim=True)).sign()
    variance = s.square()
    return Basis(mean, components, variance / variance.sum().clamp_min(1e-300))


def filter_shift(a: Float[Tensor, "n 3 3"], b: Float[Tensor, "m 3 3"], reference: Float[Tensor, "r 3 3"] | None = None, bins: int = 70) -> float:
    """``D = sum_i a_i (KL(h_i | g_i) + KL(g_i | h_i))`` [nat]: drift between the histograms of two sets' coefficients, weighted by explained variance.

    The basis is that of ``reference``, or of both sets together. Histograms are densities over one range for all coefficients, whose empty bins are
    set to the smallest step of float32 before they are normalised. 0 for equal sets, symmetric; grows where kernels are few (source: the authors' code).
    """
    if not len(a) or not len(b):
        raise Mistake("filter_shift: both sets need at least one kernel")
    one, two = scaled(a), scaled(b)
    basis = principal(torch.cat([one, two]) if reference is None else scaled(reference))
    u, v = basis.coefficients(one), basis.coefficients(two)
    low, high = float(min(u.min(), v.min())), float(max(u.max(), v.max()))
    if high <= low:
        return 0.0
    p, q = (_histograms(c, low, high, bins) for c in (u, v))
    return float((basis.explained * ((p - q) * (p.log() - q.log())).sum(1)).sum())


def _histograms(c: Float[Tensor, "n k"], low: float, high: float, bins: int) -> Float[Tensor, "k bins"]:
    """A row of probabilities a component, none of them 0."""
    width = (high - low) / bins
    place = ((c - low) / width).long().clamp_max(bins - 1) + bins * torch.arange(c.shape[1], device=c.device)
    density = torch.bincount(place.flatten(), minlength=bins * c.shape[1]).reshape(c.shape[1], bins).double() / (len(c) * width)
    density[density == 0] = torch.finfo(torch.float32).eps
    return density / density.sum(1, keepdim=True)


def chance(a: Float[Tensor, "n 3 3"], b: Float[Tensor, "m 3 3"], gen: Generator) -> float:
    """:func:`filter_shift` after the kernels of both sets are shuffled between them: what two sets of these numbers drift without any reason."""
    both = torch.cat([a, b])
    both = both[torch.randperm(len(both), generator=gen)]
    return filter_shift(both[: len(a)], both[len(a) :])


# -- the probe ---------------------------------------------------------------------------------------


@final
@dataclass
class FilterShift(Probe):
    """How many 3x3 layers have each verdict; of every layer its sparsity, its entropy, that over the random threshold; its drift from the layer before."""

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        network = getattr(answer, "model", answer)
        layers = extract_filters(network)
        if not layers:
            raise Mistake(f"filter-shift: {type(network).__name__} has no 3x3 convolution; it reads the kernels of a network such as resnet20")
        given = [verdict(layer.weight) for layer in layers]
        readings = [Reading(f"layers: {word}", float(given.count(word)), f"of {len(layers)}") for word in VERDICTS]
        entropy: dict[str, list[tuple[float, float]]] = {"entropy": [], "random": [], "sparsity": []}
        drift: dict[str, list[tuple[float, float]]] = {"drift": [], "by chance": []}
        before: Tensor | None = None
        for layer in layers:
            h, t, s = variance_entropy(layer.weight), entropy_threshold(len(layer.weight)), sparsity(layer.weight)
            readings += [Reading(f"{layer.name}: sparsity", s, "share of kernels"), Reading(f"{layer.name}: variance entropy", h, "of 0.954")]
            if len(layer.weight) > SIDE * SIDE:
                readings.append(Reading(f"{layer.name}: entropy over that of random kernels", h / t, "1 is random"))
            for word, value in zip(entropy, (h, t, s), strict=True):
                entropy[word].append((float(layer.depth), value))
            drawn = layer.weight[torch.randperm(len(layer.weight), generator=generator("filter-shift", layer.name))[:MOST]]
            if before is not None:
                far, null = filter_shift(before, drawn), chance(before, drawn, generator("filter-shift", "chance", layer.name))
                readings += [Reading(f"{layer.name}: drift from the layer before", far, "nat"), Reading(f"{layer.name}: drift by chance", null, "nat")]
                drift["drift"].append((float(layer.depth), far))
                drift["by chance"].append((float(layer.depth), null))
            before = drawn
        figures = [Curves("Diversity of 3x3 kernels by depth", "convolution", "entropy, share", entropy)]
        if before is not None and drift["drift"]:
            figures.append(Curves("Drift of 3x3 kernels from the layer before", "convolution", "nat", drift))
        return Findings(readings, figures)
