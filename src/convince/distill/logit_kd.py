"""Logit KD: a network learns the softened scores of a teacher beside the labels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince import parts
from convince.backbones import builder
from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import RunSpec

CARD = Card(
    part="logit-kd",
    kind="technique",
    title="Distilling the Knowledge in a Neural Network",
    year=2015,
    url="https://arxiv.org/abs/1503.02531",
    departs=("a teacher named as a network is trained first on the same data, for train_teacher epochs, under a seed of its own",),
    strength="alpha",
    off=0.0,
    tiny={"teacher": "small-cnn:widths=(4,)", "train_teacher": 0},
    mutes=("gradient",),
    expects=("labels", "logits"),
)
OWN_SEED = 104_729  # added to the run's seed for the teacher


def kd_loss(logits: Float[Tensor, "n k"], teacher: Float[Tensor, "n k"], temperature: float) -> Float[Tensor, ""]:
    """``T^2`` times the mean cross-entropy to the teacher's ``softmax(logits / T)``; the gradient is that of the divergence (section 2)."""
    return F.cross_entropy(logits / temperature, (teacher / temperature).softmax(1)) * temperature**2


# -- the teacher: a finished run, or a network that is trained first ---------------------------------


def is_folder(teacher: str | None) -> bool:
    """True where ``teacher`` names a run's folder, and not a network."""
    teacher = teacher or ""
    return (Path(teacher) / "structure.json").exists() or (("/" in teacher or teacher.startswith(".")) and not teacher.startswith("timm/"))


def teacher_run(run: Run, model: str, epochs: int | None, **changes: Any) -> RunSpec:
    """The run that makes a teacher: the same data, epochs (None: the run's own) and augmentation, another network and seed."""
    chosen: dict[str, Any] = {"model": model, "seed": run.seed + OWN_SEED, **changes}
    if epochs is not None:
        chosen |= {"epochs": epochs, "steps": None}
    kept = tuple(spec for spec in run.settings.parts if parts.get(parts.parse(spec)[0]).card.kind == "augmentation")
    chosen["parts"] = (*chosen.get("parts", ()), *kept)
    if epochs != 0 and not bool((run.data.y[run.data.split.train] >= 0).any()):
        raise Mistake("no training sample has a label to train the teacher; give teacher=RUN, the folder of a finished run")
    return RunSpec(chosen)


def teacher_of(run: Run, spec: RunSpec) -> nn.Module:
    """The answer of the member that ``spec`` asked for, frozen."""
    wanted = run.settings.updated(**{"parts": (), **spec.settings})
    return frozen(next(child for child in run.children if child.settings == wanted).answer)


def stored_teacher(run: Run, folder: str, who: str) -> nn.Module:
    """The answer of a finished run on the same kind of input and classes, frozen."""
    from convince.fit.folder import open_run

    loaded = open_run(folder)
    theirs, ours = loaded.preprocess, run.data.preprocess
    if (theirs.kind, theirs.channels, theirs.size) != (ours.kind, ours.channels, ours.size) or loaded.classes != run.data.classes:
        raise Mistake(
            f"{who}: the teacher {folder} reads {theirs.kind} input of {theirs.channels} channels and size {theirs.size} in {len(loaded.classes)} classes,"
            f" and this run {ours.kind}, {ours.channels}, {ours.size} and {run.k}; train the teacher on the same classes and --size"
        )
    return frozen(loaded.answer).to(run.plan.device)


def frozen(teacher: nn.Module) -> nn.Module:
    """In eval mode, and no parameter asks for a gradient."""
    return teacher.eval().requires_grad_(False)


@final
@dataclass
class LogitKD(Technique):
    """The loss becomes ``(1 - alpha)`` times itself plus ``alpha`` times :func:`kd_loss`; ``alpha=0`` is off.

    ``teacher`` is the folder of a finished run, or a network as ``--model`` names it (None: a residual network, for tables a
    wide MLP), which is trained first for ``train_teacher`` epochs (None: as long as the run, 0: left at random weights).
    """

    teacher: str | None = None
    temperature: float = 4.0
    alpha: float = 0.5
    train_teacher: int | None = None
    _teacher: nn.Module | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise Mistake(f"logit-kd: alpha={self.alpha}: the teacher's share of the loss, from 0 (off) to 1")
        if not self.temperature > 0:
            raise Mistake(f"logit-kd: temperature={self.temperature}: must be above 0; 1 to 10 are usual")
        if self.train_teacher is not None and self.train_teacher < 0:
            raise Mistake(f"logit-kd: train_teacher={self.train_teacher}: must be at least 0 epochs")

    def on_start(self, run: Run) -> None:
        self._teacher = stored_teacher(run, str(self.teacher), "logit-kd") if self.alpha and is_folder(self.teacher) else None

    def fit_members(self, run: Run) -> list[RunSpec]:
        if self.alpha == 0 or is_folder(self.teacher):
            return []
        spec = self._spec(run)
        pre = run.data.preprocess
        try:
            builder(spec.settings["model"], num_classes=run.k, in_chans=pre.channels, size=pre.size)
        except Mistake as error:
            raise Mistake(f"logit-kd: teacher={spec.settings['model']}: {error}") from error
        return [spec]

    def _spec(self, run: Run) -> RunSpec:
        pre = run.data.preprocess
        default = "mlp:hidden=(512,512)" if pre.kind != "image" else "resnet20" if min(pre.size) <= 48 else "resnet18-slim"
        return teacher_run(run, self.teacher or default, self.train_teacher)

    def on_loss(self, run: Run) -> None:
        if self.alpha == 0:
            return
        if self._teacher is None:
            self._teacher = teacher_of(run, self._spec(run))
        with torch.no_grad(), run.plan.autocast():
            scores = self._teacher(run.batch.x)
        logits = run.out.logits
        if logits is not None and logits.shape == scores.shape:
            run.loss = (1 - self.alpha) * run.loss + self.alpha * kd_loss(logits, scores, self.temperature)
