"""Image files: those below a folder, and what is in them."""

import hashlib
import os
import time
import warnings

import numpy as np
import torch
from PIL import Image

from ..engine.errors import DataError

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif",
              ".jp2"}
# errno of a network file system's bad moments: EIO, EAGAIN, ETIMEDOUT, ESTALE, EREMOTEIO
RETRIED = {5, 11, 110, 116, 121}


class Files:
    """Image files. Paths are packed into one array, so a million of them cost a worker nothing."""

    def __init__(self, root, paths, labels=None, classes=(), numbered=False):
        encoded = [os.fsencode(path) for path in paths]
        # Tensors live in shared memory when a worker is spawned, and hold no Python objects that a fork would
        # copy.
        self._bytes = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self._ends = torch.from_numpy(np.cumsum([len(e) for e in encoded], dtype=np.int64))
        # numbered: the classes have no names
        self.root, self.classes, self.numbered = str(root), list(classes), numbered
        self.labels = None if labels is None else torch.tensor(labels, dtype=torch.int64)
        digest = hashlib.sha256(b"\0".join(encoded)).hexdigest()
        self.fingerprint = f"{len(encoded)} files {digest[:16]}"
        self.paths = _Paths(self)

    def __len__(self):
        return len(self._ends)

    def path(self, i):
        start = int(self._ends[i - 1]) if i else 0
        return os.fsdecode(self._bytes[start : int(self._ends[i])].numpy().tobytes())

    def read(self, i):
        return decode(os.path.join(self.root, self.path(i)))


class _Paths:
    """The paths of a Files set as a sequence of strings, made when asked for."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.files.path(i)


def decode(path):
    """The first frame of an image file as an 8-bit RGB PIL image.

    16-bit and floating-point grey are scaled to 8 bits; CMYK, palette, grey and alpha are converted, and
    transparency is dropped; the EXIF orientation is ignored, as in the papers. Files over Pillow's limit of
    179 million pixels are refused. Raises what Pillow raises for a file that it cannot read.
    """
    for attempt in (1, 2, 3):
        try:
            with warnings.catch_warnings():
                # damaged EXIF, large images: thousands of lines in a real data set
                warnings.simplefilter("ignore")
                with Image.open(path) as image:
                    return _to_rgb(image)
        except OSError as error:
            if error.errno not in RETRIED or attempt == 3:
                raise
            time.sleep(0.1 * 10**attempt)


def _to_rgb(image):
    if image.mode.startswith("I") or image.mode == "F":  # Pillow itself clips these to white or black
        pixels = np.asarray(image, dtype=np.float64)
        if not np.isfinite(pixels).all():
            raise ValueError("pixels that are not finite")
        top = 65535 if pixels.max() > 255 else 255 if pixels.max() > 1 or image.mode != "F" else 1
        top = 65535 if image.mode.startswith("I;16") else max(top, pixels.max())
        image = Image.fromarray((pixels.clip(0) / top * 255).round().astype(np.uint8))
    return image.convert("RGB")


def scan(root):
    """Image files below root in name order. Class = first folder below the root; no labels if images lie in
    it."""
    paths, empty, seen = [], [], set()
    real_root = os.path.realpath(root)

    def walk(relative):
        found = False
        folder = os.path.join(root, relative)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name))
        except OSError as error:
            raise DataError(f"{folder} cannot be read: {error.strerror}") from None
        for entry in entries:
            if entry.name.startswith("."):  # .DS_Store, ._photo.jpg, .thumbnails
                continue
            name = os.path.join(relative, entry.name)
            if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                if entry.is_symlink():  # a link back into the tree would count images twice, or without end
                    real = os.path.realpath(entry.path)
                    if real in seen or os.path.commonpath([real, real_root]) in (real, real_root):
                        continue
                    seen.add(real)
                inside = walk(name)
                if not inside and not relative:
                    empty.append(entry.name)
                found = found or inside
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                paths.append(name)
                found = True
        return found

    walk("")
    if not paths:
        raise DataError(f"{root} holds no images ({' '.join(sorted(EXTENSIONS))})")
    if any(os.sep not in path for path in paths):
        return Files(root, paths)
    if empty:
        print(f"warning: {root}: {len(empty)} folders without images are left out: "
              f"{', '.join(map(repr, empty[:3]))}")
    classes = sorted({path.split(os.sep, 1)[0] for path in paths}, key=os.fsencode)
    number = {name: i for i, name in enumerate(classes)}
    return Files(root, paths, [number[path.split(os.sep, 1)[0]] for path in paths], classes)
