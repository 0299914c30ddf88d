"""Operands of a shape, and the time and result of a configuration on them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from . import cuda
from .config import KernelConfig, Mode
from .ternarize import expand, ternarize

COLD_BYTES = 180_000_000
"""Bytes of packed weights to cycle through: three times an H200's L2 cache."""


class Bench:
    """Operands of one shape, and the time and the result of a configuration on them."""

    def __init__(self, M: int, N: int, K: int, seed: int = 0) -> None:
        drawn: dict[str, Any] = {"device": "cuda", "generator": torch.Generator("cuda").manual_seed(seed)}
        weight = ternarize(0.02 * torch.randn(N, K, dtype=torch.float32, **drawn), "twn")
        self.x = torch.randn(M, K, dtype=torch.float32, **drawn).bfloat16()
        self.codes, self.scale, self.N = weight.codes(), weight.scale, N
        self.x_q, self.scale_x = cuda.quantize(self.x)
        cold = M <= 256 and weight.packed.numel() >= 1_000_000
        self.packed = [
            weight.packed.clone() for _ in range(1 + COLD_BYTES // weight.packed.numel() if cold else 1)
        ]

    def call(self, mode: Mode, config: KernelConfig, packed: Tensor) -> Tensor:
        """The product. With a split it includes quantization, because that clears the tickets."""
        if config.expand:
            return torch.nn.functional.linear(
                self.x, expand(packed, self.scale, self.x.shape[1], self.x.dtype)
            )
        if mode == "16bit" or (config.quantizing and self.x.shape[0] <= 128):
            return cuda.gemm_direct(self.x, packed, self.scale, None, config, torch.bfloat16)
        x_q, scale_x, tickets = self.x_q, self.scale_x, None
        if self.x.shape[0] <= 128:
            tickets = cuda.make_tickets(self.x, self.N, config) if config.split_k > 1 else None
            x_q, scale_x = cuda.quantize(self.x, tickets)
        return cuda.gemm_int8(x_q, scale_x, packed, self.scale, None, config, torch.bfloat16, tickets=tickets)

    def correct(self, mode: Mode, y: Tensor) -> bool:
        """Whether y is the product, rounded to bf16 once, on up to 256 tokens spread over all."""
        rows = torch.arange(0, self.x.shape[0], max(1, self.x.shape[0] // 256), device="cuda")
        if mode == "16bit":
            exact = self.x[rows].double() @ self.codes.double().T
        else:
            from .formats import from_packed_order

            x_q = from_packed_order(self.x_q)[rows, : self.x.shape[1]]
            exact = x_q.double() @ self.codes.double().T * self.scale_x[rows].double()[:, None]
        error = y[rows].double() - exact * self.scale.double()
        return bool(error.square().mean() <= (2.5e-3 * self.scale.double() * exact).square().mean())

    def microseconds(self, mode: Mode, config: KernelConfig) -> float:
        """Median time of a call in a CUDA graph that cycles through all copies of the weights."""
        start = time.perf_counter()
        self.call(mode, config, self.packed[0])
        torch.cuda.synchronize()
        once = time.perf_counter() - start
        count = max(len(self.packed), min(20, max(3, int(2e-3 / once))))
        return graph_microseconds([
            partial(self.call, mode, config, self.packed[i % len(self.packed)]) for i in range(count)
        ])  # fmt: skip


def graph_microseconds(calls: list[Callable[[], Any]], replays: int = 5) -> float:
    """Median microseconds of a call in replays of one CUDA graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        calls[0]()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    graph.replay()
    samples = []
    for _ in range(replays):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        samples.append(1e3 * start.elapsed_time(end) / len(calls))
    return statistics.median(samples)
