"""ViT-ResNAS search: train one super-network with many sub-networks a batch, then evolve the best sub-network within a limit of multiply-adds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, final

import torch
from torch import Generator

from convince import parts
from convince.backbones.vit_resnas import VitResnas, checked, macs
from convince.errors import Mistake
from convince.fit.answer import Answer
from convince.fit.randomness import generator, key
from convince.kinds import Search
from convince.parts import Card
from convince.search.lab import LOOKED_AT, Lab
from convince.search.multi_arch_sampling import Choices, Elastic, Genes
from convince.search.space import TRIES, Space

CARD = Card(
    part="vit-resnas-search",
    kind="search",
    paper="vit-resnas",
    title="Searching for Efficient Multi-Stage Vision Transformers",
    year=2021,
    url="https://arxiv.org/abs/2109.00642",
    needs=("optuna",),
    departs=(
        "the largest network is one for small pictures; the paper's tiny space is widths=(256,512,1024),blocks=(6,6,6),heads=(6,12,12),head_dims=(32,48,64)",
        "the limit is a share of the largest network's multiply-adds; 0.513 is what the paper's tiny space has",
        "half of the budget trains the super-network, the paper's 120 epochs; where fewer than 3,500 evaluations are left, both the first"
        " population and the rounds shrink in proportion",
        "a random network is drawn until one keeps the limits; the authors prune one that is too large",
        "mutation redraws the gene that leaves a block out like any other; the authors turn it over",
        "the find is trained from scratch by who wants it; the search ends with its options",
    ),
    tiny={
        "trial_epochs": 1,
        "widths": (6, 12),
        "blocks": (2, 2),
        "heads": (2, 2),
        "head_dims": (2, 2),
        "stem_width": 2,
        "patch": 2,
        "limit": 0.9,
        "least": 0.5,
    },
)

Seen = list[tuple[Genes, float]]


def drawn(choices: Choices, gen: Generator) -> Genes:
    """A sub-network drawn evenly, choice by choice."""
    places = torch.rand(len(choices), generator=gen, dtype=torch.float64).tolist()
    return {name: values[int(at * len(values))] for (name, values), at in zip(choices.items(), places, strict=True)}


def mutated(choices: Choices, parent: Genes, chance: float, gen: Generator) -> Genes:
    """A copy in which each gene is drawn anew with this chance."""
    other, redraw = drawn(choices, gen), torch.rand(len(parent), generator=gen) < chance
    return {name: other[name] if new else value for (name, value), new in zip(parent.items(), redraw.tolist(), strict=True)}


def crossed(mother: Genes, father: Genes, gen: Generator) -> Genes:
    """Each gene from one of the two, evenly."""
    take = torch.rand(len(mother), generator=gen) < 0.5
    return {name: father[name] if its else value for (name, value), its in zip(mother.items(), take.tolist(), strict=True)}


def shrunk(count: int, first: int, parents: int, rounds: int) -> tuple[int, int]:
    """The first population and the parents for ``count`` evaluations: the paper's ``first + 2 rounds parents``, or both smaller in proportion."""
    share = min(count / (first + 2 * rounds * parents), 1.0)
    return max(round(first * share), min(count, 4)), max(round(parents * share), 2)


def evolution(
    choices: Choices,
    fits: Callable[[Genes], bool],
    plain: Callable[[Genes], Any],
    evaluate: Callable[[Genes], float],
    count: int,
    gen: Generator,
    first: int = 500,
    parents: int = 75,
    chance: float = 0.3,
) -> Seen:
    """``first`` random networks, then rounds of ``parents`` mutants and as many crossovers of the ``parents`` best so far (section 3.4).

    Every candidate ``fits``; none is evaluated twice, by what ``plain`` makes of it. Ends after ``count`` evaluations, or where no new
    candidate comes up. All in the order of their evaluation.
    """
    seen: dict[Any, tuple[Genes, float]] = {}

    def fill(upto: int, draw: Callable[[], Genes]) -> bool:
        missed = 0
        while len(seen) < min(upto, count):
            genes = draw()
            if plain(genes) in seen or not fits(genes):
                missed += 1
                if missed > TRIES:
                    return False
                continue
            seen[plain(genes)], missed = (genes, evaluate(genes)), 0
        return True

    fill(first, lambda: drawn(choices, gen))
    while seen and len(seen) < count:
        best = [genes for genes, _ in sorted(seen.values(), key=lambda row: -row[1])[:parents]]
        before = len(seen)

        def pick(best: list[Genes] = best) -> Genes:
            return best[int(torch.randint(len(best), (), generator=gen))]

        fill(before + parents, lambda: mutated(choices, pick(), chance, gen))
        fill(len(seen) + parents, lambda: crossed(pick(), pick(), gen))
        if len(seen) == before:
            break
    return list(seen.values())


@final
@dataclass
class VitResnasSearch(Search):
    """Train the largest vit-resnas by multi-arch-sampling for ``share`` of the budget, then look at sub-networks of it by :func:`evolution`.

    The largest has ``blocks`` blocks a stage, ``heads`` heads and ``mlp_ratio`` times ``widths`` hidden units in each; ``patch`` None is 4 up
    to 64 pixels and 14 above. A candidate has at most ``limit`` of its multiply-adds and at least ``least`` of that limit. ``shares`` and
    ``least_heads`` are those of :class:`convince.search.multi_arch_sampling.Elastic`; ``trial_epochs`` is for the random search beside it.
    """

    trial_epochs: int = 4
    widths: Sequence[int] = (64, 128, 256)
    blocks: Sequence[int] = (4, 4, 4)
    heads: Sequence[int] = (6, 6, 6)
    head_dims: Sequence[int] = (16, 32, 64)
    mlp_ratio: float = 3.0
    patch: int | None = None
    stem_width: int = 24
    drop_path: float = 0.2
    shares: Sequence[float] = (1.0, 0.875, 0.75, 0.6875, 0.625)
    least_heads: float = 0.5
    limit: float = 0.513
    least: float = 0.975
    share: float = 0.5
    groups: int = 16
    first: int = 500
    parents: int = 75
    rounds: int = 20
    chance: float = 0.3
    found: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    network: ClassVar[str] = "vit-resnas"

    def __post_init__(self) -> None:
        if not 0 < self.limit <= 1 or not 0 <= self.least < 1 or not 0 < self.share < 1:
            raise Mistake(
                f"vit-resnas-search: limit={self.limit}, least={self.least}, share={self.share}: shares of the largest network's multiply-adds, of that limit"
                " and of the budget"
            )
        if min(self.groups, self.first, self.parents, self.rounds) < 1 or not 0 < self.chance <= 1:
            raise Mistake("vit-resnas-search: groups, first, parents and rounds must be at least 1, and chance above 0 and at most 1")
        if not len(self.widths) == len(self.blocks) == len(self.heads):
            raise Mistake(f"vit-resnas-search: widths={self.widths}, blocks={self.blocks}, heads={self.heads}: one number a stage in each")
        checked(**{name: value for name, value in self.largest(64).items() if name != "drop_path"})

    def largest(self, side: int) -> dict[str, Any]:
        """The options of the super-network for images of ``side`` pixels."""
        rows = list(zip(self.blocks, self.heads, self.widths, strict=True))
        return {
            "widths": list(self.widths),
            "heads": [[h] * n for n, h, _ in rows],
            "hidden": [[round(self.mlp_ratio * d)] * n for n, _, d in rows],
            "head_dims": list(self.head_dims),
            "patch": self.patch or (4 if side <= 64 else 14),
            "stem": "convs",
            "stem_width": self.stem_width,
            "drop_path": self.drop_path,
        }

    def elastic(self, data: Any) -> Elastic:
        """The sub-networks."""
        return Elastic(self.largest(max(data.preprocess.size)), self.shares, self.least_heads)

    def macs_on(self, data: Any) -> Callable[[dict[str, Any]], int]:
        """Options -> multiply-adds for this data's images."""
        return lambda options: macs(options, data.preprocess.size, data.k, data.preprocess.channels)

    def space(self, data: Any) -> Space:
        """The sub-networks between ``least`` times the limit and the limit."""
        elastic, cost = self.elastic(data), self.macs_on(data)
        most = self.limit * cost(dict(elastic.largest))
        return Space(elastic.choices, elastic.options, lambda genes: self.least * most <= cost(elastic.options(genes)) <= most)

    def find(self, lab: Lab) -> dict[str, Any]:
        """The super-network, then :func:`evolution`, as far as the budget goes."""
        elastic, space, cost = self.elastic(lab.data), self.space(lab.data), self.macs_on(lab.data)
        gen = generator(lab.seed, "vit-resnas-search")
        if not any(space.fits(drawn(elastic.choices, gen)) for _ in range(TRIES)):
            raise Mistake(f"vit-resnas-search: limit={self.limit}, least={self.least}: none of {TRIES} random networks keeps them; loosen them")
        rows, each = len(lab.data.split.train), LOOKED_AT * len(lab.data.split.val)
        epochs = max(int(self.share * lab.budget / rows), 1)
        lab.charge(epochs * rows)
        sampling = parts.spell("multi-arch-sampling", {"groups": self.groups, "widths": list(self.shares), "heads": self.least_heads})
        spec = parts.spell(self.network, dict(elastic.largest))
        name = f"supernet-{key(spec, sampling, epochs):x}"
        run = lab.run(spec, name=name, parts=(sampling,), epochs=epochs)
        count = min(self.first + 2 * self.rounds * self.parents, int(lab.left / each + 1e-6))
        if count < 2:
            raise Mistake(f"vit-resnas-search: after {epochs} epochs of the super-network the budget allows {count} evaluations; give a larger --budget")
        first, parents = shrunk(count, self.first, self.parents, self.rounds)
        lab.say(f"super-network trained for {epochs} epochs; {count} sub-networks can be looked at, {first} of them random, then rounds of {2 * parents}")

        def look(genes: Genes) -> float:
            assert isinstance(run.model, VitResnas)
            return lab.accuracy(run, Answer(run.normalise, run.plan.place(elastic.sub_network(run.model, genes))).eval())

        def evaluate(genes: Genes) -> float:
            return float(lab.keep(["vit-resnas-search", name, elastic.plain(genes)], each, lambda: look(genes)))

        gen = generator(lab.seed, "vit-resnas-search")  # begins with the draws from above, so that there is a first population
        seen = evolution(elastic.choices, space.fits, elastic.plain, evaluate, count, gen, first, parents, self.chance)
        best, accuracy = max(seen, key=lambda row: row[1])
        options = elastic.options(best)
        self.found = {
            "supernet_epochs": epochs,
            "looked_at": len(seen),
            "best_of_the_random": max(row[1] for row in seen[:first]),
            "best": accuracy,
            "macs": cost(options),
            "largest_macs": cost(dict(elastic.largest)),
        }
        lab.say(
            f"found: {accuracy:.1%} with the super-network's weights, {cost(options) / 1e6:.1f} M multiply-adds; the best of the {min(first, len(seen))} random"
            f" ones has {self.found['best_of_the_random']:.1%}"
        )
        return options

    def notes(self) -> dict[str, Any]:
        """What the super-network and the evolution took; accuracies on the super-network's weights."""
        return self.found
