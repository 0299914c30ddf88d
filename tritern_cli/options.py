"""Options and arguments of several commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def model_name(name: str | None) -> str | None:
    """Refuse at once a name that is neither a model's folder nor a possible name on the hub."""
    if name is None:
        return None
    path = Path(name)
    if name and path.is_dir():
        if not any((path / file).exists() for file in ("modules.json", "config.json", "adapter_config.json")):
            raise typer.BadParameter(f"the folder {name} holds no model (no modules.json, no config.json)")
        return name
    if path.is_file():
        raise typer.BadParameter(f"{name} is a file; name the folder of a model, or a model on the hub")
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise typer.BadParameter(f"there is no folder {name!r}")
    return name


Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        callback=model_name,
        help="Folder or hub name of a sentence-transformer, or minilm-l6-ternary, which comes with tritern.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print results as JSON, one object per line.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Dtype of all that is not ternary; default: as saved."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Rule = Annotated[
    Literal["mse", "twn", "absmean"] | None,
    typer.Option(help="Rule for codes and scales of a weight; default: mse."),
]
ActivationBits = Annotated[
    Literal[8, 16] | None, typer.Option(help="8 (int8 per token, the default) or 16 (unchanged).")
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Layers to leave in full precision: a name or pattern. Repeatable."),
]
Column = Annotated[
    str | None, typer.Option(help="Column of the texts; default: text, or the first with strings.")
]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts to encode at once.")]
Force = Annotated[
    bool, typer.Option("--force", help="Write into an existing folder or over an existing file.")
]
TEXTS = "one text per line, or .jsonl, .csv, .parquet, also compressed; - is standard input."
