"""Probes in the report: what they found is kept in ``RUN/probes``, and drawn into ``report.html`` as it comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from convince.report import put
from convince.report.drawings import draw, from_json, to_json
from convince.report.facts import SECTIONS, tidy
from convince.types import Findings

OPEN, CLOSE = "<!--probes-->", "<!--/probes-->"


def probes(f: dict[str, Any]) -> list[dict[str, Any]] | None:
    """What the template prints of ``facts["probes"]``, figures drawn."""
    found = []
    for row in f.get("probes") or []:
        figures = from_json(row).figures
        found.append({**row, "figures": [(figure.title, draw(figure)) for figure in figures]})
    return found or None


def keep(run: Path, part: str, title: str, found: Findings) -> Path:
    """Write what a probe found to ``RUN/probes/PART.json``."""
    row = {"part": part, "title": title, **to_json(found)}
    return put(run / "probes" / f"{part}.json", json.dumps(row, indent=1, allow_nan=False) + "\n")


def kept(run: Path) -> list[dict[str, Any]]:
    """What probes have found on this run so far, by name; a file that cannot be read is told of in place of its findings."""
    rows = []
    for path in sorted((run / "probes").glob("*.json")):
        try:
            row = json.loads(path.read_text(encoding="utf-8"))
            from_json(row)
            rows.append({"part": str(row["part"]), "title": str(row["title"]), "readings": row["readings"], "figures": row["figures"]})
        except (OSError, ValueError, KeyError, TypeError) as error:
            rows.append(
                {"part": path.stem, "title": f"{path.name} cannot be read ({type(error).__name__}); run the probe again", "readings": [], "figures": []}
            )
    return rows


def renew(run: Path) -> Path | None:
    """Draw all that was kept into the run's report; None where there is no report with a place for it."""
    from convince.report.page import fill

    path = run / "report.html"
    if not path.is_file():
        return None
    text = path.read_text(encoding="utf-8")
    before, opened, rest = text.partition(OPEN)
    _, closed, after = rest.partition(CLOSE)
    if not opened or not closed:
        return None
    section = fill("probes.html", {"s": probes(tidy({"run": str(run), "probes": kept(run)})), "why": SECTIONS["probes"]})
    return put(path, before + OPEN + section + CLOSE + after)
