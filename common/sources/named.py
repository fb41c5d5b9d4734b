"""Opens labelled data sets of torchvision."""

import torch
import torchvision
from PIL import Image

from ..engine.errors import DataError, border

TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}


class Torchvision:
    """A labelled data set of torchvision, downloaded on first use."""

    def __init__(self, name, split, root):
        cls = getattr(torchvision.datasets, TORCHVISION[name])
        wanted = "test" if split == "val" else "train"
        which = {"train": split == "train"} if name.startswith("cifar") else {"split": wanted}
        if name == "stl10" and split == "train":
            which = {"split": "train+unlabeled"}
        with border(DataError, f"{name} cannot be read from {root}, nor downloaded"):
            found = cls(root, download=True, **which)
        pixels = torch.as_tensor(found.data)  # tensors are shared even with workers that are not forks
        self.pixels = pixels if name.startswith("cifar") else pixels.permute(0, 2, 3, 1)  # (N, H, W, 3) uint8
        # -1 for STL-10's unlabelled images
        self.labels = torch.as_tensor(found.targets if hasattr(found, "targets") else found.labels).long()
        self.classes = list(getattr(found, "classes", map(str, range(10))))
        self.paths = [f"{name}/{split}/{i:06d}" for i in range(len(pixels))]
        self.fingerprint = f"{name} {split} {len(pixels)}"

    def __len__(self):
        return len(self.pixels)

    def read(self, i):
        return Image.fromarray(self.pixels[i].numpy())
