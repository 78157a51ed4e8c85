"""A contact sheet: each image with its maps beside it and a faithfulness score under each, as one PNG and one page; and the ranking's page."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from convince.report import put
from convince.report.drawings import draw
from convince.report.overlay import overlay
from convince.report.units import decimal, duration, percent
from convince.types import Bars

CELL, GAP, HEAD, FOOT = 224, 14, 44, 46  # pixels of the PNG
INK, SOFT, GOOD, BAD = "#1c1e21", "#5e6268", "#1f5f8b", "#b5451f"


@dataclass(frozen=True)
class Method:
    """A column: the explainer as the person named it, and what is said of it (the layer, the number format)."""

    name: str
    note: str = ""


@dataclass(frozen=True)
class Shown:
    """One method's picture of one image, uint8 [h w 3], and its scores; None where the method gave no map."""

    picture: np.ndarray | None
    faithfulness: float | None = None
    insertion: float | None = None
    deletion: float | None = None


@dataclass(frozen=True)
class Line:
    """One image: what it is, what was answered, what is explained, and a :class:`Shown` for each method."""

    image: np.ndarray
    file: str
    label: str
    probability: float
    target: str
    cells: list[Shown] = field(default_factory=list)


def heat(image: np.ndarray, found: np.ndarray) -> np.ndarray:
    """A map [h w] over its image: what speaks for the target, from 0 to the 99.5th percentile; a map without positive values as it is."""
    shown = np.maximum(found, 0) if (found > 0).any() else found
    top = np.percentile(shown, 99.5)
    return overlay(image, np.minimum(shown, top) if top > shown.min() else shown, strength=0.65)


def picture(values: np.ndarray) -> np.ndarray:
    """An image [c h w] of any range as uint8 [h w 3], stretched to its own least and largest value."""
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / (high - low) if high > low else np.zeros_like(values)
    grey = scaled if len(scaled) >= 3 else np.repeat(scaled[:1], 3, axis=0)
    return np.ascontiguousarray((grey[:3] * 255).round().astype(np.uint8).transpose(1, 2, 0))


# -- as a PNG ------------------------------------------------------------------------------------------


def write_png(path: Path, methods: Sequence[Method], lines: Sequence[Line]) -> Path:
    """The sheet as one picture: a column a method, a row an image."""
    from PIL import Image, ImageDraw, ImageFont

    width = GAP + (CELL + GAP) * (1 + len(methods))
    sheet = Image.new("RGB", (width, HEAD + len(lines) * (CELL + FOOT) + GAP), "white")
    draw = ImageDraw.Draw(sheet)
    bold, plain, small = (ImageFont.load_default(size) for size in (17, 14, 12))

    def write(x: float, y: float, words: str, font: Any, colour: str) -> None:
        words = words.encode("latin-1", "replace").decode("latin-1")  # what the font has
        while len(words) > 1 and draw.textlength(words, font) > CELL:
            words = words[:-2].rstrip(".") + "."
        draw.text((x, y), words, fill=colour, font=font)

    for column, method in enumerate([Method("image"), *methods]):
        left = GAP + column * (CELL + GAP)
        write(left, 8, method.name, bold, INK)
        write(left, 28, method.note, small, SOFT)
    for i, line in enumerate(lines):
        top = HEAD + i * (CELL + FOOT)
        sheet.paste(_fitted(line.image), (GAP, top))
        write(GAP, top + CELL + 5, f"{line.label}  {line.probability:.0%}", plain, INK)
        write(GAP, top + CELL + 22, Path(line.file).name, small, SOFT)
        for column, cell in enumerate(line.cells, 1):
            left = GAP + column * (CELL + GAP)
            if cell.picture is not None:
                sheet.paste(_fitted(cell.picture), (left, top))
            if cell.faithfulness is not None:
                colour = GOOD if cell.faithfulness > 0 else BAD
                write(left, top + CELL + 5, f"faithfulness {cell.faithfulness:+.2f}", plain, colour)
                write(left, top + CELL + 22, f"insertion {cell.insertion:.2f}, deletion {cell.deletion:.2f}", small, SOFT)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)
    return path


def _fitted(shown: np.ndarray) -> Any:
    from PIL import Image

    shown = shown[..., 0] if shown.ndim == 3 and shown.shape[2] == 1 else shown
    image = Image.fromarray(shown).convert("RGB")
    scale = CELL / max(image.size)
    resample = Image.Resampling.NEAREST if scale > 2 else Image.Resampling.LANCZOS
    return image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), resample)


# -- as a page -----------------------------------------------------------------------------------------


def write_page(
    path: Path, run: str, methods: Sequence[Method] = (), lines: Sequence[Line] = (), ranking: Sequence[Any] = (), metrics: Sequence[str] = (), on: str = ""
) -> Path:
    """The sheet, the ranking (rows of :mod:`convince.explain.ranking`), or both, as one page that opens offline."""
    from convince.report.page import fill

    values: dict[str, Any] = {
        "run": run,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "methods": methods,
        "lines": [_line(line) for line in lines],
        "on": on,
        "metrics": metrics,
        "ranking": [_ranked(row, metrics) for row in ranking],
        "bars": _bars(ranking),
        "failed": [(row.method, row.error) for row in ranking if row.error],
        "lede": _lede(lines, ranking),
    }
    return put(path, fill("explain.html", values))


def _line(line: Line) -> dict[str, Any]:
    cells = [
        {"picture": c.picture, "faithfulness": decimal(c.faithfulness, 2) if c.faithfulness is not None else None, "good": (c.faithfulness or 0) > 0}
        | {"insertion": decimal(c.insertion, 2), "deletion": decimal(c.deletion, 2)}
        for c in line.cells
    ]
    words = {"file": line.file, "name": Path(line.file).name, "label": line.label, "probability": percent(line.probability), "target": line.target}
    return {"image": line.image, "cells": cells, **words}


def _ranked(row: Any, metrics: Sequence[str]) -> dict[str, Any]:
    cells = [(row.means.get(name), decimal(row.means.get(name)), decimal(row.half.get(name))) for name in metrics]
    over = "" if row.over_random is None else f"{row.over_random[0]:+.3f} ± {row.over_random[1]:.3f}".replace("-", "−")
    return {"method": row.method, "cells": cells, "over": over, "seconds": row.seconds, "time": duration(row.seconds), "said": row.said}


def _bars(ranking: Sequence[Any]) -> str:
    values = {r.method: r.means["faithfulness"] for r in ranking if "faithfulness" in r.means}
    return draw(Bars("Faithfulness by method", "", values)) if values else ""


def _lede(lines: Sequence[Line], ranking: Sequence[Any]) -> str:
    """One sentence: which method's maps told most about the answers."""
    scored = [r for r in ranking if "faithfulness" in r.means and r.method not in ("random", "centre")]
    if scored:
        best = max(scored, key=lambda r: r.means["faithfulness"])
        over = best.over_random or (0.0, 0.0)
        if over[0] - over[1] > 0:
            centre = next((r.means["faithfulness"] for r in ranking if r.method == "centre" and r.means), -1.0)
            but = "" if best.means["faithfulness"] > centre else " A bell in the middle of the picture, which knows nothing of the network, does as well."
            return f"On these images {best.method} tells most about the answers: {over[0]:.2f} ± {over[1]:.2f} more faithful than a random map.{but}"
        return "On these images no method's maps are shown to be more faithful than a random one."
    n = len(lines)
    return f"Why {n} image{'' if n == 1 else 's'} {'was' if n == 1 else 'were'} answered as {'it was' if n == 1 else 'they were'}."
