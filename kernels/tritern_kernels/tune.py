"""Find the fastest kernel configuration for shapes on this GPU and write its table.

    python -m tritern_kernels.tune --models bge-base qwen3-embedding-0.6b
    python -m tritern_kernels.tune --shapes 4096x1024 --tokens 1 64 4096 --json my-gpu.json

For every weight [N, K], number of tokens M and kind of activations, all valid candidates are compiled in
parallel, checked and timed. int8 results must have the same bits for every candidate; 16-bit results are
compared with float64. Timing uses CUDA graphs; the weights are out of the L2 cache if a large model's would
be. The table goes to the user's folder (``tables.user_folder``; TRITERN_CACHE names another) or to --json
FILE. Later processes prefer the user's table to the package's. Entries of an older table for other shapes
stay. Calls look up tables; they never tune.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from datetime import datetime, timezone
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from . import tables
from .candidates import MODELS, candidates
from .config import KernelConfig, Mode
from .launch import INTERPRETED
from .measure import Bench

TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Numbers of tokens tuned by default. A call looks up its own number rounded up to a power of two."""


def compile_one(mode: Mode, config: KernelConfig, K: int) -> str:
    """Compile a configuration into Triton's cache, in a process of its own; return the error or nothing."""
    try:
        bench = Bench(32, 512, K)
        bench.call(mode, config, bench.packed[0])
        torch.cuda.synchronize()
    except Exception as error:  # a compiler may raise anything
        return f"{config}: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
    return ""


def compile_all(work: Iterable[tuple[Mode, KernelConfig, int]], workers: int | None = None) -> list[str]:
    """Compile in parallel; return the failures."""
    todo = list(work)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        return [why for why in pool.map(compile_one, *zip(*todo, strict=True)) if why]


def tune(
    shapes: Iterable[tuple[int, int, int]],
    modes: Iterable[Mode] = ("int8", "16bit"),
    report: Callable[[str], Any] = print,
    done: Callable[[dict[str, Any]], Any] = lambda entry: None,
    seconds: float = float("inf"),
) -> list[dict[str, Any]]:
    """Entries of a table for shapes (M, N, K): the fastest correct configuration of each and its time.

    Args:
        shapes: M tokens, N out_features, K in_features. M counts as the next power of two.
        modes: "int8", "16bit" or both.
        report: called with a line of text for each shape and for each candidate that is wrong or fails.
        done: called with each entry as soon as it is measured.
        seconds: after this time, stop before the next shape.

    Raises:
        RuntimeError: there is no CUDA GPU.
    """
    if INTERPRETED or not torch.cuda.is_available():
        raise RuntimeError("tuning times kernels on a CUDA GPU; there is none, or TRITON_INTERPRET is set")
    end = time.monotonic() + seconds
    major, minor = torch.cuda.get_device_capability()
    cases: list[tuple[Mode, int, int, int]] = [(mode, *shape) for mode, shape in product(modes, shapes)]
    choices = {case: candidates(*case, 10 * major + minor) for case in cases}
    work: dict[tuple[Mode, KernelConfig, int], None] = dict.fromkeys(
        (case[0], c, case[3]) for case in cases for c in choices[case]
    )
    for why in compile_all(work):
        report(f"does not compile: {why}")
    entries = []
    for case in cases:
        if time.monotonic() > end:
            report(f"out of time: {len(cases) - len(entries)} shapes not tuned")
            break
        entry = _tune_case(*case, choices[case], report)
        if entry:
            entries.append(entry)
            done(entry)
    return entries


def _tune_case(
    mode: Mode, M: int, N: int, K: int, choices: list[KernelConfig], report: Callable[[str], Any]
) -> dict[str, Any] | None:
    bench = Bench(M, N, K)
    expected: Tensor | None = None
    found: list[tuple[float, KernelConfig]] = []
    for config in choices:
        try:
            y = bench.call(mode, config, bench.packed[0])
            good = bench.correct(mode, y) if expected is None or mode == "16bit" else torch.equal(y, expected)
            if not good:
                report(f"WRONG RESULT, left out: {mode} {M}x{N}x{K} {config}")
                continue
            expected = y if expected is None else expected
            found.append((bench.microseconds(mode, config), config))
        except (RuntimeError, triton.runtime.errors.OutOfResources) as error:
            if "CUDA error" in str(error):
                raise
            report(f"does not run: {mode} {M}x{N}x{K} {config}: {(str(error).splitlines() or [''])[0][:200]}")
    if not found:
        return None
    found.sort(key=lambda f: f[0])
    us, best = found[0]
    rate = 2e-6 * M * N * K / us
    report(f"{mode:5s} {M:5d} x {N:5d} x {K:5d} {us:8.2f} us {rate:6.0f} TOP/s  {describe(best)}")
    runners = [{"config": asdict(c), "us": round(t, 3)} for t, c in found[1:8]]
    return {
        "mode": mode, "M": M, "N": N, "K": K, "config": asdict(best), "us": round(us, 3), "next": runners
    }  # fmt: skip


def consolidate(entries: list[dict[str, Any]], slack: float = 0.04) -> list[dict[str, Any]]:
    """The same entries with fewer different configurations, so that fewer kernels are compiled. An entry gets
    the most widely used configuration within ``slack`` of its fastest.
    """
    options = {}
    for i, entry in enumerate(entries):
        near = [(entry["us"], entry["config"]), *((n["us"], n["config"]) for n in entry["next"])]
        options[i] = {
            (entry["mode"], KernelConfig(**c)): us for us, c in near if us <= (1 + slack) * entry["us"]
        }
    result: dict[int, dict[str, Any]] = {}
    while left := [i for i in options if i not in result]:
        votes = Counter(config for i in left for config in options[i])
        winner = max(votes, key=lambda config: votes[config])
        for i in left:
            if winner in options[i]:
                us = options[i][winner]
                result[i] = entries[i] | {"config": asdict(winner[1]), "us": us}
    return [result[i] for i in sorted(result)]


def describe(c: KernelConfig) -> str:
    """A configuration in words."""
    split = f" split {c.split_k}" if c.split_k > 1 else ""
    split += " shared out" * c.share_k + " quantizing" * c.quantizing
    tile = f"{c.block_m}t x {c.block_n}w x {c.block_k}k{split}"
    return "expanded" if c.expand else f"{tile}, {c.num_warps} warps, {c.num_stages} stages"


def write_table(path: Path, entries: list[dict[str, Any]]) -> None:
    """Write entries to the table at ``path``; they replace entries for the same shapes."""
    old = json.loads(path.read_text())["entries"] if path.exists() else []
    merged = {(e["mode"], e["M"], e["N"], e["K"]): e for e in (*old, *entries)}
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    table = {
        "gpu": gpu.name,
        "capability": 10 * gpu.major + gpu.minor,
        "processors": gpu.multi_processor_count,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "entries": [{k: v for k, v in merged[key].items() if k != "next"} for key in sorted(merged)],
    }
    head = json.dumps({k: v for k, v in table.items() if k != "entries"}, indent=1)[:-2]
    rows = ",\n".join("  " + json.dumps(e) for e in table["entries"])
    partial_file = path.with_name(path.name + ".partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file.write_text(f'{head},\n "entries": [\n{rows}\n ]\n}}\n')
    partial_file.replace(path)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of ``python -m tritern_kernels.tune``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = ", ".join(MODELS)
    parser.add_argument("--models", nargs="+", default=[], metavar="NAME", help=f"all, or of {names}")
    parser.add_argument("--shapes", nargs="+", default=[], metavar="NxK", help="weights: out x in features")
    parser.add_argument(
        "--tokens", nargs="+", type=int, metavar="M", help=f"default: {' '.join(map(str, TOKENS))}"
    )
    parser.add_argument("--modes", nargs="+", default=["int8", "16bit"], choices=["int8", "16bit"])
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="after this time, stop before the next shape"
    )
    parser.add_argument(
        "--json", type=Path, help="the table's file; default: this GPU's in the user's folder"
    )
    options = parser.parse_args(arguments)
    known = list(MODELS) if "all" in options.models else options.models
    if bad := [n for n in known if n not in MODELS] + [
        s for s in options.shapes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", s)
    ]:
        parser.error(f"models are all or of {names}, shapes are like 4096x1024; received {bad[0]!r}")
    weights = [w for n in known for w in MODELS[n]] + [
        tuple(map(int, s.split("x"))) for s in options.shapes
    ]  # fmt: skip
    if not weights:
        parser.error("name models with --models or weights with --shapes")
    tokens = [1 << (max(M, 1) - 1).bit_length() for M in options.tokens or TOKENS]
    shapes = [(M, N, K) for N, K in dict.fromkeys(weights) for M in dict.fromkeys(tokens)]
    if INTERPRETED or not torch.cuda.is_available():
        parser.error("tuning times kernels on a CUDA GPU; there is none, or TRITON_INTERPRET is set")
    try:
        path = options.json or tables.user_table(torch.cuda.get_device_name())
        tables.check_table(path)
    except (OSError, ValueError) as error:
        parser.error(f"the table cannot be written: {error} Name another with --json.")
    entries: list[dict[str, Any]] = []

    def done(entry: dict[str, Any]) -> None:
        entries.append(entry)
        write_table(path, entries)

    tune(shapes, options.modes, lambda line: print(line, flush=True), done, options.seconds)  # noqa: T201
    write_table(path, consolidate(entries))
    sys.stdout.write(f"{len(entries)} entries written to {path}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
