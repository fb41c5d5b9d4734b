"""Compares clusters with classes (NMI, AMI, ARI, Hungarian accuracy, purity), and shows them in gallery.html.

As for published figures, the default clusters *held-out* images: the trained heads score each centre crop in
eval mode, and the image joins the cluster with the highest score. --training compares the assignments of the
training images that the run saved. --kmeans clusters the trunk's pooled features, for models without heads.
Each figure is printed beside its chance level, that of the same clusters with shuffled labels: NMI and purity
of many small clusters are high by chance alone.

    python eval_cluster.py runs/swav_shapes             # held-out images, by the heads; gallery.html
    python eval_cluster.py runs/swav_shapes --training  # its training images, from assignments.npz
    python eval_cluster.py moco_v2_800ep.pth.tar --kmeans 3000 --data /imagenet
    python eval_cluster.py runs/swav_small --images ~/new_photos  # no labels needed: clusters.csv, gallery
    python eval_cluster.py runs/swav_small --images one.jpg       # prints its cluster
    python eval_cluster.py runs/swav_small --images ~/new_photos --sort-into sorted  # one folder per cluster
"""

import csv
import itertools
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common import data, distributed, weights
from common.engine.errors import ArgumentError, CheckpointError, DataError, border, say
from common.engine.files import writing
from common.engine.held_out import open_queries
from common.engine.launch import launch
from common.evaluation import gallery
from common.evaluation import protocol as evaluation
from common.evaluation.metrics import METRICS, ami, ari, hungarian_accuracy, nmi  # noqa: F401 (for importers)
from common.evaluation.store import read_assignments
from common.features import extract
from common.kmeans import kmeans, nearest

# N images, H heads, K clusters of a head, C classes
NAMES = {"nmi": "NMI", "ami": "AMI", "ari": "ARI", "hungarian": "Hungarian", "purity": "purity"}


def judge(clusters, labels):
    """Returns {metric: percent}; "nmi_geometric" is NMI normalised by the geometric mean of the entropies."""
    figures = {name: 100 * metric(clusters, labels) for name, metric in METRICS.items()}
    return {**figures, "nmi_geometric": 100 * nmi(clusters, labels, geometric=True)}


# ------------------------------------------------------------------------------------------------ assignments


class Assign(nn.Module):
    """Maps images to (B, 2 H) float32: the number of the best cluster in each head, then its score."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x):
        scores = self.model(x)  # H of (B, K)
        self.sizes = [s.shape[1] for s in scores]
        best = [s.float().max(dim=1) for s in scores]
        # float32 holds cluster numbers up to 16 million exactly
        return torch.stack([b.indices.float() for b in best] + [b.values for b in best], dim=1)


def by_heads(assign, images, how):
    """Returns, on every rank, clusters (H, N) int64 and scores (H, N); -1 and NaN for unreadable images."""
    rows, _ = extract(assign, images, **how)  # this rank's
    clusters, scores = distributed.gather_rows(rows.float().cpu()).t().chunk(2)  # (H, N) each
    return clusters.nan_to_num(-1).long().numpy(), scores.numpy()


def by_kmeans(trunk, fitted, images, how, k, seed):
    """Returns the same with H = 1 from k-means on unit features: fitted to the set `fitted`, then applied to
    `images`. A score is minus the squared distance to the centroid."""

    def features(part):
        rows, _ = extract(trunk, part, **how)
        return F.normalize(rows.float()), ~rows.isnan().any(dim=1)

    rows, readable = features(fitted)
    count = int(distributed.all_sum(readable.sum()))
    if count < k:
        raise ArgumentError(f"--kmeans {k} needs as many images: {count} of {len(fitted)} can be read")
    centroids, *_ = kmeans(rows[readable], k, iterations=50, generator=torch.Generator().manual_seed(seed))
    if images is not fitted:
        rows, readable = features(images)
    clusters, distances = nearest(rows.nan_to_num(0), centroids)
    clusters, scores = torch.where(readable, clusters, -1), torch.where(readable, -distances, math.nan)
    return tuple(distributed.gather_rows(x.cpu())[None].numpy() for x in (clusters, scores))


def by_run(folder, images):
    """Returns the clusters (H, N) that a run saved of its training images (-1: none yet), and K per head."""
    path = Path(folder) / "assignments.npz"
    clusters = read_assignments(path, images).astype(np.int64)
    if not (clusters >= 0).any():
        raise DataError(f"{path}: no image has a cluster yet")
    with border(CheckpointError, f"{folder}/config.json cannot be used"):
        k = evaluation.config(folder)["prototypes"]
    return clusters, [max(k, int(clusters.max()) + 1)] * len(clusters)


def typical(assign, images, clusters, head, how, most):
    """Scores up to `most` images per cluster, (N,). NaN: not drawn, or the head now picks another cluster."""
    order = np.random.default_rng(0).permutation(len(clusters))
    order = order[np.argsort(clusters[order], kind="stable")]
    first = np.searchsorted(clusters[order], np.arange(clusters.max() + 1))
    rank = np.arange(len(order)) - first[np.maximum(0, clusters[order])]
    index = np.sort(order[(clusters[order] >= 0) & (rank < most)])
    found, value = by_heads(assign, evaluation.Subset(images, index), how)
    scores = np.full(len(clusters), np.nan)
    scores[index] = np.where(found[head] == clusters[index], value[head], np.nan)
    return scores


# ------------------------------------------------------------------------------------------------------- main


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "images (default: the run's); k-means is fitted to their train split",
                               "labelled held-out images (default: the val split of --data)", batch_size=256)
    add = parser.add_argument
    add("--training", action="store_true", help="compare the training images instead of held-out ones")
    add("--images", default="", metavar="DATA",
        help="cluster these (a folder, list, image or set), labelled or not; writes clusters.csv")
    add("--sort-into", default="", metavar="DIR",
        help="make one folder per cluster (of --head), with links to its images, the most typical first")
    add("--copy", action="store_true", help="with --sort-into: copy the images instead of linking them")
    add("--kmeans", type=int, default=0, metavar="K",
        help="cluster the trunk's pooled features into K by k-means, instead of using the heads")
    add("--head", type=int, default=0, help="head that the gallery shows (default: 0)")
    add("--samples", type=int, default=12,
        help="typical and random thumbnails per cluster; 0: no gallery (default: 12)")
    add("--out", default="", metavar="DIR",
        help="folder for the files (default: the run's directory, or the current one)")
    add("--seed", type=int, default=0, help="seed of k-means (default: 0)")
    return parser.parse_args(argv)


def check(args):
    fine = min(args.batch_size - 1, args.kmeans, args.head, args.samples, args.seed) >= 0
    evaluation.need(fine, args, "kmeans head samples seed batch_size",
                    "nothing may be below 0, and a batch needs at least 1 image")
    if args.training and args.images:
        raise ArgumentError("--training and --images: choose one of them as the images to cluster")
    if args.val and (args.training or args.images):
        other = "--training" if args.training else "--images"
        raise ArgumentError(f"--val {args.val} cannot be combined with {other}: leave one of them out")
    if args.images and args.data and not args.kmeans:
        way = "is not used with --images, unless --kmeans is fitted to it"
        raise ArgumentError(f"--data {args.data} {way}")
    if args.random_init and not args.kmeans:
        raise ArgumentError("--random-init needs --kmeans: heads of random weights say nothing")
    if args.sort_into and args.training:
        raise ArgumentError("--sort-into needs a score of every image: --training scores a few per cluster")
    if args.training and not args.kmeans and not Path(args.trunk).is_dir():
        raise CheckpointError(f"{args.trunk} is no run: --training needs the directory of one, or --kmeans")
    if args.copy and not args.sort_into:
        raise ArgumentError("--copy needs --sort-into DIR")
    if args.sort_into and Path(args.sort_into).exists():
        raise ArgumentError(f"--sort-into {args.sort_into} exists: name a new folder")


def open_subject(args, info):
    """Returns (training images or None, images to cluster, what to call these in messages)."""
    how = evaluation.how(args, info)
    if args.images:
        folder = Path(args.images).is_dir()  # take all of it, even if it holds a train/
        training = data.open_images(args.data, "train", args.root, *how) if args.data else None
        how = evaluation.how(args, vars(training)) if training else how
        images = data.open_images(args.images, "" if folder else "train", args.root, *how)
        return training, images, f"images of {args.images}"
    spec, root, val = evaluation.sources(args)
    if not spec and not (val and not args.training and not args.kmeans):
        raise ArgumentError("--data is needed: labelled images, or --images DIR")
    training = data.open_images(spec, "train", root, *how) if args.training or args.kmeans else None
    how = evaluation.how(args, vars(training)) if training else how
    images = training if args.training else open_queries(spec, val, root, *how)
    name = "--data" if args.training else "--val"
    if images.labels is None:
        needed = "class folders are needed, or --images DIR to look alone"
        raise DataError(f"{name} has no labels to compare clusters with: {needed}")
    found = images.labels[images.labels >= 0].unique().tolist()
    if len(found) < 2:
        only = f" ({images.classes[found[0]]})" if found else ""
        needed = "at least two are needed to compare clusters with"
        raise DataError(f"{name} has images of {len(found)} class{only}: {needed}")
    return training, images, "training images" if args.training else "held-out images"


def copies(head):
    """Counts rows of a linear layer that repeat an earlier row; without a bias, only directions count."""
    rows = F.normalize(head.weight) if head.bias is None else torch.cat([head.weight, head.bias[:, None]], 1)
    return len(rows) - len(rows.unique(dim=0))


def check_head(args, heads):
    if args.head >= heads:
        has = f"{args.trunk} has {heads} head{'s' * (heads > 1)}, numbered from 0"
        raise ArgumentError(f"--head {args.head}: {has}")


def open_heads(args, device):
    """Returns the module that assigns images to clusters, on the device, and the model's info."""
    model, info = evaluation.loaded(weights.load_model, args.trunk, arch=args.arch)
    if not len(model.heads):
        raise CheckpointError(f"{args.trunk} has no heads to cluster with: --kmeans K clusters its features")
    return Assign(model).to(device, memory_format=torch.channels_last), evaluation.sized(args, info)


def main(args):
    device = evaluation.start(args)
    check(args)
    out = Path(args.out or (args.trunk if Path(args.trunk).is_dir() else "."))
    distributed.from_main(evaluation.writable, out)
    if args.kmeans:
        check_head(args, 1)
        trunk, info = evaluation.open_trunk(args, device)
    else:
        assign, info = open_heads(args, device)
    how = evaluation.extraction(args, info, device, args.batch_size)
    training, images, subject = distributed.from_first(open_subject, args, info)
    if args.sort_into and not hasattr(images, "root"):
        raise ArgumentError(f"--sort-into {args.sort_into} needs images that are files")
    if args.sort_into and Path(images.root).resolve() in Path(args.sort_into).resolve().parents:
        raise ArgumentError(f"--sort-into {args.sort_into} is among the images: name a folder elsewhere")
    if args.kmeans:
        clusters, scores = by_kmeans(trunk, training or images, images, how, args.kmeans, args.seed)
        source = f"k-means on {'the same' if training in (None, images) else 'training'} features"
        sizes = [args.kmeans]
    elif args.training:
        clusters, sizes = distributed.from_main(by_run, args.trunk, images)
        check_head(args, len(clusters))
        scores, source = np.full(clusters.shape, np.nan), "assignments.npz"
        if args.samples:
            most = 8 * args.samples
            scores[args.head] = typical(assign, images, clusters[args.head], args.head, how, most)
    else:
        check_head(args, len(assign.model.heads))
        clusters, scores = by_heads(assign, images, how)
        sizes, source = assign.sizes, "the heads"

    record = {"images": subject, "clusters_by": source, "count": len(images),
              "unassigned": int((clusters[0] < 0).sum()),
              "heads": [{"clusters": k, "used": len(np.unique(c[c >= 0]))} for k, c in zip(sizes, clusters)]}
    judged = f"{len(images)} {subject}, clusters by {source}"
    say(f"{args.trunk}: {evaluation.name(info)}, {info['size']} px; {judged}")
    if unassigned := record["unassigned"]:
        say(f"warning: {unassigned} images cannot be read, or have no cluster yet, and are left out")
    doubled = 0 if args.kmeans else sum(map(copies, assign.model.heads))
    idle = sum(head["clusters"] - head["used"] for head in record["heads"])
    if doubled or idle:
        say(f"warning: of {sum(sizes)} clusters {idle} have none of these images, "
            f"{doubled} are copies of others")
    labels = images.labels
    if labels is not None and len(labels[labels >= 0].unique()) > 1:
        compared = distributed.from_main(compare, clusters, labels.numpy())
        for head, (figures, chance) in zip(record["heads"], compared):
            head.update(figures, chance=chance)
        record["mean"] = {name: float(np.mean([head[name] for head in record["heads"]])) for name in figures}
    report(record)
    if len(images) == 1:
        say(f"{images.paths[0]}: cluster {', '.join(map(str, clusters[:, 0]))} of "
            f"{len(clusters)} head{'s' * (len(clusters) > 1)}")
    suffix = "_training" * args.training + "_images" * bool(args.images) + "_kmeans" * bool(args.kmeans)
    evaluation.finish(args, info, f"eval_cluster{suffix}", record, folder=out)
    try:
        if args.images:
            table = out / f"clusters{'_kmeans' * bool(args.kmeans)}.csv"
            distributed.from_main(write_csv, table, images, clusters, scores)
            say(f"clusters: {table}")
        if args.samples:
            page = out / f"gallery{suffix}{'_random' * args.random_init}.html"
            head = clusters[args.head], scores[args.head], sizes[args.head]
            about = describe(record, args, info)
            size, shown = distributed.from_main(gallery.write, page, images, *head, about, args.samples)
            fewer = f", only {shown} thumbnails of each kind per cluster to limit the size"
            say(f"gallery: {page}, {size / 1e6:.1f} MB{fewer * (shown < args.samples)}")
    except OSError as error:
        raise ArgumentError(f"--out {out} cannot be written: {error.strerror or error}") from None
    if args.sort_into:
        head = clusters[args.head], scores[args.head]
        count = distributed.from_main(sort_into, Path(args.sort_into), images, *head, args.copy)
        say(f"sorted: {args.sort_into}, a folder for each of {count} clusters")


def sort_into(folder, images, clusters, scores, copy):
    """Links or copies every image that has a cluster to folder/CLUSTER/RANK_NAME, highest scores first and
    images without a score last. Returns how many clusters have images."""
    digits = [len(str(max(1, n))) for n in (clusters.max(), len(clusters))]
    order = np.lexsort((-np.nan_to_num(scores, nan=-np.inf), clusters))
    used = np.unique(clusters[clusters >= 0])
    with border(ArgumentError, f"--sort-into {folder} cannot be written"):
        for cluster in used:
            inside = folder / f"{cluster:0{digits[0]}}"
            inside.mkdir(parents=True)
            for rank, i in enumerate(order[clusters[order] == cluster]):
                source = Path(images.root, images.paths[i]).absolute()
                name = inside / f"{rank:0{digits[1]}}_{source.name[-200:]}"
                shutil.copyfile(source, name) if copy else name.symlink_to(source)
    return len(used)


def compare(clusters, labels):
    """Returns (figures, chance level) of each head; chance is the same clusters with shuffled labels."""
    heads = []
    for c in clusters:
        known = (c >= 0) & (labels >= 0)
        if not known.any():
            raise DataError("no image has both a cluster and a label")
        shuffled = np.random.default_rng(0).permutation(labels[known])
        heads.append((judge(c[known], labels[known]), judge(c[known], shuffled)))
    return heads


def report(record):
    """Prints the table: a line per head, their mean if there are several, and chance."""
    heads = record["heads"]
    if "nmi" not in heads[0]:
        for h, head in enumerate(heads):
            say(f"head {h}: {head['used']} of {head['clusters']} clusters in use")
        return

    def line(name, used, figures):
        means = (np.mean([f[metric] for f in figures]) for metric in METRICS)
        say(f"{name:8}{used:>16}" + "".join(f"{mean:11.2f}" for mean in means))

    say(f"{'':8}{'clusters used':>16}" + "".join(f"{NAMES[metric]:>11}" for metric in METRICS))
    for h, head in enumerate(heads):
        line(f"head {h}", f"{head['used']} of {head['clusters']}", [head])
    if len(heads) > 1:
        line("mean", "", heads)
    line("chance", "", [head["chance"] for head in heads])


def describe(record, args, info):
    """Returns what the gallery shows above the clusters."""
    head = record["heads"][args.head]
    which = f", head {args.head} of {len(record['heads'])}" * (len(record["heads"]) > 1)
    figures = [["clusters used", f"{head['used']:,} of {head['clusters']:,}", ""]]
    if "nmi" in head:
        figures += [[word, f"{head[name]:.1f}", f"chance {round(head['chance'][name], 1) + 0.0:.1f}"]
                    for name, word in NAMES.items()]
    notes = [f"{evaluation.name(info)}; clusters by {record['clusters_by']}{which}"]
    return {"title": f"Clusters of {record['count']:,} {record['images']}", "notes": notes,
            "figures": figures}


def write_csv(path, images, clusters, scores):
    """Writes path, then cluster and score of each head; -1 and no score for an unreadable image."""
    with writing(path, text=True) as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(f"{what}{h}" for h in range(len(clusters)) for what in ("head", "score"))])
        for name, own, score in zip(images.paths, clusters.T.tolist(), scores.T.tolist()):
            cells = ((c, "" if c < 0 else f"{s:.6g}") for c, s in zip(own, score))
            writer.writerow([name, *itertools.chain.from_iterable(cells)])


if __name__ == "__main__":
    launch(main, arguments())
