"""What the evaluations share: the trunk and the labelled images that their arguments name, and accuracies
counted over all ranks."""

import argparse
import json
import os
from pathlib import Path

import torch

from .. import data, distributed, weights
from ..engine.errors import ArgumentError, CheckpointError, DataError, say
from ..engine.files import writing
from ..engine.launch import autocast_dtype
from ..engine.options import Parser
from ..multicrop import MEAN, STD


def parser(description, data_help, val_help):
    """A parser of the options that have one name and meaning in every evaluation."""
    p = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
               allow_abbrev=False)
    p.add_argument("trunk", help="a run directory, a backbone.pt or another project's checkpoint")
    p.add_argument("--data", default="", help=data_help)
    if val_help:
        p.add_argument("--val", default="", help=val_help)
        p.add_argument("--root", default="", help="folder that relative paths of list files start from")
    p.add_argument("--resize", type=int, default=0,
                   help="short side before the centre crop (default: as trained, 256 for another project's)")
    p.add_argument("--size", type=int, default=0,
                   help="side of the images in pixels (default: as trained, 224 for another project's)")
    p.add_argument("--random-init", action="store_true", help="replace the weights by random ones")
    p.add_argument("--workers", type=int, default=-1,
                   help="loader processes per rank (default: its share of the CPU cores, at most 8)")
    p.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    return p


def check(args):
    """Raises ArgumentError if an option of `parser` cannot work."""
    if args.resize < 0 or args.size < 0 or args.workers < -1:
        raise ArgumentError(f"--resize {args.resize} --size {args.size} --workers {args.workers}: 0 or more "
                            f"is needed")


def is_features(args):
    """Whether the trunk's place is taken by a file of kept features; they need no images."""
    if not args.trunk.endswith(".npz"):
        return False
    given = [name for name in ("data", "val", "root", "resize", "size", "random_init") if getattr(args, name)]
    if given:
        raise ArgumentError(f"--{given[0].replace('_', '-')} needs a trunk: {args.trunk} holds features")
    return True


def name(info):
    """A line on what is evaluated."""
    if not info.get("arch"):
        return "features"
    width = info.get("width") or 1
    return f"{info['arch']} x{width:g}, {info['method']}"


def write(path, record):
    """Writes the record of an evaluation as JSON. A full disk is a warning: the figures have been printed."""
    problem = distributed.from_main(_write, path, record)
    if problem:
        say(f"warning: {path} cannot be written: {problem}")


def _write(path, record):
    try:
        with writing(path, text=True) as file:
            file.write(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        return error.strerror or str(error)


def open_trunk(args):
    """(trunk, info) that the arguments name, on every rank; with --random-init one of its architecture with
    random weights."""
    trunk, info = distributed.from_main(weights.load_backbone, args.trunk)
    if args.random_init:
        torch.manual_seed(0)
        trunk, info = weights.build_backbone(info), {**info, "method": "random weights"}
    return trunk, {**info, "resize": args.resize or info["resize"], "size": args.size or info["size"]}


def open_labelled(args):
    """(training images, images to judge by), both with labels numbered alike; read by rank 0.

    Without --data they are those of the run that the trunk belongs to.
    """
    return distributed.from_main(_open_labelled, args)


def _open_labelled(args):
    spec, root, val = sources(args)
    if not spec:
        raise ArgumentError("--data is needed: labelled images")
    images = data.open_images(spec, "train", root)
    queries = data.open_queries(spec, val, root)
    if queries.fingerprint == images.fingerprint and _folder(queries) == _folder(images):
        raise DataError("--data and --val are the same images: each would find itself")
    for part, name in ((images, "--data"), (queries, "--val")):
        if part.labels is None:
            raise DataError(f"{name} has no labels: class folders, or a list with labels, are needed")
    data.match_classes(queries, images)
    return images, queries


def sources(args):
    """(data, root, val) as the arguments name them, or as the run that the trunk belongs to has them; data is
    "" if nobody does."""
    saved = Path(args.trunk) / "config.json"
    try:
        run = json.loads(saved.read_text()) if saved.is_file() else {}
    except ValueError:
        raise CheckpointError(f"{saved} is damaged") from None
    spec = args.data or run.get("data") or ("shapes" if run else "")
    # What the run was trained on comes with its own root and held-out images; other data does not.
    if args.data:
        return spec, args.root, args.val
    return spec, args.root or run.get("root", ""), args.val or run.get("val", "")


def _folder(images):
    # a fingerprint is that of the paths below it
    return os.path.realpath(images.root) if hasattr(images, "root") else None


def extraction(args, info, device):
    """The keywords of features.extract that the arguments and the trunk's info set."""
    return dict(device=device, mean=info.get("mean", MEAN), std=info.get("std", STD),
                batch_size=args.batch_size, workers=args.workers,
                precision=autocast_dtype(args.precision, device))


def warn_of_unreadable(images, labels, name):
    """Says how many images of a set were left out, from this rank's labels as features.extract returned
    them."""
    # STL-10 has images without a label
    unreadable = int(distributed.all_sum((labels < 0).sum())) - int((images.labels < 0).sum())
    if unreadable:
        say(f"warning: {unreadable} images of {name} cannot be read and are left out")
