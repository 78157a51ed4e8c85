"""Claim of novograd: as accurate as tuned SGD and AdamW, at least as tolerant to the learning rate as SGD, with half of Adam's state."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from convince.backbones.small_cnn import SmallCNN
from convince.claims import Bench, Numbers, column, paired
from convince.errors import Mistake
from convince.fit import adapters
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.technique import Seat, Team
from convince.fit.train import prepare, resolve
from convince.fit.weights import build_by_name
from convince.optim.novograd import NovoGrad, state_bytes
from convince.parts import Card

SAYS = "NovoGrad is about as accurate as the better of tuned SGD and AdamW, works at no fewer learning rates than SGD, and keeps half of Adam's state."
SUPPORTED = (
    "NovoGrad - the better other (picked on validation) is at least -0.5 points with the lower end of its 95 % paired t interval above -1.5, and NovoGrad has "
    "at least as many learning rates within 2 points of its own best as SGD, and at most 0.55 of Adam's state, and the exact controls hold: loss times 100 "
    "moves NovoGrad's weights by at most 1e-4 of their size and SGD's by more."
)
CONTRADICTED = "the upper end of the interval lies below -0.5 points, or NovoGrad has fewer good learning rates than SGD."
BUDGET = (
    "fashion-mnist, 4,000 training, 1,000 validation and 2,000 test images, a 3-block CNN (16-32-64), 4 epochs, batch 64, cosine to 0, no warm-up; weight "
    "decay SGD 5e-4, AdamW 0.01, NovoGrad 0.001. Stage 1: 7 learning rates over 3 decades around each optimiser's usual one (SGD 0.1, AdamW 0.001, "
    "NovoGrad 0.01), 1 seed, judged on validation. Stage 2: each optimiser at its best rate, 6 paired seeds. "
    "Reduced against the catalogue: a 3-block CNN for ResNet-8, 4 of 5 epochs, 2,000 of 10,000 test images; "
    "the large batch of 512 (which decided nothing) is left out."
)
USUAL = {"sgd": 0.1, "adamw": 0.001, "novograd": 0.01}
FACTORS = tuple(10 ** (i / 2) for i in range(-3, 4))


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    name, train, val, test, epochs, seeds = ("digits", 64, 32, 64, 1, 2) if small else ("fashion-mnist", 4000, 1000, 2000, 4, 6)
    model = "small-cnn:widths=(4,8)" if small else "small-cnn"
    bench.arm("controls", 0, controls)
    for seed in range(seeds + 1):
        data = bench.data(name, train=train, val=val, test=test, seed=seed)
        how = {"model": model, "epochs": epochs, "batch": 64, "warmup": 0.0, "seed": seed}
        for optimizer in USUAL:
            if seed == 0:
                for factor in FACTORS:
                    bench.arm(trial(optimizer, factor), 0, partial(cell, data, how, optimizer, USUAL[optimizer] * factor))
            else:
                bench.arm(optimizer, seed, partial(cell, data, how, optimizer, USUAL[optimizer] * best(bench.numbers, optimizer)))


def trial(optimizer: str, factor: float) -> str:
    """The name of the arm that tries this multiple of the usual learning rate."""
    return f"trial, {optimizer} {USUAL[optimizer] * factor:.3g}"


def tried(numbers: Numbers, optimizer: str) -> dict[float, float]:
    """Validation accuracy by factor of the usual learning rate."""
    return {factor: numbers[trial(optimizer, factor)]["0"]["val_accuracy"] for factor in FACTORS}


def best(numbers: Numbers, optimizer: str) -> float:
    """The factor with the highest validation accuracy."""
    scores = tried(numbers, optimizer)
    return max(scores, key=lambda factor: scores[factor])


def cell(data: Any, how: dict[str, Any], optimizer: str, lr: float) -> dict[str, float]:
    """One training: accuracy on validation and test. A run whose loss is no longer finite answers by chance."""
    run = ready(data, {**how, "lr": lr}, optimizer)
    try:
        fit(run)
    except Mistake as refusal:
        if "the loss is" not in str(refusal):  # the loop refuses to go on with a loss that is not finite
            raise
        return {"accuracy": 1 / data.k, "val_accuracy": 1 / data.k, "lr": lr, "finite": 0.0}
    return {"accuracy": run.evaluate("test").accuracy, "val_accuracy": run.evaluate("val").accuracy, "lr": lr, "finite": 1.0}


def ready(data: Any, how: dict[str, Any], optimizer: str) -> Run:
    """A run with this optimiser that has not started; AdamW is torch's own and no part."""
    parts = ("novograd",) if optimizer == "novograd" else ()
    run = prepare(resolve(settings(augment="none", parts=parts, **how), data)[0], data)
    if optimizer == "adamw":
        made = adapters.Optimizer(torch.optim.AdamW, {"weight_decay": 0.01})
        run.team = Team([*run.team.seats, Seat(Card(part="adamw", kind="optimizer", title="AdamW"), {}, made)])
    return run


def controls() -> dict[str, float]:
    """State in bytes against Adam's, and how far weights move when the loss is multiplied by 100 (float64, 30 steps)."""
    sgd = partial(torch.optim.SGD, lr=1e-4, momentum=0.9)
    model = build_by_name(SmallCNN, 0)
    kept = {}
    for name, make in (("novograd", NovoGrad), ("adam", torch.optim.AdamW)):
        optimizer: Optimizer = make(model.parameters())
        model.zero_grad()
        model(torch.zeros(2, 1, 28, 28)).sum().backward()
        optimizer.step()
        kept[name] = state_bytes(optimizer)
    return {"state": kept["novograd"] / kept["adam"], "novograd_moved": moved(NovoGrad), "sgd_moved": moved(sgd)}


def moved(make: Any) -> float:
    """The largest difference of any weight, as a share of the largest weight, between loss and 100 times the loss."""
    ends = []
    for scale in (1, 100):
        model = build_by_name(partial(SmallCNN, widths=(4, 8)), 0).double()
        optimizer = make(model.parameters())
        gen = generator("novograd controls")
        for _ in range(30):
            x, y = torch.rand(16, 1, 8, 8, generator=gen, dtype=torch.float64), torch.randint(0, 10, (16,), generator=gen)
            optimizer.zero_grad()
            (scale * F.cross_entropy(model(x), y)).backward()
            optimizer.step()
        ends.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    return float((ends[0] - ends[1]).abs().max() / ends[0].abs().max())


def judge(numbers: Numbers) -> tuple[str, list]:
    top = {name: max(tried(numbers, name).values()) for name in USUAL}
    good = {name: sum(score >= top[name] - 0.02 for score in tried(numbers, name).values()) for name in USUAL}
    other = max(("sgd", "adamw"), key=lambda name: top[name])
    against = [paired(f"accuracy, novograd - {name}", column(numbers, "novograd", "accuracy"), column(numbers, name, "accuracy")) for name in ("sgd", "adamw")]
    main = against[("sgd", "adamw").index(other)]
    exact = numbers["controls"]["0"]
    comparisons = [
        *against,
        {"what": f"the better other on validation is {other}; its validation accuracy", "value": top[other]},
        *({"what": f"learning rates of {name} within 2 points of its best, of 7", "value": count} for name, count in good.items()),
        *({"what": f"best learning rate of {name}", "value": USUAL[name] * best(numbers, name)} for name in USUAL),
        {"what": "state of NovoGrad / state of Adam", "value": exact["state"]},
        {"what": "loss times 100: NovoGrad's weights move by (share of the largest)", "value": exact["novograd_moved"]},
        {"what": "loss times 100: SGD's weights move by (share of the largest)", "value": exact["sgd_moved"]},
        {"what": "smallest difference that these pairs show", "value": (main.high - main.low) / 2},
    ]
    if main.high < -0.005 or good["novograd"] < good["sgd"]:
        return "contradicted", comparisons
    controls_hold = exact["state"] <= 0.55 and exact["novograd_moved"] <= 1e-4 < exact["sgd_moved"]
    if main.mean >= -0.005 and main.low > -0.015 and controls_hold:
        return "supported", comparisons
    return "inconclusive", comparisons
