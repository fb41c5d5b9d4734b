"""Saves how far a training evaluation has come, so that the same command resumes."""

import hashlib
import time

from .. import distributed
from ..engine import checkpoint
from ..engine.errors import CheckpointError, Stopped, border, say
from ..engine.stops import Stops

END = object()


class Progress:
    """Owns the file FOLDER/NAME_WHAT_progress.pt, written at a stop signal and every --save-every minutes.

    what: {name: value} of all that decides the result; other values use another file. state: what the same
    command saved, or None. Training loops take batches from `steps`, evaluations from `fetch`, on all ranks
    equally often; what yields the batches must not run collectives. keep: set by the caller, a function that
    returns the state to save: tensors and plain values, equal on all ranks.
    """

    def __init__(self, folder, name, what, minutes, fresh):
        digest = hashlib.sha256(repr(sorted(what.items())).encode()).hexdigest()[:8]
        self.path, self.minutes = folder / f"{name}_{digest}_progress.pt", minutes
        self.stops, self.saved_at, self.trouble = Stops(), time.monotonic(), None
        self.keep, self.number = None, 0
        restarted = distributed.restarts() > 0  # by torchrun, which repeats the command with --fresh
        self.state = None if fresh and not restarted else distributed.from_main(self._read)

    def _read(self):
        with border(CheckpointError, f"{self.path} cannot be used, --fresh starts over"):
            saved = checkpoint.newest(self.path, {"format": 1})
            if saved is not None:
                say(f"going on from {self.path}")
                return saved["state"]

    def steps(self, batches, first):
        """Yields (number, batch) from the number `first` on; before each step it may save and stop."""
        source, self.number = iter(batches), first
        while (batch := self.fetch(source, END)) is not END:
            yield self.number, batch
            self.number += 1

    def fetch(self, source, *end):
        """Returns next(source, *end). Saves before, if due; after a stop signal saves and raises Stopped."""
        batch = self.stops.wait(next, source, *end)
        due = distributed.rank() == 0 and time.monotonic() - self.saved_at >= 60 * self.minutes
        stop, due = distributed.any_rank(self.stops.count > 0, due)
        if stop or due:
            self.save()
        if stop:
            if self.trouble:
                raise CheckpointError(f"{self.path} cannot be written: {self.trouble}; what was done is lost")
            raise Stopped(f"stopped by a signal: saved in {self.path}, the same command goes on from there, "
                          "without --fresh")
        return batch

    def save(self):
        state = self.keep()  # called on every rank, as it may gather
        self.trouble = self.write(checkpoint.save, self.path, {"format": 1, "state": state})
        self.saved_at = time.monotonic()

    def write(self, write, path, *what):
        """Calls write(path, *what) on rank 0. If that fails, warns and returns the reason, else None."""
        trouble = distributed.from_main(self._write, write, path, *what)
        if trouble and trouble != self.trouble:
            say(f"warning: {path} cannot be written: {trouble}")
        return trouble

    def _write(self, write, path, *what):
        try:
            write(path, *what)
        except OSError as error:
            return error.strerror or str(error)
        return None

    def keep_result(self, write, path, *what):
        """Writes the trained classifier. If that fails, `finish` keeps the progress file."""
        self.trouble = self.write(write, path, *what)
        if not self.trouble:
            say(f"classifier: {path}")

    def finish(self):
        """Removes the progress file, unless the trained classifier could not be written."""
        if self.trouble:
            return
        if distributed.rank() == 0:
            for path in (self.path, checkpoint.previous_path(self.path)):
                path.unlink(missing_ok=True)
