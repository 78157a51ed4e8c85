"""The cache on disk: decoded sets, found again by content and settings; a damaged file is made anew, never trusted."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from convince.errors import Mistake

VERSION = 1  # raised when what is stored, or how pixels are made, changes
KEEP_BYTES = 20 << 30  # older files go when all of the cache passes this
SPARE_BYTES = 1 << 30  # left free on the disk
_WHOLE = 2 << 30  # files up to this are checked from end to end, longer ones at both ends


def cache_folder(cache: Path | str | None = None) -> Path:
    """``cache``, or ``convince`` in the user's cache folder ($XDG_CACHE_HOME or ~/.cache)."""
    if cache is not None:
        path = Path(cache).expanduser()
        if path.exists() and not path.is_dir():
            raise Mistake(f"cache={os.fspath(path)!r} is a file; name a folder")
        return path
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "convince"


def cache_key(*words: Any) -> str:
    """A name for what these words describe; other library versions that make pixels get other names."""
    import PIL

    text = json.dumps([VERSION, PIL.__version__, *words], sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def room_on_disk(folder: Path, size: int) -> bool:
    """Whether ``size`` bytes fit beside what must stay free; False where the folder cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > size + SPARE_BYTES
    except OSError:
        return False


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that takes its place, flushed, when the block ends without error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=path.name + ".", suffix=".part", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as stream:
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def store_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write named arrays to one ``.npz`` file, whole or not at all; a full or closed disk is no error."""
    with contextlib.suppress(OSError), replacing(path) as temporary, open(temporary, "wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """What :func:`store_arrays` wrote, or None where there is nothing or it is damaged (zip checks sums)."""
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in arrays.files}
        os.utime(path)
        return found
    except Exception:  # a damaged zip raises nearly anything; whatever it is, the file is made anew
        return None


def remembered(path: Path, build: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The arrays in ``path``, or those that ``build`` makes, which are stored there."""
    found = load_arrays(path)
    if found is None:
        found = build()
        if room_on_disk(path.parent, sum(array.nbytes for array in found.values())):
            store_arrays(path, found)
    return found


def checksum(path: Path) -> int:
    """CRC-32 of a file's length and content; of its first and last 64 MiB where it passes 2 GiB."""
    size, step = path.stat().st_size, 1 << 24
    total = zlib.crc32(str(size).encode())
    spans = [(0, size)] if size <= _WHOLE else [(0, step * 4), (size - step * 4, size)]
    with open(path, "rb") as stream:
        for start, end in spans:
            stream.seek(start)
            while start < end:
                block = stream.read(min(step, end - start))
                if not block:
                    break
                total = zlib.crc32(block, total)
                start += len(block)
    return total


def trim(folder: Path, keep: int = KEEP_BYTES) -> None:
    """Remove the files used longest ago until ``keep`` bytes are left, and what broken runs left behind."""
    rows = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):
                info = entry.stat()
                if entry.name.endswith(".part") and time.time() - info.st_mtime > 86_400:
                    os.unlink(entry.path)
                elif entry.name.endswith((".npy", ".npz")):
                    rows.append((info.st_mtime, info.st_size, entry.path))
    total = sum(size for _, size, _ in rows)
    for _, size, path in sorted(rows):
        if total <= keep:
            return
        with contextlib.suppress(OSError):
            os.unlink(path)
            total -= size
