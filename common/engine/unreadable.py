"""Counts the unreadable images of all ranks, lists them in a file, and ends a run that has too many."""

import threading

import torch

from .. import distributed
from .errors import DataError, reason, say
from .files import writing

SECONDS = 10  # limit of one search for reasons


class Unreadable:
    """Holds the unreadable images found so far, the same on every rank.

    limit: how many are tolerated; -1: one in a thousand, at least 10. path: bad_images.txt. write: calls a
    function that writes a file, on rank 0. Only rank 0 knows the reasons.
    """

    def __init__(self, images, limit, path, write):
        self.images, self.path, self.write, self.found, self.reasons = images, path, write, set(), {}
        self.limit = limit if limit >= 0 else max(10, len(images) // 1000)

    def add(self, found):
        """Adds indices that this rank has found. Warns of new ones. Raises DataError if they are too many."""
        new = torch.tensor(sorted(found - self.found), dtype=torch.int64)
        new = set(distributed.gather_rows(new).tolist()) - self.found
        if not new:
            return
        self.found |= new
        self.write(self._name)
        say(f"warning: {len(self.found)} images cannot be read and are replaced by their neighbours: "
            f"see {self.path}")
        if len(self.found) > self.limit:
            raise DataError(f"{len(self.found)} images cannot be read, more than --max-bad {self.limit}: "
                            f"{self.examples()}")

    def examples(self):
        return ", ".join(f"{self.images.paths[i]!r} ({self.reasons.get(i, 'not tried again')})"
                         for i in sorted(self.found)[:3])

    def _name(self):
        new = sorted(self.found - self.reasons.keys())
        self.reasons |= dict.fromkeys(new, "not tried again")
        # The error occurred in a worker. Read again for its reason, in a thread, since the read may hang.
        looking = threading.Thread(target=self._look, args=(new,), daemon=True)
        looking.start()
        looking.join(SECONDS)
        with writing(self.path, text=True) as file:
            file.writelines(f"{self.images.paths[i]}\t{self.reasons[i]}\n" for i in sorted(self.found))

    def _look(self, new):
        for i in new:
            try:
                self.images.read(i)
                self.reasons[i] = "it can be read now"
            except Exception as error:  # Pillow's plug-ins raise a dozen kinds for damaged files
                self.reasons[i] = reason(error)
