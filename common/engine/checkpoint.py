"""Writes and reads a run's checkpoint, and writes backbone.pt: each takes its name once it is whole.

Both are what torch.save writes: a zip, with a CRC of each record. torch.load does not compare the CRCs:
`verified` does. Then weights_only=True loads tensors and plain values, and runs no code.
"""

import errno
import os
import zipfile
from pathlib import Path

import torch
from torch import nn

from .errors import CheckpointError, Damaged, out_of_memory, reason, say
from .files import writing


def save(path, state):
    """Writes state (tensors, numbers, strings, lists, tuples and dicts) to path, keeping the file that was
    there as previous_path(path). The name never points at half a file. Raises OSError, with the old files
    intact."""
    write(path, state, keep=previous_path(path))


def write(path, content, keep=None):
    """Writes what torch.save writes. keep: see `writing`."""
    with writing(path, sync=True, keep=keep) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # of torch's own count of bytes, after the file's OSError
            raise error.__context__ or error from None


def previous_path(path):
    return Path(path).with_name("previous_" + Path(path).name)


def load(path, expect=None):
    """The state that `save` wrote, also in older runs, whose files go on for 40 bytes after the zip. expect:
    {key: value} that the state must hold, else CheckpointError says what differs.

    Raises Damaged if the file is not what was written, FileNotFoundError if there is none.
    """
    with open(path, "rb") as file:
        try:
            state = torch.load(verified(file), map_location="cpu", weights_only=True)
        except Exception as error:  # zipfile and torch raise many kinds for what they refuse
            # zipfile's own, for a file that is cut, have no number
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise  # a disk's bad moment does not damage a file
            if out_of_memory(error):
                raise
            raise Damaged(f"{path} is damaged, or no checkpoint: {reason(error)}") from None
    if not isinstance(state, dict):
        raise Damaged(f"{path} is no checkpoint: it holds no names")
    for key, value in (expect or {}).items():
        found = state.get(key)
        if type(found) is not type(value) or found != value:
            found = repr(found).splitlines()[0]
            raise CheckpointError(f"{path} has {key} {found:.200}, here it is {value!r}")
    return state


def newest(path, expect=None):
    """What `load` gives for path; for a damaged file, what it gives for the one before; None if there is
    neither.

    A damaged file is set aside as damaged_NAME, or the next save would keep it as the previous one.
    """
    damage = []
    for candidate in (path, previous_path(path)):
        try:
            state = load(candidate, expect)
        except FileNotFoundError:
            continue
        except Damaged as error:
            damage.append(str(error))
            continue
        except CheckpointError as error:
            raise CheckpointError(f"{error}; --fresh starts over") from None
        if damage:
            say(f"warning: {damage[0]}; going on from {candidate}")
            os.replace(path, path.with_name(f"damaged_{path.name}"))
        return state
    if damage:
        raise CheckpointError(f"{'; '.join(damage)}; --fresh starts over")
    return None


def verified(file):
    """The open file, at its start. Raises what zipfile raises unless it is a zip whose records lie in it as
    they are, not packed, and agree with their CRCs; one in which none is set passes with a warning."""
    with zipfile.ZipFile(file) as records:
        written = [record for record in records.infolist() if record.file_size]
        if not written or any(record.external_attr & 0x10 for record in written):
            raise zipfile.BadZipFile("its list of records is wrong")  # torch would not read a folder
        size = os.fstat(file.fileno()).st_size
        if (held := sum(record.file_size for record in written)) > size:  # packed, maybe to gigabytes
            raise zipfile.BadZipFile(f"its records hold {held:,} bytes, the file itself has {size:,}")
        if not any(record.CRC for record in written):
            say(f"warning: {file.name} has no checksums: damage to it would not be seen")
        elif name := records.testzip():
            raise zipfile.BadZipFile(f"the checksum of {name} does not agree")
    file.seek(0)
    return file


def export_backbone(path, backbone, info, clusters=None, labels=None):
    """Writes a trunk as {"state_dict", "info"}: torchvision's parameter names, and what is needed to rebuild
    it.

    info: dict with arch, width, stem, channels, sobel, mean, std, resize, size, range, exif (how images
    looked: see open_images), method, recipe, epoch.
    clusters: the Model that the trunk is of; its projection and heads are written too, for `load_model`.
    labels: see `export_model`.
    """
    content = {"state_dict": cpu_state(backbone), "info": info}
    if clusters is not None:
        parts = {"prototypes": clusters.heads, "projection_head": clusters.projection_head}
        content["clusters"] = cpu_state(nn.ModuleDict(parts))
    if labels is not None:
        content["L"] = labels
    write(path, content)


def cpu_state(module):
    """A state dict on the CPU, its floating-point tensors in float32."""
    return {name: tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu()
            for name, tensor in module.state_dict().items()}
