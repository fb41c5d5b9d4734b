"""Trains linear classifiers on a frozen trunk (Goyal et al. 2019; the protocols of the five methods).

The trunk stays in eval mode and never changes, batch-norm statistics included. One forward pass feeds all
probes: the average-pooled last map, the maps Feature1 .. Feature5, or AlexNet's conv1 .. conv5. All pairs of
the given learning rates and weight decays train at once on the same crops, stacked in one tensor. Each ends
as if it had trained alone.

There are two kinds of figure; never compare one with the other. A preset's protocol draws new crops every
epoch. --cache extracts features of each image's centre crop once and trains on them in seconds.

    python eval_linear.py runs/swav_shapes                        # a run, on its own data: minutes on a CPU
    python eval_linear.py runs/swav_shapes --cache                # seconds, once features are extracted
    python eval_linear.py runs/swav_shapes --save-features f.npz  # saves them; eval_knn.py reads f.npz too
    python eval_linear.py f.npz --lr 0.1 1                        # on saved features
    torchrun --nproc_per_node=8 eval_linear.py resnet50.pth --preset swav_100e --data /imagenet
    python eval_linear.py resnet50.pth --head classifier.pt --val /imagenet/val   # tests a saved classifier
    python eval_linear.py --list-presets                          # the published protocols and their figures

The state is saved at a stop signal and every --save-every minutes. The same command resumes. At the end the
classifier of each layer with the best rate is saved.
"""

import itertools
import math
import os
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
from common.engine.launch import launch
from common.evaluation import classifier, store
from common.evaluation import protocol as evaluation
from common.evaluation.metrics import accuracy, ranked, ranked_accuracy
from common.evaluation.pooling import FEATURES, Reading, shapes
from common.evaluation.progress import Progress
from common.multicrop import Augmentation, CenterCrop, MultiCrop, RandomCrop, TenCrop, photometric
from common.optim import drops

# B images, C channels of a map, F features of a layer, G settings (learning rate, weight decay), K classes


def resized_crop(images, resize, size, augmentation, seed):
    """The usual training crops: random resized crops of 8 to 100 % of the area, flipped half of the time."""
    return MultiCrop(images, (1,), (size,), ((0.08, 1.0),), augmentation, seed)


def by_drops(preset, epoch, step, lr, weight_decay):
    return drops(epoch, 1, lr, preset.drops, 0.1)


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
    """A protocol. The optimizer is SGD with momentum 0.9; lr is meant for batch_size."""

    published: str
    # layers of common/evaluation/pooling.py; "+bn": batch norm before it, "+affine": with gain and shift
    probes: tuple = ("avgpool",)
    lr: tuple = (0.01,)
    weight_decay: tuple = (0.0,)
    epochs: int = 100
    batch_size: int = 256
    schedule: object = by_drops
    drops: tuple = ()  # epochs after which the learning rate is divided by 10
    nesterov: bool = False
    start: object = gaussian
    crop: object = resized_crop
    jitter: float = 0.0  # strength of brightness, contrast and saturation
    lighting: float = 0.0  # standard deviation of the noise along ImageNet's principal colours
    view: object = CenterCrop  # crops of an image to evaluate on
    probabilities: bool = False  # whether several views average their probabilities, not their logits
    first_validation: int = 1  # epoch of the first evaluation
    resize: int = 256
    size: int = 224

    @property
    def layers(self):
        return list(dict.fromkeys(probe.partition("+")[0] for probe in self.probes))


GOYAL = dict(probes=tuple(f"{layer}+bn" for layer in FEATURES), nesterov=True, weight_decay=(1e-4,))
VISSL = dict(probes=(*(f"{layer}+affine" for layer in FEATURES), "avgpool+affine", "avgpool"), nesterov=True,
             weight_decay=(5e-4,), start=uniform)
PRESETS = {
    "small": Preset(
        "none: ours, for small images of the size that the trunk was trained on, with a grid of rates",
        probes=("avgpool+bn",), lr=(0.01, 0.03, 0.1, 0.3, 1.0), epochs=20, schedule=by_cosine, resize=0,
        size=0),
    "mhead_90e": Preset(
        "ImageNet Feature1-5, OpenSelfSup and MMSelfSup, last epoch: DeepCluster with Sobel 12.78 30.81 "
        "43.88 57.71 51.68, ODC 14.76 31.82 42.44 55.76 57.70, SwAV (200 epochs, batch 256) 16.98 34.96 "
        "49.26 65.98 70.74, supervised 15.18 33.96 47.86 67.56 76.17, random 11.37 16.21 13.47 9.07 6.54",
        **GOYAL, epochs=90, drops=(30, 60), jitter=0.4, lighting=0.1),
    "avgpool_100e": Preset(
        "ImageNet AvgPool, OpenSelfSup and MMSelfSup, best epoch: DeepCluster with Sobel 46.92, ODC 53.42, "
        "supervised 74.12, random 4.35",
        lr=(30.0,), drops=(60, 80)),
    "places205_28e": Preset(
        "Places205 Feature1-5, OpenSelfSup and MMSelfSup, last epoch: DeepCluster with Sobel 18.80 33.93 "
        "41.44 47.22 42.61, ODC 20.94 34.78 41.19 47.45 49.18, SwAV 23.33 35.45 43.13 51.98 55.09, "
        "supervised 21.27 36.10 43.03 51.38 53.05, random 17.19 21.70 19.23 14.59 11.73",
        **GOYAL, epochs=28, drops=(7, 14, 21), crop=RandomCrop),
    "inat18_84e": Preset("iNaturalist-2018 Feature1-5, MMSelfSup's file: no figures of these methods",
                         **GOYAL, epochs=84, drops=(24, 48, 72)),
    "swav_100e": Preset(
        "ImageNet AvgPool, the authors, best epoch: SwAV 75.3 (800 epochs), 74.6 (400), 73.9 (200), 72.1 "
        "(100), batch 256 74.3 (400), 72.7 (200); DeepCluster-v2 75.2 (800), 74.3 (400), 70.2 (400, 2x224); "
        "SeLa-v2 71.8 (400), 67.2 (400, 2x224); MMSelfSup: SwAV (200 epochs, batch 256) 70.47",
        lr=(0.3,), weight_decay=(1e-6,), schedule=by_cosine),
    "vissl_28e": Preset(
        "ImageNet AvgPool, VISSL: DeepCluster-v2 75.18 (800 epochs), 74.32 (400), 70.01 (400, 2x224); SwAV "
        "74.92 (800), 74.81 (400), 73.85 (200), 71.99 (100), batch 256 74.3 (400), 73.07 (200)",
        **VISSL, epochs=28, drops=(8, 16, 24)),
    "vissl_places205_14e": Preset(
        "Places205, VISSL's file and AvgPool heads, which it lacks; figures by it are not known. SwAV's "
        "paper, quoted from memory, protocol not checked: SwAV 56.7, supervised 53.2",
        **VISSL, epochs=14, drops=(4, 8, 12)),
    "vissl_inat18_84e": Preset(
        "iNaturalist-2018, VISSL's file; figures by it are not known. SwAV's paper, quoted from memory, "
        "protocol not checked: SwAV 48.6, supervised 46.7",
        **VISSL, epochs=84, drops=(24, 48, 72)),
    "sela_resnet_146e": Preset(
        "ImageNet AvgPool, the authors, whose probing left batch norm in train mode: SeLa ResNet-50 10x3k "
        "61.5 (pre-activation); with more augmentation and --crops 1: ResNet-18 1k 53.3, ResNet-50 1k 63.5, "
        "10x3k 68.8",
        lr=(0.1,), epochs=146, batch_size=1024, drops=(85, 128), start=uniform, view=TenCrop),
    "dc_alexnet_90e": Preset(
        "ImageNet conv1-conv5, best epoch: the protocol of DeepCluster's AlexNet (37.88 is VISSL's, with "
        "other windows, layer not stated)",
        probes=tuple(f"conv{i}" for i in range(1, 6)), weight_decay=(1e-7,), epochs=90, schedule=by_root,
        start=uniform, crop=RandomCrop, view=TenCrop, probabilities=True),
    "sela_alexnet_36e": Preset(
        "ImageNet conv1-conv5, the authors, best layer: SeLa AlexNet 42.1 (1k), 43.8 (10k)",
        probes=tuple(f"conv{i}_max+bn" for i in range(1, 6)), weight_decay=(1e-5,), epochs=36,
        batch_size=192, drops=(10, 20, 30), start=xavier, view=TenCrop, first_validation=27),
}


def table():
    """The presets as text: the published figures, and what differs from the class's defaults."""
    lines = []
    for name, preset in PRESETS.items():
        values = [(f, getattr(preset, f.name)) for f in fields(Preset)[1:]]
        changed = [f"{f.name} {_words(value)}" for f, value in values if value != f.default]
        lines += [name, f"    {preset.published}", f"    {', '.join(changed)}"]
    return "\n".join(lines)


def _words(value):
    return getattr(value, "__name__", None) or evaluation.words(value)


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "labelled images to train on (default: the run's)",
                               "labelled images to evaluate on (default: the val split of --data)")
    evaluation.add_presets(parser, PRESETS, table())
    add = parser.add_argument
    add("--layers", nargs="+", default=[], help="layers of the preset to train on (default: all of them)")
    add("--lr", type=float, nargs="+", help="learning rates, all trained at once (default: the preset's)")
    add("--weight-decay", type=float, nargs="+", help="weight decays for each --lr (default: the preset's)")
    add("--crops", type=int, choices=(1, 10), help="crops per image to evaluate on (default: the preset's)")
    add("--cache", action="store_true", help="train on features of centre crops, extracted once")
    add("--head", default="", metavar="FILE",
        help="train nothing: evaluate this classifier, saved by an earlier call or released with the trunk")
    add("--save-features", default="", metavar="FILE", help="--cache, and save the features to an .npz file")
    return parser.parse_args(argv)


def choose(args):
    """Returns the preset with the given options. Warns if lr is kept while the batch size changes."""
    preset = PRESETS[args.preset]
    given = evaluation.given(args, ("lr", "weight_decay", "epochs", "batch_size"))
    positive = (*given.get("lr", ()), given.get("epochs", 1), given.get("batch_size", 1))
    decays = given.get("weight_decay", ())
    fine = all(0 < x < math.inf for x in positive) and all(0 <= x < math.inf for x in decays)
    evaluation.need(fine, args, " ".join(given), "more than 0 is needed, of a weight decay 0 or more")
    evaluation.need(0 <= args.seed < 1 << 32, args, "seed", f"0 to {(1 << 32) - 1} is needed")
    unknown = [layer for layer in args.layers if layer not in preset.layers]
    if unknown:
        known = ", ".join(preset.layers)
        raise ArgumentError(f"--layers {unknown[0]} is not in --preset {args.preset}: choose from {known}")
    least = max(2 if any("+" in probe for probe in preset.probes) else 1, distributed.world_size())
    batch_size = given.get("batch_size", preset.batch_size)
    if batch_size < least:
        why = "for batch norm, or one image per process"
        raise ArgumentError(f"--batch-size {batch_size}: at least {least} is needed, {why}")
    if batch_size != preset.batch_size and not args.lr:
        say(evaluation.kept_rates(args.preset, preset.lr, preset.batch_size, batch_size))
    given["drops"] = tuple(drop * given.get("epochs", preset.epochs) / preset.epochs for drop in preset.drops)
    if args.crops:
        given["view"] = TenCrop if args.crops == 10 else CenterCrop
    if args.layers:
        given["probes"] = tuple(probe for probe in preset.probes if probe.partition("+")[0] in args.layers)
    return replace(preset, resize=args.resize or preset.resize, size=args.size or preset.size, **given)


class Probe(nn.Module):
    """Trains G linear classifiers on one layer at once, one for each (learning rate, weight decay).

    They start from the same weights, see the same rows and share no gradient, so each ends as if it had
    trained alone. Batch norm before them covers the rows of all ranks. Each has a gain and shift of its own.
    """

    def __init__(self, name, shape, classes, settings, start, seed):
        super().__init__()
        self.name, self.settings, self.velocity = name, settings, {}
        self.layer, _, norm = name.partition("+")
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
        weight = torch.empty(classes, *shape)
        bias = start(weight, generator)
        # Settings after classes: softmax over many short rows would cost more than the matrix products.
        self.weight = nn.Parameter(weight.flatten(1)[:, None].repeat(1, len(settings), 1))  # (K, G, F)
        self.bias = nn.Parameter(bias[:, None].repeat(1, len(settings)))  # (K, G)
        decay = torch.tensor([decay for _, decay in settings], dtype=torch.float64)  # (G,)
        self.register_buffer("decay", decay, persistent=False)
        self.norm = SyncBatchNorm(shape[0], affine=False) if norm else None
        if norm == "affine":
            self.gain = nn.Parameter(torch.ones(len(settings), shape[0]))  # (G, C)
            self.shift = nn.Parameter(torch.zeros(len(settings), shape[0]))

    def forward(self, x):
        """Maps (B, C, h, w) to logits (B, K, G)."""
        weight, bias = self.weight, self.bias
        x = x if self.norm is None else self.norm(x)
        if hasattr(self, "gain"):  # fold both into the weights: one product for all settings
            weight = weight.unflatten(2, (x.shape[1], -1))  # (K, G, C, h w)
            bias = bias + torch.einsum("kgcp,gc->kg", weight, self.shift)
            weight = (weight * self.gain[:, :, None]).flatten(2)
        return F.linear(x.flatten(1), weight.flatten(0, 1), bias.flatten()).unflatten(1, bias.shape)

    @torch.no_grad()
    def descend(self, lr, nesterov, momentum=0.9):
        """Makes a step of torch.optim's SGD with learning rates lr (G,). Gain and shift do not decay."""
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
    """Trains on one epoch of batches (number, (maps, labels, total)): maps {layer: (b, C, h, w)} and labels
    (b,) of this rank, total images over all ranks."""
    for number, (maps, labels, total) in batches:
        loss = 0
        for probe in probes:
            logits = probe.train()(maps[probe.layer])  # (b, K, G)
            targets = labels[:, None].expand(-1, logits.shape[2])
            loss = loss + F.cross_entropy(logits, targets, reduction="sum") / total
        loss.backward()
        for probe in probes:
            rates = [preset.schedule(preset, epoch, epoch * steps + number, *setting)
                     for setting in probe.settings]
            rates = torch.tensor(rates, dtype=torch.float64).to(probe.weight, non_blocking=True)  # (G,)
            probe.descend(rates, preset.nesterov)


@torch.no_grad()
def judge(probes, maps, views=1, probabilities=False):
    """Returns the top classes (B, settings of all probes, up to 5) from maps of `views` crops per image."""
    best = []
    for probe in probes:
        logits = probe.eval()(maps[probe.layer])  # (views B, K, G)
        logits = (logits.softmax(1) if probabilities else logits).unflatten(0, (views, -1)).mean(0)
        best.append(ranked(logits.transpose(1, 2)))
    return torch.cat(best, dim=1)


class Cached:
    """Trains and evaluates on cached features. train, val: this rank's (features (n, D), labels (n,))."""

    def __init__(self, train, val, device):
        self.judged = int(distributed.all_sum((val[1] >= 0).sum()))
        exact = torch.promote_types(train[0].dtype, torch.float32)
        labelled = train[1] >= 0  # the others are unreadable or have no label
        self.x = train[0][labelled.to(train[0].device)].to(device, exact)
        self.labels = train[1][labelled].to(device)
        self.val, self.val_labels = val[0].to(device, exact), val[1]
        counts = distributed.gather_rows(torch.tensor([len(self.x)])).tolist()
        self.n, self.first = sum(counts), sum(counts[: distributed.rank()])

    def batches(self, epoch, batch_size, seed, drop_last, first=0):
        """Yields the batches from number `first` on. They do not depend on the number of ranks: of each, a
        rank gets the rows that it holds."""
        batches = data.batches(self.n, batch_size, epoch, seed, 0, 1, drop_last=drop_last)
        for batch in map(batches.__getitem__, range(first, len(batches))):
            rows = torch.tensor([index for _, index in batch]) - self.first
            rows = rows[(rows >= 0) & (rows < len(self.x))].to(self.x.device, non_blocking=True)
            yield {"avgpool": self.x[rows, :, None, None]}, self.labels[rows], len(batch)

    def end_epoch(self, epoch):
        pass

    def judge(self, probes, fetch):
        best = [judge(probes, {"avgpool": block[:, :, None, None]}) for block in self.val.split(4096)]
        return ranked_accuracy(torch.cat(best), self.val_labels)


def extract_both(trunk, info, images, queries, how, path):
    """Returns this rank's features and labels of both sets. Saves those of all ranks to path, if given."""
    reading, rows = Reading(trunk, ["avgpool"]), []
    for part, option in ((images, "--data"), (queries, "--val")):
        began = time.perf_counter()
        rows.append(features.extract(reading, part, **how))
        speed = len(part) / (time.perf_counter() - began)
        say(f"features of {len(part)} images of {option}: {speed:.0f} img/s")
        evaluation.warn_of_unreadable(part, rows[-1][1], option)
    if path:
        what = {key: info.get(key) for key in ("arch", "width", "method", "epoch", "size")}
        store.save(path, *rows, what)
        say(f"kept in {path}")
    return rows


class Drawn:
    """Trains on new crops every epoch and evaluates on centre or ten crops, all through the trunk."""

    def __init__(self, trunk, images, queries, preset, how, seed):
        self.trunk, self.images, self.queries, self.preset, self.how = trunk, images, queries, preset, how
        jitter = (preset.jitter,) * 3 + (0.0,)
        augmentation = Augmentation(jitter, float(preset.jitter > 0), grey_p=0.0, blur_p=0.0)
        crops = preset.crop(images, how["resize"], how["size"], augmentation, seed)
        self.loader = data.Loader(crops, how["workers"], pin_memory=how["device"].type == "cuda")
        self.labelled = (images.labels >= 0).nonzero()[:, 0].numpy()
        self.n, self.judged = len(self.labelled), int((queries.labels >= 0).sum())
        # ImageNet's principal colours, scaled by their spread (Krizhevsky et al. 2012), in normalised units.
        colours = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140],
                                [-0.5836, -0.6948, 0.4203]])
        lengths, std = torch.tensor([0.2175, 0.0188, 0.0045]), torch.tensor(how["std"])
        self.colours = colours * lengths / std[:, None]  # (RGB, 3)

    def batches(self, epoch, batch_size, seed, drop_last, first=0):
        device, precision = self.how["device"], self.how["precision"]
        reading = Reading(self.trunk, self.preset.layers, dict)
        order = np.random.default_rng((seed, epoch)).permutation(self.labelled)
        batches = data.batches(self.n, batch_size, epoch, seed, order=order, drop_last=drop_last)
        for step, (index, crops, params) in enumerate(self.loader.epoch(epoch, batches, first), first):
            crops = crops[0][0].to(device, non_blocking=True)  # (b, 3, s, s)
            x = photometric(crops, params[0], self.how["mean"], self.how["std"])
            total = min(batch_size, self.n - step * batch_size)
            if self.preset.lighting:  # drawn for all ranks' batch, so it does not depend on their number
                generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {epoch} {step}".encode()))
                noise = torch.randn(total, 3, generator=generator)
                noise = self.preset.lighting * noise @ self.colours.T  # (total, RGB)
                mine = distributed.rows_of(total, distributed.rank(), distributed.world_size())
                x += noise[slice(*mine)].to(x, non_blocking=True)[:, :, None, None]
            autocast = torch.autocast(device.type, precision, precision == torch.bfloat16)
            with torch.no_grad(), autocast:
                maps = reading(x)
            yield maps, self.images.labels[index].to(device, non_blocking=True), total

    def end_epoch(self, epoch):
        """Checks for unreadable images. Not done in `batches`: a signal may stop that amid a collective."""
        evaluation.check_readable(self.loader)
        bad = int(distributed.all_sum(torch.tensor(len(self.loader.bad))))
        if bad and epoch == 0:
            say(f"warning: {bad} images of --data cannot be read and are replaced by their neighbours")

    def judge(self, probes, fetch):
        p = self.preset

        def best_classes(maps):
            return judge(probes, maps, p.view.views, p.probabilities).flatten(1).float()

        reading = Reading(self.trunk, p.layers, best_classes)
        how = {**self.how, "batch_size": max(1, 256 // p.view.views), "view": p.view, "fetch": fetch}
        best, labels = features.extract(reading, self.queries, **how)
        settings = sum(len(probe.settings) for probe in probes)
        return ranked_accuracy(best.nan_to_num(-1).long().unflatten(1, (settings, -1)), labels)


def judge_head(args, device):
    """Evaluates the saved or released classifier --head on the validation images."""
    for name in ("random_init", "lr", "weight_decay", "epochs", "batch_size", "cache", "save_features"):
        if getattr(args, name):
            raise ArgumentError(f"--{name.replace('_', '-')} is not for --head, which trains nothing")
    network = evaluation.loaded(classifier.load_classifier, args.head, args.trunk, *args.layers[:1],
                                arch=args.arch)
    info = evaluation.sized(args, network.info)
    queries = distributed.from_first(evaluation.open_known, args, info, network.classes, len(network.bias),
                                    network.about["numbered"])
    view = TenCrop if (args.crops or network.about["views"]) == 10 else CenterCrop
    how = {**evaluation.extraction(args, info, device), "batch_size": max(1, 256 // view.views), "view": view}
    network.to(device, memory_format=torch.channels_last)
    scores, labels = features.extract(classifier.Averaged(network, view.views), queries, **how)
    evaluation.warn_of_unreadable(queries, labels, "--val")
    top1, top5 = accuracy(scores, labels)
    five, count = "" if top5 is None else f", {top5:.2f} top-5", int(distributed.all_sum((labels >= 0).sum()))
    crops = f"{view.views} crop{'s' * (view.views > 1)} an image"
    say(f"{args.trunk}: {evaluation.name(info)}; {args.head}, {network.layer}, {crops}: "
        f"{top1:.2f} top-1{five} of {count} images")
    record = {"head": args.head, "layer": network.layer, "size": info["size"], "crops": view.views,
              "val": count, "top1": round(top1, 4), "top5": top5 if top5 is None else round(top5, 4)}
    evaluation.finish(args, info, "eval_linear_head", record, folder=args.out)


def main(args):
    device = evaluation.start(args)
    if args.head:
        return judge_head(args, device)
    preset = choose(args)
    kept = evaluation.is_features(args)
    cached = bool(kept or args.cache or args.save_features)
    if args.save_features:
        writable = distributed.from_main(os.access, Path(args.save_features).parent, os.W_OK)
        if kept or not args.save_features.endswith(".npz") or not writable:
            needed = "a trunk, and an .npz file in a folder that can be written, are needed"
            raise ArgumentError(f"--save-features {args.save_features}: {needed}")
    if cached and preset.layers != ["avgpool"]:
        has = f"--preset {args.preset} has {_words(preset.probes)}: see --layers"
        raise ArgumentError(f"cached features are those of avgpool, {has}")
    evaluation.need(not cached or args.crops != 10, args, "crops", "cached features have one crop per image")
    if kept:
        *rows, info = store.load(args.trunk)
        source, precision, trunk = Cached(*rows, device), torch.float32, None
        classes, sets = range(info["classes"]), {"data": evaluation.seen(args.trunk)}
        maps = {"avgpool": (rows[0][0].shape[1], 1, 1)}
    else:
        trunk, info = evaluation.open_trunk(args, device)
        images, queries = evaluation.open_labelled(args, info)
        info = {**info, "resize": preset.resize or info["resize"], "size": preset.size or info["size"]}
        how = evaluation.extraction(args, info, device)
        try:
            maps = shapes(trunk, info["size"], preset.layers)
        except ValueError as error:
            raise ArgumentError(f"--preset {args.preset} does not fit {args.trunk}: {error}") from None
        if cached:
            rows = extract_both(trunk, info, images, queries, how, args.save_features)
            source = Cached(*rows, device)
        else:
            source = Drawn(trunk, images, queries, preset, how, args.seed)
        classes, precision = images.classes, how["precision"]
        sets = {"data": images.fingerprint, "val": queries.fingerprint}
    # Drop a last batch with fewer images than ranks, or with a single image, which has no variance.
    left = source.n % preset.batch_size
    drop_last = left < max(2, distributed.world_size())
    steps = source.n // preset.batch_size + (not drop_last)
    if steps == 0:
        raise DataError(f"{source.n} labelled images are too few to train on")

    settings = list(itertools.product(preset.lr, preset.weight_decay))
    probes = [Probe(name, maps[name.partition("+")[0]], len(classes), settings, preset.start,
                    args.seed).to(device) for name in preset.probes]
    name = f"eval_linear_{args.preset}{'_cached' * cached}"
    decisive = evaluation.decisive(args, trunk, precision=precision, **sets)
    folder, own = evaluation.folder(args, name, decisive), f"{name}{'_random' * args.random_init}"
    progress = Progress(folder, own, decisive, args.save_every, args.fresh)
    say(f"{args.trunk}: {evaluation.name(info)}")
    say(f"preset {args.preset}, {preset.epochs} epochs of {steps} steps, batch {preset.batch_size}, "
        f"{len(classes)} classes; {source.n} images to train on, {source.judged} to judge by")
    if cached:
        say("features of centre crops, extracted once: not the published protocol, and not comparable with "
            "its figures")
    first, begun, history = 0, 0, {}  # history: {epoch: [(top-1, top-5)] of all probes and settings}
    if progress.state:
        first, begun, history = (progress.state[key] for key in ("epoch", "step", "history"))
        for probe, (parts, velocity) in zip(probes, progress.state["probes"], strict=True):
            probe.load_state_dict(parts)
            probe.velocity = {part: tensor.to(device) for part, tensor in velocity.items()}
    progress.keep = lambda: {"epoch": epoch, "step": progress.number, "history": history,
                             "probes": [(probe.state_dict(), probe.velocity) for probe in probes]}
    for epoch in range(first, preset.epochs):
        began = time.perf_counter()
        batches = source.batches(epoch, preset.batch_size, args.seed, drop_last, begun)
        train_one_epoch(probes, progress.steps(batches, begun), preset, epoch, steps)
        source.end_epoch(epoch)
        speed, begun = source.n / (time.perf_counter() - began), 0
        if epoch + 1 >= preset.first_validation or epoch + 1 == preset.epochs:
            history[epoch + 1] = source.judge(probes, progress.fetch)
            rest = iter(history[epoch + 1])
            best = [f"{probe.name} {max(top1 for top1, _ in itertools.islice(rest, len(settings))):.2f}"
                    for probe in probes]
            say(f"epoch {epoch + 1}/{preset.epochs}: {' '.join(best)} ({speed:.0f} img/s)")
    record = {"preset": args.preset, "cached": cached, "size": info.get("size"), "epochs": preset.epochs,
              "batch_size": preset.batch_size, "seed": args.seed, "train": source.n, "classes": len(classes),
              "val": source.judged, "crops": 1 if cached else preset.view.views,
              "precision": str(precision).removeprefix("torch."), **results(probes, history)}
    about = {"trunk": args.trunk, "sha256": decisive["trunk"], "preset": args.preset,
             "resize": info.get("resize"), "size": info.get("size"), "views": record["crops"],
             "probabilities": preset.probabilities,
             "numbered": not kept and getattr(images, "numbered", False)}
    path = folder / f"{own}_classifier.pt"
    progress.keep_result(classifier.save, path, chosen_heads(probes, record["chosen"]), list(classes), about)
    evaluation.finish(args, info, name, record, folder)
    progress.finish()


def chosen_heads(probes, chosen):
    """Returns the best setting of every probe, in the form that `classifier.save` takes."""
    heads = []
    for probe in probes:
        row = chosen[probe.name]
        weight, bias = classifier.folded(probe, probe.settings.index((row["lr"], row["weight_decay"])))
        heads.append({"layer": probe.layer, "weight": weight, "bias": bias, "top1": row["top1"]})
    return heads


def results(probes, history):
    """Prints the table of all probes and settings. Returns its figures for the record."""
    rows, last = [], max(history)
    each = [(probe, g, *setting) for probe in probes for g, setting in enumerate(probe.settings)]
    for i, (probe, g, lr, weight_decay) in enumerate(each):
        best = max(history, key=lambda epoch: history[epoch][i][0])  # the earliest of equals
        (top1, top5), best_top1 = history[last][i], history[best][i][0]
        row = {"probe": probe.name, "lr": lr, "weight_decay": weight_decay, "top1": round(top1, 4)}
        row |= {} if top5 is None else {"top5": round(top5, 4)}
        row |= {"best_top1": round(best_top1, 4), "best_epoch": best}
        if not probe.weight[:, g].isfinite().all():  # the other settings are unaffected
            row["diverged"] = True
        rows.append(row)
    say("probe                 lr   decay   last: top-1   top-5   best: top-1   epoch")
    for r in rows:
        five = f"{r['top5']:.2f}" if "top5" in r else "-"
        say(f"{r['probe']:16} {r['lr']:7g} {r['weight_decay']:7g} {r['top1']:13.2f} {five:>7} "
            f"{r['best_top1']:13.2f} {r['best_epoch']:7}" + "   diverged" * ("diverged" in r))
    if all("diverged" in r for r in rows):
        raise Diverged("the weights of every classifier are not finite: a lower --lr may help")
    chosen = {probe.name: max((r for r in rows if r["probe"] == probe.name), key=lambda r: r["top1"])
              for probe in probes}
    for name, r in chosen.items():
        rates = f"lr {r['lr']:g}, weight decay {r['weight_decay']:g}"
        say(f"{name}: {r['top1']:.2f} in the last epoch at {rates}")
    grid = " and the rates" if len(probes[0].settings) > 1 else ""
    where = "are chosen on the validation images that they are reported for"
    selection = f"last: after epoch {last}; the best epochs{grid} {where}"
    say(selection)
    return {"chosen": chosen, "selection": selection, "results": rows}


if __name__ == "__main__":
    launch(main, arguments())
