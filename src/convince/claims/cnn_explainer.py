"""Claim of cnn-explainer: the engine shows the exact arithmetic behind any number of a small trained network, and says where it cannot."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import numpy as np

from convince.claims import Bench, Numbers, column, said

TARGET = {"model": "tinyvgg-mini", "data": "digits", "accuracy": 0.95}
SAYS = "The arithmetic that is shown for a unit is the one that the network computes: products of patch and kernel, and their sum, for every layer."
SUPPORTED = (
    "for 500 random (layer, channel, row, column) of each of 3 trained networks the sum of the terms shown equals the activation of the network itself, in "
    "fp32, to 0.00001 of the layer's largest, softmax terms sum to 1, and the maps of the input channels and the bias sum to the output; a network with a skip "
    "connection is traced, its sum opaque; and a trace with one kernel turned over is caught: more than a tenth of its sums are wrong."
)
CONTRADICTED = "any of the sums is wrong by more than 0.001 of the layer's largest activation, or a turned kernel is not caught."
BUDGET = (
    "tinyvgg on fashion-mnist (28 px enlarged by black borders to 32, one channel), 10,000 images, 3 epochs, 3 seeds. Judged: the engine. The paper's page "
    "(JSON inside it, no outside address, keyboard) is not built here yet, and that people learn from it needs a study with people: neither is judged."
)


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    for seed in range(1 if smoke else 3):
        bench.arm("trace", seed, partial(traced, bench, smoke, seed))
    bench.arm("skip connection", 0, skipped)


def traced(bench: Bench, smoke: bool, seed: int) -> dict[str, float]:
    """Train one network; the largest errors of what is shown, and the share of wrong sums once a kernel is turned over."""
    from convince.claims import padded
    from convince.explain.cnn_explainer import explain_value, trace

    data = bench.data("digits" if smoke else "fashion-mnist", train=300 if smoke else 10_000, test=100 if smoke else 2000, seed=seed)
    data = padded(data, 16 if smoke else 32)
    done = bench.train(data, model="tinyvgg", epochs=1 if smoke else 3, seed=seed, parts=("adamw:lr=0.002,weight_decay=0.05",))
    x = data.float_batch(data.x.take(data.split.test[:1]))
    found = trace(done.answer, x)
    outputs = activations(done.answer, x)
    gen, worst = np.random.default_rng(seed), 0.0
    steps = [s for s in found.steps if s.name in outputs]
    for _ in range(50 if smoke else 500):
        step = steps[int(gen.integers(len(steps)))]
        at = tuple(int(gen.integers(n)) for n in step.output.shape)
        actual = outputs[step.name]
        worst = max(worst, abs(explain_value(step, at)["value"] - float(actual[at])) / max(float(np.abs(actual).max()), 1e-12))
    parts = 0.0
    for step in found.steps:
        if step.kind == "conv":
            assert step.bias is not None
            total = np.stack([step.intermediate(c).sum(0) + step.bias[c] for c in range(len(step.output))])
            parts = max(parts, float(np.abs(total - outputs[step.name]).max() / np.abs(outputs[step.name]).max()))
    conv = next(s for s in found.steps if s.kind == "conv")
    assert conv.weight is not None
    turned = dataclasses.replace(conv, weight=np.ascontiguousarray(conv.weight.transpose(0, 1, 3, 2)))
    places = [tuple(int(gen.integers(n)) for n in conv.output.shape) for _ in range(200)]
    wrong = np.mean([abs(explain_value(turned, at)["value"] - float(outputs[conv.name][at])) > 1e-5 * np.abs(outputs[conv.name]).max() for at in places])
    assert done.test is not None
    terms = explain_value(found.steps[-1], (0,))["terms"]
    total = sum(explain_value(found.steps[-1], (i,))["value"] for i in range(len(terms)))
    return {"error": worst, "error of the parts": parts, "softmax": float(total), "caught": float(wrong), "accuracy": done.test.accuracy}


def activations(answer: Any, x: Any) -> dict[str, np.ndarray]:
    """What each innermost module of the network itself gives, in fp32."""
    import torch

    seen: dict[str, np.ndarray] = {}
    handles = [
        m.register_forward_hook(lambda module, args, out, name=name: seen.update({name: out[0].detach().double().numpy()}))
        for name, m in answer.named_modules()
        if not list(m.children())
    ]
    with torch.no_grad():
        answer.eval()(x)
    for handle in handles:
        handle.remove()
    return seen


def skipped() -> dict[str, float]:
    """A network with skip connections: how many steps its trace has, and how many of them are opaque."""
    import torch

    from convince.backbones import builder
    from convince.explain.cnn_explainer import trace

    net = builder("resnet:layers=(1,1),widths=(4,8)", num_classes=10, in_chans=1, size=(16, 16))().eval()
    found = trace(net, torch.linspace(0, 1, 256).view(1, 1, 16, 16))
    return {"steps": len(found.steps), "opaque": sum(s.kind == "opaque" for s in found.steps)}


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    error, parts = max(column(numbers, "trace", "error")), max(column(numbers, "trace", "error of the parts"))
    softmax = max(abs(value - 1) for value in column(numbers, "trace", "softmax"))
    caught = min(column(numbers, "trace", "caught"))
    skip = numbers["skip connection"]["0"]
    supported = max(error, parts) <= 1e-5 and softmax < 1e-9 and caught > 0.1 and skip["opaque"] >= 1
    contradicted = max(error, parts) > 1e-3 or caught == 0
    facts = {
        "what": "largest error of what is shown, of the layer's largest activation", "terms": error, "maps of input channels": parts,
        "softmax sums to 1 within": softmax, "wrong sums once a kernel is turned over, share": caught, "opaque steps of a residual network": skip["opaque"],
        "test accuracy, mean": float(np.mean(column(numbers, "trace", "accuracy"))),
    }  # fmt: skip
    return said(supported, contradicted), [facts]
