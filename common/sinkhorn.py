"""Balanced assignment by Sinkhorn-Knopp: a few iterations on a batch (SwAV), or until convergence on a data
set (SeLa).

Needs torch only: copy this one file. Both functions take this rank's samples and balance the samples of all
ranks together.
"""

import itertools
import math
import warnings

import torch
import torch.distributed as dist

# N samples of this rank, B of a batch or of a piece of the data set, K prototypes or classes, W ranks

FLOOR = -75  # exp(FLOOR) is negligible beside 1, and float32 still has smaller numbers


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Returns soft codes that spread the samples of all ranks evenly over the prototypes (SwAV, section 3.2
    and appendix A).

    Starts from exp(scores / epsilon) and alternately gives every prototype the same total mass, over the
    samples of all ranks, and every sample mass 1. Works on logarithms, so it is finite for any epsilon.

    scores: (B, K) similarities of this rank's samples. Samples of all ranks are balanced together. (U, B,
        K): U separate problems, solved at once to send fewer messages between ranks.
    iterations: 3 in the paper; 0 gives softmax(scores / epsilon).
    Returns codes of this rank's samples, in the shape of scores: rows sum to 1; the prototypes' masses are
    equal up to convergence. Computes in promote_types(scores.dtype, float32). Checked against main_swav.py of
    facebookresearch/swav.
    """
    with torch.autocast(scores.device.type, enabled=False):
        log_codes = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon  # ([U,] B, K)
        for _ in range(iterations):
            # every prototype gets the same mass,
            log_codes = log_codes - _log_sum_over_ranks(log_codes.logsumexp(dim=-2)).unsqueeze(-2)
            log_codes = log_codes.log_softmax(dim=-1)  # then every sample gets mass 1
        return log_codes.softmax(dim=-1)


@torch.no_grad()
def balanced_assignments(log_probs, lam=25.0, tolerance=None, max_iterations=2000, rule="marginal", *,
                         init=None, in_place=False):
    """Assigns a class to every sample of a data set, such that all classes get about equally many samples
    (SeLa, section 3.2).

    Finds r and c such that Q_ik = r_k exp(lam * log_probs_ik) c_i has row sums 1/N and column sums 1/K, where
    N counts the samples of all ranks, and assigns sample i to the class with the largest Q_ik. An iteration
    sets r to balance the columns, then c to balance the rows. Q is balanced up to the tolerance, the classes
    only roughly: if a network gives all samples the same scores, their rows of Q are equal, and all get the
    same class.

    log_probs: (N, K) log-probabilities of this rank's samples. The rule "marginal" takes logits as well,
        since c absorbs what log_softmax subtracts.
    lam: the sharpness of Q; 25 (ImageNet) or 10 (CIFAR) in the paper.
    rule: "marginal" stops when the relative error of every column sum is at most `tolerance` (default 1e-3).
        "reference" starts from c = 1/N and stops as published: when the relative changes of c, checked in
        every tenth iteration and summed over all samples, are at most `tolerance` (default 0.1, as for
        ImageNet; 0.01 for CIFAR).
    max_iterations: after these it stops with a warning, on rank 0.
    init: (K,) log_r to start from, the same on every rank. The log_r of similar scores saves iterations; the
        result is the same.
    in_place: overwrite log_probs with the matrix, so that no second tensor of its size is needed.
    Returns assignments (N,) int64; log_r (K,), equal on every rank; log_c (N,); iterations. r and c are given
    as logarithms, since r exceeds 1e39 with only 100 classes. A factor may move between r and c.
    Raises ValueError, on every rank, if there are fewer samples than classes or a score is not finite.

    The matrix has the dtype promote_types(scores.dtype, float32); r, c and sums over samples are float64
    inside. So float64 scores give the published numbers to the last digits, float32 scores the same labels
    after (nearly) as many iterations. Per iteration a rank reads the matrix once and sends K + 1 numbers.
    Checked against sinkhornknopp.py and cifar.py of yukimasano/self-label.
    """
    (N, K), device, published = log_probs.shape, log_probs.device, rule == "reference"
    dtype = torch.promote_types(log_probs.dtype, torch.float32)
    if rule not in ("marginal", "reference"):
        raise ValueError(f'rule is "marginal" or "reference": got {rule!r}')
    if in_place and log_probs.dtype != dtype:
        raise ValueError(f"in_place=True needs float32 or float64 scores: got {log_probs.dtype}")
    if init is not None and (init.shape != (K,) or not init.isfinite().all()):
        raise ValueError(f"init needs a finite number for each of {K} classes: got shape {tuple(init.shape)}")
    if tolerance is None:
        tolerance = 0.1 if published else 1e-3
    size = max(1, (2**24 if log_probs.is_cuda else 2**20) // K)  # rows per piece: read twice, once from cache
    pieces = [slice(i, i + size) for i in range(0, N, size)]
    with torch.autocast(device.type, enabled=False):
        top = log_probs.amax(1).to(dtype)  # (N,)
        total = _count((lam * (top - log_probs.amin(1))).isfinite(), K)
        log_r = (torch.zeros(K) if init is None else init).to(device, torch.float64)  # (K,)
        log_c, start, off = log_r.new_full((N,), -math.log(total)), 0, math.inf
        if published and init is None and max_iterations > 0:  # the first r is that for c = 1/N
            log_mass = torch.full_like(log_r, -math.inf)
            for rows in pieces:  # in place: new tensors among the temporaries would fragment memory
                torch.logaddexp(log_mass, (lam * log_probs[rows].to(dtype)).logsumexp(0), out=log_mass)
            log_r, start = math.log(total / K) - _log_sum_over_ranks(log_mass), 1
        # Holds exp(lam * log_probs + base - log_scale), (N, K): the largest entry of every row is 1.
        matrix = log_probs if in_place else log_r.new_empty(N, K, dtype=dtype)
        base, log_scale, sums = torch.zeros_like(log_r), lam * top.double(), torch.empty_like(top)
        for iterations in itertools.count(start):
            before, drift, first = log_c, log_r - base, iterations == start
            if first or drift.abs().max() > -FLOOR / 4:  # moves the base before float32 under- or overflows
                for rows in pieces:
                    x = lam * (log_probs[rows] - top[rows, None]) if first else _decode(matrix[rows])
                    x += drift.to(dtype)  # (B, K)
                    peak = x.amax(1)  # (B,)
                    matrix[rows] = _encode(x.sub_(peak[:, None]))
                    log_scale[rows] += peak
                base, drift = log_r, torch.zeros_like(drift)
            r, mass = drift.exp().to(dtype), torch.zeros_like(drift)
            for rows in pieces:
                sums[rows] = matrix[rows] @ r
                mass += sums[rows].reciprocal() @ matrix[rows]  # float32 products, summed in float64
            log_mass, low = mass.log(), mass < N * math.exp(FLOOR / 2)
            if low.any():  # entries below the floor may be a class's whole mass
                log_mass[low] = -math.inf
                for rows in pieces:
                    x = _decode(matrix[rows, low]) - sums[rows, None].log()
                    log_mass[low] = torch.logaddexp(log_mass[low], x.logsumexp(0).double())
            log_c = -(sums.double().log() + log_scale) - math.log(total)
            change = (before - log_c).expm1().abs().sum(0, keepdim=True)
            log_mass, change = _log_sum_over_ranks(torch.cat([log_mass + drift, change.log()])).split([K, 1])
            # Scales the masses to sum to 1. Otherwise rounding errors would let r and c drift apart for ever.
            log_km = log_mass.log_softmax(0) + math.log(K)
            if not published:
                off = float(log_km.expm1().abs().max())
            elif iterations % 10 == 1:
                off = float(change.exp())
            if off <= tolerance or iterations >= max_iterations:
                break
            log_r = log_r - log_km
        if not off <= tolerance and (not dist.is_initialized() or dist.get_rank() == 0):
            what = ("the relative changes of c add up to" if published else
                    "the largest relative error of a class's mass is")
            warnings.warn(f"not balanced after {iterations} iterations: {what} {off:.3g}, not {tolerance:g}: "
                          f"raise max_iterations or tolerance, or lower lam", stacklevel=3)
        assignments = torch.cat([x.mul_(r).argmax(1) for x in matrix.split(size)])  # (N,)
        return assignments, log_r.to(dtype), log_c.to(dtype), iterations


def _encode(x):
    """Encodes logarithms x <= 0 as exp(x), those below the floor as smaller numbers that still tell x, which
    may matter later."""
    # The two agree at the floor. Below -1e7 the number would be denormal, which is slow.
    return torch.where(x < FLOOR, FLOOR * math.exp(FLOOR) / x.clamp(min=-1e7), x.exp())


def _decode(entries):
    return torch.where(entries < math.exp(FLOOR), FLOOR * math.exp(FLOOR) / entries, entries.log())


def _of_all_ranks(x):
    """Gathers x of every rank: (W, *x.shape)."""
    if not dist.is_initialized():
        return x[None]
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return torch.stack(found)


def _log_sum_over_ranks(log_mass):
    """Returns the logarithm of the sum of exp(log_mass) over ranks, element by element."""
    return _of_all_ranks(log_mass).logsumexp(dim=0)


def _count(finite, K):
    """Counts the samples of all ranks. Raises on every rank if they are fewer than K or one is not finite."""
    good = int(finite.long().cumprod(0).sum())  # rows before the first that is not
    counts, good = _of_all_ranks(torch.tensor([len(finite), good], device=finite.device)).unbind(1)  # (W,)
    total, rank = int(counts.sum()), int((good < counts).int().argmax())
    if total < K:
        raise ValueError(f"balanced assignment needs a sample for each class: {total} samples for {K} "
                         f"classes")
    if good[rank] < counts[rank]:
        raise ValueError(f"row {counts[:rank].sum() + good[rank]} of {total} (rows of all ranks, counted "
                         f"from 0) is not finite: it holds a NaN or an infinity")
    return total
