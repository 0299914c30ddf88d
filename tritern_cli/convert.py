"""``tritern convert``."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from . import loading, options, reporting
from .options import ActivationBits, AsJson, Column, Device, Dtype, Force, Model, Rule, Skip, Trust
from .reporting import Result

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EXAMPLES = """**Examples**

    tritern convert all-MiniLM-L6-v2 minilm-ternary
    tritern convert BAAI/bge-base-en-v1.5 bge-ternary --calibrate texts.txt
    tritern convert BAAI/bge-base-en-v1.5 bge-ternary --calibrate texts.txt --bits 2.5
    tritern convert minilm-ternary minilm-dense --format dense
    tritern convert BAAI/bge-base-en-v1.5 bge.gguf --format gguf --skip "*.layer.0.*"

The loss of quality depends on the model: measure it with `tritern eval`, regain it with `tritern distill`."""

SAMPLE = 1024
"""Default of --calibrate-texts."""


def convert(
    model: Model,
    output: Annotated[
        Path, typer.Argument(metavar="OUTPUT", help="Folder for the result; with --format gguf a file.")
    ],
    rule: Rule = None,
    activation_bits: ActivationBits = None,
    embedding_bits: Annotated[
        Literal[4, 8, 16] | None,
        typer.Option(help="Word embeddings: 8 (int8, the default), 4 (4 bits) or 16 (unchanged)."),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            min=2,
            max=4,
            help="Bits of a weight: 2 (ternary, the default) or 4. Between them, with --calibrate: an "
            "average; layers that lose most get 4.",
        ),
    ] = None,
    skip: Skip = None,
    calibrate: Annotated[
        str | None, typer.Option(metavar="FILE", help=f"Calibrate on these texts: {options.TEXTS}")
    ] = None,
    calibrate_texts: Annotated[
        int | None,
        typer.Option(min=1, help=f"Use the first N of these texts; default: {SAMPLE} drawn from all."),
    ] = None,
    column: Column = None,
    dtype: Dtype = None,
    format: Annotated[
        Literal["tritern", "dense", "gguf"],
        typer.Option(
            help="tritern: packed; dense: ternary values in an ordinary checkpoint; gguf: llama.cpp."
        ),
    ] = "tritern",
    device: Device = None,
    trust_remote_code: Trust = False,
    force: Force = False,
    as_json: AsJson = False,
) -> Iterator[Result]:
    """Make a model ternary without training, and save it.

    A model that is ternary already can be saved in another --format or with other --embedding-bits.
    """
    if not calibrate and (column or calibrate_texts):
        raise typer.BadParameter("--column and --calibrate-texts say how to read the file of --calibrate")
    if bits not in (None, 2, 4) and not calibrate:
        raise typer.BadParameter("--bits between 2 and 4 goes with --calibrate: texts show what layers lose")
    _check_output(output, format, force)
    texts = loading.sample(calibrate, SAMPLE, first=calibrate_texts, column=column) if calibrate else None
    loaded = loading.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    import tritern
    from tritern.nn.replace import is_ternary

    settings = dict(rule=rule, activation_bits=activation_bits, embedding_bits=embedding_bits, skip=skip)
    if bits is not None:
        settings |= {"weight_bits": int(bits)} if bits in (2, 4) else {"bits": bits}
    settings = {name: value for name, value in {**settings, "calibration_texts": texts}.items() if value}
    preview = not is_ternary(loaded) and not texts and bits != 4
    if not is_ternary(loaded):
        with _without_warnings("tritern.patch"):  # the last line says the same
            tritern.patch(loaded, **settings)
    elif settings.keys() == {"embedding_bits"}:
        tritern.patch(loaded, embedding_bits=embedding_bits)
    elif format == "tritern" or settings:
        raise reporting.Refused(
            f"{model} is ternary already: save it with --format dense or gguf, or with --embedding-bits, and "
            "no other settings, or name the full-precision model"
        )
    size = tritern.summary(loaded)
    _save(loaded, output, format)
    files = [output] if output.is_file() else [f for f in output.rglob("*") if f.is_file()]
    total = sum(file.stat().st_size for file in files)
    data: dict[str, Any] = {"model": model, "output": str(output), "format": format, "bytes_on_disk": total}
    data["summary"] = summary_data(size)
    data["preview"] = preview
    if texts:
        note = "\nMeasure it on texts that it was not calibrated on."
    else:
        note = f"\n{_preview_note(model, output, format)}" if preview else ""
    yield Result(data, f"{size}\nSaved in {output}, {total / 1e6:.1f} MB on disk.{note}")


def _preview_note(model: str, output: Path, format: str) -> str:
    """The warning about a model that was only converted, with commands to measure and to train it."""
    original, made = shlex.quote(model), shlex.quote(str(output))
    measure = f"Measure it: tritern eval {made} FILE --teacher {original}\n" if format != "gguf" else ""
    return (
        "This is a preview of size and speed, not a model to serve: it was neither trained nor calibrated.\n"
        f"{measure}Train one to serve: tritern distill {original} FILE FOLDER"
    )


def summary_data(size: Any) -> dict[str, Any]:
    """A ``tritern.Summary`` as plain values."""
    return {**asdict(size), "dtype": str(size.dtype).removeprefix("torch.")}


def _check_output(output: Path, format: str, force: bool) -> None:
    if format != "gguf":
        reporting.check_output(output, force)
        return
    if output.is_dir():
        raise reporting.Refused(
            f"{output} is a folder; with --format gguf name a file, such as {output}.gguf"
        )
    if output.exists() and not force:
        raise reporting.Refused(
            f"{output} is there already: name another file, or write over it with --force"
        )
    reporting.check_writable(output)


@contextmanager
def _without_warnings(name: str) -> Iterator[None]:
    """The logger of that name keeps to errors."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _save(model: SentenceTransformer, output: Path, format: str) -> None:
    import tritern
    from tritern.checkpoint.digest import as_readable_as

    if format == "gguf":
        output.parent.mkdir(parents=True, exist_ok=True)
        from tritern.formats.gguf import export_gguf

        export_gguf(model, output)
        return
    if format == "dense":
        tritern.dequantize(model)
    model.save_pretrained(str(output))
    as_readable_as(output / "modules.json", output.rglob("model*.safetensors"))
