"""Selfie: a network learns without labels to tell which of an image's hidden patches belongs into a given hole."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.augment.flip_crop import flip_crop
from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.pretrain.spark import maps_of
from convince.types import Out, Stage

CARD = Card(
    part="selfie",
    kind="technique",
    paper="selfie",
    title="Selfie: Self-supervised Pretraining for Image Embedding",
    year=2019,
    url="https://arxiv.org/abs/1906.02940",
    departs=(
        "the pretext stage follows the run's optimiser, learning rate and schedule, for 50 epochs; the paper: momentum SGD with cosine",
        "patch=None cuts 7x7 patches where the sides are at least 96 px and divide by 7 (224 px: 32 px, as the paper), else 4x4 (32 px: 8 px, as the paper)",
        "the patch network is all stages but the last, whatever the network (the paper: three of ResNet-50's four)",
        "the position embedding is added to the seen patches before pooling as well; the paper's text does not settle this",
        "a quarter of the patches is hidden; distractors are the other hidden patches of the same image, never those of other images",
        "the pooling has four heads (one where the width does not divide by four) and no dropout",
    ),
    strength="epochs",
    off=0,
    tiny={"epochs": 1, "layers": 1},
    expects=("images", "network"),
    idle=("extra.selfie",),
)
MEASURED = 512  # images on which the pretext's accuracy is read after each epoch


def cut(x: Float[Tensor, "n c h w"], p: int) -> Float[Tensor, "m c p p"]:
    """The ``p`` x ``p`` patches of each image, row by row, those of an image next to each other (m = n h w / p^2)."""
    n, c, h, w = x.shape
    return x.view(n, c, h // p, p, w // p, p).permute(0, 2, 4, 1, 3, 5).reshape(-1, c, p, p)


def selfie_scores(u: Float[Tensor, "n d"], position: Float[Tensor, "n m d"], codes: Float[Tensor, "n m d"]) -> Float[Tensor, "n m m"]:
    """``<u + pos_i, h_j>`` for each hole i and each hidden patch j of the same image (section 2.1)."""
    return (u[:, None] + position) @ codes.transpose(1, 2)


def selfie_loss(scores: Float[Tensor, "n m m"]) -> Float[Tensor, ""]:
    """Cross-entropy over the hidden patches, the right one for hole i being patch i; mean over all holes."""
    right = torch.arange(scores.shape[1], device=scores.device).expand(scores.shape[:2])
    return F.cross_entropy(scores.flatten(0, 1), right.flatten())


@final
class AttentionPool(nn.Module):
    """A learned query beside the codes of seen patches, ``layers`` of self-attention; the query's output sums the image up (section 2.2)."""

    def __init__(self, d: int, layers: int = 3, heads: int = 4) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, d) * 0.02)
        block = nn.TransformerEncoderLayer(d, heads, 4 * d, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)

    def forward(self, codes: Float[Tensor, "n v d"]) -> Float[Tensor, "n d"]:
        return self.encoder(torch.cat([self.query.to(codes.dtype).expand(len(codes), 1, -1), codes], 1))[:, 0]


@final
class Head(nn.Module):
    """What trains beside the patch network and does not ship: projection, pooling, positions as a row's plus a column's embedding."""

    def __init__(self, channels: int, d: int, grid: tuple[int, int], layers: int, heads: int) -> None:
        super().__init__()
        self.project: nn.Module = nn.Identity() if channels == d else nn.Linear(channels, d)
        self.pool = AttentionPool(d, layers, heads)
        self.rows = nn.Parameter(torch.randn(grid[0], 1, d) * 0.02)
        self.columns = nn.Parameter(torch.randn(1, grid[1], d) * 0.02)

    def positions(self) -> Float[Tensor, "g d"]:
        """The embedding of each place, row by row."""
        return (self.rows + self.columns).flatten(0, 1)

    def forward(self, pooled: Float[Tensor, "n g e"], order: Int[Tensor, "n g"], masked: int) -> Float[Tensor, "n m m"]:
        """Scores of the first ``masked`` patches of ``order`` for each other's holes, the rest being seen."""
        codes = self.project(pooled)
        codes = codes.gather(1, order[:, :, None].expand(-1, -1, codes.shape[2]))
        place = self.positions()[order]
        u = self.pool(codes[:, masked:] + place[:, masked:])
        return selfie_scores(u, place[:, :masked], codes[:, :masked])


@final
@dataclass
class Selfie(Technique):
    """``epochs`` of putting hidden patches back, on all training images, labelled or not, come before the main training.

    ``masked`` is the share of hidden patches of ``patch`` pixels, ``d`` the width of a patch's code (None: that of the
    patch network). The last stage of the network and the head stay as they were drawn. ``epochs=0`` is off.
    """

    epochs: int = 50
    patch: int | None = None
    masked: float = 0.25
    d: int | None = None
    layers: int = 3
    heads: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.layers < 1:
            raise Mistake(f"selfie: epochs={self.epochs}, layers={self.layers}: epochs must be at least 0 (0 is off), layers at least 1")
        if not 0 < self.masked < 1:
            raise Mistake(f"selfie: masked={self.masked}: the share of hidden patches lies between 0 and 1; 0.25 is usual")

    def on_start(self, run: Run) -> None:
        if self.epochs == 0:
            return
        front = maps_of(run, "selfie")[-2]
        size = run.data.preprocess.size
        p = patch_of(tuple(size), self.patch)
        rows, columns = [side // p for side in size]
        d = self.d or front.channels
        heads = self.heads or (4 if d % 4 == 0 else 1)
        if d % heads:
            raise Mistake(f"selfie: d={d} features cannot be shared by heads={heads}; choose heads that divide d")
        head = Head(front.channels, d, (rows, columns), self.layers, heads)
        head.front, head.patch = front.module, p  # type: ignore[assignment]
        run.extra["selfie"] = head

    def before(self, run: Run) -> list[Stage]:
        if self.epochs == 0:
            return []
        ran: list[nn.Module] = []
        p = int(run.extra["selfie"].patch)  # type: ignore[arg-type]
        with run.aside(), contextlib.ExitStack() as stack:
            for module in run.model.modules():
                stack.callback(module.register_forward_pre_hook(lambda m, _: ran.append(m)).remove)
            front_of(run, torch.zeros(1, run.data.preprocess.channels, p, p))
        used = {id(p) for module in ran for p in module.parameters(recurse=False)}
        names = {name for name, p in run.model.named_parameters() if id(p) in used}
        names |= {f"extra.selfie.{name}" for name, _ in run.extra["selfie"].named_parameters()}
        return [Stage("selfie", self.epochs, trainable=names.__contains__, guests=False)]

    def on_batch(self, run: Run) -> None:
        if run.stage.name == "selfie":
            gen = run.gen("selfie")
            run.batch.x = flip_crop(run.batch.x, 0.125, 0.5, gen)
            run.batch.extra["selfie"] = self.draw(run, len(run.batch.x), gen)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        """In the pretext the network ends early and sees patches, so the loop's own pass is not called."""
        if run.stage.name != "selfie":
            return grad()
        run.images += round(len(run.batch.x) / run.share)  # all patches of an image are as many pixels as the image
        scores = self.scores(run, run.batch.x, run.batch.extra["selfie"])
        run.out, run.loss = Out(scores.flatten(0, 1)), selfie_loss(scores)
        run.loss.backward()

    def on_epoch(self, run: Run) -> None:
        if run.stage.name == "selfie":
            held = len(run.data.split.val) > 0
            rows = (run.data.split.val if held else run.data.split.train)[:MEASURED]
            name = "accuracy of hidden patches" if held else "accuracy of hidden patches (training images)"
            run.report(name, self.accuracy(run, rows), f"share of holes; chance 1/{self.holes(run)}")

    # -- one pass ----------------------------------------------------------------------------------

    def holes(self, run: Run) -> int:
        """How many patches of an image are hidden; at least two, and one is seen."""
        places = len(run.extra["selfie"].positions())  # type: ignore[operator]
        return min(max(round(self.masked * places), 2), places - 1)

    def draw(self, run: Run, n: int, gen: Generator) -> Int[Tensor, "n g"]:
        """For each of ``n`` images the places in random order; the first :meth:`holes` are hidden."""
        places = len(run.extra["selfie"].positions())  # type: ignore[operator]
        return torch.rand(n, places, generator=gen).argsort(1).to(run.plan.device)

    def scores(self, run: Run, x: Float[Tensor, "n c h w"], order: Int[Tensor, "n g"]) -> Float[Tensor, "n m m"]:
        """Scores of hidden patches for holes, from the first stages of the network."""
        head = run.extra["selfie"]
        with run.plan.autocast():
            pooled = front_of(run, cut(x, int(head.patch))).mean((2, 3))  # type: ignore[arg-type]
            return full(head(pooled.view(len(x), -1, pooled.shape[1]), order, self.holes(run)))

    def accuracy(self, run: Run, rows: Tensor) -> float:
        """Share of holes that get the right patch, in eval mode, the same holes each time."""
        gen, right = generator(run.seed, "selfie measured"), 0
        with run.aside():
            for some in run.data.x.batches(rows.split(64)):
                scores = self.scores(run, run.plan.pixels(some), self.draw(run, len(some), gen))
                right += int((scores.argmax(2) == torch.arange(scores.shape[1], device=scores.device)).sum())
        return right / max(len(rows) * self.holes(run), 1)


class _Reached(Exception):
    """Carries the map out of a pass that ends early."""

    def __init__(self, map: Tensor) -> None:
        self.map = map


@contextlib.contextmanager
def ending_at(module: nn.Module) -> Iterator[None]:
    """Inside, a pass ends by :class:`_Reached` when ``module`` has run; what comes after it neither runs nor moves."""

    def stop(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        raise _Reached(output)

    handle = module.register_forward_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def front_of(run: Run, x: Tensor) -> Float[Tensor, "n e i j"]:
    """The map of the network's last stage but one, for [0, 1] pixels of any size."""
    module = dict(run.model.named_modules())[str(run.extra["selfie"].front)]
    with ending_at(module):
        try:
            run.model.forward_features(run.normalise(run.plan.pixels(x)))  # type: ignore[operator]
        except _Reached as reached:
            return reached.map
    raise Mistake(f"selfie: the network {run.settings.model!r} does not run {run.extra['selfie'].front!r} on patches; use another --model")


def patch_of(size: tuple[int, ...], patch: int | None) -> int:
    """Side of a patch [px]: ``patch``, or 7x7 of them in large images, 4x4 in small ones, else the nearest count that divides."""
    counts = [7, 4, 5, 6, 8, 3] if min(size) >= 96 else [4, 5, 6, 7, 8, 3]
    fits = [min(size) // g for g in counts if min(size) % g == 0 and all(side % (min(size) // g) == 0 for side in size)]
    sides = "x".join(map(str, size))
    if patch is not None and (patch < 1 or any(side % patch for side in size) or size[0] * size[-1] // patch**2 < 3):
        raise Mistake(f"selfie: patch={patch}: patches must divide {sides} pixels into three or more; {fits or 'none'} would")
    if patch is None and not fits:
        raise Mistake(f"selfie: {sides} pixels do not divide into 3 to 8 patches a side; use --size {max(-(-min(size) // 4) * 4, 8)}, or choose patch")
    return patch or fits[0]
