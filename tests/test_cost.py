"""What benchmarks/multicrop.py counts: FLOPs of crops, and bytes that a method keeps of every image."""

import pytest
import torch

import deepclusterv2
import odc
import selav2
import swav
from benchmarks import multicrop
from common.engine.launch import autocast_dtype
from common.engine.options import recipe

SELAV2 = 4 * 128 + 4 * 3000  # a bank, and its scores
EMBEDDING = autocast_dtype("auto", torch.device("cpu")).itemsize  # bytes of a trunk's number here


def test_flops_are_those_of_the_crops():
    config = recipe(swav.Config, swav.RECIPES, "shapes")
    image = multicrop.flops(config, (1,), (24,))
    # 3x3 convolution of the stem alone, 24 x 24 x 27 x 32 multiplications; its input needs no gradient
    assert image > 2 * 2 * 24 * 24 * 27 * 32 and multicrop.flops(config, (2,), (24,)) == 2 * image
    small = multicrop.flops(config, (2, 4), (24, 10)) / image - 2
    assert 4 * (10 / 24) ** 2 < small < 4 * (12 / 24) ** 2 + 0.1  # strides round sides up: 10, 5, 3, 2


def test_crops_keep_the_published_proportions():
    config = recipe(swav.Config, swav.RECIPES, "swav_400ep_2x224")
    assert multicrop.with_crops(config, (2,)).sizes == (224,)
    config = multicrop.with_crops(recipe(swav.Config, swav.RECIPES, "swav_400ep"), (2, 6))
    assert (config.sizes, config.scales) == ((224, 96), (0.14, 1.0, pytest.approx(0.05), 0.14))


@pytest.mark.parametrize("method, held, passing", [
    (swav, 8, 0), (odc, 4 * 256 + 8 + 8, EMBEDDING * 256),
    (deepclusterv2, 2 * 4 * 128 + 1 + 3 * 16, 4 * 128), (selav2, 2 * 4 * 128 + 1 + 3 * 16, SELAV2)])
def test_announced_bytes_of_an_image(method, held, passing):
    """held: embeddings, targets, what the log counts; passing: there only while clusters or labels are made.

    Not held: what sela.py and deepcluster.py announce, which is nearly all features and scores while they
    label or cluster.
    """
    few, many = (multicrop.held(method, n) for n in (20_000, 40_000))
    assert many - few == 20_000 * (held + passing)
