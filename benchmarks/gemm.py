"""Race tritern's GEMM kernels against dense and quantized baselines, on the shapes of embedding models.

A speed is reported only for a contestant whose result passed the check against float64 in the same run on the
same data; one that fails, or is not installed, keeps its row and says why. Losses are printed like wins.

Examples:
  python benchmarks/gemm.py --quick --json gemm.json --plot gemm.png     about two minutes
  python benchmarks/gemm.py --shapes bge-base e5-mistral-7b --tokens 1 16 1024
  python benchmarks/gemm.py --shapes 64x12288x4096      MxNxK: tokens, out_features, in_features

Reading the table:
  cold   microseconds a call, walking through copies of the weights that exceed the L2 cache: a large model
  hot    the same on one copy, which may stay in the cache: a small model, or a benchmark that flatters
  [..]   20th to 80th percentile of the CUDA-graph replays; the number before is their median
  speed  time of the faster F.linear (bf16 or fp16) over this one's: below 1 is a loss
  rms    RMS error against float64 of the contestant's own operands, over the RMS of the exact result

"tritern int8" and "gemlite A8W158" include the quantization of bf16 activations; "tritern int8 gemm" and the
other 8-bit rows multiply operands quantized beforehand. "4 bits": weights of 4 bits instead of 2. gemlite
tunes itself on each shape for minutes, so --quick leaves it out. Exits with 1 when a tritern row has no time.
Without a CUDA GPU nothing is timed: all kernel configurations are compiled for sm_80, sm_89 and sm_90
(--quick: sm_90) and listed with registers, shared memory and instructions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import cases
import report
import timing
import torch
import triton
import triton.language as tl
from cases import BF16, EXACT, FP8, FP16, ONE_ROUNDING, Case, Entry, Operands
from timing import stored_bytes
from torch import Tensor
from torch.nn.functional import linear as dense_linear
from torch.nn.functional import pad

from tritern_kernels import (
    PackedWeight,
    cuda,
    linear,
    padded_k,
    quantize_activations,
    reference,
    round_to_int4,
    tables,
    tune,
)
from tritern_kernels.config import KernelConfig, Mode
from tritern_kernels.formats import to_packed_order
from tritern_kernels.launch import INTERPRETED

BASELINES = ("F.linear bf16", "F.linear fp16")
COMPILE_CHECK = Path(__file__).parents[1] / "tests" / "kernels" / "compile_check.py"


# ---------------------------------------------------------------- contestants


def _config(mode: Mode, case: Case, weight_bits: int = 2) -> KernelConfig:
    p = torch.cuda.get_device_properties(case.x.device)
    gpu = p.name, 10 * p.major + p.minor, p.multi_processor_count
    return tables.choose(mode, *case.shape, *gpu, weight_bits)


def tritern_linear(case: Case, bits: int, weight_bits: int = 2) -> Entry:
    """The public operation: with 8 bits it quantizes the activations itself."""
    w, mode = case.weight, "int8" if bits == 8 else "16bit"
    if weight_bits == 4:
        w = round_to_int4(case.dense)
    x, scale_x = reference.quantize_activations(case.x) if bits == 8 else (case.x, None)
    operands = Operands(x, w.codes(), scale_x, w.scale)
    note = tune.describe(_config(mode, case, weight_bits))

    def call(weights: tuple[Tensor, Tensor]) -> Tensor:
        return linear(case.x, PackedWeight(*weights, w.shape), activation_bits=bits)

    return Entry(call, (w.packed, w.scale), operands, ONE_ROUNDING, stored_bytes(case.x), note)


def tritern_gemm(case: Case) -> Entry:
    """The int8 kernel alone, on activations quantized beforehand."""
    config, (x_q, scale_x) = _config("int8", case), quantize_activations(case.x)

    def call(weights: tuple[Tensor, Tensor]) -> Tensor:
        return cuda.gemm_int8(x_q, scale_x, *weights, None, config, torch.bfloat16)

    weights = (case.weight.packed, case.weight.scale)
    return Entry(
        call, weights, case.int8(), ONE_ROUNDING, stored_bytes((x_q, scale_x)), tune.describe(config)
    )


def dense_16bit(case: Case, dtype: torch.dtype) -> Entry:
    """``torch.nn.functional.linear`` (cuBLAS)."""
    x, w = case.x.to(dtype), case.dense.to(dtype)
    tolerance = BF16 if dtype == torch.bfloat16 else FP16
    return Entry(lambda weights: dense_linear(x, weights), w, Operands(x, w), tolerance, stored_bytes(x))


def dense_int8(case: Case) -> Entry:
    """``torch._int_mm`` on per-row int8 weights: int32 sums, not scaled."""
    x_q, w_q = reference.quantize_activations(case.x)[0], reference.quantize_activations(case.dense)[0]
    call = lambda w: torch.ops.aten._int_mm(x_q, w.t())  # noqa: E731
    return Entry(call, w_q, Operands(x_q, w_q), EXACT, stored_bytes(x_q), "int32 sums, not scaled")


def _to_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """Per-row e4m3 [rows, K] and its float32 scale [rows, 1]."""
    largest = torch.finfo(torch.float8_e4m3fn).max
    scale = values.float().abs().amax(1, keepdim=True).clamp(min=reference.SMALLEST_ABSMAX) / largest
    return (values.float() / scale).clamp(-largest, largest).to(torch.float8_e4m3fn), scale


def _scaled_mm(x: Tensor, w: Tensor, scale_x: Tensor, scale: Tensor) -> Tensor:
    return torch.ops.aten._scaled_mm(x, w.t(), scale_x, scale, out_dtype=torch.bfloat16, use_fast_accum=True)


def dense_fp8(case: Case) -> Entry:
    """``torch._scaled_mm`` on e4m3, scaled per row where the GPU can, otherwise with one scale a matrix."""
    (x, scale_x), (w, scale) = _to_fp8(case.x), _to_fp8(case.dense)
    note = "row-wise scales"
    try:
        _scaled_mm(x, w, scale_x, scale.t())
    except RuntimeError as error:
        note = f"one scale a matrix; row-wise: {timing.reason_of(error)}"
        one = torch.ones((), device=x.device)
        scale_x, scale = one, one  # unit scales: the operands are what they are, and so is the check
    operands = Operands(x, w, scale_x.flatten().expand(x.shape[0]), scale.flatten().expand(w.shape[0]))
    scale_b = scale.t() if scale.dim() else scale
    return Entry(
        lambda weights: _scaled_mm(x, weights[0], scale_x, weights[1]),
        (w, scale_b), operands, FP8, stored_bytes((x, scale_x)), note,
    )  # fmt: skip


@triton.jit
def _expand_kernel(packed_ptr, out_ptr, total, BLOCK: tl.constexpr):  # noqa: ANN001, ANN202
    """Two bits to a byte, in packed order: 64 * code as int8, which is also 2 * code as e4m3."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < total
    w = tl.load(packed_ptr + i, mask=inside, other=0)
    out = out_ptr + i // 32 * 128 + i % 32
    tl.store(out, ((w << 6) & 0xC0).to(tl.uint8), mask=inside)
    tl.store(out + 32, ((w << 4) & 0xC0).to(tl.uint8), mask=inside)
    tl.store(out + 64, ((w << 2) & 0xC0).to(tl.uint8), mask=inside)
    tl.store(out + 96, (w & 0xC0).to(tl.uint8), mask=inside)


def expand(packed: Tensor) -> Tensor:
    """Packed uint8 [N, K_padded / 4] to bytes uint8 [N, K_padded] in packed order, read as int8 or e4m3."""
    out = torch.empty((packed.shape[0], 4 * packed.shape[1]), dtype=torch.uint8, device=packed.device)
    grid = (triton.cdiv(packed.numel(), 4096),)
    _expand_kernel[grid](packed, out, packed.numel(), BLOCK=4096)  # pyright: ignore[reportArgumentType]
    return out


def expand_int8(case: Case) -> Entry:
    """Expand the packed weights to int8 in memory, then ``torch._int_mm``: what not fusing costs."""
    x_q = quantize_activations(case.x)[0]
    call = lambda packed: torch.ops.aten._int_mm(x_q, expand(packed).view(torch.int8).t())  # noqa: E731
    operands = Operands(case.int8().x, 64 * case.codes)
    return Entry(call, case.weight.packed, operands, EXACT, stored_bytes(x_q), "int32 sums, not scaled")


def expand_fp8(case: Case) -> Entry:
    """Expand the packed weights to e4m3 in memory, then ``torch._scaled_mm`` with row-wise scales."""
    x, scale_x = _to_fp8(case.x)
    K = case.shape.K
    padded = pad(x.view(torch.int8), (0, padded_k(K) - K))
    x_packed = to_packed_order(padded).view(torch.float8_e4m3fn)

    def call(weights: tuple[Tensor, Tensor]) -> Tensor:
        return _scaled_mm(x_packed, expand(weights[0]).view(torch.float8_e4m3fn), scale_x, weights[1])

    operands = Operands(x, case.codes, scale_x.flatten(), case.weight.scale)
    weights = (case.weight.packed, 0.5 * case.weight.scale[None, :])
    return Entry(call, weights, operands, FP8, stored_bytes((x, scale_x)), "row-wise scales")


@cache
def _tune_gemlite() -> None:
    """Let gemlite look through all its configurations where they are few enough, its usual ones elsewhere."""
    import gemlite  # pyright: ignore[reportMissingImports]

    gemlite.set_autotune({"GEMV_REVSPLITK": "max"})


def gemlite(case: Case, bits: int) -> Entry:
    """Gemlite's BitNet layers; they take one scale a matrix."""
    from gemlite.helper import A16W158_INT, A8W158_INT_dynamic  # pyright: ignore[reportMissingImports]

    if case.quick:
        raise RuntimeError("left out by --quick: it tunes itself on each shape for minutes")
    _tune_gemlite()
    # in bf16 its 16-bit layer adds partial sums up in bf16, which fails the check; fp16 it does better
    dtype = torch.bfloat16 if bits == 8 else torch.float16
    x = case.x.to(dtype)
    processor = (A8W158_INT_dynamic if bits == 8 else A16W158_INT)(device="cuda", dtype=dtype)
    scale = torch.tensor(0.02)
    # .to(): the 16-bit helper leaves its scales on the CPU
    layer = processor.from_weights(case.codes.to(dtype), weight_scale=scale).to("cuda")
    int8, scales = case.int8(), scale.to(case.x.device).expand(case.shape.N)
    operands = replace(int8, scale=scales) if bits == 8 else Operands(x, case.codes, None, scales)
    call = lambda weights: weights(x)  # noqa: E731
    return Entry(call, layer, operands, BF16, stored_bytes(x), f"one scale a matrix, {dtype}")


def nf4(case: Case) -> Entry:
    """Bitsandbytes' 4-bit linear (NF4, blocks of 64, scales not compressed: its faster setting)."""
    import bitsandbytes  # pyright: ignore[reportMissingImports]

    functional = bitsandbytes.functional
    packed, state = functional.quantize_4bit(case.dense, quant_type="nf4", compress_statistics=False)
    operands = Operands(case.x, functional.dequantize_4bit(packed, state).view(case.dense.shape))
    call = lambda w: bitsandbytes.matmul_4bit(case.x, w[0].t(), quant_state=w[1])  # noqa: E731
    return Entry(call, (packed, state), operands, BF16, stored_bytes(case.x), "blocks of 64")


CONTESTANTS: cases.Contestants = {
    "tritern int8": lambda case: tritern_linear(case, 8),
    "tritern int8 gemm": tritern_gemm,
    "tritern bf16": lambda case: tritern_linear(case, 16),
    "tritern int8, 4 bits": lambda case: tritern_linear(case, 8, weight_bits=4),
    "tritern bf16, 4 bits": lambda case: tritern_linear(case, 16, weight_bits=4),
    "F.linear bf16": lambda case: dense_16bit(case, torch.bfloat16),
    "F.linear fp16": lambda case: dense_16bit(case, torch.float16),
    "torch._int_mm int8": dense_int8,
    "torch._scaled_mm fp8": dense_fp8,
    "expand + _int_mm": expand_int8,
    "expand + _scaled_mm": expand_fp8,
    "bitsandbytes NF4": nf4,
    "gemlite A8W158": lambda case: gemlite(case, 8),
    "gemlite A16W158": lambda case: gemlite(case, 16),
}


@torch.no_grad()
def race(shapes: list[cases.Shape], options: argparse.Namespace) -> int:
    """Run the shapes, printing and writing each as it ends; 1 when a tritern row has no times."""
    facts = report.environment() | {"seed": options.seed, "cold_bytes": timing.COLD_BYTES}
    print(", ".join(f"{k} {v}" for k, v in facts.items()), flush=True)
    roofs = timing.measure_roofs()
    print(f"measured: copy {roofs.copy_tb_s:.2f} TB/s, bf16 products {roofs.bf16_tflops:.0f} TFLOP/s\n")
    rows: list[cases.Row] = []
    lost = ""
    for shape in shapes:
        found, lost = timing.race_shape(shape, CONTESTANTS, BASELINES, options.seed, options.quick, lost)
        rows += found
        print(report.case_table(found) + "\n", flush=True)
        if options.json:
            records = [report.row_record(r) for r in rows]
            report.write_json(options.json, facts | {"roofs": asdict(roofs), "rows": records})
    if options.plot:
        report.plot_roofline(rows, roofs, f"{facts['gpu']}, {facts['date'][:10]}", options.plot)
    slow = [r for r in rows if r.contestant.startswith("tritern") and r.reason]
    print(f"{len(shapes)} shapes, {len(slow)} tritern rows without a time")
    return 1 if slow else 0


def compile_only(options: argparse.Namespace) -> int:
    """Registers, shared memory and instructions, which need no GPU; 1 when a row has a problem."""
    print("No CUDA GPU, so no timings and no plot. The compiled kernel configurations:", flush=True)
    command = [sys.executable, str(COMPILE_CHECK), *(("--capability", "90") if options.quick else ())]
    command += ["--json", str(options.json)] if options.json else []
    return subprocess.run(command, check=False).returncode


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    names, tokens = ", ".join(cases.MODELS), " ".join(map(str, cases.DEFAULT_TOKENS))
    shapes_help = f"MxNxK, all, or models: {names} (default: {' '.join(cases.DEFAULT_MODELS)})"
    add("--shapes", nargs="+", metavar="SHAPE", help=shapes_help)
    add("--tokens", nargs="+", type=int, metavar="M", help=f"M for the models' layers (default: {tokens})")
    add("--quick", action="store_true", help=f"ten shapes and fewer replays: {' '.join(cases.QUICK)}")
    add("--json", type=Path, help="write all rows, failures included, rewritten after each shape")
    add("--plot", type=Path, help="write a roofline as PNG; needs matplotlib (pip install tritern[bench])")
    add("--seed", type=int, default=0, help="seed of weights and activations (default: 0)")
    options = parser.parse_args(arguments)
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: the interpreter neither compiles nor tells a speed. Unset it.")
    if options.quick and (options.shapes or options.tokens):
        parser.error("--quick brings its own shapes: leave out --shapes and --tokens")
    try:
        names = cases.QUICK if options.quick else options.shapes or cases.DEFAULT_MODELS
        shapes = cases.parse_shapes(list(names), options.tokens or list(cases.DEFAULT_TOKENS))
        if options.plot:
            report.load_pyplot()  # before the race, not after it
    except (ValueError, ModuleNotFoundError) as error:
        parser.error(str(error))
    return race(shapes, options) if torch.cuda.is_available() else compile_only(options)


if __name__ == "__main__":
    raise SystemExit(main())
