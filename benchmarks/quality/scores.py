"""How much of a teacher's quality its ternary models keep, on labelled data.

    python benchmarks/quality/scores.py --data DIR --ternary distilled=FOLDER --json quality.json
    python benchmarks/quality/scores.py --mteb STSBenchmark SciFact   tasks of the mteb package, from the hub

Rows: the teacher, 'patched, RULE' for each of --rules (no training), with --calibrate 'calibrated, RULE' too,
'rounded, FORMAT' for each of --rounded, and each saved model named by --ternary.
Columns, all x 100: Spearman's correlation on STS sets, nDCG@10 with graded gains on retrieval sets, accuracy
of a logistic regression on classification sets, v-measure of k-means on clustering sets; then the mean of
each task, the mean of those means (overall) and the mean of all sets. Retention is the percentage of the
teacher's figure, with the 95 % intervals of a bootstrap over pairs, queries and texts: what other items of
the same sets might give, not what another training run might.
Fidelity is agreement with the teacher's vectors, by tritern.evaluate on texts drawn from the sets.

DIR is for measuring only: the scores are of test splits, so choose nothing by them; to choose between models,
--development scores them on other splits. benchmarks/quality/eval_sets.py describes the layout. Sets that are
not there are left out.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import numpy as np
import report
from models.encode import packaged_model
from quality import eval_sets
from quality.eval_sets import Encoder, EvalSet
from quality.retention import draws, intervals, means, retention
from quality.rounding import FORMATS, load_gguf, round_weights, weight_bytes

FIDELITY_TEXTS = 2000
MIN_FIDELITY_TEXTS = 12
CALIBRATION_JOINED = 0.3
"""Share of the calibration texts that are several lines of the file in one."""
FIDELITY = ("cosine", "cosine_p5", "overlap", "rank_correlation")


def arguments() -> argparse.ArgumentParser:
    from tritern_kernels.reference import RULES

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of labelled sets; test splits are used"
    )
    source.add_argument(
        "--mteb", nargs="+", metavar="TASK", help="tasks of the mteb package (pip install mteb)"
    )
    parser.add_argument(
        "--development", action="store_true", help="score splits to choose by, of the sets that have one"
    )
    parser.add_argument("--model", help="hub name or path; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument(
        "--ternary",
        nargs="+",
        action="extend",
        default=[],
        type=_labelled,
        metavar="LABEL=PATH",
        help="saved ternary models; PATH may be minilm-l6-ternary, which comes with tritern",
    )
    parser.add_argument(
        "--rules", nargs="*", default=["mse"], choices=RULES, help="patch by these rules (default: mse)"
    )
    parser.add_argument(
        "--rounded",
        nargs="+",
        default=[],
        choices=FORMATS,
        help="the teacher with its weights in these formats of llama.cpp (pip install gguf)",
    )
    parser.add_argument(
        "--calibrate",
        type=Path,
        metavar="FILE",
        help="patch with calibration_texts too, from this file of texts (.txt, .jsonl, .csv, .parquet)",
    )
    parser.add_argument(
        "--calibration-texts",
        type=int,
        default=512,
        metavar="N",
        help="from the head of FILE; 30 %% of them are several lines joined (default: 512)",
    )
    parser.add_argument(
        "--embedding-bits", type=int, default=8, choices=(4, 8, 16), help="of patched models (default: 8)"
    )
    parser.add_argument(
        "--activation-bits",
        type=int,
        choices=(8, 16),
        help="default: 8 for patched models, saved ones as saved",
    )
    parser.add_argument("--tasks", nargs="+", choices=[*eval_sets.TASKS, "fidelity"], help="default: all")
    parser.add_argument("--sets", nargs="+", choices=eval_sets.SETS, help="default: all that DIR holds")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        help="keep vectors here for later runs; empty it when code changed",
    )
    parser.add_argument("--json", type=Path, help="write the results to this file, as they come")
    parser.add_argument("--figure", type=Path, metavar="FILE.png", help="draw the retention per set")
    parser.add_argument(
        "--update-cards",
        action="store_true",
        help="write the scores into the model cards of --ternary models",
    )
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--device", help="cuda or cpu; default: cuda if there is one")
    return parser


def _labelled(text: str) -> tuple[str, str]:
    from tritern.pretrained import resolve

    label, _, path = text.partition("=")
    refused = f"must be LABEL=PATH with a saved model's folder; received {text!r}"
    try:
        path = resolve(path)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{refused}: {error}") from None
    if not (label and Path(path).is_dir()):
        raise argparse.ArgumentTypeError(refused)
    return label, path


def find_sets(options: argparse.Namespace) -> tuple[list[EvalSet], list[str]]:
    """The sets to score, and the texts to compare vectors on.

    Raises:
        ValueError: unusable data, or none.
        ModuleNotFoundError: mteb is wanted and not installed.
    """
    if options.mteb:
        return eval_sets.mteb_tasks(options.mteb, options.batch_size), []
    wanted = options.tasks or [*eval_sets.TASKS, "fidelity"]
    names = [
        n for n in options.sets or eval_sets.SETS if wanted == ["fidelity"] or eval_sets.SETS[n][0] in wanted
    ]
    found, absent = eval_sets.load(options.data, names, options.development)
    if not found:
        raise ValueError(
            f"{options.data} holds none of the sets {', '.join(names) or '(no set has these --tasks)'}; "
            "benchmarks/quality/eval_sets.py describes the layout"
        )
    if absent:
        print(f"left out, not in {options.data}: {', '.join(absent)}")
    texts = eval_sets.sample(found, FIDELITY_TEXTS) if "fidelity" in wanted else []
    if 0 < len(texts) < MIN_FIDELITY_TEXTS:
        raise ValueError(
            f"fidelity needs {MIN_FIDELITY_TEXTS} different texts and the sets hold {len(texts)}: "
            "use more sets, or --tasks without fidelity"
        )
    return [s for s in found if s.task in wanted], texts


@dataclass(frozen=True)
class Arm:
    """A row of the table: a model as saved or, with a rule, patched, or with a format, rounded."""

    path: str
    rule: str | None = None
    calibrated: bool = False
    rounded: str | None = None


def load_model(arm: Arm, options: argparse.Namespace, texts: Sequence[str] | None) -> tuple[Any, int]:
    """The arm's model and the bytes of its tensors; ``texts`` are those to calibrate on."""
    from sentence_transformers import SentenceTransformer

    import tritern

    model, bits = SentenceTransformer(arm.path, device=options.device), options.activation_bits
    if arm.rule:
        settings = {"rule": arm.rule, "activation_bits": bits, "embedding_bits": options.embedding_bits}
        tritern.patch(model, calibration_texts=texts if arm.calibrated else None, **settings)
    size = round_weights(model, arm.rounded) if arm.rounded else weight_bytes(model)
    for module in model.modules():
        if bits and isinstance(module, tritern.TernaryLinear):
            module.activation_bits = bits
    return model, size


def read_calibration_texts(options: argparse.Namespace) -> list[str] | None:
    """The texts of --calibrate, if it is given, some joined: lines are shorter than most documents."""
    from tritern.distillation import read_texts
    from tritern.distillation.data import joined

    if not options.calibrate:
        return None
    lines = read_texts(options.calibrate, limit=4 * options.calibration_texts)
    return joined(lines, CALIBRATION_JOINED)[: options.calibration_texts]


def line(label: str, values: Mapping[str, float], columns: Sequence[str]) -> str:
    cells = (f"{values[c]:.2f}" if np.isfinite(values.get(c, np.nan)) else "-" for c in columns)
    return f"{label:24s}" + "".join(f"{cell:>{max(8, len(c) + 2)}s}" for c, cell in zip(columns, cells))


def heading(title: str, columns: Sequence[str]) -> str:
    return f"{title:24s}" + "".join(f"{c:>{max(8, len(c) + 2)}s}" for c in columns)


def draw(rows: Mapping[str, Mapping[str, Any]], columns: Sequence[str], teacher: str, path: Path) -> None:
    """Retention as grouped bars: a group for each set and mean, a bar for each model but the teacher."""
    pyplot = report.load_pyplot()
    figure, axes = pyplot.subplots(figsize=(max(8, 0.9 * len(columns)), 5))
    shown = {label: row["retention"] for label, row in rows.items() if label != "teacher"}
    width = 0.8 / max(1, len(shown))
    for i, (label, kept) in enumerate(shown.items()):
        places = np.arange(len(columns)) + (i - (len(shown) - 1) / 2) * width
        bars = axes.bar(places, [kept[c] for c in columns], width, label=label, color=f"C{i % 10}")
        axes.bar_label(bars, fmt="%.0f", fontsize=7)
    axes.axhline(100, color="black", linewidth=1, label=f"teacher: {teacher}")
    names = [c if c in rows["teacher"]["scores"] else f"mean: {c}" for c in columns]
    axes.set_xticks(range(len(columns)), names, rotation=35, ha="right")
    axes.set_ylabel("retention, % of the teacher's score")
    axes.set_title("Quality kept by ternary models")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def update_card(folder: Path, name: str, teacher: Mapping[str, float], row: Mapping[str, Any]) -> None:
    """Put a model's scores beside those of its teacher into its README.md, in place of old ones."""
    card, title = folder / "README.md", "## Scores"
    text = card.read_text(encoding="utf-8") if card.exists() else ""
    text = re.sub(rf"{title}\n.*?(?=\n## |\Z)", "", text, flags=re.DOTALL).rstrip()
    kept, within = row["retention"], row.get("intervals", {})
    lines = []
    for k, value in (row["scores"] | row["means"]).items():
        low_high = " to ".join(f"{v:.1f}" for v in within.get(k, ()) if np.isfinite(v)) or "-"
        lines.append(f"| {k} | {teacher[k]:.2f} | {value:.2f} | {kept[k]:.1f} % | {low_high} |")
    text += f"""

{title}

x 100, on test splits, beside {name}; the share kept, and its 95 % interval by a bootstrap over the items of
each set (`benchmarks/quality/scores.py`):

| | teacher | this model | kept | interval |
|---|---|---|---|---|
"""
    card.write_text(text.lstrip() + "\n".join(lines) + "\n", encoding="utf-8")


class Table:
    """The rows measured so far; every figure goes to the JSON file as it comes."""

    def __init__(
        self, sets: list[EvalSet], texts: list[str], info: dict[str, Any], json: Path | None
    ) -> None:
        self.sets, self.texts, self.info, self.json = sets, texts, info, json
        self.tasks = {s.name: s.task for s in sets}
        self.columns = [*self.tasks, *means(dict.fromkeys(self.tasks, 0.0), self.tasks)]
        self.rows: dict[str, dict[str, Any]] = {}
        self._teacher_vectors = np.empty(0)
        self._teacher_draws: dict[str, np.ndarray] = {}

    def measure(self, label: str, encoder: Encoder, **details: Any) -> None:
        """Fill a row; the first is the teacher's."""
        import tritern

        start = time.perf_counter()
        row = self.rows[label] = {**details, "scores": {}}
        results = {}
        for one in self.sets:
            results[one.name] = one.measure(encoder)
            row["scores"][one.name] = 100 * results[one.name].total()
            self.save()
        row["means"] = means(row["scores"], self.tasks)
        figures, teacher = row["scores"] | row["means"], self.rows["teacher"]
        row["retention"] = retention(figures, teacher["scores"] | teacher["means"])
        if all(items.count for items in results.values()):
            found = draws(results)
            if label == "teacher":
                self._teacher_draws = found
            else:
                row["intervals"] = intervals(found, self._teacher_draws, self.tasks)
        if self.texts and label == "teacher":
            self._teacher_vectors = encoder.encode(self.texts)
        elif self.texts:
            found = tritern.evaluate(encoder, self._teacher_vectors, self.texts)  # pyright: ignore[reportArgumentType]
            row["fidelity"] = {k: v if k in ("k", "texts") else 100 * v for k, v in asdict(found).items()}
        row |= {"seconds": time.perf_counter() - start, "texts_from_cache": encoder.from_cache}
        self.save()
        if self.sets:
            print(line(label, figures, self.columns), f"{row['seconds']:8.0f} s", flush=True)

    def save(self) -> None:
        """Write the JSON file, where one is wanted."""
        if self.json:
            report.write_json(self.json, {"environment": self.info, "tasks": self.tasks, "rows": self.rows})

    def print_relations(self) -> None:
        """Retention with its intervals, and fidelity, of every row but the teacher's."""
        for key, columns in (("retention", self.columns), ("fidelity", FIDELITY)):
            others = {k: row for k, row in self.rows.items() if k != "teacher" and row.get(key)}
            if others:
                print("\n" + heading(f"{key}, %", columns))
            for label, row in others.items():
                print(line(label, row[key], columns))
                for i, end in enumerate(("from", "to") if key == "retention" and "intervals" in row else ()):
                    print(line(f"  95 %, {end}", {k: v[i] for k, v in row["intervals"].items()}, columns))


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if options.mteb:
        os.environ.setdefault("HF_HUB_OFFLINE", "0")  # which the packaged model would set to 1
    teacher = options.model or packaged_model()
    rows = [("teacher", Arm(teacher))] + [(f"patched, {r}", Arm(teacher, r)) for r in options.rules]
    if options.calibrate:
        rows += [(f"calibrated, {r}", Arm(teacher, r, calibrated=True)) for r in options.rules]
    rows += [(f"rounded, {f}", Arm(teacher, rounded=f)) for f in options.rounded]
    rows += [(label, Arm(path)) for label, path in options.ternary]
    arms: dict[str, Arm] = {}
    for label, arm in rows:
        if label in arms:
            parser.error(f"two rows would be called {label!r}: give every --ternary model its own LABEL")
        arms[label] = arm
    if options.mteb and (options.tasks or options.sets or options.cache):
        parser.error("--tasks, --sets and --cache go with --data, not with --mteb")
    if options.development and (options.mteb or options.update_cards):
        parser.error("--development goes with --data, and its scores into no model card")
    try:
        if options.figure:
            report.load_pyplot()
        if options.rounded:
            load_gguf()
        sets, texts = find_sets(options)
        calibration_texts = read_calibration_texts(options)
    except (ValueError, ModuleNotFoundError) as error:
        sys.exit(str(error))

    import sentence_transformers

    name = options.model or "all-MiniLM-L6-v2"
    info = report.environment() | {
        "model": name,
        "sentence_transformers": sentence_transformers.__version__,
        "mteb": version("mteb") if options.mteb else None,
        "splits": "development" if options.development else "test",
    }
    table = Table(sets, texts, info, options.json)
    if sets:
        print(heading("score x 100", table.columns))
    for label, arm in arms.items():
        path, start = arm.path, time.perf_counter()
        model, size = load_model(arm, options, calibration_texts)
        info["device"] = str(model.device.type)
        details: dict[str, Any] = {"bytes": size}
        if arm.calibrated:
            details["calibration_texts"] = len(calibration_texts or [])
            details["calibration_seconds"] = time.perf_counter() - start
        if label in dict(options.ternary):
            files = [f.relative_to(path) for f in Path(path).rglob("*") if f.is_file()]
            own = [f for f in files if not f.parts[0].startswith("checkpoint-")]
            details["bytes_on_disk"] = sum((Path(path) / f).stat().st_size for f in own)
        table.measure(label, Encoder(model, options.batch_size, options.cache), **details)
        if options.update_cards and label in dict(options.ternary) and sets:
            best = table.rows["teacher"]["scores"] | table.rows["teacher"]["means"]
            update_card(Path(path), name, best, table.rows[label])
    table.print_relations()
    if options.figure and sets:
        draw(table.rows, table.columns, name, options.figure)


if __name__ == "__main__":
    main()
