"""Do clusters and classes agree? NMI, AMI, ARI, Hungarian accuracy and purity, and a page on which to look at
the clusters.

The published figures are those of *held-out* images, each put by the trained heads, in eval mode and from its
centre crop, into the cluster with the highest score. --training judges the assignments that the run itself
kept of its training images, and --kmeans those of k-means on the trunk's pooled features, for models without
heads. Every figure stands beside what the same clusters get against shuffled labels: NMI and purity of many
small clusters are high by chance alone.

    python eval_cluster.py runs/swav_shapes                                  # held-out images, by the heads; gallery.html
    python eval_cluster.py runs/swav_shapes --training                       # its training images, as assignments.npz has them
    python eval_cluster.py moco_v2_800ep.pth.tar --kmeans 3000 --data /imagenet
    python eval_cluster.py runs/swav_small --images ~/new_photos             # no labels needed: clusters.csv and the gallery
"""

import csv
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import data, distributed, weights
from common.engine.errors import ArgumentError, CheckpointError, DataError, say
from common.engine.files import writing
from common.engine.launch import launch
from common.evaluation import gallery
from common.evaluation import protocol as evaluation
from common.evaluation.metrics import METRICS, ami, ari, hungarian_accuracy, nmi  # noqa: F401 (names to import from here)
from common.features import extract
from common.kmeans import kmeans, nearest

# N images, H heads, K clusters of a head, C classes

def judge(clusters, labels):
    """{metric: percent}, the NMI of the geometric mean beside."""
    figures = {name: 100 * metric(clusters, labels) for name, metric in METRICS.items()}
    return {**figures, "nmi_geometric": 100 * nmi(clusters, labels, geometric=True)}


# ------------------------------------------------------------------------------------------------ assignments


class Assign(nn.Module):
    """What is kept of a model's scores: for each image the best cluster of every head, then its score; (B, 2
    H)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x):
        scores = self.model(x)  # H of (B, K)
        self.sizes = [s.shape[1] for s in scores]
        best = [s.float().max(dim=1) for s in scores]
        # float32 counts to 16 million
        return torch.stack([b.indices.float() for b in best] + [b.values for b in best], dim=1)


def by_heads(assign, images, info, how):
    """Clusters (H, N) int64, -1 where an image cannot be read, and scores (H, N): of all images on every
    rank."""
    rows, _ = extract(assign, images, info["resize"], info["size"], **how)
    rows = distributed.gather_rows(rows.float().cpu()).t()  # (2 H, N)
    clusters, scores = rows.chunk(2)
    if not scores[clusters >= 0].isfinite().all():
        raise CheckpointError("the heads give scores that are not finite: the weights are damaged")
    return clusters.nan_to_num(-1).long().numpy(), scores.numpy()


def by_kmeans(trunk, fitted, images, info, how, k, seed):
    """The same of one k-means clustering of unit features: fitted to the first set, looked up for the second.
    A score is the squared distance to the centroid, negative."""

    def features(part):
        rows, _ = extract(trunk, part, info["resize"], info["size"], **how)
        return F.normalize(rows.float()), ~rows.isnan().any(dim=1)

    rows, readable = features(fitted)
    if int(distributed.all_sum(readable.sum())) < k:
        raise ArgumentError(f"--kmeans {k} needs as many images: {int(distributed.all_sum(readable.sum()))} "
                            f"of {len(fitted)} can be read")
    centroids, *_ = kmeans(rows[readable], k, iterations=50, generator=torch.Generator().manual_seed(seed))
    if images is not fitted:
        rows, readable = features(images)
    clusters, distances = nearest(rows.nan_to_num(0), centroids)
    clusters, scores = torch.where(readable, clusters, -1), torch.where(readable, -distances, math.nan)
    return tuple(distributed.gather_rows(x.cpu())[None].numpy() for x in (clusters, scores))


def by_run(folder, images):
    """Clusters (H, N) that a run last gave to its training images, -1 where it has not seen one yet, and
    K."""
    path = Path(folder) / "assignments.npz"
    clusters = data.read_assignments(path, images).astype(np.int64)
    if not (clusters >= 0).any():
        raise DataError(f"{path}: no image has a cluster yet")
    try:
        k = json.loads((Path(folder) / "config.json").read_text())["prototypes"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}/config.json cannot be read ({error})") from None
    return clusters, [max(k, int(clusters.max()) + 1)] * len(clusters)


class Some:
    """A few images of a set, as a set without labels."""

    labels = None

    def __init__(self, images, index):
        self.images, self.index = images, index

    def __len__(self):
        return len(self.index)

    def read(self, i):
        return self.images.read(self.index[i])


def typical(assign, images, clusters, head, info, how, most):
    """Scores (N,) of their own cluster for at most `most` images of each, NaN for the others: for assignments
    that came without."""
    order = np.random.default_rng(0).permutation(len(clusters))
    order = order[np.argsort(clusters[order], kind="stable")]
    first = np.searchsorted(clusters[order], np.arange(clusters.max() + 1))
    rank = np.arange(len(order)) - first[np.maximum(0, clusters[order])]
    index = np.sort(order[(clusters[order] >= 0) & (rank < most)]).tolist()
    found, value = by_heads(assign, Some(images, index), info, how)
    scores = np.full(len(clusters), np.nan)
    scores[index] = np.where(found[head] == clusters[index], value[head], np.nan)
    return scores


# ------------------------------------------------------------------------------------------------------- main


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "images (default: the run's); k-means is of its training images",
                               "labelled held-out images (default: the val split of --data)")
    parser.add_argument("--training", action="store_true",
                        help="the run's training images, as assignments.npz (or --kmeans) has them")
    parser.add_argument("--images", default="", metavar="DIR",
                        help="cluster these images, labels or not; writes clusters.csv")
    parser.add_argument("--kmeans", type=int, default=0, metavar="K",
                        help="clusters of pooled features, in place of the heads")
    parser.add_argument("--head", type=int, default=0, help="head that the gallery shows (default: 0)")
    parser.add_argument("--samples", type=int, default=12,
                        help="typical and random thumbnails a cluster; 0: no gallery (default: 12)")
    parser.add_argument("--out", default="", metavar="DIR",
                        help="where the files go (default: the run's directory, or the current one)")
    parser.add_argument("--seed", type=int, default=0, help="of k-means (default: 0)")
    parser.add_argument("--batch-size", type=int, default=256,
                        help="images at a time on each process (default: 256)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bfloat16", "float32"),
                        help="of the trunk (default: auto)")
    return parser.parse_args(argv)


def check(args):
    evaluation.check(args)
    if args.batch_size < 1 or min(args.kmeans, args.head, args.samples, args.seed) < 0:
        given = f"--kmeans {args.kmeans} --head {args.head} --samples {args.samples} --seed {args.seed} --batch-size {args.batch_size}"
        raise ArgumentError(f"{given}: nothing below 0 is possible, and at least 1 image a batch")
    if args.training and args.images:
        raise ArgumentError("--training and --images: choose one, the images to judge")
    if args.val and (args.training or args.images):
        raise ArgumentError(f"--val {args.val} is not judged beside "
                            f"{'--training' if args.training else '--images'}: leave one of them out")
    if args.images and args.data and not args.kmeans:
        raise ArgumentError(f"--data {args.data} is not looked at beside --images, but with --kmeans, which "
                            f"is fitted to it")
    if args.random_init and not args.kmeans:
        raise ArgumentError("--random-init needs --kmeans: heads of random weights say nothing")


def open_output(args):
    """The folder that the files go to; that it can be written is seen before the work, not after it."""
    out = Path(args.out or (args.trunk if Path(args.trunk).is_dir() else "."))
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / ".writable").touch()
        (out / ".writable").unlink()
    except OSError as error:
        raise ArgumentError(f"--out {out} cannot be written: {error.strerror}") from None
    return out


def open_subject(args):
    """(training images or None, images to judge, what these are)."""
    if args.images:
        folder = Path(args.images).is_dir()  # all of it, also where it holds a train/
        images = data.open_images(args.images, "" if folder else "train", args.root)
        return data.open_images(args.data, "train",
                                args.root) if args.data else None, images, f"images of {args.images}"
    if args.training and not args.kmeans and not Path(args.trunk).is_dir():
        raise CheckpointError(f"{args.trunk} is no run: --training needs the directory of one, or --kmeans")
    spec, root, val = evaluation.sources(args)
    if not spec and not (val and not args.training and not args.kmeans):
        if not Path(args.trunk).exists():  # with a run that is there, there would be data
            raise CheckpointError(f"{args.trunk} does not exist")
        raise ArgumentError("--data is needed: labelled images, or --images DIR")
    training = data.open_images(spec, "train", root) if args.training or args.kmeans else None
    images = training if args.training else data.open_queries(spec, val, root)
    name = "--data" if args.training else "--val"
    if images.labels is None:
        raise DataError(f"{name} has no labels to compare clusters with: class folders are needed, or "
                        f"--images DIR to look alone")
    found = images.labels[images.labels >= 0].unique().tolist()
    if len(found) < 2:
        only = f" ({images.classes[found[0]]})" if found else ""
        raise DataError(f"{name} has images of {len(found)} class{only}: at least two are needed to compare "
                        f"clusters with")
    return training, images, "training images" if args.training else "held-out images"


def check_head(args, heads):
    if args.head >= heads:
        raise ArgumentError(f"--head {args.head}: {args.trunk} has {heads} head{'s' * (heads > 1)}, numbered "
                            f"from 0")


def open_heads(args, device):
    """The model that assigns, on the device, its info, and how to look at images with it."""
    model, info = distributed.from_main(weights.load_model, args.trunk)
    if not len(model.heads):
        raise CheckpointError(f"{args.trunk} has no heads to cluster with: --kmeans K clusters its features")
    info = {**info, "resize": args.resize or info["resize"], "size": args.size or info["size"]}
    return Assign(model).to(device, memory_format=torch.channels_last), info, evaluation.extraction(
        args, info, device)


def main(args):
    device = distributed.start(args.device)
    check(args)
    out = distributed.from_main(open_output, args)
    training, images, subject = distributed.from_main(open_subject, args)
    if args.kmeans:
        check_head(args, 1)
        trunk, info = evaluation.open_trunk(args)
        trunk = trunk.to(device, memory_format=torch.channels_last)
        how = evaluation.extraction(args, info, device)
        clusters, scores = by_kmeans(trunk, training or images, images, info, how, args.kmeans, args.seed)
        sizes, source = [
            args.kmeans], f"k-means on {'the same' if training in (None, images) else 'training'} features"
    elif args.training:
        clusters, sizes = distributed.from_main(by_run, args.trunk, images)
        check_head(args, len(clusters))
        assign, info, how = open_heads(args, device)
        scores, source = None, "assignments.npz"
        if args.samples:
            scores = np.full(clusters.shape, np.nan)
            scores[args.head] = typical(assign, images, clusters[args.head], args.head, info, how,
                                        8 * args.samples)
    else:
        assign, info, how = open_heads(args, device)
        check_head(args, len(assign.model.heads))
        clusters, scores = by_heads(assign, images, info, how)
        sizes, source = assign.sizes, "the heads"

    record = {"trunk": str(args.trunk), **{key: info.get(key) for key in ("method", "arch", "epoch")},
              **{"images": subject, "clusters_by": source, "count": len(images),
                 "unassigned": int((clusters[0] < 0).sum())},
              "heads": [{"clusters": k, "used": len(np.unique(c[c >= 0]))} for k, c in zip(sizes, clusters)]}
    say(f"{args.trunk}: {evaluation.name(info)}, {info['size']} px; {len(images)} {subject}, clusters by "
        f"{source}")
    if record["unassigned"]:
        say(f"warning: {record['unassigned']} images cannot be read, or have no cluster yet, and are left out")
    labels = images.labels
    if labels is not None and len(labels[labels >= 0].unique()) > 1:
        for head, (figures, chance) in zip(record["heads"],
                                           distributed.from_main(compare, clusters, labels.numpy())):
            head.update(figures, chance=chance)
        record["mean"] = {name: float(np.mean([head[name] for head in record["heads"]])) for name in figures}
    report(record)
    say(json.dumps(record))
    suffix = "_training" * args.training + "_images" * bool(args.images) + "_kmeans" * bool(
        args.kmeans) + "_random" * args.random_init
    try:
        if args.images:
            table = out / f"clusters{'_kmeans' * bool(args.kmeans)}.csv"
            distributed.from_main(write_csv, table, images, clusters, scores)
            say(f"clusters: {table}")
        if args.samples:
            about = describe(record, args, info)
            arguments = images, clusters[args.head], None if scores is None else scores[args.head], sizes[args.head], about, args.samples
            size, shown = distributed.from_main(gallery.write, out / f"gallery{suffix}.html", *arguments)
            fewer = f", {shown} thumbnails of each kind a cluster for its size's sake" * (shown
                                                                                          < args.samples)
            say(f"gallery: {out / f'gallery{suffix}.html'}, {size / 1e6:.1f} MB{fewer}")
    except OSError as error:
        raise ArgumentError(f"--out {out} cannot be written: {error.strerror or error}") from None
    evaluation.write(out / f"eval_cluster{suffix}.json", record)


def compare(clusters, labels):
    """For each head the figures, and those of the same clusters with shuffled labels."""
    heads = []
    for c in clusters:
        known = (c >= 0) & (labels >= 0)
        if not known.any():
            raise DataError("no image has both a cluster and a label")
        shuffled = np.random.default_rng(0).permutation(labels[known])
        heads.append((judge(c[known], labels[known]), judge(c[known], shuffled)))
    return heads


def report(record):
    """The table; of several heads with their mean."""
    heads = record["heads"]
    if "nmi" not in heads[0]:
        for h, head in enumerate(heads):
            say(f"head {h}: {head['used']} of {head['clusters']} clusters in use")
        return

    def line(name, used, figures):
        say(f"{name:8}{used:>16}" + "".join(f"{np.mean([f[metric] for f in figures]):11.2f}"
                                            for metric in METRICS))

    say(f"{'':8}{'clusters used':>16}" + "".join(f"{name:>11}" for name in ("NMI", "AMI", "ARI", "Hungarian",
                                                                            "purity")))
    for h, head in enumerate(heads):
        line(f"head {h}", f"{head['used']} of {head['clusters']}", [head])
    if len(heads) > 1:
        line("mean", "", heads)
    line("chance", "", [head["chance"] for head in heads])


def describe(record, args, info):
    """What the gallery says above the clusters."""
    head = record["heads"][args.head]
    which = f", head {args.head} of {len(record['heads'])}" * (len(record["heads"]) > 1)
    figures = [["clusters used", f"{head['used']:,} of {head['clusters']:,}", ""]]
    if "nmi" in head:
        names = {"nmi": "NMI", "ami": "AMI", "ari": "ARI", "hungarian": "Hungarian", "purity": "purity"}
        figures += [[word, f"{head[name]:.1f}",
                     f"chance {round(head['chance'][name], 1) + 0.0:.1f}"] for name, word in names.items()]
    notes = [f"{evaluation.name(info)}; clusters by {record['clusters_by']}{which}"]
    return {"title": f"Clusters of {record['count']:,} {record['images']}", "notes": notes,
            "figures": figures}


def write_csv(path, images, clusters, scores):
    """path, then cluster and score of each head: -1 and nothing for an image that cannot be read."""
    with writing(path, text=True) as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(f"{what}{h}" for h in range(len(clusters)) for what in ("head", "score"))])
        for name, own, score in zip(images.paths, clusters.T.tolist(), scores.T.tolist()):
            writer.writerow([name,
                             *(x for c, s in zip(own, score) for x in (c, "" if c < 0 else f"{s:.6g}"))])


if __name__ == "__main__":
    launch(main, arguments())
