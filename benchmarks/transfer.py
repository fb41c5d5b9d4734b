"""Memory and time of a training step of each full-size preset of the transfer evaluations.

    python -m benchmarks.transfer                  # a minute or two on two CPU cores, 6 GB
    python -m benchmarks.transfer --batch-size 2   # what one of 8 GPUs has of a batch of 16

Images and objects are random: an image of the crop's size, or of 800 x 1,333 pixels with five objects. Each
preset is measured in a process of its own, because memory is its peak: on a GPU what torch allocated, on a
CPU what the process grew by after its imports. Time is the median of the steps after the first.
"""

import argparse
import multiprocessing
import statistics
import time

import torch

import eval_detection
import eval_segmentation
from benchmarks.record import resident, write
from common import distributed
from common.evaluation import detector
from common.resnet import resnet50

PRESETS = {**eval_segmentation.PRESETS, **eval_detection.PRESETS}  # both have a "small", not measured
CLASSES = {"voc12aug_20k": 21, "cityscapes_40k": 19, "voc0712_24k": 20, "coco_fpn_1x": 80}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4)
    return parser.parse_args()


def segmentation(p, classes, batch_size, device):
    """The model, and a function that computes the loss of a random batch."""
    model = eval_segmentation.Model(resnet50(), p, classes)
    x = torch.randn(batch_size, 3, p.crop, p.crop).to(device, memory_format=torch.channels_last)
    labels = torch.randint(classes, (batch_size, p.crop, p.crop)).to(device)

    def loss():
        return sum(eval_segmentation.loss_of(scores, labels, p.align_corners) for scores in model(x))
    return model, loss


def detection(p, classes, batch_size, device):
    model = p.network(resnet50(), classes, p.sides, p.region, before=p.before, after=p.after, rois=p.rois,
                      over_all=p.over_all)
    x = torch.randn(batch_size, 3, 800, 1344).to(device, memory_format=torch.channels_last)
    corner = torch.rand(5, 2) * 400
    target = {"boxes": torch.cat([corner, corner + 50 + 300 * torch.rand(5, 2)], dim=1).to(device),
              "labels": torch.arange(1, 6, device=device), "seed": 0}
    if p.network is detector.fpn:
        target["masks"] = torch.ones(5, 800, 1344, dtype=torch.uint8, device=device)
    return model, lambda: sum(model(x, [(800, 1333)] * batch_size, [target] * batch_size).values())


def measure(name, args):
    """{"M parameters", "s a step", "GB"} of a preset."""
    device = distributed.start()
    before = resident()
    torch.manual_seed(0)
    kind = detection if name in eval_detection.PRESETS else segmentation
    model, loss = kind(PRESETS[name], CLASSES[name], args.batch_size, device)
    model.to(device, memory_format=torch.channels_last).train()
    optimizer, times = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9), []
    for _ in range(args.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before
    return {"M parameters": sum(w.numel() for w in model.parameters()) / 1e6,
            "s per step": statistics.median(times[1:]), "GB": peak / 1e9}


def main():
    args, figures = arguments(), {}
    for name in CLASSES:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            measured = pool.apply(measure, (name, args))
        figures |= {f"{name}, {what}": value for what, value in measured.items()}
    write("transfer", distributed.start(), vars(args), figures)


if __name__ == "__main__":
    main()
