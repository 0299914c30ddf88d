"""The folder of texts behind an index: its name, its documents, and questions to begin with."""

from __future__ import annotations

import os
import re
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from .render import split_title

SHORTEST, LONGEST, EXAMPLES = 4, 60, 3
"""Characters of an example question, and the number of them."""


@dataclass(frozen=True)
class Corpus:
    """What the start view shows; ``folder`` is None where the index does not say it."""

    name: str
    folder: Path | None
    documents: frozenset[str]
    examples: tuple[str, ...]

    @classmethod
    def of(cls, index: Path, passages: Iterable[tuple[str, str]], examples: Sequence[str] = ()) -> Corpus:
        """The corpus of an index folder; without ``examples`` they are titles or first lines of its texts."""
        told = index / "texts"
        folder = Path(os.fsdecode(told.read_bytes())) if told.is_file() else None
        documents: set[str] = set()
        titles: dict[str, str] = {}  # the first that fits, of each document
        for id, text in passages:
            name = document(id)
            documents.add(name)
            if name in titles:
                continue
            title = textwrap.shorten(_title(id, text), LONGEST, placeholder="")
            if len(title) >= SHORTEST and title[0].isalnum():
                titles[name] = title
        found = list(dict.fromkeys(titles.values()))
        step = max(1, len(found) // EXAMPLES)
        chosen = tuple(examples) or tuple(found[::step][:EXAMPLES])
        return cls((folder or index.resolve()).name, folder, frozenset(documents), chosen)

    def source(self, path: str) -> Path | None:
        """The file of a document of the index; None for everything else."""
        return self.folder / path if self.folder and path in self.documents else None


def document(id: str) -> str:
    """The file or address that a passage comes from: its id without the line."""
    return id if is_address(id) else re.sub(r":\d+(#\d+)?$", "", id)


def link(id: str) -> str:
    """Where the page's link to a passage's source leads."""
    return id if is_address(id) else f"source?path={quote(document(id))}"


def is_address(id: str) -> bool:
    return id.startswith(("http://", "https://"))


def _title(id: str, text: str) -> str:
    title, body = split_title(document(id), text)
    return (
        title.rpartition(" > ")[2].replace("`", "")
        or re.split(r"(?<=[.!?])\s|\n", body.strip(), maxsplit=1)[0]
    )
