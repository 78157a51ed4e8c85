"""Stores and the cache: memory, mapped and streamed sets are equal; damaged caches are made anew."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from convince.data import Data, MappedStore, MemoryStore, Store, StreamStore, load
from convince.data.cache import trim
from convince.data.preprocess import pixel_sums
from convince.data.split import draw
from convince.errors import Mistake

Write = Callable[..., Path]


def streamed(photos: Path, workers: int = 0) -> Data:
    return load(photos, size=24, memory_bytes=0, disk_bytes=0, workers=workers)


def test_three_stores_are_equal(photos: Path) -> None:
    (photos / "cat" / "bad.png").write_bytes(b"no")
    (photos / "cat" / "5b.png").write_bytes(b"")
    memory, mapped, stream = load(photos, size=24), load(photos, size=24, memory_bytes=0), streamed(photos)
    assert [type(data.x) for data in (memory, mapped, stream)] == [MemoryStore, MappedStore, StreamStore]
    index = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    for other in (mapped, stream):
        assert isinstance(other.x, Store)
        assert other.x.shape == (30, 3, 24, 24) == memory.x.shape
        assert other.x.nbytes == 30 * 3 * 24 * 24
        assert other.x.dtype == torch.uint8
        assert len(other.x) == 30
        assert torch.equal(memory.x.take(index), other.x.take(index))
        assert memory.names == other.names
        assert memory.digest == other.digest
        assert memory.preprocess == other.preprocess
        assert memory.skipped == other.skipped


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_streams_are_the_same_with_any_number_of_workers(photos: Path, workers: int) -> None:
    data = streamed(photos, workers)
    batches = [*torch.arange(30).split(8), torch.tensor([], dtype=torch.int64), torch.tensor([3, 3, 0])]
    before = torch.get_rng_state()
    got = list(data.x.batches(batches))
    assert torch.equal(before, torch.get_rng_state())
    wanted = [load(photos, size=24).x.take(index) for index in batches]
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_a_file_that_vanishes_later_is_named(photos: Path) -> None:
    data = streamed(photos)
    (photos / "cat" / "3.png").unlink()
    with pytest.raises(Mistake, match=r"3\.png: was readable before"):
        data.x.take(torch.arange(30))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("harm", ["none", "cut", "flip", "empty", "swap", "delete pixels", "delete ledger", "ledger junk"])
def test_damaged_caches_are_made_anew(photos: Path, own_cache: Path, harm: str, mapped: bool) -> None:
    options = {"size": 24, "memory_bytes": 0} if mapped else {"size": 24}
    first = load(photos, **options)
    wanted = first.x.take(torch.arange(30)).clone()
    (pixels,) = own_cache.glob("set-*.npy")
    (ledger,) = own_cache.glob("set-*.npz")
    raw = pixels.read_bytes()
    if harm == "cut":
        pixels.write_bytes(raw[: len(raw) // 2])
    elif harm == "flip":
        pixels.write_bytes(raw[:5000] + bytes([raw[5000] ^ 1]) + raw[5001:])
    elif harm == "empty":
        pixels.write_bytes(b"")
    elif harm == "swap":
        np.save(pixels, np.zeros((3, 3)))
    elif harm == "delete pixels":
        pixels.unlink()
    elif harm == "delete ledger":
        ledger.unlink()
    elif harm == "ledger junk":
        ledger.write_bytes(b"junk")
    again = load(photos, **options)
    assert torch.equal(again.x.take(torch.arange(30)), wanted)
    assert again.digest == first.digest
    assert not list(own_cache.glob("*.part"))


def test_the_second_run_decodes_nothing(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "cat" / "bad.png").write_bytes(b"no")
    first = load(photos)
    from convince.data import decoding

    def never(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(decoding, "decode", never)
    monkeypatch.setattr(decoding, "look", never)
    seen: list[tuple[int, int]] = []
    second = load(photos, progress=lambda done, total: seen.append((done, total)))
    assert second.digest == first.digest
    assert second.skipped == first.skipped
    assert seen == [(31, 31)]


def test_a_changed_file_is_decoded_again(photos: Path) -> None:
    first = load(photos)
    time.sleep(0.02)
    path = photos / "cat" / "0.png"
    stamp = path.stat()
    Image.new("RGB", (50, 40), "red").save(path)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    second = load(photos)
    assert second.digest != first.digest
    assert second.x.take(torch.tensor([0]))[0, :, 0, 0].tolist() == [255, 0, 0]


def test_no_cache_folder_is_no_error(photos: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("x")
    assert len(load(photos, cache=blocked / "below")) == 30
    with pytest.raises(Mistake, match="is a file"):
        load(photos, cache=blocked)


def test_progress_counts_files(photos: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(photos, progress=lambda done, total: seen.append((done, total)))
    assert seen == sorted(seen)
    assert seen[-1] == (30, 30)


def test_trim_removes_the_oldest(tmp_path: Path) -> None:
    for age in range(4):
        path = tmp_path / f"{age}.npy"
        path.write_bytes(bytes(100))
        os.utime(path, (1_000_000 - age, 1_000_000 - age))
    (tmp_path / "x.npz.abc.part").write_bytes(b"x")
    os.utime(tmp_path / "x.npz.abc.part", (1, 1))
    (tmp_path / "keep.txt").write_text("not ours")
    trim(tmp_path, keep=250)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.npy", "1.npy", "keep.txt"]


# -- data ------------------------------------------------------------------------------------------


def test_mean_is_of_the_training_part_only() -> None:
    x = np.zeros((40, 4, 4), np.uint8)
    y = np.arange(40) % 2
    split = draw(torch.from_numpy(y), val=0.1, test=0.2, seed=0)
    x[split.train.numpy()[::2]] = 255
    x[split.test.numpy()] = 77
    data = load(x, y)
    assert torch.equal(data.split.train, split.train)
    assert data.preprocess.mean == (0.5,)
    assert data.preprocess.std == (0.5,)
    again = data.resplit(7)
    assert again.preprocess.mean != data.preprocess.mean
    assert again.x is data.x
    one = data.subset(split.train[1::2])
    assert one.preprocess.mean == (0.0,)
    assert one.preprocess.std == (1 / 255,)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 5), st.integers(1, 3), st.integers(1, 40), st.integers(0, 2**31))
def test_pixel_sums_are_exact(n: int, channels: int, side: int, seed: int) -> None:
    x = torch.randint(0, 256, (n, channels, 7, side), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    assert pixel_sums(torch.full((1, 1, 32, side), 255, dtype=torch.uint8)).tolist() == [[[255 * 32 * side, 65025 * 32 * side]]]
    wide = x.double().flatten(2)
    assert torch.equal(pixel_sums(x).double(), torch.stack([wide.sum(-1), wide.pow(2).sum(-1)], -1))


def test_resplit_and_subset(photos: Path) -> None:
    data = load(photos)
    other = data.resplit(1)
    assert other.x is data.x
    assert not torch.equal(other.split.test, data.split.test)
    assert other.digest != data.digest
    assert torch.equal(data.resplit(0).split.test, data.split.test)
    assert data.resplit(0).digest == data.digest
    small = data.subset(data.split.train[:5])
    assert len(small.split.train) == 5
    assert torch.equal(small.split.test, data.split.test)
    for bad in (data.split.test[:2], torch.tensor([0, 0]), torch.tensor([99]), torch.tensor([], dtype=torch.int64)):
        with pytest.raises(Mistake, match="subset"):
            data.subset(bad)


def test_groups_stay_together_when_resplit() -> None:
    groups = [f"p{n // 5}" for n in range(60)]
    data = load(np.random.default_rng(0).random((60, 3)), np.arange(60) % 2, group=groups)
    for seed in range(5):
        other = data.resplit(seed)
        assert other.groups is not None
        sides = [set(other.groups[other.split[part]].tolist()) for part in ("train", "val", "test")]
        assert not (sides[0] & sides[1])
        assert not (sides[0] & sides[2])
        assert not (sides[1] & sides[2])


def test_duplicates_across_the_split(photos: Path) -> None:
    for n in range(10):  # every cat is a dog 2 as well, under another name and another compression
        Image.open(photos / "cat" / f"{n}.png").save(photos / "dog 2" / f"copy-{n}.bmp")
    data = load(photos)
    assert data.names is not None
    assert data.duplicates
    part = {data.names[row]: name for name in ("train", "val", "test") for row in data.split[name].tolist()}
    wanted = {
        frozenset((f"cat/{n}.png", f"dog 2/copy-{n}.bmp")) for n in range(10) if (part[f"cat/{n}.png"] == "train") != (part[f"dog 2/copy-{n}.bmp"] == "train")
    }
    assert {frozenset(pair) for pair in data.duplicates} == wanted
    assert all(part[a] == "train" and part[b] in ("val", "test") for a, b in data.duplicates)


def test_summary_is_json(photos: Path) -> None:
    (photos / "cat" / "bad.png").write_bytes(b"no")
    summary = json.loads(json.dumps(load(photos).summary()))
    assert summary["n"] == {"train": 21, "val": 3, "test": 6}
    assert summary["counts"]["test"] == {"cat": 2, "dog 2": 2, "dog 10": 2}
    assert summary["skipped"][0]["file"] == "cat/bad.png"
    assert summary["fit"] == "letterbox"
    assert len(summary["mean"]) == 3
    assert len(summary["digest"]) == 64


def test_float_batch() -> None:
    data = load("digits")
    x = data.float_batch(torch.tensor([0, 51, 255], dtype=torch.uint8))
    assert x.dtype == torch.float32
    assert x.tolist() == pytest.approx([0.0, 0.2, 1.0])


def test_global_random_state_is_left_alone(photos: Path) -> None:
    states = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    load(photos).resplit(3)
    streamed(photos).x.take(torch.arange(4))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()  # noqa: NPY002


def test_data_can_be_made_by_hand() -> None:
    from convince.data import Preprocess
    from convince.types import Split

    x = MemoryStore(torch.zeros((4, 1, 2, 2), dtype=torch.uint8))
    rows = torch.arange(4)
    split = Split(rows[:2], rows[2:3], rows[3:])
    data = Data(x, torch.tensor([0, 1, 0, 1]), split, ("a", "b"), Preprocess("image", 1, (2, 2), "", (0.5,), (0.5,)))
    assert data.summary()["n"]["train"] == 2
    assert len(data.measured().duplicates) == 2
