"""FIT: tokens attend in small groups, and a few latent tokens of every group attend to each other, in turns; for long sequences and large images."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="fit",
    kind="backbone",
    paper="fit-interleaved-transformer",
    title="FIT: Far-reaching Interleaved Transformers",
    year=2023,
    url="https://arxiv.org/abs/2305.12689",
    accepts=("image",),
    departs=(
        "the encoder and its causal form are here; the diffusion decoder, whose latents also read time and class, and the generator of tokens are left out",
        "widths, depths and groups of the named sizes are ours; the paper's own could not be found",
        "an image that the groups do not fill is padded with zeros below and on the right; the paper's images are filled",
        "the mean of the tokens that the last layers worked on answers, data or latents, as the authors' code picks them; the norm of the others is left out",
    ),
    tiny={"layers": "(1)1(1)", "patch": 2, "side": 2, "latents": 1, "dim_data": 8, "dim_latent": 16, "heads_data": 2, "heads_latent": 2},
    variants={
        "fit-mini": {"layers": "(2)2(2)", "patch": 4, "dim_data": 64, "dim_latent": 128, "heads_data": 2, "heads_latent": 4},
        "fit-base": {"dim_data": 384, "dim_latent": 768, "heads_data": 6, "heads_latent": 12},
    },
    small=("fit-mini",),
    optimizer="adamw:lr=0.001,weight_decay=0.05",
)


def rounds(layers: str) -> list[tuple[int, int]]:
    """Local and global layers of each round: "(2)4(2)4(1)" is [(2, 4), (2, 4), (1, 0)]."""
    pairs = [(int(a), int(b or 0)) for a, b in re.findall(r"\((\d+)\)(\d*)", layers)]
    if not re.fullmatch(r"(\(\d+\)\d*)+", layers) or not all(b for _, b in pairs[:-1]) or not sum(map(sum, pairs)):
        raise Mistake(f"fit: layers={layers!r}: must be rounds '(local)global' such as '(2)4(2)4(1)', in quotes; only the last may have no global")
    return pairs


def group_patches(x: Float[Tensor, "n c h w"], patch: int, side: int) -> Float[Tensor, "n t k p"]:
    """Patches of ``patch`` px as tokens, ``side`` x ``side`` neighbours a group: [n, groups, tokens of a group, values of a patch]."""
    n, c, h, w = x.shape
    rows, columns = h // (patch * side), w // (patch * side)
    cut = x.reshape(n, c, rows, side, patch, columns, side, patch).permute(0, 2, 5, 3, 6, 4, 7, 1)
    return cut.reshape(n, rows * columns, side * side, patch * patch * c)


def earlier(groups: int, latents: int) -> Bool[Tensor, "l l"]:
    """Who sees whom among the latents of a causal network: those of the same group and of earlier ones."""
    group = torch.arange(groups).repeat_interleave(latents)
    return group[:, None] >= group


def shifted(latents: Float[Tensor, "n t m e"]) -> Float[Tensor, "n t m e"]:
    """To every group the latents of the group before it, zeros to the first: what causal data tokens may read."""
    return F.pad(latents[:, :-1], (0, 0, 0, 0, 1, 0))


@dataclass(frozen=True)
class Pairs:
    """Pairs of tokens that one layer compares: local ones, global ones, and what full attention would."""

    local: int
    across: int
    full: int


def attention_pairs(tokens: int, per_group: int, latents: int) -> Pairs:
    """The pairs of ``tokens`` in groups of ``per_group`` with ``latents`` each (section 3): ``L n``, ``(L m / n)^2`` and ``L^2``."""
    return Pairs(tokens * per_group, (tokens // per_group * latents) ** 2, tokens**2)


@final
class Cross(nn.Module):
    """Tokens [b q d] read others [b k e]: both normalised, attention as wide as the narrower and with the fewer heads, no feed-forward layer."""

    def __init__(self, dim: int, other: int, heads: int) -> None:
        super().__init__()
        width, self.heads = min(dim, other), heads
        self.norm, self.norm_other = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(other, eps=1e-6)
        self.q, self.kv, self.proj = nn.Linear(dim, width), nn.Linear(other, 2 * width), nn.Linear(width, dim)

    def forward(self, x: Float[Tensor, "n t q d"], y: Float[Tensor, "n t k e"]) -> Float[Tensor, "n t q d"]:
        q = self.q(self.norm(x)).flatten(0, 1).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm_other(y)).flatten(0, 1).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        read = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + read.unflatten(0, x.shape[:2])


@final
class Round(nn.Module):
    """Local layers inside each group; then, if there are ``across`` layers: latents read their group, attend to all latents, and are written back."""

    def __init__(self, local: nn.ModuleList, across: nn.ModuleList, read: Cross | None, write: Cross | None, causal: bool) -> None:
        super().__init__()
        self.local, self.across, self.read, self.write, self.causal = local, across, read, write, causal

    def forward(
        self, data: Float[Tensor, "n t k d"], latents: Float[Tensor, "n t m e"] | None
    ) -> tuple[Float[Tensor, "n t k d"], Float[Tensor, "n t m e"] | None]:
        shape, data = data.shape[:2], data.flatten(0, 1)
        for layer in self.local:
            data = layer(data, is_causal=self.causal)
        data = data.unflatten(0, shape)
        if latents is not None and self.read is not None:
            latents = self.read(latents, data)
            mask = earlier(*latents.shape[1:3]).to(latents.device) if self.causal else None
            flat = latents.flatten(1, 2)
            for layer in self.across:
                flat = layer(flat, attn_mask=mask)
            latents = flat.unflatten(1, latents.shape[1:3])
        if latents is not None and self.write is not None:
            data = self.write(data, shifted(latents) if self.causal else latents)
        return data, latents


@final
class Plane(nn.Module):
    """Tokens by groups [n t k d] as a map [n d i j] again, ``rows`` groups high."""

    def __init__(self, rows: int, side: int) -> None:
        super().__init__()
        self.rows, self.side = rows, side

    def forward(self, x: Float[Tensor, "n t k d"]) -> Float[Tensor, "n d i j"]:
        x = x.unflatten(2, (self.side, self.side)).unflatten(1, (self.rows, -1)).permute(0, 5, 1, 3, 2, 4)
        return x.flatten(4, 5).flatten(2, 3)


@final
class Fit(Headed):
    """Tokens by groups, :func:`rounds` of :class:`Round`, LN, mean, a linear layer. The size of the image is fixed when it is built.

    ``layers`` as in :func:`rounds`; ``patch`` is pixels of a token's side, ``side`` tokens of a group's side, ``latents`` of each group. The mean is over
    the latents if the last layers are global, else over the data tokens. "(6)" is attention in windows; that with one group, plain full attention.
    ``causal``: groups and tokens see only those before them, in reading order of the groups.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: Sequence[int] = (224, 224),
        layers: str = "(2)4(2)4(1)",
        patch: int = 8,
        side: int = 4,
        latents: int = 4,
        dim_data: int = 192,
        dim_latent: int = 384,
        heads_data: int = 3,
        heads_latent: int = 6,
        mlp_ratio: float = 4.0,
        causal: bool = False,
    ) -> None:
        super().__init__()
        heads = min(heads_data, heads_latent)
        if dim_data % heads_data or dim_latent % heads_latent or min(dim_data, dim_latent) % heads:
            raise Mistake(f"fit: dim_data={dim_data}, dim_latent={dim_latent}, heads {heads_data} and {heads_latent}: widths must be multiples of their heads")
        if min(patch, side, latents) < 1:
            raise Mistake(f"fit: patch={patch}, side={side}, latents={latents}: each must be at least 1")
        pairs = rounds(str(layers))  # the command line reads (6) as a number
        self.num_classes, self.in_chans, self.img_size, self.patch, self.side = num_classes, in_chans, (img_size[0], img_size[1]), patch, side
        self.fills = [-(-edge // (patch * side)) * patch * side for edge in img_size]  # the image's sides, padded [pixels]
        rows, columns = (edge // (patch * side) for edge in self.fills)
        self.ends_in_latents = pairs[-1][1] > 0
        self.num_features = dim_latent if self.ends_in_latents else dim_data
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        layer = partial(Block, mlp_ratio=mlp_ratio, qkv_bias=True, norm_layer=norm)
        self.stem = nn.Sequential(nn.Linear(patch * patch * in_chans, dim_data), nn.LayerNorm(dim_data, eps=1e-6))
        self.place = nn.Parameter(torch.empty(side * side, dim_data))
        self.latents = nn.Parameter(torch.empty(rows * columns, latents, dim_latent)) if any(b for _, b in pairs) else None
        self.rounds = nn.ModuleList()
        for i, (a, b) in enumerate(pairs):
            local = nn.ModuleList(layer(dim_data, heads_data) for _ in range(a))
            across = nn.ModuleList(layer(dim_latent, heads_latent) for _ in range(b))
            read = Cross(dim_latent, dim_data, heads) if b else None
            write = Cross(dim_data, dim_latent, heads) if i < len(pairs) - 1 else None
            self.rounds.append(Round(local, across, read, write, causal))
        self.norm = nn.LayerNorm(self.num_features, eps=1e-6)
        self.plane = nn.Identity() if self.ends_in_latents else Plane(rows, side)
        self.fc = nn.Linear(self.num_features, num_classes)
        self.feature_info = maps() if self.ends_in_latents else maps(("plane", dim_data, patch))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for p in (self.place, self.latents):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02)

    def encode(self, tokens: Float[Tensor, "n t k p"]) -> tuple[Float[Tensor, "n t k d"], Float[Tensor, "n t m e"] | None]:
        """Data tokens and latents (None without global layers) of tokens by groups, before the final norm."""
        data = self.stem(tokens) + self.place
        latents = None if self.latents is None else self.latents.repeat(len(tokens), 1, 1, 1)
        for each in self.rounds:
            data, latents = each(data, latents)
        return data, latents

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Tensor:
        """The map of data tokens [n d i j], or the latents by groups [n t m e], normalised."""
        if tuple(x.shape[2:]) != self.img_size:
            raise Mistake(f"fit: was built for images of {self.img_size} pixels, this one has {tuple(x.shape[2:])}; give img_size when it is built")
        x = F.pad(x, (0, self.fills[1] - x.shape[3], 0, self.fills[0] - x.shape[2]))
        data, latents = self.encode(group_patches(x, self.patch, self.side))
        return self.plane(self.norm(latents if self.ends_in_latents else data))

    def pool(self, features: Tensor) -> Float[Tensor, "n d"]:
        """The mean over tokens."""
        return features.mean((1, 2)) if self.ends_in_latents else features.mean((2, 3))
