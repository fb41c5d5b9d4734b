"""What a user can cause: the kinds of error with their exit codes, and the one line that says so. Imports
nothing of ours."""

import atexit
import contextlib
import os
import pickle
import re
import sys
import time

import torch
import torch.distributed as dist


class UserError(ValueError):
    """What a user can cause. exit_code: see `launch`. speaks: whether this rank says it; None: rank 0."""

    speaks = None


class ArgumentError(UserError):
    """An option that cannot work. The message names the option, what was given and what is needed."""

    exit_code = 2


class JobError(ArgumentError):
    """The environment describes no job of several processes. Each process says so: it knows of no other."""

    speaks = True


class DataError(UserError):
    """Data that cannot be used. The message names the path, what was found and what is needed."""

    exit_code = 3


class WorkerError(DataError):
    """A loader worker of this rank has failed; the other ranks know nothing of it."""

    speaks = True


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message says which file and why."""

    exit_code = 4


class Damaged(CheckpointError):
    """A file that is not whole, or not what was written."""


class Diverged(UserError):
    """A loss, weights or features are not finite any more."""

    exit_code = 5


class Stopped(Exception):
    """Not an error: the run ends early, with everything saved."""


@contextlib.contextmanager
def border(kind, what):
    """Put it around code that reads foreign bytes (files, JSON, environment variables): whatever is raised
    there becomes one line, an error of `kind` that begins with `what`. A UserError passes."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):  # the memory of a GPU is never the fault of a file
        raise
    except Exception as error:  # each library raises its own kinds, and a damaged file raises any
        raise kind(f"{what}: {reason(error)}") from None


def out_of_memory(error):
    """Whether it says that there is not enough memory, of a GPU or else."""
    if isinstance(error, RuntimeError):
        return re.search("can't allocate memory|out of memory|overflow", str(error)) is not None
    return isinstance(error, MemoryError)


def reason(error):
    """Why something was refused, in one line."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise against weights_only=True
        return "it is not what torch.save writes"
    words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return words.splitlines()[0].removesuffix(": ")


def say(text):
    """Prints a line on rank 0. A full disk or a closed pipe behind the log is no reason to end a training."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def fail(message, code, speaks=None):
    """Ends this process with an exit code. One line says why, on rank 0 alone, or on those where `speaks` is
    true: for what other ranks do not know of. torchrun then ends those."""
    if speaks or (speaks is None and os.environ.get("RANK", "0") == "0"):
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # torchrun stops all ranks when the first one ends: let rank 0 speak
    sys.exit(code)


def open_streams():
    """Lets any text be printed wherever stdout and stderr go: to an ASCII terminal, a full disk, a pipe that
    nobody reads, or nowhere."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # closed by the shell: the next file would get it
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    atexit.register(_flush)


def _flush():
    """What cannot be written at the end is dropped; otherwise Python would exit with 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
