"""What the tests of evaluation scripts share: small images and trunks, commands run in this process."""

import json
import os
import signal
import tempfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.engine import checkpoint
from common.engine.launch import launch
from common.evaluation.progress import Progress
from common.multicrop import MEAN, STD
from common.resnet import resnet10

COLOURS = {"red": (200, 40, 40), "green": (40, 200, 40), "blue": (40, 40, 200)}
INFO = dict(arch="resnet10", width=0.125, stem="small", channels=3, mean=MEAN, std=STD, method="swav",
            resize=24, size=20, epoch=5)
CPU = ("--workers", 0, "--precision", "float32")


def run_here(script, *arguments):
    """Runs an evaluation, a module, in this process and a folder that is thrown away; returns its exit
    code."""
    here, handlers = os.getcwd(), {number: signal.getsignal(number) for number in (2, 15, 10, 1)}
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            launch(script.main, script.arguments([str(a) for a in arguments]))
        except SystemExit as stop:
            return stop.code
        finally:
            os.chdir(here)
            torch.use_deterministic_algorithms(False)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return 0


class Killed(Exception):
    pass


def goes_on_after_kills(monkeypatch, capsys, script, *command, kills):
    """Runs a command that is killed at its steps of these numbers, each time after a save, and goes on;
    returns its record."""
    fetch, count = Progress.fetch, 0

    def killing(progress, *arguments):
        nonlocal count
        count += 1
        if count in kills:
            progress.save()
            raise Killed
        return fetch(progress, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "fetch", killing)
        for _ in kills:
            with pytest.raises(Killed):
                run_here(script, *command)
            capsys.readouterr()
        record, out = evaluate(capsys, script, *command)
    assert "going on from" in out
    return record


def evaluate(capsys, script, *arguments):
    """(record, output) of a command that must work."""
    capsys.readouterr()
    assert run_here(script, *arguments) == 0
    out = capsys.readouterr().out
    return next(json.loads(line) for line in out.splitlines() if line.startswith("{")), out


def refuses(capsys, script, cases):
    """Each case (arguments, exit code, words) ends with that code and one line that has the words."""
    for arguments, code, words in cases:
        assert run_here(script, *arguments, "--workers", 0) == code, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error


def colour_tree(root, **counts):
    """Class folders of three colours under noise; counts: how many of red, green and blue in each split."""
    rng = np.random.default_rng(0)
    for split, numbers in counts.items():
        for (name, colour), count in zip(COLOURS.items(), numbers):
            for i in range(count):
                (root / split / name).mkdir(parents=True, exist_ok=True)
                pixels = np.clip(rng.normal(colour, 40, (40, 36, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def export(path, trunk=None, **info):
    """Writes a trunk, by itself a random ResNet-10 of an eighth of the width, as a backbone.pt."""
    torch.manual_seed(3)
    info = {**INFO, **info}
    trunk = trunk or resnet10(width=info["width"], stem=info["stem"])
    checkpoint.export_backbone(path, trunk, info)
    return path
