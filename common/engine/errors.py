"""What a user can cause: the kinds of error with their exit codes, and the one line that says so. Imports
nothing of ours."""

import os
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
