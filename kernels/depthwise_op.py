"""The depthwise unit as one differentiable PyTorch operator, and the choice of what runs it.

Two custom ops, forward and backward, with fake implementations and FLOP formulas. They are opaque
to torch.compile and save one activation, x. The first CUDA tensor imports Triton.
"""
import functools
import importlib.util
import math
import warnings

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import depthwise_cpu, reference
from .reference import as_conv_inputs, only_needed, restore_layout, stats_dtype


def depthwise_gelu_bn(
        x: Tensor, weight: Tensor, bias: Tensor | None = None, gamma: Tensor | None = None,
        beta: Tensor | None = None, mean: Tensor | None = None, var: Tensor | None = None, *,
        eps: float = 1e-5, residual: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """y = BatchNorm(GELU(depthwise_conv(x) + bias)) (+ x), and the mean and biased variance used.

    (N, C, H, W) -> y of the same shape and layout, mean (C,), var (C,), the last two without a
    gradient. weight (C, 1, K, K), K odd, "same" zero padding, stride 1; bias, gamma, beta (C,) or
    None; exact GELU. Without mean and var it normalises with the statistics of this batch. With
    them it returns two empty tensors in their place. Autocast casts x and weight as for a conv.
    There is no second derivative. Raises ValueError for shapes that do not fit, an empty
    batch, and batch statistics of a single value; RuntimeError as `as_conv_inputs` does.
    """
    # a kernel would read past the end of what does not fit
    C, K = len(weight), weight.shape[-1]
    shapes = [None if t is None else tuple(t.shape) for t in (bias, gamma, beta, mean, var)]
    if (x.ndim != 4 or x.shape[1] != C or weight.shape != (C, 1, K, K) or K % 2 == 0
            or not {(C,), None}.issuperset(shapes) or (mean is None) != (var is None)):
        raise ValueError(f"x {tuple(x.shape)}, weight {tuple(weight.shape)} and bias, gamma, beta, "
                         f"mean, var {shapes} are not (N, C, H, W), (C, 1, K, K) with odd K, and "
                         "(C,) or None")
    if x.numel() <= (C if mean is None else 0):
        raise ValueError("an empty batch, or batch statistics, which need more than one value per "
                         f"channel: x is {tuple(x.shape)}")

    # if autocast changes the dtype of x, the original x is added here, in its own dtype
    x_as_conv, weight, bias = as_conv_inputs(x, weight, bias, gamma, beta, mean, var)
    fused_residual = residual and x_as_conv.dtype == x.dtype
    y, mean, var = _DepthwiseGELUBN.apply(x_as_conv, weight, bias, gamma, beta, mean, var, eps,
                                          fused_residual)
    return (y + x if residual and not fused_residual else y), mean, var


# What runs

def runs_whole(x: Tensor, outputs: int, kernel_size: int) -> bool:
    """Whether a unit with so many output elements runs as one operation, not as its parts.

    On a CPU, only where that is faster. Exporters and tracers always get the parts. The cheap check
    comes first, because a whole evaluation may take a millisecond.
    """
    if x.device.type == "cpu" and not depthwise_cpu.fusing_pays(x, outputs, kernel_size):
        return False
    return not (torch.compiler.is_exporting() or torch.jit.is_tracing() or x.numel() == 0)


@functools.cache
def implementation(device: torch.device, shape: torch.Size, kernel_size: int, dtype: torch.dtype):
    """The module whose forward and backward run for x (N, C, H, W), chosen once per shape.

    Warns if it is the slow reference.
    """
    if device.type == "cpu":
        return depthwise_cpu
    if not (why_not := why_not_triton(device)):
        from . import depthwise_launch
        if not (why_not := depthwise_launch.why_not_launchable(device, shape, kernel_size, dtype)):
            return depthwise_launch
    warnings.warn(f"depthwise_gelu_bn runs as plain PyTorch: {why_not}", stacklevel=2)
    return reference


@functools.cache
def why_not_triton(device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on a device, or None. The first call per GPU tests them."""
    if device.type != "cuda":
        return f"Triton kernels need a CUDA device, and this is {device.type}"
    if torch.version.hip or torch.cuda.get_device_capability(device) < (8, 0):
        return "the Triton kernels need an NVIDIA GPU of compute capability 8.0 or newer"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    from .depthwise_launch import why_not_trusted
    return why_not_trusted(device)


# The operators

@torch.library.custom_op("vit_convmixer::depthwise_gelu_bn", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, gamma: Tensor | None,
             beta: Tensor | None, mean: Tensor | None, var: Tensor | None, eps: float,
             residual: bool) -> tuple[Tensor, Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        run = implementation(x.device, x.shape, weight.shape[-1], x.dtype).forward
        y, *batch_stats = run(x, weight, bias, gamma, beta, mean, var, eps, residual)
    if mean is not None:  # an op may not return its inputs
        batch_stats = (x.new_empty(0, dtype=stats_dtype(x)) for _ in range(2))
    return restore_layout(y, x), *batch_stats


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
        run = implementation(x.device, x.shape, weight.shape[-1], x.dtype).backward
        dx, *others = run(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats)
    return restore_layout(dx, x), *others


@_backward.register_fake
def _(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats):
    dtype = stats_dtype(x)
    dweight = weight.new_empty(weight.shape, dtype=dtype)
    return torch.empty_like(x), dweight, *(x.new_empty(x.shape[1], dtype=dtype) for _ in range(3))


class _DepthwiseGELUBN(torch.autograd.Function):
    """Raises for forward-mode derivatives and torch.func; register_autograd would return 0."""
    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, mean, var, eps, residual):
        ctx.batch_stats, ctx.eps, ctx.residual = mean is None, eps, residual
        y, *batch_stats = torch.ops.vit_convmixer.depthwise_gelu_bn(
            x, weight, bias, gamma, beta, mean, var, eps, residual)
        stats = batch_stats if mean is None else (mean, var)
        ctx.save_for_backward(x, weight, bias, gamma, *stats)
        ctx.mark_non_differentiable(*batch_stats)
        return y.detach(), *batch_stats  # no view, so that it may change in place

    @staticmethod
    def backward(ctx, dy, *_):
        gradients = torch.ops.vit_convmixer.depthwise_gelu_bn_backward(
            dy, *ctx.saved_tensors, ctx.eps, ctx.residual, ctx.batch_stats)
        return *only_needed(ctx, gradients), None, None, None, None


@register_flop_formula(torch.ops.vit_convmixer.depthwise_gelu_bn)
def _forward_flops(x_shape, weight_shape, *_, **__):
    return 2 * math.prod(x_shape) * weight_shape[-1] ** 2


@register_flop_formula(torch.ops.vit_convmixer.depthwise_gelu_bn_backward)
def _backward_flops(_, x_shape, weight_shape, *__, **___):
    return 2 * _forward_flops(x_shape, weight_shape)  # the repeated forward is not counted
