"""The images to judge by, and their classes beside those of the training images."""

import os
from pathlib import Path

import torch

from ..data import NAMED, PACKED, look, open_images
from ..sources.lists import open_list
from .errors import ArgumentError, DataError


def held_out(config, images):
    """The images that --eval-every judges by, with classes numbered as those of the training images."""
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
    """The images to judge by: those that `val` names (its "val" split, if it has one), else the "val" split
    of spec. index, range, exif: see open_images."""
    if val and is_list(val):
        return look(open_list(Path(val), root, "val"), val, range, exif)
    split = "val" if not val or has_split(val, "val") else "train"
    return open_images(val or spec, split, root, index, range, exif)


def is_list(spec):
    return os.path.isfile(spec) and Path(spec).suffix.lower() not in (".tar", *PACKED)


def has_split(spec, split):
    """Whether open_images(spec, split) would find something to open."""
    return str(spec).partition(":")[0] in ("shapes", *NAMED) or os.path.isdir(os.path.join(spec, split))


def match_classes(queries, bank):
    """Numbers the labels of `queries` as those of `bank`, so that both have one table of classes.

    Classes are matched by name. Where one of the two is a list with numbers and the other has names, number i
    is the i-th name in the order of its bytes, as everywhere for ImageNet. Raises DataError for a class that
    bank lacks.
    """
    number = {name: i for i, name in enumerate(bank.classes)}
    asked = [queries.classes[i] for i in queries.labels.unique().tolist() if i >= 0]
    if _numbered(queries) != _numbered(bank) and any(name not in number for name in asked):
        if _numbered(queries):
            number = {str(i): i for i in range(len(bank.classes))}
        elif len(queries.classes) == len(bank.classes):
            number = {name: i for i, name in enumerate(queries.classes)}
    votes = set(bank.labels.unique().tolist())  # the numbers of a list may have gaps
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
