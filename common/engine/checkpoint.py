"""One atomic, checksummed file a run, and backbone.pt.

A checkpoint is what torch.save writes, plus 40 bytes: a mark and the SHA-256 of all before it. torch.load
reads the file as it is; `load` reads it with weights_only=True after the checksum agreed, and nothing else.
"""

import hashlib
import os
from pathlib import Path

import torch
from torch import nn

from .errors import CheckpointError, Damaged
from .files import writing

MARK = b"SHA-256:"


class _HashingWriter:
    def __init__(self, file):
        self.file, self.digest, self.error = file, hashlib.sha256(), None

    def write(self, block):
        self.digest.update(block)
        try:
            return self.file.write(block)
        except OSError as error:
            self.error = error
            raise

    def flush(self):
        self.file.flush()


def _torch_save(state, file):
    """Returns the SHA-256 of what it has written. Raises the file's own OSError, in whose place torch reports
    a position."""
    writer = _HashingWriter(file)
    try:
        torch.save(state, writer)
    except RuntimeError:
        if writer.error is None:
            raise
        raise writer.error from None
    return writer.digest.digest()


def save(path, state):
    """Writes state (tensors, numbers, strings, lists, tuples and dicts) to path, keeping the file that was
    there as previous_path(path). The name never points at half a file. Raises OSError, with the old files
    intact."""
    with writing(path, sync=True, keep=previous_path(path)) as file:
        file.write(MARK + _torch_save(state, file))


def previous_path(path):
    return Path(path).with_name("previous_" + Path(path).name)


def load(path, expect=None):
    """The state that `save` wrote. expect: {key: value} that the state must hold, else CheckpointError says
    what differs.

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


def export_backbone(path, backbone, info, clusters=None, labels=None):
    """Writes a trunk as {"state_dict", "info"}: torchvision's parameter names, and what is needed to rebuild
    it.

    info: dict with arch, width, stem, channels, sobel, mean, std, resize, size, method, recipe, epoch.
    clusters: the Model that the trunk is of; its projection and heads are written too, for `load_model`.
    labels: see `export_model`.
    """
    content = {"state_dict": _weights(backbone), "info": info}
    if clusters is not None:
        projection, several = clusters.projection_head, clusters.heads
        content["clusters"] = _weights(
            nn.ModuleDict({"prototypes": several, **({"projection_head": projection} if projection else {})}))
    if labels is not None:
        content["L"] = labels
    _write(path, content)


def _weights(module):
    """State dict on the CPU, in float32."""
    state = module.state_dict().items()
    return {name: tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu()
            for name, tensor in state}


def _write(path, content):
    with writing(path, sync=True) as file:
        _torch_save(content, file)
