"""Shared by all benchmarks: medians over alternating rounds, and a result file that says where it was
made."""

import itertools
import json
import os
import platform
import statistics
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from common.engine.options import differences

RESULTS = Path(os.environ.get("OUT") or Path(__file__).parent / "results")


def medians(rounds, **contenders):
    """Returns {name: median of what contender() returns}. Contenders take turns, so that a slow minute of the
    machine hits them all."""
    values = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, contender in contenders.items():
            values[name].append(contender())
    return {name: statistics.median(found) for name, found in values.items()}


def finished(config, folder):
    """Returns whether a folder has a finished run with the options of config. Exits if it was made with other
    options."""
    if not (folder / "done.json").exists():
        return False
    # fill in options that an older run did not have
    saved = {**asdict(type(config)()), **json.loads((folder / "config.json").read_text())}
    images = {key: (getattr(config, key), saved[key]) for key in ("data", "root", "val")}  # "" is "shapes"
    changed = [f"--{key} {new} (saved {old})" for key, (new, old) in images.items()
               if (new or "shapes") != (old or "shapes")]
    changed += differences(config, saved)
    if changed:
        sys.exit(f"error: {folder} was made with other options: {', '.join(changed)}; take another --out, or "
                 f"delete it")
    return True


def metrics(folder):
    """Returns what a run logged, one dict per line."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curve_of(folder):
    """Returns [(epoch, 20-NN accuracy)] as the run measured it during training."""
    return [(record["epoch"], record["knn_top1"]) for record in metrics(folder) if "knn_top1" in record]


def last_loss(folder):
    """Returns loss / ln K of the last epoch: the mean of its records, weighted by the steps that each
    covers."""
    logged = [record for record in metrics(folder) if "loss_per_ln_k" in record]
    steps = [after["step"] - before["step"] for before, after in itertools.pairwise([{"step": 0}, *logged])]
    last = [(record["loss_per_ln_k"], n) for record, n in zip(logged, steps)
            if record["epoch"] > logged[-1]["epoch"] - 1]
    return sum(loss * n for loss, n in last) / sum(n for _, n in last)


def resident(which="VmHWM"):
    """Returns the peak size of this process in bytes, or with which="VmRSS" its current size."""
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{which}:")[1].split()[0])


def machine(device):
    """Describes the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(os.sched_getaffinity(0))} cores"


def computing():
    """Returns what rounding depends on."""
    return {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability(),
            "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA", "all of the CPU's"),
            "bfloat16": "avx512_bf16" in Path("/proc/cpuinfo").read_text()}


def versions():
    """Returns {package: version} of what the figures may depend on; None if it is not installed."""
    found = {"python": platform.python_version()}
    for package in ("torch", "torchvision", "pillow", "lightly"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def command(words):
    """Returns the command line `python -m ...`, with files and folders by their last name."""
    return " ".join(["python", "-m", *(Path(word).name if os.path.isabs(word) or os.path.exists(word)
                                       else str(word) for word in words)])


def origin(name, device):
    """Returns what every result file begins with: machine, versions, and the command that started this
    program."""
    return {"machine": machine(device), "computing": computing(), "versions": versions(),
            "command": command([f"benchmarks.{name}", *sys.argv[1:]])}


def show(figures):
    for key, value in figures.items():
        print(f"{key:44}", *(f"{v:10.4g}" for v in np.atleast_1d(value)))


def rounded(value):
    return value if isinstance(value, int) else float(f"{value:.4g}")


def write(name, device, settings, figures, file=""):
    """Prints the figures, each a number or a list with one per seed, and writes them to
    results/NAME_DEVICE.json with versions, machine, command and settings. file: replaces NAME in the file's
    name, if given."""
    record = {**origin(name, device), "settings": settings, "figures": {
        key: [rounded(v) for v in value] if isinstance(value, list) else rounded(value)
        for key, value in figures.items()}}
    show(record["figures"])
    slug = device.type if device.type == "cpu" else machine(device).lower().replace(" ", "_")
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{file or name}_{slug}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {path}")
