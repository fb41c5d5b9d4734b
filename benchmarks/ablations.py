"""Remove what prevents collapse and watch it happen; and take DeepCluster-v2 apart, one improvement at a
time.

    python -m benchmarks.ablations                         # all of them on shapes, as long as the recipes are
    python -m benchmarks.ablations --only "swav*"          # some of them
    python -m benchmarks.ablations --list

Where an option does it, the run has that option; where none does, a line below puts another function in the
script's place. After the runs a table: the last epoch's loss as a share of ln K, clusters in use and the
largest one's share of the images (means over heads), and 20-NN accuracy on held-out images. A run is kept in
--out and not made twice; nothing is written before all are there.
"""

import argparse
import dataclasses
import fnmatch
import statistics
from pathlib import Path

import numpy as np
import torch
from torch import nn

import deepcluster
import deepclusterv2
import odc
import sela
import swav
from benchmarks.record import curve_of, finished, last_loss, show, write
from common.engine.errors import ArgumentError
from common.engine.launch import launch
from common.engine.options import recipe

METHODS = {"swav": swav, "deepcluster": deepcluster, "odc": odc, "sela": sela, "deepclusterv2": deepclusterv2}


def drawn_from_all_images(targets, length, generator):
    return torch.randperm(len(targets), generator=generator)[:length]


def likeliest(memory, prototypes, features, heads, *settings):
    for h in heads:
        memory.targets[h] = prototypes[h](features.to(prototypes[h].weight.dtype)).argmax(1)
    memory.figures = {"relabellings": memory.done + 1}


def clustered_once(memory, *settings, assign=deepclusterv2.assign):
    if memory.epoch < 0:
        assign(memory, *settings)
    memory.filled.local.fill_(False)


class LinearHead(deepclusterv2.Model):
    def __init__(self, config):
        super().__init__(config)
        self.projection_head = nn.Linear(self.backbone.feature_dim, config.dim)


# name: options given to the method's recipe, functions of its script replaced
EXPERIMENTS = {
    "swav": ({}, {}),
    "swav, 0 Sinkhorn iterations": (dict(sinkhorn_iterations=0), {}),
    "deepcluster": ({}, {}),
    "deepcluster, no uniform sampling": ({}, dict(uniform_order=drawn_from_all_images)),
    "odc": ({}, {}),
    "odc, no merging and splitting, no weights": (dict(min_cluster=0, reweight=0.0), {}),
    "sela": ({}, {}),
    "sela, the likeliest label": ({}, dict(assign=likeliest)),
    "deepclusterv2": ({}, {}),
    "deepclusterv2, clustered once": ({}, dict(assign=clustered_once)),
    "deepclusterv2, no colour jitter": (dict(jitter=(0.0, 0.0, 0.0, 0.0), blur_p=0.0), {}),
    "deepclusterv2, linear head": ({}, dict(Model=LinearHead)),
    "deepclusterv2, constant learning rate": (dict(final_lr=0.8), {}),
    "deepclusterv2, temperature 1": (dict(temperature=1.0), {}),
    "deepclusterv2, one clustering": (dict(heads=1), {}),
    "deepclusterv2, two crops": (dict(crops=(2,)), {}),
}
COLUMNS = ("loss / ln K", "clusters in use", "largest cluster, %", "20-NN %")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="default: that of the recipe")
    parser.add_argument("--root", default="")
    parser.add_argument("--val", default="")
    parser.add_argument("--recipe", default="shapes")
    parser.add_argument("--epochs", type=int, default=0, help="default: the recipe's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="*", help="a pattern of names")
    parser.add_argument("--list", action="store_true", help="names, and nothing else")
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--workers", type=int, default=-1)
    return parser.parse_args()


def folder(out, name):
    """Where the run of an experiment is kept."""
    return out / name.replace(", ", "-").replace(" ", "_")


def config_of(name, args, out):
    method = METHODS[name.split(",")[0]]
    config = recipe(method.Config, method.RECIPES, args.recipe)
    epochs = args.epochs or config.epochs
    given = dict(data=args.data, root=args.root, val=args.val, epochs=epochs, seed=args.seed,
                 workers=args.workers)
    given |= dict(recipe=args.recipe, out=str(out), fresh=True, eval_every=epochs)
    return dataclasses.replace(config, **given, **EXPERIMENTS[name][0])


def train(name, config):
    method, functions = METHODS[name.split(",")[0]], EXPERIMENTS[name][1]
    kept = {function: getattr(method, function) for function in functions}
    for function, other in functions.items():
        setattr(method, function, other)
    method.main(config)
    for function, own in kept.items():
        setattr(method, function, own)


def figures_of(out):
    """Of a finished run: COLUMNS."""
    with np.load(out / "assignments.npz") as file:
        counts = [np.bincount(head[head >= 0]) for head in file["assignments"]]
    used = statistics.mean(int((c > 0).sum()) for c in counts)
    return last_loss(out), used, 100 * statistics.mean(c.max() / c.sum()
                                                       for c in counts), curve_of(out)[-1][1]


def main(args):
    names = [name for name in EXPERIMENTS if fnmatch.fnmatch(name, args.only)]
    if not names:
        raise ArgumentError(f"--only {args.only}: no experiment has such a name; --list names them")
    if args.list:
        return print("\n".join(names))
    figures, missing = {}, []
    for name in EXPERIMENTS:
        out = folder(args.out, name)
        config = config_of(name, args, out)
        if name in names and not finished(config, out):
            train(name, config)
        if finished(config, out):
            figures |= {f"{name}: {what}": value for what, value in zip(COLUMNS, figures_of(out))}
        else:
            missing.append(name)
    if missing:
        show(figures)
        return print(f"nothing is written: {args.out} lacks {'; '.join(missing)}")
    write("ablations", torch.device("cpu"), dict(recipe=args.recipe, epochs=args.epochs, seed=args.seed),
          figures)


if __name__ == "__main__":
    launch(main, arguments())
