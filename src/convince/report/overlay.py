"""Overlay: lay an explanation's map over its picture as heat, in a colour scale of even lightness."""

from __future__ import annotations

from typing import Any

import numpy as np

from convince.errors import Mistake
from convince.report.pictures import rgb

# Viridis at 0, 1/16 ... 1 (van der Walt and Smith 2015, CC0), read between by straight lines.
STOPS = "440154 48186a 472d7b 424086 3b528b 33638d 2c728e 26828e 21918c 1fa088 28ae80 3fbc73 5ec962 84d44b addc30 d8e219 fde725"
_TABLE = np.array([[int(stop[i : i + 2], 16) for i in (0, 2, 4)] for stop in STOPS.split()], np.float32)


def colours(share: Any) -> np.ndarray:
    """Viridis colours, float32 [... 3] in 0 to 255, of numbers in 0 to 1."""
    place = np.clip(np.asarray(share, np.float32), 0, 1) * (len(_TABLE) - 1)
    low = np.minimum(place.astype(int), len(_TABLE) - 2)
    part = (place - low)[..., None]
    return _TABLE[low] * (1 - part) + _TABLE[low + 1] * part


def normalised(map: Any) -> np.ndarray | None:
    """``map`` [h w] brought to 0 to 1 by its own lowest and highest finite value; None if it is flat.

    NaN and infinite pixels stay NaN.
    """
    values = np.asarray(map, np.float64)
    values = np.where(np.isfinite(values), values, np.nan)
    if not np.isfinite(values).any():
        return None
    low, high = np.nanmin(values), np.nanmax(values)
    if high - low <= 1e-12 * max(abs(high), abs(low)):
        return None
    return (values - low) / (high - low)


def overlay(image: Any, map: Any, strength: float = 0.6) -> np.ndarray:
    """Heat of ``map`` float [h w] over ``image`` uint8 [h w] or [h w c], as uint8 [h w 3].

    Each pixel is ``(1 - strength) * grey + strength * colour``. The map is normalised by itself and
    scaled to the picture's size if it is smaller or larger. Where it is not finite the grey picture
    shows through; a flat map says nothing, and gives the grey picture back. Neither argument is changed.
    """
    picture = rgb(image)
    heat = np.asarray(map)
    if heat.ndim != 2 or 0 in heat.shape:
        raise Mistake(f"a heat map must be [h w], got shape {list(heat.shape)}")
    grey = (picture @ np.array([0.299, 0.587, 0.114])).round()[..., None].repeat(3, axis=2)
    share = normalised(heat)
    if share is None:
        return grey.astype(np.uint8)
    known = np.isfinite(share)
    share, known = _resized(np.where(known, share, 0), picture), _resized(known, picture) > 0.999
    mixed = (1 - strength) * grey + strength * colours(share)
    return np.where(known[..., None], mixed, grey).round().clip(0, 255).astype(np.uint8)


def _resized(values: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """``values`` [a b] at the picture's height and width, bilinear."""
    from PIL import Image

    height, width = picture.shape[:2]
    if values.shape == (height, width):
        return values.astype(np.float32)
    small = Image.fromarray(values.astype(np.float32))
    return np.asarray(small.resize((width, height), Image.Resampling.BILINEAR))
