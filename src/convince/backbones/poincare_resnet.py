"""PoincareResnet: a residual network whose convolutions, batch norms and skips all live in hyperbolic space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.fit.precision import full
from convince.layers.head import maps
from convince.layers.poincare import (
    PoincareBall,
    PoincareConv2d,
    PoincareLinear,
    PoincareMidpointBN2d,
    expmap0,
    frechet_mean,
    in_full,
    logmap0,
    midpoint,
    mobius_add,
)
from convince.parts import Card

CARD = Card(
    part="poincare-resnet",
    kind="backbone",
    paper="poincare-resnet",
    title="Poincaré ResNet",
    year=2023,
    url="https://arxiv.org/abs/2303.14027",
    accepts=("image",),
    optimizer="adamw:lr=0.001,weight_decay=0.0001",
    departs=(
        "batch norm keeps running statistics for eval mode; the released code normalises a test batch by itself",
        "the head starts from the older random law, not from the identity, so that networks of different seeds differ",
        "gradients are autograd's, on formulas in which the maps in and out of the ball cancel; the paper derives them by hand to save memory",
        "lambda is 2 / (1 - c |x|^2) and skips add channel vectors, as the paper says; the released code has 2 (1 - c |x|^2) and adds along rows",
        "points are not clipped to the ball's inside: distances end at where float32 does",
        "all layers share one ball, which matters only where its curvature is learned",
        "weight decay is AdamW's, beside the gradient; the released runs add it to the gradient of a Riemannian Adam",
    ),
    tiny={"depth": 8, "channels": (4, 4, 8)},
    variants={
        "poincare-resnet-mini": {"depth": 8, "channels": (8, 16, 32)},
        "poincare-resnet20": {"depth": 20, "channels": (8, 16, 32)},
        "poincare-resnet32": {"depth": 32, "channels": (8, 16, 32)},
    },
    small=("poincare-resnet-mini", "poincare-resnet20"),
)
MEANS = {"midpoint": midpoint, "frechet": frechet_mean}


def skip(f: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"], c: float | Tensor) -> Float[Tensor, "n c h w"]:
    """``f (+) x`` of tangent vectors at the origin, position by position (section 3.2 of the paper)."""
    return logmap0(mobius_add(expmap0(f, c, dim=1), expmap0(x, c, dim=1), c, dim=1), c, dim=1)


@final
class Block(nn.Module):
    """conv3x3 - BN - ReLU - conv3x3 - BN, plus the input in the ball (by a 1x1 convolution where the shape changes), ReLU."""

    def __init__(self, c_in: int, c_out: int, stride: int, ball: PoincareBall, init: str, mean: str) -> None:
        super().__init__()
        self.ball = ball
        self.conv1, self.bn1 = PoincareConv2d(c_in, c_out, 3, ball, stride, init), PoincareMidpointBN2d(c_out, ball, MEANS[mean])
        self.conv2, self.bn2 = PoincareConv2d(c_out, c_out, 3, ball, 1, init), PoincareMidpointBN2d(c_out, ball, MEANS[mean])
        self.act1, self.act2 = nn.ReLU(), nn.ReLU()
        changes = stride != 1 or c_in != c_out
        self.downsample: nn.Module = PoincareConv2d(c_in, c_out, 1, ball, stride, init) if changes else nn.Identity()

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        f = self.bn2(self.conv2(self.act1(self.bn1(self.conv1(x)))))
        return self.act2(skip(f, self.downsample(x), self.ball.c))


@final
class PoincareResnet(nn.Module):
    """Stem, stages of ``(depth - 2) / 6`` blocks, the mean of tangent vectors over positions, a Poincaré linear head whose tangent vector are the scores.

    ``channels`` are those of the stages, each of which after the first halves the side; ``c`` the ball's curvature, ``learn_c`` whether it learns;
    ``init`` "identity" or "normal" of the convolutions; ``mean`` "midpoint" or "frechet" of the batch norms. Computes in full precision throughout.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        depth: int = 20,
        channels: Sequence[int] = (8, 16, 32),
        c: float = 0.1,
        learn_c: bool = False,
        init: str = "identity",
        mean: str = "midpoint",
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6 or len(channels) != 3:
            raise Mistake(f"poincare-resnet: depth={depth}, channels={tuple(channels)}: three stages of equal blocks need a depth of 8, 14, 20, 26, 32 ...")
        if mean not in MEANS:
            raise Mistake(f"poincare-resnet: mean={mean!r} must be 'midpoint' (the paper's) or 'frechet' (exact and slow)")
        self.num_classes, self.in_chans, self.num_features = num_classes, in_chans, channels[-1]
        self.ball = PoincareBall(c, learn_c)
        self.conv = PoincareConv2d(in_chans, channels[0], 3, self.ball, 1, init)
        self.bn = PoincareMidpointBN2d(channels[0], self.ball, MEANS[mean])
        self.act = nn.ReLU()
        c_in = channels[0]
        for i, c_out in enumerate(channels):
            blocks = [Block(c_in if j == 0 else c_out, c_out, 2 if j == 0 and i else 1, self.ball, init, mean) for j in range((depth - 2) // 6)]
            setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            c_in = c_out
        self.feature_info = maps(*((f"layer{i + 1}", width, 2**i) for i, width in enumerate(channels)))
        self.fc: nn.Module = PoincareLinear(self.num_features, num_classes, self.ball, init="normal") if num_classes else nn.Identity()

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d i j"]:
        """The last map of tangent vectors."""
        with in_full(x):
            x = self.act(self.bn(self.conv(full(x))))
            for layer in ("layer1", "layer2", "layer3"):
                x = getattr(self, layer)(x)
            return x

    def forward_head(self, features: Float[Tensor, "n d i j"], pre_logits: bool = False) -> Float[Tensor, "n k"]:
        """The scores [n k] of :meth:`forward_features`, or with ``pre_logits`` the mean vector before them [n d]."""
        with in_full(features):
            x = full(features).mean((2, 3))
            return x if pre_logits else self.fc(x)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The Poincaré linear layer."""
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        """A new head for ``num_classes``; 0 makes the network answer with the vector before it."""
        like = self.bn.shift
        self.num_classes = num_classes
        self.fc = PoincareLinear(self.num_features, num_classes, self.ball, init="normal").to(like) if num_classes else nn.Identity()
