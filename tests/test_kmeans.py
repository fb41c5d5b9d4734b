"""k-means and PCA whitening: the official numbers, a numpy oracle, properties, limits, and several ranks
against one."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import golden, ranks
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common import kmeans as module
from common.distributed import rank
from common.kmeans import fit_whitening, kmeans, nearest, pca_whiten

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31)
DTYPES = (torch.float32, torch.float64)
PRECISIONS = pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
SPHERICAL = pytest.mark.parametrize("spherical", [False, True], ids=["plain", "spherical"])


def normal(N, D, seed=0, dtype=torch.float64):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def squared_distances(x, centroids):
    return (x[:, None] - centroids).square().sum(2)  # (N, K)


def close(actual, expected, atol, rtol=0.0):
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)


# ---- numbers of the official implementations


def trajectory(name, dtype):
    """{head: centroids, assignments and counts after 0..10 iterations} of this rank."""
    numbers, result = golden(name), []
    for head, (k, bank) in enumerate(zip(numbers["K"].tolist(), numbers["bank_of_head"].tolist())):
        memory = numbers["memory_embeddings"].to(dtype)
        init = memory[0, bank][numbers[f"init_idx_head{head}"]]
        result.append([kmeans(memory[rank(), bank], k, t, spherical=True, init=init) for t in range(11)])
    return result


@PRECISIONS
@pytest.mark.parametrize("name", ["single", "empty", "multi", "ranks", "ranks_empty"])
def test_centroids_and_assignments_of_deepclusterv2(name, dtype):
    name = f"dcv2_kmeans_{name}"
    numbers = golden(name)
    results = ranks(2, trajectory, name, dtype) if "ranks" in name else [trajectory(name, dtype)]
    assert len(results) == len(numbers["memory_embeddings"])
    empty = 0
    for head, k in enumerate(numbers["K"].tolist()):
        expected = numbers[f"centroids{'64' if dtype == torch.float64 else ''}_head{head}"]
        assigned = numbers[f"assign_iters_head{head}"]  # (W, 11, N)
        for result, rows in zip(results, assigned):
            for t, (centroids, assignments, counts, _) in enumerate(result[head]):
                assert centroids.dtype == dtype
                if t:
                    close(centroids, expected[t - 1], 1e-6 if dtype == torch.float32 else 1e-12)
                assert torch.equal(assignments, rows[t])
                assert torch.equal(counts, assigned[:, t].flatten().bincount(minlength=k))
                empty += int((counts == 0).sum())
    assert (empty > 0) == ("empty" in name)


@PRECISIONS
@pytest.mark.parametrize("name",
                         ["n120_d32_p12_relu", "n20_d40_p10_gauss", "n80_d16_p16_gauss", "n96_d24_p8_gauss"])
def test_preprocessing_of_deepcluster(name, dtype):
    numbers = golden(f"dc_preprocess_{name}")
    suffix, atol, rtol = ("", 1e-5, 2e-5) if dtype == torch.float32 else ("_numpy64", 1e-10, 1e-9)
    y, whitening = pca_whiten(numbers["features"].to(dtype), int(numbers["pca_dim"]))
    assert y.dtype == whitening.matrix.dtype == dtype and y.shape == (len(numbers["features"]),
                                                                      numbers["pca_dim"])
    close(y @ y.T, numbers[f"gram{suffix}"], atol)
    eigenvalues = numbers[f"eigenvalues{suffix}"]
    close(whitening.eigenvalues[: len(eigenvalues)], eigenvalues, 0, rtol)


def settling(spherical, W=1):
    """Rows of which this rank holds a part: the result of up to 50 iterations, passes made, results of as
    many and of 60."""
    x = normal(300, 4) + normal(6, 4, 1)[torch.arange(300) % 6]
    init, mine, passes, assign = x[:6] + x[6:12], x.chunk(W)[rank()], [], module._assign
    module._assign = lambda *arguments: (passes.append(1), assign(*arguments))[1]
    try:
        result = kmeans(mine, 6, 50, init=init, spherical=spherical)
    finally:
        module._assign = assign
    return result, len(passes), [kmeans(mine, 6, t, init=init, spherical=spherical) for t in (len(passes) - 1,
                                                                                              60)]


@SPHERICAL
def test_it_ends_once_nothing_changes_with_the_same_result(spherical):
    (centroids, assignments, _, objective), calls, (just, long) = settling(spherical)
    assert 3 < calls < 40  # of 51
    for other in (just, long):
        assert torch.equal(other[0], centroids) and torch.equal(other[1],
                                                                assignments) and other[3] == objective
    both = ranks(2, settling, spherical, 2)
    assert [c for _, c, _ in both] == [calls, calls]  # not while any rank's assignments change
    assert torch.equal(torch.cat([result[1] for result, _, _ in both]), assignments)


# ---- against numpy


def lloyd(x, centroids, iterations, spherical):
    """Centroids, assignments and objective after each of 0..iterations steps; None from the step on where a
    cluster is empty."""
    steps = []
    for _ in range(iterations + 1):
        if spherical:
            similarity = x @ centroids.T
            steps.append((centroids, similarity.argmax(1), similarity.max(1).mean()))
        else:
            distance = ((x[:, None] - centroids) ** 2).sum(2)
            steps.append((centroids, distance.argmin(1), distance.min(1).mean()))
        members = steps[-1][1] == np.arange(len(centroids))[:, None]  # (K, N)
        if not members.any(1).all():
            return None
        centroids = members @ x / members.sum(1, keepdims=True)
        if spherical:
            centroids = centroids / np.linalg.norm(centroids, axis=1, keepdims=True)
    return steps


@SPHERICAL
@quick
@given(N=st.integers(1, 90), D=st.integers(1, 6), k=st.integers(1, 9), seed=seeds)
def test_equals_numpy_and_the_objective_never_gets_worse(spherical, N, D, k, seed):
    assume(k <= N)
    x = normal(N, D, seed)
    if spherical:
        x = torch.nn.functional.normalize(x)
    steps = lloyd(x.numpy(), x[:k].numpy(), 5, spherical)
    assume(steps is not None)
    before = None
    for t, (centroids, assignments, objective) in enumerate(steps):
        found = kmeans(x, k, t, spherical=spherical, init=x[:k])
        close(found[0], torch.from_numpy(centroids), 1e-12)
        assert found[1].tolist() == assignments.tolist()
        assert found[2].tolist() == np.bincount(assignments, minlength=k).tolist()
        close(found[3], torch.tensor(objective), 1e-12)
        if before is not None:
            assert (found[3] >= before - 1e-12) if spherical else (found[3] <= before + 1e-12)
        before = found[3]


@pytest.mark.parametrize("K", [1, 63, 64, 65, 130])
@SPHERICAL
def test_nearest_centroid(spherical, K):
    x, centroids = normal(300, 5, 1) - 2, normal(K, 5, 2) + 2  # all inner products are negative
    assignments, values = nearest(x, centroids, spherical=spherical)
    expected = x @ centroids.T if spherical else -squared_distances(x, centroids)
    assert assignments.dtype == torch.int64 and torch.equal(assignments, expected.argmax(1))
    close(values, expected.amax(1) * (1 if spherical else -1), 1e-10)


def test_nearest_takes_the_first_of_equals_and_stays_in_range():
    centroids = normal(4, 3).repeat(50, 1)
    assert nearest(normal(200, 3, 1), centroids)[0].max() == 3
    broken = torch.tensor([[torch.nan, 0, 0], [torch.inf, 0, 0], [-torch.inf, 1, 1]])
    assert (nearest(broken, centroids)[0] < len(centroids)).all()


def test_float32_is_enough_far_from_the_origin():
    x = normal(4000, 8, dtype=torch.float32) + 1000
    centroids = x[:40].clone()
    assignments, distances = nearest(x, centroids)
    exact, wanted = nearest(x.double(), centroids.double())
    assert (assignments != exact).float().mean() < 1e-3
    close(distances, wanted, 1e-3)


# ---- clusters without rows


@quick
@given(st.integers(1, 40), st.integers(1, 2), st.integers(1, 12), st.integers(0, 3), seeds)
def test_no_cluster_is_empty_unless_there_are_fewer_distinct_rows(N, D, k, iterations, seed):
    assume(k <= N)
    x = torch.randint(0, 3, (N, D), generator=seeded(seed)).double()
    centroids, assignments, counts, objective = kmeans(x, k, iterations, generator=seeded(seed))
    assert int((counts > 0).sum()) == min(k, len(x.unique(dim=0)))
    assert torch.equal(counts, assignments.bincount(minlength=k))
    distances = squared_distances(x, centroids)
    close(distances.gather(1, assignments[:, None]), distances.amin(1, keepdim=True), 1e-12)
    close(objective, distances.amin(1).mean(), 1e-12)


@pytest.mark.parametrize("iterations", [0, 1, 10])
def test_one_centroid_for_all_becomes_many(iterations):
    x = normal(200, 3)
    _, _, counts, objective = kmeans(x, 25, iterations, init=x[:1].expand(25, 3))
    assert (counts > 0).all() and objective < 0.5 * kmeans(x, 1)[3]


def test_spherical_keeps_the_centroid_of_an_empty_cluster():
    x = torch.nn.functional.normalize(normal(50, 3).abs())
    init = torch.cat([x[:2], torch.tensor([[0, -3.0, -4.0]]).double()])
    centroids, _, counts, _ = kmeans(x, 3, 4, spherical=True, init=init)
    assert counts[2] == 0 and (counts[:2] > 0).all()
    close(centroids[2], torch.tensor([0, -3, -4]) / 5, 1e-7)


def test_an_empty_cluster_gets_half_of_a_donor():
    before = normal(4, 5)
    centroids, counts = before.clone(), torch.tensor([1, 0, 9, 0])
    module._reseed(centroids, counts, seeded(0))
    # a single row is no donor
    assert counts.tolist() == [1, 0, 9, 0] and torch.equal(centroids[0], before[0])
    signs = torch.tensor([1, -1, 1, -1, 1]) / 1024
    lower = before[2] * (1 - signs)  # after the first split; then one of the two halves is split again
    assert any(torch.allclose(centroids[donor], half * (1 - signs),
                              rtol=1e-12) and torch.allclose(centroids[3], half * (1 + signs), rtol=1e-12)
               for donor, half in ((2, lower), (1, before[2] * (1 + signs))))


def test_every_iteration_fills_empty_clusters():
    x = normal(50, 3)
    centroids, _, counts, _ = kmeans(x, 2, 1, init=x[:1].expand(2, 3))  # the second cluster is empty at first
    signs = torch.tensor([1, -1, 1]) / 1024
    close(centroids, torch.stack([x.mean(0) * (1 - signs), x.mean(0) * (1 + signs)]), 1e-12)
    assert (counts > 0).all()


def test_donors_are_drawn_by_their_size():
    generator, donations = seeded(0), torch.zeros(4)
    for _ in range(2000):
        centroids = torch.eye(4)
        module._reseed(centroids, torch.tensor([11, 1, 31, 0]), generator)
        donations += centroids[3] > 0
    close(donations / 2000, torch.tensor([0.25, 0, 0.75, 0]), 0.03)
    assert donations[1] == 0


# ---- limits


def test_all_rows_equal():
    x = torch.full((30, 4), 0.1)
    for spherical in (False, True):
        centroids, assignments, counts, objective = kmeans(x, 5, spherical=spherical)
        assert centroids.isfinite().all() and counts.sum() == 30 and len(assignments.unique()) == 1
        close(objective, torch.tensor(0.2 if spherical else 0.0), 1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cluster_for_each_row(dtype):
    x = normal(70, 3, dtype=dtype)
    centroids, assignments, counts, objective = kmeans(x, 70)
    assert counts.eq(1).all() and objective == 0 and torch.equal(centroids[assignments], x)


def test_one_cluster():
    x = normal(70, 3)
    centroids, assignments, counts, objective = kmeans(x, 1)
    assert assignments.eq(0).all() and counts.tolist() == [70]
    close(centroids[0], x.mean(0), 1e-14)
    close(objective, x.var(0, correction=0).sum(), 1e-13)


def test_no_iterations_give_rows_drawn_from_all():
    x = normal(40, 2)
    drawn = [kmeans(x, 15, 0, generator=seeded(s))[0] for s in (0, 0, 1)]
    for centroids in drawn:
        assert len(centroids.unique(dim=0)) == 15 and (squared_distances(centroids, x).amin(1) == 0).all()
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    assert torch.equal(kmeans(x, 15, 0)[0], kmeans(x, 15, 0)[0])
    drawn = torch.cat([kmeans(x, 15, 0, generator=seeded(s))[0] for s in range(20)])
    assert len(drawn.unique(dim=0)) == 40


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_is_named(value):
    x = normal(300, 3)
    x[123, 1] = x[200, 0] = value
    for function in (lambda: kmeans(x, 4), lambda: pca_whiten(x, 2), lambda: fit_whitening(x.split(100), 2)):
        with pytest.raises(ValueError, match="row 123 of 300 "):
            function()


def test_impossible_requests():
    x = normal(6, 3)
    with pytest.raises(ValueError, match=r"6 rows for 7 clusters; ask for at most 6"):
        kmeans(x, 7)
    with pytest.raises(ValueError, match="k >= 1"):
        kmeans(x, 0)
    with pytest.raises(ValueError, match=r"\(k, 3\): got k = 2 and init of shape \(2, 4\)"):
        kmeans(x, 2, init=torch.zeros(2, 4))
    with pytest.raises(ValueError, match="cannot keep 4 of 3"):
        pca_whiten(x, 4)
    with pytest.raises(ValueError, match="at least one chunk"):
        fit_whitening([], 2)


def test_arguments_are_left_alone():
    x = normal(50, 3)
    init = x[:1].expand(6, 3).clone()
    kept = x.clone(), init.clone()
    kmeans(x, 6, init=init), kmeans(x, 6, init=init, spherical=True), pca_whiten(x, 2)
    assert torch.equal(x, kept[0]) and torch.equal(init, kept[1])


# ---- precision, chunks, memory


@SPHERICAL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_precision(spherical, dtype):
    x = normal(200, 8).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        centroids, assignments, counts, objective = kmeans(x, 7, spherical=spherical)
        values = nearest(x, centroids, spherical=spherical)[1]
        y, _ = pca_whiten(x, 4)
    expected = kmeans(x.double(), 7, spherical=spherical)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert {t.dtype for t in (centroids, objective, values,
                              y)} == {wanted} and assignments.dtype == counts.dtype == torch.int64
    assert not any(t.requires_grad for t in (centroids, objective, values, y))
    close(centroids, expected[0], 1e-6)
    assert torch.equal(assignments, expected[1])
    close(y @ y.T, (lambda y: y @ y.T)(pca_whiten(x.double(), 4)[0]), 1e-5)


@SPHERICAL
def test_chunks_change_nothing(spherical, monkeypatch):
    x = normal(333, 5)
    y = torch.cat([x[:300], x[:33]])
    whole = [*kmeans(x, 70, spherical=spherical), *nearest(x, y, spherical=spherical), *pca_whiten(x, 3)[1]]
    monkeypatch.setattr(module, "held_scores", lambda device: 1)
    assert len(module._chunks(x, 5)) == 6
    pieces = [*kmeans(x, 70, spherical=spherical), *nearest(x, y, spherical=spherical), *pca_whiten(x, 3)[1]]
    for a, b in zip(whole, pieces, strict=True):
        close(a, b, 1e-12)


HELD = 2**19


def resident(reset=False):
    """The largest size of this process so far, in bytes, or since a reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])


def peak(N, D, K, spherical):
    """Bytes that k-means adds to the size of this process."""
    module.held_scores = lambda device: HELD
    x = normal(N, D, dtype=torch.float32)
    kmeans(x[:K], K, 1)  # libraries take their own memory
    before = resident(reset=True)
    kmeans(x, K, 1, spherical=spherical)
    return resident() - before


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(),
                    reason="reads the size of a process from Linux")
@SPHERICAL
def test_memory(spherical):
    N, D, K = 150_000, 8, 1000
    (taken,) = ranks(1, peak, N, D, K, spherical)
    allowed = 24 * N + 28 * K * D + 12 * HELD
    assert 4 * HELD < taken < allowed + 2**23 < 4 * N * K / 10


# ---- PCA whitening


@quick
@given(st.integers(2, 40), st.integers(1, 8), st.integers(1, 8), seeds, st.booleans())
def test_whitened_axes_have_equal_variance_and_none_covariance(N, D, dim, seed, flat):
    assume(dim <= D)
    x = normal(N, D, seed) * torch.arange(1, D + 1) + 5
    if flat:
        x[:, -1] = 5.0  # the widest direction has no variance
    y, whitening = pca_whiten(x, dim)
    projected = (x - whitening.mean) @ whitening.matrix
    variance = min(dim, N - 1, D - flat)  # axes that have some
    expected = torch.diag((torch.arange(dim) < variance).double())
    close(projected.T @ projected, expected, 1e-7)
    close(y, whitening(x), 1e-15)
    close(y.norm(dim=1), torch.full((N,), 1.0 if variance else 0.0), 1e-12)


def test_whitening_of_equal_rows_is_zero():
    y, _ = pca_whiten(torch.full((12, 5), 3.0), 4)
    assert y.eq(0).all()


@PRECISIONS
def test_whitening_of_fewer_rows_than_axes(dtype):
    x = normal(5, 8, dtype=dtype) + 3
    y, whitening = pca_whiten(x, 8)
    assert whitening.matrix[:, 4:].eq(0).all() and (whitening.matrix[:, :4].norm(dim=0) > 0).all()
    close(y @ y.T, torch.eye(5) * 1.25 - 0.25, 1e-5)  # the corners of a regular simplex


@PRECISIONS
def test_whitening_fitted_in_pieces(dtype):
    x = normal(500, 6, dtype=dtype) * torch.tensor([3, 1, 0.5, 0.7, 1.5, 2]).to(dtype) + 30
    y, whole = pca_whiten(x, 4)
    pieces = fit_whitening(iter([x[:7], x[7:7], x[7:400], x[400:]]), 4)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    close(pieces(x) @ pieces(x).T, y @ y.T, tolerance)
    close(pieces.mean, x.double().mean(0), 1e-5 if dtype == torch.float32 else 1e-12)
    close(pieces.eigenvalues, whole.eigenvalues, 0, tolerance)


# ---- several ranks


SPLITS = {2: [(60, 60), (0, 120), (119, 1)], 3: [(50, 30, 40), (0, 117, 3), (120, 0, 0)]}


def data():
    return normal(120, 4, 7) + 2


def clusterings(x):
    """Plain, spherical and degenerate clusterings of all ranks' rows; x are this rank's."""
    unit, first = torch.nn.functional.normalize(x), data()[:1]
    return {
        "plain": kmeans(x, 9, 5, generator=seeded(3)),
        "spherical": kmeans(unit, 9, 5, spherical=True, generator=seeded(3)),
        "re-seeded": kmeans(x, 12, 2, init=first.expand(12, 4)),  # 11 clusters are empty at first
        "filled": kmeans(x, 12, 0, init=first.expand(12, 4)),
        "distinct": kmeans(x.round().sign(), 100, 2),  # fewer distinct rows than clusters
        "low": kmeans(x.float(), 9, 5, generator=seeded(3)),
    }


def clusterings_of_this_rank(world_size):
    results = []
    for split in SPLITS[world_size]:
        x = data().split(split)[rank()]
        y, whitening = pca_whiten(x, 3)
        results.append((clusterings(x), (y, whitening.mean, whitening.matrix, whitening.eigenvalues)))
    return results


@pytest.mark.parametrize("world_size", SPLITS)
def test_unequal_and_empty_ranks_equal_one_process(world_size):
    results = ranks(world_size, clusterings_of_this_rank, world_size)
    expected, (y, whitening) = clusterings(data()), pca_whiten(data(), 3)
    assert (expected["distinct"][2] == 0).any() and (expected["re-seeded"][2] > 0).all()
    for i, split in enumerate(SPLITS[world_size]):
        for name, (centroids, assignments, counts, objective) in expected.items():
            tolerance = 1e-6 if name == "low" else 1e-12
            found = [result[i][0][name] for result in results]
            assert [len(f[1]) for f in found] == list(split)
            assert torch.equal(torch.cat([f[1] for f in found]), assignments), name
            for f in found:
                close(f[0], centroids, tolerance)
                assert torch.equal(f[2], counts)
                close(f[3], objective, tolerance)
                assert torch.equal(f[0], found[0][0]) and torch.equal(f[3], found[0][3])
        blocks = [result[i][1] for result in results]
        whitened = torch.cat([block[0] for block in blocks])
        close(whitened @ whitened.T, y @ y.T, 1e-10)
        for block in blocks:
            close(block[1], whitening.mean, 1e-12)
            close(block[3], whitening.eigenvalues, 1e-10)
            assert torch.equal(block[2], blocks[0][2])


def errors_of_this_rank():
    x = normal(10, 3)
    if rank() == 1:
        x[4, 0] = torch.nan
    messages = []
    for function in (lambda: kmeans(x, 3), lambda: fit_whitening(x.split(3), 2), lambda: kmeans(x, 21)):
        with pytest.raises(ValueError) as error:
            function()
        messages.append(str(error.value))
    return messages


def test_errors_are_raised_on_every_rank():
    first, second = ranks(2, errors_of_this_rank)
    assert first == second
    assert "row 14 of 20" in first[0] and "row 14 of 20" in first[1] and "20 rows for 21 clusters" in first[2]
