"""Explainers: why an answer was given."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convince.explain.cnn_explainer import trace

__all__ = ["trace"]


def __getattr__(name: str) -> Any:
    """``convince.explain.trace``, imported when it is asked for, so that listing parts imports nothing heavy."""
    if name == "trace":
        from convince.explain.cnn_explainer import trace

        return trace
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
