"""Measures what a large data set costs besides its images: an index of ImageNet's 1.28 million tar members or
files, and SwAV on an index of 100 million rows, which point at a few images.

    python -m benchmarks.scale                     # a quarter of an hour, 8 GB of disk in --folder

Private memory is not shared with other processes. A mapped index is in the node's page cache once for all.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import metrics, write
from common.data import open_images
from common.sources import packed

IMAGENET, CLASSES = 1_281_167, 1_000
CHILD = """import json, sys, time
from pathlib import Path
from common.data import open_images
from common.sources import files, tars  # not what is measured
def private():
    status = Path("/proc/self/status").read_text()
    return 1024 * sum(int(status.split(key)[1].split()[0]) for key in ("RssAnon:", "RssShmem:"))
before, began = private(), time.perf_counter()
images = open_images(sys.argv[1], index=sys.argv[2])
last = images.path(len(images) - 1)
print(json.dumps([time.perf_counter() - began, private() - before, len(images), len(images.classes)]))"""


def opened(spec, index=""):
    """Returns seconds and bytes of private memory that another process takes to open the images."""
    command = [sys.executable, "-c", CHILD, str(spec), str(index)]
    seconds, held, count, classes = json.loads(subprocess.check_output(command).splitlines()[-1])
    assert (count, classes) == (IMAGENET, CLASSES)
    return seconds, held


def names():
    for i in range(IMAGENET):
        name = f"n{i * CLASSES // IMAGENET:08d}"
        yield f"{name}/{name}_{i}.JPEG"


def million(folder):
    """Measures an index of ImageNet's size, over tar members of one block and over empty files."""
    tar = folder / "million.tar"
    with open(tar, "wb") as file:
        for name in names():
            member = tarfile.TarInfo(name)
            member.size = 1
            file.write(member.tobuf(tarfile.USTAR_FORMAT) + bytes(512))
        file.write(bytes(1024))
    first, second = opened(tar, folder / "index"), opened(tar, folder / "index")
    (index,) = (folder / "index").iterdir()
    figures = {"1.28 M members: index made, s": first[0], "1.28 M members: index found, s": second[0],
               "1.28 M members: bytes of the index an image": index.stat().st_size / IMAGENET,
               "1.28 M members: private bytes an image and process": second[1] / IMAGENET}
    tar.unlink()
    for name in names():
        (folder / "files" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "files" / name).touch()
    scanned = opened(folder / "files")
    with open(folder / "packed", "wb") as file:
        open_images(folder / "files").save(file)
    shutil.rmtree(folder / "files")
    return figures | {"1.28 M files: scanned, s": scanned[0],
                      "1.28 M files: private bytes an image, one process": scanned[1] / IMAGENET,
                      "1.28 M files: bytes an image and node, several": (folder / "packed").stat().st_size
                      / IMAGENET}


def tree(pid):
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *(below for child in children for below in tree(child))]


def resident(pid):
    """Returns bytes of a process and its workers: private, and mapped from files."""
    found = np.zeros(2)
    for process in tree(pid):
        status = Path(f"/proc/{process}/status").read_text()
        anon, shmem, file = (1024 * int(status.split(f"Rss{key}:")[1].split()[0])
                             for key in ("Anon", "Shmem", "File"))
        found += anon + shmem, file
    return found


def run(folder, images, steps):
    """Runs SwAV. Returns seconds until its report before the first step, steps/s, and resident bytes at the
    last log line: private, and of files."""
    out = folder / "run"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, "-u", "swav.py", "--data", folder / "few.tar", "--index", folder / f"{images}",
               "--recipe", "small", "--assignments", "off", "--device", "cpu", "--workers", "1",
               "--max-steps", f"{steps}", "--log-every", f"{steps // 5}", "--out", out]
    began, startup, held = time.perf_counter(), None, None
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("  memory"):
            startup = time.perf_counter() - began
        if line.startswith("epoch"):
            held = resident(process.pid) if process.poll() is None else held
    assert process.wait() == 0
    speed = statistics.median(record["images_per_s"] for record in metrics(out)[1:])
    return startup, speed / 32, *held


def synthetic(folder, images):
    """Writes an index of so many rows, which point at the few images of few.tar; returns its bytes."""
    few = open_images(folder / "few.tar")
    times = images // len(few)
    length = len(few._arrays["names"])
    arrays = {name: np.tile(array, times) for name, array in few._arrays.items() if name != "labels"}
    arrays["ends"] += np.repeat(np.arange(times) * length, len(few))
    about = {name: getattr(few, name) for name in few._about}
    (folder / f"{images}").mkdir()
    open_images(folder / "few.tar", index=folder / "named")
    (name,) = (path.name for path in (folder / "named").iterdir())
    with open(folder / f"{images}" / name, "wb") as file:
        packed.save(file, arrays, about)
    shutil.rmtree(folder / "named")
    return (folder / f"{images}" / name).stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="for indices and a million files (default: temporary)")
    parser.add_argument("--images", type=int, default=100_000_000, help="rows of the large index")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each; medians are reported")
    parser.add_argument("--steps", type=int, default=200, help="steps per run")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        figures = million(folder)
        shapes = open_images("shapes:100")
        with tarfile.open(folder / "few.tar", "w") as tar:
            for i in range(100):
                shapes.read(i).save(folder / f"{i:03d}.png")
                tar.add(folder / f"{i:03d}.png", f"{i:03d}.png")
        sizes = {"10 k": 10_000, f"{args.images / 1e6:g} M": args.images}
        for title, images in sizes.items():
            figures[f"{title}: bytes of the index an image"] = synthetic(folder, images) / images
        rounds = [{title: run(folder, images, args.steps) for title, images in sizes.items()}
                  for _ in range(args.rounds)]
    titles = ("start-up, s", "steps/s", "private MB of all processes", "MB of files they have mapped")
    for title in sizes:
        found = [statistics.median(column) for column in zip(*(row[title] for row in rounds))]
        figures |= {f"{title}: {what}": value / 1e6 ** ("MB" in what) for what, value in zip(titles, found)}
    small, large = sizes
    figures["large / small, steps/s"] = figures[f"{large}: steps/s"] / figures[f"{small}: steps/s"]
    write("scale", torch.device("cpu"), {"rounds": args.rounds, "steps": args.steps}, figures)


if __name__ == "__main__":
    main()
