"""HAFrame by hand: trees and heights, the worked frame, W W^T = S, the loss, counts, what the edit leaves alone, resume and reload."""

from __future__ import annotations

import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convince.backbones.resnet import ResNet
from convince.checks.subject import MODEL, bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.answer import logits_of
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare
from convince.losses.haframe import (
    HAFrame,
    HAFrameHead,
    _groups,
    find_s_min,
    frame_alignment,
    haf_loss,
    haframe,
    hierarchical_distance_at,
    hierarchy_distance,
    linear_head,
    mistake_severity,
    mixing,
    read_tree,
    similarity_from_distance,
)

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
ANIMALS = "(((cat,dog),(deer,horse),(bird,frog)),((automobile,truck),(airplane,ship)))"
PAIRS = hierarchy_distance(read_tree("((a,b),(c,d))", "abcd"), 4)


def test_heights_in_the_cifar_tree():
    """Cat and dog 1, cat and deer 2, cat and ship 3, automobile and ship 2."""
    d = hierarchy_distance(read_tree(ANIMALS, CIFAR), 10)
    at = {name: i for i, name in enumerate(CIFAR)}
    assert [float(d[at[a], at[b]]) for a, b in (("cat", "dog"), ("cat", "deer"), ("cat", "ship"), ("automobile", "ship"))] == [1, 2, 3, 2]
    assert torch.equal(d, d.T)
    assert torch.equal(d.unique(), torch.tensor([0.0, 1, 2, 3], dtype=torch.float64))


def test_height_is_the_longest_way_down():
    """((a,b),c): the root stands at height 2, also above c, which is one step below it."""
    d = hierarchy_distance(read_tree("((a,b),c)", "abc"), 3)
    assert d.tolist() == [[0, 1, 2], [1, 0, 2], [2, 2, 0]]


def test_four_spellings_of_a_tree_are_one(tmp_path):
    up = {"a": "ab", "b": "ab", "ab": "all", "c": "cd", "d": "cd", "cd": "all", "unseen": "other", "other": "all"}
    (tmp_path / "tree.json").write_text(json.dumps(up))
    (tmp_path / "groups.json").write_text(json.dumps([["a", "b"], ["c", "d"]]))
    for tree in (up, [["a", "b"], ("c", "d")], "[ (a,b), ('c', d) ]", str(tmp_path / "tree.json"), str(tmp_path / "groups.json"), {**up, "all": None}):
        assert torch.equal(hierarchy_distance(read_tree(tree, "abcd"), 4), PAIRS), tree
    forest = {"a": "ab", "b": "ab", "c": "cd", "d": "cd"}  # two roots are joined
    assert torch.equal(hierarchy_distance(read_tree(forest, "abcd"), 4), PAIRS)
    assert torch.equal(hierarchy_distance(read_tree(((0, 1), (2, 3)), ("0", "1", "2", "3")), 4), PAIRS)
    flat = hierarchy_distance(read_tree(None, "abcd"), 4)
    assert torch.equal(flat, 1 - torch.eye(4, dtype=torch.float64))


def test_worked_frame():
    """Two pairs, gamma 2: exactly -0.69387453, by the scan -0.69023569; first row of S; W W^T = S."""
    assert find_s_min(PAIRS, 2.0, exact=True) == pytest.approx(-0.69387453, abs=5e-9)
    found = find_s_min(PAIRS, 2.0)
    assert found == pytest.approx(-0.69023569, abs=5e-9)
    s = similarity_from_distance(PAIRS, 2.0, found)
    torch.testing.assert_close(s[0], torch.tensor([1, -0.06843273, -0.46148716, -0.46148716], dtype=torch.float64), rtol=0, atol=5e-9)
    for d in (4, 9):
        w = haframe(s, d, generator("frame"))
        assert w.shape == (4, d)
        torch.testing.assert_close(w @ w.T, s, rtol=0, atol=1e-12)


@pytest.mark.parametrize("k", [2, 3, 10, 40])
def test_a_flat_tree_is_a_simplex(k):
    """Off-diagonals within a scan step of -1/(k-1), exactly there with exact=True."""
    flat = hierarchy_distance(read_tree(None, [str(i) for i in range(k)]), k)
    off = ~torch.eye(k, dtype=torch.bool)
    scanned = similarity_from_distance(flat, 2.0, find_s_min(flat, 2.0))[off]
    assert float((scanned + 1 / (k - 1)).abs().max()) <= (1 - 1 / (k - 1)) / 99 + 1e-6 or k == 2
    if k > 2:
        torch.testing.assert_close(similarity_from_distance(flat, 2.0, find_s_min(flat, 2.0, exact=True))[off], torch.full_like(scanned, -1 / (k - 1)))
    else:
        assert find_s_min(flat, 2.0) == -1


@st.composite
def trees(draw):
    """A random tree over 3 to 9 classes, as a map to parents: each class takes a path of digits."""
    k = draw(st.integers(3, 9))
    up = {}
    for i in range(k):
        path = [draw(st.integers(0, 1)) for _ in range(draw(st.integers(0, 3)))]
        above = "root"
        for j in range(len(path)):
            name = "".join(map(str, path[: j + 1])) + "x"
            up[name], above = above, name
        up[str(i)] = above
    return k, up


@given(trees(), st.sampled_from([0.5, 2.0, 5.0, None]))
@settings(max_examples=40, deadline=None)
def test_the_scan_is_the_whole_scan_and_its_frame_is_real(tree, gamma):
    """Against all 100 values tried one by one, and the exact value's own equation 1 / (sum of E^-1) (Sherman-Morrison)."""
    k, up = tree
    distance = hierarchy_distance(read_tree(up, [str(i) for i in range(k)]), k)
    tried = torch.linspace(-1 / (k - 1), -1, 100, dtype=torch.float64)
    good = [float(s) for s in tried if float(torch.linalg.eigvalsh(similarity_from_distance(distance, gamma, float(s)))[0]) > -1e-6]
    found = find_s_min(distance, gamma)
    assert found == pytest.approx(min(good))
    s = similarity_from_distance(distance, gamma, found)
    w = haframe(s, k, generator("frame"))
    torch.testing.assert_close(w @ w.T, s, rtol=0, atol=2e-6)
    torch.testing.assert_close(w.norm(dim=1), torch.ones(k, dtype=torch.float64), rtol=0, atol=1e-6)
    if gamma is not None:
        size = float(torch.linalg.solve(torch.exp(-gamma * distance / distance.max()), torch.ones(k, dtype=torch.float64)).sum())
        exact = max(-1 / (size - 1), -1.0)
        assert find_s_min(distance, gamma, exact=True) == pytest.approx(exact, abs=1e-7)
        assert found >= exact - 1e-5


def test_linear_mapping():
    s = similarity_from_distance(PAIRS, None, -0.5)
    torch.testing.assert_close(s[0], torch.tensor([1, 0.25, -0.5, -0.5], dtype=torch.float64))


def test_the_loss_written_out():
    gen = generator("haf loss")
    f = torch.randn(5, 4, generator=gen, dtype=torch.float64)
    s = similarity_from_distance(PAIRS, 2.0, find_s_min(PAIRS, 2.0))
    w, c = haframe(s, 4, gen), torch.tensor([0, 3, 1, 2, 0])
    y = F.one_hot(c, 4).double()
    cosines = torch.stack([F.cosine_similarity(f, w[j][None], dim=1) for j in range(4)], 1)
    expected = 0.6 * F.cross_entropy(f @ w.T, c, reduction="none") + 0.4 * ((cosines - s[c]) ** 2).sum(1)
    torch.testing.assert_close(haf_loss(f, y, w, 0.4, 0.6), expected)
    on_frame = haf_loss(7 * w, torch.eye(4, dtype=torch.float64), w, 1.0, 0.0)
    torch.testing.assert_close(on_frame, torch.zeros(4, dtype=torch.float64))
    assert torch.equal(haf_loss(f, 0 * y, w, 0.4, 0.6), torch.zeros(5, dtype=torch.float64))
    x = f.clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: haf_loss(z, y, w, 0.4, 0.6), x)


def test_mixing():
    assert mixing("constant", 0.4, 0.7) == (0.4, 0.6)
    assert mixing("constant", 3.0, 0.7) == (3.0, 1.0)
    assert mixing("linear-decrease", 0.4, 0.25) == (0.75, 0.25)
    assert mixing("linear-increase", 0.4, 0.25) == (0.25, 0.75)
    assert mixing("cosine", 0.4, 0.25) == pytest.approx((0.5, 0.5))
    assert mixing("cosine", 0.4, 0.5) == pytest.approx((1.0, 0.0))


def test_measures_by_hand():
    """Wrong: a -> b (1), c -> a (2); the mean over wrong is 1.5, over all 0.75; top 2 of each row."""
    y, predicted = torch.tensor([0, 1, 2, 3]), torch.tensor([1, 1, 0, 3])
    assert mistake_severity(predicted, y, PAIRS) == 1.5
    assert math.isnan(mistake_severity(y, y, PAIRS))
    scores = torch.tensor([[1.0, 2, 0, 0], [0, 3, 1, 0], [5, 0, 4, 0], [0, 0, 1, 9]])
    assert hierarchical_distance_at(scores, y, PAIRS, 1) == 0.75
    assert hierarchical_distance_at(scores, y, PAIRS, 2) == (1 + 0 + 0 + 2 + 2 + 0 + 0 + 1) / 8
    frame = torch.eye(2, 3)
    f = torch.tensor([[2.0, 1, 0], [4, -1, 0], [0, 3, 4]])
    assert frame_alignment(f, torch.tensor([0, 0, 1]), frame) == pytest.approx((1 + 0.6) / 2)


def test_added_parameters_and_old_names():
    """1,180 for 10 classes on 64 channels: the head's own 640 weights, 20 of the normalisation, 2 x 260; the classifier has none."""
    net = ResNet(layers=(1, 1, 1))
    before = {n: p.clone() for n, p in net.named_parameters()}
    HAFrame.rebuild(net, parents=read_tree(ANIMALS, CIFAR))
    new = {n: p for n, p in net.named_parameters() if n not in before}
    assert sum(p.numel() for p in new.values()) + before["fc.weight"].numel() == 1180
    assert all(n.startswith("fc.haframe.transformation.") for n in new)
    for n, p in before.items():
        assert torch.equal(net.get_parameter(n), p)
    s = net.fc.haframe.frame.frame @ net.fc.haframe.frame.frame.T
    distance = hierarchy_distance(read_tree(ANIMALS, CIFAR), 10)
    expected = similarity_from_distance(distance, 2.0, find_s_min(distance, 2.0))
    torch.testing.assert_close(s.double(), expected, rtol=0, atol=1e-6)


def test_head_is_the_papers_convolution_before_pooling():
    """1x1 convolution without bias, average pooling, the transformation, the frame: the same scores."""
    net = ResNet(num_classes=3, in_chans=1, layers=(1, 1), widths=(4, 8)).double()
    HAFrame.rebuild(net, parents=read_tree(None, "abc"))
    with torch.no_grad():
        net.fc.bias.fill_(7.0)  # cancelled by the batch normalisation
    x = torch.randn(6, 1, 8, 8, dtype=torch.float64, generator=generator("pool"))
    pooled = F.conv2d(net.forward_features(x), net.fc.weight[:, :, None, None]).mean((2, 3))
    scores = net.fc.haframe(pooled)
    torch.testing.assert_close(net(x), scores)


def test_a_copy_has_a_frame_of_its_own():
    net = ResNet(num_classes=3, in_chans=1, layers=(1, 1), widths=(4, 8)).eval()
    HAFrame.rebuild(net, parents=read_tree(None, "abc"))
    x = torch.randn(2, 1, 8, 8, generator=generator("copy"))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.fc.haframe.frame.frame.zero_()
        assert float(twin(x).abs().max()) == 0
        assert float(net(x).abs().max()) > 0


def test_resume_and_reload(tmp_path):
    class Killed(Exception):
        pass

    def kill(done, total, text):
        if done == 5:
            raise Killed

    def run():
        how = {"model": MODEL, "batch": 8, "epochs": 2, "augment": "none", "checkpoint_seconds": 0, "lr": 0.05}
        return prepare(make(parts=("haframe:tree=((a,b),c),schedule=linear-decrease",), **how), tiny_images())

    whole, path = run(), tmp_path / "checkpoint"
    fit(whole)
    with pytest.raises(Killed):
        fit(run(), path, kill)
    again = run()
    fit(again, path)
    assert not equal(bits(whole.model), bits(again.model))
    assert any(row.get("name") == "mistake severity, val" for row in whole.record.rows) or whole.evaluate("val").accuracy == 1
    write_config(tmp_path, whole.settings)
    write_model(tmp_path, whole)
    x = whole.data.x.take(torch.arange(8))
    assert torch.equal(open_run(tmp_path).logits(x), logits_of(whole.answer.eval(), x, whole.plan))


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ("((a,b),(c,e))", "class 'd' is not in the tree"),
        ("((a,b),(c,a))", "'a' stands twice"),
        ("((a,b),(c,d)", "nested groups"),
        ("no/such/tree.json", r"no file could be read there"),
        ({"a": "b", "b": "r", "c": "r", "d": "r"}, "classes are leaves"),
        ({"a": "x", "x": "y", "y": "x", "b": "x", "c": "x", "d": "x"}, "in a circle"),
    ],
)
def test_wrong_trees_are_named(tree, words):
    with pytest.raises(Mistake, match=words):
        read_tree(tree, "abcd")


def test_mistakes_teach():
    with pytest.raises(Mistake, match="alpha=-1"):
        HAFrame(alpha=-1.0)
    with pytest.raises(Mistake, match="gamma=0"):
        HAFrame(gamma=0.0)
    with pytest.raises(Mistake, match="schedule='step'"):
        HAFrame(schedule="step")
    with pytest.raises(Mistake, match="at least two"):
        read_tree(None, ("only",))
    with pytest.raises(Mistake, match="must be nested groups"):
        _groups("ab")
    with pytest.raises(Mistake, match="3 features for 4 classes"):
        haframe(torch.eye(4, dtype=torch.float64), 3)
    with pytest.raises(Mistake, match="HAFrameHead has no linear head"):
        linear_head(HAFrameHead(torch.eye(2)))
