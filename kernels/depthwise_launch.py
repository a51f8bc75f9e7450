"""Launch the kernels of depthwise_triton.py: supported shapes, tiles, programs per channel."""
import functools
from typing import NamedTuple

import torch
import triton

from . import depthwise_triton as kernels
from . import reference

LARGEST_KERNEL = 11

# Triton 3.8 compiles these for sm_80, sm_90 and sm_100 with the few spilled bytes that
# tests/kernels/test_compile.py allows: `pytest -m campaign` tries 21 maps, each with all kernel
# sizes and dtypes.
LARGEST_TILE = 64               # BLOCK_OUT
SMALL_TILE = 32                 # the limit where a larger tile, unless a whole map, would spill
LARGEST_MATRIX = 512 * 32       # elements of T
FLOAT32_ELEMENTS = 2048         # largest float32 block of windows or tiles
SMALLEST_BLOCK = 16             # tl.dot takes no smaller one

# Estimates: no GPU has been measured yet.
LOAD_COST = 32                  # loading a window costs as much as 32 columns of its product
BYTES_PER_PROGRAM = 96 * 2**10  # x and y of 2 programs on each of 132 SMs stay within a 50 MB L2
FEWEST_PROGRAMS = 128           # fewer would leave most of a large GPU idle
LARGEST_PADDING = 1 / 8         # largest fraction of padding tiles in a block


class GPULimits(NamedTuple):
    """What a tiling depends on besides its maps. By default a GPU of compute capability 9.0."""
    capability: int = 90
    shared_bytes: int = 227 * 2**10  # that one program may take
    tf32: bool = False               # for float32 products


def limits_of(device: torch.device) -> GPULimits:
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"  # as the user sets it
    if device.type != "cuda":  # the interpreter
        return GPULimits(tf32=tf32)
    gpu = torch.cuda.get_device_properties(device)
    return GPULimits(10 * gpu.major + gpu.minor, gpu.shared_memory_per_block_optin, tf32)


@functools.cache
def choose_tiling(H, W, K, dtype, backward,
                  limits) -> tuple[kernels.Tiling, dict[str, int]] | None:
    """The tiling that costs least per map, and its launch options; None if no tile fits."""
    float32, odd = dtype == torch.float32, H * W % 8 != 0
    generation = limits.capability // 10
    wgmma, tcgen05 = generation == 9, generation in (10, 11)  # instructions of tensor cores
    mma = not (wgmma or tcgen05)

    # The rows of a tile. Registers are scarce in three cases: odd maps, whose elements are loaded
    # one by one; the backward pass with mma, which keeps T in registers; the backward pass where W
    # is not a power of two, which pads blocks. Then a tile has fewer rows.
    scarce = odd or (backward and (mma or W & (W - 1) != 0))
    small_tiles = float32 or (scarce and W <= SMALL_TILE)
    candidates = []
    for rows in range(1, H + 1):
        window = H * W if rows == H else (rows + K - 1) * W
        block_in, block_out = (max(SMALLEST_BLOCK, triton.next_power_of_2(elements))
                               for elements in (window, rows * W))
        largest = SMALL_TILE if small_tiles and rows < H else LARGEST_TILE
        if block_out <= largest and block_in * block_out <= LARGEST_MATRIX:
            cost = triton.cdiv(H, rows) * block_in * (block_out + LOAD_COST)
            candidates.append((cost, rows, block_in, block_out))
    if not candidates:
        return None
    _, rows, block_in, block_out = min(candidates)

    # The first line that applies gives BLOCK_M, num_warps and maxnreg (registers of a thread):
    # little or nothing spills to memory and, if possible, two programs fit on an SM. 255 is the
    # hardware's limit; without it, ptxas may choose 128 and spill. mma, wgmma, tcgen05 are the
    # tensor-core instructions of Ampere, Hopper and Blackwell. To try a choice, put its line first.
    matrix, whole, long = block_in * block_out, rows == H, block_in > 256
    small = block_in <= 128 and matrix <= 4096           # T and dz_window^T x leave registers free
    aligned = rows * W % 8 == 0 and K // 2 * W % 8 == 0  # loads of 16 bytes
    float32_m = min(64, FLOAT32_ELEMENTS // block_out)
    block_m, num_warps, maxnreg = next(choice for applies, *choice in (
        (float32 and not backward, float32_m, 8, 255),         # three TF32 products for one
        (float32, float32_m // 2, 8, 255),                     # and the backward pass has more
        (odd and not backward, 64, 8, 255),                    # elements are loaded one by one
        (odd and wgmma and small, 64, 8, 255),                 # wgmma needs 64 rows; T is in memory
        (odd, 32, 8, 255),
        (mma and backward and long, 32, 8, 255),               # in four warps, a long T would spill
        (mma and backward and whole, 32, 4, 168),              # with mma each warp holds all of T
        (mma and backward and small and aligned, 64, 4, 168),  # 168: three programs on an SM
        (mma and backward and (matrix <= 4096 or matrix <= 8192 and aligned), 64, 4, 255),
        (mma and backward, 32, 4, 255),
        (backward and whole, 64, 4, 255),                      # T and T flipped fill the registers
        (tcgen05 and small and block_out == 64, 64, 8, 128),   # its results pass through registers
        (tcgen05 and long, 32 if backward else 64, 8, 255),
        (small, 128, 8, 128),
        (backward, 32, 8, 128),                                # dz_window^T x takes registers
        (True, 64, 8, 128),
    ) if applies)
    if float32:
        block_in = min(block_in, FLOAT32_ELEMENTS // float32_m)

    # smaller blocks until T, windows in two layouts and tiles fit into shared memory
    while block_m > SMALLEST_BLOCK and limits.shared_bytes < dtype.itemsize * (
            block_in * block_out + block_m * (2 * block_in + block_out)):
        block_m //= 2

    # BLOCK_T: as many tiles of one map as possible, with few of them as padding
    tiles, block_t = triton.cdiv(H, rows), block_m
    while triton.cdiv(tiles, block_t) * block_t * (1 - LARGEST_PADDING) > tiles:
        block_t //= 2
    tiling = kernels.Tiling(
        H=H, W=W, K=K, TILE_H=rows, HALO=0 if rows == H else K // 2, TILES=tiles, BLOCK_M=block_m,
        BLOCK_T=block_t, BLOCK_IN=block_in, BLOCK_OUT=block_out,
        PRECISION="tf32" if limits.tf32 else "tf32x3")  # tf32x3 is as exact as float32
    return tiling, dict(num_warps=num_warps, maxnreg=maxnreg, num_stages=1, enable_fp_fusion=True)


def programs_per_channel(shape, dtype):
    """Number of programs per channel for x of `shape` (N, C, H, W), at most one per sample.

    Enough programs to fill a GPU, and a slice of samples that stays in L2.
    """
    N, C, H, W = shape
    programs = triton.cdiv(N * H * W * dtype.itemsize, BYTES_PER_PROGRAM)
    return min(N, max(programs, triton.cdiv(FEWEST_PROGRAMS, C)))


def why_not_launchable(device, shape, kernel_size: int, dtype: torch.dtype) -> str | None:
    """Why these kernels do not take a shape (N, C, H, W), in words, or None if they do."""
    _, C, H, W = shape
    choices = [choose_tiling(H, W, kernel_size, dtype, backward, limits_of(device))
               for backward in (False, True)]
    if (dtype in (torch.float16, torch.bfloat16, torch.float32) and kernel_size <= LARGEST_KERNEL
            and None not in choices  # offsets within a block are int32
            and max(t.BLOCK_M // t.BLOCK_T for t, _ in choices) * C * H * W < 2**31):
        return None
    return f"no Triton kernel takes {dtype}, {C} channels of {H}x{W}, kernel size {kernel_size}"


def forward(x, weight, bias, gamma, beta, mean, var, eps, residual, programs=None):
    """As reference.forward, without a gradient. x (N, C, H, W) is on the GPU and not empty.

    `programs` per channel: by programs_per_channel if None.
    """
    x, weight, bias, gamma, beta, mean, var = _contiguous(x, weight, bias, gamma, beta, mean, var)
    y = torch.empty_like(x)
    _, samples, grid, common = _arguments(x, weight, bias, gamma, eps, residual, False, programs)
    S, C = grid[::-1]
    with torch.cuda.device_of(x):
        # this batch's statistics; y with them, if a program owns a whole channel
        if mean is None:
            mean, var = (x.new_empty(S, C, dtype=torch.float32) for _ in range(2))
            kernels.forward_kernel[grid](MOMENTS=True, beta_ptr=beta, y_ptr=y if S == 1 else None,
                                         mean_ptr=mean, var_ptr=var, **common)
            if S == 1:
                return y, mean[0], var[0]
            mean, var = merge_moments(mean, var, samples, len(x))
        # y from given statistics
        kernels.forward_kernel[grid](MOMENTS=False, beta_ptr=beta, y_ptr=y, mean_ptr=mean,
                                     var_ptr=var, **common)
    return y, mean, var


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats, programs=None):
    """As reference.backward; the last four in float32. `programs` as in `forward`."""
    dy, x, weight, bias, gamma, mean, var = _contiguous(dy, x, weight, bias, gamma, mean, var)
    dx = torch.empty_like(x)
    tiling, _, grid, common = _arguments(x, weight, bias, gamma, eps, residual, True, programs)
    S, C = grid[::-1]

    # room for z, for dz^T x, and for the partial sums of each program
    z = None if tiling.TILES == 1 else torch.empty_like(x)
    window = (tiling.TILE_H + 2 * tiling.HALO) * tiling.W
    window = triton.cdiv(window, tiling.BLOCK_IN) * tiling.BLOCK_IN
    products = x.new_empty(S, C, window, tiling.BLOCK_OUT, dtype=torch.float32)
    dw = x.new_empty(S, *weight.shape, dtype=torch.float32)
    db, dgamma, dbeta = (x.new_empty(S, C, dtype=torch.float32) for _ in range(3))

    # one launch, or with several programs per channel one for the sums and one for the gradients
    common |= dict(mean_ptr=mean, var_ptr=var, dy_ptr=dy, z_ptr=z,
                   products_stride=window * tiling.BLOCK_OUT,
                   inverse_count=1.0 / (len(x) * tiling.H * tiling.W) if batch_stats else 0.0)
    sums = dict(dgamma_ptr=dgamma, dbeta_ptr=dbeta)
    gradients = dict(dx_ptr=dx, dw_ptr=dw, db_ptr=db, products_ptr=products)
    with torch.cuda.device_of(x):
        if S == 1:
            kernels.backward_kernel[grid](SUMS=True, **sums, **gradients, **common)
            return dx, dw[0], db[0], dgamma[0], dbeta[0]
        kernels.backward_kernel[grid](SUMS=True, **sums, **dict.fromkeys(gradients), **common)
        dgamma, dbeta = dgamma.sum(0), dbeta.sum(0)
        kernels.backward_kernel[grid](SUMS=False, dgamma_ptr=dgamma, dbeta_ptr=dbeta, **gradients,
                                      **common)
    return dx, dw.sum(0), db.sum(0), dgamma, dbeta


def _contiguous(*tensors):
    """As the kernels read them; those that are None stay."""
    return [None if t is None else t.contiguous() for t in tensors]


def _arguments(x, weight, bias, gamma, eps, residual, backward, programs):
    """The tiling, samples per program, the grid (C, programs), and arguments of each kernel."""
    N, C, H, W = x.shape
    tiling, options = choose_tiling(H, W, weight.shape[-1], x.dtype, backward, limits_of(x.device))
    samples = triton.cdiv(N, programs or programs_per_channel(x.shape, x.dtype))
    return tiling, samples, (C, triton.cdiv(N, samples)), dict(
        x_ptr=x, w_ptr=weight, b_ptr=bias, gamma_ptr=gamma, n_samples=N,
        samples_per_program=samples, stride_n=x.stride(0), stride_c=x.stride(1), eps=eps,
        RESIDUAL=residual, META=tiling, **options)


def merge_moments(mean, var, samples, N):
    """Merge means and variances of slices of `samples`, the last maybe shorter: (S, C) -> (C,).

    Chan, Golub & LeVeque 1983, eq. 2.1.
    """
    weight = torch.full_like(mean[:, :1], samples / N)
    weight[-1] = 1 - (len(mean) - 1) * samples / N
    centre = (mean * weight).sum(0)
    return centre, ((var + (mean - centre).square()) * weight).sum(0)


def why_not_trusted(device: torch.device) -> str | None:
    """How the kernels differ from the reference on a GPU, in words, or None if they do not.

    No test runs on every GPU and compiler, so this check runs before their first use there.
    """
    # one case in float16, whose errors are far below 1 %
    generator = torch.Generator().manual_seed(0)
    x, weight, dy = (torch.randn(shape, generator=generator).to(device, torch.float16)
                     for shape in ((70, 4, 8, 8), (4, 1, 9, 9), (70, 4, 8, 8)))

    # forward, then backward, against the reference in float32
    def both_passes(forward, backward, x, weight, dy):
        y, mean, var = forward(x, weight, None, None, None, None, None, 1e-5, True)
        return y, mean, var, *backward(dy, x, weight, None, None, mean, var, 1e-5, True, True)

    expected = both_passes(reference.forward, reference.backward,
                           *(t.float() for t in (x, weight, dy)))
    for programs in (1, 2):  # one launch each way, and two
        try:
            results = both_passes(functools.partial(forward, programs=programs),
                                  functools.partial(backward, programs=programs), x, weight, dy)
        except Exception as e:  # whatever a compiler or a driver can raise
            reason = "".join(str(e).strip().splitlines()[:1])
            return f"the Triton kernels fail on this GPU: {type(e).__name__}: {reason}"
        errors = [(got.float() - want.float()).norm() / want.float().norm()
                  for got, want in zip(results, expected, strict=True)]
        if not (error := torch.stack(errors).max()) < 0.01:  # a NaN is not below either
            return f"the Triton kernels are wrong on this GPU: relative error {error:.2g}"
    return None
