"""Where images come from, and which images form step t of epoch e.

    images = open_images("/imagenet", "train")     # also: a flat or nested folder, a list file, shapes, cifar10, ...
    batches = batches(len(images), 256, epoch=3, seed=0, rank=0, world_size=8)

Order is stateless: step t of epoch e depends on (seed, e, t) alone, so there is no sampler state to save, and any number
of ranks and workers sees the same global batches.
"""

import atexit
import hashlib
import json
import os
import signal
import time
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch.utils.data import DataLoader

EXTENSIONS = {".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif", ".jp2"}
TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}
TRIES = 100  # unreadable images in a row before a sample is given up
RETRIED = {5, 11, 110, 116, 121}  # errno of a network file system's bad moments: EIO, EAGAIN, ETIMEDOUT, ESTALE, EREMOTEIO


class DataError(ValueError):
    """Data that cannot be used. The message names the path, what was found and what is needed."""

    exit_code = 3


def open_images(spec, split="train", root=""):
    """The images that `spec` names, as a map-style set.

    spec: a folder (class folders, flat or nested; its train/ or val/ is used when present), a list of files, "shapes",
    "shapes:N", or one of torchvision's "cifar10", "cifar100", "svhn", "stl10", each with ":/folder" to say where.
    A list is a text file with one path a line: `path`, `path label`, `path,label` (numbers from 0, or names), or SimCLR's
    bare file names, whose class is what stands before "_"; or a .json file of iNaturalist's annotations. Its paths start
    at root (default: the list's folder), or at train/ or val/ in it.
    split: "train" or "val"; "": all of a folder. Only named sets and folders with a val/ have a "val" split.
    Returns a set with len(), labels (N,) int64 (-1: none) or None, classes, paths, fingerprint, read(i) -> PIL RGB image.
    Raises DataError if there is nothing to read.
    """
    name, _, argument = str(spec).partition(":")
    if name == "shapes":
        return Shapes(split, *([_count(argument)] if argument else []))
    if name in TORCHVISION:
        return Torchvision(name, split, argument or os.path.join("data", name))
    path = Path(spec)
    if path.is_dir():
        if split == "val" and not (path / "val").is_dir():
            raise DataError(f"{path} has no val/ folder to evaluate on")
        inner = path / split
        return _scan(inner if inner.is_dir() else path)
    if path.is_file():
        if split == "val":
            raise DataError(f"{path} is a list of images: name the list or folder to evaluate on with --val")
        return _open_list(path, root, split)
    raise DataError(f"{spec} does not exist (a folder, a list file, shapes, {', '.join(TORCHVISION)})")


def open_queries(spec, val="", root=""):
    """The images to judge by: those that `val` names (its "val" split, if it has one), else the "val" split of spec."""
    if val and Path(val).is_file():
        return _open_list(Path(val), root, "val")
    return open_images(val or spec, "val" if not val or has_split(val, "val") else "train", root)


def has_split(spec, split):
    """Whether open_images(spec, split) would find something to open."""
    return str(spec).partition(":")[0] in ("shapes", *TORCHVISION) or (Path(spec) / split).is_dir()


def match_classes(queries, bank):
    """Numbers the labels of `queries` as those of `bank`, so that both have one table of classes.

    Classes are matched by name. Where one of the two is a list with numbers and the other has names, number i is the i-th
    name in the order of its bytes, as everywhere for ImageNet. Raises DataError for a class that bank lacks.
    """
    number = {name: i for i, name in enumerate(bank.classes)}
    asked = [queries.classes[i] for i in queries.labels.unique().tolist() if i >= 0]
    if _numbered(queries) != _numbered(bank) and any(name not in number for name in asked):
        if _numbered(queries):
            number = {str(i): i for i in range(len(bank.classes))}
        elif len(queries.classes) == len(bank.classes):
            number = {name: i for i, name in enumerate(queries.classes)}
    votes = set(bank.labels.unique().tolist())  # the numbers of a list may have gaps
    unknown = [name for name in asked if number.get(name) not in votes]
    if unknown:
        example = f" ({', '.join(bank.classes[:2])}, ...)"
        raise DataError(
            f"class {unknown[0]!r} of the images to classify is not among the {len(votes - {-1})} classes of the training images{example}"
        )
    numbers = torch.tensor([number.get(name, -1) for name in queries.classes])
    queries.labels = torch.where(queries.labels >= 0, numbers[queries.labels], queries.labels)
    queries.classes = bank.classes


def read_assignments(path, images):
    """The clusters of a set's images in each head, (H, N) int32, -1 for none, from the assignments.npz of a run: matched by path.

    Raises DataError if path is no such file, or if it lacks an image of the set.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            table, paths = file["assignments"], bytes(file["paths"]).decode(errors="surrogateescape").split("\0")
        if table.ndim != 2 or table.shape[1] != len(paths):
            raise ValueError
    except FileNotFoundError:
        raise DataError(f"{path} does not exist: a run writes it at the end of its first epoch") from None
    except (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error):
        raise DataError(f"{path} is not an assignments.npz that a run wrote") from None
    columns = {name: column for column, name in enumerate(paths)}
    found = np.array([columns.get(name, -1) for name in images.paths])
    if (found < 0).any():
        lacking = int((found < 0).sum())
        example = f"it lacks {lacking} of {len(images)}, such as {images.paths[int((found < 0).argmax())]!r}, and holds {paths[0]!r}"
        raise DataError(f"{path} is of other images: {example}")
    return table[:, found].astype(np.int32)


def _numbered(images):
    return getattr(images, "numbered", False)


class Files:
    """Image files. Paths are packed into one array, so a million of them cost a worker nothing."""

    def __init__(self, root, paths, labels=None, classes=(), numbered=False):
        encoded = [os.fsencode(path) for path in paths]
        # Tensors live in shared memory when a worker is spawned, and hold no Python objects that a fork would copy.
        self._bytes = torch.frombuffer(bytearray(b"".join(encoded)), dtype=torch.uint8)
        self._ends = torch.from_numpy(np.cumsum([len(e) for e in encoded], dtype=np.int64))
        self.root, self.classes, self.numbered = str(root), list(classes), numbered  # numbered: the classes have no names
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


class Torchvision:
    """A labelled data set of torchvision, downloaded on first use."""

    def __init__(self, name, split, root):
        cls = getattr(torchvision.datasets, TORCHVISION[name])
        wanted = "test" if split == "val" else "train"
        which = {"train": split == "train"} if name.startswith("cifar") else {"split": wanted}
        if name == "stl10" and split == "train":
            which = {"split": "train+unlabeled"}
        try:
            self.set = cls(root, download=True, **which)
        except (OSError, RuntimeError) as error:
            raise DataError(f"{name}: not in {root}, and it cannot be downloaded ({error})") from None
        labels = torch.as_tensor(self.set.targets if hasattr(self.set, "targets") else self.set.labels).long()
        self.labels = labels  # -1 for STL-10's unlabelled images
        self.classes = list(getattr(self.set, "classes", map(str, range(10))))
        self.paths = [f"{name}/{split}/{i:06d}" for i in range(len(self.set))]
        self.fingerprint = f"{name} {split} {len(self.set)}"

    def __len__(self):
        return len(self.set)

    def read(self, i):
        return self.set[i][0].convert("RGB")


class Shapes:
    """Ten classes of form or texture, drawn on the fly: 32x32 pixels, a function of (split, index) alone.

    Colours, place, size, rotation, background and noise are drawn independently of the class, so raw pixels and a
    random network say little about it. 10,000 images to train on and 2,000 held out; "shapes:N" has N and N / 5.
    """

    classes = ("disc", "square", "triangle", "cross", "ring", "star", "stripes", "checks", "dots", "waves")

    def __init__(self, split, n=10_000):
        self.n = n if split == "train" else max(1, n // 5)
        self.split = split
        self.labels = torch.arange(self.n) % 10
        self.paths = [f"shapes/{split}/{i:06d}" for i in range(self.n)]
        self.fingerprint = f"shapes {split} {self.n}"

    def __len__(self):
        return self.n

    def read(self, i):
        return Image.fromarray(draw_shape(i % 10, np.random.default_rng((i, self.split == "val"))))


def draw_shape(label, rng, size=32):
    """One image of class `label` (see Shapes.classes) as (size, size, 3) uint8, its nuisances drawn from rng."""
    y, x = np.mgrid[:size, :size] / (size - 1) * 2 - 1  # -1 .. 1
    angle = rng.uniform(-0.5, 0.5)
    scale = rng.uniform(0.55, 0.8)
    x, y = (x - rng.uniform(-0.2, 0.2)) / scale, (y - rng.uniform(-0.2, 0.2)) / scale
    u, v = np.cos(angle) * x + np.sin(angle) * y, np.cos(angle) * y - np.sin(angle) * x
    radius, turn = np.hypot(u, v), np.arctan2(v, u)
    frequency, phase = rng.uniform(5.5, 8.5), rng.uniform(0, 2 * np.pi, 2)
    # Signed distance: below 0 inside.
    if label == 0:
        distance = radius - 0.9
    elif label == 1:
        distance = np.maximum(abs(u), abs(v)) - 0.8
    elif label == 2:
        distance = np.maximum(abs(u) * 0.866 + v * 0.5, -v) - 0.55
    elif label == 3:
        distance = np.minimum(np.maximum(abs(u) - 0.28, abs(v) - 1), np.maximum(abs(v) - 0.28, abs(u) - 1))
    elif label == 4:
        distance = abs(radius - 0.75) - 0.2
    elif label == 5:
        distance = radius * (1 + 0.42 * np.cos(5 * turn)) - 0.6
    elif label == 6:
        distance = np.sin(frequency * u + phase[0]) * 0.2
    elif label == 7:
        distance = np.sin(frequency * u + phase[0]) * np.sin(frequency * v + phase[1]) * 0.3
    elif label == 8:
        distance = 0.35 - (np.sin(frequency * u + phase[0]) * np.sin(frequency * v + phase[1])) ** 2
    else:
        distance = np.sin(frequency * (u + 0.35 * np.sin(3.5 * v + phase[1])) + phase[0]) * 0.2
    inside = np.clip(0.5 - distance * scale * size / 2, 0, 1)[..., None]  # one pixel of anti-aliasing
    ground, figure = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    while abs(ground - figure).sum() < 0.8:  # visible
        ground, figure = rng.uniform(0, 1, 3), rng.uniform(0, 1, 3)
    slope = np.outer(np.linspace(-1, 1, size), rng.normal(0, 0.12, 3))  # light that changes across the image
    shade = slope[:, None] + np.outer(np.linspace(-1, 1, size), rng.normal(0, 0.12, 3))[None]
    image = ground + inside * (figure - ground) + shade + rng.normal(0, 0.06, (size, size, 3))
    return (image.clip(0, 1) * 255).astype(np.uint8)


def decode(path):
    """The first frame of an image file as an 8-bit RGB PIL image.

    16-bit and floating-point grey are scaled to 8 bits; CMYK, palette, grey and alpha are converted, and transparency
    is dropped; the EXIF orientation is ignored, as in the papers. Files over Pillow's limit of 179 million pixels are
    refused. Raises what Pillow raises for a file that it cannot read.
    """
    for attempt in (1, 2, 3):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # damaged EXIF, large images: thousands of lines in a real data set
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


def batches(n, batch_size, epoch, seed, rank, world_size, order=None, drop_last=True):
    """This rank's part of every global batch of an epoch, as a sequence of lists of (position, index).

    position: place in the epoch's order, 0 .. n-1, which together with the epoch seeds the augmentation.
    order: (n,) indices to take instead of a permutation drawn from (seed, epoch); an index may occur more than once.
    Rank r takes the r-th contiguous slice of each global batch; drop_last leaves out the last, partial one.
    """
    if order is None:
        order = np.random.default_rng((seed, epoch)).permutation(n)
    return _Batches(np.asarray(order), batch_size, rank, world_size, drop_last)


class _Batches:
    def __init__(self, order, batch_size, rank, world_size, drop_last):
        self.order, self.batch_size, self.rank, self.world_size = order, batch_size, rank, world_size
        self.length = len(order) // batch_size if drop_last else -(-len(order) // batch_size)

    def __len__(self):
        return self.length

    def __getitem__(self, step):
        if not 0 <= step < self.length:
            raise IndexError(step)
        start = step * self.batch_size
        size = min(self.batch_size, len(self.order) - start)
        first, last = start + self.rank * size // self.world_size, start + (self.rank + 1) * size // self.world_size
        return list(zip(range(first, last), self.order[first:last].tolist()))


class Loader:
    """Collated batches of a data set that is indexed by (epoch, position, index) and returns (index, crops, params).

    workers: processes; -1 takes this rank's share of the CPU cores, but one, and at most 8. They stay for the whole run.
    An image that cannot be read comes back as the next one that can, under that one's index; `bad` collects what was left out.
    """

    def __init__(self, dataset, workers=0, pin_memory=False, start_method=None):
        if workers < 0:
            cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
            workers = max(1, min(8, cores - 1))
        self.dataset = dataset
        self.bad = set()
        self.lost = False  # a sample found nothing readable within TRIES images and is blank, with index -1
        self._keys = _Keys()
        self._n = len(dataset)
        self._loader = DataLoader(
            dataset,
            batch_sampler=self._keys,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin_memory,
            persistent_workers=workers > 0,
            prefetch_factor=2 if workers else None,
            worker_init_fn=_ignore_signals,
            multiprocessing_context=start_method if workers else None,
        )
        # The workers ignore the SIGTERM by which multiprocessing would end them when the interpreter exits.
        atexit.register(self.close)

    def close(self):
        """Ends the worker processes."""
        if self._loader.num_workers and self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()
        atexit.unregister(self.close)

    def epoch(self, epoch, batches, first=0):
        """Batches of the epoch from step `first` on: index (B,) int64, crops [(V_r, B, 3, s, s) uint8], params (V, B, 8)."""
        self._keys.current = epoch, batches, range(first, len(batches))
        for step, (index, crops, params) in zip(range(first, len(batches)), self._loader):
            for (_, wanted), got in zip(batches[step], index.tolist()):
                if got != wanted:  # every image from the one wanted up to the one that came is unreadable
                    skipped = (got - wanted) % self._n if got >= 0 else min(TRIES, self._n)
                    self.bad.update((wanted + i) % self._n for i in range(skipped))
                    self.lost |= got < 0
            yield index, crops, params


class _Keys:
    """The keys of the epoch under way, a batch at a time: the loader's batch sampler."""

    def __iter__(self):
        epoch, batches, steps = self.current
        for step in steps:
            yield [(epoch, position, index) for position, index in batches[step]]


def collate(samples):
    """Samples (index, [(V_r, 3, s, s)], (V, 8)) to (B,), [(V_r, B, 3, s, s)] and (V, B, 8): one tensor a resolution."""
    index, crops, params = zip(*samples)
    return torch.tensor(index), [torch.stack(group, dim=1) for group in zip(*crops)], torch.stack(params, dim=1)


def read_or_next(images, index):
    """(index, image) of the first readable image from `index` on, or (index, None) if TRIES in a row are not."""
    for i in range(min(TRIES, len(images))):
        try:
            return (index + i) % len(images), images.read((index + i) % len(images))
        except Exception:  # Pillow's plug-ins raise a dozen kinds for damaged files
            continue
    return index, None


def _ignore_signals(worker):
    # A stop signal often reaches the whole process group. The main process decides; its workers go on until it ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _scan(root):
    """Image files below root in name order. Class = first folder below the root; no labels if images lie in it."""
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
        print(f"warning: {root}: {len(empty)} folders without images are left out: {', '.join(map(repr, empty[:3]))}")
    classes = sorted({path.split(os.sep, 1)[0] for path in paths}, key=os.fsencode)
    number = {name: i for i, name in enumerate(classes)}
    return Files(root, paths, [number[path.split(os.sep, 1)[0]] for path in paths], classes)


def _open_list(path, root, split):
    return _read_annotations(path, root, split) if path.suffix.lower() == ".json" else _read_list(path, root, split)


def _start(path, root, split, first):
    """The folder that the paths of a list start from, judged by the first of them: root, or train/ or val/ in it."""
    root = Path(root or path.parent)
    return next((base for base in (root, root / split) if os.path.isfile(base / first)), root)


def _check_some(path, root, names, place):
    """Looking at every file of a long list takes minutes on a network: these catch a wrong root or a wrong list."""
    for i in range(0, len(names), max(1, len(names) // 10_000)):
        if not os.path.isfile(root / names[i]):
            raise DataError(f"{path} {place(i)}: {os.fspath(root / names[i])[:200]} does not exist")


def _read_list(path, root, split):
    """A list file: a path a line, with an integer label or a class name behind it on every line or on none."""
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
        if bare and not os.path.isfile(root / first) and os.path.isfile(base / first.partition("_")[0] / first):
            labels = [name.partition("_")[0] for name in names]  # SimCLR's lists: n01440764_10026.JPEG is in n01440764
            names, root = [os.path.join(label, name) for label, name in zip(labels, names)], base
    else:
        root = _start(path, root, split, names[0])
    _check_some(path, root, names, place)
    if labels[0] is None:
        return Files(root, names)
    numeric = all(label.isdecimal() and len(label) < 7 for label in labels)  # longer ones are names: times, bar codes
    classes = [str(i) for i in range(max(map(int, labels)) + 1)] if numeric else sorted(set(labels), key=os.fsencode)
    number = {name: i for i, name in enumerate(classes)}
    return Files(root, names, [int(label) if numeric else number[label] for label in labels], classes, numeric)


def _read_annotations(path, root, split):
    """A .json file of iNaturalist's competitions: images with id and file_name, annotations with image_id and category_id.

    Classes are the ids of its categories, as text; iNaturalist's class folders have these names.
    """
    try:
        content = json.loads(path.read_bytes())
        images = {image["id"]: image["file_name"] for image in content["images"]}
        pairs = [(annotation["image_id"], annotation["category_id"]) for annotation in content.get("annotations") or []]
        ids = {category["id"] for category in content.get("categories") or []} | {category for _, category in pairs}
        ids = sorted(ids)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        needed = "images with id and file_name, and annotations with image_id and category_id, are needed"
        raise DataError(f"{path} is not a list of images in iNaturalist's format: {needed} ({type(error).__name__})") from None
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


def _count(text):
    if not text.isdigit() or int(text) < 1:
        raise DataError(f"shapes:{text}: the number of images is needed behind the colon")
    return int(text)
