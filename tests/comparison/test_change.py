"""What may be compared, and how a person writes it."""

import pytest

from convince.comparison.change import change, room, split, with_parts
from convince.comparison.metrics import metric
from convince.errors import Mistake


def test_a_plus_joins_parts_but_not_numbers():
    assert split("cutmix+poly1:epsilon=1e+2") == ["cutmix", "poly1:epsilon=1e+2"]
    assert split("haframe:tree=((a+b,c),d)+ema") == ["haframe:tree=((a+b,c),d)", "ema"]
    assert change("cutmix+poly1").specs == ("cutmix", "poly1")


@pytest.mark.parametrize(("text", "kind"), [("cutmix", "train"), ("rics", "after"), ("int8", "after"), ("grad-cam", "explain"), ("cutmix+rics", "train")])
def test_kinds_of_changes(text, kind):
    assert change(text).kind == kind


def test_another_network_is_a_change():
    found = change("small-cnn:widths=(4,8)+cutmix")
    assert (found.model, found.specs) == ("small-cnn:widths=(4,8)", ("cutmix",))
    assert change("resnet8").model == "resnet8"
    assert change("timm/resnet10t").model == "timm/resnet10t"


@pytest.mark.parametrize(
    ("text", "words"),
    [("resnet8+resnet20", "two networks"), ("cutmix+int8", "works on a trained model"), ("fgsm", "nothing to compare"), ("cutmixx", "cutmix")],
)
def test_what_cannot_be_compared_is_named(text, words):
    with pytest.raises(Mistake, match=words):
        change(text)


def test_a_part_named_again_replaces_the_baselines():
    assert with_parts(("ema", "flip-crop:flip=0.0"), ("flip-crop", "cutmix")) == ("ema", "flip-crop", "cutmix")


def test_a_room_lists_what_can_be_tried():
    assert {"cutmix", "mixup", "cutout"} <= set(room("augment"))
    with pytest.raises(Mistake, match="augment"):
        room("augmint")


def test_metrics_have_a_unit_and_a_direction():
    assert (metric("log-loss").unit, metric("log-loss").sign) == ("nats", -1)
    assert metric("robust-accuracy:attack=pgd,eps=4/255").options["eps"] == 4 / 255
    with pytest.raises(Mistake, match="accuracy"):
        metric("acuracy")
    with pytest.raises(Mistake, match="no option"):
        metric("accuracy:eps=1")
