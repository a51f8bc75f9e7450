"""The fused block on the CPU, made of PyTorch's fast operators.

- Small maps: the conv of a channel is a product, z (N, HW) = x (N, HW) @ T.mT, T being Toeplitz.
  The gradients are products, too. Activations are then channel-major, in memory (C, N, H, W), and
  stay so from one block to the next.
- Other maps: PyTorch's depthwise forward is fast, its backward is slow. Both gradients of a
  same-padded, stride-1 depthwise conv are such convs themselves: the input's with the kernel turned
  by 180 degrees, the weight's of x with dz as its kernel, one "channel" for each pair (n, c).
- What the CPU has no products for (float16, on most CPUs bfloat16) is computed in float32 and
  rounded once at the end. A depthwise conv in bfloat16 is thirty times slower than in float32.

Measured against plain PyTorch: results/kernels-cpu/kernels.json.
"""
import torch
from torch.nn import functional as F

from .reference import conv as plain_conv
from .reference import gelu_bn, gelu_bn_backward, laid_out_like, stats_dtype

AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # ATEN_CPU_CAPABILITY can say less
NATIVE_BF16 = any(torch.cpu.get_capabilities().get(name) and (AVX512 or name == "bf16")
                  for name in ("avx512_bf16", "amx_bf16", "bf16"))

# Multiplications of a block, below which the fixed cost of a call is larger than what it saves: in
# training, on two cores with AMX, 3.7 million (5x5 kernels) 0.94x, 6.5 million 1.02x and more.
FEWEST_MULTIPLICATIONS = 5_500_000

# By products: maps of at most so many elements, and at least 16 images, and so many for each
# element of T, which costs the same for any number of images. Measured at 512 channels, K = 9, on
# two cores. In float32: 8x8 on Zen 3. In bfloat16, on Xeons with AMX, ms of a step by products and
# by convs: ConvMixer 16 162 and 190 with 32 images, 117 and 99 with 16.
LARGEST_MAP = {torch.float32: 64, torch.bfloat16: 256}
IMAGES_PER_ELEMENT = {torch.float32: 1 / 128, torch.bfloat16: 1 / 900}
FEWEST_IMAGES = 16


def fusing_pays(dtype: torch.dtype, elements: int, kernel_size: int) -> bool:
    """Whether a fused block is faster than its parts: a conv in `dtype` with so many results.

    It gains by the backward pass of its depthwise conv: PyTorch's own is fast for 3x3 kernels
    alone. Without a gradient the parts are as fast. Where PyTorch's conv of 16 bits is a slow one,
    the fused block, in float32, is always faster.
    """
    if dtype.itemsize == 2 and not AVX512:
        return True
    return (torch.is_grad_enabled() and kernel_size >= 5
            and elements * kernel_size ** 2 >= FEWEST_MULTIPLICATIONS)


def forward(x, weight, bias, gamma, beta, mean, var, eps, residual):
    """As reference.forward, without a gradient."""
    original, (x, weight, bias) = x, arranged(x, x, weight, bias)
    z = depthwise(x, weight)(x, bias)
    y, mean, var = gelu_bn(rows(z), gamma, beta, mean, var, eps)
    y = maps(y, z)
    if residual:
        y += x
    return laid_out_like(original, y), mean, var


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats):
    """As reference.backward."""
    original, (dy, x, weight, bias) = x, arranged(x, dy, x, weight, bias)
    conv = depthwise(x, weight)
    z = conv(x, bias)
    dz, dgamma, dbeta = gelu_bn_backward(rows(dy), rows(z), gamma, mean, var, eps, batch_stats)
    dbias = dz.sum((0, 2)).to(mean.dtype)  # summed in float32
    dx, dweight = conv.backward(maps(dz, z), x)
    if residual:
        dx += dy
    return laid_out_like(original, dx), dweight, dbias, dgamma, dbeta


def depthwise(x, weight):
    return ByProducts(weight, *x.shape[2:]) if is_channel_major(x) else ByConvs(weight)


class ByConvs:
    """A depthwise conv of contiguous tensors, and its gradients, by depthwise convs."""

    def __init__(self, weight: torch.Tensor):
        self.weight = weight

    def __call__(self, x, bias):
        return plain_conv(x, self.weight, bias)

    def backward(self, dz: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dx and dweight."""
        N, C, H, W = x.shape
        K = self.weight.shape[-1]
        dx = plain_conv(dz, self.weight.flip(2, 3), None)
        x, dz = x.view(1, N * C, H, W), dz.view(N * C, 1, H, W)
        dweight = F.conv2d(x, dz, padding=K // 2, groups=N * C)  # (1, N * C, K, K)
        return dx, dweight.view(N, C, 1, K, K).sum(0)


class ByProducts:
    """A depthwise conv of channel-major tensors, and its gradients, by products with T.

    Row (i, j) of T (C, HW, HW) holds the weights that output (i, j) gives to each input.
    """

    def __init__(self, weight: torch.Tensor, H: int, W: int):
        self.weight, self.sides = weight, (H, W)
        K = weight.shape[-1]
        # one weight for each distance between two positions: (C, 2H - 1, 2W - 1)
        distances = F.pad(weight[:, 0], 2 * (W - 1 - K // 2,) + 2 * (H - 1 - K // 2,))
        of_columns = distances.new_empty(len(distances), W, 2 * H - 1, W)
        for j in range(W):
            of_columns[:, j] = distances[:, :, W - 1 - j:2 * W - 1 - j]
        self.T = distances.new_empty(len(distances), H, W, H, W)
        for i in range(H):
            self.T[:, i] = of_columns[:, :, H - 1 - i:2 * H - 1 - i]
        self.T = self.T.view(-1, H * W, H * W)

    def __call__(self, x, bias):
        x = x.transpose(0, 1)                                   # (C, N, H, W)
        T = self.T.transpose(1, 2)
        z = (torch.bmm(x.flatten(2), T) if bias is None else
             torch.baddbmm(bias.view(-1, 1, 1), x.flatten(2), T))
        return z.view_as(x).transpose(0, 1)                     # (N, C, H, W)

    def backward(self, dz: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """dx and dweight."""
        x, dz = x.transpose(0, 1).flatten(2), dz.transpose(0, 1)
        dx = torch.bmm(dz.flatten(2), self.T)
        dT = torch.bmm(dz.flatten(2).transpose(1, 2), x)
        return dx.view_as(dz).transpose(0, 1), self.weight_gradient(dT)

    def weight_gradient(self, dT):
        """The sum of those elements of dT that are the same weight: (C, HW, HW) -> (C, 1, K, K)."""
        (H, W), (C, _, K, _) = self.sides, self.weight.shape
        dT = dT.view(C, H, W, H, W)
        of_columns = dT.new_zeros(C, W, K, W, dtype=stats_dtype(dT))
        for i in range(H):
            inputs, taps = seen_by(i, H, K)
            of_columns[:, :, taps].add_(dT[:, i, :, inputs])
        dweight = of_columns.new_zeros(C, 1, K, K)
        for j in range(W):
            inputs, taps = seen_by(j, W, K)
            dweight[:, 0, :, taps].add_(of_columns[:, j, :, inputs])
        return dweight


def seen_by(i: int, n: int, K: int) -> tuple[slice, slice]:
    """The inputs, of n in a row, that output i sees, and the taps, of K, that it sees them by."""
    first = i - K // 2
    inputs = slice(max(first, 0), min(first + K, n))
    return inputs, slice(inputs.start - first, inputs.stop - first)


def arranged(x, *tensors):
    """The tensors for a block of input x: in the dtype and the layout of its depthwise conv."""
    dtype, channel_major = plan(x.dtype, len(x), *x.shape[2:])
    if not channel_major:
        dtype = stats_dtype(x)
    return [None if t is None else laid_out(t.to(dtype), channel_major) for t in tensors]


def plan(dtype: torch.dtype, N: int, H: int, W: int) -> tuple[torch.dtype, bool]:
    """The dtype of the products on activations (N, C, H, W), and whether they are channel-major."""
    if dtype == torch.float16 or (dtype == torch.bfloat16 and not NATIVE_BF16):
        dtype = torch.float32
    fewest = max(FEWEST_IMAGES, (H * W) ** 2 * IMAGES_PER_ELEMENT.get(dtype, 0))
    small = H * W <= LARGEST_MAP.get(dtype, 0) and N >= fewest
    return dtype, small


def laid_out(t, channel_major):
    """An activation, channel-major or contiguous; everything else contiguous."""
    if channel_major and t.ndim == 4 and t.shape[1] != 1:
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    return t.contiguous()


def is_channel_major(t):
    return t.transpose(0, 1).is_contiguous() and not t.is_contiguous()


def rows(t):
    """(N, C, H, W), contiguous -> (N, C, HW), channel-major -> (1, C, NHW): a contiguous view."""
    return t.transpose(0, 1).flatten(1)[None] if is_channel_major(t) else t.flatten(2)


def maps(t, like):
    """Undo `rows`: the shape and layout of `like`."""
    if is_channel_major(like):
        return t.view(like.transpose(0, 1).shape).transpose(0, 1)
    return t.view(like.shape)
