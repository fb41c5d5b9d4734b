"""Estimates the time of eval_svm.py's VOC 2007 SVMs at full size from a few of them.

    python -m benchmarks.svm                   # 2 classes x 3 costs on 5,011 x 2,048 random features: minutes
    python -m benchmarks.svm --features 8192   # as many as feature5 has

Fits three costs of the published grid (the smallest, the middle and the largest), each with its three folds,
one at a time on one core, and counts CPU time. The time of other costs is interpolated in the logarithm of
the cost, and summed over 19 costs and 20 classes. Random features say nothing about the classes, so a
network's should be faster to separate.
"""

import argparse
import time
from importlib.metadata import version

import numpy as np
import torch

from benchmarks.record import write
from eval_svm import COSTS, fit, unit

ROWS, TEST, CLASSES = 5011, 4952, 20


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--classes", type=int, default=2, help="classes to fit (default: 2)")
    return parser.parse_args()


def main():
    args = arguments()
    rng = np.random.default_rng(0)
    # about the share of positives in VOC's 20 classes
    targets = (rng.random((ROWS + TEST, args.classes)) < 0.07).astype(np.int64)
    # none below 0, as after a ReLU
    x = unit(torch.from_numpy(np.maximum(rng.standard_normal((ROWS + TEST, args.features)), 0)))
    costs = sorted(COSTS["openselfsup"])
    measured, seconds, stopped = [costs[0], costs[len(costs) // 2], costs[-1]], [], 0
    for cost in measured:
        started = time.process_time()
        for c in range(args.classes):
            y = np.where(targets[:ROWS, c] == 1, 1, -1)
            stopped += fit(x[:ROWS], slice(None), y, x[ROWS:], targets[ROWS:, c], cost, "all_points")[2]
        seconds.append((time.process_time() - started) / args.classes)
    total = CLASSES * np.interp(np.log(costs), np.log(measured), seconds).sum()
    figures = {f"seconds, one class and cost {cost:g}, 3 folds": s for cost, s in zip(measured, seconds)}
    figures |= {"fits that ended at 2,000 iterations": stopped,
                "minutes on one core, 20 classes and 19 costs": total / 60}
    settings = {"features": args.features, "classes": args.classes, "train": ROWS, "test": TEST,
                "scikit-learn": version("scikit-learn")}
    write("svm" if args.features == 2048 else f"svm_{args.features}", torch.device("cpu"), settings, figures)


if __name__ == "__main__":
    main()
