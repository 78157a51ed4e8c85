"""MaDL: a classifier from the labels of many unreliable annotators, learning how good and how alike these annotators are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.fit.randomness import preserved
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import Batch, Out, Stage

CARD = Card(
    part="madl",
    kind="technique",
    paper="madl",
    title="Multi-annotator Deep Learning: A Probabilistic Framework for Classification",
    year=2023,
    url="https://arxiv.org/abs/2304.02539",
    claims=("objective", "stage"),
    mutes=("labels", "netaug"),
    expects=("annotators",),
    tiny={"embed": 4},
    departs=(
        "the run's optimiser takes the place of AdamW; --with adamw is the paper's (rate 0.01, 0.005 or 0.001)",
        "annotators are told apart by their number; the paper may also take features of the annotators",
        "the interaction layer is a bilinear form of both embeddings; it is on by default as in the release",
        "weights and prior take part in the loss of each batch; annotators without a label in the batch keep their weight",
    ),
)

Confusion = str  # "full", "diagonal" or "isotropic"
FLOOR = 1e-3  # of gamma


# -- the likelihood --------------------------------------------------------------------------------


def diagonal_bias(k: int, eta: float, confusion: Confusion) -> float:
    """The output bias that makes an annotator right with probability ``eta``: ``ln(eta (k - 1) / (1 - eta))``, or ``ln(eta / (1 - eta))``."""
    return math.log(eta * (k - 1) / (1 - eta)) if confusion == "full" else math.log(eta / (1 - eta))


def log_confusion(scores: Float[Tensor, "*n o"], k: int, confusion: Confusion) -> Float[Tensor, "*n k k"]:
    """``ln P_j(column | row, x)``, row = true class, from ``o`` = k * k, k or 1 outputs.

    Diagonal and isotropic: the other classes have the score ``-ln(k - 1)`` each, so the true one has the
    probability ``sigmoid(score)``.
    """
    if confusion == "full":
        return scores.unflatten(-1, (k, k)).log_softmax(-1)
    right = scores.expand(*scores.shape[:-1], k)
    eye = torch.eye(k, dtype=torch.bool, device=scores.device)
    return torch.where(eye, F.logsigmoid(right)[..., None], (F.logsigmoid(-right) - math.log(max(k - 1, 1)))[..., None])


def log_annotation(log_p: Float[Tensor, "n k"], log_p_j: Float[Tensor, "n k k"]) -> Float[Tensor, "n k"]:
    """``ln P(z_j = column | x) = ln sum_c p(c | x) P_j(column | c, x)``."""
    return (log_p[:, :, None] + log_p_j).logsumexp(1)


def annotator_weights(embeddings: Float[Tensor, "m d"], gamma: Tensor) -> Float[Tensor, " m"]:
    """``w_j = m (1 / density_j) / sum_l (1 / density_l)``, ``density_j = sum_l exp(-gamma |a_j - a_l|^2)``: crowds that copy each other count less."""
    square = (embeddings[:, None] - embeddings[None]).square().sum(-1)
    rare = 1 / (-gamma * square).exp().sum(1)
    return len(embeddings) * rare / rare.sum()


def log_gamma_prior(gamma: Tensor, alpha: float, beta: float) -> Tensor:
    """The logarithm of the Gamma density with shape ``alpha`` and rate ``beta``; its mode is ``(alpha - 1) / beta``."""
    return alpha * math.log(beta) - math.lgamma(alpha) + (alpha - 1) * gamma.log() - beta * gamma


@final
class AnnotatorModel(nn.Module):
    """How annotator ``j`` answers about an instance: embeddings of both, their interaction, and scores of a confusion matrix.

    ``m`` annotators, ``d`` features of an instance (None: its answers do not depend on the instance).
    """

    def __init__(self, m: int, d: int | None, k: int, confusion: Confusion, eta: float, embed: int, interact: bool, start: float) -> None:
        super().__init__()
        self.m, self.k, self.confusion = m, k, confusion
        self.annotator = nn.Linear(m, embed)
        self.instance = None if d is None else nn.Linear(d, embed)
        self.interaction = nn.Bilinear(embed, embed, embed) if d is not None and interact else None
        width = embed * (1 + (self.instance is not None) + (self.interaction is not None))
        self.hidden = nn.Sequential(nn.Linear(width, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, embed), nn.BatchNorm1d(embed))
        self.output = nn.Linear(embed, {"full": k * k, "diagonal": k, "isotropic": 1}[confusion])
        bias = diagonal_bias(k, eta, confusion)
        with torch.no_grad():
            self.output.bias.copy_((torch.eye(k) * bias).flatten() if confusion == "full" else torch.full_like(self.output.bias, bias))
        self.gamma = nn.Parameter(torch.tensor(float(start)))

    def embeddings(self) -> Float[Tensor, "m e"]:
        """Of the annotators."""
        return self.annotator(torch.eye(self.m, dtype=self.annotator.weight.dtype, device=self.annotator.weight.device))

    def forward(self, features: Float[Tensor, "n d"], pairs: Bool[Tensor, "n m"]) -> Float[Tensor, "p k k"]:
        """Log confusion matrices of the marked pairs (row by row). Batch statistics are those of all n * m pairs; no gradient reaches the features."""
        n = len(features)
        a = self.embeddings()[None].expand(n, -1, -1).flatten(0, 1)
        parts = [a]
        if self.instance is not None:
            x = self.instance(features.detach())[:, None].expand(-1, self.m, -1).flatten(0, 1)
            parts.append(x)
            if self.interaction is not None:
                form = torch.einsum("oed,me->mod", self.interaction.weight, self.embeddings())  # each annotator's part first: far fewer products
                parts.append((torch.einsum("mod,nd->nmo", form, self.instance(features.detach())) + self.interaction.bias).flatten(0, 1))
        h = F.relu(self.hidden(torch.cat(parts, 1)) + a)
        return log_confusion(self.output(h[pairs.flatten()]), self.k, self.confusion)

    def weights(self) -> Float[Tensor, " m"]:
        """Of the annotators; gradients reach gamma alone."""
        return annotator_weights(self.embeddings().detach(), self.gamma)


# -- the technique ---------------------------------------------------------------------------------


@final
@dataclass
class MaDL(Technique):
    """Train on ``data.extra["annotators"]`` [N m] (-1: no label) in place of the labels; the answer is the network alone.

    ``confusion``: what is learnt of an annotator ("full" k x k, "diagonal" k, "isotropic" 1 number); ``eta``
    the accuracy assumed at the start; ``use_instance``: annotators may depend on the image; ``weighted``:
    annotators who answer alike share their weight, with ``gamma ~ Gamma(alpha, beta)``.
    """

    confusion: str = "full"
    eta: float = 0.8
    embed: int = 16
    use_instance: bool = True
    interact: bool = True
    weighted: bool = True
    alpha: float = 1.25
    beta: float = 0.25

    def __post_init__(self) -> None:
        if self.confusion not in ("full", "diagonal", "isotropic"):
            raise Mistake(f"confusion={self.confusion!r}: must be 'full', 'diagonal' or 'isotropic'")
        if not 0 < self.eta < 1:
            raise Mistake(f"eta={self.eta}: the accuracy assumed of annotators lies between 0 and 1; 0.8 is the paper's")
        if self.embed < 1:
            raise Mistake(f"embed={self.embed}: annotators need at least 1 number each; 16 is the paper's")
        if not self.alpha > 1 or not self.beta > 0:
            raise Mistake(f"alpha={self.alpha}, beta={self.beta}: the prior needs alpha above 1 and beta above 0, so that it has a mode to start from")
        self._made: AnnotatorModel | None = None

    def on_start(self, run: Run) -> None:
        z = run.data.extra["annotators"]
        if z.dim() != 2 or z.is_floating_point() or len(z) != len(run.data.y):
            raise Mistake(f"annotators: must be whole numbers [N m], one row a sample, -1 where there is no label; they have shape {tuple(z.shape)}")
        if int(z.max()) >= run.k or int(z.min()) < -1:
            raise Mistake(f"annotators: labels must lie in -1..{run.k - 1}; they span {int(z.min())}..{int(z.max())}")
        width = None
        if self.use_instance:
            run.require("forward_features")
            width = int(getattr(run.model, "head_hidden_size", None) or run.model.num_features)  # type: ignore[arg-type]
        run.extra["madl"] = self._made = self._model(z.shape[1], width, run.k)

    def _model(self, m: int, width: int | None, k: int) -> AnnotatorModel:
        return AnnotatorModel(m, width, k, self.confusion, self.eta, self.embed, self.interact, (self.alpha - 1) / self.beta)

    def stage(self, run: Run, i: int) -> Stage | None:
        """All training rows that any annotator has labelled, also those without a label of their own."""
        rows = run.data.split.train
        rows = rows[(run.data.extra["annotators"][rows] >= 0).any(1)]
        return Stage("train", run.settings.epochs or 0, index=rows, steps=run.settings.steps) if i == 0 else None

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        """Mean over the labels of ``- w_j ln P(z_ij)``, minus the logarithm of the prior."""
        assert out.logits is not None
        model: AnnotatorModel = run.extra["madl"]  # type: ignore[assignment]
        z = batch.extra["annotators"]
        given = z >= 0
        row, j = given.nonzero(as_tuple=True)
        log_p = out.logits.log_softmax(1)
        with torch.autocast(log_p.device.type, enabled=False):
            likelihood = log_annotation(log_p[row], model(self._features(run, out).to(log_p.dtype), given))
            losses = -likelihood.gather(1, z[row, j][:, None])[:, 0]
            if self.weighted:
                losses = losses * model.weights()[j]
            if batch.weight is not None:
                losses = losses * batch.weight[row]
            loss = losses.sum() / max(len(row), 1)
            return loss - log_gamma_prior(model.gamma, self.alpha, self.beta) if self.weighted else loss + 0 * model.gamma

    def on_step(self, run: Run) -> None:
        with torch.no_grad():
            run.extra["madl"].gamma.clamp_(min=FLOOR)  # type: ignore[operator]

    def on_end(self, run: Run) -> None:
        rows = run.data.split.train
        accuracy = self.annotator_accuracy(run, run.plan.pixels(run.data.x.take(rows[:1024]))).mean(0)
        run.report("annotators, mean accuracy as learnt", float(accuracy.mean()), "share of labels")
        best, worst = int(accuracy.argmax()), int(accuracy.argmin())
        run.report(f"best annotator ({best}), accuracy as learnt", float(accuracy[best]), "share of labels")
        run.report(f"worst annotator ({worst}), accuracy as learnt", float(accuracy[worst]), "share of labels")

    @torch.no_grad()
    def annotator_accuracy(self, run: Run, x: Tensor) -> Float[Tensor, "n m"]:
        """``sum_c p(c | x) P_j(c | c, x)``: how often each annotator is right about these [0, 1] pixels, as learnt. Works on a loaded run too."""
        model: AnnotatorModel = run.extra["madl"]  # type: ignore[assignment]
        found = []
        with run.aside():
            for part in x.split(64):
                out = run.forward(part)
                assert out.logits is not None
                p = out.logits.softmax(1)
                everyone = torch.ones(len(part), model.m, dtype=torch.bool, device=p.device)
                right = model(self._features(run, out).to(p.dtype), everyone).exp().diagonal(dim1=1, dim2=2)
                found.append((right.unflatten(0, (len(part), model.m)) * p[:, None]).sum(2).cpu())
        return torch.cat(found)

    def _features(self, run: Run, out: Out) -> Tensor:
        assert out.logits is not None
        if not self.use_instance:
            return out.logits
        with run.plan.autocast(), torch.no_grad():
            return full(run.model.forward_head(out.features, pre_logits=True))  # type: ignore[operator]

    def state(self) -> dict[str, Any]:
        model = self._made
        return {} if model is None else {"annotators": {name: value.detach().clone() for name, value in model.state_dict().items()}}

    def restore(self, run: Run, state: dict[str, Any]) -> None:
        if state and "madl" not in run.extra:  # a loaded run, which was never started
            kept = state["annotators"]
            width = kept["instance.weight"].shape[1] if "instance.weight" in kept else None
            with preserved():
                self._made = self._model(kept["annotator.weight"].shape[1], width, run.k).to(run.plan.device, run.plan.dtype)
            self._made.load_state_dict(kept)
            run.extra["madl"] = self._made


# -- votes, and annotators made to order -----------------------------------------------------------


def average_labels(z: Int[Tensor, "N m"], k: int) -> Float[Tensor, "N k"]:
    """The share of each class among a row's labels (-1: none); rows without labels are 0."""
    votes = F.one_hot(z.clamp_min(0), k).to(torch.get_default_dtype()) * (z >= 0)[..., None]
    return votes.sum(1) / (z >= 0).sum(1).clamp_min(1)[:, None]


def majority_vote(z: Int[Tensor, "N m"], k: int, gen: Generator) -> Int[Tensor, " N"]:
    """The class with most labels, ties by lot; -1 for rows without labels."""
    share = average_labels(z, k)
    tie = torch.rand(share.shape, generator=gen, device=gen.device).to(share)
    best = (tie + 1) * (share == share.max(1, keepdim=True).values)
    return torch.where((z >= 0).any(1), best.argmax(1), -1)


def answers_with(accuracy: Float[Tensor, "N m"], y: Int[Tensor, " N"], k: int, gen: Generator) -> Int[Tensor, "N m"]:
    """Labels of annotators who are right with these probabilities; their errors fall on the other classes at random."""
    right = torch.rand(accuracy.shape, generator=gen) < accuracy
    wrong = (y[:, None] + torch.randint(1, k, accuracy.shape, generator=gen)) % k
    return torch.where(right, y[:, None], wrong)


def simulate_annotators(
    x: Float[Tensor, "N d"], y: Int[Tensor, " N"], k: int, gen: Generator, *, kind: str = "class", m: int = 10, high: float = 0.9, low: float = 0.5
) -> Int[Tensor, "N m"]:
    """Labels of ``m`` simulated annotators.

    "class": right with ``high`` on three classes each and with ``low`` elsewhere; "cluster": the same on three of
    ``k`` clusters of ``x`` (k-means); "common": one accuracy between ``low`` and ``high`` each; "adversarial": right
    with probability ``1 - high``.
    """
    everyone = torch.stack([torch.randperm(k, generator=gen) < 3 for _ in range(m)])  # [m k]
    spread = low + (high - low) * torch.rand(m, generator=gen)
    made: dict[str, Callable[[], Tensor]] = {
        "class": lambda: torch.where(everyone[:, y].T, high, low),
        "cluster": lambda: torch.where(everyone[:, _clusters(x, k, gen)].T, high, low),
        "common": lambda: spread.expand(len(y), m),
        "adversarial": lambda: torch.full((len(y), m), 1 - high),
    }
    if kind not in made:
        raise Mistake(f"kind={kind!r}: must be one of {', '.join(made)}")
    return answers_with(made[kind](), y, k, gen)


def stress(usual: Int[Tensor, "N m"], k: int, gen: Generator, kind: str) -> Int[Tensor, "N M"]:
    """The paper's sets: "rand_dep" adds 90 copies of one random guesser, "rand_indep" 90 guessers, "correlated" 10 copies of each of the first three."""
    n = len(usual)
    if kind == "rand_dep":
        more = torch.randint(0, k, (n, 1), generator=gen).expand(-1, 90)
    elif kind == "rand_indep":
        more = torch.randint(0, k, (n, 90), generator=gen)
    elif kind == "correlated":
        more = usual[:, :3].repeat_interleave(10, 1)
    else:
        raise Mistake(f"kind={kind!r}: must be 'rand_dep', 'rand_indep' or 'correlated'")
    return torch.cat([usual, more], 1)


def drop_labels(z: Int[Tensor, "N m"], share: float, gen: Generator) -> Int[Tensor, "N m"]:
    """Each label is missing (-1) with probability ``share``."""
    return torch.where(torch.rand(z.shape, generator=gen) < share, -1, z)


def _clusters(x: Float[Tensor, "N d"], k: int, gen: Generator) -> Int[Tensor, " N"]:
    from sklearn.cluster import KMeans

    number = int(torch.randint(0, 2**31 - 1, (), generator=gen))
    return torch.from_numpy(KMeans(k, n_init=1, random_state=number).fit_predict(x.flatten(1).numpy())).long()
