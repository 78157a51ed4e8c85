"""Duplicates: exact copies that stand on both sides of a split boundary."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from convince.types import Split

WIDTH = 16  # bytes of a content hash


def row_hashes(x: Tensor) -> UInt8[np.ndarray, "n 16"]:
    """A 128-bit hash of each row's values (blake2b): equal rows, and in practice only those, share one."""
    rows = np.ascontiguousarray(x.numpy())
    out = np.empty((len(rows), WIDTH), np.uint8)
    for at, row in enumerate(rows):
        out[at] = np.frombuffer(hashlib.blake2b(row, digest_size=WIDTH).digest(), np.uint8)
    return out


def across(hashes: UInt8[np.ndarray, "N 16"], split: Split) -> list[tuple[int, int]]:
    """(train row, val or test row) for each row of val and test whose content also stands in train."""
    first: dict[bytes, int] = {}
    for row in split.train.tolist():
        first.setdefault(hashes[row].tobytes(), row)
    others = torch.cat([split.val, split.test]).tolist()
    pairs = ((first.get(hashes[row].tobytes()), row) for row in others)
    return [(train, row) for train, row in pairs if train is not None]
