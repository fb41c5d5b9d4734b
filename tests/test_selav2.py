"""selav2.py: balanced labels on the memory, one process or many, and what becomes of a run that is killed."""

import pytest
import torch
from helpers import TINY, killed_and_resumed, ranks, run_here, two_ranks_as_one
from torch import nn

import selav2
from common.distributed import rank, rows_of, world_size
from common.engine.options import recipe

SHARED = ["--data", "shapes:80", *TINY, "--prototypes", 6, "--freeze-prototypes-iters", 3, "--epochs", 4]


def here(*arguments):
    return run_here(selav2, *arguments)


def assign_on_a_rank(length=1):
    generator = torch.Generator().manual_seed(0)
    z = nn.functional.normalize(torch.randn(2, 90, 8, generator=generator, dtype=torch.float64), dim=2)
    memory = selav2.Memory(90, 2, 8, 3, 6, dtype=torch.float64)
    first, last = rows_of(88, rank(), world_size())  # images 88 and 89 are not in the memory
    memory.update(torch.arange(first, last), z[:, first:last])
    prototypes = nn.ModuleList(nn.Linear(8, 6, bias=False).double() for _ in range(3))
    for head in prototypes:
        nn.init.normal_(head.weight, generator=generator)
        head.weight.data[1:3] *= length
    selav2.assign(memory, prototypes, 0.1, 25.0, 1e-4)
    return memory.targets, memory.scalings, memory.filled.local.any()


def test_labels_are_balanced_on_any_number_of_ranks():
    targets, scalings, filled = assign_on_a_rank()
    assert (targets[:, 88:] == -100).all() and not filled and scalings.any(1).all()
    for row in targets:
        counts = torch.bincount(row[:88], minlength=6)
        assert counts.min() >= 12 and counts.max() <= 18  # 88 / 6 = 14.7 before rounding
    assert not torch.equal(targets[0], targets[1])
    assert torch.equal(assign_on_a_rank(2)[0], targets)  # the directions of prototypes alone count
    for other in ranks(2, assign_on_a_rank) + ranks(4, assign_on_a_rank):
        assert torch.equal(other[0], targets)
        torch.testing.assert_close(other[1], scalings)


def test_two_ranks_follow_the_trajectory_of_one(tmp_path):
    shared = [*SHARED, "--crops", 2, 2, "--sizes", 16, 12, "--scales", 0.3, 1, 0.1, 0.4, "--blur-p", 0.5]
    a, b = two_ranks_as_one(selav2, shared, tmp_path)
    assert torch.equal(a["memory"]["targets"], b["memory"]["targets"])


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    assert killed_and_resumed(selav2, SHARED, tmp_path) == 7


def test_more_prototypes_than_images_are_refused(tmp_path, capsys):
    assert here(*SHARED, "--prototypes", 81, "--out", tmp_path) == 2
    assert "--prototypes 81: more than the 80 images" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "value", "crops"),
                         [("selav2_400ep", 71.8, (2, 4)), ("selav2_400ep_2x224", 67.2, (2,))])
def test_published_recipes(name, value, crops):
    c = recipe(selav2.Config, selav2.RECIPES, name)
    assert (c.epochs, c.batch_size, c.lr, c.crops, c.prototypes, c.heads) == (400, 4096, 4.8, crops, 3000, 3)
    assert selav2.RECIPES[name][0].startswith(f"{value}, ") and "settings ours" in selav2.RECIPES[name][0]
