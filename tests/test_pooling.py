"""The pooled maps of published probes: sizes against their table, values against the windows written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.evaluation.pooling import FEATURES, LAYERS, Reading, pooled, shapes
from common.resnet import resnet10, resnet50


class Maps(nn.Module):
    """A trunk without layers: stages(x) are given."""

    def __init__(self, maps):
        super().__init__()
        self.maps = maps

    def stages(self, x):
        return self.maps


ALEXNET = {"conv1": (96, 55), "conv2": (256, 27), "conv3": (384, 13), "conv4": (384, 13), "conv5": (256, 13)}


def alexnet(images=2):
    torch.manual_seed(0)
    return Maps({name: torch.randn(images, width, side, side) for name, (width, side) in ALEXNET.items()})


def test_the_table_of_a_resnet50():
    # Goyal et al. 2019 and OpenSelfSup: sides 12, 6, 4, 3, 2, about 9,000 numbers each. This is an eighth.
    found = shapes(resnet50(width=0.125), 224, [*FEATURES, "avgpool"])
    full = {"feature1": (64, 12), "feature2": (256, 6), "feature3": (512, 4), "feature4": (1024, 3),
            "feature5": (2048, 2), "avgpool": (2048, 1)}
    assert found == {name: (channels // 8, side, side) for name, (channels, side) in full.items()}
    assert [channels * side**2 for channels, side in full.values()] == [9216, 9216, 8192, 9216, 8192, 2048]


def test_the_table_of_alexnet():
    for kind in ("", "_max"):
        rows = pooled(alexnet(), torch.zeros(2, 3, 224, 224), [f"conv{i}{kind}" for i in range(1, 6)])
        assert [row[0].numel() for row in rows.values()] == [9600, 9216, 9600, 9600, 9216]


def test_values_are_those_of_the_windows():
    trunk, x = resnet10(width=0.125).double().eval(), torch.randn(3, 3, 224, 224, dtype=torch.float64)
    maps, rows = trunk.stages(x), pooled(trunk, x, [*FEATURES, "avgpool"])
    assert list(rows) == [*FEATURES, "avgpool"] and all(row.dtype == torch.float64 for row in rows.values())
    first = rows["feature1"]  # (3, 8, 12, 12)
    # The corner windows of Feature1 see 36 pixels and 64 zeros, those at the border 60 pixels and 40 zeros.
    torch.testing.assert_close(first[:, :, 0, 0], maps["conv1"][:, :, :6, :6].sum((2, 3)) / 100)
    torch.testing.assert_close(first[:, :, 0, 3], maps["conv1"][:, :, :6, 26:36].sum((2, 3)) / 100)
    torch.testing.assert_close(first[:, :, 5, 3], maps["conv1"][:, :, 46:56, 26:36].mean((2, 3)))
    second, last = rows["feature2"], rows["feature5"]  # (3, 8, 6, 6), (3, 64, 2, 2)
    torch.testing.assert_close(second[:, :, 1, 5], maps["layer1"][:, :, 8:24, 40:56].mean((2, 3)))
    torch.testing.assert_close(last[:, :, 1, 0], maps["layer4"][:, :, 1:7, :6].mean((2, 3)))
    torch.testing.assert_close(rows["avgpool"].flatten(1), trunk(x))
    assert [tuple(row.shape[1:]) for row in rows.values()][:2] == [(8, 12, 12), (8, 6, 6)]
    flat = torch.cat([rows["feature2"].flatten(1), trunk(x)], dim=1)
    torch.testing.assert_close(Reading(trunk, ["feature2", "avgpool"])(x), flat)


def test_alexnet_probes_average_or_take_the_maximum():
    trunk = alexnet()
    rows = pooled(trunk, torch.zeros(2, 3, 224, 224), ["conv1", "conv1_max", "conv5_max"])
    corner = trunk.maps["conv1"][:, :, :3, :3]
    last = trunk.maps["conv5"][:, :, 10:12, 10:12]
    torch.testing.assert_close(rows["conv1"][:, :, 0, 0], corner.sum((2, 3)) / 36)
    torch.testing.assert_close(rows["conv1_max"][:, :, 0, 0], corner.amax((2, 3)))
    torch.testing.assert_close(rows["conv5_max"][:, :, 5, 5], last.amax((2, 3)))


def test_bfloat16_maps_are_pooled_in_float32():
    trunk = Maps({"layer4": torch.randn(2, 4, 7, 7, dtype=torch.bfloat16)})
    rows = pooled(trunk, torch.zeros(2, 3, 224, 224), ["avgpool", "feature5"])
    exact = trunk.maps["layer4"].float()
    torch.testing.assert_close(rows["avgpool"][:, :, 0, 0], exact.mean((2, 3)))
    torch.testing.assert_close(rows["feature5"], F.avg_pool2d(exact, 6, 1))


@pytest.mark.parametrize("stem, size, layer, words", [
    ("imagenet", 96, "feature3", "is defined on a map of 28x28 .*this one is 12x12, from 96x96 pixels"),
    ("small", 32, "feature1", "feature1 is defined on a map of 112x112 .*this one is 32x32"),
    ("imagenet", 224, "conv2", "conv2 needs a trunk with a map 'conv2', this one has conv1, layer1"),
    ("imagenet", 224, "conv1", "conv1 is defined on a map of 55x55"),
    ("imagenet", 32, "feature6", "'feature6' is no layer: choose from feature1")])
def test_other_maps_than_the_protocols_are_refused(stem, size, layer, words):
    with pytest.raises(ValueError, match=words):
        shapes(resnet10(width=0.125, stem=stem), size, [layer])


def test_looking_at_shapes_leaves_the_trunk_alone():
    trunk = resnet10(width=0.125, stem="small").train()
    before = {name: tensor.clone() for name, tensor in trunk.state_dict().items()}
    assert shapes(trunk, 32, ["avgpool"]) == {"avgpool": (64, 1, 1)} and trunk.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in trunk.state_dict().items())
    assert pooled(trunk, torch.zeros(2, 3, 32, 32), []) == {} and "avgpool" in LAYERS
