"""ConViT: a vision transformer whose attention heads start as convolutions, each with a gate that learns how far to leave locality."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from timm.models import convit as timms
from timm.models.convit import GPSA, MHSA
from torch import Tensor, nn

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="convit",
    kind="backbone",
    paper="convit",
    title="ConViT: Improving Vision Transformers with Soft Convolutional Inductive Biases",
    year=2021,
    url="https://arxiv.org/abs/2103.10697",
    accepts=("image",),
    optimizer="adamw:lr=0.001,weight_decay=0.05",
    departs=(
        "convit-mini is ours, for 28 to 64 pixels: patches of 4, 9 heads, 6 blocks of which 4 are local",
        "images need not be square: the offsets between patches are those of the given grid, timm's take it for a square",
    ),
    tiny={"patch": 2, "dim": 8, "heads": 4, "depth": 2, "local_layers": 1},
    variants={
        "convit-mini": {"patch": 4, "dim": 72, "heads": 9, "depth": 6, "local_layers": 4},
        "convit-ti": {"dim": 192, "heads": 4},
        "convit-s": {"dim": 432, "heads": 9},
        "convit-b": {"dim": 768, "heads": 16},
        "convit-ti-plus": {"dim": 256, "heads": 4},
        "convit-s-plus": {"dim": 576, "heads": 9},
        "convit-b-plus": {"dim": 1024, "heads": 16},
    },
    small=("convit-mini",),
    published={
        "convit-ti": {"size": 224, "classes": 1000, "parameters": 5710512, "macs": 1.25e9},
        "convit-s": {"size": 224, "classes": 1000, "parameters": 27777322, "macs": 5.75e9},
        "convit-b": {"size": 224, "classes": 1000, "parameters": 86540040, "macs": 17.5e9},
        "convit-ti-plus": {"size": 224, "classes": 1000, "parameters": 10e6},
        "convit-s-plus": {"size": 224, "classes": 1000, "parameters": 48e6, "why": "the paper prints whole millions, cut off and not rounded"},
        "convit-b-plus": {"size": 224, "classes": 1000, "parameters": 152e6},
    },
)


def offsets(rows: int, columns: int) -> Float[Tensor, "t t 3"]:
    """``r_ij = (dx, dy, dx^2 + dy^2)``: how far patch j lies from patch i, in patches, to the right and down; patches count row by row."""
    x, y = torch.arange(columns).repeat(rows).float(), torch.arange(rows).repeat_interleave(columns).float()
    dx, dy = x - x[:, None], y - y[:, None]
    return torch.stack((dx, dy, dx**2 + dy**2), -1)


def convit(
    num_classes: int = 10,
    in_chans: int = 3,
    img_size: Sequence[int] = (224, 224),
    patch: int = 16,
    dim: int = 192,
    heads: int = 4,
    depth: int = 12,
    local_layers: int = 10,
    locality: float = 1.0,
    init: str = "local",
) -> timms.ConVit:
    """timm's ConViT: ``local_layers`` blocks of gated positional attention, then ordinary ones with a class token, ``depth`` in all.

    ``patch`` [pixels]. Head h of a local block starts at an offset of a square grid, so ``heads`` is a square; ``locality`` is how narrow its
    start is (alpha). ``init`` "random" draws the positional and the value weights at random instead: the gates alone remain.
    ``local_layers=0`` is a plain vision transformer of equal size.
    """
    if dim % heads or math.isqrt(heads) ** 2 != heads:
        raise Mistake(f"convit: dim={dim}, heads={heads}: heads lie on a square grid (4, 9, 16), and the width must be a multiple of their number")
    if not 0 <= local_layers < depth:
        raise Mistake(f"convit: local_layers={local_layers}, depth={depth}: at least one ordinary block comes last, with the class token that answers")
    if init not in ("local", "random"):
        raise Mistake(f"convit: init={init!r} must be 'local' or 'random'")
    rows, columns = (side // patch for side in img_size)
    if min(rows, columns) < 1 or any(side % patch for side in img_size):
        shape = "x".join(map(str, img_size))
        raise Mistake(f"convit: an image of {shape} pixels is not made of whole patches of {patch}; choose a --size that is a multiple, or another patch")
    model = timms.ConVit(
        img_size=(img_size[0], img_size[1]),  # type: ignore[arg-type]
        patch_size=patch,
        in_chans=in_chans,
        num_classes=num_classes,
        embed_dim=dim // heads,  # timm's is the width of a head
        num_heads=heads,
        depth=depth,
        local_up_to_layer=local_layers,
        locality_strength=locality,
    )
    for layer in layers(model):
        if isinstance(layer, GPSA):
            if rows != columns:  # of a square timm makes them in the first pass, and channels_last would scatter ours in memory
                layer.rel_indices = offsets(rows, columns)[None]
            if init == "random":
                nn.init.trunc_normal_(layer.v.weight, std=0.02)
                nn.init.trunc_normal_(layer.pos_proj.weight, std=0.02)
    return model


def layers(model: timms.ConVit) -> list[GPSA | MHSA]:
    """The attention of every block, in order."""
    return [block.attn for block in model.blocks]  # type: ignore[misc]


def gates(model: timms.ConVit) -> Float[Tensor, "l heads"]:
    """``sigmoid(lambda_h)`` of each local block and head: the share of its attention that looks at places alone, 0.731 at the start."""
    found = [layer.gating_param.detach().sigmoid() for layer in layers(model) if isinstance(layer, GPSA)]
    if not found:
        raise Mistake("convit: gates: this network has no local blocks (local_layers=0)")
    return torch.stack(found)


def attention(layer: GPSA | MHSA, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n heads t t"]:
    """What each head of a block's attention gives to each token, for the block's normalised input: rows sum to 1."""
    if isinstance(layer, GPSA):
        if layer.rel_indices.shape[1] != x.shape[1]:  # as timm's own forward begins
            layer.rel_indices = layer.get_rel_indices(x.shape[1])
        return layer.get_attention(x)
    q, k, _ = layer.qkv(x).unflatten(2, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    return (q @ k.mT * layer.scale).softmax(-1)


@torch.no_grad()
def nonlocality(model: timms.ConVit, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "l heads"]:
    """``D_loc``: how far a head looks on average over images and patches, in patches, for every block in order (the paper's measure of nonlocality).

    In ordinary blocks among patches alone, their attention brought to sum 1 without the class token.
    """
    rows, columns = model.patch_embed.grid_size
    distance = offsets(rows, columns)[..., 2].sqrt().to(x)
    found: list[Tensor] = []

    def look(layer: nn.Module, inputs: tuple[Tensor]) -> None:
        assert isinstance(layer, GPSA | MHSA)
        weights = attention(layer, inputs[0])[..., -rows * columns :, -rows * columns :]
        found.append((weights / weights.sum(-1, keepdim=True) * distance).sum(-1).mean((0, 2)))

    hooks = [layer.register_forward_pre_hook(look) for layer in layers(model)]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found)
