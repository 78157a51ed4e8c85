"""Found: what a source says about its samples before any is decoded, in one form for all sources."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convince.data.pool import Skipped
from convince.errors import Mistake

PARTS = {"train": 0, "training": 0, "val": 1, "valid": 1, "validation": 1, "dev": 1, "test": 2, "testing": 2}
NAMES = ("train", "val", "test")
UNLABELLED = ("unlabelled", "unlabeled")


@dataclass
class Found:
    """Files or pixels or features, with labels as numbers into ``classes`` (-1 unlabelled).

    ``parts``: int8 [N], 0 train, 1 val, 2 test; None where the source has no split. ``fixed``: the
    source lists its classes itself, so classes without a sample are kept. ``where``: the folder that
    ``names`` are relative to.
    """

    origin: str
    y: np.ndarray
    classes: tuple[str, ...]
    files: list[Path] | None = None
    x: Tensor | None = None
    names: list[str] | None = None
    parts: np.ndarray | None = None
    groups: np.ndarray | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    fixed: bool = False

    def __len__(self) -> int:
        return len(self.y)

    def keep(self, rows: np.ndarray) -> Found:
        """Only these rows."""
        index = torch.from_numpy(rows)
        return replace(
            self,
            y=self.y[rows],
            files=None if self.files is None else [self.files[row] for row in rows],
            x=None if self.x is None else self.x[index],
            names=None if self.names is None else [self.names[row] for row in rows],
            parts=None if self.parts is None else self.parts[rows],
            groups=None if self.groups is None else self.groups[rows],
            extra={name: value[index] for name, value in self.extra.items()},
        )


def natural(text: str) -> tuple[Any, ...]:
    """A sort key that puts ``class 9`` before ``class 10`` and ignores case."""
    pieces = re.split(r"([0-9]+)", text)
    return tuple((int(p), "") if p.isdigit() else (-1, p.casefold()) for p in pieces if p), text


def class_name(text: str) -> str:
    """A class name as it is compared: stripped, and with accents in one form (NFC) on every system."""
    return unicodedata.normalize("NFC", text.strip())


def coded(words: Sequence[str | None]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Numbers for class names, naturally sorted; None and "" become -1, unlabelled."""
    names = [class_name(word) if word else "" for word in words]
    classes = tuple(sorted({name for name in names if name}, key=natural))
    number = {name: at for at, name in enumerate(classes)} | {"": -1}
    return np.array([number[name] for name in names], np.int64).reshape(len(names)), classes


def part_of(word: str) -> int | None:
    """0, 1 or 2 for the name of a part in any of its spellings, else None."""
    return PARTS.get(word.strip().lower())


def shown(name: str) -> str:
    """A file name that can be printed and written: undecodable bytes as ``\\udcff``."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")


def group_codes(values: Any, what: str) -> np.ndarray:
    """Group codes int64 [N] for numbers or words, in order of the sorted distinct values."""
    array = values.numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim != 1:
        raise Mistake(f"{what}: groups must be one value a sample [N]; they have shape {array.shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise Mistake(f"{what}: a group is NaN or infinite; give every sample a group")
    if array.dtype.kind == "O":
        array = array.astype(str)
    return np.unique(array, return_inverse=True)[1].astype(np.int64)
