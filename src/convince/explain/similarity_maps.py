"""Similarity maps: the cosine of two images' features as a sum over places, so that one sees which regions made them alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from convince.errors import Mistake
from convince.explain.layer import Layer, find_layer
from convince.explain.targets import Similarity
from convince.fit.precision import full
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="similarity-maps",
    kind="explainer",
    paper="similarity-viz",
    title="Visualizing Deep Similarity Networks",
    year=2019,
    url="https://arxiv.org/abs/1901.00536",
    expects=("images",),
    departs=(
        "of a class, where no second image is given, the map splits the cosine between the features and the class's weights; the paper compares two images",
        "between the layer and the features may lie any piecewise linear network, its constants spread evenly; the paper has a pooling and a linear layer",
        "a tie of max pooling goes to the place from which the network's own pooling passes it, in similarity_map evenly to all as in the paper",
    ),
)

POOLS = ("avg", "max")
BENT = 1e-3  # change of the slopes along the features, relative to the slopes, above which features are no sum over places


def pooled(features: Float[Tensor, "n d i j"], pool: str = "avg") -> Float[Tensor, "n d"]:
    """f: the mean or the largest value of each channel over the plane."""
    return features.mean((2, 3)) if pool == "avg" else features.amax((2, 3))


def places(features: Float[Tensor, "n d i j"], pool: str = "avg") -> Float[Tensor, "n d i j"]:
    """What each place gives to :func:`pooled`: ``X / (h w)``, or the surrogate of max pooling: the maximum where it stands, split over ties."""
    if pool == "avg":
        return features / features[0, 0].numel()
    best = features == features.amax((2, 3), keepdim=True)
    return features * best / best.sum((2, 3), keepdim=True)


def similarity_map(
    a: Float[Tensor, "n d i j"],
    b: Float[Tensor, "n d k l"],
    pool: str = "avg",
    head: tuple[Float[Tensor, "e d"], Float[Tensor, " e"]] | None = None,
) -> tuple[Float[Tensor, "n 1 i j"], Float[Tensor, "n 1 k l"]]:
    """The maps of ``a`` and ``b`` [last feature maps of n pairs]; each sums to the cosine of their pooled features.

    With ``head = (W, c)`` the features are ``e = W f + c``; the constant's part is spread evenly over the plane.
    """
    if pool not in POOLS:
        raise Mistake(f"similarity-maps: pool={pool!r} must be one of {', '.join(POOLS)}")
    weight, constant = head if head is not None else (torch.eye(a.shape[1]).to(a), a.new_zeros(a.shape[1]))
    e_a, e_b = (pooled(x, pool) @ weight.T + constant for x in (a, b))
    lengths = (e_a.norm(dim=1) * e_b.norm(dim=1)).clamp_min(1e-12)[:, None, None, None]

    def one(x: Tensor, other: Tensor) -> Tensor:
        own = torch.einsum("ndij,nd->nij", places(x, pool), other @ weight)[:, None]
        return (own + ((other @ constant) / x[0, 0].numel())[:, None, None, None]) / lengths

    return one(a, e_b), one(b, e_a)


def region_query(
    query: Float[Tensor, "d i j"], box: tuple[int, int, int, int], gallery: Float[Tensor, "m d k l"], pool: str = "avg"
) -> tuple[Int[Tensor, " m"], Float[Tensor, " m"]]:
    """Search by a part of an image: the gallery's rows, most alike first, and each row's cosine with the query's features pooled inside the box alone.

    ``box``: (left, top, right, bottom) in cells of the feature map, ends excluded. Feature maps of an answer: ``score_cam.maps_of``.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= query.shape[2] and 0 <= top < bottom <= query.shape[1]):
        raise Mistake(
            f"similarity-maps: box={box}: must be (left, top, right, bottom), ends excluded, in a plane of {query.shape[1]} rows and {query.shape[2]} columns"
        )
    inside = pooled(query[None, :, top:bottom, left:right], pool)
    cosine = F.cosine_similarity(inside, pooled(gallery, pool), dim=1)
    return cosine.argsort(descending=True, stable=True), cosine


def split(
    view: Similarity, x: Float[Tensor, "n c h w"], other: Float[Tensor, "m d"], layer: Layer
) -> tuple[Float[Tensor, "n 1 i j"], Float[Tensor, " n"], Float[Tensor, " n"]]:
    """The cosine of ``view.features(x)`` and ``other`` (one row, or one an image) as a sum over the layer's places; the cosine; the constants' part of it.

    A place gives ``X(p) . d(f . v)/dX(p)``, with ``v = other / (|f| |other|)`` held still: what :func:`similarity_map` gives for mean and max
    pooling and a linear head, and exact for every piecewise linear way from X to f, up to constants. Where the slopes change along X (a
    layer norm, a GELU) there is no such sum: a Mistake.
    """
    taken: list[Tensor] = []

    def begin(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        taken.append(output.detach().requires_grad_(True))
        return taken[-1].clone()  # what follows may change its input in place (ReLU)

    handle = view.answer.get_submodule(layer.name).register_forward_hook(begin)
    try:
        with sdpa_kernel(SDPBackend.MATH):  # the fast attentions have no second derivative
            f = full(view.features(x))
    finally:
        handle.remove()
    other = other.to(f)
    lengths = (f.norm(dim=1, keepdim=True) * other.norm(dim=1, keepdim=True)).clamp_min(1e-12)
    toward = (f * (other / lengths).detach()).sum(1)
    (slopes,) = torch.autograd.grad(toward.sum(), taken[-1], create_graph=True, allow_unused=True)
    if slopes is None:
        raise Mistake(f"similarity-maps: the features do not depend on layer {layer.name!r}; leave layer= out, or name one before the last linear layer")
    if slopes.requires_grad:
        (bend,) = torch.autograd.grad((slopes * taken[-1].detach()).sum(), taken[-1], allow_unused=True)
        if bend is not None and float(bend.abs().max()) > BENT * float(slopes.detach().abs().max()):
            raise Mistake(
                f"similarity-maps: what lies between layer {layer.name!r} and the last linear layer is no pooling and no piecewise linear network "
                "(a layer norm, a class token), so the cosine is no sum over places; use grad-cam, which explains a likeness too"
            )
    own = layer.fold(full(taken[-1].detach() * slopes.detach())).sum(1, keepdim=True)
    cosine = toward.detach()
    constant = cosine - own.sum((1, 2, 3))
    return own + (constant / own[0].numel())[:, None, None, None], cosine, constant


def class_weights(view: Similarity, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "k d"]:
    """The weights of the last linear layer, whose output must be the answer's scores."""
    head = view.answer.get_submodule(view.head)
    assert isinstance(head, nn.Linear)
    with torch.no_grad():
        given, scores = head(view.features(x[:1])), view.answer(x[:1])
    if given.shape != scores.shape or not torch.allclose(given, scores, rtol=1e-3, atol=1e-4):
        raise Mistake(
            f"similarity-maps: the scores of this answer are not what its last linear layer {view.head!r} gives, so a class has no features of its own to be "
            "like; compare with another image: convince explain RUN FILE --method similarity-maps --like FILE"
        )
    return head.weight


@final
@dataclass
class SimilarityMaps(Explainer):
    """The map of :func:`split`, enlarged to the image (bilinear) where ``upsample`` is set; without, each map sums to the cosine.

    For an answer that is a :class:`~convince.explain.targets.Similarity` (``convince explain --like FILE``) it splits the likeness to that image;
    for class scores the cosine between the features and the weights of the class. Negative values speak against the likeness. The table has
    each cosine of the (first) batch and the part of it that comes from constants (biases) and is spread evenly. ``layer``: None is found.
    """

    layer: str | None = None
    upsample: bool = True

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "similarity-maps")
        layer = find_layer(answer, x, target, self.layer, "similarity-maps")
        x = x.detach()
        if isinstance(answer, Similarity):
            view, what, other = answer, "likeness to an image", answer.other
            layer = Layer(layer.name.removeprefix("answer."), layer.order, layer.plane, layer.prefix)
        else:
            view, what = Similarity(answer, x[:1]), "likeness to the class's weights"
            other = class_weights(view, x)[target]
        assert isinstance(other, Tensor)
        found, cosine, constant = split(view, x, other, layer)
        if self.upsample:
            found = F.interpolate(found, size=x.shape[2:], mode="bilinear", align_corners=False)
        table = {"layer": layer.name, "plane": list(layer.plane), "explains": what, "cosine": cosine.tolist(), "constant": constant.tolist()}
        return Explanation(found, table=table)
