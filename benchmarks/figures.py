"""The pictures and tables of docs/methods.md: one picture for each step from DeepCluster to SwAV, what breaks
them, what SwAV costs.

    python -m benchmarks.figures                 # drawn anew from files in benchmarks/results (see FILES)
    python -m benchmarks.figures --runs runs     # before that figures.json is made anew

figures.json holds the few hundred numbers that the pictures need of the runs in RUNS/ablations and
RUNS/stability, which these make:

    python -m benchmarks.ablations
    python -m benchmarks.stability --recipe cifar --data cifar10 --epochs 10
"""

import argparse
import itertools
import json
import math
from pathlib import Path

import numpy as np
import torch

import deepcluster
import swav
from benchmarks import ablations, draw, multicrop
from benchmarks.record import RESULTS, curve_of, origin
from benchmarks.report import ROOT, between
from common import data
from common.engine.files import writing
from common.engine.options import recipe
from common.multicrop import Augmentation, MultiCrop, collate, to_device
from common.sinkhorn import sinkhorn

# benchmark: what it writes in RESULTS
FILES = {"figures": "figures", "ablations": "ablations_cpu", "multicrop": "multicrop_cpu"}
PAGE = ROOT / "docs/methods.md"
STEADINESS = "cifar_10_50_0"  # of benchmarks.stability: recipe, epochs, clusters, seed
BROKEN = {  # a method, and itself without what keeps it from collapse
    "swav": "swav, 0 Sinkhorn iterations",
    "deepcluster": "deepcluster, no uniform sampling",
    "odc": "odc, no merging and splitting, no weights",
    "sela": "sela, the likeliest label",
    "deepclusterv2": "deepclusterv2, clustered once",
}
LEFT_OUT = [name for name in ablations.EXPERIMENTS
            if name.startswith("deepclusterv2") and name not in BROKEN.values()]
WIDTH, SIZE = 560, 16  # of a picture and of its letters: on a phone they are two thirds of that


# ---------------------------------------------------------------------------------------------------- numbers


def gather(runs):
    """What the pictures show: a few hundred numbers of the runs in a folder, and the first step of a SwAV."""
    folders = {name: ablations.folder(runs / "ablations", name)
               for name in ("deepcluster", "sela", BROKEN["sela"], "deepclusterv2")}
    for name, folder in folders.items():
        if not (folder / "done.json").exists():
            raise SystemExit(f"error: {folder} is no finished run: "
                             f'python -m benchmarks.ablations --only "{name}"')
    clusters = clusters_of(folders["deepcluster"])
    order = deepcluster.uniform_order(torch.from_numpy(clusters), len(clusters),
                                      torch.Generator().manual_seed(0))
    sizes, draws = np.bincount(clusters), np.bincount(clusters[order], minlength=clusters.max() + 1)
    largest_first = np.argsort(-sizes, kind="stable")
    return {**origin("figures", torch.device("cpu")),
            "deepcluster": {"images": sizes[largest_first].tolist(), "draws": draws[largest_first].tolist()},
            "odc": {name: losses_of(runs / "stability" / f"{name.lower()}_{STEADINESS}.npz")
                    for name in ("DeepCluster", "ODC")},
            "sela": {name: sorted(np.bincount(clusters_of(folders[name])).tolist(), reverse=True)
                     for name in ("sela", BROKEN["sela"])},
            "untrained": curve_of(folders["deepclusterv2"])[0][1],
            "swav": [[round(score, 3) for score in row] for row in first_scores().tolist()]}


def clusters_of(folder):
    """The cluster of every image in the first head."""
    with np.load(folder / "assignments.npz") as file:
        return file["assignments"][0]


def losses_of(path, points=26):
    """Loss / ln K of a run, for every epoch as means over so many stretches: (E, points)."""
    if not path.exists():
        raise SystemExit(f"error: no {path}: python -m benchmarks.stability --recipe cifar --data cifar10 "
                         f"--epochs 10")
    epochs, K = map(int, STEADINESS.split("_")[1:3])
    with np.load(path) as file:
        rows = np.split(file["losses"], epochs)  # (E, steps of an epoch)
    return [[round(float(part.mean()) / math.log(K), 3) for part in np.array_split(row, points)]
            for row in rows]


@torch.no_grad()
def first_scores():
    """Cosines (B, K) of the first batch, in its first crops, and the prototypes, as `python swav.py`
    begins."""
    config = recipe(swav.Config, swav.RECIPES, "shapes")
    torch.manual_seed(config.seed)
    model = swav.Model(config)
    model.normalize_prototypes()
    images = data.open_images("shapes", "train")
    augmentation = Augmentation(jitter=config.jitter, blur_p=config.blur_p)
    crops = MultiCrop(images, config.crops, config.sizes, [config.scales], augmentation, config.seed)
    batch = data.batches(len(images), config.batch_size, 0, config.seed, 0, 1)[0]
    _, views, params = collate([crops[0, position, index] for position, index in batch])
    _, scores = model(to_device(views, params, torch.device("cpu"), torch.float32))  # (V B, K)
    return scores[: config.batch_size]


# --------------------------------------------------------------------------------------------------- pictures


def steps(values, x, y):
    """Corners of a staircase, one step a value."""
    return [(x(i + side), y(value)) for i, value in enumerate(values) for side in (0, 1)]


def sorted_counts(counts, top, levels, title, below):
    """Two staircases, the first an area, of counts: [(words, colour, values)]."""
    left, right, high, low = 56, WIDTH - 12, 44, 250
    x, y = draw.scale(0, len(counts[0][2]), left, right), draw.scale(0, top, low, high)
    parts = [draw.text(8, 24, title)]
    for value in levels:
        parts += draw.level(left, right, y(value), value)
    for number, (words, colour, values) in enumerate(counts):
        if not number:
            parts.append(draw.path([(left, low), *steps(values, x, y), (right, low)],
                                   f"fill: var(--{colour})", fill_opacity="0.3"))
        parts += [draw.line(steps(values, x, y), colour),
                  draw.text(right, 66 + 24 * number, words, "end", colour)]
    return draw.page(WIDTH, 284, [*parts, draw.text((left + right) / 2, low + 24, below, "middle")], SIZE)


def deepcluster_picture(found):
    images, draws = found["figures"]["deepcluster"]["images"], found["figures"]["deepcluster"]["draws"]
    counts = [("images = draws, if from all images", "grey", images),
              ("draws with uniform_order", "orange", draws)]
    title, below = "images of a cluster, and draws in an epoch", f"{len(images)} clusters, the largest first"
    return sorted_counts(counts, max(images + draws), range(0, max(images + draws) + 1, 50), title, below)


def odc_picture(found):
    left, right, high, low = 48, WIDTH - 12, 44, 262
    curves = {name: list(itertools.chain(*rows)) for name, rows in found["figures"]["odc"].items()}
    epochs, losses = len(found["figures"]["odc"]["ODC"]), list(itertools.chain(*curves.values()))
    bottom, top = math.floor(10 * min(losses)), math.ceil(10 * max(losses))
    x, y = draw.scale(0, len(curves["ODC"]), left, right), draw.scale(bottom / 10, top / 10, low, high)
    parts = [draw.text(8, 24, "loss / ln K")]
    for tenth in range(bottom, top + 1):
        parts += draw.level(left, right, y(tenth / 10), f"{tenth / 10:.1f}")
    for epoch in range(epochs + 1):
        place = x(len(curves["ODC"]) * epoch / epochs)
        parts += [draw.path([(place, high), (place, low)], "stroke: var(--grid)"),
                  draw.text(place, low + 20, epoch, "middle")]
    for place, (name, colour) in zip((left + 130, left + 260),
                                     (("DeepCluster", "orange"), ("ODC", "purple"))):
        parts += [draw.line([(x(i + 0.5), y(loss)) for i, loss in enumerate(curves[name])], colour)]
        parts += [draw.text(place, 24, name, colour=colour)]
    return draw.page(WIDTH, 312, [*parts, draw.text((left + right) / 2, low + 42, "epochs", "middle")], SIZE)


def sela_picture(found):
    shares = [[100 * count / sum(counts) for count in counts] for counts in found["figures"]["sela"].values()]
    labels = max(map(len, shares))
    likeliest, balanced = (share + [0] * (labels - len(share)) for share in reversed(shares))
    words = [f"{name}: at most {max(share):.3g}"
             for name, share in (("likeliest label", likeliest), ("balanced assignment", balanced))]
    counts = [(words[0], "grey", likeliest), (words[1], "green", balanced)]
    distance = 20 if max(likeliest) > 50 else 10 if max(likeliest) > 20 else 2
    levels = range(0, int(max(likeliest)) + 1, distance)
    return sorted_counts(counts, max(likeliest), levels, "share of the images with each label, %",
                         f"{labels} labels, the most used first")


def deepclusterv2_picture(found):
    left, right, high, row = 192, WIDTH - 60, 40, 30
    accuracies = {name.partition(", ")[2] or "all of it": value(found, "ablations", f"{name}: 20-NN %")
                  for name in LEFT_OUT}
    low = high + row * len(accuracies)
    x, floor = draw.scale(0, max(accuracies.values()), left, right), found["figures"]["untrained"]
    parts = [draw.text(8, 24, "20-NN accuracy, %, of DeepCluster-v2 with")]
    for number, (name, accuracy) in enumerate(accuracies.items()):
        y, colour = high + row * number, "orange" if number else "grey"
        corners = [(left, y + 4), (x(accuracy), y + 4), (x(accuracy), y + row - 4), (left, y + row - 4)]
        parts += [draw.path(corners, f"fill: var(--{colour})", fill_opacity="0.7"),
                  draw.text(left - 8, y + 20, name, "end")]
    parts += [draw.path([(x(floor), high), (x(floor), low + 4)], "stroke: var(--ink)",
                        stroke_dasharray="3 3")]
    for number, accuracy in enumerate(accuracies.values()):
        parts += [draw.text(x(accuracy) + 6, high + row * number + 20, f"{accuracy:g}", colour="ink")]
    return draw.page(WIDTH, low + 34,
                     [*parts, draw.text(x(floor), low + 22, f"untrained trunk {floor:g}", "middle")], SIZE)


def swav_picture(found):
    """Codes of a batch, darker the larger, and over them every prototype's mass, after 0, 1 and 3
    iterations."""
    scores = torch.tensor(found["figures"]["swav"], dtype=torch.float64)  # (B, K)
    epsilon = recipe(swav.Config, swav.RECIPES, "shapes").epsilon
    codes = {iterations: sinkhorn(scores, epsilon, iterations) for iterations in (0, 1, 3)}
    # prototypes by their mass without Sinkhorn
    columns = codes[0].sum(0).argsort(descending=True, stable=True)
    rows = codes[0][:, columns].argmax(1).argsort(stable=True)  # images by their prototype then
    (B, K), cell, left, low = scores.shape, 5, 32, 120
    mass, top = draw.scale(0, float(codes[0].sum(0).max()), low, 60), low + 8
    parts = [f'<text x="-{top + cell * B / 2}" y="22" text-anchor="middle" transform="rotate(-90)">{B} '
             f'images</text>']
    for iterations, q in codes.items():
        q, right = q[rows][:, columns], left + cell * K
        masses = q.sum(0).tolist()
        parts += [draw.text(left, 22, f"{iterations} iteration{'s' * (iterations != 1)}")]
        parts += [draw.text(left, 44, f"mass {min(masses):.2f} to {max(masses):.2f}")]
        bars = steps(masses, draw.scale(0, K, left, right), mass)
        parts += [draw.path([(left, low), *bars, (right, low)], "fill: var(--blue)")]
        parts += [draw.path([(left, mass(1)), (right, mass(1))], "stroke: var(--ink)",
                            stroke_dasharray="2 3")]
        corners = [(left, top), (right, top), (right, top + cell * B), (left, top + cell * B), (left, top)]
        parts += [draw.path(corners, "fill: none; stroke: var(--grid)")]
        for fifth in range(1, 6):
            cells = ((q > 0.05) & ((5 * q).ceil() == fifth)).nonzero().tolist()
            squares = "".join(f"M{left + cell * k} {top + cell * b}h{cell}v{cell}h-{cell}" for b, k in cells)
            opacity = f'fill-opacity="{(fifth + 2) / 7:.2f}"'
            parts += [f'<path d="{squares}" style="fill: var(--blue)" {opacity}/>'] if cells else []
        parts += [draw.text((left + right) / 2, top + cell * B + 24, f"{K} prototypes", "middle")]
        left = right + 16
    return draw.page(WIDTH, top + cell * B + 38, parts, SIZE)


PICTURES = {"deepcluster.svg": deepcluster_picture, "odc.svg": odc_picture, "sela.svg": sela_picture,
            "deepclusterv2.svg": deepclusterv2_picture, "swav.svg": swav_picture}


# ----------------------------------------------------------------------------------------------------- tables


def value(found, benchmark, name):
    if name not in found[benchmark]["figures"]:
        raise SystemExit(f"error: {FILES[benchmark]}.json lacks '{name}': python -m benchmarks.{benchmark}")
    return found[benchmark]["figures"][name]


def outcomes(found, title, rows):
    """What benchmarks.ablations found. rows: {name: what it is called}."""
    lines = [f"| {title} | loss / ln K | clusters in use | the largest has | 20-NN |",
             "|---|---|---|---|---|"]
    for name, words in rows.items():
        loss, used, largest, knn = (value(found, "ablations", f"{name}: {what}")
                                    for what in ablations.COLUMNS)
        method = ablations.METHODS[name.split(",")[0]]
        K = recipe(method.Config, method.RECIPES, found["ablations"]["settings"]["recipe"]).prototypes
        lines.append(f"| {words} | {loss:.2f} | {used:.3g} of {K} | {largest:.1f} % | {knn:g} % |")
    return [*lines, f"| untrained trunk | | | | {found['figures']['untrained']:g} % |"]


def leave_one_out(found):
    rows = {name: name.partition(", ")[2] or "all of it" for name in LEFT_OUT}
    return "\n".join(outcomes(found, "DeepCluster-v2 with", rows))


def break_it(found):
    names = [name for pair in BROKEN.items() for name in pair]
    trained, machine = found["ablations"]["settings"]["recipe"], found["ablations"]["machine"]
    about = f"Recipe `{trained}`, one run each; {machine}. The commands:"
    commands = [f'    python -m benchmarks.ablations --only "{name}"' for name in BROKEN.values()]
    return "\n".join([*outcomes(found, "experiment", dict(zip(names, names))), "", about, "", *commands])


def crops(found):
    titles = ("crops", "FLOPs, in images of 224 px", "time of a step", "peak memory", "20-NN at equal images",
              "at equal time")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in multicrop.CROPS:

        def of(what, name=name):
            return value(found, "multicrop", f"{name} crops: {what}")

        cells = [f"{of('FLOPs / one full image'):.2f}",
                 f"{of('step time / 2 crops'):.2f} ({of('ms a step') / 1000:.2f} s)"]
        cells += [f"{of('peak / 2 crops'):.2f} ({of('peak GiB'):.2f} GiB)"]
        cells += [f"{of(f'20-NN % at equal {same}'):g} % ({of(f'epochs at equal {same}'):g} epochs)"
                  for same in ("images", "time")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def batches(found):
    lines = ["| batch | steps | no queue | queue of 1,024 |", "|---|---|---|---|"]
    for batch in multicrop.BATCHES:
        accuracies = [f"{value(found, 'multicrop', f'batch {batch}, queue {queue}: 20-NN %'):g} %"
                      for queue in multicrop.QUEUES]
        steps = value(found, "multicrop", f"batch {batch}: steps")
        lines.append(f"| {batch:,} | {steps:.0f} | {' | '.join(accuracies)} |")
    untrained = value(found, "multicrop", "untrained: 20-NN %")
    return "\n".join([*lines, f"| untrained trunk | | {untrained:g} % | |"])


def state(found):
    lines = [f"| | an image | {' | '.join(f'{size} images' for size in multicrop.SIZES)} |",
             "|---" * (2 + len(multicrop.SIZES)) + "|"]
    for name in multicrop.METHODS:
        total = [value(found, "multicrop", f"{name}: GiB at {size}") for size in multicrop.SIZES]
        an_image = f"{value(found, 'multicrop', f'{name}: bytes an image'):,.0f} B"
        cells = " | ".join(f"{t:,.0f} GiB" if t >= 100 else f"{t:.3g} GiB" for t in total)
        lines.append(f"| `{name}.py` | {an_image} | {cells} |")
    return "\n".join(lines)


TABLES = {"leave one out": leave_one_out, "break it": break_it, "crops": crops, "batches": batches,
          "state": state}


# ------------------------------------------------------------------------------------------------------- main


def drawn():
    """From the files: {name: picture}, and the page with its tables."""
    found, page = {}, PAGE.read_text()
    for benchmark, name in FILES.items():
        if not (RESULTS / f"{name}.json").exists():
            words = f"benchmarks.{benchmark}{' --runs runs' * (benchmark == 'figures')}"
            raise SystemExit(f"error: no {RESULTS / name}.json: python -m {words}")
        found[benchmark] = json.loads((RESULTS / f"{name}.json").read_text())
    for name, table in TABLES.items():
        page = between(page, name, table(found), "figures")
    return {name: picture(found) for name, picture in PICTURES.items()}, page


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path,
                        help="folder of the runs (default: draw what was gathered before)")
    runs = parser.parse_args().runs
    if runs:
        lines = ",\n".join(f" {json.dumps(key)}: {json.dumps(found)}" for key, found in gather(runs).items())
        (RESULTS / "figures.json").write_text(f"{{\n{lines}\n}}\n")
    pictures, page = drawn()
    for name, picture in pictures.items():
        (PAGE.parent / name).write_text(picture)
    with writing(PAGE, text=True) as file:
        file.write(page)
    print(f"written to docs: {', '.join(pictures)}, and the tables of {PAGE.name}")


if __name__ == "__main__":
    main()
