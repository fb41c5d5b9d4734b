"""Images in tars: the same as in a folder, whatever way they are packed; hostile tars in one line each."""

import functools
import gzip
import io
import json
import os
import pickle
import sys
import tarfile
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from evaluations import run_here as evaluate
from helpers import TINY, killed_and_resumed, losses, ranks, ranks_of, same, swav_here
from PIL import Image

import eval_knn
import eval_semisup
import swav
from common import data, distributed
from common.data import open_images
from common.engine.errors import DataError
from common.engine.launch import setup
from common.engine.options import parse
from common.multicrop import Augmentation, MultiCrop
from common.sources import tars


def add(tar, name, content=b"", kind=tarfile.REGTYPE, **fields):
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content), kind
    for field, value in fields.items():
        setattr(member, field, value)
    tar.addfile(member, io.BytesIO(content))


def tar_of(path, *members, mode="w", **how):
    """A tar of (name, content) members."""
    with tarfile.open(path, mode, **how) as tar:
        for name, content in members:
            add(tar, name, content)
    return path


def jpeg(i):
    file = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 255, (20 + i % 5, 24, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, ("JPEG", "PNG")[i % 2])
    return file.getvalue()


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The same 36 images of 3 classes as a folder and in tars; {form: what --data takes}."""
    root = tmp_path_factory.mktemp("packed")
    contents = {f"n0{i // 12}/{i % 12:02d}.{('JPEG', 'png')[i % 2]}": jpeg(i) for i in range(36)}
    for name, content in contents.items():
        path = root / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    with tarfile.open(root / "plain.tar", "w") as tar:
        tar.add(root / "folder", "./train", filter=lambda member: member if member.isdir() else None)
        for name, content in contents.items():
            add(tar, f"./train/{name}", content)
        add(tar, "./train/n00/._00.JPEG", b"what macOS adds")
    inner = []
    for c in range(3):
        tar_of(root / "inner", *((name[4:], content) for name, content in contents.items()
                                 if name[2] == str(c)))
        inner.append((f"n0{c}.tar", (root / "inner").read_bytes()))
    tar_of(root / "nested.tar", *inner)
    for form, ending in (("cls", "cls"), ("json", "json")):
        (root / form).mkdir()
        for shard in range(9):
            members = []
            for i, (name, content) in list(enumerate(contents.items()))[4 * shard : 4 * shard + 4]:
                label = name[2] if ending == "cls" else f'{{"label": "{name[:3]}", "x": 1}}'
                kind = name[-4:].strip(".").lower()
                parts = {"a.png": b"depth", ending: label.encode(), kind: content, "seg.png": b"a mask"}
                members += [(f"{i:06d}.{part}", found) for part, found in parts.items()]
            tar_of(root / form / f"part-{shard:03d}.tar", *members)
        (root / form / "index.txt").write_text("WebDataset keeps such files")
    lines = [f"{name} {int(name[2])}\n" for name in contents]
    (root / "list.txt").write_text("".join(lines))
    forms = {form: root / form for form in ("folder", "plain.tar", "nested.tar", "cls", "json")}
    return {**forms, "braces": f"{root}/cls/part-{{000..008}}.tar", "list": root / "list.txt"}


FORMS = ["plain.tar", "nested.tar", "cls", "json", "braces", "list"]


def opened(packed, form):
    root = packed["folder"] if form == "list" else ""
    return open_images(packed[form], root=root)


@pytest.mark.parametrize("form", FORMS)
def test_crops_and_labels_are_those_of_the_folder(packed, form, capsys):
    folder, images = opened(packed, "folder"), opened(packed, form)
    assert len(images) == len(images.paths) == 36 and images.labels.dtype == torch.int64
    assert images.labels.tolist() == folder.labels.tolist()
    names = folder.classes if form not in ("cls", "braces", "list") else ["0", "1", "2"]
    assert images.classes == names and images.numbered == (names != folder.classes)
    ours, others = (MultiCrop(part, (2, 2), (16, 8), [(0.2, 1), (0.1, 0.5)], Augmentation(), 0)
                    for part in (images, folder))
    for i in range(36):
        index, crops, params = ours[3, i, i]
        assert index == i and same(dict(enumerate(crops)), dict(enumerate(others[3, i, i][1])))
        assert torch.equal(params, others[3, i, i][2])
    numbered = [f"{i:06d}.{('jpeg', 'png')[i % 2]}" for i in range(36)]
    assert [path.removeprefix("train/") for path in images.paths] \
        == (list(folder.paths) if form in ("plain.tar", "nested.tar", "list") else numbered)


def test_a_run_and_its_knn_figures_are_those_of_the_folder(packed, tmp_path, capsys):
    figures = {}
    for form in ("folder", "nested.tar", "braces"):
        out = tmp_path / form
        small = ["--data", packed[form], "--recipe", "shapes", *TINY, "--epochs", 2, "--out", out]
        assert swav_here(*small, "--val", packed[form], "--eval-every", 1, "--workers", 2) == 0
        assert evaluate(eval_knn, out, "--val", packed["cls"] if form == "folder" else packed["folder"],
                        "--workers", 1) == 0
        record = json.loads(capsys.readouterr().out.splitlines()[-1])
        figures[form] = losses(out), {**record, "trunk": ""}
    assert figures["folder"] == figures["nested.tar"] == figures["braces"]


def test_a_fraction_of_a_tar_is_drawn_as_of_a_folder(packed, tmp_path, capsys):
    out, records = tmp_path / "run", []
    small = ["--data", packed["folder"], "--recipe", "shapes", *TINY, "--epochs", 1, "--out", out]
    assert swav_here(*small) == 0
    for form in ("folder", "nested.tar"):
        assert evaluate(eval_semisup, out, "--data", packed[form], "--val", packed["cls"],
                        "--epochs", 1, "--batch-size", 2, "--workers", 0, "--out", tmp_path / form) == 0
        records.append(json.loads(capsys.readouterr().out.splitlines()[-1]))
    assert records[0] == records[1] and records[0]["images"] < 36


def test_two_ranks_are_one_and_all_map_one_index(packed, tmp_path):
    small = ["--data", packed["nested.tar"], "--recipe", "shapes", *TINY, "--epochs", 2, "--device", "cpu"]
    small += ["--precision", "float64", "--val", packed["cls"], "--eval-every", 2]
    assert [code for code, _, _ in ranks_of(2, swav, *small, "--out", tmp_path / "two")] == [0, 0]
    assert swav_here(*small, "--out", tmp_path / "one") == 0
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=1e-9)
    assert len(list((tmp_path / "two").glob("index-*"))) == 2  # of the images to train on, and to judge by


def test_a_killed_run_goes_on_from_tars(packed, tmp_path):
    shared = ["--data", packed["braces"], "--recipe", "shapes", *TINY, "--batch-size", 18, "--epochs", 10]
    assert killed_and_resumed(swav, shared, tmp_path) == 7


def test_an_index_is_kept_until_a_shard_changes(tmp_path, capsys, monkeypatch):
    tar = tar_of(tmp_path / "a.tar", ("x/1.png", jpeg(1)), ("y/2.png", jpeg(3)))
    first = open_images(tar, index=tmp_path / "kept")
    (file,) = (tmp_path / "kept").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", None)
        second = open_images(tar, index=tmp_path / "kept")
    assert list(second.paths) == ["x/1.png", "y/2.png"] and second.fingerprint == first.fingerprint
    assert second.read(1).tobytes() == first.read(1).tobytes()
    other = tar_of(tmp_path / "b.tar", ("x/1.png", jpeg(5)), ("y/2.png", jpeg(3)))
    assert open_images(other).fingerprint != first.fingerprint  # the same names are other images
    with tarfile.open(tar, "a") as more:
        add(more, "y/3.png", jpeg(5))
    assert len(open_images(tar, index=tmp_path / "kept")) == 3
    (file,) = {*(tmp_path / "kept").iterdir()} - {file}
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"is not an index of images, or damaged: delete it: .*not whole"):
        open_images(tar, index=tmp_path / "kept")
    file.write_bytes(b"other")
    with pytest.raises(DataError, match="is not an index"):
        open_images(tar, index=tmp_path / "kept")


def test_an_index_that_cannot_be_written_is_a_warning(tmp_path, capsys):
    tar = tar_of(tmp_path / "a.tar", ("x/1.png", jpeg(1)))
    (tmp_path / "kept").write_text("a file")
    assert len(open_images(tar, index=tmp_path / "kept")) == 1
    assert "cannot be written" in capsys.readouterr().out


def test_a_run_keeps_the_index_and_fresh_leaves_it(packed, tmp_path):
    small = ["--data", packed["cls"], "--recipe", "shapes", *TINY, "--epochs", 1, "--max-steps", 1]
    assert swav_here(*small, "--out", tmp_path / "run") == 0
    (kept,) = (tmp_path / "run").glob("index-*")
    before = kept.stat().st_mtime_ns
    assert swav_here(*small, "--out", tmp_path / "run", "--fresh") == 0 and kept.stat().st_mtime_ns == before
    assert swav_here(*small, "--out", tmp_path / "other", "--index", tmp_path / "all") == 0
    assert not list((tmp_path / "other").glob("index-*")) and (tmp_path / "all" / kept.name).exists()


def test_what_is_pickled_is_the_name_of_a_file(packed):
    for form in ("folder", "list", "cls"):
        images = opened(packed, form)
        images.labels, images.classes = 2 - images.labels, ["c", "b", "a"]  # as an evaluation numbers them
        pickled = pickle.dumps(images)
        assert len(pickled) < 500
        again = pickle.loads(pickled)
        assert torch.equal(again.labels, images.labels) and again.classes == images.classes
        assert list(again.paths) == list(images.paths) and again.fingerprint == images.fingerprint
        assert again.read(7).tobytes() == images.read(7).tobytes()
        assert pickle.dumps(again) == pickled  # nothing is written again
        again.labels = 2 - again.labels
        assert torch.equal(pickle.loads(pickle.dumps(again)).labels, again.labels)


def test_no_room_for_what_ranks_map_is_said(packed, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    images = opened(packed, "folder")
    with monkeypatch.context() as patch:
        patch.setattr("common.sources.packed.save", full)
        with pytest.raises(DataError, match="cannot hold the list of the images: No space left"):
            pickle.dumps(images)
    assert len(pickle.loads(pickle.dumps(images))) == 36


def _node(spec):
    os.environ["LOCAL_RANK"] = str(distributed.rank() % 2)  # two nodes of two processes
    if distributed.rank() == 3:
        data.open_images = None  # it gets what its node's first process has opened
    images = distributed.from_first(data.open_images, spec)
    return images._file, len(images), images.read(0).tobytes()


def test_the_first_process_of_each_node_opens_the_images(packed):
    (a, *found), *others = ranks(4, _node, packed["cls"])
    assert [rest for _, *rest in others] == [found] * 3
    files = [a, *(file for file, *_ in others)]
    assert files[0] == files[1] != files[2] == files[3]


def _fails(place):
    os.environ["LOCAL_RANK"] = str(distributed.rank() % 2)
    try:
        distributed.from_first(open_images, "shapes:9" if distributed.rank() != place else "/nowhere")
    except DataError as error:
        return str(error)


def test_what_the_second_node_cannot_open_every_process_says():
    found = ranks(4, _fails, 2)
    assert found[0].startswith("/nowhere does not exist") and found == [found[0]] * 4


def _differs(folder):
    os.environ["LOCAL_RANK"] = "0"  # two nodes
    config = parse(swav.Config, swav.RECIPES, "", [
        "--recipe", "small", *TINY, "--data", f"shapes:{32 + distributed.rank()}", "--out", folder])
    try:
        setup(config)
    except DataError as error:
        return str(error)


def test_nodes_with_other_images_are_told_apart(tmp_path):
    found = ranks(2, _differs, str(tmp_path))
    assert found == ["the nodes do not hold the same images of shapes:32",
                     "the nodes do not hold the same images of shapes:33"]


@pytest.mark.parametrize("members,message", [
    ([("a.png", tarfile.SYMTYPE), ("b.png", tarfile.LNKTYPE), ("c.png", tarfile.FIFOTYPE)],
     "holds no images .*: 3 links, devices and files with holes"),
    (["../a.png", "x/../../b.png", "/etc/c.png"], "holds no images .*: 3 of names that lead elsewhere"),
    ([], "holds no images"),
    (["a.txt", "b.tar.gz"], "holds no images .*: 1 .txt, 1 .gz"),
], ids=["links", "climbing", "empty", "texts"])
def test_tars_without_images(tmp_path, members, message):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for member in members:
            path, kind = member if isinstance(member, tuple) else (member, tarfile.REGTYPE)
            add(tar, path, kind=kind, linkname="elsewhere.png")
    with pytest.raises(DataError, match=message) as error:
        open_images(tmp_path / "a.tar")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [1000, 100, 0], ids=["in a member", "in a header", "before the end"])
@pytest.mark.parametrize("nested", [False, True])
def test_truncated_tars(tmp_path, kept, nested):
    tar = tar_of(tmp_path / "a.tar", ("x/1.png", jpeg(1)), ("y/2.png", bytes(3000)),
                 format=tarfile.USTAR_FORMAT)
    whole = tar.read_bytes()
    cut = whole[: whole.index(b"y/2.png") + kept]
    if nested:
        tar_of(tar, ("n01.tar", cut), ("n02.tar", whole))
    else:
        tar.write_bytes(cut)
    with pytest.raises(DataError, match=r"a.tar.* (is cut off|is no tar)") as error:
        open_images(tar)
    assert "\n" not in str(error.value)


def test_a_member_larger_than_the_file(tmp_path):
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        member = tarfile.TarInfo("x/1.png")
        member.size = 1 << 40
        file.fileobj.write(member.tobuf())
        file.fileobj.write(bytes(4096))
    with pytest.raises(DataError, match=r"is cut off: 'x/1.png' goes on behind its end"):
        open_images(tar)


def test_packed_tars_and_what_is_no_tar(tmp_path):
    whole = tar_of(tmp_path / "a.tar", ("x/1.png", jpeg(1))).read_bytes()
    for name, content, message in (("b.tar", gzip.compress(whole), "is no tar, or a compressed or damaged"),
                                   ("b.tar.gz", gzip.compress(whole), "b.tar.gz is packed: unpack it"),
                                   ("c.tar", bytes(100), "is no tar"), ("d.tar", b"", "is no tar"),
                                   ("e.tar", os.urandom(5000), "is no tar")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as error:
            open_images(tmp_path / name)
        assert "\n" not in str(error.value)
    tar_of(tmp_path / "s-0.tar", ("x/1.png", jpeg(1)))
    for name, missing in (("none.tar", "none"), ("s-{0..3}.tar", "s-1")):
        with pytest.raises(DataError, match=f"{missing}.tar cannot be read: No such file"):
            open_images(tmp_path / name)
    with pytest.raises(DataError, match="is no range of shards"):
        open_images(str(tmp_path / "s-{3..0}.tar"))


def test_sparse_members_and_links_are_left_out_and_said(tmp_path, capsys):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        add(tar, "x/1.png", jpeg(1))
        add(tar, "x/2.png", kind=tarfile.SYMTYPE, linkname="1.png")
        add(tar, "x/3.png", jpeg(3), pax_headers={"GNU.sparse.size": "5000", "GNU.sparse.map": "0,3"})
    images = open_images(tmp_path / "a.tar")
    assert list(images.paths) == ["x/1.png"]
    assert "2 members are left out: 2 links, devices and files with holes\n" in capsys.readouterr().out


def test_odd_names(tmp_path):
    long = "d/" + "x" * 300 + ".png"
    names = [os.fsdecode(b"d/\xff\xfe.png"), "d/ä ö.PNG", long, "d/photo.2020.01.jpg", "d/photo.2020.02.jpg"]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        tar = tar_of(tmp_path / "a.tar", *((name, jpeg(1)) for name in names), format=form)
        images = open_images(tar)
        assert list(images.paths) == names and images.labels is None  # one folder: no classes
        assert images.read(0).size and images.read(4).size


@pytest.mark.parametrize("members,message", [
    ([("1.cls", b"0"), ("1.png", None), ("2.png", None)], "1 images have no label, but others have one"),
    ([("1.json", b"{"), ("1.png", None)], "the label in '1.json' cannot be read"),
    ([("1.json", b'{"label": 1.5}'), ("1.png", None)], "neither a whole number nor text"),
    ([("1.cls", b"\xff"), ("1.png", None)], "the label in '1.cls' cannot be read"),
    ([("1.cls", b"0" * 2**21), ("1.png", None)], "the label in '1.cls' cannot be read: .*2097152 bytes"),
])
def test_labels_that_cannot_be_used(tmp_path, members, message):
    tar = tar_of(tmp_path / "a.tar", *((name, content or jpeg(1)) for name, content in members))
    with pytest.raises(DataError, match=message) as error:
        open_images(tar)
    assert "\n" not in str(error.value)


def test_labels_behind_the_image_and_none(tmp_path):
    members = [("1.jpg", jpeg(0)), ("1.json", b'{"label": 2}'), ("2.jpg", jpeg(2)),
               ("2.json", b'{"label": 0}'), ("3.jpg", jpeg(4)), ("3.cls", b"-1\n")]
    images = open_images(tar_of(tmp_path / "a.tar", *members))
    assert images.labels.tolist() == [2, 0, -1] and images.classes == ["0", "1", "2"] and images.numbered
    captions = [("1.jpg", jpeg(0)), ("1.json", b'{"caption": "a"}'), ("1.txt", b"a")]
    assert open_images(tar_of(tmp_path / "b.tar", *captions)).labels is None


def test_a_damaged_member_is_replaced_by_the_next(tmp_path, capsys):
    members = [(f"{'ab'[i % 2]}/{i}.png", b"no image" if i == 5 else jpeg(2 * i + 1)) for i in range(20)]
    tar = tar_of(tmp_path / "a.tar", *members)
    small = ["--data", tar, "--recipe", "shapes", *TINY, "--epochs", 1, "--out", tmp_path / "run"]
    assert swav_here(*small) == 0
    assert (tmp_path / "run" / "bad_images.txt").read_text() \
        == "b/5.png\tUnidentifiedImageError: cannot identify the image file\n"


def test_many_empty_members_cost_no_memory(tmp_path):
    header = tarfile.TarInfo("x/0000000.png").tobuf(tarfile.USTAR_FORMAT)
    count = 20_000
    with open(tmp_path / "a.tar", "wb") as file:
        for _ in range(count // 1000):
            file.write(header * 1000)
        file.write(bytes(1024))
    tracemalloc.start()
    with pytest.raises(DataError, match=f"holds no images .*: {count} empty"):
        open_images(tmp_path / "a.tar")
    assert tracemalloc.get_traced_memory()[1] < 4e6  # of 20,000 members
    tracemalloc.stop()


def test_many_shards_need_few_open_files(tmp_path, monkeypatch):
    import resource

    shards = [tar_of(tmp_path / f"{i:03d}.tar", ("x/1.png", jpeg(1))) for i in range(400)]
    images, limits = open_images(tmp_path), resource.getrlimit(resource.RLIMIT_NOFILE)
    assert len(images) == len(shards)
    resource.setrlimit(resource.RLIMIT_NOFILE, (350, limits[1]))
    try:
        assert {images.read(i).size for i in range(400)} == {(24, 21)}
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_threads_read_the_images_that_they_ask_for(tmp_path, monkeypatch):
    """The cache of open files closes one that another thread has just taken out of it."""
    monkeypatch.setattr(tars, "_opened", functools.lru_cache(2)(tars._opened.__wrapped__))
    for i in range(12):
        tar_of(tmp_path / f"{i:02d}.tar", ("x/1.png", jpeg(2 * i + 1)))
    images = open_images(tmp_path)
    wanted, wrong = [images.read(i).tobytes() for i in range(12)], []

    def look(seed):
        for i in np.random.default_rng(seed).integers(0, 12, 300):
            try:
                assert images.read(i).tobytes() == wanted[i]
            except Exception as error:
                wrong.append(error)

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sys.setswitchinterval(switch)
    assert not wrong


def test_a_part_of_a_sample_is_left_out_where_it_has_a_label_alone(tmp_path):
    names = ["a/IMG.2020.jpg", "a/IMG.2021.jpg", "a/IMG.jpg", "a/IMG.txt", "b/1.png"]
    images = open_images(tar_of(tmp_path / "a.tar", *((name, jpeg(1)) for name in names)))
    assert list(images.paths) == [name for name in names if not name.endswith("txt")]
    assert images.classes == ["a", "b"]
    members = [("0.left.jpg", jpeg(0)), ("0.right.jpg", jpeg(2)), ("0.cls", b"3")]
    images = open_images(tar_of(tmp_path / "b.tar", *members))
    assert list(images.paths) == ["0.left.jpg", "0.right.jpg"] and images.labels.tolist() == [3, 3]


def test_a_json_member_of_no_image_is_not_read(tmp_path):
    members = [("dataset.json", b'{"label": 3}'), ("lines.json", b"{}\n{}"), ("all.json", bytes(2**21)),
               ("1.png", jpeg(1))]
    assert open_images(tar_of(tmp_path / "a.tar", *members)).labels is None


def test_a_member_of_negative_size_ends_the_reading(tmp_path, in_time):
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        add(tar, "x/0.png", jpeg(1))
        add(tar, "x/1.png", b"", pax_headers={"size": "-1536"})
    with pytest.raises(DataError, match=r"'x/1.png' has -1536 bytes"):
        open_images(tmp_path / "a.tar")


def test_what_lies_beside_shards(tmp_path):
    tar_of(tmp_path / "s-0.tar", ("x/1.png", jpeg(1)))
    (tmp_path / "lost+found").mkdir()
    (tmp_path / "._s-0.tar").write_bytes(b"what macOS adds")
    assert len(open_images(tmp_path)) == 1
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match=r"holds no images .*: 1 .tar"):
        open_images(tmp_path)


def _both_write(folder):
    os.environ["LOCAL_RANK"] = "0"  # two nodes with one folder of runs
    for i in range(20):
        images = open_images(f"{folder}/{i:02d}.tar", index=f"{folder}/index")
        assert images.read(0).size == (24, 21)
    return True


def test_two_nodes_write_one_index(tmp_path):
    for i in range(20):
        tar_of(tmp_path / f"{i:02d}.tar", ("x/1.png", jpeg(1)))
    assert ranks(2, _both_write, str(tmp_path)) == [True, True]
    assert len(list((tmp_path / "index").iterdir())) == 20
