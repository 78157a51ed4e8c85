"""Explanation benchmark: ten attribution methods on a network that gives several labels a picture, scored by three numbers and by time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.explain.metrics import file_size, max_sensitivity
from convince.explain.passes import chances, gradients, scores
from convince.explain.ranking import CentreMap
from convince.fit.answer import Normalise
from convince.fit.precision import choose, full
from convince.fit.randomness import generator, preserved, seed_global
from convince.kinds import Explainer, Study, as_found, differentiable
from convince.parts import Card
from convince.types import Budget, Explanation

CARD = Card(
    part="explain-benchmark",
    kind="study",
    paper="xai-remote-sensing-eval",
    title="Evaluating explainable artificial intelligence methods for multi-label deep learning classification tasks in remote sensing",
    year=2021,
    url="https://arxiv.org/abs/2104.01375",
    departs=(
        "scenes made of the pictures of any set stand for BigEarthNet and SEN12MS, and a small network for the paper's DenseNet",
        "the ten methods are our choice; the paper's abstract names Occlusion, Grad-CAM and Lime of its ten",
        "every method explains a label's score before the sigmoid; auc_morf watches the chance after it",
        "Lime hides the cells of a grid, and what is hidden, for every method, is the mean of the training pixels",
        "the side of auc_morf's patches and of Occlusion's window is a sixth of the picture's, and the window moves by half of that",
    ),
    tiny={"train": 64, "test": 2, "again": 1, "samples": 8, "steps": 2},
)
METRICS = ("auc_morf", "max_sensitivity", "file_size")  # of all of them less is better
CASES = ("one label", "several labels", "missed")


# -- an answer of several labels -----------------------------------------------------------------------


@final
class MultiLabel(nn.Module):
    """Normalisation, then a network whose columns are labels of their own: the chance of each is the sigmoid of its score."""

    logits = False  # no softmax over the labels: methods that watch a chance watch the score itself

    def __init__(self, normalise: Normalise, model: nn.Module) -> None:
        super().__init__()
        self.normalise, self.model = normalise, model

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return full(self.model(self.normalise(x)))


def label_chances(answer: nn.Module, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
    """The chance of every label: the sigmoid for a :class:`MultiLabel`, else what perturbation methods watch."""
    found = scores(answer, x)
    return found.sigmoid() if isinstance(answer, MultiLabel) else chances(answer, found)


def scenes(images: Tensor, labels: Int[Tensor, " N"], count: int, classes: int, gen: Generator) -> tuple[Float[Tensor, "n c i j"], Float[Tensor, "n k"]]:
    """(pixels [0, 1], labels 0 or 1) of ``count`` scenes: one to three things of different classes on a soft noise of up to 0.4.

    ``images`` uint8 [N c h w] of at least ``classes`` classes, numbered from 0. Each thing stands somewhere in a quarter of its own.
    """
    h, w = images.shape[2:]
    cell = (h + (h + 4) // 5, w + (w + 4) // 5)
    size = (2 * cell[0], 2 * cell[1])
    soft = torch.rand(count, images.shape[1], *(max(side // 4, 2) for side in size), generator=gen)
    x = 0.4 * F.interpolate(soft, size=size, mode="bilinear", align_corners=False)
    many = torch.randint(1, 4, (count,), generator=gen).tolist()
    chosen = torch.rand(count, classes, generator=gen).argsort(1)[:, :3].tolist()
    quarters = torch.rand(count, 4, generator=gen).argsort(1)[:, :3].tolist()
    shifts = (torch.rand(count, 3, 2, generator=gen) * torch.tensor([cell[0] - h + 1.0, cell[1] - w + 1.0])).long().tolist()
    draws = torch.rand(count, 3, generator=gen).tolist()
    of_class = [(labels == k).nonzero()[:, 0] for k in range(classes)]
    y = torch.zeros(count, classes)
    for i in range(count):
        for j in range(min(many[i], classes)):
            k, quarter = chosen[i][j], quarters[i][j]
            thing = images[of_class[k][int(draws[i][j] * len(of_class[k]))]].float() / 255
            top, left = (quarter // 2) * cell[0] + shifts[i][j][0], (quarter % 2) * cell[1] + shifts[i][j][1]
            place = x[i, :, top : top + h, left : left + w]
            torch.maximum(place, thing, out=place)
            y[i, k] = 1.0
    return x, y


def train_labels(build: Callable[[], nn.Module], x: Float[Tensor, "n c h w"], y: Float[Tensor, "n k"], epochs: int, seed: int) -> MultiLabel:
    """A network trained by binary cross-entropy: Adam at 0.002 on a one-cycle schedule, batches of 64. The house's loop trains single labels."""
    plan = choose("auto", "image")
    with preserved(), torch.inference_mode(False), torch.enable_grad():
        seed_global(seed, "explain-benchmark")
        answer = MultiLabel(Normalise(x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).clamp_min(1e-3).tolist()), build())
        plan.place(answer).train()
        optimizer = torch.optim.Adam(answer.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=epochs * -(-len(x) // 64))
        gen = generator(seed, "explain-benchmark", "order")
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=gen).split(64):
                with plan.autocast():
                    found = answer(plan.pixels(x[rows]))
                loss = F.binary_cross_entropy_with_logits(found, y[rows].to(found))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return answer.cpu().eval().requires_grad_(False)


# -- methods and metrics -------------------------------------------------------------------------------


@final
@dataclass
class InputXGradient(Explainer):
    """The sum over channels of pixel times gradient: exact for a score that is linear in the pixels."""

    def explain(self, answer: nn.Module, x: Tensor, target: Int[Tensor, " n"]) -> Explanation:
        differentiable(answer, "input-x-gradient")
        found = x.detach() * gradients(answer, x, target, "input-x-gradient")
        return Explanation(found.sum(1, keepdim=True), {"attribution": found})


def ten_methods(mean: float = 0.0, samples: int = 200, steps: int = 50) -> dict[str, Explainer]:
    """The ten by name; ``mean`` [pixel value] is what stands for nothing, ``samples`` are Lime's, ``steps`` those of integrated gradients."""
    from convince.explain.deconvnet import Deconvnet
    from convince.explain.deep_lift import DeepLift
    from convince.explain.grad_cam import GradCam
    from convince.explain.guided_backprop import GuidedBackprop
    from convince.explain.integrated_gradients import IntegratedGradients
    from convince.explain.lime import Lime
    from convince.explain.occlusion import Occlusion
    from convince.explain.saliency import Saliency

    return {
        "saliency": Saliency(),
        "input-x-gradient": InputXGradient(),
        "integrated-gradients": IntegratedGradients(steps, mean),
        "guided-backprop": GuidedBackprop(),
        "deconvnet": Deconvnet(),
        "deep-lift": DeepLift(mean),
        "grad-cam": GradCam(),
        "guided-grad-cam": GuidedBackprop(cam=True),
        "occlusion": Occlusion(masker="mean"),
        "lime": Lime(samples, masker="mean"),
    }


def normalised_area(curve: Float[Tensor, "n K"]) -> Float[Tensor, " n"]:
    """Area under ``p(k) / p(0)`` by the trapezoid rule over the number of steps: 1 where nothing is lost, 0 where all is lost at once."""
    share = curve / curve[:, :1].clamp_min(1e-12)
    return torch.trapezoid(share, dim=1) / (curve.shape[1] - 1)


def patch_order(found: Float[Tensor, "n 1 h w"], patch: int) -> Int[Tensor, "n 1 h w"]:
    """When each pixel is replaced, from 0: patches by the mean of the map in them, most relevant first; of equal ones the first in reading order."""
    means = F.avg_pool2d(found, patch, ceil_mode=True, count_include_pad=False).flatten(1)
    order = means.argsort(dim=1, descending=True, stable=True)
    place = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    h, w = found.shape[2:]
    number = (torch.arange(h, device=order.device) // patch)[:, None] * -(-w // patch) + torch.arange(w, device=order.device) // patch
    return place[:, number][:, None]


def auc_morf(
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    found: Float[Tensor, "n 1 h w"],
    target: Int[Tensor, " n"],
    fill: Float[Tensor, "c 1 1"],
    patch: int = 8,
    steps: int | None = None,
) -> Float[Tensor, " n"]:
    """:func:`normalised_area` of the target's chance as patches become ``fill``, most relevant first, until none is left. Lower is better.

    ``steps`` None: a patch a step. ``patch=1`` removes single pixels, then give ``steps``. The answer must be in eval mode.
    """
    if patch < 1 or (steps is not None and steps < 1):
        raise Mistake(f"auc_morf: patch={patch} and steps={steps} must be at least 1")
    place = patch_order(found, patch)
    patches = -(-x.shape[2] // patch) * -(-x.shape[3] // patch)
    steps = min(steps or patches, patches)
    curve = []
    for k in range(steps + 1):
        shown = torch.where(place < round(patches * k / steps), fill.to(x), x)
        curve.append(label_chances(answer, shown).gather(1, target[:, None])[:, 0])
    return normalised_area(torch.stack(curve, 1))


def of_maps(found: Float[Tensor, "n 1 h w"], answer: nn.Module, x: Tensor, target: Tensor, fill: Tensor, patch: int) -> dict[str, Tensor]:
    """What needs the map alone: auc_morf by patches, the same by single pixels in as many steps, the size of the file, and is the map of one value?"""
    patches = -(-x.shape[2] // patch) * -(-x.shape[3] // patch)
    flat = found.flatten(1)
    return {
        "auc_morf": auc_morf(answer, x, found, target, fill, patch),
        "auc_morf by pixels": auc_morf(answer, x, found, target, fill, 1, patches),
        "file_size": file_size(found),
        "flat": (flat.amax(1) == flat.amin(1)).to(found.dtype),
    }


def examine(
    explainer: Explainer, answer: nn.Module, x: Float[Tensor, "n c h w"], target: Int[Tensor, " n"], fill: Float[Tensor, "c 1 1"], patch: int, again: int
) -> tuple[dict[str, Float[Tensor, " _"]], float]:
    """Every metric of every row (max_sensitivity of the first ``again``), and processor seconds a map, which other work does not move."""

    def maps(model: nn.Module, pixels: Tensor, wanted: Tensor) -> Tensor:
        made = torch.cat([_map(explainer(model, a, b)) for a, b in zip(pixels.split(explainer.rows), wanted.split(explainer.rows), strict=True)])
        return made.detach()

    began = time.process_time()
    found = maps(answer, x, target)
    seconds = (time.process_time() - began) / len(x)
    with as_found(answer):
        values = of_maps(found, answer, x, target, fill, patch)
        values["max_sensitivity"] = max_sensitivity(maps, found[:again], answer, x[:again], target[:again])
    return values, seconds


def _map(explanation: Explanation) -> Tensor:
    assert explanation.map is not None
    return explanation.map


def control_maps(x: Float[Tensor, "n c h w"], seed: int = 0) -> dict[str, Float[Tensor, "n 1 h w"]]:
    """Maps that know nothing: noise of each picture's own, and one bell in the middle."""
    noise = torch.rand(len(x), 1, *x.shape[2:], generator=generator(seed, "explain-benchmark", "noise"))
    centre = CentreMap().explain(nn.Identity(), x, torch.zeros(len(x), dtype=torch.int64)).map
    assert centre is not None
    return {"random": noise.to(x), "centre": centre}


def mean_ranks(values: Mapping[str, Tensor], rows: Bool[Tensor, " n"] | None = None) -> dict[str, float]:
    """Each method's rank among all of them (1: the least value; ties share), mean over the rows."""
    from scipy.stats import rankdata

    table = torch.stack([v if rows is None else v[rows] for v in values.values()]).double().cpu().numpy()
    return dict(zip(values, rankdata(table, axis=0).mean(1).tolist(), strict=True))


def case_of(chance: Float[Tensor, " n"], many: Int[Tensor, " n"]) -> dict[str, Bool[Tensor, " n"]]:
    """Rows by the three cases: the label is the only one; one of several; or it is there and the network misses it (chance below a half)."""
    missed = chance < 0.5
    return dict(zip(CASES, (~missed & (many == 1), ~missed & (many > 1), missed), strict=True))


def explain_benchmark(
    methods: Mapping[str, Explainer],
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    y: Float[Tensor, "n k"],
    fill: Float[Tensor, "c 1 1"],
    patch: int,
    again: int,
) -> list[dict[str, Any]]:
    """The table: a row a method, every true label of every picture explained; means, seconds, mean ranks over all and (auc_morf) in each case."""
    rows, target = y.nonzero().unbind(1)
    if not len(rows):
        raise Mistake("explain-benchmark: no picture has a label to explain")
    pixels = x[rows]
    cases = case_of(label_chances(answer, pixels).gather(1, target[:, None])[:, 0], y.sum(1).long()[rows])
    values: dict[str, dict[str, Tensor]] = {}
    seconds: dict[str, float] = {}
    for name, explainer in methods.items():
        values[name], seconds[name] = examine(explainer, answer, pixels, target, fill, patch, again)
    ranks = {metric: mean_ranks({name: found[metric] for name, found in values.items()}) for metric in METRICS}
    auc = {name: found["auc_morf"] for name, found in values.items()}
    by_case = {case: mean_ranks(auc, inside) if bool(inside.any()) else None for case, inside in cases.items()}
    for name, control in control_maps(pixels).items():
        values[name], seconds[name] = of_maps(control, answer, pixels, target, fill, patch), 0.0
    table = []
    for name, measured in values.items():
        row: dict[str, Any] = {"method": name, **{metric: float(v.mean()) for metric, v in measured.items()}, "seconds": seconds[name]}
        if name in methods:
            row["rank"] = sum(ranks[metric][name] for metric in METRICS) / len(METRICS)
            row["rank by case"] = {case: None if rank is None else rank[name] for case, rank in by_case.items()}
        table.append(row)
    return table


# -- the study -----------------------------------------------------------------------------------------


@final
@dataclass
class ExplainBenchmark(Study):
    """Trains a network on scenes of several things, and prints how the ten methods explain each of them, beside a random and a centred map.

    ``data``: a built-in set, folder or table of pictures, whose first ``labels`` classes the scenes hold; ``train`` and ``test`` scenes;
    ``again`` of the explanations are asked for anew, ten times each, for max_sensitivity. ``more``: further explainers by name, with options.
    """

    data: str = "digits"
    model: str = "small-cnn"
    labels: int = 6
    train: int = 3000
    test: int = 48
    again: int = 16
    samples: int = 200
    steps: int = 50
    more: tuple[str, ...] = ()
    seed: int = 0

    def run(self, budget: Budget) -> dict[str, Any]:
        """The table, and how well the network itself does. ``budget`` is that of its training, in epochs."""
        from sklearn.metrics import f1_score

        from convince import parts
        from convince.backbones import builder
        from convince.data import load

        if budget.unit != "epochs" or budget.value < 1:
            raise Mistake(f"explain-benchmark: a budget of {budget.value:g} {budget.unit} does not fit; give whole epochs of the training")
        data = load(self.data, seed=self.seed)
        labels = min(self.labels, data.k)
        if data.preprocess.kind != "image" or not len(data.split.test) or labels < 2:
            raise Mistake(f"explain-benchmark: {self.data} must be images of at least two classes with a test part")
        made = {}
        for split, count in (("train", self.train), ("test", max(self.test, 200))):
            rows = data.split[split]
            if len(missing := set(range(labels)) - set(data.y[rows].tolist())):
                raise Mistake(f"explain-benchmark: the {split} part of {self.data} has no picture of the class {data.classes[min(missing)]!r}")
            made[split] = scenes(data.x.take(rows), data.y[rows], count, labels, generator(self.seed, "explain-benchmark", split))
        (x, y), (x_test, y_test) = made["train"], made["test"]
        build = builder(self.model, num_classes=labels, in_chans=x.shape[1], size=tuple(x.shape[2:]))
        answer = train_labels(build, x, y, round(budget.value), self.seed)
        said = label_chances(answer, x_test) >= 0.5
        f1 = {kind: float(f1_score(y_test.numpy(), said.numpy(), average=kind, zero_division=0.0)) for kind in ("micro", "macro")}
        fill = x.mean((0, 2, 3))[:, None, None]
        methods = ten_methods(float(fill.mean()), self.samples, self.steps)
        methods |= {spec: parts.make(name, **options) for spec in self.more for name, options in [parts.parse(spec)]}
        patch = max(2, round(min(x.shape[2:]) / 6))
        table = explain_benchmark(methods, answer, x_test[: self.test], y_test[: self.test], fill, patch, self.again)
        print(self._page(table, f1, patch))
        return {**asdict(self), "budget": asdict(budget), "f1": f1, "patch": patch, "table": table}

    def _page(self, table: list[dict[str, Any]], f1: dict[str, float], patch: int) -> str:
        lines = [
            f"{self.test} scenes of {self.data}, every true label; {self.model}: F1 {100 * f1['micro']:.1f} micro, {100 * f1['macro']:.1f} macro. "
            f"Less is better in all columns; patches of {patch}x{patch}; ranks among the methods, mean of three metrics, and of auc_morf by case"
        ]
        heads = ("auc_morf", "by pixels", "max sens.", "bytes", "ms a map", "rank", *CASES)
        lines.append(f"{'method':<24}" + "".join(f"{head:>15}" for head in heads))
        for r in table:
            cells = [r["auc_morf"], r["auc_morf by pixels"], r.get("max_sensitivity"), r["file_size"], 1000 * r["seconds"] or None, r.get("rank")]
            cells += [r.get("rank by case", {}).get(case) for case in CASES]
            lines.append(f"{r['method']:<24}" + "".join(f"{'-' if c is None else f'{c:.3g}':>15}" for c in cells))
        return "\n".join(lines)
