"""Kernel configurations: their validity, and a formula for shapes that are in no table.

The choice (``tables.choose``) measures and compiles nothing, so a new number of tokens never stalls a call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch

from .formats import ATOM, padded_k

Mode = Literal["int8", "16bit"]
OLDEST_CAPABILITY = 80
"""Compute capability 8.0 (Ampere): older GPUs lack bf16 and asynchronous copies, and Triton has left them."""

SHARED_MEMORY = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
"""KiB of shared memory one program may use, by compute capability (CUDA programming guide, technical
specifications).
"""

MOST_TOKENS = 16384
"""Larger numbers of tokens use the configuration of this one."""

QUERY_ROWS = 64
"""Rows of a tile: queries of a text per program of the attention over packed texts."""


def widest_head(dtype: torch.dtype) -> int:
    """Largest head width of this attention. A tile of such heads fits every GPU's shared memory."""
    return 128 if dtype == torch.float32 else 256


MOST_ACCUMULATORS = {"plain": 128, "split": 32}
"""Accumulators per thread without spills, by the code after the loop (from compiled code, compile_check)."""


@dataclass(frozen=True)
class KernelConfig:
    """One way to launch a GEMM kernel: a tile of ``block_m`` tokens x ``block_n`` weight rows x ``block_k``
    along K.

    Attributes:
        split_k: number of programs that share K of one tile.
        expand: for 16-bit activations: write the weights in that dtype and let torch multiply. It is faster
            for many tokens. The tile is then for float32 activations.
        share_k: the warps of a program share K; each takes ``block_k`` of every step (kernels of
            ``gemm_few``).
        quantizing: with ``share_k`` and all of K in one step, the product quantizes its activations itself.
    """

    block_m: int
    block_n: int
    block_k: int
    split_k: int = 1
    num_warps: int = 4
    num_stages: int = 4
    expand: bool = False
    share_k: bool = False
    quantizing: bool = False

    @property
    def step(self) -> int:
        """Length of a program's step along K."""
        return self.block_k * (self.num_warps if self.share_k else 1)

    def shared_bytes(self, mode: Mode, weight_bits: int = 2) -> int:
        """Shared memory of the pipelined operands, in bytes."""
        x = self.block_m * self.step * (1 if mode == "int8" else 2)
        return self.num_stages * (x + self.block_n * self.step * weight_bits // 8)

    def tiles(self, M: int, N: int) -> int:
        """Number of tiles of an [M, N] result."""
        return -(-M // self.block_m) * -(-N // self.block_n)

    def grid(self, M: int, N: int) -> tuple[int, int]:
        """Number of programs to launch for an [M, N] result."""
        if self.share_k:
            return -(-N // self.block_n), -(-M // self.block_m)
        return self.tiles(M, N), self.split_k

    def lines(self, K_padded: int, weight_bits: int = 2) -> int:
        """Lines of 128 bytes of packed weights that a program prefetches per row, rounded up to a power of
        two. 0 with more than 64 tokens: there the products take longer than reading the weights.
        """
        if self.block_m > 64:
            return 0
        steps = -(-K_padded // (self.block_k * self.split_k))
        return 1 << (-(-steps * self.block_k * weight_bits // 1024) - 1).bit_length()

    @property
    def accumulators(self) -> int:
        """32-bit accumulator registers per thread."""
        return self.block_m * self.block_n // (32 * (1 if self.share_k else self.num_warps))

    def invalid(self, mode: Mode, K: int, capability: int, weight_bits: int = 2) -> str | None:
        """Why this configuration cannot run well, or None. All constraints are here."""
        if capability < OLDEST_CAPABILITY:
            return f"sm_{capability} has no kernels; the oldest that has is sm_{OLDEST_CAPABILITY}"
        for name, low in (("block_m", 16), ("block_n", 16), ("block_k", ATOM)):
            value = getattr(self, name)
            if value < low or value & (value - 1):
                return f"{name} must be a power of two of at least {low}; received {value}"
        if padded_k(K) % self.block_k and not self.share_k:
            return f"block_k must divide K padded to {padded_k(K)}; received {self.block_k}"
        if self.num_warps not in (1, 2, 4, 8, 16):
            return f"num_warps must be a power of two up to 16; received {self.num_warps}"
        if self.expand and mode == "int8":
            return "expand is for 16-bit activations"
        if self.split_k != 1 and mode == "16bit":
            return f"split_k is for int8 sums, which add up exactly in any order; received {self.split_k}"
        if self.split_k != 1 and self.share_k:
            return f"share_k does not go with split_k; received {self.split_k}"
        fits = self.share_k and self.step >= max(512, padded_k(K))
        if self.quantizing and (mode == "16bit" or not fits):
            return (
                f"quantizing is for int8 activations, share_k and K in one step of at least 512; "
                f"received {K} and steps of {self.step}"
            )
        steps = -(-padded_k(K) // self.block_k)
        if not 1 <= self.split_k <= steps:
            return f"split_k must be from 1 to K / block_k = {steps}; received {self.split_k}"
        most = MOST_ACCUMULATORS["split" if self.split_k > 1 else "plain"]
        most = min(most, 64) if self.block_k > ATOM else most  # more unpacked weights are alive
        if self.accumulators > most:
            return f"{self.accumulators} accumulators a thread spill; at most {most} here: use more warps"
        if self.num_stages < 1:
            return f"num_stages must be at least 1; received {self.num_stages}"
        limit = shared_memory_limit(capability)
        if (needed := self.shared_bytes(mode, weight_bits)) > limit:
            return f"operands take {needed} bytes of shared memory; sm_{capability} has {limit}"
        return None


def shared_memory_limit(capability: int) -> int:
    """Bytes of shared memory per program on sm_``capability``; for unknown ones 99 KiB, the least known.

    Raises:
        ValueError: the capability is older than any GPU with kernels.
    """
    if capability < OLDEST_CAPABILITY:
        raise ValueError(
            f"capability must be at least {OLDEST_CAPABILITY}, the oldest with kernels; received {capability}"
        )
    return SHARED_MEMORY.get(capability, 99) * 1024


def formula_tiles(mode: Mode, capability: int) -> list[KernelConfig]:
    """The tiles that ``formula`` chooses from, smallest number of tokens first. block_k is halved if K needs
    it.
    """
    wide = shared_memory_limit(capability) >= 160 * 1024
    if mode == "int8":
        return [
            KernelConfig(16, 64, 256, num_warps=4, num_stages=5),
            KernelConfig(32, 64, 256, num_warps=4, num_stages=4),
            KernelConfig(64, 64, 256, num_warps=4, num_stages=3),
            KernelConfig(64, 128, 128, num_warps=4, num_stages=3),
            KernelConfig(128, 128, 128, num_warps=8, num_stages=3),
        ]
    return [
        KernelConfig(16, 32, 128, num_warps=4, num_stages=4),
        KernelConfig(32, 128, 128, num_warps=4, num_stages=4),
        KernelConfig(64, 128, 128, num_warps=4, num_stages=3),
        KernelConfig(128, 128, 128, num_warps=8, num_stages=3 if wide else 2),
    ]


def few_tokens(
    mode: Mode, N: int, K: int, capability: int, processors: int, weight_bits: int = 2
) -> KernelConfig | None:
    """For up to 16 tokens: warps share K on the smallest tiles that all fit on the multiprocessors at once,
    with more warps for a long K. None if plain tiles are faster: with 16-bit activations and a short K, or
    with more tiles than multiprocessors (from the H200's table).
    """
    block_n = 16 if N <= 16 * processors else 32
    all_at_once = math.ceil(N / block_n) <= processors
    if mode == "16bit" and (K <= 512 or not all_at_once):
        return None
    if mode == "int8" and padded_k(K) <= 512 and block_n == 16:
        return KernelConfig(16, 16, ATOM, num_stages=1, share_k=True, quantizing=True)
    warps = 8 if K >= 2048 and all_at_once else 4
    tiles = [KernelConfig(16, block_n, ATOM, num_warps=w, num_stages=3, share_k=True) for w in (warps, 4)]
    return next((c for c in tiles if c.invalid(mode, K, capability, weight_bits) is None), None)


def formula(
    mode: Mode, M: int, N: int, K: int, capability: int, processors: int, weight_bits: int = 2
) -> KernelConfig:
    """A configuration by formula. Up to 16 tokens: ``few_tokens``. Up to 64: the smallest tile for all
    tokens; int8 splits K until every multiprocessor has work. Above: the largest tile that leaves no
    multiprocessor idle; 16-bit activations expand the weights from 2,048 tokens on.
    """
    tiles = [
        replace(c, block_k=min(c.block_k, padded_k(K) & -padded_k(K)))
        for c in formula_tiles(mode, capability)
    ]
    tiles = [c for c in tiles if c.invalid(mode, K, capability, weight_bits) is None]
    if M <= 16 and (few := few_tokens(mode, N, K, capability, processors, weight_bits)):
        return few
    if M <= 64:
        config = next(c for c in tiles if c.block_m >= M)
        programs = math.ceil(N / config.block_n)
        split = min(processors // programs, padded_k(K) // config.block_k // 2, 8)
        return replace(config, split_k=split) if mode == "int8" and split > 1 else config
    if mode == "16bit" and M >= 2048:
        return replace(tiles[-1], expand=True)
    for config in reversed(tiles):
        if (
            config.block_m <= M
            and math.ceil(M / config.block_m) * math.ceil(N / config.block_n) >= processors
        ):
            return config
    return next(c for c in tiles if c.block_m == 64)


def bucket(M: int) -> int:
    """M rounded up to a power of two from 16 to ``MOST_TOKENS``."""
    return min(1 << (max(M, 16) - 1).bit_length(), MOST_TOKENS)
