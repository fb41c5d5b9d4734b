"""Measures whether a run is healthy, by the same figures for every method, and writes the log."""

import contextlib
import functools
import json
import math
import os
import sys

import numpy as np
import torch

from .. import distributed
from .errors import ArgumentError, say
from .files import writing

STUCK_STEPS = 1000  # warn after so many steps with a loss of ln K
COLLAPSED_STEPS = 100  # or after so many steps with features that have no spread
STUCK, COLLAPSED = 0.999, 0.05  # loss / ln K is at or above; feature std x sqrt(D) is below (0: all equal)


class Meter:
    """Collects health figures since the last log step, and keeps the last cluster of every image.

    Counts on the device. Only log steps read the counts and sum them over ranks, so no other step waits.
    clusters: K. heads: H. n: images in the data set, 0 to keep no clusters. assignments (H, n) int32: -1 for
    an image not seen yet.
    """

    def __init__(self, clusters, n, heads=1, device=None):
        self.clusters, self.n = clusters, n
        self.assignments = torch.full((heads, n), -1, dtype=torch.int32)  # of past epochs, all ranks
        self.current = torch.full((heads, n), -1, dtype=torch.int32, device=device)  # this epoch, this rank
        self.histogram = torch.zeros(heads, clusters, dtype=torch.float64, device=device)
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # of losses; counts: finite, other
        self.stuck = self.collapsed = self.warned = 0

    @torch.no_grad()
    def count(self, loss, index, assignments):
        """Counts one step. loss: scalar on the device. index (B,): the images. assignments (B,) or (H, B):
        the cluster of one crop of each image, below 0 for none."""
        assignments = assignments.view(-1, len(index))  # (H, B)
        if self.n:
            self.current[:, index.to(self.current.device, non_blocking=True)] = assignments.int()
        self.histogram.scatter_add_(1, assignments.clamp(min=0), (assignments >= 0).to(self.histogram.dtype))
        finite = loss.isfinite()
        self.sums += torch.stack([torch.where(finite, loss, 0), finite, ~finite]).double()

    def mean_loss(self):
        """Returns the mean loss over steps and ranks since the last log step, None if any was not finite."""
        total, finite, broken = distributed.all_sum(self.sums).tolist()
        return None if broken else total / max(1, finite)

    @torch.no_grad()
    def read(self, z):
        """Returns the figures since the last log step and resets them. z (B, D): the last embeddings."""
        log_k = math.log(max(2, self.clusters))
        loss = self.mean_loss()
        counts = distributed.all_sum(self.histogram)  # (H, K)
        share = counts / counts.sum(dim=1, keepdim=True)
        moments = torch.stack([torch.ones_like(z[0]) * len(z), z.sum(0), (z**2).sum(0)]).double()  # (3, D)
        moments = distributed.all_sum(moments)
        variance = moments[2] / moments[0] - (moments[1] / moments[0]) ** 2  # (D,)
        self.histogram.zero_()
        self.sums.zero_()
        return {"loss": loss, "loss_per_ln_k": loss / log_k,
                "clusters_used": (counts > 0).sum(1).double().mean().item(),
                "assignment_entropy": (share * -share.clamp(1e-12).log()).sum(1).mean().abs().item() / log_k,
                "feature_std": math.sqrt(variance.clamp(min=0).mean().item() * z.shape[1])}

    def warning(self, figures, steps):
        """Returns a warning, once per run, if figures stay bad. steps: number since the last figures."""
        self.stuck = self.stuck + steps if figures["loss_per_ln_k"] >= STUCK else 0
        self.collapsed = self.collapsed + steps if figures["feature_std"] < COLLAPSED else 0
        if self.warned or (self.stuck < STUCK_STEPS and self.collapsed < COLLAPSED_STEPS):
            return None
        self.warned = 1
        if self.collapsed >= COLLAPSED_STEPS:
            return f"collapsed: for {self.collapsed} steps all images have had nearly the same embedding"
        return f"stuck: the loss has been ln K for {self.stuck} steps, so nothing is learnt"

    def end_epoch(self, assignments=None):
        """Stores the epoch's assignments. Returns for the first head the number of clusters used and the NMI
        with the epoch before, None where unknown. assignments (H, n), below 0 for none, replace those that
        `count` has collected."""
        if not self.n:
            return {"epoch_clusters_used": None, "nmi_to_previous": None}
        if assignments is not None:
            self.current.copy_(assignments.clamp(min=-1))
        seen = distributed.all_max(self.current).cpu()
        self.current.fill_(-1)
        before, self.assignments = self.assignments, torch.where(seen >= 0, seen, self.assignments)
        old, new = before[0], self.assignments[0]
        both = (old >= 0) & (new >= 0)
        change = nmi(old[both], new[both]) if both.any() else None
        return {"epoch_clusters_used": len(new[new >= 0].unique()), "nmi_to_previous": change}

    def state_dict(self):
        """Returns what all ranks together have counted, equal on every rank."""
        return {"assignments": self.assignments, "current": distributed.all_max(self.current).cpu(),
                "histogram": distributed.all_sum(self.histogram).cpu(),
                "sums": distributed.all_sum(self.sums).cpu(),
                "warnings": [self.stuck, self.collapsed, self.warned]}

    def load_state_dict(self, state):
        self.assignments.copy_(state["assignments"])
        self.current.copy_(state["current"])  # on every rank: the maximum over ranks is read
        if distributed.rank() == 0:  # on one rank: the sum over ranks is read
            self.histogram.copy_(state["histogram"])
            self.sums.copy_(state["sums"])
        self.stuck, self.collapsed, self.warned = state["warnings"]


def mutual_information(a, b):
    """Returns, for two labellings (N,) with any whole numbers, their mutual information and their entropies
    in nats, then how often each value of a, and of b, occurs (NumPy arrays). Raises ValueError."""
    a, b = (torch.as_tensor(x).cpu().numpy() for x in (a, b))
    if a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError("two labellings of the same items, (N,) with N >= 1, are needed: "
                         f"got shapes {a.shape} and {b.shape}")
    (a, size_a), (b, size_b) = (np.unique(x, return_inverse=True, return_counts=True)[1:] for x in (a, b))
    pairs, times = np.unique(a * len(size_b) + b, return_counts=True)
    n, (rows, columns) = len(a), np.divmod(pairs, len(size_b))
    mutual = (times / n * np.log(n * times / (size_a[rows] * size_b[columns]))).sum()
    entropies = (-(size / n * np.log(size / n)).sum() for size in (size_a, size_b))
    return max(0.0, mutual), *entropies, size_a, size_b


def nmi(a, b, geometric=False):
    """Normalised mutual information of two labellings (N,): 0 if independent, 1 if equal up to names.

    It is divided by the arithmetic mean of the entropies, or the geometric one as in DeepCluster's paper.
    """
    mutual, h_a, h_b, size_a, size_b = mutual_information(a, b)
    if len(size_a) == len(size_b) == 1:
        return 1.0
    mean = math.sqrt(h_a * h_b) if geometric else (h_a + h_b) / 2
    return float(mutual / mean) if mean else 0.0


def step_line(record, epochs, total, clusters, left):
    """Formats a step's record for the terminal. left: seconds until the run ends."""
    return (f"epoch {record['epoch']:.2f}/{epochs} step {record['step']}/{total}"
            f" loss {record['loss']:.4f} ({record['loss_per_ln_k']:.3f} ln K) lr {record['lr']:.3g}"
            f" used {record['clusters_used']:.0f}/{clusters} entropy {record['assignment_entropy']:.2f}"
            f" std {record['feature_std']:.2f} {record['images_per_s']:.0f} img/s wait "
            f"{record['data_wait']:.0%}"
            f" left {left // 3600:.0f}:{left // 60 % 60:02.0f}:{left % 60:02.0f}")


class Log:
    """Writes records to metrics.jsonl and TensorBoard, and lines to the terminal. Only rank 0 writes.

    Shows a progress bar on a terminal if tqdm is installed.
    """

    def __init__(self, out, total, tensorboard=False):
        self.path, self.total, self.bar, self.events = out / "metrics.jsonl", total, None, None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ArgumentError("--tensorboard needs: pip install tensorboard") from None
            self.events = functools.cache(lambda: SummaryWriter(out))  # opened at the first record

    def write(self, record, line):
        """Appends one record, which has a "step", and shows one line. Raises OSError if the disk is full."""
        for name, value in record.items():
            if self.events is not None and name not in ("step", "epoch") and value is not None:
                self.events().add_scalar(name, value, record["step"])
        size = self.path.stat().st_size if self.path.exists() else 0
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError:
            os.truncate(self.path, size)  # keep complete lines only
            raise
        finally:
            self.show(line, record["step"])

    def tick(self):
        """Advances the progress bar by one step."""
        if self.bar is not None:
            with contextlib.suppress(OSError):  # the terminal is gone
                self.bar.update()

    def show(self, line, step):
        if self.bar is None and sys.stdout.isatty():
            try:
                from tqdm import tqdm

                self.bar = tqdm(total=self.total, initial=step, unit="step", smoothing=0.05)
            except ImportError:
                pass
        with contextlib.suppress(OSError):
            (say if self.bar is None else self.bar.write)(line)

    def rewind(self, step):
        """Deletes records after the step at which a run resumes, and lines that are not records, such as one
        cut short by a kill. Returns the other records."""
        if not self.path.exists():
            return []
        kept, lines = [], self.path.read_bytes().splitlines(keepends=True)
        for line in lines:
            with contextlib.suppress(Exception):  # a damaged line may raise anything
                record = json.loads(line)
                if record["step"] <= step and line.endswith(b"\n"):
                    kept.append((record, line))
        if len(kept) < len(lines):
            with writing(self.path) as file:
                file.writelines(line for _, line in kept)
        return [record for record, _ in kept]
