"""Reads lists of image files: text files, and iNaturalist's annotations."""

import json
import os
import re
from pathlib import Path

from ..engine.errors import DataError, border
from .files import EXTENSIONS, Files

LARGEST = 2**30  # bytes; ImageNet-22k's list has 0.8 GiB
NO_LABEL = re.compile(r"-1(\.0*)?")
NUMBER = re.compile(r"\d{1,6}(\.0*)?")  # of a class; longer ones are names, such as times
LIKE_A_NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?|nan", re.IGNORECASE)


def open_list(path, root, split):
    with border(DataError, f"{path} cannot be read"), open(path, "rb") as file:
        if os.path.getsize(path) > LARGEST:
            raise DataError(f"{path} is larger than 1 GiB: too large for a list of images")
        if b"\0" in file.read(4096):  # an archive or an image
            raise DataError(f"{path} is not a list of images: a text file with one path per line is needed")
    read = _read_annotations if path.suffix.lower() == ".json" else _read_list
    return read(path, root, split)


def _start(path, root, split, first):
    """Returns the folder that the paths of a list start from: root, or train/ or val/ in it, whichever has
    the first path. root defaults to the list's folder."""
    root = Path(root or path.parent)
    return next((base for base in (root, root / split) if os.path.isfile(base / first)), root)


def _check_some(path, root, names, place):
    """Raises DataError if one of about 10,000 files is missing: a wrong root or list. Checking every file of
    a long list takes minutes on a network."""
    for i in range(0, len(names), max(1, len(names) // 10_000)):
        if not os.path.isfile(root / names[i]):
            what = "is not a regular file" if os.path.exists(root / names[i]) else "does not exist"
            name = repr(os.fspath(root / names[i]))[1:-1][:200]  # in one line, whatever characters it has
            raise DataError(f"{path} {place(i)}: {name} {what}")


def _read_list(path, root, split):
    """Reads a text list: one path per line, followed by a class number or name on every line or on none."""
    with border(DataError, f"{path} cannot be read"):
        text = path.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
    lines = [line for line in text.split("\n") if line.strip()] if "\0" not in text else []
    if not lines:
        raise DataError(f"{path} is not a list of images: a text file with one path per line is needed")

    endings = tuple(EXTENSIONS)

    def cut(line):
        for separator in (",", "\t", " "):
            head, found, label = line.rpartition(separator)
            if found and label.strip() and head.rstrip().lower().endswith(endings):
                return head.strip(), label.strip()
        return line.strip(), None

    def place(i):
        return f"line {[number for number, line in enumerate(text.split(chr(10)), 1) if line.strip()][i]}"

    pairs = [cut(line) for line in lines]
    names, labels = [name for name, _ in pairs], [label for _, label in pairs]
    del lines, pairs  # frees hundreds of megabytes for Places205
    if None in labels:
        if any(label is not None for label in labels):
            raise DataError(f"{path} {place(labels.index(None))} has no label, but other lines have one")
        first = names[0]
        root, bare = _start(path, root, split, first), not any("/" in name for name in names)
        base = _start(path, root, split, os.path.join(first.partition("_")[0], first))
        folder = base / first.partition("_")[0]  # SimCLR's lists: n01440764_10026.JPEG is in n01440764
        if bare and not os.path.isfile(root / first) and os.path.isfile(folder / first):
            labels = [name.partition("_")[0] for name in names]
            names, root = [os.path.join(label, name) for label, name in zip(labels, names)], base
    else:
        root = _start(path, root, split, names[0])
    _check_some(path, root, names, place)
    if labels[0] is None or all(map(NO_LABEL.fullmatch, labels)):
        return Files(root, names)
    number, classes, numbered = number_labels(labels, lambda label: f"{path} {place(labels.index(label))}")
    labels = [number[label] for label in labels]
    return Files(root, names, labels, classes, numbered)


def number_labels(labels, where):
    """Returns {label: its number}, the class names, and whether these are numbers. -1 stands for no label."""
    number = dict.fromkeys(labels, -1)
    kinds = sorted((label for label in number if not NO_LABEL.fullmatch(label)), key=os.fsencode)
    odd = [label for label in kinds if not NUMBER.fullmatch(label)]
    if not odd:  # 1.0 is class 1: table software writes it so where other labels are missing
        number |= {label: int(float(label)) for label in kinds}
        return number, [str(i) for i in range(max(number.values()) + 1)], True
    if all(map(LIKE_A_NUMBER.fullmatch, kinds)) and not all(map(str.isdecimal, kinds)):
        needed = "a whole number from 0 to 999999 as on other lines, or -1 for no label, is needed"
        raise DataError(f"{where(odd[0])}: label {odd[0][:200]!r}: {needed}")
    return number | {label: i for i, label in enumerate(kinds)}, kinds, False


def _read_annotations(path, root, split):
    """Reads a .json file of iNaturalist's competitions: images with id and file_name, annotations with
    image_id and category_id.

    Classes are named by their category ids, as are iNaturalist's class folders. Id -1 means no label.
    """
    needed = "images with id and file_name, and annotations with image_id and category_id, are needed"
    with border(DataError, f"{path} is not a list of images in iNaturalist's format: {needed}"):
        content = json.loads(path.read_bytes())
        images = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(a["image_id"], a["category_id"]) for a in content.get("annotations") or []]
        named = {category["id"] for category in content.get("categories") or []}
        ids = sorted((named | {category for _, category in pairs}) - {-1})
        if not all(isinstance(i, (int, str)) for i in ids):
            raise TypeError("a category_id is neither a whole number nor text")
        names, category = list(images.values()), dict(pairs)
        for name in names:
            os.fsencode(name)
    if not images:
        raise DataError(f"{path} lists no images")
    if len(images) < len(content["images"]):
        count = len(content["images"])
        raise DataError(f"{path} has {len(images)} ids for {count} images: one each is needed")
    root = _start(path, root, split, names[0])
    _check_some(path, root, names, lambda i: f"image {i + 1}")
    if not ids:
        return Files(root, names)
    if len(category) < len(pairs):
        raise DataError(f"{path} has {len(pairs)} annotations for {len(category)} images: one each is needed")
    missing = [image for image in images if image not in category]
    if missing:
        raise DataError(f"{path}: image {missing[0]!r:.200} has no annotation, but other images have one")
    number = {category: i for i, category in enumerate(ids)} | {-1: -1}
    return Files(root, names, [number[category[image]] for image in images], map(str, ids))
