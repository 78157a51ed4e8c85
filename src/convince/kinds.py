"""Contracts of the kinds that work on a finished answer, or set a job up: explainer, attack, ... study.

An answer is an ``nn.Module`` from [0, 1] pixels to scores [n k]; it is left as found, also after an
exception. Settings are fields of the part; answer and data are arguments of the call.
"""

from __future__ import annotations

import abc
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.types import Budget, Explanation, Findings, Schema

if TYPE_CHECKING:
    from convince.search.lab import Lab
    from convince.search.space import Space

Norm = Literal["2", "inf"]


@contextlib.contextmanager
def as_found(answer: nn.Module) -> Iterator[None]:
    """Eval mode and gradients on, outside inference mode; mode, ``.grad``, ``requires_grad`` and hooks put back."""
    modules = list(answer.modules())
    modes = [m.training for m in modules]
    hooks = [(m._forward_hooks.copy(), m._forward_pre_hooks.copy(), m._backward_hooks.copy(), m._backward_pre_hooks.copy()) for m in modules]
    grads = [(p, p.grad, p.requires_grad) for p in answer.parameters()]
    try:
        answer.eval()
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for module, training, (forward, pre, backward, backward_pre) in zip(modules, modes, hooks, strict=True):
            module.training = training
            module._forward_hooks, module._forward_pre_hooks = forward, pre
            module._backward_hooks, module._backward_pre_hooks = backward, backward_pre
        for p, grad, requires in grads:
            p.grad = grad
            p.requires_grad_(requires)


def differentiable(answer: nn.Module, who: str) -> None:
    """Refuse by name an answer that gives no gradients (kNN over stored references)."""
    if getattr(answer, "differentiable", True) is False:
        raise Mistake(f"{who} needs gradients, and the answer of this run ({type(answer).__name__}) has none; use a part that only asks for scores")


class Explainer(abc.ABC):
    """Says why an answer was given: ``GradCam()(answer, x, target)``.

    What is explained is always one number a row: the score of a class, or any other column of what the answer gives (a regression's
    output; a similarity, see :mod:`convince.explain.targets`). A row's map does not depend on the rows beside it: noise and masks are
    drawn once, by the part's own seed, for all of them.
    """

    rows: ClassVar[int] = 32  # images at once, where a person asks for many
    fast: ClassVar[bool] = True  # may be tried in bf16; False where the method works in fp32 whatever it is given

    @abc.abstractmethod
    def explain(self, answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"]) -> Explanation:
        """The part's own work; ``x`` is a detached copy. The answer is in eval mode, its weights need no gradient."""

    @final
    def __call__(self, answer: nn.Module, x: Tensor, target: Tensor | int | None = None) -> Explanation:
        """Explain the scores of class ``target`` (None: the predicted one) for [0, 1] pixels ``x``."""
        who = part_name(self)
        with as_found(answer):
            for p in answer.parameters():
                p.requires_grad_(False)
            x = x.detach().clone()
            _must_fit(answer, x, who)
            with torch.no_grad():
                scores = torch.cat([answer(part) for part in (x[:1] if target is not None else x).split(64)])
            k = scores.shape[1]
            if target is None:
                target = scores.argmax(1)
            target = torch.as_tensor(target, device=x.device).expand(len(x))
            if bool((target < 0).any() or (target >= k).any()):
                raise Mistake(f"{who}: target={target.tolist()}: the answer has classes 0 to {k - 1}")
            found = self.explain(answer, x.requires_grad_(True), target)
        if found.map is not None and not bool(torch.isfinite(found.map).all()):
            bad = (~torch.isfinite(found.map).flatten(1).all(1)).nonzero()[:, 0].tolist()
            raise Mistake(f"{who}: the map of image {bad[0]} is not finite ({len(bad)} of {len(x)}); look at the scores, and explain with --precision fp32")
        return found


def part_name(made: Any) -> str:
    """The name of the part that an object is of: its card's, or its class's where the file has none."""
    card = getattr(sys.modules.get(type(made).__module__), "CARD", None)
    return str(getattr(card, "part", type(made).__name__))


def _must_fit(answer: nn.Module, x: Tensor, who: str) -> None:
    """Refuse images of another number of channels, by the answer's own normalisation, and values that are no numbers."""
    mean = getattr(getattr(answer, "normalise", None), "mean", None)
    if x.dim() < 2 or not len(x):
        raise Mistake(f"{who}: the input has shape {tuple(x.shape)}; give a batch with at least one image [n c h w], or row [n d]")
    if mean is not None and mean.dim() == x.dim() and mean.shape[1] not in (1, x.shape[1]):
        raise Mistake(f"{who}: images have {x.shape[1]} channels, and the answer takes {mean.shape[1]}; convert them (grey is 1, colour 3)")
    if not bool(torch.isfinite(x).all()):
        raise Mistake(f"{who}: the input has values that are not finite; pixels are [0, 1]")


class Attack(abc.ABC):
    """Looks for a small change that fools an answer: ``DeepFool()(answer, x, y)``."""

    @abc.abstractmethod
    def perturb(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"], *, eps: float | None, norm: Norm) -> Tensor:
        """The part's own work: changed pixels, same shape."""

    @final
    def __call__(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"], *, eps: float | None = None, norm: Norm = "2") -> Tensor:
        """Changed pixels in [0, 1]; with ``eps`` [pixel value, 0 to 1] never farther than that in the norm."""
        if eps is not None and not eps >= 0:
            raise Mistake(f"eps={eps}: must be at least 0, in pixel values 0 to 1 (8/255 is usual)")
        if norm not in ("2", "inf"):
            raise Mistake(f"norm={norm!r}: must be '2' or 'inf'")
        differentiable(answer, type(self).__name__)
        with as_found(answer):
            changed = self.perturb(answer, x.detach().clone(), y, eps=eps, norm=norm).detach()
        if not bool(torch.isfinite(changed).all()):
            raise ValueError(f"{type(self).__name__} returned pixels that are not finite")
        changed = changed.clamp(0, 1)
        return changed if eps is None else project(changed, x, eps, norm)


def project(changed: Tensor, x: Tensor, eps: float, norm: Norm) -> Tensor:
    """The nearest point to ``changed`` in the ball of radius ``eps`` around ``x``."""
    d = changed - x
    if norm == "inf":
        return x + d.clamp(-eps, eps)
    size = d.flatten(1).norm(dim=1).clamp_min(1e-12)
    return x + d * (eps / size).clamp_max(1).view(-1, *[1] * (x.dim() - 1))


class Certifier(abc.ABC):
    """Proves that no change inside a ball alters the answer; never true where an attack succeeds."""

    @abc.abstractmethod
    def certify(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"], *, eps: float, norm: Norm) -> Bool[Tensor, " n"]:
        """True for each row that is proven safe."""


@dataclass(frozen=True)
class Cut:
    """What a compressor decided: the JSON arguments of its ``rebuild(model, **spec)``, and tensors it measured."""

    spec: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)


class Compressor(abc.ABC):
    """A training-free compressor: ``plan`` decides, ``apply`` returns a smaller answer and leaves the original alone."""

    @abc.abstractmethod
    def plan(self, answer: nn.Module, x: Tensor, budget: Budget | None = None) -> Cut:
        """Decide from calibration pixels ``x`` [0, 1], without changing the answer."""

    @abc.abstractmethod
    def apply(self, model: nn.Module, cut: Cut) -> None:
        """Change the network (a copy) in place: ``rebuild`` with the cut's spec, then the weights."""

    @staticmethod
    @abc.abstractmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """The change of shape alone, as stored in structure.json and replayed on load."""


class Predictor(abc.ABC):
    """Wraps an answer: crops chosen by content, calibrated outputs, neighbours."""

    @abc.abstractmethod
    def wrap(self, answer: nn.Module) -> nn.Module:
        """A module with the same inputs and scores [n k]."""


class Probe(abc.ABC):
    """Reads an answer on data and returns named numbers with units, and figures. Any probe can ride along in training (``--with``)."""

    @abc.abstractmethod
    def probe(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"]) -> Findings:
        """Readings and figures; ``x`` [0, 1] pixels, ``y`` class numbers. Equal arguments give equal findings."""


@dataclass(frozen=True)
class Task:
    """What is learnt: how labels are encoded, the objective, the metrics and the answer's shape. Classification is one."""

    encode: Callable[..., Any] | None = None
    objective: Callable[..., Tensor] | None = None
    metrics: tuple[str, ...] = ("accuracy", "log_loss", "ece")
    answer_shape: str = "n k"


@dataclass(frozen=True)
class Setup:
    """What a recipe hands to ``train``: settings by name (model, parts, epochs, lr ...) and the task."""

    settings: dict[str, Any]
    task: Task = Task()


class Recipe(abc.ABC):
    """An application: a schema, how to load it, a small generated sample, and how to train on it."""

    schema: Schema

    @abc.abstractmethod
    def load(self, root: str | Path) -> Any:
        """A person's data in this schema as :class:`convince.data.Data`."""

    @abc.abstractmethod
    def sample(self, gen: Generator) -> Any:
        """A small generated set of the same schema, for trying and testing."""

    @abc.abstractmethod
    def build(self, data: Any) -> Setup:
        """Settings for this data."""


class Study(abc.ABC):
    """A protocol in which several parts take part."""

    @abc.abstractmethod
    def run(self, budget: Budget) -> dict[str, Any]:
        """Run it and return what the evidence file holds."""


class Search(abc.ABC):
    """Looks for a network inside a budget; ``convince search`` sets a random search of the same budget beside it.

    ``network`` is the backbone part whose options are looked for; ``trial_epochs`` is how long a candidate is trained, here and
    in the random search. The lab gives the data without their test part, counts images, and keeps results.
    """

    network: ClassVar[str]
    trial_epochs: int

    @abc.abstractmethod
    def space(self, data: Any) -> Space:
        """The choices for networks on this data."""

    @abc.abstractmethod
    def find(self, lab: Lab) -> dict[str, Any]:
        """Options of the network, JSON values; all that is trained or looked at is charged to the lab."""

    def notes(self) -> dict[str, Any]:
        """Numbers beside the find, JSON values: a score, a bound, a rank correlation."""
        return {}
