"""LARC and learning-rate schedules. Needs torch only: copy this one file."""

import math

import torch


class LARC(torch.optim.Optimizer):
    """SGD with momentum whose step for each tensor is proportional to the tensor's own norm.

    For parameter p with gradient g, if both have a norm above 0:
        g <- (g + weight_decay p) * trust_coefficient |p| / (|g| + weight_decay |p| + eps)
    else g is unchanged: neither scaled nor decayed. Then m <- momentum m + g and p <- p - lr m.
    Nothing is excluded: biases and batch-norm parameters are scaled and decayed too. Parameters without a
    gradient are left alone. This is what apex's LARC(clip=False) around torch.optim.SGD computes (LARS, arXiv
    1708.03888).
    """

    def __init__(self, params, lr, momentum=0.9, weight_decay=0.0, trust_coefficient=0.001, eps=1e-8):
        if lr < 0 or not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(f"LARC needs lr >= 0, 0 <= momentum < 1, weight_decay >= 0: got {lr}, "
                             f"{momentum}, {weight_decay}")
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      trust_coefficient=trust_coefficient, eps=eps))

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            grads = [p.grad for p in params]
            decay = group["weight_decay"]
            # A few launches compute all norms and factors: no loop over tensors waits for the device.
            p_norms = torch.stack(torch._foreach_norm(params))
            g_norms = torch.stack(torch._foreach_norm(grads))
            scales = group["trust_coefficient"] * p_norms / (g_norms + decay * p_norms + group["eps"])
            scales = scales.masked_fill(p_norms == 0, 1).masked_fill(g_norms == 0, 0)  # g unchanged
            # Each factor in its tensor's shape and strides, so that one launch updates many tensors.
            sizes = [p.numel() for p in params]
            factors = torch.cat([s.expand(n) for s, n in zip(scales, sizes)]).split(sizes)
            factors = [f.to(p.dtype).as_strided(p.shape, p.stride()) for f, p in zip(factors, params)]
            buffers = []
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers.append(self.state[p]["momentum_buffer"])
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_addcmul_(buffers, torch._foreach_add(grads, params, alpha=decay), factors)
            torch._foreach_add_(params, buffers, alpha=-group["lr"])  # lr after momentum
        return loss


def warmup_cosine(step, steps_per_epoch, epochs, base_lr, final_lr, warmup_epochs, start_lr):
    """Returns the lr of a step (0-based): linear from start_lr to base_lr, then half a cosine to final_lr.

    So base_lr occurs twice, at the end of the warm-up and the start of the cosine, and final_lr is only
    approached, as in main_swav.py of facebookresearch/swav.
    """
    warmup_steps = int(warmup_epochs * steps_per_epoch)
    if step < warmup_steps:
        return start_lr + (base_lr - start_lr) * step / max(1, warmup_steps - 1)
    progress = (step - warmup_steps) / (steps_per_epoch * (epochs - warmup_epochs))
    return final_lr + 0.5 * (base_lr - final_lr) * (1 + math.cos(math.pi * progress))


def drops(step, steps_per_epoch, base_lr, epochs, factor):
    """Returns the lr of a step (0-based): base_lr, multiplied by `factor` at the start of each of `epochs`
    (0-based)."""
    return base_lr * factor ** sum(step >= epoch * steps_per_epoch for epoch in epochs)
