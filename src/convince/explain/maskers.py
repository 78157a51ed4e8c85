"""Maskers: ways to hide a part of a picture from a network, by name and with one signature, and how much each of them disturbs it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from convince.errors import Mistake, nearest
from convince.explain.faithfulness import blurred
from convince.explain.passes import ROWS, scores
from convince.fit.precision import full
from convince.fit.randomness import generator


def _mean(answer: nn.Module, x: Tensor) -> Tensor:
    """The mean of the training images, which the answer's normalisation knows; 0.5 where there is none."""
    mean = getattr(getattr(answer, "normalise", None), "mean", None)
    return torch.full_like(x[:1, :, :1, :1], 0.5) if mean is None else mean.to(x)


def _noise(answer: nn.Module, x: Tensor) -> Tensor:
    return torch.rand(1, *x.shape[1:], generator=generator("masker noise")).to(x)


FILLS: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "black": lambda answer, x: torch.zeros_like(x[:1]),
    "grey": lambda answer, x: torch.full_like(x[:1], 0.5),
    "mean": _mean,
    "blur": lambda answer, x: blurred(x),
    "noise": _noise,
}
"""What a hidden pixel becomes [0, 1], for images x: a tensor that broadcasts to them."""

MASKERS = (*FILLS, "layer")


def check_masker(name: str, who: str) -> None:
    """Refuse a masker that does not exist."""
    if name not in MASKERS:
        raise Mistake(f"{who}: masker={name!r} is none{nearest(str(name), list(MASKERS))} Maskers: {', '.join(MASKERS)}")


@torch.no_grad()
def masked_scores(answer: nn.Module, x: Float[Tensor, "n c h w"], keep: Bool[Tensor, "n m 1 h w"], masker: str = "grey") -> Float[Tensor, "n m k"]:
    """Scores of each image under each of its masks; ``keep`` is false where a pixel is hidden (masks shared by all images: ``expand`` them).

    ``masker`` "black", "grey" (0.5), "mean" (of the training images), "blur" and "noise" change pixels; "layer" leaves the pixels out of every
    layer (:mod:`convince.explain.layer_masking`) and takes convolutional networks only. At most 64 rows at a time. The answer must be in eval mode.
    """
    check_masker(masker, "masked_scores")
    from convince.explain.layer_masking import masked_forward  # explains by LIME, which hides pixels by this function

    fill = FILLS[masker](answer, x)[:, None] if masker != "layer" else None
    found = []
    for some in keep.split(max(1, ROWS // len(x)), 1):
        if fill is not None:
            found.append(scores(answer, torch.where(some, x[:, None], fill).flatten(0, 1)).unflatten(0, some.shape[:2]))
        else:
            shown = x[:, None].expand(-1, some.shape[1], -1, -1, -1).flatten(0, 1)
            pairs = zip(shown.split(ROWS), some.flatten(0, 1).split(ROWS), strict=True)
            found.append(torch.cat([full(masked_forward(answer, part, mask)) for part, mask in pairs]).unflatten(0, some.shape[:2]))
    return torch.cat(found, 1)


def class_entropy(predicted: Tensor, classes: int) -> float:
    """Entropy [nats] of how predictions [any shape, class numbers] spread over the classes; 0 where they all fall on one."""
    shares = torch.bincount(predicted.flatten(), minlength=classes).double() / predicted.numel()
    return float(torch.special.entr(shares).sum())


def missingness(answer: nn.Module, x: Float[Tensor, "n c h w"], keep: Bool[Tensor, "n m 1 h w"], masker: str) -> dict[str, float]:
    """What hiding does to predictions: "agreement" with those of the whole picture (0 to 1), and "class entropy" [0 to 1, of its largest possible value].

    A masker that a network takes for "nothing there" keeps both high; one that it takes for an object of its own collapses predictions.
    """
    whole = scores(answer, x).argmax(1)
    found = masked_scores(answer, x, keep, masker)
    predicted, k = found.argmax(2), found.shape[2]
    return {"agreement": float((predicted == whole[:, None]).double().mean()), "class entropy": class_entropy(predicted, k) / math.log(max(k, 2))}
