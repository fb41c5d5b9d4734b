"""Balanced assignment by Sinkhorn-Knopp. Imports torch alone: one file to lift."""

import torch
import torch.distributed as dist


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3):
    """Soft codes that spread the samples of all ranks evenly over the prototypes (SwAV, section 3.2 and appendix A).

    Starts from exp(scores / epsilon) and alternately gives every prototype the same total mass, over the samples of
    all ranks, and every sample mass 1. Works on logarithms, so it is finite for any epsilon.

    scores: (B, K) similarities of this rank's samples. Samples of all ranks are balanced together.
    iterations: rounds; 3 in the paper. 0 gives softmax(scores / epsilon).
    Returns codes (B, K) of this rank's samples: rows sum to 1; the prototypes' masses are equal up to convergence.
    Computes in promote_types(scores.dtype, float32). Checked against main_swav.py of facebookresearch/swav.
    """
    with torch.autocast(scores.device.type, enabled=False):
        log_codes = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon  # (B, K)
        for _ in range(iterations):
            log_codes = log_codes - _log_mass(log_codes)  # every prototype gets the same mass,
            log_codes = log_codes.log_softmax(dim=1)  # then every sample gets mass 1
        return log_codes.softmax(dim=1)


def _log_mass(log_codes):
    """Log of the total mass of every prototype over the samples of all ranks: (B, K) -> (K,)."""
    mass = log_codes.logsumexp(dim=0)
    if dist.is_initialized() and dist.get_world_size() > 1:
        # Gathering the ranks' logarithms takes one collective; a max and then a sum would take two.
        masses = [torch.empty_like(mass) for _ in range(dist.get_world_size())]
        dist.all_gather(masses, mass)
        mass = torch.stack(masses).logsumexp(dim=0)
    return mass
