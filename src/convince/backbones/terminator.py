"""Terminator: slow nets turn coordinates into image-size kernels that multiply the activations of a fast net; no residual links."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="terminator",
    kind="backbone",
    paper="terminator-hyperzzw",
    title="HyperZcdotZcdotW Operator Connects Slow-Fast Networks for Full Context Interaction",
    year=2024,
    url="https://arxiv.org/abs/2401.17948",
    accepts=("image",),
    optimizer="kar3:lr=0.001215",
    departs=(
        "omega0 is 1, at which the fastest sines turn about 8 times across a kernel; the released configuration leaves it out",
        "batch standardisation and the context of local kernels keep running means for eval mode; the released code takes the test batch's",
        "the two factors of a local kernel's renormalisation are learned, as the paper says; the released code never hands them to its optimiser",
        "slow nets' hidden widths are hidden, hidden / 2 and hidden / 4 where the configuration has 64, 32 and 16",
        "earlier maps whose channels do not divide the block's are repeated and cut, which happens only with other widths than the paper's",
        "the single numbers that the released network adds between blocks are left out, as it never trains them; each block has its own",
    ),
    tiny={"channels": (4, 8), "hidden": 8, "kernels": (3, 3)},
    variants={"terminator-mini": {"channels": (12, 24, 48), "hidden": 32}},
    small=("terminator-mini",),
)
GROUPS = 12


def hyperzzw_global(w: Float[Tensor, "n c h h"], z: Float[Tensor, "n c h h"]) -> Float[Tensor, "n c h h"]:
    """The global operator: each channel of the kernel ``w`` times that of the activations ``z``, as matrices."""
    return w @ z


def tile(x: Float[Tensor, "n c h w"], channels: int) -> Float[Tensor, "n d h w"]:
    """``x`` repeated along its channels until there are ``channels`` of them."""
    return x if x.shape[1] == channels else x[:, torch.arange(channels, device=x.device) % x.shape[1]]


def standardise(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
    """Instance standardisation: each channel of each image to mean 0 and variance 1, nothing learned."""
    return F.instance_norm(x)


def one_by_one(c_in: int, c_out: int, law: str = "normal") -> nn.Conv2d:
    """A 1x1 convolution, Kaiming "normal" for what a ReLU kind follows, "uniform" for gain 1; bias 0."""
    made = nn.Conv2d(c_in, c_out, 1)
    if law == "normal":
        nn.init.kaiming_normal_(made.weight)
    else:
        nn.init.kaiming_uniform_(made.weight, nonlinearity="linear")
    nn.init.zeros_(made.bias)  # type: ignore[arg-type]
    return made


# -- slow nets -------------------------------------------------------------------------------------


@final
class Sines(nn.Module):
    """``s_i(p) = sin(W_i p + b_i)`` at the points p [points d]; one map a layer. Weights ``2 pi omega0 gamma`` times the usual, gamma ~ Gamma(6 / (i + 1))."""

    def __init__(self, d: int, hidden: int, layers: int, omega0: float) -> None:
        super().__init__()
        made = [nn.Linear(d, hidden) for _ in range(layers + 1)]
        with torch.no_grad():
            for i, linear in enumerate(made):
                gamma = torch.distributions.Gamma(6 / (i + 1), 1.0, validate_args=False).sample((hidden, d))
                linear.weight.mul_(2 * math.pi * omega0 * gamma)
                linear.bias.zero_()
        self.maps = nn.ModuleList(made)

    def forward(self, points: Float[Tensor, "p d"], i: int) -> Float[Tensor, "p h"]:
        linear: nn.Linear = self.maps[i]  # type: ignore[assignment]
        return ((points[:, None] * linear.weight).sum(2) + linear.bias).sin()  # by hand: autocast would round the angles to bf16


@final
class SlowNet(nn.Module):
    """A kernel [channels *size] from the coordinates of its own points, each axis from -1 to 1.

    ``h_0 = s_0(p)``, ``h_i = s_i(p) * L_i(h_{i-1}) + b_p`` with one learned number ``b_p`` a point, then a linear map to the channels. With ``context``
    (the channels of an input) the kernel depends on the input too: each ``h_i`` is renormalised, ``alpha stop(h) + beta h / |h|``, and multiplied by
    ``L'_i(g)``; g is the input pooled to the kernel's size, brought to ``hidden`` channels, averaged over the batch and mixed (GELU).
    """

    points: Tensor
    seen: Tensor

    def __init__(self, size: Sequence[int], channels: int, hidden: int, layers: int = 2, omega0: float = 1.0, context: int = 0) -> None:
        super().__init__()
        self.size, self.channels = tuple(size), channels
        grid = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in size), indexing="ij")
        self.register_buffer("points", torch.stack(grid, -1).flatten(0, -2), persistent=False)
        self.sines = Sines(len(self.size), hidden, layers, omega0)
        self.mixers = nn.ModuleList(self.mixer(hidden) for _ in range(layers))
        self.offset = nn.Parameter(torch.zeros(math.prod(size), 1))
        self.output = nn.Linear(hidden, channels)
        nn.init.kaiming_uniform_(self.output.weight, nonlinearity="linear")
        nn.init.zeros_(self.output.bias)
        with torch.no_grad():
            self.output.weight.div_(math.sqrt(math.prod(size)))
        if context:
            self.reduce, self.mix = nn.Conv2d(context, hidden, 1), nn.Conv2d(hidden, hidden, 1)
            self.gates = nn.ModuleList(self.mixer(hidden) for _ in range(layers))
            self.alpha = nn.ParameterList(torch.ones(hidden) for _ in range(layers))
            self.beta = nn.ParameterList(torch.full((hidden,), 0.1) for _ in range(layers))
            self.register_buffer("seen", torch.zeros(hidden, *self.size))  # the running mean of reduced inputs

    @staticmethod
    def mixer(hidden: int) -> nn.Linear:
        """A linear map of the hidden layer, gain 1, bias 1."""
        made = nn.Linear(hidden, hidden)
        nn.init.kaiming_uniform_(made.weight, nonlinearity="linear")
        nn.init.ones_(made.bias)
        return made

    def look(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "p q"]:
        """The context g of an input batch, a row a point; in eval mode that of the batches seen in training."""
        if self.training:
            reduced = self.reduce(F.adaptive_avg_pool2d(x, (self.size[0], self.size[1]))).mean(0)
            with torch.no_grad():
                self.seen.lerp_(reduced.to(self.seen), 0.1)
        else:
            reduced = self.seen
        return F.gelu(self.mix(reduced[None]))[0].flatten(1).T

    def forward(self, x: Float[Tensor, "n c h w"] | None = None) -> Tensor:
        g = None if x is None else self.look(x)
        h = self.sines(self.points, 0)
        for i, mixer in enumerate(self.mixers):
            h = self.sines(self.points, i + 1) * mixer(h) + self.offset
            if g is not None:
                h = (self.alpha[i] * h.detach() + self.beta[i] * F.normalize(h, dim=0)) * self.gates[i](g)
        return self.output(h).T.reshape(self.channels, *self.size)


# -- the fast net ----------------------------------------------------------------------------------


@final
class GlobalKernel(nn.Module):
    """The context kernel ``W = K * x``: a slow net's kernel K [1 c h w] times the input, element by element."""

    def __init__(self, slow: nn.Module) -> None:
        super().__init__()
        self.slow = slow

    def kernel(self) -> Float[Tensor, "1 c h w"]:
        """K, the same for all inputs."""
        return self.slow()[None]

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.kernel() * x


@final
class HyperZZWLocal(nn.Module):
    """The local operator: a depthwise k x k kernel made from one input slides over another; 1x1, batch standardisation, GELU, one learned number added."""

    def __init__(self, channels: int, k: int, hidden: int, omega0: float) -> None:
        super().__init__()
        self.slow: nn.Module = SlowNet((k, k), channels, hidden, omega0=omega0, context=channels)
        self.mix, self.norm = one_by_one(channels, channels), nn.BatchNorm2d(channels, affine=False)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "n c h w"], z: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        kernel = self.slow(x)[:, None]
        z = F.conv2d(z, kernel.to(z.dtype), padding=kernel.shape[-1] // 2, groups=len(kernel))
        return F.gelu(self.norm(self.mix(z))) + self.bias


def score(y: Tensor, kernel: Tensor) -> Tensor:
    """The operator with two products of elements: ``(y * K) * y``."""
    return y * kernel * y


@final
class HyperChannel(nn.Module):
    """``x * sigmoid(score)``: a kernel over the channels scores their means."""

    def __init__(self, channels: int, hidden: int, omega0: float) -> None:
        super().__init__()
        self.slow = SlowNet((channels,), 1, hidden, omega0=omega0)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return x * score(x.mean((2, 3)), self.slow())[:, :, None, None].sigmoid()


@final
class HyperInteract(nn.Module):
    """``x * sigmoid(channel score * spatial score)``, both of ``y``: of its channels' means, and of its mean over channels."""

    def __init__(self, channels: int, side: int, hidden: int, omega0: float) -> None:
        super().__init__()
        self.channel = SlowNet((channels,), 1, max(hidden // 4, 1), omega0=omega0)
        self.spatial = SlowNet((side, side), 1, hidden, omega0=omega0)

    def forward(self, y: Float[Tensor, "n c h w"], x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        channel = score(y.mean((2, 3)), self.channel())[:, :, None, None]
        return x * (channel * score(y.mean(1, keepdim=True), self.spatial())).sigmoid()


@final
class Rgu(nn.Module):
    """The recursive gated unit: ``k = L_k x``, ``v = L_v x``, ``q = GELU(IS(k * L_q v)) + b_p``, ``y = L_y q``."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.k, self.v, self.q, self.y = (one_by_one(channels, channels, "uniform") for _ in range(4))
        self.offset = nn.Parameter(torch.zeros(1, 1, side, side))

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return self.y(F.gelu(standardise(self.k(x) * self.q(self.v(x)))) + self.offset)


@final
class FastMultiBranch(nn.Module):
    """Ten maps of the block's width, side by side with the inputs of ``earlier`` blocks tiled to it, and a 1x1 bottleneck to ``c_out`` channels."""

    def __init__(self, channels: int, c_out: int, side: int, hidden: int, layers: int, kernels: Sequence[int], earlier: int, omega0: float) -> None:
        super().__init__()
        half = max(hidden // 2, 1)
        self.kernel: nn.Module = GlobalKernel(SlowNet((side, side), channels, hidden, layers, omega0))
        self.rgu_slow, self.rgu_fast = Rgu(channels, side), Rgu(channels, side)
        self.mix = one_by_one(channels, channels)
        self.hyper_channel = HyperChannel(channels, half, omega0)
        self.hyper_interact = HyperInteract(channels, side, hidden, omega0)
        self.local = nn.ModuleList(HyperZZWLocal(channels, k, half, omega0) for k in kernels)
        self.bottleneck = one_by_one(channels * (6 + len(kernels) + earlier), c_out)

    def forward(self, x: Float[Tensor, "n c h w"], *before: Tensor) -> Float[Tensor, "n d h w"]:
        w = self.kernel(x)
        fast = standardise(self.rgu_slow(w) + self.rgu_fast(x))
        mix = standardise(self.mix(x))
        hci = standardise(self.hyper_channel(x))
        out = hyperzzw_global(w, fast)
        branches = [fast, out, hyperzzw_global(w, mix), hyperzzw_global(w, hci), out.sigmoid() * out, self.hyper_interact(out, x)]
        pairs = ((x, hci), (hci, x), (mix, x), (x, mix))  # what a local kernel is made from, and what it slides over
        branches += [local(*pairs[i % 4]) for i, local in enumerate(self.local)]
        return self.bottleneck(torch.cat([*branches, *(tile(y, x.shape[1]) for y in before)], 1))


@final
class GroupStandardise(nn.Module):
    """G-IBS: of :data:`GROUPS` neighbouring groups of channels the even ones are batch, the odd ones instance standardised; nothing learned."""

    batch: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.register_buffer("batch", torch.arange(channels) * GROUPS // channels % 2 == 0, persistent=False)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        return torch.where(self.batch[:, None, None], self.norm(x), standardise(x))


@final
class Block(nn.Module):
    """The slow-fast neural encoding block: :class:`FastMultiBranch`, G-IBS, GELU, one learned number added, dropout of channels. No residual link."""

    def __init__(self, branch: FastMultiBranch, channels: int, dropout: float) -> None:
        super().__init__()
        self.branch, self.norm, self.drop = branch, GroupStandardise(channels), nn.Dropout2d(dropout)
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x: Float[Tensor, "n c h w"], *before: Tensor) -> Float[Tensor, "n d h w"]:
        return self.drop(F.gelu(self.norm(self.branch(x, *before))) + self.bias)


@final
class Terminator(Headed):
    """A chain of slow-fast blocks at full resolution, the mean over positions, a linear head.

    ``img_size`` must be square and is fixed. ``channels`` are the blocks' outputs; ``hidden`` the width of the slow nets that make image-size
    kernels (half of it for local and channel kernels, a quarter for channel scores); ``kernels`` the odd sides of local kernels; ``dropout`` of
    all blocks but the first. Blocks 3 and 4 also see the input of the block before, later ones those of two.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: Sequence[int] = (32, 32),
        channels: Sequence[int] = (12, 36, 72, 144, 288),
        hidden: int = 64,
        kernels: Sequence[int] = (3, 9, 5, 7),
        dropout: float = 0.05,
        omega0: float = 1.0,
    ) -> None:
        super().__init__()
        if len(set(img_size)) != 1 or img_size[0] < 2:
            raise Mistake(
                f"terminator: an image of {'x'.join(map(str, img_size))} pixels: its kernels are multiplied as matrices, so it must be square, 2 or more"
            )
        if not channels or any(k < 1 or k % 2 == 0 for k in kernels):
            raise Mistake(f"terminator: channels={tuple(channels)}, kernels={tuple(kernels)}: needs a block, and local kernels of odd sides, such as (3,9,5,7)")
        self.num_classes, self.in_chans, self.num_features, self.side = num_classes, in_chans, channels[-1], img_size[0]
        self.earlier = [min(i // 2, 2) for i in range(len(channels))]
        blocks, c_in = [], in_chans
        for i, c_out in enumerate(channels):
            branch = FastMultiBranch(c_in, c_out, self.side, hidden, 2 if i else 3, kernels, self.earlier[i], omega0)
            blocks.append(Block(branch, c_out, dropout if i else 0.0))
            c_in = c_out
        self.blocks = nn.ModuleList(blocks)
        self.fc = nn.Linear(c_in, num_classes)
        nn.init.kaiming_normal_(self.fc.weight)
        nn.init.zeros_(self.fc.bias)
        self.feature_info = maps(*((f"blocks.{i}", c_out, 1) for i, c_out in enumerate(channels)))

    def global_kernels(self) -> list[Tensor]:
        """The slow nets' image-size kernels [1 c h w], one a block: what the slow feedback loss compares."""
        return [block.branch.kernel.kernel() for block in self.blocks]  # type: ignore[operator, union-attr]

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n d h w"]:
        """The last block's output, at the image's resolution."""
        if x.shape[2:] != (self.side, self.side):
            raise Mistake(f"terminator: built for {self.side}x{self.side} pixels, the size of its kernels, and given {x.shape[2]}x{x.shape[3]}")
        inputs = [x]
        for block, earlier in zip(self.blocks, self.earlier, strict=True):
            inputs.append(block(inputs[-1], *inputs[-1 - earlier : -1]))
        return inputs[-1]

    def pool(self, features: Float[Tensor, "n d h w"]) -> Float[Tensor, "n d"]:
        """The mean over positions."""
        return features.mean((2, 3))
