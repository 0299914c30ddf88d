"""Weight matrix -> codes, scale and packed bytes, and back."""

from __future__ import annotations

import triton
import triton.language as tl

_GRID = tl.constexpr(32)


@triton.jit
def _magnitudes(w_ptr, k, K):
    cols = k + tl.arange(0, 128)
    return tl.abs(tl.load(w_ptr + cols, mask=cols < K, other=0.0).to(tl.float32))


@triton.jit
def _kept(w_ptr, thresholds, K):
    """Sum and count of the magnitudes above each threshold."""
    sums = tl.zeros_like(thresholds)
    counts = tl.zeros_like(thresholds)
    for k in range(0, K, 128):
        w = _magnitudes(w_ptr, k, K)[:, None]
        above = w > thresholds[None, :]
        sums += tl.sum(tl.where(above, w, 0.0), axis=0)
        counts += tl.sum(above.to(tl.float32), axis=0)
    return sums, counts


@triton.jit
def _best_threshold(w_ptr, low, high, K):
    """The best of 32 thresholds, evenly spaced in the logarithm (largest sum^2 / count), and the spacing."""
    step = tl.exp2((tl.log2(high) - tl.log2(low)) / (_GRID - 1))
    thresholds = low * tl.exp2(tl.arange(0, _GRID).to(tl.float32) * tl.log2(step))
    sums, counts = _kept(w_ptr, thresholds, K)
    gain = tl.where(counts > 0, sums * sums / tl.maximum(counts, 1.0), -1.0)
    best = tl.argmax(gain, axis=0)
    return tl.sum(tl.where(tl.arange(0, _GRID) == best, thresholds, 0.0), axis=0), step


@triton.jit
def ternarize_kernel(
    w_ptr, packed_ptr, scale_ptr, given_scale_ptr, K, stride_w, stride_p, RULE: tl.constexpr
):
    """One program per row. It reads the row several times, from cache. ``absmean`` reads one scale from
    given_scale_ptr, ``given`` one per row.
    """
    row = tl.program_id(0).to(tl.int64)
    w_ptr += row * stride_w
    packed_ptr += row * stride_p
    if RULE == "absmean" or RULE == "given":
        scale = tl.load(given_scale_ptr + (row if RULE == "given" else 0))
        threshold = 0.5 * scale
    else:
        sums = tl.zeros((128,), tl.float32)
        largest = tl.zeros((128,), tl.float32)
        for k in range(0, K, 128):
            w = _magnitudes(w_ptr, k, K)
            sums += w
            largest = tl.maximum(largest, w)
        mean = tl.sum(sums, axis=0) / K
        if RULE == "twn":
            threshold = 0.7 * mean
        else:
            # The best scale lies between mean and max of the magnitudes and the best threshold is half of it.
            low = tl.maximum(0.5 * mean, 1e-37)
            high = tl.maximum(0.5 * tl.max(largest, axis=0), low)
            threshold, step = _best_threshold(w_ptr, low, high, K)
            threshold, step = _best_threshold(w_ptr, threshold / step, threshold * step, K)
            kept_sum, kept_count = _kept(w_ptr, tl.full((1,), 1.0, tl.float32) * threshold, K)
            threshold = tl.sum(0.5 * kept_sum / tl.maximum(kept_count, 1.0), axis=0)
        kept_sum, kept_count = _kept(w_ptr, tl.full((1,), 1.0, tl.float32) * threshold, K)
        scale = tl.sum(kept_sum / tl.maximum(kept_count, 1.0), axis=0)
    if RULE != "given":
        tl.store(scale_ptr + row, scale)
    for k in range(0, K, 128):
        cols = k + tl.arange(0, 128)
        w = tl.load(w_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
        bits = tl.where(w > threshold, 1, tl.where(w < -threshold, 3, 0))
        bits = tl.reshape(bits, (2, 4, 16))  # [h, j, w]: k = 64 h + 16 j + w
        shifts = 2 * tl.arange(0, 4)
        byte = tl.sum(bits << shifts[None, :, None], axis=1)  # [h, w]
        byte = tl.reshape(tl.permute(byte, (1, 0)), (32,))  # byte i = 2 w + h
        tl.store(packed_ptr + k // 4 + tl.arange(0, 32), byte.to(tl.uint8))


@triton.jit
def expand_kernel(packed_ptr, scale_ptr, out_ptr, K, stride_p, ATOMS: tl.constexpr, BITS: tl.constexpr):
    """ATOMS atoms of one row: scale * code, in natural order."""
    row = tl.program_id(0).to(tl.int64)
    atom = tl.program_id(1) * ATOMS + tl.arange(0, ATOMS)
    inside = atom * 128 < K
    byte = tl.load(
        packed_ptr + row * stride_p + atom[:, None] * (16 * BITS) + tl.arange(0, 16 * BITS)[None, :],
        mask=inside[:, None],
        other=0,
    ).to(tl.int32)
    SLABS: tl.constexpr = 8 // BITS
    shifts = 32 - BITS - BITS * tl.arange(0, SLABS)
    codes = (byte[:, :, None] << shifts[None, None, :]) >> (32 - BITS)
    codes = tl.reshape(codes, (ATOMS, 4 // SLABS, 16, 2, SLABS))  # see formats
    codes = tl.permute(codes, (0, 3, 4, 1, 2))  # [atom, h, slab, 32 bytes, w]
    value = tl.reshape(codes, (ATOMS * 128,)).to(tl.float32) * tl.load(scale_ptr + row)
    k = tl.program_id(1) * (ATOMS * 128) + tl.arange(0, ATOMS * 128)
    tl.store(out_ptr + row * K + k, value.to(out_ptr.dtype.element_ty), mask=k < K)
