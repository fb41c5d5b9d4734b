"""eval_detection.py: networks and losses beside formulas, the readers, training on one rank and on two, and
what a user types."""

import json
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from evaluations import CPU, Killed, evaluate, export, goes_on_after_kills, refuses, run_here
from helpers import ranks
from PIL import Image
from torch import nn
from torchvision.models.detection.image_list import ImageList

import eval_detection
from common import distributed
from common.alexnet import alexnet
from common.batchnorm import SyncBatchNorm
from common.evaluation import boxes, dense, detector, examples, found
from common.evaluation.progress import Progress
from common.resnet import resnet10, resnet50
from common.sources.objects import open_coco, open_voc
from common.sources.scenes import Scenes
from eval_detection import PRESETS, rate

COUNTS = dict(before=(60, 60), after=(20, 20), rois=8, over_all=True)
HOW = dict(device=torch.device("cpu"), mean=(0.5,) * 3, std=(0.25,) * 3, workers=0, precision=torch.float32)


# Not an eighth: oneDNN's gradient of a strided 1x1 convolution of 8 channels, channels last, at 64 pixels
# writes beyond it.
WIDTH = 0.25


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return export(tmp_path_factory.mktemp("trunk") / "backbone.pt", width=WIDTH, resize=64, size=64)


@pytest.fixture(scope="module")
def large_stem(tmp_path_factory):
    path = tmp_path_factory.mktemp("trunk") / "backbone.pt"
    return export(path, width=WIDTH, stem="imagenet", resize=64, size=64)


# ---- the networks


def test_parameter_counts():
    with torch.device("meta"):
        c4 = detector.c4(resnet50(), 20, (32, 64, 128, 256, 512), 14, **COUNTS)
        fpn = detector.fpn(resnet50(), 80, (32, 64, 128, 256, 512), 7, **COUNTS)
    numbers = [sum(p.numel() for p in part.parameters()) for part in (c4, fpn, c4.rpn, c4.backbone)]
    assert numbers == [33_242_356, 45_715_509, 9_515_083, 8_543_296]
    head = c4.roi_heads.box_head.part  # layer4 behind the trunk's stages alone, then the norm, no ReLU
    assert [type(layer) for layer in head[1:]] == [nn.BatchNorm2d, nn.AdaptiveAvgPool2d, nn.Flatten]
    assert head[1].num_features == 2048 and isinstance(c4.backbone.part.trunk.layer4, nn.Identity)


def test_regions_are_read_half_a_pixel_to_the_left():
    ramp = (16 * (torch.arange(8.0) + 0.5)).expand(1, 1, 8, 8)  # each cell holds the x of its centre
    box = [torch.tensor([[16.0, 16, 64, 64]])]
    assert detector.AlignedPool({"layer3": 16}, 1)({"layer3": ramp}, box).item() == 40


def test_regions_take_the_map_of_their_size():
    strides = {"a": 4, "b": 8, "c": 16, "d": 32}
    maps = {name: torch.full((2, 1, 64, 64), float(stride)) for name, stride in strides.items()}
    sides = (20.0, 111, 112, 223, 224, 447, 448, 2000)
    some = [torch.tensor([[0, 0, side, side] for side in part]) for part in (sides[:3], sides[3:])]
    pooled = detector.AlignedPool(strides, 1)(maps, some)
    assert pooled.flatten().tolist() == [4, 4, 8, 8, 16, 16, 32, 32]


def test_anchors_are_not_rounded_and_lie_on_the_given_strides():
    anchors = detector.Anchors(((32,), (64,)), (32, 64))
    maps = [torch.zeros(1, 1, 25, 4), torch.zeros(1, 1, 13, 2)]  # 13 rows are the pooled 25
    one, two = anchors(ImageList(torch.zeros(2, 3, 800, 128), [(800, 128)] * 2), maps)
    assert torch.equal(one, two) and one.shape == ((100 + 26) * 3, 4)
    width, height = (one[:, 2:] - one[:, :2]).T
    torch.testing.assert_close(width * height, torch.tensor([32.0**2] * 300 + [64.0**2] * 78))
    torch.testing.assert_close((height / width)[:3], torch.tensor([0.5, 1.0, 2.0]))
    centre = (one[:, :2] + one[:, 2:]) / 2
    assert centre[3].tolist() == [32, 0] and centre[-1].tolist() == [64, 12 * 64]


def test_layers_start_as_the_protocols_say():
    torch.manual_seed(0)
    model = detector.c4(resnet10(), 20, (32, 64), 14, **COUNTS)
    predictor, rpn = model.roi_heads.box_predictor, model.rpn.head
    layers = {predictor.cls_score: 0.01, predictor.bbox_pred: 0.001, rpn.conv[0][0]: 0.01,
              rpn.cls_logits: 0.01, rpn.bbox_pred: 0.01}
    for layer, std in layers.items():
        assert layer.weight.std().item() == pytest.approx(std, rel=0.05) and not layer.bias.any()
    norm = model.roi_heads.box_head.part[1]
    assert (norm.weight == 1).all() and not norm.bias.any()


def test_batch_norm_has_a_weight_decay_of_its_own():
    model = detector.c4(resnet10(0.125), 3, (8,), 4, **COUNTS)
    SyncBatchNorm.convert(model)
    others, own = detector.groups(model, 1e-4, 0.0)
    assert (others["weight_decay"], own["weight_decay"]) == (1e-4, 0.0)
    assert len(others["params"]) + len(own["params"]) == len(list(model.parameters()))
    ids = set(map(id, own["params"]))
    named = {name for name, p in model.named_parameters() if id(p) in ids}
    assert "roi_heads.box_head.part.1.weight" in named and "roi_heads.box_head.part.1.bias" in named
    assert all(re.search(r"bn\d\.|downsample\.1\.|box_head\.part\.1\.", name) for name in named)
    assert len(named) == 2 * len(detector.norms(model))


# ---- losses


def test_losses_of_proposals_are_sums_over_what_could_be_sampled_or_was():
    rng = torch.Generator().manual_seed(0)
    labels = [torch.tensor([1.0, 1, 0, 0, -1, 0]), torch.tensor([0.0, 0, 0, 1, 0, 0])]
    scores, deltas, wanted = (torch.randn(12, k, generator=rng) for k in (1, 4, 4))
    rpn = detector.c4(resnet10(0.125), 3, (8,), 4, **COUNTS).rpn
    rpn.fg_bg_sampler = detector.Sampler(16, 0.5)
    rpn.fg_bg_sampler.seeds = [1, 2]
    flat = torch.cat(labels)
    known = flat >= 0  # all of them are sampled
    wrong = F.binary_cross_entropy_with_logits(scores[known, 0], flat[known], reduction="sum")
    off = (deltas - wanted)[flat == 1].abs().sum()
    for rpn.over_all, count in ((True, 32), (False, 11)):
        got = rpn.compute_loss(scores, deltas, labels, list(wanted.split(6)))
        torch.testing.assert_close(torch.stack(got), torch.stack([wrong, off]) / count)


def test_losses_of_regions_are_means_over_all_of_them():
    heads = detector.c4(resnet10(0.125), 3, (8,), 4, **COUNTS).roi_heads
    scores, deltas, wanted = torch.randn(5, 4), torch.randn(5, 16), torch.randn(5, 4)
    labels = torch.tensor([0, 2, 0, 3, 0])
    losses = heads.box_losses(scores, deltas, labels, wanted)
    torch.testing.assert_close(losses["class"], F.cross_entropy(scores, labels))
    off = (deltas[1, 8:12] - wanted[1]).abs().sum() + (deltas[3, 12:] - wanted[3]).abs().sum()
    torch.testing.assert_close(losses["box"], off / 5)


def test_the_loss_of_masks_is_that_of_the_true_class():
    heads = detector.fpn(resnet10(0.125), 2, (8,) * 5, 7, **COUNTS).roi_heads
    logits = torch.randn(2, 3, 28, 28)
    heads.masks = lambda maps, some: logits
    masks = torch.zeros(2, 56, 56, dtype=torch.uint8)
    masks[1, :28] = 1  # the upper half
    proposals = [torch.tensor([[0.0, 0, 56, 56], [0, 0, 56, 56], [0, 0, 28, 56]])]
    loss = heads.mask_loss(None, proposals, [torch.tensor([1, 0, 1])], [torch.tensor([2, 0, 1])],
                           [{"masks": masks}])
    wanted = torch.zeros(28, 28)
    wanted[:14] = 1
    both = [F.binary_cross_entropy_with_logits(logits[i, c], wanted) for i, c in ((0, 2), (1, 1))]
    torch.testing.assert_close(loss, sum(both) / 2)


def test_samples_are_a_function_of_the_seed_alone():
    labels = torch.tensor([1] * 30 + [0] * 50 + [-1] * 20)

    def sample(*seeds):
        sampler = detector.Sampler(32, 0.25)
        sampler.seeds = seeds
        return [[mask.nonzero()[:, 0].tolist() for mask in kind] for kind in sampler([labels] * len(seeds))]

    (positive, other), (negative, _) = sample(3, 4)
    assert len(positive) == 8 and len(negative) == 24 and max(positive) < 30 <= min(negative)
    assert positive != other and max(negative) < 80
    torch.manual_seed(1)
    assert sample(4)[0][0] == other
    few = detector.Sampler(32, 0.25)
    few.seeds = [0]
    assert [int(kind[0].sum()) for kind in few([labels[28:40]])] == [2, 10]


def test_each_image_has_a_seed_for_its_anchors_and_one_for_its_regions():
    model = tiny(detector.c4, torch.float32)
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 40]]), "labels": torch.tensor([1]), "seed": seed}
               for seed in (5, 2**60 - 1)]
    model(torch.zeros(2, 3, 64, 64), [(64, 64)] * 2, targets)
    assert model.rpn.fg_bg_sampler.seeds == [10, 2**61 - 2]
    assert model.roi_heads.fg_bg_sampler.seeds == [11, 2**61 - 1]


def test_statistics_become_plain_means_of_batches():
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    batches = [(torch.randn(5, 3) * 3 + 1,) for _ in range(4)]
    net(torch.randn(9, 3) + 50)
    detector.reestimate(net, batches)
    torch.testing.assert_close(net[0].running_mean, torch.stack([b.mean(0) for b, in batches]).mean(0))
    torch.testing.assert_close(net[0].running_var, torch.stack([b.var(0) for b, in batches]).mean(0))
    assert net[0].momentum == 0.1 and net.training


# ---- the protocols


def test_presets_are_the_published_protocols():
    sides = (32, 64, 128, 256, 512)
    moco = (24_000, (18_000, 22_000), 0.02, 100, 0.001, 16, 1e-4, 0.0, 200, 1333, sides, 14, (12_000, 6_000),
            (2_000, 1_000), 512, True, 11, 480, 800)
    swav = (*moco[:2], 0.1, 1_000, 0.3333, *moco[5:])
    coco = (12, (8, 11), 0.02, 1_000, 0.001, 16, 1e-4, 1e-4, 0, 1333, sides, 7, (2_000, 1_000),
            (1_000, 1_000), 512, False, 6, 640, 800)
    names = ("lr warmup warmup_start batch_size weight_decay norm_decay reestimate longest sides region "
             "before after rois over_all")
    for name, values in (("voc0712_24k", moco), ("voc0712_24k_swav", swav), ("coco_fpn_1x", coco)):
        p = PRESETS[name]
        after = tuple(round(drop * p.iterations) for drop in p.drops)
        sizes = len(p.sizes), p.sizes[0], p.sizes[-1]
        assert (p.iterations, after, *(getattr(p, key) for key in names.split()), *sizes) == values, name
    assert set(PRESETS) == {"voc0712_24k", "voc0712_24k_swav", "coco_fpn_1x", "small"}


def test_whole_schedules():
    p = PRESETS["voc0712_24k"]
    assert rate(0, p) == 0.02 / 1000 and rate(50, p) == pytest.approx(0.02 * (0.001 + 0.999 / 2))
    steps = (99, 100, 17_999, 18_000, 21_999, 22_000, 23_999)
    expected = (0.02 * (0.001 + 0.999 * 0.99), 0.02, 0.02, 2e-3, 2e-3, 2e-4, 2e-4)
    assert [rate(step, p) for step in steps] == pytest.approx(expected, rel=1e-12)
    p = PRESETS["voc0712_24k_swav"]
    assert [rate(step, p) for step in (0, 500, 1000)] == pytest.approx((0.03333, 0.066665, 0.1), rel=1e-12)


def test_the_schedule_keeps_its_places_and_the_rate_follows_the_batch():
    def resolved(n, *words):
        args = eval_detection.arguments(["trunk", "--data", "x", *words])
        return eval_detection.scheduled(eval_detection.resolve(args), args, n)

    p = resolved(16_551, "--preset", "voc0712_24k", "--iterations", "12000", "--batch-size", "8")
    assert (p.lr, p.iterations, p.warmup) == (0.01, 12_000, 50)
    assert rate(8_999, p) == 0.01 and rate(9_000, p) == pytest.approx(1e-3)
    p = resolved(117_266, "--preset", "coco_fpn_1x")
    assert (p.iterations, p.warmup, p.lr) == (12 * 7_329, 1_000, 0.02)
    assert rate(58_632, p) == pytest.approx(2e-3) and rate(58_631, p) == 0.02
    assert resolved(99, "--preset", "coco_fpn_1x", "--batch-size", "8", "--lr", "0.3").lr == 0.3
    assert resolved(117_266, "--preset", "coco_fpn_1x", "--batch-size", "8").iterations == 12 * 14_658
    short = resolved(400, "--preset", "small", "--iterations", "5")
    assert short.warmup == 0 and rate(0, short) == short.lr


def test_the_presets_are_listed_with_their_figures(capsys):
    assert run_here(eval_detection, "--list-presets") == 0
    out = capsys.readouterr().out
    assert all(name in out for name in PRESETS) and "60.5 / 40.2 / 43.9, masks 57.5 / 36.3 / 38.8" in out
    assert "24000 iterations of 16 images of 480 to 800 px, lr 0.02, from 0.001 of it in 100" in out
    assert "82.6" not in out and "41.6" not in out  # of nobody's memory


# ---- images


class Boxed:
    """Two images, (90, 60) and (60, 120), with a box each, a crowd beside it; read counts."""

    classes, wide = ["thing"], np.array([True, False])

    def __len__(self):
        return 2

    def read(self, i):
        image = Image.new("RGB", ((90, 60), (60, 120))[i])
        image.paste((255, 255, 255), (15, 30, 45, 45))
        return image

    def objects(self, i):
        masks = np.zeros((2, *((60, 90), (120, 60))[i]), bool)
        masks[0, 30:45, 15:45] = True
        return dict(boxes=np.float32([[15, 30, 45, 45], [0, 0, 9, 9]]), labels=np.array([1, 1]), masks=masks,
                    difficult=np.array([True, False]), crowd=np.array([False, True]))


def test_boxes_and_masks_follow_their_image():
    seen = set()
    for epoch in range(12):
        some = examples.Examples(Boxed(), (30, 40), 70, seed=5, masks=True)
        index, pixels, target = some[epoch, 1, 0]
        assert index == 0 and target["original"] == (60, 90) and target["labels"].tolist() == [1]  # no crowd
        h, w = pixels.shape[1:]
        assert (w, h) in ((45, 30), (60, 40))
        x1, y1, x2, y2 = target["boxes"][0]
        white = (pixels[0] > 127).nonzero()
        edges = [white[:, 1].min(), white[:, 0].min(), white[:, 1].max() + 1, white[:, 0].max() + 1]
        assert np.abs(np.array([x1, y1, x2, y2]) - [int(e) for e in edges]).max() <= 0.51
        mask = target["masks"][0]
        rows, columns = mask.nonzero()
        assert np.abs(np.array([columns.min(), rows.min()]) - [x1, y1]).max() <= 0.51
        seen.add((h, bool(x1 < w / 3)))
        again = some[epoch, 1, 0][2]
        assert again["seed"] == target["seed"] and np.array_equal(again["boxes"], target["boxes"])
    assert len(seen) == 4  # two sizes, flipped and not
    _, pixels, target = examples.Examples(Boxed(), (30, 40), 70)[0, 1, 1]  # nothing is drawn at test
    assert pixels.shape == (3, 70, 35) and set(target) == {"original"}  # the long side is at most 70


def test_a_batch_is_padded_by_zeros_behind_the_normalisation():
    pixels = [torch.full((3, 20, 40), 255, dtype=torch.uint8), torch.zeros(3, 33, 10, dtype=torch.uint8)]
    x, sizes, _ = examples.batch(pixels, [{}, {}], HOW, torch.float64)
    assert x.shape == (2, 3, 64, 64) and sizes == [(20, 40), (33, 10)] and x.dtype == torch.float64
    assert (x[0, :, :20, :40] == 2).all() and (x[1, :, :33, :10] == -2).all()
    assert x.count_nonzero() == 3 * (20 * 40 + 33 * 10)


def test_pairs_are_alike_and_an_order_has_all_images():
    wide = np.random.default_rng(0).random(101) < 0.4
    order = examples.in_pairs(wide, 3, 7)
    assert sorted(order) == list(range(101)) and list(order) != list(examples.in_pairs(wide, 3, 8))
    assert list(order) == list(examples.in_pairs(wide, 3, 7))
    pairs = wide[order[:100]].reshape(50, 2)
    assert (pairs[:, 0] != pairs[:, 1]).sum() <= 1 and 0 < pairs.all(axis=1)[:25].sum() < 25  # mixed


# ---- files


def xml(size, *objects):
    items = "".join(f"<object><name>{name}</name>{extra}<bndbox><xmin>{a}</xmin><ymin>{b}</ymin>"
                    f"<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
                    for name, extra, (a, b, c, d) in objects)
    width, height = size
    return f"<annotation><size><width>{width}</width><height>{height}</height></size>{items}</annotation>"


def picture(path, size, grey=False):
    rng = np.random.default_rng(len(str(path)))
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] if grey else (*size[::-1], 3)
    Image.fromarray(rng.integers(0, 255, shape, dtype=np.uint8)).save(path)


HARD = "<difficult>1</difficult>"


def devkit(root):
    """A VOCdevkit of four training images, one of them without objects and one grey, and four of test, one
    of them unreadable and one without objects."""
    images = {
        ("VOC2007", "trainval", "000001"): ((60, 48), [("dog", "", (1, 1, 60, 48)),
                                                       ("cat", HARD, (5, 6, 20.5, 30))]),
        ("VOC2007", "trainval", "000002"): ((48, 60), []),
        ("VOC2012", "trainval", "2008_000001"): ((48, 60), [("cat", "", (9, 9, 40, 40)),
                                                            ("dog", "", (7, 7, 6, 9))]),
        ("VOC2012", "trainval", "2008_000002"): ((50, 50), [("dog", "", (11, 5, 42, 45))]),
        ("VOC2007", "test", "000003"): ((60, 48), [("dog", "", (3, 3, 40, 40)), ("cat", HARD, (2, 2, 9, 9))]),
        ("VOC2007", "test", "000004"): ((64, 40), [("cat", "", (3, 3, 40, 30))]),
        ("VOC2007", "test", "000005"): ((40, 64), [("cat", "", (3, 3, 30, 40))]),
        ("VOC2007", "test", "000006"): ((40, 64), [])}
    for (year, split, name), (size, objects) in images.items():
        folder = root / year
        for part in ("ImageSets/Main", "Annotations"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        with open(folder / "ImageSets" / "Main" / f"{split}.txt", "a") as file:
            file.write(f"{name}\n")
        (folder / "Annotations" / f"{name}.xml").write_text(xml(size, *objects))
        picture(folder / "JPEGImages" / f"{name}.jpg", size, grey=name == "2008_000002")
    (root / "VOC2007" / "JPEGImages" / "000004.jpg").write_text("no image")
    return root


def coco(root):
    """A COCO of three training images, one with a crowd alone, and three of test, one unreadable and one
    without objects. Classes have the ids 3 and 90."""
    square = [[10, 10, 40, 10, 40, 40, 10, 40]]
    crowd = {"counts": [0, 100, 60 * 48 - 100], "size": [48, 60]}
    for split, numbers in (("train2017", (7, 9, 12)), ("val2017", (20, 21, 22))):
        images = [{"id": i, "file_name": f"{i:012}.jpg", "width": 60, "height": 48} for i in numbers]
        a, b, c = numbers
        rows = [(a, 90, [10, 10, 30, 30], 0, square), (a, 3, [0, 0, 60, 48], 1, crowd),
                (b, 3, [5, 6, 20, 0], 0, square), (b, 3, [5, 6, 20, 30], 0, [[5, 6, 25, 6, 25, 36, 5, 36]])]
        if split == "train2017":
            rows.append((c, 3, [1, 1, 30, 30], 1, crowd))
        annotations = [{"id": k, "image_id": i, "category_id": label, "bbox": box, "iscrowd": many,
                        "area": box[2] * box[3], "segmentation": outline}
                       for k, (i, label, box, many, outline) in enumerate(rows, 1)]
        content = {"images": images[::-1], "annotations": annotations,
                   "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}]}
        (root / "annotations").mkdir(parents=True, exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for i in numbers:
            picture(root / split / f"{i:012}.jpg", (60, 48), grey=i == 9)
    (root / "val2017" / f"{21:012}.jpg").write_text("no image")
    return root


def test_voc_is_read_from_zero(tmp_path, capsys):
    train, test = open_voc(devkit(tmp_path / "VOCdevkit").parent)  # the folder around it, too
    assert train.classes == test.classes == ["cat", "dog"]
    assert (len(train), len(test)) == (3, 4)  # without the image that has no objects; test keeps it
    first = train.objects(0)
    assert first["boxes"].tolist() == [[0, 0, 60, 48], [4, 5, 20.5, 30]]  # the first is the whole image
    assert first["labels"].tolist() == [2, 1] and first["difficult"].tolist() == [False, True]
    assert train.objects(1)["labels"].tolist() == [1]  # a box without area is left out
    assert len(test.objects(3)["boxes"]) == 0 and test.objects(3)["boxes"].shape == (0, 4)
    assert train.wide.tolist() == [True, False, True] and train.read(2).mode == "RGB"
    assert train.paths[1] == "VOC2012/JPEGImages/2008_000001.jpg"
    out = capsys.readouterr().out
    assert "1 boxes have no area and are left out" in out
    assert "1 of 4 images have no object to train on and are left out" in out


def test_coco_is_read_with_its_gaps_and_back(tmp_path, capsys):
    train, test = open_coco(coco(tmp_path))
    assert train.classes == ["car", "toothbrush"] and train.ids == [3, 90]
    assert train.numbers == [7, 9] and test.numbers == [20, 21, 22]  # a crowd alone is nothing to train on
    found = train.objects(0)
    assert found["labels"].tolist() == [2, 1] and found["crowd"].tolist() == [False, True]
    assert [train.ids[label - 1] for label in found["labels"]] == [90, 3]
    assert found["boxes"][0].tolist() == [10, 10, 40, 40]
    masks = train.masks(0, np.array([True, True]))
    assert masks.shape == (2, 48, 60) and masks[0, 10:40, 10:40].all() and masks[0].sum() == 900
    assert masks[1].sum() == 100  # runs go down the columns
    assert masks[1, :, :2].all()
    assert train.objects(1)["boxes"].tolist() == [[5, 6, 25, 36]]
    assert examples.Examples(train, (48,), 99, masks=True).objects(0)[0].tolist() == [[10, 10, 40, 40]]
    assert "1 boxes have no area" in capsys.readouterr().out


# ---- training


def tiny(network, dtype=torch.float64):
    torch.manual_seed(1)
    trunk = resnet10(width=WIDTH, stem="small" if network is detector.c4 else "imagenet")
    sides = (12, 20, 32) if network is detector.c4 else (8, 16, 32, 64, 128)
    return network(trunk, 6, sides, 4, **COUNTS).to(dtype)


def tune(network, batch_size, iterations, queries):
    """Losses, weights and what is found on scenes, of all ranks."""
    p = replace(PRESETS["small"], network=network, iterations=iterations, batch_size=batch_size, warmup=2,
                lr=0.01, reestimate=1, norm_decay=0.0)
    args = eval_detection.arguments(["trunk", "--seed", "3"])
    images, model, losses = Scenes("train", 20), tiny(network), []
    loader = eval_detection.data.Loader(examples.Examples(images, p.sizes, 64, 3, model.roi_heads.has_mask()),
                                        collate=examples.collate)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(dense, "LOG_EVERY", 1)
        patch.setattr(dense, "say", lambda line: losses.append(float(line.split()[3])))
        progress = Progress(Path(folder), "", {}, 10, fresh=True)
        losses.append(eval_detection.train(model, p, loader, images, args, HOW, progress))
        rows, *_ = found.detect(model, Scenes("val", queries), p, HOW, progress.fetch) if queries else [None]
    return losses, model.state_dict(), rows


@pytest.mark.parametrize("words", ((detector.c4, 4, 3, 30), (detector.fpn, 2, 1, 0)), ids=("c4", "fpn"))
def test_two_ranks_equal_one(words):
    losses, weights, rows = tune(*words)
    assert len(set(losses)) > words[2]
    (other, state, theirs), (_, _, none) = ranks(2, tune, *words)
    assert other == [*losses[:-1], pytest.approx(losses[-1], rel=1e-9)]
    for name, tensor in weights.items():
        torch.testing.assert_close(state[name], tensor, rtol=1e-6, atol=1e-9, msg=name)
    if rows is not None:
        assert len(rows) > 20 and len(none) == 0 and set(rows[:, 0]) == set(range(6))

        def by_image(table):
            return table[np.lexsort((-table[:, 2], table[:, 0]))]

        np.testing.assert_allclose(by_image(theirs), by_image(rows), rtol=1e-5, atol=1e-6)


SMALL = ("--iterations", 6, "--batch-size", 4, *CPU)


def test_a_killed_training_goes_on_to_the_same_end(tmp_path, backbone, monkeypatch, capsys):
    command = (backbone, "--data", "scenes:12", *SMALL, "--reestimate", 2, "--out")
    whole, out = evaluate(capsys, eval_detection, *command, tmp_path / "whole")
    assert json.loads(out.splitlines()[-1]) == whole  # printed last
    # in the first step, in the middle, while statistics are estimated, while it is judged
    again = goes_on_after_kills(monkeypatch, capsys, eval_detection, *command, tmp_path / "killed",
                                kills=(1, 4, 10, 13))
    assert again == whole and not list((tmp_path / "killed").glob("*progress*"))
    assert json.loads((tmp_path / "killed" / "eval_detection_small.json").read_text()) == whole
    with Image.open(tmp_path / "whole" / "eval_detection_small.png") as sheet:
        assert sheet.size == (3 * 192 + 8, 2 * 196 - 4)  # two held-out scenes
    assert whole["method"] == "swav" and whole["images"] == 12 and whole["queries"] == 2
    assert evaluate(capsys, eval_detection, *command, tmp_path / "other", "--workers", 2)[0] == whole
    random, _ = evaluate(capsys, eval_detection, *command, tmp_path / "whole", "--random-init")
    assert random["method"] == "random weights" and random["loss"] != whole["loss"]
    assert (tmp_path / "whole" / "eval_detection_small_random.json").exists()


def test_two_scenes_are_learnt(tmp_path, capsys, monkeypatch):
    trunk = export(tmp_path / "backbone.pt", width=0.25, resize=64, size=64)
    monkeypatch.setitem(PRESETS, "small", replace(PRESETS["small"], open=lambda spec: (
        Scenes("train", 2), Scenes("train", 2)), rois=16))
    record, _ = evaluate(capsys, eval_detection, trunk, "--data", "scenes", *CPU, "--iterations", 100, "--lr",
                         0.05, "--batch-size", 2, "--out", tmp_path)
    assert record["ap50"] > 50


# ---- files end to end


def little(monkeypatch):
    """The presets, for images and networks that a CPU can train a few steps on."""
    for name in ("voc0712_24k", "coco_fpn_1x"):
        sides = (8, 16, 32, 48, 64)
        monkeypatch.setitem(PRESETS, name, replace(
            PRESETS[name], sizes=(32, 48), longest=64, sides=sides, region=4, before=(60, 60), after=(20, 20),
            rois=8, reestimate=0, batch_size=2, lr=0.01))


def detection_main(*arguments):
    eval_detection.main(eval_detection.arguments([str(a) for a in arguments]))


def judged_on_two_ranks(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        little(patch)
        detection_main(*arguments)


@pytest.mark.parametrize("preset, make", (("voc0712_24k", devkit), ("coco_fpn_1x", coco)))
def test_files_are_judged_alike_on_one_rank_and_on_two(tmp_path, large_stem, capsys, monkeypatch, preset,
                                                       make):
    if make is coco:
        pytest.importorskip("pycocotools")
    little(monkeypatch)
    command = (large_stem, "--preset", preset, "--data", make(tmp_path / "data"), "--iterations", 2, *CPU,
               "--out")
    one, two = tmp_path / "one", tmp_path / "two"
    fetch, calls = Progress.fetch, []

    def killing(progress, *more):
        calls.append(0)
        if len(calls) == 4:  # two steps and the end of them, then the first images to judge by
            progress.save()
            raise Killed
        return fetch(progress, *more)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Progress, "fetch", killing)
        run_here(eval_detection, *command, one)
    two.mkdir()
    for file in one.iterdir():
        (two / file.name).write_bytes(file.read_bytes())
    record, out = evaluate(capsys, eval_detection, *command, one)
    assert "going on from" in out
    assert "warning: 1 images of the held-out set cannot be read and are left out" in out
    ranks(2, judged_on_two_ranks, *command, two)
    name = f"eval_detection_{preset}.json"
    assert json.loads((two / name).read_text()) == record == json.loads((one / name).read_text())
    assert {"ap", "ap50", "ap75"} <= set(record) and record["classes"] == 2
    assert ("mask_ap50" in record) == (make is coco) and len(record["class_ap50"]) == 2


def test_perfect_boxes_have_perfect_figures(tmp_path, capsys):
    _, test = open_voc(devkit(tmp_path / "voc"))
    rows = np.array([[i, label, 0.9, *box] for i in range(len(test)) for box, label in
                     zip(test.objects(i)["boxes"], test.objects(i)["labels"])], np.float64)
    result = found.figures(test, boxes.VOC07, rows[::-1], [], {1})  # not those of the unreadable image
    assert result["ap"] == result["ap50"] == 100 and result["class_ap50"] == [100, 100]
    missing = found.figures(test, boxes.VOC07, rows[rows[:, 0] != 2], [], {1})
    assert missing["class_ap50"] == [0, 100]


def test_perfect_masks_have_perfect_figures(tmp_path, capsys):
    pytest.importorskip("pycocotools")
    _, test = open_coco(coco(tmp_path))
    objects = [(i, test.objects(i), test.masks(i, np.ones(len(test.objects(i)["labels"]), bool)))
               for i in range(3)]
    rows = np.array([[i, label, 0.9, *box] for i, found_in, _ in objects for box, label in
                     zip(found_in["boxes"], found_in["labels"])], np.float64)
    masks = [code for *_, image in objects for code in found.encode(torch.from_numpy(image))]
    result = found.figures(test, None, rows, masks, {1})
    # of the readable ones, a toothbrush counts and a crowd of cars does not
    assert result["ap"] == result["mask_ap"] == pytest.approx(100)
    assert result["class_ap50"] == [None, 100.0]
    assert found.figures(test, None, rows[:0], [], set())["ap50"] == 0


# ---- what a user types


def test_errors(tmp_path, backbone, large_stem, capsys, monkeypatch):
    root, images = devkit(tmp_path / "voc"), coco(tmp_path / "coco")
    other = export(tmp_path / "alexnet.pt", alexnet("deepcluster", sobel=True), arch="alexnet", sobel=True,
                   variant="deepcluster", width=1, size=224, resize=256)
    voc = ("--preset", "voc0712_24k", "--iterations", 1, "--batch-size", 2)
    own = (backbone, "--data", "scenes:12")
    (tmp_path / "bad").mkdir()
    refuses(capsys, eval_detection, (
        ((*own, "--iterations", 0), 2, "--iterations 0"),
        ((*own, "--batch-size", 1), 2, "--batch-size 1"),
        ((*own, "--reestimate", -1), 2, "--reestimate -1"),
        ((*own, "--lr", "nan"), 2, "--lr nan: more than 0"),
        ((*own, "--preset", "moco"), 2, "invalid choice: 'moco'"),
        ((backbone, "--data", "shapes"), 3, "--data shapes: this preset is for scenes"),
        ((backbone, "--data", "scenes:x"), 3, "scenes:x: a number of images"),
        ((*own, "--batch-size", 16), 3, "--data has 12 images, fewer than one batch: --batch-size 16"),
        ((backbone, *voc, "--data", root), 2, "has a small stem: --preset voc0712_24k needs one of stride 4"),
        ((other, "--data", "scenes:12"), 2, "is no ResNet of common/resnet.py (AlexNet)"),
        ((large_stem, "--preset", "voc0712_24k"), 2, "--data is needed: the folder of voc0712_24k"),
        ((large_stem, *voc, "--data", tmp_path / "bad"), 3, "is no VOCdevkit: VOC2007 and VOC2012"),
        ((large_stem, "--preset", "coco_fpn_1x", "--data", root), 3, "train2017.json cannot be read"),
    ))
    annotation = root / "VOC2007" / "Annotations" / "000003.xml"
    annotation.write_text(annotation.read_text().replace("dog", "yeti"))
    refuses(capsys, eval_detection, [((large_stem, *voc, "--data", root), 3, "class 'yeti' of test")])
    annotation.write_text("<annotation>")
    refuses(capsys, eval_detection, [((large_stem, *voc, "--data", root), 3, "000003.xml cannot be read")])
    (root / "VOC2012" / "JPEGImages" / "2008_000001.jpg").unlink()
    annotation.write_text(xml((60, 48)))
    refuses(capsys, eval_detection, [((large_stem, *voc, "--data", root), 3, "1 of 3 images are missing")])
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    command = (large_stem, "--preset", "coco_fpn_1x", "--data", images)
    refuses(capsys, eval_detection, [(command, 2, "COCO needs pycocotools: pip install pycocotools")])
    assert distributed.world_size() == 1


def test_images_that_cannot_be_read_are_replaced_or_end_it(tmp_path, large_stem, capsys, monkeypatch):
    little(monkeypatch)
    root = devkit(tmp_path / "voc")
    command = (eval_detection, large_stem, "--preset", "voc0712_24k", "--data", root, "--iterations", 2, *CPU)
    (root / "VOC2007" / "JPEGImages" / "000001.jpg").write_text("no image")
    _, out = evaluate(capsys, *command)
    assert "warning: 1 images of --data cannot be read and were replaced by their neighbours" in out
    for path in (root / "VOC2007" / "JPEGImages").iterdir():
        path.write_text("no image")
    refuses(capsys, eval_detection, [(command[1:], 3, "no held-out image can be read")])
    for path in (root / "VOC2012" / "JPEGImages").iterdir():
        path.write_text("no image")
    refuses(capsys, eval_detection, [(command[1:], 3, "images of --data in a row cannot be read")])


def test_a_batch_of_nothing_has_a_loss():
    for network in (detector.c4, detector.fpn):
        model = tiny(network, torch.float32)
        x, sizes, targets = examples.batch([torch.zeros(3, 32, 32, dtype=torch.uint8)] * 2,
                                           [examples.nothing()] * 2, HOW, torch.float32)
        losses = torch.stack(list(model(x, sizes, targets).values()))
        assert losses.isfinite().all() and (losses > 0).all()  # every head sees something


def test_a_loss_that_is_not_finite_is_said(backbone, capsys):
    assert run_here(eval_detection, backbone, "--data", "scenes:12", *SMALL, "--lr", 1e30) == 5
    assert "the loss is not finite: lower --lr" in capsys.readouterr().err


def test_larger_scenes_have_larger_anchors():
    p = eval_detection.enlarged(PRESETS["small"], 4)
    assert (p.sizes, p.longest, p.sides) == ((256,), 256, (48, 80, 128))
