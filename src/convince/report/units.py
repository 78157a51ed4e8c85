"""How the report writes numbers: one rule for each quantity, units always, no false precision."""

from __future__ import annotations

import math
from datetime import datetime

GAP = "\u00a0"  # between a number and its unit: never broken at the end of a line
THIN = "\u202f"  # between groups of three digits
NONE = "–"


def _odd(value: float | None) -> str | None:
    if value is None:
        return NONE
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return None


def percent(share: float | None, unit: bool = True) -> str:
    """A share as a percentage with one decimal: ``percent(0.975) == "97.5 %"``."""
    odd = _odd(share)
    if odd or share is None:
        return odd or NONE
    return f"{100 * share:.1f}".replace("-", "−") + (f"{GAP}%" if unit else "")


def count(value: float | None) -> str:
    """A whole number in groups of three: ``count(1797) == "1 797"``."""
    odd = _odd(value)
    if odd or value is None:
        return odd or NONE
    return f"{round(value):,}".replace(",", THIN).replace("-", "−")


def short(value: float | None) -> str:
    """A large whole number in three digits: ``short(272474) == "272 thousand"``."""
    odd = _odd(value)
    if odd or value is None:
        return odd or NONE
    for size, word in ((1e9, "billion"), (1e6, "million"), (1e4, "thousand")):
        if abs(value) >= size:
            scaled = value / (1e3 if word == "thousand" else size)
            return f"{_three(scaled)}{GAP}{word}"
    return count(value)


def _three(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def decimal(value: float | None, places: int = 3) -> str:
    """A loss or a score with fixed decimals: ``decimal(0.0931) == "0.093"``."""
    odd = _odd(value)
    if odd or value is None:
        return odd or NONE
    return f"{value:.{places}f}".replace("-", "−")


def number(value: object) -> str:
    """Anything a part may report: whole numbers in groups, others in four significant digits."""
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        odd = _odd(value)
        if odd:
            return odd
        if abs(value) < 1e15 and (abs(value) >= 1000 or value == round(value)):
            return count(value)
        return f"{value:.4g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return str(value)


def duration(seconds: float | None) -> str:
    """Wall time: ``0.42 s``, ``12.3 s``, ``2 min 05 s``, ``1 h 02 min``."""
    odd = _odd(seconds)
    if odd or seconds is None:
        return odd or NONE
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f}{GAP}ms"
    if round(seconds, 1) < 60:
        return f"{seconds:.1f}{GAP}s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60}{GAP}min {whole % 60:02d}{GAP}s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}{GAP}h {minutes % 60:02d}{GAP}min"


def size(n_bytes: float | None) -> str:
    """Bytes in decimal units: ``size(412_000_000) == "412 MB"``."""
    return _scaled(n_bytes, ("B", "kB", "MB", "GB", "TB"))


def rate(per_second: float | None) -> str:
    """Operations a second: ``rate(2.2e12) == "2.20 TFLOP/s"``."""
    return _scaled(per_second, ("FLOP/s", "kFLOP/s", "MFLOP/s", "GFLOP/s", "TFLOP/s", "PFLOP/s"))


def _scaled(value: float | None, units: tuple[str, ...]) -> str:
    odd = _odd(value)
    if odd or value is None:
        return odd or NONE
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    return f"{value:.0f}{GAP}{units[0]}" if step == 0 else f"{_three(value)}{GAP}{units[step]}"


def date(text: str) -> str:
    """An ISO date in words (``20 November 2026, 18:59``); any other text as it stands."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return text
    day = f"{when.day} {when:%B %Y}"
    return day if len(text) <= 10 else f"{day}, {when:%H:%M}" + (f" {when:%Z}" if when.tzinfo else "")
