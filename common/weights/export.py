"""Trunks and models as other projects read them."""

import pickle
import re

import torch

from ..engine.checkpoint import _weights, _write
from ..engine.errors import ArgumentError, CheckpointError
from ..engine.files import writing
from .load import _architecture


def export_model(path, model, info, head=0, labels=None):
    """Writes a Model whose clusters are linear in its trunk's features for torchvision alone: {"state_dict",
    "L"}, the head as `fc`.

        saved = torch.load(path, weights_only=True)
        network = torchvision.models.resnet50(num_classes=K)
        network.load_state_dict(saved["state_dict"])  # network(images).argmax(1) is the cluster

    labels (H, N): the clusters of the training images, which `L` becomes. Raises CheckpointError where
    torchvision has no such network.
    """
    if not torchvision_has(info):
        raise CheckpointError(f"torchvision has no {_architecture(info)}")
    if not model.heads:
        raise CheckpointError("it has no heads: there are no clusters to be `fc`")
    if model.projection_head is not None:
        raise CheckpointError(f"its clusters are those of a projection ({info['method']}): only SeLa's and "
                              f"DeepCluster's can be `fc`")
    if not 0 <= head < len(model.heads):
        raise ArgumentError(f"--head {head}: 0 to {len(model.heads) - 1} are there")
    fc = _weights(model.heads[head])
    fc.setdefault("bias", torch.zeros(len(fc["weight"])))
    state = {**_weights(model.backbone), **{f"fc.{name}": tensor for name, tensor in fc.items()}}
    _write(path, {"state_dict": state, "info": info, **({} if labels is None else {"L": labels})})


def export_detectron2(path, backbone, info):
    """Writes a ResNet's trunk as the .pkl that detectron2 takes as MODEL.WEIGHTS. `detectron2_options` is
    what it must be told."""
    if info["arch"] not in ("resnet18", "resnet34",
                            "resnet50") or info["stem"] != "imagenet" or info.get("sobel"):
        raise CheckpointError(f"detectron2 has no {_architecture(info)}")
    state = {}
    for name, tensor in _weights(backbone).items():
        if name.endswith("num_batches_tracked"):
            continue
        name = re.sub(r"^(conv1|bn1)", r"stem.\1", name)
        name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        state[name.replace("downsample.0", "shortcut").replace("downsample.1",
                                                               "shortcut.norm")] = tensor.numpy()
    with writing(path, sync=True) as file:
        pickle.dump({"model": state, "__author__": info["method"], "matching_heuristics": True}, file)


def detectron2_options(info):
    """The options of detectron2 that belong to an exported trunk."""
    stem, basic = int(64 * info["width"]), info["arch"] != "resnet50"
    mean, std = ([round(255 * x, 3) for x in info[key]] for key in ("mean", "std"))
    options = f"INPUT.FORMAT RGB MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std} MODEL.RESNETS.DEPTH {info['arch'][6:]}".replace(
        ", ", ",")
    options += f" MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.RESNETS.STEM_OUT_CHANNELS {stem}"
    return options + f" MODEL.RESNETS.WIDTH_PER_GROUP {stem} MODEL.RESNETS.RES2_OUT_CHANNELS {stem if basic else 4 * stem}"


def torchvision_has(info):
    return (info["arch"] in ("resnet18", "resnet34", "resnet50") and info["stem"] == "imagenet"
            and info["width"] == 1 and not info.get("sobel"))
