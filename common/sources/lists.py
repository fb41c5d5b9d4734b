"""Lists of image files: text, and iNaturalist's annotations."""

import json
import os
from pathlib import Path

from ..engine.errors import DataError
from .files import EXTENSIONS, Files


def open_list(path, root, split):
    read = _read_annotations if path.suffix.lower() == ".json" else _read_list
    return read(path, root, split)


def _start(path, root, split, first):
    """The folder that the paths of a list start from, judged by the first of them: root, or train/ or val/ in
    it."""
    root = Path(root or path.parent)
    return next((base for base in (root, root / split) if os.path.isfile(base / first)), root)


def _check_some(path, root, names, place):
    """Looking at every file of a long list takes minutes on a network: these catch a wrong root or a wrong
    list."""
    for i in range(0, len(names), max(1, len(names) // 10_000)):
        if not os.path.isfile(root / names[i]):
            raise DataError(f"{path} {place(i)}: {os.fspath(root / names[i])[:200]} does not exist")


def _read_list(path, root, split):
    """A list file: a path a line, with an integer label or a class name behind it on every line or on
    none."""
    try:
        with open(path, "rb") as file:
            if b"\0" in file.read(4096):  # an archive or an image, perhaps larger than the memory
                raise DataError(f"{path} is not a list of images: a text file with one path a line is needed")
        text = path.read_text(encoding="utf-8", errors="surrogateescape").removeprefix("\ufeff")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    lines = [line for line in text.split("\n") if line.strip()]
    if not lines or "\0" in text:
        raise DataError(f"{path} is not a list of images: a text file with one path a line is needed")

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
    del lines, pairs  # hundreds of megabytes for Places205
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
    if labels[0] is None:
        return Files(root, names)
    # longer ones are names: times, bar codes
    numeric = all(label.isdecimal() and len(label) < 7 for label in labels)
    classes = sorted(set(labels), key=os.fsencode)
    if numeric:
        classes = [str(i) for i in range(max(map(int, labels)) + 1)]
    number = {name: i for i, name in enumerate(classes)}
    labels = [int(label) if numeric else number[label] for label in labels]
    return Files(root, names, labels, classes, numeric)


def _read_annotations(path, root, split):
    """A .json file of iNaturalist's competitions: images with id and file_name, annotations with image_id and
    category_id.

    Classes are the ids of its categories, as text; iNaturalist's class folders have these names.
    """
    try:
        content = json.loads(path.read_bytes())
        images = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(a["image_id"], a["category_id"]) for a in content.get("annotations") or []]
        named = {category["id"] for category in content.get("categories") or []}
        ids = sorted(named | {category for _, category in pairs})
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        needed = "images with id and file_name, and annotations with image_id and category_id, are needed"
        raise DataError(f"{path} is not a list of images in iNaturalist's format: {needed} "
                        f"({type(error).__name__})") from None
    if not images:
        raise DataError(f"{path} lists no images")
    names, category = list(images.values()), dict(pairs)
    root = _start(path, root, split, names[0])
    _check_some(path, root, names, lambda i: f"image {i + 1}")
    if not pairs:
        return Files(root, names)
    if len(category) < len(pairs):
        raise DataError(f"{path} has {len(pairs)} annotations for {len(category)} images: one each is needed")
    missing = [image for image in images if image not in category]
    if missing:
        raise DataError(f"{path}: image {missing[0]!r} has no annotation, but other images have one")
    number = {category: i for i, category in enumerate(ids)}
    return Files(root, names, [number[category[image]] for image in images], map(str, ids))
