"""How a script starts and ends: the device, the checks, the exit codes."""

import os
import warnings
from pathlib import Path

import torch

from .. import distributed
from . import options
from .errors import Stopped, fail, say


def launch(main, config):
    """Runs main(config) and turns what a user can cause into one line and an exit code: 2 arguments, 3 data,
    4 checkpoint, 5 diverged; 0 for a finished or politely stopped run."""
    try:
        main(config)
    except Stopped as reason:
        say(reason)
    except ValueError as error:
        if not hasattr(error, "exit_code"):
            raise
        fail(error, error.exit_code)
    except KeyboardInterrupt:  # before the run has begun to listen
        fail("interrupted", 130)
    except torch.OutOfMemoryError as error:
        fail(f"the GPU's memory is full: lower --batch-size, --sizes or --prototypes "
             f"({str(error).splitlines()[0]})", 1, speaks=True)
    except RuntimeError as error:
        cause = (str(error).splitlines() or [""])[0]
        if "use_deterministic_algorithms" in str(error):
            fail(f"--deterministic cannot be kept: {cause}", 2)
        # raised wherever this process was when its worker ended; no other rank knows
        if "DataLoader worker (pid" in cause:
            fail(f"a loader worker died, out of memory? lower --workers, or enlarge /dev/shm ({cause})", 3,
                 speaks=True)
        if "Connection closed by peer" in cause or "Connection reset by peer" in cause:
            fail("another process of this run has ended: its own message says why", 1, speaks=True)
        raise
    distributed.stop()


def start(config):
    """Joins the other processes, checks the options that all methods share and seeds the weights; returns the
    device."""
    device = distributed.start(config.device)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # of ours, without file and line
    options.check(config, distributed.world_size())
    repeatable(config.deterministic)
    torch.manual_seed(config.seed)
    return device


def repeatable(wanted):
    """What --deterministic means: the same bits each time on a GPU too; an operation that cannot raises
    RuntimeError."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted


def autocast_dtype(precision, device):
    """The dtype that --precision means: "auto" is bfloat16 where the hardware multiplies it fast, else
    float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        fast = "avx512_bf16" in cpu or "amx_bf16" in cpu
    return torch.bfloat16 if fast else torch.float32
