"""ScaleKD: a network learns a vision transformer's features through attention projectors, two views, and its later layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from convince.backbones import builder
from convince.distill.logit_kd import frozen, is_folder, kd_loss, stored_teacher, teacher_of, teacher_run
from convince.errors import Mistake, nearest
from convince.fit.precision import full
from convince.fit.run import Run
from convince.fit.technique import Technique
from convince.parts import Card
from convince.types import RunSpec

CARD = Card(
    part="scalekd",
    kind="technique",
    paper="scalekd",
    title="ScaleKD: Strong Vision Transformers Could Be Excellent Teachers",
    year=2024,
    url="https://arxiv.org/abs/2411.06786",
    departs=(
        "a teacher named as a network is trained first on the same data with AdamW, for train_teacher epochs; the paper's are pre-trained on ImageNet-22K",
        "of a plain transformer, stage 3 ends after two thirds of its blocks and stage 4 is the rest with the last norm; its class token at"
        " the end of stage 3 goes with the student's tokens through stage 4",
        "heads are as many as divide the width with at least 48 channels each; the paper has 16 of 48 and 24 of 64 for Swin-L",
        "weight scales the logit part too, so that 0 is off",
    ),
    strength="weight",
    off=0.0,
    tiny={"teacher": "timm/vit_tiny_patch16_224:patch_size=4,embed_dim=8,depth=2,num_heads=1", "train_teacher": 0},
    mutes=("gradient",),
    expects=("images", "labels", "logits", "network"),
)
SCALE = 5.0  # of the attention's softmax


def no_mean(z: Float[Tensor, "n t c"]) -> Float[Tensor, "n t c"]:
    """The frequency view: the map without its coefficient (0, 0) of the 2-D DCT-II, which is each channel's mean over positions."""
    return z - z.mean(1, keepdim=True)


def view_loss(student: Float[Tensor, "n t c"], teacher: Float[Tensor, "n t c"]) -> Float[Tensor, ""]:
    """Squared differences of maps that have length 1 over channels at each position, summed, by the batch size."""
    return (F.normalize(full(student), dim=2) - F.normalize(full(teacher), dim=2)).square().sum() / len(student)


def dual_view(views: tuple[Tensor, Tensor], teacher: Float[Tensor, "n t c"], a0: float, a1: float) -> Float[Tensor, ""]:
    """``a0`` times the spatial view's loss plus ``a1`` times the frequency view's; ``views`` come from two projectors."""
    return a0 * view_loss(views[0], teacher) + a1 * view_loss(no_mean(full(views[1])), no_mean(full(teacher)))


def heads_for(width: int) -> int:
    """The most heads that divide ``width`` and leave at least 48 channels each; 1 for narrow ones."""
    return max((h for h in range(1, width // 48 + 1) if width % h == 0), default=1)


@final
class AttentionProjector(nn.Module):
    """A student's map [n c_s i j] to the teacher's tokens [n h*w c_t]: cross-attention of queries with the map's positions.

    conv3x3 - BN - ReLU of the map (interpolated to ``grid``), plus a learned position map, gives keys and values; queries are
    learned, or tokens handed in; softmax(5 q k' / sqrt(c_t / heads)), linear, LayerNorm, plus an MLP of 4 times the width.
    """

    def __init__(self, c_s: int, c_t: int, grid: tuple[int, int], *, own_queries: bool) -> None:
        super().__init__()
        self.grid, self.heads = grid, heads_for(c_t)
        self.conv = nn.Conv2d(c_s, c_s, 3, padding=1)
        self.bn = nn.BatchNorm2d(c_s)
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, c_s, *grid), std=0.02))
        self.queries = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, grid[0] * grid[1], c_t), std=0.02)) if own_queries else None
        self.mix = nn.Linear(c_t, c_t)  # a 1x1 conv on tokens
        self.q, self.k, self.v = nn.Linear(c_t, c_t), nn.Linear(c_s, c_t), nn.Linear(c_s, c_t)
        self.out = nn.Linear(c_t, c_t)
        self.norm = nn.LayerNorm(c_t)
        self.mlp = nn.Sequential(nn.Linear(c_t, 4 * c_t), nn.ReLU(), nn.Linear(4 * c_t, c_t))

    def forward(self, x: Float[Tensor, "n c i j"], queries: Float[Tensor, "n t d"] | None = None) -> Float[Tensor, "n t d"]:
        if x.shape[2:] != self.grid:
            x = F.interpolate(x, self.grid, mode="bilinear", align_corners=False)
        tokens = (F.relu(self.bn(self.conv(x))) + self.position).flatten(2).transpose(1, 2)
        asked = self.queries if queries is None else queries
        assert asked is not None
        q, k, v = self.q(F.relu(self.mix(asked))).expand(len(x), -1, -1), self.k(tokens), self.v(tokens)
        q, k, v = (t.unflatten(2, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (SCALE * (q @ k.transpose(2, 3)) / math.sqrt(q.shape[-1])).softmax(-1)
        t = self.norm(self.out((weights @ v).transpose(1, 2).flatten(2)))
        return t + self.mlp(t)


# -- the teacher in two pieces -----------------------------------------------------------------------


@dataclass
class Pieces:
    """A transformer: the module that ends stage 3, the modules of stage 4, and how many tokens come before the map's."""

    network: nn.Module
    third: nn.Module
    rest: list[nn.Module]
    prefix: int

    def tail(self, tokens: Float[Tensor, "n t c"], kept: Tensor) -> Float[Tensor, "n u d"]:
        """The frozen stage 4 on projected tokens; ``kept`` is the teacher's own output of stage 3, whose prefix and layout are taken."""
        x = tokens.view(kept.shape) if kept.dim() == 4 else torch.cat([kept[:, : self.prefix].to(tokens.dtype), tokens], 1)
        for module in self.rest:
            x = module(x)
        return self.tokens(x)

    def tokens(self, x: Tensor) -> Float[Tensor, "n t c"]:
        """Tokens of the map alone, from [n prefix+t c] or [n h w c]."""
        return x.flatten(1, 2) if x.dim() == 4 else x[:, self.prefix :]

    def grid(self, x: Tensor) -> tuple[int, int]:
        """Rows and columns of the map."""
        if x.dim() == 4:
            return x.shape[1], x.shape[2]
        count = x.shape[1] - self.prefix
        rows, columns = getattr(self.network.patch_embed, "grid_size", (0, 0))
        return (rows, columns) if rows * columns == count else (math.isqrt(count), math.isqrt(count))

    def look(self, answer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One pass of the answer: outputs of stage 3 and stage 4 as they are, and the scores."""
        found: dict[str, Tensor] = {}
        handles = [
            module.register_forward_hook(lambda m, i, o, name=name: found.__setitem__(name, o))
            for name, module in (("third", self.third), ("fourth", self.rest[-1]))
        ]
        try:
            scores = answer(x)
        finally:
            for handle in handles:
                handle.remove()
        return found["third"], found["fourth"], scores


def pieces(answer: nn.Module) -> Pieces:
    """Cut timm's plain transformer (``blocks``) or Swin (``layers``) inside an answer in two; Mistake for other networks."""
    for module in answer.modules():
        body = getattr(module, "blocks", None) if hasattr(module, "patch_embed") else None
        stages = getattr(module, "layers", None) if hasattr(module, "patch_embed") else None
        last = getattr(module, "norm", None)
        norm = [last] if isinstance(last, nn.Module) else []
        if isinstance(body, (nn.Sequential, nn.ModuleList)) and len(body) > 1:
            cut = max(round(len(body) * 2 / 3), 1)
            return Pieces(module, body[cut - 1], [*body[cut:], *norm], int(getattr(module, "num_prefix_tokens", 0)))
        if isinstance(stages, (nn.Sequential, nn.ModuleList)) and len(stages) > 1:
            return Pieces(module, stages[-2], [stages[-1], *norm], 0)
    raise Mistake("scalekd: the teacher must be a vision transformer of timm with blocks (vit, deit) or layers (swin), such as timm/vit_tiny_patch16_224")


def default_teacher(size: Sequence[int]) -> str:
    """A small transformer whose patches divide the image, about 7 a side up to 96 pixels and 14 above."""
    h, w = size
    wanted = 7 if min(h, w) <= 96 else 14
    patch = min((p for p in range(1, min(h, w) + 1) if h % p == w % p == 0), key=lambda p: abs(min(h, w) / p - wanted))
    shape = "embed_dim=96,depth=6,num_heads=3" if wanted == 7 else "embed_dim=192,depth=12,num_heads=3"
    return f"timm/vit_tiny_patch16_224:patch_size={patch},{shape}"


def as_map(x: Tensor) -> Float[Tensor, "n c h w"]:
    """A student's output as a map: [n c h w] as it is; tokens [n p+h*h c] without what comes before the largest square."""
    if x.dim() == 4:
        return x
    side = math.isqrt(x.shape[1])
    return x[:, x.shape[1] - side * side :].transpose(1, 2).unflatten(2, (side, side))


def student_stages(model: nn.Module, call: Any) -> tuple[str, str]:
    """Names of the modules that end stage 3 and stage 4: the last map, and the last one outside it at a larger size.

    Where maps do not shrink (a plain transformer), the output after two thirds of the last's siblings.
    """
    seen: dict[str, torch.Size] = {}
    handles = []
    for name, module in model.named_modules():

        def hook(_m: nn.Module, _i: Any, o: Any, name: str = name) -> None:
            if isinstance(o, Tensor) and ((o.dim() == 4 and o.shape[2] > 1) or (o.dim() == 3 and o.shape[1] > 3)) and name:
                seen.pop(name, None)
                seen[name] = o.shape

        handles.append(module.register_forward_hook(hook))
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) < 2:
        raise Mistake("scalekd finds no two feature maps in the student; name two of its modules with stages=('...','...') or choose another --model")
    last = list(seen)[-1]
    for outside in (True, False):
        earlier = [n for n, s in seen.items() if n != last and len(s) == 4 == len(seen[last]) and s[2] > seen[last][2] and s[2] <= 2 * seen[last][2] + 1]
        earlier = [n for n in earlier if not (outside and n.startswith(last + "."))]
        if earlier:
            return earlier[-1], last
    same = [n for n, s in seen.items() if s == seen[last]]
    return same[max(len(same) * 2 // 3 - 1, 0)], last


@final
@dataclass
class ScaleKD(Technique):
    """The loss becomes ``(1 - w alpha) L + w alpha KD + w`` times both stages' :func:`dual_view`, ``w`` being ``weight``; 0 is off.

    ``teacher``: the folder of a finished run of a vision transformer on the same classes and size (fine-tune a strong one
    for real use), or a network (None: :func:`default_teacher`), trained first for ``train_teacher`` epochs (None: as long
    as the run, 0: left at random weights). ``stages`` names the student's two modules (None: :func:`student_stages`).
    ``third`` and ``fourth`` are (a0, a1) of the views; ``perception=False`` leaves the teacher's stage 4 out of stage 3's
    path. Projectors live in ``run.extra`` and never ship.
    """

    teacher: str | None = None
    weight: float = 1.0
    alpha: float = 0.5
    third: tuple[float, float] = (0.08, 0.06)
    fourth: tuple[float, float] = (0.08, 0.06)
    perception: bool = True
    train_teacher: int | None = None
    stages: tuple[str, str] | None = None
    _teacher: nn.Module | None = field(default=None, init=False, repr=False, compare=False)
    _pieces: Pieces | None = field(default=None, init=False, repr=False, compare=False)
    _taps: Any = field(default=None, init=False, repr=False, compare=False)
    rank = 80  # after edits, and after other terms: alpha is a share of the whole loss

    def __post_init__(self) -> None:
        if not self.weight >= 0 or not 0 <= self.alpha * self.weight <= 1:
            raise Mistake(f"scalekd: weight={self.weight}, alpha={self.alpha}: weight from 0 (off), and alpha times weight a share of the loss from 0 to 1")
        for name in ("third", "fourth"):
            pair = getattr(self, name)
            if len(pair) != 2 or not all(a >= 0 for a in pair):
                raise Mistake(f"scalekd: {name}={pair!r}: weights of the spatial and the frequency view, each at least 0, as in {name}=(0.08,0.06)")
        if self.train_teacher is not None and self.train_teacher < 0:
            raise Mistake(f"scalekd: train_teacher={self.train_teacher}: must be at least 0 epochs")
        if self.stages is not None and len(self.stages) != 2:
            raise Mistake(f"scalekd: stages={self.stages!r}: two names of the student's modules, stage 3 and stage 4")

    def on_start(self, run: Run) -> None:
        self._teacher = self._pieces = self._taps = None
        if self.weight == 0:
            return
        pre = run.data.preprocess
        if is_folder(self.teacher):
            answer = self._teacher = stored_teacher(run, str(self.teacher), "scalekd")
        else:  # its like, untrained: the shapes are known before it is trained
            model = builder(self._spec(run).settings["model"], num_classes=run.k, in_chans=pre.channels, size=pre.size)()
            answer = frozen(nn.Sequential(run.plan.place(model)))
        cut = pieces(answer)
        x = run.plan.pixels(torch.rand(2, pre.channels, *pre.size))
        with run.aside(), run.plan.autocast():
            three, four, _ = cut.look(answer, x)
            names = self.stages or student_stages(run.model, lambda: run.forward(x))
            modules = dict(run.model.named_modules())
            for name in names:
                if name not in modules:
                    raise Mistake(f"scalekd: stages={names!r}: the network has no module {name!r}{nearest(name, list(modules))}")
            taps = [run.tap(name) for name in names]
            shapes: list[int] = []
            handles = [modules[name].register_forward_hook(lambda m, i, o: shapes.append(as_map(o).shape[1])) for name in names]
            run.forward(x)
            for handle in handles:
                handle.remove()
        self._taps = taps
        for number, c_s, output in ((3, shapes[0], three), (4, shapes[1], four)):
            for view in ("spatial", "frequency"):
                own = number == 3 or not self.perception
                made = AttentionProjector(c_s, output.shape[-1], cut.grid(output), own_queries=own)
                run.extra[f"scalekd-{number}-{view}"] = made
        if self._teacher is not None:
            self._pieces = cut

    def fit_members(self, run: Run) -> list[RunSpec]:
        return [] if self.weight == 0 or is_folder(self.teacher) else [self._spec(run)]

    def _spec(self, run: Run) -> RunSpec:
        model = self.teacher or default_teacher(run.data.preprocess.size)
        return teacher_run(run, model, self.train_teacher, parts=("adamw",), lr=1e-3)

    def on_loss(self, run: Run) -> None:
        logits = run.out.logits
        if self.weight == 0 or logits is None or logits.shape[1] != run.k:
            return
        if self._pieces is None or self._teacher is None:
            self._teacher = teacher_of(run, self._spec(run))
            self._pieces = pieces(self._teacher)
        cut = self._pieces
        with run.plan.autocast():
            with torch.no_grad():
                three, four, scores = cut.look(self._teacher, run.batch.x)
            target = cut.tokens(four)
            maps = [as_map(tap()) for tap in self._taps]
            lower, upper = ([run.extra[f"scalekd-{i}-{view}"] for view in ("spatial", "frequency")] for i in (3, 4))
            views = [project(maps[0]) for project in lower]
            if self.perception:
                views = [cut.tail(view, three) for view in views]
            last = [project(maps[1], *([view] if self.perception else [])) for project, view in zip(upper, views, strict=True)]
            stages = dual_view((views[0], views[1]), target if self.perception else cut.tokens(three), *self.third)
            stages = stages + dual_view((last[0], last[1]), target, *self.fourth)
        share = self.weight * self.alpha
        run.loss = (1 - share) * run.loss + share * kd_loss(logits, full(scores), 1.0) + self.weight * stages
