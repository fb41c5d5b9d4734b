"""Runs that an older version began go on: its checkpoints (here of networks with two channels) resume, and
the next losses are those that it had itself."""

import importlib
import shutil

import pytest
from helpers import GOLDEN, losses, run_here

SMALL = "--data shapes:64 --recipe small --width 0.03125 --sizes 16 --prototypes 4 --batch-size 16"
SMALL += " --epochs 3 --workers 0 --log-every 1 --precision float64 --max-steps 9 --no-exif"
HEAD = "--hidden 8 --dim 4"
RUNS = {  # its own options, and the losses of steps 7 to 9
    "swav": (f"{HEAD} --queue-length 32 --queue-start-epoch 0",
             [3.71782788492, 3.67579389256, 3.576466105]),
    "deepclusterv2": (HEAD, [2.23451823714, 1.86089814476, 1.57659973969]),
    "selav2": (HEAD, [3.44420866066, 3.81926302697, 3.2883826859]),
    "deepcluster": ("--pca-dim 4", [1.38209159164, 1.39615609159, 1.39454871796]),
    "odc": (HEAD, [1.38166927653, 1.38839866394, 1.38823369285]),
    "sela": ("", [1.34194548138, 1.40728994572, 1.41767599025]),
}


@pytest.mark.parametrize("method", RUNS)
def test_an_older_run_goes_on(method, tmp_path, capsys):
    shutil.copy(GOLDEN / "older" / f"{method}.pt", tmp_path / "checkpoint.pt")
    options, expected = RUNS[method]
    script = importlib.import_module(method)
    assert run_here(script, *SMALL.split(), *options.split(), "--out", tmp_path) == 0
    assert "resumed at step 6 of 12" in capsys.readouterr().out
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-8)
