"""Features of a whole data set by index, sharded over ranks, and the weighted k-NN classifier that judges them."""

import math

import torch
import torch.nn.functional as F

from . import data, distributed
from .multicrop import MEAN, STD, CenterCrop, photometric


def rows_of(n, rank, world_size):
    """First and last + 1 of the data-set rows that a rank holds."""
    return rank * n // world_size, (rank + 1) * n // world_size


@torch.inference_mode()
def extract(
    model, images, resize, size, device, mean=MEAN, std=STD, batch_size=256, workers=0, precision=torch.float32, bad=None, agree=None
):
    """Features of this rank's rows of a set, by data-set index, from its centre crops with the model in eval mode.

    model: (B, 3, size, size) -> (B, D). precision: torch.bfloat16 for autocast. bad: a set that takes the indices of images
    that cannot be read. agree: called now and then, on all ranks equally often.
    Returns features (n, D), as the model gives them, and labels (n,) int64 or None: of the rows [rN/W, (r+1)N/W). A row
    whose image cannot be read is NaN and has label -1.
    """
    first, last = rows_of(len(images), distributed.rank(), distributed.world_size())
    loader = data.Loader(CenterCrop(images, resize, size), workers, pin_memory=device.type == "cuda")
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
        block = look(photometric(crops[0][0].to(device, non_blocking=True), params[0], mean, std, dtype))  # (B, D)
        features = block.new_empty(last - first, block.shape[1]) if features is None else features
        features[step * batch_size :][: len(block)] = block
        unreadable += [position for (position, i), got in zip(wanted, index.tolist()) if got != i]
    if features is None:  # a rank without rows: of the others' width and type
        features = look(torch.zeros(1, 3, size, size, device=device, dtype=dtype))[:0]
    if bad is not None:
        bad.update(loader.bad)
    loader.close()
    model.train(training)
    features[unreadable] = math.nan
    if labels is not None:
        labels[unreadable] = -1
    return features, labels


@torch.inference_mode()
def classify(bank, labels, queries, k, temperature, classes, chunk=1 << 26):
    """Weighted k-nearest-neighbour votes (Wu et al. 2018, as in DINO's evaluation) by cosine similarity.

    The k nearest rows of the bank vote for their label with weight exp((similarity - 1) / temperature): the usual
    weights up to one factor, so the ranking is the same and nothing overflows.

    bank (N, D), labels (N,): this rank's rows; queries (M, D): this rank's rows. Rows of all ranks are searched.
    k: one number or several; those above the bank's size are left out. chunk: entries of the similarity block held.
    Returns {k: votes (M, classes) float64} for this rank's queries; a class without a neighbour has exactly 0.
    """
    ks = [k] if isinstance(k, int) else list(k)
    bank, queries = F.normalize(bank.float()), F.normalize(queries.float())
    ranks = distributed.world_size()
    sizes = distributed.gather_rows(torch.tensor([[len(bank), len(queries)]], device=bank.device)).tolist()
    total = sum(n for n, _ in sizes)
    ks = [k for k in ks if k <= total]
    if not ks:
        return {}
    queries = distributed.gather_rows(queries)  # each rank searches its part of the bank for everybody
    near, voters = [], []
    for block in queries.split(max(1, chunk // max(1, len(bank)))):
        similarity, row = (block @ bank.T).topk(min(max(ks), len(bank)))
        near.append(similarity)
        voters.append(labels.to(bank.device)[row])
    near, voters = torch.cat(near), torch.cat(voters)  # (M of all ranks, up to max k)
    if ranks > 1:
        near, voters = distributed.gather_rows(near.T).T, distributed.gather_rows(voters.T).T
    near, best = near.topk(max(ks))
    voters = voters.gather(1, best)
    first = sum(m for _, m in sizes[: distributed.rank()])
    mine = slice(first, first + sizes[distributed.rank()][1])
    near, voters = near[mine], voters[mine]
    weights = ((near.double() - 1) / temperature).exp()  # float32 would underflow at small temperatures
    return {k: weights.new_zeros(len(near), classes).scatter_add_(1, voters[:, :k], weights[:, :k]) for k in ks}


def knn_accuracy(bank, labels, queries, query_labels, k, temperature=0.07):
    """{k: (top-1, top-5)} in percent of the queries of all ranks; top-5 is None below five classes or neighbours.

    Arguments as in `classify`; rows with label -1 (unreadable images) are left out. A class without a vote never counts.
    """
    largest = max([-1, *labels.tolist(), *query_labels.tolist()])
    classes = int(distributed.all_max(torch.tensor(largest))) + 1
    keep, asked = labels >= 0, query_labels >= 0
    truth = query_labels[asked].to(queries.device)[:, None]
    accuracy = {}
    for number, votes in classify(
        bank[keep.to(bank.device)], labels[keep], queries[asked.to(queries.device)], k, temperature, classes
    ).items():
        value, ranking = votes.topk(min(5, classes))
        hits = (ranking == truth) & (value > 0)
        counts = distributed.all_sum(torch.tensor([len(truth), hits[:, :1].sum(), hits.sum()], device=votes.device)).tolist()
        top1, top5 = (100 * count / max(1, counts[0]) for count in counts[1:])
        accuracy[number] = (top1, top5 if min(number, classes) >= 5 else None)
    return accuracy
