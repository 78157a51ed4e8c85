"""FixedView: every image is brought to a fixed form, such as a normalised width or an equalised histogram, before the network."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="fixed-view",
    kind="technique",
    paper="mcdnn",
    title="Multi-column Deep Neural Networks for Image Classification (the preprocessing of one column)",
    year=2012,
    url="https://arxiv.org/abs/1202.2745",
    departs=(
        "the width is normalised by bilinear interpolation about the middle of the ink's bounding box; the paper does not name its interpolation",
        "ink is what differs from the image's border, so dark digits on light paper do as well as light on dark",
        "contrast is changed on the mean of the channels and the change added to each; the paper works on the lightness of Lab",
        "adapthisteq interpolates between up to 8 x 8 tiles and sets no limit to the contrast",
    ),
    strength="how",
    off="original",
    tiny={"how": "width-3"},
    expects=("images",),
)
FORMS = ("original", "imadjust", "histeq", "adapthisteq", "conorm", "width-PX")
INK = 0.1  # of an image's strongest difference from its border


def width_normalise(x: Float[Tensor, "n c h w"], width: float) -> Float[Tensor, "n c h w"]:
    """Each image's bounding box of ink made ``width`` [pixels] wide, its height kept, and put in the middle (section 3.1).

    The ground is the median of the image's border; ink is what differs from it by more than a tenth of the largest
    difference. An image without ink stays as it is.
    """
    n, _, h, w = x.shape
    border = torch.cat([x[..., 0, :], x[..., -1, :], x[..., 1:-1, 0], x[..., 1:-1, -1]], -1)
    ground = border.median(-1).values[..., None, None]
    ink = (x - ground).abs().amax(1).detach()
    strongest = ink.flatten(1).amax(1)
    mask = (ink > INK * strongest[:, None, None]) & (strongest > 0)[:, None, None]
    boxes = [_span(mask.any(axis)) for axis in (1, 2)]  # along columns, along rows: (middle, length) each [n]
    (across, wide), (down, _) = boxes
    empty = ~mask.any(2).any(1)
    scale = torch.where(empty, 1.0, wide / width).to(x)
    theta = x.new_zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale, 1.0
    theta[:, 0, 2] = torch.where(empty, 0.0, 2 * across / w - 1).to(x)  # affine_grid counts from -1 to 1
    theta[:, 1, 2] = torch.where(empty, 0.0, 2 * down / h - 1).to(x)
    grid = F.affine_grid(theta, [n, 1, h, w], align_corners=False)
    return F.grid_sample(x - ground, grid, padding_mode="zeros", align_corners=False) + ground


def _span(any_ink: Tensor) -> tuple[Tensor, Tensor]:
    """Middle and length [pixels] of the span from the first to the last true of each row [n s]."""
    at = torch.arange(any_ink.shape[1], device=any_ink.device)
    first = torch.where(any_ink, at, any_ink.shape[1]).amin(1)
    last = torch.where(any_ink, at, -1).amax(1)
    return (first + last + 1) / 2, (last + 1 - first).clamp_min(1)


def imadjust(x: Float[Tensor, "n c h w"], share: float = 0.01) -> Float[Tensor, "n c h w"]:
    """Stretch each image's brightness so that ``share`` of its pixels end at 0 and ``share`` at 1."""
    light = x.mean(1, keepdim=True)
    flat = light.flatten(1).sort(1).values
    last = flat.shape[1] - 1
    low, high = (flat[:, round(last * q)].view(-1, 1, 1, 1) for q in (share, 1 - share))
    span = high - low
    stretched = torch.where(span > 0, (light - low) / span.clamp_min(1e-6), light)
    return (x + stretched - light).clamp(0, 1)


def histeq(x: Float[Tensor, "n c h w"], tiles: int = 1, bins: int = 64) -> Float[Tensor, "n c h w"]:
    """Make the histogram of brightness roughly flat: each pixel becomes the share of pixels no brighter than it.

    With ``tiles`` the shares are those of ``tiles x tiles`` parts of the image, interpolated between their middles (adapthisteq).
    """
    n, _, h, w = x.shape
    light = x.mean(1, keepdim=True)
    rows = (torch.arange(h, device=x.device) * tiles // h)[:, None]
    columns = (torch.arange(w, device=x.device) * tiles // w)[None]
    level = (light[:, 0].detach() * bins).long().clamp(0, bins - 1)
    at = (rows * tiles + columns) * bins + level
    counts = x.new_zeros(n, tiles * tiles * bins).scatter_add(1, at.flatten(1), torch.ones_like(light).flatten(1))
    shares = counts.view(n, tiles * tiles, bins).cumsum(2)
    shares = (shares / shares[..., -1:]).view(n, 1, tiles, tiles, bins)
    y = ((2 * torch.arange(h, device=x.device) + 1) / h - 1).to(x).view(1, h, 1).expand(n, h, w)
    z = ((2 * torch.arange(w, device=x.device) + 1) / w - 1).to(x).view(1, 1, w).expand(n, h, w)
    where = torch.stack([2 * light[:, 0] - 1, z, y], -1)[:, None]  # brightness is the volume's last axis
    flat = F.grid_sample(shares, where, padding_mode="border", align_corners=False)[:, 0]
    return (x + flat - light).clamp(0, 1)


def conorm(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """A difference of Gaussians, 5 x 5 pixels, of the brightness: edges are stressed, flat parts become mid-grey."""
    light = x.mean(1, keepdim=True)
    at = torch.arange(-2, 3, device=x.device, dtype=x.dtype)
    bells = [(-at.square() / (2 * sigma**2)).exp() for sigma in (0.5, 2.0)]
    inner, outer = (torch.outer(bell, bell) / bell.sum().square() for bell in bells)
    edges = F.conv2d(F.pad(light, (2, 2, 2, 2), mode="replicate"), (inner - outer)[None, None])
    size = edges.detach().abs().amax((1, 2, 3), keepdim=True).clamp_min(1e-6)
    return (x - light + 0.5 + edges / (2 * size)).clamp(0, 1)


def view(x: Float[Tensor, "n c h w"], how: str) -> Float[Tensor, "n c h w"]:
    """``x`` in one of the forms "original", "imadjust", "histeq", "adapthisteq", "conorm" or "width-PX"; the input is not changed."""
    if how == "original":
        return x
    if how.startswith("width-"):
        return width_normalise(x, float(how.removeprefix("width-")))
    if how == "adapthisteq":
        return histeq(x, tiles=min(8, max(min(x.shape[2:]) // 6, 1)))
    plain: dict[str, Callable[[Tensor], Tensor]] = {"imadjust": imadjust, "histeq": histeq, "conorm": conorm}
    return plain[how](x)


def check_view(how: str, who: str) -> str:
    """Return ``how``, or raise a Mistake that names the forms known."""
    if how in FORMS[:-1] or (re.fullmatch(r"width-\d+(\.\d+)?", how) and float(how[6:]) > 0):
        return how
    raise Mistake(f"{who}: {how!r} is no form{nearest(str(how), FORMS)} Known: {', '.join(FORMS)} (PX: the width of the ink in pixels)")


@final
class Viewed(nn.Module):
    """An answer that sees :func:`view` of its pixels."""

    def __init__(self, how: str, answer: nn.Module) -> None:
        super().__init__()
        self.how, self.answer = how, answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(view(x, self.how))


@final
@dataclass
class FixedView(Technique):
    """Train and answer on :func:`view` ``how`` of each image; it comes before what augments. "original" is off."""

    how: str = "adapthisteq"
    rank = 10

    def __post_init__(self) -> None:
        check_view(self.how, "fixed-view: how")

    def on_batch(self, run: Run) -> None:
        run.batch.x = view(run.batch.x, self.how)

    def wrap(self, answer: nn.Module) -> nn.Module:
        return answer if self.how == "original" else Viewed(self.how, answer)
