"""From tensors to launches of depthwise_triton.py: which shapes, how they are cut, over how many programs."""
import contextlib
import functools

import torch
import triton

from . import reference
from .depthwise_triton import Plan, apply_kernel, backward_kernel, forward_kernel, gradients_kernel, moments_kernel, sums_kernel
from .reference import laid_out_like
from .sync import means_over_ranks, merged, merged_over_ranks

LARGEST_KERNEL = 11
LARGEST_MATRIX = 512 * 32     # elements of T
SLAB_BYTES = 96 * 2**10       # of one program's samples: 2 programs on each of 132 SMs, x and y, stay within a 50 MB L2
FEWEST_PROGRAMS = 128         # below that, most of a large GPU would idle


def plan(shape, kernel_size, dtype):
    """(Plan, launch options, programs a channel) for x of `shape` (N, C, H, W), or None where no tile fits."""
    return _plan(tuple(shape), kernel_size, dtype, float32_products())


@functools.cache
def _plan(shape, kernel_size, dtype, precision):
    """Depends on nothing else, so that the same input gives the same bits. ROWS is what costs the fewest products a map, the
    load of a window counted as 32 more columns: estimates, for no GPU has been measured yet.
    """
    N, C, H, W = shape
    K, single = kernel_size, dtype == torch.float32
    best = None
    for rows in range(1, H + 1):
        window = (H if rows == H else rows + K - 1) * W
        block_out = max(16, triton.next_power_of_2(rows * W))
        block_in = max(16, triton.next_power_of_2(window))
        cost = triton.cdiv(H, rows) * block_in * (block_out + 32)
        fits = block_out <= (32 if single and rows < H else 64) and block_in * block_out <= LARGEST_MATRIX
        if fits and (best is None or cost < best[0]):
            best = cost, rows, block_in, block_out
    if best is None:
        return None
    _, rows, block_in, block_out = best
    # The largest pieces that Triton 3.9 compiles without spills for sm_80, sm_90 and sm_100 (tests/test_compile.py).
    # A float32 product is three of TF32 parts, which take more registers.
    options = dict(num_warps=8 if single or block_in > 128 else 4, num_stages=2 if not single and block_in <= 64 else 1)
    block_m = 32 if single and block_out == 64 else 64
    if single:
        block_in = min(block_in, 2048 // block_m)
    cut = Plan(H=H, W=W, K=K, ROWS=rows, HALO=0 if rows == H else K // 2, TILES=triton.cdiv(H, rows), BLOCK_M=block_m,
               BLOCK_IN=block_in, BLOCK_OUT=block_out, PRECISION=precision)
    programs = max(triton.cdiv(N * H * W * dtype.itemsize, SLAB_BYTES), triton.cdiv(FEWEST_PROGRAMS, C))
    return cut, options, min(programs, N)


def float32_products():
    """As exact as float32 on tensor cores; TF32 where the user lets the convs of cuDNN take that."""
    return "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"


def fails_here(device):
    """What is wrong with these kernels on a GPU, in words, or None.

    Tests prove them in Triton's interpreter, and no test can run on every GPU and compiler: so before their first use they
    are compared with the reference, and a wrong result is never the user's.
    """
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=generator).to(device, torch.float16)
                     for shape in ((70, 4, 8, 8), (4, 1, 9, 9), (70, 4, 8, 8)))

    given = None, None, None, None, None, 1e-5, True

    def there_and_back(forward, backward, x, weight, dy, **options):
        y, mean, var = forward(x, weight, *given, **options)
        return y, mean, var, *backward(dy, x, weight, None, None, mean, var, 1e-5, True, True, **options)
    want = there_and_back(reference.forward, reference.backward, x.float(), weight.float(), dy.float())
    for programs in (1, 2):  # one launch forward and one backward, and two of each
        try:
            got = there_and_back(forward, backward, x, weight, dy, plan=lambda *shape: (*plan(*shape)[:2], programs))
        except Exception as e:  # whatever a compiler or a driver can raise
            return f"the Triton kernels fail on this GPU: {type(e).__name__}: {str(e).strip().splitlines()[:1]}"
        errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, want)]
        if not all(error < 0.01 for error in errors):  # a NaN is not below either
            return f"the Triton kernels are wrong on this GPU (relative errors {', '.join(f'{error:.2g}' for error in errors)})"
    return None


def unsupported(shape, kernel_size, dtype):
    """Why these kernels do not take a shape (N, C, H, W), in words, or None where they do."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no Triton kernel for {str(dtype).removeprefix('torch.')}"
    if kernel_size > LARGEST_KERNEL:
        return f"no Triton kernel for kernel size {kernel_size}, only up to {LARGEST_KERNEL}"
    if plan(shape, kernel_size, dtype) is None:
        return f"no Triton kernel for {shape[2]}x{shape[3]} maps at kernel size {kernel_size}: they are too wide"
    return None


def forward(x, weight, bias, gamma, beta, mean, var, eps, residual, sync=False, plan=plan):
    """As reference.forward, without a gradient. x (N, C, H, W) on the GPU, at least one element."""
    original, x, weight = x, _strided(x), weight.contiguous()
    N, C, H, W = x.shape
    cut, options, programs = plan(x.shape, weight.shape[-1], x.dtype)
    share = triton.cdiv(N, programs)
    grid = C, triton.cdiv(N, share)
    strides = x.stride()[:2]
    y = torch.empty_like(x)
    with _on(x):
        if mean is None and grid[1] == 1 and not sync:
            mean, var = x.new_empty(C, dtype=torch.float32), x.new_empty(C, dtype=torch.float32)
            forward_kernel[grid](x, weight, bias, gamma, beta, y, mean, var, N, *strides, eps, residual, cut, **options)
            return laid_out_like(original, y), mean, var
        if mean is None:
            moments = x.new_empty(3, grid[1], C, dtype=torch.float32)
            moments_kernel[grid](x, weight, bias, moments, N, share, *strides, cut, **options)
            count, mean, m2 = merged(*moments)
            if sync:
                count, mean, m2 = merged_over_ranks(N * H * W, mean, m2)
            var = m2 / count
        apply_kernel[grid](x, weight, bias, gamma, beta, mean, var, y, N, share, *strides, eps, residual, cut, **options)
    return laid_out_like(original, y), mean, var, *([count] if sync else [])


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats, sync=False, plan=plan):
    """dx, dweight, dbias, dgamma, dbeta, the last four in float32; x alone was saved: conv and GELU are done again."""
    original, x, weight = x, _strided(x), weight.contiguous()
    dx = torch.empty_like(x)
    dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    N, C, H, W = x.shape
    K = weight.shape[-1]
    cut, options, programs = plan(x.shape, K, x.dtype)
    share = triton.cdiv(N, programs)
    grid = C, S = C, triton.cdiv(N, share)
    window = triton.cdiv((cut.ROWS + 2 * cut.HALO) * W, cut.BLOCK_IN) * cut.BLOCK_IN
    batch_share = 1.0 / (N * H * W) if batch_stats else 0.0
    z = x.new_empty(C, N, H, W)
    products = x.new_empty(S, C, window, cut.BLOCK_OUT, dtype=torch.float32)
    dw = x.new_empty(S, C, 1, K, K, dtype=torch.float32)
    db, dgamma, dbeta = (x.new_empty(S, C, dtype=torch.float32) for _ in range(3))
    strides = *x.stride()[:2], window * cut.BLOCK_OUT
    with _on(x):
        if S == 1 and not sync:
            backward_kernel[grid](x, weight, bias, gamma, mean, var, dy, dx, dw, db, dgamma, dbeta, z, products, N, *strides,
                                  eps, batch_share, residual, cut, **options)
            return laid_out_like(original, dx), dw[0], db[0], dgamma[0], dbeta[0]
        sums_kernel[grid](x, weight, bias, mean, var, dy, z, dgamma, dbeta, N, share, *strides[:2], eps, cut, **options)
        dgamma, dbeta = sums = dgamma.sum(0), dbeta.sum(0)
        if sync:
            sums, batch_share = means_over_ranks(N * H * W, *sums), 1.0  # their count stays on the GPU: they come divided by it
        gradients_kernel[grid](x, weight, gamma, mean, var, *sums, dy, dx, dw, db, z, products, N, share, *strides,
                               eps, batch_share, residual, cut, **options)
    return laid_out_like(original, dx), dw.sum(0), db.sum(0), dgamma, dbeta


def _strided(x):
    """x where its maps are contiguous and nothing lies between them, else a contiguous copy."""
    return x if x.stride()[2:] == (x.shape[3], 1) and torch.empty_like(x).stride() == x.stride() else x.contiguous()


def _on(x):
    """Launches go to x's GPU (in Triton's interpreter there is none)."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()
