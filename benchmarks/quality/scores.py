"""How much of a teacher's quality its ternary models keep, on labelled data.

    python benchmarks/quality/scores.py --data DIR --ternary distilled=FOLDER --json quality.json
    python benchmarks/quality/scores.py --mteb STSBenchmark SciFact   tasks of the mteb package, from the hub

Rows: the teacher, 'patched, RULE' for each of --rules (no training), with --calibrate 'calibrated, RULE' too,
both with ', B bits' for each of --bits but 2;
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
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import numpy as np
import report
from models.encode import packaged_model
from quality import eval_sets
from quality.encoder import Encoder
from quality.eval_sets import EvalSet
from quality.options import arguments
from quality.retention import draws, intervals, means, retention
from quality.rounding import load_gguf, round_weights, weight_bytes
from quality.shown import draw, heading, line, update_card

FIDELITY_TEXTS = 2000
MIN_FIDELITY_TEXTS = 12
CALIBRATION_JOINED = 0.3
"""Share of the calibration texts that are several lines of the file in one."""
FIDELITY = ("cosine", "cosine_p5", "overlap", "rank_correlation")


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
    bits: float = 2


def load_model(arm: Arm, options: argparse.Namespace, texts: Sequence[str] | None) -> tuple[Any, int]:
    """The arm's model and the bytes of its tensors; ``texts`` are those to calibrate on."""
    from sentence_transformers import SentenceTransformer

    import tritern

    model, bits = SentenceTransformer(arm.path, device=options.device), options.activation_bits
    if arm.rule:
        settings: dict[str, Any] = {"rule": arm.rule, "activation_bits": bits}
        settings["embedding_bits"] = options.embedding_bits
        settings |= {"weight_bits": int(arm.bits)} if arm.bits in (2, 4) else {"bits": arm.bits}
        if arm.calibrated:
            settings["calibration_texts"] = texts
            if options.calibration_folder:
                settings["calibration_folder"] = options.calibration_folder / f"{arm.rule}-{arm.bits:g}"
        tritern.patch(model, **settings)
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
    parser = arguments(__doc__ or "")
    options = parser.parse_args()
    if options.mteb:
        os.environ.setdefault("HF_HUB_OFFLINE", "0")  # which the packaged model would set to 1
    teacher = options.model or packaged_model()
    rows = [("teacher", Arm(teacher))]
    for bits in options.bits:
        more = "" if bits == 2 else f", {bits:g} bits"
        if bits in (2, 4):
            rows += [(f"patched, {r}{more}", Arm(teacher, r, bits=bits)) for r in options.rules]
        elif not options.calibrate:
            parser.error(f"--bits {bits:g} needs --calibrate: it chooses layers by what they lose on texts")
        if options.calibrate:
            arms_of = ((r, Arm(teacher, r, calibrated=True, bits=bits)) for r in options.rules)
            rows += [(f"calibrated, {r}{more}", arm) for r, arm in arms_of]
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
            details["process_peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
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
