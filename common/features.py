"""Features of a whole data set by index, sharded over ranks, and the weighted k-NN classifier that judges them."""

import json
import math
import os
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from . import checkpoint, data, distributed
from .multicrop import MEAN, STD, CenterCrop, photometric


def rows_of(n, rank, world_size):
    """First and last + 1 of the data-set rows that a rank holds."""
    return rank * n // world_size, (rank + 1) * n // world_size


@torch.inference_mode()
def extract(
    model,
    images,
    resize,
    size,
    device,
    mean=MEAN,
    std=STD,
    batch_size=256,
    workers=0,
    precision=torch.float32,
    bad=None,
    agree=None,
    view=CenterCrop,
):
    """Features of this rank's rows of a set, by data-set index, from its centre crops with the model in eval mode.

    model: (B, 3, size, size) -> (B, D). precision: torch.bfloat16 for autocast. bad: a set that takes the indices of images
    that cannot be read. agree: called now and then, on all ranks equally often. view: TenCrop shows the model ten crops an
    image, (10 B, 3, size, size) crop-major, of which it makes B rows.
    Returns features (n, D), as the model gives them, and labels (n,) int64 or None: of the rows [rN/W, (r+1)N/W). A row
    whose image cannot be read is NaN and has label -1.
    """
    first, last = rows_of(len(images), distributed.rank(), distributed.world_size())
    loader = data.Loader(view(images, resize, size), workers, pin_memory=device.type == "cuda")
    order = range(first, last)
    batches = data.batches(len(images), batch_size, 0, 0, 0, 1, order=order, drop_last=False)
    labels = None if images.labels is None else images.labels[first:last].clone()
    dtype = next(model.parameters()).dtype
    training = model.training
    model.eval()
    every_rank = len(images) // distributed.world_size() // batch_size  # batches that all ranks have

    def look(x):
        with torch.autocast(device.type, dtype=precision, enabled=precision == torch.bfloat16):
            return model(x)

    features, unreadable = None, []
    for step, (wanted, (index, crops, params)) in enumerate(zip(batches, loader.epoch(0, batches))):
        if agree and step < every_rank:
            agree()
        block = look(photometric(crops[0].flatten(0, 1).to(device, non_blocking=True), params.flatten(0, 1), mean, std, dtype))  # (B, D)
        features = block.new_empty(last - first, block.shape[1]) if features is None else features
        features[step * batch_size :][: len(block)] = block
        unreadable += [position for (position, i), got in zip(wanted, index.tolist()) if got != i]
    if features is None:  # a rank without rows: of the others' width and type
        features = look(torch.zeros(view.views, 3, size, size, device=device, dtype=dtype))[:0]
    if bad is not None:
        bad.update(loader.bad)
    loader.close()
    model.train(training)
    features[unreadable] = math.nan
    if labels is not None:
        labels[unreadable] = -1
    return features, labels


def save(path, train, val, info):
    """Writes features and labels of all ranks to one .npz file, which `load` and NumPy read: train_features (N, D) float32,
    train_labels (N,), val_features, val_labels, and info, a dict, as JSON. train, val: this rank's (features, labels)."""
    arrays = {"train_features": train[0].float(), "train_labels": train[1], "val_features": val[0].float(), "val_labels": val[1]}
    blocks = _blocks(arrays)
    problem = None
    if distributed.rank() == 0:
        try:
            with checkpoint.writing(Path(path)) as file, zipfile.ZipFile(file, "w") as archive:
                for name in arrays:
                    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                        np.lib.format.write_array_header_1_0(member, next(blocks))
                        while (block := next(blocks)) is not None:
                            member.write(block.data)
                with archive.open("info.npy", "w") as member:
                    np.save(member, np.array(json.dumps(info)), allow_pickle=False)
        except OSError as error:
            problem = data.DataError(f"{path} cannot be written: {error.strerror or error}")
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
    """((features, labels) to train on, those to judge by, info) of a file that `save` or numpy.savez wrote: this rank's rows.

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
        raise data.DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except (IndexError, KeyError, TypeError, ValueError, zipfile.BadZipFile) as error:
        needed = "train_features (N, D), train_labels (N,), val_features and val_labels are needed"
        raise data.DataError(f"{path} is no file of features: {needed} ({error})") from None
    if [(n, *d) for n, *d in shapes] != [(*y.shape, shapes[0][-1]) for y in labels] or not all(len(y) for y in labels):
        found = ", ".join(str(tuple(shape)) for shape in (*shapes, *(y.shape for y in labels)))
        raise data.DataError(f"{path}: features (N, D) with labels (N,) are needed, of one D for train and val: found {found}")
    unknown = sorted(set(labels[1].tolist()) - set(labels[0].tolist()) - {-1})
    if unknown:
        raise data.DataError(f"{path}: label {unknown[0]} of the features to classify is not among the training labels")
    mine = [y[slice(*rows_of(len(y), *place))] for y in labels]
    return (rows[0].float(), mine[0]), (rows[1].float(), mine[1]), info


def _read(archive, name, rank, world_size):
    """Shape of an array in an .npz file, and the rows of it that a rank holds, as a tensor: the others never get into memory."""
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


@torch.inference_mode()
def classify(bank, labels, queries, k, temperature, classes, chunk=1 << 26):
    """Weighted k-nearest-neighbour votes (Wu et al. 2018, as in DINO's evaluation) by cosine similarity.

    The k nearest rows of the bank vote for their label with weight exp((similarity - 1) / temperature): the usual
    weights up to one factor, so the ranking is the same and nothing overflows. Of rows equally near those first in the
    bank of all ranks, in rank order, are nearer.

    bank (N, D), labels (N,): this rank's rows; queries (M, D): this rank's rows. Rows of all ranks are searched.
    k: one number or several; those above the bank's size are left out. chunk: entries of the similarity block held, but
    it is never of fewer than 16 queries.
    Returns {k: votes (M, classes) float64} for this rank's queries; a class without a neighbour has exactly 0.
    """
    ks, near, voters = _neighbours(bank, labels, queries, k, chunk)
    return {k: _votes(near[:, :k], voters[:, :k], temperature, classes) for k in ks}


def _neighbours(bank, labels, queries, k, chunk=1 << 26):
    """The k that the bank of all ranks suffices for, and similarity and label (M, largest of them) of the neighbours, nearest first.

    Equally near is what has the same float32 similarity. So have copies of a row, wherever they lie: the operands of the
    product get multiples of 16 rows, because at a ragged edge a CPU adds up in another order and the last bit differs. No
    library promises this, though: it was measured with MKL on an AVX-512 CPU, for all chunks and splits tried, and where it
    does not hold (a GPU may choose its kernel by the shape) copies on two ranks can still be a last bit apart.
    """
    ks = [k] if isinstance(k, int) else list(k)
    sizes = distributed.gather_rows(torch.tensor([[len(bank), len(queries)]], device=bank.device)).tolist()
    ks = [k for k in ks if k <= sum(n for n, _ in sizes)]
    if not ks:
        return [], None, None
    k, n, labels = max(ks), len(bank), labels.to(bank.device)
    bank = _unit(bank)
    queries = distributed.gather_rows(queries)  # each rank searches its part of the bank for everybody
    count, queries = len(queries), _unit(queries)
    near, voters = [], []
    for block in queries.split(max(16, chunk // max(1, len(bank)) // 16 * 16)):
        similarity, row = _largest((block @ bank.T)[:, :n], min(k, n))
        near.append(similarity)
        voters.append(labels[row])
    near, voters = torch.cat(near)[:count], torch.cat(voters)[:count]  # (M of all ranks, up to k)
    if distributed.world_size() > 1:
        near, voters = distributed.gather_rows(near.T).T, distributed.gather_rows(voters.T).T
        near, order = near.sort(dim=1, descending=True, stable=True)  # equal ones stay in the order of rank and row
        near, voters = near[:, :k], voters.gather(1, order[:, :k])
    first = sum(m for _, m in sizes[: distributed.rank()])
    mine = slice(first, first + sizes[distributed.rank()][1])
    return ks, near[mine], voters[mine]


def _unit(x):
    """Rows of x at length 1 in float32, and rows of zeros up to a multiple of 16."""
    rows = torch.zeros(-(-len(x) // 16) * 16, x.shape[1], device=x.device)
    F.normalize(x.float(), out=rows[: len(x)])
    return rows


def _largest(x, k):
    """The k largest entries of each row, in descending order, and their columns; equal ones by column."""
    value, column = x.topk(min(k + 1, x.shape[1]))  # of equal ones any, in any order
    if value.shape[1] > k > 0:
        for i in (value[:, k - 1] == value[:, k]).nonzero()[:, 0].tolist():  # which of the equal ones is open
            least = value[i, k - 1]
            above = (~(x[i] <= least)).nonzero()[:, 0]
            column[i, :k] = torch.cat([above, (x[i] == least).nonzero()[: k - len(above), 0]])
    column = column[:, :k].sort(dim=1).values
    value, order = x.gather(1, column).sort(dim=1, descending=True, stable=True)
    return value, column.gather(1, order)


def _votes(near, voters, temperature, classes):
    weights = ((near.double() - 1) / temperature).exp()  # float32 would underflow at small temperatures
    return weights.new_zeros(len(near), classes).scatter_add_(1, voters, weights)


@torch.inference_mode()
def knn_accuracy(bank, labels, queries, query_labels, k, temperature=0.07):
    """{k: (top-1, top-5)} in percent of the queries of all ranks; top-5 is None below five classes or neighbours.

    Arguments as in `classify`; rows with label -1 (unreadable images) are left out. A class without a vote never counts;
    of classes with equal votes the first comes first.
    """
    largest = max([-1, *labels.tolist(), *query_labels.tolist()])
    classes = int(distributed.all_max(torch.tensor(largest))) + 1
    (bank, labels), (queries, truth) = _labelled(bank, labels), _labelled(queries, query_labels)
    ks, near, voters = _neighbours(bank, labels, queries, k)
    truth = truth.to(queries.device)[:, None]
    order, best = (torch.tensor(x, device=queries.device) for x in (range(classes), (1, 5)))
    rows = max(1, (1 << 24) // max(1, classes))  # votes of so many queries at a time are held
    accuracy = {}
    for number in ks:
        counts = torch.tensor([len(truth), 0, 0], device=queries.device)
        for similarity, voter, answer in zip(near.split(rows), voters.split(rows), truth.split(rows)):
            votes = _votes(similarity[:, :number], voter[:, :number], temperature, classes)
            right = votes.gather(1, answer)
            before = (~(votes <= right) | ((votes == right) & (order < answer))).sum(dim=1, keepdim=True)  # classes ranked higher
            counts[1:] += ((right > 0) & (before < best)).sum(dim=0)
        total, *hits = distributed.all_sum(counts).tolist()
        top1, top5 = (100 * count / max(1, total) for count in hits)
        accuracy[number] = (top1, top5 if min(number, classes) >= 5 else None)
    return accuracy


def _labelled(x, labels):
    keep = labels >= 0
    return (x, labels) if keep.all() else (x[keep.to(x.device)], labels[keep])
