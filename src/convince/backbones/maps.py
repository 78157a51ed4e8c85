"""Feature maps by name: what a network's ``feature_info`` names, brought to [n c h w], for convolutional and token networks alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake, nearest


def info(model: nn.Module) -> list[dict[str, Any]]:
    """The rows of ``feature_info``, ours or timm's: module, num_chs (channels), reduction (pixels of the image a step). Empty where a network has none."""
    found = getattr(model, "feature_info", None)
    return [] if found is None else list(getattr(found, "info", found))


def fold(output: Tensor, channels: int, plane: tuple[int, int], last: bool = False) -> Float[Tensor, "n c h w"]:
    """A module's output as a map [n c h w]: as it is, from [n h w c], or from tokens [n t c] without those before the patches.

    ``last``: the channels stand last where both readings fit.
    """
    if output.dim() == 4:
        return output if output.shape[1] == channels and not (last and output.shape[3] == channels) else output.permute(0, 3, 1, 2)
    before = output.shape[1] - plane[0] * plane[1]
    if output.dim() != 3 or before < 0:
        raise ValueError(f"an output of shape {tuple(output.shape)} is no map of {channels} channels on a plane of {plane[0]}x{plane[1]}")
    return output[:, before:].transpose(1, 2).unflatten(2, plane)


def channels_last(model: nn.Module) -> bool:
    """Whether a network of timm's, or one made of it, hands on maps [n h w c]."""
    return "NHWC" in str(getattr(model, "output_fmt", "")).upper()


def feature_maps(model: nn.Module, x: Float[Tensor, "n c h w"], names: Sequence[str] = ()) -> dict[str, Float[Tensor, "n d i j"]]:
    """One pass, and the maps of these modules (all of ``feature_info`` if none is named), in the network's order.

    Names are those of ``feature_info``. Gradients flow; hooks are taken off again, also after an exception.
    """
    rows = {row["module"]: row for row in info(model)}
    if not rows:
        raise Mistake(f"feature_maps: {type(model).__name__} names no feature maps (no feature_info); choose another network, such as resnet20")
    for name in names:
        if name not in rows:
            raise Mistake(f"feature_maps: {type(model).__name__} has no map {name!r}{nearest(name, list(rows))} It has {', '.join(rows)}")
    modules = dict(model.named_modules())
    found: dict[str, Tensor] = {}
    chosen = [name for name in rows if name in (names or rows)]

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            step = rows[name]["reduction"]
            found[name] = fold(output, rows[name]["num_chs"], (-(-x.shape[2] // step), -(-x.shape[3] // step)), channels_last(model))

        return hook

    handles = [modules[name].register_forward_hook(keep(name)) for name in chosen]
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return {name: found[name] for name in chosen}


@final
class FeatureMaps(nn.Module):
    """A network that answers with its maps, as timm's ``features_only=True`` does: a list, and ``feature_info.channels()``."""

    def __init__(self, model: nn.Module, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        from timm.models import FeatureInfo

        rows = info(model)
        if not rows:
            raise Mistake(f"features_only: {type(model).__name__} names no feature maps; build it without")
        at = range(len(rows)) if out_indices is None else [i % len(rows) for i in out_indices]
        self.model, self.feature_info = model, FeatureInfo([dict(row) for row in rows], tuple(at))

    def forward(self, x: Float[Tensor, "n c h w"]) -> list[Float[Tensor, "n d i j"]]:
        return list(feature_maps(self.model, x, self.feature_info.module_name()).values())
