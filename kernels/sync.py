"""BatchNorm over the batches of all processes together, for DistributedDataParallel.

Each rank brings its batch down to a count, a mean and a centred sum of squares for each channel; these meet in one all_gather.
Backward, two sums meet in one all_reduce. Batches may differ in size, and be empty. What is gathered is merged in the order of
the ranks, so that all of them have the same bits. Only the default process group is used.
"""
import torch
from torch import distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable


def stats_dtype(x):
    """Statistics are float32, in float64 networks float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def merged(count, mean, m2):
    """Count, mean and sum of squares around the mean of the union of S groups with these, (S, C) each -> (C,) each.

    Chan, Golub & LeVeque 1983, eq. 2.1.
    """
    total = count.sum(0)
    centre = (mean * count).sum(0) / total
    return total, centre, (m2 + count * (mean - centre).square()).sum(0)


def merged_over_ranks(n, mean, m2):
    """The same of the union of all ranks' batches; mean and m2, (C,), are of this rank's n values a channel.

    Raises ValueError where all ranks together have fewer than two.
    """
    own = torch.stack([torch.full_like(mean, n), mean, m2])
    ranks = own.new_empty(dist.get_world_size(), *own.shape)
    dist.all_gather(list(ranks), own)
    count, mean, m2 = merged(*ranks.unbind(1))
    if n < 2 and (count < 2).any():  # a rank that has two need not wait for its GPU to know
        raise ValueError("fewer than two values a channel have no statistics: over all ranks, in training")
    return count, mean, m2


def means_over_ranks(n, *sums):
    """Sums over this rank's n values a channel, (C,) each -> means over the values of all ranks, (C,) each."""
    total = torch.stack([torch.full_like(sums[0], n), *sums])
    dist.all_reduce(total)
    return total[1:] / total[0]


@torch.compiler.disable
def batch_norm(x, gamma, beta, eps):
    """x (N, C, H, W) -> y of its shape and dtype, and mean, biased variance and count of all ranks' values, (C,) each.

    Ioffe & Szegedy 2015; gamma and beta (C,) or None. y has a first derivative: what reaches the statistics of all ranks'
    batches comes back to each, and dgamma and dbeta are of a rank's own batch. Raises ValueError as `merged_over_ranks`.
    """
    return _BatchNorm.apply(x, gamma, beta, eps)


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gamma, beta, eps):
        values, n, channel = x.to(stats_dtype(x)), x.numel() // x.shape[1], (-1, 1, 1)
        mean = values.sum((0, 2, 3)) / max(n, 1)
        y = values - mean.view(channel)
        count, centre, m2 = merged_over_ranks(n, mean, y.square().sum((0, 2, 3)))
        var = m2 / count
        y += (mean - centre).view(channel)
        y *= torch.rsqrt(var + eps).view(channel)
        if gamma is not None:
            y *= gamma.view(channel)
        if beta is not None:
            y += beta.view(channel)
        ctx.save_for_backward(x, gamma, centre, var)
        ctx.eps = eps
        ctx.mark_non_differentiable(centre, var, count)
        return y.to(x.dtype), centre, var, count

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        gradients = batch_norm_backward(dy, *ctx.saved_tensors, ctx.eps)
        return *(gradient if needed else None for gradient, needed in zip(gradients, ctx.needs_input_grad)), None


def batch_norm_backward(dy, x, gamma, mean, var, eps):
    """dx in the dtype of x; dgamma and dbeta of this rank's own values, (C,) each, in the dtype of the statistics."""
    channel, rstd = (-1, 1, 1), torch.rsqrt(var + eps)
    dy = dy.to(mean.dtype)
    xhat = (x - mean.view(channel)) * rstd.view(channel)
    dgamma, dbeta = (dy * xhat).sum((0, 2, 3)), dy.sum((0, 2, 3))
    mean_dyx, mean_dy = means_over_ranks(x.numel() // x.shape[1], dgamma, dbeta)
    scale = rstd if gamma is None else rstd * gamma
    dx = scale.view(channel) * (dy - mean_dy.view(channel) - xhat * mean_dyx.view(channel))
    return dx.to(x.dtype), dgamma, dbeta


@torch.no_grad()
def update_running_stats(bn, mean, var, n):
    """What nn.BatchNorm2d does with a batch of n values a channel, of this mean and biased variance, (C,) each."""
    bn.num_batches_tracked += 1
    for running, batch in ((bn.running_mean, mean), (bn.running_var, var * (n / (n - 1)))):
        running.lerp_(batch.to(running.dtype), 1.0 / bn.num_batches_tracked.to(running.dtype) if bn.momentum is None else bn.momentum)


class SyncBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d that takes its statistics over all ranks in training: PyTorch's nn.SyncBatchNorm, and that on the CPU too.

    It is none, because DistributedDataParallel refuses nn.SyncBatchNorm on the CPU.
    """
    process_group = None  # the default one; this and the next line are what PyTorch's forward asks of `self`
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x):
        if not over_ranks(self):
            return super().forward(x)
        if x.is_cuda:
            return nn.SyncBatchNorm.forward(self, x)
        self._check_input_dim(x)
        y, *stats = batch_norm(x, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None:
            update_running_stats(self, *stats)
        return y


def over_ranks(bn):
    """Whether a BatchNorm takes its statistics over several ranks as things stand: never in eval mode, as PyTorch's."""
    return (isinstance(bn, (SyncBatchNorm, nn.SyncBatchNorm)) and bn.training
            and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def sync_batch_norm(model):
    """Let every nn.BatchNorm2d of `model` take its statistics over all ranks, on any device; how many they are.

    Before or after `fuse`. Each stays the object that it is, in all its places, with its tensors, flags, hooks and state-dict
    keys. Subclasses of nn.BatchNorm2d, which may do more, are left alone.
    """
    found = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for module in found:
        module.__class__ = SyncBatchNorm  # which has no state of its own
    return len(found)
