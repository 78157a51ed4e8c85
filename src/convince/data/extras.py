"""What comes beside samples and labels: the labels that annotators gave, and nuisances that a classifier should not read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convince.data.found import class_name
from convince.errors import Mistake, nearest

ANNOTATOR, NUISANCE = "annotator", "nuisance"
ARRAYS = ("annotators", "nuisance")


def named(columns: Sequence[str], word: str) -> list[str]:
    """Columns called ``word``, or ``word:NAME``, in their order."""
    return [name for name in columns if name.strip().lower() == word or name.strip().lower().startswith(word + ":")]


def from_columns(columns: Mapping[str, Sequence[str]], classes: Sequence[str], origin: str) -> dict[str, Tensor]:
    """``annotators`` [N m] as places in ``classes`` and ``nuisance`` [N] or [N q] as codes of sorted values; an empty cell is -1."""
    extra: dict[str, Tensor] = {}
    given, biases = named(list(columns), ANNOTATOR), named(list(columns), NUISANCE)
    if given:
        place = {name: at for at, name in enumerate(classes)} | {"": -1}
        rows = [[class_name(word) if word else "" for word in columns[name]] for name in given]
        strange = next((word for column in rows for word in column if word not in place), None)
        if strange is not None:
            raise Mistake(f"{origin}: an annotator says {strange!r}, which is no class{nearest(strange, list(classes))} Classes: {', '.join(classes)}")
        extra["annotators"] = torch.tensor([[place[word] for word in column] for column in rows], dtype=torch.int64).T.contiguous()
    if biases:
        codes = []
        for name in biases:
            values = sorted({word for word in columns[name] if word})
            code = {word: at for at, word in enumerate(values)} | {"": -1}
            codes.append([code[word] for word in columns[name]])
        table = torch.tensor(codes, dtype=torch.int64).T.contiguous()
        extra["nuisance"] = table[:, 0] if len(biases) == 1 else table
    return extra


def from_arrays_named(arrays: Mapping[str, Any], counts: Sequence[tuple[str, int]], classes: Sequence[str], origin: str) -> dict[str, Tensor]:
    """The arrays ``annotators`` and ``nuisance`` of a mapping; of parts (train, val, test with their rows) where it comes in parts.

    Whole numbers, -1 where unknown; annotators write classes as the labels do. A part that lacks the array is unknown throughout.
    """
    extra: dict[str, Tensor] = {}
    for name in ARRAYS:
        found: list[np.ndarray | None] = []
        for part, rows in counts:
            key = next((key for key in arrays if key.lower() in ((f"{part}_{name}", f"{name}_{part}") if part else (name,))), None)
            value = None if key is None else np.asarray(arrays[key])
            if value is not None and (value.dtype.kind not in "iu" or value.ndim not in (1, 2) or len(value) != rows):
                raise Mistake(f"{origin}: {key} must be whole numbers with {rows} rows, [N] or [N m]; it is {value.dtype} {value.shape}")
            found.append(value)
        known = next((value for value in found if value is not None), None)
        if known is None:
            continue
        shape = known.shape[1:]
        filled = [np.full((rows, *shape), -1, np.int64) if value is None else value for (_, rows), value in zip(counts, found, strict=True)]
        if any(value.shape[1:] != shape for value in filled):
            raise Mistake(f"{origin}: {name} has other columns in one part than in another; give every part the same")
        table = torch.from_numpy(np.concatenate(filled).astype(np.int64))
        if int(table.min()) < -1:
            raise Mistake(f"{origin}: {name} must be -1 (unknown) or more; the least is {int(table.min())}")
        if name == "annotators":
            table = _places(table, classes, origin)
        extra[name] = table[:, None] if name == "annotators" and table.ndim == 1 else table
    return extra


def _places(table: Tensor, classes: Sequence[str], origin: str) -> Tensor:
    """Numbers of labels as places among the classes: by value where classes are numbers themselves, else by position."""
    numbers = [int(name) for name in classes] if all(name.isdigit() for name in classes) else list(range(len(classes)))
    place = {number: at for at, number in enumerate(numbers)} | {-1: -1}
    strange = [value for value in table.unique().tolist() if value not in place]
    if strange:
        raise Mistake(f"{origin}: an annotator says {strange[0]}, which no label has; labels are {', '.join(map(str, numbers))}, and -1 is unknown")
    out = torch.full_like(table, -1)
    for number, at in place.items():
        out[table == number] = at
    return out
