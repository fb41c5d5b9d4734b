"""Whatever bytes a list or an image holds: a set of images or one line; an image or an unreadable one."""

import io
import json
import resource

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from common.data import open_images
from common.multicrop import center
from common.sources.files import EXTENSIONS, decode

QUICK = dict(deadline=10_000, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
LONG = pytest.param(5000, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few images, in folders like those of lists, and what is no image."""
    root = tmp_path_factory.mktemp("images")
    for name in ("a.png", "b c.jpg", "n01/n01_1.JPEG", "train/n02/n02_1.JPEG"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name)
    return root


def opens_or_says(path, content):
    """A set as long as its labels, or an error of the data in one line."""
    path.write_bytes(content)
    try:
        images = open_images(path)
    except ValueError as error:
        assert getattr(error, "exit_code", None) == 3 and len(str(error).splitlines()) == 1, repr(error)
        return
    assert len(images) > 0 and len(list(images.paths)) == len(images)
    assert images.labels is None or -1 <= images.labels.min() <= images.labels.max() < len(images.classes)


NAMES = "a.png|b c.jpg|n01/n01_1.JPEG|n02_1.JPEG|train/n02/n02_1.JPEG|a.pn||/|..|n01".split("|")
LABELS = "|0|1|-1|1.0|-1.0|2.5|-2|nan|1e5|999999|1000000|cat|²|\N{ARABIC-INDIC DIGIT ONE}|0x1".split("|")
PARTS = NAMES, [" ", ",", "\t", "", ", "], LABELS, ["\n", "\r\n", "\r", "\n\n"]
LINES = st.tuples(*map(st.sampled_from, PARTS)).map(lambda parts: "".join(parts).encode())
LISTS = st.lists(LINES | st.binary(max_size=30), max_size=6).map(b"".join)


@pytest.mark.parametrize("examples", [300, LONG])
def test_any_list(folder, examples):
    @given(LISTS | st.binary(max_size=200))
    @settings(max_examples=examples, **QUICK)
    def check(content):
        opens_or_says(folder / "list.txt", content)

    check()


VALUES = (st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | st.text(max_size=3)
          | st.sampled_from(NAMES))
NONSENSE = VALUES | st.lists(VALUES, max_size=2) | st.fixed_dictionaries({"id": VALUES})
CHANGES = st.lists(st.tuples(
    st.sampled_from(["images", "annotations", "categories"]), st.integers(0, 2),
    st.sampled_from(["id", "file_name", "image_id", "category_id"]), NONSENSE), max_size=4)


def changed(changes):
    """Annotations of two images with some values changed; place 2: a whole part."""
    content = {"images": [{"id": 0, "file_name": "a.png"}, {"id": 1, "file_name": "b c.jpg"}],
               "annotations": [{"image_id": 0, "category_id": 5}, {"image_id": 1, "category_id": 6}],
               "categories": [{"id": 5}, {"id": 6}]}
    for part, place, key, value in sorted(changes, key=lambda change: change[1]):
        if place == 2:
            content[part] = value
        else:
            content[part][place][key] = value
    return json.dumps(content).encode()


JSON = CHANGES.map(changed)


@pytest.mark.parametrize("examples", [400, LONG])
def test_any_annotations(folder, examples):
    @given(JSON | NONSENSE.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=50))
    @settings(max_examples=examples, **QUICK)
    def check(content):
        opens_or_says(folder / "list.json", content)

    check()


def encoded():
    """Small files of each ending, and of the modes and options that take another path through Pillow."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 33, 3), dtype=np.uint8))
    kinds = [(ending, image, {}) for ending in sorted(EXTENSIONS)]
    kinds += [(".png", image.convert(mode), {}) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
    kinds += [(".tif", image.convert(mode), {"compression": compression}) for mode, compression in (
        ("CMYK", "jpeg"), ("F", "raw"), ("I", "tiff_lzw"), ("1", "group4"), ("RGB", "tiff_deflate"))]
    kinds += [(".jpg", image.convert("CMYK"), {}), (".jpg", image, {"progressive": True}),
              (".gif", image, {"save_all": True, "append_images": [image]})]
    for ending, picture, options in kinds:
        file = io.BytesIO()
        picture.save(file, Image.registered_extensions()[ending], **options)
        yield ending, file.getvalue()


@pytest.mark.parametrize("examples", [400, LONG])
def test_any_image(tmp_path_factory, examples):
    folder = tmp_path_factory.mktemp("damaged")
    byte = st.sampled_from([0, 1, 127, 128, 255]) | st.integers(0, 255)
    damage = st.lists(st.tuples(st.floats(0, 1), byte), min_size=1, max_size=6)

    @given(st.sampled_from(list(encoded())), damage, st.booleans(), st.sampled_from([1, 1, 0.9, 0.5]))
    @settings(max_examples=examples, **QUICK)
    def check(file, damage, head, kept):
        ending, content = file
        content = bytearray(content[: int(kept * len(content))])
        for place, byte in damage:
            content[int(place * min(len(content) - 1, 99 if head else len(content)))] = byte
        path = folder / f"a{ending}"
        path.write_bytes(content)
        try:
            image = decode(path, exif=head)
        except Exception:  # read_or_next takes the next one
            return
        assert image.mode == "RGB" and min(image.size) > 0
        assert center(image, 8, 8).shape == (3, 8, 8)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    check()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1e6  # KB
