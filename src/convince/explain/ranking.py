"""Ranking: which explainers tell the truth about this model on these images, beside two maps that know nothing."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.many import explain_all
from convince.explain.metrics import against, metric
from convince.fit.precision import Plan
from convince.fit.randomness import generator
from convince.kinds import Explainer, as_found
from convince.types import Explanation

CONTROLS = ("random", "centre")


@final
@dataclass
class RandomMap(Explainer):
    """A map of even noise, the same for every image: what a ranking must beat."""

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        noise = torch.rand(1, 1, *x.shape[2:], generator=generator("random map"))
        return Explanation(noise.to(x).expand(len(x), -1, -1, -1))


@final
@dataclass
class CentreMap(Explainer):
    """A bell in the middle of the picture: what a map gains by knowing where objects usually are."""

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        rows, columns = (torch.linspace(-1, 1, side).square() for side in x.shape[2:])
        return Explanation(torch.exp(-2 * (rows[:, None] + columns[None])).to(x).expand(len(x), 1, -1, -1))


@dataclass
class Row:
    """One method: its seconds an image, and for each metric the mean, the 95 % half-width over images, and every image's value.

    ``over_random``: faithfulness less the random map's, mean and half-width over images in pairs. ``error``: why it has no values.
    """

    method: str
    seconds: float = 0.0
    means: dict[str, float] = field(default_factory=dict)
    half: dict[str, float] = field(default_factory=dict)
    values: dict[str, Float[Tensor, " n"]] = field(default_factory=dict)
    over_random: tuple[float, float] | None = None
    error: str = ""
    said: dict[str, object] = field(default_factory=dict)


def rank(
    methods: Mapping[str, Explainer],
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    target: Int[Tensor, " n"],
    metrics: tuple[str, ...] = ("faithfulness", "insertion", "deletion", "entropy"),
    *,
    plan: Plan | None = None,
    other: nn.Module | None = None,
    patience: float = math.inf,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Row]:
    """A row a method and two controls, the best ``metrics[0]`` first; methods that cannot serve this answer come last with their reason.

    ``other``: a further answer; ``against`` is then the absolute rank correlation of the maps of the two. Metrics that ask the explainer
    again take the first 8 images. ``patience`` [s]: a method whose first image takes longer is left out, with that reason.
    """
    known = {name: metric(name) for name in metrics}
    tried: dict[str, Explainer] = {**methods, "random": RandomMap(), "centre": CentreMap()}
    rows = []
    for name, explainer in tried.items():
        progress(name)
        try:
            began = time.perf_counter()
            trial = explainer(answer, x[:1], target[:1])
            took = time.perf_counter() - began
            if trial.map is None:
                raise Mistake(f"{name} gives no map to score")
            if took > patience:
                raise Mistake(f"one image takes {took:.0f} s, more than {patience:g} s; name it by --method to have it scored")
            began = time.perf_counter()
            found = explain_all(explainer, answer, x, target, plan=plan)
        except Mistake as mistake:
            rows.append(Row(name, error=str(mistake)))
            continue
        row = Row(name, (time.perf_counter() - began) / len(x), said=found.table)
        rows.append(row)
        assert found.map is not None

        def maps(model: nn.Module, pixels: Tensor, wanted: Tensor, explainer: Explainer = explainer) -> Tensor:
            again = explainer(model, pixels, wanted).map
            assert again is not None
            return again

        with as_found(answer):
            for key, how in known.items():
                few = slice(0, 8) if how.again else slice(None)
                row.values[key] = how.measure(maps, found.map[few], answer, x[few], target[few]).detach().double().cpu()
            if other is not None:
                row.values["against"] = against(maps, found.map[:8], other, x[:8], target[:8]).double().cpu()
        for key, values in row.values.items():
            row.means[key], row.half[key] = _mean(values)
    control = next(row for row in rows if row.method == "random")
    for row in rows:
        if "faithfulness" in row.values and row is not control and "faithfulness" in control.values:
            row.over_random = _mean(row.values["faithfulness"] - control.values["faithfulness"])
    first = metrics[0]
    sign = -1 if known[first].higher else 1
    return sorted(rows, key=lambda row: (bool(row.error), sign * row.means.get(first, math.inf)))


def _mean(values: Tensor) -> tuple[float, float]:
    """Mean and the half-width of its 95 % t interval; endless for one value."""
    from scipy.stats import t

    n = len(values)
    half = float(t.ppf(0.975, n - 1)) * float(values.std()) / math.sqrt(n) if n > 1 else math.inf
    return float(values.mean()), half
