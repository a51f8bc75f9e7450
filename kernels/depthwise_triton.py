"""The block in Triton: one launch forward, one launch backward, convs as tensor-core products.

Every step is elementwise within a channel, except the conv, whose window also stays within one
channel. So one program owns a channel, and does the whole block while it stays in L2. If a pass
takes two launches, program (c, s) owns slice s of S of the samples of channel c.

The conv is a product with a Toeplitz matrix. Cut each H x W map into tiles of ROWS full rows. A
tile's outputs depend on a window of ROWS + 2 * HALO rows, which lie side by side in memory, through
one matrix T for all tiles of the channel:

    z[m, o] = sum_i x[m, i] T[i, o]
    T[i, o] = weight[dy, dx], the tap from input i of the window to output o of the tile

where m counts the tiles of all samples. The input's gradient is the same product with the kernel
turned by 180 degrees; the weight's is window^T dz, (window, tile), whose diagonals are then added
up into K * K taps. A tile that is the whole map needs no halo. T spreads a NaN or an infinity over
its tile, where a conv spreads it over its window.

Activations are (N, C, H, W) with contiguous maps at any stride_n and stride_c. Products are in the
dtype of x, sums and statistics in float32. Without atomics, the same input gives the same bits.
"""
from typing import NamedTuple

import triton
import triton.language as tl


class Plan(NamedTuple):
    """How maps are cut into tiles; a compile-time constant of each kernel."""
    H: int
    W: int
    K: int
    ROWS: int        # rows per tile
    HALO: int        # rows that a window has more than its tile, on either side
    TILES: int       # tiles per map
    BLOCK_M: int     # tiles at a time
    BLOCK_IN: int    # elements of a window at a time, a power of two
    BLOCK_OUT: int   # elements of a tile, up to a power of two
    PRECISION: str   # of float32 products


@triton.jit
def _toeplitz(w_ptr, first, TURNED: tl.constexpr, P: tl.constexpr):
    """Rows first.. of one channel's T, (BLOCK_IN, BLOCK_OUT); TURNED: of the turned kernel."""
    i = first + tl.arange(0, P.BLOCK_IN)[:, None]
    o = tl.arange(0, P.BLOCK_OUT)[None, :]
    dy = i // P.W - o // P.W + (P.K // 2 - P.HALO)
    dx = i % P.W - o % P.W + P.K // 2
    tap = P.K * P.K - 1 - (dy * P.K + dx) if TURNED else dy * P.K + dx
    inside = (dy >= 0) & (dy < P.K) & (dx >= 0) & (dx < P.K)
    inside = inside & (i < (P.ROWS + 2 * P.HALO) * P.W) & (o < P.ROWS * P.W)
    return tl.load(w_ptr + tap, mask=inside, other=0.0)


@triton.jit
def _window(m, end, first, stride_n, P: tl.constexpr):
    """Offsets in a channel of elements first.. of the windows of tiles m < end, and which exist."""
    i = first + tl.arange(0, P.BLOCK_IN)[None, :]
    at = ((m % P.TILES) * P.ROWS - P.HALO)[:, None] * P.W + i
    exists = (m < end)[:, None] & (at >= 0) & (at < P.H * P.W)
    exists = exists & (i < (P.ROWS + 2 * P.HALO) * P.W)
    return (m // P.TILES).to(tl.int64)[:, None] * stride_n + at, exists  # (BLOCK_M, BLOCK_IN)


@triton.jit
def _tile(m, end, stride_n, P: tl.constexpr):
    """Offsets in a channel of the elements of tiles m < end, and which exist."""
    o = tl.arange(0, P.BLOCK_OUT)[None, :]
    at = ((m % P.TILES) * (P.ROWS * P.W))[:, None] + o
    exists = (m < end)[:, None] & (at < P.H * P.W) & (o < P.ROWS * P.W)
    return (m // P.TILES).to(tl.int64)[:, None] * stride_n + at, exists  # (BLOCK_M, BLOCK_OUT)


@triton.jit
def _conv(x_ptr, w_ptr, toeplitz, m, end, stride_n, TURNED: tl.constexpr, P: tl.constexpr):
    """Depthwise conv of tiles m, (BLOCK_M, BLOCK_OUT), float32; `toeplitz`: T's first rows."""
    window, exists = _window(m, end, 0, stride_n, P)
    z = tl.dot(tl.load(x_ptr + window, mask=exists, other=0.0), toeplitz,
               input_precision=P.PRECISION)
    for first in range(P.BLOCK_IN, (P.ROWS + 2 * P.HALO) * P.W, P.BLOCK_IN):
        window, exists = _window(m, end, first, stride_n, P)
        more = _toeplitz(w_ptr, first, TURNED, P).to(x_ptr.dtype.element_ty)
        z = tl.dot(tl.load(x_ptr + window, mask=exists, other=0.0), more, z,
                   input_precision=P.PRECISION)
    return z


@triton.jit
def _conv_bias(x_ptr, w_ptr, bias, toeplitz, m, end, stride_n, P: tl.constexpr):
    """conv + bias, rounded to x's dtype as plain PyTorch does, in float32.

    So forward and backward see the same z, and the sums that BatchNorm's backward subtracts vanish.
    """
    z = _conv(x_ptr, w_ptr, toeplitz, m, end, stride_n, False, P) + bias
    return z.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _gelu(z):
    return 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))


@triton.jit
def _gelu_slope(z):
    normal_cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
    return normal_cdf + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)


@triton.jit
def _parameter(ptr, c, default: tl.constexpr):
    """Channel c's entry of a (C,) parameter in float32, or `default` if the layer has none."""
    return default if ptr is None else tl.load(ptr + c).to(tl.float32)


@triton.jit
def _moments(x_ptr, w_ptr, bias, g_ptr, start, end, stride_n, P: tl.constexpr):
    """Count, mean and sum of squares around it of g = GELU(conv(x) + bias) over tiles start..end.

    It stores g to g_ptr unless that is None. Each of BLOCK_M lanes merges the centred moments of
    its tiles (Chan, Golub & LeVeque 1983, eq. 2.1). Then the lanes are merged.
    """
    toeplitz = _toeplitz(w_ptr, 0, False, P).to(x_ptr.dtype.element_ty)
    count = tl.full([P.BLOCK_M], 0.0, tl.float32)
    mean = tl.full([P.BLOCK_M], 0.0, tl.float32)
    m2 = tl.full([P.BLOCK_M], 0.0, tl.float32)
    for first in range(start, end, P.BLOCK_M):
        m = first + tl.arange(0, P.BLOCK_M)
        tile, exists = _tile(m, end, stride_n, P)
        g = _gelu(_conv_bias(x_ptr, w_ptr, bias, toeplitz, m, end, stride_n, P))
        if g_ptr is not None:
            tl.store(g_ptr + tile, g, mask=exists)
        tile_count = tl.sum(exists.to(tl.float32), 1)
        tile_mean = tl.sum(tl.where(exists, g, 0.0), 1) / tl.maximum(tile_count, 1.0)
        centred = tl.where(exists, g - tile_mean[:, None], 0.0)
        fraction = tile_count / tl.maximum(count + tile_count, 1.0)
        step = tile_mean - mean
        m2 += tl.sum(centred * centred, 1) + step * step * count * fraction
        mean += step * fraction
        count += tile_count
    total = tl.sum(count, 0)
    centre = tl.sum(mean * count, 0) / tl.maximum(total, 1.0)
    return total, centre, tl.sum(m2 + count * (mean - centre) * (mean - centre), 0)


@triton.jit
def forward_kernel(x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, mean_ptr, var_ptr, n_samples,
                   stride_n, stride_c, eps, RESIDUAL: tl.constexpr, P: tl.constexpr):
    """Training, in one launch: the statistics first, with g in y, then y."""
    c = tl.program_id(0).to(tl.int64)
    x_ptr += c * stride_c
    y_ptr += c * stride_c
    end = n_samples * P.TILES
    total, mean, m2 = _moments(x_ptr, w_ptr + c * P.K * P.K, _parameter(b_ptr, c, 0.0), y_ptr,
                               0, end, stride_n, P)
    var = m2 / total
    tl.store(mean_ptr + c, mean)
    tl.store(var_ptr + c, var)
    scale = _parameter(gamma_ptr, c, 1.0) / tl.sqrt(var + eps)
    shift = _parameter(beta_ptr, c, 0.0)
    tl.debug_barrier()  # other threads of this program wrote g
    for first in range(0, end, P.BLOCK_M):
        tile, exists = _tile(first + tl.arange(0, P.BLOCK_M), end, stride_n, P)
        g = tl.load(y_ptr + tile, mask=exists, other=0.0).to(tl.float32)
        y = (g - mean) * scale + shift
        if RESIDUAL:
            y += tl.load(x_ptr + tile, mask=exists, other=0.0).to(tl.float32)
        tl.store(y_ptr + tile, y, mask=exists)


@triton.jit
def moments_kernel(x_ptr, w_ptr, b_ptr, moments_ptr, n_samples, samples_per_program, stride_n,
                   stride_c, P: tl.constexpr):
    """Training, first of two launches: the results of _moments to moments (3, S, C)."""
    c, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    C, S = tl.num_programs(0), tl.num_programs(1)
    start = s * samples_per_program * P.TILES
    end = tl.minimum((s + 1) * samples_per_program, n_samples) * P.TILES
    total, mean, m2 = _moments(x_ptr + c * stride_c, w_ptr + c * P.K * P.K,
                               _parameter(b_ptr, c, 0.0), None, start, end, stride_n, P)
    partial = s * C + c
    tl.store(moments_ptr + partial, total)
    tl.store(moments_ptr + S * C + partial, mean)
    tl.store(moments_ptr + 2 * S * C + partial, m2)


@triton.jit
def apply_kernel(x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, y_ptr, n_samples,
                 samples_per_program, stride_n, stride_c, eps, RESIDUAL: tl.constexpr,
                 P: tl.constexpr):
    """Evaluation, and the second of two launches in training: y from known statistics."""
    c, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    x_ptr += c * stride_c
    y_ptr += c * stride_c
    w_ptr += c * P.K * P.K
    start = s * samples_per_program * P.TILES
    end = tl.minimum((s + 1) * samples_per_program, n_samples) * P.TILES
    toeplitz = _toeplitz(w_ptr, 0, False, P).to(x_ptr.dtype.element_ty)
    bias = _parameter(b_ptr, c, 0.0)
    mean = _parameter(mean_ptr, c, 0.0)
    scale = _parameter(gamma_ptr, c, 1.0) / tl.sqrt(_parameter(var_ptr, c, 1.0) + eps)
    shift = _parameter(beta_ptr, c, 0.0)
    for first in range(start, end, P.BLOCK_M):
        m = first + tl.arange(0, P.BLOCK_M)
        tile, exists = _tile(m, end, stride_n, P)
        g = _gelu(_conv_bias(x_ptr, w_ptr, bias, toeplitz, m, end, stride_n, P))
        y = (g - mean) * scale + shift
        if RESIDUAL:
            y += tl.load(x_ptr + tile, mask=exists, other=0.0).to(tl.float32)
        tl.store(y_ptr + tile, y, mask=exists)


@triton.jit
def _sums_of_four(t, P: tl.constexpr):
    """(BLOCK_M, BLOCK_OUT) -> (BLOCK_M, BLOCK_OUT // 4)."""
    return tl.sum(tl.reshape(t, [P.BLOCK_M, P.BLOCK_OUT // 4, 4]), 2)


@triton.jit
def _sums(x_ptr, w_ptr, bias, dy_ptr, z_ptr, mean, rstd, start, end, stride_n, P: tl.constexpr):
    """dgamma = sum(dy * xhat) and dbeta = sum(dy) over tiles start..end; stores z = conv + bias.

    The loop adds four neighbours, and the rest is added at the end. With sums of whole rows in the
    loop, LLVM dies of a segmentation fault if a map has an odd number of elements (Triton 3.9).
    """
    toeplitz = _toeplitz(w_ptr, 0, False, P).to(x_ptr.dtype.element_ty)
    dgamma = tl.full([P.BLOCK_M, P.BLOCK_OUT // 4], 0.0, tl.float32)
    dbeta = tl.full([P.BLOCK_M, P.BLOCK_OUT // 4], 0.0, tl.float32)
    for first in range(start, end, P.BLOCK_M):
        m = first + tl.arange(0, P.BLOCK_M)
        tile, exists = _tile(m, end, stride_n, P)
        z_tile, _ = _tile(m, end, P.H * P.W, P)
        z = _conv_bias(x_ptr, w_ptr, bias, toeplitz, m, end, stride_n, P)
        tl.store(z_ptr + z_tile, z, mask=exists)
        dy = tl.load(dy_ptr + tile, mask=exists, other=0.0).to(tl.float32)
        dgamma += _sums_of_four(dy * (_gelu(z) - mean) * rstd, P)
        dbeta += _sums_of_four(dy, P)
    return tl.sum(tl.sum(dgamma, 1), 0), tl.sum(tl.sum(dbeta, 1), 0)


@triton.jit
def _gradients(x_ptr, w_ptr, dy_ptr, dx_ptr, dw_ptr, z_ptr, products_ptr, mean, rstd, scale,
               mean_dy, mean_dyx, start, end, stride_n, RESIDUAL: tl.constexpr, P: tl.constexpr):
    """Store dx and dw over tiles start..end; return db. z becomes dz; products: window^T dz.

    Through BatchNorm: dg = scale * (dy - mean(dy) - xhat * mean(dy * xhat)) (Ioffe & Szegedy 2015,
    section 3), with both means 0 if the statistics are not this batch's. Then dz = dg * GELU'(z).
    """
    z_stride: tl.constexpr = P.H * P.W
    db = tl.full([P.BLOCK_M], 0.0, tl.float32)
    for first in range(start, end, P.BLOCK_M):
        m = first + tl.arange(0, P.BLOCK_M)
        tile, exists = _tile(m, end, stride_n, P)
        z_tile, _ = _tile(m, end, z_stride, P)
        z = tl.load(z_ptr + z_tile, mask=exists, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + tile, mask=exists, other=0.0).to(tl.float32)
        dg = scale * (dy - mean_dy - (_gelu(z) - mean) * rstd * mean_dyx)
        dz = tl.where(exists, dg * _gelu_slope(z), 0.0)
        db += tl.sum(dz, 1)
        tl.store(z_ptr + z_tile, dz, mask=exists)
    tl.debug_barrier()  # other threads of this program wrote dz

    o = tl.arange(0, P.BLOCK_OUT)[None, :]
    for row in range(0, (P.ROWS + 2 * P.HALO) * P.W, P.BLOCK_IN):
        products = tl.full([P.BLOCK_IN, P.BLOCK_OUT], 0.0, tl.float32)
        for first in range(start, end, P.BLOCK_M):
            m = first + tl.arange(0, P.BLOCK_M)
            window, exists = _window(m, end, row, stride_n, P)
            x = tl.load(x_ptr + window, mask=exists, other=0.0)
            z_tile, exists = _tile(m, end, z_stride, P)
            dz = tl.load(z_ptr + z_tile, mask=exists, other=0.0)
            products = tl.dot(tl.trans(x), dz, products, input_precision=P.PRECISION)
        i = row + tl.arange(0, P.BLOCK_IN)[:, None]
        tl.store(products_ptr + i * P.BLOCK_OUT + o, products)

    turned = _toeplitz(w_ptr, 0, True, P).to(x_ptr.dtype.element_ty)
    for first in range(start, end, P.BLOCK_M):
        m = first + tl.arange(0, P.BLOCK_M)
        tile, exists = _tile(m, end, stride_n, P)
        dx = _conv(z_ptr, w_ptr, turned, m, end, z_stride, True, P)
        if RESIDUAL:
            dx += tl.load(dy_ptr + tile, mask=exists, other=0.0).to(tl.float32)
        tl.store(dx_ptr + tile, dx, mask=exists)

    tl.debug_barrier()  # other threads of this program wrote the products
    for first in range(0, P.K * P.K, 16):
        taps = first + tl.arange(0, 16)
        dy = o // P.W + taps[:, None] // P.K - (P.K // 2 - P.HALO)
        dx = o % P.W + taps[:, None] % P.K - P.K // 2
        exists = (taps < P.K * P.K)[:, None] & (o < P.ROWS * P.W)
        exists = exists & (dy >= 0) & (dy < P.ROWS + 2 * P.HALO) & (dx >= 0) & (dx < P.W)
        diagonals = tl.load(products_ptr + (dy * P.W + dx) * P.BLOCK_OUT + o, mask=exists,
                            other=0.0)  # (16, BLOCK_OUT)
        tl.store(dw_ptr + taps, tl.sum(diagonals, 1), mask=taps < P.K * P.K)
    return tl.sum(db, 0)


@triton.jit
def backward_kernel(x_ptr, w_ptr, b_ptr, gamma_ptr, mean_ptr, var_ptr, dy_ptr, dx_ptr, dw_ptr,
                    db_ptr, dgamma_ptr, dbeta_ptr, z_ptr, products_ptr, n_samples, stride_n,
                    stride_c, products_stride, eps, inverse_count, RESIDUAL: tl.constexpr,
                    P: tl.constexpr):
    """All five gradients in one launch. z is room for (C, N, H, W).

    inverse_count is 1 / (N * H * W), or 0 if the statistics are not this batch's.
    """
    c = tl.program_id(0).to(tl.int64)
    x_ptr += c * stride_c
    dy_ptr += c * stride_c
    w_ptr += c * P.K * P.K
    z_ptr += c * n_samples * (P.H * P.W)
    end = n_samples * P.TILES
    mean = _parameter(mean_ptr, c, 0.0)
    rstd = 1.0 / tl.sqrt(_parameter(var_ptr, c, 1.0) + eps)
    dgamma, dbeta = _sums(x_ptr, w_ptr, _parameter(b_ptr, c, 0.0), dy_ptr, z_ptr, mean, rstd,
                          0, end, stride_n, P)
    tl.debug_barrier()  # other threads of this program wrote z
    db = _gradients(x_ptr, w_ptr, dy_ptr, dx_ptr + c * stride_c, dw_ptr + c * P.K * P.K, z_ptr,
                    products_ptr + c * products_stride, mean, rstd,
                    _parameter(gamma_ptr, c, 1.0) * rstd, dbeta * inverse_count,
                    dgamma * inverse_count, 0, end, stride_n, RESIDUAL, P)
    tl.store(db_ptr + c, db)
    tl.store(dgamma_ptr + c, dgamma)
    tl.store(dbeta_ptr + c, dbeta)


@triton.jit
def sums_kernel(x_ptr, w_ptr, b_ptr, mean_ptr, var_ptr, dy_ptr, z_ptr, dgamma_ptr, dbeta_ptr,
                n_samples, samples_per_program, stride_n, stride_c, eps, P: tl.constexpr):
    """Backward, first of two launches: partial sums of dgamma and dbeta (S, C), and z."""
    c, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = s * samples_per_program * P.TILES
    end = tl.minimum((s + 1) * samples_per_program, n_samples) * P.TILES
    mean = _parameter(mean_ptr, c, 0.0)
    rstd = 1.0 / tl.sqrt(_parameter(var_ptr, c, 1.0) + eps)
    dgamma, dbeta = _sums(x_ptr + c * stride_c, w_ptr + c * P.K * P.K, _parameter(b_ptr, c, 0.0),
                          dy_ptr + c * stride_c, z_ptr + c * n_samples * (P.H * P.W), mean, rstd,
                          start, end, stride_n, P)
    partial = s * tl.num_programs(0) + c
    tl.store(dgamma_ptr + partial, dgamma)
    tl.store(dbeta_ptr + partial, dbeta)


@triton.jit
def gradients_kernel(x_ptr, w_ptr, gamma_ptr, mean_ptr, var_ptr, dgamma_ptr, dbeta_ptr, dy_ptr,
                     dx_ptr, dw_ptr, db_ptr, z_ptr, products_ptr, n_samples, samples_per_program,
                     stride_n, stride_c, products_stride, eps, inverse_count,
                     RESIDUAL: tl.constexpr, P: tl.constexpr):
    """Backward, second of two launches: dx, and partial sums of dw (S, C, K * K) and db (S, C)."""
    c, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    partial = s * tl.num_programs(0) + c
    start = s * samples_per_program * P.TILES
    end = tl.minimum((s + 1) * samples_per_program, n_samples) * P.TILES
    mean = _parameter(mean_ptr, c, 0.0)
    rstd = 1.0 / tl.sqrt(_parameter(var_ptr, c, 1.0) + eps)
    dgamma, dbeta = tl.load(dgamma_ptr + c), tl.load(dbeta_ptr + c)
    db = _gradients(x_ptr + c * stride_c, w_ptr + c * P.K * P.K, dy_ptr + c * stride_c,
                    dx_ptr + c * stride_c, dw_ptr + partial * P.K * P.K,
                    z_ptr + c * n_samples * (P.H * P.W), products_ptr + partial * products_stride,
                    mean, rstd, _parameter(gamma_ptr, c, 1.0) * rstd, dbeta * inverse_count,
                    dgamma * inverse_count, start, end, stride_n, RESIDUAL, P)
    tl.store(db_ptr + partial, db)
