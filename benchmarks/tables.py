"""The pages' tables of quality, search and speed, and a roofline, from ``benchmarks/results``.

python benchmarks/tables.py                     print them
python benchmarks/tables.py --write             write them into the pages, between their marks
python benchmarks/tables.py --plot benchmarks/results/h200-gemm.png
python benchmarks/tables.py --memory            weigh models again, into results/memory.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import report
from cases import Roofs
from gpu_tables import RESULTS, block, load, rows_of, speed, weigh
from search import report_tables

ROOT = Path(__file__).parents[1]
SHIPPED = "minilm-l6-ternary"


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
        name = (
            f"**{label}**" if label == SHIPPED else label.replace("teacher", "all-MiniLM-L6-v2, the original")
        )
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


def less_work() -> str:
    """What each way to a ternary MiniLM keeps, the cheapest first."""
    sets = ("STS-B", "SICK-R", "perspectrum", "cranfield", "medquad", "scifact")
    lines = [f"| | {' | '.join(sets)} | closeness: cosine, top-10 kept |", "|" + " --- |" * (len(sets) + 2)]
    for label, file, name in (
        ("the teacher, float32", "cpu-distilled.json", "teacher"),
        ("patched, not trained", "cpu-distilled.json", "patched, mse"),
        (
            "calibrated on 512 texts, 82 seconds, by an earlier version",
            "cpu-calibrated.json",
            "calibrated, mse",
        ),
        ("`minilm-l6-ternary`, 7.5 minutes on an H200", "cpu-minilm-l6-ternary.json", SHIPPED),
        ("distilled, 27 minutes on 2 CPU cores", "cpu-distilled.json", "distilled"),
        ("distilled, one batch of 64 a step, 23 minutes", "cpu-distilled-64.json", "distilled"),
    ):
        row, close = load(file)["rows"][name], ""
        cells = [f"{row['scores'][n]:.2f} ({row['retention'][n]:.1f} %)" for n in sets]
        if "fidelity" in row:
            close = f"{row['fidelity']['cosine'] / 100:.3f}, {row['fidelity']['overlap']:.1f} %"
        else:
            cells = [f"{row['scores'][n]:.2f}" for n in sets]
        lines.append(f"| {label} | {' | '.join(cells)} | {close} |")
    return "\n".join(lines) + "\n"


def untrained() -> str:
    """What models keep without training, by the bits of their weights."""
    arms = ["patched, mse", "calibrated, mse", "calibrated, mse, 2.5 bits", "patched, mse, 4 bits"]
    arms.append("calibrated, mse, 4 bits")
    lines = [
        "| | MB | development: STS-B | perspectrum | test: "
        + " | ".join(TEST_SETS)
        + " | cosine | calibration |",
        "|" + " --- |" * (len(TEST_SETS) + 6),
    ]
    for name, title in (("minilm", "all-MiniLM-L6-v2"), ("mpnet", "all-mpnet-base-v2")):
        chosen, tested = (load(f"cpu-untrained-{name}{end}.json")["rows"] for end in ("-development", ""))
        sets = [(chosen, n) for n in ("STS-B", "perspectrum")] + [(tested, n) for n in TEST_SETS]
        size = f"{tested['teacher']['bytes'] / 1e6:.1f}"
        scores = [f"{rows['teacher']['scores'].get(n, 0):.2f}".replace("0.00", "") for rows, n in sets]
        lines.append(f"| **{title}**, float32 | {size} | {' | '.join(scores)} | 1 | |")
        for arm in (a for a in arms if a in tested):
            row = tested[arm]
            cells = [_kept(rows[arm], n) for rows, n in sets]
            label = arm.replace(", mse", "") + ("" if "bits" in arm else ", 2 bits")
            close = f"{row['fidelity']['cosine'] / 100:.3f}"
            took = f"{seconds:.0f} s" if (seconds := chosen[arm].get("calibration_seconds")) else ""
            lines.append(f"| {label} | {row['bytes'] / 1e6:.1f} | {' | '.join(cells)} | {close} | {took} |")
    return "\n".join(lines) + "\n"


TEST_SETS = ("STS-B", "SICK-R", "perspectrum", "medquad")


def _kept(row: dict, name: str) -> str:
    if name not in row["scores"]:
        return ""
    low, high = row["intervals"][name]
    return f"{row['retention'][name]:.1f} % ({low:.1f} to {high:.1f})"


ARMS = {"fp32": "original, float32", "distilled int8": "ternary, int8 activations"}
ARMS["distilled 16-bit"] = "ternary, 16-bit activations"


def throughput() -> str:
    """Embedding and adding texts, by tritern.search and by hand."""
    lines = [
        "| | texts/s | by hand | ratio [p20 p80] | same ten neighbours |",
        "| --- | --- | --- | --- | --- |",
    ]
    found = {row["arm"]: row for row in load("cpu-embed-search-throughput.json")["throughput"]}
    for arm, label in ARMS.items():
        row, ratio = found[arm], found[arm]["ratio"]
        lines.append(
            f"| {label} | {row['texts_per_second']['median']:.1f} | {row['by_hand']['median']:.1f} | "
            f"{ratio['median']:.2f}x [{ratio['p20']:.2f} {ratio['p80']:.2f}] | "
            f"{100 * row['same_top10']:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def latency() -> str:
    """Milliseconds from queries to texts found, exactly, by the number of queries at once."""
    rows = [r for r in load("cpu-embed-search-speed.json")["latency"] if r["kind"] == "flat"]
    batches = sorted({r["batch"] for r in rows})
    lines = [f"| queries at once | {' | '.join(map(str, batches))} |", "|" + " --- |" * (len(batches) + 1)]
    for arm, label in ARMS.items():
        times = {r["batch"]: r["ms"]["total"]["median"] for r in rows if r["arm"] == arm}
        cells = [f"{times[b]:.1f}" if times[b] < 50 else f"{times[b]:,.0f}" for b in batches]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def ablation(file: str) -> str:
    """What changes of the distillation recipe do to four columns."""
    rows = load(file)["rows"]
    columns = [name for name in rows["teacher"] if name != "train s"]
    lines = [f"| | {' | '.join(columns)} | seconds |", "|" + " --- |" * (len(columns) + 2)]
    for name, row in rows.items():
        cells = [f"{row[column]:.2f}" for column in columns]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['train s']:.0f} |".replace(" 0 |", " |"))
    return "\n".join(lines) + "\n"


def search(file: str) -> str:
    """Search with the shipped model and the original, by ``embed_search.py`` or by ``ann.py``."""
    found, arm = load(file), f"{SHIPPED} int8"
    if "quality" in found:
        return report_tables.means_table(found["quality"], arm) + "\n"
    return report_tables.paper_table(found["rows"], arm) + "\n"


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
    readme, results, mode = "README.md", "benchmarks/results/README.md", "docs/choosing-a-mode.md"
    blocks = {
        "quality": (readme, quality()),
        "speed": (readme, speed()),
        "less-work": (results, less_work()),
        "untrained": (results, untrained()),
        "throughput": (results, throughput()),
        "latency": (results, latency()),
        "ablation": (results, ablation("cpu-ablation.json")),
        "ablation-320": (results, ablation("cpu-ablation-320.json")),
        "search": (results, search("cpu-embed-search.json")),
        "ann": (results, search("cpu-ann.json")),
        "cpu": (results, encoding()),
        "h200": (results, block()),
        "development": (mode, development()),
        "cpu-layers": (mode, layers()),
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
