"""Options that several verbs take, and what stands behind them: models, texts, the environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:  # torch takes seconds to import: verbs do so once their arguments are known to be good
    from sentence_transformers import SentenceTransformer


@dataclass(frozen=True)
class Result:
    """What a verb found: ``data`` for ``--json``, ``text`` for people."""

    data: dict[str, Any]
    text: str


class Refused(Exception):
    """What a user can mend, said in the message."""


def model_name(name: str | None) -> str | None:
    """Refuse at once what can be neither a folder with a model nor a name on the hub."""
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
    from transformers.utils.logging import disable_progress_bar

    from tritern import CheckpointError
    from tritern.pretrained import device_with_kernels, in_float32_on_cpu, resolve, shipped

    if not sys.stderr.isatty():
        disable_progress_bar()
    settings = {"dtype": getattr(torch, dtype)} if dtype else {}
    path, device = resolve(name), device_with_kernels(device)
    try:
        model = SentenceTransformer(
            path, device=device, trust_remote_code=trust_remote_code, model_kwargs=settings
        )
        return in_float32_on_cpu(model, dtype)
    except CheckpointError:
        raise
    except (AssertionError, ImportError, OSError, RuntimeError, ValueError) as error:
        known = f"no folder here, so taken for a name on the hub; tritern comes with {', '.join(shipped())}"
        where = "" if Path(path).is_dir() else f" ({known})"
        on = f" on {device}" if device else ""
        raise Refused(f"cannot load model {name}{where}{on}: {error}") from error


def read(source: str, *, column: str | None = None, limit: int | None = None) -> list[str]:
    """The texts of a file, a data set on the hub or standard input, without empty ones."""
    from tritern.texts.files import read_texts

    if source == "-":
        texts = list(islice(lines(), limit))
    else:
        texts = read_texts(source, column=column, limit=limit)
    texts = [text for text in map(str.strip, texts) if text]
    if not texts:
        raise Refused(f"texts: {'standard input' if source == '-' else source} is empty")
    return texts


def sample(source: str, drawn_count: int, *, first: int | None, column: str | None = None) -> list[str]:
    """The ``first`` texts; where that is None, ``drawn_count`` of all, or of the first 100,000, by chance:
    a file sorted by source has texts of one source at its head.
    """
    from tritern.texts.sample import POOL, drawn

    if first is not None:
        return read(source, column=column, limit=first)
    texts = read(source, column=column, limit=POOL)
    return [texts[i] for i in drawn(texts, drawn_count)]


def lines() -> Iterator[str]:
    """Lines of standard input, as they come."""
    from tritern.texts import files

    return files.lines(typer.get_binary_stream("stdin"), "standard input")


def check_output(output: Path, force: bool, how: str = "") -> None:
    """Refuse a folder that holds something already or cannot be written, so that no work is done in vain."""
    if output.is_file() or (output.is_dir() and any(output.iterdir())):
        if not force:
            what = "is there already" if output.is_file() else "is not empty"
            raise Refused(f"{output} {what}: name another, or write into it with --force{how}")
        if output.is_file():
            raise Refused(f"{output} is a file; name a folder")
    check_writable(output)


def check_writable(path: Path) -> None:
    """Refuse a file or folder that could not be made or written."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if there != path and not there.is_dir():
        raise Refused(f"cannot write {path}: {there} is a file")
    if not os.access(there, os.W_OK):
        raise Refused(f"cannot write {path}: no permission to write {there}")
    try:
        with TemporaryFile(dir=there if there.is_dir() else there.parent):
            pass
    except OSError as error:
        raise Refused(f"cannot write {path}: {error.strerror} in {there}") from None


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
