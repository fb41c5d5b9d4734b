"""SwAV's training step against lightly's: same trunk, batch and crops, synthetic images, in one run.

    python -m benchmarks.step                       # the published recipe and the small one

Ours is the loop of swav.py as it ships: uint8 crops come in, jitter, blur and normalisation are part of the
step, bf16 autocast and channels_last where the hardware has them. lightly's (`SwaVLoss`, `SwaVPrototypes`,
`SwaVProjectionHead`) gets float crops that are ready and runs in float32 with plain SGD, a forward pass for
each crop as in its example. On a GPU also: ours compiled, and with the batch norm that synchronises over
processes, our own and torch's.
"""

import argparse
import random
import time
from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

import swav
from benchmarks.record import medians, write
from common import distributed
from common.batchnorm import SyncBatchNorm
from common.engine.launch import autocast_dtype
from common.engine.options import recipe
from common.multicrop import Augmentation, to_device
from common.optim import LARC
from common.resnet import ARCHITECTURES


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["swav_400ep_8x32", "small"], help="of swav.py")
    parser.add_argument("--batch-size", type=int, default=0,
                        help="default: the recipe's; 8 for the published ones on a CPU")
    parser.add_argument("--steps", type=int, default=3, help="timed steps a round (default: 3)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are reported (default: 5)")
    return parser.parse_args()


class Synthetic:
    """Stands for Run in swav.train_one_epoch: gives it the same batch `count` times, and writes nothing."""

    def __init__(self, config, device):
        self.images, self.device, self.count = range(1000 * config.batch_size), device, 0
        self.dtype = autocast_dtype(config.precision, device)
        draw, rng, augmentation = torch.Generator().manual_seed(0), random.Random(0), Augmentation()
        shapes = [(v, config.batch_size, 3, s, s) for v, s in zip(config.crops, config.sizes)]
        crops = [torch.randint(0, 256, shape, generator=draw, dtype=torch.uint8) for shape in shapes]
        params = torch.tensor([[augmentation.draw(rng) for _ in range(config.batch_size)]
                               for _ in range(sum(config.crops))])
        self.crops, self.params = [group.pin_memory() if device.type == "cuda" else group
                                   for group in crops], params

    def steps(self, loader, batches, epoch):
        for step in range(self.count):
            yield step, (torch.arange(self.params.shape[1]), self.crops, self.params)

    def autocast(self):
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def log(self, *arguments, **figures):
        pass


def seconds(run, count, device):
    """Seconds a call of run(count) takes for each of its count steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def ours(config, synthetic, compiled=False, convert=None):
    """A function that makes `count` steps of swav.py."""
    torch.manual_seed(0)
    model = swav.Model(config).to(synthetic.device, memory_format=torch.channels_last)
    model = convert(model) if convert else model
    if compiled:
        model.backbone.compile()
    optimizer = LARC(model.parameters(), config.lr, config.momentum, config.weight_decay)
    queue = swav.Queue(0, config.crops[0], config.dim, synthetic.device)

    def run(count):
        synthetic.count = count
        swav.train_one_epoch(model, optimizer, queue, None, synthetic, config, 0)

    return run


def theirs(config, synthetic):
    """A function that makes `count` steps of lightly's SwAV."""
    from lightly.loss import SwaVLoss
    from lightly.models.modules import SwaVProjectionHead, SwaVPrototypes

    torch.manual_seed(0)
    device = synthetic.device
    trunk = ARCHITECTURES[config.arch](config.width, config.stem)
    head = SwaVProjectionHead(trunk.feature_dim, config.hidden, config.dim)
    prototypes = SwaVPrototypes(config.dim, config.prototypes)
    model = nn.Sequential(trunk, head).to(device)
    prototypes.to(device)
    criterion = SwaVLoss()
    optimizer = torch.optim.SGD([*model.parameters(), *prototypes.parameters()], lr=0.01, momentum=0.9,
                                weight_decay=1e-6)
    groups = to_device(synthetic.crops, synthetic.params, device)
    views = [view.contiguous() for group in groups for view in group.split(config.batch_size)]
    large = config.crops[0]

    def run(count):
        for _ in range(count):
            prototypes.normalize()
            scores = [prototypes(nn.functional.normalize(model(view))) for view in views]
            loss = criterion(scores[:large], scores[large:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return run


def main():
    args = arguments()
    device = distributed.start()
    figures, settings = {}, {"precision of ours": str(autocast_dtype("auto", device))}
    for name in args.recipes:
        config = recipe(swav.Config, swav.RECIPES, name)
        slow = device.type == "cpu" and config.arch == "resnet50"
        config = replace(config, batch_size=args.batch_size or (8 if slow else config.batch_size))
        settings[name] = {key: getattr(config, key) for key in ("arch", "width", "crops", "sizes",
                                                                "batch_size", "prototypes")}
        for what, value in measure(config, args, device).items():
            figures[f"{name}: {what}"] = value
    figures["a convolution in the precision of ours / in float32, speed"] = convolution_gain(args, device)
    write("step", device, settings, figures)


def measure(config, args, device):
    synthetic = Synthetic(config, device)
    contenders = {"ours": ours(config, synthetic), "lightly": theirs(config, synthetic)}
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        contenders["ours compiled"] = ours(config, synthetic, compiled=True)
    contenders["photometric alone"] = lambda count: [to_device(synthetic.crops, synthetic.params,
                                                               device) for _ in range(count)]
    for run in contenders.values():
        run(2)  # kernels are chosen, memory is taken
    timed = {name: lambda run=run: seconds(run, args.steps, device) for name, run in contenders.items()}
    taken = medians(args.rounds, **timed)

    figures = {f"{name}, ms a step": 1000 * value for name, value in taken.items()}
    figures["ours, images/s"] = config.batch_size / taken["ours"]
    figures["lightly, images/s"] = config.batch_size / taken["lightly"]
    figures["ours / lightly, images/s"] = taken["lightly"] / taken["ours"]
    figures["photometric, share of our step"] = taken["photometric alone"] / taken["ours"]
    if device.type == "cuda":
        figures["compiled / eager"] = taken["ours"] / taken["ours compiled"]
        figures.update(synced(config, synthetic, args, taken["ours"]))
        figures.update(memory(config, device))
    return figures


def convolution_gain(args, device):
    """How much faster the machine convolves in our precision and layout: what a step can gain where it only
    convolves."""
    x, weight = torch.randn(16, 256, 14, 14, device=device), torch.randn(256, 256, 3, 3, device=device)

    def both_ways(dtype, layout):
        a, w = (t.to(dtype, memory_format=layout, copy=True).requires_grad_() for t in (x, weight))

        def run(count):
            for _ in range(count):
                nn.functional.conv2d(a, w, padding=1).sum().backward()

        run(3)
        return lambda: seconds(run, 10 * args.steps, device)

    taken = medians(args.rounds, usual=both_ways(torch.float32, torch.contiguous_format),
                    ours=both_ways(autocast_dtype("auto", device), torch.channels_last))
    return taken["usual"] / taken["ours"]


def synced(config, synthetic, args, native):
    """Our steps with batch norm synchronised over a group of one process: its cost without the network's."""
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    distributed.world_size = lambda: 2  # take the path of many processes
    contenders = {"own SyncBatchNorm": ours(config, synthetic, convert=SyncBatchNorm.convert),
                  "native SyncBatchNorm": ours(config, synthetic,
                                               convert=nn.SyncBatchNorm.convert_sync_batchnorm)}
    for run in contenders.values():
        run(2)
    taken = medians(args.rounds, **{name: lambda run=run: seconds(run, args.steps, synthetic.device)
                                    for name, run in contenders.items()})
    dist.destroy_process_group()
    return {f"{name}, time / without": value / native for name, value in taken.items()}


def memory(config, device):
    """Peak GPU memory of a step for several batch sizes, in GiB."""
    figures = {}
    for batch_size in (64, 128, 256, 512):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        smaller = replace(config, batch_size=batch_size)
        ours(smaller, Synthetic(smaller, device))(2)
        figures[f"batch {batch_size}, peak GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return figures


if __name__ == "__main__":
    main()
