"""The fused operation in Triton: one or two launches per pass, convs as tensor-core products.

Every step stays within a channel: the window of the conv, GELU, the means of BatchNorm. So one
program owns a channel, and does the whole operation while the channel stays in L2. If a pass takes
two launches, program (c, s) owns slice s of S of the samples of channel c.

    sample   one of the N images in x (N, C, H, W)
    map      one channel of a sample, H x W elements, contiguous
    tile     TILE_H full rows of a map: the outputs that one row of a product computes
    window   the rows that a tile depends on: its own, and HALO more on either side
    block    BLOCK_M tiles, loaded at once: BLOCK_T of the same map, of BLOCK_M / BLOCK_T samples

    row   map (6 x 5)   tile (TILE_H = 2)   window of tile 1 (K = 3, HALO = 1)
     0    . . . . .     0
     1    . . . . .     0                 x x x x x
     2    . . . . .     1                 x x x x x
     3    . . . . .     1                 x x x x x
     4    . . . . .     2                 x x x x x
     5    . . . . .     2

ConvMixer 24 on an H100 (250 samples, 8 x 8 maps, K = 9, float16): a tile is a whole map, T is 64 x
64, a block is 128 samples. So the forward conv of a channel is two products.

The conv is a product with a Toeplitz matrix T, the same for all tiles of a channel (drawn in
README.md):

    z[m, o] = sum_i x[m, i] T[i, o]
    T[i, o] = weight[ky, kx], the tap from input i of the window to output o of the tile

where m counts tiles. The input's gradient is the same product with the kernel flipped in both
directions. The weight's gradient needs the same windows of dz: dz_window^T x is (window, tile), and
its diagonals add up to the K * K taps of the flipped kernel. A tile that is the whole map needs no
halo. T spreads a NaN or an infinity over its tile, where a conv spreads it over its window.

The forward pass in one launch, one program per channel c:

    T = toeplitz(weight[c])                                     _toeplitz
    for each block of tiles:                                    _moments
        g = GELU(window(x) @ T + bias)                          _window, _conv_bias, _gelu
        merge g into mean and variance
        y = g
    for all elements of the channel:                            forward_kernel
        y = (y - mean) / sqrt(var + eps) * gamma + beta (+ x)

The backward pass, which recomputes z = conv(x) + bias:

    for each block of tiles:                                    _sums
        dgamma += sum(dy * (GELU(z) - mean)) / sqrt(var + eps)
        dbeta  += sum(dy)
    for each block of tiles:                                    _gradients
        dz = dy through BatchNorm and GELU                      _gradient_of_z
        db += sum(dz)
        products += dz_window^T x
        dx = window(dz) @ toeplitz(weight[c] flipped) (+ dy)
    dw = sums of the diagonals of products                      _store_dw

To understand the kernels, this file is enough: depthwise_launch.py only chooses sizes and launches,
depthwise_op.py registers the operator. With few or long channels, a pass takes two launches:

               one launch    two: the first    two: the second
    forward    MOMENTS, y    MOMENTS, no y     not MOMENTS, as in evaluation
    backward   SUMS, dx      SUMS, no dx       not SUMS

Activations have any stride_n and stride_c. Products are in the dtype of x, sums and statistics in
float32. Without atomics, the same input gives the same bits.
"""
from typing import NamedTuple

import triton
import triton.language as tl


class Tiling(NamedTuple):
    """How maps are cut into tiles: the meta-parameters of each kernel, its argument META."""
    H: int
    W: int
    K: int
    TILE_H: int      # rows of a tile
    HALO: int        # 0 if a tile is a whole map
    TILES: int       # tiles per map
    BLOCK_M: int     # a power of two, as all blocks
    BLOCK_T: int
    BLOCK_IN: int    # elements of a window at a time
    BLOCK_OUT: int   # elements of a tile, padded
    PRECISION: str   # float32 products: tf32 or tf32x3


@triton.jit
def _toeplitz(w_ptr, first, FLIPPED: tl.constexpr, META: tl.constexpr):
    """Rows first.. of one channel's T, (BLOCK_IN, BLOCK_OUT); FLIPPED: of the flipped kernel."""
    i = first + tl.arange(0, META.BLOCK_IN)[:, None]
    o = tl.arange(0, META.BLOCK_OUT)[None, :]
    ky = i // META.W - o // META.W + (META.K // 2 - META.HALO)
    kx = i % META.W - o % META.W + META.K // 2
    tap = META.K * META.K - 1 - (ky * META.K + kx) if FLIPPED else ky * META.K + kx
    inside = (ky >= 0) & (ky < META.K) & (kx >= 0) & (kx < META.K)
    inside = inside & (i < (META.TILE_H + 2 * META.HALO) * META.W) & (o < META.TILE_H * META.W)
    return tl.load(w_ptr + tap, mask=inside, other=0.0)


@triton.jit
def _num_blocks(start, end, META: tl.constexpr):
    """Number of blocks in samples start..end."""
    return tl.cdiv(end - start, META.BLOCK_M // META.BLOCK_T) * tl.cdiv(META.TILES, META.BLOCK_T)


@triton.jit
def _block_origin(block, start, META: tl.constexpr):
    """The first sample and the first tile of a block."""
    across = tl.cdiv(META.TILES, META.BLOCK_T)
    return start + block // across * (META.BLOCK_M // META.BLOCK_T), block % across * META.BLOCK_T


@triton.jit
def _tile_offsets(block, start, end, first, last, COUNT: tl.constexpr, stride_n,
                  META: tl.constexpr):
    """The memory offsets of elements first .. last - 1 of each tile in a block. Element 0 is the
    first one of the tile; a window starts before it.

    Returns the block's offset in its channel, a scalar, so that only scalars change from block to
    block; the elements' offsets from there, (BLOCK_M, COUNT); and which elements exist. In the
    drawing above, with BLOCK_T = 4, row m = 1 of block 0 is tile 1 of sample 0: its elements are at
    10 .. 19 of the map, its window at 5 .. 24. Row 3 is padding, row 4 is tile 0 of sample 1.
    """
    n, t = _block_origin(block, start, META)
    m, i = tl.arange(0, META.BLOCK_M)[:, None], tl.arange(0, COUNT)[None, :]
    sample, tile = m // META.BLOCK_T, m % META.BLOCK_T  # of each row, counted from n and t
    # shift + at: the position in the map
    shift = t * (META.TILE_H * META.W) + first
    at = tile * (META.TILE_H * META.W) + i
    # samples of this slice, elements of the map, elements that were asked for
    exists = (sample < end - n) & (at >= -shift) & (at < META.H * META.W - shift)
    exists = exists & (i < last - first)
    return tl.cast(n, tl.int64) * stride_n + shift, sample * stride_n + at, exists


@triton.jit
def _tile(block, start, end, stride_n, META: tl.constexpr):
    """_tile_offsets of whole tiles, (BLOCK_M, BLOCK_OUT)."""
    return _tile_offsets(block, start, end, 0, META.TILE_H * META.W, META.BLOCK_OUT, stride_n, META)


@triton.jit
def _window(x_ptr, block, start, end, first, stride_n, META: tl.constexpr):
    """Elements first.. of the windows of a block, (BLOCK_M, BLOCK_IN)."""
    base, window, exists = _tile_offsets(
        block, start, end, first - META.HALO * META.W, (META.TILE_H + META.HALO) * META.W,
        META.BLOCK_IN, stride_n, META)
    return tl.load(x_ptr + base + window, mask=exists, other=0.0)


@triton.jit
def _flat_offsets(first, end, stride_n, META: tl.constexpr):
    """Offsets of the elements from `first` on, and a mask of those before `end`.

    Elements are counted over all samples of the channel: elementwise steps need no tiles.
    """
    e = first + tl.arange(0, META.BLOCK_M * META.BLOCK_OUT)
    return (e // (META.H * META.W)).to(tl.int64) * stride_n + e % (META.H * META.W), e < end


@triton.jit
def _conv(x_ptr, w_ptr, toeplitz, block, start, end, stride_n, FLIPPED: tl.constexpr,
          META: tl.constexpr):
    """Depthwise conv of a block, (BLOCK_M, BLOCK_OUT), float32; `toeplitz`: T's first rows."""
    # the first BLOCK_IN elements of the windows, then the others, if there are any
    x = _window(x_ptr, block, start, end, 0, stride_n, META)
    z = tl.dot(x, toeplitz, input_precision=META.PRECISION)
    for first in range(META.BLOCK_IN, (META.TILE_H + 2 * META.HALO) * META.W, META.BLOCK_IN):
        x = _window(x_ptr, block, start, end, first, stride_n, META)
        more = _toeplitz(w_ptr, first, FLIPPED, META)
        z = tl.dot(x, more, z, input_precision=META.PRECISION)
    return z


@triton.jit
def _conv_bias(x_ptr, w_ptr, bias, toeplitz, block, start, end, stride_n, META: tl.constexpr):
    """conv + bias, rounded to x's dtype as plain PyTorch does, in float32.

    So both passes see the same z, whose moments BatchNorm's backward subtracts.
    """
    z = _conv(x_ptr, w_ptr, toeplitz, block, start, end, stride_n, False, META) + bias
    return z.to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _normal_cdf(z):
    """Phi(z) = 2^p(|z|) if z < 0, else 1 - 2^p(|z|). The absolute error of Phi is at most 2e-8.

    In float32 this is as exact as 0.5 * (1 + erf(z / sqrt(2))), in 12 instructions instead of 31.
    """
    h = tl.abs(z)
    p = -1.67916944e-6 * h + 2.65849409e-5
    p = p * h - 1.30830094e-4
    p = p * h - 2.56855312e-4
    p = p * h + 7.20178085e-3
    p = p * h - 5.25795772e-2
    p = p * h - 4.59184333e-1
    p = p * h - 1.15110778
    tail = tl.exp2(p * h - 0.999999947)
    return tl.where(z < 0, tail, 1.0 - tail)


@triton.jit
def _gelu(z, x_ptr):
    """GELU(z), rounded to the dtype of x: what is stored has the moments that normalise it."""
    return (z * _normal_cdf(z)).to(x_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _gelu_slope(z):
    """GELU'(z) = Phi(z) + z phi(z)."""
    density = tl.exp2(-0.7213475204444817 * z * z - 1.3257480647361593)  # exp(-z^2/2) / sqrt(2 pi)
    return _normal_cdf(z) + z * density


@triton.jit
def _parameter(ptr, c, default: tl.constexpr):
    """Channel c's entry of a (C,) parameter in float32, or `default` if the layer has none."""
    return default if ptr is None else tl.load(ptr + c).to(tl.float32)


@triton.jit
def _moments(x_ptr, w_ptr, bias, g_ptr, start, end, stride_n, META: tl.constexpr):
    """Mean and variance of g = GELU(conv(x) + bias) over samples start..end.

    Stores g to g_ptr unless that is None. Each of BLOCK_M lanes merges the centred moments of its
    tiles (Chan, Golub & LeVeque 1983, eq. 2.1). Then the lanes are merged.
    """
    toeplitz = _toeplitz(w_ptr, 0, False, META)
    count = tl.full([META.BLOCK_M], 0.0, tl.float32)
    mean = tl.full([META.BLOCK_M], 0.0, tl.float32)
    m2 = tl.full([META.BLOCK_M], 0.0, tl.float32)
    m = tl.arange(0, META.BLOCK_M)
    for block in range(0, _num_blocks(start, end, META)):
        # g of a block
        n, t = _block_origin(block, start, META)
        base, tile, exists = _tile(block, start, end, stride_n, META)
        z = _conv_bias(x_ptr, w_ptr, bias, toeplitz, block, start, end, stride_n, META)
        g = _gelu(z, x_ptr)
        if g_ptr is not None:
            tl.store(g_ptr + base + tile, g, mask=exists)
        # how many elements each tile has: those of its map from here on, at most a whole tile
        remaining = META.H * META.W - (t + m % META.BLOCK_T) * (META.TILE_H * META.W)
        remaining = tl.where(m // META.BLOCK_T < end - n, tl.maximum(remaining, 0), 0)
        tile_count = tl.minimum(remaining, META.TILE_H * META.W).to(tl.float32)
        # their mean and centred squares
        tile_mean = tl.sum(tl.where(exists, g, 0.0), 1) / tl.maximum(tile_count, 1.0)
        centred = tl.where(exists, g - tile_mean[:, None], 0.0)
        # into the lane's moments
        fraction = tile_count / tl.maximum(count + tile_count, 1.0)
        step = tile_mean - mean
        m2 += tl.sum(centred * centred, 1) + step * step * count * fraction
        mean += step * fraction
        count += tile_count
    total = tl.sum(count, 0)
    centre = tl.sum(mean * count, 0) / total
    return centre, tl.sum(m2 + count * (mean - centre) * (mean - centre), 0) / total


@triton.jit
def _store(t, to_ptr, added_ptr, at, exists, RESIDUAL: tl.constexpr):
    """Store t, with RESIDUAL plus what is at added_ptr."""
    if RESIDUAL:
        t += tl.load(added_ptr + at, mask=exists, other=0.0).to(tl.float32)
    tl.store(to_ptr + at, t, mask=exists)


@triton.jit
def forward_kernel(
        x_ptr, w_ptr, b_ptr, gamma_ptr, beta_ptr, y_ptr, mean_ptr, var_ptr,  # tensors
        n_samples, samples_per_program, stride_n, stride_c, eps,             # numbers
        RESIDUAL: tl.constexpr, MOMENTS: tl.constexpr, META: tl.constexpr):  # what to compile
    """y and the statistics it takes, in one launch, or in two.

    x, y (N, C, H, W) and w (C, K, K), of one dtype; b, gamma, beta (C,).
    MOMENTS: store each slice's mean and variance, (S, C), and stop if y_ptr is None. With y_ptr, S
    is 1: y first holds GELU's output and is then normalised in place. Not MOMENTS, as in evaluation
    and in the second of two launches: read them, (C,).
    """
    # this program's channel, slice and parameters
    c, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    start = s * samples_per_program
    end = tl.minimum(start + samples_per_program, n_samples)
    x_ptr += c * stride_c
    w_ptr += c * META.K * META.K
    if y_ptr is not None:
        y_ptr += c * stride_c
    bias = _parameter(b_ptr, c, 0.0)

    # the statistics
    if MOMENTS:
        mean, var = _moments(x_ptr, w_ptr, bias, y_ptr, start, end, stride_n, META)
        tl.store(mean_ptr + s * tl.num_programs(0) + c, mean)
        tl.store(var_ptr + s * tl.num_programs(0) + c, var)
    else:
        mean, var = _parameter(mean_ptr, c, 0.0), _parameter(var_ptr, c, 1.0)
    scale = _parameter(gamma_ptr, c, 1.0) / tl.sqrt(var + eps)
    shift = _parameter(beta_ptr, c, 0.0)

    # y, recomputed from x, or normalised in place from g
    if not MOMENTS:
        toeplitz = _toeplitz(w_ptr, 0, False, META)
        for block in range(0, _num_blocks(start, end, META)):
            base, tile, exists = _tile(block, start, end, stride_n, META)
            z = _conv_bias(x_ptr, w_ptr, bias, toeplitz, block, start, end, stride_n, META)
            y = (_gelu(z, x_ptr) - mean) * scale + shift
            _store(y, y_ptr + base, x_ptr + base, tile, exists, RESIDUAL)
    elif y_ptr is not None:
        tl.debug_barrier()  # other threads of this program wrote g
        for first in range(0, n_samples * (META.H * META.W), META.BLOCK_M * META.BLOCK_OUT):
            at, exists = _flat_offsets(first, n_samples * (META.H * META.W), stride_n, META)
            g = tl.load(y_ptr + at, mask=exists, other=0.0).to(tl.float32)
            _store((g - mean) * scale + shift, y_ptr, x_ptr, at, exists, RESIDUAL)


@triton.jit
def _group_sums(n: tl.constexpr, t, META: tl.constexpr):
    """Sum each group of n adjacent elements of a block."""
    return tl.sum(tl.reshape(t, [META.BLOCK_M * META.BLOCK_OUT // n, n]), 1)


@triton.jit
def _sums(x_ptr, w_ptr, bias, dy_ptr, z_ptr, mean, rstd, start, end, stride_n, META: tl.constexpr):
    """dgamma = sum(dy * xhat), dbeta = sum(dy) over samples start..end; z = conv + bias to z_ptr.

    The loop adds groups of four elements only: adding whole rows there crashes LLVM if a map has an
    odd number of elements (Triton 3.8 and 3.9).
    """
    toeplitz = _toeplitz(w_ptr, 0, False, META)
    # sums of four neighbours, over the blocks
    dgamma = tl.full([META.BLOCK_M * META.BLOCK_OUT // 4], 0.0, tl.float32)
    dbeta = tl.full([META.BLOCK_M * META.BLOCK_OUT // 4], 0.0, tl.float32)
    for block in range(0, _num_blocks(start, end, META)):
        base, tile, exists = _tile(block, start, end, stride_n, META)
        z = _conv_bias(x_ptr, w_ptr, bias, toeplitz, block, start, end, stride_n, META)
        if z_ptr is not None:
            tl.store(z_ptr + base + tile, z, mask=exists)
        dy = tl.load(dy_ptr + base + tile, mask=exists, other=0.0).to(tl.float32)
        dgamma += _group_sums(4, dy * (_gelu(z, x_ptr) - mean), META)
        dbeta += _group_sums(4, dy, META)
    # sums of these, by rows first: LLVM crashes at a single sum, too
    dgamma = tl.reshape(dgamma, [META.BLOCK_M, META.BLOCK_OUT // 4])
    dbeta = tl.reshape(dbeta, [META.BLOCK_M, META.BLOCK_OUT // 4])
    return tl.sum(tl.sum(dgamma, 1), 0) * rstd, tl.sum(tl.sum(dbeta, 1), 0)


@triton.jit
def _gradient_of_z(z, dy, x_ptr, mean, rstd, scale, mean_dy, mean_dyx):
    """dz from dy. BatchNorm: dg = scale * (dy - mean(dy) - xhat * mean(dy * xhat)), Ioffe & Szegedy
    2015, section 3; both means are 0 if the statistics are fixed. GELU: dz = dg * GELU'(z).
    """
    dg = scale * (dy - mean_dy) - (_gelu(z, x_ptr) - mean) * (scale * rstd * mean_dyx)
    return dg * _gelu_slope(z)


@triton.jit
def _gradients(x_ptr, w_ptr, bias, dy_ptr, dx_ptr, z_ptr, products_ptr, mean, rstd, scale, mean_dy,
               mean_dyx, start, end, stride_n, RESIDUAL: tl.constexpr, META: tl.constexpr):
    """Store dx, and dz_window^T x for dw; return db.

    z_ptr is overwritten with dz. If z_ptr is None (a tile is a whole map), dz is recomputed from x
    and dy.
    """
    MAP: tl.constexpr = META.H * META.W
    WINDOW: tl.constexpr = (META.TILE_H + 2 * META.HALO) * META.W
    db = tl.full([META.BLOCK_M * META.BLOCK_OUT // 32], 0.0, tl.float32)
    # dz over the whole slice, in place of z
    if z_ptr is not None:
        for first in range(start * MAP, end * MAP, META.BLOCK_M * META.BLOCK_OUT):
            at, exists = _flat_offsets(first, end * MAP, stride_n, META)
            z = tl.load(z_ptr + at, mask=exists, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + at, mask=exists, other=0.0).to(tl.float32)
            dz = _gradient_of_z(z, dy, x_ptr, mean, rstd, scale, mean_dy, mean_dyx)
            dz = tl.where(exists, dz, 0.0)
            db += _group_sums(32, dz, META)
            tl.store(z_ptr + at, dz, mask=exists)
        tl.debug_barrier()  # other threads of this program wrote dz

    # for dw: products of dz windows with x; and dx, if BLOCK_IN holds a whole window
    toeplitz = _toeplitz(w_ptr, 0, False, META)
    flipped = _toeplitz(w_ptr, 0, True, META)
    for first in range(0, WINDOW, META.BLOCK_IN):
        products = tl.full([META.BLOCK_IN, META.BLOCK_OUT], 0.0, tl.float32)
        for block in range(0, _num_blocks(start, end, META)):
            base, tile, exists = _tile(block, start, end, stride_n, META)
            # dz of this block: recomputed, or a window of what was stored above
            if z_ptr is None:
                dy = tl.load(dy_ptr + base + tile, mask=exists, other=0.0).to(tl.float32)
                z = _conv_bias(x_ptr, w_ptr, bias, toeplitz, block, start, end, stride_n, META)
                dz = _gradient_of_z(z, dy, x_ptr, mean, rstd, scale, mean_dy, mean_dyx)
                dz = tl.where(exists, dz, 0.0)
                db += _group_sums(32, dz, META)
                dz = dz.to(x_ptr.dtype.element_ty)
            else:
                dz = _window(z_ptr, block, start, end, first, stride_n, META)
            # dw: add dz_window^T x
            x = tl.load(x_ptr + base + tile, mask=exists, other=0.0)
            products = tl.dot(tl.trans(dz), x, products, input_precision=META.PRECISION)
            # dx: the same product as forward, with T flipped
            if WINDOW <= META.BLOCK_IN:
                dx = tl.dot(dz, flipped, input_precision=META.PRECISION)
                _store(dx, dx_ptr, dy_ptr, base + tile, exists, RESIDUAL)
        i, o = tl.arange(0, META.BLOCK_IN)[:, None], tl.arange(0, META.BLOCK_OUT)[None, :]
        tl.store(products_ptr + (first + i) * META.BLOCK_OUT + o, products)

    # dx, if a window is longer than BLOCK_IN
    if WINDOW > META.BLOCK_IN:
        for block in range(0, _num_blocks(start, end, META)):
            base, tile, exists = _tile(block, start, end, stride_n, META)
            dx = _conv(z_ptr, w_ptr, flipped, block, start, end, stride_n, True, META)
            _store(dx, dx_ptr, dy_ptr, base + tile, exists, RESIDUAL)
    return tl.sum(db, 0)


@triton.jit
def _store_dw(dw_ptr, products_ptr, META: tl.constexpr):
    """dw from the diagonals of dz_window^T x: each sums up to a tap of the flipped kernel."""
    K: tl.constexpr = META.K
    o = tl.arange(0, META.BLOCK_OUT)[None, :]
    for first in range(0, K * K, 32):
        # where the diagonals of 32 taps run, in the window of dz
        taps = first + tl.arange(0, 32)
        row = o // META.W + taps[:, None] // K - (K // 2 - META.HALO)
        column = o % META.W + taps[:, None] % K - K // 2
        exists = (taps < K * K)[:, None] & (o < META.TILE_H * META.W)
        exists = exists & (row >= 0) & (row < META.TILE_H + 2 * META.HALO)
        exists = exists & (column >= 0) & (column < META.W)
        # their sums
        at = (row * META.W + column) * META.BLOCK_OUT + o
        diagonals = tl.load(products_ptr + at, mask=exists, other=0.0)  # (32, BLOCK_OUT)
        tl.store(dw_ptr + K * K - 1 - taps, tl.sum(diagonals, 1), mask=taps < K * K)


@triton.jit
def backward_kernel(
        x_ptr, w_ptr, b_ptr, gamma_ptr, mean_ptr, var_ptr, dy_ptr,           # tensors of the pass
        dx_ptr, dw_ptr, db_ptr, dgamma_ptr, dbeta_ptr,                       # gradients
        z_ptr, products_ptr,                                                 # buffers
        n_samples, samples_per_program, stride_n, stride_c, products_stride, eps, inverse_count,
        RESIDUAL: tl.constexpr, SUMS: tl.constexpr, META: tl.constexpr):     # what to compile
    """All five gradients in one launch, or in two.

    x, dy, dx (N, C, H, W); b, gamma, mean, var (C,); products: a buffer for dz_window^T x.
    SUMS: compute dgamma and dbeta of each slice, (S, C), and stop if dx_ptr is None. Otherwise read
    their totals, (C,). Then dx, and of each slice dw, (S, C, K * K), and db, (S, C). z is a buffer
    of the shape of x, None if a tile is a whole map. inverse_count is 1 / (N * H * W), or 0 if the
    statistics are not this batch's.
    """
    # this program's channel, slice and parameters
    c, s = tl.program_id(0).to(tl.int64), tl.program_id(1)
    partial = s * tl.num_programs(0) + c
    start = s * samples_per_program
    end = tl.minimum(start + samples_per_program, n_samples)
    x_ptr += c * stride_c
    dy_ptr += c * stride_c
    w_ptr += c * META.K * META.K
    if z_ptr is not None:
        z_ptr += c * stride_c
    bias = _parameter(b_ptr, c, 0.0)
    mean = _parameter(mean_ptr, c, 0.0)
    rstd = 1.0 / tl.sqrt(_parameter(var_ptr, c, 1.0) + eps)

    # sums over dy: dgamma and dbeta
    if SUMS:
        dgamma, dbeta = _sums(x_ptr, w_ptr, bias, dy_ptr, z_ptr, mean, rstd, start, end, stride_n,
                              META)
        tl.store(dgamma_ptr + partial, dgamma)
        tl.store(dbeta_ptr + partial, dbeta)
        tl.debug_barrier()  # other threads of this program wrote z
    else:
        dgamma, dbeta = tl.load(dgamma_ptr + c), tl.load(dbeta_ptr + c)

    # dx, db and dw
    if dx_ptr is not None:
        dx_ptr += c * stride_c
        products_ptr += partial * products_stride
        scale = _parameter(gamma_ptr, c, 1.0) * rstd
        mean_dy, mean_dyx = dbeta * inverse_count, dgamma * inverse_count
        db = _gradients(x_ptr, w_ptr, bias, dy_ptr, dx_ptr, z_ptr, products_ptr, mean, rstd, scale,
                        mean_dy, mean_dyx, start, end, stride_n, RESIDUAL, META)
        tl.store(db_ptr + partial, db)
        tl.debug_barrier()  # other threads of this program wrote the products
        _store_dw(dw_ptr + partial * META.K * META.K, products_ptr, META)
