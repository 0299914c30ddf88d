"""Options that several verbs take, and what stands behind them: models, texts, the environment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:  # torch takes seconds to import: verbs do so once their arguments are known to be good
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Result:
    """What a verb found: ``data`` for ``--json``, ``text`` for people."""

    data: dict[str, Any]
    text: str


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a sentence-transformer.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print results as JSON, one object a line, and nothing else.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: a GPU if there is one.")]
Dtype = Annotated[
    Literal["float32", "float16", "bfloat16"] | None,
    typer.Option(help="Of all that is not ternary; default: as saved."),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]
Rule = Annotated[
    Literal["mse", "twn", "absmean"] | None,
    typer.Option(help="How codes and scales come from a weight; default: mse."),
]
ActivationBits = Annotated[
    Literal[8, 16] | None, typer.Option(help="8, the default: int8 per token; 16: as they are.")
]
Skip = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME", help="Layers to leave in full precision: a name or pattern. Repeatable."),
]
Column = Annotated[str | None, typer.Option(help="Of the texts; default: text, or the first with strings.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Texts encoded at once.")]
Force = Annotated[bool, typer.Option("--force", help="Write into a folder, or over a file, that is there.")]
TEXTS = "one text a line, or .jsonl, .csv, .parquet, also compressed; - is standard input."


def load(
    name: str, *, device: str | None = None, dtype: str | None = None, trust_remote_code: bool = False
) -> SentenceTransformer:
    """A model from a folder or from the hub, ternary or not."""
    import torch
    from sentence_transformers import SentenceTransformer

    from tritern import CheckpointError, TriternError

    if not Path(name).exists() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise TriternError(f"model {name}: there is no such folder")
    settings = {"dtype": getattr(torch, dtype)} if dtype else {}
    try:
        return SentenceTransformer(
            name, device=device, trust_remote_code=trust_remote_code, model_kwargs=settings
        )
    except CheckpointError:
        raise
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        where = "" if Path(name).is_dir() else ", which is no folder here, from the hub"
        on = f" on {device}" if device else ""
        raise TriternError(f"cannot load model {name}{where}{on}: {error}") from error


def read(source: str, *, column: str | None = None, limit: int | None = None) -> list[str]:
    """The texts of a file, a data set on the hub or standard input, without empty ones."""
    from tritern import TriternError

    if source == "-":
        try:
            texts = list(typer.get_text_stream("stdin", encoding="utf-8", errors="strict"))[:limit]
        except UnicodeDecodeError as error:
            raise TriternError(f"texts: standard input is not UTF-8 ({error.reason})") from None
    else:
        try:
            from tritern.distillation import read_texts
        except ImportError as error:
            raise ImportError(f"texts: {error}, or give lines with - on standard input") from error
        texts = read_texts(source, column=column, limit=limit)
    texts = [text for text in map(str.strip, texts) if text]
    if not texts:
        raise TriternError(f"texts: {'standard input' if source == '-' else source} is empty")
    return texts


def prepare(output: Path, force: bool, how: str = "") -> None:
    """Refuse a folder that holds something already, and make it, so that no work is done in vain."""
    from tritern import TriternError

    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        if not force:
            what = "is there already" if output.is_file() else "is not empty"
            raise TriternError(f"{output} {what}: name another, or write into it with --force{how}")
        if output.is_file():
            raise TriternError(f"{output} is a file; name a folder")
    output.mkdir(parents=True, exist_ok=True)


def is_ternary(model: SentenceTransformer) -> bool:
    """Whether a model has ternary layers."""
    from tritern import TernaryLinear

    return any(isinstance(module, TernaryLinear) for module in model.modules())


def environment() -> dict[str, str | None]:
    """Versions and the device that torch would take."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch

    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("tritern", "torch", "triton", "transformers", "sentence-transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    cuda = torch.cuda.is_available()
    found["gpu"] = torch.cuda.get_device_name() if cuda else None
    found["cpu"] = f"{torch.get_num_threads()} threads"
    return found


def footer(found: dict[str, str | None]) -> str:
    """The environment in a line."""
    return ", ".join(f"{name} {value or 'none'}" for name, value in found.items())
