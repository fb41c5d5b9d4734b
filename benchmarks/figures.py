"""Draws the pictures and tables of docs/methods.md: one picture per step from DeepCluster to SwAV, what
breaks the methods, what SwAV costs.

    python -m benchmarks.figures                 # redraws from the files in benchmarks/results (see FILES)
    python -m benchmarks.figures --runs runs     # before that, makes figures.json anew

figures.json holds a few hundred numbers that the pictures need, from the first seed's runs in RUNS/ablations,
which `python -m benchmarks.ablations` makes.
"""

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path

import numpy as np
import torch

import deepcluster
import sela
import swav
from benchmarks import ablations, diagrams, draw, multicrop
from benchmarks.record import RESULTS, metrics, origin
from benchmarks.report import ROOT, between
from common import data
from common.engine.files import writing
from common.engine.options import recipe
from common.multicrop import Augmentation, MultiCrop, collate, to_device
from common.sinkhorn import sinkhorn

# name of a file here: its name in RESULTS
FILES = {"figures": "figures", "ablations": "ablations_cpu", "float32": "ablations_float32_cpu",
         "multicrop": "multicrop_cpu"}
PAGE = ROOT / "docs/methods.md"
BROKEN = [  # the methods without what keeps them from collapse
    "swav, 0 Sinkhorn iterations",
    "deepcluster, no uniform sampling",
    "odc, no merging and splitting, no weights",
    "sela, the likeliest label",
    "deepclusterv2, clustered once",
]
STEADY = {"DeepCluster": "deepcluster, 50 clusters", "ODC": "odc"}  # with equally many clusters


def of_method(found, method, words=""):
    """Returns names of the measured, unbroken experiments with a method: itself, and those with `words`."""
    return [name for name in ablations.EXPERIMENTS
            if name == method or (name.startswith(f"{method},") and words in name and name not in BROKEN
            and f"{name}: 20-NN %" in found["ablations"]["figures"])]


WIDTH, SIZE = 560, 16  # of a picture and its font, in pixels; a phone shows both at two thirds


# ---------------------------------------------------------------------------------------------------- numbers


def gather(runs):
    """Returns what the pictures show: numbers of the runs in a folder, and scores of SwAV's first step."""
    folders = {name: ablations.folder(runs / "ablations", name, 0)
               for name in ("deepcluster", *STEADY.values(), "sela", "sela, the likeliest label")}
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
            "odc": {title: [[round(record["epoch"], 3), round(record["loss_per_ln_k"], 3)]
                            for record in metrics(folders[name]) if "loss_per_ln_k" in record]
                    for title, name in STEADY.items()},
            "sela": {name: sorted(np.bincount(clusters_of(folders[name])).tolist(), reverse=True)
                     for name in ("sela", "sela, the likeliest label")},
            "swav": [[round(score, 3) for score in row] for row in first_scores().tolist()]}


def clusters_of(folder):
    """Returns the cluster of every image in the first head."""
    with np.load(folder / "assignments.npz") as file:
        return file["assignments"][0]


@torch.no_grad()
def first_scores():
    """Returns the cosines (B, K) between the first crops of the first batch of `python swav.py` and its
    initial prototypes."""
    config = recipe(swav.Config, swav.RECIPES, "shapes")
    torch.manual_seed(config.seed)
    model = swav.Model(config)
    model.normalize_prototypes()
    images = data.open_images("shapes", "train")
    augmentation = Augmentation(jitter=config.jitter, blur_p=config.blur_p)
    scales = list(zip(config.scales[::2], config.scales[1::2]))
    crops = MultiCrop(images, config.crops, config.sizes, scales, augmentation, config.seed)
    batch = data.batches(len(images), config.batch_size, 0, config.seed, 0, 1)[0]
    _, views, params = collate([crops[0, position, index] for position, index in batch])
    _, scores = model(to_device(views, params, torch.device("cpu"), torch.float32))  # (V B, K)
    return scores[: config.batch_size]


# --------------------------------------------------------------------------------------------------- pictures


def steps(values, x, y):
    """Returns the corners of a staircase with one step per value."""
    return [(x(i + side), y(value)) for i, value in enumerate(values) for side in (0, 1)]


def sorted_counts(counts, top, levels, title, below):
    """Draws counts, [(words, colour, values)], as two staircases, the first of them as an area."""
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
    curves = found["figures"]["odc"]
    epochs = round(curves["ODC"][-1][0])
    losses = [loss for curve in curves.values() for _, loss in curve]
    bottom, top = math.floor(10 * min(losses)), math.ceil(10 * max(losses))
    x, y = draw.scale(0, epochs, left, right), draw.scale(bottom / 10, top / 10, low, high)
    parts = [draw.text(8, 24, "loss / ln K")]
    for tenth in range(bottom, top + 1):
        parts += draw.level(left, right, y(tenth / 10), f"{tenth / 10:.1f}")
    for epoch in range(epochs + 1):
        parts += [draw.path([(x(epoch), high), (x(epoch), low)], "stroke: var(--grid)")]
        if epoch % max(1, epochs // 10) == 0:  # room for ten or so numbers
            parts += [draw.text(x(epoch), low + 20, epoch, "middle")]
    for place, (name, colour) in zip((left + 130, left + 260),
                                     (("DeepCluster", "orange"), ("ODC", "purple"))):
        parts += [draw.line([(x(epoch), y(loss)) for epoch, loss in curves[name]], colour)]
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


def swav_picture(found):
    """Draws the codes of a batch after 0, 1 and 3 iterations, larger ones darker, and above them the mass of
    every prototype."""
    scores = torch.tensor(found["figures"]["swav"], dtype=torch.float64)  # (B, K)
    epsilon = recipe(swav.Config, swav.RECIPES, "shapes").epsilon
    codes = {iterations: sinkhorn(scores, epsilon, iterations) for iterations in (0, 1, 3)}
    # columns: prototypes by their mass without Sinkhorn
    columns = codes[0].sum(0).argsort(descending=True, stable=True)
    rows = codes[0][:, columns].argmax(1).argsort(stable=True)  # images by their prototype in that order
    (B, K), cell, left, low = scores.shape, 4, 32, 120
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
        parts += [draw.path([(left, mass(B / K)), (right, mass(B / K))], "stroke: var(--ink)",
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
            "swav.svg": swav_picture, "swap.svg": diagrams.swap, "steps.svg": diagrams.steps}


# ----------------------------------------------------------------------------------------------------- tables


def value(found, benchmark, name):
    if name not in found[benchmark]["figures"]:
        raise SystemExit(f"error: {FILES[benchmark]}.json lacks '{name}': make figures")
    return found[benchmark]["figures"][name]


def spread(values, form="{:.1f}"):
    """Formats the mean, and the range from the least to the most."""
    low, mean, high = (form.format(number(values)) for number in (min, statistics.mean, max))
    return mean if low == high else f"{mean} ({low} to {high})"


def outcomes(found, names):
    """Makes the table of experiments that benchmarks.ablations measured. Its last column is the difference of
    accuracy from the unchanged method, seed by seed. Makes no table of a method alone."""
    if len(names) < 2:
        return "Not measured yet."
    titles = ("experiment", "runs", "loss / ln K", "clusters in use", "the largest has, %", "20-NN, %",
              "difference")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    columns = ("loss / ln K", "clusters in use", "largest cluster, %", "20-NN %")
    for name in names:
        loss, used, largest, knn = (value(found, "ablations", f"{name}: {what}") for what in columns)
        whole = name.split(",")[0]
        pairs = zip(knn, value(found, "ablations", f"{whole}: 20-NN %"))
        difference = spread([a - b for a, b in pairs], "{:+.1f}") if name != whole else ""
        method = ablations.METHODS[whole]
        K = recipe(method.Config, method.RECIPES, "shapes").prototypes
        cells = (name, str(len(knn)), spread(loss, "{:.2f}"), f"{spread(used, '{:.3g}')} of {K}",
                 spread(largest), spread(knn), difference)
        lines.append(f"| {' | '.join(cells)} |")
    floor = value(found, "ablations", f"{names[0].split(',')[0]}: untrained 20-NN %")
    return "\n".join([*lines, f"| untrained trunk | {len(floor)} | | | | {spread(floor)} | |"])


def break_it(found):
    names = [name for broken in BROKEN for name in (broken.split(",")[0], broken)]
    return outcomes(found, [name for name in names if f"{name}: 20-NN %" in found["ablations"]["figures"]])


def robust(found):
    """Makes the table of each unchanged method's runs in bfloat16, and in float32 as on an older CPU."""
    titles = ("method", "untrained", "bfloat16, from seed 0 on", "float32 with AVX2, from seed 0 on", "mean",
              "farthest from it")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in ablations.METHODS:
        floors, runs = ([value(found, which, f"{name}: {what}") for which in ("ablations", "float32")]
                        for what in ("untrained 20-NN %", "20-NN %"))
        every = [*itertools.chain(*runs)]
        mean = statistics.mean(every)
        cells = (f"`{name}.py`", f"{statistics.mean(itertools.chain(*floors)):.1f}",
                 *(", ".join(f"{accuracy:.1f}" for accuracy in run) for run in runs), f"{mean:.1f}",
                 f"{max((accuracy - mean for accuracy in every), key=abs):+.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def steadiness(found):
    if f"{STEADY['DeepCluster']}: 20-NN %" not in found["ablations"]["figures"]:
        return "Not measured yet."
    lines = ["| | NMI to the epoch before | jump of the loss, share of ln K |", "|---|---|---|"]
    for title, name in STEADY.items():
        cells = [spread(value(found, "ablations", f"{name}: {what}"), "{:.2f}")
                 for what in ("NMI to the epoch before", "jump of the loss")]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def retraining(found):
    anew = of_method(found, "sela", "anew")[1:]
    if not anew:
        return "Not measured yet."
    some, every = ablations.RETRAINED["epochs"], recipe(sela.Config, sela.RECIPES, "shapes").epochs
    rows = {f"SeLa itself, {some} epochs of {every}": f"sela: 20-NN % after {some} epochs"}
    rows["SeLa itself"] = "sela: 20-NN %"
    rows |= {f"{name[6:]}, {some} epochs": f"{name}: 20-NN %" for name in anew}
    lines = [f"| {title} | {spread(value(found, 'ablations', name))} |" for title, name in rows.items()]
    return "\n".join(["| | 20-NN, % |", "|---|---|", *lines])


def crops(found):
    titles = ("crops", "FLOPs, in images of 224 px", "time of a step", "peak memory")
    lines = [f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for name in multicrop.CROPS:

        def of(what, name=name):
            return value(found, "multicrop", f"{name} crops: {what}")

        cells = [f"{of('FLOPs / one full image'):.2f}",
                 f"{of('step time / 2 crops'):.2f} ({of('ms a step') / 1000:.2f} s)"]
        cells += [f"{of('peak / 2 crops'):.2f} ({of('peak GiB'):.2f} GiB)"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def state(found):
    lines = [f"| | an image | {' | '.join(f'{size} images' for size in multicrop.SIZES)} |",
             "|---" * (2 + len(multicrop.SIZES)) + "|"]
    for name in multicrop.METHODS:
        total = [value(found, "multicrop", f"{name}: GiB at {size}") for size in multicrop.SIZES]
        an_image = f"{value(found, 'multicrop', f'{name}: bytes an image'):,.0f} B"
        cells = " | ".join(f"{t:,.0f} GiB" if t >= 100 else f"{t:.3g} GiB" for t in total)
        lines.append(f"| `{name}.py` | {an_image} | {cells} |")
    return "\n".join(lines)


TABLES = {
    "steadiness": steadiness,
    "retraining": retraining,
    "leave one out": lambda found: outcomes(found, of_method(found, "deepclusterv2")),
    "crops": crops,
    "trained with crops": lambda found: outcomes(found, of_method(found, "swav", "crops")),
    "batches": lambda found: outcomes(found, of_method(found, "swav", "batch")),
    "state": state,
    "break it": break_it,
    "chance": robust,
}


# ------------------------------------------------------------------------------------------------------- main


def drawn():
    """Returns {name: picture} and the page with its tables, made from the result files."""
    found, page = {}, PAGE.read_text()
    for benchmark, name in FILES.items():
        if not (RESULTS / f"{name}.json").exists():
            raise SystemExit(f"error: no {RESULTS / name}.json: make figures")
        found[benchmark] = json.loads((RESULTS / f"{name}.json").read_text())
    for name, table in TABLES.items():
        page = between(page, name, table(found), "figures")
    return {name: picture(found) for name, picture in PICTURES.items()}, page


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path,
                        help="folder of runs to gather from (default: draw what was gathered before)")
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
