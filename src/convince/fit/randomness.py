"""Randomness is counted, not streamed: every draw has a key, so a run's place is four integers."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch


def key(*words: object) -> int:
    """A 63-bit number for these words, equal on every machine: ``key(seed, "cutmix", stage, epoch, step)``."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*words: object) -> torch.Generator:
    """A fresh CPU generator seeded by :func:`key`."""
    gen = torch.Generator()
    gen.manual_seed(key(*words))
    return gen


def seed_global(*words: object) -> None:
    """Seed torch's, numpy's and Python's global state, for what draws from it (dropout, drop-path)."""
    number = key(*words)
    torch.manual_seed(number)
    np.random.seed(number % 2**32)
    random.seed(number)


@contextlib.contextmanager
def preserved() -> Iterator[None]:
    """Put torch's, numpy's and Python's global state back afterwards, also after an exception."""
    numpy_state, python_state = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            np.random.set_state(numpy_state)
            random.setstate(python_state)
