"""Places: where the blocks, stages and branch ends of a residual network stand, ours, torchvision's or timm's."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

_ADDITION = ("downsample", "shortcut", "use_res_connect", "has_skip")  # what blocks with an addition have: torchvision's, timm's and ours
_SIDEWAYS = ("downsample", "shortcut")  # the branch that carries the input on


@dataclass(frozen=True)
class Block:
    """A residual block: its name, its stage from 0, itself, and the norms of its residual branch by their full names, in order."""

    name: str
    stage: int
    module: nn.Module
    norms: tuple[tuple[str, nn.Module], ...]

    @property
    def end(self) -> tuple[str, nn.Module] | None:
        """The last norm of the branch, before the addition; None where a convolution stands behind it (pre-activation blocks)."""
        if not self.norms or _convolves_after(self.module, self.norms[-1][1]):
            return None
        return self.norms[-1]


def channels(norm: nn.Module) -> int:
    """The channels of a norm layer."""
    return norm.num_channels if isinstance(norm, nn.GroupNorm) else norm.num_features  # type: ignore[return-value]


def residual_blocks(model: nn.Module) -> list[Block]:
    """Every residual block with normalisation, in order; an empty list where there is none.

    A block is known by an attribute that only blocks with an addition have (``downsample``, ``shortcut``,
    ``use_res_connect``, ``has_skip``): basic and bottleneck blocks, inverted residuals. Blocks whose addition a stride
    switches off count as well, as in the paper of MobileNetV2. A stage is a run of blocks in one container with one width.
    """
    found = {name + "." if name else "": m for name, m in model.named_modules() if any(hasattr(m, word) for word in _ADDITION)}
    blocks: list[Block] = []
    last: tuple[str, int] | None = None
    for prefix, module in found.items():
        if any(other != prefix and other.startswith(prefix) for other in found):
            continue  # a stage around blocks, not a block
        norms = tuple((prefix + n, m) for n, m in module.named_modules() if isinstance(m, (_BatchNorm, nn.GroupNorm)) and n.split(".")[0] not in _SIDEWAYS)
        if norms:
            place = prefix.rstrip(".").rpartition(".")[0], channels(norms[-1][1])
            stage = 0 if not blocks else blocks[-1].stage + (place != last)
            blocks.append(Block(prefix.rstrip("."), stage, module, norms))
            last = place
    return blocks


def _convolves_after(block: nn.Module, norm: nn.Module) -> bool:
    """True where a convolution stands in the block behind ``norm``."""
    children = [child for name, child in block.named_children() if name not in _SIDEWAYS]
    after = children[children.index(norm) + 1 :] if norm in children else []
    return any(isinstance(child, nn.Conv2d) for child in after)
