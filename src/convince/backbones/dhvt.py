"""DHVT: a vision transformer with convolutions in its patch embedding and feed-forward layers, and tokens that let its heads speak, for small data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.layers import DropPath
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="dhvt",
    kind="backbone",
    paper="dhvt",
    title="Bridging the Gap Between Vision Transformers and Convolutional Neural Networks on Small Datasets",
    year=2022,
    url="https://arxiv.org/abs/2210.05958",
    accepts=("image",),
    departs=(
        "batch normalisation of the patch embedding is each process's own; the authors' code shares its statistics over processes",
        "a side that the patch does not divide is rounded up, and the form need not be square; the authors' code takes squares that divide",
    ),
    tiny={"dim": 8, "depth": 1, "heads": 2, "patch": 2},
    variants={
        "dhvt-mini": {"dim": 96, "depth": 6, "heads": 4},
        "dhvt-tiny-patch4": {"dim": 192, "heads": 4},
        "dhvt-tiny-patch2": {"dim": 192, "heads": 4, "patch": 2},
        "dhvt-small-patch4": {"dim": 384, "heads": 8},
        "dhvt-small-patch2": {"dim": 384, "heads": 8, "patch": 2},
        "dhvt-tiny": {"dim": 192, "heads": 4, "patch": 16},
        "dhvt-small": {"dim": 384, "heads": 6, "patch": 16},
    },
    small=("dhvt-mini",),
    published={
        "dhvt-tiny-patch4": {"size": 32, "classes": 100, "parameters": 6008650, "macs": 0.39e9},
        "dhvt-tiny-patch2": {"size": 32, "classes": 100, "parameters": 5845162, "macs": 1.70e9},
        "dhvt-small-patch4": {"size": 32, "classes": 100, "parameters": 23425450, "macs": 1.53e9},
        "dhvt-small-patch2": {"size": 32, "classes": 100, "parameters": 22766698, "macs": 6.19e9},
        "dhvt-tiny": {"size": 224, "classes": 1000, "parameters": 6232390, "macs": 1.36e9},
        "dhvt-small": {"size": 224, "classes": 1000, "parameters": 24040606, "macs": 5.03e9},
    },
    optimizer="adamw:lr=0.001,weight_decay=0.05",
)
STEMS = {2: (1,), 4: (2, 1), 16: (8, 4, 2, 1)}  # pixels of a patch -> what the width of each convolution is the model's divided by
PIECES = ("head-tokens", "depthwise", "gate")  # what ``without`` can leave out


def head_means(x: Float[Tensor, "n t d"], heads: int) -> Float[Tensor, "n h e"]:
    """What each head sees of the picture: its share of the channels, averaged over all tokens (class token too)."""
    return x.mean(1).unflatten(1, (heads, -1))


def merge(x: Float[Tensor, "n t d"], heads: int) -> Float[Tensor, "n s d"]:
    """Tokens without the ``heads`` last ones, whose mean is added to the first, the class token."""
    tokens, extra = x.split((x.shape[1] - heads, heads), 1)
    return torch.cat([tokens[:, :1] + extra.mean(1, keepdim=True), tokens[:, 1:]], 1)


@final
class Affine(nn.Module):
    """``alpha x + beta`` by channel, one and zero at first."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha, self.beta = nn.Parameter(torch.ones(channels, 1, 1)), nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.alpha * x + self.beta


@final
class Sope(nn.Module):
    """Sequential overlapping patch embedding (section 3.2): affine, 3x3 convs of stride 2 with BN and GELU between, affine. A map, ``patch`` px a step."""

    def __init__(self, in_chans: int, dim: int, patch: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [Affine(in_chans)]
        for divisor in STEMS[patch]:
            layers += [nn.Conv2d(in_chans, dim // divisor, 3, 2, 1, bias=False), nn.BatchNorm2d(dim // divisor)]
            layers += [nn.GELU()] if divisor > 1 or patch == 2 else []  # in the released code the single conv of patch 2 has one behind it
            in_chans = dim // divisor
        self.proj = nn.Sequential(*layers, Affine(dim))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return self.proj(x)


@final
class HiMhsa(nn.Module):
    """Head-interacted self-attention (section 3.4): ``heads`` tokens made of :func:`head_means` take part, and are :func:`merge`-d into the class token."""

    def __init__(self, dim: int, heads: int, head_tokens: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        if head_tokens:
            self.head_proj, self.head_norm = nn.Linear(dim // heads, dim), nn.LayerNorm(dim // heads)
            self.head_embed = nn.Parameter(torch.empty(1, heads, dim))
        self.head_tokens = head_tokens

    def forward(self, x: Float[Tensor, "n t d"]) -> Float[Tensor, "n t d"]:
        if self.head_tokens:
            each = self.head_proj(head_means(x, self.heads)).unflatten(2, (self.heads, -1))  # n h h d/h
            x = torch.cat([x, F.gelu(self.head_norm(each)).flatten(2) + self.head_embed], 1)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return merge(x, self.heads) if self.head_tokens else x


@final
class Daff(nn.Module):
    """Dynamic aggregation feed-forward (section 3.3): patches through 1x1, depthwise 3x3 beside a shortcut, 1x1; the class token times a gate of their mean."""

    def __init__(self, dim: int, hidden: int, depthwise: bool = True, gate: bool = True) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(dim, hidden, 1), nn.BatchNorm2d(hidden), nn.GELU())
        self.depthwise = nn.Sequential(nn.Conv2d(hidden, hidden, 3, 1, 1, groups=hidden), nn.BatchNorm2d(hidden), nn.GELU()) if depthwise else None
        self.project = nn.Sequential(nn.Conv2d(hidden, dim, 1), nn.BatchNorm2d(dim))
        self.gate = nn.Sequential(nn.Linear(dim, dim // 4), nn.GELU(), nn.Linear(dim // 4, dim)) if gate else None

    def forward(self, x: Float[Tensor, "n t d"], plane: tuple[int, int]) -> Float[Tensor, "n t d"]:
        first, patches = x[:, :1], self.expand(x[:, 1:].transpose(1, 2).unflatten(2, plane))
        if self.depthwise is not None:
            patches = patches + self.depthwise(patches)
        patches = self.project(patches).flatten(2).transpose(1, 2)
        if self.gate is not None:
            first = first * self.gate(patches.mean(1, keepdim=True))
        return torch.cat([first, patches], 1)


@final
class Block(nn.Module):
    """``x + HI-MHSA(LN x)``, then ``x + DAFF(LN x)``, each branch skipped in training with chance ``drop_path``."""

    def __init__(self, dim: int, heads: int, hidden: int, drop_path: float, without: Sequence[str]) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = HiMhsa(dim, heads, "head-tokens" not in without)
        self.ffn = Daff(dim, hidden, "depthwise" not in without, "gate" not in without)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Float[Tensor, "n t d"], plane: tuple[int, int]) -> Float[Tensor, "n t d"]:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.ffn(self.norm2(x), plane))


@final
class Dhvt(Headed):
    """:class:`Sope`, a class token, ``depth`` times :class:`Block`, LN, a linear layer on the class token. No position embedding: any size of image.

    ``patch`` is pixels of a token's side: 2 or 4 for images of about 32 px, 16 for photographs. ``mlp_ratio`` is the hidden width of the
    feed-forward layers divided by ``dim``; ``drop_path`` rises linearly to its value in the last block. ``without`` leaves out pieces, as the
    paper's ablations do: "head-tokens", "depthwise" (the convolution of the feed-forward layers), "gate" (of the class token).
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        dim: int = 192,
        depth: int = 12,
        heads: int = 4,
        patch: int = 4,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.1,
        without: Sequence[str] = (),
    ) -> None:
        super().__init__()
        if patch not in STEMS:
            raise Mistake(f"dhvt: patch={patch}: must be 2, 4 or 16 pixels, as in the paper")
        if dim % heads or dim % STEMS[patch][0] or dim < 4 or depth < 1:
            raise Mistake(f"dhvt: dim={dim}, heads={heads}, depth={depth}: dim must be a multiple of the heads and of {STEMS[patch][0]}, depth at least 1")
        for piece in without:
            if piece not in PIECES:
                raise Mistake(f"dhvt: without={piece!r}: has no such piece{nearest(piece, PIECES)} Pieces: {', '.join(PIECES)}")
        self.num_classes, self.num_features, self.in_chans = num_classes, dim, in_chans
        self.patch_embed = Sope(in_chans, dim, patch)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        rates = [drop_path * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(Block(dim, heads, int(mlp_ratio * dim), rate, without) for rate in rates)
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.fc = nn.Linear(dim, num_classes)
        self.feature_info = maps(*((f"blocks.{i}", dim, patch) for i in range(depth)))
        for name, p in self.named_parameters():
            if name.endswith(("cls_token", "head_embed")):
                nn.init.trunc_normal_(p, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n t d"]:
        """The class token and the patches' tokens, normalised."""
        x = self.patch_embed(x)
        plane = (x.shape[2], x.shape[3])
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        for block in self.blocks:
            x = block(x, plane)
        return self.norm(x)

    def pool(self, features: Float[Tensor, "n t d"]) -> Float[Tensor, "n d"]:
        """The class token."""
        return features[:, 0]
