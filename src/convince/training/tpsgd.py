"""tpSGD: train layer by layer without backpropagation, each layer towards its own random projection of the label."""

from __future__ import annotations

import collections
import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="tpsgd",
    kind="technique",
    paper="tpsgd",
    title="Learning with Local Gradients at the Edge",
    year=2022,
    url="https://arxiv.org/abs/2208.08503",
    claims=("gradient",),
    expects=("labels", "network"),
    tiny={},
    departs=(
        "the local loss is scale=10 times the mean over a layer's units, where the paper adds them up: that rescales the learning rate of hidden layers alone",
        "the optimiser and its learning rate are the run's, the same for hidden layers and the output layer",
        "the target is P y itself, not act(P y); P is Gaussian (its absolute value behind ReLU and sigmoid), as the paper does not say how it is drawn",
        "a convolution has one target a channel, for its mean over positions; maps='channel' asks it of each position, maps='map' draws one for each",
        "a layer ends behind the norms, activations and pools that are modules directly after it; an activation that is a function call belongs to no layer",
        "the paper's adaptor mode and its runs of the DFA baseline are left out; scale=0 is the baseline with random hidden layers",
    ),
)

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.RNN, *NORMS)
POSITIVE = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softplus)


def projection(units: int, k: int, law: str, positive: bool, gen: Generator) -> Float[Tensor, "units k"]:
    """The fixed random ``P``, float64: "uniform" on -1 to 1, "gaussian" or "sign"; ``positive`` moves it to 0 to 1 (a gaussian: its absolute value)."""
    if law == "gaussian":
        drawn = torch.randn(units, k, generator=gen, dtype=torch.float64)
        return drawn.abs() if positive else drawn
    drawn = torch.rand(units, k, generator=gen, dtype=torch.float64) * 2 - 1
    drawn = drawn.sign() if law == "sign" else drawn
    return (drawn + 1) / 2 if positive else drawn


def local_delta(h: Float[Tensor, "n ..."], target: Float[Tensor, "n ..."], loss: str = "l2", drtp: bool = False) -> Float[Tensor, "n ..."]:
    """``dJ/dh`` of the local loss: ``2 (h - P y)`` for "l2", its sign for "l1"; under DRTP the projected label ``P y`` itself."""
    if drtp:
        return target
    return 2 * (h - target) if loss == "l2" else (h - target).sign()


def one_step(rnn: nn.RNN, x: Tensor, h: Tensor, first: Tensor | None = None) -> Tensor:
    """The hidden states ``h`` again, each from its own input and the *detached* state before it: gradients go back one step.

    ``first`` is the state before the first step, zeros where none was given. Shapes as in ``nn.RNN``.
    """
    time = 1 if rnn.batch_first and h.dim() == 3 else 0
    start = torch.zeros_like(h.narrow(time, 0, 1)) if first is None else first[0].unsqueeze(time)
    before = torch.cat([start, h.narrow(time, 0, h.shape[time] - 1)], time).detach()
    own = dict(rnn.named_parameters(recurse=False))
    z = nn.functional.linear(x, own["weight_ih_l0"], own.get("bias_ih_l0")) + nn.functional.linear(before, own["weight_hh_l0"], own.get("bias_hh_l0"))
    return z.tanh() if rnn.nonlinearity == "tanh" else z.relu()


def peak_saved(work: Callable[[], Any], model: nn.Module) -> int:
    """Bytes of activations that autograd holds at once, at most, while ``work()`` runs; ``model``'s weights and buffers do not count."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: collections.Counter[int] = collections.Counter()
    now = peak = 0

    class Kept:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor

    def release(address: int, size: int) -> None:
        nonlocal now
        held[address] -= 1
        now -= 0 if held[address] else size

    def pack(tensor: Tensor) -> Kept:
        nonlocal now, peak
        kept, address, size = Kept(tensor), tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()
        if address not in own:
            now += 0 if held[address] else size
            held[address] += 1
            peak = max(peak, now)
            weakref.finalize(kept, release, address, size)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        work()
    return peak


# -- the layers of a network -----------------------------------------------------------------------


@dataclass(frozen=True)
class Layer:
    """A weighted module, ``modules[0]``, and the norms and modules without weights directly behind it.

    ``shape`` is that of one row of its output, ``axis`` where its units or channels stand; ``positive`` where it ends in an activation above 0.
    """

    modules: tuple[str, ...]
    shape: tuple[int, ...]
    axis: int
    positive: bool

    def params(self, model: nn.Module) -> list[nn.Parameter]:
        """Its own parameters that are being trained."""
        return [p for name in self.modules for p in model.get_submodule(name).parameters(recurse=False) if p.requires_grad]


def layers_of(run: Run, who: str) -> list[Layer]:
    """The layers of the run's network in the order in which an image passes them; the last one is its head.

    A Mistake for what cannot be trained by itself: weights outside a layer (class tokens), attention, LSTM, and networks of one layer.
    """
    model = run.model
    for name, module in model.named_modules():
        if isinstance(module, nn.RNN) and (module.num_layers > 1 or module.bidirectional):
            raise Mistake(f"{who}: {name!r} has several layers or directions in one nn.RNN; write them as one nn.RNN each")
        if next(module.parameters(recurse=False), None) is not None and not isinstance(module, WEIGHTED):
            raise Mistake(
                f"{who} trains each layer by itself, and {name or 'the network'!r} ({type(module).__name__}) holds weights that are no linear, "
                f"convolutional, recurrent or norm layer; choose another --model, such as resnet20, or leave {who} out"
            )
    plain = run.data.preprocess
    weight = next(model.parameters())
    calls: list[tuple[str, Any, Any]] = []

    def note(name: str) -> Callable[..., None]:
        return lambda _module, args, out: calls.append((name, args[0] if args else None, out))

    handles = [m.register_forward_hook(note(n)) for n, m in model.named_modules() if isinstance(m, WEIGHTED) or not next(m.children(), None)]
    try:
        with run.aside():
            run.forward(torch.zeros(2, plain.channels, *plain.size, dtype=weight.dtype, device=weight.device))
    finally:
        for handle in handles:
            handle.remove()
    found = _group(model, calls)
    if len(found) < 2:
        raise Mistake(f"{who} needs a hidden layer before the output layer, and {type(model).__name__} has {len(found)} layer(s) in all")
    return found


def _group(model: nn.Module, calls: list[tuple[str, Any, Any]]) -> list[Layer]:
    times = collections.Counter(name for name, _, _ in calls)
    taken: set[str] = set()
    found = []
    for at, (name, _, out) in enumerate(calls):
        head = model.get_submodule(name)
        if name in taken or next(head.parameters(recurse=False), None) is None:
            continue
        members, here = [name], at
        while (after := _next(calls, here)) is not None:
            module = model.get_submodule(calls[after][0])
            free = next(module.parameters(), None) is None
            if times[calls[after][0]] > 1 or not (free or isinstance(module, NORMS)) or not isinstance(calls[after][2], Tensor):
                break
            here = after
            members.append(calls[after][0])
        taken.update(members)
        out = calls[here][2]
        out = out[0] if isinstance(out, tuple) else out
        last = isinstance(head, (nn.Linear, nn.RNN)) or out.dim() < 3 or out.shape[1] != len(next(head.parameters(recurse=False)))
        positive = any(isinstance(model.get_submodule(m), POSITIVE) for m in members) or getattr(head, "nonlinearity", "") == "relu"
        found.append(Layer(tuple(members), tuple(out.shape[1:]), -1 if last else 1, positive))
    return found


def _next(calls: list[tuple[str, Any, Any]], at: int) -> int | None:
    """The one call that takes what call ``at`` gave; None where there is none, or several."""
    out = calls[at][2]
    takers = [i for i in range(at + 1, len(calls)) if calls[i][1] is out]
    if takers and (len(takers) == 1 or calls[takers[0]][2] is out):  # an activation in place hands the same tensor on
        return takers[0]
    return None


@contextlib.contextmanager
def layerwise(
    model: nn.Module,
    layers: list[Layer],
    leave: Callable[[int, Tensor], Tensor],
    enter: Callable[[int, Tensor], Tensor] | None = None,
    cut: bool = True,
) -> Iterator[None]:
    """While this is open no gradient passes from a layer to one before it (``cut=False``: all gradients pass).

    ``enter(i, x)`` may change the detached input of layer ``i``; ``leave(i, h)`` sees its output, with the layer's own graph, and returns what goes on.
    """

    def before(i: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, args: tuple) -> tuple:
            x = args[0].detach() if cut else args[0]
            return (x if enter is None else enter(i, x), *args[1:])

        return hook

    def behind(i: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple, out: Any) -> Any:
            if not isinstance(module, nn.RNN):
                return leave(i, out)
            if not cut:
                return leave(i, out[0]), out[1]
            leave(i, one_step(module, args[0], out[0], *args[1:]) if torch.is_grad_enabled() else out[0])
            return out[0].detach(), out[1].detach()

        return hook

    handles = []
    try:
        for i, layer in enumerate(layers):
            handles.append(model.get_submodule(layer.modules[0]).register_forward_pre_hook(before(i)))
            handles.append(model.get_submodule(layer.modules[-1]).register_forward_hook(behind(i)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def backward(run: Run, who: str) -> None:
    """``run.loss.backward()``; a Mistake where another part's term lies on features inside the network, whose graph is gone by then."""
    try:
        run.loss.backward()
    except RuntimeError as error:
        if "second time" not in str(error):
            raise
        raise Mistake(
            f"{who} lets go of each layer's activations at once, and another part adds a loss on features inside the network; leave one of them out"
        ) from error


def add_gradients(grads: list[tuple[nn.Parameter, Tensor]]) -> None:
    """Put gradients into ``.grad``, on top of what is there."""
    for p, g in grads:
        p.grad = g if p.grad is None else p.grad + g


# -- the part --------------------------------------------------------------------------------------


@final
@dataclass
class TPSGD(Technique):
    """Each hidden layer follows its own local loss between its output and ``P y``; the output layer follows the run's loss.

    ``loss``: "l2" or "l1". ``drtp``: the projected label itself drives the update (DRTP). ``law``: of ``P``, see :func:`projection`.
    ``maps``: "mean" (one target for a channel's mean), "channel" (for each of its positions) or "map" (one a position).
    ``turns``: layers train one after the other, each for its share of the epochs, instead of all at once.
    ``last_step``: a recurrent layer has a target at the last step only. ``scale`` multiplies the gradients of hidden layers; 0 leaves them as drawn.
    """

    loss: str = "l2"
    drtp: bool = False
    law: str = "gaussian"
    maps: str = "mean"
    turns: bool = False
    last_step: bool = False
    scale: float = 10.0
    layers: list[Layer] = field(default_factory=list, init=False, repr=False, compare=False)
    edits: int = field(default=-1, init=False, repr=False, compare=False)  # of the run when the layers were listed
    matrices: dict[int, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    local: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)
    passed: bool = field(default=False, init=False, repr=False, compare=False)
    rank = 90  # innermost around the pass, and after every edit

    def __post_init__(self) -> None:
        for name, known in (("loss", ("l2", "l1")), ("law", ("uniform", "gaussian", "sign")), ("maps", ("mean", "channel", "map"))):
            if getattr(self, name) not in known:
                raise Mistake(f"tpsgd: {name}={getattr(self, name)!r}: must be one of {', '.join(known)}")
        if not self.scale >= 0:
            raise Mistake(f"tpsgd: scale={self.scale}: must be at least 0; 1 is usual, 0 keeps the hidden layers as they were drawn")

    def on_start(self, run: Run) -> None:
        self.edits = -1
        hidden, epochs = len(self._layers(run)) - 1, run.settings.epochs or 0
        if self.turns and epochs < hidden:
            raise Mistake(f"tpsgd: turns=True gives each of {hidden} hidden layers its epochs, and there are {epochs}; give --epochs {hidden} or more")

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        layers = self._layers(run)
        self.local, self.passed = [], False

        def leave(i: int, h: Tensor) -> Tensor:
            if i == len(layers) - 1:
                self.passed = True
                return h
            if torch.is_grad_enabled() and not self.passed:  # a further pass of another part is cut, and teaches hidden layers nothing
                self.local += self._gradients(run, i, layers[i], h)
            return h.detach()

        with layerwise(run.model, layers, leave):
            grad()

    def gradient(self, run: Run) -> None:
        if not run.loss.requires_grad:
            raise Mistake("tpsgd: the loss does not depend on the output layer, so there is nothing to train it by; leave out the part that owns the loss")
        backward(run, "tpsgd")
        add_gradients(self.local)
        self.local, self.passed = [], False

    def _gradients(self, run: Run, i: int, layer: Layer, h: Tensor) -> list[tuple[nn.Parameter, Tensor]]:
        """The gradients of layer ``i`` alone, from its own loss; they exist before the next layer runs."""
        params, batch = layer.params(run.model), run.batch
        if self.turns and i != run.epoch * (len(self.layers) - 1) // max(run.stage.epochs, 1):
            params = []
        if not params or batch.y is None or not h.requires_grad:
            return []
        rows = self._target(run, i, layer, batch.y.to(h), h).expand_as(h)
        seen = h.detach()
        if self.maps == "mean" and h.dim() > 2 and layer.axis == 1:
            seen = seen.mean(tuple(range(2, h.dim())), keepdim=True).expand_as(h)
        delta = local_delta(seen, rows, self.loss, self.drtp) * (self.scale / h.numel())
        if batch.weight is not None:
            delta = delta * batch.weight.to(h).view(-1, *[1] * (h.dim() - 1))
        rnn = run.model.get_submodule(layer.modules[0])
        if self.last_step and isinstance(rnn, nn.RNN):
            time = 1 if rnn.batch_first else 0
            only = torch.zeros(h.shape[time], dtype=h.dtype, device=h.device)
            only[-1] = 1
            delta = delta * only.view(-1, *[1] * (h.dim() - 1 - time))
        return list(zip(params, torch.autograd.grad(h, params, delta.to(h)), strict=True))

    def _target(self, run: Run, i: int, layer: Layer, y: Float[Tensor, "n k"], h: Tensor) -> Tensor:
        """``P_i y`` in the shape of ``h`` [n ...], or one that spreads to it."""
        whole = self.maps == "map" and h.dim() == 4
        if i not in self.matrices:
            units = h[0].numel() if whole else h.shape[layer.axis]
            gen = generator(run.seed, "tpsgd", layer.modules[0])
            self.matrices[i] = projection(units, y.shape[1], self.law, layer.positive and not self.drtp, gen).to(h)
        rows = y @ self.matrices[i].to(h).T
        if whole:
            return rows.view_as(h)
        rnn = run.model.get_submodule(layer.modules[0])
        if isinstance(rnn, nn.RNN) and not rnn.batch_first:
            return rows  # [t n d] takes [n d] as it is
        spread = [1] * (h.dim() - 2)
        return rows.view(len(rows), *spread, -1) if layer.axis == -1 else rows.view(len(rows), -1, *spread)

    def _layers(self, run: Run) -> list[Layer]:
        if self.edits != len(run.edits):
            self.layers, self.edits, self.matrices = layers_of(run, "tpsgd"), len(run.edits), {}
        return self.layers
