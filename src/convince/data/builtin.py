"""Built-in sets: digits, which scikit-learn carries, and the well-known ones read from $CONVINCE_DATA."""

from __future__ import annotations

import gzip
import importlib.util
import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from convince.data.arrays import from_mapping
from convince.data.cache import cache_key, remembered
from convince.data.found import Found
from convince.errors import Mistake

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
BUILTIN = ("digits", "mnist", "fashion-mnist", "cifar10")
_IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_IDX_TYPES = {8: ">u1", 9: ">i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
_WANTED = {
    "mnist": "the four files " + ", ".join(f"{name}.gz" for name in _IDX),
    "fashion-mnist": "the four files " + ", ".join(f"{name}.gz" for name in _IDX),
    "cifar10": "one .npz file with uint8 arrays train_x, test_x [N 32 32 3], train_y, test_y [N] and classes",
}


def from_builtin(name: str, cache: Path) -> Found:
    """The built-in set of this name; a Mistake that says which files to put where if it is missing."""
    if name == "digits":
        return _digits()
    root = os.environ.get("CONVINCE_DATA")
    folder = Path(root).expanduser() / name if root else None
    if folder is None or not folder.is_dir():
        place = f"{folder} is no folder" if folder else "the environment variable CONVINCE_DATA is not set"
        raise Mistake(f"{name}: {place}. Set CONVINCE_DATA to a folder and put into its subfolder {name!r} {_WANTED[name]}. 'digits' needs no files")
    if name == "cifar10":
        files = sorted(folder.glob("*.npz"))
        if not files:
            raise Mistake(f"cifar10: {folder} holds no .npz file; put there {_WANTED[name]}")
        return from_npz(files[0], name, cache)
    return from_idx(folder, name, FASHION if name == "fashion-mnist" else None)


def _digits() -> Found:
    """1,797 scanned digits, 8 x 8 grey; 0..16 becomes round(v * 255 / 16). Read from scikit-learn's file: importing it takes seconds."""
    home = importlib.util.find_spec("sklearn")
    assert home is not None
    assert home.origin is not None
    rows = np.loadtxt(Path(home.origin).parent / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    pixels = np.rint(rows[:, :64] * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    classes = tuple(str(digit) for digit in range(10))
    return Found("digits", rows[:, 64].astype(np.int64), classes, x=torch.from_numpy(pixels), fixed=True)


def from_npz(path: Path, origin: str, cache: Path, group: Any = None) -> Found:
    """Arrays in an ``.npz`` file. Compressed ones above 16 MB are kept unpacked in the cache for the next time."""
    try:
        info = path.stat()
        if info.st_size > 16 << 20:
            key = cache_key("npz", str(path.resolve()), info.st_size, info.st_mtime_ns, info.st_ctime_ns)
            arrays = remembered(cache / f"npz-{key}.npz", lambda: _read_npz(path))
        else:
            arrays = _read_npz(path)
    except PermissionError:
        raise Mistake(f"{path}: no permission to read it; change its mode or owner") from None
    return from_mapping(arrays, origin, group)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except PermissionError:
        raise
    except ValueError as error:
        if "pickle" in str(error):
            raise Mistake(
                f"{path}: holds Python objects, which are not read (they can run code); save plain arrays: numbers, or words as fixed-width text"
            ) from None
        raise Mistake(f"{path}: not a readable .npz file ({error}); write it with numpy.savez") from None
    except Exception as error:  # damaged zips raise many kinds
        raise Mistake(f"{path}: not a readable .npz file ({error}); write it with numpy.savez") from None


def is_idx(folder: Path) -> bool:
    """Whether the folder holds MNIST-style training images."""
    return _idx_file(folder, _IDX[0]) is not None


def _idx_file(folder: Path, name: str) -> Path | None:
    for spelled in (name, name.replace("-idx", ".idx")):
        for path in (folder / f"{spelled}.gz", folder / spelled):
            if path.is_file():
                return path
    return None


def from_idx(folder: Path, origin: str, classes: tuple[str, ...] | None = None) -> Found:
    """MNIST-style idx files, packed with gzip or not, with their own train and test parts."""
    paths = [_idx_file(folder, name) for name in _IDX]
    if paths[0] is None or paths[1] is None:
        missing = ", ".join(f"{name}.gz" for name, path in zip(_IDX, paths, strict=True) if path is None)
        raise Mistake(f"{origin}: {folder} lacks {missing}")
    keys = ("train_x", "train_y", "test_x", "test_y")
    arrays: dict[str, Any] = {k: read_idx(path) for k, path in zip(keys, paths, strict=True) if path is not None}
    found = from_mapping(arrays, origin)
    if classes is not None and len(found.classes) == len(classes):
        found.classes, found.fixed = classes, True
    return found


def read_idx(path: Path) -> np.ndarray:
    """One idx file as an array; a Mistake where its header and its length disagree."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise Mistake(f"{path}: cannot be read ({error}); fetch it again") from None
    kind = _IDX_TYPES.get(raw[2]) if len(raw) >= 4 and raw[:2] == b"\0\0" else None
    if kind is None or len(raw) < 4 + 4 * raw[3]:
        raise Mistake(f"{path}: not an idx file; its first bytes are {raw[:4].hex(' ') or 'missing'}")
    shape = tuple(int(side) for side in np.frombuffer(raw, ">i4", raw[3], 4))
    body = raw[4 + 4 * raw[3] :]
    if len(body) != int(np.prod(shape, dtype=np.int64)) * np.dtype(kind).itemsize:
        raise Mistake(f"{path}: holds {len(body)} bytes after its header, which promises shape {shape}; fetch it again")
    return np.frombuffer(body, kind).reshape(shape).astype(np.dtype(kind).newbyteorder("="))
