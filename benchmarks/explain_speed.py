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
    f"occlusion, {WINDOW} px by {STRIDE}": (f"occlusion:window={WINDOW},stride={STRIDE}", {"captum": 5}, True),
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
    made = attr.Occlusion(answer)

    def occluded(x: Tensor, target: Tensor) -> Tensor:
        found = made.attribute(x, sliding_window_shapes=(3, WINDOW, WINDOW), strides=(3, STRIDE, STRIDE), target=target, baselines=0)
        return found.mean(1, keepdim=True)

    return occluded


def seconds(call: Callable[[], Any], images: int) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) / images


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
    placed = plan.pixels(x)
    table = [f"{torch.get_num_threads()} threads, {plan.precision}: {plan.reason}. {given.images} images, {given.slow} where it says so.", ""]
    table += [
        "| method | beside | ours, ms an image | theirs | ratio | asked for | format | agrees with our fp32 map | maps alike in fp32 |",
        "| --- " * 9 + "|",
    ]
    for method, (spec, asked, slow) in CASES.items():
        name, settings = parts.parse(spec)
        explainer = parts.make(name, **settings)
        n = given.slow if slow else given.images
        some, target = x[:n], torch.zeros(n, dtype=torch.int64)
        for library, least in asked.items():
            reference = theirs(library, method, answer)
            alike = float(rank_correlation(explainer(answer, x[:2], target[:2]).map, reference(x[:2], target[:2]).detach().float()).min())
            mine, other = [], []
            for _ in range(given.rounds):
                found = []
                mine.append(seconds(lambda: found.append(explain_all(explainer, answer, placed[:n], target, plan=plan)), n))
                other.append(seconds(lambda: [reference(a, b) for a, b in zip(some.split(BATCH), target.split(BATCH), strict=True)], n))
            said = found[0].table
            ratio = statistics.median(b / a for a, b in zip(mine, other, strict=True))
            row = f"| {method}{f' ({n} images)' if slow else ''} | {library} | {1000 * statistics.median(mine):.1f} | {1000 * statistics.median(other):.1f} "
            row += f"| {ratio:.1f} | {least:g} | {said['precision']} | {said.get('agreement', 1):.4f} | {alike:.4f} |"
            table.append(row)
            print(row, file=sys.stderr, flush=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    table.append(f"\nThe whole run, both libraries in it, held {peak:.2f} GB at most.")
    print("\n".join(table))
    if given.write:
        write("Explanations beside captum and pytorch-grad-cam", table)


if __name__ == "__main__":
    main()
