"""Computes accuracy over all ranks, and the agreement of two labellings.

A labelling is (N,) with any integers, negative ones too; only which items share a label matters. NMI is the
same as in the training log.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.special import gammaln

from .. import distributed
from ..engine.log import mutual_information, nmi


def accuracy(scores, labels):
    """Returns (top-1, top-5) in percent over the rows of all ranks. top-5 is None below five classes.

    scores (n, C) and labels (n,): this rank's rows; those with label -1 are left out. Each image is on one
    rank, so it counts once for any number of ranks. A row with a score that is not finite is wrong.
    """
    return ranked_accuracy(ranked(scores)[:, None], labels)[0]


def ranked(scores):
    """Returns the (up to) five best classes (..., 5) of scores (..., C), in order; -1: one is not finite."""
    ranking = scores.topk(min(5, scores.shape[-1])).indices
    return torch.where(scores.isfinite().all(dim=-1, keepdim=True), ranking, -1)


def ranked_accuracy(ranking, labels):
    """Returns [(top-1, top-5)] of H classifiers, as `accuracy`, from their best classes (n, H, up to 5)."""
    asked = (labels >= 0).to(ranking.device)
    hits = ranking[asked] == labels.to(ranking.device)[asked][:, None, None]  # (n, H, 5)
    counts = distributed.all_sum(torch.stack([hits[..., 0].sum(0), hits.sum((0, 2))]))  # (2, H)
    total = distributed.all_sum(asked.sum()).clamp(min=1)
    first, five = (100 * counts.double() / total).tolist()
    return list(zip(first, five if ranking.shape[-1] == 5 else [None] * len(first)))


def contingency(a, b):
    """Counts how often values of a and b meet: (values in a, values in b) int64, sparse."""
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        shapes = f"got shapes {a.shape} and {b.shape}"
        raise ValueError(f"two labellings of the same items, (N,) with N >= 1, are needed: {shapes}")
    rows, columns = (np.unique(x, return_inverse=True)[1] for x in (a, b))
    counts = coo_array((np.ones(len(a), np.int64), (rows, columns)))
    counts.sum_duplicates()
    return counts


def ami(a, b):
    """Adjusted mutual information, arithmetic mean (SeLa's "aNMI"): 1 if equal, 0 on average by chance."""
    mutual, h_a, h_b, size_a, size_b = mutual_information(a, b)
    mean, n = (h_a + h_b) / 2, size_a.sum()
    if len(size_a) == len(size_b) and len(size_a) in (1, n):
        return 1.0  # both have all items in one cluster, or each alone: equal, where the formula is 0 / 0
    expected = expected_information(size_a, size_b)
    return float((mutual - expected) / (mean - expected))


def expected_information(size_a, size_b):
    """Returns the mean mutual information of all labellings with these sizes (hypergeometric model)."""
    n, total = size_a.sum(), 0.0
    f = gammaln(np.arange(n + 1) + 1)  # logarithms of the factorials
    size_a, times_a = np.unique(size_a, return_counts=True)
    size_b, times_b = np.unique(size_b, return_counts=True)
    for a, times in zip(size_a, times_a):
        # Range of the overlap of two clusters; Chernoff's bounds cut off probabilities below exp(-45).
        mean = a * size_b / n
        first = np.maximum(np.maximum(1, a + size_b - n), np.floor(mean - np.sqrt(90 * mean)))
        last = np.minimum(np.minimum(a, size_b), np.ceil(mean + 15 + np.sqrt(225 + 90 * mean)))
        first, lengths = first.astype(np.int64), (last - first + 1).astype(np.int64)
        column = np.repeat(np.arange(len(size_b)), lengths)
        overlap = np.arange(len(column)) - np.repeat(lengths.cumsum() - lengths - first, lengths)
        b = size_b[column]
        log_p = f[a] + f[b] + f[n - a] + f[n - b] - f[n]
        log_p -= f[overlap] + f[a - overlap] + f[b - overlap] + f[n - a - b + overlap]
        total += times * (times_b[column] * overlap / n * np.log(n * overlap / (a * b)) * np.exp(log_p)).sum()
    return total


def ari(a, b):
    """Adjusted Rand index over pairs of items that share a cluster: 1 if equal, 0 on average by chance."""
    counts = contingency(a, b)
    sizes = counts.data, counts.sum(axis=1), counts.sum(axis=0)
    together, in_a, in_b = ((x * (x - 1.0) / 2).sum() for x in sizes)
    pairs = counts.sum() * (counts.sum() - 1.0) / 2
    expected = in_a * in_b / pairs if pairs else 0.0
    if in_a == in_b == together:
        return 1.0
    return float((together - expected) / ((in_a + in_b) / 2 - expected))


def hungarian_accuracy(a, b):
    """Share of items that the best one-to-one matching of clusters with classes gets right. Clusters beyond
    the number of classes stay unmatched."""
    counts = contingency(a, b).toarray()
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum())


def purity(a, b):
    """Share of items that have the most frequent label b of their cluster a. Not symmetric."""
    counts = contingency(a, b)
    return float(counts.max(axis=1).sum() / counts.sum())


METRICS = {"nmi": nmi, "ami": ami, "ari": ari, "hungarian": hungarian_accuracy, "purity": purity}
