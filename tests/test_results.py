"""What the pages of recipes and results and the walk through the methods say and show is what their files
say, and what is computed from the files."""

import itertools
import json
import math
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
from benchmarks import ablations, figures, methods, multicrop, report, subset, supervised
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
        assert float(said[name]["cifar"]) == pytest.approx(compared[name]["runs"][0]["knn"], abs=0.051)
        if name not in ("swav", "selav2"):  # the first's is `make demo`, the second is not among these
            assert float(said[name]["shapes"]) == pytest.approx(shapes[f"{name}: 20-NN %"], abs=0.051)
    for images in ("shapes", "cifar"):
        rows = re.findall(rf"^\| `{images}`.* \| ([\d.]+) 20-NN", page, re.MULTILINE)
        both = re.search(rf"^\| `sela.py --recipe {images}`, `selav2.py --recipe {images}` \| ([\d.]+), "
                         rf"([\d.]+) 20-NN", page, re.MULTILINE)
        assert [*rows, *both.groups()] == [said[name][images] for name in said]


# ---- the walk


def test_the_walk_shows_what_its_files_say():
    pictures, page = figures.drawn()
    assert page == figures.PAGE.read_text()
    for name, picture in pictures.items():
        drawn = (figures.PAGE.parent / name).read_text()
        assert picture == drawn, f"docs/{name}: python -m benchmarks.figures"


def saved_run(folder, counts):
    """What a finished run of two epochs leaves of clusters with so many images each. Its second head has all
    in one."""
    folder.mkdir(parents=True)
    (folder / "done.json").write_text("{}")
    logged = [{"step": 0, "epoch": 0, "knn_k": 20, "knn_top1": 30.25}]
    logged += [{"step": step, "epoch": step / 100, "loss_per_ln_k": loss}
               for step, loss in ((80, 0.9), (100, 0.8), (180, 0.6), (200, 0.1))]
    logged += [{"step": 200, "epoch": 2, "knn_k": 20, "knn_top1": 40.5}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in logged))
    clusters = np.repeat(np.arange(len(counts)), counts)
    np.savez(folder / "assignments.npz", assignments=np.stack([clusters, 0 * clusters]))


@pytest.fixture
def numbers(tmp_path, monkeypatch):
    """Gathered of runs with known clusters and losses."""
    monkeypatch.setattr("sys.argv", ["figures", "--runs", str(tmp_path)])
    for name, counts in {"deepcluster": (100, 700, 0, 200), "sela": (250,) * 4,
                         "sela, the likeliest label": (0, 900, 100)}.items():
        saved_run(ablations.folder(tmp_path / "ablations", name), counts)
    saved_run(tmp_path / "ablations/deepclusterv2", (500, 500))
    (tmp_path / "stability").mkdir()
    for name, jump in {"odc": 0.0, "deepcluster": 0.5}.items():
        epoch = np.concatenate([np.full(12, 0.5 + jump), np.full(300, 0.5)])
        np.savez(tmp_path / f"stability/{name}_cifar_10_50_0.npz", losses=np.tile(epoch, 10) * math.log(50),
                 clusters=np.zeros((10, 7)))
    return figures.gather(tmp_path)


@pytest.fixture
def found(numbers):
    """The three files. In those of benchmarks.ablations and .multicrop everything is alike, but accuracies,
    which count up."""
    values = {name: (0.5, 7, 25.0, 30.0 + i) for i, name in enumerate(ablations.EXPERIMENTS)}
    values = {f"{name}: {what}": value for name, row in values.items()
              for what, value in zip(ablations.COLUMNS, row)}
    broken = {"machine": "a machine", "settings": {"recipe": "shapes", "epochs": 0, "seed": 0},
              "figures": values}
    costs = {"untrained: 20-NN %": 30.25}
    for i, name in enumerate(multicrop.CROPS, 1):
        figures_of = {"FLOPs / one full image": 2 * i, "ms a step": 1000 * i, "step time / 2 crops": i,
                      "peak GiB": i, "peak / 2 crops": i}
        figures_of |= {"epochs at equal images": 5, "epochs at equal time": 10 - i,
                       "20-NN % at equal images": 40 + i, "20-NN % at equal time": 50 + i}
        costs |= {f"{name} crops: {what}": value for what, value in figures_of.items()}
    for batch in multicrop.BATCHES:
        costs |= {f"batch {batch}: steps": batch,
                  **{f"batch {batch}, queue {queue}: 20-NN %": batch + queue for queue in multicrop.QUEUES}}
    for i, name in enumerate(multicrop.METHODS):
        costs |= {f"{name}: bytes an image": 1000 * i,
                  **{f"{name}: GiB at {size}": i for size in multicrop.SIZES}}
    return {"figures": numbers, "ablations": broken, "multicrop": {"figures": costs}}


def test_the_numbers_of_the_walk_are_those_of_the_runs(numbers, tmp_path):
    assert numbers["deepcluster"]["images"] == [700, 200, 100, 0]
    draws = numbers["deepcluster"]["draws"]
    assert all(abs(count - 1000 / 3) < 20 for count in draws[:3]) and draws[3] == 0 and sum(draws) == 1000
    assert numbers["odc"] == {"ODC": [[0.5] * 26] * 10, "DeepCluster": [[1.0] + [0.5] * 25] * 10}
    assert numbers["sela"] == {"sela": [250] * 4, "sela, the likeliest label": [900, 100, 0]}
    assert numbers["untrained"] == 30.25 and str(tmp_path) not in json.dumps(numbers)
    scores = torch.tensor(numbers["swav"])
    assert scores.shape == (32, 32) and scores.abs().max() <= 1 and scores.std() > 0.05


def test_figures_of_a_run_are_those_of_its_last_epoch_and_all_its_heads(tmp_path):
    saved_run(tmp_path / "run", (100, 700, 0, 200))
    # 80 of the last 100 steps at 0.6, 20 at 0.1; three clusters in use and one, the largest with 70 % and
    # with all
    assert ablations.figures_of(tmp_path / "run") == (pytest.approx(0.5), 2, pytest.approx(85), 40.5)


def test_what_is_taken_away_is_gone(monkeypatch):
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
    monkeypatch.setattr(deepclusterv2, "main", lambda config: inside.append(deepclusterv2.Model(config)))
    own, args = deepclusterv2.Model, SimpleNamespace(data="", root="", val="", recipe="shapes", epochs=0,
                                                     seed=0, workers=0)
    ablations.train(linear, ablations.config_of(linear, args, "out"))
    assert isinstance(inside[0].projection_head, torch.nn.Linear) and deepclusterv2.Model is own


def test_runs_that_cost_is_measured_with_follow_its_rules(tmp_path, monkeypatch):
    configs, shapes = {}, recipe(swav.Config, swav.RECIPES, "shapes")
    monkeypatch.setattr(multicrop, "train",
                        lambda config, out: configs.setdefault(out.name, config) and [30.0, 50.0])
    monkeypatch.setattr(multicrop, "last_loss", lambda folder: 0.5)
    (tmp_path / "seconds.json").write_text(json.dumps({"2": 1.0, "4": 2.0, "2 + 4": 1.5, "2 + 6": 1.8}))
    args = SimpleNamespace(data="", root="", val="", recipe="shapes", seed=0, workers=0, out=tmp_path,
                           rounds=1)
    found = multicrop.accuracies(args, torch.device("cpu"))
    # the last is both
    assert [c.epochs for name, c in configs.items() if "crops" in name] == [5, 9, 5, 4, 5, 6, 5]
    assert configs["4_crops_4_epochs"].crops == (4,) and found["4 crops: epochs at equal time"] == 4
    batch = configs["batch_256_queue_1024"]
    assert (batch.batch_size, batch.queue_length) == (256, 1024)
    assert (batch.queue_start_epoch, batch.prototypes) == (1, 256)
    rates = 8**0.5 * shapes.lr, 8**0.5 * shapes.final_lr
    assert (batch.lr, batch.final_lr) == pytest.approx(rates)
    assert found["batch 64: steps"] == 5 * 156 and found["batch 1024: steps"] == 45


def test_every_picture_is_small_readable_and_shown_by_the_page(found):
    page = figures.PAGE.read_text()
    for name, picture in figures.PICTURES.items():
        svg = picture(found)
        ElementTree.fromstring(svg)
        assert len(svg) < 40_000 and "font: 16px" in svg and 'width="560"' in svg
        assert "prefers-color-scheme: dark" in svg
        assert f"]({name})" in page


def test_the_codes_shown_are_balanced_by_the_iterations(found):
    masses = re.findall(r"mass ([\d.]+) to ([\d.]+)", figures.swav_picture(found))
    spread = [float(most) - float(least) for least, most in masses]
    assert len(spread) == 3 and spread[0] > 3 and spread[0] > 3 * spread[1] and spread[1] > 3 * spread[2]


def test_tables_of_the_walk_set_every_method_beside_its_broken_self(found):
    table = figures.break_it(found)
    names = [line.split(" | ")[0].removeprefix("| ") for line in table.splitlines() if " of " in line]
    methods_of = [name.split(",")[0] for name in names]
    assert methods_of[::2] == names[::2] == methods_of[1::2]
    line = row(table, "swav, 0 Sinkhorn iterations")
    assert line == "| swav, 0 Sinkhorn iterations | 0.50 | 7 of 32 | 25.0 % | 31 % |"
    commands = re.findall('--only "(.*)"', table)
    assert len(commands) == table.count("--only") == 5 and set(commands) <= set(ablations.EXPERIMENTS)
    table = figures.leave_one_out(found)
    assert row(table, "all of it").endswith("| 38 % |") and row(table, "two crops").endswith("| 45 % |")
    assert row(table, "untrained trunk").endswith("| 30.25 % |") and "clustered once" not in table


def test_tables_of_cost_show_every_figure_in_its_place(found):
    table = figures.crops(found)
    line = "| 2 + 4 | 6.00 | 3.00 (3.00 s) | 3.00 (3.00 GiB) | 43 % (5 epochs) | 53 % (7 epochs) |"
    assert row(table, "2 + 4") == line
    table = figures.batches(found)
    assert row(table, "1,024") == "| 1,024 | 1024 | 1024 % | 2048 % |"
    assert row(table, "untrained trunk") == "| untrained trunk | | 30.25 % | |"
    table = figures.state(found)
    assert row(table, "`sela.py`") == "| `sela.py` | 3,000 B | 3 GiB | 3 GiB | 3 GiB |"
    assert len(table.splitlines()) == 8


def test_a_run_that_is_missing_is_named_and_nothing_is_drawn(found, tmp_path, monkeypatch):
    del found["ablations"]["figures"]["sela: 20-NN %"]
    with pytest.raises(SystemExit, match="lacks 'sela: 20-NN %'"):
        figures.break_it(found)
    (tmp_path / "stability/odc_cifar_10_50_0.npz").unlink()
    with pytest.raises(SystemExit, match=r"odc_cifar_10_50_0\.npz: python -m benchmarks\.stability"):
        figures.gather(tmp_path)
    (tmp_path / "ablations/sela/done.json").unlink()
    with pytest.raises(SystemExit, match=r'ablations/sela is no finished run: .* --only "sela"'):
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
