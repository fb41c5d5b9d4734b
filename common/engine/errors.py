"""What a user can cause: the kinds of error with their exit codes, and the one line that says so. Imports
nothing of ours."""

import contextlib
import os
import pickle
import sys
import time

import torch.distributed as dist


class ArgumentError(ValueError):
    """An option that cannot work. The message names the option, what was given and what is needed."""

    exit_code = 2


class DataError(ValueError):
    """Data that cannot be used. The message names the path, what was found and what is needed."""

    exit_code = 3


class CheckpointError(ValueError):
    """A checkpoint that cannot be used. The message says which file and why."""

    exit_code = 4


class Damaged(CheckpointError):
    """A file that is not whole, or not what was written."""


class Diverged(ValueError):
    """The loss is not finite any more."""

    exit_code = 5


class Stopped(Exception):
    """Not an error: the run ends early, with everything saved."""


@contextlib.contextmanager
def border(kind, what):
    """Put it around code that reads foreign bytes (files, JSON, environment variables): whatever is raised
    there becomes one line, an error of `kind` that begins with `what`. An error with an exit code passes."""
    try:
        yield
    except Exception as error:  # each library raises its own kinds, and a damaged file raises any
        if hasattr(error, "exit_code"):
            raise
        raise kind(f"{what}: {reason(error)}") from None


def reason(error):
    """Why something was refused, in one line."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise against weights_only=True
        return "it is not what torch.save writes"
    line = (str(error).splitlines() or [""])[0]
    return getattr(error, "strerror", None) or (f"{type(error).__name__}: {line}" if line else type(error).__name__)


def say(text):
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            print(text, flush=True)
        except OSError:  # a full disk or a closed pipe behind the log: no reason to end a training
            pass


def fail(message, code, speaks=None):
    """Ends this process with an exit code. One line says why, on rank 0 alone, or on those where `speaks` is
    true: for what other ranks do not know of. torchrun then ends those."""
    if speaks or (speaks is None and int(os.environ.get("RANK", 0)) == 0):
        print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # torchrun stops all ranks when the first one ends: let rank 0 speak
    sys.exit(code)
