"""Tversky layer: likeness to learned prototypes by the features that both have and those that one lacks, in the place of a linear layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, final

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from convince.errors import Mistake
from convince.layers.poincare import in_full
from convince.layers.surgery import Surgery, find, refuse_nothing, swap
from convince.parts import Card

CARD = Card(
    part="tversky-layer",
    kind="layer",
    paper="tversky-layer",
    title="Tversky Neural Networks: Psychologically Plausible Deep Learning with Differentiable Tversky Similarity",
    year=2025,
    url="https://arxiv.org/abs/2506.11035",
    swaps=("Linear",),
    departs=(
        "there are as many features as inputs where no number is given; the released layer asks for one",
        "the ratio model has no theta, which the released layer keeps there without use",
        "gmean stays at least 1e-12, so that its gradient is finite where nothing is shared; the released form gives NaN there",
        "in a network it compares directions (normalize=true) from balanced first weights; normalize=false,init=released is the paper's, which needs Adam",
    ),
    tiny={"features": 6},
)

INTER = ("product", "min", "max", "mean", "gmean", "softmin")
DIFF = ("ignorematch", "subtractmatch")
SIMILARITY = ("contrast", "ratio")
INIT = ("released", "balanced")


# -- the measure -----------------------------------------------------------------------------------


def salience(a: Float[Tensor, "*n d"], features: Float[Tensor, "m d"]) -> tuple[Float[Tensor, "*n m"], Bool[Tensor, "*n m"]]:
    """How much of each feature ``a`` has, ``max(0, F a)``, and which it has at all: those with ``F a > 0``, a hard mask without gradient."""
    s = a @ features.T
    return s.relu(), s > 0


def intersection(sa: Tensor, sb: Tensor, has_a: Tensor, has_b: Tensor, inter: str = "product") -> Float[Tensor, "n p"]:
    """What ``a`` and ``b`` share: "product" ``sum_k s_a s_b``; the others reduce ``u``, a's salience of what both have, and ``v``, b's."""
    if inter == "product":
        return sa @ sb.T
    u, v = sa @ has_b.T, has_a @ sb.T
    match inter:
        case "min":
            return torch.minimum(u, v)
        case "max":
            return torch.maximum(u, v)
        case "mean":
            return (u + v) / 2
        case "gmean":
            return (u.clamp_min(1e-12) * v.clamp_min(1e-12)).sqrt()
    return -torch.logaddexp(-u, -v)  # softmin


def difference(sa: Tensor, sb: Tensor, has_a: Tensor, has_b: Tensor, diff: str = "ignorematch") -> Float[Tensor, "n p"]:
    """What ``a`` has and ``b`` lacks, ``sum_k s_a [b lacks k]``; "subtractmatch" adds by how much a's salience of what both have exceeds b's."""
    alone = sa @ (1 - has_b).T
    return alone if diff == "ignorematch" else alone + (sa @ has_b.T - has_a @ sb.T).relu()


def tversky(
    a: Float[Tensor, "n d"],
    b: Float[Tensor, "p d"],
    features: Float[Tensor, "m d"],
    theta: float | Tensor = 1.0,
    alpha: float | Tensor = 0.5,
    beta: float | Tensor = 0.5,
    inter: str = "product",
    diff: str = "ignorematch",
    similarity: str = "contrast",
) -> Float[Tensor, "n p"]:
    """Likeness of each ``a`` to each ``b``, from three matrix products; not symmetric where alpha differs from beta.

    "contrast": ``theta i(a, b) - alpha d(a, b) - beta d(b, a)``; "ratio": ``i / (i + alpha d(a, b) + beta d(b, a) + 1)``, without theta.
    """
    (sa, in_a), (sb, in_b) = salience(a, features), salience(b, features)
    has_a, has_b = in_a.to(sa.dtype), in_b.to(sb.dtype)
    shared = intersection(sa, sb, has_a, has_b, inter)
    apart = alpha * difference(sa, sb, has_a, has_b, diff) + beta * difference(sb, sa, has_b, has_a, diff).T
    return theta * shared - apart if similarity == "contrast" else shared / (shared + apart + 1)


# -- the layers ------------------------------------------------------------------------------------


def drawn(rows: int, columns: int, init: str, std: float) -> Float[Tensor, "r c"]:
    """First weights: from (0, 1) where ``init`` is "released", else normal with this deviation."""
    empty = torch.empty(rows, columns)
    return nn.init.uniform_(empty) if init == "released" else nn.init.normal_(empty, std=std)


class Tversky(nn.Module):
    """What both layers share: the features ``F`` [m d], and the learned ``theta`` (contrast only), ``alpha`` and ``beta``.

    ``inter`` and ``diff`` as in :func:`intersection` and :func:`difference`; ``normalize`` brings vectors, not features, to unit length first.
    ``init`` "released" draws features and prototypes from (0, 1), so that at first all features are in all prototypes; "balanced" draws both from
    normal laws, the features with deviation ``m ** -1/4``: half of them are in a prototype, and where m
    is about d the scores of unit vectors have a deviation of about 1.
    ``share_features``: another layer's ``F``, to be used in common. Computes in full precision also where the run is in bf16.
    """

    def __init__(
        self,
        d_in: int,
        n_features: int,
        inter: str = "product",
        diff: str = "ignorematch",
        similarity: str = "contrast",
        normalize: bool = False,
        init: str = "released",
        share_features: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        chosen = {"inter": (inter, INTER), "diff": (diff, DIFF), "similarity": (similarity, SIMILARITY), "init": (init, INIT)}
        for name, (value, words) in chosen.items():
            if value not in words:
                raise Mistake(f"tversky-layer: {name}={value!r} must be one of {', '.join(map(repr, words))}")
        if n_features < 1:
            raise Mistake(f"tversky-layer: features={n_features}: at least one feature is needed; as many as inputs ({d_in}) is usual")
        if share_features is not None and share_features.shape != (n_features, d_in):
            have = tuple(share_features.shape)
            raise Mistake(f"tversky-layer: the shared features have shape {have}, this layer needs {(n_features, d_in)}; give it features of its own")
        self.F = nn.Parameter(drawn(n_features, d_in, init, n_features**-0.25)) if share_features is None else share_features
        self.theta = nn.Parameter(torch.tensor(1.0)) if similarity == "contrast" else None
        self.alpha, self.beta = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.5))
        self.inter, self.diff, self.similarity, self.normalize = inter, diff, similarity, normalize

    def ready(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n d"]:
        """The vectors as they are compared: in full precision, of unit length if so set."""
        x = x.to(self.F.dtype)
        return functional.normalize(x, dim=-1) if self.normalize else x

    def compare(self, a: Float[Tensor, "n d"], b: Float[Tensor, "p d"]) -> Float[Tensor, "n p"]:
        """:func:`tversky` by this layer's features and numbers."""
        with in_full(a):
            theta = 1.0 if self.theta is None else self.theta
            return tversky(self.ready(a), self.ready(b), self.F, theta, self.alpha, self.beta, self.inter, self.diff, self.similarity)

    def salience(self, a: Float[Tensor, "*n d"]) -> Float[Tensor, "*n"]:
        """How prominent each vector is: ``sum_k max(0, F_k a)``."""
        return salience(self.ready(a), self.F)[0].sum(-1)

    def extra_repr(self) -> str:
        return f"features={len(self.F)}, inter={self.inter}, diff={self.diff}, similarity={self.similarity}, normalize={self.normalize}"


@final
class TverskySimilarity(Tversky):
    """Likeness of two batches of vectors, [n d] and [m d] -> [n m]; parameters ``n_features d_in + 3``."""

    def forward(self, a: Float[Tensor, "n d"], b: Float[Tensor, "m d"]) -> Float[Tensor, "n m"]:
        return self.compare(a, b)


@final
class TverskyProjection(Tversky):
    """Likeness to ``n_prototypes`` learned prototypes ``P`` [p d]: what stands for a linear layer, [... d] -> [... p].

    Parameters: ``(n_prototypes + n_features) d_in + 3``; two in place of three for the ratio.
    """

    def __init__(self, d_in: int, n_prototypes: int, n_features: int, init: str = "released", **how: Any) -> None:
        super().__init__(d_in, n_features, init=init, **how)
        self.P = nn.Parameter(drawn(n_prototypes, d_in, init, 1.0))

    def forward(self, x: Float[Tensor, "*n d"]) -> Float[Tensor, "*n p"]:
        return self.compare(x.reshape(-1, self.P.shape[1]), self.P).view(*x.shape[:-1], len(self.P))

    @torch.no_grad()
    def explain(self, a: Float[Tensor, " d"], j: int) -> dict[str, list[tuple[int, float]]]:
        """Why ``a`` is like prototype ``j`` or not: (feature, amount), the most telling first, features that ``a`` and ``P_j`` do not have left out.

        "common": both have it, ``s_a s_b``; "only here": a has it, ``s_a``; "only prototype": P_j has it, ``s_b``. With product and ignorematch
        the score is ``theta sum(common) - alpha sum(only here) - beta sum(only prototype)``.
        """
        (sa, in_a), (sb, in_b) = salience(self.ready(a), self.F), salience(self.ready(self.P[j]), self.F)

        def ranked(amount: Tensor, chosen: Tensor) -> list[tuple[int, float]]:
            return sorted(((k, float(amount[k])) for k in chosen.nonzero()[:, 0].tolist()), key=lambda row: -row[1])

        return {"common": ranked(sa * sb, in_a & in_b), "only here": ranked(sa, in_a & ~in_b), "only prototype": ranked(sb, in_b & ~in_a)}


def prototypes(layer: nn.Module, shape: Sequence[int] | None = None) -> Tensor:
    """What each output of a layer looks for: ``P`` [p d], or the weights of a linear layer, to be seen side by side; [p *shape] if one is given."""
    weight = getattr(layer, "P", getattr(layer, "weight", None))
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise Mistake(f"tversky-layer: {type(layer).__name__} has no prototypes; give a TverskyProjection or a Linear")
    return weight.detach() if shape is None else weight.detach().unflatten(1, tuple(shape))


# -- putting it in ---------------------------------------------------------------------------------


def tversky_layer(layer: nn.Module, features: int | None = None, **how: Any) -> TverskyProjection:
    """The projection that stands for a linear layer: a prototype an output, fresh weights, no bias; ``features`` None: as many as inputs."""
    if type(layer) is not nn.Linear:
        raise Mistake(f"tversky-layer: {type(layer).__name__} is no plain linear layer; name others in layers, or leave it out")
    return TverskyProjection(layer.in_features, layer.out_features, layer.in_features if features is None else features, **how)


def install(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    features: int | None = None,
    inter: str = "product",
    diff: str = "ignorematch",
    similarity: str = "contrast",
    normalize: bool = True,
    init: str = "balanced",
    share: bool = False,
) -> Surgery:
    """Put :class:`TverskyProjection` in the place of a network's classifier, or of the linear layers named in ``layers`` (names or patterns).

    ``features`` is the size of each bank, None: as many as the layer's inputs; with ``share`` banks of one size are one. The other options as in
    :class:`Tversky`, but for ``normalize`` and ``init``: vectors of any length and features that are all there at first make scores of hundreds, which
    plain SGD does not bear.
    Names: ``fc.weight`` becomes ``fc.P`` and ``fc.F``. Raises Mistake for a network without such layers.
    """
    found = find(model, types=(nn.Linear,), only=layers or ())
    if layers is None:
        head = model.get_classifier() if hasattr(model, "get_classifier") else found[-1][1] if found else None  # type: ignore[operator]
        found = [(name, m) for name, m in found if m is head]
    refuse_nothing(found, model, "tversky-layer", "linear classifier" if layers is None else f"linear layer named {layers}", "name its linear layers in layers")

    def make(name: str, old: nn.Module) -> nn.Module:
        if old._forward_hooks or list(old.children()):
            raise Mistake(f"tversky-layer: something is attached to {name} of {type(model).__name__} and would be lost; install tversky-layer first")
        try:
            return tversky_layer(old, features, inter=inter, diff=diff, similarity=similarity, normalize=normalize, init=init)
        except Mistake as refusal:
            raise Mistake(f"{refusal} (here {name} of {type(model).__name__})") from None

    done = swap(model, found, make)
    if share:
        banks: dict[torch.Size, nn.Parameter] = {}
        for m in model.modules():
            if isinstance(m, TverskyProjection) and banks.setdefault(m.F.shape, m.F) is not m.F:
                done.added -= m.F.numel()
                m.F = banks[m.F.shape]
    return done
