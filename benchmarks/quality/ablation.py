"""What each part of the distillation recipe is worth, on one small fixed budget.

    python benchmarks/quality/ablation.py --data DIR [--steps 80] [--arms NAME ...] [--json FILE]

DIR holds train/sentences.txt.zst, sts/stsb/dev.jsonl.gz, sts/sickr/train.jsonl.gz and
retrieval/scifact/corpus.jsonl.gz. Every arm distils the same model on the same texts in the same order and
changes one thing of the recipe; arms of another seed, which draws other batches, show how much is chance.
No test split is used: Spearman x 100 on STS-B dev and on 2,500 pairs of SICK-R train (its dev split is too
small to tell arms apart; nothing is trained on these sets), and the share of the teacher's ten nearest
neighbours kept, on sentences held out and on abstracts.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # the benchmarks folder

import report
from models.encode import packaged_model

HELD_OUT = 400
OFF = {f"{name}_weight": 0.0 for name in ("cosine", "similarity", "hidden", "last_hidden")}
ARMS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "seed 1, else the defaults": {"seed": 1},
    "seed 2, else the defaults": {"seed": 2},
    "loss: hidden x 0.1": {"hidden_weight": 0.3},
    "loss: hidden x 1/3": {"hidden_weight": 1.0},
    "loss: hidden x 3": {"hidden_weight": 9.0},
    "loss: similarity x 3": {"similarity_weight": 0.6},
    "no blend": {"blend_ratio": 0.0},
    "blend over 15 %": {"blend_ratio": 0.15},
    "blend over 60 %": {"blend_ratio": 0.6},
    "learning rate x 0.5": {"learning_rate": 2.5e-4},
    "learning rate x 2": {"learning_rate": 1e-3},
    "loss: cosine alone": {**OFF, "cosine_weight": 1.0},
    "loss: similarity alone": {**OFF, "similarity_weight": 1.0},
    "loss: hidden alone": {**OFF, "hidden_weight": 1.0},
    "loss: last hidden alone": {**OFF, "last_hidden_weight": 1.0},
    "scale: MSE-optimal, renewed each step": {"learn_scale": False},
    "scale: TWN, renewed each step": {"learn_scale": False, "rule": "twn"},
    "scale: absmean, renewed each step": {"learn_scale": False, "rule": "absmean"},
    "scale: TWN start, learned": {"rule": "twn"},
    "scale: no clip": {"clip": 1e9},
    "activations 16-bit": {"activation_bits": 16},
    "embeddings 16-bit": {"embedding_bits": 16},
    "embeddings not trained": {"train_embeddings": False},
    "embeddings int8, rounded at the end": {"train_rounded_embeddings": False},
    "no texts joined": {"joined_ratio": 0.0},
    "texts joined: 15 %": {"joined_ratio": 0.15},
    "batches of mixed length": {"group_by_length": False},
    "step of one batch": {"gradient_accumulation_steps": 1},
    "step of 4 batches": {"gradient_accumulation_steps": 4},
}


def judges(data: Path, teacher: Any, held: list[str]) -> dict[str, Any]:
    """Functions of a model, by the name of their column."""
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    import tritern

    found: dict[str, Any] = {}
    for name, file in (("STS-B dev", "stsb/dev"), ("SICK-R train", "sickr/train")):
        rows = read(data / f"sts/{file}.jsonl.gz")[:2500]
        columns = [[r[key] for r in rows] for key in ("sentence1", "sentence2", "score")]
        judge = EmbeddingSimilarityEvaluator(*columns, batch_size=64, name="s")
        found[name] = lambda m, j=judge: 100 * j(m)["s_spearman_cosine"]
    abstracts = [r["text"] for r in read(data / "retrieval/scifact/corpus.jsonl.gz")[:250]]
    for name, texts in (("sentences", held), ("abstracts", abstracts)):
        vectors = teacher.encode(texts, show_progress_bar=False)
        found[f"top-10 {name}"] = lambda m, t=texts, v=vectors: 100 * tritern.evaluate(m, v, t).overlap
    return found


def read(file: Path) -> list[dict[str, Any]]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def recipe() -> dict[str, Any]:
    """The default settings that the arms change."""
    from tritern import TernaryConfig
    from tritern.distillation import TernaryDistillationArguments
    from tritern.distillation.data import JOINED_RATIO

    own = vars(TernaryDistillationArguments)["__annotations__"]
    found = {f.name: f.default for f in fields(TernaryDistillationArguments) if f.name in {*own, "seed"}}
    return found | asdict(TernaryConfig(embedding_bits=8)) | {"joined_ratio": JOINED_RATIO}


def distilled(path: str, texts: list[str], steps: int, batch_size: int, changes: dict[str, Any]) -> Any:
    """The packed model after ``steps`` of the default recipe with these changes."""
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer

    from tritern import TernaryConfig
    from tritern.distillation import TernaryDistillationArguments, TernaryDistiller
    from tritern.distillation.data import JOINED_RATIO, joined

    changes = dict(changes)
    ternary = {f.name: changes.pop(f.name) for f in fields(TernaryConfig) if f.name in changes}
    texts = joined(texts, changes.pop("joined_ratio", JOINED_RATIO))
    with tempfile.TemporaryDirectory() as folder:
        shared = {"output_dir": folder, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        shared |= {"max_steps": steps, "logging_strategy": "no"}
        parts = changes.get(
            "gradient_accumulation_steps", TernaryDistillationArguments.gradient_accumulation_steps
        )
        shared["per_device_train_batch_size"] = batch_size // parts
        trainer = TernaryDistiller(
            SentenceTransformer(path),
            TernaryDistillationArguments(**shared, **changes),  # pyright: ignore[reportArgumentType]
            Dataset.from_dict({"text": texts}),
            config=TernaryConfig(**{"embedding_bits": 8, **ternary}),
        )
        trainer.train()
    return trainer.pack().eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", help="hub name or path; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--steps", type=int, default=80, help="steps of every arm (default: 80)")
    parser.add_argument("--batch-size", type=int, default=64, help="texts of a step (default: 64)")
    parser.add_argument(
        "--arms", nargs="+", metavar="NAME", help="only arms whose name starts with one of these"
    )
    parser.add_argument("--json", type=Path, help="write results here; arms already in it are not run again")
    options = parser.parse_args()
    path = options.model or packaged_model()
    arms = {n: c for n, c in ARMS.items() if not options.arms or any(n.startswith(a) for a in options.arms)}
    if not arms:
        parser.error(f"--arms {' '.join(options.arms)} match none of: {'; '.join(ARMS)}")

    from sentence_transformers import SentenceTransformer

    from tritern.distillation import read_texts

    wanted = HELD_OUT + options.steps * options.batch_size * 2  # joined texts use up more than one
    texts = read_texts(options.data / "train/sentences.txt.zst", limit=wanted)
    teacher = SentenceTransformer(path)
    columns = judges(options.data, teacher, texts[:HELD_OUT])
    budget = {"steps": options.steps, "batch_size": options.batch_size, "model": options.model}
    rows: dict[str, dict[str, float]] = {}
    if options.json and options.json.exists():
        kept = json.loads(options.json.read_text())
        changed = [n for n in kept["rows"] if n != "teacher" and kept["changes"][n] != ARMS.get(n)]
        if changed or (kept["budget"], kept["defaults"]) != (budget, json.loads(json.dumps(recipe()))):
            parser.error(
                f"{options.json} was measured with another budget, model, defaults or arms: name a new file"
            )
        rows = kept["rows"]
    print(f"{'':40s}" + "".join(f"{name:>18s}" for name in columns) + f"{'train s':>10s}")

    def judge(name: str, model: Any, seconds: float) -> None:
        rows[name] = {column: float(f(model)) for column, f in columns.items()} | {"train s": seconds}
        values = list(rows[name].values())
        print(f"{name:40s}" + "".join(f"{v:18.2f}" for v in values[:-1]) + f"{seconds:10.0f}", flush=True)
        if options.json:
            result = {"environment": report.environment(), "defaults": recipe(), "budget": budget}
            result["changes"] = {arm: ARMS.get(arm) for arm in rows}
            report.write_json(options.json, result | {"rows": rows})

    if "teacher" not in rows:
        judge("teacher", teacher, 0.0)
    for name, changes in arms.items():
        if name in rows:
            continue
        start = time.perf_counter()
        model = distilled(path, texts[HELD_OUT:], options.steps, options.batch_size, changes)
        judge(name, model, time.perf_counter() - start)


if __name__ == "__main__":
    main()
