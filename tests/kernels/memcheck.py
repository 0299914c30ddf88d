"""Every kernel once, on sizes that fit no tile, for a memory checker. Not a test of pytest's.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/kernels/memcheck.py

Without torch's cache every tensor is an allocation of its own, so that the checker sees reads and writes
beyond its end. compute-sanitizer comes with CUDA.
"""

import sys

import torch

from tritern_kernels import linear, tuning
from tritern_kernels.dispatch import BlockSizes, _device, block_plan
from tritern_kernels.ternarize import expand, ternarize
from tritern_kernels.training import transpose


def block(M: int, hidden: int, inner: int) -> None:
    shapes = (3 * hidden, hidden), (hidden, hidden), (inner, hidden), (hidden, inner)
    made = [ternarize(torch.randn(N, K, device="cuda"), "mse") for N, K in shapes]
    products = [(w.packed, w.scale, torch.randn(w.shape[0], device="cuda").half()) for w in made]
    norms = [tuple(torch.rand(hidden, device="cuda").half() for _ in range(2)) for _ in range(2)]
    x = torch.randn(M, hidden, device="cuda").half()
    sizes = BlockSizes(hidden, inner, (True,) * 4, (1e-12, 1e-12))
    plan, known, results = block_plan(sizes, M, x.dtype, x.device), None, []
    for _ in range(3):  # compiled, planned, and with int8 activations from the block before
        qkv, buffer = plan.before(x, known, (*products, *norms))
        z, known = plan.after(qkv[:, :hidden].contiguous(), x, buffer, (*products, *norms))
        known = known if results else None
        results.append(z)
    if not torch.equal(results[0], results[1]) or not results[0].isfinite().all():
        sys.exit(f"wrong result of a block: {M} tokens, {hidden} and {inner} features")


def main() -> None:
    for M, N, K in ((1, 70, 130), (33, 70, 4096 + 130), (130, 257, 513), (700, 130, 300)):
        weight = ternarize(torch.randn(N, K, device="cuda"), "mse")
        x, bias = torch.randn(M, K, device="cuda").half(), torch.randn(N, device="cuda").half()
        for bits in (8, 16):
            y = [linear(x, weight, bias, activation_bits=bits) for _ in range(2)]  # compiled, then planned
            config = tuning.choose("int8" if bits == 8 else "16bit", M, N, K, False, *_device(0))
            if not torch.equal(*y) or not y[0].isfinite().all():
                sys.exit(f"wrong result: {M} x {N} x {K}, {bits} bits, {config}")
        expand(weight.packed, weight.scale, K, torch.bfloat16)
        transpose(weight.packed, K)
    for M, hidden, inner in ((1, 130, 70), (33, 384, 1536), (700, 130, 300)):
        block(M, hidden, inner)
    torch.cuda.synchronize()
    sys.stdout.write("all kernels ran\n")


if __name__ == "__main__":
    main()
