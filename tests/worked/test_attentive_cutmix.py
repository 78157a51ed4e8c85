"""Attentive CutMix by hand: cells and shares, the sources' own places, the extractor's three homes, its cost, resume, reload."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from convince.augment import attentive_cutmix as part
from convince.augment.attentive_cutmix import AttentiveCutMix, attention, attentive_cutmix, cell_mask, most_attended, paste
from convince.checks.subject import MODEL, bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.folder import open_run
from convince.fit.loop import fit
from convince.fit.randomness import generator
from convince.fit.settings import settings as make
from convince.fit.train import prepare, train


def coded(n=6, h=8, w=8):
    """Images whose every pixel is the image's number, and one-hot labels of as many classes."""
    x = torch.arange(n, dtype=torch.float64).view(n, 1, 1, 1).expand(n, 1, h, w).contiguous()
    return x, F.one_hot(torch.arange(n), n).double()


def looks(seed=0, side=4):
    """An extractor with random attention, the same for equal seeds."""
    return lambda x: torch.rand(len(x), 3, side, side, generator=generator("looks", seed), dtype=x.dtype)


def test_worked_example():
    """8x8 image, grid 4, 3 patches: 12 of 64 pixels, y = 0.1875 source + 0.8125 target."""
    x, y = coded(2)
    cells = most_attended(looks()(x).mean(1), 3)
    mixed, soft = paste(x, y, cells, torch.tensor([1, 0]))
    assert (mixed[0] == 1).sum() == 12
    assert (mixed[1] == 0).sum() == 12
    assert soft.tolist() == [[0.8125, 0.1875], [0.1875, 0.8125]]


def test_the_papers_share_at_224():
    cells = torch.zeros(1, 7, 7, dtype=torch.bool)
    cells[0, 2, 3] = True
    mask = cell_mask(cells, 224, 224)
    assert mask[0].nonzero().min(0).values.tolist() == [64, 96]
    assert mask[0].nonzero().max(0).values.tolist() == [95, 127]
    six = cell_mask(most_attended(looks(side=7)(torch.zeros(1)).mean(1), 6), 224, 224)
    assert float(six.double().mean()) == pytest.approx(6 / 49, abs=1e-15)


def test_cells_of_uneven_images_tile_them():
    """32 px in 7 cells: edges 0, 5, 9, 14, 18, 23, 27, 32."""
    sizes = []
    for i in range(7):
        cells = torch.zeros(1, 7, 7, dtype=torch.bool)
        cells[0, i] = True
        sizes.append(int(cell_mask(cells, 32, 32)[0, :, 0].sum()))
    assert sizes == [5, 4, 5, 4, 5, 4, 5]
    assert bool(cell_mask(torch.ones(1, 7, 7, dtype=torch.bool), 32, 20).all())


@given(st.integers(2, 7), st.sampled_from([(8, 8, 4), (9, 13, 4), (7, 10, 7)]), st.integers(1, 15), st.integers(0, 2**30))
@settings(max_examples=25, deadline=None)
def test_pixels_and_labels_tell_the_same(n, size, patches, seed):
    h, w, grid = size
    x, y = coded(n, h, w)
    kept = x.clone(), y.clone()
    mixed, soft = attentive_cutmix(x, y, looks(seed), generator(seed), patches, grid)
    counted = torch.stack([torch.bincount(row.flatten().long(), minlength=n) for row in mixed]).double() / (h * w)
    torch.testing.assert_close(soft, counted, rtol=0, atol=1e-14)
    torch.testing.assert_close(soft.sum(1), torch.ones(n, dtype=torch.float64))
    assert torch.equal(x, kept[0])
    assert torch.equal(y, kept[1])


def test_cells_are_the_sources_own_at_the_same_places():
    """Each image shines in one cell, which the extractor sees; the partner gets just that cell, there."""
    n, grid = 6, 4
    x = torch.zeros(n, 1, 8, 8)
    at = [(0, 0), (1, 2), (3, 3), (2, 1), (0, 3), (3, 0)]
    for i, (r, c) in enumerate(at):
        x[i, 0, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = i + 1
    mixed, soft = attentive_cutmix(x, torch.eye(n), lambda x: x, generator(3), n_patches=1, grid=grid)
    partner = (soft - 15 / 16 * torch.eye(n)).argmax(1).tolist()
    assert sorted(partner) == list(range(n))
    assert partner != list(range(n))
    for i, j in enumerate(partner):
        r, c = at[j]
        expected = x[i, 0].clone()
        expected[2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = j + 1
        assert torch.equal(mixed[i, 0], expected)


def test_attention_is_the_mean_brought_to_the_grid():
    f = torch.arange(32.0).view(1, 2, 4, 4)
    assert torch.equal(attention(f, 4)[0], f.mean(1)[0])
    assert attention(f, 2)[0].tolist() == [[10.5, 12.5], [18.5, 20.5]]
    assert attention(torch.ones(2, 3, 2, 2), 7).tolist() == torch.ones(2, 7, 7).tolist()
    fine = attention(torch.eye(2).view(1, 1, 2, 2), 8)[0]
    assert float(fine[0, 0]) == 1.0
    assert float(fine[0, 7]) == 0.0


def test_exactly_so_many_cells_also_where_all_are_equal():
    chosen = most_attended(torch.zeros(3, 4, 4), 5)
    assert chosen.flatten(1).sum(1).tolist() == [5, 5, 5]
    assert chosen[0].flatten()[:5].all()


def test_prob_layout_and_dtype():
    x, y = torch.rand(4, 3, 8, 8).to(memory_format=torch.channels_last), torch.eye(4)
    mixed, soft = attentive_cutmix(x, y, looks(), generator(0), 3, 4)
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    assert mixed.dtype == soft.dtype == torch.float32
    assert all(attentive_cutmix(x, y, looks(), generator(i), 3, 4, prob=0.0)[0] is x for i in range(20))
    count = sum(attentive_cutmix(x, y, looks(), generator(i), 3, 4, prob=0.3)[0] is not x for i in range(500))
    assert 110 < count < 190  # 150 expected, sd 10


SPEC = "attentive-cutmix:n_patches=3,grid=4"


def chosen(*parts, **changes):
    how = {"model": MODEL, "batch": 8, "epochs": 2, "precision": "fp32", "augment": "none", "checkpoint_seconds": 0, "parts": parts, **changes}
    return make(**how)


def test_its_extractor_is_trained_first_and_paid_for():
    """2 epochs of 32 images, a member for one (a quarter, at least 1), and 32 looks an epoch: 64 + 32 + 64."""
    run = prepare(chosen("flip-crop", SPEC), tiny_images())
    fit(run)
    (child,) = run.children
    assert child.settings.epochs == 1
    assert child.settings.parts == ("flip-crop",)
    assert run.images == 64 + 32 + 64
    alone = prepare(chosen("flip-crop", epochs=1), tiny_images())
    fit(alone)
    assert not equal(bits(alone.model), bits(child.model)), "the member is the run of its own settings, left as trained"


@pytest.mark.parametrize(("changes", "options", "expected"), [
    ({"epochs": 20}, {}, (5, None)), ({"epochs": 20}, {"extractor_epochs": 2}, (2, None)), ({"steps": 40, "epochs": 10}, {}, (2, 10)),
])  # fmt: skip
def test_how_long_the_extractor_trains(changes, options, expected):
    run = prepare(chosen(**changes), tiny_images())
    (spec,) = AttentiveCutMix(**options, extractor="small-cnn").fit_members(run)
    assert (spec.settings["epochs"], spec.settings["steps"]) == expected
    assert spec.settings["model"] == "small-cnn"


def test_off_trains_no_member_and_is_the_baseline():
    plain, off = prepare(chosen(), tiny_images()), prepare(chosen(SPEC + ",prob=0.0"), tiny_images(), drop_off=False)
    fit(plain)
    fit(off)
    assert off.children == []
    assert off.images == plain.images
    assert not equal(bits(plain.model), bits(off.model))


def test_interrupted_resumed_and_reloaded(tmp_path):
    whole = prepare(chosen(SPEC), tiny_images())
    fit(whole)
    for at in (2, 7):  # in the member, and in the run
        path, steps = tmp_path / f"c{at}", []

        def stop(*words, steps=steps, at=at):
            steps.append(words)
            if len(steps) == at:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            fit(prepare(chosen(SPEC), tiny_images()), path, stop)
        again = prepare(chosen(SPEC), tiny_images())
        fit(again, path)
        assert not equal(bits(whole.model), bits(again.model))
        assert again.images == whole.images


def test_a_finished_run_as_extractor(tmp_path):
    data = tiny_images()
    train(chosen(epochs=1), data, folder=tmp_path / "first")
    mixed = train(chosen(f"{SPEC},extractor={tmp_path / 'first'}"), data, folder=tmp_path / "second")
    assert mixed.run.children == []
    with_member = prepare(chosen(SPEC), data)
    fit(with_member)
    assert not equal(bits(mixed.run.model), bits(with_member.model)), "the same extractor, from a folder or as a member, gives the same run"
    x = data.x.take(data.split.test)
    assert torch.equal(open_run(tmp_path / "second").logits(x), mixed.answer(x.float() / 255))
    other = prepare(chosen(f"{SPEC},extractor={tmp_path / 'first'}"), tiny_images(channels=3))
    with pytest.raises(Mistake, match="1 channels, these images have 3"):
        fit(other)


def test_published_weights_come_from_timm(monkeypatch):
    """At the network's own size and normalisation; nothing is fetched here."""
    asked = {}
    timm = SimpleNamespace(__version__="1", is_model=lambda name: name == "resnet50")  # importing the real one takes seconds
    monkeypatch.setitem(sys.modules, "timm", timm)
    network = nn.Conv2d(1, 2, 3)
    network.forward_features = lambda x: asked.update(x=x) or x
    network.pretrained_cfg = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.2, 0.2), "input_size": (3, 16, 16)}
    timm.create_model = lambda name, **options: asked.update(name=name, **options) or network
    seen = part.pretrained("resnet50", 1)(torch.full((2, 1, 8, 8), 0.7))
    assert (asked["name"], asked["pretrained"], asked["in_chans"]) == ("resnet50", True, 1)
    torch.testing.assert_close(seen, torch.ones(2, 1, 16, 16))

    def missing(name, **options):
        raise OSError("no connection")

    timm.create_model = missing
    with pytest.raises(Mistake, match=r"no connection.*leave extractor out"):
        part.pretrained("resnet50", 3)
    with pytest.raises(Mistake, match="no such model"):
        part.pretrained("resnet5000", 3)


@pytest.mark.parametrize(("options", "words"), [
    ({"prob": 1.5}, ("prob=1.5",)), ({"n_patches": 49}, ("n_patches=49", "48")), ({"n_patches": 0}, ("n_patches=0",)), ({"grid": 1}, ("grid=1",)),
    ({"extractor_epochs": 0}, ("extractor_epochs=0",)),
])  # fmt: skip
def test_bad_settings_are_named(options, words):
    with pytest.raises(Mistake) as found:
        AttentiveCutMix(**options)
    assert all(word in str(found.value) for word in words)


def test_what_cannot_be_looked_at_is_refused():
    with pytest.raises(Mistake, match=r"grid=9.*grid=4"):
        fit(prepare(chosen("attentive-cutmix:grid=9"), tiny_images()))
    blind = prepare(chosen(SPEC), tiny_images())
    build = blind.build

    def tokens():
        model = build()
        model.forward_features = lambda x: x.flatten(2)
        return model

    blind.build = tokens
    with pytest.raises(Mistake, match="feature map"):
        fit(blind)
