"""Our networks by timm's own ``create_model``: registered as soon as both packages are imported, in either order."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from typing import Any

from torch import nn

from convince import parts
from convince.errors import Mistake

__all__: list[str] = []  # timm adds the names that it registers


def register_all() -> None:
    """Register every network and size under its name with ``_`` for ``-``; names that timm has already stay timm's."""
    from timm.models import is_model, register_model

    for row in parts.find():
        if isinstance(row, parts.Part) and row.card.kind == "backbone" and row.card.accepts != ("table",):
            for name in (row.name, *row.card.variants):
                if not is_model(name.replace("-", "_")):
                    register_model(_entry(name))


def _entry(name: str) -> Any:
    """A function as timm registers it, which builds the network ``name``."""

    def create(pretrained: bool = False, num_classes: int = 1000, in_chans: int = 3, img_size: Any = None, **options: Any) -> nn.Module:
        from convince.backbones import builder, input_size
        from convince.backbones.maps import FeatureMaps

        if pretrained:
            raise Mistake(f"{name}: has no pretrained weights here; build it with pretrained=False and train it")
        for word in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):
            options.pop(word, None)
        features_only, out_indices = options.pop("features_only", False), options.pop("out_indices", None)
        size = input_size(name) if img_size is None else (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
        model = builder(parts.spell(name, options), num_classes=num_classes, in_chans=in_chans, size=size)()
        model.default_cfg = model.pretrained_cfg = {  # type: ignore[assignment]  # what timm.data reads
            "architecture": name.replace("-", "_"),
            "num_classes": num_classes,
            "input_size": (in_chans, *size),
            "mean": (0.485, 0.456, 0.406),
            "std": (0.229, 0.224, 0.225),
            "interpolation": "bicubic",
            "crop_pct": 0.875,
        }
        return FeatureMaps(model, out_indices) if features_only else model

    create.__name__ = create.__qualname__ = name.replace("-", "_")
    create.__module__ = __name__
    create.__doc__ = f"The network {name!r} of Convince."
    return create


class _WhenTimmComes(importlib.abc.MetaPathFinder):
    """Stands in the import path until timm is imported, registers, and is gone."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != "timm":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("timm")
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            register_all()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch() -> None:
    """Register now where timm is imported already, else when it is. Called again when a person's own parts become known."""
    if "timm" in sys.modules:
        register_all()
    elif not any(isinstance(finder, _WhenTimmComes) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenTimmComes())
