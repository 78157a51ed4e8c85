"""Arrays: pixels, features and labels that are in memory already, checked and brought to one form."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from convince.data.extras import from_arrays_named
from convince.data.found import Found, coded, group_codes
from convince.errors import Mistake, nearest

_PART_KEYS = (("train", "training"), ("val", "valid", "validation"), ("test", "testing"))


def from_arrays(x: Any, y: Any, origin: str, group: Any = None, classes: Sequence[str] | None = None) -> Found:
    """Samples ``x`` with labels ``y`` [N] (None: all unlabelled).

    ``x``: a table [N d], or pixels [N h w], [N h w c], [N c h w] with 1, 3 or (last) 4 channels, uint8 or
    float in [0, 1]. Where both [N c h w] and [N h w c] fit, channels come first. A DataFrame is a table;
    ``y`` and ``group`` may then name columns. Raises Mistake for NaN, wrong shapes, ranges and lengths.
    """
    if hasattr(x, "columns") and hasattr(x, "iloc"):
        x, y, group = _from_frame(x, y, group, origin)
    samples = samples_tensor(x, origin)
    if isinstance(group, str):
        raise Mistake(f"{origin}: group={group!r} names a column, and arrays have none; give one group a sample")
    groups = None if group is None else group_codes(group, origin)
    if groups is not None and len(groups) != len(samples):
        raise Mistake(f"{origin}: {len(samples)} samples but {len(groups)} groups; give one group a sample")
    numbers, names = labels(y, len(samples), origin, classes)
    return Found(origin, numbers, names, x=samples, groups=groups, fixed=classes is not None)


def _from_frame(x: Any, y: Any, group: Any, origin: str) -> tuple[Any, Any, Any]:
    """Features, labels and groups of a DataFrame; columns that hold no numbers are named."""
    columns = [str(name) for name in x.columns]
    x = x.set_axis(columns, axis=1)

    def pick(what: str, word: str) -> Any:
        if word not in columns:
            have = ", ".join(columns)
            raise Mistake(f"{origin}: no column {word!r} for {what}{nearest(word, columns)} Columns: {have}")
        return x[word].to_numpy()

    drop = [word for word in (y, group) if isinstance(word, str)]
    y = pick("the labels", y) if isinstance(y, str) else y
    group = pick("the groups", group) if isinstance(group, str) else group
    x = x.drop(columns=drop)
    for name in x.columns:
        if x[name].dtype.kind not in "biuf":
            raise Mistake(f"{origin}: column {name!r} holds {x[name].dtype}, not numbers; encode it or leave it out")
        bad = np.flatnonzero(~np.isfinite(x[name].to_numpy(dtype=np.float64)))
        if len(bad):
            raise Mistake(f"{origin}: column {name!r}, row {bad[0]}: NaN or infinity; fill it in or leave the row out")
    return x.to_numpy(dtype=np.float32), y, group


def samples_tensor(x: Any, origin: str) -> Tensor:
    """uint8 [N c h w] or float32 [N d] from whatever array-like a person has."""
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if array.dtype.kind not in "biuf":
        raise Mistake(f"{origin}: samples of type {array.dtype} are not numbers; give uint8 pixels or float features")
    if array.ndim not in (2, 3, 4):
        raise Mistake(f"{origin}: samples have shape {array.shape}; a table is [N d], images are [N h w], [N h w c] or [N c h w]")
    if 0 in array.shape:
        raise Mistake(f"{origin}: samples have shape {array.shape}, so there is nothing in them")
    if array.dtype.kind == "f":
        _check_finite(array, origin)
    if array.ndim == 2:
        with np.errstate(over="ignore"):
            table = np.array(array, np.float32)
        _check_finite(table, origin)  # what is finite in 64 bits may not be in 32
        return torch.from_numpy(table)
    return torch.from_numpy(np.ascontiguousarray(_channels_first(_pixels(array, origin), origin)))


def _check_finite(array: np.ndarray, origin: str) -> None:
    finite = np.isfinite(array)
    if not finite.all():
        row = int(np.argwhere(~finite)[0][0])
        raise Mistake(f"{origin}: sample {row} holds NaN or infinity (as 32-bit float); mend or remove it")


def _pixels(array: np.ndarray, origin: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    low, high = array.min(), array.max()
    if array.dtype.kind == "f":
        if low < 0 or high > 1:
            raise Mistake(f"{origin}: float pixels must lie in [0, 1]; these span {low:g}..{high:g}. Divide by their largest value, or give uint8 pixels")
        return np.rint(array * np.float32(255)).astype(np.uint8)
    if array.dtype.kind == "b" or low < 0 or high > 255:
        raise Mistake(f"{origin}: whole-number pixels must lie in 0..255; these are {array.dtype}, {low}..{high}. Scale them to uint8, or to float in [0, 1]")
    return array.astype(np.uint8)


def _channels_first(array: np.ndarray, origin: str) -> np.ndarray:
    if array.ndim == 3:
        return array[:, None]
    if array.shape[1] in (1, 3):
        return array
    if array.shape[3] in (1, 3):
        return array.transpose(0, 3, 1, 2)
    if array.shape[3] == 4:  # alpha, composited on white as files are
        alpha = array[..., 3:].astype(np.uint32)
        mixed = (array[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255
        return mixed.astype(np.uint8).transpose(0, 3, 1, 2)
    raise Mistake(f"{origin}: images have shape {array.shape}; one axis after the first must be 1 or 3 channels")


def labels(y: Any, n: int, origin: str, classes: Sequence[str] | None = None) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 [N] into class names. Whole numbers: -1 is unlabelled, each other value a class.

    With ``classes`` numbers are places in it. Words are their own names. Raises Mistake for floats that
    are not whole, for other lengths, and for labels that are no vector.
    """
    if y is None:
        return np.full(n, -1, np.int64), tuple(classes or ())
    array = y.detach().cpu().numpy() if isinstance(y, Tensor) else np.asarray(y)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1:
        raise Mistake(f"{origin}: labels have shape {array.shape}; give one a sample [N]; one-hot rows: y.argmax(1)")
    if len(array) != n:
        raise Mistake(f"{origin}: {n} samples but {len(array)} labels; give one label a sample")
    if array.dtype.kind in "OUS":
        return _from_words(array, origin, classes)
    if array.dtype.kind not in "biuf":
        raise Mistake(f"{origin}: labels of type {array.dtype}; give whole numbers or words")
    if array.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(array) | (array != np.floor(array)))
        if len(bad):
            raise Mistake(
                f"{origin}: label {array[bad[0]]} of sample {bad[0]} is not a whole number; "
                "classes are whole numbers or words (a regression target cannot be classified)"
            )
    return _from_numbers(array.astype(np.int64), origin, classes)


def _from_words(array: np.ndarray, origin: str, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    def word(value: Any) -> str | None:
        if value is None or value != value:
            return None
        if isinstance(value, (bytes, np.bytes_)):
            return value.decode("utf-8", "replace")
        if isinstance(value, (float, np.floating)) and float(value).is_integer():
            return str(int(value))
        return str(value)

    numbers, names = coded([word(value) for value in array])
    if classes is None:
        return numbers, names
    unknown = [name for name in names if name not in classes]
    if unknown:
        raise Mistake(f"{origin}: label {unknown[0]!r} is not among the classes {', '.join(classes)}")
    place = np.array([*(list(classes).index(name) for name in names), -1], np.int64)
    return place[numbers], tuple(classes)


def _from_numbers(values: np.ndarray, origin: str, classes: Sequence[str] | None) -> tuple[np.ndarray, tuple[str, ...]]:
    if len(values) and values.min() < -1:
        raise Mistake(f"{origin}: label {values.min()} is below -1; classes count from 0, and -1 means unlabelled")
    if classes is not None:
        if len(values) and values.max() >= len(classes):
            raise Mistake(f"{origin}: label {values.max()} has no name; classes has {len(classes)}, from 0")
        return values, tuple(classes)
    known = np.unique(values[values >= 0])
    numbers = np.where(values >= 0, np.searchsorted(known, values), -1).astype(np.int64)
    return numbers, tuple(str(value) for value in known)


def from_mapping(arrays: Mapping[str, Any], origin: str, group: Any = None) -> Found:
    """Named arrays: x and y, or train_x, train_y, test_x, test_y (also x_train, val_x ...), and classes.

    ``annotators`` [N m] and ``nuisance`` (train_annotators ... where it comes in parts) stand beside them, -1 where unknown.
    """
    keys = {key.lower(): key for key in arrays}
    classes = None
    if "classes" in keys:
        classes = [str(name) for name in np.asarray(arrays[keys["classes"]]).ravel()]
    whole = _pair(keys, [""])
    if whole:
        groups = arrays[group] if isinstance(group, str) and group in arrays else group
        made = from_arrays(arrays[whole[0]], arrays[whole[1]] if whole[1] else None, origin, groups, classes)
        made.extra = from_arrays_named(arrays, [("", len(made))], made.classes, origin)
        return made
    found, parts = [], []
    for number, words in enumerate(_PART_KEYS):
        pair = _pair(keys, words)
        if pair:
            if pair[1] is None:
                raise Mistake(f"{origin}: {pair[0]} has no labels beside it; add {pair[0].replace('x', 'y')}")
            found.append((arrays[pair[0]], arrays[pair[1]]))
            parts.append(number)
    if not found or parts[0] != 0:
        raise Mistake(
            f"{origin}: no arrays named x and y, or train_x and train_y, among {', '.join(arrays) or 'none'}; "
            "rename them (test_x, val_x and classes are optional)"
        )
    made = _joined(found, parts, origin, group, classes)
    counts = [(("train", "val", "test")[part], len(y)) for part, (_, y) in zip(parts, found, strict=True)]
    made.extra = from_arrays_named(arrays, counts, made.classes, origin)
    return made


def _pair(keys: Mapping[str, str], words: Sequence[str]) -> tuple[str, str | None] | None:
    for word in words:
        for x, y in (("x", "y"), ("images", "labels"), ("data", "target"), ("data", "labels")):
            for pattern in ("{0}_{1}", "{1}_{0}") if word else ("{1}",):
                name = pattern.format(word, x)
                if name in keys:
                    return keys[name], keys.get(pattern.format(word, y))
    return None


def _joined(found: list[tuple[Any, Any]], parts: list[int], origin: str, group: Any, classes: Sequence[str] | None) -> Found:
    xs = [samples_tensor(x, origin) for x, _ in found]
    shapes = {tuple(x.shape[1:]) for x in xs}
    if len(shapes) > 1:
        raise Mistake(f"{origin}: the parts hold samples of different shapes {sorted(shapes)}; bring them to one")
    ys = [y.numpy() if isinstance(y, Tensor) else np.asarray(y) for _, y in found]
    for x, y in zip(xs, ys, strict=True):
        if y.ndim == 1 and len(x) != len(y):
            raise Mistake(f"{origin}: {len(x)} samples but {len(y)} labels in one part; give one label a sample")
    y = np.concatenate(ys)
    number = np.concatenate([np.full(len(x), part, np.int8) for x, part in zip(xs, parts, strict=True)])
    made = from_arrays(torch.cat(xs), y, origin, group, classes)
    made.parts = number if len(parts) > 1 else None
    return made


def from_dataset(dataset: Any, origin: str, size: tuple[int, int] | None, fit: str, group: Any = None) -> Found:
    """A map-style torch Dataset of (sample, label): read once, in order; images may be PIL, tensor or array.

    Its transforms run once, and the global random state is put back afterwards.
    """
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise Mistake(f"{origin}: an iterable data set has no length; give a map-style one (__len__ and __getitem__)")
    xs, ys = [], []
    with _random_kept():
        for row in range(len(dataset)):
            item = dataset[row]
            if not isinstance(item, (tuple, list)) or len(item) < 2:
                raise Mistake(f"{origin}: item {row} is a {type(item).__name__}; each must be (sample, label)")
            xs.append(item[0])
            ys.append(item[1].item() if isinstance(item[1], Tensor) and item[1].numel() == 1 else item[1])
    if not xs:
        raise Mistake(f"{origin}: the data set is empty")
    names = getattr(dataset, "classes", None)
    classes = [str(name) for name in names] if isinstance(names, (list, tuple)) else None
    if hasattr(xs[0], "getexif"):
        xs = list(_from_pictures(xs, size, fit))
    shapes = {tuple(np.shape(x)) for x in xs}
    if len(shapes) > 1:
        raise Mistake(f"{origin}: samples differ in shape, {sorted(shapes)[:3]}; resize them, or give PIL images")
    x = torch.stack(xs) if isinstance(xs[0], Tensor) else np.stack(xs)
    return from_arrays(x, ys, origin, group, classes)


def _from_pictures(images: list[Any], size: tuple[int, int] | None, fit: str) -> Iterator[Tensor]:
    from convince.data.decode import refit, to_mode
    from convince.data.preprocess import choose_size

    channels = 1 if all(im.mode in ("1", "L", "LA", "I", "F", "I;16") for im in images) else 3
    size = size or choose_size([(im.height, im.width) for im in images])
    for im in images:
        pixels = np.asarray(to_mode(im, channels)).reshape(im.height, im.width, channels)
        yield refit(pixels, size, fit)


@contextlib.contextmanager
def _random_kept() -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
