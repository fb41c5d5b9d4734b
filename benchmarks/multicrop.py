"""Measures what SwAV's abstract claims about cost: small crops are cheap, and no memory bank is needed.

    python -m benchmarks.multicrop                    # minutes on two CPU cores

Crops: compares 2 large ones with 4, 2 + 4 and 2 + 6; small ones have 96/224 of a large one's side. Counts
forward and backward FLOPs of a published step (ResNet-50, head and prototypes; a multiply-add is two).
Measures the time of a step, and its peak memory in a process of its own.
State: reads what each method reports at its start to hold beside the network, with its published recipe, and
extrapolates from two sizes. What crops are worth is in `benchmarks.ablations`.
"""

import argparse
import multiprocessing
import tempfile
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

import deepcluster
import deepclusterv2
import odc
import sela
import selav2
import swav
from benchmarks.record import medians, resident, write
from benchmarks.step import Synthetic, ours, seconds
from common import distributed
from common.engine.launch import held_bytes, launch
from common.engine.options import recipe

CROPS = {"2": (2,), "4": (4,), "2 + 4": (2, 4), "2 + 6": (2, 6)}
METHODS = {"swav": swav, "deepclusterv2": deepclusterv2, "selav2": selav2, "sela": sela, "odc": odc,
           "deepcluster": deepcluster}
SIZES = {"10 k": 10_000, "1.28 M": 1_281_167, "100 M": 100_000_000}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=0,
                        help="batch size of the timed step (default: the published 256; 8 on a CPU)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds; medians are reported (default: 5)")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------- cost


def with_crops(config, crops):
    """Returns the config with these crops. The ratios of small to large sides and shares of the area are the
    published ones."""
    low, large = config.scales[0], config.sizes[0]
    sizes, scales = (large, round(large * 96 / 224)), (low, 1.0, low * 0.05 / 0.14, low)
    return replace(config, crops=crops, sizes=sizes[: len(crops)], scales=scales[: 2 * len(crops)])


def flops(config, crops, sizes):
    """Returns the FLOPs of a step, forward and backward, per image."""
    model, groups = swav.Model(config), [torch.zeros(2 * v, 3, s, s) for v, s in zip(crops, sizes)]
    with FlopCounterMode(display=False) as counter:
        model(groups)[1].sum().backward()
    return counter.get_total_flops() / 2


def peak(config):
    """Returns the bytes that two steps add to a process at its peak."""
    device = distributed.start()
    synthetic, before = Synthetic(config, device), resident("VmRSS")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    ours(config, synthetic)(2)
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else resident() - before


def step_times(configs, device, rounds):
    """Returns {name: seconds per step}."""
    contenders = {name: ours(config, Synthetic(config, device)) for name, config in configs.items()}
    for run in contenders.values():
        run(2)  # warm up: kernels are chosen, memory is taken
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


# ------------------------------------------------------------------------------------------------------ state


def held(method, images):
    """Returns the bytes beside the network that the method's script reports for so many images, with its
    default recipe."""
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
    write("multicrop", device, {}, {**costs(args, device), **states()})


if __name__ == "__main__":
    launch(main, arguments())
