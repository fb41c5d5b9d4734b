"""Stores arrays in one file. The processes of a node memory-map it, so it is in memory only once."""

import json

import numpy as np

from ..engine.errors import DataError, border

MAGIC, ALIGNED = b"packed-1", 64


def save(file, arrays, about):
    """Writes arrays, {name: (n,)}, and about, a dict that JSON can hold, to an open file."""
    places, end = {}, 0
    for name, array in arrays.items():
        places[name] = [array.dtype.str, len(array), end]
        end += -(-array.nbytes // ALIGNED) * ALIGNED
    header = json.dumps({"arrays": places, "bytes": end, "about": about}).encode()
    header += b" " * (-(len(header) + 16) % ALIGNED)
    file.write(MAGIC + len(header).to_bytes(8, "little") + header)
    for array in arrays.values():
        file.write(np.ascontiguousarray(array).data)
        file.write(bytes(-array.nbytes % ALIGNED))
    file.flush()


def mapped(path):
    """Memory-maps the (arrays, about) that `save` wrote. Processes share the pages that they read. What is
    written into an array stays in this process. Raises DataError if it is no such file, or incomplete."""
    with border(DataError, f"{path} is not an index of images, or damaged: delete it"):
        with open(path, "rb") as file:
            if file.read(8) != MAGIC:
                raise ValueError("it begins with other bytes")
            length = int.from_bytes(file.read(8), "little")
            content = json.loads(file.read(length))
            start = 16 + length
            if file.seek(0, 2) != start + content["bytes"]:
                raise ValueError("it is not whole")
        whole = np.asarray(np.memmap(path, np.uint8, "c", start, (content["bytes"],)))
        return {name: whole[place:].view(dtype)[:n] if n else np.empty(0, dtype)
                for name, (dtype, n, place) in content["arrays"].items()}, content["about"]
