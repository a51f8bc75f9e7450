"""Both halves of a ConvMixer layer on the CPU, made of PyTorch's fast operators.

The depthwise half:
- On small maps the conv of a channel is a matrix product z (N, HW) = x (N, HW) @ T.mT with a
  Toeplitz matrix T, and so are its gradients. Activations are then channel-major, in memory
  (C, N, H, W), and stay so from one unit to the next.
- On other maps, PyTorch's depthwise forward is fast and its backward is slow. Both gradients of a
  same-padded, stride-1 depthwise conv are such convs themselves: dx is a conv of dz with the kernel
  turned by 180 degrees; dweight is a conv of x in which dz is the kernel, with one "channel" for
  each pair (n, c).
- A dtype without products on this CPU (float16, on most CPUs bfloat16) is computed in float32 and
  rounded once at the end. A depthwise conv in bfloat16 is thirty times slower than in float32.

The dense half has a conv over all channels whose stride is its kernel: pointwise (1 x 1), or a
patch embedding (P x P). Channel-major, it is one product. Autograd saves x and z, the result of the
conv, where three operations would save GELU(z), too.

Measured against plain PyTorch: results/kernels-cpu/kernels.json.
"""
import math

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from . import reference
from .reference import restore_layout, stats_dtype

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # ATEN_CPU_CAPABILITY can lower it
NATIVE_BF16 = any(torch.cpu.get_capabilities().get(name) and (AVX512 or name == "bf16")
                  for name in ("avx512_bf16", "amx_bf16", "bf16"))

# A smaller unit runs as its parts, because the fixed cost of a call is larger than what it saves.
# In training, on two cores with AMX, it was 0.94 times as fast with 3.7 million multiplications
# (5x5 kernels), 1.02 times with 6.5 million. A small dense unit took a fifth more time.
FEWEST_MULTIPLICATIONS = 5_500_000
FEWEST_OUTPUTS = 500_000  # output elements of a dense unit

# Matrix products are used on maps of at most LARGEST_MAP elements, if the batch has FEWEST_IMAGES
# and IMAGES_PER_ELEMENT of T: building T costs the same for any batch size. Measured at 512
# channels, K = 9, on two cores: float32 with 8x8 maps on Zen 3; bfloat16 on Xeons with AMX, where a
# step of ConvMixer 16 took 162 ms by products and 190 by convs (32 images), 117 and 99 (16 images).
LARGEST_MAP = {torch.float32: 64, torch.bfloat16: 256}
IMAGES_PER_ELEMENT = {torch.float32: 1 / 128, torch.bfloat16: 1 / 900}
FEWEST_IMAGES = 16


# What runs

def fusing_pays(x: Tensor, outputs: int, kernel_size: int) -> bool:
    """Whether a fused unit whose conv has so many output elements is faster than its parts.

    The gain is in the backward pass of the depthwise conv: PyTorch's own is fast only for 3x3
    kernels. Without gradients the parts are as fast. Where PyTorch's 16-bit conv is slow, the fused
    unit, which computes in float32, is always faster.
    """
    if (torch.is_grad_enabled() and kernel_size >= 5
            and outputs * kernel_size ** 2 >= FEWEST_MULTIPLICATIONS):
        return True
    autocast = x.dtype != torch.float64 and torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
    return dtype.itemsize == 2 and not AVX512


def dtype_and_layout(dtype: torch.dtype, N: int, H: int, W: int) -> tuple[torch.dtype, bool]:
    """The dtype of the products on activations (N, C, H, W), and whether they are channel-major."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not NATIVE_BF16):
        dtype = torch.float32
    fewest = max(FEWEST_IMAGES, (H * W) ** 2 * IMAGES_PER_ELEMENT.get(dtype, 0))
    return dtype, H * W <= LARGEST_MAP.get(dtype, 0) and N >= fewest


# The depthwise half

def forward(x, weight, bias, gamma, beta, mean, var, eps, residual):
    """As reference.forward, without a gradient; y in the dtype and layout of the conv."""
    T, weight, x, bias = to_unit_layout(x, weight, x, bias)
    y, mean, var = gelu_bn(conv(x, weight, bias, T), gamma, beta, mean, var, eps)
    if residual:
        y += x
    return y, mean, var


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats):
    """As reference.backward; dx in the dtype and layout of the conv."""
    T, weight, x, bias, dy = to_unit_layout(x, weight, x, bias, dy)
    dz, *others = gelu_bn_backward(dy, conv(x, weight, bias, T), gamma, mean, var, eps, batch_stats)
    dx, dweight = conv_backward(dz, x, weight, T)
    if residual:
        dx += dy
    return dx, dweight, *others


def to_unit_layout(x, *tensors):
    """Convert the tensors (weight, x, ...) to the dtype and layout in which a unit with input x
    runs. Returns T, None if it uses convs, then the tensors."""
    dtype, channel_major = dtype_and_layout(x.dtype, len(x), *x.shape[2:])
    if not channel_major:
        dtype = stats_dtype(x)
    tensors = [None if t is None else with_layout(t.to(dtype), channel_major) for t in tensors]
    weight, x, *_ = tensors
    return toeplitz(weight, *x.shape[2:]) if is_channel_major(x) else None, *tensors


def toeplitz(weight, H, W):
    """T (C, HW, HW): row (i, j) holds the weights that output (i, j) gives to each input."""
    K = weight.shape[-1]
    # one weight for each offset between two positions: (C, 2H - 1, 2W - 1)
    left, top = W - 1 - K // 2, H - 1 - K // 2  # negative: crops
    by_offset = F.pad(weight[:, 0], (left, left, top, top))
    by_column = by_offset.new_empty(len(by_offset), W, 2 * H - 1, W)
    for j in range(W):
        by_column[:, j] = by_offset[:, :, W - 1 - j:2 * W - 1 - j]
    T = by_offset.new_empty(len(by_offset), H, W, H, W)
    for i in range(H):
        T[:, i] = by_column[:, :, H - 1 - i:2 * H - 1 - i]
    return T.view(-1, H * W, H * W)


def conv(x, weight, bias, T):
    """The depthwise conv. T None: PyTorch's, of a contiguous x. Else a product of a channel-major x
    with T."""
    if T is None:
        return reference.conv(x, weight, bias)
    x, T = x.transpose(0, 1), T.transpose(1, 2)                 # (C, N, H, W)
    z = (torch.bmm(x.flatten(2), T) if bias is None else
         torch.baddbmm(bias.view(-1, 1, 1), x.flatten(2), T))
    return z.view_as(x).transpose(0, 1)                         # (N, C, H, W)


def conv_backward(dz, x, weight, T):
    """dx and dweight of `conv`."""
    (N, C, H, W), K = x.shape, weight.shape[-1]
    if T is None:  # both are convs themselves
        dx = reference.conv(dz, weight.flip(2, 3), None)
        x, dz = x.view(1, N * C, H, W), dz.view(N * C, 1, H, W)
        dweight = F.conv2d(x, dz, padding=K // 2, groups=N * C)  # (1, N * C, K, K)
        return dx, dweight.view(N, C, 1, K, K).sum(0)
    # dweight sums those elements of dT that are the same weight
    x, dz = x.transpose(0, 1).flatten(2), dz.transpose(0, 1)
    dx = torch.bmm(dz.flatten(2), T).view_as(dz).transpose(0, 1)
    dT = torch.bmm(dz.flatten(2).transpose(1, 2), x).view(C, H, W, H, W)
    by_column = dT.new_zeros(C, W, K, W, dtype=stats_dtype(dT))
    for i in range(H):
        inputs, taps = window_of(i, H, K)
        by_column[:, :, taps].add_(dT[:, i, :, inputs])
    dweight = by_column.new_zeros(C, 1, K, K)
    for j in range(W):
        inputs, taps = window_of(j, W, K)
        dweight[:, 0, :, taps].add_(by_column[:, j, :, inputs])
    return dx, dweight


def window_of(i: int, n: int, K: int) -> tuple[slice, slice]:
    """For output i of a row of n pixels: the slice of inputs inside its window, and the matching
    slice of the K taps."""
    first = i - K // 2
    inputs = slice(max(first, 0), min(first + K, n))
    return inputs, slice(inputs.start - first, inputs.stop - first)


# The dense half

def dense_gelu_bn(x, weight, bias, gamma, beta, mean, var, *, eps):
    """(N, C, H, W) -> y (N, D, H/P, W/P), and the mean and biased variance used, (D,).

    weight (D, C, P, P), stride P; the rest as in `depthwise_gelu_bn`, and autocast casts as it does
    there. There is no second derivative.
    """
    x, weight, bias = reference.as_conv_inputs(x, weight, bias, gamma, beta, mean, var)
    (N, _, H, W), P = x.shape, weight.shape[-1]
    # A pointwise conv over patches: in bfloat16, the weight gradient of a patch embedding (32
    # images, P = 24, two cores with AMX) then takes 2 ms, and with oneDNN's conv 85 ms. In float32
    # it takes 11 ms either way.
    if P > 1 and dtype_and_layout(x.dtype, N, H // P, W // P) == (torch.bfloat16, True):
        x, weight = patches(x, P), weight.reshape(len(weight), -1, 1, 1)
    return _DenseGELUBN.apply(x, weight, bias, gamma, beta, mean, var, eps)


def patches(x, P):
    """(N, C, H, W) -> (N, CPP, h, w), without the pixels beyond the last whole patch."""
    N, C, H, W = x.shape
    h, w = H // P, W // P
    x = x[:, :, :h * P, :w * P].reshape(N, C, h, P, w, P)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(N, h, w, C * P * P).permute(0, 3, 1, 2)


class _DenseGELUBN(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, gamma, beta, mean, var, eps):
        ctx.batch_stats, ctx.eps = mean is None, eps
        with torch.autocast("cpu", enabled=False):
            z = _dense_conv(x, weight, bias)
            y, mean, var = gelu_bn(z, gamma, beta, mean, var, eps)
        ctx.save_for_backward(x, weight, gamma, z, mean, var)
        ctx.mark_non_differentiable(mean, var)
        return y.to(x.dtype).detach(), mean, var  # no view, so that it may change in place

    @staticmethod
    def backward(ctx, dy, *_):
        gradients = torch.ops.vit_convmixer.dense_gelu_bn_backward(
            dy, *ctx.saved_tensors, ctx.eps, ctx.batch_stats, ctx.needs_input_grad[0])
        return *reference.only_needed(ctx, gradients), None, None, None


@torch.library.custom_op("vit_convmixer::dense_gelu_bn_backward", mutates_args=())
def _dense_backward(dy: Tensor, x: Tensor, weight: Tensor, gamma: Tensor | None, z: Tensor,
                    mean: Tensor, var: Tensor, eps: float, batch_stats: bool, needs_dx: bool,
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx, empty unless needed, dweight, dbias, dgamma, dbeta. As an operator, vmap can batch it."""
    with torch.autocast("cpu", enabled=False):
        dy = with_layout(dy.to(z.dtype), is_channel_major(z))
        dz, *others = gelu_bn_backward(dy, z, gamma, mean, var, eps, batch_stats)
        dx, dweight = _dense_conv_backward(dz, x, weight, needs_dx)
    return x.new_empty(0) if dx is None else restore_layout(dx, x), dweight, *others


@register_flop_formula(torch.ops.vit_convmixer.dense_gelu_bn_backward)
def _dense_backward_flops(dy_shape, x_shape, weight_shape, *args, **__):
    one_product = 2 * dy_shape[0] * math.prod(dy_shape[2:]) * math.prod(weight_shape)
    return 2 * one_product if args[-1] else one_product  # with dx, or dweight alone


def _dense_conv(x, weight, bias):
    """z (N, D, h, w), in the layout of the depthwise conv that follows it."""
    D, P = len(weight), weight.shape[-1]
    N, h, w = len(x), x.shape[2] // P, x.shape[3] // P
    dtype, channel_major = dtype_and_layout(x.dtype, N, h, w)
    x, weight, bias = (None if t is None else t.to(dtype) for t in (x, weight, bias))
    if P > 1 or not channel_major:
        weight = weight.contiguous()  # else z might be in channels_last
        return with_layout(F.conv2d(x, weight, bias, stride=P), channel_major)
    z = product(weight.flatten(1), as_columns(x), bias)         # (D, Nhw)
    return z.view(D, N, h, w).transpose(0, 1)


def _dense_conv_backward(dz, x, weight, needs_dx):
    """dx, or None, and dweight."""
    x, weight, P = x.to(dz.dtype), weight.to(dz.dtype), weight.shape[-1]
    # a patch embedding, or contiguous activations: by a conv
    if P > 1 or not is_channel_major(dz):
        dx, dweight, _ = torch.ops.aten.convolution_backward(
            dz.contiguous(), x.contiguous(), weight.contiguous(), None, [P, P], [0, 0], [1, 1],
            False, [0, 0], 1, [needs_dx, True, False])
        return dx, dweight
    # a pointwise conv of channel-major ones: two products
    columns = as_columns(dz)                                    # (D, Nhw)
    dweight = weight_gradient(columns, as_columns(x)).view_as(weight)
    if not needs_dx:
        return None, dweight
    dx = product(weight.flatten(1).t().contiguous(), columns)   # (C, Nhw)
    N, C, h, w = x.shape
    return dx.view(C, N, h, w).transpose(0, 1), dweight


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


# Layouts, and what follows a conv in both halves

def with_layout(t, channel_major):
    """t, contiguous; an activation channel-major, if that is asked for."""
    if channel_major and t.ndim == 4 and t.shape[1] != 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return t.contiguous()


def is_channel_major(t):
    return t.transpose(0, 1).is_contiguous() and not t.is_contiguous()


def as_columns(t):
    """(N, C, H, W) -> (C, NHW): a view, if t is channel-major."""
    return t.transpose(0, 1).flatten(1)


def as_matrix(t):
    """(N, C, H, W), contiguous -> (N, C, HW), channel-major -> (1, C, NHW): a contiguous view."""
    return as_columns(t)[None] if is_channel_major(t) else t.flatten(2)


def as_image(t, like):
    """Undo `as_matrix`: the shape and layout of `like`."""
    if is_channel_major(like):
        return t.view(like.transpose(0, 1).shape).transpose(0, 1)
    return t.view(like.shape)


def gelu_bn(z, gamma, beta, mean, var, eps):
    """As reference.gelu_bn."""
    y, mean, var = reference.gelu_bn(as_matrix(z), gamma, beta, mean, var, eps)
    return as_image(y, z), mean, var


def gelu_bn_backward(dy, z, gamma, mean, var, eps, batch_stats):
    """dz, and the gradients of bias, gamma and beta."""
    dz, dgamma, dbeta = reference.gelu_bn_backward(as_matrix(dy), as_matrix(z), gamma, mean, var,
                                                   eps, batch_stats)
    return as_image(dz, z), dz.sum((0, 2)).to(mean.dtype), dgamma, dbeta  # summed in float32
