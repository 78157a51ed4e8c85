"""Similarity maps: sums that equal the cosine, by hand, as a property, and for whole networks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from convince import parts
from convince.errors import Mistake
from convince.explain.grad_cam import GradCam
from convince.explain.layer import find_layer
from convince.explain.score_cam import maps_of
from convince.explain.similarity_maps import SimilarityMaps, region_query, similarity_map
from convince.explain.targets import Similarity
from convince.fit.answer import Answer, Normalise


def seeded(make, seed: int = 0):  # type: ignore[no-untyped-def]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Answer(Normalise([0.3] * 3, [0.2] * 3), make()).eval()


def net(pool: nn.Module, *head: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True), pool, *head)


def average() -> nn.Module:
    return net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def largest() -> nn.Module:
    return net(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 4))


def flat() -> nn.Module:
    return net(nn.Flatten(), nn.Linear(8 * 25, 12), nn.ReLU(), nn.Linear(12, 4))


def embedding() -> nn.Module:
    return net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5), nn.Linear(5, 4))


@pytest.fixture
def x() -> Tensor:
    return torch.rand(6, 3, 10, 10, generator=torch.Generator().manual_seed(1))


# -- functions ---------------------------------------------------------------------------------------

A = torch.tensor([[2.0, 0], [0, 0], [0, 1], [0, 1]]).T.reshape(1, 2, 2, 2)  # two channels of 2 x 2
B = torch.tensor([[0.0, 0], [2, 0], [0, 0], [0, 2]]).T.reshape(1, 2, 2, 2)


def test_worked_example() -> None:
    a, b = similarity_map(A, B)
    torch.testing.assert_close(a.flatten(), torch.tensor([0.5, 0, 0.25, 0.25]))
    torch.testing.assert_close(b.flatten(), torch.tensor([0, 0.5, 0, 0.5]))
    a, b = similarity_map(A, B, "max")
    torch.testing.assert_close(a.flatten(), torch.tensor([0.63246, 0, 0.15811, 0.15811]), rtol=1e-4, atol=1e-5)
    assert float(a.sum()) == pytest.approx(0.94868, abs=1e-5)
    assert float(b.sum()) == pytest.approx(0.94868, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["avg", "max"]), st.booleans(), st.booleans())
def test_maps_sum_to_the_cosine(seed: int, pool: str, head: bool, ties: bool) -> None:
    gen = torch.Generator().manual_seed(seed)
    a, b = torch.randn(4, 7, 3, 5, generator=gen).double(), torch.randn(4, 7, 4, 4, generator=gen).double()
    if ties:
        a, b = a.round(), b.relu()
    linear = (torch.randn(5, 7, generator=gen).double(), torch.randn(5, generator=gen).double()) if head else None
    f, g = (x.mean((2, 3)) if pool == "avg" else x.amax((2, 3)) for x in (a, b))
    if linear is not None:
        f, g = (e @ linear[0].T + linear[1] for e in (f, g))
    whole = (f * g).sum(1) / (f.norm(dim=1) * g.norm(dim=1)).clamp_min(1e-12)
    for found in similarity_map(a, b, pool, linear):
        torch.testing.assert_close(found.sum((1, 2, 3)), whole)


def test_region_query_by_hand() -> None:
    """The box holds (1, 0): rows along (1, 0), (1, 1), (0, 1) have cosines 1, 1/sqrt 2, 0. The whole query lies along (1, 1)."""
    query = torch.tensor([[1.0, 0], [0, 1]]).T.reshape(2, 1, 2)
    gallery = torch.tensor([[0.0, 3], [2, 2], [5, 0]]).view(3, 2, 1, 1)
    order, cosine = region_query(query, (0, 0, 1, 1), gallery)
    assert order.tolist() == [2, 1, 0]
    assert cosine.tolist() == pytest.approx([0, 0.5**0.5, 1])
    assert region_query(query, (0, 0, 2, 1), gallery)[0].tolist() == [1, 0, 2]
    assert region_query(query, (0, 0, 2, 1), gallery, "max")[0].tolist() == [1, 0, 2]
    with pytest.raises(Mistake, match=r"box=\(0, 0, 3, 1\).*1 rows and 2 columns"):
        region_query(query, (0, 0, 3, 1), gallery)


# -- whole networks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "pool"), [(average, "avg"), (largest, "max")])
def test_the_part_gives_the_papers_formula(x: Tensor, make, pool: str) -> None:  # type: ignore[no-untyped-def]
    answer = seeded(make).double()
    x = x.double()
    view = Similarity(answer, x[:1])
    found = SimilarityMaps(upsample=False)(view, x[1:], 0)
    layer = find_layer(answer, x, torch.zeros(6).long())
    maps = maps_of(answer, x, layer)
    ours, _ = similarity_map(maps[1:], maps[:1].expand(5, -1, -1, -1), pool)
    torch.testing.assert_close(found.map, ours)
    torch.testing.assert_close(found.map.sum((1, 2, 3)), view(x[1:])[:, 0])
    assert found.table["constant"] == pytest.approx([0] * 5, abs=1e-12)
    assert found.table["layer"] == layer.name
    assert found.table["explains"] == "likeness to an image"
    up = SimilarityMaps()(view, x[1:], 0).map
    torch.testing.assert_close(up, F.interpolate(ours, (10, 10), mode="bilinear", align_corners=False))


def test_a_linear_head_and_an_image_like_itself(x: Tensor) -> None:
    answer = seeded(embedding).double()
    x = x.double()
    view = Similarity(answer, x[:1])
    found = SimilarityMaps(upsample=False)(view, x, 0)
    maps, head = maps_of(answer, x, find_layer(answer, x, torch.zeros(6).long())), answer.model[7]
    ours, _ = similarity_map(maps, maps[:1].expand(6, -1, -1, -1), "avg", (head.weight, head.bias))
    torch.testing.assert_close(found.map, ours)
    assert float(found.map[0].sum()) == pytest.approx(1)
    assert any(abs(share) > 1e-3 for share in found.table["constant"])  # the bias


def test_flattened_features_behind_a_relu_add_up_place_by_place(x: Tensor) -> None:
    """f = ReLU(W X + c): a place gives sum_e [f_e > 0] v_e sum_k W_ekp X_kp, the open gates' constants the rest."""
    answer = seeded(flat).double()
    x = x.double()
    view = Similarity(answer, x[:1])
    found = SimilarityMaps(upsample=False)(view, x[1:], 0)
    maps, fc = maps_of(answer, x, find_layer(answer, x, torch.zeros(6).long())), answer.model[6]
    f = view.features(x)
    v = f[:1] / (f[:1].norm() * f[1:].norm(dim=1, keepdim=True)) * (f[1:] > 0)
    own = torch.einsum("ne,ekp,nkp->np", v, fc.weight.view(12, 8, 25), maps[1:].flatten(2)).view(5, 1, 5, 5)
    torch.testing.assert_close(found.map, own + ((v @ fc.bias) / 25)[:, None, None, None])
    torch.testing.assert_close(found.map.sum((1, 2, 3)), view(x[1:])[:, 0])


def test_of_a_class_it_splits_the_cosine_to_the_weights_of_the_class(x: Tensor) -> None:
    answer = seeded(average).double()
    x, target = x.double(), torch.tensor([0, 1, 2, 3, 1, 0])
    found = SimilarityMaps(upsample=False)(answer, x, target)
    fc = answer.model[7]
    cosine = (answer(x) - fc.bias).gather(1, target[:, None])[:, 0] / fc.weight[target].norm(dim=1)
    features = Similarity(answer, x[:1]).features(x)
    torch.testing.assert_close(found.map.sum((1, 2, 3)), cosine / features.norm(dim=1))
    # behind global average pooling it is the class activation map, scaled image by image
    cam = GradCam(relu=False, upsample=False)(answer, x, target).map
    torch.testing.assert_close(found.map, cam / (features.norm(dim=1) * fc.weight[target].norm(dim=1))[:, None, None, None])
    assert found.table["explains"] == "likeness to the class's weights"


def test_our_network_and_timms(x: Tensor) -> None:
    import timm

    answer = Answer(Normalise([0.3] * 3, [0.2] * 3), timm.create_model("resnet10t", num_classes=4)).eval()
    large = F.interpolate(x[:3], (64, 64))
    for view, target in ((Similarity(answer, large[:1]), 0), (answer, 2)):
        found = SimilarityMaps(upsample=False)(view, large, target)
        torch.testing.assert_close(found.map.sum((1, 2, 3)), torch.tensor(found.table["cosine"]), rtol=1e-4, atol=1e-5)
        assert max(map(abs, found.table["constant"])) < 1e-4  # mean pooling has no constant
    ours = Answer(Normalise([0.3] * 3, [0.2] * 3), parts.make("resnet", layers=(1, 1), widths=(4, 8), num_classes=4, in_chans=3)).eval()
    found = SimilarityMaps(upsample=False)(Similarity(ours, x[:1]), x, 0)
    assert float(found.map[0].sum()) == pytest.approx(1, abs=1e-5)


def test_what_has_no_sum_over_places_is_refused(x: Tensor) -> None:
    for curved in (nn.LayerNorm(8), nn.GELU()):
        answer = seeded(lambda c=curved: net(nn.AdaptiveAvgPool2d(1), nn.Flatten(), c, nn.Linear(8, 4)))
        for view in (answer, Similarity(answer, x[:1])):
            with pytest.raises(Mistake, match=r"similarity-maps: what lies between layer 'model.4' .* use grad-cam"):
                SimilarityMaps()(view, x, 0)

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = seeded(average)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * 2 + 1

    with pytest.raises(Mistake, match="convince explain RUN FILE --method similarity-maps --like FILE"):
        SimilarityMaps()(Scaled(), x, 0)
    assert SimilarityMaps()(Similarity(Scaled(), x[:1]), x, 0).map.shape == (6, 1, 10, 10)
    with pytest.raises(Mistake, match="pool='sum' must be one of avg, max"):
        similarity_map(A, B, "sum")


def test_a_class_token_is_refused(x: Tensor) -> None:
    import timm

    options = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 4}
    large = F.interpolate(x[:2], (32, 32))
    for pool in ("token", "avg"):  # the latter has a layer norm behind the mean
        vit = timm.create_model("vit_tiny_patch16_224", global_pool=pool, **options).eval()
        with pytest.raises(Mistake, match="the cosine is no sum over places"):
            SimilarityMaps()(Similarity(vit, large[:1]), large, 0)
