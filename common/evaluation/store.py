"""Features of two sets in one .npz file."""

import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch

from .. import distributed
from ..distributed import rows_of
from ..engine.errors import DataError
from ..engine.files import writing


def save(path, train, val, info):
    """Writes features and labels of all ranks to one .npz file, which `load` and NumPy read: train_features
    (N, D) float32, train_labels (N,), val_features, val_labels, and info, a dict, as JSON. train, val: this
    rank's (features, labels)."""
    arrays = {"train_features": train[0].float(), "train_labels": train[1], "val_features": val[0].float(),
              "val_labels": val[1]}
    blocks = _blocks(arrays)
    problem = None
    if distributed.rank() == 0:
        try:
            with writing(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
                for name in arrays:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array_header_1_0(member, next(blocks))
                        while (block := next(blocks)) is not None:
                            member.write(block.data)
                with archive.open("info.npy", "w") as member:
                    np.save(member, np.array(json.dumps(info)), allow_pickle=False)
        except OSError as error:
            problem = DataError(f"{path} cannot be written: {error.strerror or error}")
    for _ in blocks:  # the others send what rank 0 has not taken
        pass
    distributed.from_main(_raise, problem)


def _blocks(arrays, size=1 << 24):
    """On every rank alike: of each array its header, then its rows of all ranks in blocks, then None."""
    for x in arrays.values():
        counts = distributed.gather_rows(torch.tensor([len(x)])).tolist()
        dtype = np.dtype(str(x.dtype).removeprefix("torch."))
        yield {"descr": dtype.str, "fortran_order": False, "shape": (sum(counts), *x.shape[1:])}
        rows = max(1, size // max(1, math.prod(x.shape[1:])))
        for source, count in enumerate(counts):
            for first in range(0, count, rows):
                block = torch.empty(min(rows, count - first), *x.shape[1:], dtype=x.dtype)
                if source == distributed.rank():
                    block = x[first : first + rows].cpu().contiguous()
                yield distributed.broadcast(block, source).numpy()
        yield None


def _raise(problem):
    if problem is not None:
        raise problem


def load(path):
    """((features, labels) to train on, those to judge by, info) of a file that `save` or numpy.savez wrote:
    this rank's rows.

    Raises DataError if it is no such file, or if a label to judge by is not among those to train on.
    """
    place = distributed.rank(), distributed.world_size()
    try:
        with zipfile.ZipFile(path) as archive:
            shapes, rows = zip(*(_read(archive, f"{split}_features", *place) for split in ("train", "val")))
            labels = [_read(archive, f"{split}_labels", 0, 1)[1].long() for split in ("train", "val")]
        with np.load(path, allow_pickle=False) as arrays:
            info = json.loads(str(arrays["info"])) if "info" in arrays else {}
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (IndexError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        needed = "train_features (N, D), train_labels (N,), val_features and val_labels are needed"
        raise DataError(f"{path} is no file of features: {needed} ({error})") from None
    if [(n, *d) for n, *d in shapes] != [(*y.shape,
                                          shapes[0][-1]) for y in labels] or not all(len(y) for y in labels):
        found = ", ".join(str(tuple(shape)) for shape in (*shapes, *(y.shape for y in labels)))
        raise DataError(f"{path}: features (N, D) with labels (N,) are needed, of one D for train and val: "
                        f"found {found}")
    unknown = sorted(set(labels[1].tolist()) - set(labels[0].tolist()) - {-1})
    if unknown:
        raise DataError(f"{path}: label {unknown[0]} of the features to classify is not among the training "
                        f"labels")
    mine = [y[slice(*rows_of(len(y), *place))] for y in labels]
    return (rows[0].float(), mine[0]), (rows[1].float(), mine[1]), info


def _read(archive, name, rank, world_size):
    """Shape of an array in an .npz file, and the rows of it that a rank holds, as a tensor: the others never
    get into memory."""
    with archive.open(f"{name}.npy") as member:
        header = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        shape, by_column, dtype = header[np.lib.format.read_magic(member)](member)
        if dtype.kind not in "fiu" or (by_column and len(shape) > 1):
            raise ValueError(f"{name} holds no rows of numbers")
        first, last = rows_of(shape[0], rank, world_size)
        size = dtype.itemsize * math.prod(shape[1:])
        member.seek(first * size, os.SEEK_CUR)
        rows = np.frombuffer(bytearray(member.read((last - first) * size)), dtype)
        return shape, torch.from_numpy(rows.reshape(last - first, *shape[1:]))
