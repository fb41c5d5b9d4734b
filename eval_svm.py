"""Trains linear SVMs on frozen features of VOC 2007 (Goyal et al. 2019; OpenSelfSup, VISSL).

Warps every image to a square and extracts its features once. For each of the 20 classes one SVM predicts
whether it is in an image: L2 penalty, squared hinge loss, positives weighted twice, features of unit length.
3-fold cross-validation on trainval chooses its cost from a grid. Low-shot training draws k positive and 19 k
negative images, five times. The figure is mAP: average precision on test, averaged over the classes.

Published figures choose the best layer on the test set; in low-shot they choose the cost there too
("oracle"). The output says so, and shows the choice by cross-validation beside it.

    python eval_svm.py resnet50.pth --data VOCdevkit                    # AvgPool and Feature5
    python eval_svm.py resnet50.pth --data VOCdevkit --layers feature1 feature2 feature3 feature4 feature5
    python eval_svm.py resnet50.pth --data VOCdevkit --protocol low-shot --layers avgpool
    torchrun --nproc_per_node=8 eval_svm.py runs/swav --data VOCdevkit  # 8 GPUs, an eighth of the fits each

Needs scikit-learn. Features take about a minute on a GPU. The full protocol makes 1,520 fits per layer,
low-shot about 50,000 small ones, spread over all CPU cores.
"""

import math
import time
import warnings
import xml.etree.ElementTree as ElementTree
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch

from common import distributed
from common.engine.errors import ArgumentError, DataError, border, say
from common.engine.launch import launch
from common.evaluation import pooling
from common.evaluation import protocol as evaluation
from common.features import extract
from common.multicrop import CenterCrop, Warp
from common.sources.files import decode

COSTS = {"openselfsup": (1.0, 10.0, 100.0, *(0.5**k for k in range(4, 20))),
         "vissl": (0.01, 0.1, 1.0, 2.0, 5.0, 10.0, 15.0, 20.0, 50.0, 100.0, 1000.0)}
SHOTS = (1, 2, 4, 8, 16, 32, 64, 96)
FOLDS = 3
MAX_ITERATIONS = 2000


def arguments(argv=None):
    parser = evaluation.parser(__doc__, "VOCdevkit, or VOC2007 in it: ImageSets/Main, Annotations and "
                                        "JPEGImages of trainval and test", "", batch_size=64)
    add = parser.add_argument
    add("--layers", nargs="+", default=["avgpool", "feature5"], choices=pooling.LAYERS, metavar="LAYER",
        help="feature1 .. feature5, avgpool; for AlexNet conv1 .. conv5 (default: avgpool feature5)")
    add("--protocol", nargs="+", default=["full"], choices=("full", "low-shot"),
        help="train on all labels, on a few, or both (default: full)")
    add("--costs", nargs="+", default=["openselfsup"],
        help="costs to try: openselfsup (19), vissl (11) or numbers (default: openselfsup)")
    add("--ap", default="all_points", choices=("all_points", "11point"),
        help="average precision by the rule of VOC 2010 (default) or 2007")
    add("--shots", type=int, nargs="+", default=list(SHOTS),
        help="positive images per class in low-shot (default: 1 2 4 ... 64 96)")
    add("--samples", type=int, default=5, help="draws of low-shot images (default: 5)")
    add("--seed", type=int, default=0, help="seed of the low-shot draws (default: 0)")
    add("--crop", default="warp", choices=("warp", "center"),
        help="warp the whole image to a square (default), or take its centre crop")
    add("--jobs", type=int, default=0, help="parallel fits on each process (default: its share of cores)")
    return parser.parse_args(argv)


# ----------------------------------------------------------------------------------------------------- metric


def average_precision(scores, targets, mode="all_points"):
    """Returns the average precision of one class, between 0 and 1.

    scores (n,); targets (n,): 1 present, 0 absent, -1 left out (difficult). Rows with equal scores keep their
    order, except that in sklearn_step they count as one.
    mode: "all_points", area under the precision made monotone from the right (VOC 2010, SVM benchmarks);
    "11point", mean of that precision at recalls 0, 0.1 .. 1 (VOC 2007; in floating point 0.3, 0.6 and 0.7 are
    slightly more than 3, 6 and 7 tenths, as in the official code); "sklearn_step", area under the raw steps.
    Raises ValueError for a class without a positive row.
    """
    scores, targets = np.asarray(scores, dtype=np.float64), np.asarray(targets)
    scores, positive = scores[targets >= 0], targets[targets >= 0] == 1
    if not positive.any():
        raise ValueError("average precision needs a positive row")
    order = np.argsort(-scores, kind="stable")
    found = np.cumsum(positive[order])  # (n,): positives among the first 1, 2 .. n rows
    precision, recall = found / np.arange(1, len(found) + 1), found / found[-1]
    if mode == "sklearn_step":
        last = np.append(np.diff(scores[order]) != 0, True)  # row of each score
        return float((np.diff(recall[last], prepend=0) * precision[last]).sum())
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    if mode == "11point":
        reached = [envelope[recall >= level][:1] for level in np.arange(0, 1.1, 0.1)]
        return float(np.concatenate(reached).sum() / 11)
    if mode != "all_points":
        raise ValueError(f'mode is "all_points", "11point" or "sklearn_step", got {mode!r}')
    return float((np.diff(recall, prepend=0) * envelope).sum())


# ------------------------------------------------------------------------------------------------------- data


class Voc:
    """VOC 2007: the images of trainval (`trainval` of them), then of test, each sorted by name. targets
    (N, C): 1 present, 0 absent, -1 only difficult objects. look: (range, exif) as in open_images."""

    def __init__(self, spec, look=()):
        self.look = look
        inside = [Path(spec, *parts) for parts in ((), ("VOC2007",), ("VOCdevkit", "VOC2007"))]
        self.folder = next((folder for folder in inside if (folder / "ImageSets" / "Main").is_dir()), None)
        if self.folder is None:
            needed = "a folder with VOC2007/ImageSets/Main, Annotations and JPEGImages is needed"
            raise DataError(f"{spec} is no VOCdevkit: {needed}")
        tables = {split: _class_files(self.folder, split) or _annotations(self.folder, split)
                  for split in ("trainval", "test")}
        self.classes = sorted({name for table in tables.values() for name in table})
        for split, table in tables.items():
            for name in self.classes:
                if name not in table or 1 not in table[name].values():
                    raise DataError(f"{self.folder}: class {name!r} has no positive image in {split}")
        ids = {split: sorted(next(iter(table.values()))) for split, table in tables.items()}
        self.names, self.trainval = ids["trainval"] + ids["test"], len(ids["trainval"])
        rows = [[tables[split][name][i] for name in self.classes] for split in ids for i in ids[split]]
        self.paths = [str(self.path(name)) for name in self.names]
        self.targets = np.array(rows, dtype=np.int64)
        self.labels = torch.zeros(len(self), dtype=torch.int64)  # extract sets unreadable ones to -1
        missing = [name for name in self.names if not self.path(name).is_file()]
        if missing:
            raise DataError(f"{len(missing)} of {len(self)} images are missing: {self.path(missing[0])}")

    def __len__(self):
        return len(self.names)

    def path(self, name):
        return self.folder / "JPEGImages" / f"{name}.jpg"

    def read(self, i):
        return decode(self.path(self.names[i]), *self.look)


def _read(parse, path):
    """Returns parse(path). Raises DataError if the file is missing or damaged."""
    with border(DataError, f"{path} cannot be read"):
        return parse(path)


def _lines(path):
    return [line.split() for line in _read(Path.read_text, path).splitlines() if line.strip()]


def _class_files(folder, split):
    """Reads {class: {image: target}} of ImageSets/Main/CLASS_SPLIT.txt: 1 present, -1 absent, 0 difficult."""
    targets, table = {"1": 1, "-1": 0, "0": -1}, {}
    for path in sorted((folder / "ImageSets" / "Main").glob(f"*_{split}.txt")):
        lines = _lines(path)
        if not all(len(line) == 2 and line[1] in targets for line in lines):
            raise DataError(f"{path}: lines with an image and 1, 0 or -1 are needed")
        table[path.name.removesuffix(f"_{split}.txt")] = {name: targets[value] for name, value in lines}
    first = next(iter(table), None)
    for name in table:
        if table[name].keys() != table[first].keys():
            raise DataError(f"{folder}: the {split} files of {first!r} and {name!r} name different images")
    return table


def _annotations(folder, split):
    """Reads the same from Annotations/IMAGE.xml. A class is difficult if all its objects are."""
    found = {}  # {image: {class: target}}
    for name, *_ in _lines(folder / "ImageSets" / "Main" / f"{split}.txt"):
        found[name] = {}
        for item in _read(ElementTree.parse, folder / "Annotations" / f"{name}.xml").iter("object"):
            easy = item.findtext("difficult") != "1"
            found[name][item.findtext("name")] = 1 if easy else found[name].get(item.findtext("name"), -1)
    classes = sorted({c for present in found.values() for c in present})
    return {c: {name: present.get(c, 0) for name, present in found.items()} for c in classes}


def unit(x):
    """Scales rows to unit length, in float64: the features for the SVMs."""
    x = x.double()
    return (x / (x.norm(dim=1, keepdim=True) + 1e-5)).cpu().numpy()


# ------------------------------------------------------------------------------------------------------- fits


def require_sklearn():
    try:
        import sklearn.svm  # noqa: F401
    except ImportError:
        raise ArgumentError("eval_svm.py needs scikit-learn: pip install scikit-learn") from None


def train(x, y, cost):
    """Fits a LinearSVC to labels 1 and -1, with the benchmark's settings."""
    from sklearn.svm import LinearSVC

    how = dict(class_weight={1: 2, -1: 1}, tol=1e-4, max_iter=MAX_ITERATIONS, dual=True, random_state=0)
    return LinearSVC(C=cost, **how).fit(x, y)


def fit(x, rows, y, x_test, targets, cost, mode, choose=True):
    """Fits one SVM. Returns (AP by 3-fold cross-validation, AP on test, fits that did not converge).

    x (N, F); rows: the n rows to train on, with labels y (n,) 1 or -1; x_test (m, F); targets (m,) as in Voc.
    choose: False skips the cross-validation and returns 0 for it.
    """
    from sklearn.model_selection import StratifiedKFold

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fits that do not converge warn, but are counted here
        x, folds = x[rows], []
        svm = train(x, y, cost)
        stopped = int(svm.n_iter_ >= MAX_ITERATIONS)
        for kept, held_out in StratifiedKFold(FOLDS).split(x, y) if choose else ():
            part = train(x[kept], y[kept], cost)
            scores = part.decision_function(x[held_out])
            folds.append(average_precision(scores, y[held_out] == 1, "sklearn_step"))
            stopped += part.n_iter_ >= MAX_ITERATIONS
    ap = average_precision(svm.decision_function(x_test), targets, mode)
    return np.mean(folds) if folds else 0.0, ap, stopped


def fit_all(x, voc, subsets, costs, mode, choose, jobs, name):
    """Fits an SVM for each (class, rows) of `subsets` at each cost. Each rank fits its share in processes.

    Returns AP by cross-validation and AP on test, (subsets, costs) each, and the number of fits that did not
    converge; all equal on every rank. Difficult images are negatives in training and left out on test.
    """
    from joblib import Parallel, delayed

    n, tasks = voc.trainval, []
    x_train, x_test = x[:n], x[n:]  # one object each: joblib shares arrays by identity
    for c, rows in subsets:
        y, truth = np.where(voc.targets[:n][rows, c] == 1, 1, -1), voc.targets[n:, c]
        tasks += [(x_train, rows, y, x_test, truth, cost, mode, choose) for cost in costs]
    results = torch.zeros(len(tasks), 3, dtype=torch.float64)
    mine = range(distributed.rank(), len(tasks), distributed.world_size())
    started = said = time.perf_counter()
    fits = Parallel(jobs, return_as="generator")(delayed(fit)(*tasks[i]) for i in mine)
    for done, (i, result) in enumerate(zip(mine, fits), 1):
        results[i] = torch.tensor(result, dtype=torch.float64)
        now = time.perf_counter()
        if now - said > 60:
            left, said = (now - started) / done * (len(mine) - done), now
            say(f"{name}: {done} of {len(mine)} costs done, left {timedelta(seconds=int(left))}")
    results = distributed.all_sum(results).numpy().reshape(len(subsets), len(costs), 3)
    return results[..., 0], results[..., 1], int(results[..., 2].sum())


def full(x, voc, costs, mode, jobs, name):
    """Runs the full protocol on unit rows x (N, F). Returns AP (C,) at the cross-validated costs, these
    costs, AP (C,) at the costs that are best on test, and the number of fits that did not converge."""
    classes = range(len(voc.classes))
    cv, ap, stopped = fit_all(x, voc, [(c, slice(None)) for c in classes], costs, mode, True, jobs, name)
    chosen = cv.argmax(axis=1)
    return ap[classes, chosen], [costs[i] for i in chosen], ap.max(axis=1), stopped


def draw(targets, k, seed, sample, c):
    """Draws rows of k positive and 19 k negative images of class c, sorted. The arguments alone decide."""
    rng = np.random.default_rng((seed, sample, c, k))
    rows = [rng.choice(np.flatnonzero(targets == target), count, replace=False)
            for target, count in ((1, k), (0, 19 * k))]
    return np.sort(np.concatenate(rows))


def low_shot(x, voc, costs, mode, k, samples, seed, jobs, name):
    """Trains with k positive images per class. Returns mAP (samples, costs); mAP (samples,) at the costs that
    3-fold cross-validation on each SVM's own images chooses, or at the cost nearest to 1 if k < 3; and the
    number of fits that did not converge."""
    shape = samples, len(voc.classes), len(costs)
    subsets = [(c, draw(voc.targets[: voc.trainval, c], k, seed, sample, c))
               for sample in range(samples) for c in range(len(voc.classes))]
    cv, ap, stopped = fit_all(x, voc, subsets, costs, mode, k >= FOLDS, jobs, name)
    cv, ap = cv.reshape(shape), ap.reshape(shape)
    chosen = np.full(shape[:2], np.abs(np.log(costs)).argmin()) if k < FOLDS else cv.argmax(axis=2)
    own = np.take_along_axis(ap, chosen[..., None], axis=2)  # (samples, C, 1)
    return ap.mean(axis=1), own.mean(axis=(1, 2)), stopped


# ------------------------------------------------------------------------------------------------------- main


def parse_costs(words):
    if len(words) == 1 and words[0] in COSTS:
        return COSTS[words[0]]
    try:
        costs = tuple(map(float, words))
    except ValueError:
        costs = ()
    if not costs or not all(0 < cost < math.inf for cost in costs):
        raise ArgumentError(f"--costs {' '.join(words)}: {', '.join(COSTS)}, or numbers above 0 are needed")
    return costs


def main(args):
    device = evaluation.start(args)
    costs = parse_costs(args.costs)
    fine = min(args.batch_size, args.samples, *args.shots) > 0 and min(args.jobs, args.seed) >= 0
    evaluation.need(fine, args, "batch_size samples shots jobs seed",
                    "positive numbers are needed; jobs and seed may be 0")
    require_sklearn()
    if not args.data:
        raise ArgumentError("--data is needed: VOCdevkit")
    trunk, info = evaluation.open_trunk(args, device)
    if info.get("stem") != "small":  # the protocol's sizes, whatever the trunk was trained at
        info.update(resize=args.resize or 256, size=args.size or 224)
    try:
        shapes = pooling.shapes(trunk, info["size"], args.layers)
    except ValueError as error:
        raise ArgumentError(f"--layers {' '.join(args.layers)}: {error}") from None
    look = tuple(info.get("range", ())), info.get("exif", False)
    voc = distributed.from_main(Voc, args.data, look)
    n = voc.trainval
    jobs = args.jobs or distributed.cores()
    say(f"{args.trunk}: {evaluation.name(info)}, VOC 2007 at {info['size']} px ({args.crop})")
    counts = f"{n} images to train on, {len(voc) - n} to test, {len(voc.classes)} classes"
    say(f"{counts}, {len(costs)} costs, AP by {args.ap}")

    how = evaluation.extraction(args, info, device, args.batch_size)
    view = {"warp": Warp, "center": CenterCrop}[args.crop]
    rows, labels = extract(pooling.Reading(trunk, list(shapes)), voc, view=view, **how)
    unreadable = distributed.gather_rows(labels).lt(0).nonzero()[:, 0].tolist()
    if unreadable:
        first = voc.path(voc.names[unreadable[0]])
        raise DataError(f"{len(unreadable)} images of --data cannot be read: {first}")
    rows = distributed.gather_rows(rows.cpu()).split([math.prod(shape) for shape in shapes.values()], dim=1)
    record = {"trainval": n, "test": len(voc) - n, "classes": voc.classes, "size": info["size"],
              "crop": args.crop, "samples": args.samples, "seed": args.seed, "ap": args.ap, "costs": costs,
              "full": {}, "low_shot": {}}
    for layer, x in zip(shapes, rows):
        x = unit(x)
        if "full" in args.protocol:
            chosen, chosen_costs, best, stopped = full(x, voc, costs, args.ap, jobs, layer)
            record["full"][layer] = {
                "map": 100 * chosen.mean(), "oracle_map": 100 * best.mean(),
                "class_ap": (100 * chosen).round(4).tolist(), "class_costs": chosen_costs,
                "features": x.shape[1], "not_converged": stopped}
        if "low-shot" in args.protocol:
            record["low_shot"][layer] = {k: shots_of(x, voc, costs, k, args, jobs, layer) for k in args.shots}
    report(record)
    evaluation.finish(args, info, "_".join(["eval_svm", *args.protocol, args.crop]), record)


def shots_of(x, voc, costs, k, args, jobs, layer):
    """Returns the figures of low-shot training with k positive images, or {"skipped": the reason}."""
    for c, name in enumerate(voc.classes):
        for target, count, what in ((1, k, "positive"), (0, 19 * k, "negative")):
            found = int((voc.targets[: voc.trainval, c] == target).sum())
            if found < count:
                return {"skipped": f"class {name!r} has {found} {what} images, {count} are needed"}
    name = f"{layer}, k {k}"
    by_cost, chosen, stopped = low_shot(x, voc, costs, args.ap, k, args.samples, args.seed, jobs, name)
    best = by_cost.mean(axis=0).argmax()
    values = {"oracle": 100 * by_cost[:, best], "cross_validated": 100 * chosen}
    figures = {"oracle_cost": costs[best], "not_converged": stopped}
    for name, v in values.items():
        figures[name] = {"map": v.mean(), "std": v.std(), "min": v.min(), "max": v.max()}
    return figures


def report(record):
    """Prints the tables, and says what in them was chosen on the test set."""
    if record["full"]:
        say("\nmAP of all labels   cost by 3-fold   each class's best cost")
        say("layer    features    on trainval       on test (oracle)")
        for layer, f in record["full"].items():
            say(f"{layer:9}{f['features']:8}{f['map']:15.2f}{f['oracle_map']:23.2f}")
        if len(record["full"]) > 1:
            best = max(record["full"], key=lambda layer: record["full"][layer]["map"])
            say(f"best layer: {best}, {record['full'][best]['map']:.2f} (chosen on the test set)")
        stopped = sum(f["not_converged"] for f in record["full"].values())
        if stopped:
            say(f"{stopped} fits stopped at {MAX_ITERATIONS} iterations, as in the benchmark")
    for layer, shots in record["low_shot"].items():
        say(f"\nmAP of k positive images per class, {layer}: means of the draws")
        say("    k   best cost on test (oracle)     std     min     max   cost      cost by 3-fold     std")
        for k, f in shots.items():
            if "skipped" in f:
                say(f"{k:5}   skipped: {f['skipped']}")
                continue
            oracle, chosen = f["oracle"], f["cross_validated"]
            spread = "".join(f"{oracle[key]:8.2f}" for key in ("std", "min", "max"))
            say(f"{k:5}{oracle['map']:29.2f}{spread}   {f['oracle_cost']:<8.4g}{chosen['map']:16.2f}"
                f"{chosen['std']:8.2f}" + "  (cost nearest to 1)" * (k < FOLDS))


if __name__ == "__main__":
    launch(main, arguments())
