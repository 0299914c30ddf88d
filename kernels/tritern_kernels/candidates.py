"""Candidates of ``tune``: shapes of known models, and configurations to try for a shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product

from .config import KernelConfig, Mode, shared_memory_limit
from .formats import ATOM, padded_k


def _bert(hidden: int, intermediate: int) -> tuple[tuple[int, int], ...]:
    return (hidden, hidden), (intermediate, hidden), (hidden, intermediate)


def _decoder(hidden: int, query: int, key: int, intermediate: int) -> tuple[tuple[int, int], ...]:
    return (query, hidden), (key, hidden), (hidden, query), (intermediate, hidden), (hidden, intermediate)


MODELS: dict[str, tuple[tuple[int, int], ...]] = {
    **dict.fromkeys(("minilm", "e5-small", "bge-small"), _bert(384, 1536)),
    **dict.fromkeys(("e5-base", "bge-base", "vit-b"), _bert(768, 3072)),
    **dict.fromkeys(("e5-large", "bge-large", "xlm-r-large", "bge-m3", "vit-l"), _bert(1024, 4096)),
    "modernbert-base": ((2304, 768), (768, 768), (768, 1152)),
    "qwen3-embedding-0.6b": _decoder(1024, 2048, 1024, 3072),
    "qwen3-embedding-4b": _decoder(2560, 4096, 1024, 9728),
    "qwen3-embedding-8b": _decoder(4096, 4096, 1024, 12288),
    "e5-mistral-7b": _decoder(4096, 4096, 1024, 14336),
}
"""(N, K) of the linear layers in a model's blocks, from the models' public configurations."""


def candidates(mode: Mode, M: int, N: int, K: int, capability: int) -> list[KernelConfig]:
    """Valid configurations worth timing for a shape."""
    limit = shared_memory_limit(capability)
    found = (_small if M <= 128 else _large)(mode, M)
    found = [replace(c, block_k=min(c.block_k, padded_k(K) & -padded_k(K))) for c in found]
    found += _few(mode, M, K) if M <= 32 else ()
    return [
        c
        for c in dict.fromkeys(found)
        if c.invalid(mode, K, capability) is None
        and c.shared_bytes(mode) < limit
        and (c.split_k == 1 or c.tiles(M, N) * c.split_k <= 1024)
    ]


def _small(mode: Mode, M: int) -> Iterator[KernelConfig]:
    """Up to 128 tokens: one or two rows of tiles for all tokens; a split along K if it fills the GPU."""
    needed = max(16, 1 << (M - 1).bit_length())
    sizes = (needed, needed // 2) if M > 32 else (needed,)
    for block_m, (block_n, warps) in product(sizes, ((32, 4), (64, 4), (128, 4), (128, 8))):
        if block_m * block_n > 128 * 128 or (block_m >= 64 and block_n == 32):
            continue
        for block_k, stages in ((128, 4), (256, 3), (256, 5), (512, 2), (512, 4)):
            if block_k * block_m > 512 * 32 or (mode == "16bit" and block_k == 512):
                continue
            splits = (1, 2, 4, 8) if mode == "int8" and block_k >= 256 and block_n >= 64 else (1,)
            for split in splits:
                yield KernelConfig(block_m, block_n, block_k, split, num_warps=warps, num_stages=stages)


def _few(mode: Mode, M: int, K: int) -> Iterator[KernelConfig]:
    """Up to 32 tokens: the warps of a program share K."""
    block_m = max(16, 1 << (M - 1).bit_length())
    whole = 1 << (padded_k(K) - 1).bit_length()
    for block_n, warps in product((16, 32, 64) if M <= 16 else (16, 32), (4, 8)):
        tile = KernelConfig(block_m, block_n, ATOM, num_warps=warps, share_k=True)
        for block_k, stages in ((128, 3), (256, 2), (256, 4)):
            yield replace(tile, block_k=block_k, num_stages=stages)
        if mode == "int8" and ATOM * warps <= whole <= 1024:
            yield replace(tile, block_k=whole // warps, num_stages=1, quantizing=True)


def _large(mode: Mode, M: int) -> Iterator[KernelConfig]:
    """Above 128 tokens: large tiles."""
    if mode == "16bit":
        for block_m, block_n, warps in (
            (64, 64, 4),
            (64, 128, 4),
            (64, 128, 8),
            (128, 128, 8),
            (128, 256, 16),
        ):
            yield from (
                KernelConfig(block_m, block_n, 128, num_warps=warps, num_stages=stages)
                for stages in (2, 3, 4)
            )
        yield KernelConfig(64, 128, 128, num_warps=8, num_stages=3, expand=True)
        return
    for block_m, block_n, warps in (
        (64, 64, 4), (64, 128, 4), (64, 256, 8), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8),
    ):  # fmt: skip
        for block_k, stages in ((128, 2), (128, 3), (128, 4), (256, 2), (256, 3)):
            yield KernelConfig(block_m, block_n, block_k, num_warps=warps, num_stages=stages)
