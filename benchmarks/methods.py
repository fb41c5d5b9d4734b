"""All methods side by side: same trunk, images, epochs and evaluations, between a floor and a ceiling and beside a peer.

    python -m benchmarks.methods --data list.txt --root train --val val     # 10,000 images: hours on two CPU cores
    python -m benchmarks.methods --data shapes:400 --epochs 1 --out runs/try --results runs/try/methods.json       # minutes

Every run is made by its own script with its recipe `cifar`, in OUT/NAME_SEED; a finished one is not made again, and a stopped
one goes on, so the same command resumes. Then each is judged by the evaluation scripts, and timed in turns on a machine that
should do nothing else. Floors: the network with random weights, and the pixels themselves. Ceiling: the network trained with
labels. Peer: lightly's SwAV. Whatever finished runs OUT holds come into benchmarks/results/methods.json and, from that file,
into the README's table and the figure of learning curves.
"""

import argparse
import importlib
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from benchmarks import report
from benchmarks.record import RESULTS, command, machine, versions
from common import data, features
from common.config import differences, recipe

METHODS = {"swav": "SwAV", "deepclusterv2": "DeepCluster-v2", "selav2": "SeLa-v2"}
METHODS |= {"deepcluster": "DeepCluster", "odc": "ODC", "sela": "SeLa"}
CONTENDERS = {**METHODS, "lightly_swav": "SwAV of lightly", "supervised": "with labels"}
SEVERAL = {"swav": [0, 1, 2], "deepclusterv2": [0, 1, 2]}  # seeds; the others have one


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10", help="labelled images; labels train nothing but the ceiling (default: cifar10)")
    parser.add_argument("--root", default="", help="folder that relative paths of a list file start from")
    parser.add_argument("--val", default="", help="held-out images (default: the val split of --data)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=list(CONTENDERS), choices=CONTENDERS, help="runs to make (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 0 1 2 for swav and deepclusterv2, 0 for the others")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--rounds", type=int, default=3, help="in which all are timed; medians are reported (default: 3)")
    parser.add_argument("--train-only", action="store_true", help="make the runs, and stop")
    parser.add_argument("--results", type=Path, default=RESULTS / "methods.json", help="the README follows the default one")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------------- runs


def module_of(name):
    return importlib.import_module(name if name in METHODS else f"benchmarks.{name}")


def config_of(name, args, seed):
    module = module_of(name)
    return replace(recipe(module.Config, module.RECIPES, "cifar"), epochs=args.epochs, seed=seed)


def training(name, args, seed, out, **others):
    """What follows `python -m` to make a run."""
    options = dict(recipe="cifar", data=args.data, root=args.root, val=args.val, epochs=args.epochs, seed=seed, workers=args.workers)
    options.update(eval_every=max(1, args.epochs // 4), out=out, **others)
    words = [(f"--{key.replace('_', '-')}", str(value)) for key, value in options.items() if value != ""]
    return [module_of(name).__name__, *(word for pair in words for word in pair)]


def finished(name, args, seed):
    """The directory of a finished run, or None. Ends the program if it was made with other options."""
    run = args.out / f"{name}_{seed}"
    if not (run / "done.json").exists():
        return None
    config = config_of(name, args, seed)
    saved = {**asdict(type(config)()), **json.loads((run / "config.json").read_text())}  # an older run lacks younger options
    changed = [f"--{key} {getattr(args, key)} (saved {saved[key]})" for key in ("data", "root", "val") if getattr(args, key) != saved[key]]
    changed += differences(config, saved)
    if changed:
        sys.exit(f"error: {run} was made with other options: {', '.join(changed)}; take another --out, or delete it")
    return run


def python(words, **how):
    return subprocess.run([sys.executable, "-m", *words], check=True, text=True, **how)


def speeds(names, args, images):
    """{name: (seconds of the first epoch, of a later one)}: medians of rounds in which all take turns, three epochs each.

    Passes over the data, clustering and labelling are in; SeLa labels in every other epoch, so of two later ones the mean
    counts. Of files a quarter is enough: every part grows with their number.
    """
    folder = args.out / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    spec, count = dict(data=args.data, root=args.root), len(images)
    if isinstance(images, data.Files):
        some = range(0, count, 4)
        lines = [f"{images.paths[i]},{images.classes[images.labels[i]]}\n" for i in some]
        (folder / "images.txt").write_text("".join(lines), errors="surrogateescape")
        spec, count = dict(data=folder / "images.txt", root=images.root), len(some)
    taken = {name: [] for name in names}
    for _ in range(args.rounds):
        for name in names:
            shutil.rmtree(folder / name, ignore_errors=True)
            steps = count // config_of(name, args, 0).batch_size
            often = dict(max_steps=3 * steps, log_every=steps, eval_every=0, save_every=1e6)
            python(training(name, args, 0, folder / name, **{**spec, **often}))
            records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
            seconds = [len(images) / record["images_per_s"] for record in records if "images_per_s" in record]
            taken[name].append((seconds[0], statistics.mean(seconds[1:])))
    return {name: [statistics.median(column) for column in zip(*rounds)] for name, rounds in taken.items()}


# ------------------------------------------------------------------------------------------------------ evaluations


class Pixels(nn.Module):
    """In the place of a trunk: the image itself."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x.flatten(1)


def evaluated(folder, *words):
    """The record that an evaluation script prints last. It is kept in the folder until the trunk there is a younger one."""
    kept = folder / f"judged_{'_'.join(word.strip('-') for word in words if not word.startswith(str(folder)))}.json"
    trunk = folder / "backbone.pt"
    if not kept.exists() or (trunk.exists() and kept.stat().st_mtime < trunk.stat().st_mtime):
        print(f"{command(words)}", flush=True)
        lines = python(words, stdout=subprocess.PIPE).stdout.splitlines()
        kept.write_text(lines[-1] + "\n")
    return json.loads(kept.read_text())


def figures_of(folder, classes, *options):
    """A trunk's figures, in percent. Clusters are k-means' on its features, as many as there are classes."""
    knn = evaluated(folder, "eval_knn", str(folder), *options)
    linear = evaluated(folder, "eval_linear", str(folder), "--cache", *options)
    (clusters,) = evaluated(folder, "eval_cluster", str(folder), "--kmeans", str(classes), "--samples", "0", *options)["heads"]
    (probe,) = linear["chosen"].values()
    return {"knn": knn["top1"]["20"], "linear": probe["top1"], **{name: clusters[name] for name in ("nmi", "ami", "hungarian")}}


def own_clusters(folder):
    """The same of the clusters that a method's own heads make of the held-out images: mean over heads."""
    heads = evaluated(folder, "eval_cluster", str(folder), "--samples", "0")["heads"]
    return {name: statistics.mean(head[name] for head in heads) for name in ("clusters", "used", "nmi", "ami")}


def pixel_figures(folder, images, queries, size):
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "pixels.npz"
    if not file.exists():
        device = torch.device("cpu")
        rows = [features.extract(Pixels(), part, size, size, device) for part in (images, queries)]
        features.save(file, *rows, {"size": size, "method": "pixels", "classes": len(images.classes)})
    knn, linear = evaluated(folder, "eval_knn", str(file)), evaluated(folder, "eval_linear", str(file))
    (probe,) = linear["chosen"].values()
    return {"knn": knn["top1"]["20"], "linear": probe["top1"]}


def curve_of(folder):
    """[(epoch, 20-NN accuracy)] as the run measured it on its way."""
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(record["epoch"], record["knn_top1"]) for record in records if "knn_top1" in record]


# ---------------------------------------------------------------------------------------------------------- results


def collect(args, images, queries, seconds):
    """Everything that methods.json holds, of the finished runs in --out."""
    classes, found, floors = len(images.classes), {}, {}
    for name, title in CONTENDERS.items():
        seeds = sorted(int(path.name[len(name) + 1 :]) for path in args.out.glob(f"{name}_[0-9]*"))
        folders = {seed: folder for seed in seeds if (folder := finished(name, args, seed))}
        if not folders:
            continue
        runs = []
        for seed, folder in folders.items():
            figures = figures_of(folder, classes)
            own = {"own_clusters": own_clusters(folder)} if name in METHODS else {}
            words = training(name, args, seed, folder)
            runs.append({"seed": seed, "command": command(words), **figures, **own, "curve": curve_of(folder)})
        config = config_of(name, args, 0)
        times = {"first_epoch_s": seconds[name][0], "epoch_s": seconds[name][1]} if name in seconds else {}
        found[name] = {"title": title, "crops": config.crops[0], "batch_size": config.batch_size, **times, "runs": runs}
        if name == "lightly_swav":  # its own benchmark looks at images as large as the crops
            small = evaluated(folder, "eval_knn", str(folder), "--resize", str(config.sizes[0]), "--size", str(config.sizes[0]))
            found[name]["knn_at_the_crops_size"] = small["top1"]["20"]
        floors = floors or {"random": {"title": "random weights", **figures_of(folder, classes, "--random-init")}}
    if not found:
        sys.exit(f"error: {args.out} holds no finished run")
    floors["pixels"] = {"title": "pixels", **pixel_figures(args.out / "pixels", images, queries, config.sizes[0])}
    settings = dict(data=Path(args.data).name, images=len(images), held_out=len(queries), classes=classes, epochs=args.epochs)
    settings.update(trunk=f"{config.arch} x{config.width:g}", px=config.eval_size)
    about = {"machine": machine(torch.device("cpu")), "versions": versions(), "command": command(["benchmarks.methods", *sys.argv[1:]])}
    return {**about, "settings": settings, "methods": found, "floors": floors}


def main():
    args = arguments()
    images = data.open_images(args.data, "train", args.root)
    queries = data.open_queries(args.data, args.val, args.root)
    data.match_classes(queries, images)
    for name in args.methods:
        for seed in args.seeds or SEVERAL.get(name, [0]):
            if not finished(name, args, seed):
                words = training(name, args, seed, args.out / f"{name}_{seed}")
                print(command(words), flush=True)
                python(words)
    if args.train_only:
        return
    kept = args.out / "speed" / "speed.json"
    seconds = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [name for name in CONTENDERS if name not in seconds and finished(name, args, 0)]
    if missing:  # those that were timed another day are timed again: they must take turns
        seconds = speeds([name for name in CONTENDERS if name in seconds or name in missing], args, images)
        kept.write_text(json.dumps(seconds) + "\n")
    results = collect(args, images, queries, seconds)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(f"written to {args.results}\n\n{report.table(results)}")
    if args.results == RESULTS / "methods.json":
        report.main()


if __name__ == "__main__":
    main()
