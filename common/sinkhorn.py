"""Balanced assignment by Sinkhorn-Knopp: a few steps on a batch (SwAV), or until it is balanced on a data set
(SeLa).

Imports torch alone: one file to lift. Both functions take this rank's samples and balance those of all ranks
together.
"""

import math
import warnings

import torch
import torch.distributed as dist

# N samples of this rank, B of a batch or of a piece of the data set, K prototypes or classes


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Soft codes that spread the samples of all ranks evenly over the prototypes (SwAV, section 3.2 and
    appendix A).

    Starts from exp(scores / epsilon) and alternately gives every prototype the same total mass, over the
    samples of all ranks, and every sample mass 1. Works on logarithms, so it is finite for any epsilon.

    scores: (B, K) similarities of this rank's samples. Samples of all ranks are balanced together.
    iterations: rounds; 3 in the paper. 0 gives softmax(scores / epsilon).
    Returns codes (B, K) of this rank's samples: rows sum to 1; the prototypes' masses are equal up to
    convergence. Computes in promote_types(scores.dtype, float32). Checked against main_swav.py of
    facebookresearch/swav.
    """
    with torch.autocast(scores.device.type, enabled=False):
        log_codes = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon  # (B, K)
        for _ in range(iterations):
            # every prototype gets the same mass,
            log_codes = log_codes - _log_sum_over_ranks(log_codes.logsumexp(dim=0))
            log_codes = log_codes.log_softmax(dim=1)  # then every sample gets mass 1
        return log_codes.softmax(dim=1)


@torch.no_grad()
def balanced_assignments(log_probs, lam=25.0, tolerance=None, max_iterations=2000, rule="marginal", *,
                         init=None, hold=True, in_place=False):
    """A class for every sample of a data set, such that all classes get about as many samples (SeLa, section
    3.2).

    Finds r and c with which Q_ik = r_k exp(lam * log_probs_ik) c_i has row sums 1/N and column sums 1/K,
    where N counts the samples of all ranks, and gives sample i the class with the largest Q_ik. An iteration
    sets r for the columns, then c for the rows. It is Q that is balanced up to the tolerance, the assignments
    are only roughly; where a network gives all samples the same scores, Q is the same for them too, and so is
    their class.

    log_probs: (N, K) log-probabilities of this rank's samples. For the rule "marginal" logits do as well, as
        c takes up what log_softmax subtracts. Or a function without arguments that yields them in order as
        chunks (B, K), the same at every call, at least one, if only of 0 rows: lambda: (chunk @ weight.T +
        bias for chunk in features.split(4096)).
    lam: the sharpness of Q; 25 (ImageNet) or 10 (CIFAR) in the paper.
    rule: "marginal" ends when every column sum is within the share `tolerance` (default 1e-3) of 1/K.
        "reference" starts from c = 1/N and ends as published: when the relative changes of c, looked at in
        every tenth iteration and added up over all samples, are at most `tolerance` (default 0.1, as for
        ImageNet; 0.01 for CIFAR).
    max_iterations: it then ends with a warning, on rank 0.
    init: (K,) log_r to start from, the same on every rank. That of similar scores saves iterations; the
    result is the same.
    hold: keep the exponentials, an N x K matrix. False makes them anew in every iteration, several times as
        slow, and keeps nothing but a few numbers for each sample and class.
    in_place: keep them where the scores are, which are overwritten.
    Returns assignments (N,) int64; log_r (K,), equal on every rank; log_c (N,); iterations. Logarithms, as r
    passes 1e39 with 100 classes already. A factor may move between r and c.
    Raises ValueError, on every rank, if there are fewer samples than classes or a score is not finite.

    The matrix has the dtype promote_types(scores.dtype, float32), r, c and sums over samples are float64
    inside: float64 scores give the published numbers to the last digits, float32 ones the same labels after
    (nearly) as many iterations. An iteration reads the matrix once, and ranks exchange K numbers. Checked
    against sinkhornknopp.py and cifar.py of yukimasano/self-label.
    """
    if rule not in ("marginal", "reference"):
        raise ValueError(f'rule is "marginal" or "reference": got {rule!r}')
    if in_place and not hold:
        raise ValueError("in_place=True needs hold=True: scores that are overwritten cannot be read again")
    chunk = next(iter(log_probs()), None) if callable(log_probs) else log_probs
    if chunk is None:
        raise ValueError("balanced assignment needs at least one chunk of scores on every rank, if only one "
                         "of 0 rows")
    K, device = chunk.shape[1], chunk.device
    if init is not None and (init.shape != (K,) or not init.isfinite().all()):
        raise ValueError(f"init needs a finite number for each of {K} classes: got shape {tuple(init.shape)}")
    published = rule == "reference"
    if tolerance is None:
        tolerance = 0.1 if published else 1e-3
    # log r
    f = torch.zeros(K, dtype=torch.float64, device=device) if init is None else init.to(device, torch.float64)
    kernel = _Kernel(log_probs, lam, chunk, hold, in_place, f)
    del chunk
    with torch.autocast(device.type, enabled=False):
        # m are the columns' masses for r and the c that makes the rows right, or for c = 1/N where the
        # published rule starts.
        log_km, log_c = kernel.first(published and init is None)  # log(K m), (K,)
        iterations, off = 0, math.inf if published else _imbalance(log_km)
        while not off <= tolerance and iterations < max_iterations:  # NaN does not end it
            f = f - log_km
            log_km, log_c, change = kernel.balance(f, log_c)
            iterations += 1
            if not published:
                off = _imbalance(log_km)
            elif iterations % 10 == 1:
                off = change
        if not off <= tolerance and _rank() == 0:
            what = "the relative changes of c add up to" if published else "a class has a mass that is wrong by the share"
            more = f"{off:.3g}, not {tolerance:g}: raise max_iterations or tolerance, or lower lam"
            warnings.warn(f"not balanced after {iterations} iterations: {what} {more}", stacklevel=3)
        return kernel.assign(f), f.to(kernel.dtype), log_c.to(kernel.dtype), iterations


def _imbalance(log_km):
    """max |K m - 1|"""
    return float(log_km.expm1().abs().max())


class _Kernel:
    """The matrix exp(lam * scores + base) in pieces, whose every row is divided by its largest entry,
    exp(top).

    Were base always what it was at the start, entries that matter would underflow: r reaches e^90. So base is
    the log r of an earlier iteration, and moves up once r has drifted from it. What is too small to matter
    until then may matter afterwards: see encode. What outlives a pass is allocated before it, a chunk at a
    time: small tensors between the pieces' temporaries would keep the freed memory from being used again.
    """

    def __init__(self, scores, lam, chunk, hold, in_place, base):
        self.dtype = torch.promote_types(chunk.dtype, torch.float32)
        if in_place and chunk.dtype != self.dtype:
            raise ValueError(f"in_place=True needs float32 or float64 scores: got {chunk.dtype}")
        self.scores, self.lam, self.hold, self.in_place = scores, lam, hold, in_place
        self.floor = int(math.log(torch.finfo(self.dtype).tiny)) + 12  # -75 in float32
        # A piece is read twice in an iteration: the second time from the cache, if it has about this many
        # numbers.
        self.rows = max(1, (2**24 if chunk.is_cuda else 2**20) // chunk.shape[1])
        self.base, self.held, self.encoded = base, [], False
        self.numbers = []  # (n, 2) for each chunk: top, and the sum of the row

    def scaled(self):
        """Pieces of lam * scores + base - top, (B, K), and their numbers, (B, 2); they lie where they are
        held, if they are."""
        self.numbers, base = [], self.base.to(self.dtype)
        for chunk in self.scores() if callable(self.scores) else [self.scores]:
            kept = chunk if self.in_place else torch.empty_like(chunk,
                                                                dtype=self.dtype) if self.hold else None
            self.numbers.append(torch.empty(len(chunk), 2, dtype=torch.float64, device=chunk.device))
            for rows in [slice(i, i + self.rows) for i in range(0, len(chunk), self.rows)]:
                x = chunk[rows].to(self.dtype, copy=True) if kept is None else kept[rows]
                if self.hold and not self.in_place:
                    x.copy_(chunk[rows])
                top = x.amax(1, keepdim=True)
                x.sub_(top).mul_(self.lam).add_(base)
                peak = x.amax(1, keepdim=True)
                self.numbers[-1][rows, :1] = top.double().mul_(self.lam).add_(peak)
                yield x.sub_(peak), self.numbers[-1][rows]

    def first(self, uniform):
        """log(K m), (K,), and log c, (N,), for log r = base. uniform: m is that of c = 1/N, not of the c that
        makes the rows right."""
        mass, shift, bad, self.count = torch.zeros_like(self.base), self.base.new_tensor(-math.inf), None, 0
        for x, numbers in self.scaled():
            if bad is None and not (finite := x.amin(1).isfinite()).all():
                bad = self.count + int(finite.logical_not().nonzero()[0])
            block = x.clamp(min=self.floor).exp_()
            if uniform:
                highest = torch.maximum(shift, numbers[:, 0].amax())
                mass = mass * (shift - highest).exp() + (numbers[:, 0] - highest).exp().to(self.dtype) @ block
                shift = highest
            else:
                sums = block.sum(1)  # (B,)
                mass += sums.reciprocal() @ block
                numbers[:, 1] = sums
            self.count += len(x)
            if self.hold:
                self.held.append((x, numbers))
        start, self.total = _place(self.count, mass.device)
        if self.total < len(mass):
            raise ValueError(f"balanced assignment needs a sample for each class: {self.total} samples for "
                             f"{len(mass)} classes")
        _refuse_bad_rows(bad, start, self.total, mass.device)
        log_c = mass.new_full((self.count,), -math.log(self.total)) if uniform else self.log_c()
        log_mass = mass.log() + (shift if uniform and self.count else 0)
        # what was too small to be counted may have been all of a class's mass
        if mass.min() < self.count * math.exp(self.floor / 2):
            log_mass = torch.full_like(mass, -math.inf)
            for x, numbers in self.held or self.scaled():
                log_norm = -numbers[:, :1].to(self.dtype) if uniform else _logsumexp(x, 1)  # (B, 1)
                log_mass = torch.logaddexp(log_mass, _logsumexp(x - log_norm, 0)[0].double())
        return _log_sum_over_ranks(log_mass) + math.log(len(mass) / self.total), log_c

    def log_c(self):
        """Of the c that makes the rows right, from the last sums: (N,)."""
        top, sums = torch.cat([self.base.new_empty(0, 2), *self.numbers]).unbind(1)
        return -(sums.log() + top) - math.log(self.total)

    def encode(self, x):
        """Logarithms x <= 0 -> exp(x), in place; but exp(floor) / (1 + floor - x) below the floor.

        That is next to nothing as well, and can be decoded: nothing is lost, and the scores need not be kept.
        It is also no denormal number, which are slow, for all x > -160,000.
        """
        depth = (self.floor - x).clamp_(0, 160_000).add_(1)
        return x.clamp_(min=self.floor).exp_().div_(depth)

    def decode(self, held):
        return held.clamp(min=math.exp(self.floor)).log_().sub_(
            (math.exp(self.floor) / held).sub_(1).clamp_(min=0))

    def ratios(self, f):
        """log r relative to the base, (K,); moves the base to f if that is far."""
        log_r = f - self.base
        if self.encoded == self.hold and log_r.abs().max() <= -self.floor / 4:
            return log_r  # entries below the floor are still less than exp(floor / 2) of their rows
        for held, numbers in self.held:
            x = (self.decode(held) if self.encoded else held).add_(log_r.to(held.dtype))
            peak = x.amax(1, keepdim=True)
            x = self.encode(x.sub_(peak))
            if self.encoded:
                held.copy_(x)
            numbers[:, :1] += peak
        self.base, self.encoded = f, self.hold
        return torch.zeros_like(f)

    def blocks(self):
        """Pieces of the matrix (B, K), and their numbers (B, 2)."""
        if self.hold:
            yield from self.held
        else:
            for x, numbers in self.scaled():
                yield x.clamp_(min=self.floor).exp_(), numbers

    def balance(self, f, before):
        """One reading of the matrix, for log r = f: log(K m), (K,); log c, (N,); the sum over all samples of
        |before / c - 1|."""
        log_r = self.ratios(f)
        r, mass = log_r.exp().to(self.dtype), torch.zeros_like(f)
        for block, numbers in self.blocks():
            sums = block @ r  # (B,)
            mass += sums.reciprocal() @ block  # (K,), added up in float64
            numbers[:, 1] = sums
        log_c = self.log_c()
        change = (before - log_c).expm1_().abs_().sum()
        mass, change = _over_ranks(torch.cat([mass, change[None]])).split([len(f), 1])
        # These masses add up to 1. Were rounding allowed to change that, r and c would drift apart and the
        # change would not end.
        return (mass.log() + log_r).log_softmax(0) + math.log(len(f)), log_c, float(change)

    def assign(self, f):
        """The class with the largest entry of each row, times r: (N,)."""
        r, y, done = self.ratios(f).exp().to(self.dtype), torch.empty(self.count, dtype=torch.int64,
                                                                      device=f.device), 0
        for block, _ in self.blocks():
            y[done : done + len(block)] = (block * r).argmax(1)
            done += len(block)
        return y


def _logsumexp(x, dim):
    """As torch's, but much faster where exponentials underflow on a CPU; keeps the dimension."""
    top = x.amax(dim, keepdim=True)
    return (x - top).clamp_(min=-80).exp_().sum(dim, keepdim=True).log_().add_(top)


# ---- over ranks


def _rank():
    return dist.get_rank() if dist.is_initialized() else 0


def _world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def _over_ranks(x, op="SUM"):
    if _world_size() > 1:
        dist.all_reduce(x, op=getattr(dist.ReduceOp, op))
    return x


def _log_sum_over_ranks(log_mass):
    """Logarithm of the sum of what each rank has the logarithm of: (K,) -> (K,)."""
    if _world_size() > 1:
        # Gathering the ranks' logarithms takes one collective; a max and then a sum would take two.
        masses = [torch.empty_like(log_mass) for _ in range(_world_size())]
        dist.all_gather(masses, log_mass)
        log_mass = torch.stack(masses).logsumexp(dim=0)
    return log_mass


def _place(count, device):
    """The number of this rank's first row among those of all ranks, and how many there are in all."""
    sizes = torch.zeros(_world_size(), dtype=torch.int64, device=device)
    sizes[_rank()] = count
    _over_ranks(sizes)
    return int(sizes[: _rank()].sum()), int(sizes.sum())


def _refuse_bad_rows(bad, start, total, device):
    """Raises on every rank if any has a bad row: None, or its position among this rank's rows."""
    first = int(_over_ranks(torch.tensor(total if bad is None else start + bad, device=device), "MIN"))
    if first < total:
        raise ValueError(f"row {first} of {total} (rows of all ranks, counted from 0) is not finite: it "
                         f"holds a NaN or an infinity")
