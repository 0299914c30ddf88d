"""``tritern eval``."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from . import loading, options, reporting
from .options import AsJson, BatchSize, Column, Device, Dtype, Model, Trust
from .reporting import Result

EXAMPLES = """**Examples**

    tritern eval minilm-ternary sample.txt --teacher all-MiniLM-L6-v2
    zcat corpus.txt.gz | tritern eval minilm-ternary - --json

Use texts like those that you will embed, and none that the model was trained or calibrated on. Time grows
with the square of their number."""

SAMPLE = 1000
"""Default of --limit."""


def evaluate(
    model: Model,
    texts: Annotated[str, typer.Argument(metavar="TEXTS", help=f"At least k + 2: {options.TEXTS}")],
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            callback=options.model_name,
            help="The original; default: the base model in MODEL's model card.",
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Neighbours to compare.")] = 10,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help=f"Use the first N texts; default: {SAMPLE:,} drawn from all."),
    ] = None,
    column: Column = None,
    prompt: Annotated[
        str | None, typer.Option(help="A prompt before the texts; default: the models' own.")
    ] = None,
    batch_size: BatchSize = 64,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> Iterator[Result]:
    """Compare a model's vectors and neighbours with its original's."""
    sample = loading.sample(texts, SAMPLE, first=limit, column=column)
    teacher = teacher or _base_model(model)

    import tritern

    settings = {"device": device, "dtype": dtype, "trust_remote_code": trust_remote_code}
    judged, original = loading.load(model, **settings), loading.load(teacher, **settings)
    fidelity = tritern.evaluate(
        judged, original, sample, k=k, batch_size=batch_size, prompt=prompt, show_progress_bar=True
    )
    values = {name: None if math.isnan(v) else v for name, v in asdict(fidelity).items()}
    yield Result({"model": model, "teacher": teacher, **values}, f"{fidelity}\nTeacher: {teacher}")


def _base_model(model: str) -> str:
    """The base model in the model card."""
    from huggingface_hub import ModelCard

    from tritern.pretrained import resolve

    try:
        folder = Path(resolve(model))
        card = folder / "README.md" if folder.is_dir() else model
        base = ModelCard.load(card).data.to_dict().get("base_model")
    except Exception:  # no card, no network or no YAML: no base model
        base = None
    if not isinstance(base, str):
        raise reporting.Refused(f"{model} has no model card that names its original: name it with --teacher")
    return base
