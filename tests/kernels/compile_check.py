"""Compile every kernel configuration for sm_80, sm_89 and sm_90 without a GPU and read the machine code.

    python tests/kernels/compile_check.py [--capability 90] [--json FILE]

One row a kernel: registers, spills, shared memory, and what the main loop consists of. Exits with 1 unless
every row has no spills, fits the architecture's shared memory and registers, and every GEMM feeds its
unpacked weights to the tensor cores from registers (a register operand of wgmma; on older parts no
shared-memory store in the loop).
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

import torch
import triton

from tritern_kernels import attention, config, cuda, embedding, pooling, tables
from tritern_kernels.config import KernelConfig
from tritern_kernels.device import gemm, gemm_few, norms, quantize
from tritern_kernels.device.attention import packed_attention_kernel
from tritern_kernels.device.embedding import lookup_kernel
from tritern_kernels.device.pooling import normalize_kernel, pool_kernel
from tritern_kernels.device.ternarize import expand_kernel, ternarize_kernel
from tritern_kernels.launch import INTERPRETED
from tritern_kernels.reference import RULES

CAPABILITIES = (80, 89, 90)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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


@dataclass(frozen=True)
class Row:
    """What came out: counts are of the kernel's main loop; ``problem`` is empty when all is as it should
    be.
    """

    name: str
    capability: int
    registers: int
    spills: int
    shared: int
    tensor_core: str
    loop: int
    instructions: dict[str, int]
    problem: str


def jobs(capability: int) -> Iterator[Job]:
    """All kernels in all configurations that ``tables.choose`` can return on sm_``capability``."""
    for mode in ("int8", "16bit"):
        found: dict[KernelConfig, None] = {}
        for tile in config.formula_tiles(mode, capability):
            for c in (tile, replace(tile, block_k=128)):
                for split in (1, 2):
                    found[replace(c, split_k=split)] = None
        for N, K in ((384, 384), (384, 1536), (1024, 4096), (4096, 1024), (4096, 4096), (16384, 4096)):
            if few := config.few_tokens(mode, N, K, capability, 132):
                found[few] = None
        if capability == 90:  # the GPUs with tables
            measured = [e for path in tables.CONFIG_DIR.glob("*.json") for e in tables.load_table(path)]
            for c in (e.config for e in measured if e.mode == mode):
                found.setdefault(replace(c, split_k=min(c.split_k, 2), expand=False))
        for c in found:
            K = c.step if c.quantizing else 4096
            if c.invalid(mode, K, capability) is None:
                yield from _gemm_jobs(mode, c, K, capability)
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
    yield _job("expand bf16", expand_kernel, (16,), capability, {"out_ptr": "*bf16"}, last=())
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


def _gemm_jobs(mode: config.Mode, c: KernelConfig, K: int, capability: int) -> Iterator[Job]:
    tile = f"{c.block_m}t x {c.block_n}w x {c.block_k}k"
    tile += " shared out" * c.share_k + " split" * (c.split_k > 1)
    if mode == "int8" and not c.quantizing:
        kernel, constants = cuda.int8_kernel(c, K, True)
        dtypes = {"int8": {"x_ptr": "*i8"}}
    else:
        kernel, constants = cuda.direct_kernel(c, K, True)
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
_KERNELS = {
    kernel.__name__: kernel
    for kernel in (
        gemm.gemm_int8_kernel, gemm.gemm_16bit_kernel, gemm_few.gemm_int8_few_kernel,
        gemm_few.gemm_16bit_few_kernel, gemm_few.gemm_quantizing_kernel, quantize.quantize_kernel,
        norms.norm_quantize_kernel, norms.norm_rotate_kernel, lookup_kernel,
        packed_attention_kernel, pool_kernel, normalize_kernel,
        expand_kernel, ternarize_kernel,
    )
}  # fmt: skip


def check(job: Job) -> Row:
    """Compile one job and read its registers, memory and main loop."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _KERNELS[job.kernel]
    names = kernel.arg_names  # positions below are those of the kernel's own signature
    signature = {n: job.types.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): v for n, v in job.constants.items()}
    aligned = [
        i for i, n in enumerate(names) if n in job.types and n not in job.unaligned and job.types[n] != "fp32"
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", job.capability, 32), options=job.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        sass = _run("nvdisasm", "-c", f.name)
        usage = _run("cuobjdump", "-res-usage", f.name)
    loop = _main_loop(sass)
    counts = collections.Counter(loop)
    mma = {op: n for op, n in counts.items() if "MMA" in op}
    registers = int(re.findall(r"REG:(\d+)", usage)[0])
    spills = int(re.findall(r"STACK:(\d+)", usage)[0])
    shared = int(compiled.metadata.shared)
    problem = _problem(job, compiled.asm["ptx"], counts, mma, registers, spills, shared)
    kind = " ".join(f"{n} {op}" for op, n in mma.items())
    return Row(job.name, job.capability, registers, spills, shared, kind, len(loop), dict(counts), problem)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([str(_TOOLS / tool), *arguments], capture_output=True, text=True, check=True).stdout


def _main_loop(sass: str) -> list[str]:
    """Opcodes of the shortest loop around all tensor-core instructions; the longest where there are none."""
    lines = sass.splitlines()
    labels: dict[str, int] = {}
    loops: list[list[str]] = [[]]
    for i, line in enumerate(lines):
        if m := re.match(r"\s*\.(L_x_\d+):", line):
            labels[m.group(1)] = i
        if (m := re.search(r"BRA.*`\(\.(L_x_\d+)\)", line)) and m.group(1) in labels:
            ops = [op for s in lines[labels[m.group(1)] : i + 1] if (op := _opcode(s))]
            if len(ops) > 1:
                loops.append(ops)
    mma = [sum("MMA" in op for op in ops) for ops in loops]
    if most := max(mma):
        return min((ops for ops, n in zip(loops, mma, strict=True) if n == most), key=len)
    return max(loops, key=len)


def _opcode(line: str) -> str | None:
    m = re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)", line)
    return m.group(1) if m else None


def _problem(
    job: Job, ptx: str, counts: dict[str, int], mma: dict[str, int], registers: int, spills: int, shared: int
) -> str:
    if spills:
        return f"spills {spills} bytes"
    if shared > config.shared_memory_limit(job.capability):
        return f"needs {shared} bytes of shared memory"
    if registers * 32 * job.options["num_warps"] > 65536:
        return f"{registers} registers do not fit a multiprocessor"
    if job.kernel == "quantize_kernel" and not job.constants["ACTIVATION"] and "FFMA" in counts:
        return "the product is fused into the rounding: codes differ from the reference's"
    if job.kernel == "norm_rotate_kernel" and "mul.rn.f32" not in ptx:
        return "products are not rounded before they are added: results differ from torch's"
    if job.kernel == "packed_attention_kernel" and job.types["q_ptr"] != "*fp32" and not mma:
        return "no tensor-core instruction in the main loop"
    if not job.kernel.startswith("gemm"):
        return ""
    if job.kernel == "gemm_quantizing_kernel":  # it has no loop
        return "" if "mma.sync" in ptx else "no tensor-core instruction"
    if not mma:
        return "no tensor-core instruction in the main loop"
    if job.capability == 90:
        operands = re.findall(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*(\{)?", ptx)
        alone = job.constants["BLOCK_N"] >= 64 and job.options["num_warps"] >= 4
        for_warpgroups = alone and "PARTS" not in job.constants
        if not all(operands) or (for_warpgroups and not operands):
            return "wgmma reads the weights from shared memory"
    if stores := {op: n for op, n in counts.items() if op.startswith("STS")}:
        return f"shared-memory stores in the main loop: {stores}"
    return ""


def check_all(capabilities: tuple[int, ...] = CAPABILITIES, workers: int | None = None) -> list[Row]:
    """``check`` every job, in parallel processes."""
    work = [job for capability in capabilities for job in jobs(capability)]
    workers = workers or os.cpu_count() or 1
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return list(pool.map(check, work))


def table(rows: list[Row]) -> str:
    """The rows as text."""
    columns = f"{'kernel':32s} {'sm':>3s} {'regs':>4s} {'spill':>5s} {'shared':>7s} {'loop':>4s}"
    lines = [f"{columns}  {'tensor core':14s} most frequent"]
    for r in rows:
        frequent = " ".join(f"{op}:{n}" for op, n in collections.Counter(r.instructions).most_common(6))
        lines.append(
            f"{r.name:32s} {r.capability:3d} {r.registers:4d} {r.spills:5d} {r.shared:7d} {r.loop:4d}  "
            f"{r.tensor_core:14s} {frequent}" + (f"   PROBLEM: {r.problem}" if r.problem else "")
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``python tests/kernels/compile_check.py``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, action="append", help="only this one (repeatable)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter does not compile. Unset it.")
    if old := [c for c in options.capability or () if c < config.OLDEST_CAPABILITY]:
        parser.error(f"--capability must be at least {config.OLDEST_CAPABILITY}; received {old[0]}")
    rows = check_all(tuple(options.capability or CAPABILITIES))
    bad = [r for r in rows if r.problem]
    sys.stdout.write(
        f"{table(rows)}\n"
        f"{len(rows)} kernels compiled, {len(bad)} with a problem (triton {triton.__version__})\n"
    )
    if options.json:
        options.json.write_text(
            json.dumps({"triton": triton.__version__, "rows": [asdict(r) for r in rows]}, indent=1)
        )
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
