"""``tritern info``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

import typer

from . import common
from .common import AsJson, Result, Trust
from .convert import summary_data

EXAMPLES = """**Examples**

    tritern info
    tritern info minilm-ternary
    tritern info all-MiniLM-L6-v2 --json | jq .summary.bits_per_weight"""


def info(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL", callback=common.model_name, help="Folder or hub name; without it: versions only."
        ),
    ] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> Iterator[Result]:
    """What is ternary in a model, what is not and why, and what it weighs; and the versions in use.

    Of a model that is not ternary: what convert, with its defaults, would make of it.
    """
    found = common.environment()
    if model is None:
        yield Result({"environment": found}, common.footer(found))
        return

    import tritern
    from tritern.saving import is_ternary

    loaded = common.load(model, device="cpu", trust_remote_code=trust_remote_code)
    ternary = is_ternary(loaded)
    size = tritern.summary(loaded if ternary else tritern.patch(loaded))
    note = "" if ternary else f"{model} is not ternary; this is what `tritern convert` would make of it.\n"
    data = {"model": model, "ternary": ternary, "summary": summary_data(size), "environment": found}
    yield Result(data, f"{note}{size}\n{common.footer(found)}")
