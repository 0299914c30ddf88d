"""Arguments of ``quickstart.py``."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from .passages import MIN_TEXTS

SHIPPED = "minilm-l6-ternary"
LIMIT = {"cpu": 6000, "cuda": 20000}
STEPS = {"cpu": 80, "cuda": 300}
"""Of distillation, 64 texts each."""
SECONDS = 40
"""The models embed passages for this long at most, unless --limit is given."""
EXAMPLES = """examples:
  quickstart.py --query "sort a list" --query "open a socket"      your questions to Python's docstrings
  quickstart.py --texts notes.txt --query "what did we decide?"    your own texts
  quickstart.py --model BAAI/bge-small-en-v1.5                     make another model ternary, from the hub"""


def parse(description: str | None) -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, epilog=EXAMPLES, formatter_class=form)
    add = parser.add_argument
    add("--model", metavar="NAME", help="make this sentence-transformers model ternary: hub name or folder")
    add("--texts", metavar="FILE", type=Path, help="passages, one a line, in UTF-8 (default: docstrings)")
    add("--query", metavar="TEXT", action="append", help="what to search for; may be repeated")
    add(
        "--limit",
        metavar="N",
        type=int,
        help=f"most passages (default: {LIMIT['cpu']}, or {SECONDS} s of them)",
    )
    add("--rule", choices=("mse", "absmean", "twn"), help="with --model: of rounding weights (default: mse)")
    add(
        "--activation-bits",
        type=int,
        choices=(8, 16),
        help="with --model: 8: int8 (default); 16: as they are",
    )
    add("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    add("--steps", metavar="N", type=int, help=f"of distillation (default: {STEPS['cpu']} on a CPU)")
    add("--output", metavar="DIR", type=Path, help="new folder to save in (default: a temporary one, kept)")
    add("--seed", metavar="N", type=int, default=0, help="chooses and orders the passages (default: 0)")
    args = parser.parse_args()
    if args.limit is not None and args.limit < MIN_TEXTS:
        parser.error(f"--limit must be at least {MIN_TEXTS}; received {args.limit}")
    if args.steps is not None and args.steps < 1:
        parser.error(f"--steps must be at least 1; received {args.steps}")
    if not args.model and (args.rule or args.activation_bits):
        parser.error(f"--rule and --activation-bits go with --model; {SHIPPED} is ternary already")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", args.device or "cpu"):
        parser.error(f"--device must be cpu, cuda or cuda:N; received {args.device}")
    try:
        if args.output and (args.output.mkdir(parents=True, exist_ok=True) or any(args.output.iterdir())):
            parser.error(f"--output {args.output} is not empty; name a new folder")
    except OSError as error:
        parser.error(f"--output {args.output} cannot be made: {error.strerror}")
    return args
