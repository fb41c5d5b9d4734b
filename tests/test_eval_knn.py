"""eval_knn.py from the outside: what a user types, and what comes out."""

import json
import re
import sys

import pytest
import torch
import torchvision
from evaluations import COLOURS, CPU, colour_tree, evaluate, export, refuses, run_here
from helpers import ROOT, finish, start, swav_here
from PIL import Image

import eval_cluster
import eval_knn
import eval_linear
import eval_semisup
import eval_svm
from common import weights
from common.features import knn_accuracy
from common.features import knn_classify as classify
from common.multicrop import MEAN, STD, center
from common.resnet import resnet10


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """30 images that vote; 7 to classify, of two of the three colours."""
    return colour_tree(tmp_path_factory.mktemp("images"), train=(12, 10, 8), val=(4, 0, 3))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return export(tmp_path_factory.mktemp("trunk") / "backbone.pt")


def test_seven_images_of_three_classes(images, backbone, capsys):
    record, out = evaluate(capsys, eval_knn, backbone, "--data", images, *CPU, "--k", 1, 5, 30, 31, 200)
    assert [record[key] for key in ("bank", "queries", "classes", "method", "epoch")] == [30, 7, 3, "swav", 5]
    # fewer than five classes: no top-5
    assert list(record["top1"]) == ["1", "5", "30"] and record["top5"] == {}
    assert "\n   31    skipped: only 30 images can vote\n" in out and "\n  200    skipped" in out
    # The same from the parts, one image after the other.
    trunk, _ = weights.load_backbone(backbone)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    rows = {}
    for split in ("train", "val"):
        paths = sorted((images / split).glob("*/*.png"))
        x = [(center(Image.open(path), 24, 20).float() / 255 - mean) / std for path in paths]
        with torch.no_grad():
            features = torch.cat([trunk.eval()(image[None]) for image in x])
        rows[split] = features, torch.tensor([sorted(COLOURS).index(path.parent.name) for path in paths])
    expected = knn_accuracy(*rows["train"], *rows["val"], [1, 5, 30])
    for k, value in record["top1"].items():
        assert value == pytest.approx(expected[int(k)][0], abs=1e-3)
        assert f"{k:>5}  {value:7.2f}        -\n" in out
    assert record["top1"]["1"] > 50
    sharp, _ = evaluate(capsys, eval_knn, backbone, "--data", images, *CPU, "--k", 30, "--temperature", 1e-5)
    assert sharp["top1"]["30"] == record["top1"]["1"] != record["top1"]["30"]  # the nearest decides


def test_a_run_is_evaluated_on_its_own_data(tmp_path, capsys):
    run = tmp_path / "run"
    tiny = "--width 0.125 --hidden 16 --dim 8 --prototypes 12 --batch-size 16 --workers 0".split()
    assert swav_here("--data", "shapes:100", *tiny, "--max-steps", 1, "--out", run) == 0
    record, _ = evaluate(capsys, eval_knn, run, "--workers", 0)
    wanted = {"trunk": str(run), "method": "swav", "bank": 100, "queries": 20, "classes": 10}
    assert {key: record[key] for key in wanted} == wanted
    assert list(record["top1"]) == list(record["top5"]) == ["10", "20", "100"]
    assert json.loads((run / "eval_knn.json").read_text()) == record
    same, _ = evaluate(capsys, eval_knn, run / "backbone.pt", "--data", "shapes:100", "--workers", 0)
    assert same["top1"] == record["top1"]
    random, _ = evaluate(capsys, eval_knn, run, "--workers", 0, "--random-init")
    assert random["method"] == "random weights" and random["top1"] != record["top1"]
    assert json.loads((run / "eval_knn_random.json").read_text()) == random


def test_a_torchvision_file(tmp_path, images, capsys):
    torch.save(torchvision.models.resnet18().state_dict(), tmp_path / "resnet18.pth")
    record, out = evaluate(capsys, eval_knn, tmp_path / "resnet18.pth", "--data", images, "--size", 32,
                           "--resize", 32, "--workers", 0, "--k", 3)
    assert "resnet18 x1, torchvision, 512 features of 32 px" in out
    assert list(record["top1"]) == ["3"]


def test_two_processes_find_what_one_finds(images, backbone, capsys):
    arguments = [str(a) for a in (backbone, "--data", images, *CPU, "--k", 1, 7)]
    one, _ = evaluate(capsys, eval_knn, *arguments)
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
    record, out = evaluate(capsys, eval_knn, backbone, "--data", tmp_path, "--workers", 0, "--k", 5, 6)
    assert "warning: 1 images of --data cannot be read and are left out" in out
    assert list(record["top1"]) == ["5"] and "    6    skipped: only 5 images can vote" in out


def test_errors(tmp_path, images, backbone, capsys):
    (tmp_path / "other" / "val" / "emu").mkdir(parents=True)
    Image.new("RGB", (20, 20)).save(tmp_path / "other" / "val" / "emu" / "1.png")
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    torch.save({"some.weight": torch.zeros(2)}, tmp_path / "other.pt")
    wrong = torch.load(backbone, weights_only=True)
    del wrong["state_dict"]["layer3.0.bn2.weight"]
    torch.save(wrong, tmp_path / "incomplete.pt")
    own, train = (backbone, "--data", images), images / "train"
    refuses(capsys, eval_knn, (
        ((tmp_path / "none.pt", "--data", images), 4, "none.pt does not exist"),
        ((tmp_path, "--data", images), 4, "backbone.pt does not exist"),
        ((tmp_path / "page.pt", "--data", images), 4, "page.pt cannot be loaded"),
        ((tmp_path / "other.pt", "--data", images), 4, "no checkpoint that is known: it holds some.weight"),
        ((tmp_path / "incomplete.pt", "--data", images), 4, "missing ['layer3.0.bn2.weight']"),
        ((backbone,), 2, "--data is needed"),
        ((backbone, "--data", tmp_path / "nothing"), 3, "nothing does not exist"),
        ((backbone, "--data", train), 3, "has no val/ folder"),
        ((backbone, "--data", train / "red"), 3, "has no val/ folder"),
        ((*own, "--val", tmp_path / "other" / "val"), 3, "class 'emu'"),
        ((backbone, "--data", "shapes:50", "--val", train), 3, "is not among the 10 classes"),
        ((backbone, "--data", train, "--val", train), 3, "are the same images"),
        ((*own, "--k", 0), 2, "more than 0 is needed"),
        ((*own, "--temperature", "nan"), 2, "more than 0 is needed"),
        ((*own, "--size", -4), 2, "0 or more is needed"),
        ((*own, "--size", 30), 2, "--resize 24 is smaller than --size 30"),
        ((*own, "--resize", 16), 2, "--resize 16 is smaller than --size 20"),
        ((*own, "--K", 5), 2, "unrecognized arguments"),
    ))


@pytest.mark.parametrize("script", [eval_knn, eval_cluster, eval_linear, eval_semisup, eval_svm])
def test_a_trunk_whose_features_overflow_is_blamed_itself(tmp_path, images, capsys, script):
    trunk = resnet10(width=0.125, stem="small")
    trunk.layer4[0].bn2.weight.data.fill_(3e38)
    more = ("--kmeans", 3) if script is eval_cluster else ()
    path = export(tmp_path / "backbone.pt", trunk)
    refuses(capsys, script, [((path, "--data", images, *more), 4,
                              "backbone.pt gives features that are not finite: its weights have run away")])


@pytest.mark.parametrize("content", [
    {"state_dict": {}, "info": {"arch": "resnet10"}},
    {"state_dict": {}, "info": {"arch": "vit", "width": 1, "stem": "small"}},
    {"state_dict": {}, "info": "resnet10"}, {"state_dict": 5},
    {"conv1.weight": torch.zeros(3), "layer4.0.conv1.weight": torch.zeros(3)},
    {1: torch.zeros(3), "b": torch.zeros(3)}, [1, 2]])
def test_odd_files_are_refused_in_one_line(tmp_path, capsys, content):
    torch.save(content, tmp_path / "odd.pt")
    assert run_here(eval_knn, tmp_path / "odd.pt", "--data", "shapes:50") == 4
    error = capsys.readouterr().err
    pattern = "error: .*odd.pt (is no checkpoint that is known|has conv1.weight of shape)"
    assert re.match(pattern, error) and error.count("\n") == 1, error


def test_the_val_split_of_a_set_named_by_val_is_taken(backbone, capsys):
    record, _ = evaluate(capsys, eval_knn, backbone, "--data", "shapes:50", "--val", "shapes:100",
                         "--workers", 0, "--k", 5)
    assert (record["bank"], record["queries"]) == (50, 20)


def test_classify_is_part_of_the_module():
    assert eval_knn.classify is classify
