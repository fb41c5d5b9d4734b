"""Weighted k-nearest-neighbour accuracy of a frozen trunk (Wu et al. 2018; the protocol of DINO's evaluation).

Features of centre crops, compared by cosine; the k nearest training images vote for their label with weight
exp((similarity - 1) / 0.07). Nothing is trained and nothing is random, so it is the quickest honest figure. Every image
counts once, whatever the number of processes.

    python eval_knn.py runs/swav_shapes                                   # a run, on its own data
    python eval_knn.py backbone.pt --data /imagenet                       # needs train/ and val/ with class folders
    torchrun --nproc_per_node=8 eval_knn.py resnet50.pth --data /imagenet # a torchvision ResNet file, 8 GPUs
    python eval_knn.py runs/swav_shapes --random-init                     # the same trunk, untrained: the floor
"""

import argparse
import json
from pathlib import Path

import torch

from common import checkpoint, data, distributed
from common.config import ArgumentError, Parser
from common.features import classify as classify  # eval_knn.classify, for those who import it
from common.features import extract, knn_accuracy
from common.multicrop import MEAN, STD
from common.run import autocast_dtype, launch, say


def arguments(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("trunk", help="a run directory, a backbone.pt or a torchvision ResNet file")
    parser.add_argument("--data", default="", help="labelled images: the bank (default: the run's)")
    parser.add_argument("--val", default="", help="labelled images to classify (default: the val split of --data)")
    parser.add_argument("--root", default="", help="folder that relative paths of list files start from")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200], help="numbers of neighbours (default: 10 20 100 200)")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes (default: 0.07)")
    parser.add_argument(
        "--resize", type=int, default=0, help="short side before the centre crop (default: as trained, 256 for a torchvision file)"
    )
    parser.add_argument("--size", type=int, default=0, help="side of the centre crop (default: as trained, 224 for a torchvision file)")
    parser.add_argument("--random-init", action="store_true", help="replace the weights by random ones")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time on each process (default: 256)")
    parser.add_argument(
        "--workers", type=int, default=-1, help="loader processes per rank (default: its share of the CPU cores, at most 8)"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "bfloat16", "float32"), help="of the trunk (default: auto)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return parser.parse_args(argv)


def load(args):
    """The trunk, its info, and the images of the bank and the queries that the arguments name."""
    trunk, info = checkpoint.load_backbone(args.trunk)
    saved = Path(args.trunk) / "config.json"
    try:
        run = json.loads(saved.read_text()) if saved.is_file() else {}
    except ValueError:
        raise checkpoint.CheckpointError(f"{saved} is damaged") from None
    spec = args.data or run.get("data") or ("shapes" if run else "")
    if not spec:
        raise ArgumentError("--data is needed: the labelled images that vote")
    # What the run was trained on comes with its own root and held-out images; other data does not.
    root, val = (args.root, args.val) if args.data else (args.root or run.get("root", ""), args.val or run.get("val", ""))
    bank = data.open_images(spec, "train", root)
    queries = data.open_queries(spec, val, root)
    if queries.fingerprint == bank.fingerprint:
        raise data.DataError("--data and --val are the same images: each would find itself")
    for images, name in ((bank, "--data"), (queries, "--val")):
        if images.labels is None:
            raise data.DataError(f"{name} has no labels: class folders, or a list with labels, are needed")
    data.match_classes(queries, bank)
    return trunk, info, bank, queries


def main(args):
    device = distributed.start(args.device)
    if min(args.k) < 1 or not args.temperature > 0 or args.batch_size < 1:
        raise ArgumentError(f"--k {args.k} --temperature {args.temperature} --batch-size {args.batch_size}: more than 0 is needed")
    if args.resize < 0 or args.size < 0 or args.workers < -1:
        raise ArgumentError(f"--resize {args.resize} --size {args.size} --workers {args.workers}: 0 or more is needed")
    trunk, info, bank, queries = distributed.from_main(load, args)
    if args.random_init:
        torch.manual_seed(0)
        trunk, info = checkpoint.build_backbone(info), {**info, "method": "random weights"}
    trunk = trunk.to(device, memory_format=torch.channels_last)
    resize, size = args.resize or info["resize"], args.size or info["size"]
    options = dict(
        device=device,
        mean=info.get("mean", MEAN),
        std=info.get("std", STD),
        batch_size=args.batch_size,
        workers=args.workers,
        precision=autocast_dtype(args.precision, device),
    )
    bank_rows = extract(trunk, bank, resize, size, **options)
    query_rows = extract(trunk, queries, resize, size, **options)
    accuracy = knn_accuracy(*bank_rows, *query_rows, args.k, args.temperature)

    say(f"{args.trunk}: {info['arch']} x{info['width']:g}, {info['method']}, {trunk.feature_dim} features of {size} px")
    say(f"{len(bank)} images vote on {len(queries)}, {len(bank.classes)} classes, temperature {args.temperature:g}")
    voters = int(distributed.all_sum((bank_rows[1] >= 0).sum()))
    for images, (_, labels), name in ((bank, bank_rows, "--data"), (queries, query_rows, "--val")):
        unreadable = int(distributed.all_sum((labels < 0).sum())) - int((images.labels < 0).sum())  # STL-10 has images without a label
        if unreadable:
            say(f"warning: {unreadable} images of {name} cannot be read and are left out")
    say("    k    top-1    top-5")
    for k in args.k:
        if k not in accuracy:
            say(f"{k:5}    skipped: only {voters} images can vote")
            continue
        top1, top5 = accuracy[k]
        say(f"{k:5}  {top1:7.2f}  " + (f"{top5:7.2f}" if top5 is not None else "      -"))
    record = {
        "trunk": str(args.trunk),
        "method": info["method"],
        "arch": info["arch"],
        "epoch": info.get("epoch"),
        "bank": len(bank),
        "queries": len(queries),
        "classes": len(bank.classes),
        "top1": {k: round(a, 4) for k, (a, _) in accuracy.items()},
        "top5": {k: round(a, 4) for k, (_, a) in accuracy.items() if a is not None},
    }
    say(json.dumps(record))


if __name__ == "__main__":
    launch(main, arguments())
