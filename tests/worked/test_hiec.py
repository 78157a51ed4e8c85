"""Handwriting by writer: exact counts, Otsu and cropping by hand, splits without shared writers, styles, loading."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

from convince.backbones.handwriting_cnn import HandwritingCNN
from convince.errors import Mistake
from convince.fit.answer import Scores
from convince.fit.randomness import generator
from convince.kinds import Setup
from convince.recipes.image import hiec
from convince.recipes.image.hiec import HiecHandwriting, Style, preprocess, write_style, writer_split

# -- the network -----------------------------------------------------------------------------------


def test_parameter_counts():
    model = HandwritingCNN(num_classes=10)
    convolutions = sum(p.numel() for p in model.features.parameters())
    dense = sum(p.numel() for m in (model.hidden, model.fc) for p in m.parameters())
    assert (convolutions, dense, convolutions + dense) == (977_920, 136_714, 1_114_634)


def test_multiply_adds():
    model, total = HandwritingCNN().eval(), 0

    def count(module, inputs, output):
        nonlocal total
        taps = module.weight[0].numel()
        total += output[0].numel() * taps

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model(torch.zeros(1, 1, 32, 32))
    assert total / 1e6 == pytest.approx(16.9, abs=0.05)


def test_sides_halve_to_one_pixel():
    model = HandwritingCNN().eval()
    sides, x = [], torch.zeros(1, 1, 32, 32)
    for layer in model.features:
        x = layer(x)
        if isinstance(layer, nn.MaxPool2d):
            sides.append(x.shape[-1])
    assert sides == [16, 8, 4, 2, 1]
    assert HandwritingCNN(channels=(32, 64), pool=4).features(torch.zeros(1, 1, 32, 32)).shape == (1, 64, 2, 2)


@pytest.mark.parametrize(
    ("size", "channels", "kernel", "norm"), [((8, 8), 1, 3, False), ((28, 28), 3, 5, True), ((33, 20), 2, 3, True), ((64, 64), 1, 3, False)]
)
def test_any_size(size, channels, kernel, norm):
    model = HandwritingCNN(5, channels, channels=(4, 4, 6), hidden=7, kernel=kernel, norm=norm, img_size=size)
    x = torch.randn(2, channels, *size)
    assert model(x).shape == (2, 5)
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, 7)
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


# -- preprocessing ---------------------------------------------------------------------------------


def test_otsu_by_hand():
    """0 0 10 | 200 250: the cut between 10 and 200; every t from 10 to 199 is as good, the first is taken."""
    image = np.array([[0, 0, 10], [200, 250, 250]], np.uint8)
    assert hiec.otsu(image) == 10


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 255), min_size=2, max_size=40).filter(lambda v: len(set(v)) > 1))
def test_otsu_is_the_best_cut(values):
    image = np.array([values], np.uint8)

    def between(t):
        low, high = image[image <= t].astype(float), image[image > t].astype(float)
        return len(low) * len(high) * (low.mean() - high.mean()) ** 2 if len(low) and len(high) else -1.0

    assert between(hiec.otsu(image)) == pytest.approx(max(between(t) for t in range(255)), rel=1e-9)


def test_otsu_parity():
    filters = pytest.importorskip("skimage.filters")
    image = np.random.default_rng(0).integers(0, 256, (20, 20)).astype(np.uint8)
    assert hiec.otsu(image) == filters.threshold_otsu(image)


def page(ink=20, paper=230):
    image = np.full((60, 40), paper, np.uint8)
    image[10:30, 15:20] = ink  # 20 rows, 5 columns
    return image


@pytest.mark.parametrize(("ink", "paper"), [(20, 230), (240, 5), (100, 130)])
def test_crop_margin_and_polarity(ink, paper):
    """20 rows of ink give a square of 24 (10 % on each side): rows 2 to 22, columns 9 to 14, ink 255."""
    out = preprocess(page(ink, paper), size=24)
    wanted = np.zeros((24, 24), np.uint8)
    wanted[2:22, 9:14] = 255
    assert (out == wanted).all()


def test_resize_is_by_areas():
    out = preprocess(page(), size=12)
    assert out[2, 5] == 255
    assert out[2, 4] == 128, "half of the 2x2 area is ink"
    assert abs(preprocess(page(), size=32).astype(float).mean() / 255 - 100 / 24**2) < 0.01


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 20), st.integers(0, 20), st.integers(-60, 60))
def test_place_and_light_do_not_matter(down, right, light):
    moved = np.full((90, 80), 130 + light, np.uint8)
    moved[down : down + 60, right : right + 40][10:30, 15:20] = 65 + light
    assert (preprocess(moved) == preprocess(page())).all()


def test_an_empty_page_is_named():
    with pytest.raises(Mistake, match=r"w3/blank\.png: the page is empty"):
        preprocess(np.full((9, 9), 255, np.uint8), name="w3/blank.png")


def test_deslant_straightens_a_leaning_stroke():
    ink = np.zeros((41, 41), bool)
    for row in range(41):
        start = 30 - row // 2
        ink[row, start - 2 : start + 3] = True
    straight = hiec.deslanted(ink)
    assert straight.sum() == ink.sum()
    columns = np.flatnonzero(straight.any(0))
    assert columns[-1] - columns[0] + 1 <= 7, "five columns wide, and rounding"
    upright = np.zeros((9, 9), bool)
    upright[:, 4] = True
    assert (hiec.deslanted(upright) == upright).all()


# -- writers ---------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=30)
@given(st.integers(4, 30), st.integers(1, 9), st.integers(0, 999))
def test_no_writer_in_two_parts(writers, each, seed):
    groups = torch.arange(writers).repeat_interleave(each)
    split = writer_split(groups, test=0.25, val=0.25, seed=seed)
    parts = [set(groups[rows].tolist()) for rows in (split.train, split.val, split.test)]
    assert sorted(torch.cat([split.train, split.val, split.test]).tolist()) == list(range(len(groups)))
    assert sum(len(part) for part in parts) == writers
    assert all(parts)


def test_style_ranges_and_repeat():
    styles = [write_style(generator(i)) for i in range(300)]
    ranges = {"slant": (-0.35, 0.35), "aspect": (0.75, 1.25), "rotation_deg": (-12, 12), "wobble": (0, 1.5), "ink": (0.6, 1)}
    for name, (low, high) in ranges.items():
        values = [getattr(s, name) for s in styles]
        assert low <= min(values) < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < max(values) <= high
    assert {s.stroke for s in styles} == {-1, 0, 1, 2}
    assert all(s.field.abs().max() == 1 for s in styles)
    again = write_style(generator(7))
    assert again.slant == styles[7].slant
    assert torch.equal(again.field, styles[7].field)


def plain_style(**changes):
    none = dict(slant=0.0, aspect=1.0, stroke=0, rotation_deg=0.0, wobble=0.0, ink=1.0, field=torch.zeros(2, 4, 4))
    return Style(**{**none, **changes})


def moments(x):
    rows, columns = torch.meshgrid(*(torch.arange(s, dtype=torch.float64) for s in x.shape[-2:]), indexing="ij")
    m = x[:, 0].double()
    total = m.sum((1, 2))
    y, c = (m * rows).sum((1, 2)) / total, (m * columns).sum((1, 2)) / total
    dy, dx = rows - y[:, None, None], columns - c[:, None, None]
    return torch.stack([(m * dy * dy).sum((1, 2)), (m * dx * dx).sum((1, 2)), (m * dx * dy).sum((1, 2))], 1) / total[:, None]


def test_styles_do_what_they_say():
    """Second moments: the aspect widens, a slant leans to the right at the top, a bolder stroke adds ink."""
    x = hiec.glyph("8", 64)[None].repeat(64, 1, 1, 1)
    base = moments(plain_style().apply(x, generator(0))).mean(0)
    wide = moments(plain_style(aspect=1.25).apply(x, generator(0))).mean(0)
    assert (wide[1] / base[1]).sqrt() == pytest.approx(1.25, abs=0.02)
    assert wide[0] == pytest.approx(base[0].item(), rel=0.02)
    lean = moments(plain_style(slant=0.3).apply(x, generator(0))).mean(0)
    assert (lean[2] - base[2]) / base[0] == pytest.approx(-0.3, abs=0.03)
    assert plain_style(ink=0.6).apply(x, generator(0)).max() <= 0.6
    turned = moments(plain_style(rotation_deg=12.0).apply(x, generator(0))).mean(0)
    assert (turned[2] - base[2]).abs() > 3 * (base[2].abs() + 0.1)


def test_strokes_grow_and_shrink_by_a_pixel():
    x = torch.zeros(1, 1, 9, 9)
    x[0, 0, 3:6, 3:6] = 1
    assert hiec.thicker(x, 0).sum() == 9
    assert hiec.thicker(x, 1).sum() == 9 + 12
    assert hiec.thicker(x, -1).sum() == 1
    assert torch.equal(hiec.thicker(hiec.thicker(x, -1), -1), hiec.thicker(x, -1)), "ink that would vanish stays"


def test_inputs_and_global_state_stay():
    x = hiec.glyph("3")[None]
    kept, state = x.clone(), torch.get_rng_state()
    write_style(generator(0)).apply(x, generator(1))
    assert torch.equal(x, kept)
    assert torch.equal(state, torch.get_rng_state())


# -- the recipe ------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["writer", "random"])
def test_sample(split):
    a, b = (HiecHandwriting(split=split).sample(generator(3), writers=8, per_writer=10) for _ in range(2))
    assert torch.equal(a.x.take(torch.arange(80)), b.x.take(torch.arange(80)))
    assert a.digest == b.digest
    assert a.classes == tuple("0123456789")
    assert a.x.shape == (80, 1, 32, 32)
    shared = set(a.groups[a.split.train].tolist()) & set(a.groups[a.split.test].tolist())
    assert bool(shared) == (split == "random")
    fields = HiecHandwriting.schema.fields
    assert [f.name for f in fields] == ["image", "label", "writer"]


def store(root, table):
    rows = []
    for writer in range(6):
        style = write_style(generator("w", writer))
        for character in "147":
            ink = style.apply(hiec.glyph(character, 48)[None], generator(writer, character))[0, 0]
            name = f"{character}/w{writer}_{character}.png"
            (root / character).mkdir(exist_ok=True)
            paper = Image.fromarray((230 - 200 * ink).round().to(torch.uint8).numpy())
            paper = paper.convert("RGB") if writer % 2 else paper
            (paper.crop((4, 0, 44, 48)) if writer == 2 else paper).save(root / name)
            rows.append((name, character, f"w{writer}"))
    if table:
        with (root / "all.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("path", "label", "writer"), *rows])


@pytest.mark.parametrize("table", [False, True])
def test_load_folder_and_table(tmp_path, table):
    store(tmp_path, table)
    recipe = HiecHandwriting(val=0.17, test=0.34)
    data = recipe.load(tmp_path / "all.csv" if table else tmp_path)
    assert data.classes == ("1", "4", "7")
    assert data.x.shape == (18, 1, 32, 32)
    parts = [set(data.groups[data.split[p]].tolist()) for p in ("train", "val", "test")]
    assert [len(p) for p in parts] == [3, 1, 2]
    assert not parts[0] & parts[2]
    row = 4
    assert torch.equal(data.x.take(torch.tensor([row]))[0, 0], torch.from_numpy(recipe.read(tmp_path / data.names[row])))
    pixels = data.x.take(data.split.train).double() / 255
    assert data.preprocess.mean[0] == pytest.approx(pixels.mean().item(), abs=1e-6)
    assert set(HiecHandwriting(split="random", test=0.34).load(tmp_path / "all.csv" if table else tmp_path).split.test.tolist()) != set(
        data.split.test.tolist()
    )


def test_load_names_the_empty_page(tmp_path):
    store(tmp_path, table=False)
    Image.new("L", (30, 30), 255).save(tmp_path / "4" / "w9_4.png")
    with pytest.raises(Mistake, match=r"w9_4\.png: the page is empty"):
        HiecHandwriting(test=0.34).load(tmp_path)


def test_build_trains_and_ablates():
    recipe = HiecHandwriting()
    data = recipe.sample(generator(0), writers=6, per_writer=10)
    setup = recipe.build(data)
    assert isinstance(setup, Setup)
    assert setup.settings["epochs"] == 60
    grid = {"channels": [(4,), (4, 8)], "hidden": [8], "lr": [0.05]}
    rows = hiec.ablate(grid, data, seeds=(0, 1), epochs=1, batch=16, precision="fp32")
    assert [row["channels"] for row in rows] == [(4,), (4, 8)]
    assert all(row["n"] == 2 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert rows[1]["parameters"] == 4 * 9 + 4 + 8 * 4 * 9 + 8 + 8 * 8 * 8 * 8 + 8 + 8 * 10 + 10
    with pytest.raises(Mistake, match="chanels"):
        hiec.ablate({"chanels": [1]}, data)


def test_confused_pairs():
    probs = torch.eye(3)[[0, 1, 1, 2, 0, 0]]
    found = hiec.confused(Scores(probs, torch.tensor([0, 0, 0, 2, 2, 1]), torch.arange(6)), ("O", "0", "l"))
    assert found["accuracy"] == pytest.approx(2 / 6)
    assert found["recall"] == pytest.approx({"O": 1 / 3, "0": 0.0, "l": 0.5})
    assert found["pairs"][0] == ("O", "0", 2)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: HiecHandwriting(split="writers"), "split='writers'.*writer"),
        (lambda: HiecHandwriting(size=4), "size=4"),
        (lambda: HandwritingCNN(kernel=4), "kernel=4"),
        (lambda: HandwritingCNN(channels=()), "at least one block"),
        (lambda: HandwritingCNN(dropout=1.0), "dropout=1.0"),
        (lambda: HandwritingCNN()(torch.zeros(1, 1, 28, 28)), "built for images of 32x32 pixels, given 28x28"),
        (lambda: hiec.glyph("Q"), "'Q'"),
    ],
)
def test_refusals(call, words):
    with pytest.raises(Mistake, match=words):
        call()
