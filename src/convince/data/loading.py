"""Loading: from whatever a person points at to one :class:`Data`, with each mistake named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convince.data.cache import cache_folder, cache_key
from convince.data.decode import LIMIT_PIXELS, each, refit
from convince.data.decoding import Decoded, decode_set, stamps, survey
from convince.data.found import Found
from convince.data.pool import Data, Skipped
from convince.data.preprocess import Preprocess, check_fit, check_size
from convince.data.settle import onto, part_rows, settle
from convince.data.sources import find
from convince.data.split import check_parts
from convince.data.store import MemoryStore
from convince.errors import Mistake
from convince.types import Split

Progress = Callable[[int, int], None]


def load(
    source: Any,
    y: Any = None,
    *,
    size: int | None = None,
    fit: str = "letterbox",
    val: float = 0.1,
    test: float = 0.2,
    seed: int = 0,
    strict: bool = False,
    group: str | Tensor | Any = None,
    workers: int = 0,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    cache: Path | str | None = None,
    allow_one_class: bool = False,
    unlabelled: bool = False,
    limit_pixels: int = LIMIT_PIXELS,
    progress: Progress | None = None,
) -> Data:
    """Read a labelled set.

    ``source``: a folder of class folders; a CSV, TSV or Parquet table; an ``.npz`` file; a folder of idx files; a
    built-in name (digits, mnist, fashion-mnist, cifar10); arrays or a DataFrame with ``y``; a mapping
    of arrays; a map-style torch Dataset.

    ``size``: side of the square input [pixels]; None keeps arrays as they are and chooses for files, see
    :func:`~convince.data.preprocess.choose_size`. ``fit``: "letterbox", "crop" or "stretch".
    ``val``, ``test``: shares of all samples, cut by classes with ``seed``; a split that comes with the data
    is kept, and what it lacks of val and test is cut from its train. ``group``: what must stay on one side
    of the split (a column's name, one value a sample, or for folders a regular expression). ``strict``:
    the first unreadable file is an error that lists all. ``workers``: processes that a streamed set
    decodes with. ``memory_bytes``: what decoded images may take in memory (None: a quarter of what is
    available); ``disk_bytes``: in the cache (None: what is free less 1 GiB). ``cache``: its folder.
    ``limit_pixels``: larger images are refused before they are decoded. ``unlabelled``: no labels are needed; images may
    also stand directly in a folder. ``progress``: called with
    (files done, files in all). Raises Mistake, naming the file, the rule, the value and the remedy.
    """
    check_fit(fit)
    check_size(size)
    check_parts(val, test)
    _check_numbers(workers=workers, memory_bytes=memory_bytes, disk_bytes=disk_bytes, limit_pixels=limit_pixels)
    folder = cache_folder(cache)
    found = find(source, y, group=group, size=size, fit=fit, cache=folder, flat=unlabelled)
    if group is not None and found.groups is None:
        raise Mistake(f"{found.origin}: group is for folders, tables and arrays x, y; this source has no groups to go by")
    made, pre, found = _samples(found, size, fit, None, folder, strict, workers, memory_bytes, disk_bytes, limit_pixels, progress)
    found = settle(found, allow_one_class or unlabelled, cut=val > 0 or test > 0)
    if unlabelled and not found.classes:
        found = replace(found, classes=("unlabelled",))  # a head needs a width; it is left as drawn
    split = part_rows(found, val, test, seed)
    return _data(found, made, pre, split, shares=(val, test)).measured()


def load_like(
    source: Any,
    y: Any = None,
    *,
    preprocess: Preprocess,
    classes: Sequence[str],
    strict: bool = False,
    workers: int = 0,
    memory_bytes: int | None = None,
    disk_bytes: int | None = None,
    cache: Path | str | None = None,
    limit_pixels: int = LIMIT_PIXELS,
    progress: Progress | None = None,
) -> Data:
    """Read a labelled set for a trained model: its preprocessing and its classes, nothing measured anew.

    Without a split of its own all of the set is the test part. One class, or one image a class, will do.
    Raises Mistake for a label that is not among ``classes``.
    """
    folder = cache_folder(cache)
    size = preprocess.size or None
    found = find(source, y, group=None, size=size[0] if size else None, fit=preprocess.fit or "letterbox", cache=folder)
    made, pre, found = _samples(
        found,
        None,
        preprocess.fit,
        preprocess,
        folder,
        strict,
        workers,
        memory_bytes,
        disk_bytes,
        limit_pixels,
        progress,
    )
    found = onto(found, tuple(classes))
    parts = found.parts if found.parts is not None else np.full(len(found), 2, np.int8)
    split = Split(*(torch.from_numpy(np.flatnonzero(parts == part)) for part in range(3)))
    done = _data(found, made, pre, split, shares=(0.0, 0.0)).measured()
    return replace(done, preprocess=preprocess)


# -- samples ---------------------------------------------------------------------------------------


def _samples(
    found: Found,
    size: int | None,
    fit: str,
    stored: Preprocess | None,
    folder: Path,
    strict: bool,
    workers: int,
    memory_bytes: int | None,
    disk_bytes: int | None,
    limit_pixels: int,
    progress: Progress | None,
) -> tuple[Decoded | None, Preprocess, Found]:
    """Decode files, or fit arrays to their size; the preprocessing that was chosen or stored."""
    if found.x is not None:
        x, pre = _array_samples(found.x, size, fit, stored, found.origin)
        return None, pre, replace(found, x=x)
    files = found.files or []
    if strict and found.skipped:
        raise _strict(found.origin, found.skipped)
    key = cache_key("files", stamps(files))
    if stored is not None:
        if stored.kind != "image":
            raise Mistake(f"{found.origin}: the model was trained on a table and these are image files")
        pre = stored
    else:
        try:
            channels, chosen = survey(files, limit_pixels, folder, key)
        except Mistake:
            raise _none_readable(found, limit_pixels) from None
        pre = Preprocess("image", channels, (size, size) if size else chosen, fit, (), ())
    made = decode_set(
        files,
        pre,
        key=key,
        folder=folder,
        limit_pixels=limit_pixels,
        workers=workers,
        memory_bytes=_memory() if memory_bytes is None else memory_bytes,
        disk_bytes=disk_bytes,
        progress=progress,
    )
    names = found.names or []
    skipped = [Skipped(names[row], why) for row, why in sorted(made.reasons.items())]
    if strict and skipped:
        raise _strict(found.origin, skipped)
    if not len(made.rows):
        raise _none_readable(found, limit_pixels)
    kept = found.keep(made.rows)
    return made, pre, replace(kept, skipped=[*found.skipped, *skipped])


def _array_samples(x: Tensor, size: int | None, fit: str, stored: Preprocess | None, origin: str) -> tuple[Tensor, Preprocess]:
    if x.ndim == 2:
        pre = stored or Preprocess("table", x.shape[1], (), "", (), ())
        if pre.kind != "table" or pre.channels != x.shape[1]:
            want = f"{pre.channels} features" if pre.kind == "table" else "images"
            raise Mistake(f"{origin}: a table with {x.shape[1]} features, and the model was trained on {want}")
        return x, pre
    native = (int(x.shape[2]), int(x.shape[3]))
    pre = stored or Preprocess("image", x.shape[1], (size, size) if size else native, fit, (), ())
    if pre.kind != "image":
        raise Mistake(f"{origin}: images, and the model was trained on a table with {pre.channels} features")
    if pre.channels != x.shape[1] and stored is not None:
        x = x.expand(-1, 3, -1, -1) if pre.channels == 3 else _luma(x)
    if native != pre.size:
        rows = each(lambda row: refit(x[row].permute(1, 2, 0).numpy(), pre.size, pre.fit), range(len(x)))  # type: ignore[arg-type]
        x = torch.stack(list(rows))
    return x.contiguous(), pre


def _luma(x: Tensor) -> Tensor:
    """Grey from colour as the decoder does it (ITU-R 601, in 16-bit fixed point)."""
    wide = x.to(torch.int64)
    return ((wide[:, :1] * 19595 + wide[:, 1:2] * 38470 + wide[:, 2:3] * 7471 + 0x8000) >> 16).to(torch.uint8)


def _strict(origin: str, skipped: Sequence[Skipped]) -> Mistake:
    lines = "".join(f"\n  {row.file}: {row.reason}" for row in skipped)
    return Mistake(f"{origin}: {len(skipped)} file(s) cannot be used and strict is on:{lines}\nRemove or mend them")


def _none_readable(found: Found, limit_pixels: int) -> Mistake:
    from convince.data.decode import Unreadable, look

    files = found.files or []
    try:
        look(files[0], limit_pixels)
        reason = "unknown"
    except Unreadable as error:
        reason = f"{(found.names or [''])[0]}: {error.reason}"
    except IndexError:
        reason = f"{found.skipped[0].file}: {found.skipped[0].reason}" if found.skipped else "the table lists none"
    return Mistake(f"{found.origin}: none of its {len(files)} files can be read as an image; the first is {reason}")


def _memory() -> int:
    """A quarter of the memory that is available now [bytes], respecting the limit of a container."""
    available = 8 << 30
    try:
        with open("/proc/meminfo", encoding="ascii") as stream:
            available = next(int(line.split()[1]) * 1024 for line in stream if line.startswith("MemAvailable"))
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as stream:
            available = min(available, int(stream.read()))
    except (OSError, ValueError, StopIteration):
        pass
    return available // 4


def _check_numbers(**numbers: int | None) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or int(value) != value or value < 0):
            raise Mistake(f"{name}={value!r} must be a whole number, 0 or more")


def _data(found: Found, made: Decoded | None, pre: Preprocess, split: Split, shares: tuple[float, float]) -> Data:
    store = made.store if made is not None else MemoryStore(found.x)  # type: ignore[arg-type]
    return Data(
        x=store,
        y=torch.from_numpy(found.y),
        split=split,
        classes=found.classes,
        preprocess=pre,
        names=None if found.names is None else tuple(found.names),
        groups=None if found.groups is None else torch.from_numpy(found.groups),
        extra=found.extra,
        skipped=found.skipped,
        origin=found.origin,
        given_split=found.parts is not None,
        shares=shares,
        sums=None if made is None else made.sums,
        hashes=None if made is None else made.hashes,
    )
