"""The definition of the fused unit in plain PyTorch, on any device and in any float dtype.

y = BatchNorm(GELU(depthwise_conv(x, weight) + bias)) (+ x)

This is the token mixer of ConvMixer, Trockman & Kolter 2023, eq. 2. depthwise_cpu.py and
depthwise_launch.py have the same two functions. Where those cannot run, these do.
"""
import torch
from torch.nn import functional as F


def forward(x, weight, bias, gamma, beta, mean, var, eps, residual):
    """(N, C, H, W) -> y of the same shape, and the mean and biased variance it used, (C,) each.

    weight (C, 1, K, K), K odd, zero padding K // 2, stride 1; bias (C,) or None; exact (erf) GELU.
    BatchNorm over (N, H, W), Ioffe & Szegedy 2015, with scale gamma and shift beta, (C,) or None.
    If mean and var are None, it uses those of this batch, as in training. Differentiable. Raises
    ValueError for a batch with a single value per channel.
    """
    y, mean, var = gelu_bn(conv(x, weight, bias), gamma, beta, mean, var, eps)
    return (y + x if residual else y), mean, var


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats):
    """dx, dweight, dbias, dgamma, dbeta, the last four in the dtype of the statistics.

    `batch_stats`: mean and var came from this batch, so they depend on x.
    """
    C, K = weight.shape[0], weight.shape[-1]
    dz, dgamma, dbeta = gelu_bn_backward(dy.contiguous(), conv(x, weight, bias), gamma, mean, var,
                                         eps, batch_stats)
    dx, dweight, dbias = torch.ops.aten.convolution_backward(
        dz, x, weight, [C], [1, 1], [K // 2, K // 2], [1, 1], False, [0, 0], C, [True, True, True])
    dx = dx + dy if residual else dx
    return dx, dweight.to(mean.dtype), dbias.to(mean.dtype), dgamma, dbeta


def gelu_bn(z, gamma, beta, mean, var, eps):
    """BatchNorm(GELU(z)), its mean and biased variance: z (N, C, ...), the rest (C,) or None."""
    dtype = stats_dtype(z)
    g = F.gelu(z)
    gamma, beta, mean, var = (None if t is None else t.to(dtype) for t in (gamma, beta, mean, var))
    if mean is not None:
        return F.batch_norm(g, mean, var, gamma, beta, training=False, eps=eps), mean, var
    n = g.numel() // g.shape[1]
    mean, var = (torch.zeros(g.shape[1], dtype=dtype, device=z.device) for _ in range(2))
    # Momentum 1 leaves the batch's own statistics in the buffers, the variance unbiased.
    y = F.batch_norm(g, mean, var, gamma, beta, training=True, momentum=1.0, eps=eps)
    return y, mean, var * ((n - 1) / max(n, 1))


def gelu_bn_backward(dy, z, gamma, mean, var, eps, batch_stats):
    """dz, dgamma, dbeta of `gelu_bn`."""
    gamma = torch.ones_like(mean) if gamma is None else gamma.to(mean.dtype)
    dz, dgamma, dbeta = torch.ops.aten.native_batch_norm_backward(
        dy, F.gelu(z), gamma, mean, var, mean, torch.rsqrt(var + eps), batch_stats, eps,
        [True, True, True])
    torch.ops.aten.gelu_backward.grad_input(dz, z, grad_input=dz)
    return dz, dgamma, dbeta


def conv(x, weight, bias):
    """Depthwise, stride 1, "same" zero padding."""
    bias = None if bias is None else bias.to(x.dtype)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=weight.shape[0])


def stats_dtype(x):
    """Statistics are float32, or float64 in a float64 network."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# What both halves of a layer need, whatever runs them

def as_conv_inputs(x, weight, bias, *others):
    """x, weight and bias as autocast casts them for a conv.

    Raises RuntimeError, as a conv does, for tensors on several devices, and for x, weight and bias
    that are not of one floating-point dtype.
    """
    tensors = [t for t in (x, weight, bias, *others) if t is not None]
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (t.to(dtype) if t is not None and t.is_floating_point() else t
                           for t in (x, weight, bias))
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    if len({t.device for t in tensors}) > 1 or len(dtypes) > 1 or not x.is_floating_point():
        raise RuntimeError("all tensors must be on one device, and x, weight and bias of one "
                           f"floating-point dtype: {[(t.device, t.dtype) for t in tensors]}")
    return x, weight, bias


def only_needed(ctx, gradients):
    """None for inputs without a gradient. Autograd casts the others to the dtype of their input."""
    return [gradient if needed else None
            for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=False)]


def restore_layout(t, x):
    """t in the dtype and the memory layout that torch.empty_like gives x."""
    out = torch.empty_like(x)
    return t if (out.stride(), out.dtype) == (t.stride(), t.dtype) else out.copy_(t)


@torch.no_grad()
def update_running_stats(bn, mean, var, n):
    """What nn.BatchNorm2d does after a batch of n values per channel; mean, biased var: (C,)."""
    if bn.num_batches_tracked is not None:
        bn.num_batches_tracked += 1
    momentum = bn.momentum
    if momentum is None:  # the average of all batches
        momentum = 1.0 / bn.num_batches_tracked.to(bn.running_mean.dtype)
    bn.running_mean.lerp_(mean.to(bn.running_mean.dtype), momentum)
    bn.running_var.lerp_((var * (n / (n - 1))).to(bn.running_var.dtype), momentum)
