"""Describes a checkpoint of a run or of another project, and converts it for other projects.

    python -m common.weights swav_800ep_pretrain.pth.tar
    python -m common.weights --list                        # checkpoints that projects have released, by name
    python -m common.weights released:swav_800ep           # downloads it the first time
    python -m common.weights runs/swav --to detectron2 --out swav.pkl
    python -m common.weights runs/swav --features ~/photos --out features.npz   # labels are not needed
"""

import hashlib
import json
from argparse import RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from .. import data, distributed, features
from ..engine.checkpoint import export_backbone
from ..engine.errors import ArgumentError, border, say
from ..engine.files import writing
from ..engine.launch import autocast_dtype, launch
from ..engine.options import Parser
from ..multicrop import MEAN, STD
from . import released
from .export import (
    detectron2_options,
    export_detectron2,
    export_model,
    export_safetensors,
    torchvision_has,
)
from .load import HeadsDoNotFit, describe, load_backbone, open_model, open_trunk
from .model import Model


def arguments(argv=None):
    parser = Parser("-m common.weights", description=__doc__, formatter_class=RawDescriptionHelpFormatter,
                    allow_abbrev=False)
    parser.add_argument("file", help="a run directory, a backbone.pt, another project's checkpoint or "
                                     "released:NAME")
    parser.add_argument("--list", action="version", version=released.table(),
                        help="print the names, addresses and licences of released checkpoints, and stop")
    parser.add_argument("--to", choices=("torchvision", "safetensors", "detectron2", "model"),
                        help="write a backbone.pt (torchvision's names, with any heads), the trunk as "
                             "safetensors, a .pkl for detectron2, or (model) a torchvision network with a "
                             "cluster head as its fc and the training images' clusters as L")
    parser.add_argument("--features", default="", metavar="DATA",
                        help="write features of images (a folder, list or set) to an .npz file: features (N, "
                             "D) float32, NaN where an image cannot be read, paths (N,), info as JSON; "
                             "torchrun splits the images over processes")
    parser.add_argument("--out", default="", metavar="FILE", help="file to write")
    parser.add_argument("--head", type=int, default=0, help="the head that --to model takes (default: 0)")
    parser.add_argument("--arch", default="", metavar="MODULE:FUNCTION",
                        help="your own function that makes the trunk, if the file is of such a trunk")
    parser.add_argument("--trust-pickle", action="store_true",
                        help="run code that an old file may contain: only if you trust its origin")
    return parser.parse_args(argv)


def main(args):
    if bool(args.to) + bool(args.features) != bool(args.out):
        raise ArgumentError("--to and --out go together, or --features and --out: what to write, and where")
    path, out = Path(args.file), Path(args.out)
    if args.out and out.exists() and path.exists() and out.samefile(path):
        raise ArgumentError(f"--out {out} is the file itself")
    if args.features:
        return write_features(args)
    path = distributed.from_main(released.local, args.file)
    try:
        model, info, contents = open_model(args.file, args.trust_pickle, args.arch)
    except HeadsDoNotFit as error:
        if args.to == "model":
            raise
        print(f"warning: {error}: they are left out")
        backbone, info, contents = open_trunk(args.file, args.trust_pickle, args.arch)
        model, contents = Model(backbone, None, []), contents._replace(labels=None)
    report(path, model, info, contents)
    if not args.to:
        return
    try:
        if args.to == "torchvision":
            export_backbone(out, model.backbone, info, model, contents.labels)
        elif args.to == "safetensors":
            export_safetensors(out, model.backbone, info)
        elif args.to == "detectron2":
            export_detectron2(out, model.backbone, info)
        else:
            export_model(out, model, info, args.head, contents.labels)
    except OSError as error:
        raise ArgumentError(f"--out {out} cannot be written: {error.strerror or error}") from None
    print(f"written: {out}")
    if args.to == "detectron2":
        print(f"  options     MODEL.WEIGHTS {out} {detectron2_options(info)}")
    elif not torchvision_has(info):
        print("  torchvision has no such network: common.weights.load_backbone rebuilds it")


def write_features(args):
    """Computes the trunk's features of a set of images, split over ranks, and writes them to one file."""
    device, all_of_it = distributed.start(), Path(args.features).is_dir()  # even if it holds a train/
    what = args.file, args.trust_pickle, args.arch
    trunk, info = load_backbone(*what) if args.arch else distributed.from_main(load_backbone, *what)
    images = distributed.from_first(data.open_images, args.features, "" if all_of_it else "train", "",
                                    args.file if Path(args.file).is_dir() else "",
                                    info.get("range", ()), info.get("exif", False))
    say(f"{args.file}: {describe(info)}; {len(images)} images of {args.features} at {info['size']} px")
    bad = set()
    rows, _ = features.extract(trunk.to(device, memory_format=torch.channels_last), images, info["resize"],
                               info["size"], device, info.get("mean", MEAN), info.get("std", STD), workers=-1,
                               precision=autocast_dtype("auto", device), bad=bad)
    rows = distributed.gather_on_main(rows.float().cpu())  # all rows on rank 0
    distributed.from_main(_write_features, args.out, rows, images.paths, info)
    bad = int(distributed.all_sum(torch.tensor(len(bad))))
    say(f"written: {args.out}, features ({len(images)}, {rows.shape[1]})"
        + f"; {bad} images cannot be read and are NaN" * (bad > 0))


def _write_features(path, rows, paths, info):
    with border(ArgumentError, f"--out {path} cannot be written"), writing(path) as file:
        np.savez(file, features=rows, paths=np.array(paths), info=json.dumps(info))


def report(path, model, info, contents):
    """Prints what a file is, and which of its tensors are used."""
    tensors = sum(not name.endswith("num_batches_tracked") for name in contents.trunk)
    millions = sum(parameter.numel() for parameter in model.backbone.parameters()) / 1e6
    print(f"{path}: {info['method']}, {describe(info)}")
    if path.is_file():
        print(f"  sha256      {sha256(path)}")
    print(f"  trunk       {tensors} of {tensors} tensors, {millions:.1f} M parameters, "
          f"{model.backbone.feature_dim} features")
    if model.projection_head is not None:
        sizes = [layer.out_features for layer in model.projection_head if isinstance(layer, nn.Linear)]
        print(f"  projection  {' -> '.join(map(str, sizes))}")
    clusters = ", ".join(f"{head.out_features} clusters" for head in model.heads)
    print(f"  heads       {clusters or 'none: there are no clusters in it'}")
    if contents.labels is not None:
        print(f"  labels      {' x '.join(map(str, contents.labels.shape))}")
    if contents.unused:
        groups = Counter(key.partition(".")[0] for key in contents.unused)
        print(f"  not used    {', '.join(f'{name} ({count})' for name, count in groups.items())}")


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


if __name__ == "__main__":
    launch(main, arguments())
