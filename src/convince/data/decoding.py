"""Decoding whole sets: where the pixels go (memory, a mapped file, nowhere), with the cache before it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from convince.data import cache as disk
from convince.data.decode import LIMIT_PIXELS, Unreadable, decode, each, look
from convince.data.duplicates import WIDTH, row_hashes
from convince.data.found import shown
from convince.data.pool import Skipped
from convince.data.preprocess import Preprocess, choose_size, pixel_sums
from convince.data.store import MappedStore, MemoryStore, Store, StreamStore
from convince.errors import Mistake

GROUP = 16  # files that one thread decodes together
SURVEY = 256  # files looked at to choose channels and size

Progress = Callable[[int, int], None]


@dataclass
class Decoded:
    """A decoded set: the store, which of the files it holds, and what was learnt on the way."""

    store: Store
    rows: np.ndarray  # int64 [n], places in the list of files
    reasons: dict[int, str]  # place of each skipped file -> why
    sums: Tensor  # int64 [n c 2]
    hashes: np.ndarray  # uint8 [n 16]


def stamps(files: Sequence[Path]) -> list[tuple[str, int, int, int]]:
    """Path, size and times of each file: equal stamps stand for equal content."""
    rows = []
    for path in files:
        try:
            info = os.stat(path)
            rows.append((os.path.abspath(path), info.st_size, info.st_mtime_ns, info.st_ctime_ns))
        except (OSError, ValueError):
            rows.append((os.path.abspath(path), -1, 0, 0))
    return rows


def survey(files: Sequence[Path], limit_pixels: int, folder: Path, key: str) -> tuple[int, tuple[int, int]]:
    """Channels and size for a set: 256 files, evenly spaced, are decoded at low resolution.

    One channel where every one of them is grey (by content: equal channels), else three. The size is
    :func:`choose_size` of theirs. Unreadable ones say nothing; a Mistake where none can be read.
    """

    def build() -> dict[str, np.ndarray]:
        rows = _survey(files, limit_pixels)
        return {"rows": np.array([(h, w, grey) for (h, w), grey in rows], np.int64).reshape(-1, 3)}

    rows = disk.remembered(folder / f"survey-{disk.cache_key('survey', key, limit_pixels)}.npz", build)["rows"]
    if not len(rows):
        raise Mistake("none of the files can be read as an image")
    return (1 if rows[:, 2].all() else 3), choose_size([(int(h), int(w)) for h, w, _ in rows])


def _survey(files: Sequence[Path], limit_pixels: int) -> list[tuple[tuple[int, int], bool]]:
    places = np.unique(np.linspace(0, len(files) - 1, min(SURVEY, len(files))).astype(int))
    seen = [row for row in each(lambda at: _look(files[at], limit_pixels), places.tolist()) if row is not None]
    if not seen and len(places) < len(files):  # rarely: all of the sample is damaged
        seen = [row for row in each(lambda path: _look(path, limit_pixels), files) if row is not None]
    return seen


def _look(path: Path, limit_pixels: int) -> tuple[tuple[int, int], bool] | None:
    try:
        return look(path, limit_pixels)
    except Unreadable:
        return None


def decode_set(
    files: Sequence[Path],
    pre: Preprocess,
    *,
    key: str,
    folder: Path,
    limit_pixels: int,
    workers: int,
    memory_bytes: int,
    disk_bytes: int | None,
    progress: Progress | None,
) -> Decoded:
    """Every readable file at ``pre``'s channels, size and fit.

    In memory where they fit in ``memory_bytes``; else in a mapped file of the cache where they fit in
    ``disk_bytes`` (None: what is free, less 1 GiB); else streamed, after one pass that checks each file.
    """
    need = len(files) * pre.channels * pre.size[0] * pre.size[1]  # type: ignore[misc]
    base = folder / f"set-{disk.cache_key('set', key, pre.channels, list(pre.size), pre.fit, limit_pixels)}"
    storable = disk.room_on_disk(folder, need) and (disk_bytes is None or need <= disk_bytes)
    in_memory = need <= memory_bytes
    stored = _stored(base, in_memory) if in_memory or storable else _stored_pass(base, files, pre, limit_pixels, workers)
    if stored is not None:
        if progress is not None:
            progress(len(files), len(files))
        return stored
    if in_memory:
        made = _to_memory(files, pre, limit_pixels, progress)
    elif storable:
        made = _to_file(base, files, pre, limit_pixels, progress)
    else:
        made = _to_nowhere(files, pre, limit_pixels, workers, progress)
    if storable or isinstance(made.store, StreamStore):
        _keep(base, made)
        disk.trim(folder)
    return made


# -- the pass over all files -----------------------------------------------------------------------

Piece = tuple[list[int], Tensor, dict[int, str], Tensor, np.ndarray]


def _pieces(files: Sequence[Path], pre: Preprocess, limit_pixels: int, progress: Progress | None) -> Iterator[Piece]:
    """Groups of files in order: places that worked, their pixels, reasons of those that did not, sums, hashes."""

    def work(start: int) -> Piece:
        good, images, reasons = [], [], {}
        for place in range(start, min(start + GROUP, len(files))):
            try:
                images.append(decode(files[place], pre.channels, pre.size, pre.fit, limit_pixels))  # type: ignore[arg-type]
                good.append(place)
            except Unreadable as error:
                reasons[place] = error.reason
        x = torch.stack(images) if images else torch.empty((0, pre.channels, *pre.size), dtype=torch.uint8)
        return good, x, reasons, pixel_sums(x), row_hashes(x)

    done = 0
    for piece in each(work, range(0, len(files), GROUP)):
        yield piece
        done += len(piece[0]) + len(piece[2])
        if progress is not None:
            progress(done, len(files))


class _Ledger:
    """What is known of the rows so far."""

    def __init__(self) -> None:
        self.rows: list[int] = []
        self.reasons: dict[int, str] = {}
        self.sums: list[Tensor] = []
        self.hashes: list[np.ndarray] = []

    def add(self, piece: Piece) -> slice:
        """Take down a piece; where its images stand among all that worked."""
        start = len(self.rows)
        self.rows += piece[0]
        self.reasons |= piece[2]
        self.sums.append(piece[3])
        self.hashes.append(piece[4])
        return slice(start, len(self.rows))

    def close(self, store: Store, channels: int) -> Decoded:
        sums = torch.cat(self.sums) if self.sums else torch.zeros((0, channels, 2), dtype=torch.int64)
        hashes = np.concatenate(self.hashes) if self.hashes else np.zeros((0, WIDTH), np.uint8)
        return Decoded(store, np.array(self.rows, np.int64), self.reasons, sums, hashes)


def _to_memory(files: Sequence[Path], pre: Preprocess, limit_pixels: int, progress: Progress | None) -> Decoded:
    x = torch.empty((len(files), pre.channels, *pre.size), dtype=torch.uint8)
    ledger = _Ledger()
    for piece in _pieces(files, pre, limit_pixels, progress):
        x[ledger.add(piece)] = piece[1]
    n = len(ledger.rows)
    return ledger.close(MemoryStore(x if n == len(x) else x[:n].clone()), pre.channels)


def _to_file(base: Path, files: Sequence[Path], pre: Preprocess, limit_pixels: int, progress: Progress | None) -> Decoded:
    ledger, path = _Ledger(), base.with_suffix(".npy")
    with disk.replacing(path) as temporary:
        shape = (len(files), pre.channels, *pre.size)
        x = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.uint8, shape=shape)
        for piece in _pieces(files, pre, limit_pixels, progress):
            x[ledger.add(piece)] = piece[1].numpy()
        x.flush()
        del x
    return ledger.close(MappedStore(path, len(ledger.rows)), pre.channels)


def _to_nowhere(files: Sequence[Path], pre: Preprocess, limit_pixels: int, workers: int, progress: Progress | None) -> Decoded:
    ledger = _Ledger()
    for piece in _pieces(files, pre, limit_pixels, progress):
        ledger.add(piece)
    store = StreamStore([files[row] for row in ledger.rows], pre, workers, limit_pixels)
    return ledger.close(store, pre.channels)


# -- the cache -------------------------------------------------------------------------------------


def _keep(base: Path, made: Decoded) -> None:
    """Store the pixels (unless streamed) and then, as the sign that they are whole, what is known of them."""
    path, check = base.with_suffix(".npy"), -1
    try:
        if isinstance(made.store, MemoryStore):
            with disk.replacing(path) as temporary, open(temporary, "wb") as stream:
                np.save(stream, made.store.tensor.numpy(), allow_pickle=False)
        if not isinstance(made.store, StreamStore):
            check = disk.checksum(path)
    except OSError:  # a full disk: the next run decodes again
        return
    disk.store_arrays(_ledger_path(base, check < 0), {
        "rows": made.rows,
        "reasons": np.frombuffer(json.dumps(made.reasons).encode(), np.uint8),
        "sums": made.sums.numpy(),
        "hashes": made.hashes,
        "check": np.array(check),
    })  # fmt: skip


def _ledger_path(base: Path, stream: bool) -> Path:
    return base.with_name(base.name + ("-stream" if stream else "") + ".npz")


def _read_ledger(path: Path) -> tuple[dict[str, np.ndarray], dict[int, str]] | None:
    found = disk.load_arrays(path)
    try:
        if found is None:
            return None
        reasons = {int(row): str(why) for row, why in json.loads(found["reasons"].tobytes()).items()}
        sound = len(found["rows"]) == len(found["sums"]) == len(found["hashes"]) and "check" in found
        return (found, reasons) if sound else None
    except (KeyError, ValueError, AttributeError):
        return None


def _stored(base: Path, in_memory: bool) -> Decoded | None:
    """The set as it was decoded before, or None where nothing is stored or its checksum is wrong."""
    ledger, path = _read_ledger(_ledger_path(base, False)), base.with_suffix(".npy")
    if ledger is None:
        return None
    found, reasons = ledger
    n = len(found["rows"])
    try:
        if disk.checksum(path) != int(found["check"]):
            return None
        if in_memory:
            store: Store = MemoryStore(torch.from_numpy(np.load(path, allow_pickle=False)[:n]))
        else:
            store = MappedStore(path, n)
        os.utime(path)
    except (OSError, ValueError):
        return None
    return Decoded(store, found["rows"], reasons, torch.from_numpy(found["sums"]), found["hashes"])


def _stored_pass(base: Path, files: Sequence[Path], pre: Preprocess, limit_pixels: int, workers: int) -> Decoded | None:
    ledger = _read_ledger(_ledger_path(base, True))
    if ledger is None:
        return None
    found, reasons = ledger
    store = StreamStore([files[row] for row in found["rows"]], pre, workers, limit_pixels)
    return Decoded(store, found["rows"], reasons, torch.from_numpy(found["sums"]), found["hashes"])


def read_files(files: Sequence[str | Path], preprocess: Preprocess) -> tuple[Tensor, list[str], list[Skipped]]:
    """Files for prediction, decoded with the stored preprocessing: uint8 [n c h w], their names, the skipped.

    Names are the paths as given, in the order given; a file that cannot be read is skipped with its reason.
    """
    if preprocess.kind != "image":
        raise Mistake("this run was trained on a table; give an array or DataFrame [N d] instead of image files")
    if isinstance(files, (str, Path)):
        files = [files]
    pieces = list(_pieces([Path(file) for file in files], preprocess, LIMIT_PIXELS, None))
    ledger = _Ledger()
    for piece in pieces:
        ledger.add(piece)
    empty = torch.empty((0, preprocess.channels, *preprocess.size), dtype=torch.uint8)
    x = torch.cat([empty, *(piece[1] for piece in pieces)])
    names = [shown(os.fspath(file)) for file in files]
    skipped = [Skipped(names[row], why) for row, why in sorted(ledger.reasons.items())]
    return x, [names[row] for row in ledger.rows], skipped
