"""eval_semisup.py: the draw, the protocols, fine-tuning on one rank and on two, and what a user types."""

import json
import re
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from evaluations import CPU, Killed, evaluate, export, goes_on_after_kills, refuses, run_here
from helpers import image_tree, ranks
from torch import nn

import eval_semisup
from common import data, distributed
from common.engine.errors import Diverged
from common.evaluation.classifier import load_classifier
from common.evaluation.metrics import accuracy
from common.evaluation.progress import Progress
from common.evaluation.protocol import Subset
from common.features import extract
from common.multicrop import MEAN, STD, Augmentation, MultiCrop
from common.resnet import resnet10, resnet50
from common.sources.shapes import Shapes
from eval_semisup import PRESETS, Model, Preset, draw, finetune


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return export(tmp_path_factory.mktemp("trunk") / "backbone.pt", resize=16, size=16)


def progress_of(folder):
    return Progress(folder, "", {}, 10, fresh=True)


# ---- the draw


def test_a_draw_is_a_share_of_each_class_and_a_function_of_the_seed():
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 4 + [-1] * 20 + [4] * 19)[torch.randperm(123)]
    rows = draw(labels, 0.1, 7)
    assert sorted(rows) == list(rows) and len(set(rows)) == len(rows)
    # to the nearest number, one at least; none without a label
    assert labels[torch.from_numpy(rows)].bincount().tolist() == [5, 3, 1, 0, 2]
    assert list(rows) == list(draw(labels, 0.1, 7)) != list(draw(labels, 0.1, 8))
    assert sorted(draw(labels, 1, 0)) == (labels >= 0).nonzero()[:, 0].tolist()
    assert len(draw(torch.tensor([-1, -1]), 1, 0)) == 0
    # A class's draw does not depend on the other classes.
    alone = torch.where(labels == 1, labels, -1)
    assert set(draw(alone, 0.1, 7)) == {row for row in rows if labels[row] == 1}


# ---- the protocols


def test_presets_are_the_published_protocols():
    grid, heads = (0.001, 0.01, 0.1), (1, 10, 100)
    published = {
        "openselfsup_1": (0.01, 256, 20, (12, 16), 0.2, grid, heads, 5e-4, False, 0.01, False),
        "openselfsup_10": (0.1, 256, 20, (12, 16), 0.2, grid, heads, 1e-4, False, 0.01, False),
        "swav_1": (0.01, 256, 20, (12, 16), 0.2, (0.02,), (250,), 0, False, 0, False),
        "swav_10": (0.1, 256, 20, (12, 16), 0.2, (0.01,), (20,), 0, False, 0, False),
        "vissl_1": (0.01, 256, 70, (30,), 0.1, (0.05,), (1,), 0, True, 0, True),
        "vissl_10": (0.1, 256, 70, (30,), 0.1, (0.05,), (1,), 0, True, 0, True),
    }
    names = "fraction batch_size epochs drops gamma lrs heads weight_decay nesterov head_std linear_rule"
    assert set(PRESETS) == {*published, "small"}
    for name, values in published.items():
        assert tuple(getattr(PRESETS[name], key) for key in names.split()) == values, name


@pytest.mark.parametrize("name, lr, head, expected", [
    ("swav_10", 0.01, 20, [(0.01, 0.2)] * 12 + [(0.002, 0.04)] * 4 + [(0.0004, 0.008)] * 4),
    ("swav_1", 0.02, 250, [(0.02, 5.0)] * 12 + [(0.004, 1.0)] * 4 + [(0.0008, 0.2)] * 4),
    ("openselfsup_1", 0.1, 100, [(0.1, 10.0)] * 12 + [(0.02, 2.0)] * 4 + [(0.004, 0.4)] * 4),
    ("vissl_10", 0.05, 1, [(0.05, 0.05)] * 30 + [(0.005, 0.005)] * 40)])
def test_whole_schedules(monkeypatch, name, lr, head, expected, tmp_path):
    seen, p = [], PRESETS[name]

    def epoch(net, optimizer, *arguments):
        seen.append(tuple(group["lr"] for group in optimizer.param_groups))
        for group in optimizer.param_groups:
            assert group["momentum"] == 0.9 and group["nesterov"] == p.nesterov
            assert group["weight_decay"] == p.weight_decay
        trunk, top = ([id(x) for x in group["params"]] for group in optimizer.param_groups)
        assert trunk == [id(x) for x in net.backbone.parameters()]
        assert top == [id(x) for x in net.fc.parameters()]
        return 1.0

    monkeypatch.setattr(eval_semisup, "train_one_epoch", epoch)
    monkeypatch.setattr(eval_semisup, "extract", lambda *a, **k: (torch.eye(6), torch.arange(6)))
    model = Model(resnet10(width=0.125), 6, p.head_std)
    loader, images = data.Loader([]), Subset(Shapes("train", 20), draw(torch.arange(20) % 10, 1, 0))
    setting = {"lr": lr, "head": head, "top1": []}
    history = list(finetune(model, setting, p, loader, images, None, 0, {}, progress_of(tmp_path), {}))
    assert history == [(1.0, 100.0, 100.0)] * p.epochs
    assert [pytest.approx(pair, rel=1e-12) for pair in expected] == seen


def test_the_head_starts_as_the_protocol_says():
    torch.manual_seed(0)
    ours = Model(resnet10(), 100, 0.01).fc
    assert ours.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert ours.weight.shape == (100, 512) and not ours.bias.any()
    default = Model(resnet10(), 100, 0.0).fc
    assert default.weight.abs().max().item() == pytest.approx(512**-0.5, rel=0.01) and default.bias.any()


def test_rates_follow_the_batch_where_the_protocol_says_so(capsys):
    def resolved(*arguments):
        return eval_semisup.resolve(eval_semisup.arguments(["trunk", *arguments]))

    p, warning = resolved("--preset", "vissl_1", "--batch-size", "2048")
    assert p.lrs == (0.4,) and warning is None
    p, warning = resolved("--preset", "openselfsup_10", "--batch-size", "2048", "--epochs", "5")
    assert p.lrs == (0.001, 0.01, 0.1)
    assert warning.endswith("for 2048 the linear rule asks for --lr 0.008 0.08 0.8")
    assert (p.epochs, p.drops) == (5, (3, 4))
    p, warning = resolved("--preset", "swav_1", "--batch-size", "64", "--lr", "0.3", "--head", "2", "3")
    assert (p.lrs, p.heads, p.batch_size, warning) == ((0.3,), (2.0, 3.0), 64, None)


def test_settings_have_the_names_of_the_benchmark():
    names = [eval_semisup.exponent(x) for x in (0.01, 0.001, 0.1, 0.02, 0.015, 1, 25)]
    assert names == "1e-2 1e-3 1e-1 2e-2 1.5e-2 1e0 2.5e1".split()


def test_the_presets_are_listed_with_their_figures(capsys):
    assert run_here(eval_semisup, "--list-presets") == 0
    out = capsys.readouterr().out
    assert "ODC 58.15 / 82.55 (head10, 1e-1)" in out
    assert "1% of the labels, batch 256, lr 2e-2, head x250, 20 epochs, x0.2 after" in out
    assert all(name in out for name in PRESETS)


# ---- counts


def test_accuracy_counts_rows_once_and_leaves_out_those_without_a_label():
    scores = torch.tensor([[9.0, 5, 4, 3, 2, 1], [5, 9, 4, 3, 2, 1], [1, 5, 4, 3, 2, 9], [1, 2, 3, 4, 5, 6],
                           [0, 0, 0, 0, 0, torch.nan]])
    assert accuracy(scores, torch.tensor([0, 0, 0, -1, 5])) == (25.0, 50.0)
    assert accuracy(scores[:, :4], torch.tensor([0, 0, 0, -1, 3])) == (25.0, None)  # four classes: no top-5


# ---- training


def tune(p, dtype=torch.float64):
    """Losses, accuracies and weights of a small fine-tuning: 23 images of 60, judged on 12, on all ranks."""
    everything, queries = Shapes("train", 60), Shapes("val", 60)
    everything.classes = queries.classes = everything.classes[:6]
    everything.labels, queries.labels = everything.labels % 6, queries.labels % 6
    images = Subset(everything, draw(everything.labels, 0.39, 1)[:23])
    loader = data.Loader(eval_semisup.training_crops(images, 16, 1))
    how = dict(resize=16, size=16, device=torch.device("cpu"), mean=MEAN, std=STD, batch_size=5, workers=0,
               precision=torch.float32)
    torch.manual_seed(1)
    model = Model(resnet10(width=0.125, stem="small"), 6, p.head_std).to(dtype)
    setting = {"lr": 0.05, "head": 10, "top1": []}
    with tempfile.TemporaryDirectory() as folder:
        progress = progress_of(Path(folder))
        history = list(finetune(model, setting, p, loader, images, queries, 1, how, progress, {}))
    return len(images), history, model.state_dict()


SMALL = Preset("", 0.39, (0.05,), (10,), epochs=5, drops=(2, 4), batch_size=6, weight_decay=1e-4)


def test_two_ranks_equal_one():
    n, history, weights = tune(SMALL)
    assert n == 23 and len(history) == 5  # three steps of six an epoch, five images left out
    for _, other, state in ranks(2, tune, SMALL):
        assert [h[1:] for h in other] == [h[1:] for h in history]
        assert [h[0] for h in other] == pytest.approx([h[0] for h in history], rel=1e-9)
        for name, tensor in weights.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-7, atol=1e-9, msg=name)
    assert history[-1][0] < history[0][0] and len({h[1] for h in history}) > 1


def test_an_epoch_is_what_a_few_plain_lines_compute():
    _, history, weights = tune(SMALL)
    everything = Shapes("train", 60)
    rows = draw(everything.labels % 6, 0.39, 1)[:23]
    crops = MultiCrop(everything, (1,), (16,), ((0.08, 1.0),), Augmentation((0, 0, 0, 0), 0, 0, False, 0), 1)
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    torch.manual_seed(1)
    trunk, head = resnet10(width=0.125, stem="small").double(), nn.Linear(64, 6).double()
    parameters = [*trunk.parameters(), *head.parameters()]
    momentum = [torch.zeros_like(w) for w in parameters]
    for epoch in range(5):
        losses, rate = [], 0.05 * (1 if epoch < 2 else 0.2 if epoch < 4 else 0.04)
        for batch in data.batches(23, 6, epoch, 1, 0, 1):
            x = torch.stack([crops[epoch, position, int(rows[i])][1][0][0] for position, i in batch])
            x = (x.double() / 255 - mean) / std
            labels = torch.tensor([int(rows[i]) % 10 % 6 for _, i in batch])
            loss = nn.functional.cross_entropy(head(trunk.train()(x)), labels)
            losses.append(loss.item())
            for w, m, g in zip(parameters, momentum, torch.autograd.grad(loss, parameters)):
                m.mul_(0.9).add_(g + 1e-4 * w.detach())
                w.data -= rate * (10 if w is head.weight or w is head.bias else 1) * m
        assert history[epoch][0] == pytest.approx(sum(losses) / 3, rel=1e-9)
    torch.testing.assert_close(weights["backbone.layer4.0.bn2.running_var"],
                               trunk.state_dict()["layer4.0.bn2.running_var"], rtol=1e-5, atol=0)


def test_a_grid_on_embedded_images(backbone, capsys):
    grid = ("--lr", 0.02, 0.02, "--head", 1, 5, "--epochs", 3, "--batch-size", 20, "--fraction", 0.25)
    record, out = evaluate(capsys, eval_semisup, backbone, "--data", "shapes:400", *grid, "--seed", 4, *CPU)
    wanted = {"images": 100, "of": 400, "queries": 80, "classes": 10, "method": "swav"}
    assert {key: record[key] for key in wanted} == wanted
    assert "100 of 400 images, 0.25 of each class, drawn with seed 4: 10 to 10 of each of 10 classes" in out
    settings = record["settings"]
    assert [s["setting"] for s in settings] == ["head1, 2e-2", "head5, 2e-2"] * 2
    # each starts from the same trunk
    assert settings[:2] == settings[2:] and settings[0]["top1"] != settings[1]["top1"]
    for s in settings:
        assert len(s["top1"]) == len(s["top5"]) == 3 and all(a <= b for a, b in zip(s["top1"], s["top5"]))
        best = s["top1"].index(max(s["top1"]))
        last = f"{s['top1'][-1]:17.2f}{s['top5'][-1]:9.2f}"
        assert f"{s['setting']:16}  {last}{s['top1'][best]:21.2f}{s['top5'][best]:9.2f}{best + 1:8}" in out
    last = max(settings, key=lambda s: s["top1"][-1])
    assert record["best_setting"]["last"] == last["setting"]
    which = f"{last['setting']}, the best of 4 settings, chosen on the same images"
    assert f"{last['top1'][-1]:.2f} in the last epoch: {which}" in out
    assert "in the best epoch, chosen on the images it is reported for: " in out


FEW = ("--epochs", 1, "--lr", 0.01, "--head", 1, "--workers", 0)


def test_a_killed_grid_goes_on_and_keeps_its_best_network(tmp_path, backbone, monkeypatch, capsys):
    command = (backbone, "--data", "shapes:60", "--fraction", 0.5, "--epochs", 2, "--batch-size", 10, "--lr",
               0.05, 0.01, "--head", 1, 10, *CPU, "--out")
    whole, _ = evaluate(capsys, eval_semisup, *command, tmp_path / "whole")
    # two settings are done, the third is in its second epoch; while it is judged; in the first step
    found = goes_on_after_kills(monkeypatch, capsys, eval_semisup, *command, tmp_path / "killed",
                                kills=(1, 24, 27))
    assert found == whole and not list((tmp_path / "killed").glob("*progress*"))
    name = "eval_semisup_small_classifier.pt"
    networks = [load_classifier(tmp_path / folder / name) for folder in ("whole", "killed")]
    assert all(torch.equal(a, b) for a, b in zip(*(network.state_dict().values() for network in networks)))
    queries = Shapes("val", 60)
    labels = torch.tensor([i % 10 for i in range(12)])
    scores, _ = extract(networks[0], queries, 16, 16, torch.device("cpu"))
    best = max(setting["top1"][-1] for setting in whole["settings"])
    assert accuracy(scores, labels)[0] == pytest.approx(best, abs=1e-3)
    assert networks[0].classes == list(Shapes.classes)
    refuses(capsys, eval_semisup, [((*command, tmp_path / "new", "--fresh", "--epochs", 0), 2, "--epochs 0")])


def test_random_init_leaves_the_weights_out(backbone, capsys):
    command = (eval_semisup, backbone, "--data", "shapes:100", "--fraction", 0.5, *FEW)
    trained, first = evaluate(capsys, *command)
    random, second = evaluate(capsys, *command, "--random-init")
    assert [trained["method"], random["method"]] == ["swav", "random weights"]
    assert len(set(re.findall(r"loss (\S+) top-1", first + second))) == 2


def test_a_sobel_trunk_in_a_run_directory(tmp_path, capsys):
    trunk = resnet50(width=0.125, stem="small", sobel=True)
    export(tmp_path / "backbone.pt", trunk, arch="resnet50", sobel=True, method="deepcluster", size=16)
    (tmp_path / "config.json").write_text(json.dumps({"data": "shapes:100"}))
    record, _ = evaluate(capsys, eval_semisup, tmp_path, *FEW, "--fraction", 0.2, "--batch-size", 10)
    assert (record["method"], record["arch"], record["images"]) == ("deepcluster", "resnet50", 20)
    assert json.loads((tmp_path / "eval_semisup_small.json").read_text()) == record


def semisup_main(*arguments):
    eval_semisup.main(eval_semisup.arguments([str(a) for a in arguments]))


def killed_twice(*arguments):
    fetch, counts = Progress.fetch, []

    def killing(progress, *more):
        counts.append(0)
        if len(counts) in (3, 12):
            progress.save()
            raise Killed
        return fetch(progress, *more)

    with mock.patch.object(Progress, "fetch", killing):
        for _ in range(2):
            with pytest.raises(Killed):
                semisup_main(*arguments)
        semisup_main(*arguments)


def test_a_grid_on_two_ranks_goes_on_where_it_was_killed(tmp_path, backbone):
    words = (backbone, "--data", "shapes:60", "--fraction", 0.5, "--epochs", 2, "--batch-size", 10, "--lr",
             0.05, 0.01, "--head", 1, *CPU, "--out")
    ranks(2, semisup_main, *words, tmp_path / "whole")
    ranks(2, killed_twice, *words, tmp_path / "killed")
    records = [(tmp_path / name / "eval_semisup_small.json").read_text() for name in ("whole", "killed")]
    assert records[0] == records[1]


def test_a_list_is_taken_whole(tmp_path, backbone, capsys):
    root = image_tree(tmp_path, classes=3, images=5)
    (tmp_path / "some.txt").write_text("n01/0.JPEG n01\nn00/3.JPEG n00\nn02/1.JPEG n02\nn02/2.JPEG n02\n")
    command = (eval_semisup, backbone, "--data", tmp_path / "some.txt", "--root", root / "train",
               "--val", root / "val", *FEW, "--batch-size", 2)
    record, out = evaluate(capsys, *command)
    assert (record["images"], record["of"], record["queries"]) == (4, 4, 15)
    assert record["settings"][0]["top5"] == [None]
    assert "4 of 4 images, all that --data lists: 1 to 2 of each of 3 classes" in out
    assert evaluate(capsys, *command, "--fraction", 0.5)[0]["images"] == 3


def test_a_setting_that_diverges_is_said_and_the_others_go_on(backbone, capsys):
    command = (eval_semisup, backbone, "--data", "shapes:100", *FEW, "--epochs", 2, "--fraction", 0.5,
               "--batch-size", 10)
    record, out = evaluate(capsys, *command, "--lr", 1e30, 0.01)
    assert [len(s["top1"]) for s in record["settings"]] == [0, 2]
    assert record["best_setting"]["last"] == "head1, 1e-2"
    assert "head1, 1e30       diverged in epoch 1" in out
    assert run_here(*command, "--lr", 1e30) == 5
    assert "the loss of every setting is not finite" in capsys.readouterr().err


def test_a_setting_whose_features_are_not_finite_has_diverged(backbone, capsys, monkeypatch):
    def overflow(*arguments, **how):
        raise Diverged("features of images that can be read are not finite")

    monkeypatch.setattr(eval_semisup, "extract", overflow)
    assert run_here(eval_semisup, backbone, "--data", "shapes:100", *FEW, "--fraction", 0.5) == 5
    out, error = capsys.readouterr()
    assert "diverged in epoch 1" in out and "the loss of every setting is not finite" in error


def test_unreadable_images_are_replaced_and_said(tmp_path, backbone, capsys):
    root = image_tree(tmp_path, classes=2, images=6)
    (root / "train" / "n00" / "2.JPEG").write_text("no image")
    (root / "val" / "n01" / "3.JPEG").write_text("no image")
    _, out = evaluate(capsys, eval_semisup, backbone, "--data", root, *FEW, "--fraction", 1,
                      "--batch-size", 12)
    assert "warning: 1 images of --data cannot be read and were replaced by their neighbours" in out
    assert "warning: 1 images of the held-out set cannot be read and are left out" in out


def test_deterministic_is_on_by_itself(backbone, capsys, monkeypatch):
    command, seen = (eval_semisup, backbone, "--data", "shapes:50", *FEW, "--fraction", 1), []

    def epoch(*arguments):
        seen.append(torch.are_deterministic_algorithms_enabled())
        if seen[-1]:
            raise RuntimeError("some_backward_cuda does not have a deterministic implementation, but you set "
                               "'torch.use_deterministic_algorithms")
        return 1.0

    monkeypatch.setattr(eval_semisup, "train_one_epoch", epoch)
    assert run_here(*command) == 2
    error = capsys.readouterr().err
    assert "cannot be kept, --no-deterministic goes on without: some_backward_cuda" in error
    assert run_here(*command, "--no-deterministic") == 0 and seen == [True, False]


def test_errors(tmp_path, backbone, capsys):
    image_tree(tmp_path)
    (tmp_path / "flat").mkdir()
    (tmp_path / "train" / "n00" / "0.JPEG").rename(tmp_path / "flat" / "0.JPEG")
    own = (backbone, "--data", "shapes:50")
    refuses(capsys, eval_semisup, (
        ((*own, "--fraction", 0), 2, "--fraction 0: more than 0 and at most 1"),
        ((*own, "--fraction", 1.5), 2, "--fraction 1.5: more than 0 and at most 1"),
        ((*own, "--lr", 0.1, 0), 2, "--lr 0.1 0: more than 0"),
        ((*own, "--head", "nan"), 2, "--head nan: more than 0"),
        ((*own, "--epochs", 0), 2, "--epochs 0"),
        ((*own, "--size", 30), 2, "--resize 16 is smaller than --size 30"),
        ((*own, "--batch-size", 1), 2, "--batch-size 1"),
        ((*own, "--preset", "swav"), 2, "invalid choice: 'swav'"),
        (own, 3, "10 images are drawn of --data, fewer than one batch: --batch-size 50"),
        ((backbone, "--data", tmp_path / "flat", "--val", tmp_path / "val"), 3, "--data has no labels"),
        ((*own, "--val", tmp_path / "val"), 3, "n00"),
        ((backbone,), 2, "--data is needed"),
    ))
    assert distributed.world_size() == 1
