"""Trunks and models out of files, whoever wrote them."""

import pickle
import re
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .. import alexnet, resnet
from ..engine.checkpoint import load
from ..engine.errors import CheckpointError
from ..multicrop import MEAN, STD
from . import families, preact


class HeadsDoNotFit(CheckpointError):
    """A file whose trunk can be used, but not its heads."""


def load_backbone(path, trust_pickle=False):
    """(trunk, info) of a run directory, a backbone.pt, or the checkpoint of another project: families.py
    lists them.

    Every weight of the trunk must be in the file, of its shape, and the other way round; else CheckpointError
    names some. Counters of batch norm may be missing. trust_pickle: run the code that an old file may hold;
    without it none ever is.
    """
    return _open(path, trust_pickle)[:2]


def _open(path, trust_pickle):
    """(trunk, info, families.Contents) of a file."""
    path = Path(path)
    path = path / "backbone.pt" if path.is_dir() else path
    saved = _read(path, trust_pickle)
    try:
        contents = families.recognise(saved)
        info = {"method": "unknown", "resize": 256, "size": 224, "mean": MEAN, "std": STD, **contents.info}
        trunk = build_backbone(info)
        _fill(trunk, contents.trunk, path, info)
    except families.Refused as error:
        raise CheckpointError(f"{path} {error}") from None
    except CheckpointError:
        raise
    # anything may be in a file
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} is no checkpoint that is known ({type(error).__name__}: "
                              f"{_first_line(error)})") from None
    return trunk, info, contents


def _read(path, trust_pickle):
    """What a file holds. The one place that may run code which is in a file: with trust_pickle alone."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    try:
        if trust_pickle and path.suffix == ".pkl":
            return pickle.loads(path.read_bytes())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of the protocol of a pickle that is refused
            encoding = {"encoding": "latin1"} if trust_pickle else {}  # Python 2 wrote some
            return torch.load(path, map_location="cpu", weights_only=not trust_pickle, **encoding)
    except Exception as error:  # torch raises several kinds for what it refuses
        code = "a pickle" if path.suffix == ".pkl" else re.search(r"GLOBAL (\S+)|$", str(error))[1]
        if code and not trust_pickle:
            convert = f"python -m common.weights {path} --trust-pickle --to torchvision --out new.pt"
            reason = f"without running code that is in it ({code}): if you trust its origin, convert it: {convert}"
            raise CheckpointError(f"{path} cannot be loaded {reason}") from None
        reason = "it is not what torch.save writes" if isinstance(
            error, pickle.UnpicklingError) else _first_line(error)
        raise CheckpointError(f"{path} cannot be loaded: {reason}") from None


def _first_line(error):
    return str(error).splitlines()[0] if str(error) else "it is empty"


def _fill(module, state, path, info):
    """Loads a state dict that has every tensor of the module, counters of batch norm apart, and no other."""
    own = module.state_dict()
    needed = [name for name in own if not name.endswith("num_batches_tracked")]
    missing = sorted(set(needed) - state.keys())
    unknown = sorted(state.keys() - own.keys())
    wrong = [f"{name} {tuple(state[name].shape)}" for name in own if name in state
             and state[name].shape != own[name].shape]
    if missing or unknown or wrong:
        fit = len(needed) - len(missing) - sum(name.partition(" ")[0] in needed for name in wrong)
        words = (("missing", missing), ("unknown", unknown), ("of another shape", wrong))
        reasons = ", ".join(f"{word} {names[:3]}{f' and {len(names) - 3} more' * (len(names) > 3)}"
                            for word, names in words if names)
        raise CheckpointError(f"{path} is no {_architecture(info)}: {fit} of {len(needed)} tensors fit; "
                              f"{reasons}")
    module.load_state_dict({**own, **state})


class Model(nn.Module):
    """A trunk with what clusters its features: images (B, 3, S, S), normalised, to H scores (B, K), whose
    arg-max is the cluster.

    projection_head: a module or None. heads: H linear layers; those without bias are prototypes, whose scores
    are cosines.
    relu: of the features, for a trunk that ends before its last one.
    """

    def __init__(self, backbone, projection_head, heads, relu=False):
        super().__init__()
        self.backbone, self.projection_head, self.relu = backbone, projection_head, relu
        self.heads = nn.ModuleList(heads)

    def forward(self, images):
        return self.scores(self.backbone(images))

    def scores(self, features):
        """Those of the trunk's features (B, F)."""
        z = features if self.projection_head is None else self.projection_head(features)  # (B, D)
        with torch.autocast(z.device.type, enabled=False):  # full precision from here on
            z = F.relu(z.float()) if self.relu else z.float()
            unit = F.normalize(z)
            return [head(z) if head.bias is not None else F.linear(unit, F.normalize(head.weight))
                    for head in self.heads]


def load_model(path, trust_pickle=False):
    """(Model, info) of a run directory, whose weights are those of its checkpoint.pt, or of any file that
    `load_backbone` reads.

    Where the method or the file has none, projection_head is None and heads are empty.
    """
    return _open_model(path, trust_pickle)[:2]


def _open_model(path, trust_pickle):
    """(Model, info, families.Contents) of a run directory or a file."""
    path = Path(path)
    backbone, info, contents = _open(path, trust_pickle)
    if path.is_dir():
        path = path / "checkpoint.pt"
        try:
            saved = load(path)
        except FileNotFoundError:
            raise CheckpointError(f"{path} does not exist") from None
        _fill(backbone, {name[9:]: tensor for name, tensor in saved["model"].items()
                         if name.startswith("backbone.")}, path, info)
        projection, heads, _ = families.heads(saved["model"])
        contents = contents._replace(projection=projection, heads=heads,
                                     labels=saved["meter"]["assignments"].long())
    try:
        projection, heads = families.build(contents.projection, contents.heads)
        model = Model(backbone, projection, heads, relu=info["arch"] == "alexnet")
        model.eval().scores(torch.zeros(1, backbone.feature_dim))  # raises if they do not fit
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise HeadsDoNotFit(
            f"{path}: its heads do not fit its {info['arch']} ({_first_line(error)})") from None
    return model.train(), info, contents


def load_trunk(path, run):
    """State dict of the trunk at path (see load_backbone), which must be of the arch, width, stem and input
    in a run's info."""
    trunk, info = load_backbone(path)
    for name in ("arch", "width", "stem", "sobel"):
        there, here = info.get(name, False), run.get(name, False)
        if there != here:
            raise CheckpointError(f"--init-from {path} has {name} {there}, this run has --{name} {here}")
    return trunk.state_dict()


def build_backbone(info):
    """A trunk with random weights, of the architecture that info names."""
    arch, sobel = info["arch"], info.get("sobel", False)
    if arch == "preact50":
        return preact.PreactResNet50()
    if arch not in alexnet.ARCHITECTURES:
        return resnet.ARCHITECTURES[arch](info["width"], info["stem"], info.get("channels", 3), sobel)
    trunk = alexnet.alexnet(alexnet.ARCHITECTURES[arch], sobel)
    if info.get("convolutions_only"):  # VISSL's file: features are the last maps
        trunk.classifier, trunk.feature_dim = nn.Identity(), 256 * 6 * 6
    return trunk


def _architecture(info):
    width, sobel = info.get("width") or 1, " with Sobel" if info.get("sobel") else ""
    return f"{info['arch']} x{width:g}{sobel}, {info.get('stem')} stem"
