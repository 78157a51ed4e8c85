"""Sources: which reader takes what a person points at."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from convince.data import arrays, builtin, folders, tables
from convince.data.found import Found
from convince.errors import Mistake, nearest


def find(source: Any, y: Any, *, group: Any, size: int | None, fit: str, cache: Path, flat: bool = False) -> Found:
    """What the source is and holds, before anything is decoded. ``flat``: images may stand directly in a folder, unlabelled."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        if y is not None:
            raise Mistake(f"{text!r} brings its own labels; leave y out")
        if isinstance(source, str) and text in builtin.BUILTIN:
            return builtin.from_builtin(text, cache)
        return _from_path(Path(text).expanduser(), text, group, cache, flat)
    if isinstance(source, Mapping) and not hasattr(source, "iloc"):
        return arrays.from_mapping(source, "arrays", group)
    if isinstance(source, tuple) and len(source) == 2 and y is None:
        return arrays.from_arrays(source[0], source[1], "arrays", group)
    if isinstance(source, (np.ndarray, Tensor, list)) or hasattr(source, "iloc") or hasattr(source, "__array__"):
        return arrays.from_arrays(source, y, "arrays" if not hasattr(source, "iloc") else "DataFrame", group)
    if hasattr(source, "__getitem__") or hasattr(source, "__iter__"):
        side = (size, size) if size else None
        return arrays.from_dataset(source, type(source).__name__, side, fit, group)
    raise Mistake(
        f"data of type {type(source).__name__} is not known; give a folder, a table (.csv, .parquet), an .npz file, "
        f"arrays (x, y), a torch Dataset, or one of {', '.join(builtin.BUILTIN)}"
    )


def _from_path(path: Path, text: str, group: Any, cache: Path, flat: bool) -> Found:
    try:
        exists, is_folder = path.exists(), path.is_dir()
    except OSError as error:
        raise Mistake(f"{text}: cannot be read: {error.strerror}") from None
    if not exists:
        beside = os.listdir(path.parent) if path.parent.is_dir() and os.access(path.parent, os.R_OK) else []
        close = nearest(text, builtin.BUILTIN) or nearest(path.name, beside)
        raise Mistake(f"{text!r}: no such file or folder, and no built-in set ({', '.join(builtin.BUILTIN)}){close}")
    if is_folder:
        return builtin.from_idx(path, text) if builtin.is_idx(path) else folders.from_folder(path, text, group, flat)
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv", ".txt", ".parquet"):
        return tables.from_table(path, text, group)
    if suffix == ".npz":
        return builtin.from_npz(path, text, cache, group)
    kind = suffix or "no suffix"
    raise Mistake(f"{text}: files of this kind ({kind}) are not read; give a folder, .csv, .parquet or .npz")
