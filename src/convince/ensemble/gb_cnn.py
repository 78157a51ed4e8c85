"""GB-CNN: boosting in which each learner is the last one with one more dense layer, fitted to what the sum still gets wrong."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.randomness import preserved
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Batch, Out, Stage

CARD = Card(
    part="gb-cnn",
    kind="technique",
    paper="gb-cnn",
    title="A Gradient Boosting Approach for Training Convolutional and Deep Neural Networks",
    year=2023,
    url="https://arxiv.org/abs/2302.11327",
    claims=("optimizer", "objective", "stage", "answer"),
    mutes=("loss", "optimizer", "labels", "logits"),
    expects=("labels",),
    tiny={"rounds": 2, "units": 4},
    departs=(
        "the run's --epochs (or steps) are shared by the rounds; the release allows each round 200 epochs (inner_epochs=200)",
        "the trunk is any network with a linear head: its pooled features take the place of the flat ones; --model gb-trunk is the paper's",
        "two classes are treated as K = 2; the paper has a form with one output for them",
        "batch statistics move by 0.1 with epsilon 1e-5; Keras moves them by 0.01 with 1e-3",
        "where images are augmented, the sum so far is that of the unchanged image",
    ),
)


def residual(y: Float[Tensor, "n k"], scores: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """``r = Y - softmax(F)``: minus the gradient of the cross-entropy by the scores ``F``."""
    return y - scores.softmax(1)


def newton_step(f: Float[Tensor, "n k"], y: Float[Tensor, "n k"], scores: Float[Tensor, "n k"], eta: float) -> float:
    """``rho = eta * sum f (Y - p) / sum f^2 p (1 - p)``, ``p = softmax(F)``, sums over samples and classes.

    One Newton step of the cross-entropy along ``f``, shortened by ``eta``. A net that answers 0 everywhere gets 0.
    """
    p = scores.softmax(1)
    curvature = (f.square() * p * (1 - p)).sum()
    return float(eta * (f * (y - p)).sum() / curvature) if curvature > 0 else 0.0


@final
class GrownHead(nn.Linear):
    """The output layer with dense layers before it: ``before``, ReLU(dense 0), ReLU(dense 1) ..., ``after``, output.

    It stands where the network's linear head stood, so ``weight`` and ``bias`` keep their names.
    """

    def __init__(self, features: int, units: int, k: int, before: nn.Module, after: nn.Module) -> None:
        super().__init__(units, k)
        nn.init.xavier_uniform_(self.weight)  # Keras' law, as for each dense layer
        nn.init.zeros_(self.bias)
        self.before, self.dense, self.after, self.inputs = before, nn.ModuleList(), after, features

    def grow(self) -> None:
        """One more dense layer after the last."""
        units = self.in_features
        layer = nn.Linear(units if len(self.dense) else self.inputs, units)
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
        self.dense.append(layer)

    def forward(self, x: Float[Tensor, "n d"]) -> Float[Tensor, "n k"]:
        x = self.before(x)
        for layer in self.dense:
            x = F.relu(layer(x))
        return super().forward(self.after(x))


def head_of(model: nn.Module) -> tuple[str, nn.Linear]:
    """The name and the module of a network's linear head; a Mistake where it has none."""
    found = getattr(model, "get_classifier", lambda: None)()
    for name, module in model.named_modules():
        if module is found and isinstance(module, nn.Linear) and name:
            return name, module
    raise Mistake(f"gb-cnn and gb-dnn put dense layers before a linear head, and {type(model).__name__} has none; choose another --model, such as gb-trunk")


def replace_head(model: nn.Module, head: GrownHead) -> None:
    """Put ``head`` where the linear head stands."""
    path, _, leaf = head_of(model)[0].rpartition(".")
    setattr(model.get_submodule(path), leaf, head)


@final
class Boosted(nn.Module):
    """``F(x) = sum_t rho_t net_t(x)``, normalisation first; its softmax is the probability."""

    rho: Tensor

    def __init__(self, normalise: nn.Module, nets: list[nn.Module], rho: list[float]) -> None:
        super().__init__()
        self.normalise, self.nets = normalise, nn.ModuleList(nets)
        weight = next(nets[-1].parameters())
        self.register_buffer("rho", torch.tensor(rho, dtype=weight.dtype, device=weight.device))

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        return self.staged(x)[-1]

    def staged(self, x: Tensor) -> Float[Tensor, "t n k"]:
        """The sum after each round."""
        x = self.normalise(x)
        return torch.stack([rho * full(net(x)) for rho, net in zip(self.rho, self.nets, strict=True)]).cumsum(0)


@dataclass
class Ensemble:
    """What boosting has so far. The net under way is the run's own; ``nets`` are copies from the rounds before."""

    nets: list[nn.Module] = field(default_factory=list)
    edits: list[int] = field(default_factory=list)  # how many of the run's edits made each net
    rho: list[float] = field(default_factory=list)  # longer than nets by one when all rounds are done
    scores: Tensor | None = None  # F of each row of the pool [N k]; dropped at the end
    started: int = 0  # rounds
    best: float | None = None  # lowest training error of an epoch of this round
    waited: int = 0  # epochs since then
    error: Tensor | None = None  # [sum of the loss, rows] of this epoch


class Boosting(Technique, abc.ABC):
    """Rounds of fitting ``run.model``, grown at each round's start, to the residuals of the sum so far."""

    rounds: int
    units: int
    eta: float
    patience: int
    inner_epochs: int | None

    def __post_init__(self) -> None:
        for name in ("rounds", "units", "patience"):
            if getattr(self, name) < 1:
                raise Mistake(f"{name}={getattr(self, name)}: must be at least 1")
        if not self.eta > 0:
            raise Mistake(f"eta={self.eta}: must be above 0; the paper tries 0.1 to 1")
        if self.inner_epochs is not None and self.inner_epochs < 1:
            raise Mistake(f"inner_epochs={self.inner_epochs}: must be at least 1, or None to share --epochs among the rounds")
        self.sofar = Ensemble()

    @abc.abstractmethod
    def renew(self, run: Run) -> None:
        """Draw anew the weights that a round does not take over from the round before."""

    # -- slots -------------------------------------------------------------------------------------

    def stage(self, run: Run, i: int) -> Stage | None:
        """Round ``i``: the dense layers of earlier rounds are frozen, all else trains at a constant rate."""
        if i >= self.rounds:
            return None
        head = head_of(run.model)[0]
        frozen = tuple(f"{head}.dense.{j}." for j in range(i))
        epochs = share(run.settings.epochs or 0, i, self.rounds) if self.inner_epochs is None else self.inner_epochs
        steps = None if run.settings.steps is None else share(run.settings.steps, i, self.rounds)
        return Stage(f"round {i + 1}", epochs, trainable=lambda name: not name.startswith(frozen), steps=steps, schedule="constant")

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """Adam, 1e-3 unless ``--lr`` says otherwise."""
        return torch.optim.Adam([p for _, p in params], lr=run.settings.lr or 1e-3)

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """Mean square of ``net(x) - r`` over rows and classes."""
        assert out.logits is not None
        assert batch.y is not None
        assert self.sofar.scores is not None
        scores = self.sofar.scores[batch.index.to(self.sofar.scores.device)]
        losses = (out.logits - residual(batch.y, scores)).square().mean(1)
        return losses.mean() if batch.weight is None else (losses * batch.weight).mean()

    def answer(self, run: Run) -> nn.Module:
        """The sum of all rounds; a round under way counts with the last round's step (the first with 1)."""
        done = self.sofar
        rho = done.rho if len(done.rho) > len(done.nets) else [*done.rho, done.rho[-1] if done.rho else 1.0]
        return Boosted(run.normalise, [*done.nets, run.model], rho)

    # -- hooks -------------------------------------------------------------------------------------

    def on_start(self, run: Run) -> None:
        run.require("forward_features")
        head_of(run.model)
        scores = torch.zeros(len(run.data), run.k, dtype=run.plan.dtype, device=run.plan.device)
        self.sofar = Ensemble(scores=scores)

    def on_stage(self, run: Run) -> None:
        """Close the round before, then grow the network for this one."""
        if run.stage.owner is not self:
            return
        done = self.sofar
        if done.started:
            self._add(run)
            done.nets.append(rebuilt(run, len(run.edits), run.model.state_dict()))
            done.edits.append(len(run.edits))
        run.edit(run.team.seat(self).name, units=self.units)
        if done.started:
            self.renew(run)
        done.started, done.best, done.waited, done.error = done.started + 1, None, 0, None

    def on_step(self, run: Run) -> None:
        if run.stage.owner is self:
            loss, n = run.loss.detach().double(), len(run.batch.index)
            seen = torch.stack([loss * n, torch.full_like(loss, n)])
            self.sofar.error = seen if self.sofar.error is None else self.sofar.error + seen

    def on_epoch(self, run: Run) -> None:
        """End the round when its training error has not fallen for ``patience`` epochs; the last weights are kept."""
        done = self.sofar
        if run.stage.owner is not self or done.error is None:
            return
        total, rows = run.processes.gather(done.error[None]).sum(0).tolist()
        mean, done.error = total / rows, None
        if done.best is None or mean < done.best:
            done.best, done.waited = mean, 0
        else:
            done.waited += 1
        if done.waited >= self.patience:
            run.stop()

    def on_end(self, run: Run) -> None:
        self._add(run)
        self.sofar.scores = None

    def _add(self, run: Run) -> None:
        """Close a round: its step ``rho`` over all training rows, and ``F += rho f``."""
        done = self.sofar
        assert done.scores is not None
        rows = run.data.split.train
        rows = rows[run.data.y[rows] >= 0]
        outputs, mine = [], rows[run.rank :: run.world]
        with run.aside():
            for x in run.data.x.batches(mine.split(256)):
                out = run.forward(run.plan.pixels(x)).logits
                assert out is not None
                outputs.append(out)
            f = run.processes.gather(torch.cat(outputs) if outputs else done.scores[:0])
            at = run.processes.gather(mine)
            y = F.one_hot(run.data.y[at], run.k).to(f)
            at = at.to(f.device)
            done.rho.append(newton_step(f, y, done.scores[at], self.eta))
            done.scores[at] += done.rho[-1] * f
        run.report("rho", done.rho[-1], "")
        run.report("boosted_train_log_loss", float(F.cross_entropy(done.scores[at], y)), "nats")

    # -- state -------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        done = self.sofar
        kept = {name: value for name, value in vars(done).items() if name != "nets"}
        return {**kept, "rho": list(done.rho), "edits": list(done.edits), "nets": [dict(net.state_dict()) for net in done.nets]}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        if not state:
            return
        nets = [rebuilt(run, count, weights) for count, weights in zip(state["edits"], state["nets"], strict=True)]
        self.sofar = Ensemble(**{**state, "nets": nets})
        if self.sofar.scores is not None:
            self.sofar.scores = self.sofar.scores.to(run.plan.device)


def share(whole: int, i: int, parts: int) -> int:
    """The ``i``-th of ``parts`` nearly equal shares of ``whole``; at least 1 unless there is nothing to share."""
    return max((i + 1) * whole // parts - i * whole // parts, min(whole, 1))


def rebuilt(run: Run, count: int, weights: dict[str, Tensor]) -> nn.Module:
    """The network as it was after the first ``count`` edits of the run, with these weights, in eval mode."""
    current, edits, optimizer = run.model, run.edits, run.optimizer
    try:
        with preserved():
            run.model, run.edits, run.optimizer = run.plan.place(run.build()), [], None
            for edit in edits[:count]:
                run.replay(edit)
        net = run.model
    finally:
        run.model, run.edits, run.optimizer = current, edits, optimizer
    net.load_state_dict(weights)
    return net.eval()


@final
@dataclass
class GbCnn(Boosting):
    """Boost ``rounds`` nets: features - BN - dense layers of ``units``, one more each round - output.

    Round t starts from the net of round t - 1 with one new dense layer after the last; earlier dense
    layers are frozen, trunk, batch statistics and output go on training. The answer is ``sum rho_t net_t``.
    ``eta`` is the shrinkage; ``patience`` [epochs] ends a round whose training error stands still;
    ``inner_epochs`` is the most epochs of a round (None: the run's, shared).
    """

    rounds: int = 2
    units: int = 20
    eta: float = 0.1
    patience: int = 3
    inner_epochs: int | None = None

    def renew(self, run: Run) -> None:
        """Nothing: trunk, dense layers and output are all carried on."""

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Add one dense layer of ``units``, the first time with batch normalisation of the features before it."""
        head = head_of(model)[1]
        if not isinstance(head, GrownHead):
            d = head.in_features
            head = GrownHead(d, spec["units"], head.out_features, nn.BatchNorm1d(d), nn.Identity())
            replace_head(model, head)
        head.grow()
