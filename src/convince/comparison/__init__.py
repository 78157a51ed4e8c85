"""Compare: try any part against a baseline on your own data, in pairs of runs, with honest statistics."""

from __future__ import annotations

from convince.comparison.engine import compare
from convince.comparison.evidence import Evidence, Finding

__all__ = ["Evidence", "Finding", "compare"]
