"""Our networks by timm's create_model, whichever package is imported first; and feature maps by name."""

import subprocess
import sys

import pytest
import timm
import torch

import convince.backbones
from convince import parts
from convince.backbones import input_size, named, names, usual_optimizer
from convince.backbones.maps import feature_maps, fold
from convince.errors import Mistake


@pytest.mark.parametrize("order", ["import timm, convince.backbones", "import convince.backbones, timm", "import convince.backbones, timm.layers"])
def test_either_order_of_imports(order):
    code = f"{order}\nimport timm\nprint(timm.create_model('resnet8', num_classes=3, in_chans=1).num_classes)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


def test_importing_ours_does_not_import_timm():
    code = "import sys, convince.backbones\nprint('timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"


def test_a_model_made_by_timm_says_what_timm_reads():
    model = timm.create_model("fractalnet_small", num_classes=7, in_chans=1, img_size=28, drop_path=0.0)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (1, 28, 28)
    with pytest.raises(Mistake, match="resnet8: has no pretrained weights here"):
        timm.create_model("resnet8", pretrained=True)
    with pytest.raises(Mistake, match="resnet: no option 'wdths'; did you mean 'widths'"):
        timm.create_model("resnet8", wdths=(1,))


def test_names_that_timm_has_stay_timms():
    assert type(timm.create_model("resnet18")).__module__.startswith("timm.")


def test_features_only_answers_with_maps():
    model = timm.create_model("resnet8", features_only=True, out_indices=(0, -1), in_chans=1).eval()
    assert model.feature_info.channels() == [16, 64]
    assert model.feature_info.reduction() == [1, 4]
    assert [tuple(f.shape) for f in model(torch.zeros(2, 1, 32, 32))] == [(2, 16, 32, 32), (2, 64, 8, 8)]


def test_own_parts_are_registered_too(tmp_path, monkeypatch):
    card = 'CARD = Card(\n    part="slim-resnet",\n    kind="backbone",\n    title="Slim",\n    of="resnet",\n    accepts=("image",),\n'
    card += '    small=("slim-resnet8",),\n'
    (tmp_path / "slim.py").write_text(card + '    variants={"slim-resnet8": {"layers": (1, 1), "widths": (4, 8)}},\n)\n')
    monkeypatch.setattr(parts, "_own", list(parts._own))
    try:
        parts.add_path(tmp_path / "slim.py")
        assert timm.create_model("slim_resnet8", num_classes=2).num_features == 8
    finally:
        parts.find.cache_clear()


def test_maps_of_tokens_and_of_timms_networks():
    vit = timm.create_model("test_vit", img_size=32).eval()
    found = feature_maps(vit, torch.zeros(1, 3, 32, 32), ("blocks.1",))
    assert list(found) == ["blocks.1"]
    assert found["blocks.1"].shape == (1, 64, 2, 2)
    tokens = torch.arange(10.0).view(1, 5, 2)
    assert fold(tokens, 2, (2, 2))[0, 0].tolist() == [[2, 4], [6, 8]], "the token before the patches is left out"
    assert fold(torch.zeros(1, 3, 4, 7), 7, (3, 4)).shape == (1, 7, 3, 4)
    square = torch.arange(8.0).view(1, 2, 2, 2)
    assert torch.equal(fold(square, 2, (2, 2)), square)
    assert torch.equal(fold(square, 2, (2, 2), last=True), square.permute(0, 3, 1, 2))
    with pytest.raises(Mistake, match="has no map 'layer9'; did you mean 'layer3'"):
        feature_maps(convince.backbones.builder("resnet8", num_classes=2, in_chans=1, size=(8, 8))(), torch.zeros(1, 1, 8, 8), ("layer9",))


def test_hooks_are_gone_after_an_exception():
    net = convince.backbones.builder("resnet8", num_classes=2, in_chans=1, size=(8, 8))()
    with pytest.raises(RuntimeError):
        feature_maps(net, torch.zeros(1, 2, 8, 8))
    assert not any(m._forward_hooks for m in net.modules())


def test_names_and_sizes():
    assert named("Pyramid_Net110")[1] == "pyramidnet110"
    assert input_size("pyramidnet200-a300") == (224, 224)
    assert input_size("pyramidnet-mini") == (32, 32)
    assert len(names()) == len(set(names()))
    with pytest.raises(Mistake, match="did you mean 'resnet"):
        named("resnet21")


def test_usual_optimizer_steps_back(monkeypatch):
    part = parts.get("resnet")
    monkeypatch.setattr(convince.backbones, "part_of", lambda spec: parts.Part(parts.Card(**{**vars(part.card), "optimizer": "adamw:lr=0.002"}), part.path, 1))
    assert usual_optimizer("resnet8", (), None) == "adamw:lr=0.002"
    assert usual_optimizer("resnet8", ("novograd",), None) is None
    assert usual_optimizer("resnet8", (), 0.1) is None
