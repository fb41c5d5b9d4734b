"""The embedded scenes: image, label map, masks and boxes say the same, in every process."""

import hashlib

import numpy as np
import pytest
from helpers import ranks

from common.sources.scenes import SMALLEST, Scenes, drawn


def digest(count):
    """Of all that the first scenes of both splits hold."""
    found = hashlib.sha256()
    for split in ("train", "val"):
        scenes = Scenes(split, 5 * count)
        for i in reversed(range(count)):
            parts = [np.asarray(scenes.read(i)), scenes.label_map(i), *scenes.objects(i).values()]
            found.update(b"".join(part.tobytes() for part in parts))
    return found.hexdigest()


def test_masks_boxes_and_label_map_agree():
    scenes = Scenes("train", 200)
    counts, labels, ring, covered = [], [], 0, 0
    for i in range(len(scenes)):
        label_map, objects = scenes.label_map(i), scenes.objects(i)
        masks, boxes = objects["masks"], objects["boxes"]
        n = len(objects["labels"])
        assert masks.shape == (n, 64, 64) and boxes.shape == (n, 4) and masks.sum(0).max() == 1
        assert (masks.sum((1, 2)) >= SMALLEST).all()
        assert not objects["difficult"].any() and not objects["crowd"].any()
        for mask, (x1, y1, x2, y2), label in zip(masks, boxes.astype(int), objects["labels"]):
            assert mask[y1:y2, x1:x2].sum() == mask.sum()  # nothing outside, nothing to spare
            assert all(edge.any() for edge in (mask[y1], mask[y2 - 1], mask[:, x1], mask[:, x2 - 1]))
            assert set(label_map[mask]) - {255} == {label}
        assert set(label_map[~masks.any(0)]) <= {0, 255}
        counts.append(n)
        labels += objects["labels"].tolist()
        ring += (label_map == 255).mean() / len(scenes)
        covered += masks.any(0).mean() / len(scenes)
    assert set(counts) == {1, 2, 3} and set(labels) == {1, 2, 3, 4, 5, 6} and 1.7 < np.mean(counts) < 2.1
    assert 0.01 < ring < 0.1 and 0.1 < covered < 0.25
    assert {box.dtype for box in scenes.objects(0).values()} == {np.dtype(kind) for kind in
                                                                 (np.float32, np.int64, bool)}


def test_what_is_labelled_can_be_seen():
    """The pixels of an object differ from those around it."""
    scenes = Scenes("val", 100)
    for i in range(len(scenes)):
        pixels, label_map = np.asarray(scenes.read(i), float), scenes.label_map(i)
        assert pixels.shape == (64, 64, 3) and label_map.dtype == np.uint8
        edges = np.abs(np.diff(pixels, axis=1)).sum(2)
        at_ring = (label_map == 255)[:, 1:]
        assert edges[at_ring].mean() > 1.2 * edges[~at_ring].mean(), i


def test_a_scene_is_a_function_of_split_and_index():
    first = digest(12)
    drawn.cache_clear()
    np.random.seed(1)
    assert {first} == {digest(12), *ranks(2, digest, 12)}
    scenes = [Scenes(split).read(i).tobytes() for split in ("train", "val") for i in range(40)]
    assert len(set(scenes)) == 80
    assert (len(Scenes("train")), len(Scenes("val")), len(Scenes("val", 3))) == (2000, 400, 1)


@pytest.mark.parametrize("what", [lambda s: s.label_map(3), lambda s: s.objects(3)["labels"]])
def test_what_is_returned_may_be_changed(what):
    scenes = Scenes("train")
    before = what(scenes).copy()
    what(scenes)[:] = 7
    assert (what(scenes) == before).all()
