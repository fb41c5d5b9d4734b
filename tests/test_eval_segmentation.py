"""eval_segmentation.py: network, loss, schedule, readers, two ranks and one, kills, and what a user types."""

import math
import re
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision
from evaluations import CPU, Killed, evaluate, export, goes_on_after_kills, refuses, run_here
from helpers import ranks
from PIL import Image
from pretend_gpu import pretend_gpu
from torch import nn

import eval_segmentation
from common import data
from common.alexnet import alexnet
from common.batchnorm import share_dropout
from common.engine.errors import ArgumentError, DataError
from common.evaluation import dense, maps
from common.evaluation.maps import Crops, Whole, distort
from common.evaluation.progress import Progress
from common.multicrop import MEAN, STD, generator, to_tensor
from common.resnet import resnet10, resnet50
from common.sources.masks import VOC_CLASSES, open_cityscapes, open_scenes, open_voc_aug
from common.weights.preact import PreactResNet50
from eval_segmentation import PRESETS, Model, dilate, judge, loss_of, offsets, predict

HOW = dict(device=torch.device("cpu"), mean=MEAN, std=STD, workers=0, precision=torch.float32)
# 32-pixel crops of eighths of the width: a step takes milliseconds.
TINY = replace(PRESETS["small"], crop=32, base=(32, 32), iterations=6, batch_size=4, lr=0.1, channels=8,
               convs=2, joined=True, auxiliary=8)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return export(tmp_path_factory.mktemp("trunk") / "backbone.pt")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", TINY)


def progress_of(folder):
    return Progress(Path(folder), "", {}, 10, fresh=True)


def network(p, classes=7, width=0.125, dtype=torch.float32):
    torch.manual_seed(0)
    model = Model(resnet10(width=width, stem="small"), p, classes)
    return model.to(dtype, memory_format=torch.channels_last)


# ---- network


def test_the_networks_have_the_published_sizes():
    for preset, classes, wanted in (("voc12aug_20k", 21, 49_480_042), ("cityscapes_40k", 19, 49_478_502)):
        model = Model(resnet50(), PRESETS[preset], classes)
        assert sum(parameter.numel() for parameter in model.parameters()) == wanted
    parts = [sum(parameter.numel() for parameter in part.parameters()) for part in model.children()]
    assert parts == [23_508_032, 23_605_779, 2_364_691]
    assert model.head.scores.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not model.head.scores.bias.any()


def test_a_dilated_trunk_is_torchvisions():
    torch.manual_seed(0)
    trunk = resnet50()
    theirs = torchvision.models.resnet50(replace_stride_with_dilation=[False, True, True])
    theirs.fc = nn.Identity()
    theirs.load_state_dict(trunk.state_dict())
    x, dilated = torch.randn(2, 3, 64, 64), dilate(trunk, ("layer3", "layer4"))
    with torch.no_grad():
        y = theirs.layer2(theirs.layer1(theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))))
        maps = dilated.stages(x)
        assert maps["layer4"].shape == (2, 2048, 8, 8)
        for name in ("layer3", "layer4"):
            y = getattr(theirs, name)(y)
            assert torch.equal(maps[name], y), name


@pytest.mark.parametrize("stages", [("layer4",), ("layer3", "layer4")])
def test_a_dilated_trunk_has_the_values_of_the_strided_one_between_others(stages):
    trunk, x = resnet10(width=0.125, stem="small").double().eval(), torch.randn(1, 3, 32, 32).double()
    with torch.no_grad():
        wanted = trunk.stages(x)["layer4"]
        found = dilate(trunk, stages).stages(x)["layer4"]
    step = 2 ** len(stages)
    torch.testing.assert_close(found[..., ::step, ::step], wanted)


def test_the_auxiliary_head_is_for_training_alone():
    model = network(PRESETS["voc12aug_20k"], 21)
    x = torch.randn(2, 3, 32, 32)
    scores = model.train()(x)
    assert [s.shape for s in scores] == [(2, 21, 16, 16), (2, 21, 16, 16)]
    assert len(model.eval()(x)) == 1


def test_whole_channels_are_dropped_and_on_two_ranks_as_on_one():
    one = dropped()
    assert torch.equal(one, torch.cat(ranks(2, dropped)))
    share = one.flatten(2)
    assert ((share == 0).all(2) | (share == 1 / 0.75).all(2)).all()  # whole channels
    assert (share[..., 0] == 0).float().mean() == pytest.approx(0.25, abs=0.08)


def dropped():
    from common import distributed

    layer = share_dropout(share_dropout(nn.Sequential(nn.Dropout2d(0.25)))).train()
    torch.manual_seed(0)
    return layer(torch.ones(8 // distributed.world_size(), 32, 3, 3))


# ---- loss, schedule, metric


@pytest.mark.parametrize("align_corners", [False, True])
def test_the_loss_is_the_mean_over_all_pixels_with_those_left_out(align_corners):
    torch.manual_seed(0)
    scores, labels = torch.randn(2, 5, 4, 4).double(), torch.randint(0, 5, (2, 16, 16))
    labels[0, :5] = 255
    up = F.interpolate(scores, (16, 16), mode="bilinear", align_corners=align_corners)
    wanted = sum(-up[b, :, i, j].log_softmax(0)[labels[b, i, j]] for b in range(2) for i in range(16)
                 for j in range(16) if labels[b, i, j] != 255) / (2 * 16 * 16)
    assert loss_of(scores, labels, align_corners).item() == pytest.approx(wanted.item(), rel=1e-12)
    assert loss_of(scores, torch.full_like(labels, 255), align_corners) == 0


def test_the_rate_falls_to_its_end():
    assert dense.poly(50, 100, 1e-5) == pytest.approx(1e-5)  # never upwards
    rates = [dense.poly(step, 20_000, 0.01) for step in (0, 10_000, 19_999, 20_000)]
    assert rates[0] == 0.01 and rates[3] == 1e-4 and 1e-4 < rates[2] < 1.02e-4
    assert rates[1] == pytest.approx((0.01 - 1e-4) * 0.5**0.9 + 1e-4)


def test_iterations_are_steps_of_passes_from_anywhere_on():
    class Noted:
        def epoch(self, epoch, batches, first):
            for step in range(first, len(batches)):
                yield epoch, step, [index for _, index in batches[step]]

    whole = list(dense.iterations(Noted(), 11, 3, 5, 0, 8))
    assert [batch[:2] for batch in whole] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0), (2, 1)]
    assert list(dense.iterations(Noted(), 11, 3, 5, 4, 8)) == whole[4:]
    assert [batch[2] for batch in whole[3:6]] == [[i for _, i in b] for b in data.batches(11, 3, 1, 5)]
    with pytest.raises(DataError, match="2 images, fewer than one batch: --batch-size 3"):
        list(dense.iterations(Noted(), 2, 3, 5, 0, 8))


def test_intersection_over_union_by_hand():
    confusion = torch.tensor([[6, 2, 0, 0], [1, 3, 0, 0], [0, 4, 0, 0], [0, 0, 0, 0]])
    ious = eval_segmentation.intersection_over_union(confusion)
    assert ious[:3].tolist() == pytest.approx([100 * 6 / 9, 100 * 3 / 10, 0]) and math.isnan(ious[3])


# ---- test by windows


def test_windows_are_those_of_the_protocol():
    assert offsets(2049, 769, 513) == [0, 513, 1026, 1280] and offsets(1025, 769, 513) == [0, 256]
    assert offsets(769, 769, 513) == offsets(500, 769, 513) == [0]


def test_scores_are_averaged_where_windows_overlap():
    seen = []

    def model(x):  # the mean of its window, everywhere
        seen.append(x.shape[2:])
        return [x.mean((2, 3), keepdim=True)[:, :1].expand(-1, -1, 2, 2)]

    p = replace(PRESETS["cityscapes_40k"], crop=8, stride=6)
    x = torch.arange(10.0).expand(1, 3, 5, 10)  # (1, 3, 5, 10): 0 .. 9 across
    scores = predict(model, x, p)
    assert seen == [(5, 8), (5, 8)] and scores.shape == (1, 1, 5, 10)
    assert scores[0, 0, 2].tolist() == pytest.approx([3.5] * 2 + [4.5] * 6 + [5.5] * 2)


# ---- crops


def test_a_crop_is_a_function_of_seed_epoch_and_position():
    images, _ = open_scenes("scenes:12")
    p = replace(PRESETS["small"], ratios=(0.5, 2.0))
    index, (crop, labels), _ = Crops(images, p, 3)[2, 5, 7]
    again = Crops(images, p, 3)[2, 5, 7]
    assert index == 7 and (crop.shape, labels.shape) == ((1, 3, 64, 64), (1, 64, 64))
    assert torch.equal(crop, again[1][0]) and torch.equal(labels, again[1][1])
    for key, seed in (((2, 6, 7), 3), ((1, 5, 7), 3), ((2, 5, 7), 4)):
        assert not torch.equal(crop, Crops(images, p, seed)[key][1][0])


def test_labels_stay_on_what_they_label():
    """Red says the label in the image, and still does behind scaling, crop and flip."""
    label = np.kron(np.arange(16).reshape(4, 4), np.ones((20, 30))).astype(np.uint8)  # (80, 120)
    image = Image.fromarray(np.stack([label * 16] * 3, axis=2))
    p = replace(PRESETS["small"], base=(120, 80), crop=64, ratios=(0.5, 2.0))

    class Set:
        paths, classes = ["a"], list(range(16))

        def __len__(self):
            return 1

        def read(self, i):
            return image

        def label_map(self, i):
            return label

    with mock.patch.object(maps, "distort", lambda pixels, rng: pixels):
        crops = [Crops(Set(), p, 0)[0, position, 0] for position in range(40)]
    agreement, sizes = [], []
    for _, (crop, labels), size in crops:
        height, width = size[0].tolist()
        known = labels[0] != 255
        assert known.sum() == height * width and known[:height, :width].all()
        assert not crop[0][:, ~known].any()
        agreement.append(((crop[0, 0].float() / 16).round() == labels[0])[known].float().mean())
        sizes.append((height, width))
    assert min(agreement) > 0.85  # but for edges between two
    assert (64, 64) in sizes and min(sizes)[0] < 50  # padded ones too
    left = [labels[0, 2, 2] < labels[0, 2, 20] for _, (_, labels), _ in crops]
    assert 5 < sum(map(int, left)) < 40  # flipped and not


def test_crops_of_one_class_alone_are_drawn_again():
    labels = np.zeros((64, 200), np.uint8)
    labels[:, 150:170] = 1
    image = Image.fromarray(np.zeros((64, 200, 3), np.uint8))
    p = replace(PRESETS["small"], base=(200, 64), crop=32, ratios=(1.0, 1.0))
    crops = Crops(open_scenes("scenes:1")[0], p, 0)
    with mock.patch.object(crops.pairs, "checked", lambda i, image, labels: (to_tensor(image),
                                                                             torch.from_numpy(labels))):
        drawn = [crops.cut(0, image, labels, generator(0, 0, i))[1] for i in range(60)]
    shares = [(part == 1).float().mean().item() for part in drawn]
    assert np.mean([0.25 < share < 0.75 for share in shares]) > 0.6  # of single draws about a fifth


def test_colours_are_distorted_half_of_the_time_each():
    pixels = np.full((4, 4, 3), (120, 80, 60), np.uint8)
    found = np.array([distort(pixels, generator(0, 0, i))[0, 0] for i in range(400)], float)
    same = (found == pixels[0, 0]).all(1).mean()
    assert 0.02 < same < 0.12  # one in sixteen
    hues = np.array([Image.fromarray(np.uint8([[f]])).convert("HSV").getpixel((0, 0))[0] for f in found])
    base = Image.fromarray(pixels).convert("HSV").getpixel((0, 0))[0]
    shift = (hues - base + 128) % 256 - 128
    assert abs(shift).max() <= 28 and 0.35 < (abs(shift) > 3).mean() < 0.6  # 18 of 180
    assert 40 < found[:, 0].min() and found[:, 0].max() > 180


def test_whole_images_are_scaled_and_their_labels_are_not(tmp_path):
    voc_tree(tmp_path)
    _, val = open_voc_aug(tmp_path)
    _, (pixels, labels), _ = Whole(val, PRESETS["voc12aug_20k"])[0, 0, 0]
    assert pixels.shape == (1, 3, 512, 683) and labels.shape == (1, 48, 64)


# ---- readers


def voc_tree(root, sbd="VOCaug/dataset"):
    """VOCdevkit with a and c to train, b and d held out; SBD adds e and f, and has b, c and d too."""
    rng, voc = np.random.default_rng(0), root / "VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / folder).mkdir(parents=True)
    (root / sbd / "cls").mkdir(parents=True)
    for name in "abcdef":
        Image.fromarray(rng.integers(0, 255, (48, 64, 3), dtype=np.uint8)).save(
            voc / "JPEGImages" / f"{name}.jpg")
        labels = rng.integers(0, 3, (6, 8)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
        labels[:2] = 255
        mask = Image.fromarray(labels, "P")
        mask.putpalette(dense.colours(np.arange(256, dtype=np.uint8)[None]).tobytes())
        mask.save(voc / "SegmentationClass" / f"{name}.png")
        other = np.where(labels == 255, 20, labels)
        scipy.io.savemat(root / sbd / "cls" / f"{name}.mat", {"GTcls": {"Segmentation": other,
                                                                        "Boundaries": np.zeros(3)}})
    for split, names in (("train", "ac"), ("val", "bd")):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text("\n".join(names) + "\n")
    (root / sbd / "train.txt").write_text("c\nd\ne\n")
    (root / sbd / "val.txt").write_text("b\nf\n")
    return root


def city_tree(root):
    rng = np.random.default_rng(0)
    for split, city in (("train", "aachen"), ("val", "lindau")):
        for i in range(2):
            for kind, end in (("leftImg8bit", "leftImg8bit"), ("gtFine", "gtFine_labelIds")):
                (root / kind / split / city).mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 255, (32, 64, 3), dtype=np.uint8)
                ids = rng.integers(0, 34, (32, 64), dtype=np.uint8)
                Image.fromarray(ids if kind == "gtFine" else pixels).save(
                    root / kind / split / city / f"{city}_{i}_{end}.png")
    return root


@pytest.mark.parametrize("place", ["VOCaug/dataset", "benchmark_RELEASE/dataset",
                                   "../benchmark_RELEASE/dataset"])
def test_the_grown_training_set_of_voc(tmp_path, place, capsys):
    root = voc_tree(tmp_path / "VOCdevkit", place)
    for spec in (root, root / "VOC2012", tmp_path):
        train, val = open_voc_aug(spec)
        assert train.paths == [f"JPEGImages/{name}.jpg" for name in "acef"]
        assert val.paths == [f"JPEGImages/{name}.jpg" for name in "bd"]
    assert "has 4 training images, the published protocol 10,582" in capsys.readouterr().out
    assert (train.label_map(1)[:2] == 255).all() and (train.label_map(2)[:2] == 20).all()  # VOC's stay
    assert train.label_map(2).dtype == np.uint8 and train.label_map(2).shape == (48, 64)
    assert len(VOC_CLASSES) == 21 and VOC_CLASSES[15] == "person"
    assert train.fingerprint != val.fingerprint


def test_ids_of_cityscapes_become_those_of_training(tmp_path):
    train, val = open_cityscapes(city_tree(tmp_path))
    assert (len(train), len(val), len(train.classes)) == (2, 2, 19)
    raw = np.array(Image.open(tmp_path / "gtFine/train/aachen/aachen_1_gtFine_labelIds.png"))
    official = {c.id: c.train_id for c in torchvision.datasets.Cityscapes.classes if c.id >= 0}
    names = {c.train_id: c.name for c in torchvision.datasets.Cityscapes.classes if 0 <= c.train_id < 255}
    assert train.classes == [names[i] for i in range(19)]
    assert (train.label_map(1) == np.vectorize(official.get)(raw)).all()


def test_colours_of_labels_are_vocs():
    wanted = {0: (0, 0, 0), 1: (128, 0, 0), 2: (0, 128, 0), 15: (192, 128, 128), 20: (0, 64, 128),
              255: (224, 224, 192)}
    assert {i: tuple(dense.colours(np.uint8([[i]]))[0, 0].tolist()) for i in wanted} == wanted


# ---- training


def trained(p, spec="scenes:10", dtype=torch.float64):
    """Mean loss, confusion and weights of a small training, on all ranks."""
    import tempfile

    images, queries = open_scenes(spec)
    model = network(p, dtype=dtype)
    with tempfile.TemporaryDirectory() as folder:
        loss = eval_segmentation.train(model, p, data.Loader(Crops(images, p, 1)), len(images), 1, HOW,
                                       progress_of(folder))
    return loss, judge(model, queries, p, HOW)[0], model.state_dict()


def test_two_ranks_equal_one():
    loss, confusion, weights = trained(TINY)
    for other, counts, state in ranks(2, trained, TINY):
        assert other == pytest.approx(loss, rel=1e-9) and torch.equal(counts, confusion)
        for name, tensor in weights.items():
            torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-9, msg=name)


def test_a_step_is_what_a_few_plain_lines_compute():
    p = replace(TINY, iterations=3, weight_decay=0.01, ratios=(0.5, 1.0))
    loss, _, weights = trained(p)
    images, _ = open_scenes("scenes:10")
    model, losses = network(p, dtype=torch.float64).train(), []
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (MEAN, STD))
    parameters, crops = list(model.parameters()), Crops(images, p, 1)
    momentum = [torch.zeros_like(w) for w in parameters]
    for step in range(3):
        epoch, place = divmod(step, 2)  # two steps of four images a pass
        x, y = [], []
        for position, i in data.batches(10, 4, epoch, 1)[place]:
            _, (crop, labels), size = crops[epoch, position, i]
            height, width = size[0].tolist()
            x.append(torch.zeros(3, 32, 32, dtype=torch.float64))
            x[-1][:, :height, :width] = (crop[0].double() / 255 - mean)[:, :height, :width] / std
            y.append(labels[0].long())
        share_dropout(model)
        torch.manual_seed(1 << 32 | step)
        main, auxiliary = model(torch.stack(x).contiguous(memory_format=torch.channels_last))
        y = torch.stack(y)
        terms = [F.cross_entropy(F.interpolate(s, (32, 32), mode="bilinear"), y, ignore_index=255,
                                 reduction="none").mean() for s in (main, auxiliary)]
        losses.append(terms[0] + 0.4 * terms[1])
        rate = (0.1 - 1e-4) * (1 - step / 3) ** 0.9 + 1e-4
        for w, m, g in zip(parameters, momentum, torch.autograd.grad(losses[-1], parameters)):
            m.mul_(0.9).add_(g + 0.01 * w.detach())
            w.data -= rate * m
    assert loss == pytest.approx(sum(losses).item() / 3, rel=1e-9)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-5, atol=1e-7, msg=name)


def test_it_overfits_two_scenes(tmp_path, monkeypatch):
    monkeypatch.setattr(maps, "distort", lambda pixels, rng: pixels)
    p = replace(PRESETS["small"], iterations=160, batch_size=2, lr=0.6, ratios=(1.0, 1.0), weight_decay=0.0)
    images, _ = open_scenes("scenes:2")
    model = network(p, width=0.25)
    eval_segmentation.train(model, p, data.Loader(Crops(images, p, 0)), 2, 0, HOW, progress_of(tmp_path))
    confusion, _, bad = judge(model, images, p, HOW)
    assert eval_segmentation.intersection_over_union(confusion).nanmean() > 80 and not bad
    ring = sum(int((images.label_map(i) == 255).sum()) for i in range(2))
    assert confusion.sum() == 2 * 64 * 64 - ring
    assert len(judge(model, open_scenes("scenes:8")[0], p, HOW)[1]) == 6  # pictures


# ---- as a user starts it


def main_of(*arguments):
    eval_segmentation.main(eval_segmentation.arguments([str(a) for a in arguments]))


def test_scenes_in_one_command(backbone, tmp_path, capsys, tiny):
    command = (eval_segmentation, backbone, "--data", "scenes:20", *CPU, "--out", tmp_path)
    record, out = evaluate(capsys, *command)
    wanted = {"preset": "small", "images": 20, "queries": 4, "classes": 7, "iterations": 6, "method": "swav"}
    assert {key: record[key] for key in wanted} == wanted and len(record["iou"]) == 7
    known = [iou for iou in record["iou"] if iou is not None]
    assert record["miou"] == pytest.approx(np.mean(known), abs=1e-3)
    assert record["miou_without_background"] == pytest.approx(np.mean(known[1:]), abs=1e-3)
    assert re.search(rf"iteration 6/6 loss {record['loss']:.4f}", out)
    assert out.splitlines()[-1].startswith("{")
    assert (tmp_path / "eval_segmentation_small.json").exists()
    with Image.open(tmp_path / "eval_segmentation_small.png") as sheet:
        assert sheet.size == (3 * 196 - 4, 4 * 196 - 4)  # four scenes: image, truth, prediction
        cell = sheet.crop((0, 0, 192, 192)).resize((64, 64), Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(cell), np.asarray(open_scenes("scenes:20")[1].read(0)))
    assert not list(tmp_path.glob("*progress*"))
    random, _ = evaluate(capsys, *command, "--random-init")
    assert random["method"] == "random weights" and random["loss"] != record["loss"]
    assert (tmp_path / "eval_segmentation_small_random.png").exists()


def test_a_killed_run_goes_on_with_the_same_bits(backbone, tmp_path, monkeypatch, capsys, tiny):
    command = (backbone, "--data", "scenes:20", *CPU, "--out")
    whole, _ = evaluate(capsys, eval_segmentation, *command, tmp_path / "whole")
    # before the first step, in the second pass, and while it is judged
    found = goes_on_after_kills(monkeypatch, capsys, eval_segmentation, *command, tmp_path / "killed",
                                kills=(1, 7, 10))
    assert found == whole and not list((tmp_path / "killed").glob("*progress*"))
    sheets = [(tmp_path / name / "eval_segmentation_small.png").read_bytes() for name in ("whole", "killed")]
    assert sheets[0] == sheets[1]


def killed(*arguments):
    fetch, calls = Progress.fetch, []

    def killing(progress, *more):
        calls.append(0)
        if len(calls) in (3, 9):
            progress.save()
            raise Killed
        return fetch(progress, *more)

    with mock.patch.dict(PRESETS, small=TINY), mock.patch.object(Progress, "fetch", killing):
        for _ in range(2):
            with pytest.raises(Killed):
                main_of(*arguments)
        main_of(*arguments)


def unbroken(*arguments):
    with mock.patch.dict(PRESETS, small=TINY):
        main_of(*arguments)


def test_on_two_ranks_too(backbone, tmp_path):
    words = (backbone, "--data", "scenes:20", *CPU, "--out")
    ranks(2, unbroken, *words, tmp_path / "whole")
    ranks(2, killed, *words, tmp_path / "killed")
    records = [(tmp_path / name / "eval_segmentation_small.json").read_text() for name in ("whole", "killed")]
    assert records[0] == records[1]


def judged(kind, root, state):
    """Confusion matrix of the images of a folder by a saved network, on all ranks, and who could not be
    read."""
    p, classes, opened = devkit_preset(kind)
    model = network(p, classes, width=0.125)
    model.load_state_dict(torch.load(state))
    confusion, _, bad = judge(model, opened(root)[1], p, HOW)
    return confusion, sorted(bad)


def devkit_preset(kind):
    name, opened, classes, base = {"voc": ("voc12aug_20k", open_voc_aug, 21, (128, 32)),
                                   "city": ("cityscapes_40k", open_cityscapes, 19, (65, 33))}[kind]
    p = replace(PRESETS[name], base=base, crop=32, channels=8, auxiliary=8, iterations=3, batch_size=2)
    return replace(p, stride=24 if p.stride else 0), classes, opened


@pytest.mark.parametrize("kind", ["voc", "city"])
def test_devkits_end_to_end(kind, tmp_path, monkeypatch, capsys):
    p, classes, opened = devkit_preset(kind)
    name = {"voc": "voc12aug_20k", "city": "cityscapes_40k"}[kind]
    monkeypatch.setitem(PRESETS, name, p)
    backbone = export(tmp_path / "backbone.pt", resnet10(width=0.125), stem="imagenet")
    root = {"voc": voc_tree, "city": city_tree}[kind](tmp_path / "set")
    train, val = opened(root)
    Image.open(root_of(train, 0)).convert("L").save(root_of(train, 0))  # grey
    command = (eval_segmentation, backbone, "--preset", name, "--data", root, *CPU, "--out", tmp_path / "out")
    record, out = evaluate(capsys, *command)
    assert (record["images"], record["queries"], record["classes"]) == (len(train), 2, classes)
    assert ("miou_without_background" in record) == (kind == "voc") and "cannot be read" not in out
    assert all(math.isfinite(record[key]) for key in ("loss", "miou"))

    state = tmp_path / "state.pt"
    torch.save(network(p, classes).state_dict(), state)
    one, bad = judged(kind, root, state)
    assert one.sum() > 0 and bad == []
    for other, bad in ranks(2, judged, kind, root, state):
        assert torch.equal(other, one) and bad == []

    Path(root_of(train, 1)).write_bytes(b"no image")  # unreadable
    Path(root_of(val, 0)).write_bytes(b"")  # empty
    record, out = evaluate(capsys, *command, "--fresh")
    assert "warning: 1 images of --data cannot be read and were replaced by their neighbours" in out
    assert "warning: 1 images of the held-out set cannot be read and are left out" in out
    one, bad = judged(kind, root, state)
    assert bad == [0]
    found = ranks(2, judged, kind, root, state)
    assert all(torch.equal(other, one) for other, _ in found) and [b for _, b in found] == [[0], []]
    Path(root_of(val, 1)).write_bytes(b"")
    refuses(capsys, eval_segmentation, [((*command[1:], "--fresh"), 3, "no held-out image can be read")])


def root_of(images, i):
    return str(Path(images.root, images.paths[i]))


def test_a_gpu_is_asked_for_nothing_that_cuda_refuses(backbone, tmp_path, capsys, tiny):
    # --deterministic upsamples by code of torch's own that looks for a GPU
    command = (eval_segmentation, backbone, "--data", "scenes:10", "--no-deterministic", *CPU, "--out")
    on_cpu, _ = evaluate(capsys, *command, tmp_path / "cpu")
    with pretend_gpu() as gpu:
        on_gpu, _ = evaluate(capsys, *command, tmp_path / "gpu", "--device", "cuda")
    assert on_gpu == on_cpu and gpu.of(gpu.launches, "elsewhere") > 100


def test_a_loss_that_is_not_finite_ends_it(backbone, tmp_path, capsys, tiny):
    assert run_here(eval_segmentation, backbone, "--data", "scenes:8", "--lr", 1e30, *CPU) == 5
    assert "the loss is not finite: lower --lr" in capsys.readouterr().err


def test_the_presets_are_the_published_protocols(capsys):
    voc, city = PRESETS["voc12aug_20k"], PRESETS["cityscapes_40k"]
    names = "base crop iterations batch_size lr weight_decay stride align_corners ratios channels auxiliary"
    assert [getattr(voc, name) for name in names.split()] == [(2048, 512), 512, 20_000, 16, 0.01, 5e-4, 0,
                                                              False, (0.5, 2.0), 512, 256]
    assert [getattr(city, name) for name in names.split()] == [(2049, 1025), 769, 40_000, 8, 0.01, 5e-4, 513,
                                                               True, (0.5, 2.0), 512, 256]
    assert run_here(eval_segmentation, "--list-presets") == 0
    out = capsys.readouterr().out
    assert "SwAV of 200 epochs, batch 256: 63.73" in out and all(name in out for name in PRESETS)
    assert "59.69" not in out and "54.76" not in out


def test_a_rate_that_does_not_follow_the_batch_is_said():
    def resolved(*arguments):
        return eval_segmentation.resolve(eval_segmentation.arguments(["trunk", *arguments]))

    city = ("--preset", "cityscapes_40k", "--data", "x")
    p, warning = resolved(*city, "--batch-size", "16", "--iterations", "9")
    assert (p.lr, p.batch_size, p.iterations) == (0.01, 16, 9)
    assert warning.endswith("for 16 the linear rule asks for --lr 0.02")
    p, warning = resolved(*city, "--batch-size", "16", "--lr", "0.3", "--weight-decay", "0")
    assert (p.lr, p.weight_decay, warning) == (0.3, 0, None)


@pytest.mark.parametrize("trunk", [nn.Flatten(), PreactResNet50()], ids=["own", "preact"])
def test_a_trunk_without_stages_to_dilate_is_refused(trunk):
    args = eval_segmentation.arguments(["some.pt"])
    with pytest.raises(ArgumentError, match=rf"some.pt is no ResNet .*\({type(trunk).__name__}\)"):
        dense.magnified(trunk, args)


def test_small_looks_at_larger_images_with_a_stem_of_stride_4():
    args = eval_segmentation.arguments(["some.pt"])
    small, large = (resnet10(width=0.125, stem=stem) for stem in ("small", "imagenet"))
    assert [dense.magnified(trunk, args) for trunk in (small, large)] == [1, 4]
    p = eval_segmentation.enlarged(PRESETS["small"], 4)
    assert (p.base, p.crop) == ((256, 256), 256)


def test_a_sheet_takes_pictures_of_any_shape_or_none(tmp_path):
    shapes, sizes = [[(2, 300)], [(30, 10), (10, 10)]], []
    for rows in ([], [[np.zeros((*shape, 3), np.uint8) for shape in row] for row in shapes]):
        dense.write_sheet(tmp_path / "sheet.png", rows, height=20)
        with Image.open(tmp_path / "sheet.png") as sheet:
            sizes.append(sheet.size)
    assert sizes == [(20, 20), (80, 44)]


def test_errors(tmp_path, backbone, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    alex = export(tmp_path / "alex.pt", alexnet("deepcluster", sobel=True), arch="alexnet", width=1,
                  sobel=True, stem="imagenet", size=224, resize=256)
    large = export(tmp_path / "large.pt", resnet10(width=0.125), stem="imagenet")
    voc = voc_tree(tmp_path / "set")
    full = ("--preset", "voc12aug_20k", "--data", voc)
    refuses(capsys, eval_segmentation, (
        ((backbone, "--lr", 0), 2, "--lr 0: more than 0"),
        ((backbone, "--iterations", 0), 2, "--iterations 0"),
        ((backbone, "--batch-size", 1), 2, "--batch-size 1"),
        ((backbone, "--weight-decay", "nan"), 2, "--weight-decay nan"),
        ((backbone, "--seed", -1), 2, "--seed -1"),
        ((backbone, "--data", "scenes:x"), 3, "scenes:x: a number of images"),
        ((backbone, "--data", "shapes"), 3, "--data shapes: this preset is for scenes"),
        ((backbone, "--data", "scenes:9"), 3, "--data has 9 images, fewer than one batch: --batch-size 16"),
        ((large, "--preset", "voc12aug_20k"), 2, "--data is needed"),
        ((large, "--preset", "voc12aug_20k", "--data", tmp_path / "empty"), 3, "empty is no VOCdevkit"),
        ((large, "--preset", "cityscapes_40k", "--data", tmp_path / "empty"), 3, "empty is no Cityscapes"),
        ((alex, *full), 2, "alex.pt is no ResNet of common/resnet.py (AlexNet)"),
        ((backbone, *full), 2, "has a small stem: --preset voc12aug_20k needs one of stride 4"),
        ((tmp_path / "none.pt", *full), 4, "none.pt"),
    ))
    (voc / "VOCaug/dataset/cls").rename(voc / "VOCaug/dataset/other")
    refuses(capsys, eval_segmentation, [((large, *full), 3, "has no SBD: VOCaug/dataset")])
    (voc / "VOCaug/dataset/other").rename(voc / "VOCaug/dataset/cls")
    (voc / "VOC2012/JPEGImages/e.jpg").rename(tmp_path / "e.jpg")
    refuses(capsys, eval_segmentation, [((large, *full), 3, "1 files are missing: JPEGImages/e.jpg")])
    p = devkit_preset("voc")[0]
    monkeypatch.setitem(PRESETS, "voc12aug_20k", replace(p, batch_size=4))
    Image.new("RGB", (60, 48)).save(voc / "VOC2012/JPEGImages/e.jpg")
    wrong = "JPEGImages/e.jpg: its map of labels has 64x48, the image 60x48 pixels"
    refuses(capsys, eval_segmentation, [((large, *full), 3, wrong)])
    Image.new("RGB", (64, 48)).save(voc / "VOC2012/JPEGImages/e.jpg")
    other = np.full((48, 64), 21, np.uint8)
    scipy.io.savemat(voc / "VOCaug/dataset/cls/e.mat", {"GTcls": {"Segmentation": other}})
    refuses(capsys, eval_segmentation, [((large, *full), 3, "e.jpg: its map of labels has a 21, 21 classes")])
    for option in ("--size", "--epochs", "--val"):
        assert run_here(eval_segmentation, backbone, option, 3) == 2
    capsys.readouterr()
