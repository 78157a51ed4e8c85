"""BP-free training study: Forward-Forward, Mono-Forward and Cascaded-Forward against backpropagation of the same layers, under the same rules."""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from convince.data import Data
from convince.errors import Mistake
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.run import Run
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.kinds import Study
from convince.parts import Card
from convince.training.tpsgd import peak_saved
from convince.types import Budget, Split

CARD = Card(
    part="bp-free-training",
    kind="study",
    paper="bp-free-training",
    title="Beyond Backpropagation: Exploring Innovative Algorithms for Energy-Efficient Deep Neural Network Training",
    year=2025,
    url="https://arxiv.org/abs/2509.19063",
    departs=(
        "the search is random, with the same number of trials and the same draws for each method; the paper searches with Optuna",
        "the paper's widths are not given; the dense network is 784-500-500-10 for images of 28 pixels",
        "Forward-Forward trains with Adam and the others with SGD and momentum, each with its own range of learning rates",
        "peak memory is that of the activations that autograd holds in one step, and on a GPU the allocator's peak as well",
        "without a readable meter energy is processor time times a stated number of watts",
    ),
    tiny={"methods": ("dense bp", "dense mf"), "seeds": 1, "trials": 1, "hidden": (8,), "widths": (4,)},
)

METHODS: dict[str, tuple[str, tuple[str, ...], tuple[float, float]]] = {  # network, parts, range of the learning rate
    "dense bp": ("dense", (), (0.003, 0.3)),
    "dense mf": ("dense", ("mono-forward",), (0.003, 0.3)),
    "dense ff": ("dense", ("forward-forward",), (0.003, 0.1)),
    "dense last layer": ("dense", ("tpsgd:scale=0.0",), (0.003, 0.3)),
    "dense bp + local losses": ("dense", ("mono-forward:local=False",), (0.003, 0.3)),
    "conv bp": ("conv", (), (0.003, 0.3)),
    "conv cafo": ("conv", ("cascaded-forward",), (0.003, 0.3)),
    "conv cafo dfa": ("conv", ("cascaded-forward:blocks=dfa",), (0.003, 0.3)),
}


@final
class Dense(nn.Module):
    """Linear - ReLU for each of ``hidden`` on flattened input, then a linear head."""

    def __init__(self, inputs: int, k: int, hidden: Sequence[int] = (500, 500)) -> None:
        super().__init__()
        sizes = [inputs, *hidden]
        self.hidden = nn.Sequential(nn.Flatten(), *(m for a, b in itertools.pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))
        self.fc = nn.Linear(sizes[-1], k)

    def forward(self, x: Tensor) -> Float[Tensor, "n k"]:
        return self.fc(self.hidden(x))


@final
class Blocks(nn.Module):
    """conv3x3 - ReLU - max-pool - BN for each of ``widths``, then a linear head on the flattened map."""

    def __init__(self, channels: int, size: tuple[int, ...], k: int, widths: Sequence[int] = (16, 32)) -> None:
        super().__init__()
        sizes = [channels, *widths]
        blocks = (m for a, b in itertools.pairwise(sizes) for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.BatchNorm2d(b)))
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(widths[-1] * math.prod(side >> len(widths) for side in size), k)

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n k"]:
        return self.fc(self.blocks(x).flatten(1))


# -- energy ----------------------------------------------------------------------------------------

RAPL = Path("/sys/class/powercap/intel-rapl:0/energy_uj")


class EnergyMeter:
    """Joules of a stretch of work: an NVIDIA card's own meter, the processor's (RAPL), or processor time x ``watts``.

    A readable meter measures everything the device does, so its idle power [W], read over ``idle_seconds`` first, is
    subtracted. ``source`` says which it is: "nvml", "rapl" or "processor time".
    """

    def __init__(self, watts: float = 15.0, idle_seconds: float = 0.2, rapl: Path = RAPL) -> None:
        if not watts > 0:
            raise Mistake(f"watts={watts}: must be above 0; what one busy core draws, 15 is usual")
        self.watts, self.rapl = watts, rapl
        self.source, self._read = self._open()
        self.idle = 0.0
        if self.source != "processor time":
            start, began = self._read(), time.monotonic()
            time.sleep(idle_seconds)
            self.idle = max(self._read() - start, 0.0) / (time.monotonic() - began)

    def _open(self) -> tuple[str, Callable[[], float]]:
        with contextlib.suppress(Exception):  # no driver, no card, no right to read: the next meter is tried
            import pynvml

            pynvml.nvmlInit()
            card = pynvml.nvmlDeviceGetHandleByIndex(0)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(card)
            return "nvml", lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1e3
        with contextlib.suppress(OSError, ValueError):
            int(self.rapl.read_text())
            return "rapl", lambda: int(self.rapl.read_text()) / 1e6
        return "processor time", lambda: time.process_time() * self.watts

    @contextlib.contextmanager
    def measure(self) -> Iterator[dict[str, float]]:
        """``with meter.measure() as spent: ...`` fills ``spent["joules"]`` and ``spent["seconds"]``."""
        spent: dict[str, float] = {}
        start, began = self._read(), time.monotonic()
        yield spent
        spent["seconds"] = time.monotonic() - began
        spent["joules"] = max(self._read() - start - self.idle * spent["seconds"], 0.0)


# -- one fair training -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What the search chooses."""

    lr: float
    batch: int


def draw_trials(count: int, low: float, high: float, seed: int, batches: Sequence[int] = (32, 64, 128)) -> list[Trial]:
    """Log-uniform learning rates and batches; the same places of the range for every method at one seed."""
    gen = generator(seed, "bp-free-training", "trials")
    where = torch.rand(count, generator=gen).tolist()
    at = torch.randint(len(batches), (count,), generator=gen).tolist()
    return [Trial(low * (high / low) ** u, batches[i]) for u, i in zip(where, at, strict=True)]


def build_for(network: str, data: Data, hidden: Sequence[int], widths: Sequence[int]) -> Callable[[], nn.Module]:
    """The dense or convolutional network of the study for this data."""
    shape = data.preprocess
    if network == "dense":
        return lambda: Dense(shape.channels * math.prod(shape.size), data.k, hidden)
    if len(shape.size) != 2 or min(shape.size) >> len(widths) == 0:
        raise Mistake(f"{data.origin}: the convolutional network needs images of at least {2 ** len(widths)} pixels a side; leave out the 'conv' methods")
    return lambda: Blocks(shape.channels, shape.size, data.k, widths)


def trained(
    data: Data, method: str, trial: Trial, seed: int, epochs: int, patience: int | None, hidden: Sequence[int] = (500, 500), widths: Sequence[int] = (16, 32)
) -> Run:
    """A finished run of one method, stopped early on the validation accuracy, its best weights restored."""
    if not len(data.split.val):
        raise Mistake(f"{data.origin}: the study needs a validation part beside the test part, to search and to stop by")
    network, parts, _ = METHODS[method]
    stop = () if patience is None else (f"early-stopping:patience={patience},metric=accuracy",)
    fixed: dict[str, Any] = {"augment": "none", "weight_decay": 0.0, "schedule": "constant", "precision": "fp32"}
    run = prepare(settings(model="small-cnn", parts=(*parts, *stop), epochs=epochs, batch=trial.batch, lr=trial.lr, seed=seed, **fixed), data, drop_off=False)
    run.build = build_for(network, data, hidden, widths)
    fit(run)
    return run


def search(data: Data, method: str, trials: int, seed: int, rows: int, epochs: int, **network: Any) -> Trial:
    """The trial with the best validation accuracy, each on the first ``rows`` training rows for ``epochs``."""
    low, high = METHODS[method][2]
    few = replace(data, split=Split(data.split.train[:rows], data.split.val, data.split.test))
    found = []
    for trial in draw_trials(trials, low, high, seed):
        try:
            found.append(trained(few, method, trial, seed, epochs, None, **network).evaluate("val").accuracy)
        except Mistake as mistake:
            if "loss is" not in str(mistake):  # a rate that diverges has lost; all else is not ours to hide
                raise
            found.append(0.0)
    return draw_trials(trials, low, high, seed)[max(range(trials), key=found.__getitem__)]


def measured(data: Data, method: str, trial: Trial, seed: int, epochs: int, patience: int, meter: EnergyMeter, **network: Any) -> dict[str, float]:
    """Accuracy on the test part, epochs until it stopped, seconds, joules, and peak bytes of one training."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    with meter.measure() as spent:
        run = trained(data, method, trial, seed, epochs, patience, **network)
    ran = sum(row["kind"] == "epoch" for row in run.record.rows)
    test, began = run.evaluate("test"), time.monotonic()
    run.forget_scores()
    run.evaluate("val")
    seconds = time.monotonic() - began
    row = {"accuracy": test.accuracy, "epochs": float(ran), "seconds": spent["seconds"], "seconds_per_epoch": spent["seconds"] / max(ran, 1)}
    row |= {"joules": spent["joules"], "answer_ms_per_image": 1000 * seconds / len(data.split.val), "saved_bytes": float(step_bytes(run))}
    return row | ({"gpu_bytes": float(torch.cuda.max_memory_allocated())} if cuda else {})


def step_bytes(run: Run) -> int:
    """Peak bytes of activations of one further training step (:func:`convince.training.tpsgd.peak_saved`) of a finished run's twin."""
    twin = prepare(run.settings.updated(steps=1), run.data, drop_off=False)
    twin.build = run.build
    return peak_saved(lambda: fit(twin), run.model)


@final
@dataclass
class BpFreeTraining(Study):
    """Trains each method with equal search trials and equal early stopping, and prints what it reached and what it cost.

    ``methods``: names of :data:`METHODS`, None for all. ``trials`` of the search, each on ``search_rows`` rows for a
    quarter of the budget's epochs; ``watts`` of a busy core where no meter can be read. Validation and test never overlap.
    """

    data: str = "digits"
    methods: tuple[str, ...] | None = None
    seeds: int = 2
    trials: int = 5
    patience: int = 3
    hidden: tuple[int, ...] = (500, 500)
    widths: tuple[int, ...] = (16, 32)
    search_rows: int = 2000
    watts: float = 15.0

    def run(self, budget: Budget) -> dict[str, Any]:
        """The table: a row a method, means over seeds. ``budget``: most epochs of one training."""
        from convince.data import load

        methods = tuple(METHODS) if self.methods is None else self.methods
        for name in methods:
            if name not in METHODS:
                raise Mistake(f"methods: {name!r} is none of {', '.join(METHODS)}")
        if budget.unit != "epochs":
            raise Mistake(f"a budget in {budget.unit} does not fit this study, which stops early; give the most epochs of one training")
        epochs, meter = max(round(budget.value), 1), EnergyMeter(self.watts)
        network = {"hidden": self.hidden, "widths": self.widths}
        rows: dict[str, list[dict[str, float]]] = {name: [] for name in methods}
        chosen = {}
        for seed in range(self.seeds):
            data = load(self.data, val=0.15, seed=seed)
            for name in methods:
                if seed == 0:
                    chosen[name] = search(data, name, self.trials, 0, self.search_rows, math.ceil(epochs / 4), **network)
                rows[name].append(measured(data, name, chosen[name], seed, epochs, self.patience, meter, **network))
        table = [{"method": name, **asdict(chosen[name]), **{m: statistics.fmean(r[m] for r in rows[name]) for m in rows[name][0]}} for name in methods]
        print(f"{self.data}, {self.seeds} seed(s); energy: {meter.source}, idle power {meter.idle:.1f} W subtracted")
        print(f"{'method':<24}  acc.%  epochs  s/epoch  joules  saved KiB")
        for row in table:
            cells = (100 * row["accuracy"], row["epochs"], row["seconds_per_epoch"], row["joules"], row["saved_bytes"] / 1024)
            print(f"{row['method']:<24}" + "  {:>5.1f}  {:>6.1f}  {:>7.2f}  {:>6.1f}  {:>9.0f}".format(*cells))
        return {**asdict(self), "methods": list(methods), "budget": asdict(budget), "energy": meter.source, "table": table}
