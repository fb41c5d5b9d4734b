"""One atomic, checksummed file a run, and backbones in and out.

A checkpoint is what torch.save writes, plus 40 bytes: a mark and the SHA-256 of all before it. torch.load reads the file
as it is; `load` reads it with weights_only=True after the checksum agreed, and nothing else.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from . import alexnet, families, resnet
from .multicrop import MEAN, STD

MARK = b"SHA-256:"


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message says which file and why."""

    exit_code = 4


class Damaged(CheckpointError):
    """A file that is not whole, or not what was written."""


class _HashingWriter:
    def __init__(self, file):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block):
        self.digest.update(block)
        return self.file.write(block)

    def flush(self):
        self.file.flush()


@contextlib.contextmanager
def writing(path, text=False, sync=False, keep=None):
    """A file to write. It takes the name `path` once it is whole; until then, and if anything goes wrong, the file that was
    there stays as it is. text: a text file, in which undecodable paths may be written. sync: wait until it is on the disk.
    keep: the name that the file that was there gets."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", newline="", errors="surrogateescape") if text else open(partial, "wb") as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
        if sync:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # the new names themselves reach the disk
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def _torch_save(state, file):
    try:
        torch.save(state, file)
    except RuntimeError as error:
        if "inline_container" not in str(error) and "PytorchStreamWriter" not in str(error):
            raise
        raise OSError(str(error).splitlines()[0]) from None  # torch's writer reports a full disk so


def save(path, state):
    """Writes state (tensors, numbers, strings, lists, tuples and dicts) to path, keeping the file that was there as
    previous_path(path). The name never points at half a file. Raises OSError, with the old files intact."""
    with writing(path, sync=True, keep=previous_path(path)) as file:
        writer = _HashingWriter(file)
        _torch_save(state, writer)
        file.write(MARK + writer.digest.digest())


def previous_path(path):
    return Path(path).with_name("previous_" + Path(path).name)


def load(path, expect=None):
    """The state that `save` wrote. expect: {key: value} that the state must hold, else CheckpointError says what differs.

    Raises Damaged if the file is not what was written, FileNotFoundError if there is none.
    """
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size - len(MARK) - 32
        digest, left = hashlib.sha256(), max(0, size)
        while left and (block := file.read(min(left, 1 << 24))):
            digest.update(block)
            left -= len(block)
        if size <= 0 or file.read() != MARK + digest.digest():
            raise Damaged(f"{path} is damaged: its checksum does not agree")
        file.seek(0)
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch raises several kinds for what it refuses
            raise Damaged(f"{path} cannot be loaded: {str(error).splitlines()[0]}") from None
    for key, value in (expect or {}).items():
        if state.get(key) != value:
            raise CheckpointError(f"{path} has {key} {state.get(key)!r}, here it is {value!r}")
    return state


def export_backbone(path, backbone, info):
    """Writes a trunk as {"state_dict", "info"}: torchvision's parameter names, and what is needed to rebuild it.

    info: dict with arch, width, stem, channels, sobel, mean, std, resize, size, method, recipe, epoch.
    """
    state = {
        name: tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu()
        for name, tensor in backbone.state_dict().items()
    }
    with writing(path, sync=True) as file:
        _torch_save({"state_dict": state, "info": info}, file)


def load_backbone(path):
    """(trunk, info) of a run directory, a backbone.pt or a torchvision ResNet file (its `fc` is left out).

    Every weight of the trunk must be in the file and the other way round; else CheckpointError names some.
    """
    path = Path(path)
    path = path / "backbone.pt" if path.is_dir() else path
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist") from None
    except Exception as error:
        raise CheckpointError(f"{path} cannot be loaded: {str(error).splitlines()[0] if str(error) else 'it is empty'}") from None
    try:
        state = saved.get("state_dict", saved) if isinstance(saved, dict) else {}
        info = dict(saved["info"]) if isinstance(saved, dict) and "info" in saved else _recognise(state, path)
        state = {name: tensor for name, tensor in state.items() if not name.startswith("fc.")}
        trunk = build_backbone(info)
    except CheckpointError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # anything may be in a file
        raise CheckpointError(f"{path} is neither a backbone.pt nor a torchvision ResNet ({type(error).__name__}: {error})") from None
    missing = sorted(
        trunk.state_dict().keys() - state.keys() - {name for name in trunk.state_dict() if name.endswith("num_batches_tracked")}
    )
    unknown = sorted(state.keys() - trunk.state_dict().keys())
    if missing or unknown:
        raise CheckpointError(f"{path} is no {info['arch']}: missing {missing[:3] or 'nothing'}, unknown {unknown[:3] or 'nothing'}")
    try:
        trunk.load_state_dict({**trunk.state_dict(), **state})
    except RuntimeError as error:
        raise CheckpointError(f"{path}: {str(error).splitlines()[1].strip()}") from None
    return trunk, info


class Model(nn.Module):
    """A trunk with what clusters its features: images (B, 3, S, S), normalised, to H scores (B, K), whose arg-max is the cluster.

    projection_head: a module or None. heads: H linear layers; those without bias are prototypes, whose scores are cosines.
    relu: of the features, for a trunk that ends before its last one.
    """

    def __init__(self, backbone, projection_head, heads, relu=False):
        super().__init__()
        self.backbone, self.projection_head, self.relu = backbone, projection_head, relu
        self.heads = nn.ModuleList(heads)

    def forward(self, images):
        z = self.backbone(images)  # (B, F)
        z = F.relu(z) if self.relu else z
        z = z if self.projection_head is None else self.projection_head(z)  # (B, D)
        return [head(z if head.bias is not None else F.normalize(z)) for head in self.heads]


def load_model(path):
    """(Model, info) of a run directory, or of any file that `load_backbone` reads. Where the method or the file has none,
    projection_head is None and heads are empty."""
    path = Path(path)
    backbone, info = load_backbone(path)
    projection, heads = None, []
    if path.is_dir():
        try:
            state = load(path / "checkpoint.pt")["model"]
        except FileNotFoundError:
            raise CheckpointError(f"{path / 'checkpoint.pt'} does not exist") from None
        backbone.load_state_dict({name[9:]: tensor for name, tensor in state.items() if name.startswith("backbone.")})
        projection, heads = families.heads(state)
    projection = families.build_projection(projection, last_relu=bool(heads) and "bias" in heads[0]) if projection else None
    model = Model(backbone, projection, [families.build_head(head) for head in heads], relu=info["arch"] == "alexnet")
    return model, info


def load_trunk(path, config):
    """State dict of the trunk at path (see load_backbone), which must be of config's arch, width, stem and input."""
    trunk, info = load_backbone(path)
    for name in ("arch", "width", "stem", "sobel"):
        there, here = info.get(name, False), getattr(config, name, False)
        if there != here:
            raise CheckpointError(f"--init-from {path} has {name} {there}, this run has --{name} {here}")
    return trunk.state_dict()


def build_backbone(info):
    """A trunk with random weights, of the architecture that info names."""
    arch, sobel = info["arch"], info.get("sobel", False)
    if arch in alexnet.ARCHITECTURES:
        return alexnet.alexnet(alexnet.ARCHITECTURES[arch], sobel)
    return resnet.ARCHITECTURES[arch](info["width"], info["stem"], info.get("channels", 3), sobel)


def _recognise(state, path):
    """info of a bare state dict with torchvision's names, read off its shapes."""
    if "conv1.weight" not in state or "layer4.0.conv1.weight" not in state:
        raise CheckpointError(f"{path} is neither a backbone.pt nor a torchvision ResNet: it holds {sorted(state)[:3]}")
    depth = sum(name.startswith("layer3.") and name.endswith(".conv1.weight") for name in state)
    bottleneck = "layer1.0.conv3.weight" in state
    arch = {(6, True): "resnet50", (6, False): "resnet34", (2, False): "resnet18", (1, False): "resnet10"}.get((depth, bottleneck))
    if arch is None:
        raise CheckpointError(f"{path}: only ResNet-10, 18, 34 and 50 are known, not one with {depth} blocks in layer3")
    outputs, channels, side, _ = state["conv1.weight"].shape
    return {
        "arch": arch,
        "width": outputs / 64,
        "stem": "small" if side == 3 else "imagenet",
        "channels": channels,
        "sobel": channels == 2,
        "resize": 256,
        "size": 224,
        "mean": MEAN,
        "std": STD,
        "method": "torchvision",
    }
