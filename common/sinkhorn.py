"""Balanced assignment by Sinkhorn-Knopp: a few steps on a batch (SwAV), or until it is balanced on a data set
(SeLa).

Imports torch alone: one file to lift. Both functions take this rank's samples and balance those of all ranks
together.
"""

import itertools
import math
import warnings

import torch
import torch.distributed as dist

# N samples of this rank, B of a batch or of a piece of the data set, K prototypes or classes, W ranks

FLOOR = -75  # exp(FLOOR) is next to nothing beside 1, but float32 has smaller numbers yet


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Soft codes that spread the samples of all ranks evenly over the prototypes (SwAV, section 3.2 and
    appendix A).

    Starts from exp(scores / epsilon) and alternately gives every prototype the same total mass, over the
    samples of all ranks, and every sample mass 1. Works on logarithms, so it is finite for any epsilon.

    scores: (B, K) similarities of this rank's samples. Samples of all ranks are balanced together. Or (U, B,
        K): U such problems, each by itself, that share the messages to other ranks.
    iterations: rounds; 3 in the paper. 0 gives softmax(scores / epsilon).
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
    """A class for every sample of a data set, such that all classes get about as many samples (SeLa, section
    3.2).

    Finds r and c with which Q_ik = r_k exp(lam * log_probs_ik) c_i has row sums 1/N and column sums 1/K,
    where N counts the samples of all ranks, and gives sample i the class with the largest Q_ik. An iteration
    sets r for the columns, then c for the rows. It is Q that is balanced up to the tolerance, the assignments
    are only roughly; where a network gives all samples the same scores, Q is the same for them too, and so is
    their class.

    log_probs: (N, K) log-probabilities of this rank's samples. For the rule "marginal" logits do as well, as
        c takes up what log_softmax subtracts.
    lam: the sharpness of Q; 25 (ImageNet) or 10 (CIFAR) in the paper.
    rule: "marginal" ends when every column sum is within the share `tolerance` (default 1e-3) of 1/K.
        "reference" starts from c = 1/N and ends as published: when the relative changes of c, looked at in
        every tenth iteration and added up over all samples, are at most `tolerance` (default 0.1, as for
        ImageNet; 0.01 for CIFAR).
    max_iterations: it then ends with a warning, on rank 0.
    init: (K,) log_r to start from, the same on every rank. That of similar scores saves iterations; the
        result is the same.
    in_place: put the matrix where the scores are, so that nothing else of their size is held.
    Returns assignments (N,) int64; log_r (K,), equal on every rank; log_c (N,); iterations. Logarithms, as r
    passes 1e39 with 100 classes already. A factor may move between r and c.
    Raises ValueError, on every rank, if there are fewer samples than classes or a score is not finite.

    The matrix has the dtype promote_types(scores.dtype, float32), r, c and sums over samples are float64
    inside: float64 scores give the published numbers to the last digits, float32 ones the same labels after
    (nearly) as many iterations. An iteration reads the matrix once, and a rank sends K + 1 numbers. Checked
    against sinkhornknopp.py and cifar.py of yukimasano/self-label.
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
    size = max(1, (2**24 if log_probs.is_cuda else 2**20) // K)  # of a piece, read twice: once from the cache
    pieces = [slice(i, i + size) for i in range(0, N, size)]
    with torch.autocast(device.type, enabled=False):
        top = log_probs.amax(1).to(dtype)  # (N,)
        total = _count((lam * (top - log_probs.amin(1))).isfinite(), K)
        log_r = (torch.zeros(K) if init is None else init).to(device, torch.float64)  # (K,)
        log_c, start, off = log_r.new_full((N,), -math.log(total)), 0, math.inf
        if published and init is None and max_iterations > 0:  # the first r is that for c = 1/N
            log_mass = torch.full_like(log_r, -math.inf)
            for rows in pieces:  # tensors kept between the pieces' temporaries would block their memory
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
                mass += sums[rows].reciprocal() @ matrix[rows]  # of float32, added up in float64
            log_mass, low = mass.log(), mass < N * math.exp(FLOOR / 2)
            if low.any():  # what is below the floor may be all that a class has
                log_mass[low] = -math.inf
                for rows in pieces:
                    x = _decode(matrix[rows, low]) - sums[rows, None].log()
                    log_mass[low] = torch.logaddexp(log_mass[low], x.logsumexp(0).double())
            log_c = -(sums.double().log() + log_scale) - math.log(total)
            change = (before - log_c).expm1().abs().sum(0, keepdim=True)
            log_mass, change = _log_sum_over_ranks(torch.cat([log_mass + drift, change.log()])).split([K, 1])
            # Makes the masses add up to 1. With what rounding leaves, r and c would drift apart for ever.
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
                    "a class has a mass that is wrong by the share")
            warnings.warn(f"not balanced after {iterations} iterations: {what} {off:.3g}, not {tolerance:g}: "
                          f"raise max_iterations or tolerance, or lower lam", stacklevel=3)
        assignments = torch.cat([x.mul_(r).argmax(1) for x in matrix.split(size)])  # (N,)
        return assignments, log_r.to(dtype), log_c.to(dtype), iterations


def _encode(x):
    """Logarithms x <= 0 -> exp(x). Below the floor it is a smaller number that tells x, which may matter
    later."""
    # The two meet at the floor. Beyond -1e7 it would be a denormal number, and those are slow.
    return torch.where(x < FLOOR, FLOOR * math.exp(FLOOR) / x.clamp(min=-1e7), x.exp())


def _decode(entries):
    return torch.where(entries < math.exp(FLOOR), FLOOR * math.exp(FLOOR) / entries, entries.log())


def _of_all_ranks(x):
    """What every rank has: (W, *x.shape)."""
    if not dist.is_initialized():
        return x[None]
    found = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(found, x)
    return torch.stack(found)


def _log_sum_over_ranks(log_mass):
    """Logarithm of the sum of what each rank has the logarithm of, element by element."""
    return _of_all_ranks(log_mass).logsumexp(dim=0)


def _count(finite, K):
    """Number of samples of all ranks. Raises on every rank if it is less than K or a sample is not finite."""
    good = int(finite.long().cumprod(0).sum())  # those before the first that is not
    counts, good = _of_all_ranks(torch.tensor([len(finite), good], device=finite.device)).unbind(1)  # (W,)
    total, rank = int(counts.sum()), int((good < counts).int().argmax())
    if total < K:
        raise ValueError(f"balanced assignment needs a sample for each class: {total} samples for {K} "
                         f"classes")
    if good[rank] < counts[rank]:
        raise ValueError(f"row {counts[:rank].sum() + good[rank]} of {total} (rows of all ranks, counted "
                         f"from 0) is not finite: it holds a NaN or an infinity")
    return total
