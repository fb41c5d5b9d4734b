"""Do clusters and classes agree? NMI, AMI, ARI, Hungarian accuracy and purity, and a page on which to look at the clusters.

The published figures are those of *held-out* images, each put by the trained heads, in eval mode and from its centre crop, into
the cluster with the highest score. --training judges the assignments that the run itself kept of its training images, and
--kmeans those of k-means on the trunk's pooled features, for models without heads. Every figure stands beside what the same
clusters get against shuffled labels: NMI and purity of many small clusters are high by chance alone.

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
from scipy.optimize import linear_sum_assignment
from scipy.sparse import coo_array
from scipy.special import gammaln
from torch import nn

from common import checkpoint, data, distributed, evaluation, gallery
from common.config import ArgumentError
from common.features import extract
from common.kmeans import kmeans, nearest
from common.run import launch, say

# N images, H heads, K clusters of a head, C classes

# ----------------------------------------------------------------------------------------------------------- metrics
# Of two labellings (N,) with any whole numbers, also negative ones; the names of the labels do not matter.


def contingency(a, b):
    """How often each value of a meets each value of b: (values in a, values in b) int64, sparse."""
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"two labellings of the same items, (N,) with N >= 1, are needed: got shapes {a.shape} and {b.shape}")
    rows, columns = (np.unique(x, return_inverse=True)[1] for x in (a, b))
    counts = coo_array((np.ones(len(a), np.int64), (rows, columns)))
    counts.sum_duplicates()
    return counts


def entropy(counts):
    share = counts / counts.sum()
    return -(share * np.log(share)).sum()


def _information(a, b):
    """Mutual information of a and b in nats, their entropies, and how often each value occurs."""
    counts = contingency(a, b)
    n, size_a, size_b = counts.sum(), counts.sum(axis=1), counts.sum(axis=0)
    mutual = (counts.data / n * np.log(n * counts.data / (size_a[counts.row] * size_b[counts.col]))).sum()
    return max(0.0, mutual), entropy(size_a), entropy(size_b), size_a, size_b


def nmi(a, b, geometric=False):
    """Mutual information over the arithmetic mean of the entropies, or the geometric one (DeepCluster's paper): 0 to 1."""
    mutual, h_a, h_b, size_a, size_b = _information(a, b)
    if len(size_a) == len(size_b) == 1:
        return 1.0
    mean = math.sqrt(h_a * h_b) if geometric else (h_a + h_b) / 2
    return float(mutual / mean) if mean else 0.0


def ami(a, b):
    """Adjusted mutual information, arithmetic mean ("aNMI" in SeLa's table): 1 if equal, 0 on average by chance."""
    mutual, h_a, h_b, size_a, size_b = _information(a, b)
    mean, n = (h_a + h_b) / 2, size_a.sum()
    if len(size_a) == len(size_b) and len(size_a) in (1, n):
        return 1.0  # all in one, or each alone, in both: equal, though chance would do no worse
    expected = expected_information(size_a, size_b)
    return float((mutual - expected) / (mean - expected))


def expected_information(size_a, size_b):
    """Mean mutual information of all pairs of labellings with these cluster sizes (hypergeometric model)."""
    n, total = size_a.sum(), 0.0
    log_factorial = gammaln(np.arange(n + 1) + 1)
    (size_a, times_a), (size_b, times_b) = (np.unique(sizes, return_counts=True) for sizes in (size_a, size_b))
    for a, times in zip(size_a, times_a):
        # The overlap of two clusters, but for what lies where its probability is below exp(-45), by Chernoff's bounds.
        mean = a * size_b / n
        first = np.maximum(np.maximum(1, a + size_b - n), np.floor(mean - np.sqrt(90 * mean))).astype(np.int64)
        last = np.minimum(np.minimum(a, size_b), np.ceil(mean + 15 + np.sqrt(225 + 90 * mean))).astype(np.int64)
        lengths = last - first + 1
        column = np.repeat(np.arange(len(size_b)), lengths)
        overlap = np.arange(len(column)) - np.repeat(lengths.cumsum() - lengths - first, lengths)
        b = size_b[column]
        log_p = log_factorial[a] + log_factorial[b] + log_factorial[n - a] + log_factorial[n - b] - log_factorial[n]
        log_p -= log_factorial[overlap] + log_factorial[a - overlap] + log_factorial[b - overlap] + log_factorial[n - a - b + overlap]
        total += times * (times_b[column] * overlap / n * np.log(n * overlap / (a * b)) * np.exp(log_p)).sum()
    return total


def ari(a, b):
    """Adjusted Rand index: agreement on the pairs of items that are together; 1 if equal, 0 on average by chance."""
    counts = contingency(a, b)
    together, in_a, in_b = ((x * (x - 1.0) / 2).sum() for x in (counts.data, counts.sum(axis=1), counts.sum(axis=0)))
    pairs = counts.sum() * (counts.sum() - 1.0) / 2
    expected = in_a * in_b / pairs if pairs else 0.0
    if in_a == in_b == together:
        return 1.0
    return float((together - expected) / ((in_a + in_b) / 2 - expected))


def hungarian_accuracy(a, b):
    """Share of items that the best one-to-one matching of clusters with classes gets right ("label accuracy"). Clusters
    beyond the number of classes stay without one."""
    counts = contingency(a, b).toarray()
    return float(counts[linear_sum_assignment(counts, maximize=True)].sum() / counts.sum())


def purity(a, b):
    """Share of items that have the label b most frequent in their cluster a: matching many to one. Not symmetric."""
    counts = contingency(a, b)
    return float(counts.max(axis=1).sum() / counts.sum())


METRICS = {"nmi": nmi, "ami": ami, "ari": ari, "hungarian": hungarian_accuracy, "purity": purity}


def judge(clusters, labels):
    """{metric: percent}, the NMI of the geometric mean beside."""
    figures = {name: 100 * metric(clusters, labels) for name, metric in METRICS.items()}
    return {**figures, "nmi_geometric": 100 * nmi(clusters, labels, geometric=True)}


# ------------------------------------------------------------------------------------------------------- assignments


class Assign(nn.Module):
    """What is kept of a model's scores: for each image the best cluster of every head, then its score; (B, 2 H)."""

    def __init__(self, model):
        super().__init__()
        self.model, self.sizes = model, []

    def forward(self, x):
        scores = self.model(x)  # H of (B, K)
        self.sizes = [s.shape[1] for s in scores]
        best = [s.float().max(dim=1) for s in scores]
        return torch.stack([b.indices.float() for b in best] + [b.values for b in best], dim=1)  # float32 counts to 16 million


def by_heads(assign, images, info, how):
    """Clusters (H, N) int64, -1 where an image cannot be read, and scores (H, N): of all images on every rank."""
    rows, _ = extract(assign, images, info["resize"], info["size"], **how)
    rows = distributed.gather_rows(rows.float().cpu()).t()  # (2 H, N)
    clusters, scores = rows.chunk(2)
    if not scores[clusters >= 0].isfinite().all():
        raise checkpoint.CheckpointError("the heads give scores that are not finite: the weights are damaged")
    return clusters.nan_to_num(-1).long().numpy(), scores.numpy()


def by_kmeans(trunk, fitted, images, info, how, k, seed):
    """The same of one k-means clustering of unit features: fitted to the first set, looked up for the second. A score is the
    squared distance to the centroid, negative."""

    def features(part):
        rows, _ = extract(trunk, part, info["resize"], info["size"], **how)
        return F.normalize(rows.float()), ~rows.isnan().any(dim=1)

    rows, readable = features(fitted)
    if int(distributed.all_sum(readable.sum())) < k:
        raise ArgumentError(f"--kmeans {k} needs as many images: {int(distributed.all_sum(readable.sum()))} of {len(fitted)} can be read")
    centroids, *_ = kmeans(rows[readable], k, iterations=50, generator=torch.Generator().manual_seed(seed))
    if images is not fitted:
        rows, readable = features(images)
    clusters, distances = nearest(rows.nan_to_num(0), centroids)
    clusters, scores = torch.where(readable, clusters, -1), torch.where(readable, -distances, math.nan)
    return tuple(distributed.gather_rows(x.cpu())[None].numpy() for x in (clusters, scores))


def by_run(folder, images):
    """Clusters (H, N) that a run last gave to its training images, -1 where it has not seen one yet, and K."""
    path = Path(folder) / "assignments.npz"
    clusters = data.read_assignments(path, images).astype(np.int64)
    if not (clusters >= 0).any():
        raise data.DataError(f"{path}: no image has a cluster yet")
    try:
        k = json.loads((Path(folder) / "config.json").read_text())["prototypes"]
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise checkpoint.CheckpointError(f"{folder}/config.json cannot be read ({error})") from None
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
    """Scores (N,) of their own cluster for at most `most` images of each, NaN for the others: for assignments that came without."""
    order = np.random.default_rng(0).permutation(len(clusters))
    order = order[np.argsort(clusters[order], kind="stable")]
    first = np.searchsorted(clusters[order], np.arange(clusters.max() + 1))
    rank = np.arange(len(order)) - first[np.maximum(0, clusters[order])]
    index = np.sort(order[(clusters[order] >= 0) & (rank < most)]).tolist()
    found, value = by_heads(assign, Some(images, index), info, how)
    scores = np.full(len(clusters), np.nan)
    scores[index] = np.where(found[head] == clusters[index], value[head], np.nan)
    return scores


# -------------------------------------------------------------------------------------------------------------- main


def arguments(argv=None):
    parser = evaluation.parser(
        __doc__,
        "images (default: the run's); k-means is of its training images",
        "labelled held-out images (default: the val split of --data)",
    )
    parser.add_argument("--training", action="store_true", help="the run's training images, as assignments.npz (or --kmeans) has them")
    parser.add_argument("--images", default="", metavar="DIR", help="cluster these images, labels or not; writes clusters.csv")
    parser.add_argument("--kmeans", type=int, default=0, metavar="K", help="clusters of pooled features, in place of the heads")
    parser.add_argument("--head", type=int, default=0, help="head that the gallery shows (default: 0)")
    parser.add_argument("--samples", type=int, default=12, help="typical and random thumbnails a cluster; 0: no gallery (default: 12)")
    parser.add_argument("--out", default="", metavar="DIR", help="where the files go (default: the run's directory, or the current one)")
    parser.add_argument("--seed", type=int, default=0, help="of k-means (default: 0)")
    parser.add_argument("--batch-size", type=int, default=256, help="images at a time on each process (default: 256)")
    parser.add_argument("--precision", default="auto", choices=("auto", "bfloat16", "float32"), help="of the trunk (default: auto)")
    return parser.parse_args(argv)


def check(args):
    evaluation.check(args)
    if args.batch_size < 1 or min(args.kmeans, args.head, args.samples, args.seed) < 0:
        given = f"--kmeans {args.kmeans} --head {args.head} --samples {args.samples} --seed {args.seed} --batch-size {args.batch_size}"
        raise ArgumentError(f"{given}: nothing below 0 is possible, and at least 1 image a batch")
    if args.training and args.images:
        raise ArgumentError("--training and --images: choose one, the images to judge")
    if args.val and (args.training or args.images):
        raise ArgumentError(f"--val {args.val} is not judged beside {'--training' if args.training else '--images'}: leave one of them out")
    if args.images and args.data and not args.kmeans:
        raise ArgumentError(f"--data {args.data} is not looked at beside --images, but with --kmeans, which is fitted to it")
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
        return data.open_images(args.data, "train", args.root) if args.data else None, images, f"images of {args.images}"
    if args.training and not args.kmeans and not Path(args.trunk).is_dir():
        raise checkpoint.CheckpointError(f"{args.trunk} is no run: --training needs the directory of one, or --kmeans")
    spec, root, val = evaluation.sources(args)
    if not spec and not (val and not args.training and not args.kmeans):
        if not Path(args.trunk).exists():  # with a run that is there, there would be data
            raise checkpoint.CheckpointError(f"{args.trunk} does not exist")
        raise ArgumentError("--data is needed: labelled images, or --images DIR")
    training = data.open_images(spec, "train", root) if args.training or args.kmeans else None
    images = training if args.training else data.open_queries(spec, val, root)
    name = "--data" if args.training else "--val"
    if images.labels is None:
        raise data.DataError(f"{name} has no labels to compare clusters with: class folders are needed, or --images DIR to look alone")
    found = images.labels[images.labels >= 0].unique().tolist()
    if len(found) < 2:
        only = f" ({images.classes[found[0]]})" if found else ""
        raise data.DataError(f"{name} has images of {len(found)} class{only}: at least two are needed to compare clusters with")
    return training, images, "training images" if args.training else "held-out images"


def check_head(args, heads):
    if args.head >= heads:
        raise ArgumentError(f"--head {args.head}: {args.trunk} has {heads} head{'s' * (heads > 1)}, numbered from 0")


def open_heads(args, device):
    """The model that assigns, on the device, its info, and how to look at images with it."""
    model, info = distributed.from_main(checkpoint.load_model, args.trunk)
    if not len(model.heads):
        raise checkpoint.CheckpointError(f"{args.trunk} has no heads to cluster with: --kmeans K clusters its features")
    info = {**info, "resize": args.resize or info["resize"], "size": args.size or info["size"]}
    return Assign(model).to(device, memory_format=torch.channels_last), info, evaluation.extraction(args, info, device)


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
        sizes, source = [args.kmeans], f"k-means on {'the same' if training in (None, images) else 'training'} features"
    elif args.training:
        clusters, sizes = distributed.from_main(by_run, args.trunk, images)
        check_head(args, len(clusters))
        assign, info, how = open_heads(args, device)
        scores, source = None, "assignments.npz"
        if args.samples:
            scores = np.full(clusters.shape, np.nan)
            scores[args.head] = typical(assign, images, clusters[args.head], args.head, info, how, 8 * args.samples)
    else:
        assign, info, how = open_heads(args, device)
        check_head(args, len(assign.model.heads))
        clusters, scores = by_heads(assign, images, info, how)
        sizes, source = assign.sizes, "the heads"

    record = {
        "trunk": str(args.trunk),
        **{key: info.get(key) for key in ("method", "arch", "epoch")},
        **{"images": subject, "clusters_by": source, "count": len(images), "unassigned": int((clusters[0] < 0).sum())},
        "heads": [{"clusters": k, "used": len(np.unique(c[c >= 0]))} for k, c in zip(sizes, clusters)],
    }
    say(f"{args.trunk}: {evaluation.name(info)}, {info['size']} px; {len(images)} {subject}, clusters by {source}")
    if record["unassigned"]:
        say(f"warning: {record['unassigned']} images cannot be read, or have no cluster yet, and are left out")
    labels = images.labels
    if labels is not None and len(labels[labels >= 0].unique()) > 1:
        for head, (figures, chance) in zip(record["heads"], distributed.from_main(compare, clusters, labels.numpy())):
            head.update(figures, chance=chance)
        record["mean"] = {name: float(np.mean([head[name] for head in record["heads"]])) for name in figures}
    report(record)
    say(json.dumps(record))
    suffix = "_training" * args.training + "_images" * bool(args.images) + "_kmeans" * bool(args.kmeans) + "_random" * args.random_init
    try:
        if args.images:
            table = out / f"clusters{'_kmeans' * bool(args.kmeans)}.csv"
            distributed.from_main(write_csv, table, images, clusters, scores)
            say(f"clusters: {table}")
        if args.samples:
            about = describe(record, args, info)
            arguments = images, clusters[args.head], None if scores is None else scores[args.head], sizes[args.head], about, args.samples
            size, shown = distributed.from_main(gallery.write, out / f"gallery{suffix}.html", *arguments)
            fewer = f", {shown} thumbnails of each kind a cluster for its size's sake" * (shown < args.samples)
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
            raise data.DataError("no image has both a cluster and a label")
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
        say(f"{name:8}{used:>16}" + "".join(f"{np.mean([f[metric] for f in figures]):11.2f}" for metric in METRICS))

    say(f"{'':8}{'clusters used':>16}" + "".join(f"{name:>11}" for name in ("NMI", "AMI", "ARI", "Hungarian", "purity")))
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
        figures += [[word, f"{head[name]:.1f}", f"chance {round(head['chance'][name], 1) + 0.0:.1f}"] for name, word in names.items()]
    notes = [f"{evaluation.name(info)}; clusters by {record['clusters_by']}{which}"]
    return {"title": f"Clusters of {record['count']:,} {record['images']}", "notes": notes, "figures": figures}


def write_csv(path, images, clusters, scores):
    """path, then cluster and score of each head: -1 and nothing for an image that cannot be read."""
    with checkpoint.writing(path, text=True) as file:
        writer = csv.writer(file)
        writer.writerow(["path", *(f"{what}{h}" for h in range(len(clusters)) for what in ("head", "score"))])
        for name, own, score in zip(images.paths, clusters.T.tolist(), scores.T.tolist()):
            writer.writerow([name, *(x for c, s in zip(own, score) for x in (c, "" if c < 0 else f"{s:.6g}"))])


if __name__ == "__main__":
    launch(main, arguments())
