"""Weak segmentation: the object of a saliency map, from colours of its strongest and weakest pixels and one minimum cut.

Section 3.2 of Simonyan, Vedaldi & Zisserman 2013 (https://arxiv.org/abs/1312.6034): an object's mask and box from a classifier that was never
taught where things are. Give the box to :func:`convince.explain.localisation.iou`, where more than 0.5 counts as found.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from convince.errors import Mistake
from convince.explain.localisation import box_from_map

CAPACITY = 1000  # one unit of energy in the whole numbers that scipy's flow wants
MOST = 100.0  # of a pixel's energy: more would only overflow


def colour_model(pixels: Float[np.ndarray, "m c"], components: int, seed: int) -> Any:
    """A Gaussian mixture of colours with at most ``components`` parts, as many as there are different colours."""
    from sklearn.mixture import GaussianMixture

    parts = max(1, min(components, len(np.unique(pixels, axis=0))))
    return GaussianMixture(parts, reg_covar=1e-3, random_state=seed).fit(pixels)


def min_cut(inside: Float[np.ndarray, "h w"], outside: Float[np.ndarray, "h w"], right: Float[np.ndarray, "h v"], down: Float[np.ndarray, "u w"]) -> np.ndarray:
    """The mask [h w] of least energy: ``inside`` summed over its pixels, ``outside`` over the others, ``right`` and ``down`` over the neighbours it parts.

    ``right`` [h w-1] and ``down`` [h-1 w] must be at least 0. Of masks with equal energy it is the smallest.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    h, w = inside.shape
    at = np.arange(h * w).reshape(h, w)
    source, sink = h * w, h * w + 1
    least = np.minimum(inside, outside)  # what every labelling pays
    edges = [
        (np.full(h * w, source), at.ravel(), (outside - least).ravel()),  # cut where the pixel is outside
        (at.ravel(), np.full(h * w, sink), (inside - least).ravel()),
    ]
    for a, b, weight in ((at[:, :-1], at[:, 1:], right), (at[:-1], at[1:], down)):
        edges += [(a.ravel(), b.ravel(), weight.ravel()), (b.ravel(), a.ravel(), weight.ravel())]
    start, end, weight = (np.concatenate(column) for column in zip(*edges, strict=True))
    whole = np.round(CAPACITY * weight).astype(np.int32)
    capacity = csr_array((whole, (start, end)), shape=(h * w + 2, h * w + 2))
    residual = csr_array(capacity - maximum_flow(capacity, source, sink).flow)
    residual.eliminate_zeros()
    reached = breadth_first_order(residual, source, return_predecessors=False)
    mask = np.zeros(h * w + 2, dtype=bool)
    mask[reached] = True
    return mask[: h * w].reshape(h, w)


def segment(
    image: Float[np.ndarray, "c h w"], found: Float[np.ndarray, "h w"], fg_q: float, bg_q: float, components: int, smoothness: float, seed: int
) -> np.ndarray:
    """The mask [h w] of one image: colours of both seeds, one cut, the largest connected component."""
    from scipy import ndimage

    colours = image.reshape(len(image), -1).T
    high, low = np.quantile(found, fg_q), np.quantile(found, bg_q)
    # where many values are equal (a map that is zero nearly everywhere) a seed still has pixels
    seeds = [(found >= high).ravel(), (found <= low).ravel()]
    inside, outside = (
        np.clip(-colour_model(colours[some], components, seed).score_samples(colours), -MOST, MOST).reshape(found.shape).astype(np.float64) for some in seeds
    )
    right, down = (np.square(np.diff(image, axis=axis)).sum(0) for axis in (2, 1))
    mean = max(float(np.concatenate([right.ravel(), down.ravel()]).mean()), 1e-12)  # 2 sigma^2 is twice the mean square of a difference
    mask = min_cut(inside, outside, *(smoothness * np.exp(-d / (2 * mean)) for d in (right, down)))
    labels, count = ndimage.label(mask)
    return labels == 1 + int(np.bincount(labels.ravel(), minlength=count + 1)[1:].argmax()) if count else mask


def weak_segmentation(
    x: Float[Tensor, "n c h w"],
    maps: Float[Tensor, "m 1 a b"],
    *,
    fg_q: float = 0.95,
    bg_q: float = 0.30,
    components: int = 3,
    smoothness: float = 2.0,
    grid: int = 64,
    seed: int = 0,
) -> tuple[Bool[Tensor, "n 1 h w"], Float[Tensor, "n 4"]]:
    """Masks of objects and their boxes (left, top, right, bottom) [pixels, ends excluded], each image by itself; ``maps`` are as large as images.

    Colours of the pixels at or above a map's quantile ``fg_q`` make the model of the object, those at or below ``bg_q`` that of the rest: mixtures
    of ``components`` Gaussians. The cut pays ``-log p(colour)`` at every pixel, and ``smoothness exp(-|dI|^2 / 2 sigma^2)`` between neighbours that it
    parts, sigma^2 the image's mean ``|dI|^2``. The largest component is kept; an empty one has the box (0, 0, 0, 0). Larger images are cut on a grid
    of at most ``grid`` pixels a side. The paper gives no ``smoothness`` and no ``components``: these are ours.
    """
    if x.dim() != 4 or maps.shape != (len(x), 1, *x.shape[2:]):
        raise Mistake(f"weak segmentation: images {tuple(x.shape)} and maps {tuple(maps.shape)}; they must be [n c h w] and [n 1 h w]")
    if not 0 <= bg_q < fg_q <= 1 or components < 1 or smoothness < 0 or grid < 2:
        raise Mistake(
            f"weak segmentation: bg_q={bg_q} must lie below fg_q={fg_q}, both 0 to 1; components={components} at least 1, "
            f"smoothness={smoothness} at least 0, grid={grid} at least 2"
        )
    size, shrink = x.shape[2:], max(1.0, max(x.shape[2:]) / grid)
    small = [max(2, round(side / shrink)) for side in size]
    images, found = (F.interpolate(t.detach().float().cpu(), size=small, mode="area") if shrink > 1 else t.detach().float().cpu() for t in (x, maps))
    masks = [segment(image.numpy(), m[0].numpy(), fg_q, bg_q, components, smoothness, seed) for image, m in zip(images, found, strict=True)]
    mask = F.interpolate(torch.from_numpy(np.stack(masks))[:, None].float(), size=size, mode="nearest")
    return (mask > 0).to(x.device), box_from_map(mask, 1.0).to(x.device)
