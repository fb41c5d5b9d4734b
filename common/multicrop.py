"""Multi-crop in two steps: a worker cuts uint8 crops from an image, then the device changes their colours.

    crops = MultiCrop(images, (2, 6), (224, 96), [(0.14, 1), (0.05, 0.14)], Augmentation(), seed=0)
    index, views, params = crops[epoch, position, index]  # [(2, 3, 224, 224), (6, 3, 96, 96)] uint8, (8, 8)
    large, small = to_device(*collate([...])[1:], device)  # (2 B, 3, 224, 224), (6 B, 3, 96, 96)

All random choices depend on (seed, epoch, position) alone: the same on any rank, in any worker, and after a
resume. Needs torch, torchvision and Pillow only: copy this one file.
"""

import functools
import itertools
import math
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms import functional as TF

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, RGB in [0, 1]
STD = (0.229, 0.224, 0.225)
TRIES = 100  # unreadable images in a row before a sample is given up
THIN = 100  # an image longer than this many times its crops is scaled only in part
ORDERS = torch.tensor(list(itertools.permutations(range(4))))  # (24, 4), of the operations below
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class Augmentation:
    """Random changes of each crop besides its box and flip. Defaults are SwAV's: SimCLR's at strength 1.

    jitter: brightness, contrast and saturation factors in [1 - j, 1 + j], hue shift in [-j, j] of the colour
    circle.
    blur_sigma: in pixels, uniform. rotate: degrees, uniform in [-rotate, rotate]. *_p: probabilities.
    grey_first: turn grey before the jitter instead of after it.
    """

    jitter: tuple = (0.8, 0.8, 0.8, 0.2)
    jitter_p: float = 0.8
    grey_p: float = 0.2
    grey_first: bool = False
    blur_p: float = 0.5
    blur_sigma: tuple = (0.1, 2.0)
    rotate: float = 0.0

    def draw(self, rng):
        """Returns the eight params of one crop, always from the same number of random draws:

        0 to 3  factors of brightness, contrast and saturation; shift of the hue
        4       order of these four, 0 to 23; -1: no jitter
        5       grey: 0 no, 1 after the jitter, 2 before it
        6, 7    sigma of the blur in pixels, 0: none; angle in degrees
        """
        factors = [rng.uniform(max(0, 1 - j), 1 + j) for j in self.jitter[:3]]
        factors.append(rng.uniform(-self.jitter[3], self.jitter[3]))
        order = rng.randrange(24)
        if rng.random() >= self.jitter_p:
            factors, order = [1.0, 1.0, 1.0, 0.0], -1
        grey = (2 if self.grey_first else 1) if rng.random() < self.grey_p else 0
        sigma = rng.uniform(*self.blur_sigma)
        sigma = sigma if rng.random() < self.blur_p else 0.0
        return [*factors, order, grey, sigma, rng.uniform(-self.rotate, self.rotate)]


class MultiCrop:
    """Map-style set of multi-crops: [(epoch, position, index)] -> index, crops, params.

    crops: number of crops of each size; sizes: side in pixels; scales: (min, max) share of the image's area.
    Returns the index, a list of one (V_r, 3, s, s) uint8 tensor per size, and params (V, 8) float32 as drawn
    by Augmentation. Crops are random resized crops (ratio 3/4 to 4/3, antialiased bilinear) and flipped half
    of the time. An unreadable image is replaced by the next readable one, whose index is returned.
    """

    def __init__(self, images, crops, sizes, scales, augmentation, seed):
        if not len(crops) == len(sizes) == len(scales):
            raise ValueError(f"crops, sizes and scales need one entry per resolution: got {crops}, {sizes}, "
                             f"{scales}")
        self.images, self.crops, self.sizes, self.scales = images, crops, sizes, scales
        self.augmentation, self.seed = augmentation, seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, position, index = key
        index, sample = read_or_next(self.images, index,
                                     lambda image: self.cut(image, generator(self.seed, epoch, position)))
        if sample is None:
            return -1, [torch.zeros(n, 3, s, s, dtype=torch.uint8)
                        for n, s in zip(self.crops, self.sizes)], torch.zeros(sum(self.crops), 8)
        return index, *sample

    def cut(self, image, rng):
        """Draws the crops and params of an RGB PIL image."""
        pixels = to_tensor(image)
        crops, params = [], []
        for number, size, scale in zip(self.crops, self.sizes, self.scales):
            group = []
            for _ in range(number):
                top, left, height, width = random_box(*pixels.shape[1:], scale, rng)
                crop = resize(pixels[:, top : top + height, left : left + width], size)
                group.append(crop.flip(-1) if rng.random() < 0.5 else crop)
                params.append(self.augmentation.draw(rng))
            crops.append(torch.stack(group))  # (V_r, 3, s, s)
        return crops, torch.tensor(params)


class RandomCrop:
    """Map-style set like MultiCrop with one crop per image, cut as in older recipes: short side to `resize`,
    the central square of that side, a random square of `size` pixels in it, flipped half of the time."""

    def __init__(self, images, resize, size, augmentation, seed):
        self.images, self.resize, self.size = images, resize, size
        self.augmentation, self.seed = augmentation, seed

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, position, index = key
        index, square = read_or_next(self.images, index,
                                     lambda image: center(image, self.resize, self.resize))
        if square is None:
            return -1, [torch.zeros(1, 3, self.size, self.size, dtype=torch.uint8)], torch.zeros(1, 8)
        rng = generator(self.seed, epoch, position)
        top, left = (rng.randint(0, self.resize - self.size) for _ in range(2))
        crop = square[:, top : top + self.size, left : left + self.size]
        crop = crop.flip(-1) if rng.random() < 0.5 else crop
        return index, [crop[None]], torch.tensor([self.augmentation.draw(rng)])


class CenterCrop:
    """Map-style set like MultiCrop with one centre crop per image and unchanged colours, for evaluations.

    flip: flip it half of the time, as (seed, epoch, position) decide.
    """

    views = 1

    def __init__(self, images, resize, size, seed=0, flip=False):
        self.images, self.resize, self.size, self.seed, self.flip = images, resize, size, seed, flip

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        index, crops = read_or_next(self.images, key[-1], self.cut)
        off = torch.tensor([[1.0, 1, 1, 0, -1, 0, 0, 0]]).expand(self.views, -1)
        if crops is None:
            return -1, [torch.zeros(self.views, 3, self.size, self.size, dtype=torch.uint8)], off
        if self.flip and generator(self.seed, *key[:2]).random() < 0.5:
            crops = crops.flip(-1)
        return index, [crops], off

    def cut(self, image):
        return center(image, self.resize, self.size)[None]


class TenCrop(CenterCrop):
    """Like CenterCrop with ten crops per image: the four corners and the centre, and their mirror images."""

    views = 10

    def cut(self, image):
        crops = TF.ten_crop(scaled(image, self.resize, self.size), self.size)
        return torch.stack([to_tensor(crop) for crop in crops])


class Warp(CenterCrop):
    """Like CenterCrop with the whole image: short side to `resize`, then squeezed to `size` x `size` pixels
    whatever its shape."""

    def cut(self, image):
        most = THIN * max(self.resize, self.size)  # limit of the long side, which is squeezed to `size`
        sides = [min(most, int(self.resize * side / min(image.size))) for side in image.size[::-1]]
        return to_tensor(TF.resize(TF.resize(image, sides), (self.size, self.size)))[None]


def collate(samples):
    """Stacks samples (index, [(V_r, 3, s, s)], (V, 8)) to (B,), [(V_r, B, 3, s, s)] and (V, B, 8)."""
    index, crops, params = zip(*samples)
    crops = [torch.stack(group, dim=1) for group in zip(*crops)]
    return torch.tensor(index), crops, torch.stack(params, dim=1)


def read_or_next(images, index, cut=lambda image: image):
    """Returns (index, cut(image)) of the first image from `index` on that can be read and that fits in memory
    when cut; (index, None) if TRIES images in a row fail."""
    for i in range(min(TRIES, len(images))):
        try:
            image = images.read((index + i) % len(images))
        except Exception:  # Pillow's plug-ins raise a dozen kinds of errors for damaged files
            continue
        try:
            return (index + i) % len(images), cut(image)
        except (MemoryError, RuntimeError) as error:
            if "memory" not in f"{type(error).__name__} {error}".lower():
                raise
    return index, None


def generator(seed, epoch, position):
    """Returns the random generator of one image: the same on any rank, in any worker and after a resume."""
    return random.Random((seed << 128) | (epoch << 64) | position)


def to_tensor(image):
    """Converts a PIL RGB image to (3, H, W) uint8, channels last in memory: the fastest to resize."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def resize(pixels, size):
    """Resizes (3, h, w) uint8 to (3, size, size) uint8, antialiased bilinear: within 1 of Pillow's."""
    return F.interpolate(pixels[None], (size, size), mode="bilinear", antialias=True)[0]


def center(image, resize, size):
    """Cuts a PIL image to (3, size, size) uint8: short side to `resize`, then the central square."""
    return to_tensor(TF.center_crop(scaled(image, resize, size), size))


def scaled(image, resize, size):
    """Scales the short side of a PIL image to `resize`, to cut squares of `size` from its middle and ends.

    Of a very thin image it returns only the parts where those squares lie, side by side: the first, the
    central and the last `size` pixels of its length. Else 10,000 x 1 pixels would become 2,560,000 x 256.
    """
    short, long = sorted(image.size)
    length = int(resize * long / short)  # as torchvision rounds it
    if length <= THIN * max(resize, size):
        return TF.resize(image, resize)
    axis, step = image.size.index(long), long / length  # step: image pixels per scaled pixel
    middle = size + (length - 3 * size) % 4  # so that the centre rounds as in the whole image
    strip = Image.new(image.mode, _along(axis, 2 * size + middle, resize))
    area, place = [0, 0, *image.size], 0
    for first, count in ((0, size), ((length - middle) // 2, middle), (length - size, size)):
        start, end = first * step, min(long, (first + count) * step)
        margin = math.ceil(step) + 1  # pixels beyond the part that the filter reads
        area[axis::2] = max(0, int(start) - margin), min(long, int(end) + margin)
        box = [0, 0, *image.size]
        box[axis::2] = start - area[axis], end - area[axis]  # small numbers: Pillow stores them in float32
        part = image.crop(area).resize(_along(axis, count, resize), Image.Resampling.BILINEAR, box)
        strip.paste(part, _along(axis, place, 0))
        place += count
    return strip


def _along(axis, along, across):
    return (across, along) if axis else (along, across)


def random_box(height, width, scale, rng, ratio=(3 / 4, 4 / 3)):
    """Draws (top, left, height, width) of a random resized crop: uniform area, log-uniform aspect ratio.

    After ten failed tries: the largest central box within the ratio, as in torchvision's RandomResizedCrop.
    """
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return rng.randint(0, height - h), rng.randint(0, width - w), h, w
    h, w = height, width
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


@torch.no_grad()
def photometric(crops, params, mean=MEAN, std=STD, dtype=torch.float32):
    """Changes the colours of a whole batch, each crop by its own params; then blurs, rotates, normalises.

    crops: (B, 3, s, s) uint8, on any device. params: (B, 8) as drawn by Augmentation; on the CPU, so that
    choosing the crops of each operation never waits for a GPU: one copy sends all choices there. Returns (B,
    3, s, s) of dtype, channels last. Agrees with torchvision's functional transforms on float tensors to
    1e-4.
    """
    params = params.cpu()
    # Each crop has its own order of operations. Shifting the hue costs most, so it runs once for all crops,
    # between the operations that come before it in a crop's order and those that come after it.
    jittered, order = params[:, 4] >= 0, ORDERS[params[:, 4].long().clamp(min=0)].T  # (B,), (4, B)
    place, hue_place = torch.arange(4)[:, None], (order == HUE).int().argmax(0)  # (4, 1), (B,)
    before, behind = jittered & (place < hue_place), jittered & (place > hue_place)  # (4, B) each
    factors = params[:, :4].T.gather(0, order)  # (4, B), factor of the operation at each place
    blends = torch.stack([factors, order == CONTRAST, order == SATURATION], dim=2)  # (4, B, 3)
    columns = params[:, :, None].expand(-1, -1, 3).unbind(1)  # 8 of (B, 3)
    steps = [(_grey, params[:, 5] == 2, columns[5]),
             *((_blend, *at) for at in zip(before[:3], blends[:3])),
             (_shift_hue, jittered, columns[3]),
             *((_blend, *at) for at in zip(behind[1:], blends[1:])),
             (_grey, params[:, 5] == 1, columns[5]),
             (_blur, params[:, 6] > 0, columns[6]),
             (_rotate, params[:, 7] != 0, columns[7])]
    functions, masks, values = zip(*steps)
    masks = torch.stack(masks)  # (steps, B)
    counts, rows, values = masks.sum(1).tolist(), masks.nonzero()[:, 1], torch.stack(values)[masks].to(dtype)
    if crops.is_cuda:
        rows, values = rows.pin_memory(), values.pin_memory()
    rows, values = (t.to(crops.device, non_blocking=True).split(counts) for t in (rows, values))

    x = crops.to(dtype) / 255
    for function, chosen, value in zip(functions, rows, values):
        if len(chosen):
            x[chosen] = function(x[chosen], value[:, :, None, None, None])  # (n, 3, s, s), (n, 3, 1, 1, 1)
    mean, std = (_constant(tuple(v), x.device, dtype) for v in (mean, std))  # (3, 1, 1)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.cache
def _constant(values, device, dtype):
    """Returns one number per channel, (C, 1, 1), kept on the device."""
    return torch.tensor(values, dtype=dtype)[:, None, None].to(device, non_blocking=True)


def to_device(crops, params, device, dtype=torch.float32):
    """Converts a batch of the loader, crops [(V_r, B, 3, s, s) uint8] and params (V, B, 8), to a network's
    input: one (V_r B, 3, s, s) of dtype per resolution, crop-major, augmented on the device."""
    rows = params.split([len(group) for group in crops])
    return [photometric(group.flatten(0, 1).to(device, non_blocking=True), row.flatten(0, 1),
                        dtype=dtype) for group, row in zip(crops, rows)]


# ---- operations on crops x (n, 3, s, s) with values (n, 3, 1, 1, 1): three numbers, or one repeated


def _luma(x):
    grey = 0.2989 * x[:, :1]  # ITU-R 601
    return grey.add_(x[:, 1:2], alpha=0.587).add_(x[:, 2:], alpha=0.114)  # (n, 1, s, s)


def _grey(x, values):
    return _luma(x).expand_as(x)


def _blend(x, values):
    """Blends x with black (brightness), with its mean luma (contrast) or with its luma (saturation).

    values: the factor of x; 1 for contrast, else 0; 1 for saturation, else 0.
    """
    (factor, contrast, saturation), luma = values.unbind(1), _luma(x)  # (n, 1, 1, 1), (n, 1, s, s)
    other = torch.addcmul(contrast * luma.mean(dim=(1, 2, 3), keepdim=True), saturation, luma)
    return torch.lerp(other, x, factor).clamp_(0, 1)


def _shift_hue(x, values):
    """Shifts the hue by a share of a turn: RGB to HSV and back, without a branch."""
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    # 0 for the largest channel
    r, g, b = ((value - x) / chroma.clamp(min=torch.finfo(x.dtype).tiny)).split(1, dim=1)
    hue = torch.where(r == 0, b - g, torch.where(g == 0, 2 + r - b, 4 + g - r))  # in sixths of a turn
    hue = hue + values[:, 0] * 6
    k = (_constant((5.0, 3.0, 1.0), x.device, x.dtype) + hue).remainder(6)
    return value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1)


def _blur(x, values, radius=11):
    """Applies a Gaussian blur with reflected borders: two products with a banded matrix per crop, K x K^T.

    Radius 11 (a 23-pixel kernel) is what the published SwAV models were trained with.
    """
    size = x.shape[-1]
    radius = min(radius, size - 1)
    taps = torch.arange(-radius, radius + 1, device=x.device)
    kernel = torch.exp(-0.5 * (taps / values[:, 0].view(-1, 1)) ** 2)  # (B, 2 radius + 1)
    kernel = kernel / kernel.sum(dim=1, keepdim=True)
    place = torch.arange(size, device=x.device)[:, None] + taps  # (s, taps): the pixel each tap reads
    place = (size - 1 - (size - 1 - place.abs()).abs()).expand(len(x), -1, -1)  # reflected at both ends
    kernel = kernel[:, None].expand_as(place).to(x.dtype)  # (B, s, taps)
    matrix = x.new_zeros(len(x), size, size).scatter_add_(2, place, kernel)[:, None]  # (B, 1, s, s)
    return matrix @ x @ matrix.transpose(2, 3)


def _rotate(x, values):
    """Rotates counter-clockwise by degrees around the centre: nearest pixel, black outside."""
    angle = values[:, 0].view(-1) * (math.pi / 180)
    zero = torch.zeros_like(angle)
    turn = torch.stack([angle.cos(), -angle.sin(), zero, angle.sin(), angle.cos(), zero], dim=1)  # (B, 6)
    grid = F.affine_grid(turn.view(-1, 2, 3), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, mode="nearest", align_corners=False)
