"""Hiec-handwriting: single characters by writers who were not in the training set."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Generator, Tensor
from torch.nn import functional as F

from convince.data import Data, MemoryStore, Preprocess, decode, load
from convince.data.decode import look
from convince.data.split import draw
from convince.errors import Mistake, nearest
from convince.fit.answer import Scores
from convince.fit.settings import Settings
from convince.kinds import Recipe, Setup
from convince.parts import Card, spell
from convince.types import Field, Schema, Split

CARD = Card(
    part="hiec-handwriting",
    kind="recipe",
    title="Classification of Non-native Handwritten Characters Using Convolutional Neural Network",
    paper="hiec-handwriting-cnn",
    year=2024,
    url="https://arxiv.org/abs/2406.04511",
    expects=("images", "labels"),
    departs=(
        "the split keeps writers apart by default, which the paper does not state; split='random' cuts by images",
        "trains with the loop's SGD (0.05, cosine) and batch normalisation; Adam 0.001 is a guess at the paper's",
        "classes are those found in the data; the paper's list of classes is not known here",
        "preprocessing (Otsu, cropping to the ink, a square of 32 pixels) is ours",
    ),
)

CANVAS = 512  # the longer side at which files are read, before the ink is cut out [pixels]


# -- from a page to a square of ink ----------------------------------------------------------------


def otsu(image: UInt8[np.ndarray, "h w"]) -> int:
    """The threshold t, 0 to 254, whose classes ``<= t`` and ``> t`` have the largest variance between them."""
    counts = np.bincount(image.reshape(-1), minlength=256).astype(np.float64)
    below = np.cumsum(counts)[:-1]
    above = counts.sum() - below
    total = np.cumsum(counts * np.arange(256))
    with np.errstate(divide="ignore", invalid="ignore"):
        means = total[:-1] / below, (total[-1] - total[:-1]) / above
        between = below * above * (means[0] - means[1]) ** 2
    return int(np.nanargmax(np.where((below > 0) & (above > 0), between, -1.0)))


def ink_of(image: UInt8[np.ndarray, "h w"], name: str = "the image") -> Bool[np.ndarray, "h w"]:
    """True where there is ink: the side of Otsu's threshold that most of the border is not on.

    Dark ink on light paper and light on dark both pass. Raises Mistake, naming the file, where the page is empty.
    """
    if image.size == 0 or image.min() == image.max():
        raise Mistake(f"{name}: the page is empty, all pixels are equal; leave the file out")
    light = image > otsu(image)
    border = np.concatenate([light[0], light[-1], light[1:-1, 0], light[1:-1, -1]])
    share = float(border.mean())
    paper_is_light = share > 0.5 if share != 0.5 else bool(light.mean() > 0.5)
    return ~light if paper_is_light else light


def deslanted(ink: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h v"]:
    """Rows shifted by whole pixels so that ``mu_11 / mu_02``, the slant by image moments, becomes about 0."""
    rows, columns = np.nonzero(ink)
    y = rows - rows.mean()
    slant = float((y * (columns - columns.mean())).sum() / max((y * y).sum(), 1.0))
    shifts = np.rint(-slant * (np.arange(len(ink)) - rows.mean())).astype(int)
    low, high = min(shifts.min(), 0), max(shifts.max(), 0)
    out = np.zeros((len(ink), ink.shape[1] + high - low), bool)
    for row, shift in enumerate(shifts):
        out[row, shift - low : shift - low + ink.shape[1]] = ink[row]
    return out


def preprocess(
    image: UInt8[np.ndarray, "h w"], size: int = 32, margin: float = 0.1, deslant: bool = False, name: str = "the image"
) -> UInt8[np.ndarray, "size size"]:
    """Ink as 255 on 0: Otsu, the ink's bounding box, padded to a square, ``margin`` of it on each side, resized by areas.

    Raises Mistake, naming the file, where the page is empty.
    """
    ink = ink_of(image, name)
    if deslant:
        ink = deslanted(ink)
    rows, columns = np.flatnonzero(ink.any(1)), np.flatnonzero(ink.any(0))
    ink = ink[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    h, w = ink.shape
    side = math.ceil(max(h, w) * (1 + 2 * margin))
    square = np.zeros((side, side), np.uint8)
    top, left = (side - h) // 2, (side - w) // 2
    square[top : top + h, left : left + w] = ink * np.uint8(255)
    return np.array(Image.fromarray(square).resize((size, size), Image.Resampling.BOX))


# -- writers ---------------------------------------------------------------------------------------


def writer_split(groups: Int[Tensor, " N"], test: float = 0.2, val: float = 0.1, seed: int = 0, y: Int[Tensor, " N"] | None = None) -> Split:
    """Rows in train, val and test so that no writer is in two parts; with labels the classes keep their shares.

    ``groups``: the writer of each row; shares are of rows, as near as whole writers allow.
    """
    split = draw(torch.zeros_like(groups) if y is None else y, val=val, test=test, seed=seed, groups=groups)
    writers = [set(groups[split[part]].tolist()) for part in ("train", "val", "test")]
    assert all(not a & b for a, b in itertools.combinations(writers, 2)), "a writer stands in two parts"
    return split


@dataclass(frozen=True, eq=False)
class Style:
    """How one writer writes. ``field`` [2 4 4] is the shape of a smooth displacement, ``wobble`` its largest size."""

    slant: float  # shear, columns per row
    aspect: float  # width over height, 1 as given
    stroke: int  # -1 thinner, 0, 1 or 2 thicker, steps of a pixel on each side
    rotation_deg: float
    wobble: float  # [pixels of a 32-pixel image]
    ink: float  # the ink's level, 0 to 1
    field: Float[Tensor, "2 4 4"]

    def apply(self, x: Float[Tensor, "n 1 s s"], gen: Generator) -> Float[Tensor, "n 1 s s"]:
        """Images (ink 1 on paper 0, with room around it) as this writer would have written them, each with a small jitter."""
        n, side = len(x), x.shape[-1]
        x = thicker(x, self.stroke)
        jitter = torch.randn(n, 3, generator=gen, dtype=torch.float64) * torch.tensor([0.03, 0.03, 2.0], dtype=torch.float64)
        slant, aspect = self.slant + jitter[:, 0], self.aspect * jitter[:, 1].exp()
        angle = (self.rotation_deg + jitter[:, 2]).deg2rad()
        cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros(n), torch.ones(n)
        turn = torch.stack([cos, -sin, sin, cos], 1).view(n, 2, 2)
        shear = torch.stack([one, -slant, zero, one], 1).view(n, 2, 2)
        scale = torch.diag_embed(torch.stack([aspect, one], 1))
        back = torch.linalg.inv(turn @ shear @ scale)  # grid_sample asks where each pixel comes from
        theta = torch.cat([back, torch.zeros(n, 2, 1)], 2).to(x)
        grid = F.affine_grid(theta, list(x.shape), align_corners=False)
        bend = F.interpolate(self.field[None].to(x), size=(side, side), mode="bicubic", align_corners=True)
        grid = grid + (self.wobble * 2 / 32) * bend.permute(0, 2, 3, 1)
        return (F.grid_sample(x, grid, align_corners=False) * self.ink).clamp(0, 1)


def thicker(x: Float[Tensor, "n 1 h w"], steps: int) -> Float[Tensor, "n 1 h w"]:
    """Strokes dilated by ``steps`` pixels with a cross, or eroded where it is negative; an image that would fade stays."""
    for _ in range(abs(steps)):
        y = x if steps > 0 else -x
        y = torch.maximum(F.max_pool2d(y, (3, 1), 1, (1, 0)), F.max_pool2d(y, (1, 3), 1, (0, 1)))
        y = y if steps > 0 else -y
        lives = y.amax((1, 2, 3), keepdim=True) >= 0.5 * x.amax((1, 2, 3), keepdim=True)
        x = torch.where(lives, y, x)
    return x


def write_style(gen: Generator) -> Style:
    """One writer: slant U(-.35, .35), aspect U(.75, 1.25), stroke -1 to 2, rotation U(-12, 12) degrees, wobble U(0, 1.5), ink U(.6, 1)."""
    u = torch.rand(5, generator=gen, dtype=torch.float64).tolist()
    stroke = int(torch.randint(-1, 3, (), generator=gen))
    field = torch.randn(2, 4, 4, generator=gen)
    return Style(0.7 * u[0] - 0.35, 0.75 + 0.5 * u[1], stroke, 24 * u[2] - 12, 1.5 * u[3], 0.6 + 0.4 * u[4], field / field.abs().max())


# -- a generated sample ----------------------------------------------------------------------------

_STROKES: dict[str, tuple[tuple[tuple[float, float], ...], ...]] = {  # (x, y) in a unit box, y downwards
    "0": (((0.5, 0), (0.85, 0.2), (0.85, 0.8), (0.5, 1), (0.15, 0.8), (0.15, 0.2), (0.5, 0)),),
    "1": (((0.3, 0.2), (0.55, 0), (0.55, 1)),),
    "2": (((0.15, 0.2), (0.5, 0), (0.85, 0.25), (0.15, 1), (0.9, 1)),),
    "3": (((0.15, 0.1), (0.6, 0), (0.8, 0.25), (0.45, 0.48), (0.85, 0.75), (0.55, 1), (0.15, 0.9)),),
    "4": (((0.7, 1), (0.7, 0), (0.1, 0.65), (0.95, 0.65)),),
    "5": (((0.85, 0), (0.2, 0), (0.2, 0.45), (0.65, 0.42), (0.85, 0.7), (0.6, 1), (0.15, 0.92)),),
    "6": (((0.75, 0), (0.3, 0.4), (0.15, 0.75), (0.45, 1), (0.8, 0.8), (0.6, 0.5), (0.2, 0.65)),),
    "7": (((0.1, 0), (0.9, 0), (0.4, 1)), ((0.3, 0.5), (0.8, 0.5))),
    "8": (((0.5, 0.48), (0.2, 0.25), (0.5, 0), (0.8, 0.25), (0.5, 0.48), (0.15, 0.75), (0.5, 1), (0.85, 0.75), (0.5, 0.48)),),
    "9": (((0.8, 0.35), (0.45, 0.5), (0.2, 0.25), (0.5, 0), (0.8, 0.2), (0.8, 0.6), (0.5, 1)),),
}


def glyph(character: str, side: int = 64, width: float = 0.06) -> Float[Tensor, "1 side side"]:
    """The polylines of a digit, ink 1 on paper 0, in the middle half of the image; ``width`` is half a stroke's, in box units."""
    if character not in _STROKES:
        raise Mistake(f"glyph({character!r}): known are {', '.join(_STROKES)}")
    place = ((torch.arange(side) + 0.5) / side - 0.25) / 0.5
    points = torch.stack(torch.meshgrid(place, place, indexing="xy"), -1)
    nearest_stroke = torch.full((side, side), math.inf)
    for line in _STROKES[character]:
        for a, b in itertools.pairwise(torch.tensor(line)):
            along = ((points - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
            nearest_stroke = torch.minimum(nearest_stroke, (points - a - along[..., None] * (b - a)).norm(dim=-1))
    return ((width - nearest_stroke) * side / 2 + 0.5).clamp(0, 1)[None]


def written(x: Float[Tensor, "n 1 s s"], writers: Int[Tensor, " n"], styles: Mapping[int, Style], gen: Generator, size: int = 32) -> UInt8[Tensor, "n 1 z z"]:
    """Each image in its writer's style, then preprocessed: what a data set of this recipe holds."""
    out = torch.empty(len(x), 1, size, size, dtype=torch.uint8)
    for writer in writers.unique().tolist():
        rows = (writers == writer).nonzero()[:, 0]
        pixels = (styles[writer].apply(x[rows], gen) * 255).round().to(torch.uint8).numpy()
        for row, page in zip(rows.tolist(), pixels, strict=True):
            out[row, 0] = torch.from_numpy(preprocess(page[0], size, name=f"image {row}"))
    return out


def as_data(x: UInt8[Tensor, "n 1 h w"], y: Int[Tensor, " n"], writers: Int[Tensor, " n"], split: Split, classes: Sequence[str], origin: str) -> Data:
    """Preprocessed characters as :class:`convince.data.Data`, mean and deviation from the training part."""
    pre = Preprocess("image", 1, (x.shape[2], x.shape[3]), "letterbox", (0.0,), (1.0,))
    return Data(MemoryStore(x), y, split, tuple(classes), pre, groups=writers, origin=origin).measured()


# -- what is reported ------------------------------------------------------------------------------


def confused(scores: Scores, classes: Sequence[str], top: int = 5) -> dict[str, Any]:
    """Accuracy, recall of each class (NaN without images), and the most confused pairs as (true, answer, count)."""
    table = scores.confusion()
    seen = table.sum(1)
    recall = {name: float(table[i, i] / seen[i]) if seen[i] else math.nan for i, name in enumerate(classes)}
    wrong = [(classes[i], classes[j], int(table[i, j])) for i, j in itertools.permutations(range(len(classes)), 2) if table[i, j]]
    return {"accuracy": scores.accuracy, "recall": recall, "pairs": sorted(wrong, key=lambda row: (-row[2], row[:2]))[:top]}


def ablate(
    grid: Mapping[str, Sequence[Any]], data: Data, seeds: Sequence[int] = (0, 1, 2), model: str = "handwriting-cnn", **settings: Any
) -> list[dict[str, Any]]:
    """The paper's ablation as a table: every combination of ``grid``, each on the same ``seeds`` (split, weights and order).

    Keys are options of the network (``channels``, ``hidden``, ``dropout``, ``kernel``, ``norm``) or settings (``lr``, ``batch``,
    ``epochs``, ``parts``); ``settings`` hold for all. A row has its combination, "accuracy" (mean on the test part), "sd"
    (nan for one seed), "parameters" and "n".
    """
    from convince.backbones import part_of
    from convince.fit.settings import settings as make
    from convince.fit.train import train

    part = part_of(model)
    options = part.options() if part is not None else {}
    for key in grid:
        if key not in options and key not in Settings.model_fields:
            raise Mistake(f"ablate: no option of {model} and no setting is named {key!r}{nearest(key, [*options, *Settings.model_fields])}")
    rows = []
    for values in itertools.product(*grid.values()):
        chosen = dict(zip(grid, values, strict=True))
        network = spell(model, {k: v for k, v in chosen.items() if k in options})
        rest = {k: v for k, v in chosen.items() if k not in options}
        results = [train(make(**{"augment": "none", **settings, **rest, "model": network, "seed": seed}), data.resplit(seed)) for seed in seeds]
        accuracies = [result.test.accuracy for result in results if result.test is not None]
        parameters = sum(p.numel() for p in results[0].run.model.parameters())
        sd = statistics.stdev(accuracies) if len(accuracies) > 1 else math.nan
        rows.append({**chosen, "accuracy": statistics.fmean(accuracies), "sd": sd, "parameters": parameters, "n": len(accuracies)})
    return rows


# -- the recipe ------------------------------------------------------------------------------------


@final
@dataclass
class HiecHandwriting(Recipe):
    """Characters in class folders, or a CSV with the columns path, label and writer.

    ``split``: "writer" keeps every writer in one part, "random" cuts by images. ``writer``: the CSV's column, or for folders a
    regular expression whose first parenthesis finds the writer in a file's path (None: the column ``writer``; for folders
    what stands before the first ``_`` of the file's name). ``val``, ``test``: shares of all images. ``size`` [pixels].
    """

    split: str = "writer"
    writer: str | None = None
    size: int = 32
    deslant: bool = False
    val: float = 0.1
    test: float = 0.2
    seed: int = 0

    schema = Schema(
        (
            Field("image", "one character, ink on paper", "grey level 0 to 255", "h w"),
            Field("label", "the character: A-Z, a-z, 0-9 or some of them"),
            Field("writer", "who wrote it"),
        )
    )

    def __post_init__(self) -> None:
        if self.split not in ("writer", "random"):
            raise Mistake(f"hiec-handwriting: split={self.split!r} must be 'writer' or 'random'{nearest(str(self.split), ['writer', 'random'])}")
        if self.size < 8:
            raise Mistake(f"hiec-handwriting: size={self.size!r} must be at least 8 pixels; the network was made for 32")

    def load(self, root: str | Path) -> Data:
        """Read and preprocess a folder of class folders, or a CSV. Raises Mistake for an empty page, naming the file."""
        root = Path(root).expanduser()
        folder = root.is_dir()
        pattern = self.writer or (r"(?:^|/)([^/_]+)_[^/]*$" if folder else "writer")
        group = pattern if self.split == "writer" else None
        data = load(str(root), size=self.size, group=group, val=self.val, test=self.test, seed=self.seed)
        if data.names is None:
            raise Mistake(f"{root}: this recipe reads images, and the table lists none; add a column 'path'")
        base = root if folder else root.parent
        x = torch.empty(len(data), 1, self.size, self.size, dtype=torch.uint8)
        for row, name in enumerate(data.names):
            x[row, 0] = torch.from_numpy(self.read(base / name))
        pre = replace(data.preprocess, channels=1, size=(self.size, self.size), mean=(0.0,), std=(1.0,))
        return replace(data, x=MemoryStore(x), preprocess=pre, sums=None, hashes=None).measured()

    def read(self, file: str | Path) -> UInt8[np.ndarray, "size size"]:
        """One file as the network gets it; use it for new files too."""
        (h, w), _ = look(file)
        shrink = min(1.0, CANVAS / max(h, w))
        page = decode(file, 1, (max(round(h * shrink), 1), max(round(w * shrink), 1)), "stretch")
        return preprocess(page[0].numpy(), self.size, deslant=self.deslant, name=str(file))

    def sample(self, gen: Generator, writers: int = 12, per_writer: int = 20) -> Data:
        """Digits drawn as polylines, each writer in a style of their own; split by writer or at random as the recipe says."""
        styles = {i: write_style(gen) for i in range(writers)}
        who = torch.arange(writers).repeat_interleave(per_writer)
        classes = tuple(_STROKES)
        y = torch.arange(writers * per_writer) % len(classes)
        plain = torch.stack([glyph(name) for name in classes])
        x = written(plain[y], who, styles, gen, self.size)
        seed = int(torch.randint(2**31, (), generator=gen))
        split = writer_split(who, self.test, self.val, seed, y) if self.split == "writer" else draw(y, val=self.val, test=self.test, seed=seed)
        return as_data(x, y, who, split, classes, "hiec-handwriting sample")

    def build(self, data: Data) -> Setup:
        """The five-block network; about 60,000 images through it, at least 10 and at most 60 epochs."""
        epochs = min(max(round(60_000 / max(len(data.split.train), 1)), 10), 60)
        return Setup({"model": "handwriting-cnn-bn", "batch": 64, "lr": 0.05, "epochs": epochs, "augment": "none"})
