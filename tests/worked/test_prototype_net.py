"""Prototype network by hand: distances, R1 and R2, counts, 'same' padding and its mirror, the table of cases, a run with its gallery, refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from convince.backbones.prototype_net import Down, PrototypeNet, Up, around, squared_distances
from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.explain.prototype_loss import case_table, cases, near_a_prototype, near_an_example, prototype_images, reconstruction, supports
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


CODES = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
PROTOTYPES = torch.tensor([[0.0, 0.0], [1.0, 1.0]])


def test_the_worked_example():
    """Squared distances (1, 1) and (4, 2); R1 = (1 + 1) / 2, R2 = (1 + 2) / 2."""
    d = squared_distances(CODES, PROTOTYPES)
    assert d.tolist() == [[1, 1], [4, 2]]
    assert float(near_an_example(d)) == 1
    assert float(near_a_prototype(d)) == 1.5


def test_reconstruction_adds_over_pixels():
    x = torch.zeros(2, 1, 2, 2)
    assert float(reconstruction(x, x + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1))) == (4 + 16) / 2


def test_counts_are_the_released_ones():
    """44,153 parameters: autoencoder 43,403, prototypes 600, W 150; codes of 2x2x10."""
    net = PrototypeNet()
    assert sum(p.numel() for p in net.parameters()) == 44_153
    assert sum(p.numel() for part in (net.encoder, net.decoder) for p in part.parameters()) == 43_403
    assert net.prototypes.shape == (15, 40)
    assert net.fc.weight.numel() == 150
    x, planes = torch.zeros(1, 1, 28, 28), []
    for layer in net.encoder:
        x = layer(x)
        planes.append(tuple(x.shape[2:]))
    assert planes == [(14, 14), (7, 7), (4, 4), (2, 2)]
    assert net.decode(net.prototypes).shape == (15, 1, 28, 28)


def test_multiply_adds_of_the_encoder():
    from convince.models.counting import count_named

    counts = count_named("prototype-net", num_classes=10, size=(28, 28), in_chans=1)
    assert counts.macs - 150 == 667_008


def test_odd_rows_come_after():
    assert around(28) == (0, 1)
    assert around(7) == (1, 1)
    assert around(1) == (1, 1)


@quick(max_examples=25, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12))
def test_up_mirrors_down(h, w):
    """With one set of weights the two are each other's transposes: <Down x, y> = <x, Up y> before units and biases."""
    down, up = Down(2, 3).double(), Up(3, 2, (h, w), pixels=False).double()
    x = torch.randn(1, 2, h, w, generator=gen(), dtype=torch.float64)
    weight = down.conv.weight
    out = F.conv2d(F.pad(x, (*around(w), *around(h))), weight, None, 2)
    assert out.shape[2:] == (-(-h // 2), -(-w // 2))
    y = torch.randn(out.shape, generator=gen(1), dtype=torch.float64)
    with torch.no_grad():
        up.conv.weight.copy_(weight)
        up.conv.bias.zero_()
        full = up.conv(y)[..., around(h)[0] : around(h)[0] + h, around(w)[0] : around(w)[0] + w]
    assert torch.allclose((out * y).sum(), (x * full).sum())
    assert torch.equal(up(y), full.relu())


def test_scores_are_weighted_distances():
    net = PrototypeNet(3, 1, widths=(4, 2), prototypes=5, img_size=(8, 8)).double()
    x = torch.randn(2, 1, 8, 8, generator=gen(), dtype=torch.float64)
    z = net.forward_features(x).flatten(1)
    d = torch.stack([(z - p).square().sum(1) for p in net.prototypes], 1)
    assert torch.allclose(net(x), d @ net.fc.weight.T)
    assert torch.equal(net.forward_head(net.forward_features(x), pre_logits=True), net.pool(net.forward_features(x)))
    for drawn in (net.prototypes.detach(), net.fc.weight.detach()):
        assert 0 <= float(drawn.min()) <= float(drawn.max()) < 1


def test_cases_by_hand():
    """Codes at 0, 1, 2, 10 of classes 0, 0, 1, 1 and prototypes at 1.2 and 9: three codes are near the first."""
    codes, y = torch.tensor([[0.0], [1.0], [2.0], [10.0]]), torch.tensor([0, 0, 1, 1])
    found = cases(codes, y, torch.tensor([[1.2], [9.0], [100.0]]))
    assert found.nearest.tolist() == [1, 3, 3]
    assert found.distance.tolist() == pytest.approx([0.04, 1.0, 8100.0])
    assert found.used.tolist() == [3, 1, 0]
    assert found.purity.tolist() == pytest.approx([2 / 3, 1.0, 0.0])


def test_the_lowest_weight_marks_the_class():
    assert supports(torch.tensor([[-3.0, 0.5], [0.0, -1.0]])).tolist() == [0, 1]


def test_the_table_holds_the_whole_reasoning():
    net = PrototypeNet(3, 1, widths=(4, 2), prototypes=5, img_size=(8, 8)).double()
    with torch.no_grad():
        net.fc.weight.copy_(torch.randn(3, 5, generator=gen()))
    x = torch.randn(2, 1, 8, 8, generator=gen(1), dtype=torch.float64)
    scores = net(x).detach()
    for table, score in zip(case_table(net, x), scores, strict=True):
        assert sum(row["adds"] for row in table) == pytest.approx(float(score.max() - score.mean()), rel=1e-4, abs=1e-4)
        assert sorted(row["prototype"] for row in table) == [0, 1, 2, 3, 4]
        assert [row["distance"] for row in table] == sorted(row["distance"] for row in table)


def made(spec="prototype-loss", model="prototype-net:widths=(4,4),prototypes=6", **changes):
    how = {"model": model, "batch": 8, "epochs": 2, "lr": 0.05, "precision": "fp32", "augment": "none", "kernels": {}}
    return prepare(settings(**{**how, "parts": (spec,), **changes}), tiny_images())


def test_the_error_of_a_step_is_the_papers():
    """E = CE + lam R + lam1 R1 + lam2 R2, and without the three it is cross-entropy alone."""
    values = {}
    for spec in ("prototype-loss:lam=0.1,lam1=0.2,lam2=0.3", "prototype-loss:lam=0,lam1=0,lam2=0"):
        run = made(spec, epochs=0)
        fit(run)
        x = run.plan.pixels(run.data.x.take(torch.arange(8)))
        y = run.data.y[:8]
        net = run.model
        out = run.forward(x)
        from convince.types import Batch

        batch = Batch(x, F.one_hot(y, 3).float(), torch.arange(8))
        found = run.team.seats[0].technique.objective(run, out, batch).item()
        d = squared_distances(net.forward_features(run.normalise(x)).flatten(1), net.prototypes)
        rebuilt = net.decode(net.forward_features(run.normalise(x)).flatten(1))
        parts = (F.cross_entropy(out.logits, y), reconstruction(x, rebuilt), near_an_example(d), near_a_prototype(d))
        values[spec] = found, [p.item() for p in parts]
    (whole, parts), (alone, others) = values.values()
    assert whole == pytest.approx(parts[0] + 0.1 * parts[1] + 0.2 * parts[2] + 0.3 * parts[3], rel=1e-5)
    assert alone == pytest.approx(others[0], rel=1e-5)


def test_a_run_shows_its_cases_also_when_read_back(tmp_path):
    run = made()
    fit(run)
    technique = run.team.seats[0].technique
    rows = technique.gallery(run)
    assert len(rows) == 6
    assert {row for row, _ in rows} <= set(run.data.split.train.tolist())
    readings = {r.name: r.value for r in technique.readings(run)}
    assert 1 <= readings["prototypes in use"] <= 6
    assert 1 / 3 <= readings["purity of prototypes in use"] <= 1
    assert len(technique.figures(run)) == 2
    with run.aside():
        z = run.forward(run.plan.pixels(run.data.x.take(torch.tensor([rows[2][0]])))).features.flatten(1)
    assert (z - run.model.prototypes[2]).square().sum().item() == pytest.approx(rows[2][1], rel=1e-3, abs=1e-3)
    write_config(tmp_path, run.settings)
    write_model(tmp_path, run)
    loaded = open_run(tmp_path)
    assert loaded.run.team.seats[0].technique.readings(loaded.run) == technique.readings(run)
    assert torch.allclose(prototype_images(loaded.run.model), prototype_images(run.model))


def test_refusals():
    with pytest.raises(Mistake, match=r"prototype-loss is for networks with prototypes .* ResNet has none"):
        fit(made(model="resnet:layers=(1,),widths=(4,)"))
    with pytest.raises(Mistake, match="prototype-loss: lam1=-1"):
        made("prototype-loss:lam1=-1")
    with pytest.raises(Mistake, match="prototype-net: made for 28x28 pixels, got 32x32"):
        PrototypeNet()(torch.zeros(1, 1, 32, 32))
    with pytest.raises(Mistake, match="prototype-net: widths=\\(\\)"):
        PrototypeNet(widths=())
    run = made()
    with pytest.raises(Mistake, match="finish the run first"):
        run.team.seats[0].technique.readings(run)
