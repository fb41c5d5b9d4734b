"""Options: one dataclass is the command line, the recipe table fills it in, and both print themselves.

@dataclass
class Config:
    epochs: int = option(400, "passes over the data", group="optimisation")

config = parse(Config, RECIPES, __doc__)
"""

import argparse
import math
import sys
from dataclasses import asdict, field, fields, replace
from typing import get_args, get_origin

import torch

from .errors import ArgumentError, fail

LEARNING_RATES = ("lr", "final_lr", "start_lr")  # scale together


def option(default, help, group=None, choices=None, free=False):
    """One option of a Config. group: heading in --help, kept until the next one. free: may change when a run
    resumes."""
    return field(default=default, metadata={"help": help, "group": group, "choices": choices, "free": free})


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, said by rank 0 alone, with exit code 2."""

    def error(self, message):
        fail(f"{message} (python {self.prog} --help lists the options)", 2)


def parse(cls, recipes, description, argv=None):
    """Config from the command line: options given win over the recipe, the recipe wins over the class's
    defaults.

    recipes: {name: (result, {option: value})}. Without --recipe it is "shapes" for the embedded images, and
    the class's default for any others, which on a CPU exits with code 2. --batch-size without --lr scales the
    recipe's learning rates linearly.
    """
    parser = Parser(usage="%(prog)s [options]", description=description,
                    formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    group = parser
    for f in fields(cls):
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        _add(group, f)
    group.add_argument("--list-recipes", action="store_true",
                       help="print the recipes with their results, and stop")
    given = vars(parser.parse_args(argv))
    if given.pop("list_recipes"):
        print(table(cls, recipes))
        sys.exit(0)
    default = cls().recipe
    embedded = given.get("data", "shapes").partition(":")[0] == "shapes"
    name = given.get("recipe", "shapes" if embedded else default)
    if name not in recipes:
        parser.error(f"--recipe {name}: choose one of {', '.join(recipes)}")
    if "recipe" not in given and name == default and (given.get("device") == "cpu"
                                                      or not torch.cuda.is_available()):
        parser.error(f"the default recipe {default} needs GPUs: on a CPU take --recipe small, or name "
                     f"--recipe {default} to run it all the same")
    return override(recipe(cls, recipes, name), given)


def recipe(cls, recipes, name):
    """The Config of a recipe as published."""
    return replace(cls(), recipe=name, **recipes[name][1])


def override(config, given):
    """config with the options in `given`. The learning rates not given follow --lr, or the batch size (linear
    rule)."""
    scale = given.get("batch_size", config.batch_size) / config.batch_size
    if "lr" in given and config.lr:
        scale = given["lr"] / config.lr
    scaled = {name: getattr(config, name) * scale for name in LEARNING_RATES if hasattr(config, name)
              and name not in given}
    return replace(config, **scaled, **given)


def check(config, world_size):
    """Raises ArgumentError if an option that all methods share cannot work."""
    c = config
    for f in fields(config):
        if f.type is float and not math.isfinite(getattr(c, f.name)):
            raise ArgumentError(f"--{f.name.replace('_', '-')} {getattr(c, f.name)}: a number is needed")
    if c.batch_size < 1:
        raise ArgumentError(f"--batch-size {c.batch_size}: at least 1 is needed")
    if c.batch_size % world_size:
        raise ArgumentError(f"--batch-size {c.batch_size} is not divisible by the {world_size} processes")
    if c.epochs < 1:
        raise ArgumentError(f"--epochs {c.epochs}: at least 1 is needed")
    if not 0 <= getattr(c, "warmup_epochs", 0) <= c.epochs:
        raise ArgumentError(f"--warmup-epochs {c.warmup_epochs} is longer than the run: --epochs {c.epochs}")
    groups = f"--crops {_words(c.crops)} --sizes {_words(c.sizes)} --scales {_words(c.scales)}"
    if not len(c.crops) == len(c.sizes) == len(c.scales) / 2:
        raise ArgumentError(f"{groups}: one number, one size and two scales a resolution are needed")
    if any(not 0 < low <= high <= 1 for low, high in zip(c.scales[::2], c.scales[1::2])):
        raise ArgumentError(f"--scales {_words(c.scales)}: pairs 0 < smallest <= largest <= 1 are needed")
    if min(c.crops) < 1 or min(c.sizes) < 1 or c.sizes[0] != max(c.sizes):
        raise ArgumentError(f"{groups}: positive numbers are needed, the largest size first")
    positive = "prototypes heads hidden dim temperature epsilon pca_dim kmeans_iterations centroid_iters relabellings lam tolerance"
    positive += " relabel_power lr drop_factor log_every"
    for name in positive.split():
        if getattr(c, name, 1) <= 0:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(c, name)}: more than 0 is needed")
    for name in ("workers", "max_bad"):
        if getattr(c, name) < -1:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(c, name)}: -1 or more is needed")
    if c.seed >= 1 << 32:
        raise ArgumentError(f"--seed {c.seed}: less than {1 << 32} is needed")
    names = ("seed", "queue_length", "queue_start_epoch", "sinkhorn_iterations", "weight_decay", "max_steps",
             "eval_size")
    for name in (*names, "final_lr", "start_lr", "rotate", "min_cluster", "reweight", "save_every",
                 "keep_every", "eval_every"):
        if getattr(c, name, 0) < 0:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(c, name)}: 0 or more is needed")
    for name in ("momentum", "memory_momentum", "jitter_p", "grey_p", "blur_p"):
        if not 0 <= getattr(c, name, 0) <= 1 or c.momentum == 1:
            raise ArgumentError(f"--{name.replace('_', '-')} {getattr(c, name)}: between 0 and 1 is needed")
    if c.width <= 0 or 64 * c.width % 1:
        raise ArgumentError(f"--width {c.width}: 64 times the width must be a whole number")
    if len(c.jitter) != 4 or not all(j >= 0 for j in c.jitter) or c.jitter[3] > 0.5:
        raise ArgumentError(f"--jitter {_words(c.jitter)}: four strengths are needed, the hue's at most 0.5")


def table(cls, recipes):
    """The recipes as text: name, result, and what differs from the defaults of the Config."""
    base = asdict(cls())
    lines = []
    for name, (result, values) in recipes.items():
        lines.append(f"{name:24} {result}")
        changed = [f"--{key.replace('_', '-')} {_words(value)}" for key, value in values.items()
                   if value != base[key]]
        lines.append("    " + (" ".join(changed) or "(the defaults)"))
    return "\n".join(lines)


def differences(config, saved):
    """Options in which a resumed run differs from the saved dict and may not, as "--lr 0.6 (saved 0.3)"
    strings."""
    current = asdict(config)
    fixed = [f.name for f in fields(config) if not f.metadata["free"]]
    return [f"--{name.replace('_', '-')} {_words(current[name])} (saved {_words(saved.get(name))})"
            for name in fixed if current[name] != (tuple(saved[name]) if isinstance(saved.get(name), list)
                                                   else saved.get(name))]


def _words(value):
    return " ".join(f"{v:g}" for v in value) if isinstance(value, tuple) else f"{value:g}" if isinstance(
        value, float) else str(value)


def _add(group, f):
    flag = "--" + f.name.replace("_", "-")
    text = f.metadata["help"].replace("%", "%%")
    if f.type is bool:
        group.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        return
    many = get_origin(f.type) is tuple
    kind = get_args(f.type)[0] if many else f.type
    text += f" (default: {_words(f.default)})" if f.default not in ("", ()) else ""
    group.add_argument(flag, type=kind, nargs="+" if many else None, action=_Tuple if many else "store",
                       default=argparse.SUPPRESS, choices=f.metadata["choices"], metavar=None
                       if f.metadata["choices"] else {int: "N", float: "X", str: "NAME"}[kind], help=text)


class _Tuple(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, tuple(values))
