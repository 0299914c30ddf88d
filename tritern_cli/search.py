"""``tritern search``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from . import common
from .common import AsJson, BatchSize, Column, Device, Dtype, Model, Result, Trust

EXAMPLES = """**Examples**

    tritern search minilm-ternary notes.txt "what did we decide?" "who is on call?"
    tritern search minilm-ternary abstracts.parquet --column abstract -k 3 --json < queries.txt

Without queries, each line of standard input is one and is answered as it comes. Scores are cosines. Vectors
are not kept: a large corpus wants an index, such as faiss. Of long texts the beginning is shown; --json has
them whole."""

SHOWN = 300
"""Characters of a text."""


def search(
    model: Model,
    texts: Annotated[str, typer.Argument(metavar="TEXTS", help=f"What is searched: {common.TEXTS}")],
    queries: Annotated[
        list[str] | None, typer.Argument(metavar="QUERY", help="Default: lines of standard input.")
    ] = None,
    k: Annotated[int, typer.Option("-k", min=1, help="Texts shown for each query.")] = 5,
    column: Column = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use no more than so many texts.")] = None,
    batch_size: BatchSize = 32,
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
    corpus = common.read(texts, column=column, limit=limit)
    loaded = common.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)

    from sentence_transformers.util import semantic_search

    bar = sys.stderr.isatty()
    vectors = loaded.encode_document(
        corpus, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=bar
    )
    for query in queries or _queries():
        asked = loaded.encode_query(query, convert_to_tensor=True, show_progress_bar=False)
        found = semantic_search(asked, vectors, top_k=k)[0]
        hits = [{"score": h["score"], "text": corpus[int(h["corpus_id"])]} for h in found]
        yield Result(
            {"query": query, "hits": hits}, "\n".join([typer.style(query, bold=True), *map(_line, hits)])
        )


def _queries() -> Iterator[str]:
    """Queries from standard input, as they come."""
    if sys.stdin.isatty():
        typer.echo("One query a line; Ctrl-D ends.", err=True)
    return (line.strip() for line in common.lines() if line.strip())


def _is_unicode(text: str) -> bool:
    """Not so where an argument's bytes could not be decoded: Python keeps them as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _line(hit: dict[str, Any]) -> str:
    """A hit on one line: a text may be a whole document."""
    score = typer.style(format(hit["score"], ".3f"), fg="green")
    text = " ".join(hit["text"].split())
    return f"  {score}  {text if len(text) <= SHOWN else text[:SHOWN] + ' ...'}"
