"""swav.py from the outside: what a user types, and what comes out."""

import importlib.util
import json
import os
import re
import time
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from helpers import (
    QUEUE,
    ROOT,
    TINY,
    command,
    finish,
    free_port,
    image_tree,
    losses,
    metrics,
    ranks_of,
    saved,
    start,
    swav_here,
    swav_ranks,
    two_ranks_as_one,
    unreadable,
)

import swav
from common.engine.options import parse, recipe, table

# ---- one process or many


@pytest.mark.parametrize("queue", [QUEUE, ["--freeze-prototypes-iters", "3", "--queue-length", "0"]],
                         ids=["queue", "no queue"])
def test_two_ranks_follow_the_trajectory_of_one(tmp_path, capsys, queue):
    shared = ["--data", "shapes:64", "--recipe", "shapes", *TINY, *queue, "--crops", 2, 2, "--sizes", 16, 12,
              "--scales", 0.3, 1, 0.1, 0.4, "--blur-p", 0.5, "--max-steps", 20, "--epochs", 6]
    a, b = two_ranks_as_one(swav, shared, tmp_path)
    assert (a["meter"]["assignments"] >= 0).all()
    if queue is QUEUE:
        assert a["memory"]["queue"].shape == (2, 48, 8)
        # the same order of rows
        torch.testing.assert_close(b["memory"]["queue"], a["memory"]["queue"], rtol=0, atol=1e-9)
        filled = [record["queue_filled"] for record in metrics(tmp_path / "one") if "loss" in record]
        assert filled[:4] == [16, 32, 48, 48] and "used from step 4 on" in capsys.readouterr().out


def test_first_float32_loss_of_two_ranks_equals_that_of_one(tmp_path):
    shared = ["--data", "shapes:64", "--recipe", "shapes", *TINY, "--precision", "float32", "--max-steps", 1]
    assert swav_here(*shared, "--out", tmp_path / "one") == 0
    assert [code for code, _, _ in ranks_of(2, swav, *shared, "--out", tmp_path / "two")] == [0, 0]
    np.testing.assert_allclose(losses(tmp_path / "two")[0], losses(tmp_path / "one")[0], rtol=1e-5)


@pytest.mark.parametrize("name", ["small", "cifar"])
def test_recipes_for_small_data_train_on_a_folder_of_photos(tmp_path, capsys, name):
    photos = image_tree(tmp_path / "photos", classes=1, images=70, splits=("",)) / "n00"  # flat, no labels
    assert swav_here("--data", photos, "--recipe", name, "--workers", 0, "--max-steps", 2, "--log-every", 1,
                     "--out", tmp_path / "run") == 0
    out = capsys.readouterr().out
    assert "70 images of" in out and "no labels; crops 4x32 px" in out and len(losses(tmp_path / "run")) == 2


def test_the_published_recipe_trains_under_torchrun_on_two_nodes(tmp_path):
    shared = ["--data", image_tree(tmp_path / "imagenet"), "--recipe", "swav_400ep_8x32", "--batch-size", 4,
              "--max-steps", 2, "--log-every", 1, "--workers", 1, "--precision", "float32", "--out",
              tmp_path / "run"]
    line, port = command(*shared, ranks=1), free_port()
    line.remove("--standalone")
    rendezvous = ["--nnodes=2", "--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test"]
    nodes = [start(*line[:3], *rendezvous, f"--node_rank={node}", *line[3:]) for node in range(2)]
    results = [finish(node) for node in nodes]
    assert [code for code, _, _ in results] == [0, 0], results
    (out,) = (out for _, out, _ in results if "2 x cpu" in out)  # one rank speaks
    assert "resnet50" in out and "2x224 px + 6x96 px" in out
    assert "lr 0.009375 (0.6 at the recipe's batch 256)" in out
    assert len(losses(tmp_path / "run")) == 2 and np.isfinite(losses(tmp_path / "run")).all()
    state = saved(tmp_path / "run")
    assert state["model"]["prototypes.weight"].shape == (3000, 128) and state["step"] == 2


# ---- what the run tells


def test_report_warns_of_what_will_not_work(tmp_path, capsys):
    run = [*TINY, "--batch-size", 4, "--max-steps", 1, "--epochs", 8, "--out", tmp_path]
    assert swav_here("--data", "shapes:64", *run, "--prototypes", 30) == 0
    out = capsys.readouterr().out
    assert "--prototypes 30 are more than the 4 rows" in out
    assert "--prototypes 30 means 2.1 images per cluster: take at most 6" in out
    assert "--batch-size 4 is far from the recipe's" in out
    assert "--freeze-prototypes-iters" not in out  # 50 of 128 steps
    assert swav_here("--data", "shapes:64", *run, "--freeze-prototypes-iters", 128, "--fresh") == 0
    assert "--freeze-prototypes-iters 128 of 128 steps: prototypes stay untrained, take at most 16" in \
        capsys.readouterr().out


def test_run_directory_holds_what_it_promises(tmp_path, capsys):
    tree = image_tree(tmp_path / "images", images=16, size=(20, 24))
    out = tmp_path / "run"
    small = ["--data", tree, "--recipe", "shapes", *TINY, "--epochs", 2, "--keep-every", 2, "--eval-every", 1,
             "--out", out]
    assert swav_here(*small) == 0
    assert json.loads((out / "done.json").read_text())["steps"] == 4
    assert json.loads((out / "config.json").read_text())["prototypes"] == 12
    assignments = np.load(out / "assignments.npz")["assignments"]
    assert assignments.shape == (1, 32) and assignments.min() >= 0 and assignments.max() < 12
    rows = (out / "assignments.csv").read_text().splitlines()
    assert rows[:2] == ["path,head0", f"{os.path.join('n00', '0.JPEG')},{assignments[0, 0]}"]
    assert len(rows) == 33
    assert sorted(p.name for p in out.glob("backbone*.pt")) == ["backbone.pt", "backbone_2.pt"]
    assert len([r for r in metrics(out) if "knn_top1" in r]) == 3  # before, and after each epoch
    assert [r["nmi_to_previous"] is None for r in metrics(out) if "nmi_to_previous" in r] == [True, False]
    figures = {"loss", "loss_per_ln_k", "lr", "clusters_used", "assignment_entropy", "feature_std",
               "images_per_s", "data_wait", "memory_gb"}
    assert all(figures <= r.keys() for r in metrics(out) if "loss" in r)
    capsys.readouterr()
    assert swav_here(*small) == 0 and "resumed at step 4 of 4" in capsys.readouterr().out


def test_deterministic_runs_with_the_same_figures(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--max-steps", 2]
    assert swav_here(*shared, "--out",
                     tmp_path / "usual") == 0 and not torch.are_deterministic_algorithms_enabled()
    try:
        assert swav_here(*shared, "--deterministic", "--out", tmp_path / "deterministic") == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert losses(tmp_path / "deterministic") == losses(tmp_path / "usual")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [0, 2])
def test_a_compiled_trunk_computes_the_same(tmp_path, processes):
    shared = ["--data", "shapes:64", *TINY, "--max-steps", 3, "--precision", "float32"]
    assert swav_here(*shared, "--out", tmp_path / "eager") == 0
    run = start(*command(*shared, "--compile", "--out", tmp_path / "compiled", ranks=processes))
    code, _, err = finish(run)
    assert code == 0, err
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "eager"), rtol=1e-3)


def test_tensorboard_events_or_what_to_install(tmp_path, capsys):
    run = ["--data", "shapes:64", *TINY, "--max-steps", 2, "--tensorboard", "--out", tmp_path]
    (tmp_path / "checkpoint.pt").write_text("kept")
    if importlib.util.find_spec("tensorboard") is None:
        assert swav_here(*run, "--fresh") == 2
        assert "--tensorboard needs: pip install tensorboard" in capsys.readouterr().err
        # --fresh deletes nothing before all options are right
        assert (tmp_path / "checkpoint.pt").read_text() == "kept"
    else:
        assert swav_here(*run, "--fresh") == 0 and list(tmp_path.glob("events.out.tfevents.*"))


def test_fresh_keeps_a_run_until_all_options_are_right(tmp_path, capsys):
    run = ["--data", "shapes:64", *TINY, "--max-steps", 1, "--out", tmp_path]
    assert swav_here(*run) == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    assert swav_here(*run, "--fresh", "--eval-every", 1, "--val", tmp_path / "none") == 3
    assert swav_here(*run, "--fresh", "--init-from", tmp_path / "none.pt") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "my_checkpoint.pt").write_text("mine")
    assert swav_here(*run, "--fresh") == 0 and "resumed" not in capsys.readouterr().out
    assert (tmp_path / "my_checkpoint.pt").read_text() == "mine"


def test_a_run_starts_from_another_ones_trunk(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--lr", 1e-9]
    assert swav_here(*shared, "--seed", 1, "--max-steps", 1, "--out", tmp_path / "first") == 0
    trunk = tmp_path / "first" / "backbone.pt"
    second = [*shared, "--init-from", trunk, "--out", tmp_path / "second"]
    weights = torch.load(trunk, weights_only=True)["state_dict"]
    assert swav_here(*second, "--max-steps", 1) == 0
    for name, weight in weights.items():
        if name.endswith("weight"):  # the step moved it by nothing that counts
            torch.testing.assert_close(saved(tmp_path / "second")["model"][f"backbone.{name}"], weight,
                                       rtol=0, atol=1e-6)
    trunk.unlink()
    assert swav_here(*second, "--max-steps", 2) == 0  # a run that goes on does not need the file any more


# ---- bad input: one line, the exit code, no hang


def test_errors_of_arguments(tmp_path, capsys):
    tree = image_tree(tmp_path / "tree", splits=("train",), images=20)
    for arguments, words in {
        ("--recipe", "nope"): "--recipe nope: choose one of swav_400ep_8x32",
        ("--no-such-option",): "unrecognized arguments: --no-such-option",
        ("--warmup-epochs", "70"): "--warmup-epochs 70 is longer than the run",
        ("--batch-size", "0"): "--batch-size 0: at least 2",
        ("--lr", "nan"): "--lr nan: more than 0",
        ("--eval-every", "-1"): "--eval-every -1: at least 0",
        ("--workers", "-2"): "--workers -2: at least -1",
        ("--seed", str(2**70)): "--seed 1180591620717411303424: at least 0 and less than",
        ("--crops", "2"): "one number, one size and two scales",
        ("--scales", "0.5", "0.1"): "--scales 0.5 0.1",
        ("--lr", "-1"): "--lr -1",
        ("--data", str(tmp_path), "--device", "cpu"): "take --recipe small",
        ("--eval-every", "1", "--data", str(tree), "--recipe", "shapes", *TINY): "no val split: name some",
    }.items():
        assert swav_here(*arguments, "--out", tmp_path / "run") == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error


def test_errors_of_data(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    image_tree(tmp_path / "few", images=2, splits=("train",))
    (tmp_path / "list.txt").write_text("few/train/n00/0.JPEG\nfew/train/n00/none.JPEG\n")
    bad = image_tree(tmp_path / "bad", images=40, size=(20, 20), splits=("train",))
    for i in range(20):
        (bad / "train" / "n00" / f"{i}.JPEG").write_text("no image")
    for name, words in {"missing": "does not exist", "empty": "holds no images",
                        "few/train/n00/0.JPEG": "1 images, fewer than one batch", "list.txt": "line 2",
                        "few": "4 images, fewer than one batch: --batch-size 16",
                        "bad": "more than --max-bad 10"}.items():
        assert swav_here("--data", tmp_path / name, "--recipe", "shapes", *TINY, "--out",
                         tmp_path / "run") == 3, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error
    assert "n00" in (tmp_path / "run" / "bad_images.txt").read_text()


def test_unreadable_images_are_named_once_also_after_a_resume(tmp_path):
    tree = image_tree(tmp_path / "images", images=16, size=(20, 20), splits=("train",))
    for name in ("n00/3.JPEG", "n01/7.JPEG"):
        (tree / "train" / name).write_text("no image")
    run = ["--data", tree, "--recipe", "shapes", *TINY, "--epochs", 3, "--out", tmp_path / "run",
           "--max-steps"]
    assert swav_here(*run, 2) == 0 and swav_here(*run, 6) == 0
    (tmp_path / "run" / "checkpoint.pt").unlink()
    (tmp_path / "run" / "previous_checkpoint.pt").unlink()
    assert swav_here(*run, 2) == 0  # from the start, in the same directory
    assert unreadable(tmp_path / "run") == ["n00/3.JPEG", "n01/7.JPEG"]


def test_torchrun_says_an_error_once_and_does_not_hang(tmp_path):
    started = time.monotonic()
    code, _, err = swav_ranks(2, "--batch-size", 15, "--out", tmp_path)
    assert code == 1 and err.count("error: --batch-size 15 is not divisible by the 2 processes") == 1
    assert time.monotonic() - started < 60


# ---- options and recipes


def test_every_option_is_read_somewhere():
    files = [ROOT / "swav.py", *(ROOT / "common" / "engine").glob("*.py")]
    source = "".join(file.read_text() for file in files)
    for f in fields(swav.Config):
        assert re.search(rf"\b(config|c)\.{f.name}\b|\"{f.name}\"", source), f.name


def test_published_recipes():
    def get(name):
        return recipe(swav.Config, swav.RECIPES, name)

    big = get("swav_800ep")
    assert (big.epochs, big.batch_size, big.lr, big.final_lr, big.warmup_epochs,
            big.start_lr) == (800, 4096, 4.8, 0.0048, 10, 0.3)
    assert (big.queue_length, big.freeze_prototypes_iters, big.prototypes, big.temperature,
            big.epsilon) == (0, 313, 3000, 0.1, 0.05)
    assert (big.crops, big.sizes, big.scales, big.weight_decay) == ((2, 6), (224, 96),
                                                                    (0.14, 1.0, 0.05, 0.14), 1e-6)
    small = get("swav_200ep_bs256")
    assert (small.epochs, small.batch_size, small.lr, small.final_lr, small.warmup_epochs) == (200, 256, 0.6,
                                                                                               0.0006, 0)
    assert (small.queue_length, small.queue_start_epoch, small.freeze_prototypes_iters) == (3840, 15, 5005)
    two = get("swav_400ep_2x224")
    assert (two.crops, two.sizes, two.scales, two.batch_size, two.epochs) == ((2,), (224,), (0.08, 1.0), 4096,
                                                                              400)
    w2, w4, w5 = get("swav_rn50w2"), get("swav_rn50w4"), get("swav_rn50w5")
    assert [(w.width, w.hidden, w.batch_size, w.queue_length) for w in (w2, w4, w5)] == [
        (2, 8192, 4096, 0), (4, 8192, 2560, 2560), (5, 10240, 1536, 1536)]  # fmt: skip
    assert all(w.crops == (2, 4) and w.epochs == 400 and w.lr == 4.8 for w in (w2, w4, w5))
    assert w4.scales == (0.08, 1.0, 0.08, 0.14) and (w5.final_lr, w5.start_lr) == (0.0, 0.1875)
    # The released model of this width has a head without batch norm: these names, and no others.
    with torch.device("meta"):
        heads = {w.width: swav.Model(w).projection_head.state_dict() for w in (w2, w5)}
    assert [(name, *x.shape) for name, x in heads[5].items()] == [
        ("0.weight", 10240, 10240), ("0.bias", 10240), ("2.weight", 128, 10240), ("2.bias", 128)]  # fmt: skip
    assert {name[0] for name in heads[2]} == set("013")
    results = {"swav_800ep": 75.3, "swav_400ep": 74.6, "swav_200ep": 73.9, "swav_100ep": 72.1,
               "swav_400ep_2x224": 70.1}
    results |= {"swav_400ep_bs256": 74.3, "swav_200ep_bs256": 72.7, "swav_400ep_8x32": 74.3}
    results |= {"swav_rn50w2": 77.3, "swav_rn50w4": 77.9, "swav_rn50w5": 78.5}
    for name, value in results.items():
        assert swav.RECIPES[name][0].startswith(str(value)), name
        get(name)


def test_learning_rates_follow_the_batch_size_unless_given():
    def get(*arguments):
        return parse(swav.Config, swav.RECIPES, "", ["--recipe", "swav_100ep", *arguments])

    half = get("--batch-size", "2048")
    assert (half.lr, half.final_lr, half.start_lr) == pytest.approx((2.4, 0.0024, 0.15))
    given = get("--batch-size", "2048", "--lr", "1.2")
    assert (given.lr, given.final_lr, given.start_lr) == pytest.approx((1.2, 0.0012, 0.075))
    assert get("--batch-size", "2048", "--final-lr", "0").final_lr == 0


@pytest.mark.parametrize("method", ["swav", "selav2", "deepclusterv2", "deepcluster", "odc", "sela"])
def test_what_list_recipes_prints_can_be_typed(method):
    method = importlib.import_module(method)
    for name, printed in zip(method.RECIPES, table(method.Config, method.RECIPES).splitlines()[1::2]):
        typed = [] if printed == "    (the defaults)" else printed.split()
        found = parse(method.Config, method.RECIPES, "", ["--recipe", next(iter(method.RECIPES)), *typed])
        wanted = recipe(method.Config, method.RECIPES, name)
        # a rate to warm up from follows --lr, which changes nothing where nothing is warmed up
        idle = {} if getattr(wanted, "warmup_epochs", 1) else {"start_lr": wanted.start_lr}
        assert replace(found, recipe=name, out="", **idle) == wanted, name


def test_list_recipes_and_help_are_readable(capsys):
    assert swav_here("--list-recipes") == 0
    out = capsys.readouterr().out
    assert "swav_800ep               75.3" in out and "--batch-size 4096" in out
    assert swav_here("--help") == 0
    out = capsys.readouterr().out
    assert "multi-crop:" in out and "(default: 3000)" in " ".join(out.split())
    assert max(map(len, out.splitlines())) < 140
