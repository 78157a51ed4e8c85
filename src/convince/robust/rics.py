"""RICS: the picture itself says which crop is classified, so a shifted camera gives the same crop and the same answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.kinds import Predictor
from convince.parts import Card

CARD = Card(
    part="rics",
    kind="predictor",
    paper="rics",
    title="Lost in Translation: Modern Neural Networks Still Struggle With Small Realistic Image Transformations",
    year=2024,
    url="https://arxiv.org/abs/2404.07153",
    expects=("images",),
    strength="crop",
    off=1.0,
    tiny={"crop": 6, "patch": 3},
    departs=(
        "the score is ours, since the authors' release holds no code of it: a random filter without mean on the middle of each crop, "
        "in whole numbers, so that equal content scores equally to the bit",
        "ties are broken by a second random filter, and where the content is equal to both filters by the place nearest the middle",
        "without crop= seven eighths of each side are kept, which suits small images; the paper names its crops in pixels",
        "every place is a candidate: no stride and no smaller region",
    ),
)

LEVELS = 255  # pixels are compared as whole numbers, 0 to 255


# -- the score ---------------------------------------------------------------------------------------


def random_filters(patch: int, seed: int) -> Float[Tensor, "2 1 k k"]:
    """Two filters of whole numbers up to about 100, each without mean: the score and the breaker of ties."""
    gen = generator(seed, "rics")
    filters = torch.randint(-99, 100, (2, 1, patch, patch), generator=gen)
    return _without_mean(filters).float()


def contrast_filters(patch: int, seed: int) -> Float[Tensor, "2 1 k k"]:
    """The middle third of the patch against what surrounds it; ties are broken by a random filter."""
    inner = max(patch // 3, 1)
    a = (patch - inner) // 2
    centre = torch.zeros(1, patch, patch, dtype=torch.int64)
    centre[:, a : a + inner, a : a + inner] = 1
    filters = torch.stack([centre * (patch**2 - inner**2) - (1 - centre) * inner**2, random_filters(patch, seed)[1].long()])
    return filters.float()


def _without_mean(filters: Tensor) -> Tensor:
    """Whole numbers that add to 0: what is left over the mean is taken from the first entries, one each."""
    flat = filters.flatten(1)
    flat = flat - torch.div(flat.sum(1, keepdim=True), flat.shape[1], rounding_mode="floor")
    over = flat.sum(1, keepdim=True)  # 0 <= over < entries
    return (flat - (torch.arange(flat.shape[1]) < over).long()).view(filters.shape)


def crop_scores(x: Float[Tensor, "n c h w"], filters: Float[Tensor, "2 1 k k"], crop: tuple[int, int], *, cyclic: bool = False) -> Int[Tensor, "n 2 a b"]:
    """s(u) and its breaker of ties for each place u of a crop's upper left corner: the filters on the middle of the crop.

    Reads pixels inside the crop only, as whole numbers summed over channels, so that equal content has
    equal scores wherever it stands. ``a = h - crop + 1`` places (``cyclic``: all ``h``, the image going round).
    """
    k = filters.shape[-1]
    top, left = (crop[0] - k) // 2, (crop[1] - k) // 2
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        plane = (x.detach().to(filters.dtype) * LEVELS).round().sum(1, keepdim=True)
        if cyclic:
            plane = F.pad(plane.roll((-top, -left), (2, 3)), (0, k - 1, 0, k - 1), mode="circular")
        else:
            plane = plane[:, :, top : plane.shape[2] - (crop[0] - k - top), left : plane.shape[3] - (crop[1] - k - left)]
        return F.conv2d(plane, filters).round().long()


def choose(scores: Int[Tensor, "n 2 a b"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
    """u* = argmax s, as (row, column). Ties: the larger second score, then the place nearest the middle."""
    a, b = scores.shape[2:]
    first, second = scores.flatten(2).unbind(1)
    best = first == first.amax(1, keepdim=True)
    second = second.where(best, torch.iinfo(torch.int64).min)
    best = second == second.amax(1, keepdim=True)
    row, column = torch.arange(a, device=scores.device), torch.arange(b, device=scores.device)
    away = ((2 * row - a + 1).abs()[:, None] * (a + b) * 2 + (2 * column - b + 1).abs()).flatten()
    order = away.argsort(stable=True)  # nearest the middle first
    at = order[best[:, order].to(torch.int8).argmax(1)]
    return torch.div(at, b, rounding_mode="floor"), at % b


def cut(x: Float[Tensor, "n c h w"], row: Int[Tensor, " n"], column: Int[Tensor, " n"], crop: tuple[int, int]) -> Float[Tensor, "n c i j"]:
    """The crop of each image whose upper left corner is (row, column); beyond an edge the image goes round."""
    rows = (row[:, None] + torch.arange(crop[0], device=x.device)) % x.shape[2]
    columns = (column[:, None] + torch.arange(crop[1], device=x.device)) % x.shape[3]
    i, c = torch.arange(x.shape[0], device=x.device), torch.arange(x.shape[1], device=x.device)
    return x[i[:, None, None, None], c[None, :, None, None], rows[:, None, :, None], columns[:, None, None, :]]


# -- what can be promised ----------------------------------------------------------------------------


def theoretical_consistency(n: int, m: int, d: int | tuple[int, int]) -> float:
    """The share of shifts by ``d`` [pixels; one number: sideways] that must leave the crop as it is, 0 to 1.

    n: side of the image, m: side of the crop [pixels]. ``|R and R'| / |R or R'|`` of the two frames' windows
    of k x k places, k = n - m + 1, if the scores are exchangeable. One pixel sideways: 1 - 2 / (k + 1).
    """
    k = _places(n, m)
    down, aside = (0, d) if isinstance(d, int) else d
    shared = max(k - abs(down), 0) * max(k - abs(aside), 0)
    return shared / (2 * k * k - shared)


def worst_of_eight(n: int, m: int) -> float:
    """The same for all eight one-pixel neighbours at once: ``(k - 2)^2 / (k + 2)^2``."""
    k = _places(n, m)
    return max(k - 2, 0) ** 2 / (k + 2) ** 2


def _places(n: int, m: int) -> int:
    if not 1 <= m <= n:
        raise Mistake(f"n={n}, m={m}: the crop's side must be between 1 and the image's")
    return n - m + 1


# -- shifts ------------------------------------------------------------------------------------------


def realistic_shift(big: Float[Tensor, "n c h w"], d: tuple[int, int], side: tuple[int, int]) -> Float[Tensor, "n c i j"]:
    """The frame of ``side`` pixels around the middle of a larger image, moved by ``d`` = (down, right) [pixels].

    What leaves the frame is gone and new content enters, as when a camera turns: nothing goes round, nothing is black.
    """
    top, left = (big.shape[2] - side[0]) // 2 + d[0], (big.shape[3] - side[1]) // 2 + d[1]
    if top < 0 or left < 0 or top + side[0] > big.shape[2] or left + side[1] > big.shape[3]:
        raise Mistake(f"d={d}: a frame of {side[0]}x{side[1]} pixels leaves the image of {big.shape[2]}x{big.shape[3]}; take a smaller frame or shift")
    return big[:, :, top : top + side[0], left : left + side[1]]


def cyclic_shift(x: Float[Tensor, "n c h w"], d: tuple[int, int]) -> Float[Tensor, "n c h w"]:
    """The frame moved by ``d`` = (down, right) [pixels] over an image that goes round."""
    return x.roll((-d[0], -d[1]), (2, 3))


def zero_pad_shift(x: Float[Tensor, "n c h w"], d: tuple[int, int]) -> Float[Tensor, "n c h w"]:
    """The frame moved by ``d`` = (down, right) [pixels] over an image with black around it."""
    h, w = x.shape[2:]
    a, b = abs(d[0]), abs(d[1])
    return F.pad(x, (b, b, a, a))[:, :, a + d[0] : a + d[0] + h, b + d[1] : b + d[1] + w]


def takes(answer: nn.Module, x: Tensor, side: tuple[int, int]) -> bool:
    """Does the answer accept images of this size? Asked with one black image; fully convolutional networks accept many."""
    modes = [(m, m.training) for m in answer.modules()]
    answer.eval()  # in training mode the black image would move running statistics
    try:
        with torch.no_grad():
            answer(x.new_zeros(1, x.shape[1], *side))
    except (RuntimeError, ValueError, AssertionError):
        return False
    finally:
        for module, training in modes:
            module.training = training
    return True


# -- the answer --------------------------------------------------------------------------------------


@final
class CropChosen(nn.Module):
    """The answer beneath, asked about the crop that the content chooses: scores [n k].

    ``crop``: pixels or share of each side. Where the answer refuses the crop's size, the crop is
    enlarged to the image's (bilinear). A crop as large as the image is no crop.
    """

    filters: Tensor
    aligned = False  # feature maps of the network beneath do not lie on the image

    def __init__(self, answer: nn.Module, filters: Float[Tensor, "2 1 k k"], crop: float | int, cyclic: bool = False) -> None:
        super().__init__()
        self.answer, self.crop, self.cyclic = answer, crop, cyclic
        self.differentiable = getattr(answer, "differentiable", True)
        self.training = answer.training  # of this module alone: the modes beneath stay
        at = next(answer.parameters(), filters)
        self.register_buffer("filters", filters.to(at.device), persistent=False)
        self.accepts: dict[tuple[int, int], bool] = {}

    def sides(self, x: Tensor) -> tuple[int, int]:
        """The crop's rows and columns for images of this size."""
        if x.dim() != 4:
            raise Mistake(f"rics chooses a crop of images [n c h w], and the input has shape {tuple(x.shape)}")
        h, w = x.shape[2:]
        side = (round(h * self.crop), round(w * self.crop)) if isinstance(self.crop, float) else (self.crop, self.crop)
        if side == (h, w):
            return side
        if side[0] > h or side[1] > w:
            raise Mistake(f"rics: crop={self.crop} pixels is larger than the image of {h}x{w}; give fewer, or a share such as 0.875")
        if min(side) < self.filters.shape[-1]:
            raise Mistake(f"rics: the crop of {side[0]}x{side[1]} pixels is smaller than the filter of {self.filters.shape[-1]}; give a larger crop or patch=3")
        return side

    def place(self, x: Float[Tensor, "n c h w"]) -> tuple[Int[Tensor, " n"], Int[Tensor, " n"]]:
        """Where the chosen crop's upper left corner is, (row, column)."""
        return choose(crop_scores(x, self.filters, self.sides(x), cyclic=self.cyclic))

    def chosen(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c i j"]:
        """The chosen crops, not enlarged."""
        return cut(x, *self.place(x), self.sides(x))

    def forward(self, x: Float[Tensor, "n ..."]) -> Float[Tensor, "n k"]:
        side, whole = self.sides(x), (x.shape[2], x.shape[3])
        if side == whole:
            return self.answer(x)
        if side not in self.accepts:
            self.accepts[side] = takes(self.answer, x, side)
        crops = self.chosen(x)
        if not self.accepts[side]:
            crops = F.interpolate(crops, size=whole, mode="bilinear", align_corners=False)
        return self.answer(crops)


@final
@dataclass
class Rics(Predictor):
    """Wraps an answer in :class:`CropChosen`.

    ``crop``: side in pixels (a whole number), share of each side (1.0: off), or None: 0.875, as 224 of 256. ``score``: "random", or
    "contrast" (middle against surround); ``patch``: side of its filter [pixels]; ``seed`` draws it. ``cyclic``: crops
    go round the edges, and circular shifts by whole pixels never change the answer.
    """

    crop: float | int | None = None
    score: str = "random"
    patch: int = 5
    seed: int = 0
    cyclic: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.crop, float) and not 0 < self.crop <= 1:
            raise Mistake(f"rics: crop={self.crop} must be a share above 0 and at most 1, or a whole number of pixels")
        if isinstance(self.crop, int) and self.crop < 1:
            raise Mistake(f"rics: crop={self.crop} must be at least 1 pixel, or a share such as 0.875")
        if self.score not in ("random", "contrast"):
            raise Mistake(f"rics: score={self.score!r} must be 'random' or 'contrast'")
        if self.patch < 2:
            raise Mistake(f"rics: patch={self.patch} must be at least 2 pixels; one pixel without mean is always 0")

    def wrap(self, answer: nn.Module) -> nn.Module:
        filters = {"random": random_filters, "contrast": contrast_filters}[self.score](self.patch, self.seed)
        return CropChosen(answer, filters, 0.875 if self.crop is None else self.crop, self.cyclic)
