"""One small good part a kind, as source; test_broken.py breaks one line of it for every check."""

TECHNIQUE = '''"""Shrink: pull the weights a little towards zero after each step."""
from dataclasses import dataclass
import torch
from torch import nn
from convince.fit.technique import Technique
from convince.parts import Card

CARD = Card(
    part="shrink",
    kind="technique",
    title="Shrink",
    strength="rate",
    off=0.0,
)


@dataclass
class Shrink(Technique):
    """Multiply every matrix by one minus the rate."""

    rate: float = 0.01

    def on_start(self, run):
        self.seen = 0

    def on_step(self, run):
        with torch.no_grad():
            for p in run.model.parameters():
                if p.dim() > 1:
                    p.mul_(1 - self.rate)
        self.seen += 1

    def state(self):
        return {"seen": self.seen}

    def restore(self, run, state):
        self.seen = state.get("seen", 0)
'''

LOSS = '''"""Halved: half of the cross-entropy, as a part of its own."""
import torch
from torch import nn
from convince.parts import Card

CARD = Card(
    part="halved",
    kind="loss",
    title="Half of the cross-entropy",
    claims=("objective",),
)


class Halved(nn.Module):
    """Cross-entropy times one half."""

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        self.reduction = reduction

    def forward(self, logits, y):
        rows = -(y * logits.log_softmax(1)).sum(1) / 2
        return {"none": rows, "mean": rows.mean(), "sum": rows.sum()}[self.reduction]
'''

AUGMENTATION = '''"""Dim: multiply every image by its own brightness."""
from dataclasses import dataclass
import torch
from convince.parts import Card

CARD = Card(
    part="dim",
    kind="augmentation",
    title="Dim",
)


@dataclass
class Dim:
    """Brightness between one minus ``by`` and one."""

    by: float = 0.5

    def __call__(self, x, y, gen):
        light = 1 - self.by * torch.rand(len(x), 1, 1, 1, generator=gen)
        return x * light.to(x), y
'''

BACKBONE = '''"""Tiny: one convolution, pooling and a linear head."""
import torch
from torch import nn
from convince.errors import Mistake
from convince.layers.head import Headed, maps
from convince.parts import Card

CARD = Card(
    part="tiny-net",
    kind="backbone",
    title="Tiny",
    accepts=("image",),
    variants={"tiny-net-wide": {"width": 16}},
    small=("tiny-net",),
    published={"tiny-net-wide": {"size": 32, "classes": 10, "parameters": 16 * 28 + 32 + 170, "macs": 32 * 32 * 16 * 27 + 160}},
)


class TinyNet(nn.Module):
    """conv - BN - ReLU - pool - linear."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, width: int = 6) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.conv = nn.Conv2d(in_chans, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, num_classes)
        self.feature_info = maps(("bn", width, 1))

    def forward_features(self, x):
        if min(x.shape[2:]) < 2:
            raise Mistake("tiny-net: needs two pixels a side")
        return self.bn(self.conv(x)).relu()

    def forward_head(self, x, pre_logits: bool = False):
        x = x.mean((2, 3))
        return x if pre_logits else self.fc(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes: int) -> None:
        self.num_classes, self.fc = num_classes, nn.Linear(self.num_features, num_classes)
'''

LAYER = '''"""Damp: a learned factor behind each convolution."""
import torch
from torch import nn
from convince.layers.surgery import attach, find, refuse_nothing
from convince.parts import Card

CARD = Card(
    part="damp",
    kind="layer",
    title="Damp",
    expects=("images",),
    unchanged=True,
)


class Damp(nn.Module):
    """The input times a learned number, one at first."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.by


def install(model, skip=("patch_embed*",)):
    places = find(model, types=(nn.Conv2d,), skip=skip)
    refuse_nothing(places, model, "damp", "convolutions", "choose another")
    return attach(model, "damp", places, lambda name, conv: Damp())
'''

EXPLAINER = '''"""Times: the gradient of a class score times the pixels."""
from dataclasses import dataclass
import torch
from convince.kinds import Explainer
from convince.parts import Card
from convince.types import Explanation

CARD = Card(
    part="times",
    kind="explainer",
    title="Gradient times input",
)


@dataclass
class Times(Explainer):
    """Gradient times input, summed over channels."""

    gain: float = 1.0

    def explain(self, answer, x, target):
        scores = answer(x).gather(1, target[:, None]).sum()
        (grad,) = torch.autograd.grad(scores, x)
        return Explanation(self.gain * (grad * x).sum(1, keepdim=True).detach())
'''

ATTACK = '''"""Sign: one step along the sign of the gradient of the loss."""
from dataclasses import dataclass
import torch
from convince.kinds import Attack
from convince.parts import Card

CARD = Card(
    part="sign",
    kind="attack",
    title="One signed step",
)


@dataclass
class Sign(Attack):
    """One step of size eps, or of ``step`` where there is no ball."""

    step: float = 0.1

    def perturb(self, answer, x, y, *, eps, norm):
        x.requires_grad_(True)
        (grad,) = torch.autograd.grad(torch.nn.functional.cross_entropy(answer(x), y), x)
        return x + (self.step if eps is None else eps) * grad.sign()
'''

PREDICTOR = '''"""Mirror: the mean of the scores of an image and its mirror."""
from dataclasses import dataclass
import torch
from torch import nn
from convince.kinds import Predictor
from convince.parts import Card

CARD = Card(
    part="mirror",
    kind="predictor",
    title="Mirror",
)


class Mirrored(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, x):
        return (self.answer(x) + self.answer(x.flip(-1))) / 2


@dataclass
class Mirror(Predictor):
    """Average over the mirror."""

    def wrap(self, answer):
        return Mirrored(answer)
'''

COMPRESSOR = '''"""Half: keep the weights in sixteen bits."""
from dataclasses import dataclass
import torch
from convince.kinds import Compressor, Cut
from convince.parts import Card

CARD = Card(
    part="half",
    kind="compressor",
    title="Half precision weights",
    when="after",
)


class HalfLinear(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.register_buffer("weight", inner.weight.detach().half())
        self.register_buffer("bias", inner.bias.detach().clone())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype), self.bias)


@dataclass
class Half(Compressor):
    """Halve the head."""

    def plan(self, answer, x, budget=None):
        return Cut({"name": "fc"})

    def apply(self, model, cut):
        self.rebuild(model, **cut.spec)

    @staticmethod
    def rebuild(model, name):
        setattr(model, name, HalfLinear(getattr(model, name)))
'''

PROBE = '''"""Mean: the mean of the scores, as a probe."""
from dataclasses import dataclass
import torch
from convince.kinds import Probe, as_found
from convince.parts import Card
from convince.types import Bars, Findings, Reading

CARD = Card(
    part="mean-score",
    kind="probe",
    title="Mean score",
)


@dataclass
class MeanScore(Probe):
    """The mean over images and classes."""

    def probe(self, answer, x, y):
        with as_found(answer), torch.no_grad():
            scores = answer(x)
        readings = [Reading("mean score", float(scores.mean())), Reading("largest score", float(scores.max()))]
        return Findings(readings, [Bars("Scores", "", {r.name: r.value for r in readings})])
'''

RECIPE = '''"""Bars: tell bright bars apart, as a recipe."""
from dataclasses import dataclass
import torch
from convince.checks.subject import tiny_images
from convince.kinds import Recipe, Setup
from convince.parts import Card
from convince.types import Field, Schema

CARD = Card(
    part="bars",
    kind="recipe",
    title="Bars",
)


@dataclass
class Bars(Recipe):
    """Bright bars."""

    schema = Schema((Field("image", "a grey picture"), Field("label", "the height of the bar")))

    def load(self, root):
        raise NotImplementedError

    def sample(self, gen):
        return tiny_images()

    def build(self, data):
        return Setup({"model": "small-cnn:widths=(4,)", "lr": 0.01})
'''

STUDY = '''"""Count: count the rows of a set, as a study."""
from dataclasses import dataclass
from convince.kinds import Study
from convince.parts import Card

CARD = Card(
    part="count-rows",
    kind="study",
    title="Count",
)


@dataclass
class CountRows(Study):
    """Count."""

    def run(self, budget):
        return {"rows": 48}
'''

SEARCH = '''"""Try some: the best of a few widths, each trained a little."""
from dataclasses import dataclass
import torch
from convince.kinds import Search
from convince.parts import Card
from convince.search.space import Space

CARD = Card(
    part="try-some",
    kind="search",
    title="Try some",
)


@dataclass
class TrySome(Search):
    """Trains small networks of random widths."""

    trial_epochs: int = 1
    network = "small-cnn"

    def space(self, data):
        return Space({"first": (2, 3, 4, 5, 6), "second": (4, 6, 8, 10)}, lambda genes: {"widths": [genes["first"], genes["second"]]})

    def find(self, lab):
        space = self.space(lab.data)
        for genes in space.draws(lab.seed):
            if not lab.afford(lab.of_training(self.trial_epochs)):
                break
            lab.train(space.options(genes), self.trial_epochs)
        return lab.best()
'''

GOOD = {
    "technique": TECHNIQUE,
    "loss": LOSS,
    "augmentation": AUGMENTATION,
    "backbone": BACKBONE,
    "layer": LAYER,
    "explainer": EXPLAINER,
    "attack": ATTACK,
    "predictor": PREDICTOR,
    "compressor": COMPRESSOR,
    "probe": PROBE,
    "recipe": RECIPE,
    "study": STUDY,
    "search": SEARCH,
}
