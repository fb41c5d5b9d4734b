"""eval_knn.py from the outside: what a user types, and what comes out."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import torchvision
from helpers import ROOT, finish, start, swav_here
from PIL import Image

import eval_knn
from common import weights
from common.engine import checkpoint
from common.engine.launch import launch
from common.features import knn_accuracy
from common.features import knn_classify as classify
from common.multicrop import MEAN, STD, center
from common.resnet import resnet10

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}


def knn_here(*arguments):
    """Runs the command in this process; returns its exit code."""
    try:
        launch(eval_knn.main, eval_knn.arguments([str(a) for a in arguments]))
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three colours under noise: 30 images that vote; 7 to classify, of two of the colours."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, counts in {"train": (12, 10, 8), "val": (4, 0, 3)}.items():
        for (name, colour), count in zip(COLOURS.items(), counts):
            for i in range(count):
                (root / split / name).mkdir(parents=True, exist_ok=True)
                pixels = np.clip(rng.normal(colour, 40, (40, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp("trunk") / "backbone.pt"
    torch.manual_seed(3)
    info = dict(arch="resnet10", width=0.125, stem="small", channels=3, mean=MEAN, std=STD, method="swav",
                resize=24, size=20, epoch=5)
    checkpoint.export_backbone(path, resnet10(width=0.125, stem="small"), info)
    return path


def test_seven_images_of_three_classes(images, backbone, capsys):
    assert knn_here(backbone, "--data", images, "--workers", 0, "--k", 1, 5, 30, 31, 200, "--precision",
                    "float32") == 0
    *table, last = capsys.readouterr().out.splitlines()
    record = json.loads(last)
    assert (record["bank"], record["queries"], record["classes"], record["method"],
            record["epoch"]) == (30, 7, 3, "swav", 5)
    # fewer than five classes: no top-5
    assert list(record["top1"]) == ["1", "5", "30"] and record["top5"] == {}
    assert "   31    skipped: only 30 images can vote" in table and any(line.startswith("  200    skipped")
                                                                        for line in table)
    # The same from the parts, one image after the other.
    trunk, _ = weights.load_backbone(backbone)
    rows = {}
    for split in ("train", "val"):
        x, y = [], []
        for path in sorted((images / split).glob("*/*.png")):
            pixels = center(Image.open(path), 24, 20).float() / 255
            x.append(trunk.eval()(torch.stack([(p - m) / s for p, m,
                                               s in zip(pixels, MEAN, STD)])[None])[0].detach())
            y.append(sorted(COLOURS).index(path.parent.name))
        rows[split] = torch.stack(x), torch.tensor(y)
    expected = knn_accuracy(*rows["train"], *rows["val"], [1, 5, 30])
    assert {int(k): value for k, value in record["top1"].items()} == {k: pytest.approx(v, abs=1e-3)
                                                                      for k, (v, _) in expected.items()}
    assert record["top1"]["1"] > 50
    for k, value in record["top1"].items():
        assert f"{k:>5}  {value:7.2f}        -" in table


def test_a_run_is_evaluated_on_its_own_data(tmp_path, capsys):
    out = tmp_path / "run"
    tiny = "--width 0.125 --hidden 16 --dim 8 --prototypes 12 --batch-size 16 --workers 0 --max-steps 1".split()
    assert swav_here("--data", "shapes:100", *tiny, "--out", out) == 0
    capsys.readouterr()
    assert knn_here(out, "--workers", 0) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["trunk"], record["method"], record["bank"], record["queries"],
            record["classes"]) == (str(out), "swav", 100, 20, 10)
    assert list(record["top1"]) == list(record["top5"]) == ["10", "20", "100"]
    assert knn_here(out / "backbone.pt", "--data", "shapes:100", "--workers", 0) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["top1"] == record["top1"]
    assert knn_here(out, "--workers", 0, "--random-init") == 0
    random = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert random["method"] == "random weights" and random["top1"] != record["top1"]


def test_a_torchvision_file(tmp_path, images, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    assert knn_here(tmp_path / "resnet18.pth", "--data", images, "--size", 32, "--resize", 32, "--workers", 0,
                    "--k", 3) == 0
    out = capsys.readouterr().out
    assert "resnet18 x1, torchvision, 512 features of 32 px" in out and list(
        json.loads(out.splitlines()[-1])["top1"]) == ["3"]


def test_two_processes_find_what_one_finds(images, backbone, capsys):
    arguments = [str(a) for a in (backbone, "--data", images, "--workers", 0, "--k", 1, 7, "--precision",
                                  "float32")]
    assert knn_here(*arguments) == 0
    one = json.loads(capsys.readouterr().out.splitlines()[-1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    code, out, err = finish(start(*torchrun, str(ROOT / "eval_knn.py"), *arguments))
    assert code == 0, err
    assert [json.loads(line) for line in out.splitlines() if line.startswith("{")] == [one]


def test_unreadable_images_are_said_and_left_out(tmp_path, backbone, capsys):
    for split, count in (("train", 6), ("val", 3)):
        for i in range(count):
            (tmp_path / split / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (20, 20), (i * 30, 0, 0)).save(tmp_path / split / "ab"[i % 2] / f"{i}.png")
    (tmp_path / "train" / "a" / "0.png").write_text("no image")
    assert knn_here(backbone, "--data", tmp_path, "--workers", 0, "--k", 5, 6) == 0
    out = capsys.readouterr().out
    assert "warning: 1 images of --data cannot be read and are left out" in out
    assert list(json.loads(out.splitlines()[-1])["top1"]) == [
        "5"] and "    6    skipped: only 5 images can vote" in out


def test_errors(tmp_path, images, backbone, capsys):
    (tmp_path / "other" / "val" / "emu").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "other" / "val" / "emu" / "1.png")
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "other.pt")
    wrong = torch.load(backbone, weights_only=True)
    del wrong["state_dict"]["layer3.0.bn2.weight"]
    torch.save(wrong, tmp_path / "incomplete.pt")
    for arguments, code, words in (
        ((tmp_path / "none.pt", "--data", images), 4, "none.pt does not exist"),
        ((tmp_path, "--data", images), 4, "backbone.pt does not exist"),
        ((tmp_path / "page.pt", "--data", images), 4, "page.pt cannot be loaded"),
        ((tmp_path / "other.pt", "--data", images), 4,
         "is no checkpoint that is known: it holds some.weight"),
        ((tmp_path / "incomplete.pt", "--data", images), 4, "missing ['layer3.0.bn2.weight']"),
        ((backbone,), 2, "--data is needed"),
        ((backbone, "--data", tmp_path / "nothing"), 3, "nothing does not exist"),
        ((backbone, "--data", images / "train"), 3, "has no val/ folder"),
        ((backbone, "--data", images / "train" / "red"), 3, "has no val/ folder"),
        ((backbone, "--data", images, "--val", tmp_path / "other" / "val"), 3, "class 'emu'"),
        ((backbone, "--data", "shapes:50", "--val", images / "train"), 3, "is not among the 10 classes"),
        ((backbone, "--data", images / "train", "--val", images / "train"), 3, "are the same images"),
        ((backbone, "--data", images, "--k", 0), 2, "more than 0 is needed"),
        ((backbone, "--data", images, "--temperature", "nan"), 2, "more than 0 is needed"),
        ((backbone, "--data", images, "--size", -4), 2, "0 or more is needed"),
        ((backbone, "--data", images, "--K", 5), 2, "unrecognized arguments"),
    ):
        assert knn_here(*arguments, "--workers", 0) == code, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error


@pytest.mark.parametrize("content", [{"state_dict": {}, "info": {"arch": "resnet10"}}, {
    "state_dict": {}, "info": {"arch": "vit", "width": 1, "stem": "small"}}, {
        "state_dict": {}, "info": "resnet10"}, {"state_dict": 5}, {"conv1.weight": torch.zeros(
            3), "layer4.0.conv1.weight": torch.zeros(3)}, {1: torch.zeros(3), "b": torch.zeros(3)}, [1, 2]])
def test_odd_files_are_refused_in_one_line(tmp_path, capsys, content):
    torch.save(content, tmp_path / "odd.pt")
    assert knn_here(tmp_path / "odd.pt", "--data", "shapes:50") == 4
    error = capsys.readouterr().err
    assert re.match("error: .*odd.pt (is no checkpoint that is known|has conv1.weight of shape)",
                    error), error
    assert error.count("\n") == 1


def test_the_val_split_of_a_set_named_by_val_is_taken(backbone, capsys):
    assert knn_here(backbone, "--data", "shapes:50", "--val", "shapes:100", "--workers", 0, "--k", 5) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (record["bank"], record["queries"]) == (50, 20)


def test_classify_is_part_of_the_module():
    assert eval_knn.classify is classify
