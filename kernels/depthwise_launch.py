"""Launch the kernels of depthwise_triton.py: supported shapes, tiles, programs per channel."""
import functools

import torch
import triton

from . import depthwise_triton as kernels
from .reference import laid_out_like

LARGEST_KERNEL = 11

# The largest that Triton 3.9 compiles without spills for sm_80, sm_90 and sm_100: run `pytest -m
# campaign tests/kernels/test_compile.py` after a change. A float32 product is three TF32 products,
# which take more registers.
TILES_AT_A_TIME = 64            # BLOCK_M
LARGEST_TILE = 64               # BLOCK_OUT
LARGEST_FLOAT32_TILE = 32       # in float32, if it is not the whole map
LARGEST_MATRIX = 512 * 32       # elements of T
FLOAT32_ELEMENTS = 2048         # in float32, of BLOCK_M windows or tiles
LARGEST_WITH_4_WARPS = 128      # BLOCK_IN; 8 warps above, and in float32
LARGEST_WITH_2_STAGES = 64      # BLOCK_IN; 1 stage above, and in float32
SMALLEST_BLOCK = 16             # of tl.dot

# Estimates: no GPU has been measured yet.
LOAD_COST = 32                  # of a window, in columns of its product
BYTES_PER_PROGRAM = 96 * 2**10  # x and y of 2 programs on each of 132 SMs stay within a 50 MB L2
FEWEST_PROGRAMS = 128           # fewer would leave most of a large GPU idle


def tile(shape, kernel_size, dtype):
    """(Plan, launch options) for x of `shape` (N, C, H, W), or None if no tile fits."""
    # As exact as float32, on tensor cores; TF32 if the user allows it to the convs of cuDNN.
    precision = "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"
    return _tile(*shape[2:], kernel_size, dtype, precision)


@functools.cache
def _tile(H, W, K, dtype, precision):
    """The tile that costs least per map. Equal arguments give equal tiles, and so equal bits."""
    float32 = dtype == torch.float32
    candidates = []
    for rows in range(1, H + 1):
        whole_map = rows == H
        window = H * W if whole_map else (rows + K - 1) * W
        block_in = max(SMALLEST_BLOCK, triton.next_power_of_2(window))
        block_out = max(SMALLEST_BLOCK, triton.next_power_of_2(rows * W))
        largest = LARGEST_FLOAT32_TILE if float32 and not whole_map else LARGEST_TILE
        if block_out <= largest and block_in * block_out <= LARGEST_MATRIX:
            cost = triton.cdiv(H, rows) * block_in * (block_out + LOAD_COST)
            candidates.append((cost, rows, block_in, block_out))
    if not candidates:
        return None
    _, rows, block_in, block_out = min(candidates)
    if float32:
        block_m = min(TILES_AT_A_TIME, FLOAT32_ELEMENTS // block_out)
        block_in = min(block_in, FLOAT32_ELEMENTS // block_m)
        options = dict(num_warps=8, num_stages=1)
    else:
        block_m = TILES_AT_A_TIME
        options = dict(num_warps=4 if block_in <= LARGEST_WITH_4_WARPS else 8,
                       num_stages=2 if block_in <= LARGEST_WITH_2_STAGES else 1)
    return kernels.Plan(H=H, W=W, K=K, ROWS=rows, HALO=0 if rows == H else K // 2,
                        TILES=triton.cdiv(H, rows), BLOCK_M=block_m, BLOCK_IN=block_in,
                        BLOCK_OUT=block_out, PRECISION=precision), options


def programs_per_channel(shape, dtype):
    """For x of `shape` (N, C, H, W): at most one per sample."""
    N, C, H, W = shape
    programs = triton.cdiv(N * H * W * dtype.itemsize, BYTES_PER_PROGRAM)
    return min(N, max(programs, triton.cdiv(FEWEST_PROGRAMS, C)))


def unsupported(shape, kernel_size: int, dtype: torch.dtype) -> str | None:
    """Why these kernels do not take a shape (N, C, H, W), in words, or None if they do."""
    if dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no Triton kernel for {str(dtype).removeprefix('torch.')}"
    if kernel_size > LARGEST_KERNEL:
        return f"no Triton kernel for kernel size {kernel_size}, only up to {LARGEST_KERNEL}"
    if tile(shape, kernel_size, dtype) is None:
        return (f"no Triton kernel for {shape[2]}x{shape[3]} maps at kernel size {kernel_size}: "
                "they are too wide")
    return None


def start(kernel, grid, **arguments):
    """Launch a kernel. depthwise_check puts another function in this place."""
    kernel[grid](**arguments)


def forward(x, weight, bias, gamma, beta, mean, var, eps, residual, programs=None):
    """As reference.forward, without a gradient. x (N, C, H, W) is on the GPU and not empty.

    `programs` per channel: programs_per_channel chooses if None.
    """
    original = x
    x = _strided(x)
    y = torch.empty_like(x)
    C = x.shape[1]
    S, slices, common = _launch(x, weight, programs)
    for_y = dict(gamma_ptr=gamma, beta_ptr=beta, y_ptr=y, eps=eps, RESIDUAL=residual, **common)
    with torch.cuda.device_of(x):
        if mean is None and S == 1:
            mean, var = (x.new_empty(C, dtype=torch.float32) for _ in range(2))
            start(kernels.forward_kernel, (C, S), b_ptr=bias, mean_ptr=mean, var_ptr=var, **for_y)
            return laid_out_like(original, y), mean, var
        if mean is None:
            moments = x.new_empty(3, S, C, dtype=torch.float32)
            start(kernels.moments_kernel, (C, S), b_ptr=bias, moments_ptr=moments, **slices,
                  **common)
            count, mean, m2 = merge_moments(*moments)
            var = m2 / count
        start(kernels.apply_kernel, (C, S), b_ptr=bias, mean_ptr=mean, var_ptr=var, **for_y,
              **slices)
    return laid_out_like(original, y), mean, var


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats, programs=None):
    """As reference.backward; the last four in float32. `programs` as in `forward`."""
    original = x
    x = _strided(x)
    dx = torch.empty_like(x)
    dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    N, C, H, W = x.shape
    S, slices, common = _launch(x, weight, programs)
    plan = common["P"]

    # Room for z, for window^T dz, and for the partial sums of each program.
    window = (plan.ROWS + 2 * plan.HALO) * W
    window = triton.cdiv(window, plan.BLOCK_IN) * plan.BLOCK_IN
    z = x.new_empty(C, N, H, W)
    products = x.new_empty(S, C, window, plan.BLOCK_OUT, dtype=torch.float32)
    dw = x.new_empty(S, *weight.shape, dtype=torch.float32)
    db, dgamma, dbeta = (x.new_empty(S, C, dtype=torch.float32) for _ in range(3))

    common.update(mean_ptr=mean, var_ptr=var, dy_ptr=dy, z_ptr=z, eps=eps)
    for_gradients = dict(
        gamma_ptr=gamma, dx_ptr=dx, dw_ptr=dw, db_ptr=db, products_ptr=products,
        products_stride=window * plan.BLOCK_OUT, RESIDUAL=residual,
        inverse_count=1.0 / (N * H * W) if batch_stats else 0.0, **common)
    with torch.cuda.device_of(x):
        if S == 1:
            start(kernels.backward_kernel, (C, S), b_ptr=bias, dgamma_ptr=dgamma,
                  dbeta_ptr=dbeta, **for_gradients)
            return laid_out_like(original, dx), dw[0], db[0], dgamma[0], dbeta[0]
        start(kernels.sums_kernel, (C, S), b_ptr=bias, dgamma_ptr=dgamma, dbeta_ptr=dbeta,
              **slices, **common)
        dgamma, dbeta = dgamma.sum(0), dbeta.sum(0)
        start(kernels.gradients_kernel, (C, S), dgamma_ptr=dgamma, dbeta_ptr=dbeta, **slices,
              **for_gradients)
    return laid_out_like(original, dx), dw.sum(0), db.sum(0), dgamma, dbeta


def _launch(x, weight, programs):
    """S slices per channel; the argument that cuts them; the arguments of all kernels."""
    plan, options = tile(x.shape, weight.shape[-1], x.dtype)
    N = x.shape[0]
    samples = triton.cdiv(N, programs or programs_per_channel(x.shape, x.dtype))
    return triton.cdiv(N, samples), dict(samples_per_program=samples), dict(
        x_ptr=x, w_ptr=weight.contiguous(), n_samples=N, stride_n=x.stride(0),
        stride_c=x.stride(1), P=plan, **options)


def merge_moments(count, mean, m2):
    """Counts, means and sums of squares around them of S groups, (S, C) -> of their union, (C,).

    Chan, Golub & LeVeque 1983, eq. 2.1.
    """
    total = count.sum(0)
    centre = (mean * count).sum(0) / total
    return total, centre, (m2 + count * (mean - centre).square()).sum(0)


def _strided(x):
    """x if its maps are contiguous and nothing lies between them, else a contiguous copy."""
    return x if strides(x) == x.stride()[:2] else x.contiguous()


def strides(x) -> tuple[int, int]:
    """Those of samples and channels, as the kernels see them."""
    contiguous_maps = x.stride()[2:] == (x.shape[3], 1)
    if contiguous_maps and torch.empty_like(x, device="meta").stride() == x.stride():
        return x.stride()[:2]
    return x.shape[1] * x.shape[2] * x.shape[3], x.shape[2] * x.shape[3]
