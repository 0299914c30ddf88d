"""``tritern distill``."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import loading, options, reporting
from .convert import summary_data
from .options import ActivationBits, AsJson, Column, Model, Rule, Skip, Trust
from .reporting import Result

if TYPE_CHECKING:
    from tritern import Summary

EXAMPLES = """**Examples**

    tritern distill all-MiniLM-L6-v2 corpus.txt minilm-distilled
    tritern distill intfloat/e5-small-v2 abstracts.parquet e5-ternary --column abstract --bf16
    tritern distill BAAI/bge-small-en-v1.5 corpus.txt bge-distilled --max_steps 1000 --learning_rate 3e-4
    tritern distill minilm-l6-ternary corpus.txt minilm-adapted --teacher all-MiniLM-L6-v2
    torchrun --no-python --nproc-per-node 4 tritern distill intfloat/e5-base-v2 corpus.txt e5-base --bf16

After OUTPUT, every field of tritern.distillation.TernaryDistillationArguments is an option, too. It has all
fields of transformers.TrainingArguments and more; `tritern distill --help-all` lists them.

On a GPU use --bf16 and --per_device_train_batch_size 256. If memory runs out, lower it or --max_length.
On a CPU a step of 64 texts takes one or two seconds for a model of 22 million parameters."""


def _print_settings(wanted: bool) -> None:
    if wanted:
        from tritern.distillation.arguments import settings_parser

        parser = settings_parser()
        parser.usage = "tritern distill MODEL TEXTS OUTPUT [--SETTING VALUE]..."  # not all 150 of them
        typer.echo(parser.format_help())
        raise typer.Exit


def distill(
    context: typer.Context,
    model: Model,
    texts: Annotated[str, typer.Argument(metavar="TEXTS", help=f"File or hub data set: {options.TEXTS}")],
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder for the ternary model and its checkpoints.")
    ],
    column: Column = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N texts.")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps; default: one pass over the texts.")
    ] = None,
    prefix: Annotated[
        list[str] | None,
        typer.Option(help="Put before texts in turn; default: e5's for e5, else the model's prompts."),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            callback=options.model_name,
            help="Another model with the same tokenizer; default: the model itself. A ternary MODEL needs "
            "its original here.",
        ),
    ] = None,
    rule: Rule = None,
    activation_bits: ActivationBits = None,
    embedding_bits: Annotated[
        Literal[4, 8, 16] | None,
        typer.Option(help="Word embeddings: 8 (int8, the default), 4 (4 bits) or 16 (unchanged)."),
    ] = None,
    skip: Skip = None,
    holdout: Annotated[
        int,
        typer.Option(min=0, help="Texts to keep out of training and measure closeness on; drawn from all."),
    ] = 256,
    joined_ratio: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Share of texts that join several into one; default: 0.05."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the last checkpoint in OUTPUT.")
    ] = False,
    trust_remote_code: Trust = False,
    force: options.Force = False,
    as_json: AsJson = False,
    help_all: Annotated[
        bool,
        typer.Option("--help-all", callback=_print_settings, is_eager=True, help="List all settings."),
    ] = False,
) -> Iterator[Result]:
    """Train a ternary model on raw text until its vectors are close to the original's."""
    if misplaced := next((v for v in (model, texts, str(output)) if v.startswith("--")), None):
        raise typer.BadParameter(f"{misplaced}: no such option here; settings come after MODEL TEXTS OUTPUT")
    reporting.check_output(output, force or resume, ", or go on with --resume")
    import tritern
    from tritern.distillation.arguments import parse_settings
    from tritern.distillation.data import usual_prefixes

    try:
        settings = parse_settings(context.args)
    except tritern.TriternError as error:
        raise typer.BadParameter(str(error)) from None
    if taken := {"output_dir", "resume_from_checkpoint"}.intersection(settings):
        raise typer.BadParameter(f"--{taken.pop()}: the folder is OUTPUT, and --resume goes on with it")
    if steps is not None:
        settings["steps"] = steps
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for chatty in ("httpx", "sentence_transformers", "datasets"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    given: dict[str, Any] = dict(
        rule=rule, activation_bits=activation_bits, embedding_bits=embedding_bits, skip=skip
    )
    given = {name: value for name, value in given.items() if value}  # none: distill has its own defaults
    student = tritern.distill(
        loading.load(model, trust_remote_code=trust_remote_code),
        loading.read("-", limit=limit) if texts == "-" else texts,
        output,
        column=None if texts == "-" else column,
        limit=None if texts == "-" else limit,
        teacher=loading.load(teacher, trust_remote_code=trust_remote_code) if teacher else None,
        config=tritern.TernaryConfig(**given) if given else None,
        prefixes=prefix or usual_prefixes(model),
        holdout=holdout,
        joined_ratio=joined_ratio,
        resume=resume,
        **settings,
    )
    if os.environ.get("RANK", "0") == "0":  # only one of torchrun's processes prints
        yield _result(output, tritern.summary(student))


def _result(output: Path, size: Summary) -> Result:
    from tritern.distillation.record import RECORD_FILE

    record = json.loads((output / RECORD_FILE).read_text(encoding="utf-8"))
    data = {name: record[name] for name in ("model", "teacher", "data", "steps", "seconds", "fidelity")}
    lines = [str(size)]
    for stage, f in record["fidelity"].items():
        cosine, overlap = (math.nan if f[name] is None else f[name] for name in ("cosine", "overlap"))
        lines.append(f"{stage}: cosine {cosine:.4f}, top-{f['k']} overlap {overlap:.1%}")
    lines.append(f"Saved in {output}, with its model card (README.md) and the record of the run.")
    return Result({**data, "output": str(output), "summary": summary_data(size)}, "\n".join(lines))
