"""Explanations beside captum and pytorch-grad-cam: seconds an image for ResNet-18 at 224 px, all in one run, and how alike the maps are.

Ours as ``convince explain`` makes them (batches, bf16 where the map survives it), theirs as their documentation shows: fp32, a batch at a time
where they take one. Before a time is taken the definitions are held against each other in fp32.

python benchmarks/explain_speed.py [--images 64] [--slow 8] [--rounds 3] [--write]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from results import write
from torch import Tensor, nn

from convince import parts
from convince.explain.many import explain_all, rank_correlation
from convince.fit import precision
from convince.fit.answer import Answer, Normalise
from convince.fit.randomness import generator

SIDE, STEPS, WINDOW, STRIDE, BATCH = 224, 50, 32, 16, 32
# method -> (ours, the least ratio that was asked for by library, slow: fewer images)
CASES: dict[str, tuple[str, dict[str, float], bool]] = {
    "Grad-CAM": ("grad-cam", {"captum": 4, "pytorch-grad-cam": 15}, False),
    f"integrated gradients, {STEPS} steps": (f"integrated-gradients:steps={STEPS}", {"captum": 5}, True),
    f"occlusion, {WINDOW} px by {STRIDE}": (f"occlusion:window={WINDOW},stride={STRIDE},masker=black", {"captum": 5}, True),
    "Score-CAM, 512 channels": ("score-cam", {"pytorch-grad-cam": 5}, True),
}


def network() -> nn.Module:
    """torchvision's ResNet-18 with drawn weights and batch statistics of noise: weights that are learnt would not change a speed."""
    import torchvision

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = torchvision.models.resnet18(weights=None)
        with torch.no_grad():
            for _ in range(20):
                net(torch.randn(8, 3, SIDE, SIDE))
    return Answer(Normalise([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), net).eval()


def theirs(library: str, method: str, answer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """The library's way from images and targets to maps [n 1 h w]."""
    layer = answer.get_submodule("model.layer4")
    if library == "pytorch-grad-cam":
        from pytorch_grad_cam import GradCAM, ScoreCAM
        from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

        made = (GradCAM if method.startswith("Grad-CAM") else ScoreCAM)(model=answer, target_layers=[layer])
        return lambda x, target: torch.from_numpy(made(input_tensor=x, targets=[ClassifierOutputTarget(int(t)) for t in target]))[:, None]
    from captum import attr

    if method.startswith("Grad-CAM"):
        cam = attr.LayerGradCam(answer, layer)
        return lambda x, target: attr.LayerAttribution.interpolate(cam.attribute(x, target=target, relu_attributions=True), (SIDE, SIDE), "bilinear")
    if method.startswith("integrated"):
        made = attr.IntegratedGradients(answer)
        return lambda x, target: made.attribute(x, target=target, n_steps=STEPS, internal_batch_size=BATCH).sum(1, keepdim=True)
    made = attr.Occlusion(lambda x: answer(x).softmax(1))  # the chance, as ours watches

    def occluded(x: Tensor, target: Tensor) -> Tensor:
        found = made.attribute(x, sliding_window_shapes=(3, WINDOW, WINDOW), strides=(3, STRIDE, STRIDE), target=target, baselines=0)
        return found.mean(1, keepdim=True)

    return occluded


def seconds(call: Callable[[], Any], images: int) -> tuple[float, Any]:
    """Seconds an image of one call, and what it gave."""
    began = time.perf_counter()
    found = call()
    return (time.perf_counter() - began) / images, found


def row(method: str, library: str, spec: str, least: float, answer: nn.Module, x: Tensor, plan: precision.Plan, rounds: int) -> str:
    """One line of the table: ours and theirs in turn, ``rounds`` times."""
    name, settings = parts.parse(spec)
    explainer, reference = parts.make(name, **settings), theirs(library, method, answer)
    placed, target = plan.pixels(x), torch.zeros(len(x), dtype=torch.int64)
    exact = explainer(answer, x[:2], target[:2]).map
    alike = float(rank_correlation(exact, reference(x[:2], target[:2]).detach().float()).min())
    mine, other, said = [], [], {}
    for _ in range(rounds):
        took, found = seconds(lambda: explain_all(explainer, answer, placed, target, plan=plan), len(x))
        mine.append(took)
        said = found.table
        other.append(seconds(lambda: [reference(a, b) for a, b in zip(x.split(BATCH), target.split(BATCH), strict=True)], len(x))[0])
    ratio = statistics.median(b / a for a, b in zip(mine, other, strict=True))
    times = f"{1000 * statistics.median(mine):.1f} | {1000 * statistics.median(other):.1f} | {ratio:.1f} | {least:g}"
    return f"| {method} | {len(x)} | {library} | {times} | {said['precision']} | {said.get('agreement', 1):.4f} | {alike:.4f} |"


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--images", type=int, default=64)
    options.add_argument("--slow", type=int, default=8)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--write", action="store_true")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    answer, plan = network(), precision.choose()
    x = torch.rand(given.images, 3, SIDE, SIDE, generator=generator("explain speed"))
    table = [f"{plan.precision}: {plan.reason}. The last two columns are rank correlations of maps, the least of the images tried.", ""]
    heads = ["method", "images", "beside", "ours, ms an image", "theirs", "ratio", "asked for", "format", "agrees with our fp32 map", "ours and theirs in fp32"]
    table += ["| " + " | ".join(heads) + " |", "| --- " * len(heads) + "|"]
    for method, (spec, asked, slow) in CASES.items():
        for library, least in asked.items():
            table.append(row(method, library, spec, least, answer, x[: given.slow if slow else given.images], plan, given.rounds))
            print(table[-1], file=sys.stderr, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table.append(f"\nThe whole run, both libraries in it, held {peak:.2f} GB at most.")
    print("\n".join(table))
    if given.write:
        write("Explanations beside captum and pytorch-grad-cam", "explain_speed.py --write", table)


if __name__ == "__main__":
    main()
