"""Loads trunks into torchvision's own networks, for any project. Imports nothing of this repository, except
for released:NAME.

    network = torch.hub.load("path/to/this/repository", "resnet50", checkpoint="runs/swav", source="local")
    features = network(images)  # (B, 2048), of normalised images: the network is in eval mode

checkpoint: a run directory, a backbone.pt, a file that `python -m common.weights FILE --to torchvision` or
`--to model` wrote, or released:NAME (see `python -m common.weights --list`), whose trunk alone is used.
"""

import zipfile
from pathlib import Path

import torch
import torchvision

dependencies = ["torch", "torchvision"]


def resnet18(checkpoint):
    return _load("resnet18", checkpoint)


def resnet34(checkpoint):
    return _load("resnet34", checkpoint)


def resnet50(checkpoint):
    return _load("resnet50", checkpoint)


def _load(arch, checkpoint):
    """Returns torchvision's network with a checkpoint's weights, in eval mode. Its `fc` is the cluster head
    if the file has one, else the identity.

    Raises ValueError if the file is damaged, holds another network, or has a weight that is not finite.
    """
    if str(checkpoint).startswith("released:"):
        from common.weights import load_backbone

        trunk, info = load_backbone(checkpoint)
        return _filled(arch, {"state_dict": trunk.state_dict(), "info": info}, checkpoint)
    path = Path(checkpoint)
    path = path / "backbone.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    try:
        saved = _read(path)
    except Exception as error:  # zipfile and torch raise many kinds for what they refuse
        line = (str(error).splitlines() or [""])[0]
        raise ValueError(f"{path} is damaged, or holds no weights: {type(error).__name__}: {line}") from None
    return _filled(arch, saved, path)


def _filled(arch, saved, path):
    state, info = saved.get("state_dict", saved), saved.get("info")
    try:
        network = torchvision.models.get_model(arch, num_classes=len(state.get("fc.weight", [0])))
        if "fc.weight" not in state:
            network.fc = torch.nn.Identity()
        network.load_state_dict(state)
    except Exception as error:  # anything may be in a file
        if isinstance(info, dict):
            words = (info.get(name) for name in ("arch", "width", "stem"))
            reason = "{} x{}, {} stem".format(*words) + ", Sobel" * bool(info.get("sobel"))
        else:
            convert = f"python -m common.weights {path} --to torchvision --out new.pt"
            reason = (str(error).splitlines()[1:] or [type(error).__name__])[0].strip()
            reason += f"; if it is another project's: {convert}"
        raise ValueError(f"{path} is no {arch} of torchvision: {reason}") from None
    for name, tensor in network.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {name} is not finite")
    return network.eval()


def _read(path):
    """Returns the dict in a file. Compares checksums, which torch.load does not; some files have none."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as file:
            records = file.infolist()
            folders = any(record.external_attr & 0x10 for record in records)  # torch skips these
            if folders or sum(record.file_size for record in records) > path.stat().st_size:
                raise ValueError("its list of records is wrong")
            if any(record.CRC for record in records) and (name := file.testzip()):
                raise ValueError(f"the checksum of {name} does not agree")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise ValueError("it is no dict")
    return saved
