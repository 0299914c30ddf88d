"""What ``compile_check`` compiles: every kernel in every configuration that can be chosen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, get_args

import torch

from tritern_kernels import attention, config, cuda, embedding, pooling, tables
from tritern_kernels.config import KernelConfig
from tritern_kernels.device import norms, quantize
from tritern_kernels.device.attention import packed_attention_kernel
from tritern_kernels.device.embedding import lookup_kernel
from tritern_kernels.device.pooling import normalize_kernel, pool_kernel
from tritern_kernels.device.ternarize import expand_kernel, ternarize_kernel
from tritern_kernels.formats import WEIGHT_BITS
from tritern_kernels.reference import RULES


@dataclass(frozen=True)
class Job:
    """A kernel to compile: argument types and constexpr values by name, launch options.

    Integers and pointers are taken as divisible by 16, which lets loads be wide, except those in
    ``unaligned``.
    """

    name: str
    kernel: str
    types: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, int]
    capability: int
    unaligned: tuple[str, ...] = ("M", "period", "HEADS", "Q_HEADS", "window", "BIASES")


def jobs(capability: int) -> Iterator[Job]:
    """All kernels in all configurations that ``tables.choose`` can return on sm_``capability``."""
    for mode, bits in product(("int8", "16bit"), WEIGHT_BITS):
        found: dict[KernelConfig, None] = {}
        for tile in config.formula_tiles(mode, capability):
            for c in (tile, replace(tile, block_k=128)):
                for split in (1, 2):
                    found[replace(c, split_k=split)] = None
        for N, K in ((384, 384), (384, 1536), (1024, 4096), (4096, 1024), (4096, 4096), (16384, 4096)):
            if few := config.few_tokens(mode, N, K, capability, 132, bits):
                found[few] = None
        if capability == 90:  # the GPUs with tables
            measured = [e for path in tables.CONFIG_DIR.glob("*.json") for e in tables.load_table(path)]
            for c in (e.config for e in measured if e.mode == mode):
                found.setdefault(replace(c, split_k=min(c.split_k, 2), expand=False))
        for c in found:
            K = c.step if c.quantizing else 4096
            if c.invalid(mode, K, capability, bits) is None:
                yield from _gemm_jobs(mode, c, K, capability, bits)
    for K in (384, 768, 4096, 8192, 16384):
        blocks = cuda.quantize_blocks(K)
        types = {"q_ptr": "*i8"}
        for activation in get_args(cuda.Activation):
            name, kernel = f"quantize {activation} bf16 K={K}".replace("  ", " "), quantize.quantize_kernel
            yield _job(name, kernel, (*blocks, 128, activation, True), capability, types)
        for kind, rms, add in (
            ("add LayerNorm", False, True),
            ("RMSNorm", True, False),
            ("add RMSNorm", True, True),
        ):
            if K <= 8192:
                name, kernel = f"{kind} quantize bf16 K={K}", norms.norm_quantize_kernel
                yield _job(name, kernel, (*blocks, rms, add, True), capability, types)
    for head_dim in (64, 128, 256):
        types = {n: "*bf16" for n in ("cos_ptr", "sin_ptr", "q_weight_ptr", "k_weight_ptr")}
        constants = cuda.rotate_blocks(head_dim), head_dim // 2, True
        yield _job(f"RMSNorm rotate bf16 {head_dim}", norms.norm_rotate_kernel, constants, capability, types)
    for ids in ("i32", "i64"):
        types = {"ids_ptr": f"*{ids}", "scale_ptr": "*fp16", "y_ptr": "*fp16"}
        yield _job(f"lookup fp16 {ids}", lookup_kernel, (embedding.LOOKUP_BLOCK,), capability, types)
    yield from _attention_jobs(capability)
    for mode in pooling.MODES:
        constants = mode, pooling.BLOCK_T, pooling.BLOCK_H
        yield _job(f"pool {mode} bf16", pool_kernel, constants, capability, {"starts_ptr": "*i32"})
    for width in (384, 4096):
        block = 1 << (width - 1).bit_length()
        yield _job(f"normalize bf16 {width}", normalize_kernel, (block,), capability)
    for bits in WEIGHT_BITS:
        yield _job(
            f"expand bf16 {bits}", expand_kernel, (16, bits), capability, {"out_ptr": "*bf16"}, last=()
        )
    for rule in (*RULES, "given"):
        yield _job(f"ternarize {rule}", ternarize_kernel, (rule,), capability, {"w_ptr": "*fp32"}, last=())


def _attention_jobs(capability: int) -> Iterator[Job]:
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
    heads = [(width, "fp16") for width in (32, 64, 96, 128, 256)]
    heads += [(width, name) for width in (64, 128) for name in ("bf16", "fp32")]
    for width, name in heads:
        types = {n: f"*{name}" for n in ("q_ptr", "k_ptr", "v_ptr", "bias_ptr", "y_ptr")}
        types |= {"tiles_ptr": "*i32", "SCALE": "fp32"}
        kinds = [
            ("", False, False, False),
            (" causal window", True, True, False),
            (" bias", False, False, True),
        ]
        for what, causal, window, bias in kinds[: 3 if width <= 64 else 2]:
            blocks = attention.blocks_of(width, dtypes[name], bias)
            options = {"num_warps": blocks.num_warps, "num_stages": blocks.num_stages}
            constants = attention.constants_of(width, dtypes[name], 1, causal, window, bias)
            kernel = packed_attention_kernel
            yield _job(f"attention {name} {width}{what}", kernel, constants, capability, types, options)


def _gemm_jobs(mode: config.Mode, c: KernelConfig, K: int, capability: int, bits: int) -> Iterator[Job]:
    tile = f"{c.block_m}t x {c.block_n}w x {c.block_k}k"
    tile += " of 4 bits" * (bits == 4) + " shared out" * c.share_k + " split" * (c.split_k > 1)
    if mode == "int8" and not c.quantizing:
        kernel, constants = cuda.int8_kernel(c, K, True, bits)
        dtypes = {"int8": {"x_ptr": "*i8"}}
    else:
        kernel, constants = cuda.direct_kernel(c, K, True, bits)
        packed = "*u8" if c.quantizing else "*u16"
        kind = "quantizing " * c.quantizing
        dtypes = {kind + d: {"x_ptr": f"*{d}", "packed_ptr": packed} for d in ("fp16", "bf16")}
    for name, types in dtypes.items():
        options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
        constants = (*constants[:-1], True)  # inline assembly
        yield _job(f"{name} {tile}", kernel, constants, capability, types, options)


def _job(
    name: str,
    kernel: Any,
    constants: tuple[Any, ...],
    capability: int,
    types: dict[str, str] | None = None,
    options: dict[str, int] | None = None,
    last: tuple[bool, ...] | None = None,
) -> Job:
    """A job from compile-time arguments in order, all but ``last``: whether launches overlap."""
    last = (capability >= 90,) if last is None else last
    names = kernel.arg_names
    values = dict(zip(names[-len(constants) - len(last) :], (*constants, *last), strict=True))
    known = {n: "i32" for n in names if n not in values}
    known |= {n: t for n, t in (_TYPES | (types or {})).items() if n in known}
    return Job(name, kernel.__name__, known, values, options or {"num_warps": 4}, capability)


_TYPES = {
    "x_ptr": "*bf16", "residual_ptr": "*bf16", "weight_ptr": "*bf16", "bias_ptr": "*bf16", "y_ptr": "*bf16",
    "packed_ptr": "*u8", "scale_ptr": "*fp32", "scale_x_ptr": "*fp32", "given_scale_ptr": "*fp32",
    "shares_ptr": "*i32", "tickets_ptr": "*i32", "clear_ptr": "*i32", "EPS": "fp32",
}  # fmt: skip
