"""Draws the embedded images: ten classes of shapes and textures."""

import functools

import numpy as np
import torch
from PIL import Image

from ..engine.errors import DataError


class Shapes:
    """Images of 32x32 pixels in ten classes, drawn on the fly as a function of (split, index) alone.

    Brightness, tint, place, size, rotation, background and noise are drawn independently of the class, so raw
    pixels and a random network say little about it. There are 5,000 training and 1,000 held-out images;
    "shapes:N" has N and N / 5.
    """

    classes = ("disc", "square", "triangle", "cross", "ring", "star", "stripes", "checks", "dots", "waves")

    def __init__(self, split, n=5_000):
        self.n = n if split == "train" else max(1, n // 5)
        self.split = split
        self.labels = torch.arange(self.n) % 10
        self.paths = [f"shapes/{split}/{i:06d}" for i in range(self.n)]
        self.fingerprint = f"shapes, second edition, {split} {self.n}"

    def __len__(self):
        return self.n

    def read(self, i):
        return drawn(i, self.split)


@functools.lru_cache(1 << 14)  # drawn once, not once per epoch
def drawn(i, split):
    return Image.fromarray(draw_shape(i % 10, np.random.default_rng((i, split == "val"))))


def draw_shape(label, rng, size=32):
    """Draws an image of class `label` (see Shapes.classes): (size, size, 3) uint8. rng decides everything but
    the class."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1  # -1 .. 1
    angle = rng.uniform(-0.8, 0.8)
    scale = rng.uniform(0.55, 0.8)
    x, y = (x - rng.uniform(-0.35, 0.35)) / scale, (y - rng.uniform(-0.35, 0.35)) / scale
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    frequency, phase = rng.uniform(5.5, 8.5), rng.uniform(0, 2 * np.pi, 2)
    # Signed distance from the outline: negative inside.
    if label < 6:
        distance = outline(label, u, v)
    elif label == 6:
        distance = np.sin(frequency * u + phase[0]) * 0.2
    elif label == 7:
        distance = np.sin(frequency * u + phase[0]) * np.sin(frequency * v + phase[1]) * 0.3
    elif label == 8:
        distance = 0.35 - (np.sin(frequency * u + phase[0]) * np.sin(frequency * v + phase[1])) ** 2
    else:
        distance = np.sin(frequency * (u + 0.35 * np.sin(3.5 * v + phase[1])) + phase[0]) * 0.2
    inside = np.clip(0.5 - distance * scale * size / 2, 0, 1)[..., None]  # one pixel of anti-aliasing
    ground, figure = rng.uniform(0.1, 0.9, 2)
    while abs(ground - figure) < 0.35:  # until it is visible
        ground, figure = rng.uniform(0.1, 0.9, 2)
    # Mostly brightness, little tint: with strong colours, colour alone would tell images apart.
    ground, figure = ground + rng.normal(0, 0.1, 3), figure + rng.normal(0, 0.1, 3)
    return lit(ground + inside * (figure - ground), rng)


def outline(label, u, v):
    """Returns signed distances of points u, v from the outline of class `label`, 0 to 5; negative inside."""
    radius = np.hypot(u, v)
    if label == 0:
        return radius - 0.9
    if label == 1:
        return np.maximum(abs(u), abs(v)) - 0.8
    if label == 2:
        return np.maximum(abs(u) * 0.866 + v * 0.5, -v) - 0.55
    if label == 3:
        return np.minimum(np.maximum(abs(u) - 0.28, abs(v) - 1), np.maximum(abs(v) - 0.28, abs(u) - 1))
    if label == 4:
        return abs(radius - 0.75) - 0.2
    return radius * (1 + 0.42 * np.cos(5 * np.arctan2(v, u))) - 0.6


def lit(image, rng):
    """Adds uneven light and noise to an image (s, s, 3) in 0 .. 1. Returns it as uint8."""
    size = len(image)
    slope = np.outer(np.linspace(-1, 1, size), rng.normal(0, 0.2, 3))
    shade = slope[:, None] + np.outer(np.linspace(-1, 1, size), rng.normal(0, 0.2, 3))[None]
    image = image + shade + rng.normal(0, 0.06, (size, size, 3))
    return (image.clip(0, 1) * 255).astype(np.uint8)


def count(text, name="shapes"):
    if not text.isdecimal() or not 0 < int(text[:8]) < 10**7:
        raise DataError(f"{name}:{text[:99]}: a number of images below 10 million is needed behind the colon")
    return int(text)
