"""ROAR and KAR: remove what an explainer ranks highest (or keep only that), train anew, and see what is still learnt."""

from __future__ import annotations

import dataclasses
import statistics
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Generator, Tensor, nn

from convince.data import Data, MemoryStore
from convince.errors import Mistake
from convince.fit.randomness import generator
from convince.kinds import Explainer, Study
from convince.parts import Card
from convince.types import Budget

CARD = Card(
    part="roar",
    kind="study",
    paper="roar",
    title="A Benchmark for Interpretability Methods in Deep Neural Networks",
    year=2018,
    url="https://arxiv.org/abs/1806.10758",
    departs=(
        "one small network on one small set, where the paper trains ResNet-50 on ImageNet, Birdsnap and Food-101 five times a cell",
        "pixels that are removed become the mean of the training pixels, rounded to whole grey levels",
    ),
    tiny={"methods": ("saliency",), "fractions": (0.5,), "seeds": 1},
)
RANKS = ("signed", "abs", "square")
CONTROLS = ("random", "sobel")


# -- what is removed -----------------------------------------------------------------------------------


def ranking(estimate: Float[Tensor, "n ..."], rank: str = "signed", per: str = "dimension") -> Float[Tensor, "n ..."]:
    """What pixels are ordered by: the estimate itself, its size or its square; "pixel" sums over channels [n c h w], so that they go together."""
    if rank not in RANKS or per not in ("dimension", "pixel"):
        raise Mistake(f"roar: rank={rank!r} must be one of {', '.join(RANKS)}, per={per!r} 'dimension' or 'pixel'")
    found = estimate if rank == "signed" else estimate.abs() if rank == "abs" else estimate.square()
    return found.sum(1, keepdim=True).expand_as(found) if per == "pixel" else found


def remove(x: Float[Tensor, "n c h w"], order: Float[Tensor, "n c h w"], fraction: float, fill: Float[Tensor, "c 1 1"], keep: bool = False) -> Tensor:
    """Put ``fill`` in place of the ``fraction`` of each image's numbers with the highest ``order`` (ROAR), or with the lowest (``keep``: KAR).

    As many as ``round(fraction * c h w)``; of equal ones those that come first.
    """
    if not 0 <= fraction <= 1:
        raise Mistake(f"roar: fraction={fraction} must be from 0 to 1")
    count = round(fraction * order[0].numel())
    first = order.flatten(1).argsort(dim=1, descending=not keep, stable=True)[:, :count]
    gone = torch.zeros_like(order.flatten(1), dtype=torch.bool).scatter_(1, first, True).view_as(order)
    return torch.where(gone, fill, x)


def sobel(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Strength of edges, a ranking that knows nothing of the network."""
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], dtype=x.dtype, device=x.device)
    both = torch.stack([kernel, kernel.T])[:, None]
    padded = F.pad(x.flatten(0, 1)[:, None], [1] * 4, mode="replicate")
    return F.conv2d(padded, both).norm(dim=1).view_as(x)


def signed_estimate(explainer: Explainer, answer: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """What an explainer says of each number of the image for the predicted class: its attribution or gradient, or its map for every channel."""
    found = explainer(answer, x)
    for name in ("attribution", "gradient"):
        if name in found.images and found.images[name].shape == x.shape:
            return found.images[name].detach()
    if found.map is None:
        raise Mistake(f"roar: {type(explainer).__name__} gives no map to rank pixels by; choose another method")
    return found.map.detach().expand_as(x)


def damaged(data: Data, order: Float[Tensor, "N c h w"], fraction: float, keep: bool = False) -> Data:
    """The same data with every image, of training and test, damaged by :func:`remove`; the fill is the mean training pixel of each channel."""
    x = data.float_batch(data.x.take(torch.arange(len(data.y))))
    fill = x[data.split.train].mean((0, 2, 3))[:, None, None]
    gone = remove(x, order, fraction, fill, keep)
    return dataclasses.replace(data, x=MemoryStore((gone * 255).round().to(torch.uint8)))


def at_random(data: Data, gen: Generator) -> Float[Tensor, "N c h w"]:
    """A ranking that knows nothing."""
    return torch.rand((len(data.y), data.preprocess.channels, *data.preprocess.size), generator=gen)


def rows_of(explainer: Explainer, answer: nn.Module, data: Data, batch: int = 256) -> Float[Tensor, "N c h w"]:
    """:func:`signed_estimate` of every image of the pool."""
    return torch.cat([signed_estimate(explainer, answer, data.float_batch(data.x.take(rows))) for rows in torch.arange(len(data.y)).split(batch)])


# -- the study -----------------------------------------------------------------------------------------


@final
@dataclass
class Roar(Study):
    """Accuracy of networks trained on images without what each method marks, less that of networks trained without random pixels.

    ``methods``: explainers by name, with options; ``fractions`` of the pixels removed; ``keep`` removes what is marked least instead (KAR);
    ``rank``: "signed" as in the paper's code, "abs" or "square". ``data``: a built-in set, folder or table of images.
    """

    data: str = "digits"
    model: str = "small-cnn"
    methods: tuple[str, ...] = ("integrated-gradients:steps=25", "smoothgrad:aggregate=square", "smoothgrad:aggregate=variance")
    fractions: tuple[float, ...] = (0.3, 0.6, 0.9)
    seeds: int = 2
    rank: str = "signed"
    keep: bool = False

    def run(self, budget: Budget) -> dict[str, Any]:
        """The table: one row a method and fraction, means over seeds. ``budget`` is that of one training, in epochs."""
        from convince import parts
        from convince.data import load
        from convince.fit.settings import settings
        from convince.fit.train import train

        if budget.unit != "epochs" or budget.value < 1:
            raise Mistake(f"roar: a budget of {budget.value:g} {budget.unit} does not fit; give whole epochs of one training")
        table: list[dict[str, Any]] = []
        rows: dict[tuple[str, float], list[float]] = {}
        for seed in range(self.seeds):
            data = load(self.data, seed=seed)
            if data.preprocess.kind != "image" or not len(data.split.test):
                raise Mistake(f"roar: {self.data} must be images with a test part")
            how = settings(model=self.model, augment="none", epochs=round(budget.value), seed=seed)
            base = train(how, data)
            assert base.test is not None
            rows.setdefault(("nothing", 0.0), []).append(base.test.accuracy)
            pixels = data.float_batch(data.x.take(torch.arange(len(data.y))))
            orders = {"random": at_random(data, generator(seed, "roar", "random")), "sobel": sobel(pixels)}
            for spec in self.methods:
                name, options = parts.parse(spec)
                orders[spec] = ranking(rows_of(parts.make(name, **options), base.answer, data), self.rank)
            for method, order in orders.items():
                for fraction in self.fractions:
                    done = train(how, damaged(data, order, fraction, self.keep))
                    assert done.test is not None
                    rows.setdefault((method, fraction), []).append(done.test.accuracy)
        for (method, fraction), found in rows.items():
            beside = rows.get(("random", fraction))
            less = None if beside is None else statistics.fmean(a - b for a, b in zip(found, beside, strict=True))
            table.append({"method": method, "fraction": fraction, "accuracy": statistics.fmean(found), "less random": less, "n": len(found)})
        print(self._page(table))
        return {**asdict(self), "budget": asdict(budget), "table": table}

    def _page(self, table: list[dict[str, Any]]) -> str:
        what = "kept alone" if self.keep else "removed"
        lines = [f"test accuracy in %, trained anew on {self.data} with what each method marks {what}, {self.seeds} seed(s); in brackets less random"]
        lines.append(f"{'method':<36}" + "".join(f"{f'{t:.0%}':>18}" for t in self.fractions))
        base = next(r for r in table if r["method"] == "nothing")
        lines.append(f"{'nothing removed':<36}{100 * base['accuracy']:>18.1f}")
        for method in dict.fromkeys(r["method"] for r in table if r["method"] != "nothing"):
            cells = [r for r in table if r["method"] == method]
            lines.append(f"{method:<36}" + "".join(f"{100 * r['accuracy']:>9.1f} ({100 * r['less random']:+5.1f})" for r in cells))
        return "\n".join(lines)
