"""The table's rows: what the cards say of every network and size, and what was measured; nothing heavy is imported."""

from __future__ import annotations

import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from convince import parts
from convince.errors import Mistake, nearest

SHIPPED = parts.PACKAGE / "models" / "measured.json"
SETS = ("fashion-mnist", "cifar10")


@dataclass
class Row:
    """One size of a network. Speeds are images a second, ``bytes`` the peak of a training step in fp32, accuracies 0 to 1 by seed.

    What was not measured is None or empty. ``size``: side of the images [pixels]; ``stale``: the file changed since it was measured.
    """

    name: str
    part: str
    paper: str | None
    title: str
    year: int | None
    small: bool
    size: int | None = None
    classes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    batch: int | None = None
    speed: dict[str, dict[str, float]] = field(default_factory=dict)  # fp32, bf16 -> train, infer
    bytes: int | None = None
    accuracy: dict[str, dict[str, float]] = field(default_factory=dict)  # set -> seed -> share
    failed: str | None = None
    stale: bool = False

    def mean(self, name: str) -> float | None:
        """The mean accuracy on a set."""
        values = self.accuracy.get(name, {})
        return statistics.fmean(values.values()) if values else None

    def spread(self, name: str) -> float | None:
        """The standard deviation over seeds, of two at least."""
        values = list(self.accuracy.get(name, {}).values())
        return statistics.stdev(values) if len(values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """The row, with mean, spread and n of each set."""
        told = {name: {"mean": self.mean(name), "sd": self.spread(name), "n": len(self.accuracy[name])} for name in self.accuracy}
        return {**vars(self), "accuracy": told}


def source(part: parts.Part) -> str:
    """The hash of a part's file: figures of another one are stale."""
    return hashlib.sha256(part.path.read_bytes()).hexdigest()[:16]


def store_path() -> Path:
    """Where figures are read: this machine's own, if it was measured, else those that come with the package."""
    from convince.data.cache import cache_folder

    own = cache_folder() / "models.json"
    return own if own.exists() else SHIPPED


def read_store(path: Path) -> dict[str, Any]:
    """The measured figures, ``{"machine": ..., "budget": ..., "rows": {name: {...}}}``; empty where there are none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {"rows": {}}
    except (OSError, ValueError) as error:
        raise Mistake(f"{path}: not a readable table ({error}); remove it, and 'convince models --measure' makes it anew") from error
    if not isinstance(found, dict) or not isinstance(found.get("rows"), dict):
        raise Mistake(f"{path}: holds no table of networks; remove it, and 'convince models --measure' makes it anew")
    return found


def rows(store: dict[str, Any]) -> list[Row]:
    """Every size of every network that takes images, in the order of the parts, with its figures."""
    made = []
    for part in parts.find():
        if not isinstance(part, parts.Part) or part.card.kind != "backbone" or part.card.accepts == ("table",):
            continue
        card = part.card
        bare = not card.of and (not card.variants or card.part in (*card.small, *card.published))  # else the defaults are one of the sizes
        for name in [*([card.part] if bare else []), *card.variants]:
            kept = store["rows"].get(name, {})
            published = card.published.get(name, {})
            facts = {key: kept[key] for key in ("parameters", "macs", "batch", "speed", "bytes", "accuracy", "failed") if kept.get(key) is not None}
            size, classes = kept.get("size") or published.get("size"), kept.get("classes") or published.get("classes")
            stale = bool(kept) and kept.get("source") != source(part)
            made.append(Row(name, part.name, card.paper, card.title, card.year, name in card.small, size, classes, stale=stale, **facts))
    return made


SORTS: dict[str, Callable[[Row], Any]] = {
    "name": lambda row: row.name,
    "year": lambda row: -(row.year or 0),
    "parameters": lambda row: row.parameters or math.inf,
    "macs": lambda row: row.macs or math.inf,
    "speed": lambda row: -max((row.speed.get(p, {}).get("infer", 0) for p in ("fp32", "bf16")), default=0),
    "accuracy": lambda row: -(sum(row.mean(name) or 0 for name in SETS)),
    SETS[0]: lambda row: -(row.mean(SETS[0]) or 0),
    SETS[1]: lambda row: -(row.mean(SETS[1]) or 0),
}


def chosen(found: Iterable[Row], words: tuple[str, ...], small: bool, most_parameters: float | None, most_macs: float | None, sort: str | None) -> list[Row]:
    """Rows that match all words, within the limits, sorted."""
    if sort is not None and sort not in SORTS:
        raise Mistake(f"--sort {sort}: no such column{nearest(sort, list(SORTS))} Columns: {', '.join(SORTS)}")
    kept = [
        row
        for row in found
        if all(word.lower() in f"{row.name} {row.part} {row.title} {row.paper}".lower() for word in words)
        and (row.small or not small)
        and (most_parameters is None or (row.parameters or math.inf) <= most_parameters)
        and (most_macs is None or (row.macs or math.inf) <= most_macs)
    ]
    return kept if sort is None else sorted(kept, key=SORTS[sort])


HEAD = ("network", "year", "parameters", "multiply-adds", "px", "train img/s fp32 / bf16", "infer img/s fp32 / bf16", "memory", "Fashion-MNIST", "CIFAR-10")


def cells(row: Row) -> list[str]:
    """A row for a person, by :data:`HEAD`."""

    def pace(job: str) -> str:
        return " / ".join(f"{row.speed[p][job]:,.0f}" if job in row.speed.get(p, {}) else "-" for p in ("fp32", "bf16"))

    def share(name: str) -> str:
        mean, sd = row.mean(name), row.spread(name)
        return "" if mean is None else f"{100 * mean:.1f}" + ("" if sd is None else f" ± {100 * sd:.1f}")

    return [
        row.name + (" *" if row.stale else ""),
        str(row.year or ""),
        "" if row.parameters is None else short(row.parameters),
        "" if row.macs is None else short(row.macs),
        str(row.size or ""),
        row.failed or pace("train"),
        "" if row.failed else pace("infer"),
        "" if row.bytes is None else f"{row.bytes / 1e6:,.0f} MB",
        share(SETS[0]),
        share(SETS[1]),
    ]


def short(number: float) -> str:
    """``1739730`` -> ``1.74 M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number < 1000 * size else f"{number / size:.0f} {unit}"
    return f"{number:g}"
