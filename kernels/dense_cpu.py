"""The other half of a ConvMixer layer on the CPU: BatchNorm(GELU(conv)), a conv over all channels.

The stride of the conv is its kernel: pointwise (1 x 1), or a patch embedding (P x P). Autograd
saves x and z, the result of the conv, where three operations would save GELU(z), too.
Channel-major, the conv is one product (see depthwise_cpu.py).
"""
import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from .depthwise_cpu import is_channel_major, laid_out, maps, plan, rows
from .depthwise_op import as_conv_inputs
from .reference import gelu_bn, gelu_bn_backward, laid_out_like


def dense_gelu_bn(x, weight, bias, gamma, beta, mean, var, *, eps):
    """(N, C, H, W) -> y (N, D, H/P, W/P), and the mean and biased variance used, (D,).

    weight (D, C, P, P), stride P; the rest as in `depthwise_gelu_bn`, and autocast casts as it does
    there. There is no second derivative.
    """
    x, weight, bias = as_conv_inputs(x, weight, bias, gamma, beta, mean, var)
    return _DenseGELUBN.apply(x, weight, bias, gamma, beta, mean, var, eps)


class _DenseGELUBN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, mean, var, eps):
        ctx.batch_stats, ctx.eps = mean is None, eps
        ctx.dtypes = [None if t is None else t.dtype for t in (x, weight, bias, gamma, beta)]
        with torch.autocast("cpu", enabled=False):
            z = _conv(x, weight, bias)
            y, mean, var = gelu_bn(rows(z), gamma, beta, mean, var, eps)
        ctx.save_for_backward(x, weight, gamma, z, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return maps(y, z).to(x.dtype), mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *_):
        x, weight, gamma, z, mean, var = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            dy = laid_out(dy.to(z.dtype), is_channel_major(z))
            dz, dgamma, dbeta = gelu_bn_backward(rows(dy), rows(z), gamma, mean, var, ctx.eps,
                                                 ctx.batch_stats)
            dbias = dz.sum((0, 2)).to(mean.dtype)  # summed in float32
            dx, dweight = _conv_backward(maps(dz, z), x, weight, ctx.needs_input_grad[0])
        gradients = [None if dtype is None or gradient is None else gradient.to(dtype)
                     for gradient, dtype in zip((dx, dweight, dbias, dgamma, dbeta), ctx.dtypes,
                                                strict=True)]
        return *gradients, None, None, None


def _conv(x, weight, bias):
    """z (N, D, h, w), in the layout of the depthwise conv that follows it."""
    D, P = len(weight), weight.shape[-1]
    N, h, w = len(x), x.shape[2] // P, x.shape[3] // P
    dtype, channel_major = plan(x.dtype, N, h, w)
    x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    weight = weight.contiguous()  # else z might be in channels_last
    if not by_product(P, dtype, channel_major):
        return laid_out(F.conv2d(x, weight, bias, stride=P), channel_major)
    z = product(weight.flatten(1), patches(x, P), bias)         # (D, Nhw)
    return z.view(D, N, h, w).transpose(0, 1)


def _conv_backward(dz, x, weight, needs_dx):
    """dx, or None, and dweight."""
    original, x, weight = x, x.to(dz.dtype), weight.to(dz.dtype)
    P = weight.shape[-1]
    if not by_product(P, dz.dtype, is_channel_major(dz)) or (P > 1 and needs_dx):
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dz.contiguous(), x.contiguous(), weight.contiguous(), bias_sizes=None, stride=[P, P],
            padding=[0, 0], dilation=[1, 1], transposed=False, output_padding=[0, 0], groups=1,
            output_mask=[needs_dx, True, False])
        return laid_out_like(original, dx) if needs_dx else None, dweight
    N, C, h, w = x.shape
    dz = dz.transpose(0, 1).flatten(1)                          # (D, Nhw)
    dweight = weight_gradient(dz, patches(x, P)).view_as(weight)
    if not needs_dx:
        return None, dweight
    dx = product(weight.flatten(1).t().contiguous(), dz)        # (C, Nhw)
    return laid_out_like(original, dx.view(C, N, h, w).transpose(0, 1)), dweight


def by_product(P, dtype, channel_major):
    """Whether a conv is one product. The weight gradient of a patch embedding (32 images, P = 24,
    two cores with AMX) takes 85 ms by oneDNN's conv in bfloat16, and 2 ms by a product. In float32
    it takes 11 ms either way.
    """
    return channel_major and (P == 1 or dtype == torch.bfloat16)


def patches(x, P):
    """(N, C, H, W) -> (CPP, Nhw): a column for each patch."""
    if P == 1:
        return laid_out(x, True).transpose(0, 1).flatten(1)
    N, C, H, W = x.shape
    h, w = H // P, W // P
    x = x[:, :, :h * P, :w * P].reshape(N, C, h, P, w, P)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(N * h * w, C * P * P).t()


def product(a, b, bias=None):
    """a @ b, plus a bias for each row."""
    if a.dtype == torch.float32:  # by oneDNN, which on AMD's CPUs is twice as fast as MKL
        return F.conv2d(b.view(1, len(b), 1, -1), a[:, :, None, None], bias)[0, :, 0].contiguous()
    return a @ b if bias is None else torch.addmm(bias[:, None], a, b)


def weight_gradient(dz, x):
    """(D, Nhw), (C, Nhw) -> (D, C). For 512 x 512 results in bfloat16 oneDNN uses a single thread:
    9 ms with 16,000 columns. Two halves take 5 ms on two threads.
    """
    if dz.dtype == torch.bfloat16 and len(x) == 512 and torch.get_num_threads() > 1:
        return torch.cat([dz @ half.t() for half in x.chunk(2)], 1)
    return dz @ x.t()
