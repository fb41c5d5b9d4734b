"""Compares k-means with faiss-cpu and scikit-learn: same rows, first centroids and number of iterations, in
one run.

    python -m benchmarks.kmeans                                            # half an hour on a CPU
    python -m benchmarks.kmeans --problems 20000x128x3000 --iterations 3   # minutes

On a CPU the problems are 200,000 x 128, K 3,000 and 100,000 x 256, K 10,000.
Each contender updates its centroids `iterations` times and then assigns once more. The objective is
recomputed from the centroids that each returns, in the same way for all. Rates count matrix products alone, 2
(iterations + 1) N K D operations, as a share of what torch.mm reaches on square matrices in the same rounds.
On a GPU ours runs alone, on larger problems.
"""

import argparse
import multiprocessing
import time
from importlib.metadata import version
from pathlib import Path

import torch

from benchmarks.record import medians, resident, write
from common import distributed
from common.kmeans import held_scores, kmeans, nearest

IMAGENET = 1_281_167


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", nargs="+",
                        help="NxDxK each (default: see above; on a GPU ImageNet's 1,281,167 rows)")
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are reported (default: 3)")
    parser.add_argument("--threads", type=int, default=2,
                        help="threads of every contender on a CPU (default: 2)")
    parser.add_argument("--without", nargs="+", default=[], choices=("faiss", "scikit-learn"),
                        help="contenders to leave out")
    return parser.parse_args()


def rows(N, D, seed=0, device="cpu"):
    """Draws unit rows (N, D) near a curved surface of 16 dimensions, on which k-means takes more iterations
    to converge than are timed here."""
    generator = torch.Generator(device).manual_seed(seed)
    weight = torch.randn(16, D, generator=generator, device=device)
    x = (torch.randn(N, 16, generator=generator, device=device) @ weight).tanh_()
    x += 0.1 * torch.randn(N, D, generator=generator, device=device)
    return torch.nn.functional.normalize(x)


def seconds(function, device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ours(x, init, iterations):
    return kmeans(x, len(init), iterations, init=init)[0]


def spherical(x, init, iterations):
    return kmeans(x, len(init), iterations, init=init, spherical=True)[0]


def with_faiss(x, init, iterations):
    import faiss

    clustering = faiss.Kmeans(x.shape[1], len(init), niter=iterations, max_points_per_centroid=len(x),
                              min_points_per_centroid=1)
    clustering.train(x.numpy(), init_centroids=init.numpy())
    clustering.index.search(x.numpy(), 1)
    return torch.from_numpy(clustering.centroids)


def with_sklearn(x, init, iterations):
    from sklearn.cluster import KMeans

    clustering = KMeans(len(init), init=init.numpy(), n_init=1, max_iter=iterations, tol=0)
    return torch.from_numpy(clustering.fit(x.numpy()).cluster_centers_)


def square_product(device):
    """Returns a function that multiplies square matrices, and the number of its operations."""
    n = 16384 if device.type == "cuda" else 4096
    a, b, c = (torch.randn(n, n, device=device) for _ in range(3))
    return lambda: torch.mm(a, b, out=c), 2 * n**3


def race(problem, args, device):
    N, D, K = problem
    x = rows(N, D, device=device)
    init = x[torch.randperm(N, generator=torch.Generator().manual_seed(1))[:K].to(device)]
    contenders = {"ours": ours, "ours, spherical": spherical}
    if device.type == "cpu":
        others = {"faiss": with_faiss, "scikit-learn": with_sklearn}
        contenders.update({name: f for name, f in others.items() if name not in args.without})
    centroids = {}

    def timed(name, function):
        def run():
            centroids[name] = function(x, init, args.iterations)

        return lambda: seconds(run, device)

    product, operations = square_product(device)
    product()
    for function in contenders.values():  # warm up: libraries take their memory and start their threads
        function(x[: 2 * K], init[: K // 2], 1)
    turns = {name: timed(name, function) for name, function in contenders.items()}
    taken = medians(args.rounds, **turns, product=lambda: seconds(product, device))
    rate = operations / taken["product"]
    objectives = {name: nearest(x, c.to(device))[1].double().mean() for name, c in centroids.items()}
    label = f"{N} x {D}, K {K}: "
    figures = {f"{label}torch.mm, GFLOP/s": rate / 1e9}
    for name in contenders:
        figures[f"{label}{name}, s"] = taken[name]
        products = 2 * (args.iterations + 1) * N * K * D
        figures[f"{label}{name}, share of torch.mm"] = products / taken[name] / rate
    for name in contenders.keys() - {"ours", "ours, spherical"}:
        figures[f"{label}ours / {name}, time"] = taken["ours"] / taken[name]
        figures[f"{label}ours / {name} - 1, objective"] = float(objectives["ours"] / objectives[name] - 1)
    figures[f"{label}{IMAGENET} rows, s (extrapolated)"] = taken["ours"] * IMAGENET / N
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        figures[f"{label}memory beyond x, MiB"] = fresh.apply(peak, (problem, args.threads, device)) / 2**20
    figures[f"{label}memory by the formula, MiB"] = (24 * N + 28 * K * D + 12 * held_scores(device)) / 2**20
    return figures


def peak(problem, threads, device):
    """Returns the bytes that k-means adds to the peak memory of this process or of the GPU."""
    torch.set_num_threads(threads)
    N, D, K = problem
    x = rows(N, D, device=device)
    kmeans(x[:2000], 10, 1)  # warm up: libraries take their own memory
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kmeans(x, K, 1)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak size
    before = resident()
    kmeans(x, K, 1)
    return resident() - before


def main():
    args = arguments()
    device = distributed.start()
    torch.set_num_threads(args.threads)
    settings = dict(iterations=args.iterations, rounds=args.rounds)
    if device.type == "cpu":
        settings["threads"] = args.threads
        packages = {"faiss": "faiss-cpu", "scikit-learn": "scikit-learn"}
        settings.update({name: version(package) for name, package in packages.items()
                         if name not in args.without})
        if "faiss" not in args.without:
            import faiss

            faiss.omp_set_num_threads(args.threads)
        defaults = ["200000x128x3000", "100000x256x10000"]
    else:
        defaults = [f"{IMAGENET}x128x3000", f"{IMAGENET}x256x10000"]
    figures = {}
    for problem in args.problems or defaults:
        figures.update(race(tuple(map(int, problem.split("x"))), args, device))
    write("kmeans", device, settings, figures)


if __name__ == "__main__":
    main()
