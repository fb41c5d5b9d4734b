"""What the methods' loops do in which order, with which crops, and when prototypes start to learn.

One process and two agree where both are wrong, and so do a run that is killed and one that is not: these look
at the calls that a run makes.
"""

import functools
import importlib

import pytest
import torch
import torch.nn.functional as F
from helpers import run_here, saved

from common.resnet import ResNet

# 5 steps an epoch
SHARED = "--data shapes:80 --recipe shapes --width 0.125 --prototypes 4 --batch-size 16 --workers 0".split()
OWN = {"swav": "--queue-length 16 --queue-start-epoch 1 --freeze-prototypes-iters 3",
       "selav2": "--freeze-prototypes-iters 3", "odc": "--centroid-iters 3",
       "sela": "--labelling train --relabellings 3 --relabel-power 1"}


def here(method, *arguments):
    own = OWN.get(method, "").split()
    assert run_here(importlib.import_module(method), *SHARED, *own, *arguments) == 0


def watch(patch, method, places):
    """[(name, arguments, result)] of the calls of functions of a script, as they end."""
    calls = []

    def watched(name, function):
        def call(*arguments, **options):
            calls.append((name, arguments, function(*arguments, **options)))
            return calls[-1][-1]
        return call

    for place in places:
        *path, name = place.split(".")
        owner = functools.reduce(getattr, path, importlib.import_module(method))
        patch.setattr(owner, name, watched(name, getattr(owner, name)))
    return calls


FILL = 5 * "forward forward update "  # one pass, each large crop by itself
STEP = "forward prediction_loss update "
ORDER = {
    "swav": 5 * "normalize_prototypes forward assign prediction_loss "
            + 5 * "normalize_prototypes forward assign prediction_loss push ",
    "deepclusterv2": FILL + 2 * ("assign " + 5 * STEP),
    "selav2": FILL + 2 * ("assign " + 5 * f"normalize_prototypes {STEP}"),
    # centroids at the start and after every third step
    "odc": "refresh " + 3 * (2 * f"{STEP}repair " + f"{STEP}refresh repair ") + f"{STEP}repair",
}


@pytest.mark.parametrize("method", ORDER)
def test_parts_come_in_order_and_a_memory_takes_the_large_crops(method, tmp_path, monkeypatch):
    order, memory = ORDER[method].split(), "Queue" if method == "swav" else "Memory"
    owners = {"forward": "Model.", "normalize_prototypes": "Model.", "assign": "", "prediction_loss": ""}
    calls = watch(monkeypatch, method, [owners.get(name, f"{memory}.") + name for name in set(order)])
    here(method, *"--crops 2 2 --sizes 16 12 --scales 0.3 1 0.1 0.4 --epochs 2".split(), "--out", tmp_path)
    assert [name for name, *_ in calls] == order
    last = {name: (arguments, result) for name, arguments, result in calls}
    z, scores = last["forward"][1]  # (4 x 16, D) and scores of all crops
    rows = last["push" if method == "swav" else "update"][0][-1]
    rows = rows.reshape(-1, z.shape[1])
    assert len(rows) == (16 if method == "odc" else 32) and torch.equal(rows, z[: len(rows)])
    if method == "swav":
        assert torch.equal(last["assign"][0][0], scores[:32].view(2, 16, -1))


@pytest.mark.parametrize(("method", "passes"), {"deepclusterv2": 3, "selav2": 3, "sela": 4}.items())
def test_every_pass_over_the_images_has_new_crops_and_batch_statistics(method, passes, tmp_path, monkeypatch):
    """Two epochs, and the passes that fill a memory or that labels are found from."""
    seen, forward = [], ResNet.forward
    monkeypatch.setattr(ResNet, "forward", lambda self, x: (
        seen.append((self.training, x.sum((1, 2, 3)).tolist())), forward(self, x))[1])
    here(method, *"--crops 2 --sizes 16 --scales 0.3 1 --epochs 2".split(), "--out", tmp_path)
    assert all(training for training, _ in seen)
    drawn = [crop for _, crops in seen for crop in crops]
    assert len(drawn) == passes * 2 * 80 == len(set(drawn))


@pytest.mark.parametrize(("method", "head"), [("swav", ""), ("selav2", "1.")])
def test_prototypes_learn_after_the_frozen_steps(method, head, tmp_path):
    weights = []
    for steps in (1, 3, 4):
        here(method, "--max-steps", steps, "--out", tmp_path)
        weights.append(F.normalize(saved(tmp_path)["model"][f"prototypes.{head}weight"]))
    torch.testing.assert_close(weights[1], weights[0])
    assert (weights[2] - weights[1]).abs().max() > 1e-5
