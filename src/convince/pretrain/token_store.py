"""A small vector-quantising autoencoder: images become maps of code numbers, which are stored in a few bytes."""

from __future__ import annotations

import gzip
import math
from typing import final

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake


@final
class Codebook(nn.Module):
    """``codes`` vectors of ``dim`` numbers, each the moving average of the encodings it won (van den Oord et al. 2017, appendix A.1)."""

    codes: Tensor
    counts: Tensor
    sums: Tensor
    placed: Tensor

    def __init__(self, codes: int = 256, dim: int = 16) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(codes, dim))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", torch.zeros(codes, dim))
        self.register_buffer("placed", torch.tensor(False))  # on encodings

    def nearest(self, z: Float[Tensor, "m d"]) -> Int[Tensor, " m"]:
        """The code with the smallest squared distance."""
        return (self.codes.square().sum(1) - 2 * z @ self.codes.T).argmin(1)

    @torch.no_grad()
    def move(self, z: Float[Tensor, "m d"], decay: float, gen: Generator, alive: float = 0.01) -> None:
        """One step of the moving averages. The first puts every code on an encoding drawn at random.

        So does a later one to each code that wins less than ``alive`` times its share of the encodings.
        """
        drawn = z[torch.randint(0, len(z), (len(self.codes),), generator=gen).to(z.device)]
        if not self.placed:
            self.codes.copy_(drawn)
            self.sums.copy_(drawn)
            self.placed.fill_(True)
        at = self.nearest(z)
        won = torch.zeros_like(self.counts).index_add_(0, at, torch.ones_like(z[:, 0]))
        total = torch.zeros_like(self.sums).index_add_(0, at, z)
        self.counts.mul_(decay).add_(won, alpha=1 - decay)
        self.sums.mul_(decay).add_(total, alpha=1 - decay)
        dead = self.counts < alive * len(z) / len(self.codes)
        self.counts[dead] = 1
        self.sums[dead] = drawn[dead]
        self.codes.copy_(self.sums / self.counts[:, None])


def norm(channels: int) -> nn.GroupNorm:
    """GroupNorm, which in a frozen network has nothing that moves."""
    return nn.GroupNorm(math.gcd(8, channels), channels)


@final
class Tokenizer(nn.Module):
    """Convolutions of stride 2 until an image is ``down`` times smaller, then the nearest code at each place."""

    def __init__(self, channels: int, codes: int = 256, dim: int = 16, down: int = 4, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        d = channels
        for _ in range(round(math.log2(down))):
            layers += [nn.Conv2d(d, width, 4, stride=2, padding=1), norm(width), nn.ReLU()]
            d = width
        self.down = down
        self.encoder = nn.Sequential(*layers, nn.Conv2d(d, width, 3, padding=1), norm(width), nn.ReLU(), nn.Conv2d(width, dim, 1))
        self.book = Codebook(codes, dim)

    def tokens(self, z: Float[Tensor, "n d h w"]) -> Int[Tensor, "n h w"]:
        """The number of the nearest code at each place of a map of encodings."""
        n, d, h, w = z.shape
        return self.book.nearest(z.permute(0, 2, 3, 1).reshape(-1, d)).view(n, h, w)

    def vectors(self, tokens: Int[Tensor, "n h w"]) -> Float[Tensor, "n d h w"]:
        """The codes that tokens name."""
        return self.book.codes[tokens].permute(0, 3, 1, 2)

    @torch.no_grad()
    def forward(self, x: Float[Tensor, "n c h w"]) -> Int[Tensor, "n i j"]:
        with torch.autocast(x.device.type, enabled=False):  # the same tokens whatever the precision of the rest
            return self.tokens(self.encoder(x))


def decoder(channels: int, dim: int = 16, down: int = 4, width: int = 32) -> nn.Module:
    """From codes back to pixels, transposed convolutions of stride 2."""
    layers: list[nn.Module] = [nn.Conv2d(dim, width, 3, padding=1), norm(width), nn.ReLU()]
    for _ in range(round(math.log2(down))):
        layers += [nn.ConvTranspose2d(width, width, 4, stride=2, padding=1), norm(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Conv2d(width, channels, 3, padding=1))


def quantise(z: Float[Tensor, "n d h w"], codes: Float[Tensor, "n d h w"]) -> tuple[Float[Tensor, "n d h w"], Float[Tensor, ""]]:
    """The codes with the slope of the encodings (straight through), and the commitment ``|z - codes|^2``."""
    return z + (codes - z).detach(), F.mse_loss(z, codes.detach())


def pack(tokens: Int[Tensor, "n h w"], codes: int) -> bytes:
    """Tokens as bytes, or as pairs of bytes for more than 256 codes, then gzip."""
    kind = np.uint8 if codes <= 256 else np.uint16
    return gzip.compress(tokens.cpu().numpy().astype(kind).tobytes(), mtime=0)


def unpack(packed: bytes, shape: tuple[int, int, int], codes: int) -> Int[Tensor, "n h w"]:
    """The inverse of :func:`pack`; a Mistake where the bytes are of another number of tokens."""
    flat = np.frombuffer(gzip.decompress(packed), np.uint8 if codes <= 256 else np.uint16)
    if flat.size != math.prod(shape):
        raise Mistake(f"these are {flat.size} tokens, and {'x'.join(map(str, shape))} of {codes} codes are {math.prod(shape)}; give the shape they had")
    return torch.from_numpy(flat.astype(np.int64)).view(shape)


def token_bytes(places: int, codes: int) -> float:
    """Bytes of an image before entropy coding: ``places log2(codes) / 8`` (section 3.1)."""
    return places * math.log2(codes) / 8
