"""odc.py: the memory against the reference's numbers, one process or many, and what becomes of a run that is
killed."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import golden, killed_and_resumed, metrics, ranks, run_here, same, saved, two_ranks_as_one

import odc
from common import distributed
from common.distributed import rows_of
from common.engine.options import recipe
from common.optim import drops

TINY = "--recipe shapes --width 0.125 --hidden 16 --dim 8 --sizes 16 --prototypes 4 --batch-size 16".split()
TINY += "--workers 0 --log-every 1".split()
SHARED = ["--data", "shapes:80", *TINY, "--centroid-iters", 3, "--epochs", 4]


def here(*arguments):
    return run_here(odc, *arguments)


def mine(x):
    first, last = rows_of(len(x), distributed.rank(), distributed.world_size())
    return x[first:last]


# ---- the memory


def replay(name, ranks_of_the_file):
    """What the memory holds after each operation of the reference's sequence: this rank's part of it."""
    numbers = golden(name)
    n, D = numbers["init_features"].shape
    K = numbers["centroids"].shape[1]
    memory = odc.Memory(n, D, K)
    states = []
    for t, operation in enumerate(numbers["ops"].tolist()):
        changed = float("nan")
        if operation == 0:
            memory.fill(mine(numbers["init_features"]))
            memory.begin(numbers["init_labels"])
        elif operation == 1:
            index, z = numbers["idx"][t - 1], numbers["features"][t - 1]  # (W, B) (W, B, D)
            r, W = distributed.rank(), distributed.world_size()
            index, z = (index[r], z[r]) if W == ranks_of_the_file else (index.flatten(), z.flatten(0, 1))
            changed = memory.update(index, z).item()
        else:
            memory.refresh()
        states.append({**memory.state_dict(), "changed": changed, "weight": memory.loss_weight(),
                       "counts": memory.counts.clone()})
        states[-1]["centroids"], states[-1]["targets"] = memory.centroids.clone(), memory.targets.clone()
    return states


@pytest.mark.parametrize(("name", "world_size"),
                         [("odc_sequence_ws1", 1), ("odc_sequence_ws2", 1), ("odc_sequence_ws2", 2)])
def test_the_memory_does_what_the_reference_does(name, world_size):
    numbers, W = golden(name), int(name[-1])
    results = ranks(2, replay, name, W) if world_size == 2 else [replay(name, W)]
    for states in results:
        assert len(states) == len(numbers["ops"])
        for t, state in enumerate(states):
            torch.testing.assert_close(state["bank"], numbers["feature_bank"][t], rtol=0, atol=1e-6)
            torch.testing.assert_close(state["centroids"], numbers["centroids"][t], rtol=0, atol=1e-6)
            assert torch.equal(state["targets"], numbers["labels"][t])
            assert torch.equal(state["counts"], numbers["labels"][t].bincount(minlength=len(state["counts"])))
            torch.testing.assert_close(state["weight"], numbers["loss_weight_eps1e-5"][t].float(), rtol=0,
                                       atol=1e-6)
            expected = numbers["change_ratio"][t].item()
            assert state["changed"] == pytest.approx(expected, abs=1e-6, nan_ok=True)


def repaired(case):
    """The memory after the repair of one of the reference's cases; where the other half of a split moves,
    ours is turned round."""
    numbers = golden(f"odc_small_clusters_{case}")
    bank, K = numbers["feature_bank"], len(numbers["centroids"])
    memory = odc.Memory(len(bank), bank.shape[1], K, min_cluster=int(numbers["min_cluster"]))
    memory.bank.load(bank)
    memory.targets[:], memory.centroids[:] = numbers["labels"], numbers["centroids"]
    memory.count()
    splits, second_half, moved = [], odc.second_half, []

    def turned(rows, here):
        half, images = second_half(rows, here), last[0]
        t = len(splits)
        ours = torch.zeros(len(images), dtype=torch.int64)
        ours[here] = half.long()
        ours = set(images[distributed.all_sum(ours) > 0].tolist())
        kept, gone = (set(numbers[f"{name}_{t}"].tolist()) for name in ("kept", "moved"))
        assert ours in (kept, gone) and set(images.tolist()) == kept | gone
        splits.append(ours == gone)
        return half if ours == gone else ~half

    def members(clusters, find=memory.members):
        last[:] = find(clusters)
        return last

    move, last = memory.move, []
    memory.move = lambda *arguments: (move(*arguments), moved.append(memory.targets.clone()))
    memory.members = members
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(odc, "second_half", turned)
        memory.repair()
    assert torch.equal(moved[0], numbers["labels_after_reassign"])
    assert len(splits) == len(numbers["small_clusters"])
    return memory.targets, memory.centroids


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("case", range(3))
def test_small_clusters_are_merged_and_the_largest_split_as_the_reference_does(case, world_size):
    numbers = golden(f"odc_small_clusters_{case}")
    for targets, centroids in ranks(2, repaired, case) if world_size == 2 else [repaired(case)]:
        assert torch.equal(targets, numbers["labels_after"])
        torch.testing.assert_close(centroids, numbers["centroids_after"], rtol=0, atol=1e-6)


def test_loss_weights_of_the_reference():
    numbers = golden("odc_loss_weight")
    for i in range(sum(key.startswith("labels_") for key in numbers)):
        labels, K = numbers[f"labels_{i}"], int(numbers[f"num_classes_{i}"])
        memory = odc.Memory(len(labels), 2, K)
        memory.targets[:] = labels
        memory.count()
        torch.testing.assert_close(memory.loss_weight(), numbers[f"weight_eps1e-5_{i}"], rtol=1e-6, atol=1e-8)
        memory.reweight = 0
        assert torch.equal(memory.loss_weight(), torch.full((K,), 1 / K))


def history(steps=60, n=203, D=5, K=7):
    """A memory that has seen batches in which images repeat, one of them not readable at first, drifting so
    that clusters empty."""
    generator = torch.Generator().manual_seed(1)
    memory = odc.Memory(n, D, K, min_cluster=10)
    targets = torch.randint(K, (n,), generator=generator)
    targets[[3, 150]] = -100
    memory.fill(mine(torch.randn(n, D, generator=generator)))
    memory.begin(targets)
    smallest, splits, move = [], [], memory.move
    memory.move = lambda *arguments: (splits.append(1), move(*arguments))
    for step in range(steps):
        index = torch.randint(n, (12,), generator=generator)
        index[4:6] = index[7]  # an image three times in a batch
        index[index == 150] = 3  # 150 is never seen
        z = torch.randn(12, D, generator=generator) + torch.arange(D) * step / steps
        part = slice(12 * distributed.rank() // distributed.world_size(),
                     12 * (distributed.rank() + 1) // distributed.world_size())
        memory.update(index[part], z[part])
        if step % 3 == 2:
            memory.refresh()
        memory.repair()
        smallest.append(int(memory.counts.min()))
    known = memory.targets[memory.targets >= 0]
    assert torch.equal(memory.counts, known.bincount(minlength=K))
    return memory.state_dict(), smallest, len(splits)


def test_any_number_of_ranks_gives_equal_bits_and_no_cluster_stays_small():
    one = history()
    state, smallest, moves = one
    assert moves >= 6 and min(smallest) >= 10  # each repair moves once, and once more for each split
    assert (state["targets"] < 0).nonzero().flatten().tolist() == [150]
    torch.testing.assert_close(state["bank"].norm(dim=1), (torch.arange(203) != 150).float(), rtol=0,
                               atol=1e-6)
    for other in ranks(2, history) + ranks(3, history):
        assert same(other[0], state) and other[1:] == one[1:]


def started(rows):
    memory = odc.Memory(len(rows), 5, 4)
    odc.first_clusters(memory, mine(rows), 5, torch.Generator().manual_seed(0))
    return memory.state_dict(), memory.counts


def test_the_memory_starts_without_images_that_cannot_be_read():
    z = torch.randn(60, 5, generator=torch.Generator().manual_seed(1))
    unread = torch.zeros(60, dtype=torch.bool).index_fill(0, torch.tensor([3, 40]), True)
    state, counts = started(z.masked_fill(unread[:, None], torch.nan))
    without, without_counts = started(z[~unread])
    assert (state["targets"][unread] == -100).all() and (state["bank"][unread] == 0).all()
    assert torch.equal(state["targets"][~unread], without["targets"]) and torch.equal(state["bank"][~unread],
                                                                                      F.normalize(z[~unread]))
    assert torch.equal(state["centroids"],
                       without["centroids"]) and torch.equal(counts, without_counts) and counts.sum() == 58
    for other, other_counts in ranks(2, started, z.masked_fill(unread[:, None], torch.nan)):
        assert same(other, state) and torch.equal(other_counts, counts)


def test_a_saved_memory_goes_on_as_it_was():
    state, *_ = history()
    memory = odc.Memory(203, 5, 7, min_cluster=10)
    memory.load_state_dict(state)
    assert same(memory.state_dict(), state)
    assert torch.equal(memory.counts, state["targets"][state["targets"] >= 0].bincount(minlength=7))


def test_momentum_is_the_weight_of_the_new_embedding():
    memory = odc.Memory(1, 2, 1, momentum=0.3)
    memory.fill(torch.tensor([[2.0, 0.0]]))
    memory.begin(torch.tensor([0]))
    memory.update(torch.tensor([0]), torch.tensor([[0.0, 5.0]]))
    torch.testing.assert_close(memory.bank.local, torch.tensor([[0.7, 0.3]]) / 0.58**0.5)


def test_equal_images_are_split_too():
    memory = odc.Memory(40, 3, 2, min_cluster=5)
    memory.fill(torch.ones(40, 3))
    memory.begin(torch.zeros(40, dtype=torch.int64))
    memory.repair()
    assert memory.counts.tolist() == [20, 20]


# ---- parts


def loss_of_a_rank():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    targets, weight = torch.tensor([0, -100, -100, 4, 1, 2]), torch.tensor([0.1, 0.2, 0.05, 0.25, 0.4],
                                                                           dtype=torch.float64)
    part = slice(3 * distributed.rank(), 3 * distributed.rank() + 3)
    one = F.cross_entropy(scores.flatten(0, 1) / 0.5, targets.repeat(2), weight)
    return odc.prediction_loss(scores[:, part], targets[part], weight, 0.5).item(), one.item()


def test_the_weighted_mean_is_over_all_ranks():
    results = ranks(2, loss_of_a_rank)
    assert np.mean([ours for ours, _ in results]) == pytest.approx(results[0][1], rel=1e-12)


def test_equal_weights_change_nothing():
    scores, targets = torch.randn(1, 8, 5), torch.randint(5, (8,))
    loss = odc.prediction_loss(scores, targets, torch.full((5,), 0.2), 1.0)
    torch.testing.assert_close(loss, F.cross_entropy(scores[0], targets))


def test_the_learning_rate_drops_at_the_start_of_an_epoch():
    rates = [drops(step, 5, 0.06, (2, 3), 0.4) for step in range(20)]
    np.testing.assert_allclose(rates, [0.06] * 10 + [0.024] * 5 + [0.0096] * 5, rtol=1e-12)


# ---- runs


def test_two_ranks_follow_the_trajectory_of_one(tmp_path):
    a, b = two_ranks_as_one(odc, [*SHARED, "--rotate", 5, "--drop-epochs", 2], tmp_path)
    for name, value in a["memory"].items():
        torch.testing.assert_close(b["memory"][name], value, rtol=0, atol=1e-8, msg=name)
    rates = [record["lr"] for record in metrics(tmp_path / "one") if "lr" in record]
    np.testing.assert_allclose(rates[9:11], [rates[0], 0.1 * rates[0]], rtol=1e-12)


@pytest.mark.parametrize("kill", ["Run.log 8", "Memory.repair 8"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, kill):
    assert killed_and_resumed(odc, SHARED, tmp_path, kill) == 7


def test_the_log_says_how_many_images_changed_and_assignments_are_the_memorys(tmp_path):
    assert here(*SHARED, "--epochs", 2, "--out", tmp_path) == 0
    changed = [record["changed"] for record in metrics(tmp_path) if "changed" in record]
    assert len(changed) == 10 and all(0 <= share <= 1 for share in changed) and max(changed) > 0
    assignments = np.load(tmp_path / "assignments.npz")["assignments"]
    assert (assignments[0] == saved(tmp_path)["memory"]["targets"].numpy()).all() and assignments.min() >= 0
    trunk, head = saved(tmp_path)["optimizer"]["param_groups"]
    assert (trunk["momentum"], head["momentum"], len(head["params"])) == (0.9, 0.0, 2)
    assert trunk["weight_decay"] == head["weight_decay"] == 1e-5


def test_a_run_starts_from_another_methods_trunk(tmp_path):
    assert here(*SHARED, "--max-steps", 1, "--seed", 1, "--out", tmp_path / "first") == 0
    trunk = torch.load(tmp_path / "first" / "backbone.pt", weights_only=True)["state_dict"]
    assert here(*SHARED, "--init-from", tmp_path / "first", "--lr", 1e-9, "--max-steps", 1, "--out",
                tmp_path / "second") == 0
    weights = saved(tmp_path / "second")["model"]
    torch.testing.assert_close(weights["backbone.conv1.weight"], trunk["conv1.weight"], rtol=0, atol=1e-6)


def test_options_that_cannot_work(tmp_path, capsys):
    for options, message in {
        ("--prototypes", 81): "--prototypes 81: more than the 80 images",
        ("--centroid-iters", 0): "--centroid-iters 0: at least 1",
        ("--min-cluster", -1): "--min-cluster -1: at least 0",
        ("--memory-momentum", 1.5): "--memory-momentum 1.5: at least 0 and at most 1",
        ("--drop-factor", 0): "--drop-factor 0: more than 0",
    }.items():
        assert here(*SHARED, *options, "--out", tmp_path) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_published_recipe():
    c = recipe(odc.Config, odc.RECIPES, "odc_440ep")
    assert (c.epochs, c.batch_size, c.lr, c.drop_epochs, c.drop_factor, c.momentum,
            c.weight_decay) == (440, 512, 0.06, (400,), 0.4, 0.9, 1e-5,)
    assert (c.prototypes, c.memory_momentum, c.centroid_iters, c.min_cluster, c.reweight,
            c.kmeans_iterations) == (10_000, 0.5, 10, 20, 0.5, 20)
    assert (c.hidden, c.dim, c.crops, c.sizes, c.temperature) == (512, 256, (1,), (224,), 1)
    assert (c.jitter, c.jitter_p, c.grey_p, c.rotate, c.blur_p) == ((0.4, 0.4, 1.0, 0.5), 1, 0.2, 2, 0)
    assert odc.RECIPES["odc_440ep"][0].startswith("53.4")
    with torch.device("meta"):
        head = odc.Model(c).projection_head
    assert [type(layer).__name__ for layer in head] == ["Linear", "BatchNorm1d", "ReLU", "Dropout", "Linear",
                                                        "ReLU"]
    assert (head[0].in_features, head[0].out_features, head[4].out_features, head[1].momentum,
            head[1].affine) == (2048, 512, 256, 0.001, False)
