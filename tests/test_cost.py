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

# bytes of a number, as a trunk gives it on this machine
EMBEDDING = autocast_dtype("auto", torch.device("cpu")).itemsize


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


@pytest.mark.parametrize("method, for_clusters",
                         [(swav, 0), (odc, 256 * EMBEDDING), (deepclusterv2, 512), (selav2, 512 + 4 * 3000)])
def test_announced_bytes_are_those_of_the_tensors(method, for_clusters, monkeypatch):
    """for_clusters: bytes an image that are there only while clusters or labels are made, or ODC's memory is
    filled.

    Not held: what sela.py and deepcluster.py announce, which is nearly all features and scores while they
    label or cluster.
    """
    held = []

    class Watched(method.Run):
        def __init__(self, config, name, images, steps, meter, objects, *others):
            tensors = [t for holder in (objects["memory"],
                                        meter) for t in vars(holder).values() if isinstance(t, torch.Tensor)]
            held.append(sum(t.nbytes for t in tensors))
            super().__init__(config, name, images, steps, meter, objects, *others)

    monkeypatch.setattr(multicrop, "Run", Watched)
    announced = [multicrop.held(method, n) for n in (20_000, 40_000)]
    slope, real = (b - a for a, b in (announced, held))
    # not announced: a byte an image that says whether it was seen
    assert slope - 20_000 * for_clusters == pytest.approx(real, rel=0.002)
