"""Where images come from (scanning, lists, decoding) and which images form a batch (order, loader)."""

import errno
import inspect
import itertools
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import warnings
import zlib
from multiprocessing.reduction import ForkingPickler
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from common.data import Loader, batches, open_images
from common.distributed import rank, world_size
from common.engine.errors import DataError, reason
from common.engine.held_out import has_split, match_classes
from common.engine.unreadable import Unreadable
from common.multicrop import TRIES, Augmentation, CenterCrop, MultiCrop, collate, read_or_next
from common.sources import files, named
from common.sources.files import EXTENSIONS, Files, decode
from common.sources.shapes import Shapes

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores

# Blocks of 16 pixels with clear-cut colours: JPEG and palettes keep them, and a swapped channel, a turn or an
# inversion shows.
COLOURS = np.array([[0, 0, 0], [255, 255, 255], *np.random.default_rng(0).integers(0, 256, (13, 3))],
                   dtype=np.uint8)
RGB = np.kron(COLOURS.reshape(3, 5, 3), np.ones((16, 16, 1), dtype=np.uint8))  # (48, 80, 3)
IMAGE = Image.fromarray(RGB)
GREY = np.asarray(IMAGE.convert("L"))


def tree(root, *names):
    """Files with a small valid image in each; returns root."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            IMAGE.save(file, "png")
    return root


def noise(size=64, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


# ------------------------------------------------------------------------------------------------------ opens


def test_class_folders(tmp_path):
    images = open_images(tree(tmp_path, "dog/1.png", "cat/b.png", "cat/a.png", "cat/deeper/c.png"))
    assert list(images.paths) == ["cat/a.png", "cat/b.png", "cat/deeper/c.png", "dog/1.png"]
    assert images.classes == ["cat", "dog"]
    assert images.labels.tolist() == [0, 0, 0, 1] and images.labels.dtype == torch.int64
    assert len(images) == 4 and np.array_equal(images.read(3), RGB)


@pytest.mark.parametrize("names", [("b.png", "a.png"), ("b.png", "folder/a.png")], ids=["flat", "mixed"])
def test_images_directly_in_the_folder_have_no_labels(tmp_path, names):
    images = open_images(tree(tmp_path, *names))
    assert list(images.paths) == sorted(names) and images.labels is None and images.classes == []


def test_train_and_val_folders(tmp_path):
    tree(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/cat/3.png", "val/dog/4.png", "val/dog/5.png")
    train, val = open_images(str(tmp_path)), open_images(tmp_path, "val")
    assert list(train.paths) == ["cat/1.png", "dog/2.png"]
    assert list(val.paths) == ["cat/3.png", "dog/4.png", "dog/5.png"]
    assert train.classes == val.classes == ["cat", "dog"] and val.labels.tolist() == [0, 1, 1]
    assert has_split(tmp_path, "val") and not has_split(tmp_path / "train", "val")


@pytest.mark.parametrize(
    "lines, labels, classes",
    [
        ("b.png\na.png\n", None, []),
        ("b.png 3\na.png 0\n", [3, 0], ["0", "1", "2", "3"]),
        ("b.png,1\na.png,0", [1, 0], ["0", "1"]),
        ("b.png\t1\r\na.png\t0\r\n", [1, 0], ["0", "1"]),
        ("\nb.png zebra\n\na.png ant\n\n", [1, 0], ["ant", "zebra"]),
        ("b.png,great white shark\na.png,ant\n", [1, 0], ["ant", "great white shark"]),
        ("b.png 1700000000\na.png 1600000000\n", [1, 0], ["1600000000", "1700000000"]),
    ],
    ids=["no labels", "space", "comma", "tab and CRLF", "names", "names with spaces", "times"],
)
def test_list_file(tmp_path, lines, labels, classes):
    tree(tmp_path, "a.png", "b.png")
    (tmp_path / "list.txt").write_bytes(lines.encode())
    images = open_images(tmp_path / "list.txt")
    assert list(images.paths) == ["b.png", "a.png"] and images.classes == classes
    assert (images.labels if labels is None else images.labels.tolist()) == labels
    assert images.read(1).size == IMAGE.size


def test_list_paths_start_at_root_and_may_be_absolute(tmp_path):
    tree(tmp_path / "images", "a.png", "sub/b.png")
    absolute = str(tmp_path / "images" / "a.png")
    (tmp_path / "list.txt").write_text(f"sub/b.png\n{absolute}\n")
    images = open_images(tmp_path / "list.txt", root=str(tmp_path / "images"))
    assert list(images.paths) == ["sub/b.png", absolute]
    assert [images.read(i).size for i in (0, 1)] == [IMAGE.size] * 2


def test_classes_are_matched_by_name(tmp_path):
    tree(tmp_path, "train/cat/1.png", "train/dog/2.png", "train/owl/3.png", "val/owl/4.png", "val/cat/5.png",
         "odd/emu/6.png")
    bank, queries = open_images(tmp_path), open_images(tmp_path, "val")
    assert queries.labels.tolist() == [0, 1]
    match_classes(queries, bank)
    assert queries.labels.tolist() == [0, 2] and queries.classes == bank.classes == ["cat", "dog", "owl"]
    with pytest.raises(DataError, match="class 'emu' of the images to classify is not among the 3 classes"):
        match_classes(open_images(tmp_path / "odd"), bank)


ODD = ["two words.png", "ä ö 图 😀.png", "comma, then.png", "a,b.png", "quote'\"s.png", "#%&?*.png",
       "1 2.png", "<img onerror=x>.png"]


def test_odd_names_in_folders_and_lists(tmp_path):
    tree(tmp_path / "images", *ODD, "new\nline.png")
    folder = open_images(tmp_path / "images")
    assert sorted(folder.paths) == sorted([*ODD, "new\nline.png"])
    for ending, labels in (("", None), (" 1", [1] * len(ODD)), (",1", [1] * len(ODD))):
        (tmp_path / "list.txt").write_text("".join(f"{name}{ending}\n" for name in ODD))
        images = open_images(tmp_path / "list.txt", root=tmp_path / "images")
        assert list(images.paths) == ODD
        assert (images.labels if labels is None else images.labels.tolist()) == labels
    assert [images.read(i).size for i in range(len(ODD))] == [IMAGE.size] * len(ODD)


def test_shapes():
    assert len(open_images("shapes")) == 5_000 and len(open_images("shapes", "val")) == 1_000
    train, val = open_images("shapes:50"), open_images("shapes:50", "val")
    assert (len(train), len(val), len(open_images("shapes:1", "val"))) == (50, 10, 1)
    assert len(train.labels) == len(train.paths) == 50 and len(train.classes) == 10
    assert train.fingerprint not in (val.fingerprint, open_images("shapes:51").fingerprint)
    assert has_split("shapes:50", "val")


def test_torchvision_sets(monkeypatch):
    asked = []

    def stand_in(**attributes):
        def make(root, download, **which):
            asked.append((root, which))
            return SimpleNamespace(**attributes)

        return make

    pixels = np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3)
    monkeypatch.setattr(named.torchvision.datasets, "CIFAR10",
                        stand_in(data=pixels, targets=[2, 0, 1], classes=["a", "b", "c"]))
    monkeypatch.setattr(named.torchvision.datasets, "STL10",
                        stand_in(data=pixels.transpose(0, 3, 1, 2), labels=np.array([1, -1, -1])))
    images, others = open_images("cifar10:/some/where", "val"), open_images("stl10")
    assert asked == [("/some/where", {"train": False}), ("data/stl10", {"split": "train+unlabeled"})]
    assert images.labels.tolist() == [2, 0, 1] and others.labels.tolist() == [1, -1, -1]
    assert images.classes == ["a", "b", "c"] and len(images.paths) == len(images) == len(others) == 3
    for i, found in itertools.product(range(3), (images, others)):
        image = found.read(i)
        assert image.mode == "RGB" and np.array_equal(np.asarray(image), pixels[i])

    def offline(*arguments, **options):
        raise RuntimeError("no network")

    monkeypatch.setattr(named.torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(DataError, match=r"cifar10.*no network"):
        open_images("cifar10")

    def damaged(*arguments, **options):
        raise EOFError("Compressed file ended")  # tarfile, pickle and scipy.io each raise their own

    monkeypatch.setattr(named.torchvision.datasets, "SVHN", damaged)
    with pytest.raises(DataError, match=r"svhn cannot be read from data/svhn, nor downloaded: EOFError: Com"):
        open_images("svhn")


# ---------------------------------------------------------------------------------------------- scanning


def test_hidden_and_foreign_files_are_skipped(tmp_path):
    tree(tmp_path, "cat/1.png", "cat/._1.jpg", "cat/.hidden.png", "cat/.thumbnails/1.png", ".trash/1.png")
    for name in ("Thumbs.db", ".DS_Store", "cat/Thumbs.db", "cat/readme.txt", "cat/jpg", "notes.npy"):
        (tmp_path / name).write_bytes(b"x")
    assert list(open_images(tmp_path).paths) == ["cat/1.png"]


def test_extensions_in_any_case(tmp_path):
    names = ["a.JPG", "b.Jpeg", "c.JPEG", "d.PNG", "e.webp", "f.TIF", "g.tiff", "h.bmp", "i.gif", "j.ppm"]
    assert list(open_images(tree(tmp_path, *names)).paths) == names


def test_every_ending_is_read_as_its_format(tmp_path):
    for ending in EXTENSIONS:
        noise().save(tmp_path / f"a{ending}")
    images = open_images(tmp_path)
    assert len(images) == len(EXTENSIONS) == 14
    assert all(images.read(i).size == (64, 64) for i in range(len(images)))


def test_files_that_are_left_out_are_said(tmp_path, capsys):
    tree(tmp_path, "cat/1.png", "cat/2.jfif", "dog/3.jpe")
    assert list(open_images(tmp_path).paths) == ["cat/1.png", "cat/2.jfif", "dog/3.jpe"]
    assert not capsys.readouterr().out
    for name in ("cat/4.heic", "cat/5.HEIC", "dog/6.heic", "dog/read me", "dog/7.txt", "dog/8.n\no"):
        (tmp_path / name).touch()
    assert len(open_images(tmp_path)) == 3
    assert capsys.readouterr().out == (f"warning: {tmp_path}: 6 files are left out: "
                                       "3 .heic, 2 of other names, 1 .txt\n")
    with pytest.raises(DataError, match=r"holds no images \(.*\): 1 \.heic$"):
        (tmp_path / "empty").mkdir()
        (tmp_path / "empty" / "1.heic").touch()
        open_images(tmp_path / "empty")


def test_folders_that_systems_make_are_no_classes(tmp_path, capsys):
    tree(tmp_path, "cat/1.png", "cat/@eaDir/1.png/SYNOPHOTO_THUMB_M.jpg", "@eaDir/cat/2.jpg", "desktop.ini",
         "__MACOSX/cat/3.png", "#recycle/4.png", "$RECYCLE.BIN/5.png", "lost+found/6.png", "cat/Thumbs.db")
    images = open_images(tmp_path)
    assert list(images.paths) == ["cat/1.png"] and images.classes == ["cat"] and not capsys.readouterr().out


def special_files(root):
    """A pipe, a socket, links to a device and to the pipe."""
    os.mkfifo(root / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(root / "socket.jpg"))  # the length of its name is limited
    (root / "device.jpg").symlink_to("/dev/zero")
    (root / "link.jpg").symlink_to("pipe.jpg")
    return ["pipe.jpg", "socket.jpg", "device.jpg", "link.jpg"]


def test_what_is_not_a_regular_file_is_left_out(tmp_path, capsys, in_time, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "a.png")
    (tmp_path / "gone.png").symlink_to("nowhere")  # an image that cannot be read: bad_images.txt names it
    special_files(tmp_path)
    images = open_images(tmp_path)
    assert list(images.paths) == ["a.png", "gone.png"] and "4 not regular files\n" in capsys.readouterr().out
    assert read_or_next(images, 1)[0] == 0


def test_what_is_not_a_regular_file_is_never_opened(tmp_path, in_time, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree(tmp_path, "a.png")
    names = special_files(tmp_path)
    images = Files(tmp_path, [*names, "a.png"])
    for i in range(len(names)):
        with pytest.raises(OSError, match="not a regular file"):
            images.read(i)
    assert read_or_next(images, 0)[0] == len(names)
    (tmp_path / "list.txt").write_text("a.png\npipe.jpg\n")
    with pytest.raises(DataError, match=r"line 2: .*pipe\.jpg is not a regular file"):
        open_images(tmp_path / "list.txt")
    with pytest.raises(DataError, match=r"pipe\.jpg is neither a folder nor a regular file"):
        open_images(tmp_path / "pipe.jpg")


def test_a_tree_of_any_depth_is_scanned(tmp_path):
    name = "d/" * 300 + "a.png"
    tree(tmp_path, name)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 100)
    try:
        assert list(open_images(tmp_path).paths) == [name]
    finally:
        sys.setrecursionlimit(limit)


def test_paths_come_in_the_order_of_their_bytes(tmp_path):
    names = ["10.png", "2.png", "B.png", "a.png", "b.png", "é.png", "图.png"]
    assert list(open_images(tree(tmp_path, *random.Random(0).sample(names, len(names)))).paths) == names


def test_links_back_into_the_tree_are_cut(tmp_path):
    root = tree(tmp_path / "root", "cat/1.png", "cat/deep/2.png", "dog/3.png")
    for link, target in (("cat/up", ".."), ("cat/deep/here", "."), ("dog/outside", "../.."), ("copy", "cat"),
                         ("gone", "nowhere")):
        (root / link).symlink_to(target)
    images = open_images(root)
    assert list(images.paths) == ["cat/1.png", "cat/deep/2.png", "dog/3.png"] and images.classes == ["cat",
                                                                                                     "dog"]


def test_links_to_other_folders_are_followed_once(tmp_path):
    tree(tmp_path / "elsewhere", "1.png", "2.png")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "elsewhere")
    root = tree(tmp_path / "root", "dog/3.png")
    (root / "cat").symlink_to(tmp_path / "elsewhere")
    (root / "cat again").symlink_to(tmp_path / "elsewhere")
    images = open_images(root)
    assert list(images.paths) == ["cat/1.png", "cat/2.png", "dog/3.png"] and images.classes == ["cat", "dog"]
    assert images.read(0).size == IMAGE.size
    (tmp_path / "link to root").symlink_to(root)
    assert list(open_images(tmp_path / "link to root").paths) == list(images.paths)


def test_a_link_to_itself_does_not_stop_the_scan(tmp_path):
    tree(tmp_path, "cat/1.png")
    (tmp_path / "cat" / "self").symlink_to("self")
    assert "cat/1.png" in list(open_images(tmp_path).paths)


def test_same_name_and_same_file_twice_are_distinct(tmp_path):
    tree(tmp_path, "cat/1.png", "dog/1.png")
    os.link(tmp_path / "cat/1.png", tmp_path / "dog/2.png")
    (tmp_path / "dog" / "3.png").symlink_to(tmp_path / "cat/1.png")
    assert list(open_images(tmp_path).paths) == ["cat/1.png", "dog/1.png", "dog/2.png", "dog/3.png"]


def test_empty_class_folder_is_left_out(tmp_path, capsys):
    tree(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / "bird" / "empty").mkdir(parents=True)
    images = open_images(tmp_path)
    assert images.classes == ["cat", "dog"] and images.labels.tolist() == [0, 1]
    assert "1 folders without images" in capsys.readouterr().out


def test_names_that_are_not_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    tree(tmp_path, f"cat/{name}")
    (tmp_path / "list.txt").write_bytes(b"cat/caf\xe9.png 1\n")
    for images in (open_images(tmp_path), open_images(tmp_path / "list.txt")):
        assert list(images.paths) == [f"cat/{name}"] and images.read(0).size == IMAGE.size


def test_long_names_and_deep_folders(tmp_path):
    deep = "/".join(["d"] * 300 + ["f" * 200] * 5 + ["n" * 251 + ".png"])
    images = open_images(tree(tmp_path, deep))
    assert list(images.paths) == [deep] and images.classes == ["d"] and images.read(0).size == IMAGE.size


def test_a_path_too_long_for_the_system_is_an_error_of_the_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(25):  # 25 x 201 bytes: more than the 4096 that a path may have
        os.mkdir("f" * 200)
        os.chdir("f" * 200)
    with pytest.raises(DataError):
        open_images(tmp_path)


# ---------------------------------------------------------------------------------------------- errors


def bad_list(text):
    def make(root):
        tree(root, "a.png", "b.png")
        (root / "list.txt").write_bytes(text)
        return root / "list.txt", "train"

    return make


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda root: (root / "nowhere", "train"), "nowhere does not exist"),
        (lambda root: (root, "train"), "holds no images"),
        (lambda root: (tree(root, "a.png"), "val"), "no val/ folder"),
        (lambda root: (bad_list(b"a.png\n")(root)[0], "val"), "--val"),
        (bad_list(b"a.png\nb.png\nc.png\n"), r"line 3: \S+c\.png does not exist"),
        (bad_list(b"a.png 0\nb.png\n"), "line 2 has no label"),
        (bad_list(b"a.png\nb.png 1\n"), "line 1 has no label"),
        (bad_list(b""), "not a list of images"),
        (bad_list(b" \n\n"), "not a list of images"),
        (bad_list(bytes(range(256))), "list.txt"),
        (bad_list(bytes(1000)), "not a list of images"),
        (lambda root: ("shapes:0", "train"), "shapes:0"),
        (lambda root: ("shapes:many", "train"), "shapes:many"),
        (lambda root: ("shapes:²", "train"), "shapes:²"),
        (lambda root: ("shapes:9999999999", "train"), "below 10 million"),
        (lambda root: ("", "train"), "'' is not a name, is a variable of the shell empty"),
        (lambda root: ("shapes:", "train"), "'shapes:' is not a name"),
        (lambda root: ("cifar10:", "train"), "'cifar10:' is not a name"),
        (lambda root: ("x" * 300, "train"), "xxx cannot be read: File name too long|does not exist"),
        pytest.param(bad_list(b"x" * 5000), "list.txt"),
        pytest.param(bad_list(b"a.png\n\n\nc.png\n"), "line 4"),
    ],
    ids=[
        *("missing", "empty folder", "no val", "val of a list", "missing file", "label missing", "label on "
                                                                                                 "some"),
        *("empty list", "blank list", "binary", "zeros", "shapes:0", "shapes:many",
          "shapes:²", "too many shapes", "empty", "shapes:", "cifar10:", "long name", "one long line"),
        "blank lines",
    ],
)
def test_what_cannot_be_opened(tmp_path, make, message):
    spec, split = make(tmp_path)
    with pytest.raises(DataError, match=message) as error:
        open_images(spec, split)
    assert error.value.exit_code == 3 and "\n" not in str(error.value)
    assert str(spec) in str(error.value)


def test_folder_without_permission_is_named(tmp_path, monkeypatch):
    tree(tmp_path, "cat/1.png", "dog/2.png")
    scandir = os.scandir

    def closed(path):
        if str(path).endswith("dog"):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match="dog cannot be read: Permission denied"):
        open_images(tmp_path)


def test_list_with_a_byte_order_mark(tmp_path):
    tree(tmp_path, "a.png")
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfa.png 1\n")
    assert list(open_images(tmp_path / "list.txt").paths) == ["a.png"]


# ---------------------------------------------------------------------------------------------- decoding


def png_16_bit_rgb(path):
    """Pillow reads this kind but cannot write it."""
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in RGB.astype(np.int64) * 257)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 80, 48, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)),
              (b"IEND", b"")]
    body = (struct.pack(">I", len(c)) + kind + c + struct.pack(">I",
                                                               zlib.crc32(kind + c)) for kind, c in chunks)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))


def frames(path, **options):
    IMAGE.save(path, save_all=True, append_images=[Image.fromarray(255 - RGB), noise(16).resize(IMAGE.size)],
               **options)


ALPHA = Image.fromarray(np.random.default_rng(1).integers(0, 256, GREY.shape, dtype=np.uint8))
BLACK_WHITE = (GREY > 127) * np.uint8(255)
KINDS = {  # name: (file name, writer, what it shows)
    "rgb": ("a.png", IMAGE.save, RGB),
    "jpeg": ("a.jpg", lambda path: IMAGE.save(path, quality=95, subsampling=0), RGB),
    "progressive jpeg": ("a.jpg", lambda path: IMAGE.save(path, quality=95, subsampling=0, progressive=True),
                         RGB),
    "cmyk jpeg": ("a.jpg", lambda path: IMAGE.convert("CMYK").save(path, quality=95), RGB),
    "grey jpeg": ("a.jpg", lambda path: IMAGE.convert("L").save(path, quality=95), GREY),
    "png named jpg": ("a.jpg", lambda path: IMAGE.save(path, "png"), RGB),
    "grey": ("a.png", IMAGE.convert("L").save, GREY),
    "grey alpha": ("a.png", Image.merge("LA", [IMAGE.convert("L"), ALPHA]).save, GREY),
    "alpha": ("a.png", Image.merge("RGBA", [*IMAGE.split(), ALPHA]).save, RGB),
    "palette": ("a.png", IMAGE.quantize(256).save, RGB),
    "transparent palette": ("a.png",
                            lambda path: IMAGE.quantize(256).save(path, transparency=bytes(range(256))), RGB),
    "1 bit": ("a.png", Image.fromarray(BLACK_WHITE).convert("1").save, BLACK_WHITE),
    "16-bit grey png": ("a.png", Image.fromarray(GREY.astype(np.uint16) * 257).save, GREY),
    "16-bit grey tiff": ("a.tif", Image.fromarray(GREY.astype(np.uint16) * 257).save, GREY),
    "16-bit rgb": ("a.png", png_16_bit_rgb, RGB),
    "float 0..1": ("a.tif", Image.fromarray((GREY / 255).astype(np.float32)).save, GREY),
    "float 0..255": ("a.tif", Image.fromarray(GREY.astype(np.float32)).save, GREY),
    "float 0..65535": ("a.tif", Image.fromarray(GREY.astype(np.float32) * 257).save, GREY),
    "int32 0..255": ("a.tif", Image.fromarray(GREY.astype(np.int32)).save, GREY),
    "int32 0..2^30": ("a.tif", Image.fromarray(GREY.astype(np.int32) * (2**30 // 255)).save, GREY),
    "animated gif": ("a.gif", frames, RGB),
    "animated webp": ("a.webp", lambda path: frames(path, lossless=True), RGB),
    "animated png": ("a.png", frames, RGB),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_decodes_to_rgb(tmp_path, kind):
    name, write, shown = KINDS[kind]
    write(tmp_path / name)
    image = decode(tmp_path / name)
    assert image.mode == "RGB"
    shown = shown if shown.ndim == 3 else shown[..., None].repeat(3, axis=2)
    assert abs(np.asarray(image, dtype=np.float64) - shown).mean() < 2  # of 255


def test_exif_orientation_is_ignored(tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        IMAGE.save(tmp_path / "a.png", exif=exif)
        assert Image.open(tmp_path / "a.png").getexif()[0x0112] == orientation
        assert np.array_equal(decode(tmp_path / "a.png"), RGB)


def encoded(extension):
    def make(path):
        noise().save(path.with_suffix(f".{extension}"))
        return path.with_suffix(f".{extension}").read_bytes()

    return make


DAMAGED = {**{f"half a {e}": lambda path, e=e: (b := encoded(e)(path))[: len(b) // 2] for e in (
    "jpg", "png", "gif", "webp", "tif", "bmp")}, "without its last bytes": lambda path: encoded("jpg")(
        path)[:-20], "header only": lambda path: encoded("jpg")(path)[:20], "no bytes": lambda path: b"",
           "zeros": lambda path: bytes(1000),
           "html": lambda path: b"<!DOCTYPE html><html><body>404</body></html>"}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_image_is_replaced_by_the_next(tmp_path, kind):
    body = DAMAGED[kind](tmp_path / "whole")
    root = tree(tmp_path / "images", "a.png", "c.png")
    (root / "b.jpg").write_bytes(body)
    images = open_images(root)
    with pytest.raises(Exception):  # noqa: B017 (Pillow's decoders raise many kinds)
        images.read(1)
    index, image = read_or_next(images, 1)
    assert index == 2 and image.size == IMAGE.size
    assert read_or_next(images, 0)[0] == 0


def test_decompression_bomb_is_refused(tmp_path, monkeypatch):
    noise(64).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2)  # Pillow refuses twice this
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # below the limit there is no word
        assert decode(tmp_path / "a.png").size == (64, 64)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 64 // 2 - 1)
    with pytest.raises(Image.DecompressionBombError):
        decode(tmp_path / "a.png")


def test_a_picture_of_400_million_pixels_costs_no_memory(tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "a.png")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Image.DecompressionBombError):
        decode(tmp_path / "a.png")
    # of the 1.2 million KB that it has as RGB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10_000


def test_file_that_goes_away_is_replaced_by_the_next(tmp_path):
    images = open_images(tree(tmp_path, "a.png", "b.png"))
    (tmp_path / "b.png").unlink()
    assert read_or_next(images, 1)[0] == 0  # after the last comes the first


def test_at_most_tries_images_in_a_row_are_read():
    class Holey:
        def __len__(self):
            return 300

        def read(self, i):
            if i < 150:
                raise OSError
            return i

    assert read_or_next(Holey(), 60) == (150, 150)
    assert read_or_next(Holey(), 150 - TRIES + 1) == (150, 150)
    assert read_or_next(Holey(), 150 - TRIES) == (150 - TRIES, None)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_transient_error_is_retried(tmp_path, monkeypatch, number):
    naps, failures = [], [number, number]
    monkeypatch.setattr(files.time, "sleep", naps.append)
    image_open = Image.open

    def flaky(path, **options):
        if failures:
            raise OSError(failures.pop(), "transient")
        return image_open(path, **options)

    monkeypatch.setattr(Image, "open", flaky)
    tree(tmp_path, "a.png")
    assert np.array_equal(decode(tmp_path / "a.png"), RGB)
    assert len(naps) == 2 and 0 < naps[0] < naps[1]
    failures[:] = [number] * 3
    with pytest.raises(OSError):
        decode(tmp_path / "a.png")
    assert not failures


def test_lasting_error_is_not_retried(tmp_path, monkeypatch):
    monkeypatch.setattr(files.time, "sleep",
                        lambda seconds: pytest.fail("waited for a file that is not there"))
    with pytest.raises(FileNotFoundError):
        decode(tmp_path / "a.png")


def test_a_known_bad_file_is_not_touched_again(tmp_path, monkeypatch):
    naps, opened = [], []

    def failing(path, **options):
        opened.append(path)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(files.time, "sleep", naps.append)
    images = open_images(tree(tmp_path, "a.png", "b.png"))
    monkeypatch.setattr(Image, "open", failing)
    for _ in range(3):
        with pytest.raises(OSError, match="Input/output error") as error:
            images.read(1)
        assert reason(error.value) == "Input/output error"
    assert opened == [str(tmp_path / "b.png")] * 3 and sum(naps) < 2  # one touch, tried three times
    assert read_or_next(images, 1) == (1, None) and len(opened) == 6


def test_only_the_formats_of_the_endings_are_tried(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the name of the file is."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *arguments, **options: started.append(arguments) or 1 / 0)
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    with pytest.raises(UnidentifiedImageError):
        decode(tmp_path / "a.jpg")
    assert not started


@pytest.mark.parametrize("megabytes", [2, 60])
def test_a_png_with_a_long_text_is_read(tmp_path, megabytes):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * (megabytes << 20), zip=True)
    IMAGE.save(tmp_path / "a.png", pnginfo=text)
    assert np.array_equal(decode(tmp_path / "a.png"), RGB)


def test_a_png_whose_text_is_a_bomb_is_refused(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * (70 << 20), zip=True)
    IMAGE.save(tmp_path / "a.png", pnginfo=text)
    with pytest.raises(ValueError, match="too large"):
        decode(tmp_path / "a.png")


def test_bad_images_are_named_with_the_reason(tmp_path, monkeypatch):
    root = tree(tmp_path / "images", *"abcde")
    images = Files(root, list("abcde"))
    (root / "b").write_text("no image")
    (root / "c").unlink()
    found = Unreadable(images, 9, tmp_path / "bad_images.txt", lambda write: write())
    found.add({1})
    found.add({1, 2, 4})
    lines = (tmp_path / "bad_images.txt").read_text().splitlines()
    assert lines == ["b\tUnidentifiedImageError: cannot identify the image file",
                     "c\tNo such file or directory", "e\tit can be read now"]
    resumed = Unreadable(images, 3, tmp_path / "bad_images.txt", lambda write: write())
    resumed.found = {1, 2, 4}
    monkeypatch.setattr("common.engine.unreadable.SECONDS", 0.1)
    monkeypatch.setattr(Files, "read", lambda self, i: time.sleep(9))
    with pytest.raises(DataError, match=r"4 images .* more than --max-bad 3: 'a' \(not tried again\), 'b' "):
        resumed.add({0})
    assert (tmp_path / "bad_images.txt").read_text().splitlines()[3] == "e\tnot tried again"


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_thin_images_are_cropped(tmp_path, size):
    Image.new("RGB", size, (10, 200, 30)).save(tmp_path / "a.png")
    images = MultiCrop(open_images(tmp_path), (2, 6), (32, 8), ((0.14, 1), (0.05, 0.14)), Augmentation(), 0)
    for position in range(20):
        _, crops, _ = images[0, position, 0]
        assert [group.shape for group in crops] == [(2, 3, 32, 32), (6, 3, 8, 8)]
        assert all((group == torch.tensor([10, 200, 30]).view(3, 1, 1)).all() for group in crops)


# ------------------------------------------------------------------------------------------------------ table


def test_a_path_costs_its_bytes_and_no_objects():
    n = 200_000
    paths = [f"n{i % 1000:08d}/n{i % 1000:08d}_{i}.JPEG" for i in range(n)]
    images = Files("/root", paths, [i % 1000 for i in range(n)], [f"n{i:08d}" for i in range(1000)])
    tensors = [value for value in vars(images).values() if torch.is_tensor(value)]
    held, pickled = sum(t.numel() * t.element_size() for t in tensors), len(pickle.dumps(images))
    assert held < 60 * n and pickled < 60 * n
    assert pickled - held < 20_000  # whatever is not a tensor: one class name in a thousand, no path
    assert images.path(0) == paths[0] and images.path(
        n - 1) == paths[-1] and images.paths[12_345] == paths[12_345]


def test_images_are_read_after_pickling(tmp_path):
    images = open_images(tree(tmp_path, "cat/1.png", "dog/ü.png"))
    copy = pickle.loads(pickle.dumps(images))
    assert list(copy.paths) == list(images.paths) == ["cat/1.png", "dog/ü.png"]
    assert copy.labels.tolist() == [
        0, 1] and copy.classes == images.classes and copy.fingerprint == images.fingerprint
    assert np.array_equal(copy.read(1), RGB)


def test_fingerprint_tells_which_files(tmp_path):
    root = tree(tmp_path / "a", "cat/1.png", "dog/2.png")
    before = open_images(root).fingerprint
    shutil.copytree(root, tmp_path / "b")
    assert open_images(tmp_path / "b").fingerprint == before  # wherever they are
    tree(root, "dog/3.png")
    added = open_images(root).fingerprint
    (root / "dog/3.png").rename(root / "dog/4.png")
    renamed = open_images(root).fingerprint
    (root / "dog/4.png").rename(root / "cat/4.png")
    moved = open_images(root).fingerprint
    (root / "cat/1.png").unlink()
    removed = open_images(root).fingerprint
    assert len({before, added, renamed, moved, removed}) == 5
    (root / "cat/4.png").unlink()
    tree(root, "cat/1.png")
    assert open_images(root).fingerprint == before


# ---------------------------------------------------------------------------------------------- batches


@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 3), st.integers(0, 2**40),
       st.sampled_from([1, 2, 3, 4]), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_ranks_share_out_every_batch(n, batch_size, epoch, seed, world_size, drop_last, draw):
    order = draw.draw(st.none() | st.lists(st.integers(0, n - 1), min_size=1, max_size=60))
    options = dict(order=order, drop_last=drop_last)
    whole = list(batches(n, batch_size, epoch, seed, 0, 1, **options))
    ranks = [batches(n, batch_size, epoch, seed, rank, world_size, **options) for rank in range(world_size)]
    for step, batch in enumerate(whole):
        assert list(itertools.chain(*(part[step] for part in ranks))) == batch
        sizes = [len(part[step]) for part in ranks]
        assert max(sizes) - min(sizes) <= 1
    length = n if order is None else len(order)
    full, rest = divmod(length, batch_size)
    assert [len(batch) for batch in whole] == [batch_size] * full + [rest] * bool(rest and not drop_last)
    assert all(len(part) == len(whole) for part in ranks)
    positions, indices = zip(*itertools.chain(*whole)) if whole else ((), ())
    assert positions == tuple(range(len(positions)))
    if order is None:
        assert len(set(indices)) == len(indices) and set(indices) <= set(range(n))
    else:
        assert indices == tuple(order[: len(indices)])


def test_every_index_once_an_epoch():
    assert sorted(i for batch in batches(103, 8, 5, 1, 0, 1,
                                         drop_last=False) for _, i in batch) == list(range(103))


def test_order_is_a_function_of_seed_and_epoch():
    def order(epoch, seed, drop_last=True):
        return [pair for batch in batches(64, 8, epoch, seed, 0, 1, drop_last=drop_last) for pair in batch]

    first = order(1, 0)
    np.random.seed(1)
    torch.manual_seed(1)
    assert order(1, 0) == first == order(1, 0, drop_last=False)
    orders = [order(epoch, seed) for epoch in (0, 1, 2) for seed in (0, 1, 2)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_batches_are_a_sequence():
    sequence = batches(20, 8, 0, 0, 0, 1)
    assert len(sequence) == 2 and sequence[1] == list(sequence)[1]
    for step in (-1, 2):
        with pytest.raises(IndexError):
            sequence[step]


def test_paths_are_a_sequence():
    paths = Files("/", ["a", "b"]).paths
    assert (len(paths), paths[1], list(paths)) == (2, "b", ["a", "b"])
    for i in (-1, 2):
        with pytest.raises(IndexError):
            paths[i]


# ---------------------------------------------------------------------------------------------- the loader


CROPS = MultiCrop(Shapes("train", 40), (2, 1), (16, 8), ((0.3, 1), (0.1, 0.3)), Augmentation(), seed=3)


def expected(epoch, rank=0, world_size=1, dataset=CROPS):
    """The epoch's collated batches without a loader."""
    steps = batches(40, 8, epoch, 3, rank, world_size)
    return [collate([dataset[epoch, position, index] for position, index in batch]) for batch in steps]


def loaded(loader, epoch, rank=0, world_size=1, first=0):
    return list(loader.epoch(epoch, batches(40, 8, epoch, 3, rank, world_size), first))


def assert_same(got, wanted):
    assert len(got) == len(wanted) > 0
    for (index, crops, params), (wanted_index, wanted_crops, wanted_params) in zip(got, wanted):
        assert torch.equal(index, wanted_index) and torch.equal(params, wanted_params)
        assert all(map(torch.equal, crops, wanted_crops)) and len(crops) == len(wanted_crops)


def processes(before=()):
    return set(multiprocessing.active_children()).difference(before)


@pytest.mark.parametrize("workers, method", [(0, None), (3, "fork"), (1, "spawn"), (2, "forkserver")])
def test_epochs_are_the_same_in_any_worker(workers, method):
    before = processes()
    loader = Loader(CROPS, workers, start_method=method)
    assert_same(loaded(loader, 0), expected(0))
    started = processes(before)
    assert_same(loaded(loader, 1), expected(1))
    assert processes(before) == started and len(started) == workers  # they stay
    assert not loader.bad and not loader.lost
    loader.close()
    assert not any(process.is_alive() for process in started)


@pytest.mark.parametrize("workers", [0, 2])
def test_epoch_goes_on_from_any_step(workers):
    loader = Loader(CROPS, workers)
    assert_same(loaded(loader, 0, first=2), expected(0)[2:])
    assert loaded(loader, 0, first=5) == []
    left = loader.epoch(1, batches(40, 8, 1, 3, 0, 1))
    next(left)
    assert_same(loaded(loader, 2, first=4), expected(2)[4:])  # though the epoch before was left in its middle
    loader.close()


def test_keys_are_made_as_they_are_needed():
    class Watched(list):
        asked = 0

        def __getitem__(self, i):
            Watched.asked += 1
            return super().__getitem__(i)

    loader = Loader(CROPS)
    next(loader.epoch(0, Watched([[(0, 0)]] * 1000)))
    assert Watched.asked < 10


def test_shapes_of_a_batch():
    index, crops, params = loaded(Loader(CROPS), 0)[0]
    assert index.shape == (8,) and index.dtype == torch.int64
    assert [group.shape for group in crops] == [(2, 8, 3, 16, 16), (1, 8, 3, 8, 8)] and params.shape == (3, 8,
                                                                                                         8)
    assert {group.dtype for group in crops} == {torch.uint8} and params.dtype == torch.float32


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_together_load_what_one_rank_loads(world_size):
    parts_of = [loaded(Loader(CROPS), 1, rank, world_size) for rank in range(world_size)]
    together = []
    for parts in zip(*parts_of):
        index, crops, params = zip(*parts)
        together.append((torch.cat(index), [torch.cat(group, dim=1) for group in zip(*crops)],
                         torch.cat(params, dim=1)))
    assert_same(together, expected(1))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_listed_and_replaced(tmp_path, workers):
    root = tree(tmp_path, *(f"{i:02d}.png" for i in range(12)))
    for i in (2, 3, 7, 11):
        (root / f"{i:02d}.png").write_bytes(b"")
    dataset = MultiCrop(open_images(root), (1,), (8,), ((0.3, 1),), Augmentation(), seed=0)
    loader = Loader(dataset, workers)
    steps = batches(12, 4, 0, 0, 0, 1)
    got = list(loader.epoch(0, steps))
    loader.close()
    readable = {2: 4, 3: 4, 7: 8, 11: 0}
    wanted = [[(position, readable.get(index, index)) for position, index in batch] for batch in steps]
    assert_same(got,
                [collate([dataset[0, position, index] for position, index in batch]) for batch in wanted])
    assert [index.tolist() for index, _, _ in got] == [[index for _, index in batch] for batch in wanted]
    assert loader.bad == {2, 3, 7, 11} and loader.lost is False


@pytest.mark.parametrize("make", [lambda i: MultiCrop(i, (2,), (8,), ((0.3, 1),), Augmentation(), 0),
                                  lambda i: CenterCrop(i, 8, 8)])
def test_nothing_readable_is_lost(tmp_path, make):
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"")
    loader = Loader(make(open_images(tmp_path)))
    (index, crops, params), *others = loader.epoch(0, batches(3, 3, 0, 0, 0, 1))
    assert not others and index.tolist() == [-1] * 3 and not crops[0].any() and crops[0].shape[1:] == (3, 3,
                                                                                                       8, 8)
    assert params.shape == (len(crops[0]), 3, 8)
    assert loader.lost and loader.bad == {0, 1, 2}


def pinned_epoch():
    """An epoch of a loader for a GPU, how it starts its workers, and the bytes that each of them is sent."""
    images = Files("/", [f"n01440764/n01440764_{i}.JPEG" for i in range(10_000)], [0] * 10_000, ["tench"])
    sent = len(ForkingPickler.dumps(MultiCrop(images, (2,), (8,), ((0.3, 1),), Augmentation(), 0)))
    loader = Loader(CROPS, 2, pin_memory=True)
    got = loaded(loader, 0, rank(), world_size())
    loader.close()
    return got, type(loader._loader.multiprocessing_context).__name__, sent


def test_with_several_gpus_workers_are_no_forks_of_a_process_that_uses_nccl():
    for number, (got, method, sent) in enumerate(ranks(2, pinned_epoch)):
        assert_same(got, expected(0, number, 2))
        assert method == "ForkServerContext" and sent < 5000
    assert pinned_epoch()[1] == "NoneType"


def test_workers_outlive_a_stop_signal():
    before = processes()
    loader = Loader(CROPS, 1)
    epoch = loader.epoch(0, batches(40, 8, 0, 3, 0, 1))
    got = [next(epoch)]
    for process in processes(before):
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    assert_same(got + list(epoch), expected(0))
    loader.close()


def test_a_fork_server_outlives_a_stop_signal():
    code = "import os, signal, sys, time, multiprocessing.forkserver as f; from common import data\n"
    code += "data._start_forkserver(); pid = f._forkserver._forkserver_pid; os.kill(pid, signal.SIGTERM)\n"
    code += "time.sleep(0.5); sys.exit(os.waitpid(pid, os.WNOHANG) != (0, 0))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_automatic_number_of_workers_is_a_share_of_the_cores(monkeypatch):
    def workers(cores, processes):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        return Loader(CROPS, -1)._loader.num_workers

    assert [workers(*pair) for pair in ((1, 1), (4, 1), (32, 1), (32, 4), (8, 8))] == [1, 3, 8, 7, 1]
