"""k-means, nearest centroid and PCA whitening over the rows of all ranks. Needs torch only: copy it.

Every function takes this rank's rows and returns what one process with the rows of all ranks, in rank order,
would return. Ranks may hold different numbers of rows, also none. Products are in promote_types(x.dtype,
float32) and sums of rows in float64, so results hardly depend on the number of ranks.
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
    """Runs Lloyd's algorithm: assigns and averages `iterations` times, then assigns once more.

    Plain: nearest by Euclidean distance; centroid = mean of its rows. Spherical (DeepCluster-v2): largest
    inner product; centroid = mean scaled to unit length; x should have unit rows. An empty cluster keeps its
    centroid if spherical. Otherwise it gets half of another cluster as in faiss (see _reseed), and after the
    last iteration a row far from its centroid (see _fill): none stays empty if enough rows are distinct.

    x: (N, D) this rank's rows, any float type.
    init: (K, D) first centroids, the same on every rank; by default k rows drawn from all ranks' rows.
    generator: for that draw and for re-seeding, in the same state on every rank; by default with seed 0.
    Returns centroids (K, D); assignments (N,) int64 of this rank's rows; counts (K,) int64 over all ranks;
    objective (), the mean over all ranks' rows of the squared distance to the centroid or, if spherical, of
    the inner product with it, for these assignments. All but the assignments are equal on every rank.
    Raises ValueError, on every rank, if there are fewer rows than clusters or a row is not finite.

    Memory beyond x, in bytes for float32: 24 N + 28 K D + 12 C, where C scores are held at a time
    (`held_scores`); no N x K matrix is stored. The products take the time: at most 2 (iterations + 1) N K D
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
    """Finds for every row of x the nearest centroid or, if spherical, the one with the largest inner product.

    x: (N, D). centroids: (K, D), not normalised here.
    Returns assignments (N,) int64, the first among ties; squared distances to these centroids, or inner
    products with them (N,). A row at a centroid has distance 0. Ranks do not communicate.
    """
    with torch.autocast(x.device.type, enabled=False):
        centroids = centroids.to(torch.promote_types(x.dtype, torch.float32))
        assignments = _assign(x, centroids, spherical)
        return assignments, _values(x, centroids, assignments, spherical)


def _values(x, centroids, assignments, spherical):
    """Returns each row's squared distance to its centroid or, if spherical, inner product with it: (N,)."""
    values = centroids.new_empty(len(x))
    for rows in _chunks(x):
        own = centroids[assignments[rows]]  # (B, D)
        values[rows] = (own * x[rows]).sum(1) if spherical else (own - x[rows]).square_().sum(1)
    return values


def _assign(x, centroids, spherical):
    """Computes the assignments of `nearest` by chunks, at little more than the cost of the product."""
    K, D = centroids.shape
    groups = -(-K // GROUP)
    directions = centroids.new_zeros(groups * GROUP, D)
    bias = centroids.new_full((groups * GROUP,), -math.inf)  # padding of the last group never wins
    if spherical:
        directions[:K], bias[:K] = centroids, 0
    else:
        # |x - c|^2 is smallest where x.c - |c|^2 / 2 is largest. With the mean centroid m, this is also where
        # x.(c - m) - (|c|^2 - |m|^2) / 2 is largest, whose rounding errors do not grow with the distance of
        # the data from the origin.
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
        # amax is vectorised; argmax is not, and over all K it takes half as long as the product on a CPU. So
        # find the group with amax first.
        group = block.amax(2).argmax(1)  # (B,)
        within = block[numbers[: len(block)], group].argmax(1)  # (B,)
        torch.add(within, group, alpha=GROUP, out=assignments[rows])
    return assignments.clamp_(max=K - 1)  # in range even for a row that is not finite


def _average(x, assignments, centroids, spherical):
    """Returns new centroids (K, D), unchanged for empty clusters, and counts (K,), over the rows of all
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

    Cluster j with n_j rows is drawn as donor with probability proportional to n_j - 1. Both get the donor's
    centroid, its coordinates times 1 +- 1/1024: signs alternate, and are opposite in the two.
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
    """Moves the centroids of empty clusters, in place, onto rows: each cluster offers the row farthest from
    its centroid, and the farthest of these are taken."""
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
    """Maps x to (x - mean) @ matrix, scaled to unit rows. The columns of matrix are the leading principal
    axes, each divided by its standard deviation, up to one common factor."""

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
    """Projects rows on their `dim` leading principal axes, scales each axis to variance 1, then each row to
    length 1 (DeepCluster).

    x: (N, D) this rank's rows. Returns (N, dim) and the fitted Whitening. fit_whitening takes x in chunks.
    Checked against clustering.py of facebookresearch/deepcluster.
    """
    whitening = fit_whitening((x[rows] for rows in _chunks(x, x.shape[1])), dim)
    y = whitening.mean.new_empty(len(x), dim)
    for rows in _chunks(x, x.shape[1]):
        y[rows] = whitening(x[rows])
    return y, whitening


@torch.no_grad()
def fit_whitening(chunks, dim):
    """Fits a Whitening to rows that come in chunks. Holds two D x D float64 matrices in memory, never all
    rows.

    chunks: iterable of (B, D) tensors, this rank's rows; at least one on every rank, though it may have no
    rows. Axes without variance give zeros: there are some with fewer than dim + 1 rows, or if the rows span
    fewer than dim dimensions. Their eigenvalue is below 4 eps times the largest (5e-7 of it in float32, ten
    times the rounding error of a 0).
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
    offset = _over_ranks(total) / max(1, rows)  # (D,) mean - shift
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
    """Returns how many numbers a temporary may hold: hundreds of rows; on a CPU, its last cache's size."""
    return 2**26 if device.type == "cuda" else 2**23


def _chunks(x, width=None):
    """Returns slices of the rows of x: with `width` numbers per row, a slice has about held_scores numbers.

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
    """Tells whether a equals b on every rank."""
    return not _over_ranks((a != b).any().int(), "MAX")


def _counts(assignments, k):
    """Counts the rows of all ranks in each cluster: (K,) int64."""
    return _over_ranks(torch.bincount(assignments, minlength=k))


def _place(rows, device=None):
    """Returns the number of this rank's first row among the rows of all ranks, and the total of rows."""
    sizes = torch.zeros(_world_size(), dtype=torch.int64, device=device or rows.device)
    rank = dist.get_rank() if dist.is_initialized() else 0
    sizes[rank] = len(rows)
    _over_ranks(sizes)
    return int(sizes[:rank].sum()), int(sizes.sum())


def _rows(x, numbers, start):
    """Returns the rows (n, D) with these numbers (n,) among the rows of all ranks, on every rank."""
    here = (numbers >= start) & (numbers < start + len(x))
    found = torch.zeros(len(numbers), x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32),
                        device=x.device)
    found[here] = x[numbers[here] - start].to(found.dtype)
    return _over_ranks(found)


def _first_bad_row(x):
    """Returns the position of the first row that holds a NaN or an infinity, or None."""
    for rows in _chunks(x):
        finite = x[rows].isfinite().all(1)
        if not finite.all():
            return rows.start + int(finite.logical_not().nonzero()[0])
    return None


def _refuse_bad_rows(bad, start, total, device):
    """Raises on every rank if any has a bad row. bad: its position among this rank's rows, or None."""
    first = int(_over_ranks(torch.tensor(total if bad is None else start + bad, device=device), "MIN"))
    if first < total:
        raise ValueError(f"row {first} of {total} (rows of all ranks, counted from 0) is not finite: it "
                         f"holds a NaN or an infinity")
