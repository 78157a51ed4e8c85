"""Stores: the samples of a set, in memory, mapped from a file, or streamed from disk; all give equal tensors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from convince.data.decode import LIMIT_PIXELS, Unreadable, decode, each
from convince.data.preprocess import Preprocess
from convince.errors import Mistake


@runtime_checkable
class Store(Protocol):
    """Samples without labels. ``shape`` counts the samples first: (N, c, h, w) or (N, d)."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def nbytes(self) -> int: ...
    def __len__(self) -> int: ...
    def take(self, index: Tensor) -> Tensor:
        """The samples of these rows, in this order: uint8 [n c h w] for images, float32 [n d] for tables."""
        ...

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """One tensor for each index tensor, in order."""
        ...


class _Indexed:
    """What stores that need no prefetching share."""

    def take(self, index: Tensor) -> Tensor:
        raise NotImplementedError

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        for index in indices:
            yield self.take(index)


@final
class MemoryStore(_Indexed):
    """All samples as one tensor in memory (``.tensor``)."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.numel() * self.tensor.element_size()

    def __len__(self) -> int:
        return len(self.tensor)

    def __repr__(self) -> str:
        return f"MemoryStore(shape={self.shape}, dtype={self.dtype})"

    def take(self, index: Tensor) -> Tensor:
        return self.tensor.index_select(0, index.cpu())


@final
class MappedStore(_Indexed):
    """The first ``rows`` samples (None: all) of one ``.npy`` file, read from disk as they are asked for."""

    def __init__(self, path: str | Path, rows: int | None = None) -> None:
        self.path = Path(path)
        self._rows = np.load(self.path, mmap_mode="r", allow_pickle=False)[:rows]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._rows.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self._rows.dtype == np.uint8 else torch.float32

    @property
    def nbytes(self) -> int:
        return int(self._rows.nbytes)

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return f"MappedStore({str(self.path)!r}, shape={self.shape})"

    def take(self, index: Tensor) -> Tensor:
        return torch.from_numpy(np.array(self._rows[index.cpu().numpy()], copy=True))


@final
class StreamStore:
    """Files decoded when they are asked for, by ``workers`` processes that work ahead of the caller.

    With ``workers=0`` the threads of this process decode. Raises Mistake where a file that was
    readable before no longer is.
    """

    def __init__(self, files: Sequence[str | Path], preprocess: Preprocess, workers: int = 0, limit_pixels: int = LIMIT_PIXELS) -> None:
        self.files, self.preprocess, self.workers, self.limit_pixels = list(files), preprocess, workers, limit_pixels

    @property
    def shape(self) -> tuple[int, ...]:
        return (len(self.files), self.preprocess.channels, *self.preprocess.size)

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    def __len__(self) -> int:
        return len(self.files)

    def __repr__(self) -> str:
        return f"StreamStore({len(self)} files, shape={self.shape}, workers={self.workers})"

    def __getitem__(self, row: int) -> Tensor:
        pre = self.preprocess
        try:
            return decode(self.files[row], pre.channels, pre.size, pre.fit, self.limit_pixels)  # type: ignore[arg-type]
        except Unreadable as error:
            name = os.fspath(self.files[row])
            raise Mistake(f"{name}: was readable before and no longer is: {error.reason}; load the set again") from None

    def take(self, index: Tensor) -> Tensor:
        rows = [int(row) for row in index]
        out = torch.empty((len(rows), *self.shape[1:]), dtype=torch.uint8)
        for at, image in enumerate(each(self.__getitem__, rows)):
            out[at] = image
        return out

    def batches(self, indices: Sequence[Tensor]) -> Iterator[Tensor]:
        """One tensor for each index tensor, in order; ``workers`` processes prefetch two batches each."""
        plan = [index.tolist() for index in indices]
        if self.workers == 0 or len(plan) == 0:
            for rows in plan:
                yield self.take(torch.tensor(rows, dtype=torch.int64))
            return
        from torch.utils.data import DataLoader

        loader: DataLoader = DataLoader(
            _Batches(self, plan),
            batch_size=None,
            shuffle=False,
            num_workers=min(self.workers, len(plan)),
            prefetch_factor=2,
            multiprocessing_context=_context(),
            generator=torch.Generator().manual_seed(0),  # else the loader draws from the global state
        )
        yield from loader


class _Batches(torch.utils.data.Dataset):
    """What a worker process runs: the images of batch ``at``, one after the other."""

    def __init__(self, store: StreamStore, plan: list[list[int]]) -> None:
        self.store, self.plan = store, plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, at: int) -> Tensor:
        rows = self.plan[at]
        if not rows:
            return torch.empty((0, *self.store.shape[1:]), dtype=torch.uint8)
        return torch.stack([self.store[row] for row in rows])


def _context() -> str:
    """How worker processes start: a fork server where there is one, since forking a threaded process can hang."""
    import multiprocessing

    if "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.set_forkserver_preload(["convince.data.store"])
    return "forkserver"
