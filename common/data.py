"""Where images come from, and which images form step t of epoch e.

    images = open_images("/imagenet", "train")     # also: a flat or nested folder, a list file, shapes, cifar10, ...
    batches = batches(len(images), 256, epoch=3, seed=0, rank=0, world_size=8)

Order is stateless: step t of epoch e depends on (seed, e, t) alone, so there is no sampler state to save, and
any number of ranks and workers sees the same global batches.
"""

import atexit
import os
import signal
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from .engine.errors import DataError
from .multicrop import TRIES, collate
from .sources.files import scan
from .sources.lists import open_list
from .sources.named import TORCHVISION, Torchvision
from .sources.shapes import Shapes, count


def open_images(spec, split="train", root=""):
    """The images that `spec` names, as a map-style set.

    spec: a folder (class folders, flat or nested; its train/ or val/ is used when present), a list of files,
    "shapes", "shapes:N", or one of torchvision's "cifar10", "cifar100", "svhn", "stl10", each with ":/folder"
    to say where. A list is a text file with one path a line: `path`, `path label`, `path,label` (numbers from
    0, or names), or SimCLR's bare file names, whose class is what stands before "_"; or a .json file of
    iNaturalist's annotations. Its paths start at root (default: the list's folder), or at train/ or val/ in
    it.
    split: "train" or "val"; "": all of a folder. Only named sets and folders with a val/ have a "val" split.
    Returns a set with len(), labels (N,) int64 (-1: none) or None, classes, paths, fingerprint, read(i) ->
    PIL RGB image.
    Raises DataError if there is nothing to read.
    """
    name, _, argument = str(spec).partition(":")
    if name == "shapes":
        return Shapes(split, *([count(argument)] if argument else []))
    if name in TORCHVISION:
        return Torchvision(name, split, argument or os.path.join("data", name))
    path = Path(spec)
    if path.is_dir():
        if split == "val" and not (path / "val").is_dir():
            raise DataError(f"{path} has no val/ folder to evaluate on")
        inner = path / split
        return scan(inner if inner.is_dir() else path)
    if path.is_file():
        if split == "val":
            raise DataError(f"{path} is a list of images: name the list or folder to evaluate on with --val")
        return open_list(path, root, split)
    raise DataError(f"{spec} does not exist (a folder, a list file, shapes, {', '.join(TORCHVISION)})")


def open_queries(spec, val="", root=""):
    """The images to judge by: those that `val` names (its "val" split, if it has one), else the "val" split
    of spec."""
    if val and Path(val).is_file():
        return open_list(Path(val), root, "val")
    return open_images(val or spec, "val" if not val or has_split(val, "val") else "train", root)


def has_split(spec, split):
    """Whether open_images(spec, split) would find something to open."""
    return str(spec).partition(":")[0] in ("shapes", *TORCHVISION) or (Path(spec) / split).is_dir()


def match_classes(queries, bank):
    """Numbers the labels of `queries` as those of `bank`, so that both have one table of classes.

    Classes are matched by name. Where one of the two is a list with numbers and the other has names, number i
    is the i-th name in the order of its bytes, as everywhere for ImageNet. Raises DataError for a class that
    bank lacks.
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
        raise DataError(f"class {unknown[0]!r} of the images to classify is not among the "
                        f"{len(votes - {-1})} classes of the training images{example}")
    numbers = torch.tensor([number.get(name, -1) for name in queries.classes])
    queries.labels = torch.where(queries.labels >= 0, numbers[queries.labels], queries.labels)
    queries.classes = bank.classes


def read_assignments(path, images):
    """The clusters of a set's images in each head, (H, N) int32, -1 for none, from the assignments.npz of a
    run: matched by path.

    Raises DataError if path is no such file, or if it lacks an image of the set.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            table, paths = file["assignments"], bytes(file["paths"]).decode(errors="surrogateescape").split(
                "\0")
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


def batches(n, batch_size, epoch, seed, rank, world_size, order=None, drop_last=True):
    """This rank's part of every global batch of an epoch, as a sequence of lists of (position, index).

    position: place in the epoch's order, 0 .. n-1, which together with the epoch seeds the augmentation.
    order: (n,) indices to take instead of a permutation drawn from (seed, epoch); an index may occur more
    than once. Rank r takes the r-th contiguous slice of each global batch; drop_last leaves out the last,
    partial one.
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
        first, last = start + self.rank * size // self.world_size, start + (self.rank
                                                                            + 1) * size // self.world_size
        return list(zip(range(first, last), self.order[first:last].tolist()))


class Loader:
    """Collated batches of a data set that is indexed by (epoch, position, index) and returns (index, crops,
    params).

    workers: processes; -1 takes this rank's share of the CPU cores, but one, and at most 8. They stay for the
    whole run. An image that cannot be read comes back as the next one that can, under that one's index; `bad`
    collects what was left out.
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
        self._loader = DataLoader(dataset, batch_sampler=self._keys, num_workers=workers, collate_fn=collate,
                                  pin_memory=pin_memory, persistent_workers=workers > 0,
                                  prefetch_factor=2 if workers else None, worker_init_fn=_ignore_signals,
                                  multiprocessing_context=start_method if workers else None)
        # The workers ignore the SIGTERM by which multiprocessing would end them when the interpreter exits.
        atexit.register(self.close)

    def close(self):
        """Ends the worker processes."""
        if self._loader.num_workers and self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()
        atexit.unregister(self.close)

    def epoch(self, epoch, batches, first=0):
        """Batches of the epoch from step `first` on: index (B,) int64, crops [(V_r, B, 3, s, s) uint8],
        params (V, B, 8)."""
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


def _ignore_signals(worker):
    # A stop signal often reaches the whole process group. The main process decides; its workers go on until
    # it ends.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
