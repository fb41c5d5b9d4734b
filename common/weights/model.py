"""Defines a trunk with its cluster heads, and finds these heads among a file's tensors.

Imports only torch.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

WITHIN = r"(?:(?:model|net|neck|heads?|loss|\d+)\.)*"
PROJECTION = WITHIN + r"(?:projection_head|projection_neck)(?:\.layers)?(?:\.(?P<place>\d+))?\.(?P<name>\w+)"
NECK = r"neck\.(?P<place>fc0|bn0|fc1)\.(?P<name>\w+)"  # ODC's
PROTOTYPES = WITHIN + r"prototypes(?:\.prototypes|\.heads\.|\.)?(?P<head>\d*)\.(?P<name>weight|bias)"
CLASSIFIERS = WITHIN + r"(?:fc_cls|top_layer)(?P<head>\d*)(?:\.0)?\.(?P<name>weight|bias)"
NECK_PLACES = {"fc0": 0, "bn0": 1, "fc1": 4}


class Model(nn.Module):
    """A trunk with cluster heads: normalised images (B, 3, S, S) -> a list of H scores (B, K). The cluster is
    the arg-max of the scores.

    projection_head: a module or None. heads: H linear layers. A head without bias holds prototypes, and its
    scores are cosines. relu: apply one to the features, for a trunk that ends before its last ReLU.
    """

    def __init__(self, backbone, projection_head, heads, relu=False):
        super().__init__()
        self.backbone, self.projection_head, self.relu = backbone, projection_head, relu
        self.heads = nn.ModuleList(heads)

    def forward(self, images):
        return self.scores(self.backbone(images))

    def scores(self, features):
        """Returns the H scores (B, K) of the trunk's features (B, F)."""
        z = features if self.projection_head is None else self.projection_head(features)  # (B, D)
        with torch.autocast(z.device.type, enabled=False):  # full precision from here on
            z = F.relu(z.float()) if self.relu else z.float()
            unit = F.normalize(z)
            return [head(z) if head.bias is not None else F.linear(unit, F.normalize(head.weight))
                    for head in self.heads]


def find_heads(state):
    """Returns (projection, heads, keys used): projection {place: {name: tensor}} in the order of its layers,
    heads [{"weight", maybe "bias"}]."""
    projection, clusters, used = {}, {}, set()
    for key, tensor in state.items():
        if match := re.fullmatch(PROJECTION, key) or re.fullmatch(NECK, key):
            place = match["place"] or 0
            projection.setdefault(int(NECK_PLACES.get(place, place)), {})[match["name"]] = tensor
        elif match := re.fullmatch(PROTOTYPES, key) or re.fullmatch(CLASSIFIERS, key):
            clusters.setdefault(int(match["head"] or 0), {})[match["name"]] = tensor
        else:
            continue
        used.add(key)
    alike = len({len(head["weight"]) for head in clusters.values()}) == 1
    # A head of size 4 beside other sizes predicts SeLa's four rotations, not clusters.
    heads = [clusters[h] for h in sorted(clusters) if alike or len(clusters[h]["weight"]) != 4]
    return dict(sorted(projection.items())), heads, used


def build_heads(projection, heads):
    """Builds modules of what `find_heads` found: the projection head or None, and a list of linear layers.

    A projection head is its linear layers and batch norms in order, with a ReLU before each linear layer but
    the first. ODC's, recognised by heads that have a bias, also ends with a ReLU.
    """
    modules = []
    for tensors in projection.values():
        if "running_mean" in tensors:
            modules.append(nn.BatchNorm1d(len(tensors["running_mean"]), affine="weight" in tensors))
        else:
            modules += [nn.ReLU(inplace=True)] if modules else []
            modules.append(_linear(tensors))
        modules[-1].load_state_dict({**modules[-1].state_dict(), **tensors})
    if modules and any("bias" in tensors for tensors in heads):
        modules.append(nn.ReLU(inplace=True))
    layers = [_linear(tensors) for tensors in heads]
    for layer, tensors in zip(layers, heads):
        layer.load_state_dict(tensors)
    return nn.Sequential(*modules) if modules else None, layers


def _linear(tensors):
    return nn.Linear(*tensors["weight"].shape[::-1], bias="bias" in tensors)
