"""Figures of a comparison: differences with their intervals around zero, and the learning curves of two arms with bands."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from convince.report.facts import finite
from convince.report.figures import CHAR, _n, _text, _x_axis, _y_axis, clip, place, svg, ticks

TONE = {"better": "a", "worse": "d", "equivalent": "b", "not decided": "b"}


@dataclass(frozen=True)
class Row:
    """One change: its difference and interval in the axis's unit, the differences of its seeds, and its verdict."""

    name: str
    value: float
    low: float | None
    high: float | None
    seeds: Sequence[float]
    verdict: str
    note: str


def differences(rows: Sequence[Row], *, margin: float, unit: str, higher: bool, width: float = 780) -> str:
    """A forest of differences around zero, the margin shaded; small dots are the pairs.

    The interval of a difference never leaves the axis; single pairs far outside do, and are drawn at its end.
    """
    named = max((len(clip(r.name, 30)) for r in rows), default=4)
    noted = max((len(r.note) for r in rows), default=6)
    start, step, top = named * CHAR + 8, 34.0, 26.0
    left, right = start + noted * CHAR + 40, width - 16
    reach = max([abs(v) for r in rows for v in (r.value, r.low, r.high) if v is not None and finite(v)] + [margin * 1.15, 1e-12])
    low, high = -reach * 1.08, reach * 1.08
    bottom = top + step * len(rows)

    def across(v: float) -> float:
        return place(min(max(v, low), high), low, high, left, right)

    inside = f"<title>the margin: differences inside ±{margin:.3g} {escape(unit)} are as good as none</title>"
    wide, tall = across(margin) - across(-margin), bottom - top
    out = [f'<rect class="margin" x="{_n(across(-margin))}" y="{top}" width="{_n(wide)}" height="{_n(tall)}">{inside}</rect>']
    for t in ticks(low, high, 7):
        out.append(f'<line class="grid" x1="{_n(across(t))}" x2="{_n(across(t))}" y1="{top}" y2="{_n(bottom)}"/>')
        out.append(_text(across(t), bottom + 16, f"{t:+g}".replace("-", "−") if t else "0", "tick", "middle"))
    out.append(f'<line class="zero" x1="{_n(across(0))}" x2="{_n(across(0))}" y1="{top - 4}" y2="{_n(bottom)}"/>')
    out.append(_text(right, top - 10, "better →" if higher else "worse →", "mark-name", "end"))
    out.append(_text(left, top - 10, "← worse" if higher else "← better", "mark-name"))
    out.append(_text((left + right) / 2, bottom + 32, f"difference to the baseline, {unit}", "axis-name", "middle"))
    for i, r in enumerate(rows):
        y, tone = top + (i + 0.5) * step, TONE[r.verdict]
        out.append(_text(start, y + 4, clip(r.name, 30), "name", "end", 12, r.name))
        out.append(_text(start + 16, y + 4, r.note, "note"))
        if r.low is not None and r.high is not None and finite(r.low) and finite(r.high):
            out.append(f'<line class="span {tone}" x1="{_n(across(r.low))}" x2="{_n(across(r.high))}" y1="{_n(y)}" y2="{_n(y)}"/>')
        for d in r.seeds:
            out.append(f'<circle class="seed" cx="{_n(across(d))}" cy="{_n(y + 9)}" r="1.8"><title>one pair: {d:+.3g} {escape(unit)}</title></circle>')
        tip = f"<title>{escape(r.name)}: {escape(r.note)} {escape(unit)}, {r.verdict}</title>"
        out.append(f'<circle class="dot {tone}" cx="{_n(across(r.value))}" cy="{_n(y)}" r="4.5">{tip}</circle>')
    words = "; ".join(f"{r.name} {r.note} {unit}, {r.verdict}" for r in rows)
    return svg(width, bottom + 40, f"Differences to the baseline. {words}.", "".join(out), "forest")


Curve = Sequence[Sequence[float | None]]  # rows of [images, loss, validation accuracy]


def two_arms(baseline: Sequence[Curve], change: Sequence[Curve], *, column: int, title: str, as_percent: bool, width: float = 420, height: float = 226) -> str:
    """Learning curves of both arms over images through the network: mean of the seeds, and a band from the lowest to the highest.

    ``column`` 1 is the loss, 2 the validation accuracy. Seeds are read at the same epochs; the shorter one ends the line.
    """
    arms = [(name, tone, _summary(curves, column)) for name, tone, curves in (("baseline", "b", baseline), ("change", "a", change))]
    points = [p for _, _, ps in arms for p in ps]
    if not points:
        return svg(width, 60, f"{title}: nothing was measured", _text(0, 34, "nothing was measured", "axis-name"))
    left, right, top, bottom = 46.0, width - 74, 12.0, height - 34
    x0, x1 = 0.0, max(x for x, *_ in points)
    y0, y1 = min(low for _, _, low, _ in points), max(high for *_, high in points)
    room = (y1 - y0) * 0.06 or 0.05
    y0, y1 = (max(y0 - room, 0.0), min(y1 + room, 1.0)) if as_percent else (y0 - room, y1 + room)

    def across(x: float) -> float:
        return place(x, x0, x1, left, right)

    def up(y: float) -> float:
        return place(y, y0, y1, bottom, top)

    body = [_y_axis(ticks(y0, y1, 5), up, left, right, as_percent)]
    body.append(_x_axis(ticks(x0, x1, 4), across, bottom, "images through the network", (left + right) / 2))
    for _, tone, ps in arms:
        edge = [f"{_n(across(x))} {_n(up(high))}" for x, _, _, high in ps] + [f"{_n(across(x))} {_n(up(low))}" for x, _, low, _ in reversed(ps)]
        if len(ps) > 1:
            body.append(f'<path class="band {tone}" d="M{"L".join(edge)}Z"/>')
    for name, tone, ps in arms:
        if ps:
            body.append(f'<path class="line {tone}" d="M{"L".join(f"{_n(across(x))} {_n(up(mean))}" for x, mean, _, _ in ps)}"/>')
            for x, m, _, _ in ps:
                tip = f"{name}, {x:,.0f} images: " + (f"{100 * m:.1f} %" if as_percent else f"{m:.3g}")
                body.append(f'<circle class="hit" cx="{_n(across(x))}" cy="{_n(up(m))}" r="5"><title>{tip}</title></circle>')
    ends = sorted((up(ps[-1][1]), name, tone) for name, tone, ps in arms if ps)
    at = [y for y, _, _ in ends]
    if len(at) == 2:
        at[1] = max(at[1], at[0] + 14)
    body += [_text(right + 8, y + 4, name, f"end {tone}") for y, (_, name, tone) in zip(at, ends, strict=True)]
    return svg(width, height, f"{title} of both arms by images through the network", "".join(body), "lines")


def _summary(curves: Sequence[Curve], column: int) -> list[tuple[float, float, float, float]]:
    """(images, mean, lowest, highest) at each epoch that every seed has."""
    out = []
    for rows in zip(*curves, strict=False):
        values = [float(row[column]) for row in rows if row[column] is not None and finite(row[column])]
        if len(values) == len(rows):
            out.append((statistics.fmean(float(row[0] or 0) for row in rows), statistics.fmean(values), min(values), max(values)))
    return out
