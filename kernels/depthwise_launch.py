"""Launch the kernels of depthwise_triton.py: supported shapes, tiles, programs per channel."""
import functools
from typing import NamedTuple

import torch
import triton

from . import depthwise_triton as kernels
from . import reference

LARGEST_KERNEL = 11

# Triton 3.8 compiles these for sm_80, sm_90 and sm_100 with the few spilled bytes that
# tests/kernels/test_compile.py allows: `pytest -m campaign` tries all maps, kernel sizes, dtypes.
LARGEST_TILE = 64               # BLOCK_OUT
SMALL_TILE = 32                 # if it is not the whole map, where elements take more registers
LARGEST_MATRIX = 512 * 32       # elements of T
SMALL_MATRIX = 128 * 32         # elements of T, and of x^T dz, that leave registers free
FLOAT32_ELEMENTS = 2048         # in float32, of BLOCK_M windows or tiles
SMALLEST_BLOCK = 16             # of tl.dot

INSTRUCTION = {9: "wgmma", 10: "tcgen05", 11: "tcgen05"}  # of tensor cores; before, mma.sync

# Estimates: no GPU has been measured yet.
LOAD_COST = 32                  # of a window, in columns of its product
BYTES_PER_PROGRAM = 96 * 2**10  # x and y of 2 programs on each of 132 SMs stay within a 50 MB L2
FEWEST_PROGRAMS = 128           # fewer would leave most of a large GPU idle
LARGEST_PADDING = 1 / 8         # of a block may be tiles that are not there


class Target(NamedTuple):
    """What a tile depends on besides its maps. By default a GPU of compute capability 9.0."""
    capability: int = 90
    shared_bytes: int = 227 * 2**10  # that one program may take
    tf32: bool = False               # for float32 products


def target_of(device: torch.device) -> Target:
    tf32 = torch.backends.cudnn.allow_tf32  # which the user allows to the convs of cuDNN
    if device.type != "cuda":  # the interpreter
        return Target(tf32=tf32)
    gpu = torch.cuda.get_device_properties(device)
    return Target(10 * gpu.major + gpu.minor, gpu.shared_memory_per_block_optin, tf32)


@functools.cache
def tile(H, W, K, dtype, backward, target) -> tuple[kernels.Plan, dict[str, int]] | None:
    """The plan that costs least per map, and its launch options; None if no tile fits."""
    float32 = dtype == torch.float32
    # three TF32 products for one, or elements loaded one by one, take more registers
    more_registers = float32 or H * W % 8 != 0
    instruction = INSTRUCTION.get(target.capability // 10, "mma.sync")
    # in the backward pass, T kept in registers, or a tile padded to a power of two, do so, too
    small_tiles = float32 or W <= SMALL_TILE and (
        more_registers or backward and (instruction == "mma.sync" or W & (W - 1) != 0))

    # the rows of a tile
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

    # how many at a time: few enough for registers and shared memory, best with 2 programs on an SM;
    # without maxnreg, ptxas may take 128 registers and spill
    small_matrix = block_in <= 128 and block_in * block_out <= SMALL_MATRIX
    block_m, num_warps, maxnreg = 64, 8, 255
    if float32:
        block_m = min(64, FLOAT32_ELEMENTS // block_out)
        block_in = min(block_in, FLOAT32_ELEMENTS // block_m)
    elif not more_registers and backward and instruction == "mma.sync":  # each warp has its own T
        aligned = rows * W % 8 == 0 and K // 2 * W % 8 == 0  # loads of 16 bytes
        largest_matrix = 2 * SMALL_MATRIX if aligned else SMALL_MATRIX
        block_m = 64 if rows < H and block_in * block_out <= largest_matrix else 32
        three_programs = rows == H or small_matrix and aligned  # on an SM, else two
        if block_in <= 256:  # larger ones spill in four warps
            num_warps, maxnreg = 4, 168 if three_programs else 255
    elif not more_registers and backward and rows == H:  # T and its turn take all registers
        num_warps = 4
    elif not more_registers:
        block_m = 128 if small_matrix else 32 if backward else 64
        if instruction == "tcgen05":  # its results come through more registers
            block_m = min(block_m, 4096 // block_out)
        if instruction != "tcgen05" or block_in <= 256:
            maxnreg = 128
    # half in the backward pass; but wgmma takes 64 at least, and a small T from shared memory
    if more_registers and backward and (float32 or instruction != "wgmma" or not small_matrix):
        block_m //= 2

    # at most the shared memory: T, windows in two layouts, tiles
    while block_m > SMALLEST_BLOCK and target.shared_bytes < dtype.itemsize * (
            block_in * block_out + block_m * (2 * block_in + block_out)):
        block_m //= 2

    # how many of a block are of one map: the most that leave few of them empty
    tiles, block_t = triton.cdiv(H, rows), block_m
    while triton.cdiv(tiles, block_t) * block_t * (1 - LARGEST_PADDING) > tiles:
        block_t //= 2
    plan = kernels.Plan(H=H, W=W, K=K, ROWS=rows, HALO=0 if rows == H else K // 2, TILES=tiles,
                        BLOCK_M=block_m, BLOCK_T=block_t, BLOCK_IN=block_in, BLOCK_OUT=block_out,
                        PRECISION="tf32" if target.tf32 else "tf32x3")  # as exact as float32
    return plan, dict(num_warps=num_warps, maxnreg=maxnreg, num_stages=1, enable_fp_fusion=True)


def programs_per_channel(shape, dtype):
    """For x of `shape` (N, C, H, W): at most one per sample."""
    N, C, H, W = shape
    programs = triton.cdiv(N * H * W * dtype.itemsize, BYTES_PER_PROGRAM)
    return min(N, max(programs, triton.cdiv(FEWEST_PROGRAMS, C)))


def why_not_launched(device, shape, kernel_size: int, dtype: torch.dtype) -> str | None:
    """Why these kernels do not take a shape (N, C, H, W), in words, or None if they do."""
    _, C, H, W = shape
    tiles = [tile(H, W, kernel_size, dtype, backward, target_of(device))
             for backward in (False, True)]
    if (dtype in (torch.float16, torch.bfloat16, torch.float32) and kernel_size <= LARGEST_KERNEL
            and None not in tiles  # offsets within a block are int32
            and max(plan.BLOCK_M // plan.BLOCK_T for plan, _ in tiles) * C * H * W < 2**31):
        return None
    return f"no Triton kernel takes {dtype}, {C} channels of {H}x{W}, kernel size {kernel_size}"


def forward(x, weight, bias, gamma, beta, mean, var, eps, residual, programs=None):
    """As reference.forward, without a gradient. x (N, C, H, W) is on the GPU and not empty.

    `programs` per channel: by programs_per_channel if None.
    """
    x = _strided(x)
    y = torch.empty_like(x)
    _, samples, grid, common = _common(x, weight, bias, gamma, eps, residual, False, programs)
    S, C = grid[::-1]
    with torch.cuda.device_of(x):
        if mean is None:
            mean, var = (x.new_empty(S, C, dtype=torch.float32) for _ in range(2))
            kernels.forward_kernel[grid](beta_ptr=beta, y_ptr=y if S == 1 else None, mean_ptr=mean,
                                         var_ptr=var, **common)
            if S == 1:
                return y, mean[0], var[0]
            mean, var = merge_moments(mean, var, samples, len(x))
        kernels.apply_kernel[grid](beta_ptr=beta, y_ptr=y, mean_ptr=mean, var_ptr=var, **common)
    return y, mean, var


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats, programs=None):
    """As reference.backward; the last four in float32. `programs` as in `forward`."""
    x = _strided(x)
    dx = torch.empty_like(x)
    dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    plan, _, grid, common = _common(x, weight, bias, gamma, eps, residual, True, programs)
    S, C = grid[::-1]

    # room for z, for dz^T x, and for the partial sums of each program
    map_size = plan.H * plan.W
    z = None if plan.TILES == 1 and plan.BLOCK_IN >= map_size else torch.empty_like(x)
    window = (plan.ROWS + 2 * plan.HALO) * plan.W
    window = triton.cdiv(window, plan.BLOCK_IN) * plan.BLOCK_IN
    products = x.new_empty(S, C, window, plan.BLOCK_OUT, dtype=torch.float32)
    dw = x.new_empty(S, *weight.shape, dtype=torch.float32)
    db, dgamma, dbeta = (x.new_empty(S, C, dtype=torch.float32) for _ in range(3))

    common |= dict(mean_ptr=mean, var_ptr=var, dy_ptr=dy, z_ptr=z,
                   products_stride=window * plan.BLOCK_OUT,
                   inverse_count=1.0 / (len(x) * map_size) if batch_stats else 0.0)
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


def _common(x, weight, bias, gamma, eps, residual, backward, programs):
    """The plan, samples per program, the grid (C, programs), and arguments of each kernel."""
    N, C, H, W = x.shape
    plan, options = tile(H, W, weight.shape[-1], x.dtype, backward, target_of(x.device))
    samples = triton.cdiv(N, programs or programs_per_channel(x.shape, x.dtype))
    return plan, samples, (C, triton.cdiv(N, samples)), dict(
        x_ptr=x, w_ptr=weight.contiguous(), b_ptr=bias, gamma_ptr=gamma, n_samples=N,
        samples_per_program=samples, stride_n=x.stride(0), stride_c=x.stride(1), eps=eps,
        RESIDUAL=residual, P=plan, **options)


def merge_moments(mean, var, samples, N):
    """Means and variances of slices of `samples`, the last one of the rest of N: (S, C) -> (C,).

    Chan, Golub & LeVeque 1983, eq. 2.1.
    """
    weight = torch.full((len(mean), 1), samples / N, device=mean.device)
    weight[-1] = 1 - (len(mean) - 1) * samples / N
    centre = (mean * weight).sum(0)
    return centre, ((var + (mean - centre).square()) * weight).sum(0)


def _strided(x):
    """x if its maps are contiguous and nothing lies between them, else a contiguous copy."""
    contiguous_maps = x.stride()[2:] == (x.shape[3], 1)
    nothing_between = torch.empty_like(x, device="meta").stride() == x.stride()
    return x if contiguous_maps and nothing_between else x.contiguous()


def why_not_as_reference(device: torch.device) -> str | None:
    """How the kernels differ from the reference on a GPU, in words, or None if they do not.

    No test runs on every GPU and compiler. So this check precedes their first use, and no user
    gets a wrong result.
    """
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(shape, generator=generator).to(device, torch.float16)
              for shape in ((70, 4, 8, 8), (4, 1, 9, 9), (70, 4, 8, 8))]

    def run(forward, backward, x, weight, dy, **options):
        y, mean, var = forward(x, weight, None, None, None, None, None, 1e-5, True, **options)
        return y, mean, var, *backward(dy, x, weight, None, None, mean, var, 1e-5, True, True,
                                       **options)

    expected = run(reference.forward, reference.backward, *(t.float() for t in inputs))
    for programs in (1, 2):  # one launch each way, and two
        try:
            results = run(forward, backward, *inputs, programs=programs)
        except Exception as e:  # whatever a compiler or a driver can raise
            reason = "".join(str(e).strip().splitlines()[:1])
            return f"the Triton kernels fail on this GPU: {type(e).__name__}: {reason}"
        errors = [(got.float() - want.float()).norm() / want.float().norm()
                  for got, want in zip(results, expected, strict=True)]
        if not (error := torch.stack(errors).max()) < 0.01:  # a NaN is not below either
            return f"the Triton kernels are wrong on this GPU: relative error {error:.2g}"
    return None
