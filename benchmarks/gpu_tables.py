"""The tables of what was measured on a GPU, from ``benchmarks/results``; ``tables.py`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import report
from cases import Errors, Row, Times, Tolerance

RESULTS = Path(__file__).parent / "results"
SHOWN = (
    "tritern int8",
    "tritern int8 gemm",
    "tritern bf16",
    "torch._scaled_mm fp8",
    "torch._int_mm int8",
    "bitsandbytes NF4",
    "gemlite A8W158",
    "gemlite A16W158",
)
# what is compared, contestant, shape, speed that must be reached, speed aimed at
TARGETS = (
    ("M = 16, N = 12288, K = 4096", "tritern int8", (16, 12288, 4096), 4.5, 6.5),
    ("M = 16, N = K = 4096", "tritern int8", (16, 4096, 4096), 2.5, 3.2),
    ("M = 64, N = 12288, K = 4096", "tritern int8", (64, 12288, 4096), 3.0, 4.0),
    ("M = 128, N = 12288, K = 4096", "tritern int8", (128, 12288, 4096), 1.8, 2.3),
    ("M = 1024, N = K = 4096, product alone", "tritern int8 gemm", (1024, 4096, 4096), 1.4, 1.65),
    ("M = 1024, N = K = 4096", "tritern int8", (1024, 4096, 4096), 1.3, 1.5),
    ("M = 8192, N = K = 4096, product alone", "tritern int8 gemm", (8192, 4096, 4096), 1.4, 1.65),
    ("M = 8192, N = K = 4096", "tritern int8", (8192, 4096, 4096), 1.3, 1.5),
    ("M = 8192, N = 3072, K = 768", "tritern int8", (8192, 3072, 768), 1.25, 1.5),
    ("M = 8192, N = 1536, K = 384", "tritern int8", (8192, 1536, 384), 1.25, 1.5),
)

KINDS = ("eager", "graph", "compiled", "compiled graph")
WANTED = (1.3, 1.8)  # floor and aim of whole models, fastest arm against fastest

# how many times smaller the weights of a model's linears, and of the model with int8 embeddings, were to be
SMALLER = (("minilm", 7.9, 3.5), ("bge-base", 7.9, 4.5))


SPEEDS = (
    "Speed over the faster of cuBLAS in bf16 and fp16, weights cold (in brackets: hot in the L2 cache). "
    'Above 1 is faster;\n"tritern int8" quantizes the activations. "tritern int8 gemm", fp8 and `_int_mm` '
    "get them quantized; `_int_mm` returns\nunscaled int32. A dash: no time."
)
MODELS = (
    "Forward passes of 128 tokens a text (a single one: 16 tokens): eager / as a CUDA graph / compiled by "
    "torch / compiled, in a graph.\nTernary has int8 activations, fused is after `tritern.fuse(model)`. "
    f"Last, the fastest 16-bit arm over the fastest ternary one: floor {WANTED[0]}x,\naim {WANTED[1]}x. "
    "Speeds in brackets lack the compiled fp16 arm."
)


def load(name: str) -> dict[str, Any]:
    """A result file."""
    return json.loads((RESULTS / name).read_text())


def weigh() -> dict[str, Any]:
    """Bytes of models in 16 bits and ternary with int8 embeddings; biases do not count as linears."""
    import torch
    from models.encode_gpu import build

    import tritern

    rows = {}
    for name, *_ in SMALLER:
        found = tritern.summary(tritern.patch(build(name, torch.float16, "cpu"), embedding_bits=8))
        rows[name] = {
            "linears": [found.linear_bytes_before, found.linear_bytes_after],
            "model": [found.model_bytes_before, found.model_bytes_after],
        }
    return report.environment() | {"rows": rows}


def rows_of(file: dict[str, Any]) -> list[Row]:
    """The rows of a race."""
    kinds = {"errors": Errors, "tolerance": Tolerance, "cold": Times, "hot": Times}
    fields = set(Row.__dataclass_fields__)
    return [
        Row(**{k: kinds[k](**v) if k in kinds and v else v for k, v in record.items() if k in fields})
        for record in file["rows"]
    ]


def best(rows: list[Row], shape: tuple[int, int, int], names: tuple[str, ...]) -> Row | None:
    """The fastest row, weights cold, of these contestants at a shape."""
    timed = [r for r in rows if (r.M, r.N, r.K) == shape and r.contestant in names and r.cold]
    return min(timed, key=lambda r: r.cold.median if r.cold else 0.0, default=None)


def verdict(speed: float, floor: float, aim: float) -> str:
    """In a word, how a speed stands to what was wanted."""
    return "aim reached" if speed >= aim else "floor reached" if speed >= floor else "missed"


def targets(race: list[Row], gemlite: list[Row], encode: dict[str, Any]) -> str:
    """Each regime with what was wanted and measured."""
    lines = ["| regime | baseline | floor / aim | measured | |", "| --- | --- | --- | --- | --- |"]

    def add(regime: str, baseline: str, floor: float, aim: float, speed: float) -> None:
        what = f"{floor:g}x / {aim:g}x"
        lines.append(f"| {regime} | {baseline} | {what} | {speed:.2f}x | {verdict(speed, floor, aim)} |")

    for regime, name, shape, floor, aim in TARGETS:
        row = best(race, shape, (name,))
        if row and row.cold_speed:
            add(regime, "cuBLAS, 16-bit", floor, aim, row.cold_speed)
    for ours, theirs, shape, floor, aim in (
        ("tritern int8", "gemlite A8W158", (1024, 4096, 4096), 2.0, 3.0),
        ("tritern bf16", "gemlite A16W158", (1, 4096, 4096), 1.2, 1.5),
    ):
        a, b = (best(gemlite, shape, (name,)) for name in (ours, theirs))
        if a and b and a.cold and b.cold:
            regime = f"M = {shape[0]}, N = K = 4096, {ours.removeprefix('tritern ')}"
            add(regime, theirs, floor, aim, b.cold.median / a.cold.median)
    for row in encode["linears"][1:]:
        bits = "16-bit" if "16" in row["arm"] else "int8"
        regime = f"{row['layers']} linears of {row['model']} in one CUDA graph, M = 16, {bits}"
        add(regime, "cuBLAS, bf16", 2.0, 3.0, row["speed"])
    for name, linears, model in SMALLER:
        sizes = load("memory.json")["rows"][name]
        for part, wanted in (("linears", linears), ("model", model)):
            before, after = sizes[part]
            what = "weights of the linears" if part == "linears" else "the model, embeddings in int8"
            regime = f"{name}, {what}: {before / 1e6:.1f} -> {after / 1e6:.1f} MB"
            add(regime, "fp16", wanted, wanted, before / after)
    return "\n".join(lines)


def fastest(encode: dict[str, Any]) -> dict[str, dict[int, tuple[dict[str, Any], dict[str, Any]]]]:
    """Of each model and number of texts the fastest row in fp16 or bf16, and the fastest ternary one."""
    timed = [r for r in encode["rows"] if "p50_ms" in r and r["arm"] != "fp32"]
    found: dict[str, dict[int, tuple[dict[str, Any], dict[str, Any]]]] = {}
    for name, texts in dict.fromkeys((r["model"], r["texts"]) for r in timed):
        rows = sorted(
            (r for r in timed if (r["model"], r["texts"]) == (name, texts)), key=lambda r: r["p50_ms"]
        )
        ternary = [r for r in rows if r["arm"].startswith("ternary")]
        dense = [r for r in rows if not r["arm"].startswith("ternary")]
        found.setdefault(name, {})[texts] = dense[0], ternary[0]
    return found


def shapes(race: list[Row], others: list[Row]) -> str:
    """Speeds of all contestants at all shapes, weights cold and hot; of ``others`` what the race lacks."""
    names = [n for n in SHOWN if any(r.contestant == n and r.cold for r in (*race, *others))]
    lines = ["| M, N, K | cuBLAS us | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names)]
    timed = {(r.M, r.N, r.K, r.contestant) for r in race if r.cold}
    everything = [r for r in others if (r.M, r.N, r.K, r.contestant) not in timed]
    everything += [r for r in race if r.cold]
    for shape in sorted({(r.M, r.N, r.K) for r in everything}):
        base = best(everything, shape, ("F.linear bf16", "F.linear fp16"))
        found = {r.contestant: r for r in everything if (r.M, r.N, r.K) == shape}
        cells = [_cell(found.get(name)) for name in names]
        time = f"{base.cold.median:.1f}" if base and base.cold else "-"
        lines.append(f"| {', '.join(map(str, shape))} | {time} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Row | None) -> str:
    if row is None or not (row.cold_speed and row.hot_speed):
        return "-"
    return f"{row.cold_speed:.2f} ({row.hot_speed:.2f})"


def models(encode: dict[str, Any]) -> str:
    """Whole models: milliseconds of a forward pass of each arm and kind, and the fastest against the fastest.

    A speed stands in brackets and has no verdict where fp16 was not measured compiled.
    """
    arms = {"fp16": KINDS, "ternary": KINDS, "ternary fused": KINDS[:2]}
    lines = [
        f"| model | texts | {' | '.join(f'{arm}, ms' for arm in arms)} | fastest against fastest | |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    rows = {(r["model"], r["texts"], r["arm"], r["kind"]): r.get("p50_ms") for r in encode["rows"]}
    for name, found in fastest(encode).items():
        layers = encode["models"][name]
        note = f" ({layers['layers']} of {layers['of']} blocks)" if "of" in layers else ""
        for texts, (dense, ternary) in found.items():
            cells = []
            for arm, kinds in arms.items():
                times = [rows.get((name, texts, arm, kind)) for kind in kinds]
                cells.append(" / ".join(f"{ms:.2f}" if ms else "-" for ms in times))
            speed = dense["p50_ms"] / ternary["p50_ms"]
            complete = rows.get((name, texts, "fp16", "compiled"))
            cells.append(f"{speed:.2f}x" if complete else f"({speed:.2f}x)")
            cells.append(verdict(speed, *WANTED) if complete else "")
            held = f", {dense['held_mb']:.0f} -> {ternary['held_mb']:.0f} MB" if texts == 1 else ""
            lines.append(f"| {name}{note}{held} | {texts} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def block() -> str:
    """All tables of an H200."""
    race, few, encode = _measured()
    roofs = race["roofs"]
    facts = (
        f"{race['gpu']}, driver {race['driver']}, torch {race['torch']}, triton {race['triton']}, "
        f"{race['date'][:10]}, commit {race['commit'][:7]}; reads and writes {roofs['copy_tb_s']:.2f} TB/s, "
        f"multiplies bf16 at {roofs['bf16_tflops']:.0f} TFLOP/s, both measured."
    )
    rows = rows_of(race)
    return (
        "\n\n".join([facts, targets(rows, few, encode), SPEEDS, shapes(rows, few), MODELS, models(encode)])
        + "\n"
    )


def _measured() -> tuple[dict[str, Any], list[Row], dict[str, Any]]:
    """The race; rows of other contestants, measured apart; whole models."""
    race, gemlite, few, encode, compiled = (
        load(f"h200-{name}.json") for name in ("gemm", "gemlite", "gemm-few", "encode", "encode-compiled")
    )
    others = rows_of(few)
    retimed = {(r.M, r.N, r.K) for r in others}
    others += [r for r in rows_of(gemlite) if (r.M, r.N, r.K) not in retimed]
    encode["rows"] += compiled["rows"]
    return race, others, encode


def speed() -> str:
    """Six rows for somebody in a hurry: layers, whole models, a CPU; like against like."""
    race, _, encode = _measured()
    lines = ["| | 16 bits | ternary, int8 activations | times as fast |", "| --- | --- | --- | --- |"]

    def add(what: str, unit: str, before: float, after: float, ratio: float) -> None:
        lines.append(f"| {what} | {before:.3g} {unit} | {after:.3g} {unit} | {ratio:.2f}x |")

    for M, N, K in ((16, 12288, 4096), (8192, 1536, 384)):
        rows = rows_of(race)
        base, ours = (
            best(rows, (M, N, K), c) for c in (("F.linear bf16", "F.linear fp16"), ("tritern int8",))
        )
        assert base and ours and base.cold and ours.cold
        before, after = base.cold.median, ours.cold.median
        what = f"GPU: one layer, weights cold, {M:,} tokens, {N:,} x {K:,}, cuBLAS"
        add(what, "us", before, after, before / after)
    times = {(r["model"], r["texts"], r["arm"], r["kind"]): r.get("p50_ms") for r in encode["rows"]}
    for what, model, texts, kind in (
        ("bge-base, one query of 16 tokens, fp16 not compiled", "bge-base", 1, "graph"),
        ("bge-base, 256 texts of 128 tokens, fp16 compiled", "bge-base", 256, "compiled graph"),
        ("MiniLM, 256 texts of 128 tokens, fp16 compiled", "minilm", 256, "compiled graph"),
    ):
        before = times[model, texts, "fp16", kind]
        after = times[model, texts, "ternary fused", "graph"]
        assert before and after
        add(f"GPU: {what}; both CUDA graphs", "ms", before, after, before / after)
    cpu = load("cpu-encode.json")["rows"]
    before, after = (cpu[arm]["sentences_per_second"] for arm in ("fp32", "ternary int8"))
    add("CPU: MiniLM, two cores (float32)", "texts/s", before, after, cpu["ternary int8"]["speed"])
    return "\n".join(lines) + "\n"
