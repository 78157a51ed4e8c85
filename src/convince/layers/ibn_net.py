"""IbnNet: instance normalisation for half of the channels in shallow blocks, so that a network sees content and ignores style."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.places import Block, channels, residual_blocks
from convince.layers.surgery import Surgery, refuse_nothing, swap
from convince.parts import Card

CARD = Card(
    part="ibn-net",
    kind="layer",
    paper="ibn-net",
    title="Two at Once: Enhancing Learning and Generalization Capacities via IBN-Net",
    year=2018,
    url="https://arxiv.org/abs/1807.09441",
    expects=("images",),
    swaps=("BatchNorm2d",),
    departs=(
        "stages=None takes all stages but the last, of however many; the paper's networks have four, and it takes three (variant a) or two (variant b)",
        "variant b puts the instance norm in front of the block's last activation: torchvision's blocks, which have one for all places, are refused",
        "in a DenseNet the first norm of every dense layer of all blocks but the last is changed; the released code changes every third, 40 % of it",
        "appearance_divergence leaves out channels that are silent in either domain, whose divergence has no bound",
    ),
    tiny={},
)


@final
class IbnNet(nn.Module):
    """The first ``int(ratio * channels)`` channels by instance, the rest by batch normalisation; both with affine weights (section 3.2)."""

    def __init__(self, channels: int, ratio: float = 0.5) -> None:
        super().__init__()
        self.cut = int(channels * ratio)
        if not 0 < self.cut < channels:
            raise Mistake(f"ibn-net: ratio={ratio} leaves {self.cut} of {channels} channels to the instance norm; give a ratio that leaves both norms some")
        self.IN = nn.InstanceNorm2d(self.cut, affine=True)
        self.BN = nn.BatchNorm2d(channels - self.cut)
        self.drop: nn.Module = nn.Identity()
        self.act: nn.Module = nn.Identity()

    @staticmethod
    def of(norm: nn.BatchNorm2d, ratio: float) -> IbnNet:
        """Made from a batch norm: both halves begin with its affine weights, the second with its running statistics; an activation inside it stays."""
        made = IbnNet(norm.num_features, ratio)
        made.drop, made.act = getattr(norm, "drop", made.drop), getattr(norm, "act", made.act)  # timm's BatchNormAct2d
        made.IN.eps = made.BN.eps = norm.eps
        made.BN.momentum = norm.momentum
        with torch.no_grad():
            for name in ("weight", "bias"):
                getattr(made.IN, name).copy_(getattr(norm, name)[: made.cut])
                getattr(made.BN, name).copy_(getattr(norm, name)[made.cut :])
            for name in ("running_mean", "running_var"):
                getattr(made.BN, name).copy_(getattr(norm, name)[made.cut :])
        return made

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        a, b = x.split((self.cut, x.shape[1] - self.cut), dim=1)
        return self.act(self.drop(torch.cat([self.IN(a), self.BN(b)], 1)))


@final
class Normed(nn.Module):
    """An activation with an instance norm in front of it: what variant b puts behind an addition."""

    def __init__(self, act: nn.Module, channels: int) -> None:
        super().__init__()
        self.IN = nn.InstanceNorm2d(channels, affine=True)
        self.act = act

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.act(self.IN(x))


def install(model: nn.Module, variant: str = "a", ratio: float = 0.5, stages: Sequence[int] | None = None) -> Surgery:
    """Put IBN-a or IBN-b into a residual or densely connected network, in place.

    ``variant`` "a": the first norm of each block of ``stages`` becomes :class:`IbnNet`; "b": an instance norm behind the addition of the
    last block of each of ``stages``, and in place of the stem's batch norm. ``stages`` count from 1; None: all but the last (a), or the
    first two of them (b). A norm taken over keeps its weights. Raises Mistake for a network without such blocks.
    """
    if variant not in ("a", "b"):
        raise Mistake(f"ibn-net: variant={variant!r} must be 'a' (half of a block's first norm) or 'b' (behind additions)")
    blocks = residual_blocks(model) or _dense_layers(model)
    refuse_nothing(blocks, model, "ibn-net", "residual blocks with normalisation", "choose a network such as resnet20 or timm/densenet121")
    last = blocks[-1].stage
    chosen = set(range(max(last, 1)) if stages is None else [stage - 1 for stage in stages])
    if not chosen or not chosen <= set(range(last + 1)):
        raise Mistake(f"ibn-net: stages={tuple(stages or ())} must be some of 1 to {last + 1}, which {type(model).__name__} has")
    if variant == "b":
        return _install_b(model, blocks, chosen if stages is not None else chosen & {0, 1})
    firsts = [block.norms[0] for block in blocks if block.stage in chosen]
    plain = [(name, norm) for name, norm in firsts if isinstance(norm, nn.BatchNorm2d) and norm.affine and norm.track_running_stats]
    refuse_nothing(plain, model, "ibn-net", "batch normalisation in its shallow blocks", "choose a network such as resnet20")
    return swap(model, plain, lambda name, norm: IbnNet.of(norm, ratio))  # type: ignore[arg-type]


def _install_b(model: nn.Module, blocks: list[Block], chosen: set[int]) -> Surgery:
    lasts = {block.stage: block for block in blocks if block.stage in chosen}
    acts: list[tuple[str, nn.Module]] = []
    widths: dict[str, int] = {}
    for block in lasts.values():
        found = [(n, m) for n, m in block.module.named_children() if n.startswith("act")]
        if block.end is None or not found:
            raise Mistake(f"ibn-net: {block.name} of {type(model).__name__} has no activation of its own behind the addition; use variant='a'")
        acts.append((f"{block.name}.{found[-1][0]}", found[-1][1]))
        widths[acts[-1][0]] = channels(block.end[1])
    first = blocks[0].name + "."
    stem = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and not n.startswith(first)][:1]
    refuse_nothing(stem, model, "ibn-net", "batch norm in its stem", "use variant='a'")

    def instance(name: str, norm: nn.Module) -> nn.Module:
        made = nn.InstanceNorm2d(norm.num_features, eps=norm.eps, affine=True)  # type: ignore[arg-type]
        with torch.no_grad():
            made.weight.copy_(norm.weight)  # type: ignore[arg-type]
            made.bias.copy_(norm.bias)  # type: ignore[arg-type]
        return made

    return swap(model, acts, lambda name, act: Normed(act, widths[name])) + swap(model, stem, instance)


def _dense_layers(model: nn.Module) -> list[Block]:
    """The dense layers of a DenseNet, timm's or torchvision's, each as a block; its dense blocks are the stages."""
    found = [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "norm1", None), nn.BatchNorm2d) and hasattr(m, "norm2")]
    stages = {place: i for i, place in enumerate(dict.fromkeys(n.rpartition(".")[0] for n, _ in found))}
    return [Block(n, stages[n.rpartition(".")[0]], m, ((f"{n}.norm1", m.norm1), (f"{n}.norm2", m.norm2))) for n, m in found]


SILENT = 1e-12  # variance of a channel's means over images, below which it says nothing


def symmetric_kl(mean_a: Tensor, var_a: Tensor, mean_b: Tensor, var_b: Tensor) -> Tensor:
    """The divergence of two Gaussians, both ways added (eq. 1 of section 4.3): elementwise, in nats."""
    return ((var_a + (mean_a - mean_b) ** 2) / (2 * var_b) + (var_b + (mean_a - mean_b) ** 2) / (2 * var_a)) - 1


@torch.no_grad()
def appearance_divergence(model: nn.Module, a: Float[Tensor, "n c h w"], b: Float[Tensor, "m c h w"], names: Iterable[str] | None = None) -> dict[str, float]:
    """How far two domains lie apart in each feature map, in nats: the divergence of the channels' means over an image, averaged over channels.

    ``a`` and ``b`` are inputs of the network from the two domains; ``names`` are maps of its ``feature_info`` (None: all). In the model's present mode.
    """
    from convince.backbones.maps import feature_maps

    means = [{name: f.mean((2, 3)).double() for name, f in feature_maps(model, x, tuple(names or ())).items()} for x in (a, b)]

    def gauss(name: str, alive: Tensor) -> list[Tensor]:
        return [value[alive] for m in (means[0][name], means[1][name]) for value in (m.mean(0), m.var(0))]

    def divergence(name: str) -> float:
        alive = (means[0][name].var(0) > SILENT) & (means[1][name].var(0) > SILENT)
        return float(symmetric_kl(*gauss(name, alive)).mean()) if bool(alive.any()) else 0.0

    return {name: divergence(name) for name in means[0]}
