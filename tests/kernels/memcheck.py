"""Every kernel once, on sizes that fit no tile, for a memory checker. Not a test of pytest's.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/kernels/memcheck.py

Without torch's cache every tensor is an allocation of its own, so that the checker sees reads and writes
beyond its end. compute-sanitizer comes with CUDA.
"""

import sys

import torch

from tritern_kernels import blocks, linear, tables
from tritern_kernels.attention import packed_attention
from tritern_kernels.blocks import BertWeights, DecoderWeights, Product
from tritern_kernels.config import QUERY_ROWS
from tritern_kernels.cuda import _device
from tritern_kernels.embedding import lookup, quantize_table
from tritern_kernels.pooling import MODES, normalize, pool
from tritern_kernels.ternarize import expand, ternarize
from tritern_kernels.training import transpose


def products(shapes: tuple[tuple[int, int], ...]) -> list[Product]:
    made = [ternarize(torch.randn(N, K, device="cuda"), "mse") for N, K in shapes]
    return [Product(w.packed, w.scale, torch.randn(w.shape[0], device="cuda").half()) for w in made]


def parameters(*widths: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.rand(width, device="cuda").half() for width in widths)


def bert(M: int, hidden: int, inner: int) -> None:
    shapes = (3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)
    norms = parameters(hidden, hidden), parameters(hidden, hidden)
    weights = BertWeights(*products(shapes), norms=norms, epsilons=(1e-12, 1e-12))
    x = torch.randn(M, hidden, device="cuda").half()
    known, results = None, []
    for _ in range(3):  # compiled, found by its key, and with int8 activations from the block before
        qkv = blocks.bert_qkv(x, known, weights)
        z, known = blocks.bert_output(qkv[:, :hidden].contiguous(), x, weights)
        known = known if results else None
        results.append(z)
    if not torch.equal(results[0], results[1]) or not results[0].isfinite().all():
        sys.exit(f"wrong result of a block: {M} tokens, {hidden} and {inner} features")


def decoder(M: int, hidden: int, inner: int, heads: int, key_heads: int, head_dim: int) -> None:
    context, width = heads * head_dim, (heads + 2 * key_heads) * head_dim
    shapes = (width, hidden), (hidden, context), (2 * inner, hidden), (hidden, inner)
    norms = parameters(hidden, hidden)
    weights = DecoderWeights(
        *products(shapes), norms=norms, head_norms=parameters(head_dim, head_dim), epsilons=(1e-6,) * 3,
        heads=(heads, key_heads),
    )  # fmt: skip
    x, turn = torch.randn(M, hidden, device="cuda").half(), parameters(head_dim)[0].expand(M, -1).contiguous()
    known, results = None, []
    for last in (False, False, False, True):  # compiled, found, with int8 activations, without a next block
        qkv = blocks.decoder_qkv(x, known, turn, turn, weights)
        next_norm = None if last else norms[0]
        z, known = blocks.decoder_output(qkv[:, :context].contiguous(), x, weights, next_norm)
        known = known if results else None
        results.append(z)
    if not torch.equal(results[0], results[1]) or not results[3].isfinite().all():
        sys.exit(f"wrong result of a block: {M} tokens, {hidden} and {inner} features, {heads} heads")


def packed_texts(heads: int, key_heads: int, head_dim: int) -> None:
    lengths = [1, 63, 65, 2, 200]
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    pairs = list(zip(starts, starts[1:]))
    tiles = [[first, start, end] for start, end in pairs for first in range(start, end, QUERY_ROWS)]
    on_gpu = torch.tensor(tiles, dtype=torch.int32, device="cuda")
    rows = torch.randn(starts[-1], (heads + 2 * key_heads) * head_dim, device="cuda").half()
    qkv = rows.view(starts[-1], -1, head_dim).transpose(0, 1).split([heads, key_heads, key_heads])
    bias = torch.randn(heads, 41, device="cuda").half()
    for settings in ({}, {"causal": True, "window": 30}, {"bias": bias}):
        y = packed_attention(*qkv, on_gpu, scale=0.1, **settings).flatten(1)
        if not y.isfinite().all():
            sys.exit(f"wrong attention: {heads} heads of {head_dim}, {settings}")
    begins = torch.tensor(starts, dtype=torch.int32, device="cuda")
    for mode in MODES:
        if not normalize(pool(y, begins, mode)).isfinite().all():
            sys.exit(f"wrong pooling: {mode}")


def main() -> None:
    for M, N, K in ((1, 70, 130), (33, 70, 4096 + 130), (130, 257, 513), (700, 130, 300)):
        weight = ternarize(torch.randn(N, K, device="cuda"), "mse")
        x, bias = torch.randn(M, K, device="cuda").half(), torch.randn(N, device="cuda").half()
        for bits in (8, 16):
            y = [linear(x, weight, bias, activation_bits=bits) for _ in range(2)]  # compiled, then found
            config = tables.choose("int8" if bits == 8 else "16bit", M, N, K, *_device(0))
            if not torch.equal(*y) or not y[0].isfinite().all():
                sys.exit(f"wrong result: {M} x {N} x {K}, {bits} bits, {config}")
        expand(weight.packed, weight.scale, K, torch.bfloat16)
        transpose(weight.packed, K)
    for M, rows, width in ((1, 3, 1), (700, 130, 300)):
        packed, scale = quantize_table(torch.randn(rows, width, device="cuda").half())
        ids = torch.randint(-1, rows + 1, (M,), device="cuda")
        if not torch.equal(lookup(ids, packed, scale, width).isnan().any(1), (ids < 0) | (ids >= rows)):
            sys.exit(f"wrong rows of a table of {rows} x {width}")
    for heads, key_heads, head_dim in ((3, 3, 32), (4, 2, 48), (2, 1, 128)):
        packed_texts(heads, key_heads, head_dim)
    for M, hidden, inner in ((1, 130, 70), (33, 384, 1536), (700, 130, 300)):
        bert(M, hidden, inner)
        decoder(M, hidden, inner, 3, 1, 16)
    torch.cuda.synchronize()
    sys.stdout.write("all kernels ran\n")


if __name__ == "__main__":
    main()
