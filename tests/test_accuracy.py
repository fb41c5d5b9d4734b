"""Accuracies that evaluations count over all ranks."""

import math

import pytest
import torch
from helpers import ranks

from common.distributed import rank
from common.evaluation.metrics import accuracy, ranked, ranked_accuracy


def draw(n=23, classes=7):
    g = torch.Generator().manual_seed(0)
    scores, labels = torch.randn(n, 2, classes, generator=g), torch.randint(classes, (n,), generator=g)
    labels[5] = -1
    scores[7, 0, 2], labels[7] = math.nan, 2  # topk would take it for the best
    return scores, labels


def expected(scores, labels, k):
    hits = [label in row.argsort(descending=True)[:k] and row.isfinite().all()
            for row, label in zip(scores, labels) if label >= 0]
    return pytest.approx(100 * sum(map(bool, hits)) / len(hits))


def test_accuracy():
    scores, labels = draw()
    for h, found in enumerate(ranked_accuracy(ranked(scores), labels)):
        assert found == tuple(expected(scores[:, h], labels, k) for k in (1, 5))
        assert found == accuracy(scores[:, h], labels)
        assert 0 < found[0] < found[1] < 100


def test_top5_needs_five_classes():
    for classes, seen in ((4, False), (5, True)):
        scores, labels = draw(classes=classes)
        assert (accuracy(scores[:, 1], labels)[1] is not None) == seen


def shards():
    found = []
    for counts in ((12, 11), (0, 23), (20, 3)):
        scores, labels = (x.split(counts)[rank()] for x in draw())
        found.append(ranked_accuracy(ranked(scores), labels))
    return found


def test_ranks_count_each_image_once():
    one = ranked_accuracy(ranked(draw()[0]), draw()[1])
    assert ranks(2, shards) == [[one] * 3] * 2
