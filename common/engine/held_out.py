"""Opens the images to evaluate on, and numbers their classes as those of the training images."""

import os
from pathlib import Path

import torch

from ..data import NAMED, PACKED, look, open_images
from ..sources.lists import open_list
from .errors import ArgumentError, DataError


def held_out(config, images):
    """Returns the images that --eval-every classifies, with the class numbers of the training images."""
    spec = config.val or config.data or "shapes"
    if not config.val and not has_split(spec, "val"):
        needed = f"--eval-every needs held-out images, and {spec} has no val split"
        raise ArgumentError(f"{needed}: name some with --val")
    queries = open_queries(config.data or "shapes", config.val, config.root, config.index or config.out,
                           images.range, images.exif)
    if queries.labels is None or images.labels is None:
        raise ArgumentError("--eval-every needs labels: class folders, or lists with labels")
    match_classes(queries, images)
    return queries


def open_queries(spec, val="", root="", index="", range=(), exif=False):
    """Opens the images to evaluate on: those that `val` names (its "val" split, if it has one), else the
    "val" split of spec. index, range, exif: see open_images."""
    if val and is_list(val):
        return look(open_list(Path(val), root, "val"), val, range, exif)
    split = "val" if not val or has_split(val, "val") else "train"
    return open_images(val or spec, split, root, index, range, exif)


def is_list(spec):
    return os.path.isfile(spec) and Path(spec).suffix.lower() not in (".tar", *PACKED)


def has_split(spec, split):
    """Tells whether spec has this split: it is a named set, or a folder that holds a folder `split`."""
    return str(spec).partition(":")[0] in ("shapes", *NAMED) or os.path.isdir(os.path.join(spec, split))


def match_classes(queries, bank):
    """Renumbers the labels of `queries` in place, so that both sets have the classes of `bank`.

    Classes are matched by name. If one set is a list with numbers and the other has names, number i is the
    i-th name in byte order, as is usual for ImageNet. Raises DataError for a class that bank lacks.
    """
    number = {name: i for i, name in enumerate(bank.classes)}
    asked = [queries.classes[i] for i in queries.labels.unique().tolist() if i >= 0]
    if _numbered(queries) != _numbered(bank) and any(name not in number for name in asked):
        if _numbered(queries):
            number = {str(i): i for i in range(len(bank.classes))}
        elif len(queries.classes) == len(bank.classes):
            number = {name: i for i, name in enumerate(queries.classes)}
    votes = set(bank.labels.unique().tolist())  # numbers in a list may have gaps
    unknown = [name for name in asked if number.get(name) not in votes]
    if unknown:
        example = f" ({', '.join(bank.classes[:2])}, ...)"
        raise DataError(f"class {unknown[0]!r} of the images to classify is not among the "
                        f"{len(votes - {-1})} classes of the training images{example}")
    numbers = torch.tensor([number.get(name, -1) for name in queries.classes])
    queries.labels = torch.where(queries.labels >= 0, numbers[queries.labels], queries.labels)
    queries.classes = bank.classes


def _numbered(images):
    return getattr(images, "numbered", False)
