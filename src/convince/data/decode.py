"""Decoding: one image file to one uint8 tensor, by a policy that is written down and tested.

=====================  ====================================================================================
what                   what happens
=====================  ====================================================================================
format                 by content, never by name: JPEG PNG GIF BMP WEBP TIFF PPM; all else is refused
bombs                  refused from the header, before decoding: more than ``limit_pixels`` (100 megapixels)
file size              above 1 GiB refused
truncated, damaged     refused, never half an image
EXIF orientation 1-8   applied; damaged EXIF is ignored, the pixels count
animation, pages       the first frame or page
palette                to RGB
alpha                  composited on white
CMYK, YCbCr, HSV       to RGB; LAB and other modes are refused; colour profiles are ignored
16-bit grey            v / 257, rounded (0..65535 to 0..255); 16-bit colour keeps its high byte
32-bit whole numbers   as 16-bit where all lie in 0..65535, else refused
float                  in [0, 1]: times 255; in [0, 255]: as it is; else its own range is spread over 0..255;
                       NaN and infinity are refused as damaged
grey from colour       ITU-R 601 luma, 0.299 R + 0.587 G + 0.114 B
resizing               antialiased bilinear; large JPEGs are decoded at 1/2, 1/4 or 1/8 first (never below
                       twice the wanted size), other large images are box-reduced first by the same rule
=====================  ====================================================================================
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin
from torch import Tensor

from convince.data.preprocess import check_fit
from convince.errors import Mistake

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM")
LIMIT_PIXELS = 100_000_000  # 300 MB as RGB; the largest cameras in common use stay below
LIMIT_BYTES = 1 << 30
GREY = 128  # the padding of a letterbox, of 255
WHITE = (255, 255, 255, 255)
GAP = 2.0  # how much larger than wanted an image stays in the fast, coarse reduction

_PLUGINS = (TiffImagePlugin, WebPImagePlugin)  # registered here once, before threads ask for them
_TURN = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_STARTS = {
    b"PK\x03\x04": "a zip archive",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "a gzip archive",
    b"\x7fELF": "a program",
    b"<svg": "SVG, a drawing",
    b"<?xml": "XML",
    b"<!doctype html": "a web page",
    b"<html": "a web page",
    b"RIFF": "sound or film",
    b"8BPS": "a Photoshop file",
}

_SIGNS = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"RIFF": "WEBP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}

A = TypeVar("A")
B = TypeVar("B")


class Unreadable(Mistake):
    """A file that is no image by the policy; ``reason`` says why in a few words."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


def decode(
    source: str | Path | bytes,
    channels: int,
    size: tuple[int, int],
    fit: str = "letterbox",
    limit_pixels: int = LIMIT_PIXELS,
) -> UInt8[Tensor, "c h w"]:
    """Decode a file (or its bytes) to uint8 [channels, *size] by the policy above.

    ``size`` is (rows, columns); ``fit`` is "letterbox", "crop" or "stretch". Raises
    :class:`Unreadable`, a Mistake with file and reason, for whatever the policy refuses.
    """
    check_fit(fit)
    rows, columns = size
    with _reading(source, limit_pixels) as im:
        full = _check_header(im, limit_pixels)
        im.draft(None, _wanted(full, size))
        im.load()
        turn = _orientation(im)
        im = to_mode(im, channels)
    # outside the guard: from here on an error is ours, not the file's
    upright = (im.height, im.width) if turn < 5 else (im.width, im.height)
    box, inner = _plan(upright, (rows, columns), fit)
    im = _resize(im, box, inner, turn)
    if (im.height, im.width) != (rows, columns):
        canvas = Image.new(im.mode, (columns, rows), GREY if channels == 1 else (GREY,) * 3)
        canvas.paste(im, ((columns - im.width) // 2, (rows - im.height) // 2))
        im = canvas
    pixels = np.array(im).reshape(rows, columns, channels)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


def look(source: str | Path | bytes, limit_pixels: int = LIMIT_PIXELS) -> tuple[tuple[int, int], bool]:
    """(rows, columns) as a person sees the image, and whether it is grey: no pixel has unequal channels."""
    with _reading(source, limit_pixels) as im:
        full = _check_header(im, limit_pixels)
        im.draft(None, (128, 128))
        im.load()
        tiff = im.format == "TIFF"  # the one format that loading turns by itself
        turn = _orientation(im)
        columns, rows = im.size if tiff else full
        grey = im.mode in ("1", "L", "LA", "I", "F") or im.mode.startswith("I;16")
        pixels = None if grey else np.asarray(to_mode(im, 3))
    if pixels is not None:
        grey = bool((pixels == pixels[:, :, :1]).all())
    return ((columns, rows) if turn >= 5 else (rows, columns)), grey


def refit(pixels: UInt8[np.ndarray, "h w c"], size: tuple[int, int], fit: str) -> UInt8[Tensor, "c rows columns"]:
    """An image that is in memory already, brought to ``size`` (rows, columns) as :func:`decode` does."""
    channels = pixels.shape[2]
    im = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels)
    stream = io.BytesIO()
    im.save(stream, "PPM")
    return decode(stream.getvalue(), channels, size, fit)


# -- reading ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def _reading(source: str | Path | bytes, limit_pixels: int) -> Iterator[Image.Image]:
    """The opened image; every way in which reading can fail becomes :class:`Unreadable`."""
    name = "bytes" if isinstance(source, bytes) else os.fspath(source)
    try:
        raw = source if isinstance(source, bytes) else read_bytes(source)
        with quiet(), Image.open(io.BytesIO(raw), formats=FORMATS) as im:
            yield im
    except Unreadable as error:
        raise Unreadable(name, error.reason) from None
    except UnidentifiedImageError:
        raise Unreadable(name, _foreign(raw)) from None
    except Image.DecompressionBombError as error:  # Pillow's own limit, some 179 megapixels
        number = re.search(r"\d+", str(error))
        text = f"too large: {number.group() if number else 'too many'} pixels, allowed are {limit_pixels} in all"
        raise Unreadable(name, text) from None
    except Exception as error:  # the decoders raise some twenty kinds on damaged input
        text = re.sub(r"<[^>]*>", "the file", str(error)).strip().split("\n")[0][:160]
        raise Unreadable(name, f"damaged: {text or type(error).__name__}") from None


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a regular file; Unreadable for folders, loops, pipes, empty, closed and huge files."""
    name = os.fspath(path)
    try:
        info = os.stat(path)
        if stat.S_ISDIR(info.st_mode):
            raise Unreadable(name, "a folder, not a file")
        if not stat.S_ISREG(info.st_mode):
            raise Unreadable(name, "not a regular file (a pipe, socket or device)")
        if info.st_size == 0:
            raise Unreadable(name, "empty (0 bytes)")
        if info.st_size > LIMIT_BYTES:
            raise Unreadable(name, f"too large: {info.st_size} bytes, allowed are {LIMIT_BYTES}")
        with open(path, "rb") as stream:
            return stream.read()
    except Unreadable:
        raise
    except FileNotFoundError:
        raise Unreadable(name, "a broken link" if os.path.islink(path) else "no such file") from None
    except PermissionError:
        raise Unreadable(name, "no permission to read it") from None
    except OSError as error:
        reason = "a link that leads to itself" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise Unreadable(name, reason) from None
    except ValueError as error:  # a zero byte in the path
        raise Unreadable(name, str(error)) from None


def _foreign(raw: bytes) -> str:
    """Why these bytes were not taken for an image."""
    for sign, kind in _SIGNS.items():
        if raw.startswith(sign) and (kind != "WEBP" or raw[8:12] == b"WEBP"):
            return f"damaged: it starts as {kind}, and its header cannot be read"
    return f"no image in an allowed format ({' '.join(FORMATS)}): {_looks_like(raw)}"


def _looks_like(raw: bytes) -> str:
    start = raw[:64].lstrip().lower()
    for sign, what in _STARTS.items():
        if start.startswith(sign.lower()):
            return f"it looks like {what}"
    if raw[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1", b"ftypheix"):
        return "it looks like HEIC or AVIF; convert it to JPEG"
    if not any(raw[:64]):
        return "it holds only zeros"
    return "it looks like text" if all(9 <= byte < 127 for byte in raw[:64]) else "its first bytes are unknown"


def _check_header(im: Image.Image, limit_pixels: int) -> tuple[int, int]:
    width, height = im.size
    if width < 1 or height < 1:
        raise Unreadable("", f"damaged: {width} x {height} pixels")
    if width * height > limit_pixels:
        raise Unreadable("", f"too large: {width} x {height} pixels, allowed are {limit_pixels} in all")
    return width, height


def _orientation(im: Image.Image) -> int:
    """EXIF orientation 1..8 of a loaded image; 1 where there is none or it cannot be read."""
    try:
        turn = im.getexif().get(0x0112, 1)
    except Exception:  # damaged EXIF says nothing about the pixels
        return 1
    return turn if isinstance(turn, int) and 1 <= turn <= 8 else 1


_quiet_lock, _quiet_depth = threading.Lock(), 0
_quiet_filters = contextlib.ExitStack()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the decoders' warnings (odd metadata); counted, since warning filters are shared by threads."""
    global _quiet_depth
    with _quiet_lock:
        if _quiet_depth == 0:
            _quiet_filters.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")
        _quiet_depth += 1
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
            if _quiet_depth == 0:
                _quiet_filters.close()


# -- pixels ----------------------------------------------------------------------------------------


def to_mode(im: Image.Image, channels: int) -> Image.Image:
    """A loaded image as 8-bit "L" (1 channel) or "RGB" (3), by the policy of this file."""
    if im.mode.startswith("I;16") or im.mode in ("I", "F"):
        im = Image.fromarray(_eight_bit(np.asarray(im)))
    elif im.has_transparency_data or im.mode in ("LA", "La", "PA", "RGBa"):
        im = im.convert("RGBA")
        im = Image.alpha_composite(Image.new("RGBA", im.size, WHITE), im).convert("RGB")
    wanted = "L" if channels == 1 else "RGB"
    if im.mode == wanted:
        return im
    if im.mode not in ("1", "L", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"):
        raise Unreadable("", f"its colours are {im.mode}, which is not supported")
    return im.convert("RGB").convert(wanted) if im.mode == "P" else im.convert(wanted)


def _eight_bit(values: np.ndarray) -> UInt8[np.ndarray, "h w"]:
    if values.dtype.kind == "f":
        if not np.isfinite(values).all():
            raise Unreadable("", "damaged: it holds NaN or infinity")
        low, high = float(values.min()), float(values.max())
        if low >= 0 and high <= 255:
            return np.rint(values * (255 if high <= 1 else 1)).astype(np.uint8)
        return np.rint((values.astype(np.float64) - low) * (255 / (high - low or 1))).astype(np.uint8)
    if values.min() < 0 or values.max() > 65535:
        raise Unreadable("", "its 32-bit values leave 0..65535, which is not supported; save it as 8 or 16 bit")
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _wanted(full: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """The (width, height) that a reduced JPEG must not fall below, whichever way up it is."""
    side = int(GAP * max(size))
    return side, side


def _plan(full: tuple[int, int], size: tuple[int, int], fit: str) -> tuple[tuple[float, float], tuple[int, int]]:
    """What to cut from the centre of ``full`` and what to scale it to, all as (rows, columns)."""
    h, w = float(full[0]), float(full[1])
    rows, columns = size
    if fit == "stretch":
        return (h, w), size
    if fit == "crop":
        scale = min(h / rows, w / columns)
        return (min(h, rows * scale), min(w, columns * scale)), size
    scale = min(rows / h, columns / w)
    return (h, w), (max(1, min(rows, round(h * scale))), max(1, min(columns, round(w * scale))))


def _resize(im: Image.Image, cut: tuple[float, float], inner: tuple[int, int], turn: int) -> Image.Image:
    """Scale the central ``cut`` to ``inner`` and turn it upright; both are given as seen upright."""
    (h, w), (rows, columns) = (cut, inner) if turn < 5 else (cut[::-1], inner[::-1])
    left, top = (im.width - w) / 2, (im.height - h) / 2
    if (im.height, im.width) != (rows, columns) or (h, w) != (rows, columns):
        box = (left, top, left + w, top + h)
        im = im.resize((columns, rows), Image.Resampling.BILINEAR, box=box, reducing_gap=GAP)
    return im.transpose(_TURN[turn]) if turn > 1 else im


# -- many files ------------------------------------------------------------------------------------


def each(work: Callable[[A], B], items: Iterable[A], threads: int | None = None) -> Iterator[B]:
    """``work`` of each item, in order, by a few threads that stay a little ahead of the caller."""
    threads = threads or min(8, os.cpu_count() or 1)
    if threads == 1:
        yield from map(work, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[B]] = []
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > 4 * threads:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for job in waiting:
                job.cancel()
