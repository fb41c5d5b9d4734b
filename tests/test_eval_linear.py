"""eval_linear.py: schedules and probes against tables and torch's own, then what a user types and what comes
out."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ranks
from PIL import Image
from torch import nn

import eval_knn
import eval_linear
from common import data, distributed, weights
from common.alexnet import AlexNet, Sobel
from common.engine import checkpoint
from common.engine.errors import DataError
from common.engine.launch import launch
from common.evaluation import store
from common.multicrop import MEAN, STD, center
from common.resnet import resnet10, resnet50
from common.weights import load
from eval_linear import PRESETS, Cached, Probe, judge, train_one_epoch

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
INFO = dict(width=0.125, stem="small", channels=3, mean=MEAN, std=STD, method="swav", resize=24, size=20,
            epoch=5)


def linear_here(*arguments, script=eval_linear):
    try:
        launch(script.main, script.arguments([str(a) for a in arguments]))
    except SystemExit as stop:
        return stop.code
    return 0


def record(capsys):
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three colours under noise: 29 images to train on, 7 to judge by."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, counts in {"train": (11, 10, 8), "val": (2, 2, 3)}.items():
        for (name, colour), count in zip(COLOURS.items(), counts):
            for i in range(count):
                (root / split / name).mkdir(parents=True, exist_ok=True)
                pixels = np.clip(rng.normal(colour, 40, (40, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def export(path, trunk, **info):
    checkpoint.export_backbone(path, trunk, {**INFO, **info})
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    torch.manual_seed(3)
    export(path / "backbone.pt", resnet10(width=0.125, stem="small"), arch="resnet10")
    return path


@pytest.fixture(scope="module")
def imagenet_stem(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("trunk")
    export(path / "backbone.pt", resnet10(width=0.125), arch="resnet10", stem="imagenet", resize=256,
           size=224)
    return path


# ---- the protocols

# Name: epochs, batch, learning rate, weight decay, nesterov, and the rate in the first epoch of each stretch
# (0-based).
PUBLISHED = {
    "mhead_90e": (90, 256, 0.01, 1e-4, True, {0: 1e-2, 30: 1e-3, 60: 1e-4}),
    "avgpool_100e": (100, 256, 30.0, 0.0, False, {0: 30.0, 60: 3.0, 80: 0.3}),
    "places205_28e": (28, 256, 0.01, 1e-4, True, {0: 1e-2, 7: 1e-3, 14: 1e-4, 21: 1e-5}),
    "inat18_84e": (84, 256, 0.01, 1e-4, True, {0: 1e-2, 24: 1e-3, 48: 1e-4, 72: 1e-5}),
    "swav_100e": (100, 256, 0.3, 1e-6, False, "cosine"),
    "vissl_28e": (28, 256, 0.01, 5e-4, True, {0: 1e-2, 8: 1e-3, 16: 1e-4, 24: 1e-5}),
    "sela_resnet_146e": (146, 1024, 0.1, 0.0, False, {0: 1e-1, 85: 1e-2, 128: 1e-3}),
    "dc_alexnet_90e": (90, 256, 0.01, 1e-7, False, "root"),
    "sela_alexnet_36e": (36, 192, 0.01, 1e-5, False, {0: 1e-2, 10: 1e-3, 20: 1e-4, 30: 1e-5}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_whole_schedule_of_a_preset(name):
    epochs, batch, lr, weight_decay, nesterov, rates = PUBLISHED[name]
    p, steps = PRESETS[name], 7
    assert (p.epochs, p.batch_size, p.lr, p.weight_decay, p.nesterov) == (epochs, batch, (lr,),
                                                                          (weight_decay,), nesterov)
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
    assert PRESETS["avgpool_100e"].probes == PRESETS["swav_100e"].probes == PRESETS["sela_resnet_146e"].probes == (
        "avgpool",)
    assert [p.partition("+")[2] for p in PRESETS["vissl_28e"].probes] == ["affine"] * 6 + [""]
    assert {name: p.crop.__name__ for name, p in PRESETS.items()
            if p.crop is not eval_linear.resized_crop} == {"places205_28e": "RandomCrop",
                                                           "dc_alexnet_90e": "RandomCrop"}
    assert {name for name, p in PRESETS.items()
            if p.view.views == 10} == {"sela_resnet_146e", "dc_alexnet_90e", "sela_alexnet_36e"}
    assert {name for name, p in PRESETS.items() if p.probabilities} == {"dc_alexnet_90e"}
    assert {name: (p.jitter, p.lighting) for name, p in PRESETS.items() if p.jitter
            or p.lighting} == {"mhead_90e": (0.4, 0.1)}
    assert {(p.resize, p.size) for name, p in PRESETS.items() if name != "small"} == {(256, 224)}


def test_presets_are_listed_with_their_figures(capsys):
    assert linear_here("--list-presets") == 0
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
    return torch.randn(n, *SHAPE, generator=g, dtype=torch.float64) + 0.3 * labels[:, None, None,
                                                                                   None], labels


def pieces(x, labels, batch_size=8):
    return [({"l": x[i : i + batch_size]}, labels[i : i + batch_size],
             len(x[i : i + batch_size])) for i in range(0, len(x), batch_size)]


def fit(name, settings, preset, epochs=3):
    x, labels = toy()
    probe = Probe(name, SHAPE, CLASSES, settings, eval_linear.gaussian, seed=1).double()
    for epoch in range(epochs):
        train_one_epoch([probe], pieces(x, labels), preset, epoch, 5)
    return probe


@pytest.mark.parametrize("name", ["l", "l+bn", "l+affine"])
@pytest.mark.parametrize("nesterov", [False, True])
def test_settings_trained_at_once_end_as_trained_alone(name, nesterov):
    preset = eval_linear.Preset("", epochs=3, drops=(2,), nesterov=nesterov)
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
    probe = Probe(name, SHAPE, CLASSES, [(lr, weight_decay)], eval_linear.gaussian, seed=1).double()
    layers = [nn.BatchNorm2d(3, affine=name == "l+affine")] if "+" in name else []
    network = nn.Sequential(*layers, nn.Flatten(), nn.Linear(12, CLASSES)).double()
    with torch.no_grad():
        network[-1].weight.copy_(probe.weight[:, 0])
        network[-1].bias.copy_(probe.bias[:, 0])
    norm = [p for layer in layers for p in layer.parameters()]  # not decayed
    groups = [{"params": network[-1].parameters(), "weight_decay": weight_decay},
              *([{"params": norm}] if norm else [])]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=nesterov)
    x, labels = toy()
    for epoch in range(3):
        preset = eval_linear.Preset("", epochs=3, drops=(2,), nesterov=nesterov)
        train_one_epoch([probe], pieces(x, labels), preset, epoch, 5)
        for group in optimizer.param_groups:
            group["lr"] = lr * (0.1 if epoch == 2 else 1)
        for maps, y, _ in pieces(x, labels):
            optimizer.zero_grad()
            F.cross_entropy(network(maps["l"]), y).backward()
            optimizer.step()
    torch.testing.assert_close(probe.eval()(x)[..., 0], network.eval()(x), rtol=1e-9, atol=1e-12)


def test_a_setting_that_diverges_leaves_the_others_alone():
    preset = eval_linear.Preset("", epochs=3)
    alone, together = fit("l", [(0.5, 0.0)], preset), fit("l", [(0.5, 0.0), (1e308, 0.0), (0.5, 1e305)],
                                                          preset)
    torch.testing.assert_close(together.weight[:, 0], alone.weight[:, 0])
    best = judge([together], {"l": toy()[0]})
    assert (best[:, 1:] == -1).all() and (best[:, 0] >= 0).all() and not together.weight[:,
                                                                                         1].isfinite().all()


def test_layers_that_are_left_out_change_nothing_for_the_others():
    a, b = (Probe(name, SHAPE, CLASSES, [(1, 0)], eval_linear.gaussian,
                  seed=0).weight for name in ("feature1+bn", "feature5+bn"))
    assert not torch.equal(a, b)
    assert torch.equal(a, Probe("feature1+bn", SHAPE, CLASSES, [(2, 0)], eval_linear.gaussian, seed=0).weight)
    assert not torch.equal(a, Probe("feature1+bn", SHAPE, CLASSES, [(1, 0)], eval_linear.gaussian,
                                    seed=1).weight)


@pytest.mark.parametrize("start, bound, bias", [("uniform", 1 / math.sqrt(512), True),
                                                ("xavier", math.sqrt(6 / (512 + 16 * 50)), False)])
def test_how_probes_start(start, bound, bias):
    probe = Probe("l", (32, 4, 4), 50, [(1, 0)], getattr(eval_linear, start), seed=0)
    assert bound * 0.99 < probe.weight.abs().max() <= bound and (probe.bias.abs().max() > 0) == bias
    gaussian = Probe("l", (32, 4, 4), 50, [(1, 0)], eval_linear.gaussian, seed=0)
    assert gaussian.weight.std().item() == pytest.approx(0.01, rel=0.02) and not gaussian.bias.any()


def test_several_views_are_averaged_as_logits_or_as_probabilities():
    probe = Probe("l", (2, 1, 1), 2, [(1, 0)], eval_linear.gaussian, seed=0)
    with torch.no_grad():
        probe.weight.copy_(torch.eye(2)[:, None])
    # Views of one image: one sure of class 0, two that lean to class 1. The sum of logits is for 0, that of
    # probabilities for 1.
    views = torch.tensor([[9.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    # three images, crop-major
    x = torch.stack([views, views.flip(1), views], dim=1).flatten(0, 1)[:, :, None, None]
    assert judge([probe], {"l": x}, views=3).tolist() == [[[0, 1]], [[1, 0]], [[0, 1]]]
    assert judge([probe], {"l": x}, views=3, probabilities=True).tolist() == [[[1, 0]], [[0, 1]], [[1, 0]]]


def test_last_and_best_epoch_of_every_setting(capsys):
    probes = [Probe(name, SHAPE, CLASSES, GRID[:2], eval_linear.gaussian, 0) for name in ("a", "b")]
    history = {3: [(50, 90), (40, 80), (10, 60), (11, 60)], 4: [(52, 91), (60, 85), (9, 50), (12, 62)],
               5: [(52, 89), (55, 84), (8, 40), (7, 30)]}
    found = eval_linear.results(probes, history)
    rows = [(r["probe"], r["lr"], r["top1"], r["top5"], r["best_top1"],
             r["best_epoch"]) for r in found["results"]]
    assert rows == [("a", 0.5, 52, 89, 52, 4), ("a", 0.05, 55, 84, 60, 4), ("b", 0.5, 8, 40, 10, 3),
                    ("b", 0.05, 7, 30, 12, 4)]
    # by the last epoch
    assert {name: r["lr"] for name, r in found["chosen"].items()} == {"a": 0.05, "b": 0.5}
    assert ("after epoch 5" in found["selection"] and "the best epochs and the rates are chosen on the "
                                                      "validation images" in found["selection"])
    assert "a: 55.00 in the last epoch at lr 0.05, weight decay 0" in capsys.readouterr().out


# ---- several ranks


def mine(*rows, counts):
    """This rank's rows of each tensor."""
    return tuple(x.split(counts)[distributed.rank()] for x in rows)


# Rows to train on, and to judge by, on each rank. Batches have 4 images: a rank with few rows has none in
# many of them.
SPLITS = {2: [((20, 21), (9, 10)), ((38, 3), (0, 19)), ((41, 0), (18, 1))], 3: [((13, 27, 1), (6, 6, 7))],
          1: [((41,), (19,))]}


def cached_on_ranks(world_size):
    return [train_cached(*counts) for counts in SPLITS[world_size]]


def train_cached(counts, val_counts):
    """Three probes on kept features, of which this rank holds some rows: number of rows, accuracies and
    weights."""
    x, labels = toy(41)
    x = x.flatten(1).repeat(1, 3)
    labels[[3, 40]] = -1
    x[3] = math.nan
    val, val_labels = toy(19, seed=1)
    val = val.flatten(1).repeat(1, 3)
    source = Cached(mine(x, labels, counts=counts), mine(val, val_labels, counts=val_counts),
                    torch.device("cpu"))
    names = ("avgpool", "avgpool+bn", "avgpool+affine")
    probes = [Probe(name, (36, 1, 1), CLASSES, GRID[:2], eval_linear.gaussian, 0).double() for name in names]
    preset = eval_linear.Preset("", batch_size=4)
    for epoch in range(3):
        train_one_epoch(probes, source.batches(epoch, 4, 0, source.n % 4 < 2), preset, epoch, 10)
    return source.n, source.judge(probes), [p.detach() for probe in probes
                                            for p in probe.state_dict().values()]


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
    """What feeds the probes in two epochs: maps, labels and the size of the batch of all ranks."""
    args = eval_linear.arguments([str(path), "--preset", "mhead_90e", "--layers", "feature5", "--workers",
                                  "0", "--precision", "float32"])
    trunk, info = weights.load_backbone(path)
    images = data.open_images(root)
    images.labels[4] = -1  # has no label: never shown
    source = eval_linear.Drawn(trunk, info, images, None, eval_linear.choose(args), args, torch.device("cpu"))
    return source.n, [list(source.batches(epoch, 11, 0, False)) for epoch in (0, 1)]


def test_crops_and_colour_noise_do_not_depend_on_the_number_of_ranks(images, imagenet_stem):
    n, epochs = drawn(images, imagenet_stem)
    assert n == 28 and all([total for *_, total in batches] == [11, 11, 6] for batches in epochs)
    assert not torch.equal(epochs[0][0][0]["feature5"], epochs[1][0][0]["feature5"])
    for batches in epochs:
        counts = torch.cat([labels for _, labels, _ in batches]).bincount().tolist()
        assert counts == [7, 10, 11]  # blue lacks one: every image once an epoch
    results = ranks(2, drawn, images, imagenet_stem)
    for epoch, batches in enumerate(epochs):
        for step, (maps, labels, total) in enumerate(batches):
            found = [result[1][epoch][step] for result in results]
            assert [len(part[1]) for part in found] == [total // 2, total - total // 2] and all(
                part[2] == total for part in found)
            assert torch.equal(torch.cat([part[1] for part in found]), labels)
            torch.testing.assert_close(torch.cat([part[0]["feature5"] for part in found]), maps["feature5"],
                                       rtol=1e-4, atol=1e-5)


def test_colour_noise(images, imagenet_stem, monkeypatch):
    """What --preset mhead_90e adds to an image is the same in all pixels, and spread as ImageNet's colours
    are."""
    seen = []
    monkeypatch.setattr(eval_linear, "photometric", lambda crops, *a: torch.zeros(crops.shape))
    monkeypatch.setattr(eval_linear.Reading, "forward", lambda self, x: seen.append(x) or {})
    args = eval_linear.arguments([str(imagenet_stem), "--preset", "mhead_90e", "--workers", "0"])
    trunk, info = weights.load_backbone(imagenet_stem)
    source = eval_linear.Drawn(trunk, info, data.open_images("shapes:1000"), None, eval_linear.choose(args),
                               args, torch.device("cpu"))
    source.loader.epoch = lambda epoch, batches: [(torch.zeros(len(b), dtype=torch.int64), [
        torch.zeros(1, len(b), 3, 4, 4)], torch.zeros(1, len(b), 8)) for b in batches]
    for epoch in range(20):
        list(source.batches(epoch, 256, 0, False))
    x = torch.cat(seen)
    assert len(x) == 20_000 and (x == x[:, :, :1, :1]).all()
    noise = x[:, :, 0, 0].double() * torch.tensor(STD).double()
    # 0.1 of the eigenvalues of ImageNet's colour covariance, as AlexNet's authors gave them for pixels in [0,
    # 1].
    values = torch.linalg.eigvalsh(noise.T @ noise / len(noise)).sqrt()
    torch.testing.assert_close(values, torch.tensor([0.00045, 0.00188, 0.02175]).double(), rtol=0.02, atol=0)
    assert noise.mean(0).abs().max() < 5e-4


def linear_main(*arguments):
    eval_linear.main(eval_linear.arguments([str(a) for a in arguments]))


@pytest.mark.parametrize("batch_size", [8, 9])
def test_two_processes_find_what_one_finds(images, imagenet_stem, batch_size):
    # 29 images in batches of 8 or 9, 7 to judge by; jitter and colour noise are drawn.
    arguments = [imagenet_stem, "--data", images, "--preset", "mhead_90e", "--epochs", 2, "--batch-size",
                 batch_size, "--lr", 0.01, 0.001]
    arguments += ["--layers", "feature4", "feature5", "--workers", 0, "--precision", "float32"]
    saved = []
    for world_size in (1, 2):
        ranks(world_size, linear_main, *arguments)
        saved.append(json.loads((imagenet_stem / "eval_linear_mhead_90e.json").read_text()))
    assert saved[0] == saved[1] and saved[0]["batch_size"] == batch_size
    assert [(r["probe"], r["lr"]) for r in saved[0]["results"]] == [(f"feature{i}+bn", lr) for i in (4, 5)
                                                                    for lr in (0.01, 0.001)]


# ---- what a user types


def test_a_run_on_colours(images, run, capsys):
    arguments = (run, "--data", images, "--workers", 0, "--epochs", 4, "--batch-size", 7, "--lr", 0.03,
                 "1e38")
    assert linear_here(*arguments) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    good, diverged = result["results"]
    assert good["top1"] > 80 and good["best_top1"] >= good["top1"] and diverged["top1"] == 0 and diverged["diverged"]
    assert "top5" not in good and "diverged" not in good
    assert result["chosen"]["avgpool+bn"] == good and "chosen on the validation images" in result["selection"]
    assert (result["train"], result["classes"], result["epochs"], result["size"],
            result["cached"]) == (29, 3, 4, 20, False)
    assert result["val"] == 7 and "1e+38" in next(line for line in out.splitlines()
                                                  if line.endswith("diverged"))
    assert "epoch 4/4: avgpool+bn" in out and "warning" not in out and f"{good['top1']:.2f}       -" in out
    assert json.loads((run / "eval_linear_small.json").read_text()) == result
    assert linear_here(*arguments) == 0 and record(capsys) == result  # nothing is left to chance


def test_the_trunk_keeps_every_bit(images, run, monkeypatch, capsys):
    trunks = []
    real = weights.load_backbone
    monkeypatch.setattr(weights, "load_backbone", lambda path: trunks.append(real(path)) or trunks[-1])
    for options in ((), ("--cache",)):
        assert linear_here(run, "--data", images, "--workers", 0, "--epochs", 2, "--batch-size", 8,
                           *options) == 0
    before = torch.load(run / "backbone.pt", weights_only=True)["state_dict"]
    for trunk, _ in trunks:
        after = trunk.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name],
                                                                 before[name]) for name in before)
        assert not trunk.training and all(p.grad is None for p in trunk.parameters())
    assert len(trunks) == 2


def test_kept_features(images, run, tmp_path, capsys):
    options = ("--workers", 0, "--precision", "float32")
    path = tmp_path / "f.npz"
    assert linear_here(run, "--data", images, "--save-features", path, *options) == 0
    direct = record(capsys)
    assert direct["cached"] and (run / "eval_linear_small_cached.json").is_file()
    vissl = ("--preset", "vissl_28e", "--layers", "avgpool", "--epochs", 1, "--cache", "--size", 20,
             "--resize", 24, *options)
    assert linear_here(run, "--data", images, *vissl) == 0
    assert [r["probe"] for r in record(capsys)["results"]] == ["avgpool+affine", "avgpool"]
    assert linear_here(path) == 0
    kept = record(capsys)
    assert kept["results"] == direct["results"] and (kept["method"], kept["size"],
                                                     kept["classes"]) == ("swav", 20, 3)
    with np.load(path, allow_pickle=False) as arrays:
        assert arrays["train_features"].shape == (29, 64) and arrays["train_features"].dtype == np.float32
        assert arrays["val_labels"].tolist() == [0, 0, 0, 1, 1, 2, 2]  # blue, green, red
        features, names = torch.from_numpy(arrays["val_features"]), sorted((images / "val").glob("*/*.png"))
    trunk, _ = weights.load_backbone(run)
    for row, name in zip(features, names):
        pixels = center(Image.open(name), 24, 20).float() / 255
        x = torch.stack([(p - m) / s for p, m, s in zip(pixels, MEAN, STD)])[None]
        torch.testing.assert_close(row, trunk.eval()(x)[0].detach(), rtol=1e-4, atol=1e-5)
    assert linear_here(path, "--k", 1, 5, 29, 30, script=eval_knn) == 0
    from_file = record(capsys)
    assert linear_here(run, "--data", images, "--k", 1, 5, 29, 30, *options, script=eval_knn) == 0
    from_images = record(capsys)
    assert from_file.pop("trunk") != from_images.pop("trunk") and from_file == from_images and list(
        from_file["top1"]) == ["1", "5", "29"]


def test_any_npz_of_features(tmp_path, capsys):
    generator = np.random.default_rng(0)
    labels, val_labels = np.arange(60) % 6, np.arange(13, dtype=np.int32) % 6
    centres = generator.normal(size=(6, 5))
    arrays = {"train_features": centres[labels] + 0.1 * generator.normal(size=(60, 5)),
              "train_labels": labels}
    arrays |= {"val_features": centres[val_labels].astype(np.float16), "val_labels": val_labels}
    np.savez_compressed(tmp_path / "f.npz", **arrays)
    assert linear_here(tmp_path / "f.npz", "--batch-size", 16, "--lr", 0.3, "--epochs", 20) == 0
    result = record(capsys)
    assert result["results"][0]["top1"] == result["results"][0]["top5"] == 100 and result["method"] is None
    assert linear_here(tmp_path / "f.npz", "--k", 5,
                       script=eval_knn) == 0 and record(capsys)["top1"] == {"5": 100}


KEPT = [((20, 21, 0), (0, 2, 0)), ((41, 0, 0), (1, 0, 1)), ((13, 27, 1), (0, 0, 2))]


def keep_and_read(folder):
    x, labels = toy(41)
    val, val_labels = toy(2, seed=1)
    results = []
    for i, (counts, val_counts) in enumerate(KEPT):
        rows = mine(x.flatten(1), labels, counts=counts), mine(val.flatten(1), val_labels, counts=val_counts)
        store.save(folder / f"{i}.npz", *rows, {"arch": "resnet10"})
        results.append(store.load(folder / f"{i}.npz"))
    return results


def test_ranks_keep_and_read_one_file(tmp_path):
    everywhere = ranks(3, keep_and_read, tmp_path)
    for i in range(len(KEPT)):
        results = [results[i] for results in everywhere]
        for part, (x, labels) in enumerate((toy(41), toy(2, seed=1))):
            assert torch.equal(torch.cat([result[part][0] for result in results]), x.flatten(1).float())
            assert torch.equal(torch.cat([result[part][1] for result in results]), labels)
        assert [len(result[1][0]) for result in results] == [0, 1, 1]  # of two rows
        assert all(result[2] == {"arch": "resnet10"} for result in results)


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
    arguments = ("--preset", preset, "--epochs", 1, "--batch-size", 15, "--workers", 0)
    assert linear_here(imagenet_stem, "--data", images, *arguments) == 0
    out = capsys.readouterr().out
    result = json.loads(out.splitlines()[-1])
    assert [r["probe"] for r in result["results"]] == list(PRESETS[preset].probes) and result["size"] == 224
    batch, lr = PRESETS[preset].batch_size, PRESETS[preset].lr[0]
    words = f"warning: --lr {lr} of {preset} belongs to batch {batch} and is kept: for 15 the linear rule asks for --lr {lr * 15 / batch:g}"
    assert words in out


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
    assert linear_here(path, "--data", images, "--preset", preset, "--epochs", 1, "--batch-size", 16,
                       "--workers", 0) == 0
    result = record(capsys)
    assert [r["probe"] for r in result["results"]] == list(PRESETS[preset].probes) and result["arch"] == arch


def test_a_sobel_resnet50_of_reduced_width(images, tmp_path, capsys):
    torch.manual_seed(0)
    trunk = resnet50(width=0.125, sobel=True)
    path = export(tmp_path / "b.pt", trunk, arch="resnet50", stem="imagenet", sobel=True, resize=256,
                  size=224, method="deepcluster")
    options = ("--preset", "mhead_90e", "--epochs", 1, "--workers", 0, "--layers", "feature1", "feature5")
    assert linear_here(path, "--data", images, *options, "--batch-size", 16, "--lr", 0.01) == 0
    assert record(capsys)["arch"] == "resnet50"


def test_drops_move_with_the_number_of_epochs():
    args = eval_linear.arguments(["x", "--preset", "avgpool_100e", "--epochs", "10"])
    p = eval_linear.choose(args)
    assert [p.schedule(p, epoch, epoch * 3, 30,
                       0) for epoch in range(10)] == pytest.approx([30] * 6 + [3] * 2 + [0.3] * 2)


def test_images_that_cannot_be_read(images, run, tmp_path, capsys):
    for path in images.glob("*/*/*.png"):
        target = tmp_path / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (tmp_path / "train" / "red" / "0.png").write_text("no image")
    (tmp_path / "val" / "red" / "0.png").write_text("no image")
    assert linear_here(run, "--data", tmp_path, "--workers", 0, "--epochs", 1, "--batch-size", 7) == 0
    assert "warning: 1 images of --data cannot be read and are replaced by their neighbours" in capsys.readouterr().out
    assert linear_here(run, "--data", tmp_path, "--workers", 0, "--epochs", 1, "--batch-size", 7,
                       "--cache") == 0
    out = capsys.readouterr().out
    assert "1 images of --data cannot be read and are left out" in out and json.loads(
        out.splitlines()[-1])["train"] == 28


def test_errors(tmp_path, images, run, imagenet_stem, capsys):
    lone = tmp_path / "lone"
    for split in ("train", "val"):
        (lone / split / "a").mkdir(parents=True)
        Image.new("RGB", (20, 20), (5 * len(split), 0, 0)).save(lone / split / "a" / f"{split}.png")
    x = np.zeros((4, 3), np.float32)
    good = dict(train_features=x, train_labels=np.arange(4), val_features=x, val_labels=np.arange(4))
    for name, change in (
        ("label", dict(val_labels=np.array([0, 1, 2, 7]))),
        ("width", dict(val_features=np.zeros((4, 2)))),
        ("length", dict(train_labels=np.arange(3))),
        ("words", dict(train_labels=np.array(["a", "b", "c", "d"]))),
        ("objects", dict(train_features=np.array([[1], None, 2, 3], dtype=object))),
        ("column", dict(train_features=np.asfortranarray(np.ones((4, 3))))),
    ):
        np.savez(tmp_path / f"{name}.npz", **{**good, **change})
    np.savez(tmp_path / "few.npz", train_features=x)
    (tmp_path / "page.npz").write_text("<html>")
    own = (run, "--data", images)
    for arguments, code, words in (
        ((tmp_path / "none.pt", "--data", images), 4, "none.pt does not exist"),
        ((run,), 2, "--data is needed"),
        ((*own, "--preset", "mhead_90e"), 2, "feature1 is defined on a map of 112x112"),
        ((imagenet_stem, "--data", images, "--preset", "mhead_90e", "--size", 96), 2, "feature1 is defined "
                                                                                      "on a map of 112x112"),
        ((imagenet_stem, "--data", images, "--preset", "sela_alexnet_36e"), 2, "conv2_max needs a trunk with "
                                                                               "a map 'conv2'"),
        ((*own, "--preset", "mhead"), 2, "invalid choice: 'mhead'"),
        ((*own, "--batch-size", 1), 2, "--batch-size 1: at least 2"),
        ((*own, "--save-features", tmp_path / "no" / "f.npz"), 2, "a folder that can be written"),
        ((*own, "--save-features", tmp_path / "features"), 2, "an .npz file"),
        ((*own, "--epochs", 4, "--lr", "1e38"), 5, "every classifier"),
        ((*own, "--preset", "mhead_90e", "--cache"), 2, "cached features are those of avgpool"),
        ((*own, "--layers", "feature5"), 2,
         "--layers feature5 is not in --preset small: choose from avgpool"),
        ((*own, "--size", 30), 2, "--resize 24 is smaller than --size 30"),
        ((*own, "--epochs", 0), 2, "--epochs 0: more than 0 is needed"),
        ((*own, "--batch-size", -1), 2, "--batch-size -1: more than 0 is needed"),
        ((*own, "--lr", 0.1, "nan"), 2, "--lr 0.1 nan: more than 0 is needed"),
        ((*own, "--weight-decay", "-1"), 2, "--weight-decay -1.0: more than 0 is needed, of a weight decay 0 "
                                            "or more"),
        ((*own, "--seed", -1), 2, "--seed -1"),
        ((run, "--data", lone), 3, "1 labelled images are too few to train on"),
        ((run, "--data", images / "train" / "red"), 3, "has no val/ folder"),
        ((tmp_path / "none.npz",), 3, "none.npz cannot be read: No such file"),
        ((tmp_path / "page.npz",), 3, "page.npz is no file of features"),
        ((tmp_path / "few.npz",), 3, "few.npz is no file of features: train_features (N, D)"),
        ((tmp_path / "label.npz",), 3,
         "label 7 of the features to classify is not among the training labels"),
        ((tmp_path / "width.npz",), 3, "of one D for train and val: found (4, 3), (4, 2), (4,), (4,)"),
        ((tmp_path / "length.npz",), 3, "found (4, 3), (4, 3), (3,), (4,)"),
        ((tmp_path / "words.npz",), 3, "train_labels holds no rows of numbers"),
        ((tmp_path / "objects.npz",), 3, "train_features holds no rows of numbers"),
        ((tmp_path / "column.npz",), 3, "train_features holds no rows of numbers"),
        ((tmp_path / "label.npz", "--data", images), 2, "--data needs a trunk"),
        ((tmp_path / "label.npz", "--random-init"), 2, "--random-init needs a trunk"),
    ):
        assert linear_here(*arguments, "--workers", 0) == code, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error
