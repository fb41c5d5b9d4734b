"""Runs that an older version began go on: its checkpoints (here of networks with two channels) resume, and
the next losses are those that it had itself."""

import importlib
import shutil

import pytest
from helpers import GOLDEN, losses, run_here

SMALL = "--data shapes:64 --recipe shapes --width 0.03125 --sizes 16 --prototypes 4 --batch-size 16"
SMALL += " --epochs 3 --workers 0 --log-every 1 --precision float64 --max-steps 9"
HEAD = "--hidden 8 --dim 4"
RUNS = {  # its own options, and the losses of steps 7 to 9
    "swav": (f"{HEAD} --queue-length 32 --queue-start-epoch 0",
             [2.93585898306, 3.47597431792, 3.82589612218]),
    "deepclusterv2": (HEAD, [1.46147576513, 1.47038255095, 1.19750136184]),
    "selav2": (HEAD, [3.33076613355, 4.09340685297, 3.50554659319]),
    "deepcluster": ("--pca-dim 4", [1.38834376432, 1.38327238753, 1.38899727803]),
    "odc": (HEAD, [1.38133335141, 1.37353145883, 1.39340100557]),
    "sela": ("", [1.32818634251, 1.33710399257, 1.35632070258]),
}


@pytest.mark.parametrize("method", RUNS)
def test_an_older_run_goes_on(method, tmp_path, capsys):
    shutil.copy(GOLDEN / "older" / f"{method}.pt", tmp_path / "checkpoint.pt")
    options, expected = RUNS[method]
    script = importlib.import_module(method)
    assert run_here(script, *SMALL.split(), *options.split(), "--out", tmp_path) == 0
    assert "resumed at step 6 of 12" in capsys.readouterr().out
    assert losses(tmp_path) == pytest.approx(expected, rel=1e-8)
