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
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import triton
from compile_jobs import Job, jobs

from tritern_kernels import config
from tritern_kernels.device import gemm, gemm_few, norms, quantize
from tritern_kernels.device.attention import packed_attention_kernel
from tritern_kernels.device.embedding import lookup_kernel
from tritern_kernels.device.pooling import normalize_kernel, pool_kernel
from tritern_kernels.device.ternarize import expand_kernel, ternarize_kernel
from tritern_kernels.launch import INTERPRETED

CAPABILITIES = (80, 89, 90)
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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
        sass = _run("nvdisasm", "-c", "-ndf", f.name)  # without dataflow analysis: the labels are the same
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
