"""What files hold, by their keys."""

import re

import torch.nn.functional as F
from torch import nn


def heads(state):
    """(projection, heads): projection {index: {name: tensor}} or None, heads a list of {"weight": (K, D), maybe "bias"}."""
    projection, found = {}, {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"projection_head\.(\d+)\.(\w+)", key):
            projection.setdefault(int(match[1]), {})[match[2]] = tensor
        elif match := re.fullmatch(r"prototypes(?:\.(\d+))?\.(weight|bias)", key):
            found.setdefault(int(match[1] or 0), {})[match[2]] = tensor
    return projection or None, [found[h] for h in sorted(found)]


def build_projection(layers, last_relu):
    """The projection head of {index: tensors}: linear layers and batch norms in this order, and a ReLU before each further linear layer."""
    modules = []
    for index in sorted(layers):
        tensors = layers[index]
        if "running_mean" in tensors:
            module = nn.BatchNorm1d(len(tensors["running_mean"]), affine="weight" in tensors)
        else:
            modules += [nn.ReLU(inplace=True)] if modules else []
            module = nn.Linear(*tensors["weight"].shape[::-1], bias="bias" in tensors)
        module.load_state_dict({**module.state_dict(), **tensors})
        modules.append(module)
    return nn.Sequential(*modules, *([nn.ReLU(inplace=True)] if last_relu else []))


def build_head(tensors):
    """A linear layer; without a bias its rows are prototypes, and get length 1."""
    head = nn.Linear(*tensors["weight"].shape[::-1], bias="bias" in tensors)
    head.load_state_dict(tensors if "bias" in tensors else {"weight": F.normalize(tensors["weight"].float())})
    return head
