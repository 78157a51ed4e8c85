"""Sequencer2D: a vision transformer's layout with LSTMs along the rows and columns of the patch grid in place of attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from timm.layers import DropPath
from timm.models import sequencer
from torch import Tensor, nn

from convince.errors import Mistake
from convince.parts import Card

CARD = Card(
    part="sequencer2d",
    kind="backbone",
    paper="sequencer2d",
    title="Sequencer: Deep LSTM for Image Classification",
    year=2022,
    url="https://arxiv.org/abs/2205.01972",
    accepts=("image",),
    departs=(
        "an image whose side is no multiple of all patches together is filled up with zeros below and on the right; the paper's sides are multiples",
        "drop path rises evenly over the blocks, as in the authors' code; timm gives every block the same rate",
        "the mini sizes are ours, for 28 to 64 pixels, and have no drop path",
        "the paper's learning rate for batches of 2,048 images, 0.002, is kept for small batches",
    ),
    tiny={"layers": (1, 1), "patches": (2, 2), "dims": (8, 16), "hidden": (2, 4)},
    variants={
        "sequencer2d-mini": {"layers": (2, 2), "patches": (4, 2), "dims": (48, 96), "hidden": (12, 24), "drop_path": 0.0},
        "v-sequencer-mini": {"layers": (4,), "patches": (4,), "dims": (78,), "hidden": (39,), "mixer": "1d", "drop_path": 0.0},
        "sequencer2d-s": {"layers": (4, 3, 8, 3), "drop_path": 0.1},
        "sequencer2d-m": {"layers": (4, 3, 14, 3), "drop_path": 0.2},
        "sequencer2d-l": {"layers": (8, 8, 16, 4), "drop_path": 0.4},
        "v-sequencer-s": {"layers": (18,), "patches": (14,), "dims": (384,), "hidden": (192,), "mixer": "1d"},
    },
    small=("sequencer2d-mini", "v-sequencer-mini"),
    published={
        "sequencer2d-s": {"size": 224, "classes": 1000, "parameters": 27651688, "macs": 8.4e9},
        "sequencer2d-m": {"size": 224, "classes": 1000, "parameters": 38307688, "macs": 11.1e9},
        "sequencer2d-l": {"size": 224, "classes": 1000, "parameters": 54298216, "macs": 16.6e9},
    },
    optimizer="adamw:lr=0.002,weight_decay=0.05",
)


@final
class Lstm1d(nn.Module):
    """All tokens of a map, row after row, as one sequence through one LSTM, whose outputs are the result: the mixer of V-Sequencer.

    ``input_size`` channels must be ``hidden_size``, times 2 where it is bidirectional. Takes what timm's blocks give to a mixer and ignores the rest.
    """

    def __init__(self, input_size: int, hidden_size: int, num_layers: int = 1, bidirectional: bool = True, **_: Any) -> None:
        super().__init__()
        self.rnn = nn.LSTM(input_size, hidden_size, num_layers, batch_first=True, bidirectional=bidirectional)

    def forward(self, x: Float[Tensor, "n h w c"]) -> Float[Tensor, "n h w c"]:
        return self.rnn(x.flatten(1, 2))[0].unflatten(1, x.shape[1:3])


@final
class Sequencer2d(sequencer.Sequencer2d):
    """timm's network in any size: ``x + BiLSTM2D(LN(x))``, ``x + MLP(LN(x))`` in each block (section 3.2), the mean over positions, a linear head.

    BiLSTM2D runs one LSTM along the columns and one along the rows, each of ``hidden`` units both ways, and a linear layer joins them:
    ``union`` "cat" their channels, "add" their sum, "vertical" or "horizontal" one alone. ``mixer`` "1d" is V-Sequencer's one LSTM over all
    tokens (:class:`Lstm1d`). ``layers`` blocks a stage, ``patches`` the side of the convolution before each, ``dims`` its channels.
    ``drop_path`` is the last block's chance to be skipped in training.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        layers: Sequence[int] = (4, 3, 8, 3),
        patches: Sequence[int] = (7, 2, 1, 1),
        dims: Sequence[int] = (192, 384, 384, 384),
        hidden: Sequence[int] = (48, 96, 96, 96),
        mixer: Literal["2d", "1d"] = "2d",
        union: Literal["cat", "add", "vertical", "horizontal"] = "cat",
        bidirectional: bool = True,
        drop_path: float = 0.1,
    ) -> None:
        if not len(layers) == len(patches) == len(dims) == len(hidden) > 0:
            raise Mistake(f"sequencer2d: layers={tuple(layers)}, patches={tuple(patches)}, dims={tuple(dims)}, hidden={tuple(hidden)}: one number a stage each")
        ways = 2 if bidirectional else 1
        if mixer == "1d" and any(ways * h != d for h, d in zip(hidden, dims, strict=True)):
            raise Mistake(f"sequencer2d: mixer='1d' has no linear layer, so hidden={tuple(hidden)} times {ways} must be dims={tuple(dims)}")
        super().__init__(
            num_classes,
            in_chans=in_chans,
            layers=tuple(layers),
            patch_sizes=tuple(patches),
            embed_dims=tuple(dims),
            hidden_sizes=tuple(hidden),
            mlp_ratios=(3.0,) * len(layers),
            rnn_layer=sequencer.LSTM2d if mixer == "2d" else Lstm1d,
            union=union,
            bidirectional=bidirectional,
        )
        self.step = math.prod(patches)
        for rate, block in zip(torch.linspace(0, drop_path, sum(layers), device="cpu").tolist(), self.blocks(), strict=True):
            block.drop_path = DropPath(rate)

    def blocks(self) -> list[nn.Module]:
        """The blocks of all stages, in order."""
        return [block for stage in self.stages for block in stage.blocks]  # type: ignore[union-attr]

    def forward_features(self, x: Float[Tensor, "n c i j"]) -> Float[Tensor, "n h w d"]:
        """The last map, channels last; an image is first filled up to a multiple of the patches."""
        return super().forward_features(F.pad(x, (0, -x.shape[3] % self.step, 0, -x.shape[2] % self.step)))

    def get_classifier(self) -> nn.Module:
        """The linear layer."""
        return self.head.fc


@torch.no_grad()
def resolution_curve(answer: nn.Module, x: Float[Tensor, "N c i j"], y: Int[Tensor, " N"], sizes: Sequence[int], batch: int = 250) -> dict[int, float]:
    """Test accuracy, 0 to 1, when images are brought to each side of ``sizes`` [pixels] by bilinear interpolation, without fine-tuning.

    ``answer`` gives scores [n k] for ``x`` in the scale that it takes, here [0, 1] pixels for a run's answer; its mode is put back.
    """
    modes = [(m, m.training) for m in answer.modules()]
    found = {}
    try:
        answer.eval()
        for size in sizes:
            hits = 0
            for rows, labels in zip(x.split(batch), y.split(batch), strict=True):
                resized = F.interpolate(rows, (size, size), mode="bilinear", antialias=size < max(rows.shape[2:]))
                hits += int((answer(resized).argmax(1) == labels).sum())
            found[size] = hits / len(y)
    finally:
        for module, training in modes:
            module.training = training
    return found
