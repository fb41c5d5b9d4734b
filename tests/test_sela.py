"""sela.py: times and labels against the reference's numbers, one process or many, and what becomes of a run
that is killed."""

import csv
import re
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    golden,
    image_tree,
    killed_and_resumed,
    losses,
    metrics,
    ranks,
    ranks_of,
    run_here,
    saved,
    two_ranks_as_one,
)
from test_parity import PRECISIONS, close, drawn, of, weight_by_rule
from torch import nn

import sela
import selav2
from common import data, distributed
from common.alexnet import alexnet
from common.distributed import rows_of
from common.engine.errors import DataError, Diverged
from common.engine.options import recipe
from common.evaluation.store import read_assignments
from common.multicrop import center
from common.optim import drops
from common.sources.files import Files
from common.weights import load_backbone

TINY = "--recipe shapes --width 0.125 --sizes 16 --prototypes 5 --heads 2 --batch-size 16".split()
TINY += "--workers 0 --log-every 1".split()
SHARED = ["--data", "shapes:80", *TINY, "--epochs", 4, "--relabellings", 6]


def here(*arguments):
    return run_here(sela, *arguments)


# ---- parity


def test_labels_are_found_at_the_published_times():
    numbers = golden("sela_schedule")
    for i, (epochs, count, n, batch) in enumerate(numbers["tuples"].tolist()):
        times = sela.label_times(epochs, count, n, 2)
        # theirs end with one that never comes
        np.testing.assert_allclose(times, numbers[f"times_{i}"].flip(0)[:-1], rtol=0, atol=1e-9)
        np.testing.assert_allclose(sela.label_times(epochs, count, n, 1),
                                   numbers[f"cifar_times_{i}"].flip(0)[:-1], rtol=0, atol=1e-9)
        fired, per_epoch = [], int(numbers[f"iters_per_epoch_{i}"])
        for step in range((epochs + 1) * per_epoch):
            if len(fired) < len(times) and step * batch >= times[len(fired)]:
                fired.append(step)
        assert fired == numbers[f"fired_iteration_{i}"].tolist()


def test_the_learning_rate_is_the_published_one():
    numbers = golden("sela_schedule")
    for j in range(2):
        lr, lrdrop, epochs = numbers[f"lr_args_{j}"].tolist()
        ends = [e for e in range(int(lrdrop), 350,
                                 int(lrdrop))] + [350] * (3 - len(range(int(lrdrop), 350, int(lrdrop))))
        if len(ends) == 3:  # the recipe's own case: three drops in all
            ours = [drops(e, 1, lr, ends, 0.1) for e in range(int(epochs))]
            np.testing.assert_allclose(ours, numbers[f"lr_{j}"], rtol=1e-12)
            return
    raise AssertionError("no case with three drops")


@PRECISIONS
def test_alexnet_of_the_official_code(dtype):
    numbers = golden("alexnet_sela_big")
    salt = "".join(map(chr, numbers["salt_codes"].tolist()))
    with torch.device("meta"):
        trunk = alexnet("sela")
    trunk.load_state_dict({name: weight_by_rule(salt, name, t.shape)
                           for name, t in trunk.state_dict().items()}, assign=True)
    x = torch.from_numpy(drawn(salt, "input:alexnet", tuple(numbers["input_shape"].tolist()))).float()
    assert torch.equal(x.flatten()[:16], numbers["input_head"])
    trunk, x = trunk.to(dtype).eval(), x.to(dtype)

    def compare(ours, name, stored=dtype):
        expected = of(numbers, name, stored)
        close((ours / expected.abs().max()).to(stored), expected / expected.abs().max(), stored, 2e-5, 1e-10)

    with torch.no_grad():
        features = trunk(x)
        compare(features, "fc7")
        for h, K in enumerate(numbers["outs"].tolist()):
            weight, bias = (weight_by_rule(salt, f"top_layer{h}.{name}", s).to(dtype)
                            for name, s in (("weight", (K, 4096)), ("bias", (K,))))
            compare(F.linear(features, weight, bias), f"logits_head{h}")
        compare(trunk.features(x).flatten(1), "features", torch.float32)
        trunk.features.train()
        compare(trunk.features(x).mean((2, 3)), "features_train_pooled")


# ---- parts


def assign_on_a_rank(heads):
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(90, 12, dtype=torch.float64, generator=generator)
    x[[3, 55]] = float("nan")  # images that cannot be read
    memory = sela.Memory(90, 3, 6, seed=0)
    prototypes = nn.ModuleList(nn.Linear(12, 6).double() for _ in range(3))
    for head in prototypes:
        nn.init.normal_(head.weight, generator=generator)
        nn.init.zeros_(head.bias)
    first, last = rows_of(90, distributed.rank(), distributed.world_size())
    sela.assign(memory, prototypes, x[first:last].clone(), heads, 10.0, 1e-3)
    return memory.state_dict()


def test_labels_are_balanced_on_any_number_of_ranks():
    before = sela.Memory(90, 3, 6, seed=0).targets
    assert all(sorted(torch.bincount(row).tolist()) == [15] * 6
               for row in before) and not torch.equal(before[0], before[1])
    state = assign_on_a_rank([0, 2])
    targets = state["targets"]
    assert torch.equal(targets[1], before[1]) and (targets[[0, 2]] == -100).sum() == 4 and not torch.equal(
        targets[0], before[0])
    for row in targets[[0, 2]]:
        counts = torch.bincount(row[row >= 0], minlength=6)
        assert counts.min() >= 11 and counts.max() <= 19  # 88 / 6 = 14.7 before rounding
    assert state["scalings"][0].any() and not state["scalings"][1].any()
    for other in ranks(2, assign_on_a_rank, [0, 2]) + ranks(3, assign_on_a_rank, [0, 2]):
        assert torch.equal(other["targets"], targets)
        torch.testing.assert_close(other["scalings"], state["scalings"])


# ---- runs


@pytest.mark.parametrize("labelling", ["train", "clean"])
def test_two_ranks_follow_the_trajectory_of_one(tmp_path, labelling):
    shared = [*SHARED, "--drop-epochs", 2, "--labelling", labelling,
              *(["--one-head"] if labelling == "clean" else [])]
    a, b = two_ranks_as_one(sela, shared, tmp_path)
    assert torch.equal(a["memory"]["targets"],
                       b["memory"]["targets"]) and a["memory"]["done"] == b["memory"]["done"] == 4


@pytest.mark.slow
def test_two_ranks_train_alexnet_as_one(tmp_path):
    image_tree(tmp_path / "images", images=5, splits=("train",))
    shared = ["--data", tmp_path / "images", "--recipe", "alexnet_1x1k", "--prototypes", 4, "--batch-size", 4,
              "--relabellings", 300]
    shared += ["--lr", 0.05, "--workers", 0, "--log-every", 1, "--precision", "float64", "--max-steps", 4]
    assert here(*shared, "--out", tmp_path / "one") == 0
    assert [code for code, _, _ in ranks_of(2, sela, *shared, "--out", tmp_path / "two")] == [0, 0]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-9)
    trunk, info = load_backbone(tmp_path / "two")
    assert (info["arch"], info["size"],
            trunk.feature_dim) == ("alexnet_sela", 224, 4096) and isinstance(trunk.classifier[-1], nn.ReLU)


@pytest.mark.parametrize("labelling", ["train", "clean"])
@pytest.mark.parametrize("kill", ["Run.log 8", "assign 3"])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, kill, labelling):
    assert killed_and_resumed(sela, [*SHARED, "--labelling", labelling], tmp_path, kill) > 0


def test_heads_take_turns_and_the_log_says_what_a_relabelling_did(tmp_path):
    assert here(*SHARED, "--one-head", "--relabellings", 6, "--relabel-power", 1, "--max-steps", 7, "--out",
                tmp_path) == 0
    state, first = saved(tmp_path)["memory"], sela.Memory(80, 2, 5, 0).targets
    assert state["done"] == 2 and state["scalings"].any(1).all() and not torch.equal(state["targets"], first)
    records = [r for r in metrics(tmp_path) if "loss" in r]
    assert [r["relabellings"] for r in records] == [1] * 6 + [2] and all(0 <= r["changed"] <= 1
                                                                         for r in records)


def test_the_network_of_the_paper_trains_and_is_read_back(tmp_path):
    """That of the default recipe: what is written is the trunk that released weights are read into."""
    small = ["--recipe", "resnet50_10x3k", "--sizes", 32, "--batch-size", 4, "--prototypes", 3, "--heads", 2]
    assert here("--data", "shapes:8", *small, "--epochs", 1, "--workers", 0, "--max-steps", 2, "--out",
                tmp_path) == 0
    trunk, info = load_backbone(tmp_path)
    assert (info["arch"], type(trunk).__name__) == ("preact50", "PreactResNet50")
    weights = saved(tmp_path)["model"]
    assert all(torch.equal(weights[f"backbone.{name}"], x) for name, x in trunk.state_dict().items())
    assert weights["backbone.layer4.0.shortcut.weight"].shape == (2048, 1024, 1, 1)
    usual = recipe(sela.Config, sela.RECIPES, "resnet50_10x3k_strong")
    assert (usual.arch, usual.epochs, usual.prototypes, usual.heads) == ("resnet50", 280, 3000, 10)


def test_the_epoch_says_whose_turn_it_is(monkeypatch, tmp_path):
    """As in cifar.py: its number modulo that of heads, not how often labels were found."""
    turns = []
    monkeypatch.setattr(sela, "assign", lambda memory, prototypes, features, heads, *_: turns.append(heads))
    assert here(*SHARED, "--heads", 3, "--one-head", "--relabellings", 9, "--relabel-power", 1, "--out",
                tmp_path) == 0
    # at the first steps of 16 that have seen 0, 50, 100 .. 300 of the 4 x 80 images
    assert turns == [[0], [0], [1], [2], [2], [0], [0]]


@pytest.mark.parametrize(("arch", "spread"), [("alexnet", 0.01), ("alexnet_small", 0.01),
                                              ("resnet10", 1 / (3 * 512) ** 0.5)])
def test_heads_start_as_the_authors_do(arch, spread):
    torch.manual_seed(0)
    config = replace(recipe(sela.Config, sela.RECIPES, "alexnet_10x3k"), arch=arch, heads=2, prototypes=500)
    for head in sela.Model(config).prototypes:
        assert head.weight.std().item() == pytest.approx(spread, rel=0.01)
        assert (arch == "resnet10") == bool(head.bias.any())
    assert not torch.equal(head.weight, sela.Model(config).prototypes[1].weight)


def test_assignments_are_the_labels_of_all_images(tmp_path):
    assert here(*SHARED, "--epochs", 1, "--out", tmp_path) == 0
    assignments = np.load(tmp_path / "assignments.npz")["assignments"]
    assert assignments.shape == (2,
                                 80) and (assignments == saved(tmp_path)["memory"]["targets"].numpy()).all()


def test_labels_are_read_back_by_path(tmp_path):
    folder = image_tree(tmp_path / "images", images=8)
    assert here(*SHARED, "--data", folder, "--prototypes", 2, "--epochs", 1, "--batch-size", 8, "--out",
                tmp_path / "run") == 0
    images, file = data.open_images(str(folder)), tmp_path / "run" / "assignments.npz"
    wanted = {path: column for path, *column in csv_rows(tmp_path / "run" / "assignments.csv")}
    assert len(wanted) == len(images)
    backwards = Files(str(folder), list(images.paths)[::-1])
    for some in (images, backwards):
        found = read_assignments(file, some)
        assert [[str(c) for c in column] for column in found.T.tolist()] == [wanted[path]
                                                                             for path in some.paths]
    others = data.open_images("shapes:20")
    for path, message in {file: "is of other images: it lacks 20 of 20, such as 'shapes/train/000000', and "
                                "holds '", tmp_path / "none.npz": "none.npz does not exist",
                          tmp_path / "run" / "assignments.csv": "is not an assignments.npz",
                          tmp_path / "run": "is not an assignments.npz"}.items():
        with pytest.raises(DataError, match=re.escape(message)):
            read_assignments(path, others)


def csv_rows(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.mark.parametrize("method", ["sela", "selav2"])
def test_heads_that_cannot_be_labelled_are_named(method):
    torch.manual_seed(0)
    heads = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(2))
    rows = F.normalize(torch.randn(30, 4))

    def label(rows):
        if method == "sela":
            return sela.assign(sela.Memory(len(rows), 2, 3, 0), heads, rows, [0, 1], 10.0, 0.01)
        memory = selav2.Memory(len(rows), 1, 4, 2, 3)
        memory.update(torch.arange(len(rows)), rows[None])
        selav2.assign(memory, heads, 1.0, 10.0, 0.01)

    with pytest.raises(Diverged, match="head 0 has collapsed: it scores all images alike"):
        label(rows[:1].expand(30, 4).contiguous())
    with pytest.raises(DataError, match="--prototypes 3: more than the 2 images that can be read"):
        label(rows[:2])
    heads[1].weight.data[1] = torch.nan
    with pytest.raises(Diverged, match=r"head 1 cannot be labelled: row 0 of 30 .* is not finite"):
        label(rows)


@pytest.mark.parametrize("method", [sela, selav2])
def test_scores_are_gone_before_those_of_the_next_head_are_made(monkeypatch, method):
    held, balance, gather = [], method.balanced_assignments, distributed.gather_rows

    def balanced(scores, *arguments, **options):
        held.append(weakref.ref(scores))
        return balance(scores, *arguments, **options)

    def gathered(x, **options):
        assert all(scores() is None for scores in held)
        return gather(x, **options)

    heads, rows = nn.ModuleList(nn.Linear(4, 3, bias=False) for _ in range(2)), F.normalize(torch.randn(30,
                                                                                                        4))
    monkeypatch.setattr(method, "balanced_assignments", balanced)
    monkeypatch.setattr(distributed, "gather_rows", gathered)
    if method is sela:
        sela.assign(sela.Memory(30, 2, 3, 0), heads, rows, [0, 1], 10.0, 0.01)
    else:
        memory = selav2.Memory(30, 1, 4, 2, 3)
        memory.update(torch.arange(30), rows[None])
        selav2.assign(memory, heads, 1.0, 10.0, 0.01)
    assert len(held) == 2


def test_levels_of_augmentation(tmp_path):
    folder, crops = image_tree(tmp_path / "images", images=2, size=(40, 24)), {}

    class Found(Exception):
        pass

    def loader(views, *_):
        crops[level] = [views[epoch, 3, 0] for epoch in range(8)]
        raise Found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sela.data, "Loader", loader)
        for level in range(4):
            with pytest.raises(Found):
                here(*SHARED, "--data", folder, "--prototypes", 2, "--batch-size", 2, "--augs", level,
                     "--out", tmp_path / "run")
    images = data.open_images(str(folder))
    centre = center(images.read(0), 16, 16)
    kinds = {level: {tuple(pixels[0][0].flatten().tolist()) for _, pixels,
                     _ in drawn} for level, drawn in crops.items()}
    assert kinds[0] == {tuple(centre.flatten().tolist())}
    assert kinds[1] == {tuple(c.flatten().tolist()) for c in (centre, centre.flip(-1))}
    assert len(kinds[2]) == len(kinds[3]) == 8
    off = torch.tensor([1.0, 1, 1, 0, -1, 0, 0, 0])
    assert all((params == off).all() for level in (0, 1, 2) for _, _, params in crops[level])
    assert any((params != off).any() for _, _, params in crops[3])


def test_options_that_cannot_work(tmp_path, capsys):
    for options, message in {
        ("--prototypes", 81): "--prototypes 81: more than the 80 images",
        ("--relabellings", 0): "--relabellings 0: at least 1",
        ("--lam", 0): "--lam 0: more than 0",
        ("--tolerance", 0): "--tolerance 0: more than 0",
        ("--heads", 0): "--heads 0: at least 1",
        ("--augs", 1, "--crops", 2): "--augs 1 takes one crop per image: --crops 1",
        ("--arch", "preact50"): "--arch preact50 has no other width or stem: --width 1 --stem imagenet",
        ("--arch", "alexnet_small"): "--arch alexnet_small takes images of 224 pixels",
        ("--arch", "alexnet", "--sizes", 224, "--eval-size", 64): "--arch alexnet takes images of 224 pixels",
    }.items():
        assert here(*SHARED, *options, "--out", tmp_path) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_published_recipes():
    def get(name):
        return recipe(sela.Config, sela.RECIPES, name)

    for name, (arch, H, K) in {"resnet50_10x3k": ("preact50", 10, 3000), "alexnet_1x1k": ("alexnet", 1, 1000),
                               "alexnet_1x10k": ("alexnet", 1, 10_000),
                               "alexnet_10x3k": ("alexnet", 10, 3000)}.items():
        c = get(name)
        assert (c.arch, c.heads, c.prototypes, c.epochs, c.batch_size, c.lr,
                c.weight_decay) == (arch, H, K, 400, 256, 0.08, 1e-5)
        assert (c.drop_epochs, c.drop_factor, c.lam, c.relabellings, c.relabel_power) == ((150, 300, 350),
                                                                                          0.1, 25, 100, 2)
        assert (c.scales, c.jitter, c.jitter_p, c.grey_p, c.grey_first, c.blur_p) == ((0.08, 1.0), (0.4,) * 4,
                                                                                      1, 0.2, True, 0)
        assert (c.labelling, c.one_head, c.temperature) == ("train", False, 1)
    for name in ("cifar10_10x128", "cifar100_10x128"):
        c = get(name)
        assert (c.arch, c.heads, c.prototypes, c.epochs, c.batch_size, c.lr,
                c.weight_decay) == ("alexnet", 10, 128, 400, 128, 0.03, 5e-4)
        assert (c.drop_epochs, c.lam, c.relabellings, c.relabel_power, c.one_head,
                c.scales) == ((240, 320), 10, 400, 1, True, (0.2, 1.0))
        assert (c.jitter, c.jitter_p, c.grey_p, c.grey_first) == ((0.4,) * 4, 1, 0.2, False)
    for name, value in {"resnet50_10x3k": 61.5, "alexnet_1x1k": 42.1, "alexnet_1x10k": 43.8,
                        "resnet50_10x3k_strong": 68.8}.items():
        assert sela.RECIPES[name][0].startswith(str(value))
