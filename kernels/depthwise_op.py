"""The block as one differentiable PyTorch operator on any device.

Two custom ops, forward and backward, have registered shapes (fake), gradients and FLOPs. They are
opaque to torch.compile and save one activation, x. The first CUDA tensor imports Triton.
"""
import functools
import importlib.util
import warnings

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import depthwise_cpu, reference
from .reference import stats_dtype


def depthwise_gelu_bn(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None,
        beta: Tensor | None = None, mean: Tensor | None = None, var: Tensor | None = None, *,
        eps: float = 1e-5, residual: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """y = BatchNorm(GELU(depthwise_conv(x) + bias)) (+ x), and the mean and biased variance used.

    (N, C, H, W) -> y of the same shape and layout, mean (C,), var (C,), the last two without a
    gradient. weight (C, 1, K, K), K odd, "same" zero padding, stride 1; bias, gamma, beta (C,) or
    None; exact GELU. Without mean and var it normalises with the statistics of this batch. With
    them it returns two empty tensors in their place. Autocast casts x and weight as for a conv.
    There is no second derivative. Raises ValueError for shapes that do not fit, and for batch
    statistics of a single value; RuntimeError, as a conv does, for tensors on several devices and
    for x, weight and bias that are not of one floating-point type.
    """
    K = weight.shape[-1]
    if x.ndim != 4 or weight.shape[0] != x.shape[1] or weight.shape[1:] != (1, K, K):
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are not "
                         "(N, C, H, W) and (C, 1, K, K)")
    N, C, H, W = x.shape
    if K % 2 == 0:
        raise ValueError(f"kernel size {K} is even: 'same' padding needs a centre")
    if (mean is None) != (var is None):
        raise ValueError("pass both mean and var, or neither")
    for name, t in dict(bias=bias, gamma=gamma, beta=beta, mean=mean, var=var).items():
        if t is not None and t.shape != (C,):
            raise ValueError(f"{name} {tuple(t.shape)} is not ({C},)")
    if mean is None and N * H * W == 1:
        raise ValueError("batch statistics need more than one value per channel: "
                         f"x is {tuple(x.shape)}")
    x_as_conv, weight, bias = as_conv_inputs(x, weight, bias, gamma, beta, mean, var)
    if x.numel() == 0 or is_transformed():
        return reference.forward(x, weight, bias, gamma, beta, mean, var, eps, residual)

    fused_residual = residual and x_as_conv.dtype == x.dtype
    y, mean, var = torch.ops.vit_convmixer.depthwise_gelu_bn(
        x_as_conv, weight, bias, gamma, beta, mean, var, eps, fused_residual)
    return (y + x if residual and not fused_residual else y), mean, var


def as_conv_inputs(x, weight, bias, *others):
    """x, weight and bias as autocast casts them for a conv. Raises RuntimeError as a conv does."""
    tensors = [t for t in (weight, bias, *others) if t is not None]
    if devices := {str(t.device) for t in tensors if t.device != x.device}:
        raise RuntimeError(f"x is on {x.device}, and parameters are on {', '.join(devices)}")
    if not x.is_meta and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = (t.to(dtype) if t is not None and t.is_floating_point() else t
                           for t in (x, weight, bias))
    dtypes = {str(t.dtype) for t in (x, weight, bias) if t is not None}
    if len(dtypes) > 1 or not x.is_floating_point():
        raise RuntimeError("x, weight and bias must be of one floating-point type, not "
                           + ", ".join(sorted(dtypes)))
    return x, weight, bias


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work: an operator has no rules for
    them, and the reference needs none."""
    if torch.compiler.is_compiling():
        return False
    return (torch._C._functorch.peek_interpreter_stack() is not None
            or torch.autograd.forward_ad._current_level >= 0)


@functools.cache
def why_not_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, or None. The first call per GPU tests them."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, and this is {device.type}"
    if torch.version.hip:
        return "the Triton kernels were written for NVIDIA GPUs"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        name = torch.cuda.get_device_name(device)
        return f"Triton needs compute capability 8.0, and {name} has less"
    from .depthwise_check import self_check
    return self_check(device)


def implementation(x, kernel_size):
    """The module whose forward and backward run for x. Warns once if it is the slow reference."""
    if x.device.type == "cpu":
        return depthwise_cpu
    if not (why_not := why_not_triton(x.device)):
        from . import depthwise_check, depthwise_launch
        why_not = (depthwise_launch.unsupported(x.shape, kernel_size, x.dtype)
                   or depthwise_check.fails_here(x, kernel_size))
        if not why_not:
            return depthwise_launch
    warn_once(f"depthwise_gelu_bn runs as plain PyTorch: {why_not}")
    return reference


@functools.cache
def warn_once(message):
    warnings.warn(message, stacklevel=2)


@torch.library.custom_op("vit_convmixer::depthwise_gelu_bn", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
             beta: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float,
             residual: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        y, batch_mean, batch_var = implementation(x, weight.shape[-1]).forward(
            x, weight, bias, gamma, beta, mean, var, eps, residual)
    if mean is None:
        return y, batch_mean, batch_var
    # An op may not return its inputs.
    return y, *(x.new_empty(0, dtype=stats_dtype(x)) for _ in range(2))


@_forward.register_fake
def _(x, weight, bias, gamma, beta, mean, var, eps, residual):
    C = x.shape[1] if mean is None else 0
    return torch.empty_like(x), *(x.new_empty(C, dtype=stats_dtype(x)) for _ in range(2))


@torch.library.custom_op("vit_convmixer::depthwise_gelu_bn_backward", mutates_args=())
def _backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
              mean: Tensor, var: Tensor, eps: float, residual: bool, batch_stats: bool,
              ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mean, var = mean.to(stats_dtype(x)), var.to(stats_dtype(x))
    with torch.autocast(x.device.type, enabled=False):
        return implementation(x, weight.shape[-1]).backward(
            dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats)


@_backward.register_fake
def _(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats):
    dtype = stats_dtype(x)
    dweight = weight.new_empty(weight.shape, dtype=dtype)
    return torch.empty_like(x), dweight, *(x.new_empty(x.shape[1], dtype=dtype) for _ in range(3))


def _save(ctx, inputs, output):
    x, weight, bias, gamma, _, mean, var, ctx.eps, ctx.residual = inputs
    ctx.batch_stats = mean is None
    ctx.dtypes = [None if t is None else t.dtype for t in inputs[:5]]
    stats = output[1:] if mean is None else (mean, var)
    ctx.save_for_backward(x, weight, bias, gamma, *stats)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, dy, *_):
    gradients = torch.ops.vit_convmixer.depthwise_gelu_bn_backward(
        dy, *ctx.saved_tensors, ctx.eps, ctx.residual, ctx.batch_stats)
    gradients = [None if dtype is None else gradient.to(dtype)
                 for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
    return *gradients, None, None, None, None


def _differentiate_twice(ctx, *_):
    raise RuntimeError("depthwise_gelu_bn has no second derivative; call kernels.unfuse(model), "
                       "or use kernels.reference.forward")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_differentiate_twice)


@register_flop_formula(torch.ops.vit_convmixer.depthwise_gelu_bn)
def _forward_flops(x_shape, weight_shape, *_, **__):
    N, C, H, W = x_shape
    return 2 * N * C * H * W * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.vit_convmixer.depthwise_gelu_bn_backward)
def _backward_flops(_, x_shape, weight_shape, *__, **___):
    return 2 * _forward_flops(x_shape, weight_shape)  # the repeated forward is not counted
