"""Device code that several kernels share. Everything is computed in fp32: values are widened right after a load.

``coef`` is the [5, C] fp32 matrix of a BatchNorm's coefficients: rows mean, biased variance, rstd, scale and shift;
``abc`` is [3, C]: BatchNorm's backward as ``dy = A*dz + B*y + C``. Where its statistics are constants B and C are 0,
and kernels are given no y: it is not read, and ``0*y`` is not NaN where y is not finite.
"""

import triton
import triton.language as tl

MEAN = tl.constexpr(0)
VAR = tl.constexpr(1)
RSTD = tl.constexpr(2)
SCALE = tl.constexpr(3)
SHIFT = tl.constexpr(4)


@triton.jit
def within(index, size: tl.constexpr, block: tl.constexpr):
    """``index < size`` for indices in blocks; known to hold where the blocks fill the size."""
    if size % block == 0:
        return index >= 0
    else:
        return index < size


@triton.jit
def repeats(trips):
    """Tell the compiler that a loop of ``trips`` has one at least.

    Otherwise it makes code for none, which sets the loop's accumulators to zero between its products and its end; and
    ptxas may then let each wgmma wait until the one before has ended (its message C7515).
    """
    tl.assume(trips > 0)


TAP_BITS = tl.constexpr(31)  # taps of a window at most whose bits `taps_inside` has


@triton.jit
def taps_inside(h, w, ok, H, W, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr):
    """Which taps of a window are inside [H, W], for windows [B] that begin at row ``h`` and column ``w``: bit
    ``kh*KW + kw`` of each, int32; none where not ``ok``."""
    rows = (h * 0).to(tl.int32)
    columns = rows
    if KH * KW <= TAP_BITS:
        for kh in tl.static_range(KH):
            rows |= ((h + kh * DILATION >= 0) & (h + kh * DILATION < H) & ok).to(tl.int32) << (kh * KW)
        for kw in tl.static_range(KW):
            columns |= ((w + kw * DILATION >= 0) & (w + kw * DILATION < W)).to(tl.int32) << kw
    return rows * columns


@triton.jit
def subsampled(m, H, W, STRIDE: tl.constexpr):
    """The pixel of [N, H, W] that is pixel ``m`` of [N, OH, OW], every STRIDE-th of both axes from the first on."""
    oh = (H + STRIDE - 1) // STRIDE
    ow = (W + STRIDE - 1) // STRIDE
    return (m // (oh * ow) * H + m // ow % oh * STRIDE) * W + m % ow * STRIDE


@triton.jit
def subsample(pixel, H, W, STRIDE: tl.constexpr):
    """The pixel of [N, OH, OW] that `subsampled` makes ``pixel`` of [N, H, W], and whether there is one."""
    oh = (H + STRIDE - 1) // STRIDE
    ow = (W + STRIDE - 1) // STRIDE
    h = pixel // W % H
    w = pixel % W
    m = (pixel // (H * W) * oh + h // STRIDE) * ow + w // STRIDE
    return m, (h % STRIDE == 0) & (w % STRIDE == 0)


@triton.jit
def relu(z):
    """``max(z, 0)`` that keeps NaN, as PyTorch's does."""
    return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_backward(dout, out):
    """``dout`` where ``out`` is positive (or NaN), else 0."""
    return tl.where(out <= 0.0, 0.0, dout)


@triton.jit
def normal(z):
    """The normal distribution's cumulative function and density at z, by Abramowitz & Stegun 1964, 7.1.26 (to 1e-7)."""
    size = tl.abs(z)
    t = 1.0 / (1.0 + 0.23164190 * size)  # 0.3275911 / sqrt(2)
    e = tl.exp(-0.5 * z * z)
    p = ((((0.5307027 * t - 0.7265760) * t + 0.7107069) * t - 0.1422484) * t + 0.1274148) * t
    return tl.where(z < 0, p * e, 1.0 - p * e), 0.3989422804 * e


@triton.jit
def activate(z, GELU: tl.constexpr):
    """``gelu(z)``, ``z`` times the normal distribution's cumulative function at it, or ``relu(z)``."""
    if GELU:
        return z * normal(z)[0]
    else:
        return relu(z)


@triton.jit
def gelu_backward(dout, z):
    """``dout`` times the derivative of GELU at z."""
    below, density = normal(z)
    return dout * (below + z * density)


@triton.jit
def zero_outside(z, inside):
    """fp32 ``z`` where ``inside``, else 0, whatever z is there: ``tl.where`` in one instruction a value.

    A minimum of the bits as unsigned integers. LLVM moves a select behind the rounding to 16 bits, where it costs
    several instructions a pair of values.
    """
    most = tl.where(inside, 0xFFFFFFFF, 0).to(tl.uint32)
    return tl.minimum(z.to(tl.uint32, bitcast=True), most).to(tl.float32, bitcast=True)


@triton.jit
def store_moments(values, rows, count_ptr, mean_ptr, m2_ptr, tile, channel, channel_ok, C, first):
    """Reduce a tile ``values`` [BN, BM] of BM rows of the matrix, of which ``rows`` count, to count, mean and M2.

    Args:
        rows: int, number of leading rows that are inside the matrix.
        count_ptr, mean_ptr, m2_ptr: [T], [T, C], [T, C]; row ``tile`` is written.
        channel, channel_ok: [BN] channel of each value, and whether it exists.
        first: whether this program is the one of its tile that writes the count.
    """
    inside = (tl.arange(0, values.shape[1]) < rows)[None, :]
    count = rows.to(tl.float32)
    mean = tl.sum(tl.where(inside, values, 0.0), 1) * (1.0 / count)
    deviation = tl.where(inside, values - mean[:, None], 0.0)
    tl.store(mean_ptr + tile * C + channel, mean, mask=channel_ok)
    tl.store(m2_ptr + tile * C + channel, tl.sum(deviation * deviation, 1), mask=channel_ok)
    if first:
        tl.store(count_ptr + tile, count)


@triton.jit
def welford(value, ok, before, mean, m2):
    """Mean and M2 (sum of squared deviations) of each place with one more ``value`` where ``ok``, behind ``before``
    others (Welford 1962)."""
    deviation = tl.where(ok, value - mean, 0.0)
    mean += deviation * (1.0 / (before + 1))
    return mean, m2 + deviation * (value - mean)


@triton.jit
def store_part_moments(
    mean,
    m2,
    rows,
    row,
    count_ptr,
    mean_ptr,
    m2_ptr,
    part,
    channel,
    channel_ok,
    C,
    first,
    BITS: tl.constexpr,
    WARPS: tl.constexpr,
):
    """Row ``part`` of the statistics [T], [T, C], [T, C]: those of each row of its blocks, see `welford`,
    merged (Chan et al. 1979).

    Args:
        mean, m2: [BC, BM]. row: [BM], the places of a block. rows: int, of all blocks.
        first: whether this program is the one of its part that writes the count.
        BITS, WARPS: see `sum_pixels`.
    """
    BLOCK: tl.constexpr = row.shape[0]
    count = tl.maximum((rows - row + BLOCK - 1) // BLOCK, 0).to(tl.float32)[None, :]
    merged = sum_pixels(count * mean, BITS, WARPS) / rows.to(tl.float32)
    deviation = mean - merged[:, None]
    m2 = sum_pixels(m2 + count * deviation * deviation, BITS, WARPS)
    tl.store(mean_ptr + part.to(tl.int64) * C + channel, merged, mask=channel_ok)
    tl.store(m2_ptr + part.to(tl.int64) * C + channel, m2, mask=channel_ok)
    if first:
        tl.store(count_ptr + part, rows.to(tl.float32))


@triton.jit
def bn_backward(dz, y, abc_ptr, channel, channel_ok, C):
    """BatchNorm's backward ``A*dz + B*y + C`` of tiles [BM, BC] in the columns ``channel``, fp32."""
    a = tl.load(abc_ptr + channel, mask=channel_ok, other=0.0)
    b = tl.load(abc_ptr + C + channel, mask=channel_ok, other=0.0)
    c = tl.load(abc_ptr + 2 * C + channel, mask=channel_ok, other=0.0)
    return a[None, :] * dz.to(tl.float32) + (b[None, :] * y.to(tl.float32) + c[None, :])  # two fused operations


@triton.jit
def frozen_bn_backward(dz, abc_ptr, channel, channel_ok):
    """`bn_backward` where the statistics are constants: ``A*dz``, fp32."""
    a = tl.load(abc_ptr + channel, mask=channel_ok, other=0.0)
    return a[None, :] * dz.to(tl.float32)


@triton.jit
def load_gradient(dz_ptr, y_ptr, abc_ptr, offset, ok, row_ok, channel, channel_ok, C):
    """A convolution's gradient [BM, BC] in dz's dtype: ``A*dz + B*y + C`` at ``offset`` where ``ok``, ``A*dz`` without
    y_ptr, dz without abc_ptr. Zeros in rows that are not ``row_ok``, where the first would be C alone."""
    dy = tl.load(dz_ptr + offset, mask=ok, other=0.0)
    if abc_ptr is not None:
        if y_ptr is not None:
            y = tl.load(y_ptr + offset, mask=ok, other=0.0)
            wide = zero_outside(bn_backward(dy, y, abc_ptr, channel, channel_ok, C), row_ok[:, None])
        else:
            wide = frozen_bn_backward(dy, abc_ptr, channel, channel_ok)
        dy = wide.to(dy.dtype)
    return dy


@triton.jit
def bn(y, coef_ptr, channel, channel_ok, C):
    """BatchNorm ``y*scale + shift`` of a tile [BM, BC] in the columns ``channel``, fp32."""
    scale = tl.load(coef_ptr + SCALE * C + channel, mask=channel_ok, other=0.0)
    shift = tl.load(coef_ptr + SHIFT * C + channel, mask=channel_ok, other=0.0)
    return y.to(tl.float32) * scale[None, :] + shift[None, :]


@triton.jit
def sum_pixels(x, BITS: tl.constexpr, WARPS: tl.constexpr):
    """Sums [BC] over the pixels of a tile [BC, BM] that is spread over the program as loads of an NHWC tensor are: a
    thread has 16 bytes of neighbouring channels, some lanes of a warp the same channels of other pixels, and so has
    each warp.

    A plain ``tl.sum`` leaves each warp's sums in the shared memory with all lanes in one of its banks (Triton 3.6), or
    in as many rounds as there are channels in a thread (3.8). Here each warp sums its own pixels; splitting them off
    two by two brings all warps' sums of a channel into one thread, by a conversion without conflicts, for it to add.
    Of a tile that is spread otherwise the sums are the same, and take longer.

    Args:
        BITS: of an element of the loaded tensor. WARPS: of the program; 0: the tile is spread as a product's result,
            each warp with channels of its own.
    """
    BC: tl.constexpr = x.shape[0]
    BM: tl.constexpr = x.shape[1]
    ROW: tl.constexpr = BC * BITS // 128 if BC * BITS >= 128 else 1  # threads that have the channels of a pixel
    LANES: tl.constexpr = 32 // ROW if ROW < 32 else 1
    # Warps that have other pixels.
    ACROSS: tl.constexpr = WARPS if ROW <= 32 else WARPS * 32 // ROW if WARPS * 32 > ROW else 1
    if BM < ACROSS * LANES or WARPS == 0:
        return tl.sum(x, 1)
    else:
        x = tl.sum(tl.reshape(x, (BC, BM // (ACROSS * LANES), ACROSS, LANES)), 1)
        x = tl.sum(x, 2)
        for step in tl.static_range(5):
            if (ACROSS >> step) > 1:
                first, second = tl.split(tl.reshape(x, (BC, ACROSS >> (step + 1), 2)))
                x = first + second
        return tl.reshape(x, (BC,))


@triton.jit
def store_sums(sum_dz, sum_dz_y, coef_ptr, sums_ptr, part, channel, channel_ok, C):
    """Row ``part`` of the sums [T, 2, C] of BatchNorm's backward: of dz and dz*xhat.

    Args:
        sum_dz, sum_dz_y: [BC], of dz and of dz*(y - mean).
        coef_ptr: [5, C]; its rstd is the factor that xhat has more.
    """
    rstd = tl.load(coef_ptr + RSTD * C + channel, mask=channel_ok, other=0.0)
    row = sums_ptr + part.to(tl.int64) * (2 * C) + channel
    tl.store(row, sum_dz, mask=channel_ok)
    tl.store(row + C, sum_dz_y * rstd, mask=channel_ok)
