"""Fine-tunes the whole network on a few labels (Goyal et al. 2019; SimCLR's 1 % and 10 % of ImageNet).

Adds a linear layer on the trunk's pooled features and trains both, with synchronised batch norm in train
mode. The trunk learns at rate lr, the linear head at lr x multiplier. Published figures are the best of a
grid of rates, so this script runs the whole grid. Its table names the settings as the benchmarks do: "head10,
1e-2". Each setting reports its last and its best epoch. Whatever is called best was chosen on the images that
it is reported for.

The state is saved at a stop signal and every --save-every minutes. The same command resumes. At the end the
network of the setting with the best last epoch is saved.

    python eval_semisup.py runs/swav_shapes                # minutes on a CPU: 10 % of the run's own images
    python eval_semisup.py runs/swav_shapes --random-init  # the same from random weights: the floor
    python eval_semisup.py --list-presets                  # the published protocols and their figures
    torchrun --nproc_per_node=8 eval_semisup.py resnet50.pth --preset swav_10 --data /imagenet  # draws 10 %
    torchrun --nproc_per_node=8 eval_semisup.py resnet50.pth --preset swav_1 --data 1percent.txt \\
        --root /imagenet/train --val /imagenet/val         # SimCLR's list
"""

import argparse
import copy
import itertools
import math
import time
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import data, distributed
from common.batchnorm import parallel
from common.engine.checkpoint import cpu_state
from common.engine.errors import ArgumentError, DataError, Diverged, say
from common.engine.held_out import is_list
from common.engine.launch import launch, repeatable
from common.evaluation import classifier
from common.evaluation import protocol as evaluation
from common.evaluation.metrics import accuracy
from common.evaluation.progress import Progress
from common.features import extract
from common.multicrop import Augmentation, MultiCrop, photometric
from common.optim import drops

# B images of a step, F features, C classes


@dataclass(frozen=True)
class Preset:
    """A protocol. lrs: rates of the trunk, for batch_size; heads: multipliers for the head. All pairs run."""

    published: str
    fraction: float
    lrs: tuple
    heads: tuple
    weight_decay: float = 0.0
    epochs: int = 20
    drops: tuple = (12, 16)  # epochs after which the rates are multiplied by gamma
    gamma: float = 0.2
    batch_size: int = 256
    nesterov: bool = False
    head_std: float = 0.0  # of the head's normal initial weights, with bias 0; 0: nn.Linear's default
    linear_rule: bool = False  # whether rates scale with --batch-size


GRID = dict(lrs=(0.001, 0.01, 0.1), heads=(1, 10, 100), head_std=0.01)
VISSL = dict(lrs=(0.05,), heads=(1,), epochs=70, drops=(30,), gamma=0.1, nesterov=True, linear_rule=True)
PRESETS = {
    "openselfsup_1": Preset(
        "ODC 32.39 / 61.02 (head100, 1e-1), DeepCluster 33.44 / 58.62 (head1, 1e-2; not tuned), last epoch",
        0.01, weight_decay=5e-4, **GRID),
    "openselfsup_10": Preset(
        "ODC 58.15 / 82.55 (head10, 1e-1), DeepCluster 52.94 / 77.96 (head1, 1e-2; not tuned), last epoch",
        0.1, weight_decay=1e-4, **GRID),
    "swav_1": Preset("SwAV of 800 epochs 53.9 / 78.5, best epoch (the paper's; from memory, not checked)",
                     0.01, (0.02,), (250,)),
    "swav_10": Preset("SwAV of 800 epochs 70.2 / 89.9, best epoch (the paper's; from memory, not checked)",
                      0.1, (0.01,), (20,)),
    "vissl_1": Preset("none for these methods", 0.01, **VISSL),
    "vissl_10": Preset("none for these methods", 0.1, **VISSL),
    "small": Preset("none: ours, for small images on a CPU", 0.1, (0.01, 0.1), (1,), 1e-4, batch_size=50,
                    head_std=0.01),
}


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "labelled images; a list is used whole, of anything else a share is "
                                        "drawn (default: the run's)",
                               "labelled images to evaluate on (default: the val split of --data)",
                               precisions=(*evaluation.PRECISIONS, "float64"))
    evaluation.add_presets(parser, PRESETS, table())
    add = parser.add_argument
    add("--fraction", type=float, help="share of the labelled images of each class to draw; 1: all of them")
    add("--lr", type=float, nargs="+", dest="lrs", help="learning rates of the trunk at the given batch size")
    add("--head", type=float, nargs="+", dest="heads",
        help="learning rates of the head as multiples of --lr; all pairs are tried")
    add("--weight-decay", type=float, help="weight decay of every parameter")
    add("--deterministic", action=argparse.BooleanOptionalAction, default=True,
        help="repeatable bits on a GPU too; slower, and stops at operations without them (default: on)")
    return parser.parse_args(argv)


def table():
    """The presets as text: name, published top-1 / top-5, rates."""
    lines = ["preset           published ImageNet top-1 / top-5"]
    for name, p in PRESETS.items():
        grid = f"lr {' '.join(map(exponent, p.lrs))}, head {' '.join(f'x{h:g}' for h in p.heads)}"
        after = f"x{p.gamma:g} after {' and '.join(map(str, p.drops))}"
        more = ", nesterov" * p.nesterov + ", lr by the linear rule" * p.linear_rule
        lines += [f"{name:16} {p.published}",
                  f"    {p.fraction:.0%} of the labels, batch {p.batch_size}, {grid}, {p.epochs} epochs, "
                  f"{after}, weight decay {p.weight_decay:g}{more}"]
    return "\n".join(lines)


def exponent(x):
    """Formats 0.01 as 1e-2."""
    mantissa, _, power = f"{x:e}".partition("e")
    return f"{float(mantissa):g}e{int(power)}"


def resolve(args):
    """Returns the preset with the given options, and a warning if only the batch size changes, or None."""
    preset = PRESETS[args.preset]
    options = ("lrs", "heads", "epochs", "batch_size", "weight_decay", "fraction")
    p = replace(preset, **evaluation.given(args, options))
    p = replace(p, drops=tuple(round(drop * p.epochs / preset.epochs) for drop in preset.drops))
    for name, values in (("lr", p.lrs), ("head", p.heads)):
        if not all(0 < value < math.inf for value in values):
            raise ArgumentError(f"--{name} {evaluation.words(values)}: more than 0 is needed")
    fine = p.epochs >= 1 and p.batch_size >= 2 and 0 <= p.weight_decay < math.inf
    evaluation.need(fine, p, "epochs batch_size weight_decay",
                    "at least one epoch and two images per step are needed, and nothing below 0")
    evaluation.need(0 <= args.seed < 1 << 32, args, "seed", f"0 to {(1 << 32) - 1} is needed")
    evaluation.need(0 < p.fraction <= 1, p, "fraction", "more than 0 and at most 1 is needed")
    if p.batch_size % (ranks := distributed.world_size()):
        raise ArgumentError(f"--batch-size {p.batch_size} is not divisible by the {ranks} processes")
    if args.lrs is not None or p.batch_size == preset.batch_size:
        return p, None
    if p.linear_rule:
        return replace(p, lrs=tuple(lr * p.batch_size / preset.batch_size for lr in p.lrs)), None
    return p, evaluation.kept_rates(args.preset, p.lrs, preset.batch_size, p.batch_size)


# ------------------------------------------------------------------------------------------------------- data


def draw(labels, fraction, seed):
    """Draws rows of a share of each class but -1, at least one each, sorted. The arguments alone decide."""
    rows = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero()[:, 0].numpy()
        count = max(1, round(fraction * len(members)))
        if label >= 0:
            rows.append(np.random.default_rng((seed, label)).permutation(members)[:count])
    return np.sort(np.concatenate([np.zeros(0, dtype=np.int64), *rows]))


def training_crops(images, size, seed):
    """Random resized crops of 8 to 100 % of the area, flipped half of the time, and nothing else."""
    plain = Augmentation(jitter_p=0.0, grey_p=0.0, blur_p=0.0)
    return MultiCrop(images, (1,), (size,), ((0.08, 1.0),), plain, seed)


# --------------------------------------------------------------------------------------------------- training


class Model(nn.Module):
    """Trunk and linear layer: (B, 3, s, s) -> scores (B, C). The linear layer runs in full precision."""

    def __init__(self, backbone, classes, head_std):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.feature_dim, classes)
        if head_std:
            nn.init.normal_(self.fc.weight, std=head_std)
            nn.init.zeros_(self.fc.bias)

    def forward(self, x):
        features = self.backbone(x)  # (B, F)
        with torch.autocast(x.device.type, enabled=False):
            return self.fc(features.to(self.fc.weight.dtype))


def train_one_epoch(net, optimizer, loader, labels, p, epoch, seed, how, progress, total):
    """Trains one epoch from step progress.number on, without an incomplete last batch. Returns the mean loss
    over all ranks. total: the sum of this rank's losses in this epoch so far, updated in place."""
    device, precision, dtype = how["device"], how["precision"], next(net.parameters()).dtype
    batches = data.batches(len(labels), p.batch_size, epoch, seed)
    net.train()
    first = progress.number
    for step, (index, crops, params) in progress.steps(loader.epoch(epoch, batches, first), first):
        torch.manual_seed(seed << 32 | epoch * len(batches) + step)  # dropout, in trunks that have it
        crops = crops[0][0].to(device, non_blocking=True)  # (B, 3, s, s)
        x = photometric(crops, params[0], how["mean"], how["std"], dtype)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            scores = net(x)  # (B, C)
        loss = F.cross_entropy(scores, labels[index].to(device, non_blocking=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach()
    return float(distributed.all_sum(total)) / distributed.world_size() / len(batches)


def finetune(model, setting, p, loader, images, queries, seed, how, progress, kept):
    """Trains the model at one setting, resuming from progress.state. Yields (loss, top-1, top-5) on the
    queries after each epoch. Ends after an epoch that diverged, whose accuracies are None.

    setting: {"lr": of the trunk, "head": multiplier, "top1": of the epochs done}. kept: what progress saves
    beside the state of this setting.
    """
    net, lr, device = parallel(model), setting["lr"], next(model.parameters()).device
    groups = [{"params": list(model.backbone.parameters())}, {"params": list(model.fc.parameters())}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, weight_decay=p.weight_decay, nesterov=p.nesterov)
    total = torch.zeros((), device=device, dtype=torch.float64)
    if progress.state:
        model.load_state_dict(progress.state["model"])
        optimizer.load_state_dict(progress.state["optimizer"])
        progress.number = progress.state["step"]
        total += progress.state["total"] if distributed.rank() == 0 else 0.0
        progress.state = None
    progress.keep = lambda: {**kept, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                             "step": progress.number, "total": float(distributed.all_sum(total))}
    for epoch in range(len(setting["top1"]), p.epochs):
        rate = drops(epoch, 1, lr, p.drops, p.gamma)
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, rate * setting["head"]
        loss = train_one_epoch(net, optimizer, loader, images.labels, p, epoch, seed, how, progress, total)
        evaluation.check_readable(loader)
        try:
            result = accuracy(*extract(model, queries, **how)) if math.isfinite(loss) else (None, None)
        except Diverged:
            result = None, None
        progress.number = 0
        total.zero_()
        yield loss, *result
        if result[0] is None:
            return


def report(settings, p):
    """Prints the last and the best epoch of each setting. Returns the best setting by each of the two."""
    say("\nsetting           last epoch: top-1    top-5    best epoch: top-1    top-5   epoch")
    for s in settings:
        if len(s["top1"]) < p.epochs:
            say(f"{s['setting']:16}  diverged in epoch {len(s['top1']) + 1}")
            continue
        best = s["top1"].index(max(s["top1"]))
        line = f"{s['setting']:16}  "
        for epoch, width in ((-1, 17), (best, 21)):
            top5 = s["top5"][epoch]
            line += f"{s['top1'][epoch]:{width}.2f}" + (f"{'-':>9}" if top5 is None else f"{top5:9.2f}")
        say(f"{line}{best + 1:8}")
    finished = [s for s in settings if len(s["top1"]) == p.epochs]
    if not finished:
        raise Diverged("the loss of every setting is not finite: lower --lr or --head")
    which = "the only setting"
    if len(settings) > 1:
        which = f"the best of {len(settings)} settings, chosen on the same images"
    last = max(finished, key=lambda s: s["top1"][-1])
    best = max(finished, key=lambda s: max(s["top1"]))
    how = "in the best epoch, chosen on the images it is reported for"
    say(f"{last['top1'][-1]:.2f} in the last epoch: {last['setting']}, {which}")
    say(f"{max(best['top1']):.2f} {how}: {best['setting']}, {which}")
    return {"last": last, "best": best}


def try_grid(trunk, p, loader, images, queries, classes, args, how, progress):
    """Fine-tunes a copy of the trunk at each setting. Returns a list of the settings, with accuracies per
    epoch, and {"top1", "setting", "model"} of the one that is best in its last epoch."""
    kept = progress.state or {"settings": [], "best": {"top1": -1.0}}
    kept = {name: kept[name] for name in ("settings", "best")}
    settings, best, started, done = kept["settings"], kept["best"], time.perf_counter(), 0
    begun = len(settings) - 1 if progress.state else 0  # earlier settings are done
    total = len(p.lrs) * len(p.heads) * p.epochs - sum(len(s["top1"]) for s in settings)
    dtype = torch.float64 if args.precision == "float64" else torch.float32
    for lr, head in list(itertools.product(p.lrs, p.heads))[begun:]:
        torch.manual_seed(args.seed)
        model = Model(copy.deepcopy(trunk), classes, p.head_std)
        model.to(how["device"], dtype, memory_format=torch.channels_last)
        if not progress.state:
            named = {"setting": f"head{head:g}, {exponent(lr)}", "lr": lr, "head": head}
            settings.append({**named, "top1": [], "top5": []})
        setting = settings[-1]
        history = finetune(model, setting, p, loader, images, queries, args.seed, how, progress, kept)
        for epoch, (loss, top1, top5) in enumerate(history, len(setting["top1"]) + 1):
            line = f"{setting['setting']:16} epoch {epoch}/{p.epochs} loss {loss:.4f}"
            if top1 is None:
                say(f"{line} diverged")
                break
            setting["top1"].append(round(top1, 4))
            setting["top5"].append(top5 if top5 is None else round(top5, 4))
            done += 1
            left = (time.perf_counter() - started) / done * (total - done)
            say(f"{line} top-1 {top1:.2f} left {timedelta(seconds=int(left))}")
        if len(setting["top1"]) == p.epochs and setting["top1"][-1] > best["top1"]:
            best.update(top1=setting["top1"][-1], setting=setting["setting"], model=cpu_state(model))
    return settings, best


def main(args):
    device = evaluation.start(args)
    p, warning = resolve(args)
    repeatable(args.deterministic)
    trunk, info = evaluation.open_trunk(args, device)
    how = {**evaluation.extraction(args, info, device), "bad": set()}
    everything, queries = evaluation.open_labelled(args, info)
    # a list names the images itself, so it is used whole
    whole = args.fraction is None and distributed.from_main(is_list, args.data)
    images = evaluation.Subset(everything, draw(everything.labels, 1 if whole else p.fraction, args.seed))
    if len(images) < p.batch_size:
        drawn = f"{len(images)} images are drawn of --data"
        raise DataError(f"{drawn}, fewer than one batch: --batch-size {p.batch_size}")
    loader = data.Loader(training_crops(images, info["size"], args.seed), args.workers, device.type == "cuda")

    counts = images.labels.bincount()
    counts = counts[counts > 0]
    source = f"{p.fraction:.3g} of each class, drawn with seed {args.seed}"
    say(f"{args.trunk}: {evaluation.name(info)}, fine-tuned at {info['size']} px; preset {args.preset}")
    say(f"{len(images)} of {len(everything)} images, {'all that --data lists' if whole else source}: "
        f"{counts.min()} to {counts.max()} of each of {len(counts)} classes")
    rates = f"rates x{p.gamma:g} after {p.drops}, {len(p.lrs) * len(p.heads)} settings"
    say(f"batch {p.batch_size}, {p.epochs} epochs of {len(images) // p.batch_size} steps, {rates}; "
        f"judged on {len(queries)} images after each epoch")
    if warning:
        say(warning)

    name = f"eval_semisup_{args.preset}"
    decisive = evaluation.decisive(args, trunk, precision=how["precision"], data=everything.fingerprint,
                                   val=queries.fingerprint)
    folder, own = evaluation.folder(args, name, decisive), f"{name}{'_random' * args.random_init}"
    progress = Progress(folder, own, decisive, args.save_every, args.fresh)
    how["fetch"] = progress.fetch
    settings, best = try_grid(trunk, p, loader, images, queries, len(everything.classes), args, how, progress)
    loader.close()
    evaluation.warn_of_bad(loader.bad, how["bad"])
    chosen = report(settings, p)
    record = {"preset": args.preset, "images": len(images), "of": len(everything), "queries": len(queries),
              "classes": len(everything.classes), "epochs": p.epochs, "batch_size": p.batch_size,
              "weight_decay": p.weight_decay, "seed": args.seed,
              "best_setting": {when: s["setting"] for when, s in chosen.items()}, "settings": settings}
    model = Model(trunk.cpu(), len(everything.classes), 0)
    model.load_state_dict(best["model"])
    head = {"layer": "features", "weight": model.fc.weight, "bias": model.fc.bias, "top1": best["top1"]}
    about = {"trunk": args.trunk, "sha256": decisive["trunk"], "preset": args.preset,
             "setting": best["setting"], "resize": info["resize"], "size": info["size"],
             "numbered": getattr(everything, "numbered", False)}
    progress.keep_result(classifier.save, folder / f"{own}_classifier.pt", [head], everything.classes, about,
                         model.backbone, info)
    evaluation.finish(args, info, name, record, folder)
    progress.finish()


if __name__ == "__main__":
    launch(main, arguments())
