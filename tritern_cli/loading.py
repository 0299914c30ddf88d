"""Commands' inputs: models, and texts of files, data sets and standard input."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .reporting import Refused

if TYPE_CHECKING:  # torch takes seconds to import: commands import it after checking their arguments
    from sentence_transformers import SentenceTransformer


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
        known = f"not a folder here, so a name on the hub; tritern comes with {', '.join(shipped())}"
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
    """The ``first`` texts. If that is None, ``drawn_count`` random ones of all, or of the first 100,000: a
    file sorted by source starts with texts of one source.
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
