"""DGN-AM: the picture that a class or a channel answers to most, searched among the codes of a generator that was taught on real images."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from convince.errors import Mistake
from convince.explain.activation_maximisation import Activation, activation_maximisation, channel_of, unit_activation
from convince.explain.layer import find_layer
from convince.explain.passes import ROWS, chances, must_reach, scores
from convince.explain.targets import Similarity
from convince.fit.precision import full
from convince.fit.randomness import generator, preserved, seed_global
from convince.kinds import Explainer, differentiable
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="dgn-am",
    kind="explainer",
    paper="dgn-am",
    title="Synthesizing the preferred inputs for neurons in neural networks via deep generator networks",
    year=2016,
    url="https://arxiv.org/abs/1605.09304",
    expects=("images",),
    departs=(
        "the generator is a small one for small pictures; the paper's was taught on ImageNet at 227 pixels, and nothing here will look like a photograph",
        "the first step is 0.2 times the mean upper bound of the codes; the paper's 8 suits codes that range over tens",
        "the errors of image and features are means, not sums, so that their weights serve every size",
        "features are compared where the codes are read; the paper compares them in another network",
        "codes that can be negative are clipped at three deviations on both sides; the paper's are never below zero",
    ),
    tiny={"images": "digits", "steps": 2, "epochs": 1, "most": 32},
)

Weights = tuple[float, float, float]  # of the errors of the image and of the features, and of the discriminator
WHOLE: Weights = (1.0, 0.1, 0.01)
Codes = Callable[[Tensor], Tensor]  # images [n c h w] -> codes [n d]


# -- the generator ------------------------------------------------------------------------------------


@final
class Generator(nn.Module):
    """Codes [n d] -> pixels [n c h w] in [0, 1]: linear to a small plane of 64 channels, then transposed convolutions that double it, two at 28 px.

    ``low`` and ``high`` are the range of real codes in each dimension, ``mean`` and ``scale`` (the mean
    of their deviations) bring codes to the size that layers begin with.
    """

    low: Tensor
    high: Tensor
    mean: Tensor
    scale: Tensor

    def __init__(self, d: int, shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        c, h, w = shape
        doublings = max(1, math.ceil(math.log2(max(h, w) / 8)))
        self.shape, self.plane = shape, tuple(math.ceil(side / 2**doublings) for side in (h, w))
        widths = [max(16, width >> i) for i in range(doublings)] + [c]
        self.first = nn.Linear(d, widths[0] * math.prod(self.plane))
        layers: list[nn.Module] = [nn.ReLU()]
        for i in range(doublings):
            layers += [nn.ConvTranspose2d(widths[i], widths[i + 1], 4, 2, 1), nn.ReLU() if i + 1 < doublings else nn.Sigmoid()]
        self.rest = nn.Sequential(*layers)
        for name, value in (("low", torch.zeros(d)), ("high", torch.ones(d)), ("mean", torch.zeros(d)), ("scale", torch.ones(()))):
            self.register_buffer(name, value)

    def forward(self, y: Float[Tensor, "n d"]) -> Float[Tensor, "n c h w"]:
        made = self.rest(self.first((y - self.mean) / self.scale).unflatten(1, (-1, *self.plane)))
        return made[:, :, : self.shape[1], : self.shape[2]]

    def bound_by(self, codes: Float[Tensor, "m d"], bound: float) -> None:
        """Set the range to ``[0, mean + bound * deviation]`` of these codes by dimension; on both sides of the mean where codes are negative."""
        mean, spread = codes.mean(0), codes.std(0)
        self.mean.copy_(mean)
        self.scale.copy_(spread.mean().clamp_min(1e-6))
        self.high.copy_(mean + bound * spread)
        self.low.copy_(torch.zeros_like(mean) if bool((codes >= 0).all()) else mean - bound * spread)

    def draw(self, n: int, *key: object) -> Float[Tensor, "n d"]:
        """Random codes, even over the range."""
        share = torch.rand(n, len(self.low), generator=generator("dgn-am", *key)).to(self.low)
        return self.low + share * (self.high - self.low)


def _discriminator(shape: tuple[int, int, int]) -> nn.Module:
    layers = [nn.Conv2d(shape[0], 32, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 64, 4, 2, 1), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 1))


def feature_inverter(
    encode: Codes,
    x: Float[Tensor, "m c h w"],
    *,
    weights: Weights = WHOLE,
    compare: Codes | None = None,
    epochs: int = 5,
    batch: int = 64,
    lr: float = 2e-4,
    bound: float = 3.0,
    seed: int = 0,
) -> Generator:
    """Teach a generator to give ``x`` back from its codes: ``a |G(E(x)) - x|^2 + b |C(G(E(x))) - C(x)|^2 - c log D(G(E(x)))`` (Dosovitskiy & Brox 2016).

    ``weights`` are (a, b, c); ``encode`` is E and must be left alone by gradients; ``compare`` is C, None: E; D is a small discriminator that
    learns beside it. Adam at ``lr`` with beta1 0.9. The ranges of codes are stored in it, see :meth:`Generator.bound_by`.
    """
    of_image, of_features, of_critic = weights
    compare = compare or encode
    with torch.no_grad():
        codes = torch.cat([encode(part) for part in x.split(ROWS)]).float()
    with preserved():
        seed_global(seed, "dgn-am")
        shape = (x.shape[1], x.shape[2], x.shape[3])
        made, critic = Generator(codes.shape[1], shape).to(x.device), _discriminator(shape).to(x.device)
    made.bound_by(codes, bound)
    optimizer, other = (torch.optim.Adam(net.parameters(), lr=lr) for net in (made, critic))
    gen = generator("dgn-am", seed, "order")
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=gen).split(batch):
            real = x[rows].float()
            fake = made(codes[rows])
            loss = of_image * F.mse_loss(fake, real)
            if of_features:
                with torch.no_grad():
                    wanted = compare(x[rows])
                loss = loss + of_features * F.mse_loss(compare(fake.to(x.dtype)), wanted)
            if of_critic:
                loss = loss + of_critic * F.softplus(-critic(fake)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if of_critic:
                judged = F.softplus(-critic(real)).mean() + F.softplus(critic(fake.detach())).mean()
                other.zero_grad()
                judged.backward()
                other.step()
    return made.eval().requires_grad_(False)


def write_generator(made: Generator, path: str | Path) -> None:
    """Store a generator with the ranges of its codes, as safetensors."""
    from safetensors.torch import save

    from convince.fit.state import write_atomic

    write_atomic(Path(path), save(made.state_dict(), {"shape": ",".join(map(str, made.shape))}))


def read_generator(path: str | Path) -> Generator:
    """A generator from :func:`write_generator`; Mistake where the file is something else."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            c, h, w = map(int, file.metadata()["shape"].split(","))
        made = Generator(len(tensors["low"]), (c, h, w))
        made.load_state_dict(tensors)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise Mistake(f"dgn-am: generator={path}: no generator that this part has stored ({error}); name a new file, and images to teach it on") from error
    return made.eval().requires_grad_(False)


# -- the search ---------------------------------------------------------------------------------------


def step(
    y: Float[Tensor, "n d"], g: Float[Tensor, "n d"], lr: float, low: Float[Tensor, " d"], high: Float[Tensor, " d"], decay: float
) -> Float[Tensor, "n d"]:
    """``decay * clip(y + lr g / mean|g|, low, high)``, each row by itself: only the gradient's direction counts; the decay is the L2 prior."""
    size = g.abs().mean(1, keepdim=True)
    return decay * torch.minimum(torch.maximum(y + lr * g / size.clamp_min(1e-30), low), high)


def dgn_am(
    activation: Activation, made: Generator, y0: Float[Tensor, "n d"], *, steps: int = 200, lr: float | None = None, decay: float = 0.99
) -> Float[Tensor, "n d"]:
    """The codes whose pictures ``made(y)`` the activation answers to most, from ``y0`` by :func:`step`, its size falling linearly from ``lr`` to 0.

    ``lr``: None for 0.2 times the mean upper bound of the codes.
    """
    rate = 0.2 * float(made.high.mean()) if lr is None else lr
    y = y0.detach().clone()
    for t in range(steps):
        y.requires_grad_(True)
        raised = activation(made(y))
        must_reach(raised, "dgn-am")
        (g,) = torch.autograd.grad(raised.sum(), y)
        y = step(y.detach(), g, rate * (1 - t / steps), made.low, made.high, decay)
    return y


def pixel_am(activation: Activation, start: Float[Tensor, "n c h w"], prior: str = "tv", steps: int = 200, lr: float = 0.05, weight: float = 1e-2) -> Tensor:
    """The search among pixels that the paper compares with, with one prior: "l2", "tv" (of that ``weight``) or "blur" (every 4 steps)."""
    if prior not in ("l2", "tv", "blur"):
        raise Mistake(f"dgn-am: prior={prior!r}: must be one of l2, tv, blur")
    how: dict[str, Any] = {"l2": weight * (prior == "l2"), "tv": weight * (prior == "tv"), "blur_every": 4 * (prior == "blur")}
    return activation_maximisation(activation, start, steps=steps, lr=lr, jitter=0, **how)


def am_report(
    images: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], answer: nn.Module, judge: nn.Module, train: Float[Tensor, "m c h w"]
) -> dict[str, Float[Tensor, " n"]]:
    """Of each image: the target's chance under the answer and under an independent ``judge``, whether the judge names the target, the L2 distance
    [pixel values] to the nearest training image (0: a copy), and to the nearest other image of the same target (inf: there is none)."""
    own, other = (scores(net, images).softmax(1) for net in (answer, judge))
    flat = images.flatten(1)
    apart = torch.cdist(flat, flat).masked_fill(torch.eye(len(flat), dtype=torch.bool, device=flat.device) | (target[:, None] != target), math.inf)
    return {
        "chance": own.gather(1, target[:, None])[:, 0],
        "judge chance": other.gather(1, target[:, None])[:, 0],
        "judged right": (other.argmax(1) == target).to(flat.dtype),
        "nearest": torch.cdist(flat, train.to(flat).flatten(1)).amin(1),
        "apart": apart.amin(1),
    }


@final
@dataclass
class DgnAm(Explainer):
    """No map: ``images["image"]`` is the generated picture that the target class answers to most, the same whatever image is explained.

    The generator is taught on ``images`` (a folder or the name of a set, at most ``most`` of its training images) to give them back from what the
    answer's last linear layer is given. ``generator`` is a file: read where it is there, else written after teaching; it may come from another
    network. One of the two must be given. ``layer`` and ``unit``: a channel of that layer in place of the class. The table has each class's chance
    under the answer that was climbed, which proves nothing.

    ``dgn-am:images=photos/,generator=photos.safetensors``
    """

    images: str | None = None
    generator: str | None = None
    layer: str | None = None
    unit: int | None = None
    steps: int = 200
    lr: float | None = None
    decay: float = 0.99
    bound: float = 3.0
    epochs: int = 5
    most: int = 20_000
    weights: tuple[float, float, float] = WHOLE
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.steps, self.epochs) < 1 or self.most < 2 or not 0 < self.decay <= 1 or not self.bound > 0 or (self.lr is not None and not self.lr > 0):
            raise Mistake(
                f"dgn-am: steps={self.steps} and epochs={self.epochs} must be at least 1, most={self.most} at least 2, "
                f"decay={self.decay} above 0 and at most 1, bound={self.bound} and lr={self.lr} above 0"
            )
        if len(self.weights) != 3 or min(self.weights) < 0:
            raise Mistake(f"dgn-am: weights={self.weights}: give three numbers of at least 0: of the image, of its features, of the discriminator")
        if (self.layer is None) != (self.unit is None):
            raise Mistake(f"dgn-am: layer={self.layer!r}, unit={self.unit}: give both (a channel of a layer) or neither (the class)")

    def explain(self, answer: nn.Module, x: Float[Tensor, "n ..."], target: Int[Tensor, " n"]) -> Explanation:
        if x.dim() != 4:
            raise Mistake(f"dgn-am makes images [n c h w], and the input has shape {tuple(x.shape)}")
        differentiable(answer, "dgn-am")
        layer = None if self.layer is None else find_layer(answer, x, target, self.layer, "dgn-am")
        made = self._generator(answer, x.detach()).to(x)
        wanted = target if layer is None else torch.full_like(target, channel_of(answer, x, layer, self.unit, "dgn-am"))
        units, back = wanted.unique(return_inverse=True)
        y0 = made.draw(1, self.seed, "start")
        found = []
        for some in units.split(ROWS // 2):
            y = dgn_am(unit_activation(answer, some, layer), made, y0.expand(len(some), -1), steps=self.steps, lr=self.lr, decay=self.decay)
            found.append(made(y).detach())
        images = torch.cat(found)
        table: dict[str, Any] = {"layer": "scores" if layer is None else layer.name, "units": units.tolist()}
        if layer is None:
            table["chance"] = chances(answer, scores(answer, images)).gather(1, units[:, None])[:, 0].tolist()
        return Explanation(None, {"image": images[back]}, table)

    def _generator(self, answer: nn.Module, x: Tensor) -> Generator:
        shape = (x.shape[1], x.shape[2], x.shape[3])
        if self.generator is not None and Path(self.generator).exists():
            made = read_generator(self.generator)
            if made.shape != shape:
                raise Mistake(f"dgn-am: generator={self.generator} makes images {made.shape}, and the answer takes {shape}; teach another on images=...")
            return made
        if self.images is None:
            raise Mistake("dgn-am needs a generator: name the images to teach it on (images=FOLDER), or the file of one (generator=FILE.safetensors)")
        from convince.data import load

        data = load(self.images, size=shape[1] if shape[1] == shape[2] else None, unlabelled=True)
        rows = data.split.train[: self.most]
        real = data.float_batch(data.x.take(rows)).to(x)
        if real.shape[1:] != x.shape[1:]:
            raise Mistake(f"dgn-am: images={self.images} are {tuple(real.shape[1:])}, and the answer takes {shape}; give images of the same kind")
        encode = Similarity(answer, x[:1]).features
        made = feature_inverter(lambda pixels: full(encode(pixels)), real, weights=self.weights, epochs=self.epochs, bound=self.bound, seed=self.seed)
        if self.generator is not None:
            write_generator(made, self.generator)
        return made
