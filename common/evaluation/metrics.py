"""Figures: accuracies counted over all ranks, and the agreement of two labellings.

Labellings are (N,) with any whole numbers, also negative ones; the names of the labels do not matter.
"""

import math

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.special import gammaln

from .. import distributed


def accuracy(scores, labels):
    """(top-1, top-5) in percent of the rows of all ranks; top-5 is None below five classes.

    scores (n, C) and labels (n,): this rank's rows; those with label -1 are left out. An image counts once,
    on one rank, and counts are summed, so the result does not depend on the number of ranks. A row with a
    score that is not finite is wrong.
    """
    return ranked_accuracy(ranked(scores)[:, None], labels)[0]


def ranked(scores):
    """(..., C) scores to the up to five best classes (..., 5), best first; -1 in a row with a score that is
    not finite."""
    ranking = scores.topk(min(5, scores.shape[-1])).indices
    return torch.where(scores.isfinite().all(dim=-1, keepdim=True), ranking, -1)


def ranked_accuracy(ranking, labels):
    """[(top-1, top-5)] of several classifiers, counted as `accuracy` does from their best classes, ranking
    (n, H, up to 5)."""
    asked = (labels >= 0).to(ranking.device)
    hits = ranking[asked] == labels.to(ranking.device)[asked][:, None, None]  # (n, H, 5)
    # (3, H)
    counts = torch.stack([hits[..., 0].sum(0), hits.sum((0, 2)),
                          torch.full_like(hits[..., 0].sum(0), len(hits))])
    first, five, total = distributed.all_sum(counts).tolist()
    return [(100 * a / max(1, n), 100 * b / max(1, n) if ranking.shape[-1] == 5 else None) for a, b,
            n in zip(first, five, total)]


def contingency(a, b):
    """How often each value of a meets each value of b: (values in a, values in b) int64, sparse."""
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"two labellings of the same items, (N,) with N >= 1, are needed: got shapes "
                         f"{a.shape} and {b.shape}")
    rows, columns = (np.unique(x, return_inverse=True)[1] for x in (a, b))
    counts = coo_array((np.ones(len(a), np.int64), (rows, columns)))
    counts.sum_duplicates()
    return counts


def entropy(counts):
    share = counts / counts.sum()
    return -(share * np.log(share)).sum()


def _information(a, b):
    """Mutual information of a and b in nats, their entropies, and how often each value occurs."""
    counts = contingency(a, b)
    n, size_a, size_b = counts.sum(), counts.sum(axis=1), counts.sum(axis=0)
    mutual = (counts.data / n * np.log(n * counts.data / (size_a[counts.row] * size_b[counts.col]))).sum()
    return max(0.0, mutual), entropy(size_a), entropy(size_b), size_a, size_b


def nmi(a, b, geometric=False):
    """Mutual information over the arithmetic mean of the entropies, or the geometric one (DeepCluster's
    paper): 0 to 1."""
    mutual, h_a, h_b, size_a, size_b = _information(a, b)
    if len(size_a) == len(size_b) == 1:
        return 1.0
    mean = math.sqrt(h_a * h_b) if geometric else (h_a + h_b) / 2
    return float(mutual / mean) if mean else 0.0


def ami(a, b):
    """Adjusted mutual information, arithmetic mean ("aNMI" in SeLa's table): 1 if equal, 0 on average by
    chance."""
    mutual, h_a, h_b, size_a, size_b = _information(a, b)
    mean, n = (h_a + h_b) / 2, size_a.sum()
    if len(size_a) == len(size_b) and len(size_a) in (1, n):
        return 1.0  # all in one, or each alone, in both: equal, though chance would do no worse
    expected = expected_information(size_a, size_b)
    return float((mutual - expected) / (mean - expected))


def expected_information(size_a, size_b):
    """Mean mutual information of all pairs of labellings with these cluster sizes (hypergeometric model)."""
    n, total = size_a.sum(), 0.0
    log_factorial = gammaln(np.arange(n + 1) + 1)
    (size_a, times_a), (size_b,
                        times_b) = (np.unique(sizes, return_counts=True) for sizes in (size_a, size_b))
    for a, times in zip(size_a, times_a):
        # The overlap of two clusters, but for what lies where its probability is below exp(-45), by
        # Chernoff's bounds.
        mean = a * size_b / n
        first = np.maximum(np.maximum(1, a + size_b - n),
                           np.floor(mean - np.sqrt(90 * mean))).astype(np.int64)
        last = np.minimum(np.minimum(a, size_b),
                          np.ceil(mean + 15 + np.sqrt(225 + 90 * mean))).astype(np.int64)
        lengths = last - first + 1
        column = np.repeat(np.arange(len(size_b)), lengths)
        overlap = np.arange(len(column)) - np.repeat(lengths.cumsum() - lengths - first, lengths)
        b = size_b[column]
        log_p = log_factorial[a] + log_factorial[b] + log_factorial[n
                                                                    - a] + log_factorial[n
                                                                                         - b] - log_factorial[n]
        log_p -= log_factorial[overlap] + log_factorial[a
                                                        - overlap] + log_factorial[b
                                                                                   - overlap] + log_factorial[n - a
                                                                                                              - b + overlap]
        total += times * (times_b[column] * overlap / n * np.log(n * overlap / (a * b)) * np.exp(log_p)).sum()
    return total


def ari(a, b):
    """Adjusted Rand index: agreement on the pairs of items that are together; 1 if equal, 0 on average by
    chance."""
    counts = contingency(a, b)
    together, in_a, in_b = ((x * (x - 1.0) / 2).sum() for x in (counts.data, counts.sum(axis=1),
                                                                counts.sum(axis=0)))
    pairs = counts.sum() * (counts.sum() - 1.0) / 2
    expected = in_a * in_b / pairs if pairs else 0.0
    if in_a == in_b == together:
        return 1.0
    return float((together - expected) / ((in_a + in_b) / 2 - expected))


def hungarian_accuracy(a, b):
    """Share of items that the best one-to-one matching of clusters with classes gets right ("label
    accuracy"). Clusters beyond the number of classes stay without one."""
    counts = contingency(a, b).toarray()
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum())


def purity(a, b):
    """Share of items that have the label b most frequent in their cluster a: matching many to one. Not
    symmetric."""
    counts = contingency(a, b)
    return float(counts.max(axis=1).sum() / counts.sum())


METRICS = {"nmi": nmi, "ami": ami, "ari": ari, "hungarian": hungarian_accuracy, "purity": purity}
