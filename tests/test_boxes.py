"""boxes.py: average precision by hand, by the rules of VOC, and beside pycocotools."""

import contextlib
import io

import numpy as np
import pytest

from common.evaluation.boxes import COCO, IOU, VOC07, Judge, average_precision, iou, match


def objects(*boxes, labels=None, difficult=(), crowd=()):
    n = len(boxes)
    flags = [np.isin(np.arange(n), where) for where in (difficult, crowd)]
    return {"boxes": np.array(boxes, np.float32).reshape(n, 4),
            "labels": np.ones(n, np.int64) if labels is None else np.array(labels),
            "difficult": flags[0], "crowd": flags[1]}


def detections(*boxes, scores, labels=None):
    n = len(boxes)
    return {"boxes": np.array(boxes, np.float32).reshape(n, 4), "scores": np.array(scores, np.float64),
            "labels": np.ones(n, np.int64) if labels is None else np.array(labels)}


def judged(rule, *pairs, classes=1):
    judge = Judge(classes, rule)
    for found, truth in pairs:
        judge.add(found, truth)
    return judge


# ---- the rules of VOC


A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (40, 0, 50, 10)


def test_voc_by_hand():
    """Three images; in the order of scores: right, neither (difficult), false (a second hit), right, false
    (nothing there). Three objects count, two are found."""
    pairs = [(detections(A, B, scores=(0.9, 0.8)), objects(A, B, difficult=[1])),
             (detections(A, (0, 0, 10, 7.5), scores=(0.6, 0.95)), objects(A)),
             (detections(C, scores=(0.3,)), objects(B))]
    # 0.95 right, 0.9 right, (0.8 neither), 0.6 false, 0.3 false: precision 1 up to recall 2/3
    judge = judged(VOC07, *pairs)
    assert judge.objects.tolist() == [3]
    assert judge.class_ap()[0, 0] == pytest.approx(7 / 11, rel=1e-12)  # recall 0 .. 0.6
    # a box of 7.5 rows of 10 is no match at IoU 0.75, which is not more than 0.75: false, right, right, false
    assert IOU[5] == 0.75 and judge.class_ap()[0, 5] == pytest.approx(2 / 3 * 7 / 11, rel=1e-12)


def test_an_overlap_of_exactly_t_is_a_match_for_coco_alone():
    half = np.array([[0.5]])
    none, never = np.zeros(1, bool), np.zeros(1, bool)
    assert match(half, none, never, (0.5,), True).tolist() == [[0]]
    assert match(half, none, never, (0.5,), False).tolist() == [[1]]
    box = np.array([[0, 0, 10, 10.0]]), np.array([[0, 0, 10, 20.0]])
    assert iou(*box, none).item() == 0.5


def test_a_second_hit_is_false_for_voc_and_takes_the_next_object_for_coco():
    overlap = np.array([[0.9, 0.6], [0.8, 0.6]])  # both detections are nearest to the first object
    plain = np.zeros(2, bool)
    assert match(overlap, plain, plain, (0.5,), True).tolist() == [[1, 0]]
    assert match(overlap, plain, plain, (0.5,), False).tolist() == [[1, 1]]
    # of equal ones COCO takes the last
    assert match(np.array([[0.6, 0.6], [0.7, 0.4]]), plain, plain, (0.5,), False).tolist() == [[1, 1]]


def test_difficult_objects_are_neither_found_nor_missed():
    pair = detections(A, A, B, scores=(0.9, 0.8, 0.7)), objects(A, B, difficult=[0])
    judge = judged(VOC07, pair)
    assert judge.objects.tolist() == [1] and judge.class_ap()[0, 0] == pytest.approx(1.0)


def test_precision_is_read_as_the_rules_say():
    scores, hits = np.array([0.9, 0.8, 0.7, 0.6]), np.array([[1, 0, 1, 0]])
    levels = VOC07.levels
    assert average_precision(scores, hits, 4, levels)[0] == pytest.approx((3 + 3 * 2 / 3) / 11)
    assert np.isnan(average_precision(scores, hits, 0, levels)).all()
    assert average_precision(np.zeros(0), np.zeros((1, 0)), 3, levels)[0] == 0.0
    equal = average_precision(np.array([0.5, 0.5]), np.array([[0, 1]]), 1, levels)[0]
    assert equal == 0.5  # the first of equal scores comes first


def test_a_class_without_an_object_is_in_no_mean():
    judge = judged(COCO, (detections(A, B, scores=(0.9, 0.8), labels=(1, 2)), objects(A)), classes=3)
    figures = judge.figures()
    assert figures["class_ap50"] == [100.0, None, None] and figures["ap"] == figures["ap50"] == 100.0
    assert judged(COCO, classes=2).figures()["ap50"] == 0.0  # nothing at all


# ---- beside pycocotools


def random_images(rng, images=40, classes=3):
    """Objects, some of them difficult or crowds, and detections near them, with many equal scores."""
    for _ in range(images):
        n, extra = rng.integers(0, 7), rng.integers(0, 9)
        corners = rng.integers(0, 40, (n, 2)).astype(float)
        boxes = np.concatenate([corners, corners + rng.integers(4, 30, (n, 2))], axis=1)
        truth = objects(*boxes, labels=rng.integers(1, classes + 1, n),
                        difficult=np.flatnonzero(rng.random(n) < 0.2),
                        crowd=np.flatnonzero(rng.random(n) < 0.2))
        near = boxes[rng.integers(0, n, extra)] + rng.integers(-1, 2, (extra, 4)) if n else np.zeros((0, 4))
        near[:, 2:] = np.maximum(near[:, 2:], near[:, :2] + 1)
        labels = rng.integers(1, classes + 1, len(near))
        yield detections(*near, scores=rng.integers(1, 6, len(near)) / 5, labels=labels), truth


def by_pycocotools(pairs, classes):
    from pycocotools.coco import COCO as Set
    from pycocotools.cocoeval import COCOeval

    def boxes(part):
        return [[float(v) for v in (a, b, c - a, d - b)] for a, b, c, d in part["boxes"].astype(np.float64)]

    annotations, found = [], []
    for i, (detected, truth) in enumerate(pairs, 1):
        for box, label, hard, crowd in zip(boxes(truth), *(truth[k] for k in ("labels", "difficult",
                                                                              "crowd"))):
            # difficult: beyond the range of areas, which the evaluation ignores
            area = 1e12 if hard and not crowd else box[2] * box[3]
            annotations.append({"id": len(annotations) + 1, "image_id": i, "category_id": int(label),
                                "bbox": box, "area": area, "iscrowd": int(crowd)})
        found += [{"image_id": i, "category_id": int(label), "bbox": box, "score": float(score)}
                  for box, label, score in zip(boxes(detected), detected["labels"], detected["scores"])]
    truth = Set()
    truth.dataset = {"images": [{"id": i} for i in range(1, len(pairs) + 1)], "annotations": annotations,
                     "categories": [{"id": c} for c in range(1, classes + 1)]}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        judge = COCOeval(truth, truth.loadRes(found), "bbox")
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    precision = judge.eval["precision"][:, :, :, 0, -1]  # (T, R, C)
    return judge.stats[:3], precision.mean(axis=1).T


@pytest.mark.parametrize("seed", range(4))
def test_coco_is_that_of_pycocotools(seed):
    pytest.importorskip("pycocotools")
    pairs = list(random_images(np.random.default_rng(seed)))
    judge = judged(COCO, *pairs, classes=3)
    stats, each = by_pycocotools(pairs, 3)
    assert 0.02 < stats[0] < 0.95  # neither nothing nor all
    np.testing.assert_allclose(judge.class_ap(), each, atol=1e-12)
    figures = judge.figures()
    np.testing.assert_allclose([figures[k] / 100 for k in ("ap", "ap50", "ap75")], stats, atol=1e-12)


def test_only_the_best_hundred_count():
    pytest.importorskip("pycocotools")
    rng = np.random.default_rng(9)
    boxes = np.concatenate([np.tile(A, (120, 1)), [B]])
    scores = np.concatenate([rng.random(120) + 1, [0.5]])
    pairs = [(detections(*boxes, scores=scores), objects(A, B))]
    assert by_pycocotools(pairs, 1)[0][1] == pytest.approx(judged(COCO, *pairs).figures()["ap50"] / 100)
    assert judged(VOC07, *pairs).figures()["ap50"] > judged(COCO, *pairs).figures()["ap50"]
