"""Prepares images with label maps for segmentation: random crops for training, whole images for test.

Follows the mmsegmentation pipelines that the published protocols name.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ..engine.errors import WorkerError
from ..multicrop import generator, read_or_next, to_tensor

IGNORED = 255  # the label of pixels that are left out


class Pairs:
    """A set whose read(i) returns (i, image, labels). If one of the two cannot be read, neither is used."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return i, self.images.read(i), self.images.label_map(i)

    def checked(self, i, image, labels):
        """Returns (3, H, W) and (H, W) uint8. Raises WorkerError, which this rank reports, if the labels do
        not fit the image or the classes."""
        path, classes = self.images.paths[i], len(self.images.classes)
        if labels.shape != image.size[::-1]:
            sides = f"{labels.shape[1]}x{labels.shape[0]}, the image {image.width}x{image.height}"
            raise WorkerError(f"{path}: its map of labels has {sides} pixels")
        if (wrong := labels[(labels >= classes) & (labels != IGNORED)]).size:
            raise WorkerError(f"{path}: its map of labels has a {wrong[0]}, {classes} classes are known")
        return to_tensor(image), torch.from_numpy(labels)


def fit(pixels, sides, nearest=False):
    """Scales uint8 (..., H, W) to fit into sides (long, short), keeping its aspect ratio. Does not antialias,
    like OpenCV."""
    height, width = pixels.shape[-2:]
    scale = min(max(sides) / max(height, width), min(sides) / min(height, width))
    size = [max(1, int(side * scale + 0.5)) for side in (height, width)]
    if nearest:
        return F.interpolate(pixels[None, None], size, mode="nearest")[0, 0]
    return F.interpolate(pixels[None], size, mode="bilinear", align_corners=False)[0]


class Crops:
    """Map-style set like multicrop's: [(epoch, position, index)] -> index, [crop (1, 3, s, s), labels (1, s,
    s)] uint8, and (1, 2): height and width of the image inside the crop. The rest is padding with label 255.

    p: a preset of eval_segmentation.py. Steps in order: scale to base times a random ratio, crop, flip half
    of the time, distort colours, pad.
    """

    def __init__(self, images, p, seed):
        self.pairs, self.p, self.seed = Pairs(images), p, seed

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, key):
        epoch, position, index = key
        index, sample = read_or_next(self.pairs, index,
                                     lambda pair: self.cut(*pair, generator(self.seed, epoch, position)))
        if sample is None:
            blank = torch.full((4, self.p.crop, self.p.crop), IGNORED, dtype=torch.uint8)
            index, sample = -1, (blank[:3], blank[3], blank.shape[1:])
        crop, labels, size = sample
        return index, [crop[None], labels[None]], torch.tensor([size])

    def cut(self, i, image, labels, rng):
        pixels, labels = self.pairs.checked(i, image, labels)
        ratio, size = rng.uniform(*self.p.ratios), self.p.crop
        sides = [int(side * ratio) for side in self.p.base]
        pixels, labels = fit(pixels, sides), fit(labels, sides, nearest=True)
        for _ in range(11):  # tries for a crop of mixed classes; the last is kept anyway
            top, left = (rng.randint(0, max(0, side - size)) for side in labels.shape)
            part = labels[top : top + size, left : left + size]
            counts = part[part != IGNORED].long().bincount()
            if (counts > 0).sum() > 1 and counts.max() < 0.75 * counts.sum():
                break
        labels, pixels = part, pixels[:, top : top + size, left : left + size]
        if rng.random() < 0.5:
            pixels, labels = pixels.flip(-1), labels.flip(-1)
        pixels = to_tensor(distort(pixels.permute(1, 2, 0).numpy(), rng))
        height, width = labels.shape
        pad = (0, size - width, 0, size - height)
        return F.pad(pixels, pad), F.pad(labels, pad, value=IGNORED), [height, width]


def distort(pixels, rng):
    """Distorts (H, W, 3) uint8 photometrically: brightness, contrast, saturation and hue, each half of the
    time. Contrast comes, with equal chance, before or after the last two. Hue has Pillow's 256 steps."""

    def changed(x, factor=1.0, shift=0.0):
        return (x.astype(np.float32) * factor + shift).clip(0, 255).astype(np.uint8)

    brightness, contrast = rng.uniform(-32, 32), rng.uniform(0.5, 1.5)
    saturation, hue = rng.uniform(0.5, 1.5), rng.randrange(-18, 18)  # hue: a full turn is 180
    brighter, contrasted, first, saturated, turned = (rng.random() < 0.5 for _ in range(5))
    pixels = changed(pixels, shift=brightness) if brighter else pixels
    pixels = changed(pixels, contrast) if contrasted and first else pixels
    if saturated or turned:
        hsv = np.array(Image.fromarray(np.ascontiguousarray(pixels)).convert("HSV"))
        if saturated:
            hsv[..., 1] = changed(hsv[..., 1], saturation)
        if turned:
            hsv[..., 0] += np.uint8(round(hue * 256 / 180) % 256)  # modulo 256
        pixels = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    return changed(pixels, contrast) if contrasted and not first else pixels


class Whole:
    """Returns the same for a whole test image, scaled to base. Its labels keep their size."""

    def __init__(self, images, p):
        self.pairs, self.p = Pairs(images), p

    def __len__(self):
        return len(self.pairs)

    def __getitem__(self, key):
        index, sample = read_or_next(self.pairs, key[-1], lambda pair: self.pairs.checked(*pair))
        if sample is None:
            blank = torch.full((1, 4, 1, 1), IGNORED, dtype=torch.uint8)
            return -1, [blank[:, :3], blank[:, 3]], torch.zeros(1, 2)
        pixels, labels = sample
        return index, [fit(pixels, self.p.base)[None], labels[None]], torch.zeros(1, 2)
