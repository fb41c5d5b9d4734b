"""Batch norm and dropout over the rows of all ranks; `parallel` prepares a model for training with them."""

import warnings

import torch
import torch.nn.functional as F
from torch import nn

from .distributed import all_sum, gather_rows, rank, world_size
from .engine.errors import ArgumentError


class _PlainBatchNorm(torch.autograd.Function):
    """Normalises with the statistics of all ranks' rows: one all-reduce forward and one backward."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        dims = [d for d in range(x.dim()) if d != 1]
        exact = torch.promote_types(x.dtype, torch.float32)  # float32 for bfloat16 input
        mean = var = x.new_zeros(x.shape[1], dtype=exact)
        if x.numel():
            var, mean = torch.var_mean(x.to(exact), dims, correction=0)  # (C,) (C,)
        # Moments about zero add up over ranks; float64 keeps the difference below exact.
        mean, var, count = mean.double(), var.double(), x.numel() // x.shape[1]
        # `count` is no tensor: torch.compile would share it between layers and write the sum into it.
        moments = torch.cat([mean, var + mean**2]) * count
        moments = all_sum(F.pad(moments, (0, 1), value=count))  # (2C+1,)
        count = moments[-1]
        mean, square = (moments[:-1] / count).chunk(2)  # (C,) (C,)
        var = (square - mean**2).clamp_(min=0)
        mean, var = mean.to(exact), var.to(exact)
        unbiased = var * (count / (count - 1)).to(exact)
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        ctx.save_for_backward(x, weight, mean, (var + eps).rsqrt(), count.to(exact))
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, inverse_std, count = ctx.saved_tensors
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1] + [1] * (x.dim() - 2)
        grad_exact = grad.to(mean.dtype)
        normalized = (x.to(mean.dtype) - mean.view(shape)) * inverse_std.view(shape)
        bias_grad = grad_exact.sum(dims)  # (C,)
        weight_grad = (grad_exact * normalized).sum(dims)  # (C,)
        bias_mean, weight_mean = (all_sum(torch.cat([bias_grad, weight_grad])) / count).chunk(2)
        x_grad = grad_exact - bias_mean.view(shape) - normalized * weight_mean.view(shape)
        x_grad = x_grad * (inverse_std if weight is None else inverse_std * weight).view(shape)
        if weight is None:
            weight_grad = bias_grad = None
        else:
            weight_grad, bias_grad = weight_grad.to(weight.dtype), bias_grad.to(weight.dtype)
        return x_grad.to(x.dtype), weight_grad, bias_grad, None, None, None, None


class _NativeBatchNorm(torch.autograd.Function):
    """Does the same with torch's CUDA kernels, as torch.nn.SyncBatchNorm does: one all-gather forward, one
    all-reduce backward. Each rank must have rows: to leave out empty ranks would mean to wait for the GPU."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps):
        if not x.numel():
            raise ValueError(f"batch norm on a GPU needs rows on every rank: rank {rank()} has none")
        x = x.contiguous(memory_format=_layout(x))
        mean, inverse_std = torch.batch_norm_stats(x, eps)  # (C,) (C,) of this rank
        count = mean.new_full((1,), x.numel() // x.shape[1])
        of_ranks = gather_rows(torch.cat([mean, inverse_std, count])[None], equal=True)  # (W, 2C+1)
        means, inverse_stds, counts = of_ranks.split([len(mean), len(mean), 1], dim=1)
        mean, inverse_std = torch.batch_norm_gather_stats_with_counts(
            x, means, inverse_stds, running_mean, running_var, momentum, eps, counts[:, 0])
        ctx.save_for_backward(x, weight, mean, inverse_std, counts[:, 0].to(torch.int32))
        return torch.batch_norm_elemt(x, weight, bias, mean, inverse_std, eps)

    @staticmethod
    def backward(ctx, grad):
        x, weight, mean, inverse_std, counts = ctx.saved_tensors
        grad, affine = grad.contiguous(memory_format=_layout(x)), weight is not None
        grad_sum, product_sum, weight_grad, bias_grad = torch.batch_norm_backward_reduce(
            grad, x, mean, inverse_std, weight, True, affine, affine)
        grad_sum, product_sum = all_sum(torch.cat([grad_sum, product_sum])).chunk(2)  # (C,) (C,)
        x_grad = torch.batch_norm_backward_elemt(
            grad, x, mean, inverse_std, weight, grad_sum, product_sum, counts)
        return x_grad, *((weight_grad, bias_grad) if affine else (None, None)), None, None, None, None


def _layout(x):
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


class SyncBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm1d/2d over the rows of all ranks. Unlike torch.nn.SyncBatchNorm, it works on CPUs too and does
    not wait for the GPU.

    In a single process and in eval mode it is the native batch norm. State-dict keys are those of
    nn.BatchNorm2d.
    """

    def _check_input_dim(self, x):
        if x.dim() < 2:
            raise ValueError(f"SyncBatchNorm needs (B, C, ...), got {x.dim()} dimensions")

    def forward(self, x):
        if not self.training or world_size() == 1:
            return super().forward(x)
        if self.num_batches_tracked is not None:
            self.num_batches_tracked += 1
        # None: average over all batches, as in nn.BatchNorm2d; this reads their number from the GPU
        momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
        # torch.compile fuses plain operations, and does not know the native kernels' output shapes
        native = x.is_cuda and not torch.compiler.is_compiling()
        function = _NativeBatchNorm if native else _PlainBatchNorm
        return function.apply(x, self.weight, self.bias, self.running_mean, self.running_var, momentum,
                              self.eps)

    @classmethod
    def convert(cls, module):
        """Replaces every BatchNorm1d/2d inside module, keeping parameters and buffers; returns module.

        Raises ArgumentError for other batch norms: what they do besides, like an activation, would be lost.
        """
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            synced = cls(module.num_features, module.eps, module.momentum, module.affine)
            synced.weight, synced.bias = module.weight, module.bias
            synced.running_mean, synced.running_var = module.running_mean, module.running_var
            synced.num_batches_tracked = module.num_batches_tracked
            return synced
        batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batch_norm and not isinstance(module, (cls, nn.SyncBatchNorm)):
            known = "several processes can share only the batch norms nn.BatchNorm1d and nn.BatchNorm2d"
            raise ArgumentError(f"--arch holds {type(module).__name__}: {known}")
        for name, child in module.named_children():
            setattr(module, name, cls.convert(child))
        return module


class Dropout(nn.Dropout):
    """Draws the dropout mask of all ranks' rows and takes this rank's part: the same result as in one
    process.

    Every rank's generator must be in the same state, and all ranks' rows, concatenated, must be the batch of
    one process: this holds for one crop per image.
    """

    def shape(self, x):
        """Returns the shape of the mask of one row."""
        return x.shape[1:]

    def forward(self, x):
        if not self.training or self.p == 0:
            return x
        draws = torch.rand(world_size() * len(x), *self.shape(x), device=x.device)
        return x * (draws[rank() * len(x) :][: len(x)] >= self.p) / (1 - self.p)


class Dropout2d(Dropout):
    """Drops whole channels."""

    def shape(self, x):
        return (x.shape[1], *[1] * (x.dim() - 2))


def share_dropout(module):
    """Replaces every nn.Dropout and nn.Dropout2d inside module by those above; returns module."""
    for name, child in module.named_children():
        if isinstance(child, (nn.Dropout2d, Dropout2d)):
            child = Dropout2d(child.p)
        else:
            child = Dropout(child.p) if isinstance(child, nn.Dropout) else share_dropout(child)
        setattr(module, name, child)
    return module


def parallel(model):
    """Returns the model to train, with shared dropout. With several processes it also has synced batch norm
    and is wrapped in DistributedDataParallel."""
    model = share_dropout(model)
    if world_size() == 1:
        return model
    model = SyncBatchNorm.convert(model)
    # Synced statistics make the buffers equal on all ranks already, so they are not broadcast.
    with warnings.catch_warnings():
        # new torch deprecates broadcast_buffers, old torch has no other name
        warnings.simplefilter("ignore", FutureWarning)
        return nn.parallel.DistributedDataParallel(model, broadcast_buffers=False,
                                                   gradient_as_bucket_view=True)
