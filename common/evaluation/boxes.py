"""Average precision of boxes by the rules of VOC and COCO. Needs NumPy alone: one file to copy.

    judge = Judge(classes=6, rule=COCO)
    judge.add(found, truth)      # of each image
    judge.figures()              # {"ap": .., "ap50": .., "ap75": .., "class_ap50": [..]}, in percent

Boxes are (n, 4) x1 y1 x2 y2 with x2 and y2 exclusive. The two rules differ in how a detection is matched to
an object, and in the recalls at which precision is read.
"""

from dataclasses import dataclass

import numpy as np

IOU = tuple(np.linspace(0.5, 0.95, 10))


@dataclass(frozen=True)
class Rule:
    """strict (VOC): a detection matches the object that it overlaps most, if IoU > t; a second match of an
    object is false. Else (COCO): it matches the best object that is still free, if IoU >= t. levels: recalls
    to read the precision at. most: detections per class and image that count."""

    strict: bool
    levels: tuple
    most: int | None = None


# 0.3, 0.6 and 0.7 are a little more than 3, 6 and 7 tenths, as in the official code
VOC07 = Rule(True, tuple(np.arange(0, 1.1, 0.1)))  # 11 points
COCO = Rule(False, tuple(np.linspace(0, 1, 101)), 100)


def iou(found, truth, crowd):
    """Returns IoU (n, m) of found (n, 4) and truth (m, 4); for a crowd the detection's share inside it."""
    corner = np.minimum(found[:, None, 2:], truth[None, :, 2:])  # (n, m, 2)
    sides = (corner - np.maximum(found[:, None, :2], truth[None, :, :2])).clip(min=0)
    common = sides.prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(axis=1) for boxes in (found, truth)]
    union = areas[0][:, None] + areas[1] - common
    return common / np.maximum(np.where(crowd, areas[0][:, None], union), 1e-300)


def match(overlap, crowd, ignored, thresholds, strict):
    """Classifies the detections of one class in one image at each IoU: (T, n) 1 right, 0 false, -1 ignored.

    overlap (n, m): IoU with the objects of that class, the best detection first. ignored (m,): objects that
    count neither as found nor as missed (difficult ones, crowds). crowd (m,): many detections may match it.
    """
    results = np.zeros((len(thresholds), len(overlap)), np.int8)
    if not overlap.size:
        return results
    if not strict:  # objects that count come first, otherwise in their order
        order = np.argsort(ignored, kind="stable")
        overlap, crowd, ignored = overlap[:, order], crowd[order], ignored[order]
    for row, t in enumerate(thresholds):
        taken = np.zeros(len(ignored), bool)
        for i, values in enumerate(overlap):
            if strict:
                best = values.argmax()
                found = values[best] > t
                results[row, i] = found and (-1 if ignored[best] else not taken[best])
            else:
                fits = (values >= min(t, 1 - 1e-10)) & (crowd | ~taken)
                if (fits & ~ignored).any():  # prefer an object that counts
                    fits &= ~ignored
                found = fits.any()
                best = len(fits) - 1 - np.where(fits, values, -1)[::-1].argmax()  # the last of equal ones
                results[row, i] = found and (-1 if ignored[best] else 1)
            taken[best] |= found
    return results


def average_precision(scores, hits, objects, levels):
    """Returns (T,) of one class. scores (n,); hits (T, n) from match; objects: number to be found.

    Equal scores keep their order. NaN if there is no object.
    """
    order = np.argsort(-scores, kind="stable")
    result = np.full(len(hits), np.nan)
    for row, hit in enumerate(hits[:, order] if objects else ()):
        right = np.cumsum(hit[hit >= 0] == 1)  # right ones among the first 1, 2 .. detections
        recall, precision = right / objects, right / np.arange(1, len(right) + 1)
        envelope = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        result[row] = envelope[np.searchsorted(recall, levels)].mean()
    return result


class Judge:
    """Computes average precision over the images added. Of equal scores, the one that was added first ranks
    first."""

    def __init__(self, classes, rule, thresholds=IOU):
        self.rule, self.thresholds = rule, thresholds
        self.found = [[] for _ in range(classes)]  # (scores (n,), hits (T, n)) of each image
        self.objects = np.zeros(classes, np.int64)

    def add(self, found, truth):
        """Adds an image. found: boxes (n, 4), scores (n,), labels (n,) from 1. truth: boxes (m, 4), labels
        (m,), difficult and crowd (m,) bool."""
        ignored = truth["difficult"] | truth["crowd"]
        order = np.argsort(-found["scores"], kind="stable")
        for c in np.union1d(found["labels"], truth["labels"]).tolist():
            mine = order[found["labels"][order] == c][: self.rule.most]
            there = truth["labels"] == c
            boxes = [np.asarray(x, np.float64) for x in (found["boxes"][mine], truth["boxes"][there])]
            crowd = truth["crowd"][there]
            hits = match(iou(*boxes, crowd), crowd, ignored[there], self.thresholds, self.rule.strict)
            self.found[c - 1].append((found["scores"][mine], hits))
            self.objects[c - 1] += (~ignored[there]).sum()

    def class_ap(self):
        """Returns AP (C, T) between 0 and 1. NaN: a class without an object."""
        empty = np.zeros(0), np.zeros((len(self.thresholds), 0), np.int8)
        return np.stack([average_precision(*(np.concatenate(x, axis=-1) for x in zip(empty, *images)),
                                           objects, self.rule.levels)
                         for images, objects in zip(self.found, self.objects.tolist())])

    def figures(self):
        """Returns means in percent over the classes that have an object: over all IoUs, at 0.50, at 0.75."""
        ap = 100 * self.class_ap()
        mean = ap[self.objects > 0].mean(axis=0) if self.objects.any() else np.zeros(len(self.thresholds))
        return {"ap": float(mean.mean()), "ap50": float(mean[0]), "ap75": float(mean[5]),
                "class_ap50": [None if np.isnan(x) else round(float(x), 4) for x in ap[:, 0]]}
