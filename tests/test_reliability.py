"""Faults, injected into runs of swav.py, and what becomes of the run. docs/reliability.md is the list."""

import errno
import hashlib
import importlib
import itertools
import math
import multiprocessing
import os
import pickle
import random
import re
import resource
import signal
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    QUEUE,
    ROOT,
    TINY,
    children,
    command,
    finish,
    image_tree,
    kill_tree,
    killed_and_resumed,
    losses,
    metrics,
    ranks,
    ranks_of,
    run_here,
    same,
    saved,
    start,
    swav_here,
    swav_ranks,
    tree,
)

import swav
from common import data, resnet, weights
from common.distributed import rank
from common.engine import checkpoint
from common.engine import log as meter
from common.engine.errors import CheckpointError, Damaged
from common.engine.run import Run

# ---- exact resume


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    shared = ["--data", "shapes:64", *TINY, *QUEUE, "--epochs", 4]  # in mid-epoch, with the queue in use
    assert killed_and_resumed(swav, shared, tmp_path, "Run.log 6") == 5


def test_another_world_size_goes_on_with_the_same_batches(tmp_path):
    shared = ["--data", "shapes:64", *TINY, *QUEUE, "--precision", "float64", "--epochs", 4, "--max-steps"]
    assert swav_here(*shared, 12, "--out", tmp_path / "one") == 0
    assert [code for code, _, _ in ranks_of(2, swav, *shared, 5, "--out", tmp_path / "both")] == [0, 0]
    assert swav_here(*shared, 12, "--out", tmp_path / "both") == 0
    np.testing.assert_allclose(losses(tmp_path / "both"), losses(tmp_path / "one"), rtol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_five_kills_at_random_steps_change_no_bit(tmp_path, world_size):
    shared = ["--data", "shapes:96", *TINY, *QUEUE, "--epochs", 20, "--workers", 1, "--precision", "bfloat16"]
    shared += ["--crops", 2, 2, "--sizes", 16, 12, "--scales", 0.3, 1, 0.1, 0.4, "--save-every", 0.002]
    processes = world_size if world_size > 1 else 0
    straight = start(*command(*shared, "--out", tmp_path / "straight", ranks=processes))
    assert finish(straight)[0] == 0
    draw = random.Random(world_size)
    resumed = []
    for step in sorted(draw.sample(range(8, 115), 5)):
        run = start(*command(*shared, "--out", tmp_path / "killed", ranks=processes))
        for line in run.stdout:
            resumed += re.findall(r"resumed at step (\d+)", line)
            if re.search(rf"step {step}/120", line):
                kill_tree(run.pid)
                break
        run.communicate()
    code, out, err = finish(start(*command(*shared, "--out", tmp_path / "killed", ranks=processes)))
    resumed += re.findall(r"resumed at step (\d+)", out)
    assert code == 0 and len(resumed) == 5, err
    print(f"{world_size} ranks: resumed at {resumed}")
    a, b = saved(tmp_path / "straight"), saved(tmp_path / "killed")
    for part in ("model", "optimizer", "memory"):
        assert same(a[part], b[part]), part
    assert torch.equal(a["meter"]["assignments"], b["meter"]["assignments"])
    assert [r["step"] for r in metrics(tmp_path / "killed") if "loss" in r] == list(range(1, 121))
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")


@pytest.mark.slow
def test_fifty_kills_during_a_save_leave_a_whole_checkpoint(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--out", tmp_path, "--max-steps"]
    assert swav_here(*shared, 2) == 0
    path, content = tmp_path / "checkpoint.pt", saved(tmp_path)

    def save_for_ever():
        for count in range(10**9):
            checkpoint.save(path, {**content, "count": count})

    draw, partial, found = random.Random(0), 0, []
    for _ in range(50):
        checkpoint.save(path, {**content, "count": -1})
        process = multiprocessing.get_context("fork").Process(target=save_for_ever)
        process.start()
        time.sleep(draw.uniform(0.02, 0.08))
        process.kill()
        process.join()
        partial += (tmp_path / "checkpoint.pt.partial").exists()
        newest = path if path.exists() else checkpoint.previous_path(path)  # killed between two renames
        found.append(checkpoint.load(newest)["count"])
        assert swav_here(*shared, 2) == 0  # resumes, stops at once and saves
        assert not list(tmp_path.glob("*.partial"))
    print(f"{partial} of 50 kills left a partial file; {sorted(found)[25]} saves before a kill (median)")
    assert partial > 10


@pytest.mark.slow
def test_a_rank_that_dies_is_restarted_by_torchrun_and_the_end_is_the_same(tmp_path):
    shared = ["--data", "shapes:64", *TINY, *QUEUE, "--epochs", 20, "--save-every", 0]
    assert swav_ranks(2, *shared, "--out", tmp_path / "straight")[0] == 0
    line = command(*shared, "--out", tmp_path / "killed", ranks=2)
    run = start(*line[:3], "--max-restarts=2", *line[3:])
    for text in run.stdout:
        if "step 30/80" in text:
            os.kill(children(run.pid)[-1], signal.SIGKILL)
            break
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0 and "resumed at step" in out, out + err
    a, b = saved(tmp_path / "straight"), saved(tmp_path / "killed")
    assert all(same(a[part], b[part]) for part in ("model", "optimizer", "memory"))
    assert [r["step"] for r in metrics(tmp_path / "killed") if "loss" in r] == list(range(1, 81))


@pytest.mark.slow
def test_world_size_2_1_4_in_mid_epoch(tmp_path):
    shared = ["--data", "shapes:64", *TINY, *QUEUE, "--precision", "float64", "--epochs", 4, "--max-steps"]
    assert swav_here(*shared, 14, "--out", tmp_path / "one") == 0
    assert swav_ranks(2, *shared, 5, "--out", tmp_path / "all")[0] == 0
    assert swav_here(*shared, 9, "--out", tmp_path / "all") == 0
    code, out, err = swav_ranks(4, *shared, 14, "--out", tmp_path / "all")
    assert code == 0 and "resumed at step 9" in out, err
    np.testing.assert_allclose(losses(tmp_path / "all"), losses(tmp_path / "one"), rtol=1e-9)
    a, b = saved(tmp_path / "one"), saved(tmp_path / "all")
    torch.testing.assert_close(b["memory"]["queue"], a["memory"]["queue"], rtol=0, atol=1e-9)
    # the same images at the same steps
    assert torch.equal(a["meter"]["assignments"], b["meter"]["assignments"])


def test_other_workers_go_on_with_the_same_bits(tmp_path, monkeypatch):
    shared = ["--data", "shapes:64", *TINY, *QUEUE, "--epochs", 3, "--max-steps"]
    assert swav_here(*shared, 10, "--out", tmp_path / "straight") == 0
    assert swav_here(*shared, 3, "--out", tmp_path / "changed") == 0
    assert swav_here(*shared, 7, "--out", tmp_path / "changed", "--workers", 3) == 0
    loader = data.Loader
    monkeypatch.setattr(data, "Loader", lambda *arguments: loader(*arguments, start_method="spawn"))
    assert swav_here(*shared, 10, "--out", tmp_path / "changed", "--workers", 1) == 0
    a, b = saved(tmp_path / "straight"), saved(tmp_path / "changed")
    assert all(same(a[part], b[part]) for part in ("model", "optimizer", "memory"))
    assert losses(tmp_path / "straight") == losses(tmp_path / "changed")


# ---- polite stops


def test_a_stop_signal_saves_and_the_same_command_goes_on(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 500, "--out", tmp_path / "run", "--workers", 1]
    stopped = start(*command(*shared), start_new_session=True)
    for line in stopped.stdout:
        if "step 3/" in line:
            os.killpg(stopped.pid, signal.SIGTERM)  # the loader's workers get it too
            break
    rest = stopped.stdout.read()
    assert stopped.wait(timeout=30) == 0 and "stopped by a signal" in rest
    step = saved(tmp_path / "run")["step"]
    assert swav_here(*shared[:-1], 0, "--max-steps", step + 2) == 0
    assert [record["step"] for record in metrics(tmp_path / "run")
            if "loss" in record] == list(range(1, step + 3))


# name: processes, signal, how often, to whom, exit code (torchrun ends with 1 when it was the one to be
# asked)
STOPS = {
    "one process": (0, signal.SIGTERM, 1, lambda pid: [pid], 0),
    "one process and its workers": (0, signal.SIGTERM, 1, tree, 0),
    "torchrun": (2, signal.SIGTERM, 1, lambda pid: [pid], 1),
    "torchrun, ranks and workers": (2, signal.SIGTERM, 1, tree, 1),
    "one rank": (2, signal.SIGTERM, 1, lambda pid: children(pid)[-1:], 0),
    "Ctrl-C twice": (0, signal.SIGINT, 2, tree, 0),
    "Ctrl-C twice to all": (2, signal.SIGINT, 2, tree, 1),
    "SIGUSR1 to a rank": (2, signal.SIGUSR1, 1, lambda pid: children(pid)[:1], 0),
}


@pytest.mark.slow
@pytest.mark.parametrize("who", STOPS)
def test_polite_stops(tmp_path, who):
    processes, number, times, receivers, expected = STOPS[who]
    shared = ["--data", "shapes:64", *TINY, "--epochs", 50000, "--workers", 2, "--out", tmp_path]
    run = start(*command(*shared, ranks=processes), start_new_session=True)
    for line in run.stdout:
        if "step 5/" in line:
            break
    started = tree(run.pid)
    assert len(started) >= 1 + 2 * max(1, processes)
    for receiver in receivers(run.pid):
        os.kill(receiver, number)
    asked = time.monotonic()
    if times == 2:
        time.sleep(0.05)
        for process in receivers(run.pid):
            os.kill(process, number)
    out, err = run.communicate(timeout=60)
    print(f"{who}: {time.monotonic() - asked:.1f} s from signal to exit")
    assert run.returncode == expected, err
    assert out.count("stopped by a signal, after step") == 1, out + err
    assert saved(tmp_path)["step"] == metrics(tmp_path)[-1]["step"] == int(re.search(r"after step (\d+)",
                                                                                     out)[1])
    time.sleep(0.2)
    assert not [pid for pid in started if Path(f"/proc/{pid}").exists()]
    code, out, _ = finish(start(*command(*shared, "--max-steps", 1, ranks=processes)))
    assert code == 0 and "resumed at step" in out


def ask_rank_1_twice(method):
    log = method.Run.log

    def asked(run, *arguments, **figures):
        log(run, *arguments, **figures)
        if run.step == 3 and rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    method.Run.log = asked


def test_two_ranks_stop_together_though_one_alone_is_asked(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 50000, "--out", tmp_path, "--workers", 1]
    (code, out, _), (other, *_) = ranks_of(2, swav, *shared, change=ask_rank_1_twice)
    assert code == other == 0 and out.count("stopped by a signal, after step 4") == 1, out
    assert saved(tmp_path)["step"] == metrics(tmp_path)[-1]["step"] == 4


# ---- checkpoints


@pytest.mark.parametrize("damage", ["half", "tail", "empty", "html", "bit"])
def test_a_damaged_checkpoint_is_seen_and_the_previous_one_taken(tmp_path, damage, capsys):
    shared = ["--data", "shapes:64", *TINY, "--out", tmp_path, "--max-steps"]
    assert swav_here(*shared, 2) == 0 and swav_here(*shared, 3) == 0
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    with zipfile.ZipFile(path) as records:
        largest = max(records.infolist(), key=lambda record: record.file_size)
    flipped = bytearray(content)
    flipped[largest.header_offset + largest.file_size] ^= 1
    path.write_bytes({"half": content[: len(content) // 2], "tail": content[:-10], "empty": b"",
                      "html": b"<html>not found</html>", "bit": bytes(flipped)}[damage])
    capsys.readouterr()
    assert swav_here(*shared, 4) == 0
    out = capsys.readouterr().out
    assert "checkpoint.pt is damaged" in out and "resumed at step 2 of" in out
    for name in ("checkpoint.pt", "previous_checkpoint.pt"):
        (tmp_path / name).write_bytes(b"")
    assert swav_here(*shared, 5) == 4 and "damaged" in capsys.readouterr().err  # and not silently from step 0
    assert swav_here(*shared, 1, "--fresh") == 0


def test_a_damaged_checkpoint_never_becomes_the_previous_one(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--out", tmp_path, "--max-steps"]
    assert swav_here(*shared, 2) == 0 and swav_here(*shared, 3) == 0
    (tmp_path / "checkpoint.pt").write_bytes(b"junk")
    assert swav_here(*shared, 4) == 0
    steps = [checkpoint.load(tmp_path / name)["step"] for name in ("previous_checkpoint.pt", "checkpoint.pt")]
    assert steps == [2, 4] and (tmp_path / "damaged_checkpoint.pt").read_bytes() == b"junk"


def count_saves(out):
    saves, write = [], Run._save
    Run._save = lambda run, state: (saves.append(state["step"]), write(run, state))
    assert swav_here("--data", "shapes:64", *TINY, "--epochs", 25, "--save-every", 0.01, "--out", out) == 0
    return saves


def test_two_ranks_save_as_often_as_they_should(tmp_path):
    saves, others = ranks(2, count_saves, tmp_path)
    assert len(saves) > 2 and not others
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(saves[:-1])), saves


def test_what_does_not_fit_the_checkpoint_is_named(tmp_path, capsys):
    shared = ["--data", "shapes:64", *TINY, "--out", tmp_path]
    assert swav_here(*shared, "--max-steps", 1) == 0
    for change, words in {
        ("--prototypes", 13): "--prototypes 13 (saved 12)",
        ("--lr", 0.5): "--lr 0.5 (saved 2)",
        ("--arch", "resnet18"): "--arch resnet18 (saved resnet10)",
        ("--data", "shapes:80"): "has data 'shapes, second edition, train 64', here",
    }.items():
        assert swav_here(*shared, *change) == 4
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert swav_here(*shared, "--max-steps", 2, "--workers", 1, "--log-every", 7) == 0  # these may change
    state = saved(tmp_path)
    state["method"] = "odc"
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    assert swav_here(*shared) == 4 and "has method 'odc', here it is 'swav'" in capsys.readouterr().err


def small_file(folder, name):
    """Writes a small file of ours. Returns its path and what reads its tensors."""
    path = folder / name
    if name == "checkpoint.pt":
        checkpoint.save(path, {"model": {"weight": torch.randn(9, 40), "index": torch.arange(9)}, "step": 3})
        return path, lambda: checkpoint.load(path, {"step": 3})["model"]
    trunk = resnet.resnet10(width=0.03125, stem="small")
    info = dict(method="swav", arch="resnet10", width=0.03125, stem="small", channels=3, sobel=False)
    checkpoint.export_backbone(path, trunk, info)
    return path, lambda: weights.load_backbone(path)[0].state_dict()


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pt"])
@pytest.mark.parametrize("count", [300, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_flipped_byte_is_refused_or_harmless(tmp_path, name, count):
    """Harmless are bytes between records, and what a zip says of dates and systems."""
    path, read = small_file(tmp_path, name)
    content, whole, draw, refused = path.read_bytes(), read(), random.Random(count), 0
    for _ in range(count):
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= draw.randrange(1, 256)
        path.write_bytes(flipped)
        try:
            assert same(read(), whole)
        except CheckpointError as error:
            refused += 1
            assert str(path) in str(error) and (isinstance(error, Damaged) or name == "backbone.pt")
    print(f"{name}, {len(content)} bytes: {refused} of {count} flipped bytes refused, the others harmless")
    assert refused > count / 3


@pytest.mark.parametrize("name", ["checkpoint.pt", "backbone.pt"])
def test_a_truncated_file_is_refused(tmp_path, name):
    path, read = small_file(tmp_path, name)
    content = path.read_bytes()
    for length in (*range(0, len(content), 97), *range(len(content) - 30, len(content))):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=name):
            read()


def test_a_wrong_list_of_records_is_refused(tmp_path):
    """torch reads nothing of a record that is marked as a folder, and returns whatever its memory held."""
    path, read = small_file(tmp_path, "checkpoint.pt")
    content = path.read_bytes()
    entries = [match.start() for match in re.finditer(b"PK\1\2", content)]
    assert len(entries) > 5
    for entry in entries:
        flipped = bytearray(content)
        flipped[entry + 38] ^= 0x10  # of its external attributes
        path.write_bytes(flipped)
        with pytest.raises(Damaged, match="list of records"):
            read()
    path.write_bytes(b"PK\5\6" + bytes(18))  # a zip of none
    with pytest.raises(Damaged, match="list of records"):
        read()


def test_the_checkpoint_of_an_older_run_is_verified_and_loads(tmp_path):
    """Its zip was followed by a mark and the SHA-256 of all before."""
    path, read = small_file(tmp_path, "checkpoint.pt")
    content, whole = path.read_bytes(), read()
    older = content + b"SHA-256:" + hashlib.sha256(content).digest()
    path.write_bytes(older)
    assert same(read(), whole)
    path.write_bytes(older.replace(whole["weight"].numpy().tobytes()[:8], bytes(8)))
    with pytest.raises(Damaged, match="checksum"):
        read()


def test_what_is_expected_is_compared_with_whatever_is_there(tmp_path):
    for found in (torch.zeros(9, 9), torch.zeros(1), [1], None, "1", 1.0, True, {1: 2}):
        checkpoint.save(tmp_path / "checkpoint.pt", {"format": found})
        with pytest.raises(CheckpointError, match=r"checkpoint.pt has format .*, here it is 1$") as refusal:
            checkpoint.load(tmp_path / "checkpoint.pt", {"format": 1})
        assert "\n" not in str(refusal.value)


def test_what_is_no_dict_is_no_checkpoint(tmp_path):
    checkpoint.save(tmp_path / "checkpoint.pt", [1, 2])
    with pytest.raises(Damaged, match=r"checkpoint.pt is no checkpoint: it holds no names"):
        checkpoint.load(tmp_path / "checkpoint.pt")
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.pt")


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.mark.parametrize("kind", ["pickle", "torch", "torch, old format"])
def test_a_pickle_that_would_run_code_does_not(tmp_path, kind, capsys):
    marker = str(tmp_path / "owned")
    shared = ["--data", "shapes:64", *TINY, "--max-steps"]
    assert swav_here(*shared, 1, "--out", tmp_path / "run") == 0
    path = tmp_path / "run" / "checkpoint.pt"
    if kind == "pickle":
        path.write_bytes(pickle.dumps(Malicious(marker)))
    else:  # with checksums that agree
        saved = {"state_dict": Malicious(marker)}
        torch.save(saved, path, _use_new_zipfile_serialization=kind == "torch")
    assert swav_here(*shared, 2, "--out", tmp_path / "run") == 4
    assert "checkpoint.pt is damaged, or no checkpoint: " in capsys.readouterr().err
    assert swav_here(*shared, 1, "--out", tmp_path / "other", "--init-from", path) == 4
    assert "checkpoint.pt cannot be loaded" in capsys.readouterr().err
    assert not os.path.exists(marker)


def test_no_source_asks_for_unsafe_loading():
    """But for one function, which --trust-pickle alone makes do it."""
    unsafe = r"weights_only\s*=(?!\s*True)|pickle\.loads?\b|allow_pickle\s*=(?!\s*False)"
    for path in [*ROOT.glob("*.py"), *(ROOT / "common").rglob("*.py")]:
        text = path.read_text()
        if path == ROOT / "common" / "weights" / "load.py":
            reader = text[text.index("def read(path, trust_pickle=False):") :].split("\n\n\n")[0]
            first, second = re.findall(rf".*\n.*(?:{unsafe}).*", reader)
            assert first == ('        if trust_pickle and path.suffix == ".pkl":\n'
                             '            return pickle.loads(path.read_bytes())')
            assert "torch.load(" in second and "weights_only=not trust_pickle" in second
            text = text.replace(reader, "")
        assert not re.search(unsafe, text), path


def test_changed_data_are_named(tmp_path, capsys):
    images = image_tree(tmp_path / "images", images=16, size=(20, 20), splits=("train",)) / "train"
    shared = ["--data", images, "--recipe", "shapes", *TINY, "--out", tmp_path / "run", "--max-steps"]
    assert swav_here(*shared, 1) == 0
    for change, undo in (
        (lambda: (images / "n00" / "0.JPEG").rename(images / "aside"),
         lambda: (images / "aside").rename(images / "n00" / "0.JPEG")),
        (lambda: (images / "n00" / "new.JPEG").touch(), lambda: (images / "n00" / "new.JPEG").unlink()),
        (lambda: (images / "n01").rename(images / "n02"), lambda: (images / "n02").rename(images / "n01")),
    ):
        change()
        assert swav_here(*shared, 2) == 4
        error = capsys.readouterr().err
        assert "has data '32 files" in error and "here it is" in error and error.count("\n") == 1, error
        undo()
    assert swav_here(*shared, 2) == 0


def test_a_full_disk_is_said_and_survived(tmp_path, capsys):
    run = ["--data", "shapes:64", *TINY, "--out", tmp_path]
    assert swav_here(*run, "--max-steps", 2) == 0
    before = [(tmp_path / name).read_bytes() for name in ("checkpoint.pt", "backbone.pt")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a file that grows further fails
    try:
        capsys.readouterr()
        assert swav_here(*run, "--max-steps", 6, "--save-every", 0) == 4
        out, err = capsys.readouterr()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"warning: cannot write to {tmp_path}: File too large; " in out
    assert "the training goes on" in out and "step 6/" in out
    assert err.count("\n") == 1 and "the end of the run is not saved" in err
    assert [(tmp_path / name).read_bytes() for name in ("checkpoint.pt", "backbone.pt")] == before
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "previous_checkpoint.pt").exists()
    assert swav_here(*run, "--max-steps", 6) == 0 and "resumed at step 2 of" in capsys.readouterr().out


def test_a_full_disk_is_named_wherever_it_stops_a_save(tmp_path):
    """torch's writer reports a position for it at some places, and the error itself at others."""
    state = {f"w{i}": torch.randn(30, 30 + i) for i in range(20)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        for room in range(2000, 80_000, 3000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
            with pytest.raises(OSError, match="File too large"):
                checkpoint.save(tmp_path / "checkpoint.pt", state)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_restart_on_a_full_disk_is_one_line(tmp_path, capsys):
    run = ["--data", "shapes:64", *TINY, "--out", tmp_path, "--max-steps"]
    assert swav_here(*run, 2) == 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        capsys.readouterr()
        assert swav_here(*run, 6) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert f"error: --out {tmp_path} cannot be" in error and error.count("\n") == 1


def test_log_lines_are_whole_or_left_out_where_the_disk_is_full(tmp_path, monkeypatch):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 3, "--out", tmp_path]
    log, step = tmp_path / "metrics.jsonl", Run.log

    def full_for_a_while(run, *arguments, **figures):
        if run.step == 3:
            log.rename(tmp_path / "aside")
            log.symlink_to("/dev/full")
        if run.step == 7:
            log.unlink()
            (tmp_path / "aside").rename(log)
        step(run, *arguments, **figures)

    monkeypatch.setattr(Run, "log", full_for_a_while)
    assert swav_here(*shared) == 0
    logged = [record["step"] for record in metrics(tmp_path) if "loss" in record]
    assert logged == [1, 2, 3, 8, 9, 10, 11, 12]


@pytest.mark.slow
def test_a_small_disk_fills_up_and_is_freed(tmp_path):
    out = tmp_path / "disk"
    out.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", out],
                      capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        shared = ["--data", "shapes:64", *TINY, "--epochs", 50000, "--out", out, "--save-every", 0,
                  "--max-steps"]
        assert swav_here(*shared, 3) == 0
        # room for what a start writes, but for no checkpoint
        (out / "ballast").write_bytes(bytes(_free(out) - 2**16))
        before = (out / "checkpoint.pt").read_bytes()
        run = start(*command(*shared, 50000))
        for line in run.stdout:
            if "No space left" in line:
                warned = line
            if "step 30/" in line:
                assert (out / "checkpoint.pt").read_bytes() == before
                (out / "ballast").unlink()
            if "step 60/" in line:
                break
        run.terminate()
        assert finish(run)[0] == 0 and "the training goes on" in warned
        assert saved(out)["step"] >= 60
        assert [r["step"] for r in metrics(out) if "loss" in r] == list(range(1, saved(out)["step"] + 1))
    finally:
        subprocess.run(["umount", out], check=True)


def _free(folder):
    return os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize


def test_a_directory_that_cannot_be_written_is_said_before_the_first_step(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert swav_here("--data", "shapes:64", *TINY, "--out", tmp_path / "file" / "run") == 2
    out, err = capsys.readouterr()
    assert "cannot be written" in err and err.count("\n") == 1 and "step" not in out


def test_a_second_run_on_one_directory_is_refused(tmp_path, capsys):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 5000, "--out", tmp_path]
    first = start(*command(*shared))
    try:
        for line in first.stdout:
            if "step 1/" in line:
                break
        assert swav_here(*shared) == 2
        assert f"is in use by another run (process {first.pid} on" in capsys.readouterr().err
    finally:
        first.kill()
        first.wait()


# ---- data


def test_a_loader_worker_that_is_killed_is_said_by_its_own_rank(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 5000, "--out", tmp_path, "--save-every", 0,
              "--workers", 1]
    run = start(*command(*shared, ranks=2))
    for line in run.stdout:
        if "step 20/" in line:
            break
    ranks = children(run.pid)
    os.kill(children(max(ranks))[-1], signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1 and err.count(
        "error: a loader worker died, out of memory? lower --workers") == 1, err
    assert "[rank" not in err  # no traceback
    assert saved(tmp_path)["step"] >= 19


def test_a_file_that_vanishes_after_the_scan_is_named(tmp_path, monkeypatch, capsys):
    images = image_tree(tmp_path / "images", images=16, size=(20, 20), splits=("train",))
    step = Run.log

    def vanish(run, *arguments, **figures):
        if run.step == 2:
            (images / "train" / "n01" / "3.JPEG").unlink()
        step(run, *arguments, **figures)

    monkeypatch.setattr(Run, "log", vanish)
    assert swav_here("--data", images, "--recipe", "shapes", *TINY, "--epochs", 4, "--out",
                     tmp_path / "run") == 0
    assert "warning: 1 images cannot be read and are replaced by their neighbours" in capsys.readouterr().out
    assert (tmp_path / "run" / "bad_images.txt").read_text() == "n01/3.JPEG\tNo such file or directory\n"


def test_a_disk_that_is_full_once_more_is_said_once_more(tmp_path, capsys, monkeypatch):
    save, calls = checkpoint.save, []

    def full_now_and_then(path, state):
        calls.append(state["step"])
        if len(calls) in (1, 2, 4):
            raise OSError(errno.ENOSPC, "No space left on device")
        save(path, state)

    monkeypatch.setattr(checkpoint, "save", full_now_and_then)
    assert swav_here("--data", "shapes:64", *TINY, "--save-every", 0, "--epochs", 2, "--out", tmp_path) == 0
    assert len(calls) >= 5 and capsys.readouterr().out.count("No space left on device") == 2


def test_a_disk_that_cannot_be_read_does_not_damage_a_file(tmp_path, capsys, monkeypatch):
    shared = ["--data", "shapes:64", *TINY, "--out", tmp_path, "--max-steps"]
    assert swav_here(*shared, 1) == 0 and swav_here(*shared, 2) == 0

    def unreadable(archive):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(zipfile.ZipFile, "testzip", unreadable)
        assert swav_here(*shared, 3) == 2 and "Input/output error" in capsys.readouterr().err
    assert not (tmp_path / "damaged_checkpoint.pt").exists()
    assert swav_here(*shared, 3) == 0 and "resumed at step 2" in capsys.readouterr().out


# ---- divergence and collapse


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    run = ["--data", "shapes:64", *TINY, "--out", tmp_path]
    assert swav_here(*run, "--max-steps", 2) == 0
    monkeypatch.setattr(swav, "prediction_loss", lambda scores, codes,
                        temperature: scores.sum() * float("nan"))
    assert swav_here(*run, "--save-every", 0) == 5
    error = capsys.readouterr().err
    assert "not finite at step 3" in error
    assert "the last good checkpoint is" in error and "checkpoint.pt" in error
    assert saved(tmp_path)["step"] == 2 and all(w.isfinite().all() for w in saved(tmp_path)["model"].values())


@pytest.mark.parametrize("script, options, words", [
    ("deepcluster", [], "features of images that can be read are not finite"),
    ("odc", [], "features of images that can be read are not finite"),
    ("sela", [], "features of images that can be read are not finite"),
    ("sela", ["--labelling", "train"], "head 0 cannot be labelled: row")])
def test_a_readable_image_whose_features_are_not_finite_ends_the_run(tmp_path, capsys, monkeypatch, script,
                                                                     options, words):
    """Weights that are finite can give features that are not, and these must not pass for an image that
    cannot be read."""
    method, forward = importlib.import_module(script), resnet.ResNet.forward

    def overflowing(network, x):
        features = forward(network, x)
        if not torch.is_grad_enabled():  # a pass over the data
            features[0] *= float("inf")
        return features

    monkeypatch.setattr(resnet.ResNet, "forward", overflowing)
    tiny = "--width 0.25 --sizes 16 --prototypes 4 --batch-size 16 --workers 0".split()
    assert run_here(method, "--data", "shapes:80", *tiny, *options, "--out", tmp_path) == 5
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not (tmp_path / "assignments.npz").exists()


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, monkeypatch):
    run = ["--data", "shapes:64", *TINY, "--out", tmp_path]
    assert swav_here(*run, "--max-steps", 2) == 0
    loss = swav.prediction_loss

    def infinite_gradient(scores, codes, temperature):
        scores.register_hook(lambda gradient: gradient * float("inf"))
        return loss(scores, codes, temperature)

    monkeypatch.setattr(swav, "prediction_loss", infinite_gradient)
    assert swav_here(*run, "--max-steps", 3) == 5  # the loss of this step was finite
    assert "not finite at step 4 or shortly before; the last good checkpoint is" in capsys.readouterr().err
    assert saved(tmp_path)["step"] == 2


def test_worked_health_figures():
    health = meter.Meter(4, 8, heads=2)
    health.count(torch.tensor(1.0), torch.arange(4), torch.tensor([[0, 0, 1, 1], [2, 2, 2, -1]]))
    health.count(torch.tensor(2.0), torch.arange(4, 8), torch.tensor([[1, 0, 1, 0], [2, 2, 2, 2]]))
    found = health.read(torch.eye(4))  # each of 4 features has variance 3 / 16
    assert found == pytest.approx({"loss": 1.5, "loss_per_ln_k": 1.5 / math.log(4), "clusters_used": 1.5,
                                   "assignment_entropy": (0.5 + 0) / 2, "feature_std": 0.75**0.5})


def counted_and_read_back():
    health, other = meter.Meter(4, 8), meter.Meter(4, 8)
    health.count(torch.tensor(1.0), torch.tensor([rank()]), torch.tensor([rank()]))
    other.load_state_dict(health.state_dict())
    return other.state_dict(), health.state_dict()


def test_what_ranks_have_counted_is_read_back_once():
    for found, state in ranks(2, counted_and_read_back):
        assert same(found, state) and state["sums"].tolist() == [2, 2, 0]


def test_a_constant_encoder_is_called_collapsed_once(tmp_path, capsys, monkeypatch):
    def constant(self, crops, autocast=None):
        z = torch.nn.functional.normalize(self.prototypes.weight[:1] * 0 + 1)
        z = z.expand(sum(len(group) for group in crops), -1)
        return z + 0 * self.projection_head[3].bias.sum(), self.prototypes(z)

    monkeypatch.setattr(swav.Model, "forward", constant)
    assert swav_here("--data", "shapes:64", *TINY, "--max-steps", meter.COLLAPSED_STEPS + 20, "--out",
                     tmp_path, "--epochs", 100, "--precision", "float32") == 0
    out = capsys.readouterr().out
    assert out.count("collapsed:") == 1 and "--epsilon 0.03" in out


def nan_on_rank_1(out):
    loss = swav.prediction_loss

    def spoilt(scores, codes, temperature):
        return loss(scores, codes, temperature) * (float("nan") if rank() == 1 else 1)

    swav.prediction_loss = spoilt
    return swav_here("--data", "shapes:64", *TINY, "--save-every", 0, "--log-every", 100, "--out", out)


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path):
    assert swav_here("--data", "shapes:64", *TINY, "--max-steps", 2, "--out", tmp_path) == 0
    assert ranks(2, nan_on_rank_1, tmp_path) == [5, 5]
    assert saved(tmp_path)["step"] == 2 and all(w.isfinite().all() for w in saved(tmp_path)["model"].values())


def test_a_loss_stuck_at_ln_k_is_said_once_with_the_remedy(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(meter, "STUCK_STEPS", 30)
    monkeypatch.setattr(swav, "prediction_loss", lambda scores, codes,
                        temperature: scores.sum() * 0 + math.log(12))
    run = ["--data", "shapes:64", *TINY, "--epochs", 100, "--out", tmp_path, "--max-steps"]
    assert swav_here(*run, 29) == 0 and "warning: stuck" not in capsys.readouterr().out
    assert swav_here(*run, 80) == 0
    out = capsys.readouterr().out
    assert out.count("warning: stuck: the loss has been ln K for 30 steps") == 1 == out.count("fewer "
                                                                                              "--prototypes")
    assert out.index("step 30/") < out.index("warning: stuck") < out.index("step 31/")
