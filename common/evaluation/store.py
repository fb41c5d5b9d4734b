"""Reads and writes .npz files: features of two sets, and a run's clusters of its images."""

import contextlib
import json

import numpy as np
import torch

from .. import distributed
from ..distributed import rows_of
from ..engine.errors import DataError, border, say
from ..engine.files import writing

SPLITS = ("train", "val")
LABELS = 1_000_000  # larger labels cannot be numbers of classes


def save(path, train, val, info):
    """Writes features and labels of all ranks to one .npz file, which `load` and NumPy read: train_features
    (N, D) float32, train_labels (N,), val_features, val_labels, and info, a dict, as JSON. train, val: this
    rank's (features, labels). Rank 0 holds all rows meanwhile, every other rank those of one more rank."""
    arrays = {}
    for split, (features, labels) in zip(SPLITS, (train, val)):
        arrays |= {f"{split}_features": features.float(), f"{split}_labels": labels}
    nbytes = int(distributed.all_sum(torch.tensor(sum(x.nbytes for x in arrays.values()))))
    if distributed.world_size() > 1:
        say(f"{nbytes:,} bytes of features and labels are gathered on rank 0")
    arrays = {name: distributed.gather_on_main(x) for name, x in arrays.items()}
    distributed.from_main(_write, path, arrays, info)


def _write(path, arrays, info):
    try:
        with writing(path) as file:
            np.savez(file, **arrays, info=json.dumps(info))
    except OSError as error:
        raise DataError(f"{path} cannot be written: {error.strerror or error}") from None


def load(path):
    """Returns (train (features, labels), val (features, labels), info) from a file that `save` or numpy.savez
    wrote: this rank's rows. info["classes"] is the largest training label plus one.

    Raises DataError if it is no such file, if a validation label is not among the training labels, or if a
    row with a label is not finite.
    """
    place = distributed.rank(), distributed.world_size()
    shapes, features, labels, spoilt = [], [], [], []
    needed = "train_features (N, D), train_labels (N,), val_features and val_labels are needed"
    with _arrays(path, f"{path} is no file of features ({needed})") as arrays:
        for split in SPLITS:
            with np.errstate(over="ignore"):
                x = arrays[f"{split}_features"]  # all rows, for a moment
                x = x.astype(np.float32, casting="same_kind", copy=False)
            shapes.append(x.shape)
            spoilt.append(~np.isfinite(x).all(tuple(range(1, x.ndim))))
            features.append(torch.from_numpy(x[slice(*rows_of(len(x), *place))].copy()))
            y = arrays[f"{split}_labels"].astype(np.int64, casting="same_kind")
            if y.max() not in range(LABELS):
                raise ValueError(f"{split}_labels are up to {y.max()}, 0 to {LABELS - 1} is needed")
            labels.append(torch.from_numpy(y))
        info = dict(json.loads(str(arrays["info"]))) if "info" in arrays else {}
        format(info.get("width") or 1, "g")  # raises unless it can be shown later
    if shapes != [(*y.shape, shapes[0][-1]) for y in labels]:
        needed = "features (N, D) with labels (N,) are needed, of one D for train and val"
        found = ", ".join(str(tuple(shape)) for shape in (*shapes, *(y.shape for y in labels)))
        raise DataError(f"{path}: {needed}: found {found}")
    for split, rows, y in zip(SPLITS, spoilt, labels):
        if len(rows := np.flatnonzero(rows & (y.numpy() >= 0))):  # unreadable images: NaN and label -1
            few = f"row {rows[0]} of {split}_features is not finite, nor are {len(rows) - 1} others"
            raise DataError(f"{path}: {few}")
    unknown = sorted(set(labels[1].tolist()) - set(labels[0].tolist()) - {-1})
    if unknown:
        unknown = f"label {unknown[0]} of the features to classify"
        raise DataError(f"{path}: {unknown} is not among the training labels")
    info["classes"] = 1 + int(labels[0].max())
    train, val = ((x, y[slice(*rows_of(len(y), *place))]) for x, y in zip(features, labels))
    return train, val, info


@contextlib.contextmanager
def _arrays(path, what):
    """Opens the arrays of an .npz file. Any error while they are read becomes a DataError of one line."""
    with border(DataError, what), np.load(path, allow_pickle=False) as arrays:
        if name := arrays.zip.testzip():  # NumPy checks a checksum only when it reads a record to its end
            raise ValueError(f"the checksum of {name} does not agree")
        yield arrays


def read_assignments(path, images):
    """Reads the clusters of a set's images in each head, (H, N) int32, from a run's assignments.npz, matched
    by path. -1: none yet.

    Raises DataError if path is no such file, or if it lacks an image of the set.
    """
    if not path.exists():
        raise DataError(f"{path} does not exist: a run writes it at the end of its first epoch, and writes "
                        f"none with --assignments off or above 20 million images")
    with _arrays(path, f"{path} is not an assignments.npz that a run wrote") as file:
        table, paths = file["assignments"], bytes(file["paths"]).decode(errors="surrogateescape")
        columns = {name: column for column, name in enumerate(paths.split("\0"))}
        if table.dtype.kind != "i" or table.ndim != 2 or table.shape[1] != paths.count("\0") + 1:
            raise ValueError(f"clusters {table.dtype} {table.shape} of {paths.count(chr(0)) + 1} images")
    found = np.array([columns.get(name, -1) for name in images.paths])
    if (found < 0).any():
        missing = images.paths[int((found < 0).argmax())]
        lacks = f"it lacks {(found < 0).sum()} of {len(images)}, such as {missing!r}"
        raise DataError(f"{path} is of other images: {lacks}, and holds {next(iter(columns))!r}")
    return table[:, found].astype(np.int32)
