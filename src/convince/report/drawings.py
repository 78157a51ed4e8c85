"""Drawings: the figures that probes return as data, as SVG in the report's colours, and as JSON."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping
from html import escape
from typing import Any

import numpy as np

from convince.errors import Mistake
from convince.report.facts import finite
from convince.report.figures import CHAR, Series, clip, line_chart, svg
from convince.report.overlay import colours, normalised
from convince.report.units import number
from convince.types import Bars, Curves, Figure, Findings, Plane, Reading

TONES = "abcd"
MOST = 8  # lines of one chart; more cannot be told apart
KINDS: dict[str, type] = {"curves": Curves, "bars": Bars, "plane": Plane}


def draw(figure: Figure) -> str:
    """The figure as one ``<svg>``."""
    match figure:
        case Curves():
            return _curves(figure)
        case Bars():
            return _bars(figure)
        case Plane():
            return _plane(figure)


def _curves(figure: Curves) -> str:
    kept = list(figure.series.items())[:MOST]
    series = [Series(clip(name, 14), [x for x, _ in at], [y for _, y in at], TONES[i % len(TONES)]) for i, (name, at) in enumerate(kept)]
    title = figure.title + (f", the first {MOST} of {len(figure.series)} lines" if len(figure.series) > MOST else "")
    return line_chart(series, title=title, x_label=figure.x, log=figure.log, points=figure.points, width=470)


def _bars(figure: Bars) -> str:
    """Lying bars with their names on the left and values at their ends; negative ones go left of zero."""
    rows, step = list(figure.values.items()), 20.0
    left = 16 + CHAR * max((len(clip(name, 28)) for name, _ in rows), default=4)
    right = left + 210
    known = [v for _, v in rows if finite(v)]
    low, high = min([0.0, *known]), max([0.0, *known])
    span = (high - low) or 1.0
    zero = left + (right - left) * -low / span
    out = []
    for i, (name, value) in enumerate(rows):
        top = 6 + i * step
        end = left + (right - left) * ((value if finite(value) else 0.0) - low) / span
        out.append(f'<text class="tick" x="{left - 8:g}" y="{top + 11:g}" text-anchor="end">{escape(clip(name, 28))}<title>{escape(name)}</title></text>')
        out.append(f'<rect class="bar a" x="{min(zero, end):.1f}" y="{top + 1:g}" width="{abs(end - zero):.1f}" height="12"/>')
        out.append(f'<text class="tick" x="{max(zero, end) + 6:.1f}" y="{top + 11:g}">{number(value)}</text>')
    out.append(f'<line class="base" x1="{zero:.1f}" x2="{zero:.1f}" y1="2" y2="{6 + len(rows) * step:g}"/>')
    words = f"{figure.title}: {len(rows)} bars" + (f" in {figure.unit}" if figure.unit else "")
    return svg(right + 70, 12 + len(rows) * step, words, "".join(out), "bars")


def _plane(figure: Plane) -> str:
    """A heat map as a picture inside the SVG, dark low and bright high, with what its ends stand for."""
    from PIL import Image

    values = np.asarray(figure.values, np.float64)
    if values.ndim != 2 or 0 in values.shape:
        raise Mistake(f"{figure.title}: a plane needs rows of equal length, at least one number; it has shape {list(values.shape)}")
    share = normalised(values)
    picture = colours(np.zeros_like(values) if share is None else np.nan_to_num(share)).round().astype(np.uint8)
    packed = io.BytesIO()
    Image.fromarray(picture).save(packed, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(packed.getvalue()).decode()
    rows, columns = values.shape
    scale = min(320 / columns, 260 / rows)
    width, height = columns * scale, rows * scale
    low, high = (number(float(v)) for v in (np.nanmin(values), np.nanmax(values))) if np.isfinite(values).any() else ("-", "-")
    body = (
        f'<image href="{uri}" x="24" y="4" width="{width:.1f}" height="{height:.1f}" preserveAspectRatio="none" style="image-rendering:pixelated"/>'
        f'<text class="axis-name" x="{24 + width / 2:.1f}" y="{height + 20:.1f}" text-anchor="middle">{escape(figure.columns)}</text>'
        f'<text class="axis-name" x="14" y="{4 + height / 2:.1f}" text-anchor="middle" '
        f'transform="rotate(-90 14 {4 + height / 2:.1f})">{escape(figure.rows)}</text>'
        f'<text class="tick" x="{32 + width:.1f}" y="14">bright {high}</text><text class="tick" x="{32 + width:.1f}" y="30">dark {low}</text>'
    )
    return svg(24 + width + 116, height + 30, f"{figure.title}: {rows} by {columns}, from {low} to {high}", body, "plane")


# -- as JSON -------------------------------------------------------------------------------------------


def to_json(found: Findings) -> dict[str, Any]:
    """Readings and figures in plain types."""
    kind = {made: name for name, made in KINDS.items()}
    return {
        "readings": [dataclasses.asdict(r) for r in found.readings],
        "figures": [{"kind": kind[type(figure)], **dataclasses.asdict(figure)} for figure in found.figures],
    }


def from_json(found: Mapping[str, Any]) -> Findings:
    """The reverse of :func:`to_json`; what is not of that form raises KeyError, TypeError or ValueError."""
    figures = [KINDS[figure["kind"]](**{k: v for k, v in figure.items() if k != "kind"} | _points(figure)) for figure in found["figures"]]
    return Findings([Reading(**r) for r in found["readings"]], figures)


def _points(figure: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no pairs."""
    return {} if figure["kind"] != "curves" else {"series": {name: [(float(x), float(y)) for x, y in at] for name, at in figure["series"].items()}}
