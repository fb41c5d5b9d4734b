"""The same numbers as the official implementations: tests/golden/ holds what those gave on seeded inputs."""

import importlib
import zlib
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import golden, ranks

import swav
from common import features, resnet
from common.distributed import rank
from common.engine.options import recipe
from common.optim import LARC, warmup_cosine
from common.sinkhorn import sinkhorn

DTYPES = (torch.float32, torch.float64)
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])


def close(actual, expected, dtype, float32, float64, rtol=0.0):
    assert actual.dtype == dtype
    tolerance = float32 if dtype == torch.float32 else float64
    torch.testing.assert_close(actual.detach().double(), expected.double(), rtol=rtol, atol=tolerance)


def of(numbers, name, dtype):
    return numbers[name + ("64" if dtype == torch.float64 else "")]


# ---- Sinkhorn


def codes_of_all_settings(name, world_size):
    numbers, result = golden(name), {}
    scores = numbers["scores" if world_size == 1 else f"scores_rank{rank()}"]
    for dtype in DTYPES:
        for epsilon in (0.05, 0.03):
            for iterations in (3, 10):
                result[dtype, epsilon, iterations] = sinkhorn(scores.to(dtype), epsilon, iterations)
    return result


def check_codes(numbers, result, where=""):
    assert len(result) == 8
    for (dtype, epsilon, iterations), codes in result.items():
        stored = "codes64" if dtype == torch.float64 else "codes"
        close(codes, numbers[f"{stored}{where}_eps{epsilon}_it{iterations}"], dtype, 3e-6, 1e-12)


@pytest.mark.parametrize("shape", ["b16_k8", "b40_k90", "b64_k24"])
def test_sinkhorn(shape):
    name = f"swav_sinkhorn_ws1_{shape}"
    check_codes(golden(name), codes_of_all_settings(name, 1))


@pytest.mark.parametrize("shape", ["b12_k10", "b32_k30"])
def test_sinkhorn_of_two_ranks(shape):
    name = f"swav_sinkhorn_ws2_{shape}"
    for r, result in enumerate(ranks(2, codes_of_all_settings, name, 2)):
        check_codes(golden(name), result, f"_rank{r}")


# ---- SwAV: assign, loss, queue


def small_model(prototypes, dtype):
    K, D = prototypes.shape
    model = swav.Model(swav.Config(arch="resnet10", width=0.125, hidden=4, dim=D, prototypes=K)).to(dtype)
    with torch.no_grad():
        model.prototypes.weight.copy_(prototypes)
    return model


@PRECISIONS
@pytest.mark.parametrize("epsilon", [0.03, 0.05])
@pytest.mark.parametrize("crops", ["c2", "c2-6"])
def test_swav_loss_without_queue(crops, epsilon, dtype):
    numbers = golden(f"swav_loss_noqueue_{crops}_eps{epsilon}")
    scores = numbers["scores"].to(dtype).requires_grad_()
    codes = swav.assign(scores[:2], swav.Queue(0, 2, 1), None, epsilon, 3)
    loss = swav.prediction_loss(scores, codes, 0.1)
    loss.backward()
    assert not codes.requires_grad
    close(codes, of(numbers, "codes", dtype), dtype, 3e-6, 1e-11)
    close(loss, of(numbers, "loss", dtype), dtype, 5e-6, 1e-11)
    close(scores.grad, of(numbers, "grad_scores", dtype), dtype, 3e-6, 1e-11)


def steps_with_queue(name, dtype):
    numbers = golden(name)
    embeddings = numbers["embeddings"][rank()].to(dtype)  # (S, V, B, D)
    memory = swav.Queue(int(numbers["queue_length_total"]), 2, embeddings.shape[-1], dtype=dtype)
    model, steps = small_model(numbers["prototypes_raw"][0], dtype), []
    for raw, stored in zip(numbers["prototypes_raw"], embeddings):
        with torch.no_grad():
            model.prototypes.weight.copy_(raw)
            model.normalize_prototypes()
            z = F.normalize(stored, dim=-1)
            scores = model.prototypes(z)
        with mock.patch.object(swav, "sinkhorn", wraps=sinkhorn) as spy:
            codes = swav.assign(scores[:2], memory, model.prototypes.weight, 0.05, 3)
        used, rows = memory.full, [len(crop) for call in spy.call_args_list for crop in call.args[0]]
        memory.push(z[:2])
        queue = torch.stack([memory.rows(0), memory.rows(1)])
        loss = swav.prediction_loss(scores, codes, 0.1)
        steps.append((used, rows, codes, loss, queue, model.prototypes.weight.detach().clone()))
    return steps


@PRECISIONS
@pytest.mark.parametrize("name", ["ws1_c2", "ws1_c2-2", "ws2_c2-1"])
def test_swav_loss_with_queue(name, dtype):
    name = f"swav_loss_queue_{name}"
    numbers = golden(name)
    results = ranks(2, steps_with_queue, name, dtype) if "ws2" in name else [steps_with_queue(name, dtype)]
    assert len(results) == len(numbers["embeddings"])
    for r, steps in enumerate(results):
        assert len(steps) == 6
        for s, (used, rows, codes, loss, queue, prototypes) in enumerate(steps):
            assert [used, used] == numbers["queue_used"][s].bool().tolist()
            assert rows == numbers["rows_in_sinkhorn"][s].tolist()
            close(prototypes, numbers["prototypes_normalized"][s], dtype, 5e-7, 5e-7)
            close(codes, of(numbers, "codes", dtype)[r, s], dtype, 3e-6, 1e-11)
            close(loss, of(numbers, "loss", dtype)[r, s], dtype, 5e-6, 1e-11)
            close(queue, numbers["queue"][r, s], dtype, 5e-7, 5e-7)


@PRECISIONS
@pytest.mark.parametrize("name", ["c2", "c2-6", "c2-2_queue"])
def test_swav_gradients(name, dtype):
    numbers = golden(f"swav_grad_{name}")
    z_raw = numbers["z_raw"].to(dtype).requires_grad_()
    model = small_model(numbers["prototypes_raw"], dtype)
    model.normalize_prototypes()
    queue = numbers.get("queue_before", torch.zeros(2, 0, z_raw.shape[-1])).to(dtype)
    memory = swav.Queue(queue.shape[1], 2, queue.shape[2], dtype=dtype)
    memory.push(queue)
    assert memory.full == ("queue_before" in numbers)
    z = F.normalize(z_raw, dim=-1)
    z.retain_grad()
    scores = model.prototypes(z)
    loss = swav.prediction_loss(scores, swav.assign(scores[:2], memory, model.prototypes.weight, 0.05, 3),
                                0.1)
    loss.backward()
    close(loss, of(numbers, "loss", dtype), dtype, 5e-6, 1e-11)
    close(z_raw.grad, of(numbers, "grad_z", dtype), dtype, 3e-6, 1e-11)
    close(z.grad, of(numbers, "grad_embedding", dtype), dtype, 3e-6, 1e-11)
    close(model.prototypes.weight.grad, of(numbers, "grad_prototypes", dtype), dtype, 3e-6, 1e-11)


# ---- optimiser


@PRECISIONS
@pytest.mark.parametrize("decay", ["0.0001", "1e-06"])
def test_larc(decay, dtype):
    numbers = golden(f"larc_wd{decay}")
    tensors = {key.removesuffix("__init"): value.to(dtype) for key, value in numbers.items()
               if key.endswith("__init")}
    assert len(tensors) == 10
    params = {name: torch.nn.Parameter(value.clone()) for name, value in tensors.items()}
    momentum, trust = numbers["momentum"].item(), numbers["trust"].item()
    optimizer = LARC(params.values(), 0.0, momentum, numbers["wd"].item(), trust_coefficient=trust)
    for step, lr in enumerate(numbers["lr"].tolist()):
        optimizer.param_groups[0]["lr"] = lr
        for name, p in params.items():
            p.grad = None if name == "no_grad" else numbers[f"{name}__grads"][step].to(dtype)
        optimizer.step()
        for name, p in params.items():
            rtol = 5e-6 if dtype == torch.float32 else 0.0
            close(p, of(numbers, f"{name}__after", dtype)[step], dtype, 1e-5, 1e-12, rtol=rtol)
            if name in ("no_grad", "zero_grad"):
                assert torch.equal(p, tensors[name])


def test_learning_rates():
    numbers = golden("lr_schedule")
    assert len(numbers["tuples"]) == 5
    for i, (epochs, warmup, iterations, base, final, start) in enumerate(numbers["tuples"].tolist()):
        expected = numbers[f"lr_{i}"].tolist()
        assert len(expected) == epochs * iterations
        steps = range(int(epochs * iterations))
        rates = [warmup_cosine(step, int(iterations), int(epochs), base, final, int(warmup),
                               start) for step in steps]
        np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-12)


# ---- ResNet-50 of SwAV


def drawn(salt, name, shape):
    return np.random.RandomState(zlib.crc32(f"{salt}|{name}".encode())).standard_normal(shape)


def weight_by_rule(salt, name, shape):
    last = name.rsplit(".", 1)[-1]
    if last == "num_batches_tracked":
        return torch.tensor(0)
    z = drawn(salt, name, shape)
    if last in ("running_mean", "bias"):
        z = 0.1 * z
    elif last == "running_var":
        z = 1 + 0.1 * np.abs(z)
    elif len(shape) == 1:
        z = 1 + 0.1 * z
    else:
        z = z * np.sqrt(2 / np.prod(shape[1:]))
    return torch.from_numpy(z).float()


def model_by_rule(salt, prototypes):
    with torch.device("meta"):
        model = swav.Model(swav.Config(hidden=2048, dim=128, prototypes=prototypes))
    state = {name: weight_by_rule(salt, name.removeprefix("backbone."),
                                  tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    return model


def embed(name, mode, dtype):
    numbers = golden(f"resnet50_{name}")
    salt = "".join(map(chr, numbers["salt_codes"].tolist()))
    model = model_by_rule(salt, int(numbers["nmb_prototypes"][0] if name == "multihead"
                                    else numbers["nmb_prototypes"]))
    sizes, B = numbers["crop_sizes"].tolist(), int(numbers["batch_size"])
    crops = [torch.from_numpy(drawn(salt, f"input:crop{i}", (B, 3, s, s))).float()
             for i, s in enumerate(sizes)]
    if "input_head" in numbers:
        assert torch.equal(crops[0].flatten()[:16], numbers["input_head"])
        probed = ["bn1.running_var", "conv1.weight", "layer1.0.conv2.weight", "layer3.0.downsample.0.weight",
                  "layer4.2.bn3.bias"]
        probed = [f"backbone.{name}" for name in probed]
        probed += ["projection_head.0.weight", "projection_head.1.weight", "projection_head.3.bias",
                   "prototypes.weight"]
        state = model.state_dict()
        assert torch.equal(torch.stack([state[name].flatten()[:4] for name in probed]),
                           numbers["param_probe"])
    groups = [torch.cat([c for c, s in zip(crops, sizes) if s == size]).to(dtype)
              for size in dict.fromkeys(sizes)]
    model.to(dtype).train(mode == "train")
    pooled = []
    model.projection_head.register_forward_pre_hook(lambda module, inputs: pooled.append(inputs[0]))
    with torch.no_grad():
        z, scores = model(groups)
    return numbers, model, salt, pooled[0], z, scores


@PRECISIONS
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("name", ["single64", "multicrop"])
def test_resnet50(name, mode, dtype):
    numbers, model, _, pooled, z, scores = embed(name, mode, dtype)
    tolerance = (5e-6, 1e-10) if mode == "eval" else (2e-3, 1e-9)
    close(z, of(numbers, f"{mode}_embedding", dtype), dtype, *tolerance)
    close(scores, of(numbers, f"{mode}_scores", dtype), dtype, *tolerance)
    summary = {"pooled64dims": pooled[:, :64], "pooled_mean": pooled.mean(1), "pooled_std": pooled.std(1)}
    for key, value in summary.items():
        expected = of(numbers, f"{mode}_{key}", dtype)
        close(value / expected.abs().max(), expected / expected.abs().max(), dtype, *tolerance)
    if mode == "train":
        state = model.state_dict() | model.backbone.state_dict()
        probes = [key for key in numbers if key.startswith("train_after__") and key.endswith(("mean", "var"))]
        assert len(probes) == 8
        for key in probes:
            close(state[key.removeprefix("train_after__")][:64], of(numbers, key, dtype), dtype, *tolerance)
        assert state["bn1.num_batches_tracked"] == numbers["train_after__num_batches_tracked"]
        tracked = numbers["train_after__head_num_batches_tracked"]
        assert state["projection_head.1.num_batches_tracked"] == tracked


@PRECISIONS
def test_resnet50_with_several_prototype_heads(dtype):
    numbers, _, salt, _, z, _ = embed("multihead", "eval", dtype)
    close(z, of(numbers, "eval_embedding", dtype), dtype, 5e-6, 1e-10)
    for head, K in enumerate(numbers["nmb_prototypes"].tolist()):
        prototypes = weight_by_rule(salt, f"prototypes.prototypes{head}.weight", (K, 128)).to(dtype)
        close(F.linear(z, prototypes), of(numbers, f"eval_scores_head{head}", dtype), dtype, 5e-6, 1e-10)


@pytest.mark.parametrize(("method", "row", "spread"), [
    ("deepcluster", "resnet50_200ep", 2 / (3 * 49)), ("deepcluster", "resnet50_sobel_200ep", 2 / (2 * 49)),
    ("odc", "odc_440ep", 2 / (3 * 49)), ("swav", "swav_400ep", 2 / (64 * 49)),
    ("sela", "resnet50_1k_strong", 2 / (64 * 49))])
def test_how_a_resnet_starts(method, row, spread):
    """OpenSelfSup's by the inputs of a filter, those of SwAV's and SeLa's authors by its outputs."""
    script = importlib.import_module(method)
    torch.manual_seed(0)
    trunk = script.Model(replace(recipe(script.Config, script.RECIPES, row), prototypes=2)).backbone
    assert trunk.conv1.weight.std().item() == pytest.approx(spread**0.5, rel=0.03)
    inputs = method in ("deepcluster", "odc")
    spread = 2 / (1024 if inputs else 512)  # of a 1 x 1 convolution, 1024 to 512
    assert trunk.layer4[0].conv1.weight.std().item() == pytest.approx(spread**0.5, rel=0.03)


@pytest.mark.parametrize("arch", ["resnet18", "resnet34", "resnet50"])
def test_weights_pass_to_torchvision_and_back(arch):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 64, 64)

    def randomised(model):
        for name, tensor in model.state_dict().items():
            if tensor.dim() == 1:  # batch norms: weight, bias and running statistics
                tensor.copy_(torch.rand_like(tensor) + 0.5 if name.endswith(("weight", "var"))
                             else torch.randn_like(tensor) / 10)
        return model.eval()

    theirs = torchvision.models.get_model(arch, weights=None)
    fc, theirs.fc = theirs.fc, torch.nn.Identity()
    for source, target in ((randomised(theirs), resnet.ARCHITECTURES[arch]().eval()),
                           (randomised(resnet.ARCHITECTURES[arch]()), theirs)):
        assert list(source.state_dict()) == list(target.state_dict())
        with torch.no_grad():
            before = target(x)
            target.load_state_dict(source.state_dict(), strict=True)
            assert torch.equal(target(x), source(x)) and not torch.allclose(before, source(x), rtol=0.1)
    assert fc.in_features == resnet.ARCHITECTURES[arch]().feature_dim


# ---- k-NN


@pytest.mark.parametrize("name", ["normalized", "unnormalized"])
def test_knn(name):
    numbers = golden(f"knn_{name}")
    bank, labels, queries, truth = (numbers[key] for key in ("train_features", "train_labels",
                                                             "test_features", "test_labels"))
    T, ks = numbers["T"].item(), numbers["k"].tolist()
    votes = features.knn_classify(bank, labels, queries, ks, T, int(numbers["num_classes"]))
    accuracy = features.knn_accuracy(bank, labels, queries, truth, ks, T)
    assert list(votes) == list(accuracy) == ks == [10, 20, 100, 200]
    for k in ks:
        expected = numbers[f"votes_k{k}"].double()
        # votes are exp((similarity - 1) / T), theirs exp(similarity / T)
        ours = votes[k].double() * np.exp(1 / T)
        largest = expected.max(dim=1, keepdim=True).values
        torch.testing.assert_close(ours / largest, expected / largest, rtol=0, atol=2e-5)
        assert torch.equal(votes[k] > 0, expected > 0)
        assert torch.equal(votes[k].argmax(dim=1), numbers[f"pred_k{k}"])
        counts = [float(share) * len(truth) / 100 for share in accuracy[k]]
        assert counts == pytest.approx([int(numbers[f"top1_count_k{k}"]),
                                        int(numbers[f"top5_count_k{k}"])], abs=1e-6)
