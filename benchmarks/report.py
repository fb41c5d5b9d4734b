"""Writes the table of docs/results.md and the learning curves docs/curves.svg from
benchmarks/results/methods.json.

python -m benchmarks.report
"""

import itertools
import json
import statistics
from pathlib import Path

from benchmarks import draw
from common.engine.files import writing

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/methods.json"
PAGE, FIGURE = ROOT / "docs/results.md", ROOT / "docs/curves.svg"
COLUMNS = {"knn": "20-NN", "linear": "linear", "nmi": "NMI", "ami": "AMI", "hungarian": "matched"}


# ---------------------------------------------------------------------------------------------------- figures


def curve(method):
    """Returns [(epoch, mean, least, most)] over seeds of the 20-NN accuracies measured during training."""
    if len({tuple(epoch for epoch, _ in run["curve"]) for run in method["runs"]}) > 1:
        raise SystemExit(f"error: the runs of {method['title']} were evaluated at different epochs")
    rows = zip(*(run["curve"] for run in method["runs"]))
    points = []
    for row in rows:
        accuracies = [accuracy for _, accuracy in row]
        points.append((row[0][0], statistics.mean(accuracies), min(accuracies), max(accuracies)))
    return points


def seconds(method, epochs):
    """Returns the time of `epochs` epochs. The first also has what is done only once."""
    return min(epochs, 1) * method["first_epoch_s"] + max(0, epochs - 1) * method["epoch_s"]


def epochs_in(method, time):
    """Returns the epochs that fit in `time` seconds: the inverse of `seconds`."""
    return min(1, time / method["first_epoch_s"]) + max(0, time - method["first_epoch_s"]) / method["epoch_s"]


def accuracy_at(method, epoch):
    """Returns the 20-NN accuracy after `epoch` epochs, interpolated linearly between measured ones."""
    points = curve(method)
    for (a, low, *_), (b, high, *_) in itertools.pairwise(points):
        if epoch <= b:
            return low + (high - low) * (epoch - a) / (b - a)
    return points[-1][1]


def epochs_to(method, accuracy):
    """Returns the epochs until the 20-NN accuracy is first reached, interpolated too; None if it never is."""
    points = curve(method)
    if points[0][1] >= accuracy:
        return 0.0
    for (a, low, *_), (b, high, *_) in itertools.pairwise(points):
        if low < accuracy <= high:
            return a + (b - a) * (accuracy - low) / (high - low)
    return None


def shortest(results):
    """Returns the seconds of the quickest method's whole training; None if there are no times."""
    epochs = results["settings"]["epochs"]
    ours = [m for name, m in results["methods"].items() if name not in ("lightly_swav", "supervised")]
    return min((seconds(m, epochs) for m in ours if "epoch_s" in m), default=None)


# ------------------------------------------------------------------------------------------------------ table


def table(results):
    """Returns the page's text: what was measured, the table, and a paragraph on the peer."""
    s, methods, time = results["settings"], results["methods"], shortest(results)
    timed = f" minutes | 20-NN at {time / 60:.0f} minutes |" if time else ""
    lines = [
        f"{s['images']:,} images of {s['classes']} classes, {s['epochs']} epochs"
        f" ({s['images'] * s['epochs']:,} images seen), {s['trunk']}, judged on {s['held_out']:,} held-out"
        f" images of {s['px']} px; {results['machine']}. In percent; with several seeds the mean and half the"
        f" range. `{results['command']}`",
        "",
        f"| method | seeds | crops | {' | '.join(COLUMNS.values())} |{timed}",
        "|---" * (3 + len(COLUMNS) + 2 * bool(time)) + "|",
    ]
    for method in sorted(methods.values(), key=lambda m: -statistics.mean(run["knn"] for run in m["runs"])):
        cells = [spread([run[key] for run in method["runs"]]) for key in COLUMNS]
        if time:
            minutes = seconds(method, s["epochs"]) / 60
            cells += [f"{minutes:.0f}", f"{accuracy_at(method, epochs_in(method, time)):.1f}"]
        cells = [method["title"], str(len(method["runs"])), str(method["crops"]), *cells]
        lines.append(f"| {' | '.join(cells)} |")
    for title, floor in results["floors"].items():
        title += ", at 32 px" if title == "pixels" else ""
        cells = " | ".join(f"{floor[key]:.1f}" for key in COLUMNS)
        lines.append(f"| {title} | | | {cells} |{' |' * 2 * bool(time)}")
    return "\n".join([*lines, *peer(results)])


def spread(values):
    half = f" ± {(max(values) - min(values)) / 2:.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{half}"


def peer(results):
    """Returns a paragraph that compares SwAV with lightly's, if both were run and timed."""
    ours, theirs = results["methods"].get("swav"), results["methods"].get("lightly_swav")
    epochs = results["settings"]["epochs"]
    if not ours or not theirs or not shortest(results):
        return []
    mine, other = (statistics.mean(run["knn"] for run in m["runs"]) for m in (ours, theirs))
    at_32_px = statistics.mean(run["knn_at_32_px"] for run in theirs["runs"])
    text = f"SwAV at equal images seen: {mine:.1f} % 20-NN here, {other:.1f} % with lightly's"
    text += f" ({at_32_px:.1f} % on images of 32 px, at which its own benchmark looks)."
    reached = {epoch: epochs_to(ours, accuracy) for epoch, accuracy, *_ in curve(theirs) if epoch}
    reached = {epoch: seconds(ours, needed) for epoch, needed in reached.items() if needed}
    if epochs in reached:
        slow, halved = (listed(f"{seconds(m, epoch) / time:.1f}" for epoch, time in reached.items())
                        for m in (theirs, theirs["bfloat16"]))
        text += f" lightly's {epochs} epochs take {seconds(theirs, epochs) / 60:.1f} minutes, ours are where"
        text += f" they end after {reached[epochs] / 60:.1f}. What lightly's has after {listed(reached)}"
        text += f" epochs, ours has {slow} times as fast; if lightly's ran in bfloat16, as ours does (timed,"
        text += f" not trained), {halved} times."
    return ["", text]


def listed(words):
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last


# ----------------------------------------------------------------------------------------------------- figure

# (colour, dashes): related methods share a colour, the older or foreign one is dashed.
STYLES = {"swav": ("blue", ""), "lightly_swav": ("blue", "6 4")}
STYLES |= {"deepclusterv2": ("orange", ""), "deepcluster": ("orange", "6 4")}
STYLES |= {"selav2": ("green", ""), "sela": ("green", "6 4"), "odc": ("purple", "")}
STYLES |= {"supervised": ("grey", ""), "pixels": ("grey", "1 5")}


def figure(results):
    """Draws learning curves as SVG: 20-NN accuracy over images seen. Lines are means over seeds, shades their
    range."""
    width, height, left, right, top, bottom = 780, 440, 52, 588, 34, 392
    methods, settings, pixels = results["methods"], results["settings"], results["floors"]["pixels"]["knn"]
    curves = {name: curve(method) for name, method in methods.items()}
    curves["pixels"] = [(0, pixels, pixels, pixels), (settings["epochs"], pixels, pixels, pixels)]
    accuracies = [accuracy for points in curves.values() for point in points for accuracy in point[1:]]
    low, high = 10 * int(min(accuracies) // 10), 10 * int(max(accuracies) // 10 + 1)

    x, y = draw.scale(0, settings["epochs"], left, right), draw.scale(low, high, bottom, top)
    parts = [draw.text(8, 20, "20-NN accuracy, %")]
    for accuracy in range(low, high + 1, 10):
        parts += draw.level(left, right, y(accuracy), accuracy)
    for share in range(5):
        seen = settings["images"] * settings["epochs"] * share // 4
        parts.append(draw.text(x(settings["epochs"] * share / 4), bottom + 20, f"{seen:,}", "middle"))
    parts.append(draw.text((left + right) / 2, bottom + 40, "images seen", "middle"))

    for name, points in curves.items():
        colour, dashes = STYLES[name]
        if any(least < most for _, _, least, most in points):
            above = [(x(e), y(most)) for e, _, _, most in points]
            below = [(x(e), y(least)) for e, _, least, _ in reversed(points)]
            parts.append(draw.path(above + below, f"fill: var(--{colour})", fill_opacity="0.2"))
        line = [(x(e), y(mean)) for e, mean, *_ in points]
        parts.append(draw.line(line, colour, dashes))
        if name in methods:
            parts += [f'<circle cx="{a}" cy="{b}" r="3" style="fill: var(--{colour})"/>' for a, b in line]
    free = height
    # labels from the bottom up, each as near its line as the one below allows
    for end, name in sorted((points[-1][1], name) for name, points in curves.items()):
        free = min(y(end), free - 17)
        title, (colour, _) = methods[name]["title"] if name in methods else name, STYLES[name]
        parts.append(draw.path([(right + 5, y(end)), (right + 20, free)], f"stroke: var(--{colour})"))
        parts.append(draw.text(right + 25, free + 4, f"{title} {end:.1f}"))
    return draw.page(width, height, parts)


def main():
    results = json.loads(RESULTS.read_text())
    page = between(PAGE.read_text(), "results", content(results))
    with writing(PAGE, text=True) as file:
        file.write(page)
    FIGURE.write_text(figure(results))
    print(f"written to {PAGE.relative_to(ROOT)} and {FIGURE.relative_to(ROOT)}")


def content(results):
    """Returns what stands in the page between the marker lines."""
    return f"{table(results)}\n\n![Learning curves]({FIGURE.name})"


def between(page, name, content, script="report"):
    """Returns the page with this content between its two marker lines."""
    begin = f"<!-- {name}: python -m benchmarks.{script} writes what stands here -->\n"
    end = f"<!-- end of {name} -->"
    before, _, rest = page.partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise SystemExit(f"error: the page lacks {begin}and after it {end}")
    return f"{before}{begin}{content}\n{end}{after}"


if __name__ == "__main__":
    main()
