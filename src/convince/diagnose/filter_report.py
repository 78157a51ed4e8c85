"""Filter report: whether the filters of each convolution differ from one another, are smooth, and are alive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.kinds import Probe
from convince.layers.surgery import find
from convince.parts import Card
from convince.types import Curves, Findings, Reading

CARD = Card(
    part="filter-report",
    kind="probe",
    paper="filter-design",
    title="On filter design in deep convolutional neural network",
    year=2022,
    url="https://arxiv.org/abs/2410.21644",
    departs=(
        "the survey names redundancy, dead filters and smoothness without formulas; those used are in the docstring of Filters",
        "it reads the weights alone, so the images given to it do not matter",
    ),
)
DEAD = 0.01  # of the layer's largest filter
TWIN = 0.95  # cosine


class Filters(NamedTuple):
    """What a set of filters [m c h w] is like. Filters shorter than 1 % of the longest are dead and count in ``norm``, ``dead`` and ``tv`` alone.

    ``norm``: mean length; ``cosine``: mean absolute cosine of two filters, 0 to 1; ``twins``: share with another at an absolute cosine above 0.95;
    ``dead``: share; ``rank``: ``exp`` of the entropy of the shares of squared singular values, at most ``min(m, c h w)``; ``first``: the largest
    share; ``tv``: mean absolute step between neighbouring taps over the mean absolute tap, small where filters are smooth.
    """

    norm: float
    cosine: float
    twins: float
    dead: float
    rank: float
    first: float
    tv: float


@torch.no_grad()
def filter_report(weight: Float[Tensor, "m c h w"]) -> Filters:
    """The numbers of :class:`Filters`, reckoned in float64."""
    weight = weight.detach().double()
    flat = weight.flatten(1)
    norms = flat.norm(dim=1)
    alive = flat[norms > DEAD * norms.max()]
    n = len(alive)
    cosines = (F.normalize(alive, dim=1) @ F.normalize(alive, dim=1).T).abs().clamp_max(1).fill_diagonal_(0)
    shares = torch.linalg.svdvals(alive).square() if n else flat.new_zeros(1)
    shares = shares / shares.sum().clamp_min(1e-300)
    steps = torch.cat([weight.diff(dim=2).abs().flatten(), weight.diff(dim=3).abs().flatten()])
    size = float(weight.abs().mean())
    return Filters(
        norm=float(norms.mean()),
        cosine=float(cosines.sum()) / max(n * (n - 1), 1),
        twins=float((cosines.amax(1) > TWIN).double().mean()) if n else 0.0,
        dead=1 - n / len(flat),
        rank=float(torch.special.entr(shares).sum().exp()) if n else 0.0,
        first=float(shares.max()),
        tv=float(steps.mean()) / size if len(steps) and size else 0.0,
    )


@final
@dataclass
class FilterReport(Probe):
    """Seven numbers for every convolution, or for those whose names fit ``layers`` (such as ``"conv1"`` or ``"layer3.*"``)."""

    layers: tuple[str, ...] = ()

    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        network = getattr(answer, "model", answer)
        only = (self.layers,) if isinstance(self.layers, str) else self.layers
        found = find(network, types=(nn.Conv2d,), only=only)
        if not found:
            what = f"no convolution named {', '.join(only)}" if only else "no convolution"
            raise Mistake(f"filter-report: {type(network).__name__} has {what}; it reads the filters of a convolutional network such as resnet20")
        readings: list[Reading] = []
        curves: dict[str, list[tuple[float, float]]] = {}
        for depth, (name, conv) in enumerate(found, 1):
            report = filter_report(conv.weight)  # type: ignore[arg-type]
            rows = (
                ("mean length", report.norm, ""),
                ("mean absolute cosine", report.cosine, "0 to 1"),
                (f"near twins, cosine above {TWIN:g}", report.twins, "share of filters"),
                ("dead", report.dead, "share of filters"),
                ("effective rank", report.rank, f"of {min(len(conv.weight), conv.weight[0].numel())}"),  # type: ignore[arg-type, index]
                ("energy of the first component", report.first, "share"),
                ("total variation", report.tv, "of the mean absolute tap"),
            )
            readings += [Reading(f"{name}: {what}", value, unit) for what, value, unit in rows]
            shares = {"|cosine|": report.cosine, "dead": report.dead, "twins": report.twins, "first comp.": report.first}
            for what, value in shares.items():
                curves.setdefault(what, []).append((float(depth), value))
        return Findings(readings, [Curves("Filters by depth", "convolution", "share", curves)])
