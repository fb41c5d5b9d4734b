"""What the pages of recipes and results and the walk through the methods say and show is what their files
say, and what is computed from the files."""

import itertools
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import TINY, losses, metrics, run_here
from PIL import Image

import deepclusterv2
import sela
import swav
from benchmarks import ablations, figures, methods, multicrop, report, subset, supervised, transfer
from benchmarks.record import finished
from common import data
from common.engine.held_out import match_classes, open_queries
from common.engine.launch import launch
from common.engine.options import parse, recipe


def method(title, *finals, first_epoch_s=60.0, epoch_s=50.0):
    """A method whose runs go from 20 % in a straight line to their ends after 4 epochs."""
    runs = [{"seed": i, "linear": 70.0, "nmi": 10.0, "ami": 9.0, "hungarian": 25.0, "knn": end,
             "knn_at_32_px": end - 1} | {"curve": [[e, 20 + (end - 20) * e / 4] for e in (0, 2, 4)]}
            for i, end in enumerate(finals)]
    return {"title": title, "crops": 4, "batch_size": 32, "first_epoch_s": first_epoch_s, "epoch_s": epoch_s,
            "runs": runs}


@pytest.fixture
def results():
    floors = {name: dict(knn=20.0, linear=30.0, nmi=1.0, ami=0.5, hungarian=11.0)
              for name in ("random weights", "pixels")}
    found = {
        "swav": method("SwAV", 58.0, 60.0, 62.0),
        "odc": method("ODC", 40.0, first_epoch_s=25.0, epoch_s=25.0),
        "lightly_swav": method("SwAV of lightly", 40.0, first_epoch_s=20.0, epoch_s=20.0)
        | {"bfloat16": {"first_epoch_s": 10.0, "epoch_s": 10.0}},
        "supervised": method("with labels", 80.0, first_epoch_s=10.0, epoch_s=10.0),
    }
    settings = dict(data="list.txt", images=1000, held_out=500, classes=10, epochs=4, trunk="resnet10 x0.5",
                    px=48)
    return {"machine": "a machine", "command": "a command", "settings": settings, "methods": found,
            "floors": floors}


def row(table, title):
    return next(line for line in table.splitlines() if line.startswith(f"| {title} |"))


def test_page_and_figure_are_those_of_the_file():
    saved = json.loads(report.RESULTS.read_text())
    page = report.PAGE.read_text()
    assert report.between(page, "results", report.content(saved)) == page
    assert report.figure(saved) == report.FIGURE.read_text()


def test_time_and_epochs_are_inverse(results):
    swav = results["methods"]["swav"]
    assert [report.seconds(swav, e) for e in (0, 0.5, 1, 4)] == [0, 30, 60, 210]
    assert [report.epochs_in(swav, s) for s in (0, 30, 60, 210)] == [0, 0.5, 1, 4]


def test_accuracies_lie_on_the_curve(results):
    swav = results["methods"]["swav"]
    assert report.curve(swav) == [(0, 20, 20, 20), (2, 40, 39, 41), (4, 60, 58, 62)]
    assert [report.accuracy_at(swav, e) for e in (0, 1, 3, 4, 5)] == [20, 30, 50, 60, 60]
    assert [report.epochs_to(swav, a) for a in (10, 30, 60, 61)] == [0, 1, 4, None]
    swav["runs"][1]["curve"][1][0] = 1
    with pytest.raises(SystemExit, match="runs of SwAV were evaluated at different epochs"):
        report.curve(swav)


def test_the_table_compares_at_equal_images_and_at_the_time_of_the_quickest_method(results):
    table = report.table(results)
    assert report.shortest(results) == 100  # ODC's: neither the peer nor the ceiling is a method of ours
    assert "20-NN at 2 minutes" in table and "4,000 images seen" in table and "`a command`" in table
    assert row(table, "SwAV").endswith("| 60.0 ± 2.0 | 70.0 ± 0.0 | 10.0 ± 0.0 | 9.0 ± 0.0 | 25.0 ± 0.0 | 4 "
                                       "| 38.0 |")
    assert row(table, "ODC").endswith("| 40.0 | 70.0 | 10.0 | 9.0 | 25.0 | 2 | 40.0 |")
    assert row(table, "pixels, at 32 px").count("|") == row(table, "SwAV").count("|")
    order = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert order == ["with labels", "SwAV", "ODC", "SwAV of lightly", "random weights", "pixels, at 32 px"]


def test_the_peer_is_compared_at_equal_images_and_at_equal_accuracy(results):
    # 40 % after 80 s; ours has 40 % after two epochs, 110 s.
    text = report.peer(results)[-1]
    assert "60.0 % 20-NN here, 40.0 % with lightly's (39.0 %" in text
    assert "4 epochs take 1.3 minutes, ours are where they end after 1.8." in text
    assert "after 2 and 4 epochs, ours has 0.7 and 0.7 times as fast; if lightly's ran in bfloat16" in text
    assert text.endswith(", 0.3 and 0.4 times.")
    results["methods"]["lightly_swav"] = method("SwAV of lightly", 70.0)  # never reached by ours
    assert "times as fast" not in report.peer(results)[-1]


def test_without_times_the_table_has_no_times(results):
    for found in results["methods"].values():
        del found["first_epoch_s"], found["epoch_s"]
    table = report.table(results)
    assert "minutes" not in table and "lightly's" not in table
    assert row(table, "SwAV").count("|") == row(table, "pixels, at 32 px").count("|") == 9


def test_the_figure_names_every_curve_once_and_apart(results):
    svg = report.figure(results)
    labels = [line for line in svg.splitlines() if line.startswith('<text x="613"')]
    names = [label.split(">")[1].rpartition(" ")[0] for label in labels]
    assert names == ["pixels", "SwAV of lightly", "ODC", "SwAV", "with labels"]
    heights = [float(label.split('y="')[1].split('"')[0]) for label in labels]
    assert all(lower - upper >= 17 for lower, upper in itertools.pairwise(heights))
    # one method has several seeds
    assert svg.count("fill-opacity") == 1 and "prefers-color-scheme: dark" in svg


def test_recipes_and_their_page_report_what_the_files_hold():
    shapes = json.loads((report.RESULTS.parent / "ablations_cpu.json").read_text())["figures"]
    compared = json.loads(report.RESULTS.read_text())["methods"]
    said, page = {}, (report.ROOT / "docs/recipes.md").read_text()
    for name in ("swav", "deepclusterv2", "deepcluster", "odc", "sela", "selav2"):
        recipes = methods.module_of(name).RECIPES
        said[name] = {images: re.match(r"20-NN ([\d.]+) ", recipes[images][0])[1]
                      for images in ("shapes", "cifar")}
        mean = np.mean([run["knn"] for run in compared[name]["runs"]])
        assert float(said[name]["cifar"]) == pytest.approx(mean, abs=0.051)
        assert float(said[name]["shapes"]) == pytest.approx(np.mean(shapes[f"{name}: 20-NN %"]), abs=0.051)
    for images in ("shapes", "cifar"):
        rows = re.findall(rf"^\| `{images}`.* \| ([\d.]+) 20-NN", page, re.MULTILINE)
        both = re.search(rf"^\| `sela.py --recipe {images}`, `selav2.py --recipe {images}` \| ([\d.]+), "
                         rf"([\d.]+) 20-NN", page, re.MULTILINE)
        assert [*rows, *both.groups()] == [said[name][images] for name in said]
    readme = (report.ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+).py` \| ([\d.]+) \| ([\d.]+) \|", readme, re.MULTILINE)
    assert {name: {"shapes": drawn, "cifar": cifar} for name, drawn, cifar in rows} == said


# ---- the walk


def test_the_walk_shows_what_its_files_say():
    pictures, page = figures.drawn()
    assert page == figures.PAGE.read_text()
    for name, picture in pictures.items():
        drawn = (figures.PAGE.parent / name).read_text()
        assert picture == drawn, f"docs/{name}: python -m benchmarks.figures"


def saved_run(folder, counts):
    """What a finished run of four epochs leaves of clusters with so many images each. Its second head has all
    in one."""
    folder.mkdir(parents=True)
    (folder / "done.json").write_text("{}")
    logged = [{"step": 0, "epoch": 0, "knn_k": 20, "knn_top1": 30.25}]
    for epoch, (first, last) in enumerate(((0.9, 0.8), (0.7, 0.5), (0.6, 0.4), (0.6, 0.1)), 1):
        logged += [{"step": 100 * epoch - 20, "epoch": epoch - 0.2, "loss_per_ln_k": first},
                   {"step": 100 * epoch, "epoch": epoch, "loss_per_ln_k": last},
                   {"step": 100 * epoch, "epoch": epoch, "epoch_clusters_used": 4,
                    "nmi_to_previous": [None, 0.1, 0.5, 0.7][epoch - 1]}]
    logged += [{"step": 400, "epoch": 4, "knn_k": 20, "knn_top1": 40.5}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in logged))
    clusters = np.repeat(np.arange(len(counts)), counts)
    np.savez(folder / "assignments.npz", assignments=np.stack([clusters, 0 * clusters]))


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    """Gathered of runs with known clusters and losses."""
    monkeypatch.setattr("sys.argv", ["figures", "--runs", str(tmp_path)])
    for name, counts in {"deepcluster": (100, 700, 0, 200), "deepcluster, 50 clusters": (500, 500),
                         "odc": (500, 500), "sela": (250,) * 4,
                         "sela, the likeliest label": (0, 900, 100)}.items():
        saved_run(ablations.folder(tmp_path / "ablations", name, 0), counts)
    return figures.gather(tmp_path)


@pytest.fixture
def found(numbers):
    """The four files. In those of benchmarks.ablations all is alike, but accuracies, which count up."""
    whats = ("untrained 20-NN %", "20-NN %", "loss / ln K", "clusters in use", "largest cluster, %",
             "NMI to the epoch before", "jump of the loss", "20-NN % after 6 epochs")
    values = {f"{name}: {what}": [value, value + 1.0]
              for i, name in enumerate(ablations.EXPERIMENTS)
              for what, value in zip(whats, (30.25, 30.0 + i, 0.5, 7, 25.0, 0.6, 0.1, 20.0 + i))}
    trained = {"machine": "a machine", "settings": {"seeds": [0, 1]}, "figures": values}
    costs = {}
    for i, name in enumerate(multicrop.CROPS, 1):
        figures_of = {"FLOPs / one full image": 2 * i, "ms a step": 1000 * i, "step time / 2 crops": i,
                      "peak GiB": i, "peak / 2 crops": i}
        costs |= {f"{name} crops: {what}": value for what, value in figures_of.items()}
    for i, name in enumerate(multicrop.METHODS):
        costs |= {f"{name}: bytes an image": 1000 * i,
                  **{f"{name}: GiB at {size}": i for size in multicrop.SIZES}}
    return {"figures": numbers, "ablations": trained, "float32": trained, "multicrop": {"figures": costs}}


def test_the_numbers_of_the_walk_are_those_of_the_runs(numbers, tmp_path):
    assert numbers["deepcluster"]["images"] == [700, 200, 100, 0]
    draws = numbers["deepcluster"]["draws"]
    assert all(abs(count - 1000 / 3) < 20 for count in draws[:3]) and draws[3] == 0 and sum(draws) == 1000
    assert numbers["odc"]["ODC"][:3] == [[0.8, 0.9], [1, 0.8], [1.8, 0.7]] and len(numbers["odc"]["ODC"]) == 8
    assert numbers["sela"] == {"sela": [250] * 4, "sela, the likeliest label": [900, 100, 0]}
    assert str(tmp_path) not in json.dumps(numbers)
    scores, config = torch.tensor(numbers["swav"]), recipe(swav.Config, swav.RECIPES, "shapes")
    assert scores.shape == (config.batch_size, config.prototypes)
    assert scores.abs().max() <= 1 and scores.std() > 0.05


def test_figures_of_a_run_are_those_of_its_last_epoch_and_all_its_heads(tmp_path):
    saved_run(tmp_path / "run", (100, 700, 0, 200))
    # 80 of the last 100 steps at 0.6, 20 at 0.1; three clusters in use and one, the largest with 70 % and
    # with all; the third and fourth epoch begin 0.1 and 0.2 above the end of the one before
    assert ablations.figures_of(tmp_path / "run") == pytest.approx(
        {"untrained 20-NN %": 30.25, "20-NN %": 40.5, "loss / ln K": 0.5, "clusters in use": 2,
         "largest cluster, %": 85, "NMI to the epoch before": 0.6, "jump of the loss": 0.15})


def test_what_is_taken_away_is_gone(tmp_path, monkeypatch):
    """The functions that stand in for a script's own do what their names say, and are in its place while it
    runs only."""
    targets = torch.tensor([0, 0, 0, 0, 1])
    order = ablations.drawn_from_all_images(targets, 5, torch.Generator())
    assert order.sort().values.tolist() == list(range(5))

    heads = torch.nn.ModuleList(torch.nn.Linear(3, 3, bias=False) for _ in range(2))
    rows = torch.eye(3)[[2, 2, 2, 1]]
    heads[1].weight.data = torch.eye(3)
    memory = sela.Memory(4, 2, 3, 0)
    before = memory.targets[0].tolist()
    ablations.likeliest(memory, heads, rows, [1], 10.0, 0.01)
    assert memory.targets.tolist() == [before, [2, 2, 2, 1]]

    found, memory = [], deepclusterv2.Memory(4, 1, 3, 2)
    for epoch, z in enumerate((rows, rows.flip(0))):
        memory.update(torch.arange(4), z[None])
        ablations.clustered_once(memory, heads, 5, torch.Generator())
        memory.epoch = epoch
        found.append((memory.targets.clone(), heads[0].weight.clone()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert (found[0][0] >= 0).all()

    inside, linear = [], "deepclusterv2, linear head"
    short = dict(data="shapes:128", epochs=1, prototypes=10)
    monkeypatch.setitem(ablations.EXPERIMENTS, linear, (short, ablations.EXPERIMENTS[linear][1]))
    prepare, own = deepclusterv2.prepare, deepclusterv2.Model

    def seen(model, *how):
        inside.append(model)
        return prepare(model, *how)

    monkeypatch.setattr(deepclusterv2, "prepare", seen)
    ablations.train(linear, SimpleNamespace(precision="auto", workers=0, out=tmp_path), 0)
    assert isinstance(inside[0].projection_head, torch.nn.Linear) and deepclusterv2.Model is own


def test_labels_of_a_run_teach_a_network_that_starts_otherwise(tmp_path, monkeypatch):
    labels = np.arange(10_000).reshape(2, 5000) % 7
    paths = np.frombuffer("\0".join(data.open_images("shapes").paths).encode(), np.uint8)
    np.savez(tmp_path / "assignments.npz", assignments=labels, paths=paths)
    memory = sela.Memory(5000, 2, 7, 0)
    ablations.labels_of(tmp_path, memory)
    assert memory.targets.tolist() == labels.tolist()
    ablations.shuffled_labels_of(tmp_path, memory)
    assert memory.targets.tolist() != labels.tolist()
    pairs = [sorted(zip(*rows)) for rows in (labels.tolist(), memory.targets.tolist())]
    assert pairs[0] == pairs[1]  # an image has other labels, a label as many images
    args = SimpleNamespace(precision="auto", workers=0, out=tmp_path)
    runs = []
    monkeypatch.setattr(sela, "main", lambda config: runs.append((config.seed, sela.assign.args[0])))
    ablations.train("sela, trained anew on its labels", args, 3)
    assert runs == [(103, ablations.folder(tmp_path, "sela", 3))]


def test_every_picture_is_small_readable_and_shown_by_the_page(found):
    page = figures.PAGE.read_text()
    for name, picture in figures.PICTURES.items():
        svg = picture(found)
        ElementTree.fromstring(svg)
        small = "font: 16px" in svg and 'width="560"' in svg
        assert len(svg) < 40_000 and (small or name == "steps.svg")  # six lanes need a desk
        assert "prefers-color-scheme: dark" in svg
        assert f"]({name})" in page


def test_the_codes_shown_are_balanced_by_the_iterations(found):
    masses = re.findall(r"mass ([\d.]+) to ([\d.]+)", figures.swav_picture(found))
    spread = [float(most) - float(least) for least, most in masses]
    assert len(spread) == 3 and spread[0] > 3 and spread[0] > 2 * spread[1] and spread[1] > 2 * spread[2]


def test_tables_of_the_walk_set_every_method_beside_its_broken_self(found):
    table = figures.break_it(found)
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if " of " in line]
    methods_of = [name.split(",")[0] for name in names]
    assert methods_of[::2] == names[::2] == methods_of[1::2]
    assert row(table, "swav, 0 Sinkhorn iterations") == (
        "| swav, 0 Sinkhorn iterations | 2 | 1.00 (0.50 to 1.50) | 7.5 (7 to 8) of 40 | 25.5 (25.0 to 26.0) "
        "| 36.5 (36.0 to 37.0) | +6.0 |")
    table = figures.TABLES["leave one out"](found)
    assert row(table, "deepclusterv2").endswith("| 31.5 (31.0 to 32.0) |  |")
    assert row(table, "deepclusterv2, temperature 1").endswith("| +14.0 |")
    assert row(table, "untrained trunk").endswith("| 30.8 (30.2 to 31.2) | |") and "clustered" not in table


def test_differences_are_those_of_runs_with_the_same_seed(found):
    found["ablations"]["figures"]["deepclusterv2, linear head: 20-NN %"] = [20.0, 40.0]
    line = row(figures.TABLES["leave one out"](found), "deepclusterv2, linear head")
    assert line.endswith("| 30.0 (20.0 to 40.0) | -1.5 (-11.0 to +8.0) |")


def test_equal_runs_are_told_by_their_mean_and_the_farthest(found):
    found["float32"] = {"figures": {**found["ablations"]["figures"], "odc: 20-NN %": [33.0, 38.0]}}
    assert row(figures.robust(found), "`odc.py`") == (
        "| `odc.py` | 30.8 | 34.0, 35.0 | 33.0, 38.0 | 35.0 | +3.0 |")


def test_tables_of_cost_show_every_figure_in_its_place(found):
    assert row(figures.crops(found), "2 + 4") == "| 2 + 4 | 6.00 | 3.00 (3.00 s) | 3.00 (3.00 GiB) |"
    table = figures.state(found)
    assert row(table, "`sela.py`") == "| `sela.py` | 3,000 B | 3 GiB | 3 GiB | 3 GiB |"
    assert len(table.splitlines()) == 8


def test_a_run_that_is_missing_is_named_and_nothing_is_drawn(found, tmp_path):
    del found["ablations"]["figures"]["sela: loss / ln K"]
    with pytest.raises(SystemExit, match="lacks 'sela: loss / ln K'"):
        figures.break_it(found)
    (tmp_path / "ablations/sela_0/done.json").unlink()
    with pytest.raises(SystemExit, match=r'ablations/sela_0 is no finished run: .* --only "sela"'):
        figures.gather(tmp_path)
    with pytest.raises(SystemExit, match="the page lacks <!-- results"):
        report.between("no marks", "results", "")


# ---- runs


def test_a_subset_has_the_first_images_of_every_class(tmp_path, monkeypatch, capsys):
    class Fake:
        classes = ("bird", "cat")

        def __init__(self, root, train, download):
            assert download and root == tmp_path / "download"
            self.level = 100 if train else 200

        def __iter__(self):  # five of each class, in turns; the red of an image is its place
            return ((Image.new("RGB", (32, 32), (i, self.level, 0)), i % 2) for i in range(10))

    monkeypatch.setattr(subset, "CIFAR10", Fake)
    monkeypatch.setattr("sys.argv", ["subset", str(tmp_path), "--images", "4"])
    subset.main()
    assert "8 images in" in capsys.readouterr().out
    images = data.open_images(str(tmp_path / "list.txt"), "train", str(tmp_path / "train"))
    held_out = open_queries(str(tmp_path / "list.txt"), str(tmp_path / "val"), "")
    match_classes(held_out, images)
    assert (len(images), len(held_out), tuple(images.classes)) == (8, 4, ("bird", "cat"))
    pixels = sorted((int(images.labels[i]), images.read(i).getpixel((0, 0))) for i in range(8))
    assert pixels == [(label, (2 * n + label, 100, 0)) for label in (0, 1) for n in range(4)]


@pytest.fixture
def args(tmp_path):
    return SimpleNamespace(data="shapes:64", root="", val="", arch="resnet10", width=0.5, epochs=3, workers=0,
                           out=tmp_path)


@pytest.mark.parametrize("name, words, line",
                         [("ablations", ["--only", "sella*"], "--only sella*: no experiment"),
                          ("methods", ["--data", "nowhere"], "nowhere does not exist")])
def test_a_mistyped_name_or_folder_is_one_line(name, words, line, monkeypatch, capsys):
    module = {"ablations": ablations, "methods": methods}[name]
    monkeypatch.setattr("sys.argv", [name, *words])
    with pytest.raises(SystemExit) as stopped:
        launch(module.main, module.arguments())
    assert stopped.value.code in (2, 3) and line in capsys.readouterr().err


@pytest.mark.parametrize("name", [*methods.METHODS, "supervised"])
def test_the_command_line_of_a_run_means_its_recipe(name, args):
    module, *words = methods.training(name, args, 5, args.out / "x")
    config = parse(methods.module_of(name).Config, methods.module_of(name).RECIPES, "", words)
    free = dict(data="shapes:64", workers=0, eval_every=1, out=str(args.out / "x"))
    assert config == replace(methods.config_of(name, args, 5), **free)
    assert module == methods.module_of(name).__name__
    assert (config.epochs, config.seed, config.recipe) == (3, 5, "cifar")


def test_a_finished_run_is_not_made_again_and_one_of_other_options_is_refused(args):
    run = args.out / "swav_5"
    run.mkdir()
    config = {**vars(methods.config_of("swav", args, 5)), "data": "shapes:64"}
    (run / "config.json").write_text(json.dumps({"method": "swav", **config}))
    assert methods.made("swav", args, 5) is None
    (run / "done.json").write_text("{}")
    assert methods.made("swav", args, 5) == run
    del config["epsilon"]  # an option that is younger than the run: it had what is now the default
    (run / "config.json").write_text(json.dumps({**config, "out": "elsewhere"}))
    assert methods.made("swav", args, 5) == run
    for other in (dict(lr=0.3), dict(data="shapes"), dict(epochs=4)):
        (run / "config.json").write_text(json.dumps({**config, **other}))
        with pytest.raises(SystemExit, match=f"--{next(iter(other))}"):
            methods.made("swav", args, 5)


def test_the_ceiling_learns_the_labels(tmp_path):
    options = [*TINY, "--width", 0.25, "--crops", 2, "--lr", 0.05, "--jitter", 0, 0, 0, 0, "--scales", 0.6, 1,
               "--epochs", 10]
    assert run_here(supervised, "--recipe", "cifar", "--data", "shapes:64", *options, "--out", tmp_path) == 0
    found = losses(tmp_path)
    assert sum(found[-4:]) < 0.6 * sum(found[:4])


def test_the_peer_draws_by_position_and_learns(tmp_path):
    pytest.importorskip("lightly")
    from benchmarks import lightly_swav

    args = SimpleNamespace(data="", root="", val="", arch="resnet10", width=0.5, epochs=1)
    config = methods.config_of("lightly_swav", args, 0)
    views = lightly_swav.Views(data.open_images("shapes:8"), config)
    draws = [views[key][1][0] for key in ((0, 3, 5), (0, 3, 5), (0, 4, 5), (1, 3, 5))]  # (2, 3, 32, 32)
    assert draws[0].shape == (2, 3, 32, 32) and torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0][0], draws[0][1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])
    options = [*TINY, "--width", 0.25, "--prototypes", 10, "--lr", 0.01, "--epochs", 6]
    assert run_here(lightly_swav, "--recipe", "cifar", "--data", "shapes:64", *options, "--out",
                    tmp_path) == 0
    found = losses(tmp_path)
    assert sum(found[-4:]) < sum(found[:4]) and [m["lr"] for m in metrics(tmp_path) if "lr" in m][4] < 0.01


@pytest.mark.slow
def test_the_whole_comparison_is_made_once(tmp_path, monkeypatch, capsys):
    """Minutes: a method and the ceiling are trained, judged, timed and written; a second time only what is
    missing is done."""
    words = ["--data", "shapes:320", "--epochs", 1, "--workers", 0, "--rounds", 1, "--methods", "sela",
             "supervised", "--out", tmp_path]
    monkeypatch.setattr("sys.argv",
                        ["methods", *map(str, words), "--results", str(tmp_path / "results.json")])
    page = report.PAGE.read_text()
    methods.main(methods.arguments())
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == ["sela", "supervised"]
    assert list(results["floors"]) == ["random weights", "pixels"]
    for found in [*results["floors"].values(), *(m["runs"][0] for m in results["methods"].values())]:
        assert all(-10 < found[key] <= 100 for key in report.COLUMNS)  # by chance AMI is 0 on average
    run = results["methods"]["sela"]["runs"][0]
    assert len(run["curve"]) == 2 and results["methods"]["sela"]["epoch_s"] > 0
    assert str(tmp_path) not in json.dumps(results) and report.PAGE.read_text() == page
    capsys.readouterr()

    def refuse(words, **how):
        raise AssertionError(f"made again: {words}")

    monkeypatch.setattr(methods, "python", refuse)
    methods.main(methods.arguments())
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert report.table(results) in capsys.readouterr().out


def test_the_ceiling_is_taken_for_the_recipe_that_it_is(tmp_path):
    tiny = "--recipe cifar --data shapes:64 --width 0.125 --epochs 1 --workers 0".split()
    assert run_here(supervised, *tiny, "--out", tmp_path) == 0
    config = parse(supervised.Config, supervised.RECIPES, "", [*tiny, "--out", str(tmp_path)])
    assert finished(config, tmp_path) and metrics(tmp_path)[-1]["epoch_clusters_used"] <= 10


def test_the_page_of_data_says_what_was_measured():
    page = (report.ROOT / "docs/data.md").read_text()
    speed, scale = (json.loads((report.RESULTS.parent / f"{name}_cpu.json").read_text())["figures"]
                    for name in ("pipeline", "scale"))
    for workers in (1, 2):
        row = [f"{speed[f'{what}, images/s from {workers} workers']:.0f}"
               for what in ("files", "tars", "webdataset")]
        assert f"| {workers} | {' | '.join(row)} |" in page
    for rows in ("10 k", "100 M"):
        row = [f"{scale[f'{rows}: {what}']:{form}}" for what, form in (
            ("start-up, s", ".1f"), ("steps/s", ".2f"), ("private MB of all processes", ".0f"),
            ("MB of files they have mapped", ".0f"))]
        assert f"| {rows} | {' | '.join(row)} |" in page
    seconds = [scale[f"1.28 M members: index {what}, s"] for what in ("made", "found")]
    assert f"| {seconds[0]:.0f}, {seconds[1]:.3f} | " in page
    assert f"| {scale['1.28 M files: scanned, s']:.1f} | " in page
    assert 0.9 < scale["large / small, steps/s"] < 1.1
    private = [scale[f"{rows}: private MB of all processes"] for rows in ("10 k", "100 M")]
    assert private[1] - private[0] < 50


def test_the_page_of_evaluation_says_what_a_step_costs():
    page = (report.ROOT / "docs/evaluation.md").read_text()
    figures = json.loads((report.RESULTS.parent / "transfer_cpu.json").read_text())["figures"]
    assert set(transfer.CLASSES) == set(transfer.PRESETS) - {"small", "voc0712_24k_swav"}  # rates differ
    for name in transfer.CLASSES:
        row = f"{figures[f'{name}, s per step']:.1f} | {figures[f'{name}, GB']:.1f} |"
        assert re.search(rf"^\| `{name}` \|.*\| {re.escape(row)}$", page, re.MULTILINE), row


def test_figures_of_another_recipe_are_not_taken_over(tmp_path, monkeypatch):
    saved = json.loads((report.RESULTS.parent / "ablations_cpu.json").read_text())
    file = tmp_path / "ablations_cpu.json"
    file.write_text(json.dumps(saved))
    found, machine = ablations.measured(file, "swav")
    assert [row["20-NN %"] for row in found.values()] == saved["figures"]["swav: 20-NN %"]
    assert machine == saved["settings"]["machines"]["swav"]
    monkeypatch.setitem(swav.RECIPES, "shapes", ("", {**swav.RECIPES["shapes"][1], "epochs": 9}))
    assert ablations.measured(file, "swav") == ablations.measured(tmp_path / "none", "swav") == ({}, None)


def test_the_figures_kept_are_of_the_recipes_as_they_are():
    for name in ("ablations", "ablations_float32"):
        saved = json.loads((report.RESULTS.parent / f"{name}_cpu.json").read_text())
        titles = {key.rpartition(": ")[0] for key in saved["figures"]}
        assert titles and {title: saved["settings"]["options"][title] for title in titles} \
            == {title: ablations.options_of(title) for title in titles}
