"""Tables: CSV and Parquet files that list images with their labels, or hold features themselves."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convince.data.arrays import from_arrays
from convince.data.extras import ANNOTATOR, NUISANCE, from_columns, named
from convince.data.found import NAMES, Found, coded, group_codes, part_of, shown
from convince.data.pool import Skipped
from convince.errors import Mistake, nearest

PATHS = ("path", "file", "filename", "file_name", "filepath", "image", "image_path")
LABELS = ("label", "class", "target", "y", "category", "labels")
SPLITS = ("split", "part", "subset", "set")

Columns = dict[str, list[Any]]


def from_table(path: Path, origin: str, group: Any = None) -> Found:
    """A CSV (``,`` ``;`` or tab; UTF-8, a byte order mark is fine) or Parquet file.

    With a column ``path`` it lists image files, relative to the table's folder; otherwise all columns but
    label, split and group are features. Columns: path, label, and where there are such split and
    the one that ``group`` names; ``annotator:NAME`` holds the labels that somebody gave, ``nuisance`` what should not be
    read. An empty label means unlabelled. Rows with too few cells are
    listed as skipped. Raises Mistake for missing columns and unknown words in the split column.
    """
    skipped: list[Skipped] = []
    columns = _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_csv(path, skipped)
    names = {name.strip().lower(): name for name in columns}
    where = _first(names, PATHS)
    label = _first(names, LABELS)
    split = _first(names, SPLITS)
    if label is None:
        raise _missing(path, "label", LABELS, list(columns))
    words = [_word(value) for value in columns[label]]
    if not words:
        raise Mistake(f"{path}: has a header and no rows; add one row a sample")
    groups = _group_column(path, columns, group, len(words))
    parts = None if split is None else _parts(path, [_word(value) for value in columns[split]])
    beside = {name: [_word(value) for value in columns[name]] for word in (ANNOTATOR, NUISANCE) for name in named(list(columns), word)}
    if where is None:
        used = {label, split, group if isinstance(group, str) else None, *beside}
        features = _features(path, {name: column for name, column in columns.items() if name not in used})
        found = from_arrays(features, [word or None for word in words], origin)
        found.parts, found.groups, found.skipped = parts, groups, skipped
        found.extra = from_columns(beside, found.classes, origin)
        return found
    files = [_word(value) for value in columns[where]]
    keep = np.array([row for row, name in enumerate(files) if name], np.int64)
    empty = [row for row, name in enumerate(files, 1) if not name]
    skipped += [Skipped(f"{path.name}, row {row}", "its path is empty") for row in empty]
    y, classes = coded(words)
    full = [path.parent / name for name in files]
    shown_names = [shown(name) for name in files]
    extra = from_columns(beside, classes, origin)
    found = Found(origin, y, classes, full, names=shown_names, parts=parts, groups=groups, skipped=skipped, extra=extra)
    return found.keep(keep)


def _first(names: dict[str, str], wanted: Sequence[str]) -> str | None:
    return next((names[name] for name in wanted if name in names), None)


def _missing(path: Path, what: str, wanted: Sequence[str], have: list[str]) -> Mistake:
    hint = next((text for name in have if (text := nearest(name.lower(), list(wanted)))), "")
    shown_columns = ", ".join(repr(name) for name in have) or "none"
    return Mistake(f"{path}: no column {what!r}; its columns are {shown_columns}. Name one {', '.join(wanted)}{hint}")


def _word(value: Any) -> str:
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _read_csv(path: Path, skipped: list[Skipped]) -> Columns:
    text = _text(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    mark = max(",;\t", key=lambda sign: _outside_quotes(first).count(sign))
    if path.suffix.lower() == ".tsv":
        mark = "\t"
    try:
        rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=mark) if any(map(str.strip, row))]
    except csv.Error as error:
        raise Mistake(f"{path}: not a readable CSV: {error}; save it again as CSV, UTF-8") from None
    if not rows:
        raise Mistake(f"{path}: the table is empty; its first row names the columns, such as path,label")
    head = [name.strip() for name in rows[0]]
    double = next((name for name in head if name and head.count(name) > 1), None)
    if double is not None:
        raise Mistake(f"{path}: two columns are named {double!r}; give each its own name")
    columns: Columns = {name: [] for name in head if name}
    for number, row in enumerate(rows[1:], 1):
        if len(row) < len(head):
            skipped.append(Skipped(f"{path.name}, row {number}", f"has {len(row)} cells of {len(head)}"))
            continue
        for name, cell in zip(head, row, strict=False):
            if name:
                columns[name].append(cell)
    return columns


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
    except PermissionError:
        raise Mistake(f"{path}: no permission to read it; change its mode or owner") from None
    except OSError as error:
        raise Mistake(f"{path}: cannot be read: {error.strerror}") from None
    wide = raw.startswith((b"\xff\xfe", b"\xfe\xff"))
    try:
        return raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise Mistake(f"{path}: byte {error.start} is not UTF-8; save the table as CSV, UTF-8") from None


def _outside_quotes(line: str) -> str:
    return "".join(line.split('"')[::2])


def _read_parquet(path: Path) -> Columns:
    try:
        from pyarrow import parquet
    except ImportError:
        raise Mistake(f"{path}: reading Parquet needs pyarrow; install it, or save the table as CSV") from None
    try:
        return dict(parquet.read_table(path).to_pydict())
    except Exception as error:  # pyarrow has its own family of errors
        raise Mistake(f"{path}: not a readable Parquet file ({str(error).splitlines()[0][:160]})") from None


def _parts(path: Path, words: list[str]) -> np.ndarray:
    number = [part_of(word) for word in words]
    for row, (word, part) in enumerate(zip(words, number, strict=True)):
        if part is None:
            raise Mistake(f"{path}: row {row + 1}: split {word!r} is not known; write one of {', '.join(NAMES)}")
    return np.array(number, np.int8)


def _group_column(path: Path, columns: Columns, group: Any, n: int) -> np.ndarray | None:
    if group is None:
        return None
    if not isinstance(group, str):
        groups = group_codes(group, str(path))
        if len(groups) != n:
            raise Mistake(f"{path}: {n} rows but {len(groups)} groups; give one group a row")
        return groups
    if group not in columns:
        have = ", ".join(columns)
        raise Mistake(f"{path}: no column {group!r} for the groups{nearest(group, list(columns))} Columns: {have}")
    words = [_word(value) for value in columns[group]]
    if "" in words:
        raise Mistake(f"{path}: row {words.index('') + 1} has no {group}; every row needs a group")
    return group_codes(words, str(path))


def _features(path: Path, columns: Columns) -> np.ndarray:
    if not columns:
        raise _missing(path, "path", PATHS, [])
    out = np.empty((len(next(iter(columns.values()))), len(columns)), np.float32)
    for at, (name, column) in enumerate(columns.items()):
        for row, value in enumerate(column):
            try:
                out[row, at] = float(value)
            except (TypeError, ValueError):
                raise Mistake(
                    f"{path}: no column 'path', and column {name!r}, row {row + 1} is no number: {value!r:.60}. "
                    f"A table of images names its path column one of {', '.join(PATHS)}; features are numbers"
                ) from None
    return out
