"""Every malformed or odd file is loaded or listed; none crashes, hangs or vanishes."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from convince.data import load
from convince.data.found import shown


def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_malformed", Path(__file__).parent.parent / "make_malformed.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_malformed"] = module
    spec.loader.exec_module(module)
    return module


def test_every_file_is_loaded_or_listed(tmp_path: Path, write: Callable[..., Path]) -> None:
    start = time.perf_counter()
    expected = maker().make(tmp_path / "set" / "odd")
    write(tmp_path / "set", {"plain": 5})
    data = load(tmp_path / "set", size=32)
    assert data.names is not None
    used = {name.removeprefix("odd/") for name in data.names}
    listed = {row.file.removeprefix("odd/"): row.reason for row in data.skipped}
    assert len(expected) >= 150
    assert not used & set(listed)
    for name, outcome in expected.items():
        name = shown(name)
        got = "ok" if name in used else "skip" if name in listed else "vanished"
        assert got == outcome or (outcome == "any" and got != "vanished"), (name, outcome, got, listed.get(name))
    assert all(reason and len(reason) < 300 and "/" + "set/" not in reason for reason in listed.values())
    assert len(data) == len(used)
    assert data.x.take(data.split.train).shape[1:] == (3, 32, 32)
    assert time.perf_counter() - start < 20
