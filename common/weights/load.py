"""Loads trunks and models from the files of many projects. families.py knows their layouts."""

import hashlib
import pickle
import re
import warnings

import torch
from torch import nn

from .. import alexnet, resnet
from ..data import OWN
from ..engine import checkpoint
from ..engine.errors import ArgumentError, CheckpointError, border, reason
from ..multicrop import MEAN, STD
from ..sources import own
from . import families, preact, released
from .model import Model, build_heads, find_heads


class HeadsDoNotFit(CheckpointError):
    """A file whose trunk can be used, but not its heads."""


def load_backbone(path, trust_pickle=False, arch=""):
    """Loads (trunk in eval mode, info) from a run directory, a backbone.pt, or another project's checkpoint.
    families.py lists these projects, and released.py the files with a name, such as "released:swav_800ep".

    The file must have exactly the weights of the trunk, of the same shapes and finite; else CheckpointError
    names some that differ. Batch-norm counters may be missing. trust_pickle: allow running code that an old
    file may contain; otherwise none ever runs. arch: "package.module:function" that makes the trunk, which
    must be given here, since no file may name code.
    """
    return open_trunk(path, trust_pickle, arch)[:2]


def load_model(path, trust_pickle=False, arch=""):
    """Loads (Model in eval mode, info) from a run directory, with the weights of its checkpoint.pt, or from
    any file that `load_backbone` reads.

    If the method or the file has none, projection_head is None and heads is empty.
    """
    return open_model(path, trust_pickle, arch)[:2]


def load_trunk(path, run):
    """Returns the state dict of the trunk at path (see load_backbone). Raises CheckpointError if its arch,
    width, stem or sobel differs from a run's info."""
    trunk, info = load_backbone(path, arch=run["arch"] if OWN.fullmatch(run["arch"]) else "")
    for name in ("arch", "width", "stem", "sobel"):
        there, here = info.get(name, False), run.get(name, False)
        if there != here:
            raise CheckpointError(f"--init-from {path} has {name} {there}, this run has --{name} {here}")
    return trunk.state_dict()


def build_backbone(info, arch=""):
    """Builds a trunk with random weights, of the architecture in info, or by the user's function `arch`."""
    if arch:
        return own.trunk(arch, info.get("width", 1.0), info.get("stem", "imagenet"))
    arch, sobel = info["arch"], info.get("sobel", False)
    if arch == "preact50":
        return preact.PreactResNet50()
    if arch not in alexnet.ARCHITECTURES:
        return resnet.ARCHITECTURES[arch](info["width"], info["stem"], info.get("channels", 3), sobel)
    trunk = alexnet.alexnet(alexnet.ARCHITECTURES[arch], sobel)
    if info.get("convolutions_only"):  # VISSL's file: features are the last maps
        trunk.classifier, trunk.feature_dim = nn.Identity(), 256 * 6 * 6
    return trunk


def describe(info):
    """Returns the network in info in words."""
    width, sobel = info.get("width") or 1, " with Sobel" if info.get("sobel") else ""
    return f"{info['arch']} x{width:g}{sobel}, {info.get('stem')} stem"


def checksum(trunk):
    """Returns the SHA-256 of a network's named tensors, the same for any file that holds them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trunk.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_trunk(path, trust_pickle=False, arch=""):
    """Loads (trunk, info, families.Contents) from a run directory or a file. arch: see `load_backbone`."""
    if arch and not OWN.fullmatch(arch):
        raise ArgumentError(f"--arch {arch}: package.module:function of your own is needed, or no --arch")
    name, path = path, released.local(path)
    path = path / "backbone.pt" if path.is_dir() else path
    saved = read(path, trust_pickle)
    with border(CheckpointError, f"{path} is no checkpoint that is known"):
        try:
            contents = families.recognise(saved)
        except families.Refused as error:
            raise CheckpointError(f"{path} {error}") from None
        info = {"method": "unknown", "resize": 256, "size": 224, "mean": MEAN, "std": STD, **contents.info}
        released.check(name, path, info["method"])
        if arch:
            info["arch"] = arch
            trunk = build_backbone(info, arch)
        elif OWN.fullmatch(str(info["arch"])):
            typed = f"--arch {info['arch']:.200}"
            raise CheckpointError(f"{path} is of {typed}, which is code of its own: type {typed}")
        else:
            with torch.device("meta"):  # takes no memory, whatever size a file claims
                _compare(build_backbone(info), contents.trunk, path, info)
            trunk = build_backbone(info)
        _fill(trunk, contents.trunk, path, info)
    return trunk.eval(), info, contents


def open_model(path, trust_pickle=False, arch=""):
    """Loads (Model, info, families.Contents) from a run directory or a file. Raises HeadsDoNotFit."""
    backbone, info, contents = open_trunk(path, trust_pickle, arch)
    path = released.local(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
        with border(CheckpointError, f"{path} cannot be used"):
            saved = checkpoint.load(path, {"format": 1})
            trunk = {name.removeprefix("backbone."): tensor for name, tensor in saved["model"].items()
                     if name.startswith("backbone.")}
            _fill(backbone, trunk, path, info)
            projection, heads, _ = find_heads(saved["model"])
            labels = saved["meter"]["assignments"].long()
        contents = contents._replace(projection=projection, heads=heads, labels=labels)
    with border(HeadsDoNotFit, f"{path}: its heads do not fit its {info['arch']}"):
        _check_bytes([*contents.projection.values(), *contents.heads], path)
        projection, heads = build_heads(contents.projection, contents.heads)
        relu = info["arch"] == "alexnet" or info["method"] == "deepcluster"  # a ResNet's are never negative
        model = Model(backbone, projection, heads, relu=relu).eval()
        model.scores(torch.zeros(1, backbone.feature_dim))  # raises if they do not fit
        _check_finite(model, path, HeadsDoNotFit)
    return model, info, contents


def read(path, trust_pickle=False):
    """Returns what a file holds. Only here can code in a file run, and only with trust_pickle."""
    if not path.exists():
        meant = f", is released:{path} meant?" * (str(path) in released.RELEASED)
        raise CheckpointError(f"{path} does not exist{meant}")
    try:
        if trust_pickle and path.suffix == ".pkl":
            return pickle.loads(path.read_bytes())
        with open(path, "rb") as file, warnings.catch_warnings():
            if file.peek(4)[:4] == b"PK\3\4":  # torch's zip; its older format has no checksums
                checkpoint.verified(file)
            warnings.simplefilter("ignore", UserWarning)  # about the protocol of a refused pickle
            encoding = {"encoding": "latin1"} if trust_pickle else {}  # Python 2 wrote some files
            return torch.load(file, map_location="cpu", weights_only=not trust_pickle, **encoding)
    except Exception as error:  # zipfile and torch raise many kinds for what they refuse
        code = "a pickle" if path.suffix == ".pkl" else re.search(r"GLOBAL (\S+)|$", str(error))[1]
        if code and not trust_pickle:
            convert = f"python -m common.weights {path} --trust-pickle --to torchvision --out new.pt"
            raise CheckpointError(f"{path} cannot be loaded without running code that is in it ({code}): if "
                                  f"you trust its origin, convert it: {convert}") from None
        raise CheckpointError(f"{path} cannot be loaded: {reason(error)}") from None


def _fill(module, state, path, info):
    """Loads a state dict that has exactly the tensors of the module, all finite. Batch-norm counters may be
    missing. Raises CheckpointError."""
    _compare(module, state, path, info)
    module.load_state_dict({**module.state_dict(), **state})
    _check_finite(module, path)


def _check_finite(module, path, kind=CheckpointError):
    for name, tensor in module.state_dict().items():
        if spoilt := int((~tensor.isfinite()).sum()):
            raise kind(f"{path}: {name} is not finite in {spoilt} of {tensor.numel()} numbers")


def _check_bytes(parts, path):
    """Raises if tensors need more bytes than their file has: a tensor of stride 0 repeats one number."""
    held, size = sum(tensor.nbytes for part in parts for tensor in part.values()), path.stat().st_size
    if held > size:
        raise CheckpointError(f"{path}: its tensors have {held:,} bytes, the file itself has {size:,}")


def _compare(module, state, path, info):
    """Raises CheckpointError, which names some tensors, unless a state dict has those of the module."""
    own = module.state_dict()
    needed = {name for name in own if not name.endswith("num_batches_tracked")}
    missing, unknown = sorted(needed - state.keys()), sorted(state.keys() - own.keys())
    reshaped = [name for name in own if name in state and state[name].shape != own[name].shape]
    if missing or unknown or reshaped:
        fit = len(needed) - len(missing) - len(needed.intersection(reshaped))
        shapes = [f"{name} {tuple(state[name].shape)}" for name in reshaped]
        words = (("missing", missing), ("unknown", unknown), ("of another shape", shapes))
        reasons = ", ".join(f"{word} {names[:3]}{f' and {len(names) - 3} more' * (len(names) > 3)}"
                            for word, names in words if names)
        raise CheckpointError(f"{path} is no {describe(info)}: {fit} of {len(needed)} tensors fit; {reasons}")
    _check_bytes([state], path)
