"""Self-expanding search: one network that grows while it trains, for the whole budget; what it has grown to is the find."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

from convince import parts
from convince.backbones.expanding_cnn import ExpandingCnn, checked, parameters
from convince.errors import Mistake
from convince.kinds import Search
from convince.parts import Card
from convince.search.lab import LOOKED_AT, Lab
from convince.search.space import Genes, Space

CARD = Card(
    part="self-expanding-search",
    kind="search",
    paper="self-expanding-cnn",
    title="Self Expanding Convolutional Neural Networks",
    year=2024,
    url="https://arxiv.org/abs/2401.05686",
    needs=("optuna",),
    departs=(
        "the threshold is 1, so that the network grows where the best proposal's score is above its own; growths that leave the answers alone"
        " hardly ever double the score, which the paper's 2 asks for",
        "after a growth nothing is added for two epochs, where the paper waits ten of its 300",
        "scores are read off 128 images, so that the budget goes into training",
        "the network is at most as large as the largest that the paper tells of, 74,564 parameters",
        "the find is a size, to be trained from scratch by who wants it; the paper goes on with the grown weights",
    ),
    tiny={"trial_epochs": 1, "layers": (1, 1), "widths": (4, 4), "hidden": 4, "images": 4, "cooldown": 1, "most": 3, "most_parameters": 1500},
)


@final
@dataclass
class SelfExpandingSearch(Search):
    """Train a network of ``layers`` and ``widths`` with the part self-expanding, as long as the budget goes; its size at the end is the find.

    ``tau``, ``cooldown``, ``channels``, ``images``, ``most``, ``most_layers`` and ``most_parameters`` are that part's. The budget pays for all training and
    for as many scores as there may be. ``notes`` tell each growth, with the size before it. ``trial_epochs`` is for the random
    search beside it, which makes as many growths at random, before training.
    """

    trial_epochs: int = 4
    layers: Sequence[int] = (1, 1, 1)
    widths: Sequence[int] = (16, 16, 16)
    hidden: int = 20
    drop: float = 0.1
    tau: float = 1.0
    cooldown: int = 2
    channels: int = 4
    images: int = 128
    most: int = 12
    most_layers: int = 10
    most_parameters: int = 74_564
    found: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    network: ClassVar[str] = "expanding-cnn"

    def __post_init__(self) -> None:
        checked(self.layers, self.widths, self.hidden, self.drop, (2 ** len(self.layers),) * 2)
        if max(self.layers) > self.most_layers:
            raise Mistake(f"self-expanding-search: layers={tuple(self.layers)} begins with more than most_layers={self.most_layers}; give more")

    def options(self, layers: Sequence[int], widths: Sequence[int]) -> dict[str, Any]:
        """A network of this search as options of expanding-cnn."""
        return {"layers": list(layers), "widths": list(widths), "hidden": self.hidden, "drop": self.drop}

    def size_on(self, data: Any, layers: Sequence[int], widths: Sequence[int]) -> int:
        """Parameters of a network for this data's classes, channels and size."""
        plain = data.preprocess
        return parameters(layers, widths, data.k, plain.channels, plain.size, self.hidden)

    def space(self, data: Any) -> Space:
        """Up to ``most`` growths, each of them nothing, a layer or channels for a block, as far as ``most_layers`` and ``most_parameters`` allow."""
        start = self.size_on(data, self.layers, self.widths)
        if start > self.most_parameters:
            raise Mistake(f"self-expanding-search: the network begins with {start:,} parameters, and most_parameters={self.most_parameters:,}; give more")
        blocks = range(1, len(self.layers) + 1)
        growths = ["nothing", *(f"layer {b}" for b in blocks), *(f"channels {b}" for b in blocks)]
        choices = {f"growth{i + 1}": growths for i in range(self.most)}

        def fits(genes: Genes) -> bool:
            layers, widths = self.shape(genes)
            return max(layers) <= self.most_layers and self.size_on(data, layers, widths) <= self.most_parameters

        return Space(choices, lambda genes: self.options(*self.shape(genes)), fits)

    def shape(self, genes: Genes) -> tuple[list[int], list[int]]:
        """Layers and channels of each block after these growths."""
        layers, widths, given = list(self.layers), list(self.widths), list(genes.values())
        for b in range(len(layers)):
            layers[b] += given.count(f"layer {b + 1}")
            widths[b] += given.count(f"channels {b + 1}") * self.channels
        return layers, widths

    def find(self, lab: Lab) -> dict[str, Any]:
        """Grow one network for as many epochs as the budget pays."""
        self.space(lab.data)
        rows, val = len(lab.data.split.train), len(lab.data.split.val)
        scoring = min(self.images, rows) * (1 + 2 * len(self.layers))  # the network itself, and two proposals a block
        epochs = int((lab.left - LOOKED_AT * val + scoring) / (rows + scoring) + 1e-6)  # nothing is scored after the last one
        if epochs < 2:
            raise Mistake(f"self-expanding-search: the budget pays for {epochs} epochs, and growing takes 2 at least; give a larger --budget")
        options = self.options(self.layers, self.widths)
        growing = {key: getattr(self, key) for key in ("tau", "cooldown", "channels", "images", "most", "most_layers", "most_parameters")}
        spec = parts.spell("self-expanding", growing)
        lab.charge(epochs * rows + (epochs - 1) * scoring)
        name = "-".join(map(str, ("growing", *self.layers, *self.widths, self.hidden, self.drop, *growing.values(), epochs)))
        run = lab.run(parts.spell(self.network, options), name=name, parts=(spec,), epochs=epochs)
        model, technique = run.model, next(seat.technique for seat in run.team.seats if seat.name == "self-expanding")
        assert isinstance(model, ExpandingCnn)
        accuracy = float(lab.keep([name, "accuracy"], LOOKED_AT * val, lambda: lab.accuracy(run)))
        best = self.options(model.layers, model.widths)
        self.found = {"epochs": epochs, "accuracy": accuracy, "growths": technique.state()["grown"]}
        for row in self.found["growths"]:
            what = "a layer" if row["kind"] == "layer" else f"{self.channels} channels"
            lab.say(f"epoch {row['epoch']}: {row['parameters']:,} parameters; block {row['block'] + 1} gets {what} (score times {row['ratio']:.2f})")
        size = self.size_on(lab.data, model.layers, model.widths)
        lab.say(f"found: layers {list(model.layers)}, widths {list(model.widths)}, {size:,} parameters; {accuracy:.1%} on validation with its grown weights")
        return best

    def notes(self) -> dict[str, Any]:
        """The epochs, the accuracy on validation with the grown weights, and each growth."""
        return self.found
