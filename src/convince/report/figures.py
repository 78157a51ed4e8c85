"""Figures as SVG text: small pure functions, coloured by the page's CSS variables, each with an aria-label.

Every label is escaped here, so a figure may be put into a page as it stands. Coordinates are in
CSS pixels of the figure's natural size; pages may shrink it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

from convince.report.facts import finite
from convince.report.units import NONE, count, number, percent

CHAR = 6.4  # mean width of a character at the figures' 12 px


@dataclass(frozen=True)
class Series:
    """One line of a chart: its name, its points, and its tone ("a", "b", "c" or "d")."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    tone: str = "a"


@dataclass(frozen=True)
class Strip:
    """One row of a forest: a value with its interval, all on the axis of the figure."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    note: str = ""


def svg(width: float, height: float, label: str, body: str, kind: str = "") -> str:
    """Wrap ``body`` as a picture of that size with a name for those who do not see it."""
    return (
        f'<svg class="figure {kind}" width="{_n(width)}" height="{_n(height)}" viewBox="0 0 {_n(width)} {_n(height)}" '
        f'role="img" aria-label="{escape(label)}">{body}</svg>'
    )


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) from ``low`` to ``high``: ``ticks(0, 1)`` is 0, 0.2 ... 1."""
    if not high > low:
        return [low]
    raw = (high - low) / max(1, about)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def place(value: float, low: float, high: float, start: float, end: float) -> float:
    """Where ``value`` of the axis ``low`` to ``high`` lies between ``start`` and ``end``; the middle of a flat axis."""
    return (start + end) / 2 if high == low else start + (value - low) / (high - low) * (end - start)


def line_chart(
    series: Sequence[Series],
    *,
    title: str,
    x_label: str = "epoch",
    width: float = 420,
    height: float = 236,
    y_range: tuple[float, float] | None = None,
    as_percent: bool = False,
    log: bool = False,
    points: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    dot: tuple[float, float] | None = None,
) -> str:
    """Lines over a shared axis, each named at its end; NaN and infinity break a line.

    ``marks`` are dashed verticals (x, label), ``dot`` rings one point. ``log`` takes a logarithmic
    y axis and skips numbers that are not positive. ``points`` draws dots in place of lines.
    """
    left, right, top, bottom = 46.0, width - 84, 30.0 if marks else 12.0, height - 32

    def usable(y: Any) -> bool:
        return finite(y) and (y > 0 or not log)

    kept = [(s, [(x, y) for x, y in zip(s.x, s.y, strict=True) if usable(y)]) for s in series]
    places = [p for _, ps in kept for p in ps]
    if not places:
        return svg(width, 60, f"{title}: no finite values", _text(0, 34, "no finite values to draw", "axis-name"))
    xs = [x for s in series for x in s.x]
    x0, x1 = min(xs), max(xs)

    def level(y: float) -> float:
        return math.log10(y) if log else y

    values = [level(float(y or 0)) for _, y in places]
    y0, y1 = (level(y_range[0]), level(y_range[1])) if y_range else _padded(min(values), max(values))

    def across(x: float) -> float:
        return place(x, x0, x1, left, right)

    def up(y: float) -> float:
        return place(min(max(level(y), y0), y1), y0, y1, bottom, top)

    body = [_y_axis(_y_ticks(y0, y1, log, max(3, round((bottom - top) / 36))), up, left, right, as_percent)]
    whole = [t for t in ticks(x0, x1) if t == round(t) or x1 - x0 < 3] or [x0]
    body.append(_x_axis(whole, across, bottom, x_label, (left + right) / 2))
    body.append(_marks([(across(x), label) for x, label in marks], top, bottom))
    for s, _ in kept:
        body.append(_line(s, across, up, usable, as_percent, x_label, points))
    body.append(_end_names(kept, up, right, top, bottom))
    if dot and usable(dot[1]):
        body.append(f'<circle class="ring" cx="{_n(across(dot[0]))}" cy="{_n(up(dot[1]))}" r="5"/>')
    last = "; ".join(f"{s.name} ends at {_value(ps[-1][1], as_percent)}" for s, ps in kept if ps)
    return svg(width, height, f"{title} by {x_label}. {last}.", "".join(body), "lines")


def _marks(marks: Sequence[tuple[float, str]], top: float, bottom: float) -> str:
    """Dashed verticals, named above the plot in two rows; a name without room is left to hovering."""
    out, ends = [], [-1e9, -1e9]
    for x, label in marks:
        tip = f"<title>{escape(label)}</title>"
        out.append(f'<line class="mark" x1="{_n(x)}" x2="{_n(x)}" y1="{_n(top - 6)}" y2="{_n(bottom)}">{tip}</line>')
        words = clip(label, 18)
        row = next((r for r in (0, 1) if x >= ends[r] + 8), None)
        if row is not None:
            out.append(_text(x, top - 9 - 12 * row, words, "mark-name", full=label))
            ends[row] = x + len(words) * CHAR * 0.95
    return "".join(out)


def _padded(low: float, high: float) -> tuple[float, float]:
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _y_ticks(low: float, high: float, log: bool, about: int = 5) -> list[float]:
    if not log:
        return ticks(low, high, about)
    fine = [m * 10.0**e for e in range(math.floor(low), math.ceil(high) + 1) for m in (1, 2, 5)]
    fine = [t for t in fine if low <= math.log10(t) <= high]
    whole = [t for t in fine if math.isclose(math.log10(t), round(math.log10(t)))]
    return whole if len(whole) > 3 else fine


def _y_axis(at: Sequence[float], up: Any, left: float, right: float, as_percent: bool) -> str:
    out = []
    for t in at:
        out.append(f'<line class="grid" x1="{_n(left)}" x2="{_n(right)}" y1="{_n(up(t))}" y2="{_n(up(t))}"/>')
        name = f"{100 * t:g} %" if as_percent else f"{t:g}".replace("-", "−")
        out.append(_text(left - 7, up(t) + 4, name, "tick", "end"))
    return "".join(out)


def _x_axis(at: Sequence[float], across: Any, bottom: float, label: str, middle: float) -> str:
    out = [_text(across(t), bottom + 16, f"{t:g}", "tick", "middle") for t in at]
    return "".join(out) + _text(middle, bottom + 30, label, "axis-name", "middle")


def _line(s: Series, across: Any, up: Any, usable: Any, as_percent: bool, x_label: str, points: bool) -> str:
    path, pen = [], "M"
    hover = []
    every = 1 if points else max(1, len(s.x) // 300)
    for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)):
        if not usable(y):
            pen = "M"
            continue
        px, py = _n(across(x)), _n(up(y))
        path.append(f"{pen}{px} {py}")
        pen = "L"
        if i % every == 0 or i == len(s.x) - 1:
            tip = escape(f"{s.name}, {x_label} {x:g}: {_value(y, as_percent)}")
            hover.append(f'<circle class="hit" cx="{px}" cy="{py}" r="6"><title>{tip}</title></circle>')
    dots = "".join(h.replace('class="hit"', f'class="dot {s.tone}"').replace('r="6"', 'r="3"') for h in hover)
    drawn = dots if points or len(path) == 1 else f'<path class="line {s.tone}" d="{"".join(path)}"/>'
    return drawn + "".join(hover)


def _end_names(kept: Any, up: Any, right: float, top: float, bottom: float) -> str:
    """Names at the ends of the lines, pushed apart to 14 px."""
    ends = sorted((up(ps[-1][1]), s.name, s.tone) for s, ps in kept if ps)
    at = [y for y, _, _ in ends]
    for i in range(1, len(at)):
        at[i] = max(at[i], at[i - 1] + 14)
    over = max(0.0, at[-1] - bottom) if at else 0.0
    return "".join(_text(right + 8, y - over + 4, n, f"end {t}") for y, (_, n, t) in zip(at, ends, strict=True))


def bar_row(share: float | None, *, width: float = 72, height: float = 9, tone: str = "a", label: str = "") -> str:
    """A horizontal bar that fills ``share`` (0 to 1) of its track."""
    fill = 0.0 if not finite(share) else min(max(float(share or 0), 0.0), 1.0) * width
    track = f'<rect class="track" width="{_n(width)}" height="{_n(height)}"/>'
    return svg(width, height, label, f'{track}<rect class="bar {tone}" width="{_n(fill)}" height="{_n(height)}"/>', "row")


def columns(values: Sequence[float], names: Sequence[str], *, title: str, tone: str = "a", width: float = 270) -> str:
    """Upright bars from zero, one for each name, with hover titles; for many classes."""
    height, base, top = 92.0, 78.0, 12.0
    most = max([v for v in values if finite(v)], default=0) or 1
    step = width / max(1, len(values))
    wide = max(0.8, step - (2 if step > 6 else 0.6))
    out = []
    for i, (value, name) in enumerate(zip(values, names, strict=True)):
        tall = (base - top) * value / most
        out.append(
            f'<rect class="bar {tone}" x="{_n(i * step)}" y="{_n(base - tall)}" width="{_n(wide)}" height="{_n(tall)}">'
            f"<title>{escape(name)}: {count(value)}</title></rect>"
        )
    out.append(f'<line class="base" x1="0" x2="{_n(width)}" y1="{base}" y2="{base}"/>')
    low = min(values, default=0)
    out.append(_text(0, 90, f"{len(values)} classes, {count(low)} to {count(most)} each", "tick"))
    return svg(width, height, f"{title}: {len(values)} classes of {count(low)} to {count(most)} images", "".join(out))


def spark(values: Sequence[float | None], *, width: float = 96, height: float = 22, label: str = "") -> str:
    """A line without axes, for a table cell; gaps where a value is not finite."""
    good = [v for v in values if v is not None and finite(v)]
    if len(good) < 2:
        return ""
    path, pen = [], "M"
    for i, v in enumerate(values):
        if v is None or not finite(v):
            pen = "M"
            continue
        x, y = place(i, 0, len(values) - 1, 2, width - 2), place(v, min(good), max(good), height - 3, 3)
        path.append(f"{pen}{_n(x)} {_n(y)}")
        pen = "L"
    words = label or f"from {number(float(good[0]))} to {number(float(good[-1]))}"
    return svg(width, height, words, f'<path class="line a" d="{"".join(path)}"/>', "spark")


def depth(share: float) -> float:
    """How strongly a heat map's cell is coloured: 0 for none, .12 for the faintest, 1 for all of its row."""
    return 0.0 if share <= 0 else 0.12 + 0.88 * min(share, 1.0) ** 0.6


def heat_map(counts: Any, names: Sequence[str]) -> str:
    """A confusion matrix: rows are given labels, columns answers, colour the share of the row.

    ``counts`` [k k] of whole numbers. Up to 12 classes each cell holds count and percent, up to 25 the
    count, beyond that colour alone with hover titles; cells of zero are not drawn.
    """
    table = np.asarray(counts)
    k = len(table)
    cell_w, cell_h = (88.0, 52.0) if k <= 4 else (54.0, 40.0) if k <= 12 else (28.0, 24.0) if k <= 25 else (max(7.0, 760 / k),) * 2
    font = min(12.0, cell_h * 0.95) if k > 25 else 12.0
    long = max((len(n) for n in names), default=1)
    left = min(22, long) * CHAR * font / 12 + 14
    upright = long * CHAR > cell_w - 4
    top = (min(14, long) * CHAR * font / 12 + 14 if upright else 22.0) + 16
    wide, high = left + k * cell_w, top + k * cell_h
    out = [f'<rect class="plate" x="{_n(left)}" y="{_n(top)}" width="{_n(k * cell_w)}" height="{_n(k * cell_h)}"/>']
    out.append(_text(0, 11, "given ↓  answered →", "axis-name"))
    for i, name in enumerate(names):
        y = top + (i + 0.5) * cell_h + font * 0.35
        out.append(_text(left - 6, y, clip(name, 22), "name", "end", font, name))
        x = left + (i + 0.5) * cell_w
        if upright:
            out.append(_text(x + font * 0.35, top - 5, clip(name, 14), "name", "start", font, name, -90))
        else:
            out.append(_text(x, top - 6, name, "name", "middle", font))
    sums = table.sum(axis=1)
    for i, j in zip(*np.nonzero(table), strict=True):
        out.append(
            _heat_cell(
                int(table[i, j]),
                float(table[i, j] / sums[i]),
                (left + j * cell_w, top + i * cell_h, cell_w, cell_h),
                bool(i == j),
                f"{names[i]} → {names[j]}",
                2 if k <= 12 else 1 if k <= 25 else 0,
            )
        )
    right = int(np.trace(table))
    return svg(
        wide + 2,
        high + 2,
        f"Confusion matrix of {k} classes: {count(right)} of {count(int(table.sum()))} on the diagonal",
        "".join(out),
        "heat",
    )


def _heat_cell(n: int, share: float, box: tuple[float, float, float, float], good: bool, tip: str, lines: int) -> str:
    x, y, w, h = box
    deep = depth(share)
    gap = 1.5 if lines else 0.4
    tone = "good" if good else "bad"
    ink = "faint" if deep < 0.6 else "half" if deep < 0.82 else "full"
    out = (
        f'<rect class="{tone}" x="{_n(x + gap / 2)}" y="{_n(y + gap / 2)}" width="{_n(w - gap)}" '
        f'height="{_n(h - gap)}" fill-opacity="{deep:.2f}">'
        f"<title>{escape(tip)}: {count(n)} ({percent(share)} of the row)</title></rect>"
    )
    if lines == 2:
        out += _text(x + w / 2, y + h / 2 - 1, count(n), f"cell {ink}", "middle", 14)
        out += _text(x + w / 2, y + h / 2 + 13, percent(share), f"cell small {ink}", "middle", 10)
    elif lines == 1:
        out += _text(x + w / 2, y + h / 2 + 4, count(n), f"cell {ink}", "middle", 11)
    return out


def reliability(bins: Sequence[Any], *, width: float = 380) -> str:
    """Accuracy against confidence for each bin, with 95 % intervals, the diagonal, and bin counts below.

    A bin is a mapping of ``low``, ``high``, ``n``, ``confidence``, ``accuracy``.
    """
    from convince.report.reckon import wilson

    left, right, top, bottom, floor = 46.0, width - 12, 26.0, 286.0, 366.0

    def across(p: float) -> float:
        return place(p, 0, 1, left, right)

    def up(p: float) -> float:
        return place(p, 0, 1, bottom, top)

    at = [0, 0.2, 0.4, 0.6, 0.8, 1]
    out = [_y_axis(at, up, left, right, True)]
    out.append(f'<line class="ideal" x1="{left}" y1="{bottom}" x2="{_n(right)}" y2="{top}"/>')
    most = max((b["n"] for b in bins), default=1)
    for b in bins:
        if not (b["n"] and finite(b["accuracy"]) and finite(b["confidence"])):
            continue
        x, y = across(b["confidence"]), up(b["accuracy"])
        low, high = wilson(b["accuracy"] * b["n"], b["n"])
        span = f"{percent(b['low'], False)} to {percent(b['high'])}"
        words = f"claims {span}: {count(b['n'])} images, mean claim {percent(b['confidence'])}"
        tip = f"<title>{escape(words)}, right {percent(b['accuracy'])}</title>"
        out.append(f'<line class="gap" x1="{_n(x)}" x2="{_n(x)}" y1="{_n(up(b["confidence"]))}" y2="{_n(y)}"/>')
        out.append(f'<line class="error" x1="{_n(x)}" x2="{_n(x)}" y1="{_n(up(low))}" y2="{_n(up(high))}"/>')
        dot = 2.5 + 3.5 * math.sqrt(b["n"] / most)
        out.append(f'<circle class="dot a" cx="{_n(x)}" cy="{_n(y)}" r="{_n(dot)}">{tip}</circle>')
        tall = 50 * b["n"] / most
        x0, x1 = across(b["low"]) + 1, across(b["high"]) - 1
        out.append(f'<rect class="bar b" x="{_n(x0)}" y="{_n(floor - tall)}" width="{_n(x1 - x0)}" height="{_n(tall)}">{tip}</rect>')
        if len(bins) <= 20:
            out.append(_text((x0 + x1) / 2, floor - tall - 3, count(b["n"]), "tick small", "middle"))
    out.append(f'<line class="base" x1="{left}" x2="{_n(right)}" y1="{floor}" y2="{floor}"/>')
    out.append("".join(_text(across(t), floor + 16, f"{100 * t:g} %", "tick", "middle") for t in at))
    out.append(_text((left + right) / 2, floor + 32, "probability of the answer; bars: images", "axis-name", "middle"))
    out.append(_text(left, 10, "share answered correctly", "axis-name"))
    total = sum(b["n"] for b in bins)
    return svg(width, 404, f"Reliability of {count(total)} answers in {len(bins)} bins", "".join(out), "reliability")


def forest(rows: Sequence[Strip], *, reference: tuple[float, str] | None = None, width: float = 780) -> str:
    """Values with their intervals on one axis of percent, one row each.

    ``reference`` is a dashed line with its name; it is left out where it lies so far off that it
    would squeeze the intervals.
    """
    named = max((len(clip(r.name, 24)) for r in rows), default=4)
    noted = max((len(r.note or percent(r.value)) for r in rows), default=6)
    start, step, top = named * CHAR, 26.0, 22.0
    left, right = start + noted * CHAR + 44, width - 16
    seen = [v for r in rows for v in (r.value, r.low, r.high) if v is not None and finite(v)]
    if not seen:
        return ""
    low, high = max(0.0, min(seen) - 0.02), min(1.0, max(seen) + 0.005)
    if reference and not low - (high - low) / 2 <= reference[0] <= high:
        reference = None
    if reference:
        low = min(low, max(0.0, reference[0] - 0.01))
    bottom = top + step * len(rows)

    def across(v: float) -> float:
        return place(v, low, high, left, right)

    out = []
    for t in ticks(low, high, 6):
        out.append(f'<line class="grid" x1="{_n(across(t))}" x2="{_n(across(t))}" y1="{top}" y2="{_n(bottom)}"/>')
        out.append(_text(across(t), bottom + 16, f"{100 * t:g} %", "tick", "middle"))
    if reference:
        x = across(reference[0])
        out.append(f'<line class="mark" x1="{_n(x)}" x2="{_n(x)}" y1="{top - 4}" y2="{_n(bottom)}"/>')
        near_end = x > (left + right) / 2
        out.append(_text(x, top - 9, reference[1], "mark-name", "end" if near_end else "start"))
    for i, r in enumerate(rows):
        y = top + (i + 0.5) * step
        out.append(_text(start, y + 4, clip(r.name, 24), "name", "end", 12, r.name))
        if r.low is not None and r.high is not None and finite(r.low) and finite(r.high):
            out.append(f'<line class="span" x1="{_n(across(r.low))}" x2="{_n(across(r.high))}" y1="{y}" y2="{y}"/>')
        if r.value is not None and finite(r.value):
            tip = f"<title>{escape(r.name)}: {percent(r.value)}</title>"
            out.append(f'<circle class="dot a" cx="{_n(across(r.value))}" cy="{y}" r="4.5">{tip}</circle>')
        out.append(_text(start + 16, y + 4, r.note or percent(r.value), "note"))
    return svg(width, bottom + 24, "; ".join(f"{r.name} {r.note or percent(r.value)}" for r in rows), "".join(out))


def interval_bar(value: float | None, low: float | None, high: float | None, *, width: float = 96) -> str:
    """A share with its interval on a track from 0 to 1, for a table cell."""
    out = f'<line class="track" x1="0" x2="{_n(width)}" y1="6" y2="6"/>'
    if low is not None and high is not None and finite(low) and finite(high):
        out += f'<line class="span" x1="{_n(low * width)}" x2="{_n(high * width)}" y1="6" y2="6"/>'
    if value is not None and finite(value):
        out += f'<circle class="dot a" cx="{_n(min(max(value * width, 3), width - 3))}" cy="6" r="3.2"/>'
    spread = f", 95 % interval {percent(low, False)} to {percent(high)}" if low is not None else ""
    return svg(width, 12, f"{percent(value)}{spread}", out, "row")


def clip(text: str, most: int) -> str:
    """``text`` cut to ``most`` characters, with an ellipsis where something is missing."""
    return text if len(text) <= most else text[: most - 1] + "…"


def _value(value: float | None, as_percent: bool) -> str:
    if value is None:
        return NONE
    return percent(value) if as_percent else f"{value:.4g}".replace("-", "−")


def _n(value: float) -> str:
    return f"{value:.1f}".rstrip("0").rstrip(".") if value else "0"


def _text(x: float, y: float, words: str, kind: str, anchor: str = "", font: float = 0, full: str = "", turn: float = 0) -> str:
    more = f' text-anchor="{anchor}"' if anchor else ""
    more += f' style="font-size:{_n(font)}px"' if font else ""
    more += f' transform="rotate({_n(turn)} {_n(x)} {_n(y)})"' if turn else ""
    tip = f"<title>{escape(full)}</title>" if full and full != words else ""
    return f'<text class="{kind}" x="{_n(x)}" y="{_n(y)}"{more}>{tip}{escape(words)}</text>'
