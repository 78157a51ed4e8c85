"""Slab: a transformer that trades LayerNorm for a batch norm that folds away, little by little, and softmax attention for a linear one."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from convince.errors import Mistake
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.layers.poincare import in_full
from convince.layers.surgery import Surgery, find, refuse_nothing, swap
from convince.parts import Card

CARD = Card(
    part="slab",
    kind="technique",
    paper="slab",
    title="SLAB: Efficient Transformers with Simplified Linear Attention and Progressive Re-parameterized Batch Normalization",
    year=2024,
    url="https://arxiv.org/abs/2405.11582",
    expects=("images", "network"),
    swaps=("LayerNorm", "Attention"),
    host="conv-stem-vit:dim=16,depth=2,heads=2",
    departs=(
        "the share of LayerNorm follows the step of a stage and is set from outside, while the released layer counts its own passes",
        "it falls over 70 % of a stage's steps, anew in each stage; the released networks set 60,000 to 300,000 steps by hand",
        "where LayerNorm has the whole share the batch norm rests, also in the first step after warm-up, in which the released layer runs both",
        "class tokens get no position in the keys and no convolution; the released networks have no class token",
        "only plain attention over the tokens of a whole image becomes linear; networks of windows, such as Swin, take the norm alone (attn=false)",
        "norms of queries and keys, and norms over channels in front of rows and columns, stay as they are",
    ),
    tiny={},
)


# -- attention -------------------------------------------------------------------------------------


def linear_attention(q: Float[Tensor, "*b n c"], k: Float[Tensor, "*b m c"], v: Float[Tensor, "*b m d"]) -> Float[Tensor, "*b n d"]:
    """``z_i q_i (sum_j k_j^T v_j)`` with ``z_i = 1 / (q_i . sum_j k_j + 1e-6)``: no softmax, no scale. ``q`` and ``k`` are not negative.

    The order of the products that costs less is taken: ``(q k^T) v`` for few tokens, ``q (k^T v)``, linear in them, for many.
    """
    (n, c), (m, d) = q.shape[-2:], v.shape[-2:]
    z = 1 / (q @ k.sum(-2)[..., None] + 1e-6)
    if n * m * (c + d) > c * d * (n + m):
        return q @ (k.mT @ v) * z
    return (q @ k.mT) @ v * z


@final
class SimplifiedLinearAttention(nn.Module):
    """:func:`linear_attention` of ``relu(q)`` and ``relu(k + positions)``, plus a depthwise convolution of ``v`` on the grid; [n t d] -> [n t d].

    ``grid`` are the rows and columns of the tokens of the image, ``prefix`` the tokens in front of them. Names as in timm's attention, beside
    ``positions`` [1 N d] (zeros at first) and ``dwc``, whose ``kernel`` x ``kernel`` taps all heads share. The products are made in full precision.
    """

    def __init__(self, dim: int, heads: int, grid: Sequence[int], kernel: int = 5, prefix: int = 0, qkv_bias: bool = True) -> None:
        super().__init__()
        if dim % heads:
            raise Mistake(f"slab: dim={dim}, heads={heads}: the width must be a multiple of the heads")
        if kernel < 1 or kernel % 2 == 0:
            raise Mistake(f"slab: kernel={kernel} must be an odd number of tokens; 5 is the paper's")
        self.heads, self.grid, self.prefix = heads, (int(grid[0]), int(grid[1])), prefix
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop: nn.Module = nn.Identity()
        self.positions = nn.Parameter(torch.zeros(1, math.prod(self.grid), dim))
        self.dwc = nn.Conv2d(dim // heads, dim // heads, kernel, padding=kernel // 2, groups=dim // heads)

    def forward(self, x: Float[Tensor, "n t d"], attn_mask: Tensor | None = None, is_causal: bool = False) -> Float[Tensor, "n t d"]:
        if attn_mask is not None or is_causal:
            raise Mistake("slab: linear attention has no masks; leave attn_mask and is_causal out, or set attn=false")
        if x.shape[1] != self.prefix + self.positions.shape[1]:
            have = f"{self.prefix} + {self.grid[0]} x {self.grid[1]} tokens"
            raise Mistake(f"slab: got {x.shape[1]} tokens, this attention was made for {have}; give images of the size that the network was built for")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # each [n heads t c]
        positions = functional.pad(self.positions[0], (0, 0, self.prefix, 0)).unflatten(-1, (self.heads, -1)).transpose(0, 1)
        with in_full(x):
            wide = torch.promote_types(q.dtype, torch.float32)
            y = linear_attention(q.to(wide).relu(), (k.to(wide) + positions.to(wide)).relu(), v.to(wide))
        image = v[:, :, self.prefix :].flatten(0, 1).mT.unflatten(-1, self.grid)
        near = self.dwc(image).flatten(2).mT.unflatten(0, (len(x), self.heads))
        y = y + functional.pad(near, (0, 0, self.prefix, 0))
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))

    def extra_repr(self) -> str:
        return f"heads={self.heads}, grid={self.grid}, prefix={self.prefix}"


# -- norms -----------------------------------------------------------------------------------------


@final
class RepBN(nn.Module):
    """``BN(x) + eta x`` over the last axis (eq. 4), statistics over rows and tokens; ``eta`` is one learned number, 1 at first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.eta = nn.Parameter(torch.tensor(1.0))
        self.bn = nn.BatchNorm1d(dim)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return self.bn(x.reshape(-1, x.shape[-1])).view(x.shape) + self.eta * x

    def affine(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """``gamma / sigma + eta`` and ``beta - gamma mu / sigma`` (eq. 5): what it multiplies by and adds in evaluation."""
        bn = self.bn
        assert bn.running_mean is not None
        assert bn.running_var is not None
        scale = bn.weight / (bn.running_var + bn.eps).sqrt()
        return scale + self.eta, bn.bias - scale * bn.running_mean


@final
class PRepBN(nn.Module):
    """``lam LN(x) + (1 - lam) RepBN(x)`` in training (eq. 3), RepBN alone in evaluation: evaluate when ``lam`` has come to 0.

    ``lam`` is a buffer, 1 at first, which :func:`set_lam` moves; at 1 and at 0 only the one norm runs. ``ln`` is the norm that it takes over.
    """

    lam: Tensor

    def __init__(self, dim: int, ln: nn.LayerNorm | None = None) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(dim) if ln is None else ln
        self.rep = RepBN(dim)
        self.register_buffer("lam", torch.tensor(1.0))

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        lam = float(self.lam) if self.training else 0.0
        if lam == 0:
            return self.rep(x)
        return self.ln(x) if lam == 1 else lam * self.ln(x) + (1 - lam) * self.rep(x)


def lam_at(step: int, steps: int, warmup: int = 0, r0: float = 1.0) -> float:
    """LayerNorm's share at a step: 1 in ``warmup`` steps, then from ``r0`` down to 0 in ``steps`` equal steps (eq. 3)."""
    return 1.0 if step < warmup else r0 * max(1 - (step - warmup) / steps, 0.0)


def set_lam(model: nn.Module, lam: float) -> None:
    """Give every :class:`PRepBN` of a network this share of LayerNorm."""
    for m in model.modules():
        if isinstance(m, PRepBN):
            m.lam.fill_(lam)


# -- putting it in, folding it away ----------------------------------------------------------------


def slabify(model: nn.Module, norm: bool = True, attn: bool = True, kernel: int = 5) -> Surgery:
    """Put :class:`PRepBN` in the place of a transformer's LayerNorms and :class:`SimplifiedLinearAttention` in that of timm's attention, in place.

    The old weights stay: ``norm1.weight`` is called ``norm1.ln.weight``. Raises Mistake, with the network whole, where there is nothing of the kind.
    """
    from timm.layers import Attention

    if not norm and not attn:
        raise Mistake("slab: norm=false and attn=false leave nothing to change; set one of them, or leave the part out")
    name = type(model).__name__
    attentions = [(n, m) for n, m in model.named_modules() if type(m) is Attention]
    norms = [(n, m) for n, m in find(model, types=(nn.LayerNorm,), skip=[f"{a}.*" for a, _ in attentions]) if _last(m)]
    make: Any = None
    if attn:
        refuse_nothing(attentions, model, "slab", "plain attention of timm's", "set attn=false, choose a network such as conv-stem-vit")
        embed = getattr(model, "patch_embed", None)
        grid, prefix = getattr(embed, "grid_size", None), getattr(model, "num_prefix_tokens", 0)
        if grid is None:
            raise Mistake(f"slab: {name} does not say the grid of its tokens (patch_embed.grid_size); set attn=false, or choose conv-stem-vit")
        make = functools.partial(_linear, grid=grid, prefix=prefix, kernel=kernel)
    if norm:
        refuse_nothing(norms, model, "slab", "LayerNorm over its last axis", "set norm=false, choose a network such as conv-stem-vit")
    done = swap(model, attentions, lambda n, old: make(old)) if attn else Surgery()
    return done + swap(model, norms, lambda n, old: PRepBN(old.normalized_shape[0], old)) if norm else done  # type: ignore[index, arg-type]


def _last(m: nn.Module) -> bool:
    """True for a LayerNorm over the last axis alone, with weights; timm's LayerNorm2d is of another layout."""
    return isinstance(m, nn.LayerNorm) and not type(m).__name__.endswith("2d") and m.elementwise_affine and len(m.normalized_shape) == 1


def _linear(old: Any, grid: Sequence[int], prefix: int, kernel: int) -> SimplifiedLinearAttention:
    """Linear attention with the projections of timm's."""
    more = [word for word in ("q_norm", "k_norm", "norm") if not isinstance(getattr(old, word, nn.Identity()), nn.Identity)]
    if more or getattr(old, "gate", None) is not None or old.proj.out_features != old.qkv.in_features or old.qkv.out_features != 3 * old.proj.out_features:
        raise Mistake("slab: attention with norms, gates or widths of its own inside cannot become linear; set attn=false, or choose conv-stem-vit")
    made = SimplifiedLinearAttention(old.qkv.in_features, old.num_heads, grid, kernel, prefix)
    made.qkv, made.proj, made.proj_drop = old.qkv, old.proj, old.proj_drop
    return made


@final
class Affine(nn.Module):
    """``x * weight + bias`` over the last axis: what is left of a folded norm that no single linear layer reads."""

    def __init__(self, weight: Float[Tensor, " d"], bias: Float[Tensor, " d"]) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        return torch.addcmul(self.bias, x, self.weight)


@torch.no_grad()
def fold_repbn(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy for inference without LayerNorms: each :class:`PRepBN` becomes part of the linear layer that reads it, or else an :class:`Affine`.

    ``x`` are a few inputs: a pass over them finds the readers, and the copy must answer as the network does (to 1e-3 of its largest score). Raises
    Mistake where there is no PRepBN, where one is still in its schedule, or where the copy answers otherwise.
    """
    small = copy.deepcopy(model).eval()
    norms = [(name, m) for name, m in small.named_modules() if isinstance(m, PRepBN)]
    refuse_nothing(norms, model, "fold_repbn", "PRepBN", "train with the part slab first")
    late = [name for name, m in norms if float(m.lam) > 0]
    if late:
        raise Mistake(f"fold_repbn: LayerNorm still has a share of {float(norms[0][1].lam):.2g} in {late[0]}; train to the end of the schedule first")
    wanted = small(x)
    readers = _readers(small, x, [m for _, m in norms])

    def folded(name: str, norm: nn.Module) -> nn.Module:
        assert isinstance(norm, PRepBN)
        weight, bias = norm.rep.affine()
        linear = readers.get(id(norm))
        if linear is None:
            return Affine(weight.clone(), bias.clone())
        old = 0 if linear.bias is None else linear.bias
        linear.bias = nn.Parameter(old + linear.weight @ bias)
        linear.weight = nn.Parameter(linear.weight * weight)
        return nn.Identity()

    swap(small, norms, folded)
    gap = float((small(x) - wanted).abs().max())
    if not gap <= 1e-3 * max(float(wanted.abs().max()), 1.0):
        raise Mistake(
            f"fold_repbn: {type(model).__name__} answers otherwise when folded (by {gap:.2g}); something besides a linear layer reads a norm's output"
        )
    return small


def _readers(model: nn.Module, x: Tensor, norms: list[PRepBN]) -> dict[int, nn.Linear]:
    """The linear layer that reads a norm's output in a pass, by the norm's id; none where both have not run once."""
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    runs: list[nn.Module] = []
    pairs: list[tuple[nn.Module, nn.Linear]] = []

    def ran(m: nn.Module, inputs: Any, output: Tensor) -> None:
        runs.append(m)
        made[id(output)] = (m, output)  # held, so that no other tensor gets its address

    def read(m: Any, inputs: Any) -> None:
        runs.append(m)
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])][0], m))

    hooks = [m.register_forward_hook(ran) for m in norms]
    hooks += [m.register_forward_pre_hook(read) for m in model.modules() if type(m) is nn.Linear]
    try:
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    once = {id(m) for m in runs if sum(m is other for other in runs) == 1}
    found = {id(norm): linear for norm, linear in pairs if id(norm) in once and id(linear) in once}
    return {key: linear for key, linear in found.items() if sum(id(norm) == key for norm, _ in pairs) == 1}


# -- the part --------------------------------------------------------------------------------------


@final
@dataclass
class Slab(Technique):
    """Train a transformer with :func:`slabify`, LayerNorm's share falling from ``r0`` to 0 in ``share`` of a stage's steps, after ``warmup`` of them.

    ``norm`` and ``attn`` switch its two halves; ``kernel`` is the side of the depthwise convolution [tokens]. A run that is stopped before the share
    is 0 answers badly: the epochs' reading ``share of LayerNorm`` tells.
    """

    norm: bool = True
    attn: bool = True
    share: float = 0.7
    warmup: float = 0.0
    r0: float = 1.0
    kernel: int = 5

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and 0 <= self.warmup < 1 and self.share + self.warmup <= 1):
            raise Mistake(f"slab: share={self.share}, warmup={self.warmup}: parts of training above 0 and from 0, together at most 1; 0.7 and 0 are usual")
        if not 0 < self.r0 <= 1:
            raise Mistake(f"slab: r0={self.r0}: LayerNorm's first share must be above 0 and at most 1, the paper's")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise Mistake(f"slab: kernel={self.kernel} must be an odd number of tokens; 5 is the paper's")

    def on_start(self, run: Run) -> None:
        run.edit("slab", norm=self.norm, attn=self.attn, kernel=self.kernel)

    def on_batch(self, run: Run) -> None:
        if self.norm:
            set_lam(run.model, lam_at(run.stage_steps, max(int(self.share * run.stage_length), 1), int(self.warmup * run.stage_length), self.r0))

    def on_epoch(self, run: Run) -> None:
        found = [float(m.lam) for m in run.model.modules() if isinstance(m, PRepBN)]
        if found:
            run.report("share of LayerNorm", found[0], "0 to 1, in the epoch's last step")

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """The edit of :func:`slabify`."""
        slabify(model, **spec)
