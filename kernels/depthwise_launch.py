"""Launch the kernels of depthwise_triton.py: supported shapes, tiles, programs per channel."""
import functools
import json
from pathlib import Path
from typing import NamedTuple

import torch
import triton

from . import depthwise_triton as kernels
from .reference import laid_out_like

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
LARGEST_PADDING = 1 / 8         # of BLOCK_T tiles that are not there


class Device(NamedTuple):
    """What a launch depends on. By default a GPU of compute capability 9.0."""
    capability: int = 90
    shared_bytes: int = 227 * 2**10  # that one program may take
    name: str = ""


class Launch(NamedTuple):
    """How the kernels of one pass are launched."""
    plan: kernels.Plan
    options: dict[str, int]
    programs: int            # per channel: slices of its samples
    samples: int             # per program


ANY_DEVICE = Device()


def launch(shape, kernel_size, dtype, backward, programs=None, device=ANY_DEVICE,
           **knobs) -> Launch | None:
    """The launch for x of `shape` (N, C, H, W), or None if no tile fits.

    `programs` per channel: by programs_per_channel if None. `knobs` replace fields of the plan and
    options; without any, those of depthwise_tiles.json, which were timed on this GPU. Equal
    arguments give equal launches, and so equal bits.
    """
    # As exact as float32, on tensor cores; TF32 if the user allows it to the convs of cuDNN.
    precision = "tf32" if torch.backends.cudnn.allow_tf32 else "tf32x3"
    name = tile_name(*shape[2:], kernel_size, dtype, backward)
    knobs = knobs or tuned().get(device.name, {}).get("tiles", {}).get(name, {})
    found = tile(*shape[2:], kernel_size, dtype, precision, backward, device, **knobs)
    samples = triton.cdiv(shape[0], programs or programs_per_channel(shape, dtype))
    return found and Launch(*found, triton.cdiv(shape[0], samples), samples)


def tile_name(H, W, K, dtype, backward):
    dtype = str(dtype).removeprefix("torch.")
    return f"{'backward' if backward else 'forward'}, {H}x{W}, K {K}, {dtype}"


@functools.cache
def tuned() -> dict:
    """{GPU: {"date", "triton", "tiles": {tile_name: knobs}}}; `bench.py --kernels-tune` writes it.
    """
    return json.loads((Path(__file__).parent / "depthwise_tiles.json").read_text())


@functools.cache
def tile(H, W, K, dtype, precision, backward, device, **knobs):
    """(Plan, launch options) of the tile that costs least per map, or None if none fits."""
    float32 = dtype == torch.float32
    # three TF32 products for one, or elements loaded one by one, take more registers
    more_registers = float32 or H * W % 8 != 0
    instruction = INSTRUCTION.get(device.capability // 10, "mma.sync")
    # and so does, in the backward pass, a T in registers, or a tile with columns that are not there
    small_tiles = float32 or W <= SMALL_TILE and (
        more_registers or backward and (instruction == "mma.sync" or W & (W - 1) != 0))
    candidates = []
    for rows in [knobs["ROWS"]] if "ROWS" in knobs else range(1, H + 1):
        whole_map = rows == H
        window = H * W if whole_map else (rows + K - 1) * W
        block_in = max(SMALLEST_BLOCK, triton.next_power_of_2(window))
        block_out = max(SMALLEST_BLOCK, triton.next_power_of_2(rows * W))
        largest = SMALL_TILE if small_tiles and not whole_map else LARGEST_TILE
        if block_out <= largest and block_in * block_out <= LARGEST_MATRIX:
            cost = triton.cdiv(H, rows) * block_in * (block_out + LOAD_COST)
            candidates.append((cost, rows, block_in, block_out))
    if not candidates:
        return None
    _, rows, block_in, block_out = min(candidates)

    # how many at a time: few enough for registers and shared memory, best with 2 programs on an SM
    # without maxnreg, ptxas may take 128 registers and spill
    options = dict(num_warps=8, num_stages=1, maxnreg=255, enable_fp_fusion=True)
    small_matrix = block_in <= 128 and block_in * block_out <= SMALL_MATRIX
    if float32:
        block_m = min(64, FLOAT32_ELEMENTS // block_out)
        block_in = min(block_in, FLOAT32_ELEMENTS // block_m)
    elif more_registers:
        block_m = 64
    elif backward and instruction == "mma.sync":  # T in registers; warps have copies
        aligned = rows * W % 8 == 0 and K // 2 * W % 8 == 0  # loads of 16 bytes
        largest_matrix = 2 * SMALL_MATRIX if aligned else SMALL_MATRIX
        block_m = 64 if rows < H and block_in * block_out <= largest_matrix else 32
        three_programs = rows == H or small_matrix and aligned  # on an SM, else two
        if block_in <= 256:  # larger ones spill in four warps
            options |= dict(num_warps=4, maxnreg=168 if three_programs else 255)
    elif backward and rows == H:  # T and its turn at once: as many registers as a thread can have
        block_m, options["num_warps"] = 64, 4
    else:
        block_m = 128 if small_matrix else 32 if backward else 64
        if instruction == "tcgen05":  # its results come through more registers
            block_m = min(block_m, 4096 // block_out)
        if instruction != "tcgen05" or block_in <= 256:
            options |= dict(maxnreg=128)
    # half in the backward pass; but wgmma takes 64 at least, and a small T from shared memory
    if more_registers and backward and (float32 or instruction != "wgmma" or not small_matrix):
        block_m //= 2
    block_m = knobs.get("BLOCK_M", block_m)
    while (block_m > SMALLEST_BLOCK and device.shared_bytes
           < shared_bytes(block_m, block_in, block_out, dtype)):
        block_m //= 2

    # of which so many are of one map: as many as leave few of them empty
    tiles, block_t = triton.cdiv(H, rows), block_m
    while triton.cdiv(tiles, block_t) * block_t * (1 - LARGEST_PADDING) > tiles:
        block_t //= 2
    plan = kernels.Plan(H=H, W=W, K=K, ROWS=rows, HALO=0 if rows == H else K // 2, TILES=tiles,
                        BLOCK_M=block_m, BLOCK_T=block_t, BLOCK_IN=block_in, BLOCK_OUT=block_out,
                        PRECISION=precision)
    options |= {name: value for name, value in knobs.items() if name not in plan._fields}
    return plan, options


def shared_bytes(block_m, block_in, block_out, dtype):
    """The most that a kernel of this tile takes: T, windows in two layouts, tiles."""
    return dtype.itemsize * (block_in * block_out + block_m * (2 * block_in + block_out))


def device_of(x) -> Device:
    if not x.is_cuda:
        return ANY_DEVICE  # the interpreter
    properties = torch.cuda.get_device_properties(x.device)
    return Device(10 * properties.major + properties.minor,
                  properties.shared_memory_per_block_optin, properties.name)


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
    launches = [launch(shape, kernel_size, dtype, backward) for backward in (False, True)]
    if None in launches:
        return (f"no Triton kernel for {shape[2]}x{shape[3]} maps at kernel size {kernel_size}: "
                "they are too wide")
    samples = max(plan.BLOCK_M // plan.BLOCK_T for plan, *_ in launches)
    if samples * shape[1] * shape[2] * shape[3] >= 2**31:
        return f"no Triton kernel for samples as large as {tuple(shape[1:])}"
    return None


def start(kernel, grid, **arguments):
    """Launch a kernel. depthwise_check puts another function in this place."""
    kernel[grid](**arguments)


def forward(x, weight, bias, gamma, beta, mean, var, eps, residual, programs=None, **knobs):
    """As reference.forward, without a gradient. x (N, C, H, W) is on the GPU and not empty.

    `programs` and `knobs` as in `launch`.
    """
    original, x = x, _strided(x)
    y = torch.empty_like(x)
    N, C, _, _ = x.shape
    plan, options, S, samples = launch(
        x.shape, weight.shape[-1], x.dtype, False, programs, **{"device": device_of(x), **knobs})
    common = dict(
        x_ptr=x, w_ptr=weight.contiguous(), b_ptr=bias, gamma_ptr=gamma, beta_ptr=beta,
        n_samples=N, samples_per_program=samples, stride_n=x.stride(0), stride_c=x.stride(1),
        eps=eps, RESIDUAL=residual, P=plan, **options)
    with torch.cuda.device_of(x):
        if mean is None:
            mean, var = (x.new_empty(S, C, dtype=torch.float32) for _ in range(2))
            common |= dict(mean_ptr=mean, var_ptr=var)
            start(kernels.forward_kernel, (C, S), y_ptr=y if S == 1 else None, **common)
            if S == 1:
                return laid_out_like(original, y), mean[0], var[0]
            mean, var = merge_moments(mean, var, samples, N)
        common |= dict(mean_ptr=mean, var_ptr=var)
        start(kernels.apply_kernel, (C, S), y_ptr=y, **common)
    return laid_out_like(original, y), mean, var


def backward(dy, x, weight, bias, gamma, mean, var, eps, residual, batch_stats, programs=None,
             **knobs):
    """As reference.backward; the last four in float32. `programs` and `knobs` as in `launch`."""
    original, x = x, _strided(x)
    dx = torch.empty_like(x)
    dy = dy if dy.stride() == x.stride() else torch.empty_like(x).copy_(dy)
    N, C, H, W = x.shape
    plan, options, S, samples = launch(
        x.shape, weight.shape[-1], x.dtype, True, programs, **{"device": device_of(x), **knobs})

    # Room for z, for dz^T x, and for the partial sums of each program.
    z = None if plan.TILES == 1 and plan.BLOCK_IN >= H * W else torch.empty_like(x)
    window = (plan.ROWS + 2 * plan.HALO) * W
    window = triton.cdiv(window, plan.BLOCK_IN) * plan.BLOCK_IN
    products = x.new_empty(S, C, window, plan.BLOCK_OUT, dtype=torch.float32)
    dw = x.new_empty(S, *weight.shape, dtype=torch.float32)
    db, dgamma, dbeta = (x.new_empty(S, C, dtype=torch.float32) for _ in range(3))

    common = dict(
        x_ptr=x, w_ptr=weight.contiguous(), b_ptr=bias, gamma_ptr=gamma, mean_ptr=mean,
        var_ptr=var, dy_ptr=dy, dgamma_ptr=dgamma, dbeta_ptr=dbeta, z_ptr=z, n_samples=N,
        samples_per_program=samples, stride_n=x.stride(0), stride_c=x.stride(1),
        products_stride=window * plan.BLOCK_OUT, eps=eps,
        inverse_count=1.0 / (N * H * W) if batch_stats else 0.0, RESIDUAL=residual, P=plan,
        **options)
    gradients = dict(dx_ptr=dx, dw_ptr=dw, db_ptr=db, products_ptr=products)
    with torch.cuda.device_of(x):
        if S == 1:
            start(kernels.backward_kernel, (C, S), SUMS=True, **gradients, **common)
            return laid_out_like(original, dx), dw[0], db[0], dgamma[0], dbeta[0]
        start(kernels.backward_kernel, (C, S), SUMS=True, **dict.fromkeys(gradients), **common)
        dgamma, dbeta = dgamma.sum(0), dbeta.sum(0)
        common |= dict(dgamma_ptr=dgamma, dbeta_ptr=dbeta)
        start(kernels.backward_kernel, (C, S), SUMS=False, **gradients, **common)
    return laid_out_like(original, dx), dw.sum(0), db.sum(0), dgamma, dbeta


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
    return x if strides(x) == x.stride()[:2] else x.contiguous()


def strides(x) -> tuple[int, int]:
    """Those of samples and channels, as the kernels see them."""
    contiguous_maps = x.stride()[2:] == (x.shape[3], 1)
    if contiguous_maps and torch.empty_like(x, device="meta").stride() == x.stride():
        return x.stride()[:2]
    return x.shape[1] * x.shape[2] * x.shape[3], x.shape[2] * x.shape[3]
