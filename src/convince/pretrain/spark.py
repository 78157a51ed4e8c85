"""SparK: a convolutional network learns without labels to rebuild hidden cells of an image, hidden for every layer as if empty."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn
from torch.nn.modules.pooling import _AvgPoolNd, _MaxPoolNd

from convince.augment.flip_crop import flip_crop
from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Batch, Out, Stage

CARD = Card(
    part="spark",
    kind="technique",
    paper="spark",
    title="Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked Modeling",
    year=2023,
    url="https://arxiv.org/abs/2301.03580",
    departs=(
        "the pretext stage follows the run's optimiser, learning rate and schedule, for 50 epochs; the paper: LAMB, batch 4096, 1600 epochs",
        "images are shifted by up to an eighth of the side and mirrored; the paper cuts random resized crops and mirrors",
        "a hidden cell is the total stride of the network in pixels (patch=None), or the next larger fit so that no side has more than eight;"
        " the paper has 32 px of 224",
        "the decoder is as wide as the last map, at most 768; the paper always 768",
        "fine-tuning is the run's main stage, without the paper's decay of the learning rate by layer",
    ),
    strength="epochs",
    off=0,
    tiny={"epochs": 1},
    expects=("images", "network"),
    idle=("extra.spark",),
)
MEASURED = 256  # images on which the error is read after each epoch


class Map(NamedTuple):
    """The last map of one resolution: the module that gives it, the image's side over its side, its channels."""

    module: str
    stride: int
    channels: int


def maps_of(run: Run, who: str = "spark") -> list[Map]:
    """The last map of each resolution, largest first, found by a pass on zeros. A Mistake where sides do not divide.

    Only modules at the top, or inside nothing but ``nn.Sequential``, are looked at: what a block does inside is its own affair.
    """
    run.require("forward_features", "conv")
    size = tuple(run.data.preprocess.size)
    found: dict[tuple[int, int], tuple[str, int]] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.dim() == 4:
                found[(output.shape[2], output.shape[3])] = (name, output.shape[1])

        return hook

    with run.aside(), contextlib.ExitStack() as stack:
        for name, module in open_modules(run.model):
            stack.callback(module.register_forward_hook(look(name)).remove)
        x = torch.zeros(1, run.data.preprocess.channels, *size)
        run.model.forward_features(run.normalise(run.plan.pixels(x)))  # type: ignore[operator]
    maps = []
    for (h, w), (name, channels) in found.items():
        stride = round(size[0] / h)
        if (h * stride, w * stride) != size:
            side = max(math.ceil(s / 32) * 32 for s in size)
            raise Mistake(
                f"{who}: the map of {name!r} in {run.settings.model!r} has {h}x{w} places for {size[0]}x{size[1]} pixels: a mask of cells needs sides"
                f" that divide; use --size {side}, or a --model with fewer halvings"
            )
        maps.append(Map(name, stride, channels))
    if len(maps) < 2:
        raise Mistake(f"{who}: the network {run.settings.model!r} has maps of {len(maps)} resolutions; this pretext needs two or more: use a resnet")
    return maps


def open_modules(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Children, and theirs where a child is an ``nn.Sequential``."""
    for name, child in model.named_children():
        yield prefix + name, child
        if isinstance(child, nn.Sequential):
            yield from open_modules(child, f"{prefix}{name}.")


# -- masks -----------------------------------------------------------------------------------------


def draw_mask(n: int, cells: tuple[int, int], ratio: float, gen: Generator) -> Bool[Tensor, "n 1 f g"]:
    """True where a cell is seen: ``round(f g (1 - ratio))`` cells of each image, those with the smallest random numbers."""
    total = cells[0] * cells[1]
    keep = min(max(round(total * (1 - ratio)), 1), total - 1)
    rank = torch.rand(n, total, generator=gen).argsort(1).argsort(1)
    return (rank < keep).view(n, 1, *cells)


def at_size(mask: Bool[Tensor, "n 1 f g"], h: int, w: int) -> Bool[Tensor, "n 1 h w"] | None:
    """The mask repeated to ``h`` x ``w`` places; None where cells and places do not fit (a pooled vector)."""
    f, g = mask.shape[2:]
    return mask.repeat_interleave(h // f, 2).repeat_interleave(w // g, 3) if h % f == 0 and w % g == 0 else None


def seen_only(norm: nn.Module, x: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n 1 h w"]) -> Float[Tensor, "n c h w"]:
    """``norm`` with the statistics of seen places alone; zeros elsewhere."""
    return scatter(norm(gather(x, mask)), mask)


def gather(x: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n 1 h w"]) -> Float[Tensor, "m c 1 1"]:
    """The channels of the seen places."""
    return x.permute(0, 2, 3, 1)[mask[:, 0]][:, :, None, None]


def scatter(rows: Float[Tensor, "m c 1 1"], mask: Bool[Tensor, "n 1 h w"]) -> Float[Tensor, "n c h w"]:
    """The inverse of :func:`gather`, zeros at hidden places."""
    n, _, h, w = mask.shape
    whole = rows.new_zeros(n, h, w, rows.shape[1])
    whole[mask[:, 0]] = rows[:, :, 0, 0]
    return whole.permute(0, 3, 1, 2)


@contextlib.contextmanager
def sparse(model: nn.Module, mask: Bool[Tensor, "n 1 f g"]) -> Iterator[None]:
    """While inside, hidden places are empty: 0 after every convolution and pooling, and unknown to every BatchNorm (fig. 3).

    Emulates submanifold sparse convolution by hooks, which are gone afterwards, also after an exception.
    LayerNorm and linear layers on [n h w c] maps are masked as well. A mask of all ones changes nothing.
    """

    def only_seen(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        here = at_size(mask, *inputs[0].shape[2:])
        if here is None:
            return None
        places.append(here)
        return (gather(inputs[0], here), *inputs[1:])

    def put_back(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return scatter(output, places.pop()) if places else None

    def hide(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        here = at_size(mask, *output.shape[2:]) if output.dim() == 4 else None
        return None if here is None else output * here

    def hide_last(_module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        here = at_size(mask, *output.shape[1:3]) if output.dim() == 4 else None
        return None if here is None else output * here.permute(0, 2, 3, 1)

    places: list[Tensor] = []  # of the norm that runs now
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                stack.callback(module.register_forward_pre_hook(only_seen).remove)
                stack.callback(module.register_forward_hook(put_back, prepend=True).remove)
            elif isinstance(module, (nn.Conv2d, _MaxPoolNd, _AvgPoolNd)):
                stack.callback(module.register_forward_hook(hide, prepend=True).remove)
            elif isinstance(module, (nn.LayerNorm, nn.Linear)):
                stack.callback(module.register_forward_hook(hide if type(module).__name__.endswith("2d") else hide_last, prepend=True).remove)
        yield


# -- decoder and loss ------------------------------------------------------------------------------


@final
class Densify(nn.Module):
    """Norm of the seen places, a learned embedding in the hidden ones, then a projection to the decoder's width (section 3.2)."""

    def __init__(self, channels: int, width: int, kernel: int, token: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.token = nn.Parameter(nn.init.trunc_normal_(torch.zeros(1, channels, 1, 1), std=0.02)) if token else None
        same = kernel == 1 and channels == width
        self.project: nn.Module = nn.Identity() if same else nn.Conv2d(channels, width, kernel, padding=kernel // 2)

    def forward(self, x: Float[Tensor, "n c h w"], mask: Bool[Tensor, "n 1 h w"], sparse: bool = True) -> Float[Tensor, "n d h w"]:
        x = seen_only(self.norm, x, mask) if sparse else self.norm(x)
        token = x.new_zeros(1, x.shape[1], 1, 1) if self.token is None else self.token.to(x.dtype)
        return self.project(torch.where(mask, x, token))


@final
class LightDecoder(nn.Module):
    """log2(stride) blocks that double the side and halve the width, a densified map added before each that has one; then pixels."""

    def __init__(self, maps: list[Map], width: int, pixels: int, token: bool = True) -> None:
        super().__init__()
        count = round(math.log2(maps[-1].stride))
        widths = [max(width // 2**i, 1) for i in range(count + 1)]
        self.strides = [2 ** (count - i) for i in range(count)]
        given = {m.stride: m.channels for m in maps}
        self.densify = nn.ModuleDict(
            {str(s): Densify(given[s], d, 1 if s == maps[-1].stride else 3, token) for s, d in zip(self.strides, widths, strict=False) if s in given}
        )
        self.blocks = nn.ModuleList(up(a, b) for a, b in itertools.pairwise(widths))
        self.pixels = nn.Conv2d(widths[-1], pixels, 1)

    def forward(self, maps: dict[int, Tensor], mask: Bool[Tensor, "n 1 f g"], sparse: bool = True) -> Float[Tensor, "n c h w"]:
        x: Any = 0
        for stride, block in zip(self.strides, self.blocks, strict=True):
            if str(stride) in self.densify:
                s = maps[stride]
                x = x + self.densify[str(stride)](s, at_size(mask, *s.shape[2:]), sparse)
            x = block(x)
        return self.pixels(x)


def up(a: int, b: int) -> nn.Module:
    """Transposed 4x4 convolution of stride 2, conv3x3 - BN - ReLU6, conv3x3 - BN."""
    first, second = nn.Conv2d(a, a, 3, padding=1, bias=False), nn.Conv2d(a, b, 3, padding=1, bias=False)
    return nn.Sequential(nn.ConvTranspose2d(a, a, 4, 2, 1), first, nn.BatchNorm2d(a), nn.ReLU6(), second, nn.BatchNorm2d(b))


def patches(x: Float[Tensor, "n c h w"], p: int) -> Float[Tensor, "n l e"]:
    """The pixels of each ``p`` x ``p`` cell, cells row by row."""
    return F.unfold(x, p, stride=p).transpose(1, 2)


def patch_error(made: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"], p: int) -> Float[Tensor, "n l"]:
    """Mean squared error of each cell against its pixels less their mean, over their deviation (variance unbiased, plus 1e-6)."""
    target = patches(x, p)
    variance, mean = torch.var_mean(target, dim=2, keepdim=True)
    return (patches(made, p) - (target - mean) / (variance + 1e-6).sqrt()).square().mean(2)


def masked_mean(error: Float[Tensor, "n l"], mask: Bool[Tensor, "n 1 f g"], over: str = "hidden") -> Float[Tensor, ""]:
    """The mean over hidden cells, or over all."""
    return error.mean() if over == "all" else error[~mask.flatten(1)].mean()


@final
@dataclass
class SparK(Technique):
    """``epochs`` of rebuilding hidden cells, on all training images, labelled or not, come before the main training.

    ``ratio`` of the cells of ``patch`` pixels is hidden. ``scales`` maps, the smallest first, feed the decoder of ``width``.
    ``sparse=False``, ``scales=1``, ``token=False`` and ``over="all"`` are the paper's ablations (table 6). ``epochs=0`` is off.
    """

    epochs: int = 50
    ratio: float = 0.6
    patch: int | None = None
    width: int | None = None
    scales: int = 4
    sparse: bool = True
    token: bool = True
    over: str = "hidden"
    _maps: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)  # of the pass that runs now

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.scales < 1:
            raise Mistake(f"spark: epochs={self.epochs}, scales={self.scales}: epochs must be at least 0 (0 is off), scales at least 1")
        if not 0 < self.ratio < 1:
            raise Mistake(f"spark: ratio={self.ratio}: the share of hidden cells lies between 0 and 1; 0.6 is usual")
        if self.over not in ("hidden", "all"):
            raise Mistake(f"spark: over={self.over!r}: the loss is the mean over 'hidden' or 'all' cells")

    def on_start(self, run: Run) -> None:
        if self.epochs == 0:
            return
        found = maps_of(run)
        total = found[-1].stride
        if any(m.stride & (m.stride - 1) for m in found):
            raise Mistake(f"spark: {run.settings.model!r} has maps at strides {[m.stride for m in found]}; the decoder needs powers of two: use a resnet")
        channels = run.data.preprocess.channels
        width = self.width or min(found[-1].channels, 768)
        decoder = LightDecoder([m for m in found if m.stride > 1][-self.scales :], width, channels, self.token)
        decoder.patch = cell_of(tuple(run.data.preprocess.size), total, self.patch)  # type: ignore[assignment]
        decoder.modules_at = {m.stride: m.module for m in found if str(m.stride) in decoder.densify}  # type: ignore[assignment]
        run.extra["spark"] = decoder
        if self.sparse:
            self._check(run)

    def before(self, run: Run) -> list[Stage]:
        if self.epochs == 0:
            return []
        names = run.body() | {f"extra.spark.{name}" for name, _ in run.extra["spark"].named_parameters()}
        return [Stage("spark", self.epochs, objective=self.rebuild_loss, trainable=names.__contains__, guests=False)]

    def on_batch(self, run: Run) -> None:
        if run.stage.name == "spark":
            gen = run.gen("spark")
            run.batch.x = flip_crop(run.batch.x, 0.125, 0.5, gen)
            run.batch.extra["spark"] = self.draw(run, len(run.batch.x), gen)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        if run.stage.name != "spark":
            return grad()
        with self.hidden(run, run.batch.extra["spark"]):
            grad()

    def rebuild_loss(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """Mean error of the hidden cells; the cells are those of the normalised image."""
        run.out = Out(None, out.features)
        return masked_mean(self.error(run, batch.x, batch.extra["spark"]), batch.extra["spark"], self.over)

    def on_epoch(self, run: Run) -> None:
        if run.stage.name == "spark":
            held = len(run.data.split.val) > 0
            rows = (run.data.split.val if held else run.data.split.train)[:MEASURED]
            run.report(f"error of hidden cells{'' if held else ' (training images)'}", self.hidden_error(run, rows), "share of their variance")

    # -- one pass ----------------------------------------------------------------------------------

    def draw(self, run: Run, n: int, gen: Generator) -> Bool[Tensor, "n 1 f g"]:
        """A mask for each of ``n`` images."""
        p = int(run.extra["spark"].patch)  # type: ignore[arg-type]
        rows, columns = [side // p for side in run.data.preprocess.size]
        return draw_mask(n, (rows, columns), self.ratio, gen).to(run.plan.device)

    @contextlib.contextmanager
    def hidden(self, run: Run, mask: Bool[Tensor, "n 1 f g"]) -> Iterator[None]:
        """Inside, ``run.forward`` sees no hidden cell, and :meth:`error` finds the maps of that pass."""

        def hide(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            return output * at_size(mask, *output.shape[2:])  # type: ignore[operator]

        def keep(stride: int) -> Callable[..., None]:
            return lambda _module, _inputs, output: self._maps.update({stride: output})

        modules = dict(run.model.named_modules())
        with contextlib.ExitStack() as stack:
            stack.callback(self._maps.clear)
            stack.callback(run.normalise.register_forward_hook(hide).remove)
            if self.sparse:
                stack.enter_context(sparse(run.model, mask))
            for stride, name in run.extra["spark"].modules_at.items():  # type: ignore[union-attr,operator]
                stack.callback(modules[name].register_forward_hook(keep(stride)).remove)
            yield

    def error(self, run: Run, x: Tensor, mask: Bool[Tensor, "n 1 f g"]) -> Float[Tensor, "n l"]:
        """The error of each cell in the pass that ``run.forward(x)`` just made inside :meth:`hidden`."""
        decoder = run.extra["spark"]
        with run.plan.autocast():
            made = full(decoder(self._maps, mask, self.sparse))
        return patch_error(made, (x - run.normalise.mean) / run.normalise.std, int(decoder.patch))  # type: ignore[arg-type]

    def hidden_error(self, run: Run, rows: Tensor) -> float:
        """Mean error of hidden cells of these images, in eval mode, the same masks each time (1: no better than the cell's mean)."""
        gen, total = generator(run.seed, "spark measured"), 0.0
        with run.aside():
            for some in run.data.x.batches(rows.split(64)):
                x = run.plan.pixels(some)
                mask = self.draw(run, len(x), gen)
                with self.hidden(run, mask):
                    run.forward(x)
                    total += float(masked_mean(self.error(run, x, mask), mask)) * len(x)
        return total / max(len(rows), 1)

    def _check(self, run: Run) -> None:
        """Refuse a network in which hidden places do not stay empty (attention, biases outside layers) or count (norms over space)."""
        norms = [n for n, m in run.model.named_modules() if isinstance(m, (nn.GroupNorm, nn.InstanceNorm2d))]
        gen = generator("spark check")
        x = torch.rand(2, run.data.preprocess.channels, *run.data.preprocess.size, generator=gen)
        mask = self.draw(run, 2, gen)
        with run.aside(), self.hidden(run, mask):
            run.forward(run.plan.pixels(x))
            full_of = [s for s, m in self._maps.items() if bool(m.masked_select(~at_size(mask, *m.shape[2:])).any())]  # type: ignore[operator]
        if full_of or norms:
            where = f"at strides {full_of}: a layer there mixes places or adds to them" if full_of else f"to {norms[0]!r}, a norm over places"
            raise Mistake(
                f"spark: hidden places do not stay empty in {run.settings.model!r} {where}; use a network of convolutions,"
                " pooling and BatchNorm such as a resnet, or spark:sparse=false"
            )


def cell_of(size: tuple[int, ...], total: int, patch: int | None) -> int:
    """Side of a cell [px]: ``patch``, or the smallest multiple of the total stride that divides the image into at most eight a side."""
    fits = [p for p in range(total, min(size) // 2 + 1, total) if all(side % p == 0 for side in size)]
    if patch is not None and patch not in fits:
        raise Mistake(f"spark: patch={patch}: a cell must be a multiple of the network's total stride {total} that divides {size}: {fits or 'none does'}")
    if not fits:
        raise Mistake(f"spark: {'x'.join(map(str, size))} pixels have no two cells of {total} a side; use a larger --size or a --model with fewer halvings")
    return patch or next((p for p in fits if max(size) <= 8 * p), fits[-1])
