"""Semantic segmentation: fine-tunes an FCN together with its pre-trained trunk to classify every pixel.

The network is MMSelfSup's (0.x). The trunk's last strides become dilations, so its maps keep 1/8 of the
image's side. 3x3 convolutions and a 1x1 convolution score each place; an auxiliary head on layer3 helps
training. Batch norm is in train mode and synchronised. Scores are upsampled to the labels. The loss is their
cross-entropy, averaged over all pixels: ignored ones (255) add 0. The learning rate falls as (1 - t / T)^0.9.
The last iteration is evaluated, by the mean over classes of intersection over union (mIoU).

The state is saved at a stop signal and every --save-every minutes. The same command resumes.

    python eval_segmentation.py runs/swav_shapes                # drawn scenes, minutes on a CPU
    python eval_segmentation.py runs/swav_shapes --random-init  # the same from random weights: the floor
    python eval_segmentation.py --list-presets                  # the published protocols and their figures
    torchrun --nproc_per_node=4 eval_segmentation.py resnet50.pth --preset voc12aug_20k --data VOCdevkit
    torchrun --nproc_per_node=4 eval_segmentation.py resnet50.pth --preset cityscapes_40k --data cityscapes
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import data, distributed
from common.batchnorm import parallel
from common.engine.errors import DataError, say
from common.engine.launch import launch, repeatable
from common.evaluation import dense
from common.evaluation import protocol as evaluation
from common.evaluation.maps import IGNORED, Crops, Whole
from common.evaluation.progress import Progress
from common.sources.masks import open_cityscapes, open_scenes, open_voc_aug

SHOWN = 6  # held-out images in the sheet of predictions

# B images of a step, C classes, (H, W) pixels, (h, w) places of a map


@dataclass(frozen=True)
class Preset:
    """A protocol. base: (long, short) sides that an image is scaled to fit; in training times a random factor
    within `ratios`. stride: of the test windows, which have the crop's size; 0: test the whole image."""

    published: str
    open: Callable  # spec -> (training, held-out) images
    base: tuple
    crop: int
    iterations: int
    batch_size: int
    lr: float = 0.01
    weight_decay: float = 5e-4
    stride: int = 0
    align_corners: bool = False
    ratios: tuple = (0.5, 2.0)
    dilated: tuple = ("layer3", "layer4")  # stages whose stride becomes dilation
    channels: int = 512  # of the head
    convs: int = 2  # 3x3 convolutions of the head
    joined: bool = True  # whether one more convolution gets layer4's map beside their output
    auxiliary: int = 256  # channels of the auxiliary head; 0: no such head


PRESETS = {
    "voc12aug_20k": Preset("SwAV of 200 epochs, batch 256: 63.73 (MMSelfSup)", open_voc_aug, (2048, 512), 512,
                           20_000, 16),
    "cityscapes_40k": Preset("none for these methods", open_cityscapes, (2049, 1025), 769, 40_000, 8,
                             stride=513, align_corners=True),
    "small": Preset("none: ours, for the drawn scenes on a CPU", open_scenes, (64, 64), 64, 600, 16, lr=0.1,
                    ratios=(0.75, 1.5), dilated=("layer4",), channels=64, convs=1, joined=False,
                    auxiliary=0),
}


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "what the preset needs: scenes, or scenes:N for N of them (default: "
                                        "scenes), VOCdevkit with SBD in it or beside it, or Cityscapes",
                               "", precisions=(*evaluation.PRECISIONS, "float64"), crops=False)
    evaluation.add_presets(parser, PRESETS, table(), ("--iterations", "steps, over which the rate falls"))
    add = parser.add_argument
    add("--lr", type=float, help="initial learning rate, for the given batch size")
    add("--weight-decay", type=float, help="weight decay of every parameter")
    add("--deterministic", action=argparse.BooleanOptionalAction, default=True,
        help="repeatable bits on a GPU too; slower, and stops at operations without them (default: on)")
    return parser.parse_args(argv)


def table():
    """The presets as text: name, published mIoU, settings."""
    lines = ["preset           published mIoU"]
    for name, p in PRESETS.items():
        test = f"windows of {p.crop} px every {p.stride}" if p.stride else "the whole image"
        lines += [f"{name:16} {p.published}",
                  f"    {p.iterations} iterations of {p.batch_size} crops of {p.crop} px, lr {p.lr:g}, poly "
                  f"0.9 to 1e-4, weight decay {p.weight_decay:g}; test on {test}"]
    return "\n".join(lines)


def resolve(args):
    """Returns the preset with the given options, and a warning if only the batch size changes, or None."""
    preset = PRESETS[args.preset]
    p = replace(preset, **evaluation.given(args, ("iterations", "batch_size", "lr", "weight_decay")))
    dense.check(args, p, p.open is open_scenes)
    evaluation.need(0 <= p.weight_decay < math.inf, p, "weight_decay", "0 or more is needed")
    if args.lr is not None or p.batch_size == preset.batch_size:
        return p, None
    return p, evaluation.kept_rates(args.preset, [p.lr], preset.batch_size, p.batch_size)


def enlarged(p, times):
    return replace(p, base=tuple(times * side for side in p.base), crop=times * p.crop)


# ---------------------------------------------------------------------------------------------------- network


def dilate(trunk, stages):
    """Replaces the strides of the given stages by dilations, in place. Returns the trunk.

    Convolutions behind a removed stride are dilated twice as much. So the map keeps the values that it had
    and gains others between them, as with torchvision's replace_stride_with_dilation.
    """
    dilation = 1
    for stage in stages:
        for conv in getattr(trunk, stage).modules():
            if not isinstance(conv, nn.Conv2d):
                continue
            strided, conv.stride = conv.stride != (1, 1), (1, 1)
            if conv.kernel_size == (3, 3):
                conv.dilation = conv.padding = (dilation, dilation)
                dilation *= 2 if strided else 1
    return trunk


def conv(inputs, outputs):
    layer = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Head(nn.Module):
    """Scores the classes at each place: (B, inputs, h, w) -> (B, C, h, w)."""

    def __init__(self, inputs, channels, convs, joined, classes):
        super().__init__()
        self.convs = nn.Sequential(*(conv(channels if i else inputs, channels) for i in range(convs)))
        self.join = conv(inputs + channels, channels) if joined else None
        self.dropout = nn.Dropout2d(0.1)
        self.scores = nn.Conv2d(channels, classes, 1)
        nn.init.normal_(self.scores.weight, std=0.01)
        nn.init.zeros_(self.scores.bias)

    def forward(self, maps):
        x = self.convs(maps)  # (B, channels, h, w)
        x = x if self.join is None else self.join(torch.cat([maps, x], dim=1))
        return self.scores(self.dropout(x))


class Model(nn.Module):
    """(B, 3, H, W) -> list of scores (B, C, h, w): the head's and, in train mode, the auxiliary head's."""

    def __init__(self, trunk, p, classes):
        super().__init__()
        self.backbone = dilate(trunk, p.dilated)
        self.head = Head(trunk.feature_dim, p.channels, p.convs, p.joined, classes)
        self.auxiliary = Head(trunk.feature_dim // 2, p.auxiliary, 1, False, classes) if p.auxiliary else None

    def forward(self, x):
        maps = self.backbone.stages(x)
        if self.training and self.auxiliary is not None:
            return [self.head(maps["layer4"]), self.auxiliary(maps["layer3"])]
        return [self.head(maps["layer4"])]


def upsampled(scores, size, align_corners):
    """Upsamples (B, C, h, w) to (B, C, H, W), in full precision."""
    scores = scores if scores.dtype == torch.float64 else scores.float()
    return F.interpolate(scores, size, mode="bilinear", align_corners=align_corners)


def loss_of(scores, labels, align_corners):
    """Returns the cross-entropy of scores (B, C, h, w) with labels (B, H, W) int64: its sum over labelled
    pixels, divided by the number of all pixels."""
    scores = upsampled(scores, labels.shape[1:], align_corners)
    rows = scores.permute(0, 2, 3, 1).flatten(0, 2)  # (B H W, C): the loss of maps is not repeatable on a GPU
    return F.cross_entropy(rows, labels.flatten(), ignore_index=IGNORED, reduction="sum") / labels.numel()


# --------------------------------------------------------------------------------------------------- training


def train(model, p, loader, n, seed, how, progress):
    """Trains the model on its device on n images. Returns the mean loss that the last log line shows."""
    net, dtype, device = parallel(model), next(model.parameters()).dtype, how["device"]
    optimizer = torch.optim.SGD(net.parameters(), lr=p.lr, momentum=0.9, weight_decay=p.weight_decay)

    def loss_of_batch(step, batch):
        _, (crops, labels), sizes = batch
        torch.manual_seed(seed << 32 | step)  # dropout
        x = dense.normalised(crops[0].to(device, non_blocking=True), how["mean"], how["std"], dtype)
        x = x * inside(sizes[0].to(device, non_blocking=True), p.crop)  # padding becomes 0
        labels = labels[0].to(device, non_blocking=True).long()  # (B, H, W)
        with torch.autocast(device.type, torch.bfloat16, enabled=how["precision"] == torch.bfloat16):
            scores = net(x)
        losses = [loss_of(s, labels, p.align_corners) for s in scores]
        return losses[0] + 0.4 * sum(losses[1:])

    return dense.train(
        model, optimizer, lambda first: dense.iterations(loader, n, p.batch_size, seed, first, p.iterations),
        loss_of_batch, lambda step: dense.poly(step, p.iterations, p.lr), p.iterations, loader, progress)


def inside(sizes, side):
    """Tells image from padding: (height, width) of each crop (B, 2) -> mask (B, 1, side, side) bool."""
    place = torch.arange(side, device=sizes.device)
    rows, columns = (place < sizes[:, i, None] for i in (0, 1))  # (B, side) each
    return (rows[:, :, None] & columns[:, None])[:, None]


# ------------------------------------------------------------------------------------------------------- test


def offsets(size, window, stride):
    """Returns where windows over `size` pixels begin. The last one ends at the last pixel."""
    room = max(0, size - window)
    return [min(i * stride, room) for i in range(-(-room // stride) + 1)]


def predict(model, x, p):
    """Returns scores (1, C, H, W) of an image (1, 3, H, W): from the whole, or averaged over windows."""
    if not p.stride:
        return upsampled(model(x)[0], x.shape[2:], p.align_corners)
    total = times = 0
    for top in offsets(x.shape[2], p.crop, p.stride):
        for left in offsets(x.shape[3], p.crop, p.stride):
            window = x[:, :, top : top + p.crop, left : left + p.crop]
            scores = upsampled(model(window)[0], window.shape[2:], p.align_corners)
            place = (left, x.shape[3] - left - window.shape[3], top, x.shape[2] - top - window.shape[2])
            total = total + F.pad(scores, place)
            times = times + F.pad(torch.ones_like(scores[:, :1]), place)
    return total / times


@torch.inference_mode()
def judge(model, images, p, how, fetch=next):
    """Returns the confusion matrix (C, C) int64 over the pixels of all ranks' images, the truth in rows; of
    this rank pictures of the first images, each with truth and prediction; and its unreadable images."""
    device, classes, dtype = how["device"], len(images.classes), next(model.parameters()).dtype
    first, last = distributed.rows_of(len(images), distributed.rank(), distributed.world_size())
    loader = data.Loader(Whole(images, p), how["workers"], device.type == "cuda")
    batches = data.batches(len(images), 1, 0, 0, 0, 1, order=range(first, last), drop_last=False)
    every_rank = len(images) // distributed.world_size()  # steps that all ranks make: `fetch` is collective
    confusion, pictures = torch.zeros(classes, classes, dtype=torch.int64, device=device), []
    model.eval()
    source = loader.epoch(0, batches)
    for step in range(last - first):
        index, (pixels, labels), _ = (fetch if step < every_rank else next)(source)
        if int(index) != first + step:  # unreadable: its neighbour came
            continue
        x = dense.normalised(pixels[0].to(device, non_blocking=True), how["mean"], how["std"], dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=how["precision"] == torch.bfloat16):
            scores = predict(model, x, p)
        labels = labels[0].to(device).long()  # (1, H, W)
        found = upsampled(scores, labels.shape[1:], p.align_corners).argmax(1)  # (1, H, W)
        known = labels != IGNORED
        pairs = labels[known] * classes + found[known]
        confusion += pairs.bincount(minlength=classes**2).view(classes, classes)
        if len(pictures) < SHOWN:
            maps = [dense.colours(part[0].cpu().numpy()) for part in (labels, found)]
            pictures.append([np.asarray(images.read(first + step)), *maps])
    bad = set(loader.bad) & set(range(first, last))
    loader.close()
    return distributed.all_sum(confusion).cpu(), pictures, bad


def intersection_over_union(confusion):
    """Returns (C,) float64 in percent. NaN: neither truth nor prediction has the class."""
    both = confusion.diagonal().double()
    return 100 * both / (confusion.sum(0) + confusion.sum(1) - both)


def main(args):
    device = evaluation.start(args)
    p, warning = resolve(args)
    repeatable(args.deterministic)
    trunk, info = evaluation.open_trunk(args, device)
    p = enlarged(p, dense.magnified(trunk, args))
    images, queries = distributed.from_first(p.open, args.data)
    name = f"eval_segmentation_{args.preset}"
    how, decisive, folder, own = dense.setting(args, info, device, trunk, name, images, queries)
    model = Model(trunk, p, len(images.classes))
    dtype = torch.float64 if args.precision == "float64" else torch.float32
    model.to(device, dtype, memory_format=torch.channels_last)

    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    say(f"{args.trunk}: {evaluation.name(info)}, {millions:.2f} M parameters; preset {args.preset}")
    say(f"{len(images)} images of {len(images.classes)} classes, judged on {len(queries)}; {p.iterations} "
        f"iterations of {p.batch_size} crops of {p.crop} px, lr {p.lr:g}")
    if warning:
        say(warning)

    progress = Progress(folder, own, decisive, args.save_every, args.fresh)
    loader = data.Loader(Crops(images, p, args.seed), args.workers, device.type == "cuda")
    loss = train(model, p, loader, len(images), args.seed, how, progress)
    loader.close()
    confusion, pictures, bad = judge(model, queries, p, how, progress.fetch)
    evaluation.warn_of_bad(loader.bad, bad)
    if not confusion.sum():
        raise DataError("no held-out image can be read, or none has labels")

    ious = intersection_over_union(confusion)
    say("\nclass               IoU")
    for class_name, iou in zip(images.classes, ious.tolist()):
        say(f"{class_name:16}{'-' if math.isnan(iou) else f'{iou:.2f}':>7}")
    record = {"preset": args.preset, "images": len(images), "queries": len(queries),
              "classes": len(images.classes), "iterations": p.iterations, "batch_size": p.batch_size,
              "lr": p.lr, "weight_decay": p.weight_decay, "seed": args.seed, "loss": loss,
              "miou": round(float(ious.nanmean()), 4)}
    line = f"{record['miou']:.2f} mIoU"
    if images.classes[0] == "background":
        record["miou_without_background"] = round(float(ious[1:].nanmean()), 4)
        line += f", {record['miou_without_background']:.2f} without background"
    record["iou"] = [None if math.isnan(iou) else round(iou, 4) for iou in ious.tolist()]
    say(f"{line}, of {int(confusion.sum())} pixels")
    if not progress.write(dense.write_sheet, folder / f"{own}.png", pictures):
        say(f"image, truth, prediction: {folder / f'{own}.png'}")
    evaluation.finish(args, info, name, record, folder)
    progress.finish()


if __name__ == "__main__":
    launch(main, arguments())
