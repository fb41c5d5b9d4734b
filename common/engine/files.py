"""Files of a run directory: each takes its name once it is whole."""

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
    """A file to write. It takes the name `path` once it is whole; until then, and if anything goes wrong, the
    file that was there stays as it is.

    text: a text file, in which undecodable paths may be written. sync: wait until it is on the disk. keep:
    the name that the file that was there gets.
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
            os.fsync(folder)  # the new names themselves reach the disk
            os.close(folder)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, content):
    with writing(path, text=True) as file:
        file.write(json.dumps(content, indent=1) + "\n")


def write_assignments(folder, table, images):
    """Writes the cluster of every image in each head, table (H, N), -1 if not seen yet: assignments.npz and
    assignments.csv, both with the paths."""
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
    """Whether the process that had a run directory last was started by the process that started this one."""
    lock = folder / "lock"
    return lock.exists() and lock.read_text().endswith(_started_by())


def claim(folder, fresh):
    """Makes a run directory this process's own; returns the lock, an open file. fresh: empties it.

    Raises ArgumentError if another run has it, or if it cannot be written.
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
