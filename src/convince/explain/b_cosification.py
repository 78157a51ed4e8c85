"""B-cosification: a trained convolutional network becomes a B-cos network, and a short fine-tuning makes it accurate again."""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.conv import _ConvNd

from convince.errors import Mistake
from convince.explain.b_cos import BcosConv2d, BcosLinear, UncentredBatchNorm, contributions
from convince.fit.answer import Answer
from convince.fit.run import Run
from convince.fit.state import named
from convince.fit.technique import Technique
from convince.layers.surgery import Surgery, find, refuse_nothing, swap
from convince.parts import Card
from convince.types import Batch, Out

CARD = Card(
    part="b-cosification",
    kind="technique",
    paper="b-cosification",
    title="B-cosification: Transforming Deep Neural Networks to be Inherently Interpretable",
    year=2024,
    url="https://arxiv.org/abs/2411.00715",
    expects=("images", "labels", "logits", "network"),
    claims=("optimizer", "objective"),
    swaps=("_ConvNd", "Linear", "_NormBase", "LayerNorm", "GroupNorm"),
    departs=(
        "it starts from the run named by --start; without that, the B-cos network is trained from scratch, the paper's baseline",
        "transformers are refused, since position embeddings and class tokens add to the score from no pixel; the paper converts them all the same",
        "B steps straight to its value; the paper also tries a ramp and a learned B",
        "the last linear layer is put before average pooling where a network has nothing else in between, and stays behind it otherwise",
        "the epochs, the batch and the schedule are the run's; the paper fine-tunes 90 epochs in batches of 256 on a cosine",
        "chances are the softmax of the scores, as everywhere here; the released code reads each score by a sigmoid",
    ),
)


BIASED = (_ConvNd, nn.Linear, nn.LayerNorm, nn.GroupNorm, _NormBase)  # what may stay as it is, but for its bias

# -- the conversion ------------------------------------------------------------------------------------


def image_readers(model: nn.Module, x: Float[Tensor, "n c h w"]) -> list[str]:
    """Names of the modules without children that are handed the network's input ``x`` itself, in one pass."""
    found: list[str] = []
    handles = []
    for name, module in model.named_modules():
        if not isinstance(module, nn.Identity) and not list(module.children()):
            handles.append(module.register_forward_pre_hook(lambda m, args, name=name: found.append(name) if args and args[0] is x else None))
    try:
        model(x)
    finally:
        for handle in handles:
            handle.remove()
    return list(dict.fromkeys(found))


def pools_before_head(model: nn.Module, x: Float[Tensor, "n c h w"]) -> bool:
    """True where the scores are the linear head of the last map's mean over the plane, and nothing else. The network must be in eval mode."""
    features, head = model.forward_features(x), model.get_classifier()  # type: ignore[operator]
    if features.dim() != 4 or not isinstance(head, nn.Linear) or features.shape[1] != head.in_features:
        return False
    return torch.allclose(head(features.mean((2, 3))), model.forward_head(features), rtol=1e-4, atol=1e-5)  # type: ignore[operator]


def bcosify(model: nn.Module, readers: Sequence[str], b: float = 2.0, *, biases: bool = False, max_pools: bool = False, pooled: bool = False) -> Surgery:
    """Turn a network of normalised images into a B-cos network, in place; ``undo()`` of what is returned puts it back.

    Convolutions and linear layers become B-cos ones with their own weights, those named in ``readers`` read ``[x, -x]``; batch norms stop centring;
    max-pools become mean-pools; all biases go, and every class score gets ``-log(C - 1)``. ``pooled``: score every place, then average
    (:func:`pools_before_head`). With ``b=1``, ``biases`` and ``max_pools`` kept, it computes what it did plus that constant, which is where the
    paper's conversion begins. Raises Mistake, before anything is changed, for layers that it has no B-cos form of.
    """
    layers = find(model, types=(nn.Conv2d, nn.Linear, _BatchNorm, nn.MaxPool2d))
    _refuse(model, layers, readers)

    def make(name: str, old: nn.Module) -> nn.Module:
        if isinstance(old, nn.Conv2d):
            return BcosConv2d.of(old, b, reads_image=name in readers, bias=biases)
        if isinstance(old, nn.Linear):
            return BcosLinear.of(old, b, bias=biases) if type(old) is nn.Linear else old
        if isinstance(old, _BatchNorm):
            return UncentredBatchNorm.of(old, bias=biases)
        assert isinstance(old, nn.MaxPool2d)
        return old if max_pools or old.dilation not in (1, (1, 1)) else nn.AvgPool2d(old.kernel_size, old.stride, old.padding, old.ceil_mode)

    done = swap(model, layers, make)
    for module in [] if biases else list(model.modules()):
        if isinstance(module, BIASED) and module.bias is not None:
            done.steps.append(functools.partial(setattr, module, "bias", module.bias))
            done.added -= module.bias.numel()
            module.bias = None
    head = model.get_classifier()  # type: ignore[operator]
    if isinstance(head, (BcosConv2d, BcosLinear)):
        classes = head.out_features if isinstance(head, BcosLinear) else head.out_channels
        head.shift = -math.log(max(classes - 1, 1))
    if pooled:
        model.forward_head = types.MethodType(_place_by_place, model)  # type: ignore[assignment]
        done.steps.append(functools.partial(model.__dict__.pop, "forward_head"))
    return done


def _place_by_place(model: Any, features: Tensor, pre_logits: bool = False) -> Tensor:
    """``forward_head`` with the head before the pooling: a 1x1 B-cos convolution, then the mean over the plane."""
    if pre_logits:
        return type(model).forward_head(model, features, pre_logits=True)
    return model.get_classifier()(features.movedim(1, -1)).mean((1, 2))


def _refuse(model: nn.Module, layers: Sequence[tuple[str, nn.Module]], readers: Sequence[str]) -> None:
    convs = [(name, m) for name, m in layers if isinstance(m, nn.Conv2d)]
    refuse_nothing(convs, model, "b-cosification", "convolution", "choose a convolutional network such as resnet20")
    if any(isinstance(m, (BcosConv2d, BcosLinear)) for m in model.modules()):
        raise Mistake(f"b-cosification: {type(model).__name__} has B-cos layers already; convert it once")
    for name, conv in convs:
        if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
            how = f"padding_mode={conv.padding_mode!r}" if type(conv) is nn.Conv2d else type(conv).__name__
            raise Mistake(f"b-cosification: {name} is a convolution of another kind ({how}); choose a network of plain ones, such as resnet20")
    for name, m in layers:
        if isinstance(m, _BatchNorm) and m.running_var is None:
            raise Mistake(f"b-cosification: {name} keeps no running variance, which the converted norm divides by; choose a network that does")
    reading = dict(convs)
    wrong = [name for name in readers if name not in reading or reading[name].groups > 1]
    if wrong or not readers:
        what = f"is read by {wrong[0]}" if wrong else "is read by no layer as it is"
        raise Mistake(f"b-cosification: the image {what}, and only ungrouped convolutions can be made to read [x, -x]; choose a network such as resnet20")


# -- the fine-tuning -----------------------------------------------------------------------------------


def off_labels(y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
    """Targets of the binary cross-entropy: 1 for the class and ``1/C``, not 0, for every other; a mixed label is at least ``1/C`` everywhere."""
    return y.clamp_min(1 / y.shape[1])


def bcos_loss(logits: Float[Tensor, "n k"], y: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Binary cross-entropy to :func:`off_labels`, mean over classes; a row without label costs nothing."""
    return F.binary_cross_entropy_with_logits(logits, off_labels(y), reduction="none").mean(1) * y.sum(1)


@final
@dataclass
class BCosification(Technique):
    """Convert the network with :func:`bcosify` and train it with :func:`bcos_loss`; then ``convince explain RUN --method b-cos``.

    ``b`` is the exponent: 1 leaves units linear, larger ones ask for better aligned weights. Adam at ``--lr``, or else ``lr``, without weight decay;
    ``clip``: adaptive gradient clipping to this share of each unit's weights, 0 is none. Use it with ``--start RUN``, a trained run of the same --model.
    """

    b: float = 2.0
    lr: float = 1e-4
    clip: float = 0.01
    rank = 45  # converts what layers have put in

    def __post_init__(self) -> None:
        if not 1 <= self.b < math.inf:
            raise Mistake(f"b-cosification: b={self.b} must be at least 1 (1 is linear); 2 is the paper's")
        if not self.lr > 0 or not self.clip >= 0:
            raise Mistake(f"b-cosification: lr={self.lr} must be above 0 and clip={self.clip} at least 0 (0 is no clipping); 0.0001 and 0.01 are the paper's")

    def on_start(self, run: Run) -> None:
        run.require("forward_features", "conv")
        pixels = run.plan.pixels(run.data.x.take(run.data.split.train[:2]))
        with run.aside():
            x = run.normalise(pixels)
            readers, pooled = image_readers(run.model, x), pools_before_head(run.model, x)
        run.edit("b-cosification", readers=readers, b=self.b, pooled=pooled)
        with run.aside(), torch.enable_grad():  # a network that cannot be explained is refused now, not after training
            contributions(Answer(run.normalise, run.model), pixels, torch.zeros(len(pixels), dtype=torch.int64, device=pixels.device), "b-cosification")

    @staticmethod
    def rebuild(model: nn.Module, **spec: Any) -> None:
        """:func:`bcosify` with ``readers``, ``b`` and ``pooled``."""
        bcosify(model, **spec)

    def optimizer(self, run: Run, params: list[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return torch.optim.Adam([p for _, p in params], lr=run.settings.lr or self.lr)

    def objective(self, run: Run, out: Out, batch: Batch) -> Tensor:
        assert out.logits is not None
        assert batch.y is not None
        losses = bcos_loss(out.logits, batch.y)
        return losses.mean() if batch.weight is None else (losses * batch.weight).mean()

    def on_grad(self, run: Run) -> None:
        if self.clip:
            from timm.utils.agc import adaptive_clip_grad

            adaptive_clip_grad([p for _, p in named(run)], self.clip, eps=1e-3)
