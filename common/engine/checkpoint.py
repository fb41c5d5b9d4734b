"""Writes and reads a run's checkpoint, and writes backbone.pt. A file gets its name only once it is complete.

Both are zip files of torch.save, with a CRC of each record. torch.load does not check the CRCs, so `verified`
does. Loading uses weights_only=True, which reads tensors and plain values and runs no code.
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
    """Writes state (tensors, numbers, strings, lists, tuples and dicts) to path. The old file stays as
    previous_path(path). path never names an incomplete file. After an OSError the old files are intact."""
    write(path, state, keep=previous_path(path))


def write(path, content, keep=None):
    """Writes content with torch.save. keep: see `writing`."""
    with writing(path, sync=True, keep=keep) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:  # torch, of its byte count, after a failed write: raise its OSError
            raise error.__context__ or error from None


def previous_path(path):
    return Path(path).with_name("previous_" + Path(path).name)


def load(path, expect=None):
    """Returns the state that `save` wrote. Files of older versions, with 40 bytes after the zip, work too.

    expect: {key: value} that the state must hold, else CheckpointError says what differs. Raises Damaged if
    the file is not what was written, FileNotFoundError if there is none.
    """
    with open(path, "rb") as file:
        try:
            state = torch.load(verified(file), map_location="cpu", weights_only=True)
        except Exception as error:  # zipfile and torch raise many kinds for what they refuse
            # For a truncated file zipfile raises OSError without errno, or with EINVAL.
            if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
                raise  # the disk could not be read; the file may be intact
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
    """Loads path or, if it is damaged or missing, the previous file. Returns None if there is neither.

    Renames a damaged file to damaged_NAME, or the next save would keep it as the previous one. Raises
    CheckpointError if every file that is there is damaged, or if one differs from expect (see `load`).
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
            raise CheckpointError(f"{error}: give what it has to go on, or --fresh to start over") from None
        if damage:
            say(f"warning: {damage[0]}; going on from {candidate}")
            os.replace(path, path.with_name(f"damaged_{path.name}"))
        return state
    if damage:
        raise CheckpointError(f"{'; '.join(damage)}; --fresh starts over")
    return None


def verified(file):
    """Returns the open file, rewound, if it is a zip of uncompressed records that match their CRCs; else
    raises what zipfile raises. If no record has a CRC, only warns."""
    with zipfile.ZipFile(file) as records:
        written = [record for record in records.infolist() if record.file_size]
        if not written or any(record.external_attr & 0x10 for record in written):
            raise zipfile.BadZipFile("its list of records is wrong")  # torch skips what is marked as a folder
        size = os.fstat(file.fileno()).st_size
        if (held := sum(record.file_size for record in written)) > size:  # compressed: may be gigabytes
            raise zipfile.BadZipFile(f"its records hold {held:,} bytes, the file itself has {size:,}")
        if not any(record.CRC for record in written):
            say(f"warning: {file.name} has no checksums: damage to it would not be seen")
        elif name := records.testzip():
            raise zipfile.BadZipFile(f"the checksum of {name} does not agree")
    file.seek(0)
    return file


def export_backbone(path, backbone, info, clusters=None, labels=None):
    """Writes a trunk as {"state_dict", "info"}: tensors under torchvision's names, and how to rebuild it.

    info: dict with arch, width, stem, channels, sobel, mean, std, resize, size, range and exif (how images
    were converted: see open_images), method, recipe, epoch.
    clusters: the Model that has this trunk. Its projection and heads are written too, for `load_model`.
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
    """Returns a state dict on the CPU, with floating-point tensors in float32."""
    return {name: tensor.detach().cpu().float() if tensor.is_floating_point() else tensor.cpu()
            for name, tensor in module.state_dict().items()}
