"""Faults of machine and user around a run: streams, signals, waits, restarts, odd values."""

import contextlib
import functools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from helpers import (
    QUEUE,
    ROOT,
    TINY,
    command,
    finish,
    kill_tree,
    losses,
    metrics,
    ranks_of,
    run_here,
    same,
    saved,
    start,
    swav_here,
    tree,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import sela
import swav
from common import data, features, multicrop
from common.engine import checkpoint, options, unreadable
from common.engine.errors import UserError
from common.engine.log import Log

SHARED = ["--data", "shapes:64", *TINY]


def one_line(err):
    return err.startswith("error: ") and err.count("\n") == 1


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


# ---- streams


def test_a_stop_signal_counts_though_nobody_reads_what_is_said(tmp_path):
    run = start(*command(*SHARED, "--epochs", 5000, "--out", tmp_path))
    for line in run.stdout:
        if "step 2/" in line:
            break
    run.stdout.close()  # as when tee has ended
    run.stderr.close()
    run.send_signal(signal.SIGINT)
    assert run.wait(timeout=60) == 0
    assert saved(tmp_path)["step"] >= 2


@pytest.mark.parametrize("streams, read", [(">&- 2>&-", ""), (">/dev/full 2>/dev/full", ""),
                                           ("| head -n 1", r"\xfcn\xef")])  # fmt: skip
def test_streams_that_take_nothing_end_no_run(tmp_path, streams, read):
    """Nor does a name that an ASCII terminal cannot show."""
    out = tmp_path / "ünï"
    line = " ".join(command(*SHARED, "--epochs", 2, "--out", out))
    run = subprocess.run(
        ["bash", "-c", f"{line} {streams}; exit ${{PIPESTATUS[0]}}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii:strict"},
    )
    assert run.returncode == 0 and run.stderr == "" and read in run.stdout, run.stderr
    assert (out / "done.json").exists() and len(losses(out)) == 8
    assert re.fullmatch(r"process \d+ on .*, started by \d+", (out / "lock").read_text())


@pytest.mark.parametrize("kept", [False, True])
def test_a_closed_terminal_saves_and_nohup_goes_on(tmp_path, kept):
    run = start(*["nohup"] * kept, *command(*SHARED, "--epochs", 5000, "--out", tmp_path))
    for line in run.stdout:
        if "step 2/" in line:
            run.send_signal(signal.SIGHUP)
            break
    if kept:
        steps = (int(step[1]) for line in run.stdout if (step := re.search(r"step (\d+)/", line)))
        assert next(step for step in steps if step > 20)
        run.send_signal(signal.SIGTERM)
    code, out, err = finish(run)
    assert code == 0 and "stopped by a signal" in out and saved(tmp_path)["step"] >= (20 if kept else 2), err


# ---- waits

HANGS = """import os, sys
from common.sources import shapes
read = shapes.Shapes.read
def hanging(self, i):
    return open(os.environ["FIFO"]) if i == 40 else read(self, i)
shapes.Shapes.read = hanging
import swav as m
m.launch(m.main, m.parse(m.Config, m.RECIPES, "", sys.argv[1:]))"""


@pytest.fixture
def fifo(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo")
    monkeypatch.setenv("FIFO", str(tmp_path / "fifo"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.parametrize("workers, processes", [(0, 0), (1, 2)])
def test_a_signal_while_data_do_not_come_saves_and_stops(tmp_path, fifo, workers, processes):
    out, script, order = tmp_path / "run", tmp_path / "hang.py", data.batches(64, 16, 0, 0)
    script.write_text(HANGS)
    shared = [*SHARED, "--workers", workers, "--save-every", 60, "--max-steps", 5, "--out"]
    run = start(*command(*shared, out, ranks=processes, script=script))
    step = next(i for i, batch in enumerate(order) if 40 in dict(batch).values())
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(losses(out)) == step)
    time.sleep(0.5)  # it waits
    started = tree(run.pid)[1:]
    run.send_signal(signal.SIGTERM)
    code, said, err = finish(run)
    assert code == (1 if processes else 0) and f"stopped by a signal, after step {step}:" in said, said + err
    assert saved(out)["step"] == step > 0
    wait_for(lambda: not [pid for pid in started if Path(f"/proc/{pid}").exists()], 10)
    assert swav_here(*shared, out) == swav_here(*shared, tmp_path / "straight") == 0
    a, b = saved(out)["model"], saved(tmp_path / "straight")["model"]
    assert processes or same(a, b)


LOADER = """import os, threading
from common import data
class Hanging:
    def __len__(self): return 8
    def __getitem__(self, key):
        print("reading", flush=True)
        open(os.environ["FIFO"])
if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        epoch = data.Loader(Hanging(), 1, start_method=method).epoch(0, data.batches(8, 2, 0, 0))
        threading.Thread(target=list, args=[epoch]).start()"""


def test_workers_end_when_their_parent_is_gone(tmp_path, fifo):
    script = tmp_path / "hang.py"
    script.write_text(LOADER)
    mark = {"WHOSE": str(tmp_path)}
    run = subprocess.Popen(
        [sys.executable, script], env={**os.environ, **mark}, stdout=subprocess.PIPE
    )

    def alive():
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if f"WHOSE={tmp_path}\0".encode() in (process / "environ").read_bytes():
                    found.append(int(process.name))
        return found

    assert [run.stdout.readline() for _ in range(3)] == [b"reading\n"] * 3 and len(alive()) >= 4
    run.kill()
    run.wait()
    wait_for(lambda: not alive(), 30)


def limit(what, value, method):
    value += len(os.listdir("/proc/self/fd")) if what == resource.RLIMIT_NOFILE else 0
    resource.setrlimit(what, (value, resource.getrlimit(what)[1]))


@pytest.mark.parametrize("what, value, words", [(resource.RLIMIT_FSIZE, 200_000, "enlarge /dev/shm"),
                                                (resource.RLIMIT_NOFILE, 16, "files")])  # fmt: skip
def test_what_a_worker_cannot_do_is_one_line(tmp_path, what, value, words):
    arguments = [*SHARED, "--sizes", 64, "--workers", 2, "--out", tmp_path / "run"]
    ((code, _, err),) = ranks_of(1, swav, *arguments, change=functools.partial(limit, what, value))
    said = [line for line in err.splitlines() if line.startswith("error: ")]
    # threads of multiprocessing may speak before or after it
    assert code == 3 and len(said) == 1 and words in said[0], err


def test_shared_memory_that_cannot_be_had_is_named(tmp_path, capsys, monkeypatch):
    def refused():
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(data.multiprocessing, "Lock", refused)
    assert swav_here(*SHARED, "--workers", 1, "--out", tmp_path) == 3
    err = capsys.readouterr().err
    assert "/dev/shm" in err and "Read-only" in err and one_line(err)


# ---- restarts


def test_fresh_does_not_start_over_when_torchrun_restarts(tmp_path, capsys, monkeypatch):
    shared = [*SHARED, "--fresh", "--out", tmp_path, "--max-steps"]
    assert swav_here(*shared, 2) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert swav_here(*shared, 4) == 0 and "resumed at step 2" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert swav_here(*shared, 1) == 0 and saved(tmp_path)["step"] == 1


def whole(out):
    """The records of a run, without what depends on the clock."""
    return [
        {
            name: value
            for name, value in record.items()
            if name not in ("images_per_s", "data_wait", "memory_gb")
        }
        for record in metrics(out)
    ]


def test_a_run_killed_in_an_evaluation_makes_it_when_it_goes_on(tmp_path, monkeypatch):
    shared = [*SHARED, "--epochs", 3, "--eval-every", 1, "--out"]
    assert swav_here(*shared, tmp_path / "straight") == 0
    accuracy, calls = features.knn_accuracy, []

    def killed_now_and_then(*arguments, **options):
        calls.append(0)
        if len(calls) in (1, 3, 6):  # before the first step, in the middle, at the end
            raise ZeroDivisionError
        return accuracy(*arguments, **options)

    monkeypatch.setattr(features, "knn_accuracy", killed_now_and_then)
    for _ in range(3):
        with pytest.raises(ZeroDivisionError):
            swav_here(*shared, tmp_path / "killed")
    assert swav_here(*shared, tmp_path / "killed") == 0 and len(calls) == 7
    assert whole(tmp_path / "killed") == whole(tmp_path / "straight")
    assert (
        swav_here(*shared, tmp_path / "killed") == 0 and len(calls) == 7
    )  # finished, and not evaluated again


def test_max_steps_at_the_end_of_an_epoch_leaves_its_evaluation(tmp_path):
    assert swav_here(*SHARED, "--eval-every", 1, "--max-steps", 4, "--out", tmp_path) == 0
    assert [record["epoch"] for record in metrics(tmp_path) if "knn_k" in record] == [0, 1]


SMALL = "--data shapes:64 --width 0.125 --sizes 16 --prototypes 12 --batch-size 16".split()
METHODS = {
    "swav": [*SHARED, *QUEUE],
    "selav2": SHARED,
    "deepclusterv2": SHARED,
    "deepcluster": [*SMALL, "--pca-dim", 8],
    "odc": SMALL,
    "sela": SMALL,
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_twenty_kills_leave_the_log_whole(tmp_path, method):
    shared = [*METHODS[method], "--epochs", 20, "--eval-every", 1, "--workers", 1, "--log-every", 1]
    shared += ["--save-every", 0.005, "--out"]
    script = f"{method}.py"
    began = time.monotonic()
    assert finish(start(*command(*shared, tmp_path / "straight", script=script)))[0] == 0
    seconds, draw, kills = time.monotonic() - began, random.Random(method), 0
    while kills < 20:
        run = start(*command(*shared, tmp_path / "killed", script=script))
        time.sleep(draw.uniform(0.4, 1.0) * seconds if kills else seconds / 2)
        kills += run.poll() is None
        kill_tree(run.pid)
        run.communicate()
        if (tmp_path / "killed" / "done.json").exists():
            assert whole(tmp_path / "killed") == whole(tmp_path / "straight")
            subprocess.run(["rm", "-r", tmp_path / "killed"], check=True)
    assert finish(start(*command(*shared, tmp_path / "killed", script=script)))[0] == 0
    assert whole(tmp_path / "killed") == whole(tmp_path / "straight")


def test_damaged_lines_of_the_log_are_dropped(tmp_path):
    assert swav_here(*SHARED, "--max-steps", 3, "--out", tmp_path) == 0
    path = tmp_path / "metrics.jsonl"
    first, second, third = path.read_bytes().splitlines(keepends=True)
    odd = b'null\n5\n\xff\n[1]\n{"step":"x"}\n{}\n\n{"step": 2\n'
    path.write_bytes(first + odd + second + third + b'{"step": 1}')  # the last without its end
    assert swav_here(*SHARED, "--max-steps", 4, "--out", tmp_path) == 0
    assert [record["step"] for record in metrics(tmp_path)] == [1, 2, 3, 4, 4]
    assert path.read_bytes().startswith(first + second + third)


def test_a_run_that_goes_on_is_not_done(tmp_path, capsys):
    shared = [*SHARED, "--out", tmp_path, "--save-every", 0, "--epochs"]
    assert swav_here(*shared, 2) == 0 and (tmp_path / "done.json").exists()
    assert swav_here(*shared, 2, "--max-steps", 8) == 0 and (tmp_path / "done.json").exists()
    assert swav_here(*shared, 3) == 4
    assert f"--init-from {tmp_path} with a new --out" in capsys.readouterr().err
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    state = checkpoint.load(tmp_path / "previous_checkpoint.pt")
    checkpoint.write(tmp_path / "previous_checkpoint.pt", {**state, "step": 7})
    assert swav_here(*shared, 2, "--max-steps", 7) == 0 and not (tmp_path / "done.json").exists()


def test_a_full_disk_is_said_once_though_some_files_find_room(tmp_path, capsys, monkeypatch):
    def full(self, record, line):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Log, "write", full)
    assert swav_here(*SHARED, "--save-every", 0, "--epochs", 3, "--out", tmp_path) == 0
    assert capsys.readouterr().out.count("No space left on device") == 1


# ---- values


@pytest.mark.parametrize(
    "words",
    [
        ["--data", ""],
        ["--data="],
        ["--out", ""],
        ["--init-from", ""],
        ["--jitter", "1e300", "1e300", "1e300", "0.2"],
        ["--lr", "1e300"],
        ["--temperature", "1e-300"],
        ["--epsilon", "1e-300"],
        ["--crops", "1000000000"],
        ["--workers", "100000"],
        ["--batch-size", "1"],
        ["--prototypes", "1" + "0" * 25],
    ],
)
def test_odd_values_are_refused_by_their_own_name(tmp_path, capsys, words):
    assert swav_here(*SHARED, "--out", tmp_path, *words) == 2
    err = capsys.readouterr().err
    assert words[0].strip("=") in err and one_line(err)


def test_an_empty_value_is_refused_by_evaluations(capsys):
    import eval_knn

    with pytest.raises(SystemExit) as stop:
        eval_knn.arguments(["runs/swav", "--data", ""])
    assert stop.value.code == 2 and "--data has an empty value" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["prototypes", "hidden", "width", "sizes"])
def test_memory_that_a_cpu_does_not_have_is_one_line(tmp_path, capsys, option):
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (24 << 30, limits[1]))
    try:
        size = 10**6 if option == "sizes" else 10**11
        assert swav_here(*SHARED, "--out", tmp_path, f"--{option}", size) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    err = capsys.readouterr().err
    assert "the memory is full: lower --batch-size" in err and "or give --checkpointing" in err
    assert one_line(err), err


@pytest.mark.parametrize(
    "variables",
    [
        dict(RANK="0"),
        dict(WORLD_SIZE="2"),
        dict(RANK="abc"),
        dict(RANK="3"),
        dict(LOCAL_RANK=""),
        dict(RANK=""),
        dict(LOCAL_WORLD_SIZE="0"),
        dict(RANK="5", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="1"),
        dict(TORCHELASTIC_RESTART_COUNT="x"),
        dict(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="x"),
    ],
)
def test_an_environment_that_describes_no_job_is_one_line(tmp_path, capsys, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert swav_here(*SHARED, "--out", tmp_path) == 2
    err = capsys.readouterr().err
    assert "describe no job" in err and one_line(err)


def test_images_that_are_all_alike_are_not_blamed_on_the_learning_rate(tmp_path, capsys, monkeypatch):
    shapes = type(data.open_images("shapes:40"))
    monkeypatch.setattr(shapes, "read", lambda self, i: Image.new("RGB", (32, 32), "red"))
    tiny = "--width 0.125 --sizes 16 --prototypes 8 --batch-size 16 --workers 0".split()
    assert run_here(sela, "--data", "shapes:40", *tiny, "--out", tmp_path) == 5
    assert "are all images alike, or is --lr too high?" in capsys.readouterr().err


def test_a_computer_without_linux_calls_runs(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "sched_getaffinity")
    exists = Path.exists
    monkeypatch.setattr(Path, "exists", lambda path: not str(path).startswith("/proc") and exists(path))
    assert swav_here(*SHARED, "--workers", -1, "--max-steps", 1, "--out", tmp_path) == 0


# ---- a checkpoint whose checksums agree and whose content is wrong

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(10**12), 10**12),
    st.floats(),
    st.text(max_size=5),
    st.just([]),
    st.just({}),
    st.just(torch.zeros(3)),
    st.just({"assignments": torch.zeros(1, 2)}),
)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    assert swav_here(*SHARED, *QUEUE, "--max-steps", 3, "--out", out) == 0
    return out, saved(out)


def goes_on_or_refuses(out, state):
    for path in out.glob("*checkpoint.pt"):
        path.unlink()
    checkpoint.write(out / "checkpoint.pt", state)
    return swav_here(*SHARED, *QUEUE, "--max-steps", 3, "--out", out)


@pytest.mark.parametrize(
    "state",
    [[], {}, {"step": -7}, {"step": 10**9}, {"step": 2.5}, {"format": 2}, {"bad": [64]}, {"memory": []}],
)
def test_a_checkpoint_of_other_content_is_one_line(stopped, capsys, state):
    out, good = stopped
    capsys.readouterr()
    assert goes_on_or_refuses(out, {**good, **state} if state else state) == 4
    err = capsys.readouterr().err
    assert "checkpoint.pt" in err and one_line(err)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.data())
def test_odd_checkpoints_never_show_a_traceback(stopped, draw):
    out, good = stopped
    state = dict(good)
    name = draw.draw(st.sampled_from(sorted(good)))
    inner = isinstance(good[name], dict) and draw.draw(st.booleans())
    if inner:
        state[name] = {**good[name], draw.draw(st.sampled_from(sorted(good[name], key=str))): draw.draw(ODD)}
    else:
        state[name] = draw.draw(ODD)
    assert goes_on_or_refuses(out, state) in (0, 2, 4)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.integers(0, 3))
def test_odd_logs_are_read(tmp_path_factory, noise, place):
    out = tmp_path_factory.mktemp("log")
    lines = [json.dumps({"step": step}).encode() + b"\n" for step in (1, 2, 3)]
    (out / "metrics.jsonl").write_bytes(b"".join([*lines[:place], noise, b"\n", *lines[place:]]))
    records = Log(out, 3).rewind(2)
    assert [record for record in records if record in ({"step": 1}, {"step": 2})] == [
        {"step": 1},
        {"step": 2},
    ]


VALUES = st.one_of(
    st.just(""),
    st.text(max_size=6),
    st.integers(-(10**30), 10**30).map(str),
    st.floats().map(str),
    st.sampled_from(["-1", "0", "1", "nan", "inf", "1e999", "--", "-", "=", "None", "0x10"]),
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.lists(
        st.tuples(
            st.sampled_from([f"--{name.replace('_', '-')}" for name in swav.Config.__dataclass_fields__]),
            VALUES,
        ),
        max_size=3,
    )
)
def test_odd_options_never_show_a_traceback(pairs):
    words = [word for pair in pairs for word in pair]
    try:
        options.check(options.parse(swav.Config, swav.RECIPES, "", words), 1)
    except (SystemExit, UserError) as error:
        assert getattr(error, "exit_code", None) == 2 or error.code in (0, 2)


# ---- found by a second look

def partly(full, pids, method):
    """The second worker is asked to stop as it starts, and the third cannot be started."""
    begin, begun = BaseProcess.start, []

    def start(process):
        begun.append(process)
        if len(begun) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        if len(begun) == 3 and full:
            raise OSError(24, "Too many open files")
        begin(process)
        pids.write_text(f"{pids.read_text()} {process.pid}")

    BaseProcess.start = start


@pytest.mark.parametrize("full", [False, True])
def test_a_run_ends_though_its_workers_were_not_all_started(tmp_path, full):
    pids = tmp_path / "pids"
    pids.write_text("")
    change = functools.partial(partly, full, pids)
    ((code, out, err),) = ranks_of(1, swav, *SHARED, "--workers", 3, "--out", tmp_path, change=change)
    assert (code, "stopped by a signal" in out) == ((3, False) if full else (0, True)), out + err
    assert ("Too many open files" in err) == full
    assert len(pids.read_text().split()) == (2 if full else 3)
    wait_for(lambda: not [pid for pid in pids.read_text().split() if Path(f"/proc/{pid}").exists()], 30)


def test_fresh_starts_over_where_the_first_try_did_not_get_that_far(tmp_path, monkeypatch):
    shared = [*SHARED, "--out", tmp_path, "--max-steps"]
    assert swav_here(*shared, 4) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    monkeypatch.setattr(os, "getppid", lambda: 1)  # another torchrun's
    assert swav_here(*shared, 1, "--fresh") == 0 and saved(tmp_path)["step"] == 1


@pytest.mark.parametrize("kind", [MemoryError, lambda: RuntimeError("[alloc_cpu.cpp] can't allocate memory")])
def test_short_memory_does_not_make_a_checkpoint_damaged(tmp_path, capsys, monkeypatch, kind):
    shared = [*SHARED, "--out", tmp_path, "--max-steps"]
    assert swav_here(*shared, 1) == 0 and swav_here(*shared, 2) == 0

    def refused(*arguments, **options):
        raise kind()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "load", refused)
        assert swav_here(*shared, 3) == 1 and "memory is full" in capsys.readouterr().err
    assert not (tmp_path / "damaged_checkpoint.pt").exists()
    assert swav_here(*shared, 3) == 0 and "resumed at step 2" in capsys.readouterr().out


def test_reasons_are_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(unreadable, "SECONDS", 0.2)
    images = data.open_images("shapes:10")
    monkeypatch.setattr(type(images), "read", lambda self, i: time.sleep(5))
    bad = unreadable.Unreadable(images, 5, tmp_path / "bad_images.txt", lambda write: write())
    began = time.monotonic()
    bad.add({3})
    assert time.monotonic() - began < 3 and "not tried again" in (tmp_path / "bad_images.txt").read_text()


def test_a_fault_of_our_own_in_a_cut_is_no_unreadable_image():
    images = data.open_images("shapes:10")

    def broken(image):
        raise NameError("of ours")

    with pytest.raises(NameError):
        multicrop.read_or_next(images, 3, broken)


def test_names_that_the_system_refuses_are_one_line(tmp_path, capsys):
    assert swav_here(*SHARED, "--init-from", "x" * 300, "--out", tmp_path) == 2
    err = capsys.readouterr().err
    assert "File name too long" in err and one_line(err)
