"""Damaged and random files at each border: what they hold is used, or refused in one line, never a traceback;
and never with more than 1 GB or 10 s."""

import json
import resource
import time
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from evaluations import INFO, export
from helpers import same
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from common import weights
from common.engine import checkpoint
from common.evaluation import protocol, store
from common.resnet import resnet10

SLOW = pytest.param(2000, marks=pytest.mark.slow)


def fuzz(count):
    """hypothesis with `count` cases, the same ones each time."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


@contextmanager
def bounded():
    """The block ends, maybe refusing something in one line, within 10 s and 1 GB more than before."""
    began, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    except ValueError as error:
        assert error.exit_code in (3, 4) and str(error).count("\n") == 0 and len(str(error)) < 2000, error
    assert time.monotonic() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1 << 20  # in kB


# ------------------------------------------------------------------------- weights, features, runs

DAMAGE = st.lists(st.tuples(st.sampled_from(("flip", "cut", "drop", "insert", "zeros", "swap")),
                            st.floats(0, 1), st.binary(min_size=1, max_size=40)), min_size=1, max_size=3)


def damaged(content, damage):
    """content after some accidents, each of a kind, at a place, with some bytes."""
    for kind, place, some in damage:
        at, n = int(place * (len(content) - 1)), len(some)
        if kind == "flip":
            content = content[:at] + bytes([content[at] ^ (some[0] or 1)]) + content[at + 1 :]
        elif kind == "cut":
            content = content[: max(1, at)]
        elif kind == "drop":
            content = content[:at] + content[at + n :]
        elif kind == "insert":
            content = content[:at] + some + content[at:]
        elif kind == "zeros":
            content = content[:at] + bytes(n) + content[at + n :]
        else:
            content = content[at:] + content[:at]
        content = content or b"\0"
    return content


LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=9),
                   st.sampled_from([torch.zeros(2, 3), torch.ones(8, 3, 3, 3), torch.tensor(1.0), 10**30,
                                    torch.zeros(2, dtype=torch.complex64), torch.zeros(0)]))
NAMES = st.one_of(st.integers(), st.text(max_size=9), st.sampled_from(
    ["state_dict", "model", "info", "clusters", "L", "labels", "type", "format", "method", "config", "meter",
     "classy_state_dict", "base_model", "trunk", "heads", "conv1.weight", "layer4.0.conv1.weight",
     "assignments", "backbone.conv1.weight", "prototypes.weight", "prototypes.bias", "fc.weight", *INFO]))
ANYTHING = st.recursive(LEAVES, lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(
    NAMES, inner, max_size=4)), max_leaves=12)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a tiny run: backbone.pt, checkpoint.pt, config.json, assignments.npz."""
    folder = tmp_path_factory.mktemp("run")
    trunk = resnet10(width=0.03125, stem="small")
    export(folder / "backbone.pt", trunk, width=0.03125)
    model = nn.ModuleDict({"backbone": trunk, "prototypes": nn.Linear(trunk.feature_dim, 3, bias=False)})
    checkpoint.save(folder / "checkpoint.pt", {
        "format": 1, "method": "swav", "step": 3, "config": {}, "model": model.state_dict(),
        "meter": {"assignments": torch.zeros(1, 4, dtype=torch.int32)}})
    (folder / "config.json").write_text(json.dumps({"method": "swav", "data": "shapes:50", "prototypes": 3}))
    np.savez_compressed(folder / "assignments.npz", assignments=np.zeros((1, 4), np.int32),
                        paths=np.frombuffer(b"a\0b\0c\0d", np.uint8))
    generator = np.random.default_rng(0)
    np.savez(folder / "features.npz", train_features=generator.normal(size=(60, 8)).astype(np.float32),
             train_labels=np.arange(60) % 3, val_features=generator.normal(size=(9, 8)).astype(np.float32),
             val_labels=np.arange(9) % 3, info=json.dumps({"arch": "resnet10", "width": 0.5, "size": 32}))
    return folder


def content_of(name, path):
    """What is read of a file of the run, in tensors and plain values."""
    if name == "features.npz":
        (x, y), (q, t), info = store.load(path)
        return {"x": x, "y": y, "q": q, "t": t, "info": info}
    if name == "assignments.npz":
        return torch.from_numpy(store.read_assignments(path, SimpleNamespace(paths=list("abcd"))))
    if name == "config.json":
        return protocol.config(path.parent)
    model, info = weights.load_model(path.parent if name == "checkpoint.pt" else path)
    assert not model.training and protocol.name(info)
    json.dumps({key: info.get(key) for key in ("method", "arch", "epoch")})  # as in an evaluation's record
    return model.state_dict()


FILES = ("backbone.pt", "checkpoint.pt", "features.npz", "assignments.npz", "config.json")


@pytest.mark.parametrize("count", [60, SLOW])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_or_harmless(run, name, count):
    """Nothing but JSON, which has no checksum, may hold something else than before."""
    path = run / name
    whole, expected = path.read_bytes(), content_of(name, path)

    @fuzz(count)
    @given(DAMAGE)
    def check(damage):
        path.write_bytes(damaged(whole, damage))
        with bounded():
            assert same(content_of(name, path), expected) or name == "config.json"

    try:
        check()
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("count", [25, SLOW])
@pytest.mark.parametrize("place", ["all", "info", "state_dict", "clusters", "run", "model", "meter"])
def test_anything_that_torch_saves_is_used_or_refused(run, place, count):
    """As a file, or as a part of one that is whole otherwise."""
    name = "checkpoint.pt" if place in ("run", "model", "meter") else "backbone.pt"
    path = run / name
    whole, saved = path.read_bytes(), torch.load(path, weights_only=True)

    @fuzz(count)
    @given(ANYTHING, NAMES)
    def check(thing, key):
        if place in ("all", "run"):
            content = thing
        else:
            content = {**saved, place: thing if key == "info" else {**saved.get(place, {}), key: thing}}
        torch.save(content, path)
        with bounded():
            content_of(name, path)

    try:
        check()
    finally:
        path.write_bytes(whole)


@pytest.mark.parametrize("count", [60, SLOW])
def test_any_arrays_are_used_or_refused(run, count):
    arrays = dict(np.load(run / "features.npz"))
    kinds = st.sampled_from(["f4", "f8", "i1", "i4", "i8", "u8", "c8", "?", "U3", "M8[s]"])
    shapes = st.lists(st.sampled_from((0, 1, 3, 9, 60)), max_size=3)

    @fuzz(count)
    @given(st.sampled_from(sorted(arrays)), kinds, shapes, st.integers(0, 300))
    def check(name, kind, shape, value):
        np.savez(run / "odd.npz", **{**arrays, name: np.full(shape, value).astype(kind)})
        with bounded():
            store.load(run / "odd.npz")
        np.savez(run / "odd.npz", assignments=np.full(shape, value).astype(kind),
                 paths=np.full(shape, value).astype(kind))
        with bounded():
            store.read_assignments(run / "odd.npz", SimpleNamespace(paths=list("abcd")))

    check()


JSON = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
                    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(
                        ["data", "root", "val", "prototypes", "x"]), inner, max_size=4)), max_leaves=9)


@pytest.mark.parametrize("count", [60, SLOW])
def test_any_json_is_used_or_refused(run, count):
    path = run / "config.json"
    whole = path.read_bytes()

    @fuzz(count)
    @given(JSON)
    def check(content):
        path.write_text(json.dumps(content))
        with bounded():
            spec, root, val = protocol.sources(SimpleNamespace(trunk=run, data="", root="", val=""))
            assert all(isinstance(name, str) for name in (spec, root, val))

    try:
        check()
    finally:
        path.write_bytes(whole)
