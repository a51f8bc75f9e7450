"""The block that the other files make fast, in plain PyTorch: the definition, on any device and in any float dtype.

y = BatchNorm(GELU(depthwise_conv(x, weight) + bias)) (+ x): the token mixer of ConvMixer, Trockman & Kolter 2023, eq. 2.
depthwise_cpu.py and depthwise_launch.py have the same two functions. Where those cannot run, these do.
"""
import torch
from torch.nn import functional as F

from .sync import batch_norm, batch_norm_backward, stats_dtype


def forward(x, weight, bias, gamma, beta, mean, var, eps, residual, sync=False):
    """(N, C, H, W) -> y of the same shape, and the mean and the biased variance that it was normalised with, (C,) each.

    weight (C, 1, K, K), K odd, zero padding K // 2, stride 1; bias (C,) or None; exact (erf) GELU; BatchNorm over
    (N, H, W), Ioffe & Szegedy 2015, with scale gamma and shift beta, (C,) or None. mean and var None: this batch's own are
    taken, as in training; with `sync` those of the batches of all ranks together, and a fourth result is how many values a
    channel that is, (C,). Differentiable, with `sync` once. Raises ValueError where a batch has a single value a channel.
    """
    g = F.gelu(conv(x, weight, bias))
    gamma, beta, mean, var = (None if t is None else t.to(stats_dtype(x)) for t in (gamma, beta, mean, var))
    if sync:
        y, *stats = batch_norm(g, gamma, beta, eps)
        return (y + x if residual else y), *stats
    if mean is None:
        n = g.numel() // g.shape[1]
        mean, var = (torch.zeros(g.shape[1], dtype=stats_dtype(x), device=x.device) for _ in range(2))
        # momentum 1 leaves the batch's own statistics in the buffers, the variance unbiased
        y = F.batch_norm(g, mean, var, gamma, beta, training=True, momentum=1.0, eps=eps)
        var = var * ((n - 1) / max(n, 1))
    else:
        y = F.batch_norm(g, mean, var, gamma, beta, training=False, eps=eps)
    return (y + x if residual else y), mean, var


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats, sync=False):
    """dx, dweight, dbias, dgamma, dbeta, the last four in the dtype of the statistics, with conv and GELU done again.

    `batch_stats` says that mean and var were the batch's own, and so depend on x; `sync`, that they were those of all ranks:
    each rank's gradients come through its own batch, and add up to those of the whole.
    """
    C, K = weight.shape[0], weight.shape[-1]
    z = conv(x, weight, bias)
    gamma = torch.ones_like(mean) if gamma is None else gamma.to(mean.dtype)
    if sync:
        dg, dgamma, dbeta = batch_norm_backward(dy, F.gelu(z), gamma, mean, var, eps)
    else:
        dg, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
            dy.contiguous(), F.gelu(z), gamma, mean, var, mean, torch.rsqrt(var + eps), batch_stats, eps, [True] * 3)
    dz = torch.ops.aten.gelu_backward(dg, z)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dz, x, weight, [C], [1, 1], [K // 2, K // 2], [1, 1], False, [0, 0], C, [True] * 3)
    return (dx + dy if residual else dx), dweight.to(mean.dtype), dbias.to(mean.dtype), dgamma, dbeta


def conv(x, weight, bias):
    """Depthwise, stride 1, "same" zero padding."""
    return F.conv2d(x, weight, None if bias is None else bias.to(x.dtype), padding=weight.shape[-1] // 2, groups=weight.shape[0])


def laid_out_like(x, t):
    """t in the dtype and the memory layout that torch.empty_like gives x."""
    out = torch.empty_like(x)
    return t if (out.stride(), out.dtype) == (t.stride(), t.dtype) else out.copy_(t)
