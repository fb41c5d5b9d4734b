"""Times SwAV's training step, whole and in parts, beside lightly's: same trunk, batch and synthetic crops.

    python -m benchmarks.step                       # the published recipe and the small one
    python -m benchmarks.step --recipes swav_400ep_8x32 --parts eager --batch-size 128

Ours is the loop of swav.py: it takes uint8 crops, so jitter, blur and normalisation are part of the step; it
uses bf16 autocast and channels_last where the hardware has them. lightly's (`SwaVLoss`, `SwaVPrototypes`,
`SwaVProjectionHead`), if installed, gets finished float crops and runs in float32 with plain SGD, one forward
pass per crop as in its example. On a GPU also measures: ours compiled, synchronised batch norm against
cuDNN's, memory against batch size, k-means and Sinkhorn against the hardware.
"""

import argparse
import importlib.util
import random
import time
import warnings
from dataclasses import replace
from unittest import mock

import torch
from torch import nn

import swav
from benchmarks.record import medians, write
from common import batchnorm, distributed
from common.engine.launch import autocast_dtype
from common.engine.options import recipe
from common.kmeans import kmeans
from common.multicrop import Augmentation, to_device
from common.optim import LARC
from common.resnet import ARCHITECTURES
from common.sinkhorn import balanced_assignments

PARTS = ("eager", "compiled", "norm", "memory", "kernels")
MAPS = ((64, 112), (256, 56), (512, 28), (1024, 14))  # channels and side, of ResNet-50 at 224 pixels


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--recipes", nargs="+", default=["swav_400ep_8x32", "small"], help="recipes of swav.py")
    add("--batch-size", type=int, default=0,
        help="default: the recipe's; 8 for the published ones on a CPU")
    add("--steps", type=int, default=3, help="timed steps per round (default: 3)")
    add("--rounds", type=int, default=5, help="rounds; medians are reported (default: 5)")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure; on a CPU only eager")
    add("--name", default="step", help="name of the result file (default: step)")
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
    """Returns the seconds per step of run(count), which makes `count` steps."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(count)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / count


def ours(config, synthetic, compiled=False, convert=None):
    """Returns a function that makes `count` steps of swav.py."""
    torch.manual_seed(0)
    model = swav.Model(config).to(synthetic.device, memory_format=torch.channels_last)
    model = convert(model) if convert else model
    if compiled:
        model.backbone.compile(dynamic=False)
    optimizer = LARC(model.parameters(), config.lr, config.momentum, config.weight_decay)
    queue = swav.Queue(0, config.crops[0], config.dim, synthetic.device)

    def run(count):
        synthetic.count = count
        swav.train_one_epoch(model, optimizer, queue, None, synthetic, config, 0)

    return run


def theirs(config, synthetic):
    """Returns a function that makes `count` steps of lightly's SwAV."""
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
    if device.type == "cpu":
        args.parts = ["eager"]
    torch.backends.cudnn.benchmark = True
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
    figures.update(kernels(device, args) if "kernels" in args.parts else {})
    write("step", device, settings, figures, args.name)


def measure(config, args, device):
    synthetic, figures = Synthetic(config, device), {}
    if "eager" in args.parts:
        figures.update(eager(config, synthetic, args))
    if "compiled" in args.parts:
        run = ours(config, synthetic, compiled=True)
        run(2)
        taken = medians(args.rounds, compiled=lambda: seconds(run, args.steps, device))["compiled"]
        figures |= {"ours compiled, ms a step": 1000 * taken,
                    "ours compiled, images/s": config.batch_size / taken}
    if "norm" in args.parts:
        figures.update(norm(config, synthetic, args))
    if "memory" in args.parts:
        figures.update({f"batch {b}, peak GiB": peak(replace(config, batch_size=b), device)
                        for b in (64, 128, 256, 512)})
    return figures


def eager(config, synthetic, args):
    """Times our step and its parts, and lightly's step."""
    device, dim = synthetic.device, config.dim
    model = swav.Model(config).to(device)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = LARC(model.parameters(), config.lr)
    scores = torch.randn(config.crops[0], config.batch_size, config.prototypes, device=device)
    queue = swav.Queue(config.queue_length, config.crops[0], dim, device)
    queue.filled = config.queue_length
    prototypes = model.prototypes.weight.detach()
    alone = {"photometric": lambda: to_device(synthetic.crops, synthetic.params, device),
             "LARC": optimizer.step,
             "Sinkhorn": lambda: swav.assign(scores, queue, prototypes, config.epsilon, 3)}
    contenders = {"ours": ours(config, synthetic)}
    if importlib.util.find_spec("lightly"):
        contenders["lightly"] = theirs(config, synthetic)
    for name, part in alone.items():
        contenders[f"{name} alone"] = lambda count, part=part: [part() for _ in range(count)]
    for run in contenders.values():
        run(2)  # warm up: kernels are chosen, memory is taken
    taken = medians(args.rounds, **{name: lambda run=run: seconds(run, args.steps, device)
                                    for name, run in contenders.items()})
    figures = {f"{name}, ms a step": 1000 * value for name, value in taken.items()}
    figures["ours, images/s"] = config.batch_size / taken["ours"]
    if "lightly" in taken:
        figures["lightly, images/s"] = config.batch_size / taken["lightly"]
        figures["ours / lightly, images/s"] = taken["lightly"] / taken["ours"]
    figures |= {f"{name}, share of our step": taken[f"{name} alone"] / taken["ours"] for name in alone}
    return figures | ({"ours, peak GiB": peak(config, device)} if device.type == "cuda" else {})


def norm(config, synthetic, args):
    """Returns the time of batch norm over ranks, taking its many-rank path in one process, over cuDNN's."""
    device, figures = synthetic.device, {}

    def layer(C, side):
        x = torch.randn(config.batch_size, C, side, side, device=device, dtype=synthetic.dtype)
        x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
        # grad() instead of backward(), which would also add to the gradients.
        return lambda module: lambda count: [
            torch.autograd.grad(module(x), [x, *module.parameters()], x.detach()) for _ in range(count)]

    for C, side in MAPS:
        of, plain = layer(C, side), nn.BatchNorm2d(C).to(device)
        figures[f"norm of {C} x {side} x {side} maps, time / cuDNN's"] = against(
            of(plain), of(batchnorm.SyncBatchNorm.convert(nn.BatchNorm2d(C)).to(device)), args, device)
    steps = ours(config, synthetic), ours(config, synthetic, convert=batchnorm.SyncBatchNorm.convert)
    figures["step with norm over ranks, time / cuDNN's"] = against(*steps, args, device)
    return figures


def against(plain, synced, args, device):
    def many(count):
        # In gpu.sh's process group of one each message is really sent, to this process itself.
        with mock.patch.object(batchnorm, "world_size", lambda: 2):
            joined = torch.distributed.is_initialized()
            with mock.patch.object(distributed, "world_size", lambda: 1 + joined):
                synced(count)

    plain(2), many(2)
    taken = medians(args.rounds, plain=lambda: seconds(plain, args.steps, device),
                    synced=lambda: seconds(many, args.steps, device))
    return taken["synced"] / taken["plain"]


def kernels(device, args, rows=160_000, K=3000, D=128):
    """Compares k-means with the rate of a matrix product, SeLa's Sinkhorn with that of a copy, in float32."""
    x = nn.functional.normalize(torch.randn(rows, D, device=device))
    scores, square = torch.randn(rows, K, device=device), torch.randn(min(rows, 8192), min(rows, 8192),
                                                                      device=device)
    target = torch.empty_like(scores)
    warnings.filterwarnings("ignore", "not balanced")
    contenders = {
        "k-means": lambda: kmeans(x, K, 5, spherical=True, init=x[:K]), "product": lambda: square @ square,
        "Sinkhorn": lambda: balanced_assignments(scores, tolerance=0, max_iterations=20),
        "nothing": lambda: balanced_assignments(scores, tolerance=0, max_iterations=0),
        "copy": lambda: target.copy_(scores)}
    runs = {name: lambda count, f=f: [f() for _ in range(count)] for name, f in contenders.items()}
    for run in runs.values():
        run(1)
    taken = medians(args.rounds, **{name: lambda run=run: seconds(run, args.steps, device)
                                    for name, run in runs.items()})
    product = 2 * len(square) ** 3 / taken["product"]
    # A copy reads and writes the matrix, an iteration of Sinkhorn only reads it.
    iterations = (taken["Sinkhorn"] - taken["nothing"]) / 20
    return {"k-means, share of the product's rate": 2 * 6 * rows * K * D / taken["k-means"] / product,
            "Sinkhorn's iteration, share of the copy's bandwidth": taken["copy"] / 2 / iterations,
            "matrix product, TFLOP/s": product / 1e12, "copy, GB/s": 2 * scores.nbytes / taken["copy"] / 1e9}


def convolution_gain(args, device):
    """Returns how much faster the machine convolves in our precision and layout: the gain of a step that only
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


def peak(config, device):
    """Returns the peak GPU memory of a step, in GiB."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    others = torch.cuda.memory_allocated()
    ours(config, Synthetic(config, device))(2)
    return (torch.cuda.max_memory_allocated() - others) / 2**30


if __name__ == "__main__":
    main()
