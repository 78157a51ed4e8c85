"""Each test has a cache of its own, and small sets to read."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh user cache folder."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "convince"


@pytest.fixture
def write() -> Callable[..., Path]:
    """:func:`write_photos`."""
    return write_photos


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three classes of ten noise photographs, 40 x 50 PNG."""
    return write_photos(tmp_path / "photos", {"cat": 10, "dog 2": 10, "dog 10": 10})


def write_photos(root: Path, counts: dict[str, int], size: tuple[int, int] = (40, 50), seed: int = 0) -> Path:
    """Class folders with noise; no two images are equal."""
    rng = np.random.default_rng(seed)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def stored_sets() -> Callable[[str], Path]:
    """The folder of a set below $CONVINCE_DATA, or a skip that says what is missing."""

    def folder(name: str) -> Path:
        root = os.environ.get("CONVINCE_DATA")
        if not root:
            pytest.skip("CONVINCE_DATA is not set")
        path = Path(root) / name
        if not path.is_dir():
            pytest.skip(f"{name} is not in $CONVINCE_DATA")
        return path

    return folder
