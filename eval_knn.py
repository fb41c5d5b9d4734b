"""Weighted k-nearest-neighbour accuracy of a frozen trunk (Wu et al. 2018; the protocol of DINO's
evaluation).

Features of centre crops, compared by cosine; the k nearest training images vote for their label with weight
exp((similarity - 1) / 0.07). Nothing is trained and nothing is random, so it is the quickest honest figure.
Every image counts once, whatever the number of processes.

    python eval_knn.py runs/swav_shapes                                   # a run, on its own data
    python eval_knn.py backbone.pt --data /imagenet                       # needs train/ and val/ with class folders
    torchrun --nproc_per_node=8 eval_knn.py resnet50.pth --data /imagenet # a torchvision ResNet file, 8 GPUs
    python eval_knn.py runs/swav_shapes --random-init                     # the same trunk, untrained: the floor
    python eval_knn.py f.npz                                              # features kept by eval_linear.py --save-features f.npz
"""

import json
from pathlib import Path

import torch

from common import distributed
from common.engine.errors import ArgumentError, say
from common.engine.launch import launch
from common.evaluation import protocol as evaluation
from common.evaluation.store import load
from common.features import extract, knn_accuracy
from common.features import knn_classify as classify  # noqa: F401 (eval_knn.classify, for those who import it)


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "labelled images: the bank (default: the run's)",
                               "labelled images to classify (default: the val split of --data)")
    parser.add_argument("--k", type=int, nargs="+", default=[10, 20, 100, 200],
                        help="numbers of neighbours (default: 10 20 100 200)")
    parser.add_argument("--temperature", type=float, default=0.07, help="of the votes (default: 0.07)")
    parser.add_argument("--batch-size", type=int, default=256,
                        help="images at a time on each process (default: 256)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bfloat16", "float32"),
                        help="of the trunk (default: auto)")
    return parser.parse_args(argv)


def main(args):
    device = distributed.start(args.device)
    if min(args.k) < 1 or not args.temperature > 0 or args.batch_size < 1:
        raise ArgumentError(f"--k {args.k} --temperature {args.temperature} --batch-size {args.batch_size}: "
                            f"more than 0 is needed")
    evaluation.check(args)
    if evaluation.is_features(args):
        bank_rows, query_rows, info = load(args.trunk)
        counts = [int(distributed.all_sum(torch.tensor(len(labels)))) for _, labels in (bank_rows,
                                                                                        query_rows)]
        classes = 1 + int(distributed.all_max(bank_rows[1].max() if len(bank_rows[1]) else torch.tensor(-1)))
        bank_rows, query_rows = ((x.to(device), labels) for x, labels in (bank_rows, query_rows))
        size = info.get("size")
    else:
        trunk, info = evaluation.open_trunk(args)
        bank, queries = evaluation.open_labelled(args)
        trunk = trunk.to(device, memory_format=torch.channels_last)
        size = info["size"]
        bank_rows, query_rows = (extract(trunk, images, info["resize"], size, **evaluation.extraction(
            args, info, device)) for images in (bank, queries))
        for images, (_, labels), name in ((bank, bank_rows, "--data"), (queries, query_rows, "--val")):
            evaluation.warn_of_unreadable(images, labels, name)
        counts, classes = [len(bank), len(queries)], len(bank.classes)
    accuracy = knn_accuracy(*bank_rows, *query_rows, args.k, args.temperature)

    say(f"{args.trunk}: {evaluation.name(info)}, {bank_rows[0].shape[1]} features of {size or 'unknown'} px")
    say(f"{counts[0]} images vote on {counts[1]}, {classes} classes, temperature {args.temperature:g}")
    voters = int(distributed.all_sum((bank_rows[1] >= 0).sum()))
    say("    k    top-1    top-5")
    for k in args.k:
        if k not in accuracy:
            say(f"{k:5}    skipped: only {voters} images can vote")
            continue
        top1, top5 = accuracy[k]
        say(f"{k:5}  {top1:7.2f}  " + (f"{top5:7.2f}" if top5 is not None else "      -"))
    record = {"trunk": str(args.trunk), **{key: info.get(key) for key in ("method", "arch", "epoch")},
              **{"bank": counts[0], "queries": counts[1], "classes": classes},
              "top1": {k: round(a, 4) for k, (a, _) in accuracy.items()},
              "top5": {k: round(a, 4) for k, (_, a) in accuracy.items() if a is not None}}
    say(json.dumps(record))
    if Path(args.trunk).is_dir():
        evaluation.write(Path(args.trunk) / f"{'_'.join(['eval_knn', *['random'] * args.random_init])}.json",
                         record)


if __name__ == "__main__":
    launch(main, arguments())
