"""Defines the errors that a user can cause, with their exit codes, and prints each as one line. Imports no
other module of the project."""

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
    """An error of the user's. exit_code: see `launch`. speaks: whether this rank prints it; None: rank 0."""

    speaks = None


class ArgumentError(UserError):
    """An option that cannot work. The message names the option, what was given and what is needed."""

    exit_code = 2


class JobError(ArgumentError):
    """The environment describes no valid group of processes. Each process prints it: it knows no other."""

    speaks = True


class DataError(UserError):
    """Data that cannot be used. The message names the path, what was found and what is needed."""

    exit_code = 3


class WorkerError(DataError):
    """A loader worker of this rank has failed. This rank prints it: the others do not know of it."""

    speaks = True


class CheckpointError(UserError):
    """A checkpoint that cannot be used. The message says which file and why."""

    exit_code = 4


class Damaged(CheckpointError):
    """A checkpoint file that is incomplete or has changed since it was written."""


class Diverged(UserError):
    """A loss, a weight or a feature is no longer finite."""

    exit_code = 5


class Stopped(Exception):
    """Ends a run early, with everything saved. It is not an error."""


@contextlib.contextmanager
def border(kind, what):
    """Wraps code that reads external input (files, JSON, environment variables). Any exception becomes an
    error of class `kind`, in one line that begins with `what`. A UserError passes unchanged."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):  # no file is to blame for a full GPU
        raise
    except Exception as error:  # libraries raise their own kinds, and a damaged file may raise any
        raise kind(f"{what}: {reason(error)}") from None


def out_of_memory(error):
    """Tells whether an exception means that memory is full, a GPU's or the computer's."""
    if isinstance(error, RuntimeError):
        return re.search("can't allocate memory|out of memory|overflow", str(error)) is not None
    return isinstance(error, MemoryError)


def reason(error):
    """Returns in one line what an exception says."""
    if isinstance(error, pickle.UnpicklingError):  # torch advises to load without weights_only
        return "it is not what torch.save writes"
    words = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
    return words.splitlines()[0].removesuffix(": ")


def say(text):
    """Prints a line on rank 0. Ignores write errors: a full disk or a closed pipe must not end a training."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        with contextlib.suppress(OSError):
            print(text, flush=True)


def fail(message, code, speaks=None):
    """Ends this process with an exit code. Prints why in one line: only on rank 0, or where `speaks` is true,
    for an error that other ranks do not know of. torchrun then ends the other ranks."""
    if speaks or (speaks is None and os.environ.get("RANK", "0") == "0"):
        with contextlib.suppress(OSError):
            print(f"error: {message}", file=sys.stderr, flush=True)
    else:
        time.sleep(2)  # torchrun stops all ranks when the first one ends: let rank 0 speak
    sys.exit(code)


def open_streams():
    """Makes it safe to print any text wherever stdout and stderr go: an ASCII terminal, a full disk, a pipe
    that nobody reads, or nowhere."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # fills closed 0 to 2: a later file would get it
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
        if hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")
    atexit.register(_flush)


def _flush():
    """Drops output that cannot be written at exit. Otherwise Python would exit with code 120."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
