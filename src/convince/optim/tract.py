"""TrAct: the first layer's weights move so that its pre-activations move as if they were trained themselves."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="tract",
    kind="technique",
    paper="tract",
    title="TrAct: Making First-layer Pre-Activations Trainable",
    year=2024,
    url="https://arxiv.org/abs/2410.23970",
    gradient="surrogate",
    departs=(
        "the gradient is changed after the backward pass instead of inside it, which is the same: G^T X stands in .grad by then",
        "where a step passes the network several times, the inputs of all its passes with gradients make up one Gram matrix",
        "dilated layers work too; the released code has none",
    ),
    expects=("network",),
)
ROWS = 2**17  # patches that are in memory at a time


def rows(layer: nn.Module, x: Tensor) -> Float[Tensor, "r n"]:
    """The vectors that ``layer`` multiplies its weights with: rows of ``x`` [... n] of a Linear, all patches [b*positions c*k*k] of a Conv2d."""
    if isinstance(layer, nn.Linear):
        return x.reshape(-1, x.shape[-1])
    assert isinstance(layer, nn.Conv2d)
    if isinstance(layer.padding, str):  # "same": what is odd goes to the right and below
        whole = [d * (k - 1) if layer.padding == "same" else 0 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
        x = F.pad(x, (whole[1] // 2, whole[1] - whole[1] // 2, whole[0] // 2, whole[0] - whole[0] // 2))
        padding = 0, 0
    else:
        padding = layer.padding[0], layer.padding[1]
    patches = F.unfold(x, layer.kernel_size, layer.dilation, padding, layer.stride)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])


def in_pieces(layer: nn.Module, x: Tensor) -> Iterator[Float[Tensor, "r n"]]:
    """:func:`rows` of a batch, a few samples at a time: all patches of large images would not fit in memory."""
    one = len(rows(layer, x[:1]))
    for piece in x.split(max(ROWS // max(one, 1), 1)):
        yield rows(layer, piece)


def gram(pieces: Iterable[Float[Tensor, "_ n"]]) -> tuple[Float[Tensor, "n n"], int]:
    """``X^T X`` of all rows, and how many rows there are."""
    total, count = torch.zeros(()), 0
    for x in pieces:
        total, count = x.T @ x if count == 0 else torch.addmm(total, x.T, x), count + len(x)
    return total, count


def tract(grad: Float[Tensor, "m ..."], moment: Float[Tensor, "n n"], lam: float = 0.1) -> Float[Tensor, "m ..."]:
    """``G^T X (X^T X / b + lam I)^-1`` from the plain gradient ``grad = G^T X`` and ``moment = X^T X / b`` of b rows (section 3, the closed form).

    The step that brings pre-activations nearest to ``z - eta G`` under a ridge ``lam`` [squared input]. A large ``lam``
    gives the plain direction, divided by ``lam``. ``grad`` has a weight's shape: m outputs, n inputs in all.
    """
    ridged = moment + lam * torch.eye(len(moment), dtype=moment.dtype, device=moment.device)
    return torch.cholesky_solve(grad.flatten(1).T, torch.linalg.cholesky(ridged)).T.reshape(grad.shape)


def tract_of_few(grad: Float[Tensor, "m ..."], x: Float[Tensor, "b n"], lam: float = 0.1) -> Float[Tensor, "m ..."]:
    """:func:`tract` from the rows themselves. Where b < n only b equations are solved: ``(D - D X^T (X X^T / b + lam I)^-1 X / b) / lam``, D = ``grad``."""
    b, n = x.shape
    if b >= n:
        return tract(grad, x.T @ x / b, lam)
    plain = grad.flatten(1)
    return ((plain - tract(plain @ x.T, x @ x.T / b, lam) @ x / b) / lam).reshape(grad.shape)


@torch.no_grad()
def first_layer(model: nn.Module, x: Tensor) -> tuple[str, nn.Linear | nn.Conv2d]:
    """The Conv or Linear layer that runs first on ``x``, with its name; one whose weights :func:`rows` does not fit is a Mistake."""
    seen: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any) -> None:
        seen.append(module)

    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)
    hooks = [module.register_forward_pre_hook(note) for module in model.modules() if isinstance(module, kinds)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    if not seen:
        raise Mistake(f"tract: {type(model).__name__} runs no convolution and no linear layer; leave the part out")
    name, layer = next((n, m) for n, m in model.named_modules() if m is seen[0])
    if isinstance(layer, nn.Linear) and type(layer).forward is nn.Linear.forward:
        return name, layer
    if isinstance(layer, nn.Conv2d) and type(layer).forward is nn.Conv2d.forward and layer.groups == 1 and layer.padding_mode == "zeros":
        return name, layer
    raise Mistake(f"tract: the first layer {name!r} must be a plain Linear or a Conv2d in one group, padded with zeros; it is {layer}. Choose another --model")


@final
@dataclass
class TrAct(Technique):
    """Apply :func:`tract` to the gradient of the first layer's weights, with any optimiser; the bias keeps its own.

    ``l`` is 0.1 in all of the paper's runs; inputs are standardised by the run. The first layer is the one that runs first
    on a batch. Works on averaged gradients, before they are clipped.
    """

    l: float = 0.1  # noqa: E741
    at: int = field(default=-1, init=False, repr=False, compare=False)  # the stage in which the layer was found
    layer: nn.Linear | nn.Conv2d | None = field(default=None, init=False, repr=False, compare=False)
    seen: list[Tensor] = field(default_factory=list, init=False, repr=False, compare=False)  # its inputs of this step
    hook: Any = field(default=None, init=False, repr=False, compare=False)
    rank = 5

    def __post_init__(self) -> None:
        if not (self.l > 0 and math.isfinite(self.l)):
            raise Mistake(f"tract: l={self.l}: must be above 0; 0.1 is the paper's, and a large one gives the plain direction, shortened by l")

    def on_start(self, run: Run) -> None:
        self.drop()
        given = run.data.preprocess
        self.find(run, torch.zeros(1, given.channels, *given.size, dtype=run.plan.dtype, device=run.plan.device))  # refuses before any work is done

    def on_batch(self, run: Run) -> None:
        """Look for the first layer again in each stage: parts may have edited the network since."""
        if self.at != run.stage_number:
            self.drop()
            self.at, self.layer = run.stage_number, self.find(run, run.batch.x[:1])
            self.hook = self.layer.register_forward_hook(self.keeper())
        self.seen.clear()

    def find(self, run: Run, x: Tensor) -> nn.Linear | nn.Conv2d:
        with run.aside():
            return first_layer(run.model, run.normalise(x))[1]

    def keeper(self) -> Callable[[nn.Module, Any, Any], None]:
        """A hook that keeps the inputs of passes that will have gradients; copies of the network keep nothing."""

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], _output: Any) -> None:
            if layer is self.layer and layer.training and torch.is_grad_enabled():
                self.seen.append(inputs[0].detach())

        return keep

    @torch.no_grad()
    def on_grad(self, run: Run) -> None:
        layer, seen = self.layer, list(self.seen)
        self.seen.clear()
        if layer is None or not seen or layer.weight.grad is None:
            return
        plain = layer.weight.grad
        xs = [x.to(plain.dtype) for x in seen]
        if isinstance(layer, nn.Linear) and run.world == 1:
            layer.weight.grad = tract_of_few(plain, torch.cat([rows(layer, x) for x in xs]), self.l)
            return
        total, count = gram(piece for x in xs for piece in in_pieces(layer, x))
        layer.weight.grad = tract(plain, run.processes.total(total / count * run.share), self.l)

    def on_end(self, run: Run) -> None:
        self.drop()

    def drop(self) -> None:
        """Leave the network as it was."""
        if self.hook is not None:
            self.hook.remove()
        self.at, self.layer, self.hook = -1, None, None
        self.seen.clear()
