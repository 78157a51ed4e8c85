"""Diffusion features: a U-Net learns without labels to tell noise from image; a linear layer classifies by its inner features."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.answer import Answer
from convince.fit.loop import plain_sgd
from convince.fit.precision import full
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.pretrain.diffusion_unet import SCHEDULES, STEPS, DiffusionUNet, fitting, kept_signal, q_sample
from convince.pretrain.selfie import AttentionPool
from convince.types import Out, Stage

CARD = Card(
    part="diffusion-features",
    kind="technique",
    paper="diffusion-features",
    title="Diffusion Models Beat GANs on Image Classification",
    year=2023,
    url="https://arxiv.org/abs/2307.08702",
    departs=(
        "the U-Net is small and trained here, on the run's own images; the paper takes one that was trained on ImageNet at 256 px",
        "it answers in place of --model, whose network rests",
        "the U-Net learns by AdamW with the rate lr=1e-3 for 50 epochs; the head follows the run's rate and schedule with SGD",
        "images above side=64 px are averaged down to it, and sides are cut to a multiple of the U-Net's total stride",
        "pixels are normalised by mean and deviation of a channel; the paper has them between -1 and 1",
        "the U-Net tells the noise alone, not its variance, and each of its norms has at most eight groups, not 32",
        "an answer has the same noise for all images, so that it repeats (draws=3: the mean of three); in sweep each image has its own, as in the paper",
        "t=90 is the paper's; its block 24 of 37 is the fifth of 18 on the way out, here out.1 of out.0 to out.5",
        "features are normalised by their mean and deviation over the batch before the linear head",
        "the attention head is as wide as the block and has no position embedding; the paper's has width 1,024",
    ),
    claims=("optimizer", "stage", "answer"),
    mutes=("layer", "network"),
    tiny={"epochs": 1, "width": 4, "mult": (1, 2), "block": "out.0"},
    expects=("images",),
)
MEASURED = 256  # images on which the error is read after each epoch


def denoising_loss(told: Float[Tensor, "n c h w"], noise: Float[Tensor, "n c h w"]) -> Float[Tensor, ""]:
    """``|eps - eps_theta(x_t, t)|^2``, the mean over all pixels (eq. 3); 1 for a network that tells nothing."""
    return (told - noise).square().mean()


def diffusion_features(
    unet: DiffusionUNet,
    x: Float[Tensor, "n c h w"],
    noise: Float[Tensor, "m c h w"],
    t: int = 90,
    block: str = "out.1",
    schedule: str = "linear",
) -> Float[Tensor, "n d i j"]:
    """What ``block`` makes of normalised images under noise of level ``t``, the mean over the ``m`` draws of noise (section 3.1)."""
    kept = kept_signal(schedule)[t].expand(len(x)).to(x.device)
    level = torch.full((len(x),), t, device=x.device)
    found = [unet.features(q_sample(x, draw.expand_as(x), kept), level, block) for draw in noise]
    return torch.stack(found).mean(0)


def pooled(map: Float[Tensor, "n d i j"], side: int = 2) -> Float[Tensor, "n e"]:
    """Averages of ``side`` x ``side`` equal regions, one row an image; ``side=0`` keeps every place."""
    return (F.adaptive_avg_pool2d(map, side) if side else map).flatten(1)


def sweep(
    unet: DiffusionUNet,
    sets: Sequence[Tensor],
    gen: Generator,
    levels: Sequence[int],
    blocks: Sequence[str],
    judge: Callable[..., Any],
    side: int = 2,
    schedule: str = "linear",
) -> dict[tuple[int, str], Any]:
    """``judge(*features)``, the features of each of ``sets`` [n c h w], for each noise level and block (fig. 3).

    Each image has its own noise, the same at all levels; one pass a level.
    """
    for block in blocks:
        unet.check(block)
    noises = [torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x) for x in sets]
    table: dict[tuple[int, str], Any] = {}
    with torch.no_grad():
        for t in levels:
            found: dict[str, list[Tensor]] = {block: [] for block in blocks}
            for x, noise in zip(sets, noises, strict=True):
                rows: dict[str, list[Tensor]] = {block: [] for block in blocks}
                for some, eps in zip(x.split(256), noise.split(256), strict=True):
                    kept, level = kept_signal(schedule)[t].expand(len(some)).to(x.device), torch.full((len(some),), t, device=x.device)
                    for name, map in unet.walk(q_sample(some, eps, kept), level):
                        if name in rows:
                            rows[name].append(full(pooled(map, side)))
                for name, parts in rows.items():
                    found[name].append(torch.cat(parts))
            table |= {(t, block): judge(*features) for block, features in found.items()}
    return table


@final
class FeatureNet(nn.Module):
    """The U-Net up to a block at one noise level, and a head on its features. Takes normalised images of any size."""

    draws: Tensor

    def __init__(self, channels: int, size: Sequence[int], k: int, unet: dict[str, Any], features: dict[str, Any]) -> None:
        super().__init__()
        self.unet = DiffusionUNet(channels, **unet)
        self.t, self.block, self.schedule, self.pool = features["t"], features["block"], features["schedule"], features["pool"]
        self.size = fitting(size, 2 ** (self.unet.levels - 1), features["side"])
        self.register_buffer("draws", torch.randn(features["draws"], channels, *self.size))
        self.unet.check(self.block)
        d, halved = self.unet.shapes[self.block]
        self.attends = features["head"] == "attention"
        heads = 4 if d % 4 == 0 else 1
        self.num_features = d if self.attends else d * (self.pool**2 or (self.size[0] >> halved) * (self.size[1] >> halved))
        self.attention: nn.Module = AttentionPool(d, 2, heads) if self.attends else nn.Identity()
        self.norm = nn.BatchNorm1d(self.num_features, affine=False)
        self.fc = nn.Linear(self.num_features, k)

    def shrink(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c i j"]:
        """To the size that the U-Net works at."""
        return x if tuple(x.shape[2:]) == self.size else F.adaptive_avg_pool2d(x, self.size)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The block's map."""
        return diffusion_features(self.unet, self.shrink(x), self.draws, self.t, self.block, self.schedule)

    def forward_head(self, x: Float[Tensor, "n d i j"], pre_logits: bool = False) -> Tensor:
        """Pooled features [n d], or the scores [n k]."""
        x = self.attention(x.flatten(2).transpose(1, 2)) if self.attends else pooled(x, self.pool)
        return x if pre_logits else self.fc(self.norm(x))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.fc

    def used(self, name: str) -> bool:
        """Whether this parameter takes part in an answer."""
        names = self.unet.names
        late = [n.replace("out.", "unet.outs.").replace("in.", "unet.ins.") + "." for n in names[names.index(self.block) + 1 :]]
        return not name.startswith(tuple(n.replace("mid.", "unet.mid.") for n in (*late, "unet.noise.")))


@final
@dataclass
class DiffusionFeatures(Technique):
    """``epochs`` of telling noise (AdamW at ``lr``) on all training images, labelled or not; then a head learns on what ``block`` gives at noise level ``t``.

    ``width``, ``mult`` and ``depth`` size the U-Net, whose averaged weights (``ema``) answer. The map is averaged to ``pool`` x ``pool``
    places (0: all) for ``head="linear"``; "attention" reads every place. ``finetune=True`` trains the U-Net with the
    head. ``epochs=0`` gives the features of a random U-Net.
    """

    epochs: int = 50
    t: int = 90
    block: str = "out.1"
    pool: int = 2
    head: str = "linear"
    finetune: bool = False
    draws: int = 1
    width: int = 32
    mult: tuple[int, ...] = (1, 2, 2)
    depth: int = 1
    side: int = 64
    schedule: str = "linear"
    ema: float = 0.999
    lr: float = 1e-3
    rank = 0  # the U-Net stands in --model's place for whatever else wraps a step

    def __post_init__(self) -> None:
        if self.epochs < 0 or self.pool < 0 or self.draws < 1:
            raise Mistake(f"diffusion-features: epochs={self.epochs}, pool={self.pool}, draws={self.draws}: must be at least 0, 0 and 1")
        if not 0 <= self.t < STEPS:
            raise Mistake(f"diffusion-features: t={self.t}: noise levels are 0 to {STEPS - 1}; 90 is usual")
        if self.head not in ("linear", "attention"):
            raise Mistake(f"diffusion-features: head={self.head!r}: must be 'linear' or 'attention'")
        if self.width < 2 or self.width % 2 or self.depth < 1 or not self.mult or min(self.mult) < 1:
            raise Mistake(f"diffusion-features: width={self.width}, mult={self.mult}, depth={self.depth}: an even width, at least one level, all above 0")
        if self.schedule not in SCHEDULES:
            raise Mistake(f"diffusion-features: schedule={self.schedule!r}: the noise grows as one of {', '.join(SCHEDULES)}")
        if not 0 <= self.ema < 1 or self.side < 4 or not self.lr > 0:
            raise Mistake(f"diffusion-features: ema={self.ema} (0 to below 1), side={self.side} px (at least 4), lr={self.lr} (above 0): out of range")

    def on_start(self, run: Run) -> None:
        unet = {"width": self.width, "mult": list(self.mult), "depth": self.depth}
        features = {"t": self.t, "block": self.block, "pool": self.pool, "head": self.head, "draws": self.draws}
        features |= {"side": self.side, "schedule": self.schedule}
        shape = {"channels": run.data.preprocess.channels, "size": list(run.data.preprocess.size), "k": run.k}
        run.edit("diffusion-features", **shape, unet=unet, features=features)
        if self.epochs:
            net: Any = run.model.diffusion
            run.extra["diffusion"] = copy.deepcopy(net.unet)  # what learns; the network holds its average

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Add ``diffusion``, a :class:`FeatureNet`."""
        model.diffusion = FeatureNet(**spec)

    def before(self, run: Run) -> list[Stage]:
        return [Stage("diffusion", self.epochs, trainable=lambda name: name.startswith("extra.diffusion."), guests=False)] if self.epochs else []

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """AdamW for the noise (SGD at usual rates diverges), the run's SGD for the rest."""
        if run.stage.name == "diffusion":
            return torch.optim.AdamW([p for _, p in params], lr=self.lr, weight_decay=0.0)
        return plain_sgd(run, params)

    def stage(self, run: Run, i: int) -> Stage | None:
        """One stage: the head, and with ``finetune`` the blocks it stands on."""
        net: Any = run.model.diffusion
        first = "diffusion." if self.finetune else ("diffusion.fc.", "diffusion.attention.")
        trainable = lambda name: name.startswith(first) and net.used(name.removeprefix("diffusion."))  # noqa: E731
        return Stage("train", run.settings.epochs or 0, trainable=trainable, steps=run.settings.steps) if i == 0 else None

    def on_batch(self, run: Run) -> None:
        if run.stage.name == "diffusion":
            n, gen = len(run.batch.x), run.gen("diffusion")
            x = run.model.diffusion.shrink(run.batch.x)  # type: ignore[union-attr, operator]
            run.batch.extra["noise level"] = torch.randint(0, STEPS, (n,), generator=gen).to(x.device)
            run.batch.extra["noise"] = torch.randn(x.shape, generator=gen, dtype=torch.float64).to(x)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        """In the pretext the U-Net's pass stands in place of the loop's; afterwards the loop's pass is that of U-Net and head."""
        if run.stage.name != "diffusion":
            whole = run.model
            run.model = whole.diffusion  # type: ignore[assignment]
            try:
                return grad()
            finally:
                run.model = whole
        batch = run.batch
        run.images += round(len(batch.x) / run.share)
        run.loss = self.error(run, run.extra["diffusion"], batch.x, batch.extra["noise level"], batch.extra["noise"])
        run.out = Out(None)
        run.loss.backward()

    def error(self, run: Run, unet: nn.Module, x: Tensor, t: Int[Tensor, " n"], noise: Tensor) -> Tensor:
        """:func:`denoising_loss` of [0, 1] pixels."""
        kept = kept_signal(self.schedule).to(t.device)[t]
        with run.plan.autocast():
            x = run.model.diffusion.shrink(run.normalise(x))  # type: ignore[union-attr, operator]
            return denoising_loss(full(unet(q_sample(x, noise, kept), t)), noise)

    def on_step(self, run: Run) -> None:
        """The network's U-Net follows the one that learns; sooner in the first steps, else it would stay near its random start."""
        if run.stage.name == "diffusion":
            decay = min(self.ema, (1 + run.stage_steps) / (10 + run.stage_steps))
            with torch.no_grad():
                for mean, p in zip(run.model.diffusion.unet.parameters(), run.extra["diffusion"].parameters(), strict=True):  # type: ignore[union-attr]
                    mean.lerp_(p, 1 - decay)

    def on_epoch(self, run: Run) -> None:
        if run.stage.name == "diffusion":
            held = len(run.data.split.val) > 0
            rows = (run.data.split.val if held else run.data.split.train)[:MEASURED]
            name = "denoising error" if held else "denoising error (training images)"
            run.report(name, self.measured(run, rows), "share of the noise's variance")

    def measured(self, run: Run, rows: Int[Tensor, " m"]) -> float:
        """Mean :func:`denoising_loss` of the averaged U-Net, the same noise each time."""
        gen, total, net = generator(run.seed, "denoising error"), 0.0, run.model.diffusion
        with run.aside():
            for some in run.data.x.batches(rows.split(64)):
                x = run.plan.pixels(some)
                shape = net.shrink(x).shape  # type: ignore[operator, union-attr]
                t, noise = torch.randint(0, STEPS, (len(x),), generator=gen), torch.randn(shape, generator=gen, dtype=torch.float64)
                total += float(self.error(run, net.unet, x, t.to(x.device), noise.to(x))) * len(x)  # type: ignore[union-attr, arg-type]
        return total / max(len(rows), 1)

    def answer(self, run: Run) -> nn.Module:
        net: Any = getattr(run.model, "diffusion", run.model)  # inside a step it stands in the network's place
        return Answer(run.normalise, net)
