"""Evidence: what a comparison found, as one object, as JSON, and as sentences a person can quote."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from convince.comparison.statistics import Verdict

POINTS = {"share": (100, "points"), "nats": (1, "nats"), "bytes": (1, "bytes"), "ms": (1, "ms")}


@dataclass(frozen=True)
class Finding:
    """One change against the baseline. Differences are change minus baseline in the metric's own unit.

    ``interval`` has the comparison's confidence (95 %) for this change alone; ``p_corrected`` allows for the number of
    changes and of looks. ``detectable`` is what these pairs could have shown with 80 % power; ``share`` that of initial
    weights in common; ``inside`` the posterior probability that the difference lies inside the margin.
    """

    change: str
    kind: str
    n: int
    baseline_mean: float
    change_mean: float
    difference: float
    interval: tuple[float, float]
    sd: float
    p: float
    p_flip: float
    p_corrected: float
    inside: float
    detectable: float
    margin: float
    verdict: Verdict
    higher_is_better: bool
    cost: dict[str, dict[str, float | None]]
    seeds: list[int]
    differences: list[float]
    metrics: dict[str, dict[str, float]]  # name -> {"baseline", "change", "difference", "low", "high"}
    curves: dict[str, list[list[list[float | None]]]] = field(default_factory=dict, repr=False)
    share: float | None = None
    note: str = ""
    out: str = ""  # why it left the race before the last pair

    def sentence(self, metric: str, unit: str) -> str:
        """The verdict in one sentence that stands alone."""
        scale, word = POINTS[unit]
        half = (self.interval[1] - self.interval[0]) / 2 * scale
        size = f"{self.difference * scale:+.{digits(half)}f} ± {half:.{digits(half)}f} {word} of {metric}" if math.isfinite(half) else "no interval yet"
        times = f"{clock(self.cost['change']['seconds'])} a run against {clock(self.cost['baseline']['seconds'])}"
        margin = f"±{self.margin * scale:.{digits(self.margin * scale)}f} {word}"
        words: dict[Verdict, str] = {
            "better": "better",
            "worse": "worse",
            "equivalent": f"equivalent within {margin}",
            "not decided": f"not decided; {self.n} pairs show {self.detectable * scale:.{digits(self.detectable * scale)}f} {word} or more"
            if math.isfinite(self.detectable)
            else "not decided",
        }
        small = f", but by less than {margin}" if self.verdict in ("better", "worse") and self.inside >= 0.95 else ""
        return f"{self.change}: {size}, n = {self.n}, {words[self.verdict]}{small} (p = {self.p_corrected:.2g} corrected); {times}"


@dataclass(frozen=True)
class Evidence:
    """The whole comparison: findings ranked by their difference (best first), changes that could not be tried, and how it was done."""

    baseline: str
    metric: str
    unit: str
    budget: dict[str, Any]
    changes: list[Finding]
    refused: list[dict[str, str]]
    alpha: float
    looks: list[int]
    data: dict[str, Any]
    settings: dict[str, Any]
    notes: list[str]
    seconds: float
    overhead: float  # share of the time of all hands that no arm was trained in
    environment: dict[str, Any]
    command: str = ""
    folder: Path | None = None

    def __getitem__(self, change: str) -> Finding:
        """The finding of a change, by its text."""
        return next(f for f in self.changes if f.change == change)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; numbers that are not finite are null."""
        out = asdict(self)
        out["folder"] = None if self.folder is None else str(self.folder)
        return finite(out)

    def sentences(self) -> list[str]:
        """One a change, best first, then what could not be tried."""
        lines = [f.sentence(self.metric, self.unit) for f in self.changes]
        return lines + [f"{row['change']}: not tried; {row['reason']}" for row in self.refused]

    def __str__(self) -> str:
        return "\n".join([*self.notes, *self.sentences()])


def digits(size: float) -> int:
    """Decimals that show two significant figures of this size."""
    return 2 if not math.isfinite(size) or size <= 0 else min(max(0, 1 - math.floor(math.log10(size))), 6)


def clock(seconds: float | None) -> str:
    """41 s, 3.2 min."""
    if seconds is None:
        return "?"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def finite(value: Any) -> Any:
    """The same in plain JSON: infinities and NaN become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return value
