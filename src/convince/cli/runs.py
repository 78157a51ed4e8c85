"""What the commands about a finished run share: its data, files for it, and pixels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from convince.data import Data, load, load_like
from convince.errors import Mistake
from convince.fit.folder import Loaded


def data_of(loaded: Loaded, source: str | None) -> tuple[Data, Tensor]:
    """The data to judge a run on, and its rows: the run's own test part, or all labelled rows of ``source``.

    ``source`` is decoded with the run's stored preprocessing; its classes must be among the run's.
    """
    s, p = loaded.settings, loaded.preprocess
    if source is None or source == s.data:
        data = load(s.data, size=s.size, fit=s.fit, val=s.val, test=s.test, seed=s.seed, strict=s.strict, group=s.group, workers=s.workers)
        if data.preprocess != p or data.classes != loaded.classes:
            raise Mistake(f"{s.data}: has changed since this run was made (other classes, sizes or pixels); name the data to use")
        rows = data.split.test
    else:
        data = load_like(source, preprocess=p, classes=loaded.classes, strict=s.strict, workers=s.workers)
        rows = torch.cat([data.split.train, data.split.val, data.split.test]) if not data.given_split else data.split.test
    if not len(rows):
        raise Mistake(f"{data.origin}: has no rows to judge the run on; name other data")
    return data, rows


def files_of(names: tuple[str, ...]) -> list[Path]:
    """The files named, folders opened one level deep; a missing one is a Mistake."""
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            files += sorted(p for p in path.rglob("*") if p.is_file())
        elif path.exists():
            files.append(path)
        else:
            raise Mistake(f"{name}: no such file")
    return files


def make_of_kind(spec: str, kind: str) -> tuple[str, Any]:
    """Make the part ``name:key=value``, which must be of this kind."""
    from convince import parts

    name, options = parts.parse(spec)
    part = parts.get(name)
    if part.card.kind != kind:
        raise Mistake(f"{name!r} is of kind {part.card.kind}, not {kind}; 'convince parts --kind {kind}' lists those that fit")
    return name, parts.make(name, **options)
