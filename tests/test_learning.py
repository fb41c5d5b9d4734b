"""Training teaches something: the shapes recipe on a third of its images, about a minute on two cores."""

import pytest
import torch
from helpers import metrics, swav_here

from common.data import Shapes
from common.features import knn_accuracy
from common.multicrop import to_tensor


def test_swav_learns_shapes(tmp_path):
    images, held_out = Shapes("train", 3000), Shapes("val", 3000)
    rows = [torch.stack([to_tensor(s.read(i)).flatten().float() for i in range(len(s))]) for s in (images, held_out)]
    raw_pixels = knn_accuracy(rows[0], images.labels, rows[1], held_out.labels, 20)[20][0]
    assert swav_here("--data", "shapes:3000", "--eval-every", 6, "--workers", 1, "--out", tmp_path) == 0
    untrained, trained = [record["knn_top1"] for record in metrics(tmp_path) if "knn_top1" in record]
    assert trained > untrained + 10 and trained > raw_pixels + 10, (raw_pixels, untrained, trained)
    losses = [record["loss_per_ln_k"] for record in metrics(tmp_path) if "loss" in record]
    assert losses[-1] < 0.9 < losses[0], losses


@pytest.mark.slow
def test_swav_learns_shapes_as_well_as_the_recipe_says(tmp_path):
    assert swav_here("--eval-every", 6, "--workers", 1, "--out", tmp_path) == 0
    untrained, trained = [record["knn_top1"] for record in metrics(tmp_path) if "knn_top1" in record]
    assert trained > untrained + 30, (untrained, trained)
