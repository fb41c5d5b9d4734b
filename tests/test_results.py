"""The comparison of methods: what the README says is what its file says, and what is computed from the file."""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import TINY, losses, metrics, run_here

from benchmarks import methods, report, supervised
from common import data
from common.config import parse


def method(title, *finals, first_epoch_s=60.0, epoch_s=50.0):
    """A method whose runs go from 20 % in a straight line to their ends after 4 epochs."""
    runs = [
        {"seed": i, "linear": 70.0, "nmi": 10.0, "ami": 9.0, "hungarian": 25.0, "knn": end, "knn_at_32_px": end - 1}
        | {"curve": [[e, 20 + (end - 20) * e / 4] for e in (0, 2, 4)]}
        for i, end in enumerate(finals)
    ]
    return {"title": title, "crops": 4, "batch_size": 32, "first_epoch_s": first_epoch_s, "epoch_s": epoch_s, "runs": runs}


@pytest.fixture
def results():
    floors = {name: dict(knn=20.0, linear=30.0, nmi=1.0, ami=0.5, hungarian=11.0) for name in ("random weights", "pixels")}
    found = {
        "swav": method("SwAV", 58.0, 60.0, 62.0),
        "odc": method("ODC", 40.0, first_epoch_s=25.0, epoch_s=25.0),
        "lightly_swav": method("SwAV of lightly", 40.0, first_epoch_s=20.0, epoch_s=20.0),
        "supervised": method("with labels", 80.0, first_epoch_s=10.0, epoch_s=10.0),
    }
    settings = dict(data="list.txt", images=1000, held_out=500, classes=10, epochs=4, trunk="resnet10 x0.5", px=48)
    return {"machine": "a machine", "settings": settings, "methods": found, "floors": floors}


def row(table, title):
    return next(line for line in table.splitlines() if line.startswith(f"| {title} |"))


@pytest.mark.skipif(not report.RESULTS.exists(), reason="no results yet: make results")
def test_readme_and_figure_are_those_of_the_file():
    saved = json.loads(report.RESULTS.read_text())
    assert report.section(saved) in report.README.read_text()
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


def test_the_table_compares_at_equal_images_and_at_the_time_of_the_quickest_method(results):
    table = report.table(results)
    assert report.shortest(results) == 100  # ODC's: neither the peer nor the ceiling is a method of ours
    assert "20-NN at 2 minutes" in table and "4,000 images seen" in table
    assert row(table, "SwAV").endswith("| 60.0 ± 2.0 | 70.0 ± 0.0 | 10.0 ± 0.0 | 9.0 ± 0.0 | 25.0 ± 0.0 | 4 | 38.0 |")
    assert row(table, "ODC").endswith("| 40.0 | 70.0 | 10.0 | 9.0 | 25.0 | 2 | 40.0 |")
    assert row(table, "pixels").count("|") == row(table, "SwAV").count("|")
    order = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")][1:]
    assert order == ["with labels", "SwAV", "ODC", "SwAV of lightly", "random weights", "pixels"]


def test_the_peer_is_compared_at_equal_images_and_at_equal_accuracy(results):
    # 40 % after 80 s; ours has 40 % after two epochs, 110 s.
    text = report.peer(results)[-1]
    assert "60.0 % 20-NN here, 40.0 % with lightly's (39.0 %" in text
    assert "in 1.3 minutes, ours reaches in 1.8, 0.7 times as fast" in text
    results["methods"]["lightly_swav"] = method("SwAV of lightly", 70.0)  # never reached by ours
    assert "times as fast" not in report.peer(results)[-1]


def test_without_times_the_table_has_no_times(results):
    for found in results["methods"].values():
        del found["first_epoch_s"], found["epoch_s"]
    table = report.table(results)
    assert "minutes" not in table and "lightly's" not in table
    assert row(table, "SwAV").count("|") == row(table, "pixels").count("|") == 9


def test_the_figure_names_every_curve_once_and_apart(results):
    svg = report.figure(results)
    labels = [line for line in svg.splitlines() if line.startswith('<text x="613"')]
    assert [label.split(">")[1].rpartition(" ")[0] for label in labels] == ["pixels", "SwAV of lightly", "ODC", "SwAV", "with labels"]
    heights = [float(label.split('y="')[1].split('"')[0]) for label in labels]
    assert all(lower - upper >= 17 for lower, upper in itertools.pairwise(heights))
    assert svg.count("fill-opacity") == 1 and "prefers-color-scheme: dark" in svg  # one method has several seeds


# ---- runs


@pytest.fixture
def args(tmp_path):
    return SimpleNamespace(data="shapes:64", root="", val="", epochs=3, workers=0, out=tmp_path)


@pytest.mark.parametrize("name", [*methods.METHODS, "supervised"])
def test_the_command_line_of_a_run_means_its_recipe(name, args):
    module, *words = methods.training(name, args, 5, args.out / "x")
    config = parse(methods.module_of(name).Config, methods.module_of(name).RECIPES, "", words)
    free = dict(data="shapes:64", workers=0, eval_every=1, out=str(args.out / "x"))
    assert config == replace(methods.config_of(name, args, 5), **free)
    assert module == methods.module_of(name).__name__ and (config.epochs, config.seed, config.recipe) == (3, 5, "cifar")


def test_a_finished_run_is_not_made_again_and_one_of_other_options_is_refused(args):
    run = args.out / "swav_5"
    run.mkdir()
    config = {**vars(methods.config_of("swav", args, 5)), "data": "shapes:64"}
    (run / "config.json").write_text(json.dumps({"method": "swav", **config}))
    assert methods.finished("swav", args, 5) is None
    (run / "done.json").write_text("{}")
    assert methods.finished("swav", args, 5) == run
    del config["epsilon"]  # an option that is younger than the run: it had what is now the default
    (run / "config.json").write_text(json.dumps({**config, "out": "elsewhere"}))
    assert methods.finished("swav", args, 5) == run
    for other in (dict(lr=0.3), dict(data="shapes"), dict(epochs=4)):
        (run / "config.json").write_text(json.dumps({**config, **other}))
        with pytest.raises(SystemExit, match=f"--{next(iter(other))}"):
            methods.finished("swav", args, 5)


def test_the_ceiling_learns_the_labels(tmp_path):
    options = [*TINY, "--width", 0.25, "--crops", 2, "--lr", 0.05, "--jitter", 0, 0, 0, 0, "--scales", 0.6, 1, "--epochs", 10]
    assert run_here(supervised, "--recipe", "cifar", "--data", "shapes:64", *options, "--out", tmp_path) == 0
    found = losses(tmp_path)
    assert sum(found[-4:]) < 0.6 * sum(found[:4])


def test_the_peer_draws_by_position_and_learns(tmp_path):
    pytest.importorskip("lightly")
    from benchmarks import lightly_swav

    config = methods.config_of("lightly_swav", SimpleNamespace(epochs=1), 0)
    views = lightly_swav.Views(data.open_images("shapes:8"), config)
    draws = [views[key][1][0] for key in ((0, 3, 5), (0, 3, 5), (0, 4, 5), (1, 3, 5))]  # (2, 3, 32, 32)
    assert draws[0].shape == (2, 3, 32, 32) and torch.equal(draws[0], draws[1]) and not torch.equal(draws[0][0], draws[0][1])
    assert not any(torch.equal(draws[0], other) for other in draws[2:])
    options = [*TINY, "--width", 0.25, "--prototypes", 10, "--lr", 0.01, "--epochs", 6]
    assert run_here(lightly_swav, "--recipe", "cifar", "--data", "shapes:64", *options, "--out", tmp_path) == 0
    found = losses(tmp_path)
    assert sum(found[-4:]) < sum(found[:4]) and [m["lr"] for m in metrics(tmp_path) if "lr" in m][4] < 0.01


@pytest.mark.slow
def test_the_whole_comparison_is_made_once(tmp_path, monkeypatch, capsys):
    """Minutes: a method and the ceiling are trained, judged, timed and written; a second time only what is missing is done."""
    words = ["--data", "shapes:320", "--epochs", 1, "--workers", 0, "--rounds", 1, "--methods", "sela", "supervised", "--out", tmp_path]
    monkeypatch.setattr("sys.argv", ["methods", *map(str, words), "--results", str(tmp_path / "results.json")])
    readme = report.README.read_text()
    methods.main()
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["methods"]) == ["sela", "supervised"] and list(results["floors"]) == ["random weights", "pixels"]
    for found in [*results["floors"].values(), *(m["runs"][0] for m in results["methods"].values())]:
        assert all(-10 < found[key] <= 100 for key in report.COLUMNS)  # by chance AMI is 0 on average
    run = results["methods"]["sela"]["runs"][0]
    assert len(run["curve"]) == 2 and run["own_clusters"]["clusters"] == 64 and results["methods"]["sela"]["epoch_s"] > 0
    assert str(tmp_path) not in json.dumps(results) and report.README.read_text() == readme
    capsys.readouterr()

    def refuse(words, **how):
        raise AssertionError(f"made again: {words}")

    monkeypatch.setattr(methods, "python", refuse)
    methods.main()
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert report.table(results) in capsys.readouterr().out
