"""The page of a comparison: what helps, by how much, how sure that is, and what it costs."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import yaml

from convince.comparison.evidence import POINTS, Evidence, Finding, clock, digits
from convince.report import put, units
from convince.report.page import fill
from convince.report.paired import Row, differences, two_arms

HEADINGS = {
    "findings": "What helps",
    "curves": "Learning curves",
    "cost": "Cost",
    "beside": "Other metrics",
    "how": "How it was tested",
    "repeat": "To repeat it",
}


def write_comparison(path: Path, found: Evidence) -> Path:
    """Write ``compare.html`` and return its path."""
    return put(path, fill("compare.html", view(found)))


def view(found: Evidence) -> dict[str, Any]:
    """What the template prints: every number already in words, every figure drawn."""
    scale, word = POINTS[found.unit]
    rows = [
        Row(
            f.change,
            f.difference * scale,
            f.interval[0] * scale if math.isfinite(f.interval[0]) else None,
            f.interval[1] * scale if math.isfinite(f.interval[1]) else None,
            [d * scale for d in f.differences],
            f.verdict,
            size(f, scale),
        )
        for f in found.changes
    ]
    margin = found.changes[0].margin * scale
    return {
        "headings": HEADINGS,
        "lede": lede(found),
        "e": found,
        "metric": found.metric,
        "word": word,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "data": found.data,
        "sentences": found.sentences(),
        "forest": differences(rows, margin=margin, unit=word, higher=found.changes[0].higher_is_better),
        "table": [table_row(f, scale) for f in found.changes],
        "margin": f"{margin:.{digits(margin)}f}",
        "keys": keys(found),
        "curves": [(f, *curves(f)) for f in found.changes if f.curves],
        "costs": [
            ("baseline", cost(found.changes[0].cost["baseline"], None)),
            *((f.change, cost(f.cost["change"], f.cost["baseline"])) for f in found.changes),
        ],
        "shares": [(f.change, f.share, f.note) for f in found.changes if f.share is not None],
        "beside": [(f.change, beside(f)) for f in found.changes],
        "environment": [
            *((k, v) for k, v in found.environment.items() if not isinstance(v, dict) and k != "command"),
            *found.environment.get("versions", {}).items(),
        ],
        "settings": yaml.safe_dump(found.settings, sort_keys=False, allow_unicode=True),
        "clock": clock,
    }


def lede(found: Evidence) -> str:
    """The headline: what was found, in one sentence."""
    better = [f.change for f in found.changes if f.verdict == "better"]
    worse = [f.change for f in found.changes if f.verdict == "worse"]
    n = min(f.n for f in found.changes)
    where = "/".join(Path(found.data["origin"]).parts[-2:]).lstrip("/") or found.data["origin"]
    if better:
        return f"On {where}, {join(better)} {'help' if len(better) > 1 else 'helps'}{f', and {join(worse)} did harm' if worse else ''}."
    if worse:
        return f"On {where}, {join(worse)} did harm, and nothing tried was shown to help."
    if all(f.verdict == "equivalent" for f in found.changes):
        scale, word = POINTS[found.unit]
        margin = max(f.margin for f in found.changes) * scale
        return f"On {where}, {join([f.change for f in found.changes])} made a difference of less than {margin:.{digits(margin)}f} {word}."
    return f"On {where}, {n} pairs of runs do not decide whether {join([f.change for f in found.changes])} {'help' if len(found.changes) > 1 else 'helps'}."


def join(names: list[str]) -> str:
    """a; a and b; a, b and c; more than four are counted."""
    if len(names) > 4:
        return f"{', '.join(names[:3])} and {len(names) - 3} others"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def size(f: Finding, scale: float) -> str:
    """+0.4 ± 0.3"""
    half = (f.interval[1] - f.interval[0]) / 2 * scale
    if not math.isfinite(half):
        return f"{f.difference * scale:+.2f}".replace("-", "−")
    return f"{f.difference * scale:+.{digits(half)}f} ± {half:.{digits(half)}f}".replace("-", "−")


def table_row(f: Finding, scale: float) -> dict[str, Any]:
    """One line of the table of findings."""
    detectable = f.detectable * scale
    return {
        "change": f.change,
        "verdict": f.verdict,
        "size": size(f, scale),
        "value": f.difference,
        "n": f.n,
        "p": f"{f.p_corrected:.2g}",
        "p_flip": f"{f.p_flip:.2g}",
        "inside": units.percent(f.inside),
        "detectable": f"{detectable:.{digits(detectable)}f}" if math.isfinite(detectable) else units.NONE,
        "seconds": clock(f.cost["change"]["seconds"]),
        "against": clock(f.cost["baseline"]["seconds"]),
        "out": f.out.removeprefix(f.verdict).strip(),
    }


def keys(found: Evidence) -> list[tuple[str, str, str]]:
    """The figures under the headline."""
    budget = found.budget
    rows = found.data["rows"]
    return [
        ("Pairs of runs", str(max(f.n for f in found.changes)), "each pair shares split, weights and order"),
        ("Budget of a run", units.short(budget["images"]), "images through the network"),
        ("Tested on", units.count(rows["test"]), "samples in each run" + (", the same in all" if found.data["test_is_fixed"] else "")),
        ("Trained on", units.count(min(rows["train"], found.data["samples"] or rows["train"])), "samples in each run"),
        ("Took", units.duration(found.seconds), f"{units.percent(found.overhead)} beside the runs"),
    ]


def curves(f: Finding) -> tuple[str, str]:
    """Validation accuracy and training loss of both arms."""
    a, b = f.curves["baseline"], f.curves["change"]
    return (
        two_arms(a, b, column=2, title="Validation accuracy", as_percent=True),
        two_arms(a, b, column=1, title="Training loss", as_percent=False),
    )


def cost(row: dict[str, float | None], against: dict[str, float | None] | None) -> list[tuple[str, str]]:
    """(value, ratio to the baseline) of seconds, images, operations and memory."""
    out = []
    for name, write in (("seconds", clock), ("images", units.count), ("operations", operations), ("peak_bytes", units.size)):
        value, base = row[name], against[name] if against else None
        ratio = f"{value / base:.2f}×" if value is not None and base else ""
        out.append((write(value) if value is not None else units.NONE, ratio))
    return out


def operations(value: float) -> str:
    """1.3 Tflop"""
    for size, word in ((1e15, "Pflop"), (1e12, "Tflop"), (1e9, "Gflop"), (1e6, "Mflop")):
        if value >= size:
            return f"{value / size:.3g}{units.GAP}{word}"
    return f"{value:.0f}{units.GAP}flop"


def beside(f: Finding) -> list[tuple[str, str, str, str, str]]:
    """Name, both means, difference and plain interval of each further metric."""

    def write(value: float) -> str:
        return f"{value:.4g}".replace("-", "−") if math.isfinite(value) else units.NONE

    return [
        (name, write(m["baseline"]), write(m["change"]), f"{m['difference']:+.3g}".replace("-", "−"), f"{write(m['low'])} to {write(m['high'])}")
        for name, m in f.metrics.items()
    ]
