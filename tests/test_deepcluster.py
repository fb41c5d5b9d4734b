"""deepcluster.py: uniform sampling, AlexNet, one process or many, and what becomes of a run that is
killed."""

import os
import signal

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
    same,
    saved,
    two_ranks_as_one,
    unreadable,
)
from test_parity import PRECISIONS, close, drawn, of, weight_by_rule
from torch import nn

import deepcluster
from common import distributed
from common.alexnet import alexnet
from common.batchnorm import Dropout, parallel
from common.engine.options import recipe
from common.resnet import resnet18
from common.weights import load_backbone

TINY = ("--recipe shapes --arch resnet10 --width 0.125 --sizes 16 --prototypes 8 --pca-dim 16 --batch-size "
        "16 --workers 0 --log-every 1".split())
SHARED = ["--data", "shapes:80", *TINY, "--epochs", 4]


def here(*arguments):
    return run_here(deepcluster, *arguments)


# ---- uniform sampling


@pytest.mark.parametrize("case", range(4))
def test_clusters_are_drawn_as_often_as_the_official_sampler_means_to(case):
    numbers = golden(f"dc_unif_sampler_{case}")
    assignments, length = numbers["pseudo_labels"], int(numbers["N"])
    sizes, per = numbers["cluster_sizes"], int(numbers["size_per_pseudolabel"])
    used = sizes > 0
    counts = []
    for seed in range(24):
        order = deepcluster.uniform_order(assignments, length, torch.Generator().manual_seed(seed))
        assert order.shape == (length,) and order.dtype == torch.int64
        counts.append(torch.bincount(assignments[order], minlength=len(sizes)))
        unique = torch.bincount(assignments[order.unique()], minlength=len(sizes))
        large = sizes > per
        assert torch.equal(unique[large], counts[-1][large])  # without replacement
    counts = torch.stack(counts)
    assert (counts[:, ~used] == 0).all() and (counts <= per).all()
    assert (counts[:, used] >= per - (per * int(used.sum()) - length)).all()
    error = (counts.double().mean(0) - numbers["expected_count"]).abs()
    assert (error <= 5 * numbers["expected_std"] / 24**0.5 + 1e-12).all()


def test_the_batches_that_are_trained_on_are_balanced(tmp_path, monkeypatch):
    """In the official code the sampler's indices meet a data set in another order, so large clusters stay
    large."""
    seen = []
    assign = deepcluster.assign

    def uneven(memory, *arguments):
        assign(memory, *arguments)
        # sizes 1 to 15 eights
        memory.targets[:] = torch.arange(len(memory.targets)).mul(7).remainder(64).sqrt().long()

    monkeypatch.setattr(deepcluster, "assign", uneven)
    monkeypatch.setattr(deepcluster, "prediction_loss", lambda scores, targets,
                        T: (seen.append(targets), scores.mean())[1])
    assert here("--data", "shapes:640", *TINY, "--epochs", 1, "--out", tmp_path) == 0
    counts = torch.bincount(torch.cat(seen), minlength=8)
    assert counts.sum() == 640 and counts.min() >= 73 and counts.max() <= 81


def test_images_without_a_cluster_are_never_drawn():
    order = deepcluster.uniform_order(torch.tensor([2, -100, 0, -100, 2]), 50,
                                      torch.Generator().manual_seed(0))
    assert set(order.tolist()) == {0, 2, 4} and torch.bincount(order)[2] == pytest.approx(25, abs=1)


# ---- AlexNet and Sobel


@PRECISIONS
def test_alexnet_of_the_official_code(dtype):
    numbers = golden("alexnet_deepcluster_sobel")
    salt = "".join(map(chr, numbers["salt_codes"].tolist()))
    with torch.device("meta"):
        trunk = alexnet("deepcluster", sobel=True)
    trunk.load_state_dict({name: weight_by_rule(salt, name, t.shape)
                           for name, t in trunk.state_dict().items()}, assign=True)
    trunk.sobel = type(trunk.sobel)()  # its filters are not in the state
    top = {name: weight_by_rule(salt, f"top_layer.{name}", shape) for name, shape in {"weight": (50, 4096),
                                                                                      "bias": (50,)}.items()}
    x = torch.from_numpy(drawn(salt, "input:alexnet", tuple(numbers["input_shape"].tolist()))).float()
    assert torch.equal(x.flatten()[:16], numbers["input_head"])
    wide = [t for t in (*trunk.state_dict().values(), top["weight"]) if t.dim() > 1]
    assert torch.equal(torch.stack([t.flatten()[:4] for t in wide]), numbers["param_probe"])
    # the float64 numbers have a Sobel of float32(1/3)
    trunk, x, tolerance = trunk.to(dtype).eval(), x.to(dtype), (2e-5, 1e-7)

    def compare(ours, name, stored=dtype):
        expected = of(numbers, name, stored)
        close((ours / expected.abs().max()).to(stored), expected / expected.abs().max(), stored, *tolerance)

    with torch.no_grad():
        z = trunk(x)
        compare(z, "cluster_features")
        compare(F.linear(F.relu(z), top["weight"].to(dtype), top["bias"].to(dtype)), "logits")
        compare(trunk.features(trunk.sobel(x)).flatten(1), "features", torch.float32)
        compare(trunk.sobel(x)[:, :, :12, :12], "sobel_patch", torch.float32)
        maps = trunk.stages(x)
        assert [(m.shape[1], m.shape[2]) for m in maps.values()] == [(96, 55), (256, 27), (384, 13),
                                                                     (384, 13), (256, 13)]
        assert all((m >= 0).all() for m in maps.values())
        trunk.features.train()
        compare(trunk.features(trunk.sobel(x)).mean((2, 3)), "features_train_pooled")


@pytest.mark.parametrize(("kind", "sobel", "parameters"), [
    ("deepcluster", True, 58_272_480), ("sela", False, 58_284_096), ("sela_small", False, 57_006_144)])
def test_alexnets_have_the_published_sizes(kind, sobel, parameters):
    with torch.device("meta"):
        trunk = alexnet(kind, sobel)
    assert sum(p.numel() for p in trunk.parameters()) == parameters
    assert isinstance(trunk.classifier[-1], nn.ReLU) == (kind != "deepcluster")


def test_alexnet_names_the_size_it_takes():
    with pytest.raises(ValueError, match="224x224 pixels, got 96x64"):
        alexnet()(torch.zeros(1, 3, 96, 64))


def test_sobel_sees_gradients_of_the_grey_image():
    trunk = resnet18(sobel=True)
    flat = trunk.sobel(torch.full((1, 3, 8, 8), 5.0))
    assert flat.shape == (1, 2, 8, 8) and not flat[:, :, 1:-1, 1:-1].any() and flat[:, :, 0].any()
    ramp = torch.arange(8.0).expand(1, 3, 8, 8)
    assert (trunk.sobel(ramp)[0, 0, 1:-1, 1:-1] == -8).all() and not trunk.sobel(ramp)[0, 1, 1:-1, 1:-1].any()
    assert trunk.conv1.in_channels == 2 and not any("sobel" in name for name in trunk.state_dict())
    assert trunk(torch.randn(1, 3, 64, 64)).shape == (1, 512)


def dropped_on_a_rank():
    torch.manual_seed(3)
    weights = torch.randn(10, 10, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(10, 10, bias=False),
                          nn.Sequential(nn.Dropout(0.5), nn.Linear(10, 1))).double()
    model[0].weight.data = weights
    net = parallel(model)
    x = torch.randn(12, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = x.chunk(distributed.world_size())[distributed.rank()]
    torch.manual_seed(7)
    y = net(mine)
    y.mean().backward()
    kept = (net.eval()(mine) - y).abs().max().item()
    return y.detach(), model[0].weight.grad, kept


def test_dropout_masks_are_those_of_one_process():
    one, grad, difference = dropped_on_a_rank()
    assert difference > 0.1  # something is dropped
    results = ranks(2, dropped_on_a_rank)
    torch.testing.assert_close(torch.cat([y for y, _, _ in results]), one, rtol=0, atol=1e-12)
    for _, theirs, _ in results:
        torch.testing.assert_close(theirs, grad, rtol=0, atol=1e-12)


def test_dropout_keeps_the_mean():
    y = Dropout(0.25)(torch.ones(4000))
    assert y.unique().tolist() == [0, pytest.approx(4 / 3)] and y.mean().item() == pytest.approx(1, abs=0.05)


# ---- parts


def test_the_classifier_sees_no_negative_feature():
    model = deepcluster.Model(recipe(deepcluster.Config, deepcluster.RECIPES, "shapes"))
    model.backbone = nn.Flatten()  # as AlexNet, whose features are those before a ReLU
    x = torch.randn(2, model.prototypes.in_features, 1, 1)
    features, scores = model([x])
    assert torch.equal(features, x.flatten(1))
    torch.testing.assert_close(scores, model.prototypes(features.clamp(min=0)))


def assign_on_a_rank(K):
    x = torch.randn(40, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    x[[3, 25]] = float("nan")  # images that cannot be read
    memory, head = deepcluster.Memory(40), nn.Linear(12, K).double()
    first, last = distributed.rows_of(40, distributed.rank(), distributed.world_size())
    for epoch in range(2):
        whitened = deepcluster.whiten(x[first:last].clone(), 6)
        generator = torch.Generator().manual_seed(epoch)
        deepcluster.assign(memory, whitened, K, 20, generator)
        deepcluster.reset_classifier(head, generator)
    return memory.targets, memory.figures, head.weight.detach(), head.bias.detach()


def test_assignments_do_not_depend_on_the_number_of_ranks():
    one = assign_on_a_rank(5)
    targets, figures, weight, bias = one
    assert (targets == -100).nonzero().flatten().tolist() == [3, 25] and set(targets.tolist()) == {-100,
                                                                                                   *range(5)}
    assert figures["empty_clusters"] == 0 and figures["largest_cluster"] == torch.bincount(
        targets[targets >= 0]).max()
    assert 0 < figures["nmi_to_previous"] <= 1
    assert not bias.any() and weight.std() == pytest.approx(0.01, rel=0.4)
    for other in ranks(3, assign_on_a_rank, 5):
        assert torch.equal(other[0], targets) and other[1] == pytest.approx(figures) and torch.equal(other[2],
                                                                                                     weight)


def loss_of_a_rank():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64)
    targets = torch.randint(5, (6,), generator=generator)
    targets[1:3] = -100
    mine = slice(3 * distributed.rank(), 3 * distributed.rank() + 3)
    one = F.cross_entropy(scores.flatten(0, 1) / 0.5, targets.repeat(2))
    return deepcluster.prediction_loss(scores[:, mine], targets[mine], 0.5).item(), one.item()


def test_the_mean_over_ranks_is_the_mean_over_all_targets():
    results = ranks(2, loss_of_a_rank)
    assert np.mean([ours for ours, _ in results]) == pytest.approx(results[0][1], rel=1e-12)


# ---- runs


def test_two_ranks_follow_the_trajectory_of_one(tmp_path):
    shared = [*SHARED, "--rotate", 5, "--sobel"]
    shared += ["--warmup-epochs", 1, "--start-lr", 0.01, "--lr", 0.05, "--final-lr", 0]
    a, b = two_ranks_as_one(deepcluster, shared, tmp_path)
    assert torch.equal(a["memory"]["targets"],
                       b["memory"]["targets"]) and a["memory"]["figures"] == b["memory"]["figures"]
    rates = [record["lr"] for record in metrics(tmp_path / "one") if "lr" in record]
    np.testing.assert_allclose([*rates[:6], rates[10], rates[15]],
                               [0.01, 0.02, 0.03, 0.04, 0.05, 0.05, 0.0375, 0.0125], rtol=1e-12)


@pytest.mark.slow
def test_two_ranks_train_alexnet_as_one(tmp_path):
    image_tree(tmp_path / "images", images=5, splits=("train",))
    shared = ["--data", tmp_path / "images", "--recipe", "alexnet_sobel_500ep", "--prototypes", 4,
              "--pca-dim", 8, "--batch-size", 4]
    shared += ["--lr", 0.05, "--workers", 0, "--log-every", 1, "--precision", "float64", "--max-steps", 5]
    assert here(*shared, "--out", tmp_path / "one") == 0
    assert [code for code, _, _ in ranks_of(2, deepcluster, *shared, "--out", tmp_path / "two")] == [0, 0]
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-9)
    trunk, info = load_backbone(tmp_path / "two")
    assert (info["arch"], info["sobel"], info["size"], trunk.feature_dim) == ("alexnet", True, 224, 4096)
    fresh = torch.load(tmp_path / "one" / "backbone.pt", weights_only=True)["state_dict"]
    torch.testing.assert_close(trunk.state_dict()["classifier.1.weight"], fresh["classifier.1.weight"],
                               rtol=0, atol=1e-6)


# in mid-epoch; while the third epoch's clusters are made
@pytest.mark.parametrize(("kill", "step"), [("Run.log 8", 7), ("kmeans 3", 10)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path, kill, step):
    assert killed_and_resumed(deepcluster, SHARED, tmp_path, kill) == step


def test_the_classifier_starts_anew_each_epoch_without_momentum(tmp_path):
    assert here(*SHARED, "--max-steps", 4, "--lr", 1e-6, "--out", tmp_path) == 0
    before = saved(tmp_path)
    assert here(*SHARED, "--max-steps", 6, "--lr", 1e-6, "--out", tmp_path) == 0
    after = saved(tmp_path)
    a, b = before["model"]["prototypes.weight"], after["model"]["prototypes.weight"]
    assert torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1].abs() < 0.2
    assert b.std() == pytest.approx(0.01, rel=0.15) and after["model"]["prototypes.bias"].abs().max() < 1e-4
    trunk, head = after["optimizer"]["param_groups"]
    assert (trunk["momentum"], head["momentum"]) == (0.9, 0.0)
    assert all(after["optimizer"]["state"][i].get("momentum_buffer") is None for i in head["params"]
               if i in after["optimizer"]["state"])


def test_assignments_and_figures_are_of_all_images(tmp_path):
    assert here(*SHARED, "--epochs", 2, "--out", tmp_path) == 0
    assignments = np.load(tmp_path / "assignments.npz")["assignments"]
    memory = saved(tmp_path)["memory"]
    # drawn or not
    assert assignments.shape == (1, 80) and (assignments[0] == memory["targets"].numpy()).all()
    sizes = np.bincount(assignments[0], minlength=8)
    last = [r for r in metrics(tmp_path) if "loss" in r][-1]
    assert (last["empty_clusters"],
            last["largest_cluster"]) == ((sizes == 0).sum(), sizes.max()) and 0 < last["nmi_to_previous"] < 1
    share = sizes[sizes > 0] / 80
    assert last["cluster_entropy"] == pytest.approx(-(share * np.log(share)).sum() / np.log(8), abs=1e-6)


def test_images_that_cannot_be_read_are_left_out_and_named(tmp_path):
    images = image_tree(tmp_path / "images", images=20, splits=("train",))
    broken = [images / "train" / "n00" / "3.JPEG", images / "train" / "n01" / "7.JPEG"]
    for path in broken:
        path.write_bytes(path.read_bytes()[:100])
    assert here("--data", images, *TINY, "--epochs", 1, "--out", tmp_path / "run") == 0
    assert unreadable(tmp_path / "run") == ["n00/3.JPEG", "n01/7.JPEG"]
    targets = saved(tmp_path / "run")["memory"]["targets"]
    assert (targets < 0).sum() == 2 and len(targets) == 40


def stop_in_the_pass(method):
    """The last rank gets a signal in the feature pass before the second epoch."""
    look, passes = method.Run.features, []

    def looked(*arguments):
        passes.append(1)
        if len(passes) == 2 and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return look(*arguments)

    method.Run.features = looked


# two ranks: 512 and 513 images, two batches and three
@pytest.mark.parametrize(("count", "images"), [(1, 300), (2, 1025)])
def test_a_signal_in_a_feature_pass_stops_all_ranks_and_changes_no_bit(tmp_path, count, images):
    shared = ["--data", f"shapes:{images}", *TINY, "--batch-size", 128, "--epochs", 2, "--out"]
    stopped = ranks_of(count, deepcluster, *shared, tmp_path / "stopped", change=stop_in_the_pass)
    assert {code for code, _, _ in stopped} == {0}
    assert f"stopped by a signal, after step {images // 128}" in stopped[0][1]
    resumed = ranks_of(count, deepcluster, *shared, tmp_path / "stopped")
    straight = ranks_of(count, deepcluster, *shared, tmp_path / "straight")
    assert {code for code, _, _ in resumed + straight} == {0}
    assert f"resumed at step {images // 128}" in resumed[0][1]
    a, b = saved(tmp_path / "straight"), saved(tmp_path / "stopped")
    for part in ("model", "optimizer", "memory"):
        assert same(a[part], b[part]), part
    assert losses(tmp_path / "straight") == losses(tmp_path / "stopped")


def drop_units(method):
    build = method.ARCHITECTURES["resnet10"]

    def built(**options):
        trunk = build(**options)
        trunk.layer4 = nn.Sequential(trunk.layer4, nn.Dropout(0.5))
        return trunk

    method.ARCHITECTURES["resnet10"] = built


def test_two_ranks_drop_the_same_units_as_one(tmp_path):
    shared = [*SHARED, "--precision", "float64", "--max-steps", 7, "--out"]
    for out, count in (("one", 1), ("two", 2)):
        done = ranks_of(count, deepcluster, *shared, tmp_path / out, change=drop_units)
        assert {code for code, _, _ in done} == {0}
    assert here(*shared, tmp_path / "none") == 0
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-9)
    assert abs(losses(tmp_path / "none")[0] / losses(tmp_path / "one")[0] - 1) > 1e-4  # something is dropped


def test_weights_that_diverge_unseen_end_the_run_before_they_are_clustered(tmp_path, capsys):
    assert here("--data", "shapes:80", *TINY, "--lr", 1e11, "--log-every", 20, "--epochs", 2, "--out",
                tmp_path) == 5
    assert "not finite" in capsys.readouterr().err


def test_fewer_readable_images_than_clusters_are_refused(tmp_path, capsys):
    images = image_tree(tmp_path / "images", images=9, splits=("train",))
    (images / "train" / "n00" / "3.JPEG").write_bytes(b"no picture")
    assert here("--data", images, *TINY, "--prototypes", 18, "--out", tmp_path / "run") == 3
    assert "--prototypes 18: more than the 17 images that can be read" in capsys.readouterr().err


def test_other_pixels_to_cluster_are_another_run(tmp_path, capsys):
    assert here(*SHARED, "--max-steps", 1, "--out", tmp_path) == 0
    assert here(*SHARED, "--eval-size", 24, "--out",
                tmp_path) == 4 and "--eval-size 24" in capsys.readouterr().err


# ---- options


def test_options_that_cannot_work(tmp_path, capsys):
    for options, message in {
        ("--prototypes", 81): "--prototypes 81: more than the 80 images",
        ("--pca-dim", 100): "--pca-dim 100: the trunk has only 64 features",
        ("--pca-dim", 0): "--pca-dim 0: at least 1",
        ("--grey-p", 1.5): "--grey-p 1.5: at least 0 and at most 1",
        ("--rotate", -3): "--rotate -3: at least 0",
        ("--arch", "alexnet"): "--arch alexnet takes images of 224 pixels",
        ("--arch", "alexnet", "--sizes", 224, "--eval-size", 256): "alexnet takes images of 224 pixels",
    }.items():
        assert here(*SHARED, *options, "--out", tmp_path) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, error


def test_published_recipes():
    def get(name):
        return recipe(deepcluster.Config, deepcluster.RECIPES, name)

    sobel, rgb, paper = get("resnet50_sobel_200ep"), get("resnet50_200ep"), get("alexnet_sobel_500ep")
    for c in (sobel, rgb, paper):
        assert (c.prototypes, c.pca_dim, c.kmeans_iterations, c.temperature) == (10_000, 256, 20, 1)
        assert (c.momentum, c.weight_decay, c.warmup_epochs, c.final_lr) == (0.9, 1e-5, 0, c.lr)
        assert (c.crops, c.sizes, c.scales, c.blur_p) == ((1,), (224,), (0.08, 1.0), 0)
    for c, lr in ((sobel, 0.1), (rgb, 0.3)):
        assert (c.arch, c.epochs, c.batch_size, c.lr) == ("resnet50", 200, 512, lr)
        assert (c.jitter, c.jitter_p, c.grey_p, c.rotate) == ((0.4, 0.4, 1.0, 0.5), 1, 0.2, 2)
    assert (sobel.sobel, rgb.sobel) == (True, False) and next(iter(deepcluster.RECIPES)) == sobel.recipe
    assert (paper.arch, paper.sobel, paper.epochs, paper.batch_size, paper.lr) == ("alexnet", True, 500, 256,
                                                                                   0.05)
    assert not any(paper.jitter) and (paper.jitter_p, paper.grey_p, paper.rotate) == (0, 0, 0)
    for name, value in {"resnet50_sobel_200ep": 46.9, "resnet50_200ep": 50.4,
                        "alexnet_sobel_500ep": 37.9}.items():
        assert deepcluster.RECIPES[name][0].startswith(str(value))
