"""Surgery: put other modules in the place of a network's, or behind them, by type or by name; and undo it."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

from torch import Tensor, nn

from convince.errors import Mistake


@final
@dataclass
class Surgery:
    """What was changed: the names of the ``places``, and by how many parameters the network grew (``added``, may be negative).

    ``undo()`` puts every module and hook back; as a context manager it does so at the end.
    """

    places: list[str] = field(default_factory=list)
    added: int = 0
    steps: list[Callable[[], Any]] = field(default_factory=list, repr=False)

    def undo(self) -> None:
        """Put the network back as it was, the last change first. Doing so twice changes nothing."""
        while self.steps:
            self.steps.pop()()
        self.places, self.added = [], 0

    def __enter__(self) -> Surgery:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __add__(self, other: Surgery) -> Surgery:
        return Surgery([*self.places, *other.places], self.added + other.added, [*self.steps, *other.steps])


def find(model: nn.Module, *, types: tuple[type, ...] = (nn.Module,), only: Sequence[str] = (), skip: Sequence[str] = ()) -> list[tuple[str, nn.Module]]:
    """Modules of these types in the network's order, by name; not the network itself, and none inside another that is found.

    ``only`` and ``skip`` are names or patterns such as ``"layer3.*"``; ``skip`` wins.
    """
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(outer + ".") for outer, _ in found)
        if name and not inside and isinstance(module, types) and _chosen(name, only, skip):
            found.append((name, module))  # type: ignore[arg-type]
    return found


def _chosen(name: str, only: Sequence[str], skip: Sequence[str]) -> bool:
    return (not only or any(fnmatch.fnmatchcase(name, p) for p in only)) and not any(fnmatch.fnmatchcase(name, p) for p in skip)


def refuse_nothing(found: Iterable[Any], model: nn.Module, part: str, what: str, remedy: str) -> None:
    """A Mistake where a network has nothing that the part could be put to."""
    if not list(found):
        raise Mistake(f"{part}: {type(model).__name__} has no {what}; {remedy}, or leave it out")


def swap(model: nn.Module, places: Sequence[tuple[str, nn.Module]], make: Callable[[str, nn.Module], nn.Module]) -> Surgery:
    """Put ``make(name, old)`` in the place of each module, wherever the network holds it, in its mode, on its device.

    All new modules are made before anything is changed, so a refusal leaves the network whole. A module that stands under
    several names is replaced under all of them. Parameters of the old module that the new one does not hold are gone
    until :meth:`Surgery.undo`.
    """
    before = {id(p): p for p in model.parameters()}
    made: dict[int, tuple[nn.Module, nn.Module]] = {id(old): (old, make(name, old)) for name, old in places}
    done = Surgery([name for name, _ in places])
    for old, new in made.values():
        _place(new, old, model)
    for parent in list(model.modules()):
        for child, module in list(parent._modules.items()):
            if module is not None and id(module) in made and made[id(module)][0] is module:
                parent._modules[child] = made[id(module)][1]
                done.steps.append(_putter(parent, child, module))
    done.added = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in before.values())
    return done


def _putter(parent: nn.Module, child: str, module: nn.Module) -> Callable[[], None]:
    return lambda: parent._modules.__setitem__(child, module)


def _place(new: nn.Module, old: nn.Module, model: nn.Module) -> None:
    """``new`` in the mode of ``old``, and its own tensors where the network's are."""
    kept = {id(t) for t in [*old.parameters(), *old.buffers()]}
    like = next((p for p in [*old.parameters(), *model.parameters()] if p.is_floating_point()), None)
    if like is not None:
        for module in new.modules():
            for name, p in module._parameters.items():
                if p is not None and id(p) not in kept:
                    module._parameters[name] = nn.Parameter(p.data.to(like.device, like.dtype), p.requires_grad)
            for name, b in module._buffers.items():
                if b is not None and id(b) not in kept:
                    module._buffers[name] = b.to(like.device, like.dtype if b.is_floating_point() else b.dtype)
    new.train(old.training)


@final
class Behind:
    """A forward hook that hands a module's output to its own child ``name``: copied with the module, traced by export."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return getattr(module, self.name)(output)


def attach(model: nn.Module, part: str, places: Sequence[tuple[str, nn.Module]], make: Callable[[str, nn.Module], nn.Module]) -> Surgery:
    """Put ``make(name, module)`` behind each module, as its child ``part``: the names of all that exists stay.

    All new modules are made before anything is changed. Raises Mistake where a module has such a child already.
    """
    for name, module in places:
        if hasattr(module, part):
            raise Mistake(f"{part}: {name} has this layer already; install it once")
    made = [make(name, module) for name, module in places]
    done = Surgery([name for name, _ in places], sum(p.numel() for new in made for p in new.parameters()))
    for (_, module), new in zip(places, made, strict=True):
        _place(new, module, model)
        module.add_module(part, new)
        handle = module.register_forward_hook(Behind(part))
        done.steps.append(_remover(module, part, handle))
    return done


def _remover(module: nn.Module, part: str, handle: Any) -> Callable[[], None]:
    def undo() -> None:
        handle.remove()
        del module._modules[part]

    return undo
