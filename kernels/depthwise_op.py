"""The block as one differentiable PyTorch operator, whatever device it runs on.

Two custom ops, forward and backward, opaque to torch.compile, with shapes (fake), gradient and FLOPs registered. They mutate
nothing and save one activation, x. Triton is imported when the first CUDA tensor comes.
"""
import functools
import importlib.util
import warnings
from typing import Optional

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import depthwise_cpu, reference
from .sync import stats_dtype


def depthwise_gelu_bn(x, weight, bias=None, gamma=None, beta=None, mean=None, var=None, *, eps=1e-5, residual=False,
                      sync=False):
    """y = BatchNorm(GELU(depthwise_conv(x) + bias)) (+ x): (N, C, H, W) -> y of the same shape and layout, mean, var.

    weight (C, 1, K, K), K odd, "same" zero padding, stride 1; bias, gamma, beta (C,) or None; exact GELU. Without mean and
    var, (C,), the batch's own are taken and returned, the variance biased, without a gradient; given, two empty tensors are
    returned in their place. With sync, which needs a process group, they are those of the batches of all ranks together, and
    a fourth result is how many values a channel that is, (C,); each rank's gradients come through its own batch, and add up to
    those of the whole. Under autocast x and weight are cast as a conv's would be. No second derivative.
    Raises ValueError for shapes that do not fit, for a single value a channel to take statistics of, and for sync with given ones.
    """
    if x.ndim != 4 or weight.shape[0] != x.shape[1] or weight.shape[1:] != (1, weight.shape[-1], weight.shape[-1]):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are not (N, C, H, W) and (C, 1, K, K)")
    if weight.shape[-1] % 2 == 0:
        raise ValueError(f"kernel size {weight.shape[-1]} is even: 'same' padding needs a centre")
    if (mean is None) != (var is None):
        raise ValueError("mean and var come together or not at all")
    if sync and mean is not None:
        raise ValueError("mean and var are given: there is nothing to take over all ranks with sync")
    for name, t in dict(bias=bias, gamma=gamma, beta=beta, mean=mean, var=var).items():
        if t is not None and t.shape != (x.shape[1],):
            raise ValueError(f"{name} {tuple(t.shape)} is not ({x.shape[1]},)")
    if mean is None and not sync and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"one value a channel has no statistics: x is {tuple(x.shape)}, in training")
    if x.numel() == 0:
        return reference.forward(x, weight, bias, gamma, beta, mean, var, eps, residual, sync)
    dtype = x.dtype
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    inside = residual and dtype == x.dtype
    y, mean, var, count = torch.ops.vit_convmixer.depthwise_gelu_bn(
        x.to(dtype), weight.to(dtype), bias, gamma, beta, mean, var, eps, inside, sync)
    return (y + x if residual and not inside else y), mean, var, *([count] if sync else [])


@functools.cache
def why_not_triton(device):
    """Why the Triton kernels cannot run on a device at all, in words, or None where they can: there they were tried."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, and this is {device.type}"
    if torch.version.hip:
        return "the Triton kernels were written for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less"
    from .depthwise_launch import fails_here
    return fails_here(device)


def implementation(x, kernel_size):
    """The module whose forward and backward x goes through; where that is the slow reference, a warning says so once."""
    if x.device.type == "cpu":
        return depthwise_cpu
    why_not = why_not_triton(x.device)
    if why_not is None:
        from . import depthwise_launch
        why_not = depthwise_launch.unsupported(x.shape, kernel_size, x.dtype)
        if why_not is None:
            return depthwise_launch
    warn_once(f"depthwise_gelu_bn runs as plain PyTorch: {why_not}")
    return reference


@functools.cache
def warn_once(message):
    warnings.warn(message, stacklevel=2)


@torch.library.custom_op("vit_convmixer::depthwise_gelu_bn", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Optional[Tensor], gamma: Optional[Tensor], beta: Optional[Tensor],
             mean: Optional[Tensor], var: Optional[Tensor], eps: float, residual: bool,
             sync: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        y, *stats = implementation(x, weight.shape[-1]).forward(x, weight, bias, gamma, beta, mean, var, eps, residual, sync)
    if mean is not None:  # an op may not return its inputs
        stats = []
    return y, *stats, *(x.new_empty(0, dtype=stats_dtype(x)) for _ in range(3 - len(stats)))


@_forward.register_fake
def _(x, weight, bias, gamma, beta, mean, var, eps, residual, sync=False):
    C = x.shape[1]
    sizes = (C, C, C) if sync else (C, C, 0) if mean is None else (0, 0, 0)
    return torch.empty_like(x), *(x.new_empty(size, dtype=stats_dtype(x)) for size in sizes)


@torch.library.custom_op("vit_convmixer::depthwise_gelu_bn_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Optional[Tensor], gamma: Optional[Tensor], mean: Tensor, var: Tensor,
              eps: float, residual: bool, batch_stats: bool, sync: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        return implementation(x, weight.shape[-1]).backward(
            dy, x, weight, bias, gamma, mean.to(stats_dtype(x)), var.to(stats_dtype(x)), eps, residual, batch_stats, sync)


@_backward.register_fake
def _(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats, sync=False):
    dtype = stats_dtype(x)
    return torch.empty_like(x), weight.new_empty(weight.shape, dtype=dtype), *(mean.new_empty(x.shape[1], dtype=dtype) for _ in range(3))


def _save(ctx, inputs, output):
    x, weight, bias, gamma, beta, mean, var, ctx.eps, ctx.residual, ctx.sync = inputs
    ctx.batch_stats = mean is None
    ctx.beta_dtype = None if beta is None else beta.dtype
    ctx.save_for_backward(x, weight, bias, gamma, *(output[1:3] if mean is None else (mean, var)))
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dy, *_):
    x, weight, bias, gamma, mean, var = ctx.saved_tensors
    dx, dweight, dbias, dgamma, dbeta = torch.ops.vit_convmixer.depthwise_gelu_bn_backward(
        dy, x, weight, bias, gamma, mean, var, ctx.eps, ctx.residual, ctx.batch_stats, ctx.sync)
    return (dx, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype),
            None if gamma is None else dgamma.to(gamma.dtype), None if ctx.beta_dtype is None else dbeta.to(ctx.beta_dtype),
            None, None, None, None, None)


def _differentiate_twice(ctx, *_):
    raise RuntimeError("depthwise_gelu_bn has no second derivative; kernels.unfuse(model), or kernels.reference.forward, has")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_differentiate_twice)


@register_flop_formula(torch.ops.vit_convmixer.depthwise_gelu_bn)
def _forward_flops(x_shape, weight_shape, *_, **__):
    N, C, H, W = x_shape
    return 2 * N * C * H * W * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.vit_convmixer.depthwise_gelu_bn_backward)
def _backward_flops(_, x_shape, weight_shape, *__, **___):
    return 2 * _forward_flops(x_shape, weight_shape)  # of dx and of dweight; the forward done again is not counted
