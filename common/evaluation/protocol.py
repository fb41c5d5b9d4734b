"""Shared by the evaluation scripts: options, opening of the trunk and the images, writing of the record."""

import argparse
import json
import os
from pathlib import Path

import torch

from .. import data, distributed, weights
from ..engine.errors import ArgumentError, CheckpointError, DataError, border, say
from ..engine.files import writing
from ..engine.held_out import match_classes, open_queries
from ..engine.launch import autocast_dtype
from ..engine.options import Parser
from ..multicrop import MEAN, STD, TRIES
from ..sources import own

PRECISIONS = ("auto", "bfloat16", "float32")


def parser(description, data_help, val_help, batch_size=None, precisions=PRECISIONS, crops=True):
    """Returns a parser with the options that have one name and meaning in every evaluation.

    batch_size: default of --batch-size, the images per forward pass and process; None: no such option. crops:
    whether the evaluation uses centre crops, and so has --resize and --size.
    """
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=description, formatter_class=raw, allow_abbrev=False)
    add = parser.add_argument
    add("trunk", help="a run directory, a backbone.pt, another project's checkpoint or released:NAME "
                 "(python -m common.weights --list)")
    add("--data", default="", help=data_help)
    if val_help:
        add("--val", default="", help=val_help)
        add("--root", default="", help="folder that relative paths of list files start from")
        add("--index", default="", metavar="DIR",
            help="folder for the index of tars (default: the run's directory; none for a file)")
    parser.set_defaults(resize=0, size=0)
    if crops:
        add("--resize", type=int,
            help="short side before the centre crop (default: as trained, 256 for another project's)")
        add("--size", type=int,
            help="side of the images in pixels (default: as trained, 224 for another project's)")
    add("--arch", default="", metavar="MODULE:FUNCTION",
        help="your own function that makes the trunk; has to be typed: no file may choose code to run")
    add("--random-init", action="store_true", help="replace the trunk's weights by random ones: the floor")
    if batch_size:
        add("--batch-size", type=int, default=batch_size,
            help="images per forward pass on each process (default: %(default)s)")
    add("--precision", default="auto", choices=precisions,
        help="arithmetic of the trunk (default: auto, bfloat16 where the hardware has it)")
    add("--workers", type=int, default=-1,
        help="loader processes per rank (default: its share of the CPU cores, at most 8)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"),
        help="where to compute (default: auto, a GPU if there is one)")
    return parser


def add_presets(parser, presets, table, length=("--epochs", "passes over the images; drops of the learning "
                                                            "rate scale along")):
    """Adds the options of scripts that train by a published protocol. length: name and help of the option
    that sets the length of training."""
    add = parser.add_argument
    add("--preset", default="small", choices=presets,
        help="protocol; options on the command line override it (default: small)")
    add("--list-presets", action="version", version=table,
        help="print the presets with their published figures, and stop")
    add(length[0], type=int, help=length[1])
    add("--batch-size", type=int, help="images per step over all processes")
    add("--seed", type=int, default=0, help="seed of weights, draws, order and crops (default: 0)")
    add("--out", default="", metavar="DIR",
        help="folder for classifier, record and saved state (default: the run's directory; for a file one "
             "in runs/)")
    add("--save-every", type=float, default=10.0, help="minutes between saves; 0: each step (default: 10)")
    add("--fresh", action="store_true", help="start over instead of resuming")


def start(args):
    """Joins the other processes; returns the device. Raises ArgumentError for options that cannot work."""
    fine = min(args.resize, args.size, args.workers + 1) >= 0
    need(fine, args, "resize size workers", "0 or more is needed")
    fine = max(args.resize, args.size) <= 10_000 and args.workers <= 1024
    need(fine, args, "resize size workers", "at most 10000 pixels and 1024 workers are possible")
    need(getattr(args, "save_every", 0) >= 0, args, "save_every", "0 or more is needed")
    return distributed.start(args.device)


def need(fine, options, names, needed):
    """Raises ArgumentError unless `fine`. Its message shows the named options and what is needed."""
    if not fine:
        values = {name.replace("_", "-"): words(getattr(options, name)) for name in names.split()}
        raise ArgumentError(f"{' '.join(f'--{name} {value}' for name, value in values.items())}: {needed}")


def words(value):
    """Formats a value as it is typed on the command line."""
    if isinstance(value, (tuple, list)):
        return " ".join(map(words, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def given(args, names):
    """Returns {name: value} of the named options that were given; lists become tuples."""
    values = {name: getattr(args, name) for name in names}
    return {name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items() if value is not None}


def kept_rates(preset, rates, batch_size, wanted):
    """Returns a warning: a preset's rates are for its batch_size, and are not scaled to the `wanted` one."""
    rule = words([lr * wanted / batch_size for lr in rates])
    return (f"warning: --lr {words(rates)} of {preset} belongs to batch {batch_size} and is kept: "
            f"for {wanted} the linear rule asks for --lr {rule}")


def is_features(args):
    """Returns whether a file of features stands for the trunk; if so, refuses options that need a trunk."""
    if not args.trunk.endswith(".npz"):
        return False
    for name in ("data", "val", "root", "index", "resize", "size", "arch", "random_init"):
        if getattr(args, name):
            raise ArgumentError(f"--{name.replace('_', '-')} needs a trunk: {args.trunk} holds features")
    return True


def name(info):
    """Describes what is evaluated."""
    return f"{info['arch']} x{info.get('width') or 1:g}, {info['method']}" if info.get("arch") else "features"


def loaded(load, *arguments, arch):
    """Returns load(*arguments, arch=arch). Rank 0 loads and sends it, but each rank loads a trunk of the
    user's own, which cannot be sent."""
    return load(*arguments, arch=arch) if arch else distributed.from_main(load, *arguments)


def open_trunk(args, device):
    """Returns (trunk, info) as the arguments name them, on the device. With --random-init weights are random.

    Raises CheckpointError if its features are not finite, ArgumentError if it cannot take images of this
    size.
    """
    trunk, info = loaded(weights.load_backbone, args.trunk, arch=args.arch)
    if args.random_init:
        torch.manual_seed(0)
        trunk, info = weights.build_backbone(info, args.arch), {**info, "method": "random weights"}
    trunk, info = trunk.to(device, memory_format=torch.channels_last).eval(), sized(args, info)
    if args.arch:
        own.check(trunk, args.arch, [info["size"]], device)
    try:
        with torch.inference_mode():
            features = trunk(torch.ones(1, 3, info["size"], info["size"], device=device))
    except ValueError as error:
        raise ArgumentError(f"--size {info['size']} does not fit {args.trunk}: {error}") from None
    if not features.isfinite().all():
        raise CheckpointError(f"{args.trunk} gives features that are not finite: its weights have run away")
    return trunk, info


def sized(args, info):
    """Returns info with the sizes of images that were given, instead of the trunk's own."""
    return {**info, "resize": args.resize or info["resize"], "size": args.size or info["size"]}


def open_labelled(args, info):
    """Opens (training images, images to evaluate on). Both number the labels alike and convert pixels as in
    the trunk's training. The first process of each node reads them.

    Without --data, uses the data of the run that the trunk belongs to.
    """
    return distributed.from_first(_open_labelled, args, info)


def _open_labelled(args, info):
    spec, root, val = sources(args)
    if not spec:
        raise ArgumentError("--data is needed: labelled images")
    images = data.open_images(spec, "train", root, *how(args, info))
    queries = open_queries(spec, val, root, *how(args, vars(images)))
    if queries.fingerprint == images.fingerprint and _folder(queries) == _folder(images):
        raise DataError("--data and --val are the same images: each would find itself")
    for part, option in ((images, "--data"), (queries, "--val")):
        if part.labels is None:
            raise DataError(f"{option} has no labels: class folders, or a list with labels, are needed")
    match_classes(queries, images)
    return images, queries


def open_known(args, info, classes, count, numbered=False):
    """Opens the images to evaluate on, with labels numbered as a classifier's. classes: its `count` names
    (numbered: they are numbers of a list); None: its classes are sorted by name. info: the trunk's."""
    spec, root, val = sources(args)
    if not spec and not val:
        raise ArgumentError("--val is needed: labelled images to judge by")
    queries = open_queries(spec, val, root, *how(args, info))
    if queries.labels is None:
        raise DataError("--val has no labels: class folders, or a list with labels, are needed")
    if classes is not None:
        known = Subset(queries, [])
        known.classes, known.labels, known.numbered = classes, torch.arange(count), numbered
        match_classes(queries, known)
    elif len(queries.classes) != count:
        raise DataError(f"the images to judge by have {len(queries.classes)} classes, the classifier {count}")
    return queries


def seen(path):
    """Identifies a version of a file by size and time, without reading it."""
    return f"{path} {os.stat(path).st_size} {os.stat(path).st_mtime_ns}"


def _folder(images):
    """Returns the folder from which the paths of a set start, or None."""
    return os.path.realpath(images.root) if hasattr(images, "root") else None


def sources(args):
    """Returns (data, root, val) of the arguments, else of the trunk's run. data is "" if neither has it."""
    run = config(args.trunk)
    if args.data:  # root and val of the run belong to its own data, so they are not used
        return args.data, args.root, args.val
    spec, val = run.get("data") or ("shapes" if run else ""), args.val or run.get("val", "")
    for option, named, typed in (("--data", spec, ""), ("--val", val, args.val)):
        if data.is_own(named) and not typed:  # a file must not choose code to run
            typed = f"{option} {named:.200}"
            raise ArgumentError(f"{args.trunk} names {typed}, which is code of its own: type {typed}")
    return spec, args.root or run.get("root", ""), val


def how(args, info):
    """Returns (index, range, exif) for open_images: the folder for the index of tars, and how pixels are
    converted according to info (a trunk's, or vars() of a set)."""
    index = args.index or (args.trunk if os.path.isdir(args.trunk) else "")
    return index, tuple(info.get("range", ())), info.get("exif", False)


def config(folder):
    """Reads the config.json of a run; {} if there is none."""
    path = Path(folder, "config.json")
    with border(CheckpointError, f"{path} cannot be used"):
        run = json.loads(path.read_text()) if path.is_file() else {}
        for name, kind in {"data": str, "root": str, "val": str, "prototypes": int}.items():
            if not isinstance(run.get(name, kind()), kind):
                raise TypeError(f"{name} is {run[name]!r:.60}, no {kind.__name__}")
    return run


class Subset:
    """A set of the images at `index` (n,) of another set."""

    def __init__(self, images, index):
        self.images, self.index = images, index
        self.paths = [images.paths[i] for i in index]
        self.labels = None if images.labels is None else images.labels[index]

    def __len__(self):
        return len(self.index)

    def read(self, i):
        return self.images.read(int(self.index[i]))


def extraction(args, info, device, batch_size=256):
    """Returns the keyword arguments of features.extract. Raises ArgumentError if the crop is larger than the
    resized image: its border would be black."""
    if info["resize"] < info["size"]:
        raise ArgumentError(f"--resize {info['resize']} is smaller than --size {info['size']}")
    return dict(resize=info["resize"], size=info["size"], device=device, mean=info.get("mean", MEAN),
                std=info.get("std", STD), batch_size=batch_size, workers=args.workers,
                precision=autocast_dtype(args.precision, device))


def folder(args, name, decisive):
    """Returns the folder for an evaluation's files: --out, the run's directory, or for a file one in runs/,
    named by evaluation, file and checksum. Raises ArgumentError if it cannot be written."""
    trunk = Path(args.trunk)
    stem = trunk.name.removeprefix("released:").partition(".")[0]
    path = trunk if trunk.is_dir() else Path("runs", f"{name}_{stem}_{decisive['trunk'][:8]}")
    path = Path(args.out) if args.out else path
    return distributed.from_main(writable, path)


def writable(path):
    """Makes and returns the folder. Raises ArgumentError if it cannot be written, before any work is done."""
    with border(ArgumentError, f"--out {path} cannot be written"):
        path.mkdir(parents=True, exist_ok=True)
        (path / ".writable").touch()
        (path / ".writable").unlink()
    return path


def decisive(args, trunk, **others):
    """Returns {name: value} of all that decides the result: options except those of machine and files, the
    trunk's checksum, and others."""
    free = {"trunk", "arch", "data", "val", "root", "index", "out", "save_every", "fresh", "workers",
            "device", "head"}
    options = {name: value for name, value in vars(args).items() if name not in free}
    return {**options, "trunk": weights.checksum(trunk) if trunk is not None else "features", **others}


def check_readable(loader):
    """Raises DataError if a loader of --data, on any rank, failed on TRIES images in a row."""
    if distributed.all_max(torch.tensor(int(loader.lost))):
        raise DataError(f"{TRIES} images of --data in a row cannot be read")


def warn_of_bad(trained, judged):
    """Warns how many images of both sets cannot be read, and what became of them. trained, judged: the
    unreadable ones that this rank has met."""
    for bad, which, what in ((trained, "--data", "were replaced by their neighbours"),
                             (judged, "the held-out set", "are left out")):
        found = len(distributed.gather_rows(torch.tensor(sorted(bad), dtype=torch.int64)).unique())
        if found:
            say(f"warning: {found} images of {which} cannot be read and {what}")


def warn_of_unreadable(images, labels, option):
    """Warns how many images of a set were left out. labels: this rank's, from features.extract."""
    missing = int((images.labels < 0).sum())  # STL-10 has images without a label
    unreadable = int(distributed.all_sum((labels < 0).sum())) - missing
    if unreadable:
        say(f"warning: {unreadable} images of {option} cannot be read and are left out")


def finish(args, info, name, record, folder=None):
    """Prints an evaluation's record and writes it to NAME.json in folder (default: the run's, if the trunk is
    a run). If that fails, only warns: the figures have been printed."""
    record = {"trunk": args.trunk, **{key: info.get(key) for key in ("method", "arch", "epoch")}, **record}
    say(json.dumps(record))
    if folder or Path(args.trunk).is_dir():
        path = Path(folder or args.trunk, f"{name}{'_random' * args.random_init}.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            distributed.from_main(_write, path, json.dumps(record, indent=1) + "\n")
        except OSError as error:
            say(f"warning: {path} cannot be written: {error.strerror or error}")


def _write(path, text):
    with writing(path, text=True) as file:
        file.write(text)
