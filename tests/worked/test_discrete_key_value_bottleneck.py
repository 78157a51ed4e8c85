"""The key-value bottleneck by hand: sizes, gradients, what moves and what does not; and runs of its three stages."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import settings as quick
from hypothesis import strategies as st

from convince.checks.subject import bits, equal, tiny_images
from convince.errors import Mistake
from convince.fit.folder import open_run, write_config, write_model
from convince.fit.loop import fit
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.training.discrete_key_value_bottleneck import Bottleneck, LookedUp, learn_values, tasks_in_turn


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def small(c=4, n=8, e=3, d=5, k=3, seed=0):
    torch.manual_seed(seed)
    made = Bottleneck(d, k, c, n, e)
    made.place_keys(torch.randn(40, d, generator=gen(seed)), gen(seed))
    return made


def test_sizes():
    whole = Bottleneck(8, 10)
    assert whole.values.numel() == 10_485_760
    assert whole.keys.numel() == 12_582_912
    assert whole.values[:, 0].numel() == 2560  # what one sample touches
    assert Bottleneck(64, 10, 64, 256, 8).values.numel() == 163_840
    assert sum(p.numel() for p in Bottleneck(64, 10, 64, 256, 8).parameters()) == 163_840


def test_the_gradient_by_hand():
    made = small().double()
    with torch.no_grad():
        made.values.copy_(torch.randn(made.values.shape, generator=gen(1)))
    z, y = torch.randn(1, 5, generator=gen(2)).double(), torch.tensor([1])
    index = made.lookup(z)
    torch.nn.functional.cross_entropy(made(z), y).backward()
    p = made(z).detach().softmax(1)[0]
    expected = (p - torch.nn.functional.one_hot(y, 3)[0]) / 4
    hit = torch.zeros(4, 8, dtype=torch.bool)
    for c in range(4):
        hit[c, index[c, 0]] = True
        assert torch.allclose(made.values.grad[c, index[c, 0]], expected)
    assert bool((made.values.grad[~hit] == 0).all())


@quick(max_examples=15, deadline=None)
@given(st.integers(1, 6), st.integers(0, 100))
def test_a_sample_changes_one_row_a_codebook_and_no_key(n, seed):
    made = small(seed=seed)
    keys, before = made.keys.clone(), made.values.detach().clone()
    z, y = torch.randn(n, 5, generator=gen(seed)), torch.arange(n) % 3
    learn_values(made, made.lookup(z), y, 0.3)
    assert torch.equal(made.keys, keys)
    rows = (made.values.detach() != before).any(2).sum(1)
    assert int(rows.min()) >= 1
    assert int(rows.max()) <= n


def test_the_nearest_key_is_the_nearest():
    made = small()
    z = torch.randn(20, 5, generator=gen(3))
    heads = made.project(z)
    assert torch.equal(made.lookup(z), torch.cdist(heads, made.keys).argmin(2))


def test_scores_are_the_mean_of_the_fetched_values():
    made = small()
    with torch.no_grad():
        made.values.copy_(torch.randn(made.values.shape, generator=gen(1)))
    z = torch.randn(2, 5, generator=gen(2))
    index = made.lookup(z)
    by_hand = torch.stack([sum(made.values[c, index[c, i]] for c in range(4)) / 4 for i in range(2)])
    assert torch.allclose(made(z), by_hand)
    made.temperature = 0.5
    assert torch.allclose(made(z), 2 * by_hand)


def test_the_step_of_a_key_by_hand():
    """One codebook, the projection 1: keys 0 and 10; inputs 1, 3, 9 with decay 0.5."""
    made = Bottleneck(1, 2, 1, 2, 1)
    made.projections.fill_(1)
    made.keys.copy_(torch.tensor([[[0.0], [10.0]]]))
    made.sums.copy_(made.keys)
    error = made.move_keys(torch.tensor([[1.0], [3.0], [9.0]]), 0.5, 0.1, gen())
    assert float(error) == pytest.approx((1 + 9 + 1) / 3)
    assert made.counts[0].tolist() == [1.5, 1.0]
    assert made.keys[0, :, 0].tolist() == pytest.approx([2 / 1.5, 9.5])


def test_a_key_that_wins_nothing_is_put_on_an_input():
    made = Bottleneck(1, 2, 1, 2, 1)
    made.projections.fill_(1)
    made.keys.copy_(torch.tensor([[[0.0], [100.0]]]))
    made.sums.copy_(made.keys)
    z = torch.tensor([[1.0], [3.0]])
    made.move_keys(z, 0.5, 0.8, gen())
    assert float(made.keys[0, 1, 0]) in (1.0, 3.0)
    far = float(made.move_keys(z, 0.5, 0.0, gen()))
    for _ in range(30):
        near = float(made.move_keys(z, 0.5, 0.0, gen()))
    assert near < 1e-6 < far


def test_tasks_come_in_turn_and_no_row_twice():
    y = torch.arange(60) % 6
    parts = list(tasks_in_turn(y, [[4, 1], [0, 5], [2, 3]], gen()))
    assert [sorted(set(y[rows].tolist())) for rows in parts] == [[1, 4], [0, 5], [2, 3]]
    assert sorted(torch.cat(parts).tolist()) == list(range(60))


def test_new_classes_leave_distant_ones_alone():
    """Two far groups share no key, so learning the second class changes no score of the first; a linear head forgets."""
    a, b = torch.randn(30, 5, generator=gen(1)) + 20, torch.randn(30, 5, generator=gen(2)) - 20
    made = small(k=2)
    made.place_keys(torch.cat([a, b]), gen())
    ya, yb = torch.zeros(30, dtype=torch.int64), torch.ones(30, dtype=torch.int64)
    learn_values(made, made.lookup(a), ya, 5.0)
    before = made(a).detach()
    learn_values(made, made.lookup(b), yb, 5.0)
    assert torch.equal(made(a), before)
    assert (made(torch.cat([a, b])).argmax(1) == torch.cat([ya, yb])).all()


def made_run(*, data=None, spec="codebooks=4,keys=8,key_size=3,key_epochs=1", **changes):
    how = {"model": "resnet:layers=(1,1),widths=(4,8)", "batch": 8, "epochs": 4, "lr": 0.05, "precision": "fp32", "augment": "none", "checkpoint_seconds": 0}
    return prepare(settings(**{**how, "parts": (f"discrete-key-value-bottleneck:{spec}",), **changes}), data or tiny_images())


class Killed(Exception):
    pass


def test_what_each_stage_moves_and_a_resumed_run(tmp_path):
    seen = {}

    def watch(run):
        def look(done, total, text):
            seen[(run.stage.name, run.epoch, run.step)] = {**bits(run.model), **{f"extra.{n}": t for n, t in bits(run.extra["dkvb"]).items()}}

        return look

    run = made_run()
    fit(run, None, watch(run))
    names = [key[0] for key in seen]
    assert [names.count(n) for n in ("encoder", "keys", "values")] == [8, 4, 8]
    states = list(seen.values())
    assert equal(states[0], states[7])
    for stage in (states[7:12], states[12:]):
        for name in bits(run.model):
            assert all(torch.equal(stage[0][name], s[name]) for s in stage), name  # the encoder is frozen, batch statistics too
    assert not torch.equal(states[8]["extra.keys"], states[11]["extra.keys"])
    assert torch.equal(states[11]["extra.keys"], states[-1]["extra.keys"])
    assert bool((states[11]["extra.values"] == 0).all())
    assert bool((states[-1]["extra.values"] != 0).any())
    assert isinstance(run.answer, LookedUp)

    for at in (5, 10, 15):
        steps = 0

        def kill(done, total, text, at=at):
            nonlocal steps
            steps += 1
            if steps == at:
                raise Killed

        path = tmp_path / f"{at}.safetensors"
        with pytest.raises(Killed):
            fit(made_run(), path, kill)
        again = made_run()
        fit(again, path)
        assert not equal(bits(run.answer), bits(again.answer)), at

    folder = tmp_path / "run"
    folder.mkdir()
    write_config(folder, run.settings)
    write_model(folder, run)
    loaded = open_run(folder)
    x = run.data.x.take(torch.arange(8))
    with torch.no_grad():
        assert torch.equal(loaded.logits(x), run.answer.eval()(run.plan.pixels(x)))

    short = made_run(spec=f"codebooks=4,keys=8,key_size=3,key_epochs=1,encoder={str(folder)!r}", epochs=1)
    fit(short)
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(tensor, short.model.state_dict()[name]), name
    with pytest.raises(Mistake, match="does not fit"):
        fit(made_run(spec=f"encoder={str(folder)!r}", model="small-cnn:widths=(4,)"))


def test_wrong_values_are_named():
    for bad in ("codebooks=0", "decay=1.0", "lr=0.0", "temperature=0.0"):
        with pytest.raises(Mistake, match=bad.split("=")[0]):
            made_run(spec=bad)
