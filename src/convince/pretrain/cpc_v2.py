"""CPC v2: a network learns without labels to predict the codes of patches further down an image from those above, against other patches."""

from __future__ import annotations

import contextlib
import math
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
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Batch, Out, Stage

CARD = Card(
    part="cpc-v2",
    kind="technique",
    paper="cpc-v2",
    title="Data-Efficient Image Recognition with Contrastive Predictive Coding",
    year=2020,
    url="https://arxiv.org/abs/1905.09272",
    departs=(
        "the encoder is the run's network, which goes on to the main training as it is; the paper's is a ResNet-161 of its own",
        "a BatchNorm of the network normalises each patch by itself (LayerNorm with the same weights) in the pretext only; it learns its statistics there",
        "the pretext stage follows the run's optimiser, learning rate and schedule, for 50 epochs; the paper: Adam 4e-4, gradients clipped at 0.01,"
        " averaged weights, batch 512, 200 epochs",
        "patch=None is two strides, stride=None a seventh of the shorter side (28 px: 8 and 4; 224 px: 64 and 32); the paper cuts 80 px every 36 of 260",
        "the context net is half as wide as the code, 8 to 256 channels; the paper 256 for a code of 4096",
        "each direction has a context net, targets and predictions of its own; the paper does not settle what is shared",
        "a patch is warped by a small affine map, without the paper's elastic deformation; a dropped colour is set to the data's mean",
        "with several processes the negatives of an image are those of its own process",
    ),
    strength="epochs",
    off=0,
    tiny={"epochs": 1, "directions": 1},
    expects=("images", "network"),
    idle=("extra.cpc",),
)
TURNS = (0, 2, 1, 3)  # of the grid, so that the predicted rows lie below: down, up, then sideways
MEASURED = 64  # images among whose patches the right one is looked for after each epoch


def patchify(x: Float[Tensor, "n c h w"], size: int, stride: int) -> Float[Tensor, "n g f c p q"]:
    """Overlapping patches of ``size`` px every ``stride`` px, rows by columns (260 px, 80 and 36: 6 x 6)."""
    return x.unfold(2, size, stride).unfold(3, size, stride).permute(0, 2, 3, 1, 4, 5)


def warped_patches(x: Float[Tensor, "n c h w"], size: int, stride: int, strength: float, gen: Generator) -> Float[Tensor, "n g f c p q"]:
    """:func:`patchify` with each patch shifted, turned, sheared and mirrored by itself, its true surroundings coming into view.

    ``strength`` 1 is: up to a quarter of a stride of shift (at least 2 px where that fits), 15 degrees, a shear of 0.15; half are mirrored.
    """
    n, _, h, w = x.shape
    g, f = (h - size) // stride + 1, (w - size) // stride + 1
    m = n * g * f
    u = (2 * torch.rand(m, 4, generator=gen) - 1).to(x)
    mirror = (torch.rand(m, generator=gen) < 0.5 * min(strength, 1)).to(x.device)
    reach = min(max(stride / 4, 2), stride / 2) * strength
    angle, shear = u[:, 0] * strength * math.pi / 12, u[:, 1] * strength * 0.15
    turn = torch.stack([angle.cos(), -angle.sin() + shear, angle.sin(), angle.cos()], 1).view(m, 1, 2, 2)
    at = torch.arange(size, device=x.device, dtype=x.dtype) - (size - 1) / 2
    place = torch.stack(torch.meshgrid(at, at, indexing="xy"), 2).view(1, -1, 2).expand(m, -1, -1)
    place = torch.where(mirror[:, None, None], place * place.new_tensor([-1.0, 1.0]), place)
    rows = torch.arange(g, device=x.device, dtype=x.dtype) * stride + (size - 1) / 2
    columns = torch.arange(f, device=x.device, dtype=x.dtype) * stride + (size - 1) / 2
    centre = torch.stack(torch.meshgrid(columns, rows, indexing="xy"), 2).view(1, g * f, 2).expand(n, -1, -1).reshape(m, 1, 2)
    where = (turn @ place[..., None])[..., 0] + centre + reach * u[:, None, 2:]
    grid = (2 * where + 1) / where.new_tensor([w, h]) - 1
    out = F.grid_sample(x, grid.view(n, g * f * size, size, 2), padding_mode="reflection", align_corners=False)
    return out.view(n, -1, g, f, size, size).permute(0, 2, 3, 1, 4, 5)


def recolour(x: Float[Tensor, "m c p q"], strength: float, fill: Float[Tensor, " c"], gen: Generator) -> Float[Tensor, "m c p q"]:
    """Contrast times 1 -+ 0.4, brightness -+ 0.2 by patch; of three colours half of the patches keep one or two, the others being ``fill``."""
    m, c = x.shape[:2]
    u = (2 * torch.rand(m, 2, generator=gen) - 1).to(x) * strength
    mean = x.mean((1, 2, 3), keepdim=True)
    x = ((x - mean) * (1 + 0.4 * u[:, :1, None, None]) + mean + 0.2 * u[:, 1:, None, None]).clamp(0, 1)
    keep = torch.randint(1, 3, (m, 1), generator=gen)
    rank = torch.rand(m, 3, generator=gen).argsort(1)
    drop = (torch.rand(m, 1, generator=gen) < 0.5 * min(strength, 1)) & (rank >= keep)
    return torch.where(drop.to(x.device)[:, :, None, None], fill.view(1, -1, 1, 1), x) if c == 3 else x


@final
class Block(nn.Module):
    """1x1, ReLU, 1x3 in the row, 2x1 over this row and the one above, ReLU, 1x1; added to its input, ReLU (the paper's appendix)."""

    def __init__(self, d: int, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(d, width, 1)
        self.row = nn.Conv2d(width, width, (1, 3), padding=(0, 1))
        self.above = nn.Conv2d(width, width, (2, 1))
        self.last = nn.Conv2d(width, d, 1)

    def forward(self, x: Float[Tensor, "n d g f"]) -> Float[Tensor, "n d g f"]:
        y = self.row(F.relu(self.first(x)))
        return F.relu(x + self.last(F.relu(self.above(F.pad(y, (0, 0, 1, 0))))))


@final
class Direction(nn.Module):
    """Context net of five blocks, targets, and a prediction for each distance; ``context[i]`` sees rows up to i only."""

    def __init__(self, d: int, width: int, distances: tuple[int, ...], target: int = 64) -> None:
        super().__init__()
        self.distances = distances
        self.context = nn.Sequential(*(Block(d, width) for _ in range(5)))
        self.target = nn.Conv2d(d, target, 1)
        self.predict = nn.ModuleList(nn.Conv2d(d, target, 1) for _ in distances)

    def forward(self, z: Float[Tensor, "n d g f"]) -> list[tuple[Tensor, Tensor]]:
        """For each distance k: scores [m b] of all patches of the batch for each place, and the right one (k rows below)."""
        n, _, g, f = z.shape
        context = self.context(z)
        targets = self.target(z).permute(0, 2, 3, 1).flatten(0, 2)
        every = torch.arange(n * g * f, device=z.device).view(n, g, f)
        found = []
        for k, predict in zip(self.distances, self.predict, strict=True):
            guess = 0.1 * predict(context)[:, :, : g - k]
            found.append((full(guess.permute(0, 2, 3, 1).flatten(0, 2) @ targets.T), every[:, k:].flatten()))
        return found


def info_nce(scores: Float[Tensor, "m b"], right: Int[Tensor, " m"]) -> Float[Tensor, ""]:
    """Cross-entropy of the right patch against all of the batch (eq. 2)."""
    return F.cross_entropy(scores, right)


@contextlib.contextmanager
def by_patch(model: nn.Module) -> Iterator[None]:
    """While inside, every BatchNorm2d normalises each row by itself, with its own weights: batch statistics would tell a patch of the others."""

    def alone(module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> Tensor:
        assert isinstance(module, nn.BatchNorm2d)
        x = full(inputs[0])
        out = F.group_norm(x, 1, module.weight, module.bias, module.eps).to(inputs[0].dtype)
        return getattr(module, "act", nn.Identity())(out)  # timm's norm with an activation inside

    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                stack.callback(module.register_forward_hook(alone, prepend=True).remove)
        yield


@final
@dataclass
class CPCv2(Technique):
    """``epochs`` of predicting patches' codes, on all training images, labelled or not, come before the main training.

    Each context predicts the rows from ``steps_to_ignore + 1`` to ``steps_to_predict`` further on, in ``directions`` of
    (down, up, and the two sideways). ``strength`` of the patches' augmentation; 0 leaves them alone. ``epochs=0`` is off.
    """

    epochs: int = 50
    patch: int | None = None
    stride: int | None = None
    directions: int = 4
    steps_to_ignore: int = 2
    steps_to_predict: int = 3
    width: int | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 0 or not 1 <= self.directions <= 4:
            raise Mistake(f"cpc-v2: epochs={self.epochs}, directions={self.directions}: epochs at least 0 (0 is off), directions 1 to 4")
        if not 0 <= self.steps_to_ignore < self.steps_to_predict:
            raise Mistake(f"cpc-v2: steps_to_ignore={self.steps_to_ignore}: must be 0 or more and below steps_to_predict={self.steps_to_predict}")
        if not 0 <= self.strength <= 2:
            raise Mistake(f"cpc-v2: strength={self.strength}: of the patches' augmentation, 0 (none) to 2; 1 is usual")

    def cutting(self, run: Run) -> tuple[int, int, int, int]:
        """Patch and stride [px], rows and columns of the grid."""
        h, w = list(run.data.preprocess.size)
        stride = self.stride or max(min(h, w) // 7, 1)
        size = self.patch or 2 * stride
        rows, columns = (h - size) // stride + 1, (w - size) // stride + 1
        if size < 2 or stride < 1 or min(rows, columns if self.directions > 1 else rows) <= self.steps_to_predict:
            raise Mistake(
                f"cpc-v2: patch={size}, stride={stride} cut {h}x{w} pixels into {max(rows, 0)}x{max(columns, 0)} patches, too few to look"
                f" steps_to_predict={self.steps_to_predict} rows ahead; choose a smaller patch or stride, or a larger --size"
            )
        return size, stride, rows, columns

    def on_start(self, run: Run) -> None:
        if self.epochs == 0:
            return
        run.require("forward_features", "conv")
        size, *_ = self.cutting(run)
        try:
            with run.aside():
                z = run.forward(run.plan.pixels(torch.zeros(2, run.data.preprocess.channels, size, size))).features
        except (RuntimeError, AssertionError) as error:
            raise Mistake(f"cpc-v2: {run.settings.model!r} cannot take patches of {size}x{size} pixels; use a resnet, or a larger --size") from error
        if z is None or z.dim() != 4:
            raise Mistake(f"cpc-v2: {run.settings.model!r} gives no feature map [n d h w] for a patch; use a convolutional network such as a resnet")
        d = z.shape[1]
        distances = tuple(range(self.steps_to_ignore + 1, self.steps_to_predict + 1))
        run.extra["cpc"] = nn.ModuleList(Direction(d, self.width or min(max(d // 2, 8), 256), distances) for _ in range(self.directions))

    def before(self, run: Run) -> list[Stage]:
        if self.epochs == 0:
            return []
        names = run.body() | {f"extra.cpc.{name}" for name, _ in run.extra["cpc"].named_parameters()}
        return [Stage("cpc-v2", self.epochs, objective=self.contrast, trainable=names.__contains__, guests=False)]

    def on_batch(self, run: Run) -> None:
        if run.stage.name == "cpc-v2":
            size, stride, rows, columns = self.cutting(run)
            gen, batch, g = run.gen("cpc-v2"), run.batch, rows * columns
            x = flip_crop(batch.x, 0.125, 0.5, gen)
            x = (warped_patches(x, size, stride, self.strength, gen) if self.strength else patchify(x, size, stride)).flatten(0, 2)
            if self.strength:
                x = recolour(x, self.strength, run.normalise.mean.flatten().to(x), gen)
            extra = {name: value.repeat_interleave(g, 0) for name, value in batch.extra.items()}
            run.batch = Batch(run.plan.pixels(x), None, batch.index.repeat_interleave(g), None, extra, group=g)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        if run.stage.name != "cpc-v2":
            return grad()
        seen, patches = run.images, run.batch.x
        with by_patch(run.model):
            grad()
        h, w = list(run.data.preprocess.size)
        run.images = seen + round(patches[:, 0].numel() / (h * w) / run.share)  # pixels through the network, as whole images

    def contrast(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """InfoNCE summed over the distances, averaged over the directions."""
        found = self.guesses(run, out)
        run.out = Out(None, out.features)
        return torch.stack([info_nce(scores, right) for scores, right in found]).sum() / self.directions

    def guesses(self, run: Run, out: Out) -> list[tuple[Tensor, Tensor]]:
        """Scores and right patches of all directions and distances, from a pass over whole images' patches."""
        assert out.features is not None
        _, _, rows, columns = self.cutting(run)
        with run.plan.autocast():
            z = out.features.mean((2, 3)).view(-1, rows, columns, out.features.shape[1]).permute(0, 3, 1, 2)
            nets = list(run.extra["cpc"].children())
            return [pair for turns, net in zip(TURNS, nets, strict=False) for pair in net(torch.rot90(z, turns, (2, 3)))]

    def on_epoch(self, run: Run) -> None:
        if run.stage.name == "cpc-v2":
            held = len(run.data.split.val) > 0
            rows = (run.data.split.val if held else run.data.split.train)[:MEASURED]
            accuracy, patches = self.accuracy(run, rows)
            run.report(f"accuracy of predicted patches{'' if held else ' (training images)'}", accuracy, f"share; chance 1/{patches}")

    def accuracy(self, run: Run, rows: Tensor) -> tuple[float, int]:
        """Share of predictions whose right patch scores highest among all of these images', in eval mode; and how many those are."""
        size, stride, *_ = self.cutting(run)
        with run.aside(), by_patch(run.model):
            x = patchify(run.plan.pixels(run.data.x.take(rows)), size, stride).flatten(0, 2)
            found = self.guesses(run, run.forward(x))
        right = [float((scores.argmax(1) == at).double().mean()) for scores, at in found]
        return sum(right) / len(right), len(x)
