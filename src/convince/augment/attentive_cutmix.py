"""Attentive CutMix: paste the cells of a partner image that a trained network looks at, at their own places, and mix the labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Generator, Tensor, nn

from convince import parts
from convince.errors import Mistake
from convince.fit.answer import Normalise
from convince.fit.folder import open_run
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import RunSpec

CARD = Card(
    part="attentive-cutmix",
    kind="technique",
    paper="attentive-cutmix",
    title="Attentive CutMix: An Enhanced Data Augmentation Approach for Deep Learning Based Image Classification",
    year=2020,
    url="https://arxiv.org/abs/2003.13048",
    strength="prob",
    off=0.0,
    tiny={"n_patches": 3, "grid": 4},
    expects=("images", "labels", "logits"),
    departs=(
        "the network that is looked at is trained first on the same images, so that nothing is fetched; the paper's is extractor=timm/resnet50",
        "attention is the mean of the last feature map over its channels, brought to the grid by averages or bilinearly; the paper does not say how",
        "a share of the label is the exact share of pixels, also where the grid does not divide the image",
    ),
)


def attention(features: Float[Tensor, "n d i j"], grid: int) -> Float[Tensor, "n g g"]:
    """The mean over channels, brought to ``grid`` x ``grid`` cells: averaged where the map is finer, else bilinear."""
    mean = features.mean(1, keepdim=True)
    if min(mean.shape[2:]) >= grid:
        return F.adaptive_avg_pool2d(mean, grid)[:, 0]
    return F.interpolate(mean, (grid, grid), mode="bilinear", align_corners=False)[:, 0]


def most_attended(attended: Float[Tensor, "n g g"], n_patches: int) -> Bool[Tensor, "n g g"]:
    """The ``n_patches`` cells of each image with the highest attention; of equal ones those that come first, row by row."""
    order = attended.flatten(1).argsort(dim=1, descending=True, stable=True)
    return torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :n_patches], True).view(attended.shape)


def cell_mask(cells: Bool[Tensor, "n g g"], h: int, w: int) -> Bool[Tensor, "n h w"]:
    """Pixels of the chosen cells: cell (i, j) covers rows ``round(i h / g)`` to ``round((i + 1) h / g) - 1``, columns alike."""
    g = cells.shape[1]
    sides = []
    for side in (h, w):
        edges = torch.tensor([round(i * side / g) for i in range(g + 1)])
        sides.append(torch.repeat_interleave(torch.arange(g), edges.diff()).to(cells.device))
    return cells[:, sides[0]][:, :, sides[1]]


def paste(
    x: Float[Tensor, "n c h w"], y: Float[Tensor, "n k"], cells: Bool[Tensor, "n g g"], partner: Tensor
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n k"]]:
    """``B * source + (1 - B) * target`` with each source's own ``cells`` as B, and labels in the share of pixels (eq. 1, 2).

    The source of image i is image ``partner[i]``, and ``cells[j]`` belongs to image j. Inputs are not changed.
    """
    mask = cell_mask(cells, *x.shape[2:])[partner]
    share = mask.to(y.dtype).mean((1, 2))[:, None]
    return torch.where(mask[:, None], x[partner], x), share * y[partner] + (1 - share) * y


def attentive_cutmix(
    x: Float[Tensor, "n c h w"], y: Float[Tensor, "n k"], extractor: Any, gen: Generator, n_patches: int = 6, grid: int = 7, prob: float = 1.0
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n k"]]:
    """With probability ``prob`` mix the whole batch: partners are a random permutation, their most attended cells are pasted.

    ``extractor(x)`` gives the last feature map [n d i j] of [0, 1] pixels. Rows of ``y`` keep their sum; dtype, device, layout are kept.
    """
    if float(torch.rand((), generator=gen)) >= prob:
        return x, y
    partner = torch.randperm(len(x), generator=gen).to(x.device)
    return paste(x, y, most_attended(attention(extractor(x), grid), n_patches), partner)


@dataclass(frozen=True)
class Extractor:
    """The last feature map of a trained network for [0, 1] pixels, which are brought to its ``size`` first (None: as they are)."""

    network: nn.Module
    normalise: nn.Module
    size: tuple[int, ...] | None = None

    @torch.no_grad()
    def __call__(self, x: Float[Tensor, "n c h w"]) -> Tensor:
        self.network.eval()
        x = x.to(next(self.network.parameters()).dtype)
        if self.size is not None and tuple(x.shape[2:]) != tuple(self.size):
            x = F.interpolate(x, tuple(self.size), mode="bilinear", align_corners=False, antialias=True)
        return self.network.forward_features(self.normalise(x))  # type: ignore[operator]


def pretrained(name: str, channels: int) -> Extractor:
    """A timm network with its published weights, at its own size and normalisation."""
    import timm

    if not timm.is_model(name):
        raise Mistake(f"attentive-cutmix: extractor=timm/{name}: timm {timm.__version__} has no such model; resnet50 is the paper's")
    try:
        network = timm.create_model(name, pretrained=True, in_chans=channels)
    except (OSError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise Mistake(f"attentive-cutmix: extractor=timm/{name}: its weights cannot be had ({reason}); leave extractor out to train one here") from error
    about: dict[str, Any] = dict(network.pretrained_cfg)  # type: ignore[arg-type]
    mean, std = (tuple(about[key]) if channels == 3 else (sum(about[key]) / 3,) * channels for key in ("mean", "std"))
    return Extractor(network, Normalise(mean, std), tuple(about["input_size"][1:]))


@final
@dataclass
class AttentiveCutMix(Technique):
    """Apply :func:`attentive_cutmix` to each training batch with probability ``prob``; 0 is off.

    ``extractor`` None trains the run's own network first, on the same images without mixing, for ``extractor_epochs``
    (None: a quarter of the run's); a --model name trains that one; ``timm/NAME`` takes published weights (the paper's is
    timm/resnet50); a folder is a finished run. ``grid`` cells a side of which ``n_patches`` are pasted: 7 and 6 in the paper,
    at 224 px; for 32 px 8 and 8 divide evenly. Runs after crops and mirrors, before labels are smoothed.
    """

    prob: float = 1.0
    n_patches: int = 6
    grid: int = 7
    extractor: str | None = None
    extractor_epochs: int | None = None
    network: Extractor | None = field(default=None, init=False, repr=False, compare=False)
    rank = 55

    def __post_init__(self) -> None:
        if not 0 <= self.prob <= 1:
            raise Mistake(f"attentive-cutmix: prob={self.prob}: must be a probability from 0 (off) to 1")
        if self.grid < 2:
            raise Mistake(f"attentive-cutmix: grid={self.grid}: must be at least 2 cells a side; 7 is the paper's")
        if not 1 <= self.n_patches < self.grid**2:
            raise Mistake(f"attentive-cutmix: n_patches={self.n_patches}: must be from 1 to {self.grid**2 - 1} of the {self.grid**2} cells; 6 is the paper's")
        if self.extractor_epochs is not None and self.extractor_epochs < 1:
            raise Mistake(f"attentive-cutmix: extractor_epochs={self.extractor_epochs}: must be at least 1, or None for a quarter of the run's")

    # -- the network that is looked at ------------------------------------------------------------

    @property
    def given(self) -> bool:
        """True where the extractor is trained already: published weights, or a finished run."""
        return self.extractor is not None and (self.extractor.startswith("timm/") or Path(self.extractor).is_dir())

    def fit_members(self, run: Run) -> list[RunSpec]:
        """The extractor, unless there is one: plain augmentation stays, all other parts are left out."""
        if self.given or self.prob == 0:
            return []
        plain = tuple(spec for spec in run.settings.parts if parts.get(parts.parse(spec)[0]).card.kind == "augmentation")
        epochs, steps = run.settings.epochs or 0, run.settings.steps
        length: dict[str, Any] = {"epochs": self.extractor_epochs or max(epochs // 4, 1), "steps": None}
        if steps is not None and self.extractor_epochs is None:
            length["steps"] = max(steps // 4, 1)
        return [RunSpec({"parts": plain, "model": self.extractor or run.settings.model, **length})]

    def on_start(self, run: Run) -> None:
        side = min(run.data.preprocess.size)
        if side < self.grid:
            raise Mistake(
                f"attentive-cutmix: grid={self.grid}: an image of {side} pixels has no so many cells; choose grid={max(side // 2, 2)} or a larger --size"
            )
        self.network = None
        if self.given and self.prob > 0:
            self.network = self.take(run)
        elif self.extractor is None:
            self.look(run, Extractor(run.model, run.normalise))  # refuses before a member is trained

    def take(self, run: Run) -> Extractor:
        """The extractor of this run: published weights, a finished run, or the member that was trained for it."""
        channels = run.data.preprocess.channels
        if self.extractor is not None and self.extractor.startswith("timm/"):
            found = pretrained(self.extractor.removeprefix("timm/"), channels)
        elif self.given:
            assert self.extractor is not None
            loaded = open_run(self.extractor)
            if loaded.preprocess.channels != channels:
                raise Mistake(
                    f"attentive-cutmix: extractor={self.extractor}: that run sees {loaded.preprocess.channels} channels, these images have {channels}; "
                    "name a run on images like these"
                )
            found = Extractor(loaded.run.model, loaded.run.normalise, loaded.preprocess.size)
        else:
            (child,) = run.children_of(self)
            found = Extractor(child.model, child.normalise)
        run.plan.place(found.network)
        found.normalise.to(device=run.plan.device)
        self.look(run, found)
        return found

    def look(self, run: Run, extractor: Extractor) -> None:
        """Refuse a network that has no feature map."""
        given = run.data.preprocess
        x = torch.zeros(1, given.channels, *given.size, dtype=run.plan.dtype, device=run.plan.device)
        with run.aside():
            if not hasattr(extractor.network, "forward_features") or extractor(x).dim() != 4:
                who = self.extractor or run.settings.model
                raise Mistake(f"attentive-cutmix: the extractor {who!r} gives no feature map to look at; name a convolutional one, as extractor=resnet8")

    # -- mixing -------------------------------------------------------------------------------------

    def on_batch(self, run: Run) -> None:
        if run.batch.y is None or self.prob == 0:
            return
        if self.network is None:
            self.network = self.take(run)
        run.batch.x, run.batch.y = attentive_cutmix(
            run.batch.x, run.batch.y, Counted(run, self.network), run.gen("attentive-cutmix"), self.n_patches, self.grid, self.prob
        )


@dataclass(frozen=True)
class Counted:
    """An extractor whose passes count in ``run.images``: they are part of what this training costs."""

    run: Run
    extractor: Extractor

    def __call__(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        self.run.images += len(x)
        with self.run.plan.autocast():
            return self.extractor(x).to(x.dtype)
