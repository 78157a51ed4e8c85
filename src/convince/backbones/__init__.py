"""Networks by name: a part's name or variant (``resnet20``), with options, or any timm model as ``timm/NAME``."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn

from convince import parts
from convince.backbones import in_timm
from convince.errors import Mistake, nearest


def names() -> list[str]:
    """Every backbone and every variant of one."""
    return [n for row in parts.find() if isinstance(row, parts.Part) and row.card.kind == "backbone" for n in (row.name, *row.card.variants)]


def part_of(spec: str) -> parts.Part | None:
    """The part behind a model's name, or None for ``timm/NAME``."""
    return None if spec.startswith("timm/") else named(spec)[0]


def named(spec: str) -> tuple[parts.Part, str, dict[str, Any]]:
    """The part, the size's name as its card spells it, and that size's options; a Mistake with the nearest name."""
    wanted = parts.plain(parts.parse(spec)[0])
    for row in parts.find():
        if isinstance(row, parts.Part) and row.card.kind == "backbone":
            for name, options in {row.name: {}, **row.card.variants}.items():
                if parts.plain(name) == wanted:
                    return row, name, options
    known = names()
    raise Mistake(f"--model {spec}: no network of that name{nearest(parts.parse(spec)[0], known, 3)} 'convince models' lists all {len(known)}; or timm/NAME")


def input_size(spec: str) -> tuple[int, int]:
    """The sides [pixels] of the images that a named size is published for; 32 for a small one, 224 where nothing is said."""
    part, name, _ = named(spec)
    side = part.card.published.get(name, {}).get("size") or (32 if name in part.card.small else 224)
    return side, side


def usual_optimizer(model: str, specs: tuple[str, ...], lr: float | None) -> str | None:
    """The optimiser part that a network is usually trained with, where a person names neither one nor a learning rate."""
    part = part_of(model)
    if part is None or part.card.optimizer is None or lr is not None:
        return None
    owned = any("optimizer" in parts.get(parts.parse(spec)[0]).card.claims for spec in specs)
    return None if owned else part.card.optimizer


def builder(spec: str, *, num_classes: int, in_chans: int, size: tuple[int, ...]) -> Callable[[], nn.Module]:
    """A call that builds the network, random weights drawn from the global state.

    ``size`` is (rows, columns) of an image, empty for a table. A network that cannot take the
    input is refused in words, here or when it is built.
    """
    name, options = parts.parse(spec)
    if name.startswith("timm/"):
        return _timm(name.removeprefix("timm/"), {"num_classes": num_classes, "in_chans": in_chans, **options}, size)
    part, _, variant = named(name)
    accepted = part.card.accepts or ("image",)
    given = "image" if size else "table"
    if given not in accepted:
        raise Mistake(f"--model {name} accepts {' or '.join(accepted)} input, and this data is a {given}; choose another model")
    parts.check_options(part, options)
    fixed: dict[str, Any] = {"num_classes": num_classes, "in_chans": in_chans}
    made = part.load()
    if "img_size" in inspect.signature(made).parameters:
        fixed["img_size"] = size
    return lambda: made(**{**fixed, **variant, **options})


def _timm(name: str, options: dict[str, Any], size: tuple[int, ...]) -> Callable[[], nn.Module]:
    import timm

    if not size:
        raise Mistake(f"--model timm/{name} accepts images, and this data is a table; use --model mlp")
    if not timm.is_model(name):
        raise Mistake(f"--model timm/{name}: timm {timm.__version__} has no such model{nearest(name, timm.list_models())}")

    def build() -> nn.Module:
        try:
            return timm.create_model(name, pretrained=False, img_size=size, **options)
        except TypeError:
            pass
        try:
            return timm.create_model(name, pretrained=False, **options)
        except (TypeError, ValueError, AssertionError, RuntimeError) as error:
            raise Mistake(f"--model timm/{name}: cannot be built for {size[0]}x{size[1]} pixels with {options}: {error}") from error

    return build


in_timm.watch()
