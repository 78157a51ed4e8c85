"""FractalNet: a deep network made by a self-similar rule instead of skip connections, trained with drop-path."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="fractalnet",
    kind="backbone",
    title="FractalNet: Ultra-Deep Neural Networks without Residuals",
    paper="fractalnet",
    year=2017,
    url="https://arxiv.org/abs/1605.07648",
    accepts=("image",),
    departs=(
        "20 layers have 33,724,618 parameters and 40 layers 76,106,634 by this rule; the paper prints 38.6 M and (narrower) 22.9 M, which it does not give",
        "dropout, the paper's 0 to 0.4 over five blocks, is off by default: dropout=0.4 switches it on",
        "a convolution that drop-path drops is not computed, so its batch statistics rest in that step",
        "images that do not shrink to one pixel are averaged over what is left",
    ),
    tiny={"widths": (4, 8), "columns": 2},
    variants={
        "fractalnet20": {"columns": 3},
        "fractalnet40": {"columns": 4},
        "fractalnet-small": {"widths": (16, 32, 64), "columns": 3},
    },
    small=("fractalnet-small",),
)

Alive = Callable[[int, int, Sequence[int]], Sequence[int]]
"""``alive(block, depth, columns)``: which of the columns that end at this depth take part in the join."""


def fractal(z: Tensor, columns: Sequence[Sequence[Callable[[Tensor], Tensor]]], alive: Callable[[int, Sequence[int]], Sequence[int]]) -> Tensor:
    """``f_C(z)`` (eq. 1): ``columns[c - 1]`` holds column c's convolutions, ``2 ** (C - c)`` of them, evenly spaced.

    All columns that have a convolution ending at a depth are joined there by their mean, and the mean goes on in each of
    them. ``alive(depth, columns)`` names those that are not dropped. Only what the result needs is computed.
    """
    joined = {0: z}

    def at(depth: int) -> Tensor:
        if depth not in joined:
            ending = [c for c in range(1, len(columns) + 1) if depth % 2 ** (c - 1) == 0]
            kept = alive(depth, ending)
            spans = [2 ** (c - 1) for c in kept]
            inputs = [columns[c - 1][depth // span - 1](at(depth - span)) for c, span in zip(kept, spans, strict=True)]
            joined[depth] = sum(inputs[1:], inputs[0]) / len(inputs)
        return joined[depth]

    return at(2 ** (len(columns) - 1))


def local_draw(sizes: Sequence[int], p: float) -> list[list[bool]]:
    """For joins of these sizes, which inputs live: each dropped with probability ``p``, at least one kept (drawn at random).

    Draws from torch's global state, which the loop seeds at each step.
    """
    draws = torch.rand(len(sizes), max(sizes) + 1).tolist()
    rows = []
    for size, (spare, *row) in zip(sizes, draws, strict=True):
        keep = [value >= p for value in row[:size]]
        if not any(keep):
            keep[min(int(spare * size), size - 1)] = True
        rows.append(keep)
    return rows


@final
class Unit(nn.Sequential):
    """conv3x3 - dropout - BN - ReLU."""

    def __init__(self, c_in: int, c_out: int, dropout: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, 1, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.bn = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU(inplace=True)


@final
class FractalBlock(nn.Module):
    """``2 ** C - 1`` units in ``C`` columns; column 1 is the deepest, column C a single unit."""

    def __init__(self, c_in: int, c_out: int, columns: int, dropout: float = 0.0) -> None:
        super().__init__()
        depth = 2 ** (columns - 1)
        self.columns = nn.ModuleList()
        for c in range(1, columns + 1):
            self.columns.append(nn.Sequential(*(Unit(c_in if i == 0 else c_out, c_out, dropout) for i in range(depth // 2 ** (c - 1)))))
        self.pool = nn.MaxPool2d(2)

    def forward(self, z: Float[Tensor, "n c h w"], alive: Callable[[int, Sequence[int]], Sequence[int]]) -> Float[Tensor, "n d i j"]:
        return self.pool(fractal(z, [list(column) for column in self.columns], alive))  # type: ignore[call-overload]


@final
class FractalNet(Headed):
    """A fractal block and a 2x2 max-pool for each of ``widths``, then a linear head; depth ``len(widths) * 2 ** (columns - 1)``.

    ``drop_path``: the probability that a join drops an input, in a local step; in half of the training steps one column is
    drawn for the whole network instead (global). 0 switches both off. ``dropout``: its rate in the last block, rising evenly
    from 0 in the first. The image's shorter side must be at least ``2 ** len(widths)`` pixels.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        columns: int = 3,
        drop_path: float = 0.15,
        dropout: float = 0.0,
        img_size: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if not widths or columns < 1:
            raise Mistake(f"fractalnet: widths={tuple(widths)}, columns={columns}: at least one block and one column")
        for name, value in (("drop_path", drop_path), ("dropout", dropout)):
            if not 0 <= value < 1:
                raise Mistake(f"fractalnet: {name}={value!r} must be a probability from 0 up to but not including 1")
        self.num_classes, self.num_features, self.in_chans = num_classes, widths[-1], in_chans
        self.columns, self.drop_path, self.side = columns, drop_path, 2 ** len(widths)
        if img_size is not None:
            self._check(*img_size)
        rates = [dropout * i / max(len(widths) - 1, 1) for i in range(len(widths))]
        self.blocks = nn.ModuleList(FractalBlock(a, b, columns, rate) for a, b, rate in zip([in_chans, *widths], widths, rates, strict=False))
        self.fc = nn.Linear(widths[-1], num_classes)
        self.feature_info = maps(*((f"blocks.{i}", width, 2 ** (i + 1)) for i, width in enumerate(widths)))
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(self.fc.bias)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last feature map; in training mode with one draw of drop-path for the whole batch.

        A parameter that the draw leaves out gets a gradient of zero, not none: its momentum and weight decay go on, as where all paths are computed.
        """
        if not (self.training and self.drop_path > 0):
            return self._features(x, everything)
        return self._features(x, self._draw()) + 0 * sum(p.sum() for p in self.blocks.parameters())

    def pool(self, features: Float[Tensor, "n d i j"]) -> Float[Tensor, "n e"]:
        """Pooled features."""
        return features.mean((2, 3))

    def forward_column(self, x: Float[Tensor, "n c h w"], column: int) -> Float[Tensor, "n k"]:
        """The scores with one column alone, as in a global step of drop-path; 1 is the deepest."""
        self._check_column(column)
        return self.forward_head(self._features(x, lambda block, depth, ending: [column]))

    def _features(self, x: Tensor, alive: Alive) -> Tensor:
        self._check(*x.shape[-2:])
        for i, block in enumerate(self.blocks):
            x = block(x, lambda depth, ending, i=i: alive(i, depth, ending))
        return x

    def _draw(self) -> Alive:
        """One mini-batch's drop-path: global (a column for the whole network) or local (each join by itself), half of the time each."""
        if torch.rand(()).item() < 0.5:
            column = int(torch.randint(1, self.columns + 1, ()).item())
            return lambda block, depth, ending: [column]
        joins = [(i, depth) for i in range(len(self.blocks)) for depth in range(1, 2 ** (self.columns - 1) + 1)]
        sizes = [sum(depth % 2**c == 0 for c in range(self.columns)) for _, depth in joins]
        rows: dict[tuple[int, int], list[bool]] = dict(zip(joins, local_draw(sizes, self.drop_path), strict=True))
        return lambda block, depth, ending: [c for c, keep in zip(ending, rows[block, depth], strict=True) if keep]

    def _check(self, h: int, w: int) -> None:
        if min(h, w) < self.side:
            blocks, fitting = self.side.bit_length() - 1, max(min(h, w).bit_length() - 1, 1)
            raise Mistake(
                f"fractalnet: {blocks} blocks halve the image {blocks} times, so its shorter side must be at least {self.side} pixels; it has {h}x{w}. "
                f"Give larger images (--size {self.side}) or fewer widths, such as --model fractalnet:widths={(16, 32, 64)[:fitting]}"
            )

    def _check_column(self, column: int) -> None:
        if not 1 <= column <= self.columns:
            raise Mistake(f"fractalnet: column={column!r} must be one of 1 (deepest) to {self.columns} (a single unit a block)")


def everything(block: int, depth: int, ending: Sequence[int]) -> Sequence[int]:
    """No path is dropped: what runs at test time."""
    return ending


def extract_column(model: FractalNet, column: int) -> nn.Sequential:
    """The plain sequential network of one column's units (1 is the deepest); it shares its weights with ``model``."""
    model._check_column(column)
    layers: list[nn.Module] = []
    for block in model.blocks:
        layers += [*block.columns[column - 1], block.pool]  # type: ignore[index, list-item]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(1), model.fc)


def anytime_predict(model: FractalNet, x: Float[Tensor, "n c h w"]) -> Iterator[tuple[int | Literal["all"], Float[Tensor, "n k"]]]:
    """Scores that come as they are ready: column C, the shallowest, first, then deeper ones, last the whole network ("all").

    Take the latest when time is up. Eval mode, no gradient; the model's mode is put back.
    """
    for column in [*range(model.columns, 0, -1), None]:
        with _resting(model), torch.no_grad():
            scores = model(x) if column is None else model.forward_column(x, column)
        yield ("all" if column is None else column), scores


@contextlib.contextmanager
def _resting(model: nn.Module) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training
