"""Opens images with label maps: drawn scenes, VOC 2012 with the labels of SBD, Cityscapes."""

import hashlib
import os
from pathlib import Path

import numpy as np
import scipy.io

from ..engine.errors import DataError, border, say
from . import scenes
from .files import decode

VOC_CLASSES = ("background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse "
               "motorbike person pottedplant sheep sofa train tvmonitor").split()
CITYSCAPES_IDS = {7: "road", 8: "sidewalk", 11: "building", 12: "wall", 13: "fence", 17: "pole",
                  19: "traffic light", 20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky",
                  24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train",
                  32: "motorcycle", 33: "bicycle"}  # pixels of other ids are ignored


def open_scenes(spec):
    """Returns (training, held-out) drawn scenes, with the background as a class."""
    sets = scenes.open_scenes(spec)
    for part in sets:
        part.classes = ["background", *part.classes]
    return sets


class Masks:
    """Pairs of an image and a label map: read(i) -> PIL RGB, label_map(i) -> (H, W) uint8, where 255 is
    ignored. pairs: [(image, labels)], paths below root. table: (256,) uint8, the class of each file value.

    Raises DataError if there are none, or if files are missing.
    """

    def __init__(self, root, pairs, classes, table=None):
        if not pairs:
            raise DataError(f"{root} lists no images")
        missing = [path for pair in pairs for path in pair if not os.path.isfile(os.path.join(root, path))]
        if missing:
            raise DataError(f"{root}: {len(missing)} files are missing: {missing[0]}")
        self.root, self.pairs, self.classes, self.table = str(root), pairs, list(classes), table
        self.paths = [str(image) for image, _ in pairs]
        digest = hashlib.sha256(repr([tuple(map(str, pair)) for pair in pairs]).encode()).hexdigest()
        self.fingerprint = f"{len(pairs)} labelled maps {digest[:16]}"

    def __len__(self):
        return len(self.pairs)

    def read(self, i):
        return decode(os.path.join(self.root, self.pairs[i][0]))

    def label_map(self, i):
        path = os.path.join(self.root, self.pairs[i][1])
        labels = _from_mat(path) if path.endswith(".mat") else decode(path, make=_numbers)
        return labels if self.table is None else self.table[labels]


def _numbers(image):
    """Returns the values of a palette or grey PNG, not the colours that they stand for."""
    if image.mode not in ("P", "L"):
        raise ValueError(f"a map of labels has numbers, this one colours ({image.mode})")
    return np.array(image)


def _from_mat(path):
    return np.ascontiguousarray(scipy.io.loadmat(path)["GTcls"][0]["Segmentation"][0], np.uint8)


def open_voc_aug(spec):
    """Returns (training, held-out) images of VOC 2012. SBD extends the training set to (VOC train + SBD train
    + SBD val) - VOC val, 10,582 images. VOC's own 1,464 keep VOC's labels.

    spec: VOCdevkit, the folder around it, or VOC2012. SBD is in VOCaug/dataset or benchmark_RELEASE/dataset,
    inside VOCdevkit or beside it.
    """
    folders = [Path(spec, *parts) for parts in (("VOC2012",), ("VOCdevkit", "VOC2012"), ())]
    voc = next((folder for folder in folders if (folder / "ImageSets" / "Segmentation").is_dir()), None)
    if voc is None:
        needed = "a folder with VOC2012/ImageSets/Segmentation, JPEGImages and SegmentationClass is needed"
        raise DataError(f"{spec} is no VOCdevkit: {needed}")
    devkit = voc.absolute().parent
    places = [around / name / "dataset" for around in (devkit, devkit.parent)
              for name in ("VOCaug", "benchmark_RELEASE")]
    sbd = next((place for place in places if (place / "cls").is_dir()), None)
    if sbd is None:
        needed = "VOCaug/dataset or benchmark_RELEASE/dataset, with cls, train.txt and val.txt, is needed"
        raise DataError(f"{devkit} has no SBD: {needed} in it or beside it")
    own = {split: _lines(voc / "ImageSets" / "Segmentation" / f"{split}.txt") for split in ("train", "val")}
    added = {name for split in ("train", "val") for name in _lines(sbd / f"{split}.txt")}
    added = sorted(added - {*own["train"], *own["val"]})
    if (number := len(own["train"]) + len(added)) != 10_582:
        say(f"warning: {devkit} has {number} training images, the published protocol 10,582")

    def pair(name, labels):
        return os.path.join("JPEGImages", f"{name}.jpg"), str(labels)

    train, val = ([pair(name, Path("SegmentationClass", f"{name}.png")) for name in own[split]]
                  for split in ("train", "val"))
    train += [pair(name, os.path.relpath(sbd / "cls" / f"{name}.mat", voc.absolute())) for name in added]
    return Masks(voc, train, VOC_CLASSES), Masks(voc, val, VOC_CLASSES)


def _lines(path):
    with border(DataError, f"{path} cannot be read"):
        return [line.split()[0] for line in path.read_text().splitlines() if line.strip()]


def open_cityscapes(spec):
    """Returns (training, held-out) images of Cityscapes. spec holds leftImg8bit and gtFine, each with train
    and val. The ids in the files become the 19 training ids."""
    table = np.full(256, 255, np.uint8)
    table[list(CITYSCAPES_IDS)] = np.arange(len(CITYSCAPES_IDS))
    sets = []
    for split in ("train", "val"):
        end = "_leftImg8bit.png"
        images = sorted(Path(spec, "leftImg8bit", split).glob(f"*/*{end}"))
        if not images:
            needed = f"leftImg8bit/{split}/CITY/NAME{end} and gtFine/{split}/CITY/NAME_gtFine_labelIds.png"
            raise DataError(f"{spec} is no Cityscapes: {needed} are needed")
        names = [str(path.relative_to(spec)) for path in images]
        pairs = [(name, name.removesuffix(end).replace("leftImg8bit", "gtFine", 1) + "_gtFine_labelIds.png")
                 for name in names]
        sets.append(Masks(spec, pairs, CITYSCAPES_IDS.values(), table))
    return tuple(sets)
