"""docs/walkthrough.ipynb runs from top to bottom, with fewer images and epochs."""

import json
import re
import subprocess
import sys

from helpers import ROOT
from test_copy import lift
from test_docs import anchors

PAGE = ROOT / "docs/walkthrough.ipynb"
CELLS = json.loads(PAGE.read_text())["cells"]
CODE, TEXT = ("\n".join("".join(cell["source"]) for cell in CELLS if cell["cell_type"] == kind)
              for kind in ("code", "markdown"))
BEFORE = """
import torch
torch.set_num_threads(1)
pictures = []
display = pictures.append
"""
CLAIMS = """
assert len(pictures) == 10 and all(picture.width > 300 for picture in pictures)
assert after > max(before, broken_after) + 5, (before, after, broken_after)
assert len(broken_scores.argmax(1).unique()) == 1, broken_scores.argmax(1)
"""


def test_the_cells_run_and_show_what_the_text_says(tmp_path):
    small = CODE
    for cell, smaller in (("IMAGES, EPOCHS = .*", "IMAGES, EPOCHS = 1280, 2"),
                          ('device="cpu", ', 'device="cpu", precision="float32", ')):  # the same on every CPU
        small, found = re.subn(cell, smaller, small)
        assert found == 1
    lift(["swav.py", "common", "docs"], tmp_path)
    command = [sys.executable, "-I", "-c", BEFORE + small + CLAIMS]
    done = subprocess.run(command, cwd=tmp_path / "docs", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_it_has_no_outputs_and_its_links_lead_somewhere():
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in CELLS)
    for name, anchor in re.findall(r"\]\(([^)#]*)(?:#([^)]*))?\)", TEXT):
        target = PAGE.parent / name
        assert target.exists() and (not anchor or anchor in anchors(target)), (name, anchor)
