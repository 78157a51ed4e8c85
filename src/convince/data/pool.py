"""Data: one set of samples with labels, a split, and what is needed to read a new file the same way."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from convince.data import duplicates as same
from convince.data.preprocess import Preprocess, pixel_sums, with_features, with_pixels
from convince.data.split import draw
from convince.data.store import MappedStore, MemoryStore, Store, StreamStore
from convince.errors import Mistake
from convince.types import Split

CHUNK = 1024  # rows looked at together
_KINDS = {MemoryStore: "memory", MappedStore: "mapped", StreamStore: "stream"}


@dataclass(frozen=True)
class Skipped:
    """A file that was not used, and why."""

    file: str
    reason: str


@dataclass
class Data:
    """Samples, labels and split. ``load`` makes it; the later fields have defaults for those made by hand.

    ``y``: int64 [N], -1 unlabelled (always in train). ``names``: file names relative to the source, or None.
    ``groups``: int64 [N] or None. ``extra``: tensors with N rows. ``duplicates``: (train, val or test) names
    of exact copies across the split; a row of an array is called ``row 17``. ``digest``: sha256 of
    content, labels, split and settings. ``given_split``: the test part came with the data.
    ``sums``, ``hashes``: per-row sums and content hashes; worked out when first needed.
    """

    x: Store
    y: Int[Tensor, " N"]
    split: Split
    classes: tuple[str, ...]
    preprocess: Preprocess
    names: tuple[str, ...] | None = None
    groups: Int[Tensor, " N"] | None = None
    extra: dict[str, Tensor] = field(default_factory=dict)
    skipped: list[Skipped] = field(default_factory=list)
    duplicates: list[tuple[str, str]] = field(default_factory=list)
    origin: str = ""
    digest: str = ""
    given_split: bool = False
    shares: tuple[float, float] = (0.1, 0.2)  # val and test, of all rows
    sums: Tensor | None = field(default=None, repr=False)
    hashes: np.ndarray | None = field(default=None, repr=False)

    @property
    def k(self) -> int:
        """The number of classes."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.y)

    def name(self, row: int) -> str:
        """What to call a row: its file name, or ``row 17``."""
        return self.names[row] if self.names is not None else f"row {row}"

    def resplit(self, seed: int) -> Data:
        """The same samples with a new stratified split; where the split was given, test stays as it was.

        The mean, the deviation, the duplicates and the digest follow the new training part. With
        groups, whole groups move.
        """
        if not self.given_split:
            split = draw(self.y, val=self.shares[0], test=self.shares[1], seed=seed, groups=self.groups)
            return self._with(split)
        rows = torch.cat([self.split.train, self.split.val]).sort().values
        share = len(self.split.val) / max(1, len(rows))
        split = draw(self.y, val=share, test=0.0, seed=seed, groups=self.groups, rows=rows)
        return self._with(Split(split.train, split.val, self.split.test))

    def subset(self, train: Int[Tensor, " m"]) -> Data:
        """The same samples with other training rows; val and test stay.

        Raises Mistake where a row is out of range, doubled, or stands in val or test.
        """
        train = torch.as_tensor(train, dtype=torch.int64).cpu()
        if train.ndim != 1 or len(train) == 0:
            raise Mistake(f"subset: train must be row numbers [m] with m >= 1; it has shape {tuple(train.shape)}")
        if train.min() < 0 or train.max() >= len(self):
            span = f"{int(train.min())}..{int(train.max())}"
            raise Mistake(f"subset: rows must lie in 0..{len(self) - 1}; they span {span}")
        if len(train.unique()) != len(train):
            raise Mistake("subset: a row is named twice; name each training row once")
        held = torch.cat([self.split.val, self.split.test])
        if torch.isin(train, held).any():
            raise Mistake("subset: rows of val or test cannot be trained on; choose among split.train")
        return self._with(Split(train, self.split.val, self.split.test))

    def float_batch(self, x: Tensor) -> Tensor:
        """uint8 pixels as float32 in [0, 1]; tables unchanged."""
        return x.to(torch.float32).div_(255) if x.dtype == torch.uint8 else x

    def summary(self) -> dict[str, Any]:
        """What the set is, as JSON: counts of parts and classes, skipped files, duplicates, preprocessing."""
        pre = self.preprocess
        return {
            "origin": self.origin,
            "digest": self.digest,
            "kind": pre.kind,
            "n": {part: len(self.split[part]) for part in ("train", "val", "test")},
            "unlabelled": int((self.y < 0).sum()),
            "classes": list(self.classes),
            "counts": {part: self._counts(self.split[part]) for part in ("train", "val", "test")},
            "given_split": self.given_split,
            "groups": None if self.groups is None else len(self.groups.unique()),
            "skipped": [{"file": row.file, "reason": row.reason} for row in self.skipped],
            "duplicates": [list(pair) for pair in self.duplicates],
            "channels": pre.channels,
            "size": list(pre.size),
            "fit": pre.fit,
            "mean": list(pre.mean),
            "std": list(pre.std),
            "store": _KINDS.get(type(self.x), type(self.x).__name__),
            "bytes": self.x.nbytes,
        }

    def _counts(self, rows: Tensor) -> dict[str, int]:
        y = self.y[rows]
        counts = torch.bincount(y[y >= 0], minlength=self.k).tolist()
        return dict(zip(self.classes, counts, strict=True))

    def _with(self, split: Split) -> Data:
        return replace(self, split=split).measured()

    def measured(self) -> Data:
        """Itself with mean, deviation, duplicates and digest of the present split."""
        if self.preprocess.kind == "image":
            known = self.sums if self.sums is not None else torch.cat([pixel_sums(x) for x in self._chunks()])
            sums: Tensor | None = known
            pre = with_pixels(self.preprocess, known[self.split.train])
        else:
            sums, pre = self.sums, with_features(self.preprocess, self.x.take(self.split.train))
        hashes = self.hashes
        if hashes is None:
            hashes = np.concatenate([same.row_hashes(x) for x in self._chunks()])
        pairs = [(self.name(a), self.name(b)) for a, b in same.across(hashes, self.split)]
        done = replace(self, preprocess=pre, sums=sums, hashes=hashes, duplicates=pairs)
        done.digest = _digest(done, hashes)
        return done

    def _chunks(self) -> Any:
        return self.x.batches(torch.arange(len(self.x)).split(CHUNK))


def _digest(data: Data, hashes: np.ndarray) -> str:
    pre = data.preprocess
    head = [pre.kind, pre.channels, list(pre.size), pre.fit, list(data.classes), data.given_split]
    total = hashlib.sha256(json.dumps(head).encode())
    tensors = [data.y, data.split.train, data.split.val, data.split.test]
    tensors += [data.groups] if data.groups is not None else []
    for tensor in [*tensors, *(data.extra[name] for name in sorted(data.extra))]:
        total.update(str(tuple(tensor.shape)).encode() + np.ascontiguousarray(tensor.numpy()).tobytes())
    total.update(hashes.tobytes())
    return total.hexdigest()
