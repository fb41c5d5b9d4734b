"""Checkpoints in and out: a synthetic file of every family, in its authors' layout, and every export."""

import argparse
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile

import evaluations
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import ROOT, ranks, run_here
from PIL import Image
from torch import nn

import deepcluster
import deepclusterv2
import eval_knn
import odc
import sela
import selav2
import swav
from common import distributed, features, weights
from common.alexnet import AlexNet, alexnet
from common.engine import checkpoint
from common.engine.errors import CheckpointError
from common.engine.launch import autocast_dtype, launch
from common.resnet import resnet10, resnet18, resnet34, resnet50
from common.sources.files import scan
from common.weights import __main__ as tool
from common.weights import export, families, load
from common.weights.preact import PreactResNet50


def randomised(module, seed=0):
    """The module in eval mode with all its tensors random, so that no two could be exchanged unseen."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif tensor.is_floating_point():
            scale = 0.1 if tensor.dim() < 2 else tensor[0].numel() ** -0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return module.eval()


def images(side=40, count=3):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(9))


def equal(found, wanted):
    """Whether two lists hold the same tensors, bit by bit."""
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted))


def put(tmp_path, saved, name="file.pth", **options):
    torch.save(saved, tmp_path / name, **options)
    return tmp_path / name


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def linear(K, D, bias=True, seed=0):
    return randomised(nn.Linear(D, K, bias), seed)


def linears(H, K, D, bias=True):
    return [linear(K, D, bias, seed=h) for h in range(H)]


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def under(layers):
    """{"0.weight": ...} of {"0": module}."""
    return {f"{place}.{name}": tensor for place, layer in layers.items()
            for name, tensor in layer.state_dict().items()}


def numbered(name, layers):
    return under({f"{name}{i}": layer for i, layer in enumerate(layers)})


def mlp(F_, hidden=12, D=6, norm=True, affine=True):
    layers = [nn.Linear(F_, hidden), nn.BatchNorm1d(hidden, affine=affine), nn.ReLU(), nn.Linear(hidden, D)]
    return randomised(nn.Sequential(*layers) if norm else nn.Sequential(*layers[:1], *layers[2:]), 5)


def logits(*heads):
    return lambda x: [head(x) for head in heads]


def thin(make=resnet50, seed=0, **options):
    return randomised(make(width=0.125, **options), seed)  # of a ResNet-50: 256 features


def no_counters(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


SOBEL = {"0.weight": torch.full((1, 3, 1, 1), 1 / 3), "0.bias": torch.zeros(1),
         "1.weight": torch.tensor([[[[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]],
                                   [[[1, 2, 1], [0, 0, 0], [-1, -2, -1]]]]), "1.bias": torch.zeros(2)}
MOMENTUM = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


# ---- a file of each family: (what torch.load gives, trunk, scores of the trunk's features or None)


def alone(prefix="", wrap=dict, **options):
    trunk = thin(**options)
    return wrap(prefixed(prefix, trunk.state_dict())), trunk, None


def projected(*names, projection="projection_head.", norm=True):
    """(state of a projection and of prototypes by these names, their scores)."""
    head, prototypes = mlp(256, norm=norm), linears(len(names), 7, 6, bias=False)

    def scores(x):
        return [F.linear(F.normalize(head(x)), F.normalize(layer.weight)) for layer in prototypes]

    return {**prefixed(projection, head.state_dict()), **under(dict(zip(names, prototypes)))}, scores


def authors(*names, wrap=dict, norm=True):  # of SwAV, DeepCluster-v2 and SeLa-v2
    trunk, (heads, scores) = thin(), projected(*names, norm=norm)
    assert ("projection_head.1.weight" in heads) == norm == ("projection_head.2.weight" not in heads)
    return wrap(prefixed("module.", {**trunk.state_dict(), **heads})), trunk, scores


def swav_released():
    return authors("prototypes")


def training(state):
    return {"epoch": 3, "state_dict": state, "optimizer": MOMENTUM, "amp": {"scaler": {"loss_scale": 2.0}}}


def deepclusterv2_released():
    return authors(*(f"prototypes.prototypes{h}" for h in range(3)))


def vissl(prefix="_feature_blocks.", several=False):
    trunk = thin()
    heads, scores = projected("0.prototypes0", "0.prototypes1", projection="0.projection_head.")
    model = {"trunk": prefixed(prefix, trunk.state_dict()), "heads": [heads] if several else heads}
    return {"phase_idx": 9, "iteration": 90, "loss": {}, "type": "consolidated",
            "classy_state_dict": {"base_model": {"model": model}}}, trunk, scores


def openselfsup_sobel():
    return alone(wrap=lambda state: {"state_dict": state, "author": "OpenSelfSup"}, sobel=True)


def mmselfsup_swav(name):
    trunk, (heads, scores) = thin(), projected(name, projection="neck.projection_neck.")
    state = {**prefixed("backbone.", trunk.state_dict()), **heads, "neck.bn.weight": torch.zeros(12),
             "data_preprocessor.mean": torch.zeros(3, 1, 1)}
    return {"meta": {"epoch": 200}, "state_dict": state}, trunk, scores


def mmselfsup_odc():
    trunk, head, classifier = thin(), mlp(256, affine=False), linear(9, 6)
    neck = under({"neck.fc0": head[0], "neck.bn0": head[1], "neck.fc1": head[3]})
    assert "neck.bn0.weight" not in neck
    state = {**prefixed("backbone.", trunk.state_dict()), **neck, **under({"head.fc_cls": classifier}),
             "loss_weight": torch.ones(9), "memory_bank.centroids": torch.zeros(9, 6)}
    return {"meta": {}, "state_dict": state}, trunk, lambda x: [classifier(F.relu(head(x)))]


def mmselfsup_deepcluster():
    trunk, classifier = thin(sobel=True), linear(9, 256)
    state = {**prefixed("backbone.sobel_layer.sobel.", SOBEL), **prefixed("backbone.", trunk.state_dict()),
             **under({"head.fc_cls": classifier}), "loss_weight": torch.ones(9)}
    return {"meta": {}, "state_dict": state, "author": "MMSelfSup"}, trunk, logits(classifier)


def sela_released(labels="labels"):
    trunk, fc = thin(), linear(9, 256)
    state = {**trunk.state_dict(), **under({"fc": fc})}
    return {"state_dict": state, labels: torch.arange(20).view(2, 10)}, trunk, logits(fc)


def preact_features(state, x):
    """The forward pass of SeLa's resnetv2, from its own names."""

    def convolution(name, y, stride=1, padding=0):
        return F.conv2d(y, state[f"{name}.weight"], stride=stride, padding=padding)

    def activated(name, y):
        parts = (state[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.relu(F.batch_norm(y, *parts))

    x = F.max_pool2d(convolution("features.0", x, 2, 3), 3, 2, 1)
    for stage, depth in ((2, 3), (3, 4), (4, 6), (5, 3)):
        for i in range(depth):
            block, stride = f"features.{stage}.{i}.", 2 if stage > 2 and i == 0 else 1
            y = activated(block + "bn1", x)
            shortcut = convolution(block + "shortcut.0", y, stride) if i == 0 else x
            y = activated(block + "bn2", convolution(block + "conv1", y))
            y = activated(block + "bn3", convolution(block + "conv2", y, stride, 1))
            x = convolution(block + "conv3", y) + shortcut
    return F.adaptive_avg_pool2d(x, 1).flatten(1)


def sela_preact():
    state = {}
    for name, tensor in randomised(PreactResNet50()).state_dict().items():
        stage, _, rest = name.partition(".")
        place = 0 if stage == "conv1" else int(stage[-1]) + 1
        state[f"features.{place}.{rest.replace('shortcut.', 'shortcut.0.')}"] = tensor
    assert len(state) == 293
    assert {"features.5.0.shortcut.0.weight", "features.2.2.bn1.running_mean"} <= state.keys()
    heads = linears(2, 9, 2048)
    return {**state, **numbered("top_layer", heads)}, lambda x: preact_features(state, x), logits(*heads)


def children(state):
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"{places[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor
            for name, tensor in state.items()}


def sela_training(prefix, *names):
    trunk, heads = thin(), linears(len(names), 9, 256)
    state = {**prefixed(prefix, children(trunk.state_dict())), **under(dict(zip(names, heads)))}
    return {"epoch": 4, "arch": "resnetv1", "state_dict": state, "optimizer": MOMENTUM,
            "L": torch.zeros(2, 5)}, trunk, logits(*heads)


def moco():
    trunk, other = thin(), thin(seed=1)
    state = {**prefixed("module.encoder_q.", {**trunk.state_dict(), **under({"fc": linear(5, 256)})}),
             **prefixed("module.encoder_k.", {**other.state_dict(), **under({"fc": linear(5, 256, seed=1)})}),
             "module.queue": torch.zeros(5, 8), "module.queue_ptr": torch.zeros(1)}
    return {"epoch": 200, "arch": "resnet50", "state_dict": state, "optimizer": MOMENTUM}, trunk, logits()


def mocov2():
    saved, *rest = moco()
    state = {key.replace(".fc.", ".fc.2."): tensor for key, tensor in saved["state_dict"].items()}
    for encoder in ("encoder_q", "encoder_k"):
        state.update(under({f"module.{encoder}.fc.0": linear(256, 256)}))
    return {**saved, "state_dict": state}, *rest


def lightning(state):
    return {"state_dict": {**state, "classifier.weight": torch.zeros(3, 256)}, "epoch": 1,
            "pytorch-lightning_version": "2.1"}


def solo_learn():
    momentum = prefixed("momentum_backbone.", thin(seed=1).state_dict())
    return alone("backbone.", lambda state: lightning({**state, **momentum}))


def lightly():
    trunk, (heads, scores) = thin(), projected("prototypes.heads.0", projection="projection_head.layers.")
    return lightning({**prefixed("backbone.", children(trunk.state_dict())), **heads}), trunk, scores


FAMILIES = {  # name: (whose file it is said to be, a function that makes one)
    "swav_released": ("SwAV", swav_released),
    "swav_training": ("SwAV", lambda: authors("prototypes", wrap=training)),
    "swav_wide_head_without_norm": ("SwAV", lambda: authors("prototypes", norm=False)),  # RN50w5
    "swav_without_counters": ("SwAV", lambda: authors("prototypes", wrap=no_counters)),
    "deepclusterv2_released": ("DeepCluster-v2 or SeLa-v2", deepclusterv2_released),
    "vissl": ("VISSL", vissl),
    "vissl_extractor": ("VISSL", lambda: vissl("base_model._feature_blocks.", several=True)),
    "vissl_flat": ("VISSL", lambda: alone("_feature_blocks.", lambda state: {"model_state_dict": state})),
    "openselfsup_sobel": ("OpenSelfSup", openselfsup_sobel),
    "mmselfsup_swav": ("MMSelfSup", lambda: mmselfsup_swav("head.loss.prototypes")),
    "mmselfsup_old_swav": ("MMSelfSup", lambda: mmselfsup_swav("head.prototypes")),
    "mmselfsup_odc": ("MMSelfSup", mmselfsup_odc),
    "mmselfsup_deepcluster": ("MMSelfSup", mmselfsup_deepcluster),
    "sela_released": ("SeLa", sela_released),
    "sela_released_older": ("SeLa", lambda: sela_released("L")),
    "sela_preact": ("SeLa", sela_preact),
    "sela_training": ("SeLa", lambda: sela_training("features.", "top_layer0", "top_layer1")),
    "sela_training_parallel": ("SeLa", lambda: sela_training("features.module.", "top_layer.0")),
    "moco": ("MoCo", moco),
    "mocov2": ("MoCo", mocov2),
    "lightning": ("Lightning", lambda: alone("backbone.", lightning)),
    "lightning_encoder": ("Lightning", lambda: alone("encoder.", lightning)),
    "lightning_any_name": ("Lightning", lambda: alone("student_network.resnet.", lightning)),
    "solo_learn": ("Lightning", solo_learn),
    "lightly": ("Lightning", lightly),
    "compiled": ("torchvision", lambda: alone("_orig_mod.")),
    "compiled_inside": ("torchvision", lambda: alone("module.backbone._orig_mod.", lambda s: {"model": s})),
    "plain18": ("torchvision", lambda: alone(wrap=lambda s: s | under({"fc": linear(4, 64)}), make=resnet18)),
    "plain34": ("torchvision", lambda: alone(wrap=no_counters, make=resnet34, stem="small")),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_of_every_family_gives_the_same_features_and_scores(tmp_path, name):
    family, make = FAMILIES[name]
    saved, expected, scores = make()
    path, x = put(tmp_path, saved), images()
    trunk, info = weights.load_backbone(path)
    with torch.no_grad():
        features = expected(x)
        assert features.std() > 0.01 and torch.equal(trunk(x), features)  # in eval mode
        assert info["method"] == family and (info["resize"], info["size"]) == (256, 224)
        model, _ = weights.load_model(path)
        wanted = scores(features) if scores else []
        assert equal(model(x), wanted)
        # the round trip: one file with all that was found, which torchvision's names are in
        labels = saved.get("L", saved.get("labels"))
        checkpoint.export_backbone(tmp_path / "new.pt", model.backbone, info, model, labels)
        again, same = weights.load_model(tmp_path / "new.pt")
        assert same == info and equal(again(x), wanted)
        assert (again.projection_head is None) == (model.projection_head is None)
        assert torch.equal(weights.load_backbone(tmp_path / "new.pt")[0].eval()(x), features)


def test_a_projection_without_clusters(tmp_path):
    v1, v2 = (weights.load_model(put(tmp_path, make()[0]))[0].projection_head for make in (moco, mocov2))
    assert [type(layer) for layer in v1] == [nn.Linear]
    assert [type(layer) for layer in v2] == [nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(v1[0].weight, linear(5, 256).weight)


@pytest.mark.parametrize("width", [2, 4, 5])
def test_wide_networks_by_their_shapes(width):
    with torch.device("meta"):  # without the gigabytes
        state = resnet50(width=width).state_dict()
    contents = families.recognise(prefixed("module.", {**state, "prototypes.weight": torch.zeros(3000, 128)}))
    assert (contents.info["arch"], contents.info["width"]) == ("resnet50", width) and len(contents.heads) == 1
    shapes = [{name: tensor.shape for name, tensor in trunk.items()} for trunk in (contents.trunk, state)]
    assert shapes[0] == shapes[1]


def small_alexnet(info):
    """What build_backbone gives for an AlexNet, with few channels: the real one has 240 MB."""
    with torch.device("meta"):
        trunk = AlexNet((6, 8, 8, 8, 4), info["sobel"], last_relu=info["arch"] != "alexnet")
        trunk.classifier[1], trunk.classifier[4] = nn.Linear(144, 10), nn.Linear(10, 10)
    if info.get("convolutions_only"):
        trunk.classifier = nn.Identity()
    trunk.feature_dim = 144 if info.get("convolutions_only") else 10
    trunk.to_empty(device="cpu")
    if info["sobel"]:
        trunk.sobel.kernels.copy_(SOBEL["1.weight"])
    with torch.device("cpu"):
        return randomised(trunk)


def deepcluster_alexnet(sobel):
    trunk, top = small_alexnet({"arch": "alexnet", "sobel": sobel}), linear(9, 10)
    state = {name.replace("features.", "features.module."): tensor
             for name, tensor in no_counters(trunk.state_dict()).items()}
    state |= under({"top_layer": top}) | (prefixed("sobel.", SOBEL) if sobel else {})
    saved = {"epoch": 500, "arch": "alexnet", "state_dict": state, "optimizer": MOMENTUM}
    return saved, trunk, lambda x: [top(F.relu(x))], dict(arch="alexnet", sobel=sobel, method="DeepCluster")


def sela_alexnet():
    trunk, heads = small_alexnet({"arch": "alexnet_sela", "sobel": False}), linears(10, 9, 10)
    state = {**trunk.state_dict(), **numbered("top_layer", (*heads, linear(4, 10)))}  # the last: rotations
    return state, trunk, logits(*heads), dict(arch="alexnet_sela", sobel=False, method="SeLa")


def vissl_alexnet():
    info = dict(arch="alexnet", sobel=True, convolutions_only=True)
    trunk = small_alexnet(info)
    blocks = {0: (0, 0), 1: (0, 1), 4: (2, 0), 5: (2, 1), 8: (4, 0), 9: (4, 1), 11: (5, 0), 12: (5, 1),
              14: (6, 0), 15: (6, 1)}
    state = prefixed("sobel.", SOBEL)
    for name, tensor in trunk.state_dict().items():
        _, place, tail = name.split(".")
        state["_feature_blocks.{}.{}.".format(*blocks[int(place)]) + tail] = tensor
    return {"model_state_dict": state}, trunk, logits(), {**info, "method": "VISSL"}


@pytest.mark.parametrize("make", [lambda: deepcluster_alexnet(True), lambda: deepcluster_alexnet(False),
                                  sela_alexnet, vissl_alexnet])
def test_alexnets(tmp_path, monkeypatch, make):
    saved, expected, scores, facts = make()
    monkeypatch.setattr(load, "build_backbone", small_alexnet)
    model, info = weights.load_model(put(tmp_path, saved))
    assert facts.items() <= info.items()
    x = images(224)
    with torch.no_grad():
        features = expected(x)
        assert torch.equal(model.eval().backbone(x), features) and features.std() > 0
        # before or after the last ReLU
        assert (features.min() < 0) == (info["arch"] == "alexnet" and "convolutions_only" not in info)
        assert equal(model(x), scores(features))


def test_the_names_and_shapes_of_real_alexnets():
    for kind, sobel, arch in (("deepcluster", True, "alexnet"), ("sela", False, "alexnet_sela"),
                              ("sela_small", False, "alexnet_sela_small")):
        with torch.device("meta"):
            state = alexnet(kind, sobel).state_dict()
        top = "top_layer.weight" if sobel else "top_layer0.weight"
        contents = families.recognise({**state, top: torch.zeros(3, 4096)})
        assert contents.info["arch"] == arch and contents.trunk.keys() == state.keys()
    info = dict(arch="alexnet", sobel=True, convolutions_only=True)
    assert weights.build_backbone(info).feature_dim == 9216


def test_a_torchvision_resnet50_of_real_size(tmp_path):
    network = randomised(torchvision.models.resnet50())
    trunk, info = weights.load_backbone(put(tmp_path, network.state_dict()))
    network.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(trunk.eval()(images(64)), network(images(64)))
    assert len(trunk.state_dict()) == 318
    assert (info["arch"], info["width"], info["stem"]) == ("resnet50", 1, "imagenet")


# ---- files that cannot be used


def without(*names):
    return lambda state: {key: state[key] for key in state if not any(name in key for name in names)}


def plus(name, *shape):
    return lambda state: {**state, name: torch.zeros(*shape)}


def instead(saved):
    return lambda state: saved


def holding_itself(saved):
    saved["state_dict"] = saved
    return saved


@pytest.mark.parametrize(("change", "words"), [
    (without("layer3.2.bn2.weight"), "is no resnet50 x0.125, imagenet stem: 264 of 265 tensors fit; "
                                     "missing ['layer3.2.bn2.weight']"),
    (without("layer3.2.bn2.running_mean"), "264 of 265 tensors fit; missing ['layer3.2.bn2.running_mean']"),
    (without("layer4.0.conv1.weight"), "missing ['layer4.0.conv1.weight']"),
    (without("layer4.0.bn1.weight"), "missing ['layer4.0.bn1.weight']"),
    (without("layer3.", "layer4."), "is no checkpoint that is known"),
    (without("layer3.5"), "only ResNet-10, 18, 34 and 50 are known"),
    (without("module.conv1.weight"), "lacks conv1.weight"),
    (without("downsample"), "missing ['layer1.0.downsample.0.weight', 'layer1.0.downsample.1.bias', "
                            "'layer1.0.downsample.1.running_mean'] and 17 more"),
    (plus("module.layer2.1.conv2.weight", 1, 16, 3, 3),
     "264 of 265 tensors fit; of another shape ['layer2.1.conv2.weight (1, 16, 3, 3)']"),
    (plus("module.layer2.0.se.fc1.weight", 2), "unknown ['layer2.0.se.fc1.weight']"),
    (plus("module.conv2.weight", 2), "unknown ['conv2.weight']"),
    (plus("module.conv1.weight", 8, 4, 7, 7), "4 channels"),
    (plus("module.conv1.weight", 8), "no convolution"),
    (plus("conv1.weight", 8, 3, 7, 7), "has conv1.weight twice"),
    (plus("module.sobel.1.weight", 2, 1, 3, 3), "other Sobel filters"),
    (lambda state: {**prefixed("teacher.", state), **prefixed("student.", state)},
     "holds several trunks: student., teacher."),
    (lambda state: {key.replace("layer", "stage"): tensor for key, tensor in state.items()},
     "is no checkpoint that is known"),
    (lambda state: {"stem.0.weight": torch.zeros(2), **without("module.conv1", "module.bn1")(state)},
     "it has ['stem.0.weight']"),
    (lambda state: {"format": 1, "method": "swav", "config": {}, "model": state}, "name the run's directory"),
    (lambda state: [state], "it holds no names"),
    (instead({"other.weight": torch.zeros(3)}), "is no checkpoint that is known: it holds other.weight"),
    (instead({}), "it holds no tensors"),
    (instead({"student": {"w": torch.zeros(3)}, "teacher": {"w": torch.zeros(3)}, "epoch": 5}),
     "it holds student, teacher, epoch and no tensors"),
    (instead({"a\nb": 1, 5: 2}), r"it holds a\nb, 5 and no tensors"),
    (instead(holding_itself({"a": 1})), "it holds a and no tensors"),
    (instead(holding_itself({"info": {"arch": "resnet50", "width": 1, "stem": "imagenet"}})),
     "unknown ['info'"),
    (instead({"type": "shard_list", "classy_state_dict": {}}), "sharded"),
    (instead({"classy_state_dict": {}}), "is no checkpoint that is known: KeyError: 'base_model'"),
    (instead({f"features.{n}.weight": torch.zeros(64, 3, 3, 3) for n in (0, 3, 4, 7)}),
     "VGG-16 is not built here"),
])
def test_files_that_are_refused(tmp_path, change, words, capsys):
    path = put(tmp_path, change(swav_released()[0]))
    for loader in (weights.load_backbone, weights.load_model):
        with pytest.raises(CheckpointError) as refusal:
            loader(path)
        assert words in str(refusal.value) and str(refusal.value).count("\n") == 0, refusal.value
    assert command(path) == 4
    assert capsys.readouterr().err == f"error: {refusal.value}\n"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e39])  # the last one in float64
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, capsys):
    saved, *_ = sela_released()
    trunk, head = ({**saved["state_dict"], name: saved["state_dict"][name].double()}
                   for name in ("layer3.2.bn2.running_var", "fc.weight"))
    trunk["layer3.2.bn2.running_var"][7] = head["fc.weight"][2, 5] = value
    path = put(tmp_path, trunk)
    for loader in (weights.load_backbone, weights.load_model):
        with pytest.raises(CheckpointError, match=r"pth: layer3.2.bn2.running_var is not finite in 1 of 32"):
            loader(path)
    assert command(path) == 4
    assert capsys.readouterr().err.count("\n") == 1
    path = put(tmp_path, {**saved, "state_dict": head})
    weights.load_backbone(path)
    with pytest.raises(CheckpointError, match=r"pth: heads.0.weight is not finite in 1 of 2304 numbers"):
        weights.load_model(path)


NONSENSE = {
    **dict.fromkeys(("size", "resize"), (-3, 0, 10**9, "24", 24.5, None, [24])),
    **dict.fromkeys(("mean", "std"), (0.5, "abc", (1, 2), (1, 2, float("nan")), {}, (1e9, 1, 1))),
    "width": ("1", None, 0, -1, 1e300, float("nan"), 156250.0, 10**400, [1]),  # 10 million channels
    "arch": ("vit", 5, ["resnet10"], "alexnet", "preact50"), "stem": ("large", None, 3), "channels": (4, "3"),
    "method": (5, torch.zeros(9, 9)), "epoch": ("x", float("nan"), torch.zeros(2))}


def test_nonsense_about_a_trunk_is_refused(tmp_path):
    saved = torch.load(evaluations.export(tmp_path / "backbone.pt"), weights_only=True)
    began = time.perf_counter()
    for name, value in ((name, value) for name, values in NONSENSE.items() for value in values):
        path = put(tmp_path, {**saved, "info": {**saved["info"], name: value}})
        with pytest.raises(CheckpointError, match=r"file\.pth is no ") as refusal:
            weights.load_backbone(path)
        assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 600, (name, value)
    assert time.perf_counter() - began < 10


def test_more_bytes_than_the_file_has_are_refused_before_they_are_read(tmp_path):
    saved = torch.load(evaluations.export(tmp_path / "backbone.pt"), weights_only=True)
    with zipfile.ZipFile(tmp_path / "packed", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as records:
        records.writestr("archive/data.pkl", bytes(1 << 28))
    for name, tensor in saved["state_dict"].items():  # each number of a tensor in the same four bytes
        saved["state_dict"][name] = tensor.flatten()[0].clone().expand(tensor.shape)
    put(tmp_path, saved, "shared")
    put(tmp_path, thin().state_dict() | {"top_layer.weight": torch.zeros(1).expand(10**7, 256)}, "head")
    for name, words in (("packed", "cannot be loaded: BadZipFile: its records hold 268,435,456 bytes"),
                        ("shared", "its tensors have [0-9,]+ bytes, the file itself has"),
                        ("head", "its tensors have 10,240,[0-9,]+ bytes, the file itself has")):
        began = time.process_time()
        with pytest.raises(CheckpointError, match=rf"{name}:? {words}"):
            weights.load_model(tmp_path / name)
        assert time.process_time() - began < 5


def test_heads_that_do_not_fit(tmp_path, capsys):
    path = put(tmp_path, {**swav_released()[0], "module.prototypes.weight": torch.zeros(7, 5)})
    new = tmp_path / "new.pt"
    weights.load_backbone(path)
    with pytest.raises(CheckpointError, match="its heads do not fit its resnet50"):
        weights.load_model(path)
    assert command(path, "--to", "torchvision", "--out", new) == 0
    assert "they are left out" in capsys.readouterr().out and not len(weights.load_model(new)[0].heads)
    assert command(path, "--to", "model", "--out", new) == 4 and "do not fit" in capsys.readouterr().err


class Code:
    """An object whose unpickling runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("kind", ["new", "old", "pkl", "trailing.pkl"])
def test_a_pickle_with_code_executes_nothing(tmp_path, kind, capsys):
    path, new, executed = tmp_path / f"file.{kind}", tmp_path / "new.pt", tmp_path / "executed"
    saved = {**swav_released()[0], "extra": Code(executed)}
    if kind in ("new", "old"):
        torch.save(saved, path, _use_new_zipfile_serialization=kind == "new")
    else:
        path.write_bytes(pickle.dumps(saved))
    words = r"cannot be loaded without running code that is in it .*--trust-pickle"
    for loader in (weights.load_backbone, weights.load_model):
        with pytest.raises(CheckpointError, match=words):
            loader(path)
    assert command(path) == command(path, "--to", "torchvision", "--out", new) == 4
    assert capsys.readouterr().err.count("\n") == 2 and not executed.exists() and not new.exists()
    assert command(path, "--trust-pickle") == 0
    assert executed.exists()  # so the file would have done it


def test_an_old_pickle_is_converted_once(tmp_path, capsys):
    saved, expected, scores = deepclusterv2_released()
    saved = {"state_dict": saved, "args": argparse.Namespace(lr=1)}
    assert command(put(tmp_path, saved, _use_new_zipfile_serialization=False)) == 4
    error = capsys.readouterr().err
    assert "(argparse.Namespace)" in error
    line = error[error.index("python -m common.weights") :].split()[3:]
    assert command(*line[:-1], tmp_path / "new.pt") == 0
    model, info = weights.load_model(tmp_path / "new.pt")
    assert equal(model.eval()(images()), scores(expected(images())))
    assert info["method"] == "DeepCluster-v2 or SeLa-v2"


def test_files_that_are_none(tmp_path):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").write_text("")
    path = put(tmp_path, swav_released()[0], "cut.pth")
    path.write_bytes(path.read_bytes()[:5000])
    for name, trust, words in (
        ("page.pth", False, "cannot be loaded: it is not what torch.save writes"),
        ("page.pth", True, "cannot be loaded: "),
        ("empty.pth", False, "cannot be loaded: EOFError"),
        ("cut.pth", False, "cannot be loaded: "),
        ("none.pth", False, "does not exist"),
        ("none.pkl", False, "does not exist"),
        ("none.pkl", True, "does not exist"),
    ):
        with pytest.raises(CheckpointError, match=words) as refusal:
            weights.load_backbone(tmp_path / name, trust)
        assert "\n" not in str(refusal.value)


def test_other_projects_zips_are_verified(tmp_path):
    """Whether pickles are trusted or not."""
    path = put(tmp_path, swav_released()[0])
    weights.load_backbone(path)
    flip_a_bit(path)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match=rf"{path} cannot be loaded: .*checksum"):
            weights.load_backbone(path, trust)


def test_a_file_without_checksums_is_used(tmp_path, capsys):
    saved, expected, _ = swav_released()
    torch.serialization.set_crc32_options(False)
    path = put(tmp_path, saved)
    torch.serialization.set_crc32_options(True)
    old = put(tmp_path, saved, "old.pth", _use_new_zipfile_serialization=False)  # which had none anyway
    warning = f"warning: {path} has no checksums: damage to it would not be seen\n"
    for file, words in ((path, warning), (old, "")):
        assert torch.equal(weights.load_backbone(file)[0].eval()(images()), expected(images()))
        assert capsys.readouterr().out == words


# ---- our own runs

TINY = "--data shapes:64 --recipe shapes --width 0.125 --sizes 16 --prototypes 5 --batch-size 16".split()
TINY += "--workers 0 --max-steps 1".split()
HEAD = "--hidden 16 --dim 8 --crops 2 --scales 0.4 1".split()


@pytest.mark.parametrize(("method", "options"), [
    (swav, HEAD),
    (deepclusterv2, [*HEAD, "--heads", 2]),
    (selav2, [*HEAD, "--heads", 2]),
    (odc, HEAD),
    (sela, ["--heads", 2]),
    (deepcluster, ["--pca-dim", 8]),
    (deepcluster, ["--pca-dim", 8, "--sobel"]),
])
def test_the_model_of_a_run_scores_as_its_method_does(tmp_path, method, options):
    assert run_here(method, *TINY, *options, "--out", tmp_path) == 0
    model, info = weights.load_model(tmp_path)
    state = checkpoint.load(tmp_path / "checkpoint.pt")
    own = randomised(method.Model(method.Config(**state["config"])))
    own.load_state_dict(state["model"])
    if hasattr(own, "normalize_prototypes"):
        own.normalize_prototypes()
    with torch.no_grad():
        expected = own.eval()([images(16)])[1]
        expected = expected if isinstance(expected, list) else [expected]
        found = model.eval()(images(16))
        z = model.projection_head and model.projection_head(model.backbone(images(16)))
    assert [x.shape for x in found] == [x.shape for x in expected] and info["method"] == method.__name__
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (z is None) == (method in (sela, deepcluster))
    if z is not None:  # ODC's ends with a ReLU
        assert (z.min() >= 0) == (model.projection_head[1].weight is None) == (method is odc)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "elsewhere.pt")
    weights.load_backbone(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt cannot be used: No such file"):
        weights.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="name the run's directory"):
        weights.load_model(tmp_path / "elsewhere.pt")
    assert not weights.load_model(tmp_path / "backbone.pt")[0].heads


def _load_on_every_rank(path):
    model, _ = distributed.from_main(weights.load_model, path)
    return [scores.detach() for scores in model.eval()(images())]


def test_two_ranks_get_the_model_that_one_has_read(tmp_path):
    saved, expected, scores = deepclusterv2_released()
    for found in ranks(2, _load_on_every_rank, put(tmp_path, saved)):
        torch.testing.assert_close(found, [x.detach() for x in scores(expected(images()))])


def test_init_from_another_projects_file(tmp_path):
    saved = sela_released()[0]
    # oneDNN's bfloat16 gradient of a strided convolution of a 1x1 map reads beyond it
    options = "--arch resnet50 --stem imagenet --lr 1e-12 --precision float32 --init-from".split()
    assert run_here(swav, *TINY, *HEAD, *options, put(tmp_path, saved), "--out", tmp_path / "run") == 0
    trunk, _ = weights.load_backbone(tmp_path / "run")
    torch.testing.assert_close(trunk.layer4[2].conv3.weight.detach(),
                               saved["state_dict"]["layer4.2.conv3.weight"], rtol=1e-4, atol=1e-6)


def test_init_from_compares_with_what_the_run_says_of_its_trunk(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "build_backbone", small_alexnet)
    path = put(tmp_path, sela_alexnet()[0])
    run = dict(arch="alexnet_sela", width=1.0, stem="imagenet", channels=3)
    assert "features.0.weight" in weights.load_trunk(path, run)
    with pytest.raises(CheckpointError, match="has arch alexnet_sela, this run has --arch alexnet"):
        weights.load_trunk(path, {**run, "arch": "alexnet"})


# ---- exports


def command(*arguments):
    """Runs python -m common.weights in this process; returns its exit code."""
    try:
        launch(tool.main, tool.arguments([str(a) for a in arguments]))
    except SystemExit as stop:
        return stop.code
    return 0


def sela18(tmp_path):
    trunk, heads = randomised(resnet18()), linears(3, 9, 512)
    state = {**prefixed("features.", children(trunk.state_dict())), **numbered("top_layer", heads)}
    return trunk, heads, put(tmp_path, {"state_dict": state, "L": torch.arange(30).view(3, 10)}, "sela18.pth")


def test_a_trunk_and_a_model_in_torchvision(tmp_path, capsys):
    trunk, heads, path = sela18(tmp_path)
    x, new = images(), tmp_path / "new.pt"
    features, labels = trunk(x), torch.arange(30).view(3, 10)
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    classifier = torchvision.models.resnet18(num_classes=9)
    scores = [head(features) for head in heads]
    for options, reader, output, wanted in ((["torchvision"], network, features, scores),
                                            (["model", "--head", 1], classifier, scores[1], scores[1:2])):
        assert command(path, "--out", new, "--to", *options) == 0
        assert "rebuilds" not in capsys.readouterr().out
        saved = torch.load(new, weights_only=True)
        reader.load_state_dict(saved["state_dict"], strict=True)
        assert torch.equal(reader.eval()(x), output) and torch.equal(saved["L"], labels)
        assert equal(weights.load_model(new)[0].eval()(x), wanted)


def test_a_resnet50_model_of_a_run_in_torchvision(tmp_path):
    """The whole way at real size, as SeLa's README loads it: a ResNet-50, and L of the run's images."""
    run, new = tmp_path / "run", tmp_path / "new.pth"
    options = "--arch resnet50 --width 1 --stem imagenet --heads 2 --relabellings 1 --precision float32"
    options = f"{options} --data shapes:16 --batch-size 8".split()
    assert run_here(sela, *TINY, *options, "--out", run) == 0
    assert command(run, "--to", "model", "--head", 1, "--out", new) == 0
    saved = torch.load(new, weights_only=True)
    network = torchvision.models.resnet50(num_classes=5)
    network.load_state_dict(saved["state_dict"], strict=True)
    model, _ = weights.load_model(run)
    with torch.no_grad():
        assert torch.equal(network.eval()(images()), model.eval()(images())[1])
    assert saved["L"].shape == (2, 16) and saved["L"].dtype == torch.int64
    assert torch.equal(saved["L"].int(), checkpoint.load(run / "checkpoint.pt")["meter"]["assignments"])


def detectron2_names():
    names = ["stem.conv1"]
    for stage, depth in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        names += [f"res{stage}.0.shortcut"]
        names += [f"res{stage}.{i}.conv{c}" for i in range(depth) for c in (1, 2, 3)]
    parts = ("weight", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var")
    return {f"{name}.{part}" for name in names for part in parts}


def test_detectron2(tmp_path, capsys):
    saved, expected, _ = swav_released()
    new = tmp_path / "new.pkl"
    assert command(put(tmp_path, saved), "--to", "detectron2", "--out", new) == 0
    out = capsys.readouterr().out
    assert "MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]" in out
    for words in ("DEPTH 50", "STRIDE_IN_1X1 False", "STEM_OUT_CHANNELS 8", "WIDTH_PER_GROUP 8",
                  "RES2_OUT_CHANNELS 32"):
        assert words in out
    content = pickle.loads(new.read_bytes())
    assert content["model"].keys() == detectron2_names() and len(content["model"]) == 265
    assert content["matching_heuristics"] is True
    assert all(type(array).__module__ == "numpy" and array.dtype == "float32"
               for array in content["model"].values())
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        weights.load_backbone(new)
    trunk, info = weights.load_backbone(new, trust_pickle=True)
    assert torch.equal(trunk.eval()(images()), expected(images())) and info["method"] == "detectron2"
    info, small = {**info, "arch": "resnet18"}, thin(resnet18)
    export.export_detectron2(new, small, info)
    assert "RES2_OUT_CHANNELS 8" in export.detectron2_options(info)
    trunk, info = weights.load_backbone(new, trust_pickle=True)
    assert info["arch"] == "resnet18" and torch.equal(trunk.eval()(images()), small(images()))


def test_what_cannot_be_exported(tmp_path, capsys):
    trunk = randomised(resnet18()).state_dict()
    head = {**prefixed("projection_head.", mlp(512).state_dict()), "prototypes.weight": torch.ones(7, 6)}
    for name, saved in {"swav": swav_released()[0], "sobel": mmselfsup_deepcluster()[0],
                        "small": randomised(resnet10(width=0.125, stem="small")).state_dict(),
                        "headless": prefixed("module.", trunk), "projected": {**trunk, **head}}.items():
        put(tmp_path, saved, name)
    sela18(tmp_path)
    new, nowhere = tmp_path / "new.pt", tmp_path / "no" / "new.pt"
    for name, options, code, words in (
        ("sobel", ("--to", "model"), 4, "torchvision has no resnet50 x0.125 with Sobel, imagenet stem"),
        ("sobel", ("--to", "detectron2"), 4, "detectron2 has no resnet50 x0.125 with Sobel"),
        ("small", ("--to", "detectron2"), 4, "detectron2 has no resnet10 x0.125, small stem"),
        ("headless", ("--to", "model"), 4, "no heads"),
        ("projected", ("--to", "model"), 4, "its clusters are those of a projection (SwAV)"),
        ("sela18.pth", ("--to", "model", "--head", 3), 2, "--head 3: 0 to 2 are there"),
        ("sela18.pth", ("--to", "model", "--head", -1), 2, "--head -1: 0 to 2 are there"),
        ("swav", ("--to", "torchvision", "--out", ""), 2, "--out has an empty value"),
        ("swav", (), 2, "--to and --out go together, or --features and --out"),
        ("swav", ("--to", "torchvision", "--out", tmp_path / "swav"), 2, "is the file itself"),
        ("swav", ("--to", "torchvision", "--out", nowhere), 2, "cannot be written: No such file"),
        ("swav", ("--to", "onnx"), 2, "invalid choice"),
    ):
        assert command(tmp_path / name, "--out", new, *options) == code, (name, options)
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not new.exists(), error
    assert weights.load_backbone(tmp_path / "swav")[1]["method"] == "SwAV"  # it is what it was


def test_the_command_says_what_a_file_is(tmp_path):
    path = put(tmp_path, moco()[0])
    line = [sys.executable, "-m", "common.weights", path]
    run = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    digest = subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout.split()[0]
    for words in ("MoCo, resnet50 x0.125, imagenet stem", digest, "265 of 265 tensors", "256 features",
                  "projection  5", "none: there are no clusters in it",
                  "encoder_k (320), queue (1), queue_ptr (1)"):
        assert words in run.stdout


def test_the_command_on_other_files(tmp_path, capsys):
    path = put(tmp_path, mmselfsup_odc()[0])
    assert command(path, "--to", "torchvision", "--out", tmp_path / "new.pt") == 0
    out = capsys.readouterr().out
    assert "projection  12 -> 6" in out and "9 clusters" in out and "loss_weight (1), memory_bank (1)" in out
    assert "common.weights.load_backbone rebuilds it" in out
    assert run_here(sela, *TINY, "--heads", 2, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert command(tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "sela, resnet10 x0.125, small stem" in out
    assert "5 clusters, 5 clusters" in out and "labels      2 x 64" in out


def test_an_evaluation_takes_another_projects_file(tmp_path, capsys):
    options = "--data shapes:60 --size 32 --resize 32 --workers 0 --k 3".split()
    launch(eval_knn.main, eval_knn.arguments([str(put(tmp_path, vissl()[0])), *options]))
    out = capsys.readouterr().out
    assert "resnet50 x0.125, VISSL, 256 features of 32 px" in out
    assert json.loads(out.splitlines()[-1])["method"] == "VISSL"


HUB = """
import sys, torch
import common  # the project's own
root, here, *files = sys.argv[1:]
networks = [torch.hub.load(root, "resnet18", checkpoint=file, source="local") for file in files]
assert not any(network.training for network in networks)
assert common.__file__.startswith(here) and not any(name.startswith("common.") for name in sys.modules)
outputs = [network(torch.load("x.pt")).detach() for network in networks]
torch.save([outputs, [len(network.fc.state_dict()) for network in networks]], "y.pt")
"""


def test_hub_in_a_project_with_its_own_common(tmp_path):
    trunk, heads, path = sela18(tmp_path)
    project, run, fc = tmp_path / "project", tmp_path / "run", tmp_path / "fc.pt"
    (project / "common").mkdir(parents=True)
    (project / "common" / "__init__.py").write_text("")
    (project / "main.py").write_text(HUB)
    torch.save(images(), project / "x.pt")
    model, info = weights.load_model(path)
    run.mkdir()
    checkpoint.export_backbone(run / "backbone.pt", model.backbone, info)
    weights.export_model(fc, model, info, head=2)
    done = subprocess.run([sys.executable, "main.py", ROOT, project, run, fc], cwd=project, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    (features, scores), tensors = torch.load(project / "y.pt")
    torch.testing.assert_close(features, trunk(images()).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, heads[2](trunk(images())).detach(), rtol=0, atol=1e-5)
    assert tensors == [0, 2]


def test_hub_refuses_other_networks(tmp_path):
    info = {"arch": "resnet10", "width": 0.125, "stem": "small", "sobel": False}
    checkpoint.export_backbone(tmp_path / "backbone.pt", resnet10(width=0.125, stem="small"), info)
    put(tmp_path, resnet10(width=0.125).state_dict(), "plain.pt")
    flip_a_bit(put(tmp_path, resnet10().state_dict(), "flipped.pt"))
    spoilt = resnet18().state_dict()
    spoilt["layer2.0.conv1.weight"][3] = float("nan")
    put(tmp_path, spoilt, "spoilt.pt")
    put(tmp_path, holding_itself({"info": 5}), "odd.pt")
    put(tmp_path, [1], "list.pt")
    for file, words in (("backbone.pt", "is no resnet18 of torchvision: resnet10 x0.125, small stem"),
                        ("spoilt.pt", "layer2.0.conv1.weight is not finite"),
                        ("odd.pt", "is no resnet18 of torchvision: Missing key"),
                        ("list.pt", "is damaged, or holds no weights"),
                        ("plain.pt", "is no resnet18 of torchvision: Missing key"),
                        ("flipped.pt", "is damaged")):
        with pytest.raises(ValueError, match=rf"{file}:? {words}") as refusal:
            torch.hub.load(str(ROOT), "resnet18", checkpoint=tmp_path / file, source="local")
        assert "\n" not in str(refusal.value)


def test_safetensors(tmp_path, monkeypatch, capsys):
    trunk = thin()
    path = put(tmp_path, {"state_dict": trunk.state_dict()})
    out = tmp_path / "trunk.safetensors"
    monkeypatch.setitem(sys.modules, "safetensors", None)  # not installed
    assert command(path, "--to", "safetensors", "--out", out) == 2
    assert "--to safetensors needs: pip install safetensors" in capsys.readouterr().err and not out.exists()
    monkeypatch.undo()
    safetensors = pytest.importorskip("safetensors.torch")
    assert command(path, "--to", "safetensors", "--out", out) == 0
    tensors = safetensors.load_file(out)
    assert tensors.keys() == trunk.state_dict().keys()
    assert all(torch.equal(tensor, trunk.state_dict()[name]) for name, tensor in tensors.items())


# ---- features of any images


def test_features_of_images_without_labels(tmp_path, capsys):
    trunk = resnet10(width=0.125, stem="small")
    evaluations.export(tmp_path / "trunk.pt", trunk)
    photos = tmp_path / "photos"
    for i, name in enumerate(("a.png", "train/b.png", "c d.png")):
        (photos / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 24), (80 * i, 0, 40)).save(photos / name)
    (photos / "broken.png").write_bytes(b"no image")
    out = tmp_path / "features.npz"
    words = [tmp_path / "trunk.pt", "--features", photos, "--out", out]
    assert command(*words) == 0
    assert "features (4, 64); 1 images cannot be read and are NaN" in capsys.readouterr().out
    with np.load(out, allow_pickle=False) as file:
        found = dict(zip(file["paths"].tolist(), file["features"]))
        assert file["features"].dtype == np.float32 and json.loads(str(file["info"]))["arch"] == "resnet10"
    assert found.keys() == {"a.png", "train/b.png", "c d.png", "broken.png"}
    assert np.isnan(found["broken.png"]).all()
    info, device = evaluations.INFO, torch.device("cpu")
    rows, _ = features.extract(trunk, scan(photos), info["resize"], info["size"], device,
                               precision=autocast_dtype("auto", device))
    for path, row in zip(scan(photos).paths, rows):
        assert np.array_equal(found[path], row.float().numpy(), equal_nan=True)
    out.unlink()
    assert ranks(2, command, *words) == [0, 0]
    with np.load(out) as file:
        for path, row in zip(file["paths"].tolist(), file["features"]):
            np.testing.assert_allclose(row, found[path], rtol=1e-2, atol=1e-3)
    assert command(*words[:3]) == 2 and "go together" in capsys.readouterr().err
    assert command(*words, "--to", "torchvision") == 2
    assert command(*words[:-1], tmp_path / "missing/f.npz") == 2
    assert "cannot be written" in capsys.readouterr().err
