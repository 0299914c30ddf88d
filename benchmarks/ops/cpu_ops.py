"""Linear layers on a CPU: float32 against ternary, per instruction set.

    python benchmarks/ops/cpu_ops.py                            layers of MiniLM and mpnet-base
    python benchmarks/ops/cpu_ops.py --json cpu-ops.json        the same, written down

The arms take turns: nn.Linear in float32, then the ternary layer with int8 and with 16-bit activations, its
quantization, scales and bias included. A ratio is the median over the turns. Each instruction set has a
process of its own (``instruction_sets.py``). A time counts only if the layer's output passed a check against
float64 in that process.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report
import torch
from models.encode import processor
from ops.instruction_sets import ENVIRONMENT, hold_to
from torch import nn

import tritern
from tritern_kernels import cpu, reference

LAYERS = {
    "MiniLM": [(384, 384), (1536, 384), (384, 1536)],
    "mpnet-base": [(768, 768), (3072, 768), (768, 3072)],
}
"""Of a model's block: out_features, in_features."""
TOKENS = (64, 2048)


def milliseconds(call: Callable[[], object], at_least: float = 2e-3) -> float:
    """Of a call: the mean of as many as take ``at_least`` seconds."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < at_least:
        call()
        count += 1
    return 1e3 * passed / count


@torch.inference_mode()
def measure(M: int, N: int, K: int, turns: int) -> dict[str, Any]:
    """Medians of one shape, and of the ratios to float32."""
    with torch.inference_mode(False):
        dense = nn.Linear(K, N)
        layers = {bits: tritern.TernaryLinear.from_linear(dense, activation_bits=bits) for bits in (8, 16)}
    x = torch.randn(M, K)
    arms: dict[str, Callable[[], object]] = {"float32": lambda: dense(x)}
    for bits, layer in layers.items():
        weight = layer.packed()
        exact = reference.linear(x, weight.codes(), weight.scale, layer.bias, bits)
        error = float((layer(x).double() - exact).abs().max() / exact.abs().max())
        if not error < 1e-5:
            raise SystemExit(
                f"{M}, {N}, {K}, {bits} bits: differs from float64 by {error:.1e} of the largest output"
            )
        arms["int8" if bits == 8 else "16-bit"] = lambda layer=layer: layer(x)
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(turns + 2):
        for name, call in arms.items():
            found = milliseconds(call)
            if turn >= 2:
                taken[name].append(found)
    row: dict[str, Any] = {"M": M, "N": N, "K": K}
    for name, times in taken.items():
        row[name + "_ms"] = statistics.median(times)
        row[name + "_speed"] = statistics.median(a / b for a, b in zip(taken["float32"], times))
    return row


def measure_layers(name: str, turns: int) -> dict[str, Any]:
    """All shapes in this process, whose environment holds the libraries to an instruction set."""
    hold_to(name)
    torch.manual_seed(0)
    products = {f"{bits} bits": cpu.fastest(bits)[0] for bits in (8, 16)}
    rows = []
    for model, shapes in LAYERS.items():
        for M in TOKENS:
            for N, K in shapes:
                rows.append({"model": model, **measure(M, N, K, turns)})
                print(".", end="", file=sys.stderr, flush=True)
    return {"products": products, "rows": rows}


def table(found: dict[str, dict[str, Any]]) -> str:
    """Milliseconds, and how many times as fast as float32."""
    lines = [
        f"{'':8s} {'':10s} {'M, N, K':>16s} {'float32':>9s} {'int8':>9s} {'':>7s} {'16-bit':>9s} {'':>7s}"
    ]
    for name, result in found.items():
        for r in result["rows"]:
            shape = f"{r['M']}, {r['N']}, {r['K']}"
            lines.append(
                f"{name:8s} {r['model']:10s} {shape:>16s} {r['float32_ms']:9.3f} {r['int8_ms']:9.3f} "
                f"{r['int8_speed']:6.2f}x {r['16-bit_ms']:9.3f} {r['16-bit_speed']:6.2f}x"
            )
        lines.append(
            f"{name:8s} " + ", ".join(f"{bits}: {kind}" for bits, kind in result["products"].items())
        )
    return "\n".join(lines)


def main() -> None:
    """Run every instruction set, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--instruction-sets", nargs="+", choices=ENVIRONMENT, default=list(ENVIRONMENT))
    parser.add_argument("--turns", type=int, default=15, help="times that each arm has its turn")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--one", choices=ENVIRONMENT, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure_layers(options.one, options.turns)))
        return
    facts = report.environment() | {"device": processor(), "threads": torch.get_num_threads()}
    found = {}
    for name in options.instruction_sets:
        command = [sys.executable, __file__, "--one", name, "--turns", str(options.turns)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **ENVIRONMENT[name]}
        )
        found[name] = json.loads(done.stdout.splitlines()[-1])
    print("\n" + ", ".join(f"{k} {v}" for k, v in facts.items() if v is not None))
    print(table(found))
    if options.json:
        report.write_json(options.json, {"environment": facts, "instruction_sets": found})


if __name__ == "__main__":
    main()
