"""Runs small experiments, by default on five seeds: the six methods with and without their guard against
collapse, DeepCluster-v2 less one improvement, SwAV with other crops and batches, SeLa anew on its labels.

    python -m benchmarks.ablations                         # all: a minute or two per run, on two cores
    python -m benchmarks.ablations --only "swav*"          # some of them
    python -m benchmarks.ablations --list
    ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
        python -m benchmarks.ablations --precision float32 --out runs/ablations_float32
                                                           # the unchanged methods, as on an older CPU

An experiment changes options of the recipe or, where there is no such option, replaces a function of the
script by one of those below. Runs are kept in --out, so the same command resumes. A run is not repeated if
its figures are in the results file for the same options. The results file gets each experiment's seeds up to
the first that is missing.
"""

import argparse
import dataclasses
import fnmatch
import functools
import hashlib
import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import nn

import deepcluster
import deepclusterv2
import odc
import sela
import selav2
import swav
from benchmarks.record import RESULTS, curve_of, finished, last_loss, machine, metrics, write
from common import data
from common.engine.errors import ArgumentError
from common.engine.launch import launch
from common.engine.options import recipe
from common.evaluation.store import read_assignments

METHODS = {"swav": swav, "deepclusterv2": deepclusterv2, "selav2": selav2, "deepcluster": deepcluster,
           "odc": odc, "sela": sela}


def drawn_from_all_images(targets, length, generator):
    return torch.randperm(len(targets), generator=generator)[:length]


def likeliest(memory, prototypes, features, heads, *settings):
    for h in heads:
        memory.targets[h] = prototypes[h](features.to(prototypes[h].weight.dtype)).argmax(1)
    memory.figures = {"relabellings": memory.done + 1}


def labels_of(run, memory, *settings):
    """Replaces sela.py's `assign`: takes the labels (H, N) that another run ended with."""
    found = read_assignments(run / "assignments.npz", data.open_images("shapes", "train"))
    memory.targets.copy_(torch.from_numpy(found))


def shuffled_labels_of(run, memory, *settings):
    labels_of(run, memory)
    order = torch.randperm(memory.targets.shape[1], generator=torch.Generator().manual_seed(0))
    memory.targets = memory.targets[:, order]


def clustered_once(memory, *settings, assign=deepclusterv2.assign):
    if memory.epoch < 0:
        assign(memory, *settings)
    memory.filled.local.fill_(False)


class LinearHead(deepclusterv2.Model):
    def __init__(self, config, backbone=None):
        super().__init__(config, backbone)
        self.projection_head = nn.Linear(self.backbone.feature_dim, config.dim)


# name: (options that override the method's recipe, functions that replace its script's)
LARGE = dict(sizes=(24,), scales=(0.4, 1.0))
RETRAINED = dict(relabellings=1, epochs=6)
EXPERIMENTS = {
    "swav": ({}, {}),
    "deepclusterv2": ({}, {}),
    "selav2": ({}, {}),
    "deepcluster": ({}, {}),
    "odc": ({}, {}),
    "sela": ({}, {}),
    "swav, 0 Sinkhorn iterations": (dict(sinkhorn_iterations=0), {}),
    "deepclusterv2, clustered once": ({}, dict(assign=clustered_once)),
    "deepcluster, no uniform sampling": ({}, dict(uniform_order=drawn_from_all_images)),
    "odc, no merging and splitting, no weights": (dict(min_cluster=0, reweight=0.0), {}),
    "sela, the likeliest label": ({}, dict(assign=likeliest)),
    "deepcluster, 50 clusters": (dict(prototypes=50), {}),
    "deepclusterv2, no colour jitter": (dict(jitter=(0.0, 0.0, 0.0, 0.0), blur_p=0.0), {}),
    "deepclusterv2, linear head": ({}, dict(Model=LinearHead)),
    "deepclusterv2, constant learning rate": (dict(final_lr=3.6), {}),
    "deepclusterv2, temperature 1": (dict(temperature=1.0), {}),
    "deepclusterv2, one clustering": (dict(heads=1), {}),
    "swav, 2 large crops": (dict(LARGE, crops=(2,)), {}),
    "swav, 2 large crops for as many FLOPs": (dict(LARGE, crops=(2,), epochs=14), {}),
    "swav, 4 large crops": (dict(LARGE, crops=(4,)), {}),
    "swav, 2 large and 6 small crops": (dict(crops=(2, 6)), {}),
    "swav, batch 16": (dict(batch_size=16, lr=1.2, final_lr=0.0012), {}),
    "swav, batch 16 and a queue of 112": (dict(batch_size=16, lr=1.2, final_lr=0.0012, queue_length=112,
                                               queue_start_epoch=1), {}),
    "swav, batch 256": (dict(batch_size=256, lr=4.8, final_lr=0.0048, freeze_prototypes_iters=12), {}),
    "sela, trained anew on its labels": (RETRAINED, dict(assign=labels_of)),
    "sela, trained anew on its labels shuffled": (RETRAINED, dict(assign=shuffled_labels_of)),
}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--only", default="*", help="pattern that the names of experiments must match")
    parser.add_argument("--list", action="store_true", help="print the names, and stop")
    parser.add_argument("--precision", default="auto", choices=["auto", "float32"])
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--workers", type=int, default=-1)
    return parser.parse_args()


def folder(out, name, seed):
    """Returns the folder of an experiment's run."""
    return out / f"{name.replace(', ', '-').replace(' ', '_')}_{seed}"


def config_of(name, args, seed):
    method, options = METHODS[name.split(",")[0]], EXPERIMENTS[name][0]
    given = dict(recipe="shapes", seed=seed, precision=args.precision, workers=args.workers, log_every=13,
                 eval_every=6 if method is sela else 100, out=str(folder(args.out, name, seed)), fresh=True)
    config = dataclasses.replace(recipe(method.Config, method.RECIPES, "shapes"), **given | options)
    # retraining starts from other weights than the run whose labels it takes
    return dataclasses.replace(config, seed=seed + 100) if "anew" in name else config


def options_of(name):
    """Returns a checksum of an experiment's options, without those of the machine and the seed."""
    method = METHODS[name.split(",")[0]]
    config = dataclasses.replace(recipe(method.Config, method.RECIPES, "shapes"), **EXPERIMENTS[name][0])
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    chosen = {f.name: values[f.name] for f in dataclasses.fields(config) if values[f.name] != f.default}
    return hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]


def measured(file, name):
    """Returns {seed: figures} of an experiment from the results file, if it has the same options now, and the
    machine that it was run on."""
    saved = json.loads(file.read_text()) if file.exists() else {"settings": {"options": {}}}
    if saved["settings"]["options"].get(name) != options_of(name):
        return {}, None
    columns = {key.removeprefix(f"{name}: "): values for key, values in saved["figures"].items()
               if key.startswith(f"{name}: ")}
    rows = [dict(zip(columns, row)) for row in zip(*columns.values())]
    return dict(zip(saved["settings"]["seeds"], rows)), saved["settings"]["machines"].get(name)


def train(name, args, seed):
    method, functions = METHODS[name.split(",")[0]], dict(EXPERIMENTS[name][1])
    if "anew" in name:
        functions = {"assign": functools.partial(functions["assign"], folder(args.out, "sela", seed))}
    kept = {function: getattr(method, function) for function in functions}
    for function, other in functions.items():
        setattr(method, function, other)
    method.main(config_of(name, args, seed))
    for function, own in kept.items():
        setattr(method, function, own)


def figures_of(out):
    """Returns {what: figure} of a finished run. Two are means over all epoch changes but the first: NMI of
    the clusters before and after, and the jump of the loss / ln K (its mean over the first 13 steps of the
    new epoch minus that over the last 13 steps of the old one)."""
    with np.load(out / "assignments.npz") as file:
        counts = [np.bincount(head[head >= 0]) for head in file["assignments"]]
    records, curve = metrics(out), curve_of(out)
    losses = [record["loss_per_ln_k"] for record in records if "loss_per_ln_k" in record]
    nmi = [record["nmi_to_previous"] for record in records if "epoch_clusters_used" in record]
    steps = len(losses) // len(nmi)  # records per epoch
    jumps = [losses[start] - losses[start - 1] for start in range(2 * steps, len(losses) - steps + 1, steps)]
    largest = 100 * statistics.mean(c.max() / c.sum() for c in counts)
    used = statistics.mean(int((c > 0).sum()) for c in counts)
    found = {"untrained 20-NN %": curve[0][1], "20-NN %": curve[-1][1], "loss / ln K": last_loss(out),
             "clusters in use": used, "largest cluster, %": largest,
             "NMI to the epoch before": statistics.mean(nmi[2:]), "jump of the loss": statistics.mean(jumps)}
    return found | {f"20-NN % after {epoch} epochs": accuracy for epoch, accuracy in curve[1:-1]}


def main(args):
    names = [name for name in EXPERIMENTS if args.precision == "auto" or "," not in name]
    chosen = fnmatch.filter(names, args.only)
    if not chosen:
        raise ArgumentError(f"--only {args.only}: no experiment has such a name; --list names them")
    if args.list:
        return print("\n".join(chosen))
    file = "ablations" if args.precision == "auto" else f"ablations_{args.precision}"
    figures, machines = {}, {}
    for name in names:
        rows, where = measured(RESULTS / f"{file}_cpu.json", name)
        for seed in args.seeds:
            done = functools.partial(finished, config_of(name, args, seed), folder(args.out, name, seed))
            if name in chosen and seed not in rows and not done():
                train(name, args, seed)
            if seed not in rows and done():
                rows[seed] = figures_of(folder(args.out, name, seed))
                where = machine(torch.device("cpu"))
        rows = list(itertools.takewhile(bool, (rows.get(seed) for seed in args.seeds)))
        figures |= {f"{name}: {what}": [row[what] for row in rows] for what in (rows[0] if rows else ())}
        machines |= {name: where} if rows else {}
    options = {name: options_of(name) for name in names}
    settings = dict(seeds=args.seeds, precision=args.precision, options=options, machines=machines)
    write("ablations", torch.device("cpu"), settings, figures, file)


if __name__ == "__main__":
    launch(main, arguments())
