"""torch's kernels for batch norm over ranks, which exist for CUDA alone, in plain operations.

Each takes and returns what the kernel of its name does: statistics in float32 at least, maps in the dtype and
layout of x; shapes and dtypes that the kernel would refuse are refused.
"""

import contextlib
from unittest import mock

import torch

from common import batchnorm


def _dims(x):
    return [d for d in range(x.dim()) if d != 1], [1, -1] + [1] * (x.dim() - 2)


def batch_norm_stats(x, eps):
    """Mean and 1 / standard deviation of each channel, over this rank's rows."""
    var, mean = torch.var_mean(x.to(torch.promote_types(x.dtype, torch.float32)), _dims(x)[0], correction=0)
    return mean, (var + eps).rsqrt()


def batch_norm_gather_stats_with_counts(x, means, inverse_stds, running_mean, running_var, momentum, eps,
                                        counts):
    """Those of all ranks' rows, from each rank's (W, C) and its count (W,); moves the running statistics."""
    assert counts.dtype == running_mean.dtype == running_var.dtype and counts.shape == (len(means),)
    mean, square, n = 0, 0, 0  # Chan's rule: one rank's rows after another join those before them
    for m, inverse_std, count in zip(means, inverse_stds, counts):
        square = square + (inverse_std**-2 - eps) * count + (mean - m) ** 2 * n * count * (1 / (n + count))
        mean, n = (n * mean + count * m) * (1 / (n + count)), n + count
    running_mean.mul_(1 - momentum).add_(mean, alpha=momentum)
    running_var.mul_(1 - momentum).add_(square / (n - 1), alpha=momentum)
    return mean, (square / n + eps).rsqrt()


def batch_norm_elemt(x, weight, bias, mean, inverse_std, eps):
    """Normalises x, and scales and shifts it if there is a weight. eps is in inverse_std already."""
    _, shape = _dims(x)
    y = (x.to(mean.dtype) - mean.view(shape)) * inverse_std.view(shape)
    return (y if weight is None else y * weight.view(shape) + bias.view(shape)).to(x.dtype)


def batch_norm_backward_reduce(grad, x, mean, inverse_std, weight, input_g, weight_g, bias_g):
    """Sums over this rank's rows of grad and of grad (x - mean); gradients of weight and bias."""
    _same_layout(grad, x)
    assert input_g and (weight_g == bias_g == (weight is not None))  # without weight, the kernel has no dtype
    dims, shape = _dims(x)
    grad_sum = grad.to(mean.dtype).sum(dims)
    product_sum = (grad.to(mean.dtype) * (x.to(mean.dtype) - mean.view(shape))).sum(dims)
    if weight is None:
        return grad_sum, product_sum, torch.empty(0), torch.empty(0)
    return grad_sum, product_sum, (product_sum * inverse_std).to(weight.dtype), grad_sum.to(weight.dtype)


def batch_norm_backward_elemt(grad, x, mean, inverse_std, weight, grad_sum, product_sum, counts):
    """Gradient of x, from the sums of all ranks and their counts."""
    _same_layout(grad, x)
    assert counts.dtype == torch.int32 and counts.is_contiguous()  # the kernel reads its memory as it lies
    _, shape = _dims(x)
    n = counts.sum()
    slope = (inverse_std**2 * product_sum / n).view(shape)
    x_grad = grad.to(mean.dtype) - (grad_sum / n).view(shape) - (x.to(mean.dtype) - mean.view(shape)) * slope
    return (x_grad * (inverse_std if weight is None else inverse_std * weight).view(shape)).to(x.dtype)


def _same_layout(grad, x):
    """The fast kernels need it; where it is missing, slow ones run."""
    assert grad.stride() == x.stride() and grad.dtype == x.dtype


KERNELS = [batch_norm_stats, batch_norm_gather_stats_with_counts, batch_norm_elemt,
           batch_norm_backward_reduce, batch_norm_backward_elemt]


@contextlib.contextmanager
def stand_ins():
    """Batch norm over ranks as on CUDA, on a CPU: its own class, with these functions for the kernels."""
    with contextlib.ExitStack() as stack:
        for kernel in KERNELS:
            stack.enter_context(mock.patch.object(torch, kernel.__name__, kernel))
        stack.enter_context(mock.patch.object(batchnorm, "_PlainBatchNorm", batchnorm._NativeBatchNorm))
        yield
