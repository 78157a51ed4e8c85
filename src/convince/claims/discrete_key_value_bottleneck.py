"""Discrete key-value bottleneck: on a stream of new classes without replay, looked-up values forget less than a linear probe."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.fit.randomness import generator, preserved, seed_global
from convince.training.discrete_key_value_bottleneck import Bottleneck, learn_values, tasks_in_turn

SAYS = (
    "A classifier of frozen features, fixed keys and trained values learns classes one task after the other without replay and forgets far less than a probe."
)
SUPPORTED = (
    "Accuracy over all ten classes at the end of the stream: bottleneck - linear probe in sequence is at least +20 points with the 95 % paired t interval "
    "above 0, and the bottleneck keeps at least 70 % of its own accuracy in random order. Keys move by exactly 0, and one sample changes at most one row "
    "of values a codebook."
)
CONTRADICTED = "The interval of bottleneck - linear probe in sequence lies below +5 points, or a frozen key moves, or a sample changes more rows."
BUDGET = (
    "Encoder: small-cnn 16-32-64, 3 epochs on fashion-mnist, 4,000 images, then frozen, 64 pooled features. Stream: mnist, two classes at a time, 5 tasks "
    "of about 1,000 images, one pass, batch 10, no replay; test 2,000 images; 6 paired seeds (class order, encoder, stream). Bottleneck: 64 codebooks of "
    "256 keys of 8 numbers, keys by moving averages on the fashion-mnist features for 3 epochs, plain SGD. Baseline: linear probe in sequence; references: "
    "MLP probe (128 units) in sequence, linear probe and bottleneck in random order; controls: keys that go on learning from the stream, and a linear "
    "probe (with bias) on the sum of one-hot keys. Rate of each kind of learner: the best of 3 on seed 100, an order of its own. Reduced against the "
    "catalogue: 4,000 of 10,000 images for the encoder, 2,000 of 5,000 test images, 6 of 8 seeds."
)
RATES = {"bottleneck": (0.3, 3.0, 30.0), "linear": (0.01, 0.1, 1.0), "mlp": (0.01, 0.1, 1.0), "one-hot": (0.001, 0.01, 0.1)}
SIZES = {"codebooks": 64, "keys": 256, "key_size": 8}


class Material:
    """Features of one seed: of the pretraining images, of the stream in its two orders, and of the test images."""

    def __init__(self, bench: Bench, seed: int) -> None:
        smoke = bench.scale == "smoke"
        first, second = ("digits", "digits") if smoke else ("fashion-mnist", "mnist")
        data = bench.data(first, train=64 if smoke else 4000, test=0, seed=seed)
        model = "small-cnn:widths=(8,16)" if smoke else "small-cnn"
        run = bench.train(data, model=model, epochs=1 if smoke else 3, batch=32, lr=0.1, seed=seed).run
        stream = bench.data(second, train=200 if smoke else 5000, test=60 if smoke else 2000, seed=seed)

        def features(source: Any, rows: Tensor) -> Tensor:
            found = []
            with run.aside():
                for x in source.x.batches(rows.split(256)):
                    out = run.forward(run.plan.pixels(x))
                    found.append(run.model.forward_head(out.features, pre_logits=True).float())
            return torch.cat(found)

        self.seed, self.batch = seed, 10
        self.before = features(data, data.split.train)
        self.x, self.y = features(stream, stream.split.train), stream.y[stream.split.train]
        self.test, self.test_y = features(stream, stream.split.test), stream.y[stream.split.test]
        classes = torch.randperm(10, generator=generator(seed, "classes")).tolist()
        order = [classes[i : i + 2] for i in range(0, 10, 2)]
        self.sequence = torch.cat([rows for rows in tasks_in_turn(self.y, order, generator(seed, "stream"))])
        self.mixed = torch.randperm(len(self.y), generator=generator(seed, "mixed"))
        self.first = torch.isin(self.test_y, torch.tensor(order[0]))
        with preserved():
            seed_global(seed, "bottleneck")
            self.bottleneck = Bottleneck(self.x.shape[1], 10, **SIZES)
        gen = generator(seed, "keys")
        self.bottleneck.place_keys(self.before, gen)
        for _ in range(3):
            for rows in torch.randperm(len(self.before), generator=gen).split(64):
                self.bottleneck.move_keys(self.before[rows], 0.95, 0.8 * len(rows) / SIZES["keys"], gen)

    def scored(self, predict: Callable[[Tensor], Tensor]) -> dict[str, float]:
        with torch.no_grad():
            right = (predict(self.test).argmax(1) == self.test_y).double()
        return {"accuracy": float(right.mean()), "first_task": float(right[self.first].mean())}

    def values(self, order: Tensor, lr: float, learning_keys: bool = False) -> dict[str, float]:
        """The bottleneck along an order of rows."""
        made = self.bottleneck
        keys, kept = made.keys.clone(), [made.keys.clone(), made.counts.clone(), made.sums.clone()]
        with torch.no_grad():
            made.values.zero_()
        gen = generator(self.seed, "learning keys")
        index = made.lookup(self.x)
        most = 0
        for step, rows in enumerate(order.split(self.batch)):
            if learning_keys:
                made.move_keys(self.x[rows], 0.95, 0.0, gen)
            if step < 20 and not learning_keys:  # what one sample changes
                before = made.values.detach().clone()
                learn_values(made, index[:, rows[:1]], self.y[rows[:1]], lr)
                most = max(most, int((made.values.detach() != before).any(2).sum(1).max()))
                with torch.no_grad():
                    made.values.copy_(before)
            learn_values(made, made.lookup(self.x[rows]) if learning_keys else index[:, rows], self.y[rows], lr)
        found = {**self.scored(made), "rows": most, "moved": float((made.keys - keys).abs().max())}
        made.keys.copy_(kept[0])
        made.counts.copy_(kept[1])
        made.sums.copy_(kept[2])
        return found

    def probe(self, kind: str, order: Tensor, lr: float) -> dict[str, float]:
        """A linear or MLP probe on the features, or a linear one on the sum of one-hot keys, along an order of rows."""
        with preserved():
            seed_global(self.seed, kind)
            d = self.x.shape[1]
            net: nn.Module = nn.Linear(d, 10) if kind == "linear" else nn.Sequential(nn.Linear(d, 128), nn.ReLU(), nn.Linear(128, 10))
        predict: Callable[[Tensor], Tensor] = net
        params = list(net.parameters())
        if kind == "one-hot":
            size = SIZES["keys"]
            params = [torch.zeros(SIZES["codebooks"] * size, 10, requires_grad=True), torch.zeros(10, requires_grad=True)]  # type: ignore[list-item]
            shift = size * torch.arange(SIZES["codebooks"])[:, None]

            def predict(x: Tensor) -> Tensor:
                return F.embedding_bag((self.bottleneck.lookup(x) + shift).T.contiguous(), params[0], mode="sum") + params[1]

        optimizer = torch.optim.SGD(params, lr=lr)
        for rows in order.split(self.batch):
            optimizer.zero_grad()
            F.cross_entropy(predict(self.x[rows]), self.y[rows]).backward()
            optimizer.step()
        return self.scored(predict)


def learn(m: Material, kind: str, order: Tensor, lr: float) -> dict[str, float]:
    return m.values(order, lr) if kind == "bottleneck" else m.probe(kind, order, lr)


def measure(bench: Bench) -> None:
    @functools.lru_cache(maxsize=1)
    def material(seed: int) -> Material:
        return Material(bench, seed)

    best = {}
    for kind, rates in RATES.items():
        tries = {lr: bench.arm(f"choice, {kind}, rate {lr:g}", 100, lambda k=kind, lr=lr: learn(material(100), k, material(100).sequence, lr)) for lr in rates}  # type: ignore[misc]
        best[kind] = max(rates, key=lambda lr: tries[lr]["accuracy"])
    for seed in range(2 if bench.scale == "smoke" else 6):
        for kind, lr in best.items():
            bench.arm(f"{kind} in sequence", seed, lambda k=kind, lr=lr, s=seed: learn(material(s), k, material(s).sequence, lr))  # type: ignore[misc]
        for kind in ("bottleneck", "linear"):
            bench.arm(f"{kind} in random order", seed, lambda k=kind, s=seed: learn(material(s), k, material(s).mixed, best[k]))  # type: ignore[misc]
        bench.arm("learning keys in sequence", seed, lambda s=seed: material(s).values(material(s).sequence, best["bottleneck"], True))  # type: ignore[misc]


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    def points(arm: str, metric: str = "accuracy") -> list[float]:
        return [100 * value for value in column(numbers, arm, metric)]

    def gain(a: str, b: str, metric: str = "accuracy") -> Any:
        return paired(f"{a} - {b} [points of {'accuracy' if metric == 'accuracy' else 'accuracy on the first task'}]", points(a, metric), points(b, metric))

    own = "bottleneck in sequence"
    main = gain(own, "linear in sequence")
    kept = statistics.fmean(points(own)) / max(statistics.fmean(points("bottleneck in random order")), 1e-9)
    moved, rows = max(column(numbers, own, "moved")), max(column(numbers, own, "rows"))
    found: list[Any] = [main, gain(own, "mlp in sequence"), gain(own, "one-hot in sequence"), gain(own, "learning keys in sequence")]
    found += [gain(own, "learning keys in sequence", "first_task"), gain(own, "linear in random order"), gain(own, "bottleneck in random order")]
    found += [
        {"what": f"{arm}: accuracy at the end, mean [%]", "value": statistics.fmean(points(arm))} for arm in (own, "linear in sequence", "mlp in sequence")
    ]
    found += [
        {"what": "bottleneck: accuracy in sequence / in random order", "value": kept},
        {"what": "largest move of a frozen key", "value": moved},
        {"what": "most rows of values that one sample changes in a codebook", "value": rows},
    ]
    if main.high < 5 or moved > 0 or rows > 1:
        return "contradicted", found
    return ("supported" if main.mean >= 20 and main.low > 0 and kept >= 0.7 else "inconclusive"), found
