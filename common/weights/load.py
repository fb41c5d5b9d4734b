"""Reads trunks and models out of files, whoever wrote them: families.py knows the layouts."""

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
    """(trunk in eval mode, info) of a run directory, a backbone.pt, or the checkpoint of another project:
    families.py lists them, and released.py those that have a name, "released:swav_800ep".

    Every weight of the trunk must be in the file, of its shape, finite, and the other way round; else
    CheckpointError names some. Counters of batch norm may be missing. trust_pickle: run the code that an old
    file may hold; without it none ever is. arch: "package.module:function" makes the trunk, which no file may
    say.
    """
    return open_trunk(path, trust_pickle, arch)[:2]


def load_model(path, trust_pickle=False, arch=""):
    """(Model in eval mode, info) of a run directory, whose weights are those of its checkpoint.pt, or of any
    file that `load_backbone` reads.

    Where the method or the file has none, projection_head is None and heads are empty.
    """
    return open_model(path, trust_pickle, arch)[:2]


def load_trunk(path, run):
    """State dict of the trunk at path (see load_backbone), which must be of the arch, width, stem and input
    in a run's info."""
    trunk, info = load_backbone(path, arch=run["arch"] if OWN.fullmatch(run["arch"]) else "")
    for name in ("arch", "width", "stem", "sobel"):
        there, here = info.get(name, False), run.get(name, False)
        if there != here:
            raise CheckpointError(f"--init-from {path} has {name} {there}, this run has --{name} {here}")
    return trunk.state_dict()


def build_backbone(info, arch=""):
    """A trunk with random weights, of the architecture that info names, or of the user's own `arch`."""
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
    """The network that info names, in words."""
    width, sobel = info.get("width") or 1, " with Sobel" if info.get("sobel") else ""
    return f"{info['arch']} x{width:g}{sobel}, {info.get('stem')} stem"


def checksum(trunk):
    """SHA-256 of a network's tensors, by name: the same, whatever file they come from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(trunk.state_dict().items()):
        if not name.endswith("num_batches_tracked"):
            digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def open_trunk(path, trust_pickle=False, arch=""):
    """(trunk, info, families.Contents) of a run directory or a file. arch: as in `load_backbone`."""
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
            with torch.device("meta"):  # costs nothing, whatever size a file says
                _compare(build_backbone(info), contents.trunk, path, info)
            trunk = build_backbone(info)
        _fill(trunk, contents.trunk, path, info)
    return trunk.eval(), info, contents


def open_model(path, trust_pickle=False, arch=""):
    """(Model, info, families.Contents) of a run directory or a file. Raises HeadsDoNotFit."""
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
        relu = info["arch"] == "alexnet" or info["method"] == "deepcluster"  # of a ResNet they are above 0
        model = Model(backbone, projection, heads, relu=relu).eval()
        model.scores(torch.zeros(1, backbone.feature_dim))  # raises if they do not fit
        _check_finite(model, path, HeadsDoNotFit)
    return model, info, contents


def read(path, trust_pickle=False):
    """What a file holds. The one place that may run code which is in a file: with trust_pickle alone."""
    if not path.exists():
        meant = f", is released:{path} meant?" * (str(path) in released.RELEASED)
        raise CheckpointError(f"{path} does not exist{meant}")
    try:
        if trust_pickle and path.suffix == ".pkl":
            return pickle.loads(path.read_bytes())
        with open(path, "rb") as file, warnings.catch_warnings():
            if file.peek(4)[:4] == b"PK\3\4":  # a zip to torch; what older ones wrote has no checksums
                checkpoint.verified(file)
            warnings.simplefilter("ignore", UserWarning)  # of the protocol of a pickle that is refused
            encoding = {"encoding": "latin1"} if trust_pickle else {}  # Python 2 wrote some
            return torch.load(file, map_location="cpu", weights_only=not trust_pickle, **encoding)
    except Exception as error:  # zipfile and torch raise many kinds for what they refuse
        code = "a pickle" if path.suffix == ".pkl" else re.search(r"GLOBAL (\S+)|$", str(error))[1]
        if code and not trust_pickle:
            convert = f"python -m common.weights {path} --trust-pickle --to torchvision --out new.pt"
            raise CheckpointError(f"{path} cannot be loaded without running code that is in it ({code}): if "
                                  f"you trust its origin, convert it: {convert}") from None
        raise CheckpointError(f"{path} cannot be loaded: {reason(error)}") from None


def _fill(module, state, path, info):
    """Loads a state dict that has every tensor of the module, counters of batch norm apart, all finite, and
    no other."""
    _compare(module, state, path, info)
    module.load_state_dict({**module.state_dict(), **state})
    _check_finite(module, path)


def _check_finite(module, path, kind=CheckpointError):
    for name, tensor in module.state_dict().items():
        if spoilt := int((~tensor.isfinite()).sum()):
            raise kind(f"{path}: {name} is not finite in {spoilt} of {tensor.numel()} numbers")


def _check_bytes(parts, path):
    """Raises if dicts of tensors hold more bytes than their file: many numbers may share the same bytes."""
    held, size = sum(tensor.nbytes for part in parts for tensor in part.values()), path.stat().st_size
    if held > size:
        raise CheckpointError(f"{path}: its tensors have {held:,} bytes, the file itself has {size:,}")


def _compare(module, state, path, info):
    """Raises CheckpointError with some names unless a state dict has the module's tensors."""
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
