"""Measures what ODC's memory costs per step, by default at ImageNet's size: 1,281,167 embeddings of 256
numbers, 10,000 clusters, batches of 512 (3 GB).

    python -m benchmarks.odc_memory
    python -m benchmarks.odc_memory --images 100000 --clusters 1000

A step reads the batch's embeddings, blends in the new ones, finds the new clusters, counts, and weights the
loss. Every 10 steps all centroids are computed from all embeddings. Every 50 steps a cluster is made to fall
below the minimum, so that it is dissolved and the largest, of 2,000 images, is split. The product of the
batch with all centroids is timed alone, as it only shows the machine's speed.
"""

import argparse
import statistics
import time

import torch

from benchmarks.record import write
from common import distributed
from odc import Memory


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_281_167)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--clusters", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main():
    args = arguments()
    device = distributed.start()
    torch.set_num_threads(args.threads)
    generator = torch.Generator(device).manual_seed(0)
    memory = Memory(args.images, args.dim, args.clusters, device=device)
    features = torch.randn(args.images, args.dim, generator=generator, device=device)
    targets = torch.randint(args.clusters, (args.images,), generator=generator, device=device)
    crowded = torch.randperm(args.images, generator=generator,
                             device=device)[: 2000 * (args.steps // 50)].split(2000)
    for cluster, images in enumerate(crowded):  # these clusters will be split
        targets[images] = args.clusters - 1 - cluster
    memory.fill(features)
    memory.begin(targets)
    del features

    def timed(function, *values):
        def wait():
            if device.type == "cuda":
                torch.cuda.synchronize()

        wait()
        start = time.perf_counter()
        function(*values)
        wait()
        return 1000 * (time.perf_counter() - start)

    taken = {"update": [], "refresh": [], "repair": [], "split": [], "weights": [], "product": []}
    for step in range(1, args.steps + 1):
        index = torch.randint(args.images, (args.batch,), generator=generator, device=device)
        noise = torch.randn(args.batch, args.dim, generator=generator, device=device)
        z = memory.bank.local[index] + 0.02 * noise
        taken["weights"].append(timed(memory.loss_weight))
        taken["update"].append(timed(memory.update, index, z))
        taken["product"].append(timed(lambda z=z: (z @ memory.centroids.T).argmax(1)))
        if step % 10 == 0:
            taken["refresh"].append(timed(memory.refresh))
        if step % 50 == 0:  # a cluster loses all but 19 of its images to its neighbour
            images = (memory.targets == step).nonzero().flatten()[19:]
            memory.move(images, torch.ones_like(images, dtype=torch.bool), torch.full_like(images, step + 1))
        taken["split" if step % 50 == 0 else "repair"].append(timed(memory.repair))
    median = {name: statistics.median(times) for name, times in taken.items()}
    rest = median["update"] - median["product"] + median["weights"] + median["repair"]
    rest += median["refresh"] / 10 + median["split"] / 50
    figures = {f"{name}, ms": value for name, value in median.items()}
    figures["all but the product, ms a step"] = rest
    write("odc_memory", device, vars(args), figures)


if __name__ == "__main__":
    main()
