"""DeepFool on mnist: how small its changes are beside the fast gradient sign, and what training on them brings."""

from __future__ import annotations

import functools
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.fit.answer import Answer, Normalise
from convince.fit.randomness import generator, preserved, seed_global
from convince.robust.deepfool import adversarial_finetune, deepfool, rho_adv
from convince.robust.fgsm import fgsm_min

SAYS = (
    "DeepFool changes every answer in a few iterations with far smaller perturbations than the fast gradient sign, "
    "and fine-tuning on them makes a network harder to fool at no cost in accuracy."
)
SUPPORTED = (
    "On both networks: every attacked image is fooled, median iterations at most 5, rho_adv at most 0.6 x that of the fast gradient sign "
    "(smallest eps an image); and fine-tuning on DeepFool images raises rho_adv by at least 20 % over fine-tuning on clean images, "
    "95 % interval above 0, at 0.5 points of accuracy at most."
)
CONTRADICTED = "On either network fewer than 95 % fooled, or rho_adv not below that of the fast gradient sign, or fine-tuning brings no gain (mean at most 0)."
BUDGET = (
    "mnist, 5,000 training and 2,000 test images, LeNet and MLP 784-500-150-10, 5 epochs of SGD (0.05, momentum 0.9, batch 64), fp32; "
    "attacks without pixel range, as in the paper, on 150 test images answered rightly; "
    "fast gradient sign on a grid of 200 eps up to 1. Fine-tuning: 3 epochs at half the rate "
    "on 2,000 clean and 500 DeepFool images (anew each epoch), control: clean only, second control: changes 5 times too large (reported). 4 seeds. "
    "Reduced against the catalogue: 5,000 training images for 10,000, 150 attacked images for 500, "
    "2,000 + 500 images for 4,000 + 2,000 in fine-tuning, 4 seeds for 5, 2,000 test images."
)

SEEDS = 4
LR = 0.05


class LeNet(nn.Module):
    """conv5x5 20 - pool - conv5x5 50 - pool - 500 - 10, ReLU after each but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 20, 5), nn.Conv2d(20, 50, 5)
        self.fc1, self.fc2 = nn.Linear(800, 500), nn.Linear(500, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.conv1(x).relu(), 2)
        x = F.max_pool2d(self.conv2(x).relu(), 2)
        return self.fc2(self.fc1(x.flatten(1)).relu())


def fully_connected() -> nn.Module:
    """The paper's FC500-150-10."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 500), nn.ReLU(), nn.Linear(500, 150), nn.ReLU(), nn.Linear(150, 10))


NETS: dict[str, Any] = {"lenet": LeNet, "mlp": fully_connected}


def accuracy(answer: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    with torch.no_grad():
        return float(torch.cat([answer(part).argmax(1) for part in x.split(500)]).eq(y).double().mean())


def attacked(answer: nn.Module, x: Tensor, y: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first ``count`` images that are answered rightly."""
    with torch.no_grad():
        right = (answer(x[: 2 * count]).argmax(1) == y[: 2 * count]).nonzero()[:count, 0]
    return x[right], y[right]


def robustness(answer: nn.Module, x: Tensor, y: Tensor, count: int) -> dict[str, float]:
    """DeepFool's success, median iterations and rho_adv, and the accuracy on all images."""
    clean, labels = attacked(answer, x, y, count)
    _, r, iterations, label = deepfool(answer, clean, labels)
    return {
        "fooled": float((label != labels).double().mean()),
        "iterations": float(iterations.double().median()),
        "rho": rho_adv(clean, r),
        "accuracy": accuracy(answer, x, y),
    }


def fast_gradient_sign(answer: nn.Module, x: Tensor, y: Tensor, count: int) -> dict[str, float]:
    """rho_adv with the smallest eps of each image, and with the one eps that fools 90 % (the paper's)."""
    clean, labels = attacked(answer, x, y, count)
    eps, r = fgsm_min(answer, clean, labels)
    common = float(eps.sort().values[int(0.9 * (len(eps) - 1))])
    side = clean[0].numel() ** 0.5
    relative = float((min(common, 1.0) * side / clean.flatten(1).norm(dim=1)).mean())
    return {"rho": rho_adv(clean, r), "rho_90": relative, "eps_90": min(common, 1.0), "never": float(eps.isinf().double().mean())}


def measure(bench: Bench) -> None:
    small = bench.scale == "smoke"
    train, test, count, clean, extra = (300, 100, 10, 64, 16) if small else (5000, 2000, 150, 2000, 500)
    for seed in range(2 if small else SEEDS):
        data = bench.data("mnist", train=train, test=test, seed=seed)
        x, y, tx, ty = (
            t for part in ("train", "test") for t in (data.float_batch(data.x.take(data.split[part])), data.y[data.split[part]])
        )  # fmt: skip
        for name in NETS:

            @functools.cache
            def trained(seed: int = seed, name: str = name, x: Tensor = x, y: Tensor = y, data: Any = data) -> nn.Module:
                with preserved():
                    seed_global(seed, name)
                    answer = Answer(Normalise(data.preprocess.mean, data.preprocess.std), NETS[name]())
                adversarial_finetune(answer, x, y, generator(seed, "train"), lr=LR, epochs=1 if small else 5, extra=0)
                return answer.eval()

            def tuned(
                extra: int, scale: float = 1.0, seed: int = seed, trained: Any = trained, x: Tensor = x, y: Tensor = y, tx: Tensor = tx, ty: Tensor = ty
            ) -> dict[str, float]:
                import copy

                answer = copy.deepcopy(trained())
                rows = torch.randperm(len(x), generator=generator(seed, "fine-tune"))[:clean]

                def perturb(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
                    return x + scale * deepfool(model, x, y)[1]

                epochs = 1 if small else 3
                adversarial_finetune(answer, x[rows], y[rows], generator(seed, "order"), lr=LR / 2, epochs=epochs, extra=extra, perturb=perturb)
                return robustness(answer.eval(), tx, ty, count)

            def plain(attack: Any, trained: Any = trained, tx: Tensor = tx, ty: Tensor = ty) -> dict[str, float]:
                return attack(trained(), tx, ty, count)

            bench.arm(f"{name} deepfool", seed, functools.partial(plain, robustness))
            bench.arm(f"{name} fgsm", seed, functools.partial(plain, fast_gradient_sign))
            bench.arm(f"{name} tuned", seed, functools.partial(tuned, extra))
            bench.arm(f"{name} tuned clean", seed, functools.partial(tuned, 0))
            bench.arm(f"{name} tuned x5", seed, functools.partial(tuned, extra, 5.0))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    comparisons: list[Any] = []
    supported, contradicted = True, False
    for net in NETS:
        change, base = column(numbers, f"{net} deepfool", "rho"), column(numbers, f"{net} fgsm", "rho")
        fooled, iterations = column(numbers, f"{net} deepfool", "fooled"), column(numbers, f"{net} deepfool", "iterations")
        tuned, clean, large = (column(numbers, f"{net} {arm}", "rho") for arm in ("tuned", "tuned clean", "tuned x5"))
        gain = paired(
            f"{net}: rho_adv gained by fine-tuning on DeepFool images, over clean ones (ratio - 1)",
            [a / b for a, b in zip(tuned, clean, strict=True)],
            [1.0] * len(clean),
        )
        cost = paired(
            f"{net}: accuracy, tuned minus tuned clean", column(numbers, f"{net} tuned", "accuracy"), column(numbers, f"{net} tuned clean", "accuracy")
        )
        ratio = statistics.fmean(change) / statistics.fmean(base)
        rules = {
            "every image fooled": min(fooled) >= 1,
            "median iterations at most 5": max(iterations) <= 5,
            "rho_adv at most 0.6 of the fast gradient sign's": ratio <= 0.6,
            "tuning gains 20 %, interval above 0": bool(gain.mean >= 0.2 and gain.low > 0),
            "at most 0.5 points of accuracy": cost.mean >= -0.005,
        }
        comparisons += [
            paired(f"{net}: rho_adv, DeepFool minus fast gradient sign", change, base),
            gain,
            cost,
            paired(f"{net}: rho_adv, tuned on changes 5 times too large minus clean (reported)", large, clean),
            {"what": f"{net}: rules", "ratio": ratio, **rules},
        ]
        supported &= all(rules.values())
        contradicted |= min(fooled) < 0.95 or ratio >= 1 or gain.mean <= 0
    return ("contradicted" if contradicted else "supported" if supported else "inconclusive"), comparisons
