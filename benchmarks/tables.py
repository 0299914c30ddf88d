"""The pages' tables of quality, search and speed, and a roofline, from ``benchmarks/results``.

python benchmarks/tables.py                     print them
python benchmarks/tables.py --write             write them into the pages, between their marks
python benchmarks/tables.py --plot benchmarks/results/h200-gemm.png
python benchmarks/tables.py --memory            weigh models again, into results/memory.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import report
from cases import Errors, Roofs, Row, Times, Tolerance
from search import markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SHIPPED = "minilm-l6-ternary"
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


def load(name: str) -> dict[str, Any]:
    """A result file."""
    return json.loads((RESULTS / name).read_text())


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
    """All tables as README shows them."""
    race, gemlite, few, encode, compiled = (
        load(f"h200-{name}.json") for name in ("gemm", "gemlite", "gemm-few", "encode", "encode-compiled")
    )
    a, b = rows_of(race), rows_of(few)
    retimed = {(r.M, r.N, r.K) for r in b}
    b += [r for r in rows_of(gemlite) if (r.M, r.N, r.K) not in retimed]
    encode["rows"] += compiled["rows"]
    roofs = race["roofs"]
    facts = (
        f"{race['gpu']}, driver {race['driver']}, torch {race['torch']}, triton {race['triton']}, "
        f"{race['date'][:10]}, commit {race['commit'][:7]}; reads and writes {roofs['copy_tb_s']:.2f} TB/s, "
        f"multiplies bf16 at {roofs['bf16_tflops']:.0f} TFLOP/s, both measured."
    )
    return "\n\n".join([facts, targets(a, b, encode), SPEEDS, shapes(a, b), MODELS, models(encode)]) + "\n"


def quality() -> str:
    """What the shipped model keeps, beside the teacher's weights rounded to other formats."""
    file = load("cpu-minilm-l6-ternary.json")
    columns = ["sts", "retrieval", "classification", "clustering", "all sets"]
    sets = [list(file["tasks"].values()).count(task) for task in columns[:-1]]
    titles = [f"{name} ({n})" for name, n in zip(columns, [*sets, len(file["tasks"])])]
    lines = [
        "| | MB | " + " | ".join(titles) + " | cosine |",
        "|" + " --- |" * (len(columns) + 3),
    ]
    for label, row in file["rows"].items():
        cells = []
        for name in columns:
            cell = f"{row['means'][name]:.2f}"
            low, high = row.get("intervals", {}).get(name, (None, None))
            if low is not None:
                cell += f", {row['retention'][name]:.1f} % ({low:.1f} to {high:.1f})"
            cells.append(cell)
        cosine = f"{row['fidelity']['cosine'] / 100:.3f}" if "fidelity" in row else "1"
        name = f"**{label}**" if label == SHIPPED else label
        lines.append(f"| {name} | {row['bytes'] / 1e6:.1f} | " + " | ".join(cells) + f" | {cosine} |")
    others = [name for name, task in file["tasks"].items() if task != "clustering"]
    ours, theirs = (sum(file["rows"][r]["scores"][n] for n in others) for r in (SHIPPED, "teacher"))
    lines += ["", f"All sets but clustering: {100 * ours / theirs:.1f} % kept by `{SHIPPED}`."]
    return "\n".join(lines) + "\n"


def development() -> str:
    """The splits that the shipped model and the bits of its table were chosen by."""
    file = load("cpu-minilm-l6-ternary-development.json")
    columns = [*file["tasks"], "sts", "retrieval", "all sets"]
    lines = ["| | MB | " + " | ".join(columns) + " |", "|" + " --- |" * (len(columns) + 2)]
    for label, row in file["rows"].items():
        cells = [f"{row['scores'][name]:.2f}" for name in file["tasks"]]
        for name in columns[len(cells) :]:
            cell = f"{row['means'][name]:.2f}"
            if "intervals" in row:
                low, high = row["intervals"][name]
                cell += f", {row['retention'][name]:.1f} % ({low:.1f} to {high:.1f})"
            cells.append(cell)
        lines.append(f"| {label} | {row['bytes'] / 1e6:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def search(file: str) -> str:
    """Search with the shipped model and the original, by ``embed_search.py`` or by ``ann.py``."""
    found, arm = load(file), f"{SHIPPED} int8"
    if "quality" in found:
        return markdown.means_table(found["quality"], arm) + "\n"
    return markdown.paper_table(found["rows"], arm) + "\n"


def encoding() -> str:
    """Whole models on a CPU, held to instruction sets."""
    lines = [
        "| instruction sets | | sentences/s | | one query, p50 | | memory held | at its peak |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for instructions, name in (("all", "cpu-encode.json"), ("AVX2 alone", "cpu-encode-avx2.json")):
        for arm, r in load(name)["rows"].items():
            if "reason" not in r:
                lines.append(
                    f"| {instructions} | {arm} | {r['sentences_per_second']:.1f} | {r['speed']:.2f}x | "
                    f"{r['query_p50_ms']:.1f} ms | {r['query_speed']:.2f}x | {r['held_mb']:.0f} MB | "
                    f"{r['peak_mb']:.0f} MB |"
                )
    return "\n".join(lines) + "\n"


def layers() -> str:
    """Linear layers on a CPU: times of float32, and how many times as fast ternary layers are and were."""
    now, before = (load(f"cpu-ops{name}.json")["instruction_sets"] for name in ("", "-before"))
    lines = ["| model | M, N, K |", "| --- | --- |"]
    for name in now:
        lines[0] += f" {'all' if name == 'native' else name}: float32, ms | int8 | 16-bit |"
        lines[1] += " --- | --- | --- |"
    for i, row in enumerate(now["native"]["rows"]):
        line = f"| {row['model']} | {row['M']}, {row['N']}, {row['K']} |"
        for name in now:
            r, was = now[name]["rows"][i], before[name]["rows"][i]
            line += f" {r['float32_ms']:.3f} |"
            for kind in ("int8", "16-bit"):
                line += f" {r[f'{kind}_speed']:.2f}x ({was[f'{kind}_speed']:.2f}x) |"
        lines.append(line)
    taken = [
        f"{'all' if name == 'native' else name}: {', '.join(found['products'].values())}"
        for name, found in now.items()
    ]
    return "\n".join([*lines, "", f"Products taken: {'; '.join(taken)}."]) + "\n"


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


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--write",
        type=Path,
        nargs="?",
        const=ROOT,
        metavar="CHECKOUT",
        help="write the tables into its pages",
    )
    parser.add_argument("--memory", action="store_true", help="weigh models again")
    parser.add_argument("--plot", type=Path, help="write the roofline to this PNG; needs matplotlib")
    options = parser.parse_args()
    if options.memory:
        report.write_json(RESULTS / "memory.json", weigh())
    readme, mode = "README.md", "docs/choosing-a-mode.md"
    blocks = {
        "quality": (readme, quality()),
        "search": (readme, search("cpu-embed-search.json")),
        "ann": (readme, search("cpu-ann.json")),
        "cpu": (readme, encoding()),
        "development": (mode, development()),
        "cpu-layers": (mode, layers()),
        "h200": (readme, block()),
    }
    for mark, (page, text) in blocks.items():
        if not options.write:
            print(text)
            continue
        file = options.write / page
        before, rest = file.read_text().split(f"<!-- {mark} -->\n", 1)
        after = rest.split(f"<!-- /{mark} -->\n", 1)[1]
        file.write_text(f"{before}<!-- {mark} -->\n{text}<!-- /{mark} -->\n{after}")
    if options.plot:
        race = load("h200-gemm.json")
        title = f"{race['gpu']}, {race['date'][:10]}"
        report.plot_roofline(rows_of(race), Roofs(**race["roofs"]), title, options.plot)


if __name__ == "__main__":
    main()
