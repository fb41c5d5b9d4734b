"""Checkpoints of other projects: whose a file is, by its keys, and its tensors under the names used here.
Imports torch alone.

    family                  trunk                                        projection, heads
    SwAV, DeepCluster-v2,   module.conv1 ..                              projection_head.N, prototypes or
    SeLa-v2 (the authors')                                               prototypes.prototypesH
    VISSL                   classy_state_dict .. _feature_blocks.conv1   heads: 0.projection_head.N, 0.prototypesH
    OpenSelfSup, MMSelfSup  conv1 .., or backbone.conv1 ..               neck.projection_neck.N, neck.fc0; head.prototypes, head.fc_cls
    SeLa                    conv1 .., or features.N                      fc or top_layerH, and labels or L
    DeepCluster             features.module.N, classifier.N              top_layer
    MoCo                    module.encoder_q.conv1 ..                    encoder_q.fc
    detectron2              stem.conv1, res2 ..
    torchvision, timm, Lightning, lightly, torch.compile: conv1 .. after any prefix, or a ResNet's children by
    number

No guess stands: load.py loads strictly, so a file is used only if every tensor of the trunk has found its
place.
"""

import re
from typing import NamedTuple

import torch
from torch import nn


class Refused(ValueError):
    """A file without a trunk that can be built here. The message goes on after the file's name."""


class Contents(NamedTuple):
    """What a file holds, under the names used here."""

    info: dict  # method (of another project's file: its family), arch, width, stem, channels, sobel
    trunk: dict  # {name: tensor}: all that might be of the trunk
    projection: dict  # {place: {name: tensor}}, maybe empty
    heads: list  # of {"weight": (K, D), maybe "bias": (K,)}
    labels: object = None  # (H, N) clusters of the training images, or None
    unused: tuple = ()  # keys that are none of these


# Layouts of a trunk, and keys that show them after any prefix: several, so that a file which lacks one is
# recognised still.
LAYOUTS = {"resnet": r"layer[34]\.0\.(conv|bn)1\.weight", "children": r"[67]\.0\.(conv|bn)1\.weight",
           "preact": r"[23]\.0\.(conv|bn)1\.weight", "detectron2": r"res[45]\.0\.conv1(\.norm)?\.weight",
           "blocks": r"_feature_blocks\.[06]\.[01]\.weight", "features": r"features\.[04]\.weight"}
RENAMED = {  # to the names of resnet.py, preact.py and alexnet.py
    "children": ((r"^0\.", "conv1."), (r"^1\.", "bn1."), (r"^([4-7])\.", lambda m: f"layer{int(m[1]) - 3}."),
                 ("shortcut", "downsample")),
    "preact": ((r"^0\.", "conv1."), (r"^([2-5])\.", lambda m: f"layer{int(m[1]) - 1}."),
               ("shortcut.0", "shortcut")),
    "detectron2": (
        *((r"^stem\.", ""), (r"^res([2-5])", lambda m: f"layer{int(m[1]) - 1}"),
          (r"conv(\d)\.norm", r"bn\1")),
        *((r"shortcut\.norm", "downsample.1"), ("shortcut", "downsample.0")),
    ),
    "blocks": ((r"^_feature_blocks\.([02456])\.([01])", lambda m: f"features.{BLOCKS[m[1]] + int(m[2])}"),),
}
# of VISSL's AlexNet: its convolutions' places in the authors'
BLOCKS = {"0": 0, "2": 4, "4": 8, "5": 11, "6": 14}
TRUNK = re.compile(r"(conv|bn|norm|layer|stem|res|features|_feature_blocks|classifier)\d*\..*")
# Of two trunks in one file that one is meant whose prefix is made of these: MoCo's encoder_q, not its
# encoder_k.
PREFIXES = {"", "model", "net", "trunk", "base_model", "_feature_blocks", "backbone", "encoder", "encoder_q",
            "features"}
WITHIN = r"(?:(?:model|net|neck|heads?|loss|\d+)\.)*"
PROJECTION = WITHIN + r"(?:projection_head|projection_neck)(?:\.layers)?(?:\.(?P<place>\d+))?\.(?P<name>\w+)"
NECK = r"neck\.(?P<place>fc0|bn0|fc1)\.(?P<name>\w+)"  # of ODC
PROTOTYPES = WITHIN + r"prototypes(?:\.prototypes|\.heads\.|\.)?(?P<head>\d*)\.(?P<name>weight|bias)"
CLASSIFIERS = WITHIN + r"(?:fc_cls|top_layer)(?P<head>\d*)(?:\.0)?\.(?P<name>weight|bias)"
RESNETS = {  # (bottlenecks, blocks of each layer)
    **{(False, 1, 1, 1, 1): "resnet10", (False, 2, 2, 2, 2): "resnet18"},
    **{(False, 3, 4, 6, 3): "resnet34", (True, 3, 4, 6, 3): "resnet50"},
}


def recognise(saved):
    """Contents of what torch.load gave. Raises Refused where no trunk is found; on odd content also the
    errors of odd types."""
    if not isinstance(saved, dict):
        raise Refused("is no checkpoint that is known: it holds no names")
    if {"format", "method", "config", "model"} <= saved.keys():
        raise Refused("is the checkpoint of a run: name the run's directory")
    labels = next((saved[key] for key in ("L", "labels") if isinstance(saved.get(key), torch.Tensor)), None)
    if isinstance(saved.get("info"), dict) and "arch" in saved["info"]:  # written here
        clusters = {**saved.get("clusters", {}), **{
            f"top_layer.{key[3:]}": x for key, x in saved["state_dict"].items() if key[:3] == "fc."}}
        trunk = {key: tensor for key, tensor in saved["state_dict"].items() if key[:3] != "fc."}
        return Contents(dict(saved["info"]), trunk, *heads(clusters)[:2], labels)
    state = _unwrap(saved)
    layout, prefix = _find(state)
    trunk, rest = {}, {}
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        for pattern, new in RENAMED.get(layout, ()):
            name = re.sub(pattern, new, name)
        belongs = key.startswith(prefix) and TRUNK.fullmatch(name) and (layout in ("features", "blocks")
                                                                        or name[:10] != "classifier")
        if not belongs and name.startswith("fc.") and key.startswith(prefix):
            # MoCo's is a projection, one with labels beside it SeLa's; any other classifies, and not into
            # clusters
            name = name.replace("fc.", "projection_head." if "encoder_q." in prefix else "top_layer."
                                if labels is not None else "fc.", 1)
        elif not belongs:
            name = key
        (trunk if belongs else rest)[name] = tensor
    sobel = {name: rest.pop(name) for name in list(rest) if re.search(r"(^|\.)sobel\.[01]\.(weight|bias)$",
                                                                      name)}
    _check_sobel({".".join(name.split(".")[-2:]): tensor for name, tensor in sobel.items()})
    info = {"method": _family(saved, state, layout, prefix, labels), **_architecture(trunk, layout)}
    if info["arch"] == "alexnet" and info["method"] == "SeLa":
        info["arch"] = "alexnet_sela"
    projection, clusters, used = heads(rest)
    return Contents(info, trunk, projection, clusters, labels, tuple(sorted(rest.keys() - used)))


def _unwrap(saved):
    """{name: tensor} of what a file wraps its state in. "module" and "_orig_mod", which DataParallel and
    torch.compile put in, go."""
    if saved.get("type") == "shard_list":
        raise Refused("is one of VISSL's sharded checkpoints: consolidate it there first")
    state = saved
    if "classy_state_dict" in saved:
        parts = saved["classy_state_dict"]["base_model"]["model"]
        several = parts["heads"] if isinstance(parts["heads"], list) else [parts["heads"]]
        state = {**parts["trunk"],
                 **{f"heads.{key}": tensor for part in several for key, tensor in part.items()}}
    while inner := next((state[key] for key in ("model_state_dict", "state_dict", "model",
                                                "net") if isinstance(state.get(key), dict)), None):
        state = inner
    tensors = {}
    for key, tensor in state.items():
        if isinstance(key, str) and hasattr(tensor, "shape"):  # NumPy's too
            name = ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))
            if name in tensors:
                raise Refused(f"has {name} twice, once as {key}")
            tensors[name] = torch.as_tensor(tensor)
    return tensors


def _find(state):
    """(layout, prefix) of the one trunk in a state."""
    for layout, pattern in LAYOUTS.items():
        matches = [re.fullmatch(rf"(?P<prefix>(?:.*\.)?){pattern}", key) for key in state]
        found = sorted({match["prefix"] for match in matches if match})
        usual = [prefix for prefix in found if PREFIXES.issuperset(prefix.split("."))]
        if len(found) > 1 and len(usual) != 1:
            raise Refused(f"holds several trunks: {', '.join(found)}")
        if found:
            return layout, (usual or found)[0]
    raise Refused(f"is no checkpoint that is known: it holds {', '.join(sorted(state)[:3]) or 'no tensors'}")


def _family(saved, state, layout, prefix, labels):
    """Whose file it is. A name alone: nothing depends on it but the last ReLU of an AlexNet."""

    def has(pattern):
        return any(re.match(pattern, key) for key in state)

    if "classy_state_dict" in saved or layout == "blocks" or "_feature_blocks." in prefix:
        return "VISSL"
    if layout == "detectron2" or "encoder_q." in prefix:
        return "detectron2" if layout == "detectron2" else "MoCo"
    if saved.get("author") in ("OpenSelfSup", "MMSelfSup"):
        return saved["author"]
    if has(r"neck\.|head\.|backbone\.sobel_layer\."):
        return "MMSelfSup"
    if labels is not None or prefix == "features." or (layout == "features" and has(r"top_layer(\d|\.0)")):
        return "SeLa"
    if layout == "features":
        return "DeepCluster"
    if has(r"prototypes\.prototypes\d"):
        return "DeepCluster-v2 or SeLa-v2"
    if has(r"projection_head\.") and has(r"prototypes\.weight"):
        return "SwAV"
    return "Lightning" if "pytorch-lightning_version" in saved else "torchvision"


def _architecture(trunk, layout):
    """arch, width, stem, channels and sobel of a trunk, read off its shapes."""
    first = "features.0.weight" if layout in ("features", "blocks") else "conv1.weight"
    if first not in trunk:
        raise Refused(f"lacks {first}; beside its blocks it has "
                      f"{[name for name in sorted(trunk) if name[:5] != 'layer'][:3]}")
    if trunk[first].dim() != 4:
        raise Refused(f"has {first} of shape {tuple(trunk[first].shape)}: no convolution")
    outputs, channels, side, _ = trunk[first].shape
    if channels not in (2, 3):
        raise Refused(f"has {first} for {channels} channels: images have 3, and their gradients (Sobel) 2")
    info = {"width": 1.0, "stem": "imagenet", "channels": 3, "sobel": channels == 2}
    if layout in ("features", "blocks"):
        if side != 11:
            raise Refused("holds no AlexNet with batch norm; VGG-16 is not built here")
        if layout == "blocks" and not any(name.startswith("classifier.") for name in trunk):
            info["convolutions_only"] = True
        return {**info, "arch": "alexnet_sela_small" if outputs == 64 else "alexnet"}
    if layout == "preact":
        return {**info, "arch": "preact50"}
    blocks = [len({name.split(".")[1] for name in trunk if name.startswith(f"layer{i}.")}) for i in (1, 2, 3,
                                                                                                     4)]
    bottleneck = any(re.match(r"layer\d\.\d+\.conv3\.", name) for name in trunk)
    if (bottleneck, *blocks) not in RESNETS:
        raise Refused(f"holds {blocks} {'bottlenecks' if bottleneck else 'blocks'}: only ResNet-10, 18, 34 "
                      f"and 50 are known")
    return {**info, "arch": RESNETS[(bottleneck, *blocks)], "width": outputs / 64,
            "stem": "small" if side == 3 else "imagenet"}


def _check_sobel(filters):
    """Raises Refused unless the tensors are those of the Sobel filters that every trunk with two channels has
    in front."""
    kernels = torch.tensor([[[1.0, 0, -1], [2, 0, -2], [1, 0, -1]],
                            [[1, 2, 1], [0, 0, 0], [-1, -2, -1]]])[:, None]
    right = {"0.weight": torch.full((1, 3, 1, 1), 1 / 3), "0.bias": torch.zeros(1), "1.weight": kernels,
             "1.bias": torch.zeros(2)}
    for name, tensor in filters.items():
        if tensor.shape != right[name].shape or not torch.allclose(tensor.float(), right[name], atol=1e-4):
            raise Refused(f"has other Sobel filters (sobel.{name}) than DeepCluster's")


def heads(state):
    """(projection, heads, keys used): projection {place: {name: tensor}} in the order of its layers, heads
    [{"weight", maybe "bias"}]."""
    projection, clusters, used = {}, {}, set()
    for key, tensor in state.items():
        if match := re.fullmatch(PROJECTION, key) or re.fullmatch(NECK, key):
            place = {"fc0": 0, "bn0": 1, "fc1": 4, None: 0}.get(match["place"])
            projection.setdefault(int(match["place"]) if place is None else place, {})[match["name"]] = tensor
        elif match := re.fullmatch(PROTOTYPES, key) or re.fullmatch(CLASSIFIERS, key):
            clusters.setdefault(int(match["head"] or 0), {})[match["name"]] = tensor
        else:
            continue
        used.add(key)
    sizes = {len(head["weight"]) for head in clusters.values()}
    # SeLa's four rotations
    found = [clusters[h] for h in sorted(clusters) if len(sizes) == 1 or len(clusters[h]["weight"]) != 4]
    return dict(sorted(projection.items())), found, used


def build(projection, clusters):
    """Modules of what `heads` found: the projection head or None, and a list of linear layers.

    A projection is its linear layers and batch norms in order, with a ReLU before each further linear layer.
    ODC's, whose heads have a bias where those of prototypes have none, ends with one.
    """
    modules = []
    for tensors in projection.values():
        if "running_mean" in tensors:
            modules.append(nn.BatchNorm1d(len(tensors["running_mean"]), affine="weight" in tensors))
        else:
            modules += [nn.ReLU(inplace=True)] if modules else []
            modules.append(_linear(tensors))
        modules[-1].load_state_dict({**modules[-1].state_dict(), **tensors})
    modules += [nn.ReLU(inplace=True)] if modules and any("bias" in tensors for tensors in clusters) else []
    layers = [_linear(tensors) for tensors in clusters]
    for layer, tensors in zip(layers, clusters):
        layer.load_state_dict(tensors)
    return nn.Sequential(*modules) if modules else None, layers


def _linear(tensors):
    return nn.Linear(*tensors["weight"].shape[::-1], bias="bias" in tensors)
