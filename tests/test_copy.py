"""What README.md invites to copy works where it is copied to: nothing but the named files, in an empty folder."""

import re
import shutil
import subprocess
import sys

import pytest
from helpers import ROOT

SECTION = (ROOT / "README.md").read_text().split("## Copy this\n")[1].split("\n## ")[0]
BLOCKS = re.findall(r"```python\n(.*?)```", SECTION, re.S)


@pytest.mark.parametrize("block", BLOCKS, ids=[re.search(r"\w+\.py", b)[0] for b in BLOCKS])
def test_a_block_of_the_readme_runs_by_itself(block, tmp_path):
    named = re.findall(r"\bcommon\b(?:/\w+\.py)?|\b\w+\.py", block.splitlines()[0])
    package = re.search(r"the folder `(\w+)`", block.splitlines()[0])
    folder = tmp_path / package[1] if package else tmp_path
    folder.mkdir(exist_ok=True)
    for name in named:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name.rsplit("/", 1)[-1])
    script = f"import sys; sys.path.insert(0, '')\n{block}"
    done = subprocess.run([sys.executable, "-I", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sum(bool(line.strip()) for line in block.splitlines()[1:]) <= 10


def test_all_parts_are_there():
    text = "".join(BLOCKS)
    for name in ("sinkhorn(", "kmeans(", "LARC(", "MultiCrop(", "to_device("):
        assert name in text, name
    for method in ("swav", "deepclusterv2", "deepcluster", "odc", "sela", "selav2"):
        assert re.search(rf"\b{method}\b", text.split("import torch")[-1]), method
