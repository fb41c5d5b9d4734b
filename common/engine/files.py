"""Files that take their name once they are whole."""

import contextlib
import os
from pathlib import Path


@contextlib.contextmanager
def writing(path, text=False, sync=False, keep=None):
    """A file to write. It takes the name `path` once it is whole; until then, and if anything goes wrong, the
    file that was there stays as it is. text: a text file, in which undecodable paths may be written. sync:
    wait until it is on the disk.
    keep: the name that the file that was there gets."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", newline="", errors="surrogateescape") if text else open(partial,
                                                                                        "wb") as file:
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
