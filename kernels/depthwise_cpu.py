"""The fused block on the CPU, made of PyTorch's fast operators.

- PyTorch's depthwise backward is slow, its forward is fast. Both gradients of a same-padded,
  stride-1 depthwise conv are such convs themselves: the input's with the kernel turned by 180
  degrees, the weight's of x with dz as its kernel, one "channel" for each pair (n, c).
- Half of a BatchNorm's forward is its statistics; row sums and row norms of the centred activation
  take a third of that.
- float16 and bfloat16 are computed in float32 and rounded once at the end: their convs are thirty
  times slower on the CPU.

Measured against plain PyTorch: results/kernels-cpu/kernels.json.
"""
import torch
from torch.nn import functional as F

from .reference import conv, laid_out_like, stats_dtype


def forward(x, weight, bias, gamma, beta, mean, var, eps, residual):
    """As reference.forward, without a gradient: one new activation, and passes over it in place."""
    plain, weight, bias, gamma, beta, mean, var = _computed_in(
        stats_dtype(x), x, weight, bias, gamma, beta, mean, var)
    N, C, H, W = x.shape
    channel = (C, 1, 1)
    y = torch.ops.aten.gelu_(conv(plain, weight, bias))
    if mean is None:
        n = N * H * W
        mean = y.sum((0, 2, 3)) / n
        y -= mean.view(channel)
        var = torch.linalg.vector_norm(y.view(N, C, H * W), dim=2).square_().sum(0) / n
    else:
        y -= mean.view(channel)
    scale = torch.rsqrt(var + eps) if gamma is None else torch.rsqrt(var + eps) * gamma
    if beta is None:
        y *= scale.view(channel)
    else:
        torch.addcmul(beta.view(channel), y, scale.view(channel), out=y)
    if residual:
        y += plain
    return laid_out_like(x, y), mean, var


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats):
    """As reference.backward."""
    original = x
    dy, x, weight, bias, gamma = _computed_in(stats_dtype(x), dy, x, weight, bias, gamma)
    z = conv(x, weight, bias)
    gamma = torch.ones_like(mean) if gamma is None else gamma
    dz, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, F.gelu(z), gamma, mean, var, mean, torch.rsqrt(var + eps), batch_stats, eps,
        [True, True, True])
    torch.ops.aten.gelu_backward.grad_input(dz, z, grad_input=dz)
    dx, dweight = conv_backward(dz, x, weight)
    if residual:
        dx += dy
    return laid_out_like(original, dx), dweight, dz.sum((0, 2, 3)), dgamma, dbeta


def conv_backward(dz: torch.Tensor, x: torch.Tensor, weight: torch.Tensor):
    """dx and dweight of the depthwise conv, each by a depthwise conv; all contiguous."""
    N, C, H, W = x.shape
    K = weight.shape[-1]
    dx = conv(dz, weight.flip(2, 3), None)
    x, dz = x.view(1, N * C, H, W), dz.view(N * C, 1, H, W)
    dweight = F.conv2d(x, dz, padding=K // 2, groups=N * C)  # (1, N * C, K, K)
    return dx, dweight.view(N, C, 1, K, K).sum(0)


def _computed_in(dtype, *tensors):
    return [None if t is None else t.to(dtype).contiguous() for t in tensors]
