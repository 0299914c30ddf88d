"""``tritern tune``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from . import loading, options, reporting
from .options import AsJson, Trust
from .reporting import Result

EXAMPLES = """**Examples**

    tritern tune minilm-ternary
    tritern tune bge-base qwen3-embedding-0.6b --seconds 1200
    tritern tune --shape 4096x1024 --tokens 64 --tokens 4096 --output my-gpu.json

This compiles, checks and times every valid configuration and takes minutes. Later processes use the results:
a table in ~/.cache/tritern, or in the folder that the environment variable TRITERN_CACHE names."""


def tune(
    models: Annotated[
        list[str] | None,
        typer.Argument(metavar="MODEL", help="Folder or hub name, or a known size, such as bge-base."),
    ] = None,
    shape: Annotated[
        list[str] | None,
        typer.Option(metavar="NxK", help="Shape of a weight: out x in features. Repeatable."),
    ] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Number of tokens. Repeatable; default: powers of two from 16 to 16384."),
    ] = None,
    mode: Annotated[
        Literal["int8", "16bit"] | None, typer.Option(help="Kind of activations; default: both.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=1, help="After this time, stop before the next shape.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="File of the table; default: in the user's cache.")
    ] = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> Iterator[Result]:
    """Find the fastest kernel configurations for a model's shapes on this GPU."""
    shapes = list(shape or [])
    if bad := next((s for s in shapes if not re.fullmatch(r"[1-9]\d*x[1-9]\d*", s)), None):
        raise typer.BadParameter(f"--shape is like 4096x1024; received {bad}")
    if not models and not shapes:
        raise typer.BadParameter("name models, or weights with --shape")

    import torch

    if not torch.cuda.is_available():
        raise reporting.Refused("tuning needs a CUDA GPU, and torch sees none here")
    from tritern_kernels import tables
    from tritern_kernels import tune as kernels

    known = [name for name in models or () if name in kernels.MODELS]
    for name in models or ():
        if name not in known:
            shapes += _shapes(str(options.model_name(name)), trust_remote_code)
    gpu = torch.cuda.get_device_name()
    try:
        table = output or tables.user_table(gpu)
        tables.check_table(table)
    except ValueError as error:
        raise reporting.Refused(f"{error} Or name another table with --output.") from None
    arguments = ["--json", str(table), *_option("--models", known), *_option("--shapes", shapes)]
    arguments += _option("--tokens", tokens) + _option("--modes", mode and [mode])
    kernels.main([*arguments, *(["--seconds", str(seconds)] if seconds else [])])
    entries = len(json.loads(table.read_text())["entries"])
    yield Result({"gpu": gpu, "table": str(table), "entries": entries}, f"{table}: {entries} entries, {gpu}")


def _option(name: str, values: Iterable[Any] | None) -> list[str]:
    values = [str(value) for value in values or ()]
    return [name, *values] if values else []


def _shapes(model: str, trust_remote_code: bool) -> list[str]:
    """Shapes of the layers that are ternary or would become ternary."""
    import tritern
    from tritern.nn.replace import is_ternary

    loaded = loading.load(model, device="cpu", trust_remote_code=trust_remote_code)
    size = tritern.summary(loaded if is_ternary(loaded) else tritern.patch(loaded))
    return list(dict.fromkeys(f"{layer.shape[0]}x{layer.shape[1]}" for layer in size.layers))
