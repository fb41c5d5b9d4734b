"""Extracts the features of a whole data set, sharded over ranks, and evaluates them by k-NN."""

import math

import torch
import torch.nn.functional as F

from . import data, distributed
from .distributed import rows_of
from .engine.errors import Diverged
from .multicrop import MEAN, STD, CenterCrop, photometric


@torch.inference_mode()
def extract(model, images, resize, size, device, mean=MEAN, std=STD, batch_size=256, workers=0,
            precision=torch.float32, bad=None, fetch=next, view=CenterCrop):
    """Extracts features of this rank's rows of a data set: from centre crops, with the model in eval mode.

    model: (B, 3, size, size) -> (B, D). precision: torch.bfloat16 for autocast. bad: a set to which the
    indices of unreadable images are added. fetch: gets the next batch, called equally often on all ranks.
    view: TenCrop gives the model ten crops per image, (10 B, 3, size, size) crop-major; it returns B rows.
    Returns features (n, D), as the model outputs them, and labels (n,) int64 or None, for the rows [rN/W,
    (r+1)N/W) in data-set order. The row of an unreadable image is NaN and has label -1.
    Raises Diverged, on every rank, if the row of a readable image is not finite.
    """
    first, last = rows_of(len(images), distributed.rank(), distributed.world_size())
    loader = data.Loader(view(images, resize, size), workers, pin_memory=device.type == "cuda")
    order = range(first, last)
    batches = data.batches(len(images), batch_size, 0, 0, 0, 1, order=order, drop_last=False)
    labels = None if images.labels is None else images.labels[first:last].clone()
    dtype = next(model.parameters()).dtype
    training = model.training
    model.eval()
    every_rank = -(-(len(images) // distributed.world_size()) // batch_size)  # batches that all ranks have

    def forward(x):
        with torch.autocast(device.type, dtype=precision, enabled=precision == torch.bfloat16):
            return model(x)

    features, unreadable = None, []
    spoilt = torch.zeros(last - first, dtype=torch.bool, device=device)  # rows that are not finite
    source = loader.epoch(0, batches)
    for step, wanted in enumerate(batches):
        index, crops, params = (fetch if step < every_rank else next)(source)
        if device.type == "cuda" and 0 < step and len(index) < batch_size:
            # Pads the batch: for another batch size cuDNN would search for its fastest kernels again.
            fill = torch.arange(batch_size).clamp(max=len(index) - 1)
            crops, params = [crops[0][:, fill]], params[:, fill]
        crops = crops[0].flatten(0, 1).to(device, non_blocking=True)  # (B, 3, size, size)
        block = forward(photometric(crops, params.flatten(0, 1), mean, std, dtype))[: len(index)]  # (B, D)
        features = block.new_empty(last - first, block.shape[1]) if features is None else features
        features[step * batch_size :][: len(block)] = block
        spoilt[step * batch_size :][: len(block)] = ~block.isfinite().all(1)
        unreadable += [position for (position, i), got in zip(wanted, index.tolist()) if got != i]
    if features is None:  # a rank without rows: the others' width and dtype
        features = forward(torch.zeros(view.views, 3, size, size, device=device, dtype=dtype))[:0]
    if bad is not None:
        bad.update(loader.bad)
    loader.close()
    model.train(training)
    features[unreadable] = math.nan
    if labels is not None:
        labels[unreadable] = -1
    spoilt[unreadable] = False
    rows = distributed.gather_rows(spoilt.nonzero()[:, 0] + first).tolist()
    if rows:
        paths = getattr(images, "paths", range(len(images)))
        few = ", ".join(repr(paths[i]) for i in rows[:3])
        raise Diverged(f"features of images that can be read are not finite, {len(rows)} of {len(images)}: "
                       f"{few}; the weights have run away")
    return features, labels


@torch.inference_mode()
def knn_classify(bank, labels, queries, k, temperature, classes, chunk=1 << 26):
    """Computes weighted k-nearest-neighbour votes by cosine similarity (Wu et al. 2018; as DINO evaluates).

    The k nearest rows of the bank vote for their label with weight exp((similarity - 1) / temperature): the
    usual weights up to one factor, so the ranking is the same and nothing overflows. Among equally near
    rows, those that come first in the bank of all ranks, in rank order, count as nearer.

    bank (N, D), labels (N,): this rank's rows; queries (M, D): this rank's rows. Rows of all ranks are
    searched.
    k: one number or several; those above the bank's size are left out. chunk: number of similarities held at
    a time, but always those of at least 16 queries.
    Returns {k: votes (M, classes) float64} for this rank's queries; a class without a neighbour has exactly
    0.
    """
    ks, near, voters = _neighbours(bank, labels, queries, k, chunk)
    return {k: _votes(near[:, :k], voters[:, :k], temperature, classes) for k in ks}


def _neighbours(bank, labels, queries, k, chunk=1 << 26):
    """Returns the k that do not exceed the bank of all ranks, and the similarities and labels (M, largest k)
    of the neighbours, nearest first.

    Rows are equally near if their float32 similarities are equal. For copies of a row they are, wherever the
    copies lie: the operands of the product are padded to multiples of 16 rows, because at a ragged edge a CPU
    adds in another order and the last bit differs. No library promises this: it was measured with MKL on an
    AVX-512 CPU, for all chunks and splits tried. Where it does not hold (a GPU may choose its kernel by the
    shape), copies on two ranks can still differ in the last bit.
    """
    ks = [k] if isinstance(k, int) else list(k)
    sizes = distributed.gather_rows(torch.tensor([[len(bank), len(queries)]], device=bank.device)).tolist()
    ks = [k for k in ks if k <= sum(n for n, _ in sizes)]
    if not ks:
        return [], None, None
    k, n, labels = max(ks), len(bank), labels.to(bank.device)
    bank = _unit(bank)
    queries = distributed.gather_rows(queries)  # each rank searches its part of the bank for all queries
    count, queries = len(queries), _unit(queries)
    near, voters = [], []
    for block in queries.split(max(16, chunk // max(1, len(bank)) // 16 * 16)):
        similarity, row = _largest((block @ bank.T)[:, :n], min(k, n))
        near.append(similarity)
        voters.append(labels[row])
    near, voters = torch.cat(near)[:count], torch.cat(voters)[:count]  # (M of all ranks, up to k)
    if distributed.world_size() > 1:
        near, voters = distributed.gather_rows(near.T).T, distributed.gather_rows(voters.T).T
        # ties stay in the order of rank and row
        near, order = near.sort(dim=1, descending=True, stable=True)
        near, voters = near[:, :k], voters.gather(1, order[:, :k])
    first = sum(m for _, m in sizes[: distributed.rank()])
    mine = slice(first, first + sizes[distributed.rank()][1])
    return ks, near[mine], voters[mine]


def _unit(x):
    """Scales the rows of x to length 1 in float32, and pads with rows of zeros to a multiple of 16."""
    rows = torch.zeros(-(-len(x) // 16) * 16, x.shape[1], device=x.device)
    F.normalize(x.float(), out=rows[: len(x)])
    return rows


def _largest(x, k):
    """Returns the k largest entries of each row, descending, and their columns; ties in order of column."""
    value, column = x.topk(min(k + 1, x.shape[1]))  # ties in any order
    if value.shape[1] > k > 0:
        for i in (value[:, k - 1] == value[:, k]).nonzero()[:, 0].tolist():  # a tie at the k-th place
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
    """Returns {k: (top-1, top-5)} in percent of the queries of all ranks; top-5 is None with fewer than five
    classes or neighbours.

    Arguments as in `knn_classify`; rows with label -1 (unreadable images) are left out. Classes with equal
    votes, or none, rank in the order of their numbers, as in DINO's and MMSelfSup's evaluation: if fewer than
    five have votes, the first of the others fill up the top five.
    """
    largest = max([-1, *labels.tolist(), *query_labels.tolist()])
    classes = int(distributed.all_max(torch.tensor(largest))) + 1
    (bank, labels), (queries, truth) = _labelled(bank, labels), _labelled(queries, query_labels)
    ks, near, voters = _neighbours(bank, labels, queries, k)
    truth = truth.to(queries.device)[:, None]
    order, best = (torch.tensor(x, device=queries.device) for x in (range(classes), (1, 5)))
    rows = max(1, (1 << 24) // max(1, classes))  # number of queries whose votes are held at a time
    accuracy = {}
    for number in ks:
        counts = torch.tensor([len(truth), 0, 0], device=queries.device)
        for similarity, voter, answer in zip(near.split(rows), voters.split(rows), truth.split(rows)):
            votes = _votes(similarity[:, :number], voter[:, :number], temperature, classes)
            right = votes.gather(1, answer)
            # number of classes ranked above the right one
            before = (~(votes <= right) | ((votes == right) & (order < answer))).sum(dim=1, keepdim=True)
            counts[1:] += (before < best).sum(dim=0)
        total, *hits = distributed.all_sum(counts).tolist()
        top1, top5 = (100 * count / max(1, total) for count in hits)
        accuracy[number] = (top1, top5 if min(number, classes) >= 5 else None)
    return accuracy


def _labelled(x, labels):
    keep = labels >= 0
    return (x, labels) if keep.all() else (x[keep.to(x.device)], labels[keep])
