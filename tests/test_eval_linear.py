"""eval_linear.py: schedules and probes against tables and torch's own, and commands against their output."""

import contextlib
import functools
import io
import json
import math
import shutil
import signal
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluations import CPU, colour_tree, evaluate, export, goes_on_after_kills, refuses, run_here
from helpers import interrupt, ranks, ranks_of
from PIL import Image
from torch import nn
from torch.multiprocessing import ProcessExitedException

import eval_knn
import eval_linear
from common import data, distributed, weights
from common.alexnet import AlexNet, Sobel
from common.engine.errors import DataError, Stopped
from common.evaluation import protocol, store
from common.evaluation.classifier import load_classifier
from common.evaluation.progress import Progress
from common.multicrop import MEAN, STD, center
from common.resnet import resnet50
from common.weights import load
from eval_linear import PRESETS, Cached, Preset, Probe, gaussian, judge, train_one_epoch


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """29 images to train on, 7 to judge by."""
    return colour_tree(tmp_path_factory.mktemp("images"), train=(11, 10, 8), val=(2, 2, 3))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return export(tmp_path_factory.mktemp("run") / "backbone.pt").parent


@pytest.fixture(scope="module")
def imagenet_stem(tmp_path_factory):
    path = tmp_path_factory.mktemp("trunk") / "backbone.pt"
    return export(path, stem="imagenet", resize=256, size=224).parent


# ---- the protocols

# Epochs, batch, learning rate, weight decay, nesterov; the rate from each of these epochs (0-based) on.
PUBLISHED = {
    "mhead_90e": (90, 256, 0.01, 1e-4, True, {0: 1e-2, 30: 1e-3, 60: 1e-4}),
    "avgpool_100e": (100, 256, 30.0, 0.0, False, {0: 30.0, 60: 3.0, 80: 0.3}),
    "places205_28e": (28, 256, 0.01, 1e-4, True, {0: 1e-2, 7: 1e-3, 14: 1e-4, 21: 1e-5}),
    "inat18_84e": (84, 256, 0.01, 1e-4, True, {0: 1e-2, 24: 1e-3, 48: 1e-4, 72: 1e-5}),
    "swav_100e": (100, 256, 0.3, 1e-6, False, "cosine"),
    "vissl_28e": (28, 256, 0.01, 5e-4, True, {0: 1e-2, 8: 1e-3, 16: 1e-4, 24: 1e-5}),
    "vissl_places205_14e": (14, 256, 0.01, 5e-4, True, {0: 1e-2, 4: 1e-3, 8: 1e-4, 12: 1e-5}),
    "vissl_inat18_84e": (84, 256, 0.01, 5e-4, True, {0: 1e-2, 24: 1e-3, 48: 1e-4, 72: 1e-5}),
    "sela_resnet_146e": (146, 1024, 0.1, 0.0, False, {0: 1e-1, 85: 1e-2, 128: 1e-3}),
    "dc_alexnet_90e": (90, 256, 0.01, 1e-7, False, "root"),
    "sela_alexnet_36e": (36, 192, 0.01, 1e-5, False, {0: 1e-2, 10: 1e-3, 20: 1e-4, 30: 1e-5}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_whole_schedule_of_a_preset(name):
    epochs, batch, lr, weight_decay, nesterov, rates = PUBLISHED[name]
    p, steps = PRESETS[name], 7
    assert (p.epochs, p.batch_size, p.nesterov) == (epochs, batch, nesterov)
    assert (p.lr, p.weight_decay) == ((lr,), (weight_decay,))
    found = [p.schedule(p, step // steps, step, lr, weight_decay) for step in range(epochs * steps)]
    if rates == "cosine":
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
        scheduler, expected = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs), []
        for _ in range(epochs):
            expected += [scheduler.get_last_lr()[0]] * steps
            optimizer.step()
            scheduler.step()
    elif rates == "root":
        expected = [0.01 / math.sqrt(1 + 0.01 * 1e-7 * step) for step in range(epochs * steps)]
    else:
        expected = [rates[max(e for e in rates if e <= step // steps)] for step in range(epochs * steps)]
    assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_what_presets_look_at():
    goyal = [f"feature{i}+bn" for i in range(1, 6)]
    for name in ("mhead_90e", "places205_28e", "inat18_84e"):
        assert list(PRESETS[name].probes) == goyal
    for name in ("avgpool_100e", "swav_100e", "sela_resnet_146e"):
        assert PRESETS[name].probes == ("avgpool",)
    for name in ("vissl_28e", "vissl_places205_14e", "vissl_inat18_84e"):
        assert [p.partition("+")[2] for p in PRESETS[name].probes] == ["affine"] * 6 + [""]

    def those(what):
        return {name: what(p) for name, p in PRESETS.items() if what(p)}

    assert those(lambda p: p.crop is not eval_linear.resized_crop and p.crop.__name__) == {
        "places205_28e": "RandomCrop", "dc_alexnet_90e": "RandomCrop"}
    ten = {"sela_resnet_146e", "dc_alexnet_90e", "sela_alexnet_36e"}
    assert set(those(lambda p: p.view.views == 10)) == ten
    assert set(those(lambda p: p.probabilities)) == {"dc_alexnet_90e"}
    assert those(lambda p: p.first_validation - 1) == {"sela_alexnet_36e": 26}  # epochs that are not judged
    default = those(lambda p: p.start is eval_linear.uniform)  # nn.Linear's own
    assert set(default) == {"vissl_28e", "vissl_places205_14e", "vissl_inat18_84e", "sela_resnet_146e",
                            "dc_alexnet_90e"}
    assert those(lambda p: (p.jitter or p.lighting) and (p.jitter, p.lighting)) == {"mhead_90e": (0.4, 0.1)}
    assert {(p.resize, p.size) for name, p in PRESETS.items() if name != "small"} == {(256, 224)}


def test_presets_are_listed_with_their_figures(capsys):
    assert run_here(eval_linear, "--list-presets") == 0
    out = capsys.readouterr().out
    for name, preset in PRESETS.items():
        assert f"\n{name}\n    {preset.published}\n" in f"\n{out}"
    assert "drops 60 80" in out and "crop RandomCrop" in out


# ---- the probes

GRID = [(0.5, 0.0), (0.05, 0.0), (0.5, 0.1), (3.0, 1e-3)]
SHAPE, CLASSES = (3, 2, 2), 4


def toy(n=37, seed=0):
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=g)
    x = torch.randn(n, *SHAPE, generator=g, dtype=torch.float64)
    return x + 0.3 * labels.view(-1, 1, 1, 1), labels


def pieces(x, labels, batch_size=8):
    return [({"l": a}, b, len(a)) for a, b in zip(x.split(batch_size), labels.split(batch_size))]


def new_probe(name, settings=((1, 0),), shape=SHAPE, classes=CLASSES, start=gaussian, seed=0):
    return Probe(name, shape, classes, settings, start, seed)


def fit(name, settings, preset, epochs=3):
    x, labels = toy()
    probe = new_probe(name, settings).double()
    for epoch in range(epochs):
        train_one_epoch([probe], enumerate(pieces(x, labels)), preset, epoch, 5)
    return probe


@pytest.mark.parametrize("name", ["l", "l+bn", "l+affine"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_settings_trained_at_once_end_as_trained_alone(name, nesterov):
    preset = Preset("", epochs=3, drops=(2,), nesterov=nesterov)
    together = fit(name, GRID, preset)
    for i, setting in enumerate(GRID):
        alone = fit(name, [setting], preset)
        for (key, a), b in zip(alone.named_parameters(), together.parameters()):
            a, b = (p.movedim(1, 0) if key in ("weight", "bias") else p for p in (a, b))  # settings first
            torch.testing.assert_close(b[i], a[0], rtol=1e-9, atol=1e-12, msg=key)
    assert not torch.allclose(together.weight[:, 0], together.weight[:, 1])


@pytest.mark.parametrize("name", ["l", "l+bn", "l+affine"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_a_probe_is_torchs_layers_under_torchs_sgd(name, nesterov):
    lr, weight_decay = GRID[2]
    probe = new_probe(name, [(lr, weight_decay)]).double()
    layers = [nn.BatchNorm2d(3, affine=name == "l+affine")] if "+" in name else []
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, CLASSES)).double()
    with torch.no_grad():
        network[-1].weight.copy_(probe.weight[:, 0])
        network[-1].bias.copy_(probe.bias[:, 0])
    norm = [p for layer in layers for p in layer.parameters()]  # not decayed
    groups = [{"params": network[-1].parameters(), "weight_decay": weight_decay}]
    groups += [{"params": norm}] if norm else []
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=nesterov)
    x, labels = toy()
    for epoch in range(3):
        preset = Preset("", epochs=3, drops=(2,), nesterov=nesterov)
        train_one_epoch([probe], enumerate(pieces(x, labels)), preset, epoch, 5)
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.1 if epoch == 2 else 1)
        for maps, y, _ in pieces(x, labels):
            optimizer.zero_grad()
            F.cross_entropy(network(maps["l"]), y).backward()
            optimizer.step()
    torch.testing.assert_close(probe.eval()(x)[..., 0], network.eval()(x), rtol=1e-9, atol=1e-12)


def test_a_setting_that_diverges_leaves_the_others_alone():
    preset = Preset("", epochs=3)
    alone = fit("l", [(0.5, 0.0)], preset)
    together = fit("l", [(0.5, 0.0), (1e308, 0.0), (0.5, 1e305)], preset)
    torch.testing.assert_close(together.weight[:, 0], alone.weight[:, 0])
    best = judge([together], {"l": toy()[0]})
    assert (best[:, 1:] == -1).all() and (best[:, 0] >= 0).all()
    assert not together.weight[:, 1].isfinite().all()


def test_layers_that_are_left_out_change_nothing_for_the_others():
    weight = new_probe("feature1+bn").weight
    assert torch.equal(weight, new_probe("feature1+bn", [(2, 0)]).weight)
    assert not torch.equal(weight, new_probe("feature5+bn").weight)
    assert not torch.equal(weight, new_probe("feature1+bn", seed=1).weight)


@pytest.mark.parametrize("start, bound, bias", [("uniform", 1 / math.sqrt(512), True),
                                                ("xavier", math.sqrt(6 / (512 + 16 * 50)), False)])
def test_how_probes_start(start, bound, bias):
    large = dict(shape=(32, 4, 4), classes=50)
    probe = new_probe("l", start=getattr(eval_linear, start), **large)
    assert bound * 0.99 < probe.weight.abs().max() <= bound and (probe.bias.abs().max() > 0) == bias
    normal = new_probe("l", **large)
    assert normal.weight.std().item() == pytest.approx(0.01, rel=0.02) and not normal.bias.any()


def test_several_views_are_averaged_as_logits_or_as_probabilities():
    probe = new_probe("l", shape=(2, 1, 1), classes=2)
    with torch.no_grad():
        probe.weight.copy_(torch.eye(2)[:, None])
    # A view is sure of class 0, two lean to class 1: the sum of logits is for 0, that of probabilities for 1.
    views = torch.tensor([[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    x = torch.stack([views, views.flip(1), views], dim=1)  # (views, three images, 2)
    x = x.flatten(0, 1)[:, :, None, None]  # crop-major
    assert judge([probe], {"l": x}, views=3).tolist() == [[[0, 1]], [[1, 0]], [[0, 1]]]
    assert judge([probe], {"l": x}, views=3, probabilities=True).tolist() == [[[1, 0]], [[0, 1]], [[1, 0]]]


def test_an_image_is_judged_whatever_stands_beside_it():
    probe, x = new_probe("l+bn", shape=(2, 1, 1), classes=6), torch.randn(8, 2, 1, 1)
    probe.train()(x)
    alone = [judge([probe], {"l": pair}) for pair in x.split(2)]
    assert torch.equal(judge([probe], {"l": x}), torch.cat(alone))


def test_kept_features_come_in_another_order_every_epoch():
    rows = torch.arange(40.0)[:, None], torch.zeros(40, dtype=torch.int64)
    source = Cached(rows, rows, torch.device("cpu"))
    first, second = (torch.cat([maps["avgpool"].flatten() for maps, *_ in source.batches(epoch, 8, 0, False)])
                     for epoch in (0, 1))
    assert not torch.equal(first, second) and torch.equal(first.sort().values, second.sort().values)


def test_images_are_normalised_as_the_trunk_says():
    info = {"resize": 24, "size": 20, "mean": (0.4, 0.5, 0.6), "std": (0.1, 0.2, 0.3)}
    how = protocol.extraction(eval_linear.arguments(["trunk"]), info, torch.device("cpu"))
    assert (how["mean"], how["std"]) == (info["mean"], info["std"])


def test_last_and_best_epoch_of_every_setting(capsys):
    probes = [new_probe(name, GRID[:2]) for name in ("a", "b")]
    history = {3: [(50, 90), (40, 80), (10, 60), (11, 60)], 4: [(52, 91), (60, 85), (9, 50), (12, 62)],
               5: [(52, 89), (55, 84), (8, 40), (7, 30)]}
    found = eval_linear.results(probes, history)
    keys = ("probe", "lr", "top1", "top5", "best_top1", "best_epoch")
    assert [tuple(r[key] for key in keys) for r in found["results"]] == [
        ("a", 0.5, 52, 89, 52, 4), ("a", 0.05, 55, 84, 60, 4), ("b", 0.5, 8, 40, 10, 3),
        ("b", 0.05, 7, 30, 12, 4)]
    # by the last epoch
    assert {name: r["lr"] for name, r in found["chosen"].items()} == {"a": 0.05, "b": 0.5}
    assert "after epoch 5" in found["selection"]
    assert "the best epochs and the rates are chosen on the validation images" in found["selection"]
    assert "a: 55.00 in the last epoch at lr 0.05, weight decay 0" in capsys.readouterr().out


# ---- several ranks


def mine(*rows, counts):
    """This rank's rows of each tensor."""
    return tuple(x.split(counts)[distributed.rank()] for x in rows)


# Rows to train on, and to judge by, on each rank. A rank with few rows has none in many batches of 4 images.
SPLITS = {2: [((20, 21), (9, 10)), ((38, 3), (0, 19)), ((41, 0), (18, 1))], 3: [((13, 27, 1), (6, 6, 7))],
          1: [((41,), (19,))]}


def cached_on_ranks(world_size):
    return [train_cached(*counts) for counts in SPLITS[world_size]]


def train_cached(counts, val_counts):
    """Number of rows, accuracies and weights of three probes on kept features, of which ranks hold a part."""
    x, labels = toy(41)
    x = x.flatten(1).repeat(1, 3)
    labels[[3, 40]] = -1
    x[3] = math.nan
    val, val_labels = toy(19, seed=1)
    val = val.flatten(1).repeat(1, 3)
    rows = mine(x, labels, counts=counts), mine(val, val_labels, counts=val_counts)
    source = Cached(*rows, torch.device("cpu"))
    names = ("avgpool", "avgpool+bn", "avgpool+affine")
    probes = [new_probe(name, GRID[:2], (36, 1, 1)).double() for name in names]
    preset = Preset("", batch_size=4)
    for epoch in range(3):
        train_one_epoch(probes, enumerate(source.batches(epoch, 4, 0, source.n % 4 < 2)), preset, epoch, 10)
    state = [p.detach() for probe in probes for p in probe.state_dict().values()]
    return source.n, source.judge(probes, next), state


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_train_as_one_process_on_kept_features(world_size):
    ((n, accuracy, weights),) = cached_on_ranks(1)
    assert n == 39
    for results in ranks(world_size, cached_on_ranks, world_size):
        for result in results:
            assert result[:2] == (n, accuracy)
            for a, b in zip(result[2], weights):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def drawn(root, path):
    """Crops of --preset mhead_90e for a probe of feature5, through the trunk at path."""
    options = ("--preset", "mhead_90e", "--layers", "feature5", "--workers", "0", "--precision", "float32")
    args = eval_linear.arguments([str(path), *options])
    trunk, info = weights.load_backbone(path)
    images = data.open_images(root)
    images.labels[4] = -1  # has no label: never shown
    how = protocol.extraction(args, info, torch.device("cpu"))
    return eval_linear.Drawn(trunk, images, images, eval_linear.choose(args), how, args.seed)


def two_epochs(root, path):
    """What feeds the probes: maps, labels and the size of the batch of all ranks."""
    source = drawn(root, path)
    return source.n, [list(source.batches(epoch, 11, 0, False)) for epoch in (0, 1)]


def test_crops_and_colour_noise_do_not_depend_on_the_number_of_ranks(images, imagenet_stem):
    n, epochs = two_epochs(images, imagenet_stem)
    assert n == 28 and all([total for *_, total in batches] == [11, 11, 6] for batches in epochs)
    assert not torch.equal(epochs[0][0][0]["feature5"], epochs[1][0][0]["feature5"])
    for batches in epochs:
        counts = torch.cat([labels for _, labels, _ in batches]).bincount().tolist()
        assert counts == [7, 10, 11]  # blue lacks one: every image once an epoch
    results = ranks(2, two_epochs, images, imagenet_stem)
    for epoch, batches in enumerate(epochs):
        for step, (maps, labels, total) in enumerate(batches):
            found = [result[1][epoch][step] for result in results]
            assert [len(part[1]) for part in found] == [total // 2, total - total // 2]
            assert all(part[2] == total for part in found)
            assert torch.equal(torch.cat([part[1] for part in found]), labels)
            torch.testing.assert_close(torch.cat([part[0]["feature5"] for part in found]), maps["feature5"],
                                       rtol=1e-4, atol=1e-5)


def test_colour_noise(imagenet_stem, monkeypatch):
    """What --preset mhead_90e adds is the same in all pixels, and spread as ImageNet's colours are."""
    seen = []
    monkeypatch.setattr(eval_linear, "photometric", lambda crops, *a: torch.zeros(crops.shape))
    monkeypatch.setattr(eval_linear.Reading, "forward", lambda self, x: seen.append(x) or {})
    source = drawn("shapes:1001", imagenet_stem)
    source.loader.epoch = lambda epoch, batches, first: [
        (torch.zeros(len(b), dtype=torch.int64), [torch.zeros(1, len(b), 3, 4, 4)], torch.zeros(1, len(b), 8))
        for b in batches]
    for epoch in range(20):
        list(source.batches(epoch, 256, 0, False))
    x = torch.cat(seen)
    assert len(x) == 20_000 and (x == x[:, :, :1, :1]).all()
    noise = x[:, :, 0, 0].double() * torch.tensor(STD).double()
    # 0.1 of the deviations that AlexNet's authors gave for ImageNet's colours, pixels in [0, 1]
    values = torch.linalg.eigvalsh(noise.T @ noise / len(noise)).sqrt()
    torch.testing.assert_close(values, torch.tensor([0.00045, 0.00188, 0.02175]).double(), rtol=0.02, atol=0)
    assert noise.mean(0).abs().max() < 5e-4


def linear_main(*arguments):
    eval_linear.main(eval_linear.arguments([str(a) for a in arguments]))


@pytest.mark.parametrize("batch_size", [8, 9])
def test_two_processes_find_what_one_finds(images, imagenet_stem, batch_size):
    # 29 images in batches of 8 or 9, 7 to judge by; jitter and colour noise are drawn.
    arguments = [imagenet_stem, "--data", images, "--preset", "mhead_90e", "--epochs", 2, *CPU]
    arguments += ["--layers", "feature4", "feature5", "--batch-size", batch_size, "--lr", 0.01, 0.001]
    saved = []
    for world_size in (1, 2):
        ranks(world_size, linear_main, *arguments)
        saved.append(json.loads((imagenet_stem / "eval_linear_mhead_90e.json").read_text()))
    assert saved[0] == saved[1] and saved[0]["batch_size"] == batch_size
    wanted = [(f"feature{i}+bn", lr) for i in (4, 5) for lr in (0.01, 0.001)]
    assert [(r["probe"], r["lr"]) for r in saved[0]["results"]] == wanted


@pytest.mark.parametrize("options", [("--preset", "mhead_90e", "--layers", "feature4", "--first", "imagenet"),
                                     (), ("--cache",)])
def test_a_killed_probe_goes_on(images, run, imagenet_stem, options, tmp_path, monkeypatch, capsys):
    trunk, options = (imagenet_stem, options[:-2]) if "--first" in options else (run, options)
    command = (trunk, "--data", images, "--epochs", 3, "--batch-size", 8, *CPU, *options, "--out")
    whole, _ = evaluate(capsys, eval_linear, *command, tmp_path / "whole")
    kills = (2, 5, 9) if "--cache" in options else (2, 6, 13)  # also while it is judged
    found = goes_on_after_kills(monkeypatch, capsys, eval_linear, *command, tmp_path / "killed", kills=kills)
    assert found == whole
    files = [next((tmp_path / folder).glob("*_classifier.pt")) for folder in ("whole", "killed")]
    heads = [torch.load(file, weights_only=True)["classifiers"] for file in files]
    assert all(torch.equal(a["weight"], b["weight"]) for a, b in zip(*heads))
    assert not list((tmp_path / "killed").glob("*progress*"))


@pytest.mark.parametrize("count, number", [(2, signal.SIGTERM), (2, signal.SIGKILL), (1, signal.SIGKILL)])
def test_a_stopped_probe_ends_as_one_that_never_stopped(images, run, count, number, tmp_path):
    words = [run, "--data", images, "--epochs", 5, "--batch-size", 8, *CPU, "--save-every", 0, "--out"]
    third_epoch = functools.partial(interrupt, number, "Progress.fetch", 14)
    kill = pytest.raises(ProcessExitedException) if number == signal.SIGKILL else contextlib.nullcontext()
    with kill:
        stopped = ranks_of(count, eval_linear, *words, tmp_path / "two", change=third_epoch)
        assert "epoch 2/" in stopped[0][1] and "stopped by a signal: saved in" in stopped[0][1]
    (code, out, _), *_ = ranks_of(count, eval_linear, *words, tmp_path / "two")
    assert code == 0 and "going on from" in out and "epoch 2/" not in out and "epoch 3/" in out
    assert run_here(eval_linear, *words, tmp_path / "one") == 0
    records = [(tmp_path / name / "eval_linear_small.json").read_text() for name in ("one", "two")]
    assert records[0] == records[1]
    heads = [torch.load(tmp_path / name / "eval_linear_small_classifier.pt", weights_only=True)["classifiers"]
             for name in ("one", "two")]
    torch.testing.assert_close(heads[0][0]["weight"], heads[1][0]["weight"], rtol=1e-4, atol=1e-5)


def test_a_signal_at_the_end_of_an_epoch_breaks_no_collective(images, run, tmp_path):
    """One rank alone hears of it, where the batches end: the ranks must still meet."""
    ranks(2, stopped_at_the_end, run, images, tmp_path, timeout=60)


def stopped_at_the_end(run, images, out):
    fetch = Progress.fetch

    def deaf(progress, *arguments):
        if distributed.rank() == 1 and progress.number == 3:  # 29 images, 8 a step: the end
            progress.stops.count = 1
        return fetch(progress, *arguments)

    with mock.patch.object(Progress, "fetch", deaf), pytest.raises(Stopped):
        linear_main(run, "--data", images, "--epochs", 2, "--batch-size", 8, *CPU, "--out", out)


def test_a_kept_classifier(images, run, imagenet_stem, tmp_path, capsys):
    trained, _ = evaluate(capsys, eval_linear, run, "--data", images, "--epochs", 3, "--batch-size", 8, *CPU)
    kept = run / "eval_linear_small_classifier.pt"
    best = max(row["top1"] for row in trained["results"])
    record, out = evaluate(capsys, eval_linear, run, "--head", kept, "--data", images, *CPU)
    assert record["top1"] == best and f"avgpool, 1 crop an image: {best:.2f} top-1 of 7 images" in out
    network = load_classifier(kept, run)
    assert network.classes == ["blue", "green", "red"] and network.info["size"] == 20
    assert network(torch.zeros(2, 3, 20, 20)).shape == (2, 3)
    several = (imagenet_stem, "--data", images, "--preset", "vissl_28e", "--layers", "feature5", "avgpool",
               "--epochs", 1, *CPU, "--batch-size", 8)
    record, _ = evaluate(capsys, eval_linear, *several)
    kept_too = imagenet_stem / "eval_linear_vissl_28e_classifier.pt"
    for layer in ("feature5", "avgpool"):
        judged, _ = evaluate(capsys, eval_linear, imagenet_stem, "--head", kept_too, "--layers", layer,
                             "--data", images, *CPU)
        wanted = [row["top1"] for row in record["results"] if row["probe"].startswith(layer)]
        assert judged["layer"] == layer and judged["top1"] in wanted
    linear = {"module.linear.weight": torch.randn(3, 64), "module.linear.bias": torch.zeros(3)}
    torch.save({"state_dict": linear}, tmp_path / "released.pth.tar")
    record, _ = evaluate(capsys, eval_linear, run, "--head", tmp_path / "released.pth.tar", "--data", images,
                         *CPU)
    assert record["layer"] == "avgpool" and record["val"] == 7
    torch.save({"state_dict": {"linear.weight": torch.randn(4, 64), "linear.bias": torch.zeros(4)}},
               tmp_path / "four.pth")
    refuses(capsys, eval_linear, [
        ((imagenet_stem, "--head", kept, "--data", images), 4, "was trained on"),
        ((run, "--head", kept, "--random-init", "--data", images), 2, "--random-init is not for --head"),
        ((run, "--head", kept, "--epochs", 3, "--data", images), 2, "--epochs is not for --head"),
        ((run, "--head", kept, "--layers", "feature1", "--data", images), 4, "has no classifier of feature1"),
        ((run, "--head", tmp_path / "four.pth", "--data", images), 3, "3 classes, the classifier 4"),
        ((run, "--head", run / "backbone.pt", "--data", images), 4, "is no classifier that is known"),
        ((run, "--head", tmp_path / "nothing.pt"), 4, "nothing.pt does not exist"),
    ])


# ---- what a user types


def test_a_run_on_colours(images, run, capsys):
    command = (eval_linear, run, "--data", images, "--workers", 0, "--epochs", 4, "--batch-size", 7,
               "--lr", 0.03, "1e38")
    record, out = evaluate(capsys, *command)
    good, diverged = record["results"]
    assert good["top1"] > 80 and good["best_top1"] >= good["top1"]
    assert diverged["top1"] == 0 and diverged["diverged"]
    assert "top5" not in good and "diverged" not in good
    assert record["chosen"]["avgpool+bn"] == good and "chosen on the validation images" in record["selection"]
    wanted = {"train": 29, "val": 7, "classes": 3, "epochs": 4, "size": 20, "cached": False}
    assert {key: record[key] for key in wanted} == wanted
    assert "1e+38" in next(line for line in out.splitlines() if line.endswith("diverged"))
    assert "epoch 4/4: avgpool+bn" in out and "warning" not in out and f"{good['top1']:.2f}       -" in out
    assert json.loads((run / "eval_linear_small.json").read_text()) == record
    assert evaluate(capsys, *command)[0] == record  # nothing is left to chance


def test_the_trunk_keeps_every_bit(images, run, monkeypatch, capsys):
    trunks = []
    real = weights.load_backbone
    monkeypatch.setattr(weights, "load_backbone", lambda path: trunks.append(real(path)) or trunks[-1])
    for options in ((), ("--cache",)):
        evaluate(capsys, eval_linear, run, "--data", images, "--workers", 0, "--epochs", 2, "--batch-size", 8,
                 *options)
    before = torch.load(run / "backbone.pt", weights_only=True)["state_dict"]
    for trunk, _ in trunks:
        after = trunk.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], before[name]) for name in before)
        assert not trunk.training and all(p.grad is None for p in trunk.parameters())
    assert len(trunks) == 2


def test_kept_features(images, run, tmp_path, capsys):
    path = tmp_path / "f.npz"
    direct, _ = evaluate(capsys, eval_linear, run, "--data", images, "--save-features", path, *CPU)
    assert direct["cached"] and (run / "eval_linear_small_cached.json").is_file()
    vissl = ("--preset", "vissl_28e", "--layers", "avgpool", "--epochs", 1, "--cache", "--size", 20)
    record, _ = evaluate(capsys, eval_linear, run, "--data", images, *vissl, "--resize", 24, *CPU)
    assert [r["probe"] for r in record["results"]] == ["avgpool+affine", "avgpool"]
    kept, _ = evaluate(capsys, eval_linear, path)
    assert kept["results"] == direct["results"]
    assert (kept["method"], kept["size"], kept["classes"]) == ("swav", 20, 3)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["train_features"].shape == (29, 64) and arrays["train_features"].dtype == np.float32
        assert arrays["val_labels"].tolist() == [0, 0, 0, 1, 1, 2, 2]  # blue, green, red
        features, names = torch.from_numpy(arrays["val_features"]), sorted((images / "val").glob("*/*.png"))
    trunk, _ = weights.load_backbone(run)
    for row, name in zip(features, names):
        pixels = center(Image.open(name), 24, 20).float() / 255
        x = torch.stack([(p - m) / s for p, m, s in zip(pixels, MEAN, STD)])[None]
        torch.testing.assert_close(row, trunk.eval()(x)[0].detach(), rtol=1e-4, atol=1e-5)
    k = ("--k", 1, 5, 29, 30)
    from_file, _ = evaluate(capsys, eval_knn, path, *k)
    from_images, _ = evaluate(capsys, eval_knn, run, "--data", images, *k, *CPU)
    assert from_file.pop("trunk") != from_images.pop("trunk")
    assert from_file == from_images and list(from_file["top1"]) == ["1", "5", "29"]


def test_any_npz_of_features(tmp_path, capsys):
    generator = np.random.default_rng(0)
    labels, val_labels = np.arange(60) % 6, np.arange(13, dtype=np.int32) % 6
    centres = generator.normal(size=(6, 5))
    arrays = {"train_features": centres[labels] + 0.1 * generator.normal(size=(60, 5)),
              "train_labels": labels}
    arrays |= {"val_features": centres[val_labels].astype(np.float16), "val_labels": val_labels}
    np.savez_compressed(tmp_path / "f.npz", **arrays)
    command = (eval_linear, tmp_path / "f.npz", "--batch-size", 16, "--lr", 0.3, "--epochs", 20)
    record, _ = evaluate(capsys, *command)
    assert record["results"][0]["top1"] == record["results"][0]["top5"] == 100 and record["method"] is None
    assert evaluate(capsys, eval_knn, tmp_path / "f.npz", "--k", 5)[0]["top1"] == {"5": 100}
    # by column, as Fortran has it
    np.savez(tmp_path / "f.npz", **{name: np.asfortranarray(array) for name, array in arrays.items()})
    assert evaluate(capsys, *command)[0] == record


KEPT = [((20, 21, 0), (0, 2, 0)), ((41, 0, 0), (1, 0, 1)), ((13, 27, 1), (0, 0, 2))]


def keep_and_read(folder):
    x, labels = toy(41)
    val, val_labels = toy(2, seed=1)
    results = []
    for i, (counts, val_counts) in enumerate(KEPT):
        rows = mine(x.flatten(1), labels, counts=counts), mine(val.flatten(1), val_labels, counts=val_counts)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            store.save(folder / f"{i}.npz", *rows, {"arch": "resnet10"})
        results.append((*store.load(folder / f"{i}.npz"), said.getvalue()))
    return results


def test_ranks_keep_and_read_one_file(tmp_path):
    everywhere = ranks(3, keep_and_read, tmp_path)
    for i in range(len(KEPT)):
        results = [results[i] for results in everywhere]
        for part, (x, labels) in enumerate((toy(41), toy(2, seed=1))):
            for kind, whole in enumerate((x.flatten(1).float(), labels)):
                found = torch.cat([result[part][kind] for result in results])
                assert torch.equal(found, whole) and found.dtype == whole.dtype
        assert [len(result[1][0]) for result in results] == [0, 1, 1]  # of two rows
        assert all(result[2] == {"arch": "resnet10", "classes": CLASSES} for result in results)
        size = (41 + 2) * (12 * 4 + 8)  # 12 features and a label each
        gathered = f"{size:,} bytes of features and labels are gathered on rank 0\n"
        assert [result[3] for result in results] == [gathered, "", ""]


def unwritable(path):
    x, labels = toy(5)
    try:
        store.save(path, (x.flatten(1), labels), (x.flatten(1), labels), {})
    except DataError as error:
        return str(error)


def test_features_that_cannot_be_kept_are_an_error_on_every_rank(tmp_path):
    for message in ranks(2, unwritable, tmp_path / "none" / "f.npz"):
        assert "f.npz cannot be written: No such file or directory" in message


@pytest.mark.parametrize("preset", ["mhead_90e", "places205_28e", "vissl_28e", "sela_resnet_146e"])
def test_published_presets_on_a_resnet(images, imagenet_stem, capsys, preset):
    p = PRESETS[preset]
    record, out = evaluate(capsys, eval_linear, imagenet_stem, "--data", images, "--preset", preset,
                           "--epochs", 1, "--batch-size", 15, "--workers", 0)
    assert [r["probe"] for r in record["results"]] == list(p.probes) and record["size"] == 224
    rule = f"for 15 the linear rule asks for --lr {p.lr[0] * 15 / p.batch_size:g}"
    kept = f"--lr {p.lr[0]} of {preset} belongs to batch {p.batch_size} and is kept"
    assert f"warning: {kept}: {rule}\n" in out


@pytest.mark.parametrize("preset, arch",
                         [("dc_alexnet_90e", "alexnet"), ("sela_alexnet_36e", "alexnet_sela")])
def test_published_presets_on_an_alexnet(images, tmp_path, monkeypatch, capsys, preset, arch):
    def build(info):
        with torch.device("meta"):  # its fully connected layers have 200 MB that no probe looks at
            trunk = AlexNet((4, 6, 6, 6, 4), info["sobel"], last_relu=False)
        trunk.classifier = nn.Identity()
        trunk.sobel = Sobel() if info["sobel"] else nn.Identity()
        for layer in trunk.features.to_empty(device="cpu"):
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return trunk

    monkeypatch.setattr(load, "build_backbone", build)
    torch.manual_seed(0)
    info = dict(arch=arch, width=1, stem="imagenet", sobel=arch == "alexnet", resize=256, size=224)
    path = export(tmp_path / "backbone.pt", build(info), **info)
    record, _ = evaluate(capsys, eval_linear, path, "--data", images, "--preset", preset, "--epochs", 1,
                         "--batch-size", 16, "--workers", 0)
    assert [r["probe"] for r in record["results"]] == list(PRESETS[preset].probes) and record["arch"] == arch


def test_ten_crops_or_one(images, imagenet_stem, capsys):
    def ran(*options):
        record, _ = evaluate(capsys, eval_linear, imagenet_stem, "--data", images, "--epochs", 1,
                             "--workers", 0, "--batch-size", 15, *options)
        return record["crops"]

    assert ran("--preset", "sela_resnet_146e") == ran("--crops", 10, "--preset", "avgpool_100e") == 10
    seen = []
    with mock.patch.object(eval_linear, "judge", lambda *a: seen.append(a[2]) or judge(*a)):
        assert ran("--preset", "sela_resnet_146e", "--crops", 1) == 1
    assert set(seen) == {1}


def test_a_sobel_resnet50_of_reduced_width(images, tmp_path, capsys):
    info = dict(arch="resnet50", stem="imagenet", sobel=True, resize=256, size=224, method="deepcluster")
    path = export(tmp_path / "b.pt", resnet50(width=0.125, sobel=True), **info)
    options = ("--preset", "mhead_90e", "--epochs", 1, "--workers", 0, "--layers", "feature1", "feature5")
    record, _ = evaluate(capsys, eval_linear, path, "--data", images, *options, "--batch-size", 16,
                         "--lr", 0.01)
    assert record["arch"] == "resnet50"


def test_drops_move_with_the_number_of_epochs():
    p = eval_linear.choose(eval_linear.arguments(["x", "--preset", "avgpool_100e", "--epochs", "10"]))
    rates = [p.schedule(p, epoch, epoch * 3, 30, 0) for epoch in range(10)]
    assert rates == pytest.approx([30] * 6 + [3] * 2 + [0.3] * 2)


def test_images_that_cannot_be_read(images, run, tmp_path, capsys):
    shutil.copytree(images, tmp_path, dirs_exist_ok=True)
    for split in ("train", "val"):
        (tmp_path / split / "red" / "0.png").write_text("no image")
    command = (eval_linear, run, "--data", tmp_path, "--workers", 0, "--epochs", 1, "--batch-size", 7)
    _, out = evaluate(capsys, *command)
    assert "warning: 1 images of --data cannot be read and are replaced by their neighbours" in out
    record, out = evaluate(capsys, *command, "--cache")
    assert "1 images of --data cannot be read and are left out" in out and record["train"] == 28


def test_errors(tmp_path, images, run, imagenet_stem, capsys):
    lone = tmp_path / "lone"
    for split in ("train", "val"):
        (lone / split / "a").mkdir(parents=True)
        Image.new("RGB", (20, 20), (5 * len(split), 0, 0)).save(lone / split / "a" / f"{split}.png")
    x = np.zeros((4, 3), np.float32)

    def spoilt(value):  # two rows of four
        rows = x.astype(np.float64)
        rows[1, 2] = rows[2, 0] = value
        return rows

    good = dict(train_features=x, train_labels=np.arange(4), val_features=x, val_labels=np.arange(4))
    for name, change in (
        ("label", dict(val_labels=np.array([0, 1, 2, 7]))),
        ("width", dict(val_features=np.zeros((4, 2)))),
        ("length", dict(train_labels=np.arange(3))),
        ("words", dict(train_labels=np.array(["a", "b", "c", "d"]))),
        ("objects", dict(train_features=np.array([[1], None, 2, 3], dtype=object))),
        ("scalar", dict(train_features=np.float32(1))),
        ("info", dict(info="[1]")),
        ("wide", dict(info='{"width": "1"}')),
        ("half", dict(train_labels=np.arange(4) / 2)),
        ("many", dict(train_labels=np.array([0, 1, 2, 10**9]))),
        ("none", dict(val_labels=np.full(4, -1))),
        ("complex", dict(val_features=x * 1j)),
        ("nan", dict(train_features=spoilt(np.nan), train_labels=np.array([0, -1, 2, 3]),
                     val_labels=np.array([0, 2, 3, 3]))),
        ("large", dict(val_features=spoilt(1e39))),
    ):
        np.savez(tmp_path / f"{name}.npz", **{**good, **change})
    np.savez(tmp_path / "few.npz", train_features=x)
    (tmp_path / "page.npz").write_text("<html>")
    whole = (tmp_path / "label.npz").read_bytes()
    (tmp_path / "short.npz").write_bytes(whole.replace(b"<f4", b"<f2", 1))  # half of the numbers, unseen
    (tmp_path / "torn.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.npz").write_bytes(whole.replace(x.tobytes(), b"\1" + x.tobytes()[1:]))
    own, pick = (run, "--data", images), (imagenet_stem, "--data", images, "--preset")

    def file(name):
        return (tmp_path / f"{name}.npz",)

    refuses(capsys, eval_linear, (
        ((tmp_path / "none.pt", "--data", images), 4, "none.pt does not exist"),
        ((run,), 2, "--data is needed"),
        ((*own, "--preset", "mhead_90e"), 2, "feature1 is defined on a map of 112x112"),
        ((*pick, "mhead_90e", "--size", 96), 2, "feature1 is defined on a map of 112x112"),
        ((*pick, "sela_alexnet_36e"), 2, "conv2_max needs a trunk with a map 'conv2'"),
        ((*own, "--preset", "mhead"), 2, "invalid choice: 'mhead'"),
        ((*own, "--batch-size", 1), 2, "--batch-size 1: at least 2"),
        ((*own, "--save-features", tmp_path / "no" / "f.npz"), 2, "a folder that can be written"),
        ((*own, "--save-features", tmp_path / "features"), 2, "an .npz file"),
        ((*own, "--epochs", 4, "--lr", "1e38"), 5, "every classifier"),
        ((*own, "--preset", "mhead_90e", "--cache"), 2, "cached features are those of avgpool"),
        ((*own, "--crops", 10, "--cache"), 2, "--crops 10: cached features have one crop per image"),
        ((*own, "--layers", "feature5"), 2, "feature5 is not in --preset small: choose from avgpool"),
        ((*own, "--size", 30), 2, "--resize 24 is smaller than --size 30"),
        ((*own, "--epochs", 0), 2, "--epochs 0: more than 0 is needed"),
        ((*own, "--batch-size", -1), 2, "--batch-size -1: more than 0 is needed"),
        ((*own, "--lr", 0.1, "nan"), 2, "--lr 0.1 nan: more than 0 is needed"),
        ((*own, "--weight-decay", "-1"), 2, "--weight-decay -1: more than 0 is needed, of a weight decay 0"),
        ((*own, "--seed", -1), 2, "--seed -1"),
        ((run, "--data", lone), 3, "1 labelled images are too few to train on"),
        ((run, "--data", images / "train" / "red"), 3, "has no val/ folder"),
        (file("missing"), 3, "val_labels are needed): No such file"),
        (file("page"), 3, "page.npz is no file of features"),
        (file("few"), 3, "few.npz is no file of features (train_features (N, D)"),
        (file("label"), 3, "label 7 of the features to classify is not among the training labels"),
        (file("width"), 3, "of one D for train and val: found (4, 3), (4, 2), (4,), (4,)"),
        (file("length"), 3, "found (4, 3), (4, 3), (3,), (4,)"),
        *((file(name), 3, f"{name}.npz is no file of features (train_features (N, D), train_labels (N,)")
          for name in ("words", "objects", "scalar", "info", "torn", "flipped", "wide", "half", "many",
                       "none", "complex", "short")),
        (file("nan"), 3, "nan.npz: row 2 of train_features is not finite, nor are 0 others"),
        (file("large"), 3, "large.npz: row 1 of val_features is not finite, nor are 1 others"),
        ((*file("label"), "--data", images), 2, "--data needs a trunk"),
        ((*file("label"), "--random-init"), 2, "--random-init needs a trunk"),
    ))
