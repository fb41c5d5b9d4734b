"""Checks on ImageNet that released weights give here what their projects have published.

    python -m benchmarks.verify --data /imagenet                 # hours on a GPU; downloads 400 MB
    python -m benchmarks.verify --data /imagenet --limit 1000    # a trial: so few images mean little

Evaluates SwAV of 800 epochs with its authors' linear classifier, then 20 nearest neighbours of several
trunks. Every weight must find its place. Measured figures stand beside published ones. Not yet run on
ImageNet: neither it nor a released file was available where this was written.
"""

import argparse

import numpy as np

from common import data, distributed, features, weights
from common.engine.errors import DataError, say
from common.engine.held_out import match_classes, open_queries
from common.engine.launch import autocast_dtype, launch
from common.evaluation.classifier import load_classifier
from common.evaluation.metrics import accuracy
from common.evaluation.protocol import Subset

LINEAR = ("swav_800ep", "swav_800ep_linear", 75.3)  # trunk, classifier, published top-1
NEIGHBOURS = {  # published 20-NN top-1 (two by the DINO paper, quoted from memory); None: none is known
    "swav_800ep": 65.7,
    "deepclusterv2_800ep": 67.1,
    "odc_440ep": 39.1,
    "sela_resnet50_10x3k": None,
}


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="ImageNet: train/ and val/ with class folders")
    parser.add_argument("--limit", type=int, default=0, help="images of each set (default: all)")
    parser.add_argument("--workers", type=int, default=-1)
    return parser.parse_args(argv)


def some(images, limit):
    """Returns `limit` random images of a set, or all of them without a limit."""
    if not 0 < limit < len(images):
        return images
    return Subset(images, np.sort(np.random.default_rng(0).permutation(len(images))[:limit]))


def line(name, what, measured, published):
    said = "not published" if published is None else f"{published:.1f}"
    say(f"{name:24} {what:18} {measured:8.2f}   published {said}")


def main(args):
    device = distributed.start()
    images, queries = data.open_images(args.data, "train"), open_queries(args.data)
    if images.labels is None or queries.labels is None:
        raise DataError(f"{args.data} has no classes: train/ and val/ with class folders are needed")
    match_classes(queries, images)
    classes = images.classes
    images, queries = some(images, args.limit), some(queries, args.limit)
    say(f"{len(images)} images to vote, {len(queries)} to judge by; top-1 in percent")

    def rows(network, info, part):
        how = dict(workers=args.workers, precision=autocast_dtype("auto", device))
        return features.extract(network.to(device), part, info["resize"], info["size"], device, **how)

    trunk, head, published = LINEAR
    network = distributed.from_main(load_classifier, f"released:{head}", f"released:{trunk}")
    if len(network.bias) != len(classes):
        raise DataError(f"{args.data} has {len(classes)} classes, {head} has {len(network.bias)}")
    line(trunk, "released classifier", accuracy(*rows(network, network.info, queries))[0], published)
    for name, published in NEIGHBOURS.items():
        trunk, info = distributed.from_main(weights.load_backbone, f"released:{name}")
        found = features.knn_accuracy(*rows(trunk, info, images), *rows(trunk, info, queries), k=20)
        line(name, "20-NN", found[20][0], published)


if __name__ == "__main__":
    launch(main, arguments())
