"""Claim of b-cosification: a converted network beats a B-cos network from scratch, keeps up with the original, and shows where a class is."""

from __future__ import annotations

import copy
import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired, said
from convince.claims.grad_cam import quad_scenes, quadrant_masks
from convince.explain.localisation import energy_in_mask

ARMS = ("b-cosified", "from scratch", "control")
RATES = (1e-4, 1e-3)
SAYS = (
    "A trained network that is turned into a B-cos network and fine-tuned briefly is more accurate than a B-cos network trained from scratch as long, about as "
    "accurate as the original, and its contributions lie on the object of the class that is asked about."
)
SUPPORTED = (
    "test accuracy: b-cosified - from scratch is at least +0.5 points in every seed, and b-cosified - control at least -2 points in the mean; and the grid "
    "score of b-cosified is at least that of input x gradient of the control + 0.15 in the mean."
)
CONTRADICTED = "b-cosified is not above from scratch in at least 2 of 3 seeds, or its grid score is not above input x gradient in the mean."
BUDGET = (
    "fashion-mnist, 4,000 training and 4,000 test images, 3 seeds (paired: draw, initial weights, order). Original: resnet8, 6 epochs of the house's SGD. "
    "Then 3 epochs of Adam, cosine, batches of 64, adaptive clipping 0.01, binary cross-entropy with targets 1 and 1/C: b-cosified; from scratch (the same "
    "B-cos network, its weights drawn anew); control (the original, not converted). Rate of each arm: the better of 1e-4 and 1e-3 on 2,000 validation "
    "images of seed 100, which the claim does not use. Grid score: 100 grids of 2x2 test images of different classes, each answered rightly with a "
    "probability of at least 0.5 by b-cosified and by control; the share of a class's positive contribution in its own cell, mean over the four (chance "
    "0.25). Beside it Grad-CAM of the control, and the grid score from scratch. Against the catalogue: 4,000 of 20,000 training and 4,000 of 10,000 test "
    "images, and one grey channel (two after encoding) in place of three equal ones."
)


class Material:
    """One seed: its images, the original, and each arm's network, made when first asked for."""

    def __init__(self, bench: Bench, seed: int) -> None:
        from convince.claims import padded

        self.smoke, self.seed, self.bench = bench.scale == "smoke", seed, bench
        counts = (60, 30, 60) if self.smoke else (4000, 2000, 4000)
        data = bench.data("digits" if self.smoke else "fashion-mnist", train=counts[0], val=counts[1] if seed == 100 else 0, test=counts[2], seed=seed)
        self.data = padded(data, 28) if self.smoke else data

    @functools.cached_property
    def original(self) -> Any:
        """The run of the original."""
        return self.bench.train(self.data, model="resnet8", epochs=1 if self.smoke else 6, batch=64 if not self.smoke else 20, seed=self.seed).run

    def pixels(self, split: str) -> tuple[Tensor, Tensor]:
        rows = self.data.split[split]
        return self.data.float_batch(self.data.x.take(rows)), self.data.y[rows]

    def start(self, arm: str) -> nn.Module:
        """The network of an arm before its fine-tuning."""
        from convince.explain.b_cosification import bcosify
        from convince.fit.weights import build_by_name

        run = self.original
        net = build_by_name(run.build, 1000 + self.seed) if arm == "from scratch" else copy.deepcopy(run.model)
        if arm != "control":
            bcosify(net, ["conv1"], pooled=True)
        return run.plan.place(net)

    def tuned(self, arm: str, rate: float) -> nn.Module:
        """The answer of an arm after three epochs."""
        from timm.utils.agc import adaptive_clip_grad

        from convince.explain.b_cosification import bcos_loss
        from convince.fit.answer import Answer
        from convince.fit.randomness import generator

        run, net = self.original, self.start(arm).train()
        answer = Answer(run.normalise, net)
        x, y = self.pixels("train")
        targets = F.one_hot(y, 10).float()
        optimizer = torch.optim.Adam(net.parameters(), lr=rate)
        epochs, gen = (1 if self.smoke else 3), generator(self.seed, "fine-tuning")
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(x) // 64))
        for _ in range(epochs):
            for rows in torch.randperm(len(x), generator=gen).split(64):
                with run.plan.autocast():
                    scores = answer(run.plan.pixels(x[rows]))
                optimizer.zero_grad()
                bcos_loss(scores, targets[rows].to(scores.device)).mean().backward()
                adaptive_clip_grad(net.parameters(), 0.01, eps=1e-3)
                optimizer.step()
                schedule.step()
        return answer.cpu().eval()

    @functools.cache  # noqa: B019  (a material lives as long as its seed)
    def answer(self, arm: str, rate: float) -> nn.Module:
        return self.tuned(arm, rate)

    @torch.no_grad()
    def probabilities(self, answer: nn.Module, split: str) -> Tensor:
        return torch.cat([answer(part).softmax(1) for part in self.pixels(split)[0].split(500)])

    def accuracy(self, answer: nn.Module, split: str) -> float:
        return float((self.probabilities(answer, split).argmax(1) == self.pixels(split)[1]).double().mean())

    @functools.cache  # noqa: B019
    def grids(self, converted: float, control: float) -> tuple[Tensor, Tensor]:
        """Pixels [n 1 56 56] and the classes [n 4] of 2x2 grids of images that both networks are sure of."""
        from convince.fit.randomness import generator

        x, y = self.pixels("test")
        sure = torch.ones(len(y), dtype=torch.bool)
        for arm, rate in () if self.smoke else (("b-cosified", converted), ("control", control)):
            sure &= self.probabilities(self.answer(arm, rate), "test").gather(1, y[:, None])[:, 0] >= 0.5
        images = (x[sure] * 255).round().to(torch.uint8)
        return quad_scenes(images, y[sure], 6 if self.smoke else 100, generator(self.seed, "grids"))


def grid_score(method: str, answer: Any, x: Tensor, classes: Tensor) -> float:
    """Share of the positive part of each class's map in its own cell, mean over cells and grids."""
    from convince.explain.b_cos import BCos
    from convince.explain.grad_cam import GradCam
    from convince.explain.passes import gradients

    shares = []
    for j in range(4):
        target = classes[:, j]
        if method == "input x gradient":  # of the normalised input: (x - mean) / std times std dY/dx
            found = ((x - answer.normalise.mean) * gradients(answer, x, target, method)).sum(1, keepdim=True)
        else:
            explained = (BCos() if method == "b-cos" else GradCam())(answer, x, target).map
            assert explained is not None
            found = explained
        shares.append(energy_in_mask(found, quadrant_masks(torch.full((len(x),), j))))
    return float(torch.stack(shares).mean())


def rates_of(found: dict[str, float]) -> dict[str, float]:
    """The better rate of each arm; the smaller one where both are as good."""
    return {arm: max(RATES, key=lambda rate: (found[f"{arm} {rate:g}"], -rate)) for arm in ARMS}


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"

    def try_rates() -> dict[str, float]:
        material = Material(bench, 100)
        return {f"{arm} {rate:g}": material.accuracy(material.tuned(arm, rate), "val") for arm in ARMS for rate in RATES}

    rates = rates_of(bench.arm("rates", 100, try_rates))
    for seed in range(2 if smoke else 3):
        material = functools.cache(functools.partial(Material, bench, seed))

        def cell(arm: str, material: Any = material) -> dict[str, float]:
            m = material()
            if arm == "original":
                return {"accuracy": m.accuracy(m.original.answer.eval(), "test")}
            answer = m.answer(arm, rates[arm])
            x, classes = m.grids(rates["b-cosified"], rates["control"])
            found = {"accuracy": m.accuracy(answer, "test")}
            if arm == "control":
                return found | {f"grid, {method}": grid_score(method, answer, x, classes) for method in ("input x gradient", "grad-cam")}
            return found | {"grid, b-cos": grid_score("b-cos", answer, x, classes)}

        for arm in ("original", *ARMS):
            bench.arm(arm, seed, functools.partial(cell, arm))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    accuracy = {arm: column(numbers, arm, "accuracy") for arm in ("original", *ARMS)}
    grid, plain = column(numbers, "b-cosified", "grid, b-cos"), column(numbers, "control", "grid, input x gradient")
    gain = [a - b for a, b in zip(accuracy["b-cosified"], accuracy["from scratch"], strict=True)]
    kept = statistics.fmean(accuracy["b-cosified"]) - statistics.fmean(accuracy["control"])
    more = statistics.fmean(grid) - statistics.fmean(plain)
    rules = {
        "0.5 points above from scratch in every seed": min(gain) >= 0.005,
        "at most 2 points below the control": kept >= -0.02,
        "grid score 0.15 above input x gradient": more >= 0.15,
    }
    comparisons = [
        paired("accuracy, b-cosified minus from scratch", accuracy["b-cosified"], accuracy["from scratch"]),
        paired("accuracy, b-cosified minus control", accuracy["b-cosified"], accuracy["control"]),
        paired("grid score, b-cosified minus input x gradient of the control", grid, plain),
        paired("grid score, b-cosified minus Grad-CAM of the control", grid, column(numbers, "control", "grid, grad-cam")),
        paired("grid score, b-cosified minus from scratch", grid, column(numbers, "from scratch", "grid, b-cos")),
        {"what": "rules", **rules},
        {"what": "rates", **rates_of(numbers["rates"]["100"])},
    ]
    return said(all(rules.values()), sum(g <= 0 for g in gain) >= 2 or more <= 0), comparisons
