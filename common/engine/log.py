"""Is the run healthy? Loss against ln K, clusters in use, spread of the features: the same figures for every
method.

Everything is counted on the device and read, summed over ranks, on log steps alone, so a step never waits for
it.
"""

import math

import torch

from .. import distributed

STUCK_STEPS = 1000  # so long at ln K, and the remedies are printed
COLLAPSED_STEPS = 100  # so long without spread in the features, and they are printed too
# loss / ln K at or above; feature std x sqrt(D) below (1: spread over the sphere, 0: all equal)
STUCK, COLLAPSED = 0.999, 0.05


class Meter:
    """Health figures since the last log step, and the cluster that every image was last seen in.

    clusters: K; heads: H; n: images in the data set. assignments (H, n) int32 is -1 where an image was not
    seen yet.
    """

    def __init__(self, clusters, n, heads=1, device=None):
        self.clusters = clusters
        self.assignments = torch.full((heads, n), -1, dtype=torch.int32)  # up to the last epoch, all ranks
        self.current = torch.full((heads, n), -1, dtype=torch.int32, device=device)  # this epoch, this rank
        self.histogram = torch.zeros(heads, clusters, dtype=torch.float64, device=device)
        # loss, finite losses, losses that are not finite
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.stuck = self.collapsed = self.warned = 0

    @torch.no_grad()
    def count(self, loss, index, assignments):
        """One step: loss, a scalar on the device; index (B,) of the images; assignments (B,) or (H, B) of one
        crop of each, below 0 for none."""
        assignments = assignments.view(-1, len(index))  # (H, B)
        self.current[:, index.to(self.current.device, non_blocking=True)] = assignments.int()
        self.histogram.scatter_add_(1, assignments.clamp(min=0), (assignments >= 0).to(self.histogram.dtype))
        finite = loss.isfinite()
        self.sums += torch.stack([torch.where(finite, loss, 0), finite, ~finite]).double()

    def take(self, assignments):
        """Clusters (H, n) of the whole data set, below 0 for none, in place of those that the steps of this
        epoch report."""
        self.current.copy_(assignments.clamp(min=-1))

    def mean_loss(self):
        """Mean loss over steps and ranks since the last log step, or None if any of them was not finite."""
        total, finite, broken = distributed.all_sum(self.sums).tolist()
        return None if broken else total / max(1, finite)

    @torch.no_grad()
    def read(self, z):
        """Figures since the last log step, which start anew. z (B, D): embeddings of the last batch."""
        log_k = math.log(max(2, self.clusters))
        loss = self.mean_loss()
        counts = distributed.all_sum(self.histogram)  # (H, K)
        share = counts / counts.sum(dim=1, keepdim=True)
        moments = distributed.all_sum(torch.stack([torch.ones_like(z[0]) * len(z), z.sum(0),
                                                   (z**2).sum(0)]).double())
        variance = moments[2] / moments[0] - (moments[1] / moments[0]) ** 2  # (D,)
        self.histogram.zero_()
        self.sums.zero_()
        return {"loss": loss, "loss_per_ln_k": loss / log_k,
                "clusters_used": (counts > 0).sum(1).double().mean().item(),
                "assignment_entropy": -(share * share.clamp(min=1e-12).log()).sum(1).mean().item() / log_k,
                "feature_std": math.sqrt(variance.clamp(min=0).mean().item() * z.shape[1])}

    def warning(self, figures, steps):
        """The first time that the figures, read after `steps` more steps, have long been bad: what is wrong.
        Else None."""
        self.stuck = self.stuck + steps if figures["loss_per_ln_k"] >= STUCK else 0
        self.collapsed = self.collapsed + steps if figures["feature_std"] < COLLAPSED else 0
        if self.warned or (self.stuck < STUCK_STEPS and self.collapsed < COLLAPSED_STEPS):
            return None
        self.warned = 1
        if self.collapsed >= COLLAPSED_STEPS:
            return f"collapsed: for {self.collapsed} steps all images have had nearly the same embedding"
        return f"stuck: the loss has been ln K for {self.stuck} steps, so nothing is learnt"

    def end_epoch(self):
        """Takes this epoch's assignments over; returns how many clusters they use and how much they changed
        (first head)."""
        seen = distributed.all_max(self.current).cpu()
        self.current.fill_(-1)
        before, self.assignments = self.assignments, torch.where(seen >= 0, seen, self.assignments)
        old, new = before[0], self.assignments[0]
        both = (old >= 0) & (new >= 0)
        used = len(new[new >= 0].unique())
        return {"epoch_clusters_used": used,
                "nmi_to_previous": nmi(old[both], new[both]) if both.any() else None}

    def state_dict(self):
        """What all ranks counted, the same on every rank."""
        return {"assignments": self.assignments, "current": distributed.all_max(self.current).cpu(),
                "histogram": distributed.all_sum(self.histogram).cpu(), "sums": distributed.all_sum(
                    self.sums).cpu(), "warnings": [self.stuck, self.collapsed, self.warned]}

    def load_state_dict(self, state):
        self.assignments = state["assignments"]
        # on every rank: what counts in the end is the maximum over ranks
        self.current.copy_(state["current"])
        if distributed.rank() == 0:  # on one rank: what counts is the sum
            self.histogram.copy_(state["histogram"])
            self.sums.copy_(state["sums"])
        self.stuck, self.collapsed, self.warned = state["warnings"]


def nmi(a, b):
    """Normalised mutual information of two assignments (N,) >= 0, arithmetic mean of entropies: 0
    independent, 1 equal."""

    def entropy(values):
        share = values.unique(return_counts=True)[1].double() / len(values)
        return -(share * share.log()).sum().item()

    h_a, h_b = entropy(a), entropy(b)
    mutual = h_a + h_b - entropy(a.long() * (int(b.max()) + 1) + b.long())
    return mutual / ((h_a + h_b) / 2) if h_a + h_b > 0 else 1.0
