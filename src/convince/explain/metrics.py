"""Metrics of maps: each with its paper's name and its direction; all take whole batches.

``faithfulness``, ``insertion`` and ``deletion`` watch the score as pixels come and go; ``sensitivity`` and ``randomisation`` ask the
explainer again, for changed images and for changed weights; ``entropy`` and ``file size`` look at the map alone. Where a region is
marked, see :mod:`convince.explain.localisation`; retraining (ROAR, KAR) is a study of its own, ``convince prove roar``.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.faithfulness import deletion, insertion
from convince.explain.many import rank_correlation
from convince.fit.randomness import generator

Maps = Callable[[nn.Module, Tensor, Tensor], Tensor]  # (answer, x, target) -> [n 1 h w]


@dataclass(frozen=True)
class Metric:
    """``measure(maps of (answer, x, target), found, answer, x, target)`` gives a number a row."""

    paper: str
    higher: bool  # is better
    again: bool  # does it ask the explainer again?
    unit: str
    measure: Callable[[Maps, Tensor, nn.Module, Tensor, Tensor], Float[Tensor, " n"]]


def entropy(found: Float[Tensor, "n 1 h w"]) -> Float[Tensor, " n"]:
    """Entropy [nats] of a map's absolute values as shares of their sum (Bhatt et al. 2020: complexity); ``log(h w)`` for an even or empty map."""
    sizes = found.abs().flatten(1).double()
    sizes = torch.where(sizes.sum(1, keepdim=True) > 0, sizes, 1.0)
    return torch.special.entr(sizes / sizes.sum(1, keepdim=True)).sum(1).to(found.dtype)


def file_size(found: Float[Tensor, "n 1 h w"]) -> Float[Tensor, " n"]:
    """Bytes of each map as an 8-bit grey PNG, level 9, scaled by its own least and largest value (Kakogeorgiou and Karantzalos 2021)."""
    from PIL import Image

    sizes = []
    for plane in found[:, 0].detach().float().cpu():
        low, high = plane.min(), plane.max()
        grey = ((plane - low) / (high - low) * 255).round() if high > low else torch.zeros_like(plane)
        packed = io.BytesIO()
        Image.fromarray(grey.to(torch.uint8).numpy()).save(packed, "PNG", compress_level=9)
        sizes.append(packed.tell())
    return torch.tensor(sizes, dtype=found.dtype)


def max_sensitivity(
    maps: Maps, found: Tensor, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"], samples: int = 10, radius: float = 0.02
) -> Float[Tensor, " n"]:
    """The largest ``|E(x + d) - E(x)| / |E(x)|`` over uniform ``d`` with ``|d|_inf <= radius`` [pixel value], pixels kept in [0, 1] (Yeh et al. 2019).

    Maps are brought to length 1 first, so that the network's own scale does not count. 0 for a map that nothing moves.
    """
    gen, worst = generator("max-sensitivity"), torch.zeros(len(x), dtype=found.dtype)
    plain = _unit(found)
    for _ in range(samples):
        away = (torch.rand(x.shape[1:], generator=gen) * 2 - 1).to(x) * radius
        moved = _unit(maps(answer, (x + away).clamp(0, 1), target))
        worst = torch.maximum(worst, (moved - plain).flatten(1).norm(dim=1).cpu())
    return worst


def _unit(found: Tensor) -> Tensor:
    return found / found.flatten(1).norm(dim=1).clamp_min(1e-12).view(-1, 1, 1, 1)


def shuffled(answer: nn.Module, seed: int = 0) -> nn.Module:
    """A copy whose weights of each parameter are put in random order: the same network with nothing learnt. Deterministic."""
    other = copy.deepcopy(answer)
    with torch.no_grad():
        for name, p in other.named_parameters():
            order = torch.randperm(p.numel(), generator=generator("shuffled", seed, name)).to(p.device)
            p.copy_(p.flatten()[order].view_as(p))
    return other


def randomisation(maps: Maps, found: Tensor, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Absolute rank correlation of a map with that of the network with shuffled weights (Adebayo et al. 2018, who draw them anew); 0 to 1, lower is better.

    A map that stays is an edge detector: it does not show what was learnt.
    """
    return rank_correlation(found, maps(shuffled(answer), x, target)).abs().to(found.dtype)


def against(maps: Maps, found: Tensor, other: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The same beside another answer, such as one trained on shuffled labels (Adebayo et al. 2018: data randomisation)."""
    return rank_correlation(found, maps(other, x, target)).abs().to(found.dtype)


METRICS: dict[str, Metric] = {
    "faithfulness": Metric(
        "insertion less deletion, after Petsiuk et al. 2018",
        True,
        False,
        "-1 to 1",
        lambda maps, found, answer, x, target: insertion(answer, x, found, target) - deletion(answer, x, found, target),
    ),
    "insertion": Metric("Petsiuk et al. 2018", True, False, "0 to 1", lambda maps, found, answer, x, target: insertion(answer, x, found, target)),
    "deletion": Metric("Petsiuk et al. 2018", False, False, "0 to 1", lambda maps, found, answer, x, target: deletion(answer, x, found, target)),
    "sensitivity": Metric("max-sensitivity, Yeh et al. 2019", False, True, "of the map's length", max_sensitivity),
    "randomisation": Metric("Adebayo et al. 2018", False, True, "|rank correlation|", randomisation),
    "entropy": Metric("complexity, Bhatt et al. 2020", False, False, "nats", lambda maps, found, answer, x, target: entropy(found)),
    "file size": Metric("Kakogeorgiou and Karantzalos 2021", False, False, "bytes", lambda maps, found, answer, x, target: file_size(found)),
}


def metric(name: str) -> Metric:
    """The metric called ``name``; a Mistake lists them."""
    from convince.errors import nearest

    if name not in METRICS:
        raise Mistake(f"--metric {name}: no such metric{nearest(name, list(METRICS))} There are: {', '.join(METRICS)}")
    return METRICS[name]
