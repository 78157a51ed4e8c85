"""The table of networks: counts by hand, rows from cards and figures, filters, cell by cell measuring that resumes, the command."""

import json

import pytest
import torch
from torch import nn

from convince import parts
from convince.errors import Mistake
from convince.models import measure as m
from convince.models.counting import count, count_named
from convince.models.table import SETS, SHIPPED, Row, cells, chosen, read_store, rows, short


class Stopped(Exception):
    pass


def test_counts_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4), nn.Flatten(), nn.Linear(8 * 36, 5)
    )
    found = count(net, (8, 8))
    assert found.parameters == 3 * 8 * 9 + 16 + 8 * 2 * 9 + 8 + 8 * 36 * 5 + 5
    assert found.macs == 64 * 3 * 8 * 9 + 36 * 8 * 2 * 9 + 8 * 36 * 5
    assert net.training, "the mode is put back"


def test_matrix_products_of_attention_are_counted():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            return torch.nn.functional.scaled_dot_product_attention(x, x, x)

    assert count(Tokens(), (6, 4), in_chans=3).macs == 3 * 6 * 6 * 4 * 2


def test_an_lstm_is_counted_in_closed_form():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(8, 5, bidirectional=True, batch_first=True)

        def forward(self, x):
            return self.lstm(x.flatten(1, 2))[0]

    net = Rows()
    assert count(net, (2, 8), in_chans=3).macs == 6 * 2 * (4 * 5 * 8 + 4 * 5 * 5)
    assert net(torch.zeros(1, 3, 2, 8)).shape == (1, 6, 10), "the layer is put back"


def test_the_meta_device_counts_alike():
    from convince.backbones import builder

    real = count(builder("resnet8", num_classes=10, in_chans=3, size=(32, 32))(), (32, 32))
    assert count_named("resnet8", num_classes=10, size=(32, 32)) == real


def test_rows_come_from_the_cards():
    found = {row.name: row for row in rows({"rows": {}})}
    assert found["pyramidnet110"].size == 32
    assert found["pyramidnet-mini"].small
    assert not found["pyramidnet110"].small
    assert "pyramidnet" not in found, "the defaults are one of the sizes"
    assert "small-cnn" in found
    assert "mlp" not in found


def test_a_row_in_words():
    row = Row("net", "net", None, "Net", 2020, True, 32, 10, 1_739_730, 393_528_448, 32, {"fp32": {"train": 10.4, "infer": 1234.0}}, 5_000_000)
    row.accuracy = {"cifar10": {"0": 0.5, "1": 0.52, "2": 0.54}}
    said = ["net", "2020", "1.74 M", "394 M", "32", "10 / -", "1,234 / -", "5 MB", "", "52.0 ± 2.0"]
    assert cells(row) == said
    assert row.to_json()["accuracy"]["cifar10"] == {"mean": pytest.approx(0.52), "sd": pytest.approx(0.02), "n": 3}
    assert [short(n) for n in (999, 1000, 12_345, 1.2e6, 23.8e9)] == ["999", "1 k", "12.3 k", "1.2 M", "23.8 G"]
    row.stale, row.failed = True, "out of memory"
    assert cells(row)[0] == "net *"
    assert cells(row)[5] == "out of memory"


def test_filters_and_sorting():
    found = [Row(f"net{i}", "net", "paper", "A title", 2000 + i, i > 1, parameters=10**i, macs=10 ** (4 - i)) for i in range(4)]
    found[2].accuracy = {"cifar10": {"0": 0.9}}
    assert [row.name for row in chosen(found, ("TITLE", "net"), True, None, None, None)] == ["net2", "net3"]
    assert [row.name for row in chosen(found, (), False, 50, 1e9, "macs")] == ["net1", "net0"]
    assert [row.name for row in chosen(found, (), False, None, 500, None)] == ["net2", "net3"]
    assert chosen(found, (), False, None, None, "cifar10")[0].name == "net2"
    with pytest.raises(Mistake, match="--sort acuracy: no such column; did you mean 'accuracy'"):
        chosen(found, (), False, None, None, "acuracy")


def test_a_table_that_is_damaged_is_named(tmp_path):
    (tmp_path / "m.json").write_text("[1")
    with pytest.raises(Mistake, match="not a readable table"):
        read_store(tmp_path / "m.json")
    (tmp_path / "m.json").write_text("[1]")
    with pytest.raises(Mistake, match="holds no table"):
        read_store(tmp_path / "m.json")
    assert read_store(tmp_path / "none.json") == {"rows": {}}


def test_measuring_goes_on_where_it_stopped(tmp_path, monkeypatch):
    done, most = [], [5]

    def fake_speed(name):
        done.append(name)
        return {"size": 32, "classes": 10, "parameters": 1, "macs": 1, "batch": 8, "speed": {"fp32": {"train": 1.0, "infer": 2.0}}, "bytes": 1}

    def fake_training(name, kind, seed):
        if len(done) == most[0]:
            raise Stopped
        done.append((name, kind, seed))
        return 0.5

    monkeypatch.setattr(m, "in_its_own_process", fake_speed)
    monkeypatch.setattr(m, "trained", fake_training)
    path = tmp_path / "m.json"
    with pytest.raises(Stopped):
        m.measure(path, ("resnet8",), say=lambda line: None)
    assert len(done) == 5
    first, done[:], most[0] = list(done), [], 99
    m.measure(path, ("resnet8",), say=lambda line: None)
    assert "resnet8" not in done
    assert not set(done) & set(first), "no cell is measured twice"
    row = next(row for row in rows(read_store(path)) if row.name == "resnet8")
    assert {kind: len(values) for kind, values in row.accuracy.items()} == {"fashion-mnist": 3, "cifar10": 3}
    store = json.loads(path.read_text())
    store["rows"]["resnet8"]["source"] = "another"
    path.write_text(json.dumps(store))
    assert next(row for row in rows(read_store(path)) if row.name == "resnet8").stale
    done.clear()
    m.measure(path, ("resnet8",), say=lambda line: None)
    assert len(done) == 7, "figures of another file are measured anew"


def test_one_size_is_measured_in_a_process_of_its_own():
    found = m.in_its_own_process("resnet8")
    assert (found["parameters"], found["macs"], found["size"]) == (78_042, 12_501_632, 32)
    assert all(speed > 0 for form in found["speed"].values() for speed in form.values())
    assert m.in_its_own_process("no-such-net")["failed"].endswith("or timm/NAME")


def test_the_command(tmp_path, capsys):
    from click.testing import CliRunner

    from convince.cli.models import command

    run = CliRunner().invoke(command, ["resnet8", "--json"], catch_exceptions=False)
    found = json.loads(run.output)
    assert {"resnet8"} <= {row["name"] for row in found["models"]}
    run = CliRunner().invoke(command, ["--small", "--sort", "parameters"], catch_exceptions=False)
    assert run.output.startswith("network")


def test_the_shipped_table_holds_figures():
    """Every size in it has its speed or the reason why not, and accuracies of seeds of the budget; one that is not in it yet is shown with blanks."""
    store = read_store(SHIPPED)
    found = [row for row in rows(store) if row.name in store["rows"]]
    assert len(found) > 40
    for row in found:
        assert row.failed or all(pace > 0 for form in row.speed.values() for pace in form.values())
        for values in row.accuracy.values():
            assert set(values) <= {str(seed) for seed in store["budget"]["seeds"]}
            assert all(0 < value < 1 for value in values.values())


def test_the_shipped_table_is_whole():
    """Every size measured, every small one trained on both sets by all seeds; until ``make models`` has done so this is skipped in words."""
    store = read_store(SHIPPED)
    found = rows(store)
    blank = [row.name for row in found if not (row.speed or row.failed) or row.stale]
    wanted = [(row, kind) for row in found if row.small for kind in SETS]
    have = sum(len(row.accuracy.get(kind, {})) for row, kind in wanted)
    if blank or have < len(wanted) * len(store["budget"]["seeds"]):
        lacking = f"; speeds of {', '.join(blank[:5])}" if blank else ""
        pytest.skip(f"{have} of {len(wanted) * len(store['budget']['seeds'])} trainings are measured{lacking}; make models goes on")
    assert all(row.spread(kind) is not None for row, kind in wanted)


def test_published_rows_are_sizes():
    for part in parts.find():
        if isinstance(part, parts.Part):
            assert set(part.card.published) <= {part.name, *part.card.variants}
