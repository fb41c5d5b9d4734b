"""Writes the files of a run directory. Each gets its name only once it is complete."""

import contextlib
import csv
import fcntl
import json
import os
import platform
from pathlib import Path

import numpy as np

from .errors import ArgumentError


@contextlib.contextmanager
def writing(path, text=False, sync=False, keep=None):
    """Opens a file to write, which gets the name `path` once it is complete. Until then, and if anything goes
    wrong, the old file stays as it was.

    text: a text file; paths that cannot be decoded may be written to it. sync: wait until it is on the disk.
    keep: new name for the old file.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    mode = dict(mode="w", newline="", errors="surrogateescape") if text else dict(mode="wb")
    try:
        with open(partial, **mode) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, keep)
        os.replace(partial, path)
        if sync:
            folder = os.open(path.parent, os.O_RDONLY)
            os.fsync(folder)  # so that the new names reach the disk, too
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, content):
    with writing(path, text=True) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def write_assignments(folder, table, images):
    """Writes assignments.npz and assignments.csv: the path of every image and its cluster in each head.
    table: (H, N) int32, -1 for an image not seen yet."""
    paths = np.frombuffer("\0".join(images.paths).encode(errors="surrogateescape"), np.uint8)
    with writing(folder / "assignments.npz") as file:
        np.savez_compressed(file, assignments=table.numpy(), paths=paths)
    with writing(folder / "assignments.csv", text=True) as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(f"head{h}" for h in range(len(table)))])
        writer.writerows([path, *column] for path, column in zip(images.paths, table.T.tolist()))


def _started_by():
    return f" on {platform.node()}, started by {os.getppid()}"


def same_parent(folder):
    """Tells whether the last owner of a run directory has the same parent process, and node, as this one."""
    lock = folder / "lock"
    return lock.exists() and lock.read_text().endswith(_started_by())


def claim(folder, fresh):
    """Locks a run directory for this process, and deletes incomplete files; fresh: also the former run's.

    Returns the lock, an open file. Raises ArgumentError if another run holds it, or if writing fails.
    """
    stale = "*.partial"
    if fresh:
        stale += " checkpoint.pt previous_checkpoint.pt damaged_checkpoint.pt backbone.pt backbone_*.pt"
        stale += " metrics.jsonl assignments.npz assignments.csv done.json bad_images.txt events.out.*"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / "lock", "a+")
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.seek(0)
            raise ArgumentError(f"--out {folder} is in use by another run ({lock.read()})") from None
        lock.truncate(0)
        lock.write(f"process {os.getpid()}{_started_by()}")
        lock.flush()
        for path in [path for pattern in stale.split() for path in folder.glob(pattern)]:
            path.unlink()
    except OSError as error:
        raise ArgumentError(f"--out {folder} cannot be written: {error.strerror}") from None
    return lock
