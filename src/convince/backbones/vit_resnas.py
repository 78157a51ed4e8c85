"""ViT-ResNAS: a vision transformer in stages, whose tokens become fewer by convolutions with a skip connection; every network of its search space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="vit-resnas",
    kind="backbone",
    paper="vit-resnas",
    title="Searching for Efficient Multi-Stage Vision Transformers",
    year=2021,
    url="https://arxiv.org/abs/2109.00642",
    accepts=("image",),
    departs=(
        "the plain option is the reference network ViT-Res-Tiny, with the stem of three convolutions that its released script has",
        "sides that the patch does not divide are padded with zeros, and an odd plane of tokens is rounded up; the paper takes 224 pixels only",
        "there is no distillation token and no second head for patch-token mixing",
        "vit-resnas-mini is ours, for 28 to 64 pixels, with a narrower stem",
    ),
    tiny={"widths": (6, 8), "heads": ((2,), (1, 2)), "hidden": ((8,), (6, 8)), "head_dims": (2, 3), "patch": 2, "stem_width": 4, "drop_path": 0.0},
    variants={
        "vit-resnas-mini": {
            "widths": (64, 128, 256),
            "heads": ((4, 4), (4, 4), (4, 4)),
            "hidden": ((192, 192), (384, 384), (768, 768)),
            "head_dims": (16, 32, 64),
            "patch": 4,
            "stem_width": 16,
            "drop_path": 0.1,
        },
        "vit-resnas-tiny": {
            "widths": (176, 352, 704),
            "heads": ((3, 3, 3, 4, 4), (10, 8, 8, 8, 10, 10), (10, 10, 10, 8, 8)),
            "hidden": ((704, 576, 640, 576, 704), (1408, 1408, 1280, 1408, 1280, 1024), (2560, 1792, 2816, 2816, 2560)),
            "head_dims": (32, 48, 64),
        },
        "vit-resnas-small": {
            "widths": (220, 440, 880),
            "heads": ((5, 5, 7, 5, 5, 5), (10, 10, 10, 10, 12, 12), (16, 12, 16, 12, 14)),
            "hidden": ((880, 880, 800, 720, 720, 720), (1760, 1440, 1920, 1600, 1600, 1440), (3200, 3200, 2880, 2240, 2560)),
            "head_dims": (32, 48, 64),
            "drop_path": 0.3,
        },
        "vit-resnas-medium": {
            "widths": (240, 640, 880),
            "heads": ((7, 6, 7, 8, 7, 8, 6), (10, 14, 14, 16, 14, 16, 16), (16, 10, 16, 12, 16, 14)),
            "hidden": ((960, 960, 800, 960, 880, 880, 800), (1120, 1760, 1920, 1760, 1440, 1760, 1920), (3200, 3840, 3840, 3200, 3520, 3520)),
            "head_dims": (32, 48, 64),
            "drop_path": 0.3,
        },
    },
    small=("vit-resnas-mini",),
    published={
        "vit-resnas": {"size": 224, "classes": 1000, "macs": 1.7944e9},
        "vit-resnas-tiny": {"size": 224, "classes": 1000, "parameters": 41e6, "macs": 1.8e9},
        "vit-resnas-small": {
            "size": 224,
            "classes": 1000,
            "parameters": 65e6,
            "macs": 2.8e9,
            "why": "the definition that was released comes to 63.7 M and 2.85 G; the paper may count the second head of 0.9 M for patch-token mixing",
        },
        "vit-resnas-medium": {"size": 224, "classes": 1000, "macs": 4.5e9},
    },
    optimizer="adamw:lr=0.001,weight_decay=0.05",
)

Kept = Mapping[str, Tensor]
"""What rows of a batch keep of a layer, by its name: "width1", "heads1.2", "hidden1.2" and "block1.2" (1 or 0) -> numbers [n], or [1] for all rows."""


def mask(kept: Kept, name: str, size: int, like: Tensor) -> Float[Tensor, "m 1 c"] | None:
    """1 for the first channels that a row keeps of ``size``, 0 for the rest; None where the whole layer stays."""
    if name not in kept:
        return None
    return (torch.arange(size, device=like.device) < kept[name][:, None]).to(like.dtype)[:, None]


def times(x: Tensor, *masks: Tensor | None) -> Tensor:
    """The product with all masks that there are."""
    for each in masks:
        x = x if each is None else x * each
    return x


def masked_norm(x: Float[Tensor, "n t d"], norm: nn.LayerNorm, width: Float[Tensor, "m 1 d"]) -> Float[Tensor, "n t d"]:
    """LayerNorm over the kept channels alone: mean and variance are divided by the kept share, and masked channels stay 0."""
    share = width.mean(2, keepdim=True)
    centred = (x - (x * width).mean(2, keepdim=True) / share) * width
    variance = centred.square().mean(2, keepdim=True) / share
    return (centred * (variance + norm.eps).rsqrt() * norm.weight + norm.bias) * width


@final
class Norm(nn.LayerNorm):
    """torch's LayerNorm, or with ``width`` :func:`masked_norm`: a module, so that hooks hear both."""

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Float[Tensor, "n t d"], width: Float[Tensor, "m 1 d"] | None = None) -> Float[Tensor, "n t d"]:
        return super().forward(x) if width is None else masked_norm(x, self, width)


def shortcut(x: Float[Tensor, "n t d"], plane: tuple[int, int], d_out: int) -> Float[Tensor, "n s e"]:
    """The skip of a spatial reduction: patch tokens through 2x2 average pooling, the class token as it is, zeros up to ``d_out`` channels."""
    patches = F.avg_pool2d(x[:, 1:].mT.unflatten(2, plane), 2, ceil_mode=True, count_include_pad=False).flatten(2).mT
    return F.pad(torch.cat((x[:, :1], patches), 1), (0, d_out - x.shape[2]))


@final
class ResidualSpatialReduction(nn.Module):
    """LayerNorm, then 3x3 convolution of stride 2 and positions for the patches and a linear layer for the class token, plus :func:`shortcut`."""

    def __init__(self, d_in: int, d_out: int, plane: tuple[int, int], skip: bool = True) -> None:
        super().__init__()
        self.plane, self.d_out, self.skip = plane, d_out, skip
        self.norm = Norm(d_in)
        self.conv, self.token = nn.Conv2d(d_in, d_out, 3, 2, 1), nn.Linear(d_in, d_out)
        down, across = halved(plane)
        self.pos_embed = nn.Parameter(torch.empty(1, down * across, d_out))

    def forward(self, x: Float[Tensor, "n t d"], width: Tensor | None = None) -> Float[Tensor, "n s e"]:
        y = self.norm(x, width)
        patches = self.conv(y[:, 1:].mT.unflatten(2, self.plane)).flatten(2).mT + self.pos_embed
        y = torch.cat((self.token(y[:, :1]), patches), 1)
        return y + shortcut(x, self.plane, self.d_out) if self.skip else y


@final
class Attention(nn.Module):
    """Self-attention whose heads have a width of their own; of masked heads nothing reaches the projection."""

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * heads * head_dim), nn.Linear(heads * head_dim, dim)

    def forward(self, x: Float[Tensor, "n t d"], heads: Float[Tensor, "m 1 h"] | None = None) -> Float[Tensor, "n t d"]:
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2)  # n t h e
        return self.proj(times(y, None if heads is None else heads[..., None]).flatten(2))


@final
class Mlp(nn.Module):
    """Linear, GELU, linear; of masked hidden units nothing reaches the second."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Float[Tensor, "n t d"], hidden: Float[Tensor, "m 1 u"] | None = None) -> Float[Tensor, "n t d"]:
        return self.fc2(times(F.gelu(self.fc1(x)), hidden))


@final
class Block(nn.Module):
    """``x + attention(LN x)``, then ``x + MLP(LN x)``, each branch skipped in training with chance ``drop_path``; parameters are named as timm's."""

    def __init__(self, dim: int, heads: int, head_dim: int, hidden: int, drop_path: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = Norm(dim), Norm(dim)
        self.attn, self.mlp, self.drop_path = Attention(dim, heads, head_dim), Mlp(dim, hidden), DropPath(drop_path)
        self.sizes = {"heads": heads, "hidden": hidden, "block": 1}

    def forward(self, x: Float[Tensor, "n t d"], kept: Kept, name: str, width: Tensor | None) -> Float[Tensor, "n t d"]:
        heads, hidden, here = (mask(kept, what + name, size, x) for what, size in self.sizes.items())
        x = x + times(self.drop_path(self.attn(self.norm1(x, width), heads)), width, here)
        return x + times(self.drop_path(self.mlp(self.norm2(x, width), hidden)), width, here)


@final
class Stage(nn.Module):
    """Perhaps a :class:`ResidualSpatialReduction`, then blocks at one width; ``number`` counts from 1 and makes the names in ``kept``."""

    def __init__(self, number: int, dim: int, reduce: nn.Module | None, blocks: list[Block]) -> None:
        super().__init__()
        self.number, self.dim, self.reduce, self.blocks = number, dim, reduce, nn.ModuleList(blocks)

    def forward(self, x: Float[Tensor, "n t c"], kept: Kept) -> Float[Tensor, "n s d"]:
        if self.reduce is not None:
            x = self.reduce(x, mask(kept, f"width{self.number - 1}", x.shape[2], x))
        width = mask(kept, f"width{self.number}", self.dim, x)
        x = times(x, width)
        for j, block in enumerate(self.blocks, 1):
            x = block(x, kept, f"{self.number}.{j}", width)
        return x


@final
class ConvStem(nn.Module):
    """Three 3x3 convolutions with BN and ReLU, the first of stride 2, a residual over the last two; then a convolution of half the patch a step."""

    def __init__(self, in_chans: int, width: int, dim: int, patch: int) -> None:
        super().__init__()
        steps = ((in_chans, 2), (width, 1), (width, 1))
        convs = [nn.Sequential(nn.Conv2d(c, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()) for c, stride in steps]
        self.conv1, self.conv2, self.conv3 = convs
        self.proj = nn.Conv2d(width, dim, patch // 2, patch // 2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        x = self.conv1(x)
        return self.proj(x + self.conv3(self.conv2(x)))


@final
class VitResnas(Headed):
    """A stem, a class token and positions, stages with half the side of tokens each, LN, a linear layer on the class token.

    ``heads`` and ``hidden`` hold a number for each block of each stage, of heads (of ``head_dims`` channels, a number a stage) and of hidden
    units; ``patch`` is pixels of a first token's side; ``stem`` "convs" (:class:`ConvStem` of ``stem_width``) or "patch", one convolution;
    ``drop_path`` rises linearly to its value in the last block; ``skip`` False leaves out the skips of the spatial reductions.

    ``kept`` makes it a super-network: while it holds something, rows of a batch use only so much of a layer. Raises Mistake.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: Sequence[int] = (224, 224),
        widths: Sequence[int] = (192, 384, 768),
        heads: Sequence[Sequence[int]] = ((3, 3, 3, 3), (6, 6, 6, 6), (12, 12, 12, 12)),
        hidden: Sequence[Sequence[int]] = ((768, 768, 768, 768), (1536, 1536, 1536, 1536), (3072, 3072, 3072, 3072)),
        head_dims: Sequence[int] = (64, 64, 64),
        patch: int = 14,
        stem: str = "convs",
        stem_width: int = 24,
        drop_path: float = 0.2,
        skip: bool = True,
    ) -> None:
        super().__init__()
        checked(widths, heads, hidden, head_dims, patch, stem, stem_width)
        self.num_classes, self.num_features, self.in_chans = num_classes, widths[-1], in_chans
        self.options: dict[str, Any] = {"widths": widths, "heads": heads, "hidden": hidden, "head_dims": head_dims, "patch": patch}
        self.options |= {"stem": stem, "stem_width": stem_width, "drop_path": drop_path, "skip": skip}
        self.img_size, self.patch, self.kept = tuple(img_size), patch, dict[str, Tensor]()
        self.stem = nn.Conv2d(in_chans, widths[0], patch, patch) if stem == "patch" else ConvStem(in_chans, stem_width, widths[0], patch)
        plane = self.plane = -(-img_size[0] // patch), -(-img_size[1] // patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, widths[0]))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + plane[0] * plane[1], widths[0]))
        depth = sum(map(len, heads))
        rates = iter([drop_path * i / max(depth - 1, 1) for i in range(depth)])
        self.stages = nn.ModuleList()
        for i, dim in enumerate(widths):
            blocks = [Block(dim, h, head_dims[i], u, next(rates)) for h, u in zip(heads[i], hidden[i], strict=True)]
            reduce = ResidualSpatialReduction(widths[i - 1], dim, plane, skip) if i else None
            plane = halved(plane) if i else plane
            self.stages.append(Stage(i + 1, dim, reduce, blocks))
        self.norm = Norm(widths[-1])
        self.fc = nn.Linear(widths[-1], num_classes)
        self.feature_info = maps(*((f"stages.{i}", dim, patch * 2**i) for i, dim in enumerate(widths)))
        for name, p in self.named_parameters():
            if name.endswith(("cls_token", "pos_embed")):
                nn.init.trunc_normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n t d"]:
        """The class token and the last patches' tokens, normalised."""
        if x.shape[2:] != self.img_size:
            raise Mistake(f"vit-resnas is built for {self.img_size} pixels, and the images have {tuple(x.shape[2:])}; give img_size")
        rows = max(map(len, self.kept.values()), default=1)
        if rows not in (1, len(x)):
            raise Mistake(f"vit-resnas: multi-arch-sampling chose networks for {rows} images, and another part runs {len(x)} at once; leave one of them out")
        down, right = (-side % self.patch for side in self.img_size)
        x = self.stem(F.pad(x, (0, right, 0, down))).flatten(2).mT
        x = torch.cat((self.cls_token.expand(len(x), -1, -1), x), 1) + self.pos_embed
        for stage in self.stages:
            x = stage(x, self.kept)
        return self.norm(x, mask(self.kept, f"width{len(self.stages)}", x.shape[2], x))

    def pool(self, features: Float[Tensor, "n t d"]) -> Float[Tensor, "n d"]:
        """The class token."""
        return features[:, 0]


def halved(plane: tuple[int, int]) -> tuple[int, int]:
    """Tokens down and across after a spatial reduction; odd numbers are rounded up."""
    return -(-plane[0] // 2), -(-plane[1] // 2)


def checked(
    widths: Sequence[int], heads: Sequence[Sequence[int]], hidden: Sequence[Sequence[int]], head_dims: Sequence[int], patch: int, stem: str, stem_width: int
) -> None:
    """A Mistake that names the setting where these describe no network."""
    if not widths or not len(widths) == len(heads) == len(hidden) == len(head_dims):
        raise Mistake(f"vit-resnas: widths={widths}, heads={heads}, hidden={hidden}, head_dims={head_dims}: one entry a stage in each")
    if any(not isinstance(row, Sequence) for row in (*heads, *hidden)) or [len(row) for row in heads] != [len(row) for row in hidden]:
        raise Mistake(f"vit-resnas: heads={heads}, hidden={hidden}: one number for each block, written ((4,4),(4,4)), in both")
    if not all(heads) or min(min(row) for row in (*heads, *hidden, widths, head_dims, (stem_width,))) < 1:
        raise Mistake(f"vit-resnas: widths={widths}, heads={heads}, hidden={hidden}: at least one block a stage, and all numbers at least 1")
    if list(widths) != sorted(widths):
        raise Mistake(f"vit-resnas: widths={widths}: a stage cannot be narrower than the one before, since the skip carries all its channels on")
    if stem not in ("convs", "patch") or patch < 1 or (stem == "convs" and patch % 2):
        raise Mistake(f"vit-resnas: stem={stem!r}, patch={patch}: the stem is 'convs' with an even patch, or 'patch'")


def macs(options: Mapping[str, Any], size: Sequence[int], num_classes: int, in_chans: int = 3) -> int:
    """Multiply-adds of a network (all options that have no default here are needed) for one image of ``size`` (rows, columns)."""
    patch, width = options["patch"], options["stem_width"]
    plane = -(-size[0] // patch), -(-size[1] // patch)
    tokens, d_in, total = plane[0] * plane[1], options["widths"][0], 0
    if options["stem"] == "patch":
        total += tokens * patch**2 * in_chans * d_in
    else:
        total += tokens * (patch // 2) ** 2 * (9 * width * (in_chans + 2 * width) + width * d_in)
    for i, (d, e, heads, hidden) in enumerate(zip(*(options[name] for name in ("widths", "head_dims", "heads", "hidden")), strict=True)):
        if i:
            plane = halved(plane)
            tokens = plane[0] * plane[1]
            total += (9 * tokens + 1) * d_in * d
        n = tokens + 1
        total += sum(n * (4 * d * h * e + 2 * n * h * e + 2 * d * u) for h, u in zip(heads, hidden, strict=True))
        d_in = d
    return total + d_in * num_classes


@torch.no_grad()
def cut(model: VitResnas, options: Mapping[str, Any], here: Sequence[Sequence[int]]) -> VitResnas:
    """A network of its own with ``options`` that has the first channels, heads and hidden units of ``model``.

    ``here`` are, a stage, the places of the blocks that stay, from 0. A Mistake where ``model`` has less than is asked for.
    """
    with torch.device("meta"):
        small = VitResnas(model.num_classes, model.in_chans, model.img_size, **options)
    small = small.to_empty(device=model.cls_token.device).to(model.cls_token.dtype)
    state = model.state_dict()
    for name, tensor in small.state_dict().items():
        words = name.split(".")
        if words[2:3] == ["blocks"]:
            words[3] = str(here[int(words[1])][int(words[3])])
        large = state[".".join(words)]
        if ".qkv." in name:  # queries, keys and values of all heads, one after the other
            stage = int(words[1])
            e = options["head_dims"][stage]
            large, tensor = large.unflatten(0, (3, -1, e)), tensor.unflatten(0, (3, -1, e))
        if any(a < b for a, b in zip(large.shape, tensor.shape, strict=True)):
            raise Mistake(f"vit-resnas: the super-network has less than is asked for in {'.'.join(words)}: {tuple(large.shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(large[tuple(slice(length) for length in tensor.shape)])
    return small.train(model.training)
