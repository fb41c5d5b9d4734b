"""What becomes of the model before training: compiled, checkpointed; what float32 means on a GPU."""

from itertools import accumulate
from unittest import mock

import pytest
import torch
from helpers import TINY, ranks, run_here, same, saved, swav_here
from torch import nn

import sela
import swav
from common import distributed
from common.engine.launch import prepare
from common.engine.options import parse
from common.resnet import resnet34

# ---- float32, and the device of the process group


def test_float32_is_ieee_but_in_convolutions():
    torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = "tf32", "ieee"
    distributed.start("cpu")
    assert torch.backends.cuda.matmul.fp32_precision == "ieee" and not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_nccl_is_told_the_gpu_of_the_process(monkeypatch):
    given = {}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.setattr(distributed, "rendezvous", lambda url: iter([(None, 1, 2)]))
    monkeypatch.setattr(distributed.dist, "PrefixStore", lambda prefix, store: store)
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda _, **options: given.update(options))
    for name, value in dict(RANK=1, WORLD_SIZE=2, LOCAL_RANK=1, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, str(value))
    assert distributed.start("cuda") == given["device_id"] == torch.device("cuda", 1)
    assert distributed.start("cpu") == torch.device("cpu") and given["device_id"] is None


# ---- checkpointing


def traced(module, dynamic, compile=nn.Module.compile):
    """Module.compile, as far as the graph: what is made of it takes minutes."""
    assert dynamic is False
    compile(module, dynamic=dynamic, backend="eager")


def run(words):
    """Gradients and statistics of SwAV's network after two passes over two resolutions."""
    config = parse(swav.Config, swav.RECIPES, "", ["--recipe", "shapes", *map(str, TINY), *words])
    torch.manual_seed(0)
    model = swav.Model(config)
    with mock.patch.object(nn.Module, "compile", traced):
        net = prepare(model, config, torch.device("cpu"))
    assert model.backbone.checkpointing == config.checkpointing
    torch.manual_seed(1 + distributed.rank())
    for _ in range(2):
        crops = [torch.randn(4, 3, size, size) for size in (16, 8)]
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bfloat16"):
            _, scores = net(crops)
        (scores * torch.randn(scores.shape)).sum().backward()
    return {name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers())


def both_ways(*words):
    return run(words), run([*words, "--checkpointing"])


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointing_computes_the_same_bits_and_counts_a_batch_once(precision):
    kept, again = both_ways("--precision", precision)
    assert same(kept, again) and again["backbone.layer4.0.bn1.num_batches_tracked"] == 4


def test_checkpointing_computes_the_same_bits_on_two_ranks():
    for kept, again in ranks(2, both_ways, "--precision", "float32"):
        assert same(kept, again) and again["backbone.layer4.0.bn1.num_batches_tracked"] == 4


def test_a_run_may_go_on_with_checkpointing(tmp_path):
    shared = ["--data", "shapes:64", *TINY, "--max-steps"]
    assert swav_here(*shared, 4, "--out", tmp_path / "kept") == 0
    assert swav_here(*shared, 2, "--out", tmp_path / "again") == 0
    assert swav_here(*shared, 4, "--checkpointing", "--out", tmp_path / "again") == 0
    assert same(saved(tmp_path / "kept")["model"], saved(tmp_path / "again")["model"])


def peak_memory(checkpointing):
    """Bytes that a pass with 64 images has allocated at most."""
    net = resnet34(width=0.25, stem="small")
    net.checkpointing = checkpointing
    with torch.profiler.profile(profile_memory=True) as prof:
        net(torch.randn(64, 3, 32, 32)).sum().backward()
    changes = [event for event in prof.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(changes, key=lambda event: event.start_ns())))


def test_checkpointing_needs_less_memory():
    assert peak_memory(True) < 0.65 * peak_memory(False)


def test_checkpointing_is_refused_where_there_are_no_stages(tmp_path, capsys):
    shared = ["--data", "shapes:64", *TINY, "--checkpointing", "--out", tmp_path]
    assert swav_here(*shared, "--compile") == 2
    preact = ["--arch", "preact50", "--width", 1, "--stem", "imagenet"]
    assert run_here(sela, "--data", "shapes:64", "--checkpointing", *preact, "--out", tmp_path) == 2
    assert capsys.readouterr().err == (
        "error: --checkpointing needs a ResNet without --compile: --arch resnet10 --compile\n"
        "error: --checkpointing needs a ResNet without --compile: --arch preact50\n")


# ---- compile


def compiled():
    eager, result = run(["--precision", "float32"]), run(["--precision", "float32", "--compile"])
    breaks, frames = (torch._dynamo.utils.counters[name] for name in ("graph_break", "stats"))
    return eager, result, dict(breaks), frames["unique_graphs"]


def test_a_trunk_over_ranks_is_one_graph_a_resolution():
    for eager, result, breaks, graphs in ranks(2, compiled):
        assert same(eager, result) and (breaks, graphs) == ({}, 2)
