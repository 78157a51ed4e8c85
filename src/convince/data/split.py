"""Splits: stratified, seeded, grouped; drawn from a key, so the global random state is never touched."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from convince.errors import Mistake
from convince.types import Split

Rows = np.ndarray  # int64 row numbers


def shuffled(rows: Rows, *key: object) -> Rows:
    """``rows`` in an order that depends on ``key`` and their number alone, equal on every machine."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "big"))
    return rows[np.argsort(bits.random_raw(len(rows)), kind="stable")]


def check_parts(val: float, test: float) -> None:
    """Raise a Mistake unless ``val`` and ``test`` are shares in [0, 1) that leave something to train on."""
    for name, value in (("val", val), ("test", test)):
        if not 0 <= value < 1:
            raise Mistake(f"{name}={value!r} must be a share of all samples, from 0 up to but not including 1")
    if val + test >= 1:
        raise Mistake(f"val={val} and test={test} leave nothing to train on; their sum must stay below 1")


def draw(
    y: Int[Tensor, " N"],
    *,
    val: float,
    test: float,
    seed: int,
    groups: Int[Tensor, " N"] | None = None,
    rows: Int[Tensor, " m"] | None = None,
) -> Split:
    """Cut ``rows`` (None: all) into train, val and test with the classes in equal shares.

    ``val`` and ``test`` are shares of the rows drawn from. Every class keeps one row in train and,
    from three rows on, has one in test. Unlabelled rows (``y`` = -1) go to train. With ``groups``
    all rows of a group land in one part, and the shares are as near as whole groups allow.
    Parts come sorted. Raises Mistake where one group holds everything that was to be cut.
    """
    check_parts(val, test)
    labels = y.numpy()
    pool = np.arange(len(labels)) if rows is None else rows.numpy()
    if groups is not None and (val or test):
        parts = _draw_groups(labels, groups.numpy(), pool, val, test, seed)
    else:
        parts = _draw_rows(labels, pool, val, test, seed)
    return Split(*(torch.from_numpy(np.sort(part).astype(np.int64)) for part in parts))


def _draw_rows(y: Rows, pool: Rows, val: float, test: float, seed: int) -> tuple[Rows, Rows, Rows]:
    free = pool[y[pool] < 0]
    classes = [pool[y[pool] == label] for label in np.unique(y[pool][y[pool] >= 0])]
    counts = np.array([len(part) for part in classes], np.int64)
    n_test = quotas(counts, test, least=np.where(counts >= 3, 1, 0), most=counts - 1)
    n_val = quotas(counts, val, least=np.zeros_like(counts), most=counts - 1 - n_test)
    cut: tuple[list[Rows], list[Rows], list[Rows]] = ([free], [], [])
    for part, a, b in zip(classes, n_test, n_val, strict=True):
        order = shuffled(part, "split", seed, int(y[part[0]]))
        cut[2].append(order[:a])
        cut[1].append(order[a : a + b])
        cut[0].append(order[a + b :])
    empty = np.zeros(0, np.int64)
    train, val_rows, test_rows = (np.concatenate([empty, *part]) for part in cut)
    return train, val_rows, test_rows


def in_shares(rows: Tensor, y: Tensor, count: int) -> Tensor:
    """The first ``count`` of these rows in the classes' own shares: the i-th of n of its class stands at i/n, and the sort is cut."""
    place = torch.empty(len(rows))
    for label in y[rows].unique():
        inside = (y[rows] == label).nonzero()[:, 0]
        place[inside] = (torch.arange(len(inside)) + 0.5) / len(inside)
    return rows[place.argsort(stable=True)[:count]]


def quotas(counts: Rows, share: float, least: Rows, most: Rows) -> Rows:
    """How many of each class to take: ``share`` of each, rounded by largest remainder, within bounds.

    The sum is the rounded share of all (at least 1 where anything may be taken) unless the bounds forbid.
    """
    if share <= 0 or len(counts) == 0:
        return np.zeros_like(counts)
    exact = counts * share
    most = np.maximum(most, 0)
    take = np.clip(np.floor(exact).astype(np.int64), np.minimum(least, most), most)
    missing = max(1, round(float(exact.sum()))) - int(take.sum())
    for at in np.argsort(-(exact - np.floor(exact)), kind="stable"):
        if missing <= 0:
            break
        if take[at] < most[at] and take[at] < exact[at]:
            take[at] += 1
            missing -= 1
    if take.sum() == 0 and most.sum() > 0:
        take[np.argmax(most)] = 1
    return take


def _draw_groups(y: Rows, groups: Rows, pool: Rows, val: float, test: float, seed: int) -> tuple[Rows, Rows, Rows]:
    """Place whole groups, large ones first, each where the class counts come nearest their shares."""
    names, code = np.unique(groups[pool], return_inverse=True)
    if len(names) < 1 + (val > 0) + (test > 0):
        raise Mistake(
            f"{len(names)} group(s) cannot be cut into train{', val' * (val > 0)}{', test' * (test > 0)}: "
            "a group stays in one part. Set val=0 or test=0, or name another group"
        )
    known = np.unique(y[pool])
    table = np.zeros((len(names), len(known)))  # rows of each class in each group
    np.add.at(table, (code, np.searchsorted(known, y[pool])), 1)
    shares = np.array([1 - val - test, val, test])
    where = _place(table, shares, shuffled(np.arange(len(names)), "groups", seed))
    where = _mend(table, where, shares)
    return pool[where[code] == 0], pool[where[code] == 1], pool[where[code] == 2]


def _place(table: np.ndarray, shares: np.ndarray, order: Rows) -> Rows:
    order = order[np.argsort(-table[order].sum(1), kind="stable")]
    total = table.sum(0)
    have, goal = np.zeros((3, table.shape[1])), shares[:, None] * total
    where = np.zeros(len(table), np.int64)
    for group in order:
        error = ((have + table[group] - goal) ** 2 - (have - goal) ** 2) / np.maximum(total, 1)
        # relative to each part's own goal, so that small parts are filled as well as large ones
        cost = np.where(shares > 0, error.sum(1) / np.maximum(shares, 1e-9), np.inf)
        where[group] = int(np.argmin(cost))
        have[where[group]] += table[group]
    return where


def _mend(table: np.ndarray, where: Rows, shares: np.ndarray) -> Rows:
    """Move the smallest groups there are so that train has every class and no wanted part is empty."""
    where, size = where.copy(), table.sum(1)
    for part in np.flatnonzero(shares > 0):
        if not (where == part).any():
            counts = [(where == other).sum() for other in range(3)]
            donor = np.flatnonzero(where == int(np.argmax(counts)))
            where[donor[np.argmin(size[donor])]] = part
    for label in range(table.shape[1]):
        if table[where == 0, label].sum() == 0:
            holders = np.flatnonzero(table[:, label])
            where[holders[np.argmin(size[holders])]] = 0
    return where


def check_given(parts: Sequence[np.ndarray], groups: np.ndarray | None, origin: str) -> None:
    """Raise a Mistake where a group stands on both sides of a split that came with the data."""
    if groups is None:
        return
    for other, name in ((parts[1], "val"), (parts[2], "test")):
        both = np.intersect1d(groups[parts[0]], groups[other])
        if len(both):
            raise Mistake(
                f"{origin}: {len(both)} group(s) stand in both train and {name}; a group must stay on one side. "
                "Leave out the split column so that a grouped split is drawn, or name no group"
            )
