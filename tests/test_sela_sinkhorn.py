"""Balanced assignment of a data set: the official numbers, a float64 oracle, properties, extremes, and
several ranks against one."""

import math
import warnings

import pytest
import torch
from helpers import golden, ranks
from hypothesis import given, settings
from hypothesis import strategies as st

from common import sinkhorn as module
from common.distributed import rank
from common.sinkhorn import balanced_assignments

quick = settings(max_examples=40, deadline=None, derandomize=True)
RULES = ("marginal", "reference")


def logits(N, K, scale=1.0, bias=0.0, seed=0):
    """Classes that differ in what samples they fit, and by `bias` in how well they fit all."""
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(N, K, generator=generator) + bias * torch.randn(K, generator=generator)


def log_plan(scores, lam, log_r, log_c):
    return lam * scores.double() + log_r.double() + log_c.double()[:, None]


def oracle(scores, lam, tolerance=1e-3, iterations=2000):
    """Assignments, log_r and iterations by the rule "marginal", in logarithms and float64."""
    x, (N, K), count = lam * scores.double(), scores.shape, 0
    f = torch.zeros(K, dtype=torch.float64)
    while True:
        log_km = (x + f).log_softmax(1).logsumexp(0) + math.log(K / N)
        if log_km.expm1().abs().max() <= tolerance or count == iterations:
            return (x + f).argmax(1), f, count
        f, count = f - log_km, count + 1


def agreement(a, b):
    return (a == b).double().mean().item()


def close(actual, expected, rtol):
    """Scalings given as logarithms."""
    torch.testing.assert_close(actual.double().exp(), expected, rtol=rtol, atol=0)


# ---- numbers of the official implementation


@pytest.mark.parametrize("name",
                         ["n150_k16_l10", "n200_k10_l25", "n300_k24_l25", "n96_k7_l25", "cifar_variant"])
def test_the_published_iteration(name):
    numbers = golden(f"sela_sinkhorn_{name}")
    tolerance = 0.01 if name == "cifar_variant" else None
    for dtype, rtol in ((torch.float64, 1e-9), (torch.float32, 5e-5)):
        log_probs = numbers["softmax"].log().to(dtype)
        y, log_r, log_c, count = balanced_assignments(log_probs, int(numbers["lamb"]), tolerance,
                                                      rule="reference")
        assert torch.equal(y, numbers["labels"]) and y.dtype == torch.int64
        assert count == numbers["iterations"]
        assert log_r.dtype == log_c.dtype == dtype
        close(log_r, numbers["r"], rtol)
        close(log_c, numbers["c"], rtol)


def test_the_published_iteration_for_several_heads_from_their_features():
    numbers = golden("sela_sinkhorn_multihead")
    features = numbers["pre_features"].double()
    for head, labels in enumerate(numbers["labels"]):
        weight, bias = numbers[f"weight_{head}"].double(), numbers[f"bias_{head}"].double()
        scores = (features @ weight.T + bias).log_softmax(1)
        y, log_r, log_c, count = balanced_assignments(scores, int(numbers["lamb"]), rule="reference")
        assert torch.equal(y, labels) and count == numbers[f"iterations_{head}"]
        close(log_r, numbers[f"r_{head}"], 1e-9)
        close(log_c, numbers[f"c_{head}"], 1e-9)


def test_worked_assignment():
    rows = [(2, 0, 0), (1.5, 0.2, 0), (1.2, 0.1, 0.3), (0.9, 0.8, 0), (0.7, 0.1, 0.6), (0.5, 0.4, 0.3)]
    y, log_r, log_c, _ = balanced_assignments(torch.tensor(rows), lam=5, tolerance=1e-6)
    assert y.tolist() == [0, 0, 2, 1, 2, 1]
    torch.testing.assert_close(log_r - log_r[0], torch.tensor([0, 5.1361, 5.2685]), rtol=0, atol=1e-4)
    plan = 6 * log_plan(torch.tensor(rows), 5, log_r, log_c).exp()
    torch.testing.assert_close(plan[3], torch.tensor([0.0094, 0.9703, 0.0203]).double(), rtol=0, atol=1e-4)


# ---- against the oracle


@pytest.mark.parametrize("scale, bias", [(0.3, 0), (1, 0), (3, 0), (1, 1), (1, 5)], ids=str)
def test_float32_agrees_with_the_oracle(scale, bias):
    scores = logits(5000, 60, scale, bias)
    expected, f, count = oracle(scores, 25)
    y, log_r, _, iterations = balanced_assignments(scores)
    assert log_r.dtype == torch.float32
    assert abs(iterations - count) <= 2 and 10 < count < 400
    assert agreement(y, expected) >= 0.999
    difference = log_r.double() - f
    assert (difference - difference.mean()).abs().max() < 1e-3
    if (scale, bias) == (1, 0):
        # the default tolerance is close to the limit
        assert agreement(y, oracle(scores, 25, 1e-9)[0]) >= 0.999


@quick
@given(st.integers(1, 9), st.integers(0, 30), st.sampled_from([1.0, 10.0, 25.0]),
       st.sampled_from([0.1, 2.0, 40.0]), st.integers(0, 2**31))
def test_rows_are_exact_and_columns_within_the_tolerance(K, more, lam, scale, seed):
    scores = logits(K + more, K, scale, scale, seed).double()
    for rule in RULES:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            y, log_r, log_c, iterations = balanced_assignments(scores.log_softmax(1), lam, 1e-3, 300, rule)
        assert len(warned) == 0 or iterations == 300
        plan = log_plan(scores.log_softmax(1), lam, log_r, log_c)
        rows = torch.full((len(scores),), 1 / len(scores), dtype=torch.float64)
        torch.testing.assert_close(plan.exp().sum(1), rows, rtol=1e-9, atol=0)
        largest = plan.amax(1)
        assert (plan.gather(1, y[:, None])[:, 0] >= largest - 1e-9 * largest.abs()).all()
        if rule == "marginal" and not warned:
            assert (K * plan.exp().sum(0) - 1).abs().max() <= 1.0001e-3


def test_rounding_in_float32_does_not_keep_the_published_sum_from_falling():
    scores = logits(3000, 30, 0.5, 1).log_softmax(1)  # r leaves the range of the first base
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, *_ = balanced_assignments(scores, tolerance=1e-4, rule="reference")
    assert agreement(y, oracle(scores, 25, 1e-9)[0]) >= 0.999


# ---- ways to give the scores, and to hold them


@pytest.mark.parametrize("rule", RULES)
def test_in_place_gives_the_same(rule):
    scores = logits(500, 11, 1, 4)  # the base moves
    for dtype in (torch.float32, torch.float64):
        x = scores.to(dtype).log_softmax(1)
        kept, own = x.clone(), x.clone()
        expected = balanced_assignments(kept, 25, rule=rule)
        found = balanced_assignments(own, 25, rule=rule, in_place=True)
        assert torch.equal(kept, x) and not torch.equal(own, x)
        assert all(torch.equal(a, b) for a, b in zip(found[:3], expected[:3])) and found[3] == expected[3]


@pytest.mark.parametrize("in_place", [True, False])
def test_at_most_the_matrix_is_of_the_size_of_the_scores(in_place):
    scores = logits(200_000, 50)  # many pieces
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and result._base is None:
                sizes.append(result.numel())
            return result

    with Watch():
        balanced_assignments(scores, tolerance=0.1, in_place=in_place)
    large = [size for size in sizes if size > 3 * 2**20]
    assert len(sizes) > 300 and large == ([] if in_place else [scores.numel()])
    assert 3 * 2**20 < scores.numel() / 3


def test_log_probabilities_do_as_logits_and_a_shift_changes_nothing():
    scores = logits(400, 9).double()
    y, log_r, log_c, count = balanced_assignments(scores)
    for shift in (torch.full((400, 1), 1e4), -scores.logsumexp(1, keepdim=True)):
        other = balanced_assignments(scores + shift)
        assert torch.equal(other[0], y) and other[3] == count
        torch.testing.assert_close(other[1], log_r, rtol=0, atol=1e-9)
        torch.testing.assert_close(other[2], log_c - 25 * shift[:, 0].double(), rtol=0, atol=1e-7)


def test_low_precision_is_computed_in_float32_and_without_gradient():
    scores = logits(200, 6).bfloat16()
    expected = balanced_assignments(scores.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, log_r, log_c, _ = balanced_assignments(scores.requires_grad_())
    assert log_r.dtype == log_c.dtype == torch.float32 and not log_c.requires_grad
    assert torch.equal(y, expected[0]) and torch.equal(log_r, expected[1])


# ---- extremes


def test_scores_whose_powers_underflow():
    scores = logits(3200, 3000, 1, 2).log_softmax(1)
    # a column of zeros in float32: the reference in float32 ends with NaN
    assert ((scores.exp() ** 25).amax(0) == 0).any()
    expected, f, _ = oracle(scores, 25, 0, 8)
    with pytest.warns(UserWarning, match="not balanced after 8 iterations"):
        y, log_r, log_c, _ = balanced_assignments(scores, max_iterations=8)
    assert agreement(y, expected) >= 0.999 and log_c.isfinite().all()
    difference = log_r.double() - f
    assert f.max() - f.min() > 150 and (difference - difference.mean()).abs().max() < 1e-3


@pytest.mark.parametrize("bias, span", [(30, 2000), (300, 20_000)])
def test_what_underflows_comes_back_when_the_base_moves(monkeypatch, bias, span):
    moves, encode = [], module._encode
    monkeypatch.setattr(module, "_encode", lambda x: moves.append(len(x)) or encode(x))
    scores = logits(3000, 40, 1, bias)
    y, log_r, _, iterations = balanced_assignments(scores)
    assert len(moves) >= 4 and set(moves) == {3000}  # one piece
    expected, _, count = oracle(scores, 25)
    assert log_r.max() - log_r.min() > span and abs(iterations - count) <= 2
    assert agreement(y, expected) >= 0.999


@pytest.mark.parametrize("rule", RULES)
def test_a_class_that_no_sample_can_reach_leaves_no_nan(rule):
    scores = logits(500, 8)
    scores[:, 2] = -1e16  # less than what is held
    _, log_r, log_c, iterations = balanced_assignments(scores, rule=rule)
    assert log_r.isfinite().all() and log_c.isfinite().all() and iterations < 200


def test_logarithms_of_all_sizes_are_held_without_loss():
    floor = module.FLOOR
    for dtype in (torch.float32, torch.float64):
        x = torch.cat([-torch.logspace(-6, 7, 1000, dtype=dtype),
                       floor + torch.linspace(-1, 1, 1001).to(dtype)])
        held = module._encode(x)
        assert held.min() >= torch.finfo(torch.float32).tiny  # no denormal number
        torch.testing.assert_close(held[x >= floor], x[x >= floor].exp(), rtol=1e-5, atol=0)
        assert held[x < floor].max() <= math.exp(floor) * 1.00001
        torch.testing.assert_close(module._decode(held), x, rtol=4 * torch.finfo(dtype).eps,
                                   atol=4 * torch.finfo(dtype).eps)


def test_it_starts_where_it_ended():
    scores = logits(2000, 20)
    y, log_r, log_c, _ = balanced_assignments(scores)
    again = balanced_assignments(scores, init=log_r, tolerance=1.01e-3)
    assert again[3] == 0 and torch.equal(again[0], y)
    torch.testing.assert_close(again[2], log_c, rtol=0, atol=1e-3)
    near = scores + 0.001 * logits(2000, 20, seed=1)
    cold, warm = balanced_assignments(near, tolerance=1e-5), balanced_assignments(near, tolerance=1e-5,
                                                                                  init=log_r)
    assert warm[3] < cold[3] and agreement(warm[0], cold[0]) >= 0.999
    published = balanced_assignments(near.double(), init=log_r, rule="reference")
    assert published[3] % 10 == 1 and agreement(published[0], cold[0]) >= 0.999


def test_the_limit_of_iterations():
    scores = logits(300, 8)
    message = "not balanced after 0 iterations: the largest relative error of a class's mass is"
    with pytest.warns(UserWarning, match=message) as found:
        y, log_r, _, count = balanced_assignments(scores, max_iterations=0)
    assert found[0].filename == __file__  # it points at the caller
    assert count == 0 and log_r.eq(0).all() and torch.equal(y, scores.argmax(1))
    with pytest.warns(UserWarning,
                      match="not balanced after 12 iterations: the relative changes of c add up to"):
        assert balanced_assignments(scores, max_iterations=12, rule="reference")[3] == 12


@pytest.mark.parametrize("rule", RULES)
def test_one_class_and_as_many_classes_as_samples(rule):
    y, log_r, log_c, _ = balanced_assignments(logits(5, 1).log_softmax(1), rule=rule)
    assert y.eq(0).all() and log_c.exp().allclose(torch.full((5,), 0.2, dtype=log_c.dtype) / log_r.exp())
    y, *_ = balanced_assignments(4 * torch.eye(6)[[2, 0, 1, 5, 4, 3]], rule=rule)
    assert y.tolist() == [2, 0, 1, 5, 4, 3]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("row", [
    torch.zeros(7), 100 * torch.randn(7, generator=torch.Generator().manual_seed(0))], ids=["zero", "any"])
def test_a_head_that_collapsed_has_one_class(row, rule):
    scores = row.expand(1000, 7).log_softmax(1)
    y, log_r, log_c, iterations = balanced_assignments(scores, rule=rule)
    assert len(y.unique()) == 1 and iterations <= 11
    torch.testing.assert_close(1000 * log_plan(scores, 25, log_r, log_c).exp(),
                               torch.full((1000, 7), 1 / 7, dtype=torch.float64), rtol=1e-3, atol=0)


# ---- errors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38])
def test_scores_that_are_not_finite(value):
    scores = logits(70, 5)
    scores[41, 3] = value
    scores[55, 2] = math.nan
    with pytest.raises(ValueError, match=r"row 41 of 70 .* is not finite"):
        balanced_assignments(scores)


def test_a_class_of_probability_zero():
    probs = logits(50, 4).softmax(1)
    probs[:, 2] = 0
    with pytest.raises(ValueError, match=r"row 0 of 50 .* is not finite"):
        balanced_assignments(probs.log())


def test_arguments_that_cannot_work():
    scores = logits(10, 4)
    for message, x, options in (
        ("10 samples for 11 classes", logits(10, 11), {}),
        ("0 samples for 4 classes", scores[:0], {}),
        ("rule is .* got 'published'", scores, {"rule": "published"}),
        ("float32 or float64 scores: got torch.float16", scores.half(), {"in_place": True}),
        (r"each of 4 classes: got shape \(3,\)", scores, {"init": torch.zeros(3)}),
        ("a finite number for each", scores, {"init": torch.tensor([0, math.nan, 0, 0])}),
    ):
        with pytest.raises(ValueError, match=message):
            balanced_assignments(x, **options)


# ---- several ranks


SPLITS = {2: [(60, 60), (0, 120), (119, 1)], 3: [(50, 30, 40), (0, 117, 3), (120, 0, 0)]}


def solutions(x):
    """Of all ranks' rows; x are this rank's."""
    x = x.log_softmax(1)
    found = {rule: balanced_assignments(x, 4, rule=rule) for rule in RULES}
    found["in place"] = balanced_assignments(x.clone(), 4, in_place=True)
    found["warm"] = balanced_assignments(x, 4, 1e-6, init=found["marginal"][1])
    found["float32"] = balanced_assignments(x.float(), 4)
    return found


def solutions_of_this_rank(world_size):
    return [solutions(logits(120, 6, 1, 3).double().split(split)[rank()]) for split in SPLITS[world_size]]


@pytest.mark.parametrize("world_size", SPLITS)
def test_unequal_and_empty_ranks_equal_one_process(world_size):
    results = ranks(world_size, solutions_of_this_rank, world_size)
    expected = solutions(logits(120, 6, 1, 3).double())
    for i, split in enumerate(SPLITS[world_size]):
        for name, (y, log_r, log_c, iterations) in expected.items():
            found = [result[i][name] for result in results]
            tolerance = 1e-4 if name == "float32" else 1e-10
            assert [len(f[0]) for f in found] == [len(f[2]) for f in found] == list(split)
            assert torch.equal(torch.cat([f[0] for f in found]), y), name
            torch.testing.assert_close(torch.cat([f[2] for f in found]), log_c, rtol=0, atol=tolerance)
            for f in found:
                assert f[3] == iterations and torch.equal(f[1], found[0][1])
                torch.testing.assert_close(f[1], log_r, rtol=0, atol=tolerance)


def errors_of_this_rank():
    scores, messages = logits(10, 3), []
    if rank() == 1:
        scores[4, 0] = math.nan
    for x in (scores, logits(10, 21)):
        with pytest.raises(ValueError) as error:
            balanced_assignments(x)
        messages.append(str(error.value))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        balanced_assignments(logits(10, 3, seed=rank()), max_iterations=1)
    return messages, len(warned)


def test_errors_are_raised_on_every_rank_and_rank_0_warns():
    (first, warned), (second, silent) = ranks(2, errors_of_this_rank)
    assert first == second and (warned, silent) == (1, 0)
    assert "row 14 of 20" in first[0] and "20 samples for 21 classes" in first[1]
