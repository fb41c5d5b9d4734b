"""Compares balanced assignment of a data set with float64 NumPy up to the published stopping rule, and with
POT for 100 iterations.

    python -m benchmarks.sinkhorn                       # 200,000 x 1,000; POT 20,000 x 1,000: minutes
    python -m benchmarks.sinkhorn --samples 20000 --rounds 1                    # a quick look
    pip install pot                                     # without it, the comparison with POT is left out

Every run has a fresh process with the same threads and the same float32 log-probabilities. Time counts from
there to the assignments. Memory is what the process adds at its peak, the log-probabilities (N x K x 4 bytes)
included.
"""

import argparse
import math
import multiprocessing
import os
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch

from benchmarks.record import medians, resident, write
from common.sinkhorn import balanced_assignments

IMAGENET, CLASSES, HEADS = 1_281_167, 3000, 10
LAM = 25.0


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=200_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--spread", type=float, default=0.4,
                        help="standard deviation of the logits: more takes more iterations (default: 0.4)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are reported (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads of every contender (default: 2)")
    return parser.parse_args()


def log_probabilities(N, K, spread, seed=0):
    """Draws log-probabilities (N, K) float32 of a linear classifier that prefers some of its classes, on
    features of 64 dimensions."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(64, K, generator=generator) / 8, torch.randn(K, generator=generator) / 2
    scores = torch.empty(N, K)
    for rows in scores.split(4096):
        features = torch.randn(len(rows), 64, generator=generator)
        torch.log_softmax(torch.addmm(bias, features, weight).mul_(spread / math.sqrt(1.25)), 1, out=rows)
    return scores


# ---- contenders: log-probabilities -> assignments, iterations


def reference(scores, tolerance=0.1):
    """Runs the published iteration. Each iteration reads a float64 matrix A twice."""
    x = scores.numpy()
    N, K = x.shape
    A = np.empty((N, K))
    np.exp(np.multiply(x, LAM, out=A), out=A)
    c, error, count = np.full(N, 1 / N), math.inf, 0
    while error > tolerance:
        r = (1 / K) / (c @ A)
        new = (1 / N) / (A @ r)
        if count % 10 == 0:
            error = np.abs(c / new - 1).sum()
        c, count = new, count + 1
    A *= r
    return torch.from_numpy(A.argmax(1)), count


def published(scores, **options):
    y, _, _, iterations = balanced_assignments(scores, LAM, rule="reference", **options)
    return y, iterations


def published_in_place(scores):
    return published(scores, in_place=True)


def marginal(scores):
    y, _, _, iterations = balanced_assignments(scores, LAM)
    return y, iterations


def limited(scores, iterations=100):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y, _, _, count = balanced_assignments(scores, LAM, 0, iterations)
    return y, count


def pot(scores, iterations=100):
    import ot

    N, K = scores.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT warns that it has not converged
        plan = ot.sinkhorn(np.full(N, 1 / N), np.full(K, 1 / K), -scores.numpy().astype(np.float64), 1 / LAM,
                           numItermax=iterations, stopThr=0)
    return torch.from_numpy(plan.argmax(1)), iterations


def first_iterations(scores):
    """Returns seconds for 5 iterations and for 25 in float32, the labels included."""
    taken = []
    for iterations in (5, 25):
        start = time.perf_counter()
        limited(scores, iterations)
        taken.append(time.perf_counter() - start)
    return torch.tensor(taken), iterations


# ---- runs


def measure(contender, problem, threads):
    """Returns seconds, bytes added at the peak, and what the contender returns."""
    torch.set_num_threads(threads)
    # warm up: libraries take their memory and start their threads
    contender(log_probabilities(4 * problem[1], *problem[1:]))
    empty = resident("VmRSS")
    scores = log_probabilities(*problem)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak size
    start = time.perf_counter()
    result = contender(scores)
    return time.perf_counter() - start, resident() - empty, *result


def fresh(contender, problem, threads):
    for library in ("OMP", "OPENBLAS", "MKL"):
        os.environ[f"{library}_NUM_THREADS"] = str(threads)  # read when a process starts
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(measure, (contender, problem, threads))


def race(contenders, problem, args):
    """Returns the figures of all contenders, each relative to the first."""
    runs = {name: [] for name in contenders}

    def turn(name):
        runs[name].append(fresh(contenders[name], problem, args.threads))
        return runs[name][-1][0]

    seconds = medians(args.rounds, **{name: lambda name=name: turn(name) for name in contenders})
    (first, *others), label, figures = contenders, f"{problem[0]} x {problem[1]}: ", {}
    for name in contenders:
        _, memory, _, iterations = runs[name][-1]
        figures[f"{label}{name}, s"] = seconds[name]
        figures[f"{label}{name}, iterations"] = iterations
        figures[f"{label}{name}, MiB"] = memory / 2**20
    for name in others:
        figures[f"{label}{name} / {first}, time"] = seconds[name] / seconds[first]
        figures[f"{label}{name} / {first}, memory"] = runs[name][-1][1] / runs[first][-1][1]
        figures[f"{label}{name} and {first}, equal labels, %"] = 100 * float(
            (runs[name][-1][2] == runs[first][-1][2]).double().mean())
    return figures


def imagenet(args, iterations):
    """Extrapolates one labelling of ImageNet by 10 heads of 3,000 classes from the time of 20,000 rows."""
    N = max(4 * CLASSES, min(20_000, args.samples))
    taken = [fresh(first_iterations, (N, CLASSES, args.spread), args.threads)[2] for _ in range(args.rounds)]
    few, many = torch.stack(taken).median(0).values.mul(IMAGENET / N).tolist()
    each = (many - few) / 20
    label = f"{IMAGENET} x {CLASSES}, "
    return {f"{label}s an iteration (extrapolated)": each,
            f"{label}s before and after them (extrapolated)": few - 5 * each,
            f"{label}{HEADS} heads, {iterations} iterations, h (extrapolated)": HEADS
            * (few + (iterations - 5) * each) / 3600, f"{label}held, GiB": IMAGENET * CLASSES * 4 / 2**30}


def main():
    args = arguments()
    settings = dict(rounds=args.rounds, threads=args.threads, spread=args.spread, numpy=np.__version__)
    contenders = {"NumPy, float64": reference, "published rule": published,
                  "published rule in place": published_in_place, "marginal rule": marginal}
    problem = (args.samples, args.classes, args.spread)
    figures = race(contenders, problem, args)
    try:
        settings["pot"] = version("pot")
    except PackageNotFoundError:
        print("without POT: pip install pot")
    else:
        figures.update(race({"POT, 100 iterations": pot, "ours, 100 iterations": limited},
                            (min(20_000, args.samples), *problem[1:]), args))
    figures.update(imagenet(args, 100))
    write("sinkhorn", torch.device("cpu"), settings, figures)


if __name__ == "__main__":
    main()
