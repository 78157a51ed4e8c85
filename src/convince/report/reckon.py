"""The report's own arithmetic: Wilson's interval, scores per class, confused pairs, reliability bins."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convince.errors import Mistake
from convince.report.facts import Calibration

Z95 = 1.959963984540054


def wilson(right: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson's score method (JASA 22, 1927): ``wilson(351, 360)`` is .953 to .987."""
    if n <= 0:
        return math.nan, math.nan
    p, z2 = right / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return (0.0 if right == 0 else centre - half), (1.0 if right == n else centre + half)


def matrix(confusion: Any, k: int | None = None) -> np.ndarray:
    """``confusion`` as counts [k k]; a shape that is not square, or not ``k``, is named."""
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or (k is not None and len(counts) != k):
        want = "square [given, answered]" if k is None else f"[{k} {k}], one row for each of the {k} classes"
        raise Mistake(f"test.confusion must be {want}, got shape {list(counts.shape)}")
    return counts.astype(np.int64)


def per_class(counts: np.ndarray) -> list[dict[str, Any]]:
    """For each class of counts [k k]: n, precision, recall with its interval, F1, and its commonest mistake.

    None stands where a score does not exist: precision of a class never answered, recall of a
    class without test pictures.
    """
    rows = []
    for i in range(len(counts)):
        n, said, right = int(counts[i].sum()), int(counts[:, i].sum()), int(counts[i, i])
        wrong = counts[i].copy()
        wrong[i] = 0
        rows.append(
            {
                "n": n,
                "said": said,
                "precision": right / said if said else None,
                "recall": right / n if n else None,
                "interval": wilson(right, n) if n else None,
                "f1": 2 * right / (n + said) if n + said else None,
                "taken_for": (int(wrong.argmax()), int(wrong.max())) if wrong.any() else None,
            }
        )
    return rows


def confused_pairs(counts: np.ndarray, most: int = 10) -> list[tuple[int, int, int]]:
    """The commonest mistakes of counts [k k]: (given, answered, how often), most frequent first."""
    off = counts.copy()
    np.fill_diagonal(off, 0)
    order = np.argsort(-off, axis=None, kind="stable")[:most]
    pairs = [(int(i // len(off)), int(i % len(off)), int(off.flat[i])) for i in order]
    return [pair for pair in pairs if pair[2] > 0]


def reliability_bins(confidence: Any, right: Any, bins: int = 15) -> Calibration:
    """Equal-width bins of the answer's probability [n] against right or wrong [n], and the ECE of them.

    ECE is the mean over pictures of ``|accuracy - confidence|`` of the bin that each lies in
    (Naeini et al. 2015; Guo et al. 2017, eq. 3). Bins are open below, closed above; empty ones are left out.
    """
    p, hit = np.asarray(confidence, float), np.asarray(right, float)
    if p.shape != hit.shape or p.ndim != 1:
        raise Mistake(f"confidence and right must both be [n], got {list(p.shape)} and {list(hit.shape)}")
    place = np.clip(np.ceil(p * bins).astype(int) - 1, 0, bins - 1)
    rows: list[Any] = []
    for b in range(bins):
        here = place == b
        if here.any():
            mean, share = float(p[here].mean()), float(hit[here].mean())
            rows.append({"low": b / bins, "high": (b + 1) / bins, "n": int(here.sum()), "confidence": mean, "accuracy": share})
    gap = sum(row["n"] * abs(row["accuracy"] - row["confidence"]) for row in rows)
    return {"bins": rows, "ece": gap / len(p) if len(p) else math.nan}
