"""deepclusterv2.py: the numbers of the official code, one process or many, and what becomes of a run that is
killed."""

import os
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, golden, killed_and_resumed, ranks, run_here, same, saved, two_ranks_as_one
from torch import nn

import deepclusterv2
from common.distributed import rank
from common.engine.errors import DataError, Diverged
from common.engine.options import recipe
from common.kmeans import kmeans

SHARED = ["--data", "shapes:80", *TINY, "--epochs", 4]


def here(*arguments):
    return run_here(deepclusterv2, *arguments)


# ---- parity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_an_epoch_of_the_official_code(monkeypatch, dtype):
    numbers = golden("dcv2_train_epoch")
    n, bank, heads = int(numbers["size_dataset"]), numbers["memory_embeddings"].to(dtype), len(numbers["K"])
    memory = deepclusterv2.Memory(n, len(bank), bank.shape[2], heads, dtype=dtype)
    memory.update(numbers["memory_index"], bank)
    starts = iter([bank[h % 2][numbers[f"init_idx_head{h}"]] for h in range(heads)])
    monkeypatch.setattr(deepclusterv2, "kmeans", lambda *arguments, generator,
                        **options: kmeans(*arguments, init=next(starts), **options))
    prototypes = [nn.Linear(bank.shape[2], int(k), bias=False, dtype=dtype) for k in numbers["K"]]
    deepclusterv2.assign(memory, prototypes, 10, None)
    assert torch.equal(memory.targets, numbers["assignments"]) and (memory.targets == -100).any()
    for h, head in enumerate(prototypes):
        torch.testing.assert_close(head.weight.float(), numbers[f"prototypes_head{h}"], rtol=0, atol=1e-6)
    stored, tolerance = ("64", 1e-11) if dtype == torch.float64 else ("", 5e-6)
    for step, (index, z) in enumerate(zip(numbers["batch_idx"], numbers["embeddings"].to(dtype))):
        z = z.requires_grad_()  # (V, B, D)
        loss = deepclusterv2.prediction_loss([head(z) for head in prototypes], memory.targets[:, index], 0.1)
        loss.backward()
        assert loss.dtype == dtype
        assert loss.item() == pytest.approx(numbers["loss" + stored][step].item(), abs=tolerance)
        expected = numbers["grad_embedding" + stored][step].to(dtype)
        torch.testing.assert_close(z.grad, expected, rtol=0, atol=tolerance)
        memory.update(index, z[:2].detach())
    after = numbers["memory_index_after"]
    banks = memory.banks.local[after].transpose(0, 1).float()  # (U, images, D)
    torch.testing.assert_close(banks, numbers["memory_embeddings_after"], rtol=0, atol=1e-7)
    assert sorted(memory.filled.local.nonzero().flatten().tolist()) == sorted(after.tolist())


# ---- parts


def test_a_batch_without_targets_has_loss_and_gradient_0():
    scores = [torch.randn(3, 4, 5, requires_grad=True) for _ in range(2)]
    loss = deepclusterv2.prediction_loss(scores, torch.full((2, 4), -100), 0.1)
    loss.backward()
    assert loss == 0 and all(not head.grad.any() for head in scores)


def test_ignored_images_change_neither_loss_nor_mean():
    scores, targets = torch.randn(3, 6, 5), torch.tensor([[0, 1, -100, 4, -100, 2]])
    seen = targets[0] >= 0
    expected = F.cross_entropy(scores[:, seen].flatten(0, 1) / 0.2, targets[0, seen].repeat(3))
    torch.testing.assert_close(deepclusterv2.prediction_loss([scores], targets, 0.2), expected)


def loss_of_a_rank():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(2, 6, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    targets = torch.randint(5, (2, 6), generator=generator)
    targets[:, 1:3] = -100  # the first rank has one target, the second three: the mean is over all
    mine = slice(3 * rank(), 3 * rank() + 3)
    one = sum(F.cross_entropy(s.flatten(0, 1) / 0.1, t.repeat(2)) for s, t in zip(scores, targets)) / 2
    return deepclusterv2.prediction_loss([s[:, mine] for s in scores], targets[:, mine],
                                         0.1).item(), one.item()


def test_the_mean_over_ranks_is_the_mean_over_all_targets():
    results = ranks(2, loss_of_a_rank)
    assert np.mean([ours for ours, _ in results]) == pytest.approx(results[0][1], rel=1e-12)


def memory_of_a_rank():
    z = torch.arange(2 * 7 * 3.0).view(2, 7, 3)
    memory = deepclusterv2.Memory(7, 2, 3, 1)
    for batch in ([4, 0, 6, 2], [5, 3]):  # images of both ranks in one batch; image 1 is never seen
        half = len(batch) // 2
        mine = torch.tensor(batch[half * rank() : half * (rank() + 1)])
        memory.update(mine, z[:, mine])
    return memory.state_dict(), memory.rows(1)


def test_the_memory_is_in_data_set_order_on_any_number_of_ranks():
    z, seen = torch.arange(2 * 7 * 3.0).view(2, 7, 3), [0, 2, 3, 4, 5, 6]
    (state, first), (other, second) = ranks(2, memory_of_a_rank)
    assert same(state, other) and state["banks"].shape == (7, 2, 3) and state["filled"].tolist() == [
        i in seen for i in range(7)]
    assert torch.equal(state["banks"][seen], z.transpose(0, 1)[seen])
    assert torch.equal(torch.cat([first, second]), z[1, seen])
    whole = deepclusterv2.Memory(7, 2, 3, 1)
    whole.load_state_dict(state)
    assert same(whole.state_dict(), state) and torch.equal(whole.rows(1), z[1, seen])


def test_embeddings_that_cannot_be_clustered_are_named():
    memory, heads = deepclusterv2.Memory(30, 1, 4,
                                         2), nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(2))
    heads.requires_grad_(False)
    rows = F.normalize(torch.randn(30, 4))
    memory.update(torch.arange(2), rows[None, :2])
    with pytest.raises(DataError, match="--prototypes 3: more than the 2 images that can be read"):
        deepclusterv2.assign(memory, heads, 10, None)
    rows[7] = torch.nan
    memory.update(torch.arange(30), rows[None])
    with pytest.raises(Diverged, match=r"head 0 cannot be clustered: row 7 of 30 .* is not finite"):
        deepclusterv2.assign(memory, heads, 10, None)


# ---- runs


def test_two_ranks_follow_the_trajectory_of_one(tmp_path):
    shared = [*SHARED, "--crops", 2, 2, "--sizes", 16, 12, "--scales", 0.3, 1, 0.1, 0.4, "--blur-p", 0.5]
    a, b = two_ranks_as_one(deepclusterv2, shared, tmp_path)
    assert torch.equal(a["memory"]["targets"], b["memory"]["targets"]) and (a["memory"]["targets"] >= 0).all()


# in mid-epoch; while the third epoch's clusters are made
@pytest.mark.parametrize(("kill", "step"), [("Run.log 8", 7), ("kmeans 8", 9)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, kill, step):
    assert killed_and_resumed(deepclusterv2, SHARED, tmp_path, kill) == step


def test_a_signal_while_the_memory_is_filled_stops_at_once(tmp_path, capsys, monkeypatch):
    def stopped(*arguments, fill=deepclusterv2.fill):
        os.kill(os.getpid(), signal.SIGTERM)
        fill(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(deepclusterv2, "fill", stopped)
        assert here(*SHARED, "--out", tmp_path / "run") == 0
    assert "stopped by a signal in a pass over the data" in capsys.readouterr().out
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
    assert here(*SHARED, "--out", tmp_path / "run") == here(*SHARED, "--out", tmp_path / "straight") == 0
    assert same(saved(tmp_path / "run")["model"], saved(tmp_path / "straight")["model"])


def test_prototypes_are_the_centroids_and_never_trained(tmp_path):
    assert here(*SHARED, "--max-steps", 6, "--out", tmp_path) == 0
    before = saved(tmp_path)["model"]
    assert here(*SHARED, "--max-steps", 8, "--out", tmp_path) == 0
    after = saved(tmp_path)["model"]
    heads = [name for name in after if name.startswith("prototypes.")]
    assert heads == ["prototypes.0.weight", "prototypes.1.weight", "prototypes.2.weight"]
    for name in heads:
        assert torch.equal(after[name], before[name])  # within the second epoch
        torch.testing.assert_close(after[name].norm(dim=1), torch.ones(12))
    assert not torch.equal(after["projection_head.0.weight"], before["projection_head.0.weight"])


def test_assignments_have_a_column_for_each_head(tmp_path):
    assert here(*SHARED, "--epochs", 2, "--heads", 2, "--out", tmp_path) == 0
    assignments = np.load(tmp_path / "assignments.npz")["assignments"]
    assert assignments.shape == (2, 80) and assignments.min() >= 0 and assignments.max() < 12
    assert (tmp_path / "assignments.csv").read_text().splitlines()[0] == "path,head0,head1"


def test_more_prototypes_than_images_are_refused(tmp_path, capsys):
    assert here(*SHARED, "--prototypes", 81, "--out", tmp_path) == 2
    error = capsys.readouterr().err
    assert "--prototypes 81: more than the 80 images" in error and error.count("\n") == 1


def test_weights_that_diverge_unseen_end_the_run_before_they_are_clustered(tmp_path, capsys):
    assert here(*SHARED, "--lr", 1e11, "--log-every", 20, "--epochs", 2, "--out", tmp_path) == 5
    error = capsys.readouterr().err
    assert "not finite" in error and error.count("\n") == 1


def test_heads_and_iterations_are_checked(tmp_path, capsys):
    for option in ("--heads", "--kmeans-iterations"):
        assert here(*SHARED, option, 0, "--out",
                    tmp_path) == 2 and f"{option} 0: at least 1" in capsys.readouterr().err


def test_published_recipes():
    def get(name):
        return recipe(deepclusterv2.Config, deepclusterv2.RECIPES, name)

    long, short, two = get("deepclusterv2_800ep"), get("deepclusterv2_400ep"), get(
        "deepclusterv2_400ep_2x224")
    for c in (long, short, two):
        assert (c.batch_size, c.lr, c.final_lr, c.warmup_epochs, c.start_lr) == (4096, 4.8, 0.0048, 10, 0.3)
        assert (c.prototypes, c.heads, c.temperature, c.kmeans_iterations, c.hidden, c.dim) == (3000, 3, 0.1,
                                                                                                10, 2048, 128)
    assert (long.epochs, long.crops, long.sizes, long.scales) == (800, (2, 6), (224, 96),
                                                                  (0.14, 1.0, 0.05, 0.14))
    assert (short.epochs, short.crops, short.sizes, short.scales) == (400, (2, 4), (160, 96),
                                                                      (0.08, 1.0, 0.05, 0.14))
    assert (two.epochs, two.crops, two.sizes, two.scales) == (400, (2,), (224,), (0.08, 1.0))
    node = get("deepclusterv2_400ep_bs1024")
    assert (node.batch_size, node.lr, node.final_lr, node.start_lr) == (1024, 1.2, 0.0012, 0.075)
    for name, value in {"deepclusterv2_800ep": 75.2, "deepclusterv2_400ep": 74.3,
                        "deepclusterv2_400ep_2x224": 70.2}.items():
        assert deepclusterv2.RECIPES[name][0].startswith(str(value))
