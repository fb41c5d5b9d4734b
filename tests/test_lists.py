"""Published lists of images: each must open as the class folders that it describes."""

import errno
import json
import os
import re

import pytest
import torch
from PIL import Image

from common.data import open_images
from common.engine.errors import DataError
from common.engine.held_out import match_classes, open_queries
from common.sources.lists import open_list

# Class folder: its images. Names sort as bytes (n1 after n02), and train has them in another order than val.
TRAIN = {"n02": ["n02_7.JPEG", "n02_30.JPEG"], "n01": ["n01_10026.JPEG"],
         "n1": ["n1_5.JPEG", "n1_6.JPEG", "n1_9.JPEG"]}
VAL = {"n1": ["val_3.JPEG"], "n02": ["val_1.JPEG", "val_4.JPEG"], "n01": ["val_2.JPEG"]}
NAMES = ["n01", "n02", "n1"]


def folders(root, split, classes):
    for name, files in classes.items():
        for i, file in enumerate(files):
            path = root / split / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4), (40 * i, 0, 0)).save(path)
    return root


def table(images):
    """{file name: class name} of a set, whatever folder it starts from."""
    return {path.rpartition("/")[2]: images.classes[label] for path, label in zip(images.paths,
                                                                                  images.labels.tolist())}


@pytest.fixture
def imagenet(tmp_path):
    return folders(folders(tmp_path / "imagenet", "train", TRAIN), "val", VAL)


def test_places205(imagenet):
    folder = open_images(imagenet)
    lines = [f"{path} {label}" for path, label in zip(folder.paths, folder.labels.tolist())]
    for text in ("\n".join(lines), "\r\n".join(lines).replace(" ", ",")):
        (imagenet / "places.csv").write_text(text)
        images = open_images(imagenet / "places.csv")  # its paths start at train/
        assert list(images.paths) == list(folder.paths) and images.labels.tolist() == folder.labels.tolist()
        assert images.read(2).getpixel((0, 0)) == folder.read(2).getpixel((0, 0)) and images.classes == [
            "0", "1", "2"]


@pytest.mark.parametrize("below", ["", "train"])
def test_simclr_subsets(imagenet, tmp_path, below):
    names = ["n1_9.JPEG", "n02_30.JPEG", "n01_10026.JPEG", "n02_7.JPEG"]
    (tmp_path / "1percent.txt").write_text("".join(f"{name}\n" for name in names))
    images = open_images(tmp_path / "1percent.txt", root=imagenet / below)
    folder = table(open_images(imagenet))
    assert images.classes == NAMES and table(images) == {name: folder[name] for name in names}
    assert list(images.paths)[:2] == ["n1/n1_9.JPEG", "n02/n02_30.JPEG"] and images.read(1).size == (4, 4)
    queries = open_queries(imagenet)
    match_classes(queries, images)
    assert table(queries) == table(open_images(imagenet, "val"))


def test_bare_names_that_are_where_they_say_have_no_class(imagenet, tmp_path):
    (tmp_path / "list.txt").write_text("n02_7.JPEG\nn02_30.JPEG\n")
    images = open_images(tmp_path / "list.txt", root=imagenet / "train" / "n02")
    assert images.labels is None and list(images.paths) == ["n02_7.JPEG", "n02_30.JPEG"]


def test_a_simclr_name_that_is_not_there(imagenet, tmp_path):
    (tmp_path / "list.txt").write_text("n02_7.JPEG\nn01_7.JPEG\n")
    with pytest.raises(DataError, match=r"line 2: \S+train/n01/n01_7.JPEG does not exist"):
        open_images(tmp_path / "list.txt", root=imagenet)


@pytest.mark.parametrize("labels", ["numbers", "names"])
@pytest.mark.parametrize("root", ["imagenet", "imagenet/val", ""])
def test_flat_val_with_a_list(imagenet, tmp_path, labels, root):
    expected = table(open_images(imagenet, "val"))
    for name in expected:  # ImageNet's own val/: all images in one folder
        next(imagenet.glob(f"val/*/{name}")).rename(imagenet / "val" / name)
    lines = "".join(f"{name} {NAMES.index(label) if labels == 'numbers' else label}\n"
                    for name, label in sorted(expected.items()))
    path = (tmp_path if root else imagenet / "val") / "val.txt"
    path.write_text(lines)
    bank, queries = open_images(imagenet), open_queries(str(imagenet), str(path),
                                                        str(tmp_path / root) if root else "")
    match_classes(queries, bank)
    assert table(queries) == expected and queries.classes == bank.classes == NAMES and len(
        queries.read(0).size) == 2


def annotations(images, classes, extra=()):
    ids = {f"{name}": number for number, name in enumerate([*classes, *extra])}
    paths = {path: i for i, path in enumerate(images, 1000)}
    return {"info": {"year": 2018}, "images": [
        {"id": i, "file_name": path, "width": 4, "height": 4} for path, i in paths.items()], "categories": [
            {"id": number, "name": name, "supercategory": "Aves"} for name, number in ids.items()],
            "annotations": [{"id": i, "image_id": i,
                             "category_id": ids[path.split("/")[1]]} for path, i in reversed(paths.items())]}


def test_inaturalist(tmp_path):
    names = [str(i) for i in range(12)]  # in the order of bytes 10 comes before 2
    train, val = ({name: [f"{split}{name}_{i}.jpg" for i in range(2)] for name in names} for split in ("t",
                                                                                                       "v"))
    folders(folders(tmp_path, "train", train), "val", val)
    (tmp_path / "train.json").write_text(
        json.dumps(annotations([f"train/{n}/{f}" for n in names for f in train[n]], names)))
    (tmp_path / "val.json").write_text(
        json.dumps(annotations([f"val/{n}/{val[n][0]}" for n in ("10", "2", "7")], names)))
    images, queries = open_images(tmp_path / "train.json"), open_queries("", tmp_path / "val.json", tmp_path)
    assert images.classes == queries.classes == names  # of the table, with images or without
    assert table(images) == table(open_images(tmp_path))
    assert images.read(1).size == (4, 4) and images.labels.tolist() == [i // 2 for i in range(24)]
    match_classes(queries, images)
    folder = table(open_images(tmp_path, "val"))
    assert table(queries) == {file: folder[file] for file in ("v10_0.jpg", "v2_0.jpg", "v7_0.jpg")}
    # folders judged by a list, other way round
    match_classes(folder_val := open_images(tmp_path, "val"), images)
    assert folder_val.classes == names and table(folder_val) == folder
    unlabelled = annotations([f"train/{n}/{train[n][0]}" for n in names], names)
    unlabelled["annotations"][0]["category_id"] = -1
    (tmp_path / "some.json").write_text(json.dumps(unlabelled))
    assert open_images(tmp_path / "some.json").labels.tolist() == [*range(11), -1]
    (tmp_path / "test.json").write_text(json.dumps({"images": [{"id": 1, "file_name": "val/0/v0_0.jpg"}]}))
    assert open_images(tmp_path / "test.json").labels is None


def test_classes_without_an_image_do_not_count(tmp_path):
    # The table of categories of a part of iNaturalist's images is the whole one.
    folders(tmp_path, "train", {"a": ["1.png"], "b": ["2.png"]})
    (tmp_path / "t.json").write_text(json.dumps(annotations(["train/a/1.png", "train/b/2.png"], "ab")))
    (tmp_path / "v.json").write_text(json.dumps(annotations(["train/b/2.png"], "ab", extra="cd")))
    images, queries = open_images(tmp_path / "t.json"), open_queries("", tmp_path / "v.json")
    match_classes(queries, images)
    assert queries.labels.tolist() == [1] and queries.classes == images.classes == ["0", "1"]


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "is not a list of images in iNaturalist's format: images with id and file_name"),
        ("[1, 2]", "is not a list of images in iNaturalist's format"),
        ('{"images": [{"id": 3}]}', "is not a list of images in iNaturalist's format"),
        ('{"images": []}', "lists no images"),
        ('{"images": [{"id": 3, "file_name": "b.png"}]}', r"image 1: \S+b.png does not exist"),
        (
            '{"images": [{"id": 3, "file_name": "a.png"}, {"id": 4, "file_name": "a.png"}],'
            ' "annotations": [{"image_id": 3, "category_id": 5}]}',
            "image 4 has no annotation, but other images have one",
        ),
        (
            '{"images": [{"id": 3, "file_name": "a.png"}],'
            ' "annotations": [{"image_id": 3, "category_id": 5}, {"image_id": 3, "category_id": 6}]}',
            "2 annotations for 1 images: one each is needed",
        ),
        ('{"images": [{"id": 3, "file_name": 7}]}', "TypeError: expected str"),
        ('{"images": [{"id": 3, "file_name": null}]}', "TypeError: expected str"),
        ('{"images": [{"id": 3, "file_name": "\\ud800"}]}', "UnicodeEncodeError"),
        ('{"images": [{"id": 3, "file_name": "b\\n.png"}]}', r"image 1: \S+b\\n.png does not exist"),
        ('{"images": [{"id": 3, "file_name": "a.png"}, {"id": 3, "file_name": "b"}]}', "1 ids for 2 images"),
        ('{"images": [{"id": 3, "file_name": "a.png"}], "annotations": [{"image_id": [], "category_id": 5}]}',
         "unhashable"),
        ('{"images": [{"id": 3, "file_name": "a"}], "annotations": [{"image_id": 3, "category_id": null}]}',
         "a category_id is neither a whole number nor text"),
        ("[" * 100_000, "RecursionError"),
        ('{"images": ' + "1" * 5000, "ValueError"),
    ],
)
def test_annotations_that_cannot_be_used(tmp_path, content, words):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(DataError, match=words) as error:
        open_images(tmp_path / "list.json")
    assert "\n" not in str(error.value) and str(tmp_path / "list.json") in str(error.value)


def lists(tmp_path, **lines):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    for name, labels in lines.items():
        (tmp_path / f"{name}.txt").write_text("".join(f"a.png {label}\n" for label in labels))
    return [open_images(tmp_path / f"{name}.txt") for name in lines]


def test_a_number_that_train_lacks(tmp_path):
    bank, queries, more = lists(tmp_path, train=[0, 1, 3], val=[3, 2], more=[4, 0])
    for images, name in ((queries, "2"), (more, "4")):
        with pytest.raises(DataError, match=f"class '{name}' of the images to classify is not among the 3 "
                                            f"classes of the training images"):
            match_classes(images, bank)


def test_numbers_for_names_need_names_for_all(tmp_path, imagenet):
    bank = open_images(imagenet)
    (queries,) = lists(tmp_path, val=[1, 2, 3])  # counted from 1
    with pytest.raises(DataError, match=r"class '3' .* not among the 3 classes of the training images \(n01, "
                                        r"n02, ...\)"):
        match_classes(queries, bank)
    # three folders, four numbers: which is which?
    with pytest.raises(DataError, match=r"class 'n01' .* not among the 4 classes"):
        match_classes(open_images(imagenet, "val"), lists(tmp_path, train=[0, 1, 2, 3])[0])
    (train,) = lists(tmp_path, train=[0, 1, 2])
    match_classes(images := open_images(imagenet, "val"), train)
    assert images.labels.tolist() == [0, 1, 1, 2] and images.classes == ["0", "1", "2"]


def test_digits_as_folder_names_are_names(tmp_path):
    folders(tmp_path, "train", {str(i): ["1.png"] for i in range(11)})
    folders(tmp_path, "", {"x": ["a.png"]})
    (tmp_path / "val.txt").write_text("x/a.png 10\nx/a.png 2\n")
    bank, queries = open_images(tmp_path), open_images(tmp_path / "val.txt")
    match_classes(queries, bank)
    assert [bank.classes[i] for i in queries.labels.tolist()] == ["10", "2"]


def test_images_without_a_label_keep_none(tmp_path):
    bank, queries = lists(tmp_path, train=["b", "a"], val=["b", "a", "b"])
    queries.labels = torch.tensor([1, -1, 0])
    match_classes(queries, bank)
    assert queries.labels.tolist() == [1, -1, 0] and queries.classes is bank.classes


def test_a_long_list_holds_its_bytes_and_no_objects(tmp_path, monkeypatch):
    count = 30_000
    lines = "".join(f"data/images256/a/abbey/gsun_{i:032x}.jpg {i % 205}\n" for i in range(count))
    (tmp_path / "train_places205.csv").write_text(lines)
    looked = []
    monkeypatch.setattr(os.path, "isfile", lambda path: looked.append(path) or True)
    images = open_images(tmp_path / "train_places205.csv")
    assert len(images) == count and len(images.classes) == 205 and images.labels[206] == 1
    assert images.paths[20_000] == f"data/images256/a/abbey/gsun_{20_000:032x}.jpg"
    assert len(looked) <= 10_005  # not every file of the list
    held = sum(value.nbytes for value in vars(images).values() if isinstance(value, torch.Tensor))
    assert held < len(lines) + 16 * count and not any(isinstance(v, list) and len(v) > 205
                                                      for v in vars(images).values())


@pytest.mark.parametrize(
    "labels, numbers, classes",
    [
        (["2", "-1", "0"], [2, -1, 0], ["0", "1", "2"]),
        (["2.0", "-1.0", "0."], [2, -1, 0], ["0", "1", "2"]),  # as pandas writes a column with gaps
        (["1.0", "0", "-1"], [1, 0, -1], ["0", "1"]),
        (["b", "-1", "a"], [1, -1, 0], ["a", "b"]),
        (["7", "A", "-1"], [0, 1, -1], ["7", "A"]),  # digits and letters are characters' names
        (["1700000000", "-1", "5"], [0, -1, 1], ["1700000000", "5"]),
        (["-1", "-1.0"], None, []),
    ],
)
def test_minus_one_is_no_label(tmp_path, labels, numbers, classes):
    (images,) = lists(tmp_path, list=labels)
    assert images.classes == classes
    assert (images.labels if numbers is None else images.labels.tolist()) == numbers


def test_minus_one_needs_no_class_to_match(tmp_path):
    bank, queries = lists(tmp_path, train=["0", "-1", "1.0"], val=["1", "-1"])
    match_classes(queries, bank)
    assert bank.labels.tolist() == [0, -1, 1] and queries.labels.tolist() == [1, -1]


@pytest.mark.parametrize("odd", ["1.5", "-2", "nan", "1e3", "+1", "10000000.0"])
def test_numbers_that_are_no_class_are_refused(tmp_path, odd):
    with pytest.raises(DataError, match=f"line 2: label '{re.escape(odd)}': a whole number from 0"):
        lists(tmp_path, list=["1", odd, "0"])
    (images,) = lists(tmp_path, names=["cat", odd])  # beside names it is one
    assert images.classes == sorted(["cat", odd]) and not images.numbered


def test_a_list_that_is_too_large_is_refused_unread(tmp_path):
    with open(tmp_path / "list.txt", "wb") as file:
        file.truncate(2**40)  # no block of it is on the disk
    with pytest.raises(DataError, match="larger than 1 GiB"):
        open_images(tmp_path / "list.txt")


def test_a_list_that_cannot_be_read_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "list.txt").write_text("a.png")

    def failing(*arguments, **options):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr("builtins.open", failing)
    for name in ("list.txt", "list.json"):
        with pytest.raises(DataError, match=f"{name} cannot be read: Input/output error"):
            open_list(tmp_path / name, "", "train")


def test_names_are_never_matched_by_their_place(tmp_path):
    folders(tmp_path, "train", {"cat": ["1.png"], "dog": ["2.png"]})
    folders(tmp_path, "val", {"cow": ["3.png"], "hen": ["4.png"]})
    with pytest.raises(DataError, match=r"class 'cow' .* not among the 2 classes of the training images "
                                        r"\(cat, dog, ...\)"):
        match_classes(open_images(tmp_path, "val"), open_images(tmp_path))
