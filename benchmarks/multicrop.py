"""What SwAV's abstract claims about cost: small crops are cheap and help, large batches are not needed, nor
is a memory of the data.

    python -m benchmarks.multicrop                    # on shapes: an hour on two CPU cores
    python -m benchmarks.multicrop --recipe cifar --data cifar10

Crops: 2 large ones against 4, 2 + 4 and 2 + 6, small ones being 96/224 of a large one's side. FLOPs forward
and backward of a published step (ResNet-50, head and prototypes; a multiplication with an addition is two),
time and peak memory of a step in a process of its own; 20-NN of the recipe with these crops after its number
of epochs, and after as many as take the time of its 2 + 6 crops, by steps on synthetic images.
Batches: two crops, 256 prototypes, the learning rate by the square root of the batch, with and without a
queue of 1,024 from epoch 1.
State: what each method says at its start that it holds beside the network, with its published recipe,
extrapolated from two sizes. A run is kept in --out and not made twice.
"""

import argparse
import json
import math
import multiprocessing
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import deepcluster
import deepclusterv2
import odc
import sela
import selav2
import swav
from benchmarks.record import curve_of, finished, last_loss, medians, resident, write
from benchmarks.step import Synthetic, ours, seconds
from common import data, distributed
from common.engine.launch import held_bytes, launch
from common.engine.options import recipe

CROPS = {"2": (2,), "4": (4,), "2 + 4": (2, 4), "2 + 6": (2, 6)}
BATCHES, QUEUES = (64, 256, 1024), (0, 1024)
METHODS = {"swav": swav, "deepclusterv2": deepclusterv2, "selav2": selav2, "sela": sela, "odc": odc,
           "deepcluster": deepcluster}
SIZES = {"10 k": 10_000, "1.28 M": 1_281_167, "100 M": 100_000_000}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="shapes", help="of swav.py, to train with (default: shapes)")
    parser.add_argument("--data", default="", help="default: that of the recipe")
    parser.add_argument("--root", default="")
    parser.add_argument("--val", default="")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=0,
                        help="of the timed step (default: the published 256; 8 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are reported (default: 5)")
    parser.add_argument("--out", type=Path, default=Path("runs/multicrop"))
    parser.add_argument("--workers", type=int, default=-1)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------- cost


def with_crops(config, crops):
    """The config with these crops; large and small ones' shares of the area are to each other as the
    published ones are."""
    low, large = config.scales[0], config.sizes[0]
    sizes, scales = (large, round(large * 96 / 224)), (low, 1.0, low * 0.05 / 0.14, low)
    return replace(config, crops=crops, sizes=sizes[: len(crops)], scales=scales[: 2 * len(crops)])


def flops(config, crops, sizes):
    """Of a step, forward and backward, an image."""
    model, groups = swav.Model(config), [torch.zeros(2 * v, 3, s, s) for v, s in zip(crops, sizes)]
    with FlopCounterMode(display=False) as counter:
        model(groups)[1].sum().backward()
    return counter.get_total_flops() / 2


def peak(config):
    """Bytes that two steps add to a process at its largest."""
    device = distributed.start()
    synthetic, before = Synthetic(config, device), resident("VmRSS")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ours(config, synthetic)(2)
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before


def step_times(configs, device, rounds):
    """{name: seconds of a step}."""
    contenders = {name: ours(config, Synthetic(config, device)) for name, config in configs.items()}
    for run in contenders.values():
        run(2)  # kernels are chosen, memory is taken
    return medians(rounds,
                   **{name: lambda run=run: seconds(run, 3, device) for name, run in contenders.items()})


def costs(args, device):
    published = recipe(swav.Config, swav.RECIPES, "swav_400ep")
    published = replace(published, batch_size=args.batch_size or (8 if device.type == "cpu" else 256))
    configs = {name: with_crops(published, crops) for name, crops in CROPS.items()}
    image = flops(published, (1,), (224,))
    figures = {f"{name} crops: FLOPs / one full image": flops(c, c.crops, c.sizes) / image
               for name, c in configs.items()}
    taken = step_times(configs, device, args.rounds)
    figures |= {f"{name} crops: ms a step": 1000 * value for name, value in taken.items()}
    figures |= {f"{name} crops: step time / 2 crops": value / taken["2"] for name, value in taken.items()}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = {name: pool.apply(peak, (config,)) for name, config in configs.items()}
    figures |= {f"{name} crops: peak GiB": value / 2**30 for name, value in peaks.items()}
    return figures | {f"{name} crops: peak / 2 crops": value / peaks["2"] for name, value in peaks.items()}


# --------------------------------------------------------------------------------------------------- accuracy


def train(config, out):
    """20-NN accuracies of a run, untrained and at its end; it is made unless it is there."""
    if not finished(config, out):
        swav.main(replace(config, out=str(out), fresh=True, eval_every=config.epochs))
    return [accuracy for _, accuracy in curve_of(out)]


def accuracies(args, device):
    config = recipe(swav.Config, swav.RECIPES, args.recipe)
    given = dict(data=args.data, root=args.root, val=args.val, seed=args.seed, workers=args.workers,
                 recipe=args.recipe)
    config = replace(config, **given)
    configs, figures = {name: with_crops(config, crops) for name, crops in CROPS.items()}, {}
    kept = args.out / "seconds.json"  # so that a second call finds the runs of the first
    taken = json.loads(kept.read_text()) if kept.exists() else {}
    if taken.keys() != configs.keys():
        args.out.mkdir(parents=True, exist_ok=True)
        taken = step_times(configs, device, args.rounds)
        kept.write_text(json.dumps(taken) + "\n")
    figures |= {f"{name} crops: ms a step of the trained": 1000 * value for name, value in taken.items()}
    for name, c in configs.items():
        longer = round(config.epochs * taken["2 + 6"] / taken[name])
        for what, epochs in {"equal images": config.epochs, "equal time": longer}.items():
            folder = args.out / f"{name.replace(' ', '')}_crops_{epochs}_epochs"
            before, accuracy = train(replace(c, epochs=epochs), folder)
            figures["untrained: 20-NN %"] = before
            figures |= {f"{name} crops: epochs at {what}": epochs,
                        f"{name} crops: 20-NN % at {what}": accuracy}
            figures[f"{name} crops: loss / ln K at {what}"] = last_loss(folder)
    for batch in BATCHES:
        more = batch / config.batch_size
        rates = dict(lr=config.lr * math.sqrt(more), final_lr=config.final_lr * math.sqrt(more))
        frozen = round(config.freeze_prototypes_iters / more)
        c = replace(configs["2"], batch_size=batch, prototypes=256, freeze_prototypes_iters=frozen,
                    queue_start_epoch=1, **rates)
        images = data.open_images(c.data or "shapes", "train", c.root)
        figures[f"batch {batch}: steps"] = c.epochs * (len(images) // batch)
        for queue in QUEUES:
            accuracy = train(replace(c, queue_length=queue), args.out / f"batch_{batch}_queue_{queue}")[-1]
            figures[f"batch {batch}, queue {queue}: 20-NN %"] = accuracy
    return figures


# ------------------------------------------------------------------------------------------------------ state


def held(method, images):
    """Bytes beside the network that the method's script announces for so many images with its default
    recipe."""
    class Announced(BaseException):
        pass

    def announce(run, published, assigned, temporary=0):
        raise Announced(held_bytes(run, temporary))

    own, method.report = method.report, announce
    default = recipe(method.Config, method.RECIPES, next(iter(method.RECIPES)))
    with tempfile.TemporaryDirectory() as out:
        try:
            method.main(replace(default, data=f"shapes:{images}", out=out))
        except Announced as announced:
            return announced.args[0]
        finally:
            method.report = own


def states():
    figures = {}
    for name, method in METHODS.items():
        few, many = held(method, 20_000), held(method, 40_000)
        slope = (many - few) / 20_000
        figures[f"{name}: bytes an image"] = round(slope)
        figures |= {f"{name}: GiB at {size}": (few + slope * (n - 20_000)) / 2**30
                    for size, n in SIZES.items()}
    return figures


def main(args):
    device = distributed.start()
    figures = {**accuracies(args, device), **costs(args, device), **states()}
    settings = dict(recipe=args.recipe, data=Path(args.data).name or args.recipe, seed=args.seed)
    write("multicrop", device, settings, figures)


if __name__ == "__main__":
    launch(main, arguments())
