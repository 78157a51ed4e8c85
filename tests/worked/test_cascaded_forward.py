"""Cascaded Forward by hand: random blocks stay, classifiers follow their own losses, the answer adds probabilities, feedback is direct."""

import pytest
import torch

from convince.checks.subject import bits, tiny_images
from convince.errors import Mistake
from convince.fit.loop import fit, start
from convince.fit.randomness import generator
from convince.fit.settings import settings
from convince.fit.train import prepare
from convince.training.bp_free_training import Blocks, Dense
from convince.training.cascaded_forward import CascadedForward, feedback
from convince.training.mono_forward import check_size
from convince.training.tpsgd import Layer, projection


def made(spec="cascaded-forward", build=lambda: Blocks(1, (8, 8), 3, (4, 6)), **changes):
    chosen = {
        "model": "small-cnn:widths=(4,)",
        "parts": (spec,),
        "batch": 8,
        "epochs": 1,
        "lr": 0.05,
        "precision": "fp64",
        "augment": "none",
        "weight_decay": 0.0,
    }
    run = prepare(settings(**{**chosen, **changes}), tiny_images(), drop_off=False)
    run.build = build
    return run


def test_blocks_stay_as_drawn():
    run = made()
    start(run)
    before = bits(run.model)
    run = made()
    fit(run)
    moved = {n for n, p in run.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"cascaded_forward.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}
    assert [head.in_features for head in run.model.cascaded_forward] == [4 * 4 * 4, 6 * 2 * 2]


def test_the_answer_has_the_argmax_of_the_summed_probabilities():
    run = made()
    fit(run)
    x = torch.rand(5, 1, 8, 8, dtype=torch.float64)
    answer = run.answer.eval()
    a = run.model.blocks[:4](run.normalise(x))
    b = run.model.blocks[4:](a)
    one, two = (head(h.flatten(1)).softmax(1) for head, h in zip(run.model.cascaded_forward, (a, b), strict=True))
    torch.testing.assert_close(answer(x).softmax(1), (one + two) / 2)


def test_direct_feedback_by_hand():
    run = made("cascaded-forward:blocks=dfa", lambda: Dense(64, 3, (6, 5)), steps=1)
    start(run)
    w = bits(run.model)
    run = made("cascaded-forward:blocks=dfa", lambda: Dense(64, 3, (6, 5)), steps=1)
    fit(run)
    x, y = run.normalise(run.batch.x).flatten(1), run.batch.y
    z1 = x @ w["hidden.1.weight"].T + w["hidden.1.bias"]
    z2 = z1.relu() @ w["hidden.3.weight"].T + w["hidden.3.bias"]
    error = ((z2.relu() @ w["cascaded_forward.1.weight"].T + w["cascaded_forward.1.bias"]).softmax(1) - y) / len(y)
    grads = {n: p.grad for n, p in run.model.named_parameters()}
    for name, z, below in (("hidden.1", z1, x), ("hidden.3", z2, z1.relu())):
        matrix = projection(z.shape[1], 3, "uniform", False, generator(0, "cascaded-forward", name)) / z.shape[1] ** 0.5
        torch.testing.assert_close(grads[f"{name}.weight"], (error @ matrix.T * (z > 0)).T @ below)
    torch.testing.assert_close(grads["cascaded_forward.1.weight"], error.T @ z2.relu())


def test_feedback_spreads_over_positions():
    sent = feedback(torch.tensor([[1.0, -1.0]]), torch.tensor([[1.0, 0.0], [0.5, 2.0]]), torch.zeros(1, 2, 3, 3))
    assert sent[0, :, 1, 2].tolist() == [1.0, -1.5]


def test_refuses_in_words():
    with pytest.raises(Mistake, match="blocks"):
        CascadedForward(blocks="trained")
    with pytest.raises(Mistake, match="side"):
        CascadedForward(side=0)
    with pytest.raises(Mistake, match="side=4"):
        check_size("cascaded-forward", [Layer(("conv1",), (64, 112, 112), 1, True)], [64 * 112 * 112], 1000)
