"""Preprocess: all that turns a new file into the network's input, the same for training and for prediction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from jaxtyping import Int
from torch import Tensor

from convince.errors import Mistake, nearest

FITS = ("letterbox", "crop", "stretch")
RUNGS = (32, 48, 64, 96, 128, 160, 192, 224)  # sides that are chosen by themselves [pixels]
CAP = 128  # the largest side that is chosen by itself [pixels]
NATIVE = 64  # images that share one size up to this side keep it [pixels]
BLOCK = 256  # 256 * 255 * 255 < 2**24: sums over a block of squares are exact in float32
LARGEST = 4096  # the largest side a person may ask for [pixels]


@dataclass(frozen=True)
class Preprocess:
    """How a file becomes an input: channels, size, fit, and the mean and deviation of the training part.

    ``kind``: "image" or "table". ``channels``: 1 or 3; for a table its number of features.
    ``size``: (rows, columns); () for a table. ``fit``: "letterbox" (scaled to fit inside, the rest
    is mid-grey, 128 of 255), "crop" (short side scaled, centre cut out) or "stretch".
    ``mean``, ``std``: one number a channel of pixels in [0, 1], or one a feature of raw values;
    measured on the training part only. A deviation is never 0: at least 1/255 for pixels, and 1 for
    a feature that does not vary.
    """

    kind: str
    channels: int
    size: tuple[int, int] | tuple[()]
    fit: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to_json(self) -> str:
        """One JSON object; :meth:`from_json` reads it back to an equal object."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | dict) -> Preprocess:
        """Read what :meth:`to_json` wrote (text, or the object it parses to)."""
        try:
            row = json.loads(text) if isinstance(text, str) else dict(text)
            return cls(
                kind=str(row["kind"]),
                channels=int(row["channels"]),
                size=tuple(int(side) for side in row["size"]),  # type: ignore[arg-type]
                fit=str(row["fit"]),
                mean=tuple(float(value) for value in row["mean"]),
                std=tuple(float(value) for value in row["std"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            why = f"{type(error).__name__}: {error}"
            raise Mistake(f"preprocessing cannot be read ({why}); it was {text!s:.200}") from None


def check_fit(fit: str) -> str:
    """Return ``fit``, or raise a Mistake that names the three known."""
    if fit not in FITS:
        raise Mistake(f"fit={fit!r} is not known{nearest(str(fit), FITS)} Choose one of {', '.join(FITS)}")
    return fit


def check_size(size: int | None) -> int | None:
    """Return ``size`` in pixels, or raise a Mistake where it is no side between 4 and 4096."""
    if size is None:
        return None
    if isinstance(size, bool) or int(size) != size or not 4 <= size <= LARGEST:
        raise Mistake(f"size={size!r} must be a whole number of pixels from 4 to {LARGEST}; 128 is a good start")
    return int(size)


def choose_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Rows and columns for images of these (rows, columns), where the person chose none.

    All of one size up to 64 pixels: that size. Otherwise a square whose side is the rung (32, 48,
    64, 96, 128) next to the median short side, so at most 128.
    """
    if len(set(sizes)) == 1 and max(sizes[0]) <= NATIVE:
        return sizes[0]
    short = sorted(min(rows, columns) for rows, columns in sizes)
    median = short[len(short) // 2]
    side = min((rung for rung in RUNGS if rung <= CAP), key=lambda rung: abs(rung - median))
    return side, side


def pixel_sums(x: Tensor) -> Int[Tensor, "n c 2"]:
    """The sum and the sum of squares of each image's channels, exact, of uint8 [n c h w]."""
    wide = x.flatten(2).to(torch.float32)
    wide = torch.nn.functional.pad(wide, (0, -wide.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    first = wide.sum(-1).to(torch.int64).sum(-1)
    return torch.stack([first, wide.square_().sum(-1).to(torch.int64).sum(-1)], -1)


def with_pixels(pre: Preprocess, sums: Int[Tensor, "n c 2"]) -> Preprocess:
    """``pre`` with the mean and deviation of the images whose :func:`pixel_sums` are given."""
    rows, columns = pre.size  # type: ignore[misc]
    count = max(1, len(sums)) * rows * columns
    total = sums.sum(0).double()
    mean = total[:, 0] / (255.0 * count)
    variance = total[:, 1] / (255.0**2 * count) - mean**2
    std = variance.clamp_min(0).sqrt().clamp_min(1 / 255)
    return replace(pre, mean=tuple(mean.tolist()), std=tuple(std.tolist()))


def with_features(pre: Preprocess, x: Tensor) -> Preprocess:
    """``pre`` with the mean and deviation of the table rows ``x`` [n d]."""
    if len(x) == 0:
        return replace(pre, mean=(0.0,) * pre.channels, std=(1.0,) * pre.channels)
    wide = x.double()
    std = wide.std(0, unbiased=False)
    std = torch.where(std > 1e-12, std, torch.ones_like(std))
    return replace(pre, mean=tuple(wide.mean(0).tolist()), std=tuple(std.tolist()))
