"""Explainability study: are robust networks easier to explain? A plain, an adversarially trained and an AdvProp network, by localisation and deletion."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Generator, Tensor, nn

from convince.errors import Mistake
from convince.explain.explain_benchmark import InputXGradient, control_maps
from convince.explain.faithfulness import deletion, insertion
from convince.explain.localisation import box_from_map, iou, pointing_hit
from convince.explain.passes import scores
from convince.fit.answer import Answer, Normalise
from convince.fit.precision import choose
from convince.fit.randomness import generator, preserved
from convince.fit.weights import build_by_name
from convince.kinds import Explainer, Study, as_found
from convince.layers.surgery import Surgery, find, refuse_nothing, swap
from convince.parts import Card
from convince.robust.pgd import pgd
from convince.types import Budget

CARD = Card(
    part="explainability-study",
    kind="study",
    paper="explainability-robustness-study",
    title="How explainable are adversarially-robust CNNs?",
    year=2022,
    url="https://arxiv.org/abs/2205.13042",
    departs=(
        "one small network trained three ways on clutter made of any set; the paper takes 12 finished networks of five architectures on ImageNet",
        "the methods are our choice of three families, eight in all; SHAP and meaningful perturbation are left out",
        "CAM is Grad-CAM without its ReLU, which is the same map up to a factor on a network of pooling and a linear head",
        "pictures from elsewhere are the same ones under noise of 0.15; the paper has ImageNet-A, -C, -O and others",
        "adversaries are made of the network in eval mode; those of AdvProp by its auxiliary batch norms",
    ),
    tiny={"train": 64, "test": 120, "images": 2, "masks": 16, "samples": 16, "steps": 1, "ig_steps": 2},
)
ARMS = ("vanilla", "pgd", "advprop")
FAMILIES = {"gradient": ("gradient", "gradient-x-input", "integrated-gradients"), "cam": ("cam", "grad-cam"), "perturbation": ("rise", "lime", "occlusion")}
GRID = tuple(i / 20 for i in range(1, 20))


# -- pictures of which one knows where the thing is ----------------------------------------------------


def clutter(
    images: Tensor, labels: Int[Tensor, " N"], count: int, gen: Generator
) -> tuple[Float[Tensor, "n c i j"], Int[Tensor, " n"], Bool[Tensor, "n 1 i j"], Float[Tensor, "n 4"]]:
    """(pixels [0, 1], class, mask, box (left, top, right, bottom)) of pictures of twice the side: one thing somewhere before three scraps of others.

    ``images`` uint8 [N c h w] on black; the mask is where the thing is brighter than a tenth, the box what encloses the mask. Scraps are the middle of
    other pictures, two fifths of the side.
    """
    channels, h, w = images.shape[1:]
    scrap = (max(h * 2 // 5, 1), max(w * 2 // 5, 1))
    rows = torch.randint(len(images), (count, 4), generator=gen)
    at = torch.rand(count, 4, 2, generator=gen)
    x, mask, boxes = torch.zeros(count, channels, 2 * h, 2 * w), torch.zeros(count, 1, 2 * h, 2 * w, dtype=torch.bool), torch.zeros(count, 4)
    for i in range(count):
        for j in range(1, 4):
            top, left = (int(at[i, j, axis] * (2 * side - part + 1)) for axis, (side, part) in enumerate(zip((h, w), scrap, strict=True)))
            a, b = (h - scrap[0]) // 2, (w - scrap[1]) // 2
            x[i, :, top : top + scrap[0], left : left + scrap[1]] = images[rows[i, j], :, a : a + scrap[0], b : b + scrap[1]].float() / 255
        top, left = int(at[i, 0, 0] * (h + 1)), int(at[i, 0, 1] * (w + 1))
        thing = images[rows[i, 0]].float() / 255
        inside = thing.amax(0, keepdim=True) > 0.1
        place = x[i, :, top : top + h, left : left + w]
        place.copy_(torch.where(inside, thing, place))
        mask[i, :, top : top + h, left : left + w] = inside
        if bool(inside.any()):
            down, across = mask[i, 0].nonzero().unbind(1)
            boxes[i] = torch.stack([across.min(), down.min(), across.max() + 1, down.max() + 1]).float()
    return x, labels[rows[:, 0]], mask, boxes


# -- three ways to train -------------------------------------------------------------------------------


@final
class PairedNorm(nn.Module):
    """Two batch norms of one size: ``main`` for clean pictures and ``auxiliary`` for adversarial ones; ``adversarial`` says which is used."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main, self.auxiliary, self.adversarial = main, copy.deepcopy(main), False

    def forward(self, x: Tensor) -> Tensor:
        return self.auxiliary(x) if self.adversarial else self.main(x)


def pair_norms(net: nn.Module) -> Surgery:
    """AdvProp's surgery: every batch norm becomes a :class:`PairedNorm`. ``undo()`` drops the auxiliary ones: the network has the plain one's size again."""
    norms = find(net, types=(nn.BatchNorm1d, nn.BatchNorm2d))
    refuse_nothing(norms, net, "advprop", "batch norm", "choose another network")
    return swap(net, norms, lambda name, norm: PairedNorm(norm))


def use_norms(net: nn.Module, adversarial: bool) -> None:
    """Send what follows through the auxiliary batch norms, or the main ones."""
    for module in net.modules():
        if isinstance(module, PairedNorm):
            module.adversarial = adversarial


def loss_of(arm: str, answer: Answer, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], attack: Callable[[nn.Module, Tensor, Tensor], Tensor]) -> Tensor:
    """What an arm minimises: L(x), L(x') of the adversaries x', or for AdvProp the sum of L(x) by the main and L(x') by the auxiliary batch norms."""
    if arm == "vanilla":
        return F.cross_entropy(answer(x), y)
    use_norms(answer, True)
    with as_found(answer):
        adversaries = attack(answer, x, y)
    loss = F.cross_entropy(answer(adversaries), y)
    use_norms(answer, False)
    return loss if arm == "pgd" else loss + F.cross_entropy(answer(x), y)


def train_arm(
    arm: str, build: Callable[[], nn.Module], x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], epochs: int, seed: int, eps: float, steps: int, step: float
) -> Answer:
    """A network trained by one of ``ARMS``: Adam at 0.003 on a one-cycle schedule, batches of 64; initial weights and order are those of the seed."""
    if arm not in ARMS:
        raise Mistake(f"explainability-study: arm={arm!r} must be one of {', '.join(ARMS)}")
    plan = choose("auto", "image")
    with preserved(), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)
        net = plan.place(build_by_name(build, seed)).train()
        answer = Answer(Normalise(x.mean((0, 2, 3)).tolist(), x.std((0, 2, 3)).clamp_min(1e-3).tolist()).to(plan.device), net)
        surgery = pair_norms(net) if arm == "advprop" else Surgery()
        optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
        batches = [rows for e in range(epochs) for rows in torch.randperm(len(x), generator=generator(seed, "explainability-study", e)).split(64)]
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=len(batches))
        for i, rows in enumerate(batches):

            def attack(model: nn.Module, pixels: Tensor, wanted: Tensor, i: int = i) -> Tensor:
                return pgd(model, pixels, wanted, generator(seed, "explainability-study", "attack", i), eps=eps, steps=steps, step=step)

            with plan.autocast():
                loss = loss_of(arm, answer, plan.pixels(x[rows]), y[rows].to(plan.device), attack)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        surgery.undo()
    return answer.cpu().eval().requires_grad_(False)


def of_network(answer: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], eps: float, seed: int) -> dict[str, float]:
    """Accuracy on clean pictures, under noise of 0.15 and under a PGD attack of ten steps; the mean of the largest chance on clean ones."""
    with as_found(answer):
        clean = scores(answer, x)
        noisy = scores(answer, (x + 0.15 * torch.randn(x.shape, generator=generator(seed, "explainability-study", "noise")).to(x)).clamp(0, 1))
        parts = [
            scores(answer, pgd(answer, pixels, wanted, generator(seed, "explainability-study", "test", i), eps=eps, steps=10))
            for i, (pixels, wanted) in enumerate(zip(x.split(64), y.split(64), strict=True))
        ]
    attacked = torch.cat(parts)
    found = {name: float((s.argmax(1) == y).double().mean()) for name, s in (("accuracy", clean), ("under noise", noisy), ("under attack", attacked))}
    return {**found, "confidence": float(clean.softmax(1).amax(1).mean())}


# -- methods and measures ------------------------------------------------------------------------------


def eight_methods(masks: int = 300, samples: int = 200, ig_steps: int = 20) -> dict[str, Explainer]:
    """The methods by name, of three families: see ``FAMILIES``."""
    from convince.explain.grad_cam import GradCam
    from convince.explain.integrated_gradients import IntegratedGradients
    from convince.explain.lime import Lime
    from convince.explain.occlusion import Occlusion
    from convince.explain.rise import Rise
    from convince.explain.saliency import Saliency

    return {
        "gradient": Saliency(),
        "gradient-x-input": InputXGradient(),
        "integrated-gradients": IntegratedGradients(ig_steps),
        "cam": GradCam(relu=False),
        "grad-cam": GradCam(),
        "rise": Rise(masks),
        "lime": Lime(samples, masker="black"),
        "occlusion": Occlusion(masker="black"),
    }


def best_threshold(found: Float[Tensor, "n 1 h w"], boxes: Float[Tensor, "n 4"]) -> float:
    """The share of a map's maximum, of ``GRID``, whose boxes overlap most often by a half with the true ones; the smallest of equals."""
    return max(GRID, key=lambda share: float((iou(box_from_map(found, share), boxes) >= 0.5).double().mean()))


def of_maps(
    found: Float[Tensor, "n 1 h w"],
    answer: nn.Module,
    x: Float[Tensor, "n c h w"],
    y: Int[Tensor, " n"],
    mask: Bool[Tensor, "n 1 h w"],
    boxes: Float[Tensor, "n 4"],
    tune: int,
) -> dict[str, float]:
    """Pointing game, localisation (share of boxes with IoU >= 0.5), insertion and deletion. The first ``tune`` rows choose the threshold and do no more."""
    share = best_threshold(found[:tune], boxes[:tune])
    found, x, y, mask, boxes = (t[tune:] for t in (found, x, y, mask, boxes))
    with as_found(answer):
        inserted, deleted = insertion(answer, x, found, y), deletion(answer, x, found, y)
    return {
        "pointing": float(pointing_hit(found, mask).double().mean()),
        "localisation": float((iou(box_from_map(found, share), boxes) >= 0.5).double().mean()),
        "insertion": float(inserted.mean()),
        "deletion": float(deleted.mean()),
        "threshold": share,
    }


def right_for_all(answers: Mapping[str, nn.Module], x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"], count: int) -> Int[Tensor, " _"]:
    """The first ``count`` rows that every network answers rightly."""
    right = torch.stack([scores(answer, x).argmax(1) == y for answer in answers.values()]).all(0)
    return right.nonzero()[:count, 0]


def maps_of(explainer: Explainer, answer: nn.Module, x: Float[Tensor, "n c h w"], y: Int[Tensor, " n"]) -> Float[Tensor, "n 1 h w"]:
    """Maps of the true class, 32 pictures at a time."""
    found = [explainer(answer, a, b).map for a, b in zip(x.split(explainer.rows), y.split(explainer.rows), strict=True)]
    return torch.cat([m.detach() for m in found if m is not None])


# -- the study -----------------------------------------------------------------------------------------


@final
@dataclass
class ExplainabilityStudy(Study):
    """Trains a network plainly, by PGD and by AdvProp, explains pictures that all three answer rightly by eight methods, and prints both tables.

    ``data``: a built-in set, folder or table of pictures on black; ``train`` and ``test`` pictures of clutter; ``images`` are explained, half as
    many more choose thresholds. ``eps`` and ``step`` [pixel value, 0 to 1]: the attack in training, of ``steps``; the test's has ten.
    """

    data: str = "digits"
    model: str = "resnet:layers=(1,1,1),widths=(8,16,32)"
    train: int = 3000
    test: int = 600
    images: int = 60
    eps: float = 0.1
    steps: int = 3
    step: float = 0.05
    masks: int = 300
    samples: int = 200
    ig_steps: int = 20
    seed: int = 0

    def run(self, budget: Budget) -> dict[str, Any]:
        """The two tables, and Spearman's correlations over the networks. ``budget`` is that of one training, in epochs."""
        from convince.backbones import builder
        from convince.data import load

        if budget.unit != "epochs" or budget.value < 1:
            raise Mistake(f"explainability-study: a budget of {budget.value:g} {budget.unit} does not fit; give whole epochs of one training")
        data = load(self.data, seed=self.seed)
        if data.preprocess.kind != "image" or not len(data.split.test):
            raise Mistake(f"explainability-study: {self.data} must be images with a test part")
        made = []
        for split, count in (("train", self.train), ("test", self.test)):
            rows = data.split[split]
            made.append(clutter(data.x.take(rows), data.y[rows], count, generator(self.seed, "explainability-study", split)))
        (x, y, _, _), (x_test, y_test, mask, boxes) = made
        build = builder(self.model, num_classes=data.k, in_chans=x.shape[1], size=tuple(x.shape[2:]))
        answers = {arm: train_arm(arm, build, x, y, round(budget.value), self.seed, self.eps, self.steps, self.step) for arm in ARMS}
        networks = {arm: of_network(answer, x_test, y_test, self.eps, self.seed) for arm, answer in answers.items()}
        tune = -(-self.images // 2)
        rows = right_for_all(answers, x_test, y_test, tune + self.images)
        if len(rows) <= tune:
            raise Mistake(f"explainability-study: the three networks agree rightly on {len(rows)} of {self.test} pictures; train longer, or give more test=")
        known = (x_test[rows], y_test[rows], mask[rows], boxes[rows])
        table = []
        for name, explainer in eight_methods(self.masks, self.samples, self.ig_steps).items():
            for arm, answer in answers.items():
                table.append({"method": name, "network": arm, **of_maps(maps_of(explainer, answer, *known[:2]), answer, *known, tune)})
        for name, found in control_maps(known[0], self.seed).items():
            for arm, answer in answers.items():
                table.append({"method": name, "network": arm, **of_maps(found, answer, *known, tune)})
        together = correlations(networks, table)
        print(self._page(networks, table, together))
        explained = len(rows) - tune
        return {**asdict(self), "budget": asdict(budget), "explained": explained, "networks": networks, "table": table, "correlations": together}

    def _page(self, networks: dict[str, dict[str, float]], table: list[dict[str, Any]], together: dict[str, float | None]) -> str:
        lines = [f"{self.model} on clutter of {self.data}; in %", f"{'network':<22}" + "".join(f"{key:>15}" for key in networks["vanilla"])]
        lines += [f"{arm:<22}" + "".join(f"{100 * value:>15.1f}" for value in row.values()) for arm, row in networks.items()]
        measures = ("pointing", "localisation", "insertion", "deletion")
        lines += ["", f"{'in %: ' + ', '.join(ARMS):<24}" + "".join(f"{m:>24}" for m in measures)]
        for method in dict.fromkeys(r["method"] for r in table):
            cells = {r["network"]: r for r in table if r["method"] == method}
            lines.append(f"{method:<24}" + "".join(f"{'  '.join(f'{100 * cells[arm][m]:5.1f}' for arm in ARMS):>24}" for m in measures))
        known = ", ".join(f"{what} {value:+.2f}" for what, value in together.items() if value is not None)
        return "\n".join([*lines, "", f"rank correlation over {len(networks)} networks, which says little: {known or 'none, for ties'}"])


def correlations(networks: Mapping[str, dict[str, float]], table: list[dict[str, Any]]) -> dict[str, float | None]:
    """Spearman's over the networks, of means over the methods: what goes with accuracy, and with confidence. None where one of the two is constant."""
    from scipy.stats import spearmanr

    methods = [name for names in FAMILIES.values() for name in names]
    measures = ("pointing", "localisation", "insertion", "deletion")
    mean = {m: [statistics.fmean(r[m] for r in table if r["network"] == arm and r["method"] in methods) for arm in networks] for m in measures}
    wanted = [(a, b) for a in ("accuracy", "under noise") for b in ("pointing", "localisation")] + [("confidence", b) for b in ("insertion", "deletion")]
    found: dict[str, float | None] = {}
    for a, b in wanted:
        left = [row[a] for row in networks.values()]
        constant = len(set(left)) == 1 or len(set(mean[b])) == 1
        found[f"{a} and {b}"] = None if constant else float(spearmanr(left, mean[b]).statistic)
    return found
