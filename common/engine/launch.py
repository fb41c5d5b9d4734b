"""Starts and ends a script: device, option checks, seeds, images, network on the device, exit codes."""

import os
import warnings
from pathlib import Path

import torch

from .. import batchnorm, data, distributed
from ..resnet import ResNet
from . import options
from .errors import ArgumentError, DataError, Stopped, UserError, fail, out_of_memory, say


def launch(main, config):
    """Runs main(config). Turns an error that a user can cause into one line and an exit code: 2 arguments, 3
    data, 4 checkpoint, 5 diverged. A run that finished, or saved and stopped, exits with 0."""
    try:
        main(config)
    except Stopped as reason:
        say(reason)
    except UserError as error:
        fail(error, error.exit_code, error.speaks)
    except KeyboardInterrupt:  # before Run handles the signals
        fail("interrupted", 130)
    except OSError as error:
        if error.filename is None:
            raise
        fail(f"{error.filename!r:.300}: {error.strerror}", 2, speaks=True)
    except (MemoryError, RuntimeError) as error:
        cause = (str(error).splitlines() or [""])[0]
        if out_of_memory(error):
            whose = "the GPU's" if isinstance(error, torch.OutOfMemoryError) else "the"
            fail(f"{whose} memory is full: lower --batch-size or the sizes of images and network, or give "
                 f"--checkpointing ({cause})", 1, speaks=True)
        if "use_deterministic_algorithms" in str(error):
            fail(f"--deterministic cannot be kept, --no-deterministic goes on without: {cause}", 2)
        # A worker's death is raised wherever this process is at that moment; other ranks do not know of it.
        if "DataLoader worker (pid" in cause:
            fail(f"a loader worker died, out of memory? lower --workers, or enlarge /dev/shm ({cause})", 3,
                 speaks=True)
        if "Connection closed by peer" in cause or "Connection reset by peer" in cause:
            fail("another process of this run has ended: its own message says why", 1, speaks=True)
        raise
    distributed.stop()


def setup(config):
    """Joins the other processes, checks the shared options, seeds the weights and opens the images. Call it
    first. Returns device and images.

    Raises ArgumentError for options that cannot work, DataError if there are fewer images than one batch.
    """
    device = distributed.start(config.device)
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"  # without file and line
    options.check(config, distributed.world_size())
    repeatable(config.deterministic)
    torch.manual_seed(config.seed)
    images = distributed.from_first(data.open_images, config.data or "shapes", "train", config.root,
                                    config.index or config.out, config.range, config.exif)
    if any(distributed.any_rank(images.fingerprint != distributed.from_main(getattr, images, "fingerprint"))):
        raise DataError(f"the nodes do not hold the same images of {config.data or 'shapes'}")
    if len(images) < config.batch_size:
        few = f"--data has {len(images)} images, fewer than one batch"
        raise DataError(f"{few}: --batch-size {config.batch_size}")
    return device, images


def own_trunk(config, device):
    """Returns the trunk that --arch package.module:function makes, on the device; None for a built-in --arch.

    Raises ArgumentError unless it maps images of every size in the run to (B, feature_dim).
    """
    if not data.OWN.fullmatch(config.arch):
        return None
    from ..sources import own

    trunk = own.trunk(config.arch, config.width, config.stem).to(device)
    own.check(trunk, config.arch, sorted({*config.sizes, config.eval_size or config.sizes[0]}), device)
    if getattr(config, "sobel", False):
        config.sobel = False
        say(f"--arch {config.arch} sees the images' colours: --sobel is for built-in trunks only")
    return trunk.train()


def prepare(model, config, device):
    """Moves the model to the device, channels last. Compiles its trunk or checkpoints its activations, if the
    options say so. Returns the network to train: the model, on several ranks in DistributedDataParallel.

    Call it before making the optimizer. By then weights that no loss trains must have requires_grad_(False).
    Gradients are averaged over ranks, so the mean of the ranks' losses must be the loss of the whole batch.
    """
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    model.to(device, dtype, memory_format=torch.channels_last)
    if config.checkpointing:
        if config.compile or not isinstance(model.backbone, ResNet):
            raise ArgumentError(f"--checkpointing needs a ResNet without --compile: --arch {config.arch}"
                                + " --compile" * config.compile)
        model.backbone.checkpointing = True
    if config.compile:
        model.backbone.compile(dynamic=False)  # once per resolution
    return batchnorm.parallel(model)


def report(run, published, assigned, temporary=0):
    """Prints what is about to run, and warns of settings that will not work.

    published: the recipe before the command line changed it. assigned: number of rows that are assigned to
    clusters together (batch + queue, or the data set). temporary: bytes per image held while they are.
    """
    c, n, k, ranks = run.config, len(run.images), run.config.prototypes, distributed.world_size()
    named = run.images.labels is not None
    labels = f"{len(run.images.classes)} classes (used to evaluate only)" if named else "no labels"
    crops = " + ".join(f"{v}x{s} px" for v, s in zip(c.crops, c.sizes))
    dtype = str(autocast_dtype(c.precision, run.device)).removeprefix("torch.")
    millions = sum(p.numel() for p in run.model.parameters()) / 1e6
    changed = (c.lr, c.batch_size) != (published.lr, published.batch_size)
    base = f" ({published.lr:g} at the recipe's batch {published.batch_size})" if changed else ""
    held = held_bytes(run, temporary)
    say(f"{run.method}, recipe {c.recipe}, in {run.out}")
    say(f"  data     {n} images of {c.data or 'shapes'}, {labels}; crops {crops}")
    say(f"  model    {c.arch} x{c.width:g}, {c.stem} stem, {millions:.2f} M parameters; "
        f"{dtype} on {ranks} x {run.device.type}")
    say(f"  steps    {run.steps_per_epoch} per epoch, {c.epochs} epochs, {run.total} in all; "
        f"batch {c.batch_size}, lr {c.lr:g}{base}")
    say(f"  balance  K {k}: {n / k:.3g} images and {assigned / k:.3g} assigned rows per cluster")
    say(f"  memory   {held / n:.0f} bytes per image, {held / 2**20:.3g} MiB on each rank beside the model"
        + "; no image's cluster is kept: --assignments on keeps them" * (not run.kept))
    if k > assigned:
        say(f"warning: --prototypes {k} are more than the {assigned} rows (batch + queue) that share them: "
            f"take at most {assigned}")
    if n / k < 10:
        say(f"warning: --prototypes {k} means {n / k:.1f} images per cluster: take at most {max(2, n // 10)}")
    if not published.batch_size / 4 <= c.batch_size <= published.batch_size * 4:
        say(f"warning: --batch-size {c.batch_size} is far from the recipe's {published.batch_size}: "
            "--lr and --prototypes may need tuning")
    frozen = getattr(c, "freeze_prototypes_iters", 0)
    if frozen >= run.total:
        say(f"warning: --freeze-prototypes-iters {frozen} of {run.total} steps: prototypes stay untrained, "
            f"take at most {run.steps_per_epoch}")


def held_bytes(run, temporary):
    """Counts the bytes that the method's memory and the log hold on this rank. temporary: as in `report`."""
    tensors = [x for part in (run.memory, run.meter) if part is not None for x in vars(part).values()]
    return (sum(x.nbytes for x in tensors if hasattr(x, "nbytes"))
            + temporary * len(run.images) // distributed.world_size())


def repeatable(wanted):
    """Applies --deterministic: the same bits on GPUs too. Non-deterministic operations raise RuntimeError."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = not wanted


def autocast_dtype(precision, device):
    """Returns the dtype that --precision means. "auto": bfloat16 where it is fast, else float32."""
    if precision != "auto":
        return getattr(torch, precision)
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        fast = "avx512_bf16" in cpu or "amx_bf16" in cpu
    return torch.bfloat16 if fast else torch.float32
