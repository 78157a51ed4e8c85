"""SeiT++: images are stored as a few bytes of tokens, and a transformer of tokens first learns to tell hidden ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.fit.answer import Answer
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.pretrain.diffusion_unet import fitting
from convince.pretrain.token_store import Tokenizer, decoder, quantise, token_bytes
from convince.types import Out, Stage

CARD = Card(
    part="seit-plus-plus",
    kind="technique",
    paper="seit-plus-plus",
    title="SeiT++: Masked Token Modeling Improves Storage-efficient Training",
    year=2024,
    url="https://arxiv.org/abs/2312.10105",
    departs=(
        "the tokeniser is a small VQ-VAE learnt from the run's own images (20 epochs, 256 codes of 16 numbers); the paper's is a large one of ImageNet",
        "its tokens are made anew from pixels in each step, so other parts may change pixels; token_store packs them for storage",
        "the transformer answers in place of --model, whose network rests; it is small (width 96, depth 4; the paper: ViT-B)",
        "tokens enter as the tokeniser's fixed codes under a learned norm, in pretraining too, without dropout; the paper learns a table of its own",
        "TokenAdapt (learned maps to a space where pixel augmentations work and back) is left out; a crop of the token map stands in its place",
        "AdamW at lr=1e-3 with weight decay 0.05 and the run's schedule throughout; no decay of the rate by layer, no clipping; 50 epochs of pretraining",
        "the decoder is as wide as the transformer, with two blocks; the paper's has 512 and four",
    ),
    claims=("optimizer", "stage", "answer"),
    mutes=("layer", "network"),
    tiny={"epochs": 1, "token_epochs": 1, "codes": 8, "dim": 4, "width": 8, "depth": 1},
    expects=("images",),
)
COMMITMENT = 0.25
DECAY = 0.99  # of the moving averages that are the codes


# -- changing and hiding tokens --------------------------------------------------------------------


def color_adapt(z: Float[Tensor, "n d h w"], rows: Bool[Tensor, " n"]) -> Float[Tensor, "n d h w"]:
    """The chosen rows get each channel's mean and deviation over space from their partner, the batch in reverse (section 3.3)."""
    mean, std = z.mean((2, 3), keepdim=True), z.std((2, 3), correction=0, keepdim=True) + 1e-6
    changed = (z - mean) / std * std.flip(0) + mean.flip(0)
    return torch.where(rows[:, None, None, None], changed, z)


def crop_tokens(z: Float[Tensor, "n d h w"], scale: float, gen: Generator) -> Float[Tensor, "n d h w"]:
    """For each map a part of ``scale`` to 1 of its area, anywhere in it, at its full size again (bilinear); half of them mirrored."""
    n, u = len(z), torch.rand(len(z), 4, generator=gen, dtype=torch.float64).to(z)
    side = (scale + (1 - scale) * u[:, 0]).sqrt()
    shift = (1 - side)[:, None] * (2 * u[:, 1:3] - 1)
    mirror = torch.where(u[:, 3] < 0.5, -1.0, 1.0).to(z)
    zero = torch.zeros_like(side)
    theta = torch.stack([torch.stack([side * mirror, zero, shift[:, 0]], 1), torch.stack([zero, side, shift[:, 1]], 1)], 1)
    return F.grid_sample(z, F.affine_grid(theta, [n, *z.shape[1:]], align_corners=False), padding_mode="border", align_corners=False)


def mask_ratio(gen: Generator, mean: float = 0.45, std: float = 0.25, low: float = 0.4) -> float:
    """A share drawn from a normal cut to [``low``, 1]: one for a batch."""
    normal = NormalDist(mean, std)
    u = float(torch.rand((), generator=gen, dtype=torch.float64))
    return min(max(normal.inv_cdf(normal.cdf(low) + (normal.cdf(1) - normal.cdf(low)) * u), low), 1.0)


def masked_token_loss(scores: Float[Tensor, "n l s k"], tokens: Int[Tensor, "n l s"], hidden: Bool[Tensor, "n l"]) -> Float[Tensor, ""]:
    """Cross-entropy of each token of the hidden patches, their mean."""
    return F.cross_entropy(scores[hidden].flatten(0, 1), tokens[hidden].flatten())


# -- networks --------------------------------------------------------------------------------------


def blocks(width: int, depth: int) -> nn.TransformerEncoder:
    """``depth`` transformer blocks, norm first, four times as wide inside."""
    heads = next(h for h in (4, 2, 1) if width % h == 0)
    block = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
    return nn.TransformerEncoder(block, depth, norm=nn.LayerNorm(width), enable_nested_tensor=False)


@final
class Trunk(nn.Module):
    """Patches of ``stem`` x ``stem`` places of a map [n d h w], a summary token before them, transformer blocks; scores from the patches' mean."""

    def __init__(self, dim: int, grid: Sequence[int], k: int, stem: int, width: int, depth: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(dim, width, stem, stride=stem)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, (grid[0] // stem) * (grid[1] // stem), width) * 0.02)
        self.blocks = blocks(width, depth)
        self.fc = nn.Linear(width, k)

    def patches(self, z: Float[Tensor, "n d h w"]) -> Float[Tensor, "n l e"]:
        """Patches without position, row by row."""
        return self.stem(z).flatten(2).transpose(1, 2)

    def encode(self, patches: Float[Tensor, "n l e"]) -> Float[Tensor, "n m e"]:
        """The summary token and the patches after the blocks."""
        return self.blocks(torch.cat([self.cls.to(patches.dtype).expand(len(patches), 1, -1), patches], 1))

    def forward(self, z: Float[Tensor, "n d h w"]) -> Float[Tensor, "n k"]:
        return self.fc(self.encode(self.patches(z) + self.position)[:, 1:].mean(1))


@final
class TokenNet(nn.Module):
    """The frozen tokeniser, then the transformer on the codes. Takes normalised images."""

    differentiable = False  # the nearest code has no slope

    def __init__(self, channels: int, size: Sequence[int], k: int, codes: int, dim: int, down: int, stem: int, width: int, depth: int) -> None:
        super().__init__()
        self.size = fitting(size, down * stem, max(size))
        self.grid, self.patch, self.num_features = (self.size[0] // down, self.size[1] // down), stem, width
        self.tokenizer = Tokenizer(channels, codes, dim, down)
        self.norm = nn.LayerNorm(dim)
        self.trunk = Trunk(dim, self.grid, k, stem, width, depth)
        self.change: Callable[[Tensor], Tensor] | None = None  # of code vectors, while a step trains

    def shrink(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c i j"]:
        """To sides that make whole tokens and patches."""
        return x if tuple(x.shape[2:]) == self.size else F.adaptive_avg_pool2d(x, self.size)

    def tokens(self, x: Float[Tensor, "n c h w"]) -> Int[Tensor, "n i j"]:
        """What is stored of an image."""
        return self.tokenizer(self.shrink(x))

    def codes(self, tokens: Int[Tensor, "n i j"]) -> Float[Tensor, "n d i j"]:
        """Code vectors, normed over their numbers."""
        return self.norm(self.tokenizer.vectors(tokens).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def forward_features(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n m e"]:
        """The summary token and the patches after the blocks."""
        z = self.codes(self.tokens(x))
        z = z if self.change is None else self.change(z)
        return self.trunk.encode(self.trunk.patches(z) + self.trunk.position)

    def forward_head(self, x: Float[Tensor, "n m e"], pre_logits: bool = False) -> Tensor:
        """The mean of the patches [n d], or the scores [n k]."""
        x = x[:, 1:].mean(1)
        return x if pre_logits else self.trunk.fc(x)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.trunk.fc


@final
class MaskedTokens(nn.Module):
    """What trains beside the transformer and does not ship: the embedding of hidden patches, a small decoder, scores of codes."""

    def __init__(self, places: int, codes: int, dim: int, stem: int, width: int) -> None:
        super().__init__()
        self.hidden = nn.Parameter(torch.randn(width) * 0.02)
        self.position = nn.Parameter(torch.randn(1, places, width) * 0.02)
        self.blocks = blocks(width, 2)
        self.tell = nn.Sequential(nn.Linear(width, stem * stem * dim), nn.GELU())
        self.norm, self.bias = nn.LayerNorm(dim), nn.Parameter(torch.zeros(codes))

    def forward(self, net: TokenNet, tokens: Int[Tensor, "n i j"], order: Int[Tensor, "n l"], masked: int, dropped: int) -> Tensor:
        """Scores [n l s k] of the s tokens of every patch, the first ``masked`` of ``order`` hidden, of them ``dropped`` not even encoded."""
        n, places = order.shape
        here = order.argsort(1)[:, :, None]  # of each patch: its rank
        x = torch.where(here < masked, self.hidden, net.trunk.patches(net.codes(tokens))) + net.trunk.position
        kept = order[:, dropped:, None].expand(-1, -1, x.shape[2])
        encoded = net.trunk.encode(x.gather(1, kept))
        filled = encoded[:, :1].expand(-1, places, -1).scatter(1, kept, encoded[:, 1:])
        told = self.tell(self.blocks(filled + self.position)).view(n, places, net.patch**2, -1)
        return self.norm(told) @ net.tokenizer.book.codes.T + self.bias

    def target(self, tokens: Int[Tensor, "n i j"], patch: int) -> Int[Tensor, "n l s"]:
        """The tokens of each patch, patches row by row."""
        n, h, w = tokens.shape
        return tokens.view(n, h // patch, patch, w // patch, patch).transpose(2, 3).reshape(n, -1, patch * patch)


@final
@dataclass
class SeitPlusPlus(Technique):
    """``token_epochs`` of learning codes and ``epochs`` of telling hidden tokens, on all training images, labelled or not, come before the labels.

    ``codes`` of ``dim`` numbers, one for ``down`` x ``down`` pixels (None: 4, or 8 above 96 px). ``stem`` tokens a side make a patch (None: 1 for
    maps of up to 8 x 8 tokens, else 2). ``dropped`` of the patches are not encoded. ``adapt`` is what changes training tokens:
    "color+crop" (ColorAdapt for half of a batch), "crop", or None. ``epochs=0`` learns from labels alone.
    """

    epochs: int = 50
    token_epochs: int = 20
    codes: int = 256
    dim: int = 16
    down: int | None = None
    stem: int | None = None
    width: int = 96
    depth: int = 4
    dropped: float = 0.4
    adapt: str | None = "color+crop"
    lr: float = 1e-3
    rank = 0  # the token network stands in --model's place for whatever else wraps a step

    def __post_init__(self) -> None:
        for name, least in {"epochs": 0, "token_epochs": 1, "codes": 2, "dim": 1, "width": 1, "depth": 1}.items():
            if getattr(self, name) < least:
                raise Mistake(f"seit-plus-plus: {name}={getattr(self, name)}: must be at least {least}")
        if self.down is not None and (self.down < 2 or self.down & (self.down - 1)):
            raise Mistake(f"seit-plus-plus: down={self.down}: pixels a side of a token, a power of two; 4 or 8 are usual")
        if self.adapt not in ("color+crop", "crop", None):
            raise Mistake(f"seit-plus-plus: adapt={self.adapt!r}: must be 'color+crop', 'crop' or none")
        if not 0 <= self.dropped <= 0.4 or not self.lr > 0:
            raise Mistake(f"seit-plus-plus: dropped={self.dropped}, lr={self.lr}: dropped is a share of 0 to 0.4, the least that is hidden; lr above 0")

    def on_start(self, run: Run) -> None:
        size = tuple(run.data.preprocess.size)
        down = self.down or (4 if max(size) <= 96 else 8)
        stem = self.stem or (1 if max(size) // down <= 8 else 2)
        if min(size) < 2 * down * stem:
            raise Mistake(
                f"seit-plus-plus: {'x'.join(map(str, size))} pixels are less than two patches of {down * stem} px a side; use --size {2 * down * stem}"
                " or a smaller down"
            )
        channels, shape = run.data.preprocess.channels, {"codes": self.codes, "dim": self.dim, "down": down, "stem": stem}
        run.edit("seit-plus-plus", channels=channels, size=list(size), k=run.k, width=self.width, depth=self.depth, **shape)
        net: Any = run.model.seit
        run.extra["seit_pixels"] = decoder(channels, self.dim, down)
        if self.epochs:
            run.extra["seit_masked"] = MaskedTokens(net.trunk.position.shape[1], self.codes, self.dim, stem, self.width)

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """Add ``seit``, a :class:`TokenNet`."""
        model.seit = TokenNet(**spec)

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """AdamW, without decay of biases and norms."""
        rows: list[dict[str, Any]] = [
            {"params": [p for _, p in params if p.dim() > 1]},
            {"params": [p for _, p in params if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW([row for row in rows if row["params"]], lr=self.lr, betas=(0.9, 0.95), weight_decay=0.05)

    def before(self, run: Run) -> list[Stage]:
        first = ("seit.tokenizer.", "extra.seit_pixels.")
        stages = [Stage("tokens", self.token_epochs, trainable=lambda name: name.startswith(first), guests=False)]
        if self.epochs:
            then = ("seit.norm.", "seit.trunk.", "extra.seit_masked.")
            stages.append(Stage("masked tokens", self.epochs, trainable=lambda n: n.startswith(then) and not n.startswith("seit.trunk.fc."), guests=False))
        return stages

    def stage(self, run: Run, i: int) -> Stage | None:
        """One stage with labels; the tokeniser stays."""
        rest = ("seit.norm.", "seit.trunk.")
        return Stage("train", run.settings.epochs or 0, trainable=lambda name: name.startswith(rest), steps=run.settings.steps) if i == 0 else None

    def on_batch(self, run: Run) -> None:
        if run.stage.name == "masked tokens":
            net: Any = run.model.seit
            gen, batch = run.gen("seit-plus-plus"), run.batch
            with run.plan.autocast():
                batch.extra["tokens"] = net.tokens(run.normalise(batch.x))
            batch.extra["target"] = batch.extra["tokens"]
            places = net.trunk.position.shape[1]
            masked = max(round(mask_ratio(gen) * places), 1)
            batch.extra["order"] = torch.rand(len(batch.x), places, generator=gen).argsort(1).to(batch.x.device)
            batch.extra["masked"] = torch.full((len(batch.x),), masked)

    def around_grad(self, run: Run, grad: Callable[[], None]) -> None:
        """Before the labels the pass is the part's own; then it is the token network's, with changed tokens."""
        net: Any = run.model.seit
        if run.stage.name in ("tokens", "masked tokens"):
            run.images += round(len(run.batch.x) / run.share)
            run.out, run.loss = Out(None), (self.rebuild_loss if run.stage.name == "tokens" else self.masked_loss)(run, net)
            return run.loss.backward()
        whole, run.model, net.change = run.model, net, self.changing(run)
        try:
            grad()
        finally:
            run.model, net.change = whole, None

    def rebuild_loss(self, run: Run, net: TokenNet) -> Tensor:
        """Error of the rebuilt normalised pixels plus the commitment; the codes move to the encodings."""
        with torch.autocast(run.batch.x.device.type, enabled=False):
            x = net.shrink(run.normalise(run.batch.x))
            z = net.tokenizer.encoder(x)
            if torch.is_grad_enabled():
                net.tokenizer.book.move(z.detach().permute(0, 2, 3, 1).flatten(0, 2), DECAY, run.gen("seit-plus-plus"))
            q, commitment = quantise(z, net.tokenizer.vectors(net.tokenizer.tokens(z)))
            return F.mse_loss(run.extra["seit_pixels"](q), x) + COMMITMENT * commitment

    def masked_loss(self, run: Run, net: TokenNet) -> Tensor:
        """:func:`masked_token_loss` of the batch."""
        extra, head = run.batch.extra, run.extra["seit_masked"]
        order, masked = extra["order"], int(extra["masked"][0])
        dropped = min(round(self.dropped * order.shape[1]), masked)
        with run.plan.autocast():
            scores = full(head(net, extra["tokens"], order, masked, dropped))
        return masked_token_loss(scores, head.target(extra["target"], net.patch), order.argsort(1) < masked)  # type: ignore[operator]

    def changing(self, run: Run) -> Callable[[Tensor], Tensor] | None:
        """What happens to the code vectors of this step."""
        if self.adapt is None:
            return None
        gen = run.gen("seit-plus-plus")

        def change(z: Tensor) -> Tensor:
            if not torch.is_grad_enabled():
                return z
            if self.adapt == "color+crop":
                z = color_adapt(z, (torch.rand(len(z), generator=gen) < 0.5).to(z.device))
            return crop_tokens(z, 0.2, gen)

        return change

    def on_epoch(self, run: Run) -> None:
        if run.stage.name == "tokens":
            net: Any = run.model.seit
            size = run.data.preprocess.size
            pixels = math.prod(size) * run.data.preprocess.channels
            rows = run.data.split.train[:512]
            with run.aside(), run.plan.autocast():
                found = torch.cat([net.tokens(run.normalise(run.plan.pixels(x))).flatten() for x in run.data.x.batches(rows.split(128))])
            share = found.bincount(minlength=self.codes) / len(found)
            run.report("codes in use", float((-(share * share.clamp_min(1e-12).log()).sum()).exp()), f"perplexity, at most {self.codes}")
            run.report("storage", token_bytes(net.grid[0] * net.grid[1], self.codes) / pixels, "share of the pixels' bytes")

    def answer(self, run: Run) -> nn.Module:
        net: Any = getattr(run.model, "seit", run.model)  # inside a step it stands in the network's place
        return Answer(run.normalise, net)
