"""Pictures for the page: a uint8 array becomes a data URI, small ones lossless, large ones scaled down."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from convince.errors import Mistake

CRISP = 64  # pictures up to this many pixels a side are shown with hard pixels
LARGEST = 320  # longer sides are scaled down to this


@dataclass(frozen=True)
class Shown:
    """A picture ready for ``<img>``: its address, its size in pixels, and whether its pixels stay hard."""

    uri: str
    width: int
    height: int
    crisp: bool


def rgb(image: Any) -> np.ndarray:
    """``image`` as uint8 [h w 3]: grey is repeated, two channels show the first, more than four the first three."""
    array = np.asarray(image)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise Mistake(f"a picture must be uint8 [h w] or [h w c], got {array.dtype} {list(array.shape)}")
    if array.ndim == 2:
        array = array[:, :, None]
    if array.shape[2] == 4:  # over white, as a page would show it
        alpha = array[:, :, 3:].astype(np.float32) / 255
        return (array[:, :, :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)
    return np.repeat(array[:, :, :1], 3, axis=2) if array.shape[2] < 3 else np.ascontiguousarray(array[:, :, :3])


def shown(image: Any) -> Shown:
    """Encode ``image``: PNG up to 64 pixels a side, else WEBP of at most 320 pixels a side."""
    from PIL import Image

    array = rgb(image)
    height, width = array.shape[:2]
    crisp = max(height, width) <= CRISP
    picture = Image.fromarray(array)
    if max(height, width) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    if (array[..., 0] == array[..., 1]).all() and (array[..., 1] == array[..., 2]).all():
        picture = picture.convert("L")
    kind = "png" if crisp else "webp"
    out = io.BytesIO()
    if crisp:
        picture.save(out, "PNG", optimize=True)
    else:
        picture.save(out, "WEBP", quality=82, method=4)
    text = base64.b64encode(out.getvalue()).decode("ascii")
    return Shown(f"data:image/{kind};base64,{text}", picture.width, picture.height, crisp)
