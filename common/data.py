"""Opens image sets, and decides which images form step t of epoch e.

    images = data.open_images("/imagenet", "train")  # or any folder, a list file, shapes, cifar10
    batches = data.batches(len(images), 256, epoch=3, seed=0)

The order is stateless: step t of epoch e depends on (seed, e, t) alone. So there is no sampler state to save,
and any number of ranks and workers sees the same global batches.
"""

import atexit
import functools
import multiprocessing
import multiprocessing.forkserver
import os
import re
import signal
import threading
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from . import distributed
from .engine.errors import DataError, WorkerError, border
from .multicrop import TRIES, collate

TABLE = 2**24  # for more images the order is computed batch by batch, not stored
PACKED = (".gz", ".tgz", ".bz2", ".xz", ".zst", ".zip", ".7z", ".rar")
NAMED = ("cifar10", "cifar100", "svhn", "stl10")  # torchvision's data sets
OWN = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")  # package.module:function, the user's own


def open_images(spec, split="train", root="", index="", range=(), exif=False):
    """Opens the images that `spec` names, as a map-style data set.

    spec: a folder (class folders, flat or nested; its train/ or val/ is used when present), an image, a list,
    tars, "shapes", "shapes:N", one of torchvision's "cifar10", "cifar100", "svhn", "stl10", each with
    ":/folder" to say where, or "package.module:function", the user's own (docs/own.md). It runs that code, so
    pass only what the user typed. Tars: one .tar, numbered ones like "shards-{000000..000146}.tar", or a
    folder of them, with class folders, one tar per class or WebDataset samples inside; read in place. A list
    is a text file with one path per line: `path`, `path label`, `path,label` (numbers from 0, or names; -1:
    none), or SimCLR's bare file names, whose class is what precedes "_"; or iNaturalist's .json annotations.
    Its paths are relative to root (default: the list's folder), or to train/ or val/ in it.
    split: "train" or "val"; "": all of a folder. Only named sets and folders with a val/ have a "val" split.
    index: folder in which to store where images lie in tars. range: (low, high), the values that become black
    and white if grey has more than 8 bits, for the whole set; default: measured on a sample of the files.
    exif: turn images upright and put transparent ones on white.
    Returns a set with len(), labels (N,) int64 (-1: none) or None, classes, paths, fingerprint, range and
    exif as used, read(i) -> PIL RGB image.
    Raises DataError if there is nothing to read.
    """
    return look(_open(spec, split, root, index), spec, range, exif)


def look(images, spec, range, exif):
    """Sets range and exif of the images, as in open_images; returns the set."""
    images.range, images.exif = tuple(range), exif
    if hasattr(images, "sample"):
        from .sources.files import measure

        measure(images, spec)
    return images


def _open(spec, split, root, index):
    kinds = f"a folder, a list file, a tar, shapes, {', '.join(NAMED)}, package.module:function"
    name, colon, argument = str(spec).partition(":")
    if not str(spec) or (colon and not argument and name in ("shapes", *NAMED)):
        raise DataError(f"{str(spec)!r} is not a name, is a variable of the shell empty? ({kinds})")
    if name == "shapes":
        from .sources.shapes import Shapes, count

        return Shapes(split, *([count(argument)] if argument else []))
    if name in NAMED:
        from .sources.named import Torchvision

        return Torchvision(name, split, argument or os.path.join("data", name))
    if is_own(spec):
        if split == "val":
            raise DataError(f"{spec} has no val split: name the images to evaluate on with --val")
        from .sources.own import Own

        return Own(spec)
    path = Path(spec)
    if path.suffix.lower() == ".tar" and not path.is_dir():
        from .sources.tars import open_tars, shards_of

        if split == "val":
            raise DataError(f"{spec} is a tar of images: name the one to evaluate on with --val")
        return open_tars(shards_of(spec), index)
    with border(DataError, f"{spec} cannot be read"):
        folder, file = path.is_dir(), path.is_file()
        missing = "is neither a folder nor a regular file" if path.exists() else "does not exist"
    if folder:
        if split == "val" and not (path / "val").is_dir():
            raise DataError(f"{path} has no val/ folder to evaluate on: name labelled images with --val; "
                            "eval_cluster.py RUN --images DIR needs no labels")
        inner = path / split if (path / split).is_dir() else path
        if next(inner.glob("*.tar"), None):
            from .sources.tars import open_tars, shards_of

            if shards := shards_of(inner):
                return open_tars(shards, index)
        from .sources.files import scan

        return scan(inner)
    if file:
        from .sources.files import EXTENSIONS, Files

        if path.suffix.lower() in PACKED:
            raise DataError(f"{spec} is packed: unpack it, a tar alone can be read in place")
        if path.suffix.lower() in EXTENSIONS:
            return Files(path.parent, [path.name])
        if split == "val":
            raise DataError(f"{path} is a list of images: name the list or folder to evaluate on with --val")
        return _open_list(path, root, split)
    raise DataError(f"{spec} {missing} ({kinds})")


def is_own(spec):
    """Tells whether spec names the user's own function. Named sets and existing files have precedence."""
    name = str(spec).partition(":")[0]
    return bool(OWN.fullmatch(str(spec))) and name not in ("shapes", *NAMED) and not os.path.lexists(spec)


def _open_list(path, root, split):
    from .sources.lists import open_list

    return open_list(path, root, split)


def batches(n, batch_size, epoch, seed, rank=None, world_size=None, order=None, drop_last=True):
    """Returns a rank's part of every global batch of an epoch: a sequence of lists of (position, index).

    position: place in the epoch's order, 0 .. n-1, which together with the epoch seeds the augmentation.
    rank, world_size: by default this process's. Rank r takes the r-th contiguous slice of each global batch.
    order: n indices, an array or a range, instead of the permutation given by (seed, epoch); an index may
    occur more than once. drop_last: leave out the last, partial batch.
    """
    if order is None and n > TABLE:
        order = Permutation(n, (seed, epoch))
    elif order is None:
        order = np.random.default_rng((seed, epoch)).permutation(n)
    if rank is None:
        rank, world_size = distributed.rank(), distributed.world_size()
    return _Batches(order, batch_size, rank, world_size, drop_last)


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
        first, last = (start + edge for edge in distributed.rows_of(size, self.rank, self.world_size))
        return list(zip(range(first, last), np.asarray(self.order[first:last]).tolist()))


class Permutation:
    """Permutes 0 .. n-1 at random without storing a table: slices are computed, order[first:last] -> int64.

    A Feistel network permutes the numbers below the next power of 4. A result of n or more goes through it
    again until it is below n (cycle walking; Black and Rogaway 2002). key: integers that seed the network.
    """

    def __init__(self, n, key, rounds=6):
        self.n, self.half = n, np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))  # bits of half of a number
        self.keys = np.random.default_rng(key).integers(1 << 64, size=(rounds, 1), dtype=np.uint64)

    def __len__(self):
        return self.n

    def __getitem__(self, places):
        x = np.arange(*places.indices(self.n), dtype=np.uint64)
        outside = slice(None)
        while len(x[outside]):
            x[outside] = self._permute(x[outside])
            outside = np.flatnonzero(x >= self.n)
        return x.astype(np.int64)

    def _permute(self, x):
        mask = (np.uint64(1) << self.half) - np.uint64(1)
        left, right = x >> self.half, x & mask
        for key in self.keys:
            mixed = right + key  # then the last steps of SplitMix64
            for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
                mixed = (mixed ^ mixed >> np.uint64(shift)) * np.uint64(factor)
            left, right = right, left ^ mixed & mask
        return left << self.half | right


class Loader:
    """Loads batches from MultiCrop or a similar data set, one epoch after another.

    dataset: dataset[epoch, position, index] -> index, crops, params. workers: number of processes, kept for
    the whole run; -1: this rank's CPU cores minus one, at most 8. An unreadable image is replaced by the next
    readable one, whose index is returned; `bad` collects the indices of the unreadable ones. pin_memory: for
    batches that go to a GPU. start_method: of the workers; by default forkserver with several GPUs, else the
    system's. collate: makes a batch (index (B,), ...) from samples.
    """

    def __init__(self, dataset, workers=0, pin_memory=False, start_method=None, collate=collate):
        if workers < 0:
            workers = max(1, min(8, distributed.cores() - 1))
        if start_method is None and pin_memory and distributed.world_size() > 1:
            start_method = "forkserver"  # NCCL has started its threads: a fork of this process may hang
            _start_forkserver()
        self.dataset = dataset
        self.bad = set()
        self.lost = False  # whether a sample is blank, with index -1: TRIES images in a row were unreadable
        self._keys = _Keys()
        self._n = len(dataset)
        self._loader = DataLoader(dataset, batch_sampler=self._keys, num_workers=workers,
                                  collate_fn=functools.partial(_collate_shared, collate) if workers
                                  else collate, pin_memory=pin_memory,
                                  prefetch_factor=2 if workers else None, persistent_workers=workers > 0,
                                  worker_init_fn=_start_worker,
                                  multiprocessing_context=start_method if workers else None)
        atexit.register(self.close)

    def close(self):
        """Ends the worker processes, also those that hang."""
        if self._loader.num_workers and self._loader._iterator is not None:
            self._loader._iterator._shutdown_workers()
            for worker in self._loader._iterator._workers:
                worker.kill()
        atexit.unregister(self.close)

    def epoch(self, epoch, batches, first=0):
        """Yields the epoch's batches from step `first` on: index (B,) int64, crops [(V_r, B, 3, s, s) uint8],
        params (V, B, 8). Raises WorkerError whatever goes wrong in a worker."""
        self._keys.current = epoch, batches, range(first, len(batches))
        if self._loader.num_workers:
            with border(WorkerError, "loader workers need to write to /dev/shm; --workers 0 does not"):
                multiprocessing.Lock()
        return self._batches(batches, first, self._net(lambda: iter(self._loader)))

    def _batches(self, batches, first, source):
        for step in range(first, len(batches)):
            index, *batch = self._net(lambda: next(source))
            for (_, wanted), got in zip(batches[step], index.tolist()):
                if got != wanted:  # every image from the one wanted up to the one that came is unreadable
                    skipped = (got - wanted) % self._n if got >= 0 else min(TRIES, self._n)
                    self.bad.update((wanted + i) % self._n for i in range(skipped))
                    self.lost |= got < 0
            yield index, *batch

    def _net(self, function):
        """Calls function. An error raised in a worker, or by starting it, becomes a WorkerError. A worker's
        death may raise an error anywhere in this process: `launch` reports it."""
        try:
            return function()
        except Exception as error:
            if not self._loader.num_workers or "DataLoader worker (pid" in str(error):
                raise
            cause = (str(error).strip().splitlines() or [""])[-1]  # after the worker's traceback
            remedy = "; enlarge /dev/shm, or lower --workers" * ("/torch_" in str(error))
            raise WorkerError(f"a loader worker failed: {cause or type(error).__name__}{remedy}") from None


class _Keys:
    """Batch sampler of the one DataLoader. Loader.epoch sets the keys of each pass, so workers are kept."""

    def __iter__(self):
        epoch, batches, steps = self.current
        for step in steps:
            yield [(epoch, position, index) for position, index in batches[step]]


@atexit.register
def _kill_workers():
    # A loader that is interrupted while it starts workers leaves some behind. They ignore the SIGTERM by
    # which multiprocessing would end them.
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


def _start_forkserver():
    # Like the workers, the server must outlive a stop signal to the process group: it inherits SIG_IGN.
    multiprocessing.set_forkserver_preload(["torch", "torchvision", __name__])  # once, not per worker
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in STOPS}
    multiprocessing.forkserver.ensure_running()
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _start_worker(worker):
    # A stop signal often reaches the whole process group. The main process decides when its workers end; if
    # it is gone, they end by themselves, even in the middle of a read that hangs.
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def _collate_shared(collate, samples):
    # Moves the batch to shared memory here, where an error reaches the main process. The thread that would do
    # so later drops a batch for which there is no room, and the run would wait for it for ever.
    batch = collate(samples)
    for part in batch:
        for tensor in part if isinstance(part, list) else [part]:
            if isinstance(tensor, torch.Tensor):
                tensor.share_memory_()
    return batch
