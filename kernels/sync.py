"""BatchNorm over the batches of all ranks together, for DistributedDataParallel, on any device.

They may differ in size, and be empty. All ranks get the same bits. The group is the default one.
"""
import torch
from torch import distributed as dist
from torch import nn

from .reference import stats_dtype, update_running_stats


class SyncBatchNorm(nn.BatchNorm2d):
    """PyTorch's nn.SyncBatchNorm, also on the CPU: in training, the statistics are of all ranks.

    It is not a subclass of nn.SyncBatchNorm because DistributedDataParallel rejects that on the
    CPU. Raises ValueError if all ranks together have fewer than two values per channel.
    """
    # nn.SyncBatchNorm.forward reads these two from `self`.
    process_group = None  # the default one
    _check_non_zero_input_channels = nn.SyncBatchNorm._check_non_zero_input_channels

    def forward(self, x):
        if not over_ranks(self):
            return super().forward(x)
        if x.is_cuda:
            return nn.SyncBatchNorm.forward(self, x)
        self._check_input_dim(x)
        y, mean, var, count = _batch_norm(x, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None:
            update_running_stats(self, mean, var, count)
        return y


def over_ranks(bn: nn.Module) -> bool:
    """Whether a BatchNorm now takes its statistics over several ranks: never in eval mode."""
    return (isinstance(bn, (SyncBatchNorm, nn.SyncBatchNorm)) and bn.training
            and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)


def sync_batch_norm(model: nn.Module) -> int:
    """Let every nn.BatchNorm2d of `model` take its statistics over all ranks; return their number.

    Call it before or after `fuse`. The modules stay the same objects, with their tensors, flags,
    hooks and state-dict keys. Subclasses of nn.BatchNorm2d may do more, so they do not change.
    """
    found = [module for module in model.modules() if type(module) is nn.BatchNorm2d]
    for module in found:
        module.__class__ = SyncBatchNorm  # which has no state of its own
    return len(found)


@torch.compiler.disable
def _batch_norm(x, gamma, beta, eps):
    """x (N, C, H, W) -> y of its shape and dtype; mean, biased variance (C,), count of all ranks.

    Ioffe & Szegedy 2015. dgamma and dbeta are of this rank's batch.
    """
    values, channel = x.to(stats_dtype(x)), (-1, 1, 1)
    count = torch.tensor(x.numel() / x.shape[1], dtype=torch.float64)
    dist.all_reduce(count)
    if count < 2:
        raise ValueError("BatchNorm in training needs at least two values per channel, over all "
                         f"ranks: it has {count:.0f}")
    mean = _SumOverRanks.apply(values.sum((0, 2, 3))) / count
    y = values - mean.view(channel)
    var = _SumOverRanks.apply(y.square().sum((0, 2, 3))) / count
    y = y * torch.rsqrt(var + eps).view(channel)
    y = y if gamma is None else y * gamma.view(channel)
    y = y if beta is None else y + beta.view(channel)
    return y.to(x.dtype), mean, var, count


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all ranks. Its gradient is the sum of all ranks' gradients."""
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _SumOverRanks.apply(gradient)
