"""k-means, nearest centroid and PCA whitening over the rows of all ranks. Needs torch only: copy it.

Every function takes this rank's rows and returns what one process would that holds the rows of all ranks, in
rank order; ranks may hold unequal numbers of rows, also none. Products are in promote_types(x.dtype, float32)
and sums of rows in float64, so the number of ranks and the order of additions hardly show.
"""

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

# N rows of this rank, D features, K clusters, B rows of a chunk, G centroids of a group

GROUP = 64  # G; measured: 32 and 128 are slower


@torch.no_grad()
def kmeans(x, k, iterations=10, *, spherical=False, init=None, generator=None):
    """Lloyd's algorithm: assigns and averages `iterations` times, then assigns once more.

    Plain: nearest by Euclidean distance; centroid = mean of its rows. Spherical (DeepCluster-v2): largest
    inner product; centroid = mean scaled to unit length; x should have unit rows. A cluster without rows,
    when spherical, keeps its centroid. Otherwise it gets half of another as in faiss (see _reseed), and in
    the end a row far from its centroid (see _fill): none stays empty if enough rows are distinct.

    x: (N, D) this rank's rows, any float type.
    init: (K, D) first centroids, the same on every rank; without it, k rows drawn from those of all ranks.
    generator: of that draw and of re-seeding, in the same state on every rank; without it, one of seed 0.
    Returns centroids (K, D); assignments (N,) int64 of this rank's rows; counts (K,) int64 over all ranks;
    objective (), the mean over all ranks' rows of the squared distance to the centroid or, if spherical, of
    the inner product with it, for these assignments. All but the assignments are equal on every rank.
    Raises ValueError, on every rank, if there are fewer rows than clusters or a row is not finite.

    Memory beyond x, in bytes for float32: 24 N + 28 K D + 12 C, where C scores are held at a time
    (`held_scores`). No N x K matrix exists. Time is that of the products, at most 2 (iterations + 1) N K D
    operations, and 2 N K D for each round in which empty clusters are filled. Checked against
    main_deepclusterv2.py of facebookresearch/swav (spherical); same objective as faiss (plain).
    """
    if k < 1 or (init is not None and init.shape != (k, x.shape[1])):
        given = "" if init is None else f" and init of shape {tuple(init.shape)}"
        raise ValueError(f"k-means needs k >= 1 and init of shape (k, {x.shape[1]}): got k = {k}{given}")
    start, total = _place(x)
    if total < k:
        raise ValueError(f"k-means needs a row for each cluster: {total} rows for {k} clusters; ask for at "
                         f"most {total} clusters")
    _refuse_bad_rows(_first_bad_row(x), start, total, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.autocast(x.device.type, enabled=False):
        if init is None:
            drawn = torch.randperm(total, generator=generator, device=generator.device)[:k]
            centroids = _rows(x, drawn.to(x.device), start)  # (K, D)
        else:
            centroids = init.to(x.device, dtype, copy=True)
        if spherical:
            centroids = F.normalize(centroids)
        assignments, settled = None, False
        for _ in range(iterations):
            before, assignments = assignments, _assign(x, centroids, spherical)  # (N,)
            if settled and _same(before, assignments):
                break  # all further iterations would find these centroids again
            centroids, counts = _average(x, assignments, centroids, spherical)  # (K, D) (K,)
            settled = spherical or bool((counts > 0).all())
            if not settled:
                _reseed(centroids, counts, generator)
        else:
            assignments = _assign(x, centroids, spherical)
        best = math.inf
        while True:
            values = _values(x, centroids, assignments, spherical)  # (N,)
            counts = _counts(assignments, k)
            objective = _over_ranks(values.sum(dtype=torch.float64)) / total
            # Each round of filling lowers the objective, unless all rows are at a centroid.
            if spherical or (counts > 0).all() or not objective < best:
                return centroids, assignments, counts, objective.to(dtype)
            best = objective
            _fill(x, centroids, assignments, values, counts, start, total)
            assignments = _assign(x, centroids, spherical)


@torch.no_grad()
def nearest(x, centroids, *, spherical=False):
    """For every row of x the nearest centroid, or if spherical that with the largest inner product.

    x: (N, D). centroids: (K, D), taken as they are.
    Returns assignments (N,) int64, the first of equal ones; squared distances to these centroids, or inner
    products with them (N,). A row at a centroid has distance 0. Does not communicate.
    """
    with torch.autocast(x.device.type, enabled=False):
        centroids = centroids.to(torch.promote_types(x.dtype, torch.float32))
        assignments = _assign(x, centroids, spherical)
        return assignments, _values(x, centroids, assignments, spherical)


def _values(x, centroids, assignments, spherical):
    """Squared distance of each row to its centroid, or inner product with it: (N,)."""
    values = centroids.new_empty(len(x))
    for rows in _chunks(x):
        own = centroids[assignments[rows]]  # (B, D)
        values[rows] = (own * x[rows]).sum(1) if spherical else (own - x[rows]).square_().sum(1)
    return values


def _assign(x, centroids, spherical):
    """The assignments of `nearest`, one chunk of scores at a time, at the cost of the product alone."""
    K, D = centroids.shape
    groups = -(-K // GROUP)
    directions = centroids.new_zeros(groups * GROUP, D)
    bias = centroids.new_full((groups * GROUP,), -math.inf)  # what fills the last group never wins
    if spherical:
        directions[:K], bias[:K] = centroids, 0
    else:
        # |x - c|^2 is smallest where x.c - |c|^2 / 2 is largest, or with the mean centroid m where x.(c - m)
        # - (|c|^2 - |m|^2) / 2 is: so rounding errors do not grow with the distance of the data from the
        # origin.
        mean = centroids.mean(0)
        torch.sub(centroids, mean, out=directions[:K])
        bias[:K] = -(directions[:K] * (centroids + mean)).sum(1) / 2
    assignments = torch.empty(len(x), dtype=torch.int64, device=x.device)
    chunks = _chunks(x, max(groups * GROUP, D))
    scores = centroids.new_empty(chunks[0].stop, groups * GROUP)  # (B, K), of a chunk
    numbers = torch.arange(chunks[0].stop, device=x.device)
    for rows in chunks:
        block = x[rows].to(centroids.dtype)  # (B, D)
        # (B, K/G, G)
        block = torch.addmm(bias, block, directions.t(), out=scores[: len(block)]).view(-1, groups, GROUP)
        # A maximum is vectorised and its place is not (half the time of the product on a CPU), so find the
        # group first.
        group = block.amax(2).argmax(1)  # (B,)
        within = block[numbers[: len(block)], group].argmax(1)  # (B,)
        torch.add(within, group, alpha=GROUP, out=assignments[rows])
    return assignments.clamp_(max=K - 1)  # in range even for a row that is not finite


def _average(x, assignments, centroids, spherical):
    """New centroids (K, D), the old one where a cluster is empty, and counts (K,), over the rows of all
    ranks."""
    sums = torch.zeros_like(centroids, dtype=torch.float64)
    for rows in _chunks(x):
        sums.index_add_(0, assignments[rows], x[rows].double())
    counts = _counts(assignments, len(centroids))
    means = _over_ranks(sums).div_(counts.clamp(min=1)[:, None]).to(centroids.dtype)
    means = torch.where(counts[:, None] > 0, means, centroids)
    return (F.normalize(means) if spherical else means), counts


def _reseed(centroids, counts, generator):
    """Gives every empty cluster half of another one, in place, as faiss does.

    Cluster j with n_j rows is the donor with a probability proportional to n_j - 1. Both get its centroid
    with the coordinates times 1 +- 1/1024, in alternating and opposite signs.
    """
    sizes = counts.to(generator.device, copy=True)
    nudge = torch.full_like(centroids[0], 1 / 1024)
    nudge[1::2] *= -1
    for empty in (sizes == 0).nonzero().flatten().tolist():
        donor = torch.multinomial((sizes - 1).clamp(min=0).double(), 1, generator=generator).item()
        centroids[empty] = centroids[donor] * (1 + nudge)
        centroids[donor] *= 1 - nudge
        sizes[empty] = sizes[donor] // 2
        sizes[donor] -= sizes[empty]


def _fill(x, centroids, assignments, distances, counts, start, total):
    """Moves the centroids of empty clusters, in place, onto rows: each cluster offers its farthest, the
    farthest are taken."""
    farthest = distances.new_zeros(len(counts)).scatter_reduce_(0, assignments, distances, "amax")
    farthest = _over_ranks(farthest, "MAX")  # (K,)
    numbers = torch.arange(start, start + len(x), device=x.device)
    numbers = torch.where(distances == farthest[assignments], numbers, total)
    offered = numbers.new_full((len(counts),), total).scatter_reduce_(0, assignments, numbers, "amin")
    offered = _over_ranks(offered, "MIN")  # (K,) row numbers
    empty = (counts == 0).nonzero().flatten()
    donors = farthest.argsort(descending=True, stable=True)[: min(len(empty), int((farthest > 0).sum()))]
    centroids[empty[: len(donors)]] = _rows(x, offered[donors], start)


# ---- PCA whitening


class Whitening(NamedTuple):
    """x -> (x - mean) @ matrix, scaled to unit rows: the leading principal axes, each divided by its standard
    deviation."""

    mean: torch.Tensor  # (D,)
    matrix: torch.Tensor  # (D, dim); a column of zeros where the data have no variance
    # (D,) of the scatter matrix, the sum over rows of (x - mean)(x - mean)^T; descending
    eigenvalues: torch.Tensor

    @torch.no_grad()
    def __call__(self, x):
        """(B, D) -> (B, dim) with rows of length 1, or 0 for a row at the mean."""
        with torch.autocast(x.device.type, enabled=False):
            return F.normalize((x.to(self.mean.dtype) - self.mean) @ self.matrix,
                               eps=torch.finfo(self.mean.dtype).tiny)


@torch.no_grad()
def pca_whiten(x, dim):
    """Projects rows on their `dim` leading principal axes, gives each axis variance 1, then each row length 1
    (DeepCluster).

    x: (N, D) this rank's rows. Returns (N, dim) and the fitted Whitening. See fit_whitening, which takes x in
    pieces. Checked against clustering.py of facebookresearch/deepcluster.
    """
    whitening = fit_whitening((x[rows] for rows in _chunks(x, x.shape[1])), dim)
    y = whitening.mean.new_empty(len(x), dim)
    for rows in _chunks(x, x.shape[1]):
        y[rows] = whitening(x[rows])
    return y, whitening


@torch.no_grad()
def fit_whitening(chunks, dim):
    """The Whitening of rows that come in pieces, so that all of them need not be in memory: 2 D x D float64
    matrices are.

    chunks: iterable of (B, D) tensors, this rank's rows; at least one on every rank, though it may have no
    rows. With fewer than dim + 1 rows, or rows in fewer than dim dimensions, the axes without variance give
    zeros: those with less than 4 roundings of the first one's (5e-7 of it in float32, ten times what the
    sums' errors make of 0).
    Raises ValueError, on every rank, if D < dim or a row is not finite.
    """
    count, bad, shift = 0, None, None
    for chunk in chunks:
        chunk = chunk.to(torch.promote_types(chunk.dtype, torch.float32))  # (B, D)
        if shift is None:
            D, device, dtype = chunk.shape[1], chunk.device, chunk.dtype
            if D < dim:
                raise ValueError(f"PCA cannot keep {dim} of {D} dimensions: ask for at most {D}")
            # Sums about a point near the mean, the same on every rank, lose fewer digits than sums about 0.
            shift = _over_ranks(chunk.sum(0)) / max(1, _place(chunk)[1])
            total = torch.zeros_like(shift, dtype=torch.float64)
            scatter = torch.zeros(D, D, dtype=torch.float64, device=device)
        if bad is None and (found := _first_bad_row(chunk)) is not None:
            bad = count + found
        with torch.autocast(device.type, enabled=False):
            centred = chunk - shift
            total += centred.sum(0, dtype=torch.float64)
            scatter += centred.t() @ centred
        count += len(chunk)
    if shift is None:
        raise ValueError("PCA needs at least one chunk of rows on every rank, if only one of 0 rows")
    start, rows = _place(range(count), device)
    _refuse_bad_rows(bad, start, rows, device)
    offset = _over_ranks(total) / max(1, rows)  # (D,) of the mean from shift
    scatter = _over_ranks(scatter).sub_(rows * torch.outer(offset, offset))
    eigenvalues, axes = torch.linalg.eigh(scatter)  # ascending
    eigenvalues, axes = eigenvalues.flip(0).clamp_(min=0), axes.flip(1)[:, :dim].contiguous()  # (D,) (D, dim)
    if _world_size() > 1:  # the sign of an axis is arbitrary: all ranks take rank 0's
        dist.broadcast(axes, src=0)
    noise = 4 * torch.finfo(dtype).eps * eigenvalues[0]
    scale = torch.where(eigenvalues > noise, eigenvalues.rsqrt(), 0)[:dim]
    return Whitening((shift + offset).to(dtype), (axes * scale).to(dtype), eigenvalues.to(dtype))


# ---- rows in chunks and over ranks


def held_scores(device):
    """How many numbers a temporary may hold: hundreds of rows; on a CPU about what its last cache holds."""
    return 2**26 if device.type == "cuda" else 2**23


def _chunks(x, width=None):
    """Slices of the rows of x, such that `width` numbers a row are at most held_scores numbers.

    The default is for passes that only read rows: they are fastest from a core's own cache.
    """
    size = max(64, held_scores(x.device) // (width or 32 * x.shape[1]))
    return [slice(first, min(first + size, len(x))) for first in range(0, len(x), size)] or [slice(0, 0)]


def _world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def _over_ranks(x, op="SUM"):
    if _world_size() > 1:
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
    return x


def _same(a, b):
    """Whether a and b agree on every rank."""
    return not _over_ranks((a != b).any().int(), "MAX")


def _counts(assignments, k):
    """Rows of all ranks in each cluster: (K,) int64."""
    return _over_ranks(torch.bincount(assignments, minlength=k))


def _place(rows, device=None):
    """The number of this rank's first row among those of all ranks, and how many there are in all."""
    sizes = torch.zeros(_world_size(), dtype=torch.int64, device=device or rows.device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    sizes[rank] = len(rows)
    _over_ranks(sizes)
    return int(sizes[:rank].sum()), int(sizes.sum())


def _rows(x, numbers, start):
    """The rows with these numbers among those of all ranks: (n,) -> (n, D), on every rank."""
    here = (numbers >= start) & (numbers < start + len(x))
    found = torch.zeros(len(numbers), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32),
                        device=x.device)
    found[here] = x[numbers[here] - start].to(found.dtype)
    return _over_ranks(found)


def _first_bad_row(x):
    """Position of the first row that holds a NaN or an infinity, or None."""
    for rows in _chunks(x):
        finite = x[rows].isfinite().all(1)
        if not finite.all():
            return rows.start + int(finite.logical_not().nonzero()[0])
    return None


def _refuse_bad_rows(bad, start, total, device):
    """Raises on every rank if any has a bad row: None, or its position among this rank's rows."""
    first = int(_over_ranks(torch.tensor(total if bad is None else start + bad, device=device), "MIN"))
    if first < total:
        raise ValueError(f"row {first} of {total} (rows of all ranks, counted from 0) is not finite: it "
                         f"holds a NaN or an infinity")
