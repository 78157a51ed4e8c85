"""Settling: the class map and the split of a source, checked against the rules for small and given sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from convince.data.found import NAMES, Found
from convince.data.pool import Skipped
from convince.data.split import check_given, draw
from convince.errors import Mistake, nearest
from convince.types import Split


def settle(found: Found, allow_one_class: bool, cut: bool) -> Found:
    """The class map, from the training part, checked against the other parts and the rules for small sets."""
    train = np.ones(len(found), bool) if found.parts is None else found.parts == 0
    counts = np.bincount(found.y[train & (found.y >= 0)], minlength=len(found.classes))
    others = np.bincount(found.y[~train & (found.y >= 0)], minlength=len(found.classes))
    lost = [found.classes[at] for at in np.flatnonzero((counts == 0) & (others > 0))]
    if lost:
        raise Mistake(
            f"{found.origin}: {len(lost)} label(s) in val or test that training lacks: {', '.join(lost)}. "
            "Put samples of each into train, or take them out of the other parts"
        )
    if not found.fixed:
        found = _drop_empty(found, counts)
        counts = counts[counts > 0]
    present = [name for name, count in zip(found.classes, counts, strict=True) if count]
    if len(present) < 2 and not allow_one_class:
        only = f"one class only, {present[0]!r}" if present else "no labels"
        note = "; -1 means unlabelled" if (found.y == -1).any() else ""
        raise Mistake(f"{found.origin}: {only}{note}. A classifier needs at least two classes with labelled samples")
    if found.parts is None and cut and (counts == 1).any():
        name = found.classes[int(np.flatnonzero(counts == 1)[0])]
        raise Mistake(f"{found.origin}: class {name!r} has one sample, which cannot be both learnt and tested. Add samples of this class, or remove the class")
    return found


def _drop_empty(found: Found, counts: np.ndarray) -> Found:
    """Without the classes that have no sample left; each is listed."""
    empty = [found.classes[at] for at in np.flatnonzero(counts == 0)]
    if not empty:
        return found
    place = np.append(np.where(counts > 0, np.cumsum(counts > 0) - 1, -1), -1)
    classes = tuple(name for name, count in zip(found.classes, counts, strict=True) if count)
    skipped = [*found.skipped, *(Skipped(name, "class left out: none of its files can be used") for name in empty)]
    extra = dict(found.extra)
    if "annotators" in extra:
        extra["annotators"] = torch.from_numpy(place)[extra["annotators"]]  # a class that is left out is not known any more
    return replace(found, y=place[found.y].astype(np.int64), classes=classes, skipped=skipped, extra=extra)


def onto(found: Found, classes: tuple[str, ...]) -> Found:
    """The labels as places in ``classes``."""
    used = np.unique(found.y[found.y >= 0])
    unknown = [found.classes[at] for at in used if found.classes[at] not in classes]
    if unknown:
        close = nearest(unknown[0], classes)
        raise Mistake(f"{found.origin}: {len(unknown)} label(s) that the model does not know: {', '.join(unknown)}{close} It knows {', '.join(classes)}")
    place = np.array([*(classes.index(name) if name in classes else -1 for name in found.classes), -1], np.int64)
    return replace(found, y=place[found.y], classes=classes)


def part_rows(found: Found, val: float, test: float, seed: int) -> Split:
    """The rows of train, val and test: as given where the data brings them, else drawn with ``seed``."""
    y = torch.from_numpy(found.y)
    groups = None if found.groups is None else torch.from_numpy(found.groups)
    if found.parts is None:
        return draw(y, val=val, test=test, seed=seed, groups=groups)
    given = [np.flatnonzero(found.parts == part) for part in range(3)]
    check_given(given, found.groups, found.origin)
    if not len(given[0]):
        raise Mistake(f"{found.origin}: its split has no {NAMES[0]} part")
    train, has_val, has_test = torch.from_numpy(given[0]), len(given[1]) > 0, len(given[2]) > 0
    if not (has_val and has_test):
        cut = draw(y, val=0.0 if has_val else val, test=0.0 if has_test else test, seed=seed, groups=groups, rows=train)
    else:
        cut = Split(train, train[:0], train[:0])
    return Split(
        cut.train,
        torch.from_numpy(given[1]) if has_val else cut.val,
        torch.from_numpy(given[2]) if has_test else cut.test,
    )
