"""Draws the embedded scenes: objects with their boxes, masks and a label map."""

import functools

import numpy as np
from PIL import Image

from ..engine.errors import DataError
from .shapes import Shapes, count, lit, outline

SIZE = 64
SMALLEST = 16  # least number of visible pixels of an object


class Scenes:
    """Scenes of 64x64 pixels, drawn on the fly as a function of (split, index) alone. Each has one to three
    objects of the six classes of Shapes that have an outline. Later objects cover earlier ones, and the
    border cuts some. There are 2,000 training and 400 held-out scenes; "scenes:N" has N and N / 5. Labels are
    1 .. 6, and 0 is background.
    """

    classes = Shapes.classes[:6]

    def __init__(self, split, n=2_000):
        self.n = n if split == "train" else max(1, n // 5)
        self.split = split
        self.paths = [f"scenes/{split}/{i:06d}" for i in range(self.n)]
        self.fingerprint = f"scenes, {split} {self.n}"

    def __len__(self):
        return self.n

    def read(self, i):
        return Image.fromarray(drawn(i, self.split)[0])

    def label_map(self, i):
        """Returns (64, 64) uint8. Pixels on an outline are 255, ignored: their side cannot be seen."""
        return drawn(i, self.split)[1].copy()

    def objects(self, i):
        """Returns arrays of the n objects, the lowest first: masks (n, 64, 64) bool of the visible pixels;
        boxes (n, 4) float32 around these, x1 y1 x2 y2, x2 and y2 exclusive; labels (n,) int64; difficult and
        crowd (n,) bool, all False."""
        _, _, owner, labels = drawn(i, self.split)
        masks = owner == np.arange(1, len(labels) + 1)[:, None, None]  # (n, 64, 64)
        boxes, none = np.array([box(mask) for mask in masks], np.float32), np.zeros((2, len(labels)), bool)
        return dict(boxes=boxes, labels=labels.copy(), masks=masks, difficult=none[0], crowd=none[1])


def box(mask):
    rows, columns = mask.any(1).nonzero()[0], mask.any(0).nonzero()[0]
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1


@functools.lru_cache(1 << 12)  # drawn once, not once per epoch
def drawn(i, split):
    """Returns pixels (64, 64, 3), label map (64, 64) and owner (64, 64), all uint8, and labels (n,) int64.
    owner: number 1 .. n of the object that is visible, 0 for none."""
    rng = np.random.default_rng((i, split == "val", SIZE))
    objects = [place(rng) for _ in range(rng.integers(1, 4))]
    for number in reversed(range(len(objects))):  # deletes those that others hide
        above = np.any([distance < 0 for _, _, distance in objects[number + 1 :]], axis=0)
        if ((objects[number][2] < 0) & ~above).sum() < SMALLEST:
            del objects[number]

    def colour():
        return rng.uniform(0.1, 0.9) + rng.normal(0, 0.1, 3)  # mostly brightness, little tint: see Shapes

    image = np.broadcast_to(colour(), (SIZE, SIZE, 3))
    label_map, owner = np.zeros((2, SIZE, SIZE), np.uint8)
    for number, (label, (y, x), distance) in enumerate(objects, 1):
        figure = colour()
        while abs(figure - image[int(y), int(x)]).sum() < 0.8:  # until it is visible
            figure = colour()
        image = image + np.clip(0.5 - distance, 0, 1)[..., None] * (figure - image)  # anti-aliased
        owner[distance < 0] = number
        label_map[distance < 0] = label
        label_map[abs(distance) < 0.5] = 255
    return lit(image, rng), label_map, owner, np.array([label for label, *_ in objects], np.int64)


def place(rng):
    """Draws an object's label, centre (y, x), and pixels' distances from its outline, negative inside."""
    label, radius, angle = rng.integers(6), SIZE * rng.uniform(0.14, 0.26), rng.uniform(-0.5, 0.5)
    centre = rng.uniform(0.7 * radius, SIZE - 0.7 * radius, 2)
    y, x = (np.mgrid[:SIZE, :SIZE] + 0.5 - centre[:, None, None]) / radius
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    return int(label) + 1, centre, outline(label, u, v) * radius


def open_scenes(spec):
    """Returns (training, held-out) drawn scenes. spec: "", "scenes" or "scenes:N"."""
    name, colon, number = spec.partition(":")
    if name not in ("", "scenes"):
        raise DataError(f"--data {spec}: this preset is for scenes, or scenes:N for N of them")
    return tuple(Scenes(split, *([count(number, "scenes")] if colon else [])) for split in ("train", "val"))
