"""The command line of ``scores.py``."""

from __future__ import annotations

import argparse
from pathlib import Path

from quality import eval_sets
from quality.rounding import FORMATS


def arguments(description: str) -> argparse.ArgumentParser:
    """The options."""
    from tritern_kernels.reference import RULES

    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
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
        type=labelled,
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
        default=1024,
        metavar="N",
        help="from the head of FILE; 30 %% of them are several lines joined (default: 1024)",
    )
    parser.add_argument(
        "--calibration-folder",
        type=Path,
        metavar="DIR",
        help="keep calibrations here; a later run with the same texts and settings takes them",
    )
    parser.add_argument(
        "--bits",
        nargs="+",
        type=float,
        default=[2.0],
        metavar="B",
        help="bits of a weight in patched and calibrated models: 2, 4, or calibrated between (default: 2)",
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


def labelled(text: str) -> tuple[str, str]:
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
