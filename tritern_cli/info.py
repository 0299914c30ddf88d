"""``tritern info``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from . import loading, options, reporting
from .convert import summary_data
from .options import AsJson, Trust
from .reporting import Result

EXAMPLES = """**Examples**

    tritern info
    tritern info minilm-ternary
    tritern info minilm-ternary --seal
    tritern info all-MiniLM-L6-v2 --json | jq .summary.bits_per_weight"""


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            callback=options.model_name,
            help="Folder or hub name; default: versions only.",
        ),
    ] = None,
    seal: Annotated[
        bool,
        typer.Option(
            "--seal", help="Accept the changed files of a ternary model's folder, if the model loads."
        ),
    ] = False,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> Iterator[Result]:
    """Show a model's ternary layers, its other layers with reasons, its size, and the versions in use.

    For a model that is not ternary, show the result of convert with its defaults.
    """
    if seal and (model is None or not Path(model).is_dir()):
        raise typer.BadParameter("--seal goes with the folder of a ternary model")
    found = reporting.environment()
    if model is None:
        yield Result({"environment": found}, reporting.footer(found))
        return

    import tritern
    from tritern.checkpoint.digest import resealed
    from tritern.nn.replace import is_ternary

    if seal:
        reporting.check_writable(Path(model))
    with resealed(model) if seal else nullcontext([]) as changed:
        loaded = loading.load(model, device="cpu", trust_remote_code=trust_remote_code)
    ternary = is_ternary(loaded)
    size = tritern.summary(loaded)
    note = ""
    if size.planned and not size.refusal:
        size = size.planned
        note = f"{model} is not ternary; `tritern convert` would make this of it:\n"
    if seal:
        note = f"Sealed again: {', '.join(changed) or 'no file had changed'}.\n{note}"
    data: dict[str, Any] = {"sealed": changed} if seal else {}
    data |= {"model": model, "ternary": ternary, "summary": summary_data(size), "environment": found}
    yield Result(data, f"{note}{size}\n{reporting.footer(found)}")
