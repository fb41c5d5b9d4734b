"""Data sets of torchvision."""

import torch
import torchvision

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
            self.set = cls(root, download=True, **which)
        labels = torch.as_tensor(self.set.targets if hasattr(self.set, "targets") else self.set.labels).long()
        self.labels = labels  # -1 for STL-10's unlabelled images
        self.classes = list(getattr(self.set, "classes", map(str, range(10))))
        self.paths = [f"{name}/{split}/{i:06d}" for i in range(len(self.set))]
        self.fingerprint = f"{name} {split} {len(self.set)}"

    def __len__(self):
        return len(self.set)

    def read(self, i):
        return self.set[i][0].convert("RGB")
