"""Discrete key-value bottleneck: a frozen encoder looks up the nearest fixed keys, and only the values stored there are trained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.loop import plain_sgd
from convince.fit.precision import full
from convince.fit.randomness import preserved
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Batch, Out, Stage

CARD = Card(
    part="discrete-key-value-bottleneck",
    kind="technique",
    paper="discrete-key-value-bottleneck",
    title="Discrete Key-Value Bottleneck",
    year=2023,
    url="https://arxiv.org/abs/2207.11240",
    claims=("optimizer", "stage", "answer"),
    mutes=("ema", "netaug"),
    expects=("labels",),
    tiny={"codebooks": 4, "keys": 8, "key_size": 3, "key_epochs": 1},
    departs=(
        "the encoder is the run's network, trained by the first half of the epochs, or taken from a run by encoder=FOLDER; the paper takes pretrained ones",
        "pooled features are looked up; the paper may also look up each place of a feature map",
        "values have the size of the classes and are averaged (the decoder without weights, softmax after); a decoder with weights is left out",
        "the rate of the values (0.3) and the start of the values at 0 are chosen here",
        "one key is fetched from each codebook (k = 1)",
    ),
)

VALUES = "extra.dkvb.values"


@final
class Bottleneck(nn.Module):
    """``codebooks`` times: project (fixed, random), find the nearest of ``keys`` keys, fetch its value [k]; the mean of the values are the scores."""

    projections: Tensor
    keys: Tensor
    counts: Tensor
    sums: Tensor
    ready: Tensor

    def __init__(self, dim: int, k: int, codebooks: int = 256, keys: int = 4096, key_size: int = 12, temperature: float = 1.0) -> None:
        super().__init__()
        self.temperature = temperature
        self.register_buffer("projections", torch.stack([nn.init.xavier_normal_(torch.empty(dim, key_size)) for _ in range(codebooks)]))
        self.register_buffer("keys", torch.zeros(codebooks, keys, key_size))
        self.register_buffer("counts", torch.ones(codebooks, keys))  # moving averages of how many inputs a key wins in a batch,
        self.register_buffer("sums", torch.zeros(codebooks, keys, key_size))  # and of the sum of these inputs
        self.register_buffer("ready", torch.tensor(False))  # values are being trained
        self.values = nn.Parameter(torch.zeros(codebooks, keys, k))

    def project(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "c n e"]:
        """What each codebook sees of the features."""
        return z @ self.projections

    def nearest(self, heads: Float[Tensor, "c n e"]) -> Int[Tensor, "c n"]:
        """The nearest key in each codebook by squared distance; codebooks go one by one to spare memory."""
        rows = []
        for head, keys in zip(heads, self.keys, strict=True):
            rows.append((keys.square().sum(1) - 2 * head @ keys.T).argmin(1))
        return torch.stack(rows)

    def lookup(self, z: Float[Tensor, "n d"]) -> Int[Tensor, "c n"]:
        """The keys that features fetch."""
        return self.nearest(self.project(z))

    def read(self, index: Int[Tensor, "c n"]) -> Float[Tensor, "n k"]:
        """The mean of the fetched values over the codebooks, divided by the temperature."""
        fetched = self.values.gather(1, index[:, :, None].expand(-1, -1, self.values.shape[2]))
        return fetched.mean(0) / self.temperature

    def forward(self, z: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        return self.read(self.lookup(z))

    @torch.no_grad()
    def place_keys(self, z: Float[Tensor, "n d"], gen: Generator) -> None:
        """Start each codebook from randomly chosen inputs."""
        heads = self.project(z)
        for c, head in enumerate(heads):
            self.keys[c] = head[torch.randint(0, len(head), (self.keys.shape[1],), generator=gen).to(head.device)]
        self.sums.copy_(self.keys)
        self.counts.fill_(1)

    @torch.no_grad()
    def move_keys(self, z: Float[Tensor, "n d"], decay: float, threshold: float, gen: Generator) -> Float[Tensor, ""]:
        """One step of moving averages: a key is the mean of the inputs it won; one that wins fewer than ``threshold`` a batch is put on an input.

        Returns the mean squared distance of the inputs to their keys before the step.
        """
        heads = self.project(z)
        index = self.nearest(heads)
        error = torch.zeros((), dtype=z.dtype, device=z.device)
        for c, (head, at) in enumerate(zip(heads, index, strict=True)):
            error += (head - self.keys[c, at]).square().sum(1).mean() / len(heads)
            won = torch.zeros_like(self.counts[c]).index_add_(0, at, torch.ones_like(head[:, 0]))
            total = torch.zeros_like(self.sums[c]).index_add_(0, at, head)
            self.counts[c] = decay * self.counts[c] + (1 - decay) * won
            self.sums[c] = decay * self.sums[c] + (1 - decay) * total
            dead = (self.counts[c] < threshold).nonzero()[:, 0]
            chosen = head[torch.randint(0, len(head), (self.counts.shape[1],), generator=gen).to(head.device)[dead]]
            self.counts[c, dead] = threshold
            self.sums[c, dead] = threshold * chosen
            self.keys[c] = self.sums[c] / self.counts[c][:, None]
        return error


def tasks_in_turn(y: Int[Tensor, " n"], order: list[list[int]], gen: Generator) -> Iterator[Int[Tensor, " m"]]:
    """Class-incremental learning: for each task (a list of classes) its rows in random order; no row comes twice."""
    for classes in order:
        rows = torch.isin(y, torch.tensor(classes, device=y.device)).nonzero()[:, 0]
        yield rows[torch.randperm(len(rows), generator=gen).to(rows.device)]


def learn_values(bottleneck: Bottleneck, index: Int[Tensor, "c n"], y: Int[Tensor, " n"], lr: float) -> Float[Tensor, ""]:
    """One SGD step of the values on fetched keys: each fetched row gets the gradient ``(p - y) / c``, all others exactly 0."""
    loss = F.cross_entropy(bottleneck.read(index), y)
    (grad,) = torch.autograd.grad(loss, bottleneck.values)
    with torch.no_grad():
        bottleneck.values.sub_(lr * grad)
    return loss.detach()


@final
class LookedUp(nn.Module):
    """Scores of the values that the frozen network's features fetch."""

    differentiable = False  # a lookup has no slope

    def __init__(self, normalise: nn.Module, model: nn.Module, bottleneck: Bottleneck) -> None:
        super().__init__()
        self.normalise, self.model, self.bottleneck = normalise, model, bottleneck

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        z = full(self.model.forward_head(self.model.forward_features(self.normalise(x)), pre_logits=True))  # type: ignore[operator]
        with torch.autocast(z.device.type, enabled=False):
            return self.bottleneck(z)


@final
@dataclass
class DiscreteKeyValueBottleneck(Technique):
    """Three stages: the encoder (half of the epochs; none with ``encoder``), the keys, the values (the other half).

    ``encoder`` is the folder of a run with the same --model, whose weights are taken. The keys follow the features
    of the training images for ``key_epochs`` (moving averages with ``decay``) and are then frozen, as the encoder
    is. Values learn by plain SGD at the rate ``lr``. For small sets ``codebooks=64,keys=256,key_size=8`` is quicker.
    """

    encoder: str | None = None
    codebooks: int = 256
    keys: int = 4096
    key_size: int = 12
    key_epochs: int = 3
    decay: float = 0.95
    lr: float = 0.3
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for name in ("codebooks", "keys", "key_size", "key_epochs"):
            if getattr(self, name) < 1:
                raise Mistake(f"{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.decay < 1:
            raise Mistake(f"decay={self.decay}: must be 0 to below 1; 0.9 to 0.99 are usual")
        if not self.lr > 0 or not self.temperature > 0:
            raise Mistake(f"lr={self.lr}, temperature={self.temperature}: both must be above 0")
        self._bottleneck: Bottleneck | None = None

    def on_start(self, run: Run) -> None:
        run.require("forward_features")
        if self.encoder is not None:
            take_encoder(run, self.encoder)
        width = int(getattr(run.model, "head_hidden_size", None) or run.model.num_features)  # type: ignore[arg-type]
        run.extra["dkvb"] = self._bottleneck = Bottleneck(width, run.k, self.codebooks, self.keys, self.key_size, self.temperature)

    def stage(self, run: Run, i: int) -> Stage | None:
        names = ["encoder", "keys", "values"] if self.encoder is None else ["keys", "values"]
        if i >= len(names):
            return None
        epochs, steps = run.settings.epochs or 0, run.settings.steps
        if names[i] == "encoder":
            return Stage("encoder", epochs // 2, trainable=lambda name: not name.startswith("extra.dkvb"), steps=None if steps is None else max(steps // 2, 1))
        if names[i] == "keys":
            return Stage("keys", self.key_epochs, objective=self.still_values, trainable=VALUES.__eq__, guests=False)
        first = 0 if self.encoder is not None else 2
        rest = None if steps is None else steps - (max(steps // 2, 1) if first else 0)
        return Stage(
            "values",
            epochs - (epochs // 2 if first else 0),
            objective=self.value_loss,
            trainable=VALUES.__eq__,
            steps=rest and max(rest, 1),
            lr=self.lr,
            schedule="constant",
        )

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Plain SGD for the values, the run's usual one for the encoder."""
        if [name for name, _ in params] == [VALUES]:
            return torch.optim.SGD([p for _, p in params], lr=self.lr)
        return plain_sgd(run, params)

    def on_stage(self, run: Run) -> None:
        bottleneck: Bottleneck = run.extra["dkvb"]  # type: ignore[assignment]
        if run.stage.owner is self and run.stage.name == "keys":
            rows = run.data.split.train
            chosen = rows[torch.randperm(len(rows), generator=run.gen("dkvb start"))[: max(1024, min(self.keys, len(rows)))]]
            z = []
            with run.aside():
                for x in run.data.x.batches(chosen.split(256)):
                    z.append(self._features(run, run.forward(run.plan.pixels(x))))
            bottleneck.place_keys(torch.cat(z), run.gen("dkvb keys"))
        elif run.stage.owner is self and run.stage.name == "values":
            bottleneck.ready.fill_(True)

    def on_batch(self, run: Run) -> None:
        if run.stage.owner is self and run.stage.name != "encoder":
            run.model.eval()  # frozen, batch statistics too

    def still_values(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """Keys move without gradients: the objective is the mean squared distance to the nearest key, and the values stay."""
        bottleneck: Bottleneck = run.extra["dkvb"]  # type: ignore[assignment]
        z = run.processes.gather(self._features(run, out))
        with torch.autocast(z.device.type, enabled=False):
            error = bottleneck.move_keys(z, self.decay, 0.8 * len(z) / self.keys, run.gen("dkvb keys"))
        return error.detach() + 0 * bottleneck.values.sum()

    def value_loss(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """Cross-entropy of the looked-up scores; ``run.out`` holds these afterwards."""
        bottleneck: Bottleneck = run.extra["dkvb"]  # type: ignore[assignment]
        assert batch.y is not None
        z = self._features(run, out)
        with torch.autocast(z.device.type, enabled=False):
            run.out = Out(bottleneck(z), out.features)
            assert run.out.logits is not None
            losses = F.cross_entropy(run.out.logits, batch.y, reduction="none")
        return losses.mean() if batch.weight is None else (losses * batch.weight).mean()

    def _features(self, run: Run, out: Out) -> Tensor:
        with run.plan.autocast(), torch.no_grad():
            return full(run.model.forward_head(out.features, pre_logits=True))  # type: ignore[operator]

    def answer(self, run: Run) -> nn.Module:
        """The looked-up values; while the encoder and the keys are trained, the network itself."""
        from convince.fit.answer import Answer

        if self._bottleneck is None or not bool(self._bottleneck.ready):
            return Answer(run.normalise, run.model)
        return LookedUp(run.normalise, run.model, self._bottleneck)

    def state(self) -> dict[str, Any]:
        return {} if self._bottleneck is None else {name: value.detach().clone() for name, value in self._bottleneck.state_dict().items()}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        if state and "dkvb" not in run.extra:  # a loaded run, which was never started
            _, dim, size = state["projections"].shape
            c, n, k = state["values"].shape
            with preserved():
                self._bottleneck = Bottleneck(dim, k, c, n, size, self.temperature).to(run.plan.device, run.plan.dtype)
            self._bottleneck.load_state_dict(state)
            run.extra["dkvb"] = self._bottleneck


def take_encoder(run: Run, folder: str) -> None:
    """Give the run's network the weights of a finished run, all but the head where the classes differ."""
    from convince.fit.folder import open_run

    weights, own = open_run(folder).run.model.state_dict(), run.model.state_dict()
    head = {f"{name}." for name, m in run.model.named_modules() if m is getattr(run.model, "get_classifier", lambda: None)()}
    kept = {n: t for n, t in weights.items() if not (n.startswith(tuple(head)) and n in own and own[n].shape != t.shape)}
    wrong = sorted(n for n in own.keys() | kept.keys() if not n.startswith(tuple(head)) and (n not in own or n not in kept or own[n].shape != kept[n].shape))
    if wrong:
        raise Mistake(
            f"encoder={folder!r}: its network does not fit --model {run.settings.model} (at {wrong[0]!r}); use the --model, size and channels of that run"
        )
    run.model.load_state_dict({**own, **kept})
