"""Convince: deep classification in which every published method is a part you switch on by name.

Nothing heavy is imported until it is used: ``import convince`` takes milliseconds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Card", "Classifier", "compare", "find", "load", "make", "open_run"]

if TYPE_CHECKING:
    from convince.classifier import Classifier
    from convince.comparison import compare
    from convince.data import load
    from convince.fit.folder import open_run
    from convince.parts import Card, find, make

_HOMES = {
    "Card": "convince.parts",
    "find": "convince.parts",
    "make": "convince.parts",
    "Classifier": "convince.classifier",
    "compare": "convince.comparison",
    "load": "convince.data",
    "open_run": "convince.fit.folder",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convince' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
