"""Sets too large for a table with an entry an image: the order of an epoch, a run that keeps no clusters."""

import json

import numpy as np
import pytest
import torch
from evaluations import run_here as evaluate
from helpers import TINY, losses, metrics, run_here, same, saved, swav_here
from scipy.stats import chisquare

import deepclusterv2
import eval_cluster
import eval_knn
from common import data
from common.data import Permutation
from common.engine import run as engine


def test_every_number_comes_once():
    for n in range(1, 3001):
        assert (np.sort(Permutation(n, (7, n))[:]) == np.arange(n)).all(), n


@pytest.mark.parametrize("n", [2**24 + 1, 10**8, 2**33, 2**33 - 1])
def test_a_slice_of_a_large_order_is_random_and_repeats_nothing(n):
    order = Permutation(n, (0, 3))
    slices = (slice(start, start + 100_000) for start in (0, n // 2, n - 100_000))
    found = np.concatenate([order[places] for places in slices])
    assert len(np.unique(found)) == len(found) and 0 <= found.min() and found.max() < n
    assert (order[12_345 : 12_355] == found[12_345 : 12_355]).all()  # whatever else is asked for
    for bins in (found * 64 // n, found % 64, np.diff(found) % 64):
        assert chisquare(np.bincount(bins, minlength=64)).pvalue > 1e-4


def test_a_place_has_another_image_in_every_epoch_and_with_every_seed():
    n = 10**8
    for keys in ([(0, epoch) for epoch in range(3000)], [(seed, 0) for seed in range(3000)]):
        found = np.concatenate([Permutation(n, key)[5:6] for key in keys])
        assert chisquare(np.bincount(found * 30 // n, minlength=30)).pvalue > 1e-4


def test_the_order_of_a_large_set_is_computed_and_that_of_a_small_one_is_as_it_was():
    large, small = data.batches(2**24 + 1, 4, 3, 7, 0, 1), data.batches(1000, 4, 3, 7, 0, 1)
    assert isinstance(large.order, Permutation)
    assert [index for _, index in large[10]] == Permutation(2**24 + 1, (7, 3))[40:44].tolist()
    table = np.random.default_rng((7, 3)).permutation(1000)
    assert [index for _, index in small[10]] == table[40:44].tolist()
    halves = [data.batches(2**24 + 1, 4, 3, 7, rank, 2)[10] for rank in (0, 1)]
    assert halves[0] + halves[1] == large[10]


RUN = ["--data", "shapes:64", "--recipe", "shapes", *TINY, "--epochs", 2]


def entries(content):
    """The numbers of entries of all tensors in nested dicts."""
    if isinstance(content, dict):
        return [n for value in content.values() for n in entries(value)]
    return [content.numel()] if isinstance(content, torch.Tensor) else []


def test_a_run_that_keeps_no_clusters_learns_the_same_and_says_so(tmp_path, capsys):
    on, off = tmp_path / "on", tmp_path / "off"
    assert swav_here(*RUN, "--out", on) == 0 and "clusters in" in capsys.readouterr().out
    assert swav_here(*RUN, "--out", off, "--assignments", "off", "--max-steps", 5) == 0
    said = capsys.readouterr().out
    assert "no image's cluster is kept" in said and "epoch 1 done\n" in said
    assert swav_here(*RUN, "--out", off, "--assignments", "off") == 0
    assert "clusters in" not in capsys.readouterr().out
    assert losses(on) == losses(off) and same(saved(on)["model"], saved(off)["model"])
    assert 64 in entries(saved(on)["meter"]) and 0 in entries(saved(off)["meter"])
    assert max(entries(saved(off)["meter"])) == 12  # the histogram: no entry an image
    ends = [(r["epoch_clusters_used"], r["nmi_to_previous"]) for r in metrics(off) if "nmi_to_previous" in r]
    assert ends == [(None, None)] * 2
    assert [r["clusters_used"] for r in metrics(on) if "loss" in r] \
        == [r["clusters_used"] for r in metrics(off) if "loss" in r]
    assert not (off / "assignments.npz").exists() and not (off / "assignments.csv").exists()
    assert evaluate(eval_cluster, off, "--training") == 3
    err = capsys.readouterr().err
    assert "none with --assignments off" in err and err.count("\n") == 1
    assert evaluate(eval_knn, off) == 0


def test_many_images_keep_no_clusters_unless_asked_to(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "MANY", 63)
    assert swav_here(*RUN, "--out", tmp_path / "auto", "--max-steps", 1) == 0
    assert "no image's cluster is kept: --assignments on keeps them" in capsys.readouterr().out
    assert swav_here(*RUN, "--out", tmp_path / "on", "--max-steps", 1, "--assignments", "on") == 0
    assert "no image's cluster" not in capsys.readouterr().out
    assert swav_here(*RUN, "--out", tmp_path / "on", "--assignments", "off") == 4
    assert "--assignments off (saved on)" in capsys.readouterr().err


def test_a_method_that_clusters_the_data_set_keeps_its_clusters(tmp_path, capsys, monkeypatch):
    assert run_here(deepclusterv2, "--data", "shapes:64", "--recipe", "shapes", "--assignments", "off") == 2
    assert "--assignments" in capsys.readouterr().err
    monkeypatch.setattr(engine, "MANY", 63)
    small = ["--data", "shapes:64", "--recipe", "shapes", *TINY, "--epochs", 1, "--out", tmp_path]
    assert run_here(deepclusterv2, *small) == 0 and (tmp_path / "assignments.csv").exists()
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])["epoch_clusters_used"] > 0
