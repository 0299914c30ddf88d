"""``tritern search``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from . import loading, options, reporting
from .options import AsJson, Column, Device, Dtype, Model, Trust
from .reporting import Result

EXAMPLES = """**Examples**

    tritern search minilm-ternary notes.txt "what did we decide?" "who is on call?"
    tritern search minilm-ternary abstracts.parquet --column abstract -k 3 --json < queries.txt
    tritern search minilm-ternary corpus.txt "one query" --index corpus.index --kind ivf-flat
    tritern search minilm-ternary corpus.index "another query"

Without queries, each line of standard input is one query and is answered at once. --index keeps the vectors:
the same command then embeds nothing again, or continues after an interruption. Later the folder can be named
in place of the texts. Long texts are cut; --json shows them whole. Needs the search extra:
pip install 'tritern[search]'."""

SHOWN = 300
"""Characters of a text to show."""
KINDS = "flat", "ivf-flat", "ivf-pq", "hnsw", "int8", "binary"
"""The kinds of ``tritern.search``; importing that takes seconds."""
ROWS_FILE = "rows.sqlite"
"""The file that marks the folder of an index."""


def search(
    model: Model,
    texts: Annotated[
        str,
        typer.Argument(
            metavar="TEXTS", help=f"Texts to search: the folder of an index (--index), or {options.TEXTS}"
        ),
    ],
    queries: Annotated[
        list[str] | None, typer.Argument(metavar="QUERY", help="Default: lines of standard input.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Texts to show per query.")] = 5,
    index: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Keep the index here; use it again if it exists."),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(KINDS)}, or a string for faiss.index_factory; default: {KINDS[0]}."),
    ] = None,
    column: Column = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use at most N texts.")] = None,
    tokens_per_batch: Annotated[
        int | None, typer.Option(min=1, help="Tokens to embed at once; default: 1024 on a CPU, else 16384.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    trust_remote_code: Trust = False,
    as_json: AsJson = False,
) -> Iterator[Result]:
    """Embed texts and rank them for queries."""
    if texts == "-" and not queries:
        raise typer.BadParameter("standard input holds the texts (-), so name queries as arguments")
    if broken := next((q for q in queries or () if not _is_unicode(q)), None):
        raise typer.BadParameter(f"the query {broken!a} is not text in this terminal's encoding (use UTF-8)")
    made = (Path(texts) / ROWS_FILE).is_file()
    building = {"--index": index, "--kind": kind, "--column": column, "--limit": limit}
    if made and (given := [option for option, value in building.items() if value is not None]):
        raise typer.BadParameter(f"{texts} is an existing index: leave out {', '.join(given)}")
    if index and index.exists() and not (index / ROWS_FILE).is_file():
        if index.is_file() or any(index.iterdir()):
            raise reporting.Refused(f"{index} exists and is not an index: name another folder for --index")
    if index:
        reporting.check_writable(index)
    corpus = [] if made else loading.read(texts, column=column, limit=limit)
    loaded = loading.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    from tritern.search import SearchIndex

    if made:
        opened = SearchIndex.open(texts, loaded, tokens_per_batch=tokens_per_batch)
    else:
        opened = SearchIndex.build(
            index,
            loaded,
            corpus,
            kind=kind or "flat",
            tokens_per_batch=tokens_per_batch,
            show_progress_bar=True,
        )
    with opened:
        for query in queries or _queries():
            hits = [vars(hit) for hit in opened.search([query], k)[0]]
            lines = [typer.style(query, bold=True), *map(_line, hits)]
            yield Result({"query": query, "hits": hits}, "\n".join(lines))


def _queries() -> Iterator[str]:
    """Queries from standard input, as they come."""
    if sys.stdin.isatty():
        typer.echo("One query per line; Ctrl-D ends.", err=True)
    return (line.strip() for line in loading.lines() if line.strip())


def _is_unicode(text: str) -> bool:
    """Whether an argument's bytes could be decoded; Python keeps others as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _line(hit: dict[str, Any]) -> str:
    """A hit on one line; its text may be a whole document."""
    score = typer.style(format(hit["score"], ".3f"), fg="green")
    text = " ".join(hit["text"].split())
    return f"  {score}  {text if len(text) <= SHOWN else text[:SHOWN] + ' ...'}"
