"""The CPU path's pieces, one by one: dense fp32, int8 products, quantization, the whole operator.

python benchmarks/cpu_ops.py        milliseconds, median of 30 calls
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import report
import torch

from tritern_kernels import cpu, linear, ternarize_weight

SHAPES = [(64, 1536, 384), (2048, 384, 384), (2048, 1536, 384), (2048, 384, 1536)]


def milliseconds(call: Callable[[], object]) -> float:
    """Median of 30 calls after five."""
    samples = []
    for i in range(35):
        start = time.perf_counter()
        call()
        if i >= 5:
            samples.append(1e3 * (time.perf_counter() - start))
    return statistics.median(samples)


def main() -> None:
    """Print one row a shape."""
    torch.manual_seed(0)
    facts = report.environment() | {"threads": torch.get_num_threads()}
    print(", ".join(f"{k} {v}" for k, v in facts.items() if v is not None))
    print(f"{'M, N, K':>16s} {'fp32':>8s} {'_int_mm':>8s} {'quantize':>9s} {'aminmax':>8s} {'tritern':>8s}")
    for M, N, K in SHAPES:
        x, dense = torch.randn(M, K), torch.randn(N, K)
        weight = ternarize_weight(dense)
        codes, x_q = weight.codes(), cpu.quantize(x)[0]
        calls: list[Callable[[], object]] = [
            lambda: torch.nn.functional.linear(x, dense),  # noqa: B023
            lambda: torch.ops.aten._int_mm(x_q, codes.t()),  # noqa: B023
            lambda: cpu.quantize(x),  # noqa: B023
            lambda: torch.aminmax(x, dim=1),  # noqa: B023  what quantize does without
            lambda: linear(x, weight),  # noqa: B023
        ]
        times = " ".join(f"{milliseconds(call):8.2f}" for call in calls)
        print(f"{f'{M}, {N}, {K}':>16s} {times}", flush=True)


if __name__ == "__main__":
    main()
