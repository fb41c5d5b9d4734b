"""Defines options: a dataclass declares them, recipes set them, the command line overrides both.

    @dataclass
    class Config(RunOptions):
        epsilon: float = option(0.05, "epsilon of Sinkhorn: smaller makes sharper codes", above=0)

    config = parse(Config, RECIPES, __doc__)

The first row of RECIPES is the default recipe. It also sets the method's values of the options that all
methods share. Each other row lists what differs from the first.
"""

import argparse
import re
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import get_args, get_origin

import torch

from ..data import OWN
from ..resnet import ARCHITECTURES
from .errors import ArgumentError, fail, open_streams

LEARNING_RATES = ("lr", "final_lr", "start_lr")  # scaled together
GROUPS = ("data", "model", "multi-crop", "method", "optimisation", "run")  # headings of --help, in this order


def option(default, help, group=None, choices=None, free=False, **bounds):
    """Declares one option of a Config: a dataclass field with what --help and the checks need.

    group: heading in --help. In RunOptions it applies until the next one is given; in a method's Config to
        this option only (default: "method").
    free: a resumed run may change it. bounds: any of above, least, below, most; each value must obey them.
    """
    return field(default=default,
                 metadata=dict(help=help, group=group, choices=choices, free=free, bounds=bounds))


@dataclass
class RunOptions:
    """The options that all methods share. The first row of a method's RECIPES sets the paper's values."""

    data: str = option("", "images: a folder, list, tars, cifar10, cifar100, svhn, stl10, or MODULE:FUNCTION "
                       "of your own (default: shapes)",
                       group="data", free=True)
    val: str = option("", "held-out images for --eval-every (default: the val split of --data)", free=True)
    root: str = option("", "folder that relative paths of a list file start from", free=True)
    index: str = option("", "folder for the index of tar files (default: the run directory)", free=True)
    range: tuple[float, ...] = option((), "LOW HIGH: values that become black and white in grey images with "
                                      "over 8 bits (default: the 0.1 and 99.9 percentiles)")
    exif: bool = option(False, "read images as viewers show them: upright by EXIF, transparency on white")
    workers: int = option(-1, "loader processes per rank; -1: its CPU cores but one, at most 8", free=True,
                          least=-1, most=1024)
    max_bad: int = option(-1, "unreadable images allowed; -1: 0.1 %, at least 10", free=True, least=-1)

    arch: str = option("resnet50", "architecture of the trunk, or MODULE:FUNCTION of your own", group="model",
                       choices=tuple(ARCHITECTURES))
    width: float = option(1.0, "multiplies the trunk's channels", above=0)
    stem: str = option("imagenet", "first layers of the trunk; small: for images of 32 to 64 pixels",
                       choices=("imagenet", "small"))

    crops: tuple[int, ...] = option((1,), "number of crops of each size; the first size gives the targets",
                                    group="multi-crop", least=1, most=1000)
    sizes: tuple[int, ...] = option((224,), "sides of the crops in pixels, the largest first", least=1)
    scales: tuple[float, ...] = option((0.08, 1.0), "smallest and largest share of the area, for each size",
                                       above=0, most=1)
    eval_size: int = option(0, "side of evaluated images; 0: as the large crops", free=True, least=0)
    jitter: tuple[float, ...] = option((0.8, 0.8, 0.8, 0.2), "jitter: brightness, contrast, saturation, hue",
                                       least=0)
    blur_p: float = option(0.5, "probability of blur", least=0, most=1)

    prototypes: int = option(3000, "number K of clusters (prototypes) per head", group="method", least=1)
    temperature: float = option(0.1, "temperature of the predictions", above=0)

    epochs: int = option(400, "passes over the data", group="optimisation", least=1)
    max_steps: int = option(0, "save and stop after this many steps; 0: never", free=True, least=0)
    batch_size: int = option(256, "images per step over all ranks; scales learning rates linearly", least=2)
    lr: float = option(0.6, "highest learning rate of the schedule, for this batch size", above=0)
    momentum: float = option(0.9, "momentum of SGD", least=0, below=1)
    weight_decay: float = option(1e-6, "weight decay of every parameter", least=0)

    recipe: str = option("", "named settings; options given on the command line win", group="run", free=True)
    out: str = option("", "run directory; the same command resumes (default: runs/METHOD_RECIPE)", free=True)
    fresh: bool = option(False, "start over, deleting what the run directory holds", free=True)
    init_from: str = option("", "trunk to start from: a run, a checkpoint file, released:NAME", free=True)
    precision: str = option("auto", "precision of the network; auto: bfloat16 where the hardware is fast",
                            choices=("auto", "bfloat16", "float32", "float64"))
    compile: bool = option(False, "compile the trunk with torch.compile", free=True)
    checkpointing: bool = option(False, "recompute a ResNet's maps in the backward pass: a third slower, "
                                 "half the memory", free=True)
    deterministic: bool = option(False, "same bits on GPUs too: slower; stops where it cannot", free=True)
    seed: int = option(0, "seed of weights, order and crops", least=0, below=1 << 32)
    device: str = option("auto", "auto: a GPU if there is one", choices=("auto", "cpu", "cuda"), free=True)
    log_every: int = option(20, "steps between log lines", free=True, least=1)
    save_every: float = option(10.0, "minutes between checkpoints", free=True, least=0)
    keep_every: int = option(0, "epochs between backbone_EPOCH.pt files; 0: none", free=True, least=0)
    eval_every: int = option(0, "epochs between k-NN evaluations by labels; 0: none", free=True, least=0)
    tensorboard: bool = option(False, "also write TensorBoard events", free=True)


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that prints an error in one line, only on rank 0, and exits with code 2."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        open_streams()

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for option, value in zip(["", *args], args):
            if not value or re.fullmatch("--[a-z-]+=", value):
                self.error(f"{value or option} has an empty value: is a shell variable not set?")
        return super().parse_args(args, namespace)

    def error(self, message):
        fail(f"{message} (python {self.prog} --help lists the options)", 2)


def parse(cls, recipes, description, argv=None):
    """Makes the Config of a command line. Given options override the recipe, which overrides the default row.

    recipes: {name: (result, {option: value})}. The default is "shapes" for the embedded images, and the first
    row for all others. That row needs GPUs: on a CPU the script exits with code 2 and suggests "small".
    --batch-size without --lr scales the recipe's learning rates.
    """
    parser = Parser(usage="%(prog)s [options]", description=description, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {name: parser.add_argument_group(name) for name in GROUPS}
    default, group = next(iter(recipes)), None
    published = recipe(cls, recipes, default)
    for f in fields(cls):
        shared = RunOptions.__dataclass_fields__.get(f.name)
        group = shared.metadata["group"] or group if shared else f.metadata["group"] or "method"
        _add(groups[group], f, getattr(published, f.name))
    groups["run"].add_argument("--list-recipes", action="store_true",
                               help="print the recipes with their results, and stop")
    given = vars(parser.parse_args(argv))
    if given.pop("list_recipes"):
        print(table(cls, recipes))
        sys.exit(0)
    embedded = given.get("data", "shapes").partition(":")[0] == "shapes"
    name = given.get("recipe", "shapes" if embedded else default)
    if name not in recipes:
        parser.error(f"--recipe {name}: choose one of {', '.join(recipes)}")
    if "recipe" not in given and name == default and (given.get("device") == "cpu"
                                                      or not torch.cuda.is_available()):
        parser.error(f"the default recipe {default} needs GPUs: on a CPU take --recipe small, "
                     f"or name --recipe {default} to run it all the same")
    given.setdefault("out", f"runs/{Path(parser.prog).stem}_{name}")
    return override(recipe(cls, recipes, name), given)


def recipe(cls, recipes, name):
    """Returns a recipe as published: its row overrides the default row, and that the class's defaults."""
    _, shared = next(iter(recipes.values()))
    return cls(**{**shared, **recipes[name][1], "recipe": name})


def override(config, given):
    """Returns config with the options given. Other learning rates scale with --lr, or the batch size."""
    scale = given.get("batch_size", config.batch_size) / config.batch_size
    if "lr" in given and config.lr:
        scale = given["lr"] / config.lr
    rates = [name for name in LEARNING_RATES if hasattr(config, name) and name not in given]
    return replace(config, **{name: getattr(config, name) * scale for name in rates}, **given)


def check(config, world_size):
    """Raises ArgumentError if an option is out of bounds, or if two options do not fit together."""
    c = config
    for f in fields(config):
        _check_bounds(f, getattr(c, f.name))
    if c.batch_size % world_size:
        raise ArgumentError(f"--batch-size {c.batch_size} is not divisible by the {world_size} processes")
    if getattr(c, "warmup_epochs", 0) > c.epochs:
        raise ArgumentError(f"--warmup-epochs {c.warmup_epochs} is longer than the run: --epochs {c.epochs}")
    groups = f"--crops {_words(c.crops)} --sizes {_words(c.sizes)} --scales {_words(c.scales)}"
    if not len(c.crops) == len(c.sizes) == len(c.scales) / 2 > 0:
        raise ArgumentError(f"{groups}: one number, one size and two scales per resolution are needed")
    if c.sizes[0] != max(c.sizes) or any(low > high for low, high in zip(c.scales[::2], c.scales[1::2])):
        raise ArgumentError(f"{groups}: the largest size first, and pairs smallest <= largest, are needed")
    if c.range and not (len(c.range) == 2 and c.range[0] < c.range[1]):
        raise ArgumentError(f"--range {_words(c.range)}: two numbers are needed, the lower one first")
    if 64 * c.width % 1:
        raise ArgumentError(f"--width {c.width}: 64 times the width must be a whole number")
    if len(c.jitter) != 4 or c.jitter[3] > 0.5:
        raise ArgumentError(f"--jitter {_words(c.jitter)}: four strengths are needed, the hue's at most 0.5")


def _check_bounds(f, value):
    bounds = f.metadata["bounds"]
    words = {"above": "more than", "least": "at least", "below": "less than", "most": "at most"}
    holds = {"above": lambda v, b: v > b, "least": lambda v, b: v >= b, "below": lambda v, b: v < b,
             "most": lambda v, b: v <= b}
    for v in value if isinstance(value, tuple) else (value,):
        if not all(holds[name](v, bound) for name, bound in bounds.items()):
            needed = " and ".join(f"{words[name]} {bound}" for name, bound in bounds.items())
            raise ArgumentError(f"{_flag(f.name)} {_words(value)}: {needed} is needed")
        if not isinstance(v, str) and v and not 1e-30 < abs(v) < 1e12:  # else products overflow
            raise ArgumentError(f"{_flag(f.name)} {_words(value)}: 0, or 1e-30 to 1e12 in size, is needed")


def table(cls, recipes):
    """Returns the recipes as text: name, result, and what differs from the first one, the default."""
    base = asdict(recipe(cls, recipes, next(iter(recipes))))
    lines = []
    for name, (result, values) in recipes.items():
        changed = [_typed(key, value) for key, value in values.items() if value != base[key]]
        lines += [f"{name:24} {result}", "    " + (" ".join(changed) or "(the defaults)")]
    return "\n".join(lines)


def differences(config, saved):
    """Returns the options that differ from the saved dict though a resumed run must not change them, as
    strings: "--lr 0.6 (saved 0.3)"."""
    current = asdict(config)
    was = {f.name: f.default for f in fields(config)}  # an option that is newer has its default
    was |= {name: tuple(value) if isinstance(value, list) else value for name, value in saved.items()}
    return [f"{_flag(f.name)} {_words(current[f.name])} (saved {_words(was[f.name])})"
            for f in fields(config) if not f.metadata["free"] and current[f.name] != was[f.name]]


def _typed(name, value):
    """Formats an option as on a command line."""
    if isinstance(value, bool):
        return _flag(name if value else f"no_{name}")
    return f"{_flag(name)} {_words(value)}".rstrip()


def _flag(name):
    return "--" + name.replace("_", "-")


def _words(value):
    if isinstance(value, tuple):
        return " ".join(f"{v:g}" for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _add(group, f, default):
    text = f.metadata["help"].replace("%", "%%")
    if f.type is bool:  # makes --name and --no-name
        text += f" (default: {'on' if default else 'off'})"
        group.add_argument(_flag(f.name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS,
                           help=text)
        return
    many = get_origin(f.type) is tuple
    kind = get_args(f.type)[0] if many else f.type
    text += f" (default: {_words(default)})" if default not in ("", ()) else ""
    choices = f.metadata["choices"]
    group.add_argument(_flag(f.name), type=kind, nargs="*" if many else None, action=_Tuple if many
                       else "store", default=argparse.SUPPRESS, help=text,
                       choices=_OrOwn(choices) if f.name == "arch" else choices,
                       metavar=None if choices else {int: "N", float: "X", str: "NAME"}[kind])


class _OrOwn(tuple):
    """Choices that also admit any package.module:function."""

    def __contains__(self, name):
        return super().__contains__(name) or OWN.fullmatch(name) is not None


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))
