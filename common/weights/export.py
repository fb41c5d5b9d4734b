"""Writes trunks and models in the formats of other projects."""

import pickle
import re

import torch

from ..engine.checkpoint import cpu_state, write
from ..engine.errors import ArgumentError, CheckpointError
from ..engine.files import writing
from .load import describe

TO_DETECTRON2 = ((r"^(conv1|bn1)", r"stem.\1"), (r"^layer(\d)", lambda m: f"res{int(m[1]) + 1}"),
                 (r"bn(\d)", r"conv\1.norm"), (r"downsample\.0", "shortcut"),
                 (r"downsample\.1", "shortcut.norm"))


def export_model(path, model, info, head=0, labels=None):
    """Writes a Model for use with torchvision alone: {"state_dict", "info", "L"}, with a head as `fc`. Its
    clusters must be linear in its trunk's features.

        saved = torch.load(path, weights_only=True)
        network = torchvision.models.resnet50(num_classes=K)
        network.load_state_dict(saved["state_dict"])  # network(images).argmax(1) is the cluster

    labels (H, N): the clusters of the training images, written as `L`. Raises CheckpointError if torchvision
    has no such network, or if the clusters are not linear; ArgumentError if there is no such head.
    """
    if not torchvision_has(info):
        raise CheckpointError(f"torchvision has no {describe(info)}")
    if not model.heads:
        raise CheckpointError("it has no heads: there are no clusters to be `fc`")
    if model.projection_head is not None:
        raise CheckpointError(f"its clusters are those of a projection ({info['method']}): only SeLa's and "
                              f"DeepCluster's can be `fc`")
    if not 0 <= head < len(model.heads):
        raise ArgumentError(f"--head {head}: 0 to {len(model.heads) - 1} are there")
    fc = cpu_state(model.heads[head])
    fc.setdefault("bias", torch.zeros(len(fc["weight"])))
    state = {**cpu_state(model.backbone), **{f"fc.{name}": tensor for name, tensor in fc.items()}}
    write(path, {"state_dict": state, "info": info, **({} if labels is None else {"L": labels})})


def export_safetensors(path, backbone, info):
    """Writes a trunk as safetensors, with torchvision's names, and info as text. Needs that package."""
    try:
        import safetensors.torch
    except ImportError:
        raise ArgumentError("--to safetensors needs: pip install safetensors") from None
    tensors = {name: tensor.contiguous() for name, tensor in cpu_state(backbone).items()}
    with writing(path) as file:
        file.write(safetensors.torch.save(tensors, {name: str(value) for name, value in info.items()}))


def export_detectron2(path, backbone, info):
    """Writes a ResNet trunk as a .pkl for detectron2's MODEL.WEIGHTS. detectron2 also needs the options of
    `detectron2_options`. Raises CheckpointError if it has no such network."""
    if not _is_usual(info):
        raise CheckpointError(f"detectron2 has no {describe(info)}")
    state = {}
    for name, tensor in cpu_state(backbone).items():
        if not name.endswith("num_batches_tracked"):
            for pattern, new in TO_DETECTRON2:
                name = re.sub(pattern, new, name)
            state[name] = tensor.numpy()
    with writing(path, sync=True) as file:
        pickle.dump({"model": state, "__author__": info["method"], "matching_heuristics": True}, file)


def detectron2_options(info):
    """Returns the options with which detectron2 must load an exported trunk, as text."""
    stem = int(64 * info["width"])
    mean, std = (str([round(255 * x, 3) for x in info[key]]).replace(" ", "") for key in ("mean", "std"))
    return (f"INPUT.FORMAT RGB MODEL.PIXEL_MEAN {mean} MODEL.PIXEL_STD {std} "
            f"MODEL.RESNETS.DEPTH {info['arch'].removeprefix('resnet')} MODEL.RESNETS.STRIDE_IN_1X1 False "
            f"MODEL.RESNETS.STEM_OUT_CHANNELS {stem} MODEL.RESNETS.WIDTH_PER_GROUP {stem} "
            f"MODEL.RESNETS.RES2_OUT_CHANNELS {4 * stem if info['arch'] == 'resnet50' else stem}")


def torchvision_has(info):
    return _is_usual(info) and info["width"] == 1


def _is_usual(info):
    """Tells whether other projects have this ResNet, of any width, too."""
    usual = info["arch"] in ("resnet18", "resnet34", "resnet50") and info["stem"] == "imagenet"
    return usual and not info.get("sobel")
