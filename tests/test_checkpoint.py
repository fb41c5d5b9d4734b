"""Checkpoints in and out: a synthetic file of every family, in the layout that its authors' code gives, and
every export."""

import argparse
import json
import os
import pickle
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import ROOT, ranks, run_here
from torch import nn

import deepcluster
import deepclusterv2
import odc
import sela
import selav2
import swav
from common import distributed, weights
from common.alexnet import AlexNet, alexnet
from common.engine import checkpoint
from common.engine.errors import CheckpointError
from common.engine.launch import launch
from common.resnet import resnet10, resnet18, resnet34, resnet50
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
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.1 if tensor.dim() < 2
                                                                           else tensor[0].numel() ** -0.5))
    return module.eval()


def images(side=40, count=3):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(9))


def linear(K, D, bias=True, seed=0):
    return randomised(nn.Linear(D, K, bias), seed)


def prefixed(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def under(layers):
    """{"0.weight": ...} of {"0": module}."""
    return {f"{place}.{name}": tensor for place, layer in layers.items()
            for name, tensor in layer.state_dict().items()}


def mlp(F_, hidden=12, D=6, norm=True, affine=True):
    layers = [nn.Linear(F_, hidden), nn.BatchNorm1d(hidden, affine=affine), nn.ReLU(), nn.Linear(hidden, D)]
    return randomised(nn.Sequential(*layers) if norm else nn.Sequential(*layers[:1], *layers[2:]), 5)


def cosines(prototypes):
    return lambda z: [F.linear(F.normalize(z), F.normalize(layer.weight)) for layer in prototypes]


def logits(heads):
    return lambda x: [head(x) for head in heads]


def trunk50(**options):
    return randomised(resnet50(width=0.125, **options))  # 256 features


def no_counters(state):
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}


SOBEL = {"0.weight": torch.full((1, 3, 1, 1), 1 / 3), "0.bias": torch.zeros(1), "1.weight": torch.tensor([[[[
    1.0, 0, -1], [2, 0, -2], [1, 0, -1]]], [[[1, 2, 1], [0, 0, 0], [-1, -2, -1]]]]), "1.bias": torch.zeros(2)}
MOMENTUM = {"state": {0: {"momentum_buffer": torch.zeros(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}


# ---- a file of each family: (what torch.load gives, trunk, scores of the trunk's features or None, family)


def swav_released():
    trunk, head, prototypes = trunk50(), mlp(256), linear(7, 6, bias=False)
    state = {**trunk.state_dict(), **prefixed("projection_head.", head.state_dict()),
             "prototypes.weight": prototypes.weight.detach()}
    return prefixed("module.", state), trunk, lambda x: cosines([prototypes])(head(x)), "SwAV"


def swav_training():
    saved, *rest = swav_released()
    return {"epoch": 3, "state_dict": saved, "optimizer": MOMENTUM,
            "amp": {"loss_scaler0": {"loss_scale": 2.0}}}, *rest


def swav_wide_head_without_norm():  # RN50w5
    trunk, head, prototypes = trunk50(), mlp(256, norm=False), linear(7, 6, bias=False)
    state = {**trunk.state_dict(), **prefixed("projection_head.", head.state_dict()),
             "prototypes.weight": prototypes.weight.detach()}
    assert "projection_head.2.weight" in state and "projection_head.1.weight" not in state
    return prefixed("module.", state), trunk, lambda x: cosines([prototypes])(head(x)), "SwAV"


def deepclusterv2_released():
    trunk, head, prototypes = trunk50(), mlp(256), [linear(7, 6, bias=False, seed=s) for s in range(3)]
    state = {**trunk.state_dict(), **prefixed("projection_head.", head.state_dict())}
    state.update({f"prototypes.prototypes{h}.weight": layer.weight.detach()
                  for h, layer in enumerate(prototypes)})
    return prefixed("module.",
                    state), trunk, lambda x: cosines(prototypes)(head(x)), "DeepCluster-v2 or SeLa-v2"


def vissl(prefix="_feature_blocks.", several=False):
    trunk, head, prototypes = trunk50(), mlp(256), [linear(7, 6, bias=False, seed=s) for s in range(2)]
    heads = prefixed("0.projection_head.", head.state_dict())
    heads.update({f"0.prototypes{h}.weight": layer.weight.detach() for h, layer in enumerate(prototypes)})
    model = {"trunk": prefixed(prefix, trunk.state_dict()), "heads": [heads] if several else heads}
    saved = {"phase_idx": 9, "iteration": 90, "loss": {}, "type": "consolidated",
             "classy_state_dict": {"base_model": {"model": model}}}
    return saved, trunk, lambda x: cosines(prototypes)(head(x)), "VISSL"


def vissl_extractor():
    return vissl("base_model._feature_blocks.", several=True)


def vissl_flat():
    trunk = trunk50()
    return {"model_state_dict": prefixed("_feature_blocks.", trunk.state_dict())}, trunk, None, "VISSL"


def openselfsup_sobel():
    trunk = trunk50(sobel=True)
    return {"state_dict": trunk.state_dict(), "author": "OpenSelfSup"}, trunk, None, "OpenSelfSup"


def mmselfsup_swav(head_name="head.loss.prototypes"):
    trunk, head, prototypes = trunk50(), mlp(256), linear(7, 6, bias=False)
    state = {**prefixed("backbone.", trunk.state_dict()),
             **prefixed("neck.projection_neck.", head.state_dict())}
    state.update(prefixed("neck.bn.", head[1].state_dict()))
    state[f"{head_name}.weight"] = prototypes.weight.detach()
    state["data_preprocessor.mean"] = torch.zeros(3, 1, 1)
    return {"meta": {"epoch": 200},
            "state_dict": state}, trunk, lambda x: cosines([prototypes])(head(x)), "MMSelfSup"


def mmselfsup_old_swav():
    return mmselfsup_swav("head.prototypes")


def mmselfsup_odc():
    trunk, head, classifier = trunk50(), mlp(256, affine=False), linear(9, 6)
    neck = under({"fc0": head[0], "bn0": head[1], "fc1": head[3]})
    assert "bn0.weight" not in neck
    state = {**prefixed("backbone.", trunk.state_dict()), **prefixed("neck.", neck),
             **prefixed("head.fc_cls.", classifier.state_dict())}
    state.update({"loss_weight": torch.ones(9), "memory_bank.centroids": torch.zeros(9, 6)})
    return {"meta": {}, "state_dict": state}, trunk, lambda x: [classifier(F.relu(head(x)))], "MMSelfSup"


def mmselfsup_deepcluster():
    trunk, classifier = trunk50(sobel=True), linear(9, 256)
    state = {**prefixed("backbone.sobel_layer.sobel.", SOBEL), **prefixed("backbone.", trunk.state_dict())}
    state.update(prefixed("head.fc_cls.", classifier.state_dict()), loss_weight=torch.ones(9))
    return {"meta": {}, "state_dict": state, "author": "MMSelfSup"}, trunk, logits([classifier]), "MMSelfSup"


def sela_released(labels="labels"):
    trunk, fc = trunk50(), linear(9, 256)
    state = {**trunk.state_dict(), **prefixed("fc.", fc.state_dict())}
    return {"state_dict": state, labels: torch.arange(20).view(2, 10)}, trunk, logits([fc]), "SeLa"


def sela_released_older():
    return sela_released("L")


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
    trunk, heads = randomised(PreactResNet50()), [linear(9, 2048, seed=h) for h in range(2)]
    state = {}
    for name, tensor in trunk.state_dict().items():
        stage, _, rest = name.partition(".")
        place = 0 if stage == "conv1" else int(stage[-1]) + 1
        state[f"features.{place}.{rest.replace('shortcut.', 'shortcut.0.')}"] = tensor
    assert len(
        state) == 293 and "features.5.0.shortcut.0.weight" in state and "features.2.2.bn1.running_mean" in state
    saved = {**state, **under({f"top_layer{h}": head for h, head in enumerate(heads)})}
    return saved, lambda x: preact_features(state, x), logits(heads), "SeLa"


def children(state):
    places = {"conv1": 0, "bn1": 1, "layer1": 4, "layer2": 5, "layer3": 6, "layer4": 7}
    return {f"{places[name.partition('.')[0]]}.{name.partition('.')[2]}": tensor
            for name, tensor in state.items()}


def sela_training(prefix="features.", heads=("top_layer0", "top_layer1")):
    trunk, layers = trunk50(), [linear(9, 256, seed=h) for h in range(len(heads))]
    state = {**prefixed(prefix, children(trunk.state_dict())), **under(dict(zip(heads, layers)))}
    return ({"epoch": 4, "arch": "resnetv1", "state_dict": state, "optimizer": MOMENTUM,
             "L": torch.zeros(2, 5)}, trunk, logits(layers), "SeLa")


def sela_training_parallel():
    return sela_training("features.module.", ("top_layer.0",))


def moco():
    trunk, fc = trunk50(), linear(5, 256)
    query = {**trunk.state_dict(), **prefixed("fc.", fc.state_dict())}
    key = {**randomised(resnet50(width=0.125), 1).state_dict(),
           **prefixed("fc.", linear(5, 256, seed=1).state_dict())}
    state = {**prefixed("module.encoder_q.", query), **prefixed("module.encoder_k.", key),
             "module.queue": torch.zeros(5, 8)}
    saved = {"epoch": 200, "arch": "resnet50", "state_dict": {**state, "module.queue_ptr": torch.zeros(1)},
             "optimizer": MOMENTUM}
    return saved, trunk, logits([]), "MoCo"


def mocov2():
    saved, trunk, scores, family = moco()
    for encoder in ("encoder_q", "encoder_k"):
        for name in ("weight", "bias"):
            saved["state_dict"][f"module.{encoder}.fc.2.{name}"] = saved["state_dict"].pop(
                f"module.{encoder}.fc.{name}")[:, None][:, 0]
        saved["state_dict"].update(prefixed(f"module.{encoder}.fc.0.", linear(256, 256).state_dict()))
    return saved, trunk, scores, family


def lightning(prefix="backbone."):
    trunk = trunk50()
    state = {**prefixed(prefix, trunk.state_dict()), "classifier.weight": torch.zeros(3, 256)}
    return {"state_dict": state, "pytorch-lightning_version": "2.1", "epoch": 1}, trunk, None, "Lightning"


def lightning_encoder():
    return lightning("encoder.")


def lightning_any_name():
    return lightning("student_network.resnet.")


def solo_learn():
    saved, trunk, *rest = lightning()
    saved["state_dict"].update(prefixed("momentum_backbone.",
                                        randomised(resnet50(width=0.125), 1).state_dict()))
    return saved, trunk, *rest


def lightly():
    saved, trunk, *_ = lightning()
    saved["state_dict"] = prefixed("backbone.", children(trunk.state_dict()))
    head, prototypes = mlp(256), linear(7, 6, bias=False)
    saved["state_dict"].update(prefixed("projection_head.layers.", head.state_dict()))
    saved["state_dict"]["prototypes.heads.0.weight"] = prototypes.weight.detach()
    return saved, trunk, lambda x: cosines([prototypes])(head(x)), "Lightning"


def compiled():
    trunk = trunk50()
    return prefixed("_orig_mod.", trunk.state_dict()), trunk, None, "torchvision"


def compiled_inside():
    trunk = trunk50()
    return {"model": prefixed("module.backbone._orig_mod.", trunk.state_dict())}, trunk, None, "torchvision"


def plain18():
    trunk = randomised(resnet18(width=0.125))
    return {**trunk.state_dict(),
            **prefixed("fc.", linear(4, 64).state_dict())}, trunk, logits([]), "torchvision"


def plain34():
    trunk = randomised(resnet34(width=0.125, stem="small"))
    return no_counters(trunk.state_dict()), trunk, logits([]), "torchvision"


FAMILIES = (*(swav_released, swav_training, swav_wide_head_without_norm, deepclusterv2_released, vissl,
              vissl_extractor, vissl_flat),
            *(openselfsup_sobel, mmselfsup_swav, mmselfsup_old_swav, mmselfsup_odc, mmselfsup_deepcluster,
              sela_released, sela_released_older),
            *(sela_preact, sela_training, sela_training_parallel, moco, mocov2, lightning, lightning_encoder,
              lightning_any_name, solo_learn, lightly), *(compiled, compiled_inside, plain18, plain34))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_file_of_every_family_gives_the_same_features_and_scores(tmp_path, family):
    saved, expected, scores, name = family()
    path = tmp_path / "file.pth"
    torch.save(saved, path)
    trunk, info = weights.load_backbone(path)
    x = images()
    with torch.no_grad():
        features = expected(x)
        assert features.std() > 0.01 and torch.equal(trunk.eval()(x), features)
        assert info["method"] == name and (info["resize"], info["size"]) == (256, 224)
        model, _ = weights.load_model(path)
        assert model.training
        found, wanted = model.eval()(x), scores(features) if scores else []
        assert len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted))
        # the round trip: one file with all that was found, which torchvision's names are in
        labels = saved.get("L", saved.get("labels"))
        checkpoint.export_backbone(tmp_path / "new.pt", model.backbone, info, model, labels)
        again, same = weights.load_model(tmp_path / "new.pt")
        assert same == info and all(torch.equal(a, b) for a, b in zip(again.eval()(x), wanted, strict=True))
        assert (again.projection_head is None) == (model.projection_head is None)
        assert torch.equal(weights.load_backbone(tmp_path / "new.pt")[0].eval()(x), features)


def test_a_projection_without_clusters(tmp_path):
    torch.save(moco()[0], tmp_path / "moco.pth")
    torch.save(mocov2()[0], tmp_path / "mocov2.pth")
    v1, v2 = (weights.load_model(tmp_path / name)[0].projection_head for name in ("moco.pth", "mocov2.pth"))
    assert [type(layer) for layer in v1] == [nn.Linear] and [type(layer) for layer in v2] == [
        nn.Linear, nn.ReLU, nn.Linear]
    assert torch.equal(v1[0].weight, linear(5, 256).weight)


@pytest.mark.parametrize("width", [2, 4, 5])
def test_wide_networks_by_their_shapes(width):
    with torch.device("meta"):  # without the gigabytes
        trunk = resnet50(width=width)
    contents = families.recognise(prefixed("module.", {**trunk.state_dict(),
                                                       "prototypes.weight": torch.zeros(3000, 128)}))
    assert (contents.info["arch"], contents.info["width"]) == ("resnet50", width) and len(contents.heads) == 1
    assert {n: t.shape for n, t in contents.trunk.items()} == {n: t.shape
                                                               for n, t in trunk.state_dict().items()}


def small_alexnet(info):
    """What build_backbone gives for an AlexNet, with few channels: the real one has 240 MB."""
    with torch.device("meta"):
        trunk = AlexNet((6, 8, 8, 8, 4), info["sobel"], last_relu=info["arch"] != "alexnet")
    trunk.classifier[1], trunk.classifier[4] = nn.Linear(144, 10, device="meta"), nn.Linear(10, 10,
                                                                                            device="meta")
    if info.get("convolutions_only"):
        trunk.classifier = nn.Identity()
    trunk.feature_dim = 144 if info.get("convolutions_only") else 10
    trunk.to_empty(device="cpu")
    if info["sobel"]:
        trunk.sobel.kernels.copy_(SOBEL["1.weight"])
    return randomised(trunk)


def alexnet_states(trunk, inside=""):
    state = no_counters(trunk.state_dict())
    return {name.replace("features.", f"features.{inside}"): tensor for name, tensor in state.items()}


def deepcluster_alexnet(sobel):
    trunk, top = small_alexnet({"arch": "alexnet", "sobel": sobel}), linear(9, 10)
    state = {**alexnet_states(trunk, "module."), **prefixed("top_layer.", top.state_dict()),
             **(prefixed("sobel.", SOBEL) if sobel else {})}
    saved = {"epoch": 500, "arch": "alexnet", "state_dict": state, "optimizer": MOMENTUM}
    return saved, trunk, lambda x: [top(F.relu(x))], dict(arch="alexnet", sobel=sobel, method="DeepCluster")


def sela_alexnet():
    trunk, heads = small_alexnet({"arch": "alexnet_sela",
                                  "sobel": False}), [linear(9, 10, seed=h) for h in range(12)]
    rotations = linear(4, 10)
    state = {**trunk.state_dict(),
             **under({f"top_layer{h}": head for h, head in enumerate((*heads[:10], rotations))})}
    return state, trunk, logits(heads[:10]), dict(arch="alexnet_sela", sobel=False, method="SeLa")


def vissl_alexnet():
    trunk = small_alexnet({"arch": "alexnet", "sobel": True, "convolutions_only": True})
    blocks = {0: (0, 0), 1: (0, 1), 4: (2, 0), 5: (2, 1), 8: (4, 0), 9: (4, 1), 11: (5, 0), 12: (5, 1),
              14: (6, 0), 15: (6, 1)}
    state = {}
    for name, tensor in trunk.state_dict().items():
        _, place, tail = name.split(".")
        state["_feature_blocks.{}.{}.".format(*blocks[int(place)]) + tail] = tensor
    info = dict(arch="alexnet", sobel=True, method="VISSL", convolutions_only=True)
    return {"model_state_dict": {**state, **prefixed("sobel.", SOBEL)}}, trunk, logits([]), info


@pytest.mark.parametrize("make", [lambda: deepcluster_alexnet(True), lambda: deepcluster_alexnet(False),
                                  sela_alexnet, vissl_alexnet])
def test_alexnets(tmp_path, monkeypatch, make):
    saved, expected, scores, facts = make()
    torch.save(saved, tmp_path / "checkpoint.pth.tar")
    monkeypatch.setattr(load, "build_backbone", small_alexnet)
    model, info = weights.load_model(tmp_path / "checkpoint.pth.tar")
    assert facts.items() <= info.items()
    with torch.no_grad():
        features = expected(images(224))
        assert torch.equal(model.eval().backbone(images(224)), features) and features.std() > 0
        # before or after the last ReLU
        assert (features.min() < 0) == (info["arch"] == "alexnet" and "convolutions_only" not in info)
        found = model(images(224))
        assert len(found) == len(scores(features)) and all(torch.equal(a, b)
                                                           for a, b in zip(found, scores(features)))


def test_the_names_and_shapes_of_real_alexnets():
    for kind, sobel, arch in (("deepcluster", True, "alexnet"), ("sela", False, "alexnet_sela"),
                              ("sela_small", False, "alexnet_sela_small")):
        with torch.device("meta"):
            state = alexnet(kind, sobel).state_dict()
        contents = families.recognise({**state, **({"top_layer.weight": torch.zeros(3, 4096)} if sobel
                                                   else {"top_layer0.weight": torch.zeros(3, 4096)})})
        assert contents.info["arch"] == arch and contents.trunk.keys() == state.keys()
    info = dict(arch="alexnet", sobel=True, convolutions_only=True)
    assert weights.build_backbone(info).feature_dim == 9216


def test_a_torchvision_resnet50_of_real_size(tmp_path):
    network = randomised(torchvision.models.resnet50())
    torch.save(network.state_dict(), tmp_path / "resnet50.pth")
    trunk, info = weights.load_backbone(tmp_path / "resnet50.pth")
    network.fc = nn.Identity()
    with torch.no_grad():
        assert torch.equal(trunk.eval()(images(64)), network(images(64)))
    assert len(trunk.state_dict()) == 318 and (info["arch"], info["width"], info["stem"]) == ("resnet50", 1,
                                                                                              "imagenet")


# ---- files that cannot be used


def without(*names):
    def change(state):
        return {key: tensor for key, tensor in state.items() if not any(name in key for name in names)}

    return change


def reshaped(name):
    return lambda state: {key: tensor[:1] if key == name else tensor for key, tensor in state.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without("layer3.2.bn2.weight"), "is no resnet50 x0.125, imagenet stem: 264 of 265 tensors fit; "
                                         "missing ['layer3.2.bn2.weight']"),
        (without("layer3.2.bn2.running_mean"),
         "264 of 265 tensors fit; missing ['layer3.2.bn2.running_mean']"),
        (without("layer4.0.conv1.weight"), "missing ['layer4.0.conv1.weight']"),
        (without("layer4.0.bn1.weight"), "missing ['layer4.0.bn1.weight']"),
        (without("layer3.", "layer4."), "is no checkpoint that is known"),
        (without("layer3.5"), "only ResNet-10, 18, 34 and 50 are known"),
        (without("module.conv1.weight"), "lacks conv1.weight"),
        (
            without("downsample"),
            "missing ['layer1.0.downsample.0.weight', 'layer1.0.downsample.1.bias', "
            "'layer1.0.downsample.1.running_mean']",
        ),
        (reshaped("module.layer2.1.conv2.weight"), "264 of 265 tensors fit; of another shape "
                                                   "['layer2.1.conv2.weight (1, 16, 3, 3)']"),
        (lambda state: {**state, "module.layer2.0.se.fc1.weight": torch.zeros(2)},
         "unknown ['layer2.0.se.fc1.weight']"),
        (lambda state: {**state, "module.conv2.weight": torch.zeros(2)}, "unknown ['conv2.weight']"),
        (lambda state: {**state, "module.conv1.weight": torch.zeros(8, 4, 7, 7)}, "4 channels"),
        (lambda state: {**state, "module.conv1.weight": torch.zeros(8)}, "no convolution"),
        (lambda state: {**state, "conv1.weight": torch.zeros(8, 3, 7, 7)}, "has conv1.weight twice"),
        (lambda state: {**prefixed("teacher.", state), **prefixed("student.", state)},
         "holds several trunks: student., teacher."),
        (lambda state: {key.replace("layer", "stage"): tensor for key, tensor in state.items()},
         "is no checkpoint that is known"),
        (lambda state: {"other.weight": torch.zeros(3)}, "is no checkpoint that is known: it holds "
                                                         "other.weight"),
        (lambda state: {}, "it holds no tensors"),
        (lambda state: {"type": "shard_list", "classy_state_dict": {}}, "sharded"),
        (lambda state: {"classy_state_dict": {}}, "is no checkpoint that is known (KeyError: 'base_model')"),
        (lambda state: {**state, "module.sobel.1.weight": SOBEL["1.weight"] + 1}, "other Sobel filters"),
        (lambda state: {f"features.{n}.weight": torch.zeros(64, 3, 3, 3) for n in (0, 3, 4, 7)},
         "VGG-16 is not built here"),
        (lambda state: {"stem.0.weight": torch.zeros(2), **without("module.conv1", "module.bn1")(state)},
         "it has ['stem.0.weight']"),
        (lambda state: {"format": 1, "method": "swav", "config": {}, "model": state}, "name the run's "
                                                                                      "directory"),
        (lambda state: [state], "it holds no names"),
    ],
)
def test_files_that_are_refused(tmp_path, change, words, capsys):
    torch.save(change(swav_released()[0]), tmp_path / "file.pth")
    for loader in (weights.load_backbone, weights.load_model):
        with pytest.raises(CheckpointError) as refusal:
            loader(tmp_path / "file.pth")
        assert words in str(refusal.value) and str(refusal.value).count("\n") == 0, refusal.value
    assert command(tmp_path / "file.pth") == 4
    assert capsys.readouterr().err == f"error: {refusal.value}\n"


def test_counters_may_be_missing(tmp_path):
    saved, expected, *_ = swav_released()
    torch.save(no_counters(saved), tmp_path / "file.pth")
    trunk, _ = weights.load_backbone(tmp_path / "file.pth")
    assert torch.equal(trunk.eval()(images()), expected(images()))


def test_heads_that_do_not_fit(tmp_path, capsys):
    saved = swav_released()[0]
    saved["module.prototypes.weight"] = torch.zeros(7, 5)
    torch.save(saved, tmp_path / "file.pth")
    weights.load_backbone(tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match="its heads do not fit its resnet50"):
        weights.load_model(tmp_path / "file.pth")
    new = tmp_path / "new.pt"
    tool.main(tool.arguments([str(tmp_path / "file.pth"), "--to", "torchvision", "--out", str(new)]))
    assert "they are left out" in capsys.readouterr().out and not len(weights.load_model(new)[0].heads)
    with pytest.raises(CheckpointError, match="do not fit"):
        tool.main(tool.arguments([str(tmp_path / "file.pth"), "--to", "model", "--out", str(new)]))


class Code:
    """An object whose unpickling runs a command."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("kind", ["new", "old", "pkl", "trailing.pkl"])
def test_a_pickle_with_code_executes_nothing(tmp_path, kind, capsys):
    path = tmp_path / f"file.{kind}"
    saved = {**swav_released()[0], "extra": Code(tmp_path / "executed")}
    if kind in ("new", "old"):
        torch.save(saved, path, _use_new_zipfile_serialization=kind == "new")
    else:
        path.write_bytes(pickle.dumps(saved))
    for loader in (weights.load_backbone, weights.load_model):
        with pytest.raises(CheckpointError,
                           match=r"cannot be loaded without running code that is in it .*--trust-pickle"):
            loader(path)
    assert command(path) == command(path, "--to", "torchvision", "--out", tmp_path / "new.pt") == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 2 and not (tmp_path / "executed").exists() and not (tmp_path
                                                                                    / "new.pt").exists()
    assert command(path, "--trust-pickle") == 0
    assert (tmp_path / "executed").exists()  # so the file would have done it


def test_an_old_pickle_is_converted_once(tmp_path, capsys):
    saved, expected, scores, _ = deepclusterv2_released()
    torch.save({"state_dict": saved, "args": argparse.Namespace(lr=1)}, tmp_path / "old.pth.tar",
               _use_new_zipfile_serialization=False)
    assert command(tmp_path / "old.pth.tar") == 4
    error = capsys.readouterr().err
    assert "(argparse.Namespace)" in error
    line = error[error.index("python -m common.weights") :].split()[3:]
    assert command(*line[:-1], tmp_path / "new.pt") == 0
    model, info = weights.load_model(tmp_path / "new.pt")
    assert all(torch.equal(a, b) for a, b in zip(model.eval()(images()), scores(expected(images())),
                                                 strict=True))
    assert info["method"] == "DeepCluster-v2 or SeLa-v2"


def test_files_that_are_none(tmp_path):
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    (tmp_path / "empty.pth").write_text("")
    torch.save(swav_released()[0], tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5000])
    for name, words in (*(("page.pth", "it is not what torch.save writes"), ("empty.pth", "it is empty"), (
        "cut.pth", "cannot be loaded: ")), *(("none.pth", "does not exist"), ("none.pkl", "does not exist"))):
        with pytest.raises(CheckpointError, match=words) as refusal:
            weights.load_backbone(tmp_path / name)
        assert "\n" not in str(refusal.value)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match="does not exist"):
            weights.load_backbone(tmp_path / "none.pkl", trust)
    with pytest.raises(CheckpointError, match=r"cannot be loaded: "):
        weights.load_backbone(tmp_path / "page.pth", trust_pickle=True)


# ---- our own runs

TINY = "--data shapes:64 --recipe shapes --width 0.125 --sizes 16 --prototypes 5 --batch-size 16 --workers 0 --max-steps 1".split()
HEAD = "--hidden 16 --dim 8".split()


@pytest.mark.parametrize(("method", "options"), [
    *((swav, HEAD), (deepclusterv2, [*HEAD, "--heads", 2]), (selav2, [*HEAD, "--heads", 2]), (odc, HEAD)),
    *((sela, ["--heads", 2]), (deepcluster, ["--pca-dim", 8]), (deepcluster, ["--pca-dim", 8, "--sobel"]))])
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
    assert [x.shape for x in found] == [x.shape for x in expected] and info["method"] == method.__name__
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert (model.projection_head is None) == (method in (sela, deepcluster))
    with torch.no_grad():  # ODC's ends with a ReLU
        assert model.projection_head is None or (model.projection_head(model.backbone(images(16))).min()
                                                 >= 0) == (method is odc)
    assert model.projection_head is None or (model.projection_head[1].weight is None) == (method is odc)
    (tmp_path / "checkpoint.pt").rename(tmp_path / "elsewhere.pt")
    weights.load_backbone(tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint.pt does not exist"):
        weights.load_model(tmp_path)
    with pytest.raises(CheckpointError, match="name the run's directory"):
        weights.load_model(tmp_path / "elsewhere.pt")
    assert not weights.load_model(tmp_path / "backbone.pt")[0].heads


def _load_on_every_rank(path):
    model, _ = distributed.from_main(weights.load_model, path)
    return [scores.detach() for scores in model.eval()(images())]


def test_two_ranks_get_the_model_that_one_has_read(tmp_path):
    saved, expected, scores, _ = deepclusterv2_released()
    torch.save(saved, tmp_path / "file.pth")
    for found in ranks(2, _load_on_every_rank, tmp_path / "file.pth"):
        for a, b in zip(found, scores(expected(images())), strict=True):
            torch.testing.assert_close(a, b)


def test_init_from_another_projects_file(tmp_path):
    saved = sela_released()[0]
    torch.save(saved, tmp_path / "file.pth")
    options = [*TINY, *HEAD, "--arch", "resnet50", "--stem", "imagenet", "--init-from", tmp_path / "file.pth",
               "--lr", 1e-12]
    # oneDNN's bfloat16 gradient of a strided convolution of a 1x1 map reads beyond it
    options += ["--precision", "float32"]
    assert run_here(swav, *options, "--out", tmp_path / "run") == 0
    trunk, _ = weights.load_backbone(tmp_path / "run")
    torch.testing.assert_close(trunk.layer4[2].conv3.weight.detach(),
                               saved["state_dict"]["layer4.2.conv3.weight"], rtol=1e-4, atol=1e-6)


def test_init_from_compares_with_what_the_run_says_of_its_trunk(tmp_path, monkeypatch):
    monkeypatch.setattr(load, "build_backbone", small_alexnet)
    torch.save(sela_alexnet()[0], tmp_path / "sela.pth")
    run = dict(arch="alexnet_sela", width=1.0, stem="imagenet", channels=3)
    assert "features.0.weight" in weights.load_trunk(tmp_path / "sela.pth", run)
    with pytest.raises(CheckpointError, match="has arch alexnet_sela, this run has --arch alexnet"):
        weights.load_trunk(tmp_path / "sela.pth", {**run, "arch": "alexnet"})


# ---- exports


def command(*arguments):
    """Runs python -m common.weights in this process; returns its exit code."""
    try:
        launch(tool.main, tool.arguments([str(a) for a in arguments]))
    except SystemExit as stop:
        return stop.code
    return 0


def sela18(tmp_path):
    trunk, heads = randomised(resnet18()), [linear(9, 512, seed=h) for h in range(3)]
    state = {**prefixed("features.", children(trunk.state_dict())),
             **under({f"top_layer{h}": head for h, head in enumerate(heads)})}
    torch.save({"state_dict": state, "L": torch.arange(30).view(3, 10)}, tmp_path / "sela18.pth")
    return trunk, heads, tmp_path / "sela18.pth"


def test_the_trunk_in_torchvision(tmp_path, capsys):
    trunk, heads, path = sela18(tmp_path)
    assert command(path, "--to", "torchvision", "--out", tmp_path / "new.pt") == 0
    assert "rebuilds" not in capsys.readouterr().out
    network = torchvision.models.resnet18()
    network.fc = nn.Identity()
    network.load_state_dict(torch.load(tmp_path / "new.pt", weights_only=True)["state_dict"], strict=True)
    assert torch.equal(network.eval()(images()), trunk(images()))
    model, _ = weights.load_model(tmp_path / "new.pt")
    assert all(torch.equal(a, b(trunk(images()))) for a, b in zip(model.eval()(images()), heads, strict=True))
    assert torch.equal(torch.load(tmp_path / "new.pt", weights_only=True)["L"], torch.arange(30).view(3, 10))


def test_a_model_in_torchvision(tmp_path):
    trunk, heads, path = sela18(tmp_path)
    assert command(path, "--to", "model", "--head", 1, "--out", tmp_path / "new.pth") == 0
    saved = torch.load(tmp_path / "new.pth", weights_only=True)
    network = torchvision.models.resnet18(num_classes=9)
    network.load_state_dict(saved["state_dict"], strict=True)
    assert torch.equal(network.eval()(images()),
                       heads[1](trunk(images()))) and torch.equal(saved["L"], torch.arange(30).view(3, 10))
    model, _ = weights.load_model(tmp_path / "new.pth")
    assert [torch.equal(x, heads[1](trunk(images()))) for x in model.eval()(images())] == [True]


def test_a_resnet50_model_of_a_run_in_torchvision(tmp_path):
    """The whole way at real size, as SeLa's README loads it: resnet50(num_classes=K), and L of the run's
    images."""
    options = ["--arch", "resnet50", "--width", 1, "--stem", "imagenet", "--heads", 2, "--relabellings", 1,
               "--precision", "float32"]
    assert run_here(sela, *TINY, *options, "--data", "shapes:16", "--batch-size", 8, "--out",
                    tmp_path / "run") == 0
    assert command(tmp_path / "run", "--to", "model", "--head", 1, "--out", tmp_path / "new.pth") == 0
    saved = torch.load(tmp_path / "new.pth", weights_only=True)
    network = torchvision.models.resnet50(num_classes=5)
    network.load_state_dict(saved["state_dict"], strict=True)
    model, _ = weights.load_model(tmp_path / "run")
    with torch.no_grad():
        assert torch.equal(network.eval()(images()), model.eval()(images())[1])
    assert saved["L"].shape == (2, 16) and saved["L"].dtype == torch.int64
    assert torch.equal(saved["L"].int(),
                       checkpoint.load(tmp_path / "run" / "checkpoint.pt")["meter"]["assignments"])


def detectron2_names():
    names = ["stem.conv1"]
    for stage, depth in zip((2, 3, 4, 5), (3, 4, 6, 3)):
        names += [f"res{stage}.{i}.conv{c}" for i in range(depth) for c in (1, 2,
                                                                            3)] + [f"res{stage}.0.shortcut"]
    return {f"{name}.weight" for name in names} | {
        f"{name}.norm.{part}" for name in names for part in ("weight", "bias", "running_mean", "running_var")}


def test_detectron2(tmp_path, capsys):
    saved, expected, *_ = swav_released()
    torch.save(saved, tmp_path / "file.pth")
    assert command(tmp_path / "file.pth", "--to", "detectron2", "--out", tmp_path / "new.pkl") == 0
    out = capsys.readouterr().out
    assert "MODEL.PIXEL_MEAN [123.675,116.28,103.53] MODEL.PIXEL_STD [58.395,57.12,57.375]" in out and "STRIDE_IN_1X1 False" in out
    assert "DEPTH 50" in out and "STEM_OUT_CHANNELS 8" in out and "WIDTH_PER_GROUP 8" in out and "RES2_OUT_CHANNELS 32" in out
    content = pickle.loads((tmp_path / "new.pkl").read_bytes())
    assert content["model"].keys() == detectron2_names() and len(
        content["model"]) == 265 and content["matching_heuristics"] is True
    assert all(type(array).__module__ == "numpy" and array.dtype == "float32"
               for array in content["model"].values())
    with pytest.raises(CheckpointError, match="--trust-pickle"):
        weights.load_backbone(tmp_path / "new.pkl")
    trunk, info = weights.load_backbone(tmp_path / "new.pkl", trust_pickle=True)
    assert torch.equal(trunk.eval()(images()), expected(images())) and info["method"] == "detectron2"
    export.export_detectron2(tmp_path / "new.pkl", randomised(resnet18(width=0.125)),
                             {**info, "arch": "resnet18"})
    assert "RES2_OUT_CHANNELS 8" in export.detectron2_options({**info, "arch": "resnet18"})
    trunk, info = weights.load_backbone(tmp_path / "new.pkl", trust_pickle=True)
    assert info["arch"] == "resnet18" and torch.equal(trunk.eval()(images()),
                                                      randomised(resnet18(width=0.125))(images()))


def test_what_cannot_be_exported(tmp_path, capsys):
    torch.save(swav_released()[0], tmp_path / "swav")
    torch.save(mmselfsup_deepcluster()[0], tmp_path / "sobel")
    torch.save(randomised(resnet10(width=0.125, stem="small")).state_dict(), tmp_path / "small")
    sela18(tmp_path)
    trunk = randomised(resnet18())
    torch.save(prefixed("module.", trunk.state_dict()), tmp_path / "headless")
    state = {**trunk.state_dict(), **prefixed("projection_head.", mlp(512).state_dict()),
             "prototypes.weight": torch.ones(7, 6)}
    torch.save(prefixed("module.", state), tmp_path / "projected")
    for arguments, code, words in (
        (("sobel", "--to", "model"), 4, "torchvision has no resnet50 x0.125 with Sobel, imagenet stem"),
        (("sobel", "--to", "detectron2"), 4, "detectron2 has no resnet50 x0.125 with Sobel"),
        (("small", "--to", "detectron2"), 4, "detectron2 has no resnet10 x0.125, small stem"),
        (("headless", "--to", "model"), 4, "no heads"),
        (("projected", "--to", "model"), 4, "its clusters are those of a projection (SwAV)"),
        (("sela18.pth", "--to", "model", "--head", 3), 2, "--head 3: 0 to 2 are there"),
        (("sela18.pth", "--to", "model", "--head", -1), 2, "--head -1: 0 to 2 are there"),
    ):
        name, *options = arguments
        assert command(tmp_path / name, *options, "--out", tmp_path / "new.pt") == code, arguments
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1 and not (tmp_path / "new.pt").exists(), error
    for options, words in (((tmp_path / "swav", "--to", "torchvision"), "--to and --out go together"), (
        (tmp_path / "swav", "--out", tmp_path / "new.pt"), "--to and --out go together"), (
            (tmp_path / "swav", "--to", "torchvision", "--out", tmp_path / "swav"), "is the file itself"),
                           ((tmp_path / "swav", "--to", "torchvision", "--out", tmp_path / "no" / "new.pt"),
                            "cannot be written: No such file"), ((tmp_path / "swav", "--to", "onnx", "--out",
                                                                  tmp_path / "new.pt"), "invalid choice")):
        assert command(*options) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1, error
    assert weights.load_backbone(tmp_path / "swav")[1]["method"] == "SwAV"  # it is what it was


def test_the_command_says_what_a_file_is(tmp_path):
    saved = moco()[0]
    torch.save(saved, tmp_path / "moco.pth.tar")
    torch.save(mmselfsup_odc()[0], tmp_path / "odc.pth")
    run = subprocess.run([sys.executable, "-m", "common.weights", tmp_path / "moco.pth.tar"], cwd=ROOT,
                         capture_output=True, text=True)
    assert run.returncode == 0 and not run.stderr, run.stderr
    out = run.stdout
    assert "MoCo, resnet50 x0.125, imagenet stem" in out and "265 of 265 tensors" in out and "256 features" in out
    assert "projection  5" in out and "none: there are no clusters in it" in out and "encoder_k (320), queue (1), queue_ptr (1)" in out
    digest = subprocess.run(["sha256sum", tmp_path / "moco.pth.tar"], capture_output=True,
                            text=True).stdout.split()[0]
    assert digest in out


def test_the_command_on_other_files(tmp_path, capsys):
    torch.save(mmselfsup_odc()[0], tmp_path / "odc.pth")
    assert command(tmp_path / "odc.pth", "--to", "torchvision", "--out", tmp_path / "new.pt") == 0
    out = capsys.readouterr().out
    assert "projection  12 -> 6" in out and "9 clusters" in out and "loss_weight (1), memory_bank (1)" in out
    assert "common.weights.load_backbone rebuilds it" in out
    assert run_here(sela, *TINY, "--heads", 2, "--out", tmp_path / "run") == 0
    capsys.readouterr()
    assert command(tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "sela, resnet10 x0.125, small stem" in out and "5 clusters, 5 clusters" in out and "labels      2 x 64" in out


def test_an_evaluation_takes_another_projects_file(tmp_path, capsys):
    import eval_knn

    torch.save(vissl()[0], tmp_path / "swav.torch")
    options = ["--data", "shapes:60", "--size", "32", "--resize", "32", "--workers", "0", "--k", "3"]
    launch(eval_knn.main, eval_knn.arguments([str(tmp_path / "swav.torch"), *options]))
    out = capsys.readouterr().out
    assert "resnet50 x0.125, VISSL, 256 features of 32 px" in out and json.loads(
        out.splitlines()[-1])["method"] == "VISSL"


HUB = """
import sys, torch
import common  # the project's own
root, here, *files = sys.argv[1:]
networks = [torch.hub.load(root, "resnet18", checkpoint=file, source="local").eval() for file in files]
assert common.__file__.startswith(here) and not any(name.startswith("common.") for name in sys.modules)
torch.save([[network(torch.load("x.pt")).detach() for network in networks], [len(network.fc.state_dict()) for network in networks]], "y.pt")
"""


def test_hub_in_a_project_with_its_own_common(tmp_path):
    trunk, heads, path = sela18(tmp_path)
    project = tmp_path / "project"
    (project / "common").mkdir(parents=True)
    (project / "common" / "__init__.py").write_text("")
    (project / "main.py").write_text(HUB)
    torch.save(images(), project / "x.pt")
    model, info = weights.load_model(path)
    (tmp_path / "run").mkdir()
    checkpoint.export_backbone(tmp_path / "run" / "backbone.pt", model.backbone, info)
    weights.export_model(tmp_path / "fc.pt", model, info, head=2)
    line = [sys.executable, "main.py", str(ROOT), str(project), str(tmp_path / "run"),
            str(tmp_path / "fc.pt")]
    run = subprocess.run(line, cwd=project, capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert run.returncode == 0, run.stderr
    (features, scores), tensors = torch.load(project / "y.pt")
    torch.testing.assert_close(features, trunk(images()).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(scores, heads[2](trunk(images())).detach(), rtol=0, atol=1e-5)
    assert tensors == [0, 2]


def test_hub_refuses_other_networks(tmp_path):
    info = {"arch": "resnet10", "width": 0.125, "stem": "small", "sobel": False}
    checkpoint.export_backbone(tmp_path / "backbone.pt", randomised(resnet10(width=0.125, stem="small")),
                               info)
    torch.save(resnet10(width=0.125).state_dict(), tmp_path / "plain.pt")
    for file, words in (("backbone.pt", "resnet10 x0.125, small stem"), ("plain.pt", "Missing key")):
        with pytest.raises(ValueError, match=rf"{file} is no resnet18 of torchvision: {words}"):
            torch.hub.load(str(ROOT), "resnet18", checkpoint=tmp_path / file, source="local")
