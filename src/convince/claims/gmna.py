"""Claim of gmna: whom a classifier takes the genomes of a place for recovers how travel links the places."""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any, final

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from convince.claims import Bench, Numbers, column, paired
from convince.diagnose.misclassification_network import indistinguishability, kmer_counts, loco_predict, mantel_test, misclassification_matrix, onehot_dna
from convince.fit.randomness import generator, preserved

SAYS = (
    "The misclassification network of genomes by place reflects how near the places are in travel: places that exchange more migrants are taken for one "
    "another more, at least as clearly as the genomes' own likeness shows it."
)
SUPPORTED = (
    "with naive Bayes, Mantel's r between the indistinguishability (each place left out in turn) and the true migration is at least 0.5 with p <= 0.01 in at "
    "least 4 of 5 simulations, its paired difference to the baseline's r is above -0.05 in the mean, and where migration is shuffled over the pairs of places, "
    "r with geography is within 0.2 of 0 in the mean."
)
CONTRADICTED = "r is below 0.2 in the mean, or the 95 % paired t interval of the difference to the baseline lies below -0.05."
BUDGET = (
    "5 simulations: 12 regions at random points of the unit square; 200 genomes of 1,500 letters each, all from one root, 30 generations, mutation 0.001 a "
    "letter and generation; each genome's parent lives elsewhere with probability 0.05, in another region in proportion to exp(-distance / 0.2) (the "
    "catalogue leaves the total open); 100 genomes a region are read. Multinomial naive Bayes on 6-mers without class prior (classes are of equal size, so a "
    "fitted prior is the same), probabilities counted hard. Baseline: cosine of the regions' mean 6-mer counts. Control: the same simulations with the rates "
    "of pairs shuffled. Told: soft probabilities; a 1-D CNN, 3 epochs, on the first two simulations; the ordinary errors of naive Bayes, 50 genomes of each "
    "region to learn and 50 to test. Mantel: 999 permutations, against the mean of both directions of the migration. Whether it beats the baseline is told "
    "with its interval."
)


# -- a population ---------------------------------------------------------------------------------------


def places(regions: int, gen: Generator) -> Tensor:
    """``exp(-distance / 0.2)`` [r r] between random points of the unit square, 0 on the diagonal."""
    points = torch.rand(regions, 2, generator=gen, dtype=torch.float64)
    return (-torch.cdist(points, points) / 0.2).exp().fill_diagonal_(0)


def shuffled_pairs(nearness: Tensor, gen: Generator) -> Tensor:
    """The same values dealt anew to the pairs."""
    i, j = torch.triu_indices(len(nearness), len(nearness), 1)
    made = torch.zeros_like(nearness)
    made[i, j] = nearness[i, j][torch.randperm(len(i), generator=gen)]
    return made + made.T


def migration(nearness: Tensor, total: float) -> Tensor:
    """Rates [r r]: row i says where a parent of region i's genomes lives; ``total`` of them elsewhere, in proportion to nearness."""
    away = total * nearness / nearness.sum(1, keepdim=True)
    return away + torch.eye(len(away), dtype=away.dtype) * (1 - total)


def evolve(rates: Tensor, individuals: int, length: int, generations: int, gen: Generator, mutation: float = 1e-3) -> Tensor:
    """Genomes [r individuals length] of letters 0 to 3 after Wright-Fisher generations from one root."""
    regions = len(rates)
    genomes = torch.randint(0, 4, (length,), generator=gen, dtype=torch.uint8).expand(regions, individuals, length).clone()
    for _ in range(generations):
        home = torch.multinomial(rates.float(), individuals, replacement=True, generator=gen)
        genomes = genomes[home, torch.randint(0, individuals, home.shape, generator=gen)]
        changes = int(torch.poisson(torch.tensor(mutation * genomes.numel()), generator=gen))
        at = torch.randint(0, genomes.numel(), (changes,), generator=gen)
        step = torch.randint(1, 4, (changes,), generator=gen, dtype=torch.uint8)
        flat = genomes.view(-1)
        flat[at] = (flat[at] + step) % 4
    return genomes


def written(genomes: Tensor) -> list[str]:
    """Letters 0 to 3 as text."""
    letters = np.frombuffer(b"ACGT", np.uint8)
    return [letters[row].tobytes().decode() for row in genomes.numpy()]


# -- models ---------------------------------------------------------------------------------------------


@final
class SeqCNN1d:
    """A small 1-D convolutional network on one-hot letters, with scikit-learn's three methods."""

    def __init__(self, seed: int, epochs: int = 3) -> None:
        self.seed, self.epochs = seed, epochs

    def fit(self, x: np.ndarray, y: np.ndarray) -> SeqCNN1d:
        self.classes_ = np.unique(y)
        inputs, target = torch.from_numpy(x), torch.from_numpy(np.searchsorted(self.classes_, y))
        with preserved():
            torch.manual_seed(self.seed)
            layers: list[nn.Module] = [nn.Conv1d(4, 32, 12, stride=2), nn.ReLU(), nn.MaxPool1d(4), nn.Conv1d(32, 32, 5), nn.ReLU(), nn.MaxPool1d(4)]
            self.net = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(len(self.classes_)))
            self.net(inputs[:1])
            optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
            for _ in range(self.epochs):
                for rows in torch.randperm(len(inputs)).split(32):
                    optimizer.zero_grad()
                    F.cross_entropy(self.net(inputs[rows]), target[rows]).backward()
                    optimizer.step()
        return self

    @torch.no_grad()
    def predict_proba(self, x: np.ndarray) -> np.ndarray:
        return torch.cat([self.net(part).softmax(1) for part in torch.from_numpy(x).split(200)]).numpy()


def bayes() -> Any:
    """Multinomial naive Bayes without a class prior."""
    from sklearn.naive_bayes import MultinomialNB

    return MultinomialNB(fit_prior=False)


# -- the claim ------------------------------------------------------------------------------------------


def simulation(seed: int, regions: int, individuals: int, sampled: int, length: int, generations: int, cnn: bool, shuffle: bool) -> dict[str, float]:
    """One population, and Mantel's r of what is read from it with the migration that made it, and with geography."""
    gen = generator("gmna", seed)
    nearness = places(regions, gen)
    rates = migration(shuffled_pairs(nearness, gen) if shuffle else nearness, 0.05)
    genomes = evolve(rates, individuals, length, generations, gen)[:, :sampled].flatten(0, 1)
    y = np.repeat(np.arange(regions), sampled)
    sequences = written(genomes)
    counts = kmer_counts(sequences)
    probs = loco_predict(bayes, counts, y)
    truth = torch.from_numpy(y)
    travel = ((rates + rates.T) / 2).fill_diagonal_(0)
    hard = indistinguishability(misclassification_matrix(probs, truth, "hard"))
    geography = mantel_test(hard, nearness, gen)
    if shuffle:
        return {"r_geography": geography.r, "r": mantel_test(hard, travel, gen).r}
    found = mantel_test(hard, travel, gen)
    soft = mantel_test(indistinguishability(misclassification_matrix(probs, truth)), travel, gen)
    means = torch.from_numpy(np.stack([counts[y == region].mean(0) for region in range(regions)]))
    cosine = F.normalize(means, dim=1) @ F.normalize(means, dim=1).T
    plain = mantel_test(cosine, travel, gen)
    numbers = {
        "r": found.r,
        "p": found.p,
        "baseline": plain.r,
        "baseline_p": plain.p,
        "soft": soft.r,
        "r_geography": geography.r,
        **errors(counts, y, travel, gen),
    }
    if cnn:
        x = onehot_dna(sequences, length).numpy()
        guessed = loco_predict(partial(SeqCNN1d, seed), x, y)
        numbers["cnn"] = mantel_test(indistinguishability(misclassification_matrix(guessed, truth, "hard")), travel, gen).r
    return numbers


def errors(counts: np.ndarray, y: np.ndarray, travel: Tensor, gen: Generator) -> dict[str, float]:
    """The second reading: ordinary errors on the other half of the genomes, and Mantel's r of those."""
    half = np.arange(len(y)) % 2 == 0  # each region's genomes stand together, so this halves every region
    probs = torch.from_numpy(bayes().fit(counts[half], y[half]).predict_proba(counts[~half]))
    matrix = misclassification_matrix(probs, torch.from_numpy(y[~half]), "hard")
    found = {"ordinary_accuracy": 1 - float(matrix.sum(1).mean())}
    alike = indistinguishability(matrix)
    i, j = torch.triu_indices(len(alike), len(alike), 1)
    return found if float(alike[i, j].std()) == 0 else {**found, "ordinary": mantel_test(alike, travel, gen).r}


def measure(bench: Bench) -> None:
    smoke = bench.scale == "smoke"
    sizes = (5, 20, 10, 200, 5) if smoke else (12, 200, 100, 1500, 30)
    for seed in range(2 if smoke else 5):
        bench.arm("migration", seed, partial(simulation, seed, *sizes, cnn=seed < 2, shuffle=False))
        bench.arm("shuffled migration", seed, partial(simulation, seed, *sizes, cnn=False, shuffle=True))


def judge(numbers: Numbers) -> tuple[str, list[Any]]:
    r, p = column(numbers, "migration", "r"), column(numbers, "migration", "p")
    gain = paired("Mantel's r, misclassification network - cosine of means", r, column(numbers, "migration", "baseline"))
    control = statistics.fmean(column(numbers, "shuffled migration", "r_geography"))
    clear = sum(a >= 0.5 and b <= 0.01 for a, b in zip(r, p, strict=True))
    rules = {"what": "rules", "r by simulation": r, "p by simulation": p, "clear simulations": clear, "control, r with geography": control}
    told: dict[str, Any] = {"what": "told, means over the simulations that have it"}
    for name in sorted({name for row in numbers["migration"].values() for name in row}):
        told[name] = statistics.fmean(row[name] for row in numbers["migration"].values() if name in row)
    told["shuffled migration: r with that migration"] = statistics.fmean(column(numbers, "shuffled migration", "r"))
    if statistics.fmean(r) < 0.2 or gain.high < -0.05:
        return "contradicted", [gain, rules, told]
    supported = clear >= 4 and gain.mean > -0.05 and abs(control) < 0.2
    return ("supported" if supported else "inconclusive"), [gain, rules, told]
