"""Common parts of the GEMM kernels: unpacking, the epilogue, and waiting for inputs."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def unpack8(w, BITS: tl.constexpr, ASM: tl.constexpr):
    """uint8 [BN, BYTES] -> int8 [BN, BYTES * 8 / BITS]: atom by atom, slab by slab. The values are 64 * code
    for 2 bits and 16 * code for 4.
    """
    if BITS == 4:
        codes = _unpack8_int4(w, ASM)
    else:
        codes = _unpack8_ternary(w, ASM)
    return codes


@triton.jit
def _unpack8_ternary(w, ASM: tl.constexpr):
    if ASM:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            """{ .reg .b32 t0, t1, t2;
            shl.b32 t0, $4, 6; shl.b32 t1, $4, 4; shl.b32 t2, $4, 2;
            and.b32 $0, t0, 0xC0C0C0C0; and.b32 $1, t1, 0xC0C0C0C0;
            and.b32 $2, t2, 0xC0C0C0C0; and.b32 $3, $4, 0xC0C0C0C0; }""",
            "=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.int8, tl.int8, tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        w0 = ((w << 6) & 0xC0).to(tl.uint8).to(tl.int8, bitcast=True)
        w1 = ((w << 4) & 0xC0).to(tl.uint8).to(tl.int8, bitcast=True)
        w2 = ((w << 2) & 0xC0).to(tl.uint8).to(tl.int8, bitcast=True)
        w3 = (w & 0xC0).to(tl.uint8).to(tl.int8, bitcast=True)
    c = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BN, BYTES, high, low], slab = 2 * high + low
    c = tl.reshape(c, (c.shape[0], c.shape[1] // 32, 32, 2, 2))
    return tl.reshape(tl.permute(c, (0, 1, 3, 4, 2)), (c.shape[0], c.shape[1] * 128))


@triton.jit
def _unpack8_int4(w, ASM: tl.constexpr):
    if ASM:
        w0, w1 = tl.inline_asm_elementwise(
            """{ .reg .b32 t0;
            shl.b32 t0, $2, 4; and.b32 $0, t0, 0xF0F0F0F0; and.b32 $1, $2, 0xF0F0F0F0; }""",
            "=&r,=&r,r",
            [w],
            dtype=(tl.int8, tl.int8),
            is_pure=True,
            pack=4,
        )
    else:
        w0 = ((w << 4) & 0xF0).to(tl.uint8).to(tl.int8, bitcast=True)
        w1 = (w & 0xF0).to(tl.uint8).to(tl.int8, bitcast=True)
    c = tl.reshape(tl.join(w0, w1), (w.shape[0], w.shape[1] // 64, 64, 2))
    return tl.reshape(tl.permute(c, (0, 1, 3, 2)), (w.shape[0], w.shape[1] * 2))


@triton.jit
def unpack16(w, DTYPE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """uint16 [BN, WORDS] -> fp16 or bf16 [BN, WORDS * 16 / BITS] in natural order. The values are 2.0 * code
    for 2 bits (0x4000 is 2.0 and 0xC000 is -2.0 in both dtypes), and the codes for 4.
    """
    if BITS == 4:
        codes = _unpack16_int4(w, DTYPE, ASM)
    else:
        codes = _unpack16_ternary(w, DTYPE, ASM)
    return codes


@triton.jit
def _unpack16_ternary(w, DTYPE: tl.constexpr, ASM: tl.constexpr):
    if ASM:
        w0, w1, w2, w3, w4, w5, w6, w7 = tl.inline_asm_elementwise(
            """{ .reg .b32 t0, t1, t2, t3, t4, t5, t6;
            shl.b32 t0, $8, 14; shl.b32 t1, $8, 12; shl.b32 t2, $8, 10; shl.b32 t3, $8, 8;
            shl.b32 t4, $8, 6; shl.b32 t5, $8, 4; shl.b32 t6, $8, 2;
            and.b32 $0, t0, 0xC000C000; and.b32 $1, t1, 0xC000C000; and.b32 $2, t2, 0xC000C000;
            and.b32 $3, t3, 0xC000C000; and.b32 $4, t4, 0xC000C000; and.b32 $5, t5, 0xC000C000;
            and.b32 $6, t6, 0xC000C000; and.b32 $7, $8, 0xC000C000; }""",
            "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
    else:
        w0 = ((w << 14) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w1 = ((w << 12) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w2 = ((w << 10) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w3 = ((w << 8) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w4 = ((w << 6) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w5 = ((w << 4) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w6 = ((w << 2) & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
        w7 = (w & 0xC000).to(tl.uint16).to(tl.int16, bitcast=True)
    c = tl.join(tl.join(tl.join(w0, w4), tl.join(w2, w6)), tl.join(tl.join(w1, w5), tl.join(w3, w7)))
    c = tl.reshape(c, (c.shape[0], c.shape[1] // 16, 16, 2, 2, 2))  # [BN, atom, word, slab bits 2, 1, 0]
    c = tl.reshape(tl.permute(c, (0, 1, 3, 4, 5, 2)), (c.shape[0], c.shape[1] * 128))
    return c.to(DTYPE, bitcast=True)


_NIBBLES = """{ .reg .b32 t0, t1, t2;
shr.b32 t0, $4, 4; shr.b32 t1, $4, 8; shr.b32 t2, $4, 12;
lop3.b32 $0, $4, 0x000F000F, BASE, 0x6A; lop3.b32 $1, t0, 0x000F000F, BASE, 0x6A;
lop3.b32 $2, t1, 0x000F000F, BASE, 0x6A; lop3.b32 $3, t2, 0x000F000F, BASE, 0x6A; }"""  # (w & F) ^ BASE
_NIBBLES_FP16 = tl.constexpr(_NIBBLES.replace("BASE", "0x64086408"))
_NIBBLES_BF16 = tl.constexpr(_NIBBLES.replace("BASE", "0x43084308"))


@triton.jit
def _unpack16_int4(w, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """A nibble with its top bit flipped is code + 8. Below the bits of 1024 (fp16) or 128 (bf16) it makes the
    number 1024 + 8 + code or 128 + 8 + code; one subtraction is left.
    """
    BASE: tl.constexpr = 0x6408 if DTYPE == tl.float16 else 0x4308
    OFFSET: tl.constexpr = -1032.0 if DTYPE == tl.float16 else -136.0
    if ASM:
        w0, w1, w2, w3 = tl.inline_asm_elementwise(
            _NIBBLES_FP16 if DTYPE == tl.float16 else _NIBBLES_BF16,
            "=&r,=&r,=&r,=&r,r",
            [w],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16),
            is_pure=True,
            pack=2,
        )
    else:
        w0 = ((w & 0xF) ^ BASE).to(tl.int16)
        w1 = (((w >> 4) & 0xF) ^ BASE).to(tl.int16)
        w2 = (((w >> 8) & 0xF) ^ BASE).to(tl.int16)
        w3 = (((w >> 12) & 0xF) ^ BASE).to(tl.int16)
    c = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [BN, WORDS, high, low], nibble = 2 * high + low
    c = tl.reshape(c, (w.shape[0], w.shape[1] // 32, 32, 2, 2))
    c = tl.reshape(tl.permute(c, (0, 1, 3, 4, 2)), (w.shape[0], w.shape[1] * 4))
    return c.to(DTYPE, bitcast=True) + tl.full((), OFFSET, DTYPE)


@triton.jit
def store_scaled(
    y_ptr, v, scale_ptr, bias_ptr, m, n, M, N, stride_y,
    UNIT: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """Scale, add the bias and store v fp32 [BLOCK_N, BLOCK_M] as y [BLOCK_M, BLOCK_N]."""
    scale = tl.load(scale_ptr + n, mask=n < N, other=0.0) * UNIT
    if HAS_BIAS:
        bias = tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
        v = tl.math.fma(v, tl.broadcast_to(scale[:, None], v.shape), tl.broadcast_to(bias[:, None], v.shape))
    else:
        v = v * scale[:, None]
    mask = (m[:, None] < M) & (n[None, :] < N)
    out = tl.trans(v).to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + m[:, None].to(tl.int64) * stride_y + n[None, :], out, mask=mask)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Wait for the results of the kernel before, and let the next kernel start. With programmatic dependent
    launch this kernel starts before that one has ended.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(w_ptr, rows, stride, first, last, LINES: tl.constexpr, ASM: tl.constexpr):
    """Prefetch lines of 128 bytes of these rows of packed weights, bytes ``first`` to ``last`` - 1, to the L2
    cache, all at once. The kernel before may still run. Nothing is read here, so that kernel may even write
    the weights.
    """
    if ASM:
        line = tl.minimum(first + tl.arange(0, LINES) * 128, last - 1)
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [w_ptr + rows[:, None] * stride + line[None, :]],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def warm(pointers, ASM: tl.constexpr):
    """Bring the operands of the epilogue, about a hundred scales, to the L1 cache before the loop."""
    if ASM:
        tl.inline_asm_elementwise(
            "prefetch.global.L1 [$1]; mov.b32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
