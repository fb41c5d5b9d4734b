"""Opens images with boxes around their objects: VOC 2007 and 2012, and COCO."""

import hashlib
import json
import os
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import torch

from ..engine.errors import ArgumentError, DataError, border, say
from .files import decode


class Objects:
    """Images of a folder and their objects, in arrays, so a million objects cost a worker nothing.

    objects(i): boxes (n, 4) float32 in pixels from 0, x1 y1 x2 y2, x2 and y2 exclusive; labels (n,) int64
    from 1; difficult and crowd (n,) bool. wide (N,) bool: width >= height. rows: [(path, (width, height),
    [(box, label, difficult, crowd, outline as JSON)])]. empty: keep images without objects; otherwise images
    without objects, or with crowds only, are left out. Objects without area are left out, with a warning.

    Raises DataError if no image is left, or if files are missing.
    """

    def __init__(self, root, rows, classes, empty):
        found, without = [], 0
        for path, size, objects in rows:
            kept = [o for o in objects if o[0][2] > o[0][0] and o[0][3] > o[0][1]]
            without += len(objects) - len(kept)
            if empty or any(not crowd for _, _, _, crowd, _ in kept):
                found.append((path, size, kept))
        if without:
            say(f"warning: {root}: {without} boxes have no area and are left out")
        if len(found) < len(rows):
            say(f"{root}: {len(rows) - len(found)} of {len(rows)} images have no object to train on and are "
                "left out")
        if not any(objects for *_, objects in found):
            raise DataError(f"{root} has no image with objects")
        missing = [path for path, _, _ in found if not os.path.isfile(os.path.join(root, path))]
        if missing:
            raise DataError(f"{root}: {len(missing)} of {len(found)} images are missing: {missing[0]}")
        self.root, self.classes, self.paths = str(root), list(classes), [path for path, _, _ in found]
        self.wide = np.array([width >= height for _, (width, height), _ in found])
        self.ends = np.cumsum([0, *(len(objects) for _, _, objects in found)])
        boxes, labels, difficult, crowd, outlines = zip(*(o for *_, objects in found for o in objects))
        self.boxes, self.labels = np.array(boxes, np.float32), np.array(labels, np.int64)
        self.difficult, self.crowd = np.array(difficult, bool), np.array(crowd, bool)
        self.outline_ends = np.cumsum([0, *map(len, outlines)])
        self.outlines = torch.frombuffer(bytearray(b"".join(outlines) or b" "), dtype=torch.uint8)
        digest = hashlib.sha256("\0".join(self.paths).encode(errors="surrogateescape"))
        for array in (self.ends, self.boxes, self.labels, self.difficult, self.crowd):
            digest.update(array.tobytes())
        self.fingerprint = f"{len(self)} images with objects {digest.hexdigest()[:16]}"

    def __len__(self):
        return len(self.paths)

    def read(self, i):
        return decode(os.path.join(self.root, self.paths[i]))

    def objects(self, i):
        mine = slice(self.ends[i], self.ends[i + 1])
        return {name: getattr(self, name)[mine] for name in ("boxes", "labels", "difficult", "crowd")}


def open_voc(spec):
    """Returns (training, held-out) images: trainval of VOC 2007 and 2012, and test of 2007. spec: VOCdevkit,
    or the folder around it. Boxes in the files count from 1 and include their last row and column."""
    devkit = next((folder for folder in (Path(spec), Path(spec, "VOCdevkit"))
                   if (folder / "VOC2007" / "ImageSets" / "Main").is_dir()), None)
    if devkit is None or not (devkit / "VOC2012" / "ImageSets" / "Main").is_dir():
        needed = "VOC2007 and VOC2012, each with ImageSets/Main, Annotations and JPEGImages, are needed"
        raise DataError(f"{spec} is no VOCdevkit: {needed}")
    train = _voc_rows(devkit, "VOC2007", "trainval") + _voc_rows(devkit, "VOC2012", "trainval")
    test = _voc_rows(devkit, "VOC2007", "test")
    classes = sorted({name for _, _, objects in train for _, name, *_ in objects})
    number = {name: i for i, name in enumerate(classes, 1)}
    for _, _, objects in test:
        unknown = [name for _, name, *_ in objects if name not in number]
        if unknown:
            raise DataError(f"{devkit}: class {unknown[0]!r} of test is not in trainval")
    sets = []
    for rows, empty in ((train, False), (test, True)):
        rows = [(path, size, [(box, number[name], *more) for box, name, *more in objects])
                for path, size, objects in rows]
        sets.append(Objects(devkit, rows, classes, empty))
    return tuple(sets)


def _voc_rows(devkit, year, split):
    listed = devkit / year / "ImageSets" / "Main" / f"{split}.txt"
    with border(DataError, f"{listed} cannot be read"):
        names = [line.split()[0] for line in listed.read_text().splitlines() if line.strip()]
    rows = []
    for name in names:
        path = devkit / year / "Annotations" / f"{name}.xml"
        with border(DataError, f"{path} cannot be read"):
            tree = ElementTree.parse(path).getroot()
            size = [int(tree.findtext(f"size/{side}")) for side in ("width", "height")]
            objects = []
            for item in tree.iter("object"):
                # some coordinates are decimals
                x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{edge}"))
                                  for edge in ("xmin", "ymin", "xmax", "ymax"))
                difficult = item.findtext("difficult") == "1"
                objects.append(((x1 - 1, y1 - 1, x2, y2), item.findtext("name"), difficult, False, b""))
        rows.append((os.path.join(year, "JPEGImages", f"{name}.jpg"), size, objects))
    return rows


class Coco(Objects):
    """A split of COCO. Labels number the categories from 1 in the order of their ids, which have gaps:
    ids[label - 1] is a label's id. objects(i) include crowds, groups of objects. numbers: the images' ids."""

    def __init__(self, root, file, folder, empty):
        with border(DataError, f"{file} cannot be read"):
            content = json.loads(Path(file).read_text())
            classes = sorted((c["id"], c["name"]) for c in content["categories"])
            number = {i: label for label, (i, _) in enumerate(classes, 1)}
            objects = {image["id"]: [] for image in content["images"]}
            for a in content["annotations"]:
                x, y, width, height = a["bbox"]
                outline = json.dumps(a.get("segmentation")).encode()
                objects[a["image_id"]].append(((x, y, x + width, y + height), number[a["category_id"]], False,
                                               a.get("iscrowd", 0) == 1, outline))
            images = sorted(content["images"], key=lambda image: image["id"])
            rows = [(os.path.join(folder, image["file_name"]), (image["width"], image["height"]),
                     objects[image["id"]]) for image in images]
        super().__init__(root, rows, [name for _, name in classes], empty)
        kept = set(self.paths)
        self.numbers = [image["id"] for image, row in zip(images, rows) if row[0] in kept]
        self.sizes = [row[1] for row in rows if row[0] in kept]
        self.ids, self.file = [i for i, _ in classes], str(file)

    def masks(self, i, chosen):
        """Returns masks (n, H, W) bool of the objects of image i for which chosen (its objects,) is True."""
        from pycocotools import mask

        width, height = self.sizes[i]
        masks = np.zeros((chosen.sum(), height, width), bool)
        for row, k in zip(masks, np.flatnonzero(chosen) + self.ends[i]):
            text = self.outlines[self.outline_ends[k] : self.outline_ends[k + 1]]
            outline = json.loads(text.numpy().tobytes())
            if isinstance(outline, list) or isinstance(outline["counts"], list):  # polygons; run lengths
                outline = mask.frPyObjects(outline, height, width)
            row[:] = mask.decode(mask.merge(outline) if isinstance(outline, list) else outline)
        return masks


def open_coco(spec):
    """Returns (training, held-out) images of COCO: train2017 and val2017."""
    require_pycocotools()
    return tuple(Coco(spec, Path(spec, "annotations", f"instances_{split}.json"), split, empty)
                 for split, empty in (("train2017", False), ("val2017", True)))


def require_pycocotools():
    try:
        import pycocotools  # noqa: F401
    except ImportError:
        raise ArgumentError("COCO needs pycocotools: pip install pycocotools") from None
