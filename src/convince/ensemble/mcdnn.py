"""MCDNN: networks trained on differently preprocessed and always newly distorted images, their probabilities averaged."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import final

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.augment.simard_distortion import SimardDistortion
from convince.ensemble.deep_ensemble import MeanAnswer, network_of, other_parts
from convince.ensemble.fixed_view import Viewed, check_view
from convince.errors import Mistake
from convince.fit.answer import score
from convince.fit.randomness import key
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card, spell
from convince.types import RunSpec

CARD = Card(
    part="mcdnn",
    kind="technique",
    paper="mcdnn",
    title="Multi-column Deep Neural Networks for Image Classification",
    year=2012,
    url="https://arxiv.org/abs/1202.2745",
    departs=(
        "one network for each preprocessing, 7 columns on digits; the paper has five for each, 35 columns (nets=5)",
        "the columns are the run's --model; --model mcdnn-column is the paper's digit network",
        "minibatches with the run's optimiser, rate and length; the paper takes single samples, rate 0.001 x 0.993 an epoch, for 800 epochs",
        "columns run on grey images of up to 48 pixels with widths in proportion to 28 pixels; all other images get the paper's four for traffic signs",
    ),
    claims=("answer",),
    mutes=("fixed-view", "simard-distortion"),
    expects=("images",),
    tiny={"views": ("width-3",)},
)
WIDTHS = (10, 12, 14, 16, 18, 20)  # pixels of a digit in an image of 28 (section 3.1)
CONTRASTS = ("imadjust", "histeq", "adapthisteq", "conorm")  # traffic signs (section 3.4)


def column_report(probs: Float[Tensor, "m n k"], y: Int[Tensor, " n"]) -> dict[str, float]:
    """What the columns do alone and together, shares 0 to 1 of the rows.

    ``column_i``: error of each, and their mean and best; ``ensemble``: error of the mean probability; ``shared``: mean over
    pairs of columns of the errors common to both, as a share of the errors of either; ``second_guess``: share of the
    ensemble's errors whose second most probable class is right. A share of no errors is 0.
    """
    wrong = probs.argmax(2) != y
    each = wrong.double().mean(1).tolist()
    mean = probs.mean(0)
    order = mean.argsort(1, descending=True)
    missed = order[:, 0] != y
    pairs = [(int((a & b).sum()), int((a | b).sum())) for a, b in itertools.combinations(wrong, 2)]
    shared = [both / either if either else 0.0 for both, either in pairs]
    second = (order[:, 1] == y)[missed].double().mean() if bool(missed.any()) else torch.zeros(())
    return {
        **{f"column_{i}": error for i, error in enumerate(each)},
        "mean": sum(each) / len(each),
        "best": min(each),
        "ensemble": float(missed.double().mean()),
        "shared": sum(shared) / len(shared) if shared else 1.0,
        "second_guess": float(second),
    }


def default_views(side: int, channels: int) -> tuple[str, ...]:
    """Widths of ink for small grey images (in proportion to 28 pixels), the four changes of contrast for all others."""
    if channels == 1 and side <= 48:
        return tuple(f"width-{round(width * side / 28, 1):g}" for width in WIDTHS)
    return CONTRASTS


@final
@dataclass
class MCDNN(Technique):
    """``nets`` columns on the images as they are and ``nets`` on each of ``views``; the mean of their probabilities answers.

    ``views``: forms of :func:`convince.ensemble.fixed_view.view`; None chooses by the data. ``distort``: strength of the random
    distortions that every column sees afresh, 1 the paper's, 0 none. This run's network is the first column; while it trains, the
    answer is its own.
    """

    views: tuple[str, ...] | None = None
    nets: int = 1
    distort: float = 1.0

    def __post_init__(self) -> None:
        if self.nets < 1:
            raise Mistake(f"mcdnn: nets={self.nets}: at least 1 network for each preprocessing; the paper has 5")
        for how in self.views or ():
            check_view(how, "mcdnn: views")
        SimardDistortion(self.distort)

    def columns(self, run: Run) -> list[str]:
        """The form that each column sees, this run's own first."""
        preprocess = run.data.preprocess
        views = default_views(min(preprocess.size), preprocess.channels) if self.views is None else self.views
        return [how for how in ("original", *views) for _ in range(self.nets)]

    def fit_members(self, run: Run) -> list[RunSpec]:
        distort = (spell("simard-distortion", {"amount": self.distort}),) if self.distort else ()
        own = other_parts(run, self)
        return [
            RunSpec({"seed": key(run.seed, "mcdnn", i) % 2**31, "parts": (*own, spell("fixed-view", {"how": how}), *distort)})
            for i, how in enumerate(self.columns(run))
            if i
        ]

    def on_batch(self, run: Run) -> None:
        run.batch.x, _ = SimardDistortion(self.distort)(run.batch.x, None, run.gen("simard-distortion"))

    def answer(self, run: Run) -> nn.Module:
        own = network_of(run)
        if run.optimizer is not None:
            return own
        others = [network_of(child) for child in run.children_of(self)]
        forms = self.columns(run)
        return MeanAnswer([own, *(Viewed(how, net) for how, net in zip(forms[1:], others, strict=True))])

    def on_end(self, run: Run) -> None:
        """Report the errors of the columns and of their mean on the validation part."""
        if len(run.data.split.val) and bool((run.data.y[run.data.split.val] >= 0).any()):
            probs, y = column_probs(run, "val")
            for name, value in column_report(probs, y).items():
                run.report(f"columns_{name}", value, "share")


def column_probs(run: Run, split: str) -> tuple[Float[Tensor, "m n k"], Int[Tensor, " n"]]:
    """Probabilities of each member of a finished ensemble on the labelled rows of a split, and the rows' classes."""
    answer = run.team.owner("answer").answer(run)
    members = answer.members if isinstance(answer, MeanAnswer) else [answer]
    with run.aside():
        scores = [score(member, run.data, run.data.split[split], run.plan, run.processes) for member in members]
    return torch.stack([each.probs for each in scores]), scores[0].y
