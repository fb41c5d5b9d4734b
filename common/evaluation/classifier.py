"""Saves and loads classifiers, trained here or released: network(images) -> scores of the classes."""

import torch
import torch.nn.functional as F
from torch import nn

from ..engine import checkpoint
from ..engine.errors import CheckpointError, border
from ..weights import load, released
from .pooling import pooled

RELEASED = ("linear", "head.fc_cls", "head.fc")  # names of the layer in SwAV's and MMSelfSup's files


class Classifier(nn.Module):
    """A trunk and a linear layer on its features or pooled maps: (B, 3, s, s) -> scores (B, K), in eval mode.

    classes: the K names, or None. info: of the trunk, with the image sizes of the evaluation. about: how it
    was evaluated: views (crops per image), probabilities (whether these are averaged, or scores), numbered
    (whether the names are numbers of a list).
    """

    def __init__(self, trunk, layer, weight, bias, classes, info, about):
        super().__init__()
        self.trunk, self.layer, self.classes, self.info, self.about = trunk, layer, classes, info, about
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.eval().requires_grad_(False)

    def forward(self, x):
        if self.layer == "features":  # the trunk's own output
            maps = self.trunk(x).to(self.weight.dtype)
        else:
            maps = pooled(self.trunk, x, [self.layer])[self.layer].flatten(1)  # (B, F)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(maps, self.weight, self.bias)


class Averaged(nn.Module):
    """Averages a Classifier's scores, or probabilities, over `views` crops of each image, crop-major."""

    def __init__(self, network, views):
        super().__init__()
        self.network, self.views = network, views

    def forward(self, x):
        scores = self.network(x)
        scores = scores.softmax(1) if self.network.about["probabilities"] else scores
        return scores.unflatten(0, (self.views, -1)).mean(0)


def folded(probe, setting):
    """Folds the batch norm of eval_linear.py's Probe into one setting: (weight (K, F), bias (K,))."""
    weight, bias = probe.weight[:, setting].detach().double(), probe.bias[:, setting].detach().double()
    if probe.norm is not None:
        scale = (probe.norm.running_var.double() + probe.norm.eps).rsqrt()  # (C,)
        shift = -probe.norm.running_mean.double() * scale
        if hasattr(probe, "gain"):
            scale, shift = scale * probe.gain[setting], shift * probe.gain[setting] + probe.shift[setting]
        weight = weight.unflatten(1, (len(scale), -1))  # (K, C, h w)
        bias = bias + torch.einsum("kcp,c->k", weight, shift)
        weight = (weight * scale[:, None]).flatten(1)
    return weight.float().cpu(), bias.float().cpu()


def save(path, heads, classes, about, trunk=None, info=None):
    """Writes classifiers [{layer, weight, bias, top1}] of one trunk with the names of the classes.

    about: name and checksum (before any fine-tuning) of the trunk, preset, sizes, and the keys of
    Classifier.about. trunk: saved as well, under torchvision's names, if it was trained with them.
    """
    content = {"classifiers": heads, "classes": list(classes), "about": about}
    if trunk is not None:
        content |= {"state_dict": checkpoint.cpu_state(trunk), "info": info}
    checkpoint.write(path, content)


def load_classifier(path, trunk=None, layer=None, arch=""):
    """Loads a Classifier that eval_linear.py or eval_semisup.py saved, or that the authors released.

    trunk: the run or file that it was trained on, if the file itself has no trunk. layer: which classifier,
    of several (default: the best). arch: as in load.load_backbone.
    Raises CheckpointError if the file holds none, or if it was trained on another trunk.
    """
    path = released.local(path)
    saved = load.read(path)
    with border(CheckpointError, f"{path} is no classifier that is known"):
        whole, known = "info" in saved, "classifiers" in saved  # raises if it is no dict
        if trunk is None and not whole:
            raise CheckpointError(f"{path} is a classifier alone: the trunk that it belongs to is needed")
        backbone, info = load.load_backbone(path if trunk is None else trunk, arch=arch)
        about = {"views": 1, "probabilities": False, "numbered": False, **saved.get("about", {})}
        if not known:
            state = {name.removeprefix("module."): tensor for name, tensor in saved["state_dict"].items()}
            name = next(name for name in RELEASED if f"{name}.weight" in state)
            head = {"layer": "avgpool", "weight": state[f"{name}.weight"], "bias": state[f"{name}.bias"]}
            return fitting(path, backbone, head, None, info, about)
        if trunk is not None and about["sha256"] != load.checksum(backbone):
            raise CheckpointError(f"{path} was trained on {about['trunk']}, not on {trunk}, or the weights "
                                  "there have changed since")
        found = [head for head in saved["classifiers"] if layer in (None, head["layer"])]
        if not found:
            layers = ", ".join(head["layer"] for head in saved["classifiers"])
            raise CheckpointError(f"{path} has no classifier of {layer}: it has {layers}")
        backbone = load.load_backbone(path, arch=arch)[0] if whole else backbone
        info = {**info, "resize": about["resize"], "size": about["size"]}
        best = max(found, key=lambda head: head["top1"])
        return fitting(path, backbone, best, saved["classes"], info, about)


def fitting(path, trunk, head, classes, info, about):
    """Builds the Classifier. Raises CheckpointError unless its weights are finite and fit the trunk."""
    network = Classifier(trunk, head["layer"], head["weight"].float(), head["bias"].float(), classes, info,
                         about)
    if not all(parameter.isfinite().all() for parameter in (network.weight, network.bias)):
        raise CheckpointError(f"{path}: its weights are not finite")
    scores = network(torch.zeros(1, 3, info["size"], info["size"]))  # raises if they do not fit
    if classes is not None and len(classes) != scores.shape[1]:
        raise CheckpointError(f"{path} has {len(classes)} names for {scores.shape[1]} classes")
    return network
