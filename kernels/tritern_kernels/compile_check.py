"""Compile every kernel configuration for sm_80, sm_89 and sm_90 without a GPU and read the machine code.

    python -m tritern_kernels.compile_check [--capability 90] [--json FILE]

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
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import triton

from . import activations, gemm, ternarize, tuning
from .launch import INTERPRETED
from .reference import RULES

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
    unaligned: tuple[str, ...] = ("M",)


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
    """All kernels in all configurations that ``tuning.choose`` can return on sm_``capability``."""
    for mode in ("int8", "16bit"):
        configs = tuning.formula_tiles(mode, capability)
        configs += [replace(c, block_k=128) for c in configs if c.block_k > 128]
        done = {_tile_of(c) for c in configs}
        for c in dict.fromkeys(replace(c, group_m=8, split_k=1) for c in configs):
            if c.invalid(mode, c.block_k, capability) is None:
                yield from _gemm_jobs(mode, c, capability, (False, True), (1, 2))
        if capability != 90:  # the GPUs with tables
            continue
        tables = [entry for path in tuning.CONFIG_DIR.glob("*.json") for entry in tuning.load_table(path)]
        splits: dict[tuple, set[int]] = {}
        for e in tables:
            if e.mode == mode and _tile_of(e.config) not in done:
                splits.setdefault(_tile_of(e.config), set()).add(min(e.config.split_k, 2))
        for tile, used in splits.items():
            yield from _gemm_jobs(mode, _config_of(tile), capability, (False,), tuple(sorted(used)))
    for K in (384, 768, 4096, 16384):
        blocks = dict(zip(("BLOCK_M", "BLOCK_K", "PIECES"), activations.quantize_blocks(K), strict=True))
        blocks |= {"CLEAR": 128, "GELU": False, "ASM": True, "PDL": capability >= 90}
        types = {"x_ptr": "*bf16", "q_ptr": "*i8", "scale_ptr": "*fp32", "clear_ptr": "*i32"}
        types |= dict.fromkeys(("M", "K", "K_padded", "stride_x", "stride_q"), "i32")
        yield Job(f"quantize bf16 K={K}", "quantize", types, blocks, {"num_warps": 4}, capability)
    yield _expand_job(capability)
    for rule in (*RULES, "given"):
        types = {"w_ptr": "*fp32", "packed_ptr": "*u8", "scale_ptr": "*fp32", "given_scale_ptr": "*fp32"}
        types |= dict.fromkeys(("K", "stride_w", "stride_p"), "i32")
        yield Job(f"ternarize {rule}", "ternarize", types, {"RULE": rule}, {"num_warps": 4}, capability)


def _expand_job(capability: int) -> Job:
    types = {"packed_ptr": "*u8", "scale_ptr": "*fp32", "out_ptr": "*bf16", "K": "i32", "stride_p": "i32"}
    return Job("expand bf16", "expand", types, {"ATOMS": 16}, {"num_warps": 4}, capability)


def _tile_of(c: tuning.KernelConfig) -> tuple[int, ...]:
    return c.block_m, c.block_n, c.block_k, c.num_warps, c.num_stages


def _config_of(tile: tuple[int, ...]) -> tuning.KernelConfig:
    block_m, block_n, block_k, num_warps, num_stages = tile
    return tuning.KernelConfig(block_m, block_n, block_k, num_warps=num_warps, num_stages=num_stages)


def _gemm_jobs(
    mode: tuning.Mode,
    c: tuning.KernelConfig,
    capability: int,
    gelus: tuple[bool, ...],
    splits: tuple[int, ...],
) -> Iterator[Job]:
    tile = f"{c.block_m}t x {c.block_n}w x {c.block_k}k"
    constants = {"BLOCK_M": c.block_m, "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "GROUP": c.group_m}
    constants |= {"HAS_BIAS": True, "ASM": True, "PDL": capability >= 90}
    options = {"num_warps": c.num_warps, "num_stages": c.num_stages}
    if mode == "int8":
        types = {
            "x_ptr": "*i8",
            "packed_ptr": "*u8",
            "scale_x_ptr": "*fp32",
            "scale_ptr": "*fp32",
            "bias_ptr": "*fp16",
        }
        types |= {"y_ptr": "*fp16", "shares_ptr": "*i32", "tickets_ptr": "*i32"}
        types |= dict.fromkeys(("M", "N", "K_padded", "stride_p", "stride_y"), "i32")
        for gelu, split in product(gelus, splits):
            if (gelu and split > 1) or replace(c, split_k=split).invalid(
                mode, 2 * c.block_k, capability, gelu
            ):
                continue
            suffix = " gelu" if gelu else " split" if split > 1 else ""
            extra = {"GELU": gelu, "SPLIT": split, "LINES": c.lines(4096)}
            yield Job(f"int8 {tile}{suffix}", "int8", types, constants | extra, options, capability)
        return
    for dtype in ("fp16", "bf16"):
        types = {"x_ptr": f"*{dtype}", "packed_ptr": "*u16", "scale_ptr": "*fp32", "bias_ptr": f"*{dtype}"}
        types |= {"y_ptr": f"*{dtype}"}
        types |= dict.fromkeys(("M", "N", "K", "K_padded", "stride_x", "stride_p", "stride_y"), "i32")
        extra = {"GELU": False, "EVEN_K": True, "LINES": c.lines(4096)}
        yield Job(f"{dtype} {tile}", "16bit", types, constants | extra, options, capability)


_KERNELS = {
    "expand": ternarize.expand_kernel,
    "int8": gemm.gemm_int8_kernel,
    "16bit": gemm.gemm_16bit_kernel,
    "quantize": activations.quantize_kernel,
    "ternarize": ternarize.ternarize_kernel,
}


def check(job: Job) -> Row:
    """Compile one job and read its registers, memory and main loop."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = _KERNELS[job.kernel]
    names = kernel.arg_names  # positions below are those of the kernel's own signature
    signature = {n: job.types.get(n, "constexpr") for n in names}
    constants = {(names.index(n),): v for n, v in job.constants.items()}
    aligned = [i for i, n in enumerate(names) if n in job.types and n not in job.unaligned]
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
    if shared > tuning.shared_memory_limit(job.capability):
        return f"needs {shared} bytes of shared memory"
    if registers * 32 * job.options["num_warps"] > 65536:
        return f"{registers} registers do not fit a multiprocessor"
    if job.kernel == "quantize" and "FFMA" in counts:
        return "the product is fused into the rounding: codes differ from the reference's"
    if job.kernel not in ("int8", "16bit"):
        return ""
    if not mma:
        return "no tensor-core instruction in the main loop"
    if job.capability == 90:
        operands = re.findall(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*(\{)?", ptx)
        for_warpgroups = job.constants["BLOCK_N"] >= 64 and job.options["num_warps"] >= 4
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
    """Entry point of ``python -m tritern_kernels.compile_check``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--capability", type=int, action="append", help="only this one (repeatable)")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter does not compile. Unset it.")
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
