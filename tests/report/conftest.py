"""Facts for the tests of the report: a small real run, and one that tries the page."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("report_preview", Path(__file__).with_name("preview.py"))
assert _spec is not None
assert _spec.loader is not None
preview = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(preview)


@pytest.fixture(scope="session")
def digits() -> dict[str, Any]:
    return preview.digits_facts(epochs=6)


@pytest.fixture(scope="session")
def hard() -> dict[str, Any]:
    return preview.hard_facts()


@pytest.fixture(scope="session")
def make_hard() -> Any:
    return preview.hard_facts
