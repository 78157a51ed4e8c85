"""Misclassification network by hand: the worked example, graph numbers beside networkx, Mantel's test, k-mers, and digits left out."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.claims.gmna import evolve, migration, places, shuffled_pairs, written
from convince.diagnose.misclassification_network import (
    MisclassificationNetwork,
    communities,
    indistinguishability,
    kmer_counts,
    loco_predict,
    mantel_test,
    misclassification_matrix,
    modularity,
    network_stats,
    onehot_dna,
    top_pairs,
)
from convince.errors import Mistake


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def symmetric(k, seed=0, sparse=0.0):
    a = torch.rand(k, k, generator=gen(seed), dtype=torch.float64)
    a = torch.triu(a * (torch.rand(k, k, generator=gen(seed + 1)) >= sparse), 1)
    return a + a.T


def test_worked_example():
    """LOCO rows (0, .8, .2), (.6, 0, .4), (.5, .5, 0): 0.7, 0.35, 0.45."""
    rows = torch.tensor([[0, 0.8, 0.2], [0.6, 0, 0.4], [0.5, 0.5, 0]], dtype=torch.float64)
    alike = indistinguishability(rows)
    assert [float(alike[0, 1]), float(alike[0, 2]), float(alike[1, 2])] == pytest.approx([0.7, 0.35, 0.45])
    assert torch.equal(alike, alike.T)
    assert top_pairs(alike, 2) == [(0, 1, pytest.approx(0.7)), (1, 2, pytest.approx(0.45))]
    assert torch.allclose(indistinguishability(3 * rows), alike), "rows are scaled"


def test_hard_and_soft_matrices():
    probs = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.1, 0.9, 0.0]])
    y = torch.tensor([0, 0, 1])
    assert misclassification_matrix(probs, y, "hard").tolist() == [[0, 0.5, 0], [0, 0, 0], [0, 0, 0]]
    soft = misclassification_matrix(probs, y, "soft")
    assert soft[0].tolist() == pytest.approx([0, 0.5, 0.1])
    assert soft[1].tolist() == pytest.approx([0.1, 0, 0])
    assert soft[2].tolist() == [0, 0, 0]
    alike = indistinguishability(misclassification_matrix(probs, y, "hard"))
    assert float(alike[0, 1]) == 0.5, "a class without a mistake adds nothing"
    with pytest.raises(Mistake, match="mode='loud'"):
        misclassification_matrix(probs, y, "loud")


def test_graph_numbers_are_those_of_networkx():
    nx = pytest.importorskip("networkx")
    for seed in range(4):
        weights = symmetric(9, seed, sparse=0.4)
        graph = nx.from_numpy_array(weights.numpy())
        stats = network_stats(weights)
        assert stats.clustering.tolist() == pytest.approx(list(nx.clustering(graph, weight="weight").values()))
        sets = [set((stats.community == c).nonzero()[:, 0].tolist()) for c in stats.community.unique()]
        assert stats.modularity == pytest.approx(nx.community.modularity(graph, sets, weight="weight"))
        greedy = nx.community.greedy_modularity_communities(graph, weight="weight")
        assert stats.modularity == pytest.approx(nx.community.modularity(graph, greedy, weight="weight"), abs=0.02)
        central = nx.eigenvector_centrality_numpy(graph, weight="weight")
        assert stats.centrality.tolist() == pytest.approx([abs(v) for v in central.values()], abs=1e-6)


def test_two_groups_are_found():
    weights = torch.full((6, 6), 0.05, dtype=torch.float64)
    weights[:3, :3] = weights[3:, 3:] = 1
    weights.fill_diagonal_(0)
    assert communities(weights).tolist() == [0, 0, 0, 1, 1, 1]
    assert modularity(weights, communities(weights)) == pytest.approx(12 / 12.9 - 0.5)
    assert communities(torch.zeros(3, 3, dtype=torch.float64)).tolist() == [0, 1, 2]
    assert modularity(torch.zeros(3, 3), torch.arange(3)) == 0


def test_mantel():
    a = symmetric(8)
    found = mantel_test(a, 2 * a + 1, gen(), 199)
    assert found.r == pytest.approx(1)
    assert found.p == pytest.approx(1 / 200)
    i, j = np.triu_indices(8, 1)
    b = symmetric(8, 5)
    assert mantel_test(a, b, gen(), 9).r == pytest.approx(np.corrcoef(a.numpy()[i, j], b.numpy()[i, j])[0, 1])
    assert mantel_test(a, -a, gen(), 99).p == 1
    with pytest.raises(Mistake, match="at least 4 classes"):
        mantel_test(a[:3, :3], a[:3, :3], gen())
    with pytest.raises(Mistake, match="entries differ"):
        mantel_test(a, torch.ones(8, 8, dtype=torch.float64), gen())


def test_mantel_has_its_level():
    """Independent matrices: p is below 0.1 in about a tenth of the cases."""
    low = [mantel_test(symmetric(6, 2 * s), symmetric(6, 1000 + 2 * s), gen(s), 39).p <= 0.1 for s in range(200)]
    assert 0.04 < np.mean(low) < 0.17


@given(st.text("ACGT", min_size=6, max_size=40), st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_kmers_are_those_of_count_vectorizer(text, k):
    from sklearn.feature_extraction.text import CountVectorizer

    other = CountVectorizer(analyzer="char", ngram_range=(k, k), lowercase=False).fit([text])
    counts = kmer_counts([text], k)[0]
    words = ["".join("ACGT"[i // 4**p % 4] for p in range(k - 1, -1, -1)) for i in range(4**k)]
    expected = dict(zip(other.get_feature_names_out(), other.transform([text]).toarray()[0], strict=True))
    assert {word: n for word, n in zip(words, counts, strict=True) if n} == expected


def test_sequences_by_hand():
    assert kmer_counts(["AACNAC"], 2).tolist() == [[1, 2, *[0] * 14]]
    assert kmer_counts(["aac", "A"], 2, normalise=True)[:, :2].tolist() == [[0.5, 0.5], [0, 0]]
    x = onehot_dna(["ACgN", "TTTTTT"], 5)
    assert x.shape == (2, 4, 5)
    assert x[0].nonzero().tolist() == [[0, 0], [1, 1], [2, 2]]
    assert x[1, 3].tolist() == [1] * 5


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    return load_digits(return_X_y=True)


def test_digits_left_out_by_naive_bayes(digits):
    """3 and 9 (0.69), then 1 and 8 (0.60), are taken for one another."""
    from sklearn.naive_bayes import MultinomialNB

    x, y = digits
    probs = loco_predict(lambda: MultinomialNB(fit_prior=False), x, y)
    assert torch.allclose(probs.sum(1), torch.ones(len(y), dtype=torch.float64))
    assert float(probs[torch.arange(len(y)), torch.from_numpy(y)].max()) == 0
    pairs = top_pairs(indistinguishability(misclassification_matrix(probs, torch.from_numpy(y), "hard")), 2)
    assert [(i, j) for i, j, _ in pairs] == [(3, 9), (1, 8)]
    assert [value for *_, value in pairs] == pytest.approx([0.69, 0.60], abs=0.01)
    with pytest.raises(Mistake, match="at least 2 must stay"):
        loco_predict(MultinomialNB, x[y < 2], y[y < 2])


def test_probe_reads_any_classifier():
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 5))
    x, y = torch.rand(40, 1, 4, 4, generator=gen()), torch.arange(40) % 4
    for mode in ("soft", "hard"):
        found = MisclassificationNetwork(mode=mode).probe(net, x, y)
        named = {r.name: r.value for r in found.readings}
        assert all(np.isfinite(value) for value in named.values())
        wrong = float((net(x).argmax(1) != y).double().mean())
        assert named["answered wrongly"] == pytest.approx(wrong)
    assert named["weight on other classes"] == pytest.approx(wrong), "classes are of equal size"


class Right(nn.Module):
    def forward(self, x):
        return 1000 * nn.functional.one_hot((x[:, 0, 0, 0] * 3).long(), 3).float()


def test_a_classifier_without_a_mistake_has_an_empty_graph():
    y = torch.arange(12) % 3
    x = (y / 3 + 0.1).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = MisclassificationNetwork(mode="hard").probe(Right(), x, y)
    named = {r.name: r.value for r in found.readings}
    assert named["largest indistinguishability"] == named["modularity"] == named["one-sidedness"] == 0
    assert named["communities"] == 3
    with pytest.raises(Mistake, match="misclassification-network: mode='other'"):
        MisclassificationNetwork(mode="other")
    with pytest.raises(Mistake, match="misclassification-network: pairs=0"):
        MisclassificationNetwork(pairs=0)


def test_the_simulated_genomes():
    near = places(5, gen())
    rates = migration(near, 0.05)
    assert torch.allclose(rates.sum(1), torch.ones(5, dtype=torch.float64))
    assert torch.allclose(rates.diagonal(), torch.full((5,), 0.95, dtype=torch.float64))
    dealt = shuffled_pairs(near, gen(1))
    assert torch.equal(dealt, dealt.T)
    assert torch.allclose(dealt.flatten().sort().values, near.flatten().sort().values)
    still = evolve(rates, 6, 50, 4, gen(), mutation=0.0)
    assert bool((still == still[0, 0]).all())
    genomes = evolve(rates, 40, 500, 10, gen(), mutation=1e-3)
    root = evolve(rates, 1, 500, 0, gen())[0, 0]
    assert float((genomes != root).double().mean()) == pytest.approx(0.01, abs=0.003)
    assert written(torch.tensor([[0, 1, 2, 3]], dtype=torch.uint8)) == ["ACGT"]
