"""Prepares images with objects for a detector: loader workers resize them, `batch` makes them one tensor."""

import numpy as np
import torch
from PIL import Image

from ..multicrop import generator, read_or_next, to_tensor
from . import dense


class Examples:
    """Map-style set for data.Loader with `collate` (below). Scales an image so that its short side is one of
    `sizes` and its long side at most `longest`. (seed, epoch, position) alone decide what is drawn.

    seed None: draws nothing, for a test: the last of sizes, no flip. masks: whether to return those of the
    objects.
    """

    def __init__(self, images, sizes, longest, seed=None, masks=False):
        self.images, self.sizes, self.longest = images, sizes, longest
        self.seed, self.masks = seed, masks

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        """Returns index, pixels (3, h, w) uint8 and the target: original (H, W), boxes (n, 4) in pixels of
        the scaled image, labels (n,), maybe masks (n, h, w), and a seed for the detector's sampling."""
        epoch, position, index = key
        index, image = read_or_next(self.images, index)
        if image is None:
            return -1, torch.zeros(3, 32, 32, dtype=torch.uint8), nothing()
        target = {"original": (image.height, image.width)}
        if self.seed is None:
            image = image.resize(scaled(image, self.sizes[-1], self.longest), BILINEAR)
            return index, to_tensor(image), target
        rng = generator(self.seed, epoch, position)
        size, flip, target["seed"] = rng.choice(self.sizes), rng.random() < 0.5, rng.getrandbits(60)
        width, height = scaled(image, size, self.longest)
        boxes, target["labels"], masks = self.objects(index)
        boxes = boxes * np.float32([width / image.width, height / image.height] * 2)
        if masks is not None:
            masks = [Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST)
                     for mask in masks.astype(np.uint8)]
            target["masks"] = np.array(masks, np.uint8).reshape(-1, height, width)
        image = image.resize((width, height), BILINEAR)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
            if masks is not None:
                target["masks"] = target["masks"][:, :, ::-1].copy()
        target["boxes"] = boxes
        return index, to_tensor(image), target

    def objects(self, i):
        """Returns boxes, labels and masks (or None) to train on: with difficult objects, without crowds."""
        found = self.images.objects(i)
        single = ~found["crowd"]
        masks = None
        if self.masks:
            masks = self.images.masks(i, single) if "masks" not in found else found["masks"][single]
        return found["boxes"][single], found["labels"][single], masks


BILINEAR = Image.Resampling.BILINEAR


def nothing():
    """Returns a target for an unreadable image: training goes on until the next check on all ranks. It has
    one object, as a mask head's batch norm must not see zero."""
    return {"original": (32, 32), "boxes": np.float32([[0, 0, 32, 32]]), "labels": np.ones(1, np.int64),
            "masks": np.ones((1, 32, 32), np.uint8), "seed": 0}


def scaled(image, short, longest):
    """Returns the (width, height) of an image whose short side becomes `short`, or less if the long side
    would exceed `longest`."""
    scale = min(short / min(image.size), longest / max(image.size))
    return tuple(max(1, int(side * scale + 0.5)) for side in image.size)


def collate(samples):
    index, pixels, targets = zip(*samples)
    return torch.tensor(index), list(pixels), list(targets)


def batch(pixels, targets, how, dtype):
    """Returns (x (B, 3, H, W) normalised, sizes [(h, w)], targets as tensors). Pads images with zeros to the
    right and below, to the largest of the batch, rounded up to a multiple of 32."""
    device = how["device"]
    sizes = [tuple(image.shape[1:]) for image in pixels]
    height, width = (-(-max(sides) // 32) * 32 for sides in zip(*sizes))
    x = torch.zeros(len(pixels), 3, height, width, dtype=dtype, device=device)
    for place, image, (h, w) in zip(x, pixels, sizes):
        image = image[None].to(device, non_blocking=True)
        place[:, :h, :w] = dense.normalised(image, how["mean"], how["std"], dtype)[0]
    tensors = [{name: torch.from_numpy(value).to(device, dtype if name == "boxes" else None)
                for name, value in target.items() if isinstance(value, np.ndarray)}
               | {"seed": target.get("seed")} for target in targets]
    return x.contiguous(memory_format=torch.channels_last), sizes, tensors


def in_pairs(wide, seed, epoch):
    """Returns a random order of all images. Places 2i and 2i + 1 are both wide or both high, so that a
    process with two images pads little; at most one pair is mixed, and an odd last image is alone.

    wide (N,) bool. (seed, epoch) alone decide the order.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(wide))
    kinds = [order[wide[order]], order[~wide[order]]]
    left = np.concatenate([kind[len(kind) // 2 * 2 :] for kind in kinds])  # 0 to 2 images
    pairs = np.concatenate([*(kind[: len(kind) // 2 * 2] for kind in kinds), left[: len(left) // 2 * 2]])
    pairs = rng.permutation(pairs.reshape(-1, 2)).ravel()
    return np.concatenate([pairs, left[len(left) // 2 * 2 :]])
