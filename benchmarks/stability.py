"""Does online clustering steady the training? ODC beside DeepCluster: same trunk, images, crops, clusters and
epochs.

    python -m benchmarks.stability                          # on shapes: 3 seeds, 5 epochs
    python -m benchmarks.stability --recipe cifar --data cifar10 --epochs 10

Between successive epochs' clusters of all images: mutual information (NMI, 1: the same), and the share of
images that change cluster once clusters are numbered as alike as can be. And how far the loss jumps when an
epoch begins: its mean over the first tenth of an epoch less that over the last tenth of the one before,
divided by ln K. The first change is left out. A run is kept in --out and not made twice.
"""

import argparse
import dataclasses
import math
import statistics
from pathlib import Path

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

import deepcluster
import odc
from benchmarks.record import finished, write
from common.engine.launch import launch
from common.engine.log import nmi
from common.engine.options import recipe
from common.engine.run import Run

METHODS = {"ODC": odc, "DeepCluster": deepcluster}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="shapes")
    parser.add_argument("--root", default="")
    parser.add_argument("--recipe", default="shapes", help="of both methods (default: shapes)")
    parser.add_argument("--prototypes", type=int, default=50, help="number K of clusters (default: 50)")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS,
                        help="others' runs must be there (default: both)")
    parser.add_argument("--out", type=Path, default=Path("runs/stability"))
    parser.add_argument("--workers", type=int, default=-1)
    return parser.parse_args()


def config_of(method, args, seed):
    given = dict(data=args.data, root=args.root, prototypes=args.prototypes, epochs=args.epochs, seed=seed,
                 workers=args.workers)
    return dataclasses.replace(recipe(method.Config, method.RECIPES, args.recipe), **given,
                               recipe=args.recipe)


def train(method, config, out):
    """The loss of every step (S,), and the cluster of every image after every epoch (E, N)."""
    losses, clusters = [], []

    class Watched(Run):
        def log(self, loss, *others, **figures):
            losses.append(float(loss))
            super().log(loss, *others, **figures)

        def end_epoch(self, epoch, assignments=None):
            super().end_epoch(epoch, assignments)
            clusters.append(self.meter.assignments[0].numpy().copy())

    method.Run = Watched
    method.main(dataclasses.replace(config, out=str(out), fresh=True))
    return np.array(losses), np.stack(clusters)


def figures_of(losses, clusters, K):
    """Means over the changes from one epoch to the next: NMI, share of images that change cluster, jump of
    the loss."""
    steps, found = len(losses) // len(clusters), []
    for epoch in range(2, len(clusters)):
        old, new = clusters[epoch - 1], clusters[epoch]
        both = np.zeros((K, K))
        np.add.at(both, (old, new), 1)
        kept = both[linear_sum_assignment(both, maximize=True)].sum() / len(new)
        start, tenth = epoch * steps, max(1, steps // 10)
        jump = losses[start : start + tenth].mean() - losses[start - tenth : start].mean()
        found.append([nmi(old, new), 100 * (1 - kept),
                      jump / math.log(K)])
    return np.mean(found, axis=0)


def main(args):
    results = {}
    for name in METHODS:
        for seed in args.seeds:
            kept = args.out / f"{name.lower()}_{args.recipe}_{args.epochs}_{args.prototypes}_{seed}.npz"
            config = config_of(METHODS[name], args, seed)
            there = finished(config, kept.with_suffix("")) and kept.exists()
            if not there and name in args.methods:
                losses, clusters = train(METHODS[name], config, kept.with_suffix(""))
                np.savez_compressed(kept, losses=losses, clusters=clusters)
            if kept.exists():
                with np.load(kept) as file:
                    results.setdefault(name, []).append(figures_of(file["losses"], file["clusters"],
                                                                   args.prototypes))
                    images = file["clusters"].shape[1]
    figures = {}
    for name, rows in results.items():
        for j, what in enumerate(("NMI to the epoch before", "images that change cluster, %",
                                  "jump of the loss, share of ln K")):
            values = [row[j] for row in rows]
            figures[f"{name}: {what}"] = statistics.mean(values)
            figures[f"{name}: {what}, least"], figures[f"{name}: {what}, most"] = min(values), max(values)
    if all(len(results.get(name, [])) == len(args.seeds) for name in METHODS):
        settings = dict(recipe=args.recipe, prototypes=args.prototypes, epochs=args.epochs, seeds=args.seeds,
                        images=images)
        write("stability", torch.device("cpu"), settings, figures)
    else:
        print(f"nothing is written: {args.out} lacks runs of {' or '.join(METHODS)}")


if __name__ == "__main__":
    launch(main, arguments())
