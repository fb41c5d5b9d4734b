"""Training teaches something (make test-all: two minutes on two cores)."""

import pytest
import torch
from helpers import metrics, swav_here

from common.features import knn_accuracy
from common.multicrop import to_tensor
from common.sources.shapes import Shapes


@pytest.mark.slow
def test_the_shapes_recipe_leaves_raw_pixels_and_the_untrained_network_far_behind(tmp_path):
    images, held_out = Shapes("train"), Shapes("val")
    rows = [torch.stack([to_tensor(s.read(i)).flatten().float() for i in range(len(s))]) for s in (images,
                                                                                                   held_out)]
    raw_pixels = knn_accuracy(rows[0], images.labels, rows[1], held_out.labels, 20)[20][0]
    assert swav_here("--eval-every", 8, "--out", tmp_path) == 0
    untrained, trained = [record["knn_top1"] for record in metrics(tmp_path) if "knn_top1" in record]
    assert trained > max(untrained, raw_pixels) + 30, (raw_pixels, untrained, trained)
    losses = [record["loss_per_ln_k"] for record in metrics(tmp_path) if "loss" in record]
    # the first 20 steps may cost more than knowing nothing
    assert losses[-1] < 0.5 and max(losses[1:]) < 1.05, losses
