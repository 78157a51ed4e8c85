"""CrossViT: two transformers, on small and on large patches of one image, that talk through their class tokens by cross-attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.crossvit import MultiScaleBlock, PatchEmbed
from timm.models.vision_transformer import Attention, Block
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="crossvit",
    kind="backbone",
    paper="crossvit",
    title="CrossViT: Cross-Attention Multi-Scale Vision Transformer for Image Classification",
    year=2021,
    url="https://arxiv.org/abs/2103.14899",
    accepts=("image",),
    optimizer="adamw:lr=0.001,weight_decay=0.05",
    departs=(
        "one linear layer reads both class tokens side by side, which is the mean of the paper's two with one bias fewer",
        "an image whose sides the patches do not divide is resized to the next sides that they do, a branch for itself, as the paper does for its large branch",
        "the other fusions meet at the large branch's width, and patch tokens of two grids are summed after bilinear interpolation; the paper gives neither",
        "crossvit-mini is ours, for 28 to 64 pixels, where both branches see the image at one size",
    ),
    tiny={"patches": (2, 4), "dims": (6, 12), "depths": (1, 1), "encoders": 1, "ratio": (1, 1)},
    variants={
        "crossvit-mini": {"patches": (4, 8), "dims": (48, 96), "heads": 3, "depths": (1, 2), "encoders": 2, "ratio": (1, 1)},
        "crossvit-ti": {"dims": (96, 192), "heads": 3, "depths": (1, 4)},
        "crossvit-s": {"dims": (192, 384), "heads": 6, "depths": (1, 4)},
        "crossvit-b": {"dims": (384, 768), "heads": 12, "depths": (1, 4)},
        "crossvit-9": {"dims": (128, 256), "heads": 4, "depths": (1, 3), "mlp_ratio": 3},
        "crossvit-15": {"dims": (192, 384), "heads": 6, "depths": (1, 5), "mlp_ratio": 3},
        "crossvit-18": {"dims": (224, 448), "heads": 7, "depths": (1, 6), "mlp_ratio": 3},
        "crossvit-9-dagger": {"dims": (128, 256), "heads": 4, "depths": (1, 3), "mlp_ratio": 3, "stem": "convs"},
        "crossvit-15-dagger": {"dims": (192, 384), "heads": 6, "depths": (1, 5), "mlp_ratio": 3, "stem": "convs"},
        "crossvit-18-dagger": {"dims": (224, 448), "heads": 7, "depths": (1, 6), "mlp_ratio": 3, "stem": "convs"},
        "crossvit-15-dagger-384": {"dims": (192, 384), "heads": 6, "depths": (1, 5), "mlp_ratio": 3, "stem": "convs", "ratio": (17, 16)},
        "crossvit-18-dagger-384": {"dims": (224, 448), "heads": 7, "depths": (1, 6), "mlp_ratio": 3, "stem": "convs", "ratio": (17, 16)},
    },
    small=("crossvit-mini",),
    published={
        "crossvit-ti": {"size": 240, "classes": 1000, "parameters": 7014800, "macs": 1.56e9},
        "crossvit-s": {"size": 240, "classes": 1000, "parameters": 26856272, "macs": 5.6e9},
        "crossvit-b": {"size": 240, "classes": 1000, "parameters": 105025232, "macs": 21.2e9},
        "crossvit-9": {"size": 240, "classes": 1000, "parameters": 8553296, "macs": 1.84e9},
        "crossvit-15": {"size": 240, "classes": 1000, "parameters": 27528464, "macs": 5.8e9},
        "crossvit-18": {"size": 240, "classes": 1000, "parameters": 43271408, "macs": 9.03e9},
        "crossvit-9-dagger": {"size": 240, "classes": 1000, "parameters": 8776592, "macs": 1.99e9},
        "crossvit-15-dagger": {"size": 240, "classes": 1000, "parameters": 28209008, "macs": 6.1e9},
        "crossvit-18-dagger": {"size": 240, "classes": 1000, "parameters": 44266976, "macs": 9.5e9},
        "crossvit-15-dagger-384": {"size": 408, "classes": 1000, "parameters": 28500080, "macs": 21.4e9},
        "crossvit-18-dagger-384": {"size": 408, "classes": 1000, "parameters": 44606560, "macs": 32.4e9},
    },
)
Norm: Any = partial(nn.LayerNorm, eps=1e-6)


def grids(img_size: Sequence[int], patches: Sequence[int], ratio: Sequence[int]) -> list[tuple[int, int]]:
    """Patches (down, across) of the small and the large branch: as many as cover the image, for the large one scaled by ``ratio[1] / ratio[0]``.

    240 pixels, patches of 12 and 16, ratio 15 to 14: 20x20 and 14x14.
    """
    scales = ((1, 1), tuple(ratio))
    down, across = ([-(-side * b // (a * patch)) for patch, (a, b) in zip(patches, scales, strict=True)] for side in img_size)
    return list(zip(down, across, strict=True))


def projection(c_in: int, c_out: int) -> nn.Sequential:
    """``f`` and ``g`` of the paper: LayerNorm, GELU, linear to the other width."""
    return nn.Sequential(Norm(c_in), nn.GELU(), nn.Linear(c_in, c_out))


@final
class OtherFusion(nn.Module):
    """A multi-scale encoder whose branches exchange by another scheme than cross-attention (Fig. 3), or not at all.

    ``f`` takes tokens to the large branch's width, ``g`` back. "all": attention over all tokens of both; "class": the sum of the class tokens;
    "pairwise": the sums of the class tokens and of the patch tokens at one place; None: they stay apart.
    """

    def __init__(self, dims: Sequence[int], depths: Sequence[int], heads: int, mlp_ratio: float, grids: list[tuple[int, int]], kind: str | None) -> None:
        super().__init__()
        self.kind, self.grids, wide = kind, grids, max(dims)
        self.blocks = nn.ModuleList(
            nn.Sequential(*(Block(dim, heads, mlp_ratio, qkv_bias=True, norm_layer=Norm) for _ in range(depth)))
            for dim, depth in zip(dims, depths, strict=True)
        )
        if kind is not None:
            self.f = nn.ModuleList(projection(dim, wide) for dim in dims)
            self.g = nn.ModuleList(projection(wide, dim) for dim in dims)
        if kind == "all":
            self.norm, self.attn = Norm(wide), Attention(wide, heads, qkv_bias=True)

    def forward(self, x: list[Tensor]) -> list[Tensor]:
        x = [block(tokens) for block, tokens in zip(self.blocks, x, strict=True)]
        if self.kind is None:
            return x
        if self.kind == "class":
            whole = sum(f(tokens[:, :1]) for f, tokens in zip(self.f, x, strict=True))
            return [torch.cat((g(whole), tokens[:, 1:]), 1) for g, tokens in zip(self.g, x, strict=True)]
        y = [f(tokens) for f, tokens in zip(self.f, x, strict=True)]
        if self.kind == "all":
            o = torch.cat(y, 1)
            o = o + self.attn(self.norm(o))
            y = list(o.split([tokens.shape[1] for tokens in y], 1))
        else:
            y = [y[i] + torch.cat((y[1 - i][:, :1], self.moved(y[1 - i][:, 1:], self.grids[1 - i], self.grids[i])), 1) for i in (0, 1)]
        return [g(tokens) for g, tokens in zip(self.g, y, strict=True)]

    @staticmethod
    def moved(tokens: Float[Tensor, "n t d"], old: tuple[int, int], new: tuple[int, int]) -> Float[Tensor, "n s d"]:
        """Patch tokens of one grid at the places of another."""
        return F.interpolate(tokens.mT.unflatten(2, old), new, mode="bilinear", align_corners=False).flatten(2).mT


@final
class CrossVit(Headed):
    """``encoders`` times: ``depths`` blocks in each branch, then fusion. The features are both class tokens, normalised, side by side.

    ``patches`` [pixels], ``dims`` and ``depths`` are those of the small and the large branch, ``heads`` of both; ``ratio`` is small to large
    branch's image; ``stem`` "convs" embeds patches of 12 and 16 by three convolutions (the paper's dagger); ``fusion`` "cross" is the
    paper's, its blocks are timm's, the others are :class:`OtherFusion`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: Sequence[int] = (240, 240),
        patches: Sequence[int] = (12, 16),
        dims: Sequence[int] = (96, 192),
        heads: int = 3,
        depths: Sequence[int] = (1, 4),
        encoders: int = 3,
        mlp_ratio: float = 4,
        ratio: Sequence[int] = (15, 14),
        stem: str = "patch",
        fusion: str | None = "cross",
    ) -> None:
        super().__init__()
        if fusion not in ("cross", "all", "class", "pairwise", None):
            raise Mistake(f"crossvit: fusion={fusion!r} must be 'cross', 'all', 'class', 'pairwise' or none")
        if any(len(pair) != 2 or min(pair) < 1 for pair in (patches, dims, depths, ratio)) or encoders < 1:
            raise Mistake(f"crossvit: patches={patches}, dims={dims}, depths={depths}, ratio={ratio}: two numbers each, of at least 1; encoders={encoders} too")
        if any(dim % heads for dim in dims):
            raise Mistake(f"crossvit: dims={tuple(dims)}, heads={heads}: both widths must be multiples of the heads")
        if stem not in ("patch", "convs"):
            raise Mistake(f"crossvit: stem={stem!r} must be 'patch' or 'convs'")
        if stem == "convs" and tuple(patches) != (12, 16):
            raise Mistake(f"crossvit: stem='convs' is made for patches of 12 and 16 pixels, not {tuple(patches)}; leave it 'patch'")
        if min(img_size) < min(patches):
            raise Mistake(f"crossvit: an image of {'x'.join(map(str, img_size))} pixels holds no patch of {min(patches)}; choose a larger --size")
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, sum(dims)
        grid = grids(img_size, patches, ratio)
        self.patch_embed = nn.ModuleList(
            PatchEmbed((rows * patch, columns * patch), patch, in_chans, dim, multi_conv=stem == "convs")
            for (rows, columns), patch, dim in zip(grid, patches, dims, strict=True)
        )
        self.cls_token = nn.ParameterList(nn.Parameter(torch.zeros(1, 1, dim)) for dim in dims)
        self.pos_embed = nn.ParameterList(nn.Parameter(torch.zeros(1, 1 + r * c, dim)) for (r, c), dim in zip(grid, dims, strict=True))
        self.blocks = nn.ModuleList(
            MultiScaleBlock(
                tuple(dims), (), (*depths, 0), (heads, heads), (mlp_ratio, mlp_ratio), qkv_bias=True, drop_path=[0.0] * max(depths), norm_layer=Norm
            )
            if fusion == "cross"
            else OtherFusion(dims, depths, heads, mlp_ratio, grid, fusion)
            for _ in range(encoders)
        )
        self.norm = nn.ModuleList(Norm(dim) for dim in dims)
        self.fc = nn.Linear(sum(dims), num_classes)
        for parameter in (*self.cls_token, *self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        rows = []
        for branch, patch in enumerate(patches):
            fits = (step for step in range(patch, 2 * patch) if tuple(-(-side // step) for side in img_size) == grid[branch])
            step = next(fits, None)  # pixels between tokens, which are no whole number where the large branch sees another size
            rows += [] if step is None else [(f"blocks.{i}.blocks.{branch}", dims[branch], step) for i in range(encoders)]
        self.feature_info = maps(*rows)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d"]:
        """The class tokens of both branches after the last encoder, normalised."""
        tokens = []
        for embed, cls, pos in zip(self.patch_embed, self.cls_token, self.pos_embed, strict=True):
            assert isinstance(embed, PatchEmbed)
            image = x if x.shape[2:] == embed.img_size else F.interpolate(x, embed.img_size, mode="bicubic", align_corners=False)
            tokens.append(torch.cat((cls.expand(len(x), -1, -1), embed(image)), 1) + pos)
        for block in self.blocks:
            tokens = block(tokens)
        return torch.cat([norm(branch[:, 0]) for norm, branch in zip(self.norm, tokens, strict=True)], 1)

    def pool(self, features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        """The features are that vector already."""
        return features
