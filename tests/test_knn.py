"""The weighted k-nearest-neighbour classifier against a few lines of NumPy."""

import numpy as np
import pytest
import torch
from helpers import ranks
from PIL import Image

from common.distributed import rank
from common.engine.errors import Diverged
from common.features import extract, knn_accuracy
from common.features import knn_classify as classify


class Greys:
    """Images of one grey each; what is no grey cannot be read."""

    def __init__(self, *values):
        self.values, self.labels = values, torch.zeros(len(values), dtype=torch.int64)
        self.paths = [f"{i}.png" for i in range(len(values))]

    def __len__(self):
        return len(self.values)

    def read(self, i):
        return Image.new("RGB", (4, 4), (self.values[i],) * 3)


class Overflowing(torch.nn.Module):
    """White becomes infinite, black nothing."""

    def __init__(self):
        super().__init__()
        self.factor = torch.nn.Parameter(torch.tensor(3e38))

    def forward(self, x):
        return x.mean((2, 3)).clamp(min=0) * self.factor


def features_of(*values):
    try:
        return extract(Overflowing(), Greys(*values), 4, 4, torch.device("cpu"), batch_size=2)
    except Diverged as error:
        return str(error)


def test_features_of_readable_images_that_are_not_finite_are_refused_by_name():
    rows, labels = features_of(0, None, 0, 0, None)
    assert rows.isnan().any(1).tolist() == [False, True, False, False, True]
    assert labels.tolist() == [0, -1, 0, 0, -1]
    found = "features of images that can be read are not finite, 2 of 5: '2.png', '4.png'; "
    found += "the weights have run away"
    assert features_of(0, None, 255, 0, 255) == found
    assert ranks(2, features_of, 0, None, 255, 0, 255) == [found, found]
    assert ranks(2, features_of, 0, 0, 0, 0, 255) == [found.replace("2 of 5: '2.png', ", "1 of 5: ")] * 2


def draw(seed=0, bank=40, queries=7, classes=3, dim=6):
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(bank, dim, generator=generator), torch.randn(queries, dim, generator=generator)
    labels = torch.randint(classes, (bank,), generator=generator)
    truth = torch.randint(classes, (queries,), generator=generator)
    return x * torch.rand(bank, 1, generator=generator).add(0.1), labels, y, truth


def brute_force(bank, labels, queries, k, temperature, classes):
    bank, queries = (x.double().numpy() / np.linalg.norm(x.double().numpy(), axis=1,
                                                         keepdims=True) for x in (bank, queries))
    votes = np.zeros((len(queries), classes))
    for query, row in zip(queries, votes):
        similarity = (bank * query).sum(axis=1)  # row by row alike, so copies are equally near
        for i in np.argsort(-similarity, kind="stable")[:k]:
            row[int(labels[i])] += np.exp((similarity[i] - 1) / temperature)
    return votes


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_votes_equal_brute_force(temperature):
    bank, labels, queries, _ = draw()
    votes = classify(bank, labels, queries, [10, 1, 40], temperature, 3)
    assert list(votes) == [10, 1, 40]
    for k, ours in votes.items():
        expected = brute_force(bank, labels, queries, k, temperature, 3)
        assert ours.shape == (7, 3)
        np.testing.assert_allclose(ours, expected, rtol=2e-5, atol=0)
        assert torch.equal(ours, classify(bank, labels, queries, k, temperature, 3)[k])


def test_accuracy_counts_the_queries_whose_class_has_most_votes():
    bank, labels, queries, truth = draw(classes=8, queries=50)
    accuracy = knn_accuracy(bank, labels, queries, truth, [3, 20], 0.1)
    for k, (top1, top5) in accuracy.items():
        votes = brute_force(bank, labels, queries, k, 0.1, 8)
        ranking = np.argsort(-votes, axis=1, kind="stable")[:, :5]
        hits = ranking == truth.numpy()[:, None]
        assert top1 == pytest.approx(100 * hits[:, 0].mean()) and 0 < top1 < 100
        assert top5 is None if k < 5 else top5 == pytest.approx(100 * hits.sum() / 50)


def test_more_neighbours_than_the_bank_has_are_left_out():
    bank, labels, queries, truth = draw(bank=40)
    assert list(classify(bank, labels, queries, [41, 40, 200, 5], 0.07, 3)) == [40, 5]
    assert classify(bank, labels, queries, 41, 0.07, 3) == {} == knn_accuracy(bank, labels, queries, truth,
                                                                              [41, 100])


def test_a_bank_of_one_image_is_everybodys_neighbour():
    queries = torch.tensor([[2.0, 0.0], [-1.0, 0.0], [0.0, 3.0]])
    votes = classify(torch.tensor([[5.0, 0.0]]), torch.tensor([2]), queries, [1, 2], 0.5, 4)
    assert list(votes) == [1]
    expected = torch.zeros(3, 4, dtype=torch.float64)
    expected[:, 2] = torch.tensor([1.0, np.exp(-4), np.exp(-2)])
    torch.testing.assert_close(votes[1], expected)
    accuracy = knn_accuracy(torch.tensor([[5.0, 0.0]]), torch.tensor([2]), queries, torch.tensor([2, 0, 2]),
                            [1], 0.5)
    assert accuracy == {1: (pytest.approx(200 / 3), None)}


@pytest.mark.parametrize("temperature", [0.07, 0.01, 0.003])
def test_a_small_temperature_only_makes_the_nearest_count_more(temperature):
    centres = torch.eye(8)[:4]
    rows = centres.repeat_interleave(20, 0) + 0.15 * torch.randn(80, 8,
                                                                 generator=torch.Generator().manual_seed(0))
    labels = torch.arange(4).repeat_interleave(20)
    assert knn_accuracy(rows[::2], labels[::2], rows[1::2], labels[1::2], 10, temperature)[10][0] == 100


@pytest.mark.parametrize("chunk", [1, 700, 1535, 1536, 1999])
def test_the_size_of_a_chunk_changes_nothing(chunk):
    bank, labels, queries, _ = draw(queries=50)
    whole, parts = (classify(bank, labels, queries, [1, 9], 0.07, 3, chunk=c) for c in (1 << 26, chunk))
    for k in whole:
        torch.testing.assert_close(parts[k], whole[k], rtol=1e-5, atol=0)


def copies():
    """53 rows of the bank, in any order, are copies of five: at the border of almost every k are some that
    differ in their label."""
    bank, labels, queries, truth = draw(bank=53, queries=50, classes=6, dim=20)
    return bank[torch.randint(5, (53,), generator=torch.Generator().manual_seed(1))], labels, queries, truth


@pytest.mark.parametrize("chunk", [1 << 26, 1, 1500])
def test_of_equally_near_rows_the_first_vote(chunk):
    bank, labels, queries, _ = copies()
    ks = [1, 4, 9, 20, 52, 53]
    votes = classify(bank, labels, queries, ks, 0.07, 6, chunk=chunk)
    for k in ks:
        np.testing.assert_allclose(votes[k], brute_force(bank, labels, queries, k, 0.07, 6), rtol=2e-5,
                                   atol=0)
        assert torch.equal(classify(bank, labels, queries, k, 0.07, 6, chunk=chunk)[k], votes[k])


def test_among_rows_all_alike_the_first_vote():
    labels = torch.arange(3000) % 7
    votes = classify(torch.ones(3000, 33), labels, torch.randn(40, 33), [3, 500], 0.07, 7)
    for k in votes:
        expected = labels[:k].bincount(minlength=7) / k
        torch.testing.assert_close(votes[k] / votes[k].sum(dim=1, keepdim=True),
                                   expected.double().expand(40, 7), rtol=1e-6, atol=0)


def test_a_row_that_is_no_number_does_not_stop_the_others():
    bank, labels, queries, truth = copies()
    bank[7] = queries[3] = np.nan
    votes = classify(bank, labels, queries, [9, 53], 0.07, 6)
    assert all(v.shape == (50, 6) and v.isnan().any(dim=1).all() for v in votes.values())
    assert knn_accuracy(bank, labels, queries, truth, [9, 53]).keys() == {9, 53}


def test_of_classes_with_equal_votes_the_first_wins():
    bank, labels = torch.ones(6, 3), torch.tensor([5, 4, 3, 2, 1, 0])
    accuracy = [knn_accuracy(bank, labels, torch.ones(1, 3), torch.tensor([c]), [1, 2, 6]) for c in range(6)]
    assert [c for c in range(6) if accuracy[c][1][0]] == [5]
    assert [c for c in range(6) if accuracy[c][2][0]] == [4]
    assert [c for c in range(6) if accuracy[c][6][0]] == [0]
    assert [c for c in range(6) if accuracy[c][6][1]] == [0, 1, 2, 3, 4]


def test_unreadable_images_neither_vote_nor_count():
    bank, labels, queries, truth = draw(classes=6, queries=30)
    expected = knn_accuracy(bank, labels, queries, truth, [5, 40], 0.1)

    def spoil(x, y):
        zero, unknown = torch.zeros(1, x.shape[1]), torch.tensor([-1])
        return torch.cat([zero, x[:4], zero, x[4:], zero]), torch.cat([unknown, y[:4], unknown, y[4:],
                                                                       unknown])

    assert knn_accuracy(*spoil(bank, labels), *spoil(queries, truth), [5, 40, 41], 0.1) == expected
    assert set(expected) == {5, 40} and 0 < expected[5][0] < 100


def test_classes_without_a_vote_follow_in_their_order():
    """As in MMSelfSup and DINO: where two classes have votes, three more come into the top five."""
    bank, labels, queries, _ = draw(bank=12, queries=20, classes=2)
    truth = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7] * 2 + [5] * 4)
    top1, top5 = knn_accuracy(bank, labels, queries, truth, [5, 12])[12]
    assert top5 == 50 and top1 <= 20
    assert knn_accuracy(bank, labels, queries, torch.full((20,), 4), 5) == {5: (0, 100)}


def test_top5_needs_five_classes_and_five_neighbours():
    for classes, seen in ((4, False), (5, True)):
        accuracy = knn_accuracy(*draw(classes=classes, bank=200, queries=100), [4, 5])
        assert accuracy[4][1] is None and (accuracy[5][1] is not None) == seen


# ---- several processes

SPLITS = {  # world size: rows of the bank and of the queries on each rank
    2: [((25, 15), (3, 4)), ((40, 0), (0, 7)), ((2, 38), (7, 0))],
    3: [((13, 13, 14), (2, 2, 3)), ((0, 3, 37), (4, 0, 3))],
}


def shards(world_size):
    results = []
    for banks, queries in SPLITS[world_size]:
        x, y, q, truth = (part.split(sizes)[rank()] for part, sizes in zip(draw(classes=6),
                                                                           (banks, banks, queries, queries)))
        votes = classify(x, y, q, [9, 1, 40, 41], 0.07, 6, chunk=80)
        results.append((votes, knn_accuracy(x, y, q, truth, [9, 1, 40, 41])))
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_with_unequal_or_no_rows_equal_one_process(world_size):
    bank, labels, queries, truth = draw(classes=6)
    votes = classify(bank, labels, queries, [9, 1, 40], 0.07, 6)
    accuracy = knn_accuracy(bank, labels, queries, truth, [9, 1, 40])
    results = ranks(world_size, shards, world_size)
    for i, (_, sizes) in enumerate(SPLITS[world_size]):
        for result in results:
            assert result[i][1] == accuracy and list(result[i][0]) == [9, 1, 40]
        for k in votes:
            blocks = [result[i][0][k] for result in results]
            assert tuple(map(len, blocks)) == sizes
            torch.testing.assert_close(torch.cat(blocks), votes[k], rtol=1e-5, atol=0)


# rows of the bank on each rank
COPIES = {2: [(25, 28), (53, 0), (2, 51)], 3: [(17, 18, 18), (0, 7, 46), (31, 21, 1)]}


def shards_of_copies(world_size):
    bank, labels, queries, truth = copies()
    q, t = (part.tensor_split(world_size)[rank()] for part in (queries, truth))
    votes, accuracies = [], []
    for sizes in COPIES[world_size]:
        x, y = (part.split(sizes)[rank()] for part in (bank, labels))
        for chunk in (1 << 26, 1):
            votes.append(classify(x, y, q, [1, 4, 9, 20, 52], 0.07, 6, chunk))
            assert torch.equal(classify(x, y, q, 9, 0.07, 6, chunk)[9], votes[-1][9])
        accuracies.append(knn_accuracy(x, y, q, t, [1, 4, 9, 20, 52]))
    return votes, accuracies


@pytest.mark.parametrize("world_size", [2, 3])
def test_of_equally_near_rows_on_several_ranks_the_first_vote(world_size):
    bank, labels, queries, truth = copies()
    expected = classify(bank, labels, queries, [1, 4, 9, 20, 52], 0.07, 6)
    accuracy = knn_accuracy(bank, labels, queries, truth, [1, 4, 9, 20, 52])
    votes, accuracies = zip(*ranks(world_size, shards_of_copies, world_size))
    assert all(a == accuracy for each in accuracies for a in each)
    for parts in zip(*votes, strict=True):
        assert all(torch.equal(torch.cat([part[k] for part in parts]), expected[k]) for k in expected)
