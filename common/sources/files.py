"""Finds the image files below a folder, and decodes them."""

import contextlib
import errno
import hashlib
import os
import stat
import tempfile
import time
import warnings
from collections import Counter

import numpy as np
import torch
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ..engine.errors import DataError, border, reason, say
from . import packed

EXTENSIONS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff",
              ".gif", ".avif", ".jp2"}
# Only Pillow's formats with these endings: an EPS file, whatever its name is, would start Ghostscript.
FORMATS = sorted({kind for ending, kind in Image.registered_extensions().items() if ending in EXTENSIONS})
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # one text may use the limit for all: 64 MB
# Left out, as are hidden files and folders: what systems put beside photos (thumbnails, deleted files).
FOREIGN = {"@eaDir", "#recycle", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found",
           "Thumbs.db", "desktop.ini"}
# passing errors of network file systems; 121: EREMOTEIO, which only Linux defines
RETRIED = {errno.EIO, errno.EAGAIN, errno.ETIMEDOUT, errno.ESTALE, 121}
TURN = Image.Transpose
UPRIGHT = {2: TURN.FLIP_LEFT_RIGHT, 3: TURN.ROTATE_180, 4: TURN.FLIP_TOP_BOTTOM, 5: TURN.TRANSPOSE,
           6: TURN.ROTATE_270, 7: TURN.TRANSVERSE, 8: TURN.ROTATE_90}  # by EXIF orientation


class Files:
    """A set of image files. Paths are packed into arrays, so a million of them cost a worker nothing.
    Pickling writes these arrays to a file, which ranks and workers memory-map, and passes on its name."""

    range, exif = (), False  # see open_images

    def __init__(self, root, paths, labels=None, classes=(), numbered=False):
        encoded = [os.fsencode(path) for path in paths]
        arrays = {"names": np.frombuffer(b"".join(encoded), np.uint8),
                  "ends": np.cumsum([len(e) for e in encoded], dtype=np.int64)}
        if labels is not None:
            arrays["labels"] = np.array(labels, np.int64)
        digest = hashlib.sha256(b"\0".join(encoded)).hexdigest()
        # numbered: the classes have numbers only, no names
        self._hold(arrays, dict(root=str(root), classes=list(classes), numbered=numbered,
                                fingerprint=f"{len(encoded)} files {digest[:16]}"))

    def _hold(self, arrays, about, file=None):
        self.__dict__.update(about)
        self._about, self._arrays, self._file = list(about), arrays, file
        self._labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
        self.paths = _Paths(self)
        self.refused = {}  # {index: reason} of what this process could not read

    @classmethod
    def of(cls, arrays, about, file=None):
        """Makes the set of these arrays. file: the one that they lie in, if any."""
        images = cls.__new__(cls)
        images._hold(arrays, about, file)
        return images

    @classmethod
    def mapped(cls, file):
        return cls.of(*packed.mapped(file), file)

    def save(self, file):
        """Writes the arrays and the set's other attributes to an open file."""
        packed.save(file, self._arrays, {name: getattr(self, name) for name in self._about})

    def __reduce__(self):
        if self._file is None:
            with border(DataError, f"{tempfile.gettempdir()} cannot hold the list of the images"):
                # A file without a name disappears when this process ends, however it ends.
                proc = os.path.exists("/proc/self/fd")
                self._open = (tempfile.TemporaryFile if proc else tempfile.NamedTemporaryFile)()
                self.save(self._open)
                self._file = f"/proc/{os.getpid()}/fd/{self._open.fileno()}" if proc else self._open.name
        return type(self).mapped, (self._file,), {"range": self.range, "exif": self.exif}

    @property
    def labels(self):
        return self._labels

    @labels.setter
    def labels(self, labels):
        self._labels, self._file = labels, None
        self._arrays["labels"] = labels.numpy()

    def __len__(self):
        return len(self._arrays["ends"])

    def path(self, i):
        ends = self._arrays["ends"]
        return os.fsdecode(self._arrays["names"][ends[i - 1] if i else 0 : ends[i]].tobytes())

    def read(self, i):
        """Returns image i as RGB. One that could not be read is not tried again: a bad disk takes seconds per
        attempt."""
        if i in self.refused:
            raise OSError(0, self.refused[i])
        try:
            return decode(self.source(i), self.range, self.exif)
        except Exception as error:
            self.refused[i] = reason(error)
            raise

    def source(self, i):
        """Returns what `decode` reads image i from."""
        return os.path.join(self.root, self.path(i))

    def sample(self, i):
        """Returns some pixels of image i if it is grey with more than 8 bits, else None."""
        return decode(self.source(i), make=deep_pixels)


def measure(images, name):
    """Sets images.range, if unset, from the grey images of more than 8 bits among 256 of the set. Prints
    which share of their pixels lies outside. The same files give the same range, also in a resumed run."""
    found = []
    for i in np.unique(np.linspace(0, len(images) - 1, 256).astype(int)).tolist():
        with contextlib.suppress(Exception):  # reported when the image is used
            found.append(images.sample(i))
    found = [pixels for pixels in found if pixels is not None]
    if found:
        pixels = np.concatenate(found)
        low, high = images.range = images.range or _limits(pixels)
        cut = 100 * np.count_nonzero((pixels < low) | (pixels > high)) / max(1, len(pixels))
        say(f"{name}: grey of more than 8 bits goes from {low:g} (black) to {high:g} (white); "
            f"{cut:.2g} % of the pixels of {len(found)} images lie beyond")
    elif images.range:
        say(f"warning: {name}: --range is only for grey of more than 8 bits, but none of 256 images is such")


class _Paths:
    """A sequence of a set's paths, each made when it is asked for."""

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(i)
        return self.files.path(i)


def decode(source, range=(), exif=False, make=None):
    """Returns the first frame of an image file as an 8-bit RGB PIL image, or make(image as opened by Pillow).
    source: its path, or a function that returns an open file.

    range: (low, high), the values that become black and white in grey of more than 8 bits (16, floating
    point); default: the image's own. CMYK, palette, grey and alpha are converted. exif: turn the image
    upright and put transparency on white; otherwise orientation is ignored and transparency dropped, as in
    the papers. Files over Pillow's limit of 179 million pixels are refused. Raises what Pillow raises for an
    unreadable file, OSError for anything but a regular file: opening a pipe would wait for ever.
    """
    for attempt in (1, 2, 3):
        try:
            with warnings.catch_warnings():
                # damaged EXIF and large images cause thousands of lines in a real data set
                warnings.simplefilter("ignore")
                if not callable(source) and not stat.S_ISREG(os.stat(source).st_mode):
                    raise OSError(0, "not a regular file")
                with Image.open(source() if callable(source) else source, formats=FORMATS) as image:
                    return make(image) if make else _to_rgb(image, range, exif)
        except UnidentifiedImageError:  # Pillow's message contains a memory address
            raise UnidentifiedImageError("cannot identify the image file") from None
        except OSError as error:
            if error.errno not in RETRIED or attempt == 3:
                raise
            time.sleep(0.01 * 10**attempt)


def _to_rgb(image, range=(), exif=False):
    turn = None
    if exif:
        image.load()  # EXIF may follow the pixels; loading a TIFF turns it
        with contextlib.suppress(Exception):  # damaged EXIF may raise anything
            turn = UPRIGHT.get(image.getexif().get(0x0112))
    if _is_deep(image):  # Pillow's convert would clip these to white or black
        low, high = range or _limits(deep_pixels(image))
        width = max(high - low, 1e-45)  # not 0 where all are equal; float32's smallest number
        pixels = np.asarray(image)
        parts = np.array_split(pixels, pixels.size // 2**20 + 1)  # the whole takes 25 bytes per pixel
        parts = (((part.astype(np.float64) - low) / width).clip(0, 1) for part in parts)
        parts = [(np.nan_to_num(part) * 255).round().astype(np.uint8) for part in parts]  # NaN: black
        image = Image.fromarray(np.concatenate(parts))
    elif exif and image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def _is_deep(image):
    return image.mode.startswith("I") or image.mode == "F"


def deep_pixels(image):
    """Returns up to 16,384 finite pixels of a grey image of more than 8 bits; None, unread, for others."""
    if not _is_deep(image):
        return None
    pixels = np.asarray(image).ravel()
    pixels = pixels[:: pixels.size // 2**14 + 1].astype(np.float64)
    return pixels[np.isfinite(pixels)]


def _limits(pixels):
    """Returns (low, high): a thousandth of the pixels lies below, and a thousandth above."""
    return tuple(np.percentile(pixels, (0.1, 99.9)).tolist()) if len(pixels) else (0.0, 1.0)


def _special(path):
    """Tells whether path is a pipe, socket or device, or a link to one: opening it may take for ever."""
    return os.path.exists(path) and not os.path.isfile(path)


def scan(root):
    """Returns the image files below root in name order. The class is the first folder below root. There are
    no labels if images lie in root itself. Warns of files left out. Raises DataError if none are left."""
    paths, folders, seen, left = [], [], set(), Counter()
    real_root = os.path.realpath(root)

    def inside(relative):
        folder = os.path.join(root, relative)
        with border(DataError, f"{folder} cannot be read"):
            entries = sorted(os.scandir(folder), key=lambda entry: os.fsencode(entry.name), reverse=True)
        return [(os.path.join(relative, entry.name), entry) for entry in entries]

    waiting = inside("")  # a stack: the last entry is next
    while waiting:
        name, entry = waiting.pop()
        if entry.name.startswith(".") or entry.name in FOREIGN:  # .DS_Store, ._photo.jpg, .thumbnails
            continue
        ending = os.path.splitext(entry.name)[1].lower()
        if os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
            if entry.is_symlink():  # a link back into the tree would count images twice, or never end
                real = os.path.realpath(entry.path)
                if real in seen or os.path.commonpath([real, real_root]) in (real, real_root):
                    continue
                seen.add(real)
            folders.append(name)
            waiting += inside(name)
        elif ending not in EXTENSIONS:
            left[ending if ending[1:].isalnum() and ending.isascii() else "of other names"] += 1
        elif not entry.is_file(follow_symlinks=False) and _special(entry.path):
            left["not regular files"] += 1
        else:
            paths.append(name)

    kinds = ", ".join(f"{number} {kind}" for kind, number in left.most_common(5)) + ", ..." * (len(left) > 5)
    if not paths:
        others = f": {kinds}" * bool(left)
        raise DataError(f"{root} holds no images ({' '.join(sorted(EXTENSIONS))}){others}")
    if left:
        say(f"warning: {root}: {left.total()} files are left out: {kinds}")
    if any(os.sep not in path for path in paths):
        return Files(root, paths)
    classes = sorted({path.split(os.sep, 1)[0] for path in paths}, key=os.fsencode)
    number = {name: i for i, name in enumerate(classes)}
    empty = [name for name in folders if os.sep not in name and name not in number]
    if empty:
        say(f"warning: {root}: {len(empty)} folders without images are left out: "
            f"{', '.join(map(repr, empty[:3]))}")
    return Files(root, paths, [number[path.split(os.sep, 1)[0]] for path in paths], classes)
