"""Measures DeepCluster's PCA from 4,096 features per image to 256 whitened ones: time and memory,
extrapolated to ImageNet's 1,281,167 images.

    python -m benchmarks.pca             # 40,000 bfloat16 rows, one minute on a CPU

Calls `whiten` of deepcluster.py. Its time is linear in the rows, except for the axes, which are found once.
Its memory beyond the features is the result (1 KiB per row), one chunk, and two 4,096 x 4,096 float64
matrices with the workspace of their decomposition.
"""

import argparse
from pathlib import Path

import torch

from benchmarks.kmeans import IMAGENET, seconds
from benchmarks.record import resident, write
from common import distributed
from deepcluster import whiten


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--threads", type=int, default=2, help="threads on a CPU (default: 2)")
    args = parser.parse_args()
    device = distributed.start()
    torch.set_num_threads(args.threads)
    x = torch.randn(args.rows, 4096, device=device, dtype=torch.bfloat16)
    whiten(x[:512, :512], 256)  # warm up: libraries take their memory and start their threads
    few = seconds(lambda: whiten(x[:4096], 256), device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak size
        before = resident()
    all_of_them = seconds(lambda: whiten(x, 256), device)
    held = (torch.cuda.max_memory_allocated() if device.type == "cuda" else resident()) - before
    each = (all_of_them - few) / (args.rows - 4096)
    figures = {f"{args.rows} x 4096 to 256, s": all_of_them, "us a row": 1e6 * each,
               "memory beyond the features, MiB": held / 2**20,
               f"{IMAGENET} rows, s (extrapolated)": few + each * (IMAGENET - 4096),
               f"{IMAGENET} rows, features and result, GiB (computed)": IMAGENET * (2 * 4096 + 4 * 256)
               / 2**30, f"{IMAGENET} rows, memory beyond the features, GiB (extrapolated)": (
                   held + 1024 * (IMAGENET - args.rows)) / 2**30}
    write("pca", device, vars(args), figures)


if __name__ == "__main__":
    main()
