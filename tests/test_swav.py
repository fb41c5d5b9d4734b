"""swav.py from the outside: what a user types, and what comes out."""

import json
import os
import re
import resource
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, command, finish, free_port, losses, metrics, start, swav_here, swav_ranks
from PIL import Image

import swav
from common import checkpoint
from common.config import parse, recipe
from common.meter import COLLAPSED_STEPS
from common.run import Run

# A network and crops so small that a step takes milliseconds.
TINY = "--width 0.125 --hidden 16 --dim 8 --sizes 16 --prototypes 12 --batch-size 16 --lr 2 --warmup-epochs 0".split()
TINY += "--workers 0 --log-every 1".split()
QUEUE = "--queue-length 48 --queue-start-epoch 0 --freeze-prototypes-iters 3".split()


@pytest.fixture(autouse=True)
def restore_process_state():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def saved(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return a == b


def children(pid):
    """Processes started by pid, oldest first."""
    return sorted(int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split())


def image_tree(root, classes=2, images=6, size=(70, 60), splits=("train", "val")):
    rng = np.random.default_rng(0)
    for split in splits:
        for c in range(classes):
            (root / split / f"n0{c}").mkdir(parents=True)
            for i in range(images):
                Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / split / f"n0{c}" / f"{i}.JPEG")
    return root


# ---- one process or many


@pytest.mark.parametrize("queue", [QUEUE, ["--freeze-prototypes-iters", "3", "--queue-length", "0"]], ids=["queue", "no queue"])
def test_two_ranks_follow_the_trajectory_of_one(tmp_path, queue):
    shared = ["--data", "shapes:64", "--recipe", "shapes", *TINY, *queue, "--crops", 2, 2, "--sizes", 16, 12, "--scales", 0.3, 1, 0.1, 0.4]
    shared += ["--blur-p", 0.5, "--precision", "float64", "--max-steps", 20, "--epochs", 6]
    assert swav_here(*shared, "--out", tmp_path / "one") == 0
    code, out, err = swav_ranks(2, *shared, "--out", tmp_path / "two")
    assert code == 0, err
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert len(one) == 20 and len(set(one)) == 20
    np.testing.assert_allclose(two, one, rtol=1e-9)
    a, b = saved(tmp_path / "one"), saved(tmp_path / "two")
    for name, weight in a["model"].items():
        torch.testing.assert_close(b["model"][name], weight, rtol=0, atol=1e-8, msg=name)
    assert torch.equal(a["meter"]["assignments"], b["meter"]["assignments"]) and (a["meter"]["assignments"] >= 0).all()
    if queue is QUEUE:
        assert a["memory"]["queue"].shape == (2, 48, 8)
        torch.testing.assert_close(b["memory"]["queue"], a["memory"]["queue"], rtol=0, atol=1e-9)  # the same order of rows
        filled = [record["queue_filled"] for record in metrics(tmp_path / "one") if "loss" in record]
        assert filled[:4] == [16, 32, 48, 48] and "used from step 4 on" in out


def test_first_float32_loss_of_two_ranks_equals_that_of_one(tmp_path):
    shared = ["--data", "shapes:64", "--recipe", "shapes", *TINY, "--precision", "float32", "--max-steps", 1]
    assert swav_here(*shared, "--out", tmp_path / "one") == 0
    assert swav_ranks(2, *shared, "--out", tmp_path / "two")[0] == 0
    np.testing.assert_allclose(losses(tmp_path / "two")[0], losses(tmp_path / "one")[0], rtol=1e-5)


def test_the_published_recipe_trains_under_torchrun(tmp_path):
    tree = image_tree(tmp_path / "imagenet")
    code, out, err = swav_ranks(2, "--data", tree, "--recipe", "swav_400ep_8x32", "--batch-size", 4, "--max-steps", 2, "--log-every", 1,
                                "--workers", 1, "--out", tmp_path / "run")  # fmt: skip
    assert code == 0, err
    assert "resnet50" in out and "2x224 px + 6x96 px" in out and "lr 0.009375 (0.6 at the recipe's batch 256)" in out
    assert len(losses(tmp_path / "run")) == 2 and np.isfinite(losses(tmp_path / "run")).all()
    state = saved(tmp_path / "run")
    assert state["model"]["prototypes.weight"].shape == (3000, 128) and state["step"] == 2


def test_two_nodes_on_one_host(tmp_path):
    tree = image_tree(tmp_path / "imagenet")
    shared = ["--data", tree, "--recipe", "swav_400ep_8x32", "--batch-size", 4, "--max-steps", 1, "--log-every", 1, "--workers", 0,
              "--crops", 2, 1, "--out", tmp_path / "run"]  # fmt: skip
    nodes, port = [], free_port()
    for node in range(2):
        line = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node_rank={node}", "--nproc_per_node=1"]
        line += ["--rdzv_backend=c10d", f"--rdzv_endpoint=localhost:{port}", "--rdzv_id=test", str(ROOT / "swav.py"), *map(str, shared)]
        nodes.append(start(*line))
    results = [finish(node) for node in nodes]
    assert [code for code, _, _ in results] == [0, 0], results
    assert sum("2 x cpu" in out for _, out, _ in results) == 1  # one rank speaks
    assert len(losses(tmp_path / "run")) == 1


# ---- resume


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    shared = ["--data", "shapes:64", *TINY, *QUEUE, "--epochs", 4, "--save-every", 0, "--workers", 1]
    straight = start(*command(*shared, "--out", tmp_path / "straight"))
    killed = start(*command(*shared, "--out", tmp_path / "killed"), start_new_session=True)
    for line in killed.stdout:
        if "step 6/16" in line:  # in the middle of the second epoch, with the queue in use
            os.killpg(killed.pid, signal.SIGKILL)
            break
    killed.wait()
    assert not (tmp_path / "killed" / "done.json").exists()
    code, out, err = finish(start(*command(*shared, "--out", tmp_path / "killed")))
    assert code == 0 and re.search(r"resumed at step [4-7] of 16", out), out + err
    assert finish(straight)[0] == 0
    a, b = saved(tmp_path / "straight"), saved(tmp_path / "killed")
    for part in ("model", "optimizer", "memory"):
        assert same(a[part], b[part]), part
    assert torch.equal(a["meter"]["assignments"], b["meter"]["assignments"])
    steps = [record["step"] for record in metrics(tmp_path / "killed") if "loss" in record]
    assert steps == list(range(1, 17))
    assert losses(tmp_path / "straight") == losses(tmp_path / "killed")


def test_another_world_size_goes_on_with_the_same_batches(tmp_path):
    shared = ["--data", "shapes:64", *TINY, *QUEUE, "--precision", "float64", "--epochs", 4, "--max-steps"]
    assert swav_here(*shared, 12, "--out", tmp_path / "one") == 0
    assert swav_ranks(2, *shared, 5, "--out", tmp_path / "both")[0] == 0
    assert swav_here(*shared, 12, "--out", tmp_path / "both") == 0
    np.testing.assert_allclose(losses(tmp_path / "both"), losses(tmp_path / "one"), rtol=1e-9)


def test_a_stop_signal_saves_and_the_same_command_goes_on(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 500, "--out", tmp_path / "run", "--workers", 1]
    stopped = start(*command(*shared), start_new_session=True)
    for line in stopped.stdout:
        if "step 3/" in line:
            os.killpg(stopped.pid, signal.SIGTERM)  # the loader's workers get it too
            break
    rest = stopped.stdout.read()
    assert stopped.wait(timeout=30) == 0 and "stopped by a signal" in rest
    step = saved(tmp_path / "run")["step"]
    assert swav_here(*shared[:-1], 0, "--max-steps", step + 2) == 0
    assert [record["step"] for record in metrics(tmp_path / "run") if "loss" in record] == list(range(1, step + 3))


def test_every_process_may_get_the_stop_signal_twice(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 5000, "--out", tmp_path, "--workers", 1]
    stopped = start(*command(*shared, ranks=2), start_new_session=True)
    for line in stopped.stdout:
        if "step 3/" in line:
            os.killpg(stopped.pid, signal.SIGINT)
            time.sleep(0.02)
            os.killpg(stopped.pid, signal.SIGINT)
            break
    out, err = stopped.communicate(timeout=60)
    assert out.count("stopped by a signal") == 1, out + err
    assert saved(tmp_path)["step"] == metrics(tmp_path)[-1]["step"] >= 3


@pytest.mark.parametrize("damage", ["half", "tail", "empty", "html", "bit"])
def test_a_damaged_checkpoint_is_seen_and_the_previous_one_taken(tmp_path, damage, capsys):
    shared = ["--data", "shapes:64", *TINY, "--out", tmp_path, "--max-steps"]
    assert swav_here(*shared, 2) == 0 and swav_here(*shared, 3) == 0
    path = tmp_path / "checkpoint.pt"
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    page = b"<html>not found</html>"
    path.write_bytes(
        {"half": content[: len(content) // 2], "tail": content[:-10], "empty": b"", "html": page, "bit": bytes(flipped)}[damage]
    )
    capsys.readouterr()
    assert swav_here(*shared, 4) == 0
    out = capsys.readouterr().out
    assert "checkpoint.pt is damaged" in out and "resumed at step 2 of" in out
    for name in ("checkpoint.pt", "previous_checkpoint.pt"):
        (tmp_path / name).write_bytes(b"")
    assert swav_here(*shared, 5) == 4 and "damaged" in capsys.readouterr().err  # and not silently from step 0
    assert swav_here(*shared, 1, "--fresh") == 0


def test_what_does_not_fit_the_checkpoint_is_named(tmp_path, capsys):
    shared = ["--data", "shapes:64", *TINY, "--out", tmp_path]
    assert swav_here(*shared, "--max-steps", 1) == 0
    for change, words in {
        ("--prototypes", 13): "--prototypes 13 (saved 12)",
        ("--lr", 0.5): "--lr 0.5 (saved 2)",
        ("--arch", "resnet18"): "--arch resnet18 (saved resnet10)",
        ("--data", "shapes:80"): "has data 'shapes train 64', here it is 'shapes train 80'",
    }.items():
        assert swav_here(*shared, *change) == 4
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert swav_here(*shared, "--max-steps", 2, "--workers", 1, "--log-every", 7) == 0  # these may change
    state = saved(tmp_path)
    state["method"] = "odc"
    checkpoint.save(tmp_path / "checkpoint.pt", state)
    assert swav_here(*shared) == 4 and "has method 'odc', here it is 'swav'" in capsys.readouterr().err


# ---- what the run tells


def test_report_warns_of_what_will_not_work(tmp_path, capsys):
    run = [*TINY, "--batch-size", 4, "--max-steps", 1, "--out", tmp_path]
    assert swav_here("--data", "shapes:64", *run, "--prototypes", 30) == 0
    out = capsys.readouterr().out
    assert "--prototypes 30 are more than the 4 rows" in out and "--prototypes 30 leaves 2.1 images a cluster: take 6" in out
    assert "--batch-size 4 is far from the recipe's" in out


def test_run_directory_holds_what_it_promises(tmp_path, capsys):
    tree = image_tree(tmp_path / "images", images=16, size=(20, 24))
    out = tmp_path / "run"
    small = ["--data", tree, "--recipe", "shapes", *TINY, "--epochs", 2, "--keep-every", 1, "--eval-every", 1, "--out", out]
    assert swav_here(*small) == 0
    assert json.loads((out / "done.json").read_text())["steps"] == 4
    assert json.loads((out / "config.json").read_text())["prototypes"] == 12
    assignments = np.load(out / "assignments.npz")["assignments"]
    assert assignments.shape == (1, 32) and assignments.min() >= 0 and assignments.max() < 12
    rows = (out / "assignments.csv").read_text().splitlines()
    assert rows[0] == "path,head0" and rows[1] == f"{os.path.join('n00', '0.JPEG')},{assignments[0, 0]}" and len(rows) == 33
    assert sorted(p.name for p in out.glob("backbone*.pt")) == ["backbone.pt", "backbone_1.pt", "backbone_2.pt"]
    assert len([r for r in metrics(out) if "knn_top1" in r]) == 3  # before, and after each epoch
    assert [r["nmi_to_previous"] is None for r in metrics(out) if "nmi_to_previous" in r] == [True, False]
    figures = {
        "loss",
        "loss_per_ln_k",
        "lr",
        "clusters_used",
        "assignment_entropy",
        "feature_std",
        "images_per_s",
        "data_wait",
        "memory_gb",
    }
    assert all(figures <= r.keys() for r in metrics(out) if "loss" in r)
    capsys.readouterr()
    assert swav_here(*small) == 0 and "resumed at step 4 of 4" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path, capsys, monkeypatch):
    run = ["--data", "shapes:64", *TINY, "--out", tmp_path]
    assert swav_here(*run, "--max-steps", 2) == 0
    monkeypatch.setattr(swav, "prediction_loss", lambda scores, codes, temperature: scores.sum() * float("nan"))
    assert swav_here(*run, "--save-every", 0) == 5
    error = capsys.readouterr().err
    assert "not finite at step 3" in error and "the last good checkpoint is" in error and "checkpoint.pt" in error
    assert saved(tmp_path)["step"] == 2 and all(w.isfinite().all() for w in saved(tmp_path)["model"].values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path, capsys, monkeypatch):
    run = ["--data", "shapes:64", *TINY, "--out", tmp_path]
    assert swav_here(*run, "--max-steps", 2) == 0
    loss = swav.prediction_loss

    def infinite_gradient(scores, codes, temperature):
        scores.register_hook(lambda gradient: gradient * float("inf"))
        return loss(scores, codes, temperature)

    monkeypatch.setattr(swav, "prediction_loss", infinite_gradient)
    assert swav_here(*run, "--max-steps", 3) == 5  # the loss of this step was finite
    assert "not finite at step 4 or shortly before; the last good checkpoint is" in capsys.readouterr().err
    assert saved(tmp_path)["step"] == 2


def test_a_full_disk_is_said_and_survived(tmp_path, capsys):
    run = ["--data", "shapes:64", *TINY, "--out", tmp_path]
    assert swav_here(*run, "--max-steps", 2) == 0
    before = [(tmp_path / name).read_bytes() for name in ("checkpoint.pt", "backbone.pt")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # a file that grows further fails like a full disk
    try:
        capsys.readouterr()
        assert swav_here(*run, "--max-steps", 6, "--save-every", 0) == 4
        out, err = capsys.readouterr()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"warning: cannot write to {tmp_path}: " in out and "the training goes on" in out and "step 6/" in out
    assert err.count("\n") == 1 and "the end of the run is not saved" in err
    assert [(tmp_path / name).read_bytes() for name in ("checkpoint.pt", "backbone.pt")] == before
    assert not list(tmp_path.glob("*.partial")) and not (tmp_path / "previous_checkpoint.pt").exists()
    assert swav_here(*run, "--max-steps", 6) == 0 and "resumed at step 2 of" in capsys.readouterr().out


def test_log_lines_wait_for_room_on_the_disk(tmp_path, monkeypatch):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 3, "--out", tmp_path]
    log, step = tmp_path / "metrics.jsonl", Run.log

    def full_for_a_while(run, *arguments, **figures):
        if run.step == 3:
            log.rename(tmp_path / "aside")
            log.symlink_to("/dev/full")
        if run.step == 7:
            log.unlink()
            (tmp_path / "aside").rename(log)
        step(run, *arguments, **figures)

    monkeypatch.setattr(Run, "log", full_for_a_while)
    assert swav_here(*shared) == 0
    assert [record["step"] for record in metrics(tmp_path) if "loss" in record] == list(range(1, 13))


def test_a_constant_encoder_is_called_collapsed_once(tmp_path, capsys, monkeypatch):
    def constant(self, crops, autocast=None):
        z = torch.nn.functional.normalize(self.prototypes.weight[:1] * 0 + 1)
        z = z.expand(sum(len(group) for group in crops), -1)
        return z + 0 * self.projection_head[3].bias.sum(), self.prototypes(z)

    monkeypatch.setattr(swav.Model, "forward", constant)
    assert swav_here("--data", "shapes:64", *TINY, "--max-steps", COLLAPSED_STEPS + 20, "--out", tmp_path, "--epochs", 100) == 0
    out = capsys.readouterr().out
    assert out.count("collapsed:") == 1 and "--epsilon 0.03" in out


# ---- bad input: one line, the exit code, no hang


def test_errors_of_arguments(tmp_path, capsys):
    tree = image_tree(tmp_path / "tree", splits=("train",), images=20)
    for arguments, words in {
        ("--recipe", "nope"): "--recipe nope: choose one of swav_800ep",
        ("--no-such-option",): "unrecognized arguments: --no-such-option",
        ("--warmup-epochs", "70"): "--warmup-epochs 70 is longer than the run",
        ("--batch-size", "0"): "--batch-size 0",
        ("--crops", "2", "6"): "one number, one size and two scales",
        ("--scales", "0.5", "0.1"): "--scales 0.5 0.1",
        ("--lr", "-1"): "--lr -1",
        ("--data", str(tmp_path), "--device", "cpu"): "take --recipe small",
        ("--eval-every", "1", "--data", str(tree), "--recipe", "shapes", *TINY): "no val split: name some with --val",
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
    for name, words in {
        "missing": "does not exist",
        "empty": "holds no images",
        "few/train/n00/0.JPEG": "is not a list of images",
        "list.txt": "line 2",
        "few": "4 images, fewer than one batch: --batch-size 16",
        "bad": "more than --max-bad 10",
    }.items():
        assert swav_here("--data", tmp_path / name, "--recipe", "shapes", *TINY, "--out", tmp_path / "run") == 3, name
        error = capsys.readouterr().err
        assert error.startswith("error: ") and words in error and error.count("\n") == 1, error
    assert "n00" in (tmp_path / "run" / "bad_images.txt").read_text()


def test_unreadable_images_are_named_once_also_after_a_resume(tmp_path):
    tree = image_tree(tmp_path / "images", images=16, size=(20, 20), splits=("train",))
    for name in ("n00/3.JPEG", "n01/7.JPEG"):
        (tree / "train" / name).write_text("no image")
    run = ["--data", tree, "--recipe", "shapes", *TINY, "--epochs", 3, "--out", tmp_path / "run", "--max-steps"]
    assert swav_here(*run, 2) == 0 and swav_here(*run, 6) == 0
    (tmp_path / "run" / "checkpoint.pt").unlink()
    (tmp_path / "run" / "previous_checkpoint.pt").unlink()
    assert swav_here(*run, 2) == 0  # from the start, in the same directory
    assert (tmp_path / "run" / "bad_images.txt").read_text() == "n00/3.JPEG\nn01/7.JPEG\n"


def test_a_loader_worker_that_is_killed_is_said_by_its_own_rank(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 5000, "--out", tmp_path, "--save-every", 0, "--workers", 1]
    run = start(*command(*shared, ranks=2))
    for line in run.stdout:
        if "step 20/" in line:
            break
    ranks = children(run.pid)
    os.kill(children(max(ranks))[-1], signal.SIGKILL)
    _, err = run.communicate(timeout=120)
    assert run.returncode == 1 and err.count("error: a loader worker died, out of memory? lower --workers") == 1, err
    assert "[rank" not in err  # no traceback
    assert saved(tmp_path)["step"] >= 19


def test_torchrun_says_an_error_once_and_does_not_hang(tmp_path):
    started = time.monotonic()
    code, _, err = swav_ranks(2, "--batch-size", 15, "--out", tmp_path)
    assert code == 1 and err.count("error: --batch-size 15 is not divisible by the 2 processes") == 1
    assert time.monotonic() - started < 60


def test_a_second_run_on_one_directory_is_refused(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--epochs", 5000, "--out", tmp_path]
    first = start(*command(*shared))
    try:
        for line in first.stdout:
            if "step 1/" in line:
                break
        code, _, err = finish(start(*command(*shared)))
        assert code == 2 and f"is in use by another run (process {first.pid} on" in err
    finally:
        first.kill()
        first.wait()


# ---- options and recipes


def test_every_option_is_read_somewhere():
    source = "".join((ROOT / name).read_text() for name in ("swav.py", "common/run.py", "common/config.py", "common/checkpoint.py"))
    for f in fields(swav.Config):
        assert re.search(rf"\b(config|c)\.{f.name}\b|\"{f.name}\"", source), f.name


def test_published_recipes():
    def get(name):
        return recipe(swav.Config, swav.RECIPES, name)

    big = get("swav_800ep")
    assert (big.epochs, big.batch_size, big.lr, big.final_lr, big.warmup_epochs, big.start_lr) == (800, 4096, 4.8, 0.0048, 10, 0.3)
    assert (big.queue_length, big.freeze_prototypes_iters, big.prototypes, big.temperature, big.epsilon) == (0, 313, 3000, 0.1, 0.05)
    assert (big.crops, big.sizes, big.scales, big.weight_decay) == ((2, 6), (224, 96), (0.14, 1.0, 0.05, 0.14), 1e-6)
    small = get("swav_200ep_bs256")
    assert (small.epochs, small.batch_size, small.lr, small.final_lr, small.warmup_epochs) == (200, 256, 0.6, 0.0006, 0)
    assert (small.queue_length, small.queue_start_epoch, small.freeze_prototypes_iters) == (3840, 15, 5005)
    two = get("swav_400ep_2x224")
    assert (two.crops, two.sizes, two.scales, two.batch_size, two.epochs) == ((2,), (224,), (0.08, 1.0), 4096, 400)
    w2, w4, w5 = get("swav_rn50w2"), get("swav_rn50w4"), get("swav_rn50w5")
    assert [(w.width, w.hidden, w.batch_size, w.queue_length) for w in (w2, w4, w5)] == [
        (2, 8192, 4096, 0), (4, 8192, 2560, 2560), (5, 10240, 1536, 1536)]  # fmt: skip
    assert all(w.crops == (2, 4) and w.epochs == 400 and w.lr == 4.8 for w in (w2, w4, w5))
    assert w4.scales == (0.08, 1.0, 0.08, 0.14) and (w5.final_lr, w5.start_lr) == (0.0, 0.1875)
    results = {"swav_800ep": 75.3, "swav_400ep": 74.6, "swav_200ep": 73.9, "swav_100ep": 72.1, "swav_400ep_2x224": 70.1}
    results |= {"swav_400ep_bs256": 74.3, "swav_200ep_bs256": 72.7, "swav_400ep_8x32": 74.3}
    results |= {"swav_rn50w2": 77.3, "swav_rn50w4": 77.9, "swav_rn50w5": 78.5}
    for name, value in results.items():
        assert swav.RECIPES[name][0].startswith(str(value)), name
        get(name)


def test_learning_rates_follow_the_batch_size_unless_given():
    def get(*arguments):
        return parse(swav.Config, swav.RECIPES, "swav_400ep_8x32", "", ["--recipe", "swav_100ep", *arguments])

    half = get("--batch-size", "2048")
    assert (half.lr, half.final_lr, half.start_lr) == pytest.approx((2.4, 0.0024, 0.15))
    given = get("--batch-size", "2048", "--lr", "1.2")
    assert (given.lr, given.final_lr, given.start_lr) == pytest.approx((1.2, 0.0012, 0.075))
    assert get("--batch-size", "2048", "--final-lr", "0").final_lr == 0


def test_list_recipes_and_help_are_readable(capsys):
    assert swav_here("--list-recipes") == 0
    out = capsys.readouterr().out
    assert "swav_800ep               75.3" in out and "--batch-size 4096" in out
    assert swav_here("--help") == 0
    out = capsys.readouterr().out
    assert "multi-crop:" in out and "(default: 3000)" in out and max(map(len, out.splitlines())) < 140
