"""Guidance: a network that learns badly by itself is led, layer by layer, to the representations of a frozen guide."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince import parts
from convince.backbones import builder
from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Batch, Out, RunSpec, Stage

CARD = Card(
    part="guidance-untrainable",
    kind="technique",
    paper="guidance-untrainable",
    title="Training the Untrainable: Introducing Inductive Bias via Representational Alignment",
    year=2025,
    url="https://arxiv.org/abs/2410.20035",
    departs=(
        "optimiser, learning rate, batch and epochs are the run's; the paper takes Adam, 1e-3, 64 and 10 epochs of ImageNet",
        "a guide named as a network is trained first on the same data with the run's settings and optimiser (train_guide=0: random weights);"
        " its initial weights have a seed of their own, so that it shares none with the target",
        "made for Adam, as the paper's: the gradient of CKA grows as the signal of a layer dies; beside plain SGD switch on adamw or gradient-clipping",
        "a layer is looked at before its activation, as in the paper, except where the target's activation works in place (torchvision's vgg)",
        "layers whose output does not have one row an image (attention inside windows) are left out",
        "with several processes CKA is that of each process's share of the batch",
    ),
    strength="weight",
    off=0.0,
    tiny={"guide": "small-cnn:widths=(4,)", "train_guide": 0},
    expects=("logits", "network"),
)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, nn.AdaptiveAvgPool2d, nn.LayerNorm, nn.MultiheadAttention, nn.RNNBase)
OWN_SEED = 7919  # added to the run's seed for the guide
MEASURED = 128  # images on which CKA is read after each epoch


def gram(x: Tensor) -> Float[Tensor, "n n"]:
    """``Xc Xc'`` of features [n ...], flattened by row, columns centred."""
    with torch.autocast(x.device.type, enabled=False):
        flat = full(x).flatten(1)
        centred = flat - flat.mean(0)
        return centred @ centred.T


def alignment(k: Float[Tensor, "n n"], m: Float[Tensor, "n n"], eps: float = 1e-6) -> Float[Tensor, ""]:
    """CKA from two Gram matrices: ``<K, M> / (|K| |M|)``; ``eps`` floors the denominator, so that a layer without signal gets no endless gradient."""
    return (k * m).sum() / (k.norm() * m.norm()).clamp_min(eps)


def linear_cka(x: Float[Tensor, "n d"], y: Float[Tensor, "n e"], eps: float = 1e-6) -> Float[Tensor, ""]:
    """``|Xc'Yc|^2 / (|Xc'Xc| |Yc'Yc|)``, 0 to 1 (Frobenius norms, biased), by Gram matrices: cheap where d > n.

    1 for ``y = c x R`` with any c and rotation R. Small batches raise it, so compare at one batch size only.
    """
    return alignment(gram(x), gram(y), eps)


def layer_map(targets: int, guides: int) -> dict[int, int]:
    """``{target layer: guide layer}``, evenly spaced, last to last, as the released code has it.

    Guide layer i of S goes to ``min(round(i (T - 1) / (S - 1)), T - 1)``; where several meet, the last wins.
    """
    if targets < 1 or guides < 1:
        raise Mistake(f"layer_map({targets}, {guides}): target and guide need at least one layer with weights each")
    if guides == 1:
        return {targets - 1: 0}
    return {min(round(i * (targets - 1) / (guides - 1)), targets - 1): i for i in range(guides)}


def guidance_loss(target: list[Tensor], guide: list[Tensor]) -> Float[Tensor, ""]:
    """Sum over pairs of ``1 - CKA``; both lists hold Gram matrices in the same order."""
    return torch.stack([1 - alignment(k, m) for k, m in zip(target, guide, strict=True)]).sum()


def observe(model: nn.Module, call: Callable[[], object], look: Callable[[Tensor], Any], names: set[str] | None = None) -> dict[str, Any]:
    """``look(output)`` of each layer (or of those named) during ``call()``, in order of execution. No hook stays behind."""
    found: dict[str, Any] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            found.pop(name, None)
            found[name] = look(first(output))

        return hook

    chosen = [(name, module) for name, module in model.named_modules() if isinstance(module, LAYERS) and (names is None or name in names)]
    handles = [module.register_forward_hook(watch(name)) for name, module in chosen]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return found


def first(output: Any) -> Tensor:
    """The features among what a layer returns: attention and recurrent layers return more."""
    return output[0] if isinstance(output, (tuple, list)) else output


@final
@dataclass
class GuidanceUntrainable(Technique):
    """Adds ``weight`` times the sum over layer pairs of ``1 - CKA(target, guide)`` to the loss; ``weight=0`` is off.

    ``guide`` is the folder of a finished run or a network as ``--model`` names it (None: a residual network, for tables a
    wide MLP); a network is trained first for ``train_guide`` epochs (None: as long as the run, 0: left at random
    weights, which still carry its inductive bias). ``noise=True`` shows the guide noise in place of the images.
    ``until`` ends the guidance after so many epochs (None: never); ``align`` epochs of alignment alone, without
    labels, come before training. ``align=5, until=0`` is guidance as an initialisation.
    """

    guide: str | None = None
    weight: float = 1.0
    train_guide: int | None = None
    noise: bool = False
    until: int | None = None
    align: int = 0

    def __post_init__(self) -> None:
        if not self.weight >= 0:
            raise Mistake(f"weight={self.weight}: the weight of the alignment must be at least 0 (0 is off, 1 the paper's)")
        for name in ("train_guide", "until", "align"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise Mistake(f"{name}={value}: must be at least 0 epochs")

    def on_start(self, run: Run) -> None:
        self._pairs: list[tuple[str, Callable[[], Tensor], str]] = []  # target layer, its features, guide layer
        self._guide: nn.Module = nn.Identity()
        self._last: dict[str, Tensor] = {}

    def fit_members(self, run: Run) -> list[RunSpec]:
        if self.weight == 0 or self._stored():
            return []
        spec = self._spec(run)
        pre = run.data.preprocess
        try:
            builder(spec.settings["model"], num_classes=run.k, in_chans=pre.channels, size=pre.size)
        except Mistake as error:
            raise Mistake(f"guidance-untrainable: guide={spec.settings['model']}: {error}") from error
        return [spec]

    def before(self, run: Run) -> list[Stage]:
        if self.weight == 0 or self.align == 0:
            return []
        return [Stage("guidance", self.align, objective=self.alignment_alone, guests=False)]

    def on_batch(self, run: Run) -> None:
        if self.weight > 0 and not self._pairs:
            self._meet(run)

    def alignment_alone(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """The objective of the stage before: no labels are read."""
        return self.weight * self._loss(run)

    def on_loss(self, run: Run) -> None:
        if self.weight > 0 and run.stage.name != "guidance" and (self.until is None or run.epoch < self.until):
            run.loss = run.loss + self.weight * self._loss(run)

    def on_epoch(self, run: Run) -> None:
        if self.weight > 0:
            run.report("CKA with the guide", sum(self.curve(run)) / len(self._pairs), "mean over layer pairs, 0 to 1")

    def curve(self, run: Run) -> list[float]:
        """CKA of each layer pair on up to 128 validation (else training) images, first layer first."""
        if not self._pairs:
            self._meet(run)
        rows = (run.data.split.val if len(run.data.split.val) > 1 else run.data.split.train)[:MEASURED]
        x = run.plan.pixels(run.data.x.take(rows))
        with run.aside():
            mine = observe(run.model, lambda: run.forward(x), gram, {name for name, _, _ in self._pairs})
            theirs = self._grams(run, x)
            return [float(alignment(mine[name], theirs[other])) for name, _, other in self._pairs]

    # -- the guide -----------------------------------------------------------------------------------

    def _stored(self) -> bool:
        """True where ``guide`` names a folder, not a network."""
        guide = self.guide or ""
        return (Path(guide) / "structure.json").exists() or (("/" in guide or guide.startswith(".")) and not guide.startswith("timm/") and ":" not in guide)

    def _spec(self, run: Run) -> RunSpec:
        """The run that makes the guide: the same data and recipe, another network and seed."""
        pre = run.data.preprocess
        default = "mlp:hidden=(512,512)" if pre.kind != "image" else "resnet20" if min(pre.size) <= 48 else "resnet18-slim"
        changes: dict[str, Any] = {"model": self.guide or default, "seed": run.seed + OWN_SEED}
        if self.train_guide is not None:
            changes |= {"epochs": self.train_guide, "steps": None}
        if self.train_guide != 0:
            if not bool((run.data.y[run.data.split.train] >= 0).any()):
                raise Mistake("guidance-untrainable: no training sample has a label to train the guide; take train_guide=0 or guide=RUN, a finished run")
            recipe = ("optimizer", "augmentation")
            changes["parts"] = tuple(spec for spec in run.settings.parts if parts.get(parts.parse(spec)[0]).card.kind in recipe)
        return RunSpec(changes)

    def _meet(self, run: Run) -> None:
        """Find the guide, pair its layers with the target's by a pass of two rows, and listen to the target."""
        x = run.batch.x[:2] if len(run.batch.x) > 1 else run.plan.pixels(run.data.x.take(run.data.split.train[:2]))
        if self._stored():
            from convince.fit.folder import open_run

            loaded = open_run(str(self.guide))
            theirs, ours = loaded.preprocess, run.data.preprocess
            if (theirs.kind, theirs.channels, theirs.size) != (ours.kind, ours.channels, ours.size):
                raise Mistake(
                    f"guide={self.guide}: reads {theirs.kind} input of {theirs.channels} channels and size {theirs.size}, and this run"
                    f" {ours.kind}, {ours.channels} and {ours.size}; train the guide on data of the same --size"
                )
            self._guide = loaded.answer
        else:
            wanted = run.settings.updated(**{"parts": (), **self._spec(run).settings})
            self._guide = next(child for child in run.children if child.settings == wanted).answer.eval()
        with run.aside(), run.plan.autocast():
            mine = [name for name, n in observe(run.model, lambda: run.forward(x), len).items() if n == len(x)]
            theirs_too = [name for name, n in observe(self._guide, lambda: self._guide(x), len).items() if n == len(x)]
        if not mine or not theirs_too:
            who = f"the network {run.settings.model!r}" if not mine else "the guide"
            raise Mistake(f"guidance-untrainable: {who} has no convolution, linear or recurrent layer to align; choose another one")
        pairs = layer_map(len(mine), len(theirs_too))
        self._pairs = [(mine[t], run.tap(mine[t]), theirs_too[g]) for t, g in sorted(pairs.items())]

    def _grams(self, run: Run, x: Tensor) -> dict[str, Tensor]:
        """Gram matrices of the frozen guide's paired layers for these pixels."""
        with torch.no_grad(), run.plan.autocast():
            return observe(self._guide, lambda: self._guide(x), gram, {other for _, _, other in self._pairs})

    def _loss(self, run: Run) -> Tensor:
        x = run.batch.x
        if len(x) < 2:
            raise Mistake(f"guidance-untrainable: a batch of {len(x)} rows; CKA compares the rows of a batch, so take --batch 2 or more (64 is the paper's)")
        if self.noise:
            gen = run.gen("guidance-untrainable")
            drawn = torch.randn(x.shape, generator=gen) + 0.1 * torch.randn(x.shape, generator=gen)
            theirs = self._grams(run, drawn.clamp(0, 1).to(x))
        else:
            theirs = self._grams(run, x.detach())
        mine, chosen = [], []
        for name, features, other in self._pairs:
            try:
                found = first(features())
            except KeyError:
                continue  # a layer that this pass left out (drop-path)
            if self._last.get(name) is not found and len(found) == len(x):
                self._last[name] = found
                mine.append(gram(found))
                chosen.append(theirs[other])
        return guidance_loss(mine, chosen) if mine else torch.zeros((), device=x.device)
