"""LARC and the learning-rate schedule, and the sizes of the trunks."""

import io
import math

import pytest
import torch

from common.optim import LARC, warmup_cosine
from common.resnet import ARCHITECTURES


def parameter(*values):
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float64))


def step(optimizer, *gradients):
    params = optimizer.param_groups[0]["params"]
    for p, g in zip(params, gradients):
        p.grad = None if g is None else torch.tensor(g, dtype=p.dtype)
    optimizer.step()


# ---- LARC


def test_worked_step():
    p = parameter(3, 4)
    step(LARC([p], lr=4.8, weight_decay=0.1), [0, 1])
    torch.testing.assert_close(p.detach(), torch.tensor([2.9952, 3.9776]).double(), rtol=0, atol=1e-6)


def test_a_parameter_of_zero_norm_takes_a_plain_step():
    p = parameter(0, 0)
    step(LARC([p], lr=0.5, weight_decay=0.1), [2, -4])
    assert p.tolist() == [-1, 2]


def test_a_gradient_of_zero_norm_does_not_decay():
    p = parameter(3, 4)
    step(LARC([p], lr=0.5, weight_decay=0.1), [0, 0])
    assert p.tolist() == [3, 4]


def test_a_parameter_without_gradient_is_left_alone_until_it_has_one():
    p, frozen = parameter(3, 4), parameter(1, 2)
    optimizer = LARC([p, frozen], lr=4.8, weight_decay=0.1)
    step(optimizer, [0, 1], None)
    assert frozen.tolist() == [1, 2] and frozen not in optimizer.state and p.tolist() != [3, 4]
    step(optimizer, [0, 0], [0, 1])
    fresh = parameter(1, 2)
    step(LARC([fresh], lr=4.8, weight_decay=0.1), [0, 1])
    assert torch.equal(frozen, fresh)


def test_momentum_carries_gradients_and_not_the_learning_rate():
    p = parameter(3, 4)
    optimizer = LARC([p], lr=2.0, momentum=0.9)
    step(optimizer, [0, 1])
    moved = p.detach() - torch.tensor([3.0, 4.0])
    before = p.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.1
    step(optimizer, [0, 0])
    torch.testing.assert_close(p.detach() - before, moved / 2.0 * 0.9 * 0.1, rtol=0, atol=1e-15)


def test_a_step_does_not_depend_on_the_scale_of_the_gradient():
    small, large = parameter(3, 4), parameter(3, 4)
    step(LARC([small], lr=1.0), [1, 2])
    step(LARC([large], lr=1.0), [1000, 2000])
    torch.testing.assert_close(small, large, rtol=0, atol=1e-10)
    assert (small - parameter(3, 4)).norm().item() == pytest.approx(0.001 * 5, rel=1e-6)


def test_groups_have_their_own_settings():
    p, q = parameter(3, 4), parameter(3, 4)
    optimizer = LARC([{"params": [p], "lr": 4.8, "weight_decay": 0.1}, {"params": [q], "lr": 0.0}], lr=1.0)
    p.grad = q.grad = torch.tensor([0, 1.0]).double()
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.tensor([2.9952, 3.9776]).double(), rtol=0, atol=1e-6)
    assert q.tolist() == [3, 4]


def test_a_saved_state_goes_on_with_the_same_bits():
    def run(optimizer, steps):
        for i in steps:
            for j, p in enumerate(optimizer.param_groups[0]["params"]):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * i + j))
            optimizer.step()

    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 3, generator=generator)), torch.nn.Parameter(torch.zeros(5))]
    optimizer = LARC(params, lr=3.0, weight_decay=1e-3)
    run(optimizer, range(3))
    copies, file = [torch.nn.Parameter(p.detach().clone()) for p in params], io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    resumed = LARC(copies, lr=99.0, momentum=0.5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(optimizer, range(3, 6))
    run(resumed, range(3, 6))
    assert all(torch.equal(p, q) for p, q in zip(params, copies))


def test_closure_is_run_with_gradients():
    p = parameter(3, 4)

    def closure():
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert LARC([p], lr=1.0).step(closure).item() == 25 and p.tolist() != [3, 4]


@pytest.mark.parametrize("wrong",
                         [{"lr": -1}, {"momentum": 1.0}, {"momentum": -0.1}, {"weight_decay": -1e-6}])
def test_impossible_settings_are_refused(wrong):
    with pytest.raises(ValueError, match="LARC needs"):
        LARC([parameter(1)], **{"lr": 0.1, **wrong})


# ---- schedule


def test_worked_learning_rates():
    def rate(step):
        return warmup_cosine(step, 312, 100, 4.8, 0.0048, 10, 0.3)

    worked = {0: 0.3, 1: 0.3014428, 3119: 4.8, 3120: 4.8, 15600: 2.8187389, 31199: 0.00480002}
    assert {step: rate(step) for step in worked} == {step: pytest.approx(value, abs=5e-8)
                                                     for step, value in worked.items()}


def test_without_warmup_the_cosine_starts_at_once():
    rates = [warmup_cosine(step, 5, 4, 2.0, 0.5, 0, 99.0) for step in range(20)]
    assert rates[0] == 2.0 and rates[10] == pytest.approx(1.25) and rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.5 + 0.75 * (1 + math.cos(math.pi * 19 / 20)))


def test_warmup_may_last_the_whole_run():
    rates = [warmup_cosine(step, 5, 2, 2.0, 0.5, 2, 0.2) for step in range(10)]
    assert rates == pytest.approx([0.2 * (step + 1) for step in range(10)])


def test_a_warmup_of_one_step_is_its_start():
    assert [warmup_cosine(step, 1, 3, 2.0, 0.0, 1, 0.2) for step in range(3)] == pytest.approx([0.2, 2.0,
                                                                                                1.0])


# ---- trunks


@pytest.mark.parametrize("width, millions", [(1, 23.5), (2, 94), (4, 375), (5, 586)])
def test_wide_resnet50_has_the_published_number_of_parameters(width, millions):
    with torch.device("meta"):
        trunk = ARCHITECTURES["resnet50"](width=width)
    parameters = sum(p.numel() for p in trunk.parameters())
    assert parameters / 1e6 == pytest.approx(millions, abs=0.05 if width == 1 else 0.5)
    assert trunk.feature_dim == 2048 * width


@pytest.mark.parametrize("arch, expansion",
                         [("resnet10", 1), ("resnet18", 1), ("resnet34", 1), ("resnet50", 4)])
@pytest.mark.parametrize("stem, sides", [("imagenet", (32, 16, 8, 4, 2)), ("small", (64, 64, 32, 16, 8))])
@pytest.mark.parametrize("width", [0.5, 1])
def test_stages_at_64_pixels(arch, expansion, stem, sides, width):
    with torch.device("meta"):
        trunk, x = ARCHITECTURES[arch](width=width, stem=stem), torch.zeros(2, 3, 64, 64)
    channels = [int(c * width) for c in (64, 64 * expansion, 128 * expansion, 256 * expansion,
                                         512 * expansion)]
    shapes = {name: tuple(stage.shape) for name, stage in trunk.stages(x).items()}
    assert shapes == {name: (2, c, side, side) for name, c,
                      side in zip(("conv1", "layer1", "layer2", "layer3", "layer4"), channels, sides)}
    assert trunk(x).shape == (2, trunk.feature_dim) == (2, channels[-1])


def test_features_are_the_mean_of_the_last_stage():
    torch.manual_seed(0)
    trunk, x = ARCHITECTURES["resnet10"](width=0.125, in_channels=1).eval(), torch.randn(2, 1, 64, 48)
    stages = trunk.stages(x)
    torch.testing.assert_close(trunk(x), stages["layer4"].mean(dim=(2, 3)))
    torch.testing.assert_close(stages["layer1"], trunk.layer1(trunk.maxpool(stages["conv1"])))
    assert (stages["conv1"] >= 0).all()


@pytest.mark.parametrize("wrong", [{"width": 0}, {"width": -1}, {"width": 0.3}, {"stem": "tiny"}])
def test_impossible_trunks_are_refused(wrong):
    with pytest.raises(ValueError, match=r"width must give|stem is"):
        ARCHITECTURES["resnet10"](**wrong)
