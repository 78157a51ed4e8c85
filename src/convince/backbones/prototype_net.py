"""PrototypeNet: decides by the distances of an image's code to a few learned codes, which a decoder turns back into images."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="prototype-net",
    kind="backbone",
    paper="prototype-case-based",
    title="Deep Learning for Case-Based Reasoning through Prototypes: A Neural Network that Explains Its Predictions",
    year=2017,
    url="https://arxiv.org/abs/1710.04806",
    accepts=("image",),
    departs=(
        "convolutions start by torch's law; the released code draws them from N(0, 0.01^2), with which the first epochs learn nothing",
        "where no optimizer is named Adam has the rate 0.01, for runs of hundreds of steps; the paper's 330,000 steps have 0.002",
        "the image is normalised before the encoder; the decoder gives pixels from 0 to 1 as in the paper",
        "a head that is put in for other classes has a bias and torch's law; the paper's has none and starts uniform between 0 and 1",
    ),
    tiny={"widths": (4, 4), "prototypes": 3},
    variants={"prototype-net-mini": {"widths": (32, 64, 40)}},
    small=("prototype-net-mini", "prototype-net"),
    published={
        "prototype-net": {
            "size": 28,
            "classes": 10,
            "parameters": 44153,
            "why": "counted here with three channels; the released network reads one, and with one the count is the published number exactly",
        },
    },
    optimizer="adamw:lr=0.01,weight_decay=0.0",
    idle=("decoder",),  # learns by the technique prototype-loss alone
)


def around(side: int) -> tuple[int, int]:
    """Rows before and after for a 3x3 convolution of stride 2 that gives ``ceil(side / 2)``: the odd one comes after ('same' padding)."""
    total = (-(-side // 2) - 1) * 2 + 3 - side
    return total // 2, total - total // 2


def squared_distances(z: Float[Tensor, "n q"], p: Float[Tensor, "m q"]) -> Float[Tensor, "n m"]:
    """``|z_i - p_j|^2``."""
    return (z[:, None] - p).square().sum(2)


@final
class Down(nn.Module):
    """3x3 convolution of stride 2 with 'same' padding, ReLU."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, 2)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        return F.relu(self.conv(F.pad(x, (*around(x.shape[3]), *around(x.shape[2])))))


@final
class Up(nn.Module):
    """The transposed convolution that mirrors a :class:`Down` of images of ``size``; ReLU, or a sigmoid where it gives pixels."""

    def __init__(self, c_in: int, c_out: int, size: tuple[int, int], pixels: bool) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(c_in, c_out, 3, 2)
        self.size, self.pixels = size, pixels

    def forward(self, x: Float[Tensor, "n c i j"]) -> Float[Tensor, "n d h w"]:
        top, left = (around(side)[0] for side in self.size)
        y = self.conv(x)[..., top : top + self.size[0], left : left + self.size[1]]
        return y.sigmoid() if self.pixels else F.relu(y)


@final
class PrototypeNet(Headed):
    """Encoder f, ``prototypes`` codes p_j, and scores ``W d`` of the squared distances ``d_j = |f(x) - p_j|^2``; a decoder g for codes (section 3).

    ``widths`` are the channels of the encoder, which halves the side with each; the decoder mirrors it. Prototypes and W start uniform in [0, 1), W has
    no bias; a small distance speaks for the classes whose weight is below the others'. Made for images of ``img_size`` (rows, columns). The decoder
    learns only under ``--with prototype-loss``, and the prototypes are images only then.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 1,
        widths: Sequence[int] = (32, 32, 32, 10),
        prototypes: int = 15,
        img_size: Sequence[int] = (28, 28),
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1 or prototypes < 1:
            raise Mistake(f"prototype-net: widths={tuple(widths)}, prototypes={prototypes}: needs at least one convolution, and one prototype")
        self.num_classes, self.num_features, self.in_chans = num_classes, prototypes, in_chans
        sizes = [(int(img_size[0]), int(img_size[1]))]
        for _ in widths:
            sizes.append((-(-sizes[-1][0] // 2), -(-sizes[-1][1] // 2)))
        channels = [in_chans, *widths]
        self.size, self.code = sizes[0], (channels[-1], *sizes[-1])
        self.encoder = nn.Sequential(*(Down(a, b) for a, b in itertools.pairwise(channels)))
        steps = range(len(widths) - 1, -1, -1)
        self.decoder = nn.Sequential(*(Up(channels[i + 1], channels[i], sizes[i], pixels=i == 0) for i in steps))
        self.prototypes = nn.Parameter(torch.rand(prototypes, self.code[0] * self.code[1] * self.code[2]))
        self.fc = nn.Linear(prototypes, num_classes, bias=False)
        nn.init.uniform_(self.fc.weight)
        self.feature_info = maps(*((f"encoder.{i}", width, 2 ** (i + 1)) for i, width in enumerate(widths)))

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The code f(x), as a map. Raises Mistake for images of another size than the network was made for."""
        if tuple(x.shape[2:]) != self.size:
            raise Mistake(f"prototype-net: made for {self.size[0]}x{self.size[1]} pixels, got {x.shape[2]}x{x.shape[3]}; its codes have one size")
        return self.encoder(x)

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n m"]:
        """Squared distances to the prototypes, in full precision."""
        return squared_distances(full(features.flatten(1)), self.prototypes)

    def decode(self, codes: Float[Tensor, "n q"]) -> Float[Tensor, "n c h w"]:
        """The images g of codes, pixels from 0 to 1."""
        return self.decoder(codes.unflatten(1, self.code))
