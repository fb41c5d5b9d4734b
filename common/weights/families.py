"""Recognises by its keys which project wrote a checkpoint, and renames its tensors to the names used here.

    family                        trunk                             projection, heads
    SwAV, DeepCluster-v2,         module.conv1 ..                   projection_head.N, prototypes or
      SeLa-v2 (the authors')                                          prototypes.prototypesH
    VISSL                         classy_state_dict ..              heads: 0.projection_head.N, 0.prototypesH
                                    _feature_blocks.conv1
    OpenSelfSup, MMSelfSup        conv1 .., or backbone.conv1 ..    neck.projection_neck.N, neck.fc0;
                                                                      head.prototypes, head.fc_cls
    SeLa                          conv1 .., or features.N           fc or top_layerH, and labels or L
    DeepCluster                   features.module.N, classifier.N   top_layer
    MoCo                          module.encoder_q.conv1 ..         encoder_q.fc
    detectron2                    stem.conv1, res2 ..
    torchvision, timm, Lightning, lightly, torch.compile: conv1 .. after any prefix, or children by number

A wrong guess does no harm: load.py loads strictly, and uses a file only if every tensor of the trunk fits.
"""

import re
from typing import NamedTuple

import torch

from .model import find_heads


class Refused(ValueError):
    """A file without a trunk that can be built here. The message continues after the file's name."""


class Contents(NamedTuple):
    """What a file holds, under the names used here."""

    info: dict  # method (for other projects: the family), arch, width, stem, channels, sobel
    trunk: dict  # {name: tensor}: all that may belong to the trunk
    projection: dict  # {place: {name: tensor}}, maybe empty
    heads: list  # of {"weight": (K, D), maybe "bias": (K,)}
    labels: object = None  # (H, N) clusters of the training images, or None
    unused: tuple = ()  # keys of all other tensors


# Layouts of a trunk, and the keys, after any prefix, that reveal them: several, since a file may lack one.
LAYOUTS = {
    "resnet": r"layer[34]\.0\.(conv|bn)1\.weight",
    "children": r"[67]\.0\.(conv|bn)1\.weight",
    "preact": r"[23]\.0\.(conv|bn)1\.weight",
    "detectron2": r"res[45]\.0\.conv1(\.norm)?\.weight",
    "blocks": r"_feature_blocks\.[06]\.[01]\.weight",
    "features": r"features\.[04]\.weight",
}
ALEXNETS = ("blocks", "features")
BLOCKS = {"0": 0, "2": 4, "4": 8, "5": 11, "6": 14}  # AlexNet's convolutions, {VISSL's index: the authors'}
RENAMED = {  # to the names of resnet.py, preact.py and alexnet.py
    "children": ((r"^0\.", "conv1."), (r"^1\.", "bn1."), (r"^([4-7])\.", lambda m: f"layer{int(m[1]) - 3}."),
                 ("shortcut", "downsample")),
    "preact": ((r"^0\.", "conv1."), (r"^([2-5])\.", lambda m: f"layer{int(m[1]) - 1}."),
               ("shortcut.0", "shortcut")),
    "detectron2": ((r"^stem\.", ""), (r"^res([2-5])", lambda m: f"layer{int(m[1]) - 1}"),
                   (r"conv(\d)\.norm", r"bn\1"), (r"shortcut\.norm", "downsample.1"),
                   ("shortcut", "downsample.0")),
    "blocks": ((r"^_feature_blocks\.([02456])\.([01])", lambda m: f"features.{BLOCKS[m[1]] + int(m[2])}"),),
}
TRUNK = re.compile(r"(conv|bn|norm|layer|stem|res|features|_feature_blocks|classifier)\d*\..*")
# Of several trunks, the one whose prefix consists of these is used: MoCo's encoder_q, not encoder_k.
PREFIXES = {"", "model", "net", "trunk", "base_model", "_feature_blocks", "backbone", "encoder", "encoder_q",
            "features"}
RESNETS = {  # (whether the blocks are bottlenecks, number of blocks in each layer)
    (False, 1, 1, 1, 1): "resnet10",
    (False, 2, 2, 2, 2): "resnet18",
    (False, 3, 4, 6, 3): "resnet34",
    (True, 3, 4, 6, 3): "resnet50",
}
SOBEL = {  # the fixed filters in front of a trunk with two input channels
    "0.weight": torch.full((1, 3, 1, 1), 1 / 3),
    "0.bias": torch.zeros(1),
    "1.weight": torch.tensor([[[[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]],
                              [[[1, 2, 1], [0, 0, 0], [-1, -2, -1]]]]),
    "1.bias": torch.zeros(2),
}


def _within(kinds, least, most):
    return lambda x: isinstance(x, kinds) and least <= x <= most


def _three(least, most):
    fine = _within((int, float), least, most)
    return lambda x: isinstance(x, (list, tuple)) and len(x) == 3 and all(map(fine, x))


INFO = {  # entries of a backbone.pt's info besides arch and stem: (needed, check)
    "method": ("a name", lambda x: isinstance(x, str)),
    "width": ("a number above 0", _within((int, float), 1 / 64, 1e6)),
    "channels": ("3", _within(int, 3, 3)),
    "mean": ("three numbers", _three(-1e3, 1e3)),
    "std": ("three numbers above 0", _three(1e-3, 1e3)),
    "resize": ("1 to 10,000 pixels", _within(int, 1, 10_000)),
    "size": ("1 to 10,000 pixels", _within(int, 1, 10_000)),
    "epoch": ("a number", _within((int, float), 0, 1e9)),
    "range": ("nothing or two numbers", lambda x: isinstance(x, (list, tuple)) and len(x) in (0, 2)
              and all(map(_within((int, float), -1e39, 1e39), x))),
    "exif": ("True or False", lambda x: isinstance(x, bool)),
}


def recognise(saved):
    """Returns the Contents of what torch.load gave. Raises Refused if no trunk is found. Values of unexpected
    types may raise any other error."""
    if not isinstance(saved, dict):
        raise Refused("is no checkpoint that is known: it holds no names")
    if {"format", "method", "config", "model"} <= saved.keys():
        raise Refused("is the checkpoint of a run: name the run's directory")
    labels = next((saved[key] for key in ("L", "labels") if isinstance(saved.get(key), torch.Tensor)), None)
    if isinstance(saved.get("info"), dict) and "arch" in saved["info"]:
        return _written_here(saved, labels)
    state = _unwrap(saved)
    layout, prefix = _find_trunk(state)
    trunk, rest = _split(state, layout, prefix, fc_is_head=labels is not None)
    _drop_sobel(rest)
    info = {"method": _family(saved, state, layout, prefix, labels), **_architecture(trunk, layout)}
    if info["arch"] == "alexnet" and info["method"] == "SeLa":
        info["arch"] = "alexnet_sela"
    projection, heads, used = find_heads(rest)
    return Contents(info, trunk, projection, heads, labels, tuple(sorted(rest.keys() - used)))


def _written_here(saved, labels):
    """Returns the Contents of what `export_backbone` or `export_model` wrote."""
    state, info = saved["state_dict"], saved["info"]
    for name, (needed, fine) in INFO.items():
        if name in info and not fine(info[name]):
            raise Refused(f"is no checkpoint that is known: its {name} is {_short(info[name])}, not {needed}")
    head = () if ":" in str(info["arch"]) else "fc."  # a trunk of the user's own may have layers of this name
    trunk = {name: tensor for name, tensor in state.items() if not name.startswith(head)}
    fc = {f"top_layer{name[2:]}": tensor for name, tensor in state.items() if name.startswith(head)}
    projection, heads, _ = find_heads({**saved.get("clusters", {}), **fc})
    return Contents(dict(info), trunk, projection, heads, labels)


def _short(*things):
    """Returns the first few of the things that a file holds, as one line of text."""
    return ", ".join(f"{str(thing)!r:.60}".strip("'") for thing in things[:5])


def _unwrap(saved):
    """Returns {name: tensor} without the dicts around it. Drops "module" and "_orig_mod", which DataParallel
    and torch.compile put into names."""
    if saved.get("type") == "shard_list":
        raise Refused("is one of VISSL's sharded checkpoints: consolidate it there first")
    state = saved
    if "classy_state_dict" in saved:
        parts = saved["classy_state_dict"]["base_model"]["model"]
        state = dict(parts["trunk"])
        for part in parts["heads"] if isinstance(parts["heads"], list) else [parts["heads"]]:
            state.update({f"heads.{key}": tensor for key, tensor in part.items()})
    wrappers = ("model_state_dict", "state_dict", "model", "net")
    while key := next((key for key in wrappers if isinstance(state.get(key), dict)), None):
        state = state.pop(key)  # pop: a dict may contain itself
    tensors = {}
    for key, tensor in state.items():
        if isinstance(key, str) and hasattr(tensor, "shape"):  # NumPy's too
            name = ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))
            if name in tensors:
                raise Refused(f"has {name} twice, once as {key}")
            tensors[name] = torch.as_tensor(tensor)
    if not tensors:
        others = _short(*state) + " and " * bool(state)
        raise Refused(f"is no checkpoint that is known: it holds {others}no tensors")
    return tensors


def _find_trunk(state):
    """Returns (layout, prefix) of the only trunk in a state. Raises Refused."""
    for layout, pattern in LAYOUTS.items():
        matches = [re.fullmatch(rf"(?P<prefix>(?:.*\.)?){pattern}", key) for key in state]
        found = sorted({match["prefix"] for match in matches if match})
        usual = [prefix for prefix in found if PREFIXES.issuperset(prefix.split("."))]
        if len(found) > 1 and len(usual) != 1:
            raise Refused(f"holds several trunks: {_short(*found)}")
        if found:
            return layout, (usual or found)[0]
    raise Refused(f"is no checkpoint that is known: it holds {_short(*sorted(state))}")


def _split(state, layout, prefix, fc_is_head):
    """Splits a state into the trunk and the rest: {name: tensor} each, under the names used here."""
    # MoCo's fc is a projection head, and one with labels beside it SeLa's head; any other is a classifier.
    fc = "projection_head" if "encoder_q." in prefix else "top_layer" if fc_is_head else "fc"
    trunk, rest = {}, {}
    for key, tensor in state.items():
        name = key.removeprefix(prefix)
        for pattern, new in RENAMED.get(layout, ()):
            name = re.sub(pattern, new, name)
        classifies = name.startswith("classifier") and layout not in ALEXNETS
        if not key.startswith(prefix):
            rest[key] = tensor
        elif TRUNK.fullmatch(name) and not classifies:
            trunk[name] = tensor
        else:
            rest[fc + name[2:] if name.startswith("fc.") else key] = tensor
    return trunk, rest


def _drop_sobel(rest):
    """Removes Sobel filters from a state. Raises Refused if they differ from those used here."""
    for key in list(rest):
        if match := re.search(r"(?:^|\.)sobel\.([01]\.(?:weight|bias))$", key):
            tensor, right = rest.pop(key), SOBEL[match[1]]
            if tensor.shape != right.shape or not torch.allclose(tensor.float(), right, atol=1e-4):
                raise Refused(f"has other Sobel filters (sobel.{match[1]}) than DeepCluster's")


def _family(saved, state, layout, prefix, labels):
    """Names the project of a file: for messages, `released.check` and the last ReLU of an AlexNet."""

    def has(pattern):
        return any(re.match(pattern, key) for key in state)

    if "classy_state_dict" in saved or layout == "blocks" or "_feature_blocks." in prefix:
        return "VISSL"
    if layout == "detectron2":
        return "detectron2"
    if "encoder_q." in prefix:
        return "MoCo"
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
    """Reads arch, width, stem, channels and sobel of a trunk off its shapes."""
    first = "features.0.weight" if layout in ALEXNETS else "conv1.weight"
    if first not in trunk:
        others = [name for name in sorted(trunk) if not name.startswith("layer")]
        raise Refused(f"lacks {first}; beside its blocks it has {others[:3]}")
    if trunk[first].dim() != 4:
        raise Refused(f"has {first} of shape {tuple(trunk[first].shape)}: no convolution")
    outputs, channels, side, _ = trunk[first].shape
    if channels not in (2, 3):
        raise Refused(f"has {first} for {channels} channels: images have 3, and their gradients (Sobel) 2")
    info = {"width": 1.0, "stem": "imagenet", "channels": 3, "sobel": channels == 2}
    if layout in ALEXNETS:
        if side != 11:
            raise Refused("holds no AlexNet with batch norm; VGG-16 is not built here")
        if layout == "blocks" and not any(name.startswith("classifier.") for name in trunk):
            info["convolutions_only"] = True
        return {**info, "arch": "alexnet_sela_small" if outputs == 64 else "alexnet"}
    if layout == "preact":
        return {**info, "arch": "preact50"}
    places = {tuple(name.split(".")[:2]) for name in trunk}
    blocks = [sum(layer == f"layer{i}" for layer, *_ in places) for i in (1, 2, 3, 4)]
    bottleneck = any(re.match(r"layer\d\.\d+\.conv3\.", name) for name in trunk)
    if (bottleneck, *blocks) not in RESNETS:
        raise Refused(f"holds {blocks} {'bottlenecks' if bottleneck else 'blocks'}: only ResNet-10, 18, 34 "
                      f"and 50 are known")
    return {**info, "arch": RESNETS[(bottleneck, *blocks)], "width": outputs / 64,
            "stem": "small" if side == 3 else "imagenet"}
