"""Compares all methods side by side: same trunk, images, epochs and evaluations, with floors, a ceiling and a
peer.

    # 10,000 images: hours on two CPU cores
    python -m benchmarks.methods --data list.txt --root train --val val
    # minutes
    python -m benchmarks.methods --data shapes:400 --epochs 1 --out runs/try --results runs/try/methods.json

Each run is made by its own script with its recipe `cifar`, in OUT/NAME_SEED. The same command resumes:
finished runs are not repeated, and stopped ones go on. Then the evaluation scripts judge each run, and all
are timed in turns, on a machine that should do nothing else. Floors: the network with random weights, and the
pixels themselves. Ceiling: the network trained with labels. Peer: lightly's SwAV. All finished runs in OUT
are written to benchmarks/results/methods.json, and from there to the table of docs/results.md and its
learning curves.
"""

import argparse
import importlib
import json
import shutil
import statistics
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import eval_cluster
from benchmarks import report
from benchmarks.record import command, curve_of, finished, metrics, origin
from common import data, distributed, features
from common.engine.held_out import match_classes, open_queries
from common.engine.launch import autocast_dtype, launch
from common.engine.options import recipe
from common.evaluation import store
from common.kmeans import kmeans, nearest
from common.sources.files import Files
from common.weights import build_backbone, load_backbone

METHODS = {"swav": "SwAV", "deepclusterv2": "DeepCluster-v2", "selav2": "SeLa-v2"}
METHODS |= {"deepcluster": "DeepCluster", "odc": "ODC", "sela": "SeLa"}
PEER = "lightly_swav"
CONTENDERS = {**METHODS, PEER: "SwAV of lightly", "supervised": "with labels"}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10",
                        help="labelled images; only the ceiling trains on labels (default: cifar10)")
    parser.add_argument("--root", default="", help="folder that relative paths of a list file start from")
    parser.add_argument("--val", default="", help="held-out images (default: the val split of --data)")
    parser.add_argument("--arch", default="resnet10", help="trunk of all contenders (default: resnet10)")
    parser.add_argument("--width", type=float, default=0.5, help="factor of the channels (default: 0.5)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--methods", nargs="+", default=list(CONTENDERS), choices=CONTENDERS,
                        help="runs to make (default: all)")
    parser.add_argument("--seeds", type=int, nargs="+",
                        help="default: 0 1 2, for the ceiling 0")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--workers", type=int, default=-1)
    parser.add_argument("--rounds", type=int, default=3, help="rounds of timing; 0: none (default: 3)")
    parser.add_argument("--train-only", action="store_true", help="make the runs, and stop")
    parser.add_argument("--results", type=Path, default=report.RESULTS,
                        help="file to write; only the default one updates docs/results.md")
    return parser.parse_args(argv)


# ------------------------------------------------------------------------------------------------------- runs


def module_of(name):
    return importlib.import_module(name if name in METHODS else f"benchmarks.{name}")


def config_of(name, args, seed):
    module = module_of(name)
    given = dict(data=args.data, root=args.root, val=args.val, arch=args.arch, width=args.width,
                 epochs=args.epochs, seed=seed)
    return replace(recipe(module.Config, module.RECIPES, "cifar"), **given)


def training(name, args, seed, out, **others):
    """Returns the words after `python -m` that make a run."""
    names = ("data", "root", "val", "arch", "width", "epochs", "workers")
    options = {key: getattr(args, key) for key in names} | dict(recipe="cifar", seed=seed)
    options |= dict(eval_every=max(1, args.epochs // 4), out=out) | others
    words = [(f"--{key.replace('_', '-')}", str(value)) for key, value in options.items() if value != ""]
    return [module_of(name).__name__, *(word for pair in words for word in pair)]


def made(name, args, seed):
    """Returns the directory of a finished run, or None. Exits if it was made with other options."""
    run = args.out / f"{name}_{seed}"
    # without a run its module is not imported: it may need a package that is not installed
    there = (run / "done.json").exists()
    return run if there and finished(config_of(name, args, seed), run) else None


def python(words, **how):
    process = subprocess.run([sys.executable, "-m", *words], text=True, **how)
    if process.returncode:  # the process has printed the reason
        sys.exit(process.returncode)
    return process


def speeds(names, args, images):
    """Returns {name: (seconds of the first epoch, of a later one)}: medians over rounds in which all take
    turns, three epochs each.

    Passes over the data, clustering and labelling are included. The two later epochs are averaged, as SeLa
    labels only in every other epoch. Files are timed on an eighth of them and scaled up: nearly every part
    grows with their number. The peer is also timed in bfloat16.
    """
    contenders = {name: (name, {}) for name in names}
    if PEER in names:
        contenders[f"{PEER}, bfloat16"] = PEER, dict(precision="bfloat16")
    folder = args.out / "speed"
    folder.mkdir(parents=True, exist_ok=True)
    spec, count = dict(data=args.data, root=args.root), len(images)
    if isinstance(images, Files):
        some = range(0, count, 8)
        lines = [f"{images.paths[i]},{images.classes[images.labels[i]]}\n" for i in some]
        (folder / "images.txt").write_text("".join(lines), errors="surrogateescape")
        spec, count = dict(data=folder / "images.txt", root=images.root), len(some)
    taken = {title: [] for title in contenders}
    for _ in range(args.rounds):
        for title, (name, others) in contenders.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            steps = count // config_of(name, args, 0).batch_size
            often = dict(epochs=max(3, args.epochs), max_steps=3 * steps, log_every=steps, eval_every=0,
                         save_every=1e6)
            python(training(name, args, 0, folder / name, **spec, **often, **others))
            seconds = [len(images) / record["images_per_s"] for record in metrics(folder / name)
                       if "images_per_s" in record]
            taken[title].append((seconds[0], statistics.mean(seconds[1:])))
    return {name: [statistics.median(column) for column in zip(*rounds)] for name, rounds in taken.items()}


# ------------------------------------------------------------------------------------------------ evaluations


class Pixels(nn.Module):
    """Stands for a trunk: its features are the image itself."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))  # features.extract reads a parameter's dtype

    def forward(self, x):
        return x.flatten(1)


def judge(trunk, info, images, queries, folder, linear_words, workers, precision="auto"):
    """Returns figures of a trunk's features in percent, as the evaluation scripts compute them: 20-NN, a
    linear classifier (last epoch, the best of its rates), and agreement of the classes with k-means clusters
    (one per class; fitted to training images, applied to held-out ones). Keeps them in the folder until
    backbone.pt there is newer. linear_words: arguments of eval_linear.py; if empty, it gets the saved
    features. precision: of the run."""
    kept, file = folder / f"figures_{info['size']}.json", folder / f"features_{info['size']}.npz"
    saved = folder / "backbone.pt"
    if kept.exists() and not (saved.exists() and saved.stat().st_mtime > kept.stat().st_mtime):
        return json.loads(kept.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    device, classes = distributed.start(), len(images.classes)
    how = dict(workers=workers, precision=autocast_dtype(precision, device))
    sets = (features.extract(trunk.to(device), part, info["resize"], info["size"], device, **how)
            for part in (images, queries))
    bank, held_out = ([t.cpu() for t in part] for part in sets)
    if not linear_words:
        store.save(file, bank, held_out, info)
    process = python(["eval_linear", *(linear_words or [str(file)]), "--workers", str(workers), "--precision",
                      precision], stdout=subprocess.PIPE)
    (probe,) = json.loads(process.stdout.splitlines()[-1])["chosen"].values()
    centroids, *_ = kmeans(F.normalize(bank[0].float()), classes, 50,
                           generator=torch.Generator().manual_seed(0))
    clusters, labels = nearest(F.normalize(held_out[0].float()), centroids)[0].numpy(), held_out[1].numpy()
    agreement = eval_cluster.judge(clusters, labels)
    figures = {"knn": features.knn_accuracy(*bank, *held_out, k=20)[20][0], "linear": probe["top1"]}
    figures |= {name: agreement[name] for name in ("nmi", "ami", "hungarian")}
    kept.write_text(json.dumps(figures) + "\n")
    print(f"{folder}: {figures}", flush=True)
    return figures


# ---------------------------------------------------------------------------------------------------- results


def collect(args, images, queries, seconds):
    """Returns everything that methods.json holds, from the finished runs in --out."""
    found = {}
    for name, title in CONTENDERS.items():
        seeds = sorted(int(path.name.removeprefix(f"{name}_")) for path in args.out.glob(f"{name}_[0-9]*"))
        folders = {seed: folder for seed in seeds if (folder := made(name, args, seed))}
        runs = []
        for seed, folder in folders.items():
            trunk, info = load_backbone(folder)
            words, precision = [str(folder), "--cache"], config_of(name, args, seed).precision
            figures = judge(trunk, info, images, queries, folder, words, args.workers, precision)
            small = {**info, "resize": 32, "size": 32}
            if name == PEER:  # lightly's own benchmark evaluates at this size
                smaller = [*words, "--resize", "32", "--size", "32"]
                figures["knn_at_32_px"] = judge(trunk, small, images, queries, folder, smaller, args.workers,
                                                precision)["knn"]
            line = command(training(name, args, seed, folder))
            runs.append({"seed": seed, "command": line, **figures, "curve": curve_of(folder)})
        if runs:
            config = config_of(name, args, 0)
            times = dict(zip(("first_epoch_s", "epoch_s"), seconds.get(name, [])))
            if name == PEER and times:
                times["bfloat16"] = dict(zip(times, seconds[f"{PEER}, bfloat16"]))
            found[name] = {"title": title, "crops": config.crops[0], "batch_size": config.batch_size, **times,
                           "runs": runs}
    if not found:
        sys.exit(f"error: {args.out} holds no finished run")
    torch.manual_seed(0)
    # info is of the last run: all have the same trunk
    untrained, there = build_backbone(info), args.out / "random_weights"
    floors = {"random weights": judge(untrained, info, images, queries, there, [*words, "--random-init"],
                                      args.workers)}
    floors["pixels"] = judge(Pixels(), small, images, queries, args.out / "pixels", [], args.workers)
    settings = dict(data=Path(args.data).name, images=len(images), held_out=len(queries),
                    classes=len(images.classes), epochs=args.epochs)
    settings.update(trunk=f"{config.arch} x{config.width:g}", px=config.eval_size)
    return {**origin("methods", distributed.start()), "settings": settings, "methods": found,
            "floors": floors}


def main(args):
    images = data.open_images(args.data, "train", args.root)
    queries = open_queries(args.data, args.val, args.root)
    match_classes(queries, images)
    for name in args.methods:
        for seed in args.seeds or ([0] if name == "supervised" else [0, 1, 2]):
            if not made(name, args, seed):
                words = training(name, args, seed, args.out / f"{name}_{seed}")
                print(command(words), flush=True)
                python(words)
    if args.train_only:
        return
    kept = args.out / "speed" / "speed.json"
    seconds = json.loads(kept.read_text()) if kept.exists() else {}
    missing = [name for name in CONTENDERS if name not in seconds and made(name, args, 0)]
    if missing and args.rounds:  # time all again: figures compare only if they took turns
        seconds = speeds([name for name in CONTENDERS if name in seconds or name in missing], args, images)
        kept.write_text(json.dumps(seconds) + "\n")
    results = collect(args, images, queries, seconds)
    print(report.table(results))
    absent = [name for name in CONTENDERS if name not in results["methods"]]
    if args.results == report.RESULTS and absent:
        return print(f"\nnothing is written: {args.out} lacks runs of {', '.join(absent)} (--results FILE "
                     f"writes what there is)")
    args.results.parent.mkdir(parents=True, exist_ok=True)
    args.results.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten to {args.results}")
    if args.results == report.RESULTS:
        report.main()


if __name__ == "__main__":
    launch(main, arguments())
