"""Sources: folders, tables, npz, idx, arrays, frames, torch data sets and built-in names; and their mistakes."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from convince.data import Preprocess, load, load_like
from convince.errors import Mistake

Write = Callable[..., Path]
RNG = np.random.default_rng(0)


def pixels(n: int = 30, *shape: int) -> np.ndarray:
    return RNG.integers(0, 256, (n, *(shape or (8, 8))), dtype=np.uint8)


def y_of(n: int = 30, k: int = 3) -> np.ndarray:
    return np.arange(n) % k


# -- folders ---------------------------------------------------------------------------------------


def test_folder_of_classes(photos: Path) -> None:
    data = load(photos)
    assert data.classes == ("cat", "dog 2", "dog 10")  # natural order
    assert data.names is not None
    assert data.names[0] == "cat/0.png"
    assert [len(data.split[part]) for part in ("train", "val", "test")] == [21, 3, 6]
    assert data.x.shape == (30, 3, 40, 50)  # all of one size up to 64: kept
    assert data.preprocess.size == (40, 50)
    assert not data.skipped
    assert not data.given_split
    assert data.k == 3
    assert data.y.dtype == torch.int64
    rows = data.x.take(torch.tensor([4, 0]))
    stored = np.asarray(Image.open(photos / "cat" / "0.png")).transpose(2, 0, 1)
    assert (rows[1].numpy() == stored).all()


def test_size_is_chosen_from_the_median_short_side(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "a", {"x": 3, "y": 3}, size=(100, 140))
    assert load(tmp_path / "a").preprocess.size == (96, 96)
    write(tmp_path / "b", {"x": 3, "y": 3}, size=(300, 400))
    assert load(tmp_path / "b").preprocess.size == (128, 128)
    assert load(tmp_path / "b", size=60).preprocess.size == (60, 60)


def test_grey_by_content(tmp_path: Path) -> None:
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        for n in range(4):
            grey = Image.new("L", (9, 9), n * 20 + (name == "y"))
            grey.convert("RGB").save(tmp_path / name / f"{n}.png")
    assert load(tmp_path).preprocess.channels == 1
    Image.new("RGB", (9, 9), "red").save(tmp_path / "x" / "red.png")
    assert load(tmp_path).preprocess.channels == 3


@pytest.mark.parametrize(
    "names",
    [("train", "val", "test"), ("Train", "validation", "Test"), ("training", "valid", "testing")],
)
def test_folder_with_its_own_split(tmp_path: Path, write: Write, names: tuple[str, str, str]) -> None:
    for seed, (name, n) in enumerate(zip(names, (6, 2, 3), strict=True)):
        write(tmp_path / name, {"a": n, "b": n}, seed=seed)
    (tmp_path / "notes.txt").write_text("hello")
    data = load(tmp_path)
    assert data.given_split
    assert data.classes == ("a", "b")
    assert [len(data.split[part]) for part in ("train", "val", "test")] == [12, 4, 6]
    assert [row.file for row in data.skipped] == ["notes.txt"]
    other = data.resplit(5)
    assert torch.equal(other.split.test, data.split.test)
    assert len(other.split.val) == 4


def test_val_is_cut_from_train(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train", {"a": 20, "b": 20})
    write(tmp_path / "test", {"a": 5, "b": 5}, seed=1)
    data = load(tmp_path, val=0.1)
    assert [len(data.split[part]) for part in ("train", "val", "test")] == [36, 4, 10]
    assert data.names is not None
    assert all(data.names[row].startswith("test/") for row in data.split.test)


def test_labels_that_training_lacks(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train", {"a": 3, "b": 3})
    write(tmp_path / "test", {"a": 3, "zebra": 3}, seed=1)
    with pytest.raises(Mistake, match="zebra"):
        load(tmp_path)


def test_classes_named_like_parts_are_classes(tmp_path: Path, write: Write) -> None:
    write(tmp_path, {"train": 4, "tram": 4})
    assert load(tmp_path).classes == ("train", "tram")


def test_other_scripts_and_symbols(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "Fotos größer", {"Müll": 4, "猫": 4, "🐈": 4})
    data = load(tmp_path / "Fotos größer")
    assert set(data.classes) == {"Müll", "猫", "🐈"}


def test_accents_in_either_form_are_one_class(tmp_path: Path, write: Write) -> None:
    write(tmp_path / "train", {"caf\u00e9": 4, "tea": 4})
    write(tmp_path / "test", {"cafe\u0301": 4, "tea": 4}, seed=1)
    assert load(tmp_path).classes == ("caf\u00e9", "tea")


def test_strays_are_listed(photos: Path) -> None:
    (photos / ".git").mkdir()
    (photos / "readme.md").write_text("x")
    (photos / "cat" / ".DS_Store").write_bytes(b"x")
    (photos / "cat" / "deeper").mkdir()
    (photos / "cat" / "list.txt").write_text("x")
    (photos / "empty").mkdir()
    (photos / "hollow").mkdir()
    (photos / "hollow" / "page.jpg").write_text("<html>")
    (photos / "again").symlink_to(photos)
    data = load(photos)
    listed = {row.file: row.reason for row in data.skipped}
    assert set(listed) >= {
        ".git", "readme.md", "cat/.DS_Store", "cat/deeper", "cat/list.txt", "empty", "hollow/page.jpg", "hollow",
        "again/cat",
    }  # fmt: skip
    assert data.classes == ("cat", "dog 2", "dog 10")
    assert len(data) == 30
    with pytest.raises(Mistake, match=r"strict.*(?s:.*)readme\.md"):
        load(photos, strict=True)


def test_strict_lists_all_damaged_files(photos: Path) -> None:
    (photos / "cat" / "x.png").write_bytes(b"")
    (photos / "cat" / "y.png").write_bytes(b"\x89PNG")
    with pytest.raises(Mistake) as caught:
        load(photos, strict=True)
    assert "x.png" in str(caught.value)
    assert "y.png" in str(caught.value)
    assert "2 file(s)" in str(caught.value)


def test_unlabelled_folder(tmp_path: Path, write: Write) -> None:
    write(tmp_path, {"a": 5, "b": 5, "unlabelled": 6})
    data = load(tmp_path)
    assert data.classes == ("a", "b")
    assert int((data.y == -1).sum()) == 6
    assert data.summary()["unlabelled"] == 6


def test_folder_groups_by_pattern(tmp_path: Path, write: Write) -> None:
    write(tmp_path, {"a": 1, "b": 1})
    for name in ("a", "b"):
        for n in range(20):
            Image.fromarray(pixels(9, 9)).save(tmp_path / name / f"p{n // 4}_{n}.png")
        (tmp_path / name / "0.png").unlink()
    data = load(tmp_path, group=r"p(\d+)_")
    assert data.groups is not None
    assert not set(data.groups[data.split.train].tolist()) & set(data.groups[data.split.test].tolist())
    for bad in (r"q(\d+)", r"p\d+", "("):
        with pytest.raises(Mistake, match="group"):
            load(tmp_path, group=bad)


@pytest.mark.parametrize("case", ["empty", "files", "missing", "one class", "one image", "all damaged"])
def test_folder_mistakes(tmp_path: Path, write: Write, case: str) -> None:
    root = tmp_path / "set"
    root.mkdir()
    if case == "files":
        (root / "a.jpg").write_bytes(b"x")
    if case == "missing":
        root = tmp_path / "sett"
    if case == "one class":
        write(root, {"only": 5})
    if case == "one image":
        write(root, {"a": 5, "lonely": 1})
    if case == "all damaged":
        for name in "ab":
            (root / name).mkdir()
            (root / name / "1.jpg").write_bytes(b"no")
    words = {
        "empty": "is empty. Make one folder a class",
        "files": "no class folders",
        "missing": "did you mean 'set'",
        "one class": "one class only, 'only'",
        "one image": "'lonely' has one sample",
        "all damaged": "none of its 2 files",
    }
    with pytest.raises(Mistake, match=words[case]):
        load(root)
    if case == "one class":
        assert load(root, allow_one_class=True).k == 1


# -- tables ----------------------------------------------------------------------------------------


def table(photos: Path, text: str, name: str = "set.csv", encoding: str = "utf-8") -> Path:
    path = photos / name
    path.write_text(text, encoding=encoding)
    return path


def rows_of(mark: str = ",", quote: str = "") -> str:
    names = ("cat", "dog 2", "dog 10")
    return "\n".join(f"{quote}{name}/{n}.png{quote}{mark}{quote}{name}{quote}" for name in names for n in range(10))


@pytest.mark.parametrize("mark", [",", ";", "\t"])
@pytest.mark.parametrize("quote", ["", '"'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_csv_dialects(photos: Path, mark: str, quote: str, encoding: str) -> None:
    data = load(table(photos, f"path{mark}label\n{rows_of(mark, quote)}\n\n", encoding=encoding))
    assert data.classes == ("cat", "dog 2", "dog 10")
    assert len(data) == 30
    assert data.names is not None
    assert data.names[0] == "cat/0.png"


def test_csv_equals_its_folder(photos: Path) -> None:
    a, b = load(photos, size=32), load(table(photos, "Path,Label\n" + rows_of()), size=32)
    assert torch.equal(a.x.take(torch.arange(30)), b.x.take(torch.arange(30)))
    assert torch.equal(a.y, b.y)
    assert a.preprocess == b.preprocess


def test_csv_split_and_groups(photos: Path) -> None:
    lines = [f"cat/{n}.png,c{n % 2},{('train', 'dev', 'test')[n % 3]},p{n}" for n in range(10)]
    lines += [f"dog 2/{n}.png,c{n % 2},train,q{n}" for n in range(10)]
    path = table(photos, "file,class,split,patient\n" + "\n".join(lines))
    data = load(path, group="patient")
    assert data.given_split
    assert len(data.split.val) == 3
    assert len(data.split.test) == 3
    assert data.groups is not None
    assert len(data.groups.unique()) == 20
    crossing = table(photos, path.read_text().replace("p1\n", "p0\n"), "crossing.csv")
    with pytest.raises(Mistake, match="both train and val"):
        load(crossing, group="patient")
    with pytest.raises(Mistake, match="did you mean 'patient'"):
        load(path, group="pateint")


def test_csv_missing_files_and_cells(photos: Path) -> None:
    text = "path,label\n" + rows_of() + "\ncat/gone.png,cat\n,cat\ncat/1.png\n"
    data = load(table(photos, text))
    reasons = sorted(row.reason for row in data.skipped)
    assert len(data) == 30
    assert reasons == ["has 1 cells of 2", "its path is empty", "no such file"]
    with pytest.raises(Mistake, match="strict"):
        load(table(photos, text), strict=True)
    with pytest.raises(Mistake, match=r"none of its 2 files.*no such file"):
        load(table(photos, "path,label\nx,a\ny,b\n"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,lable\na,b\n", "no column 'label'.*did you mean 'label'"),
        ("pth,label\na,b\n", "no column 'path'.*'pth'"),
        ("", "empty"),
        ("path,label\n", "no rows"),
        ("path,label,label\na,b,c\n", "two columns"),
        ("path,label,split\na,b,trian\n", "row 1: split 'trian'"),
    ],
)
def test_csv_mistakes(photos: Path, text: str, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        load(table(photos, text))


def test_csv_in_another_encoding_is_named(photos: Path) -> None:
    (photos / "latin.csv").write_bytes("path,label\nM\u00fcll.png,a\n".encode("latin-1"))
    with pytest.raises(Mistake, match="not UTF-8"):
        load(photos / "latin.csv")


def test_csv_of_features(tmp_path: Path) -> None:
    lines = "\n".join(f"{n},{n * 2.5},{'ab'[n % 2]}" for n in range(20))
    data = load(table(tmp_path, "u,v,label\n" + lines))
    assert data.preprocess.kind == "table"
    assert data.x.shape == (20, 2)
    assert data.classes == ("a", "b")


def test_csv_empty_label_is_unlabelled(photos: Path) -> None:
    data = load(table(photos, "path,label\n" + rows_of().replace("cat/3.png,cat", "cat/3.png,")))
    assert int((data.y == -1).sum()) == 1


def test_parquet(photos: Path) -> None:
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow")
    frame = pandas.DataFrame([line.split(",") for line in rows_of().split("\n")], columns=["path", "label"])
    frame.to_parquet(photos / "set.parquet")
    assert torch.equal(load(photos / "set.parquet").y, load(photos).y)
    (photos / "bad.parquet").write_bytes(b"no")
    with pytest.raises(Mistake, match="not a readable Parquet"):
        load(photos / "bad.parquet")


# -- arrays ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "stored"),
    [
        ((8, 9), (1, 8, 9)),
        ((8, 9, 1), (1, 8, 9)),
        ((8, 9, 3), (3, 8, 9)),
        ((3, 8, 9), (3, 8, 9)),
        ((1, 8, 9), (1, 8, 9)),
    ],
)
def test_pixel_arrays(shape: tuple[int, ...], stored: tuple[int, ...]) -> None:
    x = pixels(30, *shape)
    for given in (x, torch.from_numpy(x), x.astype(np.int64)):
        data = load(given, y_of())
        assert data.x.shape == (30, *stored)
        assert data.x.dtype == torch.uint8
    wanted = x if x.ndim == 4 and shape[0] in (1, 3) else np.moveaxis(x.reshape(30, 8, 9, -1), -1, 1)
    assert (data.x.take(torch.arange(30)).numpy() == wanted).all()


def test_float_pixels_are_scaled_or_refused() -> None:
    x = pixels(30, 3, 8, 8)
    assert torch.equal(load(x / 255, y_of()).x.take(torch.arange(30)), torch.from_numpy(x))
    for bad in (x.astype(float), x / 255 - 0.1):
        with pytest.raises(Mistake, match=r"must lie in \[0, 1\]; these span"):
            load(bad, y_of())


def test_tables_and_their_numbers() -> None:
    x = np.array([[1.0, 5.0], [3.0, 5.0], [5.0, 5.0], [7.0, 5.0]])
    data = load(x, [0, 1, 0, 1], val=0.0, test=0.0)
    assert data.preprocess == Preprocess("table", 2, (), "", (4.0, 5.0), (5**0.5, 1.0))
    assert data.float_batch(data.x.take(torch.tensor([1]))).tolist() == [[3.0, 5.0]]


def test_size_resizes_arrays() -> None:
    data = load(np.full((30, 8, 4), 200, np.uint8), y_of(), size=16)
    x = data.x.take(torch.tensor([0]))[0, 0]
    assert data.x.shape == (30, 1, 16, 16)
    assert (x[:, 4:12] == 200).all()
    assert (x[:, :4] == 128).all()


def test_frames() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"u": range(20), "v": [1.5] * 20, "flag": [True, False] * 10, "kind": list("ab") * 10})
    data = load(frame, "kind")
    assert data.classes == ("a", "b")
    assert data.x.shape == (20, 3)
    assert torch.equal(load(frame.drop(columns="kind"), frame["kind"]).y, data.y)
    assert load(frame, "kind", group="u").groups is not None
    with pytest.raises(Mistake, match=r"column 'kind' holds .*not numbers"):
        load(frame, "flag")
    frame.loc[3, "v"] = float("nan")
    with pytest.raises(Mistake, match="column 'v', row 3"):
        load(frame, "kind")


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (np.full((4, 2), np.nan), [0, 1, 0, 1], "sample 0 holds NaN"),
        (np.array([[1.0], [np.inf]]), [0, 1], "sample 1 holds NaN or infinity"),
        (np.full((4, 2), 1e300), [0, 1, 0, 1], "32-bit"),
        (np.zeros((4, 2)), [0, 1, 0], "4 samples but 3 labels"),
        (np.zeros((4, 2)), [0, 1, 0.5, 1], "label 0.5 of sample 2 is not a whole number"),
        (np.zeros((4, 2)), [0, 1, np.nan, 1], "not a whole number"),
        (np.zeros((4, 2)), [[0, 1]] * 4, "argmax"),
        (np.zeros((4, 2)), [0, 0, 0, 0], "one class only"),
        (np.zeros((4, 2)), [1, -1, 1, -1], "-1 means unlabelled"),
        (np.zeros((4, 2)), [0, 1, -2, 1], "below -1"),
        (np.zeros((4, 2)), None, "no labels"),
        (np.zeros((5, 2)), [0, 0, 1, 1, 2], "'2' has one sample"),
        (np.zeros(4), [0, 1, 0, 1], "shape"),
        (np.zeros((0, 2)), [], "nothing in them"),
        (np.zeros((4, 2, 5, 5)), [0, 1, 0, 1], "1 or 3 channels"),
        (np.full((4, 5, 5), 300), [0, 1, 0, 1], "0..255"),
        (np.array([["a"], ["b"]]), [0, 1], "not numbers"),
    ],
)
def test_array_mistakes(x: object, y: object, words: str) -> None:
    with pytest.raises(Mistake, match=words):
        load(x, y)


def test_labels_of_many_kinds() -> None:
    x = np.zeros((8, 2), np.float32)
    for y, classes in (
        ([3, 10, 3, 10] * 2, ("3", "10")),
        ([3.0, 10.0] * 4, ("3", "10")),
        (["b", "a"] * 4, ("a", "b")),
        ([True, False] * 4, ("0", "1")),
        (np.array(["b", "a", None, "a"] * 2, object), ("a", "b")),
    ):
        assert load(x, y).classes == classes


def test_nobody_reads_a_pickle(tmp_path: Path) -> None:
    np.savez(tmp_path / "evil.npz", x=np.zeros((4, 2)), y=np.array([{}, 1, 2, 3], object))
    with pytest.raises(Mistake, match="Python objects"):
        load(tmp_path / "evil.npz")


def test_npz(tmp_path: Path) -> None:
    x, y = pixels(30, 8, 8, 3), y_of()
    np.savez(tmp_path / "one.npz", x=x, y=y, classes=["a", "b", "c"])
    assert load(tmp_path / "one.npz").classes == ("a", "b", "c")
    for keys in (("train_x", "train_y", "test_x", "test_y"), ("x_train", "y_train", "x_test", "y_test")):
        np.savez(tmp_path / "two.npz", **dict(zip(keys, (x, y, x[:6], y[:6]), strict=True)))
        data = load(tmp_path / "two.npz", val=0.1)
        assert data.given_split
        assert [len(data.split[p]) for p in ("train", "val", "test")] == [27, 3, 6]
        assert data.duplicates
        assert data.duplicates[0][0].startswith("row ")
    np.savez(tmp_path / "odd.npz", a=x)
    with pytest.raises(Mistake, match="no arrays named x and y"):
        load(tmp_path / "odd.npz")
    (tmp_path / "bad.npz").write_bytes((tmp_path / "one.npz").read_bytes()[:500])
    with pytest.raises(Mistake, match=r"not a readable .npz"):
        load(tmp_path / "bad.npz")
    np.savez(tmp_path / "lack.npz", train_x=x, train_y=y, test_x=x[:2], test_y=[7, 7])
    with pytest.raises(Mistake, match="training lacks: 7"):
        load(tmp_path / "lack.npz")


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(struct.pack(">i", side) for side in array.shape)
    return gzip.compress(head + array.tobytes())


def test_idx_folder(tmp_path: Path) -> None:
    for part, n in (("train", 20), ("t10k", 6)):
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(pixels(n, 5, 5)))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(y_of(n, 2).astype(np.uint8)))
    data = load(tmp_path)
    assert data.x.shape == (26, 1, 5, 5)
    assert data.given_split
    assert len(data.split.test) == 6
    good = (tmp_path / "train-images-idx3-ubyte.gz").read_bytes()
    for bad in (good[:40], gzip.compress(b"\0\0\x08\x03" + bytes(20)), gzip.compress(b"hello"), b"hello"):
        (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(bad)
        with pytest.raises(Mistake, match="train-images"):
            load(tmp_path)


class Dice(torch.utils.data.Dataset):
    """Pairs whose making draws random numbers."""

    classes = ("even", "odd")

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self) -> int:
        return 12

    def __getitem__(self, row: int) -> tuple[object, object]:
        x = torch.rand(3, 6, 6)
        if self.kind == "pil":
            return Image.fromarray((x.permute(1, 2, 0).numpy() * 255).astype(np.uint8)), row % 2
        return x, torch.tensor(row % 2)


@pytest.mark.parametrize("kind", ["pil", "tensor"])
def test_torch_datasets(kind: str) -> None:
    before = torch.get_rng_state()
    data = load(Dice(kind))
    assert torch.equal(before, torch.get_rng_state())
    assert data.classes == ("even", "odd")
    assert data.x.shape == (12, 3, 6, 6)
    assert data.y.tolist() == [0, 1] * 6


def test_unknown_sources(tmp_path: Path) -> None:
    with pytest.raises(Mistake, match="did you mean 'digits'"):
        load("digit")
    with pytest.raises(Mistake, match="type int"):
        load(7)
    (tmp_path / "a.docx").write_bytes(b"x")
    with pytest.raises(Mistake, match="not read"):
        load(tmp_path / "a.docx")
    with pytest.raises(Mistake, match="brings its own labels"):
        load("digits", [1])


def test_groups_are_never_ignored() -> None:
    with pytest.raises(Mistake, match="no groups to go by"):
        load("digits", group="writer")


@pytest.mark.parametrize("wrong", [{"fit": "crp"}, {"size": 0}, {"size": True}, {"val": 1.5}, {"workers": -1}])
def test_wrong_settings(wrong: dict[str, object]) -> None:
    with pytest.raises(Mistake, match=next(iter(wrong))):
        load("digits", **wrong)


# -- built-in sets ---------------------------------------------------------------------------------


def test_digits() -> None:
    from sklearn.datasets import load_digits

    data = load("digits")
    assert data.x.shape == (1797, 1, 8, 8)
    assert data.k == 10
    assert [len(data.split[part]) for part in ("train", "val", "test")] == [1258, 180, 359]
    raw = load_digits().images
    x = data.x.take(torch.arange(1797))[:, 0].numpy()
    assert (x[raw == 16] == 255).all()
    assert (x[raw == 8] == 128).all()
    assert (x[raw == 0] == 0).all()
    assert load("digits", seed=1).digest != data.digest == load("digits").digest


def test_missing_builtin_says_what_to_put_where(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CONVINCE_DATA", raising=False)
    with pytest.raises(Mistake, match=r"CONVINCE_DATA is not set.*train-images-idx3-ubyte.gz"):
        load("mnist")
    monkeypatch.setenv("CONVINCE_DATA", str(tmp_path))
    with pytest.raises(Mistake, match=r"cifar10.*npz"):
        load("cifar10")


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_stored_idx_sets(name: str, stored_sets: Callable[[str], Path]) -> None:
    stored_sets(name)
    data = load(name)
    assert data.x.shape == (70_000, 1, 28, 28)
    assert [len(data.split[part]) for part in ("train", "val", "test")] == [54_000, 6_000, 10_000]
    if name == "mnist":
        assert abs(data.preprocess.mean[0] - 0.1307) < 0.001
        assert abs(data.preprocess.std[0] - 0.3081) < 0.001
    else:
        assert data.classes[9] == "Ankle boot"


def test_stored_cifar(stored_sets: Callable[[str], Path], own_cache: Path) -> None:
    stored_sets("cifar10")
    first = load("cifar10")
    assert first.x.shape == (30_000, 3, 32, 32)
    assert first.classes[0] == "airplane"
    assert len(list(own_cache.glob("npz-*.npz"))) == 1
    assert load("cifar10").digest == first.digest


# -- for a trained model ---------------------------------------------------------------------------


def test_load_like(tmp_path: Path, write: Write, photos: Path) -> None:
    trained = load(photos, size=32)
    write(tmp_path / "new", {"dog 10": 1, "cat": 2}, seed=9)
    data = load_like(tmp_path / "new", preprocess=trained.preprocess, classes=trained.classes)
    assert data.preprocess == trained.preprocess
    assert data.classes == trained.classes
    assert data.y.tolist() == [0, 0, 2]
    assert data.split.test.tolist() == [0, 1, 2]
    assert len(data.split.train) == 0
    write(tmp_path / "odd", {"cow": 1})
    with pytest.raises(Mistake, match="cow"):
        load_like(tmp_path / "odd", preprocess=trained.preprocess, classes=trained.classes)
    arrays = load_like(pixels(4, 40, 40), [0, 1, 2, 0], preprocess=trained.preprocess, classes=("0", "1", "2"))
    assert arrays.x.shape == (4, 3, 32, 32)
    with pytest.raises(Mistake, match="table"):
        load_like(np.zeros((4, 2)), [0, 1, 2, 0], preprocess=trained.preprocess, classes=("0", "1", "2"))
