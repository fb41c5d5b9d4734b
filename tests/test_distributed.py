"""Collectives, and the batch norm that sees the rows of all ranks."""

import contextlib
import copy
import os

import pytest
import torch
from helpers import free_port, ranks
from kernels import stand_ins
from torch import nn

from common import batchnorm, distributed
from common.batchnorm import SyncBatchNorm
from common.distributed import rank
from common.engine import errors
from common.engine.launch import launch
from common.resnet import resnet10

# ---- collectives


def refuse():
    raise KeyError("no such folder")


def collectives():
    r = rank()
    x = torch.tensor([r + 1.0, -10.0 * r], requires_grad=True)
    rows = torch.arange(2.0 * r).view(r, 2) + 100 * r  # 0, 1 and 2 rows
    equal = torch.arange(4.0).view(2, 2).T + 100 * r
    written, ran = torch.full((2,), r), []
    distributed.from_main(ran.append, r)
    returned = distributed.broadcast(written)
    try:
        raised = distributed.from_main(refuse)
    except KeyError as error:
        raised = error.args
    return {
        "rank": (r, distributed.world_size()),
        "sum": distributed.all_sum(x),
        "max": distributed.all_max(x),
        "x": x.detach(),
        "rows": distributed.gather_rows(rows.requires_grad_()),
        "reversed": distributed.gather_rows(torch.full((2 - r, 1), r)),  # 2, 1 and 0 rows
        "empty": distributed.gather_rows(torch.zeros(0, 5)),
        "equal": distributed.gather_rows(equal, equal=True),
        "flags": distributed.gather_rows(torch.tensor([r == 1])),
        "broadcast": written,
        "in place": returned is written,
        "ran": ran,
        "process": (distributed.from_main(os.getpid), os.getpid()),
        "arguments": distributed.from_main(divmod, 7, 4),
        "raised": raised,
    }


@pytest.fixture(scope="module")
def of_ranks():
    return ranks(3, collectives)


def test_sum_and_maximum_are_equal_on_all_ranks(of_ranks):
    assert [result["rank"] for result in of_ranks] == [(0, 3), (1, 3), (2, 3)]
    for r, result in enumerate(of_ranks):
        assert result["sum"].tolist() == [6, -30] and result["max"].tolist() == [3, 0]
        assert result["x"].tolist() == [r + 1, -10 * r]
        assert not result["sum"].requires_grad and not result["max"].requires_grad


def test_gathered_rows_are_in_rank_order_whoever_has_none(of_ranks):
    for result in of_ranks:
        assert result["rows"].tolist() == [[100, 101], [200, 201],
                                           [202, 203]] and not result["rows"].requires_grad
        assert result["reversed"].tolist() == [[0], [0], [1]] and result["reversed"].dtype == torch.int64
        assert result["empty"].shape == (0, 5)
        assert result["flags"].tolist() == [False, True, False]
        assert result["equal"].tolist() == [[0, 2], [1, 3], [100, 102], [101, 103], [200, 202], [201, 203]]


def test_broadcast_writes_the_tensor_of_rank_0(of_ranks):
    assert all(result["broadcast"].tolist() == [0, 0] and result["in place"] for result in of_ranks)


def test_from_main_runs_on_rank_0_alone_and_all_ranks_get_its_result(of_ranks):
    assert [result["ran"] for result in of_ranks] == [[0], [], []]
    main = of_ranks[0]["process"][1]
    assert [result["process"][0] for result in of_ranks] == [main] * 3
    assert len({result["process"][1] for result in of_ranks}) == 3
    assert [result["arguments"] for result in of_ranks] == [(1, 3)] * 3


def test_an_exception_on_rank_0_is_raised_on_all_ranks(of_ranks):
    assert [result["raised"] for result in of_ranks] == [("no such folder",)] * 3


def test_one_process_is_the_identity():
    x = torch.randn(3, 2, requires_grad=True)
    assert (distributed.rank(), distributed.world_size()) == (0, 1)
    for function in (distributed.all_sum, distributed.all_max, distributed.gather_rows):
        y = function(x)
        assert torch.equal(y, x) and not y.requires_grad and y.data_ptr() != x.data_ptr()
    assert distributed.broadcast(x) is x
    assert distributed.from_main(divmod, 7, 4) == (1, 3)
    with pytest.raises(KeyError, match="no such folder"):
        distributed.from_main(refuse)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_too_few_gpus_are_said_by_one_process_of_the_node(monkeypatch, capsys, local_rank):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(errors.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("RANK", str(8 + local_rank))  # the second node: rank 0 knows nothing of it
    monkeypatch.setenv("WORLD_SIZE", "10")
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(SystemExit) as stop:
        launch(distributed.start, "cuda")
    error = "error: --device cuda needs a GPU for each process: 1 for 2 on this node\n"
    assert stop.value.code == 2 and capsys.readouterr().err == (error if local_rank == 0 else "")


# ---- batch norm

SHAPES = {"1d": (11, 4), "2d": (11, 4, 3, 5)}
SPLIT = (3, 8)  # rows of each rank


def norm_of(dims, momentum=0.3, affine=True):
    module = (nn.BatchNorm1d if dims == "1d" else nn.BatchNorm2d)(4, 1e-4, momentum, affine)
    if not affine:
        return module
    with torch.no_grad():
        module.weight.copy_(torch.tensor([0.5, -1.0, 2.0, 1.5]))
        module.bias.copy_(torch.tensor([1.0, 0.0, -3.0, 0.2]))
    return module


def draw(dims, seed, mean=0.0):
    return torch.randn(SHAPES[dims], generator=torch.Generator().manual_seed(seed),
                       dtype=torch.float64) + mean


def two_steps(module, dims, dtype, mean, rows):
    result = {}
    for seed in (0, 1):
        x = draw(dims, seed, mean)[rows].to(dtype)
        x = (x.to(memory_format=torch.channels_last) if dims == "2d" else x).requires_grad_()
        y = module(x)
        assert y.stride() == x.stride()
        (y * draw(dims, 10 + seed)[rows].to(y.dtype)).sum().backward()
        result[f"y{seed}"], result[f"x grad {seed}"] = y.detach(), x.grad
    result |= {name: p.grad for name, p in module.named_parameters()}
    result |= {name: b.clone() for name, b in module.named_buffers()}
    with torch.no_grad():
        result["eval"] = module.eval()(x)
    result["after eval"] = module.running_mean.clone()
    return result


CASES = {"1d": ("1d", {}, torch.float64, 0), "2d": ("2d", {}, torch.float64, 0),
         "not affine": ("2d", {"affine": False}, torch.float64, 0),
         "mean of all batches": ("1d", {"momentum": None}, torch.float64, 0),
         "far from zero": ("2d", {}, torch.float32, 1000), "bfloat16": ("2d", {}, torch.bfloat16, 2)}


def synced_steps(kernels):
    first = sum(SPLIT[: rank()])
    rows, result = slice(first, first + SPLIT[rank()]), {}
    with stand_ins() if kernels == "native" else contextlib.nullcontext():
        for name, (dims, options, dtype, mean) in CASES.items():
            weights = torch.promote_types(dtype, torch.float32)
            module = SyncBatchNorm.convert(norm_of(dims, **options).to(weights))
            result[name] = two_steps(module, dims, dtype, mean, rows)
        if kernels == "native" and rank() == 1:
            with pytest.raises(ValueError, match="needs rows on every rank: rank 1 has none"):
                SyncBatchNorm(4)(torch.zeros(0, 4))
    return result


@pytest.fixture(scope="module", params=["plain", "native"])
def synced(request):
    """Batch norm in plain operations, and in CUDA's kernels as tests/kernels.py has them."""
    return ranks(2, synced_steps, request.param)


def check(synced, name, expected, tolerance, statistics):
    results = [result[name] for result in synced]
    for key in ("y0", "y1", "x grad 0", "x grad 1", "eval"):
        torch.testing.assert_close(torch.cat([result[key] for result in results]).double(), expected[key],
                                   rtol=0, atol=tolerance)
    for key in {"weight", "bias"} & expected.keys():
        torch.testing.assert_close(sum(result[key] for result in results).double(), expected[key], rtol=0,
                                   atol=10 * tolerance)
    for result in results:
        assert result.keys() == expected.keys()
        for key in ("running_mean", "running_var"):
            torch.testing.assert_close(result[key].double(), expected[key], rtol=statistics, atol=statistics)
        assert result["num_batches_tracked"] == 2 and torch.equal(result["after eval"],
                                                                  result["running_mean"])


@pytest.mark.parametrize("name", ["1d", "2d", "not affine", "mean of all batches"])
def test_two_ranks_of_unequal_size_equal_one_batch_norm(synced, name):
    dims, options, dtype, _ = CASES[name]
    expected = two_steps(norm_of(dims, **options).double(), dims, dtype, 0, slice(None))
    assert synced[0][name]["y0"].dtype == torch.float64
    check(synced, name, expected, 1e-12, 1e-12)


def test_float32_statistics_hold_far_from_zero(synced):
    expected = two_steps(norm_of("2d").double(), "2d", torch.float64, 1000, slice(None))
    assert synced[0]["far from zero"]["y0"].dtype == torch.float32
    check(synced, "far from zero", expected, 1e-3, 1e-4)


def test_bfloat16_maps_have_float32_statistics(synced):
    expected = two_steps(norm_of("2d").float(), "2d", torch.bfloat16, 2, slice(None))
    expected = {key: value.double() for key, value in expected.items()}
    assert synced[0]["bfloat16"]["y0"].dtype == synced[0]["bfloat16"]["x grad 0"].dtype == torch.bfloat16
    state = synced[0]["bfloat16"]
    assert state["weight"].dtype == state["running_mean"].dtype == torch.float32
    check(synced, "bfloat16", expected, 0.04, 1e-5)


def test_one_process_has_the_native_batch_norm():
    for dims in SHAPES:
        expected = two_steps(norm_of(dims), dims, torch.float32, 0, slice(None))
        result = two_steps(SyncBatchNorm.convert(norm_of(dims)), dims, torch.float32, 0, slice(None))
        assert all(torch.equal(result[key], expected[key]) for key in expected)


def test_conversion_keeps_names_parameters_and_buffers():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4),
                          nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4, momentum=0.3)))
    before = dict(model.named_parameters()) | dict(model.named_buffers())
    keys = list(model.state_dict())
    converted = SyncBatchNorm.convert(model)
    after = dict(converted.named_parameters()) | dict(converted.named_buffers())
    assert list(converted.state_dict()) == keys
    assert after.keys() == before.keys() and all(after[name] is before[name] for name in before)
    assert [type(module)
            for module in converted.modules()].count(SyncBatchNorm) == 2 and converted[2][1].momentum == 0.3


def test_one_number_a_sample_is_refused():
    with pytest.raises(ValueError, match="needs \\(B, C"):
        SyncBatchNorm(4)(torch.zeros(4))


# ---- on a GPU


@pytest.fixture
def nccl(monkeypatch):
    """A process group of one over NCCL, taken for one of many."""
    settings = dict(RANK=0, WORLD_SIZE=1, LOCAL_RANK=0, MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())
    for name, value in settings.items():
        monkeypatch.setenv(name, str(value))
    device = distributed.start("cuda")
    for module in (batchnorm, distributed):
        monkeypatch.setattr(module, "world_size", lambda: 2)
    yield device
    distributed.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("dims, layout", [("1d", torch.contiguous_format), ("2d", torch.contiguous_format),
                                          ("2d", torch.channels_last)])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_cuda_kernels_equal_one_batch_norm_and_wait_for_nothing(nccl, dims, layout, dtype, tolerance):
    x = draw(dims, 0).to(nccl, dtype).contiguous(memory_format=layout)
    grad, results = draw(dims, 1).to(nccl, dtype), []
    distributed.all_sum(x)  # NCCL has started
    for module in (norm_of(dims).to(nccl), SyncBatchNorm.convert(norm_of(dims)).to(nccl)):
        a = x.clone().requires_grad_()
        torch.cuda.set_sync_debug_mode("error" if isinstance(module, SyncBatchNorm) else "default")
        y = module(a)
        y.backward(grad)
        torch.cuda.set_sync_debug_mode("default")
        assert y.stride() == a.grad.stride() == x.stride()
        results.append([y, a.grad, *(p.grad for p in module.parameters()), *module.buffers()])
    for expected, given in zip(*results):
        torch.testing.assert_close(given, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
def test_a_trunk_compiled_over_ranks_computes_the_same_on_a_gpu(nccl):
    trunk = SyncBatchNorm.convert(resnet10(width=0.25, stem="small"))
    trunk.to(nccl, memory_format=torch.channels_last)
    x, results = torch.randn(32, 3, 32, 32, device=nccl), []
    torch._dynamo.utils.counters.clear()
    for compiled in (False, True):
        net = copy.deepcopy(trunk)
        if compiled:
            net.compile(dynamic=False)
        y = net(x)
        y.square().mean().backward()
        results.append([y.detach(), *(p.grad for p in net.parameters()), *net.buffers()])
    assert not torch._dynamo.utils.counters["graph_break"]
    for expected, given in zip(*results):
        torch.testing.assert_close(given, expected, rtol=0.02, atol=0.002)
