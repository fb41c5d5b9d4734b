"""Images and trunks of the user's own: what was typed runs, once in each process; what a file says, never."""

import importlib
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from evaluations import colour_tree, evaluate, export, refuses
from helpers import (
    ROOT,
    command,
    finish,
    image_tree,
    losses,
    metrics,
    ranks,
    run_here,
    same,
    saved,
    start,
    unreadable,
)
from PIL import Image
from torch import nn

import deepcluster
import eval_cluster
import eval_knn
import eval_linear
import eval_semisup
import eval_svm
import hubconf
import swav
from common import data
from common.batchnorm import SyncBatchNorm
from common.engine import checkpoint
from common.engine.errors import ArgumentError, DataError
from common.engine.launch import launch
from common.engine.options import recipe
from common.evaluation.pooling import shapes
from common.multicrop import Augmentation, MultiCrop
from common.sources import own
from common.weights import __main__ as weights
from common.weights import checksum, load_backbone, load_model

METHODS = ["swav", "selav2", "deepclusterv2", "deepcluster", "odc", "sela"]
IMAGES = """
import os
import numpy as np
import torch
from PIL import Image

class Photos:  # what it opens is of one process, and cannot be sent to another
    def __init__(self, n=64, split=0):
        self.n, self.split, self.process, self.file = n, split, os.getpid(), open(os.devnull)

    def __len__(self):
        return self.n

    def read(self, i):
        if self.process != os.getpid():
            raise RuntimeError("opened in another process")
        noise = np.random.default_rng((self.split, i)).normal(0, 40, (40, 36, 3)).round(0)
        return Image.fromarray((noise + 60 * (1 + i % 3)).clip(0, 255).astype(np.uint8))

class Labelled(Photos):
    @property
    def labels(self):
        return np.arange(self.n) % 3

def photos():
    return Photos()

def labelled():
    return Labelled()

def held_out():
    return Labelled(30, 1)

class Files(Photos):
    def __init__(self):
        super().__init__()
        root = "photos/train"
        self.classes = sorted(os.listdir(root))
        self.paths = [f"{c}/{name}" for c in self.classes for name in sorted(os.listdir(f"{root}/{c}"))]
        self.n, self.root = len(self.paths), root
        self.labels = [self.classes.index(path.split("/")[0]) for path in self.paths]

    def read(self, i):
        if self.process != os.getpid():
            raise RuntimeError("opened in another process")
        return Image.open(f"{self.root}/{self.paths[i]}")

def files():
    return Files()

class Pairs(torch.utils.data.Dataset):
    targets = torch.tensor([1, 0, -1])

    def __len__(self):
        return 3

    def __getitem__(self, i):
        return Image.new("L", (30, 20), 50 * i), int(self.targets[i])

def some_broken():
    class Broken(Labelled):
        def read(self, i):
            if i % 16 == 3:
                raise KeyError(f"lost {i}")
            return super().read(i)
    return Broken()

def fails():
    def deeper():
        raise ValueError("no luck\\ntoday")
    deeper()

def shrinks(sizes=[]):
    sizes.append(0)
    return Photos(64 - len(sizes))

def made(item=None, n=3, **attributes):
    class Set:
        def __len__(self):
            return n
        def __getitem__(self, i):
            return item
    for name, value in attributes.items():
        setattr(Set, name, value)
    return Set

tensors, arrays, nothing = made(torch.zeros(3, 8, 8)), made(np.zeros((8, 8, 3))), made()
empty, few_labels, far_labels = made(n=0), made(labels=[0, 1]), made(labels=[0, 1, -2])
odd_labels, few_classes = made(labels=[0.5, 1, 1]), made(labels=[0, 1, 2], classes=["a"])
few_paths, unlabelled = made(paths=["a"]), made(labels=[-1, -1, -1])
number, none, endless = 3, lambda: None, lambda: iter([1])
"""
TRUNKS = """
from torch import nn

class Net(nn.Module):
    def __init__(self, norm, channels=8):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, channels, 4, 4), norm, nn.Linear(channels, 16)
        self.feature_dim = 16

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))

def layer_norm():
    return Net(nn.GroupNorm(1, 8))

def batch_norm(width, stem):
    assert stem in ("small", "imagenet")
    return Net(nn.BatchNorm2d(int(64 * width)), int(64 * width))

class Square(Net):
    def forward(self, x):
        if x.shape[-1] != 16:
            raise AssertionError("16 pixels are needed")
        return super().forward(x)

def square():
    return Square(nn.Identity())

def with_stages():
    net = layer_norm()
    net.stages = lambda x: {"layer4": net.conv(x)}
    return net

def maps():
    return with_feature_dim(nn.Conv2d(3, 8, 4, 4), 8)

def wide():
    return with_feature_dim(layer_norm(), 17)

def tuples():
    class Twice(Net):
        def forward(self, x):
            return super().forward(x), x
    return Twice(nn.Identity())

def with_feature_dim(net, dim):
    net.feature_dim = dim
    return net

def fails():
    raise ValueError("no luck")

def bare():
    return nn.Linear(3, 3)

none = lambda: None
"""
SMALL = "--recipe shapes --sizes 16 --prototypes 8 --batch-size 16 --epochs 2".split()
SMALL += "--workers 0 --log-every 1".split()
TWO = "--crops 2 --scales 0.4 1"
OWN = {"swav": TWO, "deepclusterv2": TWO, "selav2": TWO, "deepcluster": "--pca-dim 8",
       "odc": "--hidden 16 --dim 8", "sela": "--heads 2 --relabellings 2"}
JUDGED = ["--data", "own_images:labelled", "--val", "own_images:held_out"]


def forget():
    for name in ("own_images", "own_trunk", "my_images", "my_trunk", "own_trap"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory: a folder with the user's modules."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # modules of one name follow each other
    monkeypatch.chdir(tmp_path)
    forget()
    (tmp_path / "own_images.py").write_text(IMAGES)
    (tmp_path / "own_trunk.py").write_text(TRUNKS)
    yield tmp_path
    forget()


def train(method, *arguments):
    return run_here(importlib.import_module(method), *SMALL, *OWN[method].split(), *arguments)


def one_line(capsys, *words):
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error


def knn(out):
    return [record["knn_top1"] for record in metrics(out) if "knn_top1" in record]


# ---- images


@pytest.mark.parametrize("workers, how", [(0, None), (2, "fork"), (1, "spawn")])
def test_crops_are_those_of_a_folder_of_the_same_images(here, workers, how):
    image_tree(here / "photos", images=5, splits=("train",))
    epochs = []
    for spec in ("photos", "own_images:files"):
        images = data.open_images(spec)
        crops = MultiCrop(images, (2, 1), (20, 12), [(0.3, 1), (0.1, 0.3)], Augmentation(), seed=3)
        loader = data.Loader(crops, workers, start_method=how)
        batches = data.batches(len(images), 4, 0, seed=3, drop_last=False)
        epochs.append([(i, *crops, params) for i, crops, params in loader.epoch(0, batches)])
        assert not loader.bad
        loader.close()
    assert len(epochs[0]) == 3
    for a, b in zip(*epochs):
        assert all(torch.equal(x, y) for x, y in zip(a, b))


def test_what_a_set_says_of_its_images(here):
    images = data.open_images("own_images:labelled")
    assert len(images) == 64 and images.labels.dtype == torch.int64
    assert images.labels.tolist()[:4] == [0, 1, 2, 0]
    assert images.classes == ["0", "1", "2"] and images.numbered
    assert images.read(0).mode == "RGB" and images.paths[17] == "own_images:labelled/000017"
    assert images.fingerprint != data.open_images("own_images:photos").fingerprint
    with pytest.raises(IndexError):
        images.paths[64]
    pairs = data.open_images("own_images:Pairs")
    assert pairs.labels.tolist() == [1, 0, -1] and pairs.read(2).getpixel((0, 0)) == (100, 100, 100)
    assert data.open_images("own_images:unlabelled").labels is None
    folder = data.open_images(image_tree(here / "photos", splits=("train",)))
    files = data.open_images("own_images:files")
    assert list(files.paths) == list(folder.paths) and torch.equal(files.labels, folder.labels)
    assert files.classes == folder.classes and not files.numbered
    before = files.fingerprint
    (here / "photos/train/n00/0.JPEG").rename(here / "photos/train/n00/00.JPEG")
    assert data.open_images("own_images:files").fingerprint != before


def test_a_set_is_sent_without_the_users_object(here):
    images = data.open_images("own_images:labelled")
    images.classes = ["a", "b", "c"]  # as match_classes renames them
    copy = pickle.loads(pickle.dumps(images))
    assert copy.classes == ["a", "b", "c"] and torch.equal(copy.labels, images.labels)
    assert copy.read(5).tobytes() == images.read(5).tobytes() and copy.images is not images.images
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(images.images)
    shrinks = pickle.loads(pickle.dumps(data.open_images("own_images:shrinks")))
    with pytest.raises(DataError, match="has 62 images now, at first 63"):
        shrinks.read(0)


def test_files_and_sets_of_that_name_come_first(here):
    image_tree(here / "photos", splits=("",))
    shutil.copytree(here / "photos", here / "own_images:photos")
    assert len(data.open_images("own_images:photos")) == 12
    assert not data.is_own("shapes:photos") and not data.is_own("photos") and data.is_own("a.b_1:c2")
    assert not data.is_own("cifar10:photos") and not data.is_own("C:/photos") and not data.is_own("a-b:c")


DEEP = """
import numpy as np
from PIL import Image

class Deep:
    labels = property(lambda self: 1 / 0)

    def __len__(self):
        return 2

    def read(self, i):
        return Image.fromarray(np.linspace(0, (6000, 65535)[i], 4096).reshape(64, 64).astype(np.uint16))

class Fine(Deep):
    labels = None
"""


def test_deep_grey_of_ones_own_has_one_scale(here, capsys):
    (here / "deep.py").write_text(DEEP)
    images = data.open_images("deep:Fine")
    assert images.range[1] > 60_000
    assert "deep:Fine: grey of more than 8 bits goes from" in capsys.readouterr().out
    assert max(images.read(0).getdata())[0] < 30 and max(images.read(1).getdata())[0] == 255
    assert pickle.loads(pickle.dumps(images)).range == images.range
    (here / "files").mkdir()
    for i in range(2):
        images.images.read(i).save(here / "files" / f"{i}.png")
    assert [data.open_images(here / "files").read(i).tobytes() for i in range(2)] \
        == [images.read(i).tobytes() for i in range(2)]


def test_an_error_of_the_object_is_shown_as_one_of_the_function(here):
    (here / "deep.py").write_text(DEEP)
    with pytest.raises(DataError, match=r"deep:Deep: ZeroDivisionError: division by zero\nTraceback"):
        data.open_images("deep:Deep")


REFUSED = {"nowhere:photos": "no module nowhere is installed",
           "own_images.sub:photos": "no module own_images.sub",
           "own_images:nobody": "own_images has no function nobody",
           "own_images:number": "own_images has no function number",
           "own_images:none": "returns NoneType: len() and read(i)",
           "own_images:endless": "returns list_iterator: len() and read(i)",
           "own_images:empty": "holds no images",
           "own_images:few_labels": "labels of type int64 and shape (2,)",
           "own_images:far_labels": "3 whole numbers from 0 to 999999, or -1 for none, are needed",
           "own_images:odd_labels": "labels of type float64",
           "own_images:few_classes": "has label 2, but 1 classes",
           "own_images:few_paths": "has 1 paths for 3 images"}


@pytest.mark.parametrize("spec, words", REFUSED.items())
def test_what_is_no_set_of_images_is_said_in_a_line(here, capsys, spec, words):
    assert train("swav", "--data", spec) == 3
    one_line(capsys, f"error: {spec}", words)
    judged = export(here / "b.pt"), "--data", "shapes:30", "--val", spec
    refuses(capsys, eval_knn, [(judged, 3, f"{spec}")])


@pytest.mark.parametrize("name, kind", [("tensors", "Tensor"), ("arrays", "ndarray"),
                                        ("nothing", "NoneType")])
def test_what_is_no_image_is_said(here, capsys, name, kind):
    assert train("swav", "--data", f"own_images:{name}", "--batch-size", 2, "--max-bad", 0) == 3
    first, *_, last = capsys.readouterr().err.splitlines()
    assert re.match(rf"warning: own_images:{name}: image \d is {kind}, a PIL image is needed$", first)
    assert last.startswith("error: 3 images cannot be read") and kind in last


def test_an_error_of_the_function_is_shown_with_the_users_traceback_alone(here, capsys):
    line = command(*SMALL, *OWN["swav"].split(), "--data", "own_images:fails")
    elsewhere, _, images = finish(start(*line, cwd=here))  # not the folder of the script
    code, trunk = train("swav", "--arch", "own_trunk:fails"), capsys.readouterr().err
    for spec, found, err in (("own_images:fails", elsewhere - 3, images),
                             ("own_trunk:fails", code - 2, trunk)):
        first, *rest = err.splitlines()
        assert (found, first) == (0, f"error: {spec}: ValueError: no luck")
        assert rest[0].startswith("Traceback") and "ValueError: no luck" in rest and "in fails" in err
        assert str(here) in err and str(ROOT) not in err and "importlib" not in err


def test_an_error_while_the_module_is_imported_is_shown_too(here, capsys):
    (here / "my_images.py").write_text("import nowhere_to_be_found\n")
    assert train("swav", "--data", "my_images:photos") == 3
    line, *rest = capsys.readouterr().err.splitlines()
    assert line.endswith("my_images:photos: ModuleNotFoundError: No module named 'nowhere_to_be_found'")
    assert "my_images.py" in "".join(rest) and "common" not in "".join(rest)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_raises_is_unreadable_and_shown_once_a_process(here, capfd, workers):
    assert train("swav", "--data", "own_images:some_broken", "--workers", workers, "--out", "run") == 0
    err = capfd.readouterr().err
    assert unreadable(here / "run") == [f"own_images:some_broken/{i:06d}" for i in (3, 19, 35, 51)]
    assert err.count("Traceback") == (1 if workers == 0 else 3)  # rank 0 looks for the reason
    assert 'raise KeyError(f"lost {i}")' in err and str(ROOT) not in err


def test_eval_every_asks_for_held_out_images_with_val(here, capsys):
    shared = ["--data", "own_images:labelled", "--eval-every", 1, "--out", "run"]
    assert train("swav", *shared) == 2
    one_line(capsys, "own_images:labelled has no val split: name some with --val")
    assert train("swav", *shared, "--val", "own_images:held_out") == 0
    assert len(knn(here / "run")) == 3


# ---- trunks


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_trunk_of_ones_own_and_resumes(here, capsys, method):
    shared = ["--data", "own_images:photos", "--arch", "own_trunk:layer_norm"]
    assert train(method, *shared, "--out", "straight") == 0
    assert train(method, *shared, "--out", "run", "--max-steps", 3) == 0
    assert train(method, *shared, "--out", "run") == 0
    assert "resumed at step 3 of 8" in capsys.readouterr().out
    a, b = saved(here / "straight"), saved(here / "run")
    assert same(a["model"], b["model"]) and same(a["optimizer"], b["optimizer"])
    assert losses(here / "straight") == losses(here / "run") and a["config"]["arch"] == "own_trunk:layer_norm"
    exported = torch.load(here / "run/backbone.pt", weights_only=True)
    assert exported["info"]["arch"] == "own_trunk:layer_norm" and not exported["info"].get("sobel")
    trunk, _ = load_backbone("run", arch="own_trunk:layer_norm")
    mine = {key[9:]: tensor for key, tensor in b["model"].items() if key.startswith("backbone.")}
    assert same(trunk.state_dict(), mine)


def test_the_parts_see_what_the_scripts_make(here):
    """A model that is loaded assigns as the one that was trained, also where features are below 0."""
    typed = ["--data", "own_images:photos", "--arch", "own_trunk:layer_norm"]
    assert train("deepcluster", *typed, "--out", "run") == 0
    config = recipe(deepcluster.Config, deepcluster.RECIPES, "shapes")
    config.prototypes = 8
    model = deepcluster.Model(config, own.trunk("own_trunk:layer_norm", 1, "small"))
    model.load_state_dict(saved(here / "run")["model"])
    images = torch.randn(5, 3, 16, 16)
    (features, scores), found = model.eval()([images]), load_model("run", arch=typed[-1])[0](images)
    assert (features < 0).any() and torch.allclose(scores, found[0], atol=1e-6)


def train_in(folder, *arguments):
    os.chdir(folder)
    return run_here(swav, *arguments)


def judge_in(folder, *arguments):
    os.chdir(folder)
    launch(eval_knn.main, eval_knn.arguments([*arguments]))


@pytest.mark.parametrize("trunk", ["layer_norm", "batch_norm"])
def test_two_ranks_follow_the_trajectory_of_one(here, trunk):
    judged = [*JUDGED, "--arch", f"own_trunk:{trunk}", "--workers", "0"]
    shared = [*SMALL, *OWN["swav"].split(), *judged, "--eval-every", 2, "--width", 0.125]
    shared += ["--precision", "float64"]
    assert train_in(here, *shared, "--out", "run1") == 0
    judge_in(here, "run1", *judged)
    assert ranks(2, train_in, here, *shared, "--out", "run2", timeout=100) == [0, 0]
    ranks(2, judge_in, here, "run2", *judged, timeout=100)
    one, two = losses(here / "run1"), losses(here / "run2")
    assert len(one) == 8 and len(set(one)) == 8
    np.testing.assert_allclose(two, one, rtol=1e-9)
    assert knn(here / "run1") == knn(here / "run2") and len(knn(here / "run1")) == 2
    judged = [json.loads((here / run / "eval_knn.json").read_text())["top1"] for run in ("run1", "run2")]
    assert judged[0] == judged[1] and judged[0]["10"] > 0


BAD_TRUNKS = {"own_trunk:none": "returns NoneType: an nn.Module with feature_dim",
              "own_trunk:bare": "returns Linear: an nn.Module with feature_dim",
              "own_trunk:maps": "gives (2, 8, 4, 4) for two images of 16 pixels, not (2, 8)",
              "own_trunk:wide": "gives (2, 16) for two images of 16 pixels, not (2, 17)",
              "own_trunk:tuples": "gives tuple for two images of 16 pixels, not (2, 16)",
              "own_trunk:nobody": "own_trunk has no function nobody", "nowhere:net": "no module nowhere",
              "resnet49": "invalid choice: 'resnet49'", "own_trunk:": "invalid choice: 'own_trunk:'"}


@pytest.mark.parametrize("spec, words", BAD_TRUNKS.items())
def test_what_is_no_trunk_is_said_in_a_line(here, capsys, spec, words):
    for method in ("swav", "sela"):
        assert train(method, "--arch", spec) == 2
        one_line(capsys, spec, words)


def test_a_trunk_is_tried_at_every_size(here, capsys):
    arguments = "--arch own_trunk:square --sizes 16 12 --crops 2 2 --scales 0.4 1 0.1 0.4".split()
    assert train("swav", *arguments) == 2
    line, *rest = capsys.readouterr().err.splitlines()
    assert line.endswith("own_trunk:square with images of 12 pixels: AssertionError: 16 pixels are needed")
    assert rest[-1] == "AssertionError: 16 pixels are needed" and str(ROOT / "common") not in "".join(rest)


def test_other_options_of_the_trunk(here, capsys):
    own_trunk = ["--data", "own_images:photos", "--arch", "own_trunk:layer_norm", "--max-steps", 1]
    assert train("swav", *own_trunk, "--checkpointing") == 2
    one_line(capsys, "--checkpointing needs a ResNet without --compile: --arch own_trunk:layer_norm")
    assert train("deepcluster", *own_trunk, "--sobel", "--out", "run") == 0
    assert "sees the images' colours" in capsys.readouterr().out
    assert torch.load(here / "run/backbone.pt", weights_only=True)["info"]["sobel"] is False


def test_names_that_hold_another_trunks_name_are_no_alexnets(here):
    (here / "own_trunk.py").rename(here / "my_alexnet.py")
    for method in ("deepcluster", "sela"):
        shared = ["--data", "own_images:photos", "--arch", "my_alexnet:layer_norm", "--max-steps", 1]
        assert train(method, *shared, "--out", method) == 0
        exported = torch.load(here / method / "backbone.pt", weights_only=True)
        assert exported["info"]["arch"] == "my_alexnet:layer_norm"


def test_a_batch_norm_that_ranks_cannot_share_is_refused():
    class Activated(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    with pytest.raises(ArgumentError, match="--arch holds Activated"):
        SyncBatchNorm.convert(nn.Sequential(Activated(3)))
    assert isinstance(SyncBatchNorm.convert(nn.Sequential(SyncBatchNorm(3)))[0], SyncBatchNorm)


# ---- evaluations


@pytest.fixture
def run(here):
    assert train("swav", "--data", "own_images:photos", "--arch", "own_trunk:layer_norm", "--out", "run") == 0
    return here / "run"


def test_evaluations_take_what_is_typed(run, capsys):
    typed = [run, *JUDGED, "--arch", "own_trunk:layer_norm", "--workers", 0, "--precision", "float32"]
    sys.path.insert(1, str(run.parent))  # evaluations.run_here works in an empty folder

    def judge(script, *arguments):
        return evaluate(capsys, script, *typed, *arguments)

    record, _ = judge(eval_knn, "--k", 3)
    assert record["arch"] == "own_trunk:layer_norm" and record["top1"]["3"] > 90
    other, _ = judge(eval_knn, "--k", 3, "--random-init")
    assert other["method"] == "random weights"
    record, _ = judge(eval_linear, "--epochs", 2, "--batch-size", 16, "--out", "linear")
    assert "avgpool" in next(iter(record["chosen"]))
    record, _ = judge(eval_semisup, "--fraction", 1, "--epochs", 1, "--batch-size", 16, "--lr", 0.1)
    assert record["arch"] == "own_trunk:layer_norm"
    kept = run / "eval_semisup_small_classifier.pt"
    head, _ = judge(eval_linear, "--head", kept)
    assert abs(head["top1"] - record["settings"][0]["top1"][-1]) < 1e-3
    record, _ = judge(eval_cluster, "--samples", 0)
    assert record["arch"] == "own_trunk:layer_norm"
    refuses(capsys, eval_linear, [
        ((*typed[:-4], "--preset", "mhead_90e"), 2, "feature1 needs a trunk with stages(x)"),
        ((run, *JUDGED, "--arch", "resnet18"), 2, "--arch resnet18: package.module:function of your own"),
        ((run, *JUDGED, "--arch", "own_trunk:wide"), 2, "(2, 17)"),
        ((run, *JUDGED, "--arch", "own_trunk:batch_norm"), 4, "tensors fit")])


def test_avgpool_of_a_trunk_with_stages_is_the_mean_of_its_last_map(here):
    trunks = (own.trunk(f"own_trunk:{name}", 1, "small") for name in ("with_stages", "layer_norm"))
    (mapped, _), (features, _) = ((shapes(trunk, 16, ["avgpool"])["avgpool"][0], trunk) for trunk in trunks)
    assert (mapped, features) == (8, 16)


def test_python_m_common_weights_takes_what_is_typed(run, capsys):
    typed = ["run", "--arch", "own_trunk:layer_norm"]

    def weigh(*arguments):
        try:
            launch(weights.main, weights.arguments([str(a) for a in arguments]))
        except SystemExit as stop:
            return stop.code
        return 0

    assert weigh(*typed) == 0 and "own_trunk:layer_norm x0.25" in capsys.readouterr().out
    assert weigh(*typed, "--features", "own_images:labelled", "--out", "f.npz") == 0
    with np.load("f.npz") as kept:
        assert kept["features"].shape == (64, 16) and kept["paths"][3] == "own_images:labelled/000003"
    assert weigh(*typed, "--to", "torchvision", "--out", "again.pt") == 0
    assert same(load_backbone("again.pt", arch="own_trunk:layer_norm")[0].state_dict(),
                load_backbone("run", arch="own_trunk:layer_norm")[0].state_dict())
    capsys.readouterr()
    assert weigh(*typed, "--to", "detectron2", "--out", "d.pkl") == 4
    one_line(capsys, "detectron2 has no own_trunk:layer_norm")


def test_init_from_takes_the_trunk_of_the_typed_function(run):
    shared = ["--data", "own_images:photos", "--arch", "own_trunk:layer_norm", "--max-steps", 1, "--lr", 1e-9]
    assert train("swav", *shared, "--out", "next", "--init-from", run) == 0
    before, after = (saved(folder)["model"] for folder in (run, run.parent / "next"))
    assert torch.allclose(before["backbone.fc.weight"], after["backbone.fc.weight"], atol=1e-6)


# ---- no file causes an import


@pytest.fixture
def trap(here, monkeypatch):
    """A run whose files name os.abort; returns (its folder, the calls of it)."""
    called = []
    monkeypatch.setattr(os, "abort", lambda *a, **k: called.append(1))
    (here / "trap").mkdir()
    export(here / "trap/backbone.pt", arch="os:abort")
    config = {"data": "os:abort", "val": "os:abort", "root": "", "prototypes": 8, "arch": "os:abort"}
    (here / "trap/config.json").write_text(json.dumps(config))
    yield here / "trap", called
    assert not called


ENTRIES = {"knn": (eval_knn, []), "cluster": (eval_cluster, ["--samples", 0]), "linear": (eval_linear, []),
           "semisup": (eval_semisup, []), "svm": (eval_svm, []), "kmeans": (eval_cluster, ["--kmeans", 3])}


@pytest.mark.parametrize("entry", ENTRIES)
def test_an_evaluation_runs_no_code_that_a_file_names(trap, capsys, entry):
    (folder, _), (script, more) = trap, ENTRIES[entry]
    typed = "--data", "shapes:60"
    for trunk in (folder, folder / "backbone.pt"):
        refuses(capsys, script, [((trunk, *typed, *more), 4, "is code of its own: type --arch os:abort")])
    if script is not eval_svm:  # its images are typed always
        export(folder / "backbone.pt")
        (folder / "checkpoint.pt").write_bytes(b"")
        more = (*more, "--kmeans", 2) if script is eval_cluster else more  # it looks at the heads first
        refuses(capsys, script, [((folder, *more), 2, "which is code of its own: type --data os:abort")])
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "data": "shapes:60"}))
        refuses(capsys, script, [((folder, *more), 2, "which is code of its own: type --val os:abort")])


def test_a_kept_classifier_runs_no_code_that_it_names(trap, capsys):
    folder, _ = trap
    about = {"sha256": checksum(load_backbone(export(folder / "fine.pt"))[0])}
    heads = [{"layer": "avgpool", "top1": 1}]
    content = {**torch.load(folder / "backbone.pt", weights_only=True), "classifiers": heads, "about": about}
    torch.save(content, folder / "head.pt")
    line = folder / "fine.pt", "--val", "shapes:60", "--head", folder / "head.pt"
    refuses(capsys, eval_linear, [(line, 4, "type --arch os:abort")])


def test_nothing_else_runs_code_that_a_file_names(trap, capsys):
    folder, called = trap
    for arguments in ([folder], [folder, "--to", "torchvision", "--out", "x.pt"],
                      [folder, "--features", "shapes:20", "--out", "x.npz"]):
        with pytest.raises(SystemExit) as stop:
            launch(weights.main, weights.arguments([str(a) for a in arguments]))
        assert stop.value.code == 4
        one_line(capsys, "type --arch os:abort")
    with pytest.raises(ValueError, match="is no resnet18 of torchvision"):
        hubconf.resnet18(folder)
    for load in (load_backbone, load_model):
        with pytest.raises(ValueError, match="type --arch os:abort"):
            load(folder)
    assert train("swav", "--data", "shapes:64", "--init-from", folder, "--out", "new") == 4
    one_line(capsys, "type --arch os:abort")
    assert train("swav", "--data", "shapes:64", "--out", "run", "--max-steps", 1) == 0
    state = saved(folder.parent / "run")
    state["config"] |= {"arch": "os:abort", "data": "os:abort"}
    checkpoint.save(folder.parent / "run/checkpoint.pt", state)
    shutil.copy(folder / "config.json", "run/config.json")
    capsys.readouterr()
    assert train("swav", "--data", "shapes:64", "--out", "run") == 4
    one_line(capsys, "was made with other options: --arch resnet10 (saved os:abort)")
    assert not called


# ---- the page

PAGE = (ROOT / "docs/own.md").read_text()
BLOCKS = re.findall(r"```python\n# (my_\w+)\.py, for (.*?)(?: +needs: pip install (\w+))?\n(.*?)```",
                    PAGE, re.S)


def fashion(folder, kind, n):
    """FashionMNIST's files, as it reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(256, size=(n, 28, 28), dtype=np.uint8)
    labels = np.arange(n, dtype=np.uint8) % 10
    for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
        (folder / f"{kind}-{name}-ubyte").write_bytes(head + array.tobytes())


@pytest.mark.parametrize("module, typed, package, code", BLOCKS, ids=[block[1] for block in BLOCKS])
def test_a_block_of_the_page_trains(here, module, typed, package, code):
    compile(code, module, "exec")
    for spec in re.findall(r"--\w+ my_\w+:(\w+)", typed):
        assert f"def {spec}(" in code
    if package:
        return  # it is not one of the project's
    (here / f"{module}.py").write_text(code)
    with zipfile.ZipFile("photos.zip", "w") as file:
        for path in sorted(colour_tree(here / "photos", train=(16, 16, 0)).rglob("*.png")):
            image = io.BytesIO()
            Image.open(path).save(image, "JPEG")
            file.writestr(f"{path.parent.name}/{path.stem}.jpg", image.getvalue())
    fashion(here / "data/FashionMNIST/raw", "train", 40)
    fashion(here / "data/FashionMNIST/raw", "t10k", 20)
    typed = typed.split()
    typed += [] if "--data" in typed else ["--data", "own_images:photos"]
    sizes = ["--sizes", 32] if "convnext" in code else []
    judged = ["--eval-every", 1] if "--val" in typed else []
    arguments = [*typed, "--epochs", 1, "--workers", 1, *sizes, *judged, "--out", "run"]
    assert train("swav", *arguments) == 0
    assert losses(here / "run")
    if "photos.zip" in code:
        assert (here / "run/assignments.csv").read_text().splitlines()[1].startswith("green/0.jpg,")


def test_the_page_has_all_that_it_should():
    assert {package for *_, package, _ in BLOCKS} == {"", "datasets", "lmdb", "torchcodec", "timm"}
    assert len(BLOCKS) == PAGE.count("```python")
    assert "optimizer = LARC(model.parameters(), config.lr, config.momentum, config.weight_decay)" in (
        ROOT / "swav.py").read_text()  # what the page's line for AdamW stands for
    assert "docs/own.md" in (ROOT / "README.md").read_text()


def test_five_channels_train_with_the_lines_that_the_page_changes(here):
    for name in ("common", "swav.py", "eval_knn.py"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, here / name)
    rows = re.findall(r"^\| `([\w/.]+)` \| `(.*?)` \| `(.*?)` \|$", PAGE, re.M)
    assert len(rows) == 9
    for name, before, after in rows:
        text = (here / name).read_text()
        assert text.count(before) == 1, before
        (here / name).write_text(text.replace(before, after))
    images, trunks = IMAGES.replace("40, 36, 3)", "40, 36, 5)"), TRUNKS.replace("Conv2d(3,", "Conv2d(5,")
    images = images.replace("return Image.fromarray((noise", "return ((noise")
    (here / "own_images.py").write_text(images)
    (here / "own_trunk.py").write_text(trunks)
    typed = [*JUDGED, "--arch", "own_trunk:layer_norm"]
    train = ["swav.py", *SMALL, *OWN["swav"].split(), *typed, "--eval-every", 2, "--out", "run"]
    lines = [[str(a) for a in line] for line in (train, ["eval_knn.py", "run", *typed, "--workers", 0])]
    both = f"import runpy, sys\nfor sys.argv in {lines}: runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", both], capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert len(knn(here / "run")) == 2 and knn(here / "run")[-1] > 50


def test_a_method_that_the_page_makes_of_swav_trains(here):
    shutil.copytree(ROOT / "common", here / "common")
    text = (ROOT / "swav.py").read_text()
    changes = re.findall(r"((?:^-.*\n)+)((?:^\+.*\n)+)", re.search(r"```diff\n(.*?)```", PAGE, re.S)[1], re.M)
    assert len(changes) == 2
    for before, after in (("".join(line[1:] for line in lines.splitlines(True)) for lines in change)
                          for change in changes):
        assert text.count(before) == 1, before
        text = text.replace(before, after)
    (here / "hard.py").write_text(text)
    train = ["hard.py", *SMALL, *TWO.split(), "--data", "shapes:64"]
    done = subprocess.run([sys.executable, *map(str, train)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads((here / "runs/hard_shapes/config.json").read_text())["method"] == "hard"
    probe = "import hard, torch; q = hard.assign(torch.rand(2, 9, 4), hard.Queue(0, 2, 3), None, 0.05, 3); " \
            "assert q.max(2).values.eq(1).all() and q.sum(2).eq(1).all() and q.shape == (2, 9, 4)"
    assert subprocess.run([sys.executable, "-c", probe]).returncode == 0
