"""Shared by the evaluations that train on labelled pixels or boxes: checks, training loop, picture sheet."""

import functools
import math
import time
from datetime import timedelta

import numpy as np
import torch
from PIL import Image

from .. import data, distributed
from ..engine.errors import ArgumentError, DataError, Diverged, say
from ..engine.files import writing
from ..engine.launch import autocast_dtype
from ..multicrop import MEAN, STD
from ..resnet import ResNet
from . import protocol

LOG_EVERY = 50  # iterations


def check(args, p, drawn):
    """Raises ArgumentError for options that cannot work. drawn: the images are drawn, so need no --data."""
    protocol.need(p.batch_size >= 2, p, "batch_size", "two images per step or more are needed")
    protocol.need(0 < p.lr < math.inf, p, "lr", "more than 0 is needed")
    fine = args.iterations is None or args.iterations >= 1
    protocol.need(fine, args, "iterations", "one or more is needed")
    protocol.need(0 <= args.seed < 1 << 32, args, "seed", f"0 to {(1 << 32) - 1} is needed")
    if p.batch_size % (ranks := distributed.world_size()):
        raise ArgumentError(f"--batch-size {p.batch_size} is not divisible by the {ranks} processes")
    if not drawn and not args.data:
        raise ArgumentError(f"--data is needed: the folder of {args.preset}")


def magnified(trunk, args):
    """Returns the factor by which preset `small` enlarges images for this trunk: 4 if the stem has stride 4.

    Raises ArgumentError for a trunk that is no ResNet, or one with a small stem in a full-size preset.
    """
    if not isinstance(trunk, ResNet):
        raise ArgumentError(f"{args.trunk} is no ResNet of common/resnet.py "
                            f"({type(trunk).__name__}), whose stages are needed")
    small_stem = trunk.conv1.stride == (1, 1)
    if small_stem and args.preset != "small":
        raise ArgumentError(f"{args.trunk} has a small stem: --preset {args.preset} needs one of stride 4, "
                            "--preset small takes it")
    return 1 if small_stem or args.preset != "small" else 4


def iterations(loader, n, batch_size, seed, first, last, order=lambda epoch: None):
    """Yields the batches of iterations first .. last - 1 of a data.Loader over n images. Iterations go
    through the images pass by pass, so (seed, iteration) alone decide a batch and what is drawn for it.
    order(epoch): the order of images in a pass, instead of data.batches's own.

    Raises DataError if there are fewer images than one batch.
    """
    if n < batch_size:
        raise DataError(f"--data has {n} images, fewer than one batch: --batch-size {batch_size}")
    while first < last:
        epoch, step = divmod(first, n // batch_size)
        batches = data.batches(n, batch_size, epoch, seed, order=order(epoch))
        for batch in loader.epoch(epoch, batches, step):
            yield batch
            first += 1
            if first == last:
                return


def train(model, optimizer, batches, loss_of, rate, iterations, loader, progress):
    """Trains the model, from progress.state if there is one. Returns the mean loss that the last log line
    shows.

    batches(first): yields the batches from iteration `first` to the last. loss_of(step, batch): the loss
    whose gradients DistributedDataParallel averages over ranks. rate(step): the learning rate.
    Raises Diverged for a loss that is not finite.
    """
    device = next(model.parameters()).device
    total, mean_loss = torch.zeros((), device=device, dtype=torch.float64), None
    if progress.state:
        model.load_state_dict(progress.state["model"])
        optimizer.load_state_dict(progress.state["optimizer"])
        total += progress.state["total"] if distributed.rank() == 0 else 0.0
        progress.number, mean_loss = progress.state["step"], progress.state["loss"]
    progress.keep = lambda: {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                             "step": progress.number, "loss": mean_loss,
                             "total": float(distributed.all_sum(total))}
    first, started = progress.number, time.perf_counter()
    model.train()
    for step, batch in progress.steps(batches(first), first):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        loss = loss_of(step, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
        if (done := step + 1) % LOG_EVERY == 0 or done == iterations:
            since = (done - 1) % LOG_EVERY + 1
            mean_loss = float(distributed.all_sum(total)) / distributed.world_size() / since
            total.zero_()
            protocol.check_readable(loader)
            if not math.isfinite(mean_loss):
                raise Diverged("the loss is not finite: lower --lr")
            left = (time.perf_counter() - started) / (done - first) * (iterations - done)
            say(f"iteration {done}/{iterations} loss {mean_loss:.4f} lr {rate(step):.3g} "
                f"left {timedelta(seconds=int(left))}")
    return mean_loss


def poly(step, steps, base_lr, final_lr=1e-4, power=0.9):
    """Returns the learning rate of a step, counted from 0. It falls from base_lr to final_lr, or stays at
    base_lr if that is lower; step `steps` would have final_lr."""
    final_lr = min(final_lr, base_lr)
    return (base_lr - final_lr) * (1 - step / steps) ** power + final_lr


def normalised(pixels, mean, std, dtype):
    """Normalises (B, 3, H, W) uint8 as in the trunk's training: to dtype, channels last."""
    mean, std = (_constant(tuple(values), pixels.device, dtype) for values in (mean, std))  # (3, 1, 1)
    return ((pixels.to(dtype) / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


@functools.cache
def _constant(values, device, dtype):
    return torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1)  # cached: copied to the device once


def setting(args, info, device, trunk, name, images, queries):
    """Seeds torch for training. Returns how images are read and computed on, what decides the result, the
    folder for the files, and the base of their names, which --random-init changes."""
    how = dict(device=device, mean=info.get("mean", MEAN), std=info.get("std", STD), workers=args.workers,
               precision=autocast_dtype(args.precision, device))
    decisive = protocol.decisive(args, trunk, precision=how["precision"], data=images.fingerprint,
                                 val=queries.fingerprint)
    torch.manual_seed(args.seed)
    return how, decisive, protocol.folder(args, name, decisive), f"{name}{'_random' * args.random_init}"


def colours(labels):
    """Maps labels to VOC's colours: (H, W) uint8 -> (H, W, 3) uint8; 0 is black, 255 nearly white."""
    palette = np.zeros((256, 3), np.uint8)
    for place in range(3):  # bits 0, 3, 6 of the label are the highest bits of red; 1, 4, 7 of green ...
        bits = np.arange(256)[:, None] >> 3 * place + np.arange(3) & 1  # (256, 3)
        palette |= (bits << 7 - place).astype(np.uint8)
    return palette[labels]


def write_sheet(path, rows, height=192):
    """Writes rows of pictures [[(H, W, 3) uint8]] as one PNG, each picture `height` pixels high."""
    rows = [[Image.fromarray(cell) for cell in row] for row in rows or [[np.zeros((1, 1, 3), np.uint8)]]]
    rows = [[cell.resize((min(4 * height, max(1, cell.width * height // cell.height)), height),
                         Image.Resampling.NEAREST) for cell in row] for row in rows]
    gap = 4
    width = max(sum(cell.width + gap for cell in row) for row in rows) - gap
    sheet = Image.new("RGB", (width, len(rows) * (height + gap) - gap), "white")
    for number, row in enumerate(rows):
        left = 0
        for cell in row:
            sheet.paste(cell, (left, number * (height + gap)))
            left += cell.width + gap
    with writing(path) as file:
        sheet.save(file, "PNG")
