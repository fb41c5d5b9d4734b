"""Crops that a worker cuts and photometric changes that the device makes, against torchvision and Pillow."""

import colorsys
import functools
import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as TF

from common.multicrop import (
    MEAN,
    STD,
    TRIES,
    Augmentation,
    CenterCrop,
    MultiCrop,
    RandomCrop,
    TenCrop,
    Warp,
    center,
    photometric,
    random_box,
    resize,
    to_device,
    to_tensor,
)

OFF = [1.0, 1.0, 1.0, 0.0, -1, 0, 0.0, 0.0]
# number 0..23: which of brightness, contrast, saturation, hue come when
ORDERS = list(itertools.permutations(range(4)))


def photo(height=48, width=64, seed=0):
    """Soft colours, edges and grain: as close to a photograph as a test without files can come."""
    g = torch.Generator().manual_seed(seed)
    soft = torch.nn.functional.interpolate(torch.rand(1, 3, 6, 8, generator=g), (height, width),
                                           mode="bicubic")[0]
    edges = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 5, generator=g), (height, width),
                                            mode="nearest")[0]
    image = 0.6 * soft + 0.4 * edges + 0.03 * torch.randn(3, height, width, generator=g)
    return Image.fromarray((image.clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy())


def crops_of(n, size=32):
    return torch.stack([to_tensor(photo(size, size, seed)) for seed in range(n)])


def changed(crops, params, dtype=torch.float32):
    """photometric without normalisation."""
    return photometric(crops, torch.as_tensor(params, dtype=torch.float32), (0, 0, 0), (1, 1, 1), dtype)


def with_torchvision(image, row, radius=11):
    """One crop, as a float tensor or a PIL image, changed by torchvision's functional transforms."""
    factors, order, grey, sigma, angle = row[:4], int(row[4]), row[5], row[6], row[7]
    jitter = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation, TF.adjust_hue)
    image = TF.rgb_to_grayscale(image, 3) if grey == 2 else image
    for operation in ORDERS[order] if order >= 0 else ():
        if factors[operation] != OFF[operation]:
            image = jitter[operation](image, factors[operation])
    image = TF.rgb_to_grayscale(image, 3) if grey == 1 else image
    image = TF.gaussian_blur(image, 2 * radius + 1, sigma) if sigma > 0 else image
    return TF.rotate(image, angle, InterpolationMode.NEAREST) if angle else image


def drawn(n, seed=0, **options):
    rng = random.Random(seed)
    return [Augmentation(**options).draw(rng) for _ in range(n)]


def everything(grey_first):
    """Each of the 24 orders with strong factors, half of them grey, all blurred and turned."""
    rows = drawn(24, seed=1, jitter_p=1, blur_p=1, grey_p=0.5, grey_first=grey_first, rotate=30)
    return [[*row[:4], order, *row[5:]] for order, row in enumerate(rows)]


ALONE = {
    "darker": [[0.3, 1, 1, 0, 0, 0, 0, 0]],
    "brighter": [[1.7, 1, 1, 0, 0, 0, 0, 0]],
    "less contrast": [[1, 0.2, 1, 0, 0, 0, 0, 0]],
    "more contrast": [[1, 1.8, 1, 0, 0, 0, 0, 0]],
    "less saturation": [[1, 1, 0.2, 0, 0, 0, 0, 0]],
    "more saturation": [[1, 1, 1.8, 0, 0, 0, 0, 0]],
    "hue": [[1, 1, 1, shift, 0, 0, 0, 0] for shift in (-0.5, -0.2, -0.01, 0.1, 0.2, 0.5)],
    "grey": [[1, 1, 1, 0, -1, 1, 0, 0]],
    "grey first": [[1, 1, 1, 0, -1, 2, 0, 0]],
    "blur": [[1, 1, 1, 0, -1, 0, sigma, 0] for sigma in (0.1, 0.5, 1, 2)],
    "rotation": [[1, 1, 1, 0, -1, 0, 0, angle] for angle in (-170, -30, -1, 5, 40, 90)],
}
COMBINED = {"all": everything(False), "all, grey first": everything(True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("rows", [*ALONE.values(), *COMBINED.values()], ids=[*ALONE, *COMBINED])
def test_agrees_with_torchvision_on_tensors(rows, dtype):
    rows = torch.tensor(rows).float()
    crops = crops_of(len(rows))
    wanted = [with_torchvision(crop.to(dtype) / 255, row) for crop, row in zip(crops, rows.double().tolist())]
    # torchvision shifts the hue in float32 whatever it is given
    exact = dtype == torch.float64 and not rows[:, 3].any()
    got = changed(crops, rows, dtype)
    torch.testing.assert_close(got, torch.stack(wanted), rtol=0, atol=1e-10 if exact else 1e-4,
                               check_stride=False)


@pytest.mark.parametrize("rows", [*ALONE.values(), *COMBINED.values()], ids=[*ALONE, *COMBINED])
def test_agrees_with_pillow(rows):
    hue = any(row[3] for row in rows)
    crops = crops_of(len(rows), size=96)
    for crop, row, got in zip(crops, rows, changed(crops, rows) * 255):
        wanted = to_tensor(with_torchvision(TF.to_pil_image(crop), row))
        assert (got - wanted).abs().mean() < (3 if hue else 2)


def test_hue_agrees_with_colorsys_to_the_last_digit():
    crops, shift = crops_of(1, size=16), np.float32(0.3)
    got = changed(crops, [[1, 1, 1, shift, 0, 0, 0, 0]], torch.float64)[0].flatten(1).T
    hsv = [colorsys.rgb_to_hsv(*pixel) for pixel in (crops[0].flatten(1).T.double() / 255).tolist()]
    wanted = torch.tensor([colorsys.hsv_to_rgb((h + float(shift)) % 1, s, v) for h, s, v in hsv],
                          dtype=torch.float64)
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-12, check_stride=False)


def test_blur_of_small_crops_reflects_at_the_border():
    crops = crops_of(4, size=8)
    rows = [[*OFF[:6], sigma, 0] for sigma in (0.1, 0.7, 1.4, 2)]
    wanted = torch.stack([with_torchvision(crop / 255, row, radius=7) for crop, row in zip(crops, rows)])
    torch.testing.assert_close(changed(crops, rows), wanted, rtol=0, atol=1e-6, check_stride=False)
    flat = torch.full((1, 3, 8, 8), 77, dtype=torch.uint8)
    torch.testing.assert_close(changed(flat, rows[3:]), flat / 255, check_stride=False)


def test_order_of_grey_and_jitter_matters():
    """Grey before the jitter leaves a hue shift without effect; grey after it does not."""
    crops = crops_of(1)
    shift = [1, 1, 1, 0.3, 0]
    first, last, plain = (changed(crops, [row]) for row in ([*shift, 2, 0, 0], [*shift, 1, 0, 0],
                                                            [*OFF[:5], 1, 0, 0]))
    for grey in (first, last):
        assert torch.equal(grey[:, 0], grey[:, 1]) and torch.equal(grey[:, 0], grey[:, 2])
    torch.testing.assert_close(first, plain)
    assert (last - plain).abs().mean() > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_off_leaves_the_normalised_image(dtype):
    crops = crops_of(3)
    got = photometric(crops, torch.tensor([OFF] * 3), dtype=dtype)
    mean, std = (torch.tensor(v, dtype=dtype).view(3, 1, 1) for v in (MEAN, STD))
    assert torch.equal(got, (crops.to(dtype) / 255 - mean) / std)
    assert got.dtype == dtype and got.is_contiguous(
        memory_format=torch.channels_last) and not got.is_contiguous()
    wanted = transforms.Normalize(MEAN, STD)(crops.to(dtype) / 255)
    torch.testing.assert_close(got, wanted, check_stride=False)


def test_output_is_channels_last_and_input_is_kept():
    crops, rows = crops_of(24), torch.tensor(everything(False))
    before = crops.clone(), rows.clone()
    got = photometric(crops, rows)
    assert got.is_contiguous(memory_format=torch.channels_last) and got.dtype == torch.float32
    assert torch.equal(crops, before[0]) and torch.equal(rows, before[1])


def test_a_batch_is_its_crops_one_by_one():
    rows = torch.tensor(everything(False) + drawn(24, rotate=10))
    crops = crops_of(48)
    alone = torch.cat([photometric(crops[i : i + 1], rows[i : i + 1]) for i in range(48)])
    torch.testing.assert_close(photometric(crops, rows), alone, rtol=0, atol=1e-6)


def test_to_device_pairs_each_crop_with_its_own_parameters():
    crops = [crops_of(6).view(2, 3, 3, 32, 32), crops_of(3, size=16).view(1, 3, 3, 16, 16)]
    params = torch.tensor(drawn(9)).view(3, 3, 8)
    large, small = to_device(crops, params, torch.device("cpu"), torch.float64)
    for v, b in itertools.product(range(2), range(3)):
        wanted = photometric(crops[0][v, b][None], params[v, b][None], dtype=torch.float64)[0]
        torch.testing.assert_close(large[v * 3 + b], wanted, rtol=0, atol=1e-10)
    torch.testing.assert_close(small, photometric(crops[1][0], params[2], dtype=torch.float64), rtol=0,
                               atol=1e-10)


# ---------------------------------------------------------------------------------------------- what is drawn


DRAWS = 20_000


def within_3_sigma(hits, p):
    return abs(hits.double().mean() - p) < 3 * math.sqrt(p * (1 - p) / len(hits))


@pytest.mark.parametrize("options", [{}, dict(jitter=(0.4, 0.2, 1.5, 0.1), jitter_p=0.3, grey_p=0.6,
                                              grey_first=True, blur_p=0.1, rotate=15)])
def test_draws_have_their_probabilities_and_ranges(options):
    a, draws = Augmentation(**options), torch.tensor(drawn(DRAWS, **options), dtype=torch.float64)
    jittered, grey, blurred = draws[:, 4] >= 0, draws[:, 5] > 0, draws[:, 6] > 0
    assert within_3_sigma(jittered,
                          a.jitter_p) and within_3_sigma(grey, a.grey_p) and within_3_sigma(blurred, a.blur_p)
    assert within_3_sigma(jittered & grey, a.jitter_p * a.grey_p) and within_3_sigma(jittered & blurred,
                                                                                     a.jitter_p * a.blur_p)
    assert (draws[~jittered, :5] == torch.tensor(OFF[:5])).all()
    assert set(draws[:, 5].tolist()) == {0, 2 if a.grey_first else 1}

    j = a.jitter
    ranges = [*((max(0, 1 - x), 1 + x) for x in j[:3]), (-j[3], j[3])]
    columns = [(draws[jittered, i], *ranges[i]) for i in range(4)] + [(draws[blurred, 6], *a.blur_sigma)]
    columns += [(draws[:, 7], -a.rotate, a.rotate)] if a.rotate else []
    for values, low, high in columns:  # uniform
        width, n = high - low, len(values)
        assert low <= values.min() < low + 0.01 * width and high - 0.01 * width < values.max() <= high
        assert abs(values.mean() - (low + high) / 2) < 3 * width / math.sqrt(12 * n)
        assert abs(values.var() - width**2 / 12) < 3 * width**2 / math.sqrt(180 * n)
    assert a.rotate or not draws[:, 7].any()
    counts = torch.bincount(draws[jittered, 4].long(), minlength=24)
    mean = counts.sum() / 24
    assert len(counts) == 24 and ((counts - mean) ** 2 / mean).sum() < 23 + 3 * math.sqrt(46)  # chi squared


def test_the_outcome_does_not_change_how_much_is_drawn():
    """So the places of crops stay what they are when a probability changes."""
    settings = [{}, dict(jitter_p=0, grey_p=0, blur_p=0),
                dict(jitter_p=1, grey_p=1, blur_p=1, grey_first=True, rotate=9)]
    for seed in range(200):
        rngs = [random.Random(seed) for _ in settings]
        for rng, options in zip(rngs, settings):
            Augmentation(**options).draw(rng)
        assert rngs[0].getstate() == rngs[1].getstate() == rngs[2].getstate()


@given(st.integers(1, 3000), st.integers(1, 3000), st.floats(1e-4, 1), st.floats(0, 1), st.integers(0, 2**64))
@settings(max_examples=300, deadline=None)
def test_box_lies_inside_the_image(height, width, low, share, seed):
    top, left, h, w = random_box(height, width, (low, low + share * (1 - low)), random.Random(seed))
    assert 0 <= top and 0 <= left and h >= 1 and w >= 1 and top + h <= height and left + w <= width
    assert all(isinstance(v, int) for v in (top, left, h, w))


@pytest.mark.parametrize("height, width, box", [(100, 400, (0, 133, 100, 133)),
                                                (400, 100, (133, 0, 133, 100)), (1, 9, (0, 4, 1, 1))])
def test_box_of_a_thin_image_is_central(height, width, box):
    assert random_box(height, width, (1, 1), random.Random(0)) == box


@pytest.mark.parametrize("height, width", [(375, 500), (500, 375), (32, 32), (300, 900)])
@pytest.mark.parametrize("scale", [(0.14, 1), (0.05, 0.14)])
def test_boxes_are_distributed_as_random_resized_crops(height, width, scale):
    def statistics(boxes):
        top, left, h, w = torch.tensor(boxes, dtype=torch.float64).T
        area, ratio = h * w / (height * width), (w / h).log()
        middle = torch.stack([(top + h / 2) / height, (left + w / 2) / width])
        return torch.stack([area.mean(), area.std(), ratio.exp().mean(), ratio.std(), *middle.mean(1),
                            *middle.std(1)]), ratio.mean()

    rng = random.Random(0)
    torch.manual_seed(0)
    image = torch.empty(3, 1, 1).expand(3, height, width)
    ours, our_ratio = statistics([random_box(height, width, scale, rng) for _ in range(DRAWS)])
    theirs, their_ratio = statistics([transforms.RandomResizedCrop.get_params(image, scale, (3 / 4, 4 / 3))
                                      for _ in range(DRAWS)])
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0)
    assert abs(our_ratio - their_ratio) < 0.02 * math.log(4 / 3)


# ---------------------------------------------------------------------------------------------- the crops


class Images:
    """In memory."""

    labels = None

    def __init__(self, *images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def read(self, i):
        return self.images[i]


PHOTOS = Images(*(photo(60, 80, seed) for seed in range(4)))


def multicrop(images=PHOTOS, seed=0, crops=(2, 3), sizes=(32, 16), scales=((0.14, 1.0), (0.05, 0.14)),
              **options):
    return MultiCrop(images, crops, sizes, scales, Augmentation(**options), seed)


def test_a_sample_has_the_crops_asked_for():
    index, crops, params = multicrop()[3, 11, 2]
    assert index == 2 and len(multicrop()) == 4
    assert [group.shape for group in crops] == [(2, 3, 32, 32), (3, 3, 16, 16)]
    assert {group.dtype
            for group in crops} == {torch.uint8} and params.shape == (5, 8) and params.dtype == torch.float32
    flat = torch.cat([group.flatten(1).float().std(dim=1) for group in crops])
    assert (flat > 1).all() and len({tuple(row) for row in params.tolist()}) == 5
    assert not torch.equal(crops[0][0], crops[0][1])


def test_a_sample_is_a_function_of_seed_epoch_and_position():
    def sample(seed=5, epoch=1, position=2, index=0):
        _, crops, params = multicrop(seed=seed)[epoch, position, index]
        return torch.cat([group.flatten().float() for group in crops] + [params.flatten()])

    first = sample()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    assert torch.equal(sample(), first)
    others = [sample(seed=6), sample(epoch=2), sample(position=3), sample(1, 5, 2), sample(2, 1, 5),
              sample(5, 2, 1)]
    everyone = [first, *others]
    assert not any(torch.equal(a[-40:], b[-40:]) or torch.equal(a[:-40], b[:-40])
                   for a, b in itertools.combinations(everyone, 2))
    # not of the index
    assert torch.equal(sample(index=1)[-40:], first[-40:]) and not torch.equal(sample(index=1), first)


def test_places_do_not_depend_on_probabilities():
    a, b = multicrop()[0, 0, 0], multicrop(jitter_p=0, grey_p=0, blur_p=0, rotate=5)[0, 0, 0]
    assert all(map(torch.equal, a[1], b[1])) and not torch.equal(a[2], b[2])


def test_crops_are_flipped_half_of_the_time():
    half = np.zeros((16, 16, 3), dtype=np.uint8)
    half[:, :8] = 255
    sets = multicrop(Images(Image.fromarray(half)), crops=(2, 2), sizes=(8, 4), scales=((1, 1), (1, 1)))
    groups = [torch.cat(group) for group in zip(*(sets[0, position, 0][1] for position in range(500)))]
    for group in groups:  # (1000, 3, s, s): the left side is white, or black in a flipped one
        flipped = group[:, 0, :, 0] == 0
        assert (flipped.all(1) | ~flipped.any(1)).all()
        assert within_3_sigma(flipped.all(1), 0.5)


def test_params_are_those_of_the_augmentation():
    params = torch.stack([multicrop(blur_p=1, grey_p=1, grey_first=True,
                                    jitter_p=0)[0, position, 0][2] for position in range(20)])
    assert (params[..., :6] == torch.tensor([*OFF[:5], 2])).all() and (params[..., 6]
                                                                       > 0).all() and not params[..., 7].any()


def test_resolutions_must_match():
    with pytest.raises(ValueError, match="one entry per resolution"):
        multicrop(crops=(2,))


@pytest.mark.parametrize("size", [8, 32, 96])
def test_resize_is_pillows(size):
    image = photo(150, 200)
    pixels = to_tensor(image)
    assert torch.equal(pixels, TF.pil_to_tensor(image))
    for top, left, h, w in ((0, 0, 150, 200), (3, 5, 97, 101), (20, 100, 40, 30), (140, 190, 9, 7),
                            (1, 1, 1, 1), (0, 0, size, size)):
        got = resize(pixels[:, top : top + h, left : left + w], size)
        wanted = image.crop((left, top, left + w, top + h)).resize((size, size), Image.Resampling.BILINEAR)
        assert got.dtype == torch.uint8 and got.shape == (3, size, size)
        assert (got.int() - TF.pil_to_tensor(wanted).int()).abs().max() <= 1


def test_center_is_torchvisions():
    for height, width in ((60, 80), (80, 60), (33, 32), (20, 200)):
        image = photo(height, width)
        for short, size in ((36, 32), (32, 32), (16, 24)):
            wanted = transforms.Compose([transforms.Resize(short), transforms.CenterCrop(size),
                                         transforms.PILToTensor()])(image)
            assert torch.equal(center(image, short, size), wanted)


def beside_torchvision(width, height, resize, size):
    """[(what CenterCrop, TenCrop, Warp cut from noise, the same by way of the whole scaled image)]."""
    pixels = np.random.default_rng(width + height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    whole = TF.resize(image, resize)
    wanted = ([TF.center_crop(whole, size)], TF.ten_crop(whole, size), [TF.resize(whole, (size, size))])
    return [(kind(None, resize, size).cut(image), torch.stack([to_tensor(crop) for crop in crops]))
            for kind, crops in zip((CenterCrop, TenCrop, Warp), wanted)]


@given(st.integers(1, 100), st.integers(1, 100), st.integers(8, 48), st.integers(0, 7))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_cuts_are_torchvisions(width, height, resize, less):
    for cut, wanted in beside_torchvision(width, height, resize, resize - less):
        assert torch.equal(cut, wanted)


@given(st.integers(1, 6), st.integers(101, 700), st.integers(0, 5), st.booleans(), st.integers(8, 40),
       st.integers(0, 7))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_cuts_of_thin_images_are_torchvisions(short, ratio, more, tall, resize, less):
    sides = (short * ratio + more, short)[:: -1 if tall else 1]
    pairs = beside_torchvision(*sides, resize, resize - less)
    off = [(cut.int() - wanted.int()).abs() for cut, wanted in pairs]
    assert off[0].max() <= 1 and off[1].max() <= 1
    assert off[2].max() <= 3 and (off[2] > 1).double().mean() < 0.05  # Warp rounds a second time


@pytest.mark.parametrize("kind, size", [(CenterCrop, (9999, 1)), (CenterCrop, (40_000_000, 1)),
                                        (TenCrop, (1, 9999)), (Warp, (9999, 1)), (Warp, (1, 9999))])
def test_a_very_thin_image_is_not_scaled_as_a_whole(kind, size, monkeypatch):
    pixels, real = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize",
                        lambda image, new, *more: pixels.append(new[0] * new[1]) or real(image, new, *more))
    crops = kind(None, 256, 224).cut(Image.new("RGB", size, (10, 200, 30)))
    assert (crops == torch.tensor([10, 200, 30]).view(3, 1, 1)).all() and max(pixels) <= 100 * 256 * 256


# ---- crops of evaluations


class OnePhoto:
    """A set of one image under many indices; every seventh cannot be read."""

    def __len__(self):
        return 70

    def read(self, i):
        if i % 7 == 6:
            raise OSError("damaged")
        return photo(60, 90)


def test_random_crops_are_windows_of_the_central_square():
    square = center(photo(60, 90), 40, 40)
    windows = {(t, l, f): (square[:, t : t + 32, l : l + 32].flip(
        -1) if f else square[:, t : t + 32, l : l + 32]) for t in range(9) for l in range(9) for f in (0, 1)}
    crops = RandomCrop(OnePhoto(), 40, 32, Augmentation(jitter=(0.4, 0.4, 0.4, 0.0), jitter_p=1.0, grey_p=0.0,
                                                        blur_p=0.0), seed=3)
    found = []
    for position in range(200):
        index, (crop,), params = crops[2, position, position % 70]
        assert index % 7 != 6 and crop.shape == (1, 3, 32, 32) and params.shape == (1, 8) and params[0,
                                                                                                     4] >= 0
        found.append(next(key for key, window in windows.items() if torch.equal(window, crop[0])))
    tops, lefts, flips = zip(*found)
    assert set(tops) == set(lefts) == set(range(9)) and 60 < sum(flips) < 140
    again = crops[2, 5, 20]
    assert torch.equal(again[1][0], crops[2, 5, 20][1][0]) and torch.equal(again[2], crops[2, 5, 20][2])
    assert not torch.equal(again[2], crops[3, 5, 20][2]) and not torch.equal(again[2], crops[2, 6, 20][2])


def test_ten_crops_are_torchvisions():
    index, (crops,), params = TenCrop(OnePhoto(), 48, 32)[0, 0, 6]
    expected = torch.stack([to_tensor(crop) for crop in TF.ten_crop(TF.resize(photo(60, 90), 48), 32)])
    assert index == 7 and torch.equal(crops, expected) and params.tolist() == [OFF] * 10 and len(
        {c.numpy().tobytes() for c in crops}) == 10


@pytest.mark.parametrize("make", [lambda images: TenCrop(images, 48, 32),
                                  lambda images: RandomCrop(images, 48, 32, Augmentation(), 0)])
def test_crops_of_a_set_without_a_readable_image(make, monkeypatch):
    monkeypatch.setattr(OnePhoto, "read", lambda self, i: 1 / 0)
    index, (crops,), params = make(OnePhoto())[0, 0, 3]
    assert index == -1 and not crops.any() and len(crops) == len(params) in (1, 10)


@pytest.mark.parametrize("make", [multicrop, lambda images: RandomCrop(images, 48, 32, Augmentation(), 0),
                                  *(functools.partial(kind, resize=48, size=32)
                                    for kind in (CenterCrop, TenCrop, Warp))])
def test_an_image_too_large_to_cut_is_unreadable(make):
    class Large:
        def __getattr__(self, name):  # whatever is asked of it
            raise MemoryError

    crops, expected = (make(Images(photo(), second, photo(seed=2))) for second in (Large(), photo()))
    index, cut, params = crops[3, 5, 1]
    _, wanted, wanted_params = expected[3, 5, 2]
    assert index == 2 and all(map(torch.equal, cut, wanted)) and torch.equal(params, wanted_params)


def test_a_fault_of_the_cut_itself_is_raised():
    crops = CenterCrop(Images(*[photo()] * (TRIES + 5)), 48, 32)
    crops.cut = lambda image: 1 / 0
    with pytest.raises(ZeroDivisionError):
        crops[0, 0, 3]
