"""The embedded images: what they promise, and that the task is a fair one."""

import numpy as np
import pytest
import torch

from common.data import open_images
from common.features import extract, knn_accuracy
from common.multicrop import to_tensor
from common.resnet import resnet10
from common.sources.shapes import Shapes


def pixels(images, n):
    return torch.stack([to_tensor(images.read(i)) for i in range(n)])


@pytest.mark.parametrize("split", ["train", "val"])
def test_classes_come_in_turn(split):
    images = open_images("shapes", split)
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == [i % 10
                                                                             for i in range(len(images))]
    assert images.labels.bincount().tolist() == [len(images) // 10] * 10 and len(set(images.classes)) == 10


def test_images_are_small_rgb_and_all_different():
    images = [Shapes(split, 200).read(i) for split in ("train", "val") for i in range(40)]
    assert {(image.mode, image.size) for image in images} == {("RGB", (32, 32))}
    arrays = [np.asarray(image) for image in images]
    assert {(a.shape, a.dtype) for a in arrays} == {((32, 32, 3), np.dtype(np.uint8))}
    assert len({a.tobytes() for a in arrays}) == 80  # train and val share none
    assert min(a.std() for a in arrays) > 10  # something can be seen


def test_an_image_is_a_function_of_split_and_index():
    first = pixels(Shapes("train", 30), 30)
    np.random.seed(1)
    torch.manual_seed(1)
    again = Shapes("train")
    assert all(torch.equal(to_tensor(again.read(i)), first[i]) for i in reversed(range(30)))
    assert torch.equal(pixels(Shapes("val", 100), 20), pixels(Shapes("val", 10_000), 20))


def test_raw_pixels_say_little_about_the_class():
    train, val = Shapes("train"), Shapes("val")
    bank, queries = (pixels(images, len(images)).flatten(1).float() for images in (train, val))
    accuracy = knn_accuracy(bank, train.labels, queries, val.labels, [1, 20])
    assert 10 < accuracy[1][0] < 45 and 10 < accuracy[20][0] < 45, accuracy  # chance is 10


def test_an_untrained_network_says_little_about_the_class():
    torch.manual_seed(0)
    trunk = resnet10(width=0.25, stem="small").to(memory_format=torch.channels_last)
    bank, queries = (extract(trunk, Shapes(split), 32, 32, torch.device("cpu")) for split in ("train",
                                                                                                    "val"))
    assert bank[0].shape == (5000, 128) and queries[0].shape == (1000, 128)
    accuracy = knn_accuracy(*bank, *queries, [1, 20])
    assert all(10 < top1 < 45 for top1, _ in accuracy.values()), accuracy
