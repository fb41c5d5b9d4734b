"""Linear probes: classifiers on the features of a frozen trunk (Goyal et al. 2019; the protocols of the five
methods' papers).

The trunk stays in eval mode and keeps every bit, batch-norm statistics included. One pass through it feeds
all probes: the pooled average of the last map, the maps Feature1 .. Feature5, or AlexNet's conv1 .. conv5.
Learning rates and weight decays, when several are given, train at once on the same crops as one stacked
tensor; each ends as if it had trained alone.

Two kinds of figure, never to be put in one column: the protocol of a preset, which draws new crops every
epoch, and --cache, which looks at each image once, at its centre crop, and trains on the kept features in
seconds.

    python eval_linear.py runs/swav_shapes                          # a run, on its own data: minutes on a CPU
    python eval_linear.py runs/swav_shapes --cache                  # seconds, once the features are there
    python eval_linear.py runs/swav_shapes --save-features f.npz    # keeps them: eval_linear.py f.npz, eval_knn.py f.npz
    torchrun --nproc_per_node=8 eval_linear.py resnet50.pth --preset swav_100e --data /imagenet
    python eval_linear.py --list-presets                            # the published protocols and their figures
"""

import argparse
import itertools
import json
import math
import os
import sys
import time
import zlib
from dataclasses import dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import data, distributed, features
from common.batchnorm import SyncBatchNorm
from common.engine.errors import ArgumentError, DataError, Diverged, say
from common.engine.launch import autocast_dtype, launch
from common.evaluation import protocol as evaluation
from common.evaluation import store
from common.evaluation.metrics import ranked, ranked_accuracy
from common.evaluation.pooling import FEATURES, pooled_maps, shapes
from common.multicrop import (
    MEAN,
    STD,
    TRIES,
    Augmentation,
    CenterCrop,
    MultiCrop,
    RandomCrop,
    TenCrop,
    photometric,
)

# B images, C channels of a map, F features of a layer, G settings (learning rate, weight decay), K classes


def resized_crop(images, resize, size, augmentation, seed):
    """The usual training crops: random resized crops of 8 to 100 % of the area, flipped half of the time."""
    return MultiCrop(images, (1,), (size,), ((0.08, 1.0),), augmentation, seed)


def by_drops(preset, epoch, step, lr, weight_decay):
    return lr * 0.1 ** sum(epoch >= drop for drop in preset.drops)


def by_cosine(preset, epoch, step, lr, weight_decay):
    return lr * 0.5 * (1 + math.cos(math.pi * epoch / preset.epochs))


def by_root(preset, epoch, step, lr, weight_decay):
    return lr / math.sqrt(1 + lr * weight_decay * step)


def gaussian(weight, generator):
    nn.init.normal_(weight, std=0.01, generator=generator)
    return torch.zeros(len(weight))


def uniform(weight, generator):  # torch's default for nn.Linear
    bound = weight[0].numel() ** -0.5
    nn.init.uniform_(weight, -bound, bound, generator=generator)
    return torch.empty(len(weight)).uniform_(-bound, bound, generator=generator)


def xavier(weight, generator):
    nn.init.xavier_uniform_(weight, generator=generator)
    return torch.zeros(len(weight))


@dataclass(frozen=True)
class Preset:
    """A protocol. The optimizer is SGD with momentum 0.9; lr belongs to batch_size."""

    published: str
    # layers of common/pooling.py; "+bn" with batch norm before, "+affine" with a trained one
    probes: tuple = ("avgpool",)
    lr: tuple = (0.01,)
    weight_decay: tuple = (0.0,)
    epochs: int = 100
    batch_size: int = 256
    schedule: object = by_drops
    drops: tuple = ()  # epochs after which the learning rate is a tenth
    nesterov: bool = False
    start: object = gaussian
    crop: object = resized_crop
    jitter: float = 0.0  # strength of brightness, contrast and saturation
    lighting: float = 0.0  # standard deviation of the noise along the colours of ImageNet
    view: object = CenterCrop  # what is looked at to judge
    probabilities: bool = False  # of several views the mean of the probabilities, not of the logits
    first_validation: int = 1  # epoch
    resize: int = 256
    size: int = 224


GOYAL = dict(probes=tuple(f"{layer}+bn" for layer in FEATURES), nesterov=True, weight_decay=(1e-4,))
PRESETS = {
    "small": Preset(
        "none: ours, for small images of the size that the trunk was trained on, with a grid of rates",
        **dict(probes=("avgpool+bn",), lr=(0.01, 0.03, 0.1, 0.3, 1.0), epochs=20, schedule=by_cosine,
               resize=0, size=0),
    ),
    "mhead_90e": Preset(
        "ImageNet Feature1-5, OpenSelfSup and MMSelfSup, last epoch: DeepCluster with Sobel 12.78 30.81 "
        "43.88 57.71 51.68,"
        " ODC 14.76 31.82 42.44 55.76 57.70, SwAV (200 epochs, batch 256) 16.98 34.96 49.26 65.98 70.74,"
        " supervised 15.18 33.96 47.86 67.56 76.17, random 11.37 16.21 13.47 9.07 6.54",
        **dict(GOYAL, epochs=90, drops=(30, 60), jitter=0.4, lighting=0.1),
    ),
    "avgpool_100e": Preset(
        "ImageNet AvgPool, OpenSelfSup and MMSelfSup, best epoch: DeepCluster with Sobel 46.92, ODC 53.42, "
        "supervised 74.12, random 4.35",
        **dict(lr=(30.0,), drops=(60, 80)),
    ),
    "places205_28e": Preset(
        "Places205 Feature1-5, OpenSelfSup and MMSelfSup, last epoch: DeepCluster with Sobel 18.80 33.93 "
        "41.44 47.22 42.61,"
        " ODC 20.94 34.78 41.19 47.45 49.18, SwAV 23.33 35.45 43.13 51.98 55.09, supervised 21.27 36.10 "
        "43.03 51.38 53.05,"
        " random 17.19 21.70 19.23 14.59 11.73",
        **dict(GOYAL, epochs=28, drops=(7, 14, 21), crop=RandomCrop),
    ),
    "inat18_84e": Preset(
        "iNaturalist-2018 Feature1-5, MMSelfSup's file: no figures of these methods",
        **dict(GOYAL, epochs=84, drops=(24, 48, 72))
    ),
    "swav_100e": Preset(
        "ImageNet AvgPool, the authors, best epoch: SwAV 75.3 (800 epochs), 74.6 (400), 73.9 (200), 72.1 "
        "(100), batch 256 74.3 (400),"
        " 72.7 (200); DeepCluster-v2 75.2 (800), 74.3 (400), 70.2 (400, 2x224); SeLa-v2 71.8 (400), 67.2 "
        "(400, 2x224);"
        " MMSelfSup: SwAV (200 epochs, batch 256) 70.47",
        **dict(lr=(0.3,), weight_decay=(1e-6,), schedule=by_cosine),
    ),
    "vissl_28e": Preset(
        "ImageNet AvgPool, VISSL: DeepCluster-v2 75.18 (800 epochs), 74.32 (400), 70.01 (400, 2x224);"
        " SwAV 74.92 (800), 74.81 (400), 73.85 (200), 71.99 (100), batch 256 74.3 (400), 73.07 (200)",
        probes=(*(f"{layer}+affine" for layer in FEATURES), "avgpool+affine", "avgpool"),
        **dict(weight_decay=(5e-4,), epochs=28, drops=(8, 16, 24), nesterov=True, start=uniform),
    ),
    "sela_resnet_146e": Preset(
        "ImageNet AvgPool, the authors, whose probing left batch norm in train mode: SeLa ResNet-50 10x3k "
        "61.5 (pre-activation);"
        " with more augmentation and judged by one crop:"
        " ResNet-18 1k 53.3, ResNet-50 1k 63.5, 10x3k 68.8",
        **dict(lr=(0.1,), epochs=146, batch_size=1024, drops=(85, 128), view=TenCrop),
    ),
    "dc_alexnet_90e": Preset(
        "ImageNet conv1-conv5, best epoch: the protocol of DeepCluster's AlexNet (37.88 is VISSL's, with "
        "other windows, layer not stated)",
        probes=("conv1", "conv2", "conv3", "conv4", "conv5"),
        **dict(weight_decay=(1e-7,), epochs=90, schedule=by_root, start=uniform, crop=RandomCrop,
               view=TenCrop, probabilities=True),
    ),
    "sela_alexnet_36e": Preset(
        "ImageNet conv1-conv5, the authors, best layer: SeLa AlexNet 42.1 (1k), 43.8 (10k)",
        probes=tuple(f"conv{i}_max+bn" for i in range(1, 6)),
        **dict(weight_decay=(1e-5,), epochs=36, batch_size=192, drops=(10, 20, 30), start=xavier,
               view=TenCrop, first_validation=26),
    ),
}


def table():
    """The presets as text: the published figures, and what differs from the class's defaults."""
    lines = []
    for name, preset in PRESETS.items():
        lines += [name, f"    {preset.published}"]
        changed = [(f, getattr(preset, f.name)) for f in fields(Preset)[1:] if getattr(preset,
                                                                                       f.name) != f.default]
        lines.append("    " + ", ".join(f"{f.name} {_words(value)}" for f, value in changed))
    return "\n".join(lines)


def _words(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else getattr(value, "__name__", str(value))


class ListPresets(argparse.Action):
    def __call__(self, parser, *unused):
        print(table())
        sys.exit(0)


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "labelled images to train on (default: the run's)",
                               "labelled images to judge by (default: the val split of --data)")
    parser.add_argument("--preset", default="small", choices=PRESETS,
                        help="protocol; options given win over it (default: small)")
    parser.add_argument("--list-presets", action=ListPresets, nargs=0,
                        help="print the presets with their published figures, and stop")
    parser.add_argument("--layers", nargs="+", default=[], metavar="NAME",
                        help="only these of the preset's layers")
    parser.add_argument("--lr", type=float, nargs="+", metavar="X",
                        help="learning rates, trained at once (default: the preset's)")
    parser.add_argument("--weight-decay", type=float, nargs="+", metavar="X",
                        help="weight decays, each with each --lr")
    parser.add_argument("--epochs", type=int, metavar="N",
                        help="drops of the learning rate move in proportion")
    parser.add_argument("--batch-size", type=int, metavar="N",
                        help="in all, over all processes; the learning rate stays as it is")
    parser.add_argument("--cache", action="store_true",
                        help="train on features of centre crops, extracted once")
    parser.add_argument("--save-features", default="",
                        metavar="FILE", help="--cache, and keep the features in an .npz file")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and crops (default: 0)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bfloat16", "float32"),
                        help="of the trunk (default: auto)")
    return parser.parse_args(argv)


def choose(args):
    """The preset with the options that were given. Says what a batch of another size needs."""
    preset = PRESETS[args.preset]
    given = {name: getattr(args, name) for name in ("lr", "weight_decay", "epochs", "batch_size")}
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()
             if value is not None}
    numbers = (*given.get("lr", ()), given.get("epochs", 1), given.get("batch_size", 1))
    if not all(0 < x < math.inf for x in numbers) or not all(0 <= x < math.inf
                                                             for x in given.get("weight_decay", ())):
        words = " ".join(f"--{name.replace('_', '-')} {_words(value)}" for name, value in given.items())
        raise ArgumentError(f"{words}: more than 0 is needed, of a weight decay 0 or more")
    if not 0 <= args.seed < 1 << 32:
        raise ArgumentError(f"--seed {args.seed}: 0 to {(1 << 32) - 1} is needed")
    known = list(dict.fromkeys(probe.partition("+")[0] for probe in preset.probes))
    unknown = [layer for layer in args.layers if layer not in known]
    if unknown:
        raise ArgumentError(f"--layers {unknown[0]} is not in --preset {args.preset}: choose from "
                            f"{', '.join(known)}")
    least = max(2 if any("+" in probe for probe in preset.probes) else 1, distributed.world_size())
    if given.get("batch_size", least) < least:
        raise ArgumentError(f"--batch-size {given['batch_size']}: at least {least} is needed, for batch norm "
                            f"or an image a process")
    ratio = given.get("batch_size", preset.batch_size) / preset.batch_size
    if ratio != 1 and not args.lr:
        rule = " ".join(f"{lr * ratio:g}" for lr in preset.lr)
        say(f"warning: --lr {_words(preset.lr)} of {args.preset} belongs to batch {preset.batch_size} and is "
            f"kept: " f"for {args.batch_size} the linear rule asks for --lr {rule}")
    given["drops"] = tuple(drop * given.get("epochs", preset.epochs) / preset.epochs for drop in preset.drops)
    if args.layers:
        given["probes"] = tuple(probe for probe in preset.probes if probe.partition("+")[0] in args.layers)
    return replace(preset, resize=args.resize or preset.resize, size=args.size or preset.size, **given)


class Probe(nn.Module):
    """G linear classifiers of one layer, one for each (learning rate, weight decay), trained at once.

    They start from the same weights, see the same rows, and share no gradient: each ends as if it had trained
    alone. Batch norm before them is over the rows of all ranks; without a gain and a shift of its own it is
    the same for all.
    """

    def __init__(self, name, shape, classes, settings, start, seed):
        super().__init__()
        self.name, self.settings, self.velocity = name, settings, {}
        self.layer, _, norm = name.partition("+")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        weight = torch.empty(classes, *shape)
        bias = start(weight, generator)
        # Settings behind classes: a softmax over many short rows would cost more than the products.
        self.weight = nn.Parameter(weight.flatten(1)[:, None].repeat(1, len(settings), 1))  # (K, G, F)
        self.bias = nn.Parameter(bias[:, None].repeat(1, len(settings)))  # (K, G)
        # (G,)
        self.register_buffer("decay", torch.tensor([decay for _, decay in settings], dtype=torch.float64),
                             persistent=False)
        self.norm = SyncBatchNorm(shape[0], affine=False) if norm else None
        if norm == "affine":
            self.gain = nn.Parameter(torch.ones(len(settings), shape[0]))  # (G, C)
            self.shift = nn.Parameter(torch.zeros(len(settings), shape[0]))

    def forward(self, x):
        """(B, C, h, w) -> (B, K, G)."""
        weight, bias = self.weight, self.bias
        x = x if self.norm is None else self.norm(x)
        if hasattr(self, "gain"):  # into the weights: one product for all settings
            weight = weight.unflatten(2, (x.shape[1], -1))  # (K, G, C, h w)
            bias = bias + torch.einsum("kgcp,gc->kg", weight, self.shift)
            weight = (weight * self.gain[:, :, None]).flatten(2)
        return F.linear(x.flatten(1), weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)

    @torch.no_grad()
    def descend(self, lr, nesterov, momentum=0.9):
        """A step of SGD, torch.optim's, with a learning rate for each setting, (G,). Batch norm's parameters
        do not decay."""
        for name, p in self.named_parameters():
            shape = {"weight": (1, -1, 1), "bias": (1, -1), "gain": (-1, 1), "shift": (-1, 1)}[name]
            grad = distributed.all_sum(p.grad)
            if name in ("weight", "bias"):
                grad.addcmul_(self.decay.view(shape).to(p.dtype), p)
            if name not in self.velocity:
                self.velocity[name] = torch.zeros_like(p)
            velocity = self.velocity[name].mul_(momentum).add_(grad)
            p.sub_(lr.view(shape) * (grad.add_(velocity, alpha=momentum) if nesterov else velocity))
            p.grad = None


def train_one_epoch(probes, batches, preset, epoch, steps):
    """One pass over batches of (maps {layer: (b, C, h, w)}, labels (b,), images in the batch of all
    ranks)."""
    for step, (maps, labels, total) in enumerate(batches, epoch * steps):
        loss = 0
        for probe in probes:
            logits = probe.train()(maps[probe.layer])  # (b, K, G)
            targets = labels[:, None].expand(-1, logits.shape[2])
            loss = loss + F.cross_entropy(logits, targets, reduction="sum") / total
        loss.backward()
        for probe in probes:
            rates = [preset.schedule(preset, epoch, step, *setting) for setting in probe.settings]
            probe.descend(torch.tensor(rates, dtype=torch.float64).to(probe.weight, non_blocking=True),
                          preset.nesterov)


@torch.no_grad()
def judge(probes, maps, views=1, probabilities=False):
    """Best classes of every probe and setting, (B, settings of all probes, up to 5), from maps of `views`
    crops an image."""
    best = []
    for probe in probes:
        logits = probe.eval()(maps[probe.layer])  # (views B, K, G)
        logits = (logits.softmax(1) if probabilities else logits).unflatten(0, (views, -1)).mean(0)
        best.append(ranked(logits.transpose(1, 2)))
    return torch.cat(best, dim=1)


class Reading(nn.Module):
    """The frozen trunk, and what `read` makes of its pooled maps, in float32."""

    def __init__(self, trunk, layers, read):
        super().__init__()
        self.trunk, self.layers, self.read = trunk, layers, read
        self.eval().requires_grad_(False)

    def forward(self, x):
        maps = pooled_maps(self.trunk, x, self.layers)
        with torch.autocast(x.device.type, enabled=False):
            return self.read(maps)


class Cached:
    """Training and judging on kept features: this rank's rows of both sets, (features (n, D), labels
    (n,))."""

    def __init__(self, train, val, device):
        self.judged = int(distributed.all_sum((val[1] >= 0).sum()))
        exact = torch.promote_types(train[0].dtype, torch.float32)
        labelled = train[1] >= 0  # the others are unreadable or have no label
        self.x, self.labels = train[0].to(exact)[labelled.to(train[0].device)].to(
            device), train[1][labelled].to(device)
        self.val, self.val_labels = val[0].to(device, exact), val[1]
        counts = distributed.gather_rows(torch.tensor([len(self.x)])).tolist()
        self.n, self.first = sum(counts), sum(counts[: distributed.rank()])
        self.shapes = {"avgpool": (self.x.shape[1], 1, 1)}

    def batches(self, epoch, batch_size, seed, drop_last):
        """The batch of all ranks does not depend on their number; each rank has those of its rows that it
        holds."""
        batches = data.batches(self.n, batch_size, epoch, seed, 0, 1, drop_last=drop_last)
        for batch in map(batches.__getitem__, range(len(batches))):
            rows = torch.tensor([index for _, index in batch]) - self.first
            rows = rows[(rows >= 0) & (rows < len(self.x))].to(self.x.device, non_blocking=True)
            yield {"avgpool": self.x[rows, :, None, None]}, self.labels[rows], len(batch)

    def judge(self, probes):
        best = [judge(probes, {"avgpool": block[:, :, None, None]}) for block in self.val.split(4096)]
        return ranked_accuracy(torch.cat(best), self.val_labels)


def extract_both(trunk, info, images, queries, preset, args, device):
    """Cached features of both sets, kept in --save-features if it is given."""
    _fits(trunk, preset, ["avgpool"], args)
    reading = Reading(trunk, ["avgpool"], lambda maps: maps["avgpool"].flatten(1))
    how = evaluation.extraction(argparse.Namespace(**{**vars(args), "batch_size": 256}), info, device)
    rows = []
    for part, name in ((images, "--data"), (queries, "--val")):
        began = time.perf_counter()
        rows.append(features.extract(reading, part, preset.resize, preset.size, **how))
        say(f"features of {len(part)} images of {name}: {len(part) / (time.perf_counter() - began):.0f} img/s")
        evaluation.warn_of_unreadable(part, rows[-1][1], name)
    if args.save_features:
        what = {key: info.get(key) for key in ("arch", "width", "method", "epoch")}
        store.save(args.save_features, *rows, {**what, "size": preset.size, "classes": len(images.classes)})
        say(f"kept in {args.save_features}")
    return Cached(*rows, device)


def _fits(trunk, preset, layers, args):
    try:
        return shapes(trunk, preset.size, layers)
    except ValueError as error:
        raise ArgumentError(f"--preset {args.preset} does not fit {args.trunk}: {error}") from None


class Drawn:
    """Training on new crops every epoch, and judging on centre or ten crops, through the trunk."""

    def __init__(self, trunk, info, images, queries, preset, args, device):
        self.trunk, self.preset, self.images, self.queries, self.device = trunk, preset, images, queries, device
        self.layers = list(dict.fromkeys(probe.partition("+")[0] for probe in preset.probes))
        self.shapes = _fits(trunk, preset, self.layers, args)
        self.mean, self.std = info.get("mean", MEAN), info.get("std", STD)
        self.precision, self.workers = autocast_dtype(args.precision, device), args.workers
        augmentation = Augmentation((preset.jitter,) * 3 + (0.0,), float(preset.jitter > 0), grey_p=0.0,
                                    blur_p=0.0)
        crops = preset.crop(images, preset.resize, preset.size, augmentation, args.seed)
        self.loader = data.Loader(crops, args.workers, pin_memory=device.type == "cuda")
        self.labelled = (images.labels >= 0).nonzero()[:, 0].numpy()
        self.n = len(self.labelled)
        # The principal colours of ImageNet, each as long as its standard deviation (Krizhevsky et al. 2012),
        # for normalised images.
        colours = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140],
                                [-0.5836, -0.6948, 0.4203]])
        # (RGB, 3)
        self.colours = colours * torch.tensor([0.2175, 0.0188, 0.0045]) / torch.tensor(self.std)[:, None]

    @property
    def judged(self):
        return int((self.queries.labels >= 0).sum())

    def batches(self, epoch, batch_size, seed, drop_last):
        reading = Reading(self.trunk, self.layers, dict)
        order = np.random.default_rng((seed, epoch)).permutation(self.labelled)
        rank, ranks = distributed.rank(), distributed.world_size()
        batches = data.batches(self.n, batch_size, epoch, seed, rank, ranks, order=order, drop_last=drop_last)
        for step, (index, crops, params) in enumerate(self.loader.epoch(epoch, batches)):
            x = photometric(crops[0][0].to(self.device, non_blocking=True), params[0], self.mean, self.std)
            total = min(batch_size, self.n - step * batch_size)
            # drawn for the batch of all ranks, so that it does not depend on their number
            if self.preset.lighting:
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch} {step}".encode()))
                # (total, RGB)
                noise = self.preset.lighting * torch.randn(total, 3, generator=generator) @ self.colours.T
                x += noise[rank * total // ranks : (rank + 1) * total // ranks].to(
                    x, non_blocking=True)[:, :, None, None]
            with torch.no_grad(), torch.autocast(self.device.type, dtype=self.precision,
                                                 enabled=self.precision == torch.bfloat16):
                maps = reading(x)
            yield maps, self.images.labels[index].to(self.device, non_blocking=True), total
        bad, lost = distributed.all_sum(torch.tensor([len(self.loader.bad), self.loader.lost])).tolist()
        if lost:
            raise DataError(f"{TRIES} images of --data in a row cannot be read")
        if bad and epoch == 0:
            say(f"warning: {bad} images of --data cannot be read and are replaced by their neighbours")

    def judge(self, probes):
        p = self.preset
        reading = Reading(self.trunk, self.layers,
                          lambda maps: judge(probes, maps, p.view.views, p.probabilities).flatten(1).float())
        best, labels = features.extract(reading, self.queries, p.resize, p.size, self.device, self.mean,
                                        self.std, max(1, 256 // p.view.views), self.workers, self.precision,
                                        view=p.view)
        settings = sum(len(probe.settings) for probe in probes)
        return ranked_accuracy(best.nan_to_num(-1).long().unflatten(1, (settings, -1)), labels)


def main(args):
    device = distributed.start(args.device)
    evaluation.check(args)
    preset = choose(args)
    kept = evaluation.is_features(args)
    cached = bool(kept or args.cache or args.save_features)
    if args.save_features:
        folder = Path(args.save_features).parent
        if kept or not args.save_features.endswith(".npz") or not distributed.from_main(os.access, folder,
                                                                                        os.W_OK):
            raise ArgumentError(f"--save-features {args.save_features}: a trunk, and an .npz file in a "
                                f"folder that can be written, are needed")
    if cached and any(probe.partition("+")[0] != "avgpool" for probe in preset.probes):
        raise ArgumentError(f"cached features are those of avgpool, --preset {args.preset} has "
                            f"{_words(preset.probes)}: see --layers")
    if kept:
        train, val, info = store.load(args.trunk)
        source = Cached(train, val, device)
        classes = 1 + int(distributed.all_max(source.labels.max() if len(source.labels)
                                              else torch.zeros((), dtype=torch.int64, device=device)))
    else:
        trunk, info = evaluation.open_trunk(args)
        images, queries = evaluation.open_labelled(args)
        trunk = trunk.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
        preset = replace(preset, resize=preset.resize or info["resize"], size=preset.size or info["size"])
        if preset.resize < preset.size:
            raise ArgumentError(f"--resize {preset.resize} is smaller than --size {preset.size}")
        classes = len(images.classes)
        source = (extract_both if cached else Drawn)(trunk, info, images, queries, preset, args, device)
    # A last batch with fewer images than ranks, or with one, which has no variance, is left out.
    left = source.n % preset.batch_size
    drop_last = left < max(2, distributed.world_size())
    steps = source.n // preset.batch_size + (not drop_last)
    if steps == 0:
        raise DataError(f"{source.n} labelled images are too few to train on")

    settings = list(itertools.product(preset.lr, preset.weight_decay))
    probes = [Probe(name, source.shapes[name.partition("+")[0]], classes, settings, preset.start,
                    args.seed) for name in preset.probes]
    probes = [probe.to(device) for probe in probes]
    say(f"{args.trunk}: {evaluation.name(info)}")
    say(f"preset {args.preset}, {preset.epochs} epochs of {steps} steps, batch {preset.batch_size}, "
        f"{classes} classes; " f"{source.n} images to train on, {source.judged} to judge by")
    if cached:
        say("features of centre crops, extracted once: not the published protocol, and not comparable with "
            "its figures")
    history = {}  # epoch: [(top-1, top-5)] of all probes and settings
    for epoch in range(preset.epochs):
        began = time.perf_counter()
        train_one_epoch(probes, source.batches(epoch, preset.batch_size, args.seed, drop_last), preset, epoch,
                        steps)
        speed = source.n / (time.perf_counter() - began)
        if epoch + 1 >= preset.first_validation or epoch + 1 == preset.epochs:
            history[epoch + 1] = source.judge(probes)
            rest = iter(history[epoch + 1])
            best = [f"{probe.name} {max(top1 for top1, _ in itertools.islice(rest, len(settings))):.2f}"
                    for probe in probes]
            say(f"epoch {epoch + 1}/{preset.epochs}: {' '.join(best)} ({speed:.0f} img/s)")
    record = {"trunk": args.trunk, **{key: info.get(key) for key in ("method", "arch", "epoch")},
              "preset": args.preset, "cached": cached, "size": info.get("size") if kept else preset.size,
              **{"epochs": preset.epochs, "batch_size": preset.batch_size, "seed": args.seed,
                 "train": source.n, "classes": classes},
              **{"val": source.judged, "precision": "float32" if kept else str(
                  autocast_dtype(args.precision, device)).removeprefix("torch.")}, **results(probes, history)}
    say(json.dumps(record))
    if Path(args.trunk).is_dir():
        name = "_".join(["eval_linear", args.preset, *["cached"] * cached, *["random"] * args.random_init])
        evaluation.write(Path(args.trunk) / f"{name}.json", record)


def results(probes, history):
    """The table of all probes and settings, printed, and what it holds."""
    rows, last = [], max(history)
    for i, (name, (lr, weight_decay)) in enumerate((probe.name, setting) for probe in probes
                                                   for setting in probe.settings):
        best = max(history, key=lambda epoch: history[epoch][i][0])  # the first of equal ones
        (top1, top5), best_top1 = history[last][i], history[best][i][0]
        row = {"probe": name, "lr": lr, "weight_decay": weight_decay, "top1": round(top1, 4)}
        row |= {} if top5 is None else {"top5": round(top5, 4)}
        probe, g = probes[i // len(probes[0].settings)], i % len(probes[0].settings)
        finite = bool(probe.weight[:, g].isfinite().all())  # the others trained beside it all the same
        rows.append({**row, "best_top1": round(best_top1, 4), "best_epoch": best,
                     **({} if finite else {"diverged": True})})
    say("probe                 lr   decay   last: top-1   top-5   best: top-1   epoch")
    for r in rows:
        five = f"{r['top5']:.2f}" if "top5" in r else "-"
        line = f"{r['probe']:16} {r['lr']:7g} {r['weight_decay']:7g} {r['top1']:13.2f} {five:>7} {r['best_top1']:13.2f} {r['best_epoch']:7}"
        say(line + "   diverged" * ("diverged" in r))
    if all("diverged" in r for r in rows):
        raise Diverged("the weights of every classifier are not finite: a lower --lr may help")
    chosen = {probe.name: max((r for r in rows if r["probe"] == probe.name),
                              key=lambda r: r["top1"]) for probe in probes}
    grid = " and the rates" if len(probes[0].settings) > 1 else ""
    selection = f"last: after epoch {last}; the best epochs{grid} are chosen on the validation images that they are reported for"
    for name, r in chosen.items():
        say(f"{name}: {r['top1']:.2f} in the last epoch at lr {r['lr']:g}, weight decay {r['weight_decay']:g}")
    say(selection)
    return {"chosen": chosen, "selection": selection, "results": rows}


if __name__ == "__main__":
    launch(main, arguments())
