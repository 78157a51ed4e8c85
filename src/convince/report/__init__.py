"""The HTML report of a run: one file that opens offline, from a plain dictionary of facts."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_report"]


def write_report(path: Path | str, facts: Mapping[str, Any]) -> Path:
    """Write the report of one run to ``path`` and return that path.

    ``facts`` is described field by field in :mod:`convince.report.facts`; only ``run`` is
    required, and a section without facts is replaced by a sentence that says why. The page holds
    its own style, script and pictures and asks the network for nothing. The file appears whole
    or not at all. Raises :class:`~convince.errors.Mistake` for a missing ``run`` or an unknown field.
    """
    from convince.report.page import render

    return put(Path(path), render(facts))


def put(path: Path, text: str) -> Path:
    """Write a page, whole or not at all, and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    return path
