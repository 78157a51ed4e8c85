"""State on disk: exact, atomic, no code in it; every timm optimiser resumes with equal bits."""

import errno
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from convince.errors import Mistake
from convince.fit.state import FORMAT, load_optimizer, optimizer_state, read_tree, write_atomic, write_tree

leaves = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5)
trees = st.recursive(
    leaves, lambda t: st.lists(t, max_size=3) | st.tuples(t, t) | st.dictionaries(st.text(max_size=4) | st.integers(), t, max_size=3), max_leaves=8
)


@given(trees)
def test_any_plain_tree_comes_back(tmp_path_factory, tree):
    path = tmp_path_factory.mktemp("tree") / "x.safetensors"
    write_tree(path, {"tree": tree})
    assert read_tree(path) == {"tree": tree}


def test_tensors_come_back_in_every_type(tmp_path):
    tree = {
        "a": [torch.arange(6).view(2, 3), (torch.tensor(1.5, dtype=torch.bfloat16), torch.empty(0))],
        "d": torch.bfloat16,
        "last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    }
    tree["twin"] = tree["a"][0]
    write_tree(tmp_path / "x", tree)
    back = read_tree(tmp_path / "x")
    assert torch.equal(back["a"][0], tree["a"][0])
    assert back["a"][1][0].dtype == torch.bfloat16
    assert back["d"] is torch.bfloat16
    assert torch.equal(back["last"], tree["last"])
    assert torch.equal(back["twin"], tree["twin"])


def test_what_is_no_state_is_refused(tmp_path):
    with pytest.raises(TypeError, match="set"):
        write_tree(tmp_path / "x", {"a": {1, 2}})


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.safetensors"
    write_tree(path, {"a": 1})

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Mistake, match=r"No space left on device.*intact.*--resume"):
        write_tree(path, {"a": 2})
    monkeypatch.undo()
    assert read_tree(path) == {"a": 1}
    assert os.listdir(tmp_path) == ["checkpoint.safetensors"]


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x80\x04\x95pickle", (10**6).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(Mistake, match=r"model\.safetensors"):
        read_tree(path)


def test_a_newer_file_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "x", metadata={"tree": json.dumps({}), "format": str(FORMAT + 1)})
    with pytest.raises(Mistake, match="newer Convince"):
        read_tree(tmp_path / "x")


def test_a_write_is_whole_or_not_at_all(tmp_path):
    write_atomic(tmp_path / "a.txt", "first")
    write_atomic(tmp_path / "a.txt", "second")
    assert (tmp_path / "a.txt").read_text() == "second"
    assert os.listdir(tmp_path) == ["a.txt"]


def train_some(optimizer, net, x, steps):
    for i in range(steps):
        torch.manual_seed(i)
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()


@pytest.mark.filterwarnings("ignore:It is highly recommended to have 'opt_einsum'")
@pytest.mark.parametrize(
    "make", ["SGD", "AdamW", "RMSprop", "Adagrad", "Adafactor", "NAdam", "timm/lamb", "timm/adan", "timm/kron", "timm/lion", "timm/adafactor"]
)
def test_optimiser_state_goes_on_exactly(make, tmp_path):
    def new():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2))
        params = list(net.parameters())
        if make.startswith("timm/"):
            from timm.optim import create_optimizer_v2

            return net, create_optimizer_v2(params, opt=make[5:], lr=0.01)
        return net, getattr(torch.optim, make)(params, lr=0.01, **({"momentum": 0.9} if make == "SGD" else {}))

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(1))
    whole, optimizer = new()
    train_some(optimizer, whole, x, 6)
    first, optimizer = new()
    train_some(optimizer, first, x, 3)
    write_tree(tmp_path / "o", {"o": optimizer_state(optimizer, {p: n for n, p in first.named_parameters()}), "m": dict(first.state_dict())})
    kept = read_tree(tmp_path / "o")
    second, optimizer = new()
    second.load_state_dict(kept["m"])
    load_optimizer(optimizer, {p: n for n, p in second.named_parameters()}, kept["o"])
    for i in range(3, 6):
        torch.manual_seed(i)
        optimizer.zero_grad()
        second(x).square().mean().backward()
        optimizer.step()
    for name, p in whole.named_parameters():
        assert torch.equal(p, second.get_parameter(name)), name
