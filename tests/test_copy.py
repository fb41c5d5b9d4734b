"""What docs/copy.md invites to copy works where it is copied to: nothing but the named files, in an empty
folder."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "docs/copy.md").read_text(), re.S)
# The scores of a network that is right of half the images and knows nothing of the others; the loss is half
# of ln K.
LOSS = """
import math
import torch
import {method}

B, K = 16, 10
targets, weight = torch.arange(B) % K, torch.ones(K)
scores = 100 * torch.nn.functional.one_hot(targets, K).float().repeat(3, 1, 1)  # (V, B, K)
scores[:, ::2] = 0
codes = torch.nn.functional.one_hot(targets, K).float().repeat(2, 1, 1)  # (U, B, K)
loss = {method}.prediction_loss({arguments})
assert torch.isclose(loss, torch.tensor(math.log(K) / 2)), loss
"""
ARGUMENTS = {"swav": "scores, codes, 0.1", "selav2": "[scores, scores], targets.repeat(2, 1), 0.1",
             "deepclusterv2": "[scores, scores], targets.repeat(2, 1), 0.1",
             "deepcluster": "scores, targets, 1.0", "odc": "scores, targets, weight, 1.0",
             "sela": "[scores, scores], targets.repeat(2, 1), 1.0"}


def lift(names, folder):
    folder.mkdir(exist_ok=True)
    for name in names:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name.rsplit("/", 1)[-1])


# What is in no folder of ours is imported once; each script then runs in a fork of this.
PYTHON = """
import json, os, sys, numpy, scipy.optimize, torch, torchvision
for line in sys.stdin:
    folder, script = json.loads(line)
    if not os.fork():
        os.dup2(2, 1)  # what a script prints is no answer
        os.chdir(folder)
        sys.path.insert(0, "")
        exec(script, {"__name__": "__main__"})
        os._exit(0)
    print(os.wait()[1], flush=True)
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path_factory.mktemp("run"))
    with subprocess.Popen([sys.executable, "-I", "-c", PYTHON], **pipes) as process:

        def run(script, folder):
            process.stdin.write(json.dumps((str(folder), script)) + "\n")
            process.stdin.flush()
            assert process.stdout.readline() == "0\n"

        yield run


@pytest.mark.parametrize("block", BLOCKS, ids=[re.search(r"\w+\.py", b)[0] for b in BLOCKS])
def test_a_block_of_the_page_runs_by_itself(block, run, tmp_path):
    first, *lines = block.splitlines()
    package = re.search(r"the folder `(\w+)`", first)
    named = re.findall(r"(?<!as )\b(common/\w+\.py|\w+\.py|common\b(?!/))", first)
    lift(named, tmp_path / package[1] if package else tmp_path)
    run(f"import torch; torch.manual_seed(0)\n{block}", tmp_path)
    for part in re.split("\nconfig = ", "\n".join(lines)):  # what stands for `run`, and what uses it
        code = [line for line in part.splitlines() if line.strip() and not re.match("import|from", line)]
        assert len(code) <= 10
    assert re.search(r"^ *assert ", block, re.M)


@pytest.mark.parametrize("method", ARGUMENTS)
def test_a_method_is_lifted_without_the_others(method, run, tmp_path):
    lift([f"{method}.py", "common"], tmp_path)
    run(LOSS.format(method=method, arguments=ARGUMENTS[method]), tmp_path)


def test_all_parts_are_there():
    *parts, methods, _ = BLOCKS
    for name in ("sinkhorn(", "balanced_assignments(", "kmeans(", "fit_whitening(", "LARC(", "MultiCrop(",
                 "to_device("):
        assert name in "".join(parts), name
    for method in ("swav", "deepcluster", "odc"):
        assert f"{method}.prediction_loss(" in methods, method
    with_heads = re.search(r"method\.prediction_loss\(.* for method in \((.*)\)", methods)[1]
    assert set(with_heads.split(", ")) == {"deepclusterv2", "selav2", "sela"}
