"""DeepFool: walk to the nearest linearised class boundary, again and again, until the answer changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.kinds import Attack, Norm
from convince.parts import Card

CARD = Card(
    part="deepfool",
    kind="attack",
    paper="deepfool",
    title="DeepFool: a simple and accurate method to fool deep neural networks",
    year=2015,
    url="https://arxiv.org/abs/1511.04599",
    expects=("images",),
    tiny={"max_iter": 30},
    departs=(
        "the overshoot is inside the loop and 1e-4 is added to every step's length, as in the authors' release; the paper overshoots once, at the end",
        "every point on the way is kept in [0, 1] pixels; the paper leaves the pixel range (deepfool(clip=None) does so too)",
        "only the 10 highest scores are tried, as in the release; the paper tries every class",
        "images that are answered wrongly already are returned unchanged",
        "with eps the change found is cut to the ball, and may then no longer fool",
    ),
)


def deepfool(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"] | None = None,
    *,
    candidates: int = 10,
    overshoot: float = 0.02,
    max_iter: int = 50,
    norm: Norm = "2",
    guard: float = 1e-4,
    clip: tuple[float, float] | None = None,
) -> tuple[Float[Tensor, "n ..."], Float[Tensor, "n ..."], Int[Tensor, " n"], Int[Tensor, " n"]]:
    """(x_adv, r, iterations, new_label): Algorithm 2 for a batch, each image with its own course.

    ``r = x_adv - x`` includes the factor ``1 + overshoot``. ``candidates``: the highest scores that are
    tried, the present one among them. ``norm`` "2": eqs. 8 and 9; "inf": eqs. 10 and 11 with q = 1.
    ``guard`` [length in the norm] keeps steps from vanishing at a boundary. With ``y``, images that
    are answered wrongly get r = 0. An image whose candidates all have equal gradients stays where it is.
    The model gives scores [n k] and must be in eval mode.
    """
    if candidates < 2:
        raise Mistake(f"candidates={candidates}: must be at least 2, the present class and one other")
    x = x.detach()
    with torch.no_grad():
        scores = model(x)
    if scores.shape[1] < 2:
        raise Mistake(f"deepfool needs at least 2 classes, and the answer has {scores.shape[1]}")
    k0 = scores.argmax(1)
    rivals = scores.scatter(1, k0[:, None], -torch.inf).topk(min(candidates, scores.shape[1]) - 1, dim=1).indices
    r, x_adv, label = torch.zeros_like(x), x.clone(), k0.clone()
    iterations = torch.zeros_like(k0)
    active = torch.ones_like(k0, dtype=torch.bool) if y is None else k0 == y
    for _ in range(max_iter):
        rows = active.nonzero()[:, 0]
        if not len(rows):
            break
        step, moves = _step(model, x_adv[rows], k0[rows], rivals[rows], norm, guard)
        active[rows[~moves]] = False
        rows, step = rows[moves], step[moves]
        r[rows] += step
        there = x[rows] + (1 + overshoot) * r[rows]
        if clip is not None:
            there = there.clamp(*clip)
            r[rows] = (there - x[rows]) / (1 + overshoot)
        x_adv[rows] = there
        iterations[rows] += 1
        with torch.no_grad():
            label[rows] = model(there).argmax(1)
        active[rows] = label[rows] == k0[rows]
    return x_adv, x_adv - x, iterations, label


def _step(
    model: nn.Module, x: Float[Tensor, "n ..."], k0: Int[Tensor, " n"], rivals: Int[Tensor, "n m"], norm: Norm, guard: float
) -> tuple[Float[Tensor, "n ..."], Bool[Tensor, " n"]]:
    """r_i, the step over the nearest linearised boundary, and which images have one."""
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        scores = model(x)
        own = scores.gather(1, k0[:, None])
        f = scores.gather(1, rivals) - own  # f'_k
        w = []  # w_k, by one backward pass a candidate
        for j in range(rivals.shape[1]):
            (gradient,) = torch.autograd.grad(f[:, j].sum(), x, retain_graph=j + 1 < rivals.shape[1])
            w.append(gradient)
    each = torch.stack(w, 1)
    flat = each.flatten(2)
    size = flat.norm(dim=2) if norm == "2" else flat.abs().sum(2)
    distance = (f.detach().abs() / size).where(size > 0, torch.inf).nan_to_num(torch.inf, torch.inf)
    l = distance.argmin(1)  # noqa: E741 (the paper's letter)
    i = torch.arange(len(x), device=x.device)
    nearest, toward, length = distance[i, l], each[i, l], size[i, l]
    moves = nearest < torch.inf
    wide = (-1, *[1] * (x.dim() - 1))
    direction = toward / length.clamp_min(1e-30).view(wide) if norm == "2" else toward.sign()
    return (nearest + guard).view(wide) * direction, moves


def rho_adv(x: Float[Tensor, "n ..."], r: Float[Tensor, "n ..."]) -> float:
    """Eq. 15: the mean of ``||r||_2 / ||x||_2``, the smaller the easier to fool. Images that are all zero are left out."""
    size = x.flatten(1).norm(dim=1)
    return float((r.flatten(1).norm(dim=1) / size)[size > 0].mean())


def adversarial_finetune(
    model: nn.Module,
    x: Float[Tensor, "n ..."],
    y: Int[Tensor, " n"],
    gen: Generator,
    *,
    lr: float,
    epochs: int = 5,
    extra: int | None = None,
    batch: int = 64,
    perturb: Callable[[nn.Module, Tensor, Tensor], Tensor] = lambda model, x, y: deepfool(model, x, y)[0],
) -> None:
    """Train ``model`` on, in place, on its images and on ``extra`` (None: as many) perturbed ones, made anew each epoch.

    SGD with momentum 0.9 at ``lr``: half of the rate of the training before (section 4.2). Perturbed
    images keep their labels. ``perturb(model, x, y)`` gives them, with the model in eval mode; ``extra=0`` trains
    on clean images alone. The mode is put back.
    """
    extra = len(x) if extra is None else extra
    if not 0 <= extra <= len(x):
        raise Mistake(f"extra={extra}: must be between 0 and the {len(x)} images given")
    training = model.training
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        rows = torch.randperm(len(x), generator=gen)[:extra].to(x.device)
        model.eval()
        changed = perturb(model, x[rows], y[rows]) if extra else x[:0]
        images, labels = torch.cat([x, changed]), torch.cat([y, y[rows]])
        model.train()
        for part in torch.randperm(len(images), generator=gen).to(x.device).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(images[part]), labels[part]).backward()
            optimizer.step()
    model.train(training)


@final
@dataclass
class DeepFool(Attack):
    """The attack of :func:`deepfool`, kept in [0, 1] pixels. It needs no ball; with one, its end is cut to it."""

    candidates: int = 10
    overshoot: float = 0.02
    max_iter: int = 50

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise Mistake(f"deepfool: candidates={self.candidates} must be at least 2, the present class and one other")
        if not self.overshoot >= 0:
            raise Mistake(f"deepfool: overshoot={self.overshoot} must be at least 0, a share of the change (0.02)")
        if self.max_iter < 1:
            raise Mistake(f"deepfool: max_iter={self.max_iter} must be at least 1")

    def perturb(self, answer: nn.Module, x: Tensor, y: Int[Tensor, " n"], *, eps: float | None, norm: Norm) -> Tensor:
        settings = {"candidates": self.candidates, "overshoot": self.overshoot, "max_iter": self.max_iter}
        return deepfool(answer, x, y, **settings, norm=norm, clip=(0.0, 1.0))[0]  # type: ignore[arg-type]
