"""What a GPU is asked to do, on one that is not there: nothing that CUDA refuses, no wait in a step, few
launches."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from evaluations import CPU, colour_tree, evaluate, export
from helpers import ranks, run_here
from pretend_gpu import Refused, pretend_gpu, unwrap

import deepcluster
import deepclusterv2
import eval_cluster
import eval_knn
import eval_linear
import eval_semisup
import odc
import sela
import selav2
import swav
from benchmarks import step as benchmark
from common import data
from common.engine.options import recipe
from common.engine.run import Run
from common.features import extract
from common.optim import LARC
from common.resnet import resnet10

STEPS = 3
TINY = "--data shapes:96 --arch resnet10 --width 0.125 --crops 2 2 --sizes 24 16 --scales 0.4 1 0.2 0.4 "
TINY += "--blur-p 0.5 --prototypes 12 --batch-size 16 --workers 0 --precision float32 --device cuda "
TINY = f"{TINY} --max-steps {STEPS} --log-every {STEPS}".split()
HEAD = "--hidden 16 --dim 8".split()
METHODS = {swav: [*HEAD, *"--warmup-epochs 0 --queue-length 32 --queue-start-epoch 0".split()],
           deepclusterv2: HEAD, selav2: HEAD, deepcluster: ["--pca-dim", 8], odc: HEAD, sela: []}
BETWEEN = {"elsewhere", "log", "save", "relabel", "repair"}  # where the host may wait
PHOTOMETRIC, LAUNCHES_OF_LARC = 250, 120  # at most, a step


def named(gpu, owner, attribute, phase):
    """Patches a function such that what it does counts as that phase. phase(*arguments) may choose it."""
    real = getattr(owner, attribute)

    def counted(*args, **kwargs):
        with gpu.phase(phase(*args) if callable(phase) else phase):
            return real(*args, **kwargs)

    return mock.patch.object(owner, attribute, counted)


def log_or_step(run, *unused):
    return "step" if (run.step + 1) % run.config.log_every else "log"


@contextlib.contextmanager
def gpu_for(method, allowed=BETWEEN):
    """A pretended GPU that tells apart what a step of the method does."""
    with pretend_gpu(allowed) as gpu, contextlib.ExitStack() as stack:
        parts = [(method, "train_one_epoch", "step"), (method, "to_device", "photometric"),
                 (method.Model, "forward", "forward"), (method, "prediction_loss", "loss"),
                 (torch.optim.SGD, "step", "optimizer"), (LARC, "step", "optimizer"),
                 (Run, "log", log_or_step), (Run, "save", "save")]
        parts += {swav: [(swav, "assign", "assign"), (swav.Queue, "push", "memory")],
                  deepclusterv2: [(deepclusterv2.Memory, "update", "memory")],
                  selav2: [(selav2.Memory, "update", "memory")],
                  deepcluster: [(deepcluster, "uniform_order", "elsewhere")],  # once an epoch
                  odc: [(odc.Memory, "update", "memory"), (odc.Memory, "repair", "repair")],
                  sela: [(sela, "relabel", "relabel")]}[method]
        for part in parts:
            stack.enter_context(named(gpu, *part))
        yield gpu


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
def test_a_step_never_waits_for_the_gpu(method, tmp_path):
    with gpu_for(method) as gpu:
        assert run_here(method, *TINY, *METHODS[method], "--out", tmp_path) == 0
    assert (tmp_path / "checkpoint.pt").exists() and gpu.of(gpu.launches, "forward") > 100
    assert gpu.of(gpu.waits, "repair") == (STEPS if method is odc else 0)  # ODC: are there small clusters?
    passes = STEPS + 96 // 16 * hasattr(method, "fill")  # of the memory, before the first epoch
    assert gpu.of(gpu.launches, "photometric") <= PHOTOMETRIC * passes
    assert gpu.of(gpu.copies, "photometric") <= 8 * passes


def test_larc_moves_a_resnet_in_few_launches():
    config = recipe(swav.Config, swav.RECIPES, "swav_400ep_8x32")
    with pretend_gpu() as gpu:
        model = swav.Model(replace(config, width=0.125)).to("cuda", memory_format=torch.channels_last)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer = LARC(model.parameters(), 0.1)
        optimizer.step()  # makes the momentum
        with gpu.phase("optimizer"):
            optimizer.step()
    assert len(list(model.parameters())) == 166
    assert 0 < gpu.of(gpu.launches, "optimizer") <= LAUNCHES_OF_LARC and not gpu.of(gpu.waits, "optimizer")


def collectives():
    """How many messages the assignment of two crops takes, and the loss of three heads."""
    counts, config = [], recipe(swav.Config, swav.RECIPES, "shapes")
    scores, targets = torch.rand(2, 4, 5), torch.zeros(3, 4, dtype=torch.int64)
    work = [lambda: swav.assign(scores, swav.Queue(0, 2, 3), None, config.epsilon, 3)]
    work += [lambda script=script: script.prediction_loss([scores] * 3, targets, 0.1)
             for script in (deepclusterv2, selav2, sela)]
    for part in work:
        with mock.patch.object(dist, "all_gather", wraps=dist.all_gather) as gathers, \
                mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sums:
            part()
        counts.append((gathers.call_count, sums.call_count))
    return counts


def test_messages_do_not_grow_with_crops_or_heads():
    assert ranks(2, collectives) == [[(3, 0), (0, 1), (0, 1), (0, 1)]] * 2


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    """A trunk, and images of three colours."""
    root = tmp_path_factory.mktemp("colours")
    return export(root / "backbone.pt"), colour_tree(root / "images", train=(9, 9, 9), val=(4, 4, 4))


@pytest.mark.parametrize("script, options", [
    (eval_knn, "--k 1 5 --batch-size 8"), (eval_linear, "--epochs 1 --batch-size 8"),
    (eval_linear, "--epochs 1 --batch-size 8 --cache"), (eval_cluster, "--kmeans 3"),
    (eval_semisup, "--epochs 1 --batch-size 8 --fraction 1 --lr 0.01 --head 1")])
def test_evaluations_ask_for_nothing_that_cuda_refuses(colours, capsys, monkeypatch, script, options):
    backbone, images = colours
    monkeypatch.chdir(backbone.parent)
    command = (script, backbone, "--data", images, *options.split(), *CPU)
    on_cpu, _ = evaluate(capsys, *command)
    with pretend_gpu() as gpu:
        on_gpu, _ = evaluate(capsys, *command, "--device", "cuda")
    assert on_gpu == on_cpu and gpu.of(gpu.launches, "elsewhere") > 100


def test_features_wait_once_a_pass_for_batches_of_one_size():
    """cuDNN tunes its kernels for each size of a batch."""
    images, trunk = data.open_images("shapes:11", "train"), resnet10(width=0.125, stem="small")
    seen = []
    trunk.register_forward_hook(lambda module, x, y: seen.append(len(x[0])))
    found, waits = [], []
    for device, batch_size in (("cpu", 4), ("cuda", 4), ("cuda", 11), ("cuda", 256)):
        with pretend_gpu() as gpu, gpu.phase("features"):
            device = torch.device(device)
            rows, _ = extract(trunk.to(device), images, 24, 20, device, batch_size=batch_size)
        waits += [place for (phase, _, place), n in gpu.waits.items() if n > 1 and "features.py" in place]
        found.append(unwrap(rows))
    assert seen == [4, 4, 3, *[4] * 3, 11, 11] and not waits
    for rows in found[1:]:
        torch.testing.assert_close(rows, found[0], rtol=0, atol=1e-6)


def test_the_benchmark_of_a_step_runs_there():
    config = replace(recipe(swav.Config, swav.RECIPES, "shapes"), width=0.125, batch_size=8, queue_length=16,
                     precision="float32")
    args = SimpleNamespace(rounds=1, steps=1)
    with pretend_gpu():
        device = torch.device("cuda", 0)
        figures = benchmark.eager(config, benchmark.Synthetic(config, device), args)
        figures |= benchmark.kernels(device, args, rows=100, K=5, D=8)
    parts = {f"{part}, share of our step" for part in ("photometric", "LARC", "Sinkhorn")}
    assert figures.keys() > parts and all(figures[name] > 0 for name in ("ours, images/s", *parts))


# ---- the pretended GPU itself


def test_what_cuda_refuses_is_refused():
    with pretend_gpu():
        x, index = torch.rand(3, 4, device="cuda"), torch.tensor([0, 1])
        for wrong in (lambda: x + torch.rand(3, 4), lambda: torch.cat([x, torch.rand(1, 4)]),
                      lambda: x.normal_(generator=torch.Generator()),
                      lambda: torch.rand(3)[index.to("cuda")]):
            with pytest.raises(Refused):
                wrong()
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()
        assert x.device == torch.device("cuda", 0) and (x * 2 + 1).is_cuda and x.cpu().device.type == "cpu"


def test_what_waits_for_the_gpu_is_refused_with_file_and_line():
    with pretend_gpu(allowed={"log"}) as gpu:
        x = torch.arange(6).pin_memory().to("cuda", non_blocking=True)
        with gpu.phase("log"):
            assert x.sum().item() == 15 and x.tolist() == [*range(6)]
        for wrong in (lambda: x.sum().item(), lambda: x.tolist(), lambda: x.cpu(), lambda: x.nonzero(),
                      lambda: x[x > 2], lambda: torch.bincount(x), lambda: bool(x.any()),
                      lambda: torch.arange(6).to("cuda"), lambda: torch.tensor([1], device="cuda"),
                      lambda: x[torch.tensor([0, 2])]):
            with pytest.raises(Refused, match=r"waits for the GPU: .* at tests/test_gpu.py:\d+ in elsewhere"):
                wrong()
        before = gpu.waits.copy()
        x[x > 2] = 0  # a number: no wait
        assert gpu.waits == before and x.inner.tolist() == [0, 1, 2, 0, 0, 0]
