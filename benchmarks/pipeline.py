"""Measures what an image costs before the network sees it: decode and crop in a worker, then device work.

    python -m benchmarks.pipeline --data /imagenet/val       # a folder of photos; a few hundred are enough

Compares 2x224 + 6x96 crops with lightly's `SwaVTransform`, the usual Pillow pipeline: for each crop random
resized crop, flip, colour jitter, grey, blur, to tensor, normalise. Counts CPU time of one process, files in
the page cache. Then compares our crops from files, from tars, and from these tars by webdataset.
"""

import argparse
import functools
import io
import json
import random
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import torch
import webdataset as wds
from lightly.transforms.swav_transform import SwaVTransform
from torch.utils.data import DataLoader

from benchmarks.record import medians, write
from common import data, distributed
from common.multicrop import Augmentation, MultiCrop, collate, to_device
from common.sources.files import decode

CROPS, SIZES, SCALES = (2, 6), (224, 96), ((0.14, 1.0), (0.05, 0.14))


class Usual:
    """Map-style set that gives an image to lightly's transform: a list of eight float crops."""

    def __init__(self, images):
        self.images, self.transform = images, SwaVTransform()

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return index, self.transform(self.images.read(index))


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder of photos")
    parser.add_argument("--images", type=int, default=200, help="images per round (default: 200)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are reported (default: 5)")
    args = parser.parse_args()
    device = distributed.start()
    images = data.open_images(args.data)
    n = min(args.images, len(images))
    ours, usual = MultiCrop(images, CROPS, SIZES, SCALES, Augmentation(), seed=0), Usual(images)

    def cpu_ms(item):
        """Returns a function that measures CPU milliseconds per image."""

        def measure():
            start = time.process_time()
            for i in range(n):
                item(i)
            return 1000 * (time.process_time() - start) / n

        return measure

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker
    figures = medians(args.rounds,
                      **{"decode, CPU ms an image": cpu_ms(images.read),
                         "ours: decode and 8 uint8 crops, CPU ms an image": cpu_ms(lambda i: ours[0, i, i]),
                         "usual: decode and 8 finished crops, CPU ms": cpu_ms(usual.__getitem__)})
    _, our_cpu, usual_cpu = figures.values()
    figures["ours / usual, CPU time"] = our_cpu / usual_cpu
    figures["ours, images a second and core"] = 1000 / our_cpu
    torch.set_num_threads(threads)

    # From workers to the main process: collating, pickling and copying.
    batch_size, workers = 32, 2
    loader = data.Loader(ours, workers)
    steps = data.batches(n, batch_size, 0, 0, 0, 1)

    usual_loader = DataLoader(usual, batch_size, num_workers=workers, drop_last=True, persistent_workers=True,
                              prefetch_factor=4)
    speed = medians(args.rounds, ours=lambda: loaded(lambda: loader.epoch(0, steps)),
                    usual=lambda: loaded(lambda: usual_loader))
    figures |= {f"{name}, images/s from 2 workers": rate for name, rate in speed.items()}
    index, crops, params = next(loader.epoch(0, steps))
    sent = sum(group.nbytes for group in crops) + params.nbytes
    figures["ours, KB an image from worker to main"] = sent / len(index) / 1000
    usual_sent = 4 * sum(group.nbytes for group in crops)  # float32
    figures["usual, KB an image from worker to main"] = usual_sent / len(index) / 1000

    def on_device():
        start = time.perf_counter()
        to_device(crops, params, device)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - start)

    on_device()
    step = medians(args.rounds, device=on_device)["device"]
    figures["photometric part on the device, ms an image"] = step / len(index)
    loader.close()
    figures |= from_tars(images, ours, n, args.rounds)
    figures["share of a training step spent waiting"] = waiting(args.data)
    write("pipeline", device, {"images": n, "batch_size": batch_size, "workers": workers}, figures)


def from_tars(images, ours, n, rounds, shards=4):
    """Returns images/s of the same crops: from files, from tars in place, from these tars by webdataset."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        names = [f"{folder}/{shard}.tar" for shard in range(shards)]
        for shard, name in enumerate(names):
            with tarfile.open(name, "w") as tar:
                for i in range(shard * n // shards, (shard + 1) * n // shards):
                    tar.add(images.source(i), f"{i:06d}{Path(images.path(i)).suffix.lower()}")
        tars = MultiCrop(data.open_images(folder), CROPS, SIZES, SCALES, Augmentation(), seed=0)

        def cut(sample):
            content = next(sample[key] for key in sample if not key.startswith("__"))
            return int(sample["__key__"]), *ours.cut(decode(lambda: io.BytesIO(content)), random.Random(0))

        steps = data.batches(n, 32, 0, 0, 0, 1, drop_last=False)
        for workers in (1, 2):
            loaders = {"files": data.Loader(ours, workers), "tars": data.Loader(tars, workers)}
            peer = DataLoader(wds.WebDataset(names, shardshuffle=False, empty_check=False).map(cut), 32,
                              num_workers=workers, collate_fn=collate, persistent_workers=True)
            epochs = {name: functools.partial(loader.epoch, 0, steps) for name, loader in loaders.items()}
            epochs["webdataset"] = functools.partial(iter, peer)
            speed = medians(rounds, **{name: functools.partial(loaded, epoch)
                                       for name, epoch in epochs.items()})
            figures |= {f"{name}, images/s from {workers} workers": rate for name, rate in speed.items()}
            figures |= {f"tars / {name}, {workers} workers": speed["tars"] / speed[name]
                        for name in ("files", "webdataset")}
            for loader in loaders.values():
                loader.close()
    return figures


def loaded(epoch):
    """Returns images per second of an epoch."""
    start = time.perf_counter()
    count = sum(len(index) for index, *_ in epoch())
    return count / (time.perf_counter() - start)


def waiting(folder):
    """Returns the share of its time that swav.py waits for data after its first steps: resnet50, 2x224 +
    6x96, 2 workers."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "swav.py", "--data", folder, "--recipe", "swav_400ep_8x32", "--workers",
                   "2", "--out", out]
        gpu = torch.cuda.is_available()
        command += ["--batch-size", "256" if gpu else "8", "--max-steps", "18", "--log-every", "6",
                    "--epochs", "2"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        records = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]
        return [record["data_wait"] for record in records if "data_wait" in record][-1]


if __name__ == "__main__":
    main()
