"""What several test files share: the golden numbers, and functions run by several processes."""

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import evaluations
import numpy as np
import torch
import torch.multiprocessing as mp
from PIL import Image

import swav
from common import distributed
from common.data import Loader
from common.engine.launch import launch
from common.engine.options import parse

GOLDEN = Path(__file__).parent / "golden"
ROOT = Path(__file__).parents[1]
# A server imports torch once and every rank is a fork of it, so starting some costs a fraction of a second.
mp.get_context("forkserver").set_forkserver_preload(["torch", "torchvision", "hypothesis", "pytest"])


def golden(name):
    """{name: tensor} of a file of numbers that the official implementations gave."""
    with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: torch.from_numpy(array) for key, array in arrays.items()}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(world_size, function, *args, timeout=300):
    """Runs function(*args), a function at the top level of its module, in world_size processes joined by
    gloo.

    Returns what each rank returned. An exception on any rank is raised here; so is a deadlock, after timeout
    seconds.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world_size, port, folder, function, args)
        group = mp.start_processes(_rank, arguments, world_size, join=False, start_method="forkserver")
        end = time.monotonic() + timeout
        while not group.join(timeout=1):
            if time.monotonic() > end:
                for process in group.processes:
                    process.kill()
                raise TimeoutError(f"{function.__name__} on {world_size} ranks took more than {timeout} s")
        return [pickle.loads(Path(folder, f"{rank}.pickle").read_bytes()) for rank in range(world_size)]


def _rank(rank, world_size, port, folder, function, args):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    distributed.start("cpu")
    Path(folder, f"{rank}.pickle").write_bytes(pickle.dumps(function(*args)))
    distributed.stop()


# ---- a method as a user starts it


def swav_here(*arguments):
    return run_here(swav, *arguments)


def run_here(method, *arguments):
    """Runs a method's script, a module, in this process; returns its exit code."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        launch(method.main, parse(method.Config, method.RECIPES, method.__doc__, [str(a) for a in arguments]))
        return 0
    except SystemExit as stop:
        return stop.code
    finally:  # the handlers hold the run, and the run holds its directory
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for loader in (thing for thing in gc.get_objects() if type(thing) is Loader):
            loader.close()  # else its workers and their files stay as long as this process
        gc.collect()


def ranks_of(count, method, *arguments, change=None):
    """Runs a method's script or an evaluation, a module, in processes joined by gloo.

    change: a function at the top level of its module, which may change the script before it runs.
    Returns exit code, output and errors of each rank.
    """
    return ranks(count, _script, method.__name__, arguments, change)


def _script(name, arguments, change):
    torch.set_num_threads(1)
    mp.set_start_method("fork", force=True)  # of loader workers, as when a user starts it
    method, out, err = importlib.import_module(name), io.StringIO(), io.StringIO()
    if change:
        change(method)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        run = evaluations.run_here if hasattr(method, "arguments") else run_here
        code = run(method, *arguments)
    atexit._run_exitfuncs()  # ends loader workers; multiprocessing would wait for them
    return code, out.getvalue(), err.getvalue()


def command(*arguments, ranks=0, script="swav.py"):
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks else []
    return [sys.executable, *torchrun, str(ROOT / script), *map(str, arguments)]


def start(*arguments, **options):
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(arguments, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            **options)


def finish(process):
    """Exit code, stdout and stderr."""
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def swav_ranks(ranks, *arguments):
    return finish(start(*command(*arguments, ranks=ranks)))


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def unreadable(out):
    """The images that bad_images.txt names, each with a reason."""
    lines = (out / "bad_images.txt").read_text().splitlines()
    assert all(reason for _, reason in (line.split("\t") for line in lines))
    return [line.split("\t")[0] for line in lines]


def losses(out):
    return [record["loss"] for record in metrics(out) if "loss" in record]


# A network and crops so small that a step takes milliseconds.
TINY = "--width 0.125 --hidden 16 --dim 8 --crops 4 --sizes 16 --scales 0.4 1 --prototypes 12".split()
TINY += "--batch-size 16 --lr 2 --warmup-epochs 0 --workers 0 --log-every 1".split()
QUEUE = "--queue-length 48 --queue-start-epoch 0 --freeze-prototypes-iters 3".split()


def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def children(pid):
    """Processes started by pid, oldest first; none if it ends meanwhile."""
    try:
        return sorted(int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                      for child in (task / "children").read_text().split())
    except (FileNotFoundError, ProcessLookupError):
        return []


def tree(pid):
    """The process and all that it and they started: torchrun, ranks, loader workers."""
    return [pid, *(below for child in children(pid) for below in tree(child))]


def kill_tree(pid):
    """kill -9 of the process and all below it; some may end by themselves meanwhile."""
    for process in tree(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def image_tree(root, classes=2, images=6, size=(70, 60), splits=("train", "val")):
    rng = np.random.default_rng(0)
    for split in splits:
        for c in range(classes):
            (root / split / f"n0{c}").mkdir(parents=True)
            for i in range(images):
                Image.fromarray(rng.integers(0, 255, (*size, 3),
                                             dtype=np.uint8)).save(root / split / f"n0{c}" / f"{i}.JPEG")
    return root


def killed_and_resumed(method, shared, out, kill="Run.log 8"):
    """Kills a run, starts it again, and holds what it ends with to a run never killed.

    kill: "OBJECT.FUNCTION N" of the script: it is killed when that has been called N times.
    Returns the step that the run was resumed at.
    """
    shared = [*shared, "--save-every", 0, "--workers", 1, "--out"]
    change = functools.partial(interrupt, signal.SIGKILL, *kill.split())
    process = mp.get_context("forkserver").Process(
        target=_script, args=(method.__name__, [*shared, out / "killed"], change))
    process.start()
    process.join(timeout=240)
    assert process.exitcode == -signal.SIGKILL and not (out / "killed" / "done.json").exists()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run_here(method, *shared, out / "killed") == 0 == run_here(method, *shared, out / "straight")
    a, b = saved(out / "straight"), saved(out / "killed")
    for part in ("model", "optimizer", "memory"):
        assert same(a[part], b[part]), part
    assert torch.equal(a["meter"]["assignments"], b["meter"]["assignments"])
    assert losses(out / "straight") == losses(out / "killed")
    steps = [record["step"] for record in metrics(out / "killed") if "loss" in record]
    assert steps == list(range(1, len(steps) + 1))
    (step,) = re.findall(r"resumed at step (\d+) of", said.getvalue())
    return int(step)


def interrupt(signal_number, place, count, method):
    """Changes a script: once place, its "OBJECT.FUNCTION", has been called count times, the signal comes to
    the process and its loader workers."""
    os.setpgrp()
    *path, name = place.split(".")
    owner, calls = functools.reduce(getattr, path, method), []
    real = getattr(owner, name)

    def counted(*arguments, **options):
        result = real(*arguments, **options)
        calls.append(0)
        if len(calls) == int(count):
            os.killpg(0, signal_number)
        return result

    setattr(owner, name, counted)


def two_ranks_as_one(method, shared, out):
    """Runs a method in float64 in one process and in two, and holds losses, weights and clusters of 20 steps
    to each other. Returns the two checkpoints."""
    shared = [*shared, "--precision", "float64", "--out"]
    assert run_here(method, *shared, out / "one") == 0
    assert [code for code, _, _ in ranks_of(2, method, *shared, out / "two")] == [0, 0]
    one, two = losses(out / "one"), losses(out / "two")
    assert len(one) == 20 == len(set(one))
    np.testing.assert_allclose(two, one, rtol=1e-9)
    a, b = saved(out / "one"), saved(out / "two")
    for name, weight in a["model"].items():
        torch.testing.assert_close(b["model"][name], weight, rtol=0, atol=1e-8, msg=name)
    assert torch.equal(a["meter"]["assignments"], b["meter"]["assignments"])
    return a, b
