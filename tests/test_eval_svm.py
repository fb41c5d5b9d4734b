"""eval_svm.py: the metric, VOC's files, the protocol against a literal transcription, a user's commands."""

import contextlib
import io
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from evaluations import CPU, evaluate, export, refuses, run_here
from helpers import golden, ranks
from PIL import Image
from pretend_gpu import pretend_gpu
from torch import nn

import eval_svm
from common import weights
from common.alexnet import AlexNet
from common.multicrop import MEAN, STD, Warp
from common.resnet import resnet10
from common.weights import load
from eval_svm import COSTS, Voc, average_precision, draw, full, low_shot, unit

pytest.importorskip("sklearn")


# ---- the metric


def test_average_precision_equals_the_golden_numbers():
    g = {key: value.numpy() for key, value in golden("voc_ap").items()}
    for i in range(g["n_cases"]):
        for mode, name in (("all_points", "allpoint"), ("all_points", "allpoint_voc"), ("11point", "11point"),
                           ("sklearn_step", "sklearn")):
            found = average_precision(g[f"scores_{i}"], g[f"targets_{i}"], mode)
            assert found == pytest.approx(g[f"ap_{name}_{i}"], abs=1e-12)
    tied = average_precision(g["tie_scores"], g["tie_targets"], "sklearn_step")
    assert tied == pytest.approx(g["tie_ap_sklearn"], abs=1e-12)
    for mode, each, mean in (("all_points", "class_ap", "mean_ap"), ("11point", "class_ap11", "mean_ap11")):
        ap = [average_precision(s, t, mode) for s, t in zip(g["class_scores"].T, g["class_targets"].T)]
        np.testing.assert_allclose(ap, g[each], rtol=0, atol=1e-12)
        assert np.mean(ap) == pytest.approx(g[mean], abs=1e-12)
    np.testing.assert_allclose(unit(torch.from_numpy(g["norm_in"])), g["norm_out"], rtol=0, atol=1e-12)
    assert COSTS["openselfsup"][3:] == tuple(g["cost_list"][2:])


def test_average_precision_of_cases_done_by_hand():
    # positives at ranks 1, 3 and 4: precisions 1, 2/3, 3/4; the envelope lifts the second to 3/4
    scores, targets = [0.9, 0.8, 0.7, 0.6, 0.5], [1, 0, 1, 1, 0]
    assert average_precision(scores, targets) == pytest.approx((1 + 3 / 4 + 3 / 4) / 3)
    assert average_precision(scores, targets, "sklearn_step") == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    # recalls 1/3, 2/3, 1
    assert average_precision(scores, targets, "11point") == pytest.approx((4 * 1 + 7 * 3 / 4) / 11)
    more = torch.tensor([*scores, 1.0]), torch.tensor([*targets, -1])  # the last is left out
    assert average_precision(*more) == pytest.approx(2.5 / 3)
    # equal scores: the order of the rows, or all at once
    assert average_precision([4, 3, 2, 1], [0, 1, 0, 1]) == 0.5
    assert average_precision([1, 1, 1, 0], [0, 1, 0, 1]) == 0.5
    assert average_precision([1, 1, 1, 0], [0, 1, 0, 1], "sklearn_step") == pytest.approx((1 / 3 + 2 / 4) / 2)
    with pytest.raises(ValueError, match="a positive row"):
        average_precision([1.0, 2.0], [0, -1])
    with pytest.raises(ValueError, match="got 'area'"):
        average_precision([1.0], [1], "area")


# ---- VOC's files

COLOURS = {"cat": (200, 40, 40), "dog": (40, 200, 40), "owl": (40, 40, 200)}
EXAMPLE = "<annotation><filename>{}.jpg</filename>{}</annotation>"
OBJECT = ("<object><name>{}</name><difficult>{}</difficult><bndbox><xmin>1</xmin></bndbox>"
          "<part><name>head</name></part></object>")


@pytest.fixture(scope="module")
def voc2007(tmp_path_factory):
    """VOCdevkit with 46 images of trainval and 31 of test: halves of two colours, some objects difficult."""
    kit, rng = tmp_path_factory.mktemp("voc") / "VOCdevkit", np.random.default_rng(0)
    folder = kit / "VOC2007"
    for part in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (folder / part).mkdir(parents=True)
    numbers = rng.permutation(np.arange(1, 200))
    for split, ids in {"trainval": numbers[:46], "test": numbers[46:77]}.items():
        table = {name: [] for name in COLOURS}
        for i in ids:
            pixels, objects = np.zeros((30, 44, 3)), []
            for half in (slice(0, 22), slice(22, 44)):
                name = list(COLOURS)[rng.integers(3)] if rng.random() < 0.7 else None
                pixels[:, half] = rng.normal(COLOURS.get(name, (120, 120, 120)), 60, (30, 22, 3))
                objects += [(name, int(rng.random() < 0.2))] * (name is not None)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "JPEGImages" / f"{i:06d}.jpg")
            text = EXAMPLE.format(f"{i:06d}", "".join(OBJECT.format(*o) for o in objects))
            (folder / "Annotations" / f"{i:06d}.xml").write_text(text)
            for name in COLOURS:
                difficult = [d for other, d in objects if other == name]
                table[name].append((i, -1 if not difficult else int(0 in difficult)))
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{i:06d}\n" for i in ids))
        for name, lines in table.items():
            path = folder / "ImageSets" / "Main" / f"{name}_{split}.txt"
            path.write_text("".join(f"{i:06d} {value:2d}\n" for i, value in lines))
    return kit


def copy(voc2007, to):
    return shutil.copytree(voc2007, to / "VOCdevkit")


def test_class_files_and_annotations_say_the_same(voc2007, tmp_path):
    voc = Voc(voc2007)
    assert (len(voc), voc.trainval, voc.classes) == (77, 46, ["cat", "dog", "owl"])
    assert voc.names[:46] == sorted(voc.names[:46]) and voc.names[46:] == sorted(voc.names[46:])
    assert {-1, 0, 1} == set(voc.targets[:46].ravel()) == set(voc.targets[46:].ravel())
    text = (voc2007 / "VOC2007/ImageSets/Main/dog_test.txt").read_text()
    lines = dict(line.split() for line in text.splitlines())
    wanted = [{"1": 1, "-1": 0, "0": -1}[lines[name]] for name in voc.names[46:]]
    assert voc.targets[46:, 1].tolist() == wanted
    other = copy(voc2007, tmp_path) / "VOC2007"
    for path in (other / "ImageSets" / "Main").glob("*_*.txt"):
        path.unlink()
    without = Voc(other)
    assert without.names == voc.names and without.classes == voc.classes
    assert (without.targets == voc.targets).all()
    assert Voc(tmp_path).names == voc.names  # the folder above VOCdevkit
    assert voc.read(0).size == (44, 30)


def test_the_whole_image_is_made_square(voc2007):
    voc = Voc(voc2007)
    _, (crops,), params = Warp(voc, 20, 16)[0, 0, 3]
    assert crops.shape == (1, 3, 16, 16) and params[0, 4] == -1
    expected = voc.read(3).resize((29, 20), Image.BILINEAR).resize((16, 16), Image.BILINEAR)
    assert (crops[0].permute(1, 2, 0).numpy() == np.asarray(expected)).all()


# ---- the protocol


class Problem:
    """70 unit rows to train on and 50 to test, three classes with difficult rows."""

    classes, trainval = ("a", "b", "c"), 70

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.targets = rng.choice([1, 0, -1], (120, 3), p=[0.25, 0.6, 0.15])
        x = rng.normal(size=(120, 9)) + (self.targets == 1) @ rng.normal(size=(3, 9)) * 0.8
        self.x = unit(torch.from_numpy(x))


def literal_ap(scores, targets):
    scores, targets = scores[targets != -1], targets[targets != -1]
    hits = targets[sorted(range(len(scores)), key=lambda i: -scores[i])] == 1
    precision = [sum(hits[: i + 1]) / (i + 1) for i in range(len(hits))]
    return sum(max(precision[i:]) for i in range(len(hits)) if hits[i]) / sum(hits)


def literal_svm(cost):
    from sklearn.svm import LinearSVC

    return LinearSVC(penalty="l2", loss="squared_hinge", dual=True, tol=0.0001, C=cost, multi_class="ovr",
                     fit_intercept=True, intercept_scaling=1.0, class_weight={1: 2, -1: 1}, max_iter=2000,
                     random_state=0)


SOME = (0.5**10, 0.5**4, 1.0, 10.0)


def literal_cv(x, labels, cost):
    from sklearn.model_selection import cross_val_score

    return cross_val_score(literal_svm(cost), x, labels, cv=3, scoring="average_precision").mean()


def literal_test(x, labels, cost, p, c):
    """AP on the test rows of Problem p for class c."""
    return literal_ap(literal_svm(cost).fit(x, labels).decision_function(p.x[70:]), p.targets[70:, c])


def test_the_full_protocol_equals_a_literal_transcription():
    p, x = Problem(), Problem().x[:70]
    expected, costs, best = [], [], []
    for c in range(3):
        labels = p.targets[:70, c].copy()
        labels[labels == 0] = -1  # difficult ones are -1 already: negatives
        scores = [literal_cv(x, labels, cost) for cost in SOME]
        ap = [literal_test(x, labels, cost, p, c) for cost in SOME]
        for cost, score in zip(SOME, scores):
            ours = eval_svm.fit(x, slice(None), labels, p.x[70:], p.targets[70:, c], cost, "all_points")
            assert ours[0] == pytest.approx(score, rel=1e-12)
        expected.append(ap[int(np.argmax(scores))])
        costs.append(SOME[int(np.argmax(scores))])
        best.append(max(ap))
    for jobs in (1, 2):
        ap, chosen, oracle, stopped = full(p.x, p, SOME, "all_points", jobs, "")
        np.testing.assert_allclose(ap, expected, rtol=1e-12)
        np.testing.assert_allclose(oracle, best, rtol=1e-12)
        assert chosen == costs and len(set(costs)) > 1 and list(oracle) != list(ap) and stopped == 0


def test_low_shot_equals_a_literal_transcription():
    p = Problem()
    p.targets[:, :] = np.random.default_rng(1).choice([1, 0, -1], (120, 3), p=[0.1, 0.8, 0.1])

    def subset(k, sample, c):
        rows = draw(p.targets[:70, c], k, 5, sample, c)
        return p.x[rows], np.where(p.targets[rows, c] == 1, 1, -1)

    for k in (1, 2):
        by_cost, chosen, _ = low_shot(p.x, p, SOME, "all_points", k, 3, 5, 1, "")
        assert by_cost.shape == (3, 4) and chosen.shape == (3,)
        for sample in range(3):
            for j, cost in enumerate(SOME):
                ap = [literal_test(*subset(k, sample, c), cost, p, c) for c in range(3)]
                assert by_cost[sample, j] == pytest.approx(np.mean(ap), rel=1e-12)
        np.testing.assert_allclose(chosen, by_cost[:, 2])  # too few for three folds: the cost 1
    # Three positive rows and more: each SVM's cost by cross-validation on the rows it was given.
    p.targets[:70, :] = 0
    p.targets[:5] = 1
    by_cost, chosen, _ = low_shot(p.x, p, SOME, "all_points", 3, 1, 5, 1, "")
    ap = []
    for c in range(3):
        scores = [literal_cv(*subset(3, 0, c), cost) for cost in SOME]
        ap.append(literal_test(*subset(3, 0, c), SOME[int(np.argmax(scores))], p, c))
    assert chosen[0] == pytest.approx(np.mean(ap), rel=1e-12)


def test_the_svm_is_the_one_of_the_objective():
    """1/2 (|w|^2 + b^2) + C sum of a_i max(0, 1 - y_i (w x_i + b))^2, a = 2 for positives, is flat there."""
    p = Problem()
    y = np.where(p.targets[:70, 0] == 1, 1, -1)
    svm = eval_svm.train(p.x[:70], y, 2.0)
    w = torch.tensor(np.append(svm.coef_[0], svm.intercept_), requires_grad=True)
    x, y = torch.tensor(np.hstack([p.x[:70], np.ones((70, 1))])), torch.tensor(y)
    objective = w @ w / 2 + 2.0 * ((1 + (y == 1)) * (1 - y * (x @ w)).clamp(min=0) ** 2).sum()
    objective.backward()
    assert w.grad.abs().max() < 1e-2 and w.abs().max() > 0.3


def test_a_draw_has_k_positive_and_19_k_negative_images():
    targets = np.random.default_rng(0).permutation(np.repeat([1, 0, -1], [12, 300, 30]))
    for k in (1, 4, 12):
        rows = draw(targets, k, 0, 2, 3)
        assert list(rows) == sorted(set(rows))
        assert np.bincount(targets[rows] + 1, minlength=3).tolist() == [0, 19 * k, k]
        assert list(rows) == list(draw(targets, k, 0, 2, 3))
    assert len({tuple(draw(targets, 4, *key)) for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4


# ---- a user's command


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return export(tmp_path_factory.mktemp("trunk") / "backbone.pt", resize=16, size=16)


ONE = ("--costs", 1, "--workers", 0, "--jobs", 1)


def test_voc_end_to_end(voc2007, backbone, capsys):
    protocols = ("--protocol", "full", "low-shot", "--shots", 1, 2, 40, "--samples", 2)
    record, out = evaluate(capsys, eval_svm, backbone, "--data", voc2007, "--costs", 0.1, 1, 10,
                           "--layers", "avgpool", "--jobs", 1, *CPU, *protocols)
    wanted = {"trainval": 46, "test": 31, "classes": ["cat", "dog", "owl"], "method": "swav"}
    assert {key: record[key] for key in wanted} == wanted
    f = record["full"]["avgpool"]
    assert 50 < f["map"] <= f["oracle_map"] <= 100 and f["features"] == 64
    assert set(f["class_costs"]) <= {0.1, 1, 10}
    assert f"avgpool  {64:8}{f['map']:15.2f}{f['oracle_map']:23.2f}" in out and "best layer" not in out
    shots = record["low_shot"]["avgpool"]
    assert shots["1"]["oracle"]["min"] <= shots["1"]["oracle"]["map"] <= shots["1"]["oracle"]["max"]
    assert "images, 40 are needed" in shots["40"]["skipped"] and "   40   skipped: class 'cat' has" in out
    # The same from the parts, one image after the other.
    voc, (trunk, _) = Voc(voc2007), weights.load_backbone(backbone)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    x = [(Warp(voc, 16, 16)[0, 0, i][1][0].float() / 255 - mean) / std for i in range(77)]
    with torch.no_grad():
        x = torch.cat([trunk.eval()(crop) for crop in x])
    ap, costs, oracle, _ = full(unit(x), voc, (0.1, 1.0, 10.0), "all_points", 1, "")
    assert f["map"] == pytest.approx(100 * ap.mean(), abs=0.3)
    assert f["oracle_map"] == pytest.approx(100 * oracle.mean(), abs=0.3) and f["class_costs"] == costs


def test_all_layers_of_a_resnet_at_224_pixels(voc2007, tmp_path, capsys):
    torch.save(resnet10(width=0.125).state_dict(), tmp_path / "resnet10.pth")
    command = (eval_svm, tmp_path / "resnet10.pth", "--data", voc2007, *ONE)
    layers = [f"feature{i}" for i in range(1, 6)] + ["avgpool"]
    record, out = evaluate(capsys, *command, "--layers", *layers)
    f = record["full"]
    assert [f[layer]["features"] for layer in layers] == [1152, 288, 256, 288, 256, 64]
    best = max(f, key=lambda layer: f[layer]["map"])
    assert f"best layer: {best}, {f[best]['map']:.2f} (chosen on the test set)" in out
    assert "at 224 px (warp)" in out
    crop = ("--layers", "avgpool", "--crop", "center", "--size", 24, "--ap", "11point")
    other, out = evaluate(capsys, *command, *crop)
    assert "at 24 px (center)" in out and other["full"]["avgpool"]["map"] != f["avgpool"]["map"]


def test_the_convolutions_of_an_alexnet(voc2007, tmp_path, monkeypatch, capsys):
    def build(info):
        with torch.device("meta"):  # its fully connected layers have 200 MB that no layer here needs
            trunk = AlexNet((4, 6, 6, 6, 4), False, last_relu=False)
        trunk.classifier = nn.Identity()
        for layer in trunk.features.to_empty(device="cpu"):
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return trunk

    monkeypatch.setattr(load, "build_backbone", build)
    info = dict(arch="alexnet_sela", width=1, stem="imagenet", method="sela", resize=256, size=224)
    export(tmp_path / "backbone.pt", build(info), **info)
    layers = ("conv1", "conv5", "conv5_max")
    record, _ = evaluate(capsys, eval_svm, tmp_path, "--data", voc2007, "--layers", *layers, *ONE)
    assert [record["full"][layer]["features"] for layer in layers] == [400, 144, 144]
    assert record["method"] == "sela"
    assert json.loads((tmp_path / "eval_svm_full_warp.json").read_text()) == record


def printed(arguments):
    """What the command prints on this rank, and fits of another problem that no two ranks share evenly."""
    p, out = Problem(), io.StringIO()
    with contextlib.redirect_stdout(out):
        eval_svm.main(eval_svm.arguments(arguments))
    fits = full(p.x, p, SOME[:3], "all_points", 1, ""), low_shot(p.x, p, SOME[:1], "11point", 1, 1, 0, 1, "")
    return out.getvalue(), *fits


def test_two_ranks_find_what_one_finds(voc2007, backbone):
    arguments = [backbone, "--data", voc2007, "--layers", "avgpool", "--costs", 0.1, 1, "--jobs", 1, *CPU]
    arguments += ["--batch-size", 7, "--protocol", "full", "low-shot", "--shots", 1]
    arguments = [str(a) for a in arguments]
    out, *fits = printed(arguments)
    results = ranks(2, printed, arguments)
    assert results[0][0] == out and results[1][0] == "" and json.loads(out.splitlines()[-1])["full"]
    for _, *others in results:
        for ours, theirs in zip(fits, others):
            assert all(np.array_equal(a, b) for a, b in zip(ours, theirs))


def test_errors(voc2007, backbone, tmp_path, capsys, monkeypatch):
    broken = {}
    for name, change in {
        "other images": lambda f: (f / "ImageSets/Main/cat_test.txt").write_text("000001 1\n"),
        "no number": lambda f: (f / "ImageSets/Main/cat_test.txt").write_text("000001 yes\n"),
        "no text": lambda f: (f / "ImageSets/Main/cat_test.txt").write_bytes(b"\xff"),
        "absent": lambda f: [path.unlink() for path in (f / "ImageSets/Main").glob("*trainval.txt")],
        "one class": lambda f: (f / "ImageSets/Main/cat_trainval.txt").unlink(),
        "gone": lambda f: next(iter((f / "JPEGImages").glob("*"))).unlink(),
        "damaged": lambda f: next(iter((f / "JPEGImages").glob("*"))).write_text("no image"),
        "xml": lambda f: [p.unlink() for p in (f / "ImageSets/Main").glob("*_*")]
        + [p.write_text("<") for p in f.glob("Annotations/*")],
    }.items():
        broken[name] = copy(voc2007, tmp_path / name)
        change(broken[name] / "VOC2007")

    def avgpool(data, *more):
        return (backbone, "--data", data, "--layers", "avgpool", *more)

    voc = (backbone, "--data", voc2007)
    refuses(capsys, eval_svm, (
        ((backbone,), 2, "--data is needed"),
        (avgpool(voc2007, "--crop", "center", "--size", 30), 2, "--resize 16 is smaller than --size 30"),
        ((backbone, "--data", tmp_path / "nothing"), 2, "feature5 is defined on a map of 7x7"),
        (avgpool(tmp_path / "nothing"), 3, "is no VOCdevkit"),
        ((*voc, "--layers", "conv9"), 2, "invalid choice: 'conv9'"),
        ((*voc, "--layers", "conv5"), 2, "conv5 needs a trunk with a map 'conv5'"),
        (avgpool(voc2007, "--costs", "many"), 2, "--costs many: openselfsup, vissl, or numbers above 0"),
        (avgpool(voc2007, "--costs", 1, 0), 2, "--costs 1 0: openselfsup, vissl, or numbers above 0"),
        (avgpool(voc2007, "--shots", 0), 2, "--shots 0"),
        (avgpool(broken["other images"]), 3, "name different images"),
        (avgpool(broken["no number"]), 3, "cat_test.txt: lines with an image and 1, 0 or -1 are needed"),
        (avgpool(broken["no text"]), 3, "cat_test.txt cannot be read"),
        (avgpool(broken["absent"]), 3, "trainval.txt cannot be read"),
        (avgpool(broken["one class"]), 3, "class 'cat' has no positive image in trainval"),
        (avgpool(broken["gone"]), 3, "1 of 77 images are missing"),
        (avgpool(broken["damaged"]), 3, "1 images of --data cannot be read"),
        (avgpool(broken["xml"]), 3, ".xml cannot be read"),
    ))
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    assert run_here(eval_svm, *avgpool(voc2007)) == 2
    assert capsys.readouterr().err == "error: eval_svm.py needs scikit-learn: pip install scikit-learn\n"


def test_on_a_gpu_it_asks_for_nothing_that_cuda_refuses(voc2007, backbone, capsys):
    command = (eval_svm, backbone, "--data", voc2007, "--layers", "avgpool", *ONE, "--precision", "float32")
    on_cpu, _ = evaluate(capsys, *command)
    with pretend_gpu():
        on_gpu, _ = evaluate(capsys, *command, "--device", "cuda")
    assert on_gpu == on_cpu
