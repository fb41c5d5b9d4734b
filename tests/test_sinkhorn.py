"""Properties of the balanced assignment, and worked numbers."""

import pytest
import torch
from helpers import ranks
from hypothesis import given, settings
from hypothesis import strategies as st

import swav
from common.distributed import rank
from common.sinkhorn import sinkhorn

quick = settings(max_examples=60, deadline=None, derandomize=True)
sizes = st.integers(1, 12)
seeds = st.integers(0, 2**31)


def cosines(B, K, seed, magnitude=1.0):
    return magnitude * (2 * torch.rand(B, K, generator=torch.Generator().manual_seed(seed),
                                       dtype=torch.float64) - 1)


def waves(B, K, shift=0.0):
    b, k = torch.arange(B).double()[:, None], torch.arange(K).double()
    return torch.cos(0.7 * b + 1.3 * k + shift)


@quick
@given(sizes, sizes, seeds, st.sampled_from([1e-4, 0.05, 1.0]), st.sampled_from([1.0, 100.0]),
       st.integers(0, 5))
def test_codes_are_finite_and_their_rows_sum_to_one(B, K, seed, epsilon, magnitude, iterations):
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        codes = sinkhorn(cosines(B, K, seed, magnitude).to(dtype), epsilon, iterations)
        assert codes.dtype == dtype and codes.shape == (B, K)
        assert codes.isfinite().all() and (codes >= 0).all()
        torch.testing.assert_close(codes.sum(1), torch.ones(B, dtype=dtype), rtol=0, atol=tolerance)


@quick
@given(sizes, sizes, seeds)
def test_no_iterations_give_the_softmax(B, K, seed):
    scores = cosines(B, K, seed)
    torch.testing.assert_close(sinkhorn(scores, 0.05, 0), (scores / 0.05).softmax(1), rtol=0, atol=1e-14)


@quick
@given(st.integers(2, 12), st.integers(2, 12), seeds)
def test_many_iterations_give_every_prototype_the_same_mass(B, K, seed):
    scores = cosines(B, K, seed)
    few, many = (sinkhorn(scores, 0.5, iterations).sum(0) - B / K for iterations in (1, 300))
    assert many.abs().max() < 1e-9
    assert few.abs().max() > many.abs().max()


@quick
@given(sizes, sizes, seeds, st.floats(-1000, 1000))
def test_a_shift_of_all_scores_changes_nothing(B, K, seed, shift):
    scores = cosines(B, K, seed)
    torch.testing.assert_close(sinkhorn(scores + shift, 0.5), sinkhorn(scores, 0.5), rtol=0, atol=1e-10)


def test_problems_in_one_call_are_balanced_each_by_itself():
    scores = torch.stack([waves(6, 4), waves(6, 4, shift=1), cosines(6, 4, 0)])
    assert torch.equal(sinkhorn(scores), torch.stack([sinkhorn(part) for part in scores]))


def test_a_shift_of_each_sample_changes_the_codes():
    scores = waves(4, 3)
    shifted = sinkhorn(scores - scores.amax(1, keepdim=True), 0.5)
    torch.testing.assert_close(shifted[2], torch.tensor([0.364587, 0.280163, 0.355250]).double(), rtol=0,
                               atol=1e-6)
    assert (shifted - sinkhorn(scores, 0.5)).abs().max() > 0.01


def test_low_precision_is_computed_in_float32_and_without_gradient():
    scores = cosines(6, 4, 0).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = sinkhorn(scores.requires_grad_(), 0.05)
    assert codes.dtype == torch.float32 and not codes.requires_grad
    torch.testing.assert_close(codes, sinkhorn(scores.double(), 0.05).float(), rtol=0, atol=1e-5)


SPLITS = [(5, 0, 8), (0, 3, 10), (13, 0, 0), (1, 2, 10)]


def codes_of_this_rank():
    scores = cosines(13, 7, 3)
    return [{dtype: sinkhorn(scores.to(dtype).split(split)[rank()], 0.05,
                             3) for dtype in (torch.float32, torch.float64)} for split in SPLITS]


def test_unequal_and_empty_ranks_equal_one_process():
    results = ranks(3, codes_of_this_rank)
    for i, split in enumerate(SPLITS):
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14)):
            blocks = [result[i][dtype] for result in results]
            assert [len(block) for block in blocks] == list(split)
            torch.testing.assert_close(torch.cat(blocks), sinkhorn(cosines(13, 7, 3).to(dtype), 0.05, 3),
                                       rtol=0, atol=tolerance)


WORKED = {0.5: [[0.371481, 0.572399, 0.056120], [0.551094, 0.346287, 0.102619],
                [0.336552, 0.261913, 0.401535], [0.049419, 0.130814, 0.819767]],
          0.05: [[0.162233, 0.837767, 0], [0.999343, 0.000656, 0], [0.043695, 0.000244, 0.956061], [0, 0, 1]]}


@pytest.mark.parametrize("epsilon", WORKED)
def test_worked_codes(epsilon):
    torch.testing.assert_close(sinkhorn(waves(4, 3), epsilon, 3), torch.tensor(WORKED[epsilon]).double(),
                               rtol=0, atol=1e-6)


def test_worked_swav_loss():
    scores = torch.stack([waves(4, 3, v) for v in range(3)])
    codes = swav.assign(scores[:2], swav.Queue(0, 2, 3), None, 0.05, 3)
    assert swav.prediction_loss(scores, codes, 0.1).item() == pytest.approx(4.6410512, abs=5e-8)
