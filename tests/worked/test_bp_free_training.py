"""The BP-free study: its networks, equal trials, early stopping, disjoint parts, the meter, and the table."""

import pytest
import torch

from convince.checks.subject import tiny_images
from convince.errors import Mistake
from convince.training.bp_free_training import METHODS, Blocks, BpFreeTraining, Dense, EnergyMeter, Trial, draw_trials, measured, search, trained
from convince.types import Budget


def test_networks_by_hand():
    assert sum(p.numel() for p in Dense(784, 10).parameters()) == 648_010
    net = Blocks(1, (28, 28), 10)
    assert sum(p.numel() for p in net.parameters()) == (9 * 16 + 16) + 32 + (16 * 9 * 32 + 32) + 64 + 32 * 49 * 10 + 10
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_every_method_gets_the_same_draws():
    a, b = draw_trials(4, 0.001, 0.1, 0), draw_trials(4, 0.01, 1.0, 0)
    assert [t.batch for t in a] == [t.batch for t in b]
    assert [t.lr * 10 for t in a] == pytest.approx([t.lr for t in b])
    assert all(0.001 <= t.lr <= 0.1 for t in a)
    assert draw_trials(4, 0.001, 0.1, 1) != a


def test_early_stopping_is_the_same_for_all():
    run = trained(tiny_images(), "dense mf", Trial(1e-9, 8), 0, 9, 2, (4,))
    assert sum(row["kind"] == "epoch" for row in run.record.rows) == 3, "two epochs after the first without a better one"


def test_the_search_takes_the_best_on_validation():
    found = search(tiny_images(), "dense bp", 3, 0, 32, 2, hidden=(8,))
    scores = {t.lr: trained(tiny_images(), "dense bp", t, 0, 2, None, (8,)).evaluate("val").accuracy for t in draw_trials(3, 0.003, 0.3, 0)}
    assert scores[found.lr] == max(scores.values())


def test_what_a_training_costs():
    row = measured(tiny_images(), "dense bp", Trial(0.05, 8), 0, 2, 3, EnergyMeter(), hidden=(8,))
    assert row["epochs"] == 2
    assert 0 <= row["accuracy"] <= 1
    assert row["saved_bytes"] >= 8 * 64 * 4, "the pixels of a batch of 8"
    assert row["joules"] >= 0
    assert row["seconds"] >= 2 * row["seconds_per_epoch"] - 1e-9


def test_the_meter_subtracts_idle_power(tmp_path):
    meter = EnergyMeter(rapl=tmp_path / "none")
    assert meter.source in ("processor time", "nvml")
    register = tmp_path / "energy_uj"
    register.write_text("5000000")
    meter = EnergyMeter(idle_seconds=0.0, rapl=register)
    if meter.source == "nvml":
        pytest.skip("a card's own meter comes first")
    assert meter.source == "rapl"
    meter.idle = 0.0
    with meter.measure() as spent:
        register.write_text("8000000")
    assert spent["joules"] == pytest.approx(3.0)
    meter.idle = 1e9
    with meter.measure() as spent:
        register.write_text("9000000")
    assert spent["joules"] == 0.0
    with pytest.raises(Mistake, match="watts"):
        EnergyMeter(0.0)


def test_the_table(capsys):
    found = BpFreeTraining(methods=("dense bp", "dense ff", "conv cafo"), seeds=1, trials=1, hidden=(8, 8), widths=(4,), search_rows=64).run(
        Budget(1, "epochs")
    )
    assert [row["method"] for row in found["table"]] == ["dense bp", "dense ff", "conv cafo"]
    assert "conv cafo" in capsys.readouterr().out
    with pytest.raises(Mistake, match="seconds"):
        BpFreeTraining().run(Budget(1, "seconds"))
    with pytest.raises(Mistake, match="nothing"):
        BpFreeTraining(methods=("nothing",)).run(Budget(1, "epochs"))
    assert {"dense bp", "dense mf", "dense ff", "conv bp", "conv cafo"} <= set(METHODS)
