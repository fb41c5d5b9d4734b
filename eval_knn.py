"""Weighted k-nearest-neighbour accuracy of a frozen trunk (Wu et al. 2018; as DINO evaluates).

Compares features of centre crops by cosine similarity. The k nearest training images vote for their label
with weight exp((similarity - 1) / 0.07). Nothing is trained and nothing is random, so this is the quickest
trustworthy figure. Each image counts once, on any number of processes.

    python eval_knn.py runs/swav_shapes                   # a run, on its own data
    python eval_knn.py backbone.pt --data /imagenet       # needs train/ and val/ with class folders
    torchrun --nproc_per_node=8 eval_knn.py resnet50.pth --data /imagenet  # a torchvision file, 8 GPUs
    python eval_knn.py runs/swav_shapes --random-init     # the same trunk with random weights: the floor
    python eval_knn.py f.npz                              # features saved by eval_linear.py --save-features
"""

import torch

from common import distributed
from common.engine.errors import say
from common.engine.launch import launch
from common.evaluation import protocol as evaluation
from common.evaluation.store import load
from common.features import extract, knn_accuracy
from common.features import knn_classify as classify  # noqa: F401 (eval_knn.classify, for those who import it)


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "labelled images that vote (default: the run's)",
                               "labelled images to classify (default: the val split of --data)",
                               batch_size=256)
    add = parser.add_argument
    add("--k", type=int, nargs="+", default=[10, 20, 100, 200],
        help="numbers of neighbours (default: 10 20 100 200)")
    add("--temperature", type=float, default=0.07, help="temperature of the votes (default: 0.07)")
    return parser.parse_args(argv)


def main(args):
    device = evaluation.start(args)
    fine = min(*args.k, args.batch_size) > 0 and args.temperature > 0
    evaluation.need(fine, args, "k temperature batch_size", "more than 0 is needed")
    if evaluation.is_features(args):
        *sets, info = load(args.trunk)
        (bank, labels), (queries, truth) = ((x.to(device), y) for x, y in sets)
        counts = [int(distributed.all_sum(torch.tensor(len(y)))) for y in (labels, truth)]
        classes = info["classes"]
    else:
        trunk, info = evaluation.open_trunk(args, device)
        how = evaluation.extraction(args, info, device, args.batch_size)
        images = evaluation.open_labelled(args, info)
        (bank, labels), (queries, truth) = (extract(trunk, part, **how) for part in images)
        for part, found, option in zip(images, (labels, truth), ("--data", "--val")):
            evaluation.warn_of_unreadable(part, found, option)
        counts, classes = [len(part) for part in images], len(images[0].classes)
    accuracy = knn_accuracy(bank, labels, queries, truth, args.k, args.temperature)

    px = info.get("size") or "unknown"
    say(f"{args.trunk}: {evaluation.name(info)}, {bank.shape[1]} features of {px} px")
    say(f"{counts[0]} images vote on {counts[1]}, {classes} classes, temperature {args.temperature:g}")
    voters = int(distributed.all_sum((labels >= 0).sum()))
    say("    k    top-1    top-5")
    for k in args.k:
        if k not in accuracy:
            say(f"{k:5}    skipped: only {voters} images can vote")
            continue
        top1, top5 = accuracy[k]
        say(f"{k:5}  {top1:7.2f}  " + (f"{top5:7.2f}" if top5 is not None else "      -"))
    record = {"bank": counts[0], "queries": counts[1], "classes": classes,
              "top1": {k: round(a, 4) for k, (a, _) in accuracy.items()},
              "top5": {k: round(a, 4) for k, (_, a) in accuracy.items() if a is not None}}
    evaluation.finish(args, info, "eval_knn", record)


if __name__ == "__main__":
    launch(main, arguments())
