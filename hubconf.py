"""The trunks in torchvision's own networks, for any project: nothing of this repository is imported.

    network = torch.hub.load("path/to/this/repository", "resnet50", checkpoint="runs/swav", source="local")
    features = network.eval()(images)  # (B, 2048), of normalised images

checkpoint: a run directory, a backbone.pt, or what `python -m common.weights FILE --to torchvision` or `--to
model` wrote.
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
    """torchvision's network with a checkpoint's weights: its `fc` is the cluster head where the file has one,
    else the identity.

    Raises ValueError if the file holds another network, or a record that does not agree with its CRC.
    """
    path = Path(checkpoint)
    path = path / "backbone.pt" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    if zipfile.is_zipfile(path):  # torch.load does not look at checksums; what others wrote may have none
        records = zipfile.ZipFile(path)
        if any(record.CRC for record in records.infolist()) and records.testzip():
            raise ValueError(f"{path} is damaged")
    saved = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(saved, dict):
        raise ValueError(f"{path} holds no weights")
    state, info = saved.get("state_dict", saved), saved.get("info", {})
    network = torchvision.models.get_model(arch, num_classes=len(state.get("fc.weight", [0])))
    if "fc.weight" not in state:
        network.fc = torch.nn.Identity()
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        if info:
            sobel = ", Sobel" if info.get("sobel") else ""
            reason = f"{info['arch']} x{info['width']:g}, {info['stem']} stem{sobel}"
        else:
            convert = f"python -m common.weights {path} --to torchvision --out new.pt"
            reason = f"{str(error).splitlines()[1].strip()}; if it is another project's: {convert}"
        raise ValueError(f"{path} is no {arch} of torchvision: {reason}") from None
    return network
